from __future__ import annotations

import copy
import json
import os
import pickle
import re
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from fusemlp import (
    MAE,
    MLP,
    MSE,
    SGD,
    Adam,
    AdamW,
    ArgumentError,
    ArgumentTypeError,
    BinaryCrossEntropy,
    CheckpointError,
    Cosine,
    CrossEntropy,
    DivergenceError,
    Engine,
    Exponential,
    Huber,
    LeakyReLU,
    Loss,
    OneCycle,
    Optimizer,
    ParameterOptions,
    Poisson,
    PReLU,
    Quantile,
    ReduceOnPlateau,
    StepDecay,
    load_checkpoint,
)
from fusemlp.runtime import files as module
from fusemlp.runtime.files import write_atomically
from fusemlp.training.checkpoint import read_content, read_extra
from make import assert_same_state, bits, state_of

Array = np.ndarray[Any, Any]

ROWS, WIDTH, OUTPUTS, BATCH = 37, 6, 3, 8


def features() -> Array:
    return np.random.default_rng(1).normal(size=(ROWS, WIDTH))


def labels() -> Array:
    return np.random.default_rng(2).integers(0, OUTPUTS, ROWS)


def values() -> Array:
    return np.random.default_rng(3).normal(size=(ROWS, OUTPUTS))


def one_hot() -> Array:
    return np.eye(OUTPUTS)[labels()]


def net(**options: Any) -> MLP:
    return MLP([WIDTH, 7, 5, OUTPUTS], **options)


def engine_of(network: MLP, loss: Loss | None = None, optimizer: Optimizer | None = None, **options: Any) -> Engine:
    return Engine(network, loss or CrossEntropy(), optimizer or SGD(0.05), batch_size=BATCH, seed=5, **options)


def trained(**options: Any) -> Engine:
    engine = engine_of(net(), optimizer=SGD(0.05, momentum=0.9), **options)
    engine.fit(features(), labels(), epochs=2)
    return engine


ENGINES: dict[str, tuple[Callable[[], Engine], Callable[[], Array]]] = {
    "sgd": (lambda: engine_of(net()), labels),
    "momentum, cosine, dropout": (
        lambda: engine_of(net(dropout=0.3), optimizer=SGD(Cosine(0.1, warmup=0.2), momentum=0.9, weight_decay=1e-3)),
        labels,
    ),
    "nesterov, scikit-learn": (
        lambda: engine_of(
            net(activation="tanh"), optimizer=SGD(0.05, momentum=0.8, nesterov=True, convention="scikit-learn")
        ),
        labels,
    ),
    "adam, clipping, gelu": (lambda: engine_of(net(activation="gelu"), optimizer=Adam(0.01, clip_norm=0.1)), labels),
    "adam, scikit-learn": (
        lambda: engine_of(net(activation="silu"), optimizer=Adam(0.01, convention="scikit-learn", weight_decay=0.1)),
        labels,
    ),
    "adamw, one cycle, parameter options": (
        lambda: engine_of(
            net(activation=["sigmoid", LeakyReLU(0.2)]),
            optimizer=AdamW(
                OneCycle(0.02),
                decay_biases=False,
                per_parameter={"0.*": ParameterOptions(trainable=False), "4.weight": ParameterOptions(lr_factor=0.5)},
            ),
        ),
        labels,
    ),
    "prelu, pending gradients": (
        lambda: engine_of(net(activation=PReLU(0.1)), optimizer=SGD(0.05, momentum=0.9, accumulate=4)),
        labels,
    ),
    "adamw, pending gradients, clipping, fp64": (
        lambda: engine_of(net(dropout=0.1), optimizer=AdamW(0.01, accumulate=3, clip_norm=0.5), precision="fp64"),
        labels,
    ),
    "plateau": (lambda: engine_of(net(), optimizer=Adam(ReduceOnPlateau(0.5, patience=1, factor=0.5))), labels),
    "class weights, smoothing": (
        lambda: engine_of(net(), CrossEntropy(label_smoothing=0.1, class_weight=[1.0, 2.0, 0.5], ignore_index=1)),
        labels,
    ),
    "binary, step": (lambda: engine_of(net(), BinaryCrossEntropy(), SGD(StepDecay(0.1, every=3))), one_hot),
    "mse, exponential": (lambda: engine_of(net(), MSE(), SGD(Exponential(0.1, gamma=0.9))), values),
    "mae, glorot": (lambda: engine_of(net(init="glorot_uniform"), MAE(reduction="sum")), values),
    "huber, fp64": (lambda: engine_of(net(), Huber(0.5), precision="fp64"), values),
    "poisson": (lambda: engine_of(net(), Poisson(), SGD(0.01)), one_hot),
    "quantile": (lambda: engine_of(net(output_activation="tanh"), Quantile(0.9)), values),
}


@pytest.mark.parametrize("name", ENGINES)
def test_a_loaded_engine_is_the_saved_one_and_goes_on_like_it(name: str, tmp_path: Path) -> None:
    make, targets = ENGINES[name]
    engine, X, y = make(), features(), targets()
    # 5 batches an epoch: 10 batches leave gradients pending where 3 or 4 are accumulated
    engine.fit(X, y, epochs=2, validation_data=(X[:9], y[:9]), early_stopping=9)
    path = tmp_path / "c.safetensors"

    engine.save_checkpoint(path)
    loaded = load_checkpoint(path)

    assert_same_state(loaded, engine)
    assert loaded.predict(X).tobytes() == engine.predict(X).tobytes()
    for one in (engine, loaded):
        one.fit(X, y, epochs=2)
    assert_same_state(loaded, engine)


@pytest.mark.parametrize("optimizer", [Adam(0.01), SGD(StepDecay(0.1, every=2), momentum=0.9, accumulate=3)], ids=repr)
def test_single_steps_go_on_like_the_saved_engine(optimizer: Optimizer, tmp_path: Path) -> None:
    engine, X, y = engine_of(net(dropout=0.2), optimizer=optimizer), features(), labels()
    for start in range(4):
        engine.step(X[start : start + BATCH], y[start : start + BATCH])
    engine.save_checkpoint(tmp_path / "c")
    loaded = load_checkpoint(tmp_path / "c")
    assert_same_state(loaded, engine)
    losses = [[float(one.step(X[s : s + 5], y[s : s + 5])) for s in range(4)] for one in (engine, loaded)]
    assert losses[0] == losses[1]
    assert_same_state(loaded, engine)


def test_an_untrained_engine_can_be_saved(tmp_path: Path) -> None:
    engine = engine_of(net())
    engine.save_checkpoint(tmp_path / "c")
    loaded = load_checkpoint(tmp_path / "c")
    assert_same_state(loaded, engine)
    assert loaded.history is None
    with pytest.raises(ArgumentError, match="resume: this engine has no fit to go on with"):
        loaded.fit(features(), labels(), epochs=1, resume=True)


def test_what_is_saved_does_not_change_the_engine(tmp_path: Path) -> None:
    engine = trained()
    before = state_of(engine)
    engine.save_checkpoint(tmp_path / "c", extra={"a": 1})
    assert state_of(engine) == before


def test_history_comes_back_exactly(tmp_path: Path) -> None:
    engine = trained()
    engine.save_checkpoint(tmp_path / "c")
    assert vars(load_checkpoint(tmp_path / "c").history) == vars(engine.history)


def test_a_loaded_engine_shares_no_memory_with_another(tmp_path: Path) -> None:
    engine = trained()
    engine.save_checkpoint(tmp_path / "c")
    first, second = load_checkpoint(tmp_path / "c"), load_checkpoint(tmp_path / "c")
    first.fit(features(), labels(), epochs=1)
    assert_same_state(second, engine)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda engine: pickle.loads(pickle.dumps(engine))])
def test_a_copied_or_pickled_engine_is_the_same(copied: Callable[[Engine], Engine]) -> None:
    engine = trained()
    engine.memory.arrays["w1"][0, 0] = np.nan
    assert_same_state(copied(engine), engine)


def test_the_file_is_plain_safetensors(tmp_path: Path) -> None:
    engine = trained()
    engine.save_checkpoint(tmp_path / "c.safetensors")
    tensors = load_file(tmp_path / "c.safetensors")
    for name, parameter in engine.state_dict().items():
        assert bits(tensors[f"parameter/{name}"]) == bits(parameter)


def test_an_engine_loads_into_the_network_that_is_asked_for(tmp_path: Path) -> None:
    engine = trained()
    engine.save_checkpoint(tmp_path / "c")
    assert_same_state(load_checkpoint(tmp_path / "c", network=net()), engine)
    with pytest.raises(CheckpointError, match=r"is of another network: expected MLP.*8.*it holds MLP.*6, 7, 5, 3"):
        load_checkpoint(tmp_path / "c", network=MLP([WIDTH, 8, OUTPUTS]))


# extra


@pytest.mark.parametrize(
    "extra", [None, {}, {"labels": ["a", "ü"], "mean": [0.1, -1e-300], "n": None, "deep": {"x": {}}}]
)
def test_extra_comes_back(extra: dict[str, Any] | None, tmp_path: Path) -> None:
    trained().save_checkpoint(tmp_path / "c", extra=extra)
    assert read_extra(tmp_path / "c") == (extra or {})


class Endless(dict[str, Any]):
    """A dict that contains itself."""

    def __init__(self) -> None:
        super().__init__()
        self["self"] = self


@pytest.mark.parametrize(
    ("extra", "error", "message"),
    [
        ({"x": object()}, ArgumentError, "extra: expected what JSON can hold .*object is not JSON serializable"),
        ({"x": np.zeros(2)}, ArgumentError, "extra: expected what JSON can hold .*ndarray"),
        ({"x": {(1, 2): 3}}, ArgumentError, "extra: expected what JSON can hold .*tuple"),
        (Endless(), ArgumentError, "extra: expected what JSON can hold .*[Cc]ircular"),
        ([("a", 1)], ArgumentTypeError, "extra: expected a mapping such as .*got list"),
        ("a", ArgumentTypeError, "extra: expected a mapping such as .*got str"),
    ],
    ids=["object", "array", "tuple key", "endless", "list", "str"],
)
def test_an_extra_that_json_cannot_hold_is_refused(
    extra: Any, error: type[Exception], message: str, tmp_path: Path
) -> None:
    engine, path = trained(), tmp_path / "c"
    engine.save_checkpoint(path)
    before = path.read_bytes()
    with pytest.raises(error, match=message):
        engine.save_checkpoint(path, extra=extra)
    assert path.read_bytes() == before
    assert [entry.name for entry in tmp_path.iterdir()] == ["c"]


# files that are no checkpoint


@pytest.fixture(scope="module")
def small() -> bytes:
    """Return a checkpoint of about 1200 bytes, with an array of one element among its tensors."""
    import tempfile

    engine = Engine(MLP([2, 1]), loss="mse", optimizer=SGD(0.1, momentum=0.5), batch_size=2)
    engine.step([[1.0, 2.0]], [[1.0]])
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "c")
        engine.save_checkpoint(path, extra={"label": "x"})
        return path.read_bytes()


def test_every_flipped_byte_is_noticed(small: bytes, tmp_path: Path) -> None:
    path = tmp_path / "c"
    path.write_bytes(small)
    read_content(path)
    with path.open("r+b", buffering=0) as file:
        for position, byte in enumerate(small):
            for flip in (0xFF, *(1 << bit for bit in range(8))):
                os.pwrite(file.fileno(), bytes([byte ^ flip]), position)
                with pytest.raises(CheckpointError, match=r"^path: "):
                    load_checkpoint(path)
            os.pwrite(file.fileno(), bytes([byte]), position)
    load_checkpoint(path)


def test_every_truncation_is_noticed(small: bytes, tmp_path: Path) -> None:
    path = tmp_path / "c"
    path.write_bytes(small)
    for length in reversed(range(len(small))):
        os.truncate(path, length)
        with pytest.raises(CheckpointError, match=r"^path: "):
            load_checkpoint(path)


def test_bytes_behind_the_end_are_noticed(small: bytes, tmp_path: Path) -> None:
    (tmp_path / "c").write_bytes(small + b"\0")
    with pytest.raises(CheckpointError, match="is no readable checkpoint"):
        load_checkpoint(tmp_path / "c")


def rewritten(source: bytes, target: Path, change: Callable[[dict[str, Any], dict[str, Array]], None]) -> None:
    """Write a checkpoint with changed content and a matching digest."""
    target.write_bytes(source)
    content = read_content(target)
    change(content["config"], content["tensors"])
    config = json.dumps(content["config"])
    digest = module.digest_of(config, content["tensors"])
    save_file(content["tensors"], target, metadata={module.CHECKPOINT.entry: config, module.DIGEST: digest})


def test_an_array_of_one_element_is_not_a_scalar(small: bytes, tmp_path: Path) -> None:
    bias = b'"parameter/0.bias":{"dtype":"F32","shape":[1]'
    assert small.count(bias) == 1
    (tmp_path / "c").write_bytes(small.replace(bias, bias.replace(b"1", b" ")))
    with pytest.raises(CheckpointError, match="its SHA-256 does not match"):
        load_checkpoint(tmp_path / "c")


def test_another_format_is_refused(small: bytes, tmp_path: Path) -> None:
    rewritten(small, tmp_path / "c", lambda config, tensors: config.update(format=3, version="9.0"))
    with pytest.raises(CheckpointError, match=r"has format 3, written by fusemlp 9\.0; this version reads format 2"):
        load_checkpoint(tmp_path / "c")


def test_content_under_the_digest_of_another_is_refused(small: bytes, tmp_path: Path) -> None:
    path = tmp_path / "c"
    path.write_bytes(small)
    tensors = load_file(path)
    from safetensors import safe_open

    with safe_open(str(path), framework="numpy") as file:
        metadata = file.metadata()
    tensors["parameter/0.weight"] = np.nextafter(tensors["parameter/0.weight"], np.float32(9))
    save_file(tensors, path, metadata=metadata)
    with pytest.raises(CheckpointError, match=r"is corrupted: its SHA-256 does not match; use another checkpoint"):
        load_checkpoint(path)


def make_foreign(path: Path) -> None:
    save_file({"0.weight": np.zeros((2, 2), np.float32)}, path)


NO_CHECKPOINTS: dict[str, tuple[Callable[[Path], object], str]] = {
    "missing": (lambda path: None, "there is no checkpoint '.*'; expected a file that save_checkpoint wrote"),
    "folder": (lambda path: path.mkdir(), "is a folder; expected a file that save_checkpoint wrote"),
    "pipe": (lambda path: os.mkfifo(path), "is a device or pipe; expected a file that save_checkpoint wrote"),
    "empty": (lambda path: path.touch(), r"is no readable checkpoint \(.*header too small"),
    "text": (lambda path: path.write_text("epoch,loss\n0,1.5\n" * 9), r"is no readable checkpoint \(.*header"),
    "zeros": (lambda path: path.write_bytes(bytes(4096)), "is no readable checkpoint"),
    "npz": (lambda path: np.savez(path.open("wb"), a=np.zeros(3)), "is no readable checkpoint"),
    "safetensors": (make_foreign, r"is a safetensors file, but no checkpoint of fusemlp; .*load_state_dict"),
    "dangling link": (lambda path: path.symlink_to(path.parent / "gone"), "there is no checkpoint"),
}


@pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")
@pytest.mark.parametrize("name", NO_CHECKPOINTS)
@pytest.mark.parametrize("read", [load_checkpoint, read_extra, read_content])
def test_what_is_no_checkpoint_is_refused(name: str, read: Callable[[Path], object], tmp_path: Path) -> None:
    make, message = NO_CHECKPOINTS[name]
    make(tmp_path / "c")
    with pytest.raises(CheckpointError, match=message) as caught:
        read(tmp_path / "c")
    assert str(tmp_path / "c") in str(caught.value)


# writing


@pytest.fixture
def umask() -> Iterator[Callable[[int], None]]:
    """Set the umask, and restore the old one."""
    old = os.umask(0o022)
    yield lambda mask: os.umask(mask) and None
    os.umask(old)


@pytest.mark.parametrize("mask", [0o022, 0o077, 0o002])
def test_a_checkpoint_has_the_mode_of_any_new_file(mask: int, umask: Callable[[int], None], tmp_path: Path) -> None:
    umask(mask)
    engine = engine_of(net())
    for _ in range(2):
        engine.save_checkpoint(tmp_path / "c")
        assert stat.S_IMODE((tmp_path / "c").stat().st_mode) == 0o666 & ~mask


def test_a_relative_path_and_a_str_are_accepted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    engine = trained()
    engine.save_checkpoint("c")
    engine.save_checkpoint(Path("d.safetensors"))
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["c", "d.safetensors"]
    assert_same_state(load_checkpoint("c"), engine)


@pytest.mark.parametrize("there", [True, False])
def test_a_symbolic_link_stays_and_its_target_is_written(there: bool, tmp_path: Path) -> None:
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    if there:
        engine_of(net()).save_checkpoint(folder / "real")
    link = tmp_path / "link"
    link.symlink_to(Path("elsewhere", "real"))
    engine = trained()
    engine.save_checkpoint(link)
    assert link.is_symlink()
    assert_same_state(load_checkpoint(folder / "real"), engine)
    assert_same_state(load_checkpoint(link), engine)
    assert [entry.name for entry in folder.iterdir()] == ["real"]


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    folder = tmp_path.resolve() / "runs" / "one"
    with pytest.raises(
        ArgumentError, match=rf"path: there is no folder '{re.escape(str(folder))}' for 'c'; make it first"
    ):
        engine_of(net()).save_checkpoint(folder / "c")
    assert list(tmp_path.iterdir()) == []


def test_a_folder_in_place_of_the_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ArgumentError, match=r"path: .* is a folder; expected a file"):
        engine_of(net()).save_checkpoint(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_pipe_in_place_of_the_file_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "c")
    with pytest.raises(ArgumentError, match=r"path: .* is a device or pipe"):
        engine_of(net()).save_checkpoint(tmp_path / "c")
    assert stat.S_ISFIFO((tmp_path / "c").stat().st_mode)


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_write_that_fails_leaves_the_old_checkpoint(
    call: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, old = tmp_path / "c", trained()
    old.save_checkpoint(path)
    before = path.read_bytes()
    newer = trained()
    newer.fit(features(), labels(), epochs=1)
    state = state_of(newer)

    def fail(*arguments: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, call, fail)
        with pytest.raises(OSError, match="No space left"):
            newer.save_checkpoint(path)

    assert path.read_bytes() == before
    assert [entry.name for entry in tmp_path.iterdir()] == ["c"]
    assert state_of(newer) == state
    newer.save_checkpoint(path)
    assert_same_state(load_checkpoint(path), newer)


def test_a_folder_that_takes_no_files_leaves_the_old_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "c"
    trained().save_checkpoint(path)
    before = path.read_bytes()

    def refuse(file: Any, *arguments: Any, **options: Any) -> None:
        raise PermissionError(13, "Permission denied", str(file))

    # root ignores permission bits, so simulate the refusal.
    monkeypatch.setattr(module, "open", refuse, raising=False)
    with pytest.raises(PermissionError, match="Permission denied"):
        trained().save_checkpoint(path)
    assert path.read_bytes() == before
    assert [entry.name for entry in tmp_path.iterdir()] == ["c"]


def test_the_data_are_on_the_disk_before_the_name_and_the_name_before_the_return(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[str] = []
    sync, replace = os.fsync, os.replace

    def noting_fsync(handle: int) -> None:
        status = os.fstat(handle)
        done.append("sync folder" if stat.S_ISDIR(status.st_mode) else f"sync {status.st_size} bytes")
        sync(handle)

    def noting_replace(source: Any, target: Any) -> None:
        done.append("rename")
        replace(source, target)

    monkeypatch.setattr(os, "fsync", noting_fsync)
    monkeypatch.setattr(os, "replace", noting_replace)
    write_atomically(tmp_path / "c", b"12345")
    assert done == ["sync 5 bytes", "rename", "sync folder"]
    assert (tmp_path / "c").read_bytes() == b"12345"


def test_parameters_that_are_not_finite_do_not_replace_a_good_checkpoint(tmp_path: Path) -> None:
    path, engine = tmp_path / "c", trained()
    engine.save_checkpoint(path)
    before = path.read_bytes()
    engine.memory.arrays["w1"][0, 0] = np.nan
    with pytest.raises(
        DivergenceError, match=r"^2\.weight: it holds NaN or infinite values, so no checkpoint was written"
    ):
        engine.save_checkpoint(path)
    assert path.read_bytes() == before
