"""``train_resident`` of the NumPy backend beyond ``test_train_fleet``: denormal numbers, and the shards of a batch."""

import platform

import numpy as np
import pytest
from devices import NUMPY, Variant
from fleet_cases import Fleet, Model, Shape

from fusemlp_kernels.contract import (
    BATCH_INDEX,
    COUNTERS,
    ROW_COUNT,
    ROW_OFFSET,
    STATS,
    Dropout,
    LossSpec,
    UpdateRule,
)

RATE, SEED = 0.25, 7
DOUBLE, SINGLE = Variant(NUMPY, "fp64"), Variant(NUMPY, "fp32")


@pytest.mark.skipif(platform.machine().lower() not in ("x86_64", "amd64"), reason="only x86 has a bit for it")
def test_denormal_numbers_are_zero_in_the_loop_and_numbers_after_it():
    model = Model(UpdateRule("sgd"), LossSpec("cross_entropy"), decay=0.1)
    fleet = Fleet(SINGLE, Shape(activations=("relu", "identity")), [model], "train_resident")
    # a feature that is always zero: its weights only decay
    fleet.x[:, 2] = 0.0
    weights, smallest = fleet.tensor(fleet.params[0], "w0"), np.float32(np.finfo(np.float32).tiny)
    weights[:, 2] = smallest
    fleet.run(1)
    assert (weights[:, 2] == 0.0).all()
    assert np.multiply(smallest, np.float32(0.5)) > 0.0


def sharded(shards, height, *, kind="cross_entropy", real=np.float64):
    """Return the gradients and the statistics of each of these shards of ``height`` rows of a batch of 21."""
    generator = np.random.default_rng(5)
    inputs, hidden, outputs, batch = 40, 96, 3, 21
    x, weight = generator.normal(size=(30, inputs)).astype(real), generator.uniform(0.5, 2.0, 30).astype(real)
    target = generator.integers(0, outputs, 30) if kind == "cross_entropy" else generator.normal(size=(30, outputs))
    target = target if kind == "cross_entropy" else target.astype(real)
    w0, b0, w1, b1 = (
        generator.normal(size=size).astype(real) for size in ((hidden, inputs), hidden, (outputs, hidden), outputs)
    )
    counters = np.zeros(COUNTERS, np.int64)
    # the second batch of an epoch
    counters[BATCH_INDEX], counters[ROW_OFFSET], counters[ROW_COUNT] = 4, 5, batch
    rows = generator.permutation(30)
    calls, found = [], []
    dropout, rule = Dropout(RATE, 0, SEED), UpdateRule("sgd")
    h, z, keep = np.empty((height, hidden), real), np.empty((height, hidden), real), np.empty((height, hidden), bool)
    gathered, dz1, dz2 = (
        np.empty((height, inputs), real),
        np.empty((height, hidden), real),
        np.empty((height, outputs), real),
    )
    for _ in shards:
        stats, grads = np.zeros(STATS), [np.full_like(one, 77.0) for one in (w0, b0, w1, b1)]
        hidden_layer = {"activation": "gelu", "z": z, "dropout": dropout, "counters": counters, "keep": keep}
        loss = {
            "target": target,
            "counters": counters,
            "stats": stats,
            "loss": LossSpec(kind),
            "weight": weight,
            "rows": rows,
        }
        layers = [
            {"dz": dz1, "x": gathered, "dw": grads[0], "db": grads[1]},
            {"dz": dz2, "x": h, "dw": grads[2], "db": grads[3]},
        ]
        calls += [
            ("linear", {"x": x, "w": w0, "b": b0, "y": h, "rows": rows, "gathered": gathered, **hidden_layer}),
            ("linear_loss_grad", {"x": h, "w": w1, "b": b1, "dz": dz2, **loss}),
            ("grad_input", {"dz": dz2, "w": w1, "y": h, "dz_prev": dz1, **hidden_layer}),
            ("grad_weight", {"layers": layers, "rule": rule, "counters": counters}),
        ]
        found.append((grads, stats))
    variant = DOUBLE if real == np.float64 else SINGLE
    variant.backend().bind("train_resident", calls=calls, rows=rows, batch=height, arenas={}, shards=shards)(1)
    return found


@pytest.mark.parametrize("kind", ["cross_entropy", "huber"])
def test_shards_of_a_batch_add_up_to_the_batch(kind):
    ((whole, stats),) = sharded([0], 21, kind=kind)
    # the last two have one row and none
    parts = sharded([0, 5, 10, 15, 20, 25], 5, kind=kind)
    for at, gradient in enumerate(whole):
        np.testing.assert_allclose(sum(grads[at] for grads, _ in parts), gradient, rtol=1e-12, atol=1e-14)
        assert not parts[-1][0][at].any()
    np.testing.assert_allclose(sum(one for _, one in parts), stats, rtol=1e-12)


@pytest.mark.parametrize("real", [np.float32, np.float64])
def test_a_shard_has_the_same_bits_whatever_others_there_are(real):
    together = sharded([0, 7, 14], 7, real=real)
    for shard, (grads, stats) in zip([0, 7, 14], together, strict=True):
        ((own, counted),) = sharded([shard], 7, real=real)
        assert all(one.tobytes() == other.tobytes() for one, other in zip(grads, own, strict=True))
        assert stats.tobytes() == counted.tobytes()
