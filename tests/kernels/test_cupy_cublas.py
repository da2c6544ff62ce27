"""The products in the place of cuBLAS: by columns, with its leading dimensions, types, pointer modes and refusals."""

import inspect

import numpy as np
import pytest

pytest.importorskip("fcntl", reason="the kernels are compiled for the CPU on Linux only")

from cupy_standin import arrays, cublas
from cupy_standin.memory import Misuse
from cupy_standin.modules import BY_NAME

cupy = BY_NAME["cupy"]
F32, F16 = cublas.CUDA_R_32F, cublas.CUDA_R_16F


@pytest.fixture
def handle():
    made = cublas.create()
    yield made
    cublas.destroy(made)


def column_major(values, gap=3):
    """On the card, with ``gap`` elements (NaN) between columns: (array, pitch)."""
    rows, columns = values.shape
    padded = np.full((columns, rows + gap), np.nan, values.dtype)
    padded[:, :rows] = values.T
    return cupy.asarray(padded), rows + gap


class Product:
    """Operands of gemmEx that fit; any of them can be replaced."""

    def __init__(self, handle, transa=0, transb=0, kind=F32, m=4, n=5, k=6):
        rng, dtype = np.random.default_rng(1), cublas.TYPES[kind]
        self.a, self.b = (rng.standard_normal(shape).astype(dtype) for shape in ((m, k), (k, n)))
        self.c = rng.standard_normal((m, n)).astype(np.float32)
        self.factors = np.array([1.5, 0.0], np.float32)
        (self.there_a, lda), (self.there_b, ldb), (self.there_c, ldc) = map(
            column_major, (self.a.T if transa else self.a, self.b.T if transb else self.b, self.c)
        )
        at = self.factors.ctypes.data
        self.operands = {
            "handle": handle, "transa": transa, "transb": transb, "m": m, "n": n, "k": k, "alpha": at,
            "A": self.there_a.data.ptr, "Atype": kind, "lda": lda, "B": self.there_b.data.ptr, "Btype": kind,
            "ldb": ldb, "beta": at + 4, "C": self.there_c.data.ptr, "Ctype": F32, "ldc": ldc,
            "computeType": cublas.CUBLAS_COMPUTE_32F, "algo": cublas.CUBLAS_GEMM_DEFAULT,
        }  # fmt: skip

    def run(self, **changed):
        assert list(self.operands) == list(inspect.signature(cublas.gemmEx).parameters)
        cublas.gemmEx(*{**self.operands, **changed}.values())
        found = cupy.asnumpy(self.there_c)
        assert np.isnan(found[:, self.c.shape[0] :]).all()
        return found[:, : self.c.shape[0]].T

    def assert_is(self, found, alpha, beta):
        exact = alpha * (self.a.astype(np.float64) @ self.b.astype(np.float64)) + beta * self.c
        sizes = abs(alpha) * (np.abs(self.a).astype(np.float64) @ np.abs(self.b)) + abs(beta * self.c)
        assert (np.abs(found - exact) <= (self.a.shape[1] + 3) * 2**-24 * sizes).all()


@pytest.mark.parametrize("kind", [F32, F16])
@pytest.mark.parametrize("transa", [cublas.CUBLAS_OP_N, cublas.CUBLAS_OP_T])
@pytest.mark.parametrize("transb", [cublas.CUBLAS_OP_N, cublas.CUBLAS_OP_T])
def test_products_by_columns(handle, transa, transb, kind):
    product = Product(handle, transa, transb, kind)
    product.factors[:] = 1.5, -0.5
    product.assert_is(product.run(), 1.5, -0.5)


def test_factors_on_the_card_are_read_when_the_product_runs(handle):
    product = Product(handle)
    scalars = cupy.asarray(np.array([0.0, 1.0], np.float32))
    at = {"alpha": scalars.data.ptr, "beta": scalars.data.ptr + 4}
    cublas.setPointerMode(handle, cublas.CUBLAS_POINTER_MODE_DEVICE)
    stream = cupy.cuda.Stream(non_blocking=True)
    with stream:
        stream.begin_capture()
        cublas.gemmEx(*{**product.operands, **at}.values())
        graph = stream.end_capture()
    scalars[0] = -2
    graph.launch()
    product.assert_is(cupy.asnumpy(product.there_c)[:, :4].T, -2, 1)


def test_a_beta_of_zero_does_not_read(handle):
    product = Product(handle)
    product.there_c[...] = cupy.asarray(np.full(product.there_c.shape, np.nan, np.float32))
    product.assert_is(product.run(), 1.5, 0)
    assert (product.run(k=0) == 0).all()


def test_tf32_reads_ten_bits(handle):
    product = Product(handle)
    found = product.run(computeType=cublas.CUBLAS_COMPUTE_32F_FAST_TF32)
    with pytest.raises(AssertionError):
        product.assert_is(found, 1.5, 0)
    product.a, product.b = (cublas.rounded_to_tf32(factor) for factor in (product.a, product.b))
    product.assert_is(found, 1.5, 0)
    numbers = np.array([1, 1 + 2**-10, 1 + 2**-11, 1 + 2**-11 - 2**-23, -1 - 3 * 2**-11, np.inf], np.float32)
    rounded = np.array([1, 1 + 2**-10, 1 + 2**-10, 1, -1 - 2**-9, np.inf], np.float32)
    np.testing.assert_array_equal(cublas.rounded_to_tf32(numbers), rounded)
    assert np.isnan(cublas.rounded_to_tf32(np.array([np.nan], np.float32)))[0]


def test_products_that_cublas_would_refuse_or_that_leave_their_memory(handle):
    product = Product(handle)
    spare = cupy.asarray(np.ones(2, np.float32))
    for changed, said in (
        ({"lda": 3}, "lda is 3, and a column has 4 elements"),
        ({"transa": 1, "lda": 5}, "lda is 5, and a column has 6 elements"),
        ({"ldb": 5}, "ldb is 5, and a column has 6"),
        ({"ldc": 0}, "ldc is 0"),
        ({"n": 6}, "not \\(any more\\) in one piece"),
        ({"ldc": 100}, "not \\(any more\\) in one piece"),
        ({"C": product.there_a.data.ptr}, "C lies on A or B"),
        ({"Atype": F16}, "no product of the types"),
        ({"Ctype": F16}, "no product of the types"),
        ({"algo": 0}, "algo 0"),
        ({"computeType": F32}, "computeType 0"),
        ({"handle": -1}, "there is no handle -1"),
        ({"alpha": spare.data.ptr}, "lie on the card, and the pointer mode says on the host"),
        ({"C": 12345}, "not \\(any more\\) in one piece"),
    ):
        with pytest.raises(Misuse, match=said):
            product.run(**changed)
    cublas.setPointerMode(handle, cublas.CUBLAS_POINTER_MODE_DEVICE)
    with pytest.raises(Misuse, match="in one piece of memory of the card"):
        product.run()
    with pytest.raises(Misuse, match="no such mode"):
        cublas.setPointerMode(handle, 2)
    assert arrays.host_of(product.there_c).shape == (5, 7)
