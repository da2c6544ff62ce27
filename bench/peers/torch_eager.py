"""PyTorch, eager: an ``nn.Sequential`` and ``torch.optim.SGD`` over a tensor in memory, without a DataLoader.

The rows are shuffled once an epoch and the batches are slices of the result, which is quicker than an index for each
batch. SGD runs as it does by default on a CPU, tensor by tensor: quicker here than ``foreach`` and ``fused``.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn.functional import cross_entropy

from bench.cases import Array, Case, Data


class TorchTrainer:
    """See ``peers.Trainer``."""

    def __init__(self, case: Case, data: Data) -> None:
        self.data = data
        self.batch_size = case.batch_size
        self.X, self.y = torch.from_numpy(data.X), torch.from_numpy(data.y)
        layers: list[nn.Module] = []
        for inputs, outputs in zip(case.sizes, case.sizes[1:], strict=False):
            layers += [nn.Linear(inputs, outputs), nn.ReLU()]
        self.model = nn.Sequential(*layers[:-1])
        self.linears = [layer for layer in self.model if isinstance(layer, nn.Linear)]
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=case.learning_rate)
        self.loss = float("nan")
        self.reset()

    def reset(self) -> None:
        with torch.no_grad():
            for linear, (weight, bias) in zip(self.linears, self.data.parameters, strict=True):
                linear.weight.copy_(torch.from_numpy(weight))
                linear.bias.copy_(torch.from_numpy(bias))

    def train(self, epochs: int) -> None:
        for _ in range(epochs):
            self._epoch(torch.randperm(len(self.X)))

    def train_in_order(self, order: Array) -> None:
        self._epoch(torch.from_numpy(order))

    def _epoch(self, order: torch.Tensor) -> None:
        model, optimizer = self.model, self.optimizer
        losses = []
        X, y = self.X[order].split(self.batch_size), self.y[order].split(self.batch_size)
        for batch, labels in zip(X, y, strict=True):
            loss = cross_entropy(model(batch), labels)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            losses.append(loss.detach())
        self.loss = torch.stack(losses).mean().item()

    def parameters(self) -> list[tuple[Array, Array]]:
        return [(linear.weight.detach().numpy(), linear.bias.detach().numpy()) for linear in self.linears]


def prepare(case: Case, data: Data) -> TorchTrainer:
    """See ``peers.prepare``."""
    return TorchTrainer(case, data)
