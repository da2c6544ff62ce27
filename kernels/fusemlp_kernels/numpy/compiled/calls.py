"""Reading a row of calls."""

from __future__ import annotations

from typing import Any

from numba.extending import register_jitable

from fusemlp_kernels.numpy.compiled.options import EXACT
from fusemlp_kernels.numpy.compiled.tables import FIXED_SLOPE, SLOPE
from fusemlp_kernels.numpy.compiled.views import elements


@register_jitable(**EXACT)
def slope_of(call: Any, numbers: Any, like: Any) -> float:
    """The slope of a call's activation."""
    if call[SLOPE]:
        return float(elements(like, call[SLOPE])[0])
    return numbers[FIXED_SLOPE]


@register_jitable(**EXACT)
def block(like: Any, address: int, first: int, columns: int) -> Any:
    """The rows of an array from ``first`` on."""
    return elements(like, address + like.itemsize * first * columns)
