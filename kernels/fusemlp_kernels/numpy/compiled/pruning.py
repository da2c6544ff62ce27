"""Compile only what a program uses: a copy of the loop without the other branches.

Numba compiles every branch that it sees, which takes most of the first ``fit`` on a machine. So this module first cuts
the branches that a program never takes from the source: ``if kind == NAME``, for each NAME of the printed formulas or
``t.Kind.NAME`` of ``tables`` that the program does not use, and ``if call.field``, ``if head.field``, and ``if flag``
after ``flag = call.field != 0``, for each field that it does not fill. Such a flag is assigned once. The rest computes
the same.
"""

from __future__ import annotations

import ast
import inspect
import zlib
from importlib import import_module
from types import ModuleType
from typing import Any

import numpy as np
from numba import types

from fusemlp_kernels import contract
from fusemlp_kernels.numpy.compiled import tables
from fusemlp_kernels.numpy.compiled.compiler import kept_for_calls

# The modules with branches to cut, each before those that import from it; and those whose names become numbers.
_FILES = ("pointwise_numba", "losses", "layers", "inputs", "columns", "pieces", "steps")
_NUMBERS = {"t": tables, "c": contract}


def _named(place: ast.expr) -> str:
    """NAME of ``t.Kind.NAME`` or ``t.NAME``, as names of ``tables`` stand in the source, or of NAME; else nothing."""
    match place:
        case ast.Attribute(ast.Name("t") | ast.Attribute(ast.Name("t")), name) | ast.Name(name):
            return name
    return ""


class _Cutter(ast.NodeTransformer):
    """Cuts the branches of the names in ``absent``, and of what is assigned from them."""

    def __init__(self, absent: frozenset[str]) -> None:
        self._absent = absent
        # local names that are false
        self._false: set[str] = set()

    def _is(self, test: ast.expr) -> bool | None:
        """Return the value of a condition in all programs without these names; None if it is unknown."""
        match test:
            case ast.Compare(ops=[ast.Eq()], comparators=[name]) if _named(name) in self._absent:
                return False
            case ast.Compare(ops=[ast.In()], comparators=[ast.Tuple(elts=names)]) if all(
                _named(name) in self._absent for name in names
            ):
                return False
            case ast.Compare(left=flag, ops=[ast.NotEq()], comparators=[ast.Constant(value=0)]):
                return self._is(flag)
            case ast.Attribute(value=ast.Name(id="call" | "head"), attr=name) if name in self._absent:
                return False
            case ast.Name(id=name) if name in self._false:
                return False
            case ast.UnaryOp(op=ast.Not(), operand=inner) if self._is(inner) is False:
                return True
            case ast.BoolOp(op=ast.And(), values=values) if any(self._is(value) is False for value in values):
                return False
        return None

    def visit_Attribute(self, node: ast.Attribute) -> Any:
        """A name of ``_NUMBERS`` becomes its number, which numba would take longer to look up."""
        match node.value:
            case ast.Attribute(value=ast.Name(id="t"), attr="Kind"):
                return ast.copy_location(ast.Constant(int(tables.Kind[node.attr])), node)
            case ast.Name(id=module) if module in _NUMBERS:
                return ast.copy_location(ast.Constant(getattr(_NUMBERS[module], node.attr)), node)
        return self.generic_visit(node)

    def visit_FunctionDef(self, node: ast.FunctionDef) -> Any:
        self._false = set()
        return self.generic_visit(node)

    def visit_Assign(self, node: ast.Assign) -> Any:
        match node:
            case ast.Assign(targets=[ast.Tuple(elts=targets)], value=ast.Tuple(elts=values)):
                pairs = list(zip(targets, values, strict=True))
            case ast.Assign(targets=[target], value=value):
                pairs = [(target, value)]
            case _:
                pairs = []
        for target, value in pairs:
            if isinstance(target, ast.Name) and isinstance(value, ast.Compare) and self._is(value) is False:
                self._false.add(target.id)
        return self.generic_visit(node)

    def visit_If(self, node: ast.If | ast.IfExp) -> Any:
        taken = self._is(node.test)
        self.generic_visit(node)
        if taken is None:
            return node
        return (node.body if taken else node.orelse) or ast.copy_location(ast.Pass(), node)

    visit_IfExp = visit_If


def _cut(module: ModuleType, absent: frozenset[str], others: dict[str, dict[str, Any]], variant: str) -> dict[str, Any]:
    """The names of a module without the branches of ``absent``; what it imports from ``others`` is theirs.

    Numba calls machine code by the name of its function and a number that counts in each process. Loops from the disk,
    which several processes compiled, would run each other's functions: so the names of functions tell the variant too.
    """
    tree = _Cutter(absent).visit(ast.parse(inspect.getsource(module)))
    for node in tree.body:
        if isinstance(node, ast.FunctionDef) and node.decorator_list:
            node.decorator_list.append(ast.Name("_renamed", ast.Load()))
    ast.fix_missing_locations(tree)
    tag = zlib.crc32(variant.encode())

    def renamed(function: Any) -> Any:
        function.__qualname__ += f"_{tag:08x}"
        return function

    names: dict[str, Any] = {"__name__": module.__name__, "__file__": module.__file__, "_renamed": renamed}
    exec(compile(tree, str(module.__file__), "exec"), names)
    for node in tree.body:
        if isinstance(node, ast.ImportFrom) and node.module in others:
            names |= {alias.name: others[node.module][alias.name] for alias in node.names}
    return names


def compiled_work(absent: frozenset[str], real: Any) -> Any:
    """``steps.work`` for parameters of type ``real``, in whose tables the names in ``absent`` do not occur."""
    variant = " ".join([np.dtype(real).name, *sorted(absent)])

    def build() -> Any:
        modules: dict[str, dict[str, Any]] = {}
        for file in _FILES:
            module = import_module(f"fusemlp_kernels.numpy.compiled.{file}")
            modules[module.__name__] = names = _cut(module, absent, modules, variant)
        names["REAL"] = np.dtype(real).type
        return names["work"]

    return kept_for_calls(build, "work", variant, [types.intp] * 3)
