"""CUDA C as C++: the results are right in any order of the threads, and violations of CUDA's rules are caught."""

import sys

import numpy as np
import pytest
from cuda_on_cpu.library import HERE, KernelFault, Library

EXAMPLES = (HERE / "examples.cu").read_text(encoding="utf-8")
ROWS, COLUMNS = 20, 300


def pointer(array):
    return array.ctypes.data.to_bytes(8, sys.byteorder)


def row_sums(kernels, x, order="shuffled", seed=0):
    sums, total, ticket = np.full((len(x), 2), np.nan), np.full(1, np.nan), np.zeros(1, np.uint32)
    arguments = [*map(pointer, (x, sums, total, ticket)), np.int32(x.shape[1]).tobytes()]
    kernels.launch("row_sums", (len(x),), (128,), arguments, order=order, seed=seed)
    assert ticket[0] == len(x)
    return sums, total[0]


def softmax(kernels, x, order="shuffled", seed=0):
    y = np.full_like(x, np.nan)
    arguments = [pointer(x), pointer(y), np.int32(x.shape[1]).tobytes()]
    kernels.launch("softmax", (len(x),), (128,), arguments, order=order, seed=seed)
    return y


def kernels_of(bodies):
    """Return a library with a kernel for each of the bodies."""
    heads = [f'extern "C" __global__ void {name}(const int* x, int* y)' for name in bodies]
    return Library("\n".join(f"{head} {{\n{body}\n}}" for head, body in zip(heads, bodies.values(), strict=True)))


def launched(kernels, name, threads=64, blocks=1):
    x, y = np.arange(threads, dtype=np.int32), np.full(threads * blocks, -7, np.int32)
    kernels.launch(name, (blocks,), (threads,), [pointer(x), pointer(y)])
    return y


@pytest.fixture(scope="module")
def examples():
    return Library(EXAMPLES)


@pytest.fixture(scope="module")
def x():
    return np.random.default_rng(0).standard_normal((ROWS, COLUMNS)).astype(np.float32)


def test_the_order_of_the_threads_changes_no_bit(examples, x):
    first = row_sums(examples, x, "forward")
    for order, seed in (("backward", 0), ("shuffled", 1), ("shuffled", 2)):
        sums, total = row_sums(examples, x, order, seed)
        assert sums.tobytes() == first[0].tobytes() and total == first[1]


REMOVED = {
    "before the parts are written": ("    // the last call's parts have been read\n    __syncthreads();\n", "row_sums"),
    "before the parts are read": ("    // all parts are there\n    __syncthreads();\n", "row_sums"),
    "before the largest are read": (
        "    __syncthreads();\n    for (int i = 0; i < WARPS; i++) most = fmaxf(most, largest[i]);",
        "softmax",
    ),
}


@pytest.mark.parametrize(("line", "name"), REMOVED.values(), ids=REMOVED)
def test_a_removed_barrier_shows(x, line, name):
    assert EXAMPLES.count(line) == 1
    broken, right = Library(EXAMPLES.replace(line, line.replace("__syncthreads();", ""))), Library(EXAMPLES)
    for seed in range(3):
        found, expected = (
            row_sums(kernels, x, seed=seed)[0] if name == "row_sums" else softmax(kernels, x, seed=seed)
            for kernels in (broken, right)
        )
        assert not np.allclose(found, expected, rtol=1e-3), seed


FAULTS = {
    "half_a_barrier": (
        "if (threadIdx.x < 32) __syncthreads();",
        r"thread \d+ waits at __syncthreads, and thread \d+ has ended, line 2: if",
    ),
    "two_barriers": (
        "if (threadIdx.x % 2) {\n    __syncthreads();\n} else {\n    __syncthreads();\n}",
        r"thread 0 waits at __syncthreads, and thread 1 at that of line \d+, line",
    ),
    "barrier_and_shuffle": (
        "if (threadIdx.x == 5) __syncthreads();\nelse y[threadIdx.x] = __shfl_xor_sync(0xffffffffu, x[0], 1);",
        r"thread \d+ waits at .*, and thread \d+ at ",
    ),
    "ended_lane": (
        "if (threadIdx.x % 32 == 3) return;\ny[threadIdx.x] = __shfl_xor_sync(0xffffffffu, x[0], 1);",
        r"thread \d+ shuffles from lane 3, which takes no part",
    ),
    "lane_outside_of_the_mask": (
        "if (threadIdx.x % 32 < 16) y[threadIdx.x] = __shfl_xor_sync(0x0000ffffu, x[0], 16);",
        r"thread \d+ shuffles from lane \d+, which takes no part",
    ),
    "mask_without_oneself": (
        "y[threadIdx.x] = __shfl_xor_sync(0xfffffffeu, x[0], 1);",
        r"lane 0 shuffles with lanes fffffffe, without itself|shuffles from lane 0, which takes no part",
    ),
    "different_masks": (
        "y[threadIdx.x] = __shfl_xor_sync(threadIdx.x % 2 ? 0xffffffffu : 0x55555557u, x[0], 2);",
        r"thread \d+ shuffles with lanes \w+, and thread \d+ in line \d+ with \w+",
    ),
    "index_outside": (
        "__shared__ int tile[8];\ntile[threadIdx.x] = 0;\ny[0] = tile[0];",
        r"index \d+ is outside of its array, line \d+: tile",
    ),
    "misaligned": (
        "struct alignas(16) Four { int v[4]; };\nFour f = *reinterpret_cast<const Four*>(x + 1);\ny[0] = f.v[0];",
        "misaligned address",
    ),
    "shift": ("y[0] = 1 << (x[5] + 27);", "a shift by"),
    "division": ("y[0] = 1 / (x[0] * y[0]);", "an integer division by zero"),
}
BODIES = {
    "only_with_two_blocks": "if (threadIdx.x == 0 && gridDim.x == 1) __syncthreads();\n__syncthreads();\n"
    "y[threadIdx.x] = 3;",
    "shuffle": "y[threadIdx.x] = __shfl_xor_sync(0xffffffffu, x[threadIdx.x], 11);",
    "poison": "__shared__ float tile[64];\nint at = blockIdx.x * 64 + threadIdx.x;\n"
    "y[at] = isnan(tile[threadIdx.x]) ? 2 : 1;\ntile[threadIdx.x] = 1.0f;",
}


@pytest.fixture(scope="module")
def small():
    return kernels_of({name: body for name, (body, _) in FAULTS.items()} | BODIES)


@pytest.mark.parametrize("name", FAULTS)
def test_what_breaks_a_rule_of_cuda_is_named(small, name):
    said = FAULTS[name][1]
    with pytest.raises(KernelFault, match=f"{name}: .*({said})"):
        launched(small, name)
    # New fibers replace those that stopped in the middle.
    with pytest.raises(KernelFault, match=said):
        launched(small, name)


def test_a_launch_after_a_fault_is_as_any_other(small):
    with pytest.raises(KernelFault):
        launched(small, "only_with_two_blocks")
    assert set(launched(small, "only_with_two_blocks", blocks=2)[:64]) == {3}


def test_a_shuffle_within_a_warp(small):
    np.testing.assert_array_equal(launched(small, "shuffle"), np.arange(64) ^ 11)


def test_shared_memory_is_nan_in_each_block(small):
    np.testing.assert_array_equal(launched(small, "poison", blocks=3), 2)


def test_subnormal_numbers_are_zero_where_the_option_says_so():
    code = 'extern "C" __global__ void test(const float* x, float* y) { y[threadIdx.x] = x[threadIdx.x] * 0.5f; }'
    x = np.array([1.0, 2.0**-126, 2.0**-127, -(2.0**-125)], np.float32)
    for options, expected in (((), x / 2), (("-ftz=true",), np.float32([0.5, 0, 0, -(2.0**-126)]))):
        y = np.full(4, np.nan, np.float32)
        Library(code, options).launch("test", (1,), (4,), [pointer(x), pointer(y)])
        np.testing.assert_array_equal(y, expected)
        assert np.float32(2.0**-126) / np.float32(2) > 0
