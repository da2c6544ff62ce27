"""The defaults of a training, chosen on the development half of ``python -m bench tables``."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TypeVar

from fusemlp.cli.commands import TrainOptions
from fusemlp.cli.options import FitOptions, ModelOptions
from fusemlp.datasets.load import Dataset
from fusemlp.datasets.prepare import CLASS_DECAY
from fusemlp.datasets.sources import is_table
from fusemlp.describe.checks import as_count
from fusemlp.fleet.merge import default_models

Fit = TypeVar("Fit", bound=FitOptions)

# Epochs of a table at most, and those without a better validation loss after which training stops.
EPOCHS, PATIENCE = 200, 20


def filled_in(options: Fit) -> Fit:
    """Return the options with early stopping, and a table's epochs, where they are not given."""
    validates = options.validation_fraction != 0 or getattr(options, "validation", None) is not None
    certifies = getattr(options, "adversarial", None) == "ibp"
    stops = options.early_stopping is None and validates and not certifies
    many = options.epochs is None and is_a_table(options) and not (certifies or is_private(options))
    return replace(
        options,
        epochs=EPOCHS if many else options.epochs,
        early_stopping=PATIENCE if stops else options.early_stopping,
    )


def is_a_table(options: ModelOptions) -> bool:
    """Return whether the options train on a file that holds a table."""
    return options.data is not None and is_table(Path(options.data))


def weight_decay(options: ModelOptions, dataset: Dataset) -> float | None:
    """Return the weight decay of the options, or the default for this task; None stands for the optimizer's."""
    classes = dataset.task == "classification" and options.optimizer == "adam" and is_a_table(options)
    return CLASS_DECAY if options.weight_decay is None and classes else options.weight_decay


def is_private(options: ModelOptions) -> bool:
    """Return whether the options train with differential privacy."""
    return isinstance(options, TrainOptions) and options.dp_epsilon is not None


def trains_plainly(options: ModelOptions) -> bool:
    """Return whether small trainings may decide for the options: not with privacy, and not against attacks."""
    return not is_private(options) and getattr(options, "adversarial", None) is None


def models_of(options: ModelOptions, dataset: Dataset, *, new: bool) -> int:
    """Return the number of models that the options train on a data set; a ``new`` training takes the default."""
    if not isinstance(options, TrainOptions):
        return 1
    if options.models is not None:
        return as_count("models", options.models)
    merges = new and is_a_table(options) and trains_plainly(options)
    return default_models(len(dataset.y), options.activation.split(",")) if merges else 1
