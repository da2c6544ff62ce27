"""Checks of arguments: accepted values, refused values, and the messages."""

import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scipy.sparse import csr_array

from fusemlp.describe import checks
from fusemlp.inputs import arrays as validation
from fusemlp_kernels.errors import ArgumentError, ArgumentTypeError, DataError, DTypeError, ShapeError


def features(value, **options):
    return validation.as_features("X", value, **{"width": 3, "dtype": np.float32, **options})


def labels(value, **options):
    return validation.as_class_labels("y", value, **{"classes": 3, "rows": 4, **options})


def values(value, **options):
    return validation.as_values("y", value, **{"width": 2, "rows": 3, "dtype": np.float32, **options})


def weights(value, **options):
    return validation.as_weights("sample_weight", value, **{"rows": 3, "dtype": np.float32, **options})


def soft(value, **options):
    return validation.as_probability_rows("y", value, **{"classes": 3, "rows": None, "dtype": np.float32, **options})


def with_value(value, dtype=np.float64):
    X = np.ones((5, 3), dtype)
    X[2, 1] = value
    return X


# Refusals beside those of the doors, in test_bad_input.py; the kinds of arrays are in test_array_likes.py.
REFUSED = [
    ("a vector of one feature", lambda: features(np.ones(7), width=1), ShapeError, r"X.reshape\(-1, 1\)"),
    ("opposite infinities", lambda: features([[math.inf, -math.inf, 0]]), DataError, r"row 0, column 0 \(and 1 more\)"),
    ("sparse", lambda: features(csr_array(np.eye(3))), ArgumentTypeError, r"X.toarray\(\)"),
    ("bfloat16", lambda: features(torch.ones(2, 3, dtype=torch.bfloat16)), ArgumentTypeError, r"\.float\(\)"),
    ("labels -1 and 1", lambda: labels([-1, 1, 1, -1]), DataError, r"give \(y \+ 1\) // 2"),
    ("huge unsigned label", lambda: labels(np.array([0, 1, 2, 2**64 - 1], "u8")), DataError, r"label 18446744073"),
    ("string objects", lambda: labels(np.array(["a"] * 4, object)), DTypeError, r"got strings"),
    ("a vector for two outputs", lambda: values([0.5, 1.5, 1.0]), ShapeError, r"2 outputs"),
    ("three-dimensional targets", lambda: values(np.ones((3, 2, 1))), ShapeError, r"y.reshape\(len\(y\), -1\)"),
    ("several epochs", lambda: checks.as_count("epochs", np.array([1, 2])), ArgumentTypeError, r"ndarray"),
    ("NaN number", lambda: checks.as_number("lr", math.nan), ArgumentError, r"a finite number, got nan"),
    ("negative", lambda: checks.as_number("lr", -1, low=0), ArgumentError, r"of at least 0, got -1"),
    ("open end", lambda: checks.as_number("p", 1, low=0, high=1, high_open=True), ArgumentError, r"and below 1"),
    ("open low", lambda: checks.as_number("eps", 0, low=0, low_open=True), ArgumentError, r"above 0, got 0"),
    ("too high", lambda: checks.as_number("p", 1.5, high=1), ArgumentError, r"at most 1, got 1.5"),
    ("a huge integer", lambda: checks.as_number("lr", 10**400), ArgumentError, r"finite"),
    ("a string", lambda: checks.as_number("lr", "0.1"), ArgumentTypeError, r"'0.1' \(str\)"),
    ("True", lambda: checks.as_number("lr", True), ArgumentTypeError, r"True \(bool\)"),
]  # fmt: skip


@pytest.mark.parametrize(("call", "error", "message"), [row[1:] for row in REFUSED], ids=[row[0] for row in REFUSED])
def test_refused(call, error, message):
    with pytest.raises(error, match=message) as caught:
        call()
    assert type(caught.value) is error


def test_fitting_input_comes_back_itself():
    X = np.ones((2, 3), np.float32)
    y = np.array([0, 1, 2, 1])
    assert features(X) is X
    assert labels(y) is y
    assert values(X[:, :2].copy(), rows=2).base is None
    X.flags.writeable = False
    assert features(X) is X


def test_the_input_is_not_written():
    X = with_value(1e39)
    with pytest.raises(DataError):
        features(X)
    np.testing.assert_array_equal(X, with_value(1e39))


def test_finite_values_with_an_infinite_sum_pass_and_others_unchecked_on_request():
    largest = np.finfo(np.float32).max
    assert features(np.full((2, 3), largest, np.float32)).max() == largest
    assert np.isnan(features(with_value(math.nan), check_finite=False)[2, 1])
    assert np.isinf(features(with_value(1e39), check_finite=False)[2, 1])


def test_labels_in_one_column_or_ignored():
    assert labels(np.array([[0], [1], [2], [0]])).shape == (4,)
    assert labels([0, -100, 2, -100.0], ignore_index=-100).tolist() == [0, -100, 2, -100]
    assert labels([0, 1, 2], rows=None).shape == (3,)
    with pytest.raises(DataError, match="label -1 at row 0"):
        labels([-1, -100, 2, 0], ignore_index=-100)


@settings(derandomize=True, deadline=None)
@given(st.data(), st.sampled_from([np.float16, np.float32, np.float64]))
def test_rows_normalised_in_any_precision_are_probabilities(data, dtype):
    shape = st.tuples(st.integers(1, 4), st.integers(2, 300))
    rows = data.draw(hnp.arrays(dtype, shape, elements=st.floats(0, 1, width=16))) + dtype(0.0625)
    rows = rows / rows.sum(axis=1, keepdims=True)
    for own in (np.float32, np.float64):
        assert soft(rows, classes=rows.shape[1], dtype=own).shape == rows.shape


def test_probabilities_are_judged_by_their_precision():
    slightly_off = np.array([[0.5, 0.5, 1e-5]])
    with pytest.raises(DataError, match="sum"):
        soft(slightly_off)
    assert soft(slightly_off.astype(np.float16)).shape == (1, 3)


@pytest.mark.parametrize("value", [1, np.int8(1), np.uint64(1), np.array(1), torch.tensor(1)])
def test_counts_of_any_integer_type(value):
    assert repr(checks.as_count("epochs", value)) == "1"


@pytest.mark.parametrize("value", [0, 0.0, np.float32(0), np.int64(0), Fraction(0)])
def test_numbers_of_any_real_type(value):
    assert repr(checks.as_number("lr", value, low=0, high=0)) == "0.0"
