"""The door for PyTorch: a training step fused over a module's own parameters, batches, and layers with autograd."""

import importlib.util

if importlib.util.find_spec("torch") is None:
    raise ImportError("fusemlp.torch needs PyTorch, which is not installed: pip install torch")

from fusemlp.torch.batches import Batches
from fusemlp.torch.layers import FusedLinear, FusedMLP
from fusemlp.torch.parameters import from_torch, to_torch
from fusemlp.torch.step import FusedStep, fuse

__all__ = ["Batches", "FusedLinear", "FusedMLP", "FusedStep", "from_torch", "fuse", "to_torch"]
