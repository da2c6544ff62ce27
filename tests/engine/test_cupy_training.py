"""Whole trainings on the CuPy backend, step by step within the bound of the oracle and of the NumPy backend.

Without a card the kernels run as C++ on the host, under the stand-in for CuPy. This checks their results and the
backend's own code, but not cuBLAS, streams or graphs.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from devices import CUPY_GPU, STAND_IN, marks_of, usable, why_not
from training_cases import CASES, IN_FLOAT16, check_fit, check_steps, check_steps_in_float16

from fusemlp import MLP, SGD, Engine, Fleet

DEVICES = pytest.mark.parametrize(
    "device", [pytest.param(device, id=device.name, marks=marks_of(device)) for device in (STAND_IN, CUPY_GPU)]
)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
@DEVICES
def test_every_step_is_the_oracles_and_the_numpy_backends(case, device, record_property):
    with usable(device):
        check_steps(case, device, record_property)


@pytest.mark.parametrize("name", IN_FLOAT16)
@DEVICES
def test_every_step_in_float16_is_within_its_bound(name, device, record_property):
    with usable(device):
        check_steps_in_float16(name, device, record_property)


@pytest.mark.parametrize("precision", STAND_IN.precisions)
@DEVICES
def test_fit_gives_the_losses_of_steps(device, precision):
    with usable(device):
        check_fit(device, precision)


@DEVICES
def test_a_fleet_trains_one_model_after_another(device: Any) -> None:
    random = np.random.default_rng(4)
    X, y = random.standard_normal((29, 5)).astype(np.float32), np.arange(29) % 3
    net, options = MLP([5, 9, 3], dropout=0.2), {"batch_size": 8, "backend": device.backend}
    data: dict[str, Any] = {"epochs": 4, "validation_data": (X[:9], y[:9]), "early_stopping": 1}
    vary: list[dict[str, Any]] = [{"lr": 0.1}, {"lr": 1e30}, {"seed": 2}]
    with usable(device):
        results = Fleet(net, optimizer=SGD(), vary=vary, **options).fit(X, y, **data)
        assert [member.status == "diverged" for member in results.members] == [False, True, False]
        for index in (0, 2):
            rate, seed = vary[index].get("lr", SGD().lr), vary[index].get("seed", 0)
            engine = Engine(net, optimizer=SGD(rate), seed=seed, **options)
            engine.fit(X, y, **data)
            found, wanted = results.engine(index), engine.memory.snapshot()
            assert found.history.history == engine.history.history
            assert all(np.array_equal(array, wanted[name]) for name, array in found.memory.snapshot().items())


def test_an_epoch_on_graphs_waits_once(monkeypatch: pytest.MonkeyPatch) -> None:
    if (reason := why_not(STAND_IN)) is not None:
        pytest.skip(f"cupy on the host: {reason}")
    random = np.random.default_rng(4)
    X, y = random.standard_normal((29, 5)).astype(np.float32), np.arange(29) % 3
    with usable(STAND_IN):
        from cupy_standin import arrays

        from fusemlp_kernels.cupy import device

        reads: list[int] = []
        asnumpy = arrays.asnumpy

        def counted(array: Any) -> Any:
            reads.append(array.nbytes)
            return asnumpy(array)

        monkeypatch.setattr(arrays, "asnumpy", counted)
        monkeypatch.setattr(device.cupy, "asnumpy", counted)
        engine = Engine(MLP([5, 9, 3]), batch_size=8, backend="cupy", plan="graph", normalise=False)
        engine.fit(X, y, epochs=1)
        of_fits = []
        for epochs in (3, 4):
            reads.clear()
            engine.fit(X, y, epochs=epochs)
            of_fits.append(list(reads))
        epoch = of_fits[1][len(of_fits[0]) :]
        assert len(epoch) == 1 and sum(epoch) <= 1024
