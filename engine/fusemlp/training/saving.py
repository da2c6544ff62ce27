"""A model in one safetensors file: the parameters by torch's names, the architecture as JSON beside them.

Any reader of safetensors gets the parameters, as they are in the plain ``nn.Sequential`` of Linear layers and
activations: ``0.weight`` (out, in), ``0.bias``, ``2.weight``, ..., and ``1.weight`` (1,) for the slope of a PReLU. The
metadata entry ``fusemlp_model`` describes network, loss and optimizer, so that ``load`` makes an engine of the file.
What training has left behind besides the parameters (moments, counters, history) is a checkpoint's to keep.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from fusemlp.engine import Engine
from fusemlp.training.checkpoint import (
    CONFIG,
    DIGEST,
    MODEL,
    check_finite,
    checked_config,
    description,
    digest_of,
    read_content,
    read_file,
    restore_engine,
    start_engine,
    target_file,
    write_atomically,
)
from fusemlp_kernels.errors import ArgumentError, ArgumentTypeError, CheckpointError

FORMAT = 1
# "format" says to other readers that names and layouts are torch's.
RESERVED = {MODEL, DIGEST, CONFIG, "format"}


def save(engine: Engine, path: str | Path, *, metadata: Mapping[str, str] | None = None) -> None:
    """Write parameters and description to ``path``, which holds a whole file at any moment.

    ``metadata`` are entries of your own, from str to str, for ``safetensors.safe_open(path).metadata()``.

    Raises ArgumentError or ArgumentTypeError for an impossible path or metadata, DivergenceError where parameters are
    no longer finite, OSError from the disk; a file that was at ``path`` is then still there, whole.
    """
    target = target_file(path)
    write_atomically(target, model_bytes(engine, metadata))


def model_bytes(engine: Engine, metadata: Mapping[str, str] | None = None) -> bytes:
    """What ``save`` writes."""
    from safetensors.numpy import save as to_bytes

    own = checked_metadata(metadata, RESERVED)
    tensors = engine.state_dict()
    check_finite(tensors, "model")
    config = json.dumps({"format": FORMAT, **description(engine)})
    entries = {MODEL: config, DIGEST: digest_of(config, tensors), "format": "pt", **own}
    return to_bytes(tensors, metadata=entries)


def checked_metadata(given: Mapping[str, str] | None, reserved: Collection[str]) -> dict[str, str]:
    """A user's own entries, none of which has a ``reserved`` name."""
    if given is None:
        return {}
    if not isinstance(given, Mapping):
        raise ArgumentTypeError(f"metadata: expected a mapping from str to str, got {type(given).__name__}")
    for name, value in given.items():
        if not isinstance(name, str) or not isinstance(value, str):
            raise ArgumentTypeError(
                f"metadata: a file keeps str to str only, got {name!r}: {value!r}; use json.dumps for more"
            )
    taken = sorted(name for name in reserved if name in given)
    if taken:
        raise ArgumentError(f"metadata: the names {', '.join(taken)} are the file's own; choose others")
    return dict(given)


def load(path: str | Path, *, backend: str = "auto", device: str | None = None, precision: str | None = None) -> Engine:
    """The engine of a file that ``engine.save`` wrote, on any backend: ready to predict, and to be trained on.

    Its optimizer begins anew. A checkpoint is loaded too, with the state of its training: as ``load_checkpoint`` does.
    ``precision`` takes the place of the one that was saved, for a machine that does not have that one.

    Raises CheckpointError if the file is missing, corrupted or another's, BackendUnavailableError.
    """
    changed: dict[str, Any] = {} if precision is None else {"precision": precision}
    metadata, tensors = read_file(path, "model", "engine.save")
    engine = Engine.__new__(Engine)
    if MODEL in metadata:
        config = checked_config(path, metadata, tensors, kind="model", version=FORMAT)
        start_engine(engine, {**config, **changed}, backend=backend, device=device)
        engine.load_state_dict(tensors)
        return engine
    if CONFIG in metadata:
        content = read_content(path)
        content["config"] |= changed
        restore_engine(engine, content, backend=backend, device=device)
        return engine
    raise CheckpointError(
        f"path: {str(path)!r} is a safetensors file that does not say which network it is of; make the engine, "
        "Engine(MLP([...])), and then engine.load_state_dict(safetensors.numpy.load_file(path))"
    )
