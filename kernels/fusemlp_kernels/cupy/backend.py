"""The CuPy backend: the kernel contract on an NVIDIA card, over CuPy arrays."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable
from typing import Any

import numpy as np

from fusemlp_kernels.contract import Traits, missing_op
from fusemlp_kernels.cupy.device import FLOAT32, Array, Run, open_device, strides_of
from fusemlp_kernels.cupy.layers import bind_grad_input, bind_linear
from fusemlp_kernels.cupy.losses import bind_linear_loss_grad, bind_loss_grad
from fusemlp_kernels.cupy.tables import bind_advance
from fusemlp_kernels.cupy.updates import bind_grad_weight, bind_grad_weight_update, bind_update
from fusemlp_kernels.errors import ArgumentTypeError

_log = logging.getLogger("fusemlp.kernels")

BINDERS: dict[str, Callable[..., Callable[..., object]]] = {
    "linear": bind_linear,
    "linear_loss_grad": bind_linear_loss_grad,
    "loss_grad": bind_loss_grad,
    "grad_input": bind_grad_input,
    "grad_weight": bind_grad_weight,
    "grad_weight_update": bind_grad_weight_update,
    "update": bind_update,
    "advance": bind_advance,
}


class CupyBackend:
    """Implements ``contract.Backend`` with CuPy arrays. Everything runs on CuPy's current stream."""

    def __init__(self, traits: Traits, device: str | None, precision: str) -> None:
        self._device = open_device(device, precision)
        self.traits = traits if self._device.captures else dataclasses.replace(traits, plans=("eager",))
        self.device = self._device.name
        self._dtypes: dict[str, Any] = {
            "real": np.float32,
            "compute": self._device.compute,
            "float64": np.float64,
            "int64": np.int64,
            "bool": np.bool_,
        }

    def allocate(self, size: int, dtype: str) -> Array:
        """See ``contract.Backend``."""
        return self._device.zeros(size, self._dtypes[dtype])

    def view(self, flat: Array, offset: int, shape: tuple[int, ...], pitch: int) -> Array:
        """See ``contract.Backend``."""
        if len(shape) == 1:
            return flat[offset : offset + shape[0]]
        return self._device.view(flat, offset, shape, (pitch, 1))

    def adopt(self, array: Any) -> Array | None:
        """See ``contract.Backend``."""
        return self._device.adopt(array)

    def extent(self, array: Array) -> tuple[float, float]:
        """See ``contract.Backend``."""
        return float(array.min()), float(array.max())

    def is_integer(self, array: Array) -> bool:
        """See ``contract.Backend``."""
        return array.dtype.kind in "biu"

    def from_host(self, array: np.ndarray[Any, Any] | Array, dtype: str | None = None) -> Array:
        """See ``contract.Backend``. Matrices of numbers get rows that start at multiples of 16 bytes."""
        kind = {"f": "real", "i": "int64", "u": "int64", "b": "bool"}[array.dtype.kind] if dtype is None else dtype
        if not isinstance(array, np.ndarray):
            if array.dtype == self._dtypes[kind] and (array.ndim != 2 or 1 in strides_of(array)):
                return array
            _log.info(
                "an array %s of %s on the device is copied once: the kernels read %s in rows without gaps",
                *(tuple(array.shape), array.dtype, np.dtype(self._dtypes[kind])),
            )
        if array.ndim != 2:
            there = self.allocate(array.size, kind)
        else:
            rows, columns = array.shape
            pitch = -(-columns // self.traits.row_multiple) * self.traits.row_multiple
            there = self.view(self.allocate(rows * pitch, kind), 0, (rows, columns), pitch)
        self.copy_into(there, array)
        return there

    def to_host(self, array: Array, out: np.ndarray[Any, Any] | None = None) -> np.ndarray[Any, Any]:
        """See ``contract.Backend``. 16-bit numbers come back as float32."""
        host = self._device.to_host(array)
        host = np.array(host, np.float32 if host.dtype == np.float16 else host.dtype, order="C")
        if out is None:
            return host
        np.copyto(out, host)
        return out

    def copy_into(self, destination: Array, source: np.ndarray[Any, Any] | Array) -> None:
        """See ``contract.Backend``."""
        if destination.size:
            self._device.copy_into(destination, source)

    def scalar(self, array: Array, index: int) -> Array:
        """See ``contract.Backend``."""
        return array[index].astype(FLOAT32)

    def capture(self, run: Run, times: int) -> Run:
        """See ``contract.Backend``: one CUDA graph. Every address in it stays what it is, since the bound calls hold
        on to their arrays."""
        return self._device.capture(run, times)

    def bind(self, op: str, **operands: Any) -> Callable[..., object]:
        """See ``contract.Backend``."""
        if op not in BINDERS:
            raise missing_op(self.traits.name, op, BINDERS)
        try:
            return BINDERS[op](self._device, **operands)
        except TypeError as error:
            if "unexpected keyword" in str(error) or "missing" in str(error):
                raise ArgumentTypeError(f"{op}: {error}; the operands are listed in contract.py") from error
            raise

    def synchronize(self) -> None:
        """See ``contract.Backend``."""
        self._device.synchronize()
