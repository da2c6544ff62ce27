"""Fused steps on the Triton backend, under Triton's interpreter; run by ``test_torch_triton``."""

from __future__ import annotations

import copy

import torch
from torch import nn

from fusemlp.torch import fuse

# A handful of float32 steps of two implementations from one state, on numbers of order one.
CLOSE = {"rtol": 1e-5, "atol": 1e-6}


def fused_steps() -> None:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(12, 9), nn.ReLU(), nn.Linear(9, 5))
    twin = copy.deepcopy(module)
    groups = [
        [{"params": list(one[0].parameters()), "lr": 0.01}, {"params": list(one[2].parameters())}]
        for one in (module, twin)
    ]
    optimizer, eager = (torch.optim.SGD(one, lr=0.1, momentum=0.9) for one in groups)
    loss_fn = nn.CrossEntropyLoss()
    step = fuse(module, loss_fn, optimizer, backend="triton")
    for number, rows in enumerate((16, 7, 16)):
        x, y = torch.randn(rows, 12), torch.randint(0, 5, (rows,))
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
    torch.testing.assert_close(optimizer.state_dict(), eager.state_dict(), **CLOSE)


if __name__ == "__main__":
    fused_steps()
