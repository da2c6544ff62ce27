"""Record a run with an experiment tracker: the option ``--track``."""

from __future__ import annotations

import contextlib
import os
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import fields
from typing import Any

from fusemlp.callbacks.trackers import FAILED, FINISHED, INTERRUPTED, TRACKERS, Tracker, configured
from fusemlp.cli.options import OutputOptions, SweepOptions, TrainOptions
from fusemlp.describe.checks import check_choice
from fusemlp.engine import Engine
from fusemlp.fleet.results import Member
from fusemlp.report.metrics import scalars
from fusemlp.report.runs import Run, read_json, write_json
from fusemlp_kernels.errors import FusemlpError

# The experiment or project of the runs, unless one of the variables names another.
PLACE = "fusemlp"
# Sweeps whose tracker could not open a run: they go on without it.
_refused: set[str] = set()
VARIABLES = {"mlflow": ("MLFLOW_EXPERIMENT_NAME", "MLFLOW_EXPERIMENT_ID", "MLFLOW_RUN_ID"), "wandb": ("WANDB_PROJECT",)}


def tracker(options: OutputOptions, name: str, run_id: str | None = None) -> Tracker | None:
    """Return the tracker of ``--track``, not open yet, or None; check the name and that its library is installed.

    ``name`` is that of a new run; ``run_id`` continues an old one.
    """
    if options.track is None:
        return None
    kind = check_choice("track", options.track, TRACKERS)
    place = None if any(map(os.environ.get, VARIABLES[kind])) else PLACE
    made = TRACKERS[kind](place, name, run_id=run_id)
    made.check_logs(())
    return made


def parameters(options: OutputOptions, engine: Engine, epochs: int) -> dict[str, Any]:
    """Return the options of a training, but those on its output, and the configuration of its engine."""
    given = {field.name: getattr(options, field.name) for field in fields(options) if counts(field)}
    return {**given, **configured(engine, epochs)}


def counts(field: Any) -> bool:
    """Return whether an option may change the model: those of the panel Output do not."""
    return bool(field.metadata["panel"] != "Output")


def last_id(run: Run, options: OutputOptions) -> str | None:
    """Return the id that a run has with the tracker of ``--track``, or None."""
    known: str | None = read_json(run.tracking).get(str(options.track))
    return known


def note_id(run: Run, options: OutputOptions, tracker: Tracker) -> None:
    """Write the id into the run folder, where ``--resume`` finds it."""
    write_json(run.tracking, {**read_json(run.tracking), str(options.track): tracker.run_id})


def log_row(tracker: Tracker | None, row: Mapping[str, float]) -> None:
    """Log a row of ``metrics.csv``."""
    if tracker is not None:
        tracker.log({name: value for name, value in row.items() if name != "epoch"}, int(row["epoch"]))


def end(
    tracker: Tracker, run: Run, options: TrainOptions, report: Mapping[str, Any], failure: BaseException | None
) -> None:
    """Log the test scores, with ``--track-model`` the run folder, and close the tracker's run."""
    tracker.summary({f"test_{name}": value for name, value in scalars(report.get("test", {})).items()})
    if options.track_model and failure is None:
        tracker.upload(run.path)
    status = FAILED if failure is not None else INTERRUPTED if report["interrupted"] else FINISHED
    tracker.close(status, report["stopped"] or str(failure or ""))


@contextlib.contextmanager
def closing(tracker: Tracker | None) -> Iterator[None]:
    """Close the tracker's run as failed, or interrupted, if an error ends the block."""
    try:
        yield
    except BaseException as error:
        if tracker is not None:
            tracker.close(INTERRUPTED if isinstance(error, KeyboardInterrupt) else FAILED, str(error))
        raise


def record_model(options: SweepOptions, sweep: str, member: Member, trained_by: OutputOptions, epochs: int) -> None:
    """Record a finished model of a sweep as a run of its own."""
    made = None if sweep in _refused else tracker(options, f"{sweep}-{member.index}")
    if made is None:
        return
    try:
        made.open({**parameters(trained_by, member.engine, epochs), "sweep": sweep, "model": member.index})
    except FusemlpError as error:
        _refused.add(sweep)
        warnings.warn(f"the models from {member.index} on are not tracked: {error}", stacklevel=2)
        return
    for row in member.history.rows():
        log_row(made, row)
    made.close(FAILED if member.status == "diverged" else FINISHED, member.reason)
