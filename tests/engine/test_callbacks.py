"""Callbacks in the library's form and in Keras's, and the ready-made ones."""

import copy
import csv
import logging
import os
import pickle
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest

import fusemlp
from fusemlp import Callback, CSVLogger, EarlyStopping, ModelCheckpoint, ProgressBar, ReduceLROnPlateau, TensorBoard
from fusemlp_kernels.errors import ArgumentError, ArgumentTypeError
from make import assert_same, engine

RNG = np.random.default_rng(0)
X, XV = RNG.normal(size=(40, 5)), RNG.normal(size=(20, 5))
Y, YV = RNG.integers(0, 3, 40), RNG.integers(0, 3, 20)
BATCHES = 3


def make(optimizer=None):
    """Return an engine that memorises random labels, so that the validation loss soon grows."""
    return engine((5, 30, 3), optimizer=optimizer or fusemlp.Adam(0.02))


def fit(engine, *callbacks, epochs=2, **options):
    return engine.fit(X, Y, epochs=epochs, validation_data=(XV, YV), callbacks=callbacks, **options)


def callback(base=object, **attributes):
    return type("Mine", (base,), attributes)()


class Keras:
    """Record every called method of Keras's form, in order."""

    def __init__(self):
        self.calls = []

    def set_params(self, params):
        self.calls.append(("params", params["epochs"]))

    def set_model(self, model):
        self.model = model
        self.calls.append(("model",))

    def on_train_begin(self, logs=None):
        self.calls.append(("train begin", logs))

    def on_epoch_begin(self, epoch, logs=None):
        self.calls.append(("epoch begin", epoch, logs))

    def on_train_batch_begin(self, batch, logs=None):
        self.calls.append(("batch begin", batch, self.model.update_count))

    def on_train_batch_end(self, batch, logs=None):
        self.calls.append(("batch end", batch, self.model.update_count))

    def on_epoch_end(self, epoch, logs=None):
        self.calls.append(("epoch end", epoch, sorted(logs)))

    def on_train_end(self, logs=None):
        self.calls.append(("train end", sorted(logs)))


class TestForms:
    def test_all_of_keras_in_its_order_which_changes_nothing(self):
        keras, listened, alone = Keras(), make(), make()
        fit(listened, keras)
        names = ["accuracy", "learning_rate", "loss", "val_accuracy", "val_loss"]
        epochs = []
        for epoch in range(2):
            epochs.append(("epoch begin", epoch, {}))
            for batch in range(BATCHES):
                count = BATCHES * epoch + batch
                epochs += [("batch begin", batch, count), ("batch end", batch, count + 1)]
            epochs.append(("epoch end", epoch, names))
        assert keras.calls == [("params", 2), ("model",), ("train begin", {}), *epochs, ("train end", names)]
        fit(alone)
        assert_same(listened, alone)

    @pytest.mark.parametrize("where", ["on_epoch_end", "on_batch_end", "on_train_batch_end"])
    def test_the_model_stops_the_training(self, where):
        def stop(self, number, logs=None):
            self.model.stop_training = True

        engine = make()
        history = fit(engine, callback(**{where: stop}), epochs=5)
        assert engine.update_count == (BATCHES if where == "on_epoch_end" else 1)
        assert history.stopped == "a callback stopped the training"
        # the request counts once
        assert len(fit(engine, epochs=2).epochs) == 2

    def test_names_decide_the_form(self):
        engine, seen = make(), []

        def calls_of(base=object, **methods):
            seen.clear()
            fit(engine, callback(base, **methods), epochs=1)
            return seen

        add = seen.append
        for base in (object, Callback):
            assert calls_of(base, on_epoch_end=lambda self, engine, epoch, logs: add(engine)) == [engine]
            assert calls_of(base, on_epoch_end=lambda self, epoch, logs=None: add(self.model)) == [engine]
        begin, end = lambda self, anything: add(anything), lambda self, anything, batch: add(anything)
        assert calls_of(on_train_begin=begin, on_batch_end=end) == [engine] * (1 + BATCHES)
        begin, end = lambda self, logs=None: add(logs), lambda self, batch, logs=None: add(batch)
        assert calls_of(on_train_begin=begin, on_batch_end=end) == [{}, *range(BATCHES)]

        def more(self, epoch, logs=None, shown=True):
            add((type(epoch), "loss" in logs, shown))

        assert calls_of(on_epoch_end=more) == [(int, True, True)]
        begin, end = lambda self, logs=None: add(self.model), lambda self, engine, history: add(engine)
        assert calls_of(on_train_begin=begin, on_train_end=end) == [engine] * 2

    def test_an_object_without_room_for_the_model(self):
        class Slots:
            __slots__ = ("epochs",)

            def on_epoch_end(self, epoch, logs):
                self.epochs = epoch

        slots = Slots()
        fit(make(), slots)
        assert slots.epochs == 1

    def test_empty_methods_of_a_base_class_of_keras_do_not_count(self):
        def empty(self, batch, logs=None):
            raise AssertionError("called though it is marked as empty")

        empty._is_default = True
        fit(make(), callback(on_train_batch_end=empty, on_epoch_end=lambda self, epoch, logs=None: None))

    def test_exit_is_told_whatever_happens(self):
        seen = []

        class Other:
            def on_epoch_end(self, epoch, logs):
                raise LookupError("mine")

            def on_exit(self):
                seen.append("keras")

        with pytest.raises(LookupError, match="mine"):
            fit(make(), callback(on_exit=lambda self, engine: seen.append("own")), Other())
        assert seen == ["own", "keras"]


WRONG_FORMS = [
    (
        {"on_epoch_end": lambda self, logs: None},
        r"Mine.on_epoch_end\(logs\) cannot be called; expected on_epoch_end\(engine, epoch, logs\) or "
        r"on_epoch_end\(epoch, logs\) as in Keras",
    ),
    ({"on_train_end": lambda self, a, b, c: None}, r"Mine.on_train_end\(a, b, c\)"),
    ({"on_epoch_end": lambda self, *, epoch, logs: None}, "cannot be called"),
    ({"on_train_batch_end": lambda self, a, b, c: None}, r"expected on_train_batch_end\(batch, logs\) as in Keras"),
    (
        {"set_model": lambda self, model: None, "on_epoch_end": lambda self, engine, epoch, logs: None},
        r"Mine.on_epoch_end\(engine, .* cannot be called",
    ),
]


@pytest.mark.parametrize(("methods", "words"), WRONG_FORMS)
def test_what_fits_neither_form_is_refused_before_anything_changed(methods, words):
    engine, keras = make(), Keras()
    with pytest.raises(ArgumentTypeError, match=words):
        fit(engine, keras, callback(**methods))
    assert engine.update_count == 0 and keras.calls == []


# The values of an epoch each, the arguments, the epoch of the stop and that of the best.
STOPS = {
    "patience 0": ([3, 2, 2, 1], {}, 2, 1),
    "never in the first": ([float("inf"), 2, 1], {}, None, 2),
    "patience 2": ([3, 2, 2, 1, 1, 1], {"patience": 2}, 5, 3),
    "min_delta": ([3, 2, 1.95, 1.9], {"patience": 2, "min_delta": 0.2}, 3, 1),
    "min_delta negative": ([3, 2, 1.95, 1.9], {"patience": 2, "min_delta": -0.2}, 3, 1),
    "max": ([0.1, 0.2, 0.2], {"monitor": "val_accuracy", "patience": 1}, 2, 1),
    "mode": ([1, 2, 1], {"mode": "max", "patience": 1}, 2, 1),
    "baseline": ([3, 2.9, 2.8, 2.7], {"baseline": 1.0, "patience": 3}, None, 3),
    "baseline not reached": ([3, 2.9, 2.8, 2.9], {"baseline": 1.0, "patience": 3}, 3, 2),
    "baseline reached": ([3, 0.9, 1, 0.8, 1, 1], {"baseline": 1.0, "patience": 2}, 5, 3),
    "start": ([1, 2, 3, 2, 1.5, 2], {"start_from_epoch": 3, "patience": 1}, 5, 4),
}


class TestEarlyStopping:
    # the last does not stop
    @pytest.mark.parametrize("patience", [1, 3, 1000])
    def test_it_is_the_early_stopping_of_fit(self, patience):
        # with this rate the best is not the first
        engine, twin = make(fusemlp.Adam(0.005)), make(fusemlp.Adam(0.005))
        stop = EarlyStopping(patience=patience, restore_best_weights=True)
        history, expected = fit(engine, stop, epochs=60), fit(twin, epochs=60, early_stopping=patience)
        assert (history.history, history.stopped) == (expected.history, expected.stopped)
        assert (stop.best, stop.best_epoch) == (min(history.history["val_loss"]), history.best_epoch)
        assert stop.best_epoch > 0
        assert patience == 1000 or len(history.epochs) == stop.best_epoch + 1 + patience
        epochs = "1 epoch" if patience == 1 else f"{patience} epochs"
        restored = f"val_loss has not improved for {epochs}; the weights of epoch {stop.best_epoch + 1} were"
        assert history.stopped.startswith(restored) or (patience == 1000 and history.stopped == "")
        assert stop.stopped_epoch == (None if patience == 1000 else history.epochs[-1])
        assert len(history.epochs) == 60 if patience == 1000 else len(history.epochs) < 60
        assert_same(engine, twin)
        assert engine.evaluate(XV, YV)["loss"] == stop.best

    def test_the_last_weights_stay_unless_wanted(self):
        engine, twin = make(), make()
        history = fit(engine, EarlyStopping(patience=2), epochs=60)
        fit(twin, epochs=len(history.epochs))
        assert history.stopped == "val_loss has not improved for 2 epochs"
        assert_same(engine, twin)

    @pytest.mark.parametrize(("values", "options", "stopped", "best"), STOPS.values(), ids=STOPS)
    def test_when_it_stops(self, values, options, stopped, best):
        stop, engine = EarlyStopping(**options), make()
        # in a loop of the caller's own
        stop.model = engine
        stop.on_train_begin()
        for epoch, value in enumerate(values):
            stop.on_epoch_end(epoch, {stop.monitor: value})
            if engine.stop_training:
                break
        stop.on_train_end()
        assert (stop.stopped_epoch, stop.best_epoch, engine.history) == (stopped, best, None)

    def test_a_resumed_fit_stops_where_it_would_have_stopped(self, tmp_path):
        whole = fit(make(), EarlyStopping(patience=3), epochs=60)
        cut = whole.epochs[-1] - 1

        class Cut(Callback):
            def on_epoch_end(self, engine, epoch, logs):
                if epoch + 1 == cut:
                    engine.save_checkpoint(tmp_path / "c")
                    engine.stop_training = True

        def resumed(stop):
            return fit(fusemlp.load_checkpoint(tmp_path / "c"), stop, epochs=60, resume=True)

        fit(make(), EarlyStopping(patience=3), Cut(), epochs=60)
        assert resumed(EarlyStopping(patience=3)).history == whole.history
        with pytest.warns(UserWarning, match=r"the weights of the best epoch so far \(\d+\) are not in the checkpoint"):
            resumed(EarlyStopping(patience=3, restore_best_weights=True))

    def test_it_can_be_used_again_and_is_logged(self, caplog):
        stop, engine = EarlyStopping(patience=1, verbose=1), make()
        with caplog.at_level(logging.INFO, logger="fusemlp.callbacks"):
            first = fit(engine, stop, epochs=60)
        assert caplog.messages == [f"epoch {len(first.epochs)}: val_loss has not improved for 1 epoch"]
        second = fit(engine, stop, epochs=60)
        assert second.epochs[0] == first.epochs[-1] + 1
        assert len(second.epochs) >= 2


class TestModelCheckpoint:
    def test_one_file_an_epoch(self, tmp_path):
        history = fit(make(), ModelCheckpoint(tmp_path / "{epoch:02d}-{val_loss:.2f}.safetensors"), epochs=3)
        losses = history.history["val_loss"]
        names = [f"{epoch + 1:02d}-{loss:.2f}.safetensors" for epoch, loss in enumerate(losses)]
        assert sorted(path.name for path in tmp_path.iterdir()) == names
        resumed = fusemlp.load_checkpoint(tmp_path / names[1])
        assert resumed.epochs_trained == 2
        assert fit(resumed, epochs=3, resume=True).history == history.history

    def test_the_best_alone_if_it_is_better_than_the_threshold(self, tmp_path):
        path = tmp_path / "best.safetensors"
        history = fit(make(), ModelCheckpoint(str(path), save_best_only=True, save_weights_only=True), epochs=40)
        best = fusemlp.load(path)
        assert best.evaluate(XV, YV)["loss"] == min(history.history["val_loss"]) < history.history["val_loss"][-1]
        assert best.update_count == 0
        path.unlink()
        fit(make(), ModelCheckpoint(path, save_best_only=True, initial_value_threshold=0.0))
        assert list(tmp_path.iterdir()) == []

    def test_the_best_of_a_resumed_fit_counts(self, tmp_path):
        path, engine = tmp_path / "best.safetensors", make()
        fit(engine, epochs=30)
        engine.fit_state.last_epoch += 1
        fit(engine, ModelCheckpoint(path, save_best_only=True), epochs=31, resume=True)
        assert not path.exists()


def cells(path, separator=","):
    with path.open(newline="") as stream:
        return list(csv.reader(stream, delimiter=separator))


class TestCSVLogger:
    def test_rows_are_the_history(self, tmp_path):
        history = fit(make(), CSVLogger(tmp_path / "log.csv", separator=";"))
        header, *rows = cells(tmp_path / "log.csv", ";")
        assert header == ["epoch", *history.history]
        numbers = [[float(cell) for cell in row] for row in rows]
        assert numbers == [[epoch, *(values[epoch] for values in history.history.values())] for epoch in range(2)]

    def test_anew_or_below(self, tmp_path):
        engine, path = make(), tmp_path / "log.csv"
        fit(engine, CSVLogger(path))
        fit(engine, CSVLogger(path, append=True))
        assert [row[0] for row in cells(path)] == ["epoch", "0", "1", "2", "3"]
        fit(engine, CSVLogger(path), epochs=1)
        assert [row[0] for row in cells(path)] == ["epoch", "4"]
        before = path.read_bytes()
        with pytest.raises(ArgumentError, match=r"append: .* has the columns epoch, loss, .*; give another filename"):
            engine.fit(X, Y, epochs=1, callbacks=CSVLogger(path, append=True))
        assert path.read_bytes() == before

    def test_numbers_of_other_callbacks_get_columns(self, tmp_path):
        engine, path = make(), tmp_path / "log.csv"
        history = fit(engine, Writer(), CSVLogger(path), epochs=3)
        header, *rows = cells(path)
        assert header == ["epoch", "loss", "accuracy", "val_loss", "val_accuracy", "learning_rate", "val_own", "late"]
        assert [row[-2:] for row in rows] == [["10.0", ""], ["11.0", "7.0"], ["12.0", ""]]
        assert [float(row[1]) for row in rows] == history.history["loss"]
        # appended to, also without that callback
        fit(engine, CSVLogger(path, append=True), epochs=1)
        assert cells(path)[4][-2:] == ["", ""] and len(cells(path)) == 5


class Writer(Callback):
    """Adds a number to the logs of each epoch, and one to those of the second."""

    writes = ("val_own",)

    def on_epoch_end(self, engine, epoch, logs):
        logs["val_own"] = np.float32(10 + epoch)
        if epoch == 1:
            logs["late"] = 7


class TestAddedLogs:
    def test_they_reach_the_history_and_later_callbacks(self, capsys):
        seen = []

        class Reader:
            def on_epoch_end(self, epoch, logs):
                seen.append(logs["val_own"])

            def on_train_end(self, logs):
                seen.append(logs["val_own"])

        history = fit(make(), Writer(), Reader(), ProgressBar(), epochs=3)
        assert history.history["val_own"] == [10.0, 11.0, 12.0]
        assert str(history.history["late"]) == "[nan, 7.0, nan]"
        assert all(type(value) is float for values in history.history.values() for value in values)
        assert seen == [10.0, 11.0, 12.0, 12.0]
        assert "val_own 12" in capsys.readouterr().err.splitlines()[2]
        assert [len(row) for row in history.rows()] == [8] * 3

    def test_a_checkpoint_has_them(self, tmp_path):
        history = fit(make(), Writer(), ModelCheckpoint(tmp_path / "{epoch}-{val_own:.0f}.safetensors"), epochs=2)
        restored = fusemlp.load_checkpoint(tmp_path / "2-11.safetensors")
        assert str(restored.history.history) == str(history.history)
        assert fit(restored, Writer(), epochs=3, resume=True).history["val_own"] == [10.0, 11.0, 12.0]

    def test_a_monitor_follows_what_is_announced(self):
        stopping = EarlyStopping("val_own", mode="min", patience=1)
        assert len(fit(make(), Writer(), stopping, epochs=5).epochs) == 2
        with pytest.raises(ArgumentError, match=r"monitor: 'val_own' is not among .*writes = \('val_own',\)"):
            fit(make(), stopping, Writer())

    def test_what_was_announced_in_vain_is_told(self):
        silent = callback(Callback, writes="val_own", on_epoch_begin=lambda self, engine, epoch: None)
        engine = make()
        with pytest.warns(UserWarning, match="EarlyStopping: the logs of epoch 1 have no 'val_own'") as caught:
            fit(engine, silent, EarlyStopping("val_own"), epochs=3)
        assert len(caught) == 1 and engine.epochs_trained == 3

    def test_no_number_is_refused(self):
        noting = callback(on_epoch_end=lambda self, engine, epoch, logs: logs.update(note="better"))
        with pytest.raises(ArgumentTypeError, match=r"Mine: logs\['note'\] is 'better'; the history takes a number"):
            fit(make(), noting)


def rates(*callbacks, epochs, engine=None):
    return fit(engine or make(), *callbacks, epochs=epochs).history["learning_rate"]


class TestReduceLROnPlateau:
    # a monitored quantity that never improves after the first epoch
    FLAT = callback(Callback, writes="flat", on_epoch_end=lambda self, engine, epoch, logs: logs.update(flat=1.0))

    @pytest.mark.parametrize(
        ("options", "expected"),
        [
            # the first epoch is the best; two without a better one, then the next epoch has the lower rate
            ({"patience": 2}, [0.02] * 3 + [0.01] * 2 + [0.005] * 2),
            # epoch 2 lowers it, epoch 3 cools down, epoch 4 ends the cooling and counts
            ({"patience": 1, "cooldown": 2, "min_lr": 0.008}, [0.02] * 2 + [0.01] * 2 + [0.008] * 4),
        ],
    )
    def test_the_rate_falls(self, options, expected):
        found = rates(self.FLAT, ReduceLROnPlateau("flat", factor=0.5, **options), epochs=len(expected))
        assert found == pytest.approx(expected, rel=1e-12)

    def test_it_multiplies_a_schedule_and_ends_with_the_fit(self, caplog):
        scheduled = make(fusemlp.Adam(fusemlp.StepDecay(0.02, every=BATCHES * 2, gamma=0.5)))
        found = rates(self.FLAT, ReduceLROnPlateau("flat", factor=0.1, patience=2), epochs=5, engine=scheduled)
        # the log has the rate of the next update: the schedule halves it after epochs 2 and 4
        assert found == pytest.approx([0.02, 0.01, 0.01, 0.0005, 0.0005], rel=1e-12)
        engine = make()
        with caplog.at_level(logging.INFO, "fusemlp.callbacks"):
            fit(engine, ReduceLROnPlateau(patience=0, min_delta=10, verbose=1), epochs=3)
        assert caplog.messages[0] == "epoch 2: the learning rate is now 0.002"
        assert engine.learning_rate < 0.02
        assert rates(epochs=1, engine=engine) == [0.02]

    def test_a_resumed_fit_goes_on_as_the_whole_one(self, tmp_path):
        def plateau():
            return ReduceLROnPlateau("loss", patience=2, min_delta=0.2)

        expected = fit(make(), plateau(), ModelCheckpoint(tmp_path / "{epoch}.safetensors"), epochs=8).history
        assert len(set(expected["learning_rate"])) > 1
        for epoch in range(2, 7):
            resumed = fusemlp.load_checkpoint(tmp_path / f"{epoch}.safetensors")
            assert fit(resumed, plateau(), epochs=8, resume=True).history == expected


class TestLearningRateScheduler:
    @pytest.mark.parametrize(
        ("schedule", "expected"),
        [
            (lambda epoch: 0.02 / (1 + epoch), [0.02, 0.01, 0.02 / 3]),
            (lambda epoch, rate: rate * epoch / (1 + epoch) if epoch else rate, [0.02, 0.01, 0.02 / 3]),
            (lambda epoch: 0.01 * epoch, [0.0, 0.01, 0.02]),
        ],
    )
    def test_each_epoch_has_its_rate(self, schedule, expected):
        assert rates(fusemlp.LearningRateScheduler(schedule), epochs=3) == pytest.approx(expected, rel=1e-12)

    def test_the_rate_of_an_epoch_is_that_of_its_updates(self):
        engine, twin = make(), make(fusemlp.Adam(0.01))
        fit(engine, fusemlp.LearningRateScheduler(lambda epoch: 0.01), epochs=1)
        fit(twin, epochs=1)
        assert_same(engine, twin)

    def test_impossible_rates(self):
        with pytest.raises(ArgumentError, match=r"schedule\(0\): expected a finite number of at least 0, got -1"):
            fit(make(), fusemlp.LearningRateScheduler(lambda epoch: -1.0))
        with pytest.raises(ArgumentError, match=r"rate: the optimizer's own rate is 0 now, and 0.01 no multiple of it"):
            fit(make(fusemlp.Adam(0.0)), fusemlp.LearningRateScheduler(lambda epoch: 0.01))


class TestTensorBoard:
    def test_what_tensorboard_reads(self, tmp_path):
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        history = fit(make(), TensorBoard(tmp_path / "logs"), epochs=3)
        parts = {
            "train": {"epoch_loss": "loss", "epoch_accuracy": "accuracy", "epoch_learning_rate": "learning_rate"},
            "validation": {"epoch_loss": "val_loss", "epoch_accuracy": "val_accuracy"},
        }
        for part, tags in parts.items():
            found = EventAccumulator(str(tmp_path / "logs" / part)).Reload()
            assert sorted(found.Tags()["scalars"]) == sorted(tags)
            for tag, name in tags.items():
                events = found.Scalars(tag)
                assert [event.step for event in events] == [0, 1, 2]
                assert [event.value for event in events] == pytest.approx(history.history[name], rel=1e-6)

    def test_without_the_library_it_says_how_to_get_it(self, tmp_path, monkeypatch):
        monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
        engine = make()
        with pytest.raises(fusemlp.MissingLibraryError, match=r'pip install "fusemlp\[tensorboard\]"'):
            fit(engine, TensorBoard(tmp_path))
        assert engine.update_count == 0


class TestProgressBar:
    def test_a_bar_on_a_terminal(self, monkeypatch, capsys):
        monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
        bar = ProgressBar()
        fit(make(), bar)
        assert "epoch 2/2" in capsys.readouterr().err
        with pytest.raises(fusemlp.DivergenceError):
            fit(make(fusemlp.SGD(1e30)), bar)
        # The bar can be drawn again after an error.
        fit(make(), bar, epochs=4)
        assert "epoch 4/4" in capsys.readouterr().err


@pytest.mark.parametrize("used", [False, True])
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda one: pickle.loads(pickle.dumps(one))], ids=["copy", "pickle"])
def test_copies_work_as_scikit_learn_makes_them(copied, used, tmp_path):
    callbacks = [EarlyStopping(), ModelCheckpoint(tmp_path / "m.safetensors"), CSVLogger(tmp_path / "log.csv")]
    callbacks += [TensorBoard(tmp_path), ProgressBar(), ReduceLROnPlateau()]
    if used:
        fit(make(), *callbacks)
    fit(make(), *copied(callbacks))


def test_the_names_of_the_package():
    for name in fusemlp.callbacks.__all__:
        assert name[0].islower() or getattr(fusemlp, name) is getattr(fusemlp.callbacks, name)


NOT_MADE = [
    (lambda: EarlyStopping(monitor=3), ArgumentTypeError, "monitor: expected a name"),
    (lambda: EarlyStopping(mode="mix"), ArgumentError, "mode: unknown name 'mix'; did you mean 'min'"),
    (lambda: EarlyStopping(patience=-1), ArgumentError, "patience: expected a whole number of at least 0"),
    (lambda: EarlyStopping(min_delta=float("nan")), ArgumentError, "min_delta: expected a finite number"),
    (lambda: EarlyStopping(baseline="low"), ArgumentTypeError, "baseline: expected a finite"),
    (lambda: EarlyStopping(restore_best_weights=1), ArgumentTypeError, "restore_best_weights: expected"),
    (lambda: ReduceLROnPlateau(factor=1.0), ArgumentError, "factor: expected a finite number above 0 and"),
    (lambda: ReduceLROnPlateau(cooldown=-1), ArgumentError, "cooldown: expected a whole number"),
    (lambda: fusemlp.LearningRateScheduler(0.1), ArgumentTypeError, "schedule: expected a function"),
    (lambda: ProgressBar(lines=2), ArgumentTypeError, "lines: expected True or False"),
    (lambda: ModelCheckpoint("m.keras"), ArgumentError, "filepath: expected a name ending in .safetensors"),
    (lambda: ModelCheckpoint(3), ArgumentTypeError, "filepath: expected the path of a file, got 3"),
    (lambda: ModelCheckpoint("m.safetensors", save_freq="batch"), ArgumentError, "save_freq: only 'epoch' is supp"),
    (lambda: CSVLogger("log.csv", separator=", "), ArgumentError, "separator: expected one character"),
    (lambda: CSVLogger(None), ArgumentTypeError, "filename: expected the path of a file"),
    (lambda: TensorBoard(3), ArgumentTypeError, "log_dir: expected the path of a folder"),
    (lambda: fusemlp.MLflow(experiment=3), ArgumentTypeError, "experiment: expected a name, got 3"),
    (lambda: fusemlp.WandB(project=""), ArgumentTypeError, "project: expected a name, got ''"),
    (lambda: fusemlp.WandB(run_name=1), ArgumentTypeError, "run_name: expected a name, got 1"),
    (lambda: fusemlp.MLflow(run_id=b"x"), ArgumentTypeError, "run_id: expected a name"),
    (lambda: fusemlp.MLflow(params=[1]), ArgumentTypeError, r"params: expected a dictionary.*, got \[1\]"),
    (lambda: fusemlp.WandB(log_model=1), ArgumentTypeError, "log_model: expected"),
]


@pytest.mark.parametrize(("call", "error", "words"), NOT_MADE)
def test_what_cannot_be_made(call, error, words):
    with pytest.raises(error, match=words):
        call()


NOT_FITTED = [
    (
        EarlyStopping,
        r"monitor: 'val_loss' is not among what this fit logs \(loss, accuracy, learning_rate\); give validation_data",
    ),
    (lambda: EarlyStopping("auc"), r"monitor: 'auc' is not among"),
    (lambda: EarlyStopping("acuracy"), r"monitor: 'acuracy' is not among .*\); did you mean 'accuracy'\?"),
    (lambda: ModelCheckpoint("m.safetensors", save_best_only=True), "monitor: 'val_loss'"),
    (lambda: ModelCheckpoint("{val_loss}.safetensors"), r"filepath: the fields .* \('val_loss'\); there are"),
    (lambda: ModelCheckpoint("{epoch:q}.safetensors"), "filepath: the fields .* cannot be filled in"),
    (lambda: ModelCheckpoint("{}.safetensors"), "filepath: the fields .* cannot be filled in"),
    (lambda: ModelCheckpoint("no/m.safetensors"), "filepath: there is no folder 'no'.*mkdir -p no"),
    (lambda: ModelCheckpoint("d.safetensors"), "filepath: 'd.safetensors' is a folder"),
    (lambda: CSVLogger("no/log.csv"), "filename: there is no folder 'no'; make it first"),
    (lambda: CSVLogger("d.safetensors"), "filename: 'd.safetensors' is no file"),
    (lambda: TensorBoard("file"), "log_dir: 'file' is a file"),
]


@pytest.mark.parametrize(("call", "words"), NOT_FITTED)
def test_what_could_not_work_is_said_before_the_training(call, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    os.mkdir("d.safetensors")
    Path("file").touch()
    engine, keras = make(), Keras()
    with pytest.raises(ArgumentError, match=words):
        engine.fit(X, Y, epochs=1, callbacks=[keras, call()])
    assert engine.update_count == 0 and keras.calls == []
    assert sorted(os.listdir()) == ["d.safetensors", "file"]


def test_a_forgotten_callback_leaves_no_open_file(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fit(make(), TensorBoard(tmp_path), CSVLogger(tmp_path / "log.csv"))
