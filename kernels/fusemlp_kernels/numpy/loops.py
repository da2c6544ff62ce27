"""The functions that this process has compiled: loops of tables, and the order of rows.

Numba is imported when one of them is first needed.
"""

from __future__ import annotations

import functools
import os
import threading
from collections.abc import Set
from importlib import import_module
from typing import Any

import numpy as np

from fusemlp_kernels import philox
from fusemlp_kernels.contract import ACTIVATIONS, LOSSES
from fusemlp_kernels.errors import MissingLibraryError
from fusemlp_kernels.philox import FEISTEL_ROUNDS, radix, seed_key
from fusemlp_kernels.pointwise import OPTIMIZERS

Array = np.ndarray[Any, Any]

# Names and fields of ``compiled.tables``, and names of the printed formulas, that a table may do without, so that no
# code is compiled for them.
OPTIMIZER_NAMES = tuple(f"RULE_{name.upper()}" for name in OPTIMIZERS)
NAMES = frozenset(
    {
        *("GATHER", "AFFINE", "ACTIVATE", "ENTROPY", "ELEMENTWISE", "PADDING", "BACKWARD"),
        *("WEIGHT", "BIAS", "SLOPES", "NORM", "UPDATE", "PACK"),
        *("SQUARES", "SHRINK", "BY_ITSELF", "PERTURB", "MEMBERS_AFFINE", "MEMBERS_BACKWARD", "HEADS", "HEADS_BACKWARD"),
        *("noisy", "drawn", "members", "parts", "by_r", "by_s", "param", "average", "panels", "pulls"),
        *("keep", "soft", "smoothed", "ignores", "weighted", "class_weighted", "wide", "descends", "slope", "dslope"),
        *(name.upper() for name in (*ACTIVATIONS, *LOSSES)),
        *OPTIMIZER_NAMES,
    }
)

# Set, one loop for all tables is compiled, once; unset, each kind of table compiles what it uses, in less time.
WHOLE_LOOP = "FUSEMLP_WHOLE_LOOP"
_loading = threading.Lock()
# The loops of this process by the names that they have code for, and the names of single calls that have not run yet.
_loops: dict[tuple[str, frozenset[str]], Any] = {}
_waiting: set[str] = set()


def compiled(module: str) -> Any:
    """A module of ``compiled``, whose import imports numba."""
    try:
        return import_module(f"fusemlp_kernels.numpy.compiled.{module}")
    except ImportError as error:
        raise MissingLibraryError(
            f"backend: training on the numpy backend needs numba, which cannot be imported ({error}); install it again "
            "with pip install --force-reinstall numba"
        ) from error


# Rows that NumPy orders before numba compiles the order: a short training does without the 0.4 s that this takes.
_NUMPY_ROWS = 1 << 20
_ordered = 0


def row_order(n: int, seed: int, epoch: int) -> Array:
    """The same order as ``philox.row_order``; compiled, which is faster, once a process orders many rows."""
    global _ordered
    if _ordered < _NUMPY_ROWS:
        # each order costs NumPy as much as some 4,000 rows
        _ordered += n + 4000
        return philox.row_order(n, seed, epoch)
    return compiled_row_order(n, seed, epoch)


def compiled_row_order(n: int, seed: int, epoch: int) -> Array:
    """The order of the rows in an epoch, (n,) int64, by numba."""
    with _loading:
        permute = compiled("philox").compiled_row_order()
    order, a = np.empty(n, np.int64), radix(n)
    low, high = seed_key(seed)
    permute(order, np.empty((FEISTEL_ROUNDS, a), np.int64), np.empty((2, a), np.int64), low, high, epoch)
    return order


def work_for(names: frozenset[str], real: Any, *, alone: bool) -> Any:
    """A function that has code for ``names``: one of this process, or a new one, that all threads share.

    Without ``alone`` a new one is for all the single calls that wait for theirs: those of a step are compiled together.
    """
    with _loading:
        work = _loaded(names, real)
        if work is None:
            if not alone:
                names |= _waiting
                _waiting.clear()
            if os.environ.get(WHOLE_LOOP):
                names = NAMES
            work = compiled("pruning").compiled_work(NAMES - names, real)
            _loops[real.char, names] = work
        return work


def _loaded(names: frozenset[str], real: Any) -> Any:
    found = (work for (char, known), work in tuple(_loops.items()) if char == real.char and names <= known)
    return next(found, None)


class _Later:
    """A function that is chosen when its address is first asked for."""

    def __init__(self, names: frozenset[str], real: Any) -> None:
        self._names, self._real = names, real
        _waiting.update(names)

    @functools.cached_property
    def address(self) -> int:
        address: int = work_for(self._names, self._real, alone=False).address
        return address


def loop_of(names: Set[str], real: Any, *, alone: bool) -> Any:
    """The loop for a table that uses ``names``: chosen now with ``alone``, else where none fits at the first run."""
    known = NAMES & names
    return (work_for(known, real, alone=True) if alone else _loaded(known, real)) or _Later(known, real)
