"""The functions that bind the ops of a backend, and the names that they are given."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from fusemlp_kernels.errors import ArgumentTypeError, BackendUnavailableError, unknown_name
from fusemlp_kernels.operands import Operand
from fusemlp_kernels.ops import OPS

# The function that binds each op of a backend.
Binders = Mapping[str, Callable[..., Callable[..., object]]]
Bind = TypeVar("Bind", bound=Callable[..., object])

# Ops that a backend ("": each) does not bind, and why.
REFUSED = {
    ("", "all_reduce"): "it is between processes, and the engine's",
    ("", "penalty"): "it runs inside train_resident; elsewhere change the gradients between grad_weight and update",
    ("numpy", "train_fleet"): "its models train one after another, by train_resident",
    ("cupy", "train_resident"): "its plans are eager and graph",
    ("cupy", "train_fleet"): "its plans are eager and graph, and its models train one after another",
}


def refusal(backend: str, op: str) -> str | None:
    """Why a backend does not bind an op of the contract; None if it does."""
    return REFUSED.get(("", op)) or REFUSED.get((backend, op))


def check_names(backend: str, binders: Binders, op: str, given: Mapping[str, Any]) -> None:
    """Raise BackendUnavailableError for an op that the backend does not bind, ArgumentError for an unknown op,
    ArgumentTypeError for operands that are missing, unknown or not taken."""
    reason = refusal(backend, op)
    if reason is not None:
        raise BackendUnavailableError(f"op: the {backend} backend has no {op!r}: {reason}")
    if op not in binders:
        raise unknown_name("op", op, binders)
    _check_fields(op, OPS[op].operands, given)
    taken = operands_of(binders[op])
    for name in given:
        if name not in taken and given[name] is not None:
            raise ArgumentTypeError(f"{op}: {name}: the {backend} backend does not take it; leave it out")


def _check_fields(place: str, operands: tuple[Operand, ...], given: Mapping[str, Any]) -> None:
    known = {operand.name: operand for operand in operands}
    for name in given:
        if name not in known:
            raise ArgumentTypeError(f"{place}: {unknown_name('operand', name, known)}")
    missing = [operand.name for operand in operands if not operand.optional and operand.name not in given]
    if missing:
        raise ArgumentTypeError(f"{place}: missing {', '.join(missing)}; fusemlp_kernels/ops.py lists what it takes")
    for name, value in given.items():
        for index, fields in enumerate(value if known[name].fields else ()):
            _check_fields(f"{place}: {name}[{index}]", known[name].fields, fields)


def hands_on(to: Callable[..., object]) -> Callable[[Bind], Bind]:
    """Mark a binder that hands operands which its signature does not name on to another function."""

    def mark(binder: Bind) -> Bind:
        vars(binder)["hands_on_to"] = to
        return binder

    return mark


@functools.cache
def operands_of(binder: Callable[..., object]) -> frozenset[str]:
    """The operands that a binder takes."""
    if "operands" in vars(binder):
        return frozenset(vars(binder)["operands"])
    parameters = inspect.signature(binder).parameters.values()
    names = frozenset(one.name for one in parameters if one.kind is one.KEYWORD_ONLY)
    rest = vars(binder).get("hands_on_to")
    return names if rest is None else names | operands_of(rest)
