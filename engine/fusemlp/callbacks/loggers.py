"""Callbacks that write the logs to files: ``CSVLogger`` and ``TensorBoard``, with Keras's arguments."""

from __future__ import annotations

import csv
import importlib.util
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fusemlp.callbacks.forms import Watching
from fusemlp.describe.checks import check_flag, no_folder
from fusemlp_kernels.errors import ArgumentError, ArgumentTypeError, MissingLibraryError

HINT = 'pip install "fusemlp[tensorboard]"'


class CSVLogger(Watching):
    """Write a row of the logs after each epoch: the epoch, from 0 as in Keras, and the figures of the history.

    Each ``fit`` starts a new file, unless ``append`` continues one with the same columns. Numbers that other callbacks
    add to the logs get columns of their own; cells of epochs without them are empty.
    """

    def __init__(self, filename: str | os.PathLike[str], separator: str = ",", append: bool = False) -> None:
        if not isinstance(filename, str | os.PathLike):
            raise ArgumentTypeError(f"filename: expected the path of a file, got {filename!r}")
        if not isinstance(separator, str) or len(separator) != 1 or separator in '"\r\n':
            raise ArgumentError(f"separator: expected one character such as ',', got {separator!r}")
        self.filename = os.fspath(filename)
        self.separator = separator
        self.append = check_flag("append", append)
        self.columns: list[str] = []

    def check_logs(self, names: Sequence[str]) -> None:
        path = Path(self.filename)
        if path.exists() and not path.is_file():
            raise ArgumentError(f"filename: {self.filename!r} is no file; expected a file, there already or new")
        if not path.parent.is_dir():
            raise no_folder("filename", path.parent)
        self.columns = ["epoch", *names]
        if self._continues():
            with path.open(encoding="utf-8", newline="") as stream:
                header = next(csv.reader(stream, delimiter=self.separator))
            if header[: len(self.columns)] != self.columns:
                raise ArgumentError(
                    f"append: {self.filename!r} has the columns {', '.join(header)}, and this fit logs "
                    f"{', '.join(self.columns)}; give another filename"
                )
            self.columns = header

    def _continues(self) -> bool:
        path = Path(self.filename)
        return self.append and path.exists() and path.stat().st_size > 0

    def on_train_begin(self, logs: Any = None) -> None:
        if not self._continues():
            self._write([self.columns], "w")

    def on_epoch_end(self, epoch: int, logs: dict[str, float]) -> None:
        new = [name for name in logs if name not in self.columns]
        if new:
            with open(self.filename, encoding="utf-8", newline="") as stream:
                _, *rows = csv.reader(stream, delimiter=self.separator)
            self.columns = [*self.columns, *new]
            self._write([self.columns, *([*row, *[""] * len(new)] for row in rows)], "w")
        cells = (repr(float(logs[name])) if name in logs else "" for name in self.columns[1:])
        self._write([[epoch, *cells]], "a")

    def _write(self, rows: Sequence[Sequence[Any]], mode: str) -> None:
        with open(self.filename, mode, encoding="utf-8", newline="") as stream:
            csv.writer(stream, delimiter=self.separator, lineterminator="\n").writerows(rows)


class TensorBoard(Watching):
    """Write the logs of each epoch for ``tensorboard --logdir LOG_DIR``; needs the extra ``tensorboard``.

    As in Keras, the run ``train`` has ``epoch_loss``, ``epoch_accuracy`` and ``epoch_learning_rate``, and the run
    ``validation`` the validation figures by the same names; the step is the epoch, from 0.
    """

    def __init__(self, log_dir: str | os.PathLike[str] = "logs") -> None:
        if not isinstance(log_dir, str | os.PathLike):
            raise ArgumentTypeError(f"log_dir: expected the path of a folder, got {log_dir!r}")
        self.log_dir = os.fspath(log_dir)
        self._writers: dict[str, Any] = {}

    def check_logs(self, names: Sequence[str]) -> None:
        if importlib.util.find_spec("tensorboard") is None:
            raise MissingLibraryError(f"TensorBoard: it needs the library tensorboard: {HINT}")
        if Path(self.log_dir).exists() and not Path(self.log_dir).is_dir():
            raise ArgumentError(f"log_dir: {self.log_dir!r} is a file; expected a folder, there already or new")

    def on_epoch_end(self, epoch: int, logs: dict[str, float]) -> None:
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.compat.proto.summary_pb2 import Summary
        from tensorboard.summary.writer.event_file_writer import EventFileWriter

        parts: dict[str, list[Any]] = {"train": [], "validation": []}
        for name, value in logs.items():
            part, tag = ("validation", name.removeprefix("val_")) if name.startswith("val_") else ("train", name)
            parts[part].append(Summary.Value(tag=f"epoch_{tag}", simple_value=value))
        for part, values in parts.items():
            if values and part not in self._writers:
                self._writers[part] = EventFileWriter(str(Path(self.log_dir, part)))
            if values:
                self._writers[part].add_event(Event(step=epoch, wall_time=time.time(), summary=Summary(value=values)))
                self._writers[part].flush()

    def on_exit(self) -> None:
        for writer in self._writers.values():
            writer.close()
        self._writers.clear()
