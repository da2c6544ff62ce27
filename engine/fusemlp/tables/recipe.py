"""The recipe of a table's model: its fields are the options of ``train`` and the parameters of the estimators.

``None`` stands for a default that depends on the data, the optimizer or the schedule. The command line gives words,
such as "128,64"; Python may give numbers, sequences and objects of ``fusemlp``.
"""

# ruff: noqa: RUF009 - the defaults are fields of dataclasses, made by `field_of`.

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import Field, dataclass, field, fields
from functools import partial
from pathlib import Path
from typing import Any

from fusemlp.datasets.cells import SCALES
from fusemlp.describe.adversarial import FGSM, IBP, NORMS, PGD, Attack
from fusemlp.describe.blocks import NORMS as NORMALISATIONS
from fusemlp.describe.checks import AUTO, LEAST_PATIENCE, MOST_PATIENCE
from fusemlp.describe.losses import LOSSES, Huber, Quantile
from fusemlp.describe.metrics import METRICS
from fusemlp.describe.network import INITS, SLOPES
from fusemlp.describe.optimizers import OPTIMIZERS, SCHEDULES, SGD, Adam, AdamW, ReduceOnPlateau, StepDecay
from fusemlp.describe.privacy import DPSGD
from fusemlp_kernels.contract import ACTIVATIONS

# The panels of --help, in their order.
PANELS = (
    *("Options", "Data", "Text tables", "Network", "Loss", "Optimizer"),
    *("Learning rate schedule", "Training", "Machine", "Output"),
)

# Returns the values that begin with a text; a shell without any completes the names of files.
Choices = Callable[[str], list[str]]


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
    kind: Any = None,
) -> Any:
    """Return the field of an option; ``metavar`` and ``names`` replace what type and name give, None for an argument.

    A shell completes ``values``, which stand for a {} in ``help``. ``kind`` is the command line's narrower type.
    """
    help = help.replace("{}", one_of(values)) if "{}" in help and not callable(values) else help
    choices = values if callable(values) else among(values)
    about = {"panel": panel, "help": help, "metavar": metavar, "names": names, "choices": choices, "kind": kind}
    return field(default=default, metadata=about)


def name_of(option: Field[Any]) -> str:
    """Return the name of an option on the command line, without its dashes."""
    names = option.metadata["names"]
    return str(names[0]).removeprefix("--") if names else option.name.replace("_", "-")


def given_options(options: Any) -> dict[str, Any]:
    """Return the options that differ from their defaults, by name."""
    usual, values = type(options)(), {option.name: getattr(options, option.name) for option in fields(options)}
    return {name: value for name, value in values.items() if value != getattr(usual, name)}


def among(names: Iterable[str]) -> Choices:
    """Return the completion of one of ``names``, or of several with commas between them."""
    known = list(names)

    def complete(incomplete: str) -> list[str]:
        before, comma, last = incomplete.rpartition(",")
        return [f"{before}{comma}{name}" for name in known if name.startswith(last)]

    return complete


def names_or_files(names: Iterable[str]) -> Choices:
    """Return the completion of a data set: a name or, in the same folder, a file."""
    known = list(names)

    def complete(incomplete: str) -> list[str]:
        matches = [name for name in known if name.startswith(incomplete)]
        if not matches or not incomplete:
            return matches
        return matches + sorted(path.name for path in Path().glob("[!.]*") if path.name.startswith(incomplete))

    return complete


def run_folders(incomplete: str) -> list[str]:
    """Return the run folders in ``runs``, the newest first."""
    try:
        folders = [path.parent for path in Path("runs").glob("*/config.json")]
        folders.sort(key=lambda path: path.stat().st_mtime, reverse=True)
    except OSError:
        return []
    return [path.as_posix() for path in folders if path.as_posix().startswith(incomplete)]


# The width of the hidden layer.
DEFAULT_WIDTH = 128
# Epochs at most of a table and of other data, and those without a better validation loss after which training stops; a
# large table waits by itself.
TABLE_EPOCHS, DEFAULT_EPOCHS, PATIENCE = 200, 60, 20
# Rows a step. In a table of this many rows, beside the test rows, Adam takes more, at this rate or the usual one,
# and validates and keeps an average of the weights.
BATCH, LARGE_BATCHES, AVERAGE = 32, ((60_000, 256, None), (15_000, 128, 0.0015)), 0.99
_LARGER = " and ".join(
    f"of {rows:,} rows {size}" + (f" at the rate {rate:g}, unless --lr is given," if rate else "")
    for rows, size, rate in LARGE_BATCHES[::-1]
)
WAITS = f"{PATIENCE}, {LEAST_PATIENCE} to {MOST_PATIENCE} in tables of {LARGE_BATCHES[-1][0]:,} rows"
# Adam's weight decay where a table's classes are learned and none is given; numbers do without.
CLASS_DECAY = 3e-4
BACKENDS = ("auto", "triton", "cupy", "numpy")
PRECISIONS = ("fp32", "tf32", "bf16", "fp16", "fp64")
PLANS = ("auto", "eager", "graph", "narrow", "card", "chip", "resident")
# The quantities of each epoch, by which a training may be judged.
MONITORS = ("val_loss", "val_accuracy", *METRICS, "loss", "accuracy")
# The attacks that test a model, and what a training can be against.
ATTACKS: dict[str, type[Attack | IBP]] = {attack.kind: attack for attack in (PGD, FGSM)}
HARDENINGS = ATTACKS | {IBP.kind: IBP}

EPS_UNITS = (
    "in standard deviations of a column after --scale standard, as a share of its range after minmax, in the data's "
    "own units after none (8 is usual for grey levels from 0 to 255), and in units of the scaled input after the others"
)
ATTACK_EPS = f"The most by which an input may move: {EPS_UNITS}."
ATTACK_STEPS = f"For pgd: its steps ({PGD.steps}), each 2.5 * eps / steps long."
ATTACK_NORM = "inf moves each input by up to eps (default), 2 each row by up to eps in the Euclidean norm."
_SLOPES = one_of((f"{name} ({slope} unless given)" for name, slope in SLOPES.items()), "and")
PRESETS = ("auto", "plain", "tabm")
# The members of the recipe "tabm", and what it has in place of defaults (Gorishniy et al., "TabM", 2025).
MEMBERS, LEAST_STEPS = 16, 16
# "auto" takes it for classes of this many rows, not counting the test rows: its gains were measured there.
LEAST_ROWS, MOST_ROWS = 12_000, 100_000
TABM: dict[str, Any] = {
    "hidden": ["128,128"],
    "activation": "silu",
    "optimizer": "adamw",
    "lr": 2e-3,
    "ema": AVERAGE,
    "early_stopping": 10,
    "batch_size": 256,
}
# Of these, fields that "auto" leaves to the caller.
PACE = frozenset({"ema", "early_stopping"})
# The same, as it is written without --preset.
_TABM = " ".join(
    f"--{name.replace('_', '-')} {value[0] if name == 'hidden' else value}" for name, value in TABM.items()
)

_option, _data, _text, _network, _loss, _optimizer, _rate, _training, _machine, _output = (
    partial(field_of, panel) for panel in PANELS
)


@dataclass(frozen=True, kw_only=True)
class StepRecipe:
    """The fields of a training step, as ``plan`` prints it."""

    activation: Any = _network("relu", "{}; one, or one a hidden layer: relu,tanh.", values=ACTIVATIONS, kind=str)
    slope: float | None = _network(None, f"Of {_SLOPES}; prelu's starts there.")
    output_activation: str = _network(
        "identity", "Of the output layer; the cross-entropies and poisson need identity.", values=ACTIVATIONS
    )
    norm: Any = _network(
        None,
        "Normalise the rows of hidden layers before the activation: {}; one, or one a hidden layer.",
        values=NORMALISATIONS,
        kind=str | None,
    )
    dropout: Any = _network(
        "0",
        "Probability of dropping a hidden unit in a training step; one, or one a hidden layer (0.2,0.5).",
        "RATE",
        kind=str,
    )
    batch_size: Any = _training(
        None,
        f"Rows a step ({BATCH}; of adam and adamw in tables {_LARGER}, test rows apart).",
        kind=int | None,
    )
    precision: str = _machine("fp32", "{}.", values=PRECISIONS)


@dataclass(frozen=True, kw_only=True)
class ModelRecipe(StepRecipe):
    """The fields of the rows, the network, the loss and the optimizer, and of the machine."""

    backend: str = _machine("auto", "{}; fusemlp doctor says which work here.", values=BACKENDS)
    device: str | None = _machine(None, "Which card, such as cuda:1.")

    drop: Any = _data(None, "A column of a table to leave out; one an option.", "COLUMN", kind=list[str] | None)
    keep: Any = _data(
        None,
        "A column to keep although it is constant, counts the rows, or holds another word in nearly every row.",
        "COLUMN",
        kind=list[str] | None,
    )
    categorical: Any = _data(None, "A column to take as words, such as zip codes.", "COLUMN", kind=list[str] | None)
    group: str | None = _data(
        None, "Hold out whole groups: rows with the same value in this column stay together. It is no input.", "COLUMN"
    )
    time: str | None = _data(None, "Hold out the last rows in the order of this column of dates or numbers.", "COLUMN")
    weight: str | None = _data(
        None,
        "The column with the weight of each row in training and validation, 0 or more. It is no input. Rows of "
        "--validation weigh alike, as do test rows.",
        "COLUMN",
    )
    test_fraction: float = _data(
        0.2, "The test's share of the rows, which judge the model at the end; 0 for none. Data with a test set keep it."
    )
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
        "Learn the logarithm of a positive target; unless given, of a table's skewed one if it helps held-out rows.",
    )
    validation_fraction: float = _data(0.1, "Validation's share of the rows beside the test rows; 0 for none.")
    split_seed: int | None = _data(None, "Seed of the split into training, validation, test rows; --seed unless given.")

    hidden: Any = _network(
        None,
        f"Widths of the hidden layers, such as 128,64 (one of {DEFAULT_WIDTH} unless given; none for no hidden layer). "
        "The option may be given once for each.",
        "WIDTHS",
        kind=list[str] | None,
    )
    init: str = _network("auto", "Initial weights: {}; auto chooses by activation.", values=INITS)

    loss: Any = _loss(
        None,
        "{}; unless given cross_entropy for classes, mse for numbers. binary_cross_entropy is for two "
        "classes; mse, mae and huber train classes as one-hot rows.",
        values=LOSSES,
        kind=str | None,
    )
    label_smoothing: float | None = _loss(None, "For cross_entropy: weight of the uniform distribution in the target.")
    class_weight: Any = _loss(
        None,
        "balanced (inversely to how often each class occurs in training), or a number for each class: 1,2.5,1.",
        "WEIGHTS",
        values=("balanced",),
        kind=str | None,
    )
    delta: float | None = _loss(None, f"For huber: errors above this count linearly ({Huber.delta:g}).")
    quantile: Any = _loss(
        None, f"For quantile: the one to learn ({Quantile.q:g}); for quantiles, theirs (0.1,0.5,0.9).", kind=str | None
    )

    optimizer: Any = _optimizer("adam", "{}.", values=OPTIMIZERS, kind=str)
    lr: Any = _optimizer(
        None, f"Learning rate ({SGD.lr:g} for sgd, {Adam.lr:g} for adam, adamw; see --batch-size).", kind=float | None
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
    ema: float | None = _optimizer(
        None,
        "Predict, validate and save with a moving average of the weights that has this decay, such as 0.99; 0: none, "
        f"the default but for preset tabm and adam in tables of {LARGE_BATCHES[-1][0]:,} rows or more.",
    )
    accumulate: int = _optimizer(1, "Batches whose gradients are averaged for one update.")

    seed: int = _training(0, "Seed of the split, the initial weights, dropout and row order.")
    plan: str = _machine("auto", "{}.", values=PLANS)


@dataclass(frozen=True, kw_only=True)
class FitRecipe(ModelRecipe):
    """The further fields of a fit: the schedule, the epochs and early stopping."""

    schedule: str = _rate("constant", "{}.", values=SCHEDULES)
    lr_step: float | None = _rate(None, "For step: epochs between two reductions.")
    lr_gamma: float | None = _rate(
        None,
        f"The rate's factor: step ({StepDecay.gamma:g}), epoch (exponential), plateau ({ReduceOnPlateau.factor:g}).",
    )
    lr_final: float | None = _rate(
        None, "The final rate of cosine (0), one_cycle (lr / 250000); minimum of reduce_on_plateau (0)."
    )
    lr_patience: int | None = _rate(
        None,
        f"For reduce_on_plateau: epochs without a better --metric before a reduction ({ReduceOnPlateau.patience}).",
    )
    warmup: float = _rate(0.0, "Epochs (0.5: half of one) in which the rate grows linearly to the schedule's start.")

    epochs: int | None = _training(
        None, f"Passes over the training rows at most; {DEFAULT_EPOCHS} unless given, {TABLE_EPOCHS} for a table."
    )
    early_stopping: int | None = _training(
        None,
        f"Epochs without a better --metric until training stops, with the best weights ({WAITS}, "
        f"{TABM['early_stopping']} with preset tabm; 0: never).",
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

    @property
    def patience(self) -> int | str | None:
        """The argument ``early_stopping`` of ``fit`` on rows that validate; None for never."""
        return AUTO if self.early_stopping is None else self.early_stopping or None


@dataclass(frozen=True, kw_only=True)
class TableRecipe(FitRecipe):
    """All that decides the model of a table; ``fusemlp.tables.train_table`` trains by it."""

    preset: str | None = _network(
        None,
        "{}: a recipe for the options that are not given. tabm: one network of "
        f"{MEMBERS} members that share weights, {_TABM} (less below {LEAST_STEPS * TABM['batch_size']:,} rows). auto: "
        f"tabm for classes in a table of {LEAST_ROWS:,} to {MOST_ROWS:,} rows, without the test rows. "
        "Default: auto, or plain if one of these options, --models or --time-limit is given.",
        values=PRESETS,
    )
    transfer_from: str | None = _network(
        None,
        "Start from this run: its columns and their preparation, hidden layers and, for the same target, output layer. "
        "Of an ensemble each model starts from one of those that were merged, and with --models 1 from all of them.",
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
        "Train this many models (5 for a table of 40 to 100,000 rows, else 1) and merge them into one that gives their "
        "mean. Their seeds go from --seed on. Each has its own validation rows, a fold of a cross-validation; with "
        "--group, --time or --validation all share theirs.",
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
        "Train one model with differential privacy: clipped gradients and noise, so that --epochs epochs spend at most "
        "this epsilon. It is of parameters and training rows; scaling, scores and the other rows are not covered.",
        "EPSILON",
    )
    dp_delta: float | None = _training(None, "With --dp-epsilon: delta (the largest power of ten below 1 / rows).")
    dp_clip: float | None = _training(None, f"With --dp-epsilon: largest norm of a row's gradient ({DPSGD.clip:g}).")
    adversarial: Any = _training(
        None,
        f"{one_of(ATTACKS)}: train on each batch as this attack changes it, by at most --attack-eps, to resist it. "
        "ibp: train for certified accuracy within --attack-eps; early stopping is off, and with --early-stopping "
        "counts after the ramp. Trains one model, on numbers; words, dates and missing cells are refused.",
        "ATTACK",
        values=HARDENINGS,
        kind=str | None,
    )
    attack_eps: float | None = _training(None, ATTACK_EPS, "EPS")
    attack_steps: int | None = _training(None, ATTACK_STEPS)
    attack_norm: str | None = _training(None, ATTACK_NORM, values=NORMS)
    final_fit: bool = _training(False, "After the scores, train on all rows, the test's too, for the best epochs.")
