"""Estimators of whole tables: they read the columns, prepare and train as ``fusemlp train`` does.

The columns are told and turned into numbers by ``fusemlp.datasets``, and an ``Engine`` trains: with the same rows,
options and seed, an estimator has the model of the command line.
"""

from __future__ import annotations

import copy
import json
import logging
import time
import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, Self

import numpy as np
from sklearn.base import BaseEstimator, ClassifierMixin, RegressorMixin
from sklearn.utils import check_consistent_length, check_random_state
from sklearn.utils.class_weight import compute_class_weight
from sklearn.utils.metaestimators import available_if
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import _check_sample_weight, _check_y, check_is_fitted, validate_data

from fusemlp.callbacks import ProgressBar
from fusemlp.datasets.load import Columns, Dataset, load_data, load_features
from fusemlp.datasets.parts import Fold, folds, hold_out
from fusemlp.datasets.prepare import CLASS_DECAY, Rows, fit_preprocessor, network_ends, network_inputs, rows_for, watch
from fusemlp.datasets.preprocessing import Preprocessor
from fusemlp.datasets.sources import Frame, as_frame
from fusemlp.describe import presets
from fusemlp.describe.checks import as_count, as_number, check_choice
from fusemlp.describe.losses import Loss, as_loss
from fusemlp.describe.network import MLP
from fusemlp.describe.optimizers import Optimizer, as_optimizer
from fusemlp.engine import Engine, load_checkpoint
from fusemlp.fleet import trials
from fusemlp.fleet.fleet import Fleet
from fusemlp.fleet.merge import check_mergeable, default_models, members, merged, sound
from fusemlp.report.certification import certify
from fusemlp.report.evidence import Importance
from fusemlp.report.explanations import METHODS, Attributions, column_attributions, permutation_importance
from fusemlp.report.metrics import predicted_codes, predictions
from fusemlp.report.onnx import to_onnx
from fusemlp.report.runs import open_run, read_metrics, weights_path
from fusemlp.report.uncertainty import HeldOut, intervals, judged, sets, spread
from fusemlp.sklearn import saving
from fusemlp.training.history import History
from fusemlp_kernels.errors import ArgumentError, DataError, unknown_name

Array = np.ndarray[Any, Any]

log = logging.getLogger("fusemlp.sklearn")


@dataclass(eq=False, repr=False)
class TableParameters:
    """The parameters of both estimators, with the defaults of ``fusemlp train``.

    preset : "plain", "tabm" or "auto", a recipe for hidden, activation, optimizer, lr and batch_size where these have
        their defaults: ``fusemlp.describe.presets``. "tabm" is one network of 16 members that share weights. None:
        "auto" if all of these, models and time_limit have their defaults, else "plain".
    hidden : widths of the hidden layers; () for none.
    activation, dropout : one for all hidden layers, or a sequence with one for each.
    loss : a name or an object such as ``Huber(2.0)``; None is cross_entropy for classes, mse for numbers.
    optimizer : a name or an object such as ``AdamW(weight_decay=0.1)``; of a classifier "adam" is
        ``Adam(weight_decay=0.0003)``.
    lr : a number or a schedule such as ``Cosine(0.01)``; None leaves the optimizer's own.
    batch_size, epochs : rows of an update, and most passes over the training rows.
    early_stopping : stop after this many epochs without a better loss of the held-out rows, and restore the best
        weights; None holds out no rows.
    metric : the score of these rows by which it stops: None for the loss, or "auc", "f1", "r2" and so on, as --metric.
    validation_fraction : the share of the rows that early stopping holds out, unless fit gets X_val and y_val. Fewer
        rows than that needs are all trained on, for all epochs.
    models : train this many with seeds from random_state on, each with its own fold of the rows held out (with group or
        time all hold out the same), and merge them into one that gives their mean. None is 5 with 40 to 100,000 rows,
        otherwise and with callbacks 1.
    time_limit : seconds for all of fit but the reading of X; None for no limit. The models share them, or fewer train.
    scale : "robust", "piecewise", "quantile", "standard", "minmax" or "none", from the training rows; None is the
        better of the first two in small trainings on folds of these rows.
    log_target : learn the logarithm of a positive target; None where these trainings say that it helps.
    drop, keep, categorical : names of columns to leave out; to keep although they are constant, count the rows or hold
        another word in nearly every row; to take as words although they hold numbers. An array's columns are x0, x1 ...
    group, time : a column whose rows of one value are held out together; one whose last rows are held out.
    random_state : seed of held-out rows, initial weights, dropout and the order of the rows.
    backend, precision : as for ``Engine``.
    callbacks : objects like ``fusemlp.Callback``, for one model; verbose=True shows a progress bar, or a line a model.

    Attributes: ``engine_``, ``preprocessor_``, ``history_``, ``n_iter_`` (epochs), ``notes_`` (lines on what became of
    the columns), ``held_out_`` (errors of the rows that validated the training, or None), ``temperature_`` (the number
    by which these rows had the logits of classes divided, 1.0 for none), ``n_features_in_`` and, if X has names,
    ``feature_names_in_``.
    """

    preset: str | None = None
    hidden: Any = (128,)
    activation: Any = "relu"
    dropout: Any = 0.0
    loss: Any = None
    optimizer: Any = "adam"
    lr: Any = None
    batch_size: int = 32
    epochs: int = 200
    early_stopping: int | None = 20
    metric: str | None = None
    validation_fraction: float = 0.1
    models: int | None = None
    time_limit: float | None = None
    scale: str | None = None
    log_target: bool | None = None
    drop: Any = ()
    keep: Any = ()
    categorical: Any = ()
    group: str | None = None
    time: str | None = None
    random_state: Any = 0
    backend: str = "auto"
    precision: str = "fp32"
    callbacks: Any = None
    verbose: bool = False


class _TableEstimator(TableParameters, BaseEstimator, ABC):
    task: str
    engine_: Engine
    preprocessor_: Preprocessor
    held_out_: HeldOut | None
    temperature_: float

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        # Python's -OO leaves no documentation
        cls.__doc__ = f"{(cls.__doc__ or '').rstrip()}\n\n{(TableParameters.__doc__ or '').partition('.')[2].strip()}"

    @classmethod
    def _get_param_names(cls) -> list[str]:
        return sorted(field.name for field in fields(cls))

    @abstractmethod
    def _checked_targets(self, y: Any) -> Array:
        """Return labels (n,), or values (n,) or (n, targets)."""

    @abstractmethod
    def _checked_loss(self) -> Loss:
        """Return the loss; ArgumentError for one of the other task."""

    def _class_weights(self, labels: Array) -> Array | None:
        """Return a weight for each class, by the labels of all rows."""
        return None

    def fit(self, X: Any, y: Any, sample_weight: Any = None, *, X_val: Any = None, y_val: Any = None) -> Self:
        """Fit to a table X and its targets y: labels (n,), or values (n,) or (n, targets).

        X: a data frame of pandas or polars, an Arrow table, or an array (n, columns); cells may be missing. Later
        tables may have their columns in any order, and others among them. sample_weight (n,): a row of weight 0 counts
        as left out. X_val, y_val: rows for early stopping in place of held-out ones.

        Raises ArgumentError, ArgumentTypeError, DataError (all mistakes of the table in one message) before anything
        has changed, DivergenceError when the loss is no longer finite.
        """
        before = self.__dict__.copy()
        try:
            return self._fit(X, y, sample_weight, X_val, y_val)
        except BaseException:
            self.__dict__ = before
            raise

    @classmethod
    def from_run(
        cls, run: str | Path, *, weights: str = "model", backend: str = "auto", device: str | None = None
    ) -> Self:
        """Return the fitted estimator of a run folder of ``fusemlp train`` or ``fusemlp sweep``.

        ``weights``: model (end of training), best (least validation loss) or last. Raises ArgumentError for a run of
        the other task, CheckpointError for what is no run.
        """
        opened, config = open_run(run)
        made = Preprocessor.from_config(config["preprocessor"])
        if made.task != cls.task:
            raise ArgumentError(f"run: {str(run)!r} is of a {made.task}, and {cls.__name__} is for a {cls.task}")
        engine = load_checkpoint(weights_path(opened, weights), backend=backend, device=device)
        if engine.history is None:
            # A merged model has no record of its own.
            engine.history = History()
            for row in read_metrics(opened):
                engine.history.record(int(row.pop("epoch")) - 1, row, 0.0)
        # that of one model, where several were merged
        net, options = MLP.from_config(config["network"]), config["options"]
        estimator = cls(
            preset="tabm" if net.members > 1 else None,
            hidden=net.sizes[1:-1],
            activation=net.activations[:-1],
            dropout=net.dropouts[:-1],
            loss=engine.loss,
            optimizer=engine.optimizer,
            batch_size=engine.batch_size,
            epochs=config["epochs"],
            models=options.get("models") or 1,
            scale=made.scale,
            log_target=made.target_log,
            random_state=engine.seed,
            backend=backend,
            precision=engine.precision,
        )
        given = (
            "drop",
            "keep",
            "categorical",
            "group",
            "time",
            "early_stopping",
            "metric",
            "validation_fraction",
            "time_limit",
        )
        estimator.set_params(**{name: options[name] for name in given if name in options})
        # The command line's 0 is None here.
        estimator.early_stopping = estimator.early_stopping or None
        estimator._take(engine, made, tuple(config["data"]["notes"]))
        told = json.loads(opened.report.read_text(encoding="utf-8")) if opened.report.exists() else {}
        estimator.held_out_ = HeldOut.from_config(told["held_out"]) if "held_out" in told else None
        estimator.temperature_ = told.get("temperature", 1.0)
        estimator.feature_names_in_ = np.array(list(dict.fromkeys(made.sources)), object)
        estimator.n_features_in_ = len(estimator.feature_names_in_)
        return estimator

    def _take(self, engine: Engine, made: Preprocessor, notes: tuple[str, ...]) -> None:
        """Set what is fitted."""
        self.engine_, self.preprocessor_, self.notes_ = engine, made, notes

    def _fit(self, X: Any, y: Any, sample_weight: Any, X_val: Any, y_val: Any) -> Self:
        if (X_val is None) != (y_val is None):
            missing = "y_val" if y_val is None else "X_val"
            raise ArgumentError(f"{missing}: it is missing; X_val and y_val belong together")
        if y is None:
            # scikit-learn's words
            raise ArgumentError(f"y: {type(self).__name__} requires y to be passed, but the target y is None")
        seed, loss, notes = self._seed(), self._checked_loss(), list[str]()
        dataset, weight = self._read(X, self._checked_targets(y), sample_weight)
        labels = dataset.y
        training, held = np.arange(len(labels)), np.arange(0)
        how, shared = self._with_preset(len(labels), notes)
        models, cut = how._models(len(labels)), list[Fold]()
        if models > 1 and self.callbacks:
            raise ArgumentError(f"callbacks: they see the epochs of one model, and models is {models}; leave one out")
        if self.early_stopping is not None and X_val is None:
            if models > 1 and self.validation_fraction and self.group is None and self.time is None:
                cut += folds(labels, models, seed=seed, stratify=self.task == "classification")
            else:
                training, held = self._held_out(dataset, seed, notes)
        limit, began = self.time_limit, time.monotonic()
        if limit is not None:
            as_number("time_limit", limit, low=0.0, low_open=True)
        made = self._prepared(dataset, training, loss, seed)
        first, last = network_ends(made, loss.kind)
        fewest = min((len(one) for one, _ in cut), default=len(training))
        described: dict[str, Any] = {
            "loss": loss,
            "optimizer": how._optimizer(),
            "batch_size": min(as_count("batch_size", how.batch_size), fewest),
            "seed": seed,
            "backend": self.backend,
            "precision": self.precision,
            "normalise": False,
        }
        widths = (first, *how._widths(), last)
        net = MLP(widths, activation=how.activation, dropout=self.dropout, members=shared)
        check_mergeable(net, models)
        engine = Engine(net, **described)

        by_class = self._class_weights(labels)

        def rows(X: Array, labels: Array, chosen: Array | None = None, weight: Array | None = None) -> Rows:
            if by_class is not None:
                weight = by_class[made.class_codes(labels)] * (1.0 if weight is None else weight)
            return rows_for(made, X, labels, precision=engine.precision, rows=chosen, weight=weight)

        def part(chosen: Array) -> Rows:
            return rows(dataset.X, labels[chosen], chosen, None if weight is None else weight[chosen])

        train, watched = part(training), part(held) if len(held) else None
        if X_val is not None:
            labels_val = self._checked_targets(y_val)
            features = load_features(self._table(X_val), made, notes=notes)
            check_consistent_length(features, labels_val)
            watched = rows(features, labels_val)
        validates, own = watched is not None or bool(cut), list[tuple[Engine, Any]]()
        given: dict[str, Any] = {
            "X": train.X,
            "y": train.y,
            "sample_weight": train.weight,
            "validation_data": None if watched is None else (watched.X, watched.y, watched.weight),
            "epochs": as_count("epochs", self.epochs),
            "early_stopping": self.early_stopping if validates else None,
            **watch(self.metric, made, loss, validates=validates),
        }

        def fleet_of(models: int) -> Fleet:
            return Fleet(net, **described, vary={"seed": range(seed, seed + models)})

        seconds = trials.seconds_left(began, limit)
        if seconds is not None and models > 1:
            models = trials.models_within(seconds, fleet_of(models), train.X, train.y, notes)
            cut = cut[:models]
        given["time_limit"] = trials.seconds_left(began, limit)
        try:
            if models > 1:
                fleet = fleet_of(models)
                if cut:
                    given |= {"rows": [one for one, _ in cut], "validation_rows": [one for _, one in cut]}
                results = fleet.fit(**given, callback=print if self.verbose else None)
                engines = sound(results.members)
                engine = merged([*engines.values()])
                own = [(engine, cut[index][1]) for index, engine in engines.items()] if cut else []
            else:
                callbacks = [*(self.callbacks or ()), *([ProgressBar()] if self.verbose else [])]
                engine.fit(**given, callbacks=callbacks)
        except KeyboardInterrupt:
            if engine.history is None or not engine.history.stopped:
                raise
            warnings.warn("Training interrupted by user.", stacklevel=3)
        errors = temperature = None
        if watched is not None:
            own = [(engine, slice(None))]
        if own:
            errors, temperature = judged(engine, own, made, watched or train)
        self._take(engine, made, (*dataset.notes, *notes))
        self.held_out_, self.temperature_ = errors, 1.0 if temperature is None else temperature.value
        _tell(self.notes_)
        return self

    def _with_preset(self, rows: int, notes: list[str]) -> tuple[Self, int]:
        """Return the estimator with the parameters of its recipe, and the number of members; the choice goes to
        ``notes``."""
        widths, usual = self._widths(), TableParameters()
        given = {name: getattr(self, name) != getattr(usual, name) for name in presets.TABM if name != "hidden"}
        given["hidden"] = widths != usual.hidden
        activations = [one.name for one in MLP((1, *widths, 1), activation=self.activation).activations]
        against = presets.obstacles(self, activations=activations, widths=widths)
        own = any(given.values()) or self.models is not None or self.time_limit is not None
        classify = self.task == "classification"
        name, note = presets.chosen(self.preset, rows, against, classify=classify, own=own)
        notes += [note] if note else []
        if name == "plain":
            return self, 1
        how = copy.copy(self)
        return how.set_params(models=1, **presets.changes(given, rows)), presets.MEMBERS

    def _models(self, rows: int) -> int:
        if self.models is not None:
            return as_count("models", self.models)
        net = MLP((1, *self._widths(), 1), activation=self.activation)
        return 1 if self.callbacks else default_models(rows, [one.name for one in net.activations])

    def _prepared(self, dataset: Dataset, training: Array, loss: Loss, seed: int) -> Preprocessor:
        """Return the preprocessor; small trainings choose the scale that is left to them."""

        def prepare(*given: Any, **how: Any) -> Preprocessor:
            return fit_preprocessor(*given, loss=loss.kind, **how)

        def fleet(made: Preprocessor) -> Fleet:
            first, last = network_ends(made, loss.kind)
            net = MLP((first, *self._widths(), last), activation=self.activation, dropout=self.dropout)
            size = as_count("batch_size", self.batch_size)
            options: dict[str, Any] = {
                "backend": self.backend,
                "precision": self.precision,
                "vary": {"seed": range(trials.TRIALS)},
                "normalise": False,
            }
            return Fleet(net, loss.kind, self._optimizer(), size, **options)

        scale, log_target, _ = trials.chosen(
            dataset,
            training,
            prepare,
            fleet,
            scale=self.scale,
            log_target=self.log_target,
            seed=seed,
            time_limit=self.time_limit,
        )
        return prepare(dataset, training, scale=scale, log_targets=log_target)

    def _read(self, X: Any, labels: Array, sample_weight: Any) -> tuple[Dataset, Array | None]:
        """Return the data set of all rows with a weight that is not 0, and their weights."""
        frame = self._table(X, reset=True)
        check_consistent_length(frame.table, labels)
        table, weight = frame.table, None
        if sample_weight is not None:
            weight = _check_sample_weight(sample_weight, labels)
            counted = weight != 0
            if not counted.any():
                raise DataError("sample_weight: expected at least one non-zero number, got zeros alone")
            table, labels, weight = table.filter(counted), labels[counted], weight[counted]
        target = "y"
        while target in table.column_names:
            target += "_"
        # The targets have been checked; the numbers of the rows stand for them while the table is read.
        whole = Frame("X", table.append_column(target, [np.arange(len(labels))]))
        dataset = load_data(whole, target=target, task="regression", columns=self._columns())
        return replace(dataset, y=labels, task=self.task), weight

    def _columns(self) -> Columns:
        drop, keep, words = map(_names, (self.drop, self.keep, self.categorical))
        return Columns(drop, keep, words, group=self.group, time=self.time)

    def _table(self, X: Any, *, reset: bool = False) -> Frame:
        """Return X as a table with names; scikit-learn's errors for other things."""
        if hasattr(X, "__arrow_c_stream__") or hasattr(X, "to_arrow"):
            # Later columns are taken by name, in any order.
            checked = validate_data(self, X, skip_check_array=True) if reset else X
            return Frame("X", as_frame(checked).table)
        if isinstance(X, list | tuple) and np.asarray(X).dtype.kind in "US":
            # Lists of numbers and words would become words alone.
            X = np.array(X, object)
        array = validate_data(self, X, dtype=None, ensure_all_finite="allow-nan", reset=reset)
        names = getattr(self, "feature_names_in_", None)
        names = [f"x{index}" for index in range(array.shape[1])] if names is None else list(names)
        return Frame("X", arrow_table(array, names))

    def _held_out(self, dataset: Dataset, seed: int, notes: list[str]) -> tuple[Array, Array]:
        """Return the indices of the training rows and of the rows that early stopping watches."""
        share = as_number("validation_fraction", self.validation_fraction, low=0.0, high=1.0, high_open=True)
        rows = np.arange(len(dataset.y))
        if share:
            try:
                return hold_out(dataset, rows, fraction=share, seed=seed)
            except DataError as error:
                notes.append(f"no rows held out for early stopping: {str(error).removeprefix('fraction: ')}")
        return rows, rows[:0]

    def _seed(self) -> int:
        if isinstance(self.random_state, int | np.integer):
            return as_count("random_state", self.random_state, minimum=0)
        return int(check_random_state(self.random_state).randint(np.iinfo(np.int32).max))

    def _widths(self) -> tuple[int, ...]:
        given = self.hidden if isinstance(self.hidden, Iterable) else [self.hidden]
        return tuple(as_count("hidden", width) for width in given)

    def _optimizer(self) -> Optimizer:
        optimizer = as_optimizer(self.optimizer)
        # each optimizer has a rate
        changes: Any = {} if self.lr is None else {"lr": self.lr}
        if self.optimizer == "adam" and self.task == "classification":
            changes["weight_decay"] = CLASS_DECAY
        return replace(optimizer, **changes)

    def _inputs(self, X: Any) -> Array:
        """Return the network's inputs of a table's rows."""
        check_is_fitted(self)
        notes: list[str] = []
        features = load_features(self._table(X), self.preprocessor_, notes=notes)
        _tell(notes)
        return network_inputs(self.preprocessor_, features, self.engine_.precision)

    def explain(
        self, X: Any, y: Any = None, *, method: str = "permutation", background: Any = None, **options: Any
    ) -> Importance | Attributions:
        """Return the importance of a table's columns for the error by y, or their attributions in each row of X.

        ``method`` "permutation" needs y: ``fusemlp.explanations.permutation_importance``. The others are those of
        ``attributions`` there, with ``background`` a table, by default X; ``output`` is a word of ``classes_``, or an
        index in them.
        ``options`` are further arguments of these functions.
        """
        check_is_fitted(self)
        check_choice("method", method, ("permutation", *METHODS))
        if method == "permutation" and y is None:
            raise ArgumentError("y: permutation needs the targets, explain(X, y); or choose method='integrated'")
        if method != "permutation" and y is not None:
            raise ArgumentError(f"y: the method {method!r} reads no targets; leave it out")
        made = self.preprocessor_
        if y is not None:
            features, labels = load_features(self._table(X), made), self._checked_targets(y)
            check_consistent_length(features, labels)
            return permutation_importance(self.engine_, made, features, labels, **options)
        rows = None if background is None else self._inputs(background)
        if isinstance(output := options.get("output"), str) and made.labels:
            if output not in made.labels:
                raise unknown_name("output", output, made.labels)
            options["output"] = made.labels.index(output)
        return column_attributions(self.engine_, made, self._inputs(X), method=method, background=rows, **options)

    def certify(self, X: Any, y: Any, eps: float) -> dict[str, float]:
        """Return the share of rows that are predicted right however their numbers move by ``eps`` at most.

        ``eps`` counts in units of the scaled inputs; words, dates and missing cells do not move. Returns {"eps": ...,
        "accuracy": ...}, or of a regressor {"eps": ..., "width": ...}, the mean width of a prediction's bounds.
        """
        check_is_fitted(self)
        features, labels = load_features(self._table(X), self.preprocessor_), self._checked_targets(y)
        check_consistent_length(features, labels)
        return certify(self.engine_, self.preprocessor_, features, labels, eps)

    def _held_out_errors(self) -> HeldOut:
        check_is_fitted(self)
        if self.held_out_ is None:
            raise ArgumentError(
                "coverage: the model was fitted without held-out rows; fit with early_stopping, or with X_val and y_val"
            )
        return self.held_out_

    @property
    def history_(self) -> History:
        """The record of the training: ``history_.history["val_loss"]``, ``best_epoch``, ``stopped``."""
        return self.engine_.history or History()

    @property
    def n_iter_(self) -> int:
        """The number of epochs that were trained."""
        return len(self.history_.epochs)

    def to_onnx(self, path: str | Path) -> None:
        """Write an ONNX graph that takes the columns as they are in the table: ``fusemlp.onnx``."""
        check_is_fitted(self)
        to_onnx(self.engine_, path, preprocessor=self.preprocessor_)

    def save(self, path: str | Path) -> None:
        """Write the fitted estimator to one safetensors file, without pickle; ``load`` reads it.

        The file is a checkpoint of the network too, for ``fusemlp.load_checkpoint``. ``callbacks``, metadata requests
        and a ``random_state`` that is no number are left out.

        Raises ArgumentError or ArgumentTypeError for an impossible path and for a parameter that no file can hold,
        OSError from the disk.
        """
        check_is_fitted(self)
        # a merged or opened model has a record that its checkpoint lacks
        record = asdict(self.history_) if self.engine_.fit_state is None else None
        held = None if self.held_out_ is None else self.held_out_.to_config()
        more = {"preprocessor": self.preprocessor_.to_json(), "history": record, "held_out": held}
        without = ("engine_", "preprocessor_", "held_out_", "_metadata_request")
        saving.save(self, self.engine_, path, without=without, **more)

    @classmethod
    def load(cls, path: str | Path, *, backend: str = "auto", device: str | None = None) -> Self:
        """Return the estimator that ``save`` wrote, on any backend. Raises CheckpointError for any other file."""
        estimator, beside, _ = saving.read(cls, path)
        estimator.engine_ = load_checkpoint(path, backend=backend, device=device)
        estimator.preprocessor_ = Preprocessor.from_json(beside["preprocessor"])
        held = beside["held_out"]
        estimator.held_out_ = None if held is None else HeldOut.from_config(held)
        if beside["history"] is not None:
            estimator.engine_.history = History(**beside["history"])
        made: Self = estimator
        return made

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.input_tags.allow_nan = True
        tags.input_tags.string = True
        tags.input_tags.categorical = True
        tags.non_deterministic = self.random_state is None
        return tags


def arrow_table(array: Array, names: list[str]) -> Any:
    """Return the columns of an array (n, columns) as an Arrow table.

    A column of numbers and words holds words, as of a DataFrame; in an array of text one of numbers alone holds these.
    """
    import pyarrow

    from fusemlp.datasets.columns import numbers_of

    columns = []
    for values in array.T:
        try:
            column = pyarrow.array(values.tolist() if values.dtype.kind in "OU" else values, from_pandas=True)
        except (pyarrow.ArrowException, TypeError):
            # numbers and words
            texts = [None if value is None or value != value else str(value) for value in values]
            column = pyarrow.array(texts, pyarrow.string())
        if values.dtype.kind == "U":
            numbers, wrong = numbers_of(column, ".")
            column = column if len(wrong) else pyarrow.array(numbers)
        columns.append(column)
    return pyarrow.table(columns, names=names)


def _names(given: Any) -> list[str]:
    """Return the names of columns that a parameter holds; one name stands for a list of it."""
    return [given] if isinstance(given, str) else [str(name) for name in given or ()]


def _tell(notes: Iterable[str]) -> None:
    for note in notes:
        log.info("%s", note)


def _gives_probabilities(estimator: Any) -> bool:
    loss = as_loss(estimator.loss or "cross_entropy")
    if not loss.is_classification:
        raise AttributeError(f"predict_proba needs the loss cross_entropy or binary_cross_entropy, not {loss.kind}")
    return True


@dataclass(eq=False, repr=False)
class TableClassifier(ClassifierMixin, _TableEstimator):
    """A network for the classes of a table's rows, trained as ``fusemlp train`` trains it.

    class_weight : None, "balanced" or a dict from class to weight.
    """

    class_weight: Any = None
    task = "classification"

    def _checked_targets(self, y: Any) -> Array:
        labels: Array = _check_y(y, estimator=self)
        missing = [row for row, label in enumerate(labels) if label is None] if labels.dtype == object else []
        if missing:
            raise DataError(f"y: {len(missing)} labels are missing, the first in row {missing[0]}; drop these rows")
        check_classification_targets(labels)
        return labels

    def _checked_loss(self) -> Loss:
        if self.log_target:
            raise ArgumentError(
                "log_target: only numbers have logarithms, and y holds classes; leave it out, or take TableRegressor"
            )
        loss = as_loss(self.loss or "cross_entropy")
        if not loss.is_classification and loss.kind not in ("mse", "mae", "huber"):
            raise ArgumentError(
                f"loss: {loss.kind!r} is for numbers; a classifier takes cross_entropy, binary_cross_entropy, mse, mae "
                "or huber, and TableRegressor this one"
            )
        return loss

    def _read(self, *given: Any) -> tuple[Dataset, Array | None]:
        dataset, weight = super()._read(*given)
        self.classes_ = dataset.classes
        if len(self.classes_) < 2:
            raise DataError(f"y: it has one class, {self.classes_[0]}; a classifier needs two or more")
        if len(self.classes_) != 2 and as_loss(self.loss or "cross_entropy").kind == "binary_cross_entropy":
            raise ArgumentError(
                f"loss: 'binary_cross_entropy' is for two classes, and y has {len(self.classes_)}; use cross_entropy"
            )
        return dataset, weight

    def _take(self, engine: Engine, made: Preprocessor, notes: tuple[str, ...]) -> None:
        super()._take(engine, made, notes)
        if not hasattr(self, "classes_"):
            self.classes_ = np.array(made.classes)

    def _class_weights(self, labels: Array) -> Array | None:
        if self.class_weight is None:
            return None
        return np.asarray(compute_class_weight(self.class_weight, classes=self.classes_, y=labels))

    def predict(self, X: Any) -> Array:
        """Return the classes (n,) of a table's rows."""
        inputs = self._inputs(X)
        chosen: Array = self.classes_[predicted_codes(self.engine_, self.preprocessor_, inputs)]
        return chosen

    @available_if(_gives_probabilities)
    def predict_proba(self, X: Any) -> Array:
        """Return the probabilities (n, classes), in the order of ``classes_``; not with mse, mae and huber."""
        inputs = self._inputs(X)
        return self.engine_.predict_proba(inputs)

    @available_if(_gives_probabilities)
    def predict_set(self, X: Any, coverage: float = 0.9) -> Array:
        """Return bool (n, classes): sets of classes, which hold the true one for this share of new rows.

        By the errors of the rows that validated the training (``fusemlp.report.uncertainty``). Raises ArgumentError if
        there were none, or too few.
        """
        held = self._held_out_errors()
        return sets(self.predict_proba(X), held, coverage)


@dataclass(eq=False, repr=False)
class TableRegressor(RegressorMixin, _TableEstimator):
    """A network for one or several numbers of a table's rows, trained as ``fusemlp train`` trains it."""

    task = "regression"

    def _checked_targets(self, y: Any) -> Array:
        values: Array = _check_y(y, multi_output=True, y_numeric=True, estimator=self)
        return values.astype(np.float64)

    def _checked_loss(self) -> Loss:
        loss = as_loss(self.loss or "mse")
        if loss.is_classification:
            raise ArgumentError(
                f"loss: {loss.kind!r} is for classes; a regressor takes mse, mae, huber, quantile or poisson, and "
                "TableClassifier this one"
            )
        return loss

    def predict(self, X: Any, return_std: bool = False) -> Any:
        """Return the values (n,) or (n, targets) of a table's rows, in the units of y.

        With return_std return them and, of the same shape, the standard deviation of the predictions of an ensemble's
        models or a network's members; ArgumentError for a single model.
        """
        inputs = self._inputs(X)
        values = predictions(self.engine_, self.preprocessor_, inputs)
        if not return_std:
            return values
        return values, spread(members(self.engine_, "return_std"), self.preprocessor_, inputs, values)

    def predict_interval(self, X: Any, coverage: float = 0.9) -> tuple[Array, Array]:
        """Return the lower and the upper ends, shaped like ``predict``'s values, that hold this share of new targets.

        By the errors of the rows that validated the training (``fusemlp.report.uncertainty``); of several targets each
        for itself. Raises ArgumentError if there were none, or too few.
        """
        held = self._held_out_errors()
        return intervals(self.engine_, self.preprocessor_, self.predict(X), held, coverage)

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.target_tags.multi_output = True
        return tags
