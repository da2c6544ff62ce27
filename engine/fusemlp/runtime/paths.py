"""The gradient of outputs on the straight lines from baselines to rows, averaged by a quadrature rule.

The first layer's pre-activation is linear on a line: z1(a) = z1(0) + a * (z1(1) - z1(0)). So the products of the rows
and of the baselines with the first weights serve all points of the lines, and the average of dz1 takes one product
back: the work of a point begins at the first hidden layer, of which it needs h1 = act(z1).
"""

from __future__ import annotations

from typing import Any

import numpy as np

from fusemlp.describe.network import MLP
from fusemlp.inputs.arrays import Array
from fusemlp.program.layout import placement
from fusemlp.runtime import forward
from fusemlp.runtime.forward import ForwardPass
from fusemlp.runtime.memory import Workspace
from fusemlp_kernels.contract import NEEDS_Z, UpdateRule

# Elements of the widest activation of the points that a CPU takes at a time: they stay in its cache.
IN_CACHE = 1 << 17


def path_gradient(passes: ForwardPass, X: Any, baseline: Any, seed: Array, points: Array, weights: Array) -> Array:
    """Return the sum over p of weights[p] times the gradient at baseline + points[p] * (X - baseline), (n, K).

    ``X`` and ``baseline`` are checked rows (n, K), the latter perhaps one row; ``seed`` (n, N) weighs the outputs.
    """
    net = passes.net
    if net.layers == 1:
        total = np.zeros(X.shape, passes.real)
        for point, weight in zip(points.tolist(), weights.tolist(), strict=True):
            total += weight * passes.input_gradient(baseline + point * (X - baseline), {"seed": seed})
        return total
    head = MLP(net.sizes[:2], output_activation="identity")
    start = passes.outputs(baseline, head)[:, 0]
    step = passes.outputs(X, head)[:, 0] - start
    start = np.broadcast_to(start, step.shape)
    most = min(forward.LARGEST, IN_CACHE) if passes.memory.backend.traits.on_host else forward.LARGEST
    rows = max(1, min(len(step), most // (max(net.sizes[1:]) * len(points))))
    lines, mean = _Lines(passes, rows, points, weights), np.empty_like(step)
    for first in range(0, len(step), rows):
        part = slice(first, first + rows)
        mean[part] = lines.mean(start[part], step[part], seed[part])
    return passes.input_gradient(X, {"seed": mean}, net=head)


class _Lines:
    """The calls for ``rows`` lines with these points, and the memory between them.

    A matrix (points * rows, H) of the first hidden layer is at the same time one of (points, rows * H): so ``linear``
    with one input, the place on the lines, gives h1, and ``grad_weight``'s sum over a batch of points is the average.
    """

    def __init__(self, passes: ForwardPass, rows: int, points: Array, weights: Array) -> None:
        memory, net = passes.memory, passes.net
        self.backend, self.rows, self.weights = memory.backend, rows, weights
        backend, count, width = self.backend, len(points), net.sizes[1]
        multiple = backend.traits.row_multiple
        pitch = -(-width // multiple) * multiple
        long = rows * pitch

        def room(dtype: str, columns: int, pitch: int, lines: int = 1) -> tuple[Any, Any]:
            """Return an array (lines, columns), and the flat one that it is a view of."""
            flat = backend.allocate(lines * pitch, dtype)
            return backend.view(flat, 0, (lines, columns), pitch), flat

        self.start, start = room("real", width, pitch, rows)
        self.step, step = room("compute", width, pitch, rows)
        self.sums, sums = room("real", width, pitch, rows)
        place, _ = room("compute", 1, multiple, count)
        backend.copy_into(place, points.astype(passes.real)[:, None])
        activation = net.activations[0]
        names = ["h1", *(["z1"] if activation.name in NEEDS_Z else [])]
        hidden = {name: room("compute", width, pitch, count * rows) for name in names}
        whole = {name: backend.view(flat, 0, (count, long), long) for name, (_, flat) in hidden.items()}
        self._spread = backend.bind(
            "linear",
            x=place,
            w=backend.view(step, 0, (long, 1), 1),
            b=start,
            y=whole["h1"],
            activation=activation.name,
            slope=activation.fixed_slope or 0.0,
            **({"slope_param": memory.arrays["s0"]} if activation.name == "prelu" else {}),
            **({"z": whole["z1"]} if "z1" in whole else {}),
        )
        workspace, arrays = Workspace(backend), {name: view for name, (view, _) in hidden.items()}
        self._inner = passes.bind(net, count * rows, gradient=1, arrays=arrays, workspace=workspace)
        dtype, dz = placement(self._inner.program, memory.layout, row_multiple=multiple).places["dz1"]
        gradients = backend.view(workspace.arena(dtype, 0), dz.offset, (count, long), long)
        self._sum = backend.bind(
            "grad_weight",
            layers=({"dz": gradients, "x": place, "dw": None, "db": sums},),
            rule=UpdateRule("sgd"),
            counters=passes.counters,
        )

    def mean(self, start: Array, step: Array, seed: Array) -> Array:
        """Return the average of dz1 (n, H) on lines from ``start`` to ``start + step`` (n, H), ``seed`` (n, N)."""
        count = len(start)
        copy, weighed = self.backend.copy_into, self.weights[:, None, None] * seed
        copy(self.start[:count], start)
        copy(self.step[:count], step)
        seeds = np.zeros((len(self.weights), self.rows, seed.shape[1]), seed.dtype)
        seeds[:, :count] = weighed
        copy(self._inner.arrays["seed"], seeds.reshape(-1, seed.shape[1]))
        self._spread()
        self._inner.run()
        self._sum()
        return self.backend.to_host(self.sums)[:count]
