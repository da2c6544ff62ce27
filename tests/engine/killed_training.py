"""Kill a training with SIGKILL again and again: ``python killed_training.py FOLDER KILLS SEED`` (POSIX).

It is a separate script because it forks, which is safe only in a process with one thread. It prints a JSON line a kill.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from fusemlp import MLP, AdamW, Callback, Engine, PReLU, ReduceOnPlateau, load_checkpoint
from make import assert_same_state

EPOCHS, BATCH, ROWS = 12, 16, 120
BATCHES = -(-ROWS // BATCH)
EVERY = 3


def new_engine() -> Engine:
    """Return an engine with every kind of state: moments, pending gradients, dropout, slopes, a plateau's factor."""
    return Engine(
        MLP([10, 16, 12, 3], activation=PReLU(0.2), dropout=0.2),
        optimizer=AdamW(ReduceOnPlateau(0.02, factor=0.5, patience=1), accumulate=2),
        batch_size=BATCH,
        seed=3,
    )


def fit(engine: Engine, *, resume: bool, callbacks: tuple[Callback, ...] = ()) -> None:
    """Run the training that is killed."""
    generator = np.random.default_rng(4)
    X, y = generator.normal(size=(ROWS + 30, 10)), generator.integers(0, 3, ROWS + 30)
    held_out = (X[ROWS:], y[ROWS:])
    engine.fit(
        X[:ROWS],
        y[:ROWS],
        epochs=EPOCHS,
        validation_data=held_out,
        early_stopping=EPOCHS,
        callbacks=callbacks,
        resume=resume,
    )


class Saver(Callback):
    """Write a checkpoint at the start, every few batches and after each epoch; send a byte for each batch."""

    def __init__(self, path: Path, pipe: int) -> None:
        self.path = path
        self.pipe = pipe

    def on_train_begin(self, engine: Engine) -> None:
        engine.save_checkpoint(self.path)

    def on_batch_end(self, engine: Engine, batch: int) -> None:
        os.write(self.pipe, b".")
        if batch % EVERY == 0:
            engine.save_checkpoint(self.path)

    def on_epoch_end(self, engine: Engine, epoch: int, logs: dict[str, float]) -> None:
        engine.save_checkpoint(self.path)


def slow_fsync(handle: int, fsync: Callable[[int], None] = os.fsync) -> None:
    """Simulate a slow disk, so that many kills come during a write."""
    time.sleep(0.001)
    fsync(handle)


def start(path: Path) -> tuple[int, int]:
    """Start a child that trains, from the checkpoint at ``path`` if there is one; return its number and the pipe."""
    reading, writing = os.pipe()
    child = os.fork()
    if child:
        os.close(writing)
        return child, reading
    # End this process even if the parent is gone.
    signal.alarm(300)
    os.fsync = slow_fsync
    engine = load_checkpoint(path) if path.exists() else new_engine()
    fit(engine, resume=path.exists(), callbacks=(Saver(path, writing),))
    signal.pause()
    os._exit(1)


def kill(path: Path, batches: int, delay: float) -> bool:
    """Train, kill ``delay`` seconds after a number of batches; return whether the kill came during a write."""
    left_over = len(list(path.parent.glob(".*.tmp")))
    child, pipe = start(path)
    for _ in range(batches):
        assert os.read(pipe, 1) == b"."
    time.sleep(delay)
    os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    os.close(pipe)
    assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL
    return len(list(path.parent.glob(".*.tmp"))) > left_over


def main(folder: Path, kills: int, seed: int) -> None:
    expected = new_engine()
    fit(expected, resume=False)
    moments = random.Random(seed)
    run = 0
    for _ in range(kills):
        path = folder / f"run{run}.safetensors"
        # At most two epochs, so that the kills spread over the epochs of a run.
        inside = kill(path, moments.randint(1, 2 * BATCHES), moments.uniform(0.0, 0.003))
        engine = load_checkpoint(path)
        state = engine.fit_state
        assert state is not None
        position: dict[str, Any] = {"run": run, "epoch": state.epoch, "batch": state.batch, "inside a write": inside}
        fit(engine, resume=True)
        assert_same_state(engine, expected)
        print(json.dumps(position))
        if position["epoch"] >= EPOCHS - 3:
            run += 1


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
