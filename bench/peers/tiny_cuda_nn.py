"""tiny-cuda-nn: its fully fused network where the widths allow it, else its CUTLASS one; torch's loss and optimizer.

Its networks have no biases and compute in half precision with single-precision parameters; the benchmark and the oracle
treat them so. The parameters are one flat array, layer after layer, each (outputs, inputs) and padded to multiples of
16.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import tinycudann
import torch
from torch import Tensor

from bench.cases import Case, Data, Parameters
from bench.peers.torch_eager import LOSSES, TorchTrainer

FUSED_WIDTHS = (16, 32, 64, 128)
MULTIPLE = 16


class TinyTrainer(TorchTrainer):
    """See ``peers.Trainer``."""

    def __init__(self, case: Case, data: Data) -> None:
        width = case.sizes[1]
        self.tiny: Any = tinycudann.Network(
            n_input_dims=case.sizes[0],
            n_output_dims=case.sizes[-1],
            network_config={
                "otype": "FullyFusedMLP" if width in FUSED_WIDTHS else "CutlassMLP",
                "activation": "Tanh" if case.activation == "tanh" else "ReLU",
                "output_activation": "None",
                "n_neurons": width,
                "n_hidden_layers": len(case.sizes) - 2,
            },
        )
        super().__init__(case, data)

    def make_optimizer(self, **options: Any) -> torch.optim.Optimizer:
        kind = torch.optim.Adam if self.case.optimizer == "adam" else torch.optim.SGD
        return kind(self.tiny.parameters(), lr=self.case.learning_rate, fused=True)

    def batch_loss(self, x: Tensor, y: Tensor) -> Tensor:
        return LOSSES[self.case.loss](self.tiny(x).float(), y)

    def reset(self) -> None:
        flat = []
        for weight, _ in self.data.parameters:
            outputs, inputs = (-(-side // MULTIPLE) * MULTIPLE for side in weight.shape)
            padded = np.zeros((outputs, inputs), np.float32)
            padded[: weight.shape[0], : weight.shape[1]] = weight
            flat.append(padded.ravel())
        with torch.no_grad():
            self.tiny.params.copy_(torch.from_numpy(np.concatenate(flat)))
        self.optimizer.state.clear()

    def parameters(self) -> Parameters:
        flat, place, found = self.tiny.params.detach().float().cpu().numpy(), 0, []
        for weight, bias in self.data.parameters:
            outputs, inputs = (-(-side // MULTIPLE) * MULTIPLE for side in weight.shape)
            padded = flat[place : place + outputs * inputs].reshape(outputs, inputs)
            found.append((padded[: weight.shape[0], : weight.shape[1]], np.zeros_like(bias)))
            place += outputs * inputs
        return found


def prepare(case: Case, data: Data) -> TinyTrainer:
    """See ``peers.prepare``."""
    return TinyTrainer(case, data)
