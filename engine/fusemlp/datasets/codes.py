"""Words and dates of a table as numbers: categories, spellings of one number, orders and parts of dates."""

import re
from collections.abc import Iterable, Sequence
from datetime import datetime, timedelta
from decimal import Decimal
from typing import Any

import numpy as np
import numpy.typing as npt

from fusemlp.inputs.arrays import Array

Features = npt.NDArray[np.float64]
Indices = npt.NDArray[np.int64]
Categories = tuple[tuple[str, ...] | None, ...]
# A column of more words than this gives each of its more frequent words an input; the others share one. At most the
# second number of words have one in dense rows.
FEW_WORDS = 20
MOST_WORDS = 256
# A number as every program writes it: marks of thousands and decimal commas mean other numbers elsewhere.
_NUMBER = re.compile(r"[+-]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][+-]?[0-9]{1,3})?")
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
_YEAR_LAST = re.compile(r"(?P<a>\d{1,2})(?P<mark>[-/.])(?P<b>\d{1,2})(?P=mark)(?P<c>\d{4}|\d\d)" + _TIME)


def parse_date(text: str, order: str) -> datetime | None:
    """Return the date, with its time in UTC if it names a zone; None for other text.

    A year of four digits in front stands before month and day in any order. One of two digits, after points or slashes,
    is of the hundred years from 1970 on.
    """
    match = _YEAR_FIRST.fullmatch(text)
    order = "ymd" if match else order
    match = match or _YEAR_LAST.fullmatch(text)
    if match is None or (order == "mdy" and match["mark"] == ".") or (order == "ymd" and len(match["a"]) < 4):
        return None
    year, month, day = (int(match["abc"[order.index(letter)]]) for letter in "ymd")
    if len(match["c"]) == 2 and order != "ymd":
        if match["mark"] == "-":
            return None
        year += 2000 if year < 70 else 1900
    hour, minute, second = (int(match[part] or 0) for part in ("hour", "minute", "second"))
    if match["half"]:
        if not 1 <= hour <= 12:
            return None
        hour = hour % 12 + (12 if match["half"].lower() == "pm" else 0)
    micro = int((match["part"] or "0")[:6].ljust(6, "0"))
    try:
        moment = datetime(year, month, day, hour, minute, second, micro)
        if match["zone"] and match["zone"] != "Z":
            sign, digits = match["zone"][0], match["zone"][1:].replace(":", "")
            offset = timedelta(hours=int(digits[:2]), minutes=int(digits[2:]))
            moment = moment - offset if sign == "+" else moment + offset
    except (ValueError, OverflowError):
        return None
    return moment


def orders_of(texts: Iterable[str], share: float) -> list[str]:
    """Return the orders in which at least this share of the texts are dates, those that fit more texts first."""
    words = list(dict.fromkeys(texts))
    # Most columns hold no dates: a few of their words tell.
    if not any(parse_date(text, order) for order in ORDERS for text in words[:10]):
        return []
    counts = {order: sum(parse_date(text, order) is not None for text in words) for order in ORDERS}
    most = max(counts.values())
    return [order for order in ORDERS if counts[order] == most >= share * len(words)]


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


def kept_features(table: dict[str, Array]) -> tuple[str, ...]:
    """Return the names of the features, of a date only its parts that differ between rows, and the elapsed days."""
    names: list[str] = []
    for name, column in table.items():
        if column.dtype.kind != "M":
            names.append(name)
            continue
        for part, values in date_parts(np.unique(column)).items():
            if part == PARTS[-1] or len(np.unique(values[~np.isnan(values)])) > 1:
                names.append(f"{name}: {part}")
    return tuple(names)


def spellings(words: Iterable[str], known: Iterable[str]) -> dict[str, str]:
    """Return, for each word that is a number in another spelling than the ``known`` word of that number, the latter.

    "10" is "10.0" for a program that reads numbers. Known words that spell one number in several ways stay apart.
    """
    numbers: dict[Decimal, list[str]] = {}
    for word in dict.fromkeys(known):
        if _NUMBER.fullmatch(word):
            numbers.setdefault(Decimal(word), []).append(word)
    same = {word: numbers.get(Decimal(word), []) for word in words if numbers and _NUMBER.fullmatch(word)}
    return {word: known[0] for word, known in same.items() if len(known) == 1}


def different(column: Array) -> tuple[list[str], npt.NDArray[np.int32]]:
    """Return the different words of a column in the order of their first rows, and the index of each row's word."""
    places = {word: place for place, word in enumerate(dict.fromkeys(column))}
    return list(places), np.fromiter(map(places.__getitem__, column), np.int32, len(column))


def rare_words(codes: Features, words: Sequence[str], most: int | None = MOST_WORDS) -> tuple[int, ...]:
    """Return the categories that share an input, by the codes of the training rows; missing cells are one of their own.

    They are words without training rows, and, of many words, those of one row and those beyond the ``most`` frequent.
    """
    counts = np.bincount(codes[~np.isnan(codes)].astype(np.int64), minlength=len(words))
    ranked = np.argsort(-counts, kind="stable")
    rare = counts < (2 if len(words) > FEW_WORDS else 1)
    if most is not None:
        rare[ranked[most:]] = True
    if "" in words:
        missing = words.index("")
        rare[missing] = counts[missing] == 0
    return tuple(np.flatnonzero(rare).tolist())
