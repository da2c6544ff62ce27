"""Optuna over a fleet: ask for a batch of trials, train them side by side, tell the results."""

import warnings

import numpy as np
import pytest
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

from fusemlp import MLP, Fleet
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


def test_batches_of_trials_over_a_fleet(study):
    train, test, labels, expected = train_test_split(X, Y, random_state=0)
    space = {
        "lr": optuna.distributions.FloatDistribution(1e-4, 0.1, log=True),
        "hidden": optuna.distributions.CategoricalDistribution((8, 24)),
    }
    for _ in range(2):
        trials = [study.ask(space) for _ in range(6)]
        fleet = Fleet(MLP([64, 16, 10]), vary=[trial.params for trial in trials], backend="numpy")
        results = fleet.fit(train, labels, epochs=6)
        for trial, member in zip(trials, results.members, strict=True):
            # A diverged model has no score; the study gets a failed trial.
            failed = member.status == "diverged"
            state = optuna.trial.TrialState.FAIL if failed else optuna.trial.TrialState.COMPLETE
            score = None if failed else float((member.engine.predict(test) == expected).mean())
            study.tell(trial, score, state=state)
    assert len(study.get_trials()) == 12 and study.best_value > 0.8
