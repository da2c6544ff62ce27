"""The card, and what is asked of CuPy: memory, kernels, streams, graphs.

No other module of the package names CuPy, but ``blas`` for the products.
"""

from __future__ import annotations

import contextlib
import functools
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import cupy
import numpy as np
from cupy_backends.cuda.libs import cublas

from fusemlp_kernels.cupy import sources
from fusemlp_kernels.errors import ArgumentError, BackendUnavailableError, DTypeError, ShapeError

Array = Any
Run = Callable[[], object]

ALIGNMENT_BYTES = 256
THREADS = 256
# What a launch can have of blocks, and cuBLAS of rows, columns and elements between them.
LARGEST = 2**31 - 1
# dlpack.h: kDLCUDA, kDLCUDAManaged
DLPACK_DEVICES = (2, 13)
COMPUTE = {"fp32": np.float32, "tf32": np.float32, "fp16": np.float16}
INT64, FLOAT32, FLOAT64 = np.dtype(np.int64), np.dtype(np.float32), np.dtype(np.float64)


def why_not() -> str | None:
    """What keeps CuPy from working here, in its own words; None if nothing does."""
    try:
        # cuBLAS is loaded already; the compiler would be missed only when the first kernel is compiled
        from cupy_backends.cuda.libs import nvrtc

        nvrtc.getVersion()
        count = cupy.cuda.runtime.getDeviceCount()
    except (ImportError, RuntimeError) as error:
        return str(error).splitlines()[0]
    return None if count else "there is no card"


def open_device(name: str | None, precision: str) -> Device:
    """The card ``name`` ("cuda", "cuda:1"; None: the current one), for products of that precision.

    Raises BackendUnavailableError where it is not there or has no such precision.
    """
    if precision not in COMPUTE:
        raise BackendUnavailableError(
            f"precision: the cupy backend offers {', '.join(COMPUTE)}, got {precision!r}; bf16 is the triton "
            "backend's, fp64 the numpy backend's"
        )
    try:
        count = cupy.cuda.runtime.getDeviceCount()
    except cupy.cuda.runtime.CUDARuntimeError as error:
        raise BackendUnavailableError(
            f"backend: CuPy {cupy.__version__} finds no card ({error}); `fusemlp doctor` says what is missing"
        ) from error
    kind, _, number = (name or "cuda").partition(":")
    if kind != "cuda" or not (number.isdecimal() or (number == "" and ":" not in (name or ""))):
        raise BackendUnavailableError(f"device: expected a name such as 'cuda' or 'cuda:0', got {name!r}")
    current = int(cupy.cuda.runtime.getDevice())
    index = int(number) if number else current
    if index >= count:
        raise BackendUnavailableError(
            f"device: expected 'cuda' or 'cuda:0' to 'cuda:{count - 1}' for the cupy backend, got {name!r}"
        )
    if index != current:
        # what is done to CuPy's arrays outside of the kernels is done on the current card
        raise BackendUnavailableError(
            f"device: CuPy's current card is cuda:{current}, got {name!r}: call cupy.cuda.Device({index}).use() first, "
            f"or start Python with CUDA_VISIBLE_DEVICES={index}"
        )
    return Device(index, count, precision)


@functools.cache
def _module(name: str, kind: str) -> Any:
    return cupy.RawModule(code=sources.text(name), options=sources.PRECISIONS[kind])


@functools.cache
def _kernel(module: str, kind: str, name: str) -> Any:
    return _module(module, kind).get_function(name)


class Launch:
    """A kernel with its one argument, ready to be started on CuPy's current stream.

    ``kept``: the arrays whose addresses are in the argument.
    """

    __slots__ = ("arguments", "blocks", "kept", "kernel")

    def __init__(self, kernel: Any, blocks: int, call: np.ndarray[Any, Any], kept: Sequence[Array]) -> None:
        self.kernel, self.blocks, self.arguments, self.kept = kernel, (blocks,), (call,), tuple(kept)

    def __call__(self) -> None:
        self.kernel(self.blocks, (THREADS,), self.arguments)


def nothing() -> None:
    """The bound form of a call over no elements."""


def in_sequence(runs: Sequence[Run]) -> Run:
    """One after another."""
    kept = tuple(run for run in runs if run is not nothing)
    if not kept:
        return nothing
    if len(kept) == 1:
        return kept[0]

    def run() -> None:
        for step in kept:
            step()

    return run


def strides_of(array: Array) -> tuple[int, ...]:
    """Strides in elements, as the kernels take them."""
    return tuple(step // array.dtype.itemsize for step in array.strides)


class Device:
    """A card in one precision: what binding a call has to know."""

    def __init__(self, index: int, count: int, precision: str) -> None:
        self.index, self.precision = index, precision
        self.name = f"cuda:{index}"
        self.compute = np.dtype(COMPUTE[precision])
        self._several = count > 1
        self._card = cupy.cuda.Device(index)
        self._kind = "half" if precision == "fp16" else "float"
        with self._card:
            self.handle = cublas.create()
        # not at the end of the process, when CUDA may be gone
        weakref.finalize(self, cublas.destroy, self.handle).atexit = False
        self._product = self.zeros(1, FLOAT32)

    # memory

    def zeros(self, size: int, dtype: Any) -> Array:
        """A flat, zeroed, 256-byte aligned array."""
        kind = np.dtype(dtype)
        spare = ALIGNMENT_BYTES // kind.itemsize
        with self._card:
            flat = cupy.zeros(size + spare, dtype=kind)
        start = -flat.data.ptr % ALIGNMENT_BYTES // kind.itemsize
        return flat[start : start + size]

    def view(self, flat: Array, offset: int, shape: tuple[int, ...], strides: tuple[int, ...]) -> Array:
        """A view of ``flat`` from element ``offset`` on; strides in elements."""
        item = flat.dtype.itemsize
        steps = tuple(step * item for step in strides)
        return cupy.ndarray(shape, dtype=flat.dtype, memptr=flat.data + offset * item, strides=steps)

    def product_room(self, rows: int, columns: int) -> Array:
        """A float32 matrix for a product that the kernel behind it reads: all calls, which run one after another, have
        it in common."""
        if self._product.size < rows * columns:
            self._product = self.zeros(rows * columns, FLOAT32)
        return self.view(self._product, 0, (rows, columns), (columns, 1))

    def upload(self, table: np.ndarray[Any, Any]) -> Array:
        """A structured array, as the bytes that a kernel reads."""
        words = np.frombuffer(table.tobytes(), np.int64)
        out = self.zeros(max(len(words), 1), INT64)
        if len(words):
            self.copy_into(out, words)
        return out

    def copy_into(self, destination: Array, source: np.ndarray[Any, Any] | Array) -> None:
        """Write an array of the host or of this card into a device array of as many elements, in its type."""
        if isinstance(source, cupy.ndarray):
            with self._card:
                destination[...] = source.reshape(destination.shape)
            return
        # what is too large for float16 becomes infinite in silence, as on the card
        with np.errstate(over="ignore", invalid="ignore"):
            host = np.ascontiguousarray(source, destination.dtype).reshape(destination.shape)
        with self._card:
            destination[...] = cupy.asarray(host)

    def to_host(self, array: Array) -> np.ndarray[Any, Any]:
        """A copy on the host."""
        with self._card:
            host: np.ndarray[Any, Any] = cupy.asnumpy(array)
        return host

    def adopt(self, array: Any) -> Array | None:
        """An array on this card, of any library that shares its memory, without a copy; None for all others."""
        if getattr(array, "requires_grad", False) is True:
            # torch shares no memory that a gradient is to be told of
            array = array.detach()
        if isinstance(array, cupy.ndarray):
            there = array
        elif hasattr(array, "__cuda_array_interface__"):
            there = cupy.asarray(array)
        elif hasattr(array, "__dlpack_device__") and array.__dlpack_device__()[0] in DLPACK_DEVICES:
            there = cupy.from_dlpack(array)
        else:
            return None
        return there if there.device.id == self.index and there.dtype.kind in "fiub" else None

    def adopted(self, op: str, name: str, array: Any) -> Array:
        """An array of CuPy, or of any library that shares its memory on the card, without a copy."""
        if isinstance(array, cupy.ndarray):
            return array
        if hasattr(array, "__cuda_array_interface__"):
            return cupy.asarray(array)
        if hasattr(array, "__dlpack__") and not isinstance(array, np.ndarray):
            return cupy.from_dlpack(array)
        raise DTypeError(
            f"{op}: {name}: expected an array on the card, of CuPy or with __cuda_array_interface__ or __dlpack__; got "
            f"{type(array).__name__}"
        )

    # checks

    def check(self, op: str, name: str, array: Any, shape: tuple[int | None, ...], dtype: np.dtype[Any]) -> Array:
        """``array``, if it is one of that shape (None: any size) and type on this card, else an error."""
        array = self.adopted(op, name, array)
        if array.device.id != self.index:
            raise ArgumentError(f"{op}: {name}: is on cuda:{array.device.id}, the kernels run on {self.name}")
        if array.dtype != dtype:
            raise DTypeError(f"{op}: {name}: expected {dtype}, got {array.dtype}; use {name}.astype({str(dtype)!r})")
        if len(array.shape) != len(shape) or any(w not in (None, n) for n, w in zip(array.shape, shape, strict=True)):
            wanted = ", ".join("any" if size is None else str(size) for size in shape)
            raise ShapeError(f"{op}: {name}: expected shape ({wanted}), got {tuple(array.shape)}")
        return array

    def check_written(
        self, op: str, name: str, array: Any, shape: tuple[int | None, ...], dtype: np.dtype[Any]
    ) -> Array:
        """``check`` for an output: elements that lie on one another could not all be written."""
        array = self.check(op, name, array, shape, dtype)
        if array.size and any(size > 1 and step == 0 for size, step in zip(array.shape, array.strides, strict=True)):
            raise ArgumentError(f"{op}: {name}: is broadcast (stride 0), so it cannot be written; use {name}.copy()")
        return array

    # launches

    def launch(self, module: str, kernel: str, struct: str, blocks: int, **fields: Any) -> Run:
        """A kernel over ``blocks`` blocks, ready to run. Fields are numbers, arrays (their addresses) and None (null);
        what is not given is zero."""
        if blocks == 0:
            return nothing
        if blocks > LARGEST:
            raise ShapeError(f"{kernel}: {blocks} blocks are more than a launch can have")
        call = np.zeros((), sources.layout(module, struct))
        kept = []
        for name, value in fields.items():
            if isinstance(value, cupy.ndarray):
                kept.append(value)
                value = value.data.ptr
            call[name] = 0 if value is None else value
        return self.on_card(Launch(self.kernel(module, kernel), blocks, call, kept))

    def kernel(self, module: str, name: str) -> Any:
        """A kernel as CuPy has it: called with the blocks, the threads of each and its arguments."""
        with self._card:
            return _kernel(module, self._kind, name)

    def rows_of(self, module: str, struct: str, rows: Sequence[dict[str, Any]]) -> tuple[Array, list[Array]]:
        """A table of structures on the card, and the arrays whose addresses are in it."""
        table = np.zeros(len(rows), sources.layout(module, struct))
        kept: list[Array] = []
        for index, row in enumerate(rows):
            for name, value in row.items():
                if isinstance(value, cupy.ndarray):
                    kept.append(value)
                    value = value.data.ptr
                table[index][name] = 0 if value is None else value
        return self.upload(table), kept

    def on_card(self, run: Run) -> Run:
        """``run`` on this card, where there are several."""
        if not self._several:
            return run
        card = self._card

        def there() -> None:
            with card:
                run()

        return there

    def clear(self, array: Array) -> Run:
        """``array`` = 0, contiguous."""
        return self.on_card(functools.partial(array.fill, 0))

    @property
    def captures(self) -> bool:
        """Whether this CuPy captures what is started on a stream."""
        return hasattr(cupy.cuda.Stream, "begin_capture")

    def capture(self, run: Run, times: int) -> Run:
        """One CUDA graph of ``times`` runs, started on the current stream. ``run`` has been run before."""
        with contextlib.ExitStack() as stack:
            stack.enter_context(self._card)
            # a stream of its own: the default stream cannot be captured
            stream = cupy.cuda.Stream(non_blocking=True)
            stack.enter_context(stream)
            stream.begin_capture()
            try:
                for _ in range(times):
                    run()
            finally:
                graph = stream.end_capture()

        def launch(kept: Any = run) -> None:
            graph.launch()

        return self.on_card(launch)

    def synchronize(self) -> None:
        """Wait for all that was started on the card."""
        self._card.synchronize()
