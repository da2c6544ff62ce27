"""An engine that belongs to an estimator: its parameters as scikit-learn lays them out, its optimizer's memory."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from fusemlp.describe.losses import Loss, loss_from_config
from fusemlp.describe.network import MLP
from fusemlp.describe.optimizers import Optimizer, optimizer_from_config
from fusemlp.describe.schedules import PLATEAU_START, PlateauState, Schedule
from fusemlp.engine import Engine, availability
from fusemlp.inputs.arrays import Array, is_sparse
from fusemlp.runtime.programs import BoundProgram

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
        # held between loading parameters and predicting with them: threads share the memory
        self.lock = threading.Lock()

    @classmethod
    def restored(
        cls, content: Mapping[str, Any], schedule: Schedule, rates: Sequence[Any], plateau: PlateauState
    ) -> Model:
        """Return the model of a checkpoint's ``content``, as a pickle restores it."""
        config, tensors = content["config"], content["tensors"]
        optimizer = optimizer_from_config(config["optimizer"])
        states = [f"state{index}/" for index in range(optimizer.rule().state_count)]
        model = cls.__new__(cls)
        model.__setstate__(
            {
                "arguments": (MLP.from_config(config["network"]), loss_from_config(config["loss"]), optimizer),
                "schedule": schedule,
                "rates": Rates(*rates),
                "plateau": plateau,
                "options": {name: config[name] for name in ("seed", "backend", "precision")},
                "states": [_named(state, tensors) for state in states],
                "counters": tensors["counters"],
                "hyper": tensors["hyper"],
            }
        )
        model.engine.memory.write(_named("parameter/", tensors))
        return model

    def serves(self, network: MLP, loss: Loss, backend: str, precision: str) -> bool:
        """Return whether ``partial_fit`` can go on with this model."""
        mine = (*self.arguments[:2], self.options["backend"], self.options["precision"])
        return self.rates.kind != "none" and mine == (network, loss, backend, precision)

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
        """Return the engine's ``predict`` or ``predict_proba`` of dense or sparse rows."""
        answer = getattr(self.engine, question)
        if not is_sparse(X):
            return np.asarray(answer(X))
        rows = max(1, DENSE_ELEMENTS // max(1, X.shape[1]))
        X = X.tocsr()
        return np.concatenate([answer(X[start : start + rows]) for start in range(0, X.shape[0], rows)])

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


def _named(start: str, tensors: Mapping[str, Array]) -> dict[str, Array]:
    """Return the tensors of a checkpoint whose names have this start, without it."""
    return {name.removeprefix(start): tensor for name, tensor in tensors.items() if name.startswith(start)}
