"""Launches: operands checked, numbers resolved, one kernel ready to be started again and again."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import triton

from fusemlp_kernels.errors import ArgumentError, DTypeError, ShapeError
from fusemlp_kernels.triton.configs import Architecture, Tile, launch_options

Tensor = torch.Tensor
Run = Callable[[], object]

# What an int32 index of a kernel can count.
LARGEST_INDEX = 2**31 - 1
_OWNED = "fusemlp_zero_padding"


def mark_owned(flat: Tensor) -> Tensor:
    """Say that the padding between the rows of every matrix in ``flat`` is zero, and is the kernels' to keep so."""
    setattr(flat, _OWNED, True)
    return flat


def is_owned(tensor: Tensor) -> bool:
    """Whether the memory is of ``mark_owned``."""
    base = tensor if tensor._base is None else tensor._base
    return bool(getattr(base, _OWNED, False))


def is_aligned(tensor: Tensor) -> bool:
    """Whether a matrix can take the fast path; see ``tiles``."""
    rows, columns = tensor.shape
    return (
        (tensor.stride(1) == 1 or columns <= 1)
        and (tensor.stride(0) % 8 == 0 or rows <= 1)
        and tensor.data_ptr() % 16 == 0
        and (columns % 8 == 0 or is_owned(tensor))
    )


def signed(word: int) -> int:
    """A 32-bit pattern as the int32 that has it: so every seed is passed in the same type."""
    word &= 0xFFFFFFFF
    return word - (1 << 32) if word >> 31 else word


@dataclass(frozen=True)
class Device:
    """Where the kernels run and in which types: everything that binding a call has to know."""

    device: torch.device
    arch: Architecture
    precision: str
    compute: torch.dtype
    interpreted: bool

    def zeros(self, size: int, dtype: torch.dtype) -> Tensor:
        """Scratch memory of a launch."""
        return torch.zeros(max(size, 1), dtype=dtype, device=self.device)

    def far_base(self, tensor: Tensor) -> Any:
        """``tensor``, as what the offsets of a table count from, which lead to other tensors.

        On AMD Triton takes it that no offset from a torch tensor below 2 GiB leaves its memory, and reckons in 32 bits;
        its own wrapper says nothing of the size.
        """
        if not self.arch.family.startswith("gfx"):
            return tensor
        return triton.reinterpret(tensor, tensor.dtype)

    def floats(self, values: Sequence[float], dtype: torch.dtype) -> Tensor:
        """Numbers that a kernel reads."""
        return torch.tensor(values, dtype=dtype, device=self.device)

    @property
    def product(self) -> str:
        """``tl.dot``'s input precision."""
        return self.arch.product(self.precision)

    def check(
        self, op: str, name: str, tensor: Tensor, shape: tuple[int | None, ...], dtype: torch.dtype | None = None
    ) -> Any:
        """``tensor``, if it is one of that shape (None: any size) and type on this device, else an error."""
        if not isinstance(tensor, Tensor):
            raise DTypeError(f"{op}: {name}: expected a torch tensor, got {type(tensor).__name__}")
        if tensor.device != self.device:
            raise ArgumentError(
                f"{op}: {name}: is on {tensor.device}, the kernels run on {self.device}; "
                f"move it with {name}.to({str(self.device)!r})"
            )
        if dtype is not None and tensor.dtype != dtype:
            raise DTypeError(f"{op}: {name}: expected {dtype}, got {tensor.dtype}; convert it with {name}.to({dtype})")
        if len(tensor.shape) != len(shape) or any(w not in (None, n) for n, w in zip(tensor.shape, shape, strict=True)):
            wanted = ", ".join("any" if size is None else str(size) for size in shape)
            raise ShapeError(f"{op}: {name}: expected shape ({wanted}), got {tuple(tensor.shape)}")
        if any(size > LARGEST_INDEX for size in tensor.shape):
            raise ShapeError(
                f"{op}: {name}: a dimension of {tuple(tensor.shape)} is more than the {LARGEST_INDEX} that a 32-bit "
                "index counts; cut the tensor into parts"
            )
        return tensor

    def check_written(
        self, op: str, name: str, tensor: Tensor, shape: tuple[int | None, ...], dtype: torch.dtype
    ) -> Tensor:
        """``check`` for an output: elements that lie on one another could not all be written."""
        self.check(op, name, tensor, shape, dtype)
        if tensor.numel() > 1 and any(
            size > 1 and stride == 0 for size, stride in zip(tensor.shape, tensor.stride(), strict=True)
        ):
            raise ArgumentError(f"{op}: {name}: is expanded (stride 0), so it cannot be written; use {name}.clone()")
        return tensor

    def launch(
        self, kernel: Any, programs: int, arguments: Mapping[str, Any], constants: Mapping[str, Any], tile: Tile
    ) -> Run:
        """The kernel over ``programs`` programs, ready to run; nothing, where there are none."""
        if programs == 0:
            return _nothing
        if programs > LARGEST_INDEX:
            raise ShapeError(f"{kernel.fn.__name__}: {programs} programs are more than a launch can have")
        options = launch_options(self.arch.family, tile)
        launch = Launch(kernel, programs, {**arguments, **constants}, options)
        return Interpreted(launch) if self.interpreted else launch.on(self.device)


def _nothing() -> None:
    return None


@dataclass(frozen=True)
class Launch:
    """A kernel with its arguments."""

    kernel: Any
    programs: int
    arguments: Mapping[str, Any]
    options: Mapping[str, Any]
    _start: Run | None = field(default=None, repr=False)

    def start(self) -> None:
        """Start it on the current stream of the current device."""
        self.kernel[(self.programs,)](**self.arguments, **self.options)

    def on(self, device: torch.device) -> Run:
        """Start it on the current stream of ``device``."""

        def run() -> None:
            with torch.cuda.device(device):
                self.start()

        return run


@dataclass(frozen=True)
class Interpreted:
    """A launch under Triton's interpreter, whose NumPy warns of what a GPU computes in silence."""

    launch: Launch

    def __call__(self) -> None:
        with np.errstate(all="ignore"):
            self.launch.start()


def in_sequence(runs: Sequence[Run]) -> Run:
    """One after another."""
    kept = tuple(run for run in runs if run is not _nothing)
    if len(kept) == 1:
        return kept[0]

    def run() -> None:
        for step in kept:
            step()

    return run


def is_interpreted() -> bool:
    """Whether Triton's kernels run under its interpreter in this process (TRITON_INTERPRET=1 when it was imported)."""
    from fusemlp_kernels.triton.clock import advance_kernel

    return not isinstance(advance_kernel, triton.runtime.jit.JITFunction)
