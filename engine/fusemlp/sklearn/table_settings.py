"""The parameters of the estimators of tables: the seed, columns, network, optimizer and recipe that they describe."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np
from sklearn.utils import check_random_state

from fusemlp.datasets.prepare import CLASS_DECAY
from fusemlp.datasets.roles import Columns
from fusemlp.describe import presets
from fusemlp.describe.checks import as_count
from fusemlp.describe.network import MLP
from fusemlp.describe.optimizers import Optimizer, as_optimizer
from fusemlp.fleet.merge import default_models


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

    task: ClassVar[str]

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


def seed(estimator: TableParameters) -> int:
    """Return the seed that ``random_state`` is or draws."""
    if isinstance(estimator.random_state, int | np.integer):
        return as_count("random_state", estimator.random_state, minimum=0)
    return int(check_random_state(estimator.random_state).randint(np.iinfo(np.int32).max))


def columns(estimator: TableParameters) -> Columns:
    """Return what is to become of the columns; one name stands for a list of it."""
    given = estimator.drop, estimator.keep, estimator.categorical
    drop, keep, words = ([one] if isinstance(one, str) else [str(name) for name in one or ()] for one in given)
    return Columns(drop, keep, words, group=estimator.group, time=estimator.time)


def network(estimator: TableParameters, ends: tuple[int, int], members: int = 1) -> MLP:
    """Return the network with these widths of its first and last layer."""
    first, last = ends
    widths = (first, *_widths(estimator), last)
    return MLP(widths, activation=estimator.activation, dropout=estimator.dropout, members=members)


def _widths(estimator: TableParameters) -> tuple[int, ...]:
    given = estimator.hidden if isinstance(estimator.hidden, Iterable) else [estimator.hidden]
    return tuple(as_count("hidden", width) for width in given)


def _activations(estimator: TableParameters) -> list[str]:
    net = MLP((1, *_widths(estimator), 1), activation=estimator.activation)
    return [one.name for one in net.activations]


def optimizer(estimator: TableParameters) -> Optimizer:
    """Return the optimizer with the rate ``lr``; Adam's default decay for classes."""
    # each optimizer has a rate
    changes: Any = {} if estimator.lr is None else {"lr": estimator.lr}
    if estimator.optimizer == "adam" and estimator.task == "classification":
        changes["weight_decay"] = CLASS_DECAY
    return replace(as_optimizer(estimator.optimizer), **changes)


def models(estimator: TableParameters, rows: int) -> int:
    """Return the number of models that a table of this many rows trains."""
    if estimator.models is not None:
        return as_count("models", estimator.models)
    activations = _activations(estimator)
    return 1 if estimator.callbacks else default_models(rows, activations)


def with_preset(estimator: Any, rows: int, notes: list[str]) -> tuple[Any, int]:
    """Return the estimator with the parameters of its recipe, and the number of members; the choice goes to
    ``notes``."""
    widths, usual = _widths(estimator), TableParameters()
    given = {name: getattr(estimator, name) != getattr(usual, name) for name in presets.TABM if name != "hidden"}
    given["hidden"] = widths != usual.hidden
    against = presets.obstacles(estimator, activations=_activations(estimator), widths=widths)
    own = any(given.values()) or estimator.models is not None or estimator.time_limit is not None
    classify = estimator.task == "classification"
    name, note = presets.chosen(estimator.preset, rows, against, classify=classify, own=own)
    notes += [note] if note else []
    if name == "plain":
        return estimator, 1
    return copy.copy(estimator).set_params(models=1, **presets.changes(given, rows)), presets.MEMBERS
