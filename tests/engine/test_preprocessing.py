"""Splits, scaling, encoding of labels, and their storage in the run folder."""

import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.model_selection import KFold, train_test_split

from fusemlp.datasets.cells import CLIP, SCALES
from fusemlp.datasets.load import Dataset, load_data
from fusemlp.datasets.preprocessing import Preprocessor, split
from fusemlp.datasets.rows import FOLDS, folds
from fusemlp_kernels.errors import ArgumentError, ArgumentTypeError, CheckpointError, DataError, ShapeError


def dataset(X, y, task="classification", **options):
    X = np.asarray(X, np.float64)
    names = tuple(f"c{index}" for index in range(X.shape[1]))
    return Dataset("made", X, np.asarray(y), task, names, **options)


def numbers(y, task, **options):
    made = dataset(np.zeros((len(y), 1)), y, task)
    return Preprocessor.fit(made, np.arange(len(y)), **options)


# splits

TENS = np.arange(20) % 10


@pytest.mark.parametrize("stratify", [True, False])
def test_a_split_is_a_partition_and_a_function_of_the_seed(stratify):
    y = np.arange(103) % 4
    train, test = split(y, seed=3, stratify=stratify)
    assert sorted([*train, *test]) == list(range(103))
    assert len(test) == math.ceil(0.2 * 103)
    again = split(y, seed=3, stratify=stratify)
    np.testing.assert_array_equal(train, again[0])
    np.testing.assert_array_equal(test, again[1])
    assert not np.array_equal(test, split(y, seed=4, stratify=stratify)[1])
    assert len(split(y, seed=2**70, stratify=stratify)[0]) == len(train)


@pytest.mark.parametrize("seed", [0, 2**33 + 5])
@pytest.mark.parametrize("count", [10, 1003])
def test_rows_without_classes_are_drawn_as_scikit_learn_draws_them(count, seed):
    y, state = np.arange(count) / 2, {"random_state": seed % 2**32}
    for fraction in (0.2, 0.37):
        parts = split(y, fraction=fraction, seed=seed, stratify=False)
        expected = train_test_split(np.arange(count), test_size=math.ceil(fraction * count), **state)
        for rows, right in zip(parts, expected, strict=True):
            np.testing.assert_array_equal(rows, right)
    for models in (2, 7):
        cut = list(KFold(max(models, FOLDS), shuffle=True, **state).split(y))[:models]
        for fold, right in zip(folds(y, models, seed=seed, stratify=False), cut, strict=True):
            np.testing.assert_array_equal(np.concatenate(fold), np.concatenate(right))


def test_a_stratified_split_keeps_the_shares():
    y = np.repeat(["a", "b", "c"], [50, 30, 20])
    train, test = split(y, fraction=0.3, seed=0, stratify=True)
    assert np.unique(y[test], return_counts=True)[1].tolist() == [15, 9, 6]
    assert np.unique(y[train], return_counts=True)[1].tolist() == [35, 21, 14]


def test_a_class_with_a_single_row_is_trained():
    y = np.array(["rare", *["a", "b"] * 10])
    with pytest.warns(UserWarning, match="single row, which is not held out: 'rare'"):
        train, test = split(y, seed=0, stratify=True)
    assert 0 in train
    assert len(train) + len(test) == 21
    assert set(y[test]) == {"a", "b"}


@pytest.mark.parametrize(
    ("y", "options", "error", "said"),
    [
        (TENS, {}, DataError, r"0.2 of 20 rows leaves 16 .* 4 held out; each side needs at least 10, one for"),
        ([*"aabbc"], {}, DataError, r"0.2 of 4 rows \(1 more are alone in their class\) leaves 3 .* at least 2"),
        ([0], {"stratify": False}, DataError, "leaves 0 rows to train on"),
        ([], {"stratify": False}, DataError, r"0 of|leaves 0"),
        (TENS, {"fraction": 1, "stratify": False}, ArgumentError, r"fraction: .*below 1, got 1"),
        (TENS, {"seed": 0.5, "stratify": False}, ArgumentTypeError, "seed"),
    ],
)
def test_splits_that_cannot_be(y, options, error, said):
    with pytest.raises(error, match=said):
        split(np.array(y), **{"seed": 0, "stratify": True, **options})
    assert len(split(TENS, fraction=0.5, seed=0, stratify=True)[1]) == 10


# features


def test_standard_scaling_uses_the_training_rows_alone():
    X = np.array([[1.0, 10.0], [3.0, 10.0], [5.0, 10.0], [1e6, -7.0]])
    made = Preprocessor.fit(dataset(X, [0, 1, 0, 1]), [0, 1, 2])
    scaled = made.transform_features(X)
    # Mean 3, variance 8 / 3; the second column is constant in the training rows: shifted, not divided.
    expected = np.column_stack([(X[:, 0] - 3) / math.sqrt(8 / 3), X[:, 1] - 10])
    np.testing.assert_allclose(scaled, expected, rtol=8 * np.finfo(float).eps)


def test_minmax_and_no_scaling():
    X = np.array([[1.0, 4.0], [3.0, 4.0], [5.0, 4.0]])
    for scale, expected in (("minmax", [[0, 0], [0.5, 0], [1, 0]]), ("none", X)):
        made = Preprocessor.fit(dataset(X, [0, 1, 0]), [0, 1, 2], scale=scale)
        np.testing.assert_array_equal(made.transform_features(X), expected)


def test_robust_scaling_by_median_and_quartiles():
    # Quartiles 1, 2 and 3; the second column's are equal, so half of its range divides; the third is constant.
    X = np.array([[0.0, 7.0, 4.0], [1.0, 7.0, 4.0], [2.0, 7.0, 4.0], [3.0, 7.0, 4.0], [4.0, 9.0, 4.0]])
    made = Preprocessor.fit(dataset(X, [0, 1, 0, 1, 0]), np.arange(5), scale="robust")
    assert made.feature_shift == (2.0, 7.0, 4.0)
    assert made.feature_scale == (2.0, 1.0, 1.0)
    plain = (X - np.array(made.feature_shift)) / np.array(made.feature_scale)
    tails = 3 * np.log(np.abs(plain) / 3 + np.sqrt((plain / 3) ** 2 + 1)) * np.sign(plain)
    np.testing.assert_allclose(
        made.transform_features(X), tails / np.sqrt(1 + (tails / 10) ** 2), rtol=0, atol=32 * np.finfo(float).eps
    )


def test_far_values_keep_their_order_and_a_bound():
    made = Preprocessor.fit(dataset([[0.0], [1.0], [2.0]], [0, 1, 0]), [0, 1, 2], scale="robust")
    far = made.transform_features([[-1e308], [30.0], [300.0], [3e4], [1e308]])[:, 0]
    assert (np.diff(far) > 0).all() and np.abs(far).max() <= CLIP
    # A value of 300 interquartile ranges is told from one of 30.
    assert far[2] - far[1] > 1


def test_quantiles_become_normal_scores():
    generator = np.random.default_rng(0)
    X = np.column_stack([np.exp(3 * generator.normal(size=4000)), generator.integers(0, 2, 4000)])
    made = Preprocessor.fit(dataset(X, X[:, 1].astype(int)), np.arange(4000), scale="quantile")
    scores = made.transform_features(X)
    # The outermost of 128 quantiles bound the scores: ndtri(1 - 1 / 256) is 2.66.
    assert np.abs(scores).max() < 2.67
    assert abs(scores[:, 0].mean()) < 0.01 and abs(scores[:, 0].std() - 1) < 0.02
    order = np.argsort(X[:, 0])
    assert (np.diff(scores[order, 0]) >= 0).all()
    # Equal values have equal scores.
    assert len(np.unique(scores[:, 1])) == 2
    assert Preprocessor.from_json(made.to_json()) == made


def test_numbers_become_inputs_of_pieces():
    generator = np.random.default_rng(0)
    X = np.column_stack([np.exp(generator.normal(size=4000)), generator.integers(0, 3, 4000)])
    X[::9, 0] = np.nan
    data = dataset(X, X[:, 1].astype(int))
    made = Preprocessor.fit(data, np.arange(4000), scale="piecewise")
    # 16 pieces and a mark for missing cells; a column of three values is scaled.
    assert made.widths == (17, 1) and made.width == 18
    # the mark and the number beside it are one column of numbers
    assert made.coding.columns == (("pieces", 16, 0), ("numbers", 2, 0))
    edges = np.array(made.feature_knots[0][0])
    median = np.nanmedian(X[:, 0])
    np.testing.assert_allclose(edges, np.quantile(np.where(np.isnan(X[:, 0]), median, X[:, 0]), np.arange(17) / 16))
    inputs = made.transform_features(X)
    # The pieces add up to the value, each to a sixteenth of the rows.
    filled = np.isnan(X[:, 0])
    np.testing.assert_array_equal(inputs[:, 16], filled)
    np.testing.assert_allclose(edges[0] + inputs[:, :16] @ np.diff(edges), np.where(filled, median, X[:, 0]))
    assert (inputs[:, :16] >= 0).all() and (inputs[:, :16] <= 1).all()
    robust = Preprocessor.fit(data, np.arange(4000), scale="robust").transform_features(X)
    np.testing.assert_array_equal(inputs[:, 17], robust[:, -1])
    # Beyond the outer edges the straight lines go on, twice their pieces' width.
    inner = (edges[0] + edges[1]) / 2
    rows = [[edges[0] - 1e-3, 0], [inner, 0], [edges[-1] + (edges[16] - edges[15]), 0], [1e308, 0], [-1e308, 0]]
    far = made.transform_features(rows)[:, :16]
    assert -2 < far[0, 0] < 0 and far[1, 0] == pytest.approx(0.5) and (far[:2, 1:] == 0).all()
    assert far[2, 15] == pytest.approx(2.0) and far[3, 15] == 3.0 and far[4, 0] == -2.0
    assert Preprocessor.from_json(made.to_json()) == made


def test_many_rows_have_finer_pieces():
    generator = np.random.default_rng(0)
    X = np.column_stack([generator.normal(size=8000), generator.integers(0, 31, 8000), generator.integers(0, 70, 8000)])
    made = Preprocessor.fit(dataset(X, X[:, 1].astype(int)), np.arange(8000), scale="piecewise")
    smooth, days, minutes = (knots[0] for knots in made.feature_knots if knots is not None)
    np.testing.assert_allclose(smooth, np.quantile(X[:, 0], np.arange(33) / 32))
    # Up to 64 values have an edge each, so that a network can tell any of them from its neighbours.
    assert days == tuple(range(31)) and len(minutes) == 33
    fewer = Preprocessor.fit(dataset(X, X[:, 1].astype(int)), np.arange(7999), scale="piecewise")
    assert fewer.widths == (16, 16, 16)


def test_words_become_one_column_a_category():
    data = dataset([[0, 5.0], [2, 7.0], [1, 9.0]], [0, 1, 0], categories=(("g", "r", "y"), None))
    made = Preprocessor.fit(data, [0, 1, 2], scale="minmax")
    assert made.width == 4
    assert made.transform_features(data.X).tolist() == [[1, 0, 0, 0], [0, 0, 1, 0.5], [0, 1, 0, 1]]
    with pytest.raises(DataError, match=r"3.0 at row 0, column 0.*3 categories of 'c0'"):
        made.transform_features([[3, 5]])


def test_features_are_not_written():
    X = np.arange(6.0).reshape(3, 2)
    X.flags.writeable = False
    data = dataset(X, [0, 1, 0])
    data.X.flags.writeable = False
    Preprocessor.fit(data, [0, 1, 2]).transform_features(X)
    assert X.tolist() == [[0, 1], [2, 3], [4, 5]]


@pytest.mark.parametrize("scale", ["robust", "standard", "minmax"])
def test_values_too_large_to_scale(scale):
    X = [[1.7e308], [-1.7e308], [1.7e308]]
    with pytest.raises(DataError, match=r"'c0' are too large to be scaled \(up to 1.7e\+308\)"):
        Preprocessor.fit(dataset(X, [0, 1, 0]), [0, 1, 2], scale=scale)


def test_wrong_fits():
    with pytest.raises(ArgumentError, match=r"scale: unknown name 'standart'; did you mean 'standard'"):
        numbers([0, 1], "classification", scale="standart")
    with pytest.raises(DataError, match="no training rows of made"):
        Preprocessor.fit(dataset([[1.0]], [0]), [])
    with pytest.raises(ShapeError, match="expected 1 column"):
        numbers([0, 1], "classification").transform_features(np.ones((2, 3)))


# targets


LABELS = [["b", "a", "c", "a"], [3, -1, 3, 7], [1.0, 0.5, 2.0, 1.0], [True, False, True, True]]


@pytest.mark.parametrize("labels", LABELS, ids=["str", "int", "float", "bool"])
def test_labels_there_and_back(labels):
    made = Preprocessor.from_json(numbers(labels, "classification").to_json())
    codes = made.encode_targets(np.array(labels))
    assert codes.dtype == np.int64
    assert codes.tolist() == [sorted(set(labels)).index(label) for label in labels]
    decoded = made.decode_predictions(codes)
    assert decoded.dtype == np.array(labels).dtype
    assert decoded.tolist() == labels
    assert made.outputs == len(set(labels))
    assert made.labels == tuple(str(label) for label in sorted(set(labels)))


def test_class_names_are_the_words_of_reports_and_a_regression_has_none():
    names = ("setosa", "versicolor", "virginica")
    for task, labels in (("classification", names), ("regression", ())):
        assert Preprocessor.fit(load_data("iris", task=task), np.arange(150)).labels == labels


def test_one_hot_targets():
    made = numbers(["b", "a", "b"], "classification", one_hot_targets=True)
    assert made.encode_targets(["b", "a"]).tolist() == [[0, 1], [1, 0]]
    assert numbers([1.5, 2.5], "regression", one_hot_targets=True).one_hot_targets is False


def test_labels_are_found_by_their_text():
    for classes, labels, codes in (
        (["1", "2", "x"], [2, 1], [1, 0]),
        ([1, 2], ["2", "1"], [1, 0]),
        ([1, 2], [2.0, 1.0], [1, 0]),
        ([False, True], ["True", "False"], [1, 0]),
        (["a", "b"], np.array(["b"], object), [1]),
    ):
        assert numbers(classes, "classification").encode_targets(labels).tolist() == codes


def test_labels_that_were_not_trained():
    made = numbers(["a", "b"], "classification")
    unknown = r"the label 'z' in row 2 is not one of the 2 classes .*'a', 'b'"
    for call, labels, error, said in (
        (made.encode_targets, ["a", "b", "z"], DataError, unknown),
        (numbers([0, 1], "classification").encode_targets, [0.0, math.nan], DataError, "the label nan in row 1"),
        (made.encode_targets, np.eye(2), ShapeError, r"one label a row, got shape \(2, 2\)"),
        (made.decode_predictions, [2], DataError, "label 2 at row 0 is not one of the 2 classes"),
        (made.decode_predictions, [-1], DataError, "label -1 at row 0"),
    ):
        with pytest.raises(error, match=said):
            call(labels)


def test_classes_are_those_of_all_rows():
    X = np.zeros((3, 1))
    made = Preprocessor.fit(dataset(X, ["a", "b", "c"], test=(X[:1], np.array(["d"]))), [0])
    assert made.classes == ("a", "b", "c", "d")


def test_regression_targets_are_scaled_and_restored():
    y = np.array([10.0, 20.0, 60.0, 1e9])
    made = Preprocessor.fit(dataset(np.zeros((4, 1)), y, "regression"), [0, 1, 2])
    encoded = made.encode_targets(y)
    assert encoded.shape == (4, 1)
    eps = np.finfo(float).eps
    assert abs(encoded[:3].mean()) <= 4 * eps
    assert encoded[:3].std() == pytest.approx(1, rel=4 * eps)
    # A root mean square error in scaled units times target_scale is one in original units.
    assert made.target_scale[0] == pytest.approx(y[:3].std(), rel=4 * eps)
    restored = made.decode_predictions(encoded)
    assert restored.shape == (4,)
    np.testing.assert_allclose(restored, y, rtol=8 * eps)
    assert made.classes is None
    assert made.labels == ()


def test_regression_targets_in_several_columns_or_unscaled():
    y = np.array([[1.0, 5.0], [3.0, 5.0]])
    made = numbers(y, "regression")
    assert made.outputs == 2
    np.testing.assert_array_equal(made.encode_targets(y), [[-1, 0], [1, 0]])
    np.testing.assert_array_equal(made.decode_predictions(made.encode_targets(y)), y)
    unscaled, centred = [[3], [5]], [[-1], [1]]
    for options, expected in (
        ({"scale_targets": False}, unscaled),
        ({"scale": "none"}, unscaled),
        ({"scale": "minmax"}, [[0], [1]]),
        *(({"scale": scale}, centred) for scale in ("robust", "piecewise", "quantile")),
    ):
        assert numbers([3, 5], "regression", **options).encode_targets([3, 5]).tolist() == expected


def test_targets_in_logarithms():
    y = [1.0, 10.0, 100.0]
    made = numbers(y, "regression", log_targets=True, scale="minmax")
    np.testing.assert_allclose(made.encode_targets(y)[:, 0], [0, 0.5, 1], atol=4 * np.finfo(float).eps)
    np.testing.assert_allclose(made.decode_predictions(made.encode_targets(y)), y, rtol=16 * np.finfo(float).eps)
    # New labels may be zero or less: they count as the least of the training.
    assert made.encode_targets([-5.0])[0, 0] == 0
    with pytest.raises(DataError, match=r"log_targets: the target 'y' holds 0, and has no logarithm"):
        numbers([0.0, 1.0], "regression", log_targets=True)


# the stored form


FLOATS = st.floats(allow_nan=False, allow_infinity=False)
LABEL_SETS = st.one_of(
    st.none(), *(st.sets(kind, min_size=1) for kind in (st.text(), st.integers(), FLOATS, st.booleans()))
)


@st.composite
def preprocessors(draw):
    columns = draw(st.integers(1, 4))
    classes = draw(LABEL_SETS)
    shifts = draw(st.lists(FLOATS, min_size=1, max_size=2)) if classes is None else []

    def column_of(values):
        return tuple(draw(st.lists(values, min_size=columns, max_size=columns)))

    words = st.one_of(st.none(), st.lists(st.text(), min_size=1, max_size=3).map(tuple))
    return Preprocessor(
        task="regression" if classes is None else "classification",
        scale=draw(st.sampled_from(SCALES)),
        feature_names=column_of(st.text()),
        categories=column_of(words),
        feature_shift=column_of(FLOATS),
        feature_scale=column_of(FLOATS),
        target_name=draw(st.text()),
        classes=None if classes is None else tuple(sorted(classes)),
        class_names=None,
        target_shift=tuple(shifts),
        target_scale=tuple(reversed(shifts)),
        one_hot_targets=draw(st.booleans()),
    )


@settings(derandomize=True, deadline=None)
@given(preprocessors())
def test_the_stored_form_is_exact(made):
    for restored in (Preprocessor.from_json(made.to_json()), Preprocessor.from_config(made.to_config())):
        # repr tells 1 from 1.0 and True, and -0.0 from 0.0, which == does not.
        assert repr(restored) == repr(made)
        assert restored == made
        assert hash(restored) == hash(made)


def test_stored_forms_that_are_damaged():
    made = numbers([0, 1], "classification")
    config = made.to_config()
    for text, said in (
        (made.to_json()[:-5], r"expected JSON, got .*task"),
        ("[1]", "does not fit"),
        (json.dumps({name: value for name, value in config.items() if name != "scale"}), "scale"),
        (json.dumps({**config, "feature_shift": []}), "differ in length"),
    ):
        with pytest.raises(CheckpointError, match=said):
            Preprocessor.from_json(text)
