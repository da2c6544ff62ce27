"""``fuse`` on the Triton backend, under its interpreter and on a GPU: the parameters are views of its tensors."""

import copy

import pytest
import torch
from devices import GPU, INTERPRETER, marks_of
from torch import nn
from torch_pair import Pair

from fusemlp.torch import FusedMLP

# Three float32 steps of sums over at most 16 products of numbers of order one, from one state: each sum is within
# (2 sqrt(16) + 4) 2**-24 = 7e-7 on both sides, and is carried through two layers.
CLOSE = {"rtol": 1e-5, "atol": 1e-5}
PLACES = [pytest.param(where, id=where.name, marks=marks_of(where)) for where in (INTERPRETER, GPU)]
OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1),
    "momentum, two rates": lambda p: torch.optim.SGD(
        [{"params": p[:2], "lr": 0.01}, {"params": p[2:]}], lr=0.1, momentum=0.9
    ),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01, eps=1e-3),
}


def pair(where, module, make_optimizer, loss_fn=None, **options):
    device = "cuda" if where is GPU else "cpu"
    return Pair(module.to(device), make_optimizer, loss_fn, close=CLOSE, backend="triton", **options), device


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS.keys())
@pytest.mark.parametrize("where", PLACES)
def test_fused_steps(where, make):
    both, device = pair(where, nn.Sequential(nn.Linear(12, 9), nn.ReLU(), nn.Linear(9, 5)), make)
    assert both.step.backend == "triton"
    for number, rows in enumerate((16, 7, 16)):
        x, y = torch.randn(rows, 12, device=device), torch.randint(0, 5, (rows,), device=device)
        y[2] = -100
        both.check(x, y)
        if number == 1:
            both.optimizer.load_state_dict(copy.deepcopy(both.optimizer.state_dict()))
    both.same()
    both.same_moments()


def dqn(q, action, target):
    return nn.functional.smooth_l1_loss(q.gather(1, action).squeeze(1), target)


HEADS = {
    "a callable": (nn.GELU, lambda _: dqn, OPTIMIZERS["adamw"]),
    "positive weights": (
        nn.Identity,
        lambda device: nn.BCEWithLogitsLoss(pos_weight=torch.tensor([0.5, 2.0, 1.0, 3.0, 1.0], device=device)),
        lambda p: torch.optim.RMSprop(p, lr=0.01, eps=1e-3),
    ),
    "nll, two rates": (lambda: nn.LogSoftmax(1), lambda _: nn.NLLLoss(), OPTIMIZERS["momentum, two rates"]),
    "prelu": (nn.PReLU, lambda _: nn.MSELoss(), OPTIMIZERS["adamw"]),
}


@pytest.mark.parametrize("head, make_loss, make", HEADS.values(), ids=HEADS.keys())
@pytest.mark.parametrize("where", PLACES)
def test_outputs_clipping_and_weights(where, head, make_loss, make):
    loss_fn = make_loss("cuda" if where is GPU else "cpu")
    module = nn.Sequential(nn.Linear(12, 9), nn.Tanh(), nn.Linear(9, 5), head())
    both, device = pair(where, module, make, loss_fn, clip_grad_norm=0.2, returns=True)
    for rows in (16, 7, 16):
        x = torch.randn(rows, 12, device=device)
        y = (x[:, :5].argmax(1) if isinstance(loss_fn, nn.NLLLoss) else (x[:, :5] > 0.0).float(),)
        if loss_fn is dqn:
            y = x[:, :5].argmax(1, keepdim=True), x[:, 0]
        both.check(x, *y)
    both.same()
    both.same_moments()


@pytest.mark.parametrize("where", [pytest.param(GPU, id=GPU.name, marks=marks_of(GPU))])
def test_layers_on_a_gpu(where):
    net = FusedMLP([12, 9, 5], activation="gelu", device="cuda")
    eager = nn.Sequential(nn.Linear(12, 9), nn.GELU(), nn.Linear(9, 5)).to("cuda")
    eager.load_state_dict(net.state_dict())
    x = torch.randn(16, 12, device="cuda")
    net(x).square().mean().backward()
    eager(x).square().mean().backward()
    for own, theirs in zip(net.parameters(), eager.parameters(), strict=True):
        torch.testing.assert_close(own.grad, theirs.grad, **CLOSE)
