"""Keep a run folder up to date during ``fit``: metrics and checkpoints, epoch by epoch."""

from __future__ import annotations

import contextlib
import os

from fusemlp.callbacks import Callback
from fusemlp.engine import Engine
from fusemlp.report.runs import Run, append_metrics
from fusemlp.runtime.files import replace_file


class Recorder(Callback):
    """Write a row of ``metrics.csv`` and, every ``every`` epochs and after the last, the checkpoint ``last``.

    The checkpoint ``best`` is of the best epoch, also of a resumed run. The row is written before the
    checkpoint, so a killed run has a row for each epoch of its checkpoint.
    """

    def __init__(self, run: Run, *, every: int) -> None:
        self.run = run
        self.every = every

    def on_train_begin(self, engine: Engine) -> None:
        if not self.run.checkpoint("last").exists():
            engine.save_checkpoint(self.run.checkpoint("last"))

    def on_epoch_end(self, engine: Engine, epoch: int, logs: dict[str, float]) -> None:
        append_metrics(self.run, {"epoch": epoch + 1, **logs})
        is_last = engine.fit_state is not None and engine.fit_state.last_epoch == epoch + 1
        due = is_last or (epoch + 1) % self.every == 0
        if due:
            engine.save_checkpoint(self.run.checkpoint("last"))
        if engine.history is not None and engine.history.best_epoch == epoch:
            self._save_best(engine, linked=due)

    def _save_best(self, engine: Engine, *, linked: bool) -> None:
        """Link the checkpoint ``last`` to ``best`` if it was just written, else write ``best``."""
        best, last = self.run.checkpoint("best"), self.run.checkpoint("last")
        if linked:
            temporary = best.with_name(f".{best.name}.tmp")
            # Without hard links, write a second file.
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)
                os.link(last, temporary)
                replace_file(temporary, best)
                return
        engine.save_checkpoint(best)
