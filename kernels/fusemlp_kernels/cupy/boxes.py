"""Binding the calls of training with intervals: boxes of a layer's values, the worst case, and their gradients."""

from __future__ import annotations

from dataclasses import asdict
from types import SimpleNamespace
from typing import Any

from fusemlp_kernels.checks import binds
from fusemlp_kernels.contract import NEEDS_Z
from fusemlp_kernels.cupy.device import Array, Device, Run, in_sequence
from fusemlp_kernels.cupy.layers import activation_fields
from fusemlp_kernels.cupy.losses import launch_loss
from fusemlp_kernels.cupy.products import lane_blocks


def _launch(device: Device, kernel: str, rows: int, columns: int, **fields: Any) -> Run:
    """Return an element-wise kernel over matrices (rows, columns)."""
    return device.launch("boxes", kernel, lane_blocks(rows, columns), **fields, rows=rows, columns=columns)


def bind_turn(device: Device, source: Array, signs: Array, turned: Array) -> Run:
    """Return the run of ``turned`` = ``source``, with another sign where that of ``signs`` is not above 0."""
    return _launch(device, "turn", *source.shape, source=source, signs=signs, turned=turned)


@binds("magnitudes")
def bind_magnitudes(device: Device, given: SimpleNamespace) -> Run:
    """Bind the contract's ``magnitudes``."""
    return bind_turn(device, given.w, given.w, given.out)


def _in_batch(given: SimpleNamespace, *names: str) -> dict[str, Any]:
    """Return the kernels' fields for some arrays, for the rows of the batch and for the ramp."""
    arrays = {name: getattr(given, name) for name in names}
    return {**arrays, "indices": given.rows, "counters": given.counters, **asdict(given.ramp)}


@binds("ball")
def bind_ball(device: Device, given: SimpleNamespace) -> Run:
    """Bind the contract's ``ball``."""
    fields = _in_batch(given, "x", "centre", "radius", "reach", "least", "most")
    return _launch(device, "ball", given.M, given.K, **fields)


def _bind_box(device: Device, kernel: str, given: SimpleNamespace, **arrays: Array) -> Run:
    return _launch(device, kernel, given.M, given.N, **arrays, **activation_fields(given))


@binds("box")
def bind_box(device: Device, given: SimpleNamespace) -> Run:
    """Bind the contract's ``box``."""
    names = ("zc", "zr", "low", "high", "centre", "radius")
    return _bind_box(device, "box", given, **{name: getattr(given, name) for name in names})


@binds("box_grad")
def bind_box_grad(device: Device, given: SimpleNamespace) -> Run:
    """Bind the contract's ``box_grad``."""
    low, high = (given.zc, given.zr) if given.activation in NEEDS_Z else (given.low, given.high)
    return _bind_box(device, "box_grad", given, low=low, high=high, centre=given.dc, radius=given.dr)


@binds("worst_loss_grad", without=["ridge", "shares"])
def bind_worst_loss_grad(device: Device, given: SimpleNamespace) -> Run:
    """Bind the contract's ``worst_loss_grad``; dzc has the worst logits first, and then their gradient."""
    fields = _in_batch(given, "zc", "zr", "dzc", "dzr", "dz") | {"labels": given.target}
    before, after = (_launch(device, kernel, given.M, given.N, **fields) for kernel in ("worst", "worst_grad"))
    given.dz = given.dzc
    return in_sequence([before, launch_loss(device, "stored_loss", given, given.dzc), after])
