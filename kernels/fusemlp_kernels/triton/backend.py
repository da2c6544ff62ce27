"""The Triton backend: the kernel contract on a GPU, over torch tensors; or under Triton's interpreter, on the CPU."""

from __future__ import annotations

import dataclasses
import functools
import logging
import math
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import triton

from fusemlp_kernels.checks import check_names
from fusemlp_kernels.contract import Traits
from fusemlp_kernels.errors import BackendUnavailableError
from fusemlp_kernels.triton import configs, fleets, grouped, layers, members, narrow, rowwise
from fusemlp_kernels.triton.launch import Run, Tensor, TritonDevice, is_aligned, is_interpreted, mark_owned

_log = logging.getLogger("fusemlp.kernels")

ALIGNMENT_BYTES = 256
# dlpack.h: kDLCUDA, kDLROCM, kDLCUDAManaged
DLPACK_DEVICES = (2, 10, 13)
# The types of elements that a caller's array on the device may have.
ADOPTED = frozenset(
    {
        *(torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.bool, torch.uint8),
        *(torch.int8, torch.int16, torch.int32, torch.int64),
    }
)
# By op, the functions that are named after it.
BINDERS: dict[str, Callable[..., Callable[..., object]]] = {
    name.removeprefix("bind_"): bind
    for module in (fleets, grouped, layers, members, narrow, rowwise)
    for name, bind in vars(module).items()
    if name.startswith("bind_")
}
COMPUTE = {"fp32": torch.float32, "tf32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@functools.cache
def open_device(name: str | None, precision: str) -> TritonDevice:
    """The device ``name`` ("cuda", "cuda:1"; None: the current one), for kernels of that precision.

    Raises BackendUnavailableError for a device that is missing or has no kernels.
    """
    if precision not in COMPUTE:
        raise BackendUnavailableError(
            f"precision: the triton backend offers {', '.join(COMPUTE)}, got {precision!r}; fp64 is the numpy backend's"
        )
    if is_interpreted():
        if name not in (None, "cpu"):
            raise BackendUnavailableError(
                f"device: under TRITON_INTERPRET=1 the triton backend runs on 'cpu', got {name!r}; unset the variable"
            )
        if precision == "bf16":
            raise BackendUnavailableError(
                "precision: Triton's interpreter computes bf16 wrongly; use fp16 there, or a GPU for bf16"
            )
        arch = configs.Architecture("interpreter", 1)
        return TritonDevice(torch.device("cpu"), arch, precision, COMPUTE[precision], True)
    if not torch.cuda.is_available():
        raise BackendUnavailableError(
            f"backend: torch {torch.__version__} finds no GPU; check the driver with `fusemlp doctor`, or set "
            "TRITON_INTERPRET=1 to run the kernels on the CPU, slowly"
        )
    try:
        device = torch.device("cuda" if name is None else name)
    except RuntimeError as error:
        raise BackendUnavailableError(f"device: expected a name such as 'cuda' or 'cuda:0', got {name!r}") from error
    count = torch.cuda.device_count()
    if device.type != "cuda" or (device.index or 0) >= count:
        raise BackendUnavailableError(
            f"device: expected 'cuda' or 'cuda:0' to 'cuda:{count - 1}' for the triton backend, got {name!r}"
        )
    device = torch.device("cuda", torch.cuda.current_device() if device.index is None else device.index)
    properties = torch.cuda.get_device_properties(device)
    target = properties.gcnArchName if torch.version.hip else f"sm_{properties.major}{properties.minor}"
    arch = configs.Architecture(configs.family_of(target), properties.multi_processor_count)
    configs.check_compiler(arch.family, triton.__version__)
    return TritonDevice(device, arch, precision, COMPUTE[precision], False)


class TritonBackend:
    """Implements ``contract.Backend`` with torch tensors."""

    def __init__(self, traits: Traits, device: str | None, precision: str) -> None:
        self._device = open_device(device, precision)
        arch, limits = self._device.arch, traits.narrow
        tile = configs.narrow_tile(arch, precision)
        if limits is not None:
            widths = tuple((name, each.columns) for name, each in configs.NARROW.get(arch.family, {}).items())
            rows, each = (limits.rows, 2) if tile is None else (tile.rows, tile.programs)
            most = configs.narrow_layers(arch)
            limits = dataclasses.replace(limits, layers=most, widths=widths, rows=rows, programs=each * arch.processors)
        # the interpreter is slow on every plan, and most of its users want eager steps
        plans = ("chip", "card", "resident", "narrow", "eager") if self._device.interpreted else traits.plans
        kept = {"card": "card" in configs.TABLES[arch.family], "chip": arch.family in configs.CHIP}
        plans = tuple(plan for plan in plans if kept.get(plan, True))
        self.traits = dataclasses.replace(traits, plans=plans, narrow=limits)
        self.device = str(self._device.device)
        # where ``follow`` was called last
        self._stream: torch.cuda.Stream | None = None

    def allocate(self, size: int, dtype: str) -> Tensor:
        """See ``contract.Backend``."""
        kind = self._device.dtype(dtype)
        spare = ALIGNMENT_BYTES // kind.itemsize
        flat = torch.zeros(size + spare, dtype=kind, device=self._device.device)
        start = -flat.data_ptr() % ALIGNMENT_BYTES // kind.itemsize
        mark_owned(flat)
        return flat[start : start + size]

    def view(self, flat: Tensor, offset: int, shape: tuple[int, ...], pitch: int) -> Tensor:
        """See ``contract.Backend``."""
        if len(shape) == 1:
            return flat[offset : offset + shape[0]]
        return flat.as_strided(shape, (pitch, 1), flat.storage_offset() + offset)

    def adopt(self, array: Any) -> Tensor | None:
        """See ``contract.Backend``. Under the interpreter the device is the CPU, and torch's tensors there are its."""
        if not isinstance(array, Tensor):
            if self._device.interpreted:
                return None
            if hasattr(array, "__cuda_array_interface__"):
                array = torch.as_tensor(array, device=self._device.device)
            elif hasattr(array, "__dlpack_device__") and array.__dlpack_device__()[0] in DLPACK_DEVICES:
                array = torch.utils.dlpack.from_dlpack(array)
            else:
                return None
        here = array.device == self._device.device and array.layout == torch.strided and array.dtype in ADOPTED
        return array.detach() if here else None

    def extent(self, array: Tensor) -> tuple[float, float]:
        """See ``contract.Backend``."""
        low, high = torch.aminmax(array.to(torch.uint8) if array.dtype == torch.bool else array)
        return float(low), float(high)

    def is_integer(self, array: Tensor) -> bool:
        """See ``contract.Backend``."""
        return not array.dtype.is_floating_point

    def from_host(self, array: np.ndarray[Any, Any] | Tensor, dtype: str | None = None) -> Tensor:
        """See ``contract.Backend``. Matrices of numbers get rows that start at multiples of 16 bytes."""
        if isinstance(array, Tensor):
            kind = {True: "int64", False: "real"}[self.is_integer(array)] if dtype is None else dtype
            # Triton compiles another kernel for an address that is no multiple of 16 bytes
            aligned = is_aligned(array) if array.ndim == 2 else array.data_ptr() % 16 == 0
            if array.dtype == self._device.dtype(kind) and aligned:
                return array
            _log.info(
                "an array %s of %s on the device is copied once: the kernels read %s in vectors and rows that start at "
                "multiples of 16 bytes",
                *(tuple(array.shape), array.dtype, self._device.dtype(kind)),
            )
        else:
            kind = {"f": "real", "i": "int64", "b": "bool"}[array.dtype.kind] if dtype is None else dtype
        if array.ndim == 2:
            pitch = -(-array.shape[1] // self.traits.row_multiple) * self.traits.row_multiple
            tensor = self.view(self.allocate(len(array) * pitch, kind), 0, tuple(array.shape), pitch)
        else:
            tensor = self.allocate(math.prod(array.shape), kind).reshape(array.shape)
        self.copy_into(tensor, array)
        return tensor

    def to_host(self, array: Tensor) -> np.ndarray[Any, Any]:
        """See ``contract.Backend``. 16-bit numbers come back as float32."""
        wide = array.to(torch.float32) if array.dtype in (torch.bfloat16, torch.float16) else array
        return np.array(wide.cpu().numpy(), order="C")

    def read(self, *arrays: Tensor) -> list[np.ndarray[Any, Any]]:
        """See ``contract.Backend``."""
        flat = torch.cat([array.reshape(-1).to(torch.float64) for array in arrays]).cpu().numpy()
        return np.split(flat, np.cumsum([array.numel() for array in arrays])[:-1])

    def place(self, array: Tensor) -> tuple[Any, ...]:
        """See ``contract.Backend``."""
        return array.data_ptr(), tuple(array.shape), array.stride(), array.dtype

    def copy_into(self, destination: Tensor, source: np.ndarray[Any, Any] | Tensor) -> None:
        """See ``contract.Backend``."""
        if isinstance(source, Tensor):
            destination.copy_(source.reshape(destination.shape))
            return
        contiguous = np.ascontiguousarray(source)
        # torch warns of read-only memory
        tensor = torch.from_numpy(contiguous if contiguous.flags.writeable else contiguous.copy())
        self._device.upload(destination, tensor.reshape(destination.shape))

    def scalar(self, array: Tensor, index: int) -> Tensor:
        """See ``contract.Backend``."""
        return array[index].to(torch.float32)

    def capture(self, run: Run, times: int) -> Run:
        """See ``contract.Backend``: one CUDA graph. Its addresses stay valid, since the bound calls keep their tensors
        alive. While the caller captures a graph of their own, the runs become a part of that one."""
        if self._device.interpreted:
            raise BackendUnavailableError("plan: Triton's interpreter has no graphs; use plan='eager'")
        graph = None if torch.cuda.is_current_stream_capturing() else self._captured(run, times)

        def replay() -> None:
            nonlocal graph
            if torch.cuda.is_current_stream_capturing():
                for _ in range(times):
                    run()
                return
            if graph is None:
                graph = self._captured(run, times)
            graph.replay()

        return replay

    def _captured(self, run: Run, times: int) -> torch.cuda.CUDAGraph:
        """Return the graph of ``times`` runs; raises BackendUnavailableError if it is empty."""
        graph, device = torch.cuda.CUDAGraph(), self._device.device
        # torch's own stream for captures belongs to the first device that captured
        stream = torch.cuda.Stream(device)
        try:
            with warnings.catch_warnings(), torch.cuda.device(device):
                warnings.filterwarnings("error", message="The CUDA Graph is empty")
                # work of other threads on the card does not end the capture
                with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
                    for _ in range(times):
                        run()
        except UserWarning as error:
            raise BackendUnavailableError(
                f"plan: the graph of a step on {device} is empty, so it would train nothing; use plan='eager'"
            ) from error
        return graph

    def bind(self, op: str, **operands: Any) -> Callable[..., object]:
        """See ``contract.Backend``."""
        check_names(self.traits.name, BINDERS, op, operands)
        return BINDERS[op](self._device, **operands)

    def follow(self) -> None:
        """See ``contract.Backend``."""
        device = self._device.device
        # of each step: torch.cuda.current_stream makes an object, this reads a number
        if self._device.interpreted or (
            self._stream is not None and self._stream.cuda_stream == torch._C._cuda_getCurrentRawStream(device.index)
        ):
            return
        with torch.cuda.device(device):
            if not torch.cuda.is_current_stream_capturing():
                stream = torch.cuda.current_stream(device)
                if self._stream is not None:
                    stream.wait_stream(self._stream)
                self._stream = stream

    def synchronize(self) -> None:
        """See ``contract.Backend``."""
        if not self._device.interpreted:
            torch.cuda.synchronize(self._device.device)
