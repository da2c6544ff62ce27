"""Show the models of a sweep as rows of text, best first; during the sweep, the best so far on a terminal."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from fusemlp.callbacks.progress import REDRAW
from fusemlp.cli.vary import spelled_value
from fusemlp.fleet.results import FleetResults, Member, Point, averages

if TYPE_CHECKING:
    from rich.table import Table

BEST = 8  # rows of the table

Show = Callable[[Collection[Member]], None]


class Seldom:
    """Run an action every few seconds, but for at most a twentieth of the time."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self.next = 0.0

    def do(self, action: Callable[[], object]) -> None:
        """Run ``action`` if it is due."""
        began = time.monotonic()
        if began >= self.next:
            action()
            ended = time.monotonic()
            self.next = ended + max(self.seconds, 20 * (ended - began))


def table(members: Collection[Member], points: Sequence[Point], metric: str, *, limit: int | None) -> list[list[str]]:
    """Return a header and a row for each model: its parameters, scores, epochs and status.

    Models that differ in their seed alone have one row: means of their scores, the spread of ``metric``, the mean of
    the epochs, and as the model the best of them.
    """
    ranked = FleetResults(tuple(members)).combinations(metric, points)[:limit]
    scores = list(dict.fromkeys(name for one in ranked for member in one.members for name in member.scores))
    scores.sort(key=lambda name: (name != metric, not name.startswith("val_")))
    names, several = list(points[0]), averages(points)
    if several:
        names.remove("seed")
    rows = [["model", *names, *scores, *(["spread", "seeds"] if several else []), "epochs", "status"]]
    for one in ranked:
        parameters = [_short(one.parameters[name]) for name in names]
        figures = [_figure(one.mean(name) if several else one.members[0].scores.get(name, math.nan)) for name in scores]
        if several:
            seeds = f"{len(one.members)} of {one.models}" if len(one.members) < one.models else f"{one.models}"
            figures += [_figure(one.spread(metric)), seeds]
        rows.append([str(one.members[0].index), *parameters, *figures, str(round(one.epochs)), one.status])
    return rows


def _figure(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:.4g}"


def _short(value: Any) -> str:
    return f"{value:.6g}" if isinstance(value, float) else spelled_value(value)


def counts(members: Collection[Member], total: int) -> str:
    """Return a text such as ``412 of 640 models: 380 trained, 30 stopped early, 2 diverged``."""
    said = {"trained": "trained", "stopped": "stopped early", "diverged": "diverged"}
    statuses = [member.status for member in members]
    parts = [f"{statuses.count(status)} {words}" for status, words in said.items() if status in statuses]
    of = f"{len(members)} of {total}" if len(members) < total else f"{total}"
    return f"{of} model{'' if total == 1 else 's'}: {', '.join(parts) or 'none has ended yet'}"


@contextmanager
def standings(points: Sequence[Point], metric: str, *, quiet: bool) -> Iterator[Show]:
    """Yield a function that shows the best of the finished models on a terminal, and nothing elsewhere."""
    if quiet or not sys.stderr.isatty():
        yield lambda members: None
        return
    from rich.console import Console
    from rich.live import Live

    seldom, began = Seldom(REDRAW), time.perf_counter()
    with Live(console=Console(stderr=True), auto_refresh=False, transient=True) as live:

        def draw(members: Collection[Member]) -> None:
            title = f"{counts(members, len(points))}; {time.perf_counter() - began:.0f} s"
            rows = table(members, points, metric, limit=BEST)
            shown = _drawn(rows, title)
            # Measure on a console that is wide enough for everything.
            roomy = live.console.options.update(width=10_000)
            for name in _dispensable(rows[0], points[0], metric):
                if live.console.measure(shown, options=roomy).maximum <= live.console.width:
                    break
                at = rows[0].index(name)
                rows = [row[:at] + row[at + 1 :] for row in rows]
                shown = _drawn(rows, title)
            live.update(shown, refresh=True)

        draw([])
        yield lambda members: seldom.do(lambda: draw(members))


def _dispensable(header: Sequence[str], parameters: Iterable[str], metric: str) -> list[str]:
    """Return the dispensable columns, in the order in which a narrow terminal drops them."""
    scores = [name for name in header if name not in {*parameters, metric, "model", "epochs", "status"}]
    of_training = [name for name in scores if not name.startswith("val_")]
    return [*of_training, "status", *(name for name in scores if name not in of_training), "epochs", "model"]


def _drawn(rows: Sequence[Sequence[str]], title: str) -> Table:
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    header, *body = rows
    drawn = Table(title=title, title_justify="left", title_style="bold", box=SIMPLE_HEAD)
    for name in header:
        drawn.add_column(name, justify="left" if name == "status" else "right", no_wrap=True)
    for number, row in enumerate(body):
        drawn.add_row(*row, style="bold green" if number == 0 else None)
    return drawn
