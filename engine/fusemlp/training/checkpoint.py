"""Checkpoints: everything that training needs to go on bit for bit, in one safetensors file.

The file is written beside its final name, synchronised to the disk and renamed: whatever happens in between, the name
holds a whole checkpoint, the old or the new one. Its content is guarded by a SHA-256.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from fusemlp._version import __version__
from fusemlp.describe.losses import loss_from_config
from fusemlp.describe.network import MLP
from fusemlp.describe.optimizers import optimizer_from_config
from fusemlp.engine import Engine
from fusemlp.training.history import FitState
from fusemlp_kernels.errors import ArgumentError, ArgumentTypeError, CheckpointError, DivergenceError

Array = np.ndarray[Any, Any]

FORMAT = 2
# Metadata of a file: the configuration of a checkpoint or of a model (``saving``), and the SHA-256 over all of it.
CONFIG, MODEL, DIGEST = "fusemlp", "fusemlp_model", "sha256"
MEND = {
    "checkpoint": "use another checkpoint of the run, or train again",
    "model": "copy or save it again",
}


def description(engine: Engine) -> dict[str, Any]:
    """What an engine was made with, JSON-able; ``start_engine`` is its inverse."""
    return {
        "version": __version__,
        "network": engine.network.to_config(),
        "loss": engine.loss.to_config(),
        "optimizer": engine.optimizer.to_config(),
        "batch_size": engine.batch_size,
        "seed": engine.seed,
        "precision": engine.precision,
    }


def start_engine(engine: Engine, config: Mapping[str, Any], *, backend: str, device: str | None) -> None:
    """Make ``engine``, whose constructor has not run, one of this description; its parameters are still zero."""
    engine.network = MLP.from_config(config["network"])
    engine.loss = loss_from_config(config["loss"])
    engine.optimizer = optimizer_from_config(config["optimizer"])
    engine.batch_size, engine.seed = config["batch_size"], config["seed"]
    engine.precision = config["precision"]
    engine.start(backend, device, "auto")


def engine_content(engine: Engine, extra: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """What a checkpoint holds: "config", JSON-able, and "tensors", NumPy arrays by name.

    Tensors go by the parameters' names, without the padding of a backend, so that another backend can go on.
    """
    memory = engine.memory
    tensors = _prefixed("parameter", engine.state_dict())
    for index in range(len(memory.states)):
        tensors |= _prefixed(f"state{index}", engine.tensors(f".state{index}"))
    if engine.optimizer.accumulate > 1:
        tensors |= _prefixed("gradient", engine.tensors("", "d"))
    if engine.best_parameters is not None:
        tensors |= _prefixed("best", engine.best_parameters)
    for name in ("counters", "hyper", "stats"):
        tensors[name] = memory.backend.to_host(memory.arrays[name])
    config = {
        "format": FORMAT,
        **description(engine),
        "backend": engine.backend,
        "plan": engine.plan,
        "epochs_trained": engine.epochs_trained,
        "fit": None if engine.fit_state is None else engine.fit_state.to_config(),
        "extra": dict(extra or {}),
    }
    return {"config": config, "tensors": tensors}


def _prefixed(kind: str, tensors: Mapping[str, Array]) -> dict[str, Array]:
    return {f"{kind}/{name}": tensor for name, tensor in tensors.items()}


def _of_kind(kind: str, tensors: Mapping[str, Array]) -> dict[str, Array]:
    start = f"{kind}/"
    return {name.removeprefix(start): tensor for name, tensor in tensors.items() if name.startswith(start)}


def restore_engine(engine: Engine, content: Mapping[str, Any], *, backend: str, device: str | None) -> None:
    """Make ``engine``, whose constructor has not run, what ``content`` was taken from."""
    config, tensors = content["config"], content["tensors"]
    start_engine(engine, config, backend=backend, device=device)
    if config["backend"] == engine.backend and config["plan"] in engine.memory.backend.traits.plans:
        # the bits that follow are those of the plan
        engine.plan, engine.plan_reason = config["plan"], "the plan of the checkpoint"
    engine.write_tensors(_of_kind("parameter", tensors), "")
    memory = engine.memory
    for index in range(len(memory.states)):
        engine.write_tensors(_of_kind(f"state{index}", tensors), f".state{index}")
    gradients = _of_kind("gradient", tensors)
    if gradients:
        engine.write_tensors(gradients, "", "d")
    for name in ("counters", "hyper", "stats"):
        # older checkpoints have fewer statistics
        memory.backend.copy_into(memory.arrays[name][: len(tensors[name])], tensors[name])
    engine.best_parameters = _of_kind("best", tensors) or None
    engine.epochs_trained = config["epochs_trained"]
    if config["fit"] is not None:
        engine.fit_state = FitState.from_config(config["fit"])
        engine.history = engine.fit_state.history


def save_checkpoint(engine: Engine, path: str | Path, *, extra: Mapping[str, Any] | None = None) -> None:
    """Write the engine's state to ``path``, which holds a whole checkpoint at any moment.

    ``extra`` is what JSON can hold and comes back from ``read_extra``. Inside a callback of ``fit`` the position in
    the epoch is saved too: ``load_checkpoint(path).fit(..., resume=True)`` goes on from there. A symbolic link stays,
    and the file it points to is replaced.

    Raises ArgumentError or ArgumentTypeError for an impossible path or extra, DivergenceError where parameters are no
    longer finite, OSError from the disk; a checkpoint that was at ``path`` is then still there, whole.
    """
    from safetensors.numpy import save

    target = target_file(path)
    content = engine_content(engine, _checked_extra(extra))
    tensors = content["tensors"]
    check_finite(_of_kind("parameter", tensors), "checkpoint")
    config = json.dumps(content["config"])
    write_atomically(target, save(tensors, metadata={CONFIG: config, DIGEST: digest_of(config, tensors)}))


def target_file(path: str | Path) -> Path:
    """The file to write, behind any symbolic links."""
    check_path(path)
    target = Path(os.path.realpath(path))
    if target.exists() and not target.is_file():
        raise ArgumentError(f"path: {str(path)!r} is {what_it_is(target)}; expected a file, there already or new")
    if not target.parent.is_dir():
        folder = str(target.parent)
        raise ArgumentError(
            f"path: there is no folder {folder!r} for {target.name!r}; make it first: mkdir -p {folder}"
        )
    return target


def check_path(path: object) -> None:
    if not isinstance(path, str | os.PathLike):
        raise ArgumentTypeError(f"path: expected the path of a file, got {path!r}")


def what_it_is(path: str | os.PathLike[str]) -> str:
    return "a folder" if os.path.isdir(path) else "a device or pipe"


def _checked_extra(extra: Mapping[str, Any] | None) -> dict[str, Any]:
    if extra is None:
        return {}
    if not isinstance(extra, Mapping):
        raise ArgumentTypeError(f"extra: expected a mapping such as {{'epoch': 3}}, got {type(extra).__name__}")
    held = dict(extra)
    try:
        json.dumps(held)
    except (TypeError, ValueError, RecursionError) as error:
        raise ArgumentError(f"extra: expected what JSON can hold (str, numbers, lists, dicts): {error}") from error
    return held


def check_finite(parameters: Mapping[str, Array], kind: str) -> None:
    """DivergenceError if a ``kind`` of file would hold parameters that are no numbers."""
    for name, tensor in parameters.items():
        if not np.isfinite(tensor).all():
            raise DivergenceError(
                f"{name}: it holds NaN or infinite values, so no {kind} was written and the one before is kept; "
                "go on from that one with a lower learning rate, or with clip_norm=1.0"
            )


def write_atomically(path: Path, data: bytes) -> None:
    """Write a file so that ``path`` is at any moment the whole old file or the whole new one. Raises OSError.

    The data go to a file ``.{name}.*.tmp`` beside it first; one that is left over (after a SIGKILL) disturbs nobody.
    """
    # not tempfile: its files are for their owner only, these get the mode of any new file
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")
    try:
        with open(temporary, "xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
        raise
    if os.name == "posix":
        # the rename itself has to reach the disk
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def digest_of(config: str, tensors: Mapping[str, Array]) -> str:
    """SHA-256 over the configuration and every tensor's name, type, shape and bytes."""
    digest = hashlib.sha256(config.encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"\0{name}\0{tensor.dtype.str}\0{tensor.shape}\0".encode())
        digest.update(tensor.tobytes())
    return digest.hexdigest()


def read_file(path: str | Path, kind: str, writer: str) -> tuple[dict[str, str], dict[str, Array]]:
    """Metadata and tensors of a safetensors file that is to be a ``kind`` of file, made by ``writer``.

    Raises CheckpointError.
    """
    from safetensors import SafetensorError, safe_open

    check_path(path)
    if os.path.exists(path) and not os.path.isfile(path):
        what = what_it_is(path)
        raise CheckpointError(f"path: {str(path)!r} is {what}; expected a file that {writer} wrote")
    try:
        with safe_open(str(path), framework="numpy") as file:
            metadata = file.metadata() or {}
            names = file.keys()
            return metadata, {name: file.get_tensor(name) for name in names}
    except FileNotFoundError as error:
        raise CheckpointError(f"path: there is no {kind} {str(path)!r}; expected a file that {writer} wrote") from error
    except (OSError, SafetensorError, ValueError) as error:
        raise CheckpointError(f"path: {str(path)!r} is no readable {kind} ({error}); {MEND[kind]}") from error


def checked_config(
    path: str | Path, metadata: Mapping[str, str], tensors: Mapping[str, Array], *, kind: str, version: int
) -> dict[str, Any]:
    """The configuration in ``metadata``, if it and the tensors are what was written; CheckpointError if not."""
    text = metadata[CONFIG if kind == "checkpoint" else MODEL]
    if digest_of(text, tensors) != metadata.get(DIGEST):
        raise CheckpointError(f"path: {str(path)!r} is corrupted: its SHA-256 does not match; {MEND[kind]}")
    config: dict[str, Any] = json.loads(text)
    if config.get("format") != version:
        raise CheckpointError(
            f"path: {str(path)!r} has format {config.get('format')!r}, written by fusemlp {config.get('version')}; "
            f"this version reads format {version}"
        )
    return config


def read_content(path: str | Path) -> dict[str, Any]:
    """The checked content of a checkpoint, as ``engine_content`` made it. Raises CheckpointError."""
    metadata, tensors = read_file(path, "checkpoint", "save_checkpoint")
    if MODEL in metadata:
        raise CheckpointError(
            f"path: {str(path)!r} is a model that engine.save wrote, without the state of its training, and no "
            "checkpoint; use fusemlp.load(path)"
        )
    if CONFIG not in metadata or DIGEST not in metadata:
        raise CheckpointError(
            f"path: {str(path)!r} is a safetensors file, but no checkpoint of fusemlp; for parameters alone use "
            "load_state_dict(safetensors.numpy.load_file(path))"
        )
    return {
        "config": checked_config(path, metadata, tensors, kind="checkpoint", version=FORMAT),
        "tensors": tensors,
    }


def load_checkpoint(
    path: str | Path, *, backend: str = "auto", device: str | None = None, network: MLP | None = None
) -> Engine:
    """The engine that was saved, on any backend. With ``network`` the checkpoint must be of such a network.

    Raises CheckpointError if the file is missing, corrupted or of another network, BackendUnavailableError.
    """
    content = read_content(path)
    found = MLP.from_config(content["config"]["network"])
    if network is not None and not isinstance(network, MLP):
        raise ArgumentTypeError(f"network: expected an MLP such as MLP([784, 128, 10]), got {network!r}")
    if network is not None and network != found:
        raise CheckpointError(f"path: {str(path)!r} is of another network: expected {network!r}, it holds {found!r}")
    engine = Engine.__new__(Engine)
    restore_engine(engine, content, backend=backend, device=device)
    return engine


def read_extra(path: str | Path) -> dict[str, Any]:
    """The ``extra`` that was saved with a checkpoint. Raises CheckpointError."""
    extra: dict[str, Any] = read_content(path)["config"]["extra"]
    return extra
