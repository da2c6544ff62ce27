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


INPUTS, HIDDEN, OUTPUTS = 5, 6, 4
SIZES = (12, 12, 12, 5)  # three whole batches and a short one


def network(activation=nn.Tanh, *end):
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(INPUTS, HIDDEN), activation(), nn.Linear(HIDDEN, OUTPUTS), *end).double()


def batches(count):
    """Yield inputs (m, INPUTS) and scores (m, OUTPUTS) that a network can learn."""
    generator = torch.Generator().manual_seed(5)
    for number in range(count):
        x = torch.randn(SIZES[number % len(SIZES)], INPUTS, dtype=torch.float64, generator=generator)
        yield x, torch.tanh(x[:, :OUTPUTS] - x[:, -OUTPUTS:])


def eager_step(module, optimizer, x, *targets, loss_fn=None, clip=None):
    """Return the loss of an eager step and the outputs before it."""
    optimizer.zero_grad()
    outputs = module(x)
    loss = (loss_fn or nn.CrossEntropyLoss())(outputs, *targets)
    loss.backward()
    if clip is not None:
        nn.utils.clip_grad_norm_(module.parameters(), clip)
    optimizer.step()
    return loss.detach(), outputs.detach()


def sgd(parameters, **options):
    return torch.optim.SGD(parameters, **{"lr": 0.1, "momentum": 0.9, **options})


def adam(parameters, **options):
    return torch.optim.Adam(parameters, **{"lr": 0.01, **options})


def rmsprop(parameters, **options):
    return torch.optim.RMSprop(parameters, **{"lr": 0.01, **options})


each_optimizer = pytest.mark.parametrize("make_optimizer", [sgd, adam, rmsprop])


class Pair:
    """A fused module and an eager twin; ``options`` are those of ``fuse``. ``returns``: outputs are compared too."""

    def __init__(self, module=None, make_optimizer=sgd, loss_fn=None, *, close=CLOSE, returns=False, **options):
        self.module = make() if module is None else module
        self.twin = copy.deepcopy(self.module)
        self.optimizer, self.eager = (make_optimizer(list(one.parameters())) for one in (self.module, self.twin))
        self.loss_fn = self.eager_loss = loss_fn or nn.CrossEntropyLoss()
        self.close, self.returns, self.clip = close, returns, options.get("clip_grad_norm")
        self.step = door.fuse(self.module, self.loss_fn, self.optimizer, **options)
        self.seeds = itertools.count()

    def check(self, x, *targets):
        found = self.step(x, *targets, return_output=self.returns)
        loss, outputs = eager_step(self.twin, self.eager, x, *targets, loss_fn=self.eager_loss, clip=self.clip)
        torch.testing.assert_close(found, (loss, outputs) if self.returns else loss, **self.close)

    def steps(self, count=3, rows=10):
        for _ in range(count):
            self.check(*batch(rows, next(self.seeds)))
        self.same()

    def same(self):
        torch.testing.assert_close(self.module.state_dict(), self.twin.state_dict(), **self.close)

    def same_moments(self):
        moments = (optimizer.state_dict()["state"] for optimizer in (self.optimizer, self.eager))
        torch.testing.assert_close(*moments, **self.close)

    def both(self, change):
        for module, optimizer in ((self.module, self.optimizer), (self.twin, self.eager)):
            change(module, optimizer)
