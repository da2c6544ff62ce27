"""Checks of numbers, names, flags and folders where the user meets the library."""

from __future__ import annotations

import math
import numbers
import operator
import os
import sys
import time
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from fusemlp_kernels.errors import ArgumentError, ArgumentTypeError, unknown_name

WINDOWS = os.name == "nt"


def no_folder(argument: str, folder: Path, purpose: str = "") -> ArgumentError:
    """Return the error for a folder that is not there, with the command that makes it."""
    # cmd.exe makes the folders above it too, and would make one called -p
    command = "mkdir" if WINDOWS else "mkdir -p"
    return ArgumentError(f"{argument}: there is no folder {str(folder)!r}{purpose}; make it first: {command} {folder}")


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

    ``expected`` is for the error of a value that is not a string. ``elsewhere`` maps other libraries' names to ours.
    """
    if not isinstance(value, str):
        raise ArgumentTypeError(f"{argument}: expected {expected or 'one of ' + ', '.join(choices)}, got {value!r}")
    if elsewhere and value in elsewhere:
        raise ArgumentError(f"{argument}: unknown name {value!r}; it is called {elsewhere[value]!r} here")
    if value not in choices:
        raise unknown_name(argument, value, choices)
    return value


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
