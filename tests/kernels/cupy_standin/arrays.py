"""``cupy.ndarray`` and its constructors, as far as the backend uses them."""

import math

import numpy as np

from cupy_standin import streams
from cupy_standin.memory import Memory, MemoryPointer, Misuse, at_address


class Flags:
    """The memory layout flags of an array."""

    def __init__(self, c_contiguous):
        self.c_contiguous = c_contiguous


class ndarray:
    """An array on the card; see ``cupy.ndarray``."""

    # ci/check_cupy_names.py compares their names
    shape: tuple
    strides: tuple
    dtype: np.dtype
    ndim: int
    size: int
    nbytes: int
    data: MemoryPointer

    def __init__(self, shape, dtype=float, memptr=None, strides=None):
        self.shape = (shape,) if isinstance(shape, int) else tuple(map(int, shape))
        self.dtype = np.dtype(dtype)
        plain = tuple(self.dtype.itemsize * math.prod(self.shape[i + 1 :]) for i in range(len(self.shape)))
        self.strides = plain if strides is None else tuple(map(int, strides))
        self.ndim, self.size = len(self.shape), math.prod(self.shape)
        self.nbytes = self.size * self.dtype.itemsize
        if memptr is None:
            streams.refuse_in_capture("an allocation")
            memptr = MemoryPointer(Memory(self.nbytes), 0)
        self.data = memptr

    def __getattr__(self, name):
        raise AttributeError(f"cupy.ndarray.{name}: the stand-in has no such name")

    def __array__(self, *_):
        raise TypeError("Implicit conversion to a NumPy array is not allowed. Use cupy.asnumpy().")

    @property
    def device(self):
        return streams.Device(0)

    @property
    def flags(self):
        return Flags(bool(host_of(self).flags.c_contiguous))

    @property
    def __cuda_array_interface__(self):
        return {
            "shape": self.shape, "typestr": self.dtype.str, "data": (self.data.ptr, False), "strides": self.strides,
            "version": 3,
        }  # fmt: skip

    def __len__(self):
        if not self.shape:
            raise TypeError("len() of unsized object")
        return self.shape[0]

    def item(self):
        return asnumpy(self).item()

    def __int__(self):
        return int(self.item())

    def __float__(self):
        return float(self.item())

    def __mul__(self, other):
        return _computed(np.multiply, self, other)

    __rmul__ = __mul__

    def __add__(self, other):
        return _computed(np.add, self, other)

    __radd__ = __add__

    def __truediv__(self, other):
        return _computed(np.divide, self, other)

    def __iadd__(self, other):
        streams.start(lambda: _assign(self, host_of(self) + _value(other)))
        return self

    def sum(self):
        return self._reduced(np.sum)

    def __getitem__(self, key):
        if isinstance(key, ndarray) and key.dtype.kind == "i":
            out = ndarray((*key.shape, *self.shape[1:]), self.dtype)
            streams.start(lambda: _assign(out, host_of(self)[host_of(key)]))
            return out
        parts = key if isinstance(key, tuple) else (key,)
        for part in parts:
            if not isinstance(part, (int, np.integer, slice, type(...), type(None))):
                raise Misuse(f"cupy.ndarray: the stand-in takes numbers, slices and ... as an index, got {part!r}")
        # As in CuPy, a single element is an array without dimensions.
        part = host_of(self)[parts if ... in parts else (*parts, ...)]
        offset = part.__array_interface__["data"][0] - self.data.ptr if part.size else 0
        return ndarray(part.shape, self.dtype, self.data + offset, part.strides)

    def __setitem__(self, key, value):
        place = self[key]
        if isinstance(value, ndarray):
            source = value
            streams.start(lambda: _assign(place, host_of(source)))
        elif isinstance(value, (int, float, np.number)):
            streams.start(lambda: _assign(place, value))
        else:
            raise Misuse(f"cupy.ndarray: the stand-in assigns numbers and arrays of CuPy, got {type(value).__name__}")

    def min(self):
        return self._reduced(np.min)

    def max(self):
        return self._reduced(np.max)

    def _reduced(self, function):
        out = ndarray((), self.dtype)
        streams.start(lambda: _assign(out, function(host_of(self))))
        return out

    def reshape(self, *shape):
        """Return a view if the strides allow one, else a copy, as CuPy does."""
        host = host_of(self)
        wanted = host.reshape(*shape)
        if self.size and np.shares_memory(wanted, host):
            return ndarray(wanted.shape, self.dtype, self.data, wanted.strides)
        out = ndarray(wanted.shape, self.dtype)
        streams.start(lambda: _assign(out, host_of(self).reshape(out.shape)))
        return out

    def fill(self, value):
        self[...] = value

    def astype(self, dtype):
        out = ndarray(self.shape, dtype)
        out[...] = self
        return out


def host_of(array):
    """The memory itself, as a NumPy array."""
    return at_address(array.data.ptr, array.shape, array.dtype, array.strides)


def _value(operand):
    if not isinstance(operand, (ndarray, int, float)):
        raise Misuse(
            f"cupy.ndarray: the stand-in reckons with numbers and arrays of CuPy, got {type(operand).__name__}"
        )
    return host_of(operand) if isinstance(operand, ndarray) else operand


def _computed(function, array, other):
    """Return a new array, of the shape and type that NumPy's rules give two arrays, or of those of the one."""
    both = isinstance(other, ndarray)
    shape = np.broadcast_shapes(array.shape, other.shape) if both else array.shape
    out = ndarray(shape, np.result_type(array.dtype, other.dtype) if both else array.dtype)
    streams.start(lambda: _assign(out, function(host_of(array), _value(other))))
    return out


def _assign(place, value):
    with np.errstate(all="ignore"):
        np.copyto(host_of(place), value, casting="unsafe")


def zeros(shape, dtype=float):
    out = ndarray(shape, dtype)
    out.fill(0)
    return out


def asarray(a):
    """Copy a NumPy array to the card; use an object with ``__cuda_array_interface__`` without a copy."""
    if isinstance(a, ndarray):
        return a
    if hasattr(a, "__cuda_array_interface__"):
        found = a.__cuda_array_interface__
        return ndarray(found["shape"], found["typestr"], _foreign(found, a), found.get("strides"))
    if not isinstance(a, np.ndarray):
        raise Misuse(f"cupy.asarray: the stand-in takes arrays, got {type(a).__name__}")
    streams.refuse_in_capture("a copy from the host")
    out = ndarray(a.shape, a.dtype)
    host_of(out)[...] = a
    return out


def from_dlpack(array):
    """Return an array that shares the memory of another library's array, which is on the host here."""
    host = np.from_dlpack(array)
    return ndarray(host.shape, host.dtype, _foreign(host.__array_interface__, array), host.strides)


def _foreign(interface, owner):
    """Memory of another owner, from an array's lowest address to its highest."""
    address, shape = interface["data"][0], interface["shape"]
    item = np.dtype(interface["typestr"]).itemsize
    strides = interface.get("strides")
    if strides is None:
        strides = tuple(item * math.prod(shape[i + 1 :]) for i in range(len(shape)))
    reach = [step * (size - 1) for step, size in zip(strides, shape, strict=True)] if 0 not in shape else []
    low = sum(step for step in reach if step < 0)
    size = sum(abs(step) for step in reach) + item if 0 not in shape else 0
    return MemoryPointer(Memory(size, address + low, owner), -low)


def asnumpy(a):
    streams.refuse_in_capture("a copy to the host")
    return np.array(host_of(a), order="C")
