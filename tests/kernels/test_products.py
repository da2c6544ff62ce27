"""The products and sums of the NumPy backend: within their bounds, and the same bits in registers of any width."""

import numpy as np
import pytest
from numba import njit
from processes import python

from fusemlp_kernels.numpy.compiled import compiler, products, vectors
from fusemlp_kernels.numpy.compiled.compiler import elements
from fusemlp_kernels.numpy.compiled.tables import PANEL

SHAPES = [(1, 1, 1), (3, 5, 2), (8, 32, 0), (33, 17, 70), (1, 40, 9), (7, 100, 33), (128, 10, 64), (65, 96, 130)]


def bound(terms, length, dtype):
    """The error of a sum of ``length`` products in any order: Higham, "Accuracy and Stability", 3.1.

    ``terms``: the sum of their absolute values; two more roundings are for the factors.
    """
    unit = (length + 2) * np.finfo(dtype).eps / 2
    return unit / (1 - unit) * terms


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("m, n, k", SHAPES)
@pytest.mark.parametrize("alpha, beta", [(1.0, 0.0), (-0.5, 0.25), (0.5, 0.0)])
def test_a_product_from_panels(m, n, k, alpha, beta, dtype):
    rng = np.random.default_rng(m + 10 * n + 100 * k)
    x, w, b, before = (rng.standard_normal(shape).astype(dtype) for shape in ((m, k), (n, k), (n,), (m, n)))
    product, pack, _ = (function.ctypes for function in products.by_address(dtype))
    panels = np.full((-(-n // PANEL), k, PANEL), np.nan, dtype)
    # in two pieces
    for first, last in ((0, k // 2 // PANEL * PANEL), (k // 2 // PANEL * PANEL, k)):
        pack(w.ctypes.data, k, panels.ctypes.data, 0, n, first, last)
    for row in range(n):
        assert np.array_equal(panels[row // PANEL, :, row % PANEL], w[row])
    if beta == 0.0:
        before[:] = np.nan
    c = np.full((m + 1, n), 7, dtype)
    c[:m] = before
    product(
        x.ctypes.data, k, 1, panels.ctypes.data, PANEL * k, PANEL, k, b.ctypes.data, 1, alpha, beta, c.ctypes.data, n,
        m, n, 0,
    )  # fmt: skip
    assert (c[m] == 7).all()
    held = np.zeros(before.shape) if beta == 0.0 else beta * before.astype(np.longdouble)
    exact = alpha * (x.astype(np.longdouble) @ w.astype(np.longdouble).T + b) + held
    terms = abs(alpha) * (np.abs(x).astype(np.longdouble) @ np.abs(w).astype(np.longdouble).T + np.abs(b)) + np.abs(
        held
    )
    assert (np.abs(c[:m] - exact) <= bound(terms, k + 2, dtype)).all()


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("m, n, k", [(32, 90, 100), (67, 161, 512), (130, 77, 700), (33, 64, 2000)])
@pytest.mark.parametrize("turned", [False, True])
def test_copied_operands_give_the_same_bits(turned, m, n, k, dtype):
    """b with rows far apart; a with rows side by side, or with columns, in parts where both do not fit."""
    rng = np.random.default_rng(m + n + k)
    a, b = rng.standard_normal((m, k)).astype(dtype), rng.standard_normal((k, n + 40)).astype(dtype)
    stored = np.ascontiguousarray(a.T) if turned else a
    strides = (1, m) if turned else (k, 1)
    product, zeros = products.by_address(dtype)[0].ctypes, np.zeros(PANEL, dtype)
    half = products.HALF // dtype().itemsize
    room = np.full(2 * half + 64, np.nan, dtype)
    found = []
    for address in (0, room.ctypes.data):
        c = np.full((m, n), 3, dtype)
        product(
            stored.ctypes.data, *strides, b.ctypes.data, PANEL, n + 40, k, zeros.ctypes.data, 0, 0.5, 0.25,
            c.ctypes.data, n, m, n, address,
        )  # fmt: skip
        found.append(c)
    assert np.array_equal(*found)
    assert np.isnan(room[2 * half :]).all()
    fits = k * products.TILE_VECTORS * products.REGISTER_BYTES // dtype().itemsize <= half
    assert np.isnan(room).all() != (products.COPIES and fits)
    exact = 0.5 * (a.astype(np.longdouble) @ b[:, :n]) + 0.75
    terms = 0.5 * np.abs(a).astype(np.longdouble) @ np.abs(b[:, :n]) + 0.75
    assert (np.abs(found[0] - exact) <= bound(terms, k + 2, dtype)).all()


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("m, n, k", [*SHAPES, (5, 3, 16), (9, 4, 31), (2, 7, 333)])
def test_dot_products(m, n, k, dtype):
    rng = np.random.default_rng(m + 10 * n + 100 * k)
    # NaN after the last number of each operand: nothing there is read
    x, w, b = (rng.standard_normal(size + 64).astype(dtype) for size in (m * k, n * k, n))
    x[m * k :], w[n * k :], b[n:] = np.nan, np.nan, np.nan
    c = np.full(m * n + 64, 7, dtype)
    dots = products.by_address(dtype)[2].ctypes
    dots(x.ctypes.data, w.ctypes.data, k, b.ctypes.data, c.ctypes.data, m, n)
    assert (c[m * n :] == 7).all()
    rows, columns, bias = (
        part.astype(np.longdouble) for part in (x[: m * k].reshape(m, k), w[: n * k].reshape(n, k), b[:n])
    )
    error = np.abs(c[: m * n].reshape(m, n) - (rows @ columns.T + bias))
    assert (error <= bound(np.abs(rows) @ np.abs(columns).T + np.abs(bias), k + 1, dtype)).all()


@pytest.mark.parametrize("at", [0, 15, 16, 40])
def test_a_nan_in_dot_products_reaches_its_row_alone(at):
    x, w, z = np.ones((6, 41), np.float32), np.ones((3, 41), np.float32), np.zeros((6, 3), np.float32)
    x[4, at] = np.nan
    b = np.zeros(3, np.float32)
    products.by_address(np.float32)[2].ctypes(
        x.ctypes.data, w.ctypes.data, 41, b.ctypes.data, z.ctypes.data, *z.shape
    )  # fmt: skip
    assert np.array_equal(np.isnan(z), np.arange(6)[:, None].repeat(3, 1) == 4)
    assert (np.delete(z, 4, 0) == 41).all()


@njit
def summed(values, address, count):
    return vectors.sum_of(elements(values, address), count)


@njit
def squared(values, address, count, divisor):
    return vectors.sum_of_squares(elements(values, address), count, divisor)


@njit
def multiplied(values, left, right, count):
    return vectors.sum_of_products(elements(values, left), elements(values, right), count)


def in_order(terms):
    """The sum of the terms in the order of ``vectors.py``."""
    total, at = terms.dtype.type(0), 0
    for lanes, side_by_side in ((64 // terms.itemsize, 4), (32 // terms.itemsize, 1), (1, 1)):
        whole = (len(terms) - at) // (lanes * side_by_side) * lanes * side_by_side
        if not whole:
            continue
        held = np.zeros((side_by_side, lanes), terms.dtype)
        held[0, 0] = total
        for chunk in terms[at : at + whole].reshape(-1, side_by_side, lanes):
            held += chunk
        vector = held[0]
        for other in held[1:]:
            vector = vector + other
        while len(vector) > 1:
            vector = vector[: len(vector) // 2] + vector[len(vector) // 2 :]
        total, at = vector[0], at + whole
    return total


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_sums_are_in_order(dtype):
    # powers of two have exact products: a sum has the same bits with and without one rounding a step
    values = np.random.default_rng(0).random(300).astype(dtype)
    powers = (2.0 ** np.random.default_rng(1).integers(-3, 3, 300)).astype(dtype)
    for count in range(301):
        terms = values[:count]
        assert summed(values, values.ctypes.data, count) == in_order(terms)
        product = multiplied(values, values.ctypes.data, powers.ctypes.data, count)
        assert product == in_order(terms * powers[:count])


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_squares_are_in_float64(dtype):
    values = (2.0 ** np.random.default_rng(2).integers(-90, 90, 300)).astype(dtype)
    for count in (0, 1, 5, 31, 32, 33, 300):
        quotients = values[:count].astype(np.float64) / 3.0
        assert squared(values, values.ctypes.data, count, 3.0) == pytest.approx((quotients**2).sum(), rel=1e-14)
    largest = np.full(2, np.finfo(np.float32).max, np.float32)
    assert squared(largest, largest.ctypes.data, 2, 1.0) == 2 * np.float64(largest[0]) ** 2


TRAINED = """
import hashlib, sys
from fusemlp_kernels.numpy.compiled import products
import numpy as np
from fusemlp import MLP, Adam, Engine
rng = np.random.default_rng(0)
X = rng.standard_normal((300, 45))
# the last layer of the first is of dot products; of the others the classes are no multiple of a vector
first, *others = [MLP([45, 70, 330, 10]), *[MLP([45, 9, classes]) for classes in (4, 5, 12, 23, 100)]]
cases = [("fp32", first), ("fp64", first), ("fp32", MLP([45, 21, 5], norm="layer")), *[("fp32", net) for net in others]]
for precision, network in cases[: int(sys.argv[1])]:
    optimizer = Adam(0.01, clip_norm=0.1 if network.norms else None)
    engine = Engine(network, optimizer=optimizer, batch_size=100, seed=1, precision=precision)
    y = np.arange(300) % network.sizes[-1]
    engine.fit(X, y, epochs=2)
    values = [*engine.state_dict().values(), engine.predict_proba(X)]
    print(hashlib.sha256(b"".join(np.ascontiguousarray(value).tobytes() for value in values)).hexdigest())
print(products.REGISTER_BYTES, file=sys.stderr)
"""


WIDEST = list(compiler.REGISTERS.values()).index(compiler.REGISTER_BYTES)
NARROWER = [*compiler.REGISTERS][:WIDEST] if compiler.X86 else []


def test_the_bits_do_not_depend_on_the_width_of_the_registers(tmp_path):
    """Without instructions that multiply and add at once, each product is rounded: these bits are others."""
    found = {}
    for isa in ("", *NARROWER):
        variables = {"FUSEMLP_WHOLE_LOOP": "", "NUMBA_CACHE_DIR": str(tmp_path), compiler.ISA: isa}
        ran = python("-c", TRAINED, "1" if isa == "sse" else "8", **variables)
        assert ran.returncode == 0, ran.stderr
        width = compiler.REGISTERS[isa] if isa else compiler.REGISTER_BYTES
        assert ran.stderr.split()[-1] == str(width)
        found[isa] = ran.stdout.split()
    others = found.pop("sse", [None])
    assert all(bits == found[""] and len(bits) == 8 for bits in found.values())
    assert others[0] != found[""][0]


@pytest.mark.parametrize("isa", NARROWER)
def test_products_in_narrower_registers(isa, tmp_path):
    chosen = "panels or dot or nan or copied or in_order or squares"
    ran = python("-m", "pytest", "-q", "-p", "no:cacheprovider", __file__, "-k", chosen, **{compiler.ISA: isa})
    assert ran.returncode == 0, ran.stdout + ran.stderr


def test_an_instruction_set_that_the_processor_lacks_is_refused():
    ran = python("-c", "import fusemlp_kernels.numpy.compiled.products", **{compiler.ISA: "avx1024"})
    assert "FUSEMLP_ISA: expected an instruction set of this processor (sse" in ran.stderr
