"""Searches in common launches that end early, and models that are trained while others wait: no thread is left."""

from __future__ import annotations

import signal
import threading
import time
import weakref
from collections.abc import Iterator

import fusemlp.sklearn.gathering as module
import numpy as np
import pytest
import scipy.sparse
from devices import INTERPRETER, STAND_IN, UNCOMPILED, Device, marks_of, usable
from fusemlp.sklearn.gathering import Gathering, Seat
from sklearn.model_selection import KFold

from fusemlp import Callback
from fusemlp.sklearn import FleetRandomizedSearchCV, FleetSearchCV, MLPClassifier
from fusemlp.sklearn.batches import CalledBatches
from fusemlp.sklearn.search import _at_once

pytestmark = pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")
random = np.random.default_rng(0)
X, Y = random.standard_normal((45, 4)).astype(np.float32), random.integers(0, 3, 45)


@pytest.fixture(params=[pytest.param(one, id=one.name, marks=marks_of(one)) for one in (UNCOMPILED, STAND_IN)])
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    with usable(request.param):
        yield request.param.backend


@pytest.fixture(autouse=True)
def no_thread_is_left() -> Iterator[None]:
    before = set(threading.enumerate())
    yield
    for thread in set(threading.enumerate()) - before:
        thread.join(timeout=30)
        assert not thread.is_alive(), thread


def search(backend: str, **options: object) -> FleetSearchCV:
    model = MLPClassifier(4, batch_size=16, max_iter=2, random_state=0, backend=backend)
    return FleetSearchCV(model.set_params(**options), {"alpha": [0.0, 0.1]}, cv=3, n_jobs=6, error_score="raise")


@pytest.mark.parametrize("launch", [1, 3])
def test_ctrl_c_in_a_launch(backend: str, launch: int, monkeypatch: pytest.MonkeyPatch) -> None:
    bind, launches = module.bind_fleet, []

    def pressing(*given):
        run = bind(*given)

        def pressed(steps):
            launches.append(steps)
            if len(launches) == launch:
                signal.raise_signal(signal.SIGINT)
            run(steps)

        return pressed

    monkeypatch.setattr(module, "bind_fleet", pressing)
    monkeypatch.setattr(module, "fleet_chunk", lambda *_: 4)
    with pytest.raises(KeyboardInterrupt):
        search(backend, max_iter=10**7, n_iter_no_change=10**7).fit(X, Y)


def test_who_gives_up_does_not_wait_for_a_turn() -> None:
    """A second Ctrl-C would come in that time, and those that wait would never hear of it."""
    gathering, ended = Gathering(), []

    def work() -> None:
        try:
            with gathering.task():
                gathering.join(object.__new__(Seat))
        except RuntimeError as error:
            ended.append(str(error))

    threads = [threading.Thread(target=work) for _ in range(3)]
    gathering.threads = 4
    for thread in threads:
        gathering.hand_out()
        thread.start()
    gathering.hand_out()
    while len(gathering._ready) < 3:
        time.sleep(0.001)
    with gathering._turn:
        began = time.perf_counter()
        gathering.give_up()
        assert time.perf_counter() - began < 10.0 and not ended
    for thread in threads:
        thread.join(timeout=30)
    assert ended == ["the search was given up before this model was trained"] * 3


@pytest.mark.parametrize(
    "device", [pytest.param(one, id=one.name, marks=marks_of(one)) for one in (UNCOMPILED, STAND_IN, INTERPRETER)]
)
def test_the_data_outlives_the_launches(device: Device, monkeypatch: pytest.MonkeyPatch) -> None:
    """A kernel that is told where they lie finds others there when their memory is given back."""
    bind, alive = module.bind_fleet, []

    def watched(group, programs, data, *others):
        run, arrays = bind(group, programs, data, *others), [weakref.ref(array) for array in data.values()]

        def launch(steps):
            alive.append(all(array() is not None for array in arrays))
            run(steps)

        return launch

    monkeypatch.setattr(module, "bind_fleet", watched)
    monkeypatch.setattr("fusemlp.sklearn.model.choose_plan", lambda *_, **__: ("resident", ""))
    with usable(device):
        search(device.backend, max_iter=1).fit(X[:24], Y[:24])
    assert alive and all(alive)


def test_lbfgs_ends_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """In the tasks that are under way when one has raised an error that is to be raised."""
    given_up, evaluations, evaluate = threading.Event(), [], CalledBatches.loss_and_gradient

    def counted(batches):
        evaluations.append(batches)
        if len(evaluations) == 3:
            given_up.set()
        return evaluate(batches)

    monkeypatch.setattr(CalledBatches, "loss_and_gradient", counted)
    monkeypatch.setattr("fusemlp.sklearn.lbfgs.abandoned", given_up.is_set)
    with pytest.raises(RuntimeError, match="given up"):
        MLPClassifier(4, solver="lbfgs", random_state=0).fit(X, Y)
    assert len(evaluations) == 3


def test_how_many_tasks_there_is_memory_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sparse rows are dense in a launch, and a table has no ``nbytes``."""
    dense = np.zeros((100, 50))
    monkeypatch.setattr("fusemlp.sklearn.search.available_memory", lambda: 4 * 10 * dense.nbytes)
    for same in (dense, scipy.sparse.csr_matrix(dense), scipy.sparse.csr_array(dense)):
        assert _at_once(same) == 10
    assert _at_once(pytest.importorskip("pandas").DataFrame(dense)) == 10
    assert _at_once(dense.astype(np.float32)) == 20
    assert _at_once(np.zeros((10**4, 50))) == 2
    assert _at_once(dense[:1]) == _at_once([[0.0], [1.0, 2.0]]) == 256


def test_no_more_threads_than_tasks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fusemlp.sklearn.search.available_memory", lambda: None)
    grid = [{"alpha": [0.0, 0.1], "tol": np.array([0.1, 0.2, 0.3])}, {}, {"alpha": (1.0,)}]
    found = FleetSearchCV(MLPClassifier(), grid)
    assert found._at_once(X) == 8 * 5
    assert found.set_params(cv=2)._at_once(X) == 8 * 2
    # only the splitter knows
    assert found.set_params(cv=KFold(3))._at_once(X) == 256
    drawn = FleetRandomizedSearchCV(MLPClassifier(), {"alpha": [0.0, 0.1]}, n_iter=7, cv=3)
    assert drawn._at_once(X) == 21 and drawn.set_params(n_iter=1000)._at_once(X) == 256


class Probe(Callback):
    """Trains a model of its own after every epoch, and one that is in no loop."""

    def __init__(self, backend: str) -> None:
        self.backend, self.scores = backend, []

    def on_epoch_end(self, engine: object, epoch: int, logs: object) -> None:
        for solver in ("adam", "lbfgs"):
            model = MLPClassifier(3, batch_size=16, max_iter=2, solver=solver, random_state=0, backend=self.backend)
            self.scores.append(model.fit(X, Y).score(X, Y))


@pytest.mark.parametrize("solver", ["adam", "adam, a batch that does not count"])
def test_a_callback_trains_a_model(backend: str, solver: str) -> None:
    weight = None if solver == "adam" else np.repeat([0.0, 1.0], [9, 36])
    probe = Probe(backend)
    found = search(backend, callbacks=[probe]).fit(X, Y, sample_weight=weight)
    assert np.isfinite(found.cv_results_["mean_test_score"]).all()
    # the estimators of the candidates are clones, and so are their callbacks
    assert len(found.best_estimator_.callbacks[0].scores) == 4
