"""The tests' own tools: placed memory and its watch, the comparator, bounds that refuse what is wrong by little."""

from contextlib import nullcontext

import numpy as np
import pytest
import torch_oracle as oracle
from calls import RULES, Clock, run_loss, state_arrays
from devices import VARIANT_PARAMETERS
from memory import Memory, Values, Watch, base_of, elements_of, exact, place
from tolerance import assert_updated, assert_within, linear_bound, loss_grad_bound

from fusemlp_kernels import reference
from fusemlp_kernels.contract import LossSpec, Segment, TensorRule, UpdateRule

LAYOUTS = ("plain", "transposed", "stepped", "reversed", "offset", "pitched", "gapped", "owned")


@pytest.mark.parametrize("shape", [(3, 5), (3, 8), (1, 1), (0, 4), (4, 0), (7,), (0,)])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_placed_array_holds_its_values_between_guard_bands(layout, shape):
    values = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    array = place(values, layout)
    base = base_of(array)
    np.testing.assert_array_equal(array, values)
    assert isinstance(base, Memory) and (base.owned is not None) == (layout == "owned")
    at = elements_of(array, base)
    np.testing.assert_array_equal(np.array(base)[at], values)
    others = np.delete(np.array(base), at.ravel())
    padding = -shape[-1] % 8 * shape[0] if layout == "owned" and len(shape) == 2 else 0
    assert np.isnan(others).sum() == others.size - padding and (others == 0).sum() == padding
    if at.size:
        assert at.min() >= 100 and at.max() < base.size - 100


@pytest.mark.parametrize("layout", LAYOUTS)
def test_whatever_changes_outside_of_the_outputs_is_seen(layout):
    x, y = place(np.ones((3, 5), np.float32), layout), place(np.ones((3, 5), np.float32), layout)
    counters = np.zeros(3, np.int64)
    watch = Watch([x, y, counters], [y])
    watch.remember()
    y[...] = 2.0
    watch.check()
    base = np.array(base_of(y))
    outside = np.setdiff1d(np.arange(base.size), elements_of(y, base_of(y)).ravel())
    # Another NaN pattern is a change too.
    for at in (outside[0], outside[len(outside) // 2], outside[-1]):
        watch.remember()
        base_of(y).view(np.ndarray).view(np.uint32)[at] ^= 1
        with pytest.raises(AssertionError, match="1 elements changed outside"):
            watch.check()
    for array in (x, counters):
        watch.remember()
        array[...] = 3
        with pytest.raises(AssertionError, match="elements changed outside"):
            watch.check()


def test_the_comparator_refuses_nan_and_shapes():
    for actual, expected, limit in [
        (oracle.NAN, 1.0, 1.0),
        (1.0, oracle.NAN, 1.0),
        (1.0, 2.0, oracle.NAN),
        ([1.0], 1.0, 1.0),
    ]:
        with pytest.raises(AssertionError):
            assert_within(actual, expected, limit)
    assert_within([oracle.NAN, np.inf], [oracle.NAN, np.inf], 0.0)


on_every_device = pytest.mark.parametrize(
    "variant", [parameter for parameter in VARIANT_PARAMETERS if parameter.values[0].precision == "fp32"]
)


@pytest.mark.parametrize("k", [1, 17, 128, 784])
@on_every_device
def test_the_bound_tells_tf32_from_fp32(variant, k):
    """A bound that lets rounded inputs pass would prove nothing; random signs, so that errors do not add up."""
    values = Values(k, variant)
    x, w, b = values.normal(64, k), values.normal(48, k), np.zeros(48, np.float32)
    y = np.zeros((64, 48), np.float32)
    variant.bind("linear", x=tf32(x), w=tf32(w), b=b, y=y, activation="identity")()
    _, limit = linear_bound(exact(x), exact(w), exact(b), products=variant.products)
    expected = reference.linear(exact(x), exact(w), exact(b))
    with pytest.raises(AssertionError, match="out of bound"):
        assert_within(y, expected, limit)
    variant.bind("linear", x=x, w=w, b=b, y=y, activation="identity")()
    assert_within(y, expected, limit)


def tf32(x):
    """x rounded to the ten bits of mantissa that TF32 keeps."""
    bits = x.view(np.uint32)
    return ((bits + np.uint32(0x1000)) & np.uint32(0xFFFFE000)).view(np.float32)


@on_every_device
def test_the_bound_tells_the_options_of_a_loss_apart(variant):
    values = Values(6, variant)
    z, target, weight = values.normal(32, 10), values.integers(10, 32), values.uniform(0.5, 1.5, 32)
    spec = LossSpec("cross_entropy", label_smoothing=0.1)
    loss, dz = reference.loss_grad(spec, exact(z), target, exact(weight))
    limits = loss_grad_bound(spec, exact(z), target, exact(weight))
    for other, operands in (
        (LossSpec("cross_entropy", label_smoothing=0.101), {"weight": weight}),
        (spec, {"weight": weight * np.float32(1 + 1e-3) ** np.arange(32, dtype=np.float32)}),
        (LossSpec("cross_entropy", label_smoothing=0.1, reduction="sum"), {"weight": weight}),
        (spec, {}),
    ):
        wrong_loss, wrong_dz, _ = run_loss(variant, other, z, target, **operands)
        with pytest.raises(AssertionError, match="out of bound"):
            assert_within(wrong_loss, loss, limits[0])
        with pytest.raises(AssertionError, match="out of bound"):
            assert_within(wrong_dz, dz, limits[1])
    right_loss, right_dz, _ = run_loss(variant, spec, z, target, weight=weight)
    assert_within(right_loss, loss, limits[0])
    assert_within(right_dz, dz, limits[1])


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
@on_every_device
def test_the_bound_tells_an_optimizer_from_its_neighbours(variant, rule):
    """A wrong rate, momentum, convention, beta, decay or average is further away than rounding."""
    values = Values(8, variant)
    p, g, t = values.normal(200), values.normal(200), 3
    tensor, wrong_tensor = TensorRule(1.0, 0.01), TensorRule(1.0, 0.0101)
    wrong_rules = {
        "sgd": {"momentum": 0.0},
        "momentum": {"momentum": 0.901},
        "nesterov": {"nesterov": False},
        "scikit-learn's": {"convention": "torch"},
        "adam": {"beta2": 0.9991},
        "sgd, average": {"ema": 0.901},
        "adam, average": {"ema": 0.901},
    }
    name = next(key for key, value in RULES.items() if value is rule)
    wrong_rule = UpdateRule(**{**vars(rule), **wrong_rules[name]})
    state = state_arrays(rule, values, 200)
    args = exact(p), exact(g), tuple(exact(s) for s in state)
    for other, other_tensor, rate in (
        (rule, tensor, 0.1),
        (wrong_rule, tensor, 0.1),
        (rule, wrong_tensor, 0.1),
        (rule, tensor, 0.1001),
    ):
        params, states = p.copy(), tuple(s.copy() for s in state)
        clock = Clock(other, t, t, rates=[rate])
        operands = {"params": params, "grads": g.copy(), "states": states}
        operands["segments"] = (Segment(0, 200, other_tensor),)
        variant.bind("update", **operands, **clock.operands)()

        right = other == rule and other_tensor is tensor and rate == 0.1
        with nullcontext() if right else pytest.raises(AssertionError, match="out of bound"):
            assert_updated(params, states, rule, tensor, args, t, 0.1)
