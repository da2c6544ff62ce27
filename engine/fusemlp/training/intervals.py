"""Training with interval bounds, call by call: the gradient of a batch's worst case, added to that of the batch before
the update. On the host the program of a step has it: see ``lowering``.

With w = p + m, p >= 0 >= m, the bounds of a layer, low' = act(p low + m high + b) and high' = act(p high + m low + b),
are those of an ordinary layer with the weights (p m) for twice the rows, (low high) and (high low). So the calls of the
contract compute them and their gradients, and the two parts of that by (p m) give the gradient by w.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from fusemlp.inputs.arrays import Array
from fusemlp_kernels.contract import LossSpec, UpdateRule
from fusemlp_kernels.errors import ArgumentError

if TYPE_CHECKING:
    from fusemlp.describe.intervals import IBP
    from fusemlp.inputs.targets import Targets
    from fusemlp.runtime.bound import BoundProgram
    from fusemlp.runtime.session import Session


def check_labels(targets: Targets) -> None:
    """Raise ArgumentError for targets without a label a row."""
    if targets.soft:
        raise ArgumentError("y: IBP takes class labels (n,), and got probabilities; give y.argmax(axis=1)")


def limits_of(engine: Session, ibp: IBP) -> dict[str, Array]:
    """Return, as the network takes inputs, the reach of a column in units of eps, and its bounds if there are any."""
    scale = engine.input_scale
    found: dict[str, Any] = {"reach": 1.0 if scale is None else 1.0 / scale.scale}
    for name, end in zip(("least", "most"), ibp.bounds or (), strict=False):
        found[name] = end if scale is None else (end - scale.mean) / scale.scale
    width, kind = engine.network.sizes[0], f"f{engine.memory.real_bytes}"
    return {name: np.broadcast_to(values, width).astype(kind) for name, values in found.items()}


class IntervalSteps:
    """The steps of ``bound``, whose gradients are mixed with those of the worst case before their update.

    ``bound`` keeps its gradients, and has the loss ``spec``. Its fit began at update ``first`` and ends before
    ``last``.
    """

    def __init__(
        self, engine: Session, bound: BoundProgram, spec: LossSpec, ibp: IBP, batch_size: int, first: int, last: int
    ) -> None:
        self._engine, self._bound, self._ibp = engine, bound, ibp
        self._first, self._updates = first, max(1, last - first)
        self.chunk, self.arrays = bound.chunk, bound.arrays
        self._size, self._place, self._done = batch_size, 0, 0
        *before, self._update = bound.calls
        self._plain = before
        self._worst = _WorstCase(engine, bound, spec, batch_size)
        self._radius, *self._limits = map(engine.memory.backend.from_host, limits_of(engine, ibp).values())

    def set_rows(self, order: Array, first_batch: int, size: int, epochs: int = 1) -> None:
        """See ``walk_rows``."""
        self._bound.set_rows(order, first_batch, size, epochs)
        self._place, self._done = first_batch * size, self._engine.update_count - self._first

    def run_many(self, count: int) -> None:
        """``count`` steps one after another."""
        with np.errstate(all="ignore"):
            for _ in range(count):
                eps, kappa = self._ibp.at(self._done / self._updates)
                for call in self._plain:
                    call()
                if kappa < 1.0:
                    self._add_worst(eps, kappa)
                self._update()
                self._place, self._done = self._place + self._size, self._done + 1

    def _add_worst(self, eps: float, kappa: float) -> None:
        """Make the gradients kappa times themselves, plus 1 - kappa times those of the worst case."""
        arrays = self.arrays
        rows = arrays["rows"][self._place : self._place + self._size]
        # where a row is padding any does
        x, y = arrays["x"][rows], arrays["target"][rows]
        low, high = x - eps * self._radius, x + eps * self._radius
        if self._limits:
            low, high = low.clip(*self._limits), high.clip(*self._limits)
        gradients = self._engine.memory.grads
        gradients *= kappa
        self._worst.add_gradients(low, high, y, 1.0 - kappa)


class _WorstCase:
    """The bounds of the logits of a batch of M rows, the loss of the worst ones, and its gradients by the weights."""

    def __init__(self, engine: Session, bound: BoundProgram, spec: LossSpec, rows: int) -> None:
        net, backend = engine.network, engine.memory.backend
        self.arrays, self.sizes, self.rows, self.trained = bound.arrays, net.sizes, rows, bound.program.values
        multiple = backend.traits.row_multiple

        def room(lines: int, columns: int) -> Any:
            pitch = -(-columns // multiple) * multiple
            return backend.view(backend.allocate(lines * pitch, "real"), 0, (lines, columns), pitch)

        def flat(size: int, dtype: str = "real") -> Any:
            return backend.view(backend.allocate(size, dtype), 0, (size,), size)

        inputs, widths, layers = net.sizes[:-1], net.sizes[1:], range(net.layers)
        # (2 M, 2 K): the inputs of the layers, and their gradients
        self.boxes, self.box_gradients = ([room(2 * rows, 2 * width) for width in inputs] for _ in range(2))
        # (2 M, N): the outputs, low ones first, and their gradients before the activation
        self.ends, self.dz = ([room(2 * rows, width) for width in widths] for _ in range(2))
        # (N, 2 K): p and m, and their gradients
        self.w, self.dw = ([room(widths[at], 2 * inputs[at]) for at in layers] for _ in range(2))
        self.db = [flat(width) for width in widths]
        self.logits, self.dlogits = room(rows, widths[-1]), room(rows, widths[-1])
        self.classes = backend.from_host(np.arange(widths[-1]))

        def described(layer: int) -> dict[str, Any]:
            activation = net.activations[layer]
            return {"activation": activation.name, "slope": activation.fixed_slope or 0.0}

        self.forward: list[Callable[..., object]] = [
            backend.bind(
                "linear", x=self.boxes[at], w=self.w[at], b=bound.arrays[f"b{at}"], y=self.ends[at], **described(at)
            )
            for at in layers
        ]
        given = {name: bound.arrays[name] for name in ("target", "rows", "counters")}
        given |= {name: bound.arrays[name] for name in ("weight", "class_weight") if name in bound.program.values}
        if not backend.traits.gathers_in_load:
            given["target_rows"] = flat(rows, "int64")
            given |= {"weight_rows": flat(rows)} if "weight" in given else {}
        self.loss = backend.bind("loss_grad", z=self.logits, dz=self.dlogits, loss=spec, **given)
        self.backward: list[Callable[..., object]] = [
            backend.bind(
                "grad_input",
                dz=self.dz[at],
                w=self.w[at],
                y=self.boxes[at],
                dz_prev=self.box_gradients[at],
                **described(at - 1),
            )
            for at in layers[1:]
        ]
        self.gradients = backend.bind(
            "grad_weight",
            layers=tuple(
                {"dz": self.dz[at], "x": self.boxes[at], "dw": self.dw[at], "db": self.db[at]} for at in layers
            ),
            rule=UpdateRule("sgd"),
            counters=bound.arrays["counters"],
        )

    def add_gradients(self, low: Any, high: Any, labels: Any, share: float) -> None:
        """Add ``share`` times the gradients of the worst case between ``low`` and ``high`` (M, K) to the batch's."""
        rows, arrays, positive = self.rows, self.arrays, []
        for at, call in enumerate(self.forward):
            width, box, w, parts = self.sizes[at], self.boxes[at], arrays[f"w{at}"], self.w[at]
            box[:rows, :width] = box[rows:, width:] = low
            box[:rows, width:] = box[rows:, :width] = high
            positive.append(w > 0)
            parts[:, :width] = w * positive[at]
            parts[:, width:] = w - parts[:, :width]
            call()
            low, high = self.ends[at][:rows], self.ends[at][rows:]
        own = labels[:, None] == self.classes
        self.logits[:] = high + own * (low - high)
        self.loss()
        self.dlogits *= share
        self.dz[-1][:rows] = own * self.dlogits
        self.dz[-1][rows:] = self.dlogits - self.dz[-1][:rows]
        for at in range(len(self.backward), 0, -1):
            self.backward[at - 1]()
            width, found = self.sizes[at], self.box_gradients[at]
            self.dz[at - 1][:rows] = found[:rows, :width] + found[rows:, width:]
            self.dz[at - 1][rows:] = found[:rows, width:] + found[rows:, :width]
        self.gradients()
        for at, above in enumerate(positive):
            width, found = self.sizes[at], self.dw[at]
            if f"dw{at}" in self.trained:
                # a weight of 0 counts as one below it
                found[:, :width] *= above
                found[:, width:] *= ~above
                arrays[f"dw{at}"] += found[:, :width]
                arrays[f"dw{at}"] += found[:, width:]
            if f"db{at}" in self.trained:
                arrays[f"db{at}"] += self.db[at]
