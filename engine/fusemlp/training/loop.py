"""The epoch loop: launches of several epochs, callbacks, Ctrl-C, and the way back from a divergence.

``Engine.fit``, the models of a fleet and scikit-learn's estimators train in this loop. A ``Policy`` decides what
differs: the order of the rows, the account of an epoch's loss, the end of training, changes of the learning rate.
"""

import math
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, Generic, TypeVar

import numpy as np

from fusemlp.callbacks.forms import Listener, deferred_interrupt
from fusemlp.callbacks.progress import epoch_watchers
from fusemlp.describe.optimizers import ReduceOnPlateau, Schedule
from fusemlp.inputs.arrays import Array
from fusemlp.runtime.memory import Account, Memory
from fusemlp.runtime.steps import check_scaling
from fusemlp.training.trainer import FitState, History, Trainer
from fusemlp_kernels import contract
from fusemlp_kernels.errors import DivergenceError

# Most rows in one launch of the resident plan when nothing runs between epochs.
ROWS_AT_ONCE = 1 << 17


class Policy:
    """Decides what differs from one kind of training to another."""

    # whether the engine goes back to the last good epoch when a loss is not finite
    rewinds: ClassVar[bool] = False
    # of the learning rates, its lengths in updates
    schedule: Schedule

    def begin(self) -> None:
        """Get ready for the first step; callbacks hear of the training after that."""

    def wanted(self) -> int:
        """Return how many epochs to train whatever their losses are; 0 ends training."""
        raise NotImplementedError

    def late(self) -> bool:
        """Return whether the time is up; training ends after the launch."""
        return False

    def order(self, epoch: int) -> Array:
        """Return the rows (n,) of an epoch in their order; asked for each epoch of a launch before it starts."""
        raise NotImplementedError

    def launched(self, following: range) -> None:
        """Learn that all steps of a launch are started, and which epochs the next has; a GPU still computes."""

    def validate(self) -> bool:
        """Return whether the loss of the validation rows is finite; asked after an epoch whose own loss is."""
        return True

    def end_epoch(self, stats: Array, rate: float) -> dict[str, float]:
        """Account for an epoch with these statistics (STATS,), ``rate`` being the next update's; return its logs."""
        raise NotImplementedError

    def divergence(self, rate: float) -> DivergenceError:
        """Return the error for an epoch whose loss is not finite, ``rate`` being its last learning rate."""
        raise NotImplementedError

    def finish(self, *, interrupted: bool) -> None:
        """Clean up after the last step; callbacks hear of the end after that."""


PolicyT = TypeVar("PolicyT", bound=Policy)


def epochs_at_once(engine: Trainer, epochs: int, rows: int, *, asked: bool) -> int:
    """Return how many of ``epochs`` epochs of ``rows`` rows one launch takes; 1 if something is ``asked`` after one."""
    if asked or isinstance(engine.optimizer.schedule, ReduceOnPlateau):
        return 1
    return max(1, min(epochs, ROWS_AT_ONCE // rows))


@dataclass(eq=False)
class EpochLoop(Generic[PolicyT]):
    """Trains ``engine`` epoch by epoch, ``batches`` of ``batch_size`` rows each, as ``policy`` decides.

    ``bound``, a bound program or something with its ``chunk``, ``arrays`` and ``set_rows``, runs the steps; where
    another launch runs them, ``training`` says how many. ``state`` is the position; a launch takes ``at_once`` epochs.
    """

    engine: Trainer
    bound: Any
    policy: PolicyT
    state: FitState
    batch_size: int
    batches: int
    at_once: int
    callbacks: Sequence[Listener]

    def __post_init__(self) -> None:
        # callbacks between batches
        self._starters = [call for callback in self.callbacks if (call := callback.at("on_batch_begin"))]
        self._watchers = [call for callback in self.callbacks if (call := callback.at("on_batch_end"))]
        self._one_by_one = bool(self._starters or self._watchers)

    def run(self) -> History:
        """Train; the engine's ``history`` follows. Raises KeyboardInterrupt at the end after Ctrl-C."""
        self.begin()
        ranks = self.engine.ranks
        with deferred_interrupt(*ranks.signals) as interrupted:
            self.drive(interrupted)
        (came,) = ranks.any(interrupted())
        self.finish(interrupted=came)
        if came:
            raise KeyboardInterrupt
        return self.state.history

    def begin(self) -> None:
        """Get ready for the first step."""
        engine, state = self.engine, self.state
        engine.history = state.history
        engine.stop_training = False
        self.policy.begin()
        # perhaps a callback on one rank alone
        (self._one_by_one,) = engine.ranks.any(self._one_by_one)
        if state.batch == 0:
            engine.memory.stats[:] = 0.0
        self._call("on_train_begin")

    def launches(self, interrupted: Callable[[], bool]) -> Generator[Callable[[], object], None, None]:
        """Yield the launches from the first step to the last; the caller runs one before it asks for the next."""
        self.begin()
        for steps in self.training(interrupted):
            yield partial(self.bound.run_many, steps)
        self.finish(interrupted=interrupted())

    def drive(self, interrupted: Callable[[], bool]) -> None:
        """Run the steps that ``training`` asks for."""
        for steps in self.training(interrupted):
            try:
                self.bound.run_many(steps)
            except Exception:
                # a loss of the caller's may end a launch after some of its steps
                memory = self.engine.memory
                if steps > 1 and self.at_once == 1 and self.engine.loss.on_host:
                    self.state.batch = int(memory.counters[contract.ROW_OFFSET]) // self.batch_size
                raise

    def training(self, interrupted: Callable[[], bool]) -> Iterator[int]:
        """Yield numbers of steps, which the caller runs before it asks for more, until ``interrupted`` after a batch.

        Raises DivergenceError, with the engine back at the last good epoch.
        """
        engine, state, policy = self.engine, self.state, self.policy
        good: dict[str, Any] | None = None
        # ``again``: epochs to train once more after a divergence, all of them to their end
        at_once, again, begun = self.at_once, 0, False

        def ends() -> bool:
            # all ranks go on, or none
            reasons = engine.ranks.any(engine.stop_training, interrupted(), begun and policy.late())
            engine.stop_training = reasons[0]
            return not again and any(reasons)

        # asked before an epoch, not after: a checkpoint may have been taken at the end of the last one
        while (wanted := policy.wanted()) and not ends():
            first_epoch, first_batch = state.epoch, state.batch
            # a fit that is resumed ends its epoch first
            epochs = 1 if first_batch else min(at_once, wanted)
            memory = engine.memory
            good = memory.mark(good) if policy.rewinds else good
            began = time.perf_counter()
            if first_batch == 0:
                self._call("on_epoch_begin", first_epoch)
            # the set-up alone may take as long as a short time limit
            begun = True
            yield from self._walk(ends, epochs)
            left = state.batch % self.batches
            ended = state.epoch - first_epoch + (0 if left else 1)
            account = self._account(memory, ended, ran=first_batch < self.batches)
            seconds = (time.perf_counter() - began) / max(1, ended)
            state.epoch = first_epoch
            if good is not None and ended and not self._is_finite(account):
                rate = float(account.hyper[contract.LEARNING_RATE])
                engine.restore(good)
                state.batch = first_batch
                if ended == 1 and not left:
                    raise policy.divergence(rate)
                # one by one they show which epoch it was
                at_once, again = 1, ended
                continue
            again = max(0, again - 1)
            rates = self._rates(account, ended, left)
            if not left:
                memory.stats[:] = 0.0
            for stats, rate in zip(account.stats[:ended], rates, strict=True):
                self._end_epoch(stats, rate, seconds)
            for watcher in epoch_watchers:
                watcher(engine, ended)
            if left:
                state.batch = left
                break

    def _walk(self, ends: Callable[[], bool], epochs: int) -> Iterator[int]:
        """Ask for the steps of the batches that remain of ``epochs`` epochs."""
        engine, state, bound = self.engine, self.state, self.bound
        trained = self.batches * self.batch_size
        orders = [self.policy.order(state.epoch + ahead)[:trained] for ahead in range(epochs)]
        bound.set_rows(orders[0] if epochs == 1 else np.concatenate(orders), state.batch, self.batch_size, epochs)
        done, total = state.batch, epochs * self.batches
        first = state.epoch
        while done < total:
            count = 1 if self._one_by_one else min(total - done, bound.chunk)
            for starter in self._starters:
                starter(engine, state.batch)
            count = engine.rates.cover(self.policy.schedule, count)
            yield count
            done += count
            if epochs == 1:
                state.batch = done
            for watcher in self._watchers:
                watcher(engine, state.batch - 1)
            if done < total and ends():
                break
        # Not before: an error in a launch leaves the position at the last recorded epoch. After the last batch of an
        # epoch it is not the next epoch yet.
        state.epoch = first + (done - 1) // self.batches
        state.batch = done - (state.epoch - first) * self.batches
        self.policy.launched(range(first + epochs, first + 2 * epochs))

    def _account(self, memory: Memory, epochs: int, *, ran: bool) -> Account:
        """Return the account of the last epochs; ``ran``: this fit has run steps of them."""
        engine, rewinds = self.engine, self.policy.rewinds
        # where a launch of several epochs leaves the statistics of each
        by_epoch = self.bound.arrays.get("epoch_stats")
        # a checkpoint may have been written after the last batch, before the epoch was closed
        stats = None if by_epoch is None or not ran or not epochs else by_epoch[:epochs]
        account = memory.account(stats, check_finite=rewinds, beside=engine.ranks.marks(memory.params))
        engine.rates.note(int(account.counters[contract.UPDATE_COUNT]))
        engine.ranks.check_equal(account.beside)
        if by_epoch is not None:
            # as if each epoch had been given its rows
            offset, total = account.counters[contract.ROW_OFFSET], account.counters[contract.ROW_TOTAL]
            memory.counters[contract.ROW_OFFSET] = int(offset % total)
        return account

    def _is_finite(self, account: Account) -> bool:
        """Return whether the losses of these epochs, and parameters and validation after the last, are finite."""
        check_scaling(self.engine, account.counters, account.hyper)
        losses = account.stats[:, contract.LOSS_SUM].tolist()
        return account.finite and all(map(math.isfinite, losses)) and self.policy.validate()

    def _rates(self, account: Account, epochs: int, left: int) -> list[float]:
        """Return the learning rate at the end of each of the last ``epochs`` epochs, ``left`` batches before now."""
        if epochs == 1 and not left:
            return [float(account.hyper[contract.LEARNING_RATE])]
        every, schedule = self.engine.optimizer.accumulate, self.policy.schedule
        batches, updates = (int(account.counters[place]) for place in (contract.BATCH_INDEX, contract.UPDATE_COUNT))
        ends = [batches - left - ahead * self.batches for ahead in reversed(range(epochs))]
        scale = float(account.hyper[contract.RATE_SCALE])
        return [schedule.at(updates - batches // every + end // every) * scale for end in ends]

    def _end_epoch(self, stats: Array, rate: float, seconds: float) -> None:
        state = self.state
        logs = self.policy.end_epoch(stats, rate)
        epoch = state.epoch
        state.history.record(epoch, logs, seconds)
        state.epoch, state.batch = epoch + 1, 0
        for callback in self.callbacks:
            if call := callback.at("on_epoch_end"):
                call(self.engine, epoch, logs)
                state.history.amend(logs, author=callback.name)

    def finish(self, *, interrupted: bool) -> None:
        """Clean up after the last step."""
        self.policy.finish(interrupted=interrupted)
        self._call("on_train_end", self.state.history)

    def _call(self, stage: str, *arguments: Any) -> None:
        for callback in self.callbacks:
            if call := callback.at(stage):
                call(self.engine, *arguments)
