"""Estimators of whole tables: they read the columns, prepare and train as ``fusemlp train`` does.

The columns are told and turned into numbers by ``fusemlp.datasets``, and an ``Engine`` trains: with the same rows,
options and seed, an estimator has the model of the command line.
"""

from __future__ import annotations

import json
import logging
from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Self

import numpy as np
from sklearn.base import BaseEstimator, ClassifierMixin, RegressorMixin
from sklearn.utils import check_consistent_length
from sklearn.utils.class_weight import compute_class_weight
from sklearn.utils.metaestimators import available_if
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import _check_y, check_is_fitted

from fusemlp.datasets.dataset import Dataset
from fusemlp.datasets.load import load_features
from fusemlp.datasets.prepare import network_inputs
from fusemlp.datasets.preprocessing import Preprocessor
from fusemlp.describe.checks import check_choice
from fusemlp.describe.description import stored
from fusemlp.describe.losses import Loss, as_loss
from fusemlp.describe.network import MLP
from fusemlp.engine import load_checkpoint
from fusemlp.fleet.merge import members
from fusemlp.inputs.arrays import Array
from fusemlp.report.evidence import Importance
from fusemlp.report.explanations import METHODS, Attributions, column_attributions, permutation_importance
from fusemlp.report.metrics import predicted_codes, predictions
from fusemlp.report.onnx import to_onnx
from fusemlp.report.robustness import certify
from fusemlp.report.runs import open_run, read_metrics, weights_path
from fusemlp.report.uncertainty import HeldOut, intervals, sets, spread
from fusemlp.runtime.files import CHECKPOINT, reading_file
from fusemlp.sklearn import saving
from fusemlp.sklearn.table_rows import as_table
from fusemlp.sklearn.table_settings import TableParameters
from fusemlp.sklearn.table_training import Fitted, fitted
from fusemlp.training.history import History
from fusemlp_kernels.errors import ArgumentError, DataError, unknown_name

log = logging.getLogger("fusemlp.sklearn")


class TableEstimator(TableParameters, BaseEstimator, ABC):
    """Trains, judges, explains and stores; the classifier and the regressor predict."""

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
            self._take(fitted(self, X, y, sample_weight, X_val, y_val))
        except BaseException:
            self.__dict__ = before
            raise
        _tell(self.notes_)
        return self

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
        of_rows = ("drop", "keep", "categorical", "group", "time", "validation_fraction")
        of_training = ("early_stopping", "metric", "time_limit")
        estimator.set_params(**{name: options[name] for name in (*of_rows, *of_training) if name in options})
        # The command line's 0 is None here.
        estimator.early_stopping = estimator.early_stopping or None
        told = json.loads(opened.report.read_text(encoding="utf-8")) if opened.report.exists() else {}
        held = HeldOut.from_config(told["held_out"]) if "held_out" in told else None
        notes = tuple(config["data"]["notes"])
        estimator._take(Fitted(engine, made, notes, held, told.get("temperature", 1.0)))
        estimator.feature_names_in_ = np.array(list(dict.fromkeys(made.sources)), object)
        estimator.n_features_in_ = len(estimator.feature_names_in_)
        return estimator

    def _find_classes(self, dataset: Dataset) -> None:
        """Set the classes of a data set; raise an error for those that the parameters do not go with."""

    def _take(self, found: Fitted) -> None:
        """Set what is fitted."""
        self.engine_, self.preprocessor_, self.notes_, self.held_out_, self.temperature_ = found

    def _inputs(self, X: Any) -> Array:
        """Return the network's inputs of a table's rows."""
        check_is_fitted(self)
        notes: list[str] = []
        features = load_features(as_table(self, X), self.preprocessor_, notes=notes)
        _tell(notes)
        return network_inputs(self.preprocessor_, features, self.engine_.precision)

    def _labelled(self, X: Any, y: Any) -> tuple[Array, Array]:
        """Return the features and the labels of rows as in the data."""
        features, labels = load_features(as_table(self, X), self.preprocessor_), self._checked_targets(y)
        check_consistent_length(features, labels)
        return features, labels

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
            return permutation_importance(self.engine_, made, *self._labelled(X, y), **options)
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
        return certify(self.engine_, self.preprocessor_, *self._labelled(X, y), eps)

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
        with reading_file(path, CHECKPOINT):
            estimator.preprocessor_ = Preprocessor.from_json(beside["preprocessor"])
            estimator.held_out_ = stored("held_out", beside["held_out"], HeldOut | None)
            if beside["history"] is not None:
                estimator.engine_.history = stored("history", beside["history"], History)
        made: Self = estimator
        return made

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.input_tags.allow_nan = True
        tags.input_tags.string = True
        tags.input_tags.categorical = True
        tags.non_deterministic = self.random_state is None
        return tags


def _tell(notes: Iterable[str]) -> None:
    for note in notes:
        log.info("%s", note)


def _gives_probabilities(estimator: Any) -> bool:
    loss = as_loss(estimator.loss or "cross_entropy")
    if not loss.is_classification:
        raise AttributeError(f"predict_proba needs the loss cross_entropy or binary_cross_entropy, not {loss.kind}")
    return True


@dataclass(eq=False, repr=False)
class TableClassifier(ClassifierMixin, TableEstimator):
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

    def _find_classes(self, dataset: Dataset) -> None:
        self.classes_ = dataset.classes
        if len(self.classes_) < 2:
            raise DataError(f"y: it has one class, {self.classes_[0]}; a classifier needs two or more")
        if len(self.classes_) != 2 and as_loss(self.loss or "cross_entropy").kind == "binary_cross_entropy":
            raise ArgumentError(
                f"loss: 'binary_cross_entropy' is for two classes, and y has {len(self.classes_)}; use cross_entropy"
            )

    def _take(self, found: Fitted) -> None:
        super()._take(found)
        if not hasattr(self, "classes_"):
            self.classes_ = np.array(found.preprocessor.classes)

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
class TableRegressor(RegressorMixin, TableEstimator):
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
