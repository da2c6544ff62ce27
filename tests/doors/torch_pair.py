"""A fused module and an eager twin, for tests of events around and between fused steps."""

import copy
import itertools

import pytest
import torch
from torch import nn

import fusemlp
import fusemlp.torch as door

CLOSE = {"rtol": 1e-11, "atol": 1e-13}
# Each activation, and torch's module for it.
ACTIVATIONS = {
    "identity": ("identity", nn.Identity),
    "relu": ("relu", nn.ReLU),
    "leaky_relu": (fusemlp.LeakyReLU(0.2), lambda: nn.LeakyReLU(0.2)),
    "prelu": (fusemlp.PReLU(0.25), nn.PReLU),
    "sigmoid": ("sigmoid", nn.Sigmoid),
    "tanh": ("tanh", nn.Tanh),
    "gelu": ("gelu", nn.GELU),
    "silu": ("silu", nn.SiLU),
    "elu": (fusemlp.ELU(0.7), lambda: nn.ELU(0.7)),
    "selu": ("selu", nn.SELU),
    "softplus": ("softplus", nn.Softplus),
    "mish": ("mish", nn.Mish),
}


def make(activation=nn.ReLU, *, dtype=torch.float64, dropout=None):
    torch.manual_seed(2)
    parts = [nn.Linear(6, 8), activation(), *([] if dropout is None else [nn.Dropout(dropout)]), nn.Linear(8, 3)]
    return nn.Sequential(*parts).to(dtype)


class Block(nn.Sequential):
    """x + f(x), with f the modules."""

    def forward(self, x):
        return x + super().forward(x)


def batch(rows=10, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, 6, generator=generator, dtype=dtype)
    return x, torch.randint(0, 3, (rows,), generator=generator)


def eager_step(module, optimizer, x, y, loss_fn=None):
    optimizer.zero_grad()
    loss = (loss_fn or nn.CrossEntropyLoss())(module(x), y)
    loss.backward()
    optimizer.step()
    return loss.detach()


def sgd(module, **options):
    return torch.optim.SGD(module.parameters(), **{"lr": 0.1, "momentum": 0.9, **options})


def adam(module, **options):
    return torch.optim.Adam(module.parameters(), **{"lr": 0.01, **options})


def rmsprop(module, **options):
    return torch.optim.RMSprop(module.parameters(), **{"lr": 0.01, **options})


each_optimizer = pytest.mark.parametrize("make_optimizer", [sgd, adam, rmsprop])


class Pair:
    """A fused module and an eager twin."""

    def __init__(self, module=None, make_optimizer=sgd, loss_fn=None, **options):
        self.module = make() if module is None else module
        self.twin = copy.deepcopy(self.module)
        self.optimizer, self.eager = make_optimizer(self.module, **options), make_optimizer(self.twin, **options)
        self.loss_fn = loss_fn or nn.CrossEntropyLoss()
        self.step = door.fuse(self.module, self.loss_fn, self.optimizer)
        self.seeds = itertools.count()

    def check(self, x, y):
        loss = self.step(x, y)
        torch.testing.assert_close(loss, eager_step(self.twin, self.eager, x, y, self.loss_fn), **CLOSE)

    def steps(self, count=3, rows=10):
        for _ in range(count):
            self.check(*batch(rows, next(self.seeds)))
        self.same()

    def same(self):
        torch.testing.assert_close(self.module.state_dict(), self.twin.state_dict(), **CLOSE)

    def both(self, change):
        for module, optimizer in ((self.module, self.optimizer), (self.twin, self.eager)):
            change(module, optimizer)
