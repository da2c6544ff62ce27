"""A backend is asked for its traits: outside ``runtime`` nothing compares its name."""

import ast
from pathlib import Path

import pytest

from fusemlp_kernels.registry import TRAITS

ENGINE = Path(__file__).resolve().parents[1] / "engine" / "fusemlp"


def compared_names(source):
    """The lines on which something is compared with a backend's name, or picked by it."""
    for node in ast.walk(ast.parse(source)):
        found = []
        if isinstance(node, ast.Compare):
            found = [node.left, *node.comparators]
        elif isinstance(node, ast.MatchValue):
            found = [node.value]
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            found = list(node.args) if node.func.attr in ("startswith", "endswith") else []
        parts = [
            part for one in found for part in (one.elts if isinstance(one, ast.Tuple | ast.List | ast.Set) else [one])
        ]
        if any(isinstance(part, ast.Constant) and part.value in TRAITS for part in parts):
            yield node.lineno


def test_no_backend_is_told_from_another_by_its_name():
    files = [path for path in sorted(ENGINE.rglob("*.py")) if path.relative_to(ENGINE).parts[0] != "runtime"]
    found = [f"{path.relative_to(ENGINE)}:{line}" for path in files for line in compared_names(path.read_text("utf-8"))]
    assert len(files) > 50 and not found


@pytest.mark.parametrize(
    "source",
    [
        'engine.backend == "numpy"',
        '"triton" != traits.name',
        'name in ("cupy", "triton")',
        'name.startswith("cupy")',
        'match name:\n    case "numpy":\n        pass',
    ],
)
def test_comparisons_are_found(source):
    assert list(compared_names(source))


def test_names_that_are_only_given_are_not():
    assert not list(compared_names('load(path, backend="numpy")\ntable = {"triton": 1}\nplan == "resident"'))
