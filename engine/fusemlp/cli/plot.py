"""``fusemlp plot``: the curves of several runs in one picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from fusemlp.cli.options import PlotOptions
from fusemlp.cli.output import check_output, show, write_picture
from fusemlp.report.plots import FORMATS, Curves, comparison_figure, literal, repeats
from fusemlp.report.runs import open_run, read_metrics
from fusemlp_kernels.errors import CheckpointError

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
