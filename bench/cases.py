"""The networks that are trained, their data and their initial parameters.

All cases: relu between the layers, cross-entropy on logits, plain SGD with a constant learning rate, fp32, features
drawn from a standard normal distribution and labels from a random linear teacher.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Case:
    """A network and how it is trained.

    ``sizes`` are the widths from the input to the output. ``steps`` is the number of batches in an epoch, so that the
    data have ``steps * batch_size`` rows and no batch is short. ``epochs`` make a turn: what is timed in one go, long
    enough for the few milliseconds that a ``fit`` takes before its first epoch to be about one per cent of it.
    """

    sizes: tuple[int, ...]
    batch_size: int
    steps: int
    epochs: int
    learning_rate: float = 0.05

    @property
    def name(self) -> str:
        """For example 784-10-10@32."""
        return f"{'-'.join(map(str, self.sizes))}@{self.batch_size}"

    @property
    def rows(self) -> int:
        """How many examples there are."""
        return self.steps * self.batch_size

    @property
    def flops(self) -> int:
        """Floating-point operations of a step's matrix products; the first layer needs no input gradient."""
        products = [2 * self.batch_size * i * o for i, o in zip(self.sizes, self.sizes[1:], strict=False)]
        return 3 * sum(products) - products[0]


@dataclass(frozen=True)
class Data:
    """X (n, K) float32, y (n,) int64, the initial parameters, and the order of the rows in the checked epoch.

    ``parameters``: for each layer the weight (outputs, inputs) and the bias (outputs,), float32.
    """

    X: Array
    y: Array
    parameters: list[tuple[Array, Array]]
    order: Array


CASES = {
    case.name: case
    for case in (
        Case((64, 32, 10), batch_size=32, steps=600, epochs=60),
        Case((784, 10, 10), batch_size=32, steps=300, epochs=30),
        Case((784, 128, 10), batch_size=64, steps=150, epochs=15),
        Case((784, 512, 256, 10), batch_size=128, steps=50, epochs=4),
        Case((1024, 1024, 1024, 1024), batch_size=512, steps=8, epochs=2),
    )
}


def make_data(case: Case, seed: int = 0) -> Data:
    """The data and initial parameters (He et al., 2015) of a case; the same for every peer.

    Every class occurs, since scikit-learn takes the number of outputs from the labels.
    """
    generator = np.random.default_rng(seed)
    inputs, outputs = case.sizes[0], case.sizes[-1]
    X = generator.standard_normal((case.rows, inputs), dtype=np.float32)
    y = np.argmax(X @ generator.standard_normal((inputs, outputs), dtype=np.float32), axis=1)
    y[:outputs] = np.arange(outputs)
    parameters = []
    for fan_in, fan_out in zip(case.sizes, case.sizes[1:], strict=False):
        weight = generator.standard_normal((fan_out, fan_in), dtype=np.float32) * np.float32(np.sqrt(2 / fan_in))
        parameters.append((weight, np.zeros(fan_out, np.float32)))
    return Data(X, y.astype(np.int64), parameters, generator.permutation(case.rows))


def mean_loss(data: Data, parameters: list[tuple[Array, Array]]) -> float:
    """The cross-entropy over all rows, in float64: the figure by which peers are compared."""
    h = data.X.astype(np.float64)
    for layer, (weight, bias) in enumerate(parameters):
        h = h @ weight.T.astype(np.float64) + bias
        if layer < len(parameters) - 1:
            np.maximum(h, 0, out=h)
    h -= h.max(axis=1, keepdims=True)
    return float(np.mean(np.log(np.exp(h).sum(axis=1)) - h[np.arange(len(h)), data.y]))
