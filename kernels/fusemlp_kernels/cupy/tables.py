"""The tables that the kernels over all layers read: an optimizer's rule, tensors with their states, sums of columns."""

from __future__ import annotations

import math
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np

from fusemlp_kernels.contract import GROWTH_INTERVAL, TensorRule, UpdateRule
from fusemlp_kernels.cupy import sources
from fusemlp_kernels.cupy.device import THREADS, Array, Device, Run, nothing

# Columns and rows of a block of ``column_sums``, and elements of one of ``update``.
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
