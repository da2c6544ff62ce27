"""``fusemlp sweep`` with a narrow terminal, little memory, few rows."""

import re
import sys
import weakref

import pytest

from fusemlp.cli import standings
from fusemlp.fleet import memory as module
from fusemlp.fleet.candidates import Candidate
from make import rows, run


def test_a_narrow_terminal_has_fewer_columns_and_whole_words(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", "54")
    monkeypatch.setattr(sweep.Seldom, "do", lambda self, action: action())
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
    monkeypatch.setattr(module, "available_memory", lambda: 5_500_000)
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
    assert run("sweep", "iris", "--vary", f"hidden={10**14}", "--out", tmp_path / "run") == 1
    shown = capsys.readouterr().err
    assert shown.startswith("error: there is not enough memory: ") and shown.count("\n") == 1
    assert not (tmp_path / "run").exists()


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
    lines = [f"{index},{'xy'[index % 2]}" for index in range(count)]
    table = tmp_path / "table.csv"
    table.write_text("\n".join(["a,label", *lines]) + "\n")
    assert run("sweep", table, "--target", "label", "--vary", "lr=0.1,0.2", "--out", tmp_path / "run") == 1
    assert words in capsys.readouterr().err


@pytest.mark.parametrize("command", [("train",), ("train", "--models", "1"), ("sweep", "--vary", "seed=0:2")])
@pytest.mark.parametrize(("value", "shown"), [("5", "5"), ("yes", "'yes'")])
def test_a_constant_target(value, shown, command, tmp_path, capsys):
    table = tmp_path / "table.csv"
    table.write_text("\n".join(["a,label", *(f"{index / 7},{value}" for index in range(250))]) + "\n")
    name, *options = command
    assert run(name, table, "--target", "label", *options, "--out", tmp_path / "run") == 1
    assert capsys.readouterr().err == (
        f"error: target: 'label' is {shown} in all rows, which is one class, and classes are two or more; choose "
        "another target\n"
    )
    assert not (tmp_path / "run").exists()


def test_other_data_may_have_one_class(tmp_path, capsys):
    table, other = tmp_path / "table.csv", tmp_path / "other.csv"
    table.write_text("\n".join(["a,label", *(f"{index},{'xy'[index % 2]}" for index in range(30))]) + "\n")
    other.write_text("a,label\n1,x\n2,x\n")
    training = ("--target", "label", "--models", "1", "--epochs", "1", "--batch-size", "8", "--quiet")
    assert run("train", table, *training, "--out", tmp_path / "run") == 0
    assert run("evaluate", tmp_path / "run", "--data", other) == 0
    # the test rows may, too
    assert run("train", table, *training, "--test", other, "--out", tmp_path / "tested") == 0


@pytest.mark.parametrize(
    ("option", "words"),
    [
        (("--output-activation", "sigmoid"), "error: --output-activation: cross_entropy takes logits"),
        (("--batch-size", "0"), "error: --batch-size: expected a whole number of at least 1, got 0"),
    ],
)
def test_what_is_wrong_in_all_models_names_its_option(option, words, tmp_path, capsys):
    table = tmp_path / "table.csv"
    table.write_text("\n".join(["a,label", *(f"{index / 7},{'xy'[index % 2]}" for index in range(250))]) + "\n")
    assert run("train", table, "--target", "label", *option, "--out", tmp_path / "run") == 2
    assert capsys.readouterr().err.startswith(words)
