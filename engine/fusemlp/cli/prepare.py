"""Prepare the data of a training: split into training, validation and test rows, scale, encode."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np

from fusemlp.cli import defaults, ensemble, recipe, transfer
from fusemlp.cli.commands import TrainOptions
from fusemlp.cli.fields import given_options
from fusemlp.cli.options import ModelOptions
from fusemlp.cli.preset import with_preset
from fusemlp.datasets.load import MANY_CLASSES, Columns, Dataset, load_data
from fusemlp.datasets.memory import check_memory
from fusemlp.datasets.parts import Fold, Hashes, among, folds, hold_out, row_hashes, with_files
from fusemlp.datasets.prepare import Rows, fit_data, fit_preprocessor, network_ends, rows_for
from fusemlp.datasets.preprocessing import Preprocessor
from fusemlp.datasets.preprocessing import Rows as Indices
from fusemlp.datasets.scaling import SCALES
from fusemlp.describe.checks import as_count, as_number, check_choice
from fusemlp.describe.losses import Loss
from fusemlp.describe.network import MLP
from fusemlp.describe.optimizers import Optimizer
from fusemlp.describe.privacy import DPSGD
from fusemlp.describe.schedules import Schedule
from fusemlp.engine import Engine
from fusemlp.fleet.merge import check_mergeable
from fusemlp.inputs.arrays import Array
from fusemlp.report.runs import read_training_rows
from fusemlp.training.transfer import by_layers
from fusemlp_kernels.errors import ArgumentError, DataError

TEST_FRACTION = 0.2


@dataclass(frozen=True, eq=False)
class Prepared:
    """The three parts of a data set, with network, loss and preprocessor; ``validation`` may be None.

    ``training`` are the indices of the training rows in the data set.
    ``models`` are trained; with ``folds`` each has its own training and validation rows of ``train``.
    """

    dataset: Dataset
    preprocessor: Preprocessor
    network: MLP
    loss: Loss
    train: Rows
    validation: Rows | None
    test: Rows
    training: Indices
    # the test rows' indices in the data set, unless they are a set of their own
    tested: Indices | None = None
    own_test: bool = False
    models: int = 1
    folds: tuple[Fold, ...] = ()
    tried: tuple[str, ...] = ()
    # of a new training with --from
    start: transfer.Start | None = None
    weight_decay: float | None = None
    # those that --preset has changed
    preset: Mapping[str, Any] = field(default_factory=dict)
    # when the data had been read, as ``time.monotonic`` tells it
    began: float = 0.0

    @property
    def test_rows(self) -> tuple[Array, Array, Array]:
        """Features and labels as in the data, and which of the rows are for the test."""
        X, y = self.dataset.test or (self.dataset.X, self.dataset.y)
        return X, y, np.arange(len(X)) if self.tested is None else self.tested

    @property
    def summary(self) -> dict[str, Any]:
        """The description of the data for ``config.json``."""
        return {
            "name": self.dataset.name,
            "fingerprint": fingerprint(self.dataset),
            "task": self.dataset.task,
            "rows": len(self.train) + len(self.validation or ()) + len(self.test),
            "training_rows": len(self.train),
            "validation_rows": len(self.validation or ()),
            "test_rows": len(self.test),
            "test": self._tested_by(),
            "notes": list(self.notes),
        }

    @property
    def training_rows(self) -> str:
        """The rows to train and to validate on, as text."""
        if self.folds:
            return f"{len(self.train)} training rows, in {len(self.folds)} folds to validate on"
        return f"{len(self.train)} training, {len(self.validation or ())} validation"

    def _tested_by(self) -> str:
        if self.dataset.test is not None:
            return "a file of its own" if self.own_test else "the data's own test set"
        return "held-out fifth"

    def hashes(self, *, every: bool = False) -> Hashes:
        """Return the hashes of the training rows, sorted, each once, for ``evaluate``.

        ``every``: of all rows that ``--final-fit`` trains on, which leaves out only a test set of its own.
        """
        if every:
            parts = [(self.dataset.X, self.dataset.y), *([self.dataset.validation] if self.dataset.validation else [])]
            return np.unique(np.concatenate([labelled_hashes(self.preprocessor, *part) for part in parts]))
        return np.unique(labelled_hashes(self.preprocessor, self.dataset.X, self.train.labels, self.training))

    @property
    def notes(self) -> tuple[str, ...]:
        """Lines on the reading of a table: its form, columns left out, missing cells, rare words."""
        made = self.preprocessor
        rare = (
            [
                f"{len(shared)} of {len(words)} in {name!r}"
                for name, words, shared in zip(made.feature_names, made.categories, made.shared, strict=True)
                if words is not None and shared
            ]
            if made.shared
            else []
        )
        line = f"words rare in the training rows, taken as one other category: {', '.join(rare)}"
        return (*self.dataset.notes, *([line] if rare else []), *self.tried)

    def seen(self, most: int) -> tuple[Array, Array]:
        """Return inputs and labels of all rows but the test rows, or of evenly spaced ones with ``most`` numbers."""
        parts = [self.train, *([] if self.validation is None else [self.validation])]
        step = max(1, -(-sum(part.X.size for part in parts) // most))
        X, labels = ([getattr(part, name)[::step] for part in parts] for name in ("X", "labels"))
        return np.concatenate(X), np.concatenate(labels)

    @property
    def fit_data(self) -> dict[str, Any]:
        """The arguments of ``fit`` that hold training and validation rows."""
        return fit_data(self.train, self.validation, self.folds)

    def engine(self, options: ModelOptions, schedule: Schedule | None = None, privacy: DPSGD | None = None) -> Engine:
        """Return a new engine; ``schedule`` None is the constant rate of the options."""
        engine = Engine(
            self.network,
            loss=self.loss,
            optimizer=self.optimizer(options, schedule),
            privacy=privacy,
            **recipe.engine_options(options),
        )
        if self.start is not None:
            engine.load_state_dict({**engine.state_dict(), **self.start.parameters})
        return engine

    def optimizer(self, options: ModelOptions, schedule: Schedule | None) -> Optimizer:
        """Return the optimizer of the options, with ``--freeze`` and ``--layer-decay``."""
        made = recipe.optimizer(options, schedule)
        if not isinstance(options, TrainOptions):
            return made
        return by_layers(made, self.network, freeze=options.freeze, layer_decay=options.layer_decay)


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


def _split(name: str, dataset: Dataset, rows: Indices, *, fraction: float, seed: int) -> tuple[Indices, Indices]:
    """Call ``hold_out``; its error names the purpose of the rows, and classes that are a guess."""
    try:
        return hold_out(dataset, rows, fraction=fraction, seed=seed)
    except DataError as error:
        _check_classes(dataset)
        guess = f"; {dataset.guess}" if dataset.guess else ""
        raise DataError(f"{name}: {str(error).removeprefix('fraction: ')}{guess}") from None


def _check_classes(dataset: Dataset) -> None:
    """Raise ArgumentError for a target that was called classes, with too few rows of each to split and to learn."""
    if dataset.task != "classification" or dataset.guess:
        return
    count = len(dataset.y)
    rows = np.unique(dataset.y, return_counts=True)[1]
    single = int((rows == 1).sum())
    numbers = dataset.y.dtype.kind in "iuf"
    drawn = dataset.test is None and dataset.groups is None and dataset.times is None
    # The test rows would be fewer than the classes that have rows to share.
    cannot_split = drawn and int(np.ceil(TEST_FRACTION * (count - single))) < max(1, len(rows) - single)
    if len(rows) <= MANY_CLASSES or not (cannot_split or (numbers and 2 * single > count)):
        return
    values, instead = ("numbers", "--task regression takes them as numbers")
    if not numbers:
        values, instead = ("labels", "choose another --target, or join rare ones")
    raise ArgumentError(
        f"{'task' if numbers else 'target'}: {dataset.target_name!r} holds {len(rows)} different {values} in {count} "
        f"rows ({single} of them in one row only), too many for classes; {instead}"
    )


def prepare(
    options: ModelOptions,
    like: Preprocessor | None = None,
    network: MLP | None = None,
    source: transfer.Source | None = None,
) -> Prepared:
    """Load the data of the options and prepare a training; equal options give equal results.

    ``like`` and ``network`` are those of a run, which are used in place of new ones; ``source`` is the run of
    ``--from``. Raises the errors for all options of data, network and loss.
    """
    seed = as_count("seed", options.seed, minimum=0)
    if options.split_seed is not None:
        seed = as_count("split_seed", options.split_seed, minimum=0)
    as_number("validation_fraction", options.validation_fraction, low=0.0, high=1.0, high_open=True)
    if options.scale is not None:
        check_choice("scale", options.scale, SCALES)
    recipe.hidden_widths(options.hidden)
    assert options.data is not None, "checked where the options come in"
    columns = Columns(
        options.drop or (),
        options.keep or (),
        options.categorical or (),
        options.id or (),
        options.group,
        options.time,
        like if source is None else source.preprocessor,
    )
    for option in ("group", "time"):
        if getattr(options, option) is not None and options.validation is not None and options.test is not None:
            raise ArgumentError(f"{option}: --validation and --test decide the rows; leave one of the options out")
    if options.validation is not None and options.validation_fraction != ModelOptions.validation_fraction:
        raise ArgumentError("validation_fraction: --validation has the validation rows; give one of the options")
    form = options.form()
    dataset = load_data(options.data, target=options.target, task=options.task, form=form, columns=columns)
    dataset = dataset if source is None else source.noted(dataset)
    dataset = with_files(dataset, options.data, validation=options.validation, test=options.test, form=form)
    began = time.monotonic()
    if dataset.y.dtype.kind in "iuf":
        _check_classes(dataset)
    classify = dataset.task == "classification"
    # The held-out rows depend only on the whole data set and this seed.
    training = np.arange(len(dataset.y), dtype=np.int64)
    tested = validated = training[:0]
    if dataset.test is None:
        training, tested = _split("test rows", dataset, training, fraction=TEST_FRACTION, seed=seed)
    if classify and len(dataset.classes) < 2:
        raise DataError(
            f"target: {dataset.target_name!r} is {dataset.y.tolist()[0]!r} in all rows, and classes are two or more; "
            "choose another column with --target"
        )
    # small trainings decide for the plain recipe
    plain, members, told = options, 1, list[str]()
    if like is None:
        options, members, told = with_preset(options, len(training), classify=classify)
        plain, options = (replace(one, weight_decay=defaults.weight_decay(one, dataset)) for one in (plain, options))
    models = defaults.models_of(options, dataset, new=like is None)
    parts: tuple[Fold, ...] = ()
    shared = dataset.validation is not None or options.group is not None or options.time is not None
    if models > 1 and options.validation_fraction > 0 and not shared:
        parts = folds(dataset.y[training], models, seed=seed, stratify=classify)
    elif dataset.validation is None and options.validation_fraction > 0:
        share = options.validation_fraction
        training, validated = _split("--validation-fraction", dataset, training, fraction=share, seed=seed)

    classes = len(dataset.classes) if classify else 0
    name = recipe.loss_name(options, dataset.task, classes)
    scale, log_target, tried = options.scale or SCALES[0], bool(options.log_target), list[str]()
    if options.log_target is not None and classify:
        raise ArgumentError("log_target: only numbers have logarithms, and the target holds classes")
    # small trainings would read the private rows, and may choose inputs that no attack can move
    decides = like is None and source is None and defaults.trains_plainly(options)
    if decides and defaults.is_a_table(options):
        scale, log_target, tried = ensemble.decided(dataset, training, plain, name, seed=seed)
    start = None
    if source is not None:
        assert isinstance(options, TrainOptions), "no other command has --from"
        preprocessor, net, start = source.start(dataset, training, options, name)
        tried = start.lines(net)
    else:
        preprocessor = like or fit_preprocessor(dataset, training, loss=name, scale=scale, log_targets=log_target)
        first, last = network_ends(preprocessor, name)
        widths = recipe.hidden_widths(options.hidden)
        net = network or recipe.network((first, *widths, last), options, init=options.init, members=members)
    check_memory(
        preprocessor, len(dataset.y) + (0 if dataset.test is None else len(dataset.test[1])), options.precision
    )
    check_mergeable(net, models)
    weights = None
    if classify:
        weights = recipe.class_weights(options.class_weight, preprocessor.class_codes(dataset.y[training]), classes)
    loss = recipe.loss(options, name, weights)
    loss.check_network(net)

    by_class = None if weights is None or name == "cross_entropy" else np.array(weights)
    rows = partial(rows_for, preprocessor, precision=options.precision, by_class=by_class)

    def part(chosen: Indices, own: tuple[Array, Array] | None = None) -> Rows:
        return rows(*own) if own else rows(dataset.X, dataset.y[chosen], rows=chosen)

    validates = dataset.validation is not None or len(validated) > 0
    prepared = Prepared(
        dataset,
        preprocessor,
        net,
        loss,
        part(training),
        part(validated, dataset.validation) if validates else None,
        part(tested, dataset.test),
        training,
        tested if dataset.test is None else None,
        options.test is not None,
        models,
        parts,
        (*told, *tried),
        start,
        options.weight_decay,
        given_options(options, plain),
        began,
    )
    if source is None or start is None or start.about["new_output_layer"]:
        return prepared
    X, labels, at = prepared.test_rows
    known = read_training_rows(source.run)
    seen = 0 if known is None else among(labelled_hashes(preprocessor, X, labels[at], at), known)
    note = f"{seen} of {len(at)} test rows are training rows of {source.run.path}, so the test scores flatter the model"
    return replace(prepared, tried=(*tried, note)) if seen else prepared
