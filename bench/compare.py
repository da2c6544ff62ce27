"""Find regressions between two measurements of fusemlp: ``python -m bench compare BEFORE AFTER``.

The machine may change its speed between two runs. If both runs timed the same versions of other libraries on a case,
these are the yardstick: a round's figure is fusemlp's time over the geometric mean of theirs in that round. Otherwise
the times themselves are compared. The change is the ratio of the medians. Its 95 % interval comes from resampling the
rounds of both runs (the percentile bootstrap of Efron, 1979).
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from bench.cases import Array
from bench.peers import PEERS, is_own
from bench.report import Record, beside, by_case, read, timed, where

DRAWS = 4000
EXAMPLE = """\
example:
  python -m bench compare before.jsonl after.jsonl --threshold 5

exit code: 1 if something became slower, 0 if nothing did, 2 if there is nothing to compare
"""


@dataclass(frozen=True)
class Change:
    """``ratio``: after over before, with its interval ``low`` to ``high``; ``yardstick``: labels of the others."""

    case: str
    label: str
    ratio: float
    low: float
    high: float
    yardstick: tuple[str, ...]

    def verdict(self, threshold: float) -> str:
        """Return "slower" or "faster" if the whole interval exceeds ``threshold`` (a fraction), else "-"."""
        if self.low > 1 + threshold:
            return "slower"
        return "faster" if self.high < 1 / (1 + threshold) else "-"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; return 1 if something became slower, 2 if there is nothing to compare."""
    made = argparse.ArgumentParser(
        prog="python -m bench compare",
        description="Report what became slower in fusemlp from one file of figures to another, beyond noise.",
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    made.add_argument("before", type=Path, metavar="BEFORE.jsonl")
    made.add_argument("after", type=Path, metavar="AFTER.jsonl")
    made.add_argument(
        "--threshold",
        type=float,
        default=3.0,
        metavar="PERCENT",
        help="the change that the whole interval must exceed (default: %(default)g)",
    )
    options = made.parse_args(sys.argv[1:] if arguments is None else list(arguments))
    if not 0 <= options.threshold < 1000:
        made.error(f"argument --threshold: expected per cent from 0, got {options.threshold:g}")
    files = []
    given = (options.before, options.after)
    for path in given:
        if not path.is_file():
            made.error(f"no such file: {path}")
        files.append(timed(read(path)))
    if all(files) and beside(files[0][0]) != beside(files[1][0]):
        said = (f"{path} was measured {beside(file[0])}" for path, file in zip(given, files, strict=True))
        print(f"bench compare: {', '.join(said)}; measure both alike (--busy)", file=sys.stderr)
        return 2
    changes = compared(*files)
    if not changes:
        print("bench compare: the files have no case and contender of fusemlp in common", file=sys.stderr)
        return 2
    print(table(changes, options.threshold / 100))
    for note in differences(*files):
        print(f"\n{note}")
    return 1 if any(one.verdict(options.threshold / 100) == "slower" for one in changes) else 0


def compared(before: Sequence[Record], after: Sequence[Record]) -> list[Change]:
    """Return the changes of all fusemlp contenders that both runs have timed."""
    changes = []
    then, now = by_case(before), by_case(after)
    for case in then:
        for peer, line in then[case].items():
            if peer in PEERS and is_own(peer) and peer in now.get(case, {}):
                changes.append(_change(line, now[case][peer], then[case], now[case]))
    return changes


def _change(old: Record, new: Record, then: dict[str, Record], now: dict[str, Record]) -> Change:
    shared = [
        peer
        for peer in then
        if peer in now
        and not is_own(peer)
        and then[peer]["versions"].get(PEERS[peer].package) == now[peer]["versions"].get(PEERS[peer].package)
    ]
    first, second = (_rounds(line, [lines[peer] for peer in shared]) for line, lines in ((old, then), (new, now)))
    generator = np.random.default_rng(0)
    drawn = _medians(second, generator) / _medians(first, generator)
    low, high = np.percentile(drawn, [2.5, 97.5])
    ratio = float(np.median(second) / np.median(first))
    return Change(
        old["case"], new["label"], ratio, float(low), float(high), tuple(then[peer]["label"] for peer in shared)
    )


def _rounds(line: Record, yardstick: Sequence[Record]) -> Array:
    """Return one figure a round: the time, divided by the yardstick's geometric mean if there is one."""
    own = np.log(line["every_round"])
    if yardstick:
        own = own - np.mean([np.log(one["every_round"]) for one in yardstick], axis=0)
    return np.exp(own)


def _medians(values: Array, generator: np.random.Generator) -> Array:
    return np.median(values[generator.integers(len(values), size=(DRAWS, len(values)))], axis=1)


def table(changes: Sequence[Change], threshold: float) -> str:
    """Return a Markdown table, regressions first."""
    order = {"slower": 0, "faster": 1, "-": 2}
    rows = ["| case | contender | time, after over before | 95 % interval | |", "|---|---|---:|---:|---|"]
    for one in sorted(changes, key=lambda change: order[change.verdict(threshold)]):
        said = one.verdict(threshold)
        shown = f"**{said}**" if said == "slower" else said
        rows.append(f"| {one.case} | {one.label} | {one.ratio:.3f} | {one.low:.3f} to {one.high:.3f} | {shown} |")
    counts = [sum(one.verdict(threshold) == said for one in changes) for said in ("slower", "faster")]
    measured = dict.fromkeys(label for one in changes for label in one.yardstick)
    by = f"beside {', '.join(measured)} in the same rounds" if measured else "by the clock alone"
    rows.append(
        f"\n{counts[0]} of {len(changes)} slower and {counts[1]} faster by more than {threshold:.0%} with the whole "
        f"interval, {by}."
    )
    return "\n".join(rows)


def differences(before: Sequence[Record], after: Sequence[Record]) -> list[str]:
    """Return the differences in machine, versions and settings between the two runs."""
    notes = []
    old, new = before[0], after[0]
    if where(old) != where(new):
        notes.append(f"The machines differ: {where(old)}; {where(new)}.")
    changed = [
        f"{name} {version} to {new['versions'][name]}"
        for name, version in old["versions"].items()
        if new["versions"].get(name, version) != version
    ]
    if changed:
        notes.append(f"Other versions: {', '.join(changed)}.")
    if old["variables"] != new["variables"]:
        notes.append(f"Other settings: {old['variables']}; {new['variables']}.")
    return notes


if __name__ == "__main__":
    sys.exit(main())
