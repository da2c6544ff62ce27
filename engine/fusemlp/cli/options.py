"""The options that several commands share, with their help.

``None`` stands for a default that depends on the task, the optimizer or the schedule.
"""

# ruff: noqa: RUF009 - the defaults are fields of dataclasses, made by `field_of`.

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import MISSING, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from fusemlp.callbacks.trackers import TRACKERS
from fusemlp.cli.choices import names_or_files, run_folders
from fusemlp.cli.fields import PANELS, field_of, one_of
from fusemlp.datasets.load import MOST_CLASSES, NAMES, TASKS
from fusemlp.datasets.prepare import CLASS_DECAY
from fusemlp.datasets.scaling import SCALES
from fusemlp.datasets.textfiles import Form
from fusemlp.describe.losses import LOSSES, Huber, Quantile
from fusemlp.describe.metrics import METRICS
from fusemlp.describe.network import INITS, SLOPES
from fusemlp.describe.optimizers import OPTIMIZERS, SGD, Adam, AdamW
from fusemlp.describe.schedules import SCHEDULES, ReduceOnPlateau, StepDecay
from fusemlp.report.runs import WEIGHTS
from fusemlp_kernels.contract import ACTIVATIONS

BACKENDS = ("auto", "triton", "cupy", "numpy")
PRECISIONS = ("fp32", "tf32", "bf16", "fp16", "fp64")
PLANS = ("auto", "eager", "graph", "resident")
# The quantities of each epoch, by which a training may be judged.
MONITORS = ("val_loss", "val_accuracy", *METRICS, "loss", "accuracy")

_SLOPES = one_of((f"{name} ({slope} unless given)" for name, slope in SLOPES.items()), "and")

_option, _data, _text, _network, _loss, _optimizer, _rate, _training, _machine, _output = (
    partial(field_of, panel) for panel in PANELS
)


@dataclass(frozen=True, kw_only=True)
class JsonOption:
    as_json: bool = _output(False, "Print the results as one JSON object.", names=("--json",))


@dataclass(frozen=True, kw_only=True)
class ForceOption:
    force: bool = _output(False, "Overwrite a file that exists.")


@dataclass(frozen=True, kw_only=True)
class MachineOptions:
    backend: str = _machine("auto", "{}; fusemlp doctor says which work here.", values=BACKENDS)
    device: str | None = _machine(None, "Which card, such as cuda:1.")


@dataclass(frozen=True, kw_only=True)
class StepOptions:
    """The options of a training step, as ``plan`` prints it."""

    activation: str = _network("relu", "{}; one, or one a hidden layer: relu,tanh.", values=ACTIVATIONS)
    slope: float | None = _network(None, f"Of {_SLOPES}; prelu's starts there.")
    output_activation: str = _network(
        "identity", "Of the output layer; the cross-entropies and poisson need identity.", values=ACTIVATIONS
    )
    dropout: str = _network(
        "0", "Probability of dropping a hidden unit in a training step; one, or one a hidden layer (0.2,0.5).", "RATE"
    )
    batch_size: int = _training(32, "Rows a step.")
    precision: str = _machine("fp32", "{}.", values=PRECISIONS)


@dataclass(frozen=True, kw_only=True)
class TableOptions:
    """The form of a .csv or .tsv file, recognised from its beginning unless given."""

    sep: str | None = _text(None, "Separator of the columns: one character, or tab; recognised unless given.", "MARK")
    decimal: str | None = _text(None, "Decimal mark of the numbers: . or , (recognised unless given).", "MARK")
    encoding: str | None = _text(None, "Encoding, such as utf-8, cp1252 or latin-1; recognised unless given.")
    header: bool = _text(
        True, "Names of columns in the first line, unless it holds numbers; else they are column_1, column_2, ..."
    )

    def form(self, run: Mapping[str, Any] | None = None) -> Form:
        """Return the form of a file; what is not given is that of the training, whose options are ``run``."""
        names = "sep", "decimal", "encoding"
        before = run or {}
        given = {name: getattr(self, name) or before.get(name) for name in names}
        # None: recognised
        return Form(**given, header=None if self.header and before.get("header", True) else False)


@dataclass(frozen=True, kw_only=True)
class ModelOptions(MachineOptions, StepOptions, TableOptions, JsonOption):
    """The options of ``train``, ``sweep`` and ``lr-find``: data, network, loss, optimizer and machine."""

    data: str | None = _option(
        None,
        f"A data set by name ({', '.join(NAMES)}) or a path: .npz with X and y, .csv or .tsv (also .csv.gz, .bz2, .xz, "
        ".zip), .parquet, .feather or .xlsx with --target, or a folder of IDX files.",
        "DATA",
        None,
        names_or_files(NAMES),
    )

    target: str | None = _data(None, "The column of a table to predict.", "COLUMN")
    task: str | None = _data(
        None,
        "{}. The default: words and at most "
        f"{MOST_CLASSES} different whole numbers are classes, unless they look like counts.",
        values=TASKS,
    )
    drop: list[str] | None = _data(None, "A column of a table to leave out; the option once for each.", "COLUMN")
    keep: list[str] | None = _data(
        None,
        "A column to keep although it is constant, counts the rows, or holds another word in nearly every row.",
        "COLUMN",
    )
    categorical: list[str] | None = _data(
        None, "A column to take as words, such as numbers that are zip codes.", "COLUMN"
    )
    id: list[str] | None = _data(
        None, "A column that names the rows: no input; predict writes it beside the predictions.", "COLUMN"
    )
    group: str | None = _data(
        None, "Hold out whole groups: rows with the same value in this column stay together. It is no input.", "COLUMN"
    )
    time: str | None = _data(
        None, "Hold out the last rows in the order of this column of dates or numbers, not random ones.", "COLUMN"
    )
    validation: str | None = _data(None, "A file with the validation rows, in the form of DATA.", "FILE")
    test: str | None = _data(None, "A file with the test rows; no fifth of DATA is held out then.", "FILE")
    scale: str | None = _data(
        None,
        "Features, by statistics of the training rows: robust (median 0, interquartile range 1, far values smoothly "
        "clipped), piecewise (each number cut into 16 pieces, 32 from 8,000 rows on, with an input for each), "
        "quantile (normal scores), "
        "standard (mean 0, variance 1), minmax (0 to 1) or none. The targets of a regression likewise, for the first "
        "three by standard. Unless given: robust, or for a table the better of the first two on held-out rows.",
        values=SCALES,
    )
    log_target: bool | None = _data(
        None,
        "Learn the logarithm of a positive target. Unless given: for a table whose skewed target held-out rows say it "
        "helps.",
    )
    validation_fraction: float = _data(0.1, "Validation's share of the rows beside the test rows; 0 for none.")
    split_seed: int | None = _data(None, "Seed of the split into training, validation, test rows; --seed unless given.")

    hidden: list[str] | None = _network(
        None,
        "Widths of the hidden layers, such as 128,64 (or the option once for each); none for no hidden layer. Unless "
        "given: one layer of 128.",
        "WIDTHS",
    )
    init: str = _network("auto", "Initial weights: {}; auto chooses by activation.", values=INITS)

    loss: str | None = _loss(
        None,
        "{}. Unless given: cross_entropy for classes, mse for numbers. binary_cross_entropy is for two "
        "classes; mse, mae and huber train classes as one-hot rows.",
        values=LOSSES,
    )
    label_smoothing: float | None = _loss(None, "For cross_entropy: weight of the uniform distribution in the target.")
    class_weight: str | None = _loss(
        None,
        "balanced (inversely to how often each class occurs in the training rows), or a number for each class: "
        "1,2.5,1.",
        "WEIGHTS",
        values=("balanced",),
    )
    delta: float | None = _loss(None, f"For huber: errors above this count linearly ({Huber.delta:g}).")
    quantile: float | None = _loss(None, f"For the loss quantile: the quantile to learn ({Quantile.q:g}).")

    optimizer: str = _optimizer("adam", "{}.", values=OPTIMIZERS)
    lr: float | None = _optimizer(
        None, f"Learning rate; {SGD.lr:g} for sgd, {Adam.lr:g} for adam and adamw unless given."
    )
    momentum: float | None = _optimizer(None, f"For sgd, 0 or more and less than 1 ({SGD.momentum:g}).")
    nesterov: bool = _optimizer(False, "For sgd: Nesterov's momentum.")
    weight_decay: float | None = _optimizer(
        None,
        f"L2 penalty for sgd and adam ({Adam.weight_decay:g}; adam on a table's classes {CLASS_DECAY:g}), decoupled "
        f"decay for adamw ({AdamW.weight_decay:g}).",
    )
    decay_biases: bool = _optimizer(True, "Whether weight decay acts on biases.")
    beta1: float | None = _optimizer(None, f"For adam and adamw: average of gradients ({Adam.betas[0]:g}).")
    beta2: float | None = _optimizer(None, f"For adam and adamw: average of their squares ({Adam.betas[1]:g}).")
    eps: float | None = _optimizer(None, f"For adam and adamw: epsilon ({Adam.eps:g}).")
    clip_norm: float | None = _optimizer(None, "Scale gradients with a greater global norm down to this norm.")
    ema: float = _optimizer(
        0.0,
        "Predict, validate and save with a moving average of the weights that has this decay, such as 0.99; 0: none.",
    )
    accumulate: int = _optimizer(1, "Batches whose gradients are averaged for one update.")

    seed: int = _training(0, "Seed of the split, the initial weights, dropout and row order.")
    plan: str = _machine("auto", "{}.", values=PLANS)


@dataclass(frozen=True, kw_only=True)
class FitOptions(ModelOptions):
    """The further options of ``train`` and ``sweep``: the schedule, the training and its output."""

    schedule: str = _rate("constant", "{}.", values=SCHEDULES)
    lr_step: float | None = _rate(None, "For step: epochs between two reductions.")
    lr_gamma: float | None = _rate(
        None,
        f"Factor on the rate: at each step ({StepDecay.gamma:g}), each epoch (exponential), on a plateau "
        f"({ReduceOnPlateau.factor:g}).",
    )
    lr_final: float | None = _rate(
        None, "The final rate of cosine and flat_cosine (0), one_cycle (lr / 250000); minimum of reduce_on_plateau (0)."
    )
    lr_patience: int | None = _rate(
        None,
        f"For reduce_on_plateau: epochs without a better --metric before a reduction ({ReduceOnPlateau.patience}).",
    )
    warmup: float = _rate(0.0, "Epochs (0.5: half of one) in which the rate grows linearly to the schedule's start.")

    epochs: int | None = _training(None, "Passes over the training rows at most; 60 unless given, 200 for a table.")
    early_stopping: int | None = _training(
        None,
        "Stop after this many epochs without a better --metric, and restore the best weights; 0 for no early stopping. "
        "20 unless given.",
        "EPOCHS",
    )
    metric: str | None = _training(
        None,
        "Score of each epoch by which training stops early, lowers the rate on a plateau and keeps the best weights, "
        f"and a sweep ranks: val_loss (default), val_accuracy, or of the validation rows {one_of(METRICS)}; loss or "
        "accuracy of the training rows.",
        values=MONITORS,
    )
    drop_last: bool = _training(False, "Leave out the last batch of an epoch if it is short.")

    out: str | None = _output(None, "The run folder, new or empty; runs/DATA-DATE-TIME unless given.", "DIR")
    quiet: bool = _output(False, "Show no progress; with --json only the last line.", names=("--quiet", "-q"))
    as_json: bool = _output(
        False,
        "Print JSON lines: an object at the start, for each epoch or model, and at the end.",
        names=("--json",),
    )
    track: str | None = _output(
        None,
        "Record the run, of a sweep each model, with {}; their own variables, such as "
        "MLFLOW_TRACKING_URI or WANDB_MODE, say where.",
        "TRACKER",
        values=TRACKERS,
    )


@dataclass(frozen=True, kw_only=True)
class RunOptions(JsonOption):
    """The options of the commands that use the model of a run."""

    run: Path = _option(MISSING, "A run folder from train.", "RUN", None, run_folders)
    weights: str = _option(
        "model",
        "The run's weights: model (end of training), best (best epoch by --metric) or last (last checkpoint).",
        values=WEIGHTS,
    )


@dataclass(frozen=True, kw_only=True)
class UseOptions(RunOptions, MachineOptions):
    """The options of the commands that compute with the model of a run."""


@dataclass(frozen=True, kw_only=True)
class ApplyOptions(UseOptions, TableOptions):
    """The options of the commands that read other data for the model of a run."""

    ignore_unused: bool = _option(
        False, "Do not mention columns that the training did not have; they are ignored in any case."
    )

    def reading(self, config: Mapping[str, Any], notes: list[str]) -> dict[str, Any]:
        """Return the arguments that read other data as a run's were read; ``notes`` takes lines on them."""
        return {"form": self.form(config["options"]), "notes": notes, "ignore_unused": self.ignore_unused}
