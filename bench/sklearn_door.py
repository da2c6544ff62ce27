"""scikit-learn's MLPs against those of ``fusemlp.sklearn``: the same ``fit`` on digits, in one process, in turn.

``python -m bench.sklearn_door`` prints a table. Both start from the same random state, so they train the same model:
the scores are compared before anything is said of the times.
"""

from __future__ import annotations

import argparse
import os
import time
import warnings
from typing import Any

import numpy as np
import sklearn.neural_network as theirs
from sklearn.datasets import load_digits
from sklearn.exceptions import ConvergenceWarning

import fusemlp.sklearn as ours
from bench.measure import PAUSE_SECONDS, spread

# name, class, options
CASES: tuple[tuple[str, str, dict[str, Any]], ...] = (
    ("64-100-10, batch 200, Adam (defaults)", "MLPClassifier", {"max_iter": 30}),
    ("64-32-10, batch 32, Adam", "MLPClassifier", {"max_iter": 30, "hidden_layer_sizes": 32, "batch_size": 32}),
    (
        "64-32-10, batch 32, SGD",
        "MLPClassifier",
        {"max_iter": 30, "hidden_layer_sizes": 32, "batch_size": 32, "solver": "sgd"},
    ),
    ("64-512-256-10, batch 200, Adam", "MLPClassifier", {"max_iter": 5, "hidden_layer_sizes": (512, 256)}),
    ("64-100-1, batch 200, Adam, regression", "MLPRegressor", {"max_iter": 30}),
    ("64-100-10, L-BFGS", "MLPClassifier", {"max_iter": 30, "solver": "lbfgs"}),
)


def compare(name: str, kind: str, options: dict[str, Any], *, rounds: int) -> str:
    """A row of the table."""
    X, y = load_digits(return_X_y=True)
    X, y = X / 16.0, y if kind == "MLPClassifier" else y.astype(float)
    modules, scores = (theirs, ours), [0.0, 0.0]
    seconds: tuple[list[float], list[float]] = ([], [])
    for number in range(rounds):
        for place in (0, 1) if number % 2 else (1, 0):
            time.sleep(PAUSE_SECONDS)
            model = getattr(modules[place], kind)(random_state=0, **options)
            start = time.perf_counter()
            model.fit(X, y)
            seconds[place].append(time.perf_counter() - start)
            scores[place] = model.score(X, y)
    if abs(scores[0] - scores[1]) > 0.01:
        raise RuntimeError(f"{name}: scores {scores[0]:.4f} and {scores[1]:.4f}: these are not the same model")
    ratio = spread([a / b for a, b in zip(*seconds, strict=True)])
    own = [float(np.median(one)) * 1e3 for one in seconds]
    return (
        f"| {name} | {own[0]:,.0f} ms | {own[1]:,.0f} ms | **{ratio.p50:.2f}** ({ratio.p20:.2f} to {ratio.p80:.2f}) |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.sklearn_door", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--rounds", type=int, default=7, metavar="N", help="how often each fits (default 7)")
    rounds = parser.parse_args().rounds
    if rounds < 1:
        parser.error(f"--rounds: expected at least 1, got {rounds}")
    warnings.simplefilter("ignore", ConvergenceWarning)
    print("| network, batch, solver | scikit-learn | fusemlp.sklearn | ratio |\n|---|---|---|---|")
    for name, kind, options in CASES:
        print(compare(name, kind, options, rounds=rounds), flush=True)
    threads = {name: os.environ.get(name) for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS")}
    print(
        f"\nA whole fit, in turn; medians of {rounds} rounds, the ratio's 20th to 80th percentile. Threads: {threads}"
    )


if __name__ == "__main__":
    main()
