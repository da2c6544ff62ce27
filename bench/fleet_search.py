"""A grid search, three ways: ``FleetSearchCV``, scikit-learn's ``GridSearchCV``, and JAX's ``vmap`` over ``scan``.

``python -m bench fleet_search`` prints a Markdown table. 48 candidates (12 learning rates, 4 penalties) on 5 folds of
digits make 240 networks of 64-32-10, batch 32, Adam, 20 epochs, in float32, each scored on its held-out rows.
Everything is warm: compiled code is cached and scikit-learn's processes run. The three take turns, and a ratio compares
turns of one round. Their mean scores must agree, because they train the same models. JAX compiles the whole search as
one program and leaves out each epoch's short last batch.
"""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise
from typing import Any

import numpy as np
from sklearn.datasets import load_digits
from sklearn.exceptions import ConvergenceWarning
from sklearn.model_selection import GridSearchCV, StratifiedKFold
from sklearn.neural_network import MLPClassifier as TheirClassifier

from bench.doors import circumstances_of, finish, in_turn, parser
from bench.measure import spread
from bench.peers import JAX as JAX_SETTINGS
from bench.report import Record
from fusemlp.sklearn import FleetSearchCV, MLPClassifier

Array = np.ndarray[Any, Any]

DOOR = "fleet_search"
SIZES, BATCH, EPOCHS, FOLDS, JOBS = (64, 32, 10), 32, 20, 5, 2
RATES = np.geomspace(1e-3, 3e-2, 12).tolist()
ALPHAS = [0.0, 1e-4, 1e-3, 1e-2]
OPTIONS: dict[str, Any] = {
    "hidden_layer_sizes": SIZES[1:-1],
    "batch_size": BATCH,
    "max_iter": EPOCHS,
    "n_iter_no_change": EPOCHS,
    "random_state": 0,
}
# The largest accepted difference of the mean scores; another shuffling moves them by less than half of this.
AGREEMENT = 0.01
OURS, THEIRS, JAX = "fusemlp, FleetSearchCV", f"scikit-learn, GridSearchCV, n_jobs={JOBS}", "JAX, vmap and scan"


def grid(rates: list[float], alphas: list[float]) -> dict[str, list[float]]:
    """Return the parameter grid for both searches."""
    return {"alpha": alphas, "learning_rate_init": rates}


def searched(kind: Any, estimator: Any, X: Array, y: Array, *, small: bool = False, **options: Any) -> Array:
    """Return the scores (candidates, folds) of a search; ``small`` runs a few candidates, to warm up."""
    space = grid(RATES[:2], ALPHAS[:1]) if small else grid(RATES, ALPHAS)
    search = kind(estimator, space, cv=StratifiedKFold(FOLDS), refit=False, **options).fit(X, y)
    return np.stack([search.cv_results_[f"split{fold}_test_score"] for fold in range(FOLDS)], axis=1)


def jax_search(X: Array, y: Array) -> Callable[[], Array]:
    """Return a function that runs the search as one compiled program and returns its scores (candidates, folds)."""
    os.environ.update(JAX_SETTINGS)
    import jax
    import jax.numpy as jnp

    splits = list(StratifiedKFold(FOLDS).split(X, y))
    # One program needs folds of equal length.
    train = np.stack([rows[: min(len(one) for one, _ in splits)] for rows, _ in splits])
    held_out = np.stack([rows[: min(len(one) for _, one in splits)] for _, rows in splits])
    steps = train.shape[1] // BATCH
    bounds = [np.sqrt(6.0 / (inputs + outputs)) for inputs, outputs in pairwise(SIZES)]

    def outputs_of(parameters: Any, x: Any) -> Any:
        (w0, b0), (w1, b1) = parameters
        return jax.nn.relu(x @ w0.T + b0) @ w1.T + b1

    def loss(parameters: Any, alpha: Any, x: Any, labels: Any) -> Any:
        logs = jax.nn.log_softmax(outputs_of(parameters, x))
        squares = sum((weight**2).sum() for weight, _ in parameters)
        return -jnp.take_along_axis(logs, labels[:, None], axis=1).mean() + 0.5 * alpha / BATCH * squares

    def step(rate: Any, alpha: Any, X: Any, y: Any, state: Any, rows: Any) -> Any:
        parameters, first, second, count = state
        gradients = jax.grad(loss)(parameters, alpha, X[rows], y[rows])
        count = count + 1.0
        first = jax.tree.map(lambda m, g: 0.9 * m + 0.1 * g, first, gradients)
        second = jax.tree.map(lambda v, g: 0.999 * v + 0.001 * g * g, second, gradients)
        size = rate * jnp.sqrt(1.0 - 0.999**count) / (1.0 - 0.9**count)
        parameters = jax.tree.map(lambda p, m, v: p - size * m / (jnp.sqrt(v) + 1e-8), parameters, first, second)
        return (parameters, first, second, count), None

    def model(key: Any, rate: Any, alpha: Any, rows: Any, tested: Any, X: Any, y: Any) -> Any:
        keys = jax.random.split(key, 5)
        parameters = []
        for layer, bound in enumerate(bounds):
            shapes = (SIZES[layer + 1], SIZES[layer]), (SIZES[layer + 1],)
            drawn = zip(keys[2 * layer : 2 * layer + 2], shapes, strict=True)
            parameters.append(tuple(jax.random.uniform(k, shape, minval=-bound, maxval=bound) for k, shape in drawn))
        zeros = jax.tree.map(jnp.zeros_like, parameters)

        def epoch(state: Any, key: Any) -> Any:
            batches = jax.random.permutation(key, rows)[: steps * BATCH].reshape(steps, BATCH)
            return jax.lax.scan(partial(step, rate, alpha, X, y), state, batches)

        state, _ = jax.lax.scan(epoch, (parameters, zeros, zeros, 0.0), jax.random.split(keys[4], EPOCHS))
        return (outputs_of(state[0], X[tested]).argmax(axis=1) == y[tested]).mean()

    models = jax.jit(jax.vmap(model, in_axes=(0, 0, 0, 0, 0, None, None)))
    candidates = len(RATES) * len(ALPHAS)
    alphas, rates = (np.repeat(one.ravel(), FOLDS) for one in np.meshgrid(ALPHAS, RATES, indexing="ij"))
    arguments = (
        *(
            jax.random.split(jax.random.PRNGKey(0), candidates * FOLDS),
            rates.astype(np.float32),
            alphas.astype(np.float32),
        ),
        *(np.tile(train.astype(np.int32), (candidates, 1)), np.tile(held_out.astype(np.int32), (candidates, 1)), X, y),
    )
    arguments = tuple(jnp.asarray(one) for one in arguments)
    return lambda: np.asarray(models(*arguments)).reshape(candidates, FOLDS)


def compare(rounds: int) -> list[Record]:
    """Return a line for each of the three."""
    X, y = load_digits(return_X_y=True)
    X = (X / 16.0).astype(np.float32)
    ours = partial(searched, FleetSearchCV, MLPClassifier(**OPTIONS), X, y)
    theirs = partial(searched, GridSearchCV, TheirClassifier(**OPTIONS), X, y, n_jobs=JOBS)
    turns: dict[str, Callable[[], Array]] = {OURS: ours, THEIRS: theirs, JAX: jax_search(X, y)}
    ours(small=True), theirs(small=True), turns[JAX]()
    seconds, scores = in_turn([*turns.values()], rounds)
    means = {name: float(found.mean()) for name, found in zip(turns, scores, strict=True)}
    if max(means.values()) - min(means.values()) > AGREEMENT:
        raise RuntimeError(f"mean scores {means}: these are not the same models")
    return [
        {"search": name, "score": round(means[name], 6), "every_round": [round(one, 4) for one in taken]}
        for name, taken in zip(turns, seconds, strict=True)
    ]


def table(lines: Sequence[Record]) -> str:
    """Return a Markdown table with a caption."""
    own = lines[0]["every_round"]
    rows = ["| search of 48 candidates on 5 folds | seconds | ratio | mean score |", "|---|---:|---:|---:|"]
    for line in lines:
        seconds = line["every_round"]
        ratio = spread([one / mine for one, mine in zip(seconds, own, strict=True)])
        times = "1" if line is lines[0] else f"**{ratio.p50:.1f}** ({ratio.p20:.1f} to {ratio.p80:.1f})"
        rows.append(f"| {line['search']} | {np.median(seconds):.2f} | {times} | {line['score']:.4f} |")
    rows.append(
        f"\n240 networks of 64-32-10, batch {BATCH}, Adam, {EPOCHS} epochs, float32, on digits, all warm, in turn: "
        f"medians of {len(own)} rounds, and {circumstances_of(lines[0])}"
    )
    return "\n".join(rows)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    options = parser(DOOR, (__doc__ or "").partition("\n")[0], 5).parse_args(arguments)
    warnings.simplefilter("ignore", ConvergenceWarning)
    # scikit-learn's worker processes inherit this.
    os.environ["PYTHONWARNINGS"] = "ignore"
    finish(DOOR, ("sklearn", "jax"), compare(options.rounds), options.out, table)
    return 0


if __name__ == "__main__":
    sys.exit(main())
