"""The checks of ``ci/gpu`` that are neither tests nor benchmarks; each runs in a process of its own.

The last line of a check's output is "figures: " and a JSON object.
"""

from __future__ import annotations

import cProfile
import io
import json
import os
import pstats
import sys
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "kernels")]
REHEARSED = os.environ.get("FUSEMLP_REHEARSE") == "1"
FITTED = "12-9-4@8" if REHEARSED else "61-96-40-10@32"
PROFILED = "12-9-4@8" if REHEARSED else "784-512-256-10@128"
EPOCHS, STEPS = (1, 3) if REHEARSED else (2, 10)
MOST_LINES = 12


def rehearse_cupy() -> None:
    """Put the stand-in for CuPy into its place."""
    import cupy_standin

    from fusemlp_kernels import registry

    cupy_standin.load()
    registry._cupy_reason = lambda: None


def machine() -> dict[str, Any]:
    """Return the card, the versions and the backends that work."""
    from bench.study import circumstances
    from fusemlp_kernels import availability

    found = circumstances()
    return {**found, "backends": {name: reason or "works" for name, reason in availability().items()}}


def fit(backend: str, plan: str, precision: str) -> dict[str, Any]:
    """Train by a plan: compare 20 steps with the float64 oracle, and demand that a second training has the same bits.

    The graph plan must also have the bits of the eager plan.
    """
    from bench.peers.engine import EngineTrainer
    from bench.study import network
    from bench.verification import Judge, trajectories

    case = replace(
        network(FITTED), steps=1 if REHEARSED else 20, optimizer="adam", learning_rate=1e-3, precision=precision,
        device="cpu" if REHEARSED else "gpu",
    )  # fmt: skip
    judge, name = Judge(case), f"engine_{backend}_{plan}"
    began = time.perf_counter()
    trainer = EngineTrainer(case, judge.data, backend, plan)
    trainer.train(1)
    first_epoch = time.perf_counter() - began
    verdict = judge.verdict(name, *trajectories(name, case, judge.data, trainer))
    if not verdict.agrees:
        raise AssertionError(f"the oracle disagrees: {verdict.reason}")

    def bits(chosen: str) -> list[bytes]:
        fresh = EngineTrainer(case, judge.data, backend, chosen)
        fresh.train(1 if REHEARSED else 10)
        return [array.tobytes() for pair in fresh.parameters() for array in pair]

    expected = bits(plan)
    if bits(plan) != expected:
        raise AssertionError("a second training from the same state has other bits")
    if plan == "graph" and bits("eager") != expected:
        raise AssertionError("the eager plan has other bits than the graph plan")
    return {"worst_of_tolerance": round(verdict.worst, 3), "first_epoch_seconds": round(first_epoch, 2)}


def fuse() -> dict[str, Any]:
    """Train a torch module by ``fuse``: the losses must agree with those of eager PyTorch."""
    import torch

    import fusemlp.torch

    device = "cpu" if REHEARSED else "cuda"
    torch.manual_seed(0)
    module = torch.nn.Sequential(torch.nn.Linear(16, 24), torch.nn.ReLU(), torch.nn.Linear(24, 4)).to(device)
    twin = torch.nn.Sequential(torch.nn.Linear(16, 24), torch.nn.ReLU(), torch.nn.Linear(24, 4)).to(device)
    twin.load_state_dict(module.state_dict())
    loss_fn = torch.nn.CrossEntropyLoss()
    optimizer, eager = (torch.optim.Adam(one.parameters(), lr=1e-2) for one in (module, twin))
    step = fusemlp.torch.fuse(module, loss_fn, optimizer, backend="triton")
    worst = 0.0
    for _ in range(STEPS):
        x, y = torch.randn(32, 16, device=device), torch.randint(4, (32,), device=device)
        eager.zero_grad()
        expected = loss_fn(twin(x), y)
        expected.backward()
        eager.step()
        worst = max(worst, abs(float(step(x, y)) - float(expected.detach())))
    # Ten updates of Adam amplify roundings of 1e-7; a wrong gradient moves the loss by a learning rate.
    if not worst < 1e-3:
        raise AssertionError(f"the losses differ from eager PyTorch's by {worst}")
    return {"largest_difference_of_losses": worst}


def profile(backend: str, plan: str, folder: str) -> dict[str, Any]:
    """Trace epochs of ``fit``; return the share of time in which the device works, and its longest kernels.

    The trace goes into ``folder``; chrome://tracing and Perfetto show it. The functions of Python that take longest
    are printed.
    """
    import torch
    from torch.profiler import ProfilerActivity

    from bench.cases import make_data
    from bench.peers.engine import EngineTrainer
    from bench.study import network

    case = replace(network(PROFILED), steps=1 if REHEARSED else 100)
    trainer = EngineTrainer(case, make_data(case), backend, plan)
    trainer.train(1)
    activities = [ProfilerActivity.CPU, *([] if REHEARSED else [ProfilerActivity.CUDA])]
    with torch.profiler.profile(activities=activities) as traced:
        began = time.perf_counter()
        trainer.train(EPOCHS)
        seconds = time.perf_counter() - began
    traced.export_chrome_trace(str(Path(folder) / f"{backend}-{plan}.json.gz"))
    kernels: Counter[str] = Counter()
    spans = []
    for event in traced.events():
        if event.device_type != torch.autograd.DeviceType.CPU:
            kernels[event.name] += event.time_range.elapsed_us()
            spans.append((event.time_range.start, event.time_range.end))
    python = cProfile.Profile()
    python.runcall(trainer.train, EPOCHS)
    text = io.StringIO()
    pstats.Stats(python, stream=text).sort_stats("tottime").print_stats(MOST_LINES)
    print(text.getvalue())
    return {
        "case": PROFILED,
        "microseconds_a_step": round(1e6 * seconds / (EPOCHS * case.steps), 2),
        "device_busy": round(covered(spans) / (1e6 * seconds), 3),
        "kernels_microseconds_a_step": {
            name[:80]: round(took / (EPOCHS * case.steps), 2) for name, took in kernels.most_common(MOST_LINES)
        },
    }


def covered(spans: list[tuple[float, float]]) -> float:
    """Return the length of the union of intervals."""
    total, reached = 0.0, -np.inf
    for start, end in sorted(spans):
        total += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return total


CHECKS = {"machine": machine, "fit": fit, "fuse": fuse, "profile": profile}


if __name__ == "__main__":
    name, *arguments = sys.argv[1:]
    if REHEARSED and "cupy" in arguments:
        rehearse_cupy()
    elif REHEARSED:
        import quick_interpreter

        quick_interpreter.quicken()
    print(f"figures: {json.dumps(CHECKS[name](*arguments))}")
