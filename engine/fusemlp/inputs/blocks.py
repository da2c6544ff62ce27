"""Data larger than memory: shuffled batches of memory-mapped arrays and Parquet files, a window of blocks at a time."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np

from fusemlp.describe.checks import arrow, as_count, check_flag
from fusemlp.inputs.arrays import Array
from fusemlp_kernels.errors import ArgumentError, ArgumentTypeError, DataError, DTypeError, ShapeError


class BatchArray(NamedTuple):
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
        self.parts = [BatchArray(array.shape[1:], array.dtype) for array in self._arrays]

    def read(self, block: int, into: Sequence[Array]) -> None:
        """Copy the rows of a block."""
        start = block * self._block_rows
        for array, rows in zip(self._arrays, into, strict=True):
            rows[:] = array[start : start + len(rows)]


def _opened(name: str, source: Any) -> Any:
    if source is None:
        raise ArgumentTypeError(f"{name}: it is missing; give X and y, or a Parquet file and target=")
    if isinstance(source, str | Path):
        if Path(source).suffix != ".npy":
            raise ArgumentError(f"{name}: expected a .npy file, got {str(source)!r}; with a Parquet file give target=")
        try:
            source = np.load(source, mmap_mode="r", allow_pickle=False)
        except (OSError, ValueError) as error:
            raise DataError(f"{name}: {str(source)!r} cannot be read as a .npy file ({error})") from error
    if not isinstance(source, np.ndarray) or not source.ndim:
        raise ArgumentTypeError(
            f"{name}: expected an array such as numpy.load(path, mmap_mode='r'), or the path of a .npy file, got "
            f"{type(source).__name__}"
        )
    return source


class RowGroups:
    """Row groups of Parquet files."""

    def __init__(self, X: Any, target: Any, columns: Any, weight: Any) -> None:
        targets = _names("target", target)
        others = [*targets, *([] if weight is None else _names("weight", weight, several=False))]
        chosen = None if columns is None else _names("columns", columns)
        paths = [X] if isinstance(X, str | Path) else X
        if not isinstance(paths, list | tuple) or not paths or not all(isinstance(path, str | Path) for path in paths):
            raise ArgumentTypeError(f"X: expected the path of a Parquet file, or a list of paths, got {X!r}")
        self._groups: list[tuple[Any, int]] = []
        self.sizes: list[int] = []
        types: dict[str, Any] = {}
        for path in paths:
            file = _file(path)
            schema = dict(zip(file.schema_arrow.names, file.schema_arrow.types, strict=True))
            if types and schema != types:
                raise DataError(f"X: {str(path)!r} has other columns than {str(paths[0])!r}; give files of one kind")
            types = schema
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
        if isinstance(target, str) and np.dtype(types[target].to_pandas_dtype()).kind != "f":
            y = np.dtype(np.int64)
        self.parts = [
            BatchArray((len(names["columns"]),), x),
            BatchArray(() if isinstance(target, str) else (len(targets),), y),
        ]
        self.parts += [BatchArray((), np.dtype(np.float64))] * (weight is not None)

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
    pyarrow = arrow()
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


def _common(kinds: Sequence[Any]) -> np.dtype[Any]:
    """Return the real type that holds the numbers of all columns, float32 or float64."""
    return np.result_type(np.float32, *(kind.to_pandas_dtype() for kind in kinds))


# rows of a block of arrays
BLOCK_ROWS = 4096


class Peers(Protocol):
    """The processes that read blocks together, this one being number ``rank`` of ``world``."""

    rank: int
    world: int

    def swap(self, rows: Sequence[Array], counts: Sequence[int]) -> Array:
        """Send ``rows[r]`` to process r; return what each has sent to this one, by process, ``counts[r]`` rows."""


class Blocks:
    """Batches ``(x, y)`` or ``(x, y, sample_weight)`` of rows that need not fit into memory, for ``fit``.

    An epoch takes the blocks in a random order, ``window`` of them at a time, and shuffles the rows of a window. So
    ``window_bytes`` are in memory. The order is a function of ``seed`` and the engine's epoch; a resumed ``fit`` goes
    on with the same batches. Many small blocks mix best where neighbouring rows are alike, as if sorted by class.

    ``X`` (n, K), ``y`` and perhaps ``sample_weight`` are arrays with n rows, such as ``numpy.load(path,
    mmap_mode="r")``, or paths of .npy files, which are opened so. ``block_rows``: the neighbouring rows of a block, by
    default 4096.

    With ``target``, X is the path of a Parquet file, or paths of several with the same columns. A block is a row group,
    and one more is in memory while it is read. ``target`` names the column of y (n,), or columns (n, N), ``weight``
    that of the weights, ``columns`` those of x, by default all others. All hold numbers.

    ``drop_last``: leave out the last batch of an epoch if it is short. ``shuffle=False`` keeps the rows as they are.

    Processes that train together get the same batches: each reads its part of the blocks, and sends others their rows.

    Raises ArgumentError, ArgumentTypeError, ShapeError, DTypeError or DataError for what gives no batches.
    """

    def __init__(
        self,
        X: Any,
        y: Any = None,
        sample_weight: Any = None,
        *,
        batch_size: int = 32,
        target: str | Sequence[str] | None = None,
        columns: str | Sequence[str] | None = None,
        weight: str | None = None,
        block_rows: int | None = None,
        window: int = 16,
        seed: int = 0,
        shuffle: bool = True,
        drop_last: bool = False,
    ) -> None:
        self.batch_size, self.window = as_count("batch_size", batch_size), as_count("window", window)
        self.seed = as_count("seed", seed, minimum=0)
        self.shuffle, self.drop_last = check_flag("shuffle", shuffle), check_flag("drop_last", drop_last)
        self._source: ArrayBlocks | RowGroups
        if target is None:
            for name, value in (("columns", columns), ("weight", weight)):
                if value is not None:
                    raise ArgumentError(f"{name}: it names columns of a Parquet file; give target= too")
            size = BLOCK_ROWS if block_rows is None else as_count("block_rows", block_rows)
            self._source = ArrayBlocks(X, y, sample_weight, size)
        elif y is not None or sample_weight is not None:
            raise ArgumentError("target: it names y in a Parquet file, and arrays are given too; give one of the two")
        elif block_rows is not None:
            raise ArgumentError("block_rows: it is for arrays; leave it out: blocks of a Parquet file are row groups")
        else:
            self._source = RowGroups(X, target, columns, weight)
        # the row with which each block begins, and the end
        self._starts = np.concatenate([[0], np.cumsum(self._source.sizes)])
        self.rows = int(self._starts[-1])
        if not len(self):
            raise ArgumentError(
                f"batch_size: {self.batch_size} is more than the {self.rows} rows, and drop_last leaves out the short "
                "batch; use a smaller batch_size or drop_last=False"
            )
        self._next = 0

    def __len__(self) -> int:
        """Return the number of batches of an epoch."""
        whole, rest = divmod(self.rows, self.batch_size)
        return whole + (rest > 0 and not self.drop_last)

    @property
    def batch_rows(self) -> int:
        """The rows of a batch that is not short."""
        return min(self.batch_size, self.rows)

    @property
    def window_bytes(self) -> int:
        """The bytes of the largest window, and of the rows before it that do not fill a batch."""
        row = sum(int(np.prod(part.shape)) * part.dtype.itemsize for part in self._source.parts)
        return self._most_rows * row

    @property
    def _most_rows(self) -> int:
        return min(self.rows, sum(sorted(self._source.sizes)[-self.window :]) + self.batch_size - 1)

    def seek(self, batches: int) -> None:
        """Begin the next pass after this many batches, counted over all epochs; ``fit`` does so itself."""
        self._next = as_count("batches", batches, minimum=0)

    def order(self, epoch: int) -> Array:
        """Return the order of the rows (n,) in an epoch, int64: 8 bytes a row in memory.

        ``fit(X, y, row_order=blocks.order)`` trains on memory-mapped arrays with it, in place and without batches.
        """
        parts = [np.concatenate([self._rows(one) for one in some])[order] for some, order in self._windows(epoch)]
        return np.concatenate(parts)

    def _rows(self, block: int) -> Array:
        return np.arange(self._starts[block], self._starts[block + 1])

    def _windows(self, epoch: int) -> Iterator[tuple[Array, Array]]:
        """Yield the blocks of each window of an epoch, and the order of their rows."""
        generator = np.random.default_rng((self.seed, epoch))
        blocks = np.arange(len(self._source.sizes))
        if self.shuffle:
            generator.shuffle(blocks)
        for at in range(0, len(blocks), self.window):
            some = blocks[at : at + self.window]
            count = int(np.diff(self._starts)[some].sum())
            yield some, generator.permutation(count) if self.shuffle else np.arange(count)

    def __iter__(self) -> Iterator[tuple[Array, ...]]:
        """Yield the batches of an epoch that are left of it, and go on with the next epoch afterwards."""
        return self._batches(lambda blocks, order, done, into: self._read(blocks, into))

    def shared(self, peers: Peers, owner: Callable[[Array], Array]) -> Iterator[tuple[Array, ...]]:
        """Yield the same batches in several processes, with zeros in the rows of x that are not this one's.

        Each process reads its part of the blocks, and they send one another the rows. ``owner`` gives for the place of
        a row in its batch the number of its process.
        """
        return self._batches(partial(self._exchange, peers, owner))

    def described(self) -> dict[str, Any]:
        """Return by name what decides which rows are in which batch."""
        return {
            "Blocks": self,
            "the rows of blocks": np.array(self._source.sizes),
            "the arrays of blocks": [str(part) for part in self._source.parts],
            "shuffle of blocks": self.shuffle,
            "drop_last of blocks": self.drop_last,
        }

    def _batches(self, fetch: Callable[..., None]) -> Iterator[tuple[Array, ...]]:
        """Yield what is left of an epoch; ``fetch(blocks, order, done, into)`` gets the rows of a window.

        Before these, in their ``order``, the epoch has ``done`` rows.
        """
        epoch, first = divmod(self._next, len(self))
        # the next pass is another epoch's
        self._next = (epoch + 1) * len(self)
        size, held = (
            self.batch_size,
            [np.empty((self._most_rows, *part.shape), part.dtype) for part in self._source.parts],
        )
        # rows at the front that do not fill a batch; rows that are read; batches that have passed
        waiting = done = passed = 0
        for blocks, order in self._windows(epoch):
            count = waiting + len(order)
            fetch(blocks, order, done, [array[waiting:count] for array in held])
            rows = np.concatenate([np.arange(waiting), waiting + order])
            done += len(order)
            whole = count if done == self.rows and not self.drop_last else count - count % size
            for start in range(0, whole, size):
                passed += 1
                if passed > first:
                    yield tuple(array[rows[start : start + size]] for array in held)
            waiting = count - whole
            for array in held:
                array[:waiting] = array[rows[whole:]]

    def _read(self, blocks: Array, into: Sequence[Array], first: int = 0, step: int = 1) -> None:
        """Copy every ``step``-th of some blocks, from ``first`` on, to the place of its rows among those of all."""
        for at, stop in [*enumerate(np.cumsum(np.diff(self._starts)[blocks]))][first::step]:
            start = stop - self._source.sizes[blocks[at]]
            self._source.read(int(blocks[at]), [array[start:stop] for array in into])

    def _exchange(
        self, peers: Peers, owner: Callable[[Array], Array], blocks: Array, order: Array, done: int, into: list[Array]
    ) -> None:
        """Read this process's part of some blocks, and get the rest from the others: of x the rows that are its own."""
        self._read(blocks, into, peers.rank, peers.world)
        reader = np.repeat(np.arange(len(blocks)) % peers.world, np.diff(self._starts)[blocks])
        taker = np.empty(len(order), np.int64)
        taker[order] = owner((done + np.arange(len(order))) % self.batch_size)
        read = [np.flatnonzero(reader == rank) for rank in range(peers.world)]
        mine = read[peers.rank]
        x, *others = into
        for rows in others:
            rows[np.concatenate(read)] = peers.swap([rows[mine]] * peers.world, [len(part) for part in read])
        wanted = [part[taker[part] == peers.rank] for part in read]
        sent = [x[mine[taker[mine] == rank]] for rank in range(peers.world)]
        x[np.concatenate(wanted)] = peers.swap(sent, [len(part) for part in wanted])
        x[taker != peers.rank] = 0

    def __repr__(self) -> str:
        return (
            f"Blocks({self.rows} rows in {len(self._source.sizes)} blocks, batch_size={self.batch_size}, "
            f"window={self.window}, seed={self.seed})"
        )
