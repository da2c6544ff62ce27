"""Tables as columns: text files, Parquet and other Arrow files, Excel sheets, and tables in memory.

Numbers become float64 arrays with NaN for missing cells, dates datetime64[us] with NaT, words object arrays of str with
the text of the cell. Arrow reads, a piece at a time: memory is that of the columns. Every error is a DataError that
names the file and the places in it.
"""

from __future__ import annotations

import difflib
import itertools
from array import array
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from fusemlp.datasets.problems import Problems
from fusemlp.datasets.sources import Place, open_source
from fusemlp.datasets.textfiles import MISSING, Form, Source
from fusemlp.inputs.arrays import Array
from fusemlp_kernels.errors import DataError

# A piece of a table has at least this many rows, which tell the kinds of its columns.
_FEWEST = 4096


def read_table(
    source: Place,
    *,
    features: Sequence[str] | None = None,
    target: str | None = None,
    words: bool = False,
    form: Form | None = None,
    drop: Collection[str] = (),
    kinds: dict[str, str] | None = None,
    known_labels: Collection[str] = (),
    notes: list[str] | None = None,
) -> dict[str, Array]:
    """Return columns of a table by name, in its order.

    ``features`` chooses the feature columns (None: all but the target and those to ``drop``); the others are ignored.
    ``kinds`` says what a feature column holds: "number", "word", or dates in an order of ``ORDERS``; those it does not
    name are told by their values, and entered. The column
    ``target`` becomes int64, float64, bool or str, by its values; with ``words`` it stays str. Rows without a target
    are left out; a missing value's text that is among ``known_labels`` is a label. ``notes`` takes lines on the
    reading.
    """
    import pyarrow

    from fusemlp.datasets.columns import Column, Target

    notes = [] if notes is None else notes
    kinds = {} if kinds is None else kinds
    problems = Problems(source)
    ragged = itertools.count()
    with open_source(source, form or Form()) as opened:
        names, with_types = opened.names, opened.records is None
        notes += filter(None, [opened.said])
        columns: list[Column | Target] = [
            Target(name, opened.decimal, problems, MISSING.difference(known_labels))
            if name == target
            else Column(name, opened.decimal, problems, kinds.get(name), with_types)
            for name in choose_columns(source, names, features, target, drop)
        ]
        positions = [names.index(column.name) for column in columns]
        for batch in _pieces(opened.batches(positions, lambda: next(ragged))):
            for column, values in zip(columns, batch.columns, strict=True):
                column.add(values)
        missing = np.zeros(0, bool)
        table: dict[str, Array] = {}
        for column in columns:
            if isinstance(column, Target):
                table[column.name] = column.finish(words, with_types)
                missing = column.missing
            else:
                table[column.name] = column.finish(notes)
                kinds[column.name] = column.kind or "number"
        if next(ragged) or problems.found:
            _refuse(source, problems, opened)
    pyarrow.default_memory_pool().release_unused()
    if table and missing.all() and len(missing):
        raise DataError(f"{source}, column {target!r}: the target is missing in all {len(missing)} rows")
    if not table or not len(next(iter(table.values()))):
        raise DataError(f"{source}: there are no rows below the header")
    if missing.any():
        notes.append(f"{int(missing.sum())} of {len(missing)} rows have no {target!r} and are left out")
        table = {name: column if name == target else column[~missing] for name, column in table.items()}
    return table


def choose_columns(
    source: Place, names: Sequence[str], features: Sequence[str] | None, target: str | None, drop: Collection[str] = ()
) -> list[str]:
    """Return the columns to read; DataError, with a list of the columns, if one is missing or named twice."""
    twice = [name for name, count in Counter(names).items() if count > 1]
    if twice:
        raise DataError(f"{source}: several columns are called {listed(twice)}; give each its own name")
    present = set(names)
    wanted = present - set(drop) if features is None else set(features)
    missing = [name for name in features or () if name not in present]
    if target is not None and target not in present:
        raise DataError(
            f"{source}: there is no target column {target!r}; the columns are {listed(names)}{meant([target], names)}"
        )
    if missing:
        near = meant(missing, [name for name in names if name not in wanted])
        mend = " If so, rename in the table." if near else "; add what is missing, with empty cells where unknown"
        raise DataError(f"{source}: no feature columns {listed(missing)}; the columns are {listed(names)}{near}{mend}")
    return [name for name in names if name in wanted or name == target]


def read_names(source: Place, form: Form | None = None) -> list[str]:
    """Return the names of a table's columns, in order."""
    with open_source(source, form or Form()) as opened:
        return opened.names


def _pieces(batches: Iterable[Any]) -> Iterator[Any]:
    """Yield record batches with few rows as larger ones."""
    import pyarrow

    waiting: list[Any] = []
    for batch in itertools.chain(batches, [None]):
        if waiting and (batch is None or sum(piece.num_rows for piece in waiting) >= _FEWEST):
            yield from pyarrow.Table.from_batches(waiting).combine_chunks().to_batches()
            waiting = []
        if batch is not None and batch.num_rows:
            waiting.append(batch)


def _refuse(source: Place, problems: Problems, opened: Source) -> None:
    """Raise the DataError with all problems; those of text have the numbers of their lines."""
    if opened.records is None:
        problems.check(lambda row: f"row {row}")
        return
    lines = array("q")
    for line, row in opened.records():
        if len(row) == len(opened.names):
            lines.append(line)
        else:
            problems.add(
                "",
                line,
                f"expected {len(opened.names)} fields, as the header has, found {len(row)}; put quotes around fields "
                f"that contain {opened.sep!r}",
            )
    problems.check(lambda row: f"line {lines[row]}")
    raise DataError(f"{source}: some rows have another number of fields than the header, which has {len(opened.names)}")


def meant(given: Iterable[str], names: Iterable[str]) -> str:
    """Return a question that names the columns nearest to the ``given`` names, in small letters or capitals."""
    known = {name.lower(): name for name in names}
    near = [difflib.get_close_matches(name.lower(), known, n=1) for name in given]
    found = list(dict.fromkeys(known[one] for names in near for one in names))
    return f"; did you mean {listed(found)}?" if found else ""


def listed(names: Iterable[object]) -> str:
    """Return names as text, at most thirty of them."""
    shown = [repr(name) for name in names]
    return ", ".join(shown) if len(shown) <= 30 else ", ".join(shown[:30]) + f" and {len(shown) - 30} more"
