"""Parse ``--vary``, such as ``lr=0.001:0.1:log:16``, into values, and combine them into the models of a sweep."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from fusemlp.describe.checks import as_count
from fusemlp.fleet.vary import MOST_MODELS, check_name
from fusemlp_kernels.errors import ArgumentError

# Parameters with whole numbers, and their minimum.
WHOLE = {"hidden": 1, "batch_size": 1, "seed": 0}
PAIRS = ("betas",)
# Parameters with values of several numbers, joined by x.
JOINED = ("hidden", *PAIRS)
# The limit for one parameter: more than a sweep can train, and still fast to list.
MOST_VALUES = 100_000
# The digits of values inside a range; they keep the command that repeats a model readable.
DIGITS = 6
FORMS = "lr=0.001,0.01 or lr=0.001:0.1:log:16 or hidden=32,64x32 or seed=0:20"


@dataclass(frozen=True)
class Axis:
    """A parameter and its values; ``scale`` is "log" or "linear" for a range, "" for a list."""

    name: str
    values: tuple[Any, ...]
    scale: str

    def __len__(self) -> int:
        return len(self.values)


def spelled(value: Any) -> str:
    """Return a value in the syntax of ``--vary``."""
    if isinstance(value, tuple):
        return "x".join(map(repr, value)) or "none"
    return repr(value)


def axes(given: Sequence[str], *, seeds: int | None = None, first: int = 0) -> tuple[Axis, ...]:
    """Parse each ``--vary``; ``seeds`` adds as many seeds, from ``first`` on, as the last parameter.

    Raises ArgumentError for bad syntax, unknown names and names given twice.
    """
    if not given and seeds is None:
        raise ArgumentError(f"vary: say what the models differ in: --vary {FORMS}")
    found: dict[str, Axis] = {}
    for words in given:
        axis = _axis(words)
        if axis.name in found:
            raise ArgumentError(f"vary: {axis.name} is there twice; give all its values in one: --vary {axis.name}=...")
        found[axis.name] = axis
    if seeds is not None:
        count = as_count("seeds", seeds, minimum=1)
        if "seed" in found:
            raise ArgumentError("seeds: --vary seed=... has the seeds; give one of the options")
        if count > MOST_VALUES:
            raise ArgumentError(f"seeds: expected at most {MOST_VALUES}, got {count}")
        found["seed"] = Axis("seed", tuple(range(first, first + count)), "linear")
    return tuple(found.values())


def points(among: Sequence[Axis], *, sample: int | None, seed: int, whole_seeds: bool = False) -> list[dict[str, Any]]:
    """Return all combinations, the last parameter varying fastest, or ``sample`` of them, drawn by ``seed``, in order.

    With ``whole_seeds`` the last parameter is the seed, and a sample is one of the other parameters, with all seeds
    each.

    Raises ArgumentError for more than ``MOST_MODELS``.
    """
    if whole_seeds and sample is not None and len(among) > 1:
        some, seeds = points(among[:-1], sample=sample, seed=seed), among[-1].values
        if len(some) * len(seeds) > MOST_MODELS:
            raise ArgumentError(
                f"seeds: {len(some)} combinations with {len(seeds)} seeds each are {len(some) * len(seeds)} models, "
                f"and at most {MOST_MODELS} are trained; give fewer"
            )
        return [{**point, "seed": value} for point in some for value in seeds]
    shape = tuple(len(axis) for axis in among)
    total = math.prod(shape)
    wanted = total if sample is None else min(as_count("sample", sample, minimum=1), total)
    if wanted > MOST_MODELS or total >= 1 << 63:
        product = " x ".join(f"{axis.name} {len(axis)}" for axis in among)
        mend = "give fewer values" if sample is not None else "give fewer values, or --sample 500 for some of them"
        raise ArgumentError(f"vary: {product} are {total} models, and at most {MOST_MODELS} are trained; {mend}")
    chosen = range(total)
    if wanted < total:
        drawn = np.random.default_rng(seed).choice(total, wanted, replace=False, shuffle=False)
        chosen = np.sort(drawn).tolist()
    places = np.unravel_index(np.asarray(chosen, np.int64), shape)
    return [
        {axis.name: axis.values[at] for axis, at in zip(among, place, strict=True)}
        for place in zip(*(column.tolist() for column in places), strict=True)
    ]


def _axis(words: str) -> Axis:
    name, equals, text = (part.strip() for part in words.partition("="))
    name = name.replace("-", "_")
    if not equals or not name:
        raise ArgumentError(f"vary: expected NAME=VALUES, such as {FORMS}, got {words!r}")
    check_name("vary", name)
    if ":" in text:
        return _range(name, text)
    parts = [part.strip() for part in text.split(",")]
    if not all(parts):
        raise ArgumentError(f"vary: {name}: a value is missing in {words!r}; give values with commas between them")
    values = tuple(_value(name, part) for part in parts)
    if len(set(values)) < len(values):
        again = next(value for index, value in enumerate(values) if value in values[:index])
        raise ArgumentError(f"vary: {name}: {spelled(again)} is there twice, so models would be too; give it once")
    return Axis(name, values, "")


def _value(name: str, text: str) -> Any:
    if name == "hidden":
        if text == "none":
            return ()
        widths = tuple(_whole(name, part) for part in text.split("x"))
        return widths[0] if len(widths) == 1 else widths
    if name in PAIRS:
        pair = tuple(_number(name, part) for part in text.split("x"))
        if len(pair) != 2:
            raise ArgumentError(f"vary: {name}: expected two numbers joined by x, such as 0.9x0.999, got {text!r}")
        return pair
    return _whole(name, text) if name in WHOLE else _number(name, text)


def _whole(name: str, text: str) -> int:
    try:
        number = int(text)
    except ValueError:
        hint = ", or several joined by x, or none" if name == "hidden" else ""
        raise ArgumentError(f"vary: {name}: expected a whole number{hint}, got {text!r}") from None
    return as_count(f"vary: {name}", number, minimum=WHOLE[name])


def _number(name: str, text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise ArgumentError(f"vary: {name}: expected a finite number such as 0.01, got {text!r}")
    return value


def _range(name: str, text: str) -> Axis:
    parts = [part.strip() for part in text.split(":")]
    if name in PAIRS or len(parts) > 4 or (len(parts) == 4 and parts[2] not in ("log", "lin")):
        forms = "a list" if name in PAIRS else "a list, low:high:log:count, low:high:lin:count, or first:end"
        raise ArgumentError(f"vary: {name}: expected {forms}, got {text!r}")
    if len(parts) == 2:
        # As Python's range it leaves the end out.
        if name not in WHOLE:
            raise ArgumentError(
                f"vary: {name}: {text!r} is a range of whole numbers; say how many values there are: "
                f"{name}={text}:lin:5"
            )
        numbers = range(_whole(name, parts[0]), _whole(name, parts[1]))
        if not 1 <= len(numbers) <= MOST_VALUES:
            raise ArgumentError(
                f"vary: {name}: expected a range of 1 to {MOST_VALUES} whole numbers, the last one left out, got "
                f"{text!r}"
            )
        return Axis(name, tuple(numbers), "linear")
    read = _whole if name in WHOLE else _number
    low, high = read(name, parts[0]), read(name, parts[1])
    try:
        count = int(parts[-1])
    except ValueError:
        raise ArgumentError(
            f"vary: {name}: expected how many values at the end, such as :16, got {parts[-1]!r}"
        ) from None
    scale = "log" if parts[2:3] == ["log"] else "linear"
    if not 2 <= count <= MOST_VALUES:
        raise ArgumentError(f"vary: {name}: expected a range of 2 to {MOST_VALUES} values, got {count}")
    if not low < high:
        raise ArgumentError(f"vary: {name}: expected a range from the lower to the higher end, got {text!r}")
    if scale == "log" and low <= 0:
        raise ArgumentError(f"vary: {name}: a logarithmic range begins above 0, got {text!r}")
    spaced = (np.geomspace if scale == "log" else np.linspace)(low, high, count).tolist()
    if name in WHOLE:
        inner: list[Any] = [round(value) for value in spaced[1:-1]]
    else:
        inner = [float(f"{value:.{DIGITS}g}") for value in spaced[1:-1]]
    # Values that rounding makes equal count once.
    return Axis(name, tuple(dict.fromkeys([low, *inner, high])), scale)
