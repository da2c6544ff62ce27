"""The forward pass over any number of rows: predictions, and the loss of labelled data."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from fusemlp.describe.network import MLP
from fusemlp.inputs.arrays import Array
from fusemlp.inputs.targets import Examples
from fusemlp.program.lowering import Inputs, Step, lower
from fusemlp.runtime.bound import BoundProgram
from fusemlp.runtime.memory import Memory, Workspace, on_device
from fusemlp_kernels.contract import CORRECT, COUNTERS, LOSS_SUM, NORM_SUM, ROW_COUNT, SCORED, STATS, Backend, LossSpec

# The largest batch of a forward pass, in elements of its widest activation: 16 MiB in float32.
LARGEST = 1 << 22
SMALLEST_ROWS = 16
# The names of the statistics of inputs beside the parameters in ``state_dict``.
MEAN, SCALE = "normalise.mean", "normalise.scale"


class InputScale:
    """The inputs x (n, K) of a network as (x - mean) / scale; ``mean`` and ``scale`` (K,) are host arrays."""

    def __init__(self, mean: Array, scale: Array, backend: Backend) -> None:
        self.mean, self.scale = mean, scale
        # On a device a bool or integer array takes a sum, and not all take a difference.
        self._shift, self._divisor = backend.from_host(-mean), backend.from_host(scale)

    def applied(self, X: Any) -> Any:
        """Return checked rows, on the host or on the device, as the network takes them."""
        if isinstance(X, np.ndarray):
            scaled = X - self.mean
            scaled /= self.scale
            return scaled
        return (X + self._shift) / self._divisor

    @property
    def tensors(self) -> dict[str, Array]:
        """Copies of the statistics by their names in ``state_dict``."""
        return {MEAN: self.mean.copy(), SCALE: self.scale.copy()}


class Inference:
    """Forward programs of one network, in a few sizes, each made on first use; ``input_scale`` scales its inputs."""

    def __init__(self, net: MLP, memory: Memory, input_scale: InputScale | None = None) -> None:
        self.net, self.input_scale = net, input_scale
        # what is trained, and what the programs read
        self.trained = self.memory = memory
        if memory.evaluated:
            real, compute = memory.real_bytes, memory.compute_bytes
            self.memory = Memory(net, memory.backend, 0, item_bytes=real, compute_bytes=compute)
        self.real = np.dtype(f"f{memory.real_bytes}")
        self.counters = memory.backend.allocate(COUNTERS, "int64")
        self.stats = memory.backend.allocate(STATS, "float64")
        self.release()

    def release(self) -> None:
        """Release the programs and their memory."""
        # A separate workspace: predictions must not disturb a step or keep the large training buffers alive.
        self.workspace = Workspace(self.memory.backend)
        self._bound: dict[tuple[int, LossSpec | None, bool, bool], BoundProgram] = {}

    def _rows_for(self, n: int) -> int:
        """Return the batch size for ``n`` rows: a power of two, so that few programs are needed."""
        most = max(SMALLEST_ROWS, (1 << (LARGEST // max(self.net.sizes)).bit_length()) >> 1)
        return min(most, max(SMALLEST_ROWS, 1 << (n - 1).bit_length()))

    def program(
        self, rows: int, spec: LossSpec | None = None, class_weight: Any | None = None, *, weighted: bool = False
    ) -> BoundProgram:
        """Return the pass over ``rows`` rows up to the outputs, or with ``spec`` up to the loss."""
        key = (rows, spec, class_weight is not None, weighted)
        if key not in self._bound:
            self._bound[key] = self._bind(self.net, rows, spec, class_weight, weighted=weighted)
        return self._bound[key]

    def _bind(
        self, net: MLP, rows: int, spec: LossSpec | None, class_weight: Any | None, *, weighted: bool
    ) -> BoundProgram:
        memory = self.memory
        inputs = Inputs(rows, weighted=weighted, class_weighted=class_weight is not None)
        traits, sizes = memory.backend.traits, (memory.real_bytes, memory.compute_bytes)
        given = {"counters": self.counters, "stats": self.stats}
        if class_weight is not None:
            given["class_weight"] = class_weight
        program = lower(Step(net, rows, traits, memory.layout, inputs, spec, *sizes))
        return BoundProgram(program, memory, self.workspace, given)

    def batches(self, bound: BoundProgram, rows: int, arrays: Mapping[str, Any]) -> Iterator[tuple[int, int]]:
        """Copy each batch of ``arrays`` in, run it, and yield its first row and the row after its last."""
        count = len(arrays["x"])
        for start in range(0, count, rows):
            stop = min(start + rows, count)
            self.bring(bound, rows, arrays, start, stop)
            bound.run()
            yield start, stop

    def bring(self, bound: BoundProgram, rows: int, arrays: Mapping[str, Any], start: int, stop: int) -> None:
        """Copy the rows from ``start`` to ``stop`` into a program for batches of ``rows``."""
        copy, count = self.memory.backend.copy_into, stop - start
        self.counters[ROW_COUNT] = count
        for name, array in arrays.items():
            part = array[start:stop]
            if name == "x" and self.input_scale is not None:
                part = self.input_scale.applied(part)
            copy(bound.arrays[name][:count], part)
            if count < rows and len(arrays) > 1:
                # Rows left from an earlier batch must not reach the sums, if there are any.
                bound.arrays[name][count:] = 0

    def outputs(self, X: Any) -> Array:
        """Return the network's outputs (n, N) for X (n, K)."""
        self.memory.read_evaluated(self.trained)
        rows = self._rows_for(len(X))
        bound = self.program(rows)
        y = np.empty((len(X), self.net.sizes[-1]), self.real)
        for start, stop in self.batches(bound, rows, {"x": X}):
            y[start:stop] = self.memory.backend.to_host(bound.arrays["y"][: stop - start])
        return y

    def silent(self, X: Any, layer: int) -> float:
        """Return the share of a hidden layer's units whose output is zero for every row of X."""
        rows, sizes, activations = self._rows_for(len(X)), self.net.sizes, self.net.activations
        head = MLP(sizes[: layer + 2], activation=activations[:layer], output_activation=activations[layer])
        self.memory.read_evaluated(self.trained)
        bound = self._bind(head, rows, None, None, weighted=False)
        silent = np.ones(head.sizes[-1], np.bool_)
        for start, stop in self.batches(bound, rows, {"x": X}):
            silent &= ~np.any(self.memory.backend.to_host(bound.arrays["y"][: stop - start]) != 0.0, axis=0)
        return float(silent.mean())


class Evaluation:
    """The loss of ``data`` by ``spec``, to evaluate once or repeatedly.

    Rows that fit one batch go into the program once, and the others to the device once, or with ``repeated`` False
    batch by batch. ``inference`` must not be shared between two uses.
    """

    def __init__(
        self, inference: Inference, data: Examples, spec: LossSpec, class_weight: Any | None, repeated: bool
    ) -> None:
        self._inference, self._spec = inference, spec
        rows = len(data.X)
        self._size = inference._rows_for(rows)
        self._bound = inference.program(self._size, spec, class_weight, weighted=data.weight is not None)
        # The arrays that every evaluation copies into the program, batch by batch.
        self._left: Mapping[str, Any] = {}
        if rows <= self._size:
            inference.bring(self._bound, self._size, data.arrays, 0, rows)
        else:
            self._left = on_device(inference.memory.backend, data.arrays) if repeated else data.arrays

    def of(self, memory: Memory) -> dict[str, float]:
        """Return the metrics of what predictions read of ``memory``: see ``metrics_of``."""
        inference, bound = self._inference, self._bound
        own = inference.memory
        own.read_evaluated(memory)
        inference.stats[:] = 0.0
        if self._left:
            for _ in inference.batches(bound, self._size, self._left):
                pass
        else:
            bound.run()
        return metrics_of(own.backend.to_host(inference.stats), self._spec)


def metrics_of(stats: Array, spec: LossSpec) -> dict[str, float]:
    """Return the mean loss (its sum for the reduction "sum") and, if ``spec`` counts hits, the accuracy."""
    if spec.reduction == "sum":
        loss = float(stats[LOSS_SUM])
    else:
        loss = float(stats[LOSS_SUM] / stats[NORM_SUM]) if stats[NORM_SUM] else 0.0
    metrics = {"loss": loss}
    if spec.accuracy:
        metrics["accuracy"] = float(stats[CORRECT] / stats[SCORED]) if stats[SCORED] else 0.0
    return metrics
