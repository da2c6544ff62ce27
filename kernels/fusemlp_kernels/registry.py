"""Which backends there are, which of them work on this machine, and why the others do not."""

from __future__ import annotations

import importlib.util

from fusemlp_kernels.contract import Backend, Traits
from fusemlp_kernels.errors import BackendUnavailableError, unknown_name

PRECISIONS = ("fp32", "tf32", "bf16", "fp16", "fp64")
PLANS = ("eager", "graph", "resident")

TRAITS = {
    "triton": Traits(
        name="triton",
        row_multiple=8,
        gathers_in_load=True,
        stores_masks=False,
        widest_fused_output=512,
        fused_updates=("sgd", "adam"),
        precisions=("fp32", "tf32", "bf16", "fp16"),
        plans=PLANS,
    ),
    "cupy": Traits(
        name="cupy",
        row_multiple=8,
        gathers_in_load=True,
        stores_masks=False,
        widest_fused_output=512,
        fused_updates=("sgd", "adam"),
        precisions=("fp32",),
        plans=PLANS,
    ),
    "numpy": Traits(
        name="numpy",
        # BLAS through SciPy wants matrices without gaps
        row_multiple=1,
        gathers_in_load=False,
        stores_masks=True,
        widest_fused_output=1 << 31,
        # Adam is quicker in one sweep over the arena than tensor by tensor
        fused_updates=("sgd",),
        precisions=("fp32", "fp64"),
        plans=("eager",),
    ),
}


def availability() -> dict[str, str | None]:
    """For each backend None if it works here, else one sentence: why it does not, and how to get it."""
    return {name: _reason(name) for name in TRAITS}


def _reason(name: str) -> str | None:
    if name == "numpy":
        return None
    if importlib.util.find_spec(f"fusemlp_kernels.{name}") is None:
        return f"this version of fusemlp has no {name} kernels yet; use backend='numpy'"
    return None


def choose() -> str:
    """The first backend, in the order of ``TRAITS``, that works here."""
    return next(name for name, reason in availability().items() if reason is None)


def backend(name: str, device: str | None, precision: str) -> Backend:
    """The backend ``name``, or with "auto" the first that works, on ``device`` (None: its default).

    Raises ArgumentError for a name that does not exist, BackendUnavailableError for what this machine or backend
    does not have.
    """
    if name == "auto":
        name = choose()
    if name not in TRAITS:
        raise unknown_name("backend", name, ["auto", *TRAITS])
    if precision not in PRECISIONS:
        raise unknown_name("precision", precision, PRECISIONS)
    reason = _reason(name)
    if reason is not None:
        raise BackendUnavailableError(f"backend: {name!r} is not available: {reason}")
    from fusemlp_kernels.numpy.backend import NumpyBackend

    return NumpyBackend(TRAITS[name], device, precision)
