"""Keep a run folder up to date during ``fit``: metrics and checkpoints, epoch by epoch."""

from __future__ import annotations

import os
import warnings

from fusemlp.callbacks import Callback
from fusemlp.describe.checks import WINDOWS
from fusemlp.engine import Engine
from fusemlp.report.runs import Run, append_metrics
from fusemlp.runtime.files import replace_file, write_atomically
from fusemlp.runtime.ranks import leading
from fusemlp.training.history import History


class Recorder(Callback):
    """Write a row of ``metrics.csv`` and, every ``every`` epochs and after the last, the checkpoint ``last``.

    The checkpoint ``best`` is of the best epoch, also of a resumed run. The row is written before the
    checkpoint, so a killed run has a row for each epoch of its checkpoint; unless on Windows another program, such as
    Excel, has the file open: its rows then follow when it is closed. On a rank other than 0 it only has its part in the
    checkpoints.
    """

    def __init__(self, run: Run, *, every: int) -> None:
        self.run = run
        self.every = every
        # the rows that are still to be written
        self._rows: list[dict[str, float]] = []

    def on_train_begin(self, engine: Engine) -> None:
        # alike on all ranks
        if engine.update_count == 0:
            engine.save_checkpoint(self.run.checkpoint("last"))

    def on_epoch_end(self, engine: Engine, epoch: int, logs: dict[str, float]) -> None:
        if leading():
            self._rows.append({"epoch": epoch + 1, **logs})
            self._write_rows()
        is_last = engine.fit_state is not None and engine.fit_state.last_epoch == epoch + 1
        due = is_last or (epoch + 1) % self.every == 0
        # The best first: a training that ends between the two goes on before this epoch, and has it again.
        is_best = engine.history is not None and engine.history.best_epoch == epoch
        if is_best:
            engine.save_checkpoint(self.run.checkpoint("best"))
        if due and is_best and leading():
            self._link_last()
        elif due and not is_best:
            engine.save_checkpoint(self.run.checkpoint("last"))

    def on_train_end(self, engine: Engine, history: History) -> None:
        self._write_rows()
        if history.stopped.startswith("interrupted"):
            # Ctrl-C came between two updates: save the position inside the epoch too.
            engine.save_checkpoint(self.run.checkpoint("last"))

    def _write_rows(self) -> None:
        while self._rows:
            try:
                append_metrics(self.run, self._rows[0])
            except PermissionError:
                if not WINDOWS:
                    raise
                if len(self._rows) == 1:
                    warnings.warn(
                        f"{self.run.metrics}: another program has it open; close it there, its rows follow then",
                        stacklevel=2,
                    )
                return
            del self._rows[0]

    def _link_last(self) -> None:
        """Make the checkpoint ``last`` a link to ``best``, which was just written."""
        best, last = self.run.checkpoint("best"), self.run.checkpoint("last")
        temporary = last.with_name(f".{last.name}.tmp")
        try:
            temporary.unlink(missing_ok=True)
            os.link(best, temporary)
            replace_file(temporary, last)
        except OSError:
            # Without hard links, write a second file; to save again would need all ranks.
            write_atomically(last, best.read_bytes())
