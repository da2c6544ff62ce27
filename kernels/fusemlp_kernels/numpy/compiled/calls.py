"""Reading the tables: a row of calls, the rows of the batch that it has, and the memory that it names."""

from __future__ import annotations

from typing import Any

import numpy as np
from numba.extending import register_jitable

from fusemlp_kernels.contract import ROW_COUNT
from fusemlp_kernels.numpy.compiled import tables as t
from fusemlp_kernels.numpy.compiled.options import EXACT
from fusemlp_kernels.numpy.compiled.views import elements, part


@register_jitable(**EXACT)
def row_of(integers: Any, factors: Any, at: int) -> Any:
    """A row of calls and its factors."""
    call = part(integers, t.HEAD_COLUMNS + t.CALL_COLUMNS * at)
    return call, part(factors, t.HEAD_FACTORS + t.CALL_FACTORS * at)


@register_jitable(**EXACT)
def batch_rows(integers: Any, counters: Any) -> int:
    """The number of rows of the batch."""
    return integers[t.BATCH] if integers[t.BATCH] != t.COUNTED else counters[ROW_COUNT]


@register_jitable(**EXACT)
def shard_rows(call: Any, integers: Any, counters: Any) -> int:
    """The number of rows of the batch that a call has: all, or those of its shard."""
    whole = batch_rows(integers, counters)
    return max(0, min(integers[t.SHARD_ROWS], whole - call[t.SHARD])) if integers[t.SHARD_ROWS] else whole


@register_jitable(**EXACT)
def slope_of(call: Any, numbers: Any, like: Any) -> float:
    """The slope of a call's activation."""
    if call[t.SLOPE]:
        return float(elements(like, call[t.SLOPE])[0])
    return numbers[t.FIXED_SLOPE]


@register_jitable(**EXACT)
def lanes_of(integers: Any, task: int) -> int:
    """The address of a task's memory for random words."""
    return integers[t.AT_LANES] + 8 * integers[t.LANES_ROW] * task


@register_jitable(**EXACT)
def block(like: Any, address: int, first: int, columns: int) -> Any:
    """The rows of an array from ``first`` on."""
    return elements(like, address + like.itemsize * first * columns)


@register_jitable(**EXACT)
def clear(values: Any, count: int) -> None:
    """Zeros."""
    for j in range(np.uintp(count)):
        values[j] = 0
