"""``fusemlp train --adversarial`` and ``evaluate --attack``."""

import json

import numpy as np
import pytest

from fusemlp import FGSM, PGD, load_checkpoint
from fusemlp.cli.model import own_data
from fusemlp.datasets.preprocessing import Preprocessor
from fusemlp.report.runs import Run
from make import read, run

SHORT = ("--hidden", "32", "--epochs", "12", "--quiet")


def table(path, *columns):
    """Write a table of some of these columns, and a target that follows from the numbers."""
    random = np.random.default_rng(0)
    a, b = random.normal(size=(2, 120))
    words = random.choice(["red", "green"], 120)
    days = np.datetime64("2020-01-01") + random.integers(0, 900, 120)
    # missing in the last row by --time b, which is a test row
    gaps = np.where(b == b.max(), "", a.astype(str))
    text = {"a": a, "b": b, "gaps": gaps, "day": days, "word": words, "price": 100.0 + 10.0 * a - 5.0 * b}
    lines = [
        ",".join(columns),
        *(",".join(map(str, row)) for row in zip(*(text[name] for name in columns), strict=True)),
    ]
    path.write_text("\n".join(lines))
    return path


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    folder = tmp_path_factory.mktemp("digits")
    made = {"plain": (), "robust": ("--adversarial", "pgd", "--attack-eps", "0.1", "--attack-steps", "4")}
    for name, options in made.items():
        assert run("train", "digits", "--scale", "minmax", *SHORT, *options, "--out", folder / name) == 0
    return {name: folder / name for name in made}


def scores(capsys, *arguments):
    capsys.readouterr()
    assert run("evaluate", *arguments, "--json") == 0
    found = json.loads(capsys.readouterr().out)
    return found


def test_training_on_attacks_is_told_and_makes_the_run_robust(digits, capsys):
    attack = ("--attack", "pgd", "--eps", "0.1")
    plain, robust = (scores(capsys, digits[name], *attack) for name in ("plain", "robust"))
    assert plain["robust"]["accuracy"] + 0.1 < robust["robust"]["accuracy"] < robust["accuracy"]
    assert robust["robust"]["attack"] == PGD(0.1).to_config()
    report = read(digits["robust"] / "report.json")
    assert report["robust"]["attack"]["steps"] == 4 and 0.3 < report["robust"]["accuracy"] < report["test"]["accuracy"]
    assert "robust" not in read(digits["plain"] / "report.json")
    assert run("evaluate", digits["robust"], "--attack", "fgsm", "--attack-eps", "0.05") == 0
    shown = capsys.readouterr().out
    assert "under attack by fgsm, eps 0.05:" in shown and "robust accuracy" in shown
    assert "under attack by pgd" in (digits["robust"] / "report.html").read_text(encoding="utf-8")


def test_scores_are_those_of_the_engine(digits, capsys):
    run_folder = digits["robust"]
    config = read(run_folder / "config.json")
    test = own_data(config, made := Preprocessor.from_config(config["preprocessor"])).test
    engine = load_checkpoint(Run(run_folder).checkpoint("model"))
    y = made.encode_targets(test.labels)
    moved = engine.attack(test.X, y, PGD(0.5, steps=3, norm=2))
    found = scores(capsys, run_folder, "--attack", "pgd", "--eps", "0.5", "--attack-steps", "3", "--attack-norm", "2")
    assert found["robust"]["accuracy"] == engine.evaluate(moved, y)["accuracy"]


def test_a_resumed_run_keeps_its_attack(digits, tmp_path):
    options = (
        "digits",
        "--scale",
        "minmax",
        "--hidden",
        "32",
        "--quiet",
        "--adversarial",
        "fgsm",
        "--attack-eps",
        "0.1",
    )
    assert run("train", *options, "--epochs", "4", "--out", tmp_path / "whole") == 0
    assert run("train", *options, "--epochs", "2", "--out", tmp_path / "parts") == 0
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
    capsys.readouterr()
    assert run("train", "--resume", folder, "--epochs", "2") == 2
    assert f"adversarial: {kind} is gone; train against pgd, which takes its place" in capsys.readouterr().err


@pytest.mark.parametrize("option", ["--adversarial", "--attack-eps", "--models"])
def test_sweep_names_the_command_that_has_an_option(option, capsys):
    assert run("sweep", "digits", option, "3") == 2
    assert f"No such option: {option}; fusemlp train has it" in capsys.readouterr().err
    assert run("sweep", "digits", "--nothing") == 2
    assert "fusemlp train has it" not in capsys.readouterr().err


def test_pixels_without_a_scale_stay_pixels(tmp_path, capsys):
    assert (
        run(
            "train",
            "digits",
            "--scale",
            "none",
            "--hidden",
            "32",
            "--epochs",
            "1",
            "--quiet",
            "--out",
            tmp_path / "run",
        )
        == 0
    )
    found = scores(capsys, tmp_path / "run", "--attack", "fgsm", "--eps", "2")
    assert found["robust"]["attack"] == FGSM(2.0, bounds=(0.0, 16.0)).to_config()


def test_numbers_are_attacked_too(tmp_path, capsys):
    data = table(tmp_path / "prices.csv", "a", "b", "price")
    options = ("--target", "price", "--adversarial", "pgd", "--attack-eps", "0.2", "--scale", "standard", *SHORT)
    assert run("train", data, *options, "--out", tmp_path / "run") == 0
    found = scores(capsys, tmp_path / "run", "--attack", "pgd", "--eps", "0.2")
    assert found["robust"]["rmse"] > found["rmse"] and found["robust"]["attack"]["bounds"] is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--adversarial", "pgd"), "--attack-eps: say how far an input may move"),
        (("--attack-eps", "1"), "--attack-eps: it is of an attack; give --adversarial too"),
        (("--adversarial", "worst", "--attack-eps", "1"), "--adversarial: unknown name 'worst'"),
        (("--adversarial", "fgsm", "--attack-eps", "1", "--attack-steps", "2"), "--attack-steps: fgsm is one step"),
        (("--adversarial", "ibp", "--attack-eps", "1", "--attack-steps", "2"), "--attack-steps: ibp takes no steps"),
        (("--adversarial", "trades", "--attack-eps", "1"), "--adversarial: trades is gone; train against pgd"),
        (("--adversarial", "pgd", "--attack-eps", "0"), "--attack-eps: expected a finite number above 0"),
        (("--adversarial", "pgd", "--attack-eps", "1", "--models", "3"), "--models: adversarial training makes one"),
        (("--adversarial", "pgd", "--attack-eps", "1", "--final-fit"), "--final-fit: adversarial training makes one"),
        (
            ("--adversarial", "pgd", "--attack-eps", "1", "--dp-epsilon", "3"),
            "--dp-epsilon: adversarial training is not private",
        ),
    ],
)
def test_what_does_not_go_together_is_refused(options, message, tmp_path, capsys):
    assert run("train", "digits", *options, "--out", tmp_path / "run") == 2
    assert message in capsys.readouterr().err and not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("columns", "scale", "what"),
    [
        (("a", "word", "price"), "standard", "words, which are inputs of 'word'"),
        (("a", "day", "price"), "standard", "dates, which are inputs of 'day'"),
        (("b", "gaps", "price"), "standard", "missing cells, which are inputs of 'gaps'"),
        (("a", "b", "price"), "piecewise", "pieces"),
    ],
)
def test_inputs_that_no_small_change_moves_are_refused(columns, scale, what, tmp_path, capsys):
    data = table(tmp_path / "prices.csv", *columns)
    plain = ("--target", "price", "--scale", scale, *(("--time", "b") if "gaps" in columns else ()))
    assert run("train", data, *plain, "--adversarial", "pgd", "--attack-eps", "0.1", "--out", tmp_path / "run") == 2
    assert what in capsys.readouterr().err and not (tmp_path / "run").exists()
    assert run("train", data, *plain, *SHORT, "--models", "1", "--out", tmp_path / "run") == 0
    assert run("evaluate", tmp_path / "run", "--attack", "pgd", "--eps", "0.1") == 2
    assert what in capsys.readouterr().err
