"""Launches: operands checked, numbers resolved, one kernel ready to be started again and again."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import triton
from triton.tools.tensor_descriptor import TensorDescriptor

from fusemlp_kernels.errors import ArgumentError, DTypeError, ShapeError
from fusemlp_kernels.triton.configs import Architecture, Tile, launch_options, takes_descriptors

Tensor = torch.Tensor
Run = Callable[[], object]

# The most that goes to the device at once through pinned memory.
UPLOAD_BYTES = 16 << 20
# The most that an int32 index of a kernel counts.
LARGEST_INDEX = 2**31 - 1
DTYPES = {
    "real": torch.float32,
    "float64": torch.float64,
    "int32": torch.int32,
    "int64": torch.int64,
    "bool": torch.bool,
}
_OWNED = "fusemlp_zero_padding"


def mark_owned(flat: Tensor) -> Tensor:
    """Mark ``flat`` as memory in which the padding between the rows of every matrix is zero; the kernels keep it so."""
    setattr(flat, _OWNED, True)
    return flat


def is_owned(tensor: Tensor) -> bool:
    """Return whether the memory is of ``mark_owned``."""
    base = tensor if tensor._base is None else tensor._base
    return bool(getattr(base, _OWNED, False))


def is_aligned(tensor: Tensor) -> bool:
    """Return whether a matrix can take the fast path; see ``tiles``."""
    rows, columns = tensor.shape
    return (
        (tensor.stride(1) == 1 or columns <= 1)
        and (tensor.stride(0) % 8 == 0 or rows <= 1)
        and tensor.data_ptr() % 16 == 0
        and (columns % 8 == 0 or is_owned(tensor))
    )


def signed(word: int) -> int:
    """Return the int32 with a 32-bit pattern, so that every seed is passed in the same type."""
    word &= 0xFFFFFFFF
    return word - (1 << 32) if word >> 31 else word


@dataclass(frozen=True)
class TritonDevice:
    """The place where the kernels run and the types they run in: everything that binding a call needs."""

    device: torch.device
    arch: Architecture
    precision: str
    compute: torch.dtype
    interpreted: bool

    def dtype(self, kind: str) -> torch.dtype:
        """Torch's type for a type of the contract."""
        return self.compute if kind == "compute" else DTYPES[kind]

    def zeros(self, size: int, kind: str) -> Tensor:
        """Scratch memory of a launch."""
        return torch.zeros(max(size, 1), dtype=self.dtype(kind), device=self.device)

    def matrix(self, rows: int, columns: int, kind: str) -> Tensor:
        """Scratch memory of a matrix on the fast path: (rows, columns), zeros."""
        pitch = -(-columns // 8) * 8
        return mark_owned(self.zeros(rows * pitch, kind)).as_strided((rows, columns), (pitch, 1))

    def numbers(self, values: Any, kind: str) -> Tensor:
        """Numbers that a kernel reads."""
        return torch.tensor(values, dtype=self.dtype(kind), device=self.device)

    def upload(self, destination: Tensor, source: Tensor) -> None:
        """Copy from host memory through pinned memory, which the device reads while the host goes on.

        Torch's allocator of pinned memory gives out a piece again when the copy from it has ended. A large array goes
        in parts: the host fills one while the device reads the part before it.
        """
        if destination.is_cpu:
            # under the interpreter
            destination.copy_(source)
            return
        rows = max(1, UPLOAD_BYTES // max(1, source[:1].nbytes)) if source.ndim else 0
        if not source.ndim or len(source) <= rows:
            self._start_upload(destination, source)
            return
        ended: list[torch.cuda.Event] = []
        for part, there in zip(source.split(rows), destination.split(rows), strict=True):
            if len(ended) == 2:
                ended.pop(0).synchronize()
            self._start_upload(there, part)
            ended.append(torch.cuda.Event())
            ended[-1].record(torch.cuda.current_stream(self.device))

    @staticmethod
    def _start_upload(destination: Tensor, source: Tensor) -> None:
        pinned = torch.empty(source.shape, dtype=destination.dtype, pin_memory=True)
        destination.copy_(pinned.copy_(source), non_blocking=True)

    def described(
        self, tile: Tile, blocks: Mapping[str, tuple[str, str]], constants: Mapping[str, Any], **matrices: Tensor
    ) -> dict[str, Any]:
        """Matrices as tensor descriptors, or nothing where the kernel reads them by pointers.

        ``blocks`` names the constants with the rows and columns of a matrix's block. CUDA's cuTensorMapEncodeTiled
        wants rows that start at multiples of 16 bytes and do not overlap.
        """
        fits = constants["ALIGNED"] and takes_descriptors(self.arch, self.precision, tile)
        for matrix in matrices.values():
            (rows, columns), pitch = matrix.shape, matrix.stride(0)
            fits = fits and rows > 0 and 0 < columns <= pitch and pitch % 8 == 0
        if not fits:
            return {}
        return {
            name: TensorDescriptor(
                matrix, [*matrix.shape], [matrix.stride(0), 1], [constants[side] for side in blocks[name]]
            )
            for name, matrix in matrices.items()
        }

    def far_base(self, tensor: Tensor) -> Any:
        """``tensor``, as the base of a table's offsets, which lead to other tensors.

        On AMD Triton assumes that offsets from a torch tensor below 2 GiB stay in its memory, and computes them in 32
        bits. Triton's own wrapper of a pointer says nothing of the size.
        """
        if not self.arch.family.startswith("gfx"):
            return tensor
        return triton.reinterpret(tensor, tensor.dtype)

    @property
    def product(self) -> str:
        """The kind of ``tiles.product``."""
        return self.arch.product(self.precision)

    def check(
        self,
        op: str,
        name: str,
        tensor: Any,
        shape: tuple[int | None, ...],
        kind: str | None = None,
        *,
        written: bool = False,
        flat: bool = False,
    ) -> Any:
        """See ``checks.Check``; any element type where ``kind`` is None."""
        if not isinstance(tensor, Tensor):
            raise DTypeError(f"{op}: {name}: expected a torch tensor, got {type(tensor).__name__}")
        if tensor.device != self.device:
            raise ArgumentError(
                f"{op}: {name}: is on {tensor.device}, the kernels run on {self.device}; "
                f"move it with {name}.to({str(self.device)!r})"
            )
        dtype = tensor.dtype if kind is None else self.dtype(kind)
        if tensor.dtype != dtype:
            raise DTypeError(f"{op}: {name}: expected {dtype}, got {tensor.dtype}; convert it with {name}.to({dtype})")
        size = tuple(tensor.shape)
        if size != shape and (
            len(size) != len(shape) or any(w not in (None, n) for n, w in zip(size, shape, strict=True))
        ):
            wanted = ", ".join("any" if side is None else str(side) for side in shape)
            raise ShapeError(f"{op}: {name}: expected shape ({wanted}), got {size}")
        if max(size, default=0) > LARGEST_INDEX:
            raise ShapeError(
                f"{op}: {name}: a dimension of {size} is more than the {LARGEST_INDEX} that a 32-bit index counts; cut "
                "the tensor into parts"
            )
        # a stride of 0 is harmless where nothing is repeated
        if written and 0 in tensor.stride() and tensor.numel():
            if any(side > 1 and stride == 0 for side, stride in zip(size, tensor.stride(), strict=True)):
                raise ArgumentError(
                    f"{op}: {name}: is expanded (stride 0), so it cannot be written; use {name}.clone()"
                )
        if flat and not tensor.is_contiguous():
            raise ArgumentError(f"{op}: {name}: expected a contiguous tensor, got strides {tensor.stride()}")
        return tensor

    def launch(
        self, kernel: Any, programs: int, arguments: Mapping[str, Any], constants: Mapping[str, Any], tile: Tile
    ) -> Run:
        """The kernel over ``programs`` programs, ready to run; nothing, where there are none.

        It starts on the current stream of this device. Under the interpreter NumPy would warn of results that a GPU
        computes in silence.
        """
        if programs == 0:
            return _nothing
        if programs > LARGEST_INDEX:
            raise ShapeError(f"{kernel.fn.__name__}: {programs} programs are more than a launch can have")
        options = {**arguments, **constants, **launch_options(self.arch.family, tile)}
        again: Run | None = None

        def run() -> None:
            nonlocal again
            with np.errstate(all="ignore") if self.interpreted else torch.cuda.device(self.device):
                if again is not None:
                    again()
                    return
                compiled = kernel[(programs,)](**options)
                if not self.interpreted:
                    again = _started_again(kernel, compiled, programs, options)

        return run


def _started_again(kernel: Any, compiled: Any, programs: int, given: Mapping[str, Any]) -> Run:
    """Return the launch of a compiled kernel with arguments that never change.

    It leaves out Triton's search for the kernel of these arguments, and its comparison of all global names that the
    kernel reads with their values when it was compiled.
    """
    defaults = kernel.signature.parameters
    arguments = [given[name] if name in given else defaults[name].default for name in kernel.arg_names]
    return functools.partial(compiled[(programs, 1, 1)], *arguments)


def _nothing() -> None:
    return None


def in_sequence(runs: Sequence[Run]) -> Run:
    """Run one after another."""
    kept = tuple(run for run in runs if run is not _nothing)
    if len(kept) == 1:
        return kept[0]

    def run() -> None:
        for step in kept:
            step()

    return run


def is_interpreted() -> bool:
    """Return whether the kernels run under Triton's interpreter here (TRITON_INTERPRET=1 when it was imported)."""
    from fusemlp_kernels.triton.clock import advance_kernel

    return not isinstance(advance_kernel, triton.runtime.jit.JITFunction)
