"""ONNX graphs in onnxruntime return the same as the engine."""

import importlib
import json
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest

import fusemlp
from fusemlp import (
    ELU,
    MLP,
    ArgumentError,
    BinaryCrossEntropy,
    CrossEntropy,
    DivergenceError,
    Engine,
    LeakyReLU,
    MissingLibraryError,
    PReLU,
)
from fusemlp.datasets.preprocessing import Preprocessor
from fusemlp_kernels.contract import ACTIVATIONS

Array = np.ndarray[Any, Any]

TOLERANCE = 1e-5
WIDTH = 6
X = np.random.default_rng(0).normal(size=(33, WIDTH)) * 2.0
ALL = [*ACTIVATIONS, LeakyReLU(0.2), PReLU(-0.3), ELU(0.7)]


def run(path, X):
    """Return the outputs of a graph by name; check its structure and shapes too."""
    onnx.checker.check_model(str(path), full_check=True)
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    (given,) = session.get_inputs()
    assert given.name == "x"
    assert given.shape == ["rows", X.shape[1]]
    X = X.astype({"tensor(float)": np.float32, "tensor(double)": np.float64}[given.type])
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(names, {"x": X}), strict=True))


def close(said, expected):
    assert said.shape == expected.shape
    assert said.dtype == expected.dtype
    np.testing.assert_allclose(said, expected, rtol=TOLERANCE, atol=TOLERANCE)


@pytest.mark.parametrize("precision", ["fp32", "fp64"])
@pytest.mark.parametrize("activation", ALL, ids=str)
def test_every_activation(activation, precision, tmp_path):
    net = MLP([WIDTH, 9, 7, 3], activation=activation, output_activation=activation, dropout=0.5, init="torch")
    engine = Engine(net, loss="mse", precision=precision)
    engine.to_onnx(tmp_path / "net.onnx")
    said = run(tmp_path / "net.onnx", X)
    assert list(said) == ["output", "prediction"]
    for name in said:
        close(said[name], engine.predict(X))


# The loss, the outputs of the network, and the outputs of the graph.
LOSSES = {
    "cross_entropy": (4, ["logits", "prediction", "probabilities"]),
    "binary_cross_entropy": (4, ["logits", "prediction", "probabilities"]),
    "binary_cross_entropy, one logit": (1, ["logits", "prediction", "probabilities"]),
    "mse": (4, ["output", "prediction"]),
    "mae, one output": (1, ["output", "prediction"]),
    "huber": (2, ["output", "prediction"]),
    "quantile": (1, ["output", "prediction"]),
    "poisson": (2, ["output", "prediction"]),
    "poisson, one output": (1, ["output", "prediction"]),
}


@pytest.mark.parametrize("case", LOSSES)
@pytest.mark.parametrize("rows", [1, 33])
def test_the_outputs_are_what_the_engine_says(case, rows, tmp_path):
    outputs, names = LOSSES[case]
    engine = Engine(MLP([WIDTH, 8, outputs], activation="tanh"), loss=case.partition(",")[0])
    engine.to_onnx(tmp_path / "net.onnx")
    said = run(tmp_path / "net.onnx", X[:rows])
    assert list(said) == names
    assert said[names[0]].shape == (rows, outputs)
    close(said["prediction"], engine.predict(X[:rows]))
    if "probabilities" in said:
        close(said["probabilities"], engine.predict_proba(X[:rows]))


@pytest.mark.parametrize("precision", ["fp32", "fp64"])
@pytest.mark.parametrize("case", LOSSES)
def test_members_give_their_mean_prediction(case, precision, tmp_path):
    outputs, names = LOSSES[case]
    net = MLP([WIDTH, 8, 5, outputs], activation="silu", members=4)
    engine = Engine(net, loss=case.partition(",")[0], precision=precision)
    drawn = np.random.default_rng(4)
    state = engine.state_dict()
    engine.load_state_dict({name: value + drawn.normal(size=value.shape) * 0.5 for name, value in state.items()})
    engine.to_onnx(tmp_path / "net.onnx")
    said = run(tmp_path / "net.onnx", X)
    assert list(said) == names
    close(said[names[0]], engine.outputs(X))
    close(said["prediction"], engine.predict(X))
    if "probabilities" in said:
        close(said["probabilities"], engine.predict_proba(X))


def test_no_hidden_layer(tmp_path):
    engine = Engine(MLP([WIDTH, 2]))
    engine.to_onnx(tmp_path / "net.onnx")
    close(run(tmp_path / "net.onnx", X)["probabilities"], engine.predict_proba(X))


def test_what_the_file_says_of_itself(tmp_path):
    engine = Engine(MLP([WIDTH, 8, 3], dropout=0.1), loss=CrossEntropy(class_weight=(1.0, 2.0, 1.0)))
    engine.to_onnx(str(tmp_path / "net.onnx"))
    model = onnx.load(tmp_path / "net.onnx")
    assert (model.producer_name, model.producer_version) == ("fusemlp", fusemlp.__version__)
    about = json.loads({entry.key: entry.value for entry in model.metadata_props}["fusemlp"])
    assert MLP.from_config(about["network"]) == engine.network
    assert about["loss"] == engine.loss.to_config()
    assert {constant.name for constant in model.graph.initializer} >= set(engine.state_dict())


def test_entries_of_ones_own(tmp_path):
    engine = Engine(MLP([WIDTH, 3]))
    fusemlp.onnx.to_onnx(engine, tmp_path / "net.onnx", metadata={"by": "me"})
    assert {prop.key: prop.value for prop in onnx.load(tmp_path / "net.onnx").metadata_props}["by"] == "me"
    with pytest.raises(ArgumentError, match="metadata: the names fusemlp are the file's own"):
        fusemlp.onnx.to_onnx(engine, tmp_path / "net.onnx", metadata={"fusemlp": "me"})


def preprocessor(**changes):
    config = {
        "task": "classification",
        "scale": "standard",
        "feature_names": tuple(f"f{k}" for k in range(WIDTH)),
        "categories": (None,) * WIDTH,
        "feature_shift": tuple(range(10, 10 + WIDTH)),
        "feature_scale": tuple(1.0 + 0.5 * k for k in range(WIDTH)),
        "target_name": "y",
        "classes": ("a", "b", "c"),
        "class_names": None,
        "target_shift": (),
        "target_scale": (),
        "one_hot_targets": False,
    }
    return Preprocessor(**{**config, **changes})


# Classes as a file may hold them, the loss and the number of outputs.
LABELS = {
    "words": (("ant", "bee", "cat"), "cross_entropy", 3),
    "whole numbers": ((3, 5, 9), "cross_entropy", 3),
    "numbers": ((0.5, 1.5, 2.5), "cross_entropy", 3),
    "flags": ((False, True), "cross_entropy", 2),
    "one logit": (("no", "yes"), "binary_cross_entropy", 1),
    "one-hot": (("ant", "bee", "cat"), "mse", 3),
}


@pytest.mark.parametrize("case", LABELS)
def test_with_a_preprocessor_the_predictions_are_labels(case, tmp_path):
    classes, loss, outputs = LABELS[case]
    scaling = preprocessor(classes=classes, one_hot_targets=case == "one-hot")
    engine = Engine(MLP([WIDTH, 8, outputs]), loss=loss)
    raw = (12.0 + 3.0 * X).astype(np.float32)
    inputs = scaling.transform_features(raw)
    fusemlp.onnx.to_onnx(engine, tmp_path / "net.onnx", preprocessor=scaling)
    said = run(tmp_path / "net.onnx", raw)
    codes = engine.predict(inputs).argmax(axis=1) if case == "one-hot" else engine.predict(inputs)
    assert said["prediction"].tolist() == scaling.decode_predictions(codes).tolist()
    if case != "one-hot":
        close(said["probabilities"], engine.predict_proba(inputs))


@pytest.mark.parametrize("loss", ["mse", "poisson"])
@pytest.mark.parametrize("targets", [1, 2])
def test_with_a_preprocessor_the_values_are_in_original_units(targets, loss, tmp_path):
    shift, scale = ((5.0, -3.0), (2.0, 0.25)) if loss == "mse" else ((0.0, 0.0), (1.0, 1.0))
    scaling = preprocessor(task="regression", classes=None, target_shift=shift[:targets], target_scale=scale[:targets])
    engine = Engine(MLP([WIDTH, 8, targets]), loss=loss)
    raw = (12.0 + 3.0 * X).astype(np.float32)
    fusemlp.onnx.to_onnx(engine, tmp_path / "net.onnx", preprocessor=scaling)
    expected = scaling.decode_predictions(engine.predict(scaling.transform_features(raw)))
    close(run(tmp_path / "net.onnx", raw)["prediction"], expected.astype(np.float32))


def test_missing_cells_are_filled_in_and_marked(tmp_path):
    marks = tuple(k % 2 == 0 for k in range(WIDTH))
    scaling = preprocessor(feature_fill=tuple(20.0 + k for k in range(WIDTH)), missing_inputs=marks)
    engine = Engine(MLP([scaling.width, 8, 3]))
    raw = (12.0 + 3.0 * X).astype(np.float32)
    raw[np.random.default_rng(0).random(raw.shape) < 0.3] = np.nan
    inputs = scaling.transform_features(raw)
    fusemlp.onnx.to_onnx(engine, tmp_path / "net.onnx", preprocessor=scaling)
    said = run(tmp_path / "net.onnx", raw)
    assert said["prediction"].tolist() == scaling.decode_predictions(engine.predict(inputs)).tolist()
    close(said["probabilities"], engine.predict_proba(inputs))


def test_a_feature_that_float32_blurs_is_warned_of(tmp_path):
    scaling = preprocessor(feature_shift=(1.6e9, *(0.0,) * (WIDTH - 1)))
    with pytest.warns(UserWarning, match="the feature 'f0' lies 1.6e\\+09 times its scale from zero"):
        fusemlp.onnx.to_onnx(Engine(MLP([WIDTH, 3])), tmp_path / "net.onnx", preprocessor=scaling)


def test_a_piece_that_float32_blurs_is_warned_of(tmp_path):
    edges = (5e4, 5e4 + 0.1, 5e4 + 1.0, 5e4 + 9.0)
    scaling = preprocessor(scale="piecewise", feature_knots=((edges, ()), *(None,) * (WIDTH - 1)))
    with pytest.warns(UserWarning, match="the feature 'f0' lies 5e\\+05 times its scale from zero"):
        fusemlp.onnx.to_onnx(Engine(MLP([scaling.width, 3])), tmp_path / "net.onnx", preprocessor=scaling)


def test_a_scaling_beyond_float32_is_refused(tmp_path):
    scaling = preprocessor(feature_fill=(-2e300, *(0.0,) * (WIDTH - 1)))
    with pytest.raises(ArgumentError, match="values of up to 2e\\+300, too large for the graph's float32"):
        fusemlp.onnx.to_onnx(Engine(MLP([WIDTH, 3])), tmp_path / "net.onnx", preprocessor=scaling)
    assert not (tmp_path / "net.onnx").exists()


def test_without_onnx_it_says_how_to_get_it(tmp_path, monkeypatch):
    def missing(name):
        raise ModuleNotFoundError(name)

    engine = Engine(MLP([WIDTH, 3]))
    importlib.import_module("fusemlp.report.onnx")
    monkeypatch.setattr(importlib, "import_module", missing)
    with pytest.raises(MissingLibraryError, match=r'pip install "fusemlp\[onnx\]"'):
        engine.to_onnx(tmp_path / "net.onnx")


def test_what_cannot_be_written_leaves_the_old_file(tmp_path):
    path = tmp_path / "net.onnx"
    engine = Engine(MLP([WIDTH, 3]), loss=BinaryCrossEntropy())
    engine.to_onnx(path)
    before = path.read_bytes()
    engine.memory.params[:] = np.nan
    with pytest.raises(DivergenceError, match="no ONNX file was written"):
        engine.to_onnx(path)
    assert [path.read_bytes()] == [before for _ in tmp_path.iterdir()]
    with pytest.raises(ArgumentError, match="mkdir -p"):
        engine.to_onnx(tmp_path / "nowhere" / "net.onnx")
    with pytest.raises(ArgumentError, match="is a folder"):
        engine.to_onnx(tmp_path)
