"""Prepare the data of a training: split into training, validation and test rows, scale, encode."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any

import numpy as np

from fusemlp.cli import defaults, ensemble, recipe
from fusemlp.cli.options import ModelOptions
from fusemlp.datasets.load import Columns, Dataset, load_data
from fusemlp.datasets.preprocessing import Preprocessor, split
from fusemlp.datasets.scaling import SCALES
from fusemlp.describe.checks import as_count, as_number, check_choice
from fusemlp.describe.losses import Loss
from fusemlp.describe.network import MLP
from fusemlp.describe.schedules import Schedule
from fusemlp.engine import Engine
from fusemlp.inputs.arrays import Array
from fusemlp_kernels.errors import ArgumentError, DataError

TEST_FRACTION = 0.2
_PIECE = 2**15


@dataclass(frozen=True, eq=False)
class Rows:
    """Rows for the engine: X (n, inputs), y for the loss, and ``labels`` as in the data."""

    X: Array
    y: Array
    labels: Array
    weight: Array | None = None

    def __len__(self) -> int:
        return len(self.X)


@dataclass(frozen=True, eq=False)
class Prepared:
    """The three parts of a data set, with network, loss and preprocessor; ``validation`` may be None.

    ``models`` are trained; with ``folds`` each has its own training and validation rows of ``train``.
    """

    dataset: Dataset
    preprocessor: Preprocessor
    network: MLP
    loss: Loss
    train: Rows
    validation: Rows | None
    test: Rows
    models: int = 1
    folds: tuple[ensemble.Fold, ...] = ()
    target_note: str = ""

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
            "test": "held-out fifth" if self.dataset.test is None else "the data's own test set",
            "notes": list(self.notes),
        }

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
        log = [self.target_note] if self.target_note else []
        return (*self.dataset.notes, *([line] if rare else []), *log)

    def seen(self, most: int) -> tuple[Array, Array]:
        """Return inputs and labels of all rows but the test rows, or of evenly spaced ones with ``most`` numbers."""
        parts = [self.train, *([] if self.validation is None else [self.validation])]
        step = max(1, -(-sum(part.X.size for part in parts) // most))
        X, labels = ([getattr(part, name)[::step] for part in parts] for name in ("X", "labels"))
        return np.concatenate(X), np.concatenate(labels)

    @property
    def fit_data(self) -> dict[str, Any]:
        """The arguments of ``fit`` that hold training and validation rows."""
        train, held_out = self.train, self.validation
        return {
            "X": train.X,
            "y": train.y,
            "sample_weight": train.weight,
            "validation_data": None if held_out is None else (held_out.X, held_out.y, held_out.weight),
        }

    def engine(self, options: ModelOptions, schedule: Schedule | None = None) -> Engine:
        """Return a new engine; ``schedule`` None is the constant rate of the options."""
        return Engine(
            self.network,
            loss=self.loss,
            optimizer=recipe.optimizer(options, schedule),
            batch_size=options.batch_size,
            seed=options.seed,
            backend=options.backend,
            device=options.device,
            precision=options.precision,
            plan=options.plan,
        )


def fingerprint(dataset: Dataset) -> str:
    """Return the SHA-256 of a data set's arrays: equal content has equal hashes, from any file."""
    digest = hashlib.sha256()
    for array in (dataset.X, dataset.y, *(dataset.test or ())):
        plain = array.astype(str) if array.dtype.kind == "O" else array
        digest.update(f"{plain.dtype.str}{plain.shape}".encode())
        digest.update(np.ascontiguousarray(plain).tobytes())
    return digest.hexdigest()


def _split(name: str, y: Array, **options: Any) -> tuple[Array, Array]:
    """Call ``split``; its error names the purpose of the rows."""
    try:
        return split(y, **options)
    except DataError as error:
        raise DataError(f"{name}: {str(error).removeprefix('fraction: ')}") from None


def network_inputs(preprocessor: Preprocessor, X: Array, precision: str) -> Array:
    """Return the inputs of rows in the network's type, a piece at a time: all in float64 take twice the memory."""
    inputs = np.empty((len(X), preprocessor.width), np.float64 if precision == "fp64" else np.float32)
    try:
        with np.errstate(over="ignore"):
            for start in range(0, len(X), _PIECE):
                inputs[start : start + _PIECE] = preprocessor.transform_features(X[start : start + _PIECE])
    except DataError:
        # Its message has the row in the piece.
        return preprocessor.transform_features(X)
    # The engine's error names a value that float32 cannot hold.
    return inputs if np.isfinite(inputs).all() else preprocessor.transform_features(X)


def prepare(options: ModelOptions, like: Preprocessor | None = None) -> Prepared:
    """Load the data of the options and prepare a training; equal options give equal results.

    ``like`` is the preprocessor of a run, which is used in place of a new one. Raises the errors for all options of
    data, network and loss.
    """
    seed = as_count("seed", options.seed, minimum=0)
    if options.split_seed is not None:
        seed = as_count("split_seed", options.split_seed, minimum=0)
    as_number("validation_fraction", options.validation_fraction, low=0.0, high=1.0, high_open=True)
    check_choice("scale", options.scale, SCALES)
    widths = recipe.hidden_widths(options.hidden)
    assert options.data is not None, "checked where the options come in"
    columns = Columns(options.drop or (), options.keep or (), options.categorical or (), like)
    dataset = load_data(options.data, target=options.target, task=options.task, form=options.form(), columns=columns)
    classify = dataset.task == "classification"
    # The held-out rows depend only on the whole data set and this seed.
    if dataset.test is None:
        rest, tested = _split("test rows", dataset.y, fraction=TEST_FRACTION, seed=seed, stratify=classify)
        test_features, test_labels = dataset.X[tested], dataset.y[tested]
    else:
        rest = np.arange(len(dataset.y), dtype=np.int64)
        test_features, test_labels = dataset.test
    training, validation = rest, rest[:0]
    models = defaults.models_of(options, dataset, new=like is None)
    parts: tuple[ensemble.Fold, ...] = ()
    shared = any(getattr(options, name, None) is not None for name in ("validation", "group", "time"))
    if models > 1 and options.validation_fraction > 0 and not shared:
        parts = ensemble.folds(dataset.y[rest], models, seed=seed, stratify=classify)
    elif options.validation_fraction > 0:
        share = options.validation_fraction
        kept, chosen = _split("--validation-fraction", dataset.y[rest], fraction=share, seed=seed, stratify=classify)
        training, validation = rest[kept], rest[chosen]

    classes = len(dataset.classes) if classify else 0
    name = recipe.loss_name(options, dataset.task, classes)
    log_target, target_note = bool(options.log_target), ""
    if options.log_target is not None and classify:
        raise ArgumentError("log_target: only numbers have logarithms, and the target holds classes")
    if like is None and options.log_target is None and not classify and name == "mse" and defaults.is_a_table(options):
        log_target, target_note = ensemble.log_pays(dataset, training, options, seed=seed)
    preprocessor = like or Preprocessor.fit(
        dataset,
        training,
        scale=options.scale,
        one_hot_targets=name in recipe.ONE_HOT,
        scale_targets=name != "poisson",
        log_targets=log_target,
    )
    outputs = 1 if name == "binary_cross_entropy" else preprocessor.outputs
    net = recipe.network((preprocessor.width, *widths, outputs), options, init=options.init)
    if models > 1 and any(activation.name == "prelu" for activation in net.activations):
        raise ArgumentError(f"models: {models} networks with prelu cannot be merged; use leaky_relu, or --models 1")
    weights = None
    if classify:
        weights = recipe.class_weights(options.class_weight, preprocessor.class_codes(dataset.y[training]), classes)
    loss = recipe.loss(options, name, weights)
    loss.check_network(net)

    def rows(X: Array, labels: Array) -> Rows:
        weight = None
        if weights is not None and name != "cross_entropy":
            weight = np.array(weights)[preprocessor.class_codes(labels)]
        return Rows(
            network_inputs(preprocessor, X, options.precision), preprocessor.encode_targets(labels), labels, weight
        )

    return Prepared(
        dataset,
        preprocessor,
        net,
        loss,
        rows(dataset.X[training], dataset.y[training]),
        rows(dataset.X[validation], dataset.y[validation]) if len(validation) else None,
        rows(test_features, test_labels),
        models,
        parts,
        target_note,
    )
