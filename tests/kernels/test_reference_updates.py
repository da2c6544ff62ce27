"""The oracle's optimizers and training steps against PyTorch in double and scikit-learn."""

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch_oracle import (
    ADAMS,
    NAN,
    RATE,
    SGDS,
    TORCH_ACTIVATIONS,
    assert_close,
    numpy,
    tensor,
    torch_loss,
    torch_optimizer,
)

from fusemlp_kernels import reference
from fusemlp_kernels.contract import LossSpec, TensorRule, UpdateRule
from fusemlp_kernels.reference import Batch, Layer


@pytest.mark.parametrize("factor", [1.0, 0.5])
@pytest.mark.parametrize("decay", [0.0, 0.1])
@pytest.mark.parametrize(
    "rule", SGDS + ADAMS, ids=lambda rule: f"{rule.kind}-{rule.momentum}-{rule.eps}-{rule.decoupled}"
)
def test_optimizer_is_torchs(rule, decay, factor):
    rng = np.random.default_rng(4)
    p = rng.normal(0, 1, (3, 2))
    parameter = tensor(p, grad=True)
    optimizer = torch_optimizer(rule, parameter, decay, factor * RATE)
    state = tuple(np.zeros_like(p) for _ in range(rule.state_count))
    for t in range(12):
        g = rng.normal(0, 1, p.shape)
        parameter.grad = tensor(g)
        optimizer.step()
        p, state = reference.update(rule, TensorRule(factor, decay), p, g, state, t, RATE)
        assert_close(p, numpy(parameter))


def test_scikit_learns_convention_is_scikit_learns_optimizer():
    from sklearn.neural_network._stochastic_optimizers import AdamOptimizer, SGDOptimizer

    for momentum, nesterov, adam in [(0.9, False, False), (0.9, True, False), (0.0, False, True)]:
        rng = np.random.default_rng(6)
        p = rng.normal(0, 1, (3, 2))
        theirs = [p.copy()]
        if adam:
            rule = UpdateRule("adam", eps=1e-3, convention="scikit-learn")
            optimizer = AdamOptimizer(theirs, 0.05, 0.9, 0.999, 1e-3)
        else:
            rule = UpdateRule("sgd", momentum=momentum, nesterov=nesterov, convention="scikit-learn")
            optimizer = SGDOptimizer(theirs, 0.05, momentum=momentum, nesterov=nesterov)
        state = tuple(np.zeros_like(p) for _ in range(rule.state_count))
        for t in range(10):
            g = rng.normal(0, 1, p.shape)
            optimizer.update_params(theirs, [g])
            p, state = reference.update(rule, TensorRule(), p, g, state, t, 0.05)
            assert_close(p, theirs[0])


def test_conventions_of_momentum_differ_when_the_rate_changes():
    """With a constant rate the two velocities differ by a factor; when the rate halves, only torch's steps halve."""
    p, g = np.zeros(1), np.ones(1)
    steps = {}
    for convention in ("torch", "scikit-learn"):
        rule = UpdateRule("sgd", momentum=0.5, convention=convention)
        first, state = reference.update(rule, TensorRule(), p, g, (np.zeros(1),), 0, 0.2)
        second, _ = reference.update(rule, TensorRule(), first, g, state, 1, 0.1)
        steps[convention] = float(first[0]), float((second - first)[0])
    assert_close(steps["torch"], [-0.2, -0.15])
    assert_close(steps["scikit-learn"], [-0.2, -0.2])


@pytest.mark.parametrize("max_norm", [0.1, 1.0, 1e6])
def test_clipping_is_torchs(max_norm):
    rng = np.random.default_rng(0)
    grads = [rng.normal(0, 1, (3, 4)), rng.normal(0, 1, 5)]
    parameters = [tensor(np.zeros_like(g), grad=True) for g in grads]
    for parameter, g in zip(parameters, grads, strict=True):
        parameter.grad = tensor(g)
    torch.nn.utils.clip_grad_norm_(parameters, max_norm)
    factor = reference.clip_factor(grads, max_norm)
    for parameter, g in zip(parameters, grads, strict=True):
        assert_close(factor * g, parameter.grad.numpy())


def test_clipping_hands_on_nan_and_can_be_off():
    assert np.isnan(reference.clip_factor([np.array([NAN])], 1.0))
    assert reference.clip_factor([np.array([100.0])], None) == 1.0


@pytest.mark.parametrize("rule", [SGDS[2], replace(ADAMS[2], clip_norm=0.3)], ids=["nesterov", "clipped adamw"])
def test_training_steps_are_torchs(rule):
    """A whole network with dropout masks, a learned slope, weights and a rate that falls, ten steps."""
    rng = np.random.default_rng(11)
    spec = LossSpec("cross_entropy", label_smoothing=0.1)
    widths, names, rate = [5, 7, 6, 3], ["prelu", "gelu", "identity"], 0.25
    layers = [
        Layer(
            rng.normal(0, 0.5, (n, k)), rng.normal(0, 0.1, n), name, np.array([0.25]) if name == "prelu" else 0.0, rate
        )
        for k, n, name in zip(widths[:-1], widths[1:], names, strict=True)
    ]
    parameters = [[tensor(p, grad=True) for p in layer.parameters] for layer in layers]
    flat = [p for group in parameters for p in group]
    optimizer = torch_optimizer(rule, torch.zeros(1), 0.1, 0.05)
    optimizer.param_groups[0]["params"] = flat
    tensors = [[TensorRule(weight_decay=0.1)] * len(layer.parameters) for layer in layers]
    state = reference.initial_state(rule, layers)
    for t in range(10):
        x, target, weight = rng.normal(0, 1, (8, 5)), rng.integers(0, 3, 8), rng.uniform(0.5, 2, 8)
        keeps = [rng.random((8, n)) >= rate for n in widths[1:-1]] + [None]
        y = tensor(x)
        for group, name, keep in zip(parameters, names, keeps, strict=True):
            y = y @ group[0].T + group[1]
            y = torch.nn.functional.prelu(y, group[2]) if name == "prelu" else TORCH_ACTIVATIONS[name](y, 0.0)
            y = y if keep is None else y * tensor(keep) / (1.0 - rate)
        expected = torch_loss(spec, y, target, weight, None)
        optimizer.zero_grad()
        expected.backward()
        if rule.clip_norm is not None:
            torch.nn.utils.clip_grad_norm_(flat, rule.clip_norm)
        optimizer.param_groups[0]["lr"] = rate_now = RATE * 0.9**t
        optimizer.step()
        batch = Batch(x, target, weight, keeps=keeps)
        loss, layers, state = reference.train_step(layers, state, spec, rule, t, rate_now, batch, tensors)
        assert_close(loss, expected.item())
        for layer, group in zip(layers, parameters, strict=True):
            for p, theirs in zip(layer.parameters, group, strict=True):
                assert_close(p, numpy(theirs))


def test_no_function_changes_its_arguments():
    rng = np.random.default_rng(0)
    layers = [Layer(rng.normal(0, 1, (3, 4)), rng.normal(0, 1, 3), "prelu", np.array([0.2]))]
    rule = UpdateRule("adam", clip_norm=0.1)
    state = reference.initial_state(rule, layers)
    batch = Batch(rng.normal(0, 1, (5, 4)), rng.normal(0, 1, (5, 3)), rng.uniform(0, 1, 5))
    arrays = [*layers[0].parameters, *itertools.chain(*state[0]), batch.x, batch.target, batch.weight]
    for array in arrays:
        array.setflags(write=False)
    reference.train_step(layers, state, LossSpec("mse"), rule, 0, RATE, batch)
