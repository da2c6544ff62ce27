"""Measure how much of the house a reader and a change must pass through, and print it as a table.

Sizes and imports are read from the files that git tracks; the files of a training are those whose functions run, as
``sys.setprofile`` sees them in every thread. ``ci/house`` runs this file with the environment that ``ci/test`` makes.
"""

from __future__ import annotations

import ast
import contextlib
import inspect
import io
import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType

ROOT = Path(__file__).resolve().parents[1]
PRODUCT = (".py", ".cu", ".cuh")
# Features of a training that code outside their own file asks for, by the names of their variables and classes.
FEATURES = {"adversarial", "attack", "dp_epsilon", "intervals", "privacy", "private", "ranks", "sharding"}
FEATURE_CLASSES = {"Attack", "DPSGD", "IBP"}
# A table with words, numbers and a measured target.
TABLE = "colour,size,price\n" + "".join(
    f"{'red' if row % 3 else 'blue'},{row % 17},{row % 17 * 3.5}\n" for row in range(80)
)


def tracked(*folders: str) -> list[Path]:
    """Return the files of some folders that git tracks."""
    listing = subprocess.run(["git", "ls-files", *folders], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return [ROOT / name for name in listing.splitlines()]


def lines(files: list[Path]) -> int:
    return sum(len(file.read_bytes().splitlines()) for file in files)


def feature_tests(source: str) -> int:
    """Return how often a source asks for a feature: ``privacy is None``, ``members > 1``, ``isinstance(x, IBP)``."""
    return sum(map(_asks_for_a_feature, ast.walk(ast.parse(source))))


def _asks_for_a_feature(node: ast.AST) -> bool:
    if isinstance(node, ast.Compare):
        left, right = node.left, node.comparators[0]
        name = left.attr if isinstance(left, ast.Attribute) else getattr(left, "id", "")
        if not isinstance(right, ast.Constant):
            return False
        return (name in FEATURES and right.value is None) or (name == "members" and right.value == 1)
    if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "isinstance":
        return bool(FEATURE_CLASSES & {name.id for name in ast.walk(node.args[1]) if isinstance(name, ast.Name)})
    return False


def circles(imports: dict[str, set[str]]) -> list[list[str]]:
    """Return the sets of modules that import one another, directly or through others (Tarjan, 1972)."""
    number: dict[str, int] = {}
    lowest: dict[str, int] = {}
    stack: list[str] = []
    rings: list[list[str]] = []

    def visit(module: str) -> None:
        number[module] = lowest[module] = len(number)
        stack.append(module)
        for other in sorted(imports[module]):
            if other not in number:
                visit(other)
                lowest[module] = min(lowest[module], lowest[other])
            elif other in stack:
                lowest[module] = min(lowest[module], number[other])
        if lowest[module] == number[module]:
            first = stack.index(module)
            rings.append(sorted(stack[first:]))
            del stack[first:]

    for module in imports:
        if module not in number:
            visit(module)
    return [ring for ring in rings if len(ring) > 1]


def imports_of(root: Path) -> dict[str, set[str]]:
    """Return the modules below ``root`` that each of them imports, in functions and for types too."""
    files = {".".join(file.relative_to(root).with_suffix("").parts): file for file in root.rglob("*.py")}
    modules = {name.removesuffix(".__init__"): file for name, file in files.items()}
    graph: dict[str, set[str]] = {}
    for module, file in modules.items():
        names: set[str] = set()
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                names |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module:
                full = {f"{node.module}.{alias.name}" for alias in node.names}
                names |= {name if name in modules else node.module for name in full}
        graph[module] = (names & modules.keys()) - {module}
    return graph


def calls_of(work: Callable[[], object]) -> dict[str, int]:
    """Return how many calls of functions of each of our files ``work`` makes, in all threads."""
    sources = tuple(f"{ROOT / folder}{os.sep}" for folder in ("engine", "kernels"))
    calls: dict[str, int] = {}

    def count(frame: FrameType, event: str, argument: object) -> None:
        file = frame.f_code.co_filename
        # the bodies of modules and classes, which an import runs, are no calls
        if event == "call" and file.startswith(sources) and frame.f_code.co_flags & inspect.CO_OPTIMIZED:
            calls[file] = calls.get(file, 0) + 1

    threading.setprofile(count)
    sys.setprofile(count)
    try:
        work()
    finally:
        sys.setprofile(None)
        threading.setprofile(None)  # type: ignore[arg-type]
    return calls


def train_a_table() -> None:
    """Run ``fusemlp train`` on a small table, as its first user does."""
    from fusemlp import cli

    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        Path("a.csv").write_text(TABLE, encoding="utf-8")
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()) as messages:
            try:
                cli.main(["train", "a.csv", "--target", "price", "--epochs", "2"])
            except SystemExit as ended:
                if ended.code:
                    raise RuntimeError(f"fusemlp train failed: {messages.getvalue()}") from ended


def warm_fit() -> dict[str, int]:
    """Return the calls of the second ``fit`` of an engine: 2 epochs, validation rows and early stopping."""
    import numpy as np

    from fusemlp import MLP, Engine

    random = np.random.default_rng(0)
    X, y = random.normal(size=(320, 16)).astype(np.float32), random.integers(0, 3, 320)
    engine = Engine(MLP([16, 8, 3]), batch_size=32)

    def fit() -> None:
        engine.fit(X[:256], y[:256], epochs=2, validation_data=(X[256:], y[256:]), early_stopping=5)

    fit()
    return calls_of(fit)


def rows() -> Iterator[tuple[str, str]]:
    """Yield what is measured, and the measure."""
    product = [file for file in tracked("engine", "kernels") if file.suffix in PRODUCT]
    yield "product lines (engine, kernels: .py .cu .cuh)", f"{lines(product):,}"
    tests = [file for file in tracked("tests") if "fixtures" not in file.parts]
    yield "lines in tests/ (without fixtures)", f"{lines(tests):,}"
    yield "files that `fusemlp train a.csv` passes through", str(len(calls_of(train_a_table)))
    asks = {file: feature_tests(file.read_text(encoding="utf-8")) for file in product if file.suffix == ".py"}
    yield "scattered tests for features, and their files", f"{sum(asks.values())}, {sum(map(bool, asks.values()))}"
    yield "files in cli/", str(sum(file.parent.name == "cli" for file in product))
    yield "circles of files in the engine", str(len(circles(imports_of(ROOT / "engine"))))
    calls = warm_fit()
    yield "warm fit (2 epochs, validation, early stopping): own calls, files", f"{sum(calls.values())}, {len(calls)}"


if __name__ == "__main__":
    measures = list(rows())
    width = max(len(name) for name, _ in measures)
    for name, measure in measures:
        print(f"{name:<{width}}  {measure:>10}")
