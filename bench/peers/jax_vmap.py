"""JAX, many models at once: ``jax.vmap`` of the compiled epoch over stacked parameters and row orders."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bench.cases import Array, Case, Data
from bench.peers.jax_jit import JaxTrainer, start
from bench.peers.jax_scan import epoch_of


class VmapTrainer(JaxTrainer):
    """See ``peers.Trainer``."""

    def compile_step(self) -> Any:
        return jax.jit(jax.vmap(epoch_of(self.case), in_axes=(0, None, None, 0)), donate_argnums=0)

    def reset(self) -> None:
        keys = jax.random.split(jax.random.key(0), self.case.models or 1)
        stacked = start(self.case, self.data.parameters, keys)
        self.state = stacked._replace(t=jnp.zeros(self.case.models, jnp.float32))

    def train(self, epochs: int) -> None:
        every = np.tile(np.arange(self.case.rows, dtype=np.int32), (self.case.models or 1, 1))
        for _ in range(epochs):
            self.run(self.generator.permuted(every, axis=1)).mean(axis=1)

    def losses(self, order: Array) -> Array:
        return self.run(np.tile(order, (self.case.models or 1, 1))).T

    def run(self, orders: Array) -> Array:
        """Make a pass over the rows of ``orders`` (models, rows); return the losses (models, steps)."""
        state, losses = self.step(self.state, self.X, self.y, jnp.asarray(orders, dtype=jnp.int32))
        self.state = jax.block_until_ready(state)
        return np.asarray(losses)


def prepare(case: Case, data: Data) -> VmapTrainer:
    """See ``peers.prepare``."""
    return VmapTrainer(case, data)
