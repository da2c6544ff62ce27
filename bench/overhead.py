"""Measure the cost outside the kernels: Python, launches, memory and imports. ``python -m bench overhead``

Steps: fits of different lengths train a network with negligible arithmetic. A least-squares fit of ``call + epoch *
epochs + step * steps`` to their median times gives the cost of a call of ``fit``, of an epoch and of a step, for each
plan. A call of ``Engine.step`` and the construction of an engine are timed apart.

Memory: the bytes that a new engine adds, and the peak of a fit, by the allocator's count. The table also has the
engine's own account and the minimum: parameters, optimizer state, and the live values of a step.

Imports: each statement runs in fresh interpreters; the median is given, without the time of an empty interpreter.
"""

from __future__ import annotations

import importlib.util
import itertools
import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from bench.measure import spread
from bench.memory import memory
from bench.report import Record
from bench.study import ROOT, count, duration, finish, network, parse, parser, say, table

TINY = (2, 2, 2)
EPOCHS, STEPS_AN_EPOCH = (1, 4, 16, 64), (1, 8, 64)
MEMORY_CASES = ("64-32-10@32", "784-128-10@128", "784-512-256-10@128", "1024-1024-1024-1024@512")
IMPORT_GOAL = 0.150
IMPORTS = {
    "import fusemlp": "import fusemlp",
    "import numpy": "import numpy",
    "from fusemlp import MLP, Engine": "from fusemlp import MLP, Engine",
    "... and the first Engine": "from fusemlp import MLP, Engine; Engine(MLP([8, 8, 2]))",
    "... and its first fit": (
        "import numpy as np; from fusemlp import MLP, Engine; "
        "Engine(MLP([8, 8, 2])).fit(np.ones((64, 8), 'f'), np.arange(64) % 2, epochs=1)"
    ),
}
PEER_IMPORTS = {
    "torch": "import torch",
    "jax": "import jax",
    "sklearn": "from sklearn.neural_network import MLPClassifier",
}


def fit_costs(seconds: Mapping[tuple[int, int], float]) -> dict[str, float]:
    """Fit ``call + epoch * epochs + step * steps`` to times by (epochs, steps an epoch), and return the terms.

    The fit minimises relative errors, so the long fits do not dominate.
    """
    rows = np.array([[1.0, epochs, epochs * steps] for epochs, steps in seconds])
    taken = np.array(list(seconds.values()))
    found, *_ = np.linalg.lstsq(rows / taken[:, None], np.ones(len(taken)), rcond=None)
    return dict(zip(("call", "epoch", "step"), found.tolist(), strict=True))


def step_costs(plan: str, options: Mapping[str, Any], rounds: int) -> Record:
    """Return the cost of a fit, an epoch, a step, ``Engine.step`` and an engine, on a network with negligible work."""
    from fusemlp import MLP, Engine

    def made() -> Engine:
        return Engine(MLP(TINY), optimizer="sgd", batch_size=1, plan=plan, **options)

    engine = made()
    generator = np.random.default_rng(0)
    X = generator.standard_normal((max(STEPS_AN_EPOCH), TINY[0]), dtype=np.float32)
    y = np.arange(len(X)) % 2
    grid = list(itertools.product(EPOCHS, STEPS_AN_EPOCH))
    taken: dict[tuple[int, int], list[float]] = {place: [] for place in grid}
    engine.fit(X, y, epochs=2)
    for _ in range(rounds):
        for epochs, steps in grid:
            began = time.perf_counter()
            engine.fit(X[:steps], y[:steps], epochs=epochs)
            taken[epochs, steps].append(time.perf_counter() - began)
    costs = fit_costs({place: spread(seconds).p50 for place, seconds in taken.items()})
    calls, engines = [], []
    for index in range(20 * rounds):
        began = time.perf_counter()
        engine.step(X[index % 8 : index % 8 + 1], y[index % 8 : index % 8 + 1])
        calls.append(time.perf_counter() - began)
    engine.memory.backend.synchronize()
    for _ in range(rounds):
        began = time.perf_counter()
        made()
        engines.append(time.perf_counter() - began)
    bound = engine.program
    return {
        "row": "steps",
        "backend": engine.backend,
        "plan": plan,
        "launches": bound.launches,
        "costs": costs | {"Engine.step": spread(calls).p50, "Engine": spread(engines).p50},
        "rounds": rounds,
    }


def import_seconds(statements: Mapping[str, str], runs: int) -> dict[str, list[float]]:
    """Return the seconds of statements in fresh interpreters, in turn, less the median of an empty one."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    environment["PYTHONPATH"] = os.pathsep.join(str(ROOT / part) for part in ("engine", "kernels"))

    def one(statement: str) -> float:
        began = time.perf_counter()
        subprocess.run([sys.executable, "-c", statement], env=environment, check=True, capture_output=True)
        return time.perf_counter() - began

    taken: dict[str, list[float]] = {name: [] for name in ("", *statements)}
    for run in range(runs + 1):
        for name in taken:
            seconds = one(statements.get(name, "pass"))
            # The first run reads the files and writes the byte code.
            if run:
                taken[name].append(seconds)
    nothing = spread(taken.pop("")).p50
    return {name: [max(0.0, one - nothing) for one in seconds] for name, seconds in taken.items()}


def import_lines(runs: int) -> list[Record]:
    """Return a line for each statement, fusemlp's and the peers'."""
    peers = {text: text for name, text in PEER_IMPORTS.items() if importlib.util.find_spec(name) is not None}
    lines = []
    for name, seconds in import_seconds(IMPORTS | peers, runs).items():
        found = spread(seconds)
        lines.append(
            {
                "row": "import",
                "statement": name,
                "own": name not in peers and name != "import numpy",
                "seconds": {"p20": found.p20, "p50": found.p50, "p80": found.p80},
                "rounds": runs,
            }
        )
    return lines


def text(lines: Sequence[Record]) -> str:
    """Return the three tables."""
    steps = [
        [
            f"{line['backend']} {line['plan']}",
            *(duration(max(line["costs"][name], 0.0)) for name in COSTS),
            str(line["launches"]),
        ]
        for line in lines
        if line["row"] == "steps"
    ]
    held = [
        [
            f"{line['case']}, {line['optimizer']}, {line['backend']} {line['plan']}",
            *(f"{line['account'].get(name, 0) / 1e6:.3f}" for name in ("parameters", "gradients", "state")),
            f"{line['built'] / 1e6:.3f}",
            f"{line['peak'] / 1e6:.3f}",
            f"{sum(line['least'].values()) / 1e6:.3f}",
            f"{line['peak'] / sum(line['least'].values()):.2f}x",
        ]
        for line in lines
        if line["row"] == "memory"
    ]
    imports = [
        [f"`{line['statement']}`", duration(line["seconds"]["p50"]), duration(line["seconds"]["p20"]),
         duration(line["seconds"]["p80"])]
        for line in lines
        if line["row"] == "import"
    ]  # fmt: skip
    network = "-".join(map(str, TINY))
    parts = [
        f"### Outside the kernels: {network}, batch 1\n\n"
        + table(("plan", *COSTS.values(), "calls in the printed step"), steps)
        + "\n\nThe first three are the terms of a least-squares fit to the times of fits of different lengths.",
        "### Memory, MB\n\n"
        + table(
            (
                "network, optimizer, plan",
                "parameters",
                "gradients",
                "state",
                "engine made",
                "most during fit",
                "must be held",
                "ratio",
            ),
            held,
        )
        + "\n\nMust be held: parameters, optimizer state and the live values of a step. During "
        "`fit` there is also a copy of parameters and state, to go back to when an epoch diverges.",
        "### Imports\n\n"
        + table(("statement", "median", "p20", "p80"), imports)
        + f"\n\nIn a fresh interpreter, without the time of an empty one. {verdict(lines)}",
    ]
    return "\n\n".join(parts)


COSTS = {
    "call": "a call of fit",
    "epoch": "an epoch",
    "step": "a step",
    "Engine.step": "a call of Engine.step",
    "Engine": "making an Engine",
}


def verdict(lines: Sequence[Record]) -> str:
    """Say whether the import meets the goal."""
    line = next(line for line in lines if line["row"] == "import" and line["own"])
    taken = line["seconds"]["p50"]
    kept = "kept" if taken <= IMPORT_GOAL else "missed (python -X importtime names the modules)"
    return f"`{line['statement']}` takes {duration(taken)}; the goal is below {duration(IMPORT_GOAL)}: {kept}."


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the study and return its exit code."""
    made = parser("overhead", (__doc__ or "").partition("\n")[0])
    made.add_argument("--backend", default="auto", help="default: the first that works here")
    made.add_argument("--rounds", type=count, default=15, metavar="N", help="default: %(default)s")
    made.add_argument("--networks", type=network, nargs="+", help="whose memory is counted (default: four sizes)")
    options = parse(made, arguments)
    from fusemlp.runtime.plans import open_backend

    chosen = {"backend": options.backend}
    plans = open_backend(options.backend, None, "fp32").traits.plans
    lines: list[Record] = []
    for plan in plans:
        say(f"steps, plan {plan}")
        lines.append(step_costs(plan, chosen, options.rounds))
    for case in options.networks or [network(name) for name in MEMORY_CASES]:
        say(f"memory of {case.name}")
        lines += [memory(case, plan, chosen | {"optimizer": "adam"}) for plan in plans]
    say("imports in fresh interpreters")
    lines += import_lines(options.rounds)
    finish("overhead", options, lines, text(lines))
    return 0


if __name__ == "__main__":
    sys.exit(main())
