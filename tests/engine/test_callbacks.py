"""Callbacks in the library's form and in Keras's, and the ready-made ones."""

from __future__ import annotations

import copy
import csv
import logging
import os
import pickle
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import fusemlp
from fusemlp import (
    MLP,
    Adam,
    ArgumentError,
    ArgumentTypeError,
    Callback,
    CSVLogger,
    DivergenceError,
    EarlyStopping,
    Engine,
    FusemlpError,
    History,
    LearningRateScheduler,
    MissingLibraryError,
    ModelCheckpoint,
    ProgressBar,
    ReduceLROnPlateau,
    TensorBoard,
    load_checkpoint,
)

RNG = np.random.default_rng(0)
X, XV = RNG.normal(size=(40, 5)), RNG.normal(size=(20, 5))
Y, YV = RNG.integers(0, 3, 40), RNG.integers(0, 3, 20)
BATCHES = 3


def make(**options: Any) -> Engine:
    """Return random labels: the network memorises them, so the validation loss soon grows."""
    return Engine(MLP([5, 30, 3]), **{"optimizer": Adam(0.02), "batch_size": 16, "seed": 1, **options})


def fit(engine: Engine, *callbacks: Any, epochs: int = 2, **options: Any) -> History:
    return engine.fit(X, Y, epochs=epochs, validation_data=(XV, YV), callbacks=callbacks, **options)


class Keras:
    """Record every called method of Keras's form, in order."""

    def __init__(self) -> None:
        self.told: list[tuple[Any, ...]] = []

    def set_params(self, params: dict[str, Any]) -> None:
        self.told.append(("params", params["epochs"]))

    def set_model(self, model: Engine) -> None:
        self.model = model
        self.told.append(("model",))

    def on_train_begin(self, logs: Any = None) -> None:
        self.told.append(("train begin", logs))

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        self.told.append(("epoch begin", epoch, logs))

    def on_train_batch_begin(self, batch: int, logs: Any = None) -> None:
        self.told.append(("batch begin", batch, self.model.update_count))

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        self.told.append(("batch end", batch, self.model.update_count))

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        self.told.append(("epoch end", epoch, sorted(logs)))

    def on_train_end(self, logs: Any = None) -> None:
        self.told.append(("train end", sorted(logs)))


class TestForms:
    def test_all_of_keras_in_its_order(self) -> None:
        keras = Keras()
        fit(make(), keras)
        names = ["accuracy", "learning_rate", "loss", "val_accuracy", "val_loss"]
        epochs: list[tuple[Any, ...]] = []
        for epoch in range(2):
            epochs.append(("epoch begin", epoch, {}))
            for batch in range(BATCHES):
                count = BATCHES * epoch + batch
                epochs += [("batch begin", batch, count), ("batch end", batch, count + 1)]
            epochs.append(("epoch end", epoch, names))
        assert keras.told == [("params", 2), ("model",), ("train begin", {}), *epochs, ("train end", names)]

    def test_the_logs_are_what_the_history_receives(self) -> None:
        seen: list[dict[str, float]] = []

        class Logs:
            def on_epoch_end(self, epoch: int, logs: dict[str, float]) -> None:
                seen.append(dict(logs))

        history = fit(make(), Logs()).history
        assert seen == [{name: values[epoch] for name, values in history.items()} for epoch in range(2)]

    @pytest.mark.parametrize("where", ["on_epoch_end", "on_batch_end", "on_train_batch_end"])
    def test_the_model_stops_the_training(self, where: str) -> None:
        class Stop:
            model: Engine

            def stop(self, number: int, logs: Any = None) -> None:
                self.model.stop_training = True

        setattr(Stop, where, Stop.stop)
        engine = make()
        history = fit(engine, Stop(), epochs=5)
        assert engine.update_count == (BATCHES if where == "on_epoch_end" else 1)
        assert history.stopped == "a callback stopped the training"

    def test_a_subclass_of_callback_may_have_either_form(self) -> None:
        seen: list[Any] = []

        class Own(Callback):
            def on_epoch_end(self, engine: Engine, epoch: int, logs: dict[str, float]) -> None:
                seen.append(("own", engine, epoch))

        class Other(Callback):
            def on_epoch_end(self, epoch, logs=None):
                seen.append(("keras", self.model, epoch))

        engine = make()
        fit(engine, Own(), Other(), epochs=1)
        assert seen == [("own", engine, 0), ("keras", engine, 0)]

    def test_names_decide_where_the_number_of_parameters_does_not(self) -> None:
        seen: list[Any] = []

        class Own:
            def on_train_begin(self, anything: Any) -> None:
                seen.append(anything)

            def on_batch_end(self, anything: Any, batch: int) -> None:
                seen.append(anything)

        class Other:
            def on_train_begin(self, logs: Any = None) -> None:
                seen.append(logs)

            def on_batch_end(self, batch: int, logs: Any = None) -> None:
                seen.append(batch)

        engine = make()
        fit(engine, Own(), epochs=1)
        assert seen == [engine] * (1 + BATCHES)
        seen.clear()
        fit(engine, Other(), epochs=1)
        assert seen == [{}, *range(BATCHES)]

    def test_a_method_with_defaults_is_of_the_form_of_its_names(self) -> None:
        seen: list[Any] = []

        class More:
            def on_epoch_end(self, epoch: int, logs: Any = None, shown: bool = True) -> None:
                seen.append((epoch, sorted(logs)[0], shown))

        fit(make(), More(), epochs=1)
        assert seen == [(0, "accuracy", True)]

    def test_an_object_without_room_for_the_model(self) -> None:
        class Slots:
            __slots__ = ("epochs",)

            def on_epoch_end(self, epoch: int, logs: Any) -> None:
                self.epochs = epoch

        slots = Slots()
        fit(make(), slots)
        assert slots.epochs == 1

    def test_empty_methods_of_a_base_class_of_keras_do_not_count(self) -> None:
        def empty(self: Any, batch: int, logs: Any = None) -> None:
            raise AssertionError("called though it is marked as empty")

        empty._is_default = True

        class Base:
            on_train_batch_end = empty

            def on_epoch_end(self, epoch: int, logs: Any = None) -> None: ...

        fit(make(), Base())

    def test_exit_is_told_whatever_happens(self) -> None:
        seen: list[str] = []

        class Own:
            def on_exit(self, engine: Engine) -> None:
                seen.append("own")

        class Other:
            def on_epoch_end(self, epoch: int, logs: Any) -> None:
                raise LookupError("mine")

            def on_exit(self) -> None:
                seen.append("keras")

        with pytest.raises(LookupError, match="mine"):
            fit(make(), Own(), Other())
        assert seen == ["own", "keras"]

    def test_listening_to_batches_changes_nothing(self) -> None:
        one, other = make(), make()
        fit(one, Keras())
        fit(other)
        for name, array in one.state_dict().items():
            np.testing.assert_array_equal(array, other.state_dict()[name])


def with_method(name: str, method: Callable[..., None]) -> object:
    return type("Mine", (), {name: method})()


class Mixed:
    def on_epoch_end(self, epoch: int, logs: Any) -> None: ...

    def on_train_end(self, engine: Engine, history: History) -> None: ...


class Modelled:
    def set_model(self, model: Engine) -> None: ...

    def on_epoch_end(self, engine: Engine, epoch: int, logs: Any) -> None: ...


WRONG_FORMS: dict[str, tuple[object, str]] = {
    "too few": (
        with_method("on_epoch_end", lambda self, logs: None),
        r"Mine.on_epoch_end\(logs\) cannot be called; expected on_epoch_end\(engine, epoch, logs\) or "
        r"on_epoch_end\(epoch, logs\) as in Keras",
    ),
    "too many": (with_method("on_train_end", lambda self, a, b, c: None), r"Mine.on_train_end\(a, b, c\)"),
    "by keyword": (with_method("on_epoch_end", lambda self, *, epoch, logs: None), "cannot be called"),
    "own batch": (
        with_method("on_train_batch_end", lambda self, a, b, c: None),
        r"expected on_train_batch_end\(batch, logs\) as in Keras",
    ),
    "mixed": (Mixed(), r"Mixed.on_epoch_end\(epoch, logs\) has Keras's form and on_train_end\(engine, history\)"),
    "set_model": (Modelled(), r"Modelled.on_epoch_end\(engine: .* cannot be called"),
}


@pytest.mark.parametrize("case", WRONG_FORMS)
def test_what_fits_neither_form_is_refused_before_anything_changed(case: str) -> None:
    callback, words = WRONG_FORMS[case]
    engine, keras = make(), Keras()
    with pytest.raises(ArgumentTypeError, match=words):
        fit(engine, keras, callback)
    assert engine.update_count == 0
    assert keras.told == []


# The values of an epoch each, the arguments, the epoch of the stop and that of the best.
STOPS: dict[str, tuple[list[float], dict[str, Any], int | None, int | None]] = {
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
    @pytest.mark.parametrize("patience", [1, 3])
    def test_it_is_the_early_stopping_of_fit(self, patience: int) -> None:
        one, other = make(), make()
        stop = EarlyStopping(patience=patience, restore_best_weights=True)
        history = fit(one, stop, epochs=60)
        expected = fit(other, epochs=60, early_stopping=patience)
        assert history.history == expected.history
        assert history.stopped == expected.stopped
        assert stop.best == min(history.history["val_loss"])
        assert stop.best_epoch == history.best_epoch
        assert stop.stopped_epoch == history.epochs[-1] < 59
        for name, array in one.state_dict().items():
            np.testing.assert_array_equal(array, other.state_dict()[name])

    def test_the_last_weights_stay_unless_wanted(self) -> None:
        one, other = make(), make()
        history = fit(one, EarlyStopping(patience=2), epochs=60)
        fit(other, epochs=len(history.epochs))
        assert history.stopped == "val_loss has not improved for 2 epochs"
        for name, array in one.state_dict().items():
            np.testing.assert_array_equal(array, other.state_dict()[name])

    def test_the_best_are_restored_at_the_end_too(self) -> None:
        engine = make()
        history = fit(engine, EarlyStopping(patience=1000, restore_best_weights=True), epochs=40)
        assert engine.evaluate(XV, YV)["loss"] == min(history.history["val_loss"]) < history.history["val_loss"][-1]
        assert history.stopped == ""

    @pytest.mark.parametrize("case", STOPS)
    def test_when_it_stops(self, case: str) -> None:
        values, options, stopped, best = STOPS[case]
        stop, engine = EarlyStopping(**options), make()
        stop.set_model(engine)
        engine.history = History()
        stop.on_train_begin()
        for epoch, value in enumerate(values):
            engine.history.record(epoch, {stop.monitor: value}, 0.0)
            stop.on_epoch_end(epoch, {stop.monitor: value})
            if engine.stop_training:
                break
        assert (stop.stopped_epoch, stop.best_epoch) == (stopped, best)

    def test_a_resumed_fit_stops_where_it_would_have_stopped(self, tmp_path: Path) -> None:
        whole = fit(make(), EarlyStopping(patience=3), epochs=60)
        cut = whole.epochs[-1] - 1

        class Cut(Callback):
            def on_epoch_end(self, engine: Engine, epoch: int, logs: dict[str, float]) -> None:
                if epoch + 1 == cut:
                    engine.save_checkpoint(tmp_path / "c")
                    engine.stop_training = True

        fit(make(), EarlyStopping(patience=3), Cut(), epochs=60)
        assert fit(load_checkpoint(tmp_path / "c"), EarlyStopping(patience=3), epochs=60, resume=True).history == (
            whole.history
        )
        stop = EarlyStopping(patience=3, restore_best_weights=True)
        with pytest.warns(UserWarning, match=r"the weights of the best epoch so far \(\d+\) are not in the checkpoint"):
            fit(load_checkpoint(tmp_path / "c"), stop, epochs=60, resume=True)

    def test_it_can_be_used_again(self) -> None:
        stop, engine = EarlyStopping(patience=1), make()
        first = fit(engine, stop, epochs=60)
        second = fit(engine, stop, epochs=60)
        assert second.epochs[0] == first.epochs[-1] + 1
        assert len(second.epochs) >= 2

    def test_verbose_is_logged(self, caplog: pytest.LogCaptureFixture) -> None:
        engine = make()
        with caplog.at_level(logging.INFO, logger="fusemlp.callbacks"):
            history = fit(engine, EarlyStopping(verbose=1), epochs=60)
        (record,) = caplog.records
        assert record.getMessage() == f"epoch {len(history.epochs)}: val_loss has not improved for 1 epochs"


class TestModelCheckpoint:
    def test_one_file_an_epoch(self, tmp_path: Path) -> None:
        history = fit(make(), ModelCheckpoint(tmp_path / "{epoch:02d}-{val_loss:.2f}.safetensors"), epochs=3)
        losses = history.history["val_loss"]
        names = [f"{epoch + 1:02d}-{loss:.2f}.safetensors" for epoch, loss in enumerate(losses)]
        assert sorted(path.name for path in tmp_path.iterdir()) == names
        resumed = load_checkpoint(tmp_path / names[1])
        assert resumed.epochs_trained == 2
        assert fit(resumed, epochs=3, resume=True).history == history.history

    def test_the_best_alone(self, tmp_path: Path) -> None:
        path = tmp_path / "best.safetensors"
        history = fit(make(), ModelCheckpoint(str(path), save_best_only=True, save_weights_only=True), epochs=40)
        best = fusemlp.load(path)
        assert best.evaluate(XV, YV)["loss"] == min(history.history["val_loss"]) < history.history["val_loss"][-1]
        assert best.update_count == 0

    def test_nothing_is_better_than_the_threshold(self, tmp_path: Path) -> None:
        keep = ModelCheckpoint(tmp_path / "m.safetensors", save_best_only=True, initial_value_threshold=0.0)
        fit(make(), keep)
        assert list(tmp_path.iterdir()) == []

    def test_the_best_of_a_resumed_fit_counts(self, tmp_path: Path) -> None:
        path = tmp_path / "best.safetensors"
        engine = make()
        fit(engine, epochs=30)
        assert engine.fit_state is not None
        engine.fit_state.last_epoch += 1
        fit(engine, ModelCheckpoint(path, save_best_only=True), epochs=31, resume=True)
        assert not path.exists()


class TestCSVLogger:
    def rows(self, path: Path, separator: str = ",") -> list[list[str]]:
        with path.open(newline="") as stream:
            return list(csv.reader(stream, delimiter=separator))

    def test_rows_are_the_history(self, tmp_path: Path) -> None:
        history = fit(make(), CSVLogger(tmp_path / "log.csv", separator=";"))
        header, *rows = self.rows(tmp_path / "log.csv", ";")
        assert header == ["epoch", *history.history]
        assert [int(row[0]) for row in rows] == [0, 1]
        assert [[float(cell) for cell in row[1:]] for row in rows] == [
            [values[epoch] for values in history.history.values()] for epoch in range(2)
        ]

    def test_anew_or_below(self, tmp_path: Path) -> None:
        engine, path = make(), tmp_path / "log.csv"
        fit(engine, CSVLogger(path))
        fit(engine, CSVLogger(path, append=True))
        assert [row[0] for row in self.rows(path)] == ["epoch", "0", "1", "2", "3"]
        fit(engine, CSVLogger(path), epochs=1)
        assert [row[0] for row in self.rows(path)] == ["epoch", "4"]
        before = path.read_bytes()
        with pytest.raises(ArgumentError, match=r"append: .* has the columns epoch, loss, .*; give another filename"):
            engine.fit(X, Y, epochs=1, callbacks=CSVLogger(path, append=True))
        assert path.read_bytes() == before

    def test_numbers_of_other_callbacks_get_columns(self, tmp_path: Path) -> None:
        path = tmp_path / "log.csv"
        engine = make()
        history = fit(engine, Writer(), CSVLogger(path), epochs=3)
        header, *rows = self.rows(path)
        assert header == ["epoch", "loss", "accuracy", "val_loss", "val_accuracy", "learning_rate", "val_own", "late"]
        assert [row[-2:] for row in rows] == [["10.0", ""], ["11.0", "7.0"], ["12.0", ""]]
        assert [float(row[1]) for row in rows] == history.history["loss"]
        # appended to, also without that callback
        fit(engine, CSVLogger(path, append=True), epochs=1)
        assert self.rows(path)[4][-2:] == ["", ""] and len(self.rows(path)) == 5


class Writer(Callback):
    """Adds a number to the logs of each epoch, and one to those of the second."""

    writes = ("val_own",)

    def on_epoch_end(self, engine: Engine, epoch: int, logs: dict[str, Any]) -> None:
        logs["val_own"] = np.float32(10 + epoch)
        if epoch == 1:
            logs["late"] = 7


class TestAddedLogs:
    def test_they_reach_the_history_and_later_callbacks(self, capsys: pytest.CaptureFixture[str]) -> None:
        seen: list[dict[str, float]] = []

        class Reader:
            def on_epoch_end(self, epoch: int, logs: dict[str, float]) -> None:
                seen.append(dict(logs))

            def on_train_end(self, logs: dict[str, float]) -> None:
                seen.append(dict(logs))

        history = fit(make(), Writer(), Reader(), ProgressBar(), epochs=3)
        assert history.history["val_own"] == [10.0, 11.0, 12.0]
        assert str(history.history["late"]) == "[nan, 7.0, nan]"
        assert all(type(value) is float for values in history.history.values() for value in values)
        assert [logs["val_own"] for logs in seen] == [10.0, 11.0, 12.0, 12.0]
        assert "val_own 12" in capsys.readouterr().err.splitlines()[2]
        assert [len(row) for row in history.rows()] == [8] * 3

    def test_a_checkpoint_has_them(self, tmp_path: Path) -> None:
        path = tmp_path / "{epoch}-{val_own:.0f}.safetensors"
        history = fit(make(), Writer(), ModelCheckpoint(path), epochs=2)
        restored = load_checkpoint(tmp_path / "2-11.safetensors")
        assert restored.history is not None and str(restored.history.history) == str(history.history)
        more = restored.fit(X, Y, epochs=3, validation_data=(XV, YV), resume=True, callbacks=Writer())
        assert more.history["val_own"] == [10.0, 11.0, 12.0]

    def test_a_monitor_follows_what_is_announced(self) -> None:
        stopping = EarlyStopping("val_own", mode="min", patience=1)
        assert len(fit(make(), Writer(), stopping, epochs=5).epochs) == 2
        with pytest.raises(ArgumentError, match=r"monitor: 'val_own' is not among .*writes = \('val_own',\)"):
            fit(make(), stopping, Writer())

    def test_what_was_announced_in_vain_is_told(self) -> None:
        class Silent(Callback):
            writes = "val_own"

            def on_epoch_begin(self, engine: Engine, epoch: int) -> None:
                pass

        engine = make()
        with pytest.warns(UserWarning, match="EarlyStopping: the logs of epoch 1 have no 'val_own'") as caught:
            fit(engine, Silent(), EarlyStopping("val_own"), epochs=3)
        assert len(caught) == 1 and engine.epochs_trained == 3

    def test_no_number_is_refused(self) -> None:
        class Noting(Callback):
            def on_epoch_end(self, engine: Engine, epoch: int, logs: dict[str, Any]) -> None:
                logs["note"] = "better"

        with pytest.raises(ArgumentTypeError, match=r"Noting: logs\['note'\] is 'better'; the history takes a number"):
            fit(make(), Noting())


class TestReduceLROnPlateau:
    def rates(self, callback: ReduceLROnPlateau, epochs: int = 7, **options: Any) -> list[float]:
        """Return the rates of a fit whose monitored quantity never improves after the first epoch."""

        class Flat(Callback):
            writes = "flat"

            def on_epoch_end(self, engine: Engine, epoch: int, logs: dict[str, Any]) -> None:
                logs["flat"] = 1.0

        return fit(make(**options), Flat(), callback, epochs=epochs).history["learning_rate"]

    def test_the_rate_falls_after_patience(self) -> None:
        # the first epoch is the best; two without a better one, then the next epoch has the lower rate
        rates = self.rates(ReduceLROnPlateau("flat", factor=0.5, patience=2))
        assert rates == pytest.approx([0.02] * 3 + [0.01] * 2 + [0.005] * 2, rel=1e-12)

    def test_cooldown_and_the_least_rate(self) -> None:
        rates = self.rates(ReduceLROnPlateau("flat", factor=0.5, patience=1, cooldown=2, min_lr=0.008), 8)
        # epoch 2 lowers it, epoch 3 cools down, epoch 4 ends the cooling and counts
        assert rates == pytest.approx([0.02, 0.02, 0.01, 0.01, 0.008, 0.008, 0.008, 0.008], rel=1e-12)

    def test_it_multiplies_a_schedule_and_ends_with_the_fit(self) -> None:
        schedule = fusemlp.StepDecay(0.02, every=BATCHES * 2, gamma=0.5)
        rates = self.rates(ReduceLROnPlateau("flat", factor=0.1, patience=2), 5, optimizer=Adam(schedule))
        # the log has the rate of the next update: the schedule halves it after epochs 2 and 4
        assert rates == pytest.approx([0.02, 0.01, 0.01, 0.0005, 0.0005], rel=1e-12)
        engine = make()
        fit(engine, ReduceLROnPlateau(patience=0, min_delta=10), epochs=3)
        assert engine.learning_rate < 0.02
        assert fit(engine, epochs=1).history["learning_rate"] == [0.02]

    def test_a_resumed_fit_goes_on_as_the_whole_one(self, tmp_path: Path) -> None:
        def callback() -> ReduceLROnPlateau:
            return ReduceLROnPlateau("loss", patience=2, min_delta=0.2)

        whole = make()
        expected = fit(whole, callback(), ModelCheckpoint(tmp_path / "{epoch}.safetensors"), epochs=8)
        assert len(set(expected.history["learning_rate"])) > 1
        for epoch in range(2, 7):
            resumed = load_checkpoint(tmp_path / f"{epoch}.safetensors")
            assert fit(resumed, callback(), epochs=8, resume=True).history == expected.history

    def test_verbose_is_logged(self, caplog: pytest.LogCaptureFixture) -> None:
        with caplog.at_level(logging.INFO, "fusemlp.callbacks"):
            fit(make(), ReduceLROnPlateau(patience=0, min_delta=10, verbose=1), epochs=2)
        assert caplog.messages[0] == "epoch 2: the learning rate is now 0.002"


class TestLearningRateScheduler:
    @pytest.mark.parametrize(
        "schedule",
        [lambda epoch: 0.02 / (1 + epoch), lambda epoch, rate: rate * epoch / (1 + epoch) if epoch else rate],
    )
    def test_each_epoch_has_its_rate(self, schedule: Any) -> None:
        engine, twin = make(), make(optimizer=Adam(0.02 / 2))
        history = fit(engine, LearningRateScheduler(schedule), epochs=3)
        assert history.history["learning_rate"] == pytest.approx([0.02, 0.01, 0.02 / 3], rel=1e-12)
        # the rate of an epoch is that of its updates
        one = make()
        fit(one, LearningRateScheduler(lambda epoch: 0.01), epochs=1)
        fit(twin, epochs=1)
        assert all(np.array_equal(twin.state_dict()[name], value) for name, value in one.state_dict().items())

    def test_impossible_rates(self) -> None:
        with pytest.raises(ArgumentError, match=r"schedule\(0\): expected a finite number of at least 0, got -1"):
            fit(make(), LearningRateScheduler(lambda epoch: -1.0))
        with pytest.raises(ArgumentError, match=r"rate: the optimizer's own rate is 0 now, and 0.01 no multiple of it"):
            fit(make(optimizer=Adam(0.0)), LearningRateScheduler(lambda epoch: 0.01))

    def test_rates_may_begin_at_zero(self) -> None:
        history = fit(make(), LearningRateScheduler(lambda epoch: 0.01 * epoch), epochs=3)
        assert history.history["learning_rate"] == pytest.approx([0.0, 0.01, 0.02], rel=1e-12)


class TestTensorBoard:
    def test_what_tensorboard_reads(self, tmp_path: Path) -> None:
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

    def test_without_the_library_it_says_how_to_get_it(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
        engine = make()
        with pytest.raises(MissingLibraryError, match=r'pip install "fusemlp\[tensorboard\]"'):
            fit(engine, TensorBoard(tmp_path))
        assert engine.update_count == 0


class TestProgressBar:
    def test_a_line_an_epoch(self, capsys: pytest.CaptureFixture[str]) -> None:
        engine = make()
        fit(engine, ProgressBar())
        history = fit(engine, ProgressBar(), epochs=3)
        lines = capsys.readouterr().err.splitlines()
        assert [line.split()[1] for line in lines] == ["1/2", "2/2", "1/3", "2/3", "3/3"]
        assert f"val_loss {history.history['val_loss'][-1]:.4g}" in lines[-1]

    def test_a_bar_on_a_terminal(self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
        monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
        bar = ProgressBar()
        fit(make(), bar)
        assert "epoch 2/2" in capsys.readouterr().err
        with pytest.raises(DivergenceError):
            fit(make(optimizer=fusemlp.SGD(1e30)), bar)
        # The bar can be drawn again after an error.
        fit(make(), bar, epochs=4)
        assert "epoch 4/4" in capsys.readouterr().err


@pytest.mark.parametrize("used", [False, True])
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda one: pickle.loads(pickle.dumps(one))], ids=["copy", "pickle"])
def test_copies_work_as_scikit_learn_makes_them(copied: Callable[[Any], Any], used: bool, tmp_path: Path) -> None:
    callbacks = [EarlyStopping(), ModelCheckpoint(tmp_path / "m.safetensors"), CSVLogger(tmp_path / "log.csv")]
    callbacks += [TensorBoard(tmp_path), ProgressBar(), ReduceLROnPlateau()]
    if used:
        fit(make(), *callbacks)
    fit(make(), *copied(callbacks))


def test_monitors_in_a_loop_of_the_callers_own() -> None:
    engine, stopping = make(), EarlyStopping(patience=1)
    stopping.model = engine
    stopping.on_train_begin()
    for epoch, loss in enumerate((1.0, 0.5, 0.7)):
        stopping.on_epoch_end(epoch, {"val_loss": loss})
    stopping.on_train_end()
    assert (stopping.best_epoch, stopping.stopped_epoch, engine.history) == (1, 2, None)


def test_the_names_of_the_package() -> None:
    for name in fusemlp.callbacks.__all__:
        if name[0].islower():
            continue
        assert getattr(fusemlp, name) is getattr(fusemlp.callbacks, name)


NOT_MADE: dict[str, tuple[Callable[[], object], type[FusemlpError], str]] = {
    "monitor": (lambda: EarlyStopping(monitor=3), ArgumentTypeError, "monitor: expected a name"),
    "mode": (lambda: EarlyStopping(mode="mix"), ArgumentError, "mode: unknown name 'mix'; did you mean 'min'"),
    "patience": (lambda: EarlyStopping(patience=-1), ArgumentError, "patience: expected a whole number of at least 0"),
    "delta": (lambda: EarlyStopping(min_delta=float("nan")), ArgumentError, "min_delta: expected a finite number"),
    "baseline": (lambda: EarlyStopping(baseline="low"), ArgumentTypeError, "baseline: expected a finite"),
    "restore": (lambda: EarlyStopping(restore_best_weights=1), ArgumentTypeError, "restore_best_weights: expected"),
    "factor": (lambda: ReduceLROnPlateau(factor=1.0), ArgumentError, "factor: expected a finite number above 0 and"),
    "cooldown": (lambda: ReduceLROnPlateau(cooldown=-1), ArgumentError, "cooldown: expected a whole number"),
    "schedule": (lambda: LearningRateScheduler(0.1), ArgumentTypeError, "schedule: expected a function"),
    "lines": (lambda: ProgressBar(lines=2), ArgumentTypeError, "lines: expected True or False"),
    "suffix": (lambda: ModelCheckpoint("m.keras"), ArgumentError, "filepath: expected a name ending in .safetensors"),
    "no path": (lambda: ModelCheckpoint(3), ArgumentTypeError, "filepath: expected the path of a file, got 3"),
    "save_freq": (
        lambda: ModelCheckpoint("m.safetensors", save_freq="batch"),
        ArgumentError,
        "save_freq: only 'epoch' is supported, got 'batch'",
    ),
    "separator": (lambda: CSVLogger("log.csv", separator=", "), ArgumentError, "separator: expected one character"),
    "filename": (lambda: CSVLogger(None), ArgumentTypeError, "filename: expected the path of a file"),
    "log_dir": (lambda: TensorBoard(3), ArgumentTypeError, "log_dir: expected the path of a folder"),
}


@pytest.mark.parametrize("case", NOT_MADE)
def test_what_cannot_be_made(case: str) -> None:
    call, kind, words = NOT_MADE[case]
    with pytest.raises(kind, match=words):
        call()


NOT_FITTED: dict[str, tuple[Callable[[], object], str]] = {
    "no validation": (
        EarlyStopping,
        r"monitor: 'val_loss' is not among what this fit logs \(loss, accuracy, learning_rate\); give validation_data",
    ),
    "no such quantity": (lambda: EarlyStopping("auc"), r"monitor: 'auc' is not among"),
    "best of nothing": (lambda: ModelCheckpoint("m.safetensors", save_best_only=True), "monitor: 'val_loss'"),
    "field": (lambda: ModelCheckpoint("{val_loss}.safetensors"), r"filepath: the fields .* \('val_loss'\); there are"),
    "format": (lambda: ModelCheckpoint("{epoch:q}.safetensors"), "filepath: the fields .* cannot be filled in"),
    "position": (lambda: ModelCheckpoint("{}.safetensors"), "filepath: the fields .* cannot be filled in"),
    "folder": (lambda: ModelCheckpoint("no/m.safetensors"), "filepath: there is no folder 'no'.*mkdir -p no"),
    "a folder": (lambda: ModelCheckpoint("d.safetensors"), "filepath: 'd.safetensors' is a folder"),
    "csv folder": (lambda: CSVLogger("no/log.csv"), "filename: there is no folder 'no'; make it first"),
    "csv is one": (lambda: CSVLogger("d.safetensors"), "filename: 'd.safetensors' is no file"),
    "board": (lambda: TensorBoard("file"), "log_dir: 'file' is a file"),
}


@pytest.mark.parametrize("case", NOT_FITTED)
def test_what_could_not_work_is_said_before_the_training(
    case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    os.mkdir("d.safetensors")
    Path("file").touch()
    engine, keras = make(), Keras()
    call, words = NOT_FITTED[case]
    with pytest.raises(ArgumentError, match=words):
        engine.fit(X, Y, epochs=1, callbacks=[keras, call()])
    assert engine.update_count == 0
    assert keras.told == []
    assert sorted(os.listdir()) == ["d.safetensors", "file"]


def test_a_forgotten_callback_leaves_no_open_file(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fit(make(), TensorBoard(tmp_path), CSVLogger(tmp_path / "log.csv"))
