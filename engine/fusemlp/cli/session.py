"""A prepared training: all options checked, the data read, the engine made, and for a new one the run folder."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from datetime import datetime
from pathlib import Path
from typing import Any

from fusemlp.callbacks.trackers import Tracker
from fusemlp.cli import attacks, columns, defaults, ensemble, recipe, tracking, transfer
from fusemlp.cli.commands import TrainOptions
from fusemlp.cli.configuration import command, configuration
from fusemlp.cli.options import FitOptions
from fusemlp.cli.prepare import Prepared, prepare
from fusemlp.datasets.load import NAMES
from fusemlp.datasets.prepare import Rows, watch
from fusemlp.describe.adversarial import Attack
from fusemlp.describe.checks import as_count, as_number
from fusemlp.describe.conflicts import check_together
from fusemlp.describe.intervals import IBP
from fusemlp.engine import Engine
from fusemlp.report.runs import Run, choose_folder, create_run, discard_begun, write_json
from fusemlp.runtime.ranks import TIMEOUT, job, leading, restarts, started
from fusemlp_kernels.errors import ArgumentError

DEFAULT_EPOCHS = 60


@dataclass(frozen=True, eq=False)
class Session:
    """A prepared training, new or resumed."""

    run: Run
    options: TrainOptions
    prepared: Prepared
    engine: Engine
    epochs: int
    # the epochs that the schedule spans
    scheduled: int
    # open, with --track
    tracker: Tracker | None
    # what a merged model knows of its parts
    models: list[dict[str, Any]] = field(default_factory=list)


def new_session(options: TrainOptions) -> Session:
    """Check everything, then make the run folder."""
    data, given = data_of(options), options
    if started() and options.models is None:
        options = replace(options, models=1)
    options = defaults.filled_in(options)
    source, options = transfer.opened(options)
    epochs = checked_epochs(options)
    folder = choose_folder(options.out, data, datetime.now()) if leading() else Path()
    tracker = tracking.tracker(options, folder.name) if leading() else None
    if options.time_limit is not None:
        as_number("time_limit", options.time_limit, low=0.0, low_open=True)
    attacks.check_trained(options)
    prepared = prepare(options, source=source)
    watched(options, prepared)
    against = attack_on(prepared.train, options, prepared)
    prepared = ensemble.within(prepared, options)
    check_ranks(options, prepared.models)
    options = ensemble.described(prepared, options)
    engine = new_engine(options, prepared, epochs)
    if against is not None:
        check_together({**engine.uses, **against.uses})
    session = Session(Run(folder), options, prepared, engine, epochs, epochs, tracker)
    return _with_folder(session, given) if leading() else session


def _with_folder(session: Session, given: TrainOptions) -> Session:
    """Open the tracker's run, and make the run folder with the configuration; ``given`` are the command's options."""
    tracker, prepared, engine = session.tracker, session.prepared, session.engine
    if tracker is not None:
        tracker.open(tracking.parameters(session.options, engine, session.epochs))
    with tracking.closing(tracker):
        run = create_run(session.run.path, numbered=given.out is None)
        try:
            if prepared.start is not None:
                # a training that was cut off may have to start anew
                engine.save(run.checkpoint("start"))
            about = configuration(session.options, prepared, engine, session.epochs)
            columns.write(prepared, run)
            write_json(run.config, {**about, "command": command(given), **own_job(given)})
        except OSError:
            # on a full disk: the same command works again
            if not run.config.exists():
                discard_begun(run)
            raise
        if tracker is not None:
            tracking.note_id(run, session.options, tracker)
    return replace(session, run=run)


def own_job(options: TrainOptions) -> dict[str, str]:
    """Return the mark by which the processes that torchrun starts again know their run; none if it does not."""
    # other jobs may have the same id
    return {"job": f"{job()}: {command(options)}"} if restarts()[1] else {}


def data_of(options: FitOptions) -> str:
    """Return DATA; ArgumentError if it is missing."""
    if options.data is None:
        raise ArgumentError(f"DATA: say what to train on: a path, or one of {', '.join(NAMES)}; or --resume RUN")
    return options.data


def check_ranks(options: TrainOptions, models: int) -> None:
    """Raise ArgumentError for what several processes do not train together."""
    if started() and models > 1:
        raise ArgumentError(f"models: several processes train one model together, got {models}; give --models 1")
    if started() and options.time_limit is not None:
        raise ArgumentError("time_limit: each process would decide by its own time; leave it out, and give --epochs")
    if started() and options.final_fit:
        raise ArgumentError("final_fit: it is for a training in one process; leave it out")


def attack_on(rows: Rows, options: TrainOptions, prepared: Prepared) -> Attack | IBP | None:
    """Return what the training is against, for rows as the network takes them; the test rows are scored under it."""
    cells, _, tested = prepared.test_rows
    return attacks.chosen(options, prepared.preprocessor, rows.X, cells[tested])


def new_engine(options: TrainOptions, prepared: Prepared, epochs: int) -> Engine:
    """Return the engine of a new training, which under torchrun trains with the other processes."""
    length = {"rows": len(prepared.train), "epochs": epochs}
    engine = prepared.engine(options, recipe.schedule(options, **length), recipe.privacy(options, **length))
    engine.join(started(), options.reduce, TIMEOUT)
    return engine


def checked_epochs(options: FitOptions) -> int:
    """Check epochs and early stopping, and return the number of epochs."""
    epochs = as_count("epochs", DEFAULT_EPOCHS if options.epochs is None else options.epochs)
    if options.early_stopping is not None:
        patience = as_count("early_stopping", options.early_stopping, minimum=0)
        if patience and options.validation_fraction == 0 and options.validation is None:
            raise ArgumentError("early_stopping: it watches the validation loss, and --validation-fraction is 0")
    return epochs


def watched(options: FitOptions, prepared: Prepared) -> dict[str, Any]:
    """Return the arguments of ``fit`` for ``--metric``."""
    validates = prepared.validation is not None or bool(prepared.folds)
    return watch(options.metric, prepared.preprocessor, prepared.loss, validates=validates)


def fit_options(options: FitOptions, prepared: Prepared, epochs: int) -> dict[str, Any]:
    """Return the arguments of ``fit``: the rows, and how a model is trained on them."""
    return {
        **prepared.fit_data,
        **watched(options, prepared),
        "epochs": epochs,
        "early_stopping": options.early_stopping or None,
        "drop_last": options.drop_last,
    }
