"""A model in one safetensors file: torch and NumPy read it without fusemlp, and fusemlp makes an engine of it."""

import itertools
import json

import numpy as np
import pytest
import safetensors.numpy
import safetensors.torch
import torch
from safetensors import safe_open

import fusemlp
from fusemlp import MLP, ArgumentError, ArgumentTypeError, Engine, PReLU
from fusemlp.runtime.files import digest_of
from fusemlp.sklearn import TableClassifier
from make import assert_same

SIZES = (6, 9, 7, 5, 3)
RNG = np.random.default_rng(0)
X = RNG.normal(size=(40, SIZES[0]))
LABELS = RNG.integers(0, SIZES[-1], 40)
VALUES = RNG.normal(size=(40, SIZES[-1]))


def sequential(*activations):
    layers = itertools.starmap(torch.nn.Linear, itertools.pairwise(SIZES))
    pairs = itertools.zip_longest(layers, (getattr(torch.nn, name)() for name in activations))
    return torch.nn.Sequential(*(module for pair in pairs for module in pair if module is not None))


def trained(*activations, **options):
    engine = Engine(MLP(SIZES, activation=activations), loss="mse", batch_size=8, seed=3, **options)
    engine.fit(X, VALUES, epochs=2)
    return engine


@pytest.mark.parametrize(
    "names",
    [("ReLU", "PReLU", "Tanh"), ("GELU", "SiLU", "Sigmoid"), ("PReLU", "Identity", "PReLU"), ("ELU", "SELU", "Mish")],
)
def test_torch_reads_it_into_the_plain_sequential(names, tmp_path):
    engine = trained(*map(str.lower, names), precision="fp64")
    engine.save(tmp_path / "model.safetensors")
    module = sequential(*names).double()
    module.load_state_dict(safetensors.torch.load_file(tmp_path / "model.safetensors"), strict=True)
    with torch.no_grad():
        said = module(torch.from_numpy(X)).numpy()
    np.testing.assert_allclose(said, engine.predict(X), rtol=1e-12, atol=1e-12)


def test_numpy_reads_it_and_the_metadata_describe_the_network(tmp_path):
    engine = trained("relu", PReLU(0.1), fusemlp.LeakyReLU(0.2))
    engine.save(str(tmp_path / "m"), metadata={"trained on": "noise"})
    tensors = safetensors.numpy.load_file(tmp_path / "m")
    assert {tensor.dtype for tensor in tensors.values()} == {np.dtype(np.float32)}
    assert_same(dict(sorted(tensors.items())), dict(sorted(engine.state_dict().items())))
    with safe_open(tmp_path / "m", framework="numpy") as file:
        metadata = file.metadata()
    about = json.loads(metadata["fusemlp_model"])
    assert MLP.from_config(about["network"]) == engine.network
    assert about["version"] == fusemlp.__version__
    assert (metadata["trained on"], metadata["format"]) == ("noise", "pt")


ENGINES = {
    "regression": lambda: trained("relu", PReLU(0.1), fusemlp.LeakyReLU(0.2), optimizer=fusemlp.SGD(0.1, momentum=0.9)),
    "double": lambda: trained("silu", "gelu", "tanh", precision="fp64"),
    "schedule, frozen": lambda: trained(
        *("relu", "relu", "relu"),
        optimizer=fusemlp.Adam(fusemlp.Cosine(0.01, warmup=3), per_parameter={"0.*": fusemlp.ParameterOptions(False)}),
    ),
    "blocks, encoding": lambda: Engine(
        MLP([6, 9, fusemlp.Residual(7), 3], norm="rms", encoding=fusemlp.Frequency(2)), loss="mse"
    ),
    "members": lambda: Engine(MLP(SIZES, members=2), loss="mse", normalise=X),
    "of the host": lambda: Engine(MLP([6, 9, 6]), loss=fusemlp.GaussianNLL()),
    "huber": lambda: Engine(MLP(SIZES, dropout=0.3), loss=fusemlp.Huber(0.5), optimizer="adamw", seed=7),
}


@pytest.mark.parametrize("case", ENGINES)
def test_load_gives_the_same_engine_at_the_beginning_of_a_training(case, tmp_path):
    engine = ENGINES[case]()
    engine.save(tmp_path / "m")
    loaded = fusemlp.load(tmp_path / "m")
    told = ("network", "loss", "optimizer", "batch_size", "seed", "precision", "normalise")
    settings = {name: getattr(engine, name) for name in told}
    assert {name: getattr(loaded, name) for name in told} == settings
    np.testing.assert_array_equal(loaded.predict(X), engine.predict(X))
    assert (loaded.update_count, loaded.epochs_trained, loaded.history) == (0, 0, None)
    new = Engine(settings.pop("network"), **settings)
    new.load_state_dict(engine.state_dict())
    assert loaded.fit(X, VALUES, epochs=2).history == new.fit(X, VALUES, epochs=2).history


def test_another_precision_can_be_asked_for(tmp_path):
    engine = trained("relu", "relu", "relu")
    for name, save in (("model", engine.save), ("checkpoint", engine.save_checkpoint)):
        save(tmp_path / name)
        double = fusemlp.load(tmp_path / name, precision="fp64")
        np.testing.assert_allclose(double.predict(X), engine.predict(X), rtol=1e-4, atol=1e-4)
        assert double.predict(X).dtype == np.float64
    with pytest.raises(fusemlp.BackendUnavailableError, match="tf32"):
        fusemlp.load(tmp_path / "model", backend="numpy", precision="tf32")


def test_load_takes_a_checkpoint_with_its_training(tmp_path):
    engine = trained("relu", "relu", "relu")
    engine.save_checkpoint(tmp_path / "c")
    loaded = fusemlp.load(tmp_path / "c")
    assert loaded.update_count == engine.update_count > 0
    assert loaded.fit(X, VALUES, epochs=1).history == engine.fit(X, VALUES, epochs=1).history


def test_load_checkpoint_says_that_a_model_is_none_and_labels_stay_labels(tmp_path):
    engine = Engine(MLP(SIZES))
    engine.save(tmp_path / "m")
    np.testing.assert_array_equal(fusemlp.load(tmp_path / "m").predict(X), engine.predict(X))
    with pytest.raises(fusemlp.CheckpointError, match=r"is a model that engine.save wrote.*use fusemlp.load\(path\)"):
        fusemlp.load_checkpoint(tmp_path / "m")


def altered(path):
    Engine(MLP(SIZES)).save(path)
    path.write_bytes(path.read_bytes()[:-1] + b"\x7f")


def newer(path):
    tensors = Engine(MLP(SIZES)).state_dict()
    config = json.dumps({"format": 99, "version": "9.0"})
    metadata = {"fusemlp_model": config, "sha256": digest_of(config, tensors)}
    safetensors.numpy.save_file(tensors, path, metadata=metadata)


def run_of(path):
    path.mkdir()
    (path / "config.json").touch()


WRONG_FILES = {
    "missing": (lambda path: None, "there is no model '.*'; expected a file that engine.save wrote"),
    "folder": (lambda path: path.mkdir(), "is a folder; expected a file that engine.save wrote$"),
    "run": (run_of, "is a folder; expected a file that engine.save wrote; a run opens with from_run"),
    "text": (lambda path: path.write_text("hello"), "is no readable model .*; copy or save it again"),
    "empty": (lambda path: path.touch(), "is no readable model"),
    "altered": (altered, "is corrupted: its SHA-256 does not match; copy or save it again"),
    "newer": (newer, "has format 99, written by fusemlp 9.0; this version reads format 1"),
    "another's": (
        lambda path: safetensors.numpy.save_file({"0.weight": np.zeros((2, 2))}, path),
        r"does not say which network it is of; make the engine.*load_state_dict",
    ),
}


@pytest.mark.parametrize("case", WRONG_FILES)
def test_what_is_no_model_is_refused(case, tmp_path):
    make, words = WRONG_FILES[case]
    make(tmp_path / "m")
    with pytest.raises(fusemlp.CheckpointError, match=words):
        fusemlp.load(tmp_path / "m")


def spoiled(engine, folder):
    engine.memory.params[:] = np.nan
    engine.save(folder / "m")


WRONG_CALLS = {
    "number": (lambda engine, folder: engine.save(3), ArgumentTypeError, "path: expected the path of a file, got 3"),
    "folder": (lambda engine, folder: engine.save(folder), ArgumentError, "path: .* is a folder"),
    "no folder": (lambda engine, folder: engine.save(folder / "n" / "m"), ArgumentError, "mkdir -p"),
    "metadata": (
        lambda engine, folder: engine.save(folder / "m", metadata={"epochs": 3}),
        ArgumentTypeError,
        "metadata: a file keeps str to str only, got 'epochs': 3",
    ),
    "reserved": (
        lambda engine, folder: engine.save(folder / "m", metadata={"sha256": ""}),
        ArgumentError,
        "metadata: the names sha256 are the file's own",
    ),
    "metadata list": (
        lambda engine, folder: engine.save(folder / "m", metadata=["a"]),
        ArgumentTypeError,
        "metadata: expected a mapping",
    ),
    "no numbers": (spoiled, fusemlp.DivergenceError, "no model was written and the one before is kept"),
}


@pytest.mark.parametrize("case", WRONG_CALLS)
def test_a_wrong_call_leaves_the_file_that_was_there(case, tmp_path):
    call, kind, words = WRONG_CALLS[case]
    Engine(MLP(SIZES)).save(tmp_path / "m")
    before = (tmp_path / "m").read_bytes()
    with pytest.raises(kind, match=words):
        call(Engine(MLP(SIZES), seed=1), tmp_path)
    assert [path.read_bytes() for path in tmp_path.iterdir()] == [before]


@pytest.mark.parametrize("ending", [".keras", ".h5", ".hdf5", ".pkl", ".pickle", ".joblib", ".pt", ".PTH", ".onnx"])
def test_a_name_of_another_format_is_refused(ending, tmp_path):
    engine = Engine(MLP(SIZES))
    estimator = TableClassifier(epochs=1, hidden=(4,)).fit(X, LABELS)
    for save in (engine.save, engine.save_checkpoint, estimator.save):
        with pytest.raises(ArgumentError, match=r"path: the file holds safetensors; expected .*'m\.safetensors', got"):
            save(tmp_path / f"m{ending}")
    assert not list(tmp_path.iterdir())
    engine.save(tmp_path / "m.v1")
    assert fusemlp.load(tmp_path / "m.v1").network == engine.network
