"""A rank of a training that is cut off, and of one that goes on with it.

The victim gets SIGKILL or SIGSTOP some seconds after its first batch, at whatever it does then. All others shall end
with an error. Rank 0 writes a checkpoint every third batch.
"""

import hashlib
import json
import os
import threading
import time

import numpy as np

from fusemlp import MLP, AdamW, Callback, DistributedError, Engine, PReLU, load_checkpoint
from fusemlp.training.checkpoint import engine_content
from fusemlp_kernels.contract import ROW_COUNT

# too many to reach the end before the victim does
EPOCHS, TIMEOUT = 5000, 6.0
CHECKPOINT = "checkpoint.safetensors"


def new_engine():
    return Engine(
        MLP([10, 16, 12, 3], activation=PReLU(0.2), dropout=0.2), optimizer=AdamW(0.01, accumulate=2), batch_size=16,
        seed=3, backend="numpy", distributed=True, timeout=TIMEOUT,
    )  # fmt: skip


def data():
    generator = np.random.default_rng(4)
    return generator.normal(size=(120, 10)), generator.integers(0, 3, 120)


def fit(engine, callback, *, resume):
    early = {"early_stopping": EPOCHS, "monitor": "loss"}
    engine.fit(*data(), epochs=EPOCHS, callbacks=[callback], resume=resume, **early)


class Saver(Callback):
    """Saves every third batch; after the first begins the victim's time."""

    def __init__(self, path, begin):
        self.path, self.begin = path, begin

    def on_batch_end(self, engine, batch):
        if self.begin is not None:
            self.begin()
            self.begin = None
        if batch % 3 == 0:
            engine.save_checkpoint(self.path)


class Digests(Callback):
    """Notes the digest of an engine's whole state after each epoch from ``first`` on, and ends the fit after ``last``.

    The epochs of the fit are those of the one that was cut off.
    """

    def __init__(self, first, last):
        self.first, self.last = first, last
        self.found = {}

    def on_epoch_end(self, engine, epoch, logs):
        if epoch >= self.first:
            tensors = engine_content(engine)["tensors"]
            # written before each step
            tensors["counters"][ROW_COUNT] = 0
            assert engine.history is not None
            digest = hashlib.sha256(json.dumps(engine.history.history).encode())
            for name in sorted(tensors):
                digest.update(name.encode() + tensors[name].tobytes())
            self.found[epoch] = digest.hexdigest()
        engine.stop_training = epoch >= self.last


def cut_off(folder, ending, victim, delay):
    """Train until the victim ends after ``delay`` seconds; the others print the error that they get."""

    def end():
        time.sleep(delay)
        os.kill(os.getpid(), ending)

    begin = threading.Thread(target=end, daemon=True).start if int(os.environ["RANK"]) == victim else None
    try:
        fit(new_engine(), Saver(folder / CHECKPOINT, begin), resume=False)
    except DistributedError as error:
        print(error)


def go_on(folder, runs):
    """Resume each run, whose checkpoint lies in the folder of its name, for three epochs; rank 0 notes the digests."""
    found = {}
    for name in runs:
        path = folder / name / CHECKPOINT
        # the victim may have been faster than the first checkpoint
        engine = load_checkpoint(path, distributed=True, timeout=TIMEOUT) if path.exists() else new_engine()
        epoch = 0 if engine.fit_state is None else engine.fit_state.epoch
        digests = Digests(epoch + 2, epoch + 2)
        fit(engine, digests, resume=engine.fit_state is not None)
        found[name] = digests.found
    write(folder / f"{os.environ['WORLD_SIZE']}.json", found)


def without_a_fault(path, epochs):
    """Train for this many epochs; rank 0 notes the digests of all."""
    digests = Digests(0, epochs - 1)
    fit(new_engine(), digests, resume=False)
    write(path, digests.found)


def write(path, content):
    if os.environ["RANK"] == "0":
        path.write_text(json.dumps(content), encoding="utf-8")
