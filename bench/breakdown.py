"""Where a training step of fusemlp spends its time: every call of the step program timed by itself.

The calls run in their order, as in ``fit``, so that each finds the caches as it would find them there. Beside each
stands the time of bare matrix products of the same sizes: what remains is memory traffic, element-wise work and
Python.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

import numpy as np

from bench.cases import Case, Data
from bench.measure import spread
from fusemlp import MLP, SGD, Engine
from fusemlp.lowering import Inputs
from fusemlp.program import resolve


@dataclass(frozen=True)
class CallTime:
    """A call of the step program: ``microseconds`` it takes, ``products`` its matrix products (M, N, K) alone take."""

    label: str
    microseconds: float
    products: float
    shapes: tuple[tuple[int, int, int], ...]

    @property
    def gflops(self) -> float:
        """Its rate in 1e9 floating-point operations a second."""
        return sum(2 * m * n * k for m, n, k in self.shapes) / (1e3 * self.microseconds)


@dataclass(frozen=True)
class Breakdown:
    """``calls``; ``run`` is all of them in one go; ``fit`` a step of ``Engine.fit``, setting up included."""

    case: Case
    calls: tuple[CallTime, ...]
    run: float
    fit: float


def measure_calls(case: Case, data: Data, steps: int) -> Breakdown:
    """Medians over ``steps`` steps, in microseconds; a clock's reading is subtracted."""
    engine = Engine(MLP(case.sizes), optimizer=SGD(case.learning_rate), batch_size=case.batch_size)
    rule = engine.optimizer.rule(total_updates=None)
    bound = engine.bind(
        Inputs(case.rows, indexed=True),
        engine.loss.spec(accuracy=True),
        rule,
        case.batch_size,
        {"x": data.X, "target": data.y},
    )
    engine.use_rule(rule)
    bound.set_row_count(case.batch_size)
    program, find = bound.program, bound.arrays.__getitem__
    calls = [bound.backend.bind(call.op, **resolve(call.operands, find)) for call in program.calls]
    batches = data.order.reshape(case.steps, case.batch_size)
    took = np.zeros((steps, len(calls) + 1))
    clock = time.perf_counter
    with np.errstate(all="ignore"):
        for step in range(steps + steps // 10 + 1):
            bound.arrays["rows"][:] = batches[step % case.steps]
            for index, call in enumerate(calls):
                began = clock()
                call()
                took[step % steps, index] = clock() - began
            bound.arrays["rows"][:] = batches[step % case.steps]
            began = clock()
            bound.run()
            took[step % steps, -1] = clock() - began
    *separate, run = 1e6 * (np.median(took, axis=0) - _clock_seconds())
    timed = tuple(
        CallTime(
            f"{call.op} {call.label}".strip(),
            float(microseconds),
            sum(_product_microseconds(*shape, steps) for shape in call.products),
            tuple(call.products),
        )
        for call, microseconds in zip(program.calls, separate, strict=True)
    )
    epochs = max(2, round(steps / case.steps))
    engine.fit(data.X, data.y, epochs=1)
    began = clock()
    engine.fit(data.X, data.y, epochs=epochs)
    return Breakdown(case, timed, float(run), 1e6 * (clock() - began) / (epochs * case.steps))


def _clock_seconds() -> float:
    clock = time.perf_counter
    return spread([-(clock() - clock()) for _ in range(1000)]).p50


def _product_microseconds(m: int, n: int, k: int, steps: int) -> float:
    """An (m, k) by (k, n) product into memory that is there already."""
    generator = np.random.default_rng(0)
    a = generator.standard_normal((m, k), dtype=np.float32)
    b = generator.standard_normal((n, k), dtype=np.float32).T
    out = np.empty((m, n), np.float32)
    took = []
    for _ in range(steps):
        began = time.perf_counter()
        np.matmul(a, b, out=out)
        took.append(time.perf_counter() - began)
    return 1e6 * spread(took).p50


def breakdown_text(result: Breakdown) -> str:
    """A table, in Markdown."""
    total = sum(call.microseconds for call in result.calls)
    lines = [
        f"### {result.case.name}",
        "",
        "| call | M x N x K | us | share | products alone, us | GFLOP/s |",
        "|---|---|---:|---:|---:|---:|",
    ]
    for call in result.calls:
        shapes = ", ".join("x".join(map(str, shape)) for shape in call.shapes)
        lines.append(
            f"| {call.label} | {shapes} | {call.microseconds:.1f} | {call.microseconds / total:.0%} "
            f"| {call.products:.1f} | {call.gflops:.0f} |"
        )
    products = sum(call.products for call in result.calls)
    gflops = result.case.flops / (1e3 * total)
    lines += [
        f"| all calls, timed one by one | | {total:.1f} | 100% | {products:.1f} | {gflops:.0f} |",
        f"| all calls in one go | | {result.run:.1f} | | | |",
        f"| a step of fit | | {result.fit:.1f} | | | |",
    ]
    return "\n".join(lines)
