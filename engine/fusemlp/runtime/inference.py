"""The forward pass over any number of rows: predictions, and the loss of labelled data."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from fusemlp.describe.network import MLP
from fusemlp.program.lowering import Inputs, lower_inference
from fusemlp.runtime.bound import BoundProgram
from fusemlp.runtime.memory import Memory, Workspace
from fusemlp_kernels.contract import (
    CORRECT,
    COUNTERS,
    LOSS_SUM,
    NORM_SUM,
    ROW_COUNT,
    SCORED,
    STATS,
    LossSpec,
)

Array = np.ndarray[Any, Any]

# The largest batch of a forward pass, in elements of its widest activation: 16 MiB in float32.
LARGEST = 1 << 22
SMALLEST_ROWS = 16


class Inference:
    """Forward programs of one network, in a few sizes, each made on first use."""

    def __init__(self, net: MLP, memory: Memory, *, real_bytes: int, compute_bytes: int | None = None) -> None:
        self.net = net
        self.memory = memory
        self.real_bytes, self.compute_bytes = real_bytes, compute_bytes
        self.real = np.dtype(f"f{real_bytes}")
        # A separate workspace: predictions must not disturb a step or keep the large training buffers alive.
        self.workspace = Workspace(memory.backend)
        self.counters = memory.backend.allocate(COUNTERS, "int64")
        self.stats = memory.backend.allocate(STATS, "float64")
        self._bound: dict[tuple[int, LossSpec | None, bool, bool], BoundProgram] = {}

    def release(self) -> None:
        """Release the programs and their memory."""
        self._bound.clear()
        self.workspace = Workspace(self.memory.backend)

    def _rows_for(self, n: int) -> int:
        """Return the batch size for ``n`` rows: a power of two, so that few programs are needed."""
        most = max(SMALLEST_ROWS, (1 << (LARGEST // max(self.net.sizes)).bit_length()) >> 1)
        return min(most, max(SMALLEST_ROWS, 1 << (n - 1).bit_length()))

    def _program(self, rows: int, spec: LossSpec | None, class_weight: Any | None, weighted: bool) -> BoundProgram:
        key = (rows, spec, class_weight is not None, weighted)
        if key not in self._bound:
            inputs = Inputs(rows, weighted=weighted, class_weighted=class_weight is not None)
            traits = self.memory.backend.traits
            program = lower_inference(
                self.net,
                rows,
                traits,
                self.memory.layout,
                spec=spec,
                inputs=inputs,
                real_bytes=self.real_bytes,
                compute_bytes=self.compute_bytes,
            )
            given = {"counters": self.counters, "stats": self.stats}
            if class_weight is not None:
                given["class_weight"] = class_weight
            self._bound[key] = BoundProgram(program, self.memory, self.workspace, given)
        return self._bound[key]

    def _batches(self, bound: BoundProgram, rows: int, X: Any, **others: Any) -> Iterator[tuple[int, int]]:
        """Copy each batch in, run it, and yield its first row and the row after its last."""
        arrays = {"x": X, **others}
        for start in range(0, len(X), rows):
            stop = min(start + rows, len(X))
            self._bring(bound, rows, arrays, start, stop)
            bound.run()
            yield start, stop

    def _bring(self, bound: BoundProgram, rows: int, arrays: Mapping[str, Any], start: int, stop: int) -> None:
        """Copy the rows from ``start`` to ``stop`` into a program for batches of ``rows``."""
        copy, count = self.memory.backend.copy_into, stop - start
        self.counters[ROW_COUNT] = count
        for name, array in arrays.items():
            copy(bound.arrays[name][:count], array[start:stop])
            if count < rows and len(arrays) > 1:
                # Rows left from an earlier batch must not reach the sums, if there are any.
                bound.arrays[name][count:] = 0

    def outputs(self, X: Any) -> Array:
        """Return the network's outputs (n, N) for X (n, K)."""
        rows = self._rows_for(len(X))
        bound = self._program(rows, None, None, False)
        y = np.empty((len(X), self.net.sizes[-1]), self.real)
        for start, stop in self._batches(bound, rows, X):
            y[start:stop] = self.memory.backend.to_host(bound.arrays["y"][: stop - start])
        return y

    def evaluate(
        self, X: Any, target: Any, weight: Any | None, spec: LossSpec, class_weight: Any | None
    ) -> dict[str, float]:
        """Return the mean loss (its sum for the reduction "sum") and, if ``spec`` counts hits, the accuracy."""
        rows = self._rows_for(len(X))
        bound = self._program(rows, spec, class_weight, weight is not None)
        self.stats[:] = 0.0
        others = {"target": target} if weight is None else {"target": target, "weight": weight}
        for _ in self._batches(bound, rows, X, **others):
            pass
        return metrics_of(self.memory.backend.to_host(self.stats), spec)

    def silent_units(self, X: Any) -> list[Array]:
        """Return for each hidden layer, bool (width,), the units with a zero output for every row of X."""
        rows = self._rows_for(len(X))
        found = []
        for layer in range(self.net.layers - 1):
            head = MLP(
                self.net.sizes[: layer + 2],
                activation=self.net.activations[:layer],
                output_activation=self.net.activations[layer],
            )
            program = lower_inference(
                head,
                rows,
                self.memory.backend.traits,
                self.memory.layout,
                spec=None,
                inputs=Inputs(rows),
                real_bytes=self.real_bytes,
                compute_bytes=self.compute_bytes,
            )
            bound = BoundProgram(program, self.memory, self.workspace, {"counters": self.counters})
            silent = np.ones(head.sizes[-1], np.bool_)
            for start, stop in self._batches(bound, rows, X):
                silent &= ~np.any(self.memory.backend.to_host(bound.arrays["y"][: stop - start]) != 0.0, axis=0)
            found.append(silent)
        return found


class Evaluation:
    """The loss of fixed rows, to evaluate repeatedly: X (n, K), their targets and perhaps weights (n,).

    They go to the device once, and if they fit one batch, into the program once. ``inference`` must not be shared.
    """

    def __init__(
        self, inference: Inference, X: Any, target: Any, weight: Any | None, spec: LossSpec, class_weight: Any | None
    ) -> None:
        self._inference, self._spec = inference, spec
        self._size = inference._rows_for(len(X))
        self._bound = inference._program(self._size, spec, class_weight, weight is not None)
        arrays = {"x": X, "target": target} | ({} if weight is None else {"weight": weight})
        # The arrays that every evaluation copies into the program, batch by batch.
        self._left: dict[str, Any] = {}
        if len(X) <= self._size:
            inference._bring(self._bound, self._size, arrays, 0, len(X))
        else:
            to_device = inference.memory.backend.from_host
            self._left = {name: to_device(array) for name, array in arrays.items() if name != "x"}
            self._left["X"] = to_device(X, "compute")

    def of(self, memory: Memory) -> dict[str, float]:
        """Return ``Inference.evaluate`` of the parameters in ``memory``."""
        inference, bound = self._inference, self._bound
        own = inference.memory
        if memory is not own:
            for name in ("params", "shadow"):
                if name in own.arrays:
                    own.backend.copy_into(own.arrays[name], memory.arrays[name])
        inference.stats[:] = 0.0
        if self._left:
            for _ in inference._batches(bound, self._size, **self._left):
                pass
        else:
            bound.run()
        return metrics_of(own.backend.to_host(inference.stats), self._spec)


def metrics_of(stats: Array, spec: LossSpec) -> dict[str, float]:
    """Return loss and accuracy from the kernels' sums."""
    if spec.reduction == "sum":
        loss = float(stats[LOSS_SUM])
    else:
        loss = float(stats[LOSS_SUM] / stats[NORM_SUM]) if stats[NORM_SUM] else 0.0
    metrics = {"loss": loss}
    if spec.accuracy:
        metrics["accuracy"] = float(stats[CORRECT] / stats[SCORED]) if stats[SCORED] else 0.0
    return metrics
