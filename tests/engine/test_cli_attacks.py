"""``fusemlp train --adversarial`` and ``evaluate --attack``."""

import json

import pytest

from fusemlp import FGSM, PGD, load_checkpoint
from fusemlp.cli.model import own_data
from fusemlp.datasets.preprocessing import Preprocessor
from fusemlp.report.runs import Run
from make import frame, output_of, read, refusal, result_of, run

SHORT = ("--hidden", "32", "--epochs", "12", "--quiet")
DIGITS = ("train", "digits", "--hidden", "32", "--quiet", "--scale")


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    folder = tmp_path_factory.mktemp("digits")
    attack = ("--adversarial", "pgd", "--attack-eps", "0.1", "--attack-steps", "4")
    for name, options in (("plain", ()), ("robust", attack)):
        assert run(*DIGITS, "minmax", "--epochs", "12", *options, "--out", folder / name) == 0
    return {name: folder / name for name in ("plain", "robust")}


def test_training_on_attacks_is_told_and_makes_the_run_robust(digits, capsys):
    attack = ("--attack", "pgd", "--eps", "0.1")
    plain, robust = (result_of(capsys, "evaluate", digits[name], *attack) for name in ("plain", "robust"))
    assert plain["robust"]["accuracy"] + 0.1 < robust["robust"]["accuracy"] < robust["accuracy"]
    assert robust["robust"]["attack"] == PGD(0.1).to_config()
    report = read(digits["robust"] / "report.json")
    assert report["robust"]["attack"]["steps"] == 4 and 0.3 < report["robust"]["accuracy"] < report["test"]["accuracy"]
    assert "robust" not in read(digits["plain"] / "report.json")
    shown = output_of(capsys, "evaluate", digits["robust"], "--attack", "fgsm", "--attack-eps", "0.05")
    assert "under attack by fgsm, eps 0.05:" in shown and "robust accuracy" in shown
    assert "under attack by pgd" in (digits["robust"] / "report.html").read_text(encoding="utf-8")


def test_scores_are_those_of_the_engine(digits, capsys):
    run_folder = digits["robust"]
    config = read(run_folder / "config.json")
    test = own_data(config, made := Preprocessor.from_config(config["preprocessor"])).test
    engine = load_checkpoint(Run(run_folder).checkpoint("model"))
    y = made.encode_targets(test.labels)
    moved = engine.attack(test.X, y, PGD(0.5, steps=3, norm=2))
    how = ("--attack", "pgd", "--eps", "0.5", "--attack-steps", "3", "--attack-norm", "2")
    found = result_of(capsys, "evaluate", run_folder, *how)
    assert found["robust"]["accuracy"] == engine.evaluate(moved, y)["accuracy"]


def test_a_resumed_run_keeps_its_attack(digits, tmp_path):
    options = (*DIGITS, "minmax", "--adversarial", "fgsm", "--attack-eps", "0.1")
    assert run(*options, "--epochs", "4", "--out", tmp_path / "whole") == 0
    assert run(*options, "--epochs", "2", "--out", tmp_path / "parts") == 0
    assert run("train", "--resume", tmp_path / "parts", "--epochs", "4", "--quiet") == 0
    losses = [read(tmp_path / name / "report.json")["final"]["loss"] for name in ("whole", "parts")]
    assert losses[0] == losses[1]


@pytest.mark.parametrize("kind", ["free", "trades"])
def test_a_run_of_a_training_that_is_gone_predicts_and_names_the_one_in_its_place(kind, tmp_path, capsys):
    folder = tmp_path / "run"
    assert run("train", "digits", "--hidden", "8", "--epochs", "1", "--out", folder, "--quiet") == 0
    config = read(folder / "config.json")
    config["options"] |= {"adversarial": kind, "attack_eps": 0.1, "attack_repeats": None, "attack_beta": 6.0}
    (folder / "config.json").write_text(json.dumps(config))
    assert run("evaluate", folder) == 0
    said = refusal(capsys, "train", "--resume", folder, "--epochs", "2")
    assert f"adversarial: {kind} is gone; train against pgd, which takes its place" in said


def test_pixels_without_a_scale_stay_pixels(tmp_path, capsys):
    assert run(*DIGITS, "none", "--epochs", "1", "--out", tmp_path / "run") == 0
    found = result_of(capsys, "evaluate", tmp_path / "run", "--attack", "fgsm", "--eps", "2")
    assert found["robust"]["attack"] == FGSM(2.0, bounds=(0.0, 16.0)).to_config()


def test_numbers_are_attacked_too(tmp_path, capsys):
    frame()[["a", "b", "price"]].to_csv(tmp_path / "prices.csv", index=False)
    options = ("--target", "price", "--adversarial", "pgd", "--attack-eps", "0.2", "--scale", "standard", *SHORT)
    assert run("train", tmp_path / "prices.csv", *options, "--out", tmp_path / "run") == 0
    found = result_of(capsys, "evaluate", tmp_path / "run", "--attack", "pgd", "--eps", "0.2")
    assert found["robust"]["rmse"] > found["rmse"] and found["robust"]["attack"]["bounds"] is None


@pytest.mark.parametrize(
    ("columns", "scale", "what"),
    [
        (["a", "word"], "standard", "words, which are inputs of 'word'"),
        (["a", "day"], "standard", "dates, which are inputs of 'day'"),
        (["b", "gaps"], "standard", "missing cells, which are inputs of 'gaps'"),
        (["a", "b"], "piecewise", "pieces"),
    ],
)
def test_inputs_that_no_small_change_moves_are_refused(columns, scale, what, tmp_path, capsys):
    data, out = frame(), tmp_path / "run"
    # missing in the last row by --time b, which is a test row
    data["gaps"] = data["a"].where(data["b"] < data["b"].max())
    data[[*columns, "price"]].to_csv(tmp_path / "prices.csv", index=False)
    train = ("train", tmp_path / "prices.csv", "--target", "price", "--scale", scale, "--out", out)
    train = (*train, *(("--time", "b") if "gaps" in columns else ()))
    assert what in refusal(capsys, *train, "--adversarial", "pgd", "--attack-eps", "0.1")
    assert not out.exists()
    assert run(*train, *SHORT, "--models", "1") == 0
    assert what in refusal(capsys, "evaluate", out, "--attack", "pgd", "--eps", "0.1")
