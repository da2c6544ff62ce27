"""Several epochs in one launch leave the same state as epochs that a callback hears of one by one."""

import numpy as np
import pytest

from fusemlp import MLP, SGD, Adam, Callback, Cosine, DivergenceError, Engine, StepDecay, load_checkpoint
from fusemlp.runtime.programs import BoundProgram
from fusemlp.training.loop import EpochLoop
from make import assert_same_state

ROWS, EPOCHS = 45, 7
random = np.random.default_rng(0)
X = random.standard_normal((ROWS, 12)).astype(np.float32)
Y = random.integers(0, 5, ROWS)


def engine(optimizer=None, **options):
    net = MLP([12, 9, 5], dropout=0.25)
    return Engine(net, "cross_entropy", optimizer or Adam(0.01), 8, 3, backend="numpy", **options)


class Listener(Callback):
    def __init__(self):
        self.heard = []

    def on_epoch_end(self, engine, epoch, logs):
        self.heard.append(epoch)


def launches(monkeypatch):
    """The steps of each launch from now on."""
    steps, run = [], BoundProgram.run_many

    def counted(self, count):
        steps.append(count)
        run(self, count)

    monkeypatch.setattr(BoundProgram, "run_many", counted)
    return steps


@pytest.mark.parametrize("drop_last", [False, True])
@pytest.mark.parametrize(
    "optimizer",
    [Adam(Cosine(0.02)), SGD(StepDecay(0.1, every=9, gamma=0.5), momentum=0.9, accumulate=4), SGD(0.1)],
    ids=["cosine", "accumulated", "constant"],
)
def test_nobody_can_tell(optimizer, drop_last, monkeypatch):
    together, apart, listener = engine(optimizer), engine(optimizer), Listener()
    steps = launches(monkeypatch)
    together.fit(X, Y, epochs=EPOCHS, drop_last=drop_last)
    batches = 5 if drop_last else 6
    assert steps == [EPOCHS * batches]
    apart.fit(X, Y, epochs=EPOCHS, drop_last=drop_last, callbacks=[listener])
    assert listener.heard == list(range(EPOCHS)) and steps[1:] == [batches] * EPOCHS
    assert_same_state(together, apart)
    for one in (together, apart):
        one.fit(X, Y, epochs=2, drop_last=drop_last)
    assert_same_state(together, apart)


def test_a_launch_is_no_longer_than_the_rows_that_there_is_room_for(monkeypatch):
    monkeypatch.setattr("fusemlp.training.loop.ROWS_AT_ONCE", 3 * ROWS + 1)
    steps, whole, cut = launches(monkeypatch), engine(), engine()
    cut.fit(X, Y, epochs=EPOCHS)
    assert steps == [18, 18, 6]
    monkeypatch.undo()
    whole.fit(X, Y, epochs=EPOCHS)
    assert_same_state(cut, whole)


def test_the_training_loss_stops_after_its_epoch():
    stops = {"epochs": 40, "monitor": "loss", "early_stopping": 2}
    alone, apart = engine(SGD(2.0)), engine(SGD(2.0))
    history = alone.fit(X, Y, **stops)
    assert len(history.epochs) == (history.best_epoch or 0) + 3 < 40
    apart.fit(X, Y, **stops, callbacks=[Listener()])
    assert_same_state(alone, apart)


def diverged(callbacks=()):
    """Return an engine, and the error with which its squares overflow: the rate makes them grow with each epoch."""
    linear = Engine(MLP([12, 1]), "mse", SGD(0.5), 8, 3, backend="numpy", precision="fp32")
    with pytest.raises(DivergenceError) as caught:
        linear.fit(X, X[:, :1] * 2.0, epochs=2000, callbacks=callbacks)
    return linear, str(caught.value)


def test_the_epoch_that_diverged_is_found_and_those_before_it_are_kept():
    (together, words), (apart, expected) = diverged(), diverged([Listener()])
    assert words == expected
    assert 2 < together.epochs_trained == apart.epochs_trained < 2000
    assert_same_state(together, apart)


@pytest.mark.filterwarnings("ignore:y. the targets are far")
def test_a_later_fit_that_diverges_goes_back_to_what_the_one_before_left():
    linear = Engine(MLP([12, 1]), "mse", Adam(0.01), 8, 3, backend="numpy", precision="fp32")
    for _ in range(2):
        linear.fit(X, X[:, :1] * 2.0, epochs=2)
        before = linear.state_dict()
        with pytest.raises(DivergenceError):
            linear.fit(X, X[:, :1] * 1e30, epochs=2)
        assert all(np.array_equal(value, before[name]) for name, value in linear.state_dict().items())


@pytest.mark.parametrize("key", ["Ctrl-C", "stop_training"])
@pytest.mark.parametrize("steps", [600, 601, 6 * 700 - 1])
def test_an_epoch_that_diverged_is_found_where_the_training_is_ended_after_it(key, steps, monkeypatch):
    """Behind the last batch of an epoch, or in one: the launch went on for long after the loss was infinite."""

    def run(self):
        self.bound.chunk, launched = steps, []
        self.begin()
        for count in self.training(lambda: key == "Ctrl-C" and bool(launched)):
            self.bound.run_many(count)
            launched.append(count)
            self.engine.stop_training = key == "stop_training"
        return self.state.history

    with monkeypatch.context() as patch:
        patch.setattr(EpochLoop, "run", run)
        together, words = diverged()
    apart, expected = diverged([Listener()])
    assert words == expected and 2 < apart.epochs_trained < 100
    assert_same_state(together, apart)


@pytest.mark.parametrize("steps", [7, 12, 13])
def test_what_was_trained_before_ctrl_c_is_kept_and_goes_on(steps, tmp_path, monkeypatch):
    whole, stopped = engine(), engine()
    whole.fit(X, Y, epochs=EPOCHS)

    def run(self):
        # a launch of ``steps``, behind which the key was pressed
        self.bound.chunk, launched = steps, []
        self.begin()
        for count in self.training(lambda: bool(launched)):
            self.bound.run_many(count)
            launched.append(count)
        self.finish(interrupted=True)
        return self.state.history

    with monkeypatch.context() as patch:
        patch.setattr(EpochLoop, "run", run)
        history = stopped.fit(X, Y, epochs=EPOCHS)
    ended, left = divmod(steps, 6)
    assert len(history.epochs) == ended == stopped.epochs_trained
    assert history.stopped == (f"interrupted in epoch {ended + 1}" if left else f"interrupted after epoch {ended}")
    assert history.history["loss"] == whole.history.history["loss"][:ended]
    stopped.save_checkpoint(tmp_path / "there")
    resumed = load_checkpoint(tmp_path / "there")
    resumed.fit(X, Y, epochs=EPOCHS, resume=True)
    assert_same_state(resumed, whole)


def test_what_is_raised_in_a_launch_leaves_the_accounts_of_the_epochs_before_it(monkeypatch):
    """Such as a second Ctrl-C: no epoch is counted of which there is no record."""
    stopped, run = engine(), BoundProgram.run_many
    stopped.fit(X, Y, epochs=2)

    def pressed(self, count):
        run(self, count)
        if self.chunk == 9:
            raise KeyboardInterrupt
        self.chunk = 9

    with monkeypatch.context() as patch:
        patch.setattr(BoundProgram, "run_many", pressed)
        patch.setattr("fusemlp.runtime.programs.resident_chunk", lambda *_: 13)
        with pytest.raises(KeyboardInterrupt):
            stopped.fit(X, Y, epochs=EPOCHS)
    state = stopped.fit_state
    assert (state.epoch, state.batch, stopped.epochs_trained) == (2, 0, 2)
    assert stopped.fit(X, Y, epochs=EPOCHS, resume=True).epochs == list(range(2, 2 + EPOCHS))
