"""Every activation, element-wise loss and optimizer: each formula once, as a line of text.

``ci/print_formulas.py`` turns these tables into numba, Triton and CUDA C, so a new row here is a new function on
every backend: add the row, run that script, and add the formula to the oracle, ``reference``. A new number that a
formula reads is a field of ``Hyperparameters`` or ``LossOptions``.

A formula is Python arithmetic (``+ - * /``) over names, numbers and the functions of ``FUNCTIONS``; a line
``name = ...`` gives a part of it a name. NaN has to come out where NaN goes in, so no formula compares elements:
``maximum``, ``minimum``, ``sign`` and ``step`` do.
"""

from __future__ import annotations

import ast
from collections.abc import Iterable
from dataclasses import dataclass, fields
from functools import cached_property

# Functions of one element that each backend writes by hand. ``step(x, below)`` is 1 above zero, ``below`` elsewhere;
# ``log1p`` is for arguments from 0 to 1. All give NaN where their first argument is NaN; only there may the second one
# of ``maximum`` and ``minimum`` be NaN.
FUNCTIONS = (
    "abs", "exp", "log1p", "maximum", "minimum", "normal_cdf", "normal_pdf", "sigmoid", "sign", "sqrt", "step", "tanh",
)  # fmt: skip


@dataclass(frozen=True)
class Activation:
    """y = f(z), and f' from z, or from y if the formula names y.

    ``by_slope``: the derivative of y by ``slope``, for an activation that learns it. ``scale_free``: the derivative at
    2 y is that at y, so dropout's scale on y changes nothing. ``rectifier``: about half of a symmetric input is kept,
    as He et al. (2015) assume. ``torch``: the class in ``torch.nn``.
    """

    value: str
    derivative: str
    by_slope: str | None = None
    scale_free: bool = False
    rectifier: bool = False
    torch: str | None = None

    @property
    def needs_z(self) -> bool:
        """True if the derivative is computed from z."""
        return "z" in named(lines(self.derivative, "d"))


@dataclass(frozen=True)
class Loss:
    """``loss`` of one output y and its target t, and its ``gradient`` by y; it may read one of ``LossOptions``."""

    formula: str

    @cached_property
    def option(self) -> str | None:
        """The field of ``LossOptions`` that the formula reads."""
        read = named(lines(self.formula))
        return next((option.name for option in fields(LossOptions) if option.name in read), None)


@dataclass(frozen=True, kw_only=True)
class LossOptions:
    """Numbers that formulas of losses read, with their defaults; ``LossSpec`` has them too."""

    delta: float = 1.0
    quantile: float = 0.5


@dataclass(frozen=True, kw_only=True)
class Hyperparameters:
    """Numbers that formulas of optimizers read, with their defaults; ``UpdateRule`` has them too.

    Every backend gives all of them to its kernels, in this order. ``beta1``, ``beta2`` and ``ema`` have bias
    corrections; with an ``ema`` above 0 the average of ``AVERAGE`` follows the parameters.
    """

    momentum: float = 0.0
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    ema: float = 0.0


HYPERPARAMETERS = tuple(one.name for one in fields(Hyperparameters))


@dataclass(frozen=True)
class Optimizer:
    """The new value of a parameter p, from its gradient g and its named ``states``.

    ``scalars`` are computed once a launch in float64, from ``rate``, ``decay``, ``Hyperparameters``, the bias
    corrections of the hyper array, and ``rate_inside``: whether the convention is scikit-learn's. The lines of
    ``element`` read them in the type of the parameters.
    """

    states: tuple[str, ...]
    scalars: str
    element: str


ACTIVATIONS: dict[str, Activation] = {
    "identity": Activation("z", "1", scale_free=True, torch="Identity"),
    "relu": Activation("maximum(z, 0)", "step(y, 0)", scale_free=True, rectifier=True, torch="ReLU"),
    # with a slope that is not negative the output has the sign of z
    "leaky_relu": Activation(
        "maximum(z, 0) + slope * minimum(z, 0)",
        "step(y, slope)",
        scale_free=True,
        rectifier=True,
        torch="LeakyReLU",
    ),
    "prelu": Activation(
        "maximum(z, 0) + slope * minimum(z, 0)",
        "step(z, slope)",
        by_slope="minimum(z, 0)",
        rectifier=True,
        torch="PReLU",
    ),
    "sigmoid": Activation("sigmoid(z)", "y * (1 - y)", torch="Sigmoid"),
    "tanh": Activation("tanh(z)", "1 - y * y", torch="Tanh"),
    # the exact form of Hendrycks and Gimpel, "Gaussian error linear units", 2016
    "gelu": Activation("z * normal_cdf(z)", "normal_cdf(z) + z * normal_pdf(z)", rectifier=True, torch="GELU"),
    "silu": Activation("z * sigmoid(z)", "s = sigmoid(z); s * (1 + z * (1 - s))", rectifier=True, torch="SiLU"),
}

LOSSES: dict[str, Loss] = {
    # no exponential overflows
    "binary_cross_entropy": Loss("""
        e = exp(-abs(y))
        loss = maximum(y, 0) + log1p(e) - t * y
        gradient = sigmoid(y) - t
    """),
    "mse": Loss("""
        r = y - t
        loss = r * r
        gradient = 2 * r
    """),
    "mae": Loss("""
        r = y - t
        loss = abs(r)
        gradient = sign(r)
    """),
    # with r clipped to c
    "huber": Loss("""
        r = y - t
        c = minimum(maximum(r, -delta), delta)
        loss = c * (r - 0.5 * c)
        gradient = c
    """),
    "poisson": Loss("""
        e = exp(y)
        loss = e - t * y
        gradient = e - t
    """),
    # the slope is quantile below the target, 1 - quantile above it
    "quantile": Loss("""
        r = y - t
        s = sign(r)
        slope = maximum((1 - quantile) * s, -quantile * s)
        loss = slope * abs(r)
        gradient = slope * s
    """),
}

# The lines that come before those of every optimizer: decoupled decay shrinks the parameter, coupled decay is added to
# the gradient.
DECAY = Optimizer(
    (),
    """
    kept = 1 - rate * decay if decoupled else 1
    coupled = 0 if decoupled else decay
    """,
    """
    p = kept * p
    g = g + coupled * p
    """,
)

# The lines that come after those of every optimizer, with ``ema``: predictions use an average of the parameters after
# each update (Polyak and Juditsky, 1992), in which each weighs ``ema`` times as much as the next. ``share``, in the
# hyper array, is (1 - ema) / (1 - ema ** t) at update t from 1 on: the weights always sum to 1, as Adam corrects its
# moments, and the initial parameters have none.
AVERAGE = Optimizer(("average",), "", "average = average + share * (p - average)")

OPTIMIZERS: dict[str, Optimizer] = {
    "sgd": Optimizer((), "", "p = p - rate * g"),
    # scikit-learn keeps the learning rate, and its sign, inside the velocity
    "momentum": Optimizer(
        ("velocity",),
        """
        inner = -rate if rate_inside else 1
        outer = 1 if rate_inside else -rate
        """,
        """
        velocity = momentum * velocity + inner * g
        p = p + outer * velocity
        """,
    ),
    # With root = sqrt(bc2) multiplied through, m / bc1 / (sqrt(v / bc2) + eps) = root / bc1 * m / (sqrt(v) + root eps).
    # The least normal float32 keeps the quotient of a parameter that never had a gradient from being 0 / 0.
    "adam": Optimizer(
        ("first_moment", "second_moment"),
        """
        root = sqrt(bias_correction_2)
        size = rate * root / bias_correction_1
        least = maximum(eps if rate_inside else eps * root, 1.1754943508222875e-38)
        rest1 = 1 - beta1
        rest2 = 1 - beta2
        """,
        """
        first_moment = beta1 * first_moment + rest1 * g
        second_moment = beta2 * second_moment + rest2 * (g * g)
        p = p - size * (first_moment / (sqrt(second_moment) + least))
        """,
    ),
    "nesterov": Optimizer(
        ("velocity",),
        """
        inner = -rate if rate_inside else 1
        outer = 1 if rate_inside else -rate
        """,
        """
        change = inner * g
        velocity = momentum * velocity + change
        p = p + outer * (change + momentum * velocity)
        """,
    ),
}


# Cross-entropy, which is no sum over elements, has the first number.
LOSS_NAMES = ("cross_entropy", *LOSSES)

Line = tuple[str, ast.expr]


def lines(formula: str, result: str = "") -> list[Line]:
    """Return name and expression of each line of a formula; an expression without a name is called ``result``."""
    text = "\n".join(line.strip() for line in formula.strip().splitlines())
    found: list[Line] = []
    for statement in ast.parse(text).body:
        match statement:
            case ast.Assign(targets=[ast.Name(id=name)], value=value):
                found.append((name, value))
            case ast.Expr(value=value) if result:
                found.append((result, value))
            case _:
                raise ValueError(f"formula: expected `name = expression`, got {ast.unparse(statement)!r}")
    return found


def named(found: Iterable[Line]) -> list[str]:
    """Return the names that lines read, in order, without those of functions."""
    read = [node.id for _, value in found for node in ast.walk(value) if isinstance(node, ast.Name)]
    return [name for name in dict.fromkeys(read) if name not in FUNCTIONS]
