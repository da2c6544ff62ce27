"""Prepare a data set for the training of a recipe: split the rows, decide what is open, scale, encode."""

from __future__ import annotations

import hashlib
import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any

import numpy as np

from fusemlp.datasets import rows as row_sets
from fusemlp.datasets.cells import MOST_WORDS, SCALES, Indices
from fusemlp.datasets.dataset import Dataset
from fusemlp.datasets.load import MANY_CLASSES
from fusemlp.datasets.preprocessing import Preprocessor
from fusemlp.datasets.rows import Fold, Hashes, Rows, row_hashes
from fusemlp.describe.adversarial import IBP, Attack
from fusemlp.describe.checks import as_count, as_number, check_choice, counted
from fusemlp.describe.conflicts import check_together, in_use
from fusemlp.describe.losses import Loss
from fusemlp.describe.network import MLP
from fusemlp.describe.optimizers import Optimizer, Schedule
from fusemlp.engine import Engine
from fusemlp.fleet.fleet import Fleet
from fusemlp.fleet.results import Point, check_mergeable
from fusemlp.inputs.arrays import Array
from fusemlp.inputs.columns import codes_of, coding_of
from fusemlp.report.runs import read_training_rows
from fusemlp.tables import defaults, descriptions, transfer
from fusemlp.tables.recipe import BATCH, TableRecipe
from fusemlp.training.transfer import by_layers
from fusemlp_kernels.errors import ArgumentError, DataError


@dataclass(frozen=True, eq=False)
class Prepared:
    """The parts of a data set that train, validate and test, with network, loss and preprocessor.

    ``training`` are the indices of the training rows in the data set.
    ``models`` are trained; with ``folds`` each has its own training and validation rows of ``train``.
    """

    recipe: TableRecipe
    dataset: Dataset
    preprocessor: Preprocessor
    network: MLP
    loss: Loss
    train: Rows
    validation: Rows | None
    # None where no rows are held out for the test
    test: Rows | None
    training: Indices
    # the test rows' indices in the data set, unless they are a set of their own
    tested: Indices | None = None
    models: int = 1
    folds: tuple[Fold, ...] = ()
    tried: tuple[str, ...] = ()
    # of a new training with --from
    start: transfer.Start | None = None
    # when the data had been read, as ``time.monotonic`` tells it
    began: float = 0.0
    # notes that were warnings too
    warned: tuple[str, ...] = ()
    # values that several targets lack, as text, if rows to train or to validate on lack any
    gaps: str = ""

    @property
    def test_rows(self) -> tuple[Array, Array, Array]:
        """Features and labels as in the data, and which of the rows are for the test; DataError if none are."""
        if self.test is None:
            raise DataError("data: no rows were held out for the test (--test-fraction 0); give rows: --data FILE")
        X, y = self.dataset.test or (self.dataset.X, self.dataset.y)
        return X, y, np.arange(len(X)) if self.tested is None else self.tested

    @cached_property
    def summary(self) -> dict[str, Any]:
        """The description of the data for ``config.json``."""
        parts = {"training": self.train, "validation": self.validation, "test": self.test}
        counts = {f"{name}_rows": len(rows or ()) for name, rows in parts.items()}
        share = self.recipe.test_fraction
        held = "held-out fifth" if share == 0.2 else f"held-out share of {share:g}" if share else "none held out"
        return {
            "name": self.dataset.name,
            "fingerprint": fingerprint(self.dataset),
            "task": self.dataset.task,
            "rows": sum(counts.values()),
            **counts,
            "test": held if self.dataset.test is None else self.dataset.test_source,
            "notes": list(self.notes),
        }

    @property
    def training_rows(self) -> str:
        """The rows to train and to validate on, as text."""
        if self.folds:
            folds = counted(len(self.folds), "fold")
            return f"{counted(len(self.train), 'training row')}, in {folds} to validate on"
        return f"{len(self.train)} training, {len(self.validation or ())} validation"

    @property
    def validates(self) -> bool:
        """True if rows are held out to validate on."""
        return self.validation is not None or bool(self.folds)

    def hashes(self, *, every: bool = False) -> Hashes:
        """Return the hashes of the training rows, sorted, each once, for ``evaluate``.

        ``every``: of all rows that ``--final-fit`` trains on, which leaves out only a test set of its own.
        """
        if not every:
            return np.unique(labelled_hashes(self.preprocessor, self.dataset.X, self.train.labels, self.training))
        parts = filter(None, [(self.dataset.X, self.dataset.y), self.dataset.validation])
        return np.unique(np.concatenate([labelled_hashes(self.preprocessor, *part) for part in parts]))

    @property
    def notes(self) -> tuple[str, ...]:
        """Lines on the reading of a table: its form, columns left out, missing cells, rare words."""
        like = self.preprocessor
        # a preprocessor of an earlier release has no rare words
        columns = zip(like.feature_names, like.categories, like.shared, strict=bool(like.shared))
        rare = [f"{len(shared)} of {len(words or ())} in {name!r}" for name, words, shared in columns if shared]
        line = f"words rare in the training rows, taken as one other category: {', '.join(rare)}"
        gaps = f"missing targets, which weigh nothing: {self.dataset.gaps}"
        lines = [*([line] if rare else []), *([gaps] if self.dataset.gaps else [])]
        return (*self.dataset.notes, *lines, *self.tried, *self.warned)

    def seen(self, most: int) -> tuple[Array, Array]:
        """Return inputs and labels of all rows but the test rows, or of evenly spaced ones with ``most`` numbers."""
        parts = [part for part in (self.train, self.validation) if part is not None]
        step = max(1, -(-sum(part.X.size for part in parts) // most))
        X, labels = ([getattr(part, name)[::step] for part in parts] for name in ("X", "labels"))
        codes, coding = np.concatenate([codes_of(part) for part in X]), coding_of(X[0])
        return codes if coding is None else coding.dense(codes), np.concatenate(labels)

    def engine(self, schedule: Schedule | None = None, **more: Any) -> Engine:
        """Return a new engine, of several models the first; without ``schedule`` at the rate of the recipe."""
        options = descriptions.engine_options(self.recipe) | more
        engine = Engine(self.network, loss=self.loss, optimizer=self._optimizer(schedule), **options)
        if self.start is not None:
            engine.load_state_dict({**engine.state_dict(), **self.start.parameters[0]})
        return engine

    def fleet(self, points: Sequence[Point] = (), *, rows: int, epochs: int, **more: Any) -> Fleet:
        """Return untrained models of the recipe: one for each of ``points``, the parameters that vary, or by default of
        the seeds from the recipe's on; ``more`` are arguments of ``Fleet``.

        The schedule of the learning rate spans ``epochs`` epochs of ``rows`` rows.
        """
        recipe = self.recipe
        points = points or [{"seed": recipe.seed + index} for index in range(self.models)]
        changes = [{name: point[name] for name in ("lr", "batch_size") if name in point} for point in points]
        rates = [descriptions.schedule(replace(recipe, **change), rows=rows, epochs=epochs) for change in changes]
        vary = [{**point, "lr": rate} for point, rate in zip(points, rates, strict=True)]
        options = descriptions.engine_options(recipe) | more
        return Fleet(self.network, self.loss, self._optimizer(rates[0]), vary=vary, **options)

    def _optimizer(self, schedule: Schedule | None) -> Optimizer:
        """Return the optimizer of the recipe, with the frozen and slower layers of a transfer."""
        optimizer = descriptions.optimizer(self.recipe, schedule)
        return by_layers(optimizer, self.network, freeze=self.recipe.freeze, layer_decay=self.recipe.layer_decay)

    def attack(self, X: Array) -> Attack | IBP | None:
        """Return what trains on rows X, as the network takes them, and what the test rows are scored under."""
        cells = self.dataset.X
        if self.test is not None:
            test_cells, _, rows = self.test_rows
            cells = test_cells[rows]
        return descriptions.attack(self.recipe, self.preprocessor, X, cells)


def fingerprint(dataset: Dataset) -> str:
    """Return the SHA-256 of a data set's arrays: equal content has equal hashes, from any file."""
    digest = hashlib.sha256()
    for array in (dataset.X, dataset.y, *(dataset.validation or ()), *(dataset.test or ())):
        plain = array.astype(str) if array.dtype.kind == "O" else array
        digest.update(f"{plain.dtype.str}{plain.shape}".encode())
        digest.update(np.ascontiguousarray(plain).view(np.uint8).data)
    return digest.hexdigest()


def labelled_hashes(preprocessor: Preprocessor, X: Array, labels: Array, rows: Indices | None = None) -> Hashes:
    """Return the hash of each label and its row in X, as they are in the data; ``rows`` are the indices in X."""
    return row_hashes(X, labels if preprocessor.classes is None else preprocessor.class_codes(labels), rows)


def _split(
    name: str, recipe: TableRecipe, dataset: Dataset, rows: Indices, *, fraction: float, seed: int
) -> tuple[Indices, Indices]:
    """Call ``hold_out``; its error names the purpose of the rows, and classes that are a guess."""
    try:
        return row_sets.hold_out(dataset, rows, fraction=fraction, seed=seed)
    except DataError as error:
        _check_classes(dataset, recipe.test_fraction)
        guess = f"; {dataset.guess}" if dataset.guess else ""
        raise DataError(f"{name}: {str(error).removeprefix('fraction: ')}{guess}") from None


def _check_classes(dataset: Dataset, test_fraction: float) -> None:
    """Raise ArgumentError for a target that was called classes, with too few rows of each to split and to learn."""
    if dataset.task != "classification" or dataset.guess:
        return
    count = len(dataset.y)
    rows = np.unique(dataset.y, return_counts=True)[1]
    single = int((rows == 1).sum())
    numbers = dataset.y.dtype.kind in "iuf"
    drawn = test_fraction > 0 and dataset.test is None and dataset.groups is None and dataset.times is None
    # The test rows would be fewer than the classes that have rows to share.
    cannot_split = drawn and int(np.ceil(test_fraction * (count - single))) < max(1, len(rows) - single)
    if len(rows) <= MANY_CLASSES or not (cannot_split or (numbers and 2 * single > count)):
        return
    name, values, instead = "target", "labels", "choose another --target, or join rare ones"
    if numbers:
        name, values, instead = "task", "numbers", "--task regression takes them as numbers"
    raise ArgumentError(
        f"{name}: {dataset.target_name!r} holds {len(rows)} different {values} in {count} rows ({single} of them in "
        f"one row only), too many for classes; {instead}"
    )


def check_rows(recipe: TableRecipe) -> int:
    """Check the fields that need no rows, before these are read; return the seed of the split."""
    seed = as_count("seed", recipe.seed, minimum=0)
    seed = seed if recipe.split_seed is None else as_count("split_seed", recipe.split_seed, minimum=0)
    for name in ("validation_fraction", "test_fraction"):
        as_number(name, getattr(recipe, name), low=0.0, high=1.0, high_open=True)
    if recipe.scale is not None:
        check_choice("scale", recipe.scale, SCALES)
    if recipe.time_limit is not None:
        as_number("time_limit", recipe.time_limit, low=0.0, low_open=True)
    descriptions.hidden_widths(recipe.hidden)
    if descriptions.trains_plainly(recipe):
        return seed
    private = descriptions.is_private(recipe)
    check_together(in_use(dp_epsilon=recipe.dp_epsilon, adversarial=recipe.adversarial))
    for name, given in (("models", (recipe.models or 1) > 1), ("final_fit", recipe.final_fit)):
        if given:
            kind = "private" if private else "adversarial"
            raise ArgumentError(f"{name}: {kind} training makes one model of the training rows; leave it out")
    return seed


def prepare(
    recipe: TableRecipe,
    dataset: Dataset,
    *,
    like: Preprocessor | None = None,
    network: MLP | None = None,
    source: transfer.Source | None = None,
    needs_rows: bool = True,
) -> Prepared:
    """Prepare a training on a data set; equal recipes give equal results.

    ``like`` and ``network`` are those of a run, which are used in place of new ones; ``source`` is the run that a
    transfer starts from. Fewer rows than validation needs are an error if it ``needs_rows``; else all are trained on,
    with a note. Raises the errors of all fields of data, network and loss.
    """
    began, seed = time.monotonic(), check_rows(recipe)
    dataset = dataset if source is None else source.noted(dataset)
    if dataset.y.dtype.kind in "iuf":
        _check_classes(dataset, recipe.test_fraction)
    classify = dataset.task == "classification"
    if recipe.log_target is not None and dataset.task != "regression":
        raise ArgumentError("log_target: only numbers have logarithms, and the target holds classes; leave it out")
    # The held-out rows depend only on the whole data set and this seed.
    training = np.arange(len(dataset.y), dtype=np.int64)
    tested = validated = training[:0]
    if dataset.test is None and recipe.test_fraction:
        training, tested = _split("test rows", recipe, dataset, training, fraction=recipe.test_fraction, seed=seed)
    if classify and len(dataset.classes) < 2:
        raise DataError(
            f"target: {dataset.target_name!r} is {dataset.y.tolist()[0]!r} in all rows, which is one class, and "
            "classes are two or more; choose another target"
        )
    # small trainings decide for the plain recipe
    plain, members, notes = recipe, 1, list[str]()
    validates = dataset.validation is not None or recipe.validation_fraction > 0
    rows_of_table = len(training) if dataset.roles else 0
    if like is None:
        recipe, members, notes = defaults.with_preset(recipe, rows_of_table, classify=classify, validates=validates)
        plain, recipe = (defaults.with_class_decay(part, dataset) for part in (plain, recipe))
    plain, recipe = (defaults.with_batch(part, rows_of_table) for part in (plain, recipe))
    recipe = defaults.with_patience(recipe, rows_of_table, validates=validates)
    for name, values in zip(dataset.targets, dataset.y.reshape(len(dataset.y), -1).T, strict=True):
        known = values[values == values]  # without gaps
        if len(known) and (known == known[0]).all():
            notes.append(f"the target {name!r} is {known[0]} in all rows: choose another one")
    reads = defaults.reads_codes(recipe)
    most_words = None if reads else MOST_WORDS
    fitted = np.arange(len(dataset.y)) if recipe.final_fit else training
    gaps = dataset.gaps if dataset.has_gaps(fitted) else ""
    models = defaults.models_of(recipe, dataset, gaps, notes, new=like is None)
    if source is not None and models > 1 and recipe.models is None:
        models = transfer.parts_of(source.engine) or models
    parts: tuple[Fold, ...] = ()
    shared = dataset.validation is not None or recipe.group is not None or recipe.time is not None
    if models > 1 and recipe.validation_fraction > 0 and not shared:
        parts = row_sets.folds(dataset.y[training], models, seed=seed, stratify=classify)
    elif dataset.validation is None and recipe.validation_fraction > 0:
        share = recipe.validation_fraction
        try:
            training, validated = _split("--validation-fraction", recipe, dataset, training, fraction=share, seed=seed)
        except DataError as error:
            if needs_rows:
                raise
            reason = str(error).removeprefix("--validation-fraction: ")
            notes.append(f"no rows held out for early stopping: {reason}")

    name = descriptions.loss_name(recipe, dataset.task, len(dataset.classes) if classify else 0)
    learns, start, fleet, several = descriptions.loss(recipe, name, None), None, models > 1, len(dataset.targets)
    about = {"several targets": several > 1 and several, "gaps": dataset.gaps or None, "members": members > 1}
    about |= {
        "trained gaps": gaps or None,
        "privacy": descriptions.is_private(recipe),
        "adversarial": recipe.adversarial,
    }
    check_together({**learns.uses, **in_use(fleet=fleet, **about)})
    if source is not None:
        preprocessor, net, start = source.start(dataset, training, replace(recipe, models=models), name)
        notes += start.lines(net)
    else:
        scale, log_target = recipe.scale or SCALES[0], bool(recipe.log_target)
        # small trainings would read the private rows, and may choose inputs that no attack can move
        if like is None and dataset.roles and descriptions.trains_plainly(recipe):
            decides = "mae" if learns.numpy_only else name
            scale, log_target, tried = defaults.decide(
                plain, dataset, training, decides, seed=seed, most_words=most_words
            )
            notes += tried
        options = {"scale": scale, "log_targets": log_target, "most_words": most_words}
        preprocessor = like or row_sets.fit_preprocessor(dataset, training, loss=name, **options)
        first, last = row_sets.network_ends(preprocessor, name)
        widths = descriptions.hidden_widths(recipe.hidden)
        net = network or descriptions.network((first, *widths, last * learns.width), recipe, members=members)
    coded = reads and row_sets.saves(preprocessor)
    count = len(dataset.y) + (0 if dataset.test is None else len(dataset.test[1]))
    row_sets.check_memory(preprocessor, count, recipe.precision, codes=coded)
    check_mergeable(net, models)
    weights = None
    if classify:
        codes = preprocessor.class_codes(dataset.y[training])
        weights = descriptions.class_weights(recipe.class_weight, codes, preprocessor.classes or ())
    loss = descriptions.loss(recipe, name, weights, missing=bool(gaps))
    loss.check_network(net)
    check_together({**loss.uses, **in_use(fleet=fleet)})

    by_class = None if weights is None or name == "cross_entropy" else np.array(weights)
    rows = partial(row_sets.rows_for, preprocessor, precision=recipe.precision, by_class=by_class, codes=coded)

    def part(chosen: Indices, apart: tuple[Array, Array] | None = None) -> Rows | None:
        if apart is not None:
            return rows(*apart, weight=None if dataset.weight is None else np.ones(len(apart[1])))
        some = None if dataset.weight is None else dataset.weight[chosen]
        return rows(dataset.X, dataset.y[chosen], rows=chosen, weight=some) if len(chosen) else None

    train = part(training)
    assert train is not None, "the split leaves rows to train on"
    fewest = min((len(kept) for kept, _ in parts), default=len(train))
    size = as_count("batch_size", recipe.batch_size)
    if size > fewest and size != BATCH:
        text = f"batch_size: {size} is more than the {fewest} training rows; batches of {fewest} are used"
        warnings.warn(text, stacklevel=2)
    prepared = Prepared(
        replace(recipe, batch_size=min(size, fewest)),
        dataset,
        preprocessor,
        net,
        loss,
        train,
        part(validated, dataset.validation),
        part(tested, dataset.test),
        training,
        tested if dataset.test is None else None,
        models,
        parts,
        tuple(notes),
        start,
        began,
        gaps=gaps,
    )
    if source is None or start is None or start.about["new_output_layer"] or prepared.test is None:
        return prepared
    X, labels, at = prepared.test_rows
    known = read_training_rows(source.run)
    seen = 0 if known is None else row_sets.among(labelled_hashes(preprocessor, X, labels[at], at), known)
    note = f"{seen} of {len(at)} test rows are training rows of {source.run.path}, so the test scores flatter the model"
    if seen:
        warnings.warn(note, stacklevel=2)
    return replace(prepared, warned=(note,)) if seen else prepared


def decisions(prepared: Prepared) -> dict[str, Any]:
    """Return the fields that the data decided, for a run's configuration."""
    preprocessor, recipe = prepared.preprocessor, prepared.recipe
    log_target = preprocessor.target_log if preprocessor.task == "regression" else None
    decided = {name: getattr(recipe, name) for name in ("weight_decay", "batch_size", "lr", "ema")}
    return {"scale": preprocessor.scale, "log_target": log_target, **decided}
