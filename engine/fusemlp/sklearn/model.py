"""An engine that belongs to an estimator, its parameters as scikit-learn lays them out; and estimators in files.

A file is a checkpoint of the estimator's engine, with its parameters and fitted attributes as JSON: ``fusemlp.load``
reads the network without the estimator.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from fusemlp.describe.description import FAMILIES, Description
from fusemlp.describe.losses import Loss, as_loss
from fusemlp.describe.network import MLP
from fusemlp.describe.optimizers import PLATEAU_START, Optimizer, PlateauState, Schedule
from fusemlp.engine import Engine, availability
from fusemlp.inputs.arrays import Array, is_sparse
from fusemlp.runtime.files import CHECKPOINT, reading_file
from fusemlp.runtime.programs import BoundProgram
from fusemlp.runtime.session import Session
from fusemlp.training.checkpoint import check_content, of_kind, read_content, save_checkpoint
from fusemlp.training.trainer import Trainer
from fusemlp_kernels.errors import ArgumentError, CheckpointError

# Most elements of sparse rows that a prediction may make dense at once: 32 MiB in float64.
DENSE_ELEMENTS = 1 << 22


@dataclass(frozen=True)
class Rates:
    """scikit-learn's learning rate: ``kind`` "constant", "invscaling", "adaptive", or "schedule" for one of fusemlp's.

    "none" is for L-BFGS, which leaves no optimizer to go on with. ``power`` is the exponent of "invscaling".
    """

    kind: str
    initial: float
    power: float


class Model:
    """``network`` with ``loss`` and ``optimizer`` on a backend; its learning rates follow ``schedule``.

    ``engine`` is one with the same arguments, as it was when new. A pickle holds the optimizer's state; the parameters
    are the estimator's ``coefs_`` and come back with ``load``. If the backend is missing then, NumPy takes its place.
    """

    def __init__(
        self,
        network: MLP,
        loss: Loss,
        optimizer: Optimizer,
        schedule: Schedule,
        rates: Rates,
        *,
        engine: Engine | None = None,
        **options: Any,
    ) -> None:
        self.arguments = (network, loss, optimizer)
        self.schedule, self.rates, self.options = schedule, rates, options
        self.plateau: PlateauState = PLATEAU_START
        self._start(engine)

    def _start(self, engine: Engine | None = None) -> None:
        network, loss, optimizer = self.arguments
        self.rule = optimizer.rule()
        self.engine = Engine(network, loss, optimizer, **self.options) if engine is None else engine
        self.engine.rates.follow(self.schedule, 1.0)
        # the type of the parameters on the host
        self.dtype = np.dtype(np.float64 if self.engine.precision == "fp64" else np.float32)
        # the loss of a launch of whole epochs
        self.loop_loss = replace(loss.spec(accuracy=False), reduction="mean")
        # the program of ``partial_fit``, with its inputs and batch size
        self.staged: tuple[Any, BoundProgram] | None = None

    @classmethod
    def restored(
        cls, content: Mapping[str, Any], schedule: Schedule, rates: Sequence[Any], plateau: PlateauState
    ) -> Model:
        """Return the model of a checkpoint's ``content``, as a pickle restores it."""
        config, tensors = content["config"], content["tensors"]
        optimizer = Optimizer.from_config(config["optimizer"])
        states = [f"state{index}" for index in range(optimizer.rule().state_count)]
        model = cls.__new__(cls)
        model.__setstate__(
            {
                "arguments": (MLP.from_config(config["network"]), Loss.from_config(config["loss"]), optimizer),
                "schedule": schedule,
                "rates": Rates(*rates),
                "plateau": plateau,
                "options": {name: config[name] for name in ("seed", "backend", "precision")},
                "states": [of_kind(state, tensors) for state in states],
                "counters": tensors["counters"],
                "hyper": tensors["hyper"],
            }
        )
        model.engine.memory.write(of_kind("parameter", tensors))
        return model

    def serves(self, network: MLP, loss: Loss, backend: str, precision: str) -> bool:
        """Return whether ``partial_fit`` can go on with this model."""
        known, options = self.arguments[1], (self.options["backend"], self.options["precision"])
        # of a function files have the name alone
        same = known == loss or known.to_config() == loss.to_config()
        return same and self.rates.kind != "none" and (self.arguments[0], *options) == (network, backend, precision)

    def load(self, coefs: Sequence[Any], intercepts: Sequence[Any], slopes: Sequence[Any] | None) -> None:
        """Set the parameters: coefs (K, N), intercepts (N,) and, for PReLU, slopes (1,) of each layer."""
        tensors = {}
        for layer, (weight, bias) in enumerate(zip(coefs, intercepts, strict=True)):
            tensors[f"{2 * layer}.weight"] = np.asarray(weight, self.dtype).T
            tensors[f"{2 * layer}.bias"] = np.asarray(bias, self.dtype)
            if slopes is not None and slopes[layer] is not None:
                tensors[f"{2 * layer + 1}.weight"] = np.asarray(slopes[layer], self.dtype)
        self.engine.memory.write(tensors)

    def parameters(self) -> tuple[list[Array], list[Array], list[Array | None]]:
        """Copies of coefs, intercepts and slopes, the inverse of ``load``."""
        tensors = self.engine.state_dict()
        layers = range(self.engine.network.layers)
        return (
            [tensors[f"{2 * layer}.weight"].T for layer in layers],
            [tensors[f"{2 * layer}.bias"] for layer in layers],
            [tensors.get(f"{2 * layer + 1}.weight") for layer in layers],
        )

    def ask(self, question: str, X: Any) -> Array:
        """Return the engine's ``predict``, ``predict_std`` (2, n, ...) or ``predict_proba`` of dense or sparse rows."""
        answer = getattr(self.engine.inference, question)
        if not is_sparse(X):
            return np.asarray(answer(X))
        rows = max(1, DENSE_ELEMENTS // max(1, X.shape[1]))
        X = X.tocsr()
        answers = [np.asarray(answer(X[start : start + rows])) for start in range(0, X.shape[0], rows)]
        # means and deviations lie side by side
        return np.concatenate(answers, axis=int(question == "predict_std"))

    def __getstate__(self) -> dict[str, Any]:
        memory = self.engine.memory
        return {name: getattr(self, name) for name in ("arguments", "schedule", "rates", "plateau", "options")} | {
            "states": [self.engine.memory.tensors(f"state{index}") for index in range(len(memory.states))],
            "counters": memory.backend.to_host(memory.counters),
            "hyper": memory.backend.to_host(memory.hyper),
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.arguments, self.rates = state["arguments"], state["rates"]
        if "schedule" in state:
            self.schedule = state["schedule"]
        else:
            # release 0.1 pickled the schedule's lengths, in updates, with the rule
            schedule = self.arguments[2].schedule
            lengths = [name for name in ("warmup", "steps") if hasattr(schedule, name)]
            self.schedule = replace(schedule, **{name: getattr(state["rule"].schedule, name) for name in lengths})
        self.plateau, self.options = state["plateau"], dict(state["options"])
        if availability().get(self.options["backend"]) is not None:
            exact = self.options["precision"] == "fp64"
            self.options |= {"backend": "numpy", "precision": "fp64" if exact else "fp32"}
        self._start()
        memory = self.engine.memory
        for index, tensors in enumerate(state["states"]):
            self.engine.memory.write(tensors, f"state{index}")
        memory.backend.copy_into(memory.counters, state["counters"])
        # older pickles lack the last number
        memory.backend.copy_into(memory.hyper[: len(state["hyper"])], state["hyper"])
        self.engine.rates.forget()


ENTRY = "estimator"
EstimatorT = TypeVar("EstimatorT")


def save_estimator(estimator: Any, engine: Trainer, path: str | Path, *, without: tuple[str, ...], **more: Any) -> None:
    """Write a fitted estimator; ``without``: attributes that the file has in another form, ``more`` what it has beside.

    ``callbacks`` and a RandomState are left out. Raises ArgumentError for a parameter that no file can hold, before
    anything is written, and what ``Engine.save_checkpoint`` raises.
    """
    parameters, drawn = estimator.get_params(deep=False), np.random.RandomState | np.random.Generator
    kept = {name: value for name, value in parameters.items() if name != "callbacks" and not isinstance(value, drawn)}
    fitted = {name: value for name, value in vars(estimator).items() if name not in {*parameters, *without}}
    entry = {"class": type(estimator).__name__, "parameters": _encoded_all(kept), "fitted": _encoded_all(fitted)}
    save_checkpoint(engine, path, extra={ENTRY: entry | _encoded_all(more)})


def read_estimator(cls: type[EstimatorT], path: str | Path) -> tuple[EstimatorT, dict[str, Any], dict[str, Any]]:
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
        estimator: Any = cls()
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
    value = as_loss(value) if name == "loss" and callable(value) else value
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
    if isinstance(value, Description) and value.family:
        return {value.family: value.to_config()}
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
    return FAMILIES[kind].from_config(content)
