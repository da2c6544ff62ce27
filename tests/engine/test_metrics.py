"""Metrics beside the loss: their values, and training, stopping, plateaus and sweeps by them."""

import json
import math
from itertools import count

import numpy as np
import pytest
from sklearn import metrics as sk
from sklearn.datasets import load_breast_cancer, load_diabetes, load_iris
from sklearn.linear_model import Ridge

from fusemlp import MLP, Adam, CrossEntropy, Engine, Fleet, ReduceOnPlateau, load_checkpoint
from fusemlp.callbacks import EarlyStopping
from fusemlp.describe.metrics import METRICS, Judged, Metric, rises
from fusemlp.report.metrics import class_scores, headline, ridge, spelled
from fusemlp_kernels.errors import ArgumentError, ArgumentTypeError
from make import read, rows, run

RNG = np.random.default_rng(5)


def split(load):
    X, y = load(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(X))
    X, y = ((X - X.mean(axis=0)) / X.std(axis=0))[order], y[order]
    return X[:-50], y[:-50], X[-50:], y[-50:]


TUMOUR, IRIS, DIABETES = split(load_breast_cancer), split(load_iris), split(load_diabetes)


def value(name, *given, **more):
    return METRICS[name].of(Judged(*given, **more))


def test_classes_are_scored_as_documented():
    codes, scores, weight = RNG.integers(0, 3, 40), RNG.dirichlet(np.ones(3), 40), RNG.random(40)
    predicted = scores.argmax(axis=1)
    for given in (None, weight):
        named = {"sample_weight": given}
        expected = {
            "auc": np.mean([sk.roc_auc_score(codes == one, scores[:, one], **named) for one in range(3)]),
            "log_loss": -np.average(np.log(scores[np.arange(40), codes]), weights=given),
            "f1": np.mean([sk.f1_score(codes == one, predicted == one, **named) for one in range(3)]),
            "balanced_accuracy": sk.balanced_accuracy_score(codes, predicted, **named),
        }
        for name, right in expected.items():
            assert value(name, codes, predicted, scores, given) == pytest.approx(right, rel=1e-12), name


def test_log_loss_has_no_bound():
    scores = np.array([[1.0, 1e-30], [1.0, 0.0]], np.float32)
    assert value("log_loss", np.array([1]), np.array([0]), scores[:1]) == pytest.approx(30 * math.log(10), rel=1e-6)
    # float32's least number stands for 0
    assert value("log_loss", np.array([1]), np.array([0]), scores[1:]) == pytest.approx(149 * math.log(2), rel=1e-6)


def test_auc_leaves_out_a_class_without_rows():
    codes, scores = np.array([0, 1, 0, 1]), np.array([[0.6, 0.3, 0.1], [0.5, 0.4, 0.1], [0.3, 0.6, 0.1], [0, 1, 0]])
    expected = np.mean([sk.roc_auc_score(codes == one, scores[:, one]) for one in (0, 1)])
    assert value("auc", codes, scores.argmax(axis=1), scores) == pytest.approx(expected, rel=1e-12)
    assert math.isnan(value("auc", np.zeros(4, int), codes, scores[:, :2]))


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_numbers_have_the_scores_of_scikit_learn(dtype, weighted):
    truth, predicted = RNG.normal(size=(500, 3)).astype(dtype), RNG.normal(size=(500, 3)).astype(np.float32)
    truth[:, 1] = 2.0
    weight = RNG.random(500) if weighted else None
    functions = {"rmse": sk.root_mean_squared_error, "mae": sk.mean_absolute_error, "r2": sk.r2_score}
    expected = {name: of(truth, predicted, sample_weight=weight) for name, of in functions.items()}
    expected["pinball"] = sk.mean_pinball_loss(truth, predicted, sample_weight=weight, alpha=0.3)
    # sums of 500 numbers; weights make them float64
    rel = 500 * 2**-24 if dtype == np.float32 and not weighted else 1e-12
    for name, right in expected.items():
        assert value(name, truth, predicted, None, weight, 0.3) == pytest.approx(right, rel=rel), name
    assert value("r2", truth[:, 1], truth[:, 1]) == 1.0
    assert math.isnan(value("r2", truth[:1], predicted[:1]))


@pytest.mark.parametrize("shape", [(300, 20), (20, 30), (50, 3)])
def test_the_linear_baseline_is_a_ridge_regression(shape):
    random = np.random.default_rng(0)
    X, values = random.normal(size=shape) + 3.0, random.normal(size=(shape[0], 2)) + 7.0
    if shape == (50, 3):
        # numbers of 1e9 and their sums: rounding leaves equations that are not definite
        X = 1e9 * np.column_stack([X, X.sum(axis=1), X[:, 0]])
    expected = Ridge().fit(X, values).predict(X)
    np.testing.assert_allclose(ridge(X.copy(), values, X), expected, rtol=1e-9, atol=1e-9)


def test_directions():
    assert {name for name in METRICS if rises(f"val_{name}")} == {"auc", "f1", "balanced_accuracy", "r2"}
    assert rises("val_accuracy") and rises("val_score") and not rises("val_loss") and not rises("learning_rate")


TWO_LABELS = np.eye(3)[IRIS[3]] + np.eye(3)[(IRIS[3] + 1) % 3]
CASES = {
    "two classes": (MLP([30, 8, 2]), "cross_entropy", TUMOUR[2:], ("auc", "f1", "log_loss", "balanced_accuracy")),
    "one logit": (MLP([30, 8, 1]), "binary_cross_entropy", TUMOUR[2:], ("auc", "f1", "log_loss")),
    "labels": (MLP([4, 8, 3]), "binary_cross_entropy", (IRIS[2], TWO_LABELS), ("auc", "f1")),
    "one-hot rows": (MLP([4, 8, 3]), "mse", (IRIS[2], np.eye(3)[IRIS[3]]), ("auc", "f1", "balanced_accuracy")),
    "numbers": (MLP([10, 8, 1]), "mae", DIABETES[2:], ("mae", "rmse", "r2", "pinball")),
}


@pytest.mark.parametrize("case", CASES)
def test_evaluate_returns_metrics_of_every_kind_of_target(case):
    net, loss, (X, y), names = CASES[case]
    engine = Engine(net, loss=loss)
    found = engine.evaluate(X, y, metrics=names)
    assert set(names) < found.keys()
    if "f1" in names:
        truth = y.argmax(axis=1) if case == "one-hot rows" else y
        predicted = engine.predict(X).argmax(axis=1) if case == "one-hot rows" else engine.predict(X)
        assert found["f1"] == pytest.approx(sk.f1_score(truth, predicted, average="macro", zero_division=0), rel=1e-12)
    if case in ("two classes", "one logit"):
        assert found["auc"] == sk.roc_auc_score(y, engine.predict_proba(X)[:, 1])
        # float32 losses, summed over 50 rows
        assert found["log_loss"] == pytest.approx(found["loss"], rel=50 * 2**-24 * 4)
    if case == "numbers":
        assert found["mae"] == pytest.approx(found["loss"], rel=50 * 2**-24 * 4)
        assert found["pinball"] == pytest.approx(found["mae"] / 2, rel=1e-6)


def test_rows_of_an_ignored_class_do_not_count():
    X, y = IRIS[2], IRIS[3]
    engine = Engine(MLP([4, 8, 3]), loss=CrossEntropy(ignore_index=9))
    ignored = engine.evaluate(X, np.where(y == 2, 9, y), metrics=["f1"])
    kept = Engine(MLP([4, 8, 3])).evaluate(X[y != 2], y[y != 2], metrics=["f1"])
    assert ignored["f1"] == kept["f1"]


def test_training_stops_by_a_metric_and_restores_its_best_weights():
    X, y, Xv, yv = TUMOUR
    engine = Engine(MLP([30, 8, 2]), optimizer=Adam(lr=0.01))
    history = engine.fit(X, y, epochs=60, validation_data=(Xv, yv), metrics=["f1"], monitor="val_auc", early_stopping=4)
    aucs = history.history["val_auc"]
    assert list(history.history)[:6] == ["loss", "accuracy", "val_loss", "val_accuracy", "val_auc", "val_f1"]
    assert history.best_epoch == int(np.argmax(aucs)) == len(aucs) - 5
    assert history.stopped.startswith("val_auc has not improved for 4 epochs")
    assert engine.evaluate(Xv, yv, metrics=["auc"])["auc"] == max(aucs)
    # the validation loss would have gone on
    assert int(np.argmin(history.history["val_loss"])) != history.best_epoch


def test_a_callback_names_its_metric():
    X, y, Xv, yv = TUMOUR
    stop = EarlyStopping(monitor="val_auc", patience=2)
    history = Engine(MLP([30, 8, 2])).fit(X, y, epochs=40, validation_data=(Xv, yv), callbacks=[stop])
    assert stop.best == max(history.history["val_auc"])
    assert history.stopped == "val_auc has not improved for 2 epochs"


def test_the_rate_falls_when_a_metric_stands_still():
    X, y, Xv, yv = TUMOUR
    rates = {}
    for monitor in (None, "val_balanced_accuracy"):
        engine = Engine(MLP([30, 8, 2]), optimizer=Adam(lr=ReduceOnPlateau(0.001, patience=3)))
        history = engine.fit(X, y, epochs=12, validation_data=(Xv, yv), monitor=monitor).history
        rates[monitor] = history["learning_rate"]
    best, wait, expected = -math.inf, 0, 0.001
    for one, rate in zip(history["val_balanced_accuracy"], rates[monitor], strict=True):
        assert rate == pytest.approx(expected, rel=1e-12)  # of the epoch, before the reduction after it
        better = one > best + 1e-4
        best, wait = (one, 0) if better else (best, wait + 1)
        if wait == 3:
            wait, expected = 0, expected / 10
    assert expected < 0.001
    assert rates[None] == [0.001] * 12  # the loss improves in each epoch


def test_a_resumed_fit_follows_the_same_quantity(tmp_path):
    X, y, Xv, yv = TUMOUR
    given = {"validation_data": (Xv, yv), "monitor": "val_auc", "early_stopping": 9}
    whole = Engine(MLP([30, 8, 2])).fit(X, y, epochs=12, **given)
    engine = Engine(MLP([30, 8, 2]))
    engine.fit(X, y, epochs=6, **given)
    engine.save_checkpoint(tmp_path / "six.safetensors")
    resumed = load_checkpoint(tmp_path / "six.safetensors")
    with pytest.raises(ArgumentError, match=r"^monitor: the fit that is resumed follows 'val_auc', got None"):
        resumed.fit(X, y, epochs=12, validation_data=(Xv, yv), early_stopping=9, resume=True)
    again = resumed.fit(X, y, epochs=12, resume=True, **given)
    assert again.history == whole.history and again.best_epoch == whole.best_epoch


@pytest.mark.parametrize(
    ("best", "waits"), [(0, 8), (11, 8), (12, 9), (15, 11), (16, 12), (28, 20), (29, 20), (60, 20)]
)
def test_auto_early_stopping_waits_two_thirds_of_the_epochs_up_to_the_best(tmp_path, best, waits):
    X, y, Xv, yv = TUMOUR
    looks = count(-1)  # the first look is at the untrained network

    def score(targets, outputs):
        return -abs(next(looks) - best)

    given = {"validation_data": (Xv, yv), "metrics": [score], "monitor": "val_score", "early_stopping": "auto"}
    engine = Engine(MLP([30, 2]), batch_size=len(X))
    # what came before the call does not count
    engine.fit(X, y, epochs=3)
    engine.fit(X, y, epochs=5, **given)
    engine.save_checkpoint(tmp_path / "five.safetensors")
    again = load_checkpoint(tmp_path / "five.safetensors")
    looks = count(4)
    history = again.fit(X, y, epochs=100, resume=True, **given)
    assert history.best_epoch == 3 + best and len(history.epochs) == best + 1 + waits


def test_a_fleet_stops_and_ranks_by_a_metric():
    X, y, Xv, yv = TUMOUR
    fleet = Fleet(MLP([30, 8, 2]), vary={"lr": [0.0001, 0.01], "seed": [0, 1]})
    results = fleet.fit(X, y, epochs=30, validation_data=(Xv, yv), monitor="val_auc", early_stopping=3)
    for member in results.members:
        assert member.scores["val_auc"] == max(member.history.history["val_auc"])
        assert member.engine.evaluate(Xv, yv, metrics=["auc"])["auc"] == member.scores["val_auc"]
    ranked = [member.scores["val_auc"] for member in results.ranked("val_auc")]
    assert ranked == sorted(ranked, reverse=True) and len(set(ranked)) > 1


X, Y, XV, YV = TUMOUR
NO_ROWS = {"validation_data": None}
REFUSED = [
    ({"metrics": ["auk"]}, r"metrics: unknown name 'auk'; did you mean 'auc'\?"),
    ({"metrics": "auc"}, r"metrics: expected a list of names such as \['auc'\], got 'auc'"),
    ({"metrics": ["mae"]}, r"metrics: mae is for numbers; for classes there are balanced_"),
    (
        {"metrics": ["auc"], "validation_data": (XV[YV == 1], YV[YV == 1])},
        r"metrics: auc is not defined on these \d+ validation rows",
    ),
    (
        {"metrics": ["auc"], **NO_ROWS},
        r"metrics: they are of validation rows; give validation_data=\(Xv, yv\) or validation_(split=0.2|rows) too",
    ),
    ({"monitor": "val_los"}, r"monitor: unknown name 'val_los'; did you mean 'val_loss'\?"),
    ({"monitor": "val_auc", **NO_ROWS}, r"monitor: 'val_auc' is of validation rows; give validation_data"),
]


@pytest.mark.parametrize(("given", "message"), REFUSED)
def test_refusals_come_before_the_training(given, message):
    engine = Engine(MLP([30, 8, 2]))
    for fit in (engine.fit, Fleet(MLP([30, 8, 2]), vary={"seed": [0, 1]}).fit):
        with pytest.raises(ArgumentTypeError if "a list" in message else ArgumentError, match=f"^{message}"):
            fit(X, Y, epochs=1, **{"validation_data": (XV, YV), **given})
    assert engine.epochs_trained == 0


def test_the_command_line_trains_by_a_metric(tmp_path, capsys):
    folder = tmp_path / "run"
    options = ["--epochs", "200", "--early-stopping", "3", "--metric", "auc", "--quiet"]
    assert run("train", "breast_cancer", *options, "--out", folder) == 0
    out, report, table = capsys.readouterr().out, read(folder / "report.json"), rows(folder / "metrics.csv")
    aucs = [float(row["val_auc"]) for row in table]
    assert report["best_epoch"] == int(np.argmax(aucs)) + 1 == len(aucs) - 3
    assert "val_auc has not improved for 3 epochs" in out
    for checkpoint in ("best", "model"):
        assert run("evaluate", folder, "--weights", checkpoint, "--json") == 0
    first, second = map(json.loads, capsys.readouterr().out.splitlines())
    assert {**first, "weights": ""} == {**second, "weights": ""}
    for name in ("accuracy", "balanced_accuracy", "f1", "auc"):
        assert f"test {name} {report['test'][name]:.4f}" in out
    assert "log_loss" not in out  # it is the loss
    assert report["test"]["log_loss"] == pytest.approx(report["test"]["loss"], rel=1e-5)
    assert run("train", "breast_cancer", "--metric", "mae", "--out", tmp_path / "other") == 2
    said = "--metric: 'mae' is a score of numbers, and the target holds classes; expected one of: balanced_accuracy, "
    assert said in capsys.readouterr().err
    for metric in ("accuracy", "val_accuracy", "auc"):
        assert run("train", "diabetes", "--metric", metric, "--out", tmp_path / "other") == 2
        said = f"--metric: '{metric}' is a score of classes, and the target holds numbers; expected one of: rmse, mae, "
        assert said in capsys.readouterr().err
    assert not (tmp_path / "other").exists()


def test_errors_of_a_regression_are_logged_in_its_units(tmp_path):
    folder = tmp_path / "run"
    options = ["--epochs", "40", "--early-stopping", "5", "--metric", "val_mae", "--split-seed", "0", "--quiet"]
    assert run("train", "diabetes", *options, "--out", folder) == 0
    report = read(folder / "report.json")
    logged = min(float(row["val_mae"]) for row in rows(folder / "metrics.csv"))
    # of 442 progressions from 25 to 346: the standardised targets have an error below 1
    assert 20 < logged < 100 and 20 < report["test"]["mae"] < 100
    assert report["test"]["pinball"] == pytest.approx(report["test"]["mae"] / 2, rel=1e-12)


def test_a_sweep_ranks_by_a_metric(tmp_path, capsys):
    folder = tmp_path / "run"
    options = ["--vary", "lr=0.0001,0.003,0.1", "--epochs", "6", "--metric", "f1", "--quiet"]
    assert run("sweep", "wine", *options, "--out", folder) == 0
    found = [float(row["val_f1"]) for row in rows(folder / "results.csv")]
    assert found == sorted(found, reverse=True) and len(set(found)) > 1
    out = capsys.readouterr().out
    assert "the largest val_f1" in out and "--metric f1" in out
    assert run("sweep", "wine", *options, "--validation-fraction", "0", "--out", tmp_path / "none") == 2
    assert "--metric: " in capsys.readouterr().err


def test_lines_leave_out_what_repeats_or_is_undefined():
    lines = list(headline({"loss": 0.5, "log_loss": 0.50001, "auc": math.nan, "mae": 2.0, "pinball": 1.0, "r2": None}))
    assert lines == ["test loss 0.5000", "test mae 2.0000"]
    assert list(headline({"loss": 0.5, "log_loss": 0.7, "mae": 2.0, "pinball": 0.4}))[1::2] == [
        *("test log_loss 0.7000", "test pinball 0.4000")
    ]


def test_scores_have_six_digits_or_four_decimals():
    numbers = (0.65021, 99.12345, -2292.9407, 158083.9847, 1.5e6, 2e-5)
    assert [spelled(number) for number in numbers] == ["0.6502", "99.1235", "-2292.94", "158084", "1500000", "0.000020"]
    assert [spelled(-5.0619, 8676.7), spelled(-0.00001, 0.5)] == ["-5.06", "0.0000"]


def test_the_outputs_of_a_single_class_have_a_column():
    engine = Engine(MLP([3, 1]), loss="mse")
    assert class_scores(engine, np.zeros((4, 3))).shape == (4, 1)


def test_functions_are_metrics_of_targets_and_outputs():
    X, y, Xv, yv = IRIS

    def top_2_accuracy(targets, outputs):
        return (outputs.argsort(axis=1)[:, -2:] == targets[:, None]).any(axis=1).mean()

    def largest(targets, outputs):
        assert targets.shape == (50,) and targets.dtype == np.int64
        return np.abs(outputs).max()

    engine = Engine(MLP([4, 8, 3]), optimizer=Adam(0.01), backend="numpy")
    history = engine.fit(
        X, y, epochs=9, validation_data=(Xv, yv), metrics=["auc", top_2_accuracy, largest], monitor="val_top_2_accuracy"
    )
    scores = history.history["val_top_2_accuracy"]
    assert history.best_epoch == scores.index(max(scores))
    assert {"val_auc", "val_largest"} <= history.history.keys()
    found, outputs = engine.evaluate(Xv, yv, metrics=[largest, top_2_accuracy]), engine.outputs(Xv)
    assert found["largest"] == pytest.approx(np.abs(outputs).max(), rel=1e-6) == history.history["val_largest"][-1]
    assert found["top_2_accuracy"] == top_2_accuracy(yv, outputs) == scores[-1]
    # of targets that no other metric is for
    soft = np.eye(3)[yv]
    assert engine.evaluate(Xv, soft, metrics=[lambda t, y: len(t) + y.shape[1]])["<lambda>"] == 53.0
    for wrong, error, words in (
        ([largest, largest], ArgumentError, "metrics: there are two of the name 'largest'; rename the function"),
        (["accuracy", accuracy], ArgumentError, "metrics: there are two of the name 'accuracy'"),
        ([lambda t, y: "high"], ArgumentTypeError, "metrics: '<lambda>' returned 'high'; expected one number"),
        ([lambda t, y: y[0]], ArgumentTypeError, r"'<lambda>' returned an array of shape \(3,\); expected one number"),
    ):
        with pytest.raises(error, match=words):
            engine.fit(X, y, epochs=1, validation_data=(Xv, yv), metrics=wrong)
    with pytest.raises(ArgumentError, match="metrics: <lambda> is not defined on these 50 validation rows"):
        engine.fit(X, y, epochs=1, validation_data=(Xv, yv), metrics=[lambda t, y: math.nan])


def accuracy(targets, outputs):
    return 1.0


def test_a_metric_says_whether_it_rises():
    X, y, Xv, yv = DIABETES
    falls = Metric("gap", False, ("numbers",), lambda rows: float(np.abs(rows.truth - rows.predicted).max()))
    rising = Metric("closeness", True, ("numbers",), lambda rows: -falls.of(rows))
    engine = Engine(MLP([10, 8, 1]), "mse", Adam(0.1), backend="numpy")
    for metric in (falls, rising):
        monitor = f"val_{metric.name}"
        history = engine.fit(X, y, epochs=20, validation_data=(Xv, yv), metrics=[metric], monitor=monitor)
        assert history.best_epoch == history.epochs[int(np.argmin(np.abs(history.history[monitor])))]
