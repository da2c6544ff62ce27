"""ONNX graphs in onnxruntime return the same as the engine."""

import importlib
import json

import numpy as np
import onnx
import pytest
from graphs import graph_outputs

import fusemlp
from fusemlp import ELU, MLP, ArgumentError, Engine, MissingLibraryError, Residual
from fusemlp.datasets.preprocessing import Preprocessor
from fusemlp_kernels.contract import ACTIVATIONS

TOLERANCE = 1e-5
WIDTH = 6
X = np.random.default_rng(0).normal(size=(33, WIDTH)) * 2.0
ALL = [*ACTIVATIONS, fusemlp.LeakyReLU(0.2), fusemlp.PReLU(-0.3), ELU(0.7)]


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
    said = graph_outputs(tmp_path / "net.onnx", X)
    assert list(said) == ["output", "prediction"]
    for name in said:
        close(said[name], engine.predict(X))


# The loss and the outputs of the network.
LOSSES = [
    *(("cross_entropy", 4), ("binary_cross_entropy", 4), ("binary_cross_entropy", 1), ("mse", 4), ("mae", 1)),
    *(("huber", 2), ("quantile", 1), ("poisson", 2), ("poisson", 1)),
]
# Without members.
DISTRIBUTIONS = [
    *(
        (fusemlp.Quantiles([0.1, 0.2, 0.5, 0.6, 0.9]), 5),
        (fusemlp.Quantiles([0.9]), 1),
        (fusemlp.Quantiles([0.1, 0.2]), 2),
    ),
    *((fusemlp.GaussianNLL(), 2), (fusemlp.GaussianNLL(eps=0.5), 6)),
]


def check(engine, X, path):
    """Assert that the graph of an engine answers as the engine."""
    engine.to_onnx(path)
    said = graph_outputs(path, X)
    classes = "cross_entropy" in engine.loss.to_config()["kind"]
    more = ["probabilities"] if classes else ["std"] if engine.loss.kind == "gaussian" else []
    assert list(said) == ["logits" if classes else "output", "prediction", *more]
    close(said["logits" if classes else "output"], engine.outputs(X))
    close(said["prediction"], engine.predict(X))
    if classes:
        close(said["probabilities"], engine.predict_proba(X))
    if "std" in more:
        close(said["std"], engine.predict(X, return_std=True)[1])


def moved(engine):
    """Return the engine with other parameters than new ones, some of which are all alike."""
    drawn = np.random.default_rng(4)
    state = engine.state_dict()
    engine.load_state_dict({name: value + drawn.normal(size=value.shape) * 0.4 for name, value in state.items()})
    return engine


@pytest.mark.parametrize(("loss", "outputs"), [*LOSSES, *DISTRIBUTIONS])
@pytest.mark.parametrize("rows", [1, 33])
def test_the_outputs_are_what_the_engine_says(loss, outputs, rows, tmp_path):
    check(Engine(MLP([WIDTH, 8, outputs], activation="tanh"), loss=loss), X[:rows], tmp_path / "net.onnx")
    # no hidden layer
    check(Engine(MLP([WIDTH, outputs]), loss=loss), X[:rows], tmp_path / "net.onnx")


@pytest.mark.parametrize("precision", ["fp32", "fp64"])
@pytest.mark.parametrize(("loss", "outputs"), LOSSES)
def test_members_give_their_mean_prediction(loss, outputs, precision, tmp_path):
    net = MLP([WIDTH, 8, 5, outputs], activation="silu", members=4)
    check(moved(Engine(net, loss=loss, precision=precision)), X, tmp_path / "net.onnx")


@pytest.mark.parametrize("precision", ["fp32", "fp64"])
@pytest.mark.parametrize("norm", [None, "layer", fusemlp.LayerNorm(0.5), "rms", fusemlp.RMSNorm(0.5)], ids=str)
def test_normalised_layers_and_residual_blocks(norm, precision, tmp_path):
    net = MLP([WIDTH, 8, Residual(12), Residual(5, 3), 7, 3], activation="silu", norm=norm, init="torch")
    check(moved(Engine(net, precision=precision, backend="numpy")), X, tmp_path / "net.onnx")


@pytest.mark.parametrize("precision", ["fp32", "fp64"])
@pytest.mark.parametrize("inputs", [False, True])
@pytest.mark.parametrize("members", [1, 3])
def test_encoded_inputs(members, inputs, precision, tmp_path):
    """Ten octaves, of which the fastest repeats 256 times on the way from -1 to 1."""
    net = MLP([WIDTH, 8, 3], members=members, encoding=fusemlp.Frequency(10, inputs=inputs))
    engine = Engine(net, precision=precision, backend="numpy")
    check(engine, X, tmp_path / "net.onnx")


def test_what_the_file_says_of_itself(tmp_path):
    engine = Engine(MLP([WIDTH, 8, 3], dropout=0.1), loss=fusemlp.CrossEntropy(class_weight=(1.0, 2.0, 1.0)))
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
        **{"task": "classification", "scale": "standard", "categories": (None,) * WIDTH, "one_hot_targets": False},
        **{"feature_names": tuple(f"f{k}" for k in range(WIDTH)), "feature_shift": tuple(range(10, 10 + WIDTH))},
        **{"feature_scale": tuple(1.0 + 0.5 * k for k in range(WIDTH)), "target_name": "y"},
        **{"classes": ("a", "b", "c"), "class_names": None, "target_shift": (), "target_scale": ()},
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
    said = graph_outputs(tmp_path / "net.onnx", raw)
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
    close(graph_outputs(tmp_path / "net.onnx", raw)["prediction"], expected.astype(np.float32))


def test_missing_cells_are_filled_in_and_marked(tmp_path):
    marks = tuple(k % 2 == 0 for k in range(WIDTH))
    scaling = preprocessor(feature_fill=tuple(20.0 + k for k in range(WIDTH)), missing_inputs=marks)
    engine = Engine(MLP([scaling.width, 8, 3]))
    raw = (12.0 + 3.0 * X).astype(np.float32)
    raw[np.random.default_rng(0).random(raw.shape) < 0.3] = np.nan
    inputs = scaling.transform_features(raw)
    fusemlp.onnx.to_onnx(engine, tmp_path / "net.onnx", preprocessor=scaling)
    said = graph_outputs(tmp_path / "net.onnx", raw)
    assert said["prediction"].tolist() == scaling.decode_predictions(engine.predict(inputs)).tolist()
    close(said["probabilities"], engine.predict_proba(inputs))


EDGES = (5e4, 5e4 + 0.1, 5e4 + 1.0, 5e4 + 9.0)
BLURRED = {
    "1.6e\\+09": {"feature_shift": (1.6e9, *(0.0,) * (WIDTH - 1))},
    "5e\\+05": {"scale": "piecewise", "feature_knots": ((EDGES, ()), *(None,) * (WIDTH - 1))},
}


@pytest.mark.parametrize("times", BLURRED)
def test_a_feature_or_a_piece_that_float32_blurs_is_warned_of(times, tmp_path):
    scaling = preprocessor(**BLURRED[times])
    with pytest.warns(UserWarning, match=f"the feature 'f0' lies {times} times its scale from zero"):
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
    with pytest.raises(MissingLibraryError, match="pip install onnx"):
        engine.to_onnx(tmp_path / "net.onnx")


def test_what_cannot_be_written_leaves_the_old_file(tmp_path):
    path = tmp_path / "net.onnx"
    engine = Engine(MLP([WIDTH, 3]), loss=fusemlp.BinaryCrossEntropy())
    engine.to_onnx(path)
    before = path.read_bytes()
    engine.memory.params[:] = np.nan
    with pytest.raises(fusemlp.DivergenceError, match="no ONNX file was written"):
        engine.to_onnx(path)
    assert [path.read_bytes()] == [before for _ in tmp_path.iterdir()]
    with pytest.raises(ArgumentError, match="mkdir -p"):
        engine.to_onnx(tmp_path / "nowhere" / "net.onnx")
    with pytest.raises(ArgumentError, match="is a folder"):
        engine.to_onnx(tmp_path)
