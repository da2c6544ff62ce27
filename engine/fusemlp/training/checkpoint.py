"""Checkpoints: everything that training needs to continue bit for bit, in one safetensors file.

The file is written beside its final name, synchronised to the disk and renamed. So the name always holds a whole
checkpoint, the old or the new one. A SHA-256 protects its content.

Save a model as one safetensors file: the parameters by torch's names, and the architecture as JSON.

Any reader of safetensors gets the parameters of the same ``nn.Sequential`` of Linear layers and activations:
``0.weight`` (out, in), ``0.bias``, ``2.weight``, ..., and ``1.weight`` (1,) for the slope of a PReLU. The metadata
entry ``fusemlp_model`` describes network, loss and optimizer, for ``load``; a checkpoint has the training's state too.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from fusemlp.describe.checks import as_count
from fusemlp.describe.description import Machine, stored
from fusemlp.inputs.arrays import Array
from fusemlp.runtime import files
from fusemlp.runtime.files import CHECKPOINT, DIGEST, MODEL, reading_file, target_file, to_bytes, write_atomically
from fusemlp.runtime.plans import ASKED, has_plan, was_asked
from fusemlp.runtime.scaling import MEAN, SCALE
from fusemlp.runtime.session import Session
from fusemlp.training.trainer import FitState, Trainer
from fusemlp_kernels.errors import ArgumentError, ArgumentTypeError, CheckpointError


def engine_content(engine: Trainer, extra: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Return the content of a checkpoint: "config", JSON-able, and "tensors", NumPy arrays by name.

    Tensors have the parameters' names and no padding of a backend, so that another backend can continue.
    """
    memory = engine.memory
    kinds = {kind: memory.tensors(arena) for kind, arena in _kinds(engine).items()}
    kinds["best"] = engine.best_parameters or {}
    kinds["input"] = engine.scaling.tensors
    kinds["merged"] = {} if engine.merged_biases is None else {"bias": engine.merged_biases}
    tensors = {f"{kind}/{name}": tensor for kind, named in kinds.items() for name, tensor in named.items()}
    for name in ("counters", "hyper", "stats"):
        tensors[name] = memory.backend.to_host(memory.arrays[name])
    config = {
        "format": CHECKPOINT.version,
        **engine.description(),
        "backend": engine.backend,
        "plan": engine.plan,
        "plan_asked": was_asked(engine.plan_reason),
        "epochs_trained": engine.epochs_trained,
        "fit": None if engine.fit_state is None else asdict(engine.fit_state),
        "extra": dict(extra or {}),
    }
    return {"config": config, "tensors": tensors}


def _kinds(engine: Trainer) -> dict[str, str]:
    """Return the kinds of tensors of the training, each with its flat array in memory."""
    states = engine.memory.state_names
    gradients = {"gradient": "grads"} if engine.optimizer.accumulate > 1 else {}
    return {"parameter": "params", **dict(zip(states, states, strict=True)), **gradients}


def of_kind(kind: str, tensors: Mapping[str, Array]) -> dict[str, Array]:
    """Return the tensors of a ``kind``, by their names without it."""
    start = f"{kind}/"
    return {name.removeprefix(start): tensor for name, tensor in tensors.items() if name.startswith(start)}


def check_content(engine: Session, content: Mapping[str, Any]) -> None:
    """Let ``engine`` be described by ``content``, whose tensors must be those of such an engine."""
    tensors: Mapping[str, Array] = content["tensors"]
    engine.describe_from(content["config"])
    net, shapes = engine.network, engine.network.parameter_shapes()
    if content.get("kind") == MODEL:
        files.check_tensors(tensors, shapes)
        return
    kinds = ["parameter", *(f"state{index}" for index in range(engine.optimizer.rule().state_count))]
    kinds += ["gradient"] if engine.optimizer.accumulate > 1 else []
    kinds += ["best"] if of_kind("best", tensors) else []
    expected = {f"{kind}/{name}": shape for kind in kinds for name, shape in shapes.items()}
    expected |= {f"input/{name}": (net.sizes[0],) for name in (MEAN, SCALE) if of_kind("input", tensors)}
    expected |= {name: (len(tensors[name]), net.sizes[-1]) for name in ("merged/bias",) if name in tensors}
    expected |= {name: (len(tensors[name]),) for name in ("hyper", "stats")}
    files.check_tensors(tensors, expected)
    counters = tensors["counters"]
    if counters.dtype != np.int64 or counters.ndim != 1 or (counters < 0).any():
        raise ArgumentError(f"counters: expected a row of whole numbers of at least 0, got {counters}")


def restore_engine(
    engine: Trainer, content: Mapping[str, Any], *, backend: str, device: str | None, precision: str | None = None
) -> None:
    """Restore ``engine``, whose constructor has not run, from ``content``."""
    config, tensors = content["config"], content["tensors"]
    misfits = partial(reading_file, content.get("path"), content.get("kind", CHECKPOINT))
    with misfits():
        check_content(engine, content)
    # the caller's arguments have errors of their own
    engine.start(Machine(backend, device, engine.precision if precision is None else precision))
    with misfits():
        if content.get("kind") == MODEL:
            engine.load_state_dict(tensors)
        else:
            _restore_training(engine, config, tensors)


def _restore_training(engine: Trainer, config: Mapping[str, Any], tensors: Mapping[str, Array]) -> None:
    plan, traits = config["plan"], engine.memory.backend.traits
    if config["backend"] == engine.backend and has_plan(traits, plan, engine.network, engine.precision):
        # The bits of later steps depend on the plan, and on its parts of the gradients.
        asked = f"{ASKED} when the checkpoint's engine was made" if config.get("plan_asked") else ""
        engine.plan, engine.plan_reason = plan, asked or "the plan of the checkpoint"
        engine.make_room_for(engine.batch_size)
    for kind, arena in _kinds(engine).items():
        engine.memory.write(of_kind(kind, tensors), arena)
    engine.scaling.take_tensors(of_kind("input", tensors))
    memory = engine.memory
    for name in ("counters", "hyper", "stats"):
        # Older checkpoints have fewer statistics.
        memory.backend.copy_into(memory.arrays[name][: len(tensors[name])], tensors[name])
    engine.best_parameters = of_kind("best", tensors) or None
    engine.merged = tensors.get("merged/bias")
    engine.epochs_trained = as_count("epochs_trained", config["epochs_trained"], minimum=0)
    if config["fit"] is not None:
        engine.fit_state = state = stored("fit", config["fit"], FitState)
        engine.history = state.history


def save_checkpoint(engine: Trainer, path: str | Path, *, extra: Mapping[str, Any] | None = None) -> None:
    """Write the engine's state to ``path`` atomically; see ``Engine.save_checkpoint``."""
    files.check_ending(path)
    # the folder may be on the machine of rank 0 alone
    target = target_file(path) if engine.ranks.leads else None
    content = checkpoint_bytes(engine, extra)
    if target is not None:
        write_atomically(target, content)


def checkpoint_bytes(engine: Trainer, extra: Mapping[str, Any] | None = None) -> bytes:
    """Return the content of the file of ``save_checkpoint``; DivergenceError if the parameters are not finite."""
    content = engine_content(engine, _checked_extra(extra))
    files.check_finite(of_kind("parameter", content["tensors"]), CHECKPOINT.name)
    return to_bytes(CHECKPOINT, content["config"], content["tensors"])


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
    metadata, tensors = files.read_file(path, CHECKPOINT)
    if MODEL.entry in metadata:
        raise CheckpointError(
            f"path: {str(path)!r} is a model that engine.save wrote, without the state of its training, and no "
            "checkpoint; use fusemlp.load(path)"
        )
    if CHECKPOINT.entry not in metadata or DIGEST not in metadata:
        raise CheckpointError(
            f"path: {str(path)!r} is a safetensors file, but no checkpoint of fusemlp; for parameters alone use "
            "load_state_dict(safetensors.numpy.load_file(path))"
        )
    return files.checked_content(path, metadata, tensors, CHECKPOINT)


def read_extra(path: str | Path) -> dict[str, Any]:
    """Return the ``extra`` of a checkpoint. Raises CheckpointError."""
    content = read_content(path)
    with reading_file(path, CHECKPOINT):
        extra: dict[str, Any] = stored("extra", content["config"]["extra"], dict[str, Any])
    return extra


# "format" tells other readers that names and layouts are torch's.
RESERVED = {MODEL.entry, DIGEST, CHECKPOINT.entry, "format"}


def save(engine: Session, path: str | Path, *, metadata: Mapping[str, str] | None = None) -> None:
    """Write parameters and description to ``path`` atomically; see ``Engine.save``."""
    files.check_ending(path)
    target = target_file(path)
    content = model_bytes(engine, metadata)
    if engine.ranks.leads:
        write_atomically(target, content)


def model_bytes(engine: Session, metadata: Mapping[str, str] | None = None) -> bytes:
    """Return the content of the file of ``save``."""
    own = files.checked_metadata(metadata, RESERVED)
    tensors = engine.state_dict()
    files.check_finite(tensors, MODEL.name)
    return to_bytes(MODEL, engine.description(), tensors, **{"format": "pt", **own})
