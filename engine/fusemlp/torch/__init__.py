"""The door for PyTorch: a training step fused over a module's own parameters, and fused layers with autograd."""

from __future__ import annotations

from fusemlp.torch.step import FusedStep, fuse

__all__ = ["FusedStep", "fuse"]
