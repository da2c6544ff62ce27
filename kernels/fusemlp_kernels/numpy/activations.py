"""Activations and their derivatives in row blocks that stay in the cache between the passes of ``pointwise_numpy``.

Every function binds: it returns a callable without arguments that allocates nothing.
"""

from __future__ import annotations

import functools
import inspect
import re
from collections.abc import Callable
from typing import Any

import numpy as np

from fusemlp_kernels import pointwise
from fusemlp_kernels.errors import unknown_name
from fusemlp_kernels.numpy import pointwise_numpy

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


def formula(kind: str, name: str) -> tuple[Callable[..., None], int]:
    """The printed function ``kind_name``, and the number of scratch arrays that are its last arguments.

    Raises ArgumentError for a name without a formula.
    """
    function = getattr(pointwise_numpy, f"{kind}_{name}", None)
    if function is None:
        known = [one.removeprefix(f"{kind}_") for one in vars(pointwise_numpy) if one.startswith(f"{kind}_")]
        raise unknown_name(kind, name, known)
    return function, len([one for one in inspect.signature(function).parameters if re.fullmatch(r"s\d+", one)])


def activate(name: str, y: Array, z: Array | None, slope: float, slope_param: Array | None) -> Run:
    """Bind ``y = act(y)``, or ``y = act(z)`` for the activations that are given ``z`` (M, N); ``y`` (M, N)."""
    source = y if z is None else z
    if name == "identity" and source is y:
        return nothing
    function, count = formula("activate", name)
    factor = slope if slope_param is None else slope_param
    scratch = _scratch(count, y)
    return in_sequence(
        [
            functools.partial(function, y[block], source[block], factor, *scratch[:, : len(y[block])])
            for block in row_blocks(*y.shape)
        ]
    )


def _scratch(count: int, like: Array) -> Array:
    """``count`` arrays shaped like the largest block of ``like``."""
    rows, columns = like.shape
    return np.empty((count, min(rows, max(1, BLOCK // max(columns, 1))), columns), like.dtype)


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
    function, count = formula("derive", name)
    factor = slope if slope_param is None else slope_param
    learns = pointwise.ACTIVATIONS[name].by_slope is not None
    scratch = _scratch(count, y)
    runs: list[Run] = []
    if learns:
        assert dslope is not None and z is not None
        runs.append(functools.partial(dslope.fill, 0.0))
    for block in row_blocks(*y.shape):
        part = dz[block]
        rows = len(part)
        # relu's derivative is zero where its output was dropped
        if keep is not None and name != "relu":
            runs.append(drop(part, keep[block]))
        source = None if z is None else z[block]
        if learns:
            runs.append(_add_slope_gradient(name, part, source, scratch[0, :rows], dslope))
        runs.append(functools.partial(function, part, y[block], source, factor, 1.0 - rate, *scratch[:, :rows]))
    return in_sequence(runs)


def _add_slope_gradient(name: str, dz: Array, z: Any, s: Array, dslope: Any) -> Run:
    """Bind ``dslope += sum(dz * derivative by the slope)``."""
    function, _ = formula("by_slope", name)

    def run() -> None:
        function(s, z)
        np.multiply(s, dz, out=s)
        np.add(dslope, s.sum(), out=dslope)

    return run


def drop(a: Array, keep: Array) -> Run:
    """Bind ``a = a where keep, else 0``, in place. As integers, because a dropped NaN or infinity is zero too."""
    bits = a.view(np.uint32 if a.itemsize == 4 else np.uint64)
    return lambda: np.multiply(bits, keep, out=bits)
