"""JAX, a compiled training step that is called from Python.

The parameters and the number of the step are donated and stay on the device; the step picks its batch by index from
the epoch's row order, so that a call converts nothing. Weights are (outputs, inputs): with few outputs XLA is nearly
twice as quick with them as with (inputs, outputs), and elsewhere no slower.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bench.cases import Array, Case, Data

Parameters = list[tuple[jax.Array, jax.Array]]


def batch_loss(parameters: Parameters, x: jax.Array, y: jax.Array) -> jax.Array:
    """The mean cross-entropy of a batch: x (M, K), y (M,)."""
    *hidden, (weight, bias) = parameters
    for w, b in hidden:
        x = jax.nn.relu(x @ w.T + b)
    log_probabilities = jax.nn.log_softmax(x @ weight.T + bias)
    return -jnp.take_along_axis(log_probabilities, y[:, None], axis=1).mean()


def sgd_step(
    parameters: Parameters, X: jax.Array, y: jax.Array, rows: jax.Array, learning_rate: float
) -> tuple[Parameters, jax.Array]:
    """The parameters after an update from the rows (M,) of X (n, K) and y (n,), and the loss before it."""
    loss, gradients = jax.value_and_grad(batch_loss)(parameters, X[rows], y[rows])
    return jax.tree.map(lambda p, g: p - learning_rate * g, parameters, gradients), loss


class JaxTrainer:
    """See ``peers.Trainer``."""

    def __init__(self, case: Case, data: Data) -> None:
        self.data = data
        self.case = case
        self.X, self.y = jnp.asarray(data.X), jnp.asarray(data.y, dtype=jnp.int32)
        self.generator = np.random.default_rng(0)
        self.loss = float("nan")
        self.reset()
        self.run_epoch = self.compile_epoch()

    def compile_epoch(self) -> Any:
        """A function (parameters, row order) -> (parameters, mean loss)."""
        size, rate = self.case.batch_size, self.case.learning_rate
        X, y = self.X, self.y

        @partial(jax.jit, donate_argnums=0)
        def step(state: Any, X: jax.Array, y: jax.Array, order: jax.Array) -> Any:
            parameters, index, total = state
            rows = jax.lax.dynamic_slice(order, (index * size,), (size,))
            parameters, loss = sgd_step(parameters, X, y, rows, rate)
            return parameters, index + 1, total + loss

        def epoch(parameters: Parameters, order: jax.Array) -> tuple[Parameters, jax.Array]:
            state = (parameters, jnp.int32(0), jnp.float32(0))
            for _ in range(self.case.steps):
                state = step(state, X, y, order)
            return state[0], state[2] / self.case.steps

        return epoch

    def reset(self) -> None:
        # copies: the parameters are donated, and jnp.asarray may share memory with NumPy
        self.current = [
            (jnp.array(weight, copy=True), jnp.array(bias, copy=True)) for weight, bias in self.data.parameters
        ]

    def train(self, epochs: int) -> None:
        for _ in range(epochs):
            self.train_in_order(self.generator.permutation(self.case.rows))

    def train_in_order(self, order: Array) -> None:
        self.current, loss = self.run_epoch(self.current, jnp.asarray(order, dtype=jnp.int32))
        jax.block_until_ready(self.current)
        self.loss = float(loss)

    def parameters(self) -> list[tuple[Array, Array]]:
        return [(np.asarray(weight), np.asarray(bias)) for weight, bias in self.current]


def prepare(case: Case, data: Data) -> JaxTrainer:
    """See ``peers.prepare``."""
    return JaxTrainer(case, data)
