"""The oracle: the textbook's training in float64, and the tolerance that rounding allows a contender.

The tolerance is derived from the oracle itself. A matrix product in floating point is the exact product of operands
with relative changes of at most gamma. Gamma is one rounding of the operand (tf32, bf16), plus sqrt(n) * u for a sum of
n products, by the probabilistic analysis of Higham and Mary (SIAM J. Sci. Comput. 41, 2019); u is the unit roundoff of
the sum. So the oracle runs again with random changes: features and parameters of each step by up to gamma, with n the
longest sum of the step, and each new parameter by up to u. To first order these runs deviate from the exact one by a
sum of independent errors. A contender may deviate by ``DEVIATIONS`` times their root mean square, plus gamma times the
loss for its last sum.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from bench.cases import Array, Case, Data, Parameters, checked_rows, model_of
from fusemlp_kernels import reference
from fusemlp_kernels.contract import LossSpec, TensorRule, UpdateRule

STEPS = 20
RUNS = 4
# Four runs give the root mean square to about a third; chance exceeds six of it once in a million.
DEVIATIONS = 8.0
UNIT = 2.0**-24
# The unit roundoff of a matrix product's operands.
OPERANDS = {"fp32": 0.0, "tf32": 2.0**-11, "bf16": 2.0**-8, "fp16": 2.0**-11}
# This many models of a fleet run with errors, and the widest tolerance holds for all. One model in a thousand has a
# gradient so near zero that rounding decides its sign, and with it the direction of Adam's first step. A model outside
# the tolerance is checked again with this many runs of its own.
DISTURBED_MODELS = 8
SECOND_RUNS = 16
# A step with more floating-point operations is checked once at full size, and for all STEPS on batches of FEW_ROWS.
MOST_FLOPS, FEW_ROWS = 2e10, 256
# The number of oracle runs with random dropout masks.
MASKED_RUNS = 12
Change = Callable[[Array, float], Array]


@dataclass(frozen=True)
class Rules:
    """The differences of a contender's mathematics from torch's, by its library's own definition.

    ``convention``: the place of Adam's eps, see ``reference.update``; scikit-learn also halves the mean squared error,
    and its gradient is that of a sum over the outputs.
    """

    convention: str = "torch"


@dataclass(frozen=True)
class Expected:
    """``losses`` (steps + 1,), for a fleet (steps + 1, models): before each step, and after the last one.

    ``tolerance`` (steps + 1,): the largest difference that a contender may have.
    """

    losses: Array
    tolerance: Array


def gamma(case: Case) -> float:
    """Return gamma: the relative change of a product's operands that stands for its rounding."""
    return OPERANDS[case.precision] + float(np.sqrt(max(*case.sizes, case.batch_size))) * UNIT


def train(
    case: Case,
    data: Data,
    parameters: Parameters,
    rules: Rules,
    *,
    change: Change | None = None,
    masks: np.random.Generator | None = None,
    steps: int = STEPS,
) -> Array:
    """Return the oracle's losses (steps + 1,) for one model; ``change`` disturbs arrays, ``masks`` draws dropout's."""
    hidden = len(parameters) - 1
    disturb = change or (lambda array, size: array)
    rate = case.dropout if masks is not None else 0.0
    layers = [
        reference.Layer(
            weight.astype(np.float64),
            bias.astype(np.float64),
            case.activation if index < hidden else "identity",
            rate=rate if index < hidden else 0.0,
        )
        for index, (weight, bias) in enumerate(parameters)
    ]
    rule = UpdateRule(case.optimizer, convention=rules.convention)
    state = reference.initial_state(rule, layers)
    batches = checked_rows(case, steps).reshape(steps, case.batch_size)
    losses = np.empty(steps + 1)
    size, halves = gamma(case), case.loss == "mse" and rules.convention == "scikit-learn"
    value, slope = (0.5, 0.5 * case.sizes[-1]) if halves else (1.0, 1.0)
    for t, rows in enumerate(batches):
        at = [reference.Layer(disturb(a.w, size), disturb(a.b, size), a.activation, a.slope, a.rate) for a in layers]
        keeps = None
        if masks is not None:
            shapes = [(case.batch_size, width) for width in case.sizes[1:-1]]
            keeps = [*(masks.random(shape) >= rate for shape in shapes), None]
        batch = reference.Batch(disturb(data.X[rows].astype(np.float64), size), data.y[rows], keeps=keeps)
        losses[t], grads, _ = reference.gradients(at, LossSpec(case.loss), batch)
        losses[t] *= value
        for index, (layer, layer_grads) in enumerate(zip(layers, grads, strict=True)):
            new: list[Any] = []
            for place, (p, g) in enumerate(zip((layer.w, layer.b), layer_grads, strict=True)):
                p, state[index][place] = reference.update(
                    rule, TensorRule(), p, slope * g, state[index][place], t, case.learning_rate
                )
                new.append(disturb(p, UNIT))
            layers[index] = replace(layer, w=new[0], b=new[1])
    losses[steps] = loss_of(case, data, [(a.w, a.b) for a in layers], batches[0])
    return losses


def loss_of(case: Case, data: Data, parameters: Parameters, rows: Array) -> float:
    """Return the mean loss of some rows, in float64, without dropout."""
    h = data.X[rows].astype(np.float64)
    for index, (weight, bias) in enumerate(parameters):
        h = reference.linear(
            h,
            weight.astype(np.float64),
            bias.astype(np.float64),
            case.activation if index < len(parameters) - 1 else "identity",
        )
    return float(reference.loss_of_output(LossSpec(case.loss), h, data.y[rows], None, None)[0])


def checks(case: Case) -> list[tuple[Case, int]]:
    """Return the cases, with a number of steps, that a contender must train as the oracle does.

    A case that takes the oracle minutes gets STEPS steps on batches of ``FEW_ROWS``, then one full step.
    """
    plain = replace(case, dropout=0.0)
    if case.flops <= MOST_FLOPS or case.batch_size <= FEW_ROWS:
        return [(plain, STEPS)]
    return [(replace(plain, batch_size=FEW_ROWS, steps=case.rows // FEW_ROWS), STEPS), (plain, 1)]


def expected(case: Case, data: Data, rules: Rules, steps: int = STEPS) -> Expected:
    """Return the oracle's losses of a case, with tolerances; dropout is off."""
    parameters = data.parameters
    single = [parameters] if case.models is None else [model_of(parameters, i) for i in range(case.models)]
    exact = np.stack([train(case, data, one, rules, steps=steps) for one in single], axis=1)
    picked = np.unique(np.linspace(0, len(single) - 1, min(len(single), DISTURBED_MODELS)).astype(int))
    tolerances = [tolerance(case, data, single[index], rules, exact[:, index], RUNS) for index in picked]
    return Expected(exact[:, 0] if case.models is None else exact, np.max(tolerances, axis=0))


def tolerance(case: Case, data: Data, parameters: Parameters, rules: Rules, exact: Array, runs: int) -> Array:
    """Return (steps + 1,) tolerances around ``exact``, from ``runs`` runs with errors."""
    squares = np.zeros(len(exact))
    for run in range(runs):
        generator = np.random.default_rng(run)

        def change(array: Array, size: float, draw: np.random.Generator = generator) -> Array:
            return array * (1.0 + size * draw.uniform(-1.0, 1.0, array.shape))

        off = train(case, data, parameters, rules, change=change, steps=len(exact) - 1) - exact
        squares += np.maximum.accumulate(np.abs(off)) ** 2 / runs
    return DEVIATIONS * np.sqrt(squares) + gamma(case) * np.abs(exact)


def masked_losses(case: Case, data: Data, rules: Rules) -> Array:
    """Return (MASKED_RUNS,) mean losses over the STEPS steps with dropout, each run with its own masks."""
    parameters = data.parameters
    runs = [
        train(case, data, parameters, rules, masks=np.random.default_rng([7, run]))[:STEPS].mean()
        for run in range(MASKED_RUNS)
    ]
    return np.array(runs)
