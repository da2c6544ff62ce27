"""The way to the kernels' registry: this folder is the only one of the engine that knows it."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

import numpy as np

from fusemlp_kernels.contract import Backend
from fusemlp_kernels.philox import row_order as shuffled_rows
from fusemlp_kernels.registry import TRAITS, availability, backend

Array = np.ndarray[Any, Any]

__all__ = ["TRAITS", "availability", "one_blas_thread", "open_backend", "row_order"]


def open_backend(name: str, device: str | None, precision: str) -> Backend:
    """A backend for those above that may not know the registry; see ``fusemlp_kernels.registry.backend``."""
    return backend(name, device, precision)


def one_blas_thread() -> AbstractContextManager[None]:
    """While a thread that has a core computes for the numpy backend: the limits of ``threadpool_limits`` are not those
    of every library in other threads than the one which sets them."""
    from fusemlp_kernels.numpy.libraries import one_thread_here

    return one_thread_here()


def row_order(backend_name: str, plan: str, n: int, seed: int, epoch: int) -> Array:
    """The order of the rows in an epoch, (n,) int64: the same for all, and compiled where numba compiles the plan."""
    if backend_name == "numpy" and plan == "resident":
        from fusemlp_kernels.numpy.resident import row_order as compiled

        return compiled(n, seed, epoch)
    return shuffled_rows(n, seed, epoch)
