"""Temperature scaling: its optimum, its weights, and what it changes in a run and in a table estimator."""

import numpy as np
import pandas
import pytest
from scipy.special import expit, log_softmax, softmax

from fusemlp import MLP, Adam, CrossEntropy, Engine, load_checkpoint
from fusemlp.cli.options import TrainOptions
from fusemlp.cli.session import prepared_data
from fusemlp.fleet.results import members, merged, merged_members
from fusemlp.report.uncertainty import DEVIATION, LEAST_ROWS, held_out_logits, scale_logits, temperature_of
from fusemlp.sklearn import TableClassifier
from make import read, run

OVERFIT = ("--models", "1", "--scale", "piecewise", "--lr", "0.01", "--early-stopping", "0", "--epochs", "30")


def drawn(count, factor, classes=3, seed=0):
    """Return logits that are ``factor`` times those that the classes are drawn by."""
    generator = np.random.default_rng(seed)
    honest = 2.0 * generator.normal(size=(count, classes))
    codes = (softmax(honest, axis=1).cumsum(axis=1) < generator.random((count, 1))).sum(axis=1)
    return factor * honest, codes, np.ones(count)


def noisy(count=900):
    """Return a table whose classes have a fifth of wrong labels."""
    generator = np.random.default_rng(0)
    table = pandas.DataFrame(generator.normal(size=(count, 3)), columns=["a", "b", "c"])
    table["kind"] = np.where((table["a"] + table["b"] > 0) ^ (generator.random(count) < 0.2), "yes", "no")
    return table


def outputs(path, X):
    return load_checkpoint(path).outputs(X)


@pytest.mark.parametrize("factor", [0.5, 1.7])
def test_the_temperature_undoes_a_factor_on_honest_logits(factor):
    parts = [drawn(3000, factor, seed=seed) for seed in (0, 1)]
    found = temperature_of(parts)
    assert found.rows == 6000
    # the penalty pulls it a little towards 1
    assert abs(found.value / factor - 1) < 0.1
    logits, codes = (np.concatenate([part[place] for part in parts]) for place in (0, 1))

    def log_loss(value):
        return -float(log_softmax(logits / value, axis=1)[np.arange(6000), codes].mean())

    assert found.before == pytest.approx(log_loss(1.0)) and found.after == pytest.approx(log_loss(found.value))
    grid = found.value * np.array([0.99, 0.999, 1.0, 1.001, 1.01])
    objective = [6000 * log_loss(value) + 0.5 * (np.log(value) / DEVIATION) ** 2 for value in grid]
    assert np.argmin(objective) == 2


def test_few_rows_move_it_little_and_fewer_not_at_all():
    # all are right, so that without a penalty it would fall to nothing
    logits = np.tile([2.0, 0.0], (LEAST_ROWS, 1))
    few = temperature_of([(logits, np.zeros(LEAST_ROWS, int), np.ones(LEAST_ROWS))])
    assert 0.5 < few.value < 1.0
    logits, codes, weights = drawn(LEAST_ROWS, 3.0)
    assert temperature_of([(logits[1:], codes[1:], weights[1:])]) is None
    # rows that weigh nothing do not count
    weights[0] = 0.0
    assert temperature_of([(logits, codes, weights)]) is None


def test_weights_count_as_repeated_rows_and_one_logit_as_two():
    logits, codes, _ = drawn(600, 2.0, classes=2)
    weights = np.random.default_rng(1).integers(1, 4, 600)
    weighted = temperature_of([(logits, codes, weights * 600 / weights.sum())])
    # of as many rows: the mean log loss is that of the repeated rows
    repeated = (np.repeat(part, weights, axis=0) for part in (logits, codes, np.ones(600)))
    other = temperature_of([tuple(repeated)])
    assert weighted.before == pytest.approx(other.before)
    engine = Engine(MLP([2, 1]), loss="binary_cross_entropy")
    X, y = np.random.default_rng(0).normal(size=(50, 2)).astype(np.float32), np.arange(50)[:, None] % 2
    two, found, ones = held_out_logits(engine, X, y, None)
    np.testing.assert_allclose(softmax(two[:, 0], axis=1)[:, 1], expit(engine.outputs(X)[:, 0]), rtol=1e-6)
    assert (found == y[:, 0]).all() and (ones == 1.0).all()


def test_class_weights_are_those_of_the_validation_loss():
    engine = Engine(MLP([3, 2]), loss=CrossEntropy(class_weight=[1.0, 5.0]))
    X, y = np.zeros((4, 3), np.float32), np.array([0, 1, 1, 0])
    assert held_out_logits(engine, X, y, None)[2].tolist() == [1.0, 5.0, 5.0, 1.0]
    assert held_out_logits(engine, X, y, np.array([2.0, 2.0, 1.0, 0.0]))[2].tolist() == [2.0, 10.0, 5.0, 0.0]


def test_scaling_divides_the_logits_and_keeps_the_classes_of_an_ensemble_and_its_models():
    engines = [Engine(MLP([3, 5, 4]), seed=seed) for seed in range(3)]
    whole, found = merged(engines), temperature_of([drawn(2000, 2.0)])
    X = np.random.default_rng(0).normal(size=(40, 3)).astype(np.float32)
    before, classes = whole.outputs(X), whole.predict(X)
    scale_logits(whole, found.value)
    # sums of 15 products in float32
    np.testing.assert_allclose(whole.outputs(X), before / found.value, rtol=0, atol=64 * 15 * 2.0**-23)
    assert (whole.predict(X) == classes).all()
    for one, engine in zip(members(whole), engines, strict=True):
        np.testing.assert_allclose(one.outputs(X), engine.outputs(X) / found.value, rtol=0, atol=64 * 15 * 2.0**-23)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    path = tmp_path_factory.mktemp("temperature") / "data.csv"
    noisy(1500).to_csv(path, index=False)
    return path


def test_a_run_scales_model_and_best_and_goes_on_from_what_is_not_scaled(data, tmp_path, capsys):
    options = ("--target", "kind", *OVERFIT, "--weight-decay", "0", "--validation-fraction", "0.2", "--quiet")
    assert run("train", data, *options, "--out", tmp_path / "run") == 0
    report = read(tmp_path / "run" / "report.json")
    value = report["temperature"]
    assert value > 1.1
    assert f"temperature {value:.4g} divides the logits: log loss of 240 held-out rows" in capsys.readouterr().out
    folder = tmp_path / "run" / "checkpoints"
    raw = load_checkpoint(folder / "last.safetensors")
    X = np.random.default_rng(0).normal(size=(40, raw.network.sizes[0])).astype(np.float32)
    # 64 products of numbers below 30 in float32
    atol = 64 * 30 * 2.0**-23
    np.testing.assert_allclose(outputs(folder / "model.safetensors", X), raw.outputs(X) / value, rtol=1e-5, atol=atol)
    # the best weights are those of another epoch
    prepared = prepared_data(TrainOptions(**read(tmp_path / "run" / "config.json")["options"]))
    best = load_checkpoint(folder / "best.safetensors").evaluate(prepared.validation.X, prepared.validation.y)["loss"]
    assert best != pytest.approx(min(float(row) for row in pandas.read_csv(tmp_path / "run/metrics.csv")["val_loss"]))
    at_best = outputs(folder / "best.safetensors", X) * value
    # a longer run has the same weights as one that was not cut off
    assert run("train", "--resume", tmp_path / "run", "--epochs", "33", "--quiet") == 0
    at = options.index("--epochs") + 1
    assert run("train", data, *options[:at], "33", *options[at + 1 :], "--out", tmp_path / "whole") == 0
    whole = tmp_path / "whole" / "checkpoints" / "model.safetensors"
    np.testing.assert_array_equal(outputs(folder / "model.safetensors", X), outputs(whole, X))
    # the best weights, of an epoch before, have the new temperature alone
    longer_report = read(tmp_path / "run" / "report.json")
    assert longer_report["best_epoch"] <= 30 and longer_report["temperature"] != value
    again = outputs(folder / "best.safetensors", X) * longer_report["temperature"]
    np.testing.assert_allclose(again, at_best, rtol=1e-5, atol=atol)


def test_the_final_fit_and_folds_take_the_temperature_too(data, tmp_path):
    options = ("--target", "kind", "--hidden", "64", "--lr", "0.02", "--scale", "robust", "--models", "2", "--quiet")
    assert run("train", data, *options, "--final-fit", "--out", tmp_path / "run") == 0
    report, folder = read(tmp_path / "run" / "report.json"), tmp_path / "run" / "checkpoints"
    given = TrainOptions(**read(tmp_path / "run" / "config.json")["options"])
    prepared = prepared_data(given)
    rows = [part for part in (prepared.train, prepared.validation, prepared.test) if part is not None]
    X, y = (np.concatenate([getattr(part, name) for part in rows]) for name in "Xy")
    epochs = report["final_fit"]["epochs"]
    engine = merged_members(prepared.fleet(rows=len(X), epochs=epochs).fit(X, y, epochs=epochs).members)[0]
    X = prepared.test.X
    value = report["temperature"]
    np.testing.assert_allclose(
        outputs(folder / "model.safetensors", X), engine.outputs(X) / value, rtol=1e-4, atol=1e-5
    )
    # the models' own folds, scaled, gave the errors of the conformal sets
    best = members(load_checkpoint(folder / "best.safetensors"))
    errors = [
        1.0 - one.predict_proba(prepared.train.X[held])[np.arange(len(held)), prepared.train.y[held]]
        for one, (_, held) in zip(best, prepared.folds, strict=True)
    ]
    kept = report["held_out"]
    np.testing.assert_allclose(
        np.sort(np.concatenate(errors))[np.array(kept["ranks"]) - 1], kept["errors"][0], atol=1e-5
    )


@pytest.mark.parametrize(
    "options",
    ["--target kind --loss mse", "--target a --loss mse --no-log-target", "--target kind --validation-fraction 0"],
)
def test_other_losses_and_no_held_out_rows_have_none(options, data, tmp_path):
    quick = ("--models", "1", "--hidden", "8", "--epochs", "3", "--scale", "robust", "--quiet")
    assert run("train", data, *options.split(), *quick, "--out", tmp_path / "run") == 0
    assert "temperature" not in read(tmp_path / "run" / "report.json")


@pytest.mark.parametrize("more", [{}, {"loss": "binary_cross_entropy"}, {"class_weight": {"no": 1, "yes": 4}}])
def test_a_table_classifier_gains_by_it_on_its_held_out_rows(more, tmp_path):
    table = noisy()
    X, y = table.drop(columns="kind"), table["kind"]
    # without the weight decay of the default, which leaves little to gain
    options = {"optimizer": Adam(lr=0.02), "epochs": 20, "early_stopping": 30, "scale": "robust"}
    model = TableClassifier(hidden=64, models=1, **options, **more)
    model.fit(X[:500], y[:500], X_val=X[500:], y_val=y[500:])
    codes = (y[500:] == "yes").to_numpy(int)
    chances = model.predict_proba(X[500:])[:, 1].astype(np.float64)
    weights = np.array([1.0, 4.0])[codes] if "class_weight" in more else np.ones(len(codes))
    margin = np.log(chances / (1 - chances))
    # found again by a grid: the scaled logits are at the optimum of loss and penalty
    grid = np.exp(np.linspace(-0.3, 0.3, 601))
    losses = np.array([np.average(np.logaddexp(0, (1 - 2 * codes) * margin / one), weights=weights) for one in grid])
    penalty = 0.5 * (np.log(grid * model.temperature_) / DEVIATION) ** 2
    assert abs(grid[np.argmin(len(codes) * losses + penalty)] - 1) < 2e-3
    assert model.temperature_ != 1.0
    model.save(tmp_path / "model.safetensors")
    again = TableClassifier.load(tmp_path / "model.safetensors")
    assert again.temperature_ == model.temperature_
    np.testing.assert_array_equal(again.predict_proba(X), model.predict_proba(X))


def test_label_smoothing_is_undone_by_a_temperature_below_one(data, tmp_path):
    smooth = ("--label-smoothing", "0.6", "--models", "2", "--hidden", "16", "--scale", "robust", "--quiet")
    assert run("train", data, "--target", "kind", *smooth, "--out", tmp_path / "run") == 0
    value = read(tmp_path / "run" / "report.json")["temperature"]
    assert value < 0.9
    assert f"temperature {value:.4g} divides the logits" in (tmp_path / "run" / "report.html").read_text("utf-8")
