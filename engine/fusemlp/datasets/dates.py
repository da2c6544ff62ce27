"""Dates in tables: the order of day, month and year in a column's text, and the numbers that a date becomes."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from datetime import datetime, timedelta
from typing import Any

import numpy as np
import numpy.typing as npt

# The orders of year, month and day in text.
ORDERS = ("ymd", "dmy", "mdy")
EXAMPLES = {"ymd": "2024-12-31", "dmy": "31.12.2024", "mdy": "12/31/2024"}
# The number of days since 1970-01-01 is the last; an hour may have a fraction.
PARTS = ("year", "month", "day", "weekday", "hour", "elapsed days")
_TIME = (
    r"(?:[T ]\s*(?P<hour>\d{1,2}):(?P<minute>\d\d)(?::(?P<second>\d\d)(?:[.,](?P<part>\d{1,9}))?)?"
    r"\s*(?P<half>[AaPp][Mm])?\s*(?P<zone>Z|[-+]\d\d:?\d\d)?)?"
)
_YEAR_FIRST = re.compile(r"(?P<a>\d{4})(?P<mark>[-/.])(?P<b>\d{1,2})(?P=mark)(?P<c>\d{1,2})" + _TIME)
_YEAR_LAST = re.compile(r"(?P<a>\d{1,2})(?P<mark>[-/.])(?P<b>\d{1,2})(?P=mark)(?P<c>\d{4})" + _TIME)


def parse_date(text: str, order: str) -> datetime | None:
    """Return the date, with its time in UTC if it names a zone; None for other text."""
    match = (_YEAR_FIRST if order == "ymd" else _YEAR_LAST).fullmatch(text)
    if match is None or (order == "mdy" and match["mark"] == "."):
        return None
    values = {letter: int(match[group]) for letter, group in zip(order, "abc", strict=True)}
    hour = int(match["hour"] or 0)
    if match["half"]:
        if not 1 <= hour <= 12:
            return None
        hour = hour % 12 + (12 if match["half"].lower() == "pm" else 0)
    micro = int((match["part"] or "0")[:6].ljust(6, "0"))
    try:
        moment = datetime(
            values["y"], values["m"], values["d"], hour, int(match["minute"] or 0), int(match["second"] or 0), micro
        )
        if match["zone"] and match["zone"] != "Z":
            sign, digits = match["zone"][0], match["zone"][1:].replace(":", "")
            offset = timedelta(hours=int(digits[:2]), minutes=int(digits[2:]))
            moment = moment - offset if sign == "+" else moment + offset
    except (ValueError, OverflowError):
        return None
    return moment


def orders_of(texts: Iterable[str], share: float) -> list[str]:
    """Return the orders in which at least this share of the texts are dates, those that fit more texts first."""
    given = list(dict.fromkeys(texts))
    # Most columns hold no dates: a few of their words tell.
    if not any(parse_date(text, order) for order in ORDERS for text in given[:10]):
        return []
    counts = {order: sum(parse_date(text, order) is not None for text in given) for order in ORDERS}
    fitting = [order for order in ORDERS if counts[order] >= share * len(given)]
    return [order for order in fitting if counts[order] == max(counts.values())]


def sources_of(features: Iterable[str], dates: Iterable[str]) -> tuple[str, ...]:
    """Return the table's column of each feature: of a part of one of the ``dates`` that date."""
    date_of = {f"{date}: {part}": date for date in dates for part in PARTS}
    return tuple(date_of.get(name, name) for name in features)


def date_parts(moments: npt.NDArray[Any]) -> dict[str, npt.NDArray[np.float64]]:
    """Return the numbers of dates (datetime64[us]) by ``PARTS``, NaN for a missing date."""
    missing = np.isnat(moments)
    filled = np.where(missing, np.datetime64(0, "us"), moments)
    days = filled.astype("datetime64[D]")
    months = filled.astype("datetime64[M]")
    years = filled.astype("datetime64[Y]")
    seconds = (filled - days).astype(np.int64) / 1e6
    numbers = days.astype(np.int64)
    values: Sequence[npt.NDArray[Any]] = (
        years.astype(np.int64) + 1970,
        months.astype(np.int64) % 12 + 1,
        (days - months.astype("datetime64[D]")).astype(np.int64) + 1,
        # 1970-01-01 was a Thursday; Monday is 0.
        (numbers + 3) % 7,
        seconds / 3600,
        numbers + seconds / 86400,
    )
    return {part: np.where(missing, np.nan, value) for part, value in zip(PARTS, values, strict=True)}


def parts_of(name: str, moments: npt.NDArray[Any]) -> dict[str, npt.NDArray[np.float64]]:
    """Return the parts of a column of dates by their names; each different date is taken apart once."""
    different, rows = np.unique(moments, return_inverse=True)
    return {f"{name}: {part}": values[rows] for part, values in date_parts(different).items()}
