"""``fusemlp sweep``: the models that ``--vary`` means, and the best of them as a run like one of ``train``."""

import re
import shlex
import signal
import subprocess
import sys
import time
import weakref
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from safetensors.numpy import load_file

from fusemlp.cli import sweep as command
from fusemlp.cli import vary
from fusemlp.cli.vary import combinations, parsed_axes, spelled_value
from fusemlp.fleet import candidates
from fusemlp.fleet.candidates import Candidate
from fusemlp.tables import recipe
from make import output_of, read, refusal, result_of, rows, run, table


def without_seconds(folder):
    return [{**row, "seconds": ""} for row in rows(folder / "results.csv")]


def test_a_sweep_and_what_comes_of_it(tmp_path, capsys):
    folder = tmp_path / "sweep"
    varied = ["--vary", "lr=0.001:0.1:log:4", "--vary", "hidden=none,8,6x4", "--vary", "seed=3:5"]
    assert run("sweep", "iris", *varied, "--epochs", "4", "--out", folder) == 0
    shown = capsys.readouterr()
    assert shown.err == (
        "iris: 108 training, 12 validation, 30 test rows; 4 inputs, 3 classes\n"
        "24 models, 4 lr x 3 hidden x 2 seed; 4 epochs; cross_entropy; adam; numpy fp32, plan "
        f"{read(folder / 'config.json')['plan']}\n"
        "scoring\n"
    )
    for words in ("24 models: 24 trained", "test accuracy", f"run folder {folder}", f"plot {folder}/scores.png"):
        assert words in shown.out

    table = rows(folder / "results.csv")
    scores = "loss accuracy val_loss val_accuracy mean_val_loss std_val_loss"
    header = f"model lr hidden seed status {scores} epochs best_epoch seconds reason"
    assert list(table[0]) == header.split()
    assert sorted(int(row["model"]) for row in table) == list(range(24))
    assert {row["lr"] for row in table} == {"0.001", "0.00464159", "0.0215443", "0.1"}
    assert {row["hidden"] for row in table} == {"none", "8", "6x4"}
    # Models that differ in their seed alone stand together, ordered by their mean.
    losses, means, deviations = (
        np.array([float(row[name]) for row in table]).reshape(12, 2)
        for name in ("val_loss", "mean_val_loss", "std_val_loss")
    )
    assert len({(row["lr"], row["hidden"]) for row in table[::2]}) == 12
    np.testing.assert_allclose(means[:, 0], losses.mean(axis=1), rtol=1e-12)
    np.testing.assert_allclose(deviations[:, 0], losses.std(axis=1, ddof=1), rtol=1e-9)
    assert means[:, 0].tolist() == sorted(means[:, 0]) and (losses[:, 0] <= losses[:, 1]).all()
    assert (folder / "scores.png").read_bytes().startswith(b"\x89PNG")

    report = read(folder / "report.json")
    # The seeds of the best combination are one model, whose curves are their mean.
    assert [(one["seed"], one["val_loss"]) for one in sorted(report["models"], key=lambda one: one["val_loss"])] == [
        (int(row["seed"]), float(row["val_loss"])) for row in table[:2]
    ]
    assert float(rows(folder / "metrics.csv")[-1]["val_loss"]) == pytest.approx(means[0, 0], rel=1e-12)
    assert "kept of them: 2 models, merged into one that gives their mean" in shown.out
    assert "2 models of 4-" in (folder / "report.html").read_text()
    # Other commands accept the folder.
    assert result_of(capsys, "evaluate", folder)["accuracy"] == report["test"]["accuracy"]
    features = tmp_path / "features.npz"
    np.savez(features, X=np.ones((2, 4)))
    assert run("predict", folder, "--data", features, "--out", tmp_path / "p.csv") == 0
    assert run("export", folder, "--safetensors", tmp_path / "m.safetensors") == 0
    assert run("plot", folder, "--out", tmp_path / "plot.png") == 0
    assert "holds the best model of a sweep" in refusal(capsys, "train", "--resume", folder)


# Every parameter that can vary, with the options that interact with it.
AGAIN = {
    "adam": "--vary lr=0.002,0.02 --vary betas=0.8x0.99,0.9x0.9 --vary label_smoothing=0,0.1 --schedule cosine "
    "--warmup 0.5 --early-stopping 2 --class-weight balanced",
    "sgd": "--optimizer sgd --vary momentum=0.5,0.9 --vary weight-decay=0:0.1:3 --vary seed=5:8 --schedule one_cycle "
    "--nesterov --drop-last --split-seed 9",
    "widths": "--vary hidden=12,8x5 --vary dropout=0.1,0.3 --vary batch_size=8:32:log:3 --schedule step --lr-step 2 "
    "--seed 4 --activation tanh --precision fp64 --loss mse",
}


@pytest.mark.parametrize("options", AGAIN.values(), ids=AGAIN.keys())
def test_the_best_is_what_train_makes_of_its_command(options, tmp_path, capsys):
    folder = tmp_path / "sweep"
    printed = result_of(capsys, "sweep", "wine", *options.split(), "--epochs", "5", "--quiet", "--out", folder)
    words = shlex.split(printed["train"])
    # the seeds of one combination are trained together
    assert words[:3] == ["fusemlp", "sweep" if "--vary seed" in options else "train", "wine"]
    quiet = [] if "--quiet" in words else ["--quiet"]
    assert run(*words[1:], *quiet, "--out", tmp_path / "train") == 0
    assert (folder / "metrics.csv").read_bytes() == (tmp_path / "train/metrics.csv").read_bytes()
    first, second = (load_file(path / "checkpoints/model.safetensors") for path in (folder, tmp_path / "train"))
    assert first.keys() == second.keys() and all(first[name].tobytes() == second[name].tobytes() for name in first)
    one, other = read(folder / "report.json"), read(tmp_path / "train/report.json")
    assert one.pop("seconds") > 0 < other.pop("seconds")
    assert one == other
    assert printed["test"] == one["test"]


def test_the_command_of_several_seeds_has_the_rate_and_the_average_of_a_large_table(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(recipe, "LARGE_BATCHES", ((40, 16, 0.0015),))
    options = "--target price --scale robust --no-log-target --vary hidden=4,6 --seeds 2 --epochs 2 --quiet"
    printed = result_of(capsys, "sweep", table(tmp_path / "data.csv"), *options.split(), "--out", tmp_path / "sweep")
    assert "--batch-size 16" in printed["train"] and "--lr 0.0015" in printed["train"]
    assert run(*shlex.split(printed["train"])[1:], "--quiet", "--out", tmp_path / "again") == 0
    first, second = ((tmp_path / name / "metrics.csv").read_bytes() for name in ("sweep", "again"))
    assert first == second


def test_a_sample_is_some_of_all_and_always_the_same(tmp_path):
    varied = ["--vary", "lr=0.001:0.1:log:30", "--vary", "seed=0:100000", "--epochs", "1", "--quiet"]
    for name in ("a", "b"):
        assert run("sweep", "iris", *varied, "--sample", "5", "--out", tmp_path / name) == 0
    one, other = (without_seconds(tmp_path / name) for name in ("a", "b"))
    assert len({(row["lr"], row["seed"]) for row in one}) == 5
    assert one == other


def test_seeds_of_each_combination(tmp_path, capsys):
    options = ["--vary", "lr=0.001:0.1:log:30", "--sample", "2", "--epochs", "2", "--quiet"]
    best = result_of(capsys, "sweep", "wine", *options, "--seeds", "3", "--seed", "7", "--out", tmp_path / "a")["best"]
    table = rows(tmp_path / "a/results.csv")
    assert len({row["lr"] for row in table}) == 2
    assert [sorted(row["seed"] for row in table[at : at + 3]) for at in (0, 3)] == [["7", "8", "9"]] * 2
    assert best["seeds"] == 3
    assert best["mean"] == float(table[0]["mean_val_loss"]) and best["spread"] == float(table[0]["std_val_loss"])
    assert best["model"] == int(table[0]["model"])
    assert run("sweep", "wine", *options, "--vary", "seed=0:2", "--out", tmp_path / "b") == 0
    assert run("sweep", "wine", "--seeds", "2", "--epochs", "1", "--quiet", "--out", tmp_path / "c") == 0
    assert [row["seed"] for row in sorted(rows(tmp_path / "c/results.csv"), key=lambda row: row["seed"])] == ["0", "1"]
    capsys.readouterr()
    shown = output_of(capsys, "sweep", "wine", *options[:-1], "--seeds", "2", "--out", tmp_path / "d")
    assert "the least mean val_loss of its seeds" in shown and "kept of them: 2 models, merged" in shown
    header = next(line for line in shown.splitlines() if line.startswith("model"))
    assert header.split()[:3] == ["model", "lr", "val_loss"]
    assert header.split()[-4:] == ["spread", "seeds", "epochs", "status"]


def test_combinations_within_the_spread_of_the_best_are_counted(tmp_path, capsys):
    options = ["wine", "--seeds", "3", "--epochs", "3", "--hidden", "8", "--quiet"]
    for rates, words in (("0.01,0.0101,1e-9", ", 1 other as good within it)"), ("0.01,1e-9", ")")):
        shown = output_of(capsys, "sweep", *options, "--vary", f"lr={rates}", "--out", tmp_path / rates)
        table = rows(tmp_path / rates / "results.csv")
        assert float(table[3]["mean_val_loss"]) - float(table[0]["mean_val_loss"]) > 0.0
        assert f"(3 seeds, standard deviation {float(table[0]['std_val_loss']):.2g}{words}\n" in shown


def test_seeds_that_cannot_be_merged_leave_the_best(tmp_path, monkeypatch, capsys):
    options = ["wine", "--vary", "lr=0.01,0.02", "--seeds", "3", "--epochs", "2", "--quiet"]
    assert run("sweep", *options, "--activation", "prelu", "--out", tmp_path / "prelu") == 0
    best = rows(tmp_path / "prelu/results.csv")[0]
    assert f"kept of them: model {best['model']}, seed {best['seed']}, val_loss " in capsys.readouterr().out
    assert "models" not in read(tmp_path / "prelu/report.json")
    assert read(tmp_path / "prelu/config.json")["options"]["seed"] == int(best["seed"])
    monkeypatch.setattr(command, "MOST_MERGED", 2)
    assert run("sweep", *options, "--out", tmp_path / "many") == 0
    assert sorted(row["seed"] for row in rows(tmp_path / "many/results.csv")[:2]) == [
        str(one["seed"]) for one in read(tmp_path / "many/report.json")["models"]
    ]


def test_seeds_alone_are_told_their_mean(tmp_path, capsys):
    options = ["wine", "--vary", "seed=0:4", "--epochs", "2", "--quiet"]
    best = result_of(capsys, "sweep", *options, "--out", tmp_path / "a")["best"]
    losses = [float(row["val_loss"]) for row in rows(tmp_path / "a/results.csv")]
    assert best["scores"]["val_loss"] == min(losses)
    assert best["mean"] == pytest.approx(np.mean(losses), rel=1e-12)
    assert best["spread"] == pytest.approx(np.std(losses, ddof=1), rel=1e-9)
    assert run("sweep", *options, "--out", tmp_path / "b") == 0
    said = f"mean val_loss of the 4 seeds {best['mean']:.4g}, standard deviation {best['spread']:.2g}: expect this"
    assert said in capsys.readouterr().out


def test_one_seed_is_no_mean(tmp_path, capsys):
    options = ["wine", "--epochs", "2", "--quiet"]
    for name, more in (("a", []), ("b", ["--seeds", "1"])):
        assert run("sweep", *options, "--vary", "lr=0.01,0.02", *more, "--out", tmp_path / name) == 0
        assert "mean val_loss" not in capsys.readouterr().out
    without, with_one = (rows(tmp_path / name / "results.csv") for name in "ab")
    assert [list(row) for row in without] == [list(row) for row in with_one]
    assert "mean val_loss" not in output_of(capsys, "sweep", *options, "--vary", "seed=3", "--out", tmp_path / "c")


def test_the_metric_decides(tmp_path, capsys):
    options = ["--vary", "seed=0:6", "--epochs", "3", "--quiet"]
    best = result_of(capsys, "sweep", "wine", *options, "--metric", "val_accuracy", "--out", tmp_path / "a")["best"]
    table = rows(tmp_path / "a/results.csv")
    # numbers stay numbers in JSON, and models are in the order of the seeds
    assert best["parameters"] == {"seed": best["model"]}
    most = max(row["val_accuracy"] for row in table)
    # Among equal scores the smallest loss wins.
    equal = [row for row in table if row["val_accuracy"] == most]
    assert best["model"] == int(min(equal, key=lambda row: row["val_loss"])["model"])
    assert (
        result_of(capsys, "sweep", "wine", *options, "--validation-fraction", "0", "--out", tmp_path / "b")["metric"]
        == "loss"
    )


def test_the_test_rows_have_no_say(tmp_path, monkeypatch):
    options = ["--vary", "seed=0:3", "--epochs", "2", "--early-stopping", "1", "--quiet"]
    assert run("sweep", "iris", *options, "--out", tmp_path / "a") == 0
    prepare = vary.session.prepared_data

    def blind(given):
        prepared = prepare(given)
        return replace(prepared, test=replace(prepared.test, X=np.full_like(prepared.test.X, np.nan)))

    monkeypatch.setattr(vary.session, "prepared_data", blind)
    report = {"test": {}, "baselines": {}, "worse_than": [], "epochs": 0}
    monkeypatch.setattr(command, "finish", lambda *_, **__: report)
    assert run("sweep", "iris", *options, "--out", tmp_path / "b") == 0
    assert without_seconds(tmp_path / "a") == without_seconds(tmp_path / "b")


def test_models_that_diverge_are_marked_and_come_last(tmp_path, capsys):
    options = ["--optimizer", "sgd", "--momentum", "0.9", "--epochs", "3", "--quiet"]
    assert run("sweep", "iris", *options, "--vary", "lr=1e30,0.01", "--out", tmp_path / "a") == 0
    assert "2 models: 1 trained, 1 diverged" in capsys.readouterr().out
    table = rows(tmp_path / "a/results.csv")
    assert [row["status"] for row in table] == ["trained", "diverged"]
    assert "NaN or infinite in epoch 1" in table[1]["reason"]
    assert run("sweep", "iris", *options, "--vary", "lr=1e30,1e31", "--out", tmp_path / "b") == 1
    assert "all 2 models diverged" in capsys.readouterr().err
    assert len(rows(tmp_path / "b/results.csv")) == 2
    assert not list((tmp_path / "b/checkpoints").iterdir())


def test_ctrl_c_keeps_the_models_that_had_ended(tmp_path):
    folder = tmp_path / "sweep"
    words = ["sweep", "iris", "--vary", "seed=0:1000", "--epochs", "30", "--hidden", "4", "--out", str(folder)]
    code, journal = f"from fusemlp import cli\ncli.main({words})", folder / "sweep.jsonl"
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    until = time.monotonic() + 60
    while not (journal.exists() and journal.read_text().count("\n") > 1) and time.monotonic() < until:
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 0
    table = rows(folder / "results.csv")
    assert 1 <= len(table) < 1000
    assert f"interrupted: kept are the {len(table)} models that had ended, of 1000" in out
    assert all(row["epochs"] == "30" for row in table)
    sweep = read(folder / "config.json")["sweep"]
    assert sweep["interrupted"] and sweep["ended"] == len(table)
    assert read(folder / "report.json")["final"]["val_loss"] == float(table[0]["val_loss"])


def test_ctrl_c_before_a_model_has_ended(tmp_path, monkeypatch, capsys):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("fusemlp.fleet.fleet.Fleet.fit", interrupted)
    (tmp_path / "b").mkdir()
    for out in (tmp_path / "a", tmp_path / "b"):
        assert run("sweep", "iris", "--vary", "seed=0:3", "--out", out) == 130
        assert "interrupted before a model had ended: nothing is kept" in capsys.readouterr().err
    # The same call works again; an existing folder stays.
    assert [path.name for path in tmp_path.rglob("*")] == ["b"]


def test_quiet(tmp_path, capsys):
    assert run("sweep", "iris", "--vary", "seed=0:2", "--epochs", "1", "--quiet", "--out", tmp_path / "run") == 0
    shown = capsys.readouterr()
    # One epoch is too few, which is no progress to be quiet about.
    last = shown.out.splitlines()[-1]
    assert last.startswith("warning: the model is worse than the linear one: test accuracy ")
    assert shown.err == ""
    assert "% of 30 test rows, a linear model on " in shown.out


def test_what_is_shown_takes_a_twentieth_of_the_time(monkeypatch):
    now, shown = 100.0, []

    def table(*_, **__):
        nonlocal now
        shown.append(now)
        now += 2.0
        return {"model": ["0"]}

    monkeypatch.setattr(command, "time", SimpleNamespace(monotonic=lambda: now, perf_counter=lambda: now))
    monkeypatch.setattr(command, "table", table)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    plan = SimpleNamespace(options=SimpleNamespace(quiet=False), points=[{}], metric="val_loss")
    with command.standings(plan, "") as update:
        for _ in range(1000):
            update([])
            now += 0.1
    # at the beginning, and for the models that end
    assert len(shown) == 1 + 3
    assert np.diff(shown[1:]).min() >= 42.0


def test_a_narrow_terminal_has_fewer_columns_and_whole_words(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", "54")
    monkeypatch.setattr(command, "REDRAW", 0.0)
    monkeypatch.setattr(command, "time", SimpleNamespace(monotonic=lambda: 0.0, perf_counter=time.perf_counter))
    options = ["--vary", "lr=0.0123456:0.1:log:2", "--vary", "hidden=8,8x8x8", "--vary", "seed=19,20"]
    assert run("sweep", "iris", *options, "--epochs", "2", "--jobs", "1", "--out", tmp_path / "run") == 0
    shown = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", capsys.readouterr().err)
    assert "8 models: 8 trained; " in shown and "…" not in shown
    last = [line.split() for line in shown[shown.rindex("8 models: 8 trained") :].splitlines() if line.strip()]
    header = next(words for words in last if "val_loss" in words)
    # Models that differ in their seed alone share a row.
    assert header == ["model", "lr", "hidden", "val_loss", "epochs"]


def test_a_sweep_larger_than_memory_is_never_built_at_once(tmp_path, monkeypatch, caplog):
    # of half of it 300 models of 35 parameters keep 1.9 MB when they have ended, and 40 engines of 21.5 kB find room
    monkeypatch.setattr(candidates, "available_memory", lambda: 5_500_000)
    alive = weakref.WeakSet()
    most = 0
    build = Candidate.engine

    def built(self, machine):
        nonlocal most
        engine = build(self, machine)
        alive.add(engine)
        most = max(most, len(alive))
        return engine

    monkeypatch.setattr(Candidate, "engine", built)
    options = ["--vary", "seed=0:300", "--hidden", "4", "--epochs", "1", "--out", tmp_path / "run"]
    assert run("sweep", "iris", *options) == 0
    assert "trained in parts" in caplog.text
    assert len(rows(tmp_path / "run" / "results.csv")) == 300
    # one part beside the engines of the model before it and of the best
    assert most < 50


def test_layers_larger_than_memory_are_one_line(tmp_path, capsys):
    shown = refusal(capsys, "sweep", "iris", "--vary", f"hidden={10**14}", "--out", tmp_path / "run", code=1)
    assert shown.startswith("error: there is not enough memory: ") and shown.count("\n") == 1
    assert not (tmp_path / "run").exists()


def labelled(path, count, labels="xy"):
    """Write a table of a number and labels that take turns."""
    path.write_text("a,label\n" + "".join(f"{row / 7},{labels[row % len(labels)]}\n" for row in range(count)))
    return path


@pytest.mark.parametrize(
    ("count", "words"),
    [
        (1, "error: test rows: no row can be held out, because each is the only one of its class; give more rows"),
        (2, "error: test rows: no row can be held out, because each is the only one of its class"),
        (4, "error: test rows: 0.2 of 4 rows leaves"),
        (12, "error: --validation-fraction: 0.1 of 9 rows leaves"),
    ],
)
def test_tables_of_a_few_rows(count, words, tmp_path, capsys):
    table = labelled(tmp_path / "table.csv", count)
    assert run("sweep", table, "--target", "label", "--vary", "lr=0.1,0.2", "--out", tmp_path / "run") == 1
    assert words in capsys.readouterr().err


@pytest.mark.parametrize("command", [("train",), ("train", "--models", "1"), ("sweep", "--vary", "seed=0:2")])
@pytest.mark.parametrize(("value", "shown"), [("5", "5"), ("yes", "'yes'")])
def test_a_constant_target(value, shown, command, tmp_path, capsys):
    table = labelled(tmp_path / "table.csv", 250, [value])
    name, *options = command
    assert refusal(capsys, name, table, "--target", "label", *options, "--out", tmp_path / "run", code=1) == (
        f"error: target: 'label' is {shown} in all rows, which is one class, and classes are two or more; choose "
        "another target\n"
    )
    assert not (tmp_path / "run").exists()


def test_other_data_may_have_one_class(tmp_path, capsys):
    table, other = labelled(tmp_path / "table.csv", 30), labelled(tmp_path / "other.csv", 2, "x")
    training = ("--target", "label", "--models", "1", "--epochs", "1", "--batch-size", "8", "--quiet")
    assert run("train", table, *training, "--out", tmp_path / "run") == 0
    assert run("evaluate", tmp_path / "run", "--data", other) == 0
    # the test rows may, too
    assert run("train", table, *training, "--test", other, "--out", tmp_path / "tested") == 0


@pytest.mark.parametrize(
    ("words", "name", "values", "scale"),
    [
        ("lr=0.1,0.01", "lr", (0.1, 0.01), ""),
        ("lr=1", "lr", (1.0,), ""),
        (" weight-decay = 0 , 1e-3 ", "weight_decay", (0.0, 0.001), ""),
        ("hidden=32,64x32,none", "hidden", (32, (64, 32), ()), ""),
        ("betas=0.9x0.999", "betas", ((0.9, 0.999),), ""),
        ("seed=0:4", "seed", (0, 1, 2, 3), "linear"),
        ("dropout=0:0.5:3", "dropout", (0.0, 0.25, 0.5), "linear"),
        ("dropout=0:0.5:lin:3", "dropout", (0.0, 0.25, 0.5), "linear"),
        ("lr=0.001:0.1:log:4", "lr", (0.001, 0.00464159, 0.0215443, 0.1), "log"),
        ("lr=0.123456789:0.2:log:2", "lr", (0.123456789, 0.2), "log"),
        ("hidden=8:64:log:4", "hidden", (8, 16, 32, 64), "log"),
        ("batch_size=8:10:lin:9", "batch_size", (8, 9, 10), "linear"),
    ],
)
def test_what_words_stand_for(words, name, values, scale):
    (axis,) = parsed_axes([words])
    assert (axis.name, axis.values, axis.scale) == (name, values, scale)
    assert [type(value) for value in axis.values] == [type(value) for value in values]


@pytest.mark.parametrize("words", ["hidden=32,64x32,none", "betas=0.9x0.999,0.5x0.9", "lr=1e-07,0.1", "seed=3"])
def test_what_is_spelled_can_be_read_again(words):
    (axis,) = parsed_axes([words])
    assert f"{axis.name}={','.join(map(spelled_value, axis.values))}" == words


def test_a_product_the_last_quickest():
    found = combinations(parsed_axes(["lr=0.1,0.2", "seed=0:3"]), sample=None, seed=0)
    assert found == [{"lr": lr, "seed": seed} for lr in (0.1, 0.2) for seed in range(3)]
    assert found == combinations(parsed_axes(["lr=0.1,0.2", "seed=0:3"]), sample=100, seed=0)


def test_a_sample_has_no_model_twice_and_all_are_equally_likely():
    among = parsed_axes(["lr=0.1:1:lin:4", "seed=0:3"])
    everything = combinations(among, sample=None, seed=0)
    times = np.zeros(12)
    for seed in range(600):
        found = combinations(among, sample=5, seed=seed)
        places = [everything.index(point) for point in found]
        assert places == sorted(set(places)) and len(places) == 5
        times[places] += 1
    # hypergeometric: mean 250, standard deviation sqrt(600 * 5/12 * 7/12) = 12.1; five of them
    assert abs(times - 250).max() < 61


def test_a_sample_of_more_than_can_be_listed():
    among = parsed_axes(["lr=0.1:1:lin:100000", "seed=0:100000", "weight_decay=0:1:lin:100000"])
    assert len({tuple(point.values()) for point in combinations(among, sample=1000, seed=1)}) == 1000
