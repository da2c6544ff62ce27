"""Errors for arguments and attributes that a class has under another name than other libraries give them."""

from __future__ import annotations

import difflib
import functools
import inspect
from collections.abc import Callable, Collection, Mapping
from typing import Any, TypeVar, cast

from fusemlp_kernels.errors import ArgumentTypeError

Function = TypeVar("Function", bound=Callable[..., Any])

_POSITIONAL = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
_WITHOUT_NAME = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.VAR_KEYWORD)


def knows_names(
    elsewhere: Mapping[str, str], *, call: str = "", also: Collection[str] = ()
) -> Callable[[Function], Function]:
    """Return a decorator that refuses keywords that the function does not have, and says what to write.

    ``elsewhere`` has a sentence for each name of another library. For other names the error proposes the nearest
    parameter. ``call`` shows a call, for too many arguments without names; ``also`` are keywords that the function
    hands on. Raises ArgumentTypeError, a TypeError.
    """

    def decorate(function: Function) -> Function:
        parameters = inspect.signature(function).parameters.values()
        names = {*also, *(one.name for one in parameters if one.kind not in _WITHOUT_NAME)}
        most = sum(one.kind in _POSITIONAL for one in parameters)
        shown = [one for one in names if one not in ("self", "cls", "engine")]

        @functools.wraps(function)
        def checked(*given: Any, **named: Any) -> Any:
            if not named and len(given) <= most:
                return function(*given)
            for name in named:
                if name not in names:
                    raise ArgumentTypeError(_refusal(name, elsewhere, shown))
            if len(given) > most and call:
                raise ArgumentTypeError(f"{call.partition('(')[0]}: too many arguments without names; write {call}")
            return function(*given, **named)

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
    """An attribute that is not there: an AttributeError with a sentence.

    A ``__getattr__`` would slow every attribute of the class down.
    """

    def __init__(self, text: str) -> None:
        self.text = self.__doc__ = text

    def __get__(self, instance: object, owner: type) -> Any:
        raise AttributeError(self.text)


def names_absent(cls: Any, elsewhere: Mapping[str, str]) -> None:
    """Let the error for attributes that other libraries have say what to use; ``dir`` does not list them."""
    for name, sentence in elsewhere.items():
        setattr(cls, name, _Absent(f"{cls.__name__} has no attribute {name!r}: {sentence}"))

    def listed(self: object) -> list[str]:
        return [name for name in object.__dir__(self) if name not in elsewhere]

    cls.__dir__ = listed
