"""Engines and torch modules convert into one another and continue the same training."""

import copy

import numpy as np
import pytest
import torch
from torch import nn

from fusemlp import ELU, MLP, Engine, LeakyReLU, PReLU
from fusemlp.torch import from_torch, to_torch
from fusemlp_kernels.contract import ACTIVATIONS
from fusemlp_kernels.errors import ArgumentError, ArgumentTypeError

CLOSE = {"rtol": 1e-11, "atol": 1e-13}


def module():
    torch.manual_seed(1)
    return nn.Sequential(
        nn.Linear(6, 8), nn.GELU(), nn.Dropout(0.0), nn.Linear(8, 5), nn.PReLU(), nn.Linear(5, 3)
    ).double()


def batch(seed, rows=12):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, 6, generator=generator, dtype=torch.float64)
    return x, torch.randint(0, 3, (rows,), generator=generator)


def eager_step(net, optimizer, x, y):
    optimizer.zero_grad()
    loss = nn.functional.cross_entropy(net(x), y)
    loss.backward()
    optimizer.step()


OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, nesterov=True, weight_decay=0.01),
    "adam": lambda p: torch.optim.Adam(p, lr=0.01, betas=(0.8, 0.9), eps=1e-6, weight_decay=0.01),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.1),
    "groups": lambda p: torch.optim.AdamW([{"params": p[:2], "lr": 0.001}, {"params": p[2:4], "weight_decay": 0.0}]),
}


@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS.keys())
def test_an_engine_goes_on_where_torch_is(make):
    net = module()
    optimizer = make(list(net.parameters()))
    for seed in range(3):
        eager_step(net, optimizer, *batch(seed))
    engine = from_torch(net, nn.CrossEntropyLoss(), optimizer, batch_size=12, backend="numpy")
    assert engine.precision == "fp64"
    for seed in range(3, 8):
        x, y = batch(seed)
        eager_step(net, optimizer, x, y)
        engine.step(x.numpy(), y.numpy())
    for own, expected in zip(engine.state_dict().values(), net.state_dict().values(), strict=True):
        torch.testing.assert_close(torch.from_numpy(own), expected, **CLOSE)


def test_log_probabilities_become_logits():
    net = nn.Sequential(*module(), nn.LogSoftmax(1))
    engine = from_torch(net, nn.NLLLoss(), torch.optim.SGD(net.parameters(), lr=0.1), backend="numpy")
    x, y = batch(0)
    log_probabilities = net(x).detach()
    found = torch.from_numpy(engine.predict_proba(x.numpy()))
    torch.testing.assert_close(found, log_probabilities.exp(), **CLOSE)
    loss = torch.tensor(float(engine.step(x.numpy(), y.numpy())), dtype=torch.float64)
    torch.testing.assert_close(loss, nn.functional.nll_loss(log_probabilities, y), **CLOSE)


def test_values_are_copied():
    net = module()
    engine = from_torch(net, nn.CrossEntropyLoss())
    before = copy.deepcopy(net.state_dict())
    engine.step(*(t.numpy() for t in batch(0)))
    torch.testing.assert_close(net.state_dict(), before, rtol=0, atol=0)


def test_frozen_parameters_and_missing_biases():
    torch.manual_seed(1)
    net = nn.Sequential(nn.Linear(6, 8, bias=False), nn.Tanh(), nn.Linear(8, 3))
    net[2].weight.requires_grad_(False)
    engine = from_torch(net, nn.CrossEntropyLoss(), batch_size=12)
    before = engine.state_dict()
    engine.step(*(t.numpy() for t in batch(0)))
    changed = [name for name, array in engine.state_dict().items() if not np.array_equal(array, before[name])]
    assert changed == ["0.weight", "2.bias"]
    assert not before["0.bias"].any()


@pytest.mark.parametrize("activation", [*ACTIVATIONS, LeakyReLU(0.3), PReLU(0.1), ELU(0.7)])
def test_a_torch_module_predicts_as_the_engine(activation):
    net = MLP([6, 8, 5, 3], activation=activation, output_activation="tanh", dropout=[0.5, 0.0])
    engine = Engine(net, "mse", backend="numpy", precision="fp64")
    made = to_torch(engine)
    assert list(made.state_dict()) == list(engine.state_dict())
    assert made.training and [type(one) for one in made].count(nn.Dropout) == 1
    x, _ = batch(0)
    expected = engine.predict(x.numpy())
    torch.testing.assert_close(made.eval()(x).detach(), torch.from_numpy(expected), **CLOSE)
    with torch.no_grad():
        made[0].weight.zero_()
    assert np.array_equal(engine.predict(x.numpy()), expected)


def test_there_and_back():
    engine = Engine(MLP([6, 8, 3], activation=PReLU(0.2), dropout=0.25), batch_size=12, backend="numpy")
    again = from_torch(to_torch(engine).eval(), nn.CrossEntropyLoss())
    assert again.network.sizes == engine.network.sizes and again.network.dropouts == engine.network.dropouts
    assert again.precision == "fp32"
    for name, array in engine.state_dict().items():
        assert np.array_equal(again.state_dict()[name], array)


def uneven(net):
    optimizer = torch.optim.Adam(net.parameters())
    net[0].requires_grad_(False)
    eager_step(net, optimizer, *batch(0))
    net[0].requires_grad_(True)
    eager_step(net, optimizer, *batch(0))
    return optimizer


REFUSED = {
    "an engine of no kind": (lambda: to_torch(module()), ArgumentTypeError, "expected a fusemlp.Engine"),
    "flatten": (lambda: from_torch(nn.Sequential(nn.Flatten(), nn.Linear(6, 3))), ArgumentError, "Flatten in front"),
    "RMSprop": (
        lambda: from_torch((net := module()), None, torch.optim.RMSprop(net.parameters())),
        ArgumentError,
        "optimizer: an engine has no RMSprop; use SGD",
    ),
    "positive weights": (
        lambda: from_torch(module(), nn.BCEWithLogitsLoss(pos_weight=torch.tensor(2.0))),
        ArgumentError,
        "loss_fn: an engine has no pos_weight",
    ),
    "log_softmax": (
        lambda: from_torch(nn.Sequential(*module(), nn.LogSoftmax(1)), nn.CrossEntropyLoss()),
        ArgumentError,
        "ends with LogSoftmax; use NLLLoss",
    ),
    "momentum by group": (
        lambda: from_torch(
            (net := module()),
            None,
            torch.optim.SGD(
                [{"params": net[0].parameters(), "momentum": 0.5}, {"params": net[3].parameters()}], lr=0.1
            ),
        ),
        ArgumentError,
        r"param_groups\[1\]: an engine has one momentum",
    ),
    "uneven counts": (
        lambda: from_torch((net := module()), None, uneven(net)),
        ArgumentError,
        r"were updated \[1, 2\] times",
    ),
    "nothing trained": (
        lambda: from_torch((net := module()).requires_grad_(False), None, torch.optim.SGD(net.parameters(), lr=0.1)),
        ArgumentError,
        "no group has a parameter",
    ),
}


@pytest.mark.parametrize("make, error, words", REFUSED.values(), ids=REFUSED.keys())
def test_refusals(make, error, words):
    with pytest.raises(error, match=words):
        make()
