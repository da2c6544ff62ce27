"""``fuse`` on the Triton backend, under its interpreter and on a GPU: the parameters are views of its tensors."""

import copy

import pytest
import torch
from devices import GPU, INTERPRETER, marks_of
from torch import nn

from fusemlp.torch import FusedMLP, fuse

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


@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS.keys())
@pytest.mark.parametrize("where", PLACES)
def test_fused_steps(where, make, record_property):
    device = "cuda" if where is GPU else "cpu"
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(12, 9), nn.ReLU(), nn.Linear(9, 5)).to(device)
    twin = copy.deepcopy(module)
    optimizer, eager = (make(list(one.parameters())) for one in (module, twin))
    loss_fn = nn.CrossEntropyLoss()
    step = fuse(module, loss_fn, optimizer, backend="triton")
    assert step.backend == "triton"
    for number, rows in enumerate((16, 7, 16)):
        x, y = torch.randn(rows, 12, device=device), torch.randint(0, 5, (rows,), device=device)
        y[2] = -100
        loss = step(x, y)
        eager.zero_grad()
        expected = loss_fn(twin(x), y)
        expected.backward()
        eager.step()
        torch.testing.assert_close(loss, expected.detach(), **CLOSE)
        if number == 1:
            optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    torch.testing.assert_close(module.state_dict(), twin.state_dict(), **CLOSE)
    torch.testing.assert_close(optimizer.state_dict()["state"], eager.state_dict()["state"], **CLOSE)
    record_property("line: torch parity cases", 1)


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
def test_outputs_clipping_and_weights(where, head, make_loss, make, record_property):
    device = "cuda" if where is GPU else "cpu"
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(12, 9), nn.Tanh(), nn.Linear(9, 5), head()).to(device)
    twin = copy.deepcopy(module)
    optimizer, eager = (make(list(one.parameters())) for one in (module, twin))
    loss_fn = make_loss(device)
    step = fuse(module, loss_fn, optimizer, backend="triton", clip_grad_norm=0.2)
    for rows in (16, 7, 16):
        x = torch.randn(rows, 12, device=device)
        y = (x[:, :5].argmax(1) if isinstance(loss_fn, nn.NLLLoss) else (x[:, :5] > 0.0).float(),)
        if loss_fn is dqn:
            y = x[:, :5].argmax(1, keepdim=True), x[:, 0]
        loss, output = step(x, *y, return_output=True)
        eager.zero_grad()
        outputs = twin(x)
        expected = loss_fn(outputs, *y)
        expected.backward()
        nn.utils.clip_grad_norm_(twin.parameters(), 0.2)
        eager.step()
        torch.testing.assert_close((loss, output), (expected.detach(), outputs.detach()), **CLOSE)
    torch.testing.assert_close(module.state_dict(), twin.state_dict(), **CLOSE)
    torch.testing.assert_close(optimizer.state_dict()["state"], eager.state_dict()["state"], **CLOSE)
    record_property("line: torch parity cases", 1)


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
