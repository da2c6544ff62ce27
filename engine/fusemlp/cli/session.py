"""A prepared training: all options checked, the data read, the engine made, and for a new one the run folder."""

from __future__ import annotations

from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Any, TypeVar

from fusemlp.callbacks.trackers import Tracker
from fusemlp.cli import columns, tracking
from fusemlp.cli.configuration import command, configuration
from fusemlp.cli.options import DataOptions, TrainOptions
from fusemlp.datasets.load import NAMES, Columns, Dataset, load_data
from fusemlp.datasets.parts import with_files
from fusemlp.datasets.preprocessing import Preprocessor
from fusemlp.datasets.sources import is_table
from fusemlp.datasets.tables import listed
from fusemlp.describe.network import MLP
from fusemlp.engine import Engine
from fusemlp.report.runs import Run, choose_folder, create_run, discard_begun, write_json
from fusemlp.runtime.ranks import TIMEOUT, job, leading, restarts, started
from fusemlp.tables import attacks, descriptions, training, transfer
from fusemlp.tables.preparation import Prepared, check_rows, prepare
from fusemlp.tables.recipe import ModelRecipe
from fusemlp_kernels.errors import ArgumentError

Options = TypeVar("Options", bound=DataOptions)


@dataclass(frozen=True, eq=False)
class Session:
    """A prepared training, new or resumed."""

    run: Run
    options: TrainOptions
    prepared: Prepared
    engine: Engine
    # the epochs that the schedule spans
    scheduled: int
    # open, with --track
    tracker: Tracker | None

    @property
    def epochs(self) -> int:
        """The epochs to train at most."""
        return self.options.epochs or self.scheduled


def new_session(options: TrainOptions) -> Session:
    """Check everything, then make the run folder."""
    data, given = data_of(options), options
    if started() and options.models is None:
        options = replace(options, models=1)
    source, options = opened(options)
    options = filled_in(options)
    folder = choose_folder(options.out, data, datetime.now()) if leading() else Path()
    tracker = tracking.tracker(options, folder.name) if leading() else None
    attacks.check_trained(options)
    prepared = training.settled(prepared_data(options, source=source))
    options = trained_by(prepared)
    check_ranks(options)
    engine = joined(training.new_engine(prepared), options)
    session = Session(Run(folder), options, prepared, engine, options.epochs or 0, tracker)
    return _with_folder(session, given) if leading() else session


def filled_in(options: Any) -> Any:
    """Return the options of ``train`` or ``sweep`` with the defaults that depend on the kind of the data."""
    validates = options.validation_fraction != 0 or options.validation is not None
    return descriptions.filled_in(options, table=is_a_table(options), validates=validates)


def is_a_table(options: DataOptions) -> bool:
    """Return whether the options train on a file that holds a table."""
    return options.data is not None and is_table(Path(options.data))


def trained_by(prepared: Prepared) -> TrainOptions:
    """Return the options of a training, with what the data decided."""
    assert isinstance(prepared.recipe, TrainOptions), "prepared from the options of train"
    return prepared.recipe


def opened(options: TrainOptions) -> tuple[transfer.Source | None, TrainOptions]:
    """Return the run of ``--from``, if given, and the options with what it decides unless they do.

    This is the target, and of the same target the task and the loss. Raises ArgumentError for columns that are inputs
    of its network.
    """
    source = transfer.opened(options)
    if source is None:
        return None, options
    preprocessor, same_target = source.preprocessor, False
    table = is_a_table(options) and is_table(Path(source.config["data"]["source"]))
    if table and options.target in (None, preprocessor.target_name):
        options = replace(options, target=preprocessor.target_name, task=options.task or preprocessor.task)
        same_target = options.task == preprocessor.task
    options = source.filled(options, same_target=same_target)
    for option in ("target", "group", "id"):
        names = getattr(options, option) or ()
        both = {*preprocessor.sources} & {*([names] if isinstance(names, str) else names)}
        if both:
            raise ArgumentError(
                f"{option}: {listed(both)} is an input of the network of {options.transfer_from!r}; choose another "
                "column, or train without --from"
            )
    return source, options


def prepared_data(
    options: Any,
    like: Preprocessor | None = None,
    network: MLP | None = None,
    source: transfer.Source | None = None,
) -> Prepared:
    """Load the data of the options and prepare a training on them: see ``fusemlp.tables.preparation.prepare``."""
    check_rows(options)
    dataset = read_data(options, like if source is None else source.preprocessor)
    if source is not None:
        dataset = source.noted(dataset)
    return prepare(options, dataset, like=like, network=network, source=source)


def read_data(options: Any, like: Preprocessor | None = None) -> Dataset:
    """Return the data set of the options, with the rows of their files; ``like`` has the columns of a run."""
    assert options.data is not None, "checked where the options come in"
    for option in ("group", "time"):
        if getattr(options, option) is not None and options.validation is not None and options.test is not None:
            raise ArgumentError(f"{option}: --validation and --test decide the rows; leave one of the options out")
    for part in ("validation", "test"):
        share = f"{part}_fraction"
        if getattr(options, part) is not None and getattr(options, share) != getattr(ModelRecipe, share):
            raise ArgumentError(f"{share}: --{part} has the {part} rows; give one of the options")
    columns = Columns(
        options.drop or (),
        options.keep or (),
        options.categorical or (),
        options.id or (),
        options.group,
        options.time,
        like,
    )
    form = options.form()
    dataset = load_data(options.data, target=options.target, task=options.task, form=form, columns=columns)
    return with_files(dataset, options.data, validation=options.validation, test=options.test, form=form)


def joined(engine: Engine, options: TrainOptions) -> Engine:
    """Return the engine, which under torchrun trains with the other processes."""
    engine.join(started(), options.reduce, TIMEOUT, options.shard_optimizer)
    return engine


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


def data_of(options: DataOptions) -> str:
    """Return DATA; ArgumentError if it is missing."""
    if options.data is None:
        raise ArgumentError(f"DATA: say what to train on: a path, or one of {', '.join(NAMES)}; or --resume RUN")
    return options.data


def check_ranks(options: TrainOptions) -> None:
    """Raise ArgumentError for what several processes do not train together."""
    if started() and (options.models or 1) > 1:
        raise ArgumentError(
            f"models: several processes train one model together, got {options.models}; give --models 1"
        )
    if started() and options.time_limit is not None:
        raise ArgumentError("time_limit: each process would decide by its own time; leave it out, and give --epochs")
    if started() and options.final_fit:
        raise ArgumentError("final_fit: it is for a training in one process; leave it out")
