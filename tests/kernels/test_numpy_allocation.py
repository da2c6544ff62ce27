"""A bound call allocates no array: tracemalloc sees the memory of NumPy's arrays.

Every call runs as one table in the compiled loop, between the copies that its layouts and types need. NumPy casts and
broadcasts operands through buffers of ``np.getbufsize()`` elements, for arrays of any size. Here that size is set low,
so a buffer is not mistaken for an array and hides none.
"""

import gc
import tracemalloc

import numpy as np
import pytest
from calls import counters_of
from devices import NUMPY, Variant
from memory import Values, place

import fusemlp_kernels
from fusemlp_kernels import contract as c
from fusemlp_kernels.clock import hyper_at, rate_table

FP32 = Variant(NUMPY, "fp32")
LAYOUTS = sorted({*NUMPY.output_layouts, "transposed"})
M, K, N = 200, 300, 250
# Every array of the calls below with more than one number a row is ten times larger than this, and more; what is left
# are Python's own objects and NumPy's views.
LIMIT = 4096
BUFFER = 64
RATES = [0.1 * 0.9**updates for updates in range(100)]


@pytest.fixture(autouse=True)
def small_buffers():
    usual = np.setbufsize(BUFFER)
    yield
    np.setbufsize(usual)


def peak(run, prepare=lambda step: None):
    """The most memory, in bytes, that runs have held at a time beyond what was there before them.

    The four steps are gone through three times and the least of a step counts: what a run allocates it allocates each
    time, and what another thread of the process (a test runner's) does in between, it does not.
    """
    prepare(0)
    run()
    gc.collect()
    gc.disable()
    tracemalloc.start()
    try:
        run()
        grown = np.zeros((3, 4), np.int64)
        for turn in range(3):
            for step in range(4):
                prepare(step + 1)
                tracemalloc.reset_peak()
                before = tracemalloc.get_traced_memory()[0]
                run()
                grown[turn, step] = tracemalloc.get_traced_memory()[1] - before
        return int(grown.min(axis=0).max())
    finally:
        tracemalloc.stop()
        gc.enable()


def bind(op, **operands):
    return fusemlp_kernels.backend("numpy", None, "fp32").bind(op, **operands)


def counters(count=M):
    values = counters_of()
    values[c.ROW_COUNT] = count
    return values


def test_an_allocation_would_be_seen():
    assert peak(lambda: np.ones((M, N), np.float32) * 2) >= M * N * 4


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layers_and_their_gradients(layout):
    values, rule, tensor = Values(1, FP32), c.UpdateRule("adam"), c.TensorRule(0.5, 0.01)
    x, w, b = (place(a, layout) for a in (values.normal(1000, K), values.normal(N, K), values.normal(N)))
    rows = np.concatenate([np.arange(M - 3) * 5, [-1, -1, -1]])
    y, z, keep = place(values.normal(M, N), layout), place(values.normal(M, N), layout), np.ones((M, N), np.bool_)
    shared = {"activation": "gelu", "dropout": c.Dropout(0.5, 1, 2), "counters": counters(M - 3), "keep": keep}
    gathered = place(np.empty((M, K), np.float32), layout)
    assert peak(bind("linear", x=x, rows=rows, gathered=gathered, w=w, b=b, y=y, z=z, **shared)) < LIMIT
    dz, w_next, dz_prev = values.normal(M, 270), values.normal(270, N), np.empty_like(y)
    dz, w_next, dz_prev = (place(array, layout) for array in (dz, w_next, dz_prev))
    assert peak(bind("grad_input", dz=dz, w=w_next, y=y, z=z, dz_prev=dz_prev, **shared)) < LIMIT
    layer = {"dz": y, "x": gathered, "w": w, "b": b, "w_rule": tensor, "b_rule": tensor}
    for name, array in (("w_state", w), ("b_state", b)):
        layer[name] = tuple(place(np.zeros_like(array), layout) for _ in range(rule.state_count))
    clock = {"hyper": hyper_at(rule, 0.1), "rates": rate_table(rule, RATES), "counters": counters()}
    assert peak(bind("grad_weight_update", layers=[layer], rule=rule, **clock)) < LIMIT
    gradients = {"dz": y, "x": gathered, "dw": w.copy(), "db": b.copy()}
    accumulating = c.UpdateRule("sgd", accumulate=3)
    assert peak(bind("grad_weight", layers=[gradients], rule=accumulating, counters=counters())) < LIMIT


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", ["cross_entropy", "huber"])
def test_losses(kind, layout):
    values, labels = Values(2, FP32), kind == "cross_entropy"
    target = values.integers(N, 1000) if labels else place(values.uniform(0, 1, 1000, N), layout)
    rows, clock = np.arange(M) * 5, counters()
    operands = {
        "target": target, "rows": rows, "counters": clock, "stats": np.zeros(c.STATS),
        "loss": c.LossSpec(kind, accuracy=True, ignore_index=3 if labels else None),
        "weight": values.uniform(0, 1, 1000),
        "class_weight": values.uniform(0, 1, N) if labels else None, "activation": "identity" if labels else "gelu",
    }  # fmt: skip
    z, dz = place(values.normal(M, N), layout), place(np.empty((M, N), np.float32), layout)

    def next_batch(step):
        """Full and short batches in turn."""
        clock[c.ROW_COUNT] = M - 5 * (step % 2)
        rows[:] = np.where(np.arange(M) < clock[c.ROW_COUNT], np.arange(M) * 5, -1)

    for where in (dz, z, None):
        assert peak(bind("loss_grad", z=z, dz=where, **operands), next_batch) < LIMIT
    x, w, b = place(values.normal(M, K), layout), place(values.normal(N, K), layout), values.normal(N)
    assert peak(bind("linear_loss_grad", x=x, w=w, b=b, dz=dz, **operands), next_batch) < LIMIT


def test_update_and_advance():
    rule, size = c.UpdateRule("adam", clip_norm=1.0, accumulate=2), 100_000
    arrays = [np.zeros(size, np.float32) for _ in range(2 + rule.state_count)]
    segments = (c.Segment(0, 60_000, c.TensorRule(1.0, 0.01)), c.Segment(60_032, 39_968, c.TensorRule()))
    clock = {"rule": rule, "hyper": hyper_at(rule, 0.1), "rates": rate_table(rule, RATES), "counters": counters()}
    operands = {"params": arrays[0], "grads": arrays[1], "states": tuple(arrays[2:]), "segments": segments}
    assert peak(bind("update", **operands, **clock)) < LIMIT
    assert peak(bind("advance", **clock)) < LIMIT
