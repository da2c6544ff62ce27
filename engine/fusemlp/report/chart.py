"""Charts of ``report.html``: lines and points that matplotlib draws as SVG, in the colours of the page's style."""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from fusemlp.inputs.arrays import Array
from fusemlp.report.plots import check_plots, literal, scale_loss

# Colours of a figure, and the variables of the page's style that take their places, in the light and in the dark.
COLOURS = ("#0072b2", "#d55e00", "#00805f", "#b0588f", "#8a6d00", "#3b3b98")
TEXT, GRID = "#59636e", "#d8dee4"
VARIABLES = {TEXT: "--soft", GRID: "--rule", **{colour: f"--c{number}" for number, colour in enumerate(COLOURS)}}
SIZE = 4.4, 2.8
STYLE: Any = {
    **dict.fromkeys(("axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color"), TEXT),
    **{"grid.color": GRID, "axes.spines.top": False, "axes.spines.right": False, "font.size": 9.0},
    "axes.formatter.limits": (-4, 5),
    # text as text, and ids that stay the same when the page is made again
    **{"svg.fonttype": "none", "svg.hashsalt": "fusemlp"},
}


class Line(NamedTuple):
    """A series of points (x, y), joined unless ``points``; ``colour`` is an index into ``COLOURS``."""

    name: str
    xs: Sequence[float] | Array
    ys: Sequence[float] | Array
    colour: int = 0
    points: bool = False

    @property
    def finite(self) -> Array:
        """The points without NaN and infinities, (n, 2)."""
        pairs = np.column_stack([np.asarray(self.xs, np.float64), np.asarray(self.ys, np.float64)])
        return np.asarray(pairs[np.isfinite(pairs).all(axis=1)])


@dataclass(frozen=True)
class Chart:
    """``lines`` over the axes ``x`` and ``y``.

    ``mark`` names a vertical line, ``diagonal`` the line y = x; ``whole``: x has whole numbers only. ``log``: y
    may have a logarithmic axis.
    """

    title: str
    lines: Sequence[Line]
    x: str
    y: str
    mark: tuple[str, float] | None = None
    diagonal: str = ""
    whole: bool = False
    log: bool = False

    @property
    def summary(self) -> str:
        """The chart in words."""
        ends = [(line.name, *line.finite[[0, -1], 1]) for line in self.lines if len(line.finite)]
        return f"{self.title}: " + "; ".join(f"{name} from {first:.4g} to {last:.4g}" for name, first, last in ends)

    @property
    def tables(self) -> list[list[list[str]]]:
        """The numbers of the joined lines: for each list of x that they share a header and rows."""
        joined = [line for line in self.lines if not line.points]
        tables = []
        for xs in dict.fromkeys(tuple(line.xs) for line in joined):
            shared = [line for line in joined if tuple(line.xs) == xs]
            numbers = zip(xs, *(line.ys for line in shared), strict=True)
            tables.append([[self.x, *(line.name for line in shared)], *([f"{n:.6g}" for n in row] for row in numbers)])
        return tables

    def svg(self) -> str:
        """Return the drawing as an element of a page; MissingLibraryError without matplotlib."""
        check_plots()
        from matplotlib import rc_context
        from matplotlib.figure import Figure
        from matplotlib.ticker import MaxNLocator

        pairs = np.concatenate([line.finite for line in self.lines])
        with rc_context(STYLE), warnings.catch_warnings(), np.errstate(all="ignore"):
            # numbers may be anything
            warnings.simplefilter("ignore")
            figure = Figure(figsize=SIZE)
            axes = figure.add_axes((0.15, 0.17, 0.82, 0.75))
            if self.log:
                scale_loss(axes, pairs[:, 1].tolist())
            for line in self.lines:
                dashes, alpha = ("none", 0.55) if line.points else ("--" if line.colour == 1 else "-", 1.0)
                marker = "o" if line.points or len(line.finite) < 3 else None
                look: dict[str, Any] = {
                    "color": COLOURS[line.colour],
                    "alpha": alpha,
                    "markersize": 3.0,
                    "markeredgewidth": 0.0,
                }
                axes.plot(*line.finite.T, linestyle=dashes, marker=marker, **look)
            if self.diagonal:
                ends = [pairs.min(), pairs.max()]
                axes.plot(ends, ends, linestyle="--", linewidth=1.0, color=TEXT)
            if self.mark is not None:
                axes.axvline(self.mark[1], linestyle="--", linewidth=1.0, color=TEXT)
            if self.whole:
                axes.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
            axes.set_xlabel(literal(self.x))
            axes.set_ylabel(literal(self.y))
            axes.grid()
            stream = io.StringIO()
            figure.savefig(
                stream, format="svg", transparent=True, metadata=dict.fromkeys(("Creator", "Date", "Format", "Type"))
            )
        return _inline(stream.getvalue())


def _inline(document: str) -> str:
    """Return the root of an SVG document without names of namespaces, ids of groups and fixed colours."""
    root = document[document.index("<svg") :]
    root = re.sub(r' xmlns(:\w+)?="[^"]*"|(?<=<g) id="[^"]*"|font-family: [^;"]*; ', "", root)
    return re.sub(r"(?<=: )#[0-9a-f]{6}", lambda match: f"var({VARIABLES.get(match[0], '--soft')})", root)
