"""Searches that end early, and models that are trained inside of others: no thread is left."""

import itertools
import signal
import threading
import weakref

import numpy as np
import pytest
import scipy.sparse
from devices import INTERPRETER, marks_of, usable

from fusemlp import Callback
from fusemlp.fleet.launches import LaunchGroup
from fusemlp.runtime.programs import BoundProgram
from fusemlp.sklearn import FleetSearchCV, MLPClassifier
from fusemlp.sklearn.search import _at_once

pytestmark = pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")
random = np.random.default_rng(0)
X, Y = random.standard_normal((45, 4)).astype(np.float32), random.integers(0, 3, 45)
PLACES = [pytest.param(INTERPRETER, id=INTERPRETER.name, marks=marks_of(INTERPRETER))]


@pytest.fixture(autouse=True)
def no_thread_is_left():
    before = set(threading.enumerate())
    yield
    for thread in set(threading.enumerate()) - before:
        # Ctrl-C may come while a thread is started
        thread.join(timeout=30)
        assert not thread.is_alive(), thread


def search(backend, **options):
    model = MLPClassifier(4, batch_size=16, max_iter=2, random_state=0, backend=backend)
    return FleetSearchCV(model.set_params(**options), {"alpha": [0.0, 0.1]}, cv=3, n_jobs=6, error_score="raise")


@pytest.mark.parametrize("launch", [1, 3])
def test_ctrl_c_while_models_train(launch, monkeypatch):
    # launches run on several threads, and each takes a number of its own
    run, launches = BoundProgram.run_many, itertools.count(1)

    def pressed(bound, steps):
        if next(launches) == launch:
            signal.raise_signal(signal.SIGINT)
        run(bound, steps)

    monkeypatch.setattr(BoundProgram, "run_many", pressed)
    given = search("numpy", max_iter=10**7, n_iter_no_change=10**7)
    estimator = given.estimator
    with pytest.raises(KeyboardInterrupt):
        given.fit(X, Y)
    assert given.estimator is estimator and not hasattr(given, "cv_results_")


@pytest.mark.parametrize("device", PLACES)
def test_ctrl_c_in_a_launch_of_several_models(device, monkeypatch):
    bind = LaunchGroup.bind

    def pressing(*given):
        run = bind(*given)

        def pressed(steps):
            signal.raise_signal(signal.SIGINT)
            run(steps)

        return pressed

    monkeypatch.setattr(LaunchGroup, "bind", pressing)
    monkeypatch.setattr("fusemlp.fleet.launches.choose_plan", lambda *_, **__: ("resident", ""))
    with usable(device), pytest.raises(KeyboardInterrupt):
        search(device.backend).fit(X, Y)


@pytest.mark.parametrize("device", PLACES)
def test_the_data_outlives_the_launches(device, monkeypatch):
    """A kernel that is told where they lie finds others there when their memory is given back."""
    bind, alive = LaunchGroup.bind, []

    def watched(group, programs, data):
        run, arrays = bind(group, programs, data), [weakref.ref(array) for array in data.values()]

        def launch(steps):
            alive.append(all(array() is not None for array in arrays))
            run(steps)

        return launch

    monkeypatch.setattr(LaunchGroup, "bind", watched)
    monkeypatch.setattr("fusemlp.fleet.launches.choose_plan", lambda *_, **__: ("resident", ""))
    with usable(device):
        search(device.backend, max_iter=1).fit(X[:24], Y[:24])
    assert alive and all(alive)


def test_how_many_models_there_is_memory_for(monkeypatch):
    """Sparse rows are dense in a launch, and a table has no ``nbytes``."""
    dense = np.zeros((100, 50))
    monkeypatch.setattr("fusemlp.sklearn.search.available_memory", lambda: 4 * 10 * dense.nbytes)
    for same in (dense, scipy.sparse.csr_matrix(dense), scipy.sparse.csr_array(dense)):
        assert _at_once(same) == 10
    assert _at_once(pytest.importorskip("pandas").DataFrame(dense)) == 10
    assert _at_once(dense.astype(np.float32)) == 20
    assert _at_once(np.zeros((10**4, 50))) == 2
    assert _at_once(dense[:1]) == _at_once([[0.0], [1.0, 2.0]]) == 256


def test_a_fitted_search_holds_no_rows():
    rows = X.copy()
    found = search("numpy").fit(rows, Y)
    gone = weakref.ref(rows)
    del rows
    assert gone() is None and np.isfinite(found.best_score_)


class Probe(Callback):
    """Trains a model of its own after every epoch, and one that is in no loop."""

    def __init__(self, backend):
        self.backend, self.scores = backend, []

    def on_epoch_end(self, engine, epoch, logs):
        for solver in ("adam", "lbfgs"):
            model = MLPClassifier(3, batch_size=16, max_iter=2, solver=solver, random_state=0, backend=self.backend)
            self.scores.append(model.fit(X, Y).score(X, Y))


@pytest.mark.parametrize("weighted", [False, True], ids=["plain", "a batch that does not count"])
def test_a_callback_trains_a_model(weighted):
    weight = np.repeat([0.0, 1.0], [9, 36]) if weighted else None
    found = search("numpy", callbacks=[Probe("numpy")]).fit(X, Y, sample_weight=weight)
    assert np.isfinite(found.cv_results_["mean_test_score"]).all()
    # the estimators of the candidates are clones, and so are their callbacks
    assert len(found.best_estimator_.callbacks[0].scores) == 4
