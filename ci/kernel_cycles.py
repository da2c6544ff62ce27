"""Bounds of a training step on an H100, computed from the record of compiled kernels: ``python ci/kernel_cycles.py``.

A bound is the least number of cycles that a launch can take, and no time: a launch waits for memory and for barriers
besides. It is the largest of three. One program: the stall cycles of its instructions, in the loop of its products no
less than their time, times the waves of programs that the registers and shared memory of a multiprocessor allow.
Issue: a scheduler starts one instruction of a warp a cycle.
Product: the tensor cores' rate. ``--write`` writes the table of kernels/README.md.
"""

from __future__ import annotations

import argparse
import json
import math
import operator
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kernel_launches import GOAL_PROCESSORS, GOAL_TARGET, GOALS, Goal, Recorded, launches_of
from kernel_loops import ONCE

from fusemlp_kernels.triton import configs, gradients, loss, resident_tables
from fusemlp_kernels.triton.resident import CHUNK

RECORD = Path(__file__).with_name("kernel_resources.json")
# The bounds at the commit that first recorded them, in cycles and by the formula of today, by the goal's name.
FIRST = Path(__file__).with_name("kernel_bounds.json")
PAGE = RECORD.parents[1] / "kernels/README.md"
MARKED = re.compile(r"(?<=<!-- cycles -->\n).*?(?=<!-- /cycles -->)", re.DOTALL)
CLOCK = 1.755e9
# Of a multiprocessor of an H100: the CUDA programming guide's table of compute capabilities.
SCHEDULERS, MOST_WARPS, MOST_PROGRAMS, SHARED = 4, 64, 32, 228 << 10
# Registers are given to a warp in units of 8 a thread; each program takes a kilobyte of shared memory of its own.
REGISTER_UNIT, PROGRAM_SHARED = 8, 1 << 10
# Operations of the tensor cores of a multiprocessor a cycle, without sparsity (NVIDIA H100 architecture white paper:
# 989 and 495 TFLOP/s), by the product; "ieee" is the FMA of fp32.
RATES = {"half": 4096, "tf32": 2048, "split": 2048 / 3, "ieee": 256}
Row = Mapping[str, Any]


@dataclass(frozen=True)
class Programs:
    """Programs of a launch that do the same: the trips of their loops, and the operations of their products, which are
    in the first loop."""

    count: int
    trips: Mapping[str, int]
    operations: int = 0


def _over(whole: int, part: int) -> int:
    return -(-whole // part)


def programs_of(launch: Recorded) -> list[Programs]:
    """Return the programs of a launch, by the shapes of its arguments and the loops of its kernel."""
    given, tile, sides = launch.arguments, launch.tile, launch.constants
    area = 2 * tile.rows * tile.columns * tile.depth * tile.split
    rows = given["M"]
    if launch.name == "resident":
        return [Programs(1, _resident_trips(launch))]
    if launch.name == "grad_weight":
        length, counts = _over(_over(rows, sides["BM"]), given["splits"]), {"weight_sums": 0, "column_sums": 0}
        for task in given["table"].tolist():
            kind, n, k = (task[gradients.TASK_FIELDS.index(name)] for name in ("kind", "N", "K"))
            if kind in (gradients.WEIGHT.value, gradients.BIAS.value):
                sums = "weight_sums" if kind == gradients.WEIGHT.value else "column_sums"
                counts[sums] += _over(n, sides["BN"]) * _over(k, sides["BK"]) * given["splits"]
        weights = Programs(counts["weight_sums"], {"weight_sums": length}, area * length)
        return [weights, Programs(counts["column_sums"], {"column_sums": length})]
    if launch.name in ("linear", "grad_input"):
        ahead = launch.name == "linear"
        trips = _over(given["K" if ahead else "N"], tile.split * tile.depth)
        pointers, parts = (
            ("affine_tile", "affine_tile_of_parts") if ahead else ("input_gradient", "input_sums_of_parts")
        )
        loop = "described_product" if sides["DESCRIBED"] else parts if tile.split > 1 else pointers
        return [Programs(launch.programs, {loop: trips}, area * trips)]
    trips = _over(given["K"], tile.split * tile.depth) if "K" in given else 0
    product = {"affine_tile" if tile.split == 1 else "affine_tile_of_parts": trips}
    if launch.name == "linear_loss_grad":
        product["normaliser_of"] = _weighing(launch, loss.CHUNK.value)
        return [Programs(launch.programs, product, area * trips)]
    if launch.name == "loss_grad":
        groups = _over(_over(rows, sides["BM"]), launch.programs)
        trips = groups * _over(given["N"], sides["BN"])
        inside = {"normaliser_of": _weighing(launch, loss.LONG_CHUNK.value), "loss_grad_kernel": groups}
        return [Programs(launch.programs, {**inside, "rows_in_tiles": trips, "rows_in_tiles 2": trips})]
    raise ValueError(f"{launch.name}: the trips of its loops are unknown; add them to programs_of")


def _weighing(launch: Recorded, rows: int) -> int:
    """Return the passes of the loop of ``normaliser_of``, ``rows`` each: none if every row weighs 1."""
    settings = launch.arguments["settings"].reshape(-1, len(loss.SETTING_FIELDS))[0]
    weighs = any(settings[loss.SETTING_FIELDS.index(name)] for name in ("ignores", "weighted", "classes"))
    return _over(launch.arguments["M"], rows) * weighs


def _resident_trips(launch: Recorded) -> dict[str, int]:
    """Return the trips of a step's loops in ``resident_kernel``, in all layers."""
    batch, tile = launch.arguments["M"], launch.tile
    assert isinstance(tile, configs.ResidentTile)
    places = [resident_tables.LAYER_FIELDS.index(name) for name in ("N", "K")]
    sizes = [[row[place] for place in places] for row in launch.arguments["layers"].tolist()]
    down = _over(batch, tile.rows)
    passes = [_over(k, tile.split * tile.depth) for _, k in sizes[:-1]]
    tiles = [down * _over(n, tile.columns) for n, _ in sizes[:-1]]
    back = [(down * _over(k, tile.depth), _over(n, tile.columns)) for n, k in sizes[1:]]
    weights = [_over(n, tile.weight_rows) * _over(k, tile.weight_columns) for n, k in sizes]
    vectors = [_over(n, tile.outputs) for n, _ in sizes]
    outputs = _over(batch, tile.output_rows)
    return {
        ONCE: 0, "resident_kernel": 1, "resident_kernel 2": len(tiles), "resident_kernel 3": len(back),
        "resident_kernel 4": len(sizes), "measure.normaliser_of": _weighing(launch, CHUNK.value),
        "forward": down * len(tiles), "forward 2": sum(tiles),
        "forward.affine_tile_of_parts": sum(map(operator.mul, tiles, passes)),
        "output_and_loss": outputs, "output_tile.affine_tile": outputs * _over(sizes[-1][1], tile.depth),
        "backward": down * len(back), "backward 2": sum(count for count, _ in back),
        "backward.input_gradient": sum(count * passes for count, passes in back),
        "gradients_of_layer": sum(_over(n, tile.weight_rows) for n, _ in sizes), "gradients_of_layer 2": sum(weights),
        "gradients_of_layer.weight_sums": sum(weights) * down,
        "gradients_of_layer 3": len(sizes), "gradients_of_layer 4": sum(vectors),
        "gradients_of_layer.column_sums": sum(vectors) * down,
    }  # fmt: skip


def resident_programs(row: Row, warps: int) -> int:
    """Return the number of programs that a multiprocessor holds at a time."""
    registers = _over(row["registers"], REGISTER_UNIT) * REGISTER_UNIT * 32 * warps
    shared = row["shared_static"] + row["shared_dynamic"] + PROGRAM_SHARED
    return max(min(configs.FILE_REGISTERS // registers, SHARED // shared, MOST_WARPS // warps, MOST_PROGRAMS), 1)


def bound(launch: Recorded, row: Row, goal: Goal) -> tuple[float, str]:
    """Return the least cycles of a launch of a goal's step, and the limit that they come from."""
    warps, slots = launch.tile.warps, GOAL_PROCESSORS * resident_programs(row, launch.tile.warps)
    rate = RATES["half" if goal.precision == "bf16" else launch.constants.get("PRODUCT", "ieee")]
    limits = {"product": 0.0, "issue": 0.0, "stalls": 0.0}
    for programs in programs_of(launch):
        count = programs.count * goal.models
        busiest = _over(count, GOAL_PROCESSORS)
        instructions, stalls = _totals(row["loops"], programs.trips, programs.operations / rate)
        for name, cycles in (
            ("stalls", _over(count, slots) * stalls),
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


def bounds(goal: Goal, record: Sequence[Row]) -> list[tuple[str, float, str]]:
    """Return the launches of a step with their least cycles and the limits, from the record's newest Triton."""
    newest = max((row["triton"] for row in record), key=configs.version_of)
    rows = {
        (row["kernel"], row["variant"]): row for row in record if (row["triton"], row["arch"]) == (newest, GOAL_TARGET)
    }
    found = []
    for launch in launches_of(goal):
        variant = launch.variant(goal.precision)
        tile = "x".join(str(side) for side in (launch.tile.rows, launch.tile.columns, launch.tile.depth) if side)
        cycles, limit = bound(launch, rows[variant.kernel, variant.name], goal)
        found.append((f"`{launch.name}` {tile}", cycles, limit))
    return found


def table(record: Sequence[Row]) -> str:
    """Return the table of the goals, and that of the launches of their steps, equal ones in one line."""
    first = json.loads(FIRST.read_text(encoding="utf-8"))
    steps = [f"| step | us bound at {first['commit']} | us bound now | aim |", "|---|---:|---:|---:|"]
    lines = ["", "| call | cycles bound | us bound | limit |", "|---|---:|---:|---|"]
    for goal in GOALS:
        calls = bounds(goal, record)
        total = sum(cycles for _, cycles, _ in calls)
        before, now = (f"{cycles / CLOCK * 1e6:.1f}" for cycles in (first["cycles"][goal.name], total))
        steps.append(f"| {goal.name} | {before} | {now} | {goal.aim} |")
        lines.append(f"| **{goal.name}**, a step | {total:.0f} | {now} | |")
        for one in dict.fromkeys(calls):
            call, cycles, limit = one
            times = f"{calls.count(one)} x " if calls.count(one) > 1 else ""
            lines.append(f"| {times}{call} | {cycles:.0f} | {cycles / CLOCK * 1e6:.1f} | {limit} |")
    return "\n".join([*steps, *lines]) + "\n"


def page(text: str, record: Sequence[Row]) -> str:
    """Return the page with its table made anew."""
    if MARKED.search(text) is None:
        raise ValueError(f"{PAGE.name} has no table between <!-- cycles --> and <!-- /cycles -->")
    return MARKED.sub(lambda _: table(record), text)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    parser = argparse.ArgumentParser(prog="ci/kernel_cycles.py", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--write", action="store_true", help="write the table of kernels/README.md")
    options = parser.parse_args(arguments)
    record = json.loads(RECORD.read_text(encoding="utf-8"))
    if options.write:
        PAGE.write_text(page(PAGE.read_text(encoding="utf-8"), record), encoding="utf-8")
    print(table(record), end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())
