"""Kill a training with SIGKILL again and again: ``python killed_training.py FOLDER KILLS SEED`` (POSIX).

It is a separate script because it forks, which is safe only in a process with one thread. It prints a JSON line a kill.
"""

import json
import os
import random
import signal
import sys
import time
from pathlib import Path

from fusemlp import MLP, AdamW, Callback, PReLU, ReduceOnPlateau, load_checkpoint
from make import assert_same_state, data, engine

EPOCHS, BATCH, ROWS = 12, 16, 120
BATCHES = -(-ROWS // BATCH)
EVERY = 3


def new_engine():
    """Return an engine with every kind of state: moments, pending gradients, dropout, slopes, a plateau's factor."""
    net = MLP([10, 16, 12, 3], activation=PReLU(0.2), dropout=0.2)
    return engine(net=net, optimizer=AdamW(ReduceOnPlateau(0.02, factor=0.5, patience=1), accumulate=2))


def fit(engine, **options):
    """Run the training that is killed."""
    X, y = data(ROWS + 30, 10)
    held_out = X[ROWS:], y[ROWS:]
    engine.fit(X[:ROWS], y[:ROWS], epochs=EPOCHS, validation_data=held_out, early_stopping=EPOCHS, **options)


class Saver(Callback):
    """Write a checkpoint at the start, every few batches and after each epoch; send a byte for each batch."""

    def __init__(self, path, pipe):
        self.path, self.pipe = path, pipe

    def on_train_begin(self, engine):
        engine.save_checkpoint(self.path)

    def on_batch_end(self, engine, batch):
        os.write(self.pipe, b".")
        if batch % EVERY == 0:
            engine.save_checkpoint(self.path)

    def on_epoch_end(self, engine, epoch, logs):
        engine.save_checkpoint(self.path)


def slow_fsync(handle, fsync=os.fsync):
    """Simulate a slow disk, so that many kills come during a write."""
    time.sleep(0.001)
    fsync(handle)


def start(path):
    """Start a child that trains, from the checkpoint at ``path`` if there is one; return its number and the pipe."""
    reading, writing = os.pipe()
    child = os.fork()
    if child:
        os.close(writing)
        return child, reading
    # End this process even if the parent is gone.
    signal.alarm(300)
    os.fsync = slow_fsync
    begun = load_checkpoint(path) if path.exists() else new_engine()
    fit(begun, resume=path.exists(), callbacks=Saver(path, writing))
    signal.pause()
    os._exit(1)


def kill(path, batches, delay):
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


def main(folder, kills, seed):
    expected = new_engine()
    fit(expected)
    moments = random.Random(seed)
    run = 0
    for _ in range(kills):
        path = folder / f"run{run}.safetensors"
        # At most two epochs, so that the kills spread over the epochs of a run.
        inside = kill(path, moments.randint(1, 2 * BATCHES), moments.uniform(0.0, 0.003))
        resumed = load_checkpoint(path)
        state = resumed.fit_state
        position = {"run": run, "epoch": state.epoch, "batch": state.batch, "inside a write": inside}
        fit(resumed, resume=True)
        assert_same_state(resumed, expected)
        print(json.dumps(position))
        run += position["epoch"] >= EPOCHS - 3


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
