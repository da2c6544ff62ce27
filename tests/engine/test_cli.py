"""The command line at its edge: version, exit codes, wrong calls, and errors as one line; plan, doctor and lr-find."""

import re
import subprocess
import sys

import numpy as np
import pytest
import typer

import fusemlp
from fusemlp import cli
from fusemlp.cli import app, probes
from fusemlp.cli.app import SYNONYMS
from fusemlp.tables import recipe
from fusemlp_kernels import errors
from make import output_of, refusal, result_of, run, table


def words_of(text):
    """Return a text on one line."""
    return " ".join(text.split())


def test_module_is_the_same_command():
    command = [sys.executable, "-m", "fusemlp", "--version"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout == f"fusemlp {fusemlp.__version__}\n"


WRONG_CALLS = ("ArgumentError", "ArgumentTypeError")
FAILURES = ("Data", "Shape", "DType", "BackendUnavailable", "Checkpoint", "Divergence", "MissingLibrary")


@pytest.mark.parametrize("name", [*WRONG_CALLS, *(f"{name}Error" for name in FAILURES)])
def test_exit_codes(name):
    assert app.exit_code(getattr(errors, name)("message")) == (2 if name in WRONG_CALLS else 1)


def test_unexpected_exceptions_keep_their_traceback(monkeypatch):
    def fail(*_, **__):
        raise ZeroDivisionError("a mistake in the program")

    monkeypatch.setattr(app, "app", fail)
    with pytest.raises(ZeroDivisionError):
        cli.main(["doctor"])


# Wrong calls, and words of the error.
REFUSED = {
    "train": "DATA: say what to train on",
    "train digit": "did you mean 'digits'",
    "train digits --learning-rate 1": "--learning-rate; did you mean --lr?",
    "train digits --batch_size=9": "No such option: --batch_size; did you mean --batch-size?",
    "train digits --n-epochs 9": "No such option: --n-epochs; did you mean --epochs?",
    "train digits --early-stopping": "Option '--early-stopping' requires an argument",
    "train iris --quiet true": "unexpected extra argument",
    "train houses.csv price": "argument(s) (price); did you mean --target price?",
    "train digits --hidden 64 32": "(32); did you mean --hidden 64,32?",
    "train --hidden 64 32 digits": "(digits); did you mean --hidden 64,32?",
    "train --drop a b.csv price": "(price); did you mean --target price?",
    "train a.csv --drop b c": "(c); did you mean --drop b --drop c?",
    "train digits --lr fast": "'--lr': expected a number such as 0.01, with a point, got 'fast'",
    "train digits --lr 0,01": "expected a number such as 0.01, with a point, got '0,01'",
    "train digits --epochs 1.5": "'--epochs': expected a whole number such as 100, got '1.5'",
    "train digits --epochs -1e1": "--epochs: expected a whole number of at least 1, got -10",
    "train digits --metric acuracy": "--metric: unknown name 'acuracy'; did you mean 'val_accuracy'",
    "train digits --lr nan": "--lr: expected a finite number above 0, got nan",
    "train digits --optimizer sgd --momentum 2": "--momentum: expected",
    "train digits --momentum 0.9": "--momentum: only sgd",
    "train digits --optimizer sgd --beta1 0.5": "--beta1: only adam and adamw",
    "train digits --optimizer sgd --nesterov": "--nesterov: True needs momentum",
    "train digits --batch-size 0": "--batch-size: expected a whole number of at least 1, got 0",
    "train digits --hidden 10,0": "--hidden: expected a whole number of at least 1, got 0",
    "train digits --hidden 10,big": "--hidden: expected whole numbers",
    "train digits --dropout some": "--dropout: expected a number",
    "train digits --dropout 0.1,0.2": "--dropout: expected one value, or 1",
    "train digits --activation rel": "--activation: unknown name 'rel'; did you mean 'relu'",
    "train digits --slope 0.1": "--slope: only leaky_relu, prelu and elu",
    "train digits --loss mce": "--loss: unknown name 'mce'; did you mean 'mse'",
    "train digits --loss poisson": "--loss: 'poisson' is for numbers",
    "train diabetes --loss cross_entropy": "--loss: 'cross_entropy' is for classes",
    "train digits --loss binary_cross_entropy": "the target has 10",
    "train digits --loss mse --label-smoothing 0.1": "only cross_entropy has it",
    "train digits --output-activation sigmoid": "--output-activation: cross_entropy takes logits",
    "train iris --class-weight 1,2": "--class-weight: expected balanced, or 3 numbers, for 0, 1, 2 in this order",
    "train diabetes --class-weight balanced": "--class-weight: only classes",
    "train digits --lr-step 3": "--lr-step: only step has it, and the schedule is constant",
    "train digits --schedule step": "--lr-step: the schedule step needs it",
    "train digits --schedule exponential": "--lr-gamma: the schedule exponential needs it",
    "train digits --backend nump": "--backend: unknown name 'nump'; did you mean 'numpy'",
    "train digits --scale z": "--scale: unknown name 'z'",
    "train digits --task cluster": "--task: unknown name 'cluster'",
    "train digits --target y": "--target: only tables",
    "train digits --validation-fraction 1": "--validation-fraction: expected",
    "train digits --validation-fraction 0 --early-stopping 3": "watches the validation loss",
    "train digits --seed=-1": "--seed: expected",
    "train digits --checkpoint-every 7": "writes of checkpoints take at most a twentieth of the time",
    "train --resume . --lr 0.1": "--lr: a resumed run keeps its own",
    "predict x --learning_rate 1": "No such option: --learning_rate; fusemlp train has --lr",
    "train iris --target y1 --target y2": "--target: expected once, got it 2 times",
    "train iris --log-target --no-log-target": "--log-target: expected once",
    "evaluate . --eps 1 --attack-eps 2": "--attack-eps: expected once",
    "sweep iris -q --quiet --vary seed=0:2": "--quiet: expected once",
    "sweep iris": "--vary: say what the models differ in",
    "sweep": "DATA: say what to train on",
    "sweep iris --vary lr": "--vary: expected NAME=VALUES, such as",
    "sweep iris --vary lr=1,,2": "lr: a value is missing in 'lr=1,,2'",
    "sweep iris --vary learning_rat=1": "--vary: unknown name 'learning_rat'",
    "sweep iris --vary wheight_decay=1": "did you mean 'weight_decay'?",
    "sweep iris --vary lr=1 --vary lr=2": "--vary: lr is there twice",
    "sweep iris --vary lr=0.1,1e-1": "lr: 0.1 is there twice",
    "sweep iris --vary lr=fast": "lr: expected a finite number such as 0.01, got 'fast'",
    "sweep iris --vary lr=1,-1": "--vary: lr: expected a finite number above 0",
    "sweep iris --vary seed=0.5": "seed: expected a whole number, got '0.5'",
    "sweep iris --vary hidden=8x": "hidden: expected a whole number, or several joined by x",
    "sweep iris --vary hidden=8,0": "hidden: expected a whole number of at least 1, got 0",
    "sweep iris --vary betas=0.9": "betas: expected two numbers joined by x",
    "sweep iris --vary lr=0:1": "say how many values there are: lr=0:1:lin:5",
    "sweep iris --vary lr=0.1:1:exp:5": "lr: expected a list, low:high:log:count",
    "sweep iris --vary lr=0:1:lin:5:6": "lr: expected a list, low:high:log:count",
    "sweep iris --vary lr=0:1:5,7": "lr: expected how many values at the end, such as :16, got '5,7'",
    "sweep iris --vary lr=0:1:1": "expected a range of 2 to 100000 values, got 1",
    "sweep iris --vary lr=1:0.1:log:4": "from the lower to the higher end",
    "sweep iris --vary lr=0:1:log:4": "a logarithmic range begins above 0",
    "sweep iris --vary seed=5:5": "expected a range of 1 to 100000 whole numbers, the last one left out",
    "sweep iris --vary seed=0:1000 --vary lr=0.1:1:lin:200": "models, and at most 100000 are trained; give fewer",
    "sweep iris --vary seed=0:5 --sample 0": "--sample: expected a whole number of at least 1, got 0",
    "sweep iris --vary lr=1,2 --lr 1": "--lr: it is what the models differ in (--vary lr)",
    "sweep iris --vary seed=0:2 --seeds 2": "--seeds: --vary seed=... has the seeds",
    "sweep iris --vary lr=0.1:1:lin:200 --sample 150 --seeds 1000": "--seeds: 150 combinations with 1000 seeds",
    "sweep iris --vary seed=0:2 --seed 1": "give one; --split-seed decides the rows",
    "sweep iris --vary betas=0.9x0.9 --beta2 0.5": "--beta2: it is what the models differ in",
    "sweep iris --vary momentum=0.5,0.9": "--vary: momentum: only sgd has it",
    "sweep iris --vary dropout=0,1.5": "dropout: expected",
    "sweep iris --vary seed=0:2 --metric acc": "--metric: unknown name 'acc'; did you mean 'val_accuracy'?",
    "sweep iris --vary batch_size=8,500 --drop-last": "--drop-last: 108 rows do not fill one batch",
    "sweep iris --vary seed=0:2 --probe 3": "No such option",
    "train digits --interval 0.9": "No such option: --interval; fusemlp predict has it",
    "sweep digits --adversarial 3": "No such option: --adversarial; fusemlp train has it",
    "train digits --adversarial pgd": "--attack-eps: say how far an input may move",
    "train digits --attack-eps 1": "--attack-eps: it is of an attack; give --adversarial too",
    "train digits --adversarial worst --attack-eps 1": "--adversarial: unknown name 'worst'",
    "train digits --adversarial fgsm --attack-eps 1 --attack-steps 2": "--attack-steps: only pgd has it",
    "train digits --adversarial trades --attack-eps 1": "--adversarial: trades is gone; train against pgd",
    "train digits --adversarial pgd --attack-eps 0": "--attack-eps: expected a finite number above 0",
    "train digits --adversarial pgd --attack-eps 1 --models 3": "--models: adversarial training makes one",
    "train digits --adversarial pgd --attack-eps 1 --final-fit": "--final-fit: adversarial training makes one",
    "train digits --adversarial pgd --attack-eps 1 --dp-epsilon 3": "--dp-epsilon: adversarial training is not private",
    "train iris --id petal": "--id: only tables",
    "train iris --drop petal": "--drop: only tables",
    "lr-find iris --lr 0.1": "goes through the rates itself",
    "lr-find iris --from 1 --to 0.1": "--to: expected a finite number above 1",
    "lr-find iris --steps 3": "steps: expected a whole number of at least 20",
    "lr-find": "DATA: say which data",
    "lr-find iris --plot x.jpg": "ending in .png",
    "plan 784 128 10 --backend tritn": "did you mean 'triton'",
}
# Calls whose work fails.
FAILED = {
    "train nowhere/x.csv": "there is no file or folder",
    "train --resume nowhere": "there is no such folder",
    "train --resume .": "it has no config.json",
}


@pytest.mark.parametrize("words", [*REFUSED, *FAILED])
def test_a_wrong_call_says_what_is_wrong_and_leaves_nothing(words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert run(*words.split()) == (1 if words in FAILED else 2)
    shown = capsys.readouterr()
    assert words_of((REFUSED | FAILED)[words]) in words_of(shown.err)
    assert shown.out == "" and "Traceback" not in shown.err
    assert list(tmp_path.iterdir()) == []


def test_a_list_option_stands_as_often_as_wanted(capsys):
    words = ["train", "iris", "--hidden", "9", "--hidden", "8", "--drop", "a", "--drop", "b"]
    assert refusal(capsys, *words).startswith("error: --drop: only tables")


def test_every_hint_is_an_option():
    commands = typer.main.get_command(app.app).commands.values()
    options = {name for command in commands for option in command.params for name in option.opts}
    assert set(SYNONYMS.values()) <= options and not options & set(SYNONYMS)


def test_an_error_is_one_line(tmp_path, capsys):
    shown = refusal(capsys, "train", table(tmp_path / "t.csv"), "--target", "c", "--out", tmp_path / "run", code=1)
    assert shown.startswith("error: ") and shown.count("\n") == 1
    assert "no target column 'c'; the columns are 'a', 'b', 'word'" in shown


@pytest.mark.parametrize("command", ["train iris", "sweep iris --vary seed=0:2"])
def test_out_must_be_new_or_empty(command, tmp_path, capsys):
    (tmp_path / "run").mkdir()
    for name in ("file", "run/config.json"):
        (tmp_path / name).touch()
    for out, words, going_on in (
        (tmp_path, "is not empty", ""),
        (tmp_path / "file", "is a file", ""),
        (tmp_path / "run", "is not empty", f", or go on with the run in it: --resume {tmp_path / 'run'}"),
    ):
        said = refusal(capsys, *command.split(), "--out", out)
        assert said.endswith(f"{words}; give a new or empty folder{going_on}\n")


@pytest.mark.filterwarnings("default")
def test_warnings_are_one_line(tmp_path, capsys):
    assert run(*["train", "iris", "--epochs", "1", "--batch-size", "9999", "--quiet", "--out"], tmp_path / "run") == 0
    shown = capsys.readouterr().err
    assert re.match(r"warning: batch_size: 9999 is more than the \d+ training rows.*\n", shown)
    assert all(line.startswith("warning: ") for line in shown.splitlines())


def test_plan_needs_no_backend(capsys):
    shown = output_of(capsys, "plan", "784", "128", "10", "--batch-size", "128", "--backend", "triton")
    assert "128x128x784" in shown
    assert "4 launches\nplan graph: a step is estimated to take " in shown


def test_plan_refuses_what_it_does_not_know():
    assert run("plan", "784") == run("plan", "784", "ten") == 2


def test_doctor(capsys):
    shown = output_of(capsys, "doctor")
    assert re.search(r"numpy +yes +cpu +fp32, (bf16, )?fp64 +eager", shown)
    assert f"fusemlp {fusemlp.__version__}" in shown
    assert re.search(r"^pandas +\d.* data frames$", shown, re.M) and re.search(r"^onnx +\S.* ONNX files$", shown, re.M)
    assert re.search(r"threads of a training on the CPU: \d+ \(the least of: \w.* \d+\)", shown)


def test_doctor_says_how_to_get_what_is_missing(capsys, monkeypatch):
    monkeypatch.setattr(probes, "distributions", lambda name: [])
    shown = output_of(capsys, "doctor")
    assert re.search(r"^torch +not installed: pip install torch +fusemlp\.torch, triton backend$", shown, re.M)
    assert re.search(r"^onnx +not installed: pip install 'fusemlp\[onnx\]' +ONNX files$", shown, re.M)


def test_doctor_tells_of_a_backend_whose_library_is_missing(capsys, monkeypatch):
    def trains(name, precision, plan):
        raise errors.MissingLibraryError("backend: needs numba; pip install --force-reinstall numba")

    monkeypatch.setattr(probes, "_trains", trains)
    shown = output_of(capsys, "doctor")
    assert re.search(r"^numpy +no ", shown, re.M) and "numpy: backend: needs numba; pip install" in shown


def test_doctor_for_machines(capsys):
    report = result_of(capsys, "doctor")
    assert report["backends"]["numpy"]["reason"] is None
    for found in report["backends"].values():
        assert (found["reason"] is None) == bool(found["precisions"])
    assert report["libraries"]["numpy"] == np.__version__
    assert report["threads"] == min(report["thread_limits"].values())


def test_lr_find(tmp_path, capsys):
    plot = tmp_path / "sweep.png"
    found = result_of(capsys, "lr-find", "iris", "--steps", "100", "--plot", plot)
    assert found["rates"][0] == pytest.approx(1e-6)
    assert np.allclose(np.diff(np.log(found["rates"])), np.log(1e7) / 99)
    assert found["suggested"] in found["rates"]
    assert len(found["losses"]) == len(found["rates"])
    # the steepest descent lies between where nothing happens and where it blows up
    assert 1e-4 < found["suggested"] < 1.0
    assert plot.read_bytes().startswith(b"\x89PNG")
    assert "exists" in refusal(capsys, "lr-find", "iris", "--plot", plot)


def test_lr_find_takes_the_rows_a_step_of_a_training_at_its_rate(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(recipe, "LARGE_BATCHES", ((40, 16, 0.0015),))
    data = table(tmp_path / "data.csv"), "--target", "price", "--scale", "robust", "--no-log-target", "--steps", "20"
    usual, large, free = (
        result_of(capsys, "lr-find", *data, *more)["losses"]
        for more in (("--batch-size", "32"), ("--batch-size", "16"), ())
    )
    assert free == usual != large


def test_lr_find_prints_a_table(capsys):
    *table, suggestion = output_of(capsys, "lr-find", "wine", "--optimizer", "sgd").splitlines()
    assert table[0].split() == ["rate", "loss"]
    assert re.fullmatch(r"suggested learning rate [0-9.e-]+", suggestion)
