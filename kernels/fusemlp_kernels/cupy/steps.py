"""A training step of several models: the launches of one model's step, each for all of them.

Every product is one of cuBLAS's over arrays of addresses, every kernel has the models as a dimension of its grid.
Gradients pass through their arena, and the update is one launch.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from fusemlp_kernels.contract import ACTIVATIONS, LOSSES, NEEDS_Z, LossSpec, ResidentLayer, Ridge, Segment, UpdateRule
from fusemlp_kernels.cupy.device import FLOAT32, FLOAT64, Array, Device, strides_of
from fusemlp_kernels.cupy.layers import dropout_fields, places
from fusemlp_kernels.cupy.losses import LONG_ROW, ROWS_A_BLOCK, SHORT_BATCH, usual_divisor
from fusemlp_kernels.cupy.models import Each, Launches
from fusemlp_kernels.cupy.products import lane_blocks
from fusemlp_kernels.cupy.tables import COLUMNS, ELEMENTS, PART_ROWS, rule_table

# Elements that rows of a matrix begin at multiples of.
ROW_MULTIPLE = 8


class Step:
    """What is in the memory of a step, and its launches in order.

    ``arrays``: the operands that have the axis of models in front, by name, states as "states[i]".
    """

    def __init__(
        self,
        device: Device,
        batch: int,
        layers: Sequence[Sequence[ResidentLayer]],
        segments: Sequence[Sequence[Segment]],
        rules: Sequence[UpdateRule],
        losses: Sequence[LossSpec],
        arrays: dict[str, Array],
        ridges: Sequence[Ridge],
    ) -> None:
        self.batch, self.layers, self.segments, self.rules, self.losses = batch, layers, segments, rules, losses
        self.arrays, self.ridges = arrays, ridges
        self.depth, self.models = len(layers[0]), len(layers)
        self.put = put = Launches(device, self.models, 3 * self.depth)
        self.device = device
        trained = {segment.offset for segment in segments[0]}
        self.trained = [
            {name for name, at in (("w", one.w), ("b", one.b), ("slope", one.slope_at)) if at in trained}
            for one in layers[0]
        ]
        self.lowest = min((index for index, names in enumerate(self.trained) if names), default=self.depth)
        self.source, self.dz = [self._matrix(layers[0][0].inputs)], []
        self.z: list[Array | None] = []
        for index, one in enumerate(layers[0]):
            self.dz.append(self._matrix(one.outputs))
            if index < self.depth - 1:
                self.source.append(self._matrix(one.outputs))
                self.z.append(self._matrix(one.outputs) if one.activation in NEEDS_Z else None)
        self.slopes = put.room(self.depth, dtype=FLOAT32)
        self.shares = put.room(dtype=FLOAT64)
        self.counters, self.stats = Each(arrays["counters"]), Each(arrays["stats"])
        self.rule = put.upload(np.concatenate([rule_table(rule) for rule in rules]))
        self.draws = [_draws(layers, index) for index in range(self.depth)]

    def launches(self, x: Array, target: Array, weight: Array | None, class_weight: Array | None) -> Launches:
        """All of them."""
        first, last = self.layers[0], self.depth - 1
        self.put.kernel(
            "gather_rows", "Gather", lane_blocks(self.batch, first[0].inputs),
            **places(x=x), **_places(out=self.source[0]), indices=Each(self.arrays["rows"]), counters=self.counters,
            rows=self.batch, columns=first[0].inputs, counted=1,
        )  # fmt: skip
        for index in range(last):
            self._forward(index)
        self.put.product(self.dz[last], self.source[last], self._weights("params", last), b_transposed=True)
        self._loss(target, weight, class_weight)
        for index in range(last, self.lowest, -1):
            self._backward(index)
        self._gradients()
        self._update()
        return self.put

    def _matrix(self, columns: int) -> Array:
        """Room for (M, columns) of each model."""
        pitch = -(-columns // ROW_MULTIPLE) * ROW_MULTIPLE
        return self.put.room(self.batch, pitch, dtype=FLOAT32)[:, :, :columns]

    def _weights(self, name: str, index: int, arena: Array | None = None) -> Array:
        """The weights of a layer in an arena, (models, N, K)."""
        one, arena = self.layers[0][index], self.arrays[name] if arena is None else arena
        pitch = -(-one.inputs // ROW_MULTIPLE) * ROW_MULTIPLE
        shape = self.models, one.outputs, one.inputs
        return self.device.view(arena, one.w, shape, (strides_of(arena)[0], pitch, 1))

    def _from(self, name: str, at: int) -> Each:
        """What each model has in an arena from element ``at`` on."""
        return Each(self.arrays[name][:, at:])

    def _activation(self, index: int) -> dict[str, Any]:
        one = self.layers[0][index]
        return {
            "activation": ACTIVATIONS.index(one.activation),
            "slope": np.array([own[index].slope for own in self.layers]),
            "slope_param": None if one.slope_at is None else self._from("params", one.slope_at),
        }

    def _sums(self, blocks: int, partials: int = 1) -> dict[str, Any]:
        """Room for what the blocks of a model leave to the last of them."""
        return {
            "partials": Each(self.put.room(blocks * partials, dtype=FLOAT64)),
            "ticket": Each(self.put.room(dtype="uint32")),
        }

    def _forward(self, index: int) -> None:
        one, y = self.layers[0][index], self.source[index + 1]
        self.put.product(y, self.source[index], self._weights("params", index), b_transposed=True)
        self.put.kernel(
            "forward", "Forward", lane_blocks(self.batch, one.outputs),
            **_places(product=y, z=self.z[index], y=y), bias=self._from("params", one.b), bias_step=1,
            counters=self.counters, rows=self.batch, columns=one.outputs, **self._activation(index),
            **self.draws[index],
        )  # fmt: skip

    def _loss(self, target: Array, weight: Array | None, class_weight: Array | None) -> None:
        one, dz, losses = self.layers[0][-1], self.dz[-1], self.losses
        m, n, spec = self.batch, one.outputs, losses[0]
        classes = spec.kind == "cross_entropy" and not spec.soft
        blocks = m if n > LONG_ROW else -(-m // ROWS_A_BLOCK)
        divisors = [
            usual_divisor(loss, n) if ridge.divisor is None else ridge.divisor
            for loss, ridge in zip(losses, self.ridges, strict=True)
        ]
        fields: dict[str, Any] = {
            **_places(z=dz, dz=dz), "bias": self._from("params", one.b), "bias_step": 1,
            "indices": Each(self.arrays["rows"]), "counters": self.counters, "stats": self.stats,
            "labels": target if classes else None, "label_step": strides_of(target)[0] if classes else 0,
            **places(target=None if classes else target),
            "weight": weight, "weight_step": 0 if weight is None else strides_of(weight)[0],
            "class_weight": class_weight, "class_step": 0 if class_weight is None else strides_of(class_weight)[0],
            "dslope": Each(self.slopes[:, self.depth - 1 :]), "shares": Each(self.shares), "rows": m, "columns": n,
            "kind": LOSSES.index(spec.kind), "mean": np.array([loss.reduction == "mean" for loss in losses]),
            "soft": spec.soft, "accuracy": np.array([loss.accuracy for loss in losses]), "by_rows": 1,
            "ignores": spec.ignore_index is not None, "ignored": spec.ignore_index, "divisor": np.array(divisors),
            "smoothing": np.array([loss.label_smoothing for loss in losses]),
            "option": np.array([loss.option for loss in losses]),
            **self._activation(self.depth - 1), **self._sums(blocks, 4),
        }  # fmt: skip
        if m > SHORT_BATCH:
            fields["normaliser"] = Each(self.put.room(dtype=FLOAT64))
            self.put.kernel("loss_normaliser", "Loss", 1, **fields)
        name = "product_loss_of_long_rows" if n > LONG_ROW else "product_loss"
        self.put.kernel(name, "Loss", blocks, **fields)

    def _backward(self, index: int) -> None:
        """From a layer's dz to that of the layer below."""
        one, out, z = self.layers[0][index - 1], self.dz[index - 1], self.z[index - 1]
        self.put.product(out, self.dz[index], self._weights("params", index))
        blocks = lane_blocks(self.batch, one.outputs)
        learned: dict[str, Any] = {}
        if one.activation == "prelu":
            learned = {"dslope": Each(self.slopes[:, index - 1 :]), **self._sums(blocks)}
        own = [layers[index - 1].dropout for layers in self.layers]
        kept = np.array([1.0 if dropout is None else 1.0 - dropout.rate for dropout in own])
        self.put.kernel(
            "backward", "Backward", blocks,
            **_places(product=out, out=out, source=self.source[index] if z is None else z), **learned,
            counters=self.counters, rows=self.batch, columns=one.outputs, kept_share=kept,
            **self._activation(index - 1), **self.draws[index - 1],
        )  # fmt: skip

    def _gradients(self) -> None:
        """Biases and slopes, then the weights: with what is accumulated, in the arena of the gradients."""
        self._vectors()
        accumulated = any(rule.accumulate > 1 for rule in self.rules)
        arena = self.arrays["gradients"]
        fresh = self.put.room(arena.shape[1], dtype=FLOAT32) if accumulated else arena
        weights = []
        for index, names in enumerate(self.trained):
            if "w" not in names:
                continue
            out = self._weights("gradients", index, fresh)
            self.put.product(out, self.dz[index], self.source[index], a_transposed=True)
            at = self.layers[0][index].w
            weights.append((at, {"g": Each(fresh[:, at:]), "s0": self._from("gradients", at)}))
        if not weights or not (accumulated or any(ridge.strength for ridge in self.ridges)):
            return
        tensors, count, blocks = self._tensors(dict(weights))
        self.put.kernel(
            "fold_weights", "Fold", blocks, tensors=tensors, count=count, rule=self.rule,
            counters=self.counters, shares=Each(self.shares), stats=self.stats, **self._sums(blocks),
            strength=np.array([ridge.strength for ridge in self.ridges]),
        )  # fmt: skip

    def _vectors(self) -> None:
        vectors: list[dict[str, Any]] = []
        blocks = 0
        for index, names in enumerate(self.trained):
            one = self.layers[0][index]
            if "b" in names:
                groups, parts = -(-one.outputs // COLUMNS), -(-self.batch // PART_ROWS)
                room = {
                    "sums": Each(self.put.room(groups * parts * COLUMNS, dtype=FLOAT32)),
                    "tickets": Each(self.put.room(groups, dtype="uint32")),
                }
                vectors.append(
                    {
                        "first_block": blocks, **_places(dz=self.dz[index]), "out": self._from("gradients", one.b),
                        "out_step": 1, "columns": one.outputs, "parts": parts, **room,
                    }
                )  # fmt: skip
                blocks += groups * parts
            if "slope" in names and one.slope_at is not None:
                given, out = Each(self.slopes[:, index:]), self._from("gradients", one.slope_at)
                vectors.append(
                    {"first_block": blocks, "given": given, "out": out, "out_step": 1, "columns": 1, "parts": 1}
                )
                blocks += 1
        if not vectors:
            return
        self.put.kernel(
            "column_sums", "Sums", blocks, vectors=self.put.table("Bias", vectors),
            count=len(vectors), counters=self.counters, rule=self.rule, rows=self.batch,
        )  # fmt: skip

    def _tensors(self, arrays: dict[int, dict[str, Any]]) -> tuple[Each, int, int]:
        """The table of those tensors whose offset is in ``arrays``, their number and that of their blocks."""
        entries: list[dict[str, Any]] = []
        blocks = 0
        for index, segment in enumerate(self.segments[0]):
            if segment.offset not in arrays:
                continue
            own = [segments[index].rule for segments in self.segments]
            entries.append(
                {
                    "first_block": blocks, "rows": 1, "columns": segment.size,
                    "p": self._from("params", segment.offset), "p_col": 1, "g_col": 1, "s0_col": 1, "s1_col": 1,
                    "factor": np.array([rule.lr_factor for rule in own]),
                    "decay": np.array([rule.weight_decay for rule in own]), **arrays[segment.offset],
                }
            )  # fmt: skip
            blocks += -(-segment.size // ELEMENTS)
        return self.put.table("Tensor", entries), len(entries), blocks

    def _update(self) -> None:
        """The norm where one of the models clips, then the optimizer, and the clock."""
        states = [name for name in self.arrays if name.startswith("states[")]
        tensors, count, blocks = self._tensors(
            {
                segment.offset: {"g": self._from("gradients", segment.offset)}
                | {f"s{index}": self._from(name, segment.offset) for index, name in enumerate(states)}
                for segment in self.segments[0]
            }
        )
        clips = np.array([rule.clip_norm is not None for rule in self.rules])
        norm = None
        if clips.any() and count:
            norm = Each(self.put.room(dtype=FLOAT64))
            self.put.kernel(
                "gradient_norm", "Norm", blocks, tensors=tensors, count=count, norm=norm,
                **self._sums(blocks),
            )  # fmt: skip
        history = self.arrays.get("history")
        self.put.kernel(
            "update", "Update", max(blocks, 1), tensors=tensors, count=count,
            norm=norm, hyper=Each(self.arrays["hyper"]), rates=Each(self.arrays["rates"]),
            counters=self.counters, rule=self.rule,
            ticket=Each(self.put.room(dtype="uint32")), stats=self.stats,
            history=None if history is None else Each(history), epochs=0 if history is None else history.shape[1],
        )  # fmt: skip


def _places(**arrays: Array | None) -> dict[str, Any]:
    """``places`` of matrices that each model has of its own."""
    fields: dict[str, Any] = {}
    for name, array in arrays.items():
        _, row, column = (0, 0, 0) if array is None else strides_of(array)
        fields |= {name: None if array is None else Each(array), f"{name}_row": row, f"{name}_col": column}
    return fields


def _draws(layers: Sequence[Sequence[ResidentLayer]], index: int) -> dict[str, Any]:
    """The fields of the masks behind a layer, (models,) each."""
    # that there are counters has been seen
    own = [dropout_fields("", model[index].dropout, ()) for model in layers]
    return {name: np.array([fields.get(name, 0) for fields in own]) for name in set().union(*own)}
