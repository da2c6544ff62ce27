"""The machine of an engine: the backend, its device, the precision and the plan."""

from __future__ import annotations

from dataclasses import dataclass, fields

from fusemlp_kernels.errors import ArgumentTypeError


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
