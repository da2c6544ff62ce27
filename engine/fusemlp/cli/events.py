"""JSON lines of a training for programs: an object at its start, for each epoch or model, and at its end."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Iterator, Mapping
from typing import Any

from fusemlp._version import __version__
from fusemlp.callbacks import Callback
from fusemlp.cli.output import print_json
from fusemlp.engine import Engine
from fusemlp.fleet.results import Member


class Events(Callback):
    """Print the events of a training to stdout; nothing unless ``--json``, only the end with ``--quiet``."""

    def __init__(self, *, as_json: bool, quiet: bool) -> None:
        self.wanted = as_json and not quiet
        self.stream = sys.stdout
        self._epochs = 0
        self._began = time.perf_counter()

    def start(self, kind: str, *, epochs: int, **about: Any) -> None:
        self._epochs, self._began = epochs, time.perf_counter()
        self._print("start", {"kind": kind, "fusemlp": __version__, "epochs": epochs, **about})

    def epoch(self, row: Mapping[str, float]) -> None:
        """Print a row of ``metrics.csv``."""
        seconds = round(time.perf_counter() - self._began, 3)
        self._print("epoch", {"epoch": row["epoch"], "epochs": self._epochs, "seconds": seconds, **row})

    def on_epoch_end(self, engine: Engine, epoch: int, logs: dict[str, float]) -> None:
        self.epoch({"epoch": epoch + 1, **logs})

    def model(self, member: Member, models: int, parameters: Mapping[str, Any]) -> None:
        """Print a model of several that has ended."""
        best = member.history.best_epoch
        about = {"model": member.index, "models": models, "parameters": parameters, "status": member.status}
        figures = {"epochs": len(member.history.epochs), "best_epoch": None if best is None else best + 1}
        self._print("model", {**about, **figures, **member.scores})

    def _print(self, event: str, content: Mapping[str, Any]) -> None:
        if self.wanted:
            print_json({"event": event, **content}, self.stream)


@contextlib.contextmanager
def events(*, as_json: bool, quiet: bool) -> Iterator[Events]:
    """Yield the events of a training; what else is printed in the block goes to stderr with ``--json``."""
    made = Events(as_json=as_json, quiet=quiet)
    with contextlib.redirect_stdout(sys.stderr) if as_json else contextlib.nullcontext():
        yield made
