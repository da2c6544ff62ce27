"""``fusemlp sweep``: many models on one data set, the best of them as a run folder."""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, replace
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any

from fusemlp.cli import output, session
from fusemlp.cli import vary as grid
from fusemlp.cli.options import SweepOptions
from fusemlp.cli.output import Events, events, finite, resumable, show, write_picture
from fusemlp.cli.report import finish, written
from fusemlp.cli.session import command, configuration, data_of, stored_options
from fusemlp.cli.standings import Seldom, counts, standings, table
from fusemlp.cli.train import check_data, check_kept
from fusemlp.cli.vary import FREE, Plan, describe_sweep, planned
from fusemlp.describe.checks import as_count
from fusemlp.describe.description import reading, stored
from fusemlp.describe.metrics import rises
from fusemlp.describe.text import aligned
from fusemlp.fleet.fleet import Fleet
from fusemlp.fleet.results import Combination, FleetResults, Kept, Member, averages
from fusemlp.fleet.workers import connected
from fusemlp.report.metrics import baseline_line, headline
from fusemlp.report.plots import Varied, literal, scores_figure
from fusemlp.report.runs import (
    Run,
    append_metrics,
    choose_folder,
    create_run,
    csv_bytes,
    discard_if_empty,
    lock,
    read_json,
    write_json,
)
from fusemlp.runtime.files import write_atomically
from fusemlp.tables.training import Trained
from fusemlp.training.history import History
from fusemlp_kernels.errors import CheckpointError, FusemlpError

JOURNAL = "sweep.jsonl"


def begin_journal(
    run: Run, options: Mapping[str, Any], fingerprint: str, told: Iterable[Mapping[str, Any]] = ()
) -> None:
    """Write the first line, the options of ``sweep`` and the fingerprint of its data, and those of ended models."""
    lines = [{"options": dict(options), "fingerprint": fingerprint}, *told]
    text = "".join(f"{json.dumps(line, default=str)}\n" for line in lines)
    write_atomically(run.path / JOURNAL, text.encode())


def add_to_journal(run: Run, member: Member) -> None:
    """Write a line for a model that has ended."""
    told = {
        "index": member.index,
        "status": member.status,
        "reason": member.reason,
        "scores": member.scores,
        "history": asdict(member.history),
    }
    with (run.path / JOURNAL).open("a", encoding="utf-8") as stream:
        stream.write(f"{json.dumps(told)}\n")


def read_journal(folder: str) -> tuple[Run, dict[str, Any], list[dict[str, Any]]]:
    """Return a sweep's folder, its first line, and those of its models; CheckpointError if it cannot go on."""
    run = Run(Path(folder))
    if not (run.path / JOURNAL).is_file():
        config = read_json(run.config)
        reason = "is no folder of a sweep" if "sweep" not in config else "holds a sweep that has ended; start a new one"
        mend = "; a run of train goes on with fusemlp train --resume" if config and "sweep" not in config else ""
        raise CheckpointError(f"resume: {folder!r} {reason}{mend}")
    lines = (run.path / JOURNAL).read_text(encoding="utf-8").splitlines(keepends=True)
    entries: list[dict[str, Any]] = []
    for line in lines:
        if not line.endswith("\n"):
            # it was being written
            break
        with reading(f"resume: line {len(entries) + 1} of {str(run.path / JOURNAL)!r}", "start the sweep again"):
            entries.append(stored("line", json.loads(line), dict[str, Any]))
            if len(entries) == 1:
                stored("fingerprint", entries[0]["fingerprint"], str)
                stored("options", entries[0]["options"], SweepOptions)
    if not entries:
        raise CheckpointError(f"resume: {folder!r} was cut off before its first line; start the sweep again")
    return run, entries[0], entries[1:]


def member_of(told: Mapping[str, Any], fleet: Fleet) -> Member:
    """Return a model of which a line tells, without its parameters."""
    with reading(f"resume: a model of {JOURNAL}", "start the sweep again"):
        index, history = as_count("index", told["index"], minimum=0), stored("history", told["history"], History)
        candidate, scores = fleet.candidates[index], stored("scores", told["scores"], dict[str, float])
        ending = stored("status", told["status"], str), stored("reason", told["reason"], str)
    held = Kept(candidate, {}, {}, history, len(history.epochs))
    return Member(index, candidate.parameters, held, history, *ending, scores)


def close_journal(run: Run) -> None:
    """Remove the file: there is nothing to go on with."""
    (run.path / JOURNAL).unlink(missing_ok=True)


# The files of a sweep, beside those of a run.
RESULTS, PICTURE = "results.csv", "scores.png"
# Seconds between two writes of the results so far.
WRITE = 5.0
SHOWN = 5  # models in the table at the end
# A list of up to this many values is drawn as words side by side.
MOST_WORDS = 12


def sweep(options: SweepOptions) -> None:
    """Train all models, write the results and the best; raises DivergenceError if every model diverged."""
    with events(as_json=options.as_json, quiet=options.quiet) as told, resumable("sweep", JOURNAL) as runs:
        content, lines = worked(options, told, runs)
    show(content, lines, as_json=options.as_json, warnings=content["worse_than"] or ())


def worked(options: SweepOptions, listener: Events, runs: list[Path]) -> tuple[dict[str, Any], list[str]]:
    """Return the results of a whole sweep, and lines on the best model; append its folder to ``runs``."""
    started = datetime.now()
    if options.resume is not None:
        run, plan, members = resumed_sweep(options, options.resume)
        was_there = True
    else:
        folder = choose_folder(options.out, data_of(options), started)
        plan, members = planned(options), []
        was_there = options.out is not None and folder.exists()
        run = create_run(folder, numbered=options.out is None)
        begin_journal(run, stored_options(options), plan.prepared.summary["fingerprint"])
    runs.append(run.path)
    if not options.quiet:
        print(
            *session.column_lines(session.column_records(plan.prepared), run),
            describe_sweep(plan),
            sep="\n",
            file=sys.stderr,
        )
    listener.start(
        "sweep", epochs=plan.epochs, models=len(plan.points), run=str(run.path), config=described_sweep(plan)
    )
    began = time.perf_counter()
    try:
        with connected(options.workers, options.address):
            members, interrupted = trained(plan, run, listener, members)
    except BaseException:
        # Remove the empty folder, so that the same command works again.
        if options.resume is None and not read_journal(str(run.path))[2]:
            close_journal(run)
            discard_if_empty(run, itself=not was_there)
        raise
    seconds = time.perf_counter() - began
    write_results(plan, run, members)
    results = FleetResults(tuple(members))
    chosen = results.combinations(plan.metric, plan.points)[0]
    if list(plan.points[0]) == ["seed"]:
        # One combination, whose mean says more than its best seed.
        chosen = Combination({}, tuple(results.ranked(plan.metric)), len(plan.points))
    no_plot = draw(plan, run, members, chosen.sound[0])
    if not options.as_json:
        if interrupted:
            print(f"interrupted: kept are the {len(members)} models that had ended, of {len(plan.points)}")
            print(f"to train the others: fusemlp sweep --resume {run.path}")
        print(f"{counts(members, len(plan.points))}; {seconds:.1f} s\n")
        print(f"{aligned(table(members, plan.points, plan.metric, limit=SHOWN))}\n")
        print(f"results {run.path / RESULTS}")
        print(no_plot or f"plot {run.path / PICTURE}")
    if chosen.sound[0].status == "diverged":
        if not interrupted:
            close_journal(run)
        # Raises the error that names the first of all.
        results.best(plan.metric)
    about = {
        "command": command(replace(plan.options, resume=None)),
        "metric": plan.metric,
        "models": len(plan.points),
        "ended": len(members),
        "interrupted": interrupted,
        "seconds": seconds,
        "best": chosen.sound[0].index,
    }
    kept = keep(plan, run, chosen, about, started, no_plot=no_plot)
    if not interrupted:
        close_journal(run)
    return kept


def described_sweep(plan: Plan) -> dict[str, Any]:
    """Return the options of a sweep and the values that vary, for the first line of ``--json``."""
    vary = {axis.name: [grid.spelled_value(value) for value in axis.values] for axis in plan.axes}
    return {"options": asdict(plan.options), "vary": vary, "metric": plan.metric, "data": plan.prepared.summary}


def keep(
    plan: Plan, run: Run, chosen: Combination, about: dict[str, Any], started: datetime, *, no_plot: str
) -> tuple[dict[str, Any], list[str]]:
    """Write the best model of the best combination as a run of ``train``; return its results, and lines on it."""
    best = _with_parameters(plan, chosen.sound[0])
    config = configuration(plan.trained_by[best.index], plan.prepared, best.engine, plan.epochs)
    session.write_columns(plan.prepared, run)
    begun = started.astimezone().isoformat(timespec="seconds")
    write_json(run.config, {**config, "started": begun, "sweep": about})
    # those of an earlier best
    run.metrics.unlink(missing_ok=True)
    for row in best.history.rows():
        append_metrics(run, row)
    report = finish(run, Trained(plan.prepared, best.engine))
    parameters = plan.points[best.index]
    content: dict[str, Any] = {
        "event": "end",
        **about,
        "best": {"model": best.index, "parameters": parameters, "scores": best.scores, "epochs": report["epochs"]},
        "train": config["command"],
        **{name: report.get(name) for name in ("test", "baselines", "worse_than")},
        "run": str(run.path),
        "results": str(run.path / RESULTS),
        "plot": None if no_plot else str(run.path / PICTURE),
        "columns": session.column_records(plan.prepared),
    }
    spelled = ", ".join(f"{name} {grid.spelled_value(value)}" for name, value in parameters.items())
    least = "largest" if rises(plan.metric) else "least"
    said = f"model {best.index}, the {least} {plan.metric}: {spelled}"
    if "seed" in parameters:
        mean, spread = chosen.mean(plan.metric), chosen.spread(plan.metric)
        content["best"] |= {"mean": mean, "spread": finite(spread), "seeds": len(chosen.members)}
        deviation = "" if math.isnan(spread) else f", standard deviation {spread:.2g}"
    if averages(plan.points):
        shared = ", ".join(f"{name} {grid.spelled_value(value)}" for name, value in chosen.parameters.items())
        said = (
            f"{shared}: the {least} mean {plan.metric} of its seeds, {mean:.4g} ({len(chosen.members)} seeds"
            f"{deviation})\nkept of them: model {best.index}, seed {parameters['seed']}, {plan.metric} "
            f"{best.scores[plan.metric]:.4g}"
        )
    elif "seed" in parameters and len(chosen.members) > 1:
        said += (
            f"\nmean {plan.metric} of the {len(chosen.members)} seeds {mean:.4g}{deviation}: expect this of a new seed"
        )
    lines = [
        f"\nbest: {said}",
        *headline(report.get("test", {})),
        *baseline_line(report),
        *(line for line in written(report, run) if line.startswith("no ") and line != no_plot),
        f"run folder {run.path}",
        f"to train it again: {config['command']}",
    ]
    return content, lines


def _with_parameters(plan: Plan, member: Member) -> Member:
    """Return a model with its parameters, trained again if an earlier command did so without keeping them."""
    if not isinstance(member.held, Kept) or member.held.parameters:
        return member
    (again,) = plan.fleet.part([member.index]).fit(**plan.fit_options).members
    return replace(again, index=member.index)


def trained(plan: Plan, run: Run, listener: Events, known: Sequence[Member]) -> tuple[list[Member], bool]:
    """Train the models that are not ``known``; return all that have ended in the order of the points, and True if
    Ctrl-C came before the end."""
    options = plan.options
    members = {member.index: member for member in known}
    left = [index for index in range(len(plan.points)) if index not in members]
    if not left:
        return [members[index] for index in sorted(members)], False
    fleet = plan.fleet if not known else plan.fleet.part(left)
    seldom, interrupted = Seldom(WRITE), False
    try:
        with standings(plan.points, plan.metric, quiet=options.quiet) as update:

            def ended(member: Member) -> None:
                member = replace(member, index=left[member.index])
                add_to_journal(run, member)
                members[member.index] = member
                update(members.values())
                listener.model(member, len(plan.points), plan.points[member.index])
                output.record_model(options, run.path.name, member, plan.trained_by[member.index], plan.epochs)
                seldom.do(lambda: write_results(plan, run, members.values()))

            fleet.fit(
                **plan.fit_options,
                jobs=options.jobs,
                workers=options.workers,
                callback=ended,
            )
    except KeyboardInterrupt:
        if not members:
            print("interrupted before a model had ended: nothing is kept", file=sys.stderr)
            raise
        interrupted = True
    return [members[index] for index in sorted(members)], interrupted


def write_results(plan: Plan, run: Run, members: Iterable[Member]) -> None:
    """Write ``results.csv``: a row for each finished model, the best first; floats in their shortest exact form.

    Models that differ in their seed alone stand together, with the mean of their scores.
    """
    ordered = [
        (one, member)
        for one in FleetResults(tuple(members)).combinations(plan.metric, plan.points)
        for member in one.members
    ]
    ranked = [member for _, member in ordered]
    scores = list(dict.fromkeys(name for member in ranked for name in member.scores))
    names = [axis.name for axis in plan.axes]
    several = averages(plan.points)
    means = [f"mean_{plan.metric}", f"std_{plan.metric}"] if several else []
    rows: list[list[Any]] = [["model", *names, "status", *scores, *means, "epochs", "best_epoch", "seconds", "reason"]]
    for one, member in ordered:
        parameters = map(grid.spelled_value, plan.points[member.index].values())
        figures = [repr(member.scores[name]) if name in member.scores else "" for name in scores]
        history = member.history
        best = "" if history.best_epoch is None else history.best_epoch + 1
        seconds = f"{sum(history.seconds):.4f}"
        together = (one.mean(plan.metric), one.spread(plan.metric)) if several else ()
        figures += ["" if math.isnan(value) else repr(value) for value in together]
        row = [member.index, *parameters, member.status, *figures, len(history.epochs), best, seconds, member.reason]
        rows.append(row)
    write_atomically(run.path / RESULTS, csv_bytes(rows))


def draw(plan: Plan, run: Run, members: Sequence[Member], first: Member) -> str:
    """Write ``scores.png``; return a line on its absence, or nothing."""
    nan = float("nan")
    scores = [nan if one.status == "diverged" else one.scores.get(plan.metric, nan) for one in members]
    best, found = None, ""
    if first.status != "diverged":
        best, found = members.index(first), f"; best {plan.metric} {first.scores[plan.metric]:.4g}"
    varied = []
    for axis in plan.axes:
        values = [plan.points[member.index][axis.name] for member in members]
        if axis.scale == "" and (len(axis) <= MOST_WORDS or axis.name in grid.JOINED):
            places, words = (
                [axis.values.index(value) for value in values],
                [grid.spelled_value(one) for one in axis.values],
            )
            varied.append(Varied(axis.name, places, words=words))
        else:
            varied.append(Varied(axis.name, values, axis.scale or "linear", ordered=axis.name != "seed"))
    title = f"{plan.prepared.dataset.name}: {len(members)} models{found}"
    drawn = partial(scores_figure, varied, scores, metric=plan.metric, best=best, title=literal(title))
    try:
        write_picture(run.path / PICTURE, drawn)
    except FusemlpError as error:
        return f"no {error}"
    return ""


def resumed_sweep(options: SweepOptions, folder: str) -> tuple[Run, Plan, list[Member]]:
    """Return the sweep in a folder, and its models that have ended; refuse other data, and options that change it."""
    given = check_kept(options, FREE, "sweep")
    lock(Run(Path(folder)))
    run, first, told = read_journal(folder)
    # where it trains is told anew
    anew = ("workers", "address", "jobs", "devices", *(("device",) if "devices" in given else ()))
    changes: dict[str, Any] = {**dict.fromkeys(anew), "quiet": False, **given}
    stored = SweepOptions(**first["options"])
    plan = planned(replace(stored, **changes))
    check_data(plan.prepared, first["fingerprint"], stored.data, "sweep")
    begin_journal(run, first["options"], first["fingerprint"], told)
    return run, plan, [member_of(one, plan.fleet) for one in told]
