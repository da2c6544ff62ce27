"""scikit-learn, many models: one ``fit`` after another."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from bench.cases import Array, Case, Data, Parameters, model_of
from bench.peers.sklearn_mlp import SklearnTrainer


class LoopTrainer:
    """See ``peers.Trainer``."""

    def __init__(self, case: Case, data: Data) -> None:
        single = replace(case, models=None)
        self.trainers = [
            SklearnTrainer(single, replace(data, parameters=model_of(data.parameters, index)))
            for index in range(case.models or 1)
        ]

    def reset(self) -> None:
        for trainer in self.trainers:
            trainer.reset()

    def train(self, epochs: int) -> None:
        for trainer in self.trainers:
            trainer.train(epochs)

    def losses(self, order: Array) -> Array:
        return np.stack([trainer.losses(order) for trainer in self.trainers], axis=1)

    def parameters(self) -> Parameters:
        layers = zip(*(trainer.parameters() for trainer in self.trainers), strict=True)
        return [(np.stack([weight for weight, _ in one]), np.stack([bias for _, bias in one])) for one in layers]


def prepare(case: Case, data: Data) -> LoopTrainer:
    """See ``peers.prepare``."""
    return LoopTrainer(case, data)
