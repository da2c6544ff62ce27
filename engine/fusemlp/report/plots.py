"""Pictures of a training, drawn with matplotlib's object interface: no display, no global state."""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from fusemlp.describe.metrics import rises
from fusemlp.inputs.arrays import Array
from fusemlp.report.diagnosis import Finding
from fusemlp.runtime.files import target_file, write_atomically
from fusemlp_kernels.errors import ArgumentError

if TYPE_CHECKING:
    from matplotlib.artist import Artist
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's palette for colour-blind readers.
TRAINING, VALIDATION, GAP, GREY, GRID = "#0072B2", "#D55E00", "#E69F00", "#444444", "#d8dee4"
COLOURS = (TRAINING, VALIDATION, "#009E73", "#CC79A7", GAP, "#56B4E9", "#000000")
FORMATS = (".png", ".svg", ".pdf")
# A vertical line; in every picture training is dashed, validation solid; one of several models is faint.
MARK: dict[str, Any] = {"color": GREY, "linestyle": ":", "linewidth": 1.2}
STYLES: dict[str, dict[str, Any]] = {
    "training": {"linestyle": "--", "linewidth": 1.2},
    "validation": {"linestyle": "-", "linewidth": 1.8},
}
FAINT: dict[str, Any] = {"linewidth": 0.8, "alpha": 0.4}
# The quantities of training and of validation are called loss and val_loss.
PREFIXES = {"training": "", "validation": "val_"}
# Markers of the first, the second, ... run of a colour.
MARKERS = (None, "o", "s", "^", "D")
# A loss that spans more than this factor is drawn on a logarithmic axis; of many scores the best matter.
LOG_SPAN = 50.0
SCORES_LOG_SPAN = 5.0
# The axis of many scores reaches this many times the distance from the best one to their median.
REACH = 3.0


def literal(text: str) -> str:
    """Return a text with names from the data as matplotlib draws it letter by letter, without formulas."""
    return text.encode(errors="backslashreplace").decode().replace("$", r"\$")


def draw(make: Callable[[], Figure], path: str | Path | None) -> Figure:
    """Return the figure of ``make``, and write it to ``path`` unless that is None.

    Raises ArgumentError or ArgumentTypeError for an impossible path, before the figure is made.
    """
    if path is None:
        return make()
    target, suffix = target_file(path), Path(path).suffix.lower()
    if suffix not in FORMATS:
        raise ArgumentError(f"path: expected a file name ending in {', '.join(FORMATS)}, got {str(path)!r}")
    figure = make()
    write_atomically(target, picture(figure, suffix.removeprefix(".")))
    return figure


class Line(NamedTuple):
    """A series of points (x, y), joined unless ``points``; ``colour`` is an index into the colours of the drawing.

    ``style`` is one of ``STYLES``. A ``faint`` line is for the eye alone: legend, words and numbers leave it out.
    """

    name: str
    xs: Sequence[float] | Array
    ys: Sequence[float] | Array
    colour: int = 0
    points: bool = False
    style: str = "validation"
    faint: bool = False
    marker: str | None = None

    @property
    def finite(self) -> Array:
        """The points without NaN and infinities, (n, 2)."""
        pairs = np.column_stack([np.asarray(self.xs, np.float64), np.asarray(self.ys, np.float64)])
        return np.asarray(pairs[np.isfinite(pairs).all(axis=1)])


@dataclass(frozen=True)
class Chart:
    """``lines`` over the axes ``x`` and ``y``.

    ``mark`` names a vertical line, ``diagonal`` the line y = x; x is ``whole`` numbers; with ``log`` y may be so drawn.
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
    def named(self) -> list[Line]:
        """The lines of the legend."""
        return [line for line in self.lines if not line.faint]

    @property
    def summary(self) -> str:
        """The chart in words."""
        ends = [(line.name, *line.finite[[0, -1], 1]) for line in self.named if len(line.finite)]
        return f"{self.title}: " + "; ".join(f"{name} from {first:.4g} to {last:.4g}" for name, first, last in ends)

    def draw(self, axes: Axes, colours: Sequence[str] = COLOURS, soft: str = GREY) -> None:
        """Draw the lines in these colours, and the mark and the diagonal in the ``soft`` one."""
        from matplotlib.ticker import MaxNLocator

        pairs = np.concatenate([line.finite for line in self.lines])
        if self.log:
            scale_loss(axes, pairs[:, 1].tolist())
        for line in self.lines:
            look = {"linestyle": "none", "alpha": 0.55} if line.points else STYLES[line.style]
            look = look | {"color": colours[line.colour]} | (FAINT if line.faint else {})
            marker = "o" if line.points or len(line.finite) < 3 else line.marker
            # markers that tell lines apart stand at about ten points
            look |= {"markevery": max(1, len(line.finite) // 10)} if line.marker else {}
            name = "_" if line.faint else line.name
            axes.plot(*line.finite.T, marker=marker, markersize=3.0, markeredgewidth=0.0, label=name, **look)
        if self.diagonal:
            ends = [pairs.min(), pairs.max()]
            axes.plot(ends, ends, label=self.diagonal, **MARK | {"color": soft})
        if self.mark is not None:
            axes.axvline(self.mark[1], label=self.mark[0], **MARK | {"color": soft})
        axes.xaxis.set_major_locator(MaxNLocator(7, integer=self.whole, steps=[1, 2, 5, 10]))
        axes.set_xlabel(literal(self.x))
        axes.set_ylabel(literal(self.y))
        axes.grid(color=GRID)


def by_epoch(
    name: str,
    histories: Sequence[Mapping[str, Sequence[float]]],
    label: str,
    mark: tuple[str, float] | None = None,
) -> Chart:
    """Return the chart of a quantity in training and validation; all histories but the last are faint."""
    lines = [
        Line(part, range(1, len(of[key]) + 1), of[key], colour, style=part, faint=place < len(histories) - 1)
        for place, of in enumerate(histories)
        for colour, (part, prefix) in enumerate(PREFIXES.items())
        if (key := f"{prefix}{name}") in of
    ]
    return Chart(f"{label} by epoch", lines, "epoch", label, mark=mark, whole=True, log=not rises(name))


def _panels(histories: Sequence[Mapping[str, Sequence[float]]], loss: str | None) -> dict[str, str]:
    """Return the label of the loss and, if a history has one, of the accuracy."""
    labels = {"loss": "loss" if loss is None else f"loss ({loss})", "accuracy": "accuracy (share of right answers)"}
    return {name: label for name, label in labels.items() if any(name in history for history in histories)}


def curves_figure(
    history: Mapping[str, Sequence[float]],
    *,
    models: Sequence[Mapping[str, Sequence[float]]] = (),
    loss: str | None = None,
    title: str = "",
    best_epoch: int | None = None,
    overfitting: Finding | None = None,
) -> Figure:
    """Draw loss and, if there is one, accuracy over the epochs of ``history``, as of ``History.history``.

    The histories of ``models``, whose mean it is, are faint. ``best_epoch`` counts from 1; from the start of
    ``overfitting`` the gap to a worse validation is shaded.
    """
    mark = None if best_epoch is None else (f"best epoch: {best_epoch}", float(best_epoch))
    panels = _panels([history], loss)
    figure = _figure(5.6 * len(panels), 4.2, title)
    for place, (metric, label) in enumerate(panels.items(), 1):
        axes = figure.add_subplot(1, len(panels), place)
        by_epoch(metric, [*models, history], label, mark).draw(axes)
        training, validation = history[metric], history.get(f"val_{metric}")
        if validation is not None and overfitting is not None:
            start = (overfitting.epoch or 1) - 1
            epochs = np.arange(start + 1, len(training) + 1)
            gap = f"overfitting: gap {abs(validation[-1] - training[-1]):.3g}"
            low, high = np.array([training[start:], validation[start:]])[:: -1 if rises(metric) else 1]
            axes.fill_between(epochs, low, high, high > low, interpolate=True, color=GAP, alpha=0.25, lw=0, label=gap)
        axes.legend(edgecolor="none", framealpha=0.85)
    return figure


@dataclass(frozen=True)
class Curves:
    """One of several trainings in a comparison: its name, its history and the kind of its loss."""

    name: str
    history: Mapping[str, Sequence[float]]
    loss: str


def comparison_figure(runs: Sequence[Curves], *, title: str) -> Figure:
    """Draw several trainings in one picture: a colour each, training dashed, validation solid.

    The legend names the run whose curves another repeats. From the eighth run on the colours repeat, with markers.
    """
    from matplotlib.lines import Line2D

    losses, same = {run.loss for run in runs}, repeats(runs)
    panels = _panels([run.history for run in runs], runs[0].loss if len(losses) == 1 else None)
    figure, handles = _figure(5.6 * len(panels), 4.2 + 0.22 * len(runs), title), list[Line2D]()
    looks = [(number % len(COLOURS), MARKERS[number // len(COLOURS) % len(MARKERS)]) for number in range(len(runs))]
    for place, (metric, label) in enumerate(panels.items(), 1):
        lines = [
            line._replace(colour=colour, marker=marker)
            for run, (colour, marker) in zip(runs, looks, strict=True)
            for line in by_epoch(metric, [run.history], label).lines
        ]
        # a shorter curve lies over a longer one that begins alike
        lines.sort(key=lambda line: -len(line.ys))
        chart = Chart(title, lines, "epoch", label, whole=True, log=metric == "loss")
        chart.draw(figure.add_subplot(1, len(panels), place))
    for run, (colour, marker) in zip(runs, looks, strict=True):
        label = run.name if len(losses) == 1 else f"{run.name} ({run.loss})"
        label += f": same curves as {same[run.name]}" if run.name in same else ""
        handles.append(Line2D([], [], color=COLOURS[colour], marker=marker, linewidth=1.6, label=literal(label)))
    for part, style in STYLES.items():
        if part == "training" or any("val_loss" in run.history for run in runs):
            handles.append(Line2D([], [], color=GREY, label=part, **style))
    figure.legend(handles=handles, loc="outside lower center", ncols=len(panels), frameon=False)
    return figure


def repeats(runs: Sequence[Curves]) -> dict[str, str]:
    """Return, for each run whose history an earlier run has too, the name of the first such run."""
    firsts = [next(other for other in runs if (other.loss, other.history) == (run.loss, run.history)) for run in runs]
    return {run.name: first.name for run, first in zip(runs, firsts, strict=True) if first is not run}


def sweep_figure(rates: Sequence[float], losses: Sequence[float], suggested: float, title: str) -> Figure:
    """Draw the smoothed loss over the learning rate, and mark the suggested rate."""
    figure = _figure(6.4, 4.2, title)
    axes = figure.add_subplot(1, 1, 1)
    line = Line("training, smoothed", rates, losses, style="training")
    mark = f"suggested: {suggested:.2g}", suggested
    Chart(title, [line], "learning rate", "smoothed loss", mark=mark).draw(axes)
    axes.set_xscale("log")
    # The blow-up at the end would compress the descent.
    low, first = min(losses), losses[0]
    axes.set_ylim(low - 0.1 * (first - low + 1e-12), first + 0.5 * (first - low + 1e-12))
    axes.legend(frameon=False)
    return figure


def importance_figure(bars: Sequence[tuple[str, float, float]], *, unit: str, title: str, deviations: bool) -> Figure:
    """Draw a bar for each column (name, importance, deviation), the first on top."""
    names, values, spread = zip(*bars, strict=True)
    figure = _figure(6.4, 1.2 + 0.28 * len(names), title)
    axes = figure.add_subplot(1, 1, 1)
    axes.barh(range(len(names)), values, xerr=spread if deviations else None, color=TRAINING, ecolor=GREY)
    axes.set_yticks(range(len(names)), map(literal, names))
    axes.invert_yaxis()
    axes.set_xlabel(unit)
    axes.grid(axis="x", alpha=0.25)
    axes.set_axisbelow(True)
    axes.margins(y=0.02)
    axes.locator_params(axis="x", nbins=6)
    return figure


def heat_figure(maps: Mapping[str, Array], *, unit: str, title: str) -> Figure:
    """Draw a heat map (height, width) for each name on one scale, red above 0 and blue below."""
    columns = min(len(maps), 5)
    lines = -(-len(maps) // columns)
    figure = _figure(max(4.0, 1.9 * columns), 2.1 * lines + 0.9, title)
    panels = figure.subplots(lines, columns, squeeze=False)
    most = max(float(np.abs(heat).max()) for heat in maps.values()) or 1.0
    for axes, (name, heat) in zip(panels.flat, maps.items(), strict=False):
        image = axes.imshow(heat, cmap="RdBu_r", vmin=-most, vmax=most)
        axes.set_title(literal(name), fontsize=10)
    for axes in panels.flat:
        axes.set_axis_off()
    figure.colorbar(image, ax=panels.ravel().tolist(), label=unit, shrink=0.8)
    return figure


@dataclass(frozen=True)
class Varied:
    """A parameter that several models differ in: ``values`` has one for each.

    ``scale`` is "log" or "linear". With ``words`` the values are indices into these, drawn side by side. ``ordered``:
    True if a line through the values is meaningful.
    """

    name: str
    values: Sequence[float]
    scale: str = "linear"
    words: Sequence[str] = ()
    ordered: bool = True


def scores_figure(
    parameters: Sequence[Varied], scores: Sequence[float], *, metric: str, kept: Sequence[int], title: str
) -> Figure:
    """Draw the score of each model over each parameter, a panel a parameter; ``kept``: the models to mark.

    The axis ends ``REACH`` times as far from the best score as the median is: worse models are triangles at its edge,
    and diverged ones, whose score is NaN, crosses.
    """
    # as of losses, the less the better
    losses = (-1.0 if rises(metric) else 1.0) * np.asarray(scores, np.float64)
    finite = losses[np.isfinite(losses)]
    reach = REACH * (np.median(finite) - finite.min()) if len(finite) else 0.0
    outside = losses > (finite.min() + reach if reach else math.inf)
    columns = min(len(parameters), 3)
    lines = -(-len(parameters) // columns)
    figure = _figure(max(6.4, 4.4 * columns), 3.6 * lines + 0.9, title)
    panels = figure.subplots(lines, columns, sharey=True, squeeze=False)
    for axes, parameter in zip(panels.flat, parameters, strict=False):
        if "loss" in metric:
            scale_loss(axes, np.asarray(scores)[~outside].tolist(), SCORES_LOG_SPAN)
        _scores(axes, parameter, np.asarray(scores, np.float64), kept, outside, rising=rises(metric))
    for axes in panels.flat[len(parameters) :]:
        axes.remove()
    for axes in panels[:, 0]:
        axes.set_ylabel(metric)
    known: dict[str, Artist] = {}
    for axes in figure.axes:
        handles, labels = axes.get_legend_handles_labels()
        known |= dict(zip(labels, handles, strict=True))
    figure.legend(known.values(), known.keys(), loc="outside lower center", ncols=len(known), frameon=False)
    return figure


def _scores(axes: Axes, parameter: Varied, scores: Array, kept: Sequence[int], outside: Array, *, rising: bool) -> None:
    """Draw a panel of ``scores_figure``."""
    from matplotlib.ticker import MaxNLocator

    at, words = np.asarray(parameter.values, np.float64), parameter.words
    failed = ~np.isfinite(scores)
    distinct, each = np.unique(at[~failed], return_counts=True)
    several = bool((each > 1).any())
    spread: Array = np.zeros(len(at))
    if words:
        axes.set_xticks(range(len(words)), words, rotation=0 if len(words) < 7 else 45)
        axes.set_xlim(-0.6, len(words) - 0.4)
        if several:
            # Spread models of one word by the golden ratio.
            spread = 0.5 * ((np.arange(len(at)) * 0.618034) % 1.0 - 0.5)
    else:
        axes.set_xscale(parameter.scale)
        if parameter.scale == "linear" and np.array_equal(at, at.round()):
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    look: dict[str, Any] = {"alpha": 0.7 if len(scores) < 100 else 0.35, "color": TRAINING}
    places, inside = at + spread, ~failed & ~outside
    axes.margins(y=0.08)
    axes.scatter(places[inside], scores[inside], s=14, linewidth=0, label="model", zorder=3, **look)
    limits = axes.get_ylim()
    medians = np.array([np.median(scores[~failed & (at == value)]) for value in distinct])
    line: dict[str, Any] = {"color": VALIDATION, "label": "median" if several else "_", **STYLES["validation"]}
    if words and several:
        axes.hlines(medians, distinct - 0.32, distinct + 0.32, **line)
    elif not words and parameter.ordered and len(distinct) > 1:
        axes.plot(distinct, medians, **line)
    edge, over = 0.02 if rising else 0.98, axes.get_xaxis_transform()
    marks = (
        (outside, "v" if rising else "^", "beyond the axis", look),
        (failed, "x", "diverged", look | {"color": "#000000"}),
    )
    for which, marker, name, style in marks:
        if which.any():
            label, heights = f"{name}: {which.sum()}", np.full(int(which.sum()), edge)
            axes.scatter(places[which], heights, transform=over, s=22, marker=marker, label=label, **style)
    if inside.any():
        # the marks at the edge widen the axis of the parameter alone
        axes.update_datalim(np.column_stack([at, np.full(len(at), scores[inside][0])]))
        axes.autoscale_view(scaley=False)
        axes.set_ylim(limits)
    if kept:
        stars, size = list(kept), 130 if len(kept) == 1 else 80
        look = {"s": size, "marker": "*", "color": GAP, "edgecolor": "#000000", "zorder": 5}
        within, beyond = ([star for star in stars if outside[star] == out] for out in (False, True))
        axes.scatter(places[within], scores[within], label="kept", **look)
        if beyond:
            axes.scatter(places[beyond], [edge] * len(beyond), transform=over, clip_on=False, **look)
    axes.set_xlabel(parameter.name)
    axes.grid(alpha=0.25)


def scale_loss(axes: Axes, values: Sequence[float], span: float = LOG_SPAN) -> None:
    """Use a logarithmic axis if the losses span a large factor; draw a loss of 0 at its lower edge."""
    finite = [value for value in values if math.isfinite(value)]
    positive = [value for value in finite if value > 0.0]
    if not positive or min(finite) < 0.0 or max(positive) / min(positive) <= span:
        return
    if len(positive) == len(finite):
        axes.set_yscale("log")
    else:
        axes.set_yscale("symlog", linthresh=min(positive))


def _figure(width: float, height: float, title: str) -> Figure:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=120, layout="constrained")
    figure.suptitle(title, fontsize=11)
    return figure


def picture(figure: Figure, kind: str = "png") -> bytes:
    """Return a figure as the content of a file: ``kind`` is "png", "svg" or "pdf"."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    stream = io.BytesIO()
    FigureCanvasAgg(figure)
    figure.savefig(stream, format=kind)
    return stream.getvalue()
