"""``fusemlp train``: a new run, or a resumed one."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from fusemlp.callbacks import ProgressBar
from fusemlp.cli import columns, tracking
from fusemlp.cli.events import Events, events
from fusemlp.cli.finish import finish
from fusemlp.cli.lines import describe, outcome, written
from fusemlp.cli.options import TrainOptions
from fusemlp.cli.output import resumable, show
from fusemlp.cli.recorder import Recorder
from fusemlp.cli.resume import going_on, resumed_session
from fusemlp.cli.session import Session, new_session
from fusemlp.describe.checks import as_count
from fusemlp.engine import Engine
from fusemlp.fleet.results import Member
from fusemlp.report.runs import append_metrics, read_json, write_training_rows
from fusemlp.runtime.ranks import leading
from fusemlp.tables.training import Listeners, train_model
from fusemlp.tables.training import train as train_prepared
from fusemlp.training.history import History
from fusemlp_kernels.errors import DivergenceError


def train(options: TrainOptions) -> None:
    """Train, write the run folder, print the results; raises DivergenceError after everything is written."""
    as_count("checkpoint_every", options.checkpoint_every)
    options, again = going_on(options)
    if not leading():
        follow(options, again=again)
        return
    with events(as_json=options.as_json, quiet=options.quiet) as told, resumable("train", "config.json") as runs:
        session = prepared_session(options, again=again)
        runs.append(session.run.path)
        with tracking.closing(session.tracker):
            content, lines, failure = trained(session, told)
    show(content, lines, as_json=options.as_json, warnings=content.get("worse_than", ()))
    if failure is not None:
        raise failure


def prepared_session(options: TrainOptions, *, again: bool) -> Session:
    """Return a new session, or a resumed one; ``again``: after a restart of its job."""
    return new_session(options) if options.resume is None else resumed_session(options, options.resume, again=again)


def follow(options: TrainOptions, *, again: bool) -> None:
    """Train as a rank other than 0, which prints and writes nothing."""
    # rank 0 tells of a divergence and of Ctrl-C: a process that ends with an error would have torchrun end rank 0 too
    session = prepared_session(replace(options, quiet=True), again=again)
    recorder = Recorder(session.run, every=session.options.checkpoint_every)
    train_model(session.prepared, session.engine, Listeners([recorder]))


def trained(session: Session, told: Events) -> tuple[dict[str, Any], list[str], DivergenceError | None]:
    """Return the results of a whole training, lines on them, and the error if it diverged."""
    options, run, prepared = session.options, session.run, session.prepared
    table = columns.stored(run)
    if not options.quiet:
        print(*columns.lines(table, run), describe(session), sep="\n", file=sys.stderr)
    about = {"run": str(run.path), "config": read_json(run.config)}
    told.start("train", epochs=session.epochs, epoch=session.engine.epochs_trained, **about)
    listeners = Listeners(
        recorders(session, told),
        lambda member: _tell_model(session, told, member),
        lambda engine: _record_merged(session, told, engine),
        (lambda line: None) if options.quiet else (lambda line: print(line, file=sys.stderr)),
    )
    result = train_prepared(prepared, session.engine, listeners=listeners, scheduled=session.scheduled)
    if result.final is not None:
        write_training_rows(run, prepared.hashes(every=True))
    report = finish(run, result)
    failure = result.failure or result.final_failure
    tracked = None
    if session.tracker is not None:
        tracked = {"tracker": options.track, "run_id": session.tracker.run_id}
        tracking.end(session.tracker, run, options, report, failure)
    lines = [
        *outcome(report),
        *([] if result.temperature is None else [str(result.temperature)]),
        f"run folder {run.path}",
        *written(report, run),
        *([f"tracked by {options.track}: run {tracked['run_id']}"] if tracked else []),
    ]
    content = {**{name: value for name, value in report.items() if name != "held_out"}, "run": str(run.path)}
    content |= {"columns": table, "page": None if "no_page" in report else str(run.page)}
    content |= {"plot": None if "no_plot" in report else str(run.curves)}
    return {"event": "end", **content, "tracked": tracked}, lines, failure


def recorders(session: Session, told: Events) -> Sequence[Any]:
    """Return the callbacks that write and print."""
    callbacks: list[Any] = [Recorder(session.run, every=session.options.checkpoint_every), told]
    callbacks += [] if session.tracker is None else [session.tracker]
    return callbacks + ([] if session.options.quiet else [ProgressBar()])


def _tell_model(session: Session, told: Events, member: Member) -> None:
    models = session.prepared.models
    if not session.options.quiet:
        scores = ", ".join(f"{name} {value:.4g}" for name, value in member.scores.items())
        epochs = f"{member.status} after {len(member.history.epochs)} epochs"
        print(f"model {member.index + 1} of {models}: {epochs}; {scores}", file=sys.stderr)
    told.model(member, models, {"seed": session.options.seed + member.index})


def _record_merged(session: Session, told: Events, engine: Engine) -> None:
    """Write and tell the mean history of several models."""
    for row in (engine.history or History()).rows():
        append_metrics(session.run, row)
        told.epoch(row)
        tracking.log_row(session.tracker, row)
