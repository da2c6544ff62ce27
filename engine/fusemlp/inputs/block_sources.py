"""The rows of ``Blocks`` in their places: arrays that may be memory-mapped, and row groups of Parquet files."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from fusemlp.inputs.arrays import Array
from fusemlp_kernels.errors import ArgumentError, ArgumentTypeError, DataError, DTypeError, ShapeError


class Part(NamedTuple):
    """An array of a batch: its shape after the rows, and its type."""

    shape: tuple[int, ...]
    dtype: np.dtype[Any]


class ArrayBlocks:
    """Blocks of neighbouring rows of arrays."""

    def __init__(self, X: Any, y: Any, weight: Any, block_rows: int) -> None:
        given = {"X": X, "y": y, **({} if weight is None else {"sample_weight": weight})}
        self._arrays = [_opened(name, array) for name, array in given.items()]
        rows = len(self._arrays[0])
        for name, array in zip(given, self._arrays, strict=True):
            if len(array) != rows:
                raise ShapeError(f"{name}: expected {rows} rows, as many as X has, got shape {array.shape}")
        if not rows:
            raise DataError("X: expected 1 or more rows, got 0")
        self._block_rows = block_rows
        self.sizes = [min(block_rows, rows - start) for start in range(0, rows, block_rows)]
        self.parts = [Part(array.shape[1:], array.dtype) for array in self._arrays]

    def read(self, block: int, into: Sequence[Array]) -> None:
        """Copy the rows of a block."""
        start = block * self._block_rows
        for array, rows in zip(self._arrays, into, strict=True):
            rows[:] = array[start : start + len(rows)]


def _opened(name: str, given: Any) -> Any:
    if given is None:
        raise ArgumentTypeError(f"{name}: it is missing; give X and y, or a Parquet file and target=")
    if isinstance(given, str | Path):
        if Path(given).suffix != ".npy":
            raise ArgumentError(f"{name}: expected a .npy file, got {str(given)!r}; with a Parquet file give target=")
        try:
            given = np.load(given, mmap_mode="r", allow_pickle=False)
        except (OSError, ValueError) as error:
            raise DataError(f"{name}: {str(given)!r} cannot be read as a .npy file ({error})") from error
    if not isinstance(given, np.ndarray) or not given.ndim:
        raise ArgumentTypeError(
            f"{name}: expected an array such as numpy.load(path, mmap_mode='r'), or the path of a .npy file, got "
            f"{type(given).__name__}"
        )
    return given


class RowGroups:
    """Row groups of Parquet files."""

    def __init__(self, X: Any, target: Any, columns: Any, weight: Any) -> None:
        targets = _names("target", target)
        others = [*targets, *([] if weight is None else _names("weight", weight, several=False))]
        chosen = None if columns is None else _names("columns", columns)
        paths = [X] if isinstance(X, str | Path) else X
        if not isinstance(paths, list | tuple) or not paths or not all(isinstance(one, str | Path) for one in paths):
            raise ArgumentTypeError(f"X: expected the path of a Parquet file, or a list of paths, got {X!r}")
        self._groups: list[tuple[Any, int]] = []
        self.sizes: list[int] = []
        types: dict[str, Any] = {}
        for path in paths:
            file = _file(path)
            own = dict(zip(file.schema_arrow.names, file.schema_arrow.types, strict=True))
            if types and own != types:
                raise DataError(f"X: {str(path)!r} has other columns than {str(paths[0])!r}; give files of one kind")
            types = own
            self._groups += [(path, group) for group in range(file.num_row_groups)]
            self.sizes += [file.metadata.row_group(group).num_rows for group in range(file.num_row_groups)]
        if not sum(self.sizes):
            raise DataError(f"X: expected 1 or more rows in {', '.join(map(str, paths))}, got 0")
        names = {
            "target": targets,
            "weight": others[len(targets) :],
            "columns": [name for name in types if name not in others] if chosen is None else chosen,
        }
        for argument, some in names.items():
            for name in some:
                _check_number(argument, name, types)
        for argument in ("target", "columns"):
            if not names[argument]:
                raise ArgumentError(f"{argument}: expected the name of 1 column or more of {', '.join(types)}")
        for name in names["columns"]:
            if name in others:
                kind = "target" if name in targets else "weight"
                raise ArgumentError(f"columns: {name!r} is the {kind}, which the network must not read; leave it out")
        # by part: its columns
        self._parts = [names["columns"], targets, *([names["weight"]] if weight is not None else [])]
        x, y = (_common([types[name] for name in some]) for some in self._parts[:2])
        if isinstance(target, str) and not _is_float(types[target]):
            y = np.dtype(np.int64)
        self.parts = [Part((len(names["columns"]),), x), Part(() if isinstance(target, str) else (len(targets),), y)]
        self.parts += [Part((), np.dtype(np.float64))] * (weight is not None)

    def read(self, block: int, into: Sequence[Array]) -> None:
        """Copy the rows of a row group. Raises DataError for a missing value."""
        path, group = self._groups[block]
        names = {name for some in self._parts for name in some}
        table = _file(path).read_row_group(group, columns=sorted(names), use_threads=False)
        for some, rows in zip(self._parts, into, strict=True):
            for place, name in enumerate(some):
                column = table.column(name)
                if column.null_count:
                    raise DataError(
                        f"{name}: row group {group} of {str(path)!r} has {column.null_count} missing values; fill them "
                        "in, or leave the column out with columns="
                    )
                values = column.to_numpy()
                if rows.dtype.kind == "i" and (values > np.iinfo(rows.dtype).max).any():
                    raise DataError(
                        f"{name}: row group {group} of {str(path)!r} has {values.max()}, and a target holds at most "
                        f"{np.iinfo(rows.dtype).max}; number the classes from 0"
                    )
                (rows if rows.ndim == 1 else rows[:, place])[:] = values


def _names(argument: str, given: Any, *, several: bool = True) -> list[str]:
    """Return names of columns as a list."""
    names = list(given) if several and isinstance(given, Iterable) and not isinstance(given, str) else [given]
    if not all(isinstance(name, str) for name in names):
        expected = "the name of a column" + ", or a list of names" * several
        raise ArgumentTypeError(f"{argument}: expected {expected}, got {given!r}")
    return names


def _file(path: str | Path) -> Any:
    import pyarrow
    from pyarrow import parquet

    try:
        return parquet.ParquetFile(path)
    except (OSError, pyarrow.ArrowInvalid) as error:
        raise DataError(f"X: {str(path)!r} cannot be read as a Parquet file ({error})") from error


def _check_number(argument: str, name: str, types: dict[str, Any]) -> None:
    from pyarrow import types as kinds

    if name not in types:
        raise ArgumentError(f"{argument}: there is no column {name!r}; the file has {', '.join(types)}")
    kind = types[name]
    if not (kinds.is_integer(kind) or kinds.is_floating(kind) or kinds.is_boolean(kind)):
        raise DTypeError(
            f"{argument}: the column {name!r} holds {kind}, and batches are numbers; encode it, or name the columns to "
            "use with columns="
        )


def _is_float(kind: Any) -> bool:
    return bool(np.dtype(kind.to_pandas_dtype()).kind == "f")


def _common(kinds: Sequence[Any]) -> np.dtype[Any]:
    """Return the real type that holds the numbers of all columns, float32 or float64."""
    return np.result_type(np.float32, *(kind.to_pandas_dtype() for kind in kinds))
