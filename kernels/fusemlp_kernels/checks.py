"""The checks of an op's operands that follow from its record, for backends that check what they bind."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from types import SimpleNamespace
from typing import Any, Protocol

from fusemlp_kernels.contract import ACTIVATIONS, LOSSES, NEEDS_Z, UpdateRule
from fusemlp_kernels.errors import ArgumentError, ShapeError, unknown_name
from fusemlp_kernels.ops import FIXED, OPS, READ, Operand, expected

# The parameters of states that are not named after them.
OF_STATES = {"states": "params", "state": "param"}


class Check(Protocol):
    """A device's check of one array.

    Returns the array, if it lies on the device and has this shape (None: any size) and this type of the contract; else
    raises an error that names the op, the operand, what was expected and what was given. ``written``: no two elements
    may share memory. ``flat``: the array must be contiguous.
    """

    def __call__(
        self, op: str, name: str, array: Any, shape: tuple[int | None, ...], dtype: str, *, written: bool, flat: bool
    ) -> Any: ...


def binds(op: str, *, without: Sequence[str] = ()) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Decorate ``bind(device, operands)`` to take the operands of ``op`` by name, but for ``without``.

    ``bind`` receives them checked by ``device.check``; see ``checked``.
    """

    def decorate(bind: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(bind)
        def binder(device: Any, **given: Any) -> Any:
            return bind(device, checked(op, given, device.check))

        vars(binder)["operands"] = {operand.name for operand in OPS[op].operands} - set(without)
        return binder

    return decorate


def checked(op: str, given: Mapping[str, Any], check: Check) -> SimpleNamespace:
    """Return the operands of an op as attributes, and the sizes M, N and K where a shape has them.

    An operand that is left out is its record's default. Every array passes ``check``. Fields of a sequence of mappings
    are checked likewise, each mapping for itself; M is one size in all.
    """
    return _checked(op, "", OPS[op].operands, given, given.get("rule"), {}, check)


def sizes_of(records: Sequence[Operand], given: Mapping[str, Any]) -> dict[str, int]:
    """Return the size of each letter of the shapes, as the first array that has it says; row numbers come last."""
    selectors = {record.rows for record in records}
    sizes = dict(FIXED)
    for record in sorted(records, key=lambda record: record.name in selectors):
        letters = expected(record, given)[1]
        shape = getattr(given.get(record.name), "shape", ())
        if len(shape) == len(letters):
            for letter, size in zip(letters, shape, strict=True):
                sizes.setdefault(letter, size)
    return sizes


def _checked(
    op: str,
    place: str,
    records: Sequence[Operand],
    given: Mapping[str, Any],
    rule: UpdateRule | None,
    common: dict[str, int],
    check: Check,
) -> SimpleNamespace:
    values = {record.name: given.get(record.name) for record in records}
    values |= {record.name: record.default for record in records if values[record.name] is None}
    _check_together(op, values)
    selectors = {record.rows for record in records}
    sizes = sizes_of(records, values) | common
    for record in records:
        name, value = f"{place}{record.name}", values[record.name]
        if record.fields:
            parts = [
                _checked(op, f"{name}[{index}]: ", record.fields, fields, rule, common, check)
                for index, fields in enumerate(value)
            ]
            values[record.name] = parts
            continue
        if record.shape is None or (value is None and (record.optional or record.nullable)):
            continue
        if record.several:
            parameter = OF_STATES.get(record.name, record.name.removesuffix("_state"))
            _check_states(op, name, value if values[parameter] is not None else None, rule)
        dtype, letters = expected(record, values)
        picks = record.name in selectors
        shape = (None,) if picks else tuple(sizes.get(letter) for letter in letters)
        arrays = tuple(
            check(op, name, array, shape, dtype, written=record.use != READ, flat=picks or letters == "A")
            for array in (value if record.several else (value,))
        )
        values[record.name] = arrays if record.several else arrays[0]
        if picks:
            _check_rows(op, name, len(value), sizes.get("M", 0))
    common |= {letter: sizes[letter] for letter in "M" if letter in sizes}
    return SimpleNamespace(**{"M": 0, "N": 0, "K": 0, **sizes, **values})


def _check_rows(op: str, name: str, given: int, batch: int) -> None:
    if given % batch if batch else given:
        raise ShapeError(f"{op}: {name}: expected {batch} row numbers, or several batches of {batch}; got {given}")


def _check_states(op: str, name: str, states: Sequence[Any] | None, rule: UpdateRule | None) -> None:
    if states is not None and rule is not None and len(states) != rule.state_count:
        raise ArgumentError(f"{op}: {name}: {rule.kind} keeps {rule.state_count} arrays of state, got {len(states)}")


def _check_together(op: str, given: Mapping[str, Any]) -> None:
    """Raise ArgumentError for values that are unknown, or that do not go together."""
    activation = given.get("activation", "identity")
    if activation not in ACTIVATIONS:
        raise unknown_name(f"{op}: activation", activation, ACTIVATIONS)
    if activation == "prelu" and given["slope_param"] is None:
        raise ArgumentError(f"{op}: slope_param: prelu needs its slope, an array of shape (1,); got None")
    if "loss" in given:
        kind = given["loss"].kind
        if kind not in LOSSES:
            raise unknown_name(f"{op}: loss", kind, LOSSES)
        if kind == "cross_entropy" and activation != "identity":
            raise ArgumentError(f"activation: cross_entropy takes logits, so it must be 'identity', got {activation!r}")
    if op == "grad_input":
        if activation in NEEDS_Z and given["z"] is None:
            raise ArgumentError(f"{op}: z: the derivative of {activation} needs the pre-activation; got None")
        if activation == "prelu" and given["dslope"] is None:
            raise ArgumentError(f"{op}: dslope: prelu's gradient needs an array of shape (1,); got None")
    if "counters" in given and given["counters"] is None:
        if given.get("dropout") is not None:
            raise ArgumentError(f"{op}: counters: dropout needs them, since the mask depends on the batch; got None")
        for name in ("rows", "x_rows"):
            if given.get(name) is not None:
                raise ArgumentError(
                    f"{op}: counters: {name} needs them, since they say where the batch begins; got None"
                )
    rule = given.get("rule")
    if op == "grad_weight_update" and isinstance(rule, UpdateRule) and not _fuses(rule):
        raise ArgumentError(
            f"{op}: rule: clipping and accumulation need the gradients in memory; use grad_weight and update"
        )
    _check_parts(op, given)


def _fuses(rule: UpdateRule) -> bool:
    """Return whether an update needs nothing but the gradient of its own batch and element."""
    return rule.accumulate == 1 and rule.clip_norm is None


def _check_parts(op: str, given: Mapping[str, Any]) -> None:
    parts, part = given.get("parts", 1), given.get("part", 0)
    if parts < 1 or (parts > 1 and part % 8):
        raise ArgumentError(f"{op}: parts, part: expected parts >= 1, part a multiple of 8; got {parts} and {part}")
    if parts > 1 and not (_fuses(given["rule"]) and given["norm"] is None):
        raise ArgumentError(
            f"{op}: parts: a batch in {parts} parts has no gradient to accumulate, and no norm; use parts=1"
        )
