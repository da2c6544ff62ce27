"""Show the progress of a training on stderr: a bar on a terminal, one line an epoch elsewhere.

The bar is drawn at the end of an epoch, at most ten times a second and without a thread, so its cost is negligible.
"""

from __future__ import annotations

import sys
import time
from typing import Any

from fusemlp.callbacks.forms import Watching, first_epoch
from fusemlp.describe.checks import check_flag

REDRAW = 0.1  # seconds
BAR = 16  # characters


def figures(logs: dict[str, float]) -> str:
    """Return an epoch's figures as ``loss 0.1234  accuracy 0.9612  ...``."""
    return "  ".join(f"{'lr' if name == 'learning_rate' else name} {value:.4g}" for name, value in logs.items())


class ProgressBar(Watching):
    """Show the progress of a ``fit`` on stderr, with the figures of its last epoch; ``lines``: never as a bar."""

    def __init__(self, *, lines: bool = False) -> None:
        self.lines = check_flag("lines", lines)
        self._epochs = self._first = self._room = 0
        self._began = self._drawn = 0.0
        self._bar: Any = None
        self._latest: tuple[int, dict[str, float]] | None = None

    def set_params(self, params: dict[str, Any]) -> None:
        """Receive the number of epochs of the fit."""
        self._epochs = params["epochs"]

    def on_train_begin(self, logs: Any = None) -> None:
        """Draw the bar."""
        self._first = first_epoch(self.model)
        self._began, self._drawn = time.perf_counter(), 0.0
        if sys.stderr.isatty() and not self.lines:
            self._open_bar(self.model.epochs_trained - self._first)

    def on_epoch_end(self, epoch: int, logs: dict[str, float]) -> None:
        """Advance the bar, or print a line."""
        done, now = epoch + 1 - self._first, time.perf_counter()
        if self._bar is None:
            line = f"epoch {done}/{self._epochs}  {figures(logs)}  {now - self._began:.1f} s"
            print(line, file=sys.stderr, flush=True)
            return
        self._latest = done, logs
        if now - self._drawn >= REDRAW:
            self._drawn = now
            self._draw()

    def on_exit(self) -> None:
        """Leave the finished bar on the screen."""
        if self._bar is not None:
            self._draw()
            self._bar.stop()
            self._bar = None

    def _open_bar(self, done: int) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

        counter = TextColumn("epoch {task.completed:.0f}/{task.total:.0f}")
        columns = (counter, BarColumn(BAR), TimeRemainingColumn(), TextColumn("{task.fields[figures]}"))
        console = Console(stderr=True)
        # Four columns with a blank between them, the third 7 wide. The figures get the rest, so no column is truncated.
        self._room = max(0, console.width - len(f"epoch {self._epochs}/{self._epochs}") - BAR - 7 - 4)
        self._bar = Progress(*columns, console=console, auto_refresh=False)
        self._bar.add_task("", total=self._epochs, completed=done, figures="")
        self._bar.start()

    def _draw(self) -> None:
        if self._latest is not None:
            done, logs = self._latest
            # the end of the bar may be cut off
            first = [name for name in logs if name == "loss" or name.startswith("val_")]
            text = figures({name: logs[name] for name in dict.fromkeys([*first, *logs])})[: self._room]
            self._bar.update(self._bar.task_ids[0], completed=done, figures=text, refresh=True)
            self._latest = None
