"""The oracle's optimizers, schedules and training steps against PyTorch in double and scikit-learn."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch_oracle import (
    ADAMS,
    CONSTANT,
    NAN,
    SGDS,
    TORCH_ACTIVATIONS,
    assert_close,
    numpy,
    tensor,
    torch_loss,
    torch_optimizer,
)

from fusemlp_kernels import reference
from fusemlp_kernels.contract import LossSpec, ScheduleSpec, TensorRule, UpdateRule
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
    optimizer = torch_optimizer(rule, parameter, decay, factor * rule.schedule.base)
    state = tuple(np.zeros_like(p) for _ in range(rule.state_count))
    for t in range(12):
        g = rng.normal(0, 1, p.shape)
        parameter.grad = tensor(g)
        optimizer.step()
        p, state = reference.update(rule, TensorRule(factor, decay), p, g, state, t, rule.schedule.base)
        assert_close(p, numpy(parameter))


def test_scikit_learns_convention_is_scikit_learns_optimizer():
    from sklearn.neural_network._stochastic_optimizers import AdamOptimizer, SGDOptimizer

    for momentum, nesterov, adam in [(0.9, False, False), (0.9, True, False), (0.0, False, True)]:
        rng = np.random.default_rng(6)
        p = rng.normal(0, 1, (3, 2))
        theirs = [p.copy()]
        if adam:
            rule = UpdateRule("adam", CONSTANT, eps=1e-3, convention="scikit-learn")
            optimizer = AdamOptimizer(theirs, 0.05, 0.9, 0.999, 1e-3)
        else:
            rule = UpdateRule("sgd", CONSTANT, momentum, nesterov, convention="scikit-learn")
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
        rule = UpdateRule("sgd", CONSTANT, momentum=0.5, convention=convention)
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


def torch_rates(make, base, count):
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=base)
    scheduler = make(optimizer)
    rates = []
    for _ in range(count):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return rates


SCHEDULERS = torch.optim.lr_scheduler
STEPS = 20
SCHEDULES = {
    "constant": (ScheduleSpec("constant", 0.3), lambda o: SCHEDULERS.LambdaLR(o, lambda t: 1.0)),
    "step": (ScheduleSpec("step", 0.3, steps=4, gamma=0.5), lambda o: SCHEDULERS.StepLR(o, 4, 0.5)),
    "exponential": (ScheduleSpec("exponential", 0.3, gamma=0.9), lambda o: SCHEDULERS.ExponentialLR(o, 0.9)),
    "cosine": (
        ScheduleSpec("cosine", 0.3, steps=STEPS, final=0.01),
        lambda o: SCHEDULERS.CosineAnnealingLR(o, STEPS, 0.01),
    ),
    **{
        f"one_cycle {fraction}": (
            ScheduleSpec("one_cycle", 0.3, steps=STEPS, peak_fraction=fraction, final=0.3 / 25 / 1e4),
            lambda o, fraction=fraction: SCHEDULERS.OneCycleLR(
                o, 0.3, total_steps=STEPS, pct_start=fraction, cycle_momentum=False
            ),
        )
        for fraction in (0.3, 0.33, 0.5, 1.0, 0.01)
    },
}


@pytest.mark.parametrize("name", SCHEDULES)
def test_schedule_is_torchs(name):
    spec, make = SCHEDULES[name]
    rates = [reference.learning_rate(spec, t) for t in range(STEPS - 1)]
    assert_close(rates, torch_rates(make, 0.3, STEPS - 1))


@pytest.mark.parametrize("name", SCHEDULES)
def test_warm_up_rises_linearly_and_delays_the_schedule(name):
    spec = SCHEDULES[name][0]
    warm = replace(spec, warmup=5)
    start = reference.learning_rate(spec, 0)
    assert_close([reference.learning_rate(warm, t) for t in range(5)], [start * (t + 1) / 5 for t in range(5)])
    for t in range(30):
        assert reference.learning_rate(warm, t + 5) == reference.learning_rate(spec, t)


@pytest.mark.parametrize("kind", ["cosine", "one_cycle"])
def test_annealed_rates_stay_at_the_final_value(kind):
    for steps, fraction in itertools.product((1, 2, 3, 10), (0.0, 0.3, 0.5, 1.0)):
        spec = ScheduleSpec(kind, 0.3, steps=steps, final=0.01, peak_fraction=fraction)
        assert all(0.0 < reference.learning_rate(spec, t) <= 0.3 for t in range(steps))
        assert_close([reference.learning_rate(spec, steps + t) for t in range(5)], [0.01] * 5)


@pytest.mark.parametrize("rule", [SGDS[2], replace(ADAMS[2], clip_norm=0.3)], ids=["nesterov", "clipped adamw"])
def test_training_steps_are_torchs(rule):
    """A whole network with dropout masks, a learned slope, weights and a schedule, ten steps."""
    rng = np.random.default_rng(11)
    rule = replace(rule, schedule=ScheduleSpec("cosine", 0.05, steps=10))
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
        optimizer.param_groups[0]["lr"] = reference.learning_rate(rule.schedule, t)
        optimizer.step()
        batch = Batch(x, target, weight, keeps=keeps)
        loss, layers, state = reference.train_step(layers, state, spec, rule, t, batch, tensors)
        assert_close(loss, expected.item())
        for layer, group in zip(layers, parameters, strict=True):
            for p, theirs in zip(layer.parameters, group, strict=True):
                assert_close(p, numpy(theirs))


def test_no_function_changes_its_arguments():
    rng = np.random.default_rng(0)
    layers = [Layer(rng.normal(0, 1, (3, 4)), rng.normal(0, 1, 3), "prelu", np.array([0.2]))]
    rule = UpdateRule("adam", CONSTANT, clip_norm=0.1)
    state = reference.initial_state(rule, layers)
    batch = Batch(rng.normal(0, 1, (5, 4)), rng.normal(0, 1, (5, 3)), rng.uniform(0, 1, 5))
    arrays = [*layers[0].parameters, *itertools.chain(*state[0]), batch.x, batch.target, batch.weight]
    for array in arrays:
        array.setflags(write=False)
    reference.train_step(layers, state, LossSpec("mse"), rule, 0, batch)
