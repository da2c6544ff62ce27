"""What only a GPU can show of the Triton backend: no waiting and no allocating within a step, tf32x3 in its bound.

What every backend on a card shows is in ``test_cards.py``.
"""

from __future__ import annotations

import numpy as np
import pytest
from devices import GPU, Variant, marks_of
from memory import poisoned
from strategies import Values, exact
from tolerance import Products, assert_within, bound, largest_partial_sum

from fusemlp import MLP, Adam, Engine

pytestmark = marks_of(GPU)

FP32 = Variant(GPU, "fp32")
NET = MLP([61, 96, 40, 10], activation=["gelu", "relu"], dropout=[0.2, 0.0])


@pytest.fixture(params=["eager", "graph"])
def warm(request):
    """A bound step that has run before."""
    engine = Engine(NET, optimizer=Adam(0.01), batch_size=32, backend="triton", plan=request.param)
    rng = np.random.default_rng(0)
    X, y = rng.standard_normal((32, 61)).astype(np.float32), rng.integers(0, 10, 32)
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
