"""``fusemlp train``: a new run, or a resumed one."""

from __future__ import annotations

import json
import platform
import sys
from dataclasses import asdict, dataclass, field, fields, replace
from datetime import datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from fusemlp._version import __version__
from fusemlp.callbacks import ProgressBar
from fusemlp.callbacks.trackers import Tracker
from fusemlp.cli import attacks, columns, defaults, ensemble, recipe, tracking, transfer
from fusemlp.cli.events import Events, events
from fusemlp.cli.finish import finish
from fusemlp.cli.options import FitOptions, TrainOptions, name_of
from fusemlp.cli.output import command_line, show
from fusemlp.cli.prepare import Prepared, prepare
from fusemlp.cli.recorder import Recorder
from fusemlp.datasets.load import NAMES
from fusemlp.datasets.prepare import Rows, watch
from fusemlp.datasets.preprocessing import Preprocessor
from fusemlp.describe.adversarial import Attack
from fusemlp.describe.checks import as_count, as_number
from fusemlp.describe.hardening import Hardening
from fusemlp.describe.intervals import IBP
from fusemlp.describe.network import MLP
from fusemlp.engine import Engine, load_checkpoint
from fusemlp.fleet.trials import seconds_left
from fusemlp.report.baselines import baseline_line
from fusemlp.report.certification import certified_lines
from fusemlp.report.diagnosis import Finding
from fusemlp.report.metrics import headline, privacy_line, spelled
from fusemlp.report.robustness import robust_lines
from fusemlp.report.runs import (
    FORMAT,
    Run,
    append_metrics,
    choose_folder,
    create_run,
    discard_begun,
    keep_metrics,
    open_run,
    write_json,
    write_training_rows,
)
from fusemlp.report.temperature import scale_logits
from fusemlp.report.uncertainty import judged
from fusemlp.runtime.ranks import TIMEOUT, job, joined, leading, restarts, started
from fusemlp.training.adversarial import check_adversarial
from fusemlp.training.history import History
from fusemlp_kernels.errors import ArgumentError, CheckpointError, DivergenceError

DEFAULT_EPOCHS = 60
# The share of a time limit for the training before --final-fit, whose rows are more.
BEFORE_FINAL_FIT = 0.4
# The options that --resume accepts; all others keep the values of the run.
_FREE = frozenset({field.name for field in fields(TrainOptions) if not tracking.counts(field)} - {"out"})
_FREE |= {"epochs", "backend", "device", "shard_optimizer"}


@dataclass(frozen=True, eq=False)
class Session:
    """A prepared training, new or resumed."""

    run: Run
    options: TrainOptions
    prepared: Prepared
    engine: Engine
    epochs: int
    # what a merged model knows of its parts
    models: list[dict[str, Any]] = field(default_factory=list)
    # the epochs that the schedule spans
    scheduled: int = 0
    # open, with --track
    tracker: Tracker | None = None


def train(options: TrainOptions) -> None:
    """Train, write the run folder, print the results; raises DivergenceError after everything is written."""
    as_count("checkpoint_every", options.checkpoint_every)
    options, again = going_on(options)
    if not leading():
        follow(options, again=again)
        return
    with events(as_json=options.as_json, quiet=options.quiet) as told:
        content, lines, failure = trained(options, told, again=again)
    show(content, lines, as_json=options.as_json, warnings=content.get("worse_than", ()))
    if failure is not None:
        raise failure


def own_job(options: TrainOptions) -> dict[str, str]:
    """Return the mark by which the processes that torchrun starts again know their run; none if it does not."""
    if not restarts()[1]:
        return {}
    # other jobs may have the same id
    return {"job": f"{job()}: {command_line(['fusemlp', 'train', *arguments(options)])}"}


def going_on(options: TrainOptions) -> tuple[TrainOptions, bool]:
    """Return the options, and False; for processes that torchrun has started again those that resume the run of their
    job, and True. All processes get the same.
    """
    count, most = restarts()
    if not most:
        return options, False
    folder = options.out if options.resume is None else options.resume
    if folder is None:
        raise ArgumentError(
            "out: torchrun starts these processes again after a failure (--max-restarts), and they find their run by "
            "its folder; give --out runs/NAME"
        )
    run, ranks = Run(Path(folder)), joined(TIMEOUT)
    there = run.config.is_file()
    # of several machines one may count the restart alone
    again, seen, missed = ranks.any(count > 0, there, not there)
    # machines that meet by address have jobs without an id: the same command goes on with what it has begun
    anew = job() == "none" and options.resume is None and seen and not again
    if not again and not anew:
        return options, False
    if seen and missed:
        raise ArgumentError(
            f"{'out' if options.resume is None else 'resume'}: some of the processes find {str(run.config)!r} and "
            "others do not, so they cannot go on together; give a new folder in one that all machines share"
        )
    if missed:
        if ranks.leads and options.resume is None:
            # the failure came before there was a run
            discard_begun(run)
        return options, False
    # another's run is refused, as it was before the restart
    (again,) = map(bool, ranks.of_first([own_job(options).items() <= open_run(folder)[1].items()]))
    if not again or options.resume is not None:
        return options, again
    if anew and ranks.leads and not options.quiet:
        print(
            f"{folder} is the run of this command, which goes on with it; give a new --out to begin anew",
            file=sys.stderr,
        )
    free = {name: value for name, value in given_options(options).items() if name in _FREE}
    return TrainOptions(**free, resume=folder), True


def prepared_session(options: TrainOptions, *, again: bool) -> Session:
    """Return a new session, or a resumed one; ``again``: after a restart of its job."""
    if options.resume is None:
        return new_session(options)
    return resumed_session(options, options.resume, again=again)


def trained(
    options: TrainOptions, told: Events, *, again: bool
) -> tuple[dict[str, Any], list[str], DivergenceError | None]:
    """Return the results of a whole training, lines on them, and the error if it diverged."""
    session = prepared_session(options, again=again)
    with tracking.closing(session.tracker):
        return worked(session, told)


def follow(options: TrainOptions, *, again: bool) -> None:
    """Train as a rank other than 0, which prints and writes nothing."""
    options = replace(options, quiet=True)
    # rank 0 tells of a divergence and of Ctrl-C: a process that ends with an error would have torchrun end rank 0 too
    session = prepared_session(options, again=again)
    run_session(session, [Recorder(session.run, every=session.options.checkpoint_every)])


def check_ranks(options: TrainOptions, models: int) -> None:
    """Raise ArgumentError for what several processes do not train together."""
    if started() and models > 1:
        raise ArgumentError(f"models: several processes train one model together, got {models}; give --models 1")
    if started() and options.time_limit is not None:
        raise ArgumentError("time_limit: each process would decide by its own time; leave it out, and give --epochs")
    if started() and options.final_fit:
        raise ArgumentError("final_fit: it is for a training in one process; leave it out")


def worked(session: Session, told: Events) -> tuple[dict[str, Any], list[str], DivergenceError | None]:
    """Return what ``trained`` does, of a session whose tracker is open."""
    options, run = session.options, session.run
    found = columns.stored(run)
    if not options.quiet:
        print(*columns.lines(found, run), describe(session), sep="\n", file=sys.stderr)
    config = json.loads(run.config.read_text(encoding="utf-8"))
    told.start("train", epochs=session.epochs, epoch=session.engine.epochs_trained, run=str(run.path), config=config)
    prepared, held = session.prepared, list[tuple[Engine, Any]]()
    seconds = seconds_left(prepared.began, options.time_limit)
    if seconds is not None and options.final_fit:
        seconds *= BEFORE_FINAL_FIT
    if prepared.models > 1:
        engine, models, interrupted, failure, held = ensemble.train_ensemble(
            prepared,
            options,
            session.epochs,
            session.scheduled,
            watched(options, prepared),
            seconds,
            lambda member: told.model(member, prepared.models, {"seed": options.seed + member.index}),
        )
        session = replace(session, engine=engine, models=models)
        for row in (engine.history or History()).rows():
            append_metrics(run, row)
            told.epoch(row)
            if session.tracker is not None:
                session.tracker.log({name: value for name, value in row.items() if name != "epoch"}, int(row["epoch"]))
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
    plot = str(run.curves) if run.curves.exists() else None
    lines = [
        *outcome(report),
        *([] if temperature is None else [str(temperature)]),
        f"run folder {run.path}",
        f"report {run.page}",
        f"plot {plot}" if plot else f"no plot: {report['no_plot']}",
        *([f"tracked by {options.track}: run {tracked['run_id']}"] if tracked else []),
    ]
    shown = {name: value for name, value in report.items() if name != "held_out"}
    content = {**shown, "run": str(run.path), "page": str(run.page), "plot": plot, "columns": found}
    return {"event": "end", **content, "tracked": tracked}, lines, failure


def attack_on(rows: Rows, options: TrainOptions, prepared: Prepared) -> Attack | Hardening | IBP | None:
    """Return what the training is against, for rows as the network takes them; the test rows are scored under it."""
    cells, _, tested = prepared.test_rows
    return attacks.chosen(options, prepared.preprocessor, rows.X, cells[tested])


def new_session(options: TrainOptions) -> Session:
    """Check everything, then make the run folder."""
    if options.data is None:
        raise ArgumentError(f"DATA: say what to train on: a path, or one of {', '.join(NAMES)}; or --resume RUN")
    given = options
    if started() and options.models is None:
        options = replace(options, models=1)
    options = defaults.filled_in(options)
    source, options = transfer.opened(options)
    epochs = checked_epochs(options)
    folder = choose_folder(options.out, given.data or "", datetime.now()) if leading() else Path()
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
        check_adversarial(engine, against)
    if not leading():
        return Session(Run(folder), options, prepared, engine, epochs, scheduled=epochs)
    if tracker is not None:
        tracker.open(tracking.parameters(options, engine, epochs))
    with tracking.closing(tracker):
        run = create_run(folder)
        if prepared.start is not None:
            # a training that was cut off may have to start anew
            engine.save(run.checkpoint("start"))
        command = command_line(["fusemlp", "train", *arguments(given)])
        write_json(
            run.config, {**configuration(options, prepared, engine, epochs), "command": command, **own_job(given)}
        )
        columns.write(prepared, run)
        if tracker is not None:
            tracking.note_id(run, options, tracker)
    return Session(run, options, prepared, engine, epochs, scheduled=epochs, tracker=tracker)


def new_engine(options: TrainOptions, prepared: Prepared, epochs: int) -> Engine:
    """Return the engine of a new training, which under torchrun trains with the other processes."""
    rows = len(prepared.train)
    engine = prepared.engine(
        options,
        recipe.schedule(options, rows=rows, epochs=epochs),
        recipe.privacy(options, rows=rows, epochs=epochs),
    )
    engine.join(started(), options.reduce, TIMEOUT, options.shard_optimizer)
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


def given_options(options: FitOptions) -> dict[str, Any]:
    """Return the options that differ from their defaults."""
    default = type(options)()
    values = {option.name: getattr(options, option.name) for option in fields(options)}
    return {name: value for name, value in values.items() if value != getattr(default, name)}


def resumed_session(options: TrainOptions, folder: str, *, again: bool) -> Session:
    """Return the run at its last checkpoint; refuse other data and options that would change the run."""
    given, mark = given_options(options), own_job(options)
    for option in fields(options):
        if option.name in given and option.name not in _FREE:
            raise ArgumentError(
                f"{name_of(option)}: a resumed run keeps its own; leave it out, or start a new run without --resume"
            )
    run, config = open_run(folder)
    if "sweep" in config:
        raise ArgumentError(
            f"resume: {str(run.path)!r} holds the best model of a sweep, which is at its end; to train it anew: "
            f"{config['command']}"
        )
    source = config["data"]["source"]
    stored = TrainOptions(**{**config["options"], "data": source})
    now = {name: getattr(options, name) for name in ("as_json", "quiet", "shard_optimizer")}
    options = replace(stored, **{**now, **given})
    epochs = as_count("epochs", given.get("epochs", config["epochs"]))
    if epochs < config["epochs"]:
        raise ArgumentError(f"epochs: the run was to have {config['epochs']}, which can only be raised, got {epochs}")
    if epochs > config["epochs"] and stored.dp_epsilon is not None:
        raise ArgumentError(
            f"epochs: more than {config['epochs']} would spend more than the epsilon of {stored.dp_epsilon:g}; leave "
            "it out, or start a new run"
        )
    net = MLP.from_config(config["network"])
    prepared = prepare(options, Preprocessor.from_config(config["preprocessor"]), net)
    if prepared.summary["fingerprint"] != config["data"]["fingerprint"]:
        raise CheckpointError(
            f"run: the data {source!r} are not those that the run was started with; put the old ones back, or start a "
            "new run"
        )
    prepared = replace(prepared, start=transfer.stored(run, config, net, options))
    check_ranks(options, prepared.models)
    last = run.checkpoint("last")
    for left_over in run.path.rglob(".*.tmp") if leading() else ():
        left_over.unlink(missing_ok=True)
    scheduled = checked_epochs(stored)
    tracker = None
    if leading():
        tracker = tracking.tracker(options, run.path.resolve().name, tracking.last_id(run, options))
    if last.exists() and prepared.models == 1:
        engine = load_checkpoint(
            last,
            backend=options.backend,
            device=options.device,
            network=prepared.network,
            distributed=started(),
            reduce=options.reduce,
            shard_optimizer=options.shard_optimizer,
        )
    else:
        # An ensemble has no checkpoint to go on from: it trains anew, with the same result.
        engine = new_engine(options, prepared, scheduled)
    if run.report.exists():
        report = json.loads(run.report.read_text(encoding="utf-8"))
        done = report["epochs"] if prepared.models > 1 and not report["interrupted"] else engine.epochs_trained
        _check_unfinished(report, done, epochs, again=again)
    if not leading():
        return Session(run, options, prepared, engine, epochs, scheduled=scheduled)
    if tracker is not None:
        tracker.open(tracking.parameters(options, engine, epochs))
        tracking.note_id(run, options, tracker)
    keep_metrics(run, engine.epochs_trained)
    changed = {"epochs": epochs, **({} if again else mark)}
    if not changed.items() <= config.items():
        write_json(run.config, config | changed)
    return Session(run, options, prepared, engine, epochs, scheduled=scheduled, tracker=tracker)


def _check_unfinished(report: dict[str, Any], done: int, epochs: int, *, again: bool) -> None:
    """Refuse to resume a run with nothing left to do; ``again``: after a restart, only one that diverged."""
    if report["diverged"]:
        raise ArgumentError("resume: the run diverged, and would again; start a new one with a lower --lr")
    if again:
        # a rank may have failed at the very end: then the run is ended once more
        return
    if report["stopped"] and not report["interrupted"]:
        raise ArgumentError(f"resume: the run has ended ({report['stopped']}); start a new one")
    if done >= epochs:
        raise ArgumentError(f"resume: the run has done its {done} epochs; give it more: --epochs {2 * done}")


def arguments(options: FitOptions) -> list[str]:
    """Return the words of the command line for these options."""
    words = [options.data or ""]
    given = given_options(options)
    for option in fields(options):
        if option.name == "data" or option.name not in given:
            continue
        name, value = name_of(option), given[option.name]
        if isinstance(value, bool):
            words.append(f"--{name}" if value else f"--no-{name}")
        else:
            for one in value if isinstance(value, list) else [value]:
                words += [f"--{name}", str(one)]
    return words


def configuration(options: TrainOptions, prepared: Prepared, engine: Engine, epochs: int) -> dict[str, Any]:
    """Return everything that is needed to repeat a run."""
    assert options.data is not None
    libraries = ("numpy", "scipy", "scikit-learn", "safetensors")
    return {
        "format": FORMAT,
        "command": command_line(["fusemlp", "train", *arguments(options)]),
        "started": datetime.now().astimezone().isoformat(timespec="seconds"),
        "options": asdict(options) | own_files(options),
        "data": {"source": stored_path(options.data), **prepared.summary},
        "preprocessor": prepared.preprocessor.to_config(),
        "network": engine.network.to_config(),
        "loss": engine.loss.to_config(),
        "optimizer": engine.optimizer.to_config(),
        "batch_size": engine.batch_size,
        "epochs": epochs,
        **({} if prepared.start is None else {"from": prepared.start.about}),
        "seed": options.seed,
        "backend": engine.backend,
        "device": engine.device,
        "precision": engine.precision,
        "plan": engine.plan,
        **({} if engine.sharding is None else {"ranks": engine.sharding.world}),
        "versions": {
            "fusemlp": __version__,
            "python": platform.python_version(),
            **{library: version(library) for library in libraries},
        },
        "machine": platform.platform(),
    }


def own_files(options: FitOptions) -> dict[str, str]:
    """Return the given files of validation and test rows and the run of --from; a run stores their absolute paths."""
    given = {name: getattr(options, name, None) for name in ("validation", "test", "from_run")}
    return {name: stored_path(file) for name, file in given.items() if file}


def stored_path(file: str) -> str:
    """Return a data set's name, or the absolute path of a file: a run may be opened from another folder."""
    return file if file in NAMES else str(Path(file).absolute())


def describe(session: Session) -> str:
    """Return two or three lines on network, optimizer and data."""
    engine, net = session.engine, session.engine.network
    rate = engine.optimizer.schedule
    interpreted = engine.device == "cpu" and not engine.memory.backend.traits.on_host
    several = ""
    if session.prepared.models > 1:
        shared = "" if session.prepared.validation is None else ", which share these validation rows,"
        several = f"{session.prepared.models} models{shared} of "
    note = "\nTriton's interpreter runs the kernels on the CPU, slowly: this checks them, it does not time them"
    return (
        f"{describe_data(session.prepared)}\n"
        f"{several}{'-'.join(map(str, net.sizes))}, {f'{net.members} members, ' if net.members > 1 else ''}"
        f"{net.parameter_count} parameters; {engine.loss.kind}; "
        f"{engine.optimizer.kind}, {rate.kind} lr {recipe.learning_rate(session.options):g}; "
        f"batch {engine.batch_size}; {engine.backend} {engine.precision}, plan {engine.plan}"
        f"{'' if engine.sharding is None else f', {engine.sharding}'}"
        f"{note if interpreted else ''}{private_note(engine)}"
    )


def private_note(engine: Engine) -> str:
    """Return lines on private training."""
    if engine.privacy is None:
        return ""
    privacy = engine.privacy
    return (
        f"\nprivate training: noise {privacy.noise:.4g}, clip {privacy.clip:g}, delta {privacy.delta:g}; it covers the "
        "parameters and each training row. Not covered: scaling and categories, curves, baselines and scores, and the "
        "validation rows, which decide when to stop. Share the exported model, not the run folder"
    )


def describe_data(prepared: Prepared) -> str:
    """Return one line on the rows, after those on the reading of a table."""
    about, classes = prepared.summary, prepared.preprocessor.classes
    target = f"{len(classes)} classes" if classes is not None else "1 target"
    if classes is None and prepared.preprocessor.outputs > 1:
        target = f"{prepared.preprocessor.outputs} targets"
    notes = "".join(f"{note}\n" for note in prepared.notes)
    inputs = prepared.network.sizes[0]
    return (
        f"{notes}{about['name']}: {prepared.training_rows}, {about['test_rows']} test rows; {inputs} inputs, {target}"
    )


def recorders(session: Session, told: Events) -> list[Any]:
    """Return the callbacks that write and print."""
    callbacks: list[Any] = [Recorder(session.run, every=session.options.checkpoint_every), told]
    callbacks += [] if session.tracker is None else [session.tracker]
    return callbacks + ([] if session.options.quiet else [ProgressBar()])


def run_session(
    session: Session, callbacks: list[Any], seconds: float | None = None
) -> tuple[bool, DivergenceError | None]:
    """Train to the end or the limit, to Ctrl-C (returns True), or to a loss that is not finite (returns the error)."""
    engine, options = session.engine, session.options
    interrupted = False
    failure: DivergenceError | None = None
    try:
        if engine.fit_state is None and options.probe:
            judged = watched(options, session.prepared)
            engine.load_state_dict(*transfer.initial(session.prepared, options, session.prepared.fit_data, judged, 1))
        engine.fit(
            **session.prepared.fit_data,
            **watched(options, session.prepared),
            epochs=session.epochs,
            early_stopping=options.early_stopping or None,
            callbacks=callbacks,
            drop_last=options.drop_last,
            resume=engine.fit_state is not None,
            time_limit=seconds,
            adversarial=attack_on(session.prepared.train, options, session.prepared),
        )
    except KeyboardInterrupt:
        if engine.history is None or not engine.history.stopped:
            raise
        # Ctrl-C came between two updates: save the position inside the epoch too.
        engine.save_checkpoint(session.run.checkpoint("last"))
        interrupted = True
    except DivergenceError as error:
        failure = error
    # rank 0 goes on alone
    engine.keep_whole_state()
    return interrupted, failure


def final_fit(session: Session) -> tuple[Engine, dict[str, int]]:
    """Return the model of all rows for ``--final-fit``, and its epochs and rows."""
    history = session.engine.history
    best = None if history is None else history.best_epoch
    epochs = session.epochs if best is None else best + 1
    seconds = seconds_left(session.prepared.began, session.options.time_limit)
    engine, rows = ensemble.fit_on_all_rows(session.prepared, session.options, epochs, seconds)
    return engine, {"epochs": len((engine.history or History()).epochs), "rows": rows}


def interval_line(report: dict[str, Any]) -> list[str]:
    """Return a line on the intervals or sets of classes of the test rows."""
    if "intervals" not in report:
        return []
    found = report["intervals"]
    size = f"{found['classes']:.2f} classes" if "classes" in found else f"width {spelled(found['width'])}"
    level, share = found["level"], found["coverage"]
    return [f"predict --interval {level:g}: {size} on average, which cover {share:.0%} of the test rows"]


def outcome(report: dict[str, Any]) -> list[str]:
    """Return lines on the end of the training, the scores and the diagnosis."""
    lines = []
    if report["interrupted"]:
        lines.append(f"interrupted after epoch {report['epochs']}")
    elif report.get("models"):
        epochs = [one["epochs"] for one in report["models"]]
        spread = f"{min(epochs)}" if min(epochs) == max(epochs) else f"{min(epochs)} to {max(epochs)}"
        lines.append(
            f"{len(epochs)} models after {spread} epochs{': ' if report['stopped'] else ''}{report['stopped']}"
        )
    elif report["stopped"]:
        lines.append(f"stopped after epoch {report['epochs']}: {report['stopped']}")
    lines += headline(report.get("test", {}))
    lines += [
        *baseline_line(report),
        *interval_line(report),
        *privacy_line(report),
        *robust_lines(report),
        *certified_lines(report),
    ]
    if report.get("final_fit"):
        final = report["final_fit"]
        lines.append(
            f"final fit: the model is now that of all {final['rows']} rows after {final['epochs']} epochs; the scores "
            "are those of the model before"
        )
    for finding in report["diagnosis"]:
        # The error message has a divergence.
        if finding["name"] != "divergence":
            lines.append(str(Finding(**finding)))
    return lines
