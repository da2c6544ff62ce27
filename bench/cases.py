"""The benchmark's networks, their data and their initial parameters.

All cases have a constant learning rate. Features come from a standard normal distribution, labels and values from a
random linear teacher. ``784-128-10@128`` means batch 128, relu, cross-entropy on logits, plain SGD and fp32. Suffixes
change one of these: ``:adam``, ``:tanh``, ``:mse``, ``:dropout``, ``:bf16``, ``:x64`` (64 models at once). Every
network has such a name, not only those of ``CASES``.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from fusemlp_kernels.errors import unknown_name

Array = np.ndarray[Any, Any]
Parameters = list[tuple[Array, Array]]


@dataclass(frozen=True)
class Case:
    """A network and its training.

    ``sizes``: the widths from input to output. ``steps``: batches in an epoch; the data have ``steps * batch_size``
    rows, so no batch is short. ``epochs``: the length of a turn, unless it was measured. ``models``: the number of
    models that train at once, each with its own row order. ``device``: "cpu" or "gpu". ``gpu_only`` cases need a card.
    """

    sizes: tuple[int, ...]
    batch_size: int
    steps: int
    epochs: int = 1
    learning_rate: float = 0.05
    activation: str = "relu"
    loss: str = "cross_entropy"
    optimizer: str = "sgd"
    dropout: float = 0.0
    precision: str = "fp32"
    models: int | None = None
    gpu_only: bool = False
    device: str = "cpu"

    @property
    def name(self) -> str:
        """The case's name, such as 784-10-10@32:adam."""
        differs = [
            self.activation if self.activation != "relu" else "",
            self.loss if self.loss != "cross_entropy" else "",
            self.optimizer if self.optimizer != "sgd" else "",
            "dropout" if self.dropout else "",
            self.precision if self.precision != "fp32" else "",
            f"x{self.models}" if self.models is not None else "",
        ]
        return ":".join([f"{'-'.join(map(str, self.sizes))}@{self.batch_size}", *filter(None, differs)])

    @property
    def rows(self) -> int:
        """The number of rows."""
        return self.steps * self.batch_size

    @property
    def flops(self) -> int:
        """Floating-point operations of a model's matrix products; the first layer needs no input gradient."""
        products = [2 * self.batch_size * i * o for i, o in zip(self.sizes, self.sizes[1:], strict=False)]
        return 3 * sum(products) - products[0]


@dataclass(frozen=True)
class Data:
    """X (n, K) float32, y, the initial parameters, and a row order for every contender.

    ``y``: (n,) int64; for mse (n, N) float32. ``parameters``: for each layer the weight (outputs, inputs) and the bias
    (outputs,), float32; with many models (models, outputs, inputs) and (models, outputs).
    """

    X: Array
    y: Array
    parameters: Parameters
    order: Array


def _single() -> list[Case]:
    small, tutorial = Case((64, 32, 10), 32, steps=600, epochs=60), Case((784, 10, 10), 32, steps=300, epochs=30)
    medium, wide = Case((784, 128, 10), 128, steps=100, epochs=10), Case((784, 512, 256, 10), 128, steps=50, epochs=4)
    large = Case((1024,) * 5, 4096, steps=2, learning_rate=0.02)
    huge = Case((4096,) * 5, 8192, steps=2, learning_rate=0.02, gpu_only=True)
    adam: dict[str, Any] = {"optimizer": "adam", "learning_rate": 1e-3}
    half = [
        replace(case, precision=precision, gpu_only=True)
        for case in (wide, large, huge)
        for precision in ("tf32", "bf16")
    ]
    return [
        *(made for case in (small, tutorial, medium, wide) for made in (case, replace(case, **adam))),
        Case((54, 256, 256, 256, 7), 1024, steps=20, epochs=4, dropout=0.1, **adam),
        Case((17, 64, 64, 6), 64, steps=300, epochs=20, activation="tanh", **adam),
        Case((30, 64, 64, 1), 256, steps=100, epochs=20, loss="mse", **adam),
        Case((100, 300, 300, 5), 512, steps=20, epochs=10),
        Case((3072, 512, 10), 256, steps=20, epochs=10),
        Case((500, 1000, 500, 20), 1024, steps=5, epochs=4),
        Case((32, 64, 64, 64, 64, 16), 1 << 14, steps=4, epochs=4, **adam),
        Case((32, 64, 64, 64, 64, 16), 1 << 18, steps=1, **adam),
        large,
        huge,
        *half,
    ]


def _fleets() -> list[Case]:
    sizes = {1: 40, 8: 20, 64: 4, 256: 1, 1024: 1}
    return [
        Case((64, 32, 10), 32, steps=50, epochs=epochs, optimizer="adam", learning_rate=1e-3, models=models)
        for models, epochs in sizes.items()
    ]


# The operations of a turn where only the name says what a case is.
TURN = 5e10
_SUFFIXES: dict[str, dict[str, Any]] = {
    "adam": {"optimizer": "adam", "learning_rate": 1e-3},
    "dropout": {"dropout": 0.1},
    "mse": {"loss": "mse"},
    "tanh": {"activation": "tanh"},
    "tf32": {"precision": "tf32", "gpu_only": True},
    "bf16": {"precision": "bf16", "gpu_only": True},
}
_NAME = re.compile(rf"([1-9]\d*(?:-[1-9]\d*)+)@([1-9]\d*)((?::(?:{'|'.join(_SUFFIXES)}|x[1-9]\d*))*)")


def parsed(name: str) -> Case:
    """Return the case of a name such as 300-200-10@64:adam. Raises ValueError with the nearest name for other text."""
    match = _NAME.fullmatch(name)
    if match is None:
        raise ValueError(
            f"{unknown_name('case', name, CASES)}, or another as widths@batch, with suffixes as in :adam:x8"
        )
    changes: dict[str, Any] = {}
    for suffix in match[3].split(":")[1:]:
        change = _SUFFIXES.get(suffix) or {"models": int(suffix.removeprefix("x"))}
        if changes.keys() & change.keys() - {"gpu_only"}:
            raise ValueError(f"case: {name!r} has two suffixes of one kind; leave {suffix!r} out")
        changes |= change
    case = Case(tuple(map(int, match[1].split("-"))), int(match[2]), steps=1, **changes)
    passes = TURN / (case.flops * (case.models or 1))
    steps = min(max(round(passes / 10), 4), 600)
    return replace(case, steps=steps, epochs=min(max(round(passes / steps), 1), 60))


def _drawn(count: int = 6) -> list[Case]:
    """Return networks drawn at random once: two or three hidden layers of 100 to 1,500, batches of 64 to 1,024."""
    generator = np.random.default_rng(36)
    names = []
    for suffix in ("", ":adam") * (count // 2):
        widths = generator.integers(100, 1501, size=generator.integers(3, 5))
        names.append(f"{'-'.join(map(str, widths))}-10@{generator.integers(64, 1025)}{suffix}")
    return [parsed(name) for name in names]


CASES = {case.name: case for case in (*_single(), *_drawn(), *_fleets())}
QUICK = ("64-32-10@32:adam", "784-10-10@32", "784-128-10@128", "17-64-64-6@64:tanh:adam", "64-32-10@32:adam:x8")


def make_data(case: Case, seed: int = 0) -> Data:
    """Return the data and initial parameters (He et al., 2015) of a case; they are the same for every contender.

    Every class occurs, because scikit-learn takes the number of outputs from the labels. Biases start at small nonzero
    values, so that the check finds a contender without biases.
    """
    generator = np.random.default_rng(seed)
    inputs, outputs = case.sizes[0], case.sizes[-1]
    X = generator.standard_normal((case.rows, inputs), dtype=np.float32)
    taught = X @ generator.standard_normal((inputs, outputs), dtype=np.float32)
    if case.loss == "mse":
        # near the outputs of a new network
        y = taught / np.float32(np.sqrt(inputs))
    else:
        y = np.argmax(taught, axis=1)
        y[:outputs] = np.arange(outputs)
    ahead = () if case.models is None else (case.models,)
    parameters = []
    for fan_in, fan_out in zip(case.sizes, case.sizes[1:], strict=False):
        scale = np.float32(np.sqrt(2 / fan_in))
        weight = generator.standard_normal((*ahead, fan_out, fan_in), dtype=np.float32) * scale
        bias = generator.standard_normal((*ahead, fan_out), dtype=np.float32) * np.float32(0.1)
        parameters.append((weight, bias))
    return Data(X, y, parameters, generator.permutation(case.rows))


def model_of(parameters: Parameters, index: int) -> Parameters:
    """Return the parameters of one of many models."""
    return [(weight[index], bias[index]) for weight, bias in parameters]


def checked_rows(case: Case, steps: int, seed: int = 1) -> Array:
    """Return (steps * batch_size,) rows: the batches for the comparison with the oracle."""
    generator = np.random.default_rng(seed)
    passes = -(-steps // case.steps)
    rows = np.concatenate([generator.permutation(case.rows) for _ in range(passes)])
    return rows[: steps * case.batch_size]
