"""The command line ``fusemlp``: parse options, show ``--help``, call a command, turn errors into exit codes.

Exit codes: 0 success, 1 the work failed (bad data, divergence, a missing backend), 2 wrong usage. A command is
imported when it is called: ``fusemlp --help`` loads no engine.
"""

from __future__ import annotations

import difflib
import errno
import gc
import importlib
import inspect
import io
import itertools
import os
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout, suppress
from dataclasses import MISSING, Field, fields
from functools import partial
from pathlib import Path
from textwrap import TextWrapper
from typing import Annotated, Any, get_type_hints

import typer
from typer.completion import completion_init, get_completion_script  # type: ignore[attr-defined]
from typer.core import TyperCommand, TyperGroup

from fusemlp._version import __version__
from fusemlp.callbacks.progress import compilations_shown
from fusemlp.cli import options as commands
from fusemlp.cli.options import SHELLS, CompletionOptions
from fusemlp.datasets.load import NAMES
from fusemlp.describe.checks import check_choice
from fusemlp.report.runs import unlock
from fusemlp.runtime.ranks import ALONE, leading, report_failure, started
from fusemlp.tables.recipe import PANELS, name_of
from fusemlp_kernels.errors import ArgumentError, ArgumentTypeError, DataError, DTypeError, FusemlpError, ShapeError


class _Stream(io.FileIO):
    """A standard stream; the program goes on after its ``failure``, as of a full disk or a reader that is gone."""

    failure: OSError | None = None

    def write(self, data: Any) -> int:
        if self.failure is None:
            try:
                return super().write(data)
            except OSError as error:
                self.failure = error
        return len(data)


def _lasting(stream: Any) -> Any:
    """Return a standard stream, None for a closed one, as a stream whose writes do not fail."""
    buffer = getattr(stream, "buffer", None)
    if stream is not None and type(getattr(buffer, "raw", buffer)) is not io.FileIO:
        # A console of Windows, or none of the system's streams.
        return stream
    # A later file must not get the number of a closed stream, to which libraries may write.
    number = os.open(os.devnull, os.O_WRONLY) if stream is None else stream.fileno()
    writer = io.BufferedWriter(_Stream(number, "w", closefd=False))
    return io.TextIOWrapper(writer, getattr(stream, "encoding", "utf-8"), "backslashreplace", line_buffering=True)


@contextmanager
def lasting_streams() -> Iterator[None]:
    """Go on in the body when stdout or stderr fails; exit with 1 at its end if stdout has lost results."""
    with redirect_stdout(_lasting(sys.stdout)) as out, redirect_stderr(_lasting(sys.stderr)):
        try:
            yield
        finally:
            out.flush()
            failure = getattr(getattr(getattr(out, "buffer", None), "raw", None), "failure", None)
            if failure is not None and failure.errno != errno.EPIPE:
                print(f"error: stdout: {failure.strerror}, so results are not shown", file=sys.stderr)
                sys.exit(1)


_WORDS = {
    "activation": "act activation-function nonlinearity",
    "batch-size": "batch batchsize bs mini-batch-size train-batch-size",
    "clip-norm": "clip clip-grad-norm clipnorm grad-clip gradient-clip gradient-clip-val max-grad-norm",
    "device": "cuda gpu gpus",
    "dropout": "drop-rate dropout-prob dropout-rate",
    "early-stopping": "early-stop early-stopping-patience early-stopping-rounds n-iter-no-change patience",
    "epochs": "epoch iterations max-epochs max-iter n-epochs nb-epoch nb-epochs num-epochs num-train-epochs",
    "hidden": "hidden-dim hidden-layer-sizes hidden-layers hidden-size hidden-units layers units",
    "loss": "criterion loss-fn loss-function objective",
    "lr": "eta learning-rate learning-rate-init lr-init step-size",
    "models": "ensemble ensemble-size n-estimators n-models num-models",
    "optimizer": "opt optim optimiser solver",
    "out": "out-dir output output-dir output-file save-dir",
    "schedule": "lr-schedule lr-schedule-type lr-scheduler scheduler",
    "seed": "random-seed random-state rng-seed",
    "target": "label label-column outcome response target-column",
    "time-limit": "max-time time-budget timeout",
    "validation-fraction": "val-fraction val-split validation-size validation-split",
    "weight-decay": "alpha l2 reg wd",
}
# The option for each.
SYNONYMS = {f"--{word}": f"--{option}" for option, words in _WORDS.items() for word in words.split()}
# Options of earlier releases, and what took their place.
REMOVED = {
    "--checkpoint-every": "writes of checkpoints take at most a twentieth of the time now; leave it out",
    "--shard-optimizer": "each process keeps the whole state of the optimizer now; leave it out",
    "--devices": "start a sweep for each card, CUDA_VISIBLE_DEVICES=1 fusemlp sweep ..., with its part of the grid",
}


def completion(options: CompletionOptions) -> None:
    """Print the script."""
    shell = check_choice("shell", options.shell, SHELLS)
    typer.echo(get_completion_script(prog_name=PROGRAM, complete_var=COMPLETE_VARIABLE, shell=shell))


# Options that take several numbers, joined by commas.
LISTS = ("hidden", "dropout", "class_weight")
# The error for an option that a command does not know; typer names it in no public place.
UsageError: Any = typer.BadParameter.__base__
# Shows all options of a command that has many.
HELP_ALL = "--help-all"


# A command with more options than this shows those of its own that are common, each in a sentence.
MOST = 21
COMMON = {
    *("vary", "sample", "seeds", "jobs", "target", "id", "drop", "hidden", "loss", "optimizer", "lr"),
    *("epochs", "early_stopping", "models", "time_limit", "seed", "start", "end", "steps", "plot"),
    *("batch_size", "out", "resume"),
}
# The commands by what people do.
GROUPS = {
    "Train": ("train", "sweep", "lr-find"),
    "Use a model": ("predict", "evaluate", "explain", "export"),
    "Look at runs": ("runs", "report", "plot"),
    "Machine": ("doctor", "plan", "bench", "completion"),
}
# The most columns of a line, and of the names beside their texts; a narrower terminal has the texts below the names.
WIDEST, BESIDE, ROOMY = 100, 28, 70

Rows = Sequence[tuple[str, str]]
# No option is cut in two.
_wrapper = partial(TextWrapper, break_long_words=False, break_on_hyphens=False)


def _row(option: Any) -> tuple[str, str]:
    """Return the names of an option with the word for its value, and its explanation with the default."""
    names, default = ", ".join(sorted(option.opts, key=len)), option.default
    if option.secondary_opts:
        names, default = f"{names} / {option.secondary_opts[0]}", option.opts[0] if default else None
    note = " [required]" if option.required else "" if default in (None, False) else f" [default: {default}]"
    return f"{names} {option.metavar or ''}".rstrip(), f"{option.help}{note}"


def _opening(text: str, end: str) -> str:
    """Return the first paragraph or sentence of a text."""
    return text if end not in text else text.split(end)[0] + end.rstrip()


def _page(usage: str, about: str, sections: Mapping[str, Rows], rest: str) -> str:
    """Return a page; an indented paragraph of ``about`` holds commands to copy, each on its line."""
    width = min(shutil.get_terminal_size().columns, WIDEST)
    parts = [f"Usage: {usage}"]
    for part in about.split("\n\n"):
        parts.append(part if part.startswith(" ") else _wrapper(width=width).fill(part))
    for title, rows in sections.items():
        parts.append("\n".join([typer.style(title, bold=True), *_listed(rows, width)]))
    return "\n\n".join([*parts, *filter(None, [rest])])


def _listed(rows: Rows, width: int) -> Iterator[str]:
    """Yield the lines of names with their texts."""
    indent = " " * (min(BESIDE, 4 + max(len(name) for name, _ in rows)) if width >= ROOMY else 6)
    for name, text in rows:
        beside = f"  {name}  ".ljust(len(indent))
        if len(beside) > len(indent):
            yield beside.rstrip()
            beside = indent
        yield _wrapper(width=width, initial_indent=beside, subsequent_indent=indent).fill(text)


class Command(TyperCommand):
    """A command of ``fusemlp``, whose errors for unknown options and words too many show what was meant."""

    def format_help(self, ctx: Any, formatter: Any) -> None:
        path: str = ctx.command_path
        parameters: list[Any] = self.get_params(ctx)
        arguments = [parameter for parameter in parameters if parameter.param_type_name == "argument"]
        options = [parameter for parameter in parameters if parameter.param_type_name == "option"]
        usage = [path, "[OPTIONS]", *(each.metavar if each.required else f"[{each.metavar}]" for each in arguments)]
        themes: dict[str, list[tuple[str, str]]] = {}
        for option in options:
            # --help itself has no theme
            themes.setdefault(getattr(option, "rich_help_panel", None) or "Options", []).append(_row(option))
        rest = ""
        if len(options) > MOST and not ctx.meta.get(HELP_ALL, False):
            rows = map(_row, (option for option in options if option.name in COMMON))
            themes = {"Common options": [(name, _opening(text, ". ")) for name, text in rows]}
            rest = f"{path} --help-all shows all {len(options)} options by theme."
        described = {"Arguments": [(each.metavar, each.help) for each in arguments]} if arguments else {}
        formatter.write(_page(" ".join(usage), self.help or "", {**described, **themes}, rest))

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        asked, allowed = list(args), ctx.allow_extra_args
        ctx.meta[HELP_ALL] = HELP_ALL in args
        ctx.allow_extra_args = True
        try:
            extra = super().parse_args(ctx, args)
        except UsageError as error:
            # typer names the class of the error in no public place either
            if hasattr(error, "possibilities"):
                ctx.fail(f"No such option: {error.option_name}{self._option_meant(error.option_name)}")
            raise
        ctx.allow_extra_args = allowed
        order = [] if ctx.resilient_parsing else self.make_parser(ctx).parse_args(args=list(asked))[2]
        for option in order:
            # typer drops all values but the last
            if order.count(option) > 1 and not option.multiple:
                times = f"expected once, got it {order.count(option)} times"
                ctx.fail(f"{option.opts[0]}: {times}; leave all but one out")
        if extra and not allowed and not ctx.resilient_parsing:
            words = " ".join(word if word.isprintable() else repr(word) for word in extra)
            ctx.fail(f"Got unexpected extra argument(s) ({words}){self._meant(asked, extra)}")
        return extra

    def _option_meant(self, unknown: str) -> str:
        """Return a hint at the option that an unknown one was meant for, "" if none is near."""
        word = unknown.lower().replace("_", "-")
        if word in REMOVED:
            return f": it is gone: {REMOVED[word]}"
        option = SYNONYMS.get(word, word)
        known = [name for parameter in self.params for name in parameter.opts if name.startswith("--")]
        if option not in known and option in OWNERS:
            return f"; {PROGRAM} {OWNERS[option]} has {'it' if option == unknown else option}"
        near = difflib.get_close_matches(option, known, n=1)
        return f"; did you mean {near[0]}?" if near else ""

    def _meant(self, asked: Sequence[str], extra: Sequence[str]) -> str:
        """Return the option that words without one were meant for, "" if there is none."""
        known = {name: parameter for parameter in self.params for name in parameter.opts}
        for place, name in enumerate(asked[:-2]):
            values = list(itertools.takewhile(lambda word: not word.startswith("-"), asked[place + 1 :]))
            option = known.get(name) if name.startswith("-") else None
            numbers = list(itertools.takewhile(lambda word: word.replace(".", "").isdigit(), values))
            if option is not None and option.name in LISTS and len(numbers) > 1:
                return f"; did you mean {name} {','.join(numbers)}?"
            if getattr(option, "multiple", False) and values[1:] and set(values[1:]) <= set(extra):
                return f"; did you mean {' '.join(f'{name} {value}' for value in values)}?"
        folders = [word for word in asked if Path(word, "config.json").is_file()]
        if len(folders) > 1:
            newest = max(folders, key=lambda folder: Path(folder, "config.json").stat().st_mtime)
            return f"; expected one run, and the newest of these is {newest}"
        meant = next((name for name in ("--target", "--data") if name in known and name not in asked), "")
        if not meant or set(asked) & set(NAMES):
            return ""
        return f"; did you mean {meant} {extra[0]}?"


class Group(TyperGroup):
    """The program ``fusemlp``."""

    def format_help(self, ctx: Any, formatter: Any) -> None:
        about = {name: _opening(command.help or "", "\n\n") for name, command in self.commands.items()}
        groups = {title: [(name, about[name]) for name in names] for title, names in GROUPS.items()}
        rest = "fusemlp COMMAND --help shows the options of a command."
        sections = {**groups, "Options": [*map(_row, self.get_params(ctx))]}
        formatter.write(_page("fusemlp COMMAND [OPTIONS]", self.help or "", sections, rest))


app = typer.Typer(
    cls=Group,
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help", HELP_ALL]},
)

# The module of a command, which has a function of its name, unless that is its name too.
MODULES = {
    **dict.fromkeys(("evaluate", "predict", "report", "export"), "model"),
    **dict.fromkeys(("lr_find", "doctor", "plan", "explain"), "probes"),
    "plot": "runs",
    "completion": "app",
}
COMMANDS = {
    "train": commands.TrainOptions,
    "sweep": commands.SweepOptions,
    "evaluate": commands.EvaluateOptions,
    "report": commands.ReportOptions,
    "explain": commands.ExplainOptions,
    "predict": commands.PredictOptions,
    "export": commands.ExportOptions,
    "plot": commands.PlotOptions,
    "runs": commands.RunsOptions,
    "plan": commands.PlanOptions,
    "lr_find": commands.FindOptions,
    "doctor": commands.DoctorOptions,
    "completion": commands.CompletionOptions,
}
# The options of all commands by name, but ``--data``: where that is wrong, it is an argument of most.
OPTIONS = {
    # --from is transfer_from in Python
    name: f"--{name_of(field)}"
    for field in itertools.chain(*map(fields, COMMANDS.values()))
    if field.metadata["names"] is not None and field.name != "data"
    for name in (field.name, name_of(field).replace("-", "_"))
}
# The command that has an option, the first of several.
OWNERS = {
    f"--{name_of(field)}": name.replace("_", "-")
    for name, options in reversed(COMMANDS.items())
    for field in fields(options)
    if field.metadata["names"] is not None
}
PROGRAM = "fusemlp"
# A shell sets it to ask for completions.
COMPLETE_VARIABLE = "_FUSEMLP_COMPLETE"
# The new objects after which Python looks for cycles of them. A command's imports make many that last.
COLLECTED = 10_000
# The word for a value in --help; none for a flag.
METAVARS: dict[Any, str] = {str: "NAME", Path: "FILE", int: "COUNT", float: "NUMBER", bool: ""}
METAVARS |= {kind | None: word for kind, word in METAVARS.items()}


def _fraction(text: Any) -> float:
    try:
        return float(text)
    except ValueError:
        raise typer.BadParameter(f"expected a number such as 0.01, with a point, got {text!r}") from None


def _whole(text: Any) -> int:
    """Return a whole number, which may be written as 1e3."""
    with suppress(ValueError):
        return int(text)
    if (value := _fraction(text)).is_integer():
        return int(value)
    raise typer.BadParameter(f"expected a whole number such as 100, got {text!r}")


PARSERS: dict[Any, Any] = {int: _whole, int | None: _whole, float: _fraction, float | None: _fraction}


def show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"fusemlp {__version__}")
        raise typer.Exit


VERSION = typer.Option(
    "--version", callback=show_version, is_eager=True, metavar="", help="Print the version and exit."
)


@app.callback()
def about(version: Annotated[bool, VERSION] = False) -> None:
    """Multi-layer perceptrons, trained by fused kernels.

    To begin:

      fusemlp train digits
    """


def _command(name: str, described: type[Any]) -> Callable[..., None]:
    """Return a function for typer whose parameters are the fields of ``described``, by the panels of --help."""

    def command(**values: Any) -> None:
        if started() and name != "train":
            raise ArgumentError(
                f"fusemlp {name.replace('_', '-')}: it runs in one process, and torchrun has started several; {ALONE}"
            )
        module = importlib.import_module(f"fusemlp.cli.{MODULES.get(name, name)}")
        getattr(module, name)(described(**values))

    hints = get_type_hints(described)
    ordered = sorted(fields(described), key=lambda field: PANELS.index(field.metadata["panel"]))
    parameters = [_parameter(field, hints[field.name]) for field in ordered]
    command.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    command.__dict__["__signature__"] = inspect.Signature(parameters)
    return command


def _parameter(field: Field[Any], hint: Any) -> inspect.Parameter:
    keys = "panel", "help", "metavar", "names", "choices", "kind"
    panel, text, metavar, names, choices, kind = (field.metadata[key] for key in keys)
    hint = hint if kind is None else kind
    info: Any
    if names is None:
        info = typer.Argument(metavar=metavar, help=text, show_default=False, autocompletion=choices)
    else:
        if field.default is False and not names:
            # A flag that is off needs no --no-flag.
            names = (f"--{field.name.replace('_', '-')}",)
        shown: dict[str, Any] = {"metavar": metavar or METAVARS.get(hint), "help": text, "rich_help_panel": panel}
        info = typer.Option(*names, **shown, autocompletion=choices, parser=PARSERS.get(hint))
    default = inspect.Parameter.empty if field.default is MISSING else field.default
    keyword = inspect.Parameter.KEYWORD_ONLY
    return inspect.Parameter(field.name, keyword, default=default, annotation=Annotated[hint, info])


for _name, _options in COMMANDS.items():
    app.command(_name.replace("_", "-"), cls=Command, help=inspect.getdoc(_options))(_command(_name, _options))


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []})
def bench(context: typer.Context) -> None:
    """Time training steps beside PyTorch, JAX and scikit-learn, in a checkout: the options of python -m bench."""
    package = Path(__file__).resolve().parents[1]
    root = package.parents[1]
    if not (root / "bench" / "__main__.py").is_file():
        reason = f"the benchmark comes with a checkout of fusemlp, and this is an installed copy ({package})"
        raise ArgumentError(f'{reason}. In a checkout, with pip install -e ".[bench]": fusemlp bench --quick')
    path = os.pathsep.join(filter(None, [str(root), os.environ.get("PYTHONPATH")]))
    # -P ignores a folder "bench" in the working directory.
    command = [sys.executable, "-P", "-m", "bench", *context.args]
    process = subprocess.Popen(command, env={**os.environ, "PYTHONPATH": path})
    while process.poll() is None:
        # Ctrl-C reached the benchmark too; wait for its own end.
        with suppress(KeyboardInterrupt):
            process.wait()
    raise typer.Exit(process.returncode)


def exit_code(error: FusemlpError) -> int:
    """2 for an argument that could not be meant, 1 for everything that fails in the doing."""
    if isinstance(error, (DataError, ShapeError, DTypeError)):
        return 1
    return 2 if isinstance(error, (ArgumentError, ArgumentTypeError)) else 1


def one_line(error: FusemlpError) -> str:
    """Return the message on a line, an argument called as its option here; several mistakes keep a line each."""
    message = "\n  ".join(" ".join(part.split()) for part in str(error).split("\n  "))
    name, colon, rest = message.partition(": ")
    option = OPTIONS.get(name) if exit_code(error) == 2 else None
    return f"{option}{colon}{rest}" if option else message


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line and exit; what fusemlp raises on purpose becomes one line on stderr."""
    for stream in (sys.stdout, sys.stderr):
        # on Windows a redirected output has a code page that lacks most letters of the world
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    collected = gc.get_threshold()
    gc.set_threshold(COLLECTED, *collected[1:])
    with lasting_streams(), warnings.catch_warnings():
        warnings.showwarning = lambda message, *_, **__: print(f"warning: {message}", file=sys.stderr)
        if not leading():
            # rank 0 gives them
            warnings.simplefilter("ignore")
        try:
            if COMPLETE_VARIABLE in os.environ:
                completion_init()
            words = sys.argv[1:] if arguments is None else arguments
            with compilations_shown(quiet="--quiet" in words or not leading()):
                app(arguments, prog_name=PROGRAM, complete_var=COMPLETE_VARIABLE)
        except FusemlpError as error:
            message, code = one_line(error), exit_code(error)
            if not leading():
                message = f"rank {os.environ['RANK']}: {message}"
        except MemoryError as error:
            message, code = f"there is not enough memory: {error}; narrower layers or smaller batches need less", 1
        except OSError as error:
            message, code = ": ".join(map(str, filter(None, (error.filename, error.strerror or error)))), 1
        else:
            return
        finally:
            unlock()
            gc.set_threshold(*collected)
        print(f"error: {message}", file=sys.stderr)
        report_failure(f"error: {message}")
        sys.exit(code)
