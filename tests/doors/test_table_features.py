"""Properties of tables: the features of training and prediction are the same on every way to the model."""

import pickle

import numpy as np
import onnxruntime
import pandas
import pyarrow
from hypothesis import given, settings
from hypothesis import strategies as st

from fusemlp.datasets.cells import parts_of
from fusemlp.datasets.load import load_features
from fusemlp.datasets.preprocessing import Preprocessor
from fusemlp.datasets.rows import network_inputs
from fusemlp.report.onnx import onnx_bytes
from fusemlp.sklearn import TableClassifier

KNOWN = ["red", "blue", "Zürich", "a b", "x,y", 'say "no"']
CELLS = {
    "word": st.one_of(st.none(), st.sampled_from(KNOWN)),
    "strange": st.one_of(st.none(), st.sampled_from([*KNOWN, "green", "NA"])),
    "number": st.one_of(st.none(), st.integers(-9999, 9999).map(lambda k: k / 8)),
    "date": st.one_of(st.none(), st.datetimes(pandas.Timestamp(1980, 1, 1), pandas.Timestamp(2050, 1, 1))),
    "flag": st.booleans(),
}
TYPES = {"word": object, "strange": object, "number": float, "date": "datetime64[us]", "flag": bool}


def frame_of(data, kinds, rows):
    columns = {}
    for index, kind in enumerate(kinds):
        cells = data.draw(st.lists(CELLS[kind], min_size=rows, max_size=rows))
        columns[f"{'word' if kind == 'strange' else kind}{index}"] = pandas.Series(cells, dtype=TYPES[kind])
    return pandas.DataFrame(columns)


def written(frame, path):
    frame.to_csv(path, index=False)
    return path


def answers_of_the_graph(model, frame):
    """Return the probabilities of the exported graph, whose dates are parts."""
    session = onnxruntime.InferenceSession(onnx_bytes(model.engine_, model.preprocessor_))
    columns = {
        name: column.fillna("").to_numpy() if name.startswith("word") else column.to_numpy()
        for name, column in frame.items()
    }
    parts = {}
    for name, cells in columns.items():
        parts |= parts_of(name, cells) if cells.dtype.kind == "M" else {name: cells}
    given = [one.name for one in session.get_inputs()]
    if given == ["x"]:
        whole = np.column_stack([parts[name] for name in model.preprocessor_.feature_names])
        return session.run(["probabilities"], {"x": whole.astype(np.float64)})[0]
    fed = {name: parts[name].reshape(-1, 1) for name in given}
    fed = {name: cells if cells.dtype == object else cells.astype(np.float64) for name, cells in fed.items()}
    return session.run(["probabilities"], fed)[0]


@settings(derandomize=True, deadline=None, max_examples=40)
@given(st.data(), st.lists(st.sampled_from(["word", "number", "date", "flag"]), min_size=1, max_size=5))
def test_train_and_predict_compute_the_same_features(tmp_path_factory, data, kinds):
    training = frame_of(data, kinds, 12)
    # A column without a value has no kind.
    for name in training.columns[training.isna().all()]:
        training.loc[0, name] = {"word": "red", "numb": 1.0, "date": pandas.Timestamp(2000, 1, 1)}[name[:4]]
    new = frame_of(data, ["strange" if kind == "word" else kind for kind in kinds], 5)
    model = TableClassifier(
        hidden=(3,), epochs=1, early_stopping=None, keep=list(training), backend="numpy", precision="fp64"
    )
    model.fit(training, np.arange(12) % 3)
    made = model.preprocessor_
    inputs = model._inputs(new)
    assert inputs.shape == (5, made.width)
    assert np.isfinite(inputs).all()

    order = data.draw(st.permutations(list(new)))
    shuffled = model._inputs(new[order].assign(another=1))
    np.testing.assert_array_equal(shuffled, inputs)
    np.testing.assert_array_equal(model._inputs(pyarrow.Table.from_pandas(new)), inputs)
    for row in range(5):
        np.testing.assert_array_equal(model._inputs(new.iloc[[row]]), inputs[[row]])

    path = written(new[order], tmp_path_factory.getbasetemp() / "new.csv")
    stored = Preprocessor.from_json(made.to_json())
    assert stored == made
    np.testing.assert_array_equal(network_inputs(stored, load_features(path, stored), "fp64"), inputs)

    again = pickle.loads(pickle.dumps(model))
    expected = model.predict_proba(new)
    np.testing.assert_array_equal(again.predict_proba(new), expected)
    # Both compute in double precision; sums of 3 to some 30 products and an exponential part them.
    np.testing.assert_allclose(answers_of_the_graph(model, new), expected, rtol=1e-9)
