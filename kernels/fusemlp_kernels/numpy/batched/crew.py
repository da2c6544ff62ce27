"""A crew: models of one structure whose steps are made together."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import numpy as np

from fusemlp_kernels.contract import BATCH_INDEX, NEEDS_Z, ROW_COUNT, ResidentLayer, UpdateRule
from fusemlp_kernels.numpy import blas
from fusemlp_kernels.numpy.activations import Array, Run, activate, drop, in_sequence, multiply_by_derivative
from fusemlp_kernels.numpy.batched.common import Models, rows_of, spans, stretches
from fusemlp_kernels.numpy.batched.losses import bind_losses
from fusemlp_kernels.numpy.batched.masks import Masks
from fusemlp_kernels.numpy.batched.ridge import Ridges
from fusemlp_kernels.numpy.batched.updates import bind_update
from fusemlp_kernels.numpy.batched.walk import Batches, Clocks
from fusemlp_kernels.numpy.gradients import slope_sum
from fusemlp_kernels.numpy.update import Accumulate, bind_tensor_update


class Crew:
    """``members`` of a fleet, bound to step with batches of ``height`` rows; ``run(steps)``.

    Arrays of a layer are (members * height, N), one member's batch behind the other's.
    """

    def __init__(self, models: Models, members: Sequence[int], height: int) -> None:
        self._models, self._members, self._height = models, members, height
        self._clocks = Clocks(models, members)
        self._batches = Batches(models, members, height, self._clocks)
        first = members[0]
        # by layer, then by member
        self._layers = list(zip(*(models.layers[member] for member in members), strict=True))
        self._depth = len(self._layers)
        trained = models.trained(first)
        self._first = next(
            (
                index
                for index, layer in enumerate(models.layers[first])
                if trained & {layer.w, layer.b, -1 if layer.slope_at is None else layer.slope_at}
            ),
            self._depth,
        )
        real, rows = models.params.dtype, len(members) * height
        widths = [layer.outputs for layer in models.layers[first]]
        # outputs, pre-activations (the same where they are not needed), masks; the last layer's is dz in the end
        self._y = [np.empty((rows, width), real) for width in widths]
        self._z = [
            np.empty_like(y) if layer.activation in NEEDS_Z and index < self._depth - 1 else y
            for index, (y, layer) in enumerate(zip(self._y, models.layers[first], strict=True))
        ]
        self._keep: list[Array | None] = [
            None if layer.dropout is None else np.empty((rows, layer.outputs), np.bool_)
            for layer in models.layers[first]
        ]
        self._dz = [np.empty_like(y) if index >= self._first else y for index, y in enumerate(self._y[:-1])]
        self._dz.append(self._y[-1])
        self._dslopes = np.zeros((self._depth, len(members), 1), real)
        self._forward = in_sequence([run for index in range(self._depth) for run in self._bind_forward(index)])
        dz = self._y[-1].reshape(len(members), height, -1)
        self._ridges = Ridges(models, members, dz, self._dslopes[-1], self._clocks.stats)
        self._loss = self._bind_loss()
        backward = [run for index in range(self._depth - 1, self._first, -1) for run in self._bind_backward(index)]
        self._backward = in_sequence([*backward, *self._bind_update()])

    def run(self, steps: int) -> None:
        """Make so many steps."""
        clocks, batches, loss = self._clocks, self._batches, self._loss
        clocks.enter()
        for _ in range(steps):
            counts = clocks.each(ROW_COUNT)
            batches.gather(counts)
            self._forward()
            loss(counts)
            self._backward()
            clocks.advance()
        clocks.leave()

    def _of(self, array: Array, place: int) -> Array:
        return array[rows_of(slice(place, place + 1), self._height)]

    def _weights(self, arena: Array, place: int, layer: ResidentLayer) -> Array:
        flat: Array = arena[self._members[place], layer.w : layer.w + layer.outputs * layer.inputs]
        return flat.reshape(layer.outputs, layer.inputs)

    def _slopes(self, index: int) -> list[Array | None]:
        return [
            None if layer.slope_at is None else self._models.params[member, layer.slope_at : layer.slope_at + 1]
            for member, layer in zip(self._members, self._layers[index], strict=True)
        ]

    def _input(self, index: int) -> Array:
        return self._batches.x if index == 0 else self._y[index - 1]

    def _bind_forward(self, index: int) -> list[Run]:
        layers, y, z = self._layers[index], self._y[index], self._z[index]
        layer, source = layers[0], self._input(index)
        stacked = z.reshape(len(layers), self._height, layer.outputs)
        biases = [
            (stacked[places], self._models.params[fleet, None, layer.b : layer.b + layer.outputs])
            for places, fleet in spans(self._members)
        ]
        products = [
            blas.product(
                self._of(z, place),
                self._of(source, place),
                self._weights(self._models.params, place, own),
                transpose_b=True,
            )
            for place, own in enumerate(layers)
        ]

        def affine() -> None:
            for into, bias in biases:
                np.copyto(into, bias)
            for product in products:
                product(1.0, 1.0)

        runs: list[Run] = [affine]
        if index == self._depth - 1:
            return runs
        slopes = self._slopes(index)
        for places in stretches(_slope_keys(layers, slopes)):
            rows, at = rows_of(places, self._height), places.start
            before = None if z is y else z[rows]
            runs.append(activate(layer.activation, y[rows], before, layers[at].slope, slopes[at]))
        return [*runs, *self._bind_dropout(index)]

    def _bind_dropout(self, index: int) -> list[Run]:
        keep = self._keep[index]
        if keep is None:
            return []
        layers, y = self._layers[index], self._y[index]
        dropouts = [layer.dropout for layer in layers if layer.dropout is not None]
        masks = Masks(dropouts, self._height, y.shape[1])
        clocks, stacked = self._clocks, keep.reshape(len(layers), self._height, -1)
        drop_others = drop(y, keep)
        scales = [1.0 / (1.0 - dropout.rate) for dropout in dropouts]
        column = np.repeat(np.array(scales, np.float64).astype(y.dtype), self._height)[:, None]

        def run() -> None:
            masks.fill(stacked, clocks.each(BATCH_INDEX))
            drop_others()
            np.multiply(y, column, out=y)

        return [run]

    def _bind_loss(self) -> Callable[[Sequence[int]], None]:
        last = self._depth - 1
        loss = bind_losses(
            self._models,
            self._members,
            self._height,
            self._y[last],
            self._batches,
            self._clocks,
            self._layers[last],
            self._slopes(last),
            list(self._dslopes[last]),
        )
        return loss if self._ridges.usual else self._ridges.around(loss)

    def _bind_backward(self, index: int) -> list[Run]:
        """From dz of layer ``index`` to dz of the one before it."""
        above, layers = self._layers[index], self._layers[index - 1]
        dz, into, y, keep = self._dz[index], self._dz[index - 1], self._y[index - 1], self._keep[index - 1]
        z = self._z[index - 1]
        rates = [0.0 if layer.dropout is None else layer.dropout.rate for layer in layers]
        scales = [1.0 / (1.0 - rate) for rate in rates]
        products = [
            blas.product(self._of(into, place), self._of(dz, place), self._weights(self._models.params, place, own))
            for place, own in enumerate(above)
        ]

        def multiply() -> None:
            for product, scale in zip(products, scales, strict=True):
                product(scale, 0.0)

        runs: list[Run] = [multiply]
        slopes = self._slopes(index - 1)
        keys = [(key, rate) for key, rate in zip(_slope_keys(layers, slopes), rates, strict=True)]
        for places in stretches(keys):
            rows, at = rows_of(places, self._height), places.start
            runs.append(
                multiply_by_derivative(
                    layers[at].activation,
                    into[rows],
                    y[rows],
                    None if z is y else z[rows],
                    slope=layers[at].slope,
                    slope_param=slopes[at],
                    dslope=self._dslopes[index - 1, at],
                    keep=None if keep is None else keep[rows],
                    rate=rates[at],
                )
            )
        return runs

    def _bind_update(self) -> list[Run]:
        """The gradients by the parameters, and the update."""
        models, members, clocks = self._models, self._members, self._clocks
        rules = [{one.offset: one.rule for one in models.segments[member]} for member in members]
        tensors = [
            (kind, index, place, getattr(layer, kind))
            for place in range(len(members))
            for index in range(self._first, self._depth)
            for kind, layer in ((kind, self._layers[index][place]) for kind in ("w", "b", "slope_at"))
            if getattr(layer, kind) in rules[place]
        ]
        if not tensors:
            return []
        rule, ridged = models.rules[members[0]], models.ridges[members[0]].strength != 0.0
        if _lands_in_place(rule) and not ridged:
            return [
                bind_tensor_update(
                    self._tensor(models.params, kind, index, place),
                    tuple(self._tensor(state, kind, index, place) for state in models.states),
                    partial(self._gradient, kind, index, place),
                    models.rules[members[place]],
                    rules[place][start],
                    clocks.hyper[place],
                )
                for kind, index, place, start in tensors
            ]
        for member in members:
            # between the tensors, and where one is frozen, there are zeros: the norm is that of the whole arena
            models.gradients[member][models.between(member)] = 0.0
        gradients = [
            self._gradient(kind, index, place, self._tensor(models.gradients, kind, index, place))
            for kind, index, place, _ in tensors
        ]
        update, ridges = bind_update(models, members, clocks.hyper), self._ridges

        def whole() -> None:
            beta = 0.0 if clocks.begins else 1.0
            for gradient in gradients:
                gradient(1.0, beta)
            if ridged:
                ridges.penalise(clocks.each(ROW_COUNT))
            if clocks.updates:
                update()

        return [whole]

    def _tensor(self, arena: Array, kind: str, index: int, place: int) -> Array:
        layer = self._layers[index][place]
        own: Array = arena[self._members[place]]
        if kind == "w":
            return self._weights(arena, place, layer)
        if kind == "b":
            return own[layer.b : layer.b + layer.outputs]
        assert layer.slope_at is not None
        return own[layer.slope_at : layer.slope_at + 1]

    def _gradient(self, kind: str, index: int, place: int, out: Array) -> Accumulate:
        """``run(alpha, beta)``: ``out = alpha * gradient + beta * out``."""
        if kind == "slope_at":
            return slope_sum(out, self._dslopes[index, place])
        dz = self._of(self._dz[index], place)
        if kind == "b":
            return blas.column_sums(out, dz)
        return blas.product(out, dz, self._of(self._input(index), place), transpose_a=True)


def _slope_keys(layers: Sequence[ResidentLayer], slopes: Sequence[Array | None]) -> list[float]:
    """Neighbours with one key have one slope; prelu's are never one."""
    return [
        layer.slope if slope is None else place for place, (layer, slope) in enumerate(zip(layers, slopes, strict=True))
    ]


def _lands_in_place(rule: UpdateRule) -> bool:
    """Whether the products can land in the parameters or the velocities: see ``update.bind_tensor_update``."""
    if rule.kind != "sgd" or rule.clip_norm is not None or rule.accumulate > 1:
        return False
    return not rule.momentum or not (rule.nesterov or rule.decoupled)
