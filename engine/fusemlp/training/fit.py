"""``fit``: checks the rows of a fit, arrays or batches that come one by one, makes the epoch loop and runs it."""

import hashlib
import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from fusemlp.callbacks.forms import announce, exits
from fusemlp.describe.checks import caller_level
from fusemlp.describe.conflicts import check_together
from fusemlp.inputs.arrays import Array, as_class_weights, balanced, to_array
from fusemlp.inputs.blocks import Blocks
from fusemlp.inputs.columns import codes_of, coding_of
from fusemlp.inputs.examples import Examples, Targets, UserBatches
from fusemlp.program.builder import Inputs
from fusemlp.program.passes import passes_against
from fusemlp.runtime.plans import LOOPED
from fusemlp.runtime.plans import row_order as shuffled
from fusemlp.runtime.programs import BoundProgram
from fusemlp.runtime.ranks import Ranks
from fusemlp.runtime.steps import TrainingStep, bind_fit, bind_staged, run_staged
from fusemlp.training.intervals import add_worst_case, check_labels
from fusemlp.training.loop import EpochLoop, epochs_at_once
from fusemlp.training.trainer import FitPlan, History, Trainer, fresh_state, resumed_state
from fusemlp.training.validation import FitPolicy, Validation, checked_validation, measured
from fusemlp_kernels.errors import ArgumentError, DataError

_TO_ENGINE = "it belongs to the engine: Engine(net, loss=..., optimizer=Adam(lr=0.001), batch_size=32, seed=0)"
_TO_LOADER = "fit starts no workers; give a torch DataLoader, which has num_workers"
# Arguments of fit in Keras, scikit-learn and other libraries.
ELSEWHERE = {
    "x": "it is called X here: fit(X, y, epochs=20)",
    "initial_epoch": "it is not needed: epochs go on from engine.epochs_trained, and epochs= counts further ones; "
    "fit(resume=True) ends a fit that was cut off",
    "validation_freq": "validation follows every epoch; leave it out",
    "validation_batch_size": "validation chooses its batches by itself; leave it out",
    **dict.fromkeys(("workers", "use_multiprocessing", "max_queue_size"), _TO_LOADER),
    **dict.fromkeys(("optimizer", "seed", "precision", "backend", "device", "plan"), _TO_ENGINE),
    **dict.fromkeys(("lr", "learning_rate"), _TO_ENGINE),
    "random_state": "it is the engine's seed: Engine(net, seed=0)",
    "patience": "it is called early_stopping here: fit(early_stopping=5)",
    "eval_set": "it is called validation_data here: validation_data=(Xv, yv)",
    "weight": "it is called sample_weight here",
    **dict.fromkeys(("max_iter", "nb_epoch"), "it is called epochs here"),
}

# The argument of ``fit`` beside validation_data that gives validation rows.
SPLIT = "validation_split=0.2"
Order = Callable[[int], Array]


@dataclass(frozen=True, eq=False)
class FitData:
    """Checked rows for a fit.

    Of ``train`` it takes ``rows`` (m,) int64, by default all, in the ``order`` of the user, by default in that of the
    seed. ``taken_in``: X as the network takes it, if the caller has it. With ``batches`` ``train`` is the first of
    them, and ``weighted`` weighs each.
    """

    train: Examples
    validation: Validation | None = None
    rows: Array | None = None
    order: Order | None = None
    taken_in: Any | None = None
    batches: UserBatches | None = None
    weighted: Callable[[Examples], Examples] = lambda rows: rows

    @property
    def count(self) -> int:
        """The number of rows of an epoch, or of the first batch."""
        return len(self.train.X) if self.rows is None else len(self.rows)


def fit(engine: Trainer, plan: FitPlan, X: Any, y: Any, sample_weight: Any, validation_data: Any) -> History:
    """Train on arrays, or on batches, by a plan; see ``Engine.fit``."""
    with engine.taking(plan.loss):
        beside = {"sample_weight": sample_weight, "validation_data": validation_data}
        check_together({**engine.uses, **plan.uses(engine.optimizer.schedule, batches=y is None, **beside)})
        engine.ledger.check_accounting()
        if plan.resume and plan.batch_size not in (None, engine.batch_size):
            before = f"the fit that is resumed has batches of {engine.batch_size} rows"
            raise ArgumentError(f"batch_size: {before}, got {plan.batch_size}; leave it out")
        data = fit_data(engine, plan, X, y, sample_weight, validation_data)
        engine.take_batches_of(plan.batch_size or engine.batch_size)
        loop = fit_loop(engine, plan, data)
        if data.batches is None:
            engine.programs.let_go_with((X, y, sample_weight))
        _warn(engine, data, plan.epochs * loop.batches, hits=loop.policy.spec.accuracy)
    with exits(plan.callbacks, engine):
        return loop.run()


def fit_loop(
    engine: Trainer, plan: FitPlan, data: FitData, *, together: bool = False, deadline: float | None = None
) -> EpochLoop[FitPolicy]:
    """Return the loop of a fit on checked rows, up to ``deadline`` or the plan's; ``together``: the caller binds it."""
    coding, adversary, members = coding_of(data.train.X), plan.adversarial, engine.network.members
    engine.lay_out(coding)
    count, on_host = data.count, engine.inputs.backend.traits.on_host
    size = min(engine.batch_size, count)
    batches = data.batches.steps if data.batches else engine.ledger.batches(count, size, drop_last=plan.drop_last)
    state = resumed_state(engine, plan, batches, rows=count) if plan.resume else fresh_state(engine, plan, batches)
    first_epoch = state.first_epoch
    last_epoch = first_epoch + plan.epochs
    order, epochs = data.order, range(first_epoch, last_epoch)
    drawn = engine.ledger.draw(count, size, lambda: engine.update_count, epochs, state.begun(0, batches))
    if drawn is not None:
        order, size = drawn.order, drawn.size
    begun = settles = 0
    if adversary.ramps:
        begun = state.begun(engine.update_count, batches)
        # a fit resumed with more epochs keeps the ramp of its first call
        settles = first_epoch + adversary.settled(plan.epochs, (state.total_updates - begun) // batches)
    train = data.train._replace(X=engine.scaling.take_in(data.train.X) if data.taken_in is None else data.taken_in)
    policy = FitPolicy(
        engine,
        plan,
        train.X,
        state,
        engine.inputs.spec_for(train.targets),
        order_of(engine, count, data.rows, order),
        last_epoch=last_epoch,
        validation=data.validation,
        deadline=plan.deadline if deadline is None else deadline,
        settles=settles,
        draws_ahead=order is None and not on_host,
    )
    passes = passes_against(adversary)
    resident = engine.plan in LOOPED and (on_host or not passes) and not adversary.ramps
    # rows that are drawn, or given by a function of the user's, are asked for when their epoch comes
    asked = any((drawn, plan.row_order, data.batches, data.validation, plan.early_stopping, plan.callbacks))
    asked = asked or not resident or engine.loss.on_host or engine.ranks.together
    at_once = epochs_at_once(engine, plan.epochs, count * members, asked=asked)
    bound: Stream | BoundProgram | None = None
    if data.batches is not None:
        bound = Stream(engine, data, data.batches)
    elif not together:
        inputs = Inputs(len(train.X), indexed=True, weighted=train.weight is not None, coding=coding)
        training = TrainingStep(
            inputs, policy.spec, policy.rule, size, resident, passes, keep_gradients=adversary.ramps
        )
        bound = bind_fit(engine, training, train.arrays, batches=batches, epochs=at_once)
        if adversary.ramps:
            add_worst_case(engine, bound, adversary, first=begun, updates=state.total_updates - begun)
    return EpochLoop(engine, bound, policy, state, size * members, batches, at_once, plan.callbacks)


def _warn(engine: Trainer, data: FitData, batches: int, *, hits: bool) -> None:
    """Warn of data that train badly in this many ``batches``; ``hits``: the targets are classes."""
    X, targets, _ = data.train
    streamed, accumulate = data.batches is not None, engine.optimizer.accumulate
    if data.batches is not None and data.batches.share is not None:
        ranks, owner = data.batches.share
        X = X[owner(np.arange(len(X))) == ranks.rank]
    rows = len(X)
    warned = []
    if accumulate > batches:
        warned.append(
            f"accumulate: an update takes {accumulate} batches and this fit has only {batches}: it may end without "
            "one; train for more epochs or lower accumulate"
        )
    if engine.batch_size > rows and not streamed:
        warned.append(f"batch_size: {engine.batch_size} is more than the {rows} rows of X; batches of {rows} are used")
    if engine.loss.kind == "cross_entropy" and not targets.soft and rows > 1 and not streamed:
        least, greatest = engine.inputs.extent(targets.values)
        if least == greatest:
            warned.append(f"y: every label is {least:.0f}; a classifier needs examples of two classes")
    for message in warned:
        warnings.warn(message, stacklevel=caller_level())
    if rows:
        engine.scaling.warn("X", X)
        # one-hot rows are classes
        if not hits:
            engine.scaling.warn_of_targets(engine.loss.kind, targets.values)


def fit_data(engine: Trainer, plan: FitPlan, X: Any, y: Any, sample_weight: Any, validation_data: Any) -> FitData:
    """Return the checked arrays of a fit, or without y its first batch; nothing changes, but callbacks hear of logs.

    Raises ShapeError, DTypeError, DataError, ArgumentError or ArgumentTypeError, and DistributedError if ranks differ.
    """
    state = engine.fit_state
    first_epoch = state.epoch if plan.resume and state is not None else engine.epochs_trained
    batches = None
    if y is None:
        share = _share(engine, X, plan, first_epoch)
        batches = UserBatches("X", X, plan.steps_per_epoch, "steps_per_epoch", first_epoch, share)
        engine.scaling.check_measured()
        train = batches.next(engine.inputs, keep=True)
    else:
        # an attack moves inputs, which codes have not
        train = engine.inputs.examples(X, y, sample_weight, codes=not plan.adversarial.uses)
    engine.inputs.check_within(plan.adversarial, train.X)
    validation = checked_validation(engine, validation_data, steps=plan.validation_steps)
    if plan.validation_split:
        train, held = split(engine, train, plan.validation_split)
        validation = Validation(held)
    if plan.adversarial.ramps:
        check_labels(train.targets)
    weighted = by_class(engine, plan.class_weight, train, whole=batches is None)
    train = weighted(train) if batches is None else train
    validation, names = measured(engine, plan, train.targets, validation, SPLIT)
    announce(plan.callbacks, names, plan.epochs)
    count, size = len(train.X), plan.batch_size or engine.batch_size
    if plan.drop_last and count < size:
        raise ArgumentError(f"drop_last: {count} rows do not fill one batch of {size}; nothing would be trained")
    order = asked_order(engine, plan, count, first_epoch) if batches is None else lambda epoch: np.arange(0)
    data = FitData(train, validation, order=order, batches=batches, weighted=weighted)
    if engine.ranks.world > 1:
        _check_alike(engine, plan, data)
    return data


def order_of(engine: Trainer, count: int, rows: Array | None, order: Order | None) -> Order:
    """Return the function from the epoch to its rows: by ``order``, or ``count`` rows in the order of the seed.

    The latter are those of ``rows`` (count,) if given. Members of one data row follow one another.
    """

    def rows_of(epoch: int) -> Array:
        places = shuffled(engine.backend, engine.plan, count, engine.seed, epoch) if order is None else order(epoch)
        return np.repeat(places if rows is None or order is not None else rows[places], engine.network.members)

    return rows_of


def asked_order(engine: Trainer, plan: FitPlan, count: int, first_epoch: int) -> Order | None:
    """Return the function from the epoch to the order of ``count`` rows that a fit is asked for; None for the seed's.

    Raises ArgumentError for what is no permutation in the first epoch, and DistributedError if ranks have others.
    """
    if plan.row_order is None:
        identity = np.arange(count)
        return None if plan.shuffle else lambda epoch: identity
    of_user = plan.row_order

    def checked(epoch: int) -> Array:
        rows = to_array(f"row_order({epoch})", of_user(epoch))
        if rows.shape != (count,) or rows.dtype.kind not in "iu" or not np.array_equal(np.sort(rows), np.arange(count)):
            expected = f"a permutation of range({count}) for epoch {epoch}"
            raise ArgumentError(f"row_order: expected {expected}, got {np.array2string(rows, threshold=8)}")
        return rows

    # the first is checked before anything has changed, and asked for only once
    ahead = {first_epoch: checked(first_epoch)}

    def order(epoch: int) -> Array:
        rows = ahead.pop(epoch) if epoch in ahead else checked(epoch)
        engine.ranks.check_same({f"row_order({epoch})": rows})
        return rows

    return order


def split(engine: Trainer, data: Examples, share: float) -> tuple[Examples, Examples]:
    """Return the first rows, to train on, and the last ``share`` of them, to validate on, as Keras does.

    Raises ArgumentError for a part without rows, DataError for one of weights 0; warns of classes in the last alone.
    """
    rows = len(data.X)
    kept = math.floor(rows * (1.0 - share))
    if not 0 < kept < rows:
        parts_of = f"{kept} to train on and {rows - kept} to validate on"
        raise ArgumentError(f"validation_split: {share:g} of {rows} rows leaves {parts_of}; give another share")
    parts = data.map(lambda array: array[:kept]), data.map(lambda array: array[kept:])
    for name, part in zip(("first", "last"), parts, strict=True):
        if part.weight is not None and not engine.inputs.largest(part.weight):
            raise DataError(f"validation_split: the {name} {len(part.X)} rows weigh zero; shuffle the rows before fit")
        engine.inputs.check_known(f"validation_split: the {name} {len(part.X)} rows", part)
    trained, held = (_codes(engine, part.targets) for part in parts)
    if trained is not None and held is not None and (unseen := np.setdiff1d(held, trained)).size:
        warnings.warn(
            f"validation_split: it takes the last rows as they are, and only these have the classes "
            f"{', '.join(map(str, unseen[:5]))}{', ...' if unseen.size > 5 else ''}; shuffle the rows before fit",
            stacklevel=caller_level(),
        )
    return parts


def by_class(engine: Trainer, asked: Any, data: Examples, *, whole: bool) -> Callable[[Examples], Examples]:
    """Return a function that multiplies the weights of rows by ``asked``, those of classes; ArgumentError for others.

    "balanced" weighs the classes of ``data``, the ``whole`` of the training rows.
    """
    if asked is None:
        return lambda rows: rows
    codes = _codes(engine, data.targets)
    if codes is None:
        raise ArgumentError(
            f"class_weight: it needs one class for each row, and the loss {engine.loss.kind!r} has other targets here; "
            "give the weight of each row: sample_weight"
        )
    classes = max(2, engine.network.sizes[-1])
    if isinstance(asked, str) and asked == "balanced":
        valid = codes[(codes >= 0) & (codes < classes)]
        weights = np.asarray(balanced(valid, classes))
    else:
        weights = as_class_weights(asked, classes)

    def weighted(rows: Examples) -> Examples:
        codes = _codes(engine, rows.targets)
        if codes is None:
            raise DataError("class_weight: every batch needs one class for each row")
        valid = (codes >= 0) & (codes < classes)
        factors = np.where(valid, weights[np.where(valid, codes, 0)], 1.0)
        factors = factors if rows.weight is None else factors * engine.inputs.on_host(rows.weight)
        if whole and not factors.any():
            raise DataError("class_weight: it leaves no training row a weight above 0; give its class a weight")
        return rows._replace(weight=factors.astype(f"f{engine.memory.real_bytes}"))

    return weighted


def _codes(engine: Trainer, targets: Targets) -> Array | None:
    """Return the class of each row, an ignored index as it is; None if the targets are no classes."""
    values = engine.inputs.on_host(targets.values)
    if targets.soft:
        return np.asarray(values.argmax(axis=1))
    kind = engine.inputs.kind_of(targets)
    if kind == "one-hot rows":
        return np.asarray(values.argmax(axis=1))
    return np.asarray(values).reshape(-1).astype(np.int64) if kind == "classes" else None


def _share(engine: Trainer, X: Any, plan: FitPlan, first_epoch: int) -> tuple[Ranks, Callable[[Array], Array]] | None:
    """Return the ranks, and the function that says which of them has each of some rows of a batch; None without blocks.

    Raises DistributedError if their blocks differ, or where they begin.
    """
    ranks = engine.ranks
    if not isinstance(ranks, Ranks) or not isinstance(X, Blocks):
        return None
    ranks.check_same({**X.described(), "steps_per_epoch": plan.steps_per_epoch, "the first epoch": first_epoch})
    return ranks, partial(engine.sharding.owner, batch_size=X.batch_rows)


def _check_alike(engine: Trainer, plan: FitPlan, data: FitData) -> None:
    """Raise DistributedError if not all ranks have the same data, state and arguments."""
    state, validation = engine.fit_state, data.validation
    names = ("epochs", "early_stopping", "monitor", "resume", "drop_last", "shuffle")
    things: dict[str, Any] = {name: getattr(plan, name) for name in names}
    things |= {
        "batch_size": plan.batch_size or engine.batch_size,
        "metrics": [] if validation is None else [metric.name for metric in validation.metrics],
        "steps_per_epoch": None if data.batches is None else data.batches.steps,
        "the position in the fit": None if state is None else (state.epoch, state.batch),
        "the count of updates": engine.update_count,
        "the parameters": engine.inputs.on_host(engine.memory.params),
        "the optimizer's schedule": engine.optimizer.schedule,
    }
    for kind, rows in (("", data.train), ("validation ", None if validation is None else validation.data)):
        if rows is not None:
            arrays = {"y": rows.targets.values, "sample_weight": rows.weight}
            # blocks are read by parts
            arrays |= {"X": codes_of(rows.X)} if kind or data.batches is None or data.batches.share is None else {}
            things[f"{kind}coding"] = coding_of(rows.X)
            named = {f"{kind}{name}": array for name, array in arrays.items()}
            things |= {name: None if array is None else engine.inputs.on_host(array) for name, array in named.items()}
    engine.ranks.check_same(things)


class Stream:
    """The steps of a fit on batches that come one by one; the program has room for the largest so far, padded."""

    # Ctrl-C waits for one batch
    chunk = 1

    def __init__(self, engine: Trainer, data: FitData, batches: UserBatches) -> None:
        self._engine, self._batches, self._first, self._weighted = engine, batches, data.train, data.weighted
        # of the batches of an epoch so far: their number, and a digest of their targets where ranks compare them
        self._passed, self._digest = 0, hashlib.sha256()
        # ranks have read the rows of their shards of a whole batch, and the first may be short
        room = len(data.train.X) if batches.share is None else batches.source.batch_rows
        # not again for a larger batch: a running loop keeps the memory that it began with
        engine.make_room_for(room)
        self._make_room(room)

    def _make_room(self, rows: int) -> None:
        engine, first = self._engine, self._weighted(self._first)
        self._rows = rows
        spec = engine.inputs.spec_for(first.targets)
        weighted, coding = first.weight is not None, coding_of(first.X)
        self._bound = bind_staged(engine, rows, spec, weighted=weighted, coding=coding)
        self.arrays: dict[str, Any] = self._bound.arrays

    def set_rows(self, order: Array, first_batch: int, size: int, epochs: int = 1) -> None:
        """Leave out the batches of an epoch that a resumed fit has trained on."""
        self._batches.skip(first_batch)
        self._passed, self._digest = first_batch, hashlib.sha256()

    def run_many(self, count: int) -> None:
        """Train on the next ``count`` batches."""
        for _ in range(count):
            batch = self._batches.next(self._engine.inputs)
            self._batches.check_alike(self._first, batch)
            if len(batch.X) > self._rows:
                self._make_room(len(batch.X))
            batch = self._weighted(batch)
            x = self._engine.scaling.normalised(batch.X)
            run_staged(self._engine, self._bound, x, batch.targets.values, batch.weight)
            if self._engine.ranks.world > 1:
                self._compare(batch.targets.values)

    def _compare(self, targets: Any) -> None:
        """Raise DistributedError at the end of an epoch if ranks had batches with other targets."""
        self._passed += 1
        if isinstance(targets, np.ndarray):
            self._digest.update(np.ascontiguousarray(targets).data)
        if self._passed == self._batches.steps:
            self._engine.ranks.check_same({"a digest of the targets of an epoch": self._digest.hexdigest()})
