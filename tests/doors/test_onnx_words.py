"""ONNX graphs that take words: one input a feature, the same answers as ``transform_features`` and the engine."""

import numpy as np
import onnx
import onnxruntime
import pandas
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import fusemlp
from fusemlp import MLP, Engine
from fusemlp.datasets.cells import SCALES, parts_of
from fusemlp.datasets.load import Dataset, coded
from fusemlp.datasets.preprocessing import Preprocessor
from fusemlp.report.onnx import onnx_bytes
from fusemlp.sklearn import TableRegressor

WORDS = st.sampled_from(["", "NA", "red", "blue", "Zürich", "a b", "?"])
# Exact in float32, so that both sides scale the same number.
NUMBERS = st.one_of(st.just(float("nan")), st.integers(-1000, 1000).map(lambda k: k / 8))


@st.composite
def tables(draw, kinds, rows, extra=()):
    """A table with a column of words for each w of ``kinds``, of numbers for each n."""
    table = {}
    for index, kind in enumerate(kinds):
        cells = st.one_of(WORDS, st.sampled_from(extra)) if kind == "w" and extra else WORDS if kind == "w" else NUMBERS
        values = draw(st.lists(cells, min_size=rows, max_size=rows))
        table[f"{kind}{index}"] = np.array(values, object if kind == "w" else np.float64)
    return table


def fitted(table, **options):
    """Return the preprocessor of the rows but the last two, whose words are known and may be rare."""
    names = tuple(table)
    X, categories = coded(table, names, None, [])
    y = np.arange(len(X)) % 3
    dataset = Dataset("made", X, y, "classification", names, categories=categories)
    return Preprocessor.fit(dataset, np.arange(len(X) - 2), **options)


def session_of(engine, made):
    content = onnx_bytes(engine, made)
    onnx.checker.check_model(onnx.load_from_string(content), full_check=True)
    return onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])


def fed(table, real):
    columns = {name: column.reshape(-1, 1) for name, column in table.items()}
    return {name: column if column.dtype == object else column.astype(real) for name, column in columns.items()}


@settings(derandomize=True, deadline=None, max_examples=60)
@given(st.data(), st.sampled_from(["w", "wn", "nw", "wnnw", "ww"]), st.sampled_from(SCALES))
def test_the_graph_answers_as_predict_for_missing_and_unseen_cells(data, kinds, scale):
    training = data.draw(tables(kinds, 12))
    new = data.draw(tables(kinds, 5, ("green", "red ", "N/A")))
    made = fitted(training, scale=scale)
    if not made.width:
        return
    engine = Engine(MLP([made.width, 5, 3]), backend="numpy", precision="fp64")
    inputs = made.transform_features(coded(new, made.feature_names, made, [])[0])
    session = session_of(engine, made)
    assert [(one.name, one.shape) for one in session.get_inputs()] == [(name, ["rows", 1]) for name in training]
    logits, labels = session.run(["logits", "prediction"], fed(new, np.float64))
    expected = engine.predict_proba(inputs)
    shares = np.exp(logits - logits.max(axis=1, keepdims=True))
    np.testing.assert_allclose(shares / shares.sum(axis=1, keepdims=True), expected, rtol=1e-9, atol=1e-12)
    # rounding decides between classes as probable as each other: an input at the median may be all zeros
    second, first = np.sort(expected, axis=1)[:, -2:].T
    clear = first - second > 1e-9
    assert labels[clear].tolist() == made.decode_predictions(engine.predict(inputs))[clear].tolist()


def test_names_that_the_graph_has_already_get_an_underscore():
    words, numbers = np.array(["a", "b"] * 4, object), np.arange(8.0)
    table = {"prediction": words, "0.weight": numbers, "mul_0": numbers**2, "concat_0": numbers**3}
    made = fitted(table)
    engine = Engine(MLP([made.width, 5, 3]), backend="numpy")
    session = session_of(engine, made)
    names = [one.name for one in session.get_inputs()]
    assert names == ["prediction_", "0.weight_", "mul_0", "concat_0"]
    values = dict(zip(names, fed(table, np.float32).values(), strict=True))
    inputs = made.transform_features(coded(table, made.feature_names, made, [])[0])
    assert session.run(["prediction"], values)[0].tolist() == engine.predict(inputs).tolist()


def test_a_graph_of_numbers_keeps_its_one_input(tmp_path):
    made = fitted({"a": np.arange(9.0), "b": np.arange(9.0) ** 2})
    fusemlp.onnx.to_onnx(Engine(MLP([2, 3]), backend="numpy"), tmp_path / "a.onnx", preprocessor=made)
    (given_,) = onnx.load(tmp_path / "a.onnx").graph.input
    assert given_.name == "x"
    assert {entry.domain for entry in onnx.load(tmp_path / "a.onnx").opset_import} == {""}


@pytest.mark.parametrize("precision", ["fp32", "fp64"])
def test_the_types_of_the_inputs(precision):
    made = fitted({"a": np.arange(9.0), "b": np.array(["x", "y", ""] * 3, object)})
    session = session_of(Engine(MLP([made.width, 3]), backend="numpy", precision=precision), made)
    real = {"fp32": "tensor(float)", "fp64": "tensor(double)"}[precision]
    assert [one.type for one in session.get_inputs()] == [real, "tensor(string)"]


@pytest.mark.parametrize("precision", ["fp32", "fp64"])
@pytest.mark.parametrize("words", [False, True])
def test_the_graph_knows_the_words_that_stand_for_missing_cells(words, precision):
    """A cell of -999 is missing, in numbers and in words; the day that lies 999 days before 1970 is not."""
    random, day = np.random.default_rng(0), np.datetime64("1967-04-08")
    table = pandas.DataFrame({"size": random.uniform(0, 9, 60).round(2), "count": random.integers(1, 9, 60)})
    table["day"] = day + random.integers(0, 2, 60)
    if words:
        table["kind"] = random.choice(["flat", "house"], 60)
    table.loc[::5, ["size", "count"]] = -999, 8888
    table.loc[::7, "kind"] = "unknown" if words else None
    options = {"missing": (-999, "unknown", 8888.0, 1e39), "hidden": (8,), "epochs": 3, "models": 1, "backend": "numpy"}
    columns = list(table.columns) if words else ["size", "count", "day"]
    model = TableRegressor(precision=precision, **options).fit(table[columns], random.normal(size=60))
    parts = [*model.preprocessor_.feature_names]
    assert "day: elapsed days" in parts and model.preprocessor_.missing_inputs[:2] == (True, True)
    new = pandas.DataFrame({"size": [-999.0, 2, np.nan, 1], "count": [3, 8888, 5, -999], "day": [day] * 4})
    new["kind"] = ["unknown", "-999", "flat", ""]
    fed = {**new, **parts_of("day", new["day"].to_numpy("datetime64[us]"))}
    assert (fed["day: elapsed days"] == -999).all()
    kinds = {name: object if name == "kind" else "f4" if precision == "fp32" else "f8" for name in parts}
    feed = {name: np.array(fed[name], kinds[name]).reshape(-1, 1) for name in parts}
    session = session_of(model.engine_, model.preprocessor_)
    predicted = session.run(["prediction"], feed if words else {"x": np.hstack([*feed.values()])})[0]
    np.testing.assert_allclose(predicted, model.predict(new[columns]), rtol=1e-4)
