"""PyTorch, eager: an ``nn.Sequential`` and ``torch.optim`` over a tensor in memory, without a DataLoader.

The rows are shuffled once an epoch and the batches are slices of the result, which is faster than an index for each
batch. The optimizer runs with its defaults: on a CPU tensor by tensor, which is faster there than ``foreach`` and
``fused``.
"""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, mse_loss

from bench.cases import Array, Case, Data, Parameters

LOSSES = {"cross_entropy": cross_entropy, "mse": mse_loss}


def network(case: Case) -> nn.Sequential:
    """Return the case's network, on the CPU."""
    layers: list[nn.Module] = []
    for inputs, outputs in zip(case.sizes, case.sizes[1:], strict=False):
        layers += [nn.Linear(inputs, outputs), nn.Tanh() if case.activation == "tanh" else nn.ReLU()]
        if case.dropout:
            layers.append(nn.Dropout(case.dropout))
    last = max(index for index, layer in enumerate(layers) if isinstance(layer, nn.Linear))
    return nn.Sequential(*layers[: last + 1])


class TorchTrainer:
    """See ``peers.Trainer``."""

    def __init__(self, case: Case, data: Data) -> None:
        self.case, self.data = case, data
        self.device = torch.device("cuda" if case.device == "gpu" else "cpu")
        torch.set_float32_matmul_precision("high" if case.precision == "tf32" else "highest")
        self.X = torch.from_numpy(data.X).to(self.device)
        self.y = torch.from_numpy(data.y).to(self.device)
        self.model = network(case).to(self.device)
        self.linears = [layer for layer in self.model if isinstance(layer, nn.Linear)]
        self.optimizer = self.make_optimizer()
        self.reset()

    def make_optimizer(self, **options: Any) -> torch.optim.Optimizer:
        """Return the case's optimizer."""
        kind = torch.optim.Adam if self.case.optimizer == "adam" else torch.optim.SGD
        return kind(self.model.parameters(), lr=self.case.learning_rate, **options)

    def batch_loss(self, x: Tensor, y: Tensor) -> Tensor:
        """Return the mean loss of a batch."""
        with self.casting():
            return LOSSES[self.case.loss](self.model(x), y)

    def casting(self) -> contextlib.AbstractContextManager[Any]:
        """Return torch's autocast context for a case in bf16, else an empty one."""
        if self.case.precision == "bf16":
            return torch.autocast(self.device.type, dtype=torch.bfloat16)
        return contextlib.nullcontext()

    def reset(self) -> None:
        with torch.no_grad():
            for linear, (weight, bias) in zip(self.linears, self.data.parameters, strict=True):
                linear.weight.copy_(torch.from_numpy(weight))
                linear.bias.copy_(torch.from_numpy(bias))
        self.optimizer.state.clear()

    def train(self, epochs: int) -> None:
        for _ in range(epochs):
            self.epoch(torch.randperm(len(self.X), device=self.device)).mean().item()

    def losses(self, order: Array) -> Array:
        return self.epoch(torch.from_numpy(order).to(self.device)).cpu().numpy()

    def epoch(self, order: Tensor) -> Tensor:
        """Make a pass over the rows of ``order``; return the losses (steps,)."""
        optimizer = self.optimizer
        losses = []
        size = self.case.batch_size
        for batch, labels in zip(self.X[order].split(size), self.y[order].split(size), strict=True):
            loss = self.batch_loss(batch, labels)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            losses.append(loss.detach())
        return torch.stack(losses)

    def parameters(self) -> Parameters:
        return [(one.weight.detach().cpu().numpy(), one.bias.detach().cpu().numpy()) for one in self.linears]


def prepare(case: Case, data: Data) -> TorchTrainer:
    """See ``peers.prepare``."""
    return TorchTrainer(case, data)
