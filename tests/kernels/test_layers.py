"""The layers of every backend, forward and backward, against the oracle."""

from collections import namedtuple

import numpy as np
import pytest
from calls import (
    SLOPED,
    check_grad_input,
    check_grad_weight,
    check_linear,
    counters_of,
    gathering,
    kept,
    padded_rows,
    picked_input,
    slope_operands,
    walked,
)
from devices import STRIDED, VARIANT_PARAMETERS
from hypothesis import strategies as st
from memory import ROW_MULTIPLE, Values, exact, place, poisoned
from strategies import contract_test, placements, seeds, sizes, variants
from tolerance import assert_within, bound, growth

from fusemlp_kernels import contract as c
from fusemlp_kernels import reference
from fusemlp_kernels.philox import dropout_keep
from fusemlp_kernels.registry import backend

RATES = (0.1, 0.5, 0.9)
# leaky_relu and elu read their derivative off the output, so their slope is not negative; prelu's may be anything
SLOPES = (0.0, 0.01, 0.3, 1.0, 1.7)
LEARNED_SLOPES = (*SLOPES, -0.4)


@st.composite
def slopes(draw, activation):
    """The operands slope and slope_param, and the slope as the oracle takes it."""
    if activation in SLOPED:
        return draw(st.sampled_from(SLOPES))
    return draw(st.sampled_from(LEARNED_SLOPES)) if activation == "prelu" else 0.0


def rounded_slope(activation, slope, dtype):
    """A learned slope is what the array holds; a fixed one is a float."""
    return float(dtype(slope)) if activation == "prelu" else slope


SELU_SCALE, SELU_ALPHA = reference.SELU


def before_activation(activation, y, slope):
    """A z whose derivative is the one that is read off y, whatever rounding has made of y."""
    with np.errstate(divide="ignore", invalid="ignore"):
        match activation:
            case "sigmoid":
                return np.log(y) - np.log1p(-y)
            case "tanh":
                return np.arctanh(y)
            case "elu":
                return np.where(y < 0, np.log1p(y / slope), y)
            case "selu":
                return np.where(y < 0, np.log1p(y / (SELU_SCALE * SELU_ALPHA)), y)
            case "softplus":
                return y + np.log(-np.expm1(-y))
    return y


def possible(variant, activation, y, slope, rate):
    """y, nearer to zero where it is rounded to more than any z gives before dropout grows it."""
    least = {"sigmoid": 0.0, "tanh": -1.0, "elu": -slope, "selu": -SELU_SCALE * SELU_ALPHA}.get(activation, -np.inf)
    most = {"sigmoid": 1.0, "tanh": 1.0}.get(activation, np.inf)
    before = exact(y) * (1.0 - rate)
    return variant.rounded(np.where((before < least) | (before > most), y * variant.real(1.0 - 2.0**-7), y))


LAYER = "variant m k n activation slope rate scale batch_index layouts output_layout seed"


class LayerCase(namedtuple("LayerCase", LAYER)):
    """One layer: x (m, k), w (n, k), its activation and its dropout (rate 0: none)."""

    @property
    def dropout(self):
        return c.Dropout(self.rate, layer=3, seed=self.dropout_seed) if self.rate else None

    @property
    def dropout_seed(self):
        """Of 64 bits, in both halves."""
        return self.seed * 0x9E3779B1


@st.composite
def layer_cases(draw, device):
    activation = draw(st.sampled_from(c.ACTIVATIONS))
    layouts, output_layout = draw(placements(device, 3))
    return LayerCase(
        variant=draw(variants(device)),
        m=draw(sizes(device)),
        k=draw(sizes(device)),
        n=draw(sizes(device)),
        activation=activation,
        slope=draw(slopes(activation)),
        rate=draw(st.sampled_from((0.0, 0.0, *RATES))),
        scale=draw(st.sampled_from((1e-3, 1.0, 1.0, 10.0))),
        batch_index=draw(st.sampled_from((0, 1, 2**31))),
        layouts=layouts,
        output_layout=output_layout,
        seed=draw(seeds),
    )


@contract_test(
    case=layer_cases, by_row=st.booleans(), short=st.integers(0, 5), counted=st.booleans(), keep_z=st.booleans()
)
def test_linear(case, by_row, short, counted, keep_z):
    variant, m, k, n = case.variant, case.m, case.k, case.n
    values = Values(case.seed, variant)
    source_rows = 37 if by_row else m
    x = place(values.factors(source_rows, k), case.layouts[0])
    w = place(values.factors(n, k, scale=case.scale / max(k, 1) ** 0.5), case.layouts[1])
    b = place(values.normal(n), case.layouts[2])
    slope = rounded_slope(case.activation, case.slope, variant.real)
    z = poisoned((m, n), variant.compute, case.output_layout) if keep_z and case.activation in c.NEEDS_Z else None
    y = poisoned((m, n), variant.compute, case.output_layout)
    operands = {"x": x, "w": w, "b": b, "y": y, "z": z, "activation": case.activation}
    operands |= slope_operands(case.activation, slope, variant.real)
    counters = counters_of()
    if case.dropout is not None:
        operands |= {"dropout": case.dropout} | kept(variant, poisoned((m, n), np.bool_, case.output_layout))
    if counted or case.dropout is not None or by_row:
        operands["counters"] = counters
    rows = padded_rows(values.rng, m, m, source_rows)
    if by_row:
        operand, rows = walked(values, rows, counters)
        operands |= gathering(variant, operand, gathered=poisoned((m, k), variant.compute, case.output_layout))
    run = variant.bind("linear", **operands)
    # short, full, short: nothing of a batch stays behind for the next
    for step, count in enumerate((max(m - short, 0), m, max(m - short, 0))):
        batch = exact(x)
        if by_row:
            rows[:] = padded_rows(values.rng, count, m, source_rows)
            batch = np.where(rows[:, None] >= 0, batch[np.maximum(rows, 0)], 0.0)
        counters[c.ROW_COUNT], counters[c.BATCH_INDEX] = count, case.batch_index + step
        run()
        keep = None
        if case.dropout is not None:
            keep = dropout_keep(case.rate, 3, case.dropout_seed, case.batch_index + step, m, n)
            np.testing.assert_array_equal(y[~keep], 0.0)
            if "keep" in operands:
                np.testing.assert_array_equal(operands["keep"], keep)
        check_linear(variant, y, batch, w, b, case.activation, slope, keep, case.rate, z)
        if "gathered" in operands:
            np.testing.assert_array_equal(operands["gathered"], batch)


@contract_test(case=layer_cases)
def test_grad_input(case):
    variant, m, k, n = case.variant, case.m, case.k, case.n
    values = Values(case.seed, variant)
    dz = place(values.factors(m, n), case.layouts[0])
    w = place(values.factors(n, k), case.layouts[1])
    slope = rounded_slope(case.activation, case.slope, variant.real)
    z = place(values.factors(m, k, scale=case.scale), case.layouts[2])
    keep = dropout_keep(case.rate, 3, case.dropout_seed, 5, m, k) if case.rate else None
    y = reference.dropout(reference.activation(case.activation, exact(z), slope), keep, case.rate)
    y = place(possible(variant, case.activation, variant.rounded(y), slope, case.rate), case.layouts[2])
    dz_prev = poisoned((m, k), variant.compute, case.output_layout)
    operands = {"dz": dz, "w": w, "y": y, "dz_prev": dz_prev, "activation": case.activation}
    operands |= slope_operands(case.activation, slope, variant.real)
    if case.activation in c.NEEDS_Z:
        operands["z"] = z
    dslope = poisoned(1, variant.real) if case.activation == "prelu" else None
    if dslope is not None:
        operands["dslope"] = dslope
    counters = counters_of(batch_index=5)
    if keep is not None:
        operands |= {"dropout": case.dropout, "counters": counters} | kept(variant, keep)
    run = variant.bind("grad_input", **operands)
    source = exact(z)
    if case.activation not in c.NEEDS_Z:
        source = before_activation(case.activation, exact(y) * (1.0 - case.rate), slope)
    for _ in range(2):
        run()
        check_grad_input(variant, dz_prev, dz, w, source, case.activation, slope, keep, case.rate, dslope)


# One layer of a grouped call; ``frozen`` names the tensors that are not trained.
GradWeightLayer = namedtuple("GradWeightLayer", "k n layouts output_layout frozen")


@st.composite
def grad_weight_layers(draw, device):
    layouts, output_layout = draw(placements(device, 2))
    frozen = draw(st.sampled_from([frozenset(), frozenset(), frozenset("w"), frozenset("b"), frozenset("wb")]))
    return GradWeightLayer(draw(sizes(device)), draw(sizes(device)), layouts, output_layout, frozen)


def layer_operands(values, layer, m, rows, counters):
    """dz and x of one layer, by row where ``rows`` are given, and the same numbers for the oracle."""
    dz = place(values.factors(m, layer.n), layer.layouts[0])
    if rows is None:
        x = place(values.factors(m, layer.k), layer.layouts[1])
        return {"dz": dz, "x": x}, exact(dz), exact(x)
    operands, batch = picked_input(values, rows, 23, layer.k, layer.layouts[1], counters)
    return {"dz": dz} | operands, exact(dz), exact(batch)


@contract_test(
    layers=lambda device: st.lists(grad_weight_layers(device), min_size=1, max_size=3),
    m=sizes,
    by_row=st.booleans(),
    accumulate=st.sampled_from((1, 1, 2, 3)),
    slope_count=st.integers(0, 2),
    wants_norm=st.booleans(),
    variant=variants,
    seed=seeds,
)
def test_grad_weight(layers, m, by_row, accumulate, slope_count, wants_norm, variant, seed):
    values, u = Values(seed, variant), variant.unit
    rows = padded_rows(values.rng, max(m - 2, 0), m, 23) if by_row else None
    operands, cases, counters = [], [], counters_of()
    for index, layer in enumerate(layers):
        inputs, dz, x = layer_operands(values, layer, m, rows if index == 0 else None, counters)
        dw, db = (
            None if name in layer.frozen else poisoned(shape, variant.real, layer.output_layout)
            for name, shape in (("w", (layer.n, layer.k)), ("b", layer.n))
        )
        operands.append({**inputs, "dw": dw, "db": db})
        cases.append((dz, x, dw, db))
    slopes = [{"dslope": values.normal(1), "grad": poisoned(1, variant.real)} for _ in range(slope_count)]
    rule = c.UpdateRule("sgd", accumulate=accumulate)
    norm = {"norm": poisoned(1, np.float64)} if wants_norm and variant.traits.norms_gradients else {}
    run = variant.bind("grad_weight", layers=operands, slopes=slopes, **norm, rule=rule, counters=counters)
    outputs = [out for *_, dw, db in cases for out in (dw, db) if out is not None]
    outputs += [slope["grad"] for slope in slopes]
    for batch_index in range(2 * accumulate):
        counters[c.BATCH_INDEX] = batch_index
        run()
        if norm:
            squares = np.concatenate([[0.0], *(np.square(exact(out)).ravel() for out in outputs)])
            length = np.sqrt(squares.sum())
            assert_within(norm["norm"], [length], growth(squares.size - 1) * u * length)
        sums = batch_index % accumulate + 1
        for case in cases:
            check_grad_weight(variant, *case, batches=sums)
        for slope in slopes:
            total = sums * exact(slope["dslope"])
            assert_within(slope["grad"], total, bound(m * sums, np.abs(total), u, output=total, ulps=sums))


@contract_test(
    m=sizes, n=lambda device: sizes(device, 1), k=lambda device: sizes(device, 1), parts=st.integers(2, 5),
    variant=variants, by_row=st.booleans(), placed=lambda device: placements(device, 2), seed=seeds,
)  # fmt: skip
def test_gradients_of_a_batch_in_parts(m, n, k, parts, variant, by_row, placed, seed):
    """Each part's sums lie behind those of the part before; a part may be empty."""
    if not variant.traits.split_rows:
        return
    values, (layouts, _) = Values(seed, variant), placed
    layer = GradWeightLayer(k, n, layouts, "plain", frozenset())
    rows, counters = padded_rows(values.rng, max(m - 2, 0), m, 23) if by_row else None, counters_of()
    inputs, dz, x = layer_operands(values, layer, m, rows, counters)
    # one arena a part: dw with the pitch of the engine's matrices, then db, then the gradient of a slope
    pitch = -(-k // ROW_MULTIPLE) * ROW_MULTIPLE
    weights, biases = slice(0, n * pitch), slice(n * pitch, n * pitch + n)
    place_of_slope = biases.stop + -n % ROW_MULTIPLE
    room = place_of_slope + 64
    arena = np.full(parts * room, np.nan, variant.real)
    arenas = arena.reshape(parts, room)
    arenas[:, weights].reshape(parts, n, pitch)[:, :, k:] = 0.0
    gradients = {"dw": arena[weights].reshape(n, pitch)[:, :k], "db": arena[biases]}
    slope = {"dslope": values.normal(1), "grad": arena[place_of_slope : place_of_slope + 1]}
    split = {"rule": c.UpdateRule("sgd"), "counters": counters, "parts": parts, "part": room}
    variant.bind("grad_weight", writes=[arena], layers=[inputs | gradients], slopes=[slope], **split)()
    for found, expected, magnitude in (
        (arenas[:, weights].reshape(parts, n, pitch)[:, :, :k], dz.T @ x, np.abs(dz).T @ np.abs(x)),
        (arenas[:, biases], dz.sum(axis=0), np.abs(dz).sum(axis=0)),
    ):
        limit = bound(m, magnitude, variant.unit, output=magnitude, ulps=1, products=variant.products)
        assert_within(exact(found).sum(axis=0), expected, limit)
    assert arenas[:, place_of_slope].sum() == slope["dslope"][0]
    others = np.ones(room, np.bool_)
    others[weights] = others[biases] = others[place_of_slope] = False
    np.testing.assert_array_equal(np.isnan(arenas[:, others]), True)


@pytest.mark.parametrize("activation", c.ACTIVATIONS)
@pytest.mark.parametrize("direction", ["tall", "wide"])
@pytest.mark.parametrize("variant", VARIANT_PARAMETERS)
def test_layers_of_many_blocks(variant, activation, direction):
    """More elements than a pass over them takes at a time, in rows and in columns."""
    values, (m, k) = Values(9, variant), variant.device.blocks[direction == "wide"]
    slope = rounded_slope(activation, 0.3, variant.real) if activation in (*SLOPED, "prelu") else 0.0
    slope_given = slope_operands(activation, slope, variant.real)
    x, w, b = values.factors(m, 4), values.factors(k, 4), values.normal(k)
    y = poisoned((m, k), variant.compute)
    variant.bind("linear", x=x, w=w, b=b, y=y, activation=activation, **slope_given)()
    check_linear(variant, y, x, w, b, activation, slope)
    dz, w, z = values.factors(m, 5), values.factors(5, k), values.factors(m, k)
    dz_prev = poisoned((m, k), variant.compute)
    operands = {"dz": dz, "w": w, "dz_prev": dz_prev, "activation": activation, **slope_given}
    y = variant.rounded(reference.activation(activation, exact(z), slope))
    operands["y"] = possible(variant, activation, y, slope, 0.0)
    source = exact(z) if activation in c.NEEDS_Z else before_activation(activation, exact(operands["y"]), slope)
    operands |= {"z": z} if activation in c.NEEDS_Z else {}
    dslope = poisoned(1, variant.real) if activation == "prelu" else None
    variant.bind("grad_input", **operands, dslope=dslope)()
    check_grad_input(variant, dz_prev, dz, w, source, activation, slope, dslope=dslope)


# Layouts by the operand's place: each operand different from the others; or all but one in the backend's own layout,
# and that one with gaps of the same width, which hold no data.
WAYS = [tuple(STRIDED[(turn + place) % len(STRIDED)] for place in range(4)) for turn in range(len(STRIDED))]
WAYS += [tuple("gapped" if place == turn else "owned" for place in range(4)) for turn in range(4)]


@pytest.mark.parametrize("ways", WAYS, ids=" ".join)
@pytest.mark.parametrize("variant", [v for v in VARIANT_PARAMETERS if not v.values[0].device.on_host])
def test_every_operand_may_lie_in_its_own_way(variant, ways):
    """All are longer than a tile or a block, in every direction."""
    values, (m, k, n) = Values(10, variant), (35, 67, 37)
    arrays = values.factors(m, k), values.factors(n, k), values.normal(n)
    x, w, b = map(place, arrays, ways[:3])
    y = poisoned((m, n), variant.compute, ways[3])
    variant.bind("linear", x=x, w=w, b=b, y=y, activation="tanh")()
    check_linear(variant, y, x, w, b, "tanh")

    arrays = values.factors(m, n), values.factors(n, k), values.factors(m, k)
    dz, w, z = map(place, arrays, ways[:3])
    dz_prev = poisoned((m, k), variant.compute, ways[3])
    variant.bind("grad_input", dz=dz, w=w, y=z, z=z, dz_prev=dz_prev, activation="silu")()
    check_grad_input(variant, dz_prev, dz, w, z, "silu")

    x, dw, db = place(z, ways[1]), poisoned((n, k), variant.real, ways[2]), poisoned(n, variant.real, ways[3])
    layers = [{"dz": dz, "x": x, "dw": dw, "db": db}]
    variant.bind("grad_weight", layers=layers, rule=c.UpdateRule("sgd"), counters=counters_of())()
    check_grad_weight(variant, dz, x, dw, db)


@pytest.mark.parametrize("variant", [p for p in VARIANT_PARAMETERS if p.values[0].precision in ("fp32", "fp64")])
def test_the_tail_of_softplus_keeps_its_leading_digits(variant):
    """Of 1 + exp(z) as it is rounded nothing would be left, and no gradient."""
    x = np.arange(-60.0, 3.0).astype(variant.real)[:, None]
    one, y, dz_prev = np.ones((1, 1), variant.real), poisoned(x.shape, variant.real), poisoned(x.shape, variant.real)
    variant.bind("linear", x=x, w=one, b=np.zeros(1, variant.real), y=y, activation="softplus")()
    # an exponential's error may grow with its argument
    budget = 2.0 * variant.unit * (np.abs(exact(x)) + 12.0)
    wanted = reference.activation("softplus", exact(x))
    assert_within(y, wanted, budget * wanted)
    operands = {"dz": np.ones_like(x), "w": one, "y": y, "dz_prev": dz_prev}
    variant.bind("grad_input", **operands, activation="softplus")()
    wanted = reference.activation_grad("softplus", exact(x))
    assert_within(dz_prev, wanted, budget * wanted)


def test_an_operand_that_overflows_in_its_conversion_is_no_warning():
    y, one = np.zeros((1, 1), np.float32), np.ones((1, 1), np.float32)
    huge = np.full((1, 1), 1e300)
    backend("numpy", None, "fp32").bind("linear", x=huge, w=one, b=one[0], y=y, activation="identity")()
    assert y == np.inf
