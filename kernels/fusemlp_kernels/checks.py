"""The checks of an op's operands: their names, for each backend; and what follows from the record, for those that check
what they bind."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from types import SimpleNamespace
from typing import Any, Protocol

from fusemlp_kernels.contract import ACTIVATIONS, DISTRIBUTIONS, LOSSES, NEEDS_Z, UpdateRule
from fusemlp_kernels.errors import ArgumentError, ArgumentTypeError, BackendUnavailableError, ShapeError, unknown_name
from fusemlp_kernels.ops import FIXED, OPS, READ, Operand, expected

# The function that binds each op of a backend.
Binders = Mapping[str, Callable[..., Callable[..., object]]]

# The ops of plain training, all that the fallback has.
CORE = ("linear", "loss_grad", "linear_loss_grad", "grad_input", "grad_weight", "update", "advance")
# Ops that a backend ("": each) does not bind, and why; the last row about one decides.
REFUSED = {
    **{("cupy", op): "it has the calls of plain training alone; use triton or numpy" for op in OPS if op not in CORE},
    ("", "all_reduce"): "it is between processes, and the engine's",
    ("", "penalty"): "it runs inside train_resident; elsewhere change the gradients between grad_weight and update",
    ("numpy", "train_narrow"): "its products fill the cache already; use train_resident",
    ("numpy", "predict_narrow"): "its products fill the cache already; use linear",
    **{("cupy", op): "its plans are eager and graph" for op in ("train_narrow", "predict_narrow")},
    ("numpy", "train_fleet"): "its models train one after another, by train_resident",
    ("cupy", "train_resident"): "its plans are eager and graph",
    ("cupy", "train_fleet"): "its plans are eager and graph, and its models train one after another",
    ("cupy", "grad_weight_update"): "its updates follow grad_weight, by update",
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


def operands_of(binder: Callable[..., object]) -> set[str]:
    """The operands that a binder takes, as ``binds`` notes them."""
    operands: set[str] = vars(binder)["operands"]
    return operands


# The parameters of states that are not named after them.
OF_STATES = {"states": "params", "state": "param"}
# Stands for an operand that is not there yet.
LATER = object()


class Check(Protocol):
    """A device's check of one array.

    Returns the array, if it lies on the device and has this shape (None: any size) and this type of the contract; else
    raises an error that names the op, the operand, what was expected and what was given. ``written``: no two elements
    may share memory. ``flat``: the array must be contiguous.
    """

    def __call__(
        self, op: str, name: str, array: Any, shape: tuple[int | None, ...], dtype: str, /, *, written: bool, flat: bool
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


class Group:
    """The operands of an op, or the fields of one operand, sorted once for the checks of many calls.

    ``arrays`` have a shape, and whether other operands pick rows by them; these come last.
    """

    def __init__(self, operands: Sequence[Operand]) -> None:
        selectors = {operand.rows for operand in operands}
        arrays = [(operand, operand.name in selectors) for operand in operands if operand.shape is not None]
        self.arrays = sorted(arrays, key=lambda entry: entry[1])
        self.fields = {operand.name: Group(operand.fields) for operand in operands if operand.fields}
        self.defaults = {operand.name: operand.default for operand in operands}


GROUPS = {op.name: Group(op.operands) for op in OPS.values()}


def checked(op: str, given: Mapping[str, Any], check: Check, later: Sequence[str] = ()) -> SimpleNamespace:
    """Return the operands of an op as attributes, and the sizes M, N and K where a shape has them.

    An operand that is left out is its record's default. Every array passes ``check``. Fields of a sequence of mappings
    are checked likewise, each mapping for itself; M is one size in all. ``later`` names operands that the caller sets
    afterwards, by these sizes.
    """
    return _checked(op, "", GROUPS[op], given, given.get("rule"), {}, check, later)


def members_of(given: SimpleNamespace, outputs: int = 1) -> int:
    """Return the members of a checked call, whose arrays have a row, or ``outputs`` rows, of each.

    Raises ShapeError where the rows of these arrays, or those of the batch, are not as many for each.
    """
    rows: int = vars(given).get("D", 0)
    members, rest = divmod(rows, max(outputs, 1))
    if not members or rest or given.M % members:
        raise ShapeError(
            f"members: expected rows of the batch and {outputs} rows of a member's own for each member, got "
            f"{given.M} and {rows}"
        )
    return members


def _checked(
    op: str,
    place: str,
    group: Group,
    operands: Mapping[str, Any],
    rule: UpdateRule | None,
    common: dict[str, int],
    check: Check,
    later: Sequence[str],
) -> SimpleNamespace:
    values = group.defaults | {name: value for name, value in operands.items() if value is not None}
    values |= {name: LATER for name in later if name in values}
    if values.get("coding") is not None:
        raise BackendUnavailableError(
            f"{op}: {place}coding: only the numpy backend reads codes; give rows of inputs: coding.dense(codes)"
        )
    check_together(op, values)
    loss = values.get("loss")
    if loss is not None and (loss.missing or loss.kind in DISTRIBUTIONS):
        raise BackendUnavailableError(f"{op}: loss: only the numpy backend has missing targets and {DISTRIBUTIONS}")
    for name, fields in group.fields.items():
        values[name] = [
            _checked(op, f"{place}{name}[{index}]: ", fields, element, rule, common, check, later)
            for index, element in enumerate(values[name])
        ]
    # the first array with a letter in its shape says its size
    sizes, arrays = FIXED | common, []
    for operand, picks in group.arrays:
        value = values[operand.name]
        if value is LATER or (value is None and (operand.optional or operand.nullable)):
            continue
        dtype, letters = expected(operand, values)
        arrays.append((operand, picks, value, dtype, letters))
        shape = getattr(value, "shape", ())
        if len(shape) == len(letters):
            for letter, size in zip(letters, shape, strict=True):
                sizes.setdefault(letter, size)
    for operand, picks, value, dtype, letters in arrays:
        name = place + operand.name
        shape = (None,) if picks else tuple(map(sizes.get, letters))
        written, flat = operand.use != READ, picks or letters in ("A", "B")
        if not operand.several:
            values[operand.name] = check(op, name, value, shape, dtype, written=written, flat=flat)
        elif values[OF_STATES.get(operand.name, operand.name.removesuffix("_state"))] is not None:
            if rule is not None and len(value) != rule.state_count:
                raise ArgumentError(
                    f"{op}: {name}: {rule.kind} keeps {rule.state_count} arrays of state, got {len(value)}"
                )
            checks = [check(op, name, element, shape, dtype, written=written, flat=flat) for element in value]
            values[operand.name] = tuple(checks)
        batch = sizes.get("M", 0)
        if picks and (len(value) % batch if batch else len(value)):
            raise ShapeError(
                f"{op}: {name}: expected {batch} row numbers, or several batches of {batch}; got {len(value)}"
            )
    if "M" in sizes:
        common["M"] = sizes["M"]
    return SimpleNamespace(**{"M": 0, "N": 0, "K": 0, **sizes, **values})


def check_together(op: str, operands: Mapping[str, Any]) -> None:
    """Raise ArgumentError for values that are unknown, or that do not go together."""
    activation = operands.get("activation", "identity")
    if activation not in ACTIVATIONS:
        raise unknown_name(f"{op}: activation", activation, ACTIVATIONS)
    if activation == "prelu" and "slope_param" not in operands:
        raise ArgumentError(f"{op}: activation: it takes no learned slope; give another activation than prelu")
    if activation == "prelu" and operands["slope_param"] is None:
        raise ArgumentError(f"{op}: slope_param: prelu needs its slope, an array of shape (1,); got None")
    eps = operands.get("eps")
    if eps is not None and not eps > 0.0:
        raise ArgumentError(f"{op}: eps: expected a number above 0, got {eps!r}")
    if "loss" in operands:
        loss, kind = operands["loss"], operands["loss"].kind
        if kind not in (*LOSSES, *DISTRIBUTIONS):
            raise unknown_name(f"{op}: loss", kind, LOSSES)
        if loss.missing and (loss.reduction == "rows" or kind in ("cross_entropy", "quantiles")):
            raise ArgumentError(
                f"{op}: loss: missing is for means and sums over elements, got {kind!r} by {loss.reduction!r}"
            )
        if kind == "cross_entropy" and activation != "identity":
            raise ArgumentError(f"activation: cross_entropy takes logits, so it must be 'identity', got {activation!r}")
    if op == "grad_input":
        if activation in NEEDS_Z and operands["z"] is None:
            raise ArgumentError(f"{op}: z: the derivative of {activation} needs the pre-activation; got None")
        if activation == "prelu" and operands["dslope"] is None:
            raise ArgumentError(f"{op}: dslope: prelu's gradient needs an array of shape (1,); got None")
    if "counters" in operands and operands["counters"] is None:
        if operands.get("dropout") is not None:
            raise ArgumentError(f"{op}: counters: dropout needs them, since the mask depends on the batch; got None")
        for name in ("rows", "x_rows"):
            if operands.get(name) is not None:
                raise ArgumentError(
                    f"{op}: counters: {name} needs them, since they say where the batch begins; got None"
                )
    if op == "encode":
        waves = operands["y"] if operands["dy"] is None else operands["dy"]
        wanted = operands["x"].shape[1] * (2 * operands["octaves"] + operands["inputs"])
        if waves.shape[1] != wanted:
            raise ShapeError(f"{op}: expected {wanted} columns of waves, got {waves.shape[1]}")
    rule = operands.get("rule")
    if operands.get("noise") is not None:
        operands["noise"].check(rule)
    if op == "grad_weight_update" and isinstance(rule, UpdateRule) and not rule.fuses:
        raise ArgumentError(
            f"{op}: rule: clipping and accumulation need the gradients in memory; use grad_weight and update"
        )
    _check_parts(op, operands)


def _check_parts(op: str, given: Mapping[str, Any]) -> None:
    parts, part = given.get("parts", 1), given.get("part", 0)
    if parts < 1 or (parts > 1 and part % 8):
        raise ArgumentError(f"{op}: parts, part: expected parts >= 1, part a multiple of 8; got {parts} and {part}")
    if parts > 1 and not (given["rule"].fuses and given.get("norm") is None):
        raise ArgumentError(
            f"{op}: parts: a batch in {parts} parts has no gradient to accumulate, and no norm; use parts=1"
        )
