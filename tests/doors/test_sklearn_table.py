"""TableClassifier and TableRegressor: scikit-learn's checks and tools, tables of any kind, the same models as train."""

import logging
import os
import signal
import warnings
from dataclasses import fields

import numpy as np
import onnxruntime
import pandas
import pyarrow
import pytest
from sklearn.base import clone
from sklearn.exceptions import NotFittedError
from sklearn.model_selection import GridSearchCV, cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import FunctionTransformer
from sklearn.utils.estimator_checks import parametrize_with_checks

import fusemlp
from fusemlp import ArgumentError, DataError, Huber
from fusemlp.cli.options import TrainOptions
from fusemlp.datasets.load import ColumnChoices, load_data
from fusemlp.sklearn import TableClassifier, TableRegressor
from fusemlp.sklearn.table_rows import form_of
from fusemlp.tables.defaults import filled_in, models_of
from fusemlp.tables.recipe import TableRecipe
from make import QUICK, assert_same, run

# The checks that fail, with the reason.
REASON = "a row twice is in two batches, a row of weight 2 in one"
EXPECTED = {"check_sample_weight_equivalence_on_dense_data": REASON}
NUMPY = {"backend": "numpy"}


@parametrize_with_checks(
    [TableClassifier(**NUMPY), TableRegressor(**NUMPY)], expected_failed_checks=lambda estimator: EXPECTED
)
def test_scikit_learns_checks(estimator, check):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        check(estimator)


def mixed(n=120, seed=0):
    """Return a table of words, numbers, days, truth values and a row number, with missing cells, a label, a number."""
    generator = np.random.default_rng(seed)
    size = generator.normal(size=n)
    colour = generator.choice(["red", "green", "blue"], n).astype(object)
    size[generator.random(n) < 0.1] = np.nan
    y = np.where((colour == "red") | (np.nan_to_num(size) > 0.5), "yes", "no")
    values = 1e4 + 300 * np.nan_to_num(size) + 200 * (colour == "red")
    colour[generator.random(n) < 0.1] = None
    day = pandas.Timestamp("2024-01-01") + pandas.to_timedelta(generator.integers(0, 700, n), unit="D")
    new = generator.random(n) < 0.5
    return pandas.DataFrame({"colour": colour, "size": size, "day": day, "new": new, "id": np.arange(n)}), y, values


X, Y, VALUES = mixed()
NEW, _, _ = mixed(20, seed=1)
NEW.loc[[0, 1], "colour"] = "violet"
# every type of numbers holds them
NUMBERS = np.random.default_rng(3).integers(0, 5, (120, 3)).astype(float)


def classifier(**options):
    return TableClassifier(**{"hidden": (8,), "epochs": 30, "lr": 0.02, "models": 1, **NUMPY, **options})


def regressor(**options):
    return TableRegressor(**{"hidden": (8,), "epochs": 60, "lr": 0.02, "models": 1, **NUMPY, **options})


@pytest.fixture(scope="module")
def fitted():
    return classifier().fit(X, Y)


def test_a_classifier_is_scored_on_the_rows_that_have_a_label(fitted):
    labels, weights = Y.astype(object), np.arange(1.0, len(Y) + 1)
    labels[::5] = None
    there = np.arange(len(Y)) % 5 > 0
    expected = np.average(fitted.predict(X)[there] == Y[there], weights=weights[there])
    assert fitted.score(X, labels, weights) == pytest.approx(expected, rel=1e-12)
    assert fitted.score(X, Y) == np.mean(fitted.predict(X) == Y)
    with pytest.raises(DataError, match="y: the target is missing in all 3 rows"):
        fitted.score(X[:3], [None, None, None])
    for count in (len(Y) - 1, len(Y) + 1):
        with pytest.raises(ValueError, match=r"sample_weight.shape"):
            fitted.score(X, labels, np.ones(count))


def test_a_mixed_table(fitted):
    assert fitted.score(X, Y) > 0.9
    assert fitted.classes_.tolist() == ["no", "yes"]
    assert set(fitted.predict(NEW)) <= {"no", "yes"}
    shares = fitted.predict_proba(NEW)
    assert shares.shape == (20, 2)
    np.testing.assert_allclose(shares.sum(axis=1), 1.0, rtol=1e-6)
    assert fitted.feature_names_in_.tolist() == list(X)
    assert fitted.n_features_in_ == 5
    assert fitted.n_iter_ == len(fitted.history_.history["val_loss"])
    assert fitted.notes_[0] == "left out, unless you --keep them: 'id' (counts the rows)"
    assert any("'day' (as 2024-12-31)" in note for note in fitted.notes_)
    numbers = regressor().fit(X, VALUES)
    assert numbers.score(X, VALUES) > 0.9
    assert numbers.predict(NEW).shape == (20,)


def test_several_targets_and_one_hot_losses():
    both = np.column_stack([VALUES, -VALUES])
    assert regressor(loss=Huber(2.0)).fit(X, both).predict(NEW).shape == (20, 2)
    squares = classifier(loss="mse").fit(X, Y)
    assert squares.score(X, Y) > 0.8
    assert not hasattr(squares, "predict_proba")
    binary = classifier(loss="binary_cross_entropy").fit(X, Y)
    assert binary.engine_.network.sizes[-1] == 1
    assert binary.predict_proba(NEW).shape == (20, 2)


KINDS = {
    "arrow": pyarrow.Table.from_pandas,
    "polars": lambda frame: pytest.importorskip("polars").from_arrow(pyarrow.Table.from_pandas(frame)),
    "categorical": lambda frame: frame.astype({"colour": "category"}),
    "nullable": lambda frame: frame.convert_dtypes(),
    "reordered": lambda frame: frame.assign(other=1.0)[["other", *reversed(list(frame))]],
}


@pytest.mark.parametrize("kind", KINDS)
def test_tables_of_other_libraries_and_orders_are_one_table(kind, fitted):
    expected = fitted.predict_proba(NEW)
    np.testing.assert_array_equal(fitted.predict_proba(KINDS[kind](NEW)), expected)
    if kind != "reordered":
        again = clone(fitted).fit(KINDS[kind](X), Y)
        assert again.feature_names_in_.tolist() == list(X)
        np.testing.assert_array_equal(again.predict_proba(NEW), expected)


def test_arrays_and_lists():
    columns = ["colour", "size", "new"]
    objects = X[columns].to_numpy(object)
    named = classifier().fit(X[columns], Y)
    plain = classifier().fit(objects, Y)
    expected = named.predict_proba(NEW[columns])
    np.testing.assert_array_equal(plain.predict_proba(NEW[columns].to_numpy(object)), expected)
    np.testing.assert_array_equal(plain.predict_proba(NEW[columns].to_numpy(object).tolist()), expected)
    assert plain.preprocessor_.feature_names == ("x0", "x1", "x2")
    # An array has no names, and scikit-learn says so.
    with pytest.warns(UserWarning, match="X does not have valid feature names"):
        np.testing.assert_array_equal(named.predict_proba(NEW[columns].to_numpy(object)), expected)
    lists = [["a", 1.5, None], ["b", 2, 3.0]] * 10
    assert classifier().fit(lists, [0, 1] * 10).preprocessor_.categories == (("a", "b"), None, None)
    both = np.array([["a", 1], [2, 3], [None, 4]] * 10, object)
    for table in (both, pandas.DataFrame(both)):
        assert classifier().fit(table, [0, 1, 2] * 10).preprocessor_.categories == (("", "2", "a"), None)
    texts = np.array([["a", "1.5"], ["b", "NA"], ["a", "3"]] * 10)
    assert classifier().fit(texts, [0, 1, 0] * 10).preprocessor_.categories == (("a", "b"), None)


def test_arrays_of_numbers_as_programs_store_them():
    """Arrow has no numbers of another order of bytes, which became words, and masks were not looked at."""
    expected = classifier().fit(NUMBERS, Y).predict_proba(NUMBERS)
    for dtype in (">f8", ">i4", np.longdouble, np.float16):
        for kind in (np.asarray, pandas.DataFrame):
            table = kind(NUMBERS.astype(dtype))
            np.testing.assert_array_equal(classifier().fit(table, Y).predict_proba(table), expected)
    mask = np.random.default_rng(0).random(NUMBERS.shape) < 0.2
    holes, labels = np.where(mask, np.nan, NUMBERS), np.where(mask[:, 0], None, Y)
    masked = classifier().fit(np.ma.array(NUMBERS, mask=mask), np.ma.array(Y, mask=mask[:, 0]))
    assert_same(masked.predict_proba(NUMBERS), classifier().fit(holes, labels).predict_proba(NUMBERS))
    assert "left out" in masked.notes_[0]
    days = np.datetime64("2024-01-01", "ns") + np.arange(120)[:, None] * np.timedelta64(1, "D")
    assert "dates" in classifier().fit(np.ma.array(days, mask=mask[:, :1]), Y).notes_[0]


def test_a_column_may_have_the_name_of_a_method():
    table = pandas.DataFrame(NUMBERS, columns=["to_frame", "collect", "c"])
    assert classifier().fit(table, Y).preprocessor_.feature_names == ("to_frame", "collect", "c")


def test_columns_are_chosen():
    made = classifier(drop="day", keep=["id"], categorical=["new"]).fit(X, Y).preprocessor_
    assert made.feature_names == ("colour", "size", "new", "id")
    assert made.categories[2] == ("False", "True")
    for option, words in (("drop", "drop"), ("keep", "keep"), ("categorical", "take as words")):
        with pytest.raises(DataError, match=rf"no columns 'height' to {words}; the columns are 'colour'"):
            classifier(**{option: ["height"]}).fit(X, Y)


def test_words_that_stand_for_missing_cells(tmp_path):
    marked = X.assign(size=X["size"].fillna(-999), colour=X["colour"].fillna("unknown"))
    model = classifier(missing=("unknown", -999)).fit(marked, Y)
    np.testing.assert_array_equal(model.predict_proba(marked), classifier().fit(X, Y).predict_proba(X))
    assert [form_of(classifier(missing=one)).missing for one in (-999, 0, None)] == [["-999"], ["0"], []]
    marked.assign(y=Y).to_csv(tmp_path / "a.csv", index=False)
    given = "--missing", "unknown", "--missing", "-999"
    assert run("train", tmp_path / "a.csv", "--target", "y", *given, *QUICK, "--out", tmp_path / "run") == 0
    opened = TableClassifier.from_run(tmp_path / "run")
    np.testing.assert_array_equal(opened.predict_proba(marked), opened.predict_proba(X))
    further = TableClassifier(transfer_from=tmp_path / "run", epochs=2)
    later, bare = (clone(further).fit(table, Y) for table in (marked, X))
    np.testing.assert_array_equal(later.predict_proba(marked), bare.predict_proba(X))
    assert opened.missing == later.preprocessor_.missing_words == ("unknown", "-999")


def test_a_group_is_no_input():
    grouped = classifier(group="new").fit(X, Y)
    np.testing.assert_array_equal(grouped.predict(NEW.drop(columns="new")), grouped.predict(NEW))


def test_whole_numbers_as_words_stay_so_beside_missing_ones():
    codes = pandas.DataFrame({"zip": [8001, 8002, 8003] * 20, "size": np.arange(60.0) ** 2})
    made = classifier(categorical=["zip"]).fit(codes, [0, 1, 2] * 20)
    with_gap = pandas.DataFrame({"zip": [8001, None, 8003], "size": [1.0, 4.0, 9.0]})
    assert with_gap["zip"].dtype == float
    assert made.predict(with_gap)[[0, 2]].tolist() == made.predict(codes)[[0, 2]].tolist()


def test_scikit_learns_tools():
    assert cross_val_score(classifier(), X, Y, cv=3).mean() > 0.7
    search = GridSearchCV(classifier(), {"hidden": [(), (8,)], "loss": [None, "mse"]}, cv=2).fit(X, Y)
    assert search.best_params_.keys() == {"hidden", "loss"}
    without = FunctionTransformer(lambda frame: frame.drop(columns="id"), feature_names_out=None)
    assert make_pipeline(without, classifier()).fit(X, Y).score(X, Y) > 0.9
    estimator = classifier(loss=Huber(0.3), random_state=7)
    assert clone(estimator).get_params() == estimator.get_params()
    assert estimator.set_params(hidden=(3, 2)).hidden == (3, 2)
    with pytest.raises(NotFittedError):
        classifier().predict(X)


def test_a_graph_of_the_estimator(fitted, tmp_path):
    fitted.to_onnx(tmp_path / "model.onnx")
    session = onnxruntime.InferenceSession(str(tmp_path / "model.onnx"))
    day = NEW["day"]
    given = {
        "colour": NEW["colour"].fillna(""),
        "size": NEW["size"],
        "day: year": day.dt.year,
        "day: month": day.dt.month,
        "day: day": day.dt.day,
        "day: weekday": day.dt.day_of_week,
        "day: elapsed days": (day - pandas.Timestamp("1970-01-01")).dt.days,
        "new": NEW["new"],
    }
    assert [one.name for one in session.get_inputs()] == list(given)
    types = {one.name: object if one.type == "tensor(string)" else np.float32 for one in session.get_inputs()}
    fed = {name: np.asarray(column).reshape(-1, 1).astype(types[name]) for name, column in given.items()}
    labels, shares = session.run(["prediction", "probabilities"], fed)
    np.testing.assert_allclose(shares, fitted.predict_proba(NEW), atol=1e-5)
    assert labels.tolist() == fitted.predict(NEW).tolist()


def test_defaults_are_those_of_the_command_line():
    options, recipe = TrainOptions(data="x.csv", dropout=0.0, test_fraction=0.0), TableClassifier()._recipe()
    options = filled_in(options, table=True, validates=True)
    assert recipe == TableRecipe(**{field.name: getattr(options, field.name) for field in fields(TableRecipe)})


@pytest.mark.parametrize(
    ("rows", "options", "expected"),
    [
        (39, {}, 1),
        (40, {}, 5),
        (100_000, {"activation": ("relu", "tanh"), "hidden": (8, 8)}, 5),
        (100_001, {}, 1),
        (40, {"activation": "prelu"}, 1),
        (40, {"norm": "layer"}, 1),
        (40, {"callbacks": [fusemlp.Callback()]}, 1),
        (10, {"models": 3}, 3),
    ],
)
def test_tables_of_a_middling_size_train_five_models(rows, options, expected):
    values = np.arange(rows)
    dataset = load_data(pandas.DataFrame({"a": values, "y": values}), target="y", columns=ColumnChoices(keep=["a"]))
    assert models_of(TableRegressor(**options)._recipe(), dataset, "", [], new=True) == expected


def test_several_models_validate_on_folds_or_on_the_rows_of_the_caller():
    for options, rows in (({"models": 3}, {}), ({"models": 2}, {"X_val": NEW, "y_val": ["yes", "no"] * 10})):
        model = classifier(**options, epochs=5).fit(X, Y, **rows)
        assert "val_loss" in model.history_.history and model.predict_proba(NEW).shape == (len(NEW), 2)
    with pytest.raises(ArgumentError, match=r"^callbacks: they see the epochs of one model"):
        classifier(models=2, callbacks=[fusemlp.Callback()]).fit(X, Y)
    with pytest.raises(DataError, match=r"^models: 9 need 9 folds of the training rows, and these are 4"):
        classifier(models=9).fit(X.iloc[:4], ["yes", "no"] * 2)


def test_early_stopping_holds_rows_out():
    noise = np.random.default_rng(0).integers(0, 2, len(X))
    stopped = classifier(epochs=200, early_stopping=4).fit(X, noise)
    losses = stopped.history_.history["val_loss"]
    assert len(losses) == int(np.argmin(losses)) + 5
    assert f"the weights of epoch {np.argmin(losses) + 1} were restored" in stopped.history_.stopped
    assert "val_loss" not in classifier(early_stopping=None).fit(X, Y).history_.history
    few = classifier().fit(X.iloc[:4], ["yes", "no"] * 2)
    assert few.notes_[-1].startswith("no rows held out for early stopping: 0.1 of 4 rows leaves 3")


def test_weights_of_rows_and_classes():
    weight = np.where(Y == "yes", 3.0, 1.0)
    by_rows = classifier().fit(X, Y, sample_weight=weight)
    by_class = classifier(class_weight={"yes": 3.0, "no": 1.0}).fit(X, Y)
    np.testing.assert_array_equal(by_rows.predict_proba(NEW), by_class.predict_proba(NEW))
    # Rows to watch have the weights of their classes too, those of all rows.
    shares = {label: len(Y) / (2 * (label == Y).sum()) for label in ("yes", "no")}
    watched = {"X_val": NEW, "y_val": ["yes"] * 20}
    balanced, told = (classifier(class_weight=given).fit(X, Y, **watched) for given in ("balanced", shares))
    assert balanced.history_.history["val_loss"] == told.history_.history["val_loss"]
    with pytest.raises(DataError, match="y_val: 'maybe' is no label of y"):
        classifier(class_weight="balanced").fit(X, Y, X_val=NEW, y_val=["maybe"] * 20)


def test_ctrl_c_keeps_what_was_learned():
    class Interrupt(fusemlp.Callback):
        def on_epoch_end(self, engine, epoch, logs):
            if epoch == 3:
                os.kill(os.getpid(), signal.SIGINT)

    with pytest.warns(UserWarning, match=r"Training interrupted by user\."):
        model = classifier(callbacks=[Interrupt()]).fit(X, Y)
    assert model.n_iter_ == 4
    assert model.predict(NEW).shape == (20,)


def test_what_predict_fills_in_is_logged(fitted, caplog):
    with caplog.at_level(logging.INFO, "fusemlp.sklearn"):
        fitted.predict(NEW)
    said = "words unseen in training, taken as one other category: 2 in 'colour'"
    assert any(said in line for line in caplog.messages)


# The estimator, the arguments of fit, and a part of the error.
WRONG = {
    "loss of classes": (regressor(loss="cross_entropy"), (X, VALUES), "loss: 'cross_entropy' is for classes"),
    "binary of three": (
        classifier(loss="binary_cross_entropy"),
        (X, [0, 1, 2] * 40),
        "loss: 'binary_cross_entropy' is for two classes, and the target has 3",
    ),
    "metric": (classifier(metric="areas"), (X, Y), "metric: .*'areas'"),
    "one class": (classifier(), (X, ["a"] * 120), "target: 'y' is 'a' in all rows, which is one class"),
    "a lazy frame": (classifier(), (type("Lazy", (), {"collect": X.copy})(), Y), "got Lazy; .*collect"),
    "complex numbers": (classifier(), (X.assign(size=1j), Y), "'size' has complex numbers"),
    "no rows": (classifier(), (X[:0], Y[:0]), "y: the target is missing in all 0 rows"),
    "no label": (classifier(), (X, [None] * 120), "y: the target is missing in all 120 rows"),
    "weights of zero": (classifier(), (X, Y, np.zeros(120)), "at least one non-zero number"),
    "a list in a cell": (classifier(), (X.assign(size=[[1]] * 120), Y), "column 'size'"),
    "objects": (classifier(), (np.array([[{}, 1]] * 120, object), Y), "X, column 'x0'"),
    "two of one name": (classifier(), (X.set_axis(["a", "a", "c", "d", "e"], axis=1), Y), "'a'"),
    "rows": (classifier(), (X, Y[:-1]), "inconsistent numbers of samples"),
    "backend": (classifier(backend=None), (X, Y), "backend: expected a name such as 'auto', got None"),
    "patience": (classifier(early_stopping="late"), (X, Y), "^early_stopping: .* or 'auto', got 'late'"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_call_says_what_is_wrong_and_changes_nothing(case):
    estimator, given, message = WRONG[case]
    before = dict(vars(estimator))
    with pytest.raises((ValueError, TypeError), match=message):
        estimator.fit(*given)
    assert vars(estimator) == before


def test_wrong_tables_to_predict(fitted):
    with pytest.raises(DataError, match=r"no feature columns 'size', 'day'; the columns are 'colour', 'new', 'id'"):
        fitted.predict(X.drop(columns=["size", "day"]))
    with pytest.raises(DataError, match=r"column 'size'"):
        fitted.predict(X.assign(size="wide"))
    with pytest.raises(ArgumentError, match="y_val: it is missing"):
        classifier().fit(X, Y, X_val=X)


@pytest.mark.parametrize("kind", [TableClassifier, TableRegressor])
def test_what_trains_on_in_scikit_learn_says_what_to_do_here(kind):
    mend = "takes old and new rows together, and transfer_from='runs/...' starts from"
    assert not hasattr(kind(), "partial_fit")
    with pytest.raises(AttributeError, match=f"no attribute 'partial_fit': .*{mend}"):
        kind().partial_fit  # noqa: B018
    with pytest.raises(TypeError, match=f"^warm_start: .*{mend}"):
        kind(warm_start=True)


def test_certified_scores_are_those_of_the_inputs():
    frame, y, values = mixed()
    model = TableClassifier(**NUMPY, epochs=5, random_state=0).fit(frame, y)
    shares = [model.certify(frame, y, eps)["accuracy"] for eps in (0.0, 0.05, 5.0)]
    assert shares[0] == pytest.approx(np.mean(model.predict(frame) == y))
    assert shares[0] >= shares[1] > shares[2]
    regressor = TableRegressor(**NUMPY, epochs=5, random_state=0).fit(frame, values)
    widths = [regressor.certify(frame, values, eps)["width"] for eps in (0.0, 0.1, 0.2)]
    assert widths[0] < 1.0 < widths[1] < widths[2]
    with pytest.raises(ArgumentError, match="eps: expected a finite number of at least 0, got -1"):
        regressor.certify(frame, values, -1)
