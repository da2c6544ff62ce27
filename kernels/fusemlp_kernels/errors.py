"""The exception tree: each error is also the standard type that a caller expects."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class FusemlpError(Exception):
    """The base of all errors that fusemlp raises on purpose."""


class ArgumentError(FusemlpError, ValueError):
    """An argument has the right type and an impossible value."""


class ArgumentTypeError(FusemlpError, TypeError):
    """An argument has the wrong type."""


class ShapeError(ArgumentError):
    """An array has the wrong number of dimensions, rows or columns."""


class DTypeError(ArgumentTypeError):
    """An array has an element type that cannot be used."""


class DataError(ArgumentError):
    """The values of an array, or the content of a data file, cannot be trained on."""


class BackendUnavailableError(FusemlpError, RuntimeError):
    """A backend, device or precision that this machine or backend does not have."""


class MissingLibraryError(FusemlpError, ImportError):
    """A library of an optional extra that is not installed."""


class CheckpointError(FusemlpError, RuntimeError):
    """A checkpoint or run folder that cannot be read, or does not belong to this network."""


class DistributedError(FusemlpError, RuntimeError):
    """A training on several processes that cannot go on: one of them is gone, or has something else than the others."""


class DivergenceError(FusemlpError, ArithmeticError):
    """The loss stopped being a finite number."""


class WorkerError(FusemlpError, RuntimeError):
    """Processes that train parts of a fleet have died again and again."""


def unknown_name(argument: str, given: object, known: Iterable[str], *, prefix: str = "") -> ArgumentError:
    """Return the error for a name that is not in ``known``; it proposes one that begins so, or the nearest.

    The case does not count. Of names that differ by a ``prefix`` alone it proposes the first.
    """
    names = list(known)
    lowered = {name.lower().removeprefix(prefix): name for name in reversed(names)}
    word = str(given).lower().removeprefix(prefix)
    near = [name for name in lowered if word and name.startswith(word)]
    near = near or difflib.get_close_matches(word, lowered, n=1, cutoff=0.4)
    hint = f"; did you mean {lowered[near[0]]!r}?" if near else "."
    return ArgumentError(f"{argument}: unknown name {given!r}{hint} Expected one of: {', '.join(names)}")
