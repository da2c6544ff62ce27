"""Binding the calls of one layer, and of the clock alone."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from fusemlp_kernels.checks import binds, members_of
from fusemlp_kernels.contract import ACTIVATIONS, LOSSES, NEEDS_Z, NORMS, STATS, Dropout, LossSpec
from fusemlp_kernels.errors import ArgumentError
from fusemlp_kernels.ops import FIXED, OPS
from fusemlp_kernels.philox import seed_key, threshold
from fusemlp_kernels.triton import clock, configs, gradients, linear, loss, members, rowwise
from fusemlp_kernels.triton.launch import LARGEST_INDEX, Run, Tensor, TritonDevice, in_sequence, is_aligned, signed

# Operands for backends that gather in memory or store masks, and those of train_resident.
NOT_IN_LOAD = ("gathered", "keep")
NOT_IN_LOSS = ("gathered", "target_rows", "weight_rows", "ridge", "shares")
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
    if dropout is None:
        return {"layer": 0, "key0": 0, "key1": 0, "threshold": 0, "keep_scale": 1.0, "kept_share": 1.0}
    key0, key1 = seed_key(dropout.seed)
    least = threshold(dropout.rate)
    return {
        "layer": dropout.layer,
        "key0": signed(key0),
        "key1": signed(key1),
        "threshold": least,
        # a rate that rounds to one drops everything
        "keep_scale": 0.0 if least == 1 << 16 else 1.0 / (1.0 - dropout.rate),
        "kept_share": 1.0 - dropout.rate,
    }


def _are_aligned(*matrices: Tensor | None) -> bool:
    return all(is_aligned(matrix) for matrix in matrices if matrix is not None)


@binds("linear", without=NOT_IN_LOAD)
def bind_linear(device: TritonDevice, call: SimpleNamespace) -> Run:
    """The contract's ``linear``."""
    call.z = call.z if call.activation in NEEDS_Z else None
    aligned = _are_aligned(call.x, call.w, call.y, call.z)
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
    aligned = _are_aligned(call.dz, call.w, call.y, call.dz_prev)
    tile = _product_tile(device, aligned, call.M, call.K, call.N)
    programs = tile.count(call.M, call.K)
    if programs == 0 and call.dslope is not None:
        zero: Run = call.dslope.zero_
        return zero
    constants = {**tile.sides("MKN"), "PRODUCT": device.product, "ALIGNED": aligned}
    blocks = device.described(tile, gradients.INPUT_BLOCKS, constants, dz=call.dz, w=call.w)
    constants |= {"PARTS": tile.parts, "SPLIT": tile.split, "DESCRIBED": bool(blocks)}
    arguments = arguments_of(
        device, gradients.grad_input_kernel, call, out=call.dz_prev, programs=programs,
        partials=device.zeros(programs, "float64"), ticket=device.zeros(1, "int32"),
    )  # fmt: skip
    return device.launch(gradients.grad_input_kernel, programs, arguments | blocks, constants, tile)


def _launch_members(
    device: TritonDevice, call: SimpleNamespace, kernel: Any, programs: int, *matrices: Tensor | None, **others: Any
) -> Run:
    """A kernel of ``affine_members`` or of its way back, with the matrices beside x, s, b and r."""
    tile = configs.MEMBERS
    arguments = arguments_of(
        device, kernel, call, members=members_of(call), with_s=int(call.s is not None), with_r=int(call.r is not None),
        **others,
    )  # fmt: skip
    aligned = _are_aligned(call.x, call.s, call.b, call.r, *matrices)
    constants = {"BM": tile.rows, "BK": tile.columns, "ALIGNED": aligned}
    return device.launch(kernel, programs, arguments, constants, tile)


@binds("affine_members", without=NOT_IN_LOAD)
def bind_affine_members(device: TritonDevice, call: SimpleNamespace) -> Run:
    """The contract's ``affine_members``."""
    count = members_of(call)
    programs = count * configs.MEMBERS.count(call.M // count, call.K)
    return _launch_members(device, call, members.affine_members_kernel, programs, call.y)


@binds("grad_affine_members", without=NOT_IN_LOAD)
def bind_grad_affine_members(device: TritonDevice, call: SimpleNamespace) -> Run:
    """The contract's ``grad_affine_members``."""
    tile, written = configs.MEMBERS, {name: getattr(call, name) for name in ("dx", "ds", "db", "dr")}
    count = members_of(call)
    wide = count * tile.count(1, call.K)
    splits = min(configs.MOST_SPLITS, max(1, tile.count(call.M // count, 1)))
    return _launch_members(
        device, call, members.grad_affine_members_kernel, wide * splits, call.dy, *written.values(), splits=splits,
        sums=device.zeros(splits * 3 * wide * tile.columns, "real"), ticket=device.zeros(wide, "int32"),
        rule=device.numbers(clock.rule_values(call.rule), "float64"),
        **{f"store_{name}": int(array is not None) for name, array in written.items()},
    )  # fmt: skip


def _launch_rows(
    device: TritonDevice, call: SimpleNamespace, kernel: Any, width: int, *matrices: Tensor, **others: Any
) -> Run:
    """A kernel over the rows of matrices; with ``norm_kind`` a program has whole rows."""
    tile = configs.row_tile(width)
    constants = {"BM": tile.rows, "BK": tile.columns, "ALIGNED": _are_aligned(*matrices)}
    programs = tile.count(call.M, 1 if "norm_kind" in others else width)
    return device.launch(kernel, programs, arguments_of(device, kernel, call, **others), constants, tile)


def _norm(call: SimpleNamespace) -> dict[str, Any]:
    """The kernels' arguments for a norm."""
    norm = call.norm
    return {"norm_kind": 0, "eps": 0.0} if norm is None else {"norm_kind": 1 + NORMS.index(norm.kind), "eps": norm.eps}


@binds("normalise", without=NOT_IN_LOAD)
def bind_normalise(device: TritonDevice, call: SimpleNamespace) -> Run:
    """The contract's ``normalise``."""
    g, b = _factors(device, call)
    return _launch_rows(device, call, rowwise.normalise_kernel, call.K, call.x, call.y, g=g, b=b, **_norm(call))


def _factors(device: TritonDevice, call: SimpleNamespace) -> tuple[Tensor, Tensor]:
    """g and b (K,): ones and zeros where they are left out."""
    g = device.matrix(1, call.K, "real").fill_(1.0)[0] if call.g is None else call.g
    return g, device.matrix(1, call.K, "real")[0] if call.b is None else call.b


@binds("grad_normalise", without=NOT_IN_LOAD)
def bind_grad_normalise(device: TritonDevice, call: SimpleNamespace) -> Run:
    """The contract's ``grad_normalise``: the rows normalised once more, the gradient by them as by ``affine_members``
    of one member, and in its place that by x."""
    g, b = _factors(device, call)
    sums = {f"d{name}": row[None] for name, row in (("s", call.dg), ("b", call.db)) if row is not None}
    n = call.x if call.norm is None else device.matrix(call.M, call.K, "compute")
    by_n: Run = bind_grad_affine_members(
        device, dy=call.dy, x=n, dx=call.dx, s=g[None], b=b[None], **sums, rule=call.rule, counters=call.counters,
        activation=call.activation, slope=call.slope, dropout=call.dropout,
    )  # fmt: skip
    if call.norm is None:
        return by_n
    again = bind_normalise(device, x=call.x, y=n, norm=call.norm)
    kernel = rowwise.grad_normalise_kernel
    return in_sequence([again, by_n, _launch_rows(device, call, kernel, call.K, call.x, call.dx, **_norm(call))])


@binds("add")
def bind_add(device: TritonDevice, call: SimpleNamespace) -> Run:
    """The contract's ``add``."""
    matrices = call.a, call.b, call.y
    return _launch_rows(device, call, rowwise.add_kernel, call.K, *matrices, x=call.a, other=call.b)


@binds("encode")
def bind_encode(device: TritonDevice, call: SimpleNamespace) -> Run:
    """The contract's ``encode``."""
    sizes = {"inputs": call.x, "before": call.K * call.inputs}
    if call.dy is None:
        return _launch_rows(device, call, rowwise.encode_kernel, call.N, call.y, **sizes)
    return _launch_rows(device, call, rowwise.grad_encode_kernel, call.K, call.dy, call.dx, **sizes)


def _heads(
    device: TritonDevice, call: SimpleNamespace, kernel: Any, letters: str, *matrices: Tensor, **out: Any
) -> Run:
    """A product of each member, of one kernel; ``letters``: those of the result's columns and of the reduction."""
    aligned = _are_aligned(*matrices)
    count, columns = members_of(call, call.N), getattr(call, letters[0])
    each = call.M // count
    shape = [(each, columns)]
    tile = configs.product_tile(device.arch, "forward", device.precision, shape, aligned=aligned, parts=count)
    constants = {**tile.sides(f"M{letters}"), "PRODUCT": device.product, "ALIGNED": aligned, "PARTS": tile.parts}
    arguments = arguments_of(device, kernel, call, M=each, members=count, **out)
    return device.launch(kernel, count * tile.count(each, columns), arguments, constants, tile)


@binds("linear_members")
def bind_linear_members(device: TritonDevice, call: SimpleNamespace) -> Run:
    """The contract's ``linear_members``."""
    return _heads(device, call, members.linear_members_kernel, "NK", call.x, call.w, call.z)


@binds("grad_input_members")
def bind_grad_input_members(device: TritonDevice, call: SimpleNamespace) -> Run:
    """The contract's ``grad_input_members``."""
    return _heads(device, call, members.grad_input_members_kernel, "KN", call.dz, call.w, call.dx, out=call.dx)


@binds("perturb")
def bind_perturb(device: TritonDevice, call: SimpleNamespace) -> Run:
    """The contract's ``perturb``."""
    change, moves = call.change, call.start is None
    key0, key1 = seed_key(change.seed or 0)
    arguments = arguments_of(
        device, rowwise.perturb_kernel, call, adv=call.adv if moves else call.start, moves=int(moves),
        euclid=int(change.norm == "2"), drawn=int(not moves and change.seed is not None), length=change.step,
        eps=change.eps, low=change.low, high=change.high,
    )  # fmt: skip
    arguments |= {"key0": signed(key0), "key1": signed(key1)}
    return device.launch(rowwise.perturb_kernel, call.M, arguments, {"BLOCK": configs.SWEEP.columns}, configs.SWEEP)


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
    constants |= {"ALIGNED": _are_aligned(*matrices, call.dz), "CROSS_ENTROPY": call.loss.kind == "cross_entropy"}
    return device.launch(kernel, programs, arguments, constants, tile)


@binds("loss_grad", without=NOT_IN_LOSS)
def bind_loss_grad(device: TritonDevice, call: SimpleNamespace) -> Run:
    """The contract's ``loss_grad``; dz may be z."""
    spec, entropy = call.loss, call.loss.kind == "cross_entropy"
    tile = configs.loss_tile(device.precision, entropy, _are_aligned(call.z, call.dz))
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
    if deep is not None and call.N <= deep.columns and _are_aligned(call.x, call.w, call.dz):
        tile = deep
    constants = {**tile.sides("MNK"), "PRODUCT": device.product, "SPLIT": tile.split}
    return _launch_loss(device, call, loss.linear_loss_grad_kernel, tile, constants, call.x, call.w)


def launch_clock(device: TritonDevice, call: SimpleNamespace, *, scaled: bool = False) -> Run:
    """The clock alone; ``scaled``: the gradients carry the loss scale."""
    rule = device.numbers(clock.rule_values(call.rule, scaled=scaled), "float64")
    arguments = {"counters": call.counters, "hyper": call.hyper, "rates": call.rates, "rule": rule}
    return device.launch(clock.advance_kernel, 1, arguments, {}, configs.SMALL)


@binds("advance")
def bind_advance(device: TritonDevice, call: SimpleNamespace) -> Run:
    """The contract's ``advance``."""
    return launch_clock(device, call)
