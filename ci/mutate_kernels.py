"""Plant bugs in the kernels, one at a time, and report the test that catches each.

Each bug of ci/mutations.py (Triton) and ci/cuda_mutations.py (CUDA C) goes into a copy of the kernels in a temporary
folder. Its tests run on that copy, under Triton's interpreter or compiled as C++, until one fails. A bug is caught if a
test fails by an assertion or a broken rule of CUDA, or if the process crashes. A bug that only raises another error is
reported as a bad mutation. First the tests run on an unchanged copy, and all must pass. The exit status is 1 if a bug
survives, 2 if the tests fail without one or an entry no longer fits the kernels.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import textwrap
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from cuda_mutations import CUDA_MUTATIONS
from mutation_plugin import FAILURE, KERNELS
from mutations import MUTATIONS as TRITON_MUTATIONS
from mutations import Mutation

ROOT = Path(__file__).resolve().parents[1]
MUTATIONS = (*TRITON_MUTATIONS, *CUDA_MUTATIONS)
TABLES = {"triton": ROOT / "ci/mutations.md", "cupy": ROOT / "ci/cuda_mutations.md"}
# For each package a part of its tests' names, and the errors that count as a caught bug: the stand-in for CuPy and its
# fibers have their own assertions.
PLACES = {"triton": "interpreted", "cupy": "host"}
ASSERTIONS = ("AssertionError", "KernelFault", "Misuse")
# An endless loop counts as caught.
TIMEOUT = 900
KINDS = {
    "triton": ("the Triton kernels", "ci/mutations.py", "under Triton's interpreter"),
    "cupy": ("the CUDA C of the CuPy backend", "ci/cuda_mutations.py", "compiled as C++"),
}
HEAD = ["| bug | file | caught by | seconds |", "| --- | --- | --- | ---: |"]
INTRODUCTION = (
    "Each was planted alone, in a copy of the kernels, and the tests of {1} ran on that copy {2}; the test named here "
    "is the first that failed. To get this file again, after a change of the kernels or of the bugs: "
    "`python ci/mutate_kernels.py --package {3} --write`."
)


@dataclass(frozen=True)
class Outcome:
    """The result of a mutation: ``caught_by``: a test, or None; ``how``: the failure."""

    caught_by: str | None
    how: str
    seconds: float


def place_of(mutation: Mutation) -> Path:
    """Return the file of a mutation, relative to the folder of the packages."""
    return Path("fusemlp_kernels", mutation.package, mutation.file)


def mutated(mutation: Mutation, kernels: Path = ROOT / "kernels") -> str:
    """Return the text of the file with the bug in it.

    Raises ValueError unless the old text occurs exactly once and the new one differs.
    """
    text = (kernels / place_of(mutation)).read_text(encoding="utf-8")
    count = text.count(mutation.old)
    if count != 1:
        raise ValueError(
            f"{mutation.name!r}: expected its old text once in {place_of(mutation)}, found it {count} times; "
            f"mend the entry in {KINDS[mutation.package][1]}: {mutation.old!r}"
        )
    if mutation.old == mutation.new:
        raise ValueError(f"{mutation.name!r}: the new text is the old one")
    return text.replace(mutation.old, mutation.new)


def node_ids(mutations: list[Mutation]) -> list[str]:
    """Return the tests of these mutations, each once, in order."""
    return [f"tests/kernels/{test}" for test in dict.fromkeys(t for m in mutations for t in m.tests)]


def run_tests(folder: Path, tests: list[str], package: str) -> tuple[int, str, dict[str, str] | None]:
    """Run tests on the kernels in ``folder``; return the exit status, the output and the first failure."""
    failure = folder / "failure.json"
    environment = {
        **{name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")},
        "PYTHONPATH": os.pathsep.join(map(str, (folder, ROOT / "engine", ROOT / "ci"))),
        "PYTHONDONTWRITEBYTECODE": "1",
        "TRITON_INTERPRET": "1",
        "OMP_NUM_THREADS": "1",
        "OPENBLAS_NUM_THREADS": "1",
        "MKL_NUM_THREADS": "1",
        KERNELS: str(folder),
        FAILURE: str(failure),
    }
    command = [sys.executable, "-m", "pytest", "-p", "mutation_plugin", "-p", "no:cacheprovider", "-p", "no:xdist"]
    command += ["-x", "-q", "-k", PLACES[package], *tests]
    try:
        done = subprocess.run(
            command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            timeout=TIMEOUT,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return -signal.SIGALRM, "", None
    found = json.loads(failure.read_text(encoding="utf-8")) if failure.exists() else None
    return done.returncode, done.stdout, found


def copied(folder: Path) -> Path:
    """Copy the kernels into the folder and return it."""
    ignored = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "kernels/fusemlp_kernels", folder / "fusemlp_kernels", ignore=ignored)
    return folder


def try_mutation(mutation: Mutation) -> Outcome:
    """Plant the bug in a copy and run its tests."""
    start = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="fusemlp-mutation-") as name:
        folder = copied(Path(name))
        (folder / place_of(mutation)).write_text(mutated(mutation), encoding="utf-8")
        status, printed, failure = run_tests(folder, node_ids([mutation]), mutation.package)
    seconds = time.perf_counter() - start
    if status < 0:
        how = "never ends" if status == -signal.SIGALRM else f"crashes ({signal.Signals(-status).name})"
        return Outcome(mutation.tests[0], how, seconds)
    if status == 0:
        return Outcome(None, "SURVIVED", seconds)
    if status != 1 or failure is None:
        raise RuntimeError(f"{mutation.name!r}: pytest ended with status {status}:\n{printed}")
    if failure["error"] not in ASSERTIONS:
        return Outcome(None, f"BAD MUTATION: {failure['error']}: {failure['message']}", seconds)
    return Outcome(failure["test"].removeprefix("tests/kernels/"), failure["message"], seconds)


def failing_unmutated(mutations: list[Mutation], processes: int) -> str:
    """Return the output of the tests that fail on the unchanged kernels, empty if all pass."""
    files: dict[tuple[str, str], list[str]] = {}
    for package in TABLES:
        for test in node_ids([mutation for mutation in mutations if mutation.package == package]):
            files.setdefault((package, test.partition("::")[0]), []).append(test)

    def failed(part: tuple[tuple[str, str], list[str]]) -> str:
        (package, _), tests = part
        with tempfile.TemporaryDirectory(prefix="fusemlp-mutation-") as name:
            status, printed, _ = run_tests(copied(Path(name)), tests, package)
        return printed if status else ""

    with ThreadPoolExecutor(processes) as pool:
        return "".join(pool.map(failed, files.items()))


def row(mutation: Mutation, outcome: Outcome) -> str:
    """Return a line of the table."""
    seen = f"`{outcome.caught_by}`" if outcome.caught_by else outcome.how
    if outcome.caught_by and not outcome.caught_by.endswith("]"):
        seen += f", {outcome.how}"
    return f"| {mutation.name} | {mutation.file} | {seen} | {outcome.seconds:.0f} |"


def chosen(names: list[str] | None, package: str | None = None) -> list[Mutation]:
    """Return a package's mutations with these names, or all."""
    among = [mutation for mutation in MUTATIONS if package in (None, mutation.package)]
    unknown = set(names or ()) - {mutation.name for mutation in among}
    if unknown:
        raise ValueError(f"--only: no such mutation: {', '.join(sorted(unknown))}; --list shows them")
    return [mutation for mutation in among if names is None or mutation.name in names]


def table(package: str, rows: list[str], caught: int) -> str:
    """Return the report on a package's bugs."""
    told = textwrap.fill(INTRODUCTION.format(*KINDS[package], package), 120, break_on_hyphens=False)
    title = f"# Bugs planted in {KINDS[package][0]}"
    lines = [title, "", told, "", *HEAD, *rows, "", f"{len(rows)} planted, {caught} caught."]
    return "\n".join(lines) + "\n"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--list", action="store_true", help="print the mutations and their tests, and end")
    parser.add_argument("--package", choices=TABLES, help="only the bugs of one package")
    parser.add_argument("--only", action="append", metavar="NAME", help="only this bug; may be repeated")
    parser.add_argument("--processes", type=int, default=2, metavar="N", help="tests at the same time (default 2)")
    parser.add_argument("--unchecked", action="store_true", help="skip the tests on the unchanged kernels")
    parser.add_argument("--write", action="store_true", help="write the tables in ci")
    options = parser.parse_args(arguments)
    if options.write and options.only:
        parser.error("--write: the table has all mutations; leave out --only")
    try:
        mutations = chosen(options.only, options.package)
        for mutation in mutations:
            mutated(mutation)
    except ValueError as error:
        parser.exit(2, f"{parser.prog}: {error}\n")
    if options.list:
        for mutation in mutations:
            print(f"{mutation.package}/{mutation.file}: {mutation.name}: {', '.join(mutation.tests)}")
        return 0
    start = time.perf_counter()
    if not options.unchecked and (failures := failing_unmutated(mutations, options.processes)):
        parser.exit(2, f"{failures}{parser.prog}: these tests fail on the unchanged kernels\n")
    print("\n".join(HEAD), flush=True)
    outcomes, rows = [], []
    try:
        with ThreadPoolExecutor(options.processes) as pool:
            for mutation, outcome in zip(mutations, pool.map(try_mutation, mutations), strict=True):
                outcomes.append(outcome)
                rows.append(row(mutation, outcome))
                print(rows[-1], flush=True)
    except RuntimeError as error:
        parser.exit(2, f"{parser.prog}: {error}\n")
    caught = sum(outcome.caught_by is not None for outcome in outcomes)
    print(f"\n{len(mutations)} planted, {caught} caught. {time.perf_counter() - start:.0f} s")
    if options.write:
        for package, path in TABLES.items():
            own = [i for i, mutation in enumerate(mutations) if mutation.package == package]
            if own:
                seen = sum(outcomes[i].caught_by is not None for i in own)
                path.write_text(table(package, [rows[i] for i in own], seen), encoding="utf-8")
    return int(caught < len(mutations))


if __name__ == "__main__":
    sys.exit(main())
