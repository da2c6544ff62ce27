"""A prepared training: all options checked, the data read, the engine made, and for a new one the run folder."""

from __future__ import annotations

import platform
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, fields, replace
from datetime import datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from fusemlp._version import __version__
from fusemlp.callbacks.loggers import Tracker
from fusemlp.cli import output
from fusemlp.cli.options import DataOptions, OutputOptions, SweepOptions, TrainOptions
from fusemlp.cli.output import command_line
from fusemlp.datasets.dataset import targets_in
from fusemlp.datasets.load import NAMES, ColumnChoices, Dataset, form_like, load_data
from fusemlp.datasets.preprocessing import Preprocessor
from fusemlp.datasets.rows import with_files
from fusemlp.datasets.tables import is_table, read_names
from fusemlp.describe import optimizers
from fusemlp.describe.checks import aligned, counted, listed
from fusemlp.describe.conflicts import check_together, in_use
from fusemlp.describe.description import reading, stored
from fusemlp.describe.network import MLP
from fusemlp.engine import Engine
from fusemlp.report import runs
from fusemlp.report.runs import Run, choose_folder
from fusemlp.runtime.ranks import TIMEOUT, leading, started
from fusemlp.tables import defaults, training, transfer
from fusemlp.tables.preparation import Prepared, check_rows, prepare
from fusemlp.tables.recipe import ModelRecipe, given_options, name_of
from fusemlp_kernels.errors import ArgumentError

# Options of earlier releases, and names that they had.
GONE = ("attack_beta", "attack_repeats", "shard_optimizer", "devices", "checkpoint_every")
RENAMED = {"from_run": "transfer_from"}


def command(options: OutputOptions) -> str:
    """Return the command line with these options."""
    words = ["fusemlp", "sweep" if isinstance(options, SweepOptions) else "train", options.data or ""]
    names = {option.name: f"--{name_of(option)}" for option in fields(options)}
    for option, value in given_options(options).items():
        if isinstance(value, bool):
            words.append(names[option] if value else f"--no-{names[option].removeprefix('--')}")
        elif option != "data":
            for part in value if isinstance(value, list) else [value]:
                words += [names[option], str(part)]
    return command_line(words)


def write_beginning(
    run: Run, options: TrainOptions, prepared: Prepared, engine: Engine, epochs: int, **more: Any
) -> dict[str, Any]:
    """Write a table's columns, hashes of the training rows, and ``config.json`` with ``more``; return the last."""
    libraries = ("numpy", "scipy", "scikit-learn", "safetensors")
    stored = stored_options(options)
    config = {
        "format": runs.FORMAT,
        "command": command(options),
        "started": datetime.now().astimezone().isoformat(timespec="seconds"),
        # with the data as given: "data" has the absolute path
        "options": stored | {"data": options.data},
        "data": {"source": stored["data"], **prepared.summary},
        "preprocessor": prepared.preprocessor.to_config(),
        **{name: getattr(engine, name).to_config() for name in ("network", "loss", "optimizer")},
        "batch_size": engine.batch_size,
        "epochs": epochs,
        **({} if prepared.start is None else {"from": prepared.start.about}),
        "seed": options.seed,
        **{name: getattr(engine, name) for name in ("backend", "device", "precision", "plan")},
        **({"ranks": engine.sharding.world} if engine.sharding else {}),
        "versions": {
            "fusemlp": __version__,
            "python": platform.python_version(),
            **{library: version(library) for library in libraries},
        },
        "machine": platform.platform(),
        **more,
    }
    runs.write_columns(run, column_records(prepared))
    runs.write_training_rows(run, prepared.hashes())
    runs.write_json(run.config, config)
    return config


def stored_options(options: OutputOptions) -> dict[str, Any]:
    """Return the options with absolute paths of files and of another run: a run may be opened from another folder."""
    files = {name: getattr(options, name, None) for name in ("data", "validation", "test", "transfer_from")}
    absolute = {name: file if file in NAMES else str(Path(file).absolute()) for name, file in files.items() if file}
    return asdict(options) | absolute


def options_of(config: Mapping[str, Any]) -> TrainOptions:
    """Return the options of a run, without those of earlier releases."""
    options = without_gone(config["options"]) | {"data": config["data"]["source"]}
    with reading("run: the options in its config.json", "start a new run"):
        known: TrainOptions = stored("options", options, TrainOptions)
    return known


def without_gone(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return stored options by their names of today; a cosine, with a warning, for a schedule that is gone."""
    known = {RENAMED.get(name, name): value for name, value in options.items() if name not in GONE}
    return known | ({"schedule": optimizers.kind_of_today(known["schedule"])} if "schedule" in known else {})


# A wider table is summed up.
MOST_PRINTED = 24


def column_records(prepared: Prepared) -> list[dict[str, Any]]:
    """Return for each column of a table its name, what it became, its inputs, its missing share and a note."""
    preprocessor = prepared.preprocessor
    inputs: Counter[str] = Counter()
    for name, width in zip(preprocessor.sources, preprocessor.widths, strict=True):
        inputs[name] += width
    names = "column", "became", "inputs", "missing", "note"
    return [
        dict(zip(names, (role.name, role.kind, inputs[role.name], role.missing, role.note), strict=True))
        for role in prepared.dataset.roles
    ]


def column_lines(records: Sequence[Mapping[str, Any]], run: Run) -> list[str]:
    """Return ``records`` as aligned text; of a wide table the number of columns of each kind, and the file of all."""
    if not records:
        return []
    if len(records) <= MOST_PRINTED:
        rows = [["column", "became", "inputs", "missing"]]
        for record in records:
            became = f"{record['became']} ({record['note']})" if record["note"] else record["became"]
            missing = f"{record['missing']:.1%}" if record["missing"] else ""
            rows.append([record["column"], became, str(record["inputs"] or ""), missing])
        return aligned(rows, left=range(2)).split("\n")
    parts = []
    for kind, count in Counter(record["became"] for record in records).most_common():
        inputs = sum(record["inputs"] for record in records if record["became"] == kind)
        parts.append(f"{count} {kind} ({counted(inputs, 'input')})" if inputs else f"{count} {kind}")
    return [f"{counted(len(records), 'column')}: {', '.join(parts)}; each in {run.columns}"]


@dataclass(frozen=True, eq=False)
class Session:
    """A prepared training, new or resumed."""

    run: Run
    prepared: Prepared
    engine: Engine
    # the epochs that the schedule spans
    scheduled: int
    # open, with --track
    tracker: Tracker | None

    @property
    def options(self) -> TrainOptions:
        """The options of the training, with what the data decided."""
        return trained_by(self.prepared)

    @property
    def epochs(self) -> int:
        """The epochs to train at most."""
        return self.options.epochs or self.scheduled


def new_session(options: TrainOptions) -> Session:
    """Check everything, then make the run folder."""
    data, asked = data_of(options), options
    if started() and options.models is None:
        options = replace(options, models=1)
    source, options = opened(options)
    options = filled_in(options)
    folder = choose_folder(options.out, data, datetime.now()) if leading() else Path()
    tracker = output.tracker_of(options, folder.name) if leading() else None
    prepared = training.settled(prepared_data(options, source=source))
    options = trained_by(prepared)
    check_ranks(options)
    engine = training.new_engine(prepared)
    engine.join(started(), options.reduce, TIMEOUT)
    session = Session(Run(folder), prepared, engine, options.epochs or 0, tracker)
    return _with_folder(session, asked) if leading() else session


def filled_in(options: Any) -> Any:
    """Return the options of ``train`` or ``sweep`` with the defaults that depend on the kind of the data."""
    validates = options.validation_fraction != 0 or options.validation is not None
    return defaults.filled_in(options, table=is_a_table(options), validates=validates)


def is_a_table(options: DataOptions) -> bool:
    """Return whether the options train on a file that holds a table."""
    return options.data is not None and is_table(Path(options.data))


def train_options(options: DataOptions, *parts: type, **changes: Any) -> TrainOptions:
    """Return the options of ``train`` with those of another command that are fields of the dataclasses ``parts``."""
    shared = {field.name: getattr(options, field.name) for cls in (DataOptions, *parts) for field in fields(cls)}
    return TrainOptions(**shared | changes)


def trained_by(prepared: Prepared) -> TrainOptions:
    """Return the options of a training, with what the data decided."""
    assert isinstance(prepared.recipe, TrainOptions), "prepared from the options of train"
    return prepared.recipe


def opened(options: TrainOptions) -> tuple[transfer.Source | None, TrainOptions]:
    """Return the run of ``--from`` or None, and the options with its columns, task and loss where none are given."""
    source = transfer.opened(options)
    if source is None:
        return None, options
    preprocessor, same_target = source.preprocessor, False
    table = is_a_table(options) and is_table(Path(source.config["data"]["source"]))
    if table and options.target in (None, preprocessor.target_name):
        options = replace(options, target=preprocessor.target_name, task=options.task or preprocessor.task)
        same_target = options.task == preprocessor.task
    options = _with_columns(options.like(source.config["options"]), source) if table else options
    options = source.filled(options, same_target=same_target)
    for option in ("target", "group", "id", "weight"):
        names = getattr(options, option) or ()
        both = {*preprocessor.sources} & {*([names, *names.split(",")] if isinstance(names, str) else names)}
        if both:
            raise ArgumentError(
                f"{option}: {listed(both)} is an input of the network of {options.transfer_from!r}; choose another "
                "column, or train without --from"
            )
    return source, options


def _with_columns(options: TrainOptions, source: transfer.Source) -> TrainOptions:
    """Return the options with the run's columns of ids, weights, groups and times that the table has, unless given."""
    form, before = form_like(options.form(), source.preprocessor), source.config["options"]
    names = {*read_names(Path(str(options.data)), form)}
    names -= {*targets_in(options.target or "", names)}
    if options.id is None:
        options = replace(options, id=[name for name in source.preprocessor.ids if name in names] or None)
    weight = before.get("weight")
    if options.weight is None and weight in names - {options.group, *(options.id or ())}:
        options = replace(options, weight=weight)
    elif options.weight is None and weight is not None:
        text = f"no column {weight!r} to weigh rows by, as {source.run.path} did: they weigh alike"
        warnings.warn(f"{options.data}: {text}", stacklevel=2)
    if (options.group or options.time) is not None or None not in (options.validation, options.test):
        return options
    chosen = {option: before[option] for option in ("group", "time") if before.get(option) is not None}
    if {*chosen.values()} <= names:
        return replace(options, **chosen)
    text = f"no column {listed(chosen.values())}, by which {source.run.path} held out rows: they are drawn at random"
    warnings.warn(f"{options.data}: {text}", stacklevel=2)
    return options


def prepared_data(
    options: TrainOptions,
    like: Preprocessor | None = None,
    network: MLP | None = None,
    source: transfer.Source | None = None,
) -> Prepared:
    """Load the data of the options and prepare a training on them: see ``fusemlp.tables.preparation.prepare``."""
    check_rows(options)
    dataset = read_data(options, like if source is None else source.preprocessor)
    return prepare(options, dataset, like=like, network=network, source=source)


def read_data(options: TrainOptions, like: Preprocessor | None = None) -> Dataset:
    """Return the data set of the options, with the rows of their files; ``like`` has the columns of a run."""
    assert options.data is not None, "checked where the options come in"
    for option in ("group", "time"):
        if getattr(options, option) is not None and options.validation is not None and options.test is not None:
            raise ArgumentError(f"{option}: --validation and --test decide the rows; leave one of the options out")
    for part in ("validation", "test"):
        share = f"{part}_fraction"
        if getattr(options, part) is not None and getattr(options, share) != getattr(ModelRecipe, share):
            raise ArgumentError(f"{share}: --{part} has the {part} rows; give one of the options")
    drop, keep, categorical, ids = (getattr(options, name) or () for name in ("drop", "keep", "categorical", "id"))
    columns = ColumnChoices(drop, keep, categorical, ids, options.group, options.time, like, options.weight)
    form = options.form()
    dataset = load_data(options.data, target=options.target, task=options.task, form=form, columns=columns)
    return with_files(dataset, options.data, validation=options.validation, test=options.test, form=form)


def _with_folder(session: Session, asked: TrainOptions) -> Session:
    """Open the tracker's run, and make the run folder with the configuration; ``asked`` are the command's options."""
    tracker, prepared, engine = session.tracker, session.prepared, session.engine
    if tracker is not None:
        tracker.open(output.tracked_parameters(session.options, engine, session.epochs))
    with tracker or nullcontext():
        run = runs.create_run(session.run.path, numbered=asked.out is None)
        try:
            if prepared.start is not None:
                # a training that was cut off may have to start anew
                prepared.start.engine.save_checkpoint(run.checkpoint("start"))
            write_beginning(run, session.options, prepared, engine, session.epochs, command=command(asked))
        except OSError:
            # on a full disk: the same command works again
            if not run.config.exists():
                runs.discard(run, run.checkpoint("start"), run.columns, run.training_rows)
            raise
        if tracker is not None:
            output.note_id(run, session.options, tracker)
    return replace(session, run=run)


def data_of(options: DataOptions) -> str:
    """Return DATA; ArgumentError if it is missing."""
    if options.data is None:
        raise ArgumentError(f"DATA: say what to train on: a path, or one of {', '.join(NAMES)}; or --resume RUN")
    return options.data


def check_ranks(options: TrainOptions) -> None:
    """Raise ArgumentError for what several processes do not train together."""
    models = options.models if (options.models or 1) > 1 else None
    check_together(in_use(ranks=started(), models=models, time_limit=options.time_limit, final_fit=options.final_fit))
