"""The way to the kernels' registry: this folder is the only one of the engine that knows it."""

from fusemlp.inputs.arrays import Array
from fusemlp.runtime.ranks import own_card
from fusemlp_kernels import registry
from fusemlp_kernels.contract import Backend
from fusemlp_kernels.errors import BackendUnavailableError
from fusemlp_kernels.numpy import launches
from fusemlp_kernels.philox import row_order as shuffled_rows

TRAITS, availability = registry.TRAITS, registry.availability
open_backend, first_available = registry.backend, registry.choose
# The threads that the calling thread may use on the CPU now; the limits by name, whose least they are; and a context in
# which launches of the calling thread on the numpy backend have no other threads.
cpu_threads, thread_limits, one_thread = launches.threads, launches.limits, launches.one_thread

# of all backends
PRECISIONS = {precision for traits in TRAITS.values() for precision in traits.precisions}


def open_here(name: str, device: str | None, precision: str) -> Backend:
    """Return a backend on a device: by default, in a process of torchrun, on the card of its number if it sees that."""
    found, card = open_backend(name, device, precision), own_card()
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


def row_order(backend_name: str, plan: str, n: int, seed: int, epoch: int) -> Array:
    """The order of the rows in an epoch, (n,) int64: the same for all, and compiled where numba compiles the plan."""
    if backend_name == "numpy" and plan == "resident":
        return launches.row_order(n, seed, epoch)
    return shuffled_rows(n, seed, epoch)
