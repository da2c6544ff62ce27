"""Charts as inline SVG, drawn without a library: lines, points and a legend, readable in light and dark."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape
from typing import NamedTuple

from fusemlp.inputs.arrays import Array

WIDTH, HEIGHT = 440, 280
LEFT, RIGHT, TOP, BOTTOM = 56, 18, 10, 40
# A loss that spans more than this factor is drawn on a logarithmic axis.
LOG_SPAN = 50.0
# Values that differ by no more than this share of the greatest, or by this number, are drawn as one.
LEAST_SPREAD, SMALLEST = 1e-12, 1e-305


class Line(NamedTuple):
    """A series of points (x, y), joined unless ``points``; ``colour`` from 0 is that of the page's style."""

    name: str
    xs: Sequence[float] | Array
    ys: Sequence[float] | Array
    colour: int = 0
    points: bool = False


def chart(
    title: str,
    lines: Sequence[Line],
    *,
    x: str,
    y: str,
    mark: tuple[str, float] | None = None,
    diagonal: str = "",
    whole: bool = False,
    log: bool = False,
) -> str:
    """Return a figure with a legend and a table of its lines' numbers.

    ``mark`` names a vertical line, ``diagonal`` the line y = x; ``whole``: x has whole numbers only. ``log``: y
    has a logarithmic axis if it is positive and spans more than a factor of ``LOG_SPAN``.
    """
    pairs_of = (zip(map(float, one.xs), map(float, one.ys), strict=True) for one in lines)
    finite = [[pair for pair in pairs if math.isfinite(sum(pair))] for pairs in pairs_of]
    xs, ys = ([pair[side] for pairs in finite for pair in pairs] for side in (0, 1))
    if not xs:
        return ""
    if diagonal:
        xs = ys = [*xs, *ys]
    log = log and min(ys) > SMALLEST and LOG_SPAN * min(ys) < max(ys) < 1 / SMALLEST
    across, down = _axis(xs, (LEFT, WIDTH - RIGHT), whole=whole), _axis(ys, (HEIGHT - BOTTOM, TOP), log=log)
    parts = []
    for value in across.ticks:
        at = across.place(value)
        parts.append(f'<line class="grid" x1="{at:.1f}" x2="{at:.1f}" y1="{TOP}" y2="{HEIGHT - BOTTOM}"/>')
        parts.append(f'<text x="{at:.1f}" y="{HEIGHT - BOTTOM + 15}" text-anchor="middle">{_tick(value)}</text>')
    for value in down.ticks:
        at = down.place(value)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{at:.1f}" y2="{at:.1f}"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{at + 4:.1f}" text-anchor="end">{_tick(value)}</text>')
    middle = (TOP + HEIGHT - BOTTOM) / 2
    parts.append(f'<text x="{(LEFT + WIDTH - RIGHT) / 2}" y="{HEIGHT - 6}" text-anchor="middle">{escape(x)}</text>')
    parts.append(
        f'<text x="13" y="{middle}" text-anchor="middle" transform="rotate(-90 13 {middle})">{escape(y)}</text>'
    )
    if diagonal:
        low, high = across.low, across.high
        ends = f'x1="{across.place(low):.1f}" y1="{down.place(low):.1f}" x2="{across.place(high):.1f}"'
        parts.append(f'<line class="mark" {ends} y2="{down.place(high):.1f}"/>')
    if mark is not None:
        at = across.place(mark[1])
        parts.append(f'<line class="mark" x1="{at:.1f}" x2="{at:.1f}" y1="{TOP}" y2="{HEIGHT - BOTTOM}"/>')
    for one, pairs in zip(lines, finite, strict=True):
        placed = [(across.place(a), down.place(b)) for a, b in pairs]
        if one.points or len(placed) < 3:
            parts += [f'<circle class="c{one.colour}" cx="{a:.1f}" cy="{b:.1f}" r="2.5"/>' for a, b in placed]
        if not one.points:
            joined = " ".join(f"{a:.1f},{b:.1f}" for a, b in placed)
            parts.append(f'<polyline class="c{one.colour}" points="{joined}"/>')
    legend = "".join(f'<li><i class="c{one.colour}"></i>{escape(one.name)}</li>' for one in lines)
    for name in (diagonal, mark[0] if mark else ""):
        legend += f'<li><i class="mark"></i>{escape(name)}</li>' if name else ""
    told = "; ".join(
        f"{one.name} from {pairs[0][1]:.4g} to {pairs[-1][1]:.4g}"
        for one, pairs in zip(lines, finite, strict=True)
        if pairs
    )
    picture = f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(f"{title}: {told}")}">'
    return (
        f"<figure><figcaption>{escape(title)}</figcaption>{picture}{''.join(parts)}</svg>"
        f'<ul class="legend">{legend}</ul>{_numbers(lines, x)}</figure>'
    )


def table(rows: Sequence[Sequence[str]], *, raw: bool = False) -> str:
    """Return a table whose first row is its header and whose first column names the rows; ``raw`` cells are HTML."""
    shown = (lambda cell: cell) if raw else escape
    head = "".join(f'<th scope="col">{shown(cell)}</th>' for cell in rows[0])
    body = "".join(
        f'<tr><th scope="row">{shown(row[0])}</th>{"".join(f"<td>{shown(cell)}</td>" for cell in row[1:])}</tr>'
        for row in rows[1:]
    )
    return f'<div class="wide" tabindex="0"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def _numbers(lines: Sequence[Line], x: str) -> str:
    """Return the numbers of the joined lines, in a table for each list of x that they share."""
    tables, joined = [], [one for one in lines if not one.points]
    for xs in dict.fromkeys(tuple(one.xs) for one in joined):
        shared = [one for one in joined if tuple(one.xs) == xs]
        columns = zip(*(one.ys for one in shared), strict=True)
        rows = [[f"{at:.6g}", *(f"{value:.6g}" for value in values)] for at, values in zip(xs, columns, strict=True)]
        tables.append(table([[x, *(one.name for one in shared)], *rows]))
    return f"<details><summary>numbers</summary>{''.join(tables)}</details>" if tables else ""


def _tick(value: float) -> str:
    for unit, sign in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= max(unit, 1e4):
            return f"{value / unit:.4g}{sign}"
    return f"{value:.4g}"


class _Axis(NamedTuple):
    low: float
    high: float
    ticks: list[float]
    ends: tuple[float, float]
    log: bool

    def place(self, value: float) -> float:
        low, high, at = map(math.log10, (self.low, self.high, value)) if self.log else (self.low, self.high, value)
        return self.ends[0] + (at - low) / (high - low) * (self.ends[1] - self.ends[0])


def _axis(values: Sequence[float], ends: tuple[float, float], *, log: bool = False, whole: bool = False) -> _Axis:
    low, high = min(values), max(values)
    if log:
        decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
        low, high = 10.0 ** decades[0], 10.0 ** decades[-1]
        return _Axis(low, high, [10.0**power for power in decades[:: -(-len(decades) // 6)]], ends, log)
    size = max(abs(low), abs(high))
    if high - low <= max(LEAST_SPREAD * size, SMALLEST):
        size = size if size > SMALLEST else 1.0
        low, high = low - 0.5 * size, high + 0.5 * size
    rough = (high - low) / 4
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= rough * 0.8)
    step = max(step, 1.0) if whole else step
    if not whole:
        low, high = math.floor(low / step + 1e-9) * step, math.ceil(high / step - 1e-9) * step
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return _Axis(low, high, [round(step * one, 12) for one in range(first, last + 1)], ends, log)
