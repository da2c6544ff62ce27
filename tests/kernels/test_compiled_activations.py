"""The compiled activations and their derivatives over all numbers of a type, against the oracle; and their code."""

import platform
import re

import numpy as np
import pytest
from numba import njit
from tolerance import TINY, U32, ULPS, UNIT, activation_bound, activation_grad_bound, assert_within

from fusemlp_kernels import reference
from fusemlp_kernels.contract import ACTIVATIONS, NEEDS_Z
from fusemlp_kernels.numpy.compiled import functions
from fusemlp_kernels.numpy.compiled.compiler import elements
from fusemlp_kernels.numpy.compiled.pointwise_numba import activate, multiply_by_derivative

SLOPE = 0.25
TYPES = (np.float32, np.float64)


@njit(error_model="numpy")
def _activate(kind, y, z, slope):
    activate(kind, elements(y, y.ctypes.data), elements(z, z.ctypes.data), y.size, slope)


@njit(error_model="numpy")
def _multiply_by_derivative(kind, d, y, z, slope, undo_scale):
    memory = elements(d, d.ctypes.data), elements(y, y.ctypes.data), elements(z, z.ctypes.data)
    return multiply_by_derivative(kind, *memory, d.size, slope, undo_scale)


def values(name, z):
    """act(z), where the loop puts it: over z where the derivative needs only y."""
    y = np.empty_like(z) if name in NEEDS_Z else z.copy()
    _activate(ACTIVATIONS.index(name), y, z if name in NEEDS_Z else y, SLOPE)
    return y


def derivatives(name, z, y):
    d = np.ones_like(z)
    _multiply_by_derivative(ACTIVATIONS.index(name), d, y, z if name in NEEDS_Z else y, SLOPE, 1.0)
    return d


def numbers(real):
    """Finite numbers: in float32 every 8191st bit pattern, of both signs; then densely where functions bend."""
    dense = np.linspace(-45.0, 45.0, 200_001)
    if real is np.float32:
        patterns = np.arange(0, 2**32, 8191, np.uint32).view(np.float32)
        return np.concatenate([patterns[np.isfinite(patterns)], dense.astype(np.float32)])
    sizes = np.ldexp(np.linspace(1.0, 1.999, 2047 * 16), np.repeat(np.arange(-1023, 1024), 16))
    return np.concatenate([sizes, -sizes, dense])


@pytest.mark.parametrize("real", TYPES)
@pytest.mark.parametrize("name", ACTIVATIONS[1:])
def test_values_and_derivatives_are_within_the_budget(name, real):
    z = numbers(real)
    exact = z.astype(np.float64)
    u = UNIT[np.dtype(real).name]
    with np.errstate(over="ignore"):
        wanted, slope = reference.activation(name, exact, SLOPE), reference.activation_grad(name, exact, SLOPE)
        wanted[wanted > np.finfo(real).max] = np.inf
        y = values(name, z)
        assert_within(y, wanted, activation_bound(name, exact, 0.0, SLOPE, u))
        # the derivative is had from y, whose own error it carries on
        error = activation_grad_bound(name, exact, 0.0, SLOPE, u)
        carried = 0.0 if name in NEEDS_Z else 2.0 * 2.0 * ULPS[name] * u
        assert_within(derivatives(name, z, y), slope, error + carried)


@pytest.mark.parametrize("name", ["sigmoid", "tanh", "elu", "softplus", "mish"])
def test_values_are_near_in_units_of_their_own_last_place(name):
    """Three units of the result itself, not of 1: small results are as exact as large ones."""
    z = numbers(np.float32)
    wanted = reference.activation(name, z.astype(np.float64), SLOPE)
    # the exponential is zero a little before it leaves the normal numbers; mish has it times z
    lost = 2.0 * TINY * np.maximum(1.0, np.where(z < 0, -z, 1.0)) if name == "mish" else 2.0 * TINY
    assert_within(values(name, z), wanted, 6.0 * U32 * np.abs(wanted) + lost)


@pytest.mark.parametrize("real", TYPES)
def test_the_tail_of_the_normal_distribution_keeps_its_leading_digits(real):
    """The exponent v v / 2 is rounded: a relative error of the tail. In float64 the oracle has one as large."""
    z = np.linspace(-13.0, 0.0, 20_001).astype(real)
    wanted = reference.activation("gelu", z.astype(np.float64))
    u = UNIT[np.dtype(real).name] * (1.0 if real is np.float32 else 2.0)
    assert_within(values("gelu", z), wanted, (z.astype(np.float64) ** 2 + 8.0) * u * np.abs(wanted) + TINY)


@pytest.mark.parametrize("real", TYPES)
@pytest.mark.parametrize("name", ACTIVATIONS[1:])
def test_ends_zeros_and_nan_are_the_oracles(name, real):
    z = np.array([np.nan, -np.inf, np.inf, -0.0, 0.0] * 9, real)
    with np.errstate(invalid="ignore"):
        wanted, slope = (
            function(name, z.astype(np.float64), SLOPE)
            for function in (reference.activation, reference.activation_grad)
        )
    y, zeros = values(name, z), z == 0.0
    # only softplus has an irrational value at zero
    rounding = ULPS[name] * 2.0 * UNIT[np.dtype(real).name] if name == "softplus" else 0.0
    assert_within(y, wanted.astype(real), np.where(zeros, rounding, 0.0))
    if name in ("tanh", "gelu", "silu", "prelu", "leaky_relu", "mish"):
        np.testing.assert_array_equal(np.signbit(y[zeros]), np.signbit(z[zeros]))
    d = derivatives(name, z, y)
    # of an infinity times nothing the oracle makes NaN, too
    assert_within(d, slope.astype(real), np.where(zeros, rounding, 0.0))


@pytest.mark.parametrize("name", sorted(set(ACTIVATIONS) - NEEDS_Z - {"identity"}))
def test_what_is_had_in_place_reads_no_other_memory(name):
    """Of two arrays that may overlap, as y and z do in the loop, the compiler would make no vector code."""
    z = np.linspace(-3.0, 3.0, 50).astype(np.float32)
    y = z.copy()
    _activate(ACTIVATIONS.index(name), y, np.full_like(z, np.nan), SLOPE)
    np.testing.assert_array_equal(y, values(name, z))


@pytest.mark.parametrize("real", TYPES)
def test_tanh_is_odd_and_nothing_leaves_its_range(real):
    z = numbers(real)
    y = values("tanh", z)
    np.testing.assert_array_equal(values("tanh", -z), -y)
    assert (np.abs(y) <= 1.0).all()
    s = values("sigmoid", z)
    assert (s >= 0.0).all() and (s <= 1.0).all()


@pytest.mark.parametrize("real", TYPES)
def test_exponentials_of_the_whole_range(real):
    @njit(error_model="numpy", fastmath={"contract"})
    def exponentials(y, z):
        for i in range(y.size):
            y[i] = functions.exp(z[i])

    limits = np.finfo(real)
    low, high = float(np.log(limits.tiny)) + 0.5, float(np.log(limits.max))
    z = np.linspace(low, high, 200_001).astype(real)
    z = z[z < real(high)]
    y = np.empty_like(z)
    exponentials(y, z)
    wanted = np.exp(z.astype(np.longdouble))
    error = np.abs(y.astype(np.longdouble) - wanted) / wanted
    assert float(error.max()) <= 4.0 * UNIT[np.dtype(real).name]
    ends = np.array([-np.inf, -1e30, low - 50.0, high + 1.0, 1e30, np.inf, np.nan, 0.0], real)
    y = np.empty_like(ends)
    exponentials(y, ends)
    np.testing.assert_array_equal(y, np.array([0.0, 0.0, 0.0, np.inf, np.inf, np.inf, np.nan, 1.0], real))


@pytest.mark.skipif(platform.machine().lower() not in ("x86_64", "amd64"), reason="names of x86 instructions")
@pytest.mark.parametrize("real", TYPES)
@pytest.mark.parametrize(
    "function",
    [functions.exp, functions.tanh, functions.sigmoid, functions.normal_cdf, functions.normal_pdf],
    ids=lambda f: f.__name__,
)
def test_code_is_of_vectors_and_calls_no_library(function, real):
    @njit(error_model="numpy", fastmath={"contract"})
    def loop(y, z):
        for i in range(y.size):
            y[i] = function(z[i])

    loop(np.ones(3, real), np.ones(3, real))
    (code,) = loop.inspect_asm().values()
    kind = "p" + ("s" if real is np.float32 else "d")
    packed = rf"^\s+v?(?:mul|add|div|fn?m(?:add|sub)\d*){kind}\s"
    assert len(re.findall(packed, code, re.MULTILINE)) >= 10
    called = re.findall(r"(?:call|jmp)\w*\s+\*?(\w+)", code) + re.findall(r"movabsq\s+\$(\w+)", code)
    assert not [name for name in called if re.fullmatch(r"(?:exp|erf|erfc|tanh|copysign|fabs)f?", name)]
