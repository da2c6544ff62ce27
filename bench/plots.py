"""Pictures of a measurement: steps, many models at once, and the time to the first epoch.

Each title states the finding; it is computed from the figures.
"""

from __future__ import annotations

import statistics
import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bench.peers import PEERS
from bench.report import Record, beside, busy_of, by_case, case_label, is_reference, microseconds, timed, where

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's palette for colour-blind readers; one colour a library, one marker a contender.
LIBRARIES = {"fusemlp": "#0072B2", "torch": "#D55E00", "jax": "#009E73", "scikit-learn": "#8C6BB1", "tiny": "#000000"}
MARKERS = "oDs^vPX"
DPI = 150


def pictures(lines: Sequence[Record], path: Path) -> list[Path]:
    """Draw the pictures beside the JSON lines and return their paths."""
    singles = [line for line in timed(lines) if line["models"] is None]
    fleets = [line for line in timed(lines) if line["models"] is not None]
    drawn: list[Path] = []
    kinds: tuple[tuple[str, Callable[[Sequence[Record]], Figure | None], Sequence[Record]], ...] = (
        ("networks", draw_networks, singles),
        ("models", draw_fleets, fleets),
        ("first-epoch", draw_first_epochs, singles),
    )
    for name, draw, chosen in kinds:
        figure = draw(chosen)
        if figure is not None:
            picture = path.with_name(f"{path.stem}-{name}.png")
            figure.savefig(picture, dpi=DPI)
            drawn.append(picture)
    return drawn


def draw_networks(lines: Sequence[Record]) -> Figure | None:
    """Draw each contender's time for a step over fusemlp's, a row a network; None without other contenders."""
    cases = {name: found for name, found in by_case(lines).items() if "engine" in found and len(found) > 1}
    if not cases:
        return None
    figure, axes = blank(11.0, 2.6 + 0.62 * len(cases))
    labels = []
    looks = looks_of(lines)
    for row, found in enumerate(cases.values()):
        reference = found["engine"]
        labels.append(f"{case_label(reference)}\n{duration(reference['microseconds']['p50'])}")
        others = [line for line in found.values() if not is_reference(line)]
        for place, line in enumerate(others):
            ratio, (colour, marker) = line["ratio"], looks[line["peer"]]
            height = row + 0.5 * ((place + 0.5) / len(others) - 0.5)
            axes.plot([ratio["p20"], ratio["p80"]], [height, height], color=colour, linewidth=1.6, alpha=0.6)
            axes.plot(ratio["p50"], height, marker=marker, color=colour, markersize=7, linestyle="none")
        if row:
            axes.axhline(row - 0.5, color="#E3E3E3", linewidth=0.8)
    axes.axvline(1.0, color=LIBRARIES["fusemlp"], linewidth=2)
    axes.annotate(
        "fusemlp",
        (1.0, -0.62),
        color=LIBRARIES["fusemlp"],
        ha="center",
        va="bottom",
        fontweight="bold",
        annotation_clip=False,
    )
    axes.set_xscale("log")
    axes.set_yticks(range(len(cases)), labels)
    axes.set_ylim(len(cases) - 0.5, -0.6)
    axes.set_xlabel(
        "time of a training step, as a multiple of fusemlp's (log scale; whiskers: 20th to 80th percentile)"
    )
    axes.set_ylabel("network, batch; fusemlp's time")
    plain_ticks(axes.xaxis)
    axes.grid(True, axis="x", which="both", color="#E3E3E3", linewidth=0.6)
    legend(axes, looks, lines, skip=("engine",))
    title(figure, networks_finding(cases), lines)
    return figure


def networks_finding(cases: dict[str, dict[str, Record]]) -> str:
    """Say on how many networks fusemlp is the fastest, with its largest lead over a library's default."""
    ahead, leads, behind = 0, [], []
    for found in cases.values():
        others = [line for line in found.values() if library(line) != "fusemlp"]
        if not others:
            continue
        least = min(others, key=lambda line: line["ratio"]["p50"])
        if least["ratio"]["p50"] >= 1.0:
            ahead += 1
        else:
            behind.append((least["ratio"]["p50"], least))
        leads += [(line["ratio"]["p50"], line) for line in others]
    if not leads:
        return "The plans of fusemlp"
    number, total = ahead, len(cases)
    text = (
        f"fusemlp is the fastest on {number} of {total} networks"
        if total > 1
        else ("fusemlp is the fastest" if number else "fusemlp is not the fastest")
    )
    most, line = max(leads, key=lambda pair: pair[0])
    if most > 1.0:
        text += f", up to {most:.1f}x ahead of {line['label']} ({case_label(line)})"
    if behind:
        least_ratio, line = min(behind, key=lambda pair: pair[0])
        text += f";\nat worst it takes {1 / least_ratio:.2f}x the time of {line['label']} ({case_label(line)})"
    return text


def draw_fleets(lines: Sequence[Record]) -> Figure | None:
    """Draw a model's step over the number of models; None without two such numbers, or without the fleet."""
    numbers = sorted({line["models"] for line in lines})
    if len(numbers) < 2 or all(line["peer"] != "fleet" for line in lines):
        return None
    figure, axes = blank(9.5, 5.6)
    looks = looks_of(lines)
    for peer, (colour, marker) in looks.items():
        own = sorted((line for line in lines if line["peer"] == peer), key=lambda line: int(line["models"]))
        x = [line["models"] for line in own]
        axes.plot(x, [line["microseconds"]["p50"] for line in own], marker=marker, color=colour, linewidth=2)
        low, high = ([line["microseconds"][p] for line in own] for p in ("p20", "p80"))
        axes.fill_between(x, low, high, color=colour, alpha=0.15, linewidth=0)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(numbers, [f"{number:,}" for number in numbers])
    axes.minorticks_off()
    plain_ticks(axes.yaxis)
    axes.grid(True, which="both", color="#E3E3E3", linewidth=0.6)
    axes.set_xlabel(f"models trained at once, each {case_label({**lines[0], 'models': None})}")
    axes.set_ylabel("microseconds a step of one model (log scale)")
    legend(axes, looks, lines)
    title(figure, fleets_finding(lines), lines)
    return figure


def fleets_finding(lines: Sequence[Record]) -> str:
    """Say how the fleet compares with each library at the largest number of models."""
    most = max(line["models"] for line in lines if line["peer"] == "fleet")
    found = {line["peer"]: line for line in lines if line["models"] == most}
    others = sorted((line for line in found.values() if not is_reference(line)), key=lambda line: -line["ratio"]["p50"])
    text = f"{most:,} models at once take fusemlp {microseconds(found['fleet']['microseconds']['p50'])} us a step each"
    if others:
        text += ",\n" + ", ".join(f"{line['label']} {line['ratio']['p50']:.1f}x as long" for line in others)
    return text


def draw_first_epochs(lines: Sequence[Record]) -> Figure | None:
    """Draw the time of each contender to the end of its first epoch, over all networks; None without figures."""
    waits: dict[str, list[float]] = {}
    for line in lines:
        if "first_epoch_seconds" in line:
            waits.setdefault(line["peer"], []).append(line["first_epoch_seconds"])
    if len(waits) < 2:
        return None
    looks = looks_of(lines)
    labels = {line["peer"]: line["label"] for line in lines}
    order = sorted(waits, key=lambda peer: statistics.median(waits[peer]))
    figure, axes = blank(9.5, 1.9 + 0.42 * len(order))
    for row, peer in enumerate(order):
        colour, middle = looks[peer][0], statistics.median(waits[peer])
        axes.plot([min(waits[peer]), max(waits[peer])], [row, row], color=colour, linewidth=1.6, alpha=0.6)
        axes.plot(waits[peer], [row] * len(waits[peer]), "|", color=colour, markersize=9)
        axes.plot(middle, row, "o", color=colour, markersize=10)
        axes.annotate(
            duration(1e6 * middle), (1.02, row), xycoords=("axes fraction", "data"), va="center", annotation_clip=False
        )
    axes.set_xscale("log")
    plain_ticks(axes.xaxis)
    axes.set_yticks(range(len(order)), [labels[peer] for peer in order])
    axes.set_ylim(len(order) - 0.5, -0.5)
    axes.grid(True, which="major", color="#E3E3E3", linewidth=0.6)
    axes.set_xlabel("seconds from arrays to the end of the first epoch (log scale; dot: median, ticks: each network)")
    slowest, own = order[-1], waits.get("engine")
    text = f"{labels[slowest]} needs {duration(1e6 * statistics.median(waits[slowest]))} to the end of its first epoch"
    if own is not None and slowest != "engine":
        text += f", fusemlp {duration(1e6 * statistics.median(own))}"
    title(figure, f"{text}\n(median of {len(by_case(lines))} networks, compilation included)", lines, "one run each")
    return figure


def library(line: Record) -> str:
    """Return the library of a line's contender."""
    peer = line["peer"]
    starts = {"engine": "fusemlp", "fleet": "fusemlp", "torch": "torch", "jax": "jax", "sklearn": "scikit-learn"}
    return next((name for start, name in starts.items() if peer.startswith(start)), "tiny")


def looks_of(lines: Sequence[Record]) -> dict[str, tuple[str, str]]:
    """Return a colour and a marker for each contender: the library's colour, the next marker in it."""
    looks: dict[str, tuple[str, str]] = {}
    used: dict[str, int] = {}
    present = {line["peer"]: library(line) for line in lines}
    for peer in (name for name in PEERS if name in present):
        owner = present[peer]
        looks[peer] = (LIBRARIES[owner], MARKERS[used.get(owner, 0) % len(MARKERS)])
        used[owner] = used.get(owner, 0) + 1
    return looks


def duration(value: float) -> str:
    """Return microseconds with a suitable unit."""
    for size, unit in ((1e6, "s"), (1e3, "ms")):
        if value >= size:
            return f"{value / size:.3g} {unit}"
    return f"{value:.3g} us"


def blank(width: float, height: float) -> tuple[Figure, Axes]:
    """Return a figure with axes, without a display."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.add_subplot()
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_axisbelow(True)
    return figure, axes


def plain_ticks(axis: Any) -> None:
    """Label a log axis 1, 2, 5, 10 instead of with powers."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axis.set_major_locator(LogLocator(base=10, subs=(1.0, 2.0, 5.0)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())


def legend(axes: Axes, looks: dict[str, tuple[str, str]], lines: Sequence[Record], skip: Sequence[str] = ()) -> None:
    """Draw the legend beside the axes."""
    from matplotlib.lines import Line2D

    labels = {line["peer"]: line["label"] for line in lines}
    handles = [
        Line2D([], [], color=colour, marker=marker, linestyle="none", markersize=7, label=labels[peer])
        for peer, (colour, marker) in looks.items()
        if peer not in skip
    ]
    axes.legend(handles=handles, loc="upper left", bbox_to_anchor=(1.01, 1.0), frameon=False)


def title(figure: Figure, text: str, lines: Sequence[Record], how: str = "") -> None:
    """Write the finding above the axes, and machine and number of rounds below."""
    # Bold letters of this size are about a ninth of an inch wide.
    most = int(9 * figure.get_figwidth())
    wrapped = "\n".join(line for part in text.split("\n") for line in textwrap.wrap(part, most))
    figure.suptitle(wrapped, x=0.01, ha="left", fontsize=13, fontweight="bold")
    line = lines[0]
    rounds = sorted({one["rounds"] for one in lines})
    how = how or f"medians of {' or '.join(map(str, rounds))} interleaved rounds"
    busy = f"; each turn {beside(busy_of(lines))}" if busy_of(lines) else ""
    small = f"{where(line)}; {line['date'][:10]}; {how}{busy}"
    figure.supxlabel(small, x=0.01, ha="left", fontsize=8, color="#555555")
