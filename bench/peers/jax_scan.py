"""JAX, a whole epoch in one compiled program: ``jax.lax.scan`` over its steps."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bench.cases import Array, Case, Data
from bench.peers.jax_jit import JaxTrainer, State, train_step


def epoch_of(case: Case) -> Any:
    """Return a function (state, X, y, row order) -> (state, losses (steps,))."""

    def epoch(state: State, X: jax.Array, y: jax.Array, order: jax.Array) -> tuple[State, jax.Array]:
        def step(state: State, rows: jax.Array) -> tuple[State, jax.Array]:
            return train_step(case, state, X[rows], y[rows])

        return jax.lax.scan(step, state, order.reshape(-1, case.batch_size))

    return epoch


class ScanTrainer(JaxTrainer):
    """See ``peers.Trainer``."""

    def compile_step(self) -> Any:
        return jax.jit(epoch_of(self.case), donate_argnums=0)

    def train(self, epochs: int) -> None:
        for _ in range(epochs):
            self.losses(self.generator.permutation(self.case.rows)).mean()

    def losses(self, order: Array) -> Array:
        state, losses = self.step(self.state, self.X, self.y, jnp.asarray(order, dtype=jnp.int32))
        self.state = jax.block_until_ready(state)
        return np.asarray(losses)


def prepare(case: Case, data: Data) -> ScanTrainer:
    """See ``peers.prepare``."""
    return ScanTrainer(case, data)
