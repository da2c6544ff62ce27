"""Fused steps in single precision: each within the derived bound of the oracle, and the engine's bit for bit."""

import itertools

import numpy as np
import pytest
import torch
from step_bounds import traced
from tolerance import assert_within, update_bound
from torch import nn

from fusemlp import MLP, SGD, Adam, AdamW, Engine
from fusemlp.torch import fuse, to_torch
from fusemlp_kernels import reference
from fusemlp_kernels.contract import LossSpec, TensorRule

WIDTHS, ROWS = [20, 33, 17, 4], 50
MOMENTS = {torch.optim.SGD: ["momentum_buffer"], torch.optim.Adam: ["exp_avg", "exp_avg_sq"]}
OPTIMIZERS = {
    "sgd": (SGD(0.1), lambda p: torch.optim.SGD(p, lr=0.1)),
    "momentum": (
        SGD(0.05, momentum=0.9, weight_decay=0.01),
        lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, weight_decay=0.01),
    ),
    "nesterov": (
        SGD(0.05, momentum=0.9, nesterov=True),
        lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, nesterov=True),
    ),
    "adam": (Adam(0.01), lambda p: torch.optim.Adam(p, lr=0.01)),
    "adamw": (AdamW(0.01), lambda p: torch.optim.AdamW(p, lr=0.01)),
}
each_optimizer = pytest.mark.parametrize("description, make", OPTIMIZERS.values(), ids=OPTIMIZERS.keys())


def batch(seed):
    rng = np.random.default_rng(seed)
    return rng.standard_normal((ROWS, WIDTHS[0])).astype(np.float32), rng.integers(0, WIDTHS[-1], ROWS)


def network(activation):
    torch.manual_seed(2)
    parts = []
    for inputs, outputs in itertools.pairwise(WIDTHS):
        parts += [nn.Linear(inputs, outputs), activation()]
    return nn.Sequential(*parts[:-1])


@each_optimizer
@pytest.mark.parametrize("name, activation", [("relu", nn.ReLU), ("gelu", nn.GELU), ("tanh", nn.Tanh)])
def test_a_step_is_within_the_bound(name, activation, description, make, record_property):
    module = network(activation)
    optimizer = make(module.parameters())
    step = fuse(module, nn.CrossEntropyLoss(), optimizer)
    spec, rule = LossSpec("cross_entropy"), description.rule()
    moments = (MOMENTS[torch.optim.SGD] if rule.kind == "sgd" else MOMENTS[torch.optim.Adam])[: rule.state_count]
    for t in range(8):
        X, y = batch(t)
        before = {key: array.double().numpy() for key, array in module.state_dict().items()}
        states = {
            key: tuple(optimizer.state[one][moment].double().numpy() for moment in moments)
            for key, one in module.named_parameters()
        }
        layers = [
            reference.Layer(before[f"{2 * i}.weight"], before[f"{2 * i}.bias"], name if i < 2 else "identity", 0.0, 0.0)
            for i in range(3)
        ]
        trace = traced(layers, spec, reference.Batch(X.astype(np.float64), y))
        step(torch.from_numpy(X), torch.from_numpy(y))
        grads = [g for layer in trace.grads for g in layer]
        errors = [e for layer in trace.bounds for e in layer]
        lr = description.schedule.at(t)
        tensor = TensorRule(1.0, description.weight_decay)
        for (key, parameter), g, g_error in zip(module.named_parameters(), grads, errors, strict=True):
            expected, new_state = reference.update(rule, tensor, before[key], g, states[key], t, lr)
            error, state_errors = update_bound(rule, tensor, before[key], g, states[key], t, lr, g_error)
            assert_within(parameter.detach().numpy(), expected, error)
            for moment, own, allowed in zip(moments, new_state, state_errors, strict=True):
                assert_within(optimizer.state[parameter][moment].numpy(), own, allowed)
    record_property("line: torch parity cases", 1)


@each_optimizer
def test_a_fused_step_is_the_engines_bit_for_bit(description, make):
    # a fused step is the calls of the program one by one
    engine = Engine(
        MLP(WIDTHS, activation="silu"), optimizer=description, batch_size=ROWS, backend="numpy", plan="eager"
    )
    module = to_torch(engine)
    step = fuse(module, nn.CrossEntropyLoss(), make(module.parameters()))
    for t in range(10):
        X, y = batch(t)
        assert step(torch.from_numpy(X), torch.from_numpy(y)).item() == float(engine.step(X, y))
    for name, array in engine.state_dict().items():
        assert np.array_equal(module.state_dict()[name].numpy(), array), name
