"""The forward pass over any number of rows: predictions, and the loss of labelled data."""

import os
import threading
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeAlias
from weakref import WeakSet

import numpy as np

from fusemlp.describe.network import MLP
from fusemlp.inputs.arrays import Array
from fusemlp.inputs.columns import codes_of, coding_of
from fusemlp.inputs.examples import Examples
from fusemlp.program.builder import Inputs, Pass, Step
from fusemlp.program.lowering import lower
from fusemlp.program.program import Program
from fusemlp.runtime.memory import Memory, Workspace, on_device
from fusemlp.runtime.programs import BoundProgram
from fusemlp.runtime.scaling import Scaling
from fusemlp_kernels.coding import Coding
from fusemlp_kernels.contract import CORRECT, COUNTERS, LOSS_SUM, NORM_SUM, ROW_COUNT, SCORED, STATS, Backend, LossSpec

# The largest batch of a forward pass, in elements of its widest activation: 16 MiB in float32.
LARGEST = 1 << 22
SMALLEST_ROWS = 16
# The most programs to keep, and their rows as largest batches: evaluations of many lengths have a program each.
MOST_PROGRAMS, MOST_BATCHES = 32, 8
# Evaluates what predictions read of a memory: see ``metrics_of``.
Evaluate: TypeAlias = "Callable[[Memory], dict[str, float]]"
# A unit is empty whose weights are so small beside those of the layer's largest unit, by the sums of their sizes.
EMPTIED = 0.05


def member_rows(backend: Backend, rows: int, members: int) -> Any:
    """Return the row numbers of a batch that is all of ``rows`` rows of data, each once for each member."""
    found = backend.allocate(rows * members, "int64")
    backend.copy_into(found, np.repeat(np.arange(rows), members))
    return found


# A forked process has none of the threads, and perhaps a turn that is taken for ever.
_passes: "WeakSet[ForwardPass]" = WeakSet()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=lambda: [vars(each).update(turn=threading.RLock()) for each in _passes])


class ForwardPass:
    """Forward programs of one network, in a few sizes, each made on first use; ``scaling`` scales its inputs, and
    ``passes`` change its programs. Threads take turns: the programs share their memory."""

    def __init__(self, net: MLP, memory: Memory, scaling: Scaling | None = None, passes: tuple[Pass, ...] = ()) -> None:
        self.net, self.scaling, self.passes = net, scaling, passes
        self.turn = threading.RLock()
        _passes.add(self)
        # what is trained, and what the programs read
        self.trained = self.memory = memory
        if memory.averages:
            self.memory = memory.of_parameters(net)
        self.real = np.dtype(f"f{memory.real_bytes}")
        self.counters = memory.backend.allocate(COUNTERS, "int64")
        self.stats = memory.backend.allocate(STATS, "float64")
        widest = max(net.widths) * net.members
        self._most_rows = max(SMALLEST_ROWS, (1 << (LARGEST // widest).bit_length()) >> 1)
        # on the host the bits of a row do not depend on the number of rows
        self._least_rows = 1 if memory.backend.traits.on_host else SMALLEST_ROWS
        self.release()

    def release(self) -> None:
        """Release the programs and their memory."""
        # A separate workspace: predictions must not disturb a step or keep the large training buffers alive.
        self.workspace = Workspace(self.memory.backend)
        self._bound: dict[tuple[Any, ...], BoundProgram] = {}

    def rows_for(self, n: int, *, evaluated: bool = False) -> int:
        """Return the batch size for ``n`` rows: a power of two, so that few programs are needed.

        Rows that are ``evaluated``, often again, have no padding on the host, which would take its time.
        """
        if evaluated and self._least_rows == 1:
            return -(-n // -(-n // self._most_rows))
        return min(self._most_rows, max(self._least_rows, 1 << (n - 1).bit_length()))

    def program(
        self,
        rows: int,
        spec: LossSpec | None = None,
        class_weight: Any | None = None,
        *,
        net: MLP | None = None,
        **options: Any,
    ) -> BoundProgram:
        """Return the pass over ``rows`` rows up to the outputs, or with ``spec`` up to the loss.

        ``net`` stands for the network; ``options`` as in ``lowered``.
        """
        key = (net, rows, spec, class_weight is not None, *sorted(options.items()))
        bound = self._bound.get(key)
        if bound is None:
            weights = {} if class_weight is None else {"class_weight": class_weight}
            program = self.lowered(net or self.net, rows, spec, class_weighted=bool(weights), **options)
            bound = self.bind(program, **weights)
            kept, most = self._bound, MOST_BATCHES * self._most_rows
            while kept and (len(kept) == MOST_PROGRAMS or sum(size for _, size, *_ in kept) + rows > most):
                del kept[next(iter(kept))]
            kept[key] = bound
        return bound

    def lowered(
        self,
        net: MLP,
        rows: int,
        spec: LossSpec | None = None,
        *,
        weighted: bool = False,
        class_weighted: bool = False,
        coding: Coding | None = None,
        **options: Any,
    ) -> Program:
        """Return a program as ``program`` describes it; ``options`` are further fields of ``Step``."""
        memory, inputs = self.memory, Inputs(rows, net.members > 1, weighted, class_weighted, coding)
        traits, sizes = memory.backend.traits, (memory.real_bytes, memory.compute_bytes)
        return lower(Step(net, rows, traits, memory.layout, inputs, spec, *sizes, **options, passes=self.passes))

    def bind(self, program: Program, workspace: Workspace | None = None, **arrays: Any) -> BoundProgram:
        """Return a program of ``lowered`` that can run, with these ``arrays`` of the data."""
        memory, members = self.memory, self.net.members
        if "rows" in program.values:
            arrays["rows"] = member_rows(memory.backend, program.values["rows"].shape[0] // members, members)
        arrays |= {"counters": self.counters, "stats": self.stats}
        return BoundProgram(program, memory, workspace or self.workspace, arrays)

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
        self.counters[ROW_COUNT] = count * self.net.members
        for name, array in arrays.items():
            part = array[start:stop]
            if name == "x" and self.scaling is not None:
                part = self.scaling.normalised(part)
            copy(bound.arrays[name][:count], part)
            if count < rows and len(arrays) > 1:
                # Rows left from an earlier batch must not reach the sums, if there are any.
                bound.arrays[name][count:] = 0

    def outputs(self, X: Any, net: MLP | None = None, layers: int | None = None, *, evaluated: bool = False) -> Array:
        """Return the outputs (n * members, N) for X (n, K) of the network, or of ``net``, its first layer.

        Those of the members for a row follow one another. With ``layers`` they are of that many layers. ``evaluated``:
        see ``rows_for``.
        """
        rows = self.rows_for(len(X), evaluated=evaluated)
        coding = coding_of(X)
        inputs = X if coding is None else X.codes
        with self.turn:
            bound = self.program(rows, net=net, coding=coding, layers=layers)
            return self._collected(f"h{layers}" if layers else "y", bound, rows, {"x": inputs})

    def input_gradient(
        self,
        X: Any,
        arrays: Mapping[str, Any],
        spec: LossSpec | None = None,
        class_weight: Any | None = None,
        net: MLP | None = None,
    ) -> Array:
        """Return the gradient by X (n, K) of the loss ``spec``, a sum over rows, or of outputs weighed by ``seed``.

        ``arrays`` holds ``target``, or ``seed`` (n, N) for the network or its first layer ``net``.
        """
        rows = self.rows_for(len(X))
        with self.turn:
            bound = self.program(rows, spec, class_weight, net=net, gradient=0)
            gradient_rows = self._collected("dx", bound, rows, {"x": X, **arrays})
        if self.scaling is not None and self.scaling.scale is not None:
            gradient_rows /= self.scaling.scale.scale
        return gradient_rows

    def _collected(self, name: str, bound: BoundProgram, rows: int, arrays: Mapping[str, Any]) -> Array:
        """Return a value of the program for all rows, on the host."""
        self.memory.read_evaluated(self.trained)
        members = self.net.members
        count, to_host = len(arrays["x"]), self.memory.backend.to_host
        if count <= rows:
            self.bring(bound, rows, arrays, 0, count)
            bound.run()
            return np.asarray(to_host(bound.arrays[name][: count * members]), self.real)
        found = np.empty((count * members, bound.program.values[name].shape[1]), self.real)
        for start, stop in self.batches(bound, rows, arrays):
            found[start * members : stop * members] = to_host(bound.arrays[name][: (stop - start) * members])
        return found

    def silent(self, X: Any, layer: int, *, decays: bool) -> float:
        """Return the share of a hidden layer's units whose output is zero for every row of X.

        ``decays``: do not count units that weight decay has emptied, which cost the network nothing.
        """
        rows = self.rows_for(len(X))
        bound = self.bind(self.lowered(self.net, rows, layers=layer + 1, coding=coding_of(X)))
        silent = np.ones(self.net.sizes[layer + 1], np.bool_)
        self.memory.read_evaluated(self.trained)
        for start, stop in self.batches(bound, rows, {"x": codes_of(X)}):
            outputs = bound.arrays[f"h{layer + 1}"][: stop - start]
            silent &= ~np.any(self.memory.backend.to_host(outputs) != 0.0, axis=0)
        if decays:
            sizes = np.abs(self.memory.backend.to_host(self.memory.arrays[f"w{layer}"])).sum(axis=1)
            silent &= sizes > EMPTIED * sizes.max()
        return float(silent.mean())


class Evaluation:
    """The loss of ``data`` by ``spec``, to evaluate once or repeatedly.

    Rows that fit one batch go into the program once, and the others to the device once, or with ``repeated`` False
    batch by batch. ``forward`` must not be shared between two uses.
    """

    def __init__(
        self, forward: ForwardPass, data: Examples, spec: LossSpec, class_weight: Any | None, repeated: bool
    ) -> None:
        self._forward, self._spec = forward, spec
        rows = len(data.X)
        self._size = forward.rows_for(rows, evaluated=True)
        options: dict[str, Any] = {"weighted": data.weight is not None, "coding": coding_of(data.X)}
        self._bound = forward.program(self._size, spec, class_weight, **options)
        # The arrays that every evaluation copies into the program, batch by batch.
        self._left: Mapping[str, Any] = {}
        if rows <= self._size:
            forward.bring(self._bound, self._size, data.arrays, 0, rows)
        else:
            self._left = on_device(forward.memory.backend, forward.net, data.arrays) if repeated else data.arrays

    def __call__(self, memory: Memory) -> dict[str, float]:
        """Return the metrics of what predictions read of ``memory``: see ``metrics_of``."""
        forward, bound = self._forward, self._bound
        own = forward.memory
        own.read_evaluated(memory)
        forward.stats[:] = 0.0
        if self._left:
            for _ in forward.batches(bound, self._size, self._left):
                pass
        else:
            bound.run()
        return metrics_of(own.backend.to_host(forward.stats), self._spec)


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


def last_layers(weight: Array, bias: Array, merged_biases: Array) -> tuple[Array, Array]:
    """Return the last layers of merged models in one: weight (models * N, K) and bias (models * N,).

    Those of the merged one are (N, K) and (N,); ``merged_biases`` (models, N): see ``Session``.
    """
    models, (outputs, inputs) = len(merged_biases), weight.shape
    apart = np.zeros((models, outputs, models, inputs // models), weight.dtype)
    apart[range(models), :, range(models)] = weight.reshape(outputs, models, -1).swapaxes(0, 1) * models
    return apart.reshape(models * outputs, inputs), (bias + merged_biases).reshape(-1)


def combined(kind: str, outputs: Array, members: int) -> Array:
    """Return the outputs (n, N) whose prediction is the mean of the members', from theirs (n * members, N).

    Of a cross-entropy they are the logits of the mean probability, of poisson the logarithm of the mean count, of the
    other losses the mean.
    """
    outputs = outputs.reshape(-1, members, outputs.shape[1])
    if kind == "cross_entropy":
        top = outputs.max(axis=2, keepdims=True)
        return _log_mean_exp(outputs - top - np.log(np.exp(outputs - top).sum(axis=2, keepdims=True)))
    if kind == "binary_cross_entropy":
        # the logarithms of the probabilities of 1 and of 0
        return _log_mean_exp(-np.logaddexp(0.0, -outputs)) - _log_mean_exp(-np.logaddexp(0.0, outputs))
    return _log_mean_exp(outputs) if kind == "poisson" else np.asarray(outputs.mean(axis=1))


def _log_mean_exp(values: Array) -> Array:
    top = values.max(axis=1, keepdims=True)
    return np.asarray(top[:, 0] + np.log(np.exp(values - top).mean(axis=1)))


def mean_evaluation(forward: ForwardPass, data: Examples, spec: LossSpec, class_weight: Any | None) -> Evaluate:
    """Return a function that evaluates the mean prediction on ``data`` by ``spec``."""
    backend, rows, outputs = forward.memory.backend, len(data.X), forward.net.sizes[-1]
    pitch = -(-outputs // backend.traits.row_multiple) * backend.traits.row_multiple
    z = backend.view(backend.allocate(rows * pitch, "compute"), 0, (rows, outputs), pitch)
    stats, counters = backend.allocate(STATS, "float64"), backend.allocate(COUNTERS, "int64")
    counters[ROW_COUNT] = rows
    operands = on_device(backend, forward.net, {name: array for name, array in data.arrays.items() if name != "x"})
    if class_weight is not None:
        operands["class_weight"] = class_weight
    run = backend.bind("loss_grad", z=z, dz=None, counters=counters, stats=stats, loss=spec, **operands)

    def evaluate(memory: Memory) -> dict[str, float]:
        forward.trained = memory
        means = combined(spec.kind, forward.outputs(data.X, evaluated=True), forward.net.members)
        backend.copy_into(z, means.astype(forward.real, copy=False))
        stats[:] = 0.0
        run()
        return metrics_of(backend.to_host(stats), spec)

    return evaluate
