"""Dynamic loss scaling: gradients that carry the scale, updates that are skipped, a scale that moves."""

import numpy as np
import pytest
from calls import RULES, Clock
from devices import VARIANT_PARAMETERS
from memory import poisoned
from strategies import Values, exact
from tolerance import assert_updated

from fusemlp_kernels import reference
from fusemlp_kernels.contract import (
    BATCH_INDEX,
    COUNTERS,
    GOOD_UPDATES,
    GROWTH_INTERVAL,
    LOSS_SCALE,
    SKIPPED,
    SKIPPED_IN_A_ROW,
    UPDATE_COUNT,
    Segment,
    TensorRule,
    UpdateRule,
)

in_two_bytes = pytest.mark.parametrize("variant", [p for p in VARIANT_PARAMETERS if p.values[0].output_unit])
SIZE = 300


class Arena:
    """One tensor of an arena under loss scaling, in the middle of training."""

    def __init__(self, variant, rule, scale):
        values = Values(3, variant)
        self.rule, self.clock = rule, Clock(rule, 4 * rule.accumulate, 4, 1.0)
        self.clock.hyper[LOSS_SCALE] = scale
        self.params, self.grads = values.normal(SIZE), values.normal(SIZE)
        self.states = tuple(np.abs(values.normal(SIZE)) for _ in range(rule.state_count))
        self.norm, self.shadow = np.zeros(1), variant.rounded(self.params)
        self.run = variant.bind(
            "update",
            params=self.params,
            grads=self.grads,
            states=self.states,
            segments=(Segment(0, SIZE, TensorRule(0.5, 0.01)),),
            norm=self.norm,
            shadow=self.shadow,
            scaled=True,
            **self.clock.operands,
        )

    @property
    def values(self):
        return [np.array(a) for a in (self.params, self.shadow, *self.states)]


@pytest.mark.parametrize("clip_norm", [None, 0.5])
@pytest.mark.parametrize("accumulate", [1, 3])
@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
@in_two_bytes
def test_scaled_gradients_give_the_update_of_the_unscaled(variant, rule, accumulate, clip_norm):
    rule, scale = UpdateRule(**{**vars(rule), "accumulate": accumulate, "clip_norm": clip_norm}), 1024.0
    arena = Arena(variant, rule, scale)
    mean = exact(arena.grads) / accumulate
    arena.clock.counters[BATCH_INDEX] += accumulate - 1
    arena.grads *= scale
    arena.norm[0] = np.sqrt(np.square(exact(arena.grads)).sum())
    before = exact(arena.params), tuple(exact(s) for s in arena.states)
    arena.run()
    gradient = reference.clip_factor([mean], clip_norm) * mean
    tensor, rate = TensorRule(0.5, 0.01), arena.clock.rate
    # the factors 1 / accumulate, 1 / scale and the clipping's are rounded into one, and the product with it
    given, limit = (before[0], gradient, before[1]), 4.0 * variant.unit * np.abs(gradient)
    assert_updated(arena.params, arena.states, rule, tensor, given, 4, rate, limit)
    np.testing.assert_array_equal(arena.shadow, variant.rounded(arena.params))
    assert arena.clock.hyper[LOSS_SCALE] == scale and arena.clock.hyper[GOOD_UPDATES] == 1.0


@pytest.mark.parametrize("norm", [np.inf, np.nan])
@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
@in_two_bytes
def test_a_batch_that_overflowed_changes_nothing_but_the_scale(variant, rule, norm):
    arena = Arena(variant, rule, 1024.0)
    arena.clock.hyper[GOOD_UPDATES] = 17.0
    arena.norm[0], arena.grads[5] = norm, norm
    before, hyper = arena.values, arena.clock.hyper.copy()
    for skipped in (1, 2):
        arena.run()
        for now, then in zip(arena.values, before, strict=True):
            np.testing.assert_array_equal(now, then)
        wanted = np.zeros(COUNTERS, np.int64)
        wanted[[BATCH_INDEX, UPDATE_COUNT, SKIPPED, SKIPPED_IN_A_ROW]] = 4 + skipped, 4, skipped, skipped
        np.testing.assert_array_equal(arena.clock.counters, wanted)
        hyper[[LOSS_SCALE, GOOD_UPDATES]] = 1024.0 / 2**skipped, 0.0
        np.testing.assert_array_equal(arena.clock.hyper, hyper)
    # and the next one that does not overflow is an update like any other
    arena.norm[0], arena.grads[:] = 1.0, 0.01
    arena.run()
    assert arena.clock.counters[SKIPPED] == 2 and arena.clock.counters[SKIPPED_IN_A_ROW] == 0
    assert arena.clock.counters[UPDATE_COUNT] == 5 and (arena.params != before[0]).any()


@in_two_bytes
def test_a_batch_within_an_accumulation_neither_updates_nor_skips(variant):
    arena = Arena(variant, UpdateRule(**{**vars(RULES["adam"]), "accumulate": 2}), 8.0)
    arena.norm[0] = np.inf
    before = arena.values
    arena.run()
    for now, then in zip(arena.values, before, strict=True):
        np.testing.assert_array_equal(now, then)
    assert arena.clock.counters[SKIPPED] == 0 and arena.clock.hyper[LOSS_SCALE] == 8.0
    arena.run()
    assert arena.clock.counters[SKIPPED] == 1 and arena.clock.hyper[LOSS_SCALE] == 4.0


@in_two_bytes
def test_the_scale_doubles_after_enough_updates(variant):
    arena = Arena(variant, RULES["sgd"], 4.0)
    arena.norm[0] = 1.0
    arena.clock.hyper[GOOD_UPDATES] = GROWTH_INTERVAL - 2.0
    arena.run()
    assert arena.clock.hyper[LOSS_SCALE] == 4.0 and arena.clock.hyper[GOOD_UPDATES] == GROWTH_INTERVAL - 1.0
    arena.run()
    assert arena.clock.hyper[LOSS_SCALE] == 8.0 and arena.clock.hyper[GOOD_UPDATES] == 0.0


@pytest.mark.parametrize("value", [np.inf, -np.inf, np.nan])
@in_two_bytes
def test_the_norm_of_gradients_says_that_one_overflowed(variant, value):
    dz, x = np.ones((5, 3), variant.compute), np.ones((5, 4), variant.compute)
    dz[2, 1] = value
    norm, counters = poisoned(1, np.float64), np.zeros(COUNTERS, np.int64)
    layer = {"dz": dz, "x": x, "dw": poisoned((3, 4), variant.real), "db": poisoned(3, variant.real)}
    variant.bind("grad_weight", layers=[layer], rule=RULES["sgd"], counters=counters, norm=norm)()
    assert not np.isfinite(norm[0])
    assert not np.isfinite(layer["dw"][1]).any() and np.isfinite(layer["dw"][[0, 2]]).all()
