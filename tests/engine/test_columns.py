"""Training on columns of codes is training on the dense rows that they stand for."""

from dataclasses import replace

import numpy as np
import pytest

import fusemlp
import make
from fusemlp.inputs.columns import Columns
from fusemlp_kernels.coding import BAG, NUMBERS, PIECES, WORD, Coding, Column

KINDS = (Column(WORD, 5), Column(PIECES, 7), Column(NUMBERS, 2), Column(BAG, 20, 3), Column(PIECES, 4), Column(WORD, 9))


def columns(rows, kinds=KINDS, seed=0):
    """Random rows of codes, words and bags with gaps, in float64."""
    rng = np.random.default_rng(seed)
    coding = Coding(kinds)
    codes = rng.normal(size=(rows, coding.slots))
    for column, place in zip(coding.columns, coding.places, strict=True):
        step = max(1, place.slots // max(1, column.pairs))
        if column.kind != NUMBERS:
            low = 0 if column.kind == PIECES else -1
            cells = codes[:, place.slot : place.slot + place.slots : step]
            cells[:] = rng.integers(low, column.inputs, cells.shape)
    return Columns(coding, codes)


def assert_close(coded, dense):
    """Both are sums of the same terms in float64, in another order."""
    assert coded.keys() == dense.keys()
    for name, value in coded.items():
        assert np.allclose(value, dense[name], rtol=1e-12, atol=1e-12), name


def test_dense():
    coding = Coding((Column(WORD, 3), Column(PIECES, 4), Column(NUMBERS, 1), Column(BAG, 3, 2)))
    codes = np.array([[2, 1, 0.25, -7, 1, 0.5, 1, 2], [-1, 3, 1.5, 8, -1, 4, 0, 3]])
    expected = [[0, 0, 1, 1, 0.25, 0, 0, -7, 0, 2.5, 0], [0, 0, 0, 1, 1, 1, 1.5, 8, 3, 0, 0]]
    X = Columns(coding, codes)
    assert X.shape == (2, 11)
    assert np.array_equal(np.asarray(X), expected)
    assert np.array_equal(np.asarray(X[1:]), expected[1:])


OPTIMIZERS = {
    "sgd": fusemlp.SGD(0.05),
    "momentum": fusemlp.SGD(0.05, momentum=0.9),
    "adam": fusemlp.Adam(0.01),
    "ema": fusemlp.AdamW(0.01, ema=0.9),
    "clipped": fusemlp.AdamW(0.01, clip_norm=0.5),
    "accumulated": fusemlp.Adam(0.01, accumulate=3),
}


# Each loss with an optimizer, and each optimizer with a loss: neither knows of the other.
LOSSES = ("mse", "mae", "huber", "quantile", "poisson", "cross_entropy", "binary_cross_entropy")
TRAININGS = [*zip([*OPTIMIZERS, "adam"], LOSSES, strict=True)]


@pytest.mark.parametrize("plan", ["resident", "eager"])
@pytest.mark.parametrize(("optimizer", "loss"), TRAININGS)
def test_training_equals_that_on_dense_rows(optimizer, loss, plan):
    X = columns(150)
    rng = np.random.default_rng(1)
    y = rng.normal(size=(150, 1)) if loss in ("mse", "mae", "huber", "quantile") else rng.integers(0, 2, 150)
    weight = rng.uniform(0.5, 2, 150)
    outputs = 2 if loss == "cross_entropy" else 1
    results = []
    for rows in (X, np.asarray(X)):
        net = fusemlp.MLP([X.shape[1], 16, 8, outputs], activation="gelu", dropout=0.1)
        options = {"batch_size": 32, "precision": "fp64", "plan": plan}
        engine = fusemlp.Engine(net, loss=loss, optimizer=OPTIMIZERS[optimizer], **options)
        history = engine.fit(rows, y, epochs=3, sample_weight=weight, validation_data=(rows[:40], y[:40]))
        metrics = engine.evaluate(rows, y)
        results.append({**engine.state_dict(), "losses": history.history["val_loss"], "loss": metrics["loss"]})
    assert_close(*results)


@pytest.mark.parametrize("plan", ["resident", "eager"])
@pytest.mark.parametrize(
    ("optimizer", "frozen"), [*zip(OPTIMIZERS, ("", "0.weight", "0.r", "", "2.weight", "0.weight"), strict=True)]
)
def test_members_that_share_weights(optimizer, frozen, plan):
    X = columns(150)
    y = np.random.default_rng(1).integers(0, 3, 150)
    results = []
    for rows in (X, np.asarray(X)):
        net = fusemlp.MLP([X.shape[1], 16, 8, 3], activation="silu", dropout=0.1, members=4)
        kept = {frozen: fusemlp.ParameterOptions(trainable=False)} if frozen else {}
        rule = replace(OPTIMIZERS[optimizer], per_parameter=kept)
        engine = fusemlp.Engine(net, optimizer=rule, batch_size=32, precision="fp64", plan=plan)
        engine.fit(rows, y, epochs=3, validation_data=(rows[:40], y[:40]))
        engine.step(rows[:20], y[:20])
        assert engine.coded is (rows is X)
        results.append({**engine.state_dict(), "loss": engine.evaluate(rows, y)["loss"]})
    assert_close(*results)


def test_codes_and_dense_rows_take_turns():
    X = columns(96)
    y = np.random.default_rng(1).normal(size=(96, 1))
    states = []
    for order in ((X, np.asarray(X), X), (np.asarray(X),) * 3):
        engine = make.engine((X.shape[1], 8, 1), "mse", fusemlp.Adam(0.01), precision="fp64")
        for rows in order:
            engine.fit(rows, y, epochs=2)
        states.append(engine.state_dict())
    assert_close(*states)


# more columns than threads, and one that no threads share
@pytest.mark.parametrize("kinds", [(*KINDS, Column(WORD, 900), *[Column(PIECES, 48)] * 6), (Column(BAG, 2000, 9),)])
@pytest.mark.parametrize("threads, members", [("2", 1), ("3", 1), ("2", 4)])
def test_bits_do_not_depend_on_threads(threads, members, kinds, monkeypatch):
    X = columns(700, kinds)
    X = X.astype(np.float32)
    y = np.random.default_rng(1).normal(size=(700, 1))
    states = []
    for count in ("1", threads):
        monkeypatch.setenv("FUSEMLP_NUM_THREADS", count)
        net = fusemlp.MLP([X.shape[1], 64, 1], members=members)
        engine = make.engine(net=net, loss="mse", batch_size=256)
        engine.fit(X, y, epochs=2)
        states.append(engine.state_dict())
    make.assert_same(*states)


@pytest.mark.parametrize("options", [{"normalise": True}, {"privacy": fusemlp.DPSGD(1.0, seed=3)}])
def test_others_take_dense_rows(options):
    X = columns(64).astype(np.float32)
    y = np.random.default_rng(1).normal(size=(64, 1))
    states = []
    for rows in (X, np.asarray(X)):
        engine = make.engine((X.shape[1], 8, 1), loss="mse", **options)
        engine.fit(rows, y, epochs=2)
        states.append(engine.state_dict())
    make.assert_same(*states)
