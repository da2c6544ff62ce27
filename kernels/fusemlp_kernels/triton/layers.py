"""Binding the calls of one layer, and of the clock alone."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from fusemlp_kernels.checks import binds, members_of
from fusemlp_kernels.contract import ACTIVATIONS, COUNTERS, HYPER, LOSSES, NEEDS_Z, NORMS, STATS, Dropout, LossSpec
from fusemlp_kernels.errors import ArgumentError
from fusemlp_kernels.philox import seed_key, threshold
from fusemlp_kernels.triton import clock, configs, gradients, linear, loss, members, rowwise
from fusemlp_kernels.triton.launch import LARGEST_INDEX, Run, Tensor, TritonDevice, in_sequence, is_aligned, signed

# Operands for backends that gather in memory or store masks, and those of train_resident.
NOT_IN_LOAD = ("gathered", "keep")
NOT_IN_LOSS = ("gathered", "target_rows", "weight_rows", "ridge", "shares")


def places(spare: Tensor, **matrices: Tensor | None) -> dict[str, Any]:
    """The kernels' arguments for matrices: tensor, row stride and column stride; ``spare`` in place of None."""
    found: dict[str, Any] = {}
    for name, matrix in matrices.items():
        row, column = (0, 0) if matrix is None else matrix.stride()
        found |= {name: spare if matrix is None else matrix, f"{name}_row": row, f"{name}_col": column}
    return found


def activation_of(call: SimpleNamespace, spare: Tensor) -> dict[str, Any]:
    """The kernels' arguments for an activation; ``spare`` is any float32 tensor."""
    return {
        "activation": ACTIVATIONS.index(call.activation),
        "slope": float(call.slope),
        "slope_param": call.slope_param if call.activation == "prelu" else spare,
    }


def dropout_numbers(dropout: Dropout | None) -> dict[str, Any]:
    """The kernels' arguments for a layer's dropout; threshold 0 for none."""
    if dropout is None:
        return {"layer": 0, "key0": 0, "key1": 0, "threshold": 0, "keep_scale": 1.0}
    key0, key1 = seed_key(dropout.seed)
    least = threshold(dropout.rate)
    return {
        "layer": dropout.layer,
        "key0": signed(key0),
        "key1": signed(key1),
        "threshold": least,
        # a rate that rounds to one drops everything
        "keep_scale": 0.0 if least == 1 << 16 else 1.0 / (1.0 - dropout.rate),
    }


def kept_share(dropout: Dropout | None) -> float:
    """The share of a layer's outputs that its dropout keeps."""
    return 1.0 if dropout is None else 1.0 - dropout.rate


@binds("linear", without=NOT_IN_LOAD)
def bind_linear(device: TritonDevice, call: SimpleNamespace) -> Run:
    """The contract's ``linear``."""
    m, n, x, w, b, y = call.M, call.N, call.x, call.w, call.b, call.y
    keeps_z = call.z is not None and call.activation in NEEDS_Z
    z = call.z if keeps_z else y
    spare = device.zeros(1, "int64")
    aligned = all(map(is_aligned, (x, w, y, z)))
    deep = configs.deep_tile(device.arch, device.precision, m, n, call.K) if aligned else None
    tile = deep or configs.product_tile(device.arch, "forward", device.precision, [(m, n)], aligned=aligned)
    arguments = {
        "M": m, "N": n, "K": call.K, **places(spare, x=x, w=w, y=y, z=z), "b": b, "b_step": b.stride(0),
        "rows": spare if call.rows is None else call.rows, "gather": int(call.rows is not None),
        "counters": spare if call.counters is None else call.counters, "store_z": int(keeps_z),
        **activation_of(call, b), **dropout_numbers(call.dropout),
    }  # fmt: skip
    constants = {**tile.sides("MNK"), "PRODUCT": device.product, "ALIGNED": aligned}
    blocks = device.described(tile, linear.BLOCKS, constants, x=x, w=w) if call.rows is None else {}
    constants |= {"PARTS": tile.parts, "SPLIT": tile.split, "DESCRIBED": bool(blocks)}
    return device.launch(linear.linear_kernel, tile.count(m, n), arguments | blocks, constants, tile)


@binds("grad_input", without=NOT_IN_LOAD)
def bind_grad_input(device: TritonDevice, call: SimpleNamespace) -> Run:
    """The contract's ``grad_input``."""
    m, k, dz, w, out, dslope = call.M, call.K, call.dz, call.w, call.dz_prev, call.dslope
    y = call.z if call.activation in NEEDS_Z else call.y
    aligned = all(map(is_aligned, (dz, w, y, out)))
    deep = configs.deep_tile(device.arch, device.precision, m, k, call.N) if aligned else None
    tile = deep or configs.product_tile(device.arch, "forward", device.precision, [(m, k)], aligned=aligned)
    programs, spare = tile.count(m, k), device.zeros(1, "real")
    arguments = {
        "M": m, "N": call.N, "K": k, **places(spare, dz=dz, w=w, y=y, out=out),
        "counters": device.zeros(1, "int64") if call.counters is None else call.counters,
        "dslope": spare if dslope is None else dslope, "partials": device.zeros(programs, "float64"),
        "ticket": device.zeros(1, "int32"), "programs": programs, "kept_share": kept_share(call.dropout),
        **activation_of(call, spare), **dropout_numbers(call.dropout),
    }  # fmt: skip
    constants = {**tile.sides("MKN"), "PRODUCT": device.product, "ALIGNED": aligned}
    blocks = device.described(tile, gradients.INPUT_BLOCKS, constants, dz=dz, w=w)
    constants |= {"PARTS": tile.parts, "SPLIT": tile.split, "DESCRIBED": bool(blocks)}
    run = device.launch(gradients.grad_input_kernel, programs, arguments | blocks, constants, tile)
    return dslope.zero_ if programs == 0 and dslope is not None else run


def _own(
    device: TritonDevice, call: SimpleNamespace, spare: Tensor, **matrices: Tensor | None
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The arguments and constants of ``affine_members`` and of its way back; ``matrices`` are those of one of them."""
    tile, matrices = configs.MEMBERS, {**matrices, "x": call.x, "s": call.s, "b": call.b, "r": call.r}
    arguments = {
        "M": call.M, "K": call.K, "members": members_of(call), **places(spare, **matrices),
        "rows": device.zeros(1, "int64") if call.rows is None else call.rows, "gather": int(call.rows is not None),
        "counters": device.zeros(COUNTERS, "int64") if call.counters is None else call.counters,
        "with_s": int(call.s is not None), "with_r": int(call.r is not None),
        "activation": ACTIVATIONS.index(call.activation), "slope": float(call.slope),
        **dropout_numbers(call.dropout),
    }  # fmt: skip
    aligned = all(is_aligned(matrix) for matrix in matrices.values() if matrix is not None)
    return arguments, {"BM": tile.rows, "BK": tile.columns, "ALIGNED": aligned}


@binds("affine_members", without=NOT_IN_LOAD)
def bind_affine_members(device: TritonDevice, call: SimpleNamespace) -> Run:
    """The contract's ``affine_members``."""
    tile = configs.MEMBERS
    arguments, constants = _own(device, call, device.zeros(1, "real"), y=call.y)
    count = arguments["members"]
    programs = count * tile.count(call.M // count, call.K)
    return device.launch(members.affine_members_kernel, programs, arguments, constants, tile)


@binds("grad_affine_members", without=NOT_IN_LOAD)
def bind_grad_affine_members(device: TritonDevice, call: SimpleNamespace) -> Run:
    """The contract's ``grad_affine_members``."""
    tile = configs.MEMBERS
    written = {name: getattr(call, name) for name in ("dx", "ds", "db", "dr")}
    arguments, constants = _own(device, call, device.zeros(1, "real"), dy=call.dy, **written)
    if call.dx is None:
        # of the type of dx
        arguments["dx"] = call.dy
    count, wide = arguments["members"], tile.count(1, call.K)
    splits = min(configs.MOST_SPLITS, max(1, tile.count(call.M // count, 1)))
    arguments |= {
        **{f"store_{name}": int(array is not None) for name, array in written.items()}, "splits": splits,
        "sums": device.zeros(splits * 3 * count * wide * tile.columns, "real"),
        "ticket": device.zeros(count * wide, "int32"),
        "rule": device.numbers(clock.rule_values(call.rule), "float64"),
    }  # fmt: skip
    return device.launch(members.grad_affine_members_kernel, count * wide * splits, arguments, constants, tile)


def _factors(device: TritonDevice, call: SimpleNamespace) -> tuple[Tensor, Tensor]:
    """g and b (K,): ones and zeros where they are left out."""
    g = device.matrix(1, call.K, "real").fill_(1.0)[0] if call.g is None else call.g
    return g, device.matrix(1, call.K, "real")[0] if call.b is None else call.b


def _launch_rows(device: TritonDevice, call: SimpleNamespace, kernel: Any, **given: Any) -> Run:
    """A kernel over whole rows of its matrices, which normalises those of x."""
    tile, norm = configs.row_tile(call.K), call.norm
    matrices = {"x": call.x} | {name: array for name, array in given.items() if name in ("y", "dx")}
    arguments = {
        **given, "M": call.M, "K": call.K, **places(call.x, **matrices),
        "norm_kind": 0 if norm is None else 1 + NORMS.index(norm.kind), "eps": 0.0 if norm is None else norm.eps,
    }  # fmt: skip
    constants = {"BM": tile.rows, "BK": tile.columns, "ALIGNED": _are_aligned(*matrices.values())}
    return device.launch(kernel, tile.count(call.M, 1), arguments, constants, tile)


@binds("normalise", without=NOT_IN_LOAD)
def bind_normalise(device: TritonDevice, call: SimpleNamespace) -> Run:
    """The contract's ``normalise``."""
    g, b = _factors(device, call)
    return _launch_rows(
        device, call, rowwise.normalise_kernel, y=call.y, g=g, g_step=g.stride(0), b=b, b_step=b.stride(0),
        counters=device.zeros(COUNTERS, "int64") if call.counters is None else call.counters,
        activation=ACTIVATIONS.index(call.activation), slope=float(call.slope), **dropout_numbers(call.dropout),
    )  # fmt: skip


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
    return in_sequence([again, by_n, _launch_rows(device, call, rowwise.grad_normalise_kernel, dx=call.dx)])


@binds("add")
def bind_add(device: TritonDevice, call: SimpleNamespace) -> Run:
    """The contract's ``add``."""
    tile, matrices = configs.row_tile(call.K), {"x": call.a, "other": call.b, "y": call.y}
    arguments = {"M": call.M, "K": call.K, **places(call.a, **matrices)}
    constants = {"BM": tile.rows, "BK": tile.columns, "ALIGNED": _are_aligned(*matrices.values())}
    return device.launch(rowwise.add_kernel, tile.count(call.M, call.K), arguments, constants, tile)


@binds("encode")
def bind_encode(device: TritonDevice, call: SimpleNamespace) -> Run:
    """The contract's ``encode``."""
    back = call.dy is not None
    matrices = {"dy": call.dy, "dx": call.dx} if back else {"y": call.y}
    width, kernel = (call.K, rowwise.grad_encode_kernel) if back else (call.N, rowwise.encode_kernel)
    tile, before = configs.row_tile(width), call.K * call.inputs
    arguments = {
        "M": call.M, "N": call.N, "K": call.K, **places(call.x, inputs=call.x, **matrices),
        "rows": device.zeros(1, "int64") if call.rows is None else call.rows, "gather": int(call.rows is not None),
        "counters": call.counters, "octaves": call.octaves, "before": before,
    }  # fmt: skip
    constants = {"BM": tile.rows, "BK": tile.columns, "ALIGNED": _are_aligned(*matrices.values())}
    return device.launch(kernel, tile.count(call.M, width), arguments, constants, tile)


def _heads(
    device: TritonDevice, call: SimpleNamespace, kernel: Any, letters: str, bias: dict[str, Any], **matrices: Tensor
) -> Run:
    """A product of each member, of one kernel; ``letters``: those of the result's columns and of the reduction."""
    aligned = all(map(is_aligned, matrices.values()))
    count, columns = members_of(call, call.N), getattr(call, letters[0])
    each = call.M // count
    shape = [(each, columns)]
    tile = configs.product_tile(device.arch, "forward", device.precision, shape, aligned=aligned, parts=count)
    sizes = {"M": each, "N": call.N, "K": call.K, "members": count}
    arguments = {**sizes, **places(call.w, **matrices), **bias}
    constants = {**tile.sides(f"M{letters}"), "PRODUCT": device.product, "ALIGNED": aligned, "PARTS": tile.parts}
    return device.launch(kernel, count * tile.count(each, columns), arguments, constants, tile)


@binds("linear_members")
def bind_linear_members(device: TritonDevice, call: SimpleNamespace) -> Run:
    """The contract's ``linear_members``."""
    bias = {"b": call.b, "b_step": call.b.stride(0)}
    return _heads(device, call, members.linear_members_kernel, "NK", bias, x=call.x, w=call.w, z=call.z)


@binds("grad_input_members")
def bind_grad_input_members(device: TritonDevice, call: SimpleNamespace) -> Run:
    """The contract's ``grad_input_members``."""
    return _heads(device, call, members.grad_input_members_kernel, "KN", {}, dz=call.dz, w=call.w, out=call.dx)


@binds("perturb")
def bind_perturb(device: TritonDevice, call: SimpleNamespace) -> Run:
    """The contract's ``perturb``."""
    change, moves = call.change, call.start is None
    keys = [signed(word) for word in seed_key(change.seed or 0)]
    arguments = {
        "K": call.K, **places(call.x, x=call.x, dx=call.dx, adv=call.adv if moves else call.start),
        "counters": call.counters,
        "rows": device.zeros(1, "int64") if call.rows is None else call.rows, "gather": int(call.rows is not None),
        "moves": int(moves), "euclid": int(change.norm == "2"), "drawn": int(not moves and change.seed is not None),
        "key0": keys[0], "key1": keys[1], "length": change.step, "eps": change.eps, "low": change.low,
        "high": change.high,
    }  # fmt: skip
    return device.launch(rowwise.perturb_kernel, call.M, arguments, {"BLOCK": configs.SWEEP.columns}, configs.SWEEP)


def target_arguments(device: TritonDevice, call: SimpleNamespace) -> dict[str, Any]:
    """The kernels' arguments for the targets of a loss and for their weights."""
    target, weight, class_weight, ignored = call.target, call.weight, call.class_weight, call.loss.ignore_index or 0
    spare, number, classes = device.zeros(1, "real"), device.zeros(1, "int64"), target.dim() == 1
    return {
        "labels": target if classes else number, "label_step": target.stride(0) if classes else 0,
        **places(spare, target=None if classes else target),
        "weight": spare if weight is None else weight, "weight_step": 0 if weight is None else weight.stride(0),
        "class_weight": spare if class_weight is None else class_weight.contiguous(),
        "ignored_low": signed(ignored), "ignored_high": signed(ignored >> 32),
    }  # fmt: skip


def _mean(spec: LossSpec, outputs: int) -> float:
    """The field "mean" of ``loss.SETTING_FIELDS``."""
    each = 1 if spec.kind == "cross_entropy" else outputs
    return {"sum": 0.0, "mean": 1.0, "rows": -float(each)}[spec.reduction]


def loss_settings(spec: LossSpec, call: SimpleNamespace) -> list[float]:
    """``loss.SETTING_FIELDS`` of a loss whose weights are ``given``."""
    settings = {
        "kind": LOSSES.index(spec.kind), "mean": _mean(spec, call.N), "smoothing": spec.label_smoothing,
        "soft": spec.soft, "option": spec.option, "accuracy": spec.accuracy,
        "ignores": spec.ignore_index is not None, "weighted": call.weight is not None,
        "classes": call.class_weight is not None,
    }  # fmt: skip
    return [float(settings[name]) for name in loss.SETTING_FIELDS]


def _are_aligned(*matrices: Tensor | None) -> bool:
    return all(is_aligned(matrix) for matrix in matrices if matrix is not None)


def _launch_loss(
    device: TritonDevice,
    call: SimpleNamespace,
    kernel: Any,
    tile: configs.Tile,
    matrices: dict[str, Tensor],
    inputs: dict[str, Any],
    constants: dict[str, Any],
    most: int = LARGEST_INDEX,
) -> Run:
    """A loss kernel over whole rows of ``matrices``, of at most ``most`` programs; ``inputs`` and ``constants`` are
    those of this kernel alone."""
    m, n, dz, rows, dslope, hyper = call.M, call.N, call.dz, call.rows, call.dslope, call.hyper
    read = tuple(matrices.values())
    stats = device.zeros(STATS, "float64") if call.stats is None else call.stats
    programs, spare = min(-(-m // tile.rows), most), device.zeros(1, "real")
    arguments = {
        "M": m, "N": n, **places(read[0], dz=dz, **matrices), "store_dz": int(dz is not None),
        "rows": device.zeros(1, "int64") if rows is None else rows, "gather": int(rows is not None),
        "dslope": spare if dslope is None else dslope, "stats": stats, "counters": call.counters,
        "settings": device.numbers(loss_settings(call.loss, call), "real"),
        "hyper": device.zeros(HYPER, "float64") if hyper is None else hyper, "scaled": int(hyper is not None),
        "partials": device.zeros(4 * programs, "float64"), "ticket": device.zeros(1, "int32"), "programs": programs,
        **target_arguments(device, call), **activation_of(call, spare), **inputs,
    }  # fmt: skip
    if m * n == 0:
        # the loss of no rows, or of no outputs, is zero
        return in_sequence([stats[:1].zero_, arguments["dslope"].zero_])
    constants |= {
        "ALIGNED": _are_aligned(*read, dz),
        "CROSS_ENTROPY": call.loss.kind == "cross_entropy",
    }
    return device.launch(kernel, programs, arguments, constants, tile)


def launch_loss_grad(device: TritonDevice, call: SimpleNamespace, z: Tensor, dz: Tensor | None) -> Run:
    """The loss of pre-activations z (M, N), and its gradient in dz, which may be z."""
    spec, entropy = call.loss, call.loss.kind == "cross_entropy"
    tile = configs.loss_tile(device.precision, entropy, _are_aligned(z, dz))
    most = tile.programs * device.arch.processors
    labels = entropy and not spec.soft and (call.class_weight is None or not spec.label_smoothing)
    constants = {"BM": tile.rows, "BN": tile.columns, "LABELS": labels}
    call = SimpleNamespace(**vars(call) | {"dz": dz})
    return _launch_loss(device, call, loss.loss_grad_kernel, tile, {"z": z}, {}, constants, most)


@binds("loss_grad", without=NOT_IN_LOSS)
def bind_loss_grad(device: TritonDevice, call: SimpleNamespace) -> Run:
    """The contract's ``loss_grad``."""
    return launch_loss_grad(device, call, call.z, call.dz)


@binds("linear_loss_grad", without=NOT_IN_LOSS)
def bind_linear_loss_grad(device: TritonDevice, call: SimpleNamespace) -> Run:
    """The contract's ``linear_loss_grad``."""
    b, rows = call.b, call.x_rows
    if call.N > configs.WIDEST_OUTPUT:
        raise ArgumentError(
            f"linear_loss_grad: w: {call.N} outputs are more than the {configs.WIDEST_OUTPUT} that fit a tile; "
            "use linear and loss_grad one after the other"
        )
    tile = configs.output_tile(device.arch, call.N)
    deep = configs.deep_tile(device.arch, device.precision, call.M, call.N, call.K, "deep_output")
    if deep is not None and call.N <= deep.columns and _are_aligned(call.x, call.w, call.dz):
        tile = deep
    inputs = {
        "K": call.K, "b": b, "b_step": b.stride(0), "x_gather": int(rows is not None),
        "x_rows": device.zeros(1, "int64") if rows is None else rows,
    }  # fmt: skip
    constants = {**tile.sides("MNK"), "PRODUCT": device.product, "SPLIT": tile.split}
    matrices = {"x": call.x, "w": call.w}
    return _launch_loss(device, call, loss.linear_loss_grad_kernel, tile, matrices, inputs, constants)


def launch_clock(device: TritonDevice, call: SimpleNamespace, *, scaled: bool = False) -> Run:
    """The clock alone; ``scaled``: the gradients carry the loss scale."""
    rule = device.numbers(clock.rule_values(call.rule, scaled=scaled), "float64")
    arguments = {"counters": call.counters, "hyper": call.hyper, "rates": call.rates, "rule": rule}
    return device.launch(clock.advance_kernel, 1, arguments, {}, configs.SMALL)


@binds("advance")
def bind_advance(device: TritonDevice, call: SimpleNamespace) -> Run:
    """The contract's ``advance``."""
    return launch_clock(device, call)
