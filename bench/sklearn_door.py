"""Time a ``fit`` of scikit-learn's MLPs and of ``fusemlp.sklearn``'s on digits, in one process, in turn.

``python -m bench sklearn_door`` prints a table. Both start from the same random state, so they train the same model; a
difference of their scores is an error.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Sequence
from functools import partial
from types import ModuleType
from typing import Any

import sklearn.neural_network as theirs
from sklearn.datasets import load_digits
from sklearn.exceptions import ConvergenceWarning

import fusemlp.sklearn as ours
from bench.doors import finish, in_turn, line, parser
from bench.report import Record

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


def compare(name: str, kind: str, options: dict[str, Any], *, rounds: int) -> Record:
    """Return a row of the table."""
    X, y = load_digits(return_X_y=True)
    X, y = X / 16.0, y if kind == "MLPClassifier" else y.astype(float)

    def fit(module: ModuleType) -> Any:
        return getattr(module, kind)(random_state=0, **options).fit(X, y)

    seconds, models = in_turn([partial(fit, theirs), partial(fit, ours)], rounds)
    scores = [model.score(X, y) for model in models]
    if abs(scores[0] - scores[1]) > 0.01:
        raise RuntimeError(f"{name}: scores {scores[0]:.4f} and {scores[1]:.4f}: these are not the same model")
    return line(name, *seconds)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, write the lines, print the table."""
    options = parser("sklearn_door", (__doc__ or "").partition("\n")[0], 7).parse_args(arguments)
    warnings.simplefilter("ignore", ConvergenceWarning)
    lines = [compare(name, kind, given, rounds=options.rounds) for name, kind, given in CASES]
    headers = ["network, batch, solver", "scikit-learn", "fusemlp.sklearn"]
    finish("sklearn_door", ("sklearn",), lines, options.out, headers=headers)
    return 0


if __name__ == "__main__":
    sys.exit(main())
