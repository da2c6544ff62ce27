"""Show the progress of a training on stderr, or nothing."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from fusemlp.callbacks import Callback
from fusemlp.callbacks.progress import Show, shown
from fusemlp.engine import Engine


class _OnEpochEnd(Callback):
    """Call ``show`` with the number of finished epochs and the figures of the last one."""

    def __init__(self, show: Show) -> None:
        self.show = show

    def on_epoch_end(self, engine: Engine, epoch: int, logs: dict[str, float]) -> None:
        self.show(epoch + 1, logs)


@contextmanager
def progress(epochs: int, *, done: int = 0, quiet: bool = False) -> Iterator[list[Callback]]:
    """Yield the callbacks that show a training of ``epochs`` epochs, ``done`` of them finished."""
    if quiet:
        yield []
        return
    with shown(epochs, done=done) as show:
        yield [_OnEpochEnd(show)]
