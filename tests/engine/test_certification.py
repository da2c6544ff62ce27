"""Certified scores of runs: the cells that move, how far, and what no such change does to a prediction."""

import numpy as np
import pytest

from fusemlp import load_data
from fusemlp.datasets.cells import SCALES
from fusemlp.datasets.rows import fit_preprocessor, network_ends, network_inputs
from fusemlp.report.evidence import certify, reach
from fusemlp.report.metrics import predictions
from make import engine, frame, output_of, read, refusal, result_of, run


@pytest.fixture(scope="module")
def tables(tmp_path_factory):
    """Return tables of labels and of values; the second of their two columns of numbers has missing cells."""
    folder = tmp_path_factory.mktemp("tables")
    for target, classes in (("label", 2), ("price", 0)):
        table = frame(240, target=target, classes=classes, gaps=True)
        table[["b", "a", "word", "day", target]].to_csv(folder / f"{target}.csv", index=False)
    return folder


def fitted(tables, target, scale, loss):
    data = load_data(str(tables / f"{target}.csv"), target=target)
    prepared = fit_preprocessor(data, np.arange(len(data.X)), loss=loss, scale=scale)
    first, last = network_ends(prepared, loss)
    made = engine((first, 12, last), loss, batch_size=32, normalise=False)
    made.fit(network_inputs(prepared, data.X, "fp32"), prepared.encode_targets(data.y), epochs=8)
    return made, prepared, data.X, data.y


def moved(prepared, cells, eps, rng):
    """Return the inputs of rows whose numbers have moved by up to ``eps``, half of them to an end."""
    change = rng.uniform(-1.0, 1.0, (len(cells), 2))
    change = eps * np.where(rng.random(change.shape) < 0.5, np.sign(change), change)
    if prepared.scale == "piecewise":
        # the numbers are its first columns
        steps = np.pad(change * prepared.feature_scale[:2], ((0, 0), (0, len(cells[0]) - 2)))
        return network_inputs(prepared, cells + steps, "fp32")
    inputs = network_inputs(prepared, cells, "fp32")
    inputs[:, :2] += np.where(np.isnan(cells[:, :2]), 0.0, change)
    return inputs


@pytest.mark.parametrize("scale", [scale for scale in SCALES if scale != "none"])
@pytest.mark.parametrize(("target", "loss"), [("label", "cross_entropy"), ("price", "mse"), ("price", "poisson")])
def test_no_change_of_the_cells_breaks_a_certified_score(tables, scale, target, loss):
    eps, rng = 0.05, np.random.default_rng(4)
    model, made, cells, labels = fitted(tables, target, scale, loss)
    low, high = reach(made, cells, eps, "fp32")
    inputs = [moved(made, cells, eps, rng) for _ in range(30)]
    # to the rounding of an input
    room = 4e-7 * np.maximum(1.0, np.abs(high))
    assert all(((low - room <= x) & (x <= high + room)).all() for x in inputs)
    found = certify(model, made, cells, labels, eps)
    outcomes = np.array([predictions(model, made, x) for x in inputs])
    if target == "label":
        robust = (outcomes == labels).all(axis=0).mean()
        assert 0.3 < found["accuracy"] <= robust
        assert found["accuracy"] > certify(model, made, cells, labels, 10 * eps)["accuracy"]
    else:
        width = np.ptp(outcomes, axis=0).mean()
        assert width <= found["width"] < 8 * width


def test_words_dates_and_missing_cells_do_not_move(tables):
    made, cells = fitted(tables, "price", "standard", "mse")[1:3]
    low, high = reach(made, cells, 0.25, "fp32")
    width = np.round(high - low, 6)
    assert made.feature_names[:2] == ("b", "a")
    assert (width[:, 0] == 0.5).all()
    missing = np.isnan(cells[:, 1])
    assert missing.any()
    assert np.array_equal(width[:, 1], np.where(missing, 0.0, 0.5))
    assert (width[:, 2:] == 0.0).all()


def test_pixels_stay_within_those_of_the_rows():
    data = load_data("digits")
    for scale, limits in (("none", (0.0, 16.0)), ("minmax", (-0.3, 1.3))):
        made = fit_preprocessor(data, np.arange(len(data.X)), loss="cross_entropy", scale=scale)
        low, high = reach(made, data.X, 0.3, "fp32")
        assert limits[0] <= low.min() and high.max() <= limits[1]
        assert np.isclose((high - low).max(), 0.6)


def test_the_command_says_what_is_certified(tables, tmp_path, capsys):
    folder = tmp_path / "run"
    path = tables / "label.csv"
    assert run("train", path, "--target", "label", "--epochs", "5", "--out", folder) == 0
    capsys.readouterr()
    shares = []
    for eps in ("0", "0.05", "0.1"):
        report = result_of(capsys, "evaluate", folder, "--certify", eps)
        assert report["certified"]["eps"] == float(eps)
        shares.append(report["certified"]["accuracy"])
    assert report["accuracy"] == shares[0] >= shares[1] >= shares[2]
    assert "test certified accuracy 0." in output_of(capsys, "evaluate", folder, "--data", path, "--certify", "0.05")
    assert run("evaluate", folder, "--certify", "-1") == 2
    assert "--certify: expected a finite number of at least 0, got -1.0" in capsys.readouterr().err


def test_training_with_bounds_certifies_a_run(tmp_path, capsys):
    how = ("--adversarial", "ibp", "--attack-eps", "0.05")
    shares = []
    for name, options in (("plain", ()), ("firm", how)):
        folder = tmp_path / name
        given = ("--scale", "minmax", "--hidden", "48", "--epochs", "20", "--early-stopping", "0", "--quiet")
        assert run("train", "digits", *given, *options, "--out", folder) == 0
        report = result_of(capsys, "evaluate", folder, "--attack", "pgd", "--eps", "0.05", "--certify", "0.05")
        assert report["certified"]["accuracy"] <= report["robust"]["accuracy"] <= report["accuracy"]
        shares.append(report["certified"])
    assert shares[0]["accuracy"] < 0.2
    assert shares[1]["accuracy"] > 0.6
    assert read(folder / "report.json")["certified"] == shares[1]
    assert "test certified accuracy" in (folder / "report.html").read_text()
    for options, message in (
        (("--activation", "gelu"), "--adversarial: IBP takes activations that rise everywhere"),
        (("--attack-steps", "3"), "--attack-steps: only pgd has it, and the attack is ibp"),
    ):
        assert message in refusal(capsys, "train", "digits", *how, *options, "--out", tmp_path / "none")
        assert not (tmp_path / "none").exists()
    assert run("evaluate", folder, "--attack", "ibp", "--eps", "0.05") == 2


def test_a_network_narrower_than_its_classes_is_certified(tmp_path, capsys):
    folder = tmp_path / "run"
    options = ["--hidden", "2", "--adversarial", "ibp", "--attack-eps", "0.05", "--epochs", "2"]
    assert run("train", "iris", *options, "--quiet", "--out", folder) == 0
    trained = read(folder / "report.json")["certified"]
    assert result_of(capsys, "evaluate", folder, "--certify", "0.05")["certified"]["accuracy"] == trained["accuracy"]
