"""A prepared sweep: its models, each with the options by which ``train`` trains it again, and their fleet."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from fusemlp.cli import grid, journal, tracking
from fusemlp.cli.lines import describe_data
from fusemlp.cli.options import OutputOptions, SweepOptions, TrainOptions
from fusemlp.cli.resume import check_data, check_kept
from fusemlp.cli.session import filled_in, is_a_table, prepared_data
from fusemlp.describe.checks import as_count
from fusemlp.fleet.devices import check_not_given
from fusemlp.fleet.elsewhere import check_address, check_workers
from fusemlp.fleet.fleet import Fleet
from fusemlp.fleet.results import Member
from fusemlp.fleet.seeds import Point
from fusemlp.report.runs import Run, lock
from fusemlp.tables import descriptions
from fusemlp.tables.fields import given_options
from fusemlp.tables.preparation import Prepared, decisions
from fusemlp.tables.recipe import FitRecipe
from fusemlp.tables.training import fit_arguments
from fusemlp_kernels.errors import ArgumentError, ArgumentTypeError

# The options of ``train`` for each varied parameter.
OPTIONS = {"betas": ("beta1", "beta2")}
# The options that --resume accepts; all others keep the values of the sweep.
FREE = frozenset({"resume", "as_json", "quiet", "jobs", "workers", "address", "backend", "device", "devices"})


@dataclass(frozen=True, eq=False)
class Plan:
    """A prepared sweep: ``points`` and ``trained_by`` have an entry for each model."""

    options: SweepOptions
    axes: tuple[grid.Axis, ...]
    points: list[dict[str, Any]]
    trained_by: list[TrainOptions]
    prepared: Prepared
    fleet: Fleet
    epochs: int
    fit_options: dict[str, Any]
    metric: str


def planned(options: SweepOptions) -> Plan:
    """Check all options, and raise their errors before the folder exists."""
    if options.seeds == 1:
        # One seed is no mean: train as without the option.
        options = replace(options, seeds=None)
    axes = grid.axes(options.vary or (), seeds=options.seeds, first=options.seed)
    given = given_options(options)
    for axis in axes:
        for option in OPTIONS.get(axis.name, (axis.name,)):
            if option in given and not (axis.name == "seed" and options.seeds is not None):
                instead = "; --split-seed decides the rows" if option == "seed" else ""
                raise ArgumentError(
                    f"{option}: it is what the models differ in (--vary {axis.name}); give one{instead}"
                )
    options = filled_in(options)
    epochs = options.epochs or 0
    tracking.tracker(options, "sweep")
    if options.workers is not None:
        check_workers(options.workers, connected=False)
    check_address(options.workers, options.address)
    if options.jobs is not None:
        as_count("jobs", options.jobs, minimum=1)
    devices = None if options.devices is None else options.devices.split(",")
    if devices is not None:
        check_not_given(workers=options.workers, jobs=options.jobs)
    split_seed = options.seed if options.split_seed is None else options.split_seed
    points = grid.points(axes, sample=options.sample, seed=split_seed, whole_seeds=options.seeds is not None)
    trained_by = [_train_options(options, point) for point in points]
    with _named_as_varied(axes):
        prepared = prepared_data(trained_by[0])
        # The trials depend on the options that vary: their outcome holds for all.
        decided = decisions(prepared)
        trained_by = [
            replace(part, **{name: value for name, value in decided.items() if getattr(part, name) is None})
            for part in trained_by
        ]
        rows = len(prepared.train)
        rates = [descriptions.schedule(part, rows=rows, epochs=epochs) for part in trained_by]
        optimizer = descriptions.optimizer(trained_by[0], rates[0])
        most = max(part.batch_size for part in trained_by)
        if options.drop_last and most > rows:
            raise ArgumentError(f"drop_last: {rows} rows do not fill one batch of {most}; nothing would be trained")
        arguments = fit_arguments(prepared)
        metric = arguments.get("monitor") or ("loss" if prepared.validation is None else "val_loss")
        fleet = Fleet(
            prepared.network,
            prepared.loss,
            optimizer,
            vary=[{**point, "lr": rate} for point, rate in zip(points, rates, strict=True)],
            devices=devices,
            **descriptions.engine_options(trained_by[0]),
        )
    return Plan(options, axes, points, trained_by, prepared, fleet, epochs, arguments, metric)


def _train_options(options: SweepOptions, point: Point) -> TrainOptions:
    """Return the options of ``train`` for this model."""
    changes: dict[str, Any] = {"out": None, "as_json": False, "quiet": False, "track": None}
    if is_a_table(options):
        changes["models"] = 1
    for name, value in point.items():
        if name == "betas":
            changes["beta1"], changes["beta2"] = value
        elif name == "hidden":
            widths = value if isinstance(value, tuple) else (value,)
            changes["hidden"] = [",".join(map(str, widths)) or "none"]
        else:
            changes[name] = repr(value) if name == "dropout" else value
    if "seed" in point and options.split_seed is None:
        # The models share their rows.
        changes["split_seed"] = options.seed
    return TrainOptions(
        **{field.name: getattr(options, field.name) for cls in (FitRecipe, OutputOptions) for field in fields(cls)}
        | changes
    )


@contextmanager
def _named_as_varied(axes: Sequence[grid.Axis]) -> Iterator[None]:
    """Rename an error about a varied parameter to ``--vary``."""
    try:
        yield
    except (ArgumentError, ArgumentTypeError) as error:
        options = {option for axis in axes for option in OPTIONS.get(axis.name, (axis.name,))}
        name, _, rest = str(error).partition(": ")
        if name in options:
            raise type(error)(f"vary: {error}") from None
        if name.startswith("vary, model "):
            # The user does not know the models' numbers yet.
            raise type(error)(f"vary: {rest}") from None
        raise


def resumed(options: SweepOptions, folder: str) -> tuple[Run, Plan, list[Member]]:
    """Return the sweep in a folder, and its models that have ended; refuse other data, and options that change it."""
    given = check_kept(options, FREE, "sweep")
    lock(Run(Path(folder)))
    run, first, told = journal.read(folder)
    # where it trains is told anew
    anew = ("workers", "address", "jobs", "devices", *(("device",) if "devices" in given else ()))
    changes: dict[str, Any] = {**dict.fromkeys(anew), "quiet": False, **given}
    stored = SweepOptions(**first["options"])
    plan = planned(replace(stored, **changes))
    check_data(plan.prepared, first["fingerprint"], stored.data, "sweep")
    journal.begin(run, first["options"], first["fingerprint"], told)
    return run, plan, [journal.member(one, plan.fleet) for one in told]


def describe(plan: Plan) -> str:
    """Return two lines on the models and the data."""
    engine = plan.fleet.first
    if not engine.memory.backend.traits.on_host:
        # On a GPU the plan depends on all models of a launch. On a CPU memory may not suffice for all engines.
        engine = plan.fleet.engines[0]
    total = len(plan.points)
    product = " x ".join(f"{len(axis)} {axis.name}" for axis in plan.axes)
    sampled = "a sample of " if plan.options.sample is not None else ""
    return (
        f"{describe_data(plan.prepared)}\n"
        f"{total} model{'' if total == 1 else 's'}, {sampled}{product}; {plan.epochs} epochs; {engine.loss.kind}; "
        f"{engine.optimizer.kind}; {engine.backend} {engine.precision}, plan {engine.plan}"
    )
