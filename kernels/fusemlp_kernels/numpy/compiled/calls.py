"""Reading a row of calls: the rows of the batch that it has, and the memory that it names."""

from __future__ import annotations

from typing import Any

import numpy as np
from numba.extending import register_jitable

from fusemlp_kernels.contract import ROW_COUNT
from fusemlp_kernels.numpy.compiled import tables as t
from fusemlp_kernels.numpy.compiled.options import EXACT
from fusemlp_kernels.numpy.compiled.views import elements


@register_jitable(**EXACT)
def batch_rows(head: Any, counters: Any) -> int:
    """The number of rows of the batch."""
    return head.batch if head.batch != t.COUNTED else counters[ROW_COUNT]


@register_jitable(**EXACT)
def shard_rows(call: Any, head: Any, counters: Any) -> int:
    """The number of rows of the batch that a call has: all, or those of its shard."""
    whole = batch_rows(head, counters)
    return max(0, min(head.shard_rows, whole - call.shard)) if head.shard_rows else whole


@register_jitable(**EXACT)
def slope_of(call: Any, like: Any) -> float:
    """The slope of a call's activation."""
    if call.slope:
        return float(elements(like, call.slope)[0])
    return call.fixed_slope


@register_jitable(**EXACT)
def lanes_of(head: Any, task: int) -> int:
    """The address of a task's memory for random words."""
    return head.lanes + 8 * head.lanes_row * task


@register_jitable(**EXACT)
def block(like: Any, address: int, first: int, columns: int) -> Any:
    """The rows of an array from ``first`` on."""
    return elements(like, address + like.itemsize * first * columns)


@register_jitable(**EXACT)
def clear(values: Any, count: int) -> None:
    """Zeros."""
    for j in range(np.uintp(count)):
        values[j] = 0
