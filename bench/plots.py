"""The picture of a measurement: a model's step against the number of models trained at once.

Its title states the finding, computed from the figures.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench.peers import PEERS
from bench.report import Record, beside, busy_of, case_label, is_reference, microseconds, timed, where
from bench.study import COLOURS, figure


def draw(measured: Sequence[Record], path: Path) -> Path | None:
    """Draw into ``path`` and return it; None without two numbers of models, or without fusemlp's fleet."""
    lines = [line for line in timed(measured) if line["models"] is not None]
    numbers = sorted({line["models"] for line in lines})
    if len(numbers) < 2 or all(line["peer"] != "fleet" for line in lines):
        return None
    made, (axes,) = figure(9.5, 5.6)
    present = {line["peer"]: line["label"] for line in lines}
    for number, peer in enumerate(name for name in PEERS if name in present):
        own = sorted((line for line in lines if line["peer"] == peer), key=lambda line: int(line["models"]))
        x = [line["models"] for line in own]
        middle, low, high = ([line["microseconds"][p] for line in own] for p in ("p50", "p20", "p80"))
        axes.plot(x, middle, marker="osD^v"[number % 5], color=COLOURS[number], linewidth=2, label=present[peer])
        axes.fill_between(x, low, high, color=COLOURS[number], alpha=0.15, linewidth=0)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(numbers, [f"{number:,}" for number in numbers])
    axes.minorticks_off()
    plain_ticks(axes.yaxis)
    axes.set_xlabel(f"models trained at once, each {case_label({**lines[0], 'models': None})}")
    axes.set_ylabel("microseconds a step of one model (log scale)")
    axes.legend(loc="upper left", bbox_to_anchor=(1.01, 1.0), frameon=False)
    made.suptitle(finding(lines), x=0.01, ha="left", fontsize=13, fontweight="bold")
    rounds = " or ".join(map(str, sorted({line["rounds"] for line in lines})))
    busy = f"; each turn {beside(lines[0])}" if busy_of(lines) else ""
    small = f"{where(lines[0])}; {lines[0]['date'][:10]}; medians of {rounds} interleaved rounds{busy}"
    made.supxlabel(small, x=0.01, ha="left", fontsize=8, color="#555555")
    made.savefig(path, dpi=150)
    return path


def finding(lines: Sequence[Record]) -> str:
    """Say how the fleet compares with each library at the largest number of models."""
    most = max(line["models"] for line in lines if line["peer"] == "fleet")
    found = {line["peer"]: line for line in lines if line["models"] == most}
    others = sorted((line for line in found.values() if not is_reference(line)), key=lambda line: -line["ratio"]["p50"])
    text = f"{most:,} models at once take fusemlp {microseconds(found['fleet']['microseconds']['p50'])} us a step each"
    if others:
        text += ",\n" + ", ".join(f"{line['label']} {line['ratio']['p50']:.1f}x as long" for line in others)
    return text


def plain_ticks(axis: Any) -> None:
    """Label a log axis 1, 2, 5, 10 instead of with powers."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axis.set_major_locator(LogLocator(base=10, subs=(1.0, 2.0, 5.0)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())
