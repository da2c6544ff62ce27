"""Estimators in files: a checkpoint of the estimator's engine, with its parameters and fitted attributes as JSON.

The file is an engine's checkpoint too: ``fusemlp.load`` reads the network without the estimator.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from fusemlp.describe.adversarial import FGSM, IBP, PGD, Attack
from fusemlp.describe.blocks import Normalisation, norm_from_config
from fusemlp.describe.description import from_config
from fusemlp.describe.losses import Loss, loss_from_config
from fusemlp.describe.network import Activation, activation_from_config
from fusemlp.describe.optimizers import Optimizer, optimizer_from_config
from fusemlp.describe.schedules import Schedule, schedule_from_config
from fusemlp.runtime.files import CHECKPOINT, reading_file
from fusemlp.runtime.session import Session
from fusemlp.training.checkpoint import check_content, read_content, save_checkpoint
from fusemlp.training.trainer import Trainer
from fusemlp_kernels.errors import ArgumentError, CheckpointError

ENTRY = "estimator"
_AGAINST: dict[str, type[Any]] = {one.kind: one for one in (FGSM, PGD, IBP)}


def _attack_of(config: Mapping[str, Any]) -> Attack | IBP:
    """Return the attack of a file; that of a training by TRADES, of an earlier release, is its PGD."""
    if config.get("kind") == "trades":
        shared = {name: value for name, value in config.items() if name != "beta"}
        config = PGD(config["eps"]).to_config() | shared | {"kind": PGD.kind}
    described: Attack | IBP = from_config("adversarial", _AGAINST, config)
    return described


DESCRIBED: dict[str, tuple[Any, Callable[[Mapping[str, Any]], Any]]] = {
    "activation": (Activation, activation_from_config),
    "norm": (Normalisation, norm_from_config),
    "loss": (Loss, loss_from_config),
    "optimizer": (Optimizer, optimizer_from_config),
    "schedule": (Schedule, schedule_from_config),
    "adversarial": (Attack | IBP, _attack_of),
}


def save(estimator: Any, engine: Trainer, path: str | Path, *, without: tuple[str, ...], **more: Any) -> None:
    """Write a fitted estimator; ``without``: attributes that the file has in another form, ``more`` what it has beside.

    ``callbacks`` and a RandomState are left out. Raises ArgumentError for a parameter that no file can hold, before
    anything is written, and what ``Engine.save_checkpoint`` raises.
    """
    parameters, drawn = estimator.get_params(deep=False), np.random.RandomState | np.random.Generator
    kept = {name: value for name, value in parameters.items() if name != "callbacks" and not isinstance(value, drawn)}
    fitted = {name: value for name, value in vars(estimator).items() if name not in {*parameters, *without}}
    entry = {"class": type(estimator).__name__, "parameters": _encoded_all(kept), "fitted": _encoded_all(fitted)}
    save_checkpoint(engine, path, extra={ENTRY: entry | _encoded_all(more)})


def read(cls: Any, path: str | Path) -> tuple[Any, dict[str, Any], dict[str, Any]]:
    """Return a file's estimator without engine, what is beside it, and its content; CheckpointError for another."""
    content = read_content(path)
    with reading_file(path, CHECKPOINT):
        check_content(Session.__new__(Session), content)
        extra, version = content["config"]["extra"], content["config"]["version"]
        if not isinstance(extra.get(ENTRY), Mapping):
            raise CheckpointError(f"path: {str(path)!r} holds an engine, and no estimator; use fusemlp.load(path)")
        entry = dict(extra[ENTRY])
        name, parameters, fitted = entry.pop("class"), _decoded_all(entry.pop("parameters")), entry.pop("fitted")
        if name != cls.__name__:
            raise CheckpointError(f"path: {str(path)!r} holds a {name}; use {name}.load(path)")
        estimator = cls()
        unknown = sorted(set(parameters) - set(estimator.get_params(deep=False)))
        if unknown:
            raise CheckpointError(
                f"path: {str(path)!r} has the parameter {unknown[0]!r}, which this version of fusemlp does not know; "
                f"it was written by {version}"
            )
        estimator.set_params(**parameters)
        vars(estimator).update(_decoded_all(fitted))
        return estimator, _decoded_all(entry), content


def _encoded_all(values: Mapping[str, Any]) -> dict[str, Any]:
    return {name: _encoded(name, value) for name, value in values.items()}


def _decoded_all(values: Mapping[str, Any]) -> dict[str, Any]:
    return {name: _decoded(value) for name, value in values.items()}


def _encoded(name: str, value: Any) -> Any:
    """Return a value as JSON holds it; what is no number, text, flag, None or list becomes ``{kind: content}``."""
    value = value.item() if isinstance(value, np.generic) else value
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, list):
        return [_encoded(name, item) for item in value]
    if isinstance(value, tuple | range):
        return {"tuple": [_encoded(name, item) for item in value]}
    if isinstance(value, Mapping):
        return {"dict": [[_encoded(name, item) for item in pair] for pair in value.items()]}
    if isinstance(value, np.ndarray):
        return {"array": [value.dtype.str, _encoded(name, value.tolist())]}
    for kind, (base, _) in DESCRIBED.items():
        if isinstance(value, base):
            return {kind: value.to_config()}
    raise ArgumentError(f"{name}: a file cannot hold {value!r}; use joblib.dump, which pickles it")


def _decoded(value: Any) -> Any:
    if isinstance(value, list):
        return [_decoded(one) for one in value]
    if not isinstance(value, Mapping):
        return value
    ((kind, content),) = value.items()
    if kind == "tuple":
        return tuple(map(_decoded, content))
    if kind == "dict":
        return {_decoded(key): _decoded(one) for key, one in content}
    if kind == "array":
        dtype, values = content
        return np.array(_decoded(values), dtype)
    return DESCRIBED[kind][1](content)
