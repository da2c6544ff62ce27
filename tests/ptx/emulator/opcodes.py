"""The instructions that compute each thread's registers from its own, as functions of NumPy arrays.

The arrays have the instruction's type and an element for each thread. From the "Instruction Set" chapter of NVIDIA's
"PTX ISA"; the names are its sections. An instruction that is not here stops the emulator.
"""

import numpy as np

TYPES = {
    "pred": np.bool_, "b8": np.uint8, "u8": np.uint8, "s8": np.int8, "b16": np.uint16, "u16": np.uint16,
    "s16": np.int16, "b32": np.uint32, "u32": np.uint32, "s32": np.int32, "b64": np.uint64, "u64": np.uint64,
    "s64": np.int64, "f16": np.float16, "f32": np.float32, "f64": np.float64,
    # bits, which no NumPy type computes with
    "bf16": np.uint16, "bf16x2": np.uint32, "f16x2": np.uint32, "tf32": np.uint32,
    "f32x2": np.uint64, "s16x2": np.uint32, "u16x2": np.uint32,
}  # fmt: skip


def f32_of_bf16(bits):
    """Return the float32 with the same value."""
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


def bf16_of_f32(value):
    """Return the bits of the nearest bfloat16, ties to even."""
    bits = value.view(np.uint32)
    odd = (bits >> np.uint32(16)) & np.uint32(1)
    rounded = (bits + np.uint32(0x7FFF) + odd) >> np.uint32(16)
    return np.where(np.isnan(value), np.uint32(0x7FFF), rounded).astype(np.uint16)


def tf32_of_f32(value):
    """Return the bits of the nearest number with ten bits of fraction, ties away from zero."""
    bits = value.view(np.uint32)
    rounded = (bits + np.uint32(0x1000)) & np.uint32(0xFFFFE000)
    return np.where(np.isfinite(value), rounded, bits)


def pair(high, low):
    """Return two 16-bit numbers in 32 bits."""
    return (high.astype(np.uint32) << np.uint32(16)) | low.astype(np.uint32)


def flushed(value):
    """Return the values with subnormal numbers replaced by zeros of their sign (``.ftz``)."""
    return np.where(np.abs(value) < np.float32(2.0**-126), np.copysign(np.float32(0), value), value)


def _fma(a, b, c):
    # A product of float32 is exact in float64. The float64 result here is rounded as it is in an extended format, which
    # no test tells from one rounding.
    wide = np.float64 if a.dtype == np.float32 else np.longdouble
    return (a.astype(wide) * b.astype(wide) + c.astype(wide)).astype(a.dtype)


def _shift_left(a, n):
    bits = a.dtype.itemsize * 8
    return np.where(n < bits, a << np.minimum(n, bits - 1).astype(a.dtype), a.dtype.type(0))


def _shift_right(a, n):
    bits = a.dtype.itemsize * 8
    moved = a >> np.minimum(n, bits - 1).astype(a.dtype)
    return moved if a.dtype.kind == "i" else np.where(n < bits, moved, a.dtype.type(0))


def _quotient(a, b):
    """Return the quotient of integers, rounded toward zero; any number where b is 0."""
    divisor = np.where(b == 0, b.dtype.type(1), b)
    found = a // divisor
    return found + ((a - found * divisor != 0) & ((a < 0) != (divisor < 0))).astype(a.dtype)


def _remainder(a, b):
    return a - _quotient(a, b) * b


def _extract(a, at, length):
    """bfe: ``length`` bits from ``at`` on, extended by the sign where the type has one."""
    bits = np.int64(a.dtype.itemsize * 8)
    at, length = at.astype(np.int64) & 255, length.astype(np.int64) & 255
    wide = a.astype(np.int64) >> np.minimum(at, bits - 1)
    spare = 64 - np.clip(length, 1, np.maximum(bits - at, 1))
    found = (wide << spare) >> spare if a.dtype.kind == "i" else wide & ((np.int64(1) << (64 - spare)) - 1)
    return np.where(length == 0, 0, found).astype(a.dtype)


def _permute(a, b, selector):
    """prmt: bytes of {b, a}, by the four digits of the selector; its bit 3 repeats the sign of the byte."""
    both = (b.astype(np.uint64) << np.uint64(32)) | a.astype(np.uint64)
    result = np.zeros(np.broadcast_shapes(both.shape, selector.shape), np.uint32)
    for byte in range(4):
        digit = (selector >> np.uint32(4 * byte)) & np.uint32(15)
        found = (both >> ((digit & np.uint32(7)) * np.uint32(8)).astype(np.uint64)) & np.uint64(255)
        sign = np.where(found & np.uint64(128), np.uint64(255), np.uint64(0))
        found = np.where(digit & np.uint32(8), sign, found)
        result |= found.astype(np.uint32) << np.uint32(8 * byte)
    return result


def _wider(a):
    return a.astype({np.dtype(np.int32): np.int64, np.dtype(np.uint32): np.uint64}[a.dtype])


def _high_product(a, b):
    return (_wider(a) * _wider(b) >> 32).astype(a.dtype)


# By the name without its type.
PLAIN = {
    "add": np.add, "sub": np.subtract, "mul": np.multiply, "mul.lo": np.multiply, "mul.hi": _high_product,
    "mul.wide": lambda a, b: _wider(a) * _wider(b), "mad.lo": lambda a, b, c: a * b + c,
    "mad.wide": lambda a, b, c: _wider(a) * _wider(b) + c, "fma.rn": _fma,
    "fma.rn.ftz": lambda a, b, c: flushed(_fma(flushed(a), flushed(b), flushed(c))),
    "div": _quotient, "rem": _remainder, "div.rn": np.divide, "div.full": np.divide,
    # NaN only if both are, or if one is
    "min": np.fmin, "max": np.fmax, "max.NaN": np.maximum,
    "abs": np.abs, "neg": np.negative, "abs.ftz": lambda a: np.abs(flushed(a)),
    "sqrt.rn": np.sqrt, "ex2.approx": np.exp2, "ex2.approx.ftz": lambda a: flushed(np.exp2(flushed(a))),
    "rcp.approx.ftz": lambda a: flushed(np.float32(1) / flushed(a)), "rcp.rn": lambda a: a.dtype.type(1) / a,
    "lg2.approx": np.log2, "lg2.approx.ftz": lambda a: np.log2(flushed(a)), "tanh.approx": np.tanh,
    "and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor, "not": np.invert,
    "shl": _shift_left, "shr": _shift_right, "bfe": _extract, "prmt": _permute, "popc": np.bitwise_count,
    "selp": lambda a, b, p: np.where(p, a, b), "mov": lambda a: a, "cvta.param": lambda a: a,
}  # fmt: skip
# Operands that have a type of their own, by name and place among the sources.
OTHER_TYPES = {
    ("shl", 1): "u32", ("shr", 1): "u32", ("bfe", 1): "u32", ("bfe", 2): "u32", ("selp", 2): "pred",
}  # fmt: skip

COMPARISONS = {
    "eq": np.equal, "ne": lambda a, b: (a < b) | (a > b), "lt": np.less, "le": np.less_equal, "gt": np.greater,
    "ge": np.greater_equal, "equ": lambda a, b: ~((a < b) | (a > b)), "neu": np.not_equal,
    "ltu": lambda a, b: ~(a >= b), "leu": lambda a, b: ~(a > b), "gtu": lambda a, b: ~(a <= b),
    "geu": lambda a, b: ~(a < b), "num": lambda a, b: (a == a) & (b == b), "nan": lambda a, b: (a != a) | (b != b),
}  # fmt: skip


def _to_integer(value, kind):
    """Round toward zero; saturate; NaN gives 0."""
    limits = np.iinfo(kind)
    whole = np.trunc(np.nan_to_num(value.astype(np.float64), nan=0.0, posinf=np.inf, neginf=-np.inf))
    # The largest float64 below the limit of 64 bits
    inside = np.clip(whole, float(limits.min), np.nextafter(float(limits.max) + 1, 0)).astype(kind)
    return np.where(whole > float(limits.max), limits.max, inside)


def conversion(name):
    """Return the type of the source, and the function, of a ``cvt``."""
    modifiers = name.split(".")[1:]
    to, source = modifiers[-2:]
    rounding = ".".join(modifiers[:-2])
    if to in ("bf16x2", "f16x2"):
        half = bf16_of_f32 if to == "bf16x2" else _f16_bits
        return source, lambda high, low: pair(half(high), half(low))
    special = {
        ("rn", "bf16", "f32"): bf16_of_f32, ("", "f32", "bf16"): f32_of_bf16, ("rna", "tf32", "f32"): tf32_of_f32,
        ("", "f64", "bf16"): lambda a: f32_of_bf16(a).astype(np.float64),
    }  # fmt: skip
    if (rounding, to, source) in special:
        return source, special[rounding, to, source]
    target = TYPES[to]
    if "bf16" in (to, source):
        raise NotImplementedError(name)
    if rounding == "rzi":
        return source, lambda a: _to_integer(a, target)
    if rounding in ("rmi", "rmi.ftz"):
        return source, lambda a: np.floor(flushed(a) if rounding == "rmi.ftz" else a)
    if rounding in ("", "rn"):
        return source, lambda a: a.astype(target)
    raise NotImplementedError(name)


def _f16_bits(value):
    return value.astype(np.float16).view(np.uint16)


def arithmetic(name):
    """Return the types of the sources (the last repeats), and the function; the result has the type of its register.

    Raises NotImplementedError for an instruction that is not here.
    """
    if name.startswith("cvt."):
        source, function = conversion(name)
        return (source,), function
    base, _, kind = name.rpartition(".")
    if name.startswith("setp."):
        compare = COMPARISONS[base.removeprefix("setp.")]
        if kind == "bf16":
            return (kind,), lambda a, b: compare(f32_of_bf16(a), f32_of_bf16(b))
        return (kind,), compare
    if base.endswith(".f32") and kind in ("bf16", "f16"):
        return _mixed(base.removesuffix(".f32"), kind)
    base = base if base in PLAIN else base.removesuffix(".rn")
    if base not in PLAIN or kind not in TYPES:
        raise NotImplementedError(name)
    if kind in ("bf16", "bf16x2"):
        function = _of_bf16(PLAIN[base])
        return (kind,), function if kind == "bf16" else _pairwise(function, np.uint16, np.uint32)
    if kind in ("f32x2", "s16x2", "u16x2"):
        return (kind,), _pairwise(PLAIN[base], TYPES[kind.removesuffix("x2")], TYPES[kind])
    sources = [OTHER_TYPES.get((base, place), kind) for place in range(3)]
    if base == "mad.wide":
        sources[2] = kind.replace("32", "64")
    return tuple(sources), PLAIN[base]


def _mixed(base, kind):
    """Return sources and function of an operation on 16-bit numbers and, last, a float32."""
    function = PLAIN[base if base in PLAIN else base.removesuffix(".rn")]
    widen = f32_of_bf16 if kind == "bf16" else lambda a: a.astype(np.float32)
    factors = 2 if base.startswith("fma") else 1
    return (kind,) * factors + ("f32",), lambda *given: function(*map(widen, given[:-1]), given[-1])


def _of_bf16(function):
    """Return the function of float32 numbers over bfloat16 ones."""
    return lambda *given: bf16_of_f32(function(*map(f32_of_bf16, given)))


def _pairwise(
    function, half, whole
):  # fmt: skip
    """Return the function over pairs of numbers."""

    def both(*given):
        pairs = (np.ascontiguousarray(one).view(half).reshape(-1, 2) for one in given)
        return np.ascontiguousarray(function(*pairs)).view(whole)[:, 0]

    return both


def packed_comparison(name):
    """Return the function of a ``setp`` over pairs of bfloat16: the results of the low and of the high halves."""
    compare = COMPARISONS[name.split(".")[1]]

    def halves(a, b):
        low, high = (np.uint32(0xFFFF), np.uint32(0)), (np.uint32(0xFFFF), np.uint32(16))
        return tuple(
            compare(f32_of_bf16((a >> shift) & mask), f32_of_bf16((b >> shift) & mask)) for mask, shift in (low, high)
        )

    return halves
