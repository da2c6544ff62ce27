"""Checkpoints: everything that training needs to continue bit for bit, in one safetensors file.

The file is written beside its final name, synchronised to the disk and renamed. So the name always holds a whole
checkpoint, the old or the new one. A SHA-256 protects its content.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from fusemlp.runtime.files import (
    CONFIG,
    DIGEST,
    MODEL,
    check_finite,
    checked_config,
    digest_of,
    read_file,
    target_file,
    write_atomically,
)
from fusemlp.runtime.session import Session
from fusemlp.training.history import FitState
from fusemlp_kernels.errors import ArgumentError, ArgumentTypeError, CheckpointError

Array = np.ndarray[Any, Any]

FORMAT = 2


def engine_content(engine: Session, extra: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Return the content of a checkpoint: "config", JSON-able, and "tensors", NumPy arrays by name.

    Tensors have the parameters' names and no padding of a backend, so that another backend can continue.
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
        **engine.description(),
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


def restore_engine(engine: Session, content: Mapping[str, Any], *, backend: str, device: str | None) -> None:
    """Restore ``engine``, whose constructor has not run, from ``content``."""
    config, tensors = content["config"], content["tensors"]
    engine.start_from(config, backend=backend, device=device)
    if config["backend"] == engine.backend and config["plan"] in engine.memory.backend.traits.plans:
        # The bits of later steps depend on the plan.
        engine.plan, engine.plan_reason = config["plan"], "the plan of the checkpoint"
    engine.write_tensors(_of_kind("parameter", tensors), "")
    memory = engine.memory
    for index in range(len(memory.states)):
        engine.write_tensors(_of_kind(f"state{index}", tensors), f".state{index}")
    gradients = _of_kind("gradient", tensors)
    if gradients:
        engine.write_tensors(gradients, "", "d")
    for name in ("counters", "hyper", "stats"):
        # Older checkpoints have fewer statistics.
        memory.backend.copy_into(memory.arrays[name][: len(tensors[name])], tensors[name])
    engine.best_parameters = _of_kind("best", tensors) or None
    engine.epochs_trained = config["epochs_trained"]
    if config["fit"] is not None:
        engine.fit_state = FitState.from_config(config["fit"])
        engine.history = engine.fit_state.history


def save_checkpoint(engine: Session, path: str | Path, *, extra: Mapping[str, Any] | None = None) -> None:
    """Write the engine's state to ``path`` atomically.

    ``extra`` is a JSON-able mapping; ``read_extra`` returns it. Inside a callback of ``fit`` the position in the epoch
    is saved too: ``load_checkpoint(path).fit(..., resume=True)`` continues from there. A symbolic link stays, and its
    target is replaced.

    Raises ArgumentError or ArgumentTypeError for an impossible path or extra, DivergenceError if parameters are no
    longer finite, OSError from the disk; an older checkpoint at ``path`` then stays intact.
    """
    from safetensors.numpy import save

    target = target_file(path)
    content = engine_content(engine, _checked_extra(extra))
    tensors = content["tensors"]
    check_finite(_of_kind("parameter", tensors), "checkpoint")
    config = json.dumps(content["config"])
    write_atomically(target, save(tensors, metadata={CONFIG: config, DIGEST: digest_of(config, tensors)}))


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


def read_content(path: str | Path) -> dict[str, Any]:
    """Return the checked content of a checkpoint, as from ``engine_content``. Raises CheckpointError."""
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


def read_extra(path: str | Path) -> dict[str, Any]:
    """Return the ``extra`` of a checkpoint. Raises CheckpointError."""
    extra: dict[str, Any] = read_content(path)["config"]["extra"]
    return extra
