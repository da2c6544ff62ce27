"""The stand-in for CuPy and cuBLAS: the same names and results, and refusals of what a card would not do."""

import ast
import gc
import inspect
import json
from pathlib import Path

import check_cupy_names
import numpy as np
import pytest

pytest.importorskip("fcntl", reason="the kernels are compiled for the CPU on Linux only")

from cuda_on_cpu.library import HERE
from cupy_standin import cublas, streams
from cupy_standin.memory import CUDARuntimeError, Misuse
from cupy_standin.modules import BY_NAME

cupy = BY_NAME["cupy"]
EXAMPLES = (HERE / "examples.cu").read_text(encoding="utf-8")
OPTIONS = ("-std=c++17",)


@pytest.fixture
def softmax():
    return cupy.RawModule(EXAMPLES, options=OPTIONS).get_function("softmax")


def test_what_it_does_not_know_it_refuses():
    array = cupy.zeros(3)
    stream, graph = cupy.cuda.Stream(non_blocking=True), streams.Graph([])
    for owner, name in (
        (cupy, "cupy.matmul"),
        (cupy.cuda, "cupy.cuda.Event"),
        (cupy.cuda.runtime, "cupy.cuda.runtime.memcpy"),
        (array, "cupy.ndarray.mean"),
        (stream, "cupy.cuda.Stream.use"),
        (graph, "cupy.cuda.Graph.upload"),
        (cupy.cuda.Device(0), "cupy.cuda.Device.mem_info"),
        (cupy.RawModule(EXAMPLES), "cupy.RawModule.compile"),
    ):
        with pytest.raises(AttributeError, match=f"{name}: the stand-in has no such name"):
            getattr(owner, name.rpartition(".")[2])
    with pytest.raises(TypeError, match="Implicit conversion"):
        np.asarray(array)


def test_memory_is_poisoned_and_guarded():
    out = cupy.ndarray(5, np.float32)
    assert np.isnan(cupy.asnumpy(out)).all() and out.data.ptr % 512 == 0
    cupy.cuda.Device(0).synchronize()
    beyond = cupy.ndarray(6, np.float32, memptr=out.data)
    with pytest.raises(Misuse, match="not \\(any more\\) in one piece of memory"):
        cupy.asnumpy(beyond)
    out.data.mem.guarded[-64] = 0
    with pytest.raises(Misuse, match="in front of or behind 20 bytes"):
        cupy.cuda.Device(0).synchronize()


def test_arguments_are_compared_with_the_kernels_own(softmax):
    x = cupy.zeros((2, 5), np.float32)
    for arguments, said in (
        ((x, x, 5), "takes 4 bytes of kind 'i', got 8 of kind 'i'"),
        ((x, x, np.float32(5)), "takes 4 bytes of kind 'i', got 4 of kind 'f'"),
        ((x, x, np.uint32(5)), "takes 4 bytes of kind 'i', got 4 of kind 'u'"),
        ((x, np.int32(5), x), "takes 8 bytes of kind 'p', got 4 of kind 'i'"),
        ((x, x), "takes 3 arguments, got 2"),
        ((x, x, "5"), "no argument of str"),
        ((x, np.zeros((2, 5), np.float32), np.int32(5)), "no argument of ndarray"),
    ):
        with pytest.raises(Misuse, match=said):
            softmax((2,), (128,), arguments)
    with pytest.raises(ValueError, match="1 to 128 threads"):
        softmax((2,), (256,), (x, x, np.int32(5)))
    with pytest.raises(AttributeError, match="CUDA_ERROR_NOT_FOUND: there is no kernel 'soft'"):
        cupy.RawModule(EXAMPLES, options=OPTIONS).get_function("soft")
    with pytest.raises(TypeError, match="takes a tuple, got list"):
        cupy.RawModule(EXAMPLES, options=list(OPTIONS))


STRUCTURE = """struct Call {
    const float* x;  // as it was; null: zeros
    float* y;
    long long count;
    double factor;
};
extern "C" __global__ void __launch_bounds__(64) scale(const Call call) {
    long long i = blockIdx.x * 64ll + threadIdx.x;
    if (i < call.count) call.y[i] = static_cast<float>(call.factor) * (call.x ? call.x[i] : 0.0f);
}
"""
LAYOUT = [("x", "<i8"), ("y", "<i8"), ("count", "<i8"), ("factor", "<f8")]


def call_of(x, y, layout=LAYOUT):
    call = np.zeros((), layout)
    for name, value in (("x", x), ("y", y), ("count", 100), ("factor", 3.0)):
        call[name] = value.data.ptr if isinstance(value, cupy.ndarray) else value
    return call


def test_a_structure_goes_by_value_and_field_by_field():
    scale = cupy.RawModule(STRUCTURE, options=OPTIONS).get_function("scale")
    x, y = cupy.asarray(np.arange(100, dtype=np.float32)), cupy.zeros(100, np.float32)
    scale((2,), (64,), (call_of(x, y),))
    np.testing.assert_array_equal(cupy.asnumpy(y), 3 * np.arange(100))
    scale((2,), (64,), (call_of(0, y),))
    np.testing.assert_array_equal(cupy.asnumpy(y), 0)
    for layout in (LAYOUT[::-1], [*LAYOUT[:3], ("factor", "<i8")]):
        with pytest.raises(Misuse, match="its structure is"):
            scale((2,), (64,), (call_of(x, y, layout),))
    with pytest.raises(Misuse, match="its structure is"):
        scale((2,), (64,), (call_of(x, y, [*LAYOUT, ("more", "<i8")]),))


def test_memory_that_is_gone_is_noticed():
    scale = cupy.RawModule(STRUCTURE, options=OPTIONS).get_function("scale")
    x, y = cupy.zeros(100, np.float32), cupy.zeros(100, np.float32)
    call = call_of(x, y)
    del x
    gc.collect()
    with pytest.raises(Misuse, match=r"scale: x is at 0x.* not \(any more\) memory of the card"):
        scale((2,), (64,), (call,))


def test_what_a_capture_cannot_hold_is_refused():
    stream, array = cupy.cuda.Stream(non_blocking=True), cupy.zeros(3)
    with pytest.raises(CUDARuntimeError, match="default stream cannot be captured"):
        cupy.cuda.get_current_stream().begin_capture()
    with pytest.raises(Misuse, match="non_blocking"):
        cupy.cuda.Stream().begin_capture()
    with pytest.raises(CUDARuntimeError, match="not being captured"):
        stream.end_capture()
    with stream:
        stream.begin_capture()
        for what, action in (
            ("an allocation", lambda: cupy.zeros(3)),
            ("a copy to the host", lambda: float(array[0])),
            ("a copy from the host", lambda: cupy.asarray(np.zeros(3))),
            ("waiting", cupy.cuda.Device(0).synchronize),
            ("waiting", stream.synchronize),
            ("the launch of a graph", streams.Graph([]).launch),
            ("the capture of another stream", cupy.cuda.Stream(non_blocking=True).begin_capture),
        ):
            with pytest.raises(CUDARuntimeError, match=f"{what} while a stream is captured"):
                action()
        with cupy.cuda.Stream(non_blocking=True), pytest.raises(Misuse, match="on another stream"):
            array.fill(0)
        with pytest.raises(CUDARuntimeError, match="Invalidated"):
            stream.end_capture()


F16 = cublas.CUDA_R_16F


@pytest.fixture
def product():
    """Operands of gemmEx that fit: (4, 6) times (6, 5), with three elements between the columns."""
    handle, factors = cublas.create(), np.array([1.5, 0.0], np.float32)
    a, b, c = (cupy.zeros((columns, rows + 3), np.float32) for rows, columns in ((4, 6), (6, 5), (4, 5)))
    operands = {
        "handle": handle, "transa": 0, "transb": 0, "m": 4, "n": 5, "k": 6, "alpha": factors.ctypes.data,
        "A": a.data.ptr, "Atype": cublas.CUDA_R_32F, "lda": 7, "B": b.data.ptr, "Btype": cublas.CUDA_R_32F, "ldb": 9,
        "beta": factors.ctypes.data + 4, "C": c.data.ptr, "Ctype": cublas.CUDA_R_32F, "ldc": 7,
        "computeType": cublas.CUBLAS_COMPUTE_32F, "algo": cublas.CUBLAS_GEMM_DEFAULT,
    }  # fmt: skip
    assert list(operands) == list(inspect.signature(cublas.gemmEx).parameters)
    cublas.gemmEx(*operands.values())
    yield operands
    cublas.destroy(handle)


def test_products_that_cublas_would_refuse_or_that_leave_their_memory(product):
    spare = cupy.zeros(2, np.float32)
    for changed, said in (
        ({"lda": 3}, "lda is 3, and a column has 4 elements"),
        ({"transa": 1, "lda": 5}, "lda is 5, and a column has 6 elements"),
        ({"ldb": 5}, "ldb is 5, and a column has 6"),
        ({"ldc": 0}, "ldc is 0"),
        ({"n": 6}, "not \\(any more\\) in one piece"),
        ({"ldc": 100}, "not \\(any more\\) in one piece"),
        ({"C": product["A"]}, "C lies on A or B"),
        ({"Atype": F16}, "no product of the types"),
        ({"Ctype": F16}, "no product of the types"),
        ({"algo": 0}, "algo 0"),
        ({"computeType": 0}, "computeType 0"),
        ({"handle": -1}, "there is no handle -1"),
        ({"alpha": spare.data.ptr}, "lie on the card, and the pointer mode says on the host"),
        ({"C": 12345}, "not \\(any more\\) in one piece"),
    ):
        with pytest.raises(Misuse, match=said):
            cublas.gemmEx(*(product | changed).values())
    cublas.setPointerMode(product["handle"], cublas.CUBLAS_POINTER_MODE_DEVICE)
    with pytest.raises(Misuse, match="in one piece of memory of the card"):
        cublas.gemmEx(*product.values())
    with pytest.raises(Misuse, match="no such mode"):
        cublas.setPointerMode(product["handle"], 2)


ROOT = Path(__file__).resolve().parents[2]
BACKEND = ROOT / "kernels/fusemlp_kernels/cupy"
# The modules that may name CuPy.
OWNERS = ("device.py", "products.py")


def test_it_has_nothing_that_cupy_has_not():
    recorded = json.loads(check_cupy_names.RECORD.read_text())["names"]
    mine = check_cupy_names.stand_in()
    assert check_cupy_names.misfits(mine, recorded) == []
    assert set(mine) == set(recorded)


def test_every_name_of_cupy_in_the_backend_is_known():
    known = set(json.loads(check_cupy_names.RECORD.read_text())["names"]) | set(BY_NAME)
    roots = {"cupy": "cupy", "cublas": "cupy_backends.cuda.libs.cublas"}
    found = set()
    trees = [ast.parse((BACKEND / name).read_text("utf-8")) for name in OWNERS]
    for node in (node for tree in trees for node in ast.walk(tree)):
        if isinstance(node, ast.Attribute):
            chain, inner = node.attr, node.value
            while isinstance(inner, ast.Attribute):
                chain, inner = f"{inner.attr}.{chain}", inner.value
            if isinstance(inner, ast.Name) and inner.id in roots:
                found.add(f"{roots[inner.id]}.{chain}")
    assert len(found) > 20 and found <= known, found - known


def test_no_other_module_imports_cupy():
    importing = set()
    for path in BACKEND.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            imported = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            imported += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            if any(name.split(".")[0] in ("cupy", "cupy_backends") for name in imported):
                importing.add(path.name)
    assert importing == set(OWNERS)
