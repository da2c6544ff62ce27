"""``fusemlp train`` from the command to the run folder: results, interruption, divergence, resuming."""

import importlib
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

import make
from fusemlp import MLP, Engine, ProgressBar, load_checkpoint
from fusemlp.cli.options import TrainOptions
from fusemlp.cli.session import prepared_data
from fusemlp.cli.train import Recorder
from fusemlp.report.runs import Run
from fusemlp.tables.recipe import CLASS_DECAY
from fusemlp.tables.training import fit_arguments, new_engine
from make import output_of, read, refusal, result_of, rows, run


def same_model(first, second, name="model"):
    """Return whether two runs end with bitwise the same arrays."""
    a, b = (load_file(folder / f"checkpoints/{name}.safetensors") for folder in (first, second))
    return a.keys() == b.keys() and all(a[name].tobytes() == b[name].tobytes() for name in a)


def test_digits_as_typed(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert run("train", "digits") == 0
    shown = capsys.readouterr()
    assert float(re.search(r"^test accuracy (0\.\d{4})$", shown.out, re.MULTILINE)[1]) >= 0.96
    folder = Path(re.search(r"^run folder (runs/digits-\d{8}-\d{6})$", shown.out, re.MULTILINE)[1])
    assert f"plot {folder}/curves.png" in shown.out
    files = {"config.json", "metrics.csv", "report.json", "report.html", "curves.png", "training_rows.npy"}
    assert {entry.name for entry in folder.iterdir()} == {*files, "checkpoints", ".lock"}
    # Progress goes to stderr, a line an epoch without a terminal.
    assert len(re.findall(r"^epoch \d+/\d+  loss ", shown.err, re.MULTILINE)) == len(rows(folder / "metrics.csv"))


def test_the_classic_tutorial_as_typed(tmp_path, capsys):
    typed = "train mnist5k --hidden 10 --loss mse --optimizer sgd --lr 0.01 --batch-size 32 --epochs 100"
    assert result_of(capsys, *typed.split(), "--out", tmp_path / "run")["test"]["accuracy"] >= 0.6
    assert read(tmp_path / "run/config.json")["network"]["sizes"] == [784, 10, 10]


def test_what_a_run_folder_holds(tmp_path, capsys):
    folder, asked = tmp_path / "run", ("--epochs", "4", "--hidden", " 8 , 5", "--hidden", "6", "--seed", "3")
    printed = result_of(capsys, "train", "iris", *asked, "--out", folder)
    places = {"run": folder, "plot": folder / "curves.png", "page": folder / "report.html"}
    assert {name: printed.pop(name) for name in places} == {name: str(path) for name, path in places.items()}

    config = read(folder / "config.json")
    assert config["network"]["sizes"] == [4, 8, 5, 6, 3] and config["loss"]["kind"] == "cross_entropy"
    assert config["options"]["seed"] == config["seed"] == 3
    assert config["data"]["source"] == "iris"
    assert len(config["data"]["fingerprint"]) == 64
    assert config["preprocessor"]["classes"] == [0, 1, 2]
    assert config["versions"].keys() >= {"fusemlp", "numpy", "scipy", "scikit-learn", "python"}

    table = rows(folder / "metrics.csv")
    assert list(table[0]) == ["epoch", "loss", "accuracy", "val_loss", "val_accuracy", "learning_rate"]
    assert [row["epoch"] for row in table] == ["1", "2", "3", "4"]

    report = read(folder / "report.json")
    # the errors of held-out rows are long
    around = {"event", "columns", "tracked"}
    assert {name: printed[name] for name in printed.keys() - around} | {"held_out": report["held_out"]} == report
    assert report["final"] == {name: float(value) for name, value in table[-1].items() if name != "epoch"}
    confusion = np.array(report["test"]["confusion_matrix"])
    assert confusion.sum() == report["test"]["rows"] == 30
    # a stratified fifth of fifty rows of each
    assert confusion.sum(axis=1).tolist() == [10, 10, 10]
    assert np.trace(confusion) / 30 == pytest.approx(report["test"]["accuracy"])
    assert report["dead_units"].keys() == {"layer 1", "layer 2", "layer 3"}

    checkpoints = {entry.stem for entry in (folder / "checkpoints").iterdir()}
    assert checkpoints == {"last", "best", "model"}
    assert load_checkpoint(folder / "checkpoints/model.safetensors").network.sizes == (4, 8, 5, 6, 3)


def test_the_best_checkpoint_is_of_the_best_epoch(tmp_path):
    folder = tmp_path / "run"
    assert run("train", "wine", "--epochs", "40", "--lr", "0.02", "--quiet", "--out", folder) == 0
    losses = [float(row["val_loss"]) for row in rows(folder / "metrics.csv")]
    best = load_checkpoint(folder / "checkpoints/best.safetensors")
    assert best.epochs_trained == 1 + int(np.argmin(losses))
    assert read(folder / "report.json")["best_epoch"] == best.epochs_trained
    assert load_checkpoint(folder / "checkpoints/last.safetensors").epochs_trained == 40


def test_early_stopping_keeps_the_best_weights(tmp_path, capsys):
    folder = tmp_path / "run"
    options = ["--epochs", "500", "--early-stopping", "3", "--lr", "0.05", "--quiet"]
    assert run("train", "wine", *options, "--out", folder) == 0
    report = read(folder / "report.json")
    assert report["epochs"] == report["best_epoch"] + 3 < 500
    assert f"stopped after epoch {report['epochs']}: val_loss has not improved" in capsys.readouterr().out
    model = load_checkpoint(folder / "checkpoints/model.safetensors").state_dict()
    best = load_checkpoint(folder / "checkpoints/best.safetensors").state_dict()
    assert all(np.array_equal(model[name], best[name]) for name in model)
    # There is no run to resume.
    assert "the run has ended" in refusal(capsys, "train", "--resume", folder)


def test_the_same_options_give_the_same_run(tmp_path):
    for name in ("a", "b"):
        assert run("train", "iris", "--epochs", "3", "--dropout", "0.2", "--quiet", "--out", tmp_path / name) == 0
    assert same_model(tmp_path / "a", tmp_path / "b")
    assert (tmp_path / "a/metrics.csv").read_bytes() == (tmp_path / "b/metrics.csv").read_bytes()
    # The command in config.json repeats the run.
    words = shlex.split(read(tmp_path / "a/config.json")["command"])
    words[words.index("--out") + 1] = str(tmp_path / "c")
    assert run(*words[1:]) == 0
    assert (tmp_path / "a/metrics.csv").read_bytes() == (tmp_path / "c/metrics.csv").read_bytes()


EVERYTHING = (
    "train wine --hidden 16 --hidden 8 --activation prelu,leaky_relu --slope 0.1 --dropout 0.1,0.2 --init he_uniform "
    "--label-smoothing 0.05 --class-weight balanced --optimizer adamw --lr 0.01 --beta1 0.8 --beta2 0.99 --eps 1e-7 "
    "--weight-decay 0.02 --no-decay-biases --clip-norm 5 --accumulate 2 --schedule cosine --lr-final 1e-4 "
    "--warmup 0.5 --batch-size 16 --drop-last --scale minmax --validation-fraction 0.2 --seed 5 --precision fp64 "
    "--backend numpy --plan eager --quiet"
)


def test_a_resumed_run_ends_bitwise_as_one_that_never_stopped(tmp_path, capsys):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert run(*EVERYTHING.split(), "--epochs", "9", "--out", whole) == 0
    # A run of nine epochs, killed in its sixth: checkpoint of the fourth, an extra row, a partial row.
    assert run(*EVERYTHING.split(), "--epochs", "9", "--out", parts) == 0
    _cut_back(parts, epochs=4, rows=5)
    assert run("train", "--resume", parts, "--quiet") == 0
    assert (parts / "metrics.csv").read_bytes() == (whole / "metrics.csv").read_bytes()
    for name in ("model", "last", "best"):
        assert same_model(whole, parts, name)
    assert "has done its 9 epochs; give it more: --epochs 18" in refusal(capsys, "train", "--resume", parts)


def _cut_back(folder, *, epochs, rows):
    """Reduce a finished run to the state after a kill: an earlier checkpoint, later rows, half a row."""
    lines = (folder / "metrics.csv").read_bytes().splitlines(keepends=True)
    for name in ("report.json", "curves.png", "metrics.csv"):
        (folder / name).unlink()
    for checkpoint in (folder / "checkpoints").iterdir():
        checkpoint.unlink()
    prepared = prepared_data(TrainOptions(**read(folder / "config.json")["options"]))

    class Stop(Recorder):
        def on_epoch_end(self, engine, epoch, logs):
            super().on_epoch_end(engine, epoch, logs)
            engine.stop_training = epoch + 1 == epochs

    new_engine(prepared).fit(**fit_arguments(prepared), callbacks=[Stop(Run(folder))])
    (folder / "metrics.csv").write_bytes(b"".join(lines[: rows + 1]) + lines[rows + 1][:7])


def test_epochs_can_be_raised(tmp_path, capsys):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert run("train", "iris", "--epochs", "6", "--quiet", "--out", whole) == 0
    assert run("train", "iris", "--epochs", "2", "--quiet", "--out", parts) == 0
    assert "can only be raised" in refusal(capsys, "train", "--resume", parts, "--epochs", "1")
    assert run("train", "--resume", parts, "--epochs", "6", "--quiet") == 0
    assert read(parts / "config.json")["epochs"] == 6
    assert (parts / "metrics.csv").read_bytes() == (whole / "metrics.csv").read_bytes()
    assert same_model(whole, parts)


def test_a_run_without_a_checkpoint_begins_anew(tmp_path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    for folder in (whole, killed):
        assert run("train", "iris", "--epochs", "2", "--quiet", "--out", folder) == 0
    for name in ("report.json", "metrics.csv", *(f"checkpoints/{name}.safetensors" for name in ("last", "model"))):
        (killed / name).unlink()
    assert run("train", "--resume", killed, "--quiet") == 0
    assert same_model(whole, killed)


@pytest.mark.parametrize("name", ["train", "sweep"])
def test_a_run_that_trains_is_not_resumed(name, tmp_path, monkeypatch, capsys):
    folder, codes = tmp_path / "run", []
    module = importlib.import_module(f"fusemlp.cli.{name}")
    real = module.finish

    def contents():
        return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}

    def finish(*given, **named):
        before = contents()
        codes.append(run(name, "--resume", folder))
        assert contents() == before
        return real(*given, **named)

    monkeypatch.setattr(module, "finish", finish)
    options = ("--vary", "seed=0:2") if name == "sweep" else ()
    assert run(name, "iris", *options, "--epochs", "1", "--quiet", "--out", folder) == 0
    refusal = f"error: resume: another process trains in {str(folder)!r}; wait for its end, or end it\n"
    assert codes == [1] and capsys.readouterr().err == refusal
    if name == "train":
        assert run("train", "--resume", folder, "--epochs", "2", "--quiet") == 0
        assert codes == [1, 1] and capsys.readouterr().err == refusal


@pytest.mark.parametrize("name", ["train", "sweep"])
def test_a_default_folder_that_another_process_makes_first(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    module = importlib.import_module(f"fusemlp.cli.{'session' if name == 'train' else name}")
    real, chosen = module.choose_folder, []

    def choose_folder(*given):
        chosen.append(real(*given))
        (chosen[0] / "checkpoints").mkdir(parents=True)
        return chosen[0]

    monkeypatch.setattr(module, "choose_folder", choose_folder)
    options = ("--vary", "seed=0:2") if name == "sweep" else ()
    assert run(name, "iris", *options, "--epochs", "1", "--quiet") == 0
    assert [path.name for path in chosen[0].iterdir()] == ["checkpoints"]
    assert (tmp_path / f"{chosen[0]}-2" / "report.json").exists()


def test_other_data_cannot_be_gone_on_with(tmp_path, capsys):
    X, y = make.data(60, 3, 2)
    data, folder = tmp_path / "data.npz", tmp_path / "run"
    np.savez(data, X=X, y=y)
    assert run("train", data, "--epochs", "1", "--quiet", "--out", folder) == 0
    (folder / "report.json").unlink()
    np.savez(data, X=X + 1.0, y=y)
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    assert run("train", "--resume", folder, "--epochs", "2") == 1
    assert "are not those that the run was started with" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path, capsys):
    folder = tmp_path / "run"
    options = ["--optimizer", "sgd", "--lr", "10", "--loss", "mse", "--scale", "none", "--epochs", "50", "--quiet"]
    assert run("train", "wine", *options, "--out", folder) == 1
    shown = capsys.readouterr()
    assert re.search(r"^error: loss: it became NaN or infinite in epoch \d+\. Likely cause: ", shown.err)
    assert f"run folder {folder}" in shown.out
    report = read(folder / "report.json")
    assert report["diverged"]
    assert report["diagnosis"][0]["name"] == "divergence"
    last = load_checkpoint(folder / "checkpoints/last.safetensors")
    assert all(np.isfinite(array).all() for array in last.state_dict().values())
    assert last.epochs_trained == report["epochs"]
    assert not (folder / "checkpoints/model.safetensors").exists()
    assert "diverged, and would again" in refusal(capsys, "train", "--resume", folder)


def test_dead_units_are_said_with_the_remedy(tmp_path, capsys):
    # the first large step drives most units below zero for every row
    options = ["--lr", "30", "--clip-norm", "1e3", "--epochs", "3", "--early-stopping", "0", "--seed", "1", "--quiet"]
    shown = output_of(capsys, "train", "iris", *options, "--out", tmp_path / "run")
    fraction = read(tmp_path / "run/report.json")["dead_units"]["layer 1"]
    assert fraction > 0.3
    assert f"dead units: relu units that are zero for every training row: {fraction:.0%} of layer 1" in shown
    assert "leaky_relu" in shown


@pytest.mark.skipif(os.name != "posix", reason="SIGINT is sent to a process group of POSIX")
def test_ctrl_c_ends_cleanly_and_keeps_the_model(tmp_path):
    folder = tmp_path / "run"
    # Far more epochs than fit before the interruption.
    command = [sys.executable, "-m", "fusemlp", "train", "iris", "--epochs", "1000000", "--out", str(folder)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    for line in process.stderr:
        if line.startswith("epoch 3/"):
            break
    process.send_signal(signal.SIGINT)
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 0
    done = int(re.search(r"^interrupted after epoch (\d+)$", out, re.MULTILINE)[1])
    assert done >= 3
    assert "test accuracy" in out
    assert len(rows(folder / "metrics.csv")) == done
    assert read(folder / "report.json")["interrupted"]
    assert (folder / "curves.png").exists()
    model = load_checkpoint(folder / "checkpoints/model.safetensors")
    assert model.epochs_trained == done
    # The position inside the epoch is kept too.
    last = load_checkpoint(folder / "checkpoints/last.safetensors")
    assert last.update_count == model.update_count


def test_the_bar_is_redrawn_at_most_ten_times_a_second(monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    logs = dict.fromkeys(("loss", "accuracy", "val_loss", "val_accuracy", "learning_rate"), 0.123456)
    bar, epochs = ProgressBar(), 20_000
    bar.set_model(Engine(MLP([2, 2])))
    bar.set_params({"epochs": epochs})
    bar.on_train_begin()
    began = time.perf_counter()
    for epoch in range(epochs):
        bar.on_epoch_end(epoch, logs)
    seconds = time.perf_counter() - began
    bar.on_exit()
    # A redraw takes about a millisecond, a call without a redraw one comparison: 2 % of an epoch of 2 ms.
    assert seconds / epochs < 40e-6


def test_quiet_shows_nothing_and_a_terminal_a_bar(tmp_path, monkeypatch, capsys):
    assert run("train", "iris", "--epochs", "60", "--lr", "0.01", "--quiet", "--out", tmp_path / "quiet") == 0
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    assert run("train", "iris", "--epochs", "2", "--out", tmp_path / "run") == 0
    shown = capsys.readouterr()
    assert "epoch 2/2" in shown.err and "test accuracy" in shown.out


@pytest.mark.parametrize(
    ("options", "expected"),
    [([], CLASS_DECAY), (["--weight-decay", "0"], 0.0), (["--optimizer", "sgd"], 0.0), (["--task", "regression"], 0.0)],
)
def test_classes_of_a_table_decay(tmp_path, options, expected):
    file = tmp_path / "table.csv"
    file.write_text("a,b,y\n" + "".join(f"{i % 7},{i % 5},{i % 3}\n" for i in range(60)))
    words = ("--target", "y", "--epochs", "1", "--models", "1", "--quiet", "--out", tmp_path / "run")
    assert run("train", file, *words, *options) == 0
    assert read(tmp_path / "run/config.json")["optimizer"].get("weight_decay", 0.0) == expected
