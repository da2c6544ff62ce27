"""Pictures of a training, drawn with matplotlib's object interface: no display, no global state."""

from __future__ import annotations

import importlib.util
import io
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fusemlp.report.diagnosis import Finding
from fusemlp.runtime.files import target_file, write_atomically
from fusemlp_kernels.errors import ArgumentError, MissingLibraryError

if TYPE_CHECKING:
    from matplotlib.artist import Artist
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

HINT = "pip install 'fusemlp[plot]'"
Array = np.ndarray[Any, Any]

# Okabe and Ito's palette for colour-blind readers.
TRAINING, VALIDATION, GAP = "#0072B2", "#D55E00", "#E69F00"
COLOURS = (TRAINING, VALIDATION, "#009E73", "#CC79A7", GAP, "#56B4E9", "#000000")
FORMATS = (".png", ".svg", ".pdf")
ACCURACY_LABEL = "accuracy (share of right answers)"
# A loss that spans more than this factor is drawn on a logarithmic axis.
LOG_SPAN = 50.0
# The best of many scores matter; a few bad ones would compress them.
SCORES_LOG_SPAN = 5.0


def can_plot() -> bool:
    """Return whether matplotlib is installed."""
    return importlib.util.find_spec("matplotlib") is not None


def draw(make: Callable[[], Figure], path: str | Path | None) -> Figure:
    """Return the figure of ``make``, and write it to ``path`` unless that is None; check ``path`` first.

    Raises MissingLibraryError without matplotlib, ArgumentError or ArgumentTypeError for an impossible path.
    """
    if not can_plot():
        raise MissingLibraryError(f"plot: it needs matplotlib: {HINT}")
    if path is None:
        return make()
    target, suffix = target_file(path), Path(path).suffix.lower()
    if suffix not in FORMATS:
        raise ArgumentError(f"path: expected a file name ending in {', '.join(FORMATS)}, got {str(path)!r}")
    figure = make()
    write_atomically(target, picture(figure, suffix.removeprefix(".")))
    return figure


def curves_png(
    history: Mapping[str, Sequence[float]],
    *,
    loss: str,
    title: str,
    best_epoch: int | None = None,
    overfitting: Finding | None = None,
) -> bytes:
    """Return ``curves_figure`` as the content of a PNG file."""
    return _png(curves_figure(history, loss=loss, title=title, best_epoch=best_epoch, overfitting=overfitting))


def curves_figure(
    history: Mapping[str, Sequence[float]],
    *,
    loss: str | None = None,
    title: str = "",
    best_epoch: int | None = None,
    overfitting: Finding | None = None,
) -> Figure:
    """Draw loss and, if there is one, accuracy over the epochs.

    ``history`` has a list for each quantity, one entry an epoch, as ``History.history``; ``best_epoch`` counts from 1.
    The gap between training and validation is shaded from the start of ``overfitting``.
    """
    metrics = ["loss", *(["accuracy"] if "accuracy" in history else [])]
    figure = _figure(width=5.6 * len(metrics))
    labels = {"loss": _loss_label(loss), "accuracy": ACCURACY_LABEL}
    for index, metric in enumerate(metrics):
        axes = figure.add_subplot(1, len(metrics), index + 1)
        _curves(axes, history, metric, best_epoch, overfitting)
        axes.set_xlabel("epoch")
        axes.set_ylabel(labels[metric])
    figure.suptitle(title, fontsize=11)
    return figure


@dataclass(frozen=True)
class Curves:
    """One of several trainings in a comparison: its name, its history and the kind of its loss."""

    name: str
    history: Mapping[str, Sequence[float]]
    loss: str


def comparison_figure(runs: Sequence[Curves], *, title: str) -> Figure:
    """Draw several trainings in one picture: a colour each, training dashed, validation solid."""
    from matplotlib.lines import Line2D

    metrics = ["loss", *(["accuracy"] if any("accuracy" in run.history for run in runs) else [])]
    losses = {run.loss for run in runs}
    labels = {"loss": _loss_label(losses.pop() if len(losses) == 1 else None), "accuracy": ACCURACY_LABEL}
    figure = _figure(width=5.6 * len(metrics), height=4.2 + 0.22 * len(runs))
    for index, metric in enumerate(metrics):
        axes = figure.add_subplot(1, len(metrics), index + 1)
        longest = 1
        for number, run in enumerate(runs):
            for name, style, width in ((metric, "--", 1.0), (f"val_{metric}", "-", 1.6)):
                values = run.history.get(name, ())
                if values:
                    longest = max(longest, len(values))
                    marker = "o" if len(values) < 3 else None
                    epochs = np.arange(1, len(values) + 1)
                    axes.plot(epochs, values, style, color=_colour(number), linewidth=width, marker=marker)
        _finish_axes(axes, longest)
        if metric == "loss":
            _scale_loss(axes, [v for run in runs for name in ("loss", "val_loss") for v in run.history.get(name, ())])
        axes.set_xlabel("epoch")
        axes.set_ylabel(labels[metric])
    names = [run.name if len({one.loss for one in runs}) == 1 else f"{run.name} ({run.loss})" for run in runs]
    lines = [Line2D([], [], color=_colour(number), linewidth=1.6, label=name) for number, name in enumerate(names)]
    styles = [Line2D([], [], color="#444444", linewidth=1.0, linestyle="--", label="training")]
    if any("val_loss" in run.history for run in runs):
        styles.append(Line2D([], [], color="#444444", linewidth=1.6, linestyle="-", label="validation"))
    figure.legend(handles=[*lines, *styles], loc="outside lower center", ncols=len(metrics), frameon=False)
    figure.suptitle(title, fontsize=11)
    return figure


def _colour(number: int) -> str:
    return COLOURS[number % len(COLOURS)]


def _loss_label(kind: str | None) -> str:
    return "loss" if kind is None else f"loss ({kind})"


def sweep_png(rates: Sequence[float], losses: Sequence[float], suggested: float, title: str) -> bytes:
    """Return ``sweep_figure`` as the content of a PNG file."""
    return _png(sweep_figure(rates, losses, suggested, title))


def sweep_figure(rates: Sequence[float], losses: Sequence[float], suggested: float, title: str) -> Figure:
    """Draw the smoothed loss over the learning rate, and mark the suggested rate."""
    figure = _figure(width=6.4)
    axes = figure.add_subplot(1, 1, 1)
    axes.plot(rates, losses, color=TRAINING, linewidth=1.6)
    axes.axvline(suggested, color="#444444", linestyle="--", linewidth=1.0, label=f"suggested: {suggested:.2g}")
    axes.set_xscale("log")
    # The blow-up at the end would compress the descent.
    low, first = min(losses), losses[0]
    axes.set_ylim(low - 0.1 * (first - low + 1e-12), first + 0.5 * (first - low + 1e-12))
    axes.set_xlabel("learning rate")
    axes.set_ylabel("smoothed loss")
    axes.grid(alpha=0.25)
    axes.legend(frameon=False)
    figure.suptitle(title, fontsize=11)
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
    parameters: Sequence[Varied], scores: Sequence[float], *, metric: str, best: int | None, title: str
) -> Figure:
    """Draw the score of each model over each parameter, a panel a parameter.

    A diverged model has the score NaN and is a cross at the edge. ``best``: the index of the model to mark.
    """
    columns = min(len(parameters), 3)
    lines = -(-len(parameters) // columns)
    figure = _figure(width=max(6.4, 4.4 * columns), height=3.6 * lines + 0.9)
    panels = figure.subplots(lines, columns, sharey=True, squeeze=False)
    for axes, parameter in zip(panels.flat, parameters, strict=False):
        _scores(axes, parameter, np.asarray(scores, np.float64), best, rising="accuracy" in metric)
        if "loss" in metric:
            _scale_loss(axes, scores, SCORES_LOG_SPAN)
    for axes in panels.flat[len(parameters) :]:
        axes.remove()
    for axes in panels[:, 0]:
        axes.set_ylabel(metric)
    known: dict[str, Artist] = {}
    for axes in figure.axes:
        handles, labels = axes.get_legend_handles_labels()
        known |= dict(zip(labels, handles, strict=True))
    figure.legend(known.values(), known.keys(), loc="outside lower center", ncols=len(known), frameon=False)
    figure.suptitle(title, fontsize=11)
    return figure


def _scores(axes: Axes, parameter: Varied, scores: Array, best: int | None, *, rising: bool) -> None:
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
    alpha = 0.7 if len(scores) < 100 else 0.35
    places = (at + spread)[~failed]
    axes.scatter(places, scores[~failed], s=14, alpha=alpha, color=TRAINING, linewidth=0, label="model", zorder=3)
    medians = np.array([np.median(scores[~failed & (at == value)]) for value in distinct])
    label = "median" if several else "_"
    if words and several:
        axes.hlines(medians, distinct - 0.32, distinct + 0.32, color=VALIDATION, linewidth=1.8, label=label)
    elif not words and parameter.ordered and len(distinct) > 1:
        axes.plot(distinct, medians, color=VALIDATION, linewidth=1.8, label=label)
    if failed.any():
        edge = np.full(int(failed.sum()), 0.02 if rising else 0.98)
        axes.scatter(
            (at + spread)[failed],
            edge,
            s=22,
            marker="x",
            color="#000000",
            linewidth=1.0,
            alpha=alpha,
            label=f"diverged: {len(edge)}",
            transform=axes.get_xaxis_transform(),
        )
        # Crosses do not widen the axis.
        low = scores[~failed].min() if len(places) else 1.0
        axes.update_datalim(np.column_stack([at, np.full(len(at), low)]))
        axes.autoscale_view()
    if best is not None:
        place = (at + spread)[best], scores[best]
        axes.scatter(*place, s=130, marker="*", color=GAP, edgecolor="#000000", linewidth=0.8, zorder=5, label="best")
    axes.set_xlabel(parameter.name)
    axes.grid(alpha=0.25)


def _curves(
    axes: Axes,
    history: Mapping[str, Sequence[float]],
    metric: str,
    best_epoch: int | None,
    overfitting: Finding | None,
) -> None:
    training, validation = history[metric], history.get(f"val_{metric}")
    epochs = np.arange(1, len(training) + 1)
    marker = "o" if len(training) < 3 else None
    axes.plot(epochs, training, color=TRAINING, linewidth=1.6, marker=marker, label="training")
    if validation is not None:
        axes.plot(epochs, validation, color=VALIDATION, linewidth=1.6, marker=marker, label="validation")
        if overfitting is not None:
            start = (overfitting.epoch or 1) - 1
            gap = abs(validation[-1] - training[-1])
            axes.fill_between(
                epochs[start:],
                training[start:],
                validation[start:],
                color=GAP,
                alpha=0.25,
                linewidth=0,
                label=f"overfitting: gap {gap:.3g}",
            )
    if best_epoch is not None:
        label = f"best epoch: {best_epoch}"
        axes.axvline(best_epoch, color="#444444", linestyle="--", linewidth=1.0, label=label)
    if metric == "loss":
        _scale_loss(axes, [*training, *(validation or ())])
    _finish_axes(axes, len(training))
    axes.legend(edgecolor="none", framealpha=0.85)


def _scale_loss(axes: Axes, values: Sequence[float], span: float = LOG_SPAN) -> None:
    """Use a logarithmic axis if the losses span a large factor; draw a loss of 0 at its lower edge."""
    finite = [value for value in values if math.isfinite(value)]
    positive = [value for value in finite if value > 0.0]
    if not positive or min(finite) < 0.0 or max(positive) / min(positive) <= span:
        return
    if len(positive) == len(finite):
        axes.set_yscale("log")
    else:
        axes.set_yscale("symlog", linthresh=min(positive))


def _finish_axes(axes: Axes, epochs: int) -> None:
    from matplotlib.ticker import MaxNLocator

    margin = 0.02 * epochs if epochs > 1 else 0.5
    axes.set_xlim(1 - margin, epochs + margin)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
    axes.grid(alpha=0.25)


def _figure(width: float, height: float = 4.2) -> Figure:
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), dpi=120, layout="constrained")


def picture(figure: Figure, kind: str) -> bytes:
    """Return a figure as the content of a file: ``kind`` is "png", "svg" or "pdf"."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    stream = io.BytesIO()
    FigureCanvasAgg(figure)
    figure.savefig(stream, format=kind)
    return stream.getvalue()


def _png(figure: Figure) -> bytes:
    return picture(figure, "png")
