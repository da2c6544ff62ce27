"""Losses of the caller's: their checked calls, their evaluation, and the check of their gradient."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from fusemlp.describe.checks import as_number, returned_number
from fusemlp.describe.losses import Loss, LossLike, OwnLoss, as_loss
from fusemlp.inputs.arrays import Array, as_values, as_weights, to_array
from fusemlp.inputs.examples import DeviceInputs, Examples, as_targets
from fusemlp.runtime.forward import Evaluate, ForwardPass
from fusemlp.runtime.memory import Memory
from fusemlp_kernels.errors import ArgumentError, ArgumentTypeError, DataError, DTypeError, ShapeError


def caller_of(inputs: DeviceInputs) -> Callable[..., tuple[float, Array, float]]:
    """Return the function for programs: it calls the loss of an engine's ``inputs``, whichever it is then."""
    answer = call if inputs.backend.traits.on_host else call_with_tensors
    return lambda *batch: answer(inputs.loss, *batch)


def call(loss: Loss, outputs: Array, targets: Array, weights: Array | None) -> tuple[float, Array, float]:
    """Return the loss, its gradient (M, N), and the weight of the loss in a mean over batches.

    A function gets a copy of ``outputs`` (M, N), and its answer is checked; this may be infinite or NaN if the squares
    of the outputs are, as in a training that diverges. Raises ArgumentTypeError, ShapeError, DTypeError or DataError.
    """
    assert isinstance(loss, OwnLoss)
    normaliser = float(len(outputs) if weights is None else weights.sum(dtype=np.float64))
    if not normaliser:
        return 0.0, np.zeros_like(outputs), 0.0
    value, answer = _answer(loss, outputs.copy(), targets, weights)
    number, gradient = returned_number("loss", loss.name, value), to_array("loss: gradient", answer)
    _check_kind(loss, gradient, outputs, targets, real=gradient.dtype.kind == "f")
    # the squares of large numbers may overflow, of which vdot does not warn
    if not math.isfinite(number) or not math.isfinite(np.vdot(gradient, gradient)):
        _check_finite(loss.name, number, gradient, outputs)
    return number, gradient, normaliser


def call_with_tensors(loss: Loss, outputs: Any, targets: Any, weights: Any | None) -> tuple[float, Any, float]:
    """Return and raise what ``call`` does, with torch's tensors on one device."""
    assert isinstance(loss, OwnLoss)
    normaliser = float(len(outputs) if weights is None else weights.double().sum())
    if not normaliser:
        return 0.0, outputs.new_zeros(outputs.shape), 0.0
    tensor = type(outputs)
    value, gradient = _answer(loss, outputs.clone(), targets, weights)
    number = returned_number("loss", loss.name, value.detach() if isinstance(value, tensor) else value)
    if not isinstance(gradient, tensor) or gradient.device != outputs.device:
        what = f"on {gradient.device}" if isinstance(gradient, tensor) else type(gradient).__name__
        raise ArgumentTypeError(
            f"loss: the gradient of {loss.name!r} is {what}; expected a tensor on {outputs.device}, as the outputs are"
        )
    _check_kind(loss, gradient, outputs, targets, real=gradient.is_floating_point())
    gradient = gradient.detach()
    if not math.isfinite(number) or not math.isfinite(float(gradient.square().sum())):
        _check_finite(loss.name, number, *(each.double().cpu().numpy() for each in (gradient, outputs)))
    return number, gradient, normaliser


def _answer(loss: OwnLoss, outputs: Any, targets: Any, weights: Any | None) -> tuple[Any, Any]:
    """Return the loss and the gradient from the caller's function, not yet checked; raises ArgumentTypeError if it does
    not return two."""
    assert loss.function is not None
    operands = (outputs, targets)
    answer = loss.function(*operands, weights=weights) if loss.takes_weights else loss.function(*operands)
    if not isinstance(answer, (tuple, list)) or len(answer) != 2:
        raise ArgumentTypeError(
            f"loss: {loss.name!r} returned {type(answer).__name__}; expected (loss, gradient): a number, and an array "
            f"{tuple(outputs.shape)} of its gradient by the outputs"
        )
    return answer[0], answer[1]


def _check_kind(loss: OwnLoss, gradient: Any, outputs: Any, targets: Any, *, real: bool) -> None:
    if gradient.shape != outputs.shape:
        shape, wanted, given = tuple(gradient.shape), tuple(outputs.shape), tuple(targets.shape)
        mend = f"; targets have shape {given}: reshape them, targets[:, None]" if wanted == (*given, 1) else ""
        raise ShapeError(
            f"loss: the gradient of {loss.name!r} has shape {shape}; expected {wanted}, a number for each output{mend}"
        )
    if not real:
        raise DTypeError(
            f"loss: the gradient of {loss.name!r} has dtype {gradient.dtype}; expected real numbers, {outputs.dtype}"
        )


def _check_finite(name: str, number: float, gradient: Array, outputs: Array) -> None:
    # a training that diverges ends by itself, with the engine back at its last good epoch
    if not math.isfinite(np.vdot(outputs, outputs)):
        return
    wrong = np.argwhere(~np.isfinite(gradient))
    if len(wrong):
        row, column = wrong[0].tolist()
        what = f"its gradient is {gradient[row, column]} at row {row}, column {column} of the batch"
    elif math.isfinite(number):
        return
    else:
        what = f"it is {number}"
    raise DataError(
        f"loss: {name!r} of finite outputs is not finite: {what}; look for log(0), 0 / 0, exp of large, NaN in y"
    )


def own_evaluation(forward: ForwardPass, data: Examples, inputs: DeviceInputs) -> Evaluate:
    """Return a function that evaluates the loss of ``inputs``, a function, on ``data``, all rows at once."""
    place, answer = inputs.backend.from_host, caller_of(inputs)

    def evaluate(memory: Memory) -> dict[str, float]:
        forward.trained = memory
        outputs = place(forward.outputs(data.X, evaluated=True))
        weight = None if data.weight is None else place(data.weight)
        return {"loss": answer(outputs, place(inputs.on_host(data.targets.values).copy()), weight)[0]}

    return evaluate


def check_gradient(
    function: LossLike, outputs: Any, targets: Any, weights: Any = None, *, tolerance: float = 1e-5
) -> float:
    """Compare the gradient of a function with central differences in float64, and return the largest relative error.

    ``function``, ``outputs`` (n, N), ``targets`` (n, ...) and ``weights`` (n,) are as an engine
    calls a loss, with float64 for real numbers. The function is called twice for each output, so a few rows do. Errors
    are relative to the largest gradient. Differences say nothing at kinks, such as an error of 0 in the absolute error.

    Raises ArgumentError if an error is above ``tolerance`` and the rounding of the differences, the errors of an
    engine for an answer that it does not take, and DataError for outputs that are not finite.
    """
    loss, tolerance = as_loss(function), as_number("tolerance", tolerance, low=0.0)
    if not isinstance(loss, OwnLoss):
        raise ArgumentError(f"function: {loss.kind} is computed by kernels, which tests compare with differences")
    y = to_array("outputs", outputs)
    y = np.array(as_values("outputs", y, width=y.shape[-1] if y.ndim else 1, rows=None, dtype=np.float64))
    t = np.array(as_targets("targets", targets, loss, outputs=y.shape[1], rows=len(y), dtype=np.float64).values)
    if weights is not None:
        loss.check_weights("weights")
        weights = as_weights("weights", weights, rows=len(y), dtype=np.float64)

    def at(place: tuple[int, ...], value: float) -> float:
        moved = y.copy()
        moved[place] = value
        return call(loss, moved, t.copy(), weights)[0]

    number, gradient, _ = call(loss, y, t.copy(), weights)
    # the error of a difference is least where truncation and rounding are alike
    eps = float(np.finfo(np.float64).eps)
    differences, rounding = np.empty_like(y), np.empty_like(y)
    for place in np.ndindex(*y.shape):
        step = eps ** (1 / 3) * max(1.0, abs(y[place]))
        low, high = y[place] - step, y[place] + step
        differences[place] = (at(place, high) - at(place, low)) / (high - low)
        rounding[place] = 4.0 * eps * abs(number) / step
    largest = max(float(np.abs(gradient).max()), float(np.abs(differences).max()))
    errors = np.abs(gradient - differences)
    row, column = np.unravel_index(int(np.argmax(errors - rounding)), y.shape)
    if not errors[row, column] <= tolerance * largest + rounding[row, column]:
        raise ArgumentError(
            f"function: the gradient of {loss.name!r} at row {row}, column {column} is "
            f"{gradient[row, column]:.6g}, differences of the loss give {differences[row, column]:.6g}; a mean over "
            "rows divides the gradient too"
        )
    return float(errors.max()) / largest if largest else 0.0
