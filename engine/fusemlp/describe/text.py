"""Text for messages: numbers of bytes, lists of names, tables, and the mistakes of a table."""

import difflib
from collections import Counter
from collections.abc import Callable, Container, Iterable, Sequence

from fusemlp_kernels.errors import DataError


def bytes_text(count: int) -> str:
    """Return a number of bytes as ``9.41 KiB``."""
    size, units = float(count), iter(("B", "KiB", "MiB", "GiB"))
    unit = next(units)
    while size >= 1024.0 and unit != "GiB":
        size, unit = size / 1024.0, next(units)
    return f"{count} B" if unit == "B" else f"{size:.3g} {unit}" if size < 1000.0 else f"{size:.0f} {unit}"


def counted(count: int, noun: str) -> str:
    """Return a number with its noun: 1 row, 2 rows, 3 classes."""
    return f"{count} {noun}{'' if count == 1 else 'es' if noun.endswith('s') else 's'}"


def aligned(rows: Sequence[Sequence[str]], *, left: Container[int] = (0,)) -> str:
    """Return rows as aligned text, the columns ``left`` to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        words = [
            word.ljust(width) if index in left else word.rjust(width)
            for index, (word, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  ".join(words).rstrip())
    return "\n".join(lines)


# The number of mistakes in a message.
_SHOWN = 30


class Problems:
    """The mistakes of a table, for one message: the first few kinds of each column and a count of the others."""

    def __init__(self, source: object) -> None:
        self.source = source
        self.found: dict[str, list[tuple[int | None, str]]] = {}
        self.more: Counter[str] = Counter()

    def add(self, column: str, row: int | None, text: str) -> None:
        """Enter a mistake of a row, or of the whole column."""
        several = self.found.setdefault(column, [])
        if len(several) < 3 and text not in (known for _, known in several):
            several.append((row, text))
        else:
            self.more[column] += 1

    def check(self, place: Callable[[int], str]) -> None:
        """Raise the DataError that names all; ``place`` names a row."""
        lines = []
        for column, several in self.found.items():
            at = [f"column {column!r}"] if column else []
            lines += [
                f"{', '.join([*([] if row is None else [place(row) if at else f'line {row}']), *at])}: {text}"
                for row, text in several
            ]
            if self.more[column]:
                lines[-1] += f" (and {self.more[column]} more{f' in column {column!r}' if column else ''})"
        total = len(lines) + sum(self.more.values())
        if total == 1:
            raise DataError(f"{self.source}, {lines[0]}")
        if lines:
            hidden = len(lines) - _SHOWN
            shown = [*lines[:_SHOWN], *([f"and {hidden} more"] if hidden > 0 else [])]
            raise DataError(f"{self.source}: {total} mistakes:\n  " + "\n  ".join(shown))


def some(parts: Sequence[str], most: int = 20) -> str:
    """Return parts as text, at most this many of them."""
    return ", ".join(parts[:most]) + (f" and {len(parts) - most} more" if len(parts) > most else "")


def listed(names: Iterable[object]) -> str:
    """Return names as text, at most thirty of them."""
    return some([repr(name) for name in names], 30)


def meant(given: Iterable[str], names: Iterable[str]) -> str:
    """Return a question that names the columns nearest to the ``given`` names, in small letters or capitals."""
    known = {name.lower(): name for name in names}
    # a lower cutoff than 0.7 takes 'kind' for 'id'
    near = [difflib.get_close_matches(name.lower(), known, n=1, cutoff=0.7) for name in given]
    found = list(dict.fromkeys(known[one] for names in near for one in names))
    return f"; did you mean {listed(found)}?" if found else ""
