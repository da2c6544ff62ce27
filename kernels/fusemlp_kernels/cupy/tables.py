"""The tables that the kernels over all layers read: an optimizer's rule, tensors with their states, sums of columns."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from fusemlp_kernels.contract import GROWTH_INTERVAL, HYPER, RATE_COLUMNS, TensorRule, UpdateRule
from fusemlp_kernels.cupy import sources
from fusemlp_kernels.cupy.device import FLOAT32, FLOAT64, THREADS, Array, Device, Run, in_sequence, strides_of
from fusemlp_kernels.cupy.layers import checked_counters, places

# Columns and rows that a block of ``column_sums`` takes, and elements that one of ``update`` does.
COLUMNS, PART_ROWS, ELEMENTS = 32, 256, 4 * THREADS
PLAIN = TensorRule()


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


def rule_on(device: Device, rule: UpdateRule, *, scaled: bool = False) -> Array:
    """A rule on the card."""
    return device.upload(rule_table(rule, scaled=scaled))


def checked_clock(device: Device, op: str, hyper: Array, rates: Array, counters: Array) -> dict[str, Array]:
    """What an update reads and the clock writes, checked."""
    return {
        "hyper": device.check(op, "hyper", hyper, (HYPER,), FLOAT64),
        "rates": device.check(op, "rates", rates, (None, RATE_COLUMNS), FLOAT64),
        "counters": checked_counters(device, op, counters),
    }


def bind_advance(device: Device, *, rule: UpdateRule, hyper: Array, rates: Array, counters: Array) -> Run:
    """The contract's ``advance``."""
    clock = checked_clock(device, "advance", hyper, rates, counters)
    return device.launch("update", "advance", "Advance", 1, rule=rule_on(device, rule), **clock)


class Tensors:
    """The table of ``update.cu``: matrices of parameters with their gradients and states."""

    def __init__(self, device: Device) -> None:
        self.device = device
        self.rows: list[dict[str, Any]] = []
        self.blocks = 0

    def add(
        self, rule: TensorRule, g: Array, p: Array | None = None, states: Sequence[Array] = (),
        shadow: Array | None = None,
    ) -> None:  # fmt: skip
        """One tensor: matrices or vectors, all of one shape."""
        if g.size == 0:
            return
        s0, s1 = (*states, None, None)[:2]
        arrays = {"g": g, "p": p, "s0": s0, "s1": s1, "shadow": shadow}
        present = [array for array in arrays.values() if array is not None]
        rows, columns = (1, g.shape[0]) if g.ndim == 1 else g.shape
        fields: dict[str, Any] = {"rows": rows, "columns": columns}
        if all(array.flags.c_contiguous for array in present):
            fields = {"rows": 1, "columns": g.size}
            for name, array in arrays.items():
                fields |= {name: array, f"{name}_col": 1}
        else:
            for name, array in arrays.items():
                row, column = (0, 0) if array is None else (0, *strides_of(array))[-2:]
                fields |= {name: array, f"{name}_row": row, f"{name}_col": column}
        self.rows.append({"first_block": self.blocks, **fields, "factor": rule.lr_factor, "decay": rule.weight_decay})
        self.blocks += -(-g.size // ELEMENTS)

    def bind_norm(self, norm: Array) -> Run:
        """norm (1,) = the Euclidean norm of all gradients."""
        if not self.blocks:
            return self.device.clear(norm)
        table, kept = self.device.rows_of("update", "Tensor", self.rows)
        return _holding(
            kept,
            self.device.launch(
                "update", "gradient_norm", "Norm", self.blocks, tensors=table, count=len(self.rows), norm=norm,
                partials=self.device.zeros(self.blocks, FLOAT64), ticket=self.device.zeros(1, "uint32"),
            ),
        )  # fmt: skip

    def bind_update(
        self, rule: UpdateRule, clock: dict[str, Array], norm: Array | None = None, scaled: bool = False
    ) -> Run:
        """The optimizer over all of them, and the clock."""
        if not self.blocks:
            return bind_advance(self.device, rule=rule, **clock)
        table, kept = self.device.rows_of("update", "Tensor", self.rows)
        return _holding(
            kept,
            self.device.launch(
                "update", "update", "Update", self.blocks, tensors=table, count=len(self.rows), norm=norm, **clock,
                rule=rule_on(self.device, rule, scaled=scaled),
                ticket=self.device.zeros(1, "uint32"),
            ),
        )  # fmt: skip


def _holding(arrays: Sequence[Array], run: Run) -> Run:
    """``run``, which reads ``arrays`` by addresses that stand in a table."""

    def holding(kept: Any = tuple(arrays)) -> None:
        run()

    return holding


class Sums:
    """The table of ``column_sums``: biases and learned slopes, and the factors of the products."""

    def __init__(self, device: Device) -> None:
        self.device = device
        self.vectors: list[dict[str, Any]] = []
        self.pairs: list[dict[str, Any]] = []
        self.blocks = 0

    def add(self, rule: TensorRule, out: Array, dz: Array | None = None, given: Array | None = None) -> None:
        """out (n,) gets the sums of the columns of dz (M, n), or what is given (n,)."""
        if out.size == 0:
            return
        groups = -(-out.size // COLUMNS)
        parts = 1 if dz is None else max(1, -(-len(dz) // PART_ROWS))
        room: dict[str, Any] = {}
        if parts > 1:
            room = {
                "sums": self.device.zeros(groups * parts * COLUMNS, FLOAT32),
                "tickets": self.device.zeros(groups, "uint32"),
            }
        self.vectors.append(
            {
                "first_block": self.blocks, **places(dz=dz), "given": given, "out": out, "out_step": strides_of(out)[0],
                "columns": out.size, "parts": parts, **room, "factor": rule.lr_factor, "decay": rule.weight_decay,
            }
        )  # fmt: skip
        self.blocks += groups * parts

    def scalars(self, count: int) -> Array:
        """Room for the factors of ``count`` products, (2 * count,) float32."""
        return self.device.zeros(2 * max(count, 1), FLOAT32)

    def bind(self, rule: UpdateRule, clock: dict[str, Array], m: int, scalars: Array | None, *, sgd: bool) -> Run:
        """The launch; with ``sgd`` it is the update of the vectors, and advances the clock.

        ``clock`` has the counters and, with ``sgd``, hyper and rates.
        """
        if not self.blocks and not self.pairs and not sgd:
            return in_sequence([])
        vectors, kept = self.device.rows_of("gradients", "Bias", self.vectors)
        pairs, _ = self.device.rows_of("gradients", "Pair", self.pairs)
        return _holding(
            kept,
            self.device.launch(
                "gradients", "column_sums", "Sums", max(self.blocks, 1), vectors=vectors, count=len(self.vectors),
                pairs=pairs, scalars=scalars, pair_count=len(self.pairs), **clock,
                rule=rule_on(self.device, rule), ticket=self.device.zeros(1, "uint32"), rows=m, sgd=sgd,
            ),
        )  # fmt: skip
