"""``clip_examples`` and the noise of ``update`` against their definitions, and the clipping of the oracle."""

from __future__ import annotations

import math

import numpy as np
import pytest
import scipy.stats
from devices import NUMPY, Variant

from fusemlp_kernels import philox, reference
from fusemlp_kernels.clock import hyper_at, rate_table
from fusemlp_kernels.contract import (
    COUNTERS,
    ROW_COUNT,
    ROW_OFFSET,
    ROW_STEP,
    ROW_TOTAL,
    UPDATE_COUNT,
    LossSpec,
    Noise,
    Segment,
    TensorRule,
    UpdateRule,
)
from fusemlp_kernels.errors import ArgumentError

VARIANTS = [Variant(NUMPY, "fp64"), Variant(NUMPY, "fp32")]
SEED = (5 << 40) + 3


def test_the_noise_is_standard_normal():
    numbers = philox.normal(SEED, 2, 7, 100_000)
    assert abs(numbers.mean()) < 4 / np.sqrt(numbers.size)
    assert abs(numbers.var() - 1) < 4 * np.sqrt(2 / numbers.size)
    assert abs((numbers**3).mean()) < 4 * np.sqrt(15 / numbers.size)
    assert abs((numbers**4).mean() - 3) < 4 * np.sqrt(96 / numbers.size)
    assert scipy.stats.kstest(numbers, "norm").pvalue > 1e-3
    assert np.abs(numbers).max() < 6.8
    # neighbours, which one pair of words makes, are independent
    for lag in (1, 2, 4, philox.NORMALS):
        assert abs(np.mean(numbers[:-lag] * numbers[lag:])) < 4 / np.sqrt(numbers.size)


def test_the_noise_is_another_for_each_seed_tensor_and_update():
    size = 20_000
    streams = [philox.normal(*key, size) for key in ((SEED, 0, 0), (SEED + 1, 0, 0), (SEED, 1, 0), (SEED, 0, 1))]
    assert np.abs(np.corrcoef(streams) - np.eye(4)).max() < 4.5 / np.sqrt(size)
    assert np.array_equal(philox.normal(SEED, 0, 0, 77), streams[0][:77])


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_an_update_adds_the_noise_before_it_divides(variant):
    sizes, gap, updates = (1, 131, 5000), 3, 6
    offsets = np.cumsum([0, *(size + gap for size in sizes)])[:-1]
    generator = np.random.default_rng(0)
    params, grads = np.zeros(offsets[-1] + sizes[-1], variant.real), np.zeros(offsets[-1] + sizes[-1], variant.real)
    grads[:] = given = generator.normal(size=grads.size)
    counters, rule = np.zeros(COUNTERS, np.int64), UpdateRule("sgd")
    counters[UPDATE_COUNT] = updates
    # the last batch has one row, the one after it none
    rows = np.array([3, 1, 0, -1, -1, -1])
    counters[[ROW_STEP, ROW_TOTAL, ROW_COUNT]] = 2, len(rows), 2
    run = variant.backend().bind(
        "update", params=params, grads=grads, states=(), rule=rule, hyper=hyper_at(rule, 1.0), counters=counters,
        segments=[Segment(int(at), size, TensorRule()) for at, size in zip(offsets, sizes, strict=True)],
        rates=rate_table(rule, [1.0]), noise=Noise(0.5, 8.0, SEED), rows=rows,
    )  # fmt: skip
    run()
    for tensor, (at, size) in enumerate(zip(offsets, sizes, strict=True)):
        wanted = -(given[at : at + size] + 0.5 * philox.normal(SEED, tensor, updates, size)) / 8.0
        np.testing.assert_allclose(params[at : at + size], wanted, rtol=0, atol=4 * np.finfo(variant.real).eps)
        assert not params[at + size : at + size + gap].any()
    assert (counters[ROW_OFFSET], counters[ROW_COUNT]) == (2, 1)
    run()
    assert (counters[ROW_OFFSET], counters[ROW_COUNT]) == (4, 0)


def clip(variant, xs, dzs, trained, largest, count):
    layers = [
        {"x": x, "dz": dz, "w_trained": w, "b_trained": b} for x, dz, (w, b) in zip(xs, dzs, trained, strict=True)
    ]
    counters = np.zeros(COUNTERS, np.int64)
    counters[ROW_COUNT] = count
    variant.backend().bind("clip_examples", layers=layers, clip=largest, counters=counters)()


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
@pytest.mark.parametrize("trained", [((True, True), (True, True)), ((False, True), (True, False))])
def test_rows_are_scaled_to_the_largest_norm(variant, trained):
    generator, rows, count = np.random.default_rng(1), 37, 30
    xs, dzs = ([generator.normal(size=(rows, n)).astype(variant.real) for n in widths] for widths in ((9, 4), (4, 3)))
    norms = np.zeros(rows)
    for i in range(rows):
        for x, dz, kinds in zip(xs, dzs, trained, strict=True):
            parts = np.outer(dz[i].astype(float), x[i]), dz[i].astype(float)
            norms[i] += sum(np.sum(part**2) for part, is_trained in zip(parts, kinds, strict=True) if is_trained)
    norms = np.sqrt(norms)
    largest = float(np.median(norms))
    wanted = [dz * np.where(np.arange(rows) < count, np.minimum(1.0, largest / norms), 1.0)[:, None] for dz in dzs]
    clip(variant, xs, dzs, trained, largest, count)
    for dz, values in zip(dzs, wanted, strict=True):
        np.testing.assert_allclose(dz, values, rtol=8 * np.finfo(variant.real).eps)


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_impossible_rows_stay_among_themselves(variant):
    x = np.ones((4, 2), variant.real)
    # the square of a number of row 1 overflows in float32
    dz = np.array([[0.0, 0.0], [1e30, 0.0], [np.nan, 1.0], [0.1, 0.1]], variant.real)
    clip(variant, [x], [dz], [(True, True)], 1.0, 4)
    np.testing.assert_allclose(dz, [[0, 0], [3**-0.5, 0], [np.nan, np.nan], [0.1, 0.1]], rtol=1e-6)


def test_noise_is_for_one_batch():
    rule = UpdateRule("sgd", accumulate=2)
    given = dict.fromkeys(("params", "grads", "hyper", "rates", "counters"), np.zeros(8))
    with pytest.raises(ArgumentError, match="noise: it is for one batch's clipped gradients"):
        VARIANTS[0].backend().bind("update", **given, states=(), segments=(), rule=rule, noise=Noise(1.0, 1.0, 0))


@pytest.mark.parametrize("kind", ["cross_entropy", "mse"])
def test_the_oracle_clips_each_row(kind):
    generator = np.random.default_rng(2)
    sizes = (4, 6, 3)
    layers = [
        reference.Layer(generator.normal(size=(n, k)), generator.normal(size=n), name)
        for k, n, name in zip(sizes[:-1], sizes[1:], ("tanh", "identity"), strict=True)
    ]
    x = generator.normal(size=(7, 4))
    target = generator.integers(0, 3, 7) if kind == "cross_entropy" else generator.normal(size=(7, 3))
    batch, spec = reference.Batch(x, target), LossSpec(kind, reduction="sum")
    # unclipped they are the gradients of the sum of the rows' losses, of which each is a mean over the outputs
    _, sums = reference.gradients(layers, spec, batch)
    found = reference.clipped_gradients(layers, spec, batch, math.inf)
    for whole, rows in zip(sums, found, strict=True):
        for g, own in zip(whole, rows, strict=True):
            np.testing.assert_allclose(own, g / (1 if kind == "cross_entropy" else 3), rtol=1e-12, atol=1e-12)
    one = reference.Batch(x[:1], target[:1])
    clipped = reference.clipped_gradients(layers, spec, one, 0.01)
    assert math.sqrt(sum(np.sum(g**2) for own in clipped for g in own)) == pytest.approx(0.01)
