"""``fuse`` with any callable loss, against eager PyTorch: torch's autograd computes its gradient by the output."""

import copy
import functools
import io
import sys

import numpy as np
import pytest
import torch
from torch import nn, optim
from torch.nn import functional as F
from torch_pair import ACTIVATIONS, CLOSE, INPUTS, OUTPUTS, Pair, adam, batch, batches, make, network

from fusemlp import ArgumentError, ArgumentTypeError, ShapeError
from fusemlp.torch import fuse
from fusemlp_kernels.compilation import watchers

# Two hundred steps of two ways of computing the same doubles.
WHOLE_RUN = {"rtol": 1e-9, "atol": 1e-9}


def dqn(q, action, target):
    return F.smooth_l1_loss(q.gather(1, action).squeeze(1), target)


def two_heads(output, labels, values):
    return F.cross_entropy(output[:, :3], labels) + 0.5 * F.mse_loss(output[:, 3], values)


def focal(logits, labels, gamma=2.0):
    logs = logits.log_softmax(1).gather(1, labels[:, None])
    return -((1.0 - logs.exp()) ** gamma * logs).mean()


def regularised(output, target):
    return F.mse_loss(output, target) + 0.01 * output.abs().mean() + 0.1 * output.mean(0).square().sum()


class Gaussian(nn.Module):
    """The first outputs are means, the others logarithms of variances."""

    def __init__(self):
        super().__init__()
        self.loss = nn.GaussianNLLLoss()

    def forward(self, output, target):
        mean, log_variance = output.chunk(2, 1)
        return self.loss(mean, target, log_variance.exp())


# Each loss and its targets, from scores (m, OUTPUTS) that a network can learn.
LOSSES = {
    "dqn": (lambda: dqn, lambda v: (v.argmax(1, keepdim=True), v[:, 0])),
    "two heads": (lambda: two_heads, lambda v: (v[:, :3].argmax(1), v[:, 3])),
    "focal": (lambda: focal, lambda v: (v.argmax(1),)),
    "regularised": (lambda: regularised, lambda v: (v,)),
    "gaussian": (Gaussian, lambda v: (v[:, :2],)),
}
each_loss = pytest.mark.parametrize("make_loss, targets", LOSSES.values(), ids=LOSSES.keys())


def pair(loss_fn, module=None, make_optimizer=adam, **options):
    module = network() if module is None else module
    return Pair(module, make_optimizer, loss_fn, returns=True, close=WHOLE_RUN, **options)


def train(pair, targets, count, after=lambda: None):
    """Compare steps whose targets are made of scores, and where they end."""
    for x, scores in batches(count):
        pair.check(x, *targets(scores))
        after()
    pair.same()
    pair.same_moments()


@each_loss
def test_two_hundred_steps(make_loss, targets):
    train(pair(make_loss()), targets, 200)


OPTIONS = {
    "clipped": (adam, 0.05),
    "two rates": (lambda p: optim.SGD([{"params": p[:2], "lr": 0.01}, {"params": p[2:]}], lr=0.1, momentum=0.9), None),
    "two rates, clipped": (lambda p: optim.AdamW([{"params": p[:1]}, {"params": p[1:], "lr": 0.02}], lr=0.01), 0.05),
    "the last layer alone": (lambda p: optim.RMSprop(p[2:], lr=0.01), None),
}


@pytest.mark.parametrize("make_optimizer, clip", OPTIONS.values(), ids=OPTIONS.keys())
def test_options_of_the_step(make_optimizer, clip):
    train(pair(dqn, make_optimizer=make_optimizer, clip_grad_norm=clip), LOSSES["dqn"][1], 30)


@pytest.mark.parametrize("activation", [twin for _, twin in ACTIVATIONS.values()], ids=ACTIVATIONS)
def test_activations_of_the_output(activation):
    train(pair(regularised, network(nn.Tanh, activation())), LOSSES["regularised"][1], 20)


def test_log_softmax_and_squeezed_outputs():
    logs = network(nn.Tanh, nn.LogSoftmax(1))
    train(pair(nn.KLDivLoss(reduction="batchmean"), logs), lambda v: (v.softmax(1),), 20)
    squeezed = nn.Sequential(nn.Linear(INPUTS, 1), nn.Sigmoid(), nn.Flatten(0)).double()
    train(pair(nn.BCELoss(), squeezed), lambda v: ((v[:, 0] > 0.0).double(),), 20)


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_dropout_has_the_masks_of_a_fused_loss(mode):
    found = []
    for loss_fn in (nn.CrossEntropyLoss(), lambda output, labels: F.cross_entropy(output, labels)):
        module = getattr(make(dropout=0.5), mode)()
        step = fuse(module, loss_fn, optim.SGD(module.parameters(), lr=0.1), seed=7)
        losses = [step(*batch(seed=seed)) for seed in range(5)]
        found.append((losses, module.state_dict()))
    torch.testing.assert_close(*found, **CLOSE)


class Squared(nn.MSELoss):
    def forward(self, output, target):
        return 2.0 * super().forward(output, target)


# Losses of torch without kernels, or with options that the kernels lack, and their targets.
SLOWER = {
    "weighted bce": (nn.BCEWithLogitsLoss(weight=torch.arange(4.0).double()), lambda v: (v > 0.0).double()),
    "smooth l1": (nn.SmoothL1Loss(beta=0.5), lambda v: v),
    "poisson": (nn.PoissonNLLLoss(full=True), lambda v: torch.floor(3.0 * v.abs())),
    "margins": (nn.MultiMarginLoss(), lambda v: v.argmax(1)),
    "subclass": (Squared(), lambda v: v),
    "partial": (functools.partial(F.huber_loss, delta=0.3), lambda v: v),
    "bound method": (nn.MSELoss().forward, lambda v: v),
    "function": (torch.dist, lambda v: v),
}


@pytest.mark.parametrize("loss_fn, target", SLOWER.values(), ids=SLOWER.keys())
def test_losses_that_the_kernels_lack(loss_fn, target):
    slower = pair(loss_fn)
    train(slower, lambda v: (target(v),), 10)
    assert "by autograd" in repr(slower.step) and "own_loss" in str(slower.step.program)


@pytest.mark.parametrize("loss_fn", [nn.MSELoss(), F.mse_loss, nn.SmoothL1Loss(), nn.PoissonNLLLoss()])
def test_losses_of_the_kernels_stay_there(loss_fn):
    module = network()
    step = fuse(module, loss_fn, adam(module.parameters()))
    assert "autograd" not in repr(step) and "own_loss" not in str(step.program)


def test_an_option_that_changes_the_path():
    changing = pair(nn.SmoothL1Loss())
    for beta, words in ((1.0, "Huber"), (0.5, "SmoothL1Loss by autograd"), (0.2, "SmoothL1Loss by autograd")):
        changing.loss_fn.beta = beta
        train(changing, lambda v: (v,), 2)
        assert words in repr(changing.step)


def test_targets_are_given_as_they_are():
    seen = []

    def loss_fn(output, *targets):
        seen.append(targets)
        return output.square().mean()

    module = network()
    step = fuse(module, loss_fn, adam(module.parameters()))
    x = torch.randn(5, INPUTS).double()
    targets = torch.ones(5, dtype=torch.bool), torch.zeros(5, 2, 3).half(), torch.arange(5, dtype=torch.int32)
    for count in (3, 1, 0):
        step(x, *targets[:count])
        assert len(seen[-1]) == count and all(map(lambda one, other: one is other, seen[-1], targets))


def test_the_output_is_the_callables_own():
    kept = []

    def loss_fn(output, legal):
        kept.append(output)
        output[~legal] = 0.0
        return output.square().mean()

    train(pair(loss_fn), lambda v: (v > 0.0,), 4)
    for own, eager in zip(kept[::2], kept[1::2], strict=True):
        torch.testing.assert_close(own, eager, **CLOSE)


class Learned(nn.Module):
    """A loss with a parameter of its own."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.zeros((), dtype=torch.float64))

    def forward(self, output, target):
        return (output - target).square().mean() * torch.exp(-self.scale) + self.scale


def test_parameters_of_the_loss_get_gradients_and_its_hooks_run():
    calls = []
    loss_fn = Learned()
    loss_fn.register_forward_hook(lambda *_: calls.append(1))
    learning = pair(loss_fn)
    learning.eager_loss = copy.deepcopy(loss_fn)
    others = [optim.SGD(one.parameters(), lr=0.1) for one in (loss_fn, learning.eager_loss)]

    def update():
        for other in others:
            other.step()
            other.zero_grad()

    train(learning, lambda v: (v,), 10, after=update)
    torch.testing.assert_close(loss_fn.scale, learning.eager_loss.scale, **CLOSE)
    assert loss_fn.scale != 0.0 and len(calls) == 20


def test_nan_goes_on_as_in_an_eager_loop():
    # the square root has the slope infinity at 0, times 0
    lost = pair(lambda output: (0.0 * output).square().sum().sqrt())
    lost.check(next(batches(1))[0])
    for own, eager in zip(lost.module.parameters(), lost.twin.parameters(), strict=True):
        assert own.isnan().all() and eager.isnan().all()


class Stopped(Exception):
    pass


def stopping(output, target):
    raise Stopped("in the middle")


X, Y = torch.ones(4, INPUTS).double(), torch.ones(4, OUTPUTS).double()
# The loss from the module, output and target; the error, and words of it.
WRONG = {
    "own exception": (lambda m: stopping, Stopped, "in the middle"),
    "number": (
        lambda m: lambda y, t: 1.0,
        ArgumentTypeError,
        "<lambda> returned float; expected a 0-d tensor",
    ),
    "a pair": (lambda m: lambda y, t: (y.mean(), y), ArgumentTypeError, "returned tuple"),
    "rows": (
        lambda m: lambda y, t: (y - t).sum(1),
        ArgumentTypeError,
        r"of shape \(4,\); expected a 0-d tensor of floats: use \.mean",
    ),
    "none": (
        lambda m: nn.KLDivLoss(reduction="none"),
        ArgumentTypeError,
        r"returned torch\.float64 of shape \(4, 4\)",
    ),
    "integer": (lambda m: lambda y, t: y.argmax(), ArgumentTypeError, r"returned torch\.int64 of shape \(\)"),
    "detached": (lambda m: lambda y, t: y.detach().mean(), ArgumentError, "has no gradient by the output"),
    "other graph": (lambda m: lambda y, t: torch.ones((), requires_grad=True) * 2, ArgumentError, "has no gradient"),
    "parameters": (
        lambda m: lambda y, t: y.mean() + m[0].weight.square().sum(),
        ArgumentError,
        r"<lambda> depends on 0\.weight not by the output alone, .* use the optimizer's weight_decay",
    ),
    "module again": (lambda m: lambda y, t: (m(X) - y).square().mean(), ArgumentError, r"depends on 0\.weight"),
    "arguments": (lambda m: nn.CosineEmbeddingLoss(), TypeError, "missing 1 required positional argument: 'target'"),
}


@pytest.mark.parametrize("make_loss, error, words", WRONG.values(), ids=WRONG.keys())
def test_steps_after_an_error_are_those_without_it(make_loss, error, words):
    """The moments, the counts and the masks of dropout too."""
    module = network()
    module.insert(2, nn.Dropout(0.5))
    twin = copy.deepcopy(module)
    losses = [F.mse_loss]
    steps = [fuse(one, lambda *batch: losses[0](*batch), adam(one.parameters()), seed=5) for one in (module, twin)]
    assert steps[0](X, Y) == steps[1](X, Y)
    losses[0] = make_loss(module)
    with pytest.raises(error, match=words):
        steps[0](X, Y)
    assert all(parameter.grad is None for parameter in module.parameters())
    losses[0] = F.mse_loss
    for _ in range(2):
        assert steps[0](X, Y) == steps[1](X, Y)
    states = [[step.module.state_dict(), step.optimizer.state_dict()] for step in steps]
    torch.testing.assert_close(*states, rtol=0, atol=0)


BATCHES = {
    "None": ((None,), ArgumentTypeError, "y: expected a torch.Tensor, got NoneType"),
    "array": ((Y, np.ones(4)), ArgumentTypeError, r"targets\[1\]: expected a torch.Tensor, got ndarray"),
    "rows": ((Y[:3],), ShapeError, r"y: expected 4 rows, as x has, got shape \(3, 4\)"),
    "rows of another": ((Y, Y, torch.tensor(1.0)), ShapeError, r"targets\[2\]: expected 4 rows, .* got shape \(\)"),
    "another requires grad": ((Y, Y.clone().requires_grad_()), ArgumentError, r"targets\[1\]: requires grad"),
    "meta": ((Y, Y.to("meta")), ArgumentError, r"targets\[1\]: is on meta"),
    "sparse": ((Y.to_sparse(),), ArgumentTypeError, "y: expected a dense tensor"),
}


@pytest.mark.parametrize("targets, error, words", BATCHES.values(), ids=BATCHES.keys())
def test_targets_that_are_refused(targets, error, words):
    module = network()
    step = fuse(module, lambda output, *targets: output.mean(), adam(module.parameters()))
    before = copy.deepcopy(module.state_dict())
    with pytest.raises(error, match=words):
        step(X, *targets)
    torch.testing.assert_close(module.state_dict(), before, rtol=0, atol=0)


def test_a_loss_of_the_kernels_has_one_target():
    module = network()
    step = fuse(module, nn.MSELoss(), adam(module.parameters()))
    for targets in ((), (Y, Y)):
        with pytest.raises(ArgumentTypeError, match=rf"mse has one target, step\(x, y\), got {len(targets)}"):
            step(X, *targets)
    torch.testing.assert_close(step(x=X, y=Y), step.loss_fn(network()(X), Y).detach(), **CLOSE)


def test_the_compilation_of_the_first_step_is_shown(monkeypatch):
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    module, shown = network(), []

    def loss_fn(output, target):
        shown.append(len(watchers))
        return F.mse_loss(output, target)

    step = fuse(module, loss_fn, optim.SGD(module.parameters(), lr=0.1))
    for rows in (8, 8, 4):
        step(*(torch.randn(rows, width).double() for width in (INPUTS, OUTPUTS)))
    assert shown == [1, 0, 1]
