"""fusemlp: ``Fleet.fit``, many models at once."""

from __future__ import annotations

import numpy as np

from bench.cases import Array, Case, Data, Parameters, model_of
from bench.peers.engine import optimizer_of, state_of
from fusemlp import MLP, Fleet


class FleetTrainer:
    """See ``peers.Trainer``. The time includes the checks and set-up of ``fit`` for each model."""

    def __init__(self, case: Case, data: Data) -> None:
        assert case.models is not None
        self.data, self.case = data, case
        self.fleet = Fleet(
            MLP(case.sizes, activation=case.activation, dropout=case.dropout),
            loss=case.loss,
            optimizer=optimizer_of(case),
            batch_size=case.batch_size,
            # One seed each, so that each model has its own row order.
            vary={"seed": range(case.models)},
            backend="numpy" if case.device == "cpu" else "auto",
            precision=case.precision,
        )
        for index, engine in enumerate(self.fleet.engines):
            engine.load_state_dict(state_of(model_of(data.parameters, index)))
        self.initial = [engine.memory.snapshot() for engine in self.fleet.engines]

    @property
    def chosen(self) -> str:
        """Return the backend and plan of the models."""
        return f"{self.fleet.engines[0].backend} {self.fleet.engines[0].plan}"

    def reset(self) -> None:
        for engine, snapshot in zip(self.fleet.engines, self.initial, strict=True):
            engine.restore(snapshot)

    def train(self, epochs: int) -> None:
        self.fleet.fit(self.data.X, self.data.y, epochs=epochs)

    def losses(self, order: Array) -> Array:
        # Epochs of one batch: the epoch's loss is the batch's, and the order of the rows does not matter.
        steps = []
        for rows in order.reshape(-1, self.case.batch_size):
            results = self.fleet.fit(self.data.X, self.data.y, epochs=1, rows=[rows] * len(self.fleet))
            steps.append([member.history.history["loss"][-1] for member in results.members])
        return np.array(steps)

    def parameters(self) -> Parameters:
        states = [engine.state_dict() for engine in self.fleet.engines]
        return [
            (
                np.stack([state[f"{2 * layer}.weight"] for state in states]),
                np.stack([state[f"{2 * layer}.bias"] for state in states]),
            )
            for layer in range(len(self.data.parameters))
        ]


def prepare(case: Case, data: Data) -> FleetTrainer:
    """See ``peers.prepare``."""
    return FleetTrainer(case, data)
