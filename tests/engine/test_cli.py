"""The command line at its edge: help, version, exit codes, and errors as one line."""

import json
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
from fusemlp_kernels import errors
from make import refusal, run, table


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


# Arguments behind ``train``, the exit code, and words of the error.
WRONG = {
    "no data": ([], 2, "DATA: say what to train on"),
    "unknown data": (["digit"], 2, "did you mean 'digits'"),
    "no such file": (["nowhere/x.csv"], 1, "there is no file or folder"),
    "option of another library": (["digits", "--learning-rate", "1"], 2, "--learning-rate; did you mean --lr?"),
    "underscores": (["digits", "--learning_rate", "1"], 2, "--learning_rate; did you mean --lr?"),
    "underscore": (["digits", "--batch_size=9"], 2, "No such option: --batch_size; did you mean --batch-size?"),
    "misspelt": (["digits", "--bacth-size", "9"], 2, "No such option: --bacth-size; did you mean --batch-size?"),
    "epochs elsewhere": (["digits", "--n-epochs", "9"], 2, "No such option: --n-epochs; did you mean --epochs?"),
    "option without a value": (["digits", "--early-stopping"], 2, "Option '--early-stopping' requires an argument"),
    "a value apart": (["iris", "--quiet", "true"], 2, "unexpected extra argument"),
    "flag with a value": (["digits", "--quiet=1"], 2, "Option '--quiet' does not take a value"),
    "target without its name": (["houses.csv", "price"], 2, "argument(s) (price); did you mean --target price?"),
    "widths apart": (["digits", "--hidden", "64", "32"], 2, "(32); did you mean --hidden 64,32?"),
    "widths before": (["--hidden", "64", "32", "digits"], 2, "(digits); did you mean --hidden 64,32?"),
    "target after a list": (["--drop", "a", "b.csv", "price"], 2, "(price); did you mean --target price?"),
    "two data sets": (["digits", "iris"], 2, "argument(s) (iris)"),
    "columns apart": (["a.csv", "--drop", "b", "c"], 2, "(c); did you mean --drop b --drop c?"),
    "no number": (["digits", "--lr", "fast"], 2, "--lr"),
    "rate NaN": (["digits", "--lr", "nan"], 2, "--lr: expected a finite number above 0, got nan"),
    "rate 0": (["digits", "--lr", "0"], 2, "--lr: expected a finite number above 0, got 0"),
    "momentum 2": (["digits", "--optimizer", "sgd", "--momentum", "2"], 2, "--momentum: expected"),
    "momentum of adam": (["digits", "--momentum", "0.9"], 2, "--momentum: only sgd"),
    "beta of sgd": (["digits", "--optimizer", "sgd", "--beta1", "0.5"], 2, "--beta1: only adam and adamw"),
    "nesterov alone": (["digits", "--optimizer", "sgd", "--nesterov"], 2, "--nesterov: True needs momentum"),
    "unknown optimizer": (["digits", "--optimizer", "adamax"], 2, "--optimizer: unknown name 'adamax'"),
    "batch 0": (["digits", "--batch-size", "0"], 2, "--batch-size: expected a whole number of at least 1, got 0"),
    "epochs 0": (["digits", "--epochs", "0"], 2, "--epochs: expected"),
    "width 0": (["digits", "--hidden", "10,0"], 2, "--hidden: expected a whole number of at least 1, got 0"),
    "width word": (["digits", "--hidden", "10,big"], 2, "--hidden: expected whole numbers"),
    "dropout 1.5": (["digits", "--dropout", "1.5"], 2, "--dropout: expected"),
    "dropout word": (["digits", "--dropout", "some"], 2, "--dropout: expected a number"),
    "dropouts": (["digits", "--dropout", "0.1,0.2"], 2, "--dropout: expected one value, or 1"),
    "activation": (["digits", "--activation", "rel"], 2, "--activation: unknown name 'rel'; did you mean 'relu'"),
    "slope of relu": (["digits", "--slope", "0.1"], 2, "--slope: only leaky_relu, prelu and elu"),
    "init": (["digits", "--init", "he"], 2, "--init: unknown name 'he'"),
    "activation of torch": (["digits", "--activation", "ELU"], 2, "unknown name 'ELU'; did you mean 'elu'"),
    "loss": (["digits", "--loss", "mce"], 2, "--loss: unknown name 'mce'; did you mean 'mse'"),
    "loss of numbers": (["digits", "--loss", "poisson"], 2, "--loss: 'poisson' is for numbers"),
    "loss of classes": (["diabetes", "--loss", "cross_entropy"], 2, "--loss: 'cross_entropy' is for classes"),
    "two classes": (["digits", "--loss", "binary_cross_entropy"], 2, "the target has 10"),
    "smoothing": (["digits", "--loss", "mse", "--label-smoothing", "0.1"], 2, "only cross_entropy has it"),
    "logits": (["digits", "--output-activation", "sigmoid"], 2, "--output-activation: cross_entropy takes logits"),
    "weights": (["iris", "--class-weight", "1,2"], 2, "--class-weight: expected balanced, or 3 numbers"),
    "weights of numbers": (["diabetes", "--class-weight", "balanced"], 2, "--class-weight: only classes"),
    "schedule": (["digits", "--schedule", "cosin"], 2, "--schedule: unknown name 'cosin'; did you mean 'cosine'"),
    "schedule's option": (["digits", "--lr-step", "3"], 2, "--lr-step: only step has it, and the schedule is constant"),
    "step missing": (["digits", "--schedule", "step"], 2, "--lr-step: the schedule step needs it"),
    "gamma missing": (["digits", "--schedule", "exponential"], 2, "--lr-gamma: the schedule exponential needs it"),
    "backend": (["digits", "--backend", "nump"], 2, "--backend: unknown name 'nump'; did you mean 'numpy'"),
    "precision": (["digits", "--precision", "fp23"], 2, "--precision: unknown name 'fp23'"),
    "plan": (["digits", "--plan", "eagre"], 2, "--plan: unknown name 'eagre'"),
    "scale": (["digits", "--scale", "z"], 2, "--scale: unknown name 'z'"),
    "task": (["digits", "--task", "cluster"], 2, "--task: unknown name 'cluster'"),
    "target of a name": (["digits", "--target", "y"], 2, "--target: only tables"),
    "fraction": (["digits", "--validation-fraction", "1"], 2, "--validation-fraction: expected"),
    "stopping": (["digits", "--validation-fraction", "0", "--early-stopping", "3"], 2, "watches the validation loss"),
    "seed": (["digits", "--seed=-1"], 2, "--seed: expected"),
    "checkpoints": (["digits", "--checkpoint-every", "0"], 2, "--checkpoint-every: expected"),
    "resume nowhere": (["--resume", "nowhere"], 1, "there is no such folder"),
    "resume other": (["--resume", ".", "--lr", "0.1"], 2, "--lr: a resumed run keeps its own"),
    "resume no run": (["--resume", "."], 1, "it has no config.json"),
}


@pytest.mark.parametrize(("arguments", "code", "words"), WRONG.values(), ids=WRONG.keys())
def test_a_wrong_call_says_what_is_wrong_and_leaves_nothing(arguments, code, words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert run("train", *arguments) == code
    shown = capsys.readouterr()
    assert words_of(words) in words_of(shown.err)
    assert shown.out == ""
    assert "Traceback" not in shown.err
    assert list(tmp_path.iterdir()) == []


# Calls of all commands, and words of the error.
CALLS = {
    "an option of train": ("predict x --learning_rate 1", "No such option: --learning_rate; fusemlp train has --lr"),
    "target": ("train iris --target y1 --target y2", "--target: expected once, got it 2 times"),
    "the same value": ("train iris --lr 0.1 --lr=0.1 --lr 0.1", "--lr: expected once, got it 3 times"),
    "flag and its opposite": ("train iris --log-target --no-log-target", "--log-target: expected once"),
    "two names": ("evaluate . --eps 1 --attack-eps 2", "--attack-eps: expected once"),
    "flag": ("runs --json --json", "--json: expected once"),
    "short name": ("sweep iris -q --quiet --vary seed=0:2", "--quiet: expected once"),
    "argument between": ("predict --data a.csv . --out p.csv --data b.csv", "--data: expected once"),
}


@pytest.mark.parametrize(("words", "message"), CALLS.values(), ids=CALLS)
def test_unknown_and_repeated_options(words, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert message in words_of(refusal(capsys, *words.split()))


def test_a_list_option_stands_as_often_as_wanted(capsys):
    words = ["train", "iris", "--hidden", "9", "--hidden", "8", "--drop", "a", "--drop", "b"]
    assert refusal(capsys, *words).startswith("error: --drop: only tables")


def test_every_hint_is_an_option():
    commands = typer.main.get_command(app.app).commands.values()
    options = {name for command in commands for option in command.params for name in option.opts}
    assert set(SYNONYMS.values()) <= options and not options & set(SYNONYMS)


def test_an_error_is_one_line(tmp_path, capsys):
    assert run("train", table(tmp_path / "t.csv"), "--target", "c", "--out", tmp_path / "run") == 1
    shown = capsys.readouterr().err
    assert shown.startswith("error: ") and shown.count("\n") == 1
    assert "no target column 'c'; the columns are 'a', 'b', 'word'" in shown


@pytest.mark.parametrize("command", ["train iris", "sweep iris --vary seed=0:2"])
def test_out_must_be_new_or_empty(command, tmp_path, capsys):
    (tmp_path / "file").touch()
    for out, words in ((tmp_path, "is not empty"), (tmp_path / "file", "is a file")):
        going_on = f", or go on with the run in it: --resume {out}" if out.is_dir() else ""
        said = refusal(capsys, *command.split(), "--out", out)
        assert said.endswith(f"{words}; give a new or empty folder{going_on}\n")


@pytest.mark.filterwarnings("default")
def test_warnings_are_one_line(tmp_path, capsys):
    assert run(*["train", "iris", "--epochs", "1", "--batch-size", "9999", "--quiet", "--out"], tmp_path / "run") == 0
    shown = capsys.readouterr().err
    assert re.match(r"warning: batch_size: 9999 is more than the \d+ training rows.*\n", shown)
    assert all(line.startswith("warning: ") for line in shown.splitlines())


def test_plan_needs_no_backend(capsys):
    assert run("plan", "784", "128", "10", "--batch-size", "128", "--backend", "triton") == 0
    shown = capsys.readouterr().out
    assert "128x128x784" in shown
    assert "4 launches\nplan graph: a step is estimated to take " in shown


def test_plan_refuses_what_it_does_not_know(capsys):
    assert "did you mean 'triton'" in refusal(capsys, "plan", "784", "128", "10", "--backend", "tritn")
    assert run("plan", "784") == run("plan", "784", "ten") == 2


def test_doctor(capsys):
    assert run("doctor") == 0
    shown = capsys.readouterr().out
    assert re.search(r"numpy +yes +cpu +fp32, fp64 +eager", shown)
    assert f"fusemlp {fusemlp.__version__}" in shown
    assert re.search(r"^pandas +\d.* data frames$", shown, re.M) and re.search(r"^onnx +\S.* ONNX files$", shown, re.M)
    assert re.search(r"threads of a training on the CPU: \d+ \(the least of: \w.* \d+\)", shown)


def test_doctor_says_how_to_get_what_is_missing(capsys, monkeypatch):
    monkeypatch.setattr(probes, "distributions", lambda name: [])
    assert run("doctor") == 0
    shown = capsys.readouterr().out
    assert re.search(r"^torch +not installed: pip install torch +fusemlp\.torch, triton backend$", shown, re.M)
    assert re.search(r"^onnx +not installed: pip install 'fusemlp\[onnx\]' +ONNX files$", shown, re.M)


def test_doctor_tells_of_a_backend_whose_library_is_missing(capsys, monkeypatch):
    def trains(name, precision, plan):
        raise errors.MissingLibraryError("backend: needs numba; pip install --force-reinstall numba")

    monkeypatch.setattr(probes, "_trains", trains)
    assert run("doctor") == 0
    shown = capsys.readouterr().out
    assert re.search(r"^numpy +no ", shown, re.M) and "numpy: backend: needs numba; pip install" in shown


def test_doctor_for_machines(capsys):
    assert run("doctor", "--json") == 0
    report = json.loads(capsys.readouterr().out)
    assert report["backends"]["numpy"]["reason"] is None
    for found in report["backends"].values():
        assert (found["reason"] is None) == bool(found["precisions"])
    assert report["libraries"]["numpy"] == np.__version__
    assert report["threads"] == min(report["thread_limits"].values())


def test_lr_find(tmp_path, capsys):
    plot = tmp_path / "sweep.png"
    assert run("lr-find", "iris", "--steps", "100", "--plot", plot, "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["rates"][0] == pytest.approx(1e-6)
    assert np.allclose(np.diff(np.log(found["rates"])), np.log(1e7) / 99)
    assert found["suggested"] in found["rates"]
    assert len(found["losses"]) == len(found["rates"])
    # the steepest descent lies between where nothing happens and where it blows up
    assert 1e-4 < found["suggested"] < 1.0
    assert plot.read_bytes().startswith(b"\x89PNG")
    assert "exists" in refusal(capsys, "lr-find", "iris", "--plot", plot)


def test_lr_find_prints_a_table(capsys):
    assert run("lr-find", "wine", "--optimizer", "sgd") == 0
    *table, suggestion = capsys.readouterr().out.splitlines()
    assert table[0].split() == ["rate", "loss"]
    assert re.fullmatch(r"suggested learning rate [0-9.e-]+", suggestion)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["iris", "--lr", "0.1"], "goes through the rates itself"),
        (["iris", "--from", "1", "--to", "0.1"], "--to: expected a finite number above 1"),
        (["iris", "--steps", "3"], "steps: expected a whole number of at least 20"),
        ([], "DATA: say which data"),
        (["iris", "--plot", "x.jpg"], "ending in .png"),
    ],
)
def test_lr_find_refuses(arguments, words, capsys):
    assert words in refusal(capsys, "lr-find", *arguments)
