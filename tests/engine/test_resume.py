import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import fusemlp
from fusemlp import MLP, MSE, SGD, Adam, Callback, Engine, load_checkpoint
from make import assert_same_state

HERE = Path(__file__).parent
ROWS, WIDTH, CLASSES, BATCH, EPOCHS = 70, 6, 3, 12, 5


def data(seed, rows=ROWS):
    """Return features, and their classes by a noisy linear map."""
    generator = np.random.default_rng(seed)
    X = generator.normal(size=(rows, WIDTH))
    scores = X @ np.random.default_rng(0).normal(size=(WIDTH, CLASSES)) + generator.normal(size=(rows, CLASSES))
    return X, scores.argmax(axis=1)


def fitted(engine, **options):
    """Return ``engine`` after the training of this file's tests."""
    X, y = options.pop("data", None) or data(1)
    if engine.loss.kind == "mse":
        y = np.eye(CLASSES)[y]
    engine.fit(X, y, **{"epochs": EPOCHS, **options})
    return engine


HELD_OUT = data(2, 25)
BATCHES = [tuple(array[start : start + BATCH] for array in data(1)) for start in range(0, ROWS, BATCH)]
# Validation classes that become less likely in training, so that the patience runs out.
NEVER_BETTER = data(1, 25)[0], (data(1, 25)[1] + 1) % CLASSES
CASES = {
    "momentum, cosine, dropout": (
        {"net": MLP([WIDTH, 8, CLASSES], dropout=0.3), "optimizer": SGD(fusemlp.Cosine(0.2, warmup=0.3), momentum=0.9)},
        {},
    ),
    "adamw, plateau, early stopping": (
        {
            "net": MLP([WIDTH, 8, 6, CLASSES], activation="gelu"),
            "optimizer": fusemlp.AdamW(fusemlp.ReduceOnPlateau(0.1, factor=0.5, patience=1, min_delta=0.1)),
        },
        {"validation_data": HELD_OUT, "early_stopping": 3},
    ),
    "average, early stopping": (
        {"net": MLP([WIDTH, 8, CLASSES], dropout=0.1), "optimizer": Adam(0.02, ema=0.9)},
        {"validation_data": HELD_OUT, "early_stopping": 3},
    ),
    "patience runs out": (
        {"net": MLP([WIDTH, 8, CLASSES], dropout=0.1), "optimizer": Adam(0.05)},
        {"validation_data": NEVER_BETTER, "early_stopping": 2, "epochs": 9},
    ),
    "accumulation over epochs' ends": (
        {
            "net": MLP([WIDTH, 8, CLASSES], activation=fusemlp.PReLU()),
            "optimizer": SGD(0.2, momentum=0.5, accumulate=4),
        },
        {},
    ),
    "accumulation, clipping, one cycle, fp64": (
        {
            "net": MLP([WIDTH, 8, CLASSES], dropout=0.2),
            "optimizer": Adam(fusemlp.OneCycle(0.05), accumulate=5, clip_norm=0.1),
            "precision": "fp64",
        },
        {"sample_weight": np.random.default_rng(5).uniform(0.0, 2.0, ROWS)},
    ),
    "mse on one-hot, given rows": (
        {"net": MLP([WIDTH, 8, CLASSES]), "loss": MSE(), "optimizer": SGD(fusemlp.StepDecay(0.3, every=7, gamma=0.5))},
        {"row_order": lambda epoch: np.roll(np.arange(ROWS)[::-1], epoch)},
    ),
    "rows as they are, short batch dropped": (
        {"net": MLP([WIDTH, CLASSES]), "optimizer": SGD(0.2, nesterov=True, momentum=0.5)},
        {"shuffle": False, "drop_last": True},
    ),
    "batches": ({"net": MLP([WIDTH, 8, CLASSES], dropout=0.2)}, {"data": (BATCHES, None)}),
    "a loss of the host": ({"net": MLP([WIDTH, 8, CLASSES]), "loss": MSE(missing=True)}, {}),
    "normalised inputs and layers": (
        {"net": MLP([WIDTH, 8, fusemlp.Residual(7), CLASSES], norm="layer"), "normalise": True},
        {"validation_data": HELD_OUT, "early_stopping": 3},
    ),
    "encoded inputs": ({"net": MLP([WIDTH, 8, CLASSES], encoding=fusemlp.Frequency(2))}, {}),
    "members": ({"net": MLP([WIDTH, 8, CLASSES], members=3), "normalise": True}, {}),
    "attacked batches": ({"net": MLP([WIDTH, 8, CLASSES])}, {"adversarial": fusemlp.PGD(0.1, steps=2, seed=7)}),
    "interval bounds": ({"net": MLP([WIDTH, 8, CLASSES])}, {"adversarial": fusemlp.IBP(0.2, bounds=(-9, 9))}),
}


def new_engine(case):
    return Engine(**{"batch_size": BATCH, "seed": 11, **CASES[case][0]})


class SaveEverywhere(Callback):
    """Write a checkpoint at each stage of the training, each in its own file."""

    def __init__(self, folder, epochs_alone=False):
        self.folder, self.epochs_alone, self.paths = folder, epochs_alone, []

    def save(self, engine, stage):
        if stage.endswith("end") or not self.epochs_alone:
            self.paths.append(self.folder / f"{len(self.paths):03} {stage}")
            engine.save_checkpoint(self.paths[-1])

    def on_train_begin(self, engine):
        self.save(engine, "train begin")

    def on_epoch_begin(self, engine, epoch):
        self.save(engine, f"epoch {epoch} begin")

    def on_batch_end(self, engine, batch):
        self.save(engine, f"batch {batch}")

    def on_epoch_end(self, engine, epoch, logs):
        self.save(engine, f"epoch {epoch} end")

    def on_train_end(self, engine, history):
        self.save(engine, "train ended")


@pytest.mark.parametrize("case", CASES)
def test_resuming_anywhere_ends_as_if_never_interrupted(case, tmp_path):
    options = CASES[case][1]
    expected = fitted(new_engine(case), **options)

    saver = SaveEverywhere(tmp_path)
    watched = fitted(new_engine(case), **options, callbacks=[saver])
    assert_same_state(watched, expected)
    assert len(saver.paths) > 20
    for path in saver.paths:
        resumed = fitted(load_checkpoint(path), **options, resume=True)
        assert_same_state(resumed, expected)


def test_the_case_of_exhausted_patience_stops_early():
    engine = fitted(new_engine("patience runs out"), **CASES["patience runs out"][1])
    assert len(engine.history.epochs) < 9
    assert "has not improved for 2 epochs" in engine.history.stopped


def test_a_later_fit_is_resumed_without_the_best_weights_of_an_earlier_one(tmp_path):
    def engine():
        return fitted(new_engine("momentum, cosine, dropout"), validation_data=HELD_OUT, early_stopping=9)

    expected = fitted(engine())
    saver = SaveEverywhere(tmp_path)
    fitted(engine(), callbacks=[saver])
    for path in saver.paths:
        assert_same_state(fitted(load_checkpoint(path), resume=True), expected)


def test_a_resumed_engine_can_be_saved_and_resumed_again(tmp_path):
    case = "accumulation over epochs' ends"
    expected = fitted(new_engine(case))
    path = tmp_path / "c"

    class StopAfter(Callback):
        def __init__(self, batches):
            self.left = batches

        def on_batch_end(self, engine, batch):
            self.left -= 1
            if self.left == 0:
                engine.save_checkpoint(path)
                engine.stop_training = True

    fitted(new_engine(case), callbacks=[StopAfter(2)])
    for _ in range(8):
        fitted(load_checkpoint(path), callbacks=[StopAfter(3)], resume=True)
    assert_same_state(fitted(load_checkpoint(path), resume=True), expected)


def test_no_batch_begins_again_after_the_last_of_an_epoch(tmp_path):
    class SaveAfterTheLast(Callback):
        def on_batch_end(self, engine, batch):
            if engine.epochs_trained == 0 and batch == len(BATCHES) - 1:
                engine.save_checkpoint(tmp_path / "c")

    class Hear(Callback):
        begun, ended = [], []

        def on_batch_begin(self, engine, batch):
            self.begun.append(batch)

        def on_batch_end(self, engine, batch):
            self.ended.append(batch)

    fitted(new_engine("momentum, cosine, dropout"), callbacks=[SaveAfterTheLast()])
    fitted(load_checkpoint(tmp_path / "c"), callbacks=[Hear()], resume=True)
    assert Hear.begun == Hear.ended == [*range(len(BATCHES))] * (EPOCHS - 1)


@pytest.mark.parametrize("case, epoch", [("adamw, plateau, early stopping", 2), ("momentum, cosine, dropout", 0)])
@pytest.mark.parametrize("saved", [True, False])
def test_ctrl_c_then_resume(case, epoch, saved, tmp_path):
    class Interrupt(Callback):
        def on_batch_end(self, engine, batch):
            if engine.epochs_trained == epoch and batch == 3:
                signal.raise_signal(signal.SIGINT)

    options, engine = CASES[case][1], new_engine(case)
    with pytest.raises(KeyboardInterrupt):
        fitted(engine, **options, callbacks=[Interrupt()])
    if saved:
        engine.save_checkpoint(tmp_path / "c")
        engine = load_checkpoint(tmp_path / "c")
    assert_same_state(fitted(engine, **options, resume=True), fitted(new_engine(case), **options))


def in_a_process(code, *arguments):
    """Return the output of a new Python process that finds the modules of the tests."""
    path = os.pathsep.join([str(HERE), str(HERE.parent), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    command = [sys.executable, "-c", code, *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


CONTINUE = """
import sys
import test_resume
from fusemlp import load_checkpoint
case, start, end = sys.argv[1:]
if start:
    engine = test_resume.fitted(load_checkpoint(start), **test_resume.CASES[case][1], resume=True)
else:
    engine = test_resume.fitted(test_resume.new_engine(case), **test_resume.CASES[case][1])
engine.save_checkpoint(end)
"""


def test_resuming_in_a_new_process(tmp_path):
    case = "adamw, plateau, early stopping"
    saver = SaveEverywhere(tmp_path)
    fitted(new_engine(case), **CASES[case][1], callbacks=[saver])
    middle = saver.paths[len(saver.paths) // 2]
    in_a_process(CONTINUE, case, "", str(tmp_path / "whole"))
    in_a_process(CONTINUE, case, str(middle), str(tmp_path / "resumed"))
    assert_same_state(load_checkpoint(tmp_path / "resumed"), load_checkpoint(tmp_path / "whole"))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs SIGKILL and fork, which this system does not have")
def test_twenty_kills_each_leave_a_checkpoint_that_resumes_exactly(tmp_path):
    """In each of 20 kills the script loads what is there, resumes it to the end and compares bits."""
    kills = 20
    code = "import sys, pathlib, killed_training; killed_training.main(pathlib.Path(sys.argv[1]), int(sys.argv[2]), 0)"
    positions = [json.loads(line) for line in in_a_process(code, str(tmp_path), str(kills)).splitlines()]
    assert len(positions) == kills
    # The kills cover all places: in and between writes, at an epoch's end and inside, in many epochs.
    assert {position["inside a write"] for position in positions} == {True, False}
    assert len({position["epoch"] for position in positions}) >= 6
    assert any(position["batch"] == 0 for position in positions)
    assert len({position["batch"] for position in positions}) >= 3


def test_resuming_with_too_few_rows_is_refused(tmp_path):
    saver = SaveEverywhere(tmp_path)
    fitted(new_engine("momentum, cosine, dropout"), callbacks=[saver])
    engine = load_checkpoint(next(path for path in saver.paths if path.name.endswith("batch 4")))
    X, y = data(1)
    said = "the checkpoint stands at batch 5 of its epoch, and 20 rows make only 2"
    with pytest.raises(fusemlp.ShapeError, match=said):
        engine.fit(X[:20], y[:20], epochs=EPOCHS, resume=True)
    with pytest.raises(fusemlp.ArgumentError, match="resume: this engine has no fit to go on with"):
        fitted(new_engine("momentum, cosine, dropout"), resume=True)
    # Nothing changed: the right data still give the exact result.
    assert_same_state(fitted(engine, resume=True), fitted(new_engine("momentum, cosine, dropout")))


def test_an_epoch_whose_last_update_overflows_is_undone_and_leaves_the_last_good_checkpoint(tmp_path):
    X, y = data(1)
    saver = SaveEverywhere(tmp_path, epochs_alone=True)
    # one update an epoch: its loss is a number, what it makes of the parameters is not
    engine = Engine(MLP([WIDTH, CLASSES]), MSE(), SGD(fusemlp.StepDecay(1e-3, every=1, gamma=1e42)), batch_size=ROWS)
    with pytest.raises(fusemlp.DivergenceError, match="it became NaN or infinite in epoch 2"):
        engine.fit(X, np.eye(CLASSES)[y], epochs=3, callbacks=[saver])
    assert [path.name for path in saver.paths] == ["000 epoch 0 end"]
    assert engine.history.stopped == "the loss became NaN or infinite in epoch 2"
    engine.history.stopped = ""
    assert_same_state(engine, load_checkpoint(saver.paths[0]))
