"""PyTorch, compiled: ``torch.compile`` of network and loss, their backward with it; max-autotune on a GPU.

On a CPU the mode is the default: max-autotune is no faster there and takes minutes longer to compile.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from bench.cases import Case, Data
from bench.peers.torch_eager import TorchTrainer


class CompiledTrainer(TorchTrainer):
    """See ``peers.Trainer``."""

    def __init__(self, case: Case, data: Data) -> None:
        super().__init__(case, data)
        eager = super().batch_loss
        self.compiled = torch.compile(eager, mode="max-autotune") if case.device == "gpu" else torch.compile(eager)

    def make_optimizer(self, **options: Any) -> torch.optim.Optimizer:
        return super().make_optimizer(**options, **({"fused": True} if self.case.device == "gpu" else {}))

    def batch_loss(self, x: Tensor, y: Tensor) -> Tensor:
        # max-autotune replays its own graph, and the next step would overwrite the returned loss.
        if self.case.device == "gpu":
            torch.compiler.cudagraph_mark_step_begin()
            return self.compiled(x, y).clone()
        loss: Tensor = self.compiled(x, y)
        return loss


def prepare(case: Case, data: Data) -> CompiledTrainer:
    """See ``peers.prepare``."""
    return CompiledTrainer(case, data)
