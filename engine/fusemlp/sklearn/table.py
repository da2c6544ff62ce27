"""Estimators of whole tables: the recipe of ``fusemlp.tables`` as parameters.

With the same rows, options and seed, an estimator has the model of the command line.
"""

from __future__ import annotations

import logging
import re
import textwrap
import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import Field, asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np
from sklearn.base import BaseEstimator, ClassifierMixin, RegressorMixin
from sklearn.utils import check_array, check_random_state
from sklearn.utils.metaestimators import available_if
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import _check_sample_weight, _check_y, check_is_fitted

from fusemlp.callbacks import ProgressBar
from fusemlp.datasets.dataset import check_labels
from fusemlp.datasets.load import load_features
from fusemlp.datasets.preprocessing import Preprocessor
from fusemlp.datasets.rows import network_inputs
from fusemlp.describe import checks, conflicts, description, losses, network
from fusemlp.describe.checks import AUTO
from fusemlp.describe.metrics import METRICS, Judged
from fusemlp.engine import knows_names_of_predict, load_checkpoint
from fusemlp.fleet.results import members
from fusemlp.inputs.arrays import Array
from fusemlp.report import metrics, onnx, runs
from fusemlp.report.evidence import Importance, certify
from fusemlp.report.explanations import METHODS, Attributions, column_attributions, permutation_importance
from fusemlp.report.uncertainty import HeldOut, intervals, sets, spread
from fusemlp.runtime.files import CHECKPOINT, reading_file
from fusemlp.sklearn.model import read_estimator, save_estimator
from fusemlp.sklearn.table_rows import as_table, form_of, read, with_target, with_validation
from fusemlp.tables import transfer
from fusemlp.tables.recipe import DEFAULT_WIDTH, TABLE_EPOCHS, TABM, WAITS, TableRecipe, name_of
from fusemlp.tables.training import Listeners, Trained, report_of, train_table
from fusemlp.training.trainer import History
from fusemlp_kernels.errors import ArgumentError, unknown_name

log = logging.getLogger("fusemlp.sklearn")

# Help for parameters that the command line lacks or words otherwise.
_HELP = {
    "activation": "One for all hidden layers, or one for each: names, or objects such as LeakyReLU(0.1).",
    "dropout": "Probability of dropping a hidden unit in a training step; one, or one for each hidden layer.",
    "drop": "Names of columns to leave out; those of an array are x0, x1, ...",
    "missing": "Words and numbers that stand for missing cells, beside None and NaN, such as ('unknown', -999).",
    "loss": "A name, or an object such as Huber(2.0); None is cross_entropy for classes, mse for numbers.",
    "optimizer": "A name, or an object such as AdamW(weight_decay=0.1).",
    "lr": "A number, or a schedule such as Cosine(0.01); None leaves the optimizer's own.",
    "adversarial": "pgd, fgsm or ibp with attack_eps, or an object such as PGD(0.1): train against this attack. "
    "For inputs that are numbers. Trains one model.",
    "hidden": "Widths of the hidden layers; () for none.",
    "early_stopping": "Stop after this many epochs without a better metric of the held-out rows, and restore the best "
    f"weights; None holds out no rows. 'auto': {WAITS}, {TABM['early_stopping']} with the preset tabm.",
    "epochs": "Passes over the training rows at most.",
    "test_fraction": "The share of the rows that judge the model at the end, in report_; 0 for none.",
    "validation_fraction": "The share of the rows that early stopping holds out, unless fit gets X_val and y_val. "
    "Fewer rows than that needs are all trained on, for all epochs.",
    "class_weight": "None, 'balanced', a number for each class, or a dict from class to weight.",
    "random_state": "Seed of held-out rows, initial weights, dropout and the order of the rows.",
    "callbacks": "Objects like fusemlp.Callback, for one model.",
    "verbose": "Show a progress bar, or a line a model.",
}
_ATTRIBUTES = """Attributes: ``engine_``, ``preprocessor_``, ``history_``, ``n_iter_`` (epochs), ``notes_`` (lines on
what became of the columns), ``held_out_`` (errors of the rows that validated the training, or None), ``temperature_``
(the number by which these rows had the logits of classes divided, 1.0 for none), ``report_`` (with ``test_fraction``:
scores, baselines and diagnosis), ``n_features_in_`` and, if X has names, ``feature_names_in_``."""


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class TableParameters(TableRecipe):
    """The recipe with scikit-learn's names and defaults."""

    hidden: Any = (DEFAULT_WIDTH,)
    dropout: Any = 0.0
    drop: Any = ()
    keep: Any = ()
    categorical: Any = ()
    missing: Any = ()
    test_fraction: float = 0.0
    epochs: int = TABLE_EPOCHS
    early_stopping: Any = AUTO
    # random_state takes its place
    seed: ClassVar[int] = 0  # type: ignore[misc]
    random_state: Any = 0
    callbacks: Any = None
    verbose: bool = False


def _described(field: Field[Any]) -> str:
    """Return a parameter's line of the documentation: the help of the option, with the names of parameters."""
    options = {option.name: option for option in fields(TableRecipe)}
    words = _HELP[field.name] if field.name in _HELP else options[field.name].metadata["help"]
    names = {f"--{name_of(option)}": name for name, option in options.items()} | {
        "--seed": "random_state",
        "--validation": "X_val",
    }
    text = re.sub(r"--[a-z][a-z-]*", lambda match: names.get(match[0], match[0]), words)
    return textwrap.fill(f"{field.name} : {text}", 120, subsequent_indent="    ", break_on_hyphens=False)


class TableEstimator(BaseEstimator, TableParameters, ABC):
    """Trains, judges, explains and stores; the classifier and the regressor predict."""

    task: ClassVar[str]
    # parameters and what is fitted are set as usual
    __setattr__ = object.__setattr__
    __delattr__ = object.__delattr__
    __eq__ = object.__eq__
    __hash__ = object.__hash__

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        parameters = "\n".join(map(_described, fields(cls)))
        # Python's -OO leaves no documentation
        cls.__doc__ = f"{(cls.__doc__ or '').rstrip()}\n\n{parameters}\n\n{_ATTRIBUTES}"

    @classmethod
    def _get_param_names(cls) -> list[str]:
        return sorted(field.name for field in fields(cls))

    @abstractmethod
    def _checked_targets(self, y: Any) -> Array:
        """Return labels (n,), or values (n,) or (n, targets), of rows that have one."""

    def fit(self, X: Any, y: Any, sample_weight: Any = None, *, X_val: Any = None, y_val: Any = None) -> Self:
        """Fit to a table X and its targets y: labels (n,), or values (n,) or (n, targets).

        X: a data frame of pandas or polars, an Arrow table, rows as mappings, or an array (n, columns); cells may be
        missing. Later tables may have their columns in any order, and others among them. Rows without a target are left
        out, with a line in ``notes_``. sample_weight (n,): a row of weight 0 counts as left out. X_val, y_val: rows for
        early stopping in place of held-out ones.

        Raises ArgumentError, ArgumentTypeError, DataError (all mistakes of the table in one message) before anything
        has changed, DivergenceError when the loss is no longer finite.
        """
        before = self.__dict__.copy()
        try:
            trained = self._trained(X, y, sample_weight, X_val, y_val)
        except BaseException:
            self.__dict__ = before
            raise
        if trained.interrupted:
            warnings.warn("Training interrupted by user.", stacklevel=2)
        self.report_ = report_of(trained)[0] if self.test_fraction else {}
        prepared, temperature = trained.prepared, trained.temperature
        self.engine_ = trained.engine if trained.final is None else trained.final[0]
        self.preprocessor_, self.notes_ = prepared.preprocessor, prepared.notes
        self.held_out_, self.temperature_ = trained.held_out, 1.0 if temperature is None else temperature.value
        _tell(self.notes_)
        return self

    def _trained(self, X: Any, y: Any, sample_weight: Any, X_val: Any, y_val: Any) -> Trained:
        """Check the arguments, and train by the recipe of the parameters."""
        if (X_val is None) != (y_val is None):
            missing = "y_val" if y_val is None else "X_val"
            raise ArgumentError(f"{missing}: it is missing; X_val and y_val belong together")
        if y is None:
            # scikit-learn's words
            raise ArgumentError(f"y: {type(self).__name__} requires y to be passed, but the target y is None")
        if self.callbacks and (self.models or 1) > 1:
            raise ArgumentError(f"callbacks: they see the epochs of one model, got models={self.models}; leave one out")
        recipe = self._recipe()
        source = transfer.opened(recipe)
        like = None if source is None else source.preprocessor
        dataset = read(self, X, y, self._checked_targets, sample_weight, like)
        if self.task == "classification":
            self.classes_ = np.array(dataset.targets) if dataset.y.ndim == 2 else dataset.classes
        if X_val is not None:
            dataset = with_validation(dataset, self, X_val, y_val, self._checked_targets)
        elif recipe.early_stopping == 0:
            recipe = replace(recipe, validation_fraction=0.0)
        callbacks = [*(self.callbacks or ()), *([ProgressBar()] if self.verbose else [])]
        listeners = Listeners(callbacks, print if self.verbose else None)
        return train_table(recipe, dataset, source=source, listeners=listeners)

    def _recipe(self) -> TableRecipe:
        """Return the recipe that the parameters are."""
        names = {field.name for field in fields(TableRecipe)} - {"seed"}
        values = {name: getattr(self, name) for name in names}
        # the recipe's words for the same, which its presets know
        values |= {name: values[name] or None for name in ("drop", "keep", "categorical")}
        values["hidden"] = None if values["hidden"] == (DEFAULT_WIDTH,) else values["hidden"]
        values["early_stopping"] = None if self.early_stopping == AUTO else self.early_stopping or 0
        values["models"] = 1 if self.callbacks else self.models
        return TableRecipe(**values, seed=self._seed())

    def _seed(self) -> int:
        """Return the seed that ``random_state`` is or draws."""
        if isinstance(self.random_state, int | np.integer):
            return checks.as_count("random_state", self.random_state, minimum=0)
        return int(check_random_state(self.random_state).randint(np.iinfo(np.int32).max))

    @classmethod
    def from_run(
        cls, run: str | Path, *, weights: str = "model", backend: str = "auto", device: str | None = None
    ) -> Self:
        """Return the fitted estimator of a run folder of ``fusemlp train`` or ``fusemlp sweep``.

        ``weights``: model (end of training), best (least validation loss) or last. Raises ArgumentError for a run of
        the other task, CheckpointError for what is no run.
        """
        folder, config = runs.open_run(run)
        preprocessor = Preprocessor.from_config(config["preprocessor"])
        if (task := preprocessor.task) != cls.task and {task, cls.task} != {"multilabel", "classification"}:
            raise ArgumentError(f"run: {str(run)!r} is of a {task}, and {cls.__name__} is for a {cls.task}")
        engine = load_checkpoint(runs.weights_path(folder, weights), backend=backend, device=device)
        if engine.history is None:
            # A merged model has no record of its own.
            engine.history = History()
            for row in runs.read_metrics(folder):
                engine.history.record(int(row.pop("epoch")) - 1, row, 0.0)
        # that of one model, where several were merged
        net, options = network.MLP.from_config(config["network"]), config["options"]
        of_rows = ("drop", "keep", "categorical", "group", "time", "weight", "validation_fraction")
        chosen = {name: options[name] for name in (*of_rows, "metric", "time_limit") if name in options}
        estimator = cls(
            preset="tabm" if net.members > 1 else None,
            hidden=net.sizes[1:-1],
            **net.hidden_arguments(),
            loss=engine.loss,
            optimizer=engine.optimizer,
            batch_size=engine.batch_size,
            epochs=config["epochs"],
            # The command line's 0 is None here.
            early_stopping=None if (patience := options.get("early_stopping")) == 0 else patience or AUTO,
            models=options.get("models") or 1,
            scale=preprocessor.scale,
            missing=preprocessor.missing_words,
            log_target=preprocessor.target_log if task == "regression" else None,
            random_state=engine.seed,
            backend=backend,
            precision=engine.precision,
            **chosen,
        )
        report = runs.read_json(folder.report)
        estimator.engine_, estimator.preprocessor_ = engine, preprocessor
        estimator.notes_, estimator.report_ = tuple(config["data"]["notes"]), report
        estimator.held_out_ = (
            description.stored("held_out", report["held_out"], HeldOut) if "held_out" in report else None
        )
        estimator.temperature_ = report.get("temperature", 1.0)
        if task != "regression":
            estimator.classes_ = np.array(preprocessor.classes or preprocessor.targets)
        estimator.feature_names_in_ = np.array(list(dict.fromkeys(preprocessor.sources)), object)
        estimator.n_features_in_ = len(estimator.feature_names_in_)
        return estimator

    def _inputs(self, X: Any) -> Any:
        """Return the network's inputs of a table's rows."""
        check_is_fitted(self)
        notes: list[str] = []
        features = load_features(as_table(self, X), self.preprocessor_, form=form_of(self), notes=notes)
        _tell(notes)
        codes = self.engine_.inputs.reads_codes
        return network_inputs(self.preprocessor_, features, self.engine_.precision, codes=codes)

    def _scored_rows(self, X: Any, y: Any, sample_weight: Any) -> tuple[Array, Array, Array | None]:
        """Return the indices of the rows that have a target, these targets, and their weights."""
        kept, truth = with_target(as_table(self, X).table, y, self._checked_targets, [])
        return kept, truth, None if sample_weight is None else _check_sample_weight(sample_weight, y)[kept]

    def _labelled(self, X: Any, y: Any) -> tuple[Array, Array]:
        """Return the features and the labels of rows as in the data."""
        frame, notes = as_table(self, X), list[str]()
        kept, labels = with_target(frame.table, y, self._checked_targets, notes)
        _tell(notes)
        return load_features(frame, self.preprocessor_, form=form_of(self))[kept], labels

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
        checks.check_choice("method", method, ("permutation", *METHODS))
        if method == "permutation" and y is None:
            raise ArgumentError("y: permutation needs the targets, explain(X, y); or choose method='integrated'")
        if method != "permutation" and y is not None:
            raise ArgumentError(f"y: the method {method!r} reads no targets; leave it out")
        if y is not None:
            return permutation_importance(self.engine_, self.preprocessor_, *self._labelled(X, y), **options)
        rows, labels = None if background is None else self._inputs(background), self.preprocessor_.labels
        if isinstance(output := options.get("output"), str) and labels:
            if output not in labels:
                raise unknown_name("output", output, labels)
            options["output"] = labels.index(output)
        options |= {"method": method, "background": rows}
        return column_attributions(self.engine_, self.preprocessor_, self._inputs(X), **options)

    def certify(self, X: Any, y: Any, eps: float) -> dict[str, float]:
        """Return the share of rows that are predicted right however their numbers move by ``eps`` at most.

        ``eps`` counts in units of the scaled inputs; words, dates and missing cells do not move. Returns {"eps": ...,
        "accuracy": ...}, or of a regressor {"eps": ..., "width": ...}, the mean width of a prediction's bounds.
        """
        check_is_fitted(self)
        return certify(self.engine_, self.preprocessor_, *self._labelled(X, y), eps)

    def _held_out_errors(self) -> HeldOut:
        check_is_fitted(self)
        if self.preprocessor_.task == "multilabel":
            raise ArgumentError(
                "coverage: several labels a row have no sets; predict_proba has the probability of each"
            )
        if self.held_out_ is None:
            raise ArgumentError("coverage: no held-out rows came with fit; fit with early_stopping, or X_val and y_val")
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
        onnx.to_onnx(self.engine_, path, preprocessor=self.preprocessor_)

    def save(self, path: str | Path) -> None:
        """Write the fitted estimator to one safetensors file, without pickle; ``load`` reads it.

        The file is a checkpoint of the network too, for ``fusemlp.load_checkpoint``. ``callbacks``, metadata requests
        and a ``random_state`` that is no number are left out.

        Raises ArgumentError, ArgumentTypeError for an impossible path or parameter of a file, OSError from the disk.
        """
        check_is_fitted(self)
        # a merged or opened model has a record that its checkpoint lacks
        record = asdict(self.history_) if self.engine_.fit_state is None else None
        held = None if self.held_out_ is None else self.held_out_.to_config()
        more = {"preprocessor": self.preprocessor_.to_json(), "history": record, "held_out": held}
        without = ("engine_", "preprocessor_", "held_out_", "_metadata_request")
        save_estimator(self, self.engine_, path, without=without, **more)

    @classmethod
    def load(cls, path: str | Path, *, backend: str = "auto", device: str | None = None) -> Self:
        """Return the estimator that ``save`` wrote, on any backend. Raises CheckpointError for any other file."""
        estimator, beside, _ = read_estimator(cls, path)
        estimator.engine_ = load_checkpoint(path, backend=backend, device=device)
        with reading_file(path, CHECKPOINT):
            estimator.preprocessor_ = Preprocessor.from_json(beside["preprocessor"])
            estimator.held_out_ = description.stored("held_out", beside["held_out"], HeldOut | None)
            if beside["history"] is not None:
                estimator.engine_.history = description.stored("history", beside["history"], History)
        return estimator

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.input_tags.allow_nan = True
        tags.input_tags.string = True
        tags.input_tags.categorical = True
        tags.non_deterministic = self.random_state is None
        return tags


# Said of partial_fit and warm_start.
RETRAINED = "fit(X, y) takes old and new rows together, and transfer_from='runs/...' starts from a trained run"


def _tell(notes: Iterable[str]) -> None:
    for note in notes:
        log.info("%s", note)


def _gives_probabilities(estimator: Any) -> bool:
    loss = losses.as_loss(estimator.loss or "cross_entropy")
    if not loss.is_classification:
        raise AttributeError(f"predict_proba needs the loss cross_entropy or binary_cross_entropy, not {loss.kind}")
    return True


class TableClassifier(ClassifierMixin, TableEstimator):
    """A network for the classes of a table's rows, trained as ``fusemlp train`` trains it.

    With y (n, labels) of 0 and 1 or truth values it learns several labels a row, a DataFrame's with their names.
    """

    task = "classification"

    def _checked_targets(self, y: Any) -> Array:
        if np.ndim(y) == 2 and np.shape(y)[1] > 1:
            return check_labels("y", np.asarray(y))
        labels: Array = _check_y(y, estimator=self)
        check_classification_targets(labels)
        return labels

    def predict(self, X: Any) -> Array:
        """Return the classes (n,) of a table's rows, or 0 and 1 for several labels (n, labels)."""
        inputs = self._inputs(X)
        codes = metrics.predicted_codes(self.engine_, self.preprocessor_, inputs)
        return codes if self.preprocessor_.classes is None else np.asarray(self.classes_[codes])

    def score(self, X: Any, y: Any, sample_weight: Any = None) -> float:
        """Return the accuracy on the rows that have a label, of several the share of rows with all labels right."""
        from sklearn.metrics import accuracy_score

        kept, truth, weight = self._scored_rows(X, y, sample_weight)
        return float(accuracy_score(truth, self.predict(X)[kept], sample_weight=weight))

    @available_if(_gives_probabilities)
    @knows_names_of_predict(call="predict_proba(X)")
    def predict_proba(self, X: Any) -> Array:
        """Return the probabilities (n, classes), or (n, labels), in the order of ``classes_``.

        Not with the losses mse, mae and huber.
        """
        inputs = self._inputs(X)
        return self.engine_.predict_proba(inputs)

    @available_if(_gives_probabilities)
    def predict_set(self, X: Any, coverage: float = 0.9) -> Array:
        """Return bool (n, classes): sets of classes, which hold the true one for this share of new rows.

        By the errors of rows that validated the training (``report.uncertainty``); ArgumentError if they were too few.
        """
        held = self._held_out_errors()
        return sets(self.predict_proba(X), held, coverage)

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.classifier_tags.multi_label = True
        return tags


class TableRegressor(RegressorMixin, TableEstimator):
    """A network for one or several numbers of a table's rows, trained as ``fusemlp train`` trains it."""

    task = "regression"

    def _checked_targets(self, y: Any) -> Array:
        # of several targets some may be missing
        checked = check_array(y, ensure_2d=False, ensure_all_finite="allow-nan", input_name="y", estimator=self)
        return np.asarray(checked, np.float64)

    def predict(self, X: Any, return_std: bool = False) -> Any:
        """Return the values (n,) or (n, targets) of a table's rows, in the units of y.

        With return_std return them and, of the same shape, their standard deviation: that of the loss gaussian, or of
        the predictions of an ensemble's models or a network's members; ArgumentError for another single model.
        """
        inputs = self._inputs(X)
        if return_std and self.engine_.loss.kind == "gaussian":
            return tuple(metrics.distribution(self.engine_, self.preprocessor_, inputs).values())
        values = metrics.predictions(self.engine_, self.preprocessor_, inputs)
        if not return_std:
            return values
        conflicts.check_together({**self.engine_.loss.uses, "return_std": True})
        return values, spread(members(self.engine_, "return_std"), self.preprocessor_, inputs, values)

    def score(self, X: Any, y: Any, sample_weight: Any = None) -> float:
        """Return R2 of the rows that have a target; of several targets the mean, each of the rows that have it."""
        kept, truth, weight = self._scored_rows(X, y, sample_weight)
        truth, predicted = (part.reshape(len(kept), -1) for part in (truth, self.predict(X)[kept]))
        return METRICS["r2"].of_rows(Judged(truth, predicted, weight=weight))

    def predict_quantiles(self, X: Any) -> Array:
        """Return the quantiles (n, Q) of a table's rows, with the loss quantiles; they never cross."""
        if self.engine_.loss.kind != "quantiles":
            raise ArgumentError(f"loss: expected 'quantiles', the model was trained with {self.engine_.loss.kind!r}")
        return np.column_stack([*metrics.distribution(self.engine_, self.preprocessor_, self._inputs(X)).values()])

    def predict_interval(self, X: Any, coverage: float = 0.9) -> tuple[Array, Array]:
        """Return the lower and the upper ends, shaped like ``predict``'s values, that hold this share of new targets.

        By the errors of the rows that validated the training (``fusemlp.report.uncertainty``); of several targets each
        for itself. Raises ArgumentError if there were none, or too few.
        """
        held = self._held_out_errors()
        return intervals(self.engine_, self.preprocessor_, self._inputs(X), held, coverage)

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.target_tags.multi_output = True
        return tags
