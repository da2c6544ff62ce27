"""``fusemlp train``: a new run, or a resumed one."""

from __future__ import annotations

import sys
from dataclasses import replace
from typing import Any

from fusemlp.callbacks import ProgressBar
from fusemlp.cli import columns, ensemble, tracking, transfer
from fusemlp.cli.commands import TrainOptions
from fusemlp.cli.events import Events, events
from fusemlp.cli.finish import finish
from fusemlp.cli.lines import describe, outcome, written
from fusemlp.cli.output import resumable, show
from fusemlp.cli.recorder import Recorder
from fusemlp.cli.resume import going_on, resumed_session
from fusemlp.cli.session import Session, attack_on, fit_options, new_session
from fusemlp.describe.checks import as_count
from fusemlp.engine import Engine
from fusemlp.fleet.trials import seconds_left
from fusemlp.report.runs import append_metrics, read_json, write_training_rows
from fusemlp.report.temperature import scale_logits
from fusemlp.report.uncertainty import judged
from fusemlp.runtime.ranks import leading
from fusemlp.training.history import History
from fusemlp_kernels.errors import DivergenceError

# The share of a time limit for the training before --final-fit, whose rows are more.
BEFORE_FINAL_FIT = 0.4


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
    options = replace(options, quiet=True)
    # rank 0 tells of a divergence and of Ctrl-C: a process that ends with an error would have torchrun end rank 0 too
    session = prepared_session(options, again=again)
    run_session(session, [Recorder(session.run, every=session.options.checkpoint_every)])


def trained(session: Session, told: Events) -> tuple[dict[str, Any], list[str], DivergenceError | None]:
    """Return the results of a whole training, lines on them, and the error if it diverged."""
    options, run = session.options, session.run
    found = columns.stored(run)
    if not options.quiet:
        print(*columns.lines(found, run), describe(session), sep="\n", file=sys.stderr)
    about = {"run": str(run.path), "config": read_json(run.config)}
    told.start("train", epochs=session.epochs, epoch=session.engine.epochs_trained, **about)
    prepared, held = session.prepared, list[tuple[Engine, Any]]()
    seconds = seconds_left(prepared.began, options.time_limit)
    if seconds is not None and options.final_fit:
        seconds *= BEFORE_FINAL_FIT
    if prepared.models > 1:
        engine, models, interrupted, failure, held = ensemble.train_ensemble(
            prepared,
            options,
            fit_options(options, prepared, session.epochs),
            session.scheduled,
            seconds,
            lambda member: told.model(member, prepared.models, {"seed": options.seed + member.index}),
        )
        session = replace(session, engine=engine, models=models)
        for row in (engine.history or History()).rows():
            append_metrics(run, row)
            told.epoch(row)
            tracking.log_row(session.tracker, row)
    else:
        interrupted, failure = run_session(session, recorders(session, told), seconds)
    final = refused = held_out = temperature = None
    if failure is None:
        made = prepared.preprocessor
        held_out, temperature = judged(session.engine, made, prepared.train, prepared.validation, held)
    if options.final_fit and not interrupted and failure is None:
        try:
            final = final_fit(session)
            if temperature is not None:
                scale_logits(final[0], temperature.value)
            write_training_rows(run, prepared.hashes(every=True))
        except DivergenceError as error:
            refused = error
    report = finish(
        run,
        session.engine,
        prepared,
        interrupted=interrupted,
        failure=failure,
        models=session.models,
        final=final,
        held_out=held_out,
        temperature=temperature,
        attack=attack_on(prepared.test, options, prepared),
    )
    failure = failure or refused
    tracked = None
    if session.tracker is not None:
        tracked = {"tracker": options.track, "run_id": session.tracker.run_id}
        tracking.end(session.tracker, run, options, report, failure)
    lines = [
        *outcome(report),
        *([] if temperature is None else [str(temperature)]),
        f"run folder {run.path}",
        *written(report, run),
        *([f"tracked by {options.track}: run {tracked['run_id']}"] if tracked else []),
    ]
    shown = {name: value for name, value in report.items() if name != "held_out"}
    content = {**shown, "run": str(run.path), "columns": found}
    content |= {"page": None if "no_page" in report else str(run.page)}
    content |= {"plot": None if "no_plot" in report else str(run.curves)}
    return {"event": "end", **content, "tracked": tracked}, lines, failure


def recorders(session: Session, told: Events) -> list[Any]:
    """Return the callbacks that write and print."""
    callbacks: list[Any] = [Recorder(session.run, every=session.options.checkpoint_every), told]
    callbacks += [] if session.tracker is None else [session.tracker]
    return callbacks + ([] if session.options.quiet else [ProgressBar()])


def run_session(
    session: Session, callbacks: list[Any], seconds: float | None = None
) -> tuple[bool, DivergenceError | None]:
    """Train to the end or the limit, to Ctrl-C (returns True), or to a loss that is not finite (returns the error)."""
    engine, options, prepared = session.engine, session.options, session.prepared
    given = fit_options(options, prepared, session.epochs)
    interrupted = False
    failure: DivergenceError | None = None
    try:
        if engine.fit_state is None and options.probe:
            engine.load_state_dict(*transfer.initial(prepared, options, given))
        engine.fit(
            **given,
            callbacks=callbacks,
            resume=engine.fit_state is not None,
            time_limit=seconds,
            adversarial=attack_on(prepared.train, options, prepared),
        )
    except KeyboardInterrupt:
        if engine.history is None or not engine.history.stopped:
            raise
        # Ctrl-C came between two updates: save the position inside the epoch too.
        engine.save_checkpoint(session.run.checkpoint("last"))
        interrupted = True
    except DivergenceError as error:
        failure = error
    return interrupted, failure


def final_fit(session: Session) -> tuple[Engine, dict[str, int]]:
    """Return the model of all rows for ``--final-fit``, and its epochs and rows."""
    history = session.engine.history
    best = None if history is None else history.best_epoch
    epochs = session.epochs if best is None else best + 1
    seconds = seconds_left(session.prepared.began, session.options.time_limit)
    engine, rows = ensemble.fit_on_all_rows(session.prepared, session.options, epochs, seconds)
    return engine, {"epochs": len((engine.history or History()).epochs), "rows": rows}
