"""Options, lines and table of ``torch_door`` and ``sklearn_door``."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from bench.measure import PAUSE_SECONDS, spread
from bench.peers import version_of
from bench.report import RESULTS, Record, circumstances, where, write
from bench.study import count


def parser(door: str, description: str, rounds: int) -> argparse.ArgumentParser:
    """Return the options of a door's measurement."""
    made = argparse.ArgumentParser(prog=f"python -m bench {door}", description=description)
    made.add_argument("--rounds", type=count, default=rounds, metavar="N", help="turns of each (default: %(default)s)")
    made.add_argument("--out", type=Path, metavar="FILE", help="add the JSON lines to FILE (default: a new file)")
    return made


def in_turn(turns: Sequence[Callable[[], Any]], rounds: int) -> tuple[list[list[float]], list[Any]]:
    """Run every turn once a round, in rotating order; return the seconds of each, and what each returned last."""
    seconds: list[list[float]] = [[] for _ in turns]
    results: list[Any] = [None] * len(turns)
    for number in range(rounds):
        for place in (*range(number % len(turns), len(turns)), *range(number % len(turns))):
            time.sleep(PAUSE_SECONDS)
            start = time.perf_counter()
            results[place] = turns[place]()
            seconds[place].append(time.perf_counter() - start)
    return seconds, results


def line(label: str, theirs: Sequence[float], ours: Sequence[float]) -> Record:
    """Return a row: the seconds of both sides, one a round."""
    return {"label": label, "theirs": [1e6 * s for s in theirs], "ours": [1e6 * s for s in ours]}


def table(lines: Sequence[Record]) -> str:
    """Return a Markdown table with a caption; a ratio above 1 means that fusemlp is faster."""
    first = lines[0]
    rows = ["| " + " | ".join([*first["headers"], "ratio"]) + " |", "|---|---:|---:|---:|"]
    for one in lines:
        theirs, ours = (spread(one[side]).p50 for side in ("theirs", "ours"))
        ratio = spread([a / b for a, b in zip(one["theirs"], one["ours"], strict=True)])
        rows.append(
            f"| {one['label']} | {duration(theirs)} | {duration(ours)} | **{ratio.p50:.2f}** "
            f"({ratio.p20:.2f} to {ratio.p80:.2f}) |"
        )
    caption = f"Both in one process, in turn: medians of {len(first['ours'])} rounds, {circumstances_of(first)}"
    return "\n".join([*rows, "", caption])


def circumstances_of(line: Record) -> str:
    """Return the end of a caption: the spread that a table shows, machine, versions, settings and command."""
    versions = ", ".join(f"{name} {version}" for name, version in line["versions"].items())
    settings = "; ".join(f"{name}={value}" for name, value in line["variables"].items()) or "none"
    return (
        f"20th to 80th percentile of the ratio. {where(line)}; {versions}; settings: {settings}; {line['date'][:10]}, "
        f"commit {line['commit']}. To repeat: `python -m bench {line['door']}`."
    )


def finish(
    door: str,
    packages: Sequence[str],
    lines: Iterable[Record],
    out: Path | None,
    **shared: Any,
) -> None:
    """Write the lines with ``shared``, machine, versions and settings; print the table."""
    common = circumstances({}, {})
    common["versions"] |= {package: version_of(package) for package in ("fusemlp", *packages)}
    full = [{"door": door, **shared, **one, **common} for one in lines]
    path = out or RESULTS / f"{datetime.now(UTC):%Y%m%dT%H%M%SZ}-{door.replace('_', '-')}.jsonl"
    write(full, path)
    print(table(full))
    print(f"bench: figures in {path}", file=sys.stderr)


def duration(value: float) -> str:
    """Return microseconds with a unit, from 10,000 on milliseconds."""
    return f"{value:,.0f} us" if value < 10_000 else f"{value / 1e3:,.0f} ms"
