"""Show the progress of a training on stderr, as a bar on a terminal and elsewhere a line an epoch; and other waiting.

The bar is drawn at the end of an epoch, at most ten times a second and without a thread, so its cost is negligible. A
narrow terminal gets short names, then fewer parts: nothing is cut in the middle.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any, ClassVar

from fusemlp.callbacks.forms import Watching
from fusemlp.describe.checks import check_flag
from fusemlp_kernels.compilation import watchers

REDRAW = 0.1  # seconds
CLEAR = "\r\x1b[K"
BARS = (16, 8, 0)  # characters, the first that fits
SHORT = {"learning_rate": "lr", "accuracy": "acc", "balanced_accuracy": "bal_acc"}
# Each gets the engine of a training whose epochs have ended, one or those of a launch, and their number.
epoch_watchers: list[Callable[[Any, int], object]] = []


def figures(logs: Mapping[str, float], *, short: bool = False) -> str:
    """Return an epoch's figures as ``loss 0.1234  accuracy 0.9612  ...``; ``short``: with short names."""
    return "  ".join(f"{_name(name, short)} {value:.4g}" for name, value in logs.items())


def _name(name: str, short: bool) -> str:
    part = "val_" if short and name.startswith("val_") else ""
    word = name.removeprefix(part)
    return part + SHORT.get(word, word) if short or name == "learning_rate" else name


def by_importance(logs: Mapping[str, float]) -> list[str]:
    """Return the names of the logs: the losses, scores of validation rows (those that were asked for first), others."""
    ranks = {"loss": 0, "val_loss": 1, "val_accuracy": 3, "learning_rate": 5}
    return sorted(logs, key=lambda name: ranks.get(name, 2 if name.startswith("val_") else 4))


def layouts(count: int) -> list[tuple[int, bool, bool, int]]:
    """Return the layouts of a line with ``count`` figures, widest first: bar, remaining time, short names, figures."""
    wide, small, none = BARS
    least = min(count, 3)
    return [
        (wide, True, False, count),
        (wide, True, True, count),
        *((small, True, True, kept) for kept in range(count, least - 1, -1)),
        (none, True, True, least),
        *((none, False, True, kept) for kept in range(least, -1, -1)),
    ]


class ProgressBar(Watching):
    """Show the progress of a ``fit`` on stderr, with the figures of its last epoch; ``lines``: never as a bar."""

    def __init__(self, *, lines: bool = False) -> None:
        self.lines = check_flag("lines", lines)
        self._epochs = self._first = self._layout = self._width = 0
        self._began = self._drawn = 0.0
        self._around = ExitStack()
        self._bar: Any = None
        self._columns: tuple[Any, ...] = ()
        self._latest: tuple[int, dict[str, float]] | None = None

    def set_params(self, params: dict[str, Any]) -> None:
        self._epochs = params["epochs"]

    def on_train_begin(self, logs: Any = None) -> None:
        state = self.model.fit_state
        # a resumed fit counts from its original start
        self._first = self.model.epochs_trained if state is None else state.first_epoch
        self._began, self._drawn = time.perf_counter(), 0.0
        # A dumb terminal cannot draw over a line.
        dumb = os.environ.get("TERM", "").lower() in ("dumb", "unknown")
        if sys.stderr.isatty() and not dumb and not self.lines:
            self._around.enter_context(compilations_shown())
            self._open_bar(self.model.epochs_trained - self._first)

    def on_epoch_end(self, epoch: int, logs: dict[str, float]) -> None:
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
        self._around.close()
        if self._bar is not None:
            self._draw()
            self._bar.stop()
            self._bar = None

    def _open_bar(self, done: int) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

        self._columns = (
            TextColumn("epoch {task.completed:.0f}/{task.total:.0f}"),
            BarColumn(BARS[0]),
            TimeRemainingColumn(),
            TextColumn("{task.fields[figures]}", markup=False),
        )
        self._bar = Progress(console=Console(stderr=True), auto_refresh=False)
        self._bar.add_task("", total=self._epochs, completed=done, figures="")
        self._layout = 0
        self._arrange({})
        self._bar.start()

    def _draw(self) -> None:
        if self._latest is not None:
            done, logs = self._latest
            self._bar.update(self._bar.task_ids[0], completed=done, figures=self._arrange(logs), refresh=True)
            self._latest = None

    def _arrange(self, logs: Mapping[str, float]) -> str:
        """Return the figures of the widest layout that fits; a line stays narrow until the terminal is resized."""
        width, names = self._bar.console.width, by_importance(logs)
        if width != self._width:
            self._width, self._layout = width, 0
        counter, bar, remaining, latest = self._columns
        fixed = len(f"epoch {self._epochs}/{self._epochs}"), max(8, len(remaining.render(self._bar.tasks[0]).plain))
        for at, (size, timed, short, kept) in enumerate(layouts(len(names))):
            text = figures({name: logs[name] for name in names[:kept]}, short=short)
            parts = [fixed[0], size, fixed[1] if timed else 0, len(text)]
            # A blank between two parts.
            if at >= self._layout and sum(parts) + sum(map(bool, parts)) - 1 <= width:
                break
        self._layout = at if logs else 0
        bar.bar_width = size
        shown = zip((counter, bar, remaining, latest), (True, size, timed, text), strict=True)
        self._bar.columns = tuple(column for column, wanted in shown if wanted)
        return text


class Forecast:
    """Says once how long a training of ``epochs`` epochs in all takes at most, and what is ``shorter`` if that is long.

    It measures from one end of an epoch of a model to another of the same model, between which every model that
    trains beside it has had as many. The first epoch counts only if it is long: kernels are compiled in it.
    """

    # Seconds of the shortest measurement, of a long first epoch, of a time that is worth a line, and of a long one.
    LEAST, FIRST, WORTH, LONG = 1.0, 10.0, 5.0, 60.0

    def __init__(self, epochs: int, say: Callable[[str], object], shorter: str, *, single: bool) -> None:
        self._say, self._shorter, self._single = say, shorter, single
        self.begin(epochs)

    def begin(self, epochs: int) -> None:
        """Begin anew, with another training of this many epochs in all."""
        self._left, self._began, self._done, self._pace = epochs, time.perf_counter(), 0, 0.0
        # when an epoch of each model ended, and the epochs of all before
        self._since: dict[int, tuple[float, int]] = {}

    def __str__(self) -> str:
        seconds = self._pace * self._left
        if seconds < 90:
            return f"about {seconds:.0f} s left" if seconds > self.WORTH else ""
        return f"about {seconds / 60:.0f} min left" if seconds < 5400 else f"about {seconds / 3600:.1f} h left"

    def skip(self, epochs: int) -> None:
        """Learn that a model has ended with this many epochs left."""
        self._left -= epochs

    def __call__(self, engine: Any, epochs: int) -> None:
        now, known = time.perf_counter(), self._pace > 0
        self._done, self._left = self._done + epochs, self._left - epochs
        first = (self._began, 0) if self._single and now - self._began > self.FIRST else (now, self._done)
        began, before = self._since.setdefault(id(engine), first)
        if now - began >= self.LEAST:
            self._pace = (now - began) / (self._done - before)
            if not known and str(self):
                long = self._shorter and self._pace * self._left > self.LONG
                way = f"; {self._shorter} takes less, and Ctrl-C keeps what there is" if long else ""
                self._say(f"{self} at most{way}")

    def __enter__(self) -> Forecast:
        epoch_watchers.append(self)
        return self

    def __exit__(self, *error: object) -> None:
        epoch_watchers.remove(self)


class _Notice:
    """A line on a terminal while something lasts, with its seconds so far; of several the latest is shown."""

    latest: ClassVar[list[_Notice]] = []

    def __init__(self, text: str) -> None:
        # a bar that is drawn later writes to sys.stderr in its own way
        self._text, self._stream = text, sys.stderr
        # seconds of the parts before this one
        self._before = 0.0

    def __call__(self, begins: bool) -> None:
        if begins:
            self._began, self._ended = time.perf_counter(), threading.Event()
            self.latest.append(self)
            self._thread = threading.Thread(target=self._show, daemon=True)
            self._thread.start()
        elif self in self.latest:
            self._before += time.perf_counter() - self._began
            self._ended.set()
            self._thread.join()
            self.latest.remove(self)

    def _show(self) -> None:
        shown = False
        while not self._ended.wait(REDRAW):
            if self.latest[-1] is not self:
                continue
            shown = True
            seconds = self._before + time.perf_counter() - self._began
            print(f"{CLEAR}{self._text}: {seconds:.1f} s", end="", file=self._stream, flush=True)
        if shown:
            print(CLEAR, end="", file=self._stream, flush=True)


@contextmanager
def compilations_shown(*, quiet: bool = False) -> Iterator[None]:
    """Show compilations in the body, if stderr is a terminal and nothing shows them already."""
    if quiet or not sys.stderr.isatty() or any(isinstance(one, _Notice) for one in watchers):
        yield
        return
    notice = _Notice("compiling, once on this machine")
    watchers.append(notice)
    try:
        yield
    finally:
        watchers.remove(notice)


@contextmanager
def waiting(text: str, *, quiet: bool, elsewhere: bool = False) -> Iterator[Callable[[str], None]]:
    """Show on stderr what the body does: on a terminal by a line that goes with it, ``elsewhere`` by one that stays.

    Yield a function that prints a line above it.
    """
    notice = _Notice(text) if sys.stderr.isatty() and not quiet else None
    if notice is not None:
        notice(True)
    elif elsewhere and not quiet:
        print(text, file=sys.stderr, flush=True)

    def say(line: str) -> None:
        if not quiet:
            print(f"{CLEAR if notice else ''}{line}", file=sys.stderr, flush=True)

    try:
        yield say
    finally:
        if notice is not None:
            notice(False)
