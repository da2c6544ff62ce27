"""The mistakes of a table, in one message."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

from fusemlp_kernels.errors import DataError

# The number of mistakes in a message.
_SHOWN = 30


class Problems:
    """The mistakes of a table, for one message: the first few of each column and a count of the others."""

    def __init__(self, source: object) -> None:
        self.source = source
        self.found: dict[str, list[tuple[int | None, str]]] = {}
        self.more: Counter[str] = Counter()

    def add(self, column: str, row: int | None, text: str) -> None:
        """Enter a mistake of a row, or of the whole column."""
        several = self.found.setdefault(column, [])
        if len(several) < 3:
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
