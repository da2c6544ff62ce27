"""A fleet: many models of one kind, trained on one data set for grids, folds, seeds and ensembles."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import closing
from copy import copy
from dataclasses import replace
from functools import partial
from operator import itemgetter
from typing import Any

from fusemlp.describe.checks import as_count, knows_names
from fusemlp.describe.conflicts import check_together
from fusemlp.describe.losses import LossLike, as_loss
from fusemlp.describe.metrics import MetricLike
from fusemlp.describe.network import MLP, as_network
from fusemlp.describe.optimizers import Optimizer, as_optimizer
from fusemlp.describe.privacy import DPSGD, as_privacy
from fusemlp.engine import Engine, knows_names_of_predict
from fusemlp.fleet.candidates import Candidate, Vary, as_rows, candidate, combinations, engine_bytes, room
from fusemlp.fleet.launches import LaunchGroup, grouped, run_side_by_side, train_groups
from fusemlp.fleet.results import Ensemble, FleetResults, Kept, Member, scores_of, together
from fusemlp.fleet.workers import check_sent, check_workers, trained_apart
from fusemlp.runtime.plans import cpu_threads
from fusemlp.runtime.scaling import InputScale
from fusemlp.training.fit import ELSEWHERE, FitData, fit_loop
from fusemlp.training.loop import EpochLoop
from fusemlp.training.trainer import FitPlan, History
from fusemlp.training.validation import FitPolicy, Validation, checked_validation, measured
from fusemlp_kernels.errors import ArgumentError, ArgumentTypeError, DivergenceError

_log = logging.getLogger("fusemlp")

# Arguments of Engine.fit that a fleet has in another place.
_ELSEWHERE = {
    **{name: told for name, told in ELSEWHERE.items() if name != "workers"},
    "validation_split": "give validation_data=(Xv, yv), or each model's validation_rows",
    "batch_size": "it belongs to the fleet: Fleet(net, batch_size=32), or vary={'batch_size': [32, 64]}",
    "class_weight": "it belongs to the loss: Fleet(net, loss=CrossEntropy(class_weight=[1.0, 5.0]))",
    "callbacks": "a fleet has one function for models that have ended: fit(callback=...)",
    "adversarial": "fleets do not train against attacks; use Engine.fit, a model at a time",
    "resume": "a fleet's fit cannot be resumed; a second fit trains on",
    "seed": "it belongs to the fleet: vary={'seed': range(20)}",
    **dict.fromkeys(("lr", "learning_rate"), "it belongs to the fleet: vary={'lr': [0.001, 0.01]}"),
}


class Fleet:
    """Models that differ in the parameters of ``vary``; the other arguments are those of ``Engine``.

    ``vary``: a mapping of names to values, for all combinations of them, or a list of mappings, one a model. The names:
    lr, momentum, betas, weight_decay, dropout, hidden (the widths between input and output: a number or a sequence),
    label_smoothing, seed, batch_size.

    On a CPU the models train side by side, one a core, each in a compiled loop; with ``plan="eager"`` they train one
    after another. A fleet of n models ends with the same bits as n engines trained alone. On
    the Triton backend models of one shape train in one launch, a multiprocessor each: a model that has ended leaves it.
    ``plan_reason`` of an engine says whether it is one of those; all others train one after another.

    ``memory``: the most bytes of all engines at once; by default half of the free memory, on a card all of it. A fleet
    that does not fit is built and trained in parts that do, and this is logged. Then the results keep parameters and
    histories only: ``results.engine(i)`` makes an engine of them, and another ``fit`` is refused.

    ``initial``: for each model parameters to start with, by the names of ``state_dict``; its seed draws the others.

    ``privacy``: a ``DPSGD``, with which each model trains privately, with its own sampling and noise; a seed for tests
    is that of the first, and the others have the next ones. ``results.privacy_spent()`` returns the epsilon of all
    models together, which is larger than that of each.

    ``normalise`` is that of ``Engine``, by the mean and deviation of all rows of the first ``fit`` for all models.

    Raises ArgumentError or ArgumentTypeError for an unknown name, an empty grid or an impossible value.
    """

    @knows_names({"devices": "it is gone: start a process a card, CUDA_VISIBLE_DEVICES=1, with its part of vary"})
    def __init__(
        self,
        net: MLP,
        loss: LossLike = "cross_entropy",
        optimizer: str | Optimizer = "adam",
        batch_size: int = 32,
        seed: int = 0,
        *,
        vary: Vary,
        backend: str = "auto",
        device: str | None = None,
        precision: str = "fp32",
        plan: str = "auto",
        normalise: Any = None,
        privacy: DPSGD | None = None,
        memory: int | None = None,
        initial: Sequence[Mapping[str, Any]] = (),
    ) -> None:
        check_together({**as_network("net", net).uses, **as_loss(loss).uses, "fleet": True})
        base = Candidate({}, net, as_loss(loss), as_optimizer(optimizer), batch_size, seed)
        checked = as_privacy(privacy)
        self.candidates = tuple(
            replace(candidate(base, parameters, f"vary, model {index}"), privacy=checked and checked.of_model(index))
            for index, parameters in enumerate(combinations(vary))
        )
        expected = f"initial: expected parameters for each of the {len(self)} models, got"
        if isinstance(initial, Mapping | Engine):
            mend = f"for one start of all give [engine.state_dict()] * {len(self)}"
            raise ArgumentTypeError(f"{expected} one {type(initial).__name__}; {mend}")
        self._initial = initial or [{}] * len(self)
        if len(self._initial) != len(self):
            raise ArgumentError(f"{expected} {len(initial)}")
        self._memory = None if memory is None else as_count("memory", memory, minimum=1)
        # the arguments of engines that are no part of a model
        self._machine: dict[str, Any] = {"backend": backend, "device": device, "precision": precision, "plan": plan}
        self._machine["normalise"] = normalise
        self._input_scale: InputScale | None = None
        self._begin()

    def _begin(self) -> None:
        """Build the first engine, which checks the machine and resolves "auto" for all."""
        self._resolved = self._machine
        first = self._engine(0)
        self._built, self._in_parts = [first], False
        # rows to measure were measured by the first
        self._machine, self._input_scale = {**self._machine, "normalise": first.normalise}, first.scaling.scale
        self._resolved = {**self._machine, "backend": first.backend, "device": first.device}
        self.results: FleetResults | None = None
        self._groups: list[tuple[LaunchGroup, list[int]]] | None = None

    def __len__(self) -> int:
        return len(self.candidates)

    def part(self, numbers: Sequence[int]) -> Fleet:
        """Return an untrained fleet of the models of these numbers."""
        fleet = copy(self)
        fleet.candidates = tuple(self.candidates[number] for number in numbers)
        fleet._initial = [self._initial[number] for number in numbers]
        fleet._begin()
        return fleet

    @property
    def first(self) -> Engine:
        """An engine of the first model, without building the others; a new one if the fleet trained in parts."""
        return self._built[0] if self._built else self._engine(0)

    def _engine(self, index: int) -> Engine:
        """Return a new engine of a model, with its initial parameters and the scale of the inputs."""
        engine = self.candidates[index].engine(self._resolved)
        if self._initial[index]:
            engine.load_state_dict({**engine.state_dict(), **self._initial[index]})
        if self._input_scale is not None:
            engine.scaling.scale = self._input_scale
        return engine

    @property
    def engines(self) -> tuple[Engine, ...]:
        """The engine of each model. Raises ArgumentError if they were trained in parts: see ``results.engine``."""
        if self._in_parts:
            raise ArgumentError("engines: the models were trained in parts; results.engine(i) makes the engine of one")
        self._built += [self._engine(index) for index in range(len(self._built), len(self))]
        self._grouped(dict(enumerate(self._built)))
        return tuple(self._built)

    def _grouped(self, engines: Mapping[int, Engine]) -> list[tuple[LaunchGroup, list[int]]]:
        """Return the groups of ``engines`` that train in one launch; found once unless the fleet trains in parts."""
        if self._in_parts:
            # they would keep the engines of this part while those of the next are built
            self._groups = None
            return grouped(engines, self._machine["plan"])
        if self._groups is None or not all(group.whole for group, _ in self._groups):
            self._groups = grouped(engines, self._machine["plan"])
        return self._groups

    @knows_names(_ELSEWHERE, call="fit(X, y, epochs=20)")
    def fit(
        self,
        X: Any,
        y: Any,
        *,
        epochs: int,
        sample_weight: Any = None,
        validation_data: tuple[Any, ...] | None = None,
        metrics: Iterable[MetricLike] = (),
        early_stopping: int | str | None = None,
        monitor: str | None = None,
        rows: Sequence[Any] | None = None,
        validation_rows: Sequence[Any] | None = None,
        drop_last: bool = False,
        jobs: int | None = None,
        callback: Callable[[Member], object] | None = None,
        time_limit: float | None = None,
        workers: str | None = None,
    ) -> FleetResults:
        """Train every model on X (n, K) and y; the arguments are those of ``Engine.fit``.

        ``rows``: each model's training rows of X, such as folds or bootstraps, in place of all. ``validation_rows``:
        each model's validation rows of X, in place of ``validation_data``. Both are in the order of ``candidates``, in
        which the last name of a mapping ``vary`` varies fastest. Each model has its own early stopping. A model whose
        loss is no longer finite is marked, at its last good epoch, and the others go on. ``jobs``: the most models at
        once if each trains by itself; by default one a core, or ``FUSEMLP_NUM_THREADS``.

        ``callback`` is called with the ``Member`` of each model when it has ended, in the thread that called ``fit``;
        the others train on meanwhile. An error in it ends training like Ctrl-C: all models stop after their batches,
        and ``fit`` raises it. ``results`` is None then, and ``engines`` have the parameters reached.

        ``time_limit``: seconds from this call on, which the models share; each ends as by its early stopping.

        ``workers``: train in other processes or on other machines, by a backend of joblib: "loky" (processes here),
        "dask" (a ``dask.distributed.Client`` is connected), "ray" (``ray.init``), or one that is registered. ``jobs``
        are tasks at once then, each of some models, and a dead worker's tasks run again. The results are those of
        one process on the same hardware; as of a fleet in parts they keep parameters and histories.

        Raises ShapeError, DTypeError, DataError, ArgumentError before anything changes, WorkerError if workers die.
        """
        plan = FitPlan(
            epochs=epochs,
            metrics=metrics,
            early_stopping=early_stopping,
            monitor=monitor,
            drop_last=drop_last,
            time_limit=time_limit,
        )
        jobs = None if jobs is None else as_count("jobs", jobs, minimum=1)
        if workers is not None:
            check_workers(workers)
            check_sent(self.candidates[0].loss)
        if workers is not None and time_limit is not None:
            raise ArgumentError("time_limit: workers do not share one; leave out time_limit or workers")
        if callback is not None and not callable(callback):
            raise ArgumentTypeError(f"callback: expected a function of a Member, got {callback!r}")
        if self._in_parts:
            raise ArgumentError(
                "fit: the models were trained in parts, and their optimizers' state is gone; make a new Fleet, or one "
                "with more memory="
            )
        first = self._built[0]
        validated = validation_rows if validation_data is None else validation_data
        for schedule in {described.optimizer.schedule for described in self.candidates}:
            check_together({**first.uses, **plan.uses(schedule, validation_data=validated)})
        first.ledger.check_accounting()
        data = first.inputs.examples(X, y, sample_weight, codes=True)
        count = len(data.X)
        trained_rows = as_rows("rows", rows, len(self), count)
        validation = checked_validation(first, validation_data, common=True)
        validated_on = as_rows("validation_rows", validation_rows, len(self), count)
        if validation is not None and validated_on is not None:
            raise ArgumentError("validation_rows: they take the place of validation_data; give one of the two")
        if validated_on is None:
            validations = [measured(first, plan, data.targets, validation, "validation_rows")[0]] * len(self)
        else:
            # rows of a fold are indexed on the host; models that have one in common share its validation
            whole = data.map(first.inputs.on_host)
            folds: dict[bytes, Validation | None] = {}
            for part in validated_on:
                if part.tobytes() not in folds:
                    fold = Validation(whole.map(itemgetter(part)), common=True)
                    folds[part.tobytes()] = measured(first, plan, data.targets, fold, "")[0]
            validations = [folds[part.tobytes()] for part in validated_on]
        for index, described in enumerate(self.candidates):
            # the loss refuses here, before anything has changed
            described.loss.spec(accuracy=False, soft=data.targets.soft)
            own_count = count if trained_rows is None else len(trained_rows[index])
            if drop_last and own_count < described.batch_size:
                raise ArgumentError(
                    f"drop_last: {own_count} rows do not fill one batch of {described.batch_size}, and model {index} "
                    "would not be trained"
                )
        most = room(self._memory, self.candidates, first.precision, device=first.device)
        members: dict[int, Member] = {}

        def fit(index: int, *, together: bool = False) -> EpochLoop[FitPolicy]:
            rows_of_model, now = None if trained_rows is None else trained_rows[index], time.monotonic()
            # those that train at once have their part of the time that is left to all that have not ended
            share = (plan.deadline - now) * peers[index] / (len(self) - len(members))
            own_data = FitData(data, validations[index], rows_of_model, taken_in=taken_in)
            return fit_loop(engines[index], plan, own_data, together=together, deadline=now + share)

        def keep(member: Member) -> None:
            members[member.index] = member
            if callback is not None:
                callback(member)

        def ended(index: int, error: DivergenceError | None) -> None:
            keep(self._member(index, engines[index], error, restores=plan.early_stopping is not None))

        first.scaling.warn("X", data.X)
        # earlier results are no longer true, even if this training is cut off
        self.results = None
        if workers is not None:
            held = None if validation is None else validation.data
            tasks: dict[str, Any] = {"rows": trained_rows, "validation_rows": validated_on}
            with closing(trained_apart(self, plan, data, held, workers=workers, jobs=jobs, **tasks)) as trained:
                for member in trained:
                    keep(member)
            # the engines here are as they were
            self._in_parts, self._built = True, []
        else:
            # all models train on the same rows
            taken_in = first.scaling.take_in(data.X)
            if self._input_scale is None:
                self._input_scale = first.scaling.scale
                for engine in self._built:
                    engine.scaling.scale = self._input_scale
        while len(members) < len(self):
            engines = self._next_part(len(members), most)
            groups = self._grouped(engines)
            peers = {key: len(keys) for _, keys in groups for key in keys}
            if groups:
                train_groups(groups, partial(fit, together=True), data._replace(X=taken_in).arrays, ended)
            alone = [index for index in engines if index not in members]
            if alone:
                peers |= dict.fromkeys(alone, len(alone))
                # one model at a time on a GPU; and the eager plan's calls and losses in Python hold Python's lock
                compiled = first.plan == "resident" and not first.loss.on_host
                side_by_side = first.memory.backend.traits.on_host and compiled
                at_once = min((jobs or cpu_threads()) if side_by_side else 1, len(alone))
                turns = None if time_limit is None else len(alone)
                run_side_by_side(alone, lambda index, stop: fit(index).launches(stop), at_once, ended, turns)
            # gone before the next are built
            del groups
            engines = {}
        self.results = FleetResults(tuple(members[index] for index in range(len(self))))
        return self.results

    def _next_part(self, start: int, most: int | None) -> dict[int, Engine]:
        """Return the engines from ``start`` on that fit in ``most`` bytes, at least one; parts are not kept."""
        engines: list[Engine] = []
        taken = 0
        for index in range(start, len(self)):
            engine = self._built[index] if index < len(self._built) else self._engine(index)
            taken += engine_bytes(engine)
            if engines and most is not None and taken > most:
                break
            engines.append(engine)
        if len(engines) < len(self):
            if not self._in_parts:
                fits = "fleet: there is room for the engines of %d of %d models"
                _log.warning(f"{fits}; they are trained in parts, and parameters are kept", len(engines), len(self))
            self._in_parts, self._built = True, []
        else:
            self._built = engines
        return dict(enumerate(engines, start))

    def _member(self, index: int, engine: Engine, error: DivergenceError | None, *, restores: bool) -> Member:
        """Return the outcome of a model; ``restores``: it went back to its best weights."""
        # a small network's workspace is far larger than its parameters, and thousands may be kept
        engine.release()
        history = engine.history or History()
        reason = str(error) if error is not None else history.stopped
        status = "diverged" if error is not None else "stopped" if restores and history.stopped else "trained"
        scores = scores_of(history, restored=restores and error is None)
        described = self.candidates[index]
        held = Kept.of(engine, described, self._machine) if self._in_parts else engine
        return Member(index, described.parameters, held, history, status, reason, scores)

    @knows_names_of_predict(call="predict(X)")
    def predict(self, X: Any) -> Ensemble:
        """Return the joint prediction for X (n, K) of the models that did not diverge.

        Raises ArgumentError before ``fit`` or if the models have different outputs, DivergenceError if all diverged.
        """
        if self.results is None:
            raise ArgumentError("predict: the models are not trained, or not to the end; call fit first")
        left = [member for member in self.results.members if member.status != "diverged"]
        if not left:
            raise DivergenceError(f"loss: all {len(self)} models diverged")
        return together((member.engine for member in left), X)
