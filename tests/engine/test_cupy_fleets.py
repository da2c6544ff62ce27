"""Fleets on the CuPy backend: the models of one shape share the launches of a step, and each makes the oracle's steps.

On a machine without a card the kernels run as C++ on the host, behind what stands in for CuPy.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from devices import CUPY_GPU, STAND_IN, Variant, marks_of, usable
from step_bounds import Step
from tolerance import assert_within

from fusemlp import MLP, SGD, Adam, Engine, Fleet, PReLU
from fusemlp_kernels.contract import LAST_LOSS, ROW_COUNT, ROW_OFFSET

DEVICES = pytest.mark.parametrize(
    "device", [pytest.param(device, id=device.name, marks=marks_of(device)) for device in (STAND_IN, CUPY_GPU)]
)
ROWS, WIDTH, CLASSES, BATCH = 29, 5, 3, 8
rng = np.random.default_rng(4)
X = rng.standard_normal((ROWS, WIDTH)).astype(np.float32)
y = (X @ rng.standard_normal((WIDTH, CLASSES))).argmax(axis=1)
WEIGHT = rng.uniform(0.5, 2.0, ROWS).astype(np.float32)
NET = MLP([WIDTH, 9, 6, CLASSES], activation=["gelu", PReLU(0.2)], dropout=[0.2, 0.0])


class Watched:
    """The backend's ``train_fleet`` one step at a time, each compared with the oracle's for every model in it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, fleet: Fleet, variant: Variant) -> None:
        self.fleet, self.sizes, self.products = fleet, [], variant.products
        backend = type(fleet.engines[0].memory.backend)
        bind = backend.bind

        def watched(this: Any, op: str, **operands: Any) -> Any:
            run = bind(this, op, **operands)
            return self.checked(this, run, operands["rows"]) if op == "train_fleet" else run

        monkeypatch.setattr(backend, "bind", watched)

    def checked(self, backend: Any, run: Any, rows: Any) -> Any:
        def stepwise(steps: list[int]) -> None:
            for at in range(max(steps)):
                wanted = [int(at < count) for count in steps]
                order = backend.to_host(rows)
                pending = [self.pending(index, order[index]) for index, count in enumerate(wanted) if count]
                self.sizes.append(len(pending))
                run(wanted)
                for engine, step, trace in pending:
                    found = float(backend.to_host(engine.memory.stats)[LAST_LOSS])
                    assert_within(found, trace.loss, trace.loss_bound)
                    step.check()

        return stepwise

    def pending(self, index: int, order: Any) -> Any:
        engine = self.fleet.engines[index]
        counters = engine.memory.backend.to_host(engine.memory.counters)
        batch = order[counters[ROW_OFFSET] :][: counters[ROW_COUNT]]
        step = Step(engine, products=self.products)
        return engine, step, step.trace(X[batch], y[batch], WEIGHT[batch].astype(np.float64))


@pytest.mark.parametrize("precision", ["fp32", "tf32"])
@pytest.mark.parametrize("optimizer", [SGD(0.05, weight_decay=0.01), Adam(0.02)], ids=["sgd", "adam"])
@DEVICES
def test_every_step_of_every_model_is_the_oracles(
    device: Any, optimizer: Any, precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    vary = [{}, {"lr": 0.1, "seed": 2}, {"seed": 3, "dropout": 0.4, "label_smoothing": 0.1, "weight_decay": 0.1}]
    folds = [np.arange(ROWS), np.arange(3, 20), np.arange(9, 16)]
    with usable(device):
        fleet = Fleet(
            NET, optimizer=optimizer, batch_size=BATCH, backend=device.backend, precision=precision, vary=vary
        )
        assert [len(places) for _, places in fleet._grouped(dict(enumerate(fleet.engines)))] == [3]
        assert all("each step of 3 models at once" in engine.plan_reason for engine in fleet.engines)
        watched = Watched(monkeypatch, fleet, Variant(device, precision))
        results = fleet.fit(X, y, epochs=2, sample_weight=WEIGHT, rows=folds)
    # epochs of 4, 3 and 1 batches: who has ended an epoch early waits for the others, or goes on alone
    assert sum(watched.sizes) == 2 * (4 + 3 + 1) and max(watched.sizes) == 3
    assert [member.status for member in results.members] == ["trained"] * 3


# cuBLAS promises nothing like it: for another number of products it may add up in another order
@pytest.mark.parametrize("device", [pytest.param(STAND_IN, id=STAND_IN.name, marks=marks_of(STAND_IN))])
def test_a_model_is_the_same_whoever_trains_beside_it(device: Any) -> None:
    vary = [{"lr": 0.05}, {"lr": 0.1, "seed": 2}, {"lr": 1e30}, {"lr": 0.3, "seed": 5}]
    data: dict[str, Any] = {"epochs": 9, "validation_data": (X[:9], y[:9]), "early_stopping": 1}
    with usable(device):
        fleets = [
            Fleet(NET, optimizer=SGD(), batch_size=BATCH, backend=device.backend, vary=[vary[i] for i in chosen])
            for chosen in ((0, 1, 2, 3), (1, 3))
        ]
        whole, part = (fleet.fit(X, y, sample_weight=WEIGHT, **data) for fleet in fleets)
        assert whole.members[2].status == "diverged"
        # the others have left one after another
        assert len({len(whole.members[index].history.epochs) for index in (0, 1, 3)}) > 1
        for index, other in ((1, 0), (3, 1)):
            own, alone = whole.engine(index), part.engine(other)
            assert own.snapshot()["params"].tobytes() == alone.snapshot()["params"].tobytes()
            assert whole.members[index].history.history == part.members[other].history.history


@DEVICES
def test_who_does_not_fit_together_trains_alone(device: Any) -> None:
    with usable(device):
        fleet = Fleet(NET, batch_size=BATCH, backend=device.backend, vary={"hidden": [[4, 4], [5, 5]]})
        assert fleet._grouped(dict(enumerate(fleet.engines))) == []
        eager = Fleet(NET, batch_size=BATCH, backend=device.backend, plan="eager", vary={"seed": [1, 2]})
        assert eager._grouped(dict(enumerate(eager.engines))) == []
        half = Fleet(NET, batch_size=BATCH, backend=device.backend, precision="fp16", vary={"seed": [1, 2]})
        assert half._grouped(dict(enumerate(half.engines))) == []
        results = fleet.fit(X, y, epochs=1)
        assert [member.status for member in results.members] == ["trained", "trained"]
        assert isinstance(results.engine(0), Engine)
