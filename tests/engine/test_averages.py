"""The moving average of the parameters: PyTorch's, on every backend, and read by all that does not train."""

from contextlib import nullcontext
from dataclasses import replace

import numpy as np
import pytest
import torch
from devices import INTERPRETER, NUMPY, STAND_IN, usable
from torch.optim.swa_utils import get_ema_multi_avg_fn

from fusemlp import MLP, SGD, Adam, AdamW, Callback, Engine, Fleet, ParameterOptions, load, load_checkpoint
from fusemlp.fleet.results import merged
from fusemlp_kernels import clock
from fusemlp_kernels.contract import SHARE
from fusemlp_kernels.errors import ArgumentError, ArgumentTypeError
from make import assert_same, bits, engine

RANDOM = np.random.default_rng(3)
X, Y = RANDOM.standard_normal((60, 5)).astype(np.float32), np.arange(60) % 3
XV, YV = X[:20] + 0.1, Y[:20]
NET = MLP([5, 9, 3], activation="tanh")
OPTIMIZERS = {
    "sgd": SGD(0.1, ema=0.9),
    "momentum, clipped": SGD(0.05, momentum=0.9, clip_norm=0.3, ema=0.99),
    "adamw": AdamW(0.02, ema=0.95),
    "adam, accumulated": Adam(0.02, accumulate=3, ema=0.8),
}


def engine_of(optimizer, **options):
    return engine(net=NET, optimizer=optimizer, batch_size=8, **options)


class Trained(Callback):
    """Keep the trained parameters after each update."""

    def __init__(self):
        self.seen = []

    def on_batch_end(self, engine, batch):
        if engine.update_count > len(self.seen):
            self.seen.append(engine.memory.tensors())


def torch_average(seen, ema):
    """PyTorch's, from zeros and divided by the sum of its weights."""
    names, update = list(seen[0]), get_ema_multi_avg_fn(ema)
    averages = [torch.zeros(seen[0][name].shape, dtype=torch.float64) for name in names]
    for count, parameters in enumerate(seen):
        update(averages, [torch.tensor(parameters[name], dtype=torch.float64) for name in names], torch.tensor(count))
    return {name: one.numpy() / (1.0 - ema ** len(seen)) for name, one in zip(names, averages, strict=True)}


def assert_reads_the_average(engine):
    """Whatever reads the engine gets what an engine with these parameters alone gives."""
    plain = Engine(engine.network, precision=engine.precision, batch_size=8, backend=engine.backend)
    plain.load_state_dict(engine.state_dict())
    assert_same(engine.predict_proba(XV), plain.predict_proba(XV))
    assert engine.evaluate(XV, YV) == plain.evaluate(XV, YV)


@pytest.mark.parametrize("optimizer", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_forty_updates_are_torchs(optimizer):
    trained = Trained()
    engine = engine_of(optimizer, precision="fp64")
    engine.fit(X, Y, epochs=5 * optimizer.accumulate, callbacks=[trained])
    assert len(trained.seen) == 40
    found, expected = engine.state_dict(), torch_average(trained.seen, optimizer.ema)
    for name, wanted in expected.items():
        np.testing.assert_allclose(found[name], wanted, rtol=1e-12, atol=1e-14)
    # training itself does not know of it
    plain = engine_of(replace(optimizer, ema=0.0), precision="fp64")
    plain.fit(X, Y, epochs=5 * optimizer.accumulate)
    assert all(np.abs(found[name] - array).max() > 1e-6 for name, array in plain.state_dict().items())
    for name, array in plain.state_dict().items():
        np.testing.assert_allclose(engine.memory.tensors()[name], array, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(
    ("device", "precision", "name"),
    [
        *((device, "fp32", name) for device in (NUMPY, INTERPRETER, STAND_IN) for name in OPTIMIZERS),
        # what steps in two bytes have beside: skipped updates and gradients that are scaled
        *((device, "fp16", name) for device in (INTERPRETER, STAND_IN) for name in ("sgd", "adam, accumulated")),
    ],
    ids=lambda one: getattr(one, "name", one),
)
def test_every_backend_averages_and_reads_the_average(device, precision, name):
    optimizer, trained = OPTIMIZERS[name], Trained()
    with nullcontext() if device is NUMPY else usable(device):
        engine = engine_of(optimizer, backend=device.backend, precision=precision)
        assert_same(engine.state_dict(), engine.memory.tensors())
        engine.fit(X[:30], Y[:30], epochs=optimizer.accumulate, callbacks=[trained])
        found, expected = engine.state_dict(), torch_average(trained.seen, optimizer.ema)
        for key, wanted in expected.items():
            np.testing.assert_allclose(found[key], wanted, rtol=1e-5, atol=1e-6)
        assert_reads_the_average(engine)


def test_the_best_average_is_restored_and_training_goes_on_from_it():
    seen = []

    class Averages(Callback):
        def on_epoch_end(self, engine, epoch, logs):
            assert logs["val_loss"] == pytest.approx(engine.evaluate(XV, YV)["loss"])
            seen.append(engine.state_dict())

    engine = engine_of(Adam(0.05, ema=0.9))
    history = engine.fit(X, Y, epochs=40, validation_data=(XV, YV), early_stopping=2, callbacks=[Averages()])
    assert history.best_epoch < len(history.epochs) - 1
    assert_same(engine.state_dict(), seen[history.best_epoch])
    assert_same(engine.state_dict(), engine.memory.tensors())
    assert_reads_the_average(engine)


def test_files_fleets_and_merged_models_have_the_average(tmp_path):
    options = {"batch_size": 8, "backend": "numpy"}
    results = Fleet(NET, optimizer=Adam(0.02, ema=0.9), vary={"seed": [1, 2]}, **options).fit(X, Y, epochs=4)
    engine = engine_of(Adam(0.02, ema=0.9))
    engine.fit(X, Y, epochs=4)
    members = [results.engine(0), results.engine(1)]
    logits = [np.log(one.predict_proba(XV)) for one in members]
    expected = np.exp(np.mean(logits, axis=0))
    expected /= expected.sum(axis=1, keepdims=True)
    np.testing.assert_allclose(merged(members).predict_proba(XV), expected, rtol=1e-5)
    engine.save(tmp_path / "model")
    engine.save_checkpoint(tmp_path / "checkpoint")
    for same in (members[0], load(tmp_path / "model"), load_checkpoint(tmp_path / "checkpoint")):
        assert_same(same.predict_proba(XV), engine.predict_proba(XV))
    # a model file has no training to go on with
    assert_same(load(tmp_path / "model").memory.tensors(), engine.state_dict())


def test_frozen_parameters_are_their_average():
    frozen = {"0.*": ParameterOptions(trainable=False)}
    engine = engine_of(Adam(0.02, ema=0.9, per_parameter=frozen))
    before = engine.state_dict()
    engine.fit(X, Y, epochs=2)
    after = engine.state_dict()
    assert [bits(before[name]) == bits(after[name]) for name in after] == [True, True, False, False]
    assert_reads_the_average(engine)


def test_a_wrong_decay_is_refused():
    with pytest.raises(ArgumentError, match=r"ema: .*got 1.0"):
        Adam(ema=1.0)
    with pytest.raises(ArgumentTypeError, match="ema_momentum: it is called ema here"):
        Adam(ema_momentum=0.99)


@pytest.mark.parametrize("other", [Adam(0.02), SGD(0.1, momentum=0.9), SGD(0.1, ema=0.9)], ids=repr)
def test_another_optimizer_between_two_fits_has_the_same_state(other):
    engine = engine_of(Adam(0.02, ema=0.9))
    engine.fit(X, Y, epochs=1)
    before = engine.state_dict()
    engine.optimizer = other
    with pytest.raises(ArgumentError, match=r"optimizer: it keeps .*first_moment, second_moment, average; make a new"):
        engine.fit(X, Y, epochs=1)
    assert_same(engine.state_dict(), before)
    engine.optimizer = Adam(0.001, betas=(0.8, 0.9), ema=0.5)
    engine.fit(X, Y, epochs=1)
    assert_reads_the_average(engine)
    # as a table for the new numbers has it, in another engine
    expected = clock.hyper_at(engine.optimizer.rule(), 0.001, engine.update_count)
    np.testing.assert_array_equal(engine.memory.hyper[:3], expected[:3])
    assert engine.memory.hyper[SHARE] == expected[SHARE]
