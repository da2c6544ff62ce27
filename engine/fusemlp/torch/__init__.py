"""The door for PyTorch: a training step fused over a module's own parameters, and fused layers with autograd."""

from __future__ import annotations

from fusemlp.torch.convert import from_torch, to_torch
from fusemlp.torch.layers import FusedLinear, FusedMLP
from fusemlp.torch.step import FusedStep, fuse

__all__ = ["FusedLinear", "FusedMLP", "FusedStep", "from_torch", "fuse", "to_torch"]
