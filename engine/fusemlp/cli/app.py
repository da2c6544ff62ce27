"""The command line ``fusemlp``: parse options, call a command, turn errors into exit codes.

Exit codes: 0 success, 1 the work failed (bad data, divergence, a missing backend), 2 wrong usage. A command is
imported when it is called: ``fusemlp --help`` loads no engine.
"""

from __future__ import annotations

import dataclasses
import inspect
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, TextIO, TypeVar, get_type_hints

import typer

from fusemlp._version import __version__
from fusemlp.cli.options import FindOptions, ModelOptions, TrainOptions
from fusemlp.cli.sweep_options import SweepOptions
from fusemlp_kernels.errors import ArgumentError, ArgumentTypeError, DataError, DTypeError, FusemlpError, ShapeError

Options = TypeVar("Options", bound=ModelOptions)

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)

Run = Annotated[Path, typer.Argument(metavar="RUN", help="A run folder from train.", show_default=False)]
Weights = Annotated[
    str,
    typer.Option(
        metavar="NAME",
        help="The weights of the run: model (at the end of training), best (least validation loss) or last "
        "(last checkpoint).",
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print the results as one JSON object.")]
Force = Annotated[bool, typer.Option("--force", help="Overwrite a file that exists.")]
Backend = Annotated[
    str, typer.Option(metavar="NAME", help="auto, triton, cupy or numpy; fusemlp doctor says which work here.")
]
Device = Annotated[str | None, typer.Option(metavar="NAME", help="Which card, such as cuda:1.")]


def takes(options: type[Options]) -> Callable[[Callable[[Options], None]], Callable[..., None]]:
    """Make a command from a function of one dataclass; the fields become the command's parameters."""

    def decorate(function: Callable[[Options], None]) -> Callable[..., None]:
        def command(**given: Any) -> None:
            function(options(**given))

        hints = get_type_hints(options, include_extras=True)
        keyword = inspect.Parameter.KEYWORD_ONLY
        command.__name__, command.__doc__ = function.__name__, function.__doc__
        command.__annotations__ = {field.name: hints[field.name] for field in dataclasses.fields(options)}
        command.__dict__["__signature__"] = inspect.Signature(
            [
                inspect.Parameter(field.name, keyword, default=field.default, annotation=hints[field.name])
                for field in dataclasses.fields(options)
            ]
        )
        return command

    return decorate


def show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"fusemlp {__version__}")
        raise typer.Exit


@app.callback()
def about(
    version: Annotated[
        bool, typer.Option("--version", callback=show_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Multi-layer perceptrons, trained by fused kernels. To begin: [bold]fusemlp train digits[/bold]"""


@app.command()
@takes(TrainOptions)
def train(options: TrainOptions) -> None:
    """Train a network on DATA and write a run folder.

    A fifth of the rows is held out for the test at the end, unless the data bring a test set.

    Ctrl-C ends the training cleanly and keeps the model.
    """
    from fusemlp.cli.train import train as run

    run(options)


@app.command()
@takes(SweepOptions)
def sweep(options: SweepOptions) -> None:
    """Train many models on DATA that differ in the --vary parameters, and keep the best one in a run folder.

    The validation rows choose the best model; the test rows score only that one, at the end.

    The folder is a run as from train, with results.csv (a row a model) and scores.png (score over each parameter).

    Example: fusemlp sweep digits --vary lr=0.001:0.1:log:16 --vary hidden=32,64 --vary seed=0:20

    Example: fusemlp sweep iris --vary hidden=none,8,16x8 --vary dropout=0:0.5:6 --sample 10 --early-stopping 5

    Ctrl-C ends the sweep and keeps the results of the finished models.
    """
    from fusemlp.cli.sweep import sweep as run

    run(options)


@app.command()
def evaluate(
    run: Run,
    data: Annotated[
        str | None,
        typer.Option(metavar="DATA", help="Labelled data by name or path; the run's own test rows unless given."),
    ] = None,
    weights: Weights = "model",
    backend: Backend = "auto",
    device: Device = None,
    as_json: AsJson = False,
) -> None:
    """Score the model of a run on its test rows, or on other labelled data."""
    from fusemlp.cli.apply import evaluate as answer

    answer(run, data, weights=weights, backend=backend, device=device, as_json=as_json)


@app.command()
def predict(
    run: Run,
    data: Annotated[str, typer.Option(metavar="FILE", help="Features: .npz with X, .csv, .tsv, .parquet, IDX folder.")],
    out: Annotated[Path, typer.Option(metavar="FILE", help="File for the predictions: .csv or .npz.")],
    proba: Annotated[bool, typer.Option("--proba", help="Also write the probability of each class.")] = False,
    weights: Weights = "model",
    force: Force = False,
    backend: Backend = "auto",
    device: Device = None,
    as_json: AsJson = False,
) -> None:
    """Predict labels, or values in original units, for new rows."""
    from fusemlp.cli.apply import predict as answer

    answer(
        run,
        data,
        out,
        proba=proba,
        weights=weights,
        force=force,
        backend=backend,
        device=device,
        as_json=as_json,
    )


@app.command()
def export(
    run: Run,
    onnx: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="An ONNX graph (.onnx): features as they are in the data go in, labels or values in original units "
            "come out.",
        ),
    ] = None,
    safetensors: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="The network's parameters by torch's names and its architecture (.safetensors), for fusemlp.load; "
            "its inputs are the scaled features.",
        ),
    ] = None,
    bare: Annotated[
        bool,
        typer.Option(
            "--bare", help="Leave the scaling of the features, and of a regression's targets, out of the graph."
        ),
    ] = False,
    weights: Weights = "model",
    force: Force = False,
    as_json: AsJson = False,
) -> None:
    """Write the model of a run as a file for other programs.

    Example: fusemlp export runs/digits-... --onnx digits.onnx
    """
    from fusemlp.cli.export import export as answer

    answer(run, onnx=onnx, safetensors=safetensors, bare=bare, weights=weights, force=force, as_json=as_json)


@app.command()
def plot(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="Run folders from train.", show_default=False)],
    out: Annotated[Path, typer.Option(metavar="FILE", help="File for the picture: .png, .svg or .pdf.")] = Path(
        "comparison.png"
    ),
    force: Force = False,
    as_json: AsJson = False,
) -> None:
    """Draw the curves of several runs into one picture, to compare them."""
    from fusemlp.cli.plot import plot as answer

    answer(runs, out=out, force=force, as_json=as_json)


@app.command()
def plan(
    sizes: Annotated[
        list[int], typer.Argument(metavar="SIZES...", help="Widths from the input to the output.", show_default=False)
    ],
    batch_size: Annotated[int, typer.Option(help="Rows a step.")] = 32,
    backend: Annotated[
        str, typer.Option(metavar="NAME", help="triton, cupy or numpy; it need not work on this machine.")
    ] = "auto",
    precision: Annotated[str, typer.Option(metavar="NAME", help="fp32, tf32, bf16, fp16 or fp64.")] = "fp32",
    activation: Annotated[
        str, typer.Option(metavar="NAME", help="Activation of the hidden layers; one, or one a layer (relu,tanh).")
    ] = "relu",
    output_activation: Annotated[
        str, typer.Option(metavar="NAME", help="Activation of the output layer.")
    ] = "identity",
    dropout: Annotated[str, typer.Option(metavar="RATE", help="One, or one a hidden layer.")] = "0",
    loss: Annotated[str, typer.Option(metavar="NAME", help="Loss of the output layer.")] = "cross_entropy",
    optimizer: Annotated[str, typer.Option(metavar="NAME", help="sgd, adam or adamw.")] = "sgd",
) -> None:
    """Print the kernel calls of a training step, with what each reads, writes and costs.

    Example: fusemlp plan 784 128 10 --batch-size 128 --backend triton
    """
    from fusemlp.cli.plan import plan as answer

    answer(
        sizes,
        batch_size=batch_size,
        backend=backend,
        precision=precision,
        activation=activation,
        output_activation=output_activation,
        dropout=dropout,
        loss=loss,
        optimizer=optimizer,
    )


@app.command("lr-find")
@takes(FindOptions)
def lr_find(options: FindOptions) -> None:
    """Raise the learning rate from step to step, watch the loss, and suggest a rate for DATA.

    Nothing is kept of the network that is trained for it.
    """
    from fusemlp.cli.lr_find import lr_find as answer

    answer(options)


@app.command()
def doctor(as_json: AsJson = False) -> None:
    """Say which backends work here, and for each that does not, why and how to get it."""
    from fusemlp.cli.doctor import doctor as answer

    answer(as_json=as_json)


@app.command(
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []},
)
def bench(context: typer.Context) -> None:
    """Time training steps beside PyTorch, JAX and scikit-learn: [bold]fusemlp bench --quick[/bold], in a checkout.

    All options are those of python -m bench; see fusemlp bench --help.
    """
    from fusemlp.cli.bench import bench as run

    raise typer.Exit(run(context.args))


def exit_code(error: FusemlpError) -> int:
    """2 for an argument that could not be meant, 1 for everything that fails in the doing."""
    if isinstance(error, (DataError, ShapeError, DTypeError)):
        return 1
    return 2 if isinstance(error, (ArgumentError, ArgumentTypeError)) else 1


def one_line(error: FusemlpError) -> str:
    """The message, an argument that is an option called by the name it has here: ``--batch-size``."""
    message = " ".join(str(error).split())
    name, colon, rest = message.partition(": ")
    option = f"--{name.replace('_', '-')}"
    return f"{option}{colon}{rest}" if exit_code(error) == 2 and option in _options() else message


def _options() -> set[str]:
    """The options of all commands, but ``--data``: where that is wrong, it is an argument of most."""
    commands = getattr(typer.main.get_command(app), "commands", {}).values()
    return {option for command in commands for parameter in command.params for option in parameter.opts} - {"--data"}


def _show_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    print(f"warning: {message}", file=sys.stderr)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line and exit; what fusemlp raises on purpose becomes one line on stderr."""
    with warnings.catch_warnings():
        warnings.showwarning = _show_warning
        try:
            app(arguments, prog_name="fusemlp")
        except FusemlpError as error:
            print(f"error: {one_line(error)}", file=sys.stderr)
            sys.exit(exit_code(error))
        except MemoryError as error:
            print(
                f"error: there is not enough memory: {error}; narrower layers or smaller batches need less",
                file=sys.stderr,
            )
            sys.exit(1)
