"""Checks where the user meets the library: numbers, names, folders, a library, cells; and the text of its messages."""

import difflib
import functools
import inspect
import math
import numbers
import operator
import os
import sys
import time
from collections import Counter
from collections.abc import Callable, Collection, Container, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar, cast

import numpy as np

from fusemlp_kernels.errors import ArgumentError, ArgumentTypeError, DataError, MissingLibraryError, unknown_name

Kind = TypeVar("Kind")
WINDOWS = os.name == "nt"


def arrow() -> Any:
    """Return the module pyarrow, which only tables and Parquet files need. Raises MissingLibraryError without it."""
    try:
        import pyarrow
    except ImportError as error:
        raise MissingLibraryError("pyarrow: tables and Parquet files need it: pip install pyarrow") from error
    return pyarrow


def no_folder(argument: str, folder: Path, purpose: str = "") -> ArgumentError:
    """Return the error for a folder that is not there, with the command that makes it."""
    # cmd.exe makes the folders above it too, and would make one called -p
    command = "mkdir" if WINDOWS else "mkdir -p"
    return ArgumentError(f"{argument}: there is no folder {str(folder)!r}{purpose}; make it first: {command} {folder}")


def as_path(argument: str, value: Any, kind: str = "file") -> str:
    """Return the path of a file or a folder as text; refuse other types."""
    if not isinstance(value, str | os.PathLike):
        raise ArgumentTypeError(f"{argument}: expected the path of a {kind}, got {value!r}")
    return os.fspath(value)


def as_kind(argument: str, value: object, kind: type[Kind], expected: str) -> Kind:
    """Return ``value`` if it is of a kind; the error says what was ``expected``."""
    if not isinstance(value, kind):
        raise ArgumentTypeError(f"{argument}: expected {expected}, got {value!r}")
    return value


def check_flag(argument: str, value: object) -> bool:
    """Return ``value`` as a bool; refuse anything but True and False."""
    if not isinstance(value, bool | np.bool_):
        raise ArgumentTypeError(f"{argument}: expected True or False, got {value!r}")
    return bool(value)


def check_choice(
    argument: str,
    value: object,
    choices: Collection[str],
    expected: str = "",
    elsewhere: Mapping[str, str] | None = None,
) -> str:
    """Return ``value`` if it is one of the names in ``choices``; the error says which is nearest.

    ``expected`` is for the error of a value that is not a string. ``elsewhere`` maps other libraries' names, which are
    taken too, to ours.
    """
    if not isinstance(value, str):
        raise ArgumentTypeError(f"{argument}: expected {expected or 'one of ' + ', '.join(choices)}, got {value!r}")
    name = elsewhere.get(value, value) if elsewhere else value
    if name not in choices:
        raise unknown_name(argument, name, choices)
    return name


def check_keys(argument: str, config: Mapping[str, Any], expected: Iterable[str]) -> None:
    """Refuse a stored configuration that lacks one of the ``expected`` keys or has others."""
    wanted = set(expected)
    missing, extra = sorted(wanted - config.keys()), sorted(config.keys() - wanted)
    if missing or extra:
        raise ArgumentError(
            f"{argument}: the configuration has the wrong keys: missing {missing}, unknown {extra}; "
            "it was written by another version or changed by hand"
        )


def freeze(description: object, **values: object) -> None:
    """Set the checked values of a frozen dataclass that is being constructed."""
    for name, value in values.items():
        object.__setattr__(description, name, value)


def as_count(argument: str, value: Any, *, minimum: int = 1, maximum: int | None = None) -> int:
    """Return a whole number from ``minimum`` to ``maximum``; accept NumPy's integers, refuse bool and floats."""
    try:
        if isinstance(value, (bool, np.bool_)):
            raise TypeError("a truth value is no count")
        count = operator.index(value)
    except TypeError as error:
        mend = f"; write {value:.0f}" if isinstance(value, float) and value.is_integer() else ""
        raise ArgumentTypeError(
            f"{argument}: expected a whole number of at least {minimum}, got {value!r} ({type(value).__name__}){mend}"
        ) from error
    if count < minimum:
        raise ArgumentError(f"{argument}: expected a whole number of at least {minimum}, got {count}")
    if maximum is not None and count > maximum:
        raise ArgumentError(f"{argument}: expected a whole number of at most {maximum}, got {count}")
    return count


# Patience of early stopping that follows the training: this share of the epochs up to the best one, within limits.
AUTO, PATIENCE_SHARE, LEAST_PATIENCE, MOST_PATIENCE = "auto", 2 / 3, 8, 20


def as_patience(argument: str, value: Any, *, minimum: int = 1) -> int | str:
    """Return the epochs that early stopping waits, a whole number from ``minimum`` on, or "auto"."""
    if isinstance(value, str) and value != AUTO:
        raise ArgumentError(f"{argument}: expected a whole number of epochs or {AUTO!r}, got {value!r}")
    return value if isinstance(value, str) else as_count(argument, value, minimum=minimum)


def patience_after(patience: int | str | None, epochs: int) -> float:
    """Return for how many epochs a fit waits whose best one was epoch number ``epochs``; without patience for ever."""
    if patience is None:
        return math.inf
    return min(MOST_PATIENCE, max(LEAST_PATIENCE, PATIENCE_SHARE * epochs)) if isinstance(patience, str) else patience


def as_number(
    argument: str,
    value: Any,
    *,
    low: float | None = None,
    high: float | None = None,
    low_open: bool = False,
    high_open: bool = False,
) -> float:
    """Return a finite real number between ``low`` and ``high``; an open end does not include its bound."""
    real = isinstance(value, numbers.Real) and not isinstance(value, (bool, np.bool_))
    try:
        number = float(value) if real else math.nan
    except OverflowError:
        number = math.inf
    above = low is None or number > low or (number == low and not low_open)
    below = high is None or number < high or (number == high and not high_open)
    if above and below and math.isfinite(number):
        # of two zeros one: descriptions that are equal compute the same, bit for bit
        return number + 0.0
    least = "" if low is None else f" above {low:g}" if low_open else f" of at least {low:g}"
    most = "" if high is None else f" below {high:g}" if high_open else f" at most {high:g}"
    wanted = f"{argument}: expected a finite number{least}{' and' * bool(least and most)}{most}, got {value!r}"
    raise ArgumentError(wanted) if real else ArgumentTypeError(f"{wanted} ({type(value).__name__})")


def function_name(function: Any) -> str:
    """Return the name of a function, of the one inside a ``functools.partial``, or of the type of another callable."""
    inner = getattr(function, "func", function)
    name: str = getattr(inner, "__name__", type(inner).__name__)
    return name


def returned_number(argument: str, name: str, value: Any) -> float:
    """Return the number that the function ``name`` has returned, which may be NaN; refuse anything else."""
    # np.ndim takes a microsecond, in each step with a loss of the caller's
    if isinstance(value, float):
        return float(value)
    try:
        if np.ndim(value) == 0 and not isinstance(value, str | bytes):
            return float(value)
    except (TypeError, ValueError, RuntimeError):
        # torch's complex numbers raise the last
        pass
    what = f"an array of shape {tuple(value.shape)}" if getattr(value, "shape", ()) else repr(value)
    raise ArgumentTypeError(f"{argument}: {name!r} returned {what}; expected one number, such as errors.mean()")


def as_deadline(argument: str, seconds: Any) -> float:
    """Return when ``seconds`` from now are over, as ``time.monotonic`` tells it; infinity for None."""
    if seconds is None:
        return math.inf
    return time.monotonic() + as_number(argument, seconds, low=0.0, low_open=True)


def caller_level() -> int:
    """Return the ``stacklevel`` with which the calling function warns the first caller outside this package."""
    frame, level = sys._getframe(1), 1
    # blocks of a ``with`` are entered by contextlib
    while frame.f_back and frame.f_globals.get("__name__", "").partition(".")[0] in ("fusemlp", "contextlib"):
        frame, level = frame.f_back, level + 1
    return level


Function = TypeVar("Function", bound=Callable[..., Any])

_POSITIONAL = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
_WITHOUT_NAME = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.VAR_KEYWORD)


def knows_names(
    elsewhere: Mapping[str, str], *, call: str = "", also: Collection[str] = (), unused: Collection[str] = ()
) -> Callable[[Function], Function]:
    """Return a decorator that refuses keywords that the function does not have, and says what to write.

    ``elsewhere`` has a sentence for each name of another library. For other names the error proposes the nearest
    parameter. ``call`` shows a call, for too many arguments without names; ``also`` are keywords that the function
    hands on, ``unused`` those of other libraries that change no result here: they are taken and do nothing. Raises
    ArgumentTypeError, a TypeError.
    """

    def decorate(function: Function) -> Function:
        parameters = inspect.signature(function).parameters.values()
        names = {*also, *(parameter.name for parameter in parameters if parameter.kind not in _WITHOUT_NAME)}
        most = sum(parameter.kind in _POSITIONAL for parameter in parameters)
        shown = [name for name in names if name not in ("self", "cls", "engine")]

        @functools.wraps(function)
        def checked(*arguments: Any, **named: Any) -> Any:
            if not named and len(arguments) <= most:
                return function(*arguments)
            for name in [name for name in named if name not in names]:
                if name not in unused:
                    raise ArgumentTypeError(_refusal(name, elsewhere, shown))
                del named[name]
            if len(arguments) > most and call:
                raise ArgumentTypeError(f"{call.partition('(')[0]}: too many arguments without names; write {call}")
            return function(*arguments, **named)

        return cast("Function", checked)

    return decorate


def knows_names_of(cls: Any, elsewhere: Mapping[str, str]) -> None:
    """Let the constructor that a dataclass has been given refuse keywords as ``knows_names`` does."""
    cls.__init__ = knows_names(elsewhere)(cls.__init__)


def _refusal(name: str, elsewhere: Mapping[str, str], known: list[str]) -> str:
    if name in elsewhere:
        return f"{name}: {elsewhere[name]}"
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    hint = f"; did you mean {near[0]!r}? There" if near else "; there"
    return f"{name}: there is no such argument{hint} are {', '.join(sorted(known))}"


class _Absent:
    """An attribute that is not there, to read or to set: an AttributeError with a sentence.

    A ``__getattr__`` would slow every attribute of the class down.
    """

    def __init__(self, text: str) -> None:
        self.text = self.__doc__ = text

    def __get__(self, instance: object, owner: type) -> Any:
        raise AttributeError(self.text)

    __set__ = __get__


def names_absent(cls: Any, elsewhere: Mapping[str, str]) -> None:
    """Let the error for attributes that other libraries have say what to use; ``dir`` does not list them."""
    for name, sentence in elsewhere.items():
        setattr(cls, name, _Absent(f"{cls.__name__} has no attribute {name!r}: {sentence}"))

    def listed(self: object) -> list[str]:
        return [name for name in object.__dir__(self) if name not in elsewhere]

    cls.__dir__ = listed


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
            for row, text in several:
                where = [] if row is None else [place(row) if at else f"line {row}"]
                lines.append(": ".join(filter(None, [", ".join([*where, *at]), text])))
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
