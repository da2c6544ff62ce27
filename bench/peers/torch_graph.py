"""PyTorch on a GPU: the whole step, with the draw of its batch and a fused optimizer, captured in one CUDA graph.

A replay takes the next rows of the epoch by a counter on the device, so nothing is copied between steps.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from bench.cases import Array, Case, Data
from bench.peers.torch_eager import TorchTrainer

WARM_UPS = 3


class GraphTrainer(TorchTrainer):
    """See ``peers.Trainer``."""

    def __init__(self, case: Case, data: Data) -> None:
        self.graph: torch.cuda.CUDAGraph | None = None
        super().__init__(case, data)
        self.order = torch.arange(len(self.X), device=self.device)
        self.start = torch.zeros(1, dtype=torch.int64, device=self.device)
        self.within = torch.arange(case.batch_size, device=self.device)
        self.loss = torch.zeros((), device=self.device)
        self.total = torch.zeros((), device=self.device)
        self.capture()
        self.reset()

    def make_optimizer(self, **options: Any) -> torch.optim.Optimizer:
        capturable = {"capturable": True} if self.case.optimizer == "adam" else {}
        return super().make_optimizer(**options, fused=True, **capturable)

    def step(self) -> None:
        """Run one step; a graph captures this."""
        rows = self.order[self.start + self.within]
        self.optimizer.zero_grad(set_to_none=True)
        loss = self.batch_loss(self.X[rows], self.y[rows])
        loss.backward()
        self.optimizer.step()
        self.advance(loss.detach())

    def advance(self, loss: Tensor) -> None:
        """Record the loss and advance to the next rows."""
        self.loss.copy_(loss)
        self.total.add_(loss)
        self.start.add_(self.case.batch_size)

    def capture(self) -> None:
        """Capture ``step``, after warm-up steps on a side stream, as torch requires."""
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(WARM_UPS):
                self.start.zero_()
                self.step()
        torch.cuda.current_stream().wait_stream(side)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.step()

    def reset(self) -> None:
        kept = dict(self.optimizer.state)
        super().reset()
        # The graph updates these tensors in place: clear them, do not replace them.
        self.optimizer.state.update(kept)
        for state in kept.values():
            for tensor in state.values():
                if tensor is not None:
                    tensor.zero_()

    def train(self, epochs: int) -> None:
        for _ in range(epochs):
            self.begin(torch.randperm(len(self.X), device=self.device))
            for _ in range(self.case.steps):
                self.replay()
            (self.total / self.case.steps).item()

    def losses(self, order: Array) -> Array:
        losses = []
        for rows in order.reshape(-1, self.case.batch_size):
            self.begin(torch.from_numpy(rows).to(self.device))
            self.replay()
            losses.append(self.loss.item())
        return np.array(losses)

    def begin(self, rows: Tensor) -> None:
        """Start the next replays with these rows."""
        self.order[: len(rows)].copy_(rows)
        self.start.zero_()
        self.total.zero_()

    def replay(self) -> None:
        """Replay one step."""
        assert self.graph is not None
        self.graph.replay()


def prepare(case: Case, data: Data) -> GraphTrainer:
    """See ``peers.prepare``."""
    return GraphTrainer(case, data)
