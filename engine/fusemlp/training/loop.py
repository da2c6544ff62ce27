"""The loop of a fit: epochs, validation, early stopping, callbacks, and the way back from a divergence."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from fusemlp.callbacks import deferred_interrupt, overrides
from fusemlp.describe.schedules import ReduceOnPlateau, plateau_step
from fusemlp.program.lowering import Inputs
from fusemlp.runtime.inference import metrics_of
from fusemlp.training.history import FitState, History
from fusemlp.training.validation import Validation
from fusemlp_kernels.contract import BATCH_INDEX, LOSS_SUM, ROW_OFFSET, ROW_TOTAL, LossSpec, UpdateRule
from fusemlp_kernels.errors import ArgumentError, DivergenceError, ShapeError

if TYPE_CHECKING:
    from fusemlp.inputs.targets import Targets
    from fusemlp.runtime.bound import BoundProgram
    from fusemlp.runtime.session import Session

Array = np.ndarray[Any, Any]
Snapshot = dict[str, Any]

# Where nobody has to do with the epochs but to write them down, so many rows go into one launch of the resident plan.
ROWS_AT_ONCE = 1 << 17
# Features beyond this in size are not standardised, and then the loss of most networks overflows.
LARGE_FEATURE = 100.0


class Walking(Protocol):
    """What ``Fit`` needs of a program whose steps somebody else runs."""

    walks_rows: bool
    chunk: int
    arrays: dict[str, Any]

    def set_rows(self, order: Array, first_batch: int, size: int, epochs: int = 1) -> None:
        """The rows of epochs one behind the other, from batch ``first_batch`` of the first on."""


def epochs_at_once(engine: Session, epochs: int, rows: int, *, asked: bool, room: int | None = None) -> int:
    """Through how many epochs of so many rows a launch goes before somebody is asked or told something; ``asked``:
    somebody is after each. ``room``: the most rows of all of them."""
    if asked or isinstance(engine.optimizer.schedule, ReduceOnPlateau):
        return 1
    return max(1, min(epochs, (ROWS_AT_ONCE if room is None else room) // rows))


class Fit:
    """One call of ``fit``: its data bound to the engine, and the loop. With ``bound``, which has room for the rows of
    ``at_once`` epochs, the steps that ``training`` asks for are run by whoever asks."""

    def __init__(
        self,
        engine: Session,
        X: Any,
        targets: Targets,
        weight: Any | None,
        *,
        epochs: int,
        validation: Validation | None,
        patience: int | None,
        callbacks: list[Any],
        order: Callable[[int], Array],
        drop_last: bool,
        resume: bool,
        rows: int | None = None,
        bound: Walking | None = None,
        at_once: int | None = None,
    ) -> None:
        self.engine = engine
        # of X, or of those that ``order`` picks
        self.rows = len(X) if rows is None else rows
        self.X = X
        self.held_out = None if validation is None else validation.of(engine)
        self.patience = patience
        self.callbacks = callbacks
        self.order = order
        self.batch_size = min(engine.batch_size, self.rows)
        whole, rest = divmod(self.rows, self.batch_size)
        self.batches = whole + (1 if rest and not drop_last else 0)
        self.spec: LossSpec = engine.loss.spec(accuracy=engine.counts_hits(targets), soft=targets.soft)
        self.state = self._resumed(epochs) if resume else self._fresh(epochs)
        first = self.state.history.epochs[0] if self.state.history.epochs else self.state.epoch
        self.last_epoch = first + epochs
        self.schedule = engine.optimizer.schedule.over(self.state.total_updates)
        self.rule: UpdateRule = engine.optimizer.rule()
        asked = validation is not None or bool(callbacks) or engine.plan != "resident"
        self.at_once = epochs_at_once(engine, epochs, self.rows, asked=asked) if at_once is None else at_once
        self.bound: Any = self._bind(X, targets, weight) if bound is None else bound
        # where the statistics of epochs go that end inside a launch
        self._history = self.bound.arrays.get("history")
        self.best: Snapshot | None = engine.best_parameters if resume else None

    def _fresh(self, epochs: int) -> FitState:
        engine = self.engine
        updates = epochs * self.batches // engine.optimizer.accumulate
        return FitState(
            epoch=engine.epochs_trained,
            batch=0,
            last_epoch=engine.epochs_trained + epochs,
            total_updates=engine.update_count + updates,
            history=History(),
        )

    def _resumed(self, epochs: int) -> FitState:
        state = self.engine.fit_state
        if state is None:
            raise ArgumentError(
                "resume: this engine has no fit to go on with; load a checkpoint that was written during one"
            )
        first = state.history.epochs[0] if state.history.epochs else state.epoch
        begun = state.epoch - first + (1 if state.batch else 0)
        if epochs < begun:
            raise ArgumentError(
                f"epochs: the fit that is resumed has begun {begun} epochs, which count, got {epochs}; give {begun} or "
                "more, or resume=False"
            )
        if state.batch > self.batches:
            raise ShapeError(
                f"X: the checkpoint stands at batch {state.batch} of its epoch, and {self.rows} rows make only "
                f"{self.batches}; resume with the data of the first call"
            )
        return state

    def _bind(self, X: Any, targets: Targets, weight: Any | None) -> BoundProgram:
        engine = self.engine
        to_device = engine.memory.backend.from_host
        inputs = Inputs(
            len(X),
            indexed=True,
            weighted=weight is not None,
            class_weighted=engine.loss.class_weight is not None,
        )
        given = {"x": to_device(X, "compute"), "target": to_device(targets.values)}
        resident = engine.plan == "resident"
        if resident or engine.memory.backend.traits.walks_rows:
            places = self.at_once * self.batches * self.batch_size
            given["rows"] = engine.memory.backend.allocate(places, "int64")
        if weight is not None:
            given["weight"] = to_device(weight)
        batches = self.batches if resident else None
        return engine.bind(
            inputs,
            self.spec,
            self.rule,
            self.batch_size,
            given,
            resident_batches=batches,
            epochs=self.at_once,
        )

    def run(self) -> History:
        """Train; the engine's ``history`` and ``fit_state`` follow."""
        self.begin()
        with deferred_interrupt() as interrupted:
            for steps in self.training(interrupted):
                self.bound.run_many(steps)
        self.finish(interrupted=interrupted())
        if interrupted():
            raise KeyboardInterrupt
        return self.state.history

    def begin(self) -> None:
        """What comes before the first step."""
        engine, state = self.engine, self.state
        state.last_epoch = self.last_epoch
        engine.fit_state = state
        engine.history = state.history
        engine.best_parameters = self.best
        engine.stop_training = False
        engine.rates.follow(self.schedule, state.plateau[2])
        if state.batch == 0:
            engine.memory.stats[:] = 0.0
        state.history.stopped = ""
        self._call("on_train_begin")

    def training(self, interrupted: Callable[[], bool]) -> Iterator[int]:
        """The epochs. Where the program walks over the rows by itself it yields numbers of steps, which whoever asks
        for the next has run. ``interrupted`` tells whether training shall end after the batch.

        Raises DivergenceError, with the engine back at the last good epoch.
        """
        engine, state = self.engine, self.state
        good: Snapshot | None = None
        # ``again``: epochs that are gone through once more, all of them to their end
        at_once, again = self.at_once, 0

        def ends() -> bool:
            return not again and (engine.stop_training or interrupted())

        # asked before an epoch, not after: a checkpoint may have been taken at the end of the last one
        while not self._out_of_patience() and state.epoch < state.last_epoch and not ends():
            good, first_batch, first_epoch = engine.snapshot(good), state.batch, state.epoch
            # a fit that is resumed ends its epoch first
            epochs = 1 if first_batch else min(at_once, state.last_epoch - first_epoch)
            began = time.perf_counter()
            if state.batch == 0:
                self._call("on_epoch_begin", state.epoch)
            if self.bound.walks_rows:
                yield from self._walk(ends, epochs)
            else:
                self._batches(ends)
            left = state.batch % self.batches
            accounts = self._accounts(state.epoch - first_epoch + (0 if left else 1), ran=first_batch < self.batches)
            state.epoch = first_epoch
            if len(accounts) and not self._all_finite(accounts):
                if len(accounts) == 1 and not left:
                    raise self._diverged(good, first_batch)
                # which epoch it was shows when they are gone through one by one
                engine.restore(good)
                state.batch, at_once, again = first_batch, 1, len(accounts)
                continue
            again = max(0, again - 1)
            seconds = (time.perf_counter() - began) / max(1, len(accounts))
            rates = self._rates(len(accounts), left)
            if not left:
                engine.memory.stats[:] = 0.0
            for stats, rate in zip(accounts, rates, strict=True):
                self._end_epoch(stats, rate, seconds)
            if left:
                state.batch = left
                break
        if interrupted():
            place = f"in epoch {state.epoch + 1}" if state.batch else f"after epoch {state.epoch}"
            state.history.stopped = f"interrupted {place}"
        elif engine.stop_training:
            state.history.stopped = "a callback stopped the training"

    def finish(self, *, interrupted: bool) -> None:
        """What comes after the last step."""
        engine = self.engine
        if self.patience is not None and self.best is not None and not interrupted:
            engine.write_tensors(self.best, "")
        engine.best_parameters = self.best
        self._call("on_train_end", self.state.history)

    def _watching(self, stage: str) -> list[Any]:
        return [callback for callback in self.callbacks if overrides(callback, stage)]

    def _batches(self, ends: Callable[[], bool]) -> None:
        """The batches that remain of the epoch, one after another."""
        engine, state, bound = self.engine, self.state, self.bound
        rows, size, n = bound.arrays["rows"], self.batch_size, self.rows
        order = self.order(state.epoch)
        copy, run, cover = engine.memory.backend.copy_into, bound.run, engine.rates.cover
        starters, watchers = self._watching("on_batch_begin"), self._watching("on_batch_end")
        bound.set_row_count(size)
        with np.errstate(all="ignore"):
            while state.batch < self.batches:
                if starters:
                    with np.errstate(all="warn"):
                        for starter in starters:
                            starter.on_batch_begin(engine, state.batch)
                start = state.batch * size
                if start + size <= n:
                    copy(rows, order[start : start + size])
                else:
                    count = n - start
                    copy(rows[:count], order[start:])
                    rows[count:] = -1
                    bound.set_row_count(count)
                cover(self.schedule, 1)
                run()
                state.batch += 1
                if watchers:
                    with np.errstate(all="warn"):
                        for watcher in watchers:
                            watcher.on_batch_end(engine, state.batch - 1)
                if ends():
                    break

    def _walk(self, ends: Callable[[], bool], epochs: int) -> Iterator[int]:
        """The batches that remain of ``epochs`` epochs, of a program that moves from batch to batch by itself."""
        engine, state, bound = self.engine, self.state, self.bound
        trained = self.batches * self.batch_size
        orders = [self.order(state.epoch + ahead)[:trained] for ahead in range(epochs)]
        starters, watchers = self._watching("on_batch_begin"), self._watching("on_batch_end")
        bound.set_rows(orders[0] if epochs == 1 else np.concatenate(orders), state.batch, self.batch_size, epochs)
        done, total = state.batch, epochs * self.batches
        first = state.epoch
        while done < total:
            count = 1 if starters or watchers else min(total - done, bound.chunk)
            for starter in starters:
                starter.on_batch_begin(engine, state.batch)
            count = engine.rates.cover(self.schedule, count)
            yield count
            done += count
            if epochs == 1:
                state.batch = done
            for watcher in watchers:
                watcher.on_batch_end(engine, state.batch - 1)
            if ends():
                break
        # not before: what is raised in a launch leaves the accounts of epochs that were closed. Behind the last batch
        # of an epoch it is not yet the next
        state.epoch = first + (done - 1) // self.batches
        state.batch = done - (state.epoch - first) * self.batches
        if self._history is not None:
            # as if each epoch had been given its rows
            counters = engine.memory.counters
            counters[ROW_OFFSET] = int(counters[ROW_OFFSET]) % int(counters[ROW_TOTAL])

    def _accounts(self, epochs: int, *, ran: bool) -> Array:
        """The statistics of the epochs that have just ended, one a row; ``ran``: after steps of this fit."""
        memory = self.engine.memory
        # a checkpoint may have been written behind the last batch, before the epoch was closed
        if self._history is None or not ran:
            return memory.backend.to_host(memory.stats)[None][:epochs]
        return memory.backend.to_host(self._history[:epochs])

    def _rates(self, epochs: int, left: int) -> list[float]:
        """The learning rate at the end of each of the epochs that have just ended, ``left`` batches before now."""
        engine = self.engine
        if epochs == 1 and not left:
            return [engine.learning_rate]
        every, updates = self.rule.accumulate, engine.update_count
        batches = int(engine.memory.counters[BATCH_INDEX])
        ends = [batches - left - ahead * self.batches for ahead in reversed(range(epochs))]
        return [engine.rates.after(updates - batches // every + end // every) for end in ends]

    def _end_epoch(self, stats: Array, rate: float, seconds: float) -> None:
        engine, state = self.engine, self.state
        metrics = metrics_of(stats, self.spec)
        logs = dict(metrics)
        if self.held_out is not None:
            logs |= {f"val_{name}": value for name, value in self.held_out().items()}
        logs["learning_rate"] = rate
        state.history.record(state.epoch, logs, seconds)
        watched = logs.get("val_loss", logs["loss"])
        if watched < state.best_loss:
            state.best_loss, state.waited = watched, 0
            if self.held_out is not None:
                state.history.best_epoch = state.epoch
                if self.patience is not None:
                    self.best = engine.state_dict()
        else:
            state.waited += 1
        if isinstance(self.schedule, ReduceOnPlateau):
            state.plateau = plateau_step(self.schedule, state.plateau, watched)
            engine.rates.rescale(state.plateau[2])
        epoch = state.epoch
        state.epoch, state.batch = epoch + 1, 0
        engine.epochs_trained = state.epoch
        engine.best_parameters = self.best
        self._call("on_epoch_end", epoch, logs)

    def _out_of_patience(self) -> bool:
        state = self.state
        if self.patience is None or state.waited < self.patience:
            return False
        state.history.stopped = (
            f"val_loss has not improved for {state.waited} epochs; the weights of epoch "
            f"{(state.history.best_epoch or 0) + 1} were restored"
        )
        return True

    def _all_finite(self, accounts: Array) -> bool:
        """Whether the losses of the epochs and what their last update left are numbers."""
        memory = self.engine.memory
        self.engine.check_scaling()
        return all(map(math.isfinite, (*accounts[:, LOSS_SUM].tolist(), *memory.backend.extent(memory.params))))

    def _diverged(self, good: Snapshot, first_batch: int) -> DivergenceError:
        """Go back to the last good state, and say what most likely went wrong."""
        engine, epoch = self.engine, self.state.epoch
        rate = engine.learning_rate
        engine.restore(good)
        self.state.batch = first_batch
        largest = engine.largest(self.X)
        if largest > LARGE_FEATURE:
            cause = f"features as large as {largest:.3g} were not scaled: standardise them (mean 0, variance 1)"
        else:
            lower = min(rate / 10, 0.1)
            cause = f"a learning rate of {rate:.3g} is too high for this network: try {lower:.3g}, or clip_norm=1.0"
        self.state.history.stopped = f"the loss became NaN or infinite in epoch {epoch + 1}"
        return DivergenceError(
            f"loss: it became NaN or infinite in epoch {epoch + 1}. Likely cause: {cause}. "
            "The engine is back at the state before that epoch"
        )

    def _call(self, stage: str, *arguments: Any) -> None:
        for callback in self.callbacks:
            method = getattr(callback, stage, None)
            if method is not None:
                method(self.engine, *arguments)
