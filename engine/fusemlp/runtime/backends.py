"""The way to the kernels' registry: this folder is the only one of the engine that knows it."""

from __future__ import annotations

from collections.abc import Collection
from contextlib import AbstractContextManager

from fusemlp.inputs.arrays import Array
from fusemlp.runtime.ranks import own_card
from fusemlp_kernels.contract import Backend
from fusemlp_kernels.errors import BackendUnavailableError
from fusemlp_kernels.philox import row_order as shuffled_rows
from fusemlp_kernels.registry import TRAITS, availability
from fusemlp_kernels.registry import backend as open_backend
from fusemlp_kernels.registry import choose as first_available

__all__ = [
    "TRAITS",
    "availability",
    "cpu_threads",
    "first_available",
    "one_thread",
    "open_backend",
    "open_here",
    "row_order",
    "thread_limits",
    "torch_backend",
]


# of all backends
PRECISIONS = {precision for traits in TRAITS.values() for precision in traits.precisions}


def open_here(name: str, device: str | None, precision: str, needs: Collection[str] = ()) -> Backend:
    """Return a backend on a device: by default, in a process of torchrun, on the card of its number if it sees that.

    ``needs``: what the backend must have, names of ``FEATURES``.
    """
    found, card = open_backend(name, device, precision, needs), own_card()
    if device is not None or card is None or not found.device.startswith("cuda"):
        return found
    try:
        return open_backend(found.traits.name, card, precision)
    except BackendUnavailableError:
        # it may see its own card alone; ranks with one card refuse to train together
        return found


def torch_backend(device_type: str) -> str:
    """Return the name of the backend that computes on torch's tensors of a device, "cpu" or "cuda", in their memory."""
    return "numpy" if device_type == "cpu" else "triton"


def cpu_threads() -> int:
    """Return how many threads the calling thread may use on the CPU now: ``fusemlp_kernels.numpy.launches``."""
    from fusemlp_kernels.numpy.launches import threads

    return threads()


def thread_limits() -> dict[str, int]:
    """Return the limits by name whose least is ``cpu_threads()``."""
    from fusemlp_kernels.numpy.launches import limits

    return limits()


def one_thread() -> AbstractContextManager[None]:
    """While it lasts, launches of the calling thread on the numpy backend have no other threads."""
    from fusemlp_kernels.numpy.launches import one_thread as only

    return only()


def row_order(backend_name: str, plan: str, n: int, seed: int, epoch: int) -> Array:
    """The order of the rows in an epoch, (n,) int64: the same for all, and compiled where numba compiles the plan."""
    if backend_name == "numpy" and plan == "resident":
        from fusemlp_kernels.numpy.launches import row_order as compiled

        return compiled(n, seed, epoch)
    return shuffled_rows(n, seed, epoch)
