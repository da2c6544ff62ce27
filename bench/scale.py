"""Measure training by several processes beside torch's DistributedDataParallel: ``python -m bench scale``.

Strong scaling cuts one batch among the ranks; weak scaling gives each rank a batch of its own. torchrun starts all
worlds of ranks, one thread a rank, and they take turns, so a ratio compares two turns of the same round. Before they
are timed, the parameters after four steps must agree. A time is that of rank 0, without the comparison of data and
parameters that ``fit`` does at its begin and after each epoch.

The projection for cards is one on paper: the time of one collective by NCCL's own model of a ring, with published
latencies and bandwidths. fusemlp has not run its collectives on a GPU.
"""

from __future__ import annotations

import argparse
import sys
from collections import defaultdict
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, replace
from itertools import pairwise
from typing import Any

import numpy as np

from bench.cases import Case
from bench.hardware import machine
from bench.measure import spread
from bench.ranks import ALONE, BARE, DDP, FAST, ORDERED, World
from bench.report import Record
from bench.study import count, counts, duration, finish, network, parse, parser, say, table

# An epoch has this many batches.
BATCHES = 4
CASES = ("784-512-256-10@128", "784-512-256-10@1024", "1024-1024-1024-1024@512")
CONTENDERS = {ORDERED: 'reduce="ordered"', FAST: 'reduce="fast"', DDP: "torch DDP"}
# Of "ordered" over "fast": up to here it is the default.
LIMIT = 1.5
# Seconds of a ring (NVIDIA/nccl, src/graph/tuning.cc, ring, protocol Simple): the base, and each step within a machine
# and between machines. Bytes a second in one direction: NVLink 4 of an H100 SXM (900 GB/s in both, NVIDIA's data
# sheet), and one port of InfiniBand NDR (400 Gbit/s, NVIDIA's data sheet of ConnectX-7).
BASE = 8.4e-6
LINKS = {"NVLink 4": (3.4e-6, 450e9), "InfiniBand NDR": (14.0e-6, 50e9)}
# Operations a second of an H100 SXM in TF32, dense (NVIDIA's white paper on it); products in fp32 take three.
CARD_FLOPS = 494.7e12 / 3
CARDS = (2, 8)
REPEAT = "To repeat: `python -m bench scale`."
EXAMPLES = """\
examples:
  python -m bench scale                                    the ranks that the cores allow, in under five minutes
  python -m bench scale --ranks 1,2,4 --case 784-512-256-10@1024
                                                           more ranks than cores share them
"""


def measure(case: Case, worlds: Mapping[int, World], alone: World, rounds: int, seconds: float) -> list[Record]:
    """Return a line for each contender, number of ranks and batch of a case."""
    # a batch of the case for all ranks, and one for each
    runs = [(ranks, batch) for ranks in worlds for batch in sorted({case.batch_size, ranks * case.batch_size})]
    everyone = {(0, case.batch_size): (alone, [ALONE])}
    everyone |= {(ranks, batch): (worlds[ranks], [*CONTENDERS, BARE]) for ranks, batch in runs}
    epochs, found = {}, defaultdict[Any, list[tuple[float, float]]](list)
    for (ranks, batch), (world, names) in everyone.items():
        world.ask("load", replace(case, batch_size=batch), names)
        step, _ = world.ask("turn", batch, names[0], 1)
        epochs[ranks, batch] = max(1, round(seconds / (step * case.steps)))
    for number in range(rounds):
        for (ranks, batch), (world, names) in everyone.items():
            first = number % len(names)
            for name in names[first:] + names[:first]:
                found[ranks, batch, name].append(world.ask("turn", batch, name, epochs[ranks, batch]))
    for world in (*worlds.values(), alone):
        world.ask("clear")
    return lines_of(case, found)


def lines_of(case: Case, found: Mapping[tuple[int, int, str], Sequence[tuple[float, float]]]) -> list[Record]:
    """Return the lines of the turns' seconds a step, in all and in collectives; ratios are of turns of one round."""
    steps = {key: np.array(turns)[:, 0] for key, turns in found.items()}
    lines = []
    for (ranks, batch, name), turns in found.items():
        if name == BARE:
            continue
        apart = np.array(turns)[:, 1]
        if name == DDP:
            apart = steps[ranks, batch, name] - steps[ranks, batch, BARE]
        line: Record = {
            "case": case.name,
            "sizes": list(case.sizes),
            "batch": batch,
            "scaling": "weak" if batch > case.batch_size else "strong",
            "ranks": ranks,
            "contender": name,
            "rounds": len(turns),
            "seconds": asdict(spread(steps[ranks, batch, name])),
            "collectives": asdict(spread(apart)),
        }
        if name != ALONE and (1, case.batch_size, name) in steps:
            gain = steps[1, case.batch_size, name] / steps[ranks, batch, name]
            line["gain"] = asdict(spread(gain * (batch / case.batch_size)))
        if name == ORDERED:
            line["of_fast"] = asdict(spread(steps[ranks, batch, name] / steps[ranks, batch, FAST]))
        lines.append(line)
    return lines


def text(lines: Sequence[Record]) -> str:
    """Return the tables, the ratio of ordered to fast in words, and the projection."""
    how = (
        f"Medians of {lines[0]['rounds']} rounds; in parentheses the part in collectives, with the wait for slower "
        "ranks (for DDP its step less that of the bare module). Gains: rows a second over those of one rank, "
        'in the same order. A rank has one thread; "alone" is one process on all cores, without ranks.'
    )
    tables = [scaled(lines, "strong", "one batch for all"), scaled(lines, "weak", "a batch for each")]
    return "\n\n".join([*filter(None, tables), f"{how} {verdict(lines)} {REPEAT}", projection(lines)])


def scaled(lines: Sequence[Record], scaling: str, title: str) -> str:
    """Return the table of a kind of scaling; "" without lines."""
    rows: dict[tuple[str, int], dict[str, Record]] = {}
    for line in lines:
        if line["scaling"] == scaling:
            network = f"{'-'.join(map(str, line['sizes']))}@{line['batch']}"
            rows.setdefault((network, line["ranks"]), {})[line["contender"]] = line
    cells = []
    for (network, ranks), found in rows.items():
        if ALONE in found:
            cells.append([network, ALONE, duration(found[ALONE]["seconds"]["p50"]), *[""] * 4])
            continue
        times = [duration(found[name]["seconds"]["p50"]) for name in CONTENDERS]
        if ranks > 1:
            apart = [duration(max(0.0, found[name]["collectives"]["p50"])) for name in CONTENDERS]
            times = [f"{whole} ({part})" for whole, part in zip(times, apart, strict=True)]
        gains = ", ".join(f"{found[name]['gain']['p50']:.2f}" for name in CONTENDERS if "gain" in found[name])
        cells.append([network, str(ranks), *times, f"{found[ORDERED]['of_fast']['p50']:.2f}", gains])
    header = [f"a step, {title}", "ranks", *CONTENDERS.values(), "ordered / fast", "gains"]
    return table(header, cells) if cells else ""


def verdict(lines: Sequence[Record]) -> str:
    """Return where "ordered" takes more than LIMIT times the step of "fast"."""
    ratios = [line for line in lines if "of_fast" in line]
    least, most = (pick(line["of_fast"]["p50"] for line in ratios) for pick in (min, max))
    said = f'"ordered" takes {least:.2f} to {most:.2f} times the step of "fast"'
    above = [
        f"{'-'.join(map(str, line['sizes']))}@{line['batch']} on {line['ranks']} ({line['of_fast']['p50']:.2f})"
        for line in ratios
        if line["of_fast"]["p50"] > LIMIT
    ]
    return f"{said}, more than {LIMIT} for {', '.join(above)}." if above else f"{said}, nowhere more than {LIMIT}."


def projection(lines: Sequence[Record]) -> str:
    """Return a table of the collective of a step on cards, by the model of a ring."""
    rows = []
    for line in {line["case"]: line for line in lines if line["scaling"] == "strong"}.values():
        case = Case(tuple(line["sizes"]), line["batch"], steps=1)
        size = 4 * sum((i + 1) * o for i, o in pairwise(case.sizes))
        for cards in CARDS:
            times = [ring(size, cards, *LINKS[link])[name] for link in LINKS for name in (ORDERED, FAST)]
            cells = [case.name, f"{size / 1e6:.1f} MB", str(cards), duration(case.flops / CARD_FLOPS / cards)]
            rows.append([*cells, *map(duration, times)])
    heads = [f"{link}, {name}" for link in LINKS for name in (ORDERED, FAST)]
    (near, wire), (far, port) = LINKS.values()
    how = (
        "A projection on paper; fusemlp has not run its collectives on a GPU. "
        'A ring: one all-gather for "ordered", one '
        f'all-reduce for "fast", each {BASE * 1e6:.1f} us and {near * 1e6:.1f} us a step within a machine or '
        f"{far * 1e6:.0f} us between machines (NCCL's src/graph/tuning.cc, ring, Simple). Rates in one direction: "
        f"{wire / 1e9:.0f} GB/s (NVLink 4 of an H100 SXM) and {port / 1e9:.0f} GB/s (InfiniBand NDR, 400 Gbit/s), by "
        "NVIDIA's data sheets. Products: a card's part of the batch at a third of the dense TF32 peak of an H100 SXM, "
        "494.7 TFLOP/s, by NVIDIA's white paper."
    )
    return f"{table(['on cards, projected', 'gradients', 'cards', 'products', *heads], rows)}\n\n{how}"


def ring(size: int, ranks: int, latency: float, rate: float) -> dict[str, float]:
    """Return the seconds of a ring's all-gather and all-reduce of ``size`` bytes, by the name of the reduction."""
    others = ranks - 1
    gather = BASE + others * (latency + size / rate)
    return {ORDERED: gather, FAST: BASE + 2 * others * (latency + size / ranks / rate)}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the study and return its exit code."""
    made = parser("scale", (__doc__ or "").partition("\n")[0])
    made.epilog, made.formatter_class = EXAMPLES, argparse.RawDescriptionHelpFormatter
    cores = machine()["cores"]
    allowed = [ranks for ranks in (1, 2, 4, 8) if ranks <= cores]
    made.add_argument(
        "--ranks", type=counts, default=allowed, metavar="A,B", help="of 1, 2, 4, 8 (default: %(default)s)"
    )
    made.add_argument(
        "--case",
        nargs="+",
        type=network,
        default=[*map(network, CASES)],
        metavar="CASE",
        help=f"as widths@batch (default: {' '.join(CASES)})",
    )
    made.add_argument("--rounds", type=count, default=7, metavar="N", help="turns of each (default: %(default)s)")
    made.add_argument("--seconds", type=float, default=0.25, metavar="S", help="of a turn (default: %(default)s)")
    options = parse(made, arguments)
    if not set(options.ranks) <= {1, 2, 4, 8}:
        made.error(f"--ranks: expected some of 1, 2, 4 and 8, got {options.ranks}")
    if max(options.ranks) > cores:
        say(f"{max(options.ranks)} ranks share {cores} cores")
    lines: list[Record] = []
    try:
        with ExitStack() as stack:
            alone = World(1, None, stack)
            worlds = {ranks: World(ranks, 1, stack) for ranks in dict.fromkeys(options.ranks)}
            for case in options.case:
                case = replace(case, steps=BATCHES, learning_rate=0.01)
                say(f"{case.name}")
                lines += measure(case, worlds, alone, options.rounds, options.seconds)
    except RuntimeError as error:
        say(f"error: {error}")
        return 1
    finish("scale", options, lines, text(lines), None)
    return 0


if __name__ == "__main__":
    sys.exit(main())
