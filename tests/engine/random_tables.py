"""Small random data files with the oddities of real ones, for ``random_commands``."""

import bz2
import csv
import datetime
import gzip
import io
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import openpyxl
import pyarrow
from pyarrow import feather, parquet

NAMES = ("iris", "wine", "breast_cancer", "diabetes", "digits")
COLUMNS = (
    *("a", "b", "c", "d", "e", "x 1", "=x", "+y", "größe", "日本", "a,b", 'the "x"', "--epochs", "%s {0} $x$ \\"),
    *("prediction", "set", "low", "y", "column_1", "two\nlines", "long " * 40 + "name"),
)
# Names by which a line is taken for numbers, or that are changed.
ODD = ("", " padded ", "-1", "nan")
ROWS = (1, 2, 3, 12, 30, *[60] * 10, *[120] * 5)
DAY = datetime.datetime(2024, 1, 1)

# The cell of row i of each kind of column.
NUMBERS = {
    "normal": lambda draw, i: f"{draw.gauss(0, 1):.4g}",
    "whole": lambda draw, i: f"{draw.randint(0, 9)}",
    "large": lambda draw, i: f"{1e30 * draw.gauss(0, 1):.6g}",
    "huge": lambda draw, i: f"{1e300 * draw.gauss(0, 1):.6g}",
    "tiny": lambda draw, i: f"{1e-30 * draw.gauss(0, 1):.6g}",
    "least": lambda draw, i: f"{1e-300 * draw.gauss(0, 1):.6g}",
    "nearly equal": lambda draw, i: f"{1e9 + 1e-6 * draw.random():.17g}",
    "far": lambda draw, i: f"{1e12 if i == 0 else draw.gauss(0, 1):.6g}",
    "skewed": lambda draw, i: f"{2.0 ** draw.gauss(0, 9):.6g}",
    "counts": lambda draw, i: f"{int(draw.expovariate(0.2))}",
    "long": lambda draw, i: f"{2**53 + draw.randint(0, 2**40)}",
    "zeros": lambda draw, i: "0",
    "constant": lambda draw, i: "7",
}
ODD_WORDS = ("red", "green", "blue", "=1+1", "größe", "a,b", "two\nlines", "|", "10.0", "10")
WORDS = {
    "two": lambda draw, i: draw.choice(("no", "yes")),
    "words": lambda draw, i: draw.choice(ODD_WORDS),
    "truth": lambda draw, i: draw.choice(("TRUE", "false")),
    "names": lambda draw, i: f"name {i}",
    "one word": lambda draw, i: "same",
    "rare": lambda draw, i: "rare" if i == 0 else "often",
    "mixed": lambda draw, i: draw.choice(("1", "2.5", "many")),
    "zip": lambda draw, i: f"{draw.randint(0, 99):05}",
}
OTHERS = {
    "dates": lambda draw, i: f"{DAY + datetime.timedelta(draw.randint(0, 999)):%Y-%m-%d}",
    "times": lambda draw, i: f"{DAY + datetime.timedelta(hours=draw.randint(0, 9999)):%Y-%m-%d %H:%M:%S}",
    "zone": lambda draw, i: f"{DAY + datetime.timedelta(draw.randint(0, 999)):%Y-%m-%dT%H:%M:%S+02:00}",
    "european": lambda draw, i: f"{DAY + datetime.timedelta(draw.randint(0, 999)):%d.%m.%Y}",
    "money": lambda draw, i: f"${draw.randint(1, 9)},{draw.randint(0, 999):03}",
    "share": lambda draw, i: f"{draw.randint(0, 100)}%",
    "empty": lambda draw, i: "",
    "counter": lambda draw, i: f"{i}",
    "infinite": lambda draw, i: draw.choice(("inf", "1")),
}
KINDS = NUMBERS | WORDS | OTHERS
# Columns that a network can learn from stand more often than odd ones.
USUAL = ("normal", "normal", "whole", "two", "words", "dates")
USUAL_TARGETS = ("normal", "two", "two", "whole", "counts", "skewed")
ODD_TARGETS = tuple(kind for kind in KINDS if kind not in ("empty", "infinite"))


@dataclass(frozen=True)
class Table:
    """A data file: the names and kinds of its columns, which of them is the target, and its form.

    ``target`` is "" for a file without columns.
    """

    path: Path
    rows: int
    columns: tuple[tuple[str, str], ...] = ()
    target: str = ""
    missing: tuple[str, ...] = ()
    sep: str = ","
    decimal: str = "."
    encoding: str = "utf-8"
    header: bool = True

    @property
    def names(self):
        return [name for name, _ in self.columns]


def new_data(folder, draw):
    """Return a data set: mostly a table in a file, now and then a file of arrays or one by name."""
    kind = draw.random()
    if kind < 0.1:
        return Table(Path(draw.choice(NAMES)), 0)
    return _arrays(folder / "data.npz", draw) if kind < 0.25 else new_table(folder, draw)


def new_table(folder, draw):
    names = draw.sample(COLUMNS, draw.randint(2, 6))
    if draw.random() < 0.1:
        names[-1] = draw.choice((*ODD, names[0]))
    kinds = [draw.choice(USUAL if draw.random() < 0.6 else tuple(KINDS)) for _ in names]
    kinds[0] = draw.choice(USUAL_TARGETS if draw.random() < 0.7 else ODD_TARGETS)
    suffix = draw.choice((*[".csv"] * 6, ".tsv", ".csv.gz", ".csv.bz2", ".parquet", ".feather", ".xlsx"))
    sep, decimal = draw.choice(((",", "."), (",", "."), (";", ","), ("|", ".")))
    text = suffix.startswith(".csv")
    header = not text or draw.random() < 0.95
    if not header:
        names = [f"column_{at + 1}" for at in range(len(names))]
    table = Table(
        folder / f"data{suffix}",
        draw.choice(ROWS),
        tuple(zip(names, kinds, strict=True)),
        names[0],
        tuple(name for name in names if draw.random() < 0.2),
        sep if text else "\t",
        decimal if text else ".",
        draw.choice(("utf-8", "utf-8", "utf-8-sig", "utf-16", "cp1252")),
        header,
    )
    write(table, draw)
    return table


def changed(table, path, draw):
    """Return a file with new cells in the columns of ``table``, in another order, some of them left out or added."""
    columns = [column for column in table.columns if draw.random() < 0.95]
    if draw.random() < 0.2:
        columns.append(("added", draw.choice(tuple(KINDS))))
    if draw.random() < 0.2:
        columns = [(name, kind if draw.random() < 0.5 else draw.choice(tuple(KINDS))) for name, kind in columns]
    if draw.random() < 0.5:
        draw.shuffle(columns)
    other = replace(table, path=path, rows=draw.choice(ROWS), columns=tuple(columns or table.columns))
    write(other, draw)
    return other


def write(table, draw):
    """Write random cells of the kinds of the columns into the file of a table."""
    cells = [[_cell(table, name, kind, draw, i) for name, kind in table.columns] for i in range(table.rows)]
    suffix = table.path.suffix
    if suffix == ".xlsx":
        book = openpyxl.Workbook()
        for row in [table.names, *cells]:
            book.active.append([_number(cell) for cell in row])
        book.save(table.path)
    elif suffix in (".parquet", ".feather"):
        columns = [[row[at] or None for row in cells] for at in range(len(table.columns))]
        typed = [_typed(column) for column in columns]
        {".parquet": parquet.write_table, ".feather": feather.write_feather}[suffix](
            pyarrow.Table.from_arrays([pyarrow.array(column) for column in typed], names=table.names), table.path
        )
    else:
        stream = io.StringIO(newline="")
        csv.writer(stream, delimiter=table.sep).writerows(([table.names] if table.header else []) + cells)
        content = stream.getvalue().encode(table.encoding, errors="replace")
        packed = {".gz": gzip.compress, ".bz2": bz2.compress}.get(suffix, bytes)
        table.path.write_bytes(packed(content))


def _cell(table, name, kind, draw, i):
    cell = KINDS[kind](draw, i)
    if name in table.missing and draw.random() < 0.3:
        return draw.choice(("", "", "NA"))
    return cell.replace(".", table.decimal) if kind in NUMBERS else cell


def _number(cell):
    try:
        return float(cell)
    except ValueError:
        return cell or None


def _typed(column):
    """Return a column of one type: numbers if all of its cells are."""
    try:
        return [None if cell is None else float(cell) for cell in column]
    except ValueError:
        return column


def _arrays(path, draw):
    """Return a file of arrays X and y, some with a test set of their own."""
    generator = np.random.default_rng(draw.randrange(2**32))
    rows, width = draw.choice(ROWS), draw.choice((1, 2, 5))
    shape = (8, 8) if draw.random() < 0.2 else (width,)
    inputs, targets = draw.choice((*["normal"] * 3, *INPUTS)), draw.choice(("classes", *TARGETS))

    def pair(count):
        return INPUTS[inputs](generator, (count, *shape)), TARGETS[targets](generator, count)

    X, y = pair(rows)
    if draw.random() < 0.2:
        X_test, y_test = pair(draw.choice(ROWS))
        np.savez(path, x_train=X, y_train=y, x_test=X_test, y_test=y_test)
    else:
        np.savez(path, X=X, y=y)
    return Table(path, rows)


INPUTS = {
    "normal": lambda generator, shape: generator.normal(size=shape),
    "single": lambda generator, shape: generator.normal(size=shape).astype(np.float32),
    "pixels": lambda generator, shape: generator.integers(0, 256, shape).astype(np.uint8),
    "huge": lambda generator, shape: 1e300 * generator.normal(size=shape),
    "constant": lambda generator, shape: np.ones(shape),
    "missing": lambda generator, shape: np.where(generator.random(shape) < 0.1, np.nan, 1.0),
}
TARGETS = {
    "classes": lambda generator, count: generator.integers(0, 3, count),
    "words": lambda generator, count: generator.choice(["p", "q"], count),
    "truth": lambda generator, count: generator.random(count) < 0.5,
    "numbers": lambda generator, count: generator.normal(size=count),
    "counts": lambda generator, count: generator.poisson(3.0, count),
    "several": lambda generator, count: generator.normal(size=(count, 2)),
    "labels": lambda generator, count: generator.integers(0, 2, (count, 3)),
    "constant": lambda generator, count: np.zeros(count),
    "negative": lambda generator, count: generator.integers(-3, 0, count),
}
