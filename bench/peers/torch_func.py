"""PyTorch, many models at once: parameters stacked, ``torch.func.vmap`` of the gradient, one optimizer for all.

The optimizers work element by element, so ``torch.optim`` updates the stacked parameters directly. Each model draws its
batches in its own order.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.func import functional_call, grad_and_value, vmap

from bench.cases import Array, Case, Data, Parameters
from bench.peers.torch_eager import LOSSES, network


class StackedTrainer:
    """See ``peers.Trainer``."""

    def __init__(self, case: Case, data: Data) -> None:
        assert case.models is not None
        self.case, self.data = case, data
        self.models = case.models
        self.device = torch.device("cuda" if case.device == "gpu" else "cpu")
        torch.set_float32_matmul_precision("high" if case.precision == "tf32" else "highest")
        self.X = torch.from_numpy(data.X).to(self.device)
        self.y = torch.from_numpy(data.y).to(self.device)
        self.model = network(case).to("meta")
        names = [name for name, _ in self.model.named_parameters()]
        arrays = [array for pair in data.parameters for array in pair]
        self.initial = [torch.from_numpy(array).to(self.device) for array in arrays]
        self.stacked = {name: one.clone().requires_grad_() for name, one in zip(names, self.initial, strict=True)}
        kind = torch.optim.Adam if case.optimizer == "adam" else torch.optim.SGD
        self.optimizer = kind(list(self.stacked.values()), lr=case.learning_rate)

        def loss(parameters: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
            return LOSSES[case.loss](functional_call(self.model, parameters, (x,)), y)

        self.gradients = vmap(grad_and_value(loss))

    def reset(self) -> None:
        with torch.no_grad():
            for own, first in zip(self.stacked.values(), self.initial, strict=True):
                own.copy_(first)
        self.optimizer.state.clear()

    def train(self, epochs: int) -> None:
        for _ in range(epochs):
            # Sorting random keys gives each model its order in one call.
            orders = torch.rand(self.models, len(self.X), device=self.device).argsort(dim=1)
            self.epoch(orders).mean(dim=0).cpu()

    def losses(self, order: Array) -> Array:
        rows = torch.from_numpy(order).to(self.device)
        return self.epoch(rows.expand(self.models, -1)).cpu().numpy()

    def epoch(self, orders: Tensor) -> Tensor:
        """Make a pass over the rows of ``orders`` (models, rows); return the losses (steps, models)."""
        losses = []
        for rows in orders.split(self.case.batch_size, dim=1):
            gradients, loss = self.gradients(self.stacked, self.X[rows], self.y[rows])
            for name, parameter in self.stacked.items():
                parameter.grad = gradients[name]
            self.optimizer.step()
            losses.append(loss.detach())
        return torch.stack(losses)

    def parameters(self) -> Parameters:
        arrays = [one.detach().cpu().numpy() for one in self.stacked.values()]
        return list(zip(arrays[::2], arrays[1::2], strict=True))


def prepare(case: Case, data: Data) -> StackedTrainer:
    """See ``peers.prepare``."""
    return StackedTrainer(case, data)
