"""fusemlp: ``Engine.fit``."""

from __future__ import annotations

from bench.cases import Array, Case, Data
from fusemlp import MLP, SGD, Engine


class EngineTrainer:
    """See ``peers.Trainer``. What ``fit`` checks and sets up before the first epoch is part of the time."""

    def __init__(self, case: Case, data: Data) -> None:
        self.data = data
        self.engine = Engine(
            MLP(case.sizes), loss="cross_entropy", optimizer=SGD(case.learning_rate), batch_size=case.batch_size
        )
        self.initial = {
            f"{2 * layer}.{kind}": array
            for layer, pair in enumerate(data.parameters)
            for kind, array in zip(("weight", "bias"), pair, strict=True)
        }
        self.reset()

    def reset(self) -> None:
        self.engine.load_state_dict(self.initial)

    def train(self, epochs: int) -> None:
        self.engine.fit(self.data.X, self.data.y, epochs=epochs)

    def train_in_order(self, order: Array) -> None:
        self.engine.fit(self.data.X, self.data.y, epochs=1, row_order=lambda epoch: order)

    def parameters(self) -> list[tuple[Array, Array]]:
        state = self.engine.state_dict()
        return [
            (state[f"{2 * layer}.weight"], state[f"{2 * layer}.bias"]) for layer in range(len(self.data.parameters))
        ]


def prepare(case: Case, data: Data) -> EngineTrainer:
    """See ``peers.prepare``."""
    return EngineTrainer(case, data)
