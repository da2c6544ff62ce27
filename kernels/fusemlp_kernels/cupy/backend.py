"""The CuPy backend: the kernel contract on an NVIDIA card, over CuPy arrays."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np

from fusemlp_kernels.checks import binds, check_names
from fusemlp_kernels.contract import (
    ACTIVATIONS,
    GROWTH_INTERVAL,
    LOSSES,
    NEEDS_Z,
    NO_DROPOUT,
    STATS,
    TensorRule,
    Traits,
    UpdateRule,
)
from fusemlp_kernels.cupy import sources
from fusemlp_kernels.cupy.device import THREADS, Array, Device, Run, all_shared, in_sequence, nothing, strides_of
from fusemlp_kernels.cupy.products import bind_copy, bind_product, lane_blocks, transposed, usable
from fusemlp_kernels.errors import ArgumentError

# A longer row has a block, others a warp.
LONG_ROW = 1024
ROWS_A_BLOCK = 8
# Up to this many rows, each block sums the weights of the batch; for more rows, a launch before does.
SHORT_BATCH = 1024
# Columns and rows of a block of ``column_sums``, and elements of one of ``update``.
COLUMNS, PART_ROWS, ELEMENTS = 32, 256, 4 * THREADS
PLAIN = TensorRule()
_NO_PARTS = ["parts", "part"]


def activation_fields(call: SimpleNamespace) -> dict[str, Any]:
    """Return the kernels' fields for an activation."""
    learned = call.activation == "prelu"
    return {
        "activation": ACTIVATIONS.index(call.activation), "slope": call.slope,
        "slope_param": call.slope_param if learned else None,
    }  # fmt: skip


def bind_batch(device: Device, call: SimpleNamespace, rows: Array | None) -> tuple[Array, Run]:
    """Return the batch (M, K) as an array, and the run that copies x[rows] there."""
    if rows is None:
        return call.x, nothing
    gathered = device.matrix((call.M, call.K), "compute") if call.gathered is None else call.gathered
    return gathered, bind_copy(device, call.x, gathered, rows, call.counters)


def product_place(device: Device, wanted: Array) -> Array:
    """Return the array of a float32 product: ``wanted`` itself, if cuBLAS can write it."""
    return wanted if wanted.dtype == device.dtypes["real"] and usable(wanted) else device.product_room(*wanted.shape)


@binds("linear", without=["keep"])
def bind_linear(device: Device, call: SimpleNamespace) -> Run:
    """Bind the contract's ``linear``: a product, and a kernel after it."""
    batch, gather = bind_batch(device, call, call.rows)
    product = product_place(device, call.y)
    after = device.launch(
        "layers", "forward", lane_blocks(call.M, call.N), product=product if call.K else None, bias=call.b,
        z=call.z if call.activation in NEEDS_Z else None, out=call.y, counters=call.counters, rows=call.M,
        columns=call.N, **activation_fields(call), **(call.dropout or NO_DROPOUT).numbers,
    )  # fmt: skip
    return in_sequence([gather, bind_product(device, product, batch, transposed(call.w)), after])


@binds("grad_input", without=["keep"])
def bind_grad_input(device: Device, call: SimpleNamespace) -> Run:
    """Bind the contract's ``grad_input``: a product, and a kernel after it."""
    out, blocks = call.dz_prev, lane_blocks(call.M, call.K)
    learned: dict[str, Any] = {}
    if call.activation == "prelu":
        if blocks == 0:
            return device.clear(call.dslope)
        partials = device.allocate(blocks, "float64")
        learned = {"dslope": call.dslope, "partials": partials, "ticket": device.allocate(1, "uint32")}
    if call.activation == "identity" and call.dropout is None and call.N and usable(out):
        # cuBLAS rounds its float32 sums once, also to float16; before any other kernel that would be a second rounding
        return bind_product(device, out, call.dz, call.w)
    product = product_place(device, out)
    multiply = bind_product(device, product, call.dz, call.w)
    after = device.launch(
        "layers", "backward", blocks, product=product if call.N else None, out=out,
        source=call.z if call.activation in NEEDS_Z else call.y, **learned, counters=call.counters, rows=call.M,
        columns=call.K, **activation_fields(call), **(call.dropout or NO_DROPOUT).numbers,
    )  # fmt: skip
    return in_sequence([multiply, after])


def launch_loss(device: Device, kernel: str, call: SimpleNamespace, z: Array, bias: Array | None = None) -> Run:
    """Return the kernel over all rows of z, and before it the normaliser of a long batch.

    Targets and weights are gathered as they are loaded.
    """
    m, n, loss = call.M, call.N, call.loss
    stats = device.allocate(STATS, "float64") if call.stats is None else call.stats
    if m * n == 0:
        # the loss of no rows, or of no outputs, is zero
        zeros = [array for array in (stats[:1], call.dslope) if array is not None]
        return in_sequence([device.clear(array) for array in zeros])
    entropy = loss.kind == "cross_entropy"
    fields: dict[str, Any] = {
        "z": z, "bias": bias, "dz": call.dz, "indices": call.rows, "counters": call.counters, "stats": stats,
        "labels" if entropy and not loss.soft else "target": call.target, "weight": call.weight,
        "class_weight": call.class_weight, "dslope": call.dslope, "hyper": call.hyper, "rows": m, "columns": n,
        "kind": LOSSES.index(loss.kind), "mean": loss.reduction != "sum", "by_row": loss.reduction == "rows",
        "soft": loss.soft, "accuracy": loss.accuracy,
        "ignores": loss.ignore_index is not None, "ignored": loss.ignore_index,
        "divisor": 1.0 if entropy else float(n), "smoothing": loss.label_smoothing, "option": loss.option,
        **activation_fields(call),
    }  # fmt: skip
    blocks = m if n > LONG_ROW else -(-m // ROWS_A_BLOCK)
    fields |= {"partials": device.allocate(4 * blocks, "float64"), "ticket": device.allocate(1, "uint32")}
    before: list[Run] = []
    if m > SHORT_BATCH:
        fields["normaliser"] = device.allocate(1, "float64")
        before.append(device.launch("loss", "loss_normaliser", 1, **fields))
    name = f"{kernel}_of_long_rows" if n > LONG_ROW else kernel
    return in_sequence([*before, device.launch("loss", name, blocks, **fields)])


@binds("loss_grad", without=["ridge"])
def bind_loss_grad(device: Device, call: SimpleNamespace) -> Run:
    """Bind the contract's ``loss_grad``."""
    return launch_loss(device, "stored_loss", call, call.z)


@binds("linear_loss_grad", without=["ridge"])
def bind_linear_loss_grad(device: Device, call: SimpleNamespace) -> Run:
    """Bind the contract's ``linear_loss_grad``: a product, and its loss."""
    batch, gather = bind_batch(device, call, call.x_rows)
    product = device.product_room(call.M, call.N) if call.dz is None else product_place(device, call.dz)
    multiply = bind_product(device, product, batch, transposed(call.w))
    return in_sequence([gather, multiply, launch_loss(device, "product_loss", call, product, call.b)])


def rule_table(rule: UpdateRule, *, scaled: bool = False) -> np.ndarray[Any, Any]:
    """A rule as the kernels read it, one row; ``scaled``: the gradients carry the loss scale."""
    table = np.zeros(1, sources.layout("update", "Rule"))
    values = vars(rule) | {
        "code": rule.code,
        "inside": rule.convention == "scikit-learn",
        "clip_norm": math.inf if rule.clip_norm is None else rule.clip_norm,
        "scaled": scaled,
        "growth_interval": GROWTH_INTERVAL,
    }
    for name in table.dtype.names or ():
        table[name] = values[name]
    return table


class Table:
    """Entries of a kernel, each for the blocks from its ``first_block`` to the next entry's, in the call ``given``."""

    def __init__(self, device: Device, given: SimpleNamespace) -> None:
        self.device, self.given = device, given
        self.rows: list[dict[str, Any]] = []
        self.blocks = 0

    def enter(self, blocks: int, **fields: Any) -> None:
        """Add an entry."""
        if blocks:
            self.rows.append({"first_block": self.blocks, **fields})
            self.blocks += blocks


class Tensors(Table):
    """The table of ``update.cu``: parameters with their gradients and states."""

    def add(
        self, rule: TensorRule, g: Array, p: Array | None = None, states: Sequence[Array] = (),
        shadow: Array | None = None,
    ) -> None:  # fmt: skip
        """Add one tensor: matrices or vectors, all of one shape."""
        places = self.given.rule.places(states, None) if states else ()
        arrays = dict(zip(("s0", "s1", "average"), places, strict=False), g=g, p=p, shadow=shadow)
        arrays = {name: array for name, array in arrays.items() if array is not None}
        if all(array.flags.c_contiguous for array in arrays.values()):
            arrays = {name: array.reshape(-1) for name, array in arrays.items()}
        rows, columns = (1, *arrays["g"].shape)[-2:]
        numbers = {"rows": rows, "columns": columns, "factor": rule.lr_factor, "decay": rule.weight_decay}
        self.enter(-(-g.size // ELEMENTS), **numbers, **arrays)

    def bind_norm(self, norm: Array) -> Run:
        """Return the run of norm (1,) = the Euclidean norm of all gradients."""
        if not self.blocks:
            return self.device.clear(norm)
        partials = self.device.allocate(self.blocks, "float64")
        return self._launch("gradient_norm", norm=norm, partials=partials, ticket=self.device.allocate(1, "uint32"))

    def bind_update(self, norm: Array | None = None, *, scaled: bool = False) -> Run:
        """Return the run of the optimizer over all tensors, and of the clock."""
        if not self.blocks:
            return self._launch("advance", **self._clock(scaled=False))
        return self._launch("update", norm=norm, **self._clock(scaled=scaled))

    def _clock(self, *, scaled: bool) -> dict[str, Any]:
        """Return the fields of the rule, and those that an update reads and the clock writes."""
        clock = {name: getattr(self.given, name) for name in ("hyper", "rates", "counters")}
        rule = self.device.upload(rule_table(self.given.rule, scaled=scaled))
        return {**clock, "rule": rule, "ticket": self.device.allocate(1, "uint32")}

    def _launch(self, kernel: str, **fields: Any) -> Run:
        tensors, kept = self.device.table("update", "Tensor", self.rows)
        blocks = max(self.blocks, 1)
        return self.device.launch("update", kernel, blocks, kept, tensors=tensors, count=len(self.rows), **fields)


class Sums(Table):
    """The table of ``column_sums``: biases and learned slopes."""

    def add(self, out: Array, dz: Array | None = None, given: Array | None = None) -> None:
        """Add one vector: out (n,) gets the sums of the columns of dz (M, n), or a copy of ``given`` (n,)."""
        groups = -(-out.size // COLUMNS)
        parts = 1 if dz is None else max(1, -(-len(dz) // PART_ROWS))
        room: dict[str, Any] = {}
        if groups and parts > 1:
            sums = self.device.allocate(groups * parts * COLUMNS, "real")
            room = {"sums": sums, "tickets": self.device.allocate(groups, "uint32")}
        self.enter(groups * parts, dz=dz, given=given, out=out, columns=out.size, parts=parts, **room)

    def bind(self, factors: Array | None) -> Run:
        """Return the launch, which also writes the ``factors`` (2,) of the products."""
        if not self.blocks and factors is None:
            return nothing
        vectors, kept = self.device.table("gradients", "Bias", self.rows)
        layers = self.given.layers
        return self.device.launch(
            "gradients", "column_sums", max(self.blocks, 1), kept, vectors=vectors, count=len(self.rows),
            factors=factors, counters=self.given.counters, accumulate=self.given.rule.accumulate,
            rows=layers[0].M if layers else 0,
        )  # fmt: skip


def _batch(index: int, layer: SimpleNamespace) -> Array:
    """Return a layer's inputs; ``linear`` has gathered an x that is picked by row."""
    x = layer.x if layer.rows is None else layer.gathered
    if x is None:
        raise ArgumentError(
            f"grad_weight: layers[{index}]: gathered: expected the rows that linear has gathered, got None"
        )
    return x


@binds("grad_weight", without=_NO_PARTS)
def bind_grad_weight(device: Device, call: SimpleNamespace) -> Run:
    """Bind the contract's ``grad_weight``: a product for each weight, and one kernel for all biases and slopes."""
    sums, tensors = Sums(device, call), Tensors(device, call)
    # while gradients accumulate, beta is a number on the card
    scalars = device.allocate(2, "real") if call.rule.accumulate > 1 else None
    products: list[Run] = []
    for index, layer in enumerate(call.layers):
        if layer.dw is not None:
            products.append(bind_product(device, layer.dw, transposed(layer.dz), _batch(index, layer), scalars))
            tensors.add(PLAIN, layer.dw)
        if layer.db is not None:
            sums.add(layer.db, dz=layer.dz)
            tensors.add(PLAIN, layer.db)
    for slope in call.slopes:
        sums.add(slope.grad, given=slope.dslope)
        tensors.add(PLAIN, slope.grad)
    runs = [sums.bind(scalars), *products]
    if call.norm is not None:
        runs.append(tensors.bind_norm(call.norm))
    return in_sequence(runs)


@binds("update", without=[*_NO_PARTS, "noise", "rows"])
def bind_update(device: Device, call: SimpleNamespace) -> Run:
    """Bind the contract's ``update``: one launch, and one for the norm if it is needed and not call."""
    before: list[Run] = []
    norm = call.norm
    if norm is None and (call.rule.clip_norm is not None or call.scaled):
        norm = device.allocate(1, "float64")
        whole = Tensors(device, call)
        whole.add(PLAIN, call.grads)
        before.append(whole.bind_norm(norm))
    tensors = Tensors(device, call)
    for segment in call.segments:
        stretch = slice(segment.offset, segment.offset + segment.size)
        grads, params, shadow, *states = (
            None if arena is None else arena[stretch] for arena in (call.grads, call.params, call.shadow, *call.states)
        )
        tensors.add(segment.rule, grads, params, states, shadow)
    return in_sequence([*before, tensors.bind_update(norm, scaled=call.scaled)])


@binds("advance")
def bind_advance(device: Device, call: SimpleNamespace) -> Run:
    """Bind the contract's ``advance``: the update of no tensors."""
    return Tensors(device, call).bind_update()


BINDERS: dict[str, Callable[..., Callable[..., object]]] = {
    "linear": bind_linear,
    "linear_loss_grad": bind_linear_loss_grad,
    "loss_grad": bind_loss_grad,
    "grad_input": bind_grad_input,
    "grad_weight": bind_grad_weight,
    "update": bind_update,
    "advance": bind_advance,
}


_log = logging.getLogger("fusemlp.kernels")


class CupyBackend(Device):
    """Implements ``contract.Backend``, which describes its methods, with CuPy arrays.

    Everything runs on CuPy's current stream.
    """

    def __init__(self, traits: Traits, device: str | None, precision: str) -> None:
        super().__init__(device, precision)
        self.traits = traits

    def extent(self, array: Array) -> tuple[float, float]:
        return float(array.min()), float(array.max())

    def is_integer(self, array: Array) -> bool:
        return array.dtype.kind in "biu"

    def from_host(self, array: np.ndarray[Any, Any] | Array, dtype: str | None = None) -> Array:
        """See ``contract.Backend``. Rows of matrices start at multiples of 16 bytes."""
        kind = {"f": "real", "i": "int64", "u": "int64", "b": "bool"}[array.dtype.kind] if dtype is None else dtype
        if not isinstance(array, np.ndarray):
            if array.dtype == self.dtypes[kind] and (array.ndim != 2 or 1 in strides_of(array)):
                return array
            _log.info(
                "an array %s of %s on the device is copied once: the kernels read %s in rows without gaps",
                *(tuple(array.shape), array.dtype, self.dtypes[kind]),
            )
        if array.ndim != 2:
            there = self.allocate(array.size, kind)
        else:
            rows, columns = array.shape
            pitch = -(-columns // self.traits.row_multiple) * self.traits.row_multiple
            there = self.view(self.allocate(rows * pitch, kind), 0, (rows, columns), pitch)
        self.copy_into(there, array)
        return there

    def scalar(self, array: Array, index: int) -> Array:
        return array[index].astype(self.dtypes["real"])

    def bind(self, op: str, **operands: Any) -> Callable[..., object]:
        """See ``contract.Backend``; arrays of other libraries on the card are read where they are."""
        operands = {name: all_shared(operand) for name, operand in operands.items()}
        check_names(self.traits.name, BINDERS, op, operands)
        return BINDERS[op](self, **operands)
