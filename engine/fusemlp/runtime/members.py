"""The mean prediction of members that share weights, and its loss."""

from __future__ import annotations

from typing import Any

import numpy as np

from fusemlp.inputs.arrays import Array
from fusemlp.inputs.targets import Examples
from fusemlp.runtime.forward import ForwardPass, metrics_of
from fusemlp.runtime.memory import Memory, on_device
from fusemlp_kernels.contract import COUNTERS, ROW_COUNT, STATS, LossSpec


def combined(kind: str, outputs: Array) -> Array:
    """Return the outputs (n, N) whose prediction is the mean of the members', from theirs (n, members, N).

    Of a cross-entropy they are the logits of the mean probability, of poisson the logarithm of the mean count, of the
    other losses the mean.
    """
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


class MeanEvaluation:
    """The loss of the mean prediction on ``data`` by ``spec``, to evaluate once or repeatedly."""

    def __init__(self, forward: ForwardPass, data: Examples, spec: LossSpec, class_weight: Any | None) -> None:
        self._forward, self._spec, self._X = forward, spec, data.X
        backend, rows, outputs = forward.memory.backend, len(data.X), forward.net.sizes[-1]
        pitch = -(-outputs // backend.traits.row_multiple) * backend.traits.row_multiple
        self._z = backend.view(backend.allocate(rows * pitch, "compute"), 0, (rows, outputs), pitch)
        self._stats, counters = backend.allocate(STATS, "float64"), backend.allocate(COUNTERS, "int64")
        counters[ROW_COUNT] = rows
        given = on_device(backend, {name: array for name, array in data.arrays.items() if name != "x"})
        if class_weight is not None:
            given["class_weight"] = class_weight
        self._run = backend.bind(
            "loss_grad", z=self._z, dz=None, counters=counters, stats=self._stats, loss=spec, **given
        )

    def of(self, memory: Memory) -> dict[str, float]:
        """Return the metrics of what predictions read: see ``metrics_of``."""
        self._forward.trained = memory
        backend = self._forward.memory.backend
        outputs = combined(self._spec.kind, self._forward.outputs(self._X))
        backend.copy_into(self._z, outputs.astype(self._forward.real, copy=False))
        self._stats[:] = 0.0
        self._run()
        return metrics_of(backend.to_host(self._stats), self._spec)
