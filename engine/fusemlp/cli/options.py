"""The options of the commands that make a network, each with its help; a dataclass is a command's signature.

``None`` stands for a default that depends on the task, the optimizer or the schedule.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Annotated

import typer

from fusemlp.describe.losses import LOSSES
from fusemlp.describe.network import INITS
from fusemlp.describe.optimizers import OPTIMIZERS
from fusemlp.describe.schedules import SCHEDULES
from fusemlp_kernels.contract import ACTIVATIONS

DATA, NETWORK, LOSS = "Data", "Network", "Loss"
OPTIMIZER, RATE, TRAINING = "Optimizer", "Learning rate schedule", "Training"
MACHINE, OUTPUT = "Machine", "Output"

DATA_HELP = (
    "A data set by name (digits, breast_cancer, wine, diabetes, iris, mnist5k) or a path: .npz with X and y, .csv, "
    ".tsv or .parquet with --target, or a folder of IDX files."
)


def one_of(names: Iterable[str]) -> str:
    """Return the names as text: a, b or c."""
    *others, last = names
    return f"{', '.join(others)} or {last}"


@dataclass(frozen=True)
class ModelOptions:
    """The options of ``train``, ``sweep`` and ``lr-find``: data, network, loss, optimizer and machine."""

    data: Annotated[str | None, typer.Argument(metavar="DATA", help=DATA_HELP, show_default=False)] = None

    target: Annotated[
        str | None,
        typer.Option(metavar="COLUMN", help="The column of a table to predict.", rich_help_panel=DATA),
    ] = None
    task: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="classification or regression. The default: words and few distinct whole numbers are classes.",
            rich_help_panel=DATA,
        ),
    ] = None
    scale: Annotated[
        str,
        typer.Option(
            metavar="NAME",
            help="Features, and the targets of a regression, by statistics of the training rows: standard (mean 0, "
            "variance 1), minmax (0 to 1) or none.",
            rich_help_panel=DATA,
        ),
    ] = "standard"
    validation_fraction: Annotated[
        float,
        typer.Option(
            help="Share of the rows left beside the test fifth that is for validation; 0 for none.",
            rich_help_panel=DATA,
        ),
    ] = 0.1
    split_seed: Annotated[
        int | None,
        typer.Option(
            help="Seed of the split into training, validation and test rows; --seed unless given.",
            rich_help_panel=DATA,
        ),
    ] = None

    hidden: Annotated[
        list[str] | None,
        typer.Option(
            metavar="WIDTHS",
            help="Widths of the hidden layers, such as 128,64 (or the option once for each); none for no hidden "
            "layer. Unless given: one layer of 128.",
            rich_help_panel=NETWORK,
        ),
    ] = None
    activation: Annotated[
        str,
        typer.Option(
            metavar="NAME",
            help=f"{one_of(ACTIVATIONS)}; one, or one a hidden layer: relu,tanh.",
            rich_help_panel=NETWORK,
        ),
    ] = "relu"
    slope: Annotated[
        float | None,
        typer.Option(
            help="Slope of leaky_relu (0.01 unless given); where prelu's starts (0.25).",
            rich_help_panel=NETWORK,
        ),
    ] = None
    output_activation: Annotated[
        str,
        typer.Option(
            metavar="NAME",
            help="Activation of the output layer; the cross-entropies and poisson need identity.",
            rich_help_panel=NETWORK,
        ),
    ] = "identity"
    dropout: Annotated[
        str,
        typer.Option(
            metavar="RATE",
            help="Probability of dropping a hidden unit in a training step; one, or one a hidden layer (0.2,0.5).",
            rich_help_panel=NETWORK,
        ),
    ] = "0"
    init: Annotated[
        str,
        typer.Option(
            metavar="NAME",
            help=f"Initial weights: {one_of(INITS)}; auto chooses by activation.",
            rich_help_panel=NETWORK,
        ),
    ] = "auto"

    loss: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help=f"{one_of(LOSSES)}. Unless given: cross_entropy for classes, mse for numbers. binary_cross_entropy is "
            "for two classes; mse, mae and huber train classes as one-hot rows.",
            rich_help_panel=LOSS,
        ),
    ] = None
    label_smoothing: Annotated[
        float | None,
        typer.Option(help="For cross_entropy: weight of the uniform distribution in the target.", rich_help_panel=LOSS),
    ] = None
    class_weight: Annotated[
        str | None,
        typer.Option(
            metavar="WEIGHTS",
            help="balanced (inversely to how often each class occurs in the training rows), or a number for each "
            "class: 1,2.5,1.",
            rich_help_panel=LOSS,
        ),
    ] = None
    delta: Annotated[
        float | None, typer.Option(help="For huber: errors above this count linearly (1).", rich_help_panel=LOSS)
    ] = None
    quantile: Annotated[
        float | None,
        typer.Option(help="For the loss quantile: the quantile to learn (0.5).", rich_help_panel=LOSS),
    ] = None

    optimizer: Annotated[
        str, typer.Option(metavar="NAME", help=f"{one_of(OPTIMIZERS)}.", rich_help_panel=OPTIMIZER)
    ] = "adam"
    lr: Annotated[
        float | None,
        typer.Option(
            "--lr",
            help="Learning rate; 0.01 for sgd, 0.001 for adam and adamw unless given.",
            rich_help_panel=OPTIMIZER,
        ),
    ] = None
    momentum: Annotated[
        float | None, typer.Option(help="For sgd, 0 or more and less than 1 (0).", rich_help_panel=OPTIMIZER)
    ] = None
    nesterov: Annotated[
        bool, typer.Option("--nesterov", help="For sgd: Nesterov's momentum.", rich_help_panel=OPTIMIZER)
    ] = False
    weight_decay: Annotated[
        float | None,
        typer.Option(
            help="L2 penalty for sgd and adam (0), decoupled decay for adamw (0.01).", rich_help_panel=OPTIMIZER
        ),
    ] = None
    decay_biases: Annotated[
        bool,
        typer.Option(
            "--decay-biases/--no-decay-biases", help="Whether weight decay acts on biases.", rich_help_panel=OPTIMIZER
        ),
    ] = True
    beta1: Annotated[
        float | None, typer.Option(help="For adam and adamw: average of gradients (0.9).", rich_help_panel=OPTIMIZER)
    ] = None
    beta2: Annotated[
        float | None,
        typer.Option(help="For adam and adamw: average of their squares (0.999).", rich_help_panel=OPTIMIZER),
    ] = None
    eps: Annotated[
        float | None, typer.Option(help="For adam and adamw: epsilon (1e-8).", rich_help_panel=OPTIMIZER)
    ] = None
    clip_norm: Annotated[
        float | None,
        typer.Option(help="Scale gradients with a greater global norm down to this norm.", rich_help_panel=OPTIMIZER),
    ] = None
    accumulate: Annotated[
        int, typer.Option(help="Batches whose gradients are averaged for one update.", rich_help_panel=OPTIMIZER)
    ] = 1

    batch_size: Annotated[int, typer.Option(help="Rows a step.", rich_help_panel=TRAINING)] = 32
    seed: Annotated[
        int,
        typer.Option(help="Seed of the split, the initial weights, dropout and row order.", rich_help_panel=TRAINING),
    ] = 0

    backend: Annotated[
        str,
        typer.Option(
            metavar="NAME",
            help="auto, triton, cupy or numpy; fusemlp doctor says which work here.",
            rich_help_panel=MACHINE,
        ),
    ] = "auto"
    device: Annotated[
        str | None, typer.Option(metavar="NAME", help="Which card, such as cuda:1.", rich_help_panel=MACHINE)
    ] = None
    precision: Annotated[
        str, typer.Option(metavar="NAME", help="fp32, tf32, bf16, fp16 or fp64.", rich_help_panel=MACHINE)
    ] = "fp32"
    plan: Annotated[
        str, typer.Option(metavar="NAME", help="auto, eager, graph or resident.", rich_help_panel=MACHINE)
    ] = "auto"


@dataclass(frozen=True)
class FitOptions(ModelOptions):
    """The further options of ``train`` and ``sweep``: the schedule, the training and its output."""

    schedule: Annotated[
        str,
        typer.Option(
            metavar="NAME",
            help=f"{one_of(SCHEDULES)}.",
            rich_help_panel=RATE,
        ),
    ] = "constant"
    lr_step: Annotated[
        float | None, typer.Option(help="For step: epochs between two reductions.", rich_help_panel=RATE)
    ] = None
    lr_gamma: Annotated[
        float | None,
        typer.Option(
            help="Factor on the rate: at each step (0.1), each epoch (exponential), on a plateau (0.1).",
            rich_help_panel=RATE,
        ),
    ] = None
    lr_final: Annotated[
        float | None,
        typer.Option(
            help="The final rate of cosine (0) and one_cycle (lr / 250000); the minimum of reduce_on_plateau (0).",
            rich_help_panel=RATE,
        ),
    ] = None
    lr_patience: Annotated[
        int | None,
        typer.Option(
            help="For reduce_on_plateau: epochs without a better validation loss before a reduction (10).",
            rich_help_panel=RATE,
        ),
    ] = None
    warmup: Annotated[
        float,
        typer.Option(
            help="Epochs, 0.5 for half of one, over which the rate first grows linearly to the schedule's start.",
            rich_help_panel=RATE,
        ),
    ] = 0.0

    epochs: Annotated[
        int | None,
        typer.Option(help="Passes over the training rows; 60 unless given.", rich_help_panel=TRAINING),
    ] = None
    early_stopping: Annotated[
        int | None,
        typer.Option(
            metavar="EPOCHS",
            help="Stop after this many epochs without a better validation loss, and restore the best weights.",
            rich_help_panel=TRAINING,
        ),
    ] = None
    drop_last: Annotated[
        bool,
        typer.Option(
            "--drop-last", help="Leave out the last batch of an epoch if it is short.", rich_help_panel=TRAINING
        ),
    ] = False

    out: Annotated[
        str | None,
        typer.Option(
            metavar="DIR",
            help="The run folder, new or empty; runs/DATA-DATE-TIME unless given.",
            rich_help_panel=OUTPUT,
        ),
    ] = None
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the results as one JSON object.", rich_help_panel=OUTPUT)
    ] = False
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Show no progress.", rich_help_panel=OUTPUT)] = False


@dataclass(frozen=True)
class TrainOptions(FitOptions):
    """The options of ``train``."""

    resume: Annotated[
        str | None,
        typer.Option(
            metavar="RUN",
            help="Continue the run in this folder from its last checkpoint, exactly as if it had never "
            "stopped; --epochs may be raised.",
            rich_help_panel=OUTPUT,
        ),
    ] = None
    checkpoint_every: Annotated[
        int, typer.Option(metavar="EPOCHS", help="Epochs between two checkpoints.", rich_help_panel=OUTPUT)
    ] = 1


@dataclass(frozen=True)
class FindOptions(ModelOptions):
    """The options of ``lr-find``."""

    start: Annotated[float, typer.Option("--from", help="The first learning rate.", rich_help_panel=RATE)] = 1e-6
    end: Annotated[float, typer.Option("--to", help="The last learning rate.", rich_help_panel=RATE)] = 10.0
    steps: Annotated[int, typer.Option(help="Updates of the sweep.", rich_help_panel=RATE)] = 200
    plot: Annotated[
        str | None,
        typer.Option(metavar="FILE", help="Draw loss over learning rate into this PNG file.", rich_help_panel=OUTPUT),
    ] = None
    force: Annotated[bool, typer.Option("--force", help="Overwrite the plot.", rich_help_panel=OUTPUT)] = False
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the results as one JSON object.", rich_help_panel=OUTPUT)
    ] = False
