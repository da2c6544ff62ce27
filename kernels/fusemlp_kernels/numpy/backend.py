"""The NumPy backend: the kernel contract on the host, over preallocated arrays."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from fusemlp_kernels.binders import check_names, refusal
from fusemlp_kernels.contract import Traits
from fusemlp_kernels.errors import ArgumentError, BackendUnavailableError
from fusemlp_kernels.numpy.calls import ENTRIES
from fusemlp_kernels.numpy.compiled import tables as t
from fusemlp_kernels.numpy.cores import threads
from fusemlp_kernels.numpy.tables import Array, BoundTable, CallTable, Run

# Arrays start at multiples of this.
ALIGNMENT_BYTES = 256
Operands = Mapping[str, Any]
REAL = {"fp32": np.float32, "fp64": np.float64}


class NumpyBackend:
    """Implements ``contract.Backend`` with NumPy arrays."""

    def __init__(self, traits: Traits, device: str | None, precision: str) -> None:
        if device not in (None, "cpu"):
            raise BackendUnavailableError(f"device: the numpy backend runs on 'cpu', got {device!r}")
        if precision not in REAL:
            raise BackendUnavailableError(
                f"precision: the numpy backend offers {' and '.join(traits.precisions)}, got {precision!r}"
            )
        threads()  # refuses an impossible FUSEMLP_NUM_THREADS
        self.traits = traits
        self.device = "cpu"
        self._dtypes: dict[str, Any] = {
            "real": REAL[precision],
            "compute": REAL[precision],
            "float64": np.float64,
            "int64": np.int64,
            "bool": np.bool_,
        }

    def allocate(self, size: int, dtype: str) -> Array:
        """See ``contract.Backend``."""
        kind = np.dtype(self._dtypes[dtype])
        memory = np.zeros(size * kind.itemsize + ALIGNMENT_BYTES, np.uint8)
        start = -memory.ctypes.data % ALIGNMENT_BYTES
        return memory[start : start + size * kind.itemsize].view(kind)

    def view(self, flat: Array, offset: int, shape: tuple[int, ...], pitch: int) -> Array:
        """See ``contract.Backend``."""
        if len(shape) == 1:
            return flat[offset : offset + shape[0]]
        rows, columns = shape
        return flat[offset : offset + rows * pitch].reshape(rows, pitch)[:, :columns]

    def adopt(self, array: Any) -> None:
        """See ``contract.Backend``: all that NumPy can read is a host's array."""
        return None

    def extent(self, array: Array) -> tuple[float, float]:
        """See ``contract.Backend``."""
        return float(array.min()), float(array.max())

    def is_integer(self, array: Array) -> bool:
        """See ``contract.Backend``."""
        return array.dtype.kind in "biu"

    def from_host(self, array: Array, dtype: str | None = None) -> Array:
        """See ``contract.Backend``."""
        return array

    def to_host(self, array: Array) -> Array:
        """See ``contract.Backend``."""
        return np.array(array, order="C")

    def read(self, *arrays: Array) -> list[Array]:
        """See ``contract.Backend``."""
        return [np.array(array, np.float64, ndmin=1) for array in arrays]

    def place(self, array: Array) -> None:
        """See ``contract.Backend``; no array is adopted."""

    def copy_into(self, destination: Array, source: Array) -> None:
        """See ``contract.Backend``."""
        np.copyto(destination, source, casting="same_kind")

    def scalar(self, array: Array, index: int) -> Array:
        """See ``contract.Backend``."""
        return np.array(array[index], self._dtypes["real"])

    def capture(self, run: Run, times: int) -> Run:
        """See ``contract.Backend``."""
        raise BackendUnavailableError("plan: the numpy backend has no graphs; use plan='eager'")

    def bind(self, op: str, **operands: Any) -> Callable[..., object]:
        """See ``contract.Backend``."""
        check_names(self.traits.name, BINDERS, op, operands)
        real = self._dtypes["real"]
        if op == "train_resident":
            return _bind_train_resident(real, **operands)
        table = CallTable(real)
        return table.bind(ENTRIES[op](table, table.operands(op, operands)))

    def bind_calls(self, calls: Sequence[tuple[str, Operands]], arrays: Sequence[Array | None]) -> Run:
        """Bind calls on one batch as one launch: ``run(addresses)`` finds ``arrays``, contiguous, at the addresses."""
        table = CallTable(self._dtypes["real"])
        counts = [ENTRIES[op](table, table.operands(op, operands)) for op, operands in calls]
        return table.bind_moving(counts[-1], arrays)

    def synchronize(self) -> None:
        """See ``contract.Backend``; every call has ended when it returns."""


def _bind_train_resident(
    real: Any,
    *,
    calls: Sequence[tuple[str, Operands]],
    rows: Array | None,
    batch: int,
    arenas: Mapping[str, Array],
    epoch_stats: Array | None = None,
    arrays: Mapping[str, Array] | None = None,
    memo: dict[str, Any] | None = None,
    shards: Sequence[int] = (),
) -> Run:
    """The contract's ``train_resident``; the calls have all that lies in ``arenas``, and ``rows``."""
    del arenas, rows
    run: Run | None
    if memo and arrays is not None:
        run = memo["form"].bind(arrays, epoch_stats)
        if run is not None:
            return run
    counted = ("linear_loss_grad", "loss_grad")
    losses = [operands for op, operands in calls if op in counted and operands.get("stats") is not None]
    output = next(iter(losses), None)
    if output is None or "rule" not in calls[-1][1]:
        raise ArgumentError(
            "train_resident: calls: expected those of a training step, with a loss and last what advances "
            f"the clock, got {', '.join(op for op, _ in calls)}"
        )
    table = CallTable(real, shards=len(shards), shard_rows=batch)
    for at, (op, operands) in enumerate(calls):
        table.shard = shards[at * len(shards) // len(calls)] if shards else 0
        ENTRIES[op](table, table.operands(op, operands))
    table.control(output["counters"], output["stats"])
    if epoch_stats is not None:
        table.enter_head(epoch_stats=epoch_stats, epochs=len(epoch_stats))
    run = table.bind(t.COUNTED, alone=True)
    # an array with two names may be two arrays in the next model
    distinct = arrays is not None and len({id(array) for array in arrays.values()}) == len(arrays)
    if memo is not None and arrays is not None and distinct and not table.converts:
        memo["form"] = BoundTable(table, arrays)
    return run


# A penalty is entered beside the gradients that it changes, and not by itself.
BINDERS: dict[str, Callable[..., Any]] = {op: enter for op, enter in ENTRIES.items() if not refusal("numpy", op)}
BINDERS["train_resident"] = _bind_train_resident
