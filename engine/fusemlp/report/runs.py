"""Write and read a run folder, and rows as CSV, of which text that runs as a formula is guarded.

``config.json``, ``metrics.csv`` (a row an epoch), ``checkpoints/``, ``report.json``, ``report.html``, ``curves.png``;
``training_rows.npy`` (a hash of each training row), of a table ``columns.csv`` (what each column became), and of a run
with ``--track`` its id there in ``tracking.json``.
"""

from __future__ import annotations

import csv
import errno
import io
import json
import os
import re
import warnings
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from fusemlp.datasets.textfiles import number
from fusemlp.describe import checks, description, losses, network, optimizers
from fusemlp.describe.checks import meant
from fusemlp.inputs.arrays import Array
from fusemlp.runtime.files import lock_file, write_atomically
from fusemlp_kernels.errors import ArgumentError, CheckpointError

FORMAT = 1
# The entries of a configuration that commands read, with their types.
ENTRIES: dict[str, Any] = {
    **dict.fromkeys(("command", "started", "backend", "precision", "plan"), str),
    **dict.fromkeys(("data", "preprocessor", "network", "loss", "optimizer"), dict[str, Any]),
    "options": dict[str, str | int | float | bool | list[str] | None],
    "epochs": int,
}
DATA_ENTRIES: dict[str, Any] = {"name": str, "source": str, "fingerprint": str}
WEIGHTS = ("model", "best", "last")
# The beginnings of formulas, also in the full width of Japanese; of a guarded cell too, so that guarding can be undone.
FORMULA = re.compile("'*[=+@\t\r\n\uff1d\uff0b\uff0d\uff20-]")
# The file that is locked while a process trains in the folder, and the errors of a lock that another one has.
LOCK = ".lock"
BUSY = (errno.EAGAIN, errno.EACCES, errno.EDEADLK)
# The open files that this process has locked.
_locks: list[int] = []


class _File:
    """The path of a file in a run folder."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __get__(self, run: Run, owner: type[Run]) -> Path:
        return run.path / self.name


@dataclass(frozen=True)
class Run:
    """The paths in a run folder."""

    path: Path
    config, report, tracking = _File("config.json"), _File("report.json"), _File("tracking.json")
    page, curves = _File("report.html"), _File("curves.png")
    metrics, columns, training_rows = _File("metrics.csv"), _File("columns.csv"), _File("training_rows.npy")

    def checkpoint(self, name: str) -> Path:
        """Return the path of one of ``WEIGHTS``; the file need not exist."""
        return self.path / "checkpoints" / f"{name}.safetensors"


def choose_folder(out: str | None, data: str, now: datetime) -> Path:
    """Return the folder of a new run, ``out`` or by data and time in ``runs``; ArgumentError unless new or empty."""
    if out is None:
        return Path("runs", f"{Path(data).stem or 'data'}-{now:%Y%m%d-%H%M%S}")
    path = Path(out)
    try:
        taken = path.exists() and (not path.is_dir() or any(path.iterdir()))
    except OSError as error:
        raise ArgumentError(f"out: the folder {out!r} cannot be read ({error.strerror})") from error
    if taken:
        what = "is not empty" if path.is_dir() else "is a file"
        instead = f", or go on with the run in it: --resume {out}" if Run(path).config.exists() else ""
        raise ArgumentError(f"out: {out!r} {what}; give a new or empty folder{instead}")
    return path


def create_run(path: Path, *, numbered: bool = False) -> Run:
    """Make and lock a run's folder, ``numbered`` the first new one of path, path-2, ...; ArgumentError if it cannot."""
    run, number = Run(path), 1
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        while numbered:
            try:
                # no other process makes it too
                run.path.mkdir()
                break
            except FileExistsError:
                number += 1
                run = Run(path.with_name(f"{path.name}-{number}"))
        run.checkpoint("last").parent.mkdir(parents=True)
    except OSError as error:
        raise ArgumentError(f"out: the folder {str(path)!r} cannot be made ({error.strerror})") from error
    lock(run)
    return run


def lock(run: Run) -> None:
    """Lock a run folder for this process until ``unlock`` or its end; a folder that holds no run stays as it is.

    Raises CheckpointError if another process trains in the folder, or it cannot be written.
    """
    if not run.checkpoint("last").parent.is_dir():
        return
    try:
        descriptor = os.open(run.path / LOCK, os.O_RDWR | os.O_CREAT, 0o666)
    except OSError as error:
        raise CheckpointError(f"{run.path}: the folder cannot be written ({error.strerror})") from error
    _locks.append(descriptor)
    try:
        lock_file(descriptor)
    except OSError as error:
        if error.errno in BUSY:
            message = f"resume: another process trains in {str(run.path)!r}; wait for its end, or end it"
            raise CheckpointError(message) from None
        text = f"{run.path}: no locks in this file system ({error.strerror}); let only one process train in the folder"
        warnings.warn(text, stacklevel=2)


def unlock() -> None:
    """Free the locks of this process."""
    while _locks:
        os.close(_locks.pop())


def discard(run: Run, *files: Path, itself: bool = False) -> None:
    """Remove these files of a run that has not begun, and the folders of ``create_run``; ``itself``: its own too."""
    unlock()
    with suppress(OSError):
        for path in (*files, run.path / LOCK):
            path.unlink(missing_ok=True)
        run.checkpoint("last").parent.rmdir()
        if itself:
            run.path.rmdir()


def open_run(path: str | Path) -> tuple[Run, dict[str, Any]]:
    """Return an existing run folder and its configuration; CheckpointError for any other folder."""
    run = Run(Path(path))
    if not run.config.is_file():
        absent = "it is a file" if run.path.exists() else "there is no such folder"
        there = "it has no config.json" if run.path.is_dir() else absent
        names = [entry.parent.name for entry in run.path.absolute().parent.glob(f"*/{run.config.name}")]
        near = meant([run.path.name], names) or "; give one that fusemlp train made"
        raise CheckpointError(f"run: {str(path)!r} is not a run folder ({there}){near}")
    try:
        # int refuses NaN and Infinity, which write_json does not write
        config = json.loads(run.config.read_text(encoding="utf-8"), parse_constant=int)
    except (OSError, RecursionError, ValueError) as error:
        raise CheckpointError(f"{run.config}: cannot be read ({error}); the run cannot be used without it") from error
    if not isinstance(config, dict) or config.get("format") != FORMAT:
        format = config.get("format") if isinstance(config, dict) else type(config).__name__
        raise CheckpointError(f"{run.config}: expected a configuration of format {FORMAT}, found {format!r}")
    with description.reading(f"{run.config}: the configuration", "the run cannot be used without it"):
        for name, kind in ENTRIES.items():
            description.stored(name, config[name], kind)
        for name, kind in DATA_ENTRIES.items():
            description.stored(f"data.{name}", config["data"][name], kind)
        # earlier releases had none
        description.stored("data.notes", config["data"].get("notes", []), list[str])
        network.MLP.from_config(config["network"])
        losses.Loss.from_config(config["loss"])
        optimizers.Optimizer.from_config(config["optimizer"])
    # in release 0.2.0 the options alone had them
    config["preprocessor"].setdefault("missing_words", config["options"].get("missing") or [])
    return run, config


def weights_path(run: Run, name: str) -> Path:
    """Return the checkpoint ``name``, of an unfinished run its last for the model; CheckpointError if there is none."""
    path = run.checkpoint(checks.check_choice("weights", name, WEIGHTS))
    if name == "model" and not path.exists():
        path = run.checkpoint("last")
    if not path.exists():
        there = [other for other in WEIGHTS if run.checkpoint(other).exists()]
        raise CheckpointError(f"{run.path}: the run has no checkpoint {name!r}; it has {', '.join(there) or 'none'}")
    return path


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write readable JSON atomically; every number must be finite or None."""
    write_atomically(path, (json.dumps(content, indent=2, allow_nan=False) + "\n").encode())


def read_json(path: Path) -> dict[str, Any]:
    """Return the content of a file of ``write_json``, empty if there is none."""
    return dict(json.loads(path.read_text(encoding="utf-8"))) if path.exists() else {}


def guarded(cell: Any) -> Any:
    """Return a cell, with an apostrophe in front of text but no number that a spreadsheet would run (OWASP)."""
    runs = isinstance(cell, str) and FORMULA.match(cell) and number(cell) is None and number(cell, ",") is None
    return f"'{cell}" if runs else cell


def csv_bytes(rows: Iterable[Iterable[Any]], notes: list[str] | None = None, sep: str = ",") -> bytes:
    """Return rows of ``guarded`` cells as the content of a CSV file; ``notes`` takes a line if any has changed."""
    content, changed = bytearray(), False

    def write(line: str) -> None:
        content.extend(f"{line.removesuffix(end)}\n".encode(errors="backslashreplace"))

    # a carriage return is quoted only where lines end with one; an unquoted one would begin a row
    end = "\r\n"
    writer = csv.writer(SimpleNamespace(write=write), lineterminator=end, delimiter=sep)
    for row in map(list, rows):
        cells = [guarded(cell) for cell in row]
        changed |= cells != row
        writer.writerow(cells)
    if notes is not None and changed:
        notes.append("an apostrophe stands in front of text that a spreadsheet would run as a formula")
    return bytes(content)


def write_columns(run: Run, records: Sequence[Mapping[str, Any]]) -> None:
    """Write ``columns.csv``, unless there are no records, as of data that are no table."""
    if records:
        rows = [["" if value is None else value for value in record.values()] for record in records]
        write_atomically(run.columns, csv_bytes([list(records[0]), *rows]))


def read_columns(run: Run) -> list[dict[str, Any]]:
    """Return the records of ``columns.csv``, none without that file."""
    if not run.columns.exists():
        return []
    records = []
    with run.columns.open(encoding="utf-8", newline="") as stream:
        for row in csv.DictReader(stream):
            cells = {name: cell[1:] if guarded(cell[1:]) == cell else cell for name, cell in row.items()}
            missing = float(cells["missing"]) if cells["missing"] else None
            records.append({**cells, "inputs": int(cells["inputs"]), "missing": missing})
    return records


def append_metrics(run: Run, row: Mapping[str, float]) -> None:
    """Append a row to ``metrics.csv``, after a header if it is the first; floats in their shortest exact form."""
    with run.metrics.open("ab") as stream:
        stream.write(csv_bytes([*([] if stream.tell() else [row]), map(repr, row.values())]))


def write_training_rows(run: Run, hashes: Array) -> None:
    """Write the hashes of the training rows, (rows,) uint64."""
    stream = io.BytesIO()
    np.save(stream, hashes, allow_pickle=False)
    write_atomically(run.training_rows, stream.getvalue())


def read_training_rows(run: Run) -> Array | None:
    """Return the hashes of the training rows; None for a run of an earlier release, CheckpointError if damaged."""
    if not run.training_rows.exists():
        return None
    try:
        hashes: Array = np.load(run.training_rows, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise CheckpointError(
            f"{run.training_rows}: cannot be read ({error}); delete it, and evaluate no longer recognises training rows"
        ) from error
    return hashes


def read_metrics(run: Run) -> list[dict[str, float]]:
    """Return the rows of ``metrics.csv`` without one that was cut off during its write."""
    if not run.metrics.exists():
        return []
    text = run.metrics.read_text(encoding="utf-8")
    return [
        {name: int(value) if name == "epoch" else float(value) for name, value in row.items()}
        for row in csv.DictReader(io.StringIO(text[: text.rfind("\n") + 1]))
    ]


def read_history(run: Run) -> dict[str, list[float]]:
    """Return the columns of ``metrics.csv`` but the epochs, none without a complete row."""
    rows = read_metrics(run)
    return {name: [row[name] for row in rows] for name in (rows[0] if rows else ()) if name != "epoch"}


def joint(
    history: Mapping[str, Sequence[float]], report: Mapping[str, Any]
) -> tuple[dict[str, Sequence[float]], list[dict[str, Sequence[float]]]]:
    """Return a history, of an ensemble the mean while all models train, and theirs, none of an earlier release."""
    models = [model for model in report.get("models", ()) if model["epochs"] and model["status"] != "diverged"]
    common = min((model["epochs"] for model in models), default=None)
    mean = {name: values[:common] for name, values in history.items()}
    return mean, [model["history"] for model in models if "history" in model]


def keep_metrics(run: Run, epochs: int) -> None:
    """Drop the rows of ``metrics.csv`` after ``epochs``, which a resumed training writes again."""
    kept = [row for row in read_metrics(run) if row["epoch"] <= epochs]
    write_atomically(run.metrics, csv_bytes([*kept[:1], *(map(repr, row.values()) for row in kept)]))
