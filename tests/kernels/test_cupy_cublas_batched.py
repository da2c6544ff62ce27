"""Products over arrays of addresses in the place of cuBLAS's: those of so many gemmEx, and refusals."""

from __future__ import annotations

import inspect

import numpy as np
import pytest

pytest.importorskip("fcntl", reason="the kernels are compiled for the CPU on Linux only")

from cupy_standin import cublas
from cupy_standin.memory import Misuse
from test_cupy_cublas import Product, cupy

# pytest looks a fixture up by the name under which a module has it
from test_cupy_cublas import handle as handle


class Products:
    """Several products of one shape as operands of sgemmBatched; any of them can be replaced."""

    def __init__(self, handle, count=3, transa=0, transb=0):
        self.each = [Product(handle, transa, transb) for _ in range(count)]
        for at, one in enumerate(self.each):
            # no two have the same factors
            one.there_a[...] = one.there_a * (at + 1.0)
            one.a = one.a * np.float32(at + 1.0)
        self.lists = {
            name: cupy.asarray(np.array([one.operands[name] for one in self.each])) for name in ("A", "B", "C")
        }
        first = self.each[0].operands
        given = {f"{name}array": array.data.ptr for name, array in self.lists.items()} | {"batchCount": count}
        names = inspect.signature(cublas.sgemmBatched).parameters
        self.operands = {name: given.get(name, first.get(name)) for name in names}

    def run(self, **changed):
        cublas.sgemmBatched(*{**self.operands, **changed}.values())
        return [cupy.asnumpy(one.there_c)[:, :4].T for one in self.each]


@pytest.mark.parametrize("transa", [cublas.CUBLAS_OP_N, cublas.CUBLAS_OP_T])
@pytest.mark.parametrize("transb", [cublas.CUBLAS_OP_N, cublas.CUBLAS_OP_T])
def test_many_products_by_columns(handle, transa, transb):
    products = Products(handle, transa=transa, transb=transb)
    for one, found in zip(products.each, products.run(), strict=True):
        one.assert_is(found, 1.5, 0)


def test_those_behind_the_count_are_left_alone_and_addresses_are_read_when_it_runs(handle):
    products = Products(handle)
    before = cupy.asnumpy(products.each[2].there_c)
    stream = cupy.cuda.Stream(non_blocking=True)
    with stream:
        stream.begin_capture()
        cublas.sgemmBatched(*{**products.operands, "batchCount": 2}.values())
        graph = stream.end_capture()
    for array in products.lists.values():
        array[0] = array[2]
    graph.launch()
    for at, one in enumerate(products.each):
        found = cupy.asnumpy(one.there_c)
        if at == 0:
            np.testing.assert_array_equal(found[:, :4].T, one.c)
        else:
            one.assert_is(found[:, :4].T, 1.5, 0)
    assert not np.array_equal(cupy.asnumpy(products.each[2].there_c), before, equal_nan=True)


def test_the_mode_of_the_handle_says_whether_they_are_of_tf32(handle):
    products = Products(handle, count=1)
    cublas.setMathMode(handle, cublas.CUBLAS_TF32_TENSOR_OP_MATH)
    (found,), one = products.run(), products.each[0]
    with pytest.raises(AssertionError):
        one.assert_is(found, 1.5, 0)
    one.a, one.b = cublas.rounded_to_tf32(one.a), cublas.rounded_to_tf32(one.b)
    one.assert_is(found, 1.5, 0)
    with pytest.raises(Misuse, match="no such mode"):
        cublas.setMathMode(handle, 7)


def test_products_that_cublas_would_refuse_or_that_leave_their_memory(handle):
    products = Products(handle)
    on_one_another = cupy.asarray(np.array([products.each[0].operands["C"]] * 3))
    nowhere = cupy.asarray(np.array([8, 16, 24]))
    for changed, said in (
        ({"lda": 3}, "lda is 3, and a column has 4 elements"),
        ({"ldc": 0}, "ldc is 0"),
        ({"transa": 2}, "transa 2"),
        ({"batchCount": -1}, "batchCount -1"),
        ({"batchCount": 4}, "not \\(any more\\) in one piece"),
        ({"Carray": on_one_another.data.ptr}, "one C lies on another"),
        ({"Carray": products.operands["Aarray"]}, "C lies on A or B"),
        ({"Barray": nowhere.data.ptr}, "not \\(any more\\) in one piece"),
        ({"alpha": on_one_another.data.ptr}, "lie on the card"),
        ({"handle": 0}, "there is no handle 0"),
    ):
        with pytest.raises(Misuse, match=said):
            products.run(**changed)
    cublas.setPointerMode(handle, cublas.CUBLAS_POINTER_MODE_DEVICE)
    with pytest.raises(Misuse, match="from the host"):
        products.run()
