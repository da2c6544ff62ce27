"""Print the formulas of ``pointwise`` for numba, Triton and CUDA C.

``python ci/print_formulas.py`` writes the files of ``FILES``. They are committed, and a test compares them with
what is printed. Every backend numbers functions by their place in the table; a number that is not in it gives NaN.
"""

from __future__ import annotations

import ast
import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from fusemlp_kernels import pointwise
from fusemlp_kernels.pointwise import (
    ACTIVATIONS,
    AVERAGE,
    DECAY,
    DISTRIBUTION_NAMES,
    DISTRIBUTIONS,
    FUNCTIONS,
    HYPERPARAMETERS,
    LOSS_NAMES,
    LOSSES,
    OPTIMIZERS,
    Activation,
    Line,
    Optimizer,
    lines,
    named,
)

AGAIN = "Printed from pointwise.py by `python ci/print_formulas.py`; do not edit."
WIDTH = 120


@dataclass(frozen=True)
class Dialect:
    """Text of expressions in a language. ``name`` is asked for every name, ``number`` for every number; ``quotient``
    names a function that divides, ``choice`` is what ``b if a else c`` becomes; empty: what they are in Python."""

    name: Callable[[str], str] = str
    number: Callable[[float], str] = repr
    functions: Mapping[str, str] = field(default_factory=dict)
    quotient: str = ""
    choice: str = ""

    def __call__(self, expression: ast.expr) -> str:
        return ast.unparse(_Translated(self).visit(copy.deepcopy(expression)))


class _Translated(ast.NodeTransformer):
    """An expression whose names are text of another language."""

    def __init__(self, dialect: Dialect) -> None:
        self.dialect = dialect

    def visit_Constant(self, node: ast.Constant) -> ast.expr:
        assert isinstance(node.value, int | float)
        return ast.Name(self.dialect.number(float(node.value)))

    def visit_Name(self, node: ast.Name) -> ast.expr:
        return ast.Name(self.dialect.name(node.id))

    def visit_Call(self, node: ast.Call) -> ast.expr:
        if not isinstance(node.func, ast.Name) or node.func.id not in FUNCTIONS:
            raise ValueError(f"formula: expected a function of {', '.join(FUNCTIONS)}; got {ast.unparse(node)!r}")
        function = ast.Name(self.dialect.functions.get(node.func.id, node.func.id))
        return ast.Call(function, [self.visit(argument) for argument in node.args], [])

    def visit_BinOp(self, node: ast.BinOp) -> ast.expr:
        left, right = self.visit(node.left), self.visit(node.right)
        if self.dialect.quotient and isinstance(node.op, ast.Div):
            return ast.Call(ast.Name(self.dialect.quotient), [left, right], [])
        return ast.BinOp(left, node.op, right)

    def visit_IfExp(self, node: ast.IfExp) -> ast.expr:
        test, body, otherwise = (self.visit(part) for part in (node.test, node.body, node.orelse))
        if not self.dialect.choice:
            return ast.IfExp(test, body, otherwise)
        return ast.Name(self.dialect.choice.format(*map(ast.unparse, (test, body, otherwise))))


CORRECTIONS = ("bias_correction_1", "bias_correction_2", "share")


@dataclass(frozen=True)
class Loads:
    """The way a language reads the numbers of a rule: hyperparameters, and what the hyper array holds."""

    field: str
    correction: str
    flags: Mapping[str, str]

    def __call__(self, name: str) -> str:
        if name in self.flags:
            return self.flags[name]
        if name not in (*HYPERPARAMETERS, *CORRECTIONS):
            raise ValueError(f"formula: {name!r} is not a line of it and not a field of Hyperparameters")
        return (self.correction if name in CORRECTIONS else self.field).format(name, name.upper())


class Update:
    """The lines of one optimizer or of several, one after another."""

    def __init__(self, *parts: Optimizer) -> None:
        self.states = [state for part in parts for state in part.states]
        self.element = [line for part in parts for line in lines(part.element)]
        self.scalars = [line for part in parts for line in lines(part.scalars)]
        local = {"p", "g", *self.states, *(name for name, _ in self.element)}
        # read in the type of the parameters
        self.real = [name for name in named(self.element) if name not in local]
        known = {*local, "rate", "decay", *(name for name, _ in self.scalars)}
        self.loaded = [name for name in named(self.scalars + self.element) if name not in known]

    def scalar_lines(self, loads: Loads, dialect: Dialect, form: str = "{} = {}") -> list[str]:
        """Reading the numbers of the rule, and the scalars."""
        read = [form.format(name, loads(name)) for name in self.loaded]
        return read + [form.format(name, dialect(value)) for name, value in self.scalars]


def derivative_lines(row: Activation) -> list[Line]:
    """The lines of a derivative ``d``, with the scale that dropout has put on y undone where that matters."""
    undone = [] if row.needs_z or row.homogeneous else lines("y = y * undo")
    return undone + lines(row.derivative, "d")


def loss_lines(name: str) -> list[Line]:
    """The lines of a loss, which end with ``loss`` and ``gradient``, and that by s of a distribution."""
    found = lines({**LOSSES, **DISTRIBUTIONS}[name].formula)
    ends = ["loss", "gradient", *(["gradient_s"] if name in DISTRIBUTIONS else [])]
    if [line for line, _ in found][-len(ends) :] != ends:
        raise ValueError(f"{name}: expected a formula that ends with `loss = ...` and `gradient = ...`")
    return found


def indented(found: Iterable[str]) -> list[str]:
    return [f"    {line}" for line in found]


def text(*parts: str | Iterable[str]) -> str:
    """Parts of a file, each a text or its lines, with two empty lines between them."""
    return "\n\n\n".join(part.strip() if isinstance(part, str) else "\n".join(part) for part in parts) + "\n"


def defined(name: str, arguments: str, body: Iterable[str], told: str = "", above: str = "") -> list[str]:
    """A Python function; its arguments have a line of their own where the first is too short."""
    head = f"def {name}({arguments}):"
    lines = [head] if len(head) <= WIDTH else [f"def {name}(", f"    {arguments}", "):"]
    return [*filter(None, [above]), *lines, *indented([*([f'"""{told}"""'] if told else []), *body] or ["pass"])]


def groups(*more: str) -> list[list[str]]:
    """The names of all activations, losses and ``more`` of them, and optimizers, in capitals and in order."""
    tables = (("", ACTIVATIONS), ("", [*LOSS_NAMES, *more]), ("RULE_", OPTIMIZERS))
    return [[prefix + name.upper() for name in names] for prefix, names in tables]


def codes(form: str, *more: str) -> list[str]:
    """Lines that make the names numbers, with ``more`` losses; ``form`` makes the numbers of a count."""
    found = [(", ".join(group), form.format(len(group))) for group in groups(*more)]
    short = max(len(f"{names} = {values}") for names, values in found) <= WIDTH
    return [f"{n} = {v}" if short else f"(\n    {n},\n) = {v}  # fmt: skip" for n, v in found]


def alike(cases: Mapping[str, Sequence[str]]) -> dict[tuple[str, ...], list[str]]:
    """The names of the cases that have the same lines, by their lines."""
    found: dict[tuple[str, ...], list[str]] = {}
    for name, body in cases.items():
        found.setdefault(tuple(body), []).append(name)
    return found


def chain(code: str, cases: Mapping[str, Sequence[str]], otherwise: Sequence[str], prefix: str = "") -> list[str]:
    """``if code == NAME`` with its lines for each case, in Python; cases with the same lines are one."""
    found: list[str] = []
    for body, names in alike(cases).items():
        tests = [f"{code} == {prefix}{name.upper()}" for name in names]
        test = tests[0] if len(tests) == 1 else " | ".join(f"({one})" for one in tests)
        found += [f"{'elif' if found else 'if'} {test}:", *indented(body)]
    return [*found, "else:", *indented(otherwise)]


def wrapped(form: str, names: Iterable[str]) -> Callable[[str], str]:
    """The names as they are, but ``names`` in ``form``."""
    chosen = frozenset(names)
    return lambda name: form.format(name) if name in chosen else name


def assigned(found: Iterable[Line], dialect: Dialect) -> list[str]:
    return [f"{name} = {dialect(value)}" for name, value in found]


# numba: a loop in each branch. In one loop for all, the choice between them would keep it from vector registers.


def numba_file() -> str:
    """``numpy/compiled/pointwise_numba.py``."""

    def number(value: float) -> str:
        return f"real({value!r})"

    def loop(body: Iterable[str], indices: str = "count") -> list[str]:
        return [f"for i in range({indices}):", *indented(body)]

    def nan(place: str, indices: str = "count") -> list[str]:
        return loop([f"{place} = np.nan"], indices)

    def function(name: str, arguments: str, body: Sequence[str], told: str, options: str = "ELEMENTWISE") -> list[str]:
        real = f"real = {arguments.removeprefix('kind, ').split(', ')[0]}.dtype.type"
        return defined(name, arguments, [real, *body], told, f"@register_jitable(**{options})")

    real = Dialect(wrapped("real({})", ["slope", "undo"]), number)
    values, derivatives, losses, updates = {}, {}, {}, {}
    # callers pass over the identity
    activations = {name: row for name, row in ACTIVATIONS.items() if name != "identity"}
    for name, row in activations.items():
        read = f"z = {'zs' if row.needs_z else 'ys'}[i]"
        values[name] = loop([read, *assigned(lines(row.value, "ys[i]"), real)])
        *before, (_, value) = derivative_lines(row)
        body = ["z = zs[i]" if row.needs_z else "y = ys[i]", *assigned(before, real)]
        if row.by_slope is not None:
            body.append(f"by_slope += ds[i] * {real(lines(row.by_slope, 'by_slope')[-1][1])}")
        derivatives[name] = loop([*body, f"ds[i] *= {real(value)}"])
    for name, loss in {**LOSSES, **DISTRIBUTIONS}.items():
        found = loss_lines(name)
        at = [line for line, _ in found].index("loss")
        spell = Dialect(wrapped("option", [loss.option or "option"]), number)
        places = ["ds[i]", "ss[i]"][: len(found) - at - 1]
        body = ["y, t = ys[i], ds[i]", *["s = ss[i]"][: len(places) - 1], *assigned(found[:at], spell)]
        body.append(f"total += {spell(found[at][1])}")
        for place, (_, gradient) in zip(places, found[at + 1 :], strict=True):
            body.append(f"{place} = {spell(ast.BinOp(gradient, ast.Mult(), ast.Name('factor')))}")
        losses[name] = loop(body, "np.uintp(start), np.uintp(stop)")
    flags = {"rate_inside": "rule.sklearn != 0", "decoupled": "rule.decoupled != 0"}
    loads = Loads("rule.{0}", "hyper[{1}]", flags)
    scalars = Dialect(functions={"maximum": "max", "sqrt": "math.sqrt"})
    decay = Update(DECAY)
    for name, rule in OPTIMIZERS.items():
        update = Update(rule)
        element = Dialect(wrapped("real({})", decay.real + update.real), number, {"sqrt": "math.sqrt"})
        arrays = [f"states{at}[i]" for at in range(len(rule.states))]
        body = [f"{', '.join(['p', 'g', *rule.states])} = {', '.join(['ps[i]', 'gs[i]', *arrays])}"]
        body += assigned(decay.element + update.element, element)
        body.append(f"{', '.join(['ps[i]', *arrays])} = {', '.join(['p', *rule.states])}")
        updates[name] = [*update.scalar_lines(loads, scalars), *loop(body)]
    average = Update(AVERAGE)
    averaged = ["p, average = ps[i], averages[i]"]
    averaged += [
        *assigned(average.element, Dialect(wrapped("real({})", average.real), number)),
        "averages[i] = average",
    ]
    return text(
        [NUMBA_HEAD.strip(), "", *codes("range({})", *DISTRIBUTION_NAMES)],
        function(
            "activate",
            "kind, ys, zs, count, slope",
            chain("kind", values, nan("ys[i]")),
            "``y = act(z)``; ys holds z where the derivative is had from y, else zs is other memory (``NEEDS_Z``).",
        ),
        function(
            "multiply_by_derivative",
            "kind, ds, ys, zs, count, slope, undo",
            ["by_slope = 0.0", *chain("kind", derivatives, [*nan("ds[i]"), "by_slope = np.nan"]), "return by_slope"],
            "``d *= act'``; ``undo`` is the inverse of dropout's scale on y. Returns the gradient by a learned slope.",
        ),
        function(
            "element_losses",
            "kind, ys, ss, ds, start, stop, factor, option",
            ["total = 0.0", *chain("kind", losses, [*nan("ds[i]", "start, stop"), "total = np.nan"]), "return total"],
            "The sum of the losses; in ds, where the targets are, the gradients times ``factor``, in ss those by s.",
            "REDUCTION",
        ),
        function(
            "update_tensor",
            "ps, gs, states0, states1, count, rate, decay, rule, hyper",
            [
                "code = rule.optimizer",
                *decay.scalar_lines(loads, scalars),
                *chain("code", updates, nan("ps[i]"), "RULE_"),
            ],
            "The parameters and their states, from the gradients.",
        ),
        function(
            "update_average",
            "ps, averages, count, hyper",
            [*average.scalar_lines(loads, scalars), *loop(averaged)],
            "The average of the parameters, after an update.",
        ),
    )


NUMBA_HEAD = f'''
# {AGAIN}
# mypy: disallow-untyped-defs=False
"""The formulas as loops over memory: of arrays that lie flat, or of ``compiler.Memory``."""

from __future__ import annotations

import math

import numpy as np
from numba.extending import register_jitable

from fusemlp_kernels.contract import BIAS_CORRECTION_1, BIAS_CORRECTION_2, SHARE
from fusemlp_kernels.numpy.compiled.compiler import ELEMENTWISE, REDUCTION
from fusemlp_kernels.numpy.compiled.functions import (
    exp,
    log,
    log1p,
    maximum,
    minimum,
    normal_cdf,
    normal_pdf,
    sigmoid,
    sign,
    step,
    tanh,
)
'''

# Triton: branches on a number that all threads have in common.


def triton_file() -> str:
    """``triton/pointwise_triton.py``."""
    head = [TRITON_HEAD.strip(), "", *codes("(tl.constexpr(code) for code in range({}))")]
    names = ", ".join(name.upper() for name in HYPERPARAMETERS)
    places = f"(tl.constexpr(place) for place in range(1, {1 + len(HYPERPARAMETERS)}))"
    head += ["# places of the hyperparameters in a rule", f"{names} = {places}"]
    parts: list[str | list[str]] = [[*head, f"RULES: tl.constexpr = tl.constexpr({len(OPTIMIZERS)})"]]

    def function(name: str, arguments: str, told: str, body: Sequence[str]) -> None:
        parts.append(defined(name, arguments, body, told, "@triton.jit"))

    def spelled(name: Callable[[str], str] = str) -> Dialect:
        functions = {"abs": "tl.abs", "exp": "tl.exp", "sqrt": "tl.sqrt_rn"}
        return Dialect(name, functions=functions)

    nan = 'float("nan")'
    values = {name: assigned(lines(row.value, "y"), spelled()) for name, row in ACTIVATIONS.items()}
    body = [*chain("code", values, [f"y = z + {nan}"]), "return y"]
    function("activate", "z, code, slope", "f(z), elementwise, float32.", body)
    needing = " | ".join(f"(code == {name.upper()})" for name, row in ACTIVATIONS.items() if row.needs_z)
    told = "True where the derivative is computed from z; the others read it off y."
    function("needs_z", "code", told, [f"return {needing}"])
    derived = {}
    for name, row in ACTIVATIONS.items():
        found = lines(row.derivative, "d")
        constant = [f"d = tl.zeros_like(v) + {float(row.derivative)!r}"] if not named(found) else []
        derived[name] = constant or assigned(found, spelled(wrapped("v", ["y", "z"])))
    told = "f'(z), elementwise, from ``v``: z where ``needs_z``, else y = f(z)."
    function("derivative", "v, code, slope", told, [*chain("code", derived, [f"d = v + {nan}"]), "return d"])
    for name, row in ACTIVATIONS.items():
        if row.by_slope is not None:
            *before, (_, value) = lines(row.by_slope, "d")
            body = [*assigned(before, spelled()), f"return {spelled()(value)}"]
            function(f"by_slope_{name}", "z", f"The derivative of {name} by its slope.", body)
    losses = {
        name: assigned(loss_lines(name), spelled(wrapped("option", [loss.option or ""])))
        for name, loss in LOSSES.items()
    }
    body = [*chain("kind", losses, [f"loss = y + {nan}", "gradient = loss"]), "return loss, gradient"]
    function("element_loss", "y, t, kind, option", "The loss of one output, and its derivative by y.", body)
    flags = {"rate_inside": "tl.load(rule + INSIDE) != 0.0", "decoupled": "tl.load(rule + DECOUPLED) != 0.0"}
    loads = Loads("tl.load(rule + {1})", "tl.load(hyper + {1})", flags)
    scalars = Dialect(functions={"maximum": "tl.maximum", "sqrt": "tl.sqrt"}, choice="tl.where({0}, {1}, {2})")
    stored: dict[str, list[str]] = {}
    for name, rule in {"decay": DECAY, "average": AVERAGE, **OPTIMIZERS}.items():
        arrays = ("average_at",) if rule is AVERAGE else ("first_at", "second_at")
        update, places = Update(rule), list(zip(rule.states, arrays, strict=False))
        # an activation's quotient may be two units off, which saves registers
        real = replace(spelled(wrapped("{}.to(tl.float32)", update.real)), quotient="tl.div_rn")
        stored[name] = update.scalar_lines(loads, scalars)
        stored[name] += [f"{state} = tl.load({place}, mask=mask, other=0.0)" for state, place in places]
        stored[name] += assigned(update.element, real)
        stored[name] += [f"tl.store({place}, {state}, mask=mask)" for state, place in places]
    # all that is read comes before the first store, which it would wait for
    body = ["rate = tl.load(hyper + LEARNING_RATE) * factor", "averages = tl.load(rule + EMA) != 0.0"]
    body.append("p = tl.load(p_at, mask=mask, other=0.0)")
    before, after = stored.pop("decay"), stored.pop("average")
    body += [*before, *chain("RULE", stored, [f"p += {nan}"], "RULE_")]
    body += ["tl.store(p_at, p, mask=mask)", "if shadowed != 0:"]
    body.append("    tl.store(shadow_at, p.to(shadow_at.dtype.element_ty), mask=mask)")
    # last, where the fewest registers are in use
    body += ["if averages:", *indented(after)]
    arguments = (
        "g, p_at, first_at, second_at, average_at, shadow_at, mask, hyper, rule, factor, decay, shadowed, "
        "RULE: tl.constexpr"
    )
    function("stored_update", arguments, TRITON_STORED, body)
    return text(*parts)


TRITON_STORED = """Update the parameters at ``p_at`` and their states by the gradient ``g``, where ``mask`` is set,
    and with an ``ema`` their average; ``shadow_at`` receives the parameter rounded, where ``shadowed``."""
TRITON_HEAD = f'''
# {AGAIN}
"""The formulas inside kernels."""

from __future__ import annotations

import triton
import triton.language as tl

from fusemlp_kernels.triton.clock import BIAS_CORRECTION_1, BIAS_CORRECTION_2, DECOUPLED, INSIDE, LEARNING_RATE, SHARE
from fusemlp_kernels.triton.functions import log1p, maximum, minimum, normal_cdf, normal_pdf, sigmoid, sign, step, tanh
'''

# CUDA C: the same, with the scalars of an optimizer in a structure, computed once a thread.

DEVICE = "__device__ __forceinline__"


def cuda_file() -> str:
    """``cupy/pointwise.cuh``."""
    parts = [CUDA_HEAD.strip()]
    for enum, listed in zip(("Activation", "Kind", "RuleCode"), groups(), strict=True):
        parts.append(f"enum {enum} {{ {', '.join(listed)} }};")
    parts.append(CUDA_RULE.replace("HYPERPARAMETERS", "\n    ".join(f"double {name};" for name in HYPERPARAMETERS)))

    def function(told: str, head: str, body: Iterable[str]) -> None:
        parts.append("\n".join([f"// {told}", f"{head} {{", *indented(body), "}"]))

    def switch(cases: Mapping[str, Sequence[str]], otherwise: str, prefix: str = "") -> list[str]:
        found = ["switch (code) {"]
        for body, names in alike(cases).items():
            braces = len(body) > 1
            found += [f"case {prefix}{name.upper()}:" for name in names]
            found[-1] += " {" * braces
            found += [*indented(body), *["}"] * braces]
        return [*found, "default:", f"    {otherwise};", "}"]

    def spelled(name: Callable[[str], str] = str) -> Dialect:
        functions = {"abs": "fabsf", "exp": "expf", "log1p": "log1pf", "sqrt": "sqrtf", "tanh": "tanhf"}
        return Dialect(name, lambda value: f"{value!r}f", functions)

    def declared(found: Iterable[Line], dialect: Dialect, known: Iterable[str] = ()) -> list[str]:
        """Statements; a name has its type where it is not ``known``."""
        seen, body = set(known), []
        for name, value in found:
            body.append(f"{'' if name in seen else 'float '}{name} = {dialect(value)};")
            seen.add(name)
        return body

    def returned(found: Sequence[Line], dialect: Dialect) -> list[str]:
        return [*declared(found[:-1], dialect), f"return {dialect(found[-1][1])};"]

    values = {name: returned(lines(row.value, "y"), spelled()) for name, row in ACTIVATIONS.items()}
    head = f"{DEVICE} float activate(float z, int code, float slope)"
    function("f(z).", head, switch(values, "return not_a_number()"))
    needing = " || ".join(f"code == {name.upper()}" for name, row in ACTIVATIONS.items() if row.needs_z)
    told = "True where f' is computed from z; the others read it off y = f(z)."
    function(told, f"{DEVICE} bool needs_z(int code)", [f"return {needing};"])
    from_v = spelled(wrapped("v", ["y", "z"]))
    derived = {name: returned(lines(row.derivative, "d"), from_v) for name, row in ACTIVATIONS.items()}
    head = f"{DEVICE} float derivative(float v, int code, float slope)"
    function("f'(z) from `v`: z where needs_z, else y = f(z).", head, switch(derived, "return not_a_number()"))
    for name, row in ACTIVATIONS.items():
        if row.by_slope is not None:
            head = f"{DEVICE} float by_slope_{name}(float z)"
            function(f"The derivative of {name} by its slope.", head, returned(lines(row.by_slope, "d"), spelled()))
    losses = {}
    for name, loss in LOSSES.items():
        own, found = spelled(wrapped("option", [loss.option or ""])), loss_lines(name)
        losses[name] = [*declared(found[:-1], own), f"*gradient = {own(found[-1][1])};", "return loss;"]
    head = f"{DEVICE} float element_loss(float y, float t, long long code, float option, float* gradient)"
    body = switch(losses, "return *gradient = not_a_number()")
    function("The loss of one output, and its derivative by y.", head, body)

    loads = Loads("rule.{0}", "hyper[{1}]", {"rate_inside": "rule.inside != 0", "decoupled": "rule.decoupled != 0"})
    doubles = Dialect(choice="({0} ? {1} : {2})")
    decay, average = Update(DECAY), Update(AVERAGE)
    updates = {name: Update(rule) for name, rule in OPTIMIZERS.items()}
    members = list(dict.fromkeys(name for update in (decay, average, *updates.values()) for name in update.real))
    fields = "\n".join(indented(f"float {name};" for name in members))
    parts.append(f"// Numbers of the optimizers, in the type of the parameters.\nstruct Scalars {{\n{fields}\n}};")

    def prepared(update: Update) -> list[str]:
        read = update.scalar_lines(loads, doubles, "auto {} = {};")
        return read + [f"scalars.{name} = static_cast<float>({name});" for name in update.real]

    cases = {name: [*prepared(update), "return scalars;"] for name, update in updates.items()}
    head = "const Rule& rule, long long code, double rate, double decay, const double* hyper)"
    head = f"{DEVICE} Scalars scalars_of(\n    {head}"
    body = ["Scalars scalars = {};", *prepared(decay), *prepared(average), *switch(cases, "return scalars", "RULE_")]
    function("The scalars of a rule, once a thread.", head, body)
    element = spelled(wrapped("scalars.{}", members))
    for name, update in updates.items():
        states = list(zip(update.states, ("s0", "s1"), strict=False))
        cases[name] = [
            *(f"float {state} = *{place};" for state, place in states),
            *declared(update.element, element, ["p", "g", *update.states]),
            *(f"*{place} = {state};" for state, place in states),
            "return p;",
        ]
    head = "float p, float g, float* s0, float* s1, long long code, const Scalars& scalars)"
    head = f"{DEVICE} float updated(\n    {head}"
    shrink, pull = declared(decay.element, element, ["p", "g"])
    # without decay an infinite parameter must not make the gradient NaN
    body = [shrink, f"if (scalars.coupled != 0.0f) {pull}", *switch(cases, "return not_a_number()", "RULE_")]
    function("One parameter: its new value, with its states in place.", head, body)
    body = ["float average = *place;", *declared(average.element, element, ["average"]), "*place = average;"]
    head = f"{DEVICE} void update_average(float p, float* place, const Scalars& scalars)"
    function("The average of a parameter, in place.", head, body)
    return "\n\n".join(parts) + "\n"


CUDA_RULE = """// An optimizer's rule.
struct Rule {
    long long code;  // which of RuleCode
    HYPERPARAMETERS
    long long decoupled;
    long long inside;  // scikit-learn's convention
    double clip_norm;  // infinite: no clipping
    long long accumulate;
    long long scaled;  // the gradients carry the loss scale
    double growth_interval;
};"""
CUDA_HEAD = f"""
// The formulas. {AGAIN}

#include "common.cuh"
"""

# of the package that is imported, which may be a copy
FOLDER = Path(pointwise.__file__).parent
FILES: dict[str, Callable[[], str]] = {
    "numpy/compiled/pointwise_numba.py": numba_file,
    "triton/pointwise_triton.py": triton_file,
    "cupy/pointwise.cuh": cuda_file,
}


def main() -> None:
    """Write all files."""
    for name, printed in FILES.items():
        (FOLDER / name).write_text(printed(), encoding="utf-8")


if __name__ == "__main__":
    main()
