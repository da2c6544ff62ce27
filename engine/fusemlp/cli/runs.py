"""``fusemlp runs`` and ``plot``: run folders, their scores, and the options in which they differ."""

from __future__ import annotations

import math
import shutil
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Any

from fusemlp.cli.options import PlotOptions, RunsOptions, TrainOptions
from fusemlp.cli.output import check_output, decides_the_model, show, write_picture
from fusemlp.cli.session import RENAMED
from fusemlp.describe.metrics import METRICS, rises
from fusemlp.describe.text import aligned
from fusemlp.report.metrics import scalars, spelled
from fusemlp.report.plots import FORMATS, Curves, comparison_figure, literal, repeats
from fusemlp.report.runs import Run, open_run, read_json, read_metrics
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
    loss: str
    scores: dict[str, float]
    options: dict[str, Any]


def runs(options: RunsOptions) -> None:
    """Print a table for each data set, and name the folders that are no runs."""
    folder = options.folder
    if not folder.is_dir():
        raise ArgumentError(
            f"FOLDER: there is no folder {str(folder)!r}; give one with run folders in it, or make the first run: "
            "fusemlp train digits"
        )
    found, skipped = read_all(folder)
    sets: dict[tuple[str, str], list[Listed]] = {}
    for one in found:
        sets.setdefault((one.data, one.rows), []).append(one)
    content: list[dict[str, Any]] = []
    lines: list[str] = []
    if options.sort is not None and not any(options.sort in one.scores for one in found):
        known = sorted({name for one in found for name in one.scores})
        raise ArgumentError(f"sort: no run has {options.sort!r}; expected {one_of(known) if known else 'some run'}")
    for (data, rows), group in sets.items():
        score = options.sort or common_score(group)
        group.sort(key=lambda one: ranked(one, score))
        differing = differences(group)
        for one in group:
            content.append(described(one, score, {name: one.options[name] for name in differing}))
        alike = sum(name == data for name, _ in sets)
        title = f"{data} (rows {rows[:6]})" if alike > 1 else data
        count = f"{len(group)} run{'' if len(group) == 1 else 's'}"
        lines += [f"{title}: {count}, by {score}, the {'largest' if larger(score) else 'least'} first"]
        lines += [*table(group, score, differing), ""]
    if not found:
        lines += [f"no run in {folder}", ""]
    for path, reason in skipped[:MOST_NAMED]:
        lines.append(f"left out: {path.name}: {reason}")
    if len(skipped) > MOST_NAMED:
        lines.append(f"left out: {len(skipped) - MOST_NAMED} more; --json names them")
    while lines and not lines[-1]:
        lines.pop()
    left_out = [{"path": str(path), "reason": reason} for path, reason in skipped]
    show({"folder": str(folder), "runs": content, "left_out": left_out}, lines, as_json=options.as_json)


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
    monitor = monitored(config["options"].get("metric"), rows)
    best = best_row(rows, monitor)
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
        str(config["loss"]["kind"]),
        {**quantities, **tested},
        model_options(config),
    )


def monitored(metric: str | None, rows: Sequence[Mapping[str, float]]) -> str:
    """Return the quantity of the epochs that the option ``--metric`` stands for."""
    if metric is None:
        return "val_loss" if not rows or "val_loss" in rows[0] else "loss"
    return f"val_{metric}" if metric in METRICS else metric


def best_row(rows: Sequence[Mapping[str, float]], monitor: str) -> Mapping[str, float] | None:
    """Return the row of the best epoch, None without one."""
    finite = [row for row in rows if math.isfinite(row.get(monitor, math.nan))]
    sign = -1 if rises(monitor) else 1
    return min(finite, key=lambda row: sign * row[monitor], default=rows[-1] if rows else None)


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
    given = {RENAMED.get(name, name): value for name, value in config["options"].items()}
    found = {
        field.name: given.get(field.name, None if field.default is MISSING else field.default)
        for field in fields(TrainOptions)
        if decides_the_model(field) and field.name != "data"
    }
    found["from"] = found.pop("transfer_from")
    rate = config["optimizer"]["lr"]
    found["lr"] = rate["lr"] if isinstance(rate, Mapping) else rate
    found["hidden"] = list(config["network"]["sizes"][1:-1])
    found |= {"loss": config["loss"]["kind"], "epochs": config["epochs"], "models": found["models"] or 1}
    return found | {name: config[name] for name in ("backend", "precision", "plan")}


def differences(group: Sequence[Listed]) -> list[str]:
    """Return the options that not all runs share, in the order of ``--help``."""
    return [name for name in group[0].options if any(one.options[name] != group[0].options[name] for one in group)]


def common_score(group: Sequence[Listed]) -> str:
    """Return the score that the runs were judged by; if they were judged by several, the first of ``TESTED``."""
    monitors = {one.monitor for one in group if one.scores} or {group[0].monitor}
    losses = {one.loss for one in group}
    if len(monitors) == 1 and (len(losses) == 1 or not next(iter(monitors)).endswith("loss")):
        return monitors.pop()
    return next((name for name in TESTED if any(name in one.scores for one in group)), group[0].monitor)


def larger(score: str) -> bool:
    """Return whether a larger score is better."""
    return rises(score.removeprefix("test_"))


def ranked(one: Listed, score: str) -> tuple[bool, float, str]:
    """Return the key by which runs are sorted: the best score first, those without it last."""
    value = one.scores.get(score, math.nan)
    if not math.isfinite(value):
        return True, 0.0, one.path.name
    return False, -value if larger(score) else value, one.path.name


def described(one: Listed, score: str, differing: dict[str, Any]) -> dict[str, Any]:
    """Return a run for ``--json``."""
    return {
        "run": str(one.path),
        **{name: getattr(one, name) for name in ("data", "started", "status", "epochs", "best_epoch")},
        "sorted_by": score,
        "score": one.scores.get(score),
        "scores": one.scores,
        "differs": differing,
    }


def table(group: Sequence[Listed], score: str, differing: Iterable[str]) -> list[str]:
    """Return the lines of a table; a terminal that is too narrow for all columns says which it leaves out."""
    tested = next((name for name in TESTED if any(name in one.scores for one in group)), score)
    columns = {"run": [one.path.resolve().name for one in group]}
    columns |= {name: [_figure(one.scores.get(name)) for one in group] for name in (score, tested)}
    columns["started"] = [one.started[:16].replace("T", " ") for one in group]
    columns["epochs"] = [_part(one.epochs, one.options["epochs"]) for one in group]
    columns["status"] = [one.status for one in group]
    options = [name for name in differing if name not in columns]
    columns |= {name: [_word(one.options[name]) for one in group] for name in options}
    width = shutil.get_terminal_size().columns if sys.stdout.isatty() else None
    dispensable = ["started", "status", *reversed(options), "epochs", *([tested] if tested != score else [])]
    left_out: list[str] = []
    for name in dispensable:
        if width is None or max(map(len, _drawn(columns))) <= width:
            break
        del columns[name]
        left_out.append(name)
    note = [f"no room for {', '.join(left_out)}: --json shows all"] if left_out else []
    return _drawn(columns) + note


def _drawn(columns: Mapping[str, Sequence[str]]) -> list[str]:
    return aligned(list(zip(*([name, *words] for name, words in columns.items()), strict=True))).split("\n")


def _part(done: int, planned: int) -> str:
    return str(done) if done == planned else f"{done} of {planned}"


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
    paths = options.runs
    runs = [_curves(path, name) for path, name in zip(paths, names(paths), strict=True)]
    out = _free_name(options.force) if options.out is None else options.out
    check_output("out", out, FORMATS, force=options.force)
    title = runs[0].name if len(runs) == 1 else f"{len(runs)} runs"
    write_picture(out, lambda: comparison_figure(runs, title=literal(title)), "out")
    same = repeats(runs)
    lines = [*(f"{name} has the same curves as {first}" for name, first in same.items()), f"plot {out}"]
    content = {"runs": [str(path) for path in paths], "plot": str(out), "same": same}
    show(content, lines, as_json=options.as_json)


def _free_name(force: bool) -> Path:
    """Return the name of a picture without ``--out``: with a number if a file has it, unless that is overwritten."""
    path, number = DEFAULT, 1
    while path.exists() and not force:
        number += 1
        path = DEFAULT.with_stem(f"{DEFAULT.stem}-{number}")
    return path


def names(paths: Sequence[Path]) -> list[str]:
    """Return labels for the runs: the names of their folders, or whole paths if names repeat.

    A folder that is given twice has a number at its second label.
    """
    labels = [path.resolve().name for path in paths]
    if len(set(labels)) < len(labels):
        labels = [str(path) for path in paths]
    before = [labels[:place].count(label) for place, label in enumerate(labels)]
    return [f"{label} ({count + 1})" if count else label for label, count in zip(labels, before, strict=True)]


def _curves(path: Path, name: str) -> Curves:
    run, config = open_run(path)
    rows = read_metrics(run)
    if not rows:
        raise CheckpointError(
            f"run: {str(path)!r} has no complete epoch yet, so there is nothing to draw; leave it out"
        )
    history = {quantity: [row[quantity] for row in rows] for quantity in rows[0] if quantity != "epoch"}
    return Curves(name, history, config["loss"]["kind"])
