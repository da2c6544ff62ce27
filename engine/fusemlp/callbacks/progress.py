"""Show the progress of a training on stderr: a bar on a terminal, one line an epoch elsewhere.

The bar is drawn at the end of an epoch, at most ten times a second and without a thread, so its cost is negligible.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from fusemlp.callbacks.forms import Watching, first_epoch

REDRAW = 0.1  # seconds
BAR = 16  # characters

Show = Callable[[int, dict[str, float]], None]

# The end of the bar may be cut off, so the most important figures come first.
_ORDER = ("loss", "val_loss", "val_accuracy", "accuracy", "learning_rate")


def figures(logs: dict[str, float]) -> str:
    """Return an epoch's figures as ``loss 0.1234  accuracy 0.9612  ...``."""
    return "  ".join(f"{'lr' if name == 'learning_rate' else name} {value:.4g}" for name, value in logs.items())


@contextmanager
def shown(epochs: int, *, done: int = 0) -> Iterator[Show]:
    """Yield a function that shows the number of finished epochs and the figures of the last one."""
    if sys.stderr.isatty():
        with _bar(epochs, done) as show:
            yield show
    else:
        yield _lines(epochs)


class ProgressBar(Watching):
    """Show the progress of a ``fit`` on stderr, with the figures of its last epoch."""

    def __init__(self) -> None:
        self._open = ExitStack()
        self._show: Show | None = None
        self._first = 0
        self._epochs = 0

    def set_params(self, params: dict[str, Any]) -> None:
        """Receive the number of epochs of the fit."""
        self._epochs = params["epochs"]

    def on_train_begin(self, logs: Any = None) -> None:
        """Draw the bar."""
        engine = self.model
        self._first = first_epoch(engine)
        done = engine.epochs_trained - self._first
        self._show = self._open.enter_context(shown(self._epochs, done=done))

    def on_epoch_end(self, epoch: int, logs: dict[str, float]) -> None:
        """Advance the bar."""
        if self._show is not None:
            self._show(epoch + 1 - self._first, logs)

    def on_exit(self) -> None:
        """Leave the finished bar on the screen."""
        self._open.close()
        self._show = None


def _lines(epochs: int) -> Show:
    began = time.perf_counter()

    def show(done: int, logs: dict[str, float]) -> None:
        seconds = time.perf_counter() - began
        print(f"epoch {done}/{epochs}  {figures(logs)}  {seconds:.1f} s", file=sys.stderr, flush=True)

    return show


@contextmanager
def _bar(epochs: int, done: int) -> Iterator[Show]:
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    counter = TextColumn("epoch {task.completed:.0f}/{task.total:.0f}")
    columns = (counter, BarColumn(BAR), TimeRemainingColumn(), TextColumn("{task.fields[figures]}"))
    console = Console(stderr=True)
    # Four columns with a blank between them, the third 7 wide. The figures get the rest, so no column is truncated.
    room = console.width - len(f"epoch {epochs}/{epochs}") - BAR - 7 - 4
    drawn = 0.0
    with Progress(*columns, console=console, auto_refresh=False) as bar:
        task = bar.add_task("", total=epochs, completed=done, figures="")
        bar.refresh()
        latest: tuple[int, dict[str, float]] | None = None

        def draw(completed: int, logs: dict[str, float]) -> None:
            text = figures({name: logs[name] for name in _ORDER if name in logs})
            bar.update(task, completed=completed, figures=text[: max(room, 0)], refresh=True)

        def show(completed: int, logs: dict[str, float]) -> None:
            nonlocal drawn, latest
            latest = completed, logs
            now = time.monotonic()
            if now - drawn >= REDRAW:
                drawn, latest = now, None
                draw(completed, logs)

        try:
            yield show
        finally:
            if latest is not None:
                draw(*latest)
