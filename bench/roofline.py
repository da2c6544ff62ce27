"""Compare each call of the step program with the limits of the hardware: ``python -m bench roofline``.

The program gives the floating-point operations and bytes of each call. Divided by two ceilings, measured in the same
run, these give two times; the longer one is the call's floor (Williams, Waterman and Patterson, "Roofline", 2009). The
table lists the floor and the time of the call in its place in the step.

The floor counts matrix products, and each value once in each direction. It leaves out exponentials, square roots and
recomputation. The ceiling for bytes is the faster of a large copy and a copy of the step's size.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from bench.cases import Case, make_data
from bench.measure import spread
from bench.report import Record
from bench.study import COLOURS, count, duration, figure, finish, network, parse, parser, say, table
from bench.timing import ROUNDS, Ceilings, clock_of, kind_of, measure_ceilings
from bench.vendor import Vendor
from fusemlp.program.program import scaled

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from fusemlp import Engine
    from fusemlp.runtime.programs import BoundProgram

NETWORKS = {
    "cpu": ("64-32-10@32", "784-128-10@128", "784-512-256-10@128", "1024-1024-1024-1024@512"),
    "gpu": ("784-128-10@128", "784-512-256-10@128", "1024-1024-1024-1024-1024@4096", "4096-4096-4096-4096-4096@8192"),
}
MEASURED = "measured: median, 20th to 80th percentile; then floor / measured"
FLOOR = "floor: products over the first ceiling, or bytes over the second"
# Runs in one graph, between two events.
RUNS_A_GRAPH = 20


@dataclass(frozen=True)
class CallPlace:
    """A call: its work, and its seconds, one figure a round."""

    label: str
    flops: int
    traffic: int
    seconds: tuple[float, ...]


def bound_step(engine: Engine, case: Case) -> BoundProgram:
    """Return the eager step of an engine, bound to the case's data and rows as in ``fit``."""
    from fusemlp.program.builder import Inputs
    from fusemlp.runtime.steps import TrainingStep, bind

    data = make_data(case)
    backend = engine.memory.backend
    given: dict[str, Any] = {"x": backend.from_host(data.X, "compute"), "target": backend.from_host(data.y)}
    given["rows"] = backend.allocate(case.rows, "int64")
    rule = engine.optimizer.rule()
    inputs, spec = Inputs(case.rows, indexed=True), engine.loss.spec(accuracy=True)
    bound = bind(engine, TrainingStep(inputs, spec, rule, case.batch_size), given)
    engine.rates.follow(engine.optimizer.schedule.over(None))
    bound.set_rows(data.order, 0, case.batch_size)
    return bound


def time_calls(bound: BoundProgram, rounds: int) -> tuple[list[CallPlace], list[float]]:
    """Time every call of a bound step, and the whole step; return seconds, one figure a round.

    On the host the calls run in program order, so the caches hold the same data as in ``fit``. On a GPU each call runs
    many times in one graph.
    """
    backend, program = bound.backend, bound.program
    clock = clock_of(backend)
    times = 1 if kind_of(backend) == "cpu" else RUNS_A_GRAPH
    separate = np.zeros((rounds, len(bound.calls)))
    together = []
    with np.errstate(all="ignore"):
        for round_ in range(rounds + 1):
            taken = [clock.seconds(call, times) for call in bound.calls]
            whole = clock.seconds(bound.run, times)
            # The first round warms up.
            if round_:
                separate[round_ - 1] = taken
                together.append(whole)
    places = [
        CallPlace(f"{call.op} {call.label}".strip(), call.flops, program.traffic(call), tuple(seconds.tolist()))
        for call, seconds in zip(program.calls, separate.T, strict=True)
    ]
    return places, together


def fit_seconds(case: Case, options: dict[str, Any], plan: str, rounds: int) -> list[float]:
    """Return the seconds of a step inside ``fit`` with a plan, one figure an epoch."""
    from fusemlp import MLP, Engine

    data = make_data(case)
    engine = Engine(MLP(case.sizes), batch_size=case.batch_size, plan=plan, **options)
    engine.fit(data.X, data.y, epochs=1)
    return [one / case.steps for one in engine.fit(data.X, data.y, epochs=max(2, rounds // 4)).seconds]


def study(case: Case, options: dict[str, Any], rounds: int, ceilings: Ceilings | None = None) -> list[Record]:
    """Return a line for each call, for their sum, and for the step in each plan."""
    from fusemlp import MLP, Engine

    engine = Engine(MLP(case.sizes), batch_size=case.batch_size, plan="eager", **options)
    backend = engine.memory.backend
    bound = bound_step(engine, case)
    program = bound.program
    if ceilings is None:
        touched = {name for call in program.calls for name in (*call.reads, *call.writes)}
        near = sum(program.bytes_of(name) for name in touched if name not in ("x", "target"))
        ceilings = measure_ceilings(Vendor(backend, engine.precision), near, rounds=min(ROUNDS, rounds))
    places, together = time_calls(bound, rounds)
    common = {
        "case": case.name,
        "backend": engine.backend,
        "precision": engine.precision,
        "optimizer": type(engine.optimizer).__name__,
        "clock": clock_of(backend).name,
        "interpreted": engine.backend == "triton" and engine.device == "cpu",
        "ceilings": {"flops": ceilings.flops, "bytes": ceilings.bytes, "near_bytes": ceilings.near_bytes},
    }
    lines = []
    for index, place in enumerate(places):
        by_flops, by_bytes = ceilings.floor(place.flops, place.traffic)
        lines.append(
            common
            | {"row": "call", "index": index, "label": place.label, "flops": place.flops, "bytes": place.traffic}
            | _timed(place.seconds, max(by_flops, by_bytes))
            | {"bound_by": "products" if by_flops >= by_bytes else "bytes"}
        )
    floor = sum(line["floor"] for line in lines)
    work = {"flops": sum(place.flops for place in places), "bytes": sum(place.traffic for place in places)}
    summed = np.sum([place.seconds for place in places], axis=0).tolist()
    lines.append(common | {"row": "sum", "label": "sum of the calls"} | work | _timed(summed, floor))
    how = "the whole step" if kind_of(backend) == "cpu" else f"the step, {RUNS_A_GRAPH} in a graph"
    lines.append(common | {"row": "step", "label": how} | work | _timed(together, floor))
    # Many steps, so that the fixed cost of an epoch is small; the interpreter's figures mean nothing anyway.
    steps = 2 if common["interpreted"] else max(2, min(200, int(2e9 / case.flops)))
    longer = Case(case.sizes, case.batch_size, steps=steps, epochs=1)
    for plan in backend.traits.plans:
        seconds = fit_seconds(longer, options, plan, rounds)
        lines.append(
            common | {"row": "fit", "label": f"a step inside fit, plan {plan}"} | work | _timed(seconds, floor)
        )
    return lines


def _timed(seconds: Sequence[float], floor: float) -> Record:
    found = spread(seconds)
    return {
        "seconds": {"p20": found.p20, "p50": found.p50, "p80": found.p80},
        "rounds": len(seconds),
        "floor": floor,
        "share": floor / found.p50,
    }


def text(lines: Sequence[Record]) -> str:
    """Return a table for each network."""
    parts = []
    for case in dict.fromkeys(line["case"] for line in lines):
        own = [line for line in lines if line["case"] == case]
        first, most = own[0], own[0]["ceilings"]
        rows = [
            [
                f"**{line['label']}**" if line["row"] != "call" else f"{line['index']} {line['label']}",
                scaled(line["flops"]),
                scaled(line["bytes"]) + "B",
                duration(line["floor"]),
                f"{duration(line['seconds']['p50'])} ({duration(line['seconds']['p20'])} to "
                f"{duration(line['seconds']['p80'])})",
                f"{line['share']:.0%}",
            ]
            for line in own
        ]
        parts.append(
            f"### {case}, {first['backend']}, {first['precision']}, {first['optimizer']}\n\n"
            + table(("call", "flops", "bytes", "floor", "measured (p20 to p80)", "floor / measured"), rows)
            + f"\n\nCeilings of this run: {most['flops'] / 1e9:,.0f} GFLOP/s by a large product, "
            f"{most['bytes'] / 1e9:,.1f} GB/s by a large copy, {most['near_bytes'] / 1e9:,.1f} GB/s by a copy of the "
            f"step's size. Time by the {first['clock']}, {first['rounds']} rounds."
            + (" Triton's interpreter: these times say nothing of a card." if first["interpreted"] else "")
        )
    return "\n\n".join(parts)


def finding(lines: Sequence[Record]) -> str:
    """Return the finding for one network, in a sentence."""
    own = [line for line in lines if line["row"] == "call"]
    best = min((line for line in lines if line["row"] in ("step", "fit")), key=lambda line: line["seconds"]["p50"])
    worst = max(own, key=lambda line: line["seconds"]["p50"] - line["floor"])
    lost = worst["seconds"]["p50"] - worst["floor"]
    return (
        f"{own[0]['case']}: the floor is {best['share']:.0%} of the fastest step;\n"
        f"the largest loss of a call is in {worst['label']} ({duration(max(lost, 0.0))})"
    )


def draw(lines: Sequence[Record]) -> Figure:
    """Draw each network's calls as bars with their floors, and all calls under the roofline."""
    cases = list(dict.fromkeys(line["case"] for line in lines))
    made, axes = figure(13.0, 4.6 * len(cases), columns=2, rows=len(cases))
    for place, case in enumerate(cases):
        own = [line for line in lines if line["case"] == case]
        _bars(axes[2 * place], own)
        _roof(axes[2 * place + 1], [line for line in own if line["row"] == "call"])
    made.legend(*axes[0].get_legend_handles_labels(), loc="outside upper left", ncols=2, fontsize=9, frameon=False)
    return made


def _bars(axes: Any, lines: Sequence[Record]) -> None:
    names = [f"{line['index']}  {line['label']}" if line["row"] == "call" else line["label"] for line in lines]
    places = np.arange(len(lines))
    scale, unit = (
        (1e3, "milliseconds") if max(line["seconds"]["p50"] for line in lines) > 5e-3 else (1e6, "microseconds")
    )
    measured = np.array([line["seconds"]["p50"] for line in lines]) * scale
    floors = np.array([line["floor"] for line in lines]) * scale
    ends = [(scale * line["seconds"]["p20"], scale * line["seconds"]["p80"]) for line in lines]
    colours = ["#9CC9E5" if line["row"] == "call" else "#C9C9C9" for line in lines]
    axes.barh(places, measured, color=colours, height=0.72, label=MEASURED)
    axes.barh(places, floors, color=COLOURS[1], height=0.34, label=FLOOR)
    axes.hlines(places, *zip(*ends, strict=True), color="#333333", linewidth=1.0)
    room = max(measured.max(), max(end for _, end in ends))
    for place, line, (_, end) in zip(places, lines, ends, strict=True):
        axes.text(end + 0.012 * room, place, f"{line['share']:.0%}", va="center", fontsize=8)
    axes.set_yticks(places, names, fontsize=8.5)
    axes.invert_yaxis()
    axes.set_xlim(0, 1.12 * room)
    axes.grid(False, axis="y")
    axes.set_xlabel(f"time, {unit}")
    axes.set_title(finding(lines), fontsize=10, loc="left")


def _roof(axes: Any, lines: Sequence[Record]) -> None:
    most = lines[0]["ceilings"]
    memory = max(most["bytes"], most["near_bytes"])
    shown = [line for line in lines if line["flops"]]
    intensity = np.array([line["flops"] / line["bytes"] for line in shown])
    rates = np.array([line["flops"] / line["seconds"]["p50"] for line in shown]) / 1e9
    ridge = most["flops"] / memory
    axes.set_ylim(0.5 * rates.min(), 2 * most["flops"] / 1e9)
    x = np.geomspace(min([*intensity, ridge]) / 3, max([*intensity, ridge]) * 3, 100)
    axes.loglog(x, np.minimum(most["flops"], memory * x) / 1e9, color="#333333", linewidth=1.6)
    for number, (line, i, rate) in enumerate(zip(shown, intensity, rates, strict=True)):
        colour = COLOURS[number % len(COLOURS)]
        axes.loglog([i], [rate], "o", color=colour, markersize=8, label=f"{line['index']}  {line['label']}")
        axes.vlines(i, rate, min(most["flops"], memory * i) / 1e9, color=colour, linewidth=1.0, linestyle=":")
    axes.annotate(f"{most['flops'] / 1e9:,.0f} GFLOP/s, large product", (x[-1], most["flops"] / 1e9), fontsize=8,
                  ha="right", va="bottom", xytext=(0, 3), textcoords="offset points")  # fmt: skip
    axes.annotate(f"{memory / 1e9:,.0f} GB/s, copy", (x[0], memory * x[0] / 1e9), fontsize=8,
                  va="top", xytext=(14, -2), textcoords="offset points")  # fmt: skip
    axes.set_xlabel("arithmetic intensity, floating-point operations a byte")
    axes.set_ylabel("GFLOP/s")
    axes.set_title("The calls with products under the roofline of this run", fontsize=10, loc="left")
    axes.legend(fontsize=8, loc="best", frameon=True, framealpha=0.9)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the study and return its exit code."""
    made = parser("roofline", (__doc__ or "").partition("\n")[0])
    made.add_argument("networks", type=network, nargs="*", help="such as 784-128-10@128 (default: four sizes)")
    made.add_argument("--backend", default="auto", help="default: the first that works here")
    made.add_argument("--precision", default="fp32")
    made.add_argument("--optimizer", choices=("sgd", "adam"), default="sgd")
    made.add_argument("--rounds", type=count, default=100, metavar="N", help="default: %(default)s")
    options = parse(made, arguments)
    from fusemlp import MLP, SGD, Adam, Engine

    rule = SGD(0.01) if options.optimizer == "sgd" else Adam(1e-3)
    chosen = {"optimizer": rule, "backend": options.backend, "precision": options.precision}
    kind = kind_of(Engine(MLP([2, 2]), batch_size=1, **chosen).memory.backend)
    lines: list[Record] = []
    for case in options.networks or [network(name) for name in NETWORKS[kind]]:
        say(f"{case.name}: the calls of the step, {options.rounds} rounds")
        lines += study(case, chosen, options.rounds)
    finish("roofline", options, lines, text(lines), draw)
    return 0


if __name__ == "__main__":
    sys.exit(main())
