"""Compare each kernel with the vendor's matrix product and the unfused sequence: ``python -m bench kernels``.

Every op goes through the contract's ``bind``, so the same measurement serves every backend. Three contestants take
turns: the kernel; the vendor's product of the same sizes, into preallocated memory; and the sequence of library calls
that computes the same result (``bench.vendor``). Warm runs repeat on the same operands. Before each cold run other data
fills the last cache. The table gives rates as shares of two ceilings, measured in the same run.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from bench.measure import spread
from bench.report import Record
from bench.study import clocks, count, duration, finish, parse, parser, say, table
from bench.timing import ROUNDS, Ceilings, clock_of, flusher, kind_of, measure_ceilings
from bench.trials import CLASSES, Trial, trials
from bench.vendor import Run, Vendor

# rows, inputs, outputs of a layer
SHAPES = {
    "cpu": ((32, 64, 32), (128, 784, 128), (512, 1024, 1024)),
    "gpu": ((128, 784, 128), (4096, 1024, 1024), (8192, 4096, 4096)),
}
# One figure is the mean of this many runs: in one graph, or in a row on the host.
RUNS_IN_A_ROW = {"cpu": 5, "gpu": 20}


def shape(text: str) -> tuple[int, int, int]:
    """Parse the shape of a layer, such as 128-784-128, for ``argparse``."""
    sides = [count(side) for side in text.split("-")]
    if len(sides) != 3:
        raise argparse.ArgumentTypeError(f"expected rows-inputs-outputs such as 128-784-128, got {text!r}")
    return sides[0], sides[1], sides[2]


def measure(trial: Trial, vendor: Vendor, flush: Run, rounds: int) -> dict[str, dict[str, list[float]]]:
    """Return the seconds of each contestant, "warm" and "cold", one figure a round, in turn within a round."""
    clock = clock_of(vendor.backend)
    times = RUNS_IN_A_ROW[kind_of(vendor.backend)]
    contestants = {"kernel": trial.kernel, "product alone": trial.product, "unfused": trial.unfused}
    runs = {name: run for name, run in contestants.items() if run is not None}
    taken: dict[str, dict[str, list[float]]] = {name: {"warm": [], "cold": []} for name in runs}
    names = list(runs)
    with np.errstate(all="ignore"):
        for round_ in range(rounds + 1):
            first = round_ % len(names)
            for name in names[first:] + names[:first]:
                run = runs[name]
                clock.seconds(run, times)
                warm = clock.seconds(run, times)
                flush()
                cold = clock.once(run)
                # The first round warms up.
                if round_:
                    taken[name]["warm"].append(warm)
                    taken[name]["cold"].append(cold)
    return taken


def lines_of(trial: Trial, shape: tuple[int, int, int], taken: dict[str, Any], most: Ceilings) -> list[Record]:
    """Return a line for each contestant, warm and cold."""
    lines = []
    for name, by_cache in taken.items():
        for cache, seconds in by_cache.items():
            found = spread(seconds)
            own = taken["kernel"][cache]
            ratio = spread([other / mine for other, mine in zip(seconds, own, strict=True)])
            lines.append(
                {
                    "op": trial.op,
                    "shape": list(shape),
                    "contestant": name,
                    "cache": cache,
                    "rounds": len(seconds),
                    "seconds": {"p20": found.p20, "p50": found.p50, "p80": found.p80},
                    "ratio": {"p20": ratio.p20, "p50": ratio.p50, "p80": ratio.p80},
                    "flops": trial.flops,
                    "bytes": trial.bytes,
                    "flops_per_second": trial.flops / found.p50,
                    "bytes_per_second": trial.bytes / found.p50,
                    "share_of_flops": trial.flops / found.p50 / most.flops,
                    "share_of_bytes": trial.bytes / found.p50 / most.bytes,
                }
            )
    return lines


def text(lines: Sequence[Record]) -> str:
    """Return a table for each shape, and the ceilings."""
    first = lines[0]
    most = first["ceilings"]
    parts = []
    for shape in dict.fromkeys(tuple(line["shape"]) for line in lines):
        own = [line for line in lines if tuple(line["shape"]) == shape]
        rows = []
        for op in dict.fromkeys(line["op"] for line in own):
            found = {(line["contestant"], line["cache"]): line for line in own if line["op"] == op}
            kernel = found["kernel", "warm"]
            rows.append(
                [
                    op,
                    f"{duration(kernel['seconds']['p50'])}, {duration(found['kernel', 'cold']['seconds']['p50'])}",
                    f"{kernel['flops_per_second'] / 1e9:,.1f} ({kernel['share_of_flops']:.0%})"
                    if kernel["flops"]
                    else "",
                    f"{kernel['bytes_per_second'] / 1e9:,.1f} ({kernel['share_of_bytes']:.0%})",
                    _ratio(found.get(("product alone", "warm"))),
                    _ratio(found["unfused", "warm"]),
                    _ratio(found["unfused", "cold"]),
                ]
            )
        header = (
            "op", "kernel, warm and cold", "GFLOP/s (of the product)", "GB/s (of the large copy)",
            "product alone", "unfused", "unfused, cold",
        )  # fmt: skip
        m, k, n = shape
        parts.append(f"### {m} rows, {k} inputs, {n} outputs\n\n{table(header, rows)}")
    ceilings = (
        f"{first['backend']} backend, {first['precision']}, against {first['library']}. The three columns on the "
        "right: time over the kernel's, median and 20th to 80th percentile, round by round; for the "
        "product alone, 1 minus the figure is the share that fusion adds. The output layer has "
        f"{CLASSES} classes. Ceilings of this run: {most['flops'] / 1e9:,.0f} GFLOP/s by a large product, "
        f"{most['bytes'] / 1e9:,.1f} GB/s by a large copy; a warm kernel may pass the latter out of a cache. Time by "
        f"the {first['clock']}, {first['rounds']} rounds."
    )
    if first["kind"] == "cpu":
        ceilings += " GPU kernels: not yet measured on a GPU."
    return "\n\n".join([*parts, ceilings])


def _ratio(line: Record | None) -> str:
    if line is None:
        return ""
    ratio = line["ratio"]
    return f"{ratio['p50']:.2f}x ({ratio['p20']:.2f} to {ratio['p80']:.2f})"


def study(vendor: Vendor, shapes: Sequence[tuple[int, int, int]], rounds: int, most: Ceilings) -> list[Record]:
    """Return the lines of all ops on all shapes."""
    backend, precision = vendor.backend, vendor.precision
    common = {
        "backend": backend.traits.name,
        "precision": precision,
        "library": {"numpy": "BLAS and NumPy", "torch": "torch", "cupy": "CuPy"}[vendor.library],
        "kind": kind_of(backend),
        "clock": clock_of(backend).name,
        "ceilings": {"flops": most.flops, "bytes": most.bytes},
    }
    flush: Callable[[], object] = flusher(vendor)
    lines: list[Record] = []
    for shape in shapes:
        before = clocks()
        found: list[Record] = []
        for trial in trials(vendor, *shape):
            say(f"{'x'.join(map(str, shape))}: {trial.op}")
            found += lines_of(trial, shape, measure(trial, vendor, flush, rounds), most)
        lines += [common | line | {"clocks_before": before, "clocks_after": clocks()} for line in found]
    return lines


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the study and return its exit code."""
    made = parser("kernels", (__doc__ or "").partition("\n")[0])
    made.add_argument("--backend", default="auto", help="default: the first that works here")
    made.add_argument("--precision", default="fp32")
    made.add_argument("--rounds", type=count, default=30, metavar="N", help="default: %(default)s")
    made.add_argument("--shape", type=shape, action="append", metavar="M-K-N", help="rows-inputs-outputs of a layer")
    options = parse(made, arguments)
    from fusemlp.runtime.plans import open_backend

    vendor = Vendor(open_backend(options.backend, None, options.precision), options.precision)
    kind = kind_of(vendor.backend)
    if kind == "cpu":
        say("no GPU is used: its kernels stay unmeasured; these are the ops of the host's backend")
    most = measure_ceilings(vendor, 1 << 20, rounds=min(ROUNDS, options.rounds))
    lines = study(vendor, options.shape or SHAPES[kind], options.rounds, most)
    finish("kernels", options, lines, text(lines))
    return 0


if __name__ == "__main__":
    sys.exit(main())
