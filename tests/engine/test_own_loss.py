"""A function of the caller's as loss: it trains as the built-in loss it repeats, and its errors leave the engine."""

import copy
import functools
import pickle
from functools import partial

import numpy as np
import pytest

import fusemlp
from fusemlp import MLP, SGD, Adam, Engine, OneCycle
from fusemlp.callbacks import Callback
from fusemlp.describe.conflicts import refused_by
from fusemlp.describe.losses import OwnLoss, as_loss
from fusemlp.inputs.columns import Columns
from fusemlp.program.program import ORDERED, Sharding
from fusemlp.runtime.plans import CALLS, TRAITS, choose_plan, shared_plan
from fusemlp.sklearn import TableRegressor
from fusemlp_kernels.coding import NUMBERS, WORD, Coding, Column
from fusemlp_kernels.contract import LOSS_SCALE, ROW_COUNT, ROW_STEP
from fusemlp_kernels.errors import (
    ArgumentError,
    ArgumentTypeError,
    BackendUnavailableError,
    CheckpointError,
    DataError,
    DivergenceError,
    DTypeError,
    FusemlpError,
    ShapeError,
)
from fusemlp_kernels.registry import availability
from make import assert_same, halfway
from own_losses import cross_entropy, logistic, mae, mse

RANDOM = np.random.default_rng(0)
# three batches of 32 rows and a short one an epoch
ROWS, BATCH, INPUTS, OUTPUTS = 100, 32, 6, 3
X = RANDOM.normal(size=(ROWS, INPUTS))
VALUES = RANDOM.normal(size=(ROWS, OUTPUTS))
LABELS = RANDOM.integers(0, OUTPUTS, ROWS)
YES = RANDOM.integers(0, 2, (ROWS, OUTPUTS)).astype(np.float64)
WEIGHTS = RANDOM.uniform(0.5, 2.0, ROWS)


def bce(outputs, targets, weights=None):
    value, gradient = logistic(outputs, targets, weights)
    return value / OUTPUTS, gradient / OUTPUTS


BUILT_IN = {
    "mse": (mse, VALUES),
    "mae": (mae, VALUES),
    "cross_entropy": (cross_entropy, LABELS),
    "binary_cross_entropy": (bce, YES),
}


def with_tensors(function):
    """Return a function of arrays as one of torch's tensors on one device."""
    torch = pytest.importorskip("torch")

    def loss(outputs, *targets, **weights):
        arrays = [tensor.detach().cpu().numpy() for tensor in (outputs, *targets)]
        shares = {name: tensor if tensor is None else tensor.cpu().numpy() for name, tensor in weights.items()}
        number, gradient = function(*arrays, **shares)
        return torch.tensor(number, device=outputs.device), torch.as_tensor(gradient, device=outputs.device)

    return functools.wraps(function)(loss)


ON_TRITON = {"backend": "triton", "precision": "fp32"}
PLACES = [
    pytest.param({"plan": "resident"}, id="resident"),
    pytest.param({"plan": "eager"}, id="eager"),
    pytest.param(ON_TRITON, id="triton", marks=pytest.mark.skipif(bool(availability()["triton"]), reason="no Triton")),
]


def engine_of(loss, optimizer=None, *, net=(), **options):
    options = {"batch_size": BATCH, "backend": "numpy", "precision": "fp64", **options}
    loss = with_tensors(loss) if callable(loss) and options["backend"] == "triton" else loss
    net = MLP([INPUTS, 8, 5, OUTPUTS], activation="tanh", **dict(net))
    return Engine(net, loss, optimizer or Adam(0.01), **options)


def assert_alike(engine, other, most=1e-9):
    state, wanted = engine.state_dict(), other.state_dict()
    assert max(abs(state[name] - wanted[name]).max() for name in wanted) <= most


TRAININGS = {
    "plain": {},
    "eager": {"plan": "eager"},
    "sgd": {"optimizer": SGD(0.05)},
    "momentum and clipping": {"optimizer": SGD(0.05, momentum=0.9, clip_norm=0.1)},
    "accumulation": {"optimizer": Adam(0.01, accumulate=3)},
    "decay, average, schedule": {"optimizer": Adam(OneCycle(0.02), weight_decay=0.1, ema=0.9)},
    "dropout": {"net": {"dropout": 0.3}},
    "normalise": {"normalise": True},
}


@pytest.mark.parametrize("training", TRAININGS)
@pytest.mark.parametrize("name", BUILT_IN)
def test_it_trains_as_the_built_in_loss(name, training):
    function, y = BUILT_IN[name]
    options = TRAININGS[training]
    # 50 epochs of four batches
    own, built_in = (engine_of(loss, **options) for loss in (function, name))
    history, wanted = (engine.fit(X, y, epochs=50).history for engine in (own, built_in))
    np.testing.assert_allclose(history["loss"], wanted["loss"], rtol=1e-9)
    # the kernel's gradient of mae is the same sign times the same quotient
    assert_alike(own, built_in, 0.0 if name == "mae" else 1e-9)
    assert own.update_count == built_in.update_count


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("name", BUILT_IN)
@pytest.mark.parametrize("rule", [{}, {"clip_norm": 0.1}, {"accumulate": 2}], ids=["plain", "clipping", "accumulation"])
def test_single_updates_in_fp32(name, place, rule):
    function, y = BUILT_IN[name]
    own, built_in = (engine_of(loss, SGD(1.0, **rule), **{**place, "precision": "fp32"}) for loss in (function, name))
    for start in range(0, ROWS - BATCH, BATCH // 4):
        own.load_state_dict(built_in.state_dict())
        for engine in (own, built_in):
            # the second batch of an update is a short one
            rows = slice(start, start + BATCH + 8 * ("accumulate" in rule))
            weights = None if name == "mae" else WEIGHTS[rows]
            engine.fit(X[rows], y[rows], epochs=1, sample_weight=weights, shuffle=False)
        # gradients are sums over 32 rows of numbers below 1, through three layers
        assert_alike(own, built_in, 3 * (2 * BATCH**0.5 + 4) * 2.0**-24)


@pytest.mark.parametrize("plan", ["resident", "eager"])
@pytest.mark.parametrize("attack", [fusemlp.FGSM(0.1), fusemlp.PGD(0.2, norm="2", steps=2)])
def test_it_trains_against_attacks_as_the_built_in_loss(attack, plan):
    own, built_in = (engine_of(loss, net={"dropout": 0.1}, plan=plan) for loss in (cross_entropy, "cross_entropy"))
    histories = [
        engine.fit(X, LABELS, epochs=10, adversarial=attack, sample_weight=WEIGHTS).history
        for engine in (own, built_in)
    ]
    np.testing.assert_allclose(histories[0]["loss"], histories[1]["loss"], rtol=1e-9)
    assert_alike(own, built_in)


@pytest.mark.parametrize("activation", ["tanh", "gelu", "prelu"])
def test_outputs_are_those_after_the_activation(activation):
    own, built_in = (engine_of(loss, net={"output_activation": activation}) for loss in (mae, "mae"))
    for engine in (own, built_in):
        engine.fit(X, VALUES, epochs=20)
    assert_alike(own, built_in, 0.0)
    assert "own_loss mae" in str(own.program)
    assert str(own.program).endswith("9 calls, run as one loop over the steps that pauses at own_loss: 1 launch")


def test_columns_of_codes():
    coding = Coding((Column(WORD, 5), Column(NUMBERS, 1)))
    coded = Columns(coding, np.column_stack([RANDOM.integers(0, 5, ROWS), X[:, 0]]))
    own, built_in = (engine_of(loss) for loss in (mae, "mae"))
    for engine in (own, built_in):
        engine.fit(coded, VALUES, epochs=20, validation_data=(coded[:9], VALUES[:9]))
        engine.step(coded[:9], VALUES[:9])
    assert_alike(own, built_in, 0.0)


@pytest.mark.parametrize("batches", [False, True])
@pytest.mark.parametrize("name", ["mse", "cross_entropy", "binary_cross_entropy"])
def test_weights_of_rows(name, batches):
    function, y = BUILT_IN[name]
    weights = np.where(np.arange(ROWS) % 7, WEIGHTS, 0.0)
    parts = [slice(start, start + BATCH) for start in range(0, ROWS, BATCH)]
    train = ([(X[part], y[part], weights[part]) for part in parts],) if batches else (X, y)
    beside = {} if batches else {"sample_weight": weights}
    own, built_in = (engine_of(loss) for loss in (function, name))
    histories = [
        engine.fit(*train, epochs=5, **beside, validation_data=(X, y, weights)).history for engine in (own, built_in)
    ]
    for quantity in ("loss", "val_loss"):
        np.testing.assert_allclose(histories[0][quantity], histories[1][quantity], rtol=1e-9)
    assert_alike(own, built_in)
    for engine in (own, built_in):
        engine.step(X[:10], y[:10], weights[:10])
    assert_alike(own, built_in)


def test_a_batch_without_weight_changes_nothing():
    engine = engine_of(mse, SGD(0.1))
    before = engine.state_dict()
    assert engine.fit(X[:33], VALUES[:33], epochs=1, shuffle=False, sample_weight=np.eye(33)[32]).history["loss"]
    assert engine.update_count == 2
    first = engine_of(mse, SGD(0.1))
    first.step(X[32:33], VALUES[32:33])
    assert_alike(engine, first)
    assert not np.array_equal(before["0.weight"], engine.state_dict()["0.weight"])


@pytest.mark.parametrize("place", PLACES)
def test_targets_come_as_they_were_given(place):
    kinds = []

    def seen(outputs, targets):
        kinds.append((outputs.dtype, targets.dtype, targets.shape))
        # of the function's own
        outputs *= 0
        targets[:] = 0
        return 0.0, outputs

    engine = engine_of(seen, **{**place, "precision": "fp32"})
    gaps = np.where(VALUES > 1, np.nan, VALUES)
    for y in (LABELS, YES.astype(bool), gaps, np.zeros((ROWS, 2, 4), np.float32), np.zeros((ROWS, 2, 2), np.uint8)):
        engine.step(X[:5], y[:5])
        engine.fit(X, y, epochs=1, validation_data=(X[:9], y[:9]))
        assert y.ndim == 3 or y.any()
        wanted = np.float32 if y.dtype.kind == "f" else np.int64
        assert kinds == [(np.float32, wanted, (rows, *y.shape[1:])) for rows in (5, 32, 32, 32, 4, 9)]
        kinds.clear()


@pytest.mark.parametrize("place", PLACES[1:])
def test_early_stopping_and_callbacks(place):
    class Watch(Callback):
        batches = 0

        def on_batch_end(self, engine, batch):
            self.batches += 1

    own, built_in = (engine_of(loss, Adam(0.05), **place) for loss in (mae, "mae"))
    watches = Watch(), Watch()
    histories = [
        engine.fit(X, VALUES, epochs=200, validation_split=0.3, early_stopping=3, callbacks=[watch], metrics=["rmse"])
        for engine, watch in zip((own, built_in), watches, strict=True)
    ]
    assert histories[0].stopped == histories[1].stopped != ""
    assert histories[0].best_epoch == histories[1].best_epoch
    assert histories[0].history["val_rmse"] == histories[1].history["val_rmse"]
    assert_alike(own, built_in, 0.0)
    assert watches[0].batches == watches[1].batches
    rel = 1e-6 if place is ON_TRITON else 1e-12
    assert own.evaluate(X, VALUES)["loss"] == pytest.approx(built_in.evaluate(X, VALUES)["loss"], rel=rel)
    assert np.array_equal(own.predict(X), own.outputs(X))
    own.lr_find(X, VALUES, steps=20)
    own.probe(X, VALUES, epochs=1)


def test_the_loss_of_fit_and_step_is_the_engines_from_then_on():
    engine, built_in = engine_of("cross_entropy"), engine_of("mae")
    for epochs in (2, 3):
        engine.fit(X, VALUES, epochs=epochs, loss=mae)
        built_in.fit(X, VALUES, epochs=epochs)
    engine.step(X[:9], VALUES[:9], loss=lambda outputs, targets: mae(outputs, targets))
    built_in.step(X[:9], VALUES[:9])
    assert_alike(engine, built_in, 0.0)
    assert engine.loss.name == "<lambda>"
    engine.step(X[:9], VALUES[:9], loss="mse")
    built_in.step(X[:9], VALUES[:9], loss=mse)
    assert_alike(engine, built_in)
    assert engine.loss.kind == "mse"
    assert "loss mse," in [line[:9] for line in summary(engine)]
    with pytest.raises(DataError, match="y: expected finite numbers"):
        engine.fit(X, np.full_like(VALUES, np.nan), epochs=1, loss="mae")
    with pytest.raises(ShapeError, match="y: expected 100 rows"):
        engine.fit(X, VALUES[:9], epochs=1, loss=mae)
    assert engine.loss.kind == "mse"


def summary(engine):
    lines = []
    engine.summary(lambda text: lines.extend(text.splitlines()))
    return lines


def failing(after, error=RuntimeError):
    """Return mae that fails at its call ``after``."""
    calls = []

    def loss(outputs, targets):
        calls.append(len(outputs))
        if len(calls) == after:
            raise error("of the caller")
        return mae(outputs, targets)

    return loss


@pytest.mark.parametrize("place", PLACES)
def test_an_error_leaves_the_engine_as_it_was_before_the_step(place):
    # the tenth batch is the second of epoch 2
    engine, same = (engine_of(loss, Adam(0.01, accumulate=2), **place) for loss in (failing(10), mae))
    with pytest.raises(RuntimeError, match="of the caller"):
        engine.fit(X, VALUES, epochs=5)

    class Stop(Callback):
        def on_batch_end(self, engine, batch):
            engine.stop_training = engine.epochs_trained == 2

    same.fit(X, VALUES, epochs=5, callbacks=[Stop()])
    before = engine.memory.snapshot()
    assert_same(before, same.memory.snapshot())
    assert (engine.fit_state.epoch, engine.fit_state.batch) == (2, 1)
    with pytest.raises(ZeroDivisionError):
        engine.step(X[:5], VALUES[:5], loss=lambda outputs, targets: 1 / 0)
    after = engine.memory.snapshot()
    # the rows of a batch are arguments of a step
    after["counters"][[ROW_COUNT, ROW_STEP]] = before["counters"][[ROW_COUNT, ROW_STEP]]
    assert_same(before, after)
    # and it goes on from there
    for one in (engine, same):
        one.fit(X, VALUES, epochs=5, resume=True)
    assert_alike(engine, same, 0.0)


def test_targets_that_broadcast_are_named():
    def squares(outputs, targets):
        return 1.0, outputs - targets

    engine = Engine(MLP([INPUTS, 1]), squares, batch_size=BATCH, backend="numpy")
    words = (
        r"has shape \(32, 32\); expected \(32, 1\), .*; targets have shape \(32,\): reshape them, targets\[:, None\]"
    )
    with pytest.raises(ShapeError, match=words):
        engine.step(X[:BATCH], VALUES[:BATCH, 0])


WRONG = {
    "no pair": (lambda y, t: 1.0, ArgumentTypeError, r"'<lambda>' returned float; expected \(loss, gradient\)"),
    "shape": (lambda y, t: (1.0, y[0]), ShapeError, r"has shape \(3,\); expected \(32, 3\)"),
    "whole": (lambda y, t: (1.0, y > 0), DTypeError, r"has dtype (torch\.)?bool; expected real numbers"),
    "no array": (
        lambda y, t: (1.0, None),
        FusemlpError,
        r"has shape \(\); expected \(32, 3\)|is NoneType; expected a te",
    ),
    "text": (lambda y, t: ("1", y), ArgumentTypeError, "'<lambda>' returned '1'; expected one number"),
    "several": (lambda y, t: (y[0], y), ArgumentTypeError, r"returned an array of shape \(3,\); expected one number"),
    "complex": (lambda y, t: (1j, y), ArgumentTypeError, "'<lambda>' returned 1j; expected one number"),
    "nan": (lambda y, t: (1.0, y * np.nan), DataError, "its gradient is nan at row 0, column 0 of"),
    "infinite": (lambda y, t: (np.inf, y), DataError, "'<lambda>' of finite outputs is not finite: it is inf"),
}


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_answer_is_refused(name, place):
    function, error, words = WRONG[name]
    engine = engine_of(mae, **place)
    engine.step(X[:BATCH], VALUES[:BATCH])
    before = engine.memory.snapshot()
    for train in (partial(engine.step, X[:BATCH], VALUES[:BATCH]), partial(engine.fit, X, VALUES, epochs=1)):
        with pytest.raises(error, match=words), np.errstate(all="ignore"):
            train(loss=function)
        after = engine.memory.snapshot()
        # a fit counts its losses from 0
        for kept in (before, after):
            kept["counters"][ROW_COUNT : ROW_STEP + 1] = kept["stats"][:] = 0
        assert_same(before, after)


@PLACES[-1].marks[0]
def test_functions_of_tensors():
    torch = pytest.importorskip("torch")

    def by_autograd(outputs, targets):
        assert outputs.dtype == torch.float32
        assert outputs.is_contiguous()
        loss = torch.nn.functional.cross_entropy(outputs.requires_grad_(), targets)
        return loss, torch.autograd.grad(loss, outputs)[0]

    y = torch.from_numpy(LABELS)
    for precision, bound in (("fp32", 1e-6), ("fp16", 2e-3)):
        options = {"batch_size": BATCH, "backend": "triton", "precision": precision}
        own, built_in = (
            Engine(MLP([INPUTS, 8, OUTPUTS]), loss, Adam(0.01), **options) for loss in (by_autograd, "cross_entropy")
        )
        scale = own.memory.hyper[LOSS_SCALE] * 1
        histories = [engine.fit(X, y, epochs=10, validation_data=(X, y)).history for engine in (own, built_in)]
        for quantity in ("loss", "val_loss"):
            np.testing.assert_allclose(histories[0][quantity], histories[1][quantity], rtol=bound)
        assert own.update_count == built_in.update_count == 40
        assert own.memory.hyper[LOSS_SCALE] == scale
        assert (own.plan, own.plan_reason) == ("eager", CALLS)
    # gradients that overflow in fp16 at this scale skip their batch
    own.step(X[:5], y[:5], loss=lambda outputs, targets: (1.0, outputs * 0 + 1e4))
    assert own.memory.hyper[LOSS_SCALE] == scale / 2
    built_in.fit(X, y, epochs=1, loss=by_autograd)
    assert built_in.plan_reason == CALLS
    built_in.step(X[:5], y[:5], loss="cross_entropy")
    assert built_in.plan_reason != CALLS
    wrong = "cpu" if torch.cuda.is_available() else "meta"
    with pytest.raises(ArgumentTypeError, match=f"is on {wrong}; expected a tensor on .*, as the outputs are"):
        own.step(X[:5], y[:5], loss=lambda outputs, targets: (1.0, torch.zeros(5, OUTPUTS, device=wrong)))


def test_plans_on_a_card():
    traits, features = TRAITS["triton"], as_loss(mae).uses
    for plan in ("auto", "graph"):
        assert choose_plan(plan, traits, MLP([64, 32, 10]), 32, "fp32", features=features) == ("eager", CALLS)
    for plan in ("resident", "card", "chip"):
        with pytest.raises(BackendUnavailableError, match="kernel trains without a loss of the caller's; use plan='au"):
            choose_plan(plan, traits, MLP([64, 32, 10]), 32, "fp32", features=features)
    # with several processes too, which else capture their launches
    assert shared_plan(("eager", CALLS), traits, Sharding(ORDERED, 2)) == ("eager", CALLS)
    # a function of arrays trains as it did where a card is
    assert refused_by(features, "numpy") is None
    assert "a function such as 'mae' gets NumPy arrays; ask for tensors by" in refused_by(features, "triton")
    with pytest.raises(
        BackendUnavailableError, match="a function such as 'mae' is not supported yet on the backend 'c"
    ):
        engine_of(mae, backend="cupy", precision="fp32")


def test_large_gradients_and_divergence():
    engine_of(lambda y, t: (1.0, y * 0 + 1e200)).step(X[:5], VALUES[:5])
    engine = engine_of(mse, SGD(1e6))
    with np.errstate(all="ignore"), pytest.raises(DivergenceError, match="back at the state before that epoch"):
        engine.fit(X, VALUES, epochs=20)
    assert all(np.isfinite(array).all() for array in engine.state_dict().values())


def test_functions_that_cannot_be_a_loss():
    for function in (lambda outputs: 0, lambda outputs, targets, gamma: 0, lambda: 0):
        with pytest.raises(ArgumentTypeError, match="loss: '<lambda>' is called with outputs, targets and, if it has"):
            engine_of(function)
    assert as_loss(partial(lambda outputs, targets, gamma: 0, gamma=2.0)).name == "<lambda>"
    for value in (3, fusemlp.MSE, type("Mine", (fusemlp.Loss,), {})()):
        with pytest.raises(
            ArgumentTypeError, match=r"loss: expected a name such as 'mse', .* or a function f\(outputs"
        ):
            engine_of(value)
    with pytest.raises(ArgumentError, match="sample_weight: the loss 'mae' takes outputs and targets alone; give it a"):
        engine_of(mae).fit(X, VALUES, epochs=1, sample_weight=WEIGHTS)
    for name, words in (
        ("accuracy", r"give a function .* such as \(outputs\.argmax"),
        ("f1", "for these give a function"),
    ):
        with pytest.raises(ArgumentError, match=f"metrics: .*{words}"):
            engine_of(cross_entropy).evaluate(X, LABELS, metrics=[name])
    with pytest.raises(ArgumentError, match="class_weight: it needs one class for each row"):
        engine_of(cross_entropy).fit(X, LABELS, epochs=1, class_weight="balanced")
    for y, error in ((5.0, ShapeError), (np.full(ROWS, np.inf), DataError), (np.full(ROWS, "a"), DTypeError)):
        with pytest.raises(error, match=r"^y: "):
            engine_of(mae).fit(X, y, epochs=1)
    with pytest.raises(DataError, match="y: 18446744073709551615 is beyond the largest int64"):
        engine_of(mae).fit(X, np.full(ROWS, 2**64 - 1, np.uint64), epochs=1)
    batches = [(X[:5], LABELS[:5]), (X[:5], LABELS[:5, None])]
    with pytest.raises(DataError, match=r"batch 2 has other parts than batch 1; .* targets of one shape and type"):
        engine_of(lambda y, t: (0.0, y)).fit(batches, epochs=1)


def test_what_does_not_go_with_it():
    with pytest.raises(ArgumentError, match="loss: a function such as 'mae' is not supported yet for tables"):
        TableRegressor(loss=mae).fit(X, VALUES[:, 0])
    engine = engine_of("mae", net={"members": 2})
    with pytest.raises(ArgumentError, match="loss: a function such as 'mae' takes a network without members"):
        engine.fit(X, VALUES, epochs=1, loss=mae)
    assert engine.loss.kind == "mae"


def test_files_hold_the_name_and_ask_for_the_function(tmp_path):
    path, model = tmp_path / "c.safetensors", tmp_path / "m.safetensors"
    engine = engine_of(mae)
    halfway(engine, path, 6, X, VALUES, epochs=3)
    engine.save(model)
    for read in (fusemlp.load, fusemlp.load_checkpoint):
        without = read(path)
        assert without.predict(X).shape == (ROWS, OUTPUTS)
        for use in (
            lambda e=without: e.fit(X, VALUES, epochs=3, resume=True),
            lambda e=without: e.evaluate(X, VALUES),
            lambda e=without: e.step(X[:5], VALUES[:5]),
        ):
            with pytest.raises(ArgumentError, match=r"trained with 'mae', a function, .* load\(path, loss=mae\)"):
                use()
        resumed = read(path, loss=mae)
        resumed.fit(X, VALUES, epochs=3, resume=True)
        assert_alike(resumed, engine, 0.0)
        without.fit(X, VALUES, epochs=3, resume=True, loss=mae)
        assert_alike(without, engine, 0.0)
    assert_alike(fusemlp.load(model, loss=mae), engine, 0.0)
    with pytest.raises(CheckpointError, match="loss: the file was trained with 'mae', got 'mse'; give that"):
        fusemlp.load(model, loss=mse)
    engine_of("mse").save(model)
    with pytest.raises(CheckpointError, match="loss: the file was trained with 'mse', got 'mae'; give that"):
        fusemlp.load(model, loss=mae)


def test_copies_keep_the_function_if_it_pickles():
    engine = engine_of(mse)
    engine.fit(X, VALUES, epochs=1)
    for other in (pickle.loads(pickle.dumps(engine)), copy.deepcopy(engine)):
        other.fit(X, VALUES, epochs=1)
        assert other.loss.function is mse
    unnamed = engine_of(lambda outputs, targets: mse(outputs, targets))
    assert copy.deepcopy(unnamed).loss is unnamed.loss
    with pytest.raises(ArgumentError, match="trained with '<lambda>', a function"):
        pickle.loads(pickle.dumps(unnamed)).evaluate(X, VALUES)
    assert isinstance(unnamed.loss, OwnLoss)


def test_check_gradient():
    y, t = VALUES[:4], RANDOM.normal(size=(4, OUTPUTS))
    # the differences' truncation and rounding are below 1e-9 here
    for function, targets in ((mse, t), (cross_entropy, LABELS[:4]), (bce, YES[:4])):
        assert fusemlp.check_gradient(function, y, targets, WEIGHTS[:4]) < 1e-8
    assert fusemlp.check_gradient(mae, y, t) < 1e-8
    with pytest.raises(ArgumentError, match=r"the gradient of '<lambda>' at row 1, column 2 is .*, differences of the"):
        fusemlp.check_gradient(lambda y, t: (mse(y, t)[0], mse(y, t)[1] + np.eye(4, 3, 1)[:, ::1] * [0, 0, 1]), y, t)
    with pytest.raises(ArgumentError, match="a mean over rows divides the gradient too"):
        fusemlp.check_gradient(lambda y, t: (mse(y, t)[0], 4 * mse(y, t)[1]), y, t)
    with pytest.raises(ArgumentError, match="weights: the loss 'mae' takes outputs and targets alone"):
        fusemlp.check_gradient(mae, y, t, WEIGHTS[:4])
    with pytest.raises(ShapeError, match="has shape"):
        fusemlp.check_gradient(lambda y, t: (0.0, y[0]), y, t)


def test_losses_of_torch_are_refused():
    torch = pytest.importorskip("torch")
    for loss, name in ((torch.nn.MSELoss(), "MSELoss"), (torch.nn.functional.mse_loss, "mse_loss")):
        with pytest.raises(fusemlp.ArgumentTypeError, match=f"^loss: torch's {name} computes on tensors; .*fuse$"):
            fusemlp.Engine(fusemlp.MLP([3, 1]), loss=loss)
