"""JAX, a whole epoch in one compiled program: ``jax.lax.scan`` over its steps."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax

from bench.cases import Case, Data
from bench.peers.jax_jit import JaxTrainer, Parameters, sgd_step


class ScanTrainer(JaxTrainer):
    """See ``peers.Trainer``."""

    def compile_epoch(self) -> Any:
        size, rate = self.case.batch_size, self.case.learning_rate

        @partial(jax.jit, donate_argnums=0)
        def epoch(parameters: Parameters, X: jax.Array, y: jax.Array, order: jax.Array) -> Any:
            def step(parameters: Parameters, rows: jax.Array) -> tuple[Parameters, jax.Array]:
                return sgd_step(parameters, X, y, rows, rate)

            parameters, losses = jax.lax.scan(step, parameters, order.reshape(-1, size))
            return parameters, losses.mean()

        return lambda parameters, order: epoch(parameters, self.X, self.y, order)


def prepare(case: Case, data: Data) -> ScanTrainer:
    """See ``peers.prepare``."""
    return ScanTrainer(case, data)
