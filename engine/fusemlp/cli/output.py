"""Print the results of a command, tell its events as JSON lines, and record it with an experiment tracker."""

from __future__ import annotations

import json
import math
import os
import shlex
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, redirect_stdout
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fusemlp._version import __version__
from fusemlp.callbacks import Callback
from fusemlp.callbacks.loggers import FAILED, FINISHED, INTERRUPTED, TRACKERS, Tracker, configured
from fusemlp.callbacks.progress import Forecast, waiting
from fusemlp.cli.options import OutputOptions, SweepOptions, TrainOptions
from fusemlp.datasets.tables import reason
from fusemlp.describe.checks import WINDOWS, aligned, check_choice
from fusemlp.engine import Engine
from fusemlp.fleet.results import Member
from fusemlp.report.metrics import scalars
from fusemlp.report.plots import picture
from fusemlp.report.runs import Run, read_json, write_json
from fusemlp.runtime.files import write_atomically
from fusemlp.runtime.ranks import started
from fusemlp.tables.defaults import most_epochs
from fusemlp.tables.recipe import one_of
from fusemlp_kernels.errors import ArgumentError, DataError, DistributedError, FusemlpError

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def show(content: Mapping[str, Any], lines: Iterable[str], *, as_json: bool, warnings: Iterable[str] = ()) -> None:
    """Print ``content`` as one JSON object and the warnings on stderr, or ``lines`` and after them the warnings."""
    if as_json:
        print(json.dumps(finite(content)), flush=True)
    else:
        print(*lines, sep="\n", flush=True)
    for warning in warnings:
        print(f"warning: {warning}", file=sys.stderr if as_json else sys.stdout, flush=True)


def show_with_picture(
    path: Path | None, make: Callable[[], Figure], content: dict[str, Any], lines: list[str], *, as_json: bool
) -> None:
    """Write a picture, if there is a path for it, and print the results, also where the picture fails."""
    try:
        if path is not None:
            write_picture(path, make)
            lines.append(f"plot {path}")
            content["plot"] = str(path)
    finally:
        show(content, lines, as_json=as_json)


def fitted(
    columns: Mapping[str, Sequence[str]], dispensable: Sequence[str] = (), width: int | None = None
) -> tuple[list[str], list[str]]:
    """Return columns as aligned lines, and the names of those left out, as many as a terminal has no room for."""
    kept, left_out = dict(columns), list[str]()
    while True:
        lines = aligned([*zip(*([name, *cells] for name, cells in kept.items()), strict=True)]).split("\n")
        if width is None or max(map(len, lines)) <= width or len(left_out) == len(dispensable):
            return lines, left_out
        left_out.append(dispensable[len(left_out)])
        del kept[left_out[-1]]


def command_line(words: Sequence[str]) -> str:
    """Return a command as this system's shell reads it."""
    return subprocess.list2cmdline(words) if WINDOWS else shlex.join(words)


def going_on(command: str, run: Path) -> str:
    """Return the command that goes on with a run or a sweep, by as many processes as torchrun has started here."""
    count = os.environ.get("LOCAL_WORLD_SIZE", os.environ.get("WORLD_SIZE", "1"))
    ranks = ["torchrun", "--nproc-per-node", count, "-m"] if started() else []
    return command_line([*ranks, "fusemlp", command, "--resume", str(run)])


@contextmanager
def preparing(options: TrainOptions | SweepOptions) -> Iterator[None]:
    """Show that data are prepared, and forecast the trials that decide how."""
    # a time limit is known without a forecast
    epochs = 0 if getattr(options, "time_limit", None) else most_epochs(options)
    fewer = "" if options.scale else "; --scale robust takes fewer"
    with waiting("preparing the data", quiet=options.quiet) as say:

        def tell(line: str) -> None:
            say(f"trials of how to prepare the columns: {line}{fewer}")

        with Forecast(epochs, tell, "", single=False):
            yield


def shorter(options: Any, epochs: int, fewer: str, *, validates: bool) -> str:
    """Return the option that shortens a training: ``fewer`` models if given; none for one that is resumed."""
    if options.resume is not None:
        return ""
    stops = options.early_stopping != 0 or not validates
    return fewer or (f"--epochs {max(1, epochs // 4)}" if stops else "--early-stopping 10")


def finite(content: Any) -> Any:
    """Return ``content`` for JSON, with None for NaN and infinities."""
    if isinstance(content, Mapping):
        return {name: finite(value) for name, value in content.items()}
    if isinstance(content, (list, tuple)):
        return [finite(value) for value in content]
    return None if isinstance(content, float) and not math.isfinite(content) else content


def check_output(argument: str, path: Path, suffixes: tuple[str, ...], *, force: bool) -> None:
    """Raise ArgumentError unless a file of this name may be written; call it before the work."""
    if not path.stem or not path.name.lower().endswith(suffixes):
        raise ArgumentError(f"{argument}: expected a file name ending in {one_of(suffixes)}, got {str(path)!r}")
    if path.is_dir() or (path.exists() and not force):
        raise ArgumentError(f"{argument}: {str(path)!r} exists; give another name, or --force to overwrite a file")
    if not path.absolute().parent.is_dir():
        raise ArgumentError(f"{argument}: there is no folder {str(path.parent)!r}; make it first")


def write_picture(path: Path, make: Callable[[], Figure], argument: str = "plot") -> None:
    """Write the picture of ``make`` as ``write_made`` does."""
    write_made(argument, path, lambda: picture(make(), path.suffix.lower().removeprefix(".")))


def write_made(argument: str, path: Path, make: Callable[[], bytes]) -> None:
    """Write the picture or page of ``make`` atomically; DataError if it cannot be made or written."""
    try:
        content = make()
    # names, numbers and the settings of matplotlib may be anything, and so are the errors
    except Exception as error:
        raise DataError(f"{argument}: {str(path)!r} cannot be made ({reason(error)})") from error
    try:
        write_atomically(path, content)
    except OSError as error:
        raise DataError(f"{argument}: {str(path)!r} cannot be written ({error.strerror})") from error


class Events(Callback):
    """Print the events of a training to stdout; nothing unless ``--json``, only the end with ``--quiet``."""

    def __init__(self, options: OutputOptions) -> None:
        self.wanted, self.quiet = options.as_json and not options.quiet, options.quiet
        self.stream = sys.stdout

    def say(self, line: str) -> None:
        """Print a line on stderr, unless ``--quiet``."""
        if not self.quiet:
            print(line, file=sys.stderr)

    def start(self, kind: str, *, epochs: int, **about: Any) -> None:
        self._epochs, self._began = epochs, time.perf_counter()
        self._print("start", {"kind": kind, "fusemlp": __version__, "epochs": epochs, **about})

    def epoch(self, row: Mapping[str, float]) -> None:
        """Print a row of ``metrics.csv``."""
        seconds = round(time.perf_counter() - self._began, 3)
        self._print("epoch", {"epoch": row["epoch"], "epochs": self._epochs, "seconds": seconds, **row})

    def on_epoch_end(self, engine: Engine, epoch: int, logs: dict[str, float]) -> None:
        self.epoch({"epoch": epoch + 1, **logs})

    def model(self, member: Member, models: int, parameters: Mapping[str, Any]) -> None:
        """Print a model of several that has ended."""
        best = member.history.best_epoch
        about = {"model": member.index, "models": models, "parameters": parameters, "status": member.status}
        figures = {"epochs": len(member.history.epochs), "best_epoch": None if best is None else best + 1}
        self._print("model", {**about, **figures, **member.scores})

    def _print(self, event: str, content: Mapping[str, Any]) -> None:
        if self.wanted:
            print(json.dumps(finite({"event": event, **content})), file=self.stream, flush=True)


@contextmanager
def work(options: OutputOptions, command: str, mark: str) -> Iterator[tuple[Events, list[Path]]]:
    """Yield the events of a command, and a list for its run; with ``--json`` what else is printed goes to stderr.

    An error of the system, as of a full disk, Ctrl-C, and a rank that is gone tell how to go on with the run, if it has
    the file ``mark``.
    """
    # the events keep the stream that is stdout now
    listener, runs = Events(options), list[Path]()
    with redirect_stdout(sys.stderr) if options.as_json else nullcontext():
        try:
            yield listener, runs
        except (OSError, KeyboardInterrupt, DistributedError) as error:
            for run in (run for run in runs if (run / mark).exists()):
                if isinstance(error, OSError):
                    error.strerror = f"{error.strerror or error}; when that is mended, go on: {going_on(command, run)}"
                else:
                    print(f"interrupted; to go on: {going_on(command, run)}", file=sys.stderr)
            raise


# The experiment or project of the runs, unless one of the variables names another.
PLACE = "fusemlp"
# Sweeps whose tracker could not open a run: they go on without it.
_refused: set[str] = set()
VARIABLES = {"mlflow": ("MLFLOW_EXPERIMENT_NAME", "MLFLOW_EXPERIMENT_ID", "MLFLOW_RUN_ID"), "wandb": ("WANDB_PROJECT",)}


def tracker_of(options: OutputOptions, name: str, run_id: str | None = None) -> Tracker | None:
    """Return the checked tracker of ``--track``, not open yet, or None; ``run_id`` continues an old run."""
    if options.track is None:
        return None
    kind = check_choice("track", options.track, TRACKERS)
    tracker = TRACKERS[kind](None if any(map(os.environ.get, VARIABLES[kind])) else PLACE, name, run_id=run_id)
    tracker.check_logs(())
    return tracker


def tracked_parameters(options: OutputOptions, engine: Engine, epochs: int) -> dict[str, Any]:
    """Return the options of a training, but those on its output, and the configuration of its engine."""
    deciding = {field.name: getattr(options, field.name) for field in fields(options) if decides_the_model(field)}
    return {**deciding, **configured(engine, epochs)}


def decides_the_model(field: Any) -> bool:
    """Return whether an option may change the model: those of the panel Output do not."""
    return bool(field.metadata["panel"] != "Output")


def note_id(run: Run, options: OutputOptions, tracker: Tracker) -> None:
    """Write the id into the run folder, where ``--resume`` finds it."""
    write_json(run.tracking, {**read_json(run.tracking), str(options.track): tracker.run_id})


def end_tracking(
    tracker: Tracker, run: Run, options: TrainOptions, report: Mapping[str, Any], failure: BaseException | None
) -> None:
    """Log the test scores, with ``--track-model`` the run folder, and close the tracker's run."""
    tracker.summary({f"test_{name}": value for name, value in scalars(report.get("test", {})).items()})
    if options.track_model and failure is None:
        tracker.upload(run.path)
    status = FAILED if failure is not None else INTERRUPTED if report["interrupted"] else FINISHED
    tracker.close(status, report["stopped"] or str(failure or ""))


def record_model(options: SweepOptions, sweep: str, member: Member, recipe: OutputOptions, epochs: int) -> None:
    """Record a finished model of a sweep as a run of its own."""
    tracker = None if sweep in _refused else tracker_of(options, f"{sweep}-{member.index}")
    if tracker is None:
        return
    try:
        tracker.open({**tracked_parameters(recipe, member.engine, epochs), "sweep": sweep, "model": member.index})
    except FusemlpError as error:
        _refused.add(sweep)
        warnings.warn(f"the models from {member.index} on are not tracked: {error}", stacklevel=2)
        return
    for row in member.history.rows():
        tracker.log(row)
    tracker.close(FAILED if member.status == "diverged" else FINISHED, member.reason)
