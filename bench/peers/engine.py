"""fusemlp: ``Engine.fit``, with its own choice of plan or a given one."""

from __future__ import annotations

from typing import Any

import numpy as np

from bench.cases import Array, Case, Data, Parameters
from fusemlp import MLP, SGD, Adam, Engine
from fusemlp.describe.optimizers import Optimizer
from fusemlp_kernels.contract import LAST_LOSS


class _Recorder:
    """A callback that reads the loss of each batch."""

    def __init__(self) -> None:
        self.losses: list[float] = []

    def on_batch_end(self, engine: Engine, batch: int) -> None:
        self.losses.append(float(engine.memory.stats[LAST_LOSS]))


def optimizer_of(case: Case) -> Optimizer:
    """Return the case's optimizer, with torch's defaults."""
    return Adam(case.learning_rate) if case.optimizer == "adam" else SGD(case.learning_rate)


def state_of(parameters: Parameters) -> dict[str, Array]:
    """Return parameters by the names of ``Engine.state_dict``."""
    return {
        f"{2 * layer}.{kind}": array
        for layer, pair in enumerate(parameters)
        for kind, array in zip(("weight", "bias"), pair, strict=True)
    }


class EngineTrainer:
    """See ``peers.Trainer``. The time includes the checks and set-up of ``fit``."""

    def __init__(self, case: Case, data: Data, backend: str, plan: str) -> None:
        self.data = data
        self.engine = Engine(
            MLP(case.sizes, activation=case.activation, dropout=case.dropout),
            loss=case.loss,
            optimizer=optimizer_of(case),
            batch_size=case.batch_size,
            backend=backend,
            precision=case.precision,
            plan=plan,
        )
        self.engine.load_state_dict(state_of(data.parameters))
        self.initial = self.engine.memory.snapshot()
        # on a card the data stays there, as that of the peers does
        self.X, self.y = map(self.engine.memory.backend.from_host, (data.X, data.y))

    @property
    def chosen(self) -> str:
        """Return the backend and plan."""
        return f"{self.engine.backend} {self.engine.plan}"

    def reset(self) -> None:
        self.engine.restore(self.initial)

    def train(self, epochs: int) -> None:
        self.engine.fit(self.X, self.y, epochs=epochs)

    def losses(self, order: Array) -> Array:
        recorder = _Recorder()
        self.engine.fit(self.data.X[order], self.data.y[order], epochs=1, shuffle=False, callbacks=[recorder])
        return np.array(recorder.losses)

    def parameters(self) -> Parameters:
        state: dict[str, Any] = self.engine.state_dict()
        return [
            (state[f"{2 * layer}.weight"], state[f"{2 * layer}.bias"]) for layer in range(len(self.data.parameters))
        ]


def prepare(case: Case, data: Data, backend: str = "auto", plan: str = "auto") -> EngineTrainer:
    """See ``peers.prepare``."""
    if backend == "auto" and case.device == "cpu":
        backend = "numpy"
    return EngineTrainer(case, data, backend, plan)
