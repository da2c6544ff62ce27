"""An ensemble as one network: what takes a network takes the ensemble too."""

from collections.abc import Sequence
from itertools import pairwise

import numpy as np

from fusemlp.datasets.rows import Fold
from fusemlp.describe.conflicts import CONFLICTS, check_together
from fusemlp.describe.network import MLP
from fusemlp.engine import Engine
from fusemlp.fleet.results import Member
from fusemlp.inputs.arrays import Array
from fusemlp.training.trainer import History
from fusemlp_kernels.errors import ArgumentError, DivergenceError

# A table of at most this many rows trains an ensemble of this many models. Fewer than the least leave too few to each
# fold.
FEW_ROWS, LEAST_ROWS, MODELS = 100_000, 40, 5


def default_models(rows: int, net: MLP) -> int:
    """Return how many models a table of ``rows`` rows trains, to be merged, unless the caller decides."""
    mergeable = not any((feature, "models") in CONFLICTS for feature in net.uses)
    return MODELS if LEAST_ROWS <= rows <= FEW_ROWS and mergeable else 1


def merged(engines: Sequence[Engine]) -> Engine:
    """Return an engine whose last layer computes the mean of what the engines' last layers do, before its activation.

    The hidden layers lie side by side: the first stacks the rows of the weights, those between have the members'
    weights as blocks on the diagonal, the last has them in one row, divided by the number of members. For a regression
    the prediction is the mean; for classes the probabilities are the geometric mean, made to add up to 1. Dropout is
    left out. Inputs are normalised as by the engines; if they differ in that, the scales are in the first layer. The
    history is ``mean_history``, the inverse ``members``. Raises ArgumentError as ``check_mergeable``.
    """
    first = engines[0]
    if len(engines) == 1:
        return first
    count, layers = len(engines), first.network.layers
    scales = [engine.scaling.tensors for engine in engines]
    alike = all(
        scale.keys() == scales[0].keys() and all(np.array_equal(scale[name], scales[0][name]) for name in scale)
        for scale in scales
    )
    states = [engine.memory.evaluated_tensors() if alike else _of_raw_inputs(engine) for engine in engines]
    check_mergeable(first.network, count)
    inputs, *hidden, outputs = first.network.sizes
    parameters: dict[str, Array] = {}
    for layer in range(layers):
        weights = [state[f"{2 * layer}.weight"] for state in states]
        biases = [state[f"{2 * layer}.bias"] for state in states]
        if layers == 1:
            weight, bias = np.mean(weights, axis=0), np.mean(biases, axis=0)
        elif layer == 0:
            weight, bias = np.concatenate(weights), np.concatenate(biases)
        elif layer < layers - 1:
            weight, bias = _diagonal(weights), np.concatenate(biases)
        else:
            weight, bias = np.concatenate(weights, axis=1) / count, np.mean(biases, axis=0)
        parameters |= {f"{2 * layer}.weight": weight, f"{2 * layer}.bias": bias}
    widths = inputs, *(count * width for width in hidden), outputs
    parameters |= scales[0] if alike else {}
    together = _like(first, widths, parameters, normalise=first.normalise if alike else False)
    together.merged = np.array(biases) - bias
    histories = [engine.history for engine in engines if engine.history is not None]
    together.history = mean_history(histories) if histories else None
    return together


def members(engine: Engine, argument: str = "engine") -> list[Engine]:
    """Return the models that ``merged`` made ``engine`` of, to rounding: their blocks of the hidden layers; of a
    network with members, each of these with its factors in weights of its own.

    Raises ArgumentError for an engine that was not merged, was changed since, or has no hidden layers but means.
    """
    biases, net = engine.merged_biases, engine.network
    if net.members > 1:
        return [_member(engine, place) for place in range(net.members)]
    if biases is None or net.layers == 1:
        single = "is a single one, was trained after its parts were merged, or an earlier release merged it"
        reason = single if biases is None else "has no hidden layers to part"
        raise ArgumentError(f"{argument}: the model {reason}; train an ensemble with hidden layers (models=5)")
    count, state, last = len(biases), engine.state_dict(), 2 * (net.layers - 1)
    inputs, *hidden, outputs = net.sizes
    widths = inputs, *(width // count for width in hidden), outputs
    parts = []
    for place, bias in enumerate(biases):
        blocks = [slice(None), *(slice(place * width, (place + 1) * width) for width in widths[1:-1]), slice(None)]
        parameters = dict(engine.scaling.tensors)
        for layer, (columns, rows) in enumerate(pairwise(blocks)):
            parameters[f"{2 * layer}.weight"] = state[f"{2 * layer}.weight"][rows, columns]
            parameters[f"{2 * layer}.bias"] = state[f"{2 * layer}.bias"][rows]
        parameters[f"{last}.weight"] = parameters[f"{last}.weight"] * count
        parameters[f"{last}.bias"] = parameters[f"{last}.bias"] + bias
        parts.append(_like(engine, widths, parameters, normalise=engine.normalise))
    return parts


def _member(engine: Engine, place: int) -> Engine:
    """Return one of the members that share weights, as a network without members."""
    net, shared = engine.network, engine.memory.evaluated_tensors()
    outputs = slice(place * net.sizes[-1], (place + 1) * net.sizes[-1])
    parameters = dict(engine.scaling.tensors)
    for layer in range(net.layers):
        weight, bias = shared[f"{2 * layer}.weight"], shared[f"{2 * layer}.bias"]
        if layer == net.layers - 1:
            weight, bias = weight[outputs], bias[outputs]
        else:
            r, s = shared[f"{2 * layer}.r"][place], shared[f"{2 * layer}.s"][place]
            weight, bias = s[:, None] * weight * r, bias[place]
        parameters |= {f"{2 * layer}.weight": weight, f"{2 * layer}.bias": bias}
    return _like(engine, net.sizes, parameters, normalise=engine.normalise)


def _like(first: Engine, widths: Sequence[int], parameters: dict[str, Array], *, normalise: bool | None) -> Engine:
    """Return an engine of these widths and parameters without dropout, in all else as ``first``."""
    engine = first.like(Engine, net=first.network.but(sizes=widths, dropout=0.0, members=1), normalise=normalise)
    engine.load_state_dict(parameters)
    return engine


def _of_raw_inputs(engine: Engine) -> dict[str, Array]:
    """Return parameters of the same network for inputs that are not normalised."""
    state = engine.memory.evaluated_tensors()
    if engine.scaling.scale is not None:
        mean, scale = (np.asarray(one, np.float64) for one in (engine.scaling.scale.mean, engine.scaling.scale.scale))
        weight = state["0.weight"] / scale
        state |= {"0.weight": weight, "0.bias": state["0.bias"] - weight @ mean}
    return state


def check_mergeable(net: MLP, models: int) -> None:
    """Raise ArgumentError if this many networks like ``net`` cannot be merged."""
    if models > 1:
        check_together({**net.uses, "models": models})


def sound(members: Sequence[Member]) -> dict[int, Engine]:
    """Return the engines of the members that did not diverge, by their index; DivergenceError if all did.

    Those for whose first epoch a time limit was too short are left out, unless all are.
    """
    found = [member for member in members if member.status != "diverged"]
    if not found:
        raise DivergenceError(members[0].reason)
    kept = [member for member in found if member.history.epochs] or found
    return {member.index: member.engine for member in kept}


def merged_members(members: Sequence[Member], folds: Sequence[Fold] = ()) -> tuple[Engine, list[tuple[Engine, Array]]]:
    """Return the ``sound`` members as one engine, and if there are ``folds`` each with the rows that it validates."""
    engines = sound(members)
    held = [(engine, folds[index][1]) for index, engine in engines.items()] if folds else []
    return merged([*engines.values()]), held


def mean_history(histories: Sequence[History]) -> History:
    """Return the means of each epoch; a model that has stopped counts with its best epoch."""
    # one without a whole epoch counts only if all are
    histories = [history for history in histories if history.epochs] or histories
    first = histories[0]
    mean = History(chance_loss=first.chance_loss, in_use=list(first.in_use))
    bests = [history.best_epoch for history in histories if history.best_epoch is not None]
    for epoch in range(max(len(history.epochs) for history in histories)):
        logs = {name: float(np.mean([_at(history, name, epoch) for history in histories])) for name in first.history}
        mean.record(epoch, logs, sum(history.seconds[epoch] for history in histories if epoch < len(history.seconds)))
    mean.best_epoch = round(float(np.mean(bests))) if bests else None
    late = [history for history in histories if "time limit" in history.stopped]
    if late:
        mean.stopped = f"the time limit was reached by {len(late)} of {len(histories)} models"
        mean.stopped += "; the best weights of each were restored" if "restored" in late[0].stopped else ""
    elif all("restored" in history.stopped for history in histories):
        mean.stopped = "no model improved any more on its validation rows; the best weights of each were restored"
    return mean


def _at(history: History, name: str, epoch: int) -> float:
    last = len(history.epochs) - 1
    best = last if history.best_epoch is None else history.best_epoch
    return history.history[name][epoch if epoch <= last else best]


def _diagonal(blocks: Sequence[Array]) -> Array:
    """Return a matrix with the blocks, all of one shape, on its diagonal."""
    count, (rows, columns) = len(blocks), blocks[0].shape
    matrix = np.zeros((count, rows, count, columns), blocks[0].dtype)
    matrix[range(count), :, range(count)] = blocks
    return matrix.reshape(count * rows, count * columns)
