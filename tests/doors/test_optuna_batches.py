"""Optuna over a fleet: ask for a batch of trials, train them side by side, tell the results."""

import warnings

import numpy as np
import pytest
from sklearn.datasets import load_digits

from fusemlp.sklearn import FleetSearchCV, MLPClassifier

with warnings.catch_warnings():
    # Optuna's imports may raise deprecation warnings.
    warnings.simplefilter("ignore")
    optuna = pytest.importorskip("optuna")

X, Y = load_digits(return_X_y=True)
X, Y = (X[:600] / 16.0).astype(np.float32), Y[:600]
SPACE = {
    "alpha": optuna.distributions.FloatDistribution(1e-6, 1.0, log=True),
    "learning_rate_init": optuna.distributions.FloatDistribution(1e-4, 0.1, log=True),
}


@pytest.fixture
def study():
    verbosity = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    yield optuna.create_study(direction="maximize", sampler=optuna.samplers.TPESampler(seed=0, n_startup_trials=8))
    optuna.logging.set_verbosity(verbosity)


@pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")
def test_batches_of_trials_over_a_search(study):
    model = MLPClassifier(16, max_iter=8, batch_size=32, random_state=0)
    for _ in range(3):
        trials = [study.ask(SPACE) for _ in range(8)]
        # One mapping a candidate: exactly the trials, not all combinations of their values.
        grid = [{name: [value] for name, value in trial.params.items()} for trial in trials]
        results = FleetSearchCV(model, grid, cv=3, refit=False).fit(X, Y).cv_results_
        for trial, score in zip(trials, results["mean_test_score"], strict=True):
            study.tell(trial, score)
    values = [trial.value for trial in study.get_trials()]
    assert len(values) == 24 and all(value is not None for value in values)
    assert study.best_value == max(values) > 0.85
    # The study learns: later trials are better than the random first ones.
    assert np.median(values[16:]) > np.median(values[:8])
