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
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, fields
from functools import cache, cached_property
from types import CodeType
from typing import Any

# Functions of one element that each backend writes by hand. ``step(x, below)`` is 1 above zero, ``below`` elsewhere;
# ``log1p`` is for arguments from 0 to 1. All give NaN where their first argument is NaN; only there may the second one
# of ``maximum`` and ``minimum`` be NaN. ``log``, of positive normal numbers, is for ``DISTRIBUTIONS`` alone.
FUNCTIONS = (
    "abs", "exp", "log", "log1p", "maximum", "minimum", "normal_cdf", "normal_pdf", "sigmoid", "sign", "sqrt", "step",
    "tanh",
)  # fmt: skip


@dataclass(frozen=True)
class Activation:
    """y = f(z), and f' from z, or from y if the formula names y.

    ``torch``: the class in ``torch.nn``. ``onnx``: the operator, if there is one. ``slope``: the default of the number
    of this name that formulas read, and ``argument``: its name in torch's class. ``by_slope``: the derivative of y by
    ``slope``, for an activation that learns it. ``homogeneous``: f(2 z) = 2 f(z), so dropout's scale on y leaves f' as
    it is. ``init``: the default distribution of the weights before it. ``turn``: the place of the least value, where y
    falls before it and rises after it; by default it rises everywhere.
    """

    value: str
    derivative: str
    torch: str | None = None
    onnx: str | None = None
    slope: float | None = None
    argument: str = ""
    by_slope: str | None = None
    homogeneous: bool = False
    init: str = "glorot_uniform"
    turn: float = -math.inf

    @property
    def learned(self) -> bool:
        """True if the slope is a parameter."""
        return self.by_slope is not None

    @property
    def needs_z(self) -> bool:
        """True if the derivative is computed from z."""
        return "z" in named(lines(self.derivative, "d"))


@dataclass(frozen=True)
class Loss:
    """``loss`` of one output y and its target t, and its ``gradient`` by y; it may read one of ``LossOptions``.

    One of ``DISTRIBUTIONS`` reads a second output s too, and has ``gradient_s``.
    """

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
    eps: float = 1e-6


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


# m = exp(z) - 1 below zero, which is accurate near zero too, and 0 above
_ELU = "t = tanh(0.5 * minimum(z, 0)); m = 2 * t / (1 - t); "
# tanh(softplus(z)) = w / (w + 2), of which float64 makes 1 at 30 and the square of exp(z) is still a float32
_MISH = "m = minimum(z, 30); h = exp(m); w = h * (h + 2); "

ACTIVATIONS: dict[str, Activation] = {
    "identity": Activation("z", "1", "Identity", homogeneous=True),
    # He et al. (2015) derived their variance for an activation that keeps about half of a symmetric input
    "relu": Activation("maximum(z, 0)", "step(y, 0)", "ReLU", "Relu", homogeneous=True, init="he_normal"),
    # with a slope that is not negative the output has the sign of z
    "leaky_relu": Activation(
        "maximum(z, 0) + slope * minimum(z, 0)",
        "step(y, slope)",
        "LeakyReLU",
        "LeakyRelu",
        slope=0.01,
        argument="negative_slope",
        homogeneous=True,
        init="he_normal",
    ),
    "prelu": Activation(
        "maximum(z, 0) + slope * minimum(z, 0)",
        "step(z, slope)",
        "PReLU",
        "PRelu",
        slope=0.25,
        argument="init",
        by_slope="minimum(z, 0)",
        homogeneous=True,
        init="he_normal",
    ),
    "sigmoid": Activation("sigmoid(z)", "y * (1 - y)", "Sigmoid"),
    "tanh": Activation("tanh(z)", "1 - y * y", "Tanh"),
    # the exact form of Hendrycks and Gimpel, "Gaussian error linear units", 2016
    "gelu": Activation(
        "z * normal_cdf(z)",
        "normal_cdf(z) + z * normal_pdf(z)",
        "GELU",
        init="he_normal",
        turn=-0.7517915246935645,
    ),
    "silu": Activation(
        "z * sigmoid(z)",
        "s = sigmoid(z); s * (1 + z * (1 - s))",
        "SiLU",
        init="he_normal",
        turn=-1.2784645427610738,
    ),
    # Clevert et al., "Fast and accurate deep network learning by exponential linear units", 2016, with the weights of
    # He et al.
    "elu": Activation(
        _ELU + "maximum(z, 0) + slope * m",
        "step(y, slope) + minimum(y, 0)",
        "ELU",
        "Elu",
        slope=1.0,
        argument="alpha",
        init="he_normal",
    ),
    # Klambauer et al., "Self-normalizing neural networks", 2017, which assumes the variance 1 / fan_in
    "selu": Activation(
        _ELU + "1.0507009873554805 * maximum(z, 0) + 1.7580993408473766 * m",
        "s = step(y, 0); 1.0507009873554805 * s + 1.7580993408473766 * (1 - s) + minimum(y, 0)",
        "SELU",
        "Selu",
        init="lecun_normal",
    ),
    # Dugas et al., "Incorporating second-order functional knowledge for better option pricing", 2000; the derivative
    # 1 - exp(-y) by tanh, which keeps small y accurate
    "softplus": Activation(
        "maximum(z, 0) + log1p(exp(-abs(z)))", "t = tanh(0.5 * y); 2 * t / (1 + t)", "Softplus", "Softplus"
    ),
    # Misra, "Mish: a self regularized non-monotonic activation function", 2020: z * tanh(softplus(z))
    "mish": Activation(
        _MISH + "z * (w / (w + 2))",
        _MISH + "(w + m * (4 * h * (h + 1) / (w + 2))) / (w + 2)",
        "Mish",
        "Mish",
        init="he_normal",
        turn=-1.1924312145154952,
    ),
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

# Losses of two outputs a target, printed for NumPy alone.
DISTRIBUTIONS: dict[str, Loss] = {
    # the gradient passes through the floor eps, as in torch's GaussianNLLLoss
    "gaussian": Loss("""
        std = maximum(s, 0) + log1p(exp(-abs(s)))
        weight = 1 / maximum(std * std, eps)
        r = y - t
        q = r * weight
        loss = 0.5 * (q * r - log(weight))
        gradient = q
        gradient_s = (weight - q * q) * std * sigmoid(s)
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
# Those after them, of NumPy alone. The quantiles of a row are sums of one another.
DISTRIBUTION_NAMES = (*DISTRIBUTIONS, "quantiles")

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


def evaluate(formula: str, known: Mapping[str, Any], functions: Mapping[str, Callable[..., Any]]) -> Any:
    """Return the value of a formula that ends with an expression, from the values of the names that it reads."""
    values = dict(known)
    for name, code in _compiled(formula):
        values[name] = eval(code, {"__builtins__": {}, **functions}, values)
    return values["result"]


def elements(kind: str, y: Any, t: Any, s: Any = None, **options: float) -> Any:
    """Return by NumPy the loss of each output y and target t, with s of a distribution; ``LossOptions`` as options."""
    import numpy as np
    from scipy.special import expit

    functions = {name: getattr(np, name) for name in ("abs", "exp", "log", "log1p", "maximum", "minimum", "sign")}
    formula, known = {**LOSSES, **DISTRIBUTIONS}[kind].formula, {"y": y, "t": t, "s": s, **options}
    return evaluate(f"{formula}\nloss", known, {**functions, "sigmoid": expit})


@cache
def _compiled(formula: str) -> list[tuple[str, CodeType]]:
    return [(name, compile(ast.Expression(value), formula, "eval")) for name, value in lines(formula, "result")]


def named(found: Iterable[Line]) -> list[str]:
    """Return the names that lines read, in order, without those of functions."""
    read = [node.id for _, value in found for node in ast.walk(value) if isinstance(node, ast.Name)]
    return [name for name in dict.fromkeys(read) if name not in FUNCTIONS]
