"""Losses of NumPy alone: quantiles that never cross, a mean with its spread, and targets with gaps."""

import numpy as np
import pytest
import torch
from scipy.stats import binom, norm
from sklearn.metrics import f1_score, r2_score, roc_auc_score

import fusemlp
from fusemlp import MAE, MLP, MSE, SGD, Adam, BinaryCrossEntropy, Engine, Huber, OneCycle, Poisson, Quantile
from fusemlp.describe.losses import LOSSES, GaussianNLL, Loss, OwnLoss, Quantiles, as_loss
from fusemlp.sklearn import MLPRegressor
from fusemlp_kernels.contract import COUNTERS, LAST_LOSS, ROW_COUNT, STATS
from fusemlp_kernels.errors import ArgumentError, ArgumentTypeError, BackendUnavailableError, DataError, ShapeError
from fusemlp_kernels.registry import backend

RANDOM = np.random.default_rng(0)
# three batches of 32 rows and a short one an epoch
ROWS, BATCH, INPUTS = 100, 32, 6
X = RANDOM.normal(size=(ROWS, INPUTS))
VALUES = RANDOM.normal(size=(ROWS, 3))
WEIGHTS = RANDOM.uniform(0.5, 2.0, ROWS)
LABELS = (VALUES > 0).astype(float)
COUNTS = RANDOM.poisson(2.0, (ROWS, 3)).astype(float)
# the last row has no target
GAPS = RANDOM.uniform(size=VALUES.shape) < 0.3
GAPS[-1] = True
LEVELS = (0.05, 0.25, 0.5, 0.9)


def with_gaps(y):
    return np.where(GAPS[:, : y.shape[1]], np.nan, y)


ELEMENTWISE = {
    "mse": (MSE(missing=True), VALUES, torch.nn.MSELoss()),
    "mae": (MAE(missing=True), VALUES, torch.nn.L1Loss()),
    "huber": (Huber(0.7, missing=True), VALUES, torch.nn.HuberLoss(delta=0.7)),
    "binary_cross_entropy": (BinaryCrossEntropy(missing=True), LABELS, torch.nn.BCEWithLogitsLoss()),
    "poisson": (Poisson(missing=True), COUNTS, torch.nn.PoissonNLLLoss()),
    "quantile": (
        Quantile(0.8, missing=True),
        VALUES,
        lambda y, t: pinball(y, t, torch.tensor(0.8, dtype=torch.float64)).mean(),
    ),
}


def pinball(predicted, target, levels):
    return torch.maximum(levels * (target - predicted), (levels - 1) * (target - predicted))


def crossing_free(y):
    """Return the quantiles of LEVELS from outputs (n, 4), of which the third is the middle one."""
    steps = torch.nn.functional.softplus(y)
    low = y[:, 2] - steps[:, 1]
    return torch.stack([low - steps[:, 0], low, y[:, 2], y[:, 2] + steps[:, 3]], dim=1)


def torch_gaussian(y, t, eps=1e-6):
    count, there = t.shape[1], ~torch.isnan(t)
    spread = torch.nn.functional.softplus(y[:, count:])
    return torch.nn.GaussianNLLLoss(eps=eps)(y[:, :count][there], t[there], spread[there] ** 2)


def torch_gaps(loss):
    def of(y, t):
        there = ~torch.isnan(t)
        return loss(y[there], t[there])

    return of


# of each loss the number of outputs, targets, and the same loss in torch
LOSSES_OF_HOST = {
    "quantiles": (
        Quantiles(LEVELS),
        4,
        VALUES[:, :1],
        lambda y, t: pinball(crossing_free(y), t, torch.tensor(LEVELS, dtype=torch.float64)).mean(),
    ),
    "gaussian": (GaussianNLL(), 4, VALUES[:, :2], torch_gaussian),
    "gaussian gaps": (GaussianNLL(missing=True), 4, with_gaps(VALUES[:, :2]), torch_gaussian),
    "gaussian floor": (GaussianNLL(eps=0.3), 2, VALUES[:, :1], lambda y, t: torch_gaussian(y, t, 0.3)),
    **{name: (loss, 3, with_gaps(y), torch_gaps(same)) for name, (loss, y, same) in ELEMENTWISE.items()},
}


def engine_of(name_or_loss, optimizer=None, outputs=None, **options):
    loss = LOSSES_OF_HOST[name_or_loss][0] if isinstance(name_or_loss, str) else name_or_loss
    outputs = outputs or LOSSES_OF_HOST[name_or_loss][1]
    options = {"batch_size": BATCH, "backend": "numpy", "precision": "fp64", **options}
    net = MLP([INPUTS, 8, outputs], activation="tanh", dropout=options.pop("dropout", 0.0))
    return Engine(net, loss, optimizer or Adam(0.01), **options)


def assert_alike(engine, other, most=1e-9):
    state, wanted = engine.state_dict(), other.state_dict()
    assert max(abs(state[name] - wanted[name]).max() for name in wanted) <= most


def function_of(loss):
    """Return the loss, which the kernels compute, as a function of outputs, targets and weights."""

    def function(outputs, targets, weights=None):
        counters, stats, gradient = np.zeros(COUNTERS, np.int64), np.zeros(STATS), np.empty_like(outputs)
        counters[ROW_COUNT] = len(outputs)
        batch = {"z": outputs, "target": targets, "weight": weights, "counters": counters, "stats": stats}
        precision = {"f": "fp32", "d": "fp64"}[outputs.dtype.char]
        run = backend("numpy", None, precision).bind
        run("loss_grad", loss=loss.spec(accuracy=False), dz=gradient, **batch)()
        return stats[LAST_LOSS], gradient

    return function


@pytest.mark.parametrize("name", LOSSES_OF_HOST)
def test_value_and_gradient_are_torchs(name):
    loss, width, targets, same = LOSSES_OF_HOST[name]
    outputs = RANDOM.normal(size=(ROWS, width)) * 3
    value, gradient = function_of(loss)(outputs, targets)
    y = torch.tensor(outputs, requires_grad=True)
    wanted = same(y, torch.tensor(targets))
    wanted.backward()
    assert value == pytest.approx(wanted.item(), rel=1e-12)
    np.testing.assert_allclose(gradient, y.grad.numpy(), rtol=1e-11, atol=1e-15)
    if name != "gaussian floor":
        # differences see that the floor is flat, and the gradient passes through it
        assert fusemlp.check_gradient(function_of(loss), outputs[:5], targets[:5], WEIGHTS[:5]) < 1e-8


@pytest.mark.parametrize("plan", ["resident", "eager"])
@pytest.mark.parametrize("name", LOSSES_OF_HOST)
def test_200_steps_are_torchs(name, plan):
    _, _, targets, same = LOSSES_OF_HOST[name]
    engine = engine_of(name, plan=plan)
    net = torch.nn.Sequential(torch.nn.Linear(INPUTS, 8), torch.nn.Tanh(), torch.nn.Linear(8, engine.network.sizes[-1]))
    net.double().load_state_dict({key: torch.tensor(value) for key, value in engine.state_dict().items()})
    optimizer = torch.optim.Adam(net.parameters(), lr=0.01)
    # 50 epochs of four batches
    engine.fit(X, targets, epochs=50, shuffle=False)
    for _ in range(50):
        for start in range(0, ROWS, BATCH):
            rows = slice(start, start + BATCH)
            optimizer.zero_grad()
            same(net(torch.tensor(X[rows])), torch.tensor(targets[rows])).backward()
            optimizer.step()
    for key, value in engine.state_dict().items():
        np.testing.assert_allclose(value, net.state_dict()[key].numpy(), atol=1e-9, rtol=1e-9)
    wanted = same(net(torch.tensor(X)), torch.tensor(targets)).item()
    assert engine.evaluate(X, targets)["loss"] == pytest.approx(wanted, rel=1e-9)


@pytest.mark.parametrize("name", ["quantiles", "gaussian", "mse"])
def test_it_trains_as_the_same_function_of_the_callers(name):
    loss, _, targets, _ = LOSSES_OF_HOST[name]
    engine = engine_of(name, dropout=0.3)
    other = engine_of(as_loss(function_of(loss)), outputs=engine.network.sizes[-1], dropout=0.3)
    data = {"sample_weight": WEIGHTS, "validation_data": (X, targets, WEIGHTS), "early_stopping": 3}
    histories = [one.fit(X, targets, epochs=30, **data).history for one in (engine, other)]
    assert_alike(engine, other)
    np.testing.assert_allclose(histories[0]["val_loss"], histories[1]["val_loss"], rtol=1e-9)
    for one in (engine, other):
        one.step(X[:9], targets[:9], WEIGHTS[:9])
    assert_alike(engine, other)


@pytest.mark.parametrize("name", ELEMENTWISE)
def test_without_gaps_it_is_the_kernels_loss(name):
    loss, y, _ = ELEMENTWISE[name]
    outputs = engine_of(loss, outputs=3), engine_of(type(loss)(**{**vars_of(loss), "missing": False}), outputs=3)
    histories = [one.fit(X, y, epochs=20, sample_weight=WEIGHTS).history["loss"] for one in outputs]
    np.testing.assert_allclose(*histories, rtol=1e-9)
    assert_alike(*outputs)
    assert np.array_equal(outputs[0].predict(X).shape, outputs[1].predict(X).shape)


def vars_of(loss):
    return {key: value for key, value in loss.to_config().items() if key != "kind"}


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_gaps_weigh_nothing(reduction):
    y, loss = with_gaps(VALUES), MSE(missing=True, reduction=reduction)
    engine = engine_of(loss, outputs=3)
    errors = np.where(GAPS, 0, engine.predict(X) - np.nan_to_num(y)) ** 2
    total, count = (WEIGHTS[:, None] * errors).sum(), (WEIGHTS[:, None] * ~GAPS).sum()
    wanted = total / count if reduction == "mean" else total
    assert engine.evaluate(X, y, WEIGHTS)["loss"] == pytest.approx(wanted, rel=1e-12)
    # an epoch's loss is of the elements too, not of batches; a batch without targets changes no parameter
    frozen = engine_of(loss, SGD(1e-300), outputs=3)
    assert frozen.fit(X, y, epochs=1, sample_weight=WEIGHTS).history["loss"][0] == pytest.approx(wanted, rel=1e-9)
    # a row without target is as one with weight 0
    engines = [engine_of(loss, SGD(0.01), outputs=3, batch_size=4) for _ in range(2)]
    empty = np.vstack([y[:4], np.full((4, 3), np.nan)])
    engines[0].fit(X[:8], empty, epochs=3, shuffle=False)
    engines[1].fit(X[:8], np.vstack([y[:4], VALUES[:4]]), sample_weight=[1] * 4 + [0] * 4, epochs=3, shuffle=False)
    assert_alike(*engines, 0.0)


def test_metrics_leave_gaps_out():
    y = with_gaps(VALUES)
    engine = engine_of("mse")
    history = engine.fit(X, y, epochs=3, validation_data=(X, y), metrics=["rmse"], monitor="val_r2").history
    columns = [(y[~GAPS[:, at], at], engine.predict(X)[~GAPS[:, at], at]) for at in range(3)]
    scores = engine.evaluate(X, y, metrics=["rmse", "mae", "r2"])
    assert scores["r2"] == pytest.approx(np.mean([r2_score(*column) for column in columns]))
    assert scores["rmse"] == pytest.approx(np.mean([np.sqrt(np.mean((t - p) ** 2)) for t, p in columns]))
    assert scores["rmse"] == history["val_rmse"][-1]
    y = with_gaps(LABELS)
    engine = engine_of("binary_cross_entropy")
    engine.fit(X, y, epochs=3)
    scores, p = engine.evaluate(X, y, metrics=["auc", "f1"]), engine.predict_proba(X)
    for name, of, rows in (("auc", roc_auc_score, p), ("f1", f1_score, p > 0.5)):
        wanted = np.mean([of(y[~GAPS[:, at], at], rows[~GAPS[:, at], at]) for at in range(3)])
        assert scores[name] == pytest.approx(wanted)


def test_quantiles_never_cross():
    # of outputs up to the largest float, and of steps below the rounding of the middle
    for dtype, most in ((np.float32, 1e38), (np.float64, 1e300)):
        outputs = RANDOM.normal(size=(20_000, 7)) * 10.0 ** RANDOM.uniform(-3, np.log10(most) - 1, (20_000, 1))
        for levels in ((0.5,), (0.1, 0.9), (0.6, 0.7, 0.99), tuple(np.linspace(0.05, 0.95, 7))):
            with np.errstate(over="ignore"):
                quantiles = Quantiles(levels).transform(outputs[:, : len(levels)].astype(dtype))
            assert quantiles.dtype == dtype and np.all(np.diff(quantiles, axis=1) >= 0)
    engine = engine_of("quantiles", precision="fp32")
    engine.fit(X, VALUES[:, 0], epochs=100)
    quantiles = engine.predict(10 * RANDOM.normal(size=(10_000, INPUTS)))
    assert quantiles.shape == (10_000, 4) and np.all(np.diff(quantiles, axis=1) >= 0)


def spreading(count, seed):
    """Return inputs (n, 1) and normal targets (n,), whose mean and deviation depend on them; these too."""
    random = np.random.default_rng(seed)
    x = random.uniform(-1, 1, (count, 1))
    mean, std = np.sin(2 * x[:, 0]), 0.2 + 0.3 * x[:, 0] ** 2
    return x, mean + std * random.normal(size=count), mean, std


@pytest.fixture(scope="module")
def trained():
    """Return engines that learned the same rows."""
    x, y, *_ = spreading(4000, 0)
    engines = {}
    for loss, outputs in ((Quantiles(), 3), (GaussianNLL(), 2)):
        net = MLP([1, 32, 32, outputs], activation="tanh")
        engines[loss.kind] = Engine(net, loss, Adam(OneCycle(0.01)), batch_size=256, backend="numpy", seed=1)
        engines[loss.kind].fit(x, y, epochs=100)
    return engines


@pytest.mark.parametrize("kind", ["quantiles", "gaussian"])
def test_intervals_cover_what_they_say(trained, kind):
    # 200 draws of a target in each of 50 places
    covered = []
    x, _, mean, std = spreading(50, 1)
    if kind == "quantiles":
        low, _, high = trained[kind].predict(x).T
    else:
        centre, spread = trained[kind].predict(x, return_std=True)
        low, high = centre - norm.ppf(0.9) * spread, centre + norm.ppf(0.9) * spread
    draws = mean + std * np.random.default_rng(2).normal(size=(200, 50))
    covered = ((low <= draws) & (draws <= high)).sum()
    # the network's own error is of the size of the bounds of 200 draws
    assert binom.ppf(0.005, 200, 0.8) / 200 <= covered / draws.size <= binom.ppf(0.995, 200, 0.8) / 200


def test_mean_and_spread_are_recovered(trained):
    x, _, mean, std = spreading(500, 3)
    predicted, spread = trained["gaussian"].predict(x, return_std=True)
    assert predicted.shape == spread.shape == (500,)
    assert np.array_equal(predicted, trained["gaussian"].predict(x))
    # 4000 rows over some 30 effective parameters: errors of about std * sqrt(30 / 4000)
    assert np.sqrt(np.mean(((predicted - mean) / std) ** 2)) < 0.2
    assert np.sqrt(np.mean(((spread - std) / std) ** 2)) < 0.2
    low, median, high = trained["quantiles"].predict(x).T
    for quantile, level in ((low, 0.1), (median, 0.5), (high, 0.9)):
        assert np.sqrt(np.mean(((quantile - mean) / std - norm.ppf(level)) ** 2)) < 0.3


def test_metrics_of_quantiles_and_means():
    engine = engine_of("quantiles")
    engine.fit(X, VALUES[:, 0], epochs=3)
    scores = engine.evaluate(X, VALUES[:, 0], metrics=["pinball", "mae", "r2"])
    assert scores["mae"] == pytest.approx(np.mean(abs(engine.predict(X)[:, 2] - VALUES[:, 0])))
    assert scores["pinball"] == pytest.approx(scores["mae"] / 2)
    engine = engine_of("gaussian")
    assert engine.predict(X).shape == (ROWS, 2)
    scores = engine.evaluate(X, VALUES[:, :2], metrics=["r2"])
    assert scores["r2"] == pytest.approx(r2_score(VALUES[:, :2], engine.predict(X)))
    # the middle quantile and the only mean are outputs, which explanations are of
    for loss, outputs, at in ((Quantiles(LEVELS), 4, 2), (GaussianNLL(), 2, 0)):
        engine = engine_of(loss, outputs=outputs)
        assert np.array_equal(engine.input_gradient(X), engine.input_gradient(X, output=at))


@pytest.mark.parametrize("name", LOSSES_OF_HOST)
def test_files_hold_the_loss(name, tmp_path):
    loss, _, targets, _ = LOSSES_OF_HOST[name]
    assert Loss.from_config(loss.to_config()) == loss
    engine = engine_of(name)
    engine.save(tmp_path / "m")
    assert fusemlp.load(tmp_path / "m").evaluate(X, targets) == engine.evaluate(X, targets)


def test_one_loss_after_another():
    engine, other = engine_of(MSE(), outputs=2), engine_of(GaussianNLL(), outputs=2)
    for one, losses in (
        (engine, [GaussianNLL(), MAE(missing=True), "gaussian"]),
        (other, [None, MAE(), GaussianNLL()]),
    ):
        for loss, y in zip(losses, (VALUES[:, :1], VALUES[:, :2], VALUES[:, :1]), strict=True):
            one.fit(X, y, epochs=2, loss=loss)
            one.step(X[:9], y[:9])
    assert_alike(engine, other)
    assert engine.loss == GaussianNLL() and as_loss("quantiles") == Quantiles((0.1, 0.5, 0.9))
    assert "loss gaussian," in summary(engine)
    assert "linear_loss_grad gaussian" in str(engine.program)


def summary(engine):
    lines = []
    engine.summary(lines.append)
    return "\n".join(lines)


def test_bad_values_are_refused():
    for value, error in (
        ("0.1", ArgumentTypeError),
        (0.1, ArgumentTypeError),
        ([], ArgumentError),
        ([0.5, 0.1], ArgumentError),
        ([0.5, 0.5], ArgumentError),
        ([0.0, 0.5], ArgumentError),
        ([0.5, 1.0], ArgumentError),
    ):
        with pytest.raises(error, match=r"^q: "):
            Quantiles(value)
    with pytest.raises(ArgumentError, match=r"^eps: "):
        GaussianNLL(eps=0.0)
    with pytest.raises(ShapeError, match=r"loss: quantiles needs 4 outputs for a target, the network has 3"):
        engine_of("quantiles", outputs=3)
    with pytest.raises(ShapeError, match="loss: gaussian needs 2 outputs for a target, the network has 3"):
        engine_of("gaussian", outputs=3)
    with pytest.raises(ArgumentError, match="output_activation: gaussian takes means and raw"):
        Engine(MLP([6, 2], output_activation="tanh"), GaussianNLL())
    with pytest.raises(ArgumentError, match="return_std: it needs the loss gaussian, this engine has 'mse'"):
        engine_of(MSE(), outputs=2).predict(X, return_std=True)
    for name, y in (("quantiles", VALUES[:, :2]), ("gaussian", VALUES)):
        with pytest.raises(ShapeError, match=r"y: expected shape \(n, [12]\)"):
            engine_of(name).fit(X, y, epochs=1)
        with pytest.raises(DataError, match="y: expected finite numbers, got nan"):
            engine_of(name).fit(X, np.full_like(VALUES[:, : 1 + (name == "gaussian")], np.nan), epochs=1)


def test_bad_targets_are_refused():
    for loss in (MSE(), MAE(), Huber(), Quantile(), BinaryCrossEntropy(), Poisson()):
        engine = engine_of(loss, outputs=3)
        y = with_gaps(COUNTS if loss.kind == "poisson" else LABELS)
        with pytest.raises(
            DataError, match=r"got nan at row .* or drop missing values, or use the loss with missing=T"
        ):
            engine.fit(X, y, epochs=1)
        with pytest.raises(DataError, match="missing=True"):
            engine.step(X[:BATCH], y[:BATCH])
        there = engine_of(type(loss)(missing=True), outputs=3)
        there.step(X[:BATCH], y[:BATCH])
        with pytest.raises(DataError, match=r"y: all 32 rows lack every target \(NaN\); give at least one number"):
            there.step(X[:BATCH], np.full_like(y[:BATCH], np.nan))
        with pytest.raises(DataError, match="y: expected finite numbers, got inf"):
            there.fit(X, np.where(GAPS, np.inf, y), epochs=1)
        if loss.kind in ("binary_cross_entropy", "poisson"):
            with pytest.raises(DataError, match=r"takes .*, got -3 at row"):
                there.fit(X, np.where(np.isnan(y), y, -3), epochs=1)
    with pytest.raises(DataError, match=r"X: .* fill in or drop missing values$"):
        engine.fit(np.where(X > 1, np.nan, X), COUNTS, epochs=1)


def test_what_does_not_go_with_it():
    # test_conflicts.py has gaps beside all other features
    with pytest.raises(BackendUnavailableError, match="loss: quantiles is not supported yet on the backend 'triton'"):
        Engine(MLP([6, 3]), Quantiles(), backend="triton")
    with pytest.raises(ArgumentError, match="loss: missing=True of huber is for gaps in y, which scikit-learn"):
        MLPRegressor(Huber(missing=True)).fit(X, VALUES[:, 0])
    with pytest.raises(ArgumentError, match="function: cross_entropy is computed by kernels"):
        fusemlp.check_gradient("cross_entropy", VALUES, [0, 1, 2])
    assert all(issubclass(kind, fusemlp.Loss) and kind is not OwnLoss for kind in LOSSES.values())


def test_an_output_without_a_target_may_overflow():
    outputs, targets = np.array([[1.0, 200.0]], np.float32), np.array([[1.0, np.nan]], np.float32)
    value, gradient = function_of(Poisson(missing=True))(outputs, targets)
    assert abs(value - (np.e - 1)) < 1e-6
    np.testing.assert_array_equal(gradient[0, 1], 0.0)


def test_rows_that_weigh_something_must_have_a_target():
    def engine():
        return Engine(MLP([INPUTS, 4, 3]), loss=MSE(missing=True), batch_size=BATCH, backend="numpy")

    late, weights = VALUES.copy(), np.zeros(ROWS)
    late[:80], weights[:80] = np.nan, 1.0
    for fit, words in (
        ({"validation_split": 0.2}, "validation_split: the first 80 rows: no row that weighs something"),
        ({"sample_weight": weights}, "y: no row that weighs something has a target"),
        ({"validation_data": (X, late, weights)}, "no row that weighs something has a target"),
    ):
        y = VALUES if "validation_data" in fit else late
        with pytest.raises(DataError, match=words):
            engine().fit(X, y, epochs=1, **fit)
    # a target whose rows all weigh nothing has no score
    half = VALUES.copy()
    half[:80, 0] = np.nan
    scores = engine().evaluate(X, half, sample_weight=weights, metrics=["mae", "r2"])
    assert np.isfinite([scores["mae"], scores["r2"]]).all()


def test_accuracy_is_of_the_labels_that_are_there():
    y = with_gaps(LABELS)
    engine = engine_of("binary_cross_entropy")
    history = engine.fit(X, y, epochs=2, validation_data=(X, y, WEIGHTS)).history
    wanted = np.mean((engine.predict(X) == y)[~GAPS])
    assert engine.evaluate(X, y)["accuracy"] == history["val_accuracy"][-1] == pytest.approx(wanted)
