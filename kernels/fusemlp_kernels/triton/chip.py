"""Many whole training steps of small networks in one launch: a program trains one model of one hidden layer, and its
steps stay on the multiprocessor.

Activations and dz stay in registers, as in ``narrow``, whose pieces a step takes; the kernel is specialised on the
formulas. Parameters, states and gradients stay in the model's arenas, small enough for the L1 cache. The phases are
functions of their own: else the compiler would keep the addresses of one in registers through the others.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import triton
import triton.language as tl

from fusemlp_kernels.contract import ACTIVATIONS, LOSSES
from fusemlp_kernels.triton.clock import ROW_OFFSET
from fusemlp_kernels.triton.gradients import TENSOR_FIELDS, whole
from fusemlp_kernels.triton.loss import (
    MEAN,
    OPTION,
    SMOOTHING,
    account,
    ignored_label,
    normaliser_of,
    record_loss,
)
from fusemlp_kernels.triton.narrow import (
    DB,
    DW,
    INPUTS,
    UNITS,
    affine,
    back,
    biases_of,
    elements,
    entropy,
    hidden,
    inputs_of,
    outer,
    weights_of,
)
from fusemlp_kernels.triton.narrow import LAYER_COLUMNS as SUM_COLUMNS
from fusemlp_kernels.triton.pointwise_triton import (
    BINARY_CROSS_ENTROPY,
    CROSS_ENTROPY,
    stored_update,
)
from fusemlp_kernels.triton.resident import tick
from fusemlp_kernels.triton.resident_layers import (
    B_TASK,
    CHUNK,
    COUNTERS,
    FIXED_SLOPE,
    HYPER,
    LAYER_COLUMNS,
    LAYER_K,
    LAYER_N,
    LIVE_COLUMNS,
    RULE_COLUMNS,
    SETTING_COLUMNS,
    SHARE_COLUMNS,
    STATS,
    STEPS,
    W_TASK,
    B,
    W,
    number,
    rows_of,
)
from fusemlp_kernels.triton.tiles import batch_rows, kernel, masked_width

# Elements of a bias, no fewer than threads: of a shorter tensor Triton loads elements twice (``resident_layers``).
VECTOR: tl.constexpr = tl.constexpr(128)


@triton.jit
def tensors_of(row):
    """Return of a layer's weights and of its bias the first element, the length and the task."""
    width = masked_width(number(row, LAYER_K), True)
    weights = whole(tl.load(row + W), True), number(row, LAYER_N) * width, number(row, W_TASK)
    return weights, (tl.load(row + B), number(row, LAYER_N), number(row, B_TASK))


@triton.jit
def update_tensor(
    tensor, weights, params, grads, first, second, hyper, rule, tensors, shadowed,
    BLOCK: tl.constexpr, RULE: tl.constexpr,
):  # fmt: skip
    """Update one of ``tensors_of``, at most BLOCK elements, unless frozen."""
    start, length, task = tensor
    near = tl.arange(0, BLOCK)
    at, mask = start + near, near < tl.where(task >= 0, length, 0)
    numbers = tensors + tl.maximum(task, 0) * TENSOR_FIELDS
    g = tl.load(grads + at, mask=mask, other=0.0)
    # no average
    stored_update(
        g, params + at, first + at, second + at, first + at, weights + at, mask, hyper, rule, tl.load(numbers),
        tl.load(numbers + 1), shadowed, RULE,
    )  # fmt: skip


@triton.jit(noinline=True)
def update_all(
    model, weights, params, grads, first, second, layers, hyper, rules, tensors, trained, size, shadowed,
    FIRST: tl.constexpr, WIDTH: tl.constexpr, OUTPUTS: tl.constexpr, RULE: tl.constexpr,
):  # fmt: skip
    """Update the model's trained tensors by their gradients."""
    arena = whole(model * size, True)
    weights += arena
    params += arena
    grads += arena
    first += arena
    second += arena
    hyper += model * HYPER
    rule = rules + model * RULE_COLUMNS
    tensors += model * trained * TENSOR_FIELDS
    w0, b0 = tensors_of(layers)
    w2, b2 = tensors_of(layers + LAYER_COLUMNS)
    update_tensor(w0, weights, params, grads, first, second, hyper, rule, tensors, shadowed, WIDTH * FIRST, RULE)
    update_tensor(w2, weights, params, grads, first, second, hyper, rule, tensors, shadowed, WIDTH * OUTPUTS, RULE)
    # the biases, half of the elements each
    lower = tl.arange(0, VECTOR) < VECTOR // 2
    start = tl.where(lower, b0[0], b2[0] - VECTOR // 2)
    length, task = tl.where(lower, b0[1], b2[1] + VECTOR // 2), tl.where(lower, b0[2], b2[2])
    biases = start, length, task
    update_tensor(biases, weights, params, grads, first, second, hyper, rule, tensors, 0, VECTOR, RULE)


@triton.jit
def store_gradients(dw, grads, row):
    """Store the gradients by a layer's weights, with zeros between the rows; ``row`` is the layer's."""
    at_n, at_k, K = tl.arange(0, dw.shape[0]), tl.arange(0, dw.shape[1]), number(row, INPUTS)
    pitch = masked_width(K, True)
    at = whole(tl.load(row + DW), True) + at_n[:, None] * pitch + at_k[None, :]
    # 0 * NaN is NaN, and a NaN in the padding would stay there
    dw = tl.where((at_k < K)[None, :], dw, 0.0)
    tl.store(grads + at, dw, mask=(at_n < number(row, UNITS))[:, None] & (at_k < pitch)[None, :])


@triton.jit(noinline=True)
def gradients_of_batch(
    model, x, weights, params, grads, rows, labels, target, weight, class_weight, shares, table, settings, counters,
    stats, M, x_row, size, rows_size, label_step, target_row, target_col, weight_step, ignored_low, ignored_high,
    BM: tl.constexpr, FIRST: tl.constexpr, WIDTH: tl.constexpr, OUTPUTS: tl.constexpr,
    ACTIVATION: tl.constexpr, OUTPUT: tl.constexpr, LOSS: tl.constexpr, SOFT: tl.constexpr,
    WEIGHTED: tl.constexpr, CLASSES: tl.constexpr, ACCURACY: tl.constexpr, PRODUCT: tl.constexpr,
):  # fmt: skip
    """Store the gradients of the model's batch, and add its loss to ``stats``."""
    count = rows_of(counters, model, M)
    batch = rows + model * rows_size + tl.load(counters + model * COUNTERS + ROW_OFFSET)
    arena = whole(model * size, True)
    weights += arena
    params += arena
    grads += arena
    settings += model * SETTING_COLUMNS
    stats += model * STATS
    shares += model * 2 * SHARE_COLUMNS
    output = table + SUM_COLUMNS
    K, H, N = number(table, INPUTS), number(table, UNITS), number(output, UNITS)
    slope, output_slope = tl.load(shares + FIXED_SLOPE), tl.load(shares + SHARE_COLUMNS + FIXED_SLOPE)
    at_m, at_n, at_h = tl.arange(0, BM), tl.arange(0, OUTPUTS), tl.arange(0, WIDTH)
    ignored = ignored_label(ignored_low, ignored_high)
    mean, eps, option = tl.load(settings + MEAN) != 0.0, tl.load(settings + SMOOTHING), tl.load(settings + OPTION)
    normaliser = normaliser_of(
        batch, count, labels, label_step, weight, weight_step, class_weight, ignored, N, settings, 1, CHUNK
    )
    source = batch_rows(batch, at_m, count, 1).to(tl.int32)
    valid = source >= 0
    source = tl.maximum(source, 0).to(tl.int64)
    x_tile = tl.trans(inputs_of(x, source, valid, K, x_row, FIRST))
    w0 = weights_of(weights, table, WIDTH, FIRST)
    label, t = source, x_tile
    if LOSS != CROSS_ENTROPY or SOFT:
        t_at = target + source[:, None] * target_row + at_n.to(tl.int64)[None, :] * target_col
        t = tl.trans(tl.load(t_at, mask=valid[:, None] & (at_n < N)[None, :], other=0.0))
    else:
        label = tl.load(labels + source * label_step, mask=valid, other=-1)
        label = tl.where((label >= 0) & (label < N) & (label != ignored), label, -1).to(tl.int32)
    weight_of = tl.where(valid, 1.0, 0.0)
    if WEIGHTED:
        weight_of = tl.load(weight + source * weight_step, mask=valid, other=0.0)
    sums = account(stats, settings)
    h, before = hidden(w0, x_tile, -biases_of(params, table, WIDTH), slope, ACTIVATION, PRODUCT)
    w2 = weights_of(weights, output, OUTPUTS, WIDTH)
    z = tl.where(valid[None, :], affine(w2, h, -biases_of(params, output, OUTPUTS), PRODUCT), 0.0)
    counts = valid
    if LOSS == CROSS_ENTROPY and not SOFT:
        counts = label >= 0
        weight_of = tl.where(counts, weight_of, 0.0)
    if LOSS == CROSS_ENTROPY:
        dz, loss, right = entropy(z, at_n, label, t, counts, weight_of, class_weight, eps, N, SOFT, CLASSES, ACCURACY)
    else:
        dz, loss, right = elements(z, t, at_n, counts, weight_of, output_slope, option, N, LOSS, OUTPUT, ACCURACY)
    asked = tl.sum(counts.to(tl.int32))
    if LOSS == BINARY_CROSS_ENTROPY:
        asked = asked * N
    record_loss(
        tl.sum(loss).to(tl.float64), tl.sum(right).to(tl.float64), asked.to(tl.float64), stats, sums, normaliser
    )
    exists = normaliser != 0.0
    dz *= tl.where(mean, tl.where(exists, 1.0 / tl.where(exists, normaliser, 1.0), 0.0), 1.0).to(tl.float32)
    rounded = dz.to(x.dtype.element_ty)
    dh, db = back(w2, rounded, before, slope, ACTIVATION, PRODUCT)
    store_gradients(outer(tl.zeros((OUTPUTS, WIDTH), tl.float32), rounded, h, PRODUCT), grads, output)
    tl.store(grads + tl.load(output + DB) + at_n, tl.sum(dz, axis=1), mask=at_n < N)
    tl.store(grads + tl.load(table + DB) + at_h, db, mask=at_h < H)
    store_gradients(outer(tl.zeros((WIDTH, FIRST), tl.float32), dh, x_tile, PRODUCT), grads, table)


@kernel(numbers_from="M")
def chip_kernel(
    x, weights, parameters, grads, first, second, rows, labels, target, weight, class_weight, measured, layers, shares,
    table, settings, rules, tensors, counters, hyper, rates, stats, epoch_stats, live,
    M, x_row, trained, size, rows_size, rates_size, label_step, target_row, target_col, weight_step, ignored_low,
    ignored_high, shadowed,
    BM: tl.constexpr, FIRST: tl.constexpr, WIDTH: tl.constexpr, OUTPUTS: tl.constexpr,
    ACTIVATION: tl.constexpr, OUTPUT: tl.constexpr, LOSS: tl.constexpr, SOFT: tl.constexpr,
    WEIGHTED: tl.constexpr, CLASSES: tl.constexpr, ACCURACY: tl.constexpr, RULE: tl.constexpr, PRODUCT: tl.constexpr,
):  # fmt: skip
    """The steps that ``live`` names, a program for each of its entries; arguments as in ``resident_kernel``.

    ``table``: the rows of ``narrow.LAYER_FIELDS``, whose places hold for parameters and gradients.
    """
    entry = live + tl.program_id(0) * LIVE_COLUMNS
    model = tl.load(entry)
    for _ in range(number(entry, STEPS)):
        gradients_of_batch(
            model, x, weights, parameters, grads, rows, labels, target, weight, class_weight, shares, table, settings,
            counters, stats, M, x_row, size, rows_size, label_step, target_row, target_col, weight_step,
            ignored_low, ignored_high, BM, FIRST, WIDTH, OUTPUTS, ACTIVATION, OUTPUT, LOSS, SOFT,
            WEIGHTED, CLASSES, ACCURACY, PRODUCT,
        )  # fmt: skip
        tl.debug_barrier()
        update_all(
            model, weights, parameters, grads, first, second, layers, hyper, rules, tensors, trained, size, shadowed,
            FIRST, WIDTH, OUTPUTS, RULE,
        )  # fmt: skip
        tl.debug_barrier()
        tick(counters, hyper, rates, stats, epoch_stats, rules, entry, measured, M, rates_size)
        tl.debug_barrier()


def sums_table(layers: Sequence[Sequence[int]]) -> list[list[int]]:
    """Return the kernel's ``table`` for the rows of ``layers``."""
    return [[*(row[field.value] for field in (LAYER_K, LAYER_N, W, B, W, B)), 0] for row in layers]


def chip_constants(
    product: str, sizes: Sequence[int], batch: int, activations: Sequence[str], output: Any, code: int
) -> dict[str, Any]:
    """Return the constants of ``chip_kernel`` for a network of these widths, inputs first, and of these activations;
    ``output``: the operands of its loss; ``code``: that of the optimizer."""
    first, width, outputs, rows = (
        max(16, triton.next_power_of_2(side)) for side in (sizes[0], max(sizes[1:-1]), sizes[-1], batch)
    )
    codes, loss = [ACTIVATIONS.index(name) for name in activations], output.loss
    return {
        "BM": rows, "FIRST": first, "WIDTH": width, "OUTPUTS": outputs,
        "ACTIVATION": codes[0], "OUTPUT": codes[-1],
        "LOSS": LOSSES.index(loss.kind), "SOFT": loss.soft, "WEIGHTED": output.weight is not None,
        "CLASSES": output.class_weight is not None, "ACCURACY": loss.accuracy, "RULE": code, "PRODUCT": product,
    }  # fmt: skip
