"""Checkpoints: a loaded engine goes on like the saved one, damage is noticed, and a file is written whole or not."""

import copy
import json
import os
import pickle
import re
import stat
from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

import fusemlp
from fusemlp import MLP, SGD, Adam, ParameterOptions, load_checkpoint
from fusemlp.runtime import files as module
from fusemlp.training.checkpoint import read_content, read_extra
from fusemlp_kernels.errors import ArgumentError, ArgumentTypeError, CheckpointError, DivergenceError
from make import assert_same_state, bits, data, engine, state_of

ROWS, WIDTH, OUTPUTS, BATCH = 37, 6, 3, 8
X, LABELS = data(ROWS, WIDTH, OUTPUTS)


def engine_of(loss=None, optimizer=None, precision="fp32", normalise=None, sizes=(WIDTH, 7, 5, OUTPUTS), **network):
    options = {"optimizer": optimizer or SGD(0.05, momentum=0.9), "precision": precision, "normalise": normalise}
    return engine(net=MLP(sizes, **network), loss=loss, batch_size=BATCH, seed=5, **options)


def trained():
    engine = engine_of()
    engine.fit(X, LABELS, epochs=2)
    return engine


PER_PARAMETER = {"0.*": ParameterOptions(trainable=False), "4.weight": ParameterOptions(lr_factor=0.5)}
OPTIMIZERS = {
    "sgd": (SGD(0.05), {}),
    "momentum, cosine": (SGD(fusemlp.Cosine(0.1, warmup=0.2), momentum=0.9, weight_decay=1e-3), {"dropout": 0.3}),
    "nesterov": (SGD(0.05, momentum=0.8, nesterov=True, convention="scikit-learn"), {"activation": "tanh"}),
    "adam, clipping": (Adam(0.01, clip_norm=0.1), {"activation": "gelu"}),
    "adam, scikit-learn": (Adam(0.01, convention="scikit-learn", weight_decay=0.1), {"activation": "silu"}),
    "adamw, one cycle, parameter options": (
        fusemlp.AdamW(fusemlp.OneCycle(0.02), decay_biases=False, per_parameter=PER_PARAMETER),
        {"activation": ["sigmoid", fusemlp.LeakyReLU(0.2)]},
    ),
    "pending gradients": (SGD(0.05, momentum=0.9, accumulate=4), {"activation": fusemlp.PReLU(0.1)}),
    "pending gradients, clipping, fp64": (
        fusemlp.AdamW(0.01, accumulate=3, clip_norm=0.5),
        {"dropout": 0.1, "precision": "fp64"},
    ),
    "plateau": (Adam(fusemlp.ReduceOnPlateau(0.5, patience=1, factor=0.5)), {}),
    "step": (SGD(fusemlp.StepDecay(0.1, every=3)), {}),
    "exponential": (SGD(fusemlp.Exponential(0.1, gamma=0.9)), {}),
    "average": (Adam(0.01, ema=0.9), {"normalise": True}),
}
NETWORKS = {
    "normalised layers": {"norm": "layer", "normalise": True},
    "residual blocks": {"norm": "rms", "sizes": (WIDTH, 7, fusemlp.Residual(8), OUTPUTS)},
    "encoded inputs": {"encoding": fusemlp.Frequency(3, inputs=True)},
    "members": {"members": 3, "normalise": True},
}
LOSSES = {
    "labels": (fusemlp.CrossEntropy(label_smoothing=0.1, class_weight=[1.0, 2.0, 0.5], ignore_index=1), {}),
    "binary": (fusemlp.BinaryCrossEntropy(), {}),
    "values": (fusemlp.MAE(reduction="sum"), {"init": "glorot_uniform"}),
    "values, mse": (fusemlp.MSE(), {}),
    "values, of the host": (fusemlp.MSE(missing=True), {}),
    "values, huber, fp64": (fusemlp.Huber(0.5), {"precision": "fp64"}),
    "values, quantile": (fusemlp.Quantile(0.9), {"output_activation": "tanh"}),
    "counts": (fusemlp.Poisson(), {"optimizer": SGD(0.01)}),
}
ENGINES = {name: {"optimizer": optimizer, **options} for name, (optimizer, options) in OPTIMIZERS.items()}
ENGINES |= {name: {"loss": loss, **options} for name, (loss, options) in LOSSES.items()} | NETWORKS


@pytest.mark.parametrize("name", ENGINES)
def test_a_loaded_engine_is_the_saved_one_and_goes_on_like_it(name, tmp_path):
    engine, kind = engine_of(**ENGINES[name]), name.split(",")[0] if name in LOSSES else "labels"
    y = data(ROWS, WIDTH, OUTPUTS, kind=kind)[1]
    # 5 batches an epoch: 10 batches leave gradients pending where 3 or 4 are accumulated
    engine.fit(X, y, epochs=2, validation_data=(X[:9], y[:9]), early_stopping=9)
    before = state_of(engine)
    engine.save_checkpoint(tmp_path / "c", extra={"a": 1})
    assert state_of(engine) == before
    loaded, pickled = load_checkpoint(tmp_path / "c"), pickle.loads(pickle.dumps(engine))
    assert_same_state(loaded, engine)
    assert vars(loaded.history) == vars(engine.history)
    assert bits(loaded.predict(X)) == bits(engine.predict(X))
    loaded.fit(X, y, epochs=2)
    # they share no memory
    assert_same_state(pickled, engine)
    assert repr(pickled) == repr(engine)
    for one in (engine, pickled):
        one.fit(X, y, epochs=2)
        assert_same_state(loaded, one)


STEPPED = [Adam(0.01), SGD(fusemlp.StepDecay(0.1, every=2), momentum=0.9, accumulate=3)]


@pytest.mark.parametrize("optimizer", STEPPED, ids=repr)
def test_single_steps_go_on_like_the_saved_engine(optimizer, tmp_path):
    engine = engine_of(optimizer=optimizer, dropout=0.2)
    for start in range(4):
        engine.step(X[start : start + BATCH], LABELS[start : start + BATCH])
    engine.save_checkpoint(tmp_path / "c")
    loaded = load_checkpoint(tmp_path / "c")
    assert_same_state(loaded, engine)
    losses = [[float(one.step(X[s : s + 5], LABELS[s : s + 5])) for s in range(4)] for one in (engine, loaded)]
    assert losses[0] == losses[1]
    assert_same_state(loaded, engine)


@pytest.mark.parametrize("asked", ["auto", "eager"])
def test_a_plan_that_was_asked_for_stays_with_batches_of_another_size(asked, tmp_path):
    X, y = data()
    saved = engine(plan=asked)
    saved.save_checkpoint(tmp_path / "e.safetensors")
    loaded = load_checkpoint(tmp_path / "e.safetensors", backend="numpy")
    assert loaded.plan == saved.plan
    loaded.fit(X, y, epochs=1, batch_size=8)
    assert loaded.plan == ("eager" if asked == "eager" else "resident")


def test_an_untrained_engine_can_be_saved(tmp_path):
    engine = engine_of()
    engine.save_checkpoint(tmp_path / "c")
    loaded = load_checkpoint(tmp_path / "c")
    assert_same_state(loaded, engine)
    assert loaded.history is None


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda engine: pickle.loads(pickle.dumps(engine))])
def test_a_copied_or_pickled_engine_is_the_same(copied):
    engine = trained()
    engine.memory.arrays["w1"][0, 0] = np.nan
    assert_same_state(copied(engine), engine)


def test_an_engine_loads_into_the_network_that_is_asked_for(tmp_path):
    engine = trained()
    engine.save_checkpoint(tmp_path / "c")
    assert_same_state(load_checkpoint(tmp_path / "c", network=engine.network), engine)
    with pytest.raises(CheckpointError, match=r"is of another network: expected MLP.*8.*it holds MLP.*6, 7, 5, 3"):
        load_checkpoint(tmp_path / "c", network=MLP([WIDTH, 8, OUTPUTS]))


EXTRAS = [None, {}, {"labels": ["a", "ü"], "mean": [0.1, -1e-300], "n": None, "deep": {"x": {}}}]


@pytest.mark.parametrize("extra", EXTRAS)
def test_extra_comes_back(extra, tmp_path):
    engine_of().save_checkpoint(tmp_path / "c", extra=extra)
    assert read_extra(tmp_path / "c") == (extra or {})


ENDLESS = {}
ENDLESS["self"] = ENDLESS


@pytest.mark.parametrize(
    ("extra", "error", "message"),
    [
        ({"x": object()}, ArgumentError, "extra: expected what JSON can hold .*object is not JSON serializable"),
        ({"x": np.zeros(2)}, ArgumentError, "extra: expected what JSON can hold .*ndarray"),
        ({"x": {(1, 2): 3}}, ArgumentError, "extra: expected what JSON can hold .*tuple"),
        (ENDLESS, ArgumentError, "extra: expected what JSON can hold .*[Cc]ircular"),
        ([("a", 1)], ArgumentTypeError, "extra: expected a mapping such as .*got list"),
        ("a", ArgumentTypeError, "extra: expected a mapping such as .*got str"),
    ],
)
def test_an_extra_that_json_cannot_hold_is_refused(extra, error, message, tmp_path):
    engine, path = engine_of(), tmp_path / "c"
    engine.save_checkpoint(path)
    before = path.read_bytes()
    with pytest.raises(error, match=message):
        engine.save_checkpoint(path, extra=extra)
    assert path.read_bytes() == before
    assert [entry.name for entry in tmp_path.iterdir()] == ["c"]


# files that are no checkpoint


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """Return a checkpoint of about 1200 bytes, with an array of one element among its tensors."""
    net, path = MLP([2, 1]), tmp_path_factory.mktemp("small") / "c"
    tiny = engine(net=net, loss="mse", optimizer=SGD(0.1, momentum=0.5), batch_size=2)
    tiny.step([[1.0, 2.0]], [[1.0]])
    tiny.save_checkpoint(path, extra={"label": "x"})
    return path.read_bytes()


def test_every_flipped_byte_is_noticed(small, tmp_path):
    path = tmp_path / "c"
    path.write_bytes(small)
    read_content(path)
    with path.open("r+b", buffering=0) as file:
        for position, byte in enumerate(small):
            for flip in (0xFF, 1 << position % 8):
                os.pwrite(file.fileno(), bytes([byte ^ flip]), position)
                with pytest.raises(CheckpointError, match=r"^path: "):
                    load_checkpoint(path)
            os.pwrite(file.fileno(), bytes([byte]), position)
    load_checkpoint(path)


def test_every_truncation_and_bytes_behind_the_end_are_noticed(small, tmp_path):
    path = tmp_path / "c"
    path.write_bytes(small + b"\0")
    with pytest.raises(CheckpointError, match="is no readable checkpoint"):
        load_checkpoint(path)
    for length in reversed(range(len(small))):
        os.truncate(path, length)
        with pytest.raises(CheckpointError, match=r"^path: "):
            load_checkpoint(path)


def test_an_array_of_one_element_is_not_a_scalar(small, tmp_path):
    bias = b'"parameter/0.bias":{"dtype":"F32","shape":[1]'
    assert small.count(bias) == 1
    (tmp_path / "c").write_bytes(small.replace(bias, bias.replace(b"1", b" ")))
    with pytest.raises(CheckpointError, match="its SHA-256 does not match"):
        load_checkpoint(tmp_path / "c")


def test_another_format_is_refused(small, tmp_path):
    path = tmp_path / "c"
    path.write_bytes(small)
    content = read_content(path)
    config = json.dumps(content["config"] | {"format": 3, "version": "9.0"})
    digest = module.digest_of(config, content["tensors"])
    save_file(content["tensors"], path, metadata={module.CHECKPOINT.entry: config, module.DIGEST: digest})
    with pytest.raises(CheckpointError, match=r"has format 3, written by fusemlp 9\.0; this version reads format 2"):
        load_checkpoint(path)


def test_content_under_the_digest_of_another_is_refused(small, tmp_path):
    path = tmp_path / "c"
    path.write_bytes(small)
    tensors = load_file(path)
    with safe_open(str(path), framework="numpy") as file:
        metadata = file.metadata()
    tensors["parameter/0.weight"] = np.nextafter(tensors["parameter/0.weight"], np.float32(9))
    save_file(tensors, path, metadata=metadata)
    with pytest.raises(CheckpointError, match=r"is corrupted: its SHA-256 does not match; use another checkpoint"):
        load_checkpoint(path)


NO_CHECKPOINTS = {
    "missing": (lambda path: None, "there is no checkpoint '.*'; expected a file that save_checkpoint wrote"),
    "folder": (Path.mkdir, "is a folder; expected a file that save_checkpoint wrote"),
    "pipe": (os.mkfifo, "is a device or pipe; expected a file that save_checkpoint wrote"),
    "empty": (Path.touch, r"is no readable checkpoint \(.*header too small"),
    "text": (lambda path: path.write_text("epoch,loss\n0,1.5\n" * 9), r"is no readable checkpoint \(.*header"),
    "zeros": (lambda path: path.write_bytes(bytes(4096)), "is no readable checkpoint"),
    "npz": (lambda path: np.savez(path.open("wb"), a=np.zeros(3)), "is no readable checkpoint"),
    "safetensors": (
        lambda path: save_file({"0.weight": np.zeros((2, 2), np.float32)}, path),
        r"is a safetensors file, but no checkpoint of fusemlp; .*load_state_dict",
    ),
    "dangling link": (lambda path: path.symlink_to(path.parent / "gone"), "there is no checkpoint"),
}


@pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")
@pytest.mark.parametrize("name", NO_CHECKPOINTS)
@pytest.mark.parametrize("read", [load_checkpoint, read_extra, read_content])
def test_what_is_no_checkpoint_is_refused(name, read, tmp_path):
    make, message = NO_CHECKPOINTS[name]
    make(tmp_path / "c")
    with pytest.raises(CheckpointError, match=message) as caught:
        read(tmp_path / "c")
    assert str(tmp_path / "c") in str(caught.value)


# writing


@pytest.mark.parametrize("mask", [0o022, 0o077, 0o002])
def test_a_checkpoint_has_the_mode_of_any_new_file(mask, tmp_path):
    old = os.umask(mask)
    try:
        for _ in range(2):
            engine_of().save_checkpoint(tmp_path / "c")
            assert stat.S_IMODE((tmp_path / "c").stat().st_mode) == 0o666 & ~mask
    finally:
        os.umask(old)


def test_a_relative_path_and_a_str_are_accepted(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    engine = trained()
    engine.save_checkpoint("c")
    engine.save_checkpoint(Path("d.safetensors"))
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["c", "d.safetensors"]
    assert_same_state(load_checkpoint("c"), engine)


@pytest.mark.parametrize("there", [True, False])
def test_a_symbolic_link_stays_and_its_target_is_written(there, tmp_path):
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    if there:
        engine_of().save_checkpoint(folder / "real")
    link = tmp_path / "link"
    link.symlink_to(Path("elsewhere", "real"))
    engine = trained()
    engine.save_checkpoint(link)
    assert link.is_symlink()
    assert_same_state(load_checkpoint(folder / "real"), engine)
    assert_same_state(load_checkpoint(link), engine)
    assert [entry.name for entry in folder.iterdir()] == ["real"]


def test_a_missing_folder_is_named(tmp_path):
    folder = tmp_path.resolve() / "runs" / "one"
    words = rf"path: there is no folder '{re.escape(str(folder))}' for 'c'; make it first"
    with pytest.raises(ArgumentError, match=words):
        engine_of().save_checkpoint(folder / "c")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("make", "is_kind", "message"),
    [
        (Path.mkdir, stat.S_ISDIR, r"path: .* is a folder; expected a file"),
        (os.mkfifo, stat.S_ISFIFO, r"path: .* is a device or pipe"),
    ],
)
def test_a_folder_or_pipe_in_place_of_the_file_is_refused(make, is_kind, message, tmp_path):
    make(tmp_path / "c")
    with pytest.raises(ArgumentError, match=message):
        engine_of().save_checkpoint(tmp_path / "c")
    assert is_kind((tmp_path / "c").stat().st_mode)
    assert list(tmp_path.rglob("*")) == [tmp_path / "c"]


FULL, DENIED = OSError(28, "No space left on device"), PermissionError(13, "Permission denied")


# root ignores permission bits, so simulate the refusal of a folder
@pytest.mark.parametrize(
    ("owner", "call", "error"), [(os, "fsync", FULL), (os, "replace", FULL), (module, "open", DENIED)]
)
def test_a_write_that_fails_leaves_the_old_checkpoint(owner, call, error, tmp_path, monkeypatch):
    path = tmp_path / "c"
    trained().save_checkpoint(path)
    before = path.read_bytes()
    newer = trained()
    newer.fit(X, LABELS, epochs=1)
    state = state_of(newer)

    def fail(*arguments, **options):
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(owner, call, fail, raising=False)
        with pytest.raises(type(error), match=error.strerror):
            newer.save_checkpoint(path)
    assert path.read_bytes() == before
    assert [entry.name for entry in tmp_path.iterdir()] == ["c"]
    assert state_of(newer) == state
    newer.save_checkpoint(path)
    assert_same_state(load_checkpoint(path), newer)


def test_the_data_are_on_the_disk_before_the_name_and_the_name_before_the_return(tmp_path, monkeypatch):
    done, sync, replace = [], os.fsync, os.replace

    def noting_fsync(handle):
        status = os.fstat(handle)
        done.append("sync folder" if stat.S_ISDIR(status.st_mode) else f"sync {status.st_size} bytes")
        sync(handle)

    def noting_replace(source, target):
        done.append("rename")
        replace(source, target)

    monkeypatch.setattr(os, "fsync", noting_fsync)
    monkeypatch.setattr(os, "replace", noting_replace)
    module.write_atomically(tmp_path / "c", b"12345")
    assert done == ["sync 5 bytes", "rename", "sync folder"]
    assert (tmp_path / "c").read_bytes() == b"12345"


def test_parameters_that_are_not_finite_do_not_replace_a_good_checkpoint(tmp_path):
    path, engine = tmp_path / "c", trained()
    engine.save_checkpoint(path)
    before = path.read_bytes()
    engine.memory.arrays["w1"][0, 0] = np.nan
    words = r"^2\.weight: it holds NaN or infinite values, so no checkpoint was written"
    with pytest.raises(DivergenceError, match=words):
        engine.save_checkpoint(path)
    assert path.read_bytes() == before
