"""The options of each command; a dataclass is a command's signature, its docstring the command's help.

Those of a training are the fields of ``fusemlp.tables.recipe``.
"""

# ruff: noqa: RUF009 - the defaults are fields of dataclasses, made by `field_of`.

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import MISSING, dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Any, Self

from fusemlp.callbacks.loggers import TRACKERS
from fusemlp.datasets.load import MOST_CLASSES, NAMES, TASKS
from fusemlp.datasets.textfiles import Form
from fusemlp.describe import adversarial, losses, metrics, optimizers
from fusemlp.program.program import REDUCTIONS
from fusemlp.report.explanations import METHODS
from fusemlp.report.runs import WEIGHTS
from fusemlp.tables import recipe
from fusemlp_kernels.errors import ArgumentError

EXPLAIN_METHODS = ("permutation", *METHODS)
PIXELS = "After --scale none, pixels stay within the least and the greatest of the rows."
SHELLS = ("bash", "zsh", "fish", "powershell")

_option, _data, _text, _network, _loss, _optimizer, _rate, _training, _machine, _output = (
    partial(recipe.field_of, panel) for panel in recipe.PANELS
)
_rows = partial(_option, None, metavar="DATA", values=recipe.names_or_files(NAMES))


def _reduce(use: str) -> Any:
    return _machine("ordered", use + ", {}: ordered gives the same bits on 1, 2, 4 and 8 processes.", values=REDUCTIONS)


@dataclass(frozen=True, kw_only=True)
class JsonOption:
    as_json: bool = _output(False, "Print the results as one JSON object.", names=("--json",))


@dataclass(frozen=True, kw_only=True)
class ForceOption:
    force: bool = _output(False, "Overwrite a file that exists.")


@dataclass(frozen=True, kw_only=True)
class TextOptions:
    """The form of a table's file, recognised from its beginning unless given."""

    sep: str | None = _text(None, "Separator of the columns: one character, or tab; recognised unless given.", "MARK")
    decimal: str | None = _text(None, "Decimal mark of the numbers: . or , (recognised unless given).", "MARK")
    encoding: str | None = _text(None, "Encoding, such as utf-8, cp1252 or latin-1; recognised unless given.")
    missing: list[str] | None = _text(
        None, "A word or number, one an option, that stands for a missing cell, beside NA, ? and the like.", "WORD"
    )
    sheet: str | None = _text(None, "The sheet of an .xlsx file; the one that Excel shows first unless given.", "NAME")
    header: bool = _text(True, "Names of columns in the first line, unless it holds numbers; else column_1, column_2.")

    def like(self, run: Mapping[str, Any]) -> Self:
        """Return the options with the marks of a training, whose options are ``run``, where none are given."""
        marks: dict[str, Any] = {name: getattr(self, name) or run.get(name) for name in ("sep", "decimal", "encoding")}
        return replace(self, **marks)

    def form(self) -> Form:
        # None: recognised
        header = None if self.header else False
        return Form(self.sep, self.decimal, self.encoding, header, self.missing or (), self.sheet)


@dataclass(frozen=True, kw_only=True)
class DataOptions(TextOptions, JsonOption):
    """The data of a training: DATA with its target, and files with other rows."""

    data: str | None = _option(
        None,
        f"A data set by name ({', '.join(NAMES)}) or a path: .npz with X and y, .csv or .tsv (also .csv.gz, .bz2, .xz, "
        ".zip), .parquet, .feather or .xlsx with --target, or a folder of IDX files.",
        "DATA",
        None,
        recipe.names_or_files(NAMES),
    )

    target: str | None = _data(
        None, "The column of a table to predict; several columns of numbers, or of yes and no, as a,b.", "COLUMN"
    )
    task: str | None = _data(
        None,
        f"{{}}; by default words and at most {MOST_CLASSES} different whole numbers, unless like counts, are classes.",
        values=TASKS,
    )
    id: list[str] | None = _data(
        None, "A column that names the rows: no input; predict writes it beside the predictions.", "COLUMN"
    )
    validation: str | None = _data(None, "A file with the validation rows, in the form of DATA.", "FILE")
    test: str | None = _data(None, "A file with the test rows; no fifth of DATA is held out then.", "FILE")


@dataclass(frozen=True, kw_only=True)
class OutputOptions(DataOptions):
    """The data and the output of ``train`` and ``sweep``."""

    out: str | None = _output(None, "The run folder, new or empty; runs/DATA-DATE-TIME unless given.", "DIR")
    quiet: bool = _output(False, "Show no progress; with --json only the last line.", names=("--quiet", "-q"))
    as_json: bool = _output(
        False, "Print JSON lines: an object at the start, for each epoch or model, and at the end.", names=("--json",)
    )
    track: str | None = _output(
        None,
        "Record the run, of a sweep each model, with {}; MLFLOW_TRACKING_URI, WANDB_MODE and the like say where.",
        "TRACKER",
        values=TRACKERS,
    )


@dataclass(frozen=True, kw_only=True)
class TrainOptions(recipe.TableRecipe, OutputOptions):
    """Train a network on DATA and write a run folder.

    A fifth of the rows is held out for the test at the end, unless the data bring a test set.

    Ctrl-C ends the training cleanly and keeps the model.

    Examples:

      fusemlp train digits
      fusemlp train houses.csv --target price --time-limit 60
      fusemlp train --resume runs/houses-20261130-120000
    """

    resume: str | None = _output(
        None,
        "Continue the run in this folder from its last checkpoint, as if it had never stopped; --epochs may be raised.",
        "RUN",
        values=recipe.run_folders,
    )
    reduce: str = _reduce("Under torchrun --nproc-per-node N -m fusemlp train, how N processes add their gradients")
    track_model: bool = _output(False, "With --track: also store the run folder there, with model and report.")


@dataclass(frozen=True, kw_only=True)
class SweepOptions(recipe.FitRecipe, OutputOptions):
    """Train many models on DATA that differ in the --vary parameters, and keep the best one in a run folder.

    The validation rows choose the best model; the test rows score only that one, at the end. Models that differ in
    their seed alone are judged together, by their mean score, and those of the best mean are merged into one model.

    The folder is a run as from train, with results.csv (a row a model) and scores.png (score over each parameter).

    Ctrl-C ends the sweep and keeps the results of the finished models.

    Examples:

      fusemlp sweep digits --vary lr=0.001:0.1:log:16 --vary hidden=64,128 --seeds 5
      fusemlp sweep iris --vary hidden=none,8,16x8 --vary dropout=0:0.5:6 --sample 10 --early-stopping 5
      fusemlp sweep --resume runs/digits-20261130-120000
    """

    vary: list[str] | None = _option(
        None,
        "A varied parameter, one an option: lr, momentum, betas, weight_decay, dropout, hidden, label_smoothing, seed "
        "or batch_size. VALUES: a list 0.1,0.2 (layers and betas joined by x: hidden=32,64x32, betas=0.9x0.999); "
        "LOW:HIGH:log:COUNT or LOW:HIGH:lin:COUNT (LOW:HIGH:COUNT), ends included; whole numbers FIRST:END as Python's "
        "range, END left out: seed=0:20.",
        "NAME=VALUES",
    )
    sample: int | None = _option(None, "Train only this many combinations, drawn by the split's seed.", "COUNT")
    seeds: int | None = _option(
        None,
        "Train each combination with this many seeds, from --seed on, choose by the mean score, and merge the seeds of "
        "the best into one model that gives their mean; as --vary seed beside another --vary does.",
        "COUNT",
    )
    jobs: int | None = _option(None, "The number of models that train at once; one a core unless given.")
    workers: str | None = _option(
        None,
        "Train in other processes: loky starts them here, dask and ray (with their libraries) here or on the machines "
        "of --address. A dead worker's models are trained again.",
        "BACKEND",
    )
    address: str | None = _option(None, "Of dask's scheduler (tcp://host:8786) or ray's head (host:6379).", "ADDRESS")
    resume: str | None = _output(
        None,
        "Go on with the sweep in this folder: train the models that had not ended.",
        "RUN",
        values=recipe.run_folders,
    )


@dataclass(frozen=True, kw_only=True)
class FindOptions(recipe.ModelRecipe, DataOptions, ForceOption):
    """Raise the learning rate from step to step, watch the loss, and suggest a rate for DATA.

    Nothing is kept of the network that is trained for it.
    """

    start: float = _rate(1e-6, "The first learning rate.", names=("--from",))
    end: float = _rate(10.0, "The last learning rate.", names=("--to",))
    steps: int = _rate(200, "Updates of the sweep.")
    plot: Path | None = _output(None, "Draw loss over learning rate into this PNG file.")


@dataclass(frozen=True, kw_only=True)
class RunOptions(JsonOption):
    """The options of the commands that use the model of a run."""

    run: Path = _option(MISSING, "A run folder from train.", "RUN", None, recipe.run_folders)
    weights: str = _option(
        "model",
        "The run's weights: model (end of training), best (best epoch by --metric) or last (last checkpoint).",
        values=WEIGHTS,
    )


@dataclass(frozen=True, kw_only=True)
class UseOptions(RunOptions):
    """The options of the commands that compute with the model of a run."""

    backend: str = _machine("auto", "{}; fusemlp doctor says which work here.", values=recipe.BACKENDS)
    device: str | None = _machine(None, "Which card, such as cuda:1.")
    precision: str | None = _machine(
        None, "{}; that of the training unless given, for a machine that lacks it.", values=recipe.PRECISIONS
    )


@dataclass(frozen=True, kw_only=True)
class ApplyOptions(UseOptions, TextOptions):
    """The options of the commands that read other data for the model of a run."""

    ignore_unused: bool = _option(False, "Do not mention columns that the training did not have; they are ignored.")

    def __post_init__(self) -> None:
        if getattr(self, "data", None) is None:
            reading = {field.name: field.default for field in fields(TextOptions)} | {"ignore_unused": False}
            for name, default in reading.items():
                if getattr(self, name) != default:
                    raise ArgumentError(f"{name}: it tells how --data is read; give --data too, or leave it out")

    def reading(self, config: Mapping[str, Any], notes: list[str]) -> dict[str, Any]:
        """Return the arguments that read other data as a run's were read; ``notes`` takes lines on them."""
        return {"form": self.like(config["options"]).form(), "notes": notes, "ignore_unused": self.ignore_unused}


@dataclass(frozen=True, kw_only=True)
class EvaluateOptions(ApplyOptions):
    """Score the model of a run on its test rows, or on other labelled data."""

    data: str | None = _rows("Labelled data by name or path; the run's own test rows unless given.")
    attack: str | None = _option(
        None,
        "{}: also score the rows as this attack changes them to raise the loss of their labels. For "
        f"inputs that are numbers; words, dates and missing cells are refused. {PIXELS}",
        "ATTACK",
        values=recipe.ATTACKS,
    )
    attack_eps: float | None = _option(None, recipe.ATTACK_EPS, "EPS", ("--attack-eps", "--eps"))
    attack_steps: int | None = _option(None, recipe.ATTACK_STEPS)
    attack_norm: str | None = _option(None, recipe.ATTACK_NORM, values=adversarial.NORMS)
    certify: float | None = _option(
        None,
        "Also say which share of the rows is predicted right however their numbers move by at most EPS, or of numbers "
        f"the mean width of the bounds of a prediction. EPS is {recipe.EPS_UNITS} (of piecewise in interquartile "
        f"ranges). Words, dates and missing cells do not move. {PIXELS}",
        "EPS",
    )


@dataclass(frozen=True, kw_only=True)
class ExplainOptions(ApplyOptions, ForceOption):
    """Say which columns the model of a run goes by, on its test rows or on other data.

    permutation: how much worse the error gets when a column is permuted; the others attribute outputs row by row.

    Example:

      fusemlp explain runs/houses-... --data new.csv --method integrated --out attributions.csv
    """

    data: str | None = _rows("Data by name or path, for permutation labelled; the run's own test rows unless given.")
    method: str | None = _option(None, "{}; permutation unless given, for images integrated.", values=EXPLAIN_METHODS)
    rows: int = _option(500, "Explain at most this many rows, drawn at random.")
    of_class: str | None = _option(
        None,
        "Attribute the output of this class; of each row's predicted class unless given. Of several targets one.",
        names=("--class",),
    )
    out: Path | None = _output(None, "File (.csv) for the importance of every column, or each row's attributions.")
    plot: Path | None = _output(
        None, "Draw columns as bars, or pixels as a heat map for each class, into this PNG file."
    )


@dataclass(frozen=True, kw_only=True)
class ReportOptions(UseOptions):
    """Write report.html into the folder of a run again: its training, and its model on its own test rows.

    train and sweep write it at their end; this makes it anew for an old run, or for other weights.
    """


@dataclass(frozen=True, kw_only=True)
class PredictOptions(ApplyOptions, ForceOption):
    """Predict labels, or values in original units, for new rows.

    Every row gets a prediction: missing cells and words that the training did not have are filled in and counted.

    Examples:

      fusemlp predict runs/houses-20261130-120000 --data new.csv --out predictions.csv --with-data
      fusemlp predict runs/houses-20261130-120000 --data new.csv --out - --id address
    """

    data: str = _option(MISSING, "Features: a table (.csv, .parquet, .xlsx, ...), .npz with X, IDX folder.", "FILE")
    out: Path = _option(
        MISSING,
        "File for the predictions: .csv or .tsv (also .csv.gz, .bz2, .xz), .parquet, .feather, .arrow, .xlsx or .npz; "
        "- for .csv on stdout. Text like =1+1 has an apostrophe before it in .csv, .tsv and .xlsx.",
    )
    with_data: bool = _option(False, "Also write the columns of the data, as they are, in front of the predictions.")
    id: list[str] | None = _option(
        None,
        "A column of the data to write in front of the predictions, in place of those that --id named in training.",
        "COLUMN",
    )
    proba: bool = _option(False, "Also write the probability of each class.")
    interval: float | None = _option(
        None,
        "Also write an interval (low, high) around each number, or the set of classes, that holds the truth for this "
        "share of new rows, such as 0.9; by the errors of the rows that validated the training.",
        "SHARE",
    )
    spread: bool = _option(
        False,
        "Also write the standard deviation of the predictions of an ensemble's models or a network's members: of "
        "numbers in original units, of classes of the probability of the predicted class.",
    )


@dataclass(frozen=True, kw_only=True)
class ExportOptions(RunOptions, ForceOption):
    """Write the model of a run as a file for other programs.

    Example:

      fusemlp export runs/digits-... --onnx digits.onnx
    """

    onnx: Path | None = _option(
        None,
        "An ONNX graph (.onnx): features as they are in the data go in (one input a feature if some are words), labels "
        "or values in original units come out.",
    )
    safetensors: Path | None = _option(
        None,
        "The network's parameters by torch's names and its architecture (.safetensors), for fusemlp.load; its inputs "
        "are the scaled features.",
    )
    bare: bool = _option(False, "Leave the scaling of the features, and of a regression's targets, out of the graph.")


@dataclass(frozen=True, kw_only=True)
class PlotOptions(JsonOption, ForceOption):
    """Draw the curves of several runs into one picture, to compare them."""

    runs: list[Path] = _option(MISSING, "Run folders from train.", "RUN...", None, recipe.run_folders)
    out: Path | None = _option(
        None,
        "File for the picture: .png, .svg or .pdf; unless given comparison.png, comparison-2.png and so on.",
    )


@dataclass(frozen=True, kw_only=True)
class PlanOptions(recipe.StepRecipe):
    """Print the kernel calls of a training step, with what each reads, writes and costs.

    Example:

      fusemlp plan 784 128 10 --batch-size 128 --backend triton
    """

    sizes: list[int] = _option(MISSING, "Widths from the input to the output.", "SIZES...", None)
    loss: str = _loss("cross_entropy", "{}.", values=losses.LOSSES)
    optimizer: str = _optimizer("sgd", "{}.", values=optimizers.OPTIMIZERS)
    backend: str = _machine("auto", "{}; it need not work on this machine.", values=recipe.BACKENDS)
    devices: int | None = _machine(None, "Processes that train one model together: the step of one of them.", "COUNT")
    reduce: str = _reduce("With --devices: how they add their gradients")


@dataclass(frozen=True, kw_only=True)
class DoctorOptions(JsonOption):
    """Say which backends work here, and for each that does not, why and how to get it."""


@dataclass(frozen=True, kw_only=True)
class RunsOptions(JsonOption):
    """List the run folders in FOLDER, best score first: score, date, and the options in which they differ.

    Runs of one data set stand together. The score is the one that the trainings were judged by (--metric), of the best
    epoch, where they share it and its units; else the first test score.
    """

    folder: Path = _option(Path("runs"), "A folder of run folders, or one of them; runs unless given.", "FOLDER", None)
    sort: str | None = _option(
        None,
        "Score to sort by: a test score such as test_accuracy, or a quantity of the epochs such as val_loss.",
        "SCORE",
        values=(*recipe.MONITORS[:2], "test_accuracy", *(f"test_{name}" for name in metrics.METRICS), "test_loss"),
    )


@dataclass(frozen=True, kw_only=True)
class CompletionOptions:
    """Print the script by which SHELL completes commands, options, data sets and run folders.

    Of zsh the line goes after compinit.

      fusemlp completion bash >> ~/.bashrc
      fusemlp completion zsh >> ~/.zshrc
      fusemlp completion fish > ~/.config/fish/completions/fusemlp.fish
    """

    shell: str = _option(MISSING, "{}.", "SHELL", None, SHELLS)
