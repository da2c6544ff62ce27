"""A rank of a training that is cut off: ``python faults.py FOLDER ENDING VICTIM DELAY``.

The victim gets SIGKILL or SIGSTOP ``DELAY`` seconds after its first batch, at whatever it does then. All
others shall end with an error. Rank 0 writes a checkpoint every third batch.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np

from fusemlp import MLP, AdamW, Callback, DistributedError, Engine, PReLU

# too many to reach the end before the victim does
EPOCHS, TIMEOUT = 2000, 4.0
ENDINGS = {"kill": signal.SIGKILL, "stop": signal.SIGSTOP}


def new_engine() -> Engine:
    return Engine(
        MLP([10, 16, 12, 3], activation=PReLU(0.2), dropout=0.2), optimizer=AdamW(0.01, accumulate=2), batch_size=16,
        seed=3, backend="numpy", distributed=True, timeout=TIMEOUT,
    )  # fmt: skip


def fit(engine: Engine, callbacks: tuple[Callback, ...], *, epochs: int, resume: bool) -> None:
    generator = np.random.default_rng(4)
    X, y = generator.normal(size=(120, 10)), generator.integers(0, 3, 120)
    engine.fit(X, y, epochs=epochs, callbacks=callbacks, resume=resume, early_stopping=epochs, monitor="loss")


class Saver(Callback):
    """Saves every third batch; after the first begins the victim's time."""

    def __init__(self, path: Path, begin: Any) -> None:
        self.path, self.begin = path, begin

    def on_batch_end(self, engine: Engine, batch: int) -> None:
        if self.begin is not None:
            self.begin()
            self.begin = None
        if batch % 3 == 0:
            engine.save_checkpoint(self.path)


class Until(Callback):
    """Ends a fit, whose epochs are those of the one that was cut off, after ``epoch``."""

    def __init__(self, epoch: int) -> None:
        self.epoch = epoch

    def on_epoch_end(self, engine: Engine, epoch: int, logs: dict[str, float]) -> None:
        engine.stop_training = epoch >= self.epoch


def cut_off(folder: Path, ending: str, victim: int, delay: float) -> None:
    def end() -> None:
        time.sleep(delay)
        os.kill(os.getpid(), ENDINGS[ending])

    begin = threading.Thread(target=end, daemon=True).start if int(os.environ["RANK"]) == victim else None
    path = folder / "checkpoint.safetensors"
    engine = new_engine()
    try:
        fit(engine, (Saver(path, begin),), epochs=EPOCHS, resume=False)
    except DistributedError as error:
        print(error)


if __name__ == "__main__":
    cut_off(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), float(sys.argv[4]))
