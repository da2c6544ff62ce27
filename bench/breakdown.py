"""Time every call of a training step by itself.

The calls run in program order, as in ``fit``, so the caches hold the same data. The table also lists bare matrix
products of the same sizes; the difference is memory traffic, element-wise work and Python.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

import numpy as np
from scipy.linalg.blas import sgemm

from bench.cases import Case, Data
from bench.measure import spread
from bench.peers.engine import optimizer_of
from fusemlp import MLP, Engine
from fusemlp.program.lowering import Inputs
from fusemlp.program.program import resolve


@dataclass(frozen=True)
class CallTime:
    """A call of the step program; ``products`` is the time of its matrix products (M, N, K) alone, in microseconds."""

    label: str
    microseconds: float
    products: float
    shapes: tuple[tuple[int, int, int], ...]

    @property
    def gflops(self) -> float:
        """The rate in 1e9 floating-point operations a second."""
        return sum(2 * m * n * k for m, n, k in self.shapes) / (1e3 * self.microseconds)


@dataclass(frozen=True)
class Breakdown:
    """Times in microseconds: each call, all calls without a clock in between (``run``), a step in ``Engine.fit``."""

    case: Case
    calls: tuple[CallTime, ...]
    run: float
    fit: float


def measure_calls(case: Case, data: Data, steps: int) -> Breakdown:
    """Return medians over ``steps`` steps of each kind, in microseconds, without the time that the clock takes."""
    engine = Engine(
        MLP(case.sizes, activation=case.activation, dropout=case.dropout),
        optimizer=optimizer_of(case),
        batch_size=case.batch_size,
        backend="numpy",
        plan="eager",
    )
    rule = engine.optimizer.rule()
    bound = engine.bind(
        Inputs(case.rows, indexed=True),
        engine.loss.spec(accuracy=True),
        rule,
        case.batch_size,
        {"x": data.X, "target": data.y},
    )
    engine.rates.follow(engine.optimizer.schedule.over(None))
    bound.set_row_count(case.batch_size)
    program, find = bound.program, bound.arrays.__getitem__
    calls = [bound.backend.bind(call.op, **resolve(call.operands, find)) for call in program.calls]
    batches = data.order.reshape(case.steps, case.batch_size)
    separate = np.zeros((steps, len(calls)))
    together = np.zeros(steps)
    clock = time.perf_counter
    engine.fit(data.X, data.y, epochs=1)
    with np.errstate(all="ignore"):
        # Alternate timed calls and whole steps, and change the rows, so that neither finds its rows in the cache.
        for step in range(2 * steps):
            bound.arrays["rows"][:] = batches[step % case.steps]
            if step % 2:
                began = clock()
                bound.run()
                together[step // 2] = clock() - began
                continue
            for index, call in enumerate(calls):
                began = clock()
                call()
                separate[step // 2, index] = clock() - began
    tick = _clock_seconds()
    timed = tuple(
        CallTime(
            f"{call.op} {call.label}".strip(),
            1e6 * (spread(seconds).p50 - tick),
            sum(_product_microseconds(call.op, *shape, steps) for shape in call.products),
            tuple(call.products),
        )
        for call, seconds in zip(program.calls, separate.T, strict=True)
    )
    fit = spread(engine.fit(data.X, data.y, epochs=max(2, round(steps / case.steps))).seconds).p50 / case.steps
    return Breakdown(case, timed, 1e6 * (spread(together).p50 - tick), 1e6 * fit)


def _clock_seconds() -> float:
    """Return the time that one reading of the clock takes."""
    readings = [time.perf_counter() for _ in range(1001)]
    return spread(np.diff(readings)).p50


def _product_microseconds(op: str, m: int, n: int, k: int, steps: int) -> float:
    """Return a callable for the op's (m, k) by (k, n) product, in the op's layout, into preallocated memory.

    SciPy's BLAS, which the NumPy backend uses, is column-major. So it computes the transpose, b.T by a.T.
    """
    transpose_a, transpose_b = op.startswith("grad_weight"), op.startswith("linear")
    generator = np.random.default_rng(0)
    a = generator.standard_normal((k, m) if transpose_a else (m, k), dtype=np.float32)
    b = generator.standard_normal((n, k) if transpose_b else (k, n), dtype=np.float32)
    out = np.empty((m, n), np.float32)
    took = []
    for _ in range(steps):
        began = time.perf_counter()
        sgemm(1.0, b.T, a.T, 0.0, out.T, int(transpose_b), int(transpose_a), 1)
        took.append(time.perf_counter() - began)
    return 1e6 * spread(took).p50


def breakdown_text(result: Breakdown) -> str:
    """Return a Markdown table."""
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
        f"| all calls, timed together | | {result.run:.1f} | | | |",
        f"| a step inside fit | | {result.fit:.1f} | | | |",
    ]
    return "\n".join(lines)
