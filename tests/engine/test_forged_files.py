"""Files whose content was changed and whose digest fits: they load, or raise CheckpointError, and nothing else."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import save_file

from fusemlp import (
    DPSGD,
    MLP,
    Adam,
    ArgumentError,
    ArgumentTypeError,
    CheckpointError,
    Cosine,
    CrossEntropy,
    DataError,
    Engine,
    ParameterOptions,
    PReLU,
    ShapeError,
    load,
    load_checkpoint,
)
from fusemlp.callbacks import EarlyStopping
from fusemlp.cli.session import options_of
from fusemlp.datasets.load import load_features
from fusemlp.datasets.preparation import network_inputs
from fusemlp.datasets.preprocessing import Preprocessor
from fusemlp.report.metrics import predictions
from fusemlp.report.runs import open_run
from fusemlp.runtime.files import CHECKPOINT, DIGEST, MODEL, digest_of
from fusemlp.sklearn import MLPClassifier, TableClassifier
from fusemlp.training.checkpoint import read_extra
from make import run

Array = np.ndarray[Any, Any]

RNG = np.random.default_rng(0)
X, LABELS = RNG.normal(size=(24, 3)).astype(np.float32), np.arange(24) % 2
# In place of every value in turn; the large numbers stand for memory that no machine has.
WRONG = (None, True, "x", -1, 1.5, math.nan, 10**9, 10**400, [], {}, [["x"]], {"x": [1]})


def places(value: Any, place: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Yield the keys that lead to each value inside a JSON value; of a list those of its first and last."""
    yield place
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from places(inner, (*place, key))
    elif isinstance(value, list):
        for at in sorted({0, len(value) - 1}) if value else ():
            yield from places(value[at], (*place, at))


def forged_configs(config: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """Yield copies of a description: in each one value is another, missing or deeper, or one is there too many.

    Of the wrong values each place has every fourth, the next place those after them.
    """
    for number, place in enumerate(places(config)):
        for wrong in WRONG[number % 4 :: 4]:
            yield f"{place} {wrong!r}"[:80], changed(config, place, partial(put, value=wrong))
        yield f"{place} missing", changed(config, place, remove)
        yield f"{place} deeper", changed(config, place, deepen)
        yield f"{place} extra", changed(config, (*place, "x"), add)


def put(holder: Any, key: Any, *, value: Any) -> None:
    holder[key] = value


def remove(holder: Any, key: Any) -> None:
    holder.pop(key)


def deepen(holder: Any, key: Any) -> None:
    holder[key] = [holder[key]]


def add(holder: Any, key: str) -> None:
    if isinstance(holder, dict):
        holder[key] = 1
    elif isinstance(holder, list):
        holder.append(1)


def changed(config: Any, place: tuple[Any, ...], change: Callable[[Any, Any], object]) -> Any:
    root = [copy.deepcopy(config)]
    holder: Any = root
    for key in (0, *place)[:-1]:
        holder = holder[key]
    change(holder, (0, *place)[-1])
    return root[0] if root else None


def forged_tensors(tensors: dict[str, Array]) -> Iterator[tuple[str, dict[str, Array]]]:
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


def read(path: Path) -> tuple[dict[str, str], dict[str, Array]]:
    with safe_open(str(path), framework="numpy") as file:
        return file.metadata(), {name: file.get_tensor(name) for name in tuple(file.keys())}


def forgeries(path: Path, *, extra: bool) -> Iterator[str]:
    """Write each forgery of the file in its place, with a digest that fits, and yield its description.

    ``extra``: only that entry of the description is forged.
    """
    metadata, tensors = read(path)
    entry = MODEL.entry if MODEL.entry in metadata else CHECKPOINT.entry
    config = json.loads(metadata[entry])

    def write(text: str, tensors: dict[str, Array]) -> None:
        save_file(tensors, path, {**metadata, entry: text, DIGEST: digest_of(text, tensors)})

    if extra:
        for what, forged in forged_configs(config["extra"]):
            write(json.dumps(config | {"extra": forged}), tensors)
            yield what
        return
    for what, forged in forged_configs(config):
        write(json.dumps(forged), tensors)
        yield what
    for text in ("", "{", "[" * 100_000, '{"format": 1' + "0" * 5000 + "}"):
        write(text, tensors)
        yield f"text {text[:5]!r}"
    for what, other in forged_tensors(tensors):
        write(metadata[entry], other)
        yield what


def model(path: Path) -> None:
    net = MLP([3, 4, 2], activation=PReLU(0.1), dropout=0.2)
    engine = Engine(net, CrossEntropy(class_weight=[1.0, 2.0]), batch_size=8)
    engine.fit(X, LABELS, epochs=1)
    engine.save(path)


def checkpoint(path: Path) -> None:
    options = {"0.*": ParameterOptions(lr_factor=0.5)}
    optimizer = Adam(Cosine(0.01, warmup=3), per_parameter=options, ema=0.5, accumulate=2)
    engine = Engine(MLP([3, 4, 2]), optimizer=optimizer, batch_size=8, seed=1, normalise=True)
    engine.fit(X, LABELS, epochs=2, validation_data=(X, LABELS), callbacks=[EarlyStopping(patience=1)])
    engine.save_checkpoint(path, extra={"label": "x"})


def private(path: Path) -> None:
    engine = Engine(MLP([3, 2]), batch_size=8, privacy=DPSGD(noise=1.0, delta=1e-3))
    engine.fit(X, LABELS, epochs=1)
    engine.save_checkpoint(path)


def members(path: Path) -> None:
    Engine(MLP([3, 4, 2], members=2), precision="fp64", backend="numpy").save_checkpoint(path, extra={"label": ["x"]})


def classifier(path: Path) -> None:
    MLPClassifier((4,), max_iter=2, early_stopping=True).fit(X, LABELS).save(path)


def table(path: Path) -> None:
    TableClassifier(hidden=(4,), epochs=2).fit(X, LABELS).save(path)


FILES: dict[str, tuple[Callable[[Path], None], Callable[[Path], object]]] = {
    "model": (model, load),
    "checkpoint": (checkpoint, load_checkpoint),
    "private checkpoint": (private, load),
    "checkpoint with members": (members, load_checkpoint),
    "extra": (members, read_extra),
    "classifier": (classifier, MLPClassifier.load),
    "table": (table, TableClassifier.load),
}

OF_EXTRA = ("extra", "classifier", "table")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", FILES)
def test_a_forged_file_loads_or_raises_checkpoint_error(name: str, tmp_path: Path) -> None:
    make, open_file = FILES[name]
    path = tmp_path / "file.safetensors"
    make(path)
    open_file(path)
    refused = 0
    for what in forgeries(path, extra=name in OF_EXTRA):
        refused += is_refused(what, partial(open_file, path))
    assert refused


def is_refused(what: str, read: Callable[[], object]) -> bool:
    """Return whether reading a forgery raises CheckpointError; fail for another error."""
    try:
        read()
    except CheckpointError:
        return True
    except Exception as error:
        raise AssertionError(f"{what}: {type(error).__name__}: {error}") from error
    return False


def test_weights_that_are_integers_are_not_read_as_their_bits(tmp_path: Path) -> None:
    for make in (model, checkpoint):
        make(tmp_path / "file.safetensors")
        metadata, tensors = read(tmp_path / "file.safetensors")
        name = "0.weight" if MODEL.entry in metadata else "parameter/0.weight"
        tensors[name] = tensors[name].view(np.int32)
        text = metadata[MODEL.entry] if MODEL.entry in metadata else metadata[CHECKPOINT.entry]
        save_file(tensors, tmp_path / "file.safetensors", {**metadata, DIGEST: digest_of(text, tensors)})
        with pytest.raises(CheckpointError, match=r"0\.weight: expected real numbers of shape \(4, 3\), got int32"):
            load(tmp_path / "file.safetensors")


def test_the_error_names_file_field_and_mend_and_has_its_cause(tmp_path: Path) -> None:
    path = tmp_path / "file.safetensors"
    checkpoint(path)
    metadata, tensors = read(path)
    config = json.loads(metadata[CHECKPOINT.entry])
    config["fit"]["history"]["epochs"][1] = "two"
    text = json.dumps(config)
    save_file(tensors, path, {**metadata, CHECKPOINT.entry: text, DIGEST: digest_of(text, tensors)})
    said = (
        r"file\.safetensors' does not fit: fit\.history\.epochs\[1\]: expected int, got 'two'; use another checkpoint"
    )
    with pytest.raises(CheckpointError, match=said) as caught:
        load_checkpoint(path)
    assert isinstance(caught.value.__cause__, ArgumentTypeError)


def test_the_callers_arguments_have_their_own_errors(tmp_path: Path) -> None:
    checkpoint(tmp_path / "file")
    with pytest.raises(ArgumentError, match="backend"):
        load_checkpoint(tmp_path / "file", backend="x")
    for precision in ("x", 3):
        with pytest.raises((ArgumentError, ArgumentTypeError), match="precision"):
            load(tmp_path / "file", precision=precision)


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("forged")
    rows = (
        f"{row / 40},{'red' if row % 3 else 'blue'},2024-01-{1 + row % 28:02d},{'no' if row < 20 else 'yes'}"
        for row in range(40)
    )
    (folder / "data.csv").write_text("\n".join(["a,colour,day,y", *rows, ""]))
    options = [
        "--target",
        "y",
        "--epochs",
        "2",
        "--hidden",
        "4",
        "--models",
        "1",
        "--batch-size",
        "8",
        "--quiet",
        "--out",
        folder / "run",
    ]
    assert run("train", folder / "data.csv", *options) == 0
    return folder


def test_a_forged_configuration_of_a_run_is_read_or_refused(run_folder: Path) -> None:
    path, data = run_folder / "run/config.json", str(run_folder / "data.csv")
    text = path.read_text()
    engine = load_checkpoint(run_folder / "run/checkpoints/model.safetensors")

    def opened(what: str) -> None:
        _, config = open_run(run_folder / "run")
        options_of(config)
        preprocessor = Preprocessor.from_config(config["preprocessor"])
        if "preprocessor" in what and "one_hot" not in what:
            # rows and network need not go with it any more
            with suppress(DataError, ShapeError):
                predictions(
                    engine, preprocessor, network_inputs(preprocessor, load_features(data, preprocessor), "fp32")
                )

    try:
        for what, forged in forged_configs(json.loads(text)):
            path.write_text(json.dumps(forged))
            is_refused(what, partial(opened, what))
    finally:
        path.write_text(text)


FORGED: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "missing": (lambda config: config.pop("network"), "it has no entry 'network'"),
    "type": (lambda config: config.update(epochs="3"), "epochs: expected int, got '3'"),
    "deep": (lambda config: config["preprocessor"].update(feature_scale=["x"]), "feature_scale[0]: expected float"),
    "value": (lambda config: config["network"].update(init="x"), "init: unknown name 'x'"),
    "one hot": (lambda config: config["preprocessor"].update(one_hot_targets=True), "one_hot_targets: expected False"),
    "date": (lambda config: config["preprocessor"]["dates"][0].__setitem__(1, "x"), "dates: unknown name 'x'"),
    "nan": (lambda config: config.update(epochs=math.nan), "config.json: cannot be read"),
}


@pytest.mark.parametrize("name", FORGED)
def test_a_command_says_in_one_line_what_is_wrong_with_a_run(
    name: str, run_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = run_folder / "run/config.json"
    text = path.read_text()
    config = json.loads(text)
    change, said = FORGED[name]
    change(config)
    path.write_text(json.dumps(config))
    capsys.readouterr()
    try:
        code = run("predict", run_folder / "run", "--data", run_folder / "data.csv", "--out", run_folder / "p.csv")
    finally:
        path.write_text(text)
    lines = capsys.readouterr().err.splitlines()
    assert (code, len(lines)) == (1, 1)
    assert said in lines[0]
