"""The base of all descriptions: frozen dataclasses with checks in the types of their fields."""

import dataclasses
from collections.abc import Callable, Mapping
from functools import cache, partial
from typing import Annotated, Any, ClassVar, TypeVar, get_args

from fusemlp.describe.checks import as_count, as_number, check_choice, check_flag, check_keys

NonNegative = Annotated[float, partial(as_number, low=0.0)]
Positive = Annotated[float, partial(as_number, low=0.0, low_open=True)]
# From 0 to 1, without 1.
Fraction = Annotated[float, partial(as_number, low=0.0, high=1.0, high_open=True)]
# Without 0 and without 1.
OpenFraction = Annotated[float, partial(as_number, low=0.0, high=1.0, low_open=True, high_open=True)]
# an int64 counts them
Count = Annotated[int, partial(as_count, maximum=2**63 - 1)]
Flag = Annotated[bool, check_flag]


@dataclasses.dataclass(frozen=True)
class Description:
    """A frozen dataclass; a field of the type ``Annotated[T, check]`` holds ``check(name, value)``.

    A None that is the field's default is not checked. Modules that declare checks have no postponed annotations.
    """

    kind: ClassVar[str] = ""

    def __post_init__(self) -> None:
        cls: Any = type(self)
        for name, default, check in _checks(cls):
            value = getattr(self, name)
            if value is not None or default is not None:
                object.__setattr__(self, name, check(name, value))

    def shared(self, other: Any) -> dict[str, Any]:
        """Return the fields that the dataclass ``other`` has too, by name."""
        cls: Any = type(self)
        return {name: getattr(self, name) for name in _common(cls, other)}

    def to_config(self) -> dict[str, Any]:
        """Return a JSON-able description; ``from_config`` inverts it."""
        config = {"kind": self.kind} if self.kind else {}
        return config | {name: _plain(getattr(self, name)) for name in _names(type(self))}


Described = TypeVar("Described", bound=Description)


def from_config(argument: str, known: Mapping[str, type[Described]], config: Mapping[str, Any]) -> Described:
    """Return the description of a configuration: ``kind`` is a key of ``known``; errors call it ``argument``."""
    cls = known[check_choice(argument, config.get("kind"), known)]
    check_keys(argument, config, ("kind", *_names(cls)))
    return cls(**{name: value for name, value in config.items() if name != "kind"})


def _names(cls: Any) -> list[str]:
    return [field.name for field in dataclasses.fields(cls)]


@cache
def _common(cls: Any, other: Any) -> list[str]:
    return [name for name in _names(cls) if name in _names(other)]


@cache
def _checks(cls: Any) -> list[tuple[str, Any, Callable[[str, Any], Any]]]:
    """Return name, default and check of the fields; a check may stand in a part of a union."""
    return [
        (field.name, field.default, check)
        for field in dataclasses.fields(cls)
        for part in (field.type, *get_args(field.type))
        for check in getattr(part, "__metadata__", ())
    ]


def _plain(value: Any) -> Any:
    if isinstance(value, Description):
        return value.to_config()
    return [_plain(one) for one in value] if isinstance(value, tuple) else value
