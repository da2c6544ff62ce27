"""Pictures of a training, drawn with matplotlib's object interface: no display, no global state."""

from __future__ import annotations

import io
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

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
TRAINING, VALIDATION, GAP, GREY = "#0072B2", "#D55E00", "#E69F00", "#444444"
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
    ``overfitting`` the gap to validation is shaded.
    """
    figure, panels = _over_epochs([history, *models], loss, title)
    for metric, axes in panels.items():
        training, validation = history[metric], history.get(f"val_{metric}")
        parts = ("training", metric, TRAINING), ("validation", f"val_{metric}", VALIDATION)
        for part, name, colour in parts:
            for model in models:
                _line(axes, model.get(name, ()), color=colour, **STYLES[part] | FAINT)
            _line(axes, history.get(name, ()), color=colour, label=part, **STYLES[part])
        if validation is not None and overfitting is not None:
            start = (overfitting.epoch or 1) - 1
            epochs = np.arange(start + 1, len(training) + 1)
            label = f"overfitting: gap {abs(validation[-1] - training[-1]):.3g}"
            gap = training[start:], validation[start:]
            axes.fill_between(epochs, *gap, color=GAP, alpha=0.25, linewidth=0, label=label)
        if best_epoch is not None:
            axes.axvline(best_epoch, label=f"best epoch: {best_epoch}", **MARK)
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

    losses = {run.loss for run in runs}
    loss = runs[0].loss if len(losses) == 1 else None
    figure, panels = _over_epochs([run.history for run in runs], loss, title, height=4.2 + 0.22 * len(runs))
    same, handles = repeats(runs), []
    for number, run in enumerate(runs):
        turn, colour = divmod(number, len(COLOURS))
        look: dict[str, Any] = {"color": COLOURS[colour], "marker": MARKERS[turn % len(MARKERS)], "markersize": 4.0}
        for (metric, axes), (part, style) in itertools.product(panels.items(), STYLES.items()):
            curve = run.history.get(f"{PREFIXES[part]}{metric}", ())
            # A shorter curve lies over a longer one that begins alike.
            _line(axes, curve, zorder=2 + 1 / (1 + len(curve)), **look, **style)
        label = run.name if len(losses) == 1 else f"{run.name} ({run.loss})"
        label += f": same curves as {same[run.name]}" if run.name in same else ""
        handles.append(Line2D([], [], linewidth=1.6, label=literal(label), **look))
    for part, style in STYLES.items():
        if part == "training" or any("val_loss" in run.history for run in runs):
            handles.append(Line2D([], [], color=GREY, label=part, **style))
    figure.legend(handles=handles, loc="outside lower center", ncols=len(panels), frameon=False)
    return figure


def repeats(runs: Sequence[Curves]) -> dict[str, str]:
    """Return, for each run whose history an earlier run has too, the name of the first such run."""
    firsts = [next(other for other in runs if (other.loss, other.history) == (run.loss, run.history)) for run in runs]
    return {run.name: first.name for run, first in zip(runs, firsts, strict=True) if first is not run}


def _over_epochs(
    histories: Sequence[Mapping[str, Sequence[float]]], loss: str | None, title: str, height: float = 4.2
) -> tuple[Figure, dict[str, Axes]]:
    """Return a figure with axes for the loss and, if a history has one, the accuracy."""
    from matplotlib.ticker import MaxNLocator

    metrics = ["loss", *(["accuracy"] if any("accuracy" in history for history in histories) else [])]
    labels = {"loss": "loss" if loss is None else f"loss ({loss})", "accuracy": "accuracy (share of right answers)"}
    figure = _figure(5.6 * len(metrics), height, title)
    panels = {}
    for index, metric in enumerate(metrics):
        panels[metric] = axes = figure.add_subplot(1, len(metrics), index + 1)
        curves = [history.get(name, ()) for history in histories for name in (metric, f"val_{metric}")]
        epochs = max(map(len, curves))
        margin = 0.02 * epochs if epochs > 1 else 0.5
        axes.set_xlim(1 - margin, epochs + margin)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
        axes.grid(alpha=0.25)
        if metric == "loss":
            scale_loss(axes, [value for curve in curves for value in curve])
        axes.set_xlabel("epoch")
        axes.set_ylabel(labels[metric])
    return figure, panels


def _line(axes: Axes, values: Sequence[float], *, marker: str | None = None, **style: Any) -> None:
    """Draw a quantity over the epochs, with markers at about ten, or at each of one or two."""
    if values:
        every = max(1, len(values) // 10)
        few = "o" if len(values) < 3 else None
        epochs = np.arange(1, len(values) + 1)
        axes.plot(epochs, values, marker=marker or few, markevery=every, **style)


def sweep_figure(rates: Sequence[float], losses: Sequence[float], suggested: float, title: str) -> Figure:
    """Draw the smoothed loss over the learning rate, and mark the suggested rate."""
    figure = _figure(6.4, 4.2, title)
    axes = figure.add_subplot(1, 1, 1)
    axes.plot(rates, losses, color=TRAINING, label="training, smoothed", **STYLES["training"])
    axes.axvline(suggested, label=f"suggested: {suggested:.2g}", **MARK)
    axes.set_xscale("log")
    # The blow-up at the end would compress the descent.
    low, first = min(losses), losses[0]
    axes.set_ylim(low - 0.1 * (first - low + 1e-12), first + 0.5 * (first - low + 1e-12))
    axes.set_xlabel("learning rate")
    axes.set_ylabel("smoothed loss")
    axes.grid(alpha=0.25)
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
