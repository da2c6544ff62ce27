"""The base of all descriptions: frozen dataclasses with checks in the types of their fields; and those in files."""

import contextlib
import dataclasses
import reprlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields
from functools import cache, partial
from types import UnionType
from typing import Annotated, Any, ClassVar, Self, get_args, get_origin, get_type_hints

from fusemlp.describe.checks import as_count, as_number, check_choice, check_flag, check_keys
from fusemlp_kernels.errors import ArgumentTypeError, CheckpointError, FusemlpError

# Code that reads a description raises these where an entry is missing, has another type or is out of range.
MISFITS = (
    *(ArithmeticError, AssertionError, AttributeError, LookupError),
    *(MemoryError, RecursionError, TypeError, ValueError),
)

NonNegative = Annotated[float, partial(as_number, low=0.0)]
Positive = Annotated[float, partial(as_number, low=0.0, low_open=True)]
# From 0 to 1.
Share = Annotated[float, partial(as_number, low=0.0, high=1.0)]
# From 0 to 1, without 1.
Fraction = Annotated[float, partial(as_number, low=0.0, high=1.0, high_open=True)]
# Without 0 and without 1.
OpenFraction = Annotated[float, partial(as_number, low=0.0, high=1.0, low_open=True, high_open=True)]
# an int64 counts them
Count = Annotated[int, partial(as_count, maximum=2**63 - 1)]
Seed = Annotated[int, partial(as_count, minimum=0)]
Flag = Annotated[bool, check_flag]
# The bases of the families, by their names.
FAMILIES: "dict[str, type[Description]]" = {}


@dataclasses.dataclass(frozen=True)
class Description:
    """A frozen dataclass; a field of the type ``Annotated[T, check]`` holds ``check(name, value)``.

    A None that is the field's default is not checked. Modules that declare checks have no postponed annotations.
    """

    kind: ClassVar[str] = ""
    # the family that it is a kind of, by the name that errors and files have for it, and all its kinds
    family: ClassVar[str] = ""
    kinds: ClassVar[Mapping[str, Any]] = {}

    def __init_subclass__(cls, family: str = "", **options: Any) -> None:
        super().__init_subclass__(**options)
        if family:
            cls.family, FAMILIES[family] = family, cls

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

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Self:
        """Return the description of a configuration, of the ``kind`` of the family that it names."""
        kind: type[Self] = cls.kinds[check_choice(cls.family, config.get("kind"), cls.kinds)]
        check_keys(cls.family, config, ("kind", *_names(kind)))
        return kind(**{name: value for name, value in config.items() if name != "kind"})


@contextlib.contextmanager
def reading(place: str, mend: str) -> Iterator[None]:
    """Turn errors of reading a description into a CheckpointError with the ``place``, the reason and a ``mend``."""
    try:
        yield
    except MISFITS as error:
        what = "" if isinstance(error, FusemlpError) else f"{type(error).__name__}: "
        reason = f"it has no entry {error}" if isinstance(error, KeyError) else f"{what}{error}"
        raise CheckpointError(f"{place} does not fit: {reason}; {mend}") from error


def stored(name: str, value: Any, kind: Any) -> Any:
    """Return a value from JSON as its annotation ``kind`` says: lists may be tuples, and mappings dataclasses.

    Raises ArgumentTypeError, which names the place in the value: ``fit.history.epochs[3]``.
    """
    origin, parts = get_origin(kind), get_args(kind)
    if origin is UnionType:
        for part in parts:
            with contextlib.suppress(ArgumentTypeError):
                return stored(name, value, part)
    elif origin in (list, tuple) and isinstance(value, list | tuple):
        kinds = parts if origin is tuple and parts[-1] is not ... else parts[:1] * len(value)
        if len(kinds) == len(value):
            return origin(stored(f"{name}[{at}]", *pair) for at, pair in enumerate(zip(value, kinds, strict=True)))
    elif origin is dict and isinstance(value, dict):
        return {key: stored(f"{name}[{key!r}]", item, parts[1]) for key, item in value.items()}
    elif isinstance(kind, type) and dataclasses.is_dataclass(kind) and isinstance(value, Mapping):
        # a field may take more in Python than in files
        narrower = {field.name: narrow for field in dataclasses.fields(kind) if (narrow := field.metadata.get("kind"))}
        hints = get_type_hints(kind) | narrower
        return kind(**{key: stored(f"{name}.{key}", item, hints.get(key, Any)) for key, item in value.items()})
    elif kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    elif kind is Any or (not parts and isinstance(value, kind) and (kind is bool or not isinstance(value, bool))):
        return value
    raise ArgumentTypeError(f"{name}: expected {getattr(kind, '__name__', kind)}, got {reprlib.repr(value)}")


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


@dataclass(frozen=True)
class Machine:
    """The arguments of ``Engine`` that say how and where it computes; "auto" is not decided yet."""

    backend: str = "auto"
    device: str | None = None
    precision: str = "fp32"
    plan: str = "auto"

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if not isinstance(value, str) and (field.default is not None or value is not None):
                expected = f"such as {field.default!r}" if field.default else "such as 'cpu', or None for the default"
                raise ArgumentTypeError(f"{field.name}: expected a name {expected}, got {value!r}")
