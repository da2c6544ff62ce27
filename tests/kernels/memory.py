"""The memory of a test's arrays: views with gaps and guard bands, which no kernel may change."""

from __future__ import annotations

import numpy as np

from fusemlp_kernels.registry import TRAITS

# Elements before and after every placed array. Before an owned one they fill a multiple of 256 bytes.
GUARD = 128
# The pitch of matrices that a device backend allocates; NumPy's have none.
ROW_MULTIPLE = TRAITS["triton"].row_multiple
INT_GUARD = -(2**40)


class Memory(np.ndarray):
    """The flat memory of one placed array; ``owned``: in the backend's own layout, (offset, shape, pitch)."""

    owned: tuple[int, tuple[int, ...], int] | None = None
    # on a device of the type that matrix products read
    compute: bool = False


class Values:
    """Random arrays of one precision, from one seed."""

    def __init__(self, seed, variant):
        self.rng = np.random.default_rng(seed)
        self.variant, self.dtype = variant, variant.real

    def normal(self, *shape, scale=1.0):
        return (scale * self.rng.standard_normal(shape)).astype(self.dtype)

    def factors(self, *shape, scale=1.0):
        """Return numbers in the type of matrix products."""
        return self.variant.rounded(self.normal(*shape, scale=scale))

    def uniform(self, low, high, *shape):
        return self.rng.uniform(low, high, shape).astype(self.dtype)

    def integers(self, high, *shape):
        return self.rng.integers(0, max(high, 1), shape)


def exact(array):
    """Return the same numbers in float64, for the oracle."""
    return None if array is None else np.array(array, np.float64)


def guard_value(dtype):
    """Return the fill value of gaps and guard bands: NaN spoils every sum that reads it."""
    return {"f": np.nan, "i": INT_GUARD, "b": True}[np.dtype(dtype).kind]


def place(values, layout, dtype=None):
    """Return an array of the same values in the memory layout ``layout``, with guard bands around it."""
    values = np.asarray(values, dtype)
    strides, first = _strides(values.shape, layout)
    last = [stride * (n - 1) for stride, n in zip(strides, values.shape, strict=True)] if values.size else []
    length = first + sum(step for step in last if step > 0) + 1 if values.size else first
    pitch = strides[0] if values.ndim == 2 else 0
    if layout == "owned":
        length = first + (values.shape[0] * pitch if values.ndim == 2 else values.size)
    flat = Memory(length + GUARD, values.dtype)
    flat[...] = guard_value(values.dtype)
    if layout == "owned":
        flat.owned = first, values.shape, pitch if values.ndim == 2 else values.size
        if values.ndim == 2:
            # the columns between width and pitch
            flat[first:length] = 0
    item = values.itemsize
    out = np.ndarray(values.shape, values.dtype, flat, first * item, [stride * item for stride in strides])
    out[...] = values
    out.flags.writeable = layout != "read-only"
    return out


def _strides(shape, layout):
    """Return the strides and the position of the first element, in elements."""
    plain = [1]
    for n in reversed(shape[1:]):
        plain.insert(0, plain[0] * n)
    if layout == "transposed":
        return [1] if len(shape) == 1 else [1, max(shape[0], 1)], GUARD
    if layout == "stepped":
        return [2 ** (len(shape) - i) * stride for i, stride in enumerate(plain)], GUARD
    if layout == "reversed":
        return [-stride for stride in plain], GUARD + sum(s * max(n - 1, 0) for s, n in zip(plain, shape, strict=True))
    if layout == "offset":
        return plain, GUARD + 3
    if layout == "pitched" and len(shape) == 2:
        return [shape[1] + 5, 1], GUARD
    if layout in ("owned", "gapped") and len(shape) == 2:
        return [-(-shape[1] // ROW_MULTIPLE) * ROW_MULTIPLE, 1], GUARD
    return plain, GUARD


def poisoned(shape, dtype, layout="plain"):
    """Return an output full of NaN, or of True for bool."""
    return place(np.full(shape, np.nan if np.dtype(dtype).kind == "f" else 1), layout, dtype)


def base_of(array):
    """Return the flat memory of an array view, guard bands included."""
    base = array
    while not isinstance(base, Memory) and isinstance(base.base, np.ndarray):
        base = base.base
    return base if isinstance(base, Memory) else base.ravel(order="K").view(array.dtype)


def position(array, base):
    """Return the array's first element and its strides within ``base``, in elements."""
    item = array.itemsize
    first = (array.__array_interface__["data"][0] - base.__array_interface__["data"][0]) // item
    return first if array.size else 0, tuple(stride // item for stride in array.strides)


def elements_of(array, base):
    """Return the indices in ``base`` of the array's elements, shaped like the array."""
    first, strides = position(array, base)
    index = np.full(array.shape, first)
    for axis, stride in enumerate(strides):
        shape = [1] * array.ndim
        shape[axis] = -1
        index += (stride * np.arange(array.shape[axis])).reshape(shape)
    return index


class Watch:
    """Assert that a call changes only the elements of its outputs, bitwise, and no zero of a padding."""

    def __init__(self, arrays, written):
        self.bases, self.free = {}, {}
        for array in arrays:
            base = base_of(array)
            key = base.__array_interface__["data"][0]
            if base.size and key not in self.bases:
                self.bases[key] = base
                self.free[key] = np.zeros(base.size, np.bool_)
        for array in written:
            base = base_of(array)
            key = base.__array_interface__["data"][0]
            if base.size:
                self.free[key][elements_of(array, base)] = True

    def remember(self):
        self.before = {key: np.array(base) for key, base in self.bases.items()}

    def check(self):
        for key, base in self.bases.items():
            bits = f"u{base.itemsize}"
            now, before = (a.view(np.ndarray).view(bits) for a in (base, self.before[key]))
            changed = (now != before) & ~self.free[key]
            if changed.any():
                at = int(np.flatnonzero(changed)[0])
                raise AssertionError(
                    f"{int(changed.sum())} elements changed outside the outputs (an input, a guard band, a gap or a "
                    f"padding); first at {at} of {base.size}: {self.before[key][at]!r} became {base[at]!r}"
                )
