"""Tests of the Triton backend that need a GPU: a step neither waits nor allocates, and tf32x3 is within its bound.

``test_cards.py`` has the tests for every backend on a card.
"""

import numpy as np
import pytest
from devices import GPU, REHEARSED, Variant, marks_of, needs_a_card
from fleet_cases import Fleet, Model, Shape
from memory import Values, exact, poisoned
from tolerance import TF32X3, Products, assert_within, bound, largest_partial_sum

from fusemlp import MLP, Adam, Engine
from fusemlp.runtime.plans import has_plan
from fusemlp_kernels.contract import LossSpec, UpdateRule

pytestmark = marks_of(GPU)

FP32 = Variant(GPU, "fp32")
NET = MLP([9, 8, 6, 4] if REHEARSED else [61, 96, 40, 10], activation=["gelu", "relu"], dropout=[0.2, 0.0])
SMALL = MLP([9, 6, 4] if REHEARSED else [61, 32, 10])


@pytest.fixture(params=["eager", "graph"])
def warm(request):
    """A bound step that has run before."""
    engine = Engine(NET, optimizer=Adam(0.01), batch_size=32, backend="triton", plan=request.param)
    rng = np.random.default_rng(0)
    X, y = rng.standard_normal((32, 61)).astype(np.float32), rng.integers(0, 10, 32)
    for _ in range(3):
        engine.step(X, y)
    engine.memory.backend.synchronize()
    return next(iter(engine.programs.staged.values()))


@needs_a_card
def test_a_step_does_not_wait_for_the_device(warm):
    import torch

    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(5):
            warm.run()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@needs_a_card
def test_a_step_allocates_nothing(warm):
    import torch

    before = torch.cuda.memory_stats()["allocation.all.allocated"]
    for _ in range(10):
        warm.run()
    assert torch.cuda.memory_stats()["allocation.all.allocated"] == before


@needs_a_card
@pytest.mark.parametrize("k", [17, 128, 784, 4096])
def test_tf32x3_keeps_the_bound_of_fp32_and_tf32_does_not(k):
    """Random signs, so that the errors do not add up. The bound has TF32X3's constant for truncating sums."""
    values = Values(k, FP32)
    x, w, b = values.normal(64, k), values.normal(48, k), np.zeros(48, np.float32)
    z, products = exact(x) @ exact(w).T, Products(truncation=TF32X3.truncation)
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


def fleet_of(models, data=64 if REHEARSED else 2048):
    """A fleet of 64-32-10 on the device: the call, and what it trains."""
    from devices import TorchMemory, _converted

    rule = UpdateRule("adam")
    shape = Shape((64, 32, 10), ("relu", "identity"), batch=32, data=data)
    loss = LossSpec("cross_entropy", accuracy=True)
    each = [Model(rule, loss, seed=seed, rows=data, rates=(1e-3,)) for seed in range(models)]
    backend = FP32.backend()
    there = TorchMemory(backend, "train_fleet")
    call = backend.bind("train_fleet", **_converted(Fleet(FP32, shape, each).operands(), there.view))
    there.upload()
    return call, there


def seconds(call, steps):
    """The shortest of five launches."""
    import torch

    times = []
    for _ in range(6):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        call(steps)
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) / 1e3)
    return min(times[1:])


@needs_a_card
def test_a_model_for_each_multiprocessor_takes_as_long_as_one():
    import torch

    count = torch.cuda.get_device_properties(0).multi_processor_count
    one, many = (seconds(fleet_of(models)[0], [2000] * models) for models in (1, count))
    assert many <= 1.15 * one, f"{count} models: {many / one:.2f} times as long as one"


def test_a_fleet_repeats_bitwise_and_in_launches_of_any_length():
    found = []
    models, part = (2, 1) if REHEARSED else (40, 50)
    for launches in ([4 * part], [4 * part], [1, 2 * part - 1, 2 * part]):
        call, there = fleet_of(models)
        for steps in launches:
            call([steps] * models)
        found.append([flat.cpu().numpy().tobytes() for _, flat in there.flats.values()])
    assert found[0] == found[1] == found[2]


@pytest.mark.parametrize("net", [NET, SMALL], ids=["two hidden layers", "one"])
@pytest.mark.parametrize("precision", ["fp32"] if REHEARSED else ["fp32", "tf32", "bf16"])
def test_other_plans_are_the_training_of_a_graph(precision, net):
    """Other sums, so other roundings: the losses of an epoch agree to the precision of the products."""
    rng = np.random.default_rng(0)
    rows, inputs, outputs = 32 if REHEARSED else 320, net.sizes[0], net.sizes[-1]
    X, y = rng.standard_normal((rows, inputs)).astype(np.float32), rng.integers(0, outputs, rows)
    traits = Engine(net, backend="triton", precision=precision).memory.backend.traits
    plans = [plan for plan in ("resident", "card", "chip", "narrow") if has_plan(traits, plan, net, precision)]
    fitted, predicted = [], []
    for plan in ("eager" if REHEARSED else "graph", *plans):
        engine = Engine(net, batch_size=32, seed=3, backend="triton", precision=precision, plan=plan)
        fitted.append(engine.fit(X, y, epochs=1).history["loss"][0])
        predicted.append(engine.evaluate(X, y)["loss"])
    tolerance = {"fp32": 1e-4, "tf32": 1e-2, "bf16": 5e-2}[precision] * fitted[0]
    for losses in (fitted, predicted):
        assert all(abs(loss - losses[0]) <= tolerance for loss in losses)
