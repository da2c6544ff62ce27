"""JAX, a compiled training step that is called from Python.

The parameters, the optimizer's moments and the number of the step are donated and stay on the device. The step picks
its batch by index from the epoch's row order, so a call converts nothing. Weights are (outputs, inputs): with few
outputs XLA is nearly twice as fast as with (inputs, outputs), and elsewhere no slower.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from bench.cases import Array, Case, Data, Parameters

BETA1, BETA2, EPS = 0.9, 0.999, 1e-8
# "bfloat16" here would be TF32 on a GPU: for bf16 the operands are cast, see ``layer``.
PRODUCTS = {"fp32": "float32", "tf32": "tensorfloat32", "bf16": "float32"}


class State(NamedTuple):
    """The state of a training: ``moments`` of Adam, () for SGD; ``t`` updates so far; dropout's ``key``."""

    parameters: Any
    moments: Any
    t: jax.Array
    key: jax.Array


def configure(case: Case) -> None:
    """Set the case's device and precision for the process."""
    if case.device == "cpu":
        jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_default_matmul_precision", PRODUCTS[case.precision])


def start(case: Case, parameters: Any, key: jax.Array) -> State:
    """Return the initial state, copied: a state is donated, and jnp.asarray may share memory with NumPy."""
    own = jax.tree.map(lambda array: jnp.array(array, copy=True), parameters)
    zeros = partial(jax.tree.map, jnp.zeros_like)
    return State(own, (zeros(own), zeros(own)) if case.optimizer == "adam" else (), jnp.float32(0), key)


def layer(case: Case, x: jax.Array, weight: jax.Array, bias: jax.Array) -> jax.Array:
    """Return x @ weight.T + bias; in bf16 with operands and result in 16 bits, as under PyTorch's autocast."""
    if case.precision == "bf16":
        x, weight, bias = (array.astype(jnp.bfloat16) for array in (x, weight, bias))
    return x @ weight.T + bias


def batch_loss(case: Case, parameters: Any, x: jax.Array, y: jax.Array, key: jax.Array) -> jax.Array:
    """Return the mean loss of a batch: x (M, K), y (M,), for mse (M, N)."""
    *hidden, (weight, bias) = parameters
    activation = jnp.tanh if case.activation == "tanh" else jax.nn.relu
    for index, (w, b) in enumerate(hidden):
        x = activation(layer(case, x, w, b))
        if case.dropout:
            kept = jax.random.bernoulli(jax.random.fold_in(key, index), 1 - case.dropout, x.shape)
            x = jnp.where(kept, x / (1 - case.dropout), 0)
    x = layer(case, x, weight, bias).astype(jnp.float32)
    if case.loss == "mse":
        return ((x - y) ** 2).mean()
    log_probabilities = jax.nn.log_softmax(x)
    return -jnp.take_along_axis(log_probabilities, y[:, None], axis=1).mean()


def train_step(case: Case, state: State, x: jax.Array, y: jax.Array) -> tuple[State, jax.Array]:
    """Return the state after an update from a batch, and the loss before it."""
    rate, t = case.learning_rate, state.t + 1
    key = jax.random.fold_in(state.key, state.t.astype(jnp.int32)) if case.dropout else state.key
    loss, gradients = jax.value_and_grad(partial(batch_loss, case))(state.parameters, x, y, key)
    if case.optimizer == "sgd":
        return State(jax.tree.map(lambda p, g: p - rate * g, state.parameters, gradients), (), t, state.key), loss
    m = jax.tree.map(lambda m, g: BETA1 * m + (1 - BETA1) * g, state.moments[0], gradients)
    v = jax.tree.map(lambda v, g: BETA2 * v + (1 - BETA2) * g * g, state.moments[1], gradients)
    # 1 - beta**t, without the cancellation of the subtraction in single precision.
    first, second = (-jnp.expm1(t * math.log(beta)) for beta in (BETA1, BETA2))

    def update(p: jax.Array, m: jax.Array, v: jax.Array) -> jax.Array:
        return p - rate * (m / first) / (jnp.sqrt(v / second) + EPS)

    return State(jax.tree.map(update, state.parameters, m, v), (m, v), t, state.key), loss


class JaxTrainer:
    """See ``peers.Trainer``."""

    def __init__(self, case: Case, data: Data) -> None:
        configure(case)
        self.data, self.case = data, case
        kind = jnp.float32 if case.loss == "mse" else jnp.int32
        self.X, self.y = jnp.asarray(data.X), jnp.asarray(data.y, dtype=kind)
        self.generator = np.random.default_rng(0)
        self.reset()
        self.step = self.compile_step()

    def compile_step(self) -> Any:
        """Return a function (state, index, total of the losses, X, y, row order) -> the first three."""
        case = self.case

        @partial(jax.jit, donate_argnums=(0, 1, 2))
        def step(state: State, index: jax.Array, total: jax.Array, X: jax.Array, y: jax.Array, order: jax.Array) -> Any:
            rows = jax.lax.dynamic_slice(order, (index * case.batch_size,), (case.batch_size,))
            state, loss = train_step(case, state, X[rows], y[rows])
            return state, index + 1, total + loss

        return step

    def reset(self) -> None:
        self.state = start(self.case, self.data.parameters, jax.random.key(0))

    def train(self, epochs: int) -> None:
        for _ in range(epochs):
            order = jnp.asarray(self.generator.permutation(self.case.rows), dtype=jnp.int32)
            state, index, total = self.state, jnp.int32(0), jnp.float32(0)
            for _ in range(self.case.steps):
                state, index, total = self.step(state, index, total, self.X, self.y, order)
            self.state = jax.block_until_ready(state)
            float(total / self.case.steps)

    def losses(self, order: Array) -> Array:
        # Padded to the length of an epoch, for which the step is compiled.
        losses = []
        for rows in order.reshape(-1, self.case.batch_size):
            padded = np.zeros(self.case.rows, np.int32)
            padded[: len(rows)] = rows
            self.state, _, loss = self.step(
                self.state, jnp.int32(0), jnp.float32(0), self.X, self.y, jnp.asarray(padded)
            )
            losses.append(float(loss))
        return np.array(losses)

    def parameters(self) -> Parameters:
        return [(np.asarray(weight), np.asarray(bias)) for weight, bias in self.state.parameters]


def prepare(case: Case, data: Data) -> JaxTrainer:
    """See ``peers.prepare``."""
    return JaxTrainer(case, data)
