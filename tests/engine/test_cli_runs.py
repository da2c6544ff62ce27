"""``fusemlp runs``: run folders with their scores, and what differs."""

import json
import os
import shutil
import sys
from pathlib import Path

import pytest

from fusemlp.cli import runs
from make import output_of, read, refusal, result_of, rows, run


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Runs of two data sets, one of them a sweep, and folders of other kinds."""
    folder = tmp_path_factory.mktemp("runs")
    for name, options in {
        "slow": ["iris", "--epochs", "3"],
        "fast": ["iris", "--epochs", "6", "--lr", "0.05", "--hidden", "16,8"],
        "numbers": ["diabetes", "--epochs", "2", "--models", "1"],
        "other": ["diabetes", "--epochs", "2", "--models", "1", "--loss", "mae", "--metric", "r2"],
    }.items():
        assert run("train", *options, "--quiet", "--out", folder / name) == 0
    sweep = ["--vary", "lr=0.001,0.002", "--epochs", "3", "--quiet", "--out", folder / "swept"]
    assert run("sweep", "iris", *sweep) == 0
    shutil.copytree(folder / "slow", folder / "cut off")
    (folder / "cut off/report.json").unlink()
    for name, content in {"broken": "{", "strange": '{"format": 1}', "newer": '{"format": 99}', "list": "[]"}.items():
        (folder / name).mkdir()
        (folder / name / "config.json").write_text(content)
    shutil.copytree(folder / "slow", folder / "torn")
    (folder / "torn/metrics.csv").write_text("epoch,loss\n1,much\n")
    (folder / "pictures").mkdir()
    (folder / ".hidden").mkdir()
    (folder / "notes.txt").touch()
    return folder


def listed(capsys, folder, *options):
    return result_of(capsys, "runs", folder, *options)


def of_iris(capsys, folder, *options):
    return [one for one in listed(capsys, folder, *options)["runs"] if one["data"] == "iris"]


def test_runs_by_data_set_and_score(trained, capsys):
    flowers = {Path(one["run"]).name: one for one in of_iris(capsys, trained)}
    assert flowers.keys() == {"slow", "fast", "swept", "cut off"}
    scores = [one["score"] for one in flowers.values()]
    assert scores == sorted(scores)
    for name, one in flowers.items():
        table = rows(trained / name / "metrics.csv")
        assert one["sorted_by"] == "val_loss"
        assert one["score"] == min(float(row["val_loss"]) for row in table)
        assert one["started"] == read(trained / name / "config.json")["started"]
    assert flowers["fast"]["scores"]["test_accuracy"] == read(trained / "fast/report.json")["test"]["accuracy"]
    statuses = {name: one["status"] for name, one in flowers.items()}
    assert statuses == {"slow": "trained", "fast": "trained", "swept": "best of 2", "cut off": "unfinished"}


def test_only_what_differs_and_losses_of_different_kinds_are_not_compared(trained, capsys):
    runs_of = listed(capsys, trained)["runs"]
    differs = {Path(one["run"]).name: one["differs"] for one in runs_of}
    assert differs["slow"] == {"hidden": [128], "lr": 0.001, "epochs": 3}
    assert differs["fast"] == {"hidden": [16, 8], "lr": 0.05, "epochs": 6}
    assert differs["numbers"] == {"loss": "mse", "metric": None}
    assert differs["other"] == {"loss": "mae", "metric": "r2"}
    first, second = (one for one in runs_of if one["data"] == "diabetes")
    assert first["sorted_by"] == second["sorted_by"] == "test_rmse" and first["score"] <= second["score"]


def test_losses_of_targets_in_other_units_are_not_compared(trained, tmp_path, capsys):
    for name in ("plain", "logarithms"):
        shutil.copytree(trained / "numbers", tmp_path / name)
    assert {one["sorted_by"] for one in listed(capsys, tmp_path)["runs"]} == {"val_loss"}
    config = read(tmp_path / "logarithms/config.json")
    config["preprocessor"]["target_log"] = True
    (tmp_path / "logarithms/config.json").write_text(json.dumps(config))
    assert {one["sorted_by"] for one in listed(capsys, tmp_path)["runs"]} == {"test_rmse"}


def test_several_runs_in_place_of_one_are_told_with_the_newest(trained, capsys, monkeypatch):
    monkeypatch.chdir(trained)
    os.utime("fast/config.json", (2e9, 2e9))
    said = refusal(capsys, "predict", "fast", "slow", "--data", "x.csv", "--out", "y.csv")
    assert "(slow); expected one run, and the newest of these is fast" in " ".join(said.replace("│", " ").split())


def test_what_is_no_run_is_named(trained, capsys):
    reasons = {Path(one["path"]).name: one["reason"] for one in listed(capsys, trained)["left_out"]}
    words = {
        "broken": "config.json: cannot be read",
        "strange": "config.json: the configuration does not fit: it has no entry 'command'",
        "newer": "expected a configuration of format 1, found 99",
        "list": "expected a configuration of format 1, found 'list'",
        "torn": "its files are not those of a run (ValueError",
        "pictures": "no run folder, it has no config.json",
    }
    assert reasons.keys() == words.keys()
    assert all(words[name] in reason for name, reason in reasons.items())


def test_the_table(trained, capsys):
    lines = output_of(capsys, "runs", trained).splitlines()
    at = lines.index("iris: 4 runs, by val_loss, the least first")
    assert lines[at + 1].split() == ["run", "val_loss", "test_accuracy", "started", "epochs", "status", "hidden", "lr"]
    fast = next(line for line in lines[at:] if line.startswith("fast"))
    assert fast.split()[-3:] == ["trained", "16,8", "0.05"]
    cut_off = next(line for line in lines if line.startswith("cut off"))
    assert cut_off.split()[3] == "-"
    assert sum(line.startswith("left out: ") for line in lines) == 6


def test_another_score(trained, capsys):
    scores = [one["score"] for one in of_iris(capsys, trained, "--sort", "test_accuracy")]
    # An unfinished run has no test score, and is last.
    assert scores[-1] is None
    assert scores[:-1] == sorted(scores[:-1], reverse=True)
    said = refusal(capsys, "runs", trained, "--sort", "accurracy")
    assert "--sort: no run has 'accurracy'; expected accuracy, loss, test_accuracy" in said


def test_a_run_folder_itself_a_folder_without_runs_and_none(trained, tmp_path, monkeypatch, capsys):
    (one,) = listed(capsys, trained / "slow")["runs"]
    assert (Path(one["run"]).name, one["differs"]) == ("slow", {})
    assert output_of(capsys, "runs", tmp_path) == f"no run in {tmp_path}\n"
    monkeypatch.chdir(tmp_path)
    said = refusal(capsys, "runs")
    assert "there is no folder 'runs'; give one with run folders in it, or make the first run" in said


@pytest.mark.parametrize("width", [30, 50, 60, 80, 100])
def test_a_narrow_terminal_leaves_columns_out_and_says_so(width, trained, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", str(width))
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    lines = output_of(capsys, "runs", trained).splitlines()
    at = lines.index("iris: 4 runs, by val_loss, the least first")
    table = lines[at + 1 : at + 6]
    assert max(map(len, table)) <= width
    header, note = table[0].split(), lines[at + 6]
    assert header[:2] == ["run", "val_loss"]
    every = {"run", "val_loss", "test_accuracy", "started", "epochs", "status", "hidden", "lr"}
    left_out = note.removeprefix("no room for ").removesuffix(": --json shows all").split(", ") if note else []
    assert {*header, *left_out} == every
    # The options in which runs differ stay longer than date and status.
    assert "hidden" not in left_out or {"started", "status"} <= set(left_out)


def test_runs_of_an_earlier_release_have_the_defaults_of_newer_options(trained, tmp_path):
    for name in ("old", "new"):
        shutil.copytree(trained / "slow", tmp_path / name)
    config = read(tmp_path / "old/config.json")
    for option in ("track", "final_fit", "split_seed", "drop_last"):
        del config["options"][option]
    (tmp_path / "old/config.json").write_text(json.dumps(config))
    found, skipped = runs.read_all(tmp_path)
    assert skipped == []
    assert runs.differences(found) == []
