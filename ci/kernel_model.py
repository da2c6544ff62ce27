"""Expected times of a training step's launches on an H100, by a model: ``python ci/kernel_model.py 784 128 10``.

Nothing was measured. A program that has a multiprocessor alone takes the cycles of its warps with the waits for their
loads and products (``kernel_waits``). All programs of a launch go to the multiprocessors in their order, each to one
with room for it. Programs beside each other slow each other down where together they need more of a resource than there
is: issue slots, tensor cores, shared memory, the way to the L2 cache. A launch also takes no less than its bytes do,
ends with what its last program does alone, and begins some time after the launch before it.
"""

from __future__ import annotations

import argparse
import functools
import heapq
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain, cycle, islice, repeat
from pathlib import Path
from typing import Any

import kernel_variants
from gpu_items import FIGURES
from kernel_launches import GOAL_TARGET, Goal, Recorded, launches_of
from kernel_loops import LAST, ONCE
from kernel_programs import Programs, Row, Work, card_phases, over, resident_programs, work_of
from kernel_waits import CLOCK, MEETING, PROCESSORS, SUSTAINED

RECORD = Path(__file__).with_name("kernel_resources.json")
# The version of Triton in the newest torch that users have.
CARD_TRITON = "3.6.0"


@dataclass(frozen=True)
class Card:
    """The model's parameters; what a source does not give is a measurement of others on an H100 SXM5.

    ``clock`` in Hz. ``memory``: bytes a second of 3.35e12. ``launch``: seconds from one kernel of a graph to the next.
    ``grid_barrier``: seconds of a barrier of all programs. ``products``: operations a second of 16-bit products, as
    cuBLAS sustains them at 8192 x 8192 x 8192. ``synchronous``: the share of it that ``mma.sync`` reaches (Luo et al.,
    2024). ``shared``, ``cache``: bytes a cycle of a multiprocessor from shared memory and from the L2 cache.
    """

    processors: int = PROCESSORS
    clock: float = CLOCK
    memory: float = 3.0e12
    launch: float = 1.3e-6
    grid_barrier: float = MEETING / CLOCK
    products: float = SUSTAINED
    synchronous: float = 0.62
    shared: int = 128
    cache: int = 64
    schedulers: int = 4

    def rate(self, product: str, instruction: str) -> float:
        """Return the operations of a multiprocessor in a cycle."""
        if product == "ieee":
            return 256.0
        share = {"half": 1.0, "tf32": 1 / 2, "split": 1 / 6}[product]
        share *= self.synchronous if instruction == "HMMA" else 1.0
        return share * self.products / self.processors / self.clock


H100 = Card()


@dataclass(frozen=True)
class Demand:
    """The cycles of a program that has a multiprocessor alone, and those for which it needs each resource."""

    alone: float
    needs: Mapping[str, float]


@dataclass(frozen=True)
class Expected:
    """A launch: its kernel and tile, its programs, the rounds in which they run, what bounds it, the seconds from the
    end of the launch before to its own, and the version of Triton that compiled it."""

    call: str
    programs: int
    waves: int
    limit: str
    seconds: float
    triton: str


def _passes(waits: Mapping[str, Sequence[int]], loops: Mapping[str, Sequence[int]], trips: Mapping[str, int]) -> float:
    """Return the cycles of loops; a pass of an unrolled loop makes several trips."""
    return sum(over(times, (*loops[name][2:], 1)[0]) * waits[name][0] for name, times in trips.items() if times)


def demand(programs: Programs, launch: Recorded, row: Row, goal: Goal, card: Card = H100) -> Demand:
    """Return the cycles of one of the programs."""
    loops, waits, warps = row["loops"], row["waits"], launch.tile.warps
    trips = {name: times for name, times in programs.trips.items() if times and name != ONCE}
    around = next((waits[name][2] for name in trips if waits[name][2]), waits[ONCE][0])
    size = 2 if goal.precision in ("bf16", "fp16") else 4
    kind = "half" if size == 2 else launch.constants.get("PRODUCT", "ieee")
    passes = {name: over(times, (*loops[name][2:], 1)[0]) for name, times in trips.items()} | {ONCE: 1}
    # a tensor descriptor's copies pass no register
    block = size * (launch.tile.rows + launch.tile.columns) * launch.tile.depth
    copied = block * trips.get("described_product", 0)
    needs = {
        "issue": sum(count * loops[name][0] for name, count in passes.items()) * warps / card.schedulers,
        "product": programs.operations / card.rate(kind, row["tensor_core"]),
        "shared memory": (sum(count * waits[name][1] for name, count in passes.items()) + copied) / card.shared,
        "cache": (size * programs.elements + 4 * programs.reals) / card.cache,
    }
    return Demand(max(around + _passes(waits, loops, trips), *needs.values()), needs)


def schedule(groups: Sequence[tuple[int, Demand]], processors: int, places: int) -> float:
    """Return the cycles until the last program ends: ``groups`` of equal programs start in their order, each on the
    multiprocessor that is the first with one of its ``places`` free."""
    waiting = chain.from_iterable(repeat(each, count) for count, each in groups)
    # of each multiprocessor the programs with the share that is left of them, and when that was so
    running: list[list[list[Any]]] = [[] for _ in range(processors)]
    since = [0.0] * processors

    def slowness(at: int) -> float:
        names = {name for each, _ in running[at] for name in each.needs}
        return max([1.0, *(sum(each.needs[name] / each.alone for each, _ in running[at]) for name in names)])

    def until(at: int) -> float:
        return since[at] + slowness(at) * min(left * each.alone for each, left in running[at])

    for each, at in zip(islice(waiting, places * processors), cycle(range(processors)), strict=False):
        running[at].append([each, 1.0])
    ends = [(until(at), at) for at in range(processors) if running[at]]
    heapq.heapify(ends)
    now = 0.0
    while ends:
        now, at = heapq.heappop(ends)
        passed = (now - since[at]) / slowness(at)
        since[at] = now
        for program in running[at]:
            program[1] -= passed / program[0].alone
        running[at] = [program for program in running[at] if program[1] > 1e-9]
        while len(running[at]) < places and (each := next(waiting, None)) is not None:
            running[at].append([each, 1.0])
        if running[at]:
            heapq.heappush(ends, (until(at), at))
    return now


def expected(launch: Recorded, work: Work, row: Row, goal: Goal, card: Card = H100) -> Expected:
    """Return the expected time of a launch of a goal's step; ``row`` is the kernel's in the record."""
    places = resident_programs(row, launch.tile.warps)
    groups = [(each.count * goal.models, demand(each, launch, row, goal, card)) for each in work.programs]
    cycles = schedule(groups, card.processors, places)
    if LAST in row["waits"]:
        cycles += row["waits"][LAST][0] + _passes(row["waits"], row["loops"], work.ending)
    size = 2 if goal.precision in ("bf16", "fp16") else 4
    memory = (size * work.elements + 4 * work.reals) / card.memory
    count = sum(number for number, _ in groups)
    waves = over(count, card.processors * places)
    limits = {
        name: sum(number * each.needs[name] for number, each in groups) / card.processors for name in groups[0][1].needs
    }
    limits |= {"waits": waves * max(each.alone for _, each in groups), "memory": memory * card.clock}
    start = 0.0 if launch.name in ("resident", "chip") else card.launch
    seconds = start + max(cycles / card.clock, memory)
    limit = max(limits, key=lambda name: limits[name])
    return Expected(call_of(launch), count, waves, limit, seconds, row["triton"])


def expected_card(launch: Recorded, row: Row, card: Card = H100) -> Expected:
    """Return the expected time of a step of ``card_kernel``: of each phase its longest program, and meetings."""
    phases, keeping = card_phases(launch)
    meeting, after = card.grid_barrier * card.clock, len(launch.arguments["layers"].tolist())

    def cycles(trips: Mapping[str, int]) -> float:
        # the gradients of each further layer wait again
        again = trips.get("card_kernel 4", 1) - 1
        return _passes(row["waits"], row["loops"], trips) + again * meeting

    times = [max(map(cycles, phase)) for phase in phases]
    beside = max(sum(times[after:]) + (len(times) - after - 1) * meeting, _passes(row["waits"], row["loops"], keeping))
    seconds = (sum(times[:after]) + beside + (after + 1) * meeting) / card.clock
    return Expected(call_of(launch), launch.programs, len(phases), "waits", seconds, row["triton"])


def call_of(launch: Recorded) -> str:
    """Return the name of a launch, with its tile."""
    sides = (launch.tile.rows, launch.tile.columns, launch.tile.depth)
    return f"`{launch.name}` {'x'.join(str(side) for side in sides if side)}"


@functools.cache
def recorded(version: str = CARD_TRITON) -> dict[tuple[str, str], Row]:
    """Return the rows of the record for the goals' card, by kernel and variant."""
    rows = json.loads(RECORD.read_text(encoding="utf-8"))
    return {
        (row["kernel"], row["variant"]): row for row in rows if (row["triton"], row["arch"]) == (version, GOAL_TARGET)
    }


def step(goal: Goal, rows: Mapping[tuple[str, str], Row] | None = None, card: Card = H100) -> list[Expected]:
    """Return the launches of a goal's step with their expected times.

    ``rows``: those of the record, by default of ``CARD_TRITON``. The installed Triton compiles a kernel without a row,
    or with one of other code, which needs no GPU.
    """
    rows, found = recorded() if rows is None else rows, []
    for launch in launches_of(goal):
        variant = launch.variant(goal.precision)
        row = rows.get((variant.kernel, variant.name))
        if row is None or row["source"] != kernel_variants.source_hash(variant.kernel, GOAL_TARGET):
            row = kernel_variants.compile_variant(variant, GOAL_TARGET)
        on_card = launch.name == "card"
        found.append(
            expected_card(launch, row, card) if on_card else expected(launch, work_of(launch), row, goal, card)
        )
    return found


def table(launches: Sequence[Expected]) -> str:
    """Return a line for each launch, equal ones in one, and their sum."""
    lines = [f"{'launch':36}{'programs':>9}{'waves':>7}  {'limit':14}{'us expected':>12}  Triton"]
    for one in dict.fromkeys(launches):
        times = f"{launches.count(one)} x " if launches.count(one) > 1 else ""
        lines.append(
            f"{times + one.call:36}{one.programs:9}{one.waves:7}  {one.limit:14}{one.seconds * 1e6:12.2f}  {one.triton}"
        )
    return "\n".join([*lines, f"{'a step':66}{total(launches) * 1e6:12.2f}"])


def total(launches: Sequence[Expected]) -> float:
    """Return the seconds of a step."""
    return sum(one.seconds for one in launches)


def beside(files: Sequence[str]) -> dict[str, dict[str, list[float]]]:
    """Return for the networks in files of ``python -m bench roofline`` the expected and the measured microseconds of
    each call."""
    lines = [json.loads(line) for file in files for line in Path(file).read_text(encoding="utf-8").splitlines() if line]
    found: dict[str, dict[str, list[float]]] = {}
    for line in lines:
        if line["row"] == "call" and line["backend"] == "triton":
            widths, rows = line["case"].split(":")[0].split("@")
            sizes = tuple(map(int, widths.split("-")))
            goal = Goal(sizes, int(rows), 0, line["precision"], "eager", line["optimizer"].lower())
            times = (step(goal)[line["index"]].seconds, line["seconds"]["p50"])
            calls = found.setdefault(goal.name, {})
            calls[f"{line['index']} {line['label']}"] = [round(seconds * 1e6, 2) for seconds in times]
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    parser = argparse.ArgumentParser(prog="ci/kernel_model.py", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("sizes", nargs="*", type=int, help="the widths of the network, inputs first")
    parser.add_argument("--beside", nargs="+", metavar="FILE", help="set beside the times of bench roofline")
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--precision", default="fp32", choices=tuple(kernel_variants.ELEMENTS))
    parser.add_argument(
        "--plan",
        default="eager",
        choices=("eager", "narrow", "card", "chip", "resident"),
        help="eager stands for a graph too",
    )
    parser.add_argument("--optimizer", default="sgd", choices=kernel_variants.RULES)
    parser.add_argument("--models", type=int, default=1, help="models of a fleet, with --plan chip or resident")
    parser.add_argument("--clock", type=float, default=H100.clock / 1e9, help="GHz (default: %(default)s)")
    parser.add_argument("--triton", default=CARD_TRITON, help="the record's rows (default: %(default)s)")
    options = parser.parse_args(arguments)
    if options.beside:
        print(FIGURES + json.dumps({"expected by a model and measured, us": beside(options.beside)}))
        return 0
    if len(options.sizes) < 2 or min(options.sizes) < 1:
        parser.error(f"argument sizes: expected two widths or more, such as 784 128 10, got {options.sizes}")
    for name in ("batch_size", "models", "clock"):
        if not getattr(options, name) > 0:
            parser.error(f"argument --{name.replace('_', '-')}: expected more than 0, got {getattr(options, name)}")
    if options.models > 1 and options.plan not in ("chip", "resident"):
        parser.error("argument --models: several models train at once with --plan chip or resident; add one")
    rows = recorded(options.triton)
    if not rows:
        parser.error(f"argument --triton: {RECORD.name} has no rows of {options.triton}; give a version that it has")
    goal = Goal(
        tuple(options.sizes), options.batch_size, 0, options.precision, options.plan, options.optimizer, options.models
    )
    print("Expected by a model of an H100, not measured.")
    print(table(step(goal, rows, replace(H100, clock=options.clock * 1e9))))
    return 0


if __name__ == "__main__":
    sys.exit(main())
