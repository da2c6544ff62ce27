"""PTX text as data: functions, and instructions with their operands and source lines.

Registers get places in one numbering over the whole module. A function needs one set of registers for each thread, as
no kernel here is recursive. The parameters of functions and of calls are places too.
"""

from __future__ import annotations

import itertools
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from .faults import Place

WIDTHS = {"pred": np.bool_, "8": np.uint8, "16": np.uint16, "32": np.uint32, "64": np.uint64}
# The registers of inline assembly; see ``_apart``.
OWN_KINDS = {"%own_pred_": np.bool_, "%own_b32_": np.uint32, "%own_b64_": np.uint64}
GUARDED = re.compile(r"^@(!?)(%\w+)\s+(.*)$", re.DOTALL)
REGISTERS = re.compile(r"\.reg\s+\.(\w+)\s+(%\w+?)<(\d+)>")
FILE = re.compile(r'^\s*\.file\s+(\d+)\s+"([^"]*)"', re.MULTILINE)
PARAMETER = re.compile(r"\.param\s+(?:\.align\s+\d+\s+)?\.(\w+)\s+(?:\.ptr\s+[^,)]*?)?([$\w]+)(\[\d+\])?\s*[,)\n]")
# Inline assembly whose names are its own.
SCOPE_IN_A_LINE = re.compile(r"^[ \t]*\{ (\.reg [^;]*;) (.*;) \}$", re.MULTILINE)
SCOPE = re.compile(r"^[ \t]*\{[ \t]*\n((?:[^{}]|\{[^{}\n]*\})*?)^[ \t]*\}", re.MULTILINE)
OWN = re.compile(r"^[ \t]*(?:\.reg\s+\.(\w+)\s+([A-Za-z]\w*);|([A-Za-z]\w*):)", re.MULTILINE)
FUNCTION = re.compile(
    r"^(?:\.visible\s+)?\.(entry|func)\s+(?:\([^)]*\)\s*)?([$\w.]+)\s*\((.*?)\)([^{;]*)([{;])", re.DOTALL | re.MULTILINE
)


@dataclass(frozen=True)
class Register:
    """A register, or a parameter; ``place`` is its number in the module."""

    place: int
    kind: type[np.generic]


@dataclass(frozen=True)
class Address:
    """``[base + offset]``; the base is a register, a symbol, or nothing."""

    base: Register | str | None
    offset: int


@dataclass(frozen=True)
class Vector:
    """``{a, b}``; None stands for a part that is dropped."""

    parts: tuple[Operand, ...]


# A number's bits, in the width of its notation; a string names a special register, a symbol or a label.
Operand = Register | Address | Vector | int | str | None


@dataclass(frozen=True)
class Instruction:
    """``@guard name operands``; ``modifiers`` are the parts of the name."""

    name: str
    operands: tuple[Operand, ...]
    guard: Register | None
    negated: bool
    place: Place

    @property
    def modifiers(self):
        return tuple(self.name.split("."))


class Function:
    """A function of a module: its registers and parameters by name, and the index of its first instruction."""

    def __init__(self, name, kinds, places):
        self.name, self.first, self.parameters = name, 0, []
        self.names = {}
        self._kinds, self._places = kinds, places

    def register(self, name, kind=None):
        """Return the register of that name; its kind is the declared one unless it is a parameter."""
        if name not in self.names:
            kind = self._kinds[re.sub(r"\d+$", "", name)] if kind is None else kind
            self.names[name] = Register(next(self._places), kind)
        return self.names[name]


class Module:
    """A kernel's PTX: its functions, each after those it calls; ``labels`` and ``tables`` of branch targets lead to
    indices of its code, which ``instruction`` reads when it is first asked for."""

    def __init__(self, name, threads):
        self.name, self.threads = name, threads
        self.functions = {}
        self.labels = {}
        # by function and label: Triton 3.6 begins their numbers anew in each function
        self.tables = {}
        self._statements = []
        self._read = {}

    @property
    def entry(self):
        return self.functions[self.name]

    def function(self, index):
        """Return the function that an instruction belongs to."""
        return self._statements[index][1]

    def named(self, name):
        """Return the instructions whose text has this name."""
        return [self.instruction(index) for index, (place, _) in enumerate(self._statements) if name in place.text]

    def instruction(self, index):
        """Return an instruction by its index."""
        if index not in self._read:
            place, function = self._statements[index]
            self._read[index] = _instruction(place, function)
        return self._read[index]

    def add(self, function, statements):
        """Add a function's body."""
        tables = {}
        label = ""
        self.functions[function.name] = function
        function.first = len(self._statements)
        for statement in statements:
            if isinstance(statement, Place):
                self._statements.append((statement, function))
            elif isinstance(statement, str):
                label = statement
                self.labels[label] = len(self._statements)
            else:
                tables[label] = statement
        for name, targets in tables.items():
            self.tables[function.name, name] = [self.labels[target] for target in targets]


def parse(text):
    """Return the module of a kernel."""
    files = {number: Path(path).name for number, path in FILE.findall(text)}
    headers = {found[2]: found for found in FUNCTION.finditer(text) if found[5] == "{"}
    entry = next(found for found in headers.values() if found[1] == "entry")
    threads = re.search(r"\.reqntid\s+(\d+)", entry[4])
    if threads is None:
        raise ValueError(f"{entry[2]} does not say how many threads it has")
    module, places = Module(entry[2], int(threads[1])), itertools.count()
    bodies = {name: _apart(_body(text, found.end())) for name, found in headers.items()}
    # Functions stand before their callers, so that the threads inside a function run before those that wait outside.
    for name in _callees_first(bodies):
        kinds = {
            prefix: WIDTHS[re.sub(r"^[a-z]+(?=\d)", "", kind)] for kind, prefix, _ in REGISTERS.findall(bodies[name])
        } | OWN_KINDS
        function = Function(name, kinds, places)
        function.parameters = [
            function.register(parameter, WIDTHS["64" if kind == "b8" else kind[1:]])
            for kind, parameter, _ in PARAMETER.findall(headers[name][3] + ")")
        ]
        kernel = name if name == entry[2] else f"{entry[2]}, {name}"
        module.add(function, _statements(bodies[name], kernel, files))
    return module


def _body(text, start):
    """Return the text up to the brace that closes the one before ``start``."""
    depth = 1
    for found in re.finditer(r"[{}]", text[start:]):
        depth += 1 if found[0] == "{" else -1
        if depth == 0:
            return text[start : start + found.start()]
    raise ValueError("a brace is not closed")


def _apart(body):
    """Return the body with names of their own for the registers and labels of each piece of inline assembly."""
    number = itertools.count()

    def renamed(scope):
        inside = scope[0]
        for kind, register, label in OWN.findall(scope[1]):
            name = f"%own_{kind}_{next(number)}" if register else f"$own_{next(number)}"
            inside = re.sub(rf"(?<![\w.%$]){register or label}\b", name, inside)
        return inside

    return SCOPE.sub(renamed, SCOPE_IN_A_LINE.sub(r"{\n\t\1\n\t\2\n}", body))


def _callees_first(bodies):
    order = []

    def visit(name):
        for callee in re.findall(r"call\.uni\s+(?:\([^)]*\)\s*,\s*)?([$\w.]+)", bodies[name]):
            if callee not in order:
                visit(callee)
        if name not in order:
            order.append(name)

    for name in bodies:
        visit(name)
    return order


def _statements(body, kernel, files):
    """Yield the statements, each as the place it is in; labels; and tables of branch targets, each after its label."""
    source, targets = "?", ""
    for raw in body.splitlines():
        if raw.startswith("\t.loc"):
            _, file, number, _ = raw.split(None, 3)
            # Line 0 stands for code that belongs to no line.
            source = source if number == "0" else f"{files.get(file, '?')}:{number}"
            continue
        line = raw.partition("//")[0].strip()
        if not line or line in ("{", "}") or line.startswith((".reg", ".param", ".pragma")):
            continue
        label, _, rest = line.partition(":")
        if rest.strip().startswith(".branchtargets"):
            # Triton 3.6 writes both in a line
            yield label
            line = rest.strip()
        if line.startswith(".branchtargets") or targets:
            targets += " " + line
            if line.endswith(";"):
                yield re.findall(r"\$\w+", targets)
                targets = ""
        elif line.endswith(":"):
            yield line[:-1]
        else:
            for statement in filter(None, map(str.strip, line.split(";"))):
                yield Place(kernel, source, statement)


def _instruction(place, function):
    guard, negated, statement = None, False, place.text
    if found := GUARDED.match(statement):
        guard, negated, statement = function.register(found[2]), bool(found[1]), found[3]
    name, *rest = statement.split(None, 1)
    operands = tuple(_operand(part, function) for part in _split(" ".join(rest)))
    return Instruction(name, operands, guard, negated, place)


def _split(text):
    """Yield the operands, which commas outside brackets separate; ``a|b`` are two."""
    depth, part = 0, ""
    for letter in text:
        depth += (letter in "{[(") - (letter in "}])")
        if (letter == "," and depth == 0) or (letter == "|" and depth == 0):
            yield part.strip()
            part = ""
        else:
            part += letter
    if part.strip():
        yield part.strip()


def _operand(text, function):
    if text == "_":
        return None
    if text[0] in "{(":
        return Vector(tuple(_operand(part, function) for part in _split(text[1:-1].strip())))
    if text[0] == "[" and "," in text:
        return Vector(tuple(_operand(part, function) for part in _split(text[1:-1].strip())))
    if text[0] == "[":
        base, _, offset = text[1:-1].replace(" ", "").partition("+")
        number = int(offset or 0)
        if base.startswith("%"):
            return Address(function.register(base), number)
        if re.match(r"^-?\d", base):
            return Address(None, int(base))
        if "param" in base or "retval" in base:
            # The parts of an array are places of their own. Calls use the same names for arguments of any width.
            return function.register(base + (f"+{number}" if number else ""), np.uint64)
        return Address(base, number)
    if text.startswith("%") and "." not in text and re.search(r"\d$", text):
        return function.register(text)
    return _number(text, function)


def _number(text, function):
    if found := re.match(r"^0([fd])([0-9A-Fa-f]+)$", text):
        return int(found[2], 16)
    if re.match(r"^-?(0x[0-9a-fA-F]+|\d+)U?$", text):
        return int(text.rstrip("U"), 0)
    # a parameter, or a symbol
    return function.names.get(text, text)
