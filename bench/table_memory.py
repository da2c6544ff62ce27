"""Measure the peak memory of ``fusemlp train`` on long tables: many words in two columns, and many rows.

The tables are generated: normal numbers, two columns of words of uneven frequency, and a target of two classes.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from bench.report import Record
from bench.study import count, finish, parse, parser, say, table

NUMBERS = 8
PIECE = 100_000
# Rows, and the words of each of the two columns.
TABLES = ((327_000, (5_500, 5_500)), (10_000_000, (12, 20)))


def write_table(path: Path, rows: int, words: Sequence[int]) -> None:
    """Write a csv file of ``NUMBERS`` columns of numbers and two of words, with the target y."""
    generator = np.random.default_rng(0)
    names = [[f"{kind} {index}" for index in range(many)] for kind, many in zip(("town", "item"), words, strict=True)]
    line = ",".join(["%.4f"] * NUMBERS) + ",%s,%s,%d\n"
    with path.open("w", encoding="utf-8") as stream:
        stream.write(",".join([*(f"x{index}" for index in range(NUMBERS)), "town", "item", "y"]) + "\n")
        for start in range(0, rows, PIECE):
            several = min(PIECE, rows - start)
            X = generator.normal(size=(several, NUMBERS))
            towns, items = ((many * generator.random(several) ** 2).astype(int).tolist() for many in words)
            y = (X[:, 0] + 0.3 * generator.normal(size=several) > 0).tolist()
            for values, town, item, label in zip(X.tolist(), towns, items, y, strict=True):
                stream.write(line % (*values, names[0][town], names[1][item], label))


def train(path: Path, folder: Path) -> tuple[float, int]:
    """Train for one epoch in a process of its own; return its seconds and its peak of resident bytes."""
    command = [sys.executable, "-m", "fusemlp", "train", str(path), "--target", "y", "--epochs", "1"]
    start = time.perf_counter()
    child = subprocess.Popen([*command, "--batch-size", "1024", "--quiet", "--out", str(folder)])
    _, status, usage = os.wait4(child.pid, 0)
    child.returncode = os.waitstatus_to_exitcode(status)
    if child.returncode:
        raise RuntimeError(f"{' '.join(command)} ended with {child.returncode}")
    return time.perf_counter() - start, usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def text(lines: Sequence[Record]) -> str:
    """Return the table of the lines."""
    shown = [
        [f"{line['rows']:,} rows, {line['words']:,} words", f"{line['file'] / 1e6:.0f}", f"{line['peak'] / 1e9:.2f}"]
        for line in lines
    ]
    return table(["table", "file, MB", "peak memory, GB"], shown)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the study and return its exit code."""
    made = parser("table_memory", __doc__.split("\n")[0])
    made.add_argument("--most-rows", type=count, default=TABLES[-1][0], help="leave out tables of more rows")
    options = parse(made, arguments)
    lines: list[Record] = []
    with tempfile.TemporaryDirectory() as folder:
        for rows, words in TABLES:
            if rows > options.most_rows:
                continue
            path = Path(folder, f"{rows}.csv")
            write_table(path, rows, words)
            say(f"{rows} rows, {path.stat().st_size / 1e6:.0f} MB")
            seconds, peak = train(path, Path(folder, f"run-{rows}"))
            lines.append({"rows": rows, "words": sum(words), "file": path.stat().st_size, "s": seconds, "peak": peak})
    finish("table_memory", options, lines, text(lines))
    return 0


if __name__ == "__main__":
    sys.exit(main())
