"""Many training steps in one call: a compiled loop walks a table of a step's calls; see ``compiled``.

This module does not import numba before a loop is bound.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from typing import Any

import numpy as np

from fusemlp_kernels.contract import ACTIVATIONS, LOSSES, NEEDS_Z, STATS, LossSpec, TensorRule, UpdateRule
from fusemlp_kernels.errors import ArgumentError, MissingLibraryError
from fusemlp_kernels.numpy.activations import Array
from fusemlp_kernels.numpy.compiled import tables as t
from fusemlp_kernels.philox import FEISTEL_ROUNDS, LANES, radix, seed_key, threshold
from fusemlp_kernels.pointwise import HYPERPARAMETERS, OPTIMIZERS

Operands = Mapping[str, Any]

# Names of ``tables`` and of the printed formulas that a program may do without, so that no code is compiled for them.
_ACTIVATIONS = tuple(name.upper() for name in ACTIVATIONS)
_ROWS = ("GATHER", "FORWARD", "ENTROPY", "ELEMENTWISE", "BACKWARD", "WEIGHT", "BIAS", "SLOPES", "PENALTY", "UPDATE")
_LOSSES = tuple(name.upper() for name in LOSSES)
_OPTIMIZERS = tuple(f"RULE_{name.upper()}" for name in OPTIMIZERS)
_FLAGS = (
    "KEEP",
    "CLIPS",
    "SOFT",
    "SMOOTHED",
    "IGNORES",
    "WEIGHTED",
    "CLASS_WEIGHTED",
    "WIDE",
    "DESCENDS",
    "SLOPE",
    "DSLOPE",
)
# Below this many classes the exponentials of all rows are taken in one go: a row does not fill the vector registers.
_WIDE = 64


# Set, one loop for all programs is compiled, once; unset, each kind of program compiles what it uses, in less time.
WHOLE_LOOP = "FUSEMLP_WHOLE_LOOP"
_loading = threading.Lock()


def _compiled(module: str) -> Any:
    """A module of ``compiled``, whose import imports numba."""
    try:
        return import_module(f"fusemlp_kernels.numpy.compiled.{module}")
    except ImportError as error:
        raise MissingLibraryError(
            f"plan: 'resident' on the numpy backend needs numba, which cannot be imported ({error}); install it again "
            "with pip install --force-reinstall numba, or use plan='eager'"
        ) from error


def row_order(n: int, seed: int, epoch: int) -> Array:
    """``philox.row_order``, compiled: the order of the rows in an epoch, (n,) int64."""
    with _loading:
        permute = _compiled("rows").compiled_row_order()
    order, a = np.empty(n, np.int64), radix(n)
    low, high = seed_key(seed)
    permute(order, np.empty((FEISTEL_ROUNDS, a), np.int64), np.empty((2, a), np.int64), low, high, epoch)
    return order


def _loop(absent: frozenset[str]) -> Callable[..., object]:
    """The loop without the branches of ``absent``, one for all threads, so that none compiles it again."""
    with _loading:
        loop: Callable[..., object] = _compiled("pruning").compiled_loop(absent)
    return loop


class _Table:
    """The rows of a program's calls, filled call by call; ``kept`` holds on to the arrays that they have the addresses
    of."""

    def __init__(self, real: Any, batch: int) -> None:
        self.real, self.batch = np.dtype(real), batch
        self.rows: list[list[int]] = []
        self.factors: list[list[float]] = []
        self.tensors: list[tuple[int, int]] = []
        self.tensor_factors: list[tuple[float, float]] = []
        self.kept: list[Array] = []
        self.widest = 1
        self.names: set[str] = set()

    def add(self, kind: str, *, numbers: Mapping[int, float] | None = None, **columns: Any) -> None:
        """A row; arrays among its columns are entered by their address."""
        row, factors = [0] * t.CALL_COLUMNS, [0.0] * t.CALL_FACTORS
        self.names.add(kind)
        row[t.KIND_OF_ROW] = getattr(t, kind)
        for name, value in columns.items():
            row[getattr(t, name)] = self.address(name, value) if isinstance(value, np.ndarray) else int(value or 0)
        for column, number in (numbers or {}).items():
            factors[column] = number
        self.widest = max(self.widest, row[t.N])
        self.rows.append(row)
        self.factors.append(factors)

    def address(self, name: str, array: Array) -> int:
        """Where an array without gaps begins."""
        if not array.flags.c_contiguous or (array.dtype != self.real and array.dtype != np.bool_):
            raise ArgumentError(
                f"train_resident: {name.lower()}: expected a contiguous array of {self.real}, got {array.dtype} with "
                f"strides {array.strides}"
            )
        self.kept.append(array)
        return int(array.__array_interface__["data"][0])

    def scratch(self, columns: int) -> Array:
        """Memory for a value of a batch."""
        return np.empty((self.batch, columns), self.real)

    def tensor(self, rule: TensorRule, offset: int = 0, size: int = 0) -> int:
        """The row of a trained tensor."""
        self.tensors.append((offset, size))
        self.tensor_factors.append((rule.lr_factor, rule.weight_decay))
        return len(self.tensors) - 1

    def activation(self, operands: Operands) -> tuple[dict[str, Any], dict[int, float]]:
        """The columns and numbers of an activation and of the dropout after it."""
        name = operands.get("activation", "identity")
        # the loop passes over the identity without a call
        self.names |= {name.upper()} - {"IDENTITY"}
        columns = {
            "ACTIVATION": ACTIVATIONS.index(name),
            "SLOPE": operands.get("slope_param"),
            "DSLOPE": operands.get("dslope"),
        }
        self.names |= {column for column in ("SLOPE", "DSLOPE") if columns[column] is not None}
        numbers = {t.FIXED_SLOPE: float(operands.get("slope", 0.0))}
        dropout = operands.get("dropout")
        if dropout is not None:
            self.names.add("KEEP")
            low, high = seed_key(dropout.seed)
            columns |= {"KEEP": operands["keep"], "KEY_LOW": low, "KEY_HIGH": high}
            columns |= {"MASK_LAYER": dropout.layer, "THRESHOLD": threshold(dropout.rate)}
            numbers[t.RATE] = dropout.rate
        return columns, numbers

    def batch_of(self, operands: Operands, rows: str) -> Array:
        """A layer's input, with the row that gathers it where it is picked from the data."""
        if operands.get(rows) is None:
            found: Array = operands["x"]
            return found
        gathered: Array = operands["gathered"]
        self.add("GATHER", OUT=gathered, K=gathered.shape[1])
        return gathered


def _linear(table: _Table, operands: Operands) -> None:
    y, w = operands["y"], operands["w"]
    columns, numbers = table.activation(operands)
    z = y
    if operands["activation"] in NEEDS_Z:
        z = operands.get("z")
        z = table.scratch(len(w)) if z is None else z
    x = table.batch_of(operands, "rows")
    table.add("FORWARD", N=len(w), K=w.shape[1], X=x, W=w, B=operands["b"], Y=y, Z=z, numbers=numbers, **columns)


def _linear_loss_grad(table: _Table, operands: Operands) -> None:
    w, loss, dz = operands["w"], operands["loss"], operands["dz"]
    table.names.add(_LOSSES[LOSSES.index(loss.kind)])
    kind = "ENTROPY" if loss.kind == "cross_entropy" else "ELEMENTWISE"
    columns, numbers = table.activation(operands)
    x = table.batch_of(operands, "x_rows")
    z = table.scratch(len(w))
    y = table.scratch(len(w)) if operands.get("activation") in NEEDS_Z else z
    dz = table.scratch(len(w)) if dz is None else dz
    table.add(kind, N=len(w), K=w.shape[1], X=x, W=w, B=operands["b"], Y=y, Z=z, DZ=dz, numbers=numbers, **columns)


def _grad_input(table: _Table, operands: Operands) -> None:
    w, y, z = operands["w"], operands["y"], operands.get("z")
    columns, numbers = table.activation(operands)
    table.add(
        "BACKWARD", N=len(w), K=w.shape[1], DZ=operands["dz"], W=w, Y=y, Z=y if z is None else z,
        OUT=operands["dz_prev"], numbers=numbers, **columns,
    )  # fmt: skip


def _gradients(table: _Table, layer: Operands, w: Array | None, b: Array | None, **columns: Any) -> None:
    """The gradients by a layer's weights and bias into w and b; None is left out."""
    x = layer["x"] if layer.get("rows") is None else layer["gathered"]
    if w is not None:
        table.add("WEIGHT", N=len(w), K=w.shape[1], X=x, DZ=layer["dz"], OUT=w, **columns)
    if b is not None:
        table.add("BIAS", N=len(b), DZ=layer["dz"], OUT=b, **columns)


def _grad_weight(table: _Table, operands: Operands) -> None:
    for layer in operands["layers"]:
        _gradients(table, layer, layer["dw"], layer["db"])
    for slope in operands.get("slopes", ()):
        table.add("SLOPES", N=1, DZ=slope["dslope"], OUT=slope["grad"])


def _grad_weight_update(table: _Table, operands: Operands) -> None:
    rule = operands["rule"]
    # with nothing else to do with the gradient the product lands in the parameter
    direct = rule.code == t.SGD

    def descend(param: Array, state: Sequence[Array], own: TensorRule, gradient: Callable[..., None]) -> None:
        if direct:
            gradient(param, FIRST=table.tensor(own), DESCENDS=True)
            return
        grad = np.zeros(param.shape, table.real)
        gradient(grad)
        at = table.tensor(own, 0, param.size)
        _add_update(table, param, grad, state, at, at + 1)

    for layer in operands["layers"]:
        for name in "wb":
            if layer[name] is not None:

                def gradient(out: Array, layer: Operands = layer, name: str = name, **columns: Any) -> None:
                    _gradients(table, layer, *((out, None) if name == "w" else (None, out)), **columns)

                descend(layer[name], layer[f"{name}_state"], layer[f"{name}_rule"], gradient)
    for slope in operands.get("slopes", ()):

        def by_slope(out: Array, slope: Operands = slope, **columns: Any) -> None:
            table.add("SLOPES", N=1, DZ=slope["dslope"], OUT=out, **columns)

        descend(slope["param"], slope["state"], slope["rule"], by_slope)
    table.add("CLOCK")


def _add_update(table: _Table, params: Array, grads: Array, states: Sequence[Array], first: int, end: int) -> None:
    # an optimizer without state reads none
    one, two = (*states, params, params)[:2]
    table.add("UPDATE", N=params.size, OUT=params, DZ=grads, Y=one, Z=two, FIRST=first, END=end)


def _update(table: _Table, operands: Operands) -> None:
    first = len(table.tensors)
    for segment in operands["segments"]:
        table.tensor(segment.rule, segment.offset, segment.size)
    _add_update(table, operands["params"], operands["grads"], operands["states"], first, len(table.tensors))
    table.add("CLOCK")


def _penalty(table: _Table, operands: Operands) -> None:
    for layer in operands["layers"]:
        w = layer["w"]
        strength = {t.STRENGTH: operands["ridge"].strength}
        table.add("PENALTY", N=len(w), K=w.shape[1], W=w, OUT=layer["dw"], numbers=strength)


def _advance(table: _Table, operands: Operands) -> None:
    table.add("CLOCK")


_ENTER: dict[str, Callable[[_Table, Operands], None]] = {
    "linear": _linear,
    "linear_loss_grad": _linear_loss_grad,
    "grad_input": _grad_input,
    "grad_weight": _grad_weight,
    "grad_weight_update": _grad_weight_update,
    "penalty": _penalty,
    "update": _update,
    "advance": _advance,
}


def bind_train_resident(
    *,
    calls: Sequence[tuple[str, Operands]],
    rows: Array,
    batch: int,
    arenas: Mapping[str, Array],
    epoch_stats: Array | None = None,
) -> Callable[[int], object]:
    """The contract's ``train_resident``; the calls have the addresses of all that lies in ``arenas``."""
    del arenas
    output = next((operands for op, operands in calls if op == "linear_loss_grad"), None)
    if output is None or "rule" not in calls[-1][1]:
        raise ArgumentError(
            "train_resident: calls: expected those of a training step, with linear_loss_grad and last what advances "
            f"the clock, got {', '.join(op for op, _ in calls)}"
        )
    clock, x = calls[-1][1], calls[0][1]["x"]
    real, loss, rule = output["w"].dtype, output["loss"], clock["rule"]
    if output.get("rows") is None:
        raise ArgumentError("train_resident: rows: the loop picks its batches from the data by row; give linear rows")
    table = _Table(real, batch)
    for op, operands in calls:
        _ENTER[op](table, operands)
    integer = loss.kind == "cross_entropy" and not loss.soft
    nothing = np.zeros(0, real)
    target, weight, class_weight = output["target"], output.get("weight"), output.get("class_weight")
    arguments = (
        np.array(table.rows, np.int64),
        np.array(table.factors, np.float64),
        _plain(x),
        _plain(target) if integer else np.zeros(0, np.int64),
        np.zeros((0, 0), real) if integer else _plain(target),
        nothing if weight is None else _plain(weight),
        nothing if class_weight is None else _plain(class_weight),
        rows,
        np.array(table.tensors, np.int64).reshape(-1, t.TENSOR_COLUMNS),
        np.array(table.tensor_factors, np.float64).reshape(-1, t.TENSOR_FACTORS),
        *_loss_tables(output, len(output["w"])),
        *_rule_tables(rule),
        output["counters"],
        clock["hyper"],
        clock["rates"],
        output["stats"],
        np.zeros((0, STATS)) if epoch_stats is None else epoch_stats,
        np.zeros(table.widest, real),
        # what philox draws for a row, eight columns to two words
        np.zeros(2 * (-(-table.widest // LANES)), np.uint64),
        np.zeros(6, np.int32),
        np.zeros(2, real),
        np.array([ord("N"), ord("T")], np.uint8),
    )
    loop, kept = _loop(_absent(table, rule, output)), table.kept

    def run(steps: int, _arrays: Sequence[Array] = kept) -> None:
        loop(steps, *arguments)

    return run


def _absent(table: _Table, rule: UpdateRule, output: Operands) -> frozenset[str]:
    """The names of ``tables`` that the program does without."""
    if os.environ.get(WHOLE_LOOP):
        return frozenset()
    present, loss = table.names | {_OPTIMIZERS[rule.code]}, output["loss"]
    given = {
        "CLIPS": rule.clip_norm is not None,
        "DESCENDS": _OPTIMIZERS[rule.code] == "RULE_SGD",
        "IGNORES": loss.ignore_index is not None,
        "SMOOTHED": _smoothed(loss),
        "SOFT": loss.soft,
        "WIDE": len(output["w"]) >= _WIDE,
        "WEIGHTED": output.get("weight") is not None,
        "CLASS_WEIGHTED": output.get("class_weight") is not None,
    }
    present |= {name for name, flag in given.items() if flag}
    return frozenset({*_ROWS, *_ACTIVATIONS, *_LOSSES, *_OPTIMIZERS, *_FLAGS} - present)


class _Writable:
    """A view of a read-only array that says that it can be written to, and never is."""

    def __init__(self, array: Array) -> None:
        self._array = array
        self.__array_interface__ = {**array.__array_interface__, "data": (array.ctypes.data, False)}


def _plain(array: Array) -> Array:
    """The array without gaps and aligned, as the one type for which there is a compiled loop."""
    array = np.require(array, requirements=("C", "A"))
    return array if array.flags.writeable else np.asarray(_Writable(array))


def _smoothed(loss: LossSpec) -> bool:
    """Whether a row's target is spread over the classes."""
    return loss.soft or loss.label_smoothing != 0.0


def _loss_tables(output: Operands, columns: int) -> tuple[Array, Array]:
    loss: LossSpec = output["loss"]
    table = [0] * t.LOSS_COLUMNS
    table[t.KIND], table[t.MEAN], table[t.SOFT] = LOSSES.index(loss.kind), loss.reduction == "mean", loss.soft
    table[t.SMOOTHED], table[t.WIDE] = _smoothed(loss), columns >= _WIDE
    table[t.IGNORES] = loss.ignore_index is not None
    table[t.IGNORED] = 0 if loss.ignore_index is None else loss.ignore_index
    table[t.ACCURACY] = loss.accuracy
    table[t.WEIGHTED], table[t.CLASS_WEIGHTED] = (output.get(n) is not None for n in ("weight", "class_weight"))
    factors = [0.0] * t.LOSS_FACTORS
    factors[t.SMOOTHING], factors[t.OPTION] = loss.label_smoothing, loss.option
    ridge = output.get("ridge")
    usual = 1.0 if loss.kind == "cross_entropy" else float(columns)
    factors[t.DIVISOR] = usual if ridge is None or ridge.divisor is None else ridge.divisor
    return np.array(table, np.int64), np.array(factors, np.float64)


def _rule_tables(rule: UpdateRule) -> tuple[Array, Array]:
    table = [0] * t.RULE_COLUMNS
    table[t.OPTIMIZER], table[t.DECOUPLED] = rule.code, rule.decoupled
    table[t.SKLEARN], table[t.ACCUMULATE] = rule.convention == "scikit-learn", rule.accumulate
    table[t.CLIPS] = rule.clip_norm is not None
    factors = [*(getattr(rule, name) for name in HYPERPARAMETERS), rule.clip_norm or 0.0]
    return np.array(table, np.int64), np.array(factors, np.float64)
