"""The step of a narrow network on a wide batch in one launch, up to the update: forward, loss, backward, gradients;
and its predictions in one launch.

A program takes every ``programs``-th tile of BM rows. Activations and dz stay on chip; the sums of dw and db stay in
registers from the first tile to the last, and each program stores its own. The next launch, ``update``, adds
them in the order of the programs, so that all runs have the same bits.

The hidden layers, ``LAYERS`` of them, have one activation and fill tiles of one width; w0 and w1 are their weights, and
w2 those of the output layer. Padded columns hold the activation of zero, which meets zeros of the next layer's weights.
"""

from __future__ import annotations

import itertools
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
    PARTIALS,
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
    activate,
    derivative,
    element_loss,
    needs_z,
)
from fusemlp_kernels.triton.tiles import batch_rows, kernel, masked_width, product, row_pitch, this_batch, whole_sum

# A row of the table of layers, int64: widths, the places of the gradients in ``grads``, -1 for a frozen tensor, and 0.
LAYER_FIELDS = ("inputs", "units", "dw", "db", "zero")
INPUTS, UNITS, DW, DB, ZERO = (tl.constexpr(place) for place in range(len(LAYER_FIELDS)))
LAYER_COLUMNS: tl.constexpr = tl.constexpr(len(LAYER_FIELDS))
MOST_LAYERS: tl.constexpr = tl.constexpr(2)


@triton.jit
def weights_of(w, layer, ROWS: tl.constexpr, COLS: tl.constexpr):
    """Return the weights of a layer in a tile (ROWS, COLS), zero outside; ``layer`` is its row of the table."""
    at_n, at_k = tl.arange(0, ROWS), tl.arange(0, COLS)
    pitch, N = masked_width(tl.load(layer + INPUTS).to(tl.int32), True), tl.load(layer + UNITS).to(tl.int32)
    mask = (at_n < N)[:, None] & (at_k < pitch)[None, :]
    return tl.load(w + at_n[:, None] * pitch + at_k[None, :], mask=mask, other=0.0)


@triton.jit
def affine(w, x, b, layer, PRODUCT: tl.constexpr):
    """Return z = w @ x + b, float32; ``layer`` is its row of the table."""
    at_n = tl.arange(0, w.shape[0])
    z, rest = tl.zeros((w.shape[0], x.shape[1]), tl.float32), tl.zeros((w.shape[0], x.shape[1]), tl.float32)
    z, rest = product(w, x, z, rest, PRODUCT)
    # Triton makes a sum the first value of the product, in registers that it writes between wgmma's fence and wgmma
    minus = -tl.load(b + at_n, mask=at_n < tl.load(layer + UNITS), other=0.0)
    return whole_sum(z, rest, PRODUCT) - minus[:, None]


@triton.jit
def hidden(w, x, b, layer, slope, ACTIVATION: tl.constexpr, PRODUCT: tl.constexpr):
    """Return a hidden layer's outputs, of x's type, and the values that give its derivative, float32."""
    z = affine(w, x, b, layer, PRODUCT)
    y = activate(z, ACTIVATION, slope)
    v = y
    if needs_z(ACTIVATION):
        v = z
    return y.to(x.dtype), v


@triton.jit
def back(w, dz, v, slope, ACTIVATION: tl.constexpr, PRODUCT: tl.constexpr):
    """Return dz of the layer below from dz of a layer, of dz's type and in float32; see ``hidden`` for v."""
    acc, rest = tl.zeros((w.shape[1], dz.shape[1]), tl.float32), tl.zeros((w.shape[1], dz.shape[1]), tl.float32)
    acc, rest = product(tl.trans(w), dz, acc, rest, PRODUCT)
    below = whole_sum(acc, rest, PRODUCT) * derivative(v, ACTIVATION, slope)
    return below.to(dz.dtype), below


@triton.jit
def outer(dw, dz, x, PRODUCT: tl.constexpr):
    """Return dw + dz @ x.T."""
    dw, rest = product(dz, tl.trans(x), dw, tl.zeros((dz.shape[0], x.shape[0]), tl.float32), PRODUCT)
    return whole_sum(dw, rest, PRODUCT)


@triton.jit
def store_sums(dw, db, grads, layer):
    """Store a program's gradients of a layer, with zeros between the rows; those of a frozen tensor have no place.

    The table is read again, and the zero in it counts: the indices of the weights would fill registers in the loop.
    """
    zero = tl.load(layer + ZERO, volatile=True).to(tl.int32)
    at_n, at_k = zero + tl.arange(0, dw.shape[0]), zero + tl.arange(0, dw.shape[1])
    K, N = tl.load(layer + INPUTS, volatile=True).to(tl.int32), tl.load(layer + UNITS, volatile=True).to(tl.int32)
    dw_place, db_place = tl.load(layer + DW, volatile=True), tl.load(layer + DB, volatile=True)
    pitch = masked_width(K, True)
    mask = tl.where(dw_place >= 0, (at_n < N)[:, None] & (at_k < pitch)[None, :], False)
    dw_at = grads + whole(dw_place, True) + at_n[:, None] * pitch + at_k[None, :]
    tl.store(dw_at, tl.where((at_k < K)[None, :], dw, 0.0), mask=mask)
    tl.store(grads + db_place + at_n, db, mask=tl.where(db_place >= 0, at_n < N, False))


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
    named = (at_n < N)[:, None]
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
    total, mass = tl.sum(e, axis=0), tl.sum(q, axis=0)
    right = tl.zeros_like(counts.to(tl.int32))
    if ACCURACY:
        meant = label.to(tl.int32)
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
    named = (at_n < N)[:, None]
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


@kernel(numbers_from="M")
def narrow_kernel(
    x, w0, w1, w2, b0, b1, b2, grads, layers, rows, labels, target, weight,
    class_weight, dslope, stats, settings, hyper, counters, partials, ticket,
    M, x_row, label_step, target_row, weight_step, part,
    slope, output_slope, ignored_low, ignored_high, programs,
    BM: tl.constexpr, FIRST: tl.constexpr, WIDTH: tl.constexpr, OUTPUTS: tl.constexpr, LAYERS: tl.constexpr,
    ACTIVATION: tl.constexpr, OUTPUT: tl.constexpr, LOSS: tl.constexpr, SOFT: tl.constexpr, GATHER: tl.constexpr,
    WEIGHTED: tl.constexpr, CLASSES: tl.constexpr, ACCURACY: tl.constexpr, PRODUCT: tl.constexpr,
):  # fmt: skip
    """The loss of the batch in ``stats``; and in ``part`` elements a program, each program's sums of the gradients."""
    program = tl.program_id(0)
    second, output = layers + LAYER_COLUMNS, layers + LAYERS * LAYER_COLUMNS
    K, N = tl.load(layers + INPUTS).to(tl.int32), tl.load(output + UNITS).to(tl.int32)
    count = tl.minimum(tl.load(counters + ROW_COUNT), M).to(tl.int32)
    ignored = ignored_label(ignored_low, ignored_high)
    rows = this_batch(rows, counters, GATHER)
    normaliser = normaliser_of(
        rows, count, labels, label_step, weight, weight_step, class_weight, ignored, N, settings, GATHER, CHUNK
    )
    scale = stored_scale(hyper, normaliser, settings, 0)
    # read again after the loop, which has no register for it
    tl.store(partials + programs * PARTIALS + program, normaliser)
    tl.debug_barrier()
    eps, option = tl.load(settings + SMOOTHING), tl.load(settings + OPTION)
    at_k, at_n = tl.arange(0, FIRST), tl.arange(0, OUTPUTS)
    inside = at_k < masked_width(K, True)
    v0, v1 = weights_of(w0, layers, WIDTH, FIRST), weights_of(w1, second, WIDTH, WIDTH)
    v2 = weights_of(w2, output, OUTPUTS, WIDTH)
    sum0, bias0 = tl.zeros((WIDTH, FIRST), tl.float32), tl.zeros((WIDTH,), tl.float32)
    sum1, bias1 = tl.zeros((WIDTH, WIDTH), tl.float32), tl.zeros((WIDTH,), tl.float32)
    sum2, bias2 = tl.zeros((OUTPUTS, WIDTH), tl.float32), tl.zeros((OUTPUTS, BM), tl.float32)
    losses = tl.zeros((BM,), tl.float32)
    right, scored = tl.zeros((BM,), tl.int32), tl.zeros((BM,), tl.int32)
    for tile in range(program, tl.cdiv(count, BM), programs):
        at_m = tile * BM + tl.arange(0, BM)
        source = batch_rows(rows, at_m, count, GATHER)
        valid = source >= 0
        source = tl.where(valid, source, 0)
        x_at = x + source[:, None] * row_pitch(x_row, True) + at_k[None, :]
        x_tile = tl.trans(tl.load(x_at, mask=valid[:, None] & inside[None, :], other=0.0))
        label, t = source, x_tile
        if LOSS != CROSS_ENTROPY or SOFT:
            t_at = target + source[:, None] * row_pitch(target_row, True) + at_n[None, :]
            t = tl.trans(tl.load(t_at, mask=valid[:, None] & (at_n < N)[None, :], other=0.0))
        else:
            label = tl.load(labels + source * label_step, mask=valid, other=-1)
        weights = tl.where(valid, 1.0, 0.0)
        if WEIGHTED:
            weights = tl.load(weight + source * weight_step, mask=valid, other=0.0)
        h1, z1 = hidden(v0, x_tile, b0, layers, slope, ACTIVATION, PRODUCT)
        last, before = h1, z1
        if LAYERS > 1:
            last, before = hidden(v1, h1, b1, second, slope, ACTIVATION, PRODUCT)
        z = tl.where(valid[None, :], affine(v2, last, b2, output, PRODUCT), 0.0)
        counts = valid
        if LOSS == CROSS_ENTROPY and not SOFT:
            counts = (label >= 0) & (label < N) & (label != ignored)
            weights = tl.where(counts, weights, 0.0)
        if LOSS == CROSS_ENTROPY:
            dz, loss, hits = entropy(z, at_n, label, t, counts, weights, class_weight, eps, N, SOFT, CLASSES, ACCURACY)
        else:
            dz, loss, hits = elements(z, t, at_n, counts, weights, output_slope, option, N, LOSS, OUTPUT, ACCURACY)
        dz *= scale
        losses += loss
        if ACCURACY:
            right += hits
            scored += counts.to(tl.int32)
        bias2 += dz
        dz = dz.to(x.dtype.element_ty)
        sum2 = outer(sum2, dz, last, PRODUCT)
        dh, exact = back(v2, dz, before, slope, ACTIVATION, PRODUCT)
        if LAYERS > 1:
            sum1, bias1 = outer(sum1, dh, h1, PRODUCT), bias1 + tl.sum(exact, axis=1)
            dh, exact = back(v1, dh, z1, slope, ACTIVATION, PRODUCT)
        sum0, bias0 = outer(sum0, dh, x_tile, PRODUCT), bias0 + tl.sum(exact, axis=1)
    grads += program.to(tl.int64) * (part // 8 * 8)
    store_sums(sum0, bias0, grads, layers)
    if LAYERS > 1:
        store_sums(sum1, bias1, grads, second)
    store_sums(sum2, tl.sum(bias2, axis=1), grads, output)
    asked = tl.sum(scored)
    if LOSS == BINARY_CROSS_ENTROPY:
        asked = asked * N
    normaliser = tl.load(partials + programs * PARTIALS + program, volatile=True)
    finish_loss(
        tl.sum(losses.to(tl.float64)), tl.sum(right), asked, tl.full((), 0.0, tl.float32), partials, ticket, stats,
        dslope, account(stats, settings), normaliser, program, programs,
    )  # fmt: skip


@kernel(numbers_from="M")
def predict_narrow_kernel(
    x, w0, w1, w2, b0, b1, b2, layers, y,
    M, x_row, y_row, slope, output_slope, programs,
    BM: tl.constexpr, FIRST: tl.constexpr, WIDTH: tl.constexpr, OUTPUTS: tl.constexpr, LAYERS: tl.constexpr,
    ACTIVATION: tl.constexpr, OUTPUT: tl.constexpr, PRODUCT: tl.constexpr,
):  # fmt: skip
    """The outputs y (M, N) of x (M, K)."""
    second, output = layers + LAYER_COLUMNS, layers + LAYERS * LAYER_COLUMNS
    N, pitch = tl.load(output + UNITS).to(tl.int32), masked_width(tl.load(layers + INPUTS).to(tl.int32), True)
    at_k, at_n = tl.arange(0, FIRST), tl.arange(0, OUTPUTS)
    v0, v1 = weights_of(w0, layers, WIDTH, FIRST), weights_of(w1, second, WIDTH, WIDTH)
    v2 = weights_of(w2, output, OUTPUTS, WIDTH)
    for tile in range(tl.program_id(0), tl.cdiv(M, BM), programs):
        at_m = tile * BM + tl.arange(0, BM)
        x_at = x + at_m[:, None] * row_pitch(x_row, True) + at_k[None, :]
        inputs = tl.load(x_at, mask=(at_m < M)[:, None] & (at_k < pitch)[None, :], other=0.0)
        h, _ = hidden(v0, tl.trans(inputs), b0, layers, slope, ACTIVATION, PRODUCT)
        if LAYERS > 1:
            h, _ = hidden(v1, h, b1, second, slope, ACTIVATION, PRODUCT)
        outputs = tl.trans(activate(affine(v2, h, b2, output, PRODUCT), OUTPUT, output_slope))
        outputs = tl.where((at_n < N)[None, :], outputs, 0.0).to(y.dtype.element_ty)
        stored = (at_m < M)[:, None] & (at_n < masked_width(N, True))[None, :]
        tl.store(y + at_m[:, None] * row_pitch(y_row, True) + at_n[None, :], outputs, mask=stored)


def _checked(device: TritonDevice, op: str, call: SimpleNamespace, others: Mapping[str, Tensor]) -> configs.Tile:
    """Return the tile of an op. Raise an error for layers, or for arrays beside x and theirs, that the kernel does not
    take."""
    layers, tile = call.layers, configs.narrow_tile(device.arch, device.precision)
    if tile is None:
        raise BackendUnavailableError(
            f"{op}: there is no kernel for {device.precision} on {device.arch.family}; run the calls one by one"
        )
    hidden = {(layer.activation, layer.slope) for layer in layers[:-1]}
    if not 2 <= len(layers) <= MOST_LAYERS.value + 1 or len(hidden) != 1:
        raise ArgumentError(
            f"{op}: layers: expected 1 to {MOST_LAYERS.value} hidden layers of one activation, then an output; got "
            f"{', '.join(layer.activation for layer in layers) or 'none'}. Run the calls one by one"
        )
    if max(call.K, *(layer.N for layer in layers)) > tile.columns:
        raise ArgumentError(f"{op}: layers: expected at most {tile.columns} inputs and units; run the calls one by one")
    for index, (below, above) in enumerate(itertools.pairwise(layers)):
        if below.N != above.K:
            raise ArgumentError(
                f"{op}: layers[{index + 1}]: w: expected {below.N} columns, as layer {index} has outputs, got {above.K}"
            )
    matrices = {"x": call.x, **others}
    for name, matrix in matrices.items():
        width = layers[0].K if name == "x" else layers[-1].N
        if matrix.shape[1] != width:
            raise ArgumentError(f"{op}: {name}: expected {width} columns, as the layers have, got {matrix.shape[1]}")
    matrices |= {f"layers[{index}]: {name}": matrix for index, layer in enumerate(layers) for name in ("w", "dw")
                 if (matrix := getattr(layer, name, None)) is not None}  # fmt: skip
    for name, matrix in matrices.items():
        rows, columns = matrix.shape
        dense = ":" not in name or rows <= 1 or matrix.stride(0) == -(-columns // 8) * 8
        if not (is_aligned(matrix) and dense):
            raise ArgumentError(
                f"{op}: {name}: expected rows of a multiple of 8 elements with zeros after their end, got "
                f"strides {matrix.stride()}; Backend.view makes such a matrix"
            )
    return tile


def _table(layers: Sequence[Any], base: Tensor) -> list[list[int]]:
    """The rows of ``LAYER_FIELDS``."""

    def place(gradient: Tensor | None) -> int:
        if gradient is None:
            return -1
        element = (gradient.data_ptr() - base.data_ptr()) // gradient.element_size()
        if gradient.ndim == 2 and element % 8:
            raise ArgumentError(
                f"train_narrow: layers: dw: expected a multiple of 8 elements from the first one on, got {element}"
            )
        return element

    return [[one.K, one.N, *(place(getattr(one, name, None)) for name in ("dw", "db")), 0] for one in layers]


def _of_layers(device: TritonDevice, layers: Sequence[Any], base: Tensor) -> dict[str, Any]:
    """The kernels' arguments for the layers, whose gradients are found from ``base``."""
    hidden, output = layers[0], layers[-1]
    # of the layers that there are not, those of the first
    filled = [*layers[:-1], *[hidden] * (MOST_LAYERS.value + 1 - len(layers)), output]
    return {
        **{f"{name}{index}": getattr(one, name) for index, one in enumerate(filled) for name in "wb"},
        "layers": device.numbers(_table(layers, base), "int64"),
        "slope": float(hidden.slope), "output_slope": float(output.slope),
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
    gradients = [gradient for one in layers for gradient in (one.dw, one.db) if gradient is not None]
    spare = device.zeros(8, "real")
    base = min(gradients, key=lambda gradient: gradient.data_ptr(), default=spare)
    arguments = arguments_of(
        device, narrow_kernel, call, **target_arguments(device, call), dslope=spare, hyper=None,
        grads=device.far_base(base), settings=device.numbers(loss_settings(loss, call), "real"),
        partials=device.zeros(5 * call.parts, "float64"), ticket=device.zeros(1, "int32"), programs=call.parts,
        **_of_layers(device, layers, base),
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
    of_layers = _of_layers(device, call.layers, device.zeros(1, "real"))
    arguments = arguments_of(device, predict_narrow_kernel, call, programs=programs, **of_layers)
    constants = _constants(device, tile, call.layers)
    return device.launch(predict_narrow_kernel, programs, arguments, constants, tile)
