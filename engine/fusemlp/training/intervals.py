"""Training for certified accuracy: between gradient and update of a step, the gradients of the batch's worst case.

A box of inputs with centre c and radius r gives pre-activations with centre w c + b and radius |w| r, and a rising
activation maps its ends to the ends of the next box (Gowal et al., "On the effectiveness of interval bound propagation
for training verifiably robust models", 2018). The worst logits of a row are the lower bound of its label's and the
upper bounds of the others. The products and the loss are the backend's own calls, so a run gives the same bits on any
number of threads; what is between them is NumPy's.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np

from fusemlp.describe.adversarial import IBP, Adversary
from fusemlp.inputs.arrays import Array
from fusemlp.inputs.examples import Targets
from fusemlp.program.layout import Layout
from fusemlp.runtime.attacks import formula_functions
from fusemlp.runtime.programs import BoundProgram
from fusemlp.runtime.session import Session
from fusemlp_kernels import pointwise
from fusemlp_kernels.contract import ROW_OFFSET, UPDATE_COUNT, UpdateRule
from fusemlp_kernels.errors import ArgumentError

Calls = list[Callable[..., object]]


def check_labels(targets: Targets) -> None:
    """Raise ArgumentError for targets without a label a row."""
    if targets.soft:
        raise ArgumentError("y: IBP takes class labels (n,), and got probabilities; give y.argmax(axis=1)")


def add_worst_case(engine: Session, bound: BoundProgram, adversary: Adversary, *, first: int, updates: int) -> None:
    """Let each step of ``bound``, with gradients kept, train against an IBP for ``updates`` from ``first`` on."""
    # where nothing is trained, there is nothing to do
    if isinstance(adversary, IBP) and bound.program.trainable:
        *others, update = bound.calls
        bound.use((*others, _WorstCase(engine, bound, adversary, first, max(1, updates)).add, update))


class _WorstCase:
    """The calls for the worst case of a batch, and the memory between them."""

    def __init__(self, engine: Session, bound: BoundProgram, ibp: IBP, first: int, updates: int) -> None:
        self.ibp, self.first, self.updates = ibp, first, updates
        self.net, self.bound, self.arrays = engine.network, bound, bound.arrays
        memory = engine.memory
        self.real = np.dtype(f"f{memory.real_bytes}")
        self._take_limits(engine)
        net, rows = self.net, bound.program.values["rows"].shape[0]
        shapes: dict[str, tuple[int, ...]] = {}
        for level, width in enumerate(net.sizes):
            names = ("centre", "radius") + (("zc", "zr", "dzc", "dzr") if level else ())
            shapes |= {f"{name}{level}": (rows, width) for name in names}
        for layer in range(net.layers):
            shape = net.sizes[layer + 1], net.sizes[layer]
            shapes |= {f"{name}{layer}": shape for name in ("size", "dw", "dsize")}
            shapes |= {f"{name}{layer}": shape[:1] for name in ("zero", "db")}
        backend, multiple = memory.backend, memory.backend.traits.row_multiple
        layout = Layout.of(shapes, row_multiple=multiple, item_bytes=memory.real_bytes)
        self.buffers = layout.views(backend, backend.allocate(layout.size, "real"))
        self.functions = formula_functions()
        self.forward, self.backward = list[Calls](), list[Calls]()
        by_weights: tuple[list[Any], list[Any]] = [], []
        for layer in range(net.layers):
            self._bind_products(backend, layer, by_weights)
        self.loss = backend.bind("loss_grad", **self._loss_operands())
        common = {"rule": UpdateRule("sgd"), "counters": self.arrays["counters"]}
        self.gradients = [backend.bind("grad_weight", layers=tuple(layers), **common) for layers in by_weights]

    def _take_limits(self, engine: Session) -> None:
        """Set each column's reach in units of eps and its bounds, as the network takes inputs."""
        scale, bounds = engine.scaling.scale, self.ibp.bounds or (-np.inf, np.inf)
        self.reach: Any = self.real.type(1.0) if scale is None else (1.0 / scale.scale).astype(self.real)
        ends = [np.float64(end) if scale is None else (end - scale.mean) / scale.scale for end in bounds]
        self.least, self.most = (np.asarray(end, self.real) for end in ends)

    def _bind_products(self, backend: Any, layer: int, by_weights: tuple[list[Any], list[Any]]) -> None:
        """Bind the calls of a layer on centres and radii, forward and back to its inputs.

        The operands of the gradients by its weights and biases, and by the magnitudes of the weights, go to
        ``by_weights``.
        """
        forward, backward, at = Calls(), Calls(), self.buffers
        ways = (
            ("centre", "zc", self.arrays[f"w{layer}"], self.arrays[f"b{layer}"], at[f"dw{layer}"], at[f"db{layer}"]),
            ("radius", "zr", at[f"size{layer}"], at[f"zero{layer}"], at[f"dsize{layer}"], None),
        )
        for (x, z, w, b, dw, db), layers in zip(ways, by_weights, strict=True):
            inputs, outputs, dz = at[f"{x}{layer}"], at[f"{z}{layer + 1}"], at[f"d{z}{layer + 1}"]
            ends: dict[str, Any] = {"w": w, "activation": "identity"}
            forward.append(backend.bind("linear", x=inputs, b=b, y=outputs, counters=self.arrays["counters"], **ends))
            if layer:
                before = at[f"d{z}{layer}"]
                backward.append(backend.bind("grad_input", dz=dz, y=inputs, dz_prev=before, **ends))
            layers.append({"dz": dz, "x": inputs, "dw": dw, "db": db})
        self.forward.append(forward)
        self.backward.append(backward)

    def _loss_operands(self) -> dict[str, Any]:
        """Return the operands of the step's own loss, for the worst logits, which take the place of the centres."""
        (call,) = (call for call in self.bound.program.calls if "loss" in call.operands)
        names = ("target", "weight", "class_weight", "rows", "counters")
        last = self.net.layers
        return {
            **{name: self.arrays[name] for name in names if name in self.arrays},
            "z": self.buffers[f"zc{last}"],
            "dz": self.buffers[f"dzc{last}"],
            "loss": replace(call.operands["loss"], accuracy=False),
            "activation": "identity",
        }

    # NumPy would warn of what overflows
    @np.errstate(all="ignore")
    def add(self) -> None:
        """Shrink the gradients of the step's batch, and add those of its worst case."""
        counters = self.arrays["counters"]
        eps, share = self.ibp.at((int(counters[UPDATE_COUNT]) - self.first) / self.updates)
        if share == 1.0:
            return
        rows, start = self.buffers["centre0"].shape[0], int(counters[ROW_OFFSET])
        # padding has the row -1, and no weight
        picks = np.maximum(self.arrays["rows"][start : start + rows], 0)
        self._bounds(self.arrays["x"][picks], eps)
        # an ignored label is no column, and its row has no weight
        label = np.arange(rows), np.clip(self.arrays["target"][picks], 0, self.net.sizes[-1] - 1)
        self._worst_loss(label)
        for layer in range(self.net.layers - 1, 0, -1):
            for call in self.backward[layer]:
                call()
            self._through_activation(layer)
        for call in self.gradients:
            call()
        self._mix(share)

    def _bounds(self, x: Array, eps: float) -> None:
        """Carry the box around the inputs forward to the logits."""
        reach = self.real.type(eps) * self.reach
        self._set_box(0, np.maximum(x - reach, self.least), np.minimum(x + reach, self.most))
        for layer, calls in enumerate(self.forward):
            np.abs(self.arrays[f"w{layer}"], out=self.buffers[f"size{layer}"])
            for call in calls:
                call()
            if layer < self.net.layers - 1:
                self._set_box(layer + 1, *(self._formula(layer, "value", z) for z in self._ends(layer + 1)))

    def _set_box(self, level: int, low: Array, high: Array) -> None:
        self.buffers[f"centre{level}"][:] = (low + high) / 2
        self.buffers[f"radius{level}"][:] = (high - low) / 2

    def _ends(self, level: int) -> tuple[Array, Array]:
        """Return the least and the greatest pre-activations."""
        centre, radius = self.buffers[f"zc{level}"], self.buffers[f"zr{level}"]
        return centre - radius, centre + radius

    def _formula(self, layer: int, name: str, z: Array) -> Array:
        """Return the activation after a layer at z, or its derivative there."""
        activation = self.net.activations[layer]
        known = {"z": z, "slope": self.real.type(activation.slope)}
        row = pointwise.ACTIVATIONS[activation.name]
        value = np.asarray(pointwise.evaluate(row.value, known, self.functions))
        if name == "value":
            return value
        return np.asarray(pointwise.evaluate(row.derivative, known | {"y": value}, self.functions), self.real)

    def _worst_loss(self, label: tuple[Array, Array]) -> None:
        """Compute the gradients of the loss of the worst logits, by their centres and radii."""
        last = self.net.layers
        logits, radius = self.buffers[f"zc{last}"], self.buffers[f"zr{last}"]
        radius[label] *= -1.0
        logits += radius
        self.loss()
        self.buffers[f"dzr{last}"][:] = self.buffers[f"dzc{last}"]
        self.buffers[f"dzr{last}"][label] *= -1.0

    def _through_activation(self, layer: int) -> None:
        """Turn the gradients by a box of outputs into those by centre and radius of its pre-activations."""
        by_centre, by_radius = self.buffers[f"dzc{layer}"], self.buffers[f"dzr{layer}"]
        low, high = (self._formula(layer - 1, "derivative", z) for z in self._ends(layer))
        by_low, by_high = (by_centre - by_radius) / 2 * low, (by_centre + by_radius) / 2 * high
        by_centre[:], by_radius[:] = by_low + by_high, by_high - by_low

    def _mix(self, share: float) -> None:
        """Leave ``share`` of the batch's gradients and the rest of the worst case's where the update reads them."""
        plain, worst = self.real.type(share), self.real.type(1.0 - share)
        for short in self.bound.program.trainable:
            gradient, layer = self.arrays[f"d{short}"], short[1:]
            gradient *= plain
            added = self.buffers[f"d{short}"]
            if short.startswith("w"):
                added += np.sign(self.arrays[short]) * self.buffers[f"dsize{layer}"]
            gradient += worst * added
