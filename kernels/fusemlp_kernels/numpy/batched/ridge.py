"""The penalty of scikit-learn's MLPs, and its divisors of the loss: see ``contract.Ridge``."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from fusemlp_kernels.contract import BATCH_LOSSES, LAST_LOSS, NORM_SUM, PENALTIES, Ridge
from fusemlp_kernels.numpy import blas
from fusemlp_kernels.numpy.activations import Array
from fusemlp_kernels.numpy.batched.common import Models


class Ridges:
    """The ridges of a crew whose gradients by the outputs are dz (members, height, N)."""

    def __init__(self, models: Models, members: Sequence[int], dz: Array, dslopes: Array, stats: Array) -> None:
        self._dz, self._dslopes = dz, dslopes
        self._ridges = [models.ridges[member] for member in members]
        # the losses themselves divide by so many times the sum of the row weights
        self._usual = 1.0 if models.losses[members[0]].kind == "cross_entropy" else float(dz.shape[2])
        self._divisors = [self._usual if ridge.divisor is None else ridge.divisor for ridge in self._ridges]
        factors = np.array([self._usual / divisor for divisor in self._divisors], np.float64).astype(dz.dtype)
        self._factors = factors.reshape(-1, 1)
        self._statistic = list(stats)
        self._shares = [0.0] * len(members)
        self._weights: list[list[tuple[Array, Callable[[float], None], Array]]] = []
        for member in () if self.usual else members:
            trained = models.trained(member)
            stretches = [
                slice(layer.w, layer.w + layer.inputs * layer.outputs)
                for layer in models.layers[member]
                if layer.w in trained
            ]
            pairs = [(models.params[member, one], models.gradients[member, one]) for one in stretches]
            self._weights.append([(w, blas.axpy(w, g), np.empty(w.shape)) for w, g in pairs])

    @property
    def usual(self) -> bool:
        """Whether there is nothing to do."""
        return all(ridge == Ridge() for ridge in self._ridges)

    def around(self, loss: Callable[[Sequence[int]], None]) -> Callable[[Sequence[int]], None]:
        """The loss, its gradient and its account, divided by what the ridges say."""

        def run(counts: Sequence[int]) -> None:
            before = [(stats[NORM_SUM], stats[BATCH_LOSSES]) for stats in self._statistic]
            for stats in self._statistic:
                stats[NORM_SUM] = 0.0
            loss(counts)
            np.multiply(self._dz, self._factors[:, :, None], out=self._dz)
            np.multiply(self._dslopes, self._factors, out=self._dslopes)
            for place, (stats, divisor) in enumerate(zip(self._statistic, self._divisors, strict=True)):
                self._shares[place] = stats[NORM_SUM] / self._usual
                norms, losses = before[place]
                stats[NORM_SUM] = norms + self._shares[place] * divisor
                stats[LAST_LOSS] *= self._usual / divisor
                stats[BATCH_LOSSES] = losses + stats[LAST_LOSS] * counts[place]

        return run

    def penalise(self, counts: Sequence[int]) -> None:
        """Add the penalties' gradients to those of the batch, and themselves to the account."""
        for place, (ridge, shares) in enumerate(zip(self._ridges, self._shares, strict=True)):
            if not ridge.strength or not shares:
                continue
            squares, factor = 0.0, ridge.strength / shares
            for w, add, scratch in self._weights[place]:
                np.multiply(w, w, out=scratch)
                squares += float(scratch.sum())
                add(factor)
            self._statistic[place][PENALTIES] += 0.5 * factor * squares * counts[place]
