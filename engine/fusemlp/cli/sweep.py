"""``fusemlp sweep``: many models on one data set, the best of them as a run folder."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any

from fusemlp.callbacks.progress import REDRAW, Forecast
from fusemlp.cli import output, session, vary
from fusemlp.cli.options import SweepOptions
from fusemlp.cli.output import Events, finite, fitted
from fusemlp.cli.report import finish, written
from fusemlp.cli.vary import JOINED, JOURNAL, Plan, spelled_value
from fusemlp.describe.checks import counted
from fusemlp.describe.metrics import rises
from fusemlp.fleet.results import (
    LEAST_ROWS,
    Combination,
    FleetResults,
    Kept,
    Member,
    averages,
    default_models,
    merged,
    shown,
)
from fusemlp.fleet.workers import connected
from fusemlp.report.metrics import headline, verdict
from fusemlp.report.plots import Varied, literal, scores_figure
from fusemlp.report.runs import Run, append_metrics, choose_folder, create_run, csv_bytes, discard
from fusemlp.report.uncertainty import judged
from fusemlp.runtime.files import write_atomically
from fusemlp.tables.training import Trained, record_of
from fusemlp.training.trainer import History
from fusemlp_kernels.errors import FusemlpError

# The files of a sweep, beside those of a run.
RESULTS, PICTURE = "results.csv", "scores.png"
# Seeds that become one network; more would make it slow.
MOST_MERGED = 20
# Models in the table at the end, and in the one that a terminal shows before.
SHOWN, BEST = 5, 8
# A list of up to this many values is drawn as words side by side.
MOST_WORDS = 12


def sweep(options: SweepOptions) -> None:
    """Train all models, write the results and the best; raises DivergenceError if every model diverged."""
    with output.work(options, "sweep", JOURNAL) as (listener, runs):
        content, lines = worked(options, listener, runs)
    output.show(content, lines, as_json=options.as_json, warnings=content["worse_than"] or ())


def worked(options: SweepOptions, listener: Events, runs: list[Path]) -> tuple[dict[str, Any], list[str]]:
    """Return the results of a whole sweep, and lines on the best model; append its folder to ``runs``."""
    started, is_new_folder = datetime.now(), False
    if options.resume is not None:
        run, plan, members = vary.resumed_sweep(options, options.resume)
    else:
        folder = choose_folder(options.out, session.data_of(options), started)
        with output.preparing(options):
            plan, members = vary.planned(options), []
        is_new_folder = options.out is None or not folder.exists()
        run = create_run(folder, numbered=options.out is None)
        fingerprint = plan.prepared.summary["fingerprint"]
        vary.begin_journal(run, {"options": session.stored_options(options), "fingerprint": fingerprint})
    runs.append(run.path)
    # without it there is nothing to go on with
    journal = run.path / JOURNAL
    columns = session.column_records(plan.prepared)
    listener.say("\n".join([*session.column_lines(columns, run), vary.describe_sweep(plan)]))
    varied = {axis.name: [*map(spelled_value, axis.values)] for axis in plan.axes}
    config = {"options": asdict(plan.options), "vary": varied, "metric": plan.metric, "data": plan.prepared.summary}
    listener.start("sweep", epochs=plan.epochs, models=len(plan.points), run=str(run.path), config=config)
    began = time.perf_counter()
    try:
        with connected(options.workers, options.address):
            members, interrupted = trained(plan, run, listener, members)
    except BaseException:
        # Remove the empty folder, so that the same command works again.
        if options.resume is None and not vary.read_journal(str(run.path))[2]:
            discard(run, journal, itself=is_new_folder)
        raise
    seconds = time.perf_counter() - began
    write_results(plan, run, members)
    results = FleetResults(tuple(members))
    chosen, *others = results.combinations(plan.metric, plan.points)
    mean, spread = chosen.mean(plan.metric), chosen.spread(plan.metric)
    if list(plan.points[0]) == ["seed"]:
        # One combination, whose mean says more than its best seed.
        chosen = Combination({}, tuple(results.ranked(plan.metric)), len(plan.points))
    # its best seeds are merged, or the best is kept where they cannot be
    merges = averages(plan.points) and default_models(LEAST_ROWS, plan.fleet.candidates[chosen.sound[0].index].net) > 1
    kept = sorted(chosen.sound[: MOST_MERGED if merges else 1], key=lambda member: member.index)
    no_plot = draw(plan, run, members, kept)
    if not options.as_json:
        if interrupted:
            print(f"interrupted: kept are the {len(members)} models that had ended, of {len(plan.points)}")
            print(f"to train the others: {output.going_on('sweep', run.path)}")
        print(f"{counts(members, len(plan.points))}; {seconds:.1f} s\n")
        print(*fitted(table(members, plan, limit=SHOWN))[0], "", f"results {run.path / RESULTS}", sep="\n")
        print(no_plot or f"plot {run.path / PICTURE}")
    if chosen.sound[0].status == "diverged":
        if not interrupted:
            journal.unlink(missing_ok=True)
        # Raises the error that names the first of all.
        results.best(plan.metric)
    about = {
        "command": session.command(replace(plan.options, resume=None)),
        "metric": plan.metric,
        "models": len(plan.points),
        "ended": len(members),
        "interrupted": interrupted,
        "seconds": seconds,
        "best": chosen.sound[0].index,
        "equal": sum(abs(other.mean(plan.metric) - mean) <= spread for other in others),
    }
    content, lines = keep(plan, run, chosen, kept, about, started)
    if not interrupted:
        journal.unlink(missing_ok=True)
    more = {"plot": None if no_plot else str(run.path / PICTURE), "columns": columns}
    return content | more, [line for line in lines if line != no_plot]


def keep(
    plan: Plan, run: Run, chosen: Combination, kept: Sequence[Member], about: dict[str, Any], started: datetime
) -> tuple[dict[str, Any], list[str]]:
    """Write the kept models, merged, as a run of ``train``; return the results of the sweep, and lines on the model."""
    # an earlier command has trained them, and kept no parameters
    lost = [member.index for member in kept if isinstance(member.held, Kept) and not member.held.parameters]
    again = plan.fleet.part(lost).fit(**plan.fit_options).members if lost else ()
    engines = {index: member.engine for index, member in zip(lost, again, strict=True)}
    engines |= {member.index: member.engine for member in kept if member.index not in lost}
    first, best, points = kept[0].index, chosen.sound[0], [plan.points[member.index] for member in kept]
    recipe, parameters, scores, records = plan.recipe(first), points[0], best.scores, list[dict[str, Any]]()
    more: dict[str, Any] = {"started": started.astimezone().isoformat(timespec="seconds"), "sweep": about}
    if len(kept) > 1:
        more["command"] = plan.command(points)
        parameters, scores = chosen.parameters, {name: chosen.mean(name) for name in best.scores}
        records = [record_of(plan.points[one.index]["seed"], one.history, one.status, one.scores) for one in kept]
    prepared = replace(plan.prepared, network=engines[first].network)
    engine = merged([engines[member.index] for member in kept])
    config = session.write_beginning(run, recipe, prepared, engines[first], plan.epochs, **more)
    # those of an earlier best
    run.metrics.unlink(missing_ok=True)
    for row in (engine.history or History()).rows():
        append_metrics(run, row)
    held_out, temperature = judged(engine, prepared.preprocessor, prepared.train, prepared.validation, ())
    report = finish(run, Trained(prepared, engine, records, held_out, temperature), quiet=plan.options.quiet)
    content: dict[str, Any] = {
        "event": "end",
        **about,
        "best": {"model": best.index, "parameters": parameters, "scores": scores, "epochs": report["epochs"]},
        "train": config["command"],
        **{name: report.get(name) for name in ("test", "baselines", "worse_than")},
        "run": str(run.path),
        "results": str(run.path / RESULTS),
    }
    mean, spread, count = chosen.mean(plan.metric), chosen.spread(plan.metric), len(chosen.members)
    if "seed" in points[0]:
        content["best"] |= {"mean": mean, "spread": finite(spread), "seeds": count}
    deviation = "" if math.isnan(spread) else f", standard deviation {spread:.2g}"
    deviation += f", {counted(about['equal'], 'other')} as good within it" if about["equal"] else ""
    least = "largest" if rises(plan.metric) else "least"
    said = f"model {best.index}, the {least} {plan.metric}: {_spelled(parameters)}"
    if averages(plan.points):
        said = f"{_spelled(chosen.parameters)}: the {least} mean {plan.metric} of its seeds, "
        said += f"{mean:.4g} ({count} seeds{deviation})\nkept of them: "
        which = f"model {best.index}, seed {points[0]['seed']}, {plan.metric} {best.scores[plan.metric]:.4g}"
        said += f"{len(kept)} models, merged into one that gives their mean" if records else which
    elif "seed" in parameters and count > 1:
        said += f"\nmean {plan.metric} of the {count} seeds {mean:.4g}{deviation}: expect this of a new seed"
    lines = [
        f"\nbest: {said}",
        *headline(report.get("test", {})),
        *verdict(report),
        *([] if temperature is None else [str(temperature)]),
        *(line for line in written(report, run) if not line.startswith("plot ")),
        f"run folder {run.path}",
        f"to train it again: {config['command']}",
    ]
    return content, lines


def _spelled(parameters: Any) -> str:
    return ", ".join(f"{name} {spelled_value(value)}" for name, value in parameters.items())


def trained(plan: Plan, run: Run, listener: Events, known: Sequence[Member]) -> tuple[list[Member], bool]:
    """Train the models that are not ``known``; return all that have ended, in order, and whether Ctrl-C came first."""
    options = plan.options
    members = {member.index: member for member in known}
    left = [index for index in range(len(plan.points)) if index not in members]
    interrupted = False

    fewer = f"--sample {len(plan.points) // (4 * (options.seeds or 1))}" if len(plan.points) > BEST else ""
    shorter = output.shorter(options, plan.epochs, fewer, validates=plan.prepared.validates)
    forecast = Forecast(len(left) * plan.epochs, listener.say, shorter, single=len(left) == 1)
    try:
        with standings(plan, forecast) as update, forecast:

            def ended(member: Member) -> None:
                member, count = replace(member, index=left[member.index]), len(member.history.epochs)
                if options.workers:
                    # other processes have trained them
                    forecast(None, count)
                forecast.skip(plan.epochs - count)
                vary.add_to_journal(run, member)
                members[member.index] = member
                update(members.values())
                listener.model(member, len(plan.points), plan.points[member.index])
                output.record_model(options, run.path.name, member, plan.recipe(member.index), plan.epochs)

            if left:
                fleet = plan.fleet.part(left) if known else plan.fleet
                fleet.fit(**plan.fit_options, jobs=options.jobs, workers=options.workers, callback=ended)
    except KeyboardInterrupt:
        if not members:
            print("interrupted before a model had ended: nothing is kept", file=sys.stderr)
            raise
        interrupted = True
    return [members[index] for index in sorted(members)], interrupted


@contextmanager
def standings(plan: Plan, forecast: Forecast) -> Iterator[Callable[[Collection[Member]], None]]:
    """Yield a function that shows the best of the finished models on a terminal, and nothing elsewhere."""
    if plan.options.quiet or not sys.stderr.isatty():
        yield lambda members: None
        return
    from rich.console import Console
    from rich.live import Live
    from rich.text import Text

    began, due = time.perf_counter(), 0.0
    with Live(console=Console(stderr=True), auto_refresh=False, transient=True) as live:

        def show(members: Collection[Member]) -> None:
            columns = table(members, plan, limit=BEST)
            scores = [name for name in columns if name not in {*plan.points[0], plan.metric, "model", "epochs"}]
            # a narrow terminal has no room for scores of training rows, then for others
            scores.sort(key=lambda name: (name.startswith("val_"), name == "status"))
            (header, *best), _ = fitted(columns, [*scores, "epochs", "model"], live.console.width)
            title = f"{counts(members, len(plan.points))}; {time.perf_counter() - began:.0f} s {forecast}\n"
            lines = [(f"\n{line}", "" if place else "bold green") for place, line in enumerate(best)]
            live.update(Text.assemble((title, "bold"), header, *lines, no_wrap=True, overflow="crop"), refresh=True)

        def update(members: Collection[Member]) -> None:
            nonlocal due
            if (start := time.monotonic()) >= due:
                show(members)
                end = time.monotonic()
                # a twentieth of the time at most
                due = end + max(REDRAW, 20 * (end - start))

        show([])
        yield update


def table(members: Collection[Member], plan: Plan, *, limit: int) -> dict[str, list[str]]:
    """Return the columns of ``FleetResults.table``, the score that ranks first, then those of validation rows."""
    columns = FleetResults(tuple(members)).columns(plan.metric, means=True, points=plan.points)
    places = {"model": 0, **dict.fromkeys(plan.points[0], 0), plan.metric: 1}
    places |= dict.fromkeys(("spread", "seeds", "epochs", "status"), 4)
    cells = {}
    for name in sorted(columns, key=lambda name: places.get(name, 2 if name.startswith("val_") else 3)):
        digits, values = 6 if name in plan.points[0] else 4, columns[name][:limit]
        cells[name] = [shown(spelled_value(value) if isinstance(value, tuple) else value, digits) for value in values]
    return cells


def counts(members: Collection[Member], total: int) -> str:
    """Return a text such as ``412 of 640 models: 380 trained, 30 stopped early, 2 diverged``."""
    words = {"trained": "trained", "stopped": "stopped early", "diverged": "diverged"}
    statuses = [member.status for member in members]
    parts = [f"{statuses.count(status)} {words[status]}" for status in words if status in statuses]
    of = f"{len(members)} of {total}" if len(members) < total else f"{total}"
    return f"{of} model{'' if total == 1 else 's'}: {', '.join(parts) or 'none has ended yet'}"


def write_results(plan: Plan, run: Run, members: Iterable[Member]) -> None:
    """Write ``results.csv``: a row for each ended model, best first, those of one mean together; exact floats."""
    ranked = FleetResults(tuple(members)).combinations(plan.metric, plan.points)
    scores = list(dict.fromkeys(name for part in ranked for member in part.members for name in member.scores))
    several = averages(plan.points)
    means = [f"mean_{plan.metric}", f"std_{plan.metric}"] if several else []
    names = [axis.name for axis in plan.axes]
    rows: list[list[Any]] = [["model", *names, "status", *scores, *means, "epochs", "best_epoch", "seconds", "reason"]]
    for part in ranked:
        shared = [part.mean(plan.metric), part.spread(plan.metric)] if several else []
        for member in part.members:
            history, index = member.history, member.index
            figures = [repr(member.scores[name]) if name in member.scores else "" for name in scores]
            figures += ["" if math.isnan(value) else repr(value) for value in shared]
            best = "" if history.best_epoch is None else history.best_epoch + 1
            ending = len(history.epochs), best, f"{sum(history.seconds):.4f}", member.reason
            rows.append([index, *map(spelled_value, plan.points[index].values()), member.status, *figures, *ending])
    write_atomically(run.path / RESULTS, csv_bytes(rows))


def draw(plan: Plan, run: Run, members: Sequence[Member], kept: Sequence[Member]) -> str:
    """Write ``scores.png``; return a line on its absence, or nothing."""
    sound = [member.scores if member.status != "diverged" else {} for member in members]
    scores = [figures.get(plan.metric, math.nan) for figures in sound]
    title, several = f"{plan.prepared.dataset.name}: {len(members)} models", averages(plan.points)
    marked = [] if kept[0].status == "diverged" else [members.index(member) for member in kept]
    if marked:
        best = math.fsum(scores[index] for index in marked) / len(marked)
        title += f"; best {plan.metric} {best:.4g}" + (f", the mean of {len(kept)} seeds" if len(kept) > 1 else "")
    varied = []
    for axis in plan.axes:
        if several and axis.name == "seed":
            continue
        values = [plan.points[member.index][axis.name] for member in members]
        if axis.scale == "" and (len(axis) <= MOST_WORDS or axis.name in JOINED):
            places = [axis.values.index(value) for value in values]
            varied.append(Varied(axis.name, places, words=[*map(spelled_value, axis.values)]))
        else:
            varied.append(Varied(axis.name, values, axis.scale or "linear", ordered=axis.name != "seed"))
    drawn = partial(scores_figure, varied, scores, metric=plan.metric, kept=marked, title=literal(title))
    try:
        output.write_picture(run.path / PICTURE, drawn)
    except FusemlpError as error:
        return f"no {error}"
    return ""
