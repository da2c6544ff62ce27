"""Files whose content was changed and whose digest fits: they load, or raise CheckpointError, and nothing else."""

import copy
import json
import math
from contextlib import suppress
from functools import partial

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import save_file

import fusemlp
from fusemlp import MLP, Adam, ArgumentError, ArgumentTypeError, CheckpointError, Cosine, Engine, load, load_checkpoint
from fusemlp.callbacks import EarlyStopping
from fusemlp.cli.session import options_of
from fusemlp.datasets.load import load_features
from fusemlp.datasets.preprocessing import Preprocessor
from fusemlp.datasets.rows import network_inputs
from fusemlp.report.metrics import predictions
from fusemlp.report.runs import open_run
from fusemlp.runtime.files import CHECKPOINT, DIGEST, MODEL, digest_of
from fusemlp.sklearn import MLPClassifier, TableClassifier
from fusemlp.training.checkpoint import read_extra
from make import read as read_json
from make import run, trained

RNG = np.random.default_rng(0)
X, LABELS = RNG.normal(size=(24, 3)).astype(np.float32), np.arange(24) % 2
# In place of every value in turn; the large numbers stand for memory that no machine has.
WRONG = (None, True, "x", -1, 1.5, math.nan, 10**9, 10**400, [], {}, [["x"]], {"x": [1]})


def places(value, place=()):
    """Yield the keys that lead to each value inside a JSON value; of a list those of its first and last."""
    yield place
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from places(inner, (*place, key))
    elif isinstance(value, list):
        for at in sorted({0, len(value) - 1}) if value else ():
            yield from places(value[at], (*place, at))


def forged_configs(config):
    """Yield copies of a description: in each one value is another, missing or deeper, or is one too many.

    Of the wrong values each place has every fourth, the next place those after them.
    """
    for number, place in enumerate(places(config)):
        for wrong in WRONG[number % 4 :: 4]:
            yield f"{place} {wrong!r}"[:80], changed(config, place, put(wrong))
        yield f"{place} missing", changed(config, place, lambda holder, key: holder.pop(key))
        yield f"{place} deeper", changed(config, place, lambda holder, key: put([holder[key]])(holder, key))
        yield f"{place} extra", changed(config, (*place, "x"), add)


def put(value):
    return lambda holder, key: holder.__setitem__(key, value)


def add(holder, key):
    if isinstance(holder, dict):
        holder[key] = 1
    elif isinstance(holder, list):
        holder.append(1)


def changed(config, place, change):
    root = [copy.deepcopy(config)]
    holder = root
    for key in (0, *place)[:-1]:
        holder = holder[key]
    change(holder, (0, *place)[-1])
    return root[0] if root else None


def forged_tensors(tensors):
    """Yield copies of tensors: in each one is missing or has another type, shape or value, or there is one more."""
    yield "another", {**tensors, "x/y": np.ones(3, np.float32)}
    for name, tensor in tensors.items():
        yield f"{name} missing", {other: tensors[other] for other in tensors if other != name}
        bits = np.int32 if tensor.itemsize == 4 else np.float64 if tensor.dtype.kind == "i" else np.int64
        wrong = {
            "read as other bits": tensor.view(bits),
            "bool": tensor.astype(bool),
            "of bytes": np.frombuffer(tensor.tobytes(), np.uint8),
            "flat": np.append(tensor, tensor.flat[:1]) if tensor.size else np.ones(1, tensor.dtype),
            "deeper": tensor[None],
            "empty": np.zeros((0, *tensor.shape[1:]), tensor.dtype),
            "a number": tensor.reshape(-1)[:1].reshape(()) if tensor.size else np.zeros((), tensor.dtype),
            "negative": -1 - np.abs(tensor),
        }
        if tensor.dtype.kind == "f":
            wrong["nan"] = np.full_like(tensor, math.nan)
        for what, one in wrong.items():
            yield f"{name} {what}", {**tensors, name: np.ascontiguousarray(one)}


def read(path):
    """Return the metadata of a file, the name of the entry that describes it, and its tensors."""
    with safe_open(str(path), framework="numpy") as file:
        tensors, metadata = {name: file.get_tensor(name) for name in tuple(file.keys())}, file.metadata()
    return metadata, MODEL.entry if MODEL.entry in metadata else CHECKPOINT.entry, tensors


def write(path, metadata, entry, text, tensors):
    """Write a file with a digest that fits."""
    save_file(tensors, path, {**metadata, entry: text, DIGEST: digest_of(text, tensors)})


def forgeries(path, *, extra):
    """Write each forgery of the file in its place, and yield its description; ``extra``: of that entry alone."""
    metadata, entry, tensors = read(path)
    config = json.loads(metadata[entry])
    forged = forged_configs(config["extra"] if extra else config)
    texts = [(what, json.dumps(config | {"extra": one} if extra else one)) for what, one in forged]
    if not extra:
        texts += [(text[:5], text) for text in ("", "{", "[" * 100_000, '{"format": 1' + "0" * 5000 + "}")]
    for what, text in texts:
        write(path, metadata, entry, text, tensors)
        yield what
    for what, other in () if extra else forged_tensors(tensors):
        write(path, metadata, entry, metadata[entry], other)
        yield what


def model(path):
    net = MLP([3, 4, 2], activation=fusemlp.PReLU(0.1), dropout=0.2)
    engine = Engine(net, fusemlp.CrossEntropy(class_weight=[1.0, 2.0]), batch_size=8)
    engine.fit(X, LABELS, epochs=1)
    engine.save(path)


def checkpoint(path):
    options = {"0.*": fusemlp.ParameterOptions(lr_factor=0.5)}
    optimizer = Adam(Cosine(0.01, warmup=3), per_parameter=options, ema=0.5, accumulate=2)
    engine = Engine(MLP([3, 4, 2]), optimizer=optimizer, batch_size=8, seed=1, normalise=True)
    engine.fit(X, LABELS, epochs=2, validation_data=(X, LABELS), callbacks=[EarlyStopping(patience=1)])
    engine.save_checkpoint(path, extra={"label": "x"})


def private(path):
    engine = Engine(MLP([3, 2]), batch_size=8, privacy=fusemlp.DPSGD(noise=1.0, delta=1e-3))
    engine.fit(X, LABELS, epochs=1)
    engine.save_checkpoint(path)


def members(path):
    Engine(MLP([3, 4, 2], members=2), precision="fp64", backend="numpy").save_checkpoint(path, extra={"label": ["x"]})


# The maker of a file, its reader, and whether the extra entry alone is forged.
FILES = {
    "model": (model, load, False),
    "checkpoint": (checkpoint, load_checkpoint, False),
    "private checkpoint": (private, load, False),
    "checkpoint with members": (members, load_checkpoint, False),
    "extra": (members, read_extra, True),
    "classifier": (MLPClassifier((4,), max_iter=2, early_stopping=True), MLPClassifier.load, True),
    "table": (TableClassifier(hidden=(4,), epochs=2), TableClassifier.load, True),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("source", "open_file", "extra"), FILES.values(), ids=FILES)
def test_a_forged_file_loads_or_raises_checkpoint_error(source, open_file, extra, tmp_path):
    path = tmp_path / "file.safetensors"
    source(path) if callable(source) else source.fit(X, LABELS).save(path)
    open_file(path)
    assert any([is_refused(what, partial(open_file, path)) for what in forgeries(path, extra=extra)])


def is_refused(what, read):
    """Return whether reading a forgery raises CheckpointError; fail for another error."""
    try:
        read()
    except CheckpointError:
        return True
    except Exception as error:
        raise AssertionError(f"{what}: {type(error).__name__}: {error}") from error
    return False


def test_weights_that_are_integers_are_not_read_as_their_bits(tmp_path):
    path = tmp_path / "file.safetensors"
    for make, name in ((model, "0.weight"), (checkpoint, "parameter/0.weight")):
        make(path)
        metadata, entry, tensors = read(path)
        write(path, metadata, entry, metadata[entry], tensors | {name: tensors[name].view(np.int32)})
        with pytest.raises(CheckpointError, match=r"0\.weight: expected real numbers of shape \(4, 3\), got int32"):
            load(path)


def test_the_error_names_file_field_and_mend_and_has_its_cause(tmp_path):
    path = tmp_path / "file.safetensors"
    checkpoint(path)
    metadata, entry, tensors = read(path)
    config = json.loads(metadata[entry])
    config["fit"]["history"]["epochs"][1] = "two"
    write(path, metadata, entry, json.dumps(config), tensors)
    words = r"file\.safetensors' does not fit: fit\.history\.epochs\[1\]: expected int, got 'two'; use another checkp"
    with pytest.raises(CheckpointError, match=words) as caught:
        load_checkpoint(path)
    assert isinstance(caught.value.__cause__, ArgumentTypeError)


def test_the_callers_arguments_have_their_own_errors(tmp_path):
    checkpoint(tmp_path / "file")
    with pytest.raises(ArgumentError, match="backend"):
        load_checkpoint(tmp_path / "file", backend="x")
    for precision in ("x", 3):
        with pytest.raises((ArgumentError, ArgumentTypeError), match="precision"):
            load(tmp_path / "file", precision=precision)


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    options = ("--epochs", "2", "--hidden", "4", "--models", "1", "--batch-size", "8", "--quiet")
    return trained(tmp_path_factory.mktemp("forged"), *options, target="y", classes=2, rows=40)


@pytest.fixture
def config_path(run_folder):
    """Return the file of a run's configuration, which is restored after the test."""
    text = (run_folder / "config.json").read_text()
    yield run_folder / "config.json"
    (run_folder / "config.json").write_text(text)


def test_a_forged_configuration_of_a_run_is_read_or_refused(run_folder, config_path):
    engine = load_checkpoint(run_folder / "checkpoints/model.safetensors")

    def opened(what):
        _, config = open_run(run_folder)
        options_of(config)
        preprocessor = Preprocessor.from_config(config["preprocessor"])
        if "preprocessor" in what and "one_hot" not in what:
            # rows and network need not go with it any more
            with suppress(fusemlp.DataError, fusemlp.ShapeError):
                features = load_features(str(run_folder.parent / "data.csv"), preprocessor)
                predictions(engine, preprocessor, network_inputs(preprocessor, features, "fp32"))

    for what, forged in forged_configs(read_json(config_path)):
        config_path.write_text(json.dumps(forged))
        is_refused(what, partial(opened, what))


FORGED = [
    (lambda config: config.pop("network"), "it has no entry 'network'"),
    (lambda config: config.update(epochs="3"), "epochs: expected int, got '3'"),
    (lambda config: config["preprocessor"].update(feature_scale=["x"]), "feature_scale[0]: expected float"),
    (lambda config: config["network"].update(init="x"), "init: unknown name 'x'"),
    (lambda config: config["preprocessor"].update(one_hot_targets=True), "one_hot_targets: expected False"),
    (lambda config: put("x")(config["preprocessor"]["dates"][0], 1), "dates: unknown name 'x'"),
    (lambda config: config.update(epochs=math.nan), "config.json: cannot be read"),
]


@pytest.mark.parametrize(("change", "words"), FORGED, ids=[words for _, words in FORGED])
def test_a_command_says_in_one_line_what_is_wrong_with_a_run(change, words, run_folder, config_path, capsys):
    config = read_json(config_path)
    change(config)
    config_path.write_text(json.dumps(config))
    capsys.readouterr()
    data = run_folder.parent / "data.csv"
    assert run("predict", run_folder, "--data", data, "--out", run_folder.parent / "p.csv") == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert words in line
