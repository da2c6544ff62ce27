"""Products in the tiles of AMX: their bits are those of Intel's description; what they train; and their refusals."""

import hashlib

import numpy as np
import pytest
from processes import python
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

import fusemlp
import fusemlp_kernels
from fusemlp import MLP, SGD, Adam, Engine
from fusemlp_kernels.errors import BackendUnavailableError
from fusemlp_kernels.numpy import processor
from fusemlp_kernels.numpy.compiled.tables import PANEL
from fusemlp_kernels.numpy.launches import aligned

needs_tiles = pytest.mark.skipif(processor.why_no_tiles() is not None, reason=f"AMX: {processor.why_no_tiles()}")
# rows, columns and the length of a sum: parts of tiles, whole ones, panels of fewer pairs than a tile has; more rows of
# a, and more columns of b, than a thread's memory holds; a sum of two passes
SHAPES = [
    *((1, 1, 1), (3, 5, 2), (16, 32, 32), (33, 17, 70), (7, 100, 16), (40, 33, 17), (65, 96, 130), (5, 40, 15)),
    *((600, 70, 1000), (20, 700, 1500), (17, 40, 16421)),
]


def rounded(values):
    """bfloat16 numbers, to the nearest, ties to even, as float32."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32).astype(np.uint64)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000).astype(np.uint32).view(np.float32)


def in_tiles(a, b):
    """``a @ b`` with the roundings of TDPBF16PS: of sums of even and odd places in each block, and of their sum."""
    total, depth = np.zeros((len(a), b.shape[1]), np.float32), a.shape[1]
    for first in range(0, depth, 32):
        sums = [np.zeros_like(total), np.zeros_like(total)]
        for k in range(first, min(depth, first + 32)):
            # the product of two bfloat16 numbers is exact in float32
            sums[k % 2] += a[:, k : k + 1] * b[k]
        total += sums[0] + sums[1]
    return total


def functions():
    from fusemlp_kernels.numpy.compiled import amx

    return amx, [function.ctypes for function in amx.by_address(np.dtype(np.float32))]


def run(a, strides, b, steps, start, shape, alpha=1.0, beta=0.0, before=None):
    """Call the product; what lies beside its operands is NaN, and beside its result stays."""
    amx, (product, _) = functions()
    rows, columns, depth = shape
    room = aligned(amx.ROOM_BYTES)
    room.view(np.float32)[:] = np.nan
    c = np.full((rows + 1, columns + 3), 7, np.float32)
    c[:rows, :columns] = np.nan if before is None else before
    product(
        a.ctypes.data, *strides, b.ctypes.data, *steps[:2], depth, start.ctypes.data, steps[2], alpha, beta,
        c.ctypes.data, columns + 3, rows, columns, room.ctypes.data,
    )  # fmt: skip
    assert (c[rows] == 7).all() and (c[:, columns:] == 7).all()
    return c[:rows, :columns]


@needs_tiles
@pytest.mark.parametrize("shape", SHAPES)
def test_a_product_from_panels_has_the_bits_of_the_description(shape):
    m, n, k = shape
    rng = np.random.default_rng(m + 10 * n + 100 * k)
    x, w = rng.standard_normal((m, k), np.float32), rng.standard_normal((n, k), np.float32)
    bias = rng.standard_normal(-(-n // PANEL) * PANEL, np.float32)
    panels = aligned(4 * -(-n // PANEL) * PANEL * k + 64).view(np.float32)
    _, (_, pack) = functions()
    # in pieces of rows and columns
    for top, bottom in ((0, n // 2 // 16 * 16), (n // 2 // 16 * 16, n)):
        for first, last in ((0, k // 2 // 32 * 32), (k // 2 // 32 * 32, k)):
            pack(w.ctypes.data, k, panels.ctypes.data, top, bottom, first, last)
    z = run(x, (k, 1), panels, (PANEL * k, PANEL, 1), bias, shape)
    passes = [(first, min(k, first + (1 << 14))) for first in range(0, k, 1 << 14)]
    expected = np.zeros((m, n), np.float32) + bias[:n]
    for first, last in passes:
        expected = expected + in_tiles(rounded(x[:, first:last]), rounded(w[:, first:last]).T)
    assert np.array_equal(z, expected)


@needs_tiles
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("by_columns", [False, True])
def test_a_product_of_rows_has_the_bits_of_the_description(shape, by_columns):
    m, n, k = shape
    rng = np.random.default_rng(m + 10 * n + 100 * k)
    a, b = rng.standard_normal((m, k), np.float32), rng.standard_normal((k + 1, n + 5), np.float32)
    # nothing after the last row is read
    b[k] = np.nan
    before = rng.standard_normal((m, n), np.float32)
    stored, strides = (np.ascontiguousarray(a.T), (1, m)) if by_columns else (a, (k, 1))
    zeros = np.zeros(PANEL, np.float32)
    c = run(stored, strides, b, (PANEL, n + 5, 0), zeros, shape, -0.5, 0.25, before)
    # powers of two: their products are exact
    expected = np.float32(0.25) * before
    for first in range(0, k, 1 << 14):
        sums = in_tiles(rounded(a[:, first : first + (1 << 14)]), rounded(b[first : min(k, first + (1 << 14)), :n]))
        expected = expected - np.float32(0.5) * sums
    assert np.array_equal(c, expected)


@needs_tiles
@pytest.mark.parametrize("depth", [1, 9, 40])
def test_a_nan_reaches_its_row_or_column_alone(depth):
    x, w = np.ones((40, depth), np.float32), np.ones((70, depth), np.float32)
    x[33, depth // 2], w[35, depth // 3] = np.nan, np.inf
    panels = aligned(4 * 96 * depth + 64).view(np.float32)
    _, (_, pack) = functions()
    pack(w.ctypes.data, depth, panels.ctypes.data, 0, 70, 0, depth)
    bias = np.zeros(96, np.float32)
    z = run(x, (depth, 1), panels, (PANEL * depth, PANEL, 1), bias, (40, 70, depth))
    assert np.isnan(z[33]).all()
    assert np.isinf(np.delete(z[:, 35], 33)).all()
    assert (np.delete(np.delete(z, 33, 0), 35, 1) == depth).all()


NETWORKS = {
    "deep": (MLP([45, 70, 330, 10]), SGD(0.1, momentum=0.9)),
    "norm": (MLP([45, 21, fusemlp.Residual(32), 10], norm="layer"), Adam(0.01, clip_norm=0.5)),
    "few": (MLP([45, 9, 10]), Adam(0.01, ema=0.9)),
}
HASHES = """
import sys
sys.path.insert(0, "tests/kernels")
from test_numpy_amx import hashes
print(*hashes())
"""


def trained(network, optimizer, **options):
    rng = np.random.default_rng(0)
    X, y = rng.standard_normal((500, network.sizes[0])).astype(np.float32), np.arange(500) % 10
    engine = Engine(network, optimizer=optimizer, batch_size=200, seed=1, **options)
    engine.fit(X, y, epochs=3)
    return {**engine.state_dict(), "scores": engine.predict_proba(X)}


def hashes(**options):
    values = [trained(*case, precision="bf16", **options).values() for case in NETWORKS.values()]
    return [hashlib.sha256(b"".join(np.ascontiguousarray(v).tobytes() for v in state)).hexdigest() for state in values]


@needs_tiles
def test_the_bits_do_not_depend_on_threads():
    alone, two = (python("-c", HASHES, FUSEMLP_NUM_THREADS=number) for number in ("1", "2"))
    assert alone.returncode == 0, alone.stderr
    assert len(alone.stdout.split()) == len(NETWORKS)
    assert alone.stdout == two.stdout


@needs_tiles
@pytest.mark.parametrize("plan", ["eager", "resident"])
def test_a_step_of_numbers_that_bfloat16_holds_is_exact(plan):
    rng = np.random.default_rng(0)
    X, y = rng.integers(-2, 3, (64, 4)), rng.integers(-3, 4, (64, 32))
    w, stepped = rng.integers(-4, 5, (32, 4)) / 4, {}
    for case, data in (("held", X), ("rounded", X + 2.0**-10)):
        for precision in ("fp32", "bf16"):
            engine = Engine(
                MLP([4, 32]), loss="mse", optimizer=SGD(0.5), batch_size=64, seed=0, precision=precision, plan=plan
            )
            engine.load_state_dict({"0.weight": w, "0.bias": np.zeros(32)})
            engine.fit(data, y, epochs=1)
            stepped[case, precision] = engine.state_dict()["0.weight"]
    assert np.array_equal(stepped["held", "bf16"], stepped["held", "fp32"])
    # 2^-10 is below half a unit in the last place of 1 and 2, and not of what is near 0
    assert not np.array_equal(stepped["rounded", "bf16"], stepped["rounded", "fp32"])


@needs_tiles
def test_digits_are_learnt():
    digits = load_digits()
    X_train, X_test, y_train, y_test = train_test_split(digits.data, digits.target, random_state=0)
    engine = Engine(MLP([64, 64, 10]), precision="bf16", seed=0)
    engine.fit(X_train / 16, y_train, epochs=30)
    assert engine.evaluate(X_test / 16, y_test)["accuracy"] > 0.95


@needs_tiles
def test_a_program_in_both_precisions_keeps_them_apart():
    network, optimizer = NETWORKS["few"]
    first, _, again = (trained(network, optimizer, precision=name)["scores"] for name in ("bf16", "fp32", "bf16"))
    assert np.array_equal(first, again)


@pytest.mark.parametrize(
    "changed, reason",
    [
        ({"_flags": lambda: {*processor.TILES} - {"amx_bf16"}}, "this processor has no amx_bf16"),
        ({"sys.platform": "darwin"}, "this is not Linux"),
        ({"_flags": lambda: {*processor.TILES}, "os.environ": {"FUSEMLP_ISA": "avx2"}}, "FUSEMLP_ISA asks for less"),
        ({"_flags": lambda: {*processor.TILES}, "os.environ": {"NUMBA_CPU_NAME": "generic"}}, "NUMBA_CPU_NAME or .*"),
    ],
)
def test_a_machine_without_tiles_is_refused(changed, reason, monkeypatch):
    for name, value in changed.items():
        monkeypatch.setattr(f"fusemlp_kernels.numpy.processor.{name}", value)
    monkeypatch.setattr("fusemlp_kernels.numpy.backend.why_no_tiles", processor.lacks_tiles.__wrapped__)
    with pytest.raises(BackendUnavailableError, match=f"^precision: 'bf16' .*: {reason}; use precision='fp32'$"):
        fusemlp_kernels.backend("numpy", None, "bf16")
