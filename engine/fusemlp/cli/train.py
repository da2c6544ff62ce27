"""``fusemlp train``: a new run, or one that goes on."""

from __future__ import annotations

import time
import warnings
from collections.abc import Collection, Mapping
from contextlib import nullcontext
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from fusemlp.callbacks import Callback, ProgressBar
from fusemlp.callbacks.progress import Forecast
from fusemlp.cli import output
from fusemlp.cli import session as sessions
from fusemlp.cli.options import OutputOptions, TrainOptions
from fusemlp.cli.output import Events
from fusemlp.cli.report import describe_training, finish, outcome, written
from fusemlp.cli.session import Session
from fusemlp.datasets.preprocessing import Preprocessor
from fusemlp.describe.checks import WINDOWS, as_count, counted
from fusemlp.describe.network import MLP
from fusemlp.engine import Engine, load_checkpoint
from fusemlp.fleet.results import Member
from fusemlp.report import runs
from fusemlp.report.runs import Run, append_metrics, open_run, read_json
from fusemlp.runtime.files import write_atomically
from fusemlp.runtime.ranks import TIMEOUT, leading, started
from fusemlp.tables import descriptions, training, transfer
from fusemlp.tables.preparation import Prepared
from fusemlp.tables.recipe import given_options, name_of
from fusemlp.training.checkpoint import checkpoint_bytes
from fusemlp.training.trainer import History
from fusemlp_kernels.errors import ArgumentError, CheckpointError, DivergenceError

# Seconds between two writes of checkpoints; longer where they take more than a twentieth of the time.
BETWEEN = 1.0


class Recorder(Callback):
    """Write a row of ``metrics.csv`` for each epoch, and the checkpoints ``last`` and, of the best epoch, ``best``.

    Checkpoints that follow others soon wait for the next or the end: a write takes as long as many epochs of a small
    network. The row is written before the checkpoint, so a killed run has a row for each epoch of its checkpoint; on
    Windows rows wait while another program, such as Excel, has the file open. Ranks other than 0 write nothing.
    """

    def __init__(self, run: Run) -> None:
        self.run = run
        # the rows and the checkpoints that are still to be written, and the earliest time for these
        self._rows: list[dict[str, float]] = []
        self._waiting: dict[str, bytes] = {}
        self._due = 0.0

    def on_epoch_end(self, engine: Engine, epoch: int, logs: dict[str, float]) -> None:
        if leading():
            self._rows.append({"epoch": epoch + 1, **logs})
            self._write_rows()
        content = checkpoint_bytes(engine)
        is_best = engine.history is not None and engine.history.best_epoch == epoch
        self._waiting |= {"last": content, **({"best": content} if is_best else {})}
        if time.monotonic() >= self._due:
            self._write_checkpoints()

    def on_train_end(self, engine: Engine, history: History) -> None:
        self._write_rows()
        if history.stopped.startswith("interrupted"):
            # Ctrl-C came between two updates: save the position inside the epoch too.
            self._waiting["last"] = checkpoint_bytes(engine)

    def on_exit(self, engine: Engine) -> None:
        if leading() and not (self._waiting or self.run.checkpoint("last").exists()):
            # an error ended the first epoch
            self._waiting["last"] = checkpoint_bytes(engine)
        self._write_checkpoints()

    def _write_checkpoints(self) -> None:
        began = time.monotonic()
        # The best first: a training that ends between the two goes on before this epoch, and has it again.
        for name in ("best", "last"):
            content = self._waiting.pop(name, None)
            if content is not None and leading():
                write_atomically(self.run.checkpoint(name), content)
        now = time.monotonic()
        self._due = now + max(BETWEEN, 20 * (now - began))

    def _write_rows(self) -> None:
        while self._rows:
            try:
                append_metrics(self.run, self._rows[0])
            except PermissionError:
                if not WINDOWS:
                    raise
                if len(self._rows) == 1:
                    warnings.warn(
                        f"{self.run.metrics}: another program has it open; close it there, its rows follow then",
                        stacklevel=2,
                    )
                return
            del self._rows[0]


# The options that --resume accepts; all others keep the values of the run.
_FREE = frozenset({option.name for option in fields(TrainOptions) if not output.decides_the_model(option)} - {"out"})
_FREE |= {"epochs", "backend", "device"}


def check_kept(options: OutputOptions, free: Collection[str], what: str) -> dict[str, Any]:
    """Return the options that are given; ArgumentError for one that a resumed ``what``, a run or a sweep, keeps."""
    asked = given_options(options)
    for option in fields(options):
        if option.name in asked and option.name not in free:
            raise ArgumentError(f"{name_of(option)}: a resumed {what} keeps its own; leave it out, or --resume")
    return asked


def check_data(prepared: Prepared, fingerprint: str, source: str | None, what: str) -> None:
    """Raise CheckpointError unless the data are those that the ``what``, a run or a sweep, was started with."""
    if prepared.summary["fingerprint"] != fingerprint:
        mend = f"put the old ones back, or start a new {what}"
        raise CheckpointError(f"resume: the data {source!r} are not those that the {what} was started with; {mend}")


def resumed_session(options: TrainOptions, folder: str) -> Session:
    """Return the run at its last checkpoint; refuse other data and options that would change the run."""
    changes = check_kept(options, _FREE, "run")
    if leading():
        runs.lock(Run(Path(folder)))
    run, config = open_run(folder)
    if "sweep" in config:
        mend = f"to train it anew: {config['command']}"
        raise ArgumentError(f"resume: {str(run.path)!r} holds the best model of a sweep, which is at its end; {mend}")
    stored = sessions.options_of(config)
    options = replace(stored, **{"as_json": options.as_json, "quiet": options.quiet, **changes})
    epochs = as_count("epochs", changes.get("epochs", config["epochs"]))
    if epochs < config["epochs"]:
        raise ArgumentError(f"epochs: the run was to have {config['epochs']}, which can only be raised, got {epochs}")
    if epochs > config["epochs"] and descriptions.is_private(stored):
        raise ArgumentError(
            f"epochs: more than {config['epochs']} would spend more than the epsilon of {stored.dp_epsilon:g}; leave "
            "it out, or start a new run"
        )
    net = MLP.from_config(config["network"])
    scheduled = sessions.filled_in(stored).epochs
    preprocessor = Preprocessor.from_config(config["preprocessor"])
    prepared = sessions.prepared_data(replace(options, epochs=epochs), preprocessor, net)
    check_data(prepared, config["data"]["fingerprint"], stored.data, "run")
    options = sessions.trained_by(prepared)
    prepared = replace(prepared, start=transfer.stored(run, config, net, options))
    sessions.check_ranks(options)
    last = run.checkpoint("last")
    for left_over in run.path.rglob(".*.tmp") if leading() else ():
        left_over.unlink(missing_ok=True)
    tracker = None
    if leading():
        tracker = output.tracker_of(options, run.path.resolve().name, read_json(run.tracking).get(str(options.track)))
    if last.exists() and prepared.models == 1:
        where = {name: getattr(options, name) for name in ("backend", "device", "reduce")}
        engine = load_checkpoint(last, network=prepared.network, distributed=started(), **where)
    else:
        # An ensemble has no checkpoint to go on from: it trains anew, with the same result.
        engine = training.new_engine(replace(prepared, recipe=replace(options, epochs=scheduled)))
        engine.join(started(), options.reduce, TIMEOUT)
    report = read_json(run.report)
    if report:
        done = report["epochs"] if prepared.models > 1 and not report["interrupted"] else engine.epochs_trained
        _check_unfinished(report, done, epochs)
    session = Session(run, prepared, engine, scheduled, tracker)
    if not leading():
        return session
    if tracker is not None:
        tracker.open(output.tracked_parameters(options, engine, epochs))
        output.note_id(run, options, tracker)
    runs.keep_metrics(run, engine.epochs_trained)
    if epochs != config["epochs"]:
        runs.write_json(run.config, config | {"epochs": epochs})
    return session


def _check_unfinished(report: dict[str, Any], done: int, epochs: int) -> None:
    """Refuse to resume a run with nothing left to do."""
    if report["diverged"]:
        raise ArgumentError("resume: the run diverged, and would again; start a new one with a lower --lr")
    if report["stopped"] and not report["interrupted"]:
        raise ArgumentError(f"resume: the run has ended ({report['stopped']}); start a new one, --from its network")
    if done >= epochs:
        raise ArgumentError(f"resume: the run has done its {done} epochs; give it more: --epochs {2 * done}")


def train(options: TrainOptions) -> None:
    """Train, write the run folder, print the results; raises DivergenceError after everything is written."""
    if not leading():
        # rank 0 tells of a divergence and of Ctrl-C: a process that ends with an error would have torchrun end it too
        session = prepared_session(replace(options, quiet=True))
        recorder = Recorder(session.run)
        training.train_model(session.prepared, session.engine, training.Listeners([recorder]))
        return
    with output.work(options, "train", "config.json") as (listener, paths):
        with output.preparing(options):
            session = prepared_session(options)
        paths.append(session.run.path)
        with session.tracker or nullcontext():
            content, lines, failure = trained(session, listener)
    output.show(content, lines, as_json=options.as_json, warnings=content.get("worse_than", ()))
    if failure is not None:
        raise failure


def prepared_session(options: TrainOptions) -> Session:
    """Return a new session, or a resumed one."""
    return sessions.new_session(options) if options.resume is None else resumed_session(options, options.resume)


def trained(session: Session, listener: Events) -> tuple[dict[str, Any], list[str], DivergenceError | None]:
    """Print the scores of a whole training; return its results, lines on its files, and the error if it diverged."""
    options, run, prepared, tracker = session.options, session.run, session.prepared, session.tracker

    def tell(member: Member) -> None:
        scores = ", ".join(f"{name} {value:.4g}" for name, value in member.scores.items())
        forecast.skip(session.epochs - len(member.history.epochs))
        epochs = f"{member.status} after {counted(len(member.history.epochs), 'epoch')}"
        left = filter(None, [scores, str(forecast)])
        listener.say(f"model {member.index + 1} of {prepared.models}: {'; '.join([epochs, *left])}")
        listener.model(member, prepared.models, {"seed": options.seed + member.index})

    def record(engine: Engine) -> None:
        for row in (engine.history or History()).rows():
            append_metrics(run, row)
            listener.epoch(row)
            if tracker is not None:
                tracker.log(row)

    table = runs.read_columns(run)
    listener.say("\n".join([*sessions.column_lines(table, run), describe_training(session)]))
    about = {"run": str(run.path), "config": read_json(run.config)}
    listener.start("train", epochs=session.epochs, epoch=session.engine.epochs_trained, **about)
    callbacks: list[Any] = [Recorder(run), listener]
    callbacks += [*([] if tracker is None else [tracker]), *([] if options.quiet else [ProgressBar()])]

    def fits_all(epochs: int) -> None:
        listener.say(f"final fit to all rows, {counted(epochs, 'epoch')} in all")
        forecast.begin(0 if options.time_limit else epochs)

    listeners = training.Listeners(callbacks, tell, record, listener.say, fits_all)

    fewer = "--preset plain" if options.preset == "tabm" else "--models 1" if prepared.models > 1 else ""
    shorter = output.shorter(options, session.epochs, fewer, validates=prepared.validates)
    # a time limit is known without a forecast
    epochs = 0 if options.time_limit else prepared.models * session.epochs - session.engine.epochs_trained
    with Forecast(epochs, listener.say, shorter, single=prepared.models == 1) as forecast:
        result = training.train(prepared, session.engine, listeners=listeners, scheduled=session.scheduled)

    def scored(report: Mapping[str, Any]) -> None:
        lines = [*outcome(report), *([] if result.temperature is None else [str(result.temperature)])]
        if lines and not options.as_json:
            print(*lines, sep="\n", flush=True)

    report = finish(run, result, scored, quiet=options.quiet)
    failure = result.failure or result.final_failure
    tracked = None
    if tracker is not None:
        tracked = {"tracker": options.track, "run_id": tracker.run_id}
        output.end_tracking(tracker, run, options, report, failure)
    again = "go on" if prepared.models == 1 else "train all models to their end"
    lines = [
        f"run folder {run.path}",
        *written(report, run),
        *([f"tracked by {options.track}: run {tracked['run_id']}"] if tracked else []),
        *([f"to {again}: {output.going_on('train', run.path)}"] if result.interrupted else []),
    ]
    content = {name: value for name, value in report.items() if name != "held_out"} | {"run": str(run.path)}
    models = [{name: value for name, value in model.items() if name != "history"} for model in result.models]
    content |= {"models": models} if models else {}
    content |= {"columns": table, "page": None if "no_page" in report else str(run.page)}
    content |= {"plot": None if "no_plot" in report else str(run.curves)}
    return {"event": "end", **content, "tracked": tracked}, lines, failure
