"""Measure the growth of a step's time with its work: ``python -m bench scaling``.

One quantity grows at a time: the batch, the width of the hidden layers, their number, or the number of models. Every
installed contender of ``bench.peers`` takes its turns as in ``python -m bench``, after the same check of its results.
The slope of a contender's line is that of log time over log work (operations of the matrix products). Below 1 fixed
costs dominate; at 1 time is proportional to work; above 1 it grows faster. The report names each stretch above 1 that
exceeds the 20th and 80th percentiles of both points.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from bench.cases import Case
from bench.hardware import card
from bench.measure import TIMED, measure, spread
from bench.peers import PEERS, absent, reference_of, unsuited
from bench.plots import looks_of, plain_ticks
from bench.report import Record
from bench.study import count, counts, duration, figure, finish, parse, parser, say, table
from bench.worker import Worker

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# The values of each axis on a CPU, and on a card.
VALUES = {
    "batch": {"cpu": (8, 32, 128, 512, 2048), "gpu": (32, 128, 512, 2048, 8192, 32768)},
    "width": {"cpu": (16, 64, 256, 1024), "gpu": (64, 256, 1024, 4096, 8192)},
    "depth": {"cpu": (1, 2, 4, 8, 16), "gpu": (1, 2, 4, 8, 16, 32)},
    "models": {"cpu": (1, 4, 16, 64, 256), "gpu": (1, 8, 64, 256, 1024)},
}
AXES = {
    "batch": "rows of a batch (784-128-10)",
    "width": "width of the two hidden layers (64 inputs, 10 outputs, batch 128)",
    "depth": "hidden layers of 128 (64 inputs, 10 outputs, batch 128)",
    "models": "models trained at once (64-32-10, batch 32)",
}
# Steps of an epoch: enough to make the work before and between epochs negligible.
EPOCH_FLOPS, MOST_STEPS = 4e9, 400
# A slope above 1 by less than this is not reported.
STEEP = 1.1


def case_at(axis: str, value: int, device: str = "cpu") -> Case:
    """Return the case of a point."""
    sizes, batch = {
        "batch": ((784, 128, 10), value),
        "width": ((64, value, value, 10), 128),
        "depth": ((64, *[128] * value, 10), 128),
        "models": ((64, 32, 10), 32),
    }[axis]
    case = Case(sizes, batch, steps=2, learning_rate=0.01, device=device, models=value if axis == "models" else None)
    steps = int(EPOCH_FLOPS / work_of(case))
    return replace(case, steps=max(2, min(steps, MOST_STEPS)))


def work_of(case: Case) -> int:
    """Return the floating-point operations of the matrix products in a step of all models."""
    return case.flops * (case.models or 1)


def study(
    axis: str, values: Sequence[int], names: Sequence[str], device: str, rounds: int, *, pause: float = 0.15
) -> list[Record]:
    """Return a line for each contender and point; report the contenders that are left out on stderr."""
    lines = []
    for value in values:
        case = case_at(axis, value, device)
        suited = [name for name in names if unsuited(name, case) is None]
        if not suited:
            say(f"{axis} {value}: no installed contender can run it")
            continue
        suited.sort(key=lambda name: name != reference_of(case))
        with ExitStack() as stack:
            workers = {name: stack.enter_context(Worker(name)) for name in suited}
            results = measure(case, workers, repeats=rounds, progress=lambda text: None, pause=pause)
        for result in results:
            if result.status != TIMED:
                say(f"{axis} {value}: {result.peer} was not timed: {result.reason}")
                continue
            # ``measure`` gives the time of one model; this is a step of all.
            seconds = [one * (case.models or 1) for one in result.seconds]
            found = spread(seconds)
            lines.append(
                {
                    "axis": axis,
                    "value": value,
                    "case": case.name,
                    "contender": result.peer,
                    "label": PEERS[result.peer].label,
                    "device": device,
                    "flops": work_of(case),
                    "rounds": len(seconds),
                    "seconds": {"p20": found.p20, "p50": found.p50, "p80": found.p80},
                }
            )
        shown = ", ".join(f"{line['contender']} {duration(line['seconds']['p50'])}" for line in lines[-len(results) :])
        say(f"{axis} {value}: {shown}")
    return lines


def slope(work: Sequence[float], seconds: Sequence[float]) -> float:
    """Return the slope of log(seconds) over log(work), by least squares."""
    return float(np.polyfit(np.log(work), np.log(seconds), 1)[0])


def steepest(points: Sequence[Record]) -> tuple[float, float, int, int]:
    """Return the steepest stretch between neighbouring points: slope, its lower bound, and the two values.

    The lower bound takes the 80th percentile of the first point and the 20th of the second.
    """
    found = []
    for a, b in itertools.pairwise(points):
        work = np.log(b["flops"] / a["flops"])
        middle = np.log(b["seconds"]["p50"] / a["seconds"]["p50"]) / work
        sure = np.log(b["seconds"]["p20"] / a["seconds"]["p80"]) / work
        found.append((float(middle), float(sure), a["value"], b["value"]))
    return max(found, key=lambda stretch: stretch[1])


def lines_by_peer(lines: Sequence[Record], axis: str) -> Mapping[str, list[Record]]:
    """Return the points of each contender along an axis, in order, without contenders that have one point."""
    found: dict[str, list[Record]] = {}
    for line in sorted((line for line in lines if line["axis"] == axis), key=lambda line: line["value"]):
        found.setdefault(line["contender"], []).append(line)
    return {peer: points for peer, points in found.items() if len(points) > 1}


def steep_sentences(lines: Sequence[Record]) -> list[str]:
    """Return a sentence for each stretch in which the cost grows faster than the work."""
    said = []
    for axis in dict.fromkeys(line["axis"] for line in lines):
        for points in lines_by_peer(lines, axis).values():
            middle, sure, low, high = steepest(points)
            if sure > STEEP:
                said.append(
                    f"{points[0]['label']}, {axis} {low} to {high}: time grows as work to the power {middle:.2f} "
                    f"(at least {sure:.2f})"
                )
    return said


def text(lines: Sequence[Record]) -> str:
    """Return a table for each axis, and the stretches in which the cost grows faster than the work."""
    parts = []
    for axis in dict.fromkeys(line["axis"] for line in lines):
        values = sorted({line["value"] for line in lines if line["axis"] == axis})
        rows = []
        for points in lines_by_peer(lines, axis).values():
            by_value = {point["value"]: point for point in points}
            cells = [duration(by_value[v]["seconds"]["p50"]) if v in by_value else "" for v in values]
            half = points[min(len(points) // 2, len(points) - 2) :]
            all_, end = (
                slope([p["flops"] for p in some], [p["seconds"]["p50"] for p in some]) for some in (points, half)
            )
            rows.append([points[0]["label"], *cells, f"{all_:.2f}", f"{end:.2f}"])
        header = ("", *map(str, values), "slope", "slope, upper half")
        parts.append(f"### {AXES[axis][0].upper()}{AXES[axis][1:]}\n\n{table(header, rows)}")
    steep = steep_sentences(lines)
    said = "No contender's time grows faster than its work, beyond noise."
    if steep:
        said = "The cost grows faster than the work in these stretches:\n\n" + "\n".join(f"- {one}" for one in steep)
    parts.append(
        "Time of a step of all models; the slope is that of log time over log work (operations "
        f"of the products). Medians of {lines[0]['rounds']} interleaved rounds.\n\n{said}"
    )
    return "\n\n".join(parts)


def draw(lines: Sequence[Record]) -> Figure:
    """Draw log time over log work for each axis, a line a contender; the dotted line has slope 1."""
    axes_names = [axis for axis in AXES if lines_by_peer(lines, axis)]
    columns = min(2, len(axes_names))
    made, axes = figure(7.2 * columns, 5.0 * -(-len(axes_names) // columns), columns, -(-len(axes_names) // columns))
    looks = looks_of([{"peer": line["contender"]} for line in lines])
    drawn: dict[str, Any] = {}
    for one, axis in zip(axes, axes_names, strict=False):
        by_peer = lines_by_peer(lines, axis)
        for peer, points in by_peer.items():
            colour, marker = looks[peer]
            x, y = [p["value"] for p in points], [1e6 * p["seconds"]["p50"] for p in points]
            low, high = ([1e6 * p["seconds"][end] for p in points] for end in ("p20", "p80"))
            one.fill_between(x, low, high, color=colour, alpha=0.15, linewidth=0)
            own = peer in ("engine", "fleet")
            (line,) = one.plot(x, y, color=colour, marker=marker, linewidth=2.6 if own else 1.4, markersize=6)
            drawn[peer] = (line, points[0]["label"])
        first = next(iter(by_peer.values()))
        work = np.array([p["flops"] for p in first], float)
        guide = 1e6 * first[-1]["seconds"]["p50"] * work / work[-1]
        one.plot([p["value"] for p in first], guide, ":", color="#555555", linewidth=1.3)
        one.annotate("as the work", (first[0]["value"], guide[0]), fontsize=8, color="#555555", va="bottom")
        one.set_xscale("log")
        one.set_yscale("log")
        one.set_xticks([p["value"] for p in first], [str(p["value"]) for p in first])
        one.minorticks_off()
        plain_ticks(one.yaxis)
        one.set_xlabel(AXES[axis])
        one.set_ylabel("a step" + (" of all models" if axis == "models" else "") + ", microseconds")
        one.set_title(finding(by_peer, axis), fontsize=10, loc="left")
    for spare in axes[len(axes_names) :]:
        spare.set_axis_off()
    handles, labels = zip(*drawn.values(), strict=True)
    made.legend(handles, labels, loc="outside lower center", ncols=5, frameon=False, fontsize=9)
    return made


def finding(by_peer: Mapping[str, list[Record]], axis: str) -> str:
    """Return a picture's title: the engine's lead at both ends, and the growth of its time."""
    own = next((peer for peer in ("engine", "fleet") if peer in by_peer), None)
    if own is None:
        return f"Time of a step over {axis}"
    points = by_peer[own]
    growth = slope([p["flops"] for p in points], [p["seconds"]["p50"] for p in points])
    said = f"fusemlp's step grows as work to the power {growth:.2f}"
    ends = []
    for point in (points[0], points[-1]):
        others = [
            (p["seconds"]["p50"] / point["seconds"]["p50"], p["label"])
            for peer, others in by_peer.items()
            for p in others
            if p["value"] == point["value"] and not p["label"].startswith("fusemlp")
        ]
        if others:
            ratio, label = min(others)
            ends.append(f"{label} {ratio:.2g}x at {point['value']}")
    return said if not ends else f"{said};\nthe fastest of the others takes {', '.join(ends)}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the study and return its exit code."""
    made = parser("scaling", (__doc__ or "").partition("\n")[0])
    made.add_argument("--axis", nargs="+", choices=VALUES, default=list(VALUES), help="default: all")
    made.add_argument("--values", type=counts, metavar="A,B", help="in place of the axis's own; with one axis")
    made.add_argument("--peer", nargs="+", choices=PEERS, help="default: all installed ones but torch.compile")
    made.add_argument("--rounds", type=count, default=7, metavar="N", help="default: %(default)s")
    options = parse(made, arguments)
    if options.values and len(options.axis) != 1:
        made.error("--values: they are those of one axis; give --axis too")
    device = "cpu" if card() is None else "gpu"
    names = []
    for name in options.peer or [name for name, peer in PEERS.items() if not peer.compiles_long]:
        reason = absent(name, device)
        if reason is None:
            names.append(name)
        else:
            say(f"{name}: {reason}")
    lines: list[Record] = []
    for axis in options.axis:
        lines += study(axis, options.values or VALUES[axis][device], names, device, options.rounds)
    if not lines:
        say("error: nothing was measured")
        return 1
    finish("scaling", options, lines, text(lines), draw)
    return 0


if __name__ == "__main__":
    sys.exit(main())
