"""The stand-in for CuPy does the same as CuPy, and refuses unknown names and misuse of a card."""

import gc
import sys

import numpy as np
import pytest

pytest.importorskip("fcntl", reason="the kernels are compiled for the CPU on Linux only")

import cupy_standin
from cuda_on_cpu.library import HERE, KernelFault
from cupy_standin import streams
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
        (stream, "cupy.cuda.Stream.record"),
        (graph, "cupy.cuda.Graph.upload"),
        (cupy.cuda.Device(0), "cupy.cuda.Device.mem_info"),
        (cupy.RawModule(EXAMPLES), "cupy.RawModule.compile"),
    ):
        with pytest.raises(AttributeError, match=f"{name}: the stand-in has no such name"):
            getattr(owner, name.rpartition(".")[2])
    with pytest.raises(TypeError, match="Implicit conversion"):
        np.asarray(array)


def test_loading_leaves_no_module_of_that_name_behind():
    there = {name for name in sys.modules if name.split(".")[0] in ("cupy", "cupy_backends")}
    cupy_standin.load()
    assert {name for name in sys.modules if name.split(".")[0] in ("cupy", "cupy_backends")} == there
    assert "fusemlp_kernels.cupy.backend" in sys.modules


# arrays


def test_views_are_numpys():
    host = np.arange(60, dtype=np.float32).reshape(5, 12)
    there = cupy.asarray(host)
    for key in (slice(1, 4), slice(None, None, -2), (2, slice(3, 9, 2)), 3, (4, 5), ..., slice(5, 5), (..., 1)):
        part = there[key]
        np.testing.assert_array_equal(cupy.asnumpy(part), host[key])
        assert part.shape == np.shape(host[key]) and part.data.mem is there.data.mem
    flat = cupy.asarray(np.arange(60, dtype=np.float32))
    view = cupy.ndarray((3, 4), dtype=np.float32, memptr=flat.data + 8, strides=(48, 8))
    np.testing.assert_array_equal(cupy.asnumpy(view), host.ravel()[2:][:36].reshape(3, 12)[:, :8:2])
    assert (view.flags.c_contiguous, there.flags.c_contiguous, len(view), view.nbytes) == (False, True, 3, 48)
    there[1:3] = there[3:5]
    there[0] = 7
    np.testing.assert_array_equal(cupy.asnumpy(there)[:3], np.stack([np.full(12, 7), host[3], host[4]]))
    assert int(there[0, 0].astype(np.int64)) == float(2 * there[0, 0]) / 2 == 7


def test_assignments_and_indices_that_cupy_would_copy_for_are_refused():
    array = cupy.zeros(4)
    with pytest.raises(Misuse, match="assigns numbers and arrays of CuPy, got ndarray"):
        array[...] = np.ones(4)
    with pytest.raises(Misuse, match="takes numbers, slices and"):
        array[[0, 1]]


def test_foreign_arrays_go_in_without_a_copy():
    class Foreign:
        def __init__(self, array):
            self.array = array
            self.__cuda_array_interface__ = array.__array_interface__

    host = np.arange(24, dtype=np.float32).reshape(4, 6)[::-1, ::2]
    for there in (cupy.asarray(Foreign(host)), cupy.from_dlpack(host)):
        assert (there.data.ptr, there.shape, there.strides) == (host.ctypes.data, host.shape, host.strides)
        np.testing.assert_array_equal(cupy.asnumpy(there), host)
        there[1] = -5
        assert (host[1] == -5).all()


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


# kernels


def test_kernels_run_on_the_memory(softmax):
    x = np.random.default_rng(0).standard_normal((7, 50)).astype(np.float32)
    there, y = cupy.asarray(x), cupy.zeros((7, 50), np.float32)
    softmax((7,), (128,), (there, y, np.int32(50)))
    expected = np.exp(x) / np.exp(x).sum(1, keepdims=True)
    np.testing.assert_allclose(cupy.asnumpy(y), expected, rtol=1e-5)


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


def test_a_fault_in_a_kernel_is_an_error():
    code = 'extern "C" __global__ void half(int* x) {\n    if (threadIdx.x < 16) __syncthreads();\n    *x = 1;\n}\n'
    half = cupy.RawModule(code, options=OPTIONS).get_function("half")
    with pytest.raises(KernelFault, match=r"half: thread .* has ended, line 2"):
        half((1,), (32,), (cupy.zeros(1, np.int32),))


# streams and graphs


def test_a_graph_is_what_was_started_and_runs_again():
    scale = cupy.RawModule(STRUCTURE, options=OPTIONS).get_function("scale")
    x, y = cupy.asarray(np.ones(100, np.float32)), cupy.zeros(100, np.float32)
    call = call_of(y, y)
    stream = cupy.cuda.Stream(non_blocking=True)
    with stream:
        stream.begin_capture()
        y[...] = x
        for _ in range(2):
            scale((2,), (64,), (call,))
        graph = stream.end_capture()
    # By value: later changes of the host's copy do not affect the graph.
    call["factor"] = 100
    assert (cupy.asnumpy(y) == 0).all()
    for start in (1, 2):
        x.fill(start)
        graph.launch()
        np.testing.assert_array_equal(cupy.asnumpy(y), 9 * start)


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
        stream.end_capture()
