"""The optimizers, the clock and the loss scale of every backend against the oracle."""

import numpy as np
import pytest
from calls import RATE, RULES, Clock, counters_of, padded_rows, picked_input, state_arrays, update_arena
from devices import VARIANT_PARAMETERS, devices_with, variants_with
from hypothesis import strategies as st
from memory import Values, exact, place, poisoned
from strategies import contract_test, placements, seeds, sizes, variants
from tolerance import assert_updated, assert_within, bound, growth, update_bound

from fusemlp_kernels import contract as c
from fusemlp_kernels import reference
from fusemlp_kernels.errors import ArgumentError
from make import assert_same

ALIGNMENT_BYTES = 256
FUSED = "grad_weight_update"


@st.composite
def update_rules(draw):
    kind = draw(st.sampled_from(("sgd", "adam")))
    momentum = draw(st.sampled_from((0.0, 0.5, 0.9))) if kind == "sgd" else 0.0
    betas = draw(st.sampled_from(((0.9, 0.999), (0.5, 0.9), (0.0, 0.0))))
    return c.UpdateRule(
        kind,
        momentum=momentum,
        nesterov=bool(momentum) and draw(st.booleans()),
        beta1=betas[0],
        beta2=betas[1],
        eps=draw(st.sampled_from((1e-8, 1e-3))),
        decoupled=draw(st.booleans()),
        convention=draw(st.sampled_from(("torch", "scikit-learn"))),
        ema=draw(st.sampled_from((0.0, 0.5, 0.999))),
    )


tensor_rules = st.builds(
    c.TensorRule, st.sampled_from((1.0, 1.0, 0.0, 0.5, 10.0)), st.sampled_from((0.0, 0.0, 0.01, 1.0))
)


def learning_rates(least):
    """Those of a table; ``least``: how many it has at least."""
    return st.lists(st.just(0.0) | st.floats(1e-9, 0.1), min_size=least, max_size=5)


rate_scales = st.sampled_from((1.0, 0.1))
counts = st.sampled_from((0, 1, 7, 1000))


@contract_test(
    variant=variants,
    rule=update_rules(),
    accumulate=st.integers(1, 4),
    updates=counts,
    rates=learning_rates(1),
    ahead=st.integers(0, 4),
    scale=rate_scales,
    walk=st.sampled_from((None, (0, 10, 4), (4, 8, 4), (0, 3, 5))),
)
def test_advance(variant, rule, accumulate, updates, rates, ahead, scale, walk):
    """``ahead``: how many updates were made since the table was filled; it may end before the next."""
    rule = c.UpdateRule(**{**vars(rule), "accumulate": accumulate})
    clock = Clock(rule, updates * accumulate, updates, scale, rates, max(0, updates - ahead))
    if walk is not None:
        clock.walk = walk
        clock.counters[[c.ROW_OFFSET, c.ROW_TOTAL, c.ROW_STEP]] = walk
    run = variant.bind("advance", **clock.operands)
    for _ in range(2 * accumulate + 1):
        run()
        clock.check_after_a_batch()


def arena_tensors(device):
    """Each tensor's size, its rule (None: frozen), and how much spare room there is behind it."""
    tensor = st.tuples(sizes(device, 1), st.one_of(st.none(), tensor_rules), st.integers(0, 1))
    return st.lists(tensor, max_size=5)


@contract_test(
    tensors=arena_tensors,
    rule=update_rules(),
    clip_norm=st.sampled_from((None, None, 0.5, 1e4)),
    accumulate=st.sampled_from((1, 1, 2, 3)),
    updates=counts,
    rates=learning_rates(3),
    rate_scale=rate_scales,
    norm_given=st.booleans(),
    variant=variants,
    seed=seeds,
)
def test_update(tensors, rule, clip_norm, accumulate, updates, rates, rate_scale, norm_given, variant, seed):
    """Tensors of all kinds in one arena; those without a rule are frozen, and their gradient is zero."""
    rule = c.UpdateRule(**{**vars(rule), "clip_norm": clip_norm, "accumulate": accumulate})
    values, dtype, u = Values(seed, variant), variant.real, variant.unit
    alignment = ALIGNMENT_BYTES // np.dtype(dtype).itemsize
    offsets, size = [], 0
    for length, _, spare in tensors:
        offsets.append(size)
        size += (-(-length // alignment) + spare) * alignment
    params, trained, segments = np.zeros(size, dtype), np.zeros(size, np.bool_), []
    for (length, tensor, _), offset in zip(tensors, offsets, strict=True):
        params[offset : offset + length] = values.normal(length)
        if tensor is not None:
            segments.append(c.Segment(offset, length, tensor))
            trained[offset : offset + length] = True
    states = tuple(np.where(trained, state, 0).astype(dtype) for state in state_arrays(rule, values, size))
    grads = np.zeros(size, dtype)
    clock = Clock(rule, updates * accumulate, updates, rate_scale, rates)
    operands = {"params": params, "grads": grads, "states": states, "segments": tuple(segments)}
    norm, shadow = np.zeros(1), variant.rounded(params)
    operands |= {"norm": norm} if norm_given and variant.traits.norms_gradients else {}
    operands |= {"shadow": shadow} if variant.output_unit else {}
    run = variant.bind("update", **operands, **clock.operands)
    for _ in range(2 * accumulate):
        grads[...] = np.where(trained, values.normal(size), 0.0)
        before = exact(params), exact(grads), tuple(exact(state) for state in states)
        norm[0] = np.sqrt(np.square(before[1]).sum())
        t, rate = clock.update_count, clock.rate
        run()
        np.testing.assert_array_equal(shadow, variant.rounded(params if variant.output_unit else shadow))
        if not clock.check_after_a_batch():
            np.testing.assert_array_equal(params, before[0])
            continue
        mean = before[1] / accumulate
        factor = reference.clip_factor([mean], clip_norm)
        # the mean is rounded; the norm is a reduction, and its quotient and product are rounded too
        relative = u * ((accumulate > 1) + (growth(size) + 4.0 if clip_norm is not None else 0.0))
        for segment in segments:
            at = slice(segment.offset, segment.offset + segment.size)
            args = before[0][at], factor * mean[at], tuple(state[at] for state in before[2])
            now = params[at], [state[at] for state in states]
            assert_updated(*now, rule, segment.rule, args, t, rate, relative * np.abs(args[1]), u)
        # what is frozen or padding stays as it is
        np.testing.assert_array_equal(params[~trained], before[0][~trained])


@st.composite
def trained_layers(draw, device):
    frozen = draw(st.sampled_from(("", "", "w", "b", "wb")))
    shape = draw(sizes(device)), draw(sizes(device))
    return (*shape, frozen, draw(tensor_rules), draw(tensor_rules), draw(placements(device, 2)))


@contract_test(
    devices_with(FUSED),
    layers=lambda device: st.lists(trained_layers(device), min_size=1, max_size=3),
    m=sizes,
    slope_count=st.integers(0, 2),
    by_row=st.booleans(),
    rule=update_rules(),
    updates=counts,
    rates=learning_rates(3),
    rate_scale=rate_scales,
    variant=variants,
    seed=seeds,
)
def test_grad_weight_update(layers, m, slope_count, by_row, rule, updates, rates, rate_scale, variant, seed):
    values, u = Values(seed, variant), variant.unit
    clock = Clock(rule, updates + 2, updates, rate_scale, rates)
    # (parameter, its states, its rule, its gradient, the error that the gradient may have)
    operands, tensors, shadows = [], [], []
    for index, (n, k, frozen, w_rule, b_rule, (layouts, output_layout)) in enumerate(layers):
        dz, x = place(values.factors(m, n), layouts[0]), place(values.factors(m, k), layouts[1])
        layer = {"dz": dz, "x": x}
        if by_row and index == 0:
            rows = padded_rows(values.rng, max(m - 1, 0), m, max(m, 1))
            picked, x = picked_input(values, rows, max(m, 1), k, layouts[1], clock.counters)
            layer |= picked
        gradients = reference.grad_weight(exact(dz), exact(x))
        magnitudes = reference.grad_weight(np.abs(exact(dz)), np.abs(exact(x)))
        for name, tensor_rule, gradient, magnitude in zip("wb", (w_rule, b_rule), gradients, magnitudes, strict=True):
            if name in frozen:
                layer |= {name: None, f"{name}_state": (), f"{name}_rule": tensor_rule}
                continue
            parameter = place(values.normal(*gradient.shape), output_layout)
            states = tuple(place(s, output_layout) for s in state_arrays(rule, values, *gradient.shape))
            layer |= {name: parameter, f"{name}_state": states, f"{name}_rule": tensor_rule}
            if name == "w" and variant.output_unit:
                layer["w_shadow"] = poisoned(parameter.shape, variant.compute, output_layout)
                shadows.append((layer["w_shadow"], parameter))
            limit = bound(m, magnitude, u, output=gradient, products=variant.products)
            tensors.append((parameter, states, tensor_rule, gradient, limit))
        operands.append(layer)
    slopes = []
    for _ in range(slope_count):
        slope = {"dslope": values.normal(1), "param": values.normal(1), "state": state_arrays(rule, values, 1)}
        slopes.append(slope | {"rule": c.TensorRule(0.5, 0.01)})
        tensors.append((slope["param"], slope["state"], slopes[-1]["rule"], exact(slope["dslope"]), 0.0))
    run = variant.bind("grad_weight_update", layers=operands, slopes=slopes, **clock.operands)
    for _ in range(2):
        before = [(exact(p), tuple(exact(s) for s in states)) for p, states, *_ in tensors]
        t, rate = clock.update_count, clock.rate
        run()
        assert clock.check_after_a_batch()
        for shadow, parameter in shadows:
            np.testing.assert_array_equal(shadow, variant.rounded(parameter))
        for (parameter, states, tensor_rule, gradient, g_bound), (p, s) in zip(tensors, before, strict=True):
            assert_updated(parameter, states, rule, tensor_rule, (p, gradient, s), t, rate, g_bound, u)


@pytest.mark.parametrize("change", [{"clip_norm": 1.0}, {"accumulate": 2}])
@pytest.mark.parametrize("variant", variants_with(FUSED))
def test_a_fused_update_neither_clips_nor_accumulates(variant, change):
    rule = c.UpdateRule("sgd", **change)
    with pytest.raises(ArgumentError, match="use grad_weight and update"):
        variant.bind("grad_weight_update", layers=[], **Clock(rule).operands)


@pytest.mark.parametrize("parts", [2, 5])
@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
@pytest.mark.parametrize("variant", [v for v in VARIANT_PARAMETERS if v.values[0].traits.split_rows])
def test_update_sums_the_parts_of_a_gradient(variant, rule, parts):
    values, u, room, size = Values(13, variant), variant.unit, 128, 100
    params, states = values.normal(size), state_arrays(rule, values, size)
    # The memory after a part's elements belongs to no tensor.
    arena = np.full((parts, room), np.nan, variant.real)
    arena[:, :size] = values.normal(parts, size)
    clock, tensor = Clock(rule, 3, 3, 1.0), c.TensorRule(0.5, 0.01)
    given = exact(params), exact(arena[:, :size]).sum(axis=0), tuple(exact(s) for s in states)
    operands = {"params": params, "grads": arena.reshape(-1)[:size], "states": states, "parts": parts, "part": room}
    variant.bind("update", **operands, segments=(c.Segment(0, size, tensor),), **clock.operands)()
    limit = bound(parts, np.abs(exact(arena[:, :size])).sum(axis=0), u)
    assert_updated(params, states, rule, tensor, given, 3, clock.rate, limit, u)


@pytest.mark.parametrize("convention", ["torch", "scikit-learn"])
@pytest.mark.parametrize("variant", VARIANT_PARAMETERS)
def test_eps_lies_where_the_convention_has_it(variant, convention):
    """It tells where gradients are small, of which the moments know nothing yet."""
    rule = c.UpdateRule("adam", eps=1e-3, convention=convention)
    params, grads = np.zeros(50, variant.real), Values(16, variant).normal(50, scale=1e-4)
    given = exact(params), exact(grads), (np.zeros(50), np.zeros(50)), 0, RATE
    update_arena(variant, rule, params, grads)
    limits = update_bound(rule, c.TensorRule(), *given, u=variant.unit)
    assert_within(params, reference.update(rule, c.TensorRule(), *given)[0], limits[0])


@pytest.mark.parametrize("variant", [v for v in VARIANT_PARAMETERS if not v.values[0].device.on_host])
def test_adam_without_eps_leaves_zero_gradients_alone(variant):
    """Among them the padding: 0 / 0 would be NaN there."""
    params, grads = np.ones(100, variant.real), np.zeros(100, variant.real)
    grads[:3] = 1.0
    update_arena(variant, c.UpdateRule("adam", eps=0.0), params, grads)
    np.testing.assert_array_equal(params[3:], 1.0)
    np.testing.assert_allclose(params[:3], 0.9, rtol=8 * variant.unit)


@pytest.mark.parametrize("variant", VARIANT_PARAMETERS)
def test_a_long_arena_is_updated_to_its_last_element(variant):
    """Longer than a block of the sweep, and not a multiple of one."""
    size = (1 << 15) * 2 + 17
    params, grads = np.zeros(size, variant.real), np.arange(size, dtype=variant.real)
    update_arena(variant, c.UpdateRule("sgd"), params, grads, 0.5)
    np.testing.assert_array_equal(params, -0.5 * np.arange(size))


@pytest.mark.parametrize("variant", [v for v in variants_with(FUSED) if v.values[0].real is np.float32])
def test_small_gradients_of_many_rows_are_summed_before_they_meet_the_parameter(variant):
    """A row alone would be lost in the rounding of the parameter; 512 of them are not."""
    dz, x = np.full((512, 3), 2.0**-17, variant.compute), np.ones((512, 2), variant.compute)
    w, b = np.ones((3, 2), np.float32), np.ones(3, np.float32)
    layer = {"dz": dz, "x": x, "w": w, "b": b, "w_state": (), "b_state": ()}
    layer |= {"w_rule": c.TensorRule(), "b_rule": c.TensorRule()}
    clock = Clock(c.UpdateRule("sgd"), rates=[2.0**-10])
    variant.bind("grad_weight_update", layers=[layer], **clock.operands)()
    np.testing.assert_array_equal(w, 1.0 - 2.0**-18)
    np.testing.assert_array_equal(b, 1.0 - 2.0**-18)


in_two_bytes = pytest.mark.parametrize("variant", [p for p in VARIANT_PARAMETERS if p.values[0].output_unit])
SIZE = 300


class Arena:
    """One tensor of an arena under loss scaling, in the middle of training."""

    def __init__(self, variant, rule, scale):
        values = Values(3, variant)
        self.rule, self.clock = rule, Clock(rule, 4 * rule.accumulate, 4, 1.0)
        self.clock.hyper[c.LOSS_SCALE] = scale
        self.params, self.grads = values.normal(SIZE), values.normal(SIZE)
        self.states = tuple(np.abs(values.normal(SIZE)) for _ in range(rule.state_count))
        self.norm, self.shadow = np.zeros(1), variant.rounded(self.params)
        operands = {name: getattr(self, name) for name in ("params", "grads", "states", "norm", "shadow")}
        segments = (c.Segment(0, SIZE, c.TensorRule(0.5, 0.01)),)
        self.run = variant.bind("update", **operands, segments=segments, scaled=True, **self.clock.operands)

    @property
    def values(self):
        return [np.array(a) for a in (self.params, self.shadow, *self.states)]


@pytest.mark.parametrize("clip_norm", [None, 0.5])
@pytest.mark.parametrize("accumulate", [1, 3])
@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
@in_two_bytes
def test_scaled_gradients_give_the_update_of_the_unscaled(variant, rule, accumulate, clip_norm):
    rule, scale = c.UpdateRule(**{**vars(rule), "accumulate": accumulate, "clip_norm": clip_norm}), 1024.0
    arena = Arena(variant, rule, scale)
    mean = exact(arena.grads) / accumulate
    arena.clock.counters[c.BATCH_INDEX] += accumulate - 1
    arena.grads *= scale
    arena.norm[0] = np.sqrt(np.square(exact(arena.grads)).sum())
    before = exact(arena.params), tuple(exact(s) for s in arena.states)
    arena.run()
    gradient = reference.clip_factor([mean], clip_norm) * mean
    tensor, rate = c.TensorRule(0.5, 0.01), arena.clock.rate
    # the factors 1 / accumulate, 1 / scale and the clipping's are rounded into one, and the product with it
    given, limit = (before[0], gradient, before[1]), 4.0 * variant.unit * np.abs(gradient)
    assert_updated(arena.params, arena.states, rule, tensor, given, 4, rate, limit)
    np.testing.assert_array_equal(arena.shadow, variant.rounded(arena.params))
    assert arena.clock.hyper[c.LOSS_SCALE] == scale and arena.clock.hyper[c.GOOD_UPDATES] == 1.0


@pytest.mark.parametrize("norm", [np.inf, np.nan])
@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
@in_two_bytes
def test_a_batch_that_overflowed_changes_nothing_but_the_scale(variant, rule, norm):
    arena = Arena(variant, rule, 1024.0)
    arena.clock.hyper[c.GOOD_UPDATES] = 17.0
    arena.norm[0], arena.grads[5] = norm, norm
    before, hyper = arena.values, arena.clock.hyper.copy()
    for skipped in (1, 2):
        arena.run()
        assert_same(arena.values, before)
        wanted = counters_of()
        wanted[[c.BATCH_INDEX, c.UPDATE_COUNT, c.SKIPPED, c.SKIPPED_IN_A_ROW]] = 4 + skipped, 4, skipped, skipped
        np.testing.assert_array_equal(arena.clock.counters, wanted)
        hyper[[c.LOSS_SCALE, c.GOOD_UPDATES]] = 1024.0 / 2**skipped, 0.0
        np.testing.assert_array_equal(arena.clock.hyper, hyper)
    # and the next one that does not overflow is an update like any other
    arena.norm[0], arena.grads[:] = 1.0, 0.01
    arena.run()
    assert arena.clock.counters[c.SKIPPED] == 2 and arena.clock.counters[c.SKIPPED_IN_A_ROW] == 0
    assert arena.clock.counters[c.UPDATE_COUNT] == 5 and (arena.params != before[0]).any()


@in_two_bytes
def test_a_batch_within_an_accumulation_neither_updates_nor_skips(variant):
    arena = Arena(variant, c.UpdateRule(**{**vars(RULES["adam"]), "accumulate": 2}), 8.0)
    arena.norm[0] = np.inf
    before = arena.values
    arena.run()
    assert_same(arena.values, before)
    assert arena.clock.counters[c.SKIPPED] == 0 and arena.clock.hyper[c.LOSS_SCALE] == 8.0
    arena.run()
    assert arena.clock.counters[c.SKIPPED] == 1 and arena.clock.hyper[c.LOSS_SCALE] == 4.0


@in_two_bytes
def test_the_scale_doubles_after_enough_updates(variant):
    arena = Arena(variant, RULES["sgd"], 4.0)
    arena.norm[0] = 1.0
    arena.clock.hyper[c.GOOD_UPDATES] = c.GROWTH_INTERVAL - 2.0
    arena.run()
    assert arena.clock.hyper[c.LOSS_SCALE] == 4.0 and arena.clock.hyper[c.GOOD_UPDATES] == c.GROWTH_INTERVAL - 1.0
    arena.run()
    assert arena.clock.hyper[c.LOSS_SCALE] == 8.0 and arena.clock.hyper[c.GOOD_UPDATES] == 0.0


@pytest.mark.parametrize("value", [np.inf, -np.inf, np.nan])
@in_two_bytes
def test_the_norm_of_gradients_says_that_one_overflowed(variant, value):
    dz, x = np.ones((5, 3), variant.compute), np.ones((5, 4), variant.compute)
    dz[2, 1] = value
    norm, counters = poisoned(1, np.float64), counters_of()
    layer = {"dz": dz, "x": x, "dw": poisoned((3, 4), variant.real), "db": poisoned(3, variant.real)}
    variant.bind("grad_weight", layers=[layer], rule=RULES["sgd"], counters=counters, norm=norm)()
    assert not np.isfinite(norm[0])
    assert not np.isfinite(layer["dw"][1]).any() and np.isfinite(layer["dw"][[0, 2]]).all()
