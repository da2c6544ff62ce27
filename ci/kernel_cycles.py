"""Bounds of a training step on an H100, computed from the record of compiled kernels: ``python ci/kernel_cycles.py``.

A bound is the least number of cycles that a launch can take, and no time: a launch waits for memory and for barriers
besides. It is the largest of three. One program: the stall cycles of its instructions, in the loop of its products no
less than their time, times the waves of programs that the registers and shared memory of a multiprocessor allow.
Issue: a scheduler starts one instruction of a warp a cycle.
Product: the tensor cores' rate. Beside the bounds stand the times that ``kernel_model`` expects. ``--write`` writes the
tables of kernels/README.md.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import kernel_model
from kernel_launches import GOAL_PROCESSORS, GOALS, Goal, Recorded, launches_of
from kernel_loops import ONCE
from kernel_programs import Row, over, programs_of, resident_programs
from kernel_waits import CLOCK

# The bounds at the commit that first recorded them, in cycles and by the formula of today, by the goal's name.
FIRST = Path(__file__).with_name("kernel_bounds.json")
PAGE = FIRST.parents[1] / "kernels/README.md"
MARKED = re.compile(r"(?<=<!-- cycles -->\n).*?(?=<!-- /cycles -->)", re.DOTALL)
# Of a multiprocessor of an H100: the CUDA programming guide's table of compute capabilities.
SCHEDULERS = 4
# Operations of the tensor cores of a multiprocessor a cycle, without sparsity (NVIDIA H100 architecture white paper:
# 989 and 495 TFLOP/s), by the product; "ieee" is the FMA of fp32.
RATES = {"half": 4096, "tf32": 2048, "split": 2048 / 3, "ieee": 256}
Rows = Mapping[tuple[str, str], Row]


def bound(launch: Recorded, row: Row, goal: Goal) -> tuple[float, str]:
    """Return the least cycles of a launch of a goal's step, and the limit that they come from."""
    warps, slots = launch.tile.warps, GOAL_PROCESSORS * resident_programs(row, launch.tile.warps)
    rate = RATES["half" if goal.precision == "bf16" else launch.constants.get("PRODUCT", "ieee")]
    limits = {"product": 0.0, "issue": 0.0, "stalls": 0.0}
    tasks = programs_of(launch)
    for programs in tasks:
        # those of other tasks that do the same count too
        alike = [task for task in tasks if (task.trips, task.operations) == (programs.trips, programs.operations)]
        count = sum(task.count for task in alike) * goal.models
        busiest = over(count, GOAL_PROCESSORS)
        instructions, stalls = _totals(row["loops"], programs.trips, programs.operations / rate)
        for name, cycles in (
            ("stalls", over(count, slots) * stalls),
            ("issue", busiest * instructions * warps / SCHEDULERS),
            ("product", busiest * programs.operations / rate),
        ):
            limits[name] = max(limits[name], cycles)
    limit = max(limits, key=lambda name: limits[name])
    return limits[limit], limit


def _totals(loops: Mapping[str, Sequence[int]], trips: Mapping[str, int], product: float) -> tuple[int, float]:
    """Return the instructions and stalls of a program; ``product`` is the least time of its first loop. A pass of an
    unrolled loop makes several trips."""
    instructions, stalls, least = 0, 0.0, dict.fromkeys(list(trips)[:1], product)
    for name, times in ({ONCE: 1} | dict(trips)).items():
        passes = times // math.prod(loops[name][2:])
        instructions += passes * loops[name][0]
        stalls += max(passes * loops[name][1], least.get(name, 0.0))
    return instructions, stalls


def bounds(goal: Goal, rows: Rows) -> list[tuple[str, float, str]]:
    """Return the launches of a step with their least cycles and the limits."""
    found = []
    for launch in launches_of(goal):
        variant = launch.variant(goal.precision)
        cycles, limit = bound(launch, rows[variant.kernel, variant.name], goal)
        found.append((kernel_model.call_of(launch), cycles, limit))
    return found


def table(rows: Rows) -> str:
    """Return the table of the goals, and that of the launches of their steps, equal ones in one line."""
    first = json.loads(FIRST.read_text(encoding="utf-8"))
    steps = [
        f"| step | us bound at {first['commit']} | us bound now | us expected by a model, not measured | aim |",
        "|---|---:|---:|---:|---:|",
    ]
    lines = ["", "| call | cycles bound | us bound | limit | us expected | limit |", "|---|---:|---:|---|---:|---|"]
    for goal in GOALS:
        calls, times = bounds(goal, rows), kernel_model.step(goal, rows)
        total = sum(cycles for _, cycles, _ in calls)
        before, now = (f"{cycles / CLOCK * 1e6:.1f}" for cycles in (first["cycles"][goal.name], total))
        whole = f"{kernel_model.total(times) * 1e6:.1f}"
        steps.append(f"| {goal.name} | {before} | {now} | {whole} | {goal.aim} |")
        lines.append(f"| **{goal.name}**, a step | {total:.0f} | {now} | | {whole} | |")
        pairs = list(zip(calls, times, strict=True))
        for pair in dict.fromkeys(pairs):
            (call, cycles, limit), time = pair
            number = f"{pairs.count(pair)} x " if pairs.count(pair) > 1 else ""
            lines.append(
                f"| {number}{call} | {cycles:.0f} | {cycles / CLOCK * 1e6:.1f} | {limit} "
                f"| {time.seconds * 1e6:.1f} | {time.limit} |"
            )
    return "\n".join([*steps, *lines]) + "\n"


def page(text: str, rows: Rows) -> str:
    """Return the page with its table made anew."""
    if MARKED.search(text) is None:
        raise ValueError(f"{PAGE.name} has no table between <!-- cycles --> and <!-- /cycles -->")
    return MARKED.sub(lambda _: table(rows), text)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    parser = argparse.ArgumentParser(prog="ci/kernel_cycles.py", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--write", action="store_true", help="write the table of kernels/README.md")
    options = parser.parse_args(arguments)
    rows = kernel_model.recorded()
    if options.write:
        PAGE.write_text(page(PAGE.read_text(encoding="utf-8"), rows), encoding="utf-8")
    print(table(rows), end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())
