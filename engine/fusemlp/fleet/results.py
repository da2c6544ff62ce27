"""The results of a fleet: its models, ranked, and their ensemble, also as one network."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np

from fusemlp.datasets.rows import Fold
from fusemlp.describe.checks import aligned, as_count
from fusemlp.describe.conflicts import CONFLICTS, check_together
from fusemlp.describe.metrics import rises
from fusemlp.describe.network import MLP
from fusemlp.describe.privacy import OF_TRAINING_ROWS
from fusemlp.engine import Engine
from fusemlp.fleet.candidates import Candidate
from fusemlp.inputs.arrays import Array, is_sparse
from fusemlp.runtime.ledger import Ledger, spent_together
from fusemlp.training.trainer import History
from fusemlp_kernels.errors import ArgumentError, ArgumentTypeError, DivergenceError, unknown_name


@dataclass(frozen=True, eq=False)
class Kept:
    """A model without its engine: parameters by the names of ``state_dict``, history, and privacy spent."""

    candidate: Candidate
    machine: Mapping[str, Any]
    parameters: dict[str, Array]
    history: History
    epochs_trained: int
    privacy: dict[str, Any] | None = None

    @classmethod
    def of(cls, engine: Engine, candidate: Candidate, machine: Mapping[str, Any]) -> Kept:
        """Return what is kept of an engine."""
        spent = engine.ledger.to_config(engine.update_count)
        history = engine.history or History()
        return cls(candidate, machine, engine.state_dict(), history, engine.epochs_trained, spent)

    def engine(self) -> Engine:
        """Return a new engine with these parameters; its optimizer starts afresh."""
        engine = self.candidate.engine(self.machine)
        engine.load_state_dict(self.parameters)
        # with a new seed: its updates are counted afresh
        engine.ledger = Ledger.from_config(self.privacy, engine.batch_size)
        engine.history, engine.epochs_trained = self.history, self.epochs_trained
        return engine


@dataclass(frozen=True)
class Member:
    """A model of a fleet: its parameters that vary, its engine and history, and how it ended.

    ``held`` is the engine, or the parameters of it if the fleet was trained in parts.
    ``status`` is "trained", "stopped" (its own early stopping; the engine has the best weights) or "diverged" (the
    engine is back at the last good epoch; ``reason`` is the error). ``scores`` are the losses, accuracies and
    metrics of the last epoch, or of the epoch whose weights were restored.
    """

    index: int
    parameters: dict[str, Any]
    held: Engine | Kept
    history: History
    status: str
    reason: str
    scores: dict[str, float]

    @property
    def engine(self) -> Engine:
        """The engine; a new one with each call if only the parameters were kept."""
        return self.held.engine() if isinstance(self.held, Kept) else self.held

    def __repr__(self) -> str:
        # short: ``engine`` and ``history`` have the rest
        ending = self.status, f"epochs={len(self.history.epochs)}"
        scores = (f"{name}={value:.5g}" for name, value in self.scores.items())
        return f"Member({self.index}: {', '.join([str(self.parameters), *ending, *scores])})"


def scores_of(history: History, *, restored: bool = False) -> dict[str, float]:
    """Return the losses and accuracies of the epoch whose weights the engine has."""
    if not history.epochs:
        return {}
    at = history.epochs.index(history.best_epoch) if restored and history.best_epoch is not None else -1
    return {name: series[at] for name, series in history.history.items() if name != "learning_rate"}


@dataclass(frozen=True)
class FleetResults:
    """The models of a fleet after a ``fit``, in the order of ``vary``."""

    members: tuple[Member, ...]

    def __repr__(self) -> str:
        statuses = [member.status for member in self.members]
        counts = ", ".join(f"{statuses.count(status)} {status}" for status in sorted(set(statuses)))
        unknown = set(statuses) <= {"diverged"} or (self._is_private and self.metric == "loss")
        best = "" if unknown else f"; best: {self.best()!r}"
        return f"FleetResults({counts}{best})"

    def privacy_spent(self) -> dict[str, Any]:
        """Return the privacy that all models together have spent on the rows, as ``Engine.privacy_spent`` does for one.

        Publishing several models, or the best of them, reveals as much. Raises ArgumentError if the models have not
        trained privately, MissingLibraryError without dp-accounting.
        """
        held = [member.held for member in self.members]
        spent = [part.privacy if isinstance(part, Kept) else part.ledger.to_config(part.update_count) for part in held]
        return spent_together([config for config in spent if config is not None])

    def engine(self, index: int) -> Engine:
        """Return the engine of a model; if the fleet was trained in parts a new one, whose optimizer starts afresh."""
        if isinstance(index, bool) or not isinstance(index, int | np.integer):
            raise ArgumentTypeError(f"index: expected the number of a model, got {index!r}")
        if not -len(self.members) <= index < len(self.members):
            raise ArgumentError(f"index: expected 0 to {len(self.members) - 1}, got {index}")
        return self.members[index].engine

    @property
    def _is_private(self) -> bool:
        return any("epsilon" in member.scores for member in self.members)

    @property
    def metric(self) -> str:
        """The score that ranks models by default: val_loss, or loss without validation data."""
        return "val_loss" if any("val_loss" in member.scores for member in self.members) else "loss"

    def ranked(self, metric: str | None = None) -> list[Member]:
        """Return the models from best to worst by a score, then by ``self.metric``, then in order; diverged last."""
        chosen = self.metric if metric is None else metric
        known = {name: None for member in self.members for name in member.scores}
        if known and chosen not in known:
            raise unknown_name("metric", chosen, known)
        second = self.metric

        def place(member: Member) -> tuple[bool, float, float]:
            first, other = _order(chosen, second, lambda name: member.scores.get(name, math.inf))
            return member.status == "diverged" or math.isinf(first), first, other

        return sorted(self.members, key=place)

    def combinations(self, metric: str | None = None, points: Sequence[Point] | None = None) -> list[Combination]:
        """Return the models in groups that differ in their seed alone, the best mean of a score first.

        A group has ``parameters``, ``members``, ``mean(name)`` and ``spread(name)``, the standard deviation over its
        seeds. Groups of which a larger share diverged come later, then those of which a smaller share has ended. If the
        models differ in nothing but the seed, or have no seeds, each is a group, in the order of ``ranked``.

        ``points``: the parameters of all models of the fleet, if some have not ended.
        """
        ranked, chosen, second = self.ranked(metric), metric or self.metric, self.metric
        known = self._points(points)
        if not averages(list(known.values())):
            return [Combination(known[member.index], (member,), 1) for member in ranked]
        shared = {index: {k: v for k, v in point.items() if k != "seed"} for index, point in known.items()}
        # a value may be a list, which has no hash
        keys = {index: repr(sorted(point.items())) for index, point in shared.items()}
        groups: dict[str, list[Member]] = {}
        for member in ranked:
            groups.setdefault(keys[member.index], []).append(member)
        models = Counter(keys.values())
        several = [Combination(shared[group[0].index], tuple(group), models[key]) for key, group in groups.items()]

        def place(group: Combination) -> tuple[float, float, float, float, int]:
            ended, first = len(group.members), min(member.index for member in group.members)
            return group.diverged / ended, 1 - ended / group.models, *_order(chosen, second, group.mean), first

        return sorted(several, key=place)

    def best(self, metric: str | None = None) -> Member:
        """Return the best model by a score; if seeds vary too, of the combination with the best mean over its seeds.

        Raises DivergenceError if every model diverged, ArgumentError for a score of private rows.
        """
        chosen = metric or self.metric
        if self._is_private and chosen in OF_TRAINING_ROWS:
            raise ArgumentError(
                f"metric: {chosen!r} is of the private rows, which privacy does not cover; fit with "
                "validation_data=(Xv, yv) of rows that need no protection, and choose by val_loss"
            )
        first = self.combinations(metric)[0].sound[0]
        if first.status == "diverged":
            raise DivergenceError(f"loss: all {len(self.members)} models diverged; the first: {first.reason}")
        return first

    def records(self, metric: str | None = None) -> list[dict[str, Any]]:
        """Return a mapping for each model, from best to worst: index, parameters, scores, epochs and status."""
        columns = self.columns(metric)
        rows = zip(*columns.values(), strict=True)
        return [{name: cell for name, cell in zip(columns, row, strict=True) if cell is not None} for row in rows]

    def table(self, metric: str | None = None, *, limit: int | None = None, means: bool = False) -> str:
        """Return ``records`` as aligned text, at most ``limit`` rows; a dash for a parameter that a model lacks.

        With ``means`` models that differ in their seed alone share a row: the means of their scores, the spread of the
        score that ranks (its standard deviation over the seeds), the number of seeds, and the best model.
        """
        if limit is not None:
            as_count("limit", limit, minimum=0)
        columns = self.columns(metric, means=means)
        left_out = 0 if limit is None else len(columns["model"]) - limit
        columns = {f"spread({metric or self.metric})" if name == "spread" else name: columns[name] for name in columns}
        cells = ([name, *map(shown, column[:limit])] for name, column in columns.items())
        more = f"\n... and {left_out} more" if left_out > 0 else ""
        return aligned([*zip(*cells, strict=True)], left=()) + more

    def columns(
        self, metric: str | None = None, *, means: bool = False, points: Sequence[Point] | None = None
    ) -> dict[str, list[Any]]:
        """Return the columns of ``table``, None for what a model lacks; ``points`` are those of ``combinations``."""
        ranked, known = self.ranked(metric), self._points(points)
        # parameters before scores; models of a list need not all have the same parameters
        parameters = dict.fromkeys(name for point in known.values() for name in point)
        scores = dict.fromkeys(name for member in ranked for name in member.scores)
        several = means and averages([*known.values()])
        if several:
            groups = self.combinations(metric, points)
            del parameters["seed"]
        else:
            groups = [Combination(known[member.index], (member,), 1) for member in ranked]
        columns: dict[str, list[Any]] = {"model": [group.members[0].index for group in groups]}
        columns |= {name: [group.parameters.get(name) for group in groups] for name in parameters}
        for name in scores:
            columns[name] = [group.mean(name) if several else group.members[0].scores.get(name) for group in groups]
        if several:
            columns["spread"] = [group.spread(metric or self.metric) for group in groups]
            columns["seeds"] = [group.seeds for group in groups]
        columns["epochs"] = [round(group.epochs) for group in groups]
        return columns | {"status": [group.status for group in groups]}

    def _points(self, points: Sequence[Point] | None) -> dict[int, Point]:
        """Return the parameters of the models by their index: those of ``points``, or of the members."""
        if points is not None:
            return dict(enumerate(points))
        return {member.index: member.parameters for member in self.members}


def shown(value: Any, digits: int = 5) -> str:
    """Return a cell of a table as text: a dash for None and NaN."""
    if value is None or value != value:
        return "-"
    return f"{value:.{digits}g}" if isinstance(value, float) else str(value)


@dataclass(frozen=True)
class Ensemble:
    """The joint prediction of several models for n rows.

    ``mean``: the mean over the models of ``predict_proba``, (n, N), or without classes of ``predict``, (n,) or (n, N).
    ``spread``: their standard deviation, of the same shape. ``votes`` (n, N) int64: how many models find each class the
    most probable; None without classes. ``prediction``: the class of the largest mean, (n,); for several labels 0 or 1
    each, (n, N); without classes the mean.
    """

    prediction: Array
    mean: Array
    spread: Array
    votes: Array | None


def together(engines: Iterable[Engine], X: Any) -> Ensemble:
    """Return the ensemble of engines with one loss; they predict one after another, so that memory does not grow."""
    classifies = labels = False
    count, mean, squares, votes = 0, np.zeros(()), np.zeros(()), np.zeros((), np.int64)
    for count, engine in enumerate(engines, 1):
        # sparse rows are read once
        X = engine.inputs.features("X", X, codes=True) if is_sparse(X) else X
        classifies = engine.loss.is_classification
        labels = engine.loss.kind == "binary_cross_entropy" and engine.network.sizes[-1] > 1
        predicted = np.asarray(engine.predict_proba(X) if classifies else engine.predict(X), np.float64)
        # B. Welford, "Note on a method for calculating corrected sums of squares and products", 1962
        difference = predicted - mean
        mean = mean + difference / count
        squares = squares + difference * (predicted - mean)
        if classifies:
            classes = np.arange(predicted.shape[1])
            votes = votes + (predicted > 0.5 if labels else predicted.argmax(axis=1)[:, None] == classes)
    prediction = mean if not classifies else (mean > 0.5).astype(np.int64) if labels else mean.argmax(axis=1)
    return Ensemble(prediction, mean, np.sqrt(squares / count), votes if classifies else None)


Point = Mapping[str, Any]


@dataclass(frozen=True, eq=False)
class Combination:
    """Models that differ in their seed alone: ``members`` have ended, best first, of ``models`` in all."""

    parameters: Point
    members: tuple[Member, ...]
    models: int

    @property
    def sound(self) -> tuple[Member, ...]:
        """The members that did not diverge, or all if there are none."""
        return tuple(one for one in self.members if one.status != "diverged") or self.members

    @property
    def diverged(self) -> int:
        return sum(one.status == "diverged" for one in self.members)

    @property
    def seeds(self) -> int | str:
        """The number of members in the means; with that of all models while some have not ended."""
        count = len(self.members) - self.diverged
        return count if len(self.members) == self.models else f"{count} of {self.models}"

    @property
    def epochs(self) -> float:
        """The mean number of epochs of the members."""
        return sum(len(one.history.epochs) for one in self.members) / len(self.members)

    @property
    def status(self) -> str:
        """The status of the best member, or the number of members that diverged."""
        return f"{self.diverged} diverged" if 0 < self.diverged < len(self.members) else self.members[0].status

    def scores(self, name: str) -> list[float]:
        """Return the finite values of a score, of the members that did not diverge."""
        values = (one.scores.get(name, math.nan) for one in self.members if one.status != "diverged")
        return [value for value in values if math.isfinite(value)]

    def mean(self, name: str) -> float:
        """Return the mean of ``scores``, NaN if there are none."""
        values = self.scores(name)
        return math.fsum(values) / len(values) if values else math.nan

    def spread(self, name: str) -> float:
        """Return the standard deviation of ``scores``, of a sample; NaN for fewer than two."""
        values, mean = self.scores(name), self.mean(name)
        if len(values) < 2:
            return math.nan
        return math.hypot(*(value - mean for value in values)) / math.sqrt(len(values) - 1)


def averages(points: Sequence[Point]) -> bool:
    """Return whether models are judged by a mean: they differ in the seed and in something else."""
    return all("seed" in point for point in points) and any(len(point) > 1 for point in points)


def _order(metric: str, second: str, score: Callable[[str], float]) -> tuple[float, float]:
    """Return the key of an order by ``metric``, the best first, then by ``second``; infinity for what is not finite."""
    first, other = -score(metric) if rises(metric) else score(metric), score(second)
    return first if math.isfinite(first) else math.inf, other if math.isfinite(other) else math.inf


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
