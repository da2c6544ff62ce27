"""NaN goes through every op of the NumPy backend as NaN, and what is large overflows nowhere."""

from __future__ import annotations

import numpy as np
import pytest
from calls import RULES, Clock, bind, run_loss, slope_operands, update_arena
from strategies import exact
from tolerance import assert_within, loss_grad_bound

from fusemlp_kernels import reference
from fusemlp_kernels.contract import (
    ACTIVATIONS,
    COUNTERS,
    LOSSES,
    Dropout,
    LossSpec,
    ScheduleSpec,
    TensorRule,
    UpdateRule,
)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("rate", [0.0, 0.5])
def test_nan_goes_through_a_layer_and_its_derivative(activation, rate):
    slope = {"leaky_relu": 0.1, "prelu": 0.2}.get(activation, 0.0)
    slopes_given = slope_operands(activation, slope, np.float32)
    x, w, b = np.ones((4, 3), np.float32), np.ones((20, 3), np.float32), np.ones(20, np.float32)
    x[1, 1], w[2, 0], b[5] = np.nan, np.nan, np.nan
    y, z = np.zeros((4, 20), np.float32), np.zeros((4, 20), np.float32)
    keep, counters = np.zeros((4, 20), np.bool_), np.zeros(COUNTERS, np.int64)
    dropped = {"dropout": Dropout(rate, 0, 7), "counters": counters, "keep": keep} if rate else {}
    bind("fp32", "linear", x=x, w=w, b=b, y=y, z=z, activation=activation, **slopes_given, **dropped)()
    wanted = np.zeros((4, 20), np.bool_)
    wanted[1], wanted[:, 2], wanted[:, 5] = True, True, True
    # a dropped element is zero, whatever it was
    np.testing.assert_array_equal(np.isnan(y), wanted & keep if rate else wanted)

    dz, w_next, dz_prev = np.ones((4, 2), np.float32), np.ones((2, 20), np.float32), np.zeros((4, 20), np.float32)
    dz[3, 0] = np.nan
    dslope = {"dslope": np.zeros(1, np.float32)} if activation == "prelu" else {}
    operands = {"dz": dz, "w": w_next, "y": y, "z": z, "dz_prev": dz_prev, "activation": activation}
    bind("fp32", "grad_input", **operands, **slopes_given, **dslope, **dropped)()
    kept = keep if rate else np.ones_like(wanted)
    factor = reference.activation_grad(activation, np.where(wanted, np.nan, 1.0), slope)
    through = wanted & kept & np.isnan(factor)
    through[3] |= kept[3]
    np.testing.assert_array_equal(np.isnan(dz_prev)[kept], through[kept])
    if dslope:
        assert np.isnan(dslope["dslope"])


@pytest.mark.parametrize("kind", LOSSES)
@pytest.mark.parametrize("options", ["plain", "weighted", "soft"])
def test_nan_goes_through_every_loss(kind, options):
    z = np.random.default_rng(3).standard_normal((4, 3))
    z[2, 1] = np.nan
    soft = options == "soft" or kind != "cross_entropy"
    target = np.full((4, 3), 0.25) if soft else np.array([0, 2, 1, 0])
    weight = np.array([1.0, 2.0, 0.5, 1.0]) if options == "weighted" else None
    spec = LossSpec(kind, soft=soft and kind == "cross_entropy", accuracy=True)
    loss, dz, _ = run_loss(spec, z, target, weight=weight)
    assert np.isnan(loss)
    np.testing.assert_array_equal(np.isnan(dz), np.isnan(reference.loss_grad(spec, z, target, weight)[1]))
    assert np.isnan(dz[2, 1]) and not np.isnan(dz[[0, 1, 3]]).any()


@pytest.mark.parametrize("kind", LOSSES)
def test_a_weight_that_is_nan_makes_the_loss_nan(kind):
    z, weight = np.zeros((2, 3)), np.array([1.0, np.nan])
    target = np.array([0, 1]) if kind == "cross_entropy" else np.zeros((2, 3))
    loss, _, _ = run_loss(LossSpec(kind), z, target, weight=weight)
    assert np.isnan(loss)


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
@pytest.mark.parametrize("clip_norm", [None, 1.0])
def test_nan_goes_through_an_update(rule, clip_norm):
    params, grads = np.ones(100, np.float32), np.ones(100, np.float32)
    grads[7] = np.nan
    update_arena(UpdateRule(**{**vars(rule), "clip_norm": clip_norm}), params, grads)
    # the norm of a gradient with a NaN in it is NaN, and scales them all
    wanted = np.arange(100) == 7 if clip_norm is None else np.ones(100, np.bool_)
    np.testing.assert_array_equal(np.isnan(params), wanted)


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
def test_nan_goes_through_a_fused_update(rule):
    dz, x = np.ones((5, 3), np.float32), np.ones((5, 4), np.float32)
    dz[2, 1] = np.nan
    w, b = np.ones((3, 4), np.float32), np.ones(3, np.float32)
    w_state, b_state = (tuple(np.zeros_like(p) for _ in range(rule.state_count)) for p in (w, b))
    layer = {"dz": dz, "x": x, "w": w, "b": b, "w_state": w_state, "b_state": b_state}
    layer |= {"w_rule": TensorRule(), "b_rule": TensorRule()}
    clock = Clock(rule, 0, 0, 1.0)
    bind("fp32", "grad_weight_update", layers=[layer], rule=rule, hyper=clock.hyper, counters=clock.counters)()
    np.testing.assert_array_equal(np.isnan(b), [False, True, False])
    np.testing.assert_array_equal(np.isnan(w), np.isnan(b)[:, None] & np.ones((3, 4), np.bool_))


@pytest.mark.parametrize("activation", ["sigmoid", "tanh", "gelu", "silu"])
def test_saturated_activations_neither_overflow_nor_lose_their_limit(activation):
    x = np.array([[-1e4], [-1e3], [1e3], [1e4]], np.float32)
    w, b, y = np.ones((1, 1), np.float32), np.zeros(1, np.float32), np.zeros((4, 1), np.float32)
    bind("fp32", "linear", x=x, w=w, b=b, y=y, activation=activation)()
    assert_within(y, reference.activation(activation, exact(x)), 0.0)


def test_logits_of_any_size_overflow_nowhere():
    z = np.array([[8e4, -8e4, 0.0], [-3e4, 2e4, 1e4]], np.float32)
    for kind in ("cross_entropy", "binary_cross_entropy"):
        target = np.array([1, 1]) if kind == "cross_entropy" else np.array([[0, 1, 0], [0, 1, 1]], np.float32)
        spec = LossSpec(kind)
        loss, dz, _ = run_loss(spec, z, target, "fp32")
        expected = reference.loss_grad(spec, exact(z), target)
        limits = loss_grad_bound(spec, exact(z), target)
        assert_within(loss, expected[0], limits[0])
        assert_within(dz, expected[1], limits[1])


def test_the_norm_of_large_gradients_does_not_overflow():
    params, grads = np.zeros(4, np.float32), np.full(4, 1e30, np.float32)
    update_arena(UpdateRule("sgd", ScheduleSpec("constant", 1.0), clip_norm=1.0), params, grads)
    np.testing.assert_allclose(params, -0.5, rtol=4 * 2.0**-23)
