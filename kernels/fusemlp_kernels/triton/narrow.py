"""The step of a narrow network on a wide batch in one launch, up to the update: forward, loss, backward, gradients;
and its predictions in one launch.

A program takes every ``programs``-th tile of BM rows. Activations and dz stay on chip; the sums of dw and db stay in
registers from the first tile to the last, and each program stores its own. The next launch, ``update``, adds
them in the order of the programs, so that all runs have the same bits.

The hidden layers, ``LAYERS`` of them, have one activation and fill tiles of one width. Padded columns hold the
activation of zero, which meets zeros of the next layer's weights. A table names the places of each layer's tensors.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import triton
import triton.language as tl

from fusemlp_kernels.checks import binds
from fusemlp_kernels.contract import ACTIVATIONS, LOSSES
from fusemlp_kernels.errors import ArgumentError, BackendUnavailableError
from fusemlp_kernels.triton import configs
from fusemlp_kernels.triton.clock import ROW_COUNT
from fusemlp_kernels.triton.gradients import whole
from fusemlp_kernels.triton.grouped import keeping
from fusemlp_kernels.triton.launch import Run, Tensor, TritonDevice, is_aligned
from fusemlp_kernels.triton.layers import arguments_of, loss_settings, target_arguments
from fusemlp_kernels.triton.loss import (
    CHUNK,
    OPTION,
    SMOOTHING,
    account,
    finish_loss,
    ignored_label,
    normaliser_of,
    stored_scale,
)
from fusemlp_kernels.triton.pointwise_triton import (
    BINARY_CROSS_ENTROPY,
    CROSS_ENTROPY,
    RELU,
    activate,
    derivative,
    element_loss,
    needs_z,
)
from fusemlp_kernels.triton.tiles import kernel, masked_width, product, row_pitch, this_batch, whole_sum

# A row of the table of layers, int64: widths, the places of w, b and of the gradients, -1 for a frozen tensor's, and 0.
LAYER_FIELDS = ("inputs", "units", "w", "b", "dw", "db", "zero")
INPUTS, UNITS, W, B, DW, DB, ZERO = (tl.constexpr(place) for place in range(len(LAYER_FIELDS)))
LAYER_COLUMNS: tl.constexpr = tl.constexpr(len(LAYER_FIELDS))


@triton.jit
def weights_of(weights, layer, ROWS: tl.constexpr, COLS: tl.constexpr):
    """Return the weights of a layer in a tile (ROWS, COLS), zero outside; ``layer`` is its row of the table."""
    at_n, at_k = tl.arange(0, ROWS), tl.arange(0, COLS)
    pitch, N = masked_width(tl.load(layer + INPUTS).to(tl.int32), True), tl.load(layer + UNITS).to(tl.int32)
    mask = (at_n < N)[:, None] & (at_k < pitch)[None, :]
    w = weights + whole(tl.load(layer + W), True)
    return tl.load(w + at_n[:, None] * pitch + at_k[None, :], mask=mask, other=0.0)


@triton.jit
def biases_of(biases, layer, ROWS: tl.constexpr):
    """Return the biases of a layer, zero outside; ``layer`` is its row of the table."""
    at_n = tl.arange(0, ROWS)
    return tl.load(biases + tl.load(layer + B) + at_n, mask=at_n < tl.load(layer + UNITS), other=0.0)


@triton.jit
def layers_of(
    weights, biases, layers,
    FIRST: tl.constexpr, WIDTH: tl.constexpr, OUTPUTS: tl.constexpr, LAYERS: tl.constexpr,
):  # fmt: skip
    """Return the weights of all layers from the first to the output layer, and -1 times their biases.

    Triton makes an addend the first value of a product, in registers that it writes between wgmma's fence and wgmma.
    """
    w, minus = (weights_of(weights, layers, WIDTH, FIRST),), (-biases_of(biases, layers, WIDTH),)
    for layer in tl.static_range(1, LAYERS + 1):
        row = layers + layer * LAYER_COLUMNS
        w += (weights_of(weights, row, OUTPUTS if layer == LAYERS else WIDTH, WIDTH),)  # type: ignore[assignment]
        minus += (-biases_of(biases, row, OUTPUTS if layer == LAYERS else WIDTH),)  # type: ignore[assignment]
    return w, minus


@triton.jit
def affine(w, x, minus, PRODUCT: tl.constexpr):
    """Return z = w @ x - minus, float32."""
    z, rest = tl.zeros((w.shape[0], x.shape[1]), tl.float32), tl.zeros((w.shape[0], x.shape[1]), tl.float32)
    z, rest = product(w, x, z, rest, PRODUCT)
    return whole_sum(z, rest, PRODUCT) - minus[:, None]


@triton.jit
def packed(v, dtype: tl.constexpr):
    """Return v in a type, bfloat16 two in a register. Without the move LLVM keeps v itself until it is read again."""
    v = v.to(dtype)
    if dtype == tl.bfloat16:
        v = tl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [v], dtype=tl.bfloat16, is_pure=True, pack=2)
    return v


@triton.jit
def hidden(w, x, minus, slope, ACTIVATION: tl.constexpr, PRODUCT: tl.constexpr):
    """Return a hidden layer's outputs, and the values that give its derivative, of x's type."""
    z = affine(w, x, minus, PRODUCT)
    if ACTIVATION == RELU:
        y = tl.maximum(z, 0.0, propagate_nan=tl.PropagateNan.ALL)
    else:
        y = activate(z, ACTIVATION, slope)
    y = packed(y, x.dtype)
    v = y
    if needs_z(ACTIVATION):
        v = packed(z, x.dtype)
    return y, v


@triton.jit
def back(w, dz, v, slope, ACTIVATION: tl.constexpr, PRODUCT: tl.constexpr):
    """Return dz of the layer below from dz of a layer, of dz's type, and db; see ``hidden`` for v."""
    acc, rest = tl.zeros((w.shape[1], dz.shape[1]), tl.float32), tl.zeros((w.shape[1], dz.shape[1]), tl.float32)
    acc, rest = product(tl.trans(w), dz, acc, rest, PRODUCT)
    below = whole_sum(acc, rest, PRODUCT)
    if ACTIVATION == RELU:
        # where v is NaN, so are the row's loss and this sum
        below = tl.where(v <= 0, 0.0, below)
        dz = below.to(dz.dtype)
    else:
        dz = packed(below * derivative(v.to(tl.float32), ACTIVATION, slope), dz.dtype)
        below = dz.to(tl.float32)
    return dz, tl.sum(below, axis=1)


@triton.jit
def outer(dw, dz, x, PRODUCT: tl.constexpr):
    """Return dw + dz @ x.T."""
    dw, rest = product(dz, tl.trans(x), dw, tl.zeros((dz.shape[0], x.shape[0]), tl.float32), PRODUCT)
    return whole_sum(dw, rest, PRODUCT)


@triton.jit
def store_sums(dw, db, scale, grads, layer):
    """Store a program's gradients of a layer, ``scale`` times its sums, with zeros between the rows; those of a frozen
    tensor have no place.

    The table is read again, and the zero in it counts: the indices of the weights would fill registers in the loop.
    """
    zero = tl.load(layer + ZERO, volatile=True).to(tl.int32)
    at_n, at_k = zero + tl.arange(0, dw.shape[0]), zero + tl.arange(0, dw.shape[1])
    K, N = tl.load(layer + INPUTS, volatile=True).to(tl.int32), tl.load(layer + UNITS, volatile=True).to(tl.int32)
    dw_place, db_place = tl.load(layer + DW, volatile=True), tl.load(layer + DB, volatile=True)
    pitch = masked_width(K, True)
    mask = tl.where(dw_place >= 0, (at_n < N)[:, None] & (at_k < pitch)[None, :], False)
    dw_at = grads + whole(dw_place, True) + at_n[:, None] * pitch + at_k[None, :]
    tl.store(dw_at, tl.where((at_k < K)[None, :], dw * scale, 0.0), mask=mask)
    tl.store(grads + db_place + at_n, db * scale, mask=tl.where(db_place >= 0, at_n < N, False))


@triton.jit
def first_of(values, largest, at, N):
    """Return the first row that holds the largest value of its column."""
    return tl.min(tl.where(values == largest[None, :], at[:, None], N), axis=0)


@triton.jit
def entropy(
    z, at_n, label, targets, counts, weights, class_weight, eps, N,
    SOFT: tl.constexpr, CLASSES: tl.constexpr, ACCURACY: tl.constexpr,
):  # fmt: skip
    """Return dz of a cross-entropy of logits z, and the loss and the right answers of each row of the batch; see
    ``loss.loss_of_rows``."""
    named, label = (at_n < N)[:, None], label.to(tl.int32)
    if SOFT:
        t = targets
    else:
        t = tl.where(label[None, :] == at_n[:, None], 1.0, 0.0)
    q = tl.where(named, (t * (1.0 - eps) + eps / N) * weights[None, :], 0.0)
    if CLASSES:
        q = q * tl.load(class_weight + at_n, mask=at_n < N, other=0.0)[:, None]
    logits = tl.where(named, z, float("-inf"))
    largest = tl.max(logits, axis=0)
    shifted = tl.where(named, z - largest[None, :], 0.0)
    e = tl.where(named, tl.exp(shifted), 0.0)
    total, mass = tl.sum(e, axis=0), weights
    if SOFT or CLASSES:
        mass = tl.sum(q, axis=0)
    right = tl.zeros_like(label)
    if ACCURACY:
        meant = label
        if SOFT:
            meant = first_of(targets, tl.max(targets, axis=0), at_n, N)
        right = (counts & (first_of(logits, largest, at_n, N) == meant)).to(tl.int32)
    return e * (mass / total)[None, :] - q, mass * tl.log(total) - tl.sum(q * shifted, axis=0), right


@triton.jit
def elements(
    z, t, at_n, counts, weights, slope, option, N, LOSS: tl.constexpr, ACTIVATION: tl.constexpr, ACCURACY: tl.constexpr
):
    """Return dz of an element-wise loss of pre-activations z, and the loss and the right answers of each row of the
    batch; see ``loss.loss_of_rows``."""
    named, z = (at_n < N)[:, None], tl.where(counts[None, :], z, 0.0)
    y = activate(z, ACTIVATION, slope)
    value, by_y = element_loss(y, t, LOSS, option)
    v = y
    if needs_z(ACTIVATION):
        v = z
    right = tl.zeros_like(counts.to(tl.int32))
    if ACCURACY:
        if LOSS == BINARY_CROSS_ENTROPY:
            right = tl.sum((((y > 0) == (t > 0.5)) & named & counts[None, :]).to(tl.int32), axis=0)
        else:
            outputs, targets = tl.where(named, y, float("-inf")), tl.where(named, t, float("-inf"))
            best = first_of(outputs, tl.max(outputs, axis=0), at_n, N)
            meant = first_of(targets, tl.max(targets, axis=0), at_n, N)
            right = (counts & (best == meant)).to(tl.int32)
    by_y = by_y * weights[None, :] * derivative(v, ACTIVATION, slope)
    return tl.where(named, by_y, 0.0), tl.sum(tl.where(named, value * weights[None, :], 0.0), axis=0), right


@triton.jit
def rows_from(rows, at, count, GATHER: tl.constexpr):
    """Return the rows of data at places of the batch, 0 for those from ``count`` on; in 32 bits, to save registers."""
    source = at
    if GATHER:
        source = tl.load(rows + at, mask=at < count, other=0).to(tl.int32)
    return source


@triton.jit
def inputs_of(x, source, valid, K, x_row, FIRST: tl.constexpr):
    """Return the inputs of rows of data in a tile with FIRST columns, zeros where they are not ``valid``."""
    at_k = tl.arange(0, FIRST)
    x_at = x + source[:, None] * row_pitch(x_row, True) + at_k[None, :]
    return tl.load(x_at, mask=valid[:, None] & (at_k < masked_width(K, True))[None, :], other=0.0)


@triton.jit
def examples(
    data, source, valid, at_n, K, N, FIRST: tl.constexpr, LOSS: tl.constexpr, SOFT: tl.constexpr, WEIGHTED: tl.constexpr
):
    """Return the inputs, labels, targets and weights of rows of data as they lie in memory; nothing waits for them."""
    x, labels, target, weight, x_row, label_step, target_row, weight_step = data
    inputs = inputs_of(x, source, valid, K, x_row, FIRST)
    label, targets, shares = inputs, inputs, inputs
    if WEIGHTED:
        shares = tl.load(weight + source.to(tl.int64) * weight_step, mask=valid, other=0.0)
    if LOSS != CROSS_ENTROPY or SOFT:
        t_at = target + source[:, None] * row_pitch(target_row, True) + at_n[None, :]
        targets = tl.load(t_at, mask=valid[:, None] & (at_n < N)[None, :], other=0.0)
    else:
        label = tl.load(labels + source.to(tl.int64) * label_step, mask=valid, other=-1)
    return inputs, label, targets, shares


@kernel(numbers_from="M")
def narrow_kernel(
    x, weights, biases, grads, layers, rows, labels, target, weight,
    class_weight, dslope, stats, settings, hyper, counters, partials, ticket,
    M, x_row, label_step, target_row, weight_step, part,
    slope, output_slope, ignored_low, ignored_high, programs,
    BM: tl.constexpr, FIRST: tl.constexpr, WIDTH: tl.constexpr, OUTPUTS: tl.constexpr, LAYERS: tl.constexpr,
    ACTIVATION: tl.constexpr, OUTPUT: tl.constexpr, LOSS: tl.constexpr, SOFT: tl.constexpr, GATHER: tl.constexpr,
    WEIGHTED: tl.constexpr, CLASSES: tl.constexpr, ACCURACY: tl.constexpr, PRODUCT: tl.constexpr,
):  # fmt: skip
    """The loss of the batch in ``stats``; and in ``part`` elements a program, each program's sums of the gradients."""
    program = tl.program_id(0)
    output = layers + LAYERS * LAYER_COLUMNS
    K, N = tl.load(layers + INPUTS).to(tl.int32), tl.load(output + UNITS).to(tl.int32)
    count = tl.minimum(tl.load(counters + ROW_COUNT), M).to(tl.int32)
    ignored = ignored_label(ignored_low, ignored_high)
    rows = this_batch(rows, counters, GATHER)
    eps, option = tl.load(settings + SMOOTHING), tl.load(settings + OPTION)
    at_m, at_n = tl.arange(0, BM), tl.arange(0, OUTPUTS)
    w, minus = layers_of(weights, biases, layers, FIRST, WIDTH, OUTPUTS, LAYERS)
    # of the output layer first
    sums, bias_sums = (tl.zeros((OUTPUTS, WIDTH), tl.float32),), (tl.zeros((OUTPUTS, BM), tl.float32),)
    for layer in tl.static_range(LAYERS):
        sums += (tl.zeros((WIDTH, FIRST if layer == LAYERS - 1 else WIDTH), tl.float32),)  # type: ignore[assignment]
        bias_sums += (tl.zeros((WIDTH,), tl.float32),)  # type: ignore[assignment]
    losses = tl.zeros((BM,), tl.float32)
    right, scored = tl.full((), 0, tl.int32), tl.full((), 0, tl.int32)
    source = rows_from(rows, program * BM + at_m, count, GATHER)
    data = x, labels, target, weight, x_row, label_step, target_row, weight_step
    following = examples(data, source, program * BM + at_m < count, at_n, K, N, FIRST, LOSS, SOFT, WEIGHTED)
    # the row numbers of a tile are loaded two tiles before it, and what it reads one tile before
    source = rows_from(rows, (program + programs) * BM + at_m, count, GATHER)
    for tile in range(program, tl.cdiv(count, BM), programs):
        x_tile, label, t, shares = following
        x_tile = tl.trans(x_tile)
        counts = tile * BM + at_m < count
        ahead = (tile + programs) * BM + at_m < count
        following = examples(data, source, ahead, at_n, K, N, FIRST, LOSS, SOFT, WEIGHTED)
        source = rows_from(rows, (tile + 2 * programs) * BM + at_m, count, GATHER)
        # the inputs of each layer, and what gives the derivative of the layer below
        inputs, kept = (x_tile,), (x_tile,)
        for layer in tl.static_range(LAYERS):
            h, v = hidden(w[layer], inputs[layer], minus[layer], slope, ACTIVATION, PRODUCT)
            inputs += (h,)  # type: ignore[assignment]
            kept += (v,)  # type: ignore[assignment]
        z = affine(w[LAYERS], inputs[LAYERS], minus[LAYERS], PRODUCT)
        if LOSS != CROSS_ENTROPY or SOFT:
            t, label = tl.trans(t), at_m
        else:
            counts = (label >= 0) & (label < N) & (label != ignored)
        if WEIGHTED:
            shares = tl.where(counts, shares, 0.0)
        else:
            shares = tl.where(counts, 1.0, 0.0)
        if LOSS == CROSS_ENTROPY:
            dz, loss, hits = entropy(z, at_n, label, t, counts, shares, class_weight, eps, N, SOFT, CLASSES, ACCURACY)
        else:
            dz, loss, hits = elements(z, t, at_n, counts, shares, output_slope, option, N, LOSS, OUTPUT, ACCURACY)
        losses += loss
        if ACCURACY:
            # one sum of both, in halves of a number
            both = tl.sum(hits + (counts.to(tl.int32) << 16))
            right += both & 65535
            scored += both >> 16
        bias_added = (bias_sums[0] + dz,)
        dz = dz.to(x.dtype.element_ty)
        added = (outer(sums[0], dz, inputs[LAYERS], PRODUCT),)
        for down in tl.static_range(1, LAYERS + 1):
            dz, db = back(w[LAYERS + 1 - down], dz, kept[LAYERS + 1 - down], slope, ACTIVATION, PRODUCT)
            bias_added += (bias_sums[down] + db,)  # type: ignore[assignment]
            added += (outer(sums[down], dz, inputs[LAYERS - down], PRODUCT),)  # type: ignore[assignment]
        sums, bias_sums = added, bias_added
    # the loop has no register for it
    normaliser = normaliser_of(
        rows, count, labels, label_step, weight, weight_step, class_weight, ignored, N, settings, GATHER, CHUNK
    )
    scale = stored_scale(hyper, normaliser, settings, 0)
    grads += program.to(tl.int64) * (part // 8 * 8)
    store_sums(sums[0], tl.sum(bias_sums[0], axis=1), scale, grads, output)
    for down in tl.static_range(1, LAYERS + 1):
        store_sums(sums[down], bias_sums[down], scale, grads, output - down * LAYER_COLUMNS)
    if LOSS == BINARY_CROSS_ENTROPY:
        scored = scored * N
    finish_loss(
        tl.sum(losses.to(tl.float64)), right, scored, tl.full((), 0.0, tl.float32), partials, ticket, stats,
        dslope, account(stats, settings), normaliser, program, programs,
    )  # fmt: skip


@kernel(numbers_from="M")
def predict_narrow_kernel(
    x, weights, biases, layers, y,
    M, x_row, y_row, slope, output_slope, programs,
    BM: tl.constexpr, FIRST: tl.constexpr, WIDTH: tl.constexpr, OUTPUTS: tl.constexpr, LAYERS: tl.constexpr,
    ACTIVATION: tl.constexpr, OUTPUT: tl.constexpr, PRODUCT: tl.constexpr,
):  # fmt: skip
    """The outputs y (M, N) of x (M, K)."""
    K, N = tl.load(layers + INPUTS).to(tl.int32), tl.load(layers + LAYERS * LAYER_COLUMNS + UNITS).to(tl.int32)
    at_n = tl.arange(0, OUTPUTS)
    w, minus = layers_of(weights, biases, layers, FIRST, WIDTH, OUTPUTS, LAYERS)
    for tile in range(tl.program_id(0), tl.cdiv(M, BM), programs):
        at_m = tile * BM + tl.arange(0, BM)
        h = tl.trans(inputs_of(x, at_m, at_m < M, K, x_row, FIRST))
        for layer in tl.static_range(LAYERS):
            h, _ = hidden(w[layer], h, minus[layer], slope, ACTIVATION, PRODUCT)
        outputs = tl.trans(activate(affine(w[LAYERS], h, minus[LAYERS], PRODUCT), OUTPUT, output_slope))
        outputs = tl.where((at_n < N)[None, :], outputs, 0.0).to(y.dtype.element_ty)
        stored = (at_m < M)[:, None] & (at_n < masked_width(N, True))[None, :]
        tl.store(y + at_m[:, None] * row_pitch(y_row, True) + at_n[None, :], outputs, mask=stored)


def _checked(device: TritonDevice, op: str, call: SimpleNamespace, others: Mapping[str, Tensor]) -> configs.Tile:
    """Return the tile of an op. Raise an error for layers, or for arrays beside x and theirs, that the kernel does not
    take."""
    layers, most = call.layers, configs.narrow_layers(device.arch)
    tile = configs.narrow_tile(device.arch, device.precision, len(layers) - 1)
    if tile is None:
        raise BackendUnavailableError(
            f"{op}: there is no kernel for {device.precision} on {device.arch.family}; run the calls one by one"
        )
    if len({(layer.activation, layer.slope) for layer in layers[:-1]}) != 1 or len(layers) > most + 1:
        raise ArgumentError(
            f"{op}: layers: expected 1 to {most} hidden layers of one activation, then an output; "
            f"got {', '.join(layer.activation for layer in layers) or 'none'}. Run the calls one by one"
        )
    sizes = [layers[0].K, *(layer.N for layer in layers)]
    if max(sizes) > tile.columns:
        raise ArgumentError(f"{op}: layers: expected at most {tile.columns} inputs and units; run the calls one by one")
    # the kernel counts rows in 32 bits
    if max(len(call.x), call.M) > 1 << 30:
        raise ArgumentError(
            f"{op}: x: expected at most 2**30 rows of data and of a batch, got {len(call.x)} and {call.M}; "
            "run the calls one by one, as the plan 'graph' does"
        )
    matrices = [("x", call.x, sizes[0]), *((name, matrix, sizes[-1]) for name, matrix in others.items())]
    matrices += [(f"layers[{index}]: {name}", matrix, sizes[index]) for index, layer in enumerate(layers)
                 for name in ("w", "dw") if (matrix := getattr(layer, name, None)) is not None]  # fmt: skip
    for name, matrix, width in matrices:
        rows, columns = matrix.shape
        if columns != width:
            raise ArgumentError(f"{op}: {name}: expected {width} columns, as the layers have, got {columns}")
        dense = ":" not in name or rows <= 1 or matrix.stride(0) == -(-columns // 8) * 8
        if not (is_aligned(matrix) and dense):
            raise ArgumentError(
                f"{op}: {name}: expected rows of a multiple of 8 elements with zeros after their end, got "
                f"strides {matrix.stride()}; Backend.view makes such a matrix"
            )
    return tile


def _of_layers(device: TritonDevice, op: str, layers: Sequence[Any]) -> dict[str, Any]:
    """The kernels' arguments for the layers: the first tensor of each kind, and a table of ``LAYER_FIELDS``."""
    kinds = {"weights": ("w",), "biases": ("b",), "grads": ("dw", "db")}
    first, of_kind = {}, {name: kind for kind, names in kinds.items() for name in names}
    for kind, names in kinds.items():
        tensors = [tensor for layer in layers for name in names if (tensor := getattr(layer, name, None)) is not None]
        first[kind] = min(tensors, key=lambda tensor: tensor.data_ptr(), default=device.zeros(8, "real"))

    def place(name: str, tensor: Tensor | None) -> int:
        if tensor is None:
            return -1
        element = (tensor.data_ptr() - first[of_kind[name]].data_ptr()) // tensor.element_size()
        if tensor.ndim == 2 and element % 8:
            raise ArgumentError(
                f"{op}: layers: {name}: expected a multiple of 8 elements from the first one on, got {element}"
            )
        return element

    table = [[layer.K, layer.N, *(place(name, getattr(layer, name, None)) for name in of_kind), 0] for layer in layers]
    hidden, output = layers[0], layers[-1]
    return {
        **{kind: device.far_base(tensor) for kind, tensor in first.items()},
        "layers": device.numbers(table, "int64"), "slope": float(hidden.slope), "output_slope": float(output.slope),
    }  # fmt: skip


def _constants(device: TritonDevice, tile: configs.Tile, layers: Sequence[Any]) -> dict[str, Any]:
    hidden, output = layers[0], layers[-1]
    return {
        **configs.narrow_constants(tile, [hidden.K, *(layer.N for layer in layers)]), "PRODUCT": device.product,
        "ACTIVATION": ACTIVATIONS.index(hidden.activation), "OUTPUT": ACTIVATIONS.index(output.activation),
    }  # fmt: skip


@binds("train_narrow")
def bind_train_narrow(device: TritonDevice, call: SimpleNamespace) -> Run:
    """The contract's ``train_narrow``."""
    layers, loss = call.layers, call.loss
    tile = _checked(device, "train_narrow", call, {"target": call.target} if call.target.ndim == 2 else {})
    call.N = layers[-1].N
    arguments = arguments_of(
        device, narrow_kernel, call, **target_arguments(device, call), dslope=device.zeros(1, "real"), hyper=None,
        settings=device.numbers(loss_settings(loss, call), "real"), partials=device.zeros(5 * call.parts, "float64"),
        ticket=device.zeros(1, "int32"), programs=call.parts, **_of_layers(device, "train_narrow", layers),
    )  # fmt: skip
    if loss.ignore_index is None:
        # no label
        arguments |= {"ignored_low": -1, "ignored_high": -1}
    constants = {
        **_constants(device, tile, layers), "LOSS": LOSSES.index(loss.kind), "SOFT": loss.soft,
        "GATHER": int(call.rows is not None), "WEIGHTED": call.weight is not None,
        "CLASSES": call.class_weight is not None, "ACCURACY": loss.accuracy,
    }  # fmt: skip
    return keeping(call, device.launch(narrow_kernel, call.parts, arguments, constants, tile), call.parts)


@binds("predict_narrow")
def bind_predict_narrow(device: TritonDevice, call: SimpleNamespace) -> Run:
    """The contract's ``predict_narrow``."""
    tile = _checked(device, "predict_narrow", call, {"y": call.y})
    programs = min(-(-call.M // tile.rows), tile.programs * device.arch.processors)
    of_layers = _of_layers(device, "predict_narrow", call.layers)
    arguments = arguments_of(device, predict_narrow_kernel, call, programs=programs, **of_layers)
    constants = _constants(device, tile, call.layers)
    return keeping(call, device.launch(predict_narrow_kernel, programs, arguments, constants, tile), programs)
