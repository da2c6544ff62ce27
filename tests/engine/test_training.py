"""The fit loop: the order of training, the records, and the end."""

from __future__ import annotations

import pickle
import signal
import threading
from fnmatch import fnmatchcase

import numpy as np
import pytest

from fusemlp import (
    MLP,
    MSE,
    SGD,
    Adam,
    AdamW,
    Callback,
    Constant,
    Cosine,
    CrossEntropy,
    DivergenceError,
    Engine,
    InputScaleWarning,
    ParameterOptions,
    ReduceOnPlateau,
    StepDecay,
)
from fusemlp_kernels.philox import row_order

ROWS, INPUTS, CLASSES, BATCH, SEED = 70, 6, 4, 16, 5
BATCHES = 5  # four of 16 rows, one of 6
NET = MLP([INPUTS, 12, CLASSES])
DROPPING = MLP([INPUTS, 12, CLASSES], activation="gelu", dropout=0.3)


def data(rows=ROWS, seed=1):
    """Return labels that can be learned from the features."""
    rng = np.random.default_rng(seed)
    X = rng.standard_normal((rows, INPUTS)).astype(np.float32)
    return X, (X @ np.random.default_rng(0).standard_normal((INPUTS, CLASSES))).argmax(axis=1)


X, y = data()
XV, YV = data(41, seed=2)
WEIGHT = np.random.default_rng(3).uniform(0.1, 2.0, ROWS)


def make(net=NET, optimizer=None, **options):
    options = {"batch_size": BATCH, "seed": SEED, "backend": "numpy", **options}
    return Engine(net, optimizer=SGD(0.1, momentum=0.9) if optimizer is None else optimizer, **options)


def assert_same_parameters(one, other):
    """Assert equality bit for bit."""
    one, other = (engine.state_dict() if isinstance(engine, Engine) else engine for engine in (one, other))
    assert one.keys() == other.keys()
    for name, array in one.items():
        np.testing.assert_array_equal(array, other[name], err_msg=name)


def differ(one, other):
    other = other.state_dict()
    return [name for name, array in one.state_dict().items() if not np.array_equal(array, other[name])]


def train_by_steps(engine, epochs, weight=None, batches=BATCHES, order=None):
    for epoch in range(epochs):
        rows = row_order(len(X), engine.seed, epoch) if order is None else order(epoch)
        for batch in range(batches):
            chosen = rows[batch * BATCH : (batch + 1) * BATCH]
            engine.step(X[chosen], y[chosen], None if weight is None else weight[chosen])


class Recorder(Callback):
    """Record every stage, and the parameters at the end of each epoch."""

    def __init__(self):
        self.stages, self.states, self.rates = [], [], []

    def on_train_begin(self, engine):
        self.stages.append("train begin")

    def on_epoch_begin(self, engine, epoch):
        self.stages.append(f"epoch {epoch} begin")

    def on_batch_end(self, engine, batch):
        self.stages.append(f"batch {batch}")
        self.rates.append(engine.learning_rate)

    def on_epoch_end(self, engine, epoch, logs):
        self.stages.append(f"epoch {epoch} end")
        self.states.append(engine.memory.snapshot())

    def on_train_end(self, engine, history):
        self.stages.append("train end")


class At(Callback):
    """Run an action after one batch of one epoch."""

    def __init__(self, epoch, batch, action):
        self.place, self.action, self.epoch = (epoch, batch), action, 0

    def on_epoch_begin(self, engine, epoch):
        self.epoch = epoch

    def on_batch_end(self, engine, batch):
        if (self.epoch, batch) == self.place:
            self.action(engine)


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

    def test_without_validation_data_there_is_no_validation(self):
        history = make().fit(X, y, epochs=2)
        assert list(history.history) == ["loss", "accuracy", "learning_rate"]
        assert history.best_epoch is None

    def test_regression_has_no_accuracy(self):
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
        engine = make(optimizer=SGD(0.0), loss=CrossEntropy(reduction=reduction), precision="fp64")
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

    def test_validation_is_what_evaluate_says(self):
        found = []

        class Evaluate(Callback):
            def on_epoch_end(self, engine, epoch, logs):
                expected = engine.evaluate(XV, YV, np.ones(len(XV)))
                found.append((logs["val_loss"] - expected["loss"], logs["val_accuracy"] - expected["accuracy"]))

        weights = np.ones(len(XV))
        make(DROPPING).fit(X, y, epochs=3, validation_data=(XV, YV, weights), callbacks=[Evaluate()])
        assert found == [(0.0, 0.0)] * 3

    def test_validation_weights_count(self):
        engine = make(optimizer=SGD(0.0), precision="fp64")
        weights = np.arange(len(XV)) % 3
        history = engine.fit(X, y, epochs=1, validation_data=(XV, YV, weights)).history
        kept = np.repeat(np.arange(len(XV)), weights)
        assert history["val_loss"][0] == pytest.approx(engine.evaluate(XV[kept], YV[kept])["loss"], rel=1e-12)

    def test_training_learns(self):
        history = make(optimizer=Adam(0.01)).fit(X, y, epochs=60).history
        assert history["loss"][-1] < 0.2 * history["loss"][0]
        assert history["accuracy"][-1] > 0.95


class TestOrder:
    def test_the_same_seed_trains_the_same_bit_for_bit(self):
        engines = [make(DROPPING, Adam(0.01)) for _ in range(2)]
        histories = [engine.fit(X, y, epochs=3, sample_weight=WEIGHT).history for engine in engines]
        assert_same_parameters(*engines)
        assert histories[0] == histories[1]

    def test_another_seed_trains_otherwise(self):
        one, other = make(), make(seed=SEED + 1)
        other.load_state_dict(one.state_dict())
        one.fit(X, y, epochs=1)
        other.fit(X, y, epochs=1)
        assert differ(one, other) == list(one.state_dict())

    def test_the_order_is_a_function_of_seed_and_epoch(self):
        one, other = make(), make()
        one.fit(X, y, epochs=3)
        other.fit(X, y, epochs=3, row_order=lambda epoch: row_order(ROWS, SEED, epoch))
        assert_same_parameters(one, other)

    def test_two_calls_are_one_longer_call(self):
        one, other = make(DROPPING), make(DROPPING)
        one.fit(X, y, epochs=3)
        other.fit(X, y, epochs=1)
        other.fit(X, y, epochs=2)
        assert_same_parameters(one, other)

    def test_every_epoch_has_an_order_of_its_own(self):
        orders = {tuple(row_order(ROWS, SEED, epoch)) for epoch in range(5)}
        assert len(orders) == 5

    def test_without_shuffling_the_rows_come_as_they_are(self):
        one, other = make(plan="eager"), make()
        one.fit(X, y, epochs=2, shuffle=False)
        train_by_steps(other, 2, order=lambda epoch: np.arange(ROWS))
        assert_same_parameters(one, other)

    def test_the_epoch_is_given_to_a_row_order(self):
        engine, seen = make(), []
        engine.fit(X, y, epochs=2, row_order=lambda epoch: seen.append(epoch) or np.arange(ROWS))
        engine.fit(X, y, epochs=1, row_order=lambda epoch: seen.append(epoch) or np.arange(ROWS, dtype=np.uint32))
        assert seen == [0, 1, 2]


class TestBatches:
    @pytest.mark.parametrize("optimizer", [SGD(0.1), SGD(0.1, momentum=0.9, clip_norm=0.5), AdamW(0.01, accumulate=2)])
    @pytest.mark.parametrize("weight", [None, WEIGHT], ids=["unweighted", "weighted"])
    def test_fit_is_steps_bit_for_bit(self, optimizer, weight):
        one, other = make(DROPPING, optimizer, plan="eager"), make(DROPPING, optimizer)
        one.fit(X, y, epochs=2, sample_weight=weight)
        train_by_steps(other, 2, weight)
        assert_same_parameters(one, other)
        assert one.update_count == other.update_count == 2 * BATCHES // optimizer.accumulate

    def test_the_last_short_batch_is_trained(self):
        engine = make()
        engine.fit(X, y, epochs=3)
        assert engine.update_count == 3 * BATCHES

    def test_drop_last_leaves_it_out(self):
        one, other = make(plan="eager"), make()
        one.fit(X, y, epochs=2, drop_last=True)
        train_by_steps(other, 2, batches=BATCHES - 1)
        assert_same_parameters(one, other)
        assert one.update_count == 2 * (BATCHES - 1)

    def test_drop_last_keeps_whole_batches(self):
        one, other = make(), make()
        one.fit(X[:64], y[:64], epochs=1, drop_last=True)
        other.fit(X[:64], y[:64], epochs=1)
        assert_same_parameters(one, other)

    def test_a_batch_larger_than_the_data_is_clipped_with_a_warning(self):
        one, other = make(batch_size=100), make(batch_size=ROWS)
        with pytest.warns(UserWarning, match="batch_size: 100 is more than the 70 rows of X") as caught:
            one.fit(X, y, epochs=2)
        assert [warning.filename for warning in caught] == [__file__]
        other.fit(X, y, epochs=2)
        assert_same_parameters(one, other)

    def test_a_single_row_can_be_trained_on(self):
        engine = make(batch_size=1)
        history = engine.fit(X[:1], y[:1], epochs=30).history
        assert history["loss"][-1] < history["loss"][0]

    def test_a_batch_of_one_row_at_the_end(self):
        one, other = make(plan="eager"), make()
        one.fit(X[:33], y[:33], epochs=1, shuffle=False)
        for start in (0, 16, 32):
            other.step(X[start : min(start + 16, 33)], y[start : min(start + 16, 33)])
        assert_same_parameters(one, other)

    @pytest.mark.parametrize("reduction", ["mean", "sum"])
    @pytest.mark.parametrize("kind", [CrossEntropy, MSE])
    def test_a_weight_of_two_is_a_row_given_twice(self, kind, reduction):
        target = y[:9] if kind is CrossEntropy else np.eye(CLASSES)[y[:9]]
        weights = np.array([1, 2, 1, 0, 3, 1, 1, 2, 1])
        repeated = np.repeat(np.arange(9), weights)
        one, other = (make(loss=kind(reduction=reduction), optimizer=SGD(0.1), precision="fp64") for _ in range(2))
        weighted = float(one.step(X[:9], target, weights))
        assert weighted == pytest.approx(float(other.step(X[repeated], target[repeated])), rel=1e-12)
        for name, array in one.state_dict().items():
            np.testing.assert_allclose(array, other.state_dict()[name], rtol=0, atol=1e-13)

    def test_weights_of_one_change_nothing(self):
        one, other = make(), make()
        one.fit(X, y, epochs=2, sample_weight=np.ones(ROWS))
        other.fit(X, y, epochs=2)
        assert_same_parameters(one, other)

    def test_a_fit_too_short_for_one_update_is_warned_of(self):
        engine = make(optimizer=SGD(0.1, accumulate=1000))
        before = engine.state_dict()
        with pytest.warns(UserWarning, match="accumulate: an update takes 1000 batches and this fit has only"):
            engine.fit(X, y, epochs=2)
        assert engine.update_count == 0
        assert all(np.array_equal(before[name], value) for name, value in engine.state_dict().items())

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

    def test_the_loss_is_that_before_the_update(self):
        engine = make(precision="fp64")
        expected = engine.evaluate(X[:7], y[:7])["loss"]
        assert float(engine.step(X[:7], y[:7])) == pytest.approx(expected, rel=1e-12)

    @pytest.mark.parametrize("rows", [1, 2, 15, 16])
    def test_any_number_of_rows_up_to_a_batch(self, rows):
        one, other = (
            make(optimizer=SGD(0.1), precision="fp64"),
            make(optimizer=SGD(0.1), batch_size=rows, precision="fp64"),
        )
        # Values left from a longer batch do not count.
        for engine in (one, other):
            engine.step(X[:rows], y[:rows])
        before = one.state_dict()
        one.step(X[20:36], y[20:36])
        one.load_state_dict(before)
        one.step(X[40 : 40 + rows], y[40 : 40 + rows])
        other.step(X[40 : 40 + rows], y[40 : 40 + rows])
        for name, array in one.state_dict().items():
            np.testing.assert_allclose(array, other.state_dict()[name], rtol=0, atol=1e-13)

    def test_nan_in_x_is_a_nan_loss(self):
        engine = make()
        bad = X[:4].copy()
        bad[1, 2] = np.nan
        assert np.isnan(engine.step(bad, y[:4]))

    def test_targets_and_weights_may_change_their_kind(self):
        engine, other = make(optimizer=SGD(0.1), precision="fp64"), make(optimizer=SGD(0.1), precision="fp64")
        for soft, weighted in ((False, False), (True, True), (True, False), (False, True), (False, False)):
            weight = np.ones(8) if weighted else None
            engine.step(X[:8], np.eye(CLASSES)[y[:8]] if soft else y[:8], weight)
            other.step(X[:8], y[:8])
        for name, array in engine.state_dict().items():
            np.testing.assert_allclose(array, other.state_dict()[name], rtol=0, atol=1e-13)

    def test_steps_between_fits_go_on(self):
        one, other = (make(optimizer=Adam(0.01), plan="eager") for _ in range(2))
        one.fit(X, y, epochs=1)
        order = row_order(ROWS, SEED, 1)
        for start in range(0, ROWS, BATCH):
            one.step(X[order[start : start + BATCH]], y[order[start : start + BATCH]])
        other.fit(X, y, epochs=2)
        assert_same_parameters(one, other)

    @pytest.mark.parametrize("after", [SGD(0.5, momentum=0.9), SGD(0.1, momentum=0.5, clip_norm=0.01)], ids=repr)
    def test_it_follows_another_optimizer(self, after):
        one, other = make(), make()
        one.step(X[:16], y[:16])
        other.fit(X[:16], y[:16], epochs=1, shuffle=False)
        one.optimizer = other.optimizer = after
        one.step(X[:16], y[:16])
        other.fit(X[:16], y[:16], epochs=1, shuffle=False)
        assert_same_parameters(one, other)


class TestEarlyStopping:
    NOISE = np.random.default_rng(9).integers(0, CLASSES, ROWS)

    def fit(self, patience, epochs=200):
        """Return random labels: the network memorises them, so the validation loss soon grows."""
        engine, recorder = make(MLP([INPUTS, 40, CLASSES]), Adam(0.01)), Recorder()
        history = engine.fit(
            X, self.NOISE, epochs=epochs, validation_data=(XV, YV), early_stopping=patience, callbacks=[recorder]
        )
        return engine, recorder, history

    @pytest.mark.parametrize("patience", [1, 4])
    def test_ends_after_patience_and_restores_the_best(self, patience):
        engine, recorder, history = self.fit(patience)
        losses = history.history["val_loss"]
        best = int(np.argmin(losses))
        assert len(losses) == best + 1 + patience < 200
        assert history.best_epoch == best
        assert history.stopped == (
            f"val_loss has not improved for {patience} epochs; the weights of epoch {best + 1} were restored"
        )
        np.testing.assert_array_equal(engine.memory.params, recorder.states[best]["params"])
        assert engine.evaluate(XV, YV)["loss"] == losses[best]
        assert recorder.stages[-1] == "train end"

    def test_the_best_is_restored_at_the_end_too(self):
        engine, recorder, history = self.fit(100, epochs=30)
        best = int(np.argmin(history.history["val_loss"]))
        assert best < 29 and history.stopped == ""
        np.testing.assert_array_equal(engine.memory.params, recorder.states[best]["params"])

    def test_without_it_the_last_weights_stay(self):
        engine, recorder = make(MLP([INPUTS, 40, CLASSES]), Adam(0.01)), Recorder()
        engine.fit(X, self.NOISE, epochs=30, validation_data=(XV, YV), callbacks=[recorder])
        np.testing.assert_array_equal(engine.memory.params, recorder.states[-1]["params"])


class TestCallbacks:
    def test_the_order_of_the_stages(self):
        recorder = Recorder()
        make().fit(X, y, epochs=2, callbacks=[recorder])
        epoch = [f"batch {batch}" for batch in range(BATCHES)]
        assert recorder.stages == [
            "train begin",
            *("epoch 0 begin", *epoch, "epoch 0 end"),
            *("epoch 1 begin", *epoch, "epoch 1 end"),
            "train end",
        ]

    def test_several_are_called_in_their_order(self):
        seen = []

        class Named(Callback):
            def __init__(self, name):
                self.name = name

            def on_epoch_end(self, engine, epoch, logs):
                seen.append(self.name)

        make().fit(X, y, epochs=2, callbacks=[Named("a"), Named("b")])
        assert seen == ["a", "b", "a", "b"]

    def test_logs_are_what_the_history_receives(self):
        seen = []

        class Logs(Callback):
            def on_epoch_end(self, engine, epoch, logs):
                seen.append({**logs, "length": len(engine.history.history["loss"])})

        history = make().fit(X, y, epochs=2, validation_data=(XV, YV), callbacks=[Logs()]).history
        for epoch, logs in enumerate(seen):
            assert logs.pop("length") == epoch + 1
            assert logs == {name: values[epoch] for name, values in history.items()}

    def test_an_object_with_one_stage_is_enough(self):
        class Once:
            calls = 0

            def on_train_end(self, engine, history):
                self.calls += 1

        once = Once()
        make().fit(X, y, epochs=1, callbacks=once)
        assert once.calls == 1

    def test_listening_changes_nothing(self):
        one, other = make(DROPPING), make(DROPPING)
        one.fit(X, y, epochs=2, callbacks=[Recorder()])
        other.fit(X, y, epochs=2)
        assert_same_parameters(one, other)

    def test_stopping_after_a_batch(self):
        engine, other, recorder = make(plan="eager"), make(), Recorder()
        stop = At(1, 2, lambda engine: setattr(engine, "stop_training", True))
        history = engine.fit(X, y, epochs=5, callbacks=[recorder, stop])
        assert history.epochs == [0]
        assert history.stopped == "a callback stopped the training"
        assert recorder.stages[-2:] == ["batch 2", "train end"]
        train_by_steps(other, 1)
        rows = row_order(ROWS, SEED, 1)
        for start in (0, 16, 32):
            other.step(X[rows[start : start + 16]], y[rows[start : start + 16]])
        assert_same_parameters(engine, other)

    def test_stopping_after_an_epoch(self):
        class Stop(Callback):
            def on_epoch_end(self, engine, epoch, logs):
                engine.stop_training = epoch == 1

        engine = make()
        history = engine.fit(X, y, epochs=5, callbacks=[Stop()])
        assert history.epochs == [0, 1]
        assert history.stopped == "a callback stopped the training"
        # The request to stop counts once.
        assert engine.fit(X, y, epochs=1).epochs == [2]

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
        assert one.fit(X, y, epochs=2, callbacks=[look]).history == other.fit(X, y, epochs=2).history
        assert_same_parameters(one, other)


class TestLearningRate:
    def test_plateau_reduces_the_rate(self):
        schedule = ReduceOnPlateau(0.1, factor=0.5, patience=2, min_lr=0.03)
        # nothing is trained, so the loss stays as it is and only the first epoch improves on what was before
        frozen = SGD(schedule, per_parameter={"*": ParameterOptions(trainable=False)})
        history = make(optimizer=frozen).fit(X, y, epochs=8, shuffle=False).history
        assert history["learning_rate"] == pytest.approx([0.1, 0.1, 0.1, 0.05, 0.05, 0.03, 0.03, 0.03])
        assert len(set(history["loss"])) == 1

    def test_plateau_watches_the_validation_loss(self):
        engine = make(MLP([INPUTS, 40, CLASSES]), Adam(ReduceOnPlateau(0.01, factor=0.1, patience=1, min_delta=0.0)))
        history = engine.fit(X, TestEarlyStopping.NOISE, epochs=25, validation_data=(XV, YV)).history
        expected, best, rate = [], np.inf, 0.01
        for loss in history["val_loss"]:
            expected.append(rate)
            rate *= 1.0 if loss < best else 0.1
            best = min(best, loss)
        assert history["learning_rate"] == pytest.approx(expected)
        assert expected[-1] < 0.01

    def test_the_reduced_rate_is_the_one_that_is_used(self):
        # nothing improves by so much, but the first epoch counts as better than none: the third has half the rate
        reduced = make(optimizer=SGD(ReduceOnPlateau(0.1, factor=0.5, patience=1, min_delta=1e9), momentum=0.9))
        stepped = make(optimizer=SGD(StepDecay(0.1, every=2 * BATCHES, gamma=0.5), momentum=0.9))
        reduced.fit(X, y, epochs=3)
        stepped.fit(X, y, epochs=3)
        assert_same_parameters(reduced, stepped)

    def test_another_fit_begins_with_the_whole_rate(self):
        engine = make(optimizer=SGD(ReduceOnPlateau(0.1, factor=0.5, patience=1, min_delta=1e9)))
        assert engine.fit(X, y, epochs=3).history["learning_rate"] == pytest.approx([0.1, 0.1, 0.05])
        assert engine.fit(X, y, epochs=1).history["learning_rate"] == pytest.approx([0.1])

    def test_warm_up_grows_to_the_first_rate(self):
        engine, recorder = make(optimizer=SGD(Constant(0.1, warmup=8))), Recorder()
        assert engine.learning_rate == pytest.approx(0.1 / 8)
        engine.fit(X, y, epochs=2, callbacks=[recorder])
        # After a batch the rate is that of the next one.
        assert recorder.rates == pytest.approx([0.1 * min(t + 1, 8) / 8 for t in range(1, 11)])

    def test_the_history_has_the_rate_at_the_end_of_each_epoch(self):
        history = make(optimizer=SGD(StepDecay(0.1, every=BATCHES, gamma=0.5))).fit(X, y, epochs=3).history
        assert history["learning_rate"] == pytest.approx([0.05, 0.025, 0.0125])

    def test_cosine_ends_at_its_final_rate(self):
        history = make(optimizer=SGD(Cosine(0.1, final=0.01))).fit(X, y, epochs=4).history
        assert history["learning_rate"][-1] == pytest.approx(0.01)


class TestInterrupt:
    def interrupt(self, engine):
        signal.raise_signal(signal.SIGINT)

    def test_ctrl_c_ends_after_the_batch_with_everything_kept(self):
        engine, other, recorder = make(DROPPING, Adam(0.01)), make(DROPPING, Adam(0.01)), Recorder()
        with pytest.raises(KeyboardInterrupt):
            engine.fit(X, y, epochs=5, callbacks=[At(1, 2, self.interrupt), recorder])
        assert engine.history.epochs == [0]
        assert len(engine.history.history["loss"]) == 1
        assert engine.history.stopped == "interrupted in epoch 2"
        assert engine.epochs_trained == 1
        assert engine.update_count == BATCHES + 3
        assert recorder.stages[-2:] == ["batch 2", "train end"]
        stop = At(1, 2, lambda engine: setattr(engine, "stop_training", True))
        other.fit(X, y, epochs=5, callbacks=[stop])
        assert_same_parameters(engine, other)

    def test_the_handler_is_put_back(self):
        with pytest.raises(KeyboardInterrupt):
            make().fit(X, y, epochs=1, callbacks=[At(0, 0, self.interrupt)])
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler

    def test_the_last_epoch_is_recorded_when_its_last_batch_was_done(self):
        engine = make()
        with pytest.raises(KeyboardInterrupt):
            engine.fit(X, y, epochs=1, callbacks=[At(0, BATCHES - 1, self.interrupt)])
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

    def test_training_goes_on_afterwards(self):
        engine, other = make(optimizer=SGD(0.1)), make(optimizer=SGD(0.1))
        with pytest.raises(KeyboardInterrupt):
            engine.fit(X, y, epochs=2, callbacks=[At(0, BATCHES - 1, self.interrupt)])
        engine.fit(X, y, epochs=1)
        other.fit(X, y, epochs=2)
        assert_same_parameters(engine, other)

    def test_early_stopping_leaves_the_last_weights_when_interrupted(self):
        engine, recorder = make(), Recorder()
        with pytest.raises(KeyboardInterrupt):
            engine.fit(
                X,
                y,
                epochs=3,
                validation_data=(XV, YV),
                early_stopping=5,
                callbacks=[recorder, At(1, BATCHES - 1, self.interrupt)],
            )
        np.testing.assert_array_equal(engine.memory.params, recorder.states[-1]["params"])

    def test_fit_works_in_another_thread(self):
        engine, other = make(), make()
        thread = threading.Thread(target=lambda: engine.fit(X, y, epochs=2))
        thread.start()
        thread.join()
        other.fit(X, y, epochs=2)
        assert_same_parameters(engine, other)


class TestDivergence:
    def test_the_last_good_epoch_comes_back(self):
        # two good epochs, then a rate that nothing survives
        schedule = StepDecay(0.01, every=2 * BATCHES, gamma=1e25)
        engine, recorder = make(MLP([INPUTS, 12, CLASSES]), SGD(schedule, momentum=0.5), loss="mse"), Recorder()
        target = np.eye(CLASSES)[y]
        with pytest.raises(DivergenceError, match="loss: it became NaN or infinite in epoch 3"):
            engine.fit(X, target, epochs=6, callbacks=[recorder])
        assert engine.epochs_trained == 2
        assert engine.history.epochs == [0, 1]
        assert engine.history.stopped == "the loss became NaN or infinite in epoch 3"
        assert engine.update_count == 2 * BATCHES
        for name, array in engine.memory.snapshot().items():
            np.testing.assert_array_equal(array, recorder.states[-1][name], err_msg=name)
        assert np.isfinite(engine.evaluate(X, target)["loss"])

    def test_a_loss_of_validation_rows_that_is_not_finite_is_a_divergence(self):
        # one update an epoch: the third leaves parameters that are finite, and outputs that are not
        schedule = StepDecay(0.01, every=2, gamma=1e30)
        engine, recorder = make(optimizer=SGD(schedule), loss="mse", batch_size=ROWS), Recorder()
        given = {"validation_data": (XV, np.eye(CLASSES)[YV]), "early_stopping": 5, "callbacks": [recorder]}
        with pytest.raises(DivergenceError, match=r"^val_loss: it became NaN or infinite in epoch 3.*far from those"):
            engine.fit(X, np.eye(CLASSES)[y], epochs=6, **given)
        assert engine.epochs_trained == 2 and len(engine.history.history["val_loss"]) == 2
        assert engine.history.best_epoch == 1
        assert engine.history.stopped == "the loss became NaN or infinite in epoch 3 on the validation rows"
        for name, array in engine.memory.snapshot().items():
            np.testing.assert_array_equal(array, recorder.states[-1][name], err_msg=name)

    def test_validation_rows_that_overflow_are_named(self):
        engine, far = make(loss="mse"), XV.copy()
        far[3, 1] = 1e25
        with pytest.raises(DivergenceError, match=r"^val_loss: .*; or the validation rows are far from those"):
            engine.fit(X, np.eye(CLASSES)[y], epochs=2, validation_data=(far, np.eye(CLASSES)[YV]))

    def test_the_learning_rate_is_named(self):
        engine = make(optimizer=SGD(1e6), loss="mse")
        with pytest.raises(DivergenceError, match=r"a learning rate of 1e\+06 is too high .* try 0\.1, or clip_norm"):
            engine.fit(X, np.eye(CLASSES)[y], epochs=5)

    def test_features_that_were_not_scaled_are_named(self):
        engine = make(optimizer=SGD(0.1), loss="mse")
        message = r"features as large as .* were not scaled: standardise them .* normalise=True"
        with pytest.warns(InputScaleWarning), pytest.raises(DivergenceError, match=message):
            engine.fit(X * 1e5, np.eye(CLASSES)[y], epochs=5)

    def test_a_last_update_that_overflows_is_noticed(self):
        # one batch an epoch: the loss of the first is finite, and what its update leaves is not
        engine = make(optimizer=SGD(1e39), loss="mse", batch_size=ROWS)
        before = engine.state_dict()
        with pytest.raises(DivergenceError, match="in epoch 1"):
            engine.fit(X, 1e3 * np.eye(CLASSES)[y], epochs=2)
        assert_same_parameters(engine, before)

    def test_it_is_an_arithmetic_error_without_a_warning(self):
        # Warnings are errors in this suite, so an overflow that is not silenced would raise.
        with pytest.raises(ArithmeticError):
            make(optimizer=SGD(1e30), loss="mse").fit(X, np.eye(CLASSES)[y], epochs=1)

    def test_training_can_go_on_more_gently(self):
        engine, other = make(optimizer=SGD(1e30), loss="mse"), make(optimizer=SGD(0.01), loss="mse")
        with pytest.raises(DivergenceError):
            engine.fit(X, np.eye(CLASSES)[y], epochs=1)
        gentle = make(optimizer=SGD(0.01), loss="mse", seed=SEED)
        gentle.load_state_dict(engine.state_dict())
        gentle.fit(X, np.eye(CLASSES)[y], epochs=1)
        other.fit(X, np.eye(CLASSES)[y], epochs=1)
        assert_same_parameters(gentle, other)


class TestParameterOptions:
    @pytest.mark.parametrize("optimizer", [SGD, Adam, AdamW])
    @pytest.mark.parametrize("clip", [None, 1.0], ids=["plain", "clipped"])
    @pytest.mark.parametrize("pattern", ["0.*", "2.*", "*.bias", "4.weight", "1.weight", "*"])
    def test_frozen_parameters_stay_as_they_are(self, optimizer, clip, pattern):
        net = MLP([INPUTS, 8, 7, CLASSES], activation=["prelu", "gelu"])
        frozen = {pattern: ParameterOptions(trainable=False)}
        engine = make(net, optimizer(0.05, weight_decay=0.1, clip_norm=clip, per_parameter=frozen))
        before = make(net)
        engine.fit(X, y, epochs=2)
        names = list(net.parameter_shapes())
        assert differ(engine, before) == [name for name in names if not fnmatchcase(name, pattern)]

    def test_a_learning_rate_of_its_own(self):
        halved = {"0.*": ParameterOptions(lr_factor=0.5), "2.bias": ParameterOptions(lr_factor=0.0)}
        one, other = (make(optimizer=SGD(0.1, per_parameter=own), precision="fp64") for own in (halved, {}))
        before = one.state_dict()
        for engine in (one, other):
            engine.step(X[:16], y[:16])
        for name, factor in {"0.weight": 0.5, "0.bias": 0.5, "2.weight": 1.0, "2.bias": 0.0}.items():
            moved, full = one.state_dict()[name] - before[name], other.state_dict()[name] - before[name]
            np.testing.assert_allclose(moved, factor * full, rtol=0, atol=1e-15)
            assert np.abs(full).max() > 1e-4

    def test_frozen_layers_are_still_passed_through(self):
        # Layers above a frozen one train as if nothing below could be trained.
        net = MLP([INPUTS, 8, 7, CLASSES], activation="tanh", dropout=0.2)
        frozen = make(net, SGD(0.1, per_parameter={"[02].*": ParameterOptions(trainable=False)}))
        still = make(net, SGD(0.1, per_parameter={"[02].*": ParameterOptions(lr_factor=0.0)}))
        for engine in (frozen, still):
            engine.fit(X, y, epochs=2)
        assert_same_parameters(frozen, still)


class TestPickle:
    @pytest.mark.parametrize("optimizer", [SGD(0.1), Adam(Cosine(0.01, steps=30)), AdamW(0.01, accumulate=3)], ids=repr)
    def test_a_copy_goes_on_bit_for_bit(self, optimizer):
        engine = make(DROPPING, optimizer)
        engine.fit(X, y, epochs=2)
        copy = pickle.loads(pickle.dumps(engine))
        assert_same_parameters(engine, copy)
        assert copy.history.history == engine.history.history
        assert repr(copy) == repr(engine)
        for one in (engine, copy):
            one.fit(X, y, epochs=2)
            one.step(X[:5], y[:5])
        assert_same_parameters(engine, copy)
        assert copy.history.history == engine.history.history
        assert copy.update_count == engine.update_count

    def test_a_copy_shares_no_memory(self):
        engine = make()
        copy = pickle.loads(pickle.dumps(engine))
        before = engine.state_dict()
        copy.fit(X, y, epochs=1)
        assert_same_parameters(engine, before)

    def test_before_any_training(self):
        copy = pickle.loads(pickle.dumps(make()))
        assert copy.history is None
        assert_same_parameters(copy, make())
