"""``clip_examples`` and the noise of ``update`` against their definitions, and the clipping of the oracle."""

import math

import numpy as np
import pytest
import scipy.stats
from calls import RATE, RULES, Clock, counters_of, padded_rows, picked_input, state_arrays
from devices import NUMPY, Variant, devices_with, variants_with
from hypothesis import strategies as st
from memory import ROW_MULTIPLE, Values, exact, place
from strategies import contract_test, placements, seeds, sizes, variants
from tolerance import assert_updated

from fusemlp_kernels import contract as c
from fusemlp_kernels import philox, reference
from fusemlp_kernels.errors import ArgumentError

SEED = (5 << 40) + 3
VARIANTS = variants_with("clip_examples")
DEVICES = devices_with("clip_examples")


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


def noisy(g, noise, tensor, update):
    """The gradient of a tensor with its noise, and the most that float64 may err in it.

    A pair of numbers is a length at an angle. The two ways to compute it err by 32 roundings of the length at most,
    about ten each of the angle, its functions and their sum, and by an error of the logarithm whose root the length is:
    NumPy's cancels near 1, within four roundings of 1.
    """
    pairs = philox.normal(noise.seed, tensor, update, g.size + g.size % 2).reshape(-1, 2)
    length = np.repeat(np.hypot(*pairs.T), 2)[: g.size].reshape(g.shape)
    z = pairs.ravel()[: g.size].reshape(g.shape)
    error = noise.deviation * (2.0**-48 * length + 2.0**-51 / length) + 2.0**-50 * np.abs(g + noise.deviation * z)
    return (g + noise.deviation * z) / noise.divisor, error / noise.divisor


@contract_test(
    DEVICES,
    # rows and columns of a matrix, or the length of a vector
    tensors=st.lists(
        st.one_of(st.tuples(st.integers(1, 20), st.integers(1, 20)), st.tuples(st.integers(1, 300))),
        min_size=1,
        max_size=2,
    ),
    rule=st.sampled_from(list(RULES.values())),
    deviation=st.sampled_from((0.0, 0.5, 30.0)),
    divisor=st.sampled_from((1.0, 7.0)),
    updates=st.sampled_from((0, 6)),
    # valid rows of three batches with room for five
    counts=st.tuples(*[st.integers(0, 5)] * 3),
    parts=st.integers(1, 3),
    variant=variants,
    seed=seeds,
)
def test_update_adds_noise(tensors, rule, deviation, divisor, updates, counts, parts, variant, seed):
    values, dtype, u = Values(seed, variant), variant.real, variant.unit
    parts = parts if variant.traits.split_rows else 1
    multiple = variant.traits.row_multiple
    segments, shapes, size = [], [], 0
    for shape in tensors:
        pitch = -(-shape[-1] // multiple) * multiple if len(shape) == 2 else shape[0]
        length = pitch * (shape[0] if len(shape) == 2 else 1)
        segments.append(c.Segment(size, length, c.TensorRule(0.5, 0.01), shape[-1], pitch))
        shapes.append(shape)
        size += -(-length // 64) * 64
    valid = np.zeros(size, np.bool_)

    def matrix(flat, segment, shape):
        return flat[segment.offset : segment.offset + segment.size].reshape(-1, segment.pitch)[:, : shape[-1]]

    for segment, shape in zip(segments, shapes, strict=True):
        matrix(valid, segment, shape)[...] = True
    params = np.where(valid, values.normal(size), 0).astype(dtype)
    states = tuple(np.where(valid, state, 0).astype(dtype) for state in state_arrays(rule, values, size))
    grads = np.zeros(parts * size, dtype)
    clock = Clock(rule, updates, updates)
    rows = np.concatenate([padded_rows(values.rng, count, 5, 9) for count in counts])
    clock.counters[[c.ROW_STEP, c.ROW_TOTAL, c.ROW_COUNT]] = 5, 15, counts[0]
    noise = c.Noise(deviation, divisor, int(values.rng.integers(0, 2**64, dtype=np.uint64)))
    shadow = {"shadow": variant.rounded(params)} if variant.output_unit else {}
    split = {"parts": parts, "part": size} if parts > 1 else {}
    run = variant.bind(
        "update", params=params, grads=grads[:size], states=states, segments=tuple(segments), noise=noise, rows=rows,
        **shadow, **split, **clock.operands,
    )  # fmt: skip
    for batch in range(3):
        grads[...] = np.where(np.tile(valid, parts), values.normal(parts * size), 0.0)
        before = exact(params), exact(grads).reshape(parts, size), tuple(exact(state) for state in states)
        run()
        following = (batch + 1) % 3
        assert (clock.counters[c.ROW_OFFSET], clock.counters[c.ROW_COUNT]) == (5 * following, counts[following])
        for number, (segment, shape) in enumerate(zip(segments, shapes, strict=True)):
            p, *own = (matrix(one, segment, shape) for one in (before[0], *before[2]))
            given = np.stack([matrix(one, segment, shape) for one in before[1]])
            g, limit = noisy(given.sum(axis=0), noise, number, updates + batch)
            # the sum of the parts is rounded
            limit = limit + u * (np.abs(g) + (parts > 1) * parts * np.abs(given).sum(axis=0) / divisor)
            now, *states_now = (matrix(array, segment, shape) for array in (params, *states))
            before_it = p, g, tuple(own)
            assert_updated(now, states_now, rule, segment.rule, before_it, updates + batch, RATE, limit, u)
        # nothing gets between the rows
        assert not params[~valid].any() and not any(state[~valid].any() for state in states)
        if shadow:
            np.testing.assert_array_equal(shadow["shadow"], variant.rounded(params))


@st.composite
def clipped_layers(draw, device):
    # 300 columns are more than a tile or a block has
    width = st.one_of(sizes(device), st.just(300))
    return draw(width), draw(width), draw(st.booleans()), draw(st.booleans()), draw(placements(device, 1))


@contract_test(
    DEVICES,
    layers=lambda device: st.lists(clipped_layers(device), min_size=1, max_size=3),
    m=st.integers(0, 13),
    short=st.integers(0, 3),
    by_row=st.booleans(),
    share=st.sampled_from((0.0, 0.5, 1.0)),
    variant=variants,
    seed=seeds,
)
def test_clip_examples(layers, m, short, by_row, share, variant, seed):
    """``share``: the part of the rows that are clipped, about."""
    values, counters = Values(seed, variant), counters_of()
    counters[c.ROW_COUNT] = count = max(m - short, 0)
    operands, squares, terms = [], np.zeros(m), 0
    for index, (n, k, w_trained, b_trained, (layouts, output_layout)) in enumerate(layers):
        dz, x = place(values.factors(m, n), output_layout), place(values.factors(m, k), layouts[0])
        layer = {"dz": dz, "x": x, "w_trained": w_trained, "b_trained": b_trained}
        if by_row and index == 0:
            rows = padded_rows(values.rng, count, m, max(m, 1))
            picked, x = picked_input(values, rows, max(m, 1), k, layouts[0], counters)
            layer |= picked
        operands.append(layer)
        # the squares of the whole gradients, element by element
        parts = [np.einsum("mn,mk->mnk", exact(dz), exact(x))] * w_trained + [exact(dz)] * b_trained
        squares += sum(np.square(part).sum(axis=tuple(range(1, part.ndim))) for part in parts)
        terms += n + k
    norms = np.sqrt(squares)
    largest = float(np.quantile(norms[:count], 1.0 - share)) if count else 1.0
    largest = largest if largest > 0.0 else 1.0
    factors = np.where(np.arange(m) < count, np.minimum(1.0, largest / np.maximum(norms, 1e-300)), 1.0)
    before = [exact(layer["dz"]) for layer in operands]
    variant.bind("clip_examples", layers=operands, clip=largest, counters=counters)()
    for layer, dz in zip(operands, before, strict=True):
        wanted = dz * factors[:, None]
        # the sums are of float64; the factor and its product are rounded
        limit = (2.0**-53 * (terms + 8) + 2.0 * variant.unit) * np.abs(wanted) + 2.0**-126
        variant.check(layer["dz"], wanted, limit)


@pytest.mark.parametrize("variant", VARIANTS)
def test_impossible_rows_stay_among_themselves(variant):
    x = np.ones((4, 2), variant.compute)
    # the square of a number of row 1 overflows in float32, or in float16
    huge = 1e30 if variant.compute != np.float16 else 6e4
    dz = np.array([[0.0, 0.0], [huge, 0.0], [np.nan, 1.0], [0.1, 0.1]], variant.compute)
    counters = counters_of(4)
    layer = {"x": x, "dz": dz, "w_trained": True, "b_trained": True}
    variant.bind("clip_examples", layers=[layer], clip=1.0, counters=counters)()
    tolerance = 2e-3 if variant.compute == np.float16 else 1e-6
    np.testing.assert_allclose(dz, [[0, 0], [3**-0.5, 0], [np.nan, np.nan], [0.1, 0.1]], rtol=tolerance)


@pytest.mark.parametrize("variant", VARIANTS)
def test_noise_is_for_one_batch(variant):
    params = np.zeros(8, variant.real)
    clock = Clock(c.UpdateRule("sgd", accumulate=2))
    with pytest.raises(ArgumentError, match="noise: it is for one batch's clipped gradients"):
        operands = {"params": params, "grads": params.copy(), "states": (), "segments": ()}
        variant.bind("update", **operands, noise=c.Noise(1.0, 1.0, 0), **clock.operands)


def test_numpy_has_no_gaps_between_rows():
    params, clock = np.zeros(ROW_MULTIPLE), Clock(c.UpdateRule("sgd"))
    with pytest.raises(ArgumentError, match="segments: the numpy backend adds noise to matrices without gaps"):
        Variant(NUMPY, "fp64").backend().bind(
            "update", params=params, grads=params.copy(), states=(), noise=c.Noise(1.0, 1.0, 0), **clock.operands,
            segments=(c.Segment(0, ROW_MULTIPLE, c.TensorRule(), 3, ROW_MULTIPLE),),
        )  # fmt: skip


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
    batch, spec = reference.Batch(x, target), c.LossSpec(kind, reduction="sum")
    # unclipped they are the gradients of the sum of the rows' losses, of which each is a mean over the outputs
    _, sums, _ = reference.gradients(layers, spec, batch)
    found = reference.clipped_gradients(layers, spec, batch, math.inf)
    for whole, rows in zip(sums, found, strict=True):
        for g, own in zip(whole, rows, strict=True):
            np.testing.assert_allclose(own, g / (1 if kind == "cross_entropy" else 3), rtol=1e-12, atol=1e-12)
    one = reference.Batch(x[:1], target[:1])
    clipped = reference.clipped_gradients(layers, spec, one, 0.01)
    assert math.sqrt(sum(np.sum(g**2) for own in clipped for g in own)) == pytest.approx(0.01)
