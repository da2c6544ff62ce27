"""The error bounds admit correct float32 and refuse lower precision."""

from dataclasses import replace

import numpy as np
import pytest
from tolerance import assert_updated, assert_within, grad_input_bound, loss_grad_bound, update_bound
from torch_oracle import (
    ADAMS,
    CROSS_ENTROPIES,
    ELEMENTWISE,
    NAN,
    SGDS,
    loss_case,
)

from fusemlp_kernels import reference
from fusemlp_kernels.contract import ACTIVATIONS, TensorRule


def test_the_comparator_refuses_nan_and_shapes():
    for actual, expected, limit in [(NAN, 1.0, 1.0), (1.0, NAN, 1.0), (1.0, 2.0, NAN), ([1.0], 1.0, 1.0)]:
        with pytest.raises(AssertionError):
            assert_within(actual, expected, limit)
    assert_within([NAN, np.inf], [NAN, np.inf], 0.0)


@pytest.mark.parametrize("spec", CROSS_ENTROPIES + ELEMENTWISE, ids=str)
def test_the_loss_bound_admits_the_same_formula_in_float32(spec):
    """The oracle in float32 is a correct implementation: its errors are within the bound."""
    for seed in range(5):
        z, t, weight, class_weight = loss_case(spec, seed, rows=20, columns=9)
        z, weight, class_weight = (a.astype(np.float32) for a in (z, weight, class_weight))
        t = t.astype(np.float32) if t.dtype == np.float64 else t
        classes = class_weight if spec.kind == "cross_entropy" else None
        _, dz = reference.loss_grad(spec, z, t, weight, classes)
        wide = [
            None if a is None else a.astype(np.float64) if a.dtype == np.float32 else a for a in (z, t, weight, classes)
        ]
        loss, expected = reference.loss_grad(spec, *wide)
        loss_error, dz_error = loss_grad_bound(spec, *wide)
        assert_within(dz, expected, dz_error)
        assert 0.0 < loss_error < 1e-4 * max(1.0, abs(loss))


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_the_backward_bound_admits_float32(name):
    rng = np.random.default_rng(0)
    dz, w, z = (rng.normal(0, 1, shape).astype(np.float32) for shape in [(9, 33), (33, 12), (9, 12)])
    wide = [a.astype(np.float64) for a in (dz, w, z)]
    keep = rng.random(z.shape) >= 0.25
    actual = reference.grad_input(dz, w, z, name, np.float32(0.25), keep, 0.25).astype(np.float32)
    expected = reference.grad_input(*wide, name, 0.25, keep, 0.25)
    assert_within(actual, expected, grad_input_bound(*wide, name, 0.25, keep, 0.25))


@pytest.mark.parametrize("convention", ["torch", "scikit-learn"])
@pytest.mark.parametrize(
    "rule", SGDS + ADAMS, ids=lambda rule: f"{rule.kind}-{rule.momentum}-{rule.eps}-{rule.decoupled}"
)
def test_the_update_bound_admits_float32(rule, convention):
    rng = np.random.default_rng(1)
    rule = replace(rule, convention=convention)
    for t in (0, 3, 100):
        p, g = (rng.normal(0, 1, 200).astype(np.float32) for _ in range(2))
        state = tuple(rng.uniform(0, 1, 200).astype(np.float32) for _ in range(rule.state_count))
        tensor_rule = TensorRule(0.5, 0.01)
        actual, states = reference.update(rule, tensor_rule, p, g, state, t, 0.05)
        wide = (p.astype(np.float64), g.astype(np.float64), tuple(s.astype(np.float64) for s in state))
        assert actual.dtype == np.float32
        assert_updated(actual, states, rule, tensor_rule, wide, t, 0.05)
        assert float(np.median(update_bound(rule, tensor_rule, *wide, t, 0.05)[0])) < 1e-5
