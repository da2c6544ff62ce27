"""Binding the calls of a plain layer, and of the clock alone."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch

from fusemlp_kernels import contract as c
from fusemlp_kernels.checks import binds
from fusemlp_kernels.contract import ACTIVATIONS, LOSSES, NEEDS_Z, NO_DROPOUT, STATS, Dropout, LossSpec
from fusemlp_kernels.errors import ArgumentError
from fusemlp_kernels.ops import FIXED, OPS
from fusemlp_kernels.triton import clock, configs, gradients, linear, loss
from fusemlp_kernels.triton.launch import LARGEST_INDEX, Run, Tensor, TritonDevice, in_sequence, is_aligned, signed

# Operands for backends that gather in memory or store masks, and those of train_resident.
NOT_IN_LOAD = ("gathered", "keep")
NOT_IN_LOSS = ("gathered", "ridge")
# Arrays that a call may leave out; its kernel gets spare memory for them.
OPTIONAL = {
    operand.name: operand
    for op in OPS.values()
    for operand in op.operands
    if operand.shape is not None and (operand.optional or operand.nullable)
}


def arguments_of(device: TritonDevice, kernel: Any, call: SimpleNamespace, **others: Any) -> dict[str, Any]:
    """Return the arguments of a kernel, by the names of its parameters: the operands of the call, and ``others``.

    A matrix x has its strides in x_row and x_col, a vector b in b_step.
    """
    values = vars(call) | others
    offered = dropout_numbers(values.get("dropout")) | {
        "gather": int(values.get("rows") is not None),
        "x_gather": int(values.get("x_rows") is not None),
        "scaled": int(values.get("hyper") is not None),
    }
    for name, value in values.items():
        strides = value.stride() if isinstance(value, Tensor) else (0, 0)
        if value is None and name in OPTIONAL and name in kernel.arg_names:
            operand = OPTIONAL[name]
            value = device.zeros(FIXED.get(operand.shape or "", 1), operand.dtype)
        sides = ("step",) if len(strides) == 1 else ("row", "col")
        offered |= {name: value, **{f"{name}_{side}": step for side, step in zip(sides, strides, strict=False)}}
    if "activation" in offered:
        offered |= {"activation": ACTIVATIONS.index(call.activation), "slope": float(call.slope)}
    return {name: offered[name] for name in kernel.arg_names if name in offered}


def dropout_numbers(dropout: Dropout | None) -> dict[str, Any]:
    """The kernels' arguments for a layer's dropout; threshold 0 for none."""
    numbers = (dropout or NO_DROPOUT).numbers
    return numbers | {name: signed(numbers[name]) for name in ("key0", "key1")}


def are_aligned(*matrices: Tensor | None) -> bool:
    return all(is_aligned(matrix) for matrix in matrices if matrix is not None)


@binds("linear", without=NOT_IN_LOAD)
def bind_linear(device: TritonDevice, call: SimpleNamespace) -> Run:
    """The contract's ``linear``."""
    call.z = call.z if call.activation in NEEDS_Z else None
    aligned = are_aligned(call.x, call.w, call.y, call.z)
    tile = _product_tile(device, aligned, call.M, call.N, call.K)
    constants = {**tile.sides("MNK"), "PRODUCT": device.product, "ALIGNED": aligned}
    blocks = device.described(tile, linear.BLOCKS, constants, x=call.x, w=call.w) if call.rows is None else {}
    constants |= {"PARTS": tile.parts, "SPLIT": tile.split, "DESCRIBED": bool(blocks)}
    arguments = arguments_of(device, linear.linear_kernel, call, store_z=int(call.z is not None)) | blocks
    return device.launch(linear.linear_kernel, tile.count(call.M, call.N), arguments, constants, tile)


def _product_tile(device: TritonDevice, aligned: bool, rows: int, columns: int, reduction: int) -> configs.Tile:
    """Return the tile of ``linear`` or ``grad_input``."""
    deep = configs.deep_tile(device.arch, device.precision, rows, columns, reduction) if aligned else None
    shape = [(rows, columns)]
    return deep or configs.product_tile(device.arch, "forward", device.precision, shape, aligned=aligned)


@binds("grad_input", without=NOT_IN_LOAD)
def bind_grad_input(device: TritonDevice, call: SimpleNamespace) -> Run:
    """The contract's ``grad_input``."""
    call.y = call.z if call.activation in NEEDS_Z else call.y
    aligned = are_aligned(call.dz, call.w, call.y, call.dz_prev)
    tile = _product_tile(device, aligned, call.M, call.K, call.N)
    programs = tile.count(call.M, call.K)
    if programs == 0 and call.dslope is not None:
        return in_sequence([call.dslope.zero_])
    constants = {**tile.sides("MKN"), "PRODUCT": device.product, "ALIGNED": aligned}
    blocks = device.described(tile, gradients.INPUT_BLOCKS, constants, dz=call.dz, w=call.w)
    constants |= {"PARTS": tile.parts, "SPLIT": tile.split, "DESCRIBED": bool(blocks)}
    arguments = arguments_of(
        device, gradients.grad_input_kernel, call, out=call.dz_prev, programs=programs,
        partials=device.zeros(programs, "float64"), ticket=device.zeros(1, "int32"),
    )  # fmt: skip
    return device.launch(gradients.grad_input_kernel, programs, arguments | blocks, constants, tile)


def target_arguments(device: TritonDevice, call: SimpleNamespace) -> dict[str, Any]:
    """The kernels' arguments for the targets of a loss and for their weights."""
    target, weight, class_weight, ignored = call.target, call.weight, call.class_weight, call.loss.ignore_index or 0
    spare, number, classes = device.zeros(1, "real"), device.zeros(1, "int64"), target.dim() == 1
    target_row, target_col = (0, 0) if classes else target.stride()
    return {
        "labels": target if classes else number, "label_step": target.stride(0) if classes else 0,
        "target": spare if classes else target, "target_row": target_row, "target_col": target_col,
        "weight": spare if weight is None else weight, "weight_step": 0 if weight is None else weight.stride(0),
        "class_weight": spare if class_weight is None else class_weight.contiguous(),
        "ignored_low": signed(ignored), "ignored_high": signed(ignored >> 32),
    }  # fmt: skip


def loss_settings(spec: LossSpec, call: SimpleNamespace) -> list[float]:
    """``loss.SETTING_FIELDS`` of a loss beside the weights of a call."""
    each = 1 if spec.kind == "cross_entropy" else call.N
    settings = {
        "kind": LOSSES.index(spec.kind), "mean": {"sum": 0, "mean": 1, "rows": -each}[spec.reduction],
        "smoothing": spec.label_smoothing, "soft": spec.soft, "option": spec.option, "accuracy": spec.accuracy,
        "ignores": spec.ignore_index is not None, "weighted": call.weight is not None,
        "classes": call.class_weight is not None,
    }  # fmt: skip
    return [float(settings[name]) for name in loss.SETTING_FIELDS]


def _launch_loss(
    device: TritonDevice,
    call: SimpleNamespace,
    kernel: Any,
    tile: configs.Tile,
    constants: dict[str, Any],
    *matrices: Tensor,
    most: int = LARGEST_INDEX,
) -> Run:
    """A loss kernel over whole rows of the matrices that it reads, of at most ``most`` programs."""
    call.stats = device.zeros(STATS, "float64") if call.stats is None else call.stats
    programs = min(-(-call.M // tile.rows), most)
    arguments = arguments_of(
        device, kernel, call, store_dz=int(call.dz is not None), programs=programs,
        settings=device.numbers(loss_settings(call.loss, call), "real"),
        partials=device.zeros(4 * programs, "float64"), ticket=device.zeros(1, "int32"),
    ) | target_arguments(device, call)  # fmt: skip
    if call.M * call.N == 0:
        # the loss of no rows, or of no outputs, is zero
        return in_sequence([call.stats[:1].zero_, arguments["dslope"].zero_])
    constants |= {"ALIGNED": are_aligned(*matrices, call.dz), "CROSS_ENTROPY": call.loss.kind == "cross_entropy"}
    return device.launch(kernel, programs, arguments, constants, tile)


@binds("loss_grad", without=NOT_IN_LOSS)
def bind_loss_grad(device: TritonDevice, call: SimpleNamespace) -> Run:
    """The contract's ``loss_grad``; dz may be z."""
    spec, entropy = call.loss, call.loss.kind == "cross_entropy"
    tile = configs.loss_tile(device.precision, entropy, are_aligned(call.z, call.dz))
    labels = entropy and not spec.soft and (call.class_weight is None or not spec.label_smoothing)
    constants = {"BM": tile.rows, "BN": tile.columns, "LABELS": labels}
    most = tile.programs * device.arch.processors
    return _launch_loss(device, call, loss.loss_grad_kernel, tile, constants, call.z, most=most)


@binds("linear_loss_grad", without=NOT_IN_LOSS)
def bind_linear_loss_grad(device: TritonDevice, call: SimpleNamespace) -> Run:
    """The contract's ``linear_loss_grad``."""
    if call.N > configs.WIDEST_OUTPUT:
        raise ArgumentError(
            f"linear_loss_grad: w: {call.N} outputs are more than the {configs.WIDEST_OUTPUT} that fit a tile; "
            "use linear and loss_grad one after the other"
        )
    tile = configs.output_tile(device.arch, call.N)
    deep = configs.deep_tile(device.arch, device.precision, call.M, call.N, call.K, "deep_output")
    if deep is not None and call.N <= deep.columns and are_aligned(call.x, call.w, call.dz):
        tile = deep
    constants = {**tile.sides("MNK"), "PRODUCT": device.product, "SPLIT": tile.split}
    return _launch_loss(device, call, loss.linear_loss_grad_kernel, tile, constants, call.x, call.w)


@binds("own_loss")
def bind_own_loss(device: TritonDevice, call: SimpleNamespace) -> Run:
    """The contract's ``own_loss``, with tensors. It reads the place of the batch, so the host waits for the device."""
    y, dy, pitch = call.y, call.dy, call.dy.stride(0)
    rows = torch.arange(len(y), device=y.device) if call.rows is None else call.rows
    # the kernels read a row up to its pitch
    whole = dy.as_strided((len(dy), pitch), (pitch, 1))
    stats = device.zeros(STATS, "float64") if call.stats is None else call.stats

    def run() -> None:
        count, first = call.counters[c.ROW_COUNT : c.ROW_OFFSET + 1].tolist()
        count = max(0, min(count, len(y)))
        picked = rows[first if call.rows is not None else 0 :][:count]
        weight = None if call.weight is None else call.weight[picked]
        loss, gradient, normaliser = call.function(y[:count].float(), call.target[picked], weight)
        whole.zero_()
        dy[:count] = gradient if call.hyper is None else gradient * call.hyper[c.LOSS_SCALE]
        stats[c.LAST_LOSS] = loss
        stats[c.LOSS_SUM] += loss * normaliser
        stats[c.NORM_SUM] += normaliser
        stats[c.BATCH_LOSSES] += loss * count

    return run


def launch_clock(device: TritonDevice, call: SimpleNamespace, *, scaled: bool = False) -> Run:
    """The clock alone; ``scaled``: the gradients carry the loss scale."""
    rule = device.numbers(clock.rule_values(call.rule, scaled=scaled), "float64")
    arguments = {"counters": call.counters, "hyper": call.hyper, "rates": call.rates, "rule": rule}
    return device.launch(clock.advance_kernel, 1, arguments, {}, configs.SMALL)


@binds("advance")
def bind_advance(device: TritonDevice, call: SimpleNamespace) -> Run:
    """The contract's ``advance``."""
    return launch_clock(device, call)
