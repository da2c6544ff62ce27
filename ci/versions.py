"""Test the wheel with the lowest and the newest versions of its dependencies, on every Python that it is for.

usage: ci/versions [--python 3.12] [--versions lowest | --triton 3.6.0] [--tests FILE ...] [--keep FOLDER]

Each cell of the table is a fresh environment: uv installs the wheel's dependencies and those of its tests, each in the
lowest version that pyproject.toml allows and that has a wheel for this Python, or in the newest. In it, outside the
checkout, `fusemlp train digits` runs, and then the quick part of the tests. With --triton the cell has PyTorch and this
version of Triton too, and runs all of tests/ptx and `ci/gpu --rehearse`. An interpreter that is not found is a row of
the table, not run.
"""

from __future__ import annotations

import argparse
import glob
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import tomllib
import venv
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[1]
PYTHONS = ("3.11", "3.12", "3.13", "3.14")
VERSIONS = {"lowest": "lowest-direct", "newest": "highest"}
# Several GB, or tools that read the source: ci/test has them, in one version each.
LEFT_OUT = ("build", "hatchling", "mypy", "nvidia-cuda-nvrtc-cu12", "ruff", "torch", "triton", "ziglang")
# Cells with a version of Triton have these all the same; the interpreter of Triton 3.6 fails with NumPy 2.4.
OF_TRITON, NUMPY_OF_TRITON = ("torch", "triton", "ziglang"), "numpy<2.4"
EXTRAS = ("data", "excel", "onnx", "plot", "tensorboard")
# Tests of what comes from dependencies, without torch: a few minutes a cell.
TESTS = (
    "tests/doors/test_onnx.py",
    "tests/doors/test_onnx_words.py",
    "tests/doors/test_sklearn_convergence.py",
    "tests/doors/test_sklearn_files.py",
    "tests/doors/test_sklearn_own_tests.py",
    "tests/doors/test_sklearn_table.py",
    "tests/engine/test_callbacks.py",
    "tests/engine/test_cli_train.py",
    "tests/engine/test_datafiles.py",
    "tests/engine/test_fleet.py",
    "tests/engine/test_metrics.py",
    "tests/engine/test_odd_tables.py",
    "tests/engine/test_plots.py",
    "tests/engine/test_preprocessing.py",
    "tests/engine/test_tables.py",
    "tests/engine/test_training.py",
    "tests/kernels/test_compiled_cache.py",
)
TRITON_TESTS = ("tests/ptx",)
SHOWN = ("numpy", "scipy", "numba", "scikit-learn", "pyarrow", "pandas", "onnx")
# "873 passed, 2 xfailed" of pytest's last line.
COUNTS = re.compile(r"^=* ?(\d+ [a-z]+(?:, \d+ (?!warnings?)[a-z]+)*)(?:, \d+ warnings?)? in [\d.]+s", re.MULTILINE)


class Failed(Exception):
    """A command of a cell failed; the message is for the table, the output has been printed."""


class Cell(NamedTuple):
    """A row of the table."""

    python: str
    versions: str
    installed: dict[str, str]
    result: str
    seconds: float


def left_out(triton: str | None) -> list[str]:
    """Return the packages that a cell does not have; ``triton`` is the version that it has, if any."""
    return [name for name in LEFT_OUT if triton is None or name not in OF_TRITON]


def requirements(triton: str | None = None) -> list[str]:
    """Return what the wheel and the tests need, without what is left out."""
    with open(ROOT / "pyproject.toml", "rb") as file:
        project = tomllib.load(file)["project"]
    optional = project["optional-dependencies"]
    listed = [*project["dependencies"], *(one for extra in (*EXTRAS, "test") for one in optional[extra])]
    chosen = [] if triton is None else [f"triton=={triton}", NUMPY_OF_TRITON]
    return [*(one for one in listed if name_of(one) not in (*left_out(triton), "fusemlp")), *chosen]


def name_of(requirement: str) -> str:
    """Return the name of a requirement's package."""
    found = re.match(r"[\w.-]+", requirement)
    assert found is not None, requirement
    return found.group()


def run(what: str, command: Sequence[str | Path], *, cwd: Path, **variables: str) -> str:
    """Return the output of a command; if it fails, print it and raise Failed with ``what``."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    if "PIP_FIND_LINKS" in environment:
        # wheels that lie on this machine, such as PyTorch's small CPU build
        # pip parts several by spaces, uv by commas
        environment.setdefault("UV_FIND_LINKS", ",".join(environment["PIP_FIND_LINKS"].split()))
    done = subprocess.run(
        [str(word) for word in command],
        cwd=cwd,
        env=environment | variables,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        encoding="utf-8",
        errors="replace",
    )
    if done.returncode:
        print(done.stdout, flush=True)
        raise Failed(f"{what} failed")
    return done.stdout


def scripts(environment: Path) -> Path:
    """Return the folder of an environment's commands."""
    return environment / ("Scripts" if os.name == "nt" else "bin")


def find_uv(folder: Path) -> str:
    """Return the command uv, installed into ``folder`` where the machine has none."""
    found = shutil.which("uv")
    if found is None:
        venv.create(folder, with_pip=True)
        python = scripts(folder) / "python"
        run("installing uv", [python, "-m", "pip", "install", "--quiet", "uv"], cwd=folder)
        found = str(scripts(folder) / "uv")
    return found


def candidates(python: str, uv: str) -> Iterator[str]:
    """Yield interpreters that may be this Python: on the search path, known to uv, of pyenv."""
    if found := shutil.which(f"python{python}"):
        yield found
    command = [uv, "python", "find", "--no-python-downloads", "--no-project", python]
    known = subprocess.run(command, capture_output=True, text=True)
    if known.returncode == 0:
        yield known.stdout.strip()
    root = os.environ.get("PYENV_ROOT") or os.path.expanduser("~/.pyenv")
    yield from sorted(glob.glob(f"{glob.escape(root)}/versions/{python}.*/bin/python"), reverse=True)


def find_python(python: str, uv: str) -> str | None:
    """Return an interpreter of this Python, or None."""
    asked = "import sys; print('%d.%d' % sys.version_info[:2])"
    for candidate in candidates(python, uv):
        answer = subprocess.run([candidate, "-I", "-c", asked], capture_output=True, text=True)
        if answer.returncode == 0 and answer.stdout.strip() == python:
            return candidate
    return None


def installed(uv: str, python: Path, cwd: Path) -> dict[str, str]:
    """Return the versions in an environment by package."""
    listed = run("listing packages", [uv, "pip", "list", "--python", python, "--format", "json"], cwd=cwd)
    packages: list[dict[str, Any]] = json.loads(listed[listed.index("[") : listed.rindex("]") + 1])
    return {package["name"]: package["version"] for package in packages}


def check_cell(
    uv: str, interpreter: str, versions: str, wheel: Path, folder: Path, tests: Sequence[str], triton: str | None
) -> Cell:
    """Make a cell's environment in ``folder``, and test the wheel in it."""
    began, found, label = time.monotonic(), dict[str, str](), run_version(interpreter)
    environment, work = folder / "environment", folder / "work"
    work.mkdir(parents=True)
    listed = folder / "requirements.txt"
    listed.write_text("\n".join(requirements(triton)) + "\n", encoding="utf-8")
    python = scripts(environment) / "python"
    pip = (uv, "pip", "install", "--quiet", "--python", python)
    # Each environment compiles for itself; one BLAS thread, as in ci/test.
    settings = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    try:
        run("making the environment", [uv, "venv", "--quiet", "--python", interpreter, environment], cwd=work)
        chosen = ("--resolution", VERSIONS.get(versions, "highest"), "--only-binary", ":all:")
        run("installing dependencies", [*pip, *chosen, "-r", listed], cwd=work)
        run("installing the wheel", [*pip, "--no-deps", wheel], cwd=work)
        found = installed(uv, python, work)
        train = [scripts(environment) / "fusemlp", "train", "digits", "--epochs", "3", "--out", "run"]
        run("fusemlp train digits", train, cwd=work, **settings)
        # Warnings of a dependency's other versions are no failures of this code.
        options = ["-q", "--disable-warnings", "-W", "default", "-p", "no:cacheprovider"]
        options += ["--rootdir", str(ROOT), "-c", str(ROOT / "pyproject.toml"), *(str(ROOT / test) for test in tests)]
        compiling = {} if triton is None else {"TRITON_INTERPRET": "0"}
        printed = run("pytest", [python, "-B", "-m", "pytest", *options], cwd=work, **settings, **compiling)
        result = COUNTS.findall(printed)[-1]
        if triton is not None:
            run("ci/gpu --rehearse", [ROOT / "ci/gpu", "--rehearse"], cwd=work, PYTHON=str(python))
            result += ", ci/gpu --rehearse passed"
    except Failed as failure:
        result = f"FAILED: {failure}"
    return Cell(label, versions, found, result, time.monotonic() - began)


def run_version(interpreter: str) -> str:
    """Return the version of an interpreter."""
    return run(
        "the interpreter", [interpreter, "-I", "-c", "import platform; print(platform.python_version())"], cwd=ROOT
    ).strip()


def table(cells: Sequence[Cell]) -> str:
    """Return the cells as a Markdown table."""
    rows = [("Python", "versions", *SHOWN, "result", "seconds"), ("---",) * (len(SHOWN) + 4)]
    rows += [
        (
            cell.python,
            cell.versions,
            *(cell.installed.get(name, "") for name in SHOWN),
            cell.result,
            f"{cell.seconds:.0f}" if cell.seconds else "",
        )
        for cell in cells
    ]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def main() -> None:
    about, _, _ = (__doc__ or "").partition("\n\nusage")
    parser = argparse.ArgumentParser(
        prog="ci/versions",
        description=about,
        epilog="Run it before each release and put the table into its note; with --triton 3.6.0, the oldest that the "
        "kernels are for, after a change of kernels too (PIP_FIND_LINKS, or settings of uv, find PyTorch's small CPU "
        f"build). Left out of every other cell, and tested in one version by ci/test: {', '.join(LEFT_OUT)}.",
    )
    this = f"{sys.version_info.major}.{sys.version_info.minor}"
    parser.add_argument(
        "--python", nargs="+", metavar="VERSION", help=f"default: {' '.join(PYTHONS)}; with --triton {this}"
    )
    parser.add_argument("--versions", nargs="+", choices=VERSIONS, help="default: both")
    parser.add_argument("--triton", metavar="VERSION", help="a cell with this version and the newest of all others")
    parser.add_argument(
        "--tests", nargs="+", metavar="FILE", help="default: the quick part of the tests; with --triton tests/ptx"
    )
    parser.add_argument("--keep", metavar="FOLDER", help="keep the environments in this new folder")
    given = parser.parse_args()
    if given.triton and given.versions:
        parser.error("argument --versions: not with --triton, whose cell has the newest versions; leave one out")
    if given.triton:
        pythons, versions, tests = [this], [f"triton-{given.triton}"], TRITON_TESTS
    else:
        pythons, versions, tests = list(PYTHONS), list(VERSIONS), TESTS
    # The tests send Ctrl-C, which a shell lets commands in the background ignore, and so their children.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    with tempfile.TemporaryDirectory(prefix="fusemlp-versions-") as name:
        folder = Path(name).resolve()
        if given.keep:
            folder = Path(given.keep).resolve()
            folder.mkdir(parents=True)
        chosen = given.python or pythons, given.versions or versions, given.tests or tests
        sys.exit(1 if check(*chosen, folder, given.triton) else 0)


def check(
    pythons: Sequence[str], versions: Sequence[str], tests: Sequence[str], folder: Path, triton: str | None = None
) -> int:
    """Check every cell one after another and print the table; returns how many failed."""
    try:
        uv = find_uv(folder / "uv")
        run("building the wheel", [uv, "build", "--quiet", "--out-dir", folder, ROOT], cwd=folder)
    except Failed as failure:
        sys.exit(f"ci/versions: {failure}")
    # built from the source distribution
    (wheel,) = folder.glob("*.whl")
    cells = []
    for python in pythons:
        interpreter = find_python(python, uv)
        for one in versions:
            if interpreter is None:
                cell = Cell(python, one, {}, f"not run: no interpreter python{python} was found", 0.0)
            else:
                print(f"ci/versions: Python {python}, {one} versions", flush=True)
                cell = check_cell(uv, interpreter, one, wheel, folder / f"{python}-{one}", tests, triton)
            cells.append(cell)
            print(f"ci/versions: Python {python}, {one} versions: {cell.result}", flush=True)
    print(f"\n{table(cells)}\n\nLeft out of every cell: {', '.join(left_out(triton))}.")
    return sum(cell.result.startswith("FAILED") for cell in cells)


if __name__ == "__main__":
    main()
