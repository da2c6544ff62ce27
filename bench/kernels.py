"""Each kernel beside the vendor's matrix product alone and beside the unfused sequence: ``python -m bench.kernels``.

Every op goes through the contract's ``bind``, so the same measurement serves every backend. Three contestants take
turns: the kernel; the vendor's product of its sizes alone, into memory that is there already; and the sequence of
library calls that computes the same (``bench.vendor``). Warm: each runs again and again on the same operands. Cold:
before each run something else fills the last cache. Rates stand beside the two ceilings measured in the same run.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from bench.measure import spread
from bench.report import Record
from bench.study import COLOURS, card, count, duration, figure, finish, parse, parser, say, table
from bench.timing import Ceilings, clock_of, flusher, kind_of, measure_ceilings
from bench.vendor import Run, Vendor, in_order
from fusemlp_kernels.contract import (
    COUNTERS,
    HYPER,
    LEARNING_RATE,
    ROW_COUNT,
    STATS,
    LossSpec,
    ScheduleSpec,
    Segment,
    TensorRule,
    UpdateRule,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# rows, inputs, outputs of a layer
SHAPES = {
    "cpu": ((32, 64, 32), (128, 784, 128), (512, 1024, 1024)),
    "gpu": ((128, 784, 128), (4096, 1024, 1024), (8192, 4096, 4096)),
}
CLASSES = 10
RATE = 1e-3
CONTESTANTS = ("kernel", "product alone", "unfused")
# Runs in one graph, or in a row on the host, whose mean is one figure.
RUNS_IN_A_ROW = {"cpu": 5, "gpu": 20}


@dataclass(frozen=True)
class Trial:
    """A kernel with what it is compared with; ``product`` is None where there is no matrix product in it.

    ``flops`` are those of the product; ``bytes`` are read and written at least, each value once in each direction.
    """

    op: str
    kernel: Run
    product: Run | None
    unfused: Run
    flops: int
    bytes: int


def trials(vendor: Vendor, m: int, k: int, n: int) -> list[Trial]:
    """Every op of the contract on a layer of k inputs and n outputs and a batch of m rows."""
    bind = vendor.backend.bind
    x, w, b = vendor.matrix(m, k), vendor.matrix(n, k, scale=(2 / k) ** 0.5), vendor.vector(n)
    y, dz, dx = vendor.matrix(m, n), vendor.matrix(m, n, seed=1, scale=1 / m), vendor.matrix(m, k)
    # what the layer below put out: half of it zeros, as behind relu
    below = vendor.matrix(m, k, seed=2)
    vendor.xp.clip(below, 0, None, out=below)
    real, item = 4 if b.itemsize == 4 else 8, x.itemsize
    counters = vendor.integers(np.zeros(COUNTERS))
    counters[ROW_COUNT] = m
    made = [
        Trial(
            "linear",
            bind("linear", x=x, w=w, b=b, y=y, activation="relu"),
            vendor.product(x, w.T, y),
            vendor.linear(x, w, b, y),
            2 * m * n * k,
            item * (m * k + n * k + m * n) + real * n,
        ),
        Trial(
            "grad_input",
            bind("grad_input", dz=dz, w=w, y=below, dz_prev=dx, activation="relu"),
            vendor.product(dz, w, dx),
            vendor.grad_input(dz, w, below, dx),
            2 * m * n * k,
            item * (m * n + n * k + 2 * m * k),
        ),
        *_losses(vendor, m, k, counters),
        *_updates(vendor, x, dz, k, n, counters),
    ]
    return made


def _losses(vendor: Vendor, m: int, k: int, counters: Any) -> list[Trial]:
    """The output layer: k inputs, ``CLASSES`` outputs, cross-entropy."""
    n, bind = CLASSES, vendor.backend.bind
    h, w, b = vendor.matrix(m, k), vendor.matrix(n, k, scale=(1 / k) ** 0.5), vendor.vector(n)
    z, dz, stats = vendor.matrix(m, n), vendor.matrix(m, n), vendor.backend.allocate(STATS, "float64")
    logits = vendor.matrix(m, n)
    labels = vendor.integers(np.random.default_rng(0).integers(0, n, m))
    item, real = h.itemsize, b.itemsize
    common = {"target": labels, "counters": counters, "stats": stats, "loss": LossSpec("cross_entropy", accuracy=True)}
    forward = vendor.product(h, w.T, z)

    def add_bias() -> None:
        vendor.xp.add(z, b, out=z)

    return [
        Trial(
            "linear_loss_grad",
            bind("linear_loss_grad", x=h, w=w, b=b, dz=dz, activation="identity", **common),
            forward,
            in_order(forward, add_bias, vendor.loss_grad(z, dz, labels)),
            2 * m * n * k,
            item * (m * k + n * k + m * n) + real * n + 8 * m,
        ),
        Trial(
            "loss_grad",
            bind("loss_grad", z=logits, dz=dz, activation="identity", **common),
            None,
            vendor.loss_grad(logits, dz, labels),
            0,
            2 * item * m * n + 8 * m,
        ),
    ]


def _updates(vendor: Vendor, x: Any, dz: Any, k: int, n: int, counters: Any) -> list[Trial]:
    """The gradients by the weights, alone and with the update; and the update alone, over a flat arena."""
    bind, m = vendor.backend.bind, len(x)
    size = n * k
    w, b, dw, db = (vendor.matrix(n, k, "real"), vendor.vector(n), vendor.matrix(n, k, "real"), vendor.vector(n))
    moments = tuple(vendor.matrix(n, k, "real", scale=0.0) for _ in range(2))
    small = tuple(vendor.vector(n, fill=0.0) for _ in range(2))
    hyper = vendor.backend.allocate(HYPER, "float64")
    hyper[:] = 1.0
    hyper[LEARNING_RATE] = RATE
    item, real = x.itemsize, w.itemsize
    flops, reads = 2 * m * n * k, item * (m * n + m * k)
    # the library's products come out in the type that they read
    their_dw, their_db = vendor.matrix(n, k), vendor.vector(n, "compute")
    product, gradients = vendor.product(dz.T, x, their_dw), vendor.grad_weight(dz, x, their_dw, their_db)
    sgd = UpdateRule("sgd", ScheduleSpec("constant", RATE))
    adam = UpdateRule("adam", ScheduleSpec("constant", RATE))
    layer = {"dz": dz, "x": x, "w": w, "b": b, "w_rule": TensorRule(), "b_rule": TensorRule()}
    clock = {"hyper": hyper, "counters": counters}
    found = [
        Trial(
            "grad_weight",
            bind(
                "grad_weight", layers=[{"dz": dz, "x": x, "dw": dw, "db": db}], slopes=(), rule=sgd, counters=counters
            ),
            product,
            gradients,
            flops,
            reads + real * (size + n),
        ),
        Trial(
            "grad_weight_update, SGD",
            bind("grad_weight_update", layers=[layer | {"w_state": (), "b_state": ()}], slopes=(), rule=sgd, **clock),
            product,
            in_order(gradients, vendor.sgd(w, their_dw, RATE), vendor.sgd(b, their_db, RATE)),
            flops,
            reads + 2 * real * (size + n),
        ),
        Trial(
            "grad_weight_update, Adam",
            bind(
                "grad_weight_update",
                layers=[layer | {"w_state": moments, "b_state": small}],
                slopes=(),
                rule=adam,
                **clock,
            ),
            product,
            in_order(gradients, vendor.adam(w, their_dw, *moments, RATE), vendor.adam(b, their_db, *small, RATE)),
            flops,
            reads + 6 * real * (size + n),
        ),
    ]
    params, grads = vendor.vector(size), vendor.vector(size, seed=1)
    states = tuple(vendor.vector(size, fill=0.0) for _ in range(2))
    segments = (Segment(0, size, TensorRule()),)
    found.append(
        Trial(
            "update, Adam",
            bind("update", params=params, grads=grads, states=states, segments=segments, rule=adam, **clock),
            None,
            vendor.adam(params, grads, *states, RATE),
            0,
            real * size * 7,
        )
    )
    return found


def measure(trial: Trial, vendor: Vendor, flush: Run, rounds: int) -> dict[str, dict[str, list[float]]]:
    """Seconds of each contestant, "warm" and "cold", one figure a round; they take turns within a round."""
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
                # the first round warms up
                if round_:
                    taken[name]["warm"].append(warm)
                    taken[name]["cold"].append(cold)
    return taken


def lines_of(trial: Trial, shape: tuple[int, int, int], taken: dict[str, Any], most: Ceilings) -> list[Record]:
    """A line for each contestant and cache."""
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
    """A table for each shape, and what the ceilings were."""
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
        f"{first['backend']} backend, {first['precision']}, against {first['library']}. The three columns on the right: "
        "how many times as long as the kernel, median and 20th to 80th percentile, round by round; for the product "
        "alone below 1 is what fusion adds to it. The output layer has "
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


def draw(lines: Sequence[Record]) -> Figure:
    """For each shape the ops, and how many times as long as the kernel the others take."""
    shapes = list(dict.fromkeys(tuple(line["shape"]) for line in lines))
    made, axes = figure(5.2 * len(shapes), 5.6, columns=len(shapes))
    for one, shape in zip(axes, shapes, strict=True):
        own = [line for line in lines if tuple(line["shape"]) == shape and line["contestant"] != "kernel"]
        ops = list(dict.fromkeys(line["op"] for line in own))
        styles = [("product alone", "warm"), ("unfused", "warm"), ("unfused", "cold")]
        for number, (contestant, cache) in enumerate(styles):
            found = [line for line in own if (line["contestant"], line["cache"]) == (contestant, cache)]
            places = [ops.index(line["op"]) + 0.24 * (number - 1) for line in found]
            middle = [line["ratio"]["p50"] for line in found]
            one.hlines(places, [line["ratio"]["p20"] for line in found], [line["ratio"]["p80"] for line in found],
                       color=COLOURS[number], linewidth=1.6)  # fmt: skip
            one.plot(middle, places, "osD"[number], color=COLOURS[number], label=f"{contestant}, {cache} cache")
        unfused = [line["ratio"]["p50"] for line in own if (line["contestant"], line["cache"]) == styles[1]]
        quicker = sum(ratio > 1 for ratio in unfused)
        one.axvline(1.0, color="#333333", linewidth=1.2)
        one.set_xscale("log")
        low, high = one.get_xlim()
        ticks = [tick for tick in (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50) if low <= tick <= high]
        one.set_xticks(ticks, [f"{tick:g}x" for tick in ticks])
        one.minorticks_off()
        one.set_yticks(range(len(ops)), ops if one is axes[0] else [])
        one.set_ylim(len(ops) - 0.5, -0.5)
        one.set_xlabel("time over the kernel's (right of the line the kernel is quicker)")
        m, k, n = shape
        one.set_title(
            f"{m} rows, {k} inputs, {n} outputs: {quicker} of {len(unfused)} kernels\nbeat the unfused sequence, "
            f"by {np.exp(np.mean(np.log(unfused))):.2g}x in the mean",
            fontsize=10,
            loc="left",
        )
    made.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False)
    where = f"{lines[0]['backend']} backend, {lines[0]['precision']}, against {lines[0]['library']}"
    made.suptitle(where + (": not a GPU measurement" if lines[0]["kind"] == "cpu" else ""), fontsize=11)
    return made


def study(vendor: Vendor, shapes: Sequence[tuple[int, int, int]], rounds: int, most: Ceilings) -> list[Record]:
    """The lines of all ops on all shapes."""
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
        before = card()
        found: list[Record] = []
        for trial in trials(vendor, *shape):
            say(f"{'x'.join(map(str, shape))}: {trial.op}")
            found += lines_of(trial, shape, measure(trial, vendor, flush, rounds), most)
        lines += [common | line | {"card_before": before, "card_after": card()} for line in found]
    return lines


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the study; returns the exit code."""
    made = parser("kernels", (__doc__ or "").partition("\n")[0])
    made.add_argument("--backend", default="auto", help="default: the first that works here")
    made.add_argument("--precision", default="fp32")
    made.add_argument("--rounds", type=count, default=30, metavar="N", help="default: %(default)s")
    options = parse(made, arguments)
    from fusemlp.execution import open_backend

    vendor = Vendor(open_backend(options.backend, None, options.precision), options.precision)
    kind = kind_of(vendor.backend)
    if kind == "cpu":
        say("no GPU is used: its kernels stay unmeasured; these are the ops of the host's backend")
    lines = study(vendor, SHAPES[kind], options.rounds, measure_ceilings(vendor, 1 << 20))
    finish("kernels", options, lines, text(lines), draw)
    return 0


if __name__ == "__main__":
    sys.exit(main())
