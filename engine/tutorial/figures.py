"""Draw the pictures of README.md beside this file, from the numbers that its snippets compute.

``python engine/tutorial/figures.py`` runs the page and writes the pictures. Each PNG names the code it was made of
(``fingerprint``), so that a test finds a picture that is older than the page.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter
from PIL import Image
from PIL.PngImagePlugin import PngInfo

PAGE = Path(__file__).with_name("README.md")
# Okabe and Ito's palette for colour-blind readers.
BLUE, ORANGE, GREEN, GREY = "#0072B2", "#D55E00", "#009E73", "#888888"

Names = Mapping[str, Any]


def snippets() -> list[tuple[str, str]]:
    """Return each Python block of the page with the output that the page shows after it, or nothing."""
    text = PAGE.read_text(encoding="utf-8")
    return re.findall(r"^```python\n(.*?)^```\n(?:\n```text\n(.*?)^```$)?", text, re.DOTALL | re.MULTILINE)


def fingerprint() -> str:
    """Return a hash of all code that makes the pictures."""
    code = [Path(__file__).read_text(encoding="utf-8"), *(block for block, _ in snippets())]
    return hashlib.sha256("\n".join(code).encode()).hexdigest()


def run_page() -> tuple[dict[str, Any], list[str]]:
    """Run the snippets from top to bottom; return the names that they leave and the output of each."""
    names: dict[str, Any] = {"__name__": "__main__"}
    printed = []
    for number, (block, _) in enumerate(snippets(), 1):
        with contextlib.redirect_stdout(io.StringIO()) as output:
            exec(compile(block, f"{PAGE.name}, Python block {number}", "exec"), names)
        printed.append(output.getvalue())
    return names, printed


def four_units(names: Names) -> Figure:
    """Draw the small network: values at the units and weights on the lines in blue, gradients in orange."""
    figure = Figure(figsize=(8, 4.4), layout="constrained")
    axes = figure.add_subplot()
    axes.set(xlim=(-0.5, 5.4), ylim=(-1.2, 3.1))
    axes.set_axis_off()
    layers = ((names["small"][0], names["dW1"]), (names["small"][2], names["dW2"]))
    for layer, (weights, gradients) in enumerate(layers):
        for unit, source in ((0, 0), (0, 1), (1, 0), (1, 1)):
            _edge(axes, layer, source, unit, weights[unit, source], gradients[unit, source])
    x, z1, h1, z2, dz2 = (names[name][0] for name in ("x", "z1", "h1", "z2", "dz2"))
    dh1, dz1 = dz2 @ names["small"][2], names["db1"]
    for unit in range(2):
        _unit(axes, 0, unit, f"input {unit + 1}", f"{x[unit]:g}", "")
        gradient = f"{dh1[unit]:.4f}, before ReLU {dz1[unit]:.4f}"
        _unit(axes, 1, unit, f"hidden {unit + 1}", f"ReLU({z1[unit]:g}) = {h1[unit]:g}", gradient)
        _unit(axes, 2, unit, f"class {unit + 1}", f"{z2[unit]:g}", f"{dz2[unit]:.4f}")
    axes.text(4.45, 1.15, f"softmax,\nloss {names['loss']:.4f}", color=BLUE, fontsize=11, va="center")
    axes.text(4.45, 0.65, "label: class 2", color=GREY, fontsize=10)
    axes.text(-0.4, -1.15, "blue: forward, values and weights", color=BLUE, fontsize=10)
    axes.text(2.0, -1.15, "orange: backward, the gradients of the loss", color=ORANGE, fontsize=10)
    return figure


def _place(layer: int, unit: int) -> tuple[float, float]:
    return 2.0 * layer, 2.0 * (1 - unit)


def _unit(axes: Axes, layer: int, unit: int, name: str, value: str, gradient: str) -> None:
    # The words stand outside, above the upper units and below the lower ones.
    (x, y), outside = _place(layer, unit), 1 if unit == 0 else -1
    axes.plot([x], [y], "o", markersize=26, color="white", markeredgecolor=GREY, zorder=3)
    for row, (words, colour) in enumerate(((value, BLUE), (gradient, ORANGE), (name, GREY))):
        height = y + outside * (0.4 + 0.24 * row)
        axes.text(x, height, words, ha="center", va="center", fontsize=10, color=colour, zorder=4)


def _edge(axes: Axes, layer: int, source: int, unit: int, weight: float, gradient: float) -> None:
    (x0, y0), (x1, y1) = _place(layer, source), _place(layer + 1, unit)
    arrow = {"arrowstyle": "->", "color": GREY, "shrinkA": 14, "shrinkB": 14}
    axes.annotate("", (x1, y1), (x0, y0), arrowprops=arrow, zorder=1)
    white = {"facecolor": "white", "edgecolor": "none", "pad": 1.0}
    for share, words, colour in ((0.27, f"{weight:g}", BLUE), (0.73, f"{gradient:.4f}", ORANGE)):
        x, y = x0 + share * (x1 - x0), y0 + share * (y1 - y0)
        axes.text(x, y, words, ha="center", va="center", fontsize=9, color=colour, bbox=white, zorder=2)


def dying_relu(names: Names) -> Figure:
    """Draw the share of silent hidden units and the accuracy over the epochs."""
    figure = Figure(figsize=(8, 3.2), layout="constrained")
    panels = figure.subplots(1, 2)
    lines = {"relu, rate 0.2": ("calm", BLUE), "relu, rate 2": ("wild", ORANGE), "leaky_relu, rate 2": ("leaky", GREEN)}
    for label, (name, colour) in lines.items():
        for axes, series in zip(panels, names[name], strict=True):
            axes.plot(range(1, len(series) + 1), series, color=colour, label=label)
    for axes, title in zip(panels, ("hidden units without a positive input", "accuracy on new images"), strict=True):
        axes.set(title=title, xlabel="epoch", ylim=(-0.03, 1.03))
        axes.yaxis.set_major_formatter(PercentFormatter(1.0))
        axes.grid(alpha=0.3)
    panels[0].legend(fontsize=8, loc="center", bbox_to_anchor=(0.5, 0.3))
    return figure


def overfitting(names: Names) -> Figure:
    """Draw the losses over the epochs, and the curves of the stopped and of the overfitted network."""
    figure = Figure(figsize=(8, 3.2), layout="constrained")
    losses, curves = figure.subplots(1, 2)
    history = names["by_heart"]
    for name, label, colour in (("loss", "20 training rows", BLUE), ("val_loss", "200 new rows", ORANGE)):
        losses.loglog(range(1, len(history[name]) + 1), history[name], color=colour, label=label)
    losses.axvline(names["turn"] + 1, color=GREY, linestyle="--", linewidth=1, label="best on new rows")
    losses.set(title="mean squared error", xlabel="epoch")
    curves.plot(names["few"], names["few_y"], "o", markersize=4, color="black", label="training rows")
    curves.plot(names["line"], names["curve_by_heart"], color=ORANGE, label="after 2,000 epochs")
    curves.plot(names["line"], names["curve_stopped"], color=GREEN, label="stopped early")
    curves.plot(names["line"], names["np"].sin(4 * names["line"]), color=GREY, linestyle="--", label="without noise")
    curves.set(title="fitted curves", xlabel="x", ylim=(-2.2, 3.2))
    for axes in (losses, curves):
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    return figure


FIGURES: dict[str, Callable[[Names], Figure]] = {
    "four-units.png": four_units,
    "dying-relu.png": dying_relu,
    "overfitting.png": overfitting,
}


def write(figure: Figure, path: Path) -> None:
    """Write a figure as a small PNG of 64 colours that holds the fingerprint."""
    drawn = io.BytesIO()
    figure.savefig(drawn, dpi=100)
    about = PngInfo()
    about.add_text("Description", fingerprint())
    Image.open(drawn).convert("RGB").quantize(64).save(path, optimize=True, pnginfo=about)


def main() -> None:
    """Run the page and write its pictures beside it."""
    names, _ = run_page()
    for file, draw in FIGURES.items():
        write(draw(names), PAGE.with_name(file))


if __name__ == "__main__":
    main()
