"""The NumPy backend: the kernel contract on the host, over preallocated arrays."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from fusemlp_kernels.checks import check_names, refusal
from fusemlp_kernels.contract import Traits
from fusemlp_kernels.errors import BackendUnavailableError
from fusemlp_kernels.numpy.calls import ENTRIES
from fusemlp_kernels.numpy.launches import aligned, threads
from fusemlp_kernels.numpy.processor import why_no_tiles
from fusemlp_kernels.numpy.tables import NUMBERS, Array, BoundTable, CallTable, Run

# Arrays start at multiples of this.
ALIGNMENT_BYTES = 256
Operands = Mapping[str, Any]
REAL = {"fp32": np.float32, "bf16": np.float32, "fp64": np.float64}


class NumpyBackend:
    """Implements ``contract.Backend``, which says what its functions do, with NumPy arrays."""

    def __init__(self, traits: Traits, device: str | None, precision: str) -> None:
        if device not in (None, "cpu"):
            raise BackendUnavailableError(
                f"device: the numpy backend runs on 'cpu', got {device!r}; leave device out, or give backend='triton' "
                "or 'cupy', which say what they need for a GPU"
            )
        if precision not in REAL:
            raise BackendUnavailableError(
                f"precision: the numpy backend offers {', '.join(traits.precisions)}, got {precision!r}"
            )
        reason = why_no_tiles() if precision == "bf16" else None
        if reason is not None:
            raise BackendUnavailableError(
                "precision: 'bf16' on the numpy backend needs a processor with AMX, as Xeons have it since 2023, "
                f"and Linux: {reason}; use precision='fp32'"
            )
        self._products = "amx" if precision == "bf16" else "products"
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
        kind = np.dtype(self._dtypes[dtype])
        return aligned(size * kind.itemsize, ALIGNMENT_BYTES).view(kind)

    def view(self, flat: Array, offset: int, shape: tuple[int, ...], pitch: int) -> Array:
        if len(shape) == 1:
            return flat[offset : offset + shape[0]]
        rows, columns = shape
        return flat[offset : offset + rows * pitch].reshape(rows, pitch)[:, :columns]

    def adopt(self, array: Any) -> None:
        """See ``contract.Backend``: all that NumPy can read is a host's array."""
        return None

    def extent(self, array: Array) -> tuple[float, float]:
        return float(array.min()), float(array.max())

    def is_integer(self, array: Array) -> bool:
        return array.dtype.kind in "biu"

    def from_host(self, array: Array, dtype: str | None = None) -> Array:
        return array

    def to_host(self, array: Array) -> Array:
        return np.array(array, order="C")

    def read(self, *arrays: Array) -> list[Array]:
        return [np.array(array, np.float64, ndmin=1) for array in arrays]

    def place(self, array: Array) -> None:
        """See ``contract.Backend``; no array is adopted."""

    def copy_into(self, destination: Array, source: Array) -> None:
        np.copyto(destination, source, casting="same_kind")

    def scalar(self, array: Array, index: int) -> Array:
        return np.array(array[index], self._dtypes["real"])

    def capture(self, run: Run, times: int) -> Run:
        raise BackendUnavailableError("plan: the numpy backend has no graphs; use plan='eager'")

    def bind(
        self, op: str, arrays: Mapping[str, Array] | None = None, memo: dict[str, Any] | None = None, **operands: Any
    ) -> Run:
        epoch_stats, numbers = operands.get("epoch_stats"), operands.pop("numbers", None)
        bound = memo.get(self._products) if memo else None
        run: Run | None = bound.bind(arrays, epoch_stats, operands.get("rule")) if bound else None
        if run is not None:
            return run
        check_names(self.traits.name, BINDERS, op, operands)
        table = CallTable(self._dtypes["real"], self._products)
        ENTRIES[op](table, table.operands(op, operands))
        run = table.bind(epoch_stats, alone=op == "train_resident")
        if numbers is not None:
            numbers.append(table.bound[0].view(np.float64)[NUMBERS])
        # an array with two names may be two arrays in the next model
        single = arrays and len({*map(id, arrays.values())}) == len(arrays)
        if memo is not None and arrays and single and not table.converts and not table.between:
            memo[self._products] = BoundTable(table, arrays)
        return run

    def bind_calls(self, calls: Sequence[tuple[str, Operands]], arrays: Sequence[Array | None]) -> Run:
        """Bind calls on one batch as one launch: ``run(addresses)`` finds ``arrays``, contiguous, at the addresses."""
        table = CallTable(self._dtypes["real"], self._products)
        for op, operands in calls:
            ENTRIES[op](table, table.operands(op, operands))
        return table.bind_moving(arrays)

    def follow(self) -> None:
        """See ``contract.Backend``; there are no streams."""

    def synchronize(self) -> None:
        """See ``contract.Backend``; every call has ended when it returns."""


# A penalty is entered beside the gradients that it changes, and not by itself.
BINDERS: dict[str, Callable[..., Any]] = {op: enter for op, enter in ENTRIES.items() if not refusal("numpy", op)}
