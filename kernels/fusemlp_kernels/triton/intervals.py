"""Binding the calls of training with intervals."""

from __future__ import annotations

from dataclasses import astuple
from types import SimpleNamespace
from typing import Any

from fusemlp_kernels.checks import binds
from fusemlp_kernels.contract import NEEDS_Z
from fusemlp_kernels.triton import boxes, configs
from fusemlp_kernels.triton.launch import Device, Run, Tensor, in_sequence
from fusemlp_kernels.triton.layers import NOT_IN_LOSS, activation_of, launch_loss_grad, places

SWEPT = {"BLOCK": configs.SWEEP.columns}


def _step(vector: Tensor | None) -> int:
    return 0 if vector is None else vector.stride(0)


def launch_turn(device: Device, source: Tensor, signs: Tensor, turned: Tensor) -> Run:
    """``turned`` = ``source``, float32 matrices, with another sign where that of ``signs`` is not above 0."""
    arguments = {"K": source.shape[1], **places(source, source=source, signs=signs, turned=turned)}
    return device.launch(boxes.turn_kernel, source.shape[0], arguments, SWEPT, configs.SWEEP)


@binds("magnitudes")
def bind_magnitudes(device: Device, given: SimpleNamespace) -> Run:
    """The contract's ``magnitudes``."""
    return launch_turn(device, given.w, given.w, given.out)


def _rows_and_ramp(device: Device, given: SimpleNamespace) -> dict[str, Any]:
    return {
        "rows": device.zeros(1, "int64") if given.rows is None else given.rows, "gather": int(given.rows is not None),
        "counters": given.counters, "ramp": device.numbers(astuple(given.ramp), "float64"),
    }  # fmt: skip


@binds("ball")
def bind_ball(device: Device, given: SimpleNamespace) -> Run:
    """The contract's ``ball``."""
    ends = {"least": given.least, "most": given.most}
    arguments = {
        "K": given.K, **places(given.x, x=given.x, centre=given.centre, radius=given.radius),
        "reach": given.reach, "reach_step": _step(given.reach),
        **{name: given.reach if end is None else end for name, end in ends.items()},
        **{f"{name}_step": _step(end) for name, end in ends.items()},
        "above": int(given.least is not None), "below": int(given.most is not None), **_rows_and_ramp(device, given),
    }  # fmt: skip
    return device.launch(boxes.ball_kernel, given.M, arguments, SWEPT, configs.SWEEP)


def _launch_box(device: Device, given: SimpleNamespace, back: bool, **matrices: Tensor) -> Run:
    arguments = {
        "N": given.N, **places(given.zc, zc=given.zc, zr=given.zr, **matrices),
        **activation_of(given, device.zeros(1, "real")),
    }  # fmt: skip
    return device.launch(boxes.box_kernel, given.M, arguments, {"BACK": back, **SWEPT}, configs.SWEEP)


@binds("box")
def bind_box(device: Device, given: SimpleNamespace) -> Run:
    """The contract's ``box``."""
    ends = {"lower": given.low, "upper": given.high}
    return _launch_box(device, given, False, **ends, centre=given.centre, radius=given.radius)


@binds("box_grad")
def bind_box_grad(device: Device, given: SimpleNamespace) -> Run:
    """The contract's ``box_grad``."""
    lower, upper = (given.zc, given.zr) if given.activation in NEEDS_Z else (given.low, given.high)
    return _launch_box(device, given, True, lower=lower, upper=upper, centre=given.dc, radius=given.dr)


@binds("worst_loss_grad", without=NOT_IN_LOSS)
def bind_worst_loss_grad(device: Device, given: SimpleNamespace) -> Run:
    """The contract's ``worst_loss_grad``; dzc has the worst logits first, and then their gradient."""
    names = ("zc", "zr", "dzc", "dzr", "dz")
    arguments = {
        "N": given.N, **places(given.zc, **{name: getattr(given, name) for name in names}), "labels": given.target,
        "label_step": _step(given.target), **_rows_and_ramp(device, given),
    }  # fmt: skip
    before, after = (
        device.launch(boxes.worst_kernel, given.M, arguments, {"BACK": back, **SWEPT}, configs.SWEEP)
        for back in (False, True)
    )
    return in_sequence([before, launch_loss_grad(device, given, given.dzc, given.dzc), after])
