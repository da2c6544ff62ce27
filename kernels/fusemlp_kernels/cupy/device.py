"""The card: memory, checks of arrays, kernels, streams and graphs of CuPy.

Of the other modules only ``products`` names CuPy.
"""

from __future__ import annotations

import contextlib
import functools
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
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
# The largest number of blocks of a launch, and of rows, columns and elements from row to row in cuBLAS.
LARGEST = 2**31 - 1
# dlpack.h: kDLCUDA, kDLCUDAManaged
DLPACK_DEVICES = (2, 13)
COMPUTE = {"fp32": np.float32, "tf32": np.float32, "fp16": np.float16}


def why_not() -> str | None:
    """Return why CuPy cannot work here, in its own words; None if it can."""
    try:
        # cuBLAS is loaded already; without this, the first kernel would show that the compiler is missing
        from cupy_backends.cuda.libs import nvrtc

        nvrtc.getVersion()
        count = cupy.cuda.runtime.getDeviceCount()
    except (ImportError, RuntimeError) as error:
        return str(error).splitlines()[0]
    return None if count else "there is no card"


def card_of(name: str | None, precision: str) -> tuple[int, int]:
    """Return the index of the card ``name`` ("cuda", "cuda:1"; None: the current one), and the number of cards.

    Raises BackendUnavailableError if it is missing, is not the current one or does not have that precision.
    """
    if precision not in COMPUTE:
        raise BackendUnavailableError(
            f"precision: the cupy backend offers {', '.join(COMPUTE)}, got {precision!r}; bf16 is the triton "
            "backend's, fp64 the numpy backend's"
        )
    kind, colon, number = (name or "cuda").partition(":")
    if kind != "cuda" or (colon and not number.isdecimal()):
        raise BackendUnavailableError(f"device: expected a name such as 'cuda' or 'cuda:0', got {name!r}")
    count, current = cupy.cuda.runtime.getDeviceCount(), int(cupy.cuda.runtime.getDevice())
    index = int(number) if number else current
    if index >= count:
        raise BackendUnavailableError(
            f"device: expected 'cuda' or 'cuda:0' to 'cuda:{count - 1}' for the cupy backend, got {name!r}"
        )
    if index != current:
        # outside of the kernels, CuPy works on the current card
        raise BackendUnavailableError(
            f"device: CuPy's current card is cuda:{current}, got {name!r}: call cupy.cuda.Device({index}).use() first, "
            f"or start Python with CUDA_VISIBLE_DEVICES={index}"
        )
    return index, count


@functools.cache
def _module(name: str, kind: str) -> Any:
    return cupy.RawModule(code=sources.text(name), options=sources.PRECISIONS[kind])


@functools.cache
def _kernel(module: str, kind: str, name: str) -> Any:
    return _module(module, kind).get_function(name)


def nothing() -> None:
    """Run a call over no elements."""


def in_sequence(runs: Sequence[Run]) -> Run:
    """Return one run of all ``runs``, in order."""
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
    """Return the strides in elements."""
    return tuple(step // array.dtype.itemsize for step in array.strides)


def shared(array: Any) -> Array | None:
    """Return an array on a card, of any library that shares its memory, without a copy; None for all others."""
    if getattr(array, "requires_grad", False) is True:
        # torch does not share the memory of a tensor that takes part in its gradients
        array = array.detach()
    if isinstance(array, cupy.ndarray):
        return array
    if hasattr(array, "__cuda_array_interface__"):
        return cupy.asarray(array)
    if hasattr(array, "__dlpack_device__") and array.__dlpack_device__()[0] in DLPACK_DEVICES:
        return cupy.from_dlpack(array)
    return None


def all_shared(operand: Any) -> Any:
    """Return an operand with its arrays on a card as CuPy's, those in tuples, lists and mappings too."""
    if isinstance(operand, Mapping):
        return {name: all_shared(value) for name, value in operand.items()}
    if isinstance(operand, (tuple, list)):
        return tuple(map(all_shared, operand))
    found = shared(operand)
    return operand if found is None else found


class Device:
    """A card in one precision: its memory, and what binding a call needs."""

    def __init__(self, name: str | None, precision: str) -> None:
        index, count = card_of(name, precision)
        self.precision, self.device = precision, f"cuda:{index}"
        self.dtypes = {
            "real": np.dtype(np.float32), "compute": np.dtype(COMPUTE[precision]), "float64": np.dtype(np.float64),
            "int64": np.dtype(np.int64), "uint32": np.dtype(np.uint32), "bool": np.dtype(np.bool_),
        }  # fmt: skip
        self._several = count > 1
        self._card = cupy.cuda.Device(index)
        self._kind = "half" if precision == "fp16" else "float"
        with self._card:
            self.handle = cublas.create()
        # not at the end of the process, when CUDA may be gone
        weakref.finalize(self, cublas.destroy, self.handle).atexit = False
        self._product = self.allocate(1, "real")
        # where ``follow`` was called last
        self._stream: Any = None

    # memory; for the methods without a docstring see ``contract.Backend``

    def allocate(self, size: int, dtype: str) -> Array:
        kind = self.dtypes[dtype]
        spare = ALIGNMENT_BYTES // kind.itemsize
        with self._card:
            flat = cupy.zeros(size + spare, dtype=kind)
        start = -flat.data.ptr % ALIGNMENT_BYTES // kind.itemsize
        return flat[start : start + size]

    def matrix(self, shape: tuple[int, int], dtype: str = "real") -> Array:
        """Return a zeroed matrix without gaps."""
        return self.view(self.allocate(shape[0] * shape[1], dtype), 0, shape, shape[1])

    def view(self, flat: Array, offset: int, shape: tuple[int, ...], pitch: int) -> Array:
        return self.strided(flat, offset, shape, (pitch, 1)[-len(shape) :])

    @staticmethod
    def strided(flat: Array, offset: int, shape: tuple[int, ...], strides: tuple[int, ...]) -> Array:
        """Return a view of ``flat`` from element ``offset`` on; strides in elements."""
        item = flat.dtype.itemsize
        steps = tuple(step * item for step in strides)
        return cupy.ndarray(shape, dtype=flat.dtype, memptr=flat.data + offset * item, strides=steps)

    def product_room(self, rows: int, columns: int) -> Array:
        """Return a float32 matrix for a product that the next kernel reads.

        All calls share its memory: they run one after another.
        """
        if self._product.size < rows * columns:
            self._product = self.allocate(rows * columns, "real")
        return self.view(self._product, 0, (rows, columns), columns)

    def copy_into(self, destination: Array, source: np.ndarray[Any, Any] | Array) -> None:
        if not destination.size:
            return
        if isinstance(source, np.ndarray):
            # too large for float16: infinite without a warning, as on the card
            with np.errstate(over="ignore", invalid="ignore"):
                source = np.ascontiguousarray(source, destination.dtype)
        with self._card:
            destination[...] = cupy.asarray(source).reshape(destination.shape)

    def to_host(self, array: Array) -> np.ndarray[Any, Any]:
        """See ``contract.Backend``. 16-bit numbers come back as float32."""
        with self._card:
            host = cupy.asnumpy(array)
        return np.array(host, np.float32 if host.dtype == np.float16 else host.dtype, order="C")

    def read(self, *arrays: Array) -> list[np.ndarray[Any, Any]]:
        """See ``contract.Backend``."""
        ends = np.cumsum([array.size for array in arrays])
        flat = self.allocate(int(ends[-1]), "float64")
        for end, array in zip(ends.tolist(), arrays, strict=True):
            self.copy_into(flat[end - array.size : end], array)
        return np.split(self.to_host(flat), ends[:-1])

    def place(self, array: Array) -> tuple[Any, ...]:
        """See ``contract.Backend``."""
        return array.data.ptr, array.shape, array.strides, array.dtype

    def adopt(self, array: Any) -> Array | None:
        found = shared(array)
        return found if found is not None and found.device.id == self._card.id and found.dtype.kind in "fiub" else None

    def check(
        self, op: str, name: str, array: Any, shape: tuple[int | None, ...], dtype: str, *, written: bool, flat: bool
    ) -> Array:
        """Check an operand; see ``checks.Check``."""
        if not isinstance(array, cupy.ndarray):
            raise DTypeError(
                f"{op}: {name}: expected an array on the card, of CuPy or with __cuda_array_interface__ or __dlpack__; "
                f"got {type(array).__name__}"
            )
        if array.device.id != self._card.id:
            raise ArgumentError(f"{op}: {name}: is on cuda:{array.device.id}, the kernels run on {self.device}")
        kind = self.dtypes[dtype]
        if array.dtype != kind:
            raise DTypeError(f"{op}: {name}: expected {kind}, got {array.dtype}; use {name}.astype({str(kind)!r})")
        if len(array.shape) != len(shape) or any(w not in (None, n) for n, w in zip(array.shape, shape, strict=True)):
            wanted = ", ".join("any" if size is None else str(size) for size in shape)
            raise ShapeError(f"{op}: {name}: expected shape ({wanted}), got {tuple(array.shape)}")
        if flat and not array.flags.c_contiguous:
            raise ArgumentError(
                f"{op}: {name}: expected a contiguous array, got one with a stride of {array.strides[0]} bytes"
            )
        repeated = [n > 1 and step == 0 for n, step in zip(array.shape, array.strides, strict=True)]
        if written and array.size and any(repeated):
            raise ArgumentError(f"{op}: {name}: is broadcast (stride 0), so it cannot be written; use {name}.copy()")
        return array

    # launches

    def launch(self, module: str, kernel: str, blocks: int, kept: Iterable[Array] = (), **fields: Any) -> Run:
        """Return a kernel over ``blocks`` blocks, ready to run on CuPy's current stream.

        A field is a number, an array (its address and strides) or None (null); those left out are zero. The run keeps
        its arrays alive, and those in ``kept``.
        """
        if blocks == 0:
            return nothing
        if blocks > LARGEST:
            raise ShapeError(f"{kernel}: {blocks} blocks are more than a launch can have")
        call, held = _packed(sources.layout(module, sources.argument(module, kernel)), [fields])
        arguments = (call.reshape(()),)
        with self._card:
            start = _kernel(module, self._kind, kernel)

        def run(held: Any = (*held, *kept)) -> None:
            start((blocks,), (THREADS,), arguments)

        return self.on_card(run)

    def table(self, module: str, struct: str, rows: Sequence[Mapping[str, Any]]) -> tuple[Array, list[Array]]:
        """Return a table of structures on the card, and the arrays whose addresses are in it."""
        table, held = _packed(sources.layout(module, struct), rows)
        return self.upload(table), held

    def upload(self, table: np.ndarray[Any, Any]) -> Array:
        """Return a structured array as the bytes that a kernel reads."""
        words = np.frombuffer(table.tobytes(), np.int64)
        out = self.allocate(max(len(words), 1), "int64")
        self.copy_into(out[: len(words)], words)
        return out

    def on_card(self, run: Run) -> Run:
        """Return ``run`` on this card, if there are several."""
        if not self._several:
            return run
        card = self._card

        def there() -> None:
            with card:
                run()

        return there

    def clear(self, array: Array) -> Run:
        """Return a run that fills an array with zeros."""
        return self.on_card(functools.partial(array.fill, 0))

    def capture(self, run: Run, times: int) -> Run:
        """See ``contract.Backend``: one CUDA graph. Its addresses stay valid: the bound calls keep their arrays."""
        with contextlib.ExitStack() as stack:
            stack.enter_context(self._card)
            # a stream of its own: the default stream cannot be captured
            stream = cupy.cuda.Stream(non_blocking=True)
            stack.enter_context(stream)
            stream.begin_capture()
            try:
                for _ in range(times):
                    run()
            except BaseException:
                # the capture has failed with it, and says so: the error to raise is the first
                with contextlib.suppress(RuntimeError):
                    stream.end_capture()
                raise
            graph = stream.end_capture()

        def launch(kept: Any = run) -> None:
            graph.launch()

        return self.on_card(launch)

    def follow(self) -> None:
        """See ``contract.Backend``."""
        stream = cupy.cuda.get_current_stream(self._card.id)
        if stream == self._stream or stream.is_capturing():
            return
        if self._stream is not None:
            with self._card:
                stream.wait_event(self._stream.record())
        self._stream = stream

    def synchronize(self) -> None:
        self._card.synchronize()


def _packed(layout: np.dtype[Any], rows: Sequence[Mapping[str, Any]]) -> tuple[np.ndarray[Any, Any], list[Array]]:
    """Return the rows as structures, and their arrays."""
    table, held = np.zeros(len(rows), layout), []
    for index, row in enumerate(rows):
        for name, value in row.items():
            if isinstance(value, cupy.ndarray):
                held.append(value)
                row_stride, stride = (0, 0, *strides_of(value))[-2:]
                steps = {f"{name}_row": row_stride, f"{name}_col": stride, f"{name}_step": stride}
                for field in steps.keys() & set(layout.names or ()):
                    table[field][index] = steps[field]
                value = value.data.ptr
            table[name][index] = 0 if value is None else value
    return table, held
