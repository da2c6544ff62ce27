"""Whole trainings on the backends of cards, step by step within the bound of the oracle and of the NumPy backend.

Without a card Triton's interpreter runs fp32 and fp16: it computes bf16 wrongly, on raw bit patterns. CuPy's kernels
run as C++ on the host, under a stand-in: this checks their results and the backend's code, but no cuBLAS, no streams.
"""

import pytest
from devices import CUPY_GPU, GPU, INTERPRETER, STAND_IN, places, usable, variants_of, why_not
from training_cases import CASES, IN_FLOAT16, check_fit, check_steps, check_steps_in_float16

from fusemlp import DPSGD, FGSM, MLP, SGD, BackendUnavailableError, Engine, Fleet
from fusemlp.runtime.plans import planned
from make import assert_same, data

X, y = data(29)
CARDS = INTERPRETER, GPU, STAND_IN, CUPY_GPU
DEVICES = pytest.mark.parametrize("device", places(*CARDS))
OF_CUPY = pytest.mark.parametrize("device", places(STAND_IN, CUPY_GPU))


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


@pytest.mark.parametrize("variant", variants_of(*CARDS))
def test_fit_gives_the_losses_of_steps(variant):
    with usable(variant.device):
        check_fit(variant.device, variant.precision)


@OF_CUPY
def test_what_has_no_kernels_is_refused_before_anything_changes(device, caplog):
    net, members = MLP([5, 4, 3]), MLP([5, 4, 3], members=2)
    said = "the cupy backend has no kernels for {}; use backend='triton' or 'numpy'$"
    with usable(device), caplog.at_level("INFO"):
        engine, attack = Engine(net, backend="cupy"), FGSM(0.1)
        before = engine.memory.snapshot()
        for argument, what, refused in (
            ("members", "members that share weights", lambda: Engine(members, backend="cupy")),
            ("members", "members that share weights", lambda: planned(members, backend="cupy")),
            ("privacy", "clipped rows and noise", lambda: Engine(net, privacy=DPSGD(1.0), backend="cupy")),
            ("adversarial", "attacks inside a training step", lambda: engine.fit(X, y, epochs=1, adversarial=attack)),
        ):
            with pytest.raises(BackendUnavailableError, match=f"^{argument}: {said.format(what)}"):
                refused()
        assert_same(engine.memory.snapshot(), before)
        # an engine trains with the next one
        assert "cupy" not in (Engine(members).backend, Engine(net, privacy=DPSGD(1.0)).backend)
        assert "passes over cupy: privacy: the cupy backend has no kernels for clipped rows and noise" in caplog.text


@OF_CUPY
def test_a_fleet_trains_one_model_after_another(device):
    net, options = MLP([5, 9, 3], dropout=0.2), {"batch_size": 8, "backend": device.backend}
    fit = {"epochs": 4, "validation_data": (X[:9], y[:9]), "early_stopping": 1}
    vary = [{"lr": 0.1}, {"lr": 1e30}, {"seed": 2}]
    with usable(device):
        results = Fleet(net, optimizer=SGD(), vary=vary, **options).fit(X, y, **fit)
        assert [member.status == "diverged" for member in results.members] == [False, True, False]
        for index in (0, 2):
            rate, seed = vary[index].get("lr", SGD().lr), vary[index].get("seed", 0)
            engine = Engine(net, optimizer=SGD(rate), seed=seed, **options)
            engine.fit(X, y, **fit)
            assert results.engine(index).history.history == engine.history.history
            assert_same(results.engine(index).memory.snapshot(), engine.memory.snapshot())


def test_an_epoch_on_graphs_waits_once(monkeypatch):
    if (reason := why_not(STAND_IN)) is not None:
        pytest.skip(f"cupy on the host: {reason}")
    with usable(STAND_IN):
        from cupy_standin import arrays

        from fusemlp_kernels.cupy import device

        reads, asnumpy = [], arrays.asnumpy

        def counted(array):
            reads.append(array.nbytes)
            return asnumpy(array)

        monkeypatch.setattr(arrays, "asnumpy", counted)
        monkeypatch.setattr(device.cupy, "asnumpy", counted)
        engine = Engine(MLP([5, 9, 3]), batch_size=8, backend="cupy", plan="graph", normalise=False)
        engine.fit(X, y, epochs=1)
        counts = [len(reads)]
        for epochs in (3, 4):
            engine.fit(X, y, epochs=epochs)
            counts.append(len(reads))
        # of an epoch: a fit of four has one more than a fit of three
        assert (counts[2] - counts[1]) - (counts[1] - counts[0]) == 1 and reads[-1] <= 1024
