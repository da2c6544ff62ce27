"""Many training steps in one call, by a loop that numba compiles; see ``compiled``.

This module does not import numba before a loop is bound.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Sequence

import numpy as np

from fusemlp_kernels.contract import (
    ACTIVATIONS,
    LOSSES,
    NEEDS_Z,
    STATS,
    LossSpec,
    ResidentLayer,
    Ridge,
    Segment,
    UpdateRule,
)
from fusemlp_kernels.errors import MissingLibraryError
from fusemlp_kernels.numpy.activations import Array
from fusemlp_kernels.numpy.compiled import tables as t
from fusemlp_kernels.philox import radix, seed_key, threshold

_loading = threading.Lock()


@functools.cache
def _cached_loop() -> Callable[..., int]:
    try:
        from fusemlp_kernels.numpy.compiled.steps import compiled_loop
    except ImportError as error:
        raise _without_numba(error) from error
    return compiled_loop()


@functools.cache
def _cached_row_order() -> Callable[..., int]:
    try:
        from fusemlp_kernels.numpy.compiled.rows import compiled_row_order
    except ImportError as error:
        raise _without_numba(error) from error
    return compiled_row_order()


def _without_numba(error: ImportError) -> MissingLibraryError:
    return MissingLibraryError(
        f"plan: 'resident' on the numpy backend needs numba, which cannot be imported ({error}); install it again with "
        "pip install --force-reinstall numba, or use plan='eager'"
    )


def row_order(n: int, seed: int, epoch: int) -> Array:
    """``philox.row_order``, compiled: the order of the rows in an epoch, (n,) int64."""
    with _loading:
        permute = _cached_row_order()
    order = np.empty(n, np.int64)
    low, high = seed_key(seed)
    permute(order, radix(n), low, high, epoch)
    return order


def _loop() -> Callable[..., int]:
    """The loop, one for all threads, so that none compiles it again."""
    with _loading:
        return _cached_loop()


def bind_train_resident(
    *,
    x: Array,
    target: Array,
    rows: Array,
    batch: int,
    layers: Sequence[ResidentLayer],
    params: Array,
    gradients: Array,
    states: tuple[Array, ...],
    segments: Sequence[Segment],
    rule: UpdateRule,
    loss: LossSpec,
    counters: Array,
    hyper: Array,
    rates: Array,
    stats: Array,
    weight: Array | None = None,
    class_weight: Array | None = None,
    history: Array | None = None,
    ridge: Ridge | None = None,
) -> Callable[[int], object]:
    """The contract's ``train_resident``."""
    real = params.dtype
    table, factors, work, masks = _layer_tables(layers, segments, batch)
    tensors = [(segment.offset, segment.size) for segment in segments]
    tensor_factors = [(segment.rule.lr_factor, segment.rule.weight_decay) for segment in segments]
    widest = max(layer.outputs for layer in layers)
    integer = loss.kind == "cross_entropy" and not loss.soft
    nothing = np.zeros(0, real)
    loss_table, loss_factors = _loss_tables(
        loss, layers[-1].outputs, ridge, weighted=weight is not None, by_class=class_weight is not None
    )
    rule_table, rule_factors = _rule_tables(rule)
    trained = [i for i, row in enumerate(table) if max(row[t.W_RULE], row[t.B_RULE], row[t.SLOPE_RULE]) >= 0]
    arguments = (
        min(trained, default=len(layers)),
        _plain(x),
        _plain(target) if integer else np.zeros(0, np.int64),
        np.zeros((0, 0), real) if integer else _plain(target),
        nothing if weight is None else _plain(weight),
        nothing if class_weight is None else _plain(class_weight),
        rows,
        params,
        gradients,
        *(*states, nothing, nothing)[:2],
        np.zeros(work, real),
        np.zeros(masks, np.bool_),
        # by layer twice (the second: gradients by the slopes), then a row
        np.zeros(2 * len(layers) + widest, real),
        np.array(table, np.int64),
        np.array(factors, np.float64),
        np.array(tensors, np.int64).reshape(-1, t.TENSOR_COLUMNS),
        np.array(tensor_factors, np.float64).reshape(-1, t.TENSOR_FACTORS),
        loss_table,
        loss_factors,
        rule_table,
        rule_factors,
        counters,
        hyper,
        rates,
        stats,
        np.zeros((0, STATS)) if history is None else history,
        np.zeros(6, np.int32),
        np.zeros(2, real),
        np.array([ord("N"), ord("T")], np.uint8),
    )
    loop = _loop()

    def run(steps: int) -> None:
        loop(steps, *arguments)

    return run


class _Writable:
    """A view of a read-only array that says that it can be written to, and never is."""

    def __init__(self, array: Array) -> None:
        self._array = array
        self.__array_interface__ = {**array.__array_interface__, "data": (array.ctypes.data, False)}


def _plain(array: Array) -> Array:
    """The array without gaps and aligned, as the one type for which there is a compiled loop."""
    array = np.require(array, requirements=("C", "A"))
    return array if array.flags.writeable else np.asarray(_Writable(array))


def _layer_tables(
    layers: Sequence[ResidentLayer], segments: Sequence[Segment], batch: int
) -> tuple[list[list[int]], list[list[float]], int, int]:
    """The rows of the layers, and the elements of workspace and masks.

    Lists, as the other tables are until they are full: writing into an array number by number takes many times as long.
    """
    rule_at = {segment.offset: index for index, segment in enumerate(segments)}
    table = [[-1] * t.LAYER_COLUMNS for _ in layers]
    factors = [[0.0] * t.LAYER_FACTORS for _ in layers]
    # the batch comes first
    end, masks = _aligned(batch * layers[0].inputs), 0
    for index, layer in enumerate(layers):
        row = table[index]
        row[t.INPUTS], row[t.OUTPUTS], row[t.W], row[t.B] = layer.inputs, layer.outputs, layer.w, layer.b
        row[t.SLOPE] = -1 if layer.slope_at is None else layer.slope_at
        row[t.W_RULE], row[t.B_RULE] = rule_at.get(layer.w, -1), rule_at.get(layer.b, -1)
        row[t.SLOPE_RULE] = -1 if layer.slope_at is None else rule_at.get(layer.slope_at, -1)
        row[t.ACTIVATION] = ACTIVATIONS.index(layer.activation)
        size = _aligned(batch * layer.outputs)
        row[t.Y], row[t.DZ] = end, end + size
        row[t.Z] = end
        end += 2 * size
        if layer.activation in NEEDS_Z:
            row[t.Z] = end
            end += size
        factors[index][t.FIXED_SLOPE] = layer.slope
        row[t.DROPS] = 0
        if layer.dropout is not None:
            row[t.KEY_LOW], row[t.KEY_HIGH] = seed_key(layer.dropout.seed)
            row[t.DROPS], row[t.MASK_LAYER], row[t.KEEP] = 1, layer.dropout.layer, masks
            row[t.THRESHOLD] = threshold(layer.dropout.rate)
            factors[index][t.RATE] = layer.dropout.rate
            masks += batch * layer.outputs
    return table, factors, end, masks


def _aligned(size: int) -> int:
    return -(-size // t.ALIGNMENT) * t.ALIGNMENT


def _loss_tables(
    loss: LossSpec, outputs: int, ridge: Ridge | None, *, weighted: bool, by_class: bool
) -> tuple[Array, Array]:
    table = [0] * t.LOSS_COLUMNS
    table[t.KIND], table[t.MEAN], table[t.SOFT] = LOSSES.index(loss.kind), loss.reduction == "mean", loss.soft
    table[t.IGNORES] = loss.ignore_index is not None
    table[t.IGNORED] = 0 if loss.ignore_index is None else loss.ignore_index
    table[t.ACCURACY], table[t.WEIGHTED], table[t.CLASS_WEIGHTED] = loss.accuracy, weighted, by_class
    factors = [0.0] * t.LOSS_FACTORS
    factors[t.SMOOTHING], factors[t.OPTION] = loss.label_smoothing, loss.option
    ridge = Ridge() if ridge is None else ridge
    usual = 1.0 if loss.kind == "cross_entropy" else float(outputs)
    factors[t.DIVISOR] = usual if ridge.divisor is None else ridge.divisor
    factors[t.STRENGTH] = ridge.strength
    return np.array(table, np.int64), np.array(factors, np.float64)


def _rule_tables(rule: UpdateRule) -> tuple[Array, Array]:
    table = [0] * t.RULE_COLUMNS
    table[t.OPTIMIZER], table[t.DECOUPLED] = rule.code, rule.decoupled
    table[t.SKLEARN], table[t.ACCUMULATE] = rule.convention == "scikit-learn", rule.accumulate
    table[t.CLIPS] = rule.clip_norm is not None
    factors = [0.0] * t.RULE_FACTORS
    factors[t.MOMENTUM], factors[t.BETA1], factors[t.BETA2], factors[t.EPS] = (
        rule.momentum,
        rule.beta1,
        rule.beta2,
        rule.eps,
    )
    factors[t.CLIP_NORM] = 0.0 if rule.clip_norm is None else rule.clip_norm
    return np.array(table, np.int64), np.array(factors, np.float64)
