"""Write a generated table for ``python -m bench trees``: ``python -m bench generate FILE``.

Five columns of words with 3 to 500 levels, fifteen of numbers, and the target ``y``: a nonlinear function with
interactions, scaled to a variance of 1, plus normal noise with a variance of 0.25. So no model has an expected r2 above
0.8. Four columns of numbers have no part in it. A few cells are missing, after the target was computed.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from bench.study import count, parse, say

ROWS = 1_000_000
# Levels of w1 to w5; level k has a share proportional to 1 / (k + 1).
LEVELS = (3, 8, 30, 120, 500)
NOISE = 0.5
# The share of missing cells by column.
MISSING = {"w4": 0.03, "x2": 0.05, "x6": 0.05, "x7": 0.1, "x13": 0.02}


def table(rows: int = ROWS, seed: int = 0) -> Any:
    """Return the DataFrame of a seed: words w1 to w5, numbers x1 to x15 and y, rounded to four decimals."""
    import pandas

    # NumPy keeps the stream of RandomState for ever, and that of a Generator until a better one is found.
    draw = np.random.RandomState(seed)
    codes = [_codes(draw, rows, levels) for levels in LEVELS]
    numbers = _numbers(draw, rows)
    y = _target(draw, codes, numbers)
    lost = {name: draw.random_sample(rows) < share for name, share in MISSING.items()}
    columns: dict[str, Any] = {}
    for place, (column, levels) in enumerate(zip(codes, LEVELS, strict=True), 1):
        name = f"w{place}"
        kept = np.where(lost[name], -1, column) if name in lost else column
        columns[name] = pandas.Categorical.from_codes(kept, [f"{name}-{level}" for level in range(levels)])
    for place, column in enumerate(numbers, 1):
        name = f"x{place}"
        columns[name] = np.where(lost[name], np.nan, column) if name in lost else column
    return pandas.DataFrame({**columns, "y": y}).round(4)


def _codes(draw: np.random.RandomState, rows: int, levels: int) -> Any:
    shares = np.cumsum(1 / np.arange(1, levels + 1))
    return np.searchsorted(shares, shares[-1] * draw.random_sample(rows), side="right")


def _numbers(draw: np.random.RandomState, rows: int) -> list[Any]:
    shared = draw.standard_normal(rows)
    correlated = [0.6 * shared + 0.8 * draw.standard_normal(rows) for _ in range(5)]
    skewed = [np.exp(draw.standard_normal(rows)) for _ in range(3)]
    uniform = [draw.random_sample(rows) for _ in range(3)]
    waiting, counted, few = draw.exponential(size=rows), draw.poisson(3, rows), draw.randint(0, 4, rows)
    peaks = draw.standard_normal(rows) + np.where(draw.random_sample(rows) < 0.3, -3, 1)
    return [*correlated, *skewed, *uniform, waiting, counted, few, peaks]


def _target(draw: np.random.RandomState, codes: Sequence[Any], numbers: Sequence[Any]) -> Any:
    """Return the target; x5, x7, x8 and x14 have no part in it."""
    x1, x2, x3, x4, _, x6, _, _, x9, x10, x11, x12, x13, _, x15 = numbers
    effects = [draw.standard_normal(levels)[column] for column, levels in zip(codes, LEVELS, strict=True)]
    slope, step = draw.standard_normal(LEVELS[1])[codes[1]], draw.standard_normal(LEVELS[2])[codes[2]]
    signal = 0.6 * sum(effects) + slope * x4 + step * (x13 > 3)
    signal += np.sin(2 * x1) * x2 + np.abs(x3) + np.log(x6) * (x9 > 0.5) + 6 * (x10 - 0.5) * (x11 - 0.5)
    signal += np.sqrt(x12) + (x15 > 0)
    return signal / signal.std() + NOISE * draw.standard_normal(len(x1))


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the file and return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m bench generate", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("file", type=Path, metavar="FILE", help="the CSV file to write; its target is y")
    parser.add_argument("--rows", type=count, default=ROWS, metavar="N", help="default: %(default)s")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="default: %(default)s")
    options = parse(parser, arguments)
    table(options.rows, options.seed).to_csv(options.file, index=False)
    say(f"{options.rows:,} rows in {options.file}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
