"""Check the batch of a fused step, once for each shape."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fusemlp.describe.losses import Loss
from fusemlp.torch.modules import Reading
from fusemlp_kernels.errors import ArgumentError, ArgumentTypeError, DTypeError, ShapeError


def check_tensors(x: Any, y: Any, device: torch.device) -> None:
    """Check that x and y are tensors on the module's device; raises ArgumentTypeError or ArgumentError."""
    for name, value in (("x", x), ("y", y)):
        if not isinstance(value, Tensor):
            raise ArgumentTypeError(f"{name}: expected a torch.Tensor, got {type(value).__name__}; use torch.as_tensor")
        if value.device != device:
            raise ArgumentError(f"{name}: is on {value.device}, the module on {device}; use {name}.to({str(device)!r})")
        if value.layout != torch.strided:
            raise ArgumentTypeError(f"{name}: expected a dense tensor, got {value.layout}; use {name}.to_dense()")
        if value.requires_grad:
            raise ArgumentError(
                f"{name}: requires grad, and a fused step gives none to its inputs; pass {name}.detach(), or use "
                "FusedMLP in an eager loop"
            )


def check_shapes(x: Tensor, y: Tensor, reading: Reading, loss: Loss) -> str:
    """Return the kind of the targets: "labels", "soft" or "values". Raises ShapeError or DTypeError.

    x (m, K), or after a leading Flatten any (m, ...) with K elements a row. y (m,) int64 or (m, N) for cross-entropy,
    else the output's shape.
    """
    width, outputs = reading.network.sizes[0], reading.network.sizes[-1]
    shape, dtype = tuple(x.shape), reading.dtype
    if x.dim() < 2 or (x.dim() > 2 and not reading.flattens) or x.shape[1:].numel() != width:
        wanted = f"(rows, ...) of {width} elements a row" if reading.flattens else f"(rows, {width})"
        raise ShapeError(f"x: expected shape {wanted}, got {shape}; the first Linear has in_features={width}")
    if shape[0] == 0:
        raise ShapeError(f"x: expected at least one row, got shape {shape}")
    if x.dtype != dtype:
        raise DTypeError(f"x: expected {dtype}, the module's type, got {x.dtype}; use x.to({dtype})")
    rows = shape[0]
    target = tuple(y.shape)
    soft = not reading.log_softmax and target == (rows, outputs) and y.dtype.is_floating_point
    if loss.kind == "cross_entropy" and not soft:
        if target != (rows,):
            other = "" if reading.log_softmax else f" or ({rows}, {outputs}) for probabilities"
            raise ShapeError(f"y: expected shape ({rows},) for class indices{other}, got {target}")
        if y.dtype != torch.int64:
            raise DTypeError(f"y: expected class indices in torch.int64, got {y.dtype}; use y.long()")
        return "labels"
    output = (rows,) if reading.squeezes else (rows, outputs)
    if target != output:
        raise ShapeError(
            f"y: expected shape {output}, the shape of the module's output, got {target}; torch would broadcast them"
        )
    if y.dtype != dtype:
        raise DTypeError(f"y: expected {dtype}, the module's type, got {y.dtype}; use y.to({dtype})")
    return "soft" if loss.kind == "cross_entropy" else "values"
