"""The backend and the stand-in use names of CuPy, with CuPy's parameters in CuPy's order."""

import ast
import importlib
import json
from pathlib import Path

import pytest

pytest.importorskip("fcntl", reason="the kernels are compiled for the CPU on Linux only")

from cupy_standin.modules import BY_NAME

ROOT = Path(__file__).resolve().parents[2]
BACKEND = ROOT / "kernels/fusemlp_kernels/cupy"
# The modules that may name CuPy.
OWNERS = ("device.py", "products.py")


@pytest.fixture
def names(monkeypatch):
    """``ci/check_cupy_names.py`` as a module."""
    monkeypatch.syspath_prepend(ROOT / "ci")
    return importlib.import_module("check_cupy_names")


def test_it_has_nothing_that_cupy_has_not(names):
    recorded = json.loads(names.RECORD.read_text())["names"]
    mine = names.stand_in()
    assert names.misfits(mine, recorded) == []
    assert set(mine) == set(recorded)


def test_another_order_of_parameters_is_noticed(names):
    def gemm(handle, m, n, k):
        raise AssertionError

    assert names.misfits({"f": gemm}, {"f": "f(intptr_t handle, int m, int n, int k, size_t alpha)"}) == []
    assert "takes ['handle', 'm', 'n', 'k']" in names.misfits({"f": gemm}, {"f": "f(handle, n, m, k)"})[0]
    assert names.misfits({"f": gemm}, {}) == ["f: CuPy has no such name"]
    text = "zeros(shape: '_Shape | None', dtype: 'Type' = <class 'float'>, *, order=()) -> 'Array'"
    assert names.parameters(text) == ["shape", "dtype", "order"]


def test_every_name_of_cupy_in_the_backend_is_known(names):
    known = set(json.loads(names.RECORD.read_text())["names"]) | set(BY_NAME)
    roots = {"cupy": "cupy", "cublas": "cupy_backends.cuda.libs.cublas"}
    found = set()
    trees = [ast.parse((BACKEND / name).read_text("utf-8")) for name in OWNERS]
    for node in (node for tree in trees for node in ast.walk(tree)):
        if isinstance(node, ast.Attribute):
            chain, inner = node.attr, node.value
            while isinstance(inner, ast.Attribute):
                chain, inner = f"{inner.attr}.{chain}", inner.value
            if isinstance(inner, ast.Name) and inner.id in roots:
                found.add(f"{roots[inner.id]}.{chain}")
    assert len(found) > 20 and found <= known, found - known


def test_no_other_module_imports_cupy():
    importing = set()
    for path in BACKEND.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            imported = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            imported += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            if any(name.split(".")[0] in ("cupy", "cupy_backends") for name in imported):
                importing.add(path.name)
    assert importing == set(OWNERS)
