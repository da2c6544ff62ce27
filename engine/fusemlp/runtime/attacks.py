"""Attacks on the inputs of a network, and interval bounds of its outputs.

A layer takes the box with centre c and radius r to z within |w| r of w c + b. An activation that rises maps the ends of
an interval to the ends; one that falls before its turn and rises after it has its least value at the turn, or at the
end that is nearest to it. Margins between outputs take the differences of the last layer's weights, which is tighter
than the difference of bounds.

The bounds hold for the network in exact arithmetic and for the outputs that the engine computes, in any order of
summation. They are computed in float64, and widened at each layer by a bound of the rounding of both: n operations with
the relative errors d change each term of a sum by less than exp(n d) - 1 of its magnitude (Higham, "Accuracy and
stability of numerical algorithms", 2002, chapter 3), and |w| (|c| + r) + |b| is the sum of the magnitudes.
"""

import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np

from fusemlp.describe.adversarial import Attack, as_attack
from fusemlp.describe.checks import as_number
from fusemlp.describe.conflicts import check_together
from fusemlp.inputs.arrays import Array, to_array
from fusemlp.runtime.forward import LARGEST
from fusemlp.runtime.session import Session
from fusemlp_kernels import pointwise
from fusemlp_kernels.contract import BATCH_INDEX, COUNTERS, LossSpec
from fusemlp_kernels.errors import ArgumentError, ArgumentTypeError, DataError, ShapeError
from fusemlp_kernels.pointwise import elements
from fusemlp_kernels.registry import backend

Box = tuple[Array, Array]

# The relative error of an operation in float64, with room for the second order.
OWN = 2.0**-52
# The largest error of an activation, in units of its arithmetic times max(1, |z|) max(1, |slope|).
ACTIVATION_ERROR = 32.0


class Arithmetic(NamedTuple):
    """The errors of an engine's arithmetic: relative ones of an operation (``unit``) and of a matrix that is read
    (``factor``), the absolute one of numbers too small to be normal, and the largest number."""

    unit: float
    factor: float
    tiny: float
    largest: float


# By precision, on a GPU: tensor cores cut off where others round, so a unit is twice the unit roundoff there, and fp32
# reads factors in two parts of eleven bits.
ARITHMETIC = {
    "fp64": Arithmetic(2.0**-53, 0.0, 2.0**-1022, float(np.finfo(np.float64).max)),
    "fp32": Arithmetic(2.0**-23, 2.0**-20, 2.0**-126, float(np.finfo(np.float32).max)),
    "tf32": Arithmetic(2.0**-23, 2.0**-10, 2.0**-126, float(np.finfo(np.float32).max)),
    "bf16": Arithmetic(2.0**-23, 2.0**-8, 2.0**-126, 2.0**127),
    "fp16": Arithmetic(2.0**-23, 2.0**-11, 2.0**-24, float(np.finfo(np.float16).max)),
}
ON_HOST = {**ARITHMETIC, "fp32": Arithmetic(2.0**-24, 0.0, 2.0**-126, float(np.finfo(np.float32).max))}


class LayerValues(NamedTuple):
    """Weights (N, K), biases (N,), and the activation with its slope; float64."""

    w: Array
    b: Array
    activation: str
    slope: float


def certified(engine: Session, X: Any, y: Any, eps: Any, *, bounds: Any = None) -> Array:
    """Return whether ``predict`` gives y for every input within ``eps`` of X; see ``Engine.certified``."""
    low, high = ball(engine, X, eps, bounds)
    targets = engine.inputs.targets("y", y, rows=len(low))
    values, kind = np.asarray(engine.inputs.on_host(targets.values)), engine.inputs.kind_of(targets)
    if kind in (None, "numbers"):
        raise ArgumentError(
            f"y: certified predictions are those of classes, and y holds {kind or 'probabilities'}; use bounds(X, eps)"
        )
    propagation = Propagation(engine)
    if kind == "classes" and values.ndim == 1:
        return propagation.certified(low, high, values)
    if kind == "one-hot rows":
        return propagation.certified(low, high, values.argmax(axis=1))
    right = propagation.certified_labels(low, high, values > 0.5)
    return right[:, 0] if kind == "classes" else right


def ball(engine: Session, X: Any, eps: Any, limits: Any = None) -> Box:
    """Return the ends of the box of inputs around X that the arguments of ``bounds`` describe, checked."""
    check_together({**engine.network.uses, "bounds": "eps"})
    rows = engine.inputs.on_host(engine.inference.checked(X)).astype(np.float64)
    width = engine.network.sizes[0]
    # the rows given may have been rounded
    rounding = np.finfo(engine.inputs.real).eps * np.abs(rows)
    radius = _columns("eps", eps, width, low=0.0) + rounding
    low, high = rows - radius, rows + radius
    if limits is not None:
        pair = tuple(limits) if isinstance(limits, Iterable) and not isinstance(limits, str) else ()
        if len(pair) != 2:
            raise ArgumentTypeError(f"bounds: expected the least and the greatest input, (0, 1), got {limits!r}")
        least, most = (_columns(f"bounds[{at}]", limit, width) for at, limit in enumerate(pair))
        if (least > most).any():
            raise ArgumentError(f"bounds: the least input is above the greatest one, got {limits!r}")
        outside = (rows + rounding < least) | (rows - rounding > most)
        if outside.any():
            row, column = np.argwhere(outside)[0].tolist()
            raise DataError(
                f"X: {rows[row, column]:.6g} at row {row}, column {column} is outside the bounds; give wider ones"
            )
        low, high = np.maximum(low, least), np.minimum(high, most)
    return low, high


def _columns(argument: str, value: Any, width: int, low: float | None = None) -> Array:
    """Return a finite number for each column, from one for all or from (width,)."""
    array = to_array(argument, value)
    if array.ndim == 0:
        return np.full(width, as_number(argument, array.item(), low=low))
    if array.shape != (width,):
        raise ShapeError(f"{argument}: expected a number, or {width}, one for each column, got shape {array.shape}")
    if array.dtype.kind not in "biuf" or not (np.isfinite(array) & (low is None or array >= low)).all():
        least = "" if low is None else f" of at least {low:g}"
        raise ArgumentError(f"{argument}: expected finite numbers{least}, got {array!r}")
    return array.astype(np.float64)


class Propagation:
    """The bounds of an engine's network, as its parameters are now."""

    def __init__(self, engine: Session) -> None:
        net, state = engine.network, engine.memory.evaluated_tensors()
        on_host = engine.memory.backend.traits.on_host
        self.arithmetic = (ON_HOST if on_host else ARITHMETIC)[engine.precision]
        self.scale = engine.scaling.scale
        self.layers: list[LayerValues] = []
        for at, activation in enumerate(net.activations):
            w, b = (state[f"{2 * at}.{name}"].astype(np.float64) for name in ("weight", "bias"))
            learned = state.get(f"{2 * at + 1}.weight")
            slope = activation.slope if learned is None else float(learned[0])
            self.layers.append(LayerValues(w, b, activation.name, slope))
        self.rows = max(16, LARGEST // max(net.sizes))

    def outputs(self, low: Array, high: Array) -> Box:
        """Return the bounds (n, N) of the outputs for inputs, not normalised, between ``low`` and ``high`` (n, K)."""
        parts = [self._through(self.layers, *box) for box in self._blocks(low, high)]
        least, most = (np.concatenate(ends) for ends in zip(*parts, strict=True))
        return least, most

    def certified(self, low: Array, high: Array, labels: Array) -> Array:
        """Return whether the output of its label (n,) is the largest of each row in all of its box: bool (n,)."""
        last, shown = self.layers[-1], np.zeros(len(labels), np.bool_)
        plain = last.activation == "identity"
        start = 0
        for box in self._blocks(low, high):
            part_labels = labels[start : start + len(box[0])]
            # of the outputs, or of the last hidden layer, whose width is another
            least, most = self._through(self.layers[: -1 if plain else None], *box)
            for label in set(np.unique(part_labels).tolist()) & set(range(len(last.b))):
                at = np.flatnonzero(part_labels == label)
                part = least[at], most[at]
                margin = self._margins(last, *part, label) if plain else part[0][:, label, None] - part[1]
                margin[:, label] = np.inf
                shown[start + at] = (margin > 0.0).all(axis=1)
            start += len(part_labels)
        return shown

    def certified_labels(self, low: Array, high: Array, truth: Array) -> Array:
        """Return whether each output, positive for "yes", has the right sign in all of its box: bool (n, N)."""
        least, most = self.outputs(low, high)
        return np.where(truth, least > 0.0, most <= 0.0)

    def _blocks(self, low: Array, high: Array) -> Iterator[Box]:
        """Yield blocks of boxes as the network takes them; rounded inputs of a box are in it too."""
        how = self.arithmetic
        for start in range(0, len(low), self.rows):
            least, most = (end[start : start + self.rows].astype(np.float64) for end in (low, high))
            if self.scale is not None:
                mean, scale = self.scale.mean.astype(np.float64), self.scale.scale.astype(np.float64)
                least, most = (least - mean) / scale, (most - mean) / scale
            yield _widened(least, most, 4.0 * (how.unit + OWN), how.tiny)

    @np.errstate(all="ignore")
    def _through(self, layers: list[LayerValues], low: Array, high: Array) -> Box:
        """Return the box behind some layers."""
        for layer in layers:
            centre, radius = _middle(low, high)
            spread = radius @ np.abs(layer.w).T
            middle, size = centre @ layer.w.T + layer.b, (np.abs(centre) + radius) @ np.abs(layer.w).T + np.abs(layer.b)
            error = self._error(layer, centre, radius, size)
            low, high = _activated(layer, *_finite(middle - spread - error, middle + spread + error), self.arithmetic)
        return low, high

    @np.errstate(all="ignore")
    def _margins(self, last: LayerValues, low: Array, high: Array, label: int) -> Array:
        """Return the least differences (n, N) of an output and each output of the last layer, from the box before."""
        centre, radius = _middle(low, high)
        size = (np.abs(centre) + radius) @ np.abs(last.w).T + np.abs(last.b)
        errors = self._error(last, centre, radius, size)
        w, b = last.w[label] - last.w, last.b[label] - last.b
        least = centre @ w.T + b - radius @ np.abs(w).T - errors - errors[:, label, None]
        return np.where(np.isfinite(least), least, -np.inf)

    def _error(self, layer: LayerValues, centre: Array, radius: Array, size: Array) -> Array:
        """Return the rounding errors (n, N) of a layer's sums, whose terms have the magnitudes ``size``.

        The engine makes K + 2 operations on each term and reads three rounded numbers: both factors, and in 16 bits the
        result. This module makes 2 K + 12 at most, and as many in ``size``.
        """
        how, inputs = self.arithmetic, layer.w.shape[1]
        relative = math.expm1((inputs + 2) * how.unit + 3.0 * how.factor + (4 * inputs + 24) * OWN)
        small = (np.abs(centre) + radius).sum(axis=1, keepdims=True) + np.abs(layer.w).sum(axis=1) + inputs + 2.0
        error = relative * size + 2.0 * how.tiny * small
        # beyond the largest number the engine computes infinities
        return np.where(size + error < how.largest, error, np.inf)


def _middle(low: Array, high: Array) -> Box:
    """Return centre and radius of a box."""
    centre = 0.5 * low + 0.5 * high
    return centre, np.maximum(high - centre, centre - low)


def _finite(low: Array, high: Array) -> Box:
    """Return the ends, infinite where they are not known."""
    return np.where(np.isnan(low), -np.inf, low), np.where(np.isnan(high), np.inf, high)


def _widened(low: Array, high: Array, relative: float, tiny: float) -> Box:
    return low - (relative * np.abs(low) + tiny), high + (relative * np.abs(high) + tiny)


def _activated(layer: LayerValues, low: Array, high: Array, how: Arithmetic) -> Box:
    """Return the bounds of an activation between ``low`` and ``high``."""
    if layer.activation == "identity":
        return low, high
    row, slope = pointwise.ACTIVATIONS[layer.activation], layer.slope
    functions = formula_functions()

    def value(z: Array) -> Array:
        return np.asarray(pointwise.evaluate(row.value, {"z": z, "slope": slope}, functions))

    # a learned slope may be negative
    turn = 0.0 if slope < 0.0 else row.turn
    least, most = value(np.clip(turn, low, high)), np.maximum(value(low), value(high))
    if layer.activation != "relu":
        unit = ACTIVATION_ERROR * (how.unit + OWN) * max(1.0, abs(slope)) + how.factor
        error = unit * np.maximum(1.0, np.maximum(np.abs(low), np.abs(high))) + how.tiny
        least, most = least - error, most + error
    return _finite(least, most)


def formula_functions() -> dict[str, Callable[..., Any]]:
    """Return the functions of the activations' formulas, but ``normal_pdf``, for arrays of float32 or float64."""
    from scipy.special import expit, ndtr

    same = {name: getattr(np, name) for name in ("abs", "exp", "log1p", "maximum", "minimum", "tanh")}
    return {**same, "normal_cdf": ndtr, "sigmoid": expit, "step": lambda y, below: np.where(y > 0, 1, below)}


def attack(engine: Session, X: Any, y: Any, how: Attack) -> Array:
    """Return rows near X whose loss with the labels y is larger; see ``Engine.attack``."""
    how = as_attack("how", how)
    engine.network.check_single("how", "an attack")
    data = engine.inputs.examples(X, y, None)
    engine.scaling.check_measured()
    engine.inputs.check_within(how, data.X)
    pgd, change = how.plain, how.perturbation()
    x = np.array(engine.inputs.on_host(data.X), np.float64 if engine.precision == "fp64" else np.float32)
    target, spec = engine.inputs.on_host(data.targets.values), engine.inputs.spec_for(data.targets)
    class_weight = None if engine.class_weight is None else engine.inputs.on_host(engine.class_weight)
    steps = backend("numpy", None, "fp64" if engine.precision == "fp64" else "fp32")
    adv, dx, counters = np.empty_like(x), np.empty_like(x), np.zeros(COUNTERS, np.int64)
    operands: dict[str, Any] = {"x": x, "change": change, "counters": counters}
    start, move = steps.bind("perturb", start=adv, **operands), steps.bind("perturb", dx=dx, adv=adv, **operands)
    best, losses = adv, np.full(len(x), -np.inf)
    for restart in range(pgd.restarts):
        counters[BATCH_INDEX] = restart
        start()
        for _ in range(pgd.steps):
            dx[:] = engine.inference.input_gradient(adv, y)
            move()
        if pgd.restarts > 1:
            row_loss = row_losses(spec, engine.inference.outputs(adv), target, class_weight)
            # a NaN is as bad as it gets
            worse = ~(row_loss <= losses)
            losses[worse] = row_loss[worse]
            best = np.where(worse[:, None], adv, best)
    return best


def row_losses(spec: LossSpec, outputs: Array, target: Array, class_weight: Array | None = None) -> Array:
    """Return the loss of each row (n,) float64 from outputs (n, N), up to a positive factor of its own."""
    from scipy.special import log_softmax

    y, columns = outputs.astype(np.float64), outputs.shape[1]
    if spec.kind == "cross_entropy":
        q = target if spec.soft else np.arange(columns) == target[:, None]
        q = q * (1.0 - spec.label_smoothing) + spec.label_smoothing / columns
        q = q if class_weight is None else q * class_weight
        return np.asarray(-(q * log_softmax(y, axis=1)).sum(axis=1))
    with np.errstate(over="ignore"):
        return np.asarray(elements(spec.kind, y, target, delta=spec.delta, quantile=spec.quantile).sum(axis=1))
