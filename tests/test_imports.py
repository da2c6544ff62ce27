"""Imports run one way, and importing the package is fast and loads nothing heavy."""

import ast
import graphlib
import json
import os
import subprocess
import sys
from collections import namedtuple
from pathlib import Path

import processes
import pytest

import fusemlp
from fusemlp_kernels.registry import TRAITS

ROOT = Path(__file__).resolve().parents[1]
SOURCES = (ROOT / "engine", ROOT / "kernels")

# The rooms of fusemlp, from the top down: folders and top-level modules. Each imports its own row and those below.
LAYERS = (
    ("__init__", "__main__"),
    ("cli",),
    ("sklearn", "torch"),
    ("tables",),
    ("fleet",),
    ("engine",),
    ("training",),
    ("report",),
    ("runtime",),
    ("program",),
    ("callbacks", "datasets"),
    ("inputs",),
    ("describe",),
    ("_version",),
)
# The room of fusemlp that knows the backends; the others see only shared descriptions, definitions and errors.
BACKEND_USERS = ("runtime",)
SHARED = (
    "fusemlp_kernels.compilation",
    "fusemlp_kernels.coding",
    "fusemlp_kernels.contract",
    "fusemlp_kernels.errors",
    "fusemlp_kernels.ops",
    "fusemlp_kernels.ops",
    "fusemlp_kernels.philox",
    "fusemlp_kernels.pointwise",
)
# Libraries that only these modules, and those inside them, may import.
OWNERS = {
    "cupy": ("fusemlp_kernels.cupy",),
    "cupyx": ("fusemlp_kernels.cupy",),
    "dp_accounting": ("fusemlp.describe.privacy",),
    "jinja2": ("fusemlp.report.page",),
    "llvmlite": ("fusemlp_kernels.numpy.compiled",),
    "mlflow": ("fusemlp.callbacks",),
    "numba": ("fusemlp_kernels.numpy.compiled",),
    "onnx": ("fusemlp.report.onnx_graph",),
    "tensorboard": ("fusemlp.callbacks",),
    "torch": ("fusemlp_kernels.triton", "fusemlp.runtime.ranks", "fusemlp.torch"),
    "triton": ("fusemlp_kernels.triton",),
    "wandb": ("fusemlp.callbacks",),
}

HEAVY = (
    *("torch", "triton", "cupy", "numba", "scipy", "sklearn", "typer", "rich", "matplotlib", "onnx", "pandas"),
    *("tensorboard", "mlflow", "wandb", "dp_accounting", "jinja2"),
)
IMPORT_LIMIT = 0.060  # seconds above `import numpy`


# Full dotted names, and the line.
Import = namedtuple("Import", "importer imported line")


def source_modules():
    """Full dotted name to source text; a package is named ``package.__init__``. Scripts beside them are users'."""
    return {
        ".".join(path.relative_to(root).with_suffix("").parts): path.read_text(encoding="utf-8")
        for root in SOURCES
        for path in sorted(root.glob("fusemlp*/**/*.py"))
    }


def statements(node):
    """Yield every node that can run: nothing below ``if TYPE_CHECKING``."""
    yield node
    children = ast.iter_child_nodes(node)
    if isinstance(node, ast.If):
        test = node.test
        if "TYPE_CHECKING" in (getattr(test, "attr", None), getattr(test, "id", None)):
            children = node.orelse
    for child in children:
        yield from statements(child)


def imported_names(node, package, modules):
    """Yield the imports of a node: statements, and ``import_module`` or ``__import__`` of a literal name."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom):
        base = node.module or ""
        if node.level:
            parents = package.split(".")
            base = ".".join([*parents[: len(parents) + 1 - node.level], *([base] if base else [])])
        full = [f"{base}.{alias.name}" for alias in node.names]
        return [name if {name, f"{name}.__init__"} & modules.keys() else base for name in full]
    if isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
        called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", None)
        name = node.args[0].value
        if called in ("import_module", "__import__") and isinstance(name, str):
            return [f"{package}{name}" if name.startswith(".") else name]
    return []


def imports(modules):
    return [
        Import(importer, name, getattr(node, "lineno", 0))
        for importer, source in modules.items()
        for node in statements(ast.parse(source))
        for name in imported_names(node, importer.rpartition(".")[0], modules)
    ]


def within(name, *packages):
    return any(name == package or name.startswith(f"{package}.") for package in packages)


def part(name):
    """Return the row entry of a module of fusemlp: its first name below the package."""
    return name.split(".")[1] if "." in name else "__init__"


def layer_numbers():
    """Return the row of each name, counted from the bottom."""
    return {name: number for number, row in enumerate(reversed(LAYERS)) for name in row}


def direction_faults(found):
    layers = layer_numbers()
    for importer, imported, line in found:
        where = f"{importer}:{line} imports {imported}"
        library = imported.partition(".")[0]
        if library in OWNERS and not within(importer, *OWNERS[library]):
            yield f"{where}; only {' and '.join(OWNERS[library])} may"
        if within(importer, "fusemlp_kernels"):
            if within(imported, "fusemlp"):
                yield f"{where}; the kernels never import the engine"
        elif within(imported, "fusemlp_kernels"):
            if part(importer) not in BACKEND_USERS and not within(imported, *SHARED):
                yield f"{where}; only {', '.join(BACKEND_USERS)} know the backends"
        elif within(imported, "fusemlp") and layers.get(part(importer), 0) < layers.get(part(imported), 0):
            yield f"{where}, which lies above it"


def unplaced(modules):
    """Return the parts of fusemlp without a row in ``LAYERS``."""
    return sorted({part(name) for name in modules if within(name, "fusemlp")} - layer_numbers().keys())


def cycle(found):
    """Return an import cycle between modules of one package, or nothing."""
    graph = {}
    for importer, imported, _ in found:
        here, there = importer.removesuffix(".__init__"), imported.removesuffix(".__init__")
        if here.partition(".")[0] == there.partition(".")[0] and here != there:
            graph.setdefault(here, set()).add(there)
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        return error.args[1]
    return []


def faults(modules):
    found = imports(modules)
    ring = cycle(found)
    return [
        *(f"{name}: give it a row in LAYERS of {Path(__file__).name}" for name in unplaced(modules)),
        *direction_faults(found),
        *([f"imports in a ring: {' <- '.join(ring)}"] if ring else []),
    ]


def test_imports_run_one_way():
    modules = source_modules()
    assert {"fusemlp.__init__", "fusemlp_kernels.contract"} <= modules.keys()
    assert not faults(modules), "\n".join(faults(modules))


# Invented sources that break one rule each, and the expected report.
BROKEN = {
    "kernels import the engine": ({"fusemlp_kernels.philox": "from fusemlp import MLP"}, "never import the engine"),
    "triton in the engine": ({"fusemlp.runtime.programs": "from triton import jit"}, "only fusemlp_kernels.triton may"),
    "cupy in the triton backend": ({"fusemlp_kernels.triton.launch": "import cupy"}, "fusemlp_kernels.cupy may"),
    "in a function": ({"fusemlp.describe.losses": "def f():\n    import torch"}, "losses:2 imports torch"),
    "by name": (
        {"fusemlp.describe.losses": "import importlib\nimportlib.import_module('torch')"},
        "losses:2 imports torch",
    ),
    "upwards, in a function": ({"fusemlp.engine": "def f():\n    from fusemlp.fleet import fleet"}, "lies above it"),
    "upwards, relative": ({"fusemlp.program.program": "from ..runtime.bound import run"}, "lies above it"),
    "upwards, to the public names": ({"fusemlp.sklearn": "from fusemlp import MLP"}, "lies above it"),
    "a backend": ({"fusemlp.training.fit": "from fusemlp_kernels.numpy import plan"}, "know the backends"),
    "the oracle": (
        {"fusemlp.describe.optimizers": "from fusemlp_kernels import reference", "fusemlp_kernels.reference": ""},
        "imports fusemlp_kernels.reference; only runtime know the backends",
    ),
    "no row": ({"fusemlp.gadgets": ""}, "gadgets: give it a row"),
    "a ring in one row": (
        {
            "fusemlp.program.program": "import fusemlp.program.layout",
            "fusemlp.program.layout": "def f():\n    from . import program",
        },
        "in a ring",
    ),
    "not only for type checkers": (
        {"fusemlp.describe.network": "if TYPE_CHECKING:\n    import torch\nelse:\n    import triton"},
        "network:4 imports triton",
    ),
}


@pytest.mark.parametrize("modules, report", BROKEN.values(), ids=BROKEN.keys())
def test_a_broken_rule_is_reported_once(modules, report):
    (fault,) = faults(modules)
    assert report in fault


def test_what_the_rules_allow():
    modules = {
        "fusemlp.__init__": "from fusemlp.engine import Engine\nfrom ._version import __version__",
        "fusemlp._version": "",
        "fusemlp.cli.train": "from fusemlp.cli import tables\nfrom fusemlp.training.fit import fit",
        "fusemlp.cli.tables": "import rich",
        "fusemlp.torch": "import torch\nfrom fusemlp.engine import Engine",
        "fusemlp.fleet.fleet": "from fusemlp import engine, _version",
        "fusemlp.engine": "def fit():\n    from fusemlp.training.fit import fit",
        "fusemlp.runtime.plans": "import fusemlp_kernels",
        "fusemlp.program.program": "from fusemlp_kernels import contract, errors",
        "fusemlp.program.lowering": "from fusemlp.program.program import Program",
        "fusemlp.describe.network": "if typing.TYPE_CHECKING:\n    from fusemlp.engine import Engine",
        "fusemlp.datasets.load": "import numpy",
        "fusemlp_kernels.__init__": "from fusemlp_kernels.errors import ShapeError",
        "fusemlp_kernels.contract": "",
        "fusemlp_kernels.errors": "",
        "fusemlp_kernels.numpy.__init__": "from ..contract import Traits\nfrom . import plan",
        "fusemlp_kernels.numpy.plan": "import numpy",
        "fusemlp_kernels.triton.launch": "import torch\nimport triton.language as tl",
        "fusemlp_kernels.cupy.backend": "import cupy\nfrom cupyx.scipy import special",
    }
    assert faults(modules) == []


IMPORT_PROBE = """
import json, sys, time
import numpy
start = time.perf_counter()
import fusemlp
if "touch" in sys.argv:
    for name in fusemlp.__all__:
        getattr(fusemlp, name)
print(json.dumps([time.perf_counter() - start, sorted(sys.modules)]))
"""


def probe_import(cache, *options):
    """Seconds of ``import fusemlp`` after ``import numpy`` in a fresh interpreter, and what is loaded then.

    With the option ``touch`` every public name is looked up as well: some modules load only then.
    Byte code is kept in ``cache``: whether the folders of the sources may hold any makes no difference.
    """
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    environment["PYTHONPATH"] = os.pathsep.join(map(str, SOURCES))
    command = [sys.executable, "-X", f"pycache_prefix={cache}", "-c", IMPORT_PROBE, *options]
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    seconds, modules = json.loads(done.stdout)
    return seconds, set(modules)


def test_import_is_quick(tmp_path):
    """Other processes can only add to a run's time: one run within the limit shows what the import costs."""
    probe_import(tmp_path)
    fastest = float("inf")
    for _ in range(15):
        fastest = min(fastest, probe_import(tmp_path)[0])
        if fastest <= IMPORT_LIMIT:
            return
    pytest.fail(f"import fusemlp takes {1e3 * fastest:.0f} ms above numpy; the limit is {1e3 * IMPORT_LIMIT:.0f} ms")


@pytest.mark.parametrize("options", [(), ("touch",)], ids=["the package", "every public name"])
def test_import_brings_in_nothing_heavy(options, tmp_path):
    _, modules = probe_import(tmp_path, *options)
    assert "fusemlp" in modules
    assert sorted(modules.intersection(HEAVY)) == []


TRAIN_PROBE = """
import contextlib, io, json, sys
from fusemlp.cli import main
loaded = {}
class Shown(io.StringIO):
    def write(self, text):
        loaded.setdefault(" ".join(text.split()[:1]), sorted(sys.modules))
        return len(text)
words = "train table.csv --target size --epochs 2 --hidden 4 --quiet --out run"
with contextlib.redirect_stdout(Shown()), contextlib.suppress(SystemExit):
    main(words.split())
print(json.dumps([loaded["test"], loaded["run"]]))
"""
# Their imports take a second and a half, and a table of numbers trains, is judged and drawn without them.
UNUSED = ("sklearn", "pandas", "scipy.stats", "scipy.optimize", "scipy.sparse", "joblib", "torch", "triton", "onnx")
UNUSED += ("matplotlib.pyplot", "rich.progress", "tensorboard", "mlflow", "wandb")


def test_train_of_a_table_imports_what_it_needs_and_nothing_to_draw_before_the_scores(tmp_path):
    rows = [f"{'ab'[row % 2]},{row % 17},{row * 7 % 31}.5" for row in range(250)]
    (tmp_path / "table.csv").write_text("\n".join(["word,number,size", *rows]))
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, SOURCES))}
    done = subprocess.run(
        [sys.executable, "-c", TRAIN_PROBE], cwd=tmp_path, env=environment, stdout=subprocess.PIPE, check=True
    )
    at_scores, at_end = map(set, json.loads(done.stdout))
    assert "numba" in at_scores and {"matplotlib", "jinja2"} <= at_end
    assert at_end.intersection(UNUSED) == set()
    assert at_scores.intersection({"matplotlib", "jinja2"}) == set()


CARD_PROBE = """
import sys
# as where it is not installed
sys.modules["numba"] = None
sys.path.insert(0, "tests/kernels")
import cupy_standin
import numpy as np
import fusemlp
from fusemlp import MLP, Engine, Fleet
from fusemlp_kernels import registry
backend, *plans = sys.argv[1:]
if backend == "cupy":
    cupy_standin.load()
    registry._cupy_reason = lambda: None
x, y = np.random.default_rng(0).normal(size=(24, 6)).astype(np.float32), np.arange(24) % 3
for plan in plans:
    told = {"batch_size": 8, "backend": backend, "plan": plan}
    engine = Engine(MLP([6, 5, 3], dropout=0.1), **told, normalise=True)
    engine.fit(x, y, epochs=1, validation_split=0.2, metrics=["auc"])
    engine.step(x[:8], y[:8])
    engine.evaluate(x, y)
    engine.input_gradient(x, y)
    Fleet(MLP([6, 5, 3]), vary={"lr": [0.1, 0.01]}, **told).fit(x, y, epochs=1)
"""


@pytest.mark.parametrize(("backend", "plans"), [("triton", ("eager", "resident")), ("cupy", ("eager",))])
def test_a_card_needs_no_numba(backend, plans):
    """Triton interpreted, and the stand-in for CuPy: their own code up to the launches."""
    if backend == "triton":
        pytest.importorskip("torch")
        pytest.importorskip("triton")
    else:
        pytest.importorskip("fcntl", reason="the kernels are compiled for the CPU on Linux only")
    done = processes.python("-c", CARD_PROBE, backend, *plans, TRITON_INTERPRET="1")
    assert done.returncode == 0, done.stderr


def test_every_public_name_resolves():
    assert [name for name in fusemlp.__all__ if not hasattr(fusemlp, name)] == []
    assert len(set(fusemlp.__all__)) == len(fusemlp.__all__)


def compared_names(source):
    """Yield the lines on which something is compared with a backend's name, or picked by it."""
    for node in ast.walk(ast.parse(source)):
        parts = []
        if isinstance(node, ast.Compare):
            parts = [node.left, *node.comparators]
        elif isinstance(node, ast.MatchValue):
            parts = [node.value]
        elif isinstance(node, ast.Call) and getattr(node.func, "attr", "") in ("startswith", "endswith"):
            parts = node.args
        parts = [one for part in parts for one in getattr(part, "elts", [part])]
        if any(isinstance(part, ast.Constant) and part.value in TRAITS for part in parts):
            yield node.lineno


def test_no_backend_is_told_from_another_by_its_name():
    """A backend is asked for its traits: outside ``runtime`` nothing compares its name."""
    modules = {name: text for name, text in source_modules().items() if within(name, "fusemlp")}
    outside = {name: text for name, text in modules.items() if part(name) not in BACKEND_USERS}
    assert len(outside) > 50
    assert [f"{name}:{line}" for name, text in outside.items() for line in compared_names(text)] == []


@pytest.mark.parametrize(
    ("source", "count"),
    [
        ('engine.backend == "numpy"', 1),
        ('"triton" != traits.name', 1),
        ('name in ("cupy", "triton")', 1),
        ('name.startswith("cupy")', 1),
        ('match name:\n    case "numpy":\n        pass', 1),
        ('load(path, backend="numpy")\ntable = {"triton": 1}\nplan == "resident"', 0),
    ],
)
def test_comparisons_with_names_of_backends_are_found(source, count):
    assert len(list(compared_names(source))) == count
