"""The options of each command, with their help; a dataclass is a command's signature, its docstring the command's help.

``None`` stands for a default that depends on the task, the optimizer or the schedule.
"""

# ruff: noqa: RUF009 - the defaults are fields of dataclasses, made by `option` and `argument`.

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import MISSING, Field, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from fusemlp.callbacks.trackers import TRACKERS
from fusemlp.cli.choices import Choices, among, names_or_files, run_folders
from fusemlp.datasets.load import MOST_CLASSES, NAMES, TASKS
from fusemlp.datasets.scaling import SCALES
from fusemlp.datasets.textfiles import Form
from fusemlp.describe.adversarial import FGSM, NORMS, PGD
from fusemlp.describe.hardening import TRADES, Free
from fusemlp.describe.intervals import IBP
from fusemlp.describe.losses import LOSSES
from fusemlp.describe.metrics import METRICS
from fusemlp.describe.network import INITS, SLOPES
from fusemlp.describe.optimizers import OPTIMIZERS
from fusemlp.describe.presets import LEAST_ROWS, MEMBERS, MOST_ROWS, PRESETS
from fusemlp.describe.schedules import SCHEDULES
from fusemlp.program.sharding import REDUCTIONS
from fusemlp.report.explanations import METHODS
from fusemlp.report.runs import WEIGHTS
from fusemlp_kernels.contract import ACTIVATIONS


def one_of(names: Iterable[str], word: str = "or") -> str:
    """Return the names as text: a, b or c."""
    *others, last = names
    return f"{', '.join(others)} {word} {last}" if others else last


def field_of(
    panel: str,
    default: Any,
    help: str,
    metavar: str | None = None,
    names: tuple[str, ...] | None = (),
    values: Iterable[str] | Choices = (),
) -> Any:
    """Return the field of an option.

    ``metavar`` replaces the usual word for its type, ``names`` the field's name; an argument has None. A shell
    completes ``values``.
    """
    choices = values if callable(values) else among(values)
    about = {"panel": panel, "help": help, "metavar": metavar, "names": names, "choices": choices}
    return field(default=default, metadata=about)


def name_of(option: Field[Any]) -> str:
    """Return the name of an option on the command line, without its dashes."""
    names = option.metadata["names"]
    return str(names[0]).removeprefix("--") if names else option.name.replace("_", "-")


BACKENDS = ("auto", "triton", "cupy", "numpy")
PRECISIONS = ("fp32", "tf32", "bf16", "fp16", "fp64")
PLANS = ("auto", "eager", "graph", "resident")
EXPLAIN_METHODS = ("permutation", *METHODS)
ATTACKS = (PGD.kind, FGSM.kind)
EPS_UNITS = (
    "in standard deviations of a column after --scale standard, as a share of its range after minmax, in the data's "
    "own units after none (8 is usual for grey levels from 0 to 255), and in units of the scaled input after the others"
)
ATTACK_EPS = f"The most by which an input may move: {EPS_UNITS}."
PIXELS = "After --scale none, pixels stay within the least and the greatest of the rows."
ATTACK_STEPS = "For pgd, and for training by trades: its steps (10), each 2.5 * eps / steps long."
ATTACK_NORM = "inf moves each input by up to eps (default), 2 each row by up to eps in the Euclidean norm."
SHELLS = ("bash", "zsh", "fish", "powershell")
# The quantities of each epoch, by which a training may be judged.
MONITORS = ("val_loss", "val_accuracy", *METRICS, "loss", "accuracy")

_SLOPES = one_of((f"{name} ({slope} unless given)" for name, slope in SLOPES.items()), "and")

# The panels of --help, in their order.
PANELS = (
    *(
        "Options",
        "Data",
        "Text tables",
        "Network",
        "Loss",
        "Optimizer",
        "Learning rate schedule",
        "Training",
        "Machine",
    ),
    "Output",
)
_option, _data, _text, _network, _loss, _optimizer, _rate, _training, _machine, _output = (
    partial(field_of, panel) for panel in PANELS
)


@dataclass(frozen=True, kw_only=True)
class JsonOption:
    as_json: bool = _output(False, "Print the results as one JSON object.", names=("--json",))


@dataclass(frozen=True, kw_only=True)
class ForceOption:
    force: bool = _output(False, "Overwrite a file that exists.")


def _reduce(use: str) -> Any:
    text = f"{use}, {one_of(REDUCTIONS)}: ordered gives the same bits on 1, 2, 4 and 8 processes."
    return _machine("ordered", text, values=REDUCTIONS)


@dataclass(frozen=True, kw_only=True)
class MachineOptions:
    backend: str = _machine("auto", f"{one_of(BACKENDS)}; fusemlp doctor says which work here.", values=BACKENDS)
    device: str | None = _machine(None, "Which card, such as cuda:1.")


@dataclass(frozen=True, kw_only=True)
class StepOptions:
    """The options of a training step, as ``plan`` prints it."""

    activation: str = _network(
        "relu", f"{one_of(ACTIVATIONS)}; one, or one a hidden layer: relu,tanh.", values=ACTIVATIONS
    )
    slope: float | None = _network(None, f"Of {_SLOPES}; prelu's starts there.")
    output_activation: str = _network(
        "identity", "Of the output layer; the cross-entropies and poisson need identity.", values=ACTIVATIONS
    )
    dropout: str = _network(
        "0", "Probability of dropping a hidden unit in a training step; one, or one a hidden layer (0.2,0.5).", "RATE"
    )
    batch_size: int = _training(32, "Rows a step.")
    precision: str = _machine("fp32", f"{one_of(PRECISIONS)}.", values=PRECISIONS)


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
        f"{one_of(TASKS)}. The default: words and at most {MOST_CLASSES} different whole numbers are classes, "
        "unless they look like counts.",
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
    init: str = _network("auto", f"Initial weights: {one_of(INITS)}; auto chooses by activation.", values=INITS)

    loss: str | None = _loss(
        None,
        f"{one_of(LOSSES)}. Unless given: cross_entropy for classes, mse for numbers. binary_cross_entropy is for two "
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
    delta: float | None = _loss(None, "For huber: errors above this count linearly (1).")
    quantile: float | None = _loss(None, "For the loss quantile: the quantile to learn (0.5).")

    optimizer: str = _optimizer("adam", f"{one_of(OPTIMIZERS)}.", values=OPTIMIZERS)
    lr: float | None = _optimizer(None, "Learning rate; 0.01 for sgd, 0.001 for adam and adamw unless given.")
    momentum: float | None = _optimizer(None, "For sgd, 0 or more and less than 1 (0).")
    nesterov: bool = _optimizer(False, "For sgd: Nesterov's momentum.")
    weight_decay: float | None = _optimizer(
        None, "L2 penalty for sgd and adam (0; adam on a table's classes 0.0003), decoupled decay for adamw (0.01)."
    )
    decay_biases: bool = _optimizer(True, "Whether weight decay acts on biases.")
    beta1: float | None = _optimizer(None, "For adam and adamw: average of gradients (0.9).")
    beta2: float | None = _optimizer(None, "For adam and adamw: average of their squares (0.999).")
    eps: float | None = _optimizer(None, "For adam and adamw: epsilon (1e-8).")
    clip_norm: float | None = _optimizer(None, "Scale gradients with a greater global norm down to this norm.")
    ema: float = _optimizer(
        0.0,
        "Predict, validate and save with a moving average of the weights that has this decay, such as 0.99; 0: none.",
    )
    accumulate: int = _optimizer(1, "Batches whose gradients are averaged for one update.")

    seed: int = _training(0, "Seed of the split, the initial weights, dropout and row order.")
    plan: str = _machine("auto", f"{one_of(PLANS)}.", values=PLANS)


@dataclass(frozen=True, kw_only=True)
class FitOptions(ModelOptions):
    """The further options of ``train`` and ``sweep``: the schedule, the training and its output."""

    schedule: str = _rate("constant", f"{one_of(SCHEDULES)}.", values=SCHEDULES)
    lr_step: float | None = _rate(None, "For step: epochs between two reductions.")
    lr_gamma: float | None = _rate(
        None, "Factor on the rate: at each step (0.1), each epoch (exponential), on a plateau (0.1)."
    )
    lr_final: float | None = _rate(
        None, "The final rate of cosine and flat_cosine (0), one_cycle (lr / 250000); minimum of reduce_on_plateau (0)."
    )
    lr_patience: int | None = _rate(
        None, "For reduce_on_plateau: epochs without a better --metric before a reduction (10)."
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
        f"Record the run, of a sweep each model, with {one_of(TRACKERS)}; their own variables, such as "
        "MLFLOW_TRACKING_URI or WANDB_MODE, say where.",
        "TRACKER",
        values=TRACKERS,
    )


@dataclass(frozen=True, kw_only=True)
class TrainOptions(FitOptions):
    """Train a network on DATA and write a run folder.

    A fifth of the rows is held out for the test at the end, unless the data bring a test set.

    Ctrl-C ends the training cleanly and keeps the model.
    """

    resume: str | None = _output(
        None,
        "Continue the run in this folder from its last checkpoint, exactly as if it had never stopped; --epochs may be "
        "raised.",
        "RUN",
        values=run_folders,
    )
    preset: str | None = _network(
        None,
        f"{one_of(PRESETS)}: a recipe for what has its default. tabm: one network of {MEMBERS} members that share "
        "weights, --hidden 128,128 --activation silu --optimizer adamw --lr 0.002 --batch-size 256 (less below 4,096 "
        f"rows). auto: tabm for classes in a table of {LEAST_ROWS:,} to {MOST_ROWS:,} rows, without the test rows. "
        "Default: auto, or plain if one of these options, --models or --time-limit is given.",
        values=PRESETS,
    )
    from_run: str | None = _network(
        None,
        "Start from this run: its preparation of the columns, its hidden layers and, if the target means the same, its "
        "output layer.",
        "RUN",
        ("--from",),
        run_folders,
    )
    freeze: int = _network(0, "With --from: leave this many of the first layers as they are.", "LAYERS")
    layer_decay: float = _optimizer(
        1.0,
        "With --from: learning rate of each layer as a multiple of that of the next, above 0 and at most 1.",
        "FACTOR",
    )
    probe: int = _training(0, "With --from: first train the output layer alone, for up to this many epochs.", "EPOCHS")
    models: int | None = _training(
        None,
        "Train this many models with seeds from --seed on and merge them into one that gives their mean. Each has its "
        "own validation rows, a fold of a cross-validation; with --group, --time or --validation all share theirs. "
        "Unless given: 5 for a table of 40 to 100,000 rows, else 1.",
        "COUNT",
    )
    time_limit: float | None = _training(
        None,
        "End training in time and restore the best weights. The seconds count from the end of the reading of DATA: the "
        "trials that decide --scale and --log-target, all models and --final-fit share nine tenths of them, the last "
        "is for scores and report. If they are too few for all --models, fewer are trained.",
        "SECONDS",
    )
    dp_epsilon: float | None = _training(
        None,
        "Train with differential privacy: clipped gradients and noise, so that --epochs epochs spend at most this "
        "epsilon. It is of the parameters and the training rows; scaling, scores and the other rows are not covered. "
        "Trains one model.",
        "EPSILON",
    )
    dp_delta: float | None = _training(
        None, "With --dp-epsilon: delta; the largest power of ten below 1 / training rows unless given."
    )
    dp_clip: float | None = _training(None, "With --dp-epsilon: the largest norm of a row's gradient (1).")
    reduce: str = _reduce(
        "Under torchrun --nproc-per-node N -m fusemlp train, how N processes that train one model add their gradients"
    )
    shard_optimizer: bool = _machine(
        False, "Under torchrun: each process keeps a slice of the optimizer's state, with the same bits."
    )
    adversarial: str | None = _training(
        None,
        f"{one_of(ATTACKS)}: train on each batch as this attack changes it, by at most --attack-eps, to resist it. "
        "free: change it by gradients that training computes anyway, with --attack-repeats updates on each batch. "
        "trades: add --attack-beta times the divergence of the probabilities of changed rows to the loss. ibp: train "
        "for certified accuracy within --attack-eps; early stopping is off, and with --early-stopping counts after the "
        "ramp. For inputs that are numbers; words, dates and missing cells are refused. Trains one model.",
        "ATTACK",
        values=(*ATTACKS, Free.kind, TRADES.kind, IBP.kind),
    )
    attack_eps: float | None = _training(None, ATTACK_EPS, "EPS")
    attack_steps: int | None = _training(None, ATTACK_STEPS)
    attack_norm: str | None = _training(None, ATTACK_NORM, values=NORMS)
    attack_repeats: int | None = _training(
        None, "With --adversarial free: updates on each batch (4). An epoch takes that many times as long."
    )
    attack_beta: float | None = _training(
        None, "With --adversarial trades: the weight of the divergence (6); larger for more robustness, less accuracy."
    )
    final_fit: bool = _training(
        False, "After the scores, train the model on all rows, the test rows too, for the epochs that were best."
    )
    checkpoint_every: int = _output(1, "Epochs between two checkpoints.", "EPOCHS")
    track_model: bool = _output(False, "With --track: also store the run folder there, with model and report.")


@dataclass(frozen=True, kw_only=True)
class SweepOptions(FitOptions):
    """Train many models on DATA that differ in the --vary parameters, and keep the best one in a run folder.

    The validation rows choose the best model; the test rows score only that one, at the end. Models that differ in
    their seed alone are judged together, by their mean score.

    The folder is a run as from train, with results.csv (a row a model) and scores.png (score over each parameter).

    Example: fusemlp sweep digits --vary lr=0.001:0.1:log:16 --vary hidden=32,64 --vary seed=0:20

    Example: fusemlp sweep iris --vary hidden=none,8,16x8 --vary dropout=0:0.5:6 --sample 10 --early-stopping 5

    Ctrl-C ends the sweep and keeps the results of the finished models.
    """

    vary: list[str] | None = _option(
        None,
        "A varied parameter, one an option: lr, momentum, betas, weight_decay, dropout, hidden, label_smoothing, seed "
        "or batch_size. VALUES: a list 0.1,0.2 (layers and betas joined by x: hidden=32,64x32, betas=0.9x0.999); "
        "LOW:HIGH:log:COUNT or LOW:HIGH:lin:COUNT (LOW:HIGH:COUNT), ends included; whole numbers FIRST:END as Python's "
        "range, END left out: seed=0:20.",
        "NAME=VALUES",
    )
    sample: int | None = _option(
        None, "Train only this many combinations, drawn at random by the split's seed.", "COUNT"
    )
    seeds: int | None = _option(
        None,
        "Train each combination with this many seeds, from --seed on, and choose by the mean score; as --vary seed "
        "beside another --vary does.",
        "COUNT",
    )
    jobs: int | None = _option(None, "The number of models that train at once; one a core unless given.")
    workers: str | None = _option(
        None,
        "Train in other processes: loky starts them here, dask and ray (with their libraries) here or on the machines "
        "of --address. A dead worker's models are trained again.",
        "BACKEND",
    )
    devices: str | None = _machine(
        None, "Several cards of this machine, cuda:0,cuda:1: a process trains on each.", "NAMES"
    )
    address: str | None = _option(
        None, "Where the scheduler of dask (tcp://host:8786) or the head of ray (host:6379) listens.", "ADDRESS"
    )
    resume: str | None = _output(
        None, "Go on with the sweep in this folder: train the models that had not ended.", "RUN", values=run_folders
    )


@dataclass(frozen=True, kw_only=True)
class FindOptions(ModelOptions, ForceOption):
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

    run: Path = _option(MISSING, "A run folder from train.", "RUN", None, run_folders)
    weights: str = _option(
        "model",
        "The run's weights: model (end of training), best (best epoch by --metric) or last (last checkpoint).",
        values=WEIGHTS,
    )


@dataclass(frozen=True, kw_only=True)
class ApplyOptions(RunOptions, MachineOptions, TableOptions):
    """The options of the commands that read other data for the model of a run."""

    ignore_unused: bool = _option(
        False, "Do not mention columns that the training did not have; they are ignored in any case."
    )


@dataclass(frozen=True, kw_only=True)
class EvaluateOptions(ApplyOptions):
    """Score the model of a run on its test rows, or on other labelled data."""

    data: str | None = _option(
        None,
        "Labelled data by name or path; the run's own test rows unless given.",
        "DATA",
        values=names_or_files(NAMES),
    )
    attack: str | None = _option(
        None,
        f"{one_of(ATTACKS)}: also score the rows as this attack changes them to raise the loss of their labels. For "
        f"inputs that are numbers; words, dates and missing cells are refused. {PIXELS}",
        "ATTACK",
        values=ATTACKS,
    )
    attack_eps: float | None = _option(None, ATTACK_EPS, "EPS", ("--attack-eps", "--eps"))
    attack_steps: int | None = _option(None, ATTACK_STEPS)
    attack_norm: str | None = _option(None, ATTACK_NORM, values=NORMS)
    certify: float | None = _option(
        None,
        "Also say which share of the rows is predicted right however their numbers move by at most EPS, or of numbers "
        f"the mean width of the bounds of a prediction. EPS is {EPS_UNITS} (of piecewise in interquartile ranges). "
        f"Words, dates and missing cells do not move. {PIXELS}",
        "EPS",
    )


@dataclass(frozen=True, kw_only=True)
class ExplainOptions(ApplyOptions, ForceOption):
    """Say which columns the model of a run goes by, on its test rows or on other data.

    permutation: how much worse the error gets when a column is permuted; the others attribute outputs row by row.

    Example: fusemlp explain runs/houses-... --data new.csv --method integrated --out attributions.csv
    """

    data: str | None = _option(
        None,
        "Data by name or path, for permutation labelled; the run's own test rows unless given.",
        "DATA",
        values=names_or_files(NAMES),
    )
    method: str | None = _option(
        None, f"{one_of(EXPLAIN_METHODS)}; permutation unless given, for images integrated.", values=EXPLAIN_METHODS
    )
    rows: int = _option(500, "Explain at most this many rows, drawn at random.")
    of_class: str | None = _option(
        None,
        "Attribute the output of this class; of each row's predicted class unless given. Of several targets the index.",
        names=("--class",),
    )
    out: Path | None = _output(
        None, "File (.csv) for the importance of every column, or for each row the attributions of its columns."
    )
    plot: Path | None = _output(
        None, "Draw the columns as bars, or the pixels of images as a heat map for each class, into this PNG file."
    )


@dataclass(frozen=True, kw_only=True)
class ReportOptions(RunOptions, MachineOptions):
    """Write report.html into the folder of a run again: its training, and its model on its own test rows.

    train and sweep write it at their end; this makes it anew for an old run, or for other weights.
    """


@dataclass(frozen=True, kw_only=True)
class PredictOptions(ApplyOptions, ForceOption):
    """Predict labels, or values in original units, for new rows.

    Every row gets a prediction: missing cells and words that the training did not have are filled in and counted.
    """

    data: str = _option(MISSING, "Features: a table (.csv, .parquet, .xlsx, ...), .npz with X, IDX folder.", "FILE")
    out: Path = _option(MISSING, "File for the predictions: .csv or .npz.")
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

    Example: fusemlp export runs/digits-... --onnx digits.onnx
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

    runs: list[Path] = _option(MISSING, "Run folders from train.", "RUN...", None, run_folders)
    out: Path | None = _option(
        None,
        "File for the picture: .png, .svg or .pdf; comparison.png unless given, or comparison-2.png and so on if that "
        "exists.",
    )


@dataclass(frozen=True, kw_only=True)
class PlanOptions(StepOptions):
    """Print the kernel calls of a training step, with what each reads, writes and costs.

    Example: fusemlp plan 784 128 10 --batch-size 128 --backend triton
    """

    sizes: list[int] = _option(MISSING, "Widths from the input to the output.", "SIZES...", None)
    loss: str = _loss("cross_entropy", f"{one_of(LOSSES)}.", values=LOSSES)
    optimizer: str = _optimizer("sgd", f"{one_of(OPTIMIZERS)}.", values=OPTIMIZERS)
    backend: str = _machine("auto", f"{one_of(BACKENDS)}; it need not work on this machine.", values=BACKENDS)
    devices: int | None = _machine(None, "Processes that train one model together: the step of one of them.", "COUNT")
    reduce: str = _reduce("With --devices: how they add their gradients")
    shard_optimizer: bool = _machine(False, "With --devices: each keeps a slice of the optimizer's state.")


@dataclass(frozen=True, kw_only=True)
class DoctorOptions(JsonOption):
    """Say which backends work here, and for each that does not, why and how to get it."""


@dataclass(frozen=True, kw_only=True)
class RunsOptions(JsonOption):
    """List the run folders in FOLDER, best score first: score, date, and the options in which they differ.

    Runs of one data set stand together. The score is the one that the trainings were judged by (--metric), of the best
    epoch, where they share it; else the first test score.
    """

    folder: Path = _option(Path("runs"), "A folder of run folders, or one of them; runs unless given.", "FOLDER", None)
    sort: str | None = _option(
        None,
        "Score to sort by: a test score such as test_accuracy, or a quantity of the epochs such as val_loss.",
        "SCORE",
        values=(*MONITORS[:2], "test_accuracy", *(f"test_{name}" for name in METRICS), "test_loss"),
    )


@dataclass(frozen=True, kw_only=True)
class CompletionOptions:
    """Print the script by which SHELL completes commands, options, data sets and run folders.

    bash: fusemlp completion bash >> ~/.bashrc

    zsh: fusemlp completion zsh >> ~/.zshrc, after compinit

    fish: fusemlp completion fish > ~/.config/fish/completions/fusemlp.fish
    """

    shell: str = _option(MISSING, f"{one_of(SHELLS)}.", "SHELL", None, SHELLS)
