"""Pictures of a training, drawn with matplotlib's object interface: no display, no global state."""

from __future__ import annotations

import importlib.util
import io
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from fusemlp.diagnosis import Finding

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

HINT = "pip install 'fusemlp[plot]'"
# Okabe and Ito's colours, which those who do not see all colours can tell apart.
TRAINING, VALIDATION, GAP = "#0072B2", "#D55E00", "#E69F00"
# A loss that spans more than this factor is drawn on a logarithmic axis.
LOG_SPAN = 50.0


def can_plot() -> bool:
    """Whether matplotlib is installed."""
    return importlib.util.find_spec("matplotlib") is not None


def curves_png(
    history: Mapping[str, Sequence[float]],
    *,
    loss: str,
    title: str,
    best_epoch: int | None = None,
    overfitting: Finding | None = None,
) -> bytes:
    """Loss and, where there is one, accuracy over the epochs as the content of a PNG file.

    ``history`` has a list for each quantity, an entry an epoch, as ``History.history``; ``best_epoch`` counts from 1.
    The gap between training and validation is shaded from where ``overfitting`` says that it began.
    """
    metrics = ["loss", *(["accuracy"] if "accuracy" in history else [])]
    figure = _figure(width=5.6 * len(metrics))
    labels = {"loss": f"loss ({loss})", "accuracy": "accuracy (share of right answers)"}
    for index, metric in enumerate(metrics):
        axes = figure.add_subplot(1, len(metrics), index + 1)
        _curves(axes, history, metric, best_epoch, overfitting)
        axes.set_xlabel("epoch")
        axes.set_ylabel(labels[metric])
    figure.suptitle(title, fontsize=11)
    return _png(figure)


def sweep_png(rates: Sequence[float], losses: Sequence[float], suggested: float, title: str) -> bytes:
    """The smoothed loss over the learning rate, the suggested rate marked, as the content of a PNG file."""
    figure = _figure(width=6.4)
    axes = figure.add_subplot(1, 1, 1)
    axes.plot(rates, losses, color=TRAINING, linewidth=1.6)
    axes.axvline(suggested, color="#444444", linestyle="--", linewidth=1.0, label=f"suggested: {suggested:.2g}")
    axes.set_xscale("log")
    # The blow-up at the end would press the descent flat.
    low, first = min(losses), losses[0]
    axes.set_ylim(low - 0.1 * (first - low + 1e-12), first + 0.5 * (first - low + 1e-12))
    axes.set_xlabel("learning rate")
    axes.set_ylabel("smoothed loss")
    axes.grid(alpha=0.25)
    axes.legend(frameon=False)
    figure.suptitle(title, fontsize=11)
    return _png(figure)


def _curves(
    axes: Axes,
    history: Mapping[str, Sequence[float]],
    metric: str,
    best_epoch: int | None,
    overfitting: Finding | None,
) -> None:
    from matplotlib.ticker import MaxNLocator

    training, held_out = history[metric], history.get(f"val_{metric}")
    epochs = np.arange(1, len(training) + 1)
    marker = "o" if len(training) < 3 else None
    axes.plot(epochs, training, color=TRAINING, linewidth=1.6, marker=marker, label="training")
    if held_out is not None:
        axes.plot(epochs, held_out, color=VALIDATION, linewidth=1.6, marker=marker, label="validation")
        if overfitting is not None:
            start = (overfitting.epoch or 1) - 1
            gap = abs(held_out[-1] - training[-1])
            axes.fill_between(
                epochs[start:],
                training[start:],
                held_out[start:],
                color=GAP,
                alpha=0.25,
                linewidth=0,
                label=f"overfitting: gap {gap:.3g}",
            )
    if best_epoch is not None:
        label = f"best epoch: {best_epoch}"
        axes.axvline(best_epoch, color="#444444", linestyle="--", linewidth=1.0, label=label)
    if metric == "loss":
        finite = [value for value in (*training, *(held_out or ())) if math.isfinite(value)]
        if min(finite) > 0.0 and max(finite) / min(finite) > LOG_SPAN:
            axes.set_yscale("log")
    margin = 0.02 * len(training) if len(training) > 1 else 0.5
    axes.set_xlim(1 - margin, len(training) + margin)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
    axes.grid(alpha=0.25)
    axes.legend(edgecolor="none", framealpha=0.85)


def _figure(width: float) -> Figure:
    from matplotlib.figure import Figure

    return Figure(figsize=(width, 4.2), dpi=120, layout="constrained")


def _png(figure: Figure) -> bytes:
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    stream = io.BytesIO()
    FigureCanvasAgg(figure)
    figure.savefig(stream, format="png")
    return stream.getvalue()
