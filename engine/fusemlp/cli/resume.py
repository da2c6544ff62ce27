"""Go on with a run: with ``--resume``, and of itself after torchrun has started the processes of a job again."""

from __future__ import annotations

import sys
from collections.abc import Collection
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from fusemlp.cli import tracking, transfer
from fusemlp.cli.commands import TrainOptions
from fusemlp.cli.configuration import options_of
from fusemlp.cli.fields import given_options, name_of
from fusemlp.cli.options import FitOptions
from fusemlp.cli.prepare import Prepared, prepare
from fusemlp.cli.session import Session, check_ranks, checked_epochs, new_engine, own_job
from fusemlp.datasets.preprocessing import Preprocessor
from fusemlp.describe.checks import as_count
from fusemlp.describe.network import MLP
from fusemlp.engine import load_checkpoint
from fusemlp.report.runs import Run, discard_begun, keep_metrics, lock, open_run, read_json, write_json
from fusemlp.runtime.ranks import TIMEOUT, job, joined, leading, restarts, started
from fusemlp_kernels.errors import ArgumentError, CheckpointError

# The options that --resume accepts; all others keep the values of the run.
_FREE = frozenset({option.name for option in fields(TrainOptions) if not tracking.counts(option)} - {"out"})
_FREE |= {"epochs", "backend", "device"}


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


def check_kept(options: FitOptions, free: Collection[str], what: str) -> dict[str, Any]:
    """Return the options that are given; ArgumentError for one that a resumed ``what``, a run or a sweep, keeps."""
    given = given_options(options)
    for option in fields(options):
        if option.name in given and option.name not in free:
            raise ArgumentError(
                f"{name_of(option)}: a resumed {what} keeps its own; leave it out, or start a new one without --resume"
            )
    return given


def check_data(prepared: Prepared, fingerprint: str, source: str | None, what: str) -> None:
    """Raise CheckpointError unless the data are those that the ``what``, a run or a sweep, was started with."""
    if prepared.summary["fingerprint"] != fingerprint:
        raise CheckpointError(
            f"resume: the data {source!r} are not those that the {what} was started with; put the old ones back, or "
            f"start a new {what}"
        )


def resumed_session(options: TrainOptions, folder: str, *, again: bool) -> Session:
    """Return the run at its last checkpoint; refuse other data and options that would change the run."""
    given, mark = check_kept(options, _FREE, "run"), own_job(options)
    if leading():
        lock(Run(Path(folder)))
    run, config = open_run(folder)
    if "sweep" in config:
        raise ArgumentError(
            f"resume: {str(run.path)!r} holds the best model of a sweep, which is at its end; to train it anew: "
            f"{config['command']}"
        )
    stored = options_of(config)
    now = {name: getattr(options, name) for name in ("as_json", "quiet")}
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
    check_data(prepared, config["data"]["fingerprint"], stored.data, "run")
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
        where = {name: getattr(options, name) for name in ("backend", "device", "reduce")}
        engine = load_checkpoint(last, network=prepared.network, distributed=started(), **where)
    else:
        # An ensemble has no checkpoint to go on from: it trains anew, with the same result.
        engine = new_engine(options, prepared, scheduled)
    report = read_json(run.report)
    if report:
        done = report["epochs"] if prepared.models > 1 and not report["interrupted"] else engine.epochs_trained
        _check_unfinished(report, done, epochs, again=again)
    session = Session(run, options, prepared, engine, epochs, scheduled, tracker)
    if not leading():
        return session
    if tracker is not None:
        tracker.open(tracking.parameters(options, engine, epochs))
        tracking.note_id(run, options, tracker)
    keep_metrics(run, engine.epochs_trained)
    changed = {"epochs": epochs, **({} if again else mark)}
    if not changed.items() <= config.items():
        write_json(run.config, config | changed)
    return session


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
