"""Divergence: finding a loss that is not finite, and going back to the state before it."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np

from fusemlp_kernels.contract import LOSS_SUM
from fusemlp_kernels.errors import DivergenceError

if TYPE_CHECKING:
    from fusemlp.runtime.session import Session
    from fusemlp.training.history import FitState

Array = np.ndarray[Any, Any]

# Larger features are not standardised, and then the loss of most networks overflows.
LARGE_FEATURE = 100.0


class Rewind:
    """Keeps the state of ``engine``, which trains on X (n, K), before each launch, and goes back to it."""

    def __init__(self, engine: Session, X: Any) -> None:
        self.engine, self.X = engine, X
        self._good: dict[str, Array] | None = None

    def keep(self) -> None:
        """Keep the state as it is now."""
        self._good = self.engine.snapshot(self._good)

    def go_back(self) -> None:
        """Return to the state that was kept."""
        assert self._good is not None
        self.engine.restore(self._good)

    def is_finite(self, accounts: Array) -> bool:
        """Whether the losses of the epochs in ``accounts`` (epochs, STATS), and the parameters now, are numbers.

        Raises DivergenceError where no loss scale of fp16 works any more.
        """
        memory = self.engine.memory
        self.engine.check_scaling()
        return all(map(math.isfinite, (*accounts[:, LOSS_SUM].tolist(), *memory.backend.extent(memory.params))))

    def diverged(self, state: FitState) -> DivergenceError:
        """Go back, and return an error that names the likely cause; ``state`` stands at the epoch that diverged."""
        rate = self.engine.learning_rate
        self.go_back()
        largest = self.engine.largest(self.X)
        if largest > LARGE_FEATURE:
            cause = f"features as large as {largest:.3g} were not scaled: standardise them (mean 0, variance 1)"
        else:
            lower = min(rate / 10, 0.1)
            cause = f"a learning rate of {rate:.3g} is too high for this network: try {lower:.3g}, or clip_norm=1.0"
        state.history.stopped = f"the loss became NaN or infinite in epoch {state.epoch + 1}"
        return DivergenceError(
            f"loss: it became NaN or infinite in epoch {state.epoch + 1}. Likely cause: {cause}. "
            "The engine is back at the state before that epoch"
        )
