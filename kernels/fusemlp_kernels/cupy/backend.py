"""The CuPy backend: the kernel contract on an NVIDIA card, over CuPy arrays."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import numpy as np

from fusemlp_kernels.checks import check_names
from fusemlp_kernels.contract import Traits
from fusemlp_kernels.cupy.calls import BINDERS
from fusemlp_kernels.cupy.device import Array, Device, all_shared, strides_of

_log = logging.getLogger("fusemlp.kernels")


class CupyBackend(Device):
    """Implements ``contract.Backend``, which describes its methods, with CuPy arrays.

    Everything runs on CuPy's current stream.
    """

    def __init__(self, traits: Traits, device: str | None, precision: str) -> None:
        super().__init__(device, precision)
        self.traits = traits

    def extent(self, array: Array) -> tuple[float, float]:
        return float(array.min()), float(array.max())

    def is_integer(self, array: Array) -> bool:
        return array.dtype.kind in "biu"

    def from_host(self, array: np.ndarray[Any, Any] | Array, dtype: str | None = None) -> Array:
        """See ``contract.Backend``. Rows of matrices start at multiples of 16 bytes."""
        kind = {"f": "real", "i": "int64", "u": "int64", "b": "bool"}[array.dtype.kind] if dtype is None else dtype
        if not isinstance(array, np.ndarray):
            if array.dtype == self.dtypes[kind] and (array.ndim != 2 or 1 in strides_of(array)):
                return array
            _log.info(
                "an array %s of %s on the device is copied once: the kernels read %s in rows without gaps",
                *(tuple(array.shape), array.dtype, self.dtypes[kind]),
            )
        if array.ndim != 2:
            there = self.allocate(array.size, kind)
        else:
            rows, columns = array.shape
            pitch = -(-columns // self.traits.row_multiple) * self.traits.row_multiple
            there = self.view(self.allocate(rows * pitch, kind), 0, (rows, columns), pitch)
        self.copy_into(there, array)
        return there

    def scalar(self, array: Array, index: int) -> Array:
        return array[index].astype(self.dtypes["real"])

    def bind(self, op: str, **operands: Any) -> Callable[..., object]:
        """See ``contract.Backend``; arrays of other libraries on the card are read where they are."""
        operands = {name: all_shared(operand) for name, operand in operands.items()}
        check_names(self.traits.name, BINDERS, op, operands)
        return BINDERS[op](self, **operands)
