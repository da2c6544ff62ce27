"""``fusemlp runs`` and ``plot``: run folders, their scores, and the options in which they differ."""

from __future__ import annotations

import math
import shutil
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from fusemlp.cli.options import PlotOptions, RunsOptions, TrainOptions
from fusemlp.cli.output import check_output, decides_the_model, fitted, show, write_picture
from fusemlp.cli.session import RENAMED
from fusemlp.describe.checks import counted
from fusemlp.describe.metrics import METRICS, rises
from fusemlp.report.metrics import scalars, spelled
from fusemlp.report.plots import FORMATS, Curves, comparison_figure, literal, repeats
from fusemlp.report.runs import Run, joint, open_run, read_history, read_json, read_metrics
from fusemlp.tables.recipe import one_of
from fusemlp_kernels.errors import ArgumentError, CheckpointError

# The test score that stands for a run, the first that it has.
TESTED = ("test_accuracy", "test_rmse", "test_loss")
# A message for each reason would hide the table.
MOST_NAMED = 8


@dataclass(frozen=True)
class Listed:
    """A run: ``monitor`` is the quantity that it was judged by; ``scores`` has those of its best epoch and its test."""

    path: Path
    data: str
    rows: str
    started: str
    status: str
    epochs: int
    best_epoch: int | None
    monitor: str
    # its kind, and how its targets are scaled
    loss: tuple[str | bool, ...]
    scores: dict[str, float]
    options: dict[str, Any]


def runs(options: RunsOptions) -> None:
    """Print a table for each data set, and name the folders that are no runs."""
    folder = options.folder
    if not folder.is_dir():
        mend = "give one with run folders in it, or make the first run: fusemlp train digits"
        raise ArgumentError(f"FOLDER: there is no folder {str(folder)!r}; {mend}")
    listed, skipped = read_all(folder)
    if options.sort is not None and not any(options.sort in run.scores for run in listed):
        known = sorted({name for run in listed for name in run.scores})
        raise ArgumentError(f"sort: no run has {options.sort!r}; expected {one_of(known) if known else 'some run'}")
    groups: dict[tuple[str, str], list[Listed]] = {}
    for run in listed:
        groups.setdefault((run.data, run.rows), []).append(run)
    content: list[dict[str, Any]] = []
    blocks = [] if listed else [f"no run in {folder}"]
    for (data, rows), group in groups.items():
        score = options.sort or common_score(group)
        group.sort(key=lambda run: ranked(run, score))
        differing = differences(group)
        content += [described(run, score, {name: run.options[name] for name in differing}) for run in group]
        title = f"{data} (rows {rows[:6]})" if sum(name == data for name, _ in groups) > 1 else data
        title = (
            f"{title}: {counted(len(group), 'run')}, by {score}, the {'largest' if larger(score) else 'least'} first"
        )
        blocks.append("\n".join([title, *table(group, score, differing)]))
    if skipped:
        lines = [f"left out: {path.name}: {reason}" for path, reason in skipped[:MOST_NAMED]]
        if len(skipped) > MOST_NAMED:
            lines.append(f"left out: {len(skipped) - MOST_NAMED} more; --json names them")
        blocks.append("\n".join(lines))
    left_out = [{"path": str(path), "reason": reason} for path, reason in skipped]
    everything = {"folder": str(folder), "runs": content, "left_out": left_out}
    show(everything, ["\n\n".join(blocks)], as_json=options.as_json)


def read_all(folder: Path) -> tuple[list[Listed], list[tuple[Path, str]]]:
    """Return the runs in a folder, or the folder itself if it is one, and what is no run, with the reason."""
    if Run(folder).config.exists():
        candidates = [folder]
    else:
        try:
            candidates = sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))
        except OSError as error:
            raise ArgumentError(f"FOLDER: {str(folder)!r} cannot be read ({error.strerror})") from error
    listed: list[Listed] = []
    skipped: list[tuple[Path, str]] = []
    for path in candidates:
        try:
            listed.append(read_run(path))
        except CheckpointError as error:
            missing = not Run(path).config.exists()
            skipped.append((path, "no run folder, it has no config.json" if missing else str(error)))
        except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
            skipped.append((path, f"its files are not those of a run ({type(error).__name__}: {error})"))
    return listed, skipped


def read_run(path: Path) -> Listed:
    """Return the summary of a run folder; the error of the first file that is broken."""
    run, config = open_run(path)
    rows = read_metrics(run)
    report = read_json(run.report)
    prepared = config["preprocessor"]
    units = prepared["classes"] is None and prepared["scale"] in ("minmax", "none") and prepared["scale"]
    monitor = monitored(config["options"].get("metric"), rows)
    finite = [row for row in rows if math.isfinite(row.get(monitor, math.nan))]
    sign = -1 if rises(monitor) else 1
    best = min(finite, key=lambda row: sign * row[monitor], default=rows[-1] if rows else None)
    quantities = {name: value for name, value in (best or {}).items() if name not in ("epoch", "learning_rate")}
    tested = {f"test_{name}": value for name, value in scalars(report.get("test", {})).items()}
    return Listed(
        path,
        str(config["data"]["name"]),
        str(config["data"]["fingerprint"]),
        str(config["started"]),
        status(config, report),
        int(report.get("epochs", rows[-1]["epoch"] if rows else 0)),
        None if best is None else int(best["epoch"]),
        monitor,
        (config["loss"]["kind"], units, prepared.get("target_log", False)),
        {**quantities, **tested},
        model_options(config),
    )


def monitored(metric: str | None, rows: Sequence[Mapping[str, float]]) -> str:
    """Return the quantity of the epochs that the option ``--metric`` stands for."""
    if metric is None:
        return "val_loss" if not rows or "val_loss" in rows[0] else "loss"
    return f"val_{metric}" if metric in METRICS else metric


def status(config: Mapping[str, Any], report: Mapping[str, Any]) -> str:
    """Return the end of a run in a word or two."""
    if not report:
        return "unfinished"
    for word in ("interrupted", "diverged"):
        if report.get(word):
            return word
    if "sweep" in config:
        return f"best of {config['sweep']['ended']}"
    return "stopped early" if report.get("stopped") else "trained"


def model_options(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options that may change a model; a run of an earlier release has the defaults of newer options."""
    before = {RENAMED.get(name, name): value for name, value in config["options"].items()}
    options = {
        field.name: before.get(field.name, field.default)
        for field in fields(TrainOptions)
        if decides_the_model(field) and field.name != "data"
    }
    options["from"] = options.pop("transfer_from")
    rate = config["optimizer"]["lr"]
    options["lr"] = rate["lr"] if isinstance(rate, Mapping) else rate
    options["hidden"] = list(config["network"]["sizes"][1:-1])
    options |= {"loss": config["loss"]["kind"], "epochs": config["epochs"], "models": options["models"] or 1}
    return options | {name: config[name] for name in ("backend", "precision", "plan")}


def differences(group: Sequence[Listed]) -> list[str]:
    """Return the options that not all runs share, in the order of ``--help``."""
    first = group[0].options
    return [name for name in first if any(run.options[name] != first[name] for run in group)]


def common_score(group: Sequence[Listed]) -> str:
    """Return the score that the runs were judged by; if they were judged by several, the first of ``TESTED``."""
    monitors = {run.monitor for run in group if run.scores} or {group[0].monitor}
    if len(monitors) == 1 and (len({run.loss for run in group}) == 1 or not next(iter(monitors)).endswith("loss")):
        return monitors.pop()
    return tested(group, group[0].monitor)


def tested(group: Sequence[Listed], otherwise: str) -> str:
    """Return the first of ``TESTED`` that a run has."""
    return next((name for name in TESTED if any(name in run.scores for run in group)), otherwise)


def larger(score: str) -> bool:
    """Return whether a larger score is better."""
    return rises(score.removeprefix("test_"))


def ranked(run: Listed, score: str) -> tuple[bool, float, str]:
    """Return the key by which runs are sorted: the best score first, those without it last."""
    value = run.scores.get(score, math.nan)
    if not math.isfinite(value):
        return True, 0.0, run.path.name
    return False, -value if larger(score) else value, run.path.name


def described(run: Listed, score: str, differing: dict[str, Any]) -> dict[str, Any]:
    """Return a run for ``--json``."""
    about = {name: getattr(run, name) for name in ("data", "started", "status", "epochs", "best_epoch")}
    scores = {"sorted_by": score, "score": run.scores.get(score), "scores": run.scores}
    return {"run": str(run.path), **about, **scores, "differs": differing}


def table(group: Sequence[Listed], score: str, differing: Iterable[str]) -> list[str]:
    """Return the lines of a table; a terminal that is too narrow for all columns says which it leaves out."""
    of_test = tested(group, score)
    columns = {"run": [run.path.resolve().name for run in group]}
    columns |= {name: [_figure(run.scores.get(name)) for run in group] for name in (score, of_test)}
    columns["started"] = [run.started[:16].replace("T", " ") for run in group]
    done = [(run.epochs, run.options["epochs"]) for run in group]
    columns["epochs"] = [str(epochs) if epochs == most else f"{epochs} of {most}" for epochs, most in done]
    columns["status"] = [run.status for run in group]
    options = [name for name in differing if name not in columns]
    columns |= {name: [_word(run.options[name]) for run in group] for name in options}
    width = shutil.get_terminal_size().columns if sys.stdout.isatty() else None
    dispensable = ["started", "status", *reversed(options), "epochs", *([of_test] if of_test != score else [])]
    lines, left_out = fitted(columns, dispensable, width)
    return lines + ([f"no room for {', '.join(left_out)}: --json shows all"] if left_out else [])


def _figure(value: float | None) -> str:
    return "-" if value is None or not math.isfinite(value) else spelled(value)


def _word(value: Any) -> str:
    if isinstance(value, list):
        return ",".join(map(str, value)) or "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return "-" if value is None else f"{value:.6g}" if isinstance(value, float) else str(value)


DEFAULT = Path("comparison.png")


def plot(options: PlotOptions) -> None:
    """Draw loss and accuracy of the runs over their epochs."""
    runs = [_curves(path, name) for path, name in zip(options.runs, names(options.runs), strict=True)]
    out, number = options.out or DEFAULT, 1
    while options.out is None and out.exists() and not options.force:
        number += 1
        out = DEFAULT.with_stem(f"{DEFAULT.stem}-{number}")
    check_output("out", out, FORMATS, force=options.force)
    title = runs[0].name if len(runs) == 1 else f"{len(runs)} runs"
    write_picture(out, lambda: comparison_figure(runs, title=literal(title)), "out")
    same = repeats(runs)
    lines = [*(f"{name} has the same curves as {first}" for name, first in same.items()), f"plot {out}"]
    content = {"runs": [str(path) for path in options.runs], "plot": str(out), "same": same}
    show(content, lines, as_json=options.as_json)


def names(paths: Sequence[Path]) -> list[str]:
    """Return labels for the runs: their folders' names, whole paths where these repeat, numbers where paths do."""
    labels = [path.resolve().name for path in paths]
    if len(set(labels)) < len(labels):
        labels = [str(path) for path in paths]
    before = [labels[:place].count(label) for place, label in enumerate(labels)]
    return [f"{label} ({count + 1})" if count else label for label, count in zip(labels, before, strict=True)]


def _curves(path: Path, name: str) -> Curves:
    run, config = open_run(path)
    history = read_history(run)
    if not history:
        raise CheckpointError(f"run: {str(path)!r} has no complete epoch yet, and nothing to draw; leave it out")
    return Curves(name, joint(history, read_json(run.report))[0], config["loss"]["kind"])
