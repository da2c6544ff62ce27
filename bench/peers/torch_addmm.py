"""PyTorch, the step of plain SGD written by hand: each weight is updated by the product that makes its gradient.

``W.addmm_(dY.T, X, beta=1, alpha=-lr)`` is the one way in which torch, too, updates a weight in the epilogue of a
matrix product. On a GPU the whole step is captured in a CUDA graph.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from bench.cases import Case, Data
from bench.peers.torch_eager import TorchTrainer
from bench.peers.torch_graph import GraphTrainer


def hand_step(linears: list[Any], activation: str, rate: float, x: Tensor, y: Tensor) -> Tensor:
    """Return the mean loss of a batch x (M, K), y (M,), and update weights and biases."""
    inputs = [x]
    for layer in linears[:-1]:
        z = torch.addmm(layer.bias, inputs[-1], layer.weight.t())
        inputs.append(z.tanh_() if activation == "tanh" else z.relu_())
    last = linears[-1]
    log_p = torch.addmm(last.bias, inputs[-1], last.weight.t()).log_softmax(dim=1)
    picked = y[:, None]
    loss = log_p.gather(1, picked).mean().neg_()
    dz = log_p.exp_().scatter_add_(1, picked, torch.full_like(picked, -1, dtype=log_p.dtype)).div_(len(y))
    for index in reversed(range(len(linears))):
        layer, h = linears[index], inputs[index]
        if index:
            dh = torch.mm(dz, layer.weight)
            dh.mul_(1 - h * h) if activation == "tanh" else dh.mul_(h > 0)
        layer.weight.addmm_(dz.t(), h, beta=1, alpha=-rate)
        layer.bias.add_(dz.sum(dim=0), alpha=-rate)
        if index:
            dz = dh
    return loss


class AddmmTrainer(TorchTrainer):
    """See ``peers.Trainer``."""

    @torch.no_grad()
    def epoch(self, order: Tensor) -> Tensor:
        size, rate, activation = self.case.batch_size, self.case.learning_rate, self.case.activation
        batches = zip(self.X[order].split(size), self.y[order].split(size), strict=True)
        return torch.stack([hand_step(self.linears, activation, rate, x, y) for x, y in batches])


class AddmmGraphTrainer(GraphTrainer):
    """See ``peers.Trainer``."""

    @torch.no_grad()
    def step(self) -> None:
        rows = self.order[self.start + self.within]
        case = self.case
        self.advance(hand_step(self.linears, case.activation, case.learning_rate, self.X[rows], self.y[rows]))


def prepare(case: Case, data: Data) -> TorchTrainer:
    """See ``peers.prepare``."""
    return AddmmGraphTrainer(case, data) if case.device == "gpu" else AddmmTrainer(case, data)
