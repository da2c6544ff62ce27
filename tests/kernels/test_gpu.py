"""What only a GPU can show: graphs, determinism, 64-bit addresses, no waiting and no allocating within a step.

The tests of random cases and the trainings step by step run on a GPU too with ``pytest -m gpu``; these are the rest.
"""

from __future__ import annotations

import shutil
import subprocess
import sys

import numpy as np
import pytest
from devices import GPU, Variant, marks_of
from memory import place, poisoned
from strategies import Values, exact
from tolerance import Products, assert_within, bound, largest_partial_sum

from fusemlp import MLP, SGD, Adam, AdamW, Engine, OneCycle
from fusemlp_kernels.clock import hyper_at
from fusemlp_kernels.contract import (
    COUNTERS,
    ROW_COUNT,
    STATS,
    Dropout,
    LossSpec,
    ScheduleSpec,
    Segment,
    TensorRule,
    UpdateRule,
)

pytestmark = marks_of(GPU)

FP32 = Variant(GPU, "fp32")
NET = MLP([61, 96, 40, 10], activation=["gelu", "relu"], dropout=[0.2, 0.0])
M, K, N = 517, 203, 130


def data(rows=1600):
    rng = np.random.default_rng(0)
    return rng.standard_normal((rows, 61)).astype(np.float32), rng.integers(0, 10, rows)


def everything(engine):
    """All that a training has left behind, on the host."""
    arrays = engine.snapshot() | {name: np.asarray(losses) for name, losses in vars(engine.history).items()}
    return {name: array for name, array in arrays.items() if getattr(array, "dtype", np.dtype(object)).kind in "fi"}


def trained(precision="fp32", optimizer=None, *, epochs, plan):
    optimizer = optimizer or AdamW(OneCycle(0.01, steps=500))
    engine = Engine(NET, optimizer=optimizer, batch_size=32, seed=3, backend="triton", precision=precision, plan=plan)
    engine.fit(*data(), epochs=epochs)
    assert engine.update_count == 50 * epochs
    return everything(engine)


def assert_same(first, second):
    assert first.keys() == second.keys()
    for name, array in first.items():
        if "seconds" not in name and "time" not in name:
            np.testing.assert_array_equal(array, second[name], err_msg=name)


OPTIMIZERS = {
    "fused": AdamW(OneCycle(0.01, steps=500)),
    "gradients stored": SGD(OneCycle(0.05, steps=500), momentum=0.9, clip_norm=0.5),
}


@pytest.mark.parametrize("precision", GPU.precisions)
@pytest.mark.parametrize("optimizer", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_a_graph_is_the_eager_plan_bitwise_while_the_rate_changes_every_step(precision, optimizer):
    graph, eager = (trained(precision, optimizer, epochs=10, plan=plan) for plan in ("graph", "eager"))
    assert_same(graph, eager)


@pytest.mark.parametrize("plan", ["graph", "eager"])
@pytest.mark.parametrize("precision", GPU.precisions)
def test_two_hundred_steps_repeat_bitwise(precision, plan):
    assert_same(trained(precision, epochs=4, plan=plan), trained(precision, epochs=4, plan=plan))


def bound_ops(variant):
    """Each op bound to arrays of some size: (name, run, all its arrays)."""
    values, layout = Values(1, variant), "owned"
    x, w, b = place(values.factors(M, K), layout), place(values.factors(N, K, scale=0.05), layout), values.normal(N)
    dz, y = place(values.factors(M, N), layout), poisoned((M, N), variant.compute, layout)
    counters, stats = np.zeros(COUNTERS, np.int64), np.zeros(STATS)
    counters[ROW_COUNT] = M - 3
    target, slope = values.integers(N, M), np.full(1, 0.25, variant.real)
    loss = {"target": target, "counters": counters, "stats": stats, "loss": LossSpec("cross_entropy", accuracy=True)}
    dslope, out = poisoned(1, variant.real), poisoned((M, K), variant.compute, layout)
    rule = UpdateRule("adam", ScheduleSpec("one_cycle", 0.1, steps=100))
    clock = {"rule": rule, "hyper": hyper_at(rule, 0), "counters": counters}
    p, s = place(values.normal(N, K), layout), [place(np.abs(values.normal(N, K)), layout) for _ in range(2)]
    pb, sb = values.normal(N), [np.abs(values.normal(N)) for _ in range(2)]
    layer = {"dz": dz, "x": x, "w": p, "b": pb, "w_state": tuple(s), "b_state": tuple(sb)}
    layer |= {"w_rule": TensorRule(), "b_rule": TensorRule()}
    dw, db = poisoned((N, K), variant.real, layout), poisoned(N, variant.real)
    size = 50_000
    arenas = [values.normal(size) for _ in range(3)] + [np.abs(values.normal(size))]
    flat = {"params": arenas[0], "grads": arenas[1], "states": tuple(arenas[2:])}
    clipped = UpdateRule(**{**vars(rule), "clip_norm": 0.1})
    dropped = {"dropout": Dropout(0.5, 1, 7), "counters": counters}
    plain = UpdateRule("sgd", ScheduleSpec("constant", 0.1))
    calls = {
        "linear": {"x": x, "w": w, "b": b, "y": y, "activation": "gelu", **dropped},
        "linear_loss_grad": {"x": x, "w": w, "b": b, "dz": y, **loss},
        "loss_grad": {"z": dz, "dz": y, **loss},
        "grad_input": {
            "dz": dz, "w": w, "y": x, "z": x, "dz_prev": out, "activation": "prelu", "slope_param": slope,
            "dslope": dslope,
        },
        "grad_weight": {"layers": [{"dz": dz, "x": x, "dw": dw, "db": db}], "rule": plain, "counters": counters},
        "grad_weight_update": {"layers": [layer], **clock},
        "update": {**flat, "segments": (Segment(0, size, TensorRule()),), **clock, "rule": clipped},
    }  # fmt: skip
    for op, operands in calls.items():
        yield op, variant.bind(op, **operands), _arrays(operands)


def _arrays(value):
    if isinstance(value, np.ndarray):
        return [value]
    items = value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else ()
    return [array for item in items for array in _arrays(item)]


@pytest.mark.parametrize("precision", GPU.precisions)
def test_every_op_gives_the_same_bits_fifty_times(precision):
    for op, run, arrays in bound_ops(Variant(GPU, precision)):
        start, first = [np.array(a) for a in arrays], None
        for _ in range(50):
            for array, values in zip(arrays, start, strict=True):
                array[...] = values
            run()
            found = [np.array(a).tobytes() for a in arrays]
            first = first or found
            assert found == first, op


def test_addresses_past_two_to_the_31_elements():
    """x has more elements than an int32 counts, and in a second call so has y; its last rows come out right."""
    import torch

    values, backend = Values(2, FP32), FP32.backend()
    rows, k, n, m = 2**22 + 64, 520, 24, 48
    w, b = values.normal(n, k, scale=0.05), values.normal(n)
    x = backend.view(backend.allocate(rows * k, "real"), 0, (rows, k), k)
    last = values.normal(m, k)
    backend.copy_into(x[-m:], last)
    assert x.numel() > 2**31
    index = torch.arange(rows - m, rows, device=x.device)
    counters = backend.allocate(COUNTERS, "int64")
    y = backend.view(backend.allocate(m * n, "compute"), 0, (m, n), n)
    on_device = {"w": backend.from_host(w), "b": backend.from_host(b)}
    backend.bind("linear", x=x, rows=index, y=y, counters=counters, activation="identity", **on_device)()
    z = exact(last) @ exact(w).T + b
    magnitude = np.abs(last) @ np.abs(w).T + np.abs(b)
    limit = bound(k + 1, magnitude, output=z, products=FP32.products)
    assert_within(backend.to_host(y), z, limit)

    dz = values.normal(m, n)
    dw = backend.view(backend.allocate(n * k, "real"), 0, (n, k), k)
    db = backend.allocate(n, "real")
    layer = {"dz": backend.from_host(dz), "x": x, "rows": index, "dw": dw, "db": db}
    rule = UpdateRule("sgd", ScheduleSpec("constant", 0.1))
    backend.bind("grad_weight", layers=[layer], rule=rule, counters=counters)()
    expected = exact(dz).T @ exact(last)
    limit = bound(m, np.abs(dz).T @ np.abs(last), output=expected, products=FP32.products)
    assert_within(backend.to_host(dw), expected, limit)

    small = backend.view(backend.allocate(rows * 8, "compute"), 0, (rows, 8), 8)
    backend.copy_into(small[-m:], last[:, :8])
    wide = backend.from_host(values.normal(k, 8))
    bias = backend.allocate(k, "real")
    del y
    backend.bind("linear", x=small, w=wide, b=bias, y=x, activation="identity")()
    z = exact(last[:, :8]) @ exact(backend.to_host(wide)).T
    magnitude = np.abs(last[:, :8]) @ np.abs(backend.to_host(wide)).T
    assert_within(backend.to_host(x[-m:]), z, bound(9, magnitude, output=z, products=FP32.products))


@pytest.fixture(params=["eager", "graph"])
def warm(request):
    """A bound step that has run before."""
    engine = Engine(NET, optimizer=Adam(0.01), batch_size=32, backend="triton", plan=request.param)
    X, y = data(32)
    for _ in range(3):
        engine.step(X, y)
    engine.memory.backend.synchronize()
    return next(iter(engine._staged.values()))


def test_a_step_does_not_wait_for_the_device(warm):
    import torch

    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(5):
            warm.run()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_a_step_allocates_nothing(warm):
    import torch

    before = torch.cuda.memory_stats()["allocation.all.allocated"]
    for _ in range(10):
        warm.run()
    assert torch.cuda.memory_stats()["allocation.all.allocated"] == before


@pytest.mark.parametrize("k", [17, 128, 784, 4096])
def test_tf32x3_keeps_the_bound_of_fp32_and_tf32_does_not(k):
    """Random signs, so that the errors do not add up. The architecture's constant: 0.75 for truncating sums."""
    values = Values(k, FP32)
    x, w, b = values.normal(64, k), values.normal(48, k), np.zeros(48, np.float32)
    z, products = exact(x) @ exact(w).T, Products(truncation=0.75)
    partial = largest_partial_sum(exact(x), exact(w).T, products)
    limit = bound(k + 1, np.abs(x) @ np.abs(w).T, output=z, products=products, partial=partial)
    for precision in ("fp32", "tf32"):
        y = poisoned((64, 48), np.float32, "owned")
        Variant(GPU, precision).bind("linear", x=x, w=w, b=b, y=y, activation="identity")()
        if precision == "fp32":
            assert_within(y, z, limit)
        else:
            with pytest.raises(AssertionError, match="out of bound"):
                assert_within(y, z, limit)


SANITIZED = """
import numpy as np
from fusemlp import MLP, SGD, Adam, Engine
rng = np.random.default_rng(0)
X, y = rng.standard_normal((70, 19)).astype(np.float32), rng.integers(0, 5, 70)
for precision in ("fp32", "bf16", "fp16"):
    for optimizer in (Adam(0.01), SGD(0.1, momentum=0.9, clip_norm=0.5)):
        engine = Engine(MLP([19, 33, 17, 5], activation=["prelu", "gelu"], dropout=0.2), optimizer=optimizer,
                        batch_size=32, backend="triton", precision=precision, plan="eager")
        engine.fit(X, y, epochs=2)
"""


@pytest.mark.parametrize("tool", ["memcheck", "racecheck", "initcheck"])
def test_compute_sanitizer_finds_nothing(tool):
    if shutil.which("compute-sanitizer") is None:
        pytest.skip("compute-sanitizer is not installed: it comes with the CUDA toolkit")
    command = ["compute-sanitizer", "--tool", tool, "--error-exitcode", "9", sys.executable, "-c", SANITIZED]
    done = subprocess.run(command, capture_output=True, text=True, timeout=1800, check=False)
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
