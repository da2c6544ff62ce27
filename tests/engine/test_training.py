"""The fit loop: the order of training, the records, and the end."""

import signal
import threading
from fnmatch import fnmatchcase

import numpy as np
import pytest

import fusemlp
from fusemlp import MLP, SGD, Adam, DivergenceError
from fusemlp_kernels import availability
from fusemlp_kernels.philox import row_order
from make import assert_same

NO_TRITON = availability()["triton"]
ROWS, INPUTS, CLASSES, BATCH, SEED = 70, 6, 4, 16, 5
BATCHES = 5  # four of 16 rows, one of 6
NET = MLP([INPUTS, 12, CLASSES])
DROPPING = MLP([INPUTS, 12, CLASSES], activation="gelu", dropout=0.3)


def data(rows=ROWS, seed=1):
    """Return labels that can be learned from the features."""
    X = np.random.default_rng(seed).standard_normal((rows, INPUTS)).astype(np.float32)
    return X, (X @ np.random.default_rng(0).standard_normal((INPUTS, CLASSES))).argmax(axis=1)


X, y = data()
XV, YV = data(41, seed=2)
TARGET, TARGET_V = np.eye(CLASSES)[y], np.eye(CLASSES)[YV]
WEIGHT = np.random.default_rng(3).uniform(0.1, 2.0, ROWS)


def make(net=NET, optimizer=None, **options):
    options = {"batch_size": BATCH, "seed": SEED, "backend": "numpy", **options}
    return fusemlp.Engine(net, optimizer=SGD(0.1, momentum=0.9) if optimizer is None else optimizer, **options)


def differ(one, other):
    other = other.state_dict()
    return [name for name, array in one.state_dict().items() if not np.array_equal(array, other[name])]


def train_by_steps(engine, epochs, weight=None, batches=BATCHES, order=None):
    for epoch in epochs:
        rows = row_order(len(X), engine.seed, epoch) if order is None else order
        for batch in range(batches):
            chosen = rows[batch * BATCH : (batch + 1) * BATCH]
            engine.step(X[chosen], y[chosen], None if weight is None else weight[chosen])


class Recorder(fusemlp.Callback):
    """Record every stage, and the parameters at the end of each epoch."""

    def __init__(self):
        self.stages, self.states = [], []

    def on_train_begin(self, engine):
        self.stages.append("train begin")

    def on_epoch_begin(self, engine, epoch):
        self.stages.append(f"epoch {epoch} begin")

    def on_batch_end(self, engine, batch):
        self.stages.append(f"batch {batch}")

    def on_epoch_end(self, engine, epoch, logs):
        self.stages.append(f"epoch {epoch} end")
        self.states.append(engine.memory.snapshot())

    def on_train_end(self, engine, history):
        self.stages.append("train end")


class At(fusemlp.Callback):
    """Run an action after one batch of one epoch."""

    def __init__(self, epoch, batch, action):
        self.place, self.action, self.epoch = (epoch, batch), action, 0

    def on_epoch_begin(self, engine, epoch):
        self.epoch = epoch

    def on_batch_end(self, engine, batch):
        if (self.epoch, batch) == self.place:
            self.action(engine)


def stop(engine):
    engine.stop_training = True


def interrupt(engine):
    signal.raise_signal(signal.SIGINT)


class TestHistory:
    def test_keys_and_lengths_are_those_of_keras(self):
        history = make().fit(X, y, epochs=3, validation_data=(XV, YV))
        assert list(history.history) == ["loss", "accuracy", "val_loss", "val_accuracy", "learning_rate"]
        assert all(len(values) == 3 for values in history.history.values())
        assert all(type(value) is float for values in history.history.values() for value in values)
        assert history.epochs == [0, 1, 2]
        assert len(history.seconds) == 3 and min(history.seconds) > 0.0
        assert history.best_epoch == int(np.argmin(history.history["val_loss"]))
        assert history.stopped == ""
        # a line, also of hundreds of epochs
        loss, accuracy, *_ = (values[-1] for values in history.history.values())
        assert repr(history).startswith(f"<History: 3 epochs, loss {loss:.4g}, accuracy {accuracy:.4g}, val_loss ")
        history.stopped = "the time is over"
        assert repr(history).endswith("learning_rate 0.1; the time is over>")
        assert repr(fusemlp.History()) == "<History: 0 epochs>"

    def test_without_validation_data_or_classes_there_is_less(self):
        history = make().fit(X, y, epochs=2)
        assert list(history.history) == ["loss", "accuracy", "learning_rate"]
        assert history.best_epoch is None
        history = make(MLP([INPUTS, 5, 2]), loss="mse").fit(X, X[:, :2], epochs=1, validation_data=(XV, XV[:, :2]))
        assert list(history.history) == ["loss", "val_loss", "learning_rate"]

    def test_epochs_are_counted_over_the_life_of_the_engine(self):
        engine = make()
        assert engine.history is None
        assert engine.fit(X, y, epochs=2).epochs == [0, 1]
        history = engine.fit(X, y, epochs=1)
        assert engine.history is history
        assert history.epochs == [2]
        assert len(history.history["loss"]) == 1
        assert engine.epochs_trained == 3

    @pytest.mark.parametrize("reduction", ["mean", "sum"])
    @pytest.mark.parametrize("weight", [None, WEIGHT], ids=["unweighted", "weighted"])
    def test_the_loss_is_that_of_all_rows(self, reduction, weight):
        # with a learning rate of 0 every batch sees the same network
        engine = make(optimizer=SGD(0.0), loss=fusemlp.CrossEntropy(reduction=reduction), precision="fp64")
        history = engine.fit(X, y, epochs=1, sample_weight=weight).history
        expected = engine.evaluate(X, y, weight)
        assert history["loss"][0] == pytest.approx(expected["loss"], rel=1e-12)
        assert history["accuracy"][0] == expected["accuracy"]

    def test_the_loss_is_that_before_each_update(self):
        engine, other = make(precision="fp64"), make(precision="fp64")
        order = row_order(ROWS, SEED, 0)
        rows = [order[start : start + BATCH] for start in range(0, ROWS, BATCH)]
        losses = [float(other.step(X[chosen], y[chosen])) for chosen in rows]
        history = engine.fit(X, y, epochs=1).history
        expected = sum(loss * len(chosen) for loss, chosen in zip(losses, rows, strict=True)) / ROWS
        assert history["loss"][0] == pytest.approx(expected, rel=1e-12)


def fit(epochs, rows=ROWS, **options):
    return lambda engine: engine.fit(X[:rows], y[:rows], epochs=epochs, **options)


def steps(*epochs, **options):
    return lambda engine: train_by_steps(engine, epochs, **options)


def both(first, second):
    return lambda engine: (first(engine), second(engine))


def in_a_thread(engine):
    thread = threading.Thread(target=fit(2), args=(engine,))
    thread.start()
    thread.join()


def interrupted_after_an_epoch(engine):
    with pytest.raises(KeyboardInterrupt):
        engine.fit(X, y, epochs=2, callbacks=[At(0, BATCHES - 1, interrupt)])


STRAIGHT = np.arange(ROWS)
# A plan, and two ways of training that are the same.
SAME = {
    "a given order": ("resident", fit(3), fit(3, row_order=lambda epoch: row_order(ROWS, SEED, epoch))),
    "two calls": ("resident", fit(3), both(fit(1), fit(2))),
    "no shuffling": ("eager", fit(2, shuffle=False), steps(0, 1, order=STRAIGHT)),
    "drop_last": ("eager", fit(2, drop_last=True), steps(0, 1, batches=BATCHES - 1)),
    "drop_last of whole batches": ("resident", fit(1, rows=64, drop_last=True), fit(1, rows=64)),
    "a last batch of one row": ("eager", fit(1, rows=33, shuffle=False), steps(0, batches=3, order=STRAIGHT[:33])),
    "weights of one": ("resident", fit(2, sample_weight=np.ones(ROWS)), fit(2)),
    "steps after a fit": ("eager", fit(2), both(fit(1), steps(1))),
    "a thread": ("resident", fit(2), in_a_thread),
    "Ctrl-C after an epoch": ("resident", fit(2), both(interrupted_after_an_epoch, fit(1))),
}


@pytest.mark.parametrize("case", SAME)
def test_two_ways_of_the_same_training(case):
    plan, *ways = SAME[case]
    engines = [make(DROPPING, Adam(0.01), plan=plan) for _ in ways]
    for engine, train in zip(engines, ways, strict=True):
        train(engine)
    assert_same(*engines)
    assert engines[0].update_count == engines[1].update_count > 0


def test_another_seed_trains_otherwise():
    one, other = make(), make(seed=SEED + 1)
    other.load_state_dict(one.state_dict())
    one.fit(X, y, epochs=1)
    other.fit(X, y, epochs=1)
    assert differ(one, other) == list(one.state_dict())


class TestBatches:
    @pytest.mark.parametrize(
        "optimizer", [SGD(0.1), SGD(0.1, momentum=0.9, clip_norm=0.5), fusemlp.AdamW(0.01, accumulate=2)], ids=repr
    )
    @pytest.mark.parametrize("weight", [None, WEIGHT], ids=["unweighted", "weighted"])
    def test_fit_is_steps_bit_for_bit(self, optimizer, weight):
        one, other = make(DROPPING, optimizer, plan="eager"), make(DROPPING, optimizer)
        one.fit(X, y, epochs=2, sample_weight=weight)
        train_by_steps(other, range(2), weight)
        assert_same(one, other)
        assert one.update_count == other.update_count == 2 * BATCHES // optimizer.accumulate

    def test_a_batch_larger_than_the_data_is_clipped_with_a_warning(self):
        one, other = make(batch_size=100), make(batch_size=ROWS)
        with pytest.warns(UserWarning, match="batch_size: 100 is more than the 70 rows of X") as caught:
            one.fit(X, y, epochs=2)
        assert [warning.filename for warning in caught] == [__file__]
        other.fit(X, y, epochs=2)
        assert_same(one, other)

    @pytest.mark.parametrize("reduction", ["mean", "sum"])
    @pytest.mark.parametrize("kind", [fusemlp.CrossEntropy, fusemlp.MSE])
    def test_a_weight_of_two_is_a_row_given_twice(self, kind, reduction):
        target = y[:9] if kind is fusemlp.CrossEntropy else np.eye(CLASSES)[y[:9]]
        weights = np.array([1, 2, 1, 0, 3, 1, 1, 2, 1])
        repeated = np.repeat(np.arange(9), weights)
        one, other = (make(loss=kind(reduction=reduction), optimizer=SGD(0.1), precision="fp64") for _ in range(2))
        weighted = float(one.step(X[:9], target, weights))
        assert weighted == pytest.approx(float(other.step(X[repeated], target[repeated])), rel=1e-12)
        for name, array in one.state_dict().items():
            np.testing.assert_allclose(array, other.state_dict()[name], rtol=0, atol=1e-13)

    def test_a_fit_too_short_for_one_update_is_warned_of(self):
        engine = make(optimizer=SGD(0.1, accumulate=1000))
        before = engine.state_dict()
        with pytest.warns(UserWarning, match="accumulate: an update takes 1000 batches and this fit has only"):
            engine.fit(X, y, epochs=2)
        assert engine.update_count == 0
        assert_same(engine.state_dict(), before)

    def test_one_class_only_is_warned_of(self):
        with pytest.warns(UserWarning, match="y: every label is 2; a classifier needs examples of two") as caught:
            make().fit(X, np.full(ROWS, 2), epochs=1)
        assert [warning.filename for warning in caught] == [__file__]


class TestStep:
    def test_a_returned_loss_is_never_overwritten(self):
        engine = make()
        losses = [engine.step(X[:16], y[:16]) for _ in range(6)]
        kept = [float(loss) for loss in losses]
        engine.fit(X, y, epochs=1)
        engine.evaluate(X, y)
        assert [float(loss) for loss in losses] == kept
        assert len(set(kept)) == 6
        assert all(isinstance(loss, np.ndarray) and loss.shape == () for loss in losses)
        assert {loss.dtype for loss in losses} == {np.dtype(np.float32)}

    @pytest.mark.parametrize("rows", [1, 2, 15, 16])
    def test_any_number_of_rows_up_to_a_batch(self, rows):
        one, other = (make(optimizer=SGD(0.1), precision="fp64", batch_size=size) for size in (BATCH, rows))
        for engine in (one, other):
            engine.step(X[:rows], y[:rows])
        before = one.state_dict()
        # Values left from a longer batch do not count.
        one.step(X[20:36], y[20:36])
        one.load_state_dict(before)
        for engine in (one, other):
            engine.step(X[40 : 40 + rows], y[40 : 40 + rows])
        for name, array in one.state_dict().items():
            np.testing.assert_allclose(array, other.state_dict()[name], rtol=0, atol=1e-13)

    def test_targets_and_weights_may_change_their_kind(self):
        engine, other = make(optimizer=SGD(0.1), precision="fp64"), make(optimizer=SGD(0.1), precision="fp64")
        for soft, weighted in ((False, False), (True, True), (True, False), (False, True), (False, False)):
            weight = np.ones(8) if weighted else None
            engine.step(X[:8], np.eye(CLASSES)[y[:8]] if soft else y[:8], weight)
            other.step(X[:8], y[:8])
        for name, array in engine.state_dict().items():
            np.testing.assert_allclose(array, other.state_dict()[name], rtol=0, atol=1e-13)

    @pytest.mark.parametrize("after", [SGD(0.5, momentum=0.9), SGD(0.1, momentum=0.5, clip_norm=0.01)], ids=repr)
    def test_it_follows_another_optimizer(self, after):
        one, other = make(), make()
        one.step(X[:16], y[:16])
        other.fit(X[:16], y[:16], epochs=1, shuffle=False)
        one.optimizer = other.optimizer = after
        one.step(X[:16], y[:16])
        other.fit(X[:16], y[:16], epochs=1, shuffle=False)
        assert_same(one, other)


class TestCallbacks:
    def test_stopping_after_a_batch(self):
        engine, other, recorder = make(plan="eager"), make(), Recorder()
        history = engine.fit(X, y, epochs=5, callbacks=[recorder, At(1, 2, stop)])
        assert history.epochs == [0]
        assert history.stopped == "a callback stopped the training"
        assert recorder.stages[-2:] == ["batch 2", "train end"]
        train_by_steps(other, [0])
        train_by_steps(other, [1], batches=3)
        assert_same(engine, other)

    def test_an_error_in_a_callback_passes_through(self):
        def fail(engine):
            raise LookupError("mine")

        engine = make()
        with pytest.raises(LookupError, match="mine"):
            engine.fit(X, y, epochs=2, callbacks=[At(1, 1, fail)])
        assert engine.history.epochs == [0]
        assert engine.update_count == BATCHES + 2
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
        engine.fit(X, y, epochs=1)

    def test_a_callback_may_evaluate_and_predict(self):
        one, other = make(DROPPING), make(DROPPING)
        look = At(0, 1, lambda engine: (engine.evaluate(XV, YV), engine.predict(XV), engine.dead_units(XV)))
        assert one.fit(X, y, epochs=2, callbacks=[look, Recorder()]).history == other.fit(X, y, epochs=2).history
        assert_same(one, other)


class TestLearningRate:
    def test_the_reduced_rate_is_the_one_that_is_used(self):
        # nothing improves by so much, but the first epoch counts as better than none: the third has half the rate
        reduced = make(optimizer=SGD(fusemlp.ReduceOnPlateau(0.1, factor=0.5, patience=1, min_delta=1e9), momentum=0.9))
        stepped = make(optimizer=SGD(fusemlp.StepDecay(0.1, every=2 * BATCHES, gamma=0.5), momentum=0.9))
        reduced.fit(X, y, epochs=3)
        stepped.fit(X, y, epochs=3)
        assert_same(reduced, stepped)

    def test_another_fit_begins_with_the_whole_rate(self):
        engine = make(optimizer=SGD(fusemlp.ReduceOnPlateau(0.1, factor=0.5, patience=1, min_delta=1e9)))
        assert engine.fit(X, y, epochs=3).history["learning_rate"] == pytest.approx([0.1, 0.1, 0.05])
        assert engine.fit(X, y, epochs=1).history["learning_rate"] == pytest.approx([0.1])


class TestInterrupt:
    def test_ctrl_c_ends_after_the_batch_with_everything_kept(self):
        engine, other, recorder = make(DROPPING, Adam(0.01)), make(DROPPING, Adam(0.01)), Recorder()
        with pytest.raises(KeyboardInterrupt):
            engine.fit(X, y, epochs=5, callbacks=[At(1, 2, interrupt), recorder])
        assert engine.history.epochs == [0]
        assert len(engine.history.history["loss"]) == 1
        assert engine.history.stopped == "interrupted in epoch 2"
        assert engine.epochs_trained == 1
        assert engine.update_count == BATCHES + 3
        assert recorder.stages[-2:] == ["batch 2", "train end"]
        other.fit(X, y, epochs=5, callbacks=[At(1, 2, stop)])
        assert_same(engine, other)

    def test_the_handler_is_put_back_and_a_last_epoch_that_was_done_is_recorded(self):
        engine = make()
        with pytest.raises(KeyboardInterrupt):
            engine.fit(X, y, epochs=1, callbacks=[At(0, BATCHES - 1, interrupt)])
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
        assert engine.history.epochs == [0]
        assert engine.history.stopped == "interrupted after epoch 1"

    def test_a_second_ctrl_c_is_raised_at_once(self):
        seen = []

        def twice(engine):
            signal.raise_signal(signal.SIGINT)
            seen.append("still here")
            signal.raise_signal(signal.SIGINT)
            seen.append("never")

        with pytest.raises(KeyboardInterrupt):
            make().fit(X, y, epochs=1, callbacks=[At(0, 1, twice)])
        assert seen == ["still here"]

    def test_early_stopping_leaves_the_last_weights_when_interrupted(self):
        engine, recorder = make(), Recorder()
        calls = [recorder, At(1, BATCHES - 1, interrupt)]
        with pytest.raises(KeyboardInterrupt):
            engine.fit(X, y, epochs=3, validation_data=(XV, YV), early_stopping=5, callbacks=calls)
        np.testing.assert_array_equal(engine.memory.params, recorder.states[-1]["params"])


class TestDivergence:
    def test_the_last_good_epoch_comes_back(self):
        # two good epochs, then a rate that nothing survives
        schedule = fusemlp.StepDecay(0.01, every=2 * BATCHES, gamma=1e25)
        engine, recorder = make(MLP([INPUTS, 12, CLASSES]), SGD(schedule, momentum=0.5), loss="mse"), Recorder()
        with pytest.raises(DivergenceError, match="loss: it became NaN or infinite in epoch 3"):
            engine.fit(X, TARGET, epochs=6, callbacks=[recorder])
        assert engine.epochs_trained == 2
        assert engine.history.epochs == [0, 1]
        assert engine.history.stopped == "the loss became NaN or infinite in epoch 3"
        assert engine.update_count == 2 * BATCHES
        assert_same(engine.memory.snapshot(), recorder.states[-1])
        assert np.isfinite(engine.evaluate(X, TARGET)["loss"])

    def test_a_loss_of_validation_rows_that_is_not_finite_is_a_divergence(self):
        # one update an epoch: the third leaves parameters that are finite, and outputs that are not
        schedule = fusemlp.StepDecay(0.01, every=2, gamma=1e30)
        engine, recorder = make(optimizer=SGD(schedule), loss="mse", batch_size=ROWS), Recorder()
        given = {"validation_data": (XV, TARGET_V), "early_stopping": 5, "callbacks": [recorder]}
        with pytest.raises(DivergenceError, match=r"^val_loss: it became NaN or infinite in epoch 3.*far from those"):
            engine.fit(X, TARGET, epochs=6, **given)
        assert engine.epochs_trained == 2 and len(engine.history.history["val_loss"]) == 2
        assert engine.history.best_epoch == 1
        assert engine.history.stopped == "the loss became NaN or infinite in epoch 3 on the validation rows"
        assert_same(engine.memory.snapshot(), recorder.states[-1])

    def test_validation_rows_that_overflow_are_named(self):
        engine, far = make(loss="mse"), XV.copy()
        far[3, 1] = 1e25
        with pytest.raises(DivergenceError, match=r"^val_loss: .*; or the validation rows are far from those"):
            engine.fit(X, TARGET, epochs=2, validation_data=(far, TARGET_V))

    def test_the_learning_rate_is_named(self):
        engine = make(optimizer=SGD(1e6), loss="mse")
        with pytest.raises(DivergenceError, match=r"a learning rate of 1e\+06 is too high .* try 0\.1, or clip_norm"):
            engine.fit(X, TARGET, epochs=5)

    def test_features_that_were_not_scaled_are_named(self):
        engine = make(optimizer=SGD(0.1), loss="mse")
        message = r"features as large as .* were not scaled: standardise them .* normalise=True"
        with pytest.warns(fusemlp.InputScaleWarning), pytest.raises(DivergenceError, match=message):
            engine.fit(X * 1e5, TARGET, epochs=5)

    def test_a_last_update_that_overflows_is_noticed(self):
        # one batch an epoch: the loss of the first is finite, and what its update leaves is not
        engine = make(optimizer=SGD(1e39), loss="mse", batch_size=ROWS)
        before = engine.state_dict()
        scaled = pytest.warns(fusemlp.TargetScaleWarning, match="standard deviation")
        with scaled, pytest.raises(DivergenceError, match="in epoch 1"):
            engine.fit(X, 1e3 * TARGET, epochs=2)
        assert_same(engine.state_dict(), before)


@pytest.mark.parametrize("optimizer", [SGD, Adam, fusemlp.AdamW])
@pytest.mark.parametrize("clip", [None, 1.0], ids=["plain", "clipped"])
@pytest.mark.parametrize("pattern", ["0.*", "2.*", "*.bias", "4.weight", "1.weight", "*"])
def test_frozen_parameters_stay_as_they_are(optimizer, clip, pattern):
    net = MLP([INPUTS, 8, 7, CLASSES], activation=["prelu", "gelu"])
    frozen = {pattern: fusemlp.ParameterOptions(trainable=False)}
    engine = make(net, optimizer(0.05, weight_decay=0.1, clip_norm=clip, per_parameter=frozen))
    before = make(net)
    engine.fit(X, y, epochs=2)
    names = list(net.parameter_shapes())
    assert differ(engine, before) == [name for name in names if not fnmatchcase(name, pattern)]


@pytest.mark.parametrize(
    "backend",
    ["numpy", pytest.param("triton", marks=pytest.mark.skipif(NO_TRITON is not None, reason=f"triton: {NO_TRITON}"))],
)
@pytest.mark.parametrize("optimizer", [SGD(0.1), SGD(0.1, clip_norm=1.0), SGD(0.1, accumulate=2)], ids=str)
def test_loaded_parameters_know_nothing_of_an_overflow(backend, optimizer):
    """A step that overflows spoils only the parameters: after loading good ones, training works as before."""
    rng = np.random.default_rng(0)
    x, y = rng.standard_normal((16, 3)).astype(np.float32), rng.standard_normal((16, 3)).astype(np.float32)
    lost, whole = (
        fusemlp.Engine(MLP([3, 4, 3]), loss="mse", optimizer=optimizer, batch_size=16, backend=backend, normalise=False)
        for _ in range(2)
    )
    for _ in range(2):
        lost.step(x * np.float32(1e25), y)
    assert not np.isfinite(lost.state_dict()["0.weight"]).any()
    lost.load_state_dict(whole.state_dict())
    assert [float(lost.step(x, y)) for _ in range(5)] == [float(whole.step(x, y)) for _ in range(5)]
