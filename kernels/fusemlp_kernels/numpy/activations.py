"""Activations and their derivatives, in place, in row blocks that stay in the cache between the passes.

Every function binds: it returns a callable without arguments that allocates nothing.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]
# What a bound call returns is not looked at: NumPy functions with ``out`` return their output.
Run = Callable[[], object]

# Elements of a block: with its scratch it fits the second-level cache of any machine of the last ten years.
BLOCK = 1 << 15


def nothing() -> None:
    """The bound form of a pass that is not needed."""


def in_sequence(runs: list[Run]) -> Run:
    """One callable for several, run in order."""
    runs = [run for run in runs if run is not nothing]
    if not runs:
        return nothing
    if len(runs) == 1:
        return runs[0]
    steps = tuple(runs)

    def run() -> None:
        for step in steps:
            step()

    return run


def row_blocks(rows: int, columns: int) -> list[slice]:
    """Consecutive blocks of rows of about ``BLOCK`` elements."""
    height = max(1, BLOCK // max(columns, 1))
    return [slice(start, min(start + height, rows)) for start in range(0, rows, height)]


def activate(name: str, y: Array, z: Array | None, slope: float, slope_param: Array | None) -> Run:
    """Bind ``y = act(y)``, or ``y = act(z)`` for the activations that are given ``z`` (M, N); ``y`` (M, N)."""
    if name == "identity":
        if z is None or z is y:
            return nothing
        return lambda: np.copyto(y, z)
    if name == "relu":
        source = y if z is None else z
        zero = np.zeros((), y.dtype)
        return lambda: np.maximum(source, zero, out=y)
    scratch = np.empty(_block_shape(y), y.dtype)
    runs = []
    for block in row_blocks(*y.shape):
        part = y[block]
        source = part if z is None else z[block]
        runs.append(_activate_block(name, part, source, scratch[: len(part)], slope, slope_param))
    return in_sequence(runs)


def _block_shape(y: Array) -> tuple[int, int]:
    """The shape of the largest block of ``y``."""
    return (min(y.shape[0], max(1, BLOCK // max(y.shape[1], 1))), y.shape[1])


def _activate_block(name: str, y: Array, z: Array, s: Array, slope: float, slope_param: Array | None) -> Run:
    half = y.dtype.type(0.5)
    one = y.dtype.type(1.0)

    if name == "leaky_relu":
        factor = y.dtype.type(slope)
        pick = np.maximum if slope <= 1.0 else np.minimum

        def leaky_relu() -> None:
            np.multiply(z, factor, out=s)
            pick(z, s, out=y)

        return leaky_relu
    if name == "prelu":
        assert slope_param is not None

        def prelu() -> None:
            np.multiply(z, slope_param, out=s)
            (np.maximum if slope_param[0] <= 1.0 else np.minimum)(z, s, out=y)

        return prelu
    if name == "sigmoid":
        # sigmoid(z) = (1 + tanh(z / 2)) / 2 cannot overflow, and NumPy's tanh is vectorised.
        def sigmoid() -> None:
            np.multiply(z, half, out=y)
            np.tanh(y, out=y)
            np.multiply(y, half, out=y)
            np.add(y, half, out=y)

        return sigmoid
    if name == "tanh":
        return lambda: np.tanh(z, out=y)
    if name == "gelu":
        # loads half of SciPy, for which nobody else should wait
        from scipy.special import erf

        root = y.dtype.type(math.sqrt(0.5))

        def gelu() -> None:
            np.multiply(z, root, out=s)
            erf(s, out=s)
            np.add(s, one, out=s)
            np.multiply(s, half, out=s)
            np.multiply(z, s, out=y)

        return gelu
    assert name == "silu", name

    def silu() -> None:
        np.multiply(z, half, out=s)
        np.tanh(s, out=s)
        np.multiply(s, half, out=s)
        np.add(s, half, out=s)
        np.multiply(z, s, out=y)

    return silu


def multiply_by_derivative(
    name: str,
    dz: Array,
    y: Array,
    z: Array | None,
    *,
    slope: float = 0.0,
    slope_param: Array | None = None,
    dslope: Array | None = None,
    keep: Array | None = None,
    rate: float = 0.0,
) -> Run:
    """Bind ``dz *= act'`` for the activation that produced ``y``; all (M, N).

    ``y`` is the output after dropout: with ``keep`` it is zero where an element was dropped and ``1 / (1 - rate)``
    times the activation elsewhere, and ``dz`` is multiplied by ``keep`` too (its scale is the caller's). ``z`` is the
    pre-activation, for the activations of ``NEEDS_Z``. ``dslope`` (1,) receives prelu's gradient.
    """
    if name == "identity" and keep is None:
        return nothing
    scratch = np.empty((2, *_block_shape(y)), y.dtype)
    runs: list[Run] = []
    if name == "prelu":
        assert dslope is not None
        gradient = dslope
        runs.append(lambda: gradient.fill(0.0))
    for block in row_blocks(*y.shape):
        part = dz[block]
        rows = len(part)
        if keep is not None and name != "relu":
            runs.append(drop(part, keep[block]))
        source = y[block] if z is None else z[block]
        runs.append(
            _derivative_block(
                name,
                part,
                source,
                scratch[0, :rows],
                scratch[1, :rows],
                slope,
                slope_param,
                dslope,
                rate,
            )
        )
    return in_sequence(runs)


def drop(a: Array, keep: Array) -> Run:
    """Bind ``a = a where keep, else 0``, in place. As integers, because a dropped NaN or infinity is zero too."""
    bits = a.view(np.uint32 if a.itemsize == 4 else np.uint64)
    return lambda: np.multiply(bits, keep, out=bits)


def _derivative_block(
    name: str,
    dz: Array,
    source: Array,
    s: Array,
    t: Array,
    slope: float,
    slope_param: Array | None,
    dslope: Array | None,
    rate: float,
) -> Run:
    zero = dz.dtype.type(0.0)
    half = dz.dtype.type(0.5)
    one = dz.dtype.type(1.0)
    undo_scale = dz.dtype.type(1.0 - rate)

    def step() -> None:
        # 1 above zero, 0 elsewhere, and NaN for NaN
        np.maximum(source, zero, out=s)
        np.minimum(s, one, out=s)
        np.ceil(s, out=s)

    if name == "identity":
        return nothing
    if name == "relu":

        def relu() -> None:
            # an output is not negative: this is 1 above zero, 0 at zero, and NaN for NaN
            np.minimum(source, one, out=s)
            np.ceil(s, out=s)
            np.multiply(dz, s, out=dz)

        return relu
    if name == "leaky_relu":
        factor = dz.dtype.type(slope)
        rest = dz.dtype.type(1.0 - slope)

        def leaky_relu() -> None:
            step()
            np.multiply(s, rest, out=s)
            np.add(s, factor, out=s)
            np.multiply(dz, s, out=dz)

        return leaky_relu
    if name == "prelu":
        assert slope_param is not None and dslope is not None

        def prelu() -> None:
            np.minimum(source, zero, out=s)
            np.multiply(s, dz, out=s)
            np.add(dslope, s.sum(), out=dslope)
            step()
            np.multiply(s, one - slope_param[0], out=s)
            np.add(s, slope_param, out=s)
            np.multiply(dz, s, out=dz)

        return prelu
    if name == "sigmoid":

        def sigmoid() -> None:
            np.multiply(source, undo_scale, out=s)
            np.subtract(one, s, out=t)
            np.multiply(s, t, out=s)
            np.multiply(dz, s, out=dz)

        return sigmoid
    if name == "tanh":

        def tanh() -> None:
            np.multiply(source, undo_scale, out=s)
            np.multiply(s, s, out=s)
            np.subtract(one, s, out=s)
            np.multiply(dz, s, out=dz)

        return tanh
    if name == "gelu":
        from scipy.special import erf

        root = dz.dtype.type(math.sqrt(0.5))
        minus_half = dz.dtype.type(-0.5)
        density = dz.dtype.type(1.0 / math.sqrt(2.0 * math.pi))

        def gelu() -> None:
            # Phi(z) + z phi(z), the normal distribution and its density
            np.multiply(source, source, out=s)
            np.multiply(s, minus_half, out=s)
            np.exp(s, out=s)
            np.multiply(s, density, out=s)
            np.multiply(s, source, out=s)
            np.multiply(source, root, out=t)
            erf(t, out=t)
            np.add(t, one, out=t)
            np.multiply(t, half, out=t)
            np.add(s, t, out=s)
            np.multiply(dz, s, out=dz)

        return gelu
    assert name == "silu", name

    def silu() -> None:
        # s (1 + z (1 - s)), s the sigmoid
        np.multiply(source, half, out=s)
        np.tanh(s, out=s)
        np.multiply(s, half, out=s)
        np.add(s, half, out=s)
        np.subtract(one, s, out=t)
        np.multiply(t, source, out=t)
        np.add(t, one, out=t)
        np.multiply(s, t, out=s)
        np.multiply(dz, s, out=dz)

    return silu
