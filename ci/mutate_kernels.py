"""Plants bugs in the Triton kernels, one at a time, and shows that the tests catch each.

Each bug of ci/mutations.py is planted in a copy of the kernels, in a temporary folder; the tests named beside it run on
that copy under Triton's interpreter, until one fails. A bug is caught if a test fails by an assertion, or the process
crashes; one that only makes the kernels raise an error of another kind is a bad mutation, and reported as such. First
the tests are run on a copy as it is, where all must pass. The exit status is 1 if a bug survives, 2 if the tests fail
without one or an entry does not fit the kernels any more.
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
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from mutation_plugin import FAILURE, KERNELS
from mutations import MUTATIONS, Mutation

ROOT = Path(__file__).resolve().parents[1]
TABLE = ROOT / "ci/mutations.md"
TRITON = Path("fusemlp_kernels/triton")
# A loop that never ends is a bug that is seen, too.
TIMEOUT = 900
INTRODUCTION = f"""\
# Bugs planted in the Triton kernels

Each was planted alone, in a copy of the kernels, and the tests of ci/mutations.py ran on that copy under Triton's
interpreter; the test named here is the first that failed. To get this file again, after a change of the kernels or of
the bugs: `python ci/{Path(__file__).name} --write`.

"""


@dataclass(frozen=True)
class Outcome:
    """What the tests made of a mutation: ``caught_by`` a test, or None; ``how`` says what was seen."""

    caught_by: str | None
    how: str
    seconds: float


def mutated(mutation: Mutation, kernels: Path = ROOT / "kernels") -> str:
    """The text of the file with the bug in it.

    Raises ValueError where the old text does not occur exactly once, or the new one changes nothing.
    """
    text = (kernels / TRITON / mutation.file).read_text(encoding="utf-8")
    count = text.count(mutation.old)
    if count != 1:
        raise ValueError(
            f"{mutation.name!r}: expected its old text once in {TRITON / mutation.file}, found it {count} times; "
            f"mend the entry in ci/mutations.py: {mutation.old!r}"
        )
    if mutation.old == mutation.new:
        raise ValueError(f"{mutation.name!r}: the new text is the old one")
    return text.replace(mutation.old, mutation.new)


def node_ids(mutations: list[Mutation]) -> list[str]:
    """The tests of these mutations, each once, in order."""
    return [f"tests/kernels/{test}" for test in dict.fromkeys(t for m in mutations for t in m.tests)]


def run_tests(folder: Path, tests: list[str]) -> tuple[int, str, dict[str, str] | None]:
    """Run tests on the kernels in ``folder``: the exit status, what was printed, and the first failure."""
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
    command += ["-x", "-q", "-k", "interpreted", *tests]
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
    """The folder, with a copy of the kernels in it."""
    ignored = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "kernels/fusemlp_kernels", folder / "fusemlp_kernels", ignore=ignored)
    return folder


def try_mutation(mutation: Mutation) -> Outcome:
    """Plant the bug in a copy and run its tests."""
    start = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="fusemlp-mutation-") as name:
        folder = copied(Path(name))
        (folder / TRITON / mutation.file).write_text(mutated(mutation), encoding="utf-8")
        status, printed, failure = run_tests(folder, node_ids([mutation]))
    seconds = time.perf_counter() - start
    if status < 0:
        how = "never ends" if status == -signal.SIGALRM else f"crashes ({signal.Signals(-status).name})"
        return Outcome(mutation.tests[0], how, seconds)
    if status == 0:
        return Outcome(None, "SURVIVED", seconds)
    if status != 1 or failure is None:
        raise RuntimeError(f"{mutation.name!r}: pytest ended with status {status}:\n{printed}")
    if failure["error"] != "AssertionError":
        return Outcome(None, f"BAD MUTATION: {failure['error']}: {failure['message']}", seconds)
    return Outcome(failure["test"].removeprefix("tests/kernels/"), failure["message"], seconds)


def failing_unmutated(mutations: list[Mutation], processes: int) -> str:
    """What is printed by the tests that fail on the kernels as they are; nothing, where all pass."""
    files: dict[str, list[str]] = {}
    for test in node_ids(mutations):
        files.setdefault(test.partition("::")[0], []).append(test)

    def failed(tests: list[str]) -> str:
        with tempfile.TemporaryDirectory(prefix="fusemlp-mutation-") as name:
            status, printed, _ = run_tests(copied(Path(name)), tests)
        return printed if status else ""

    with ThreadPoolExecutor(processes) as pool:
        return "".join(pool.map(failed, files.values()))


def row(mutation: Mutation, outcome: Outcome) -> str:
    """A line of the table."""
    seen = f"`{outcome.caught_by}`" if outcome.caught_by else outcome.how
    if outcome.caught_by and not outcome.caught_by.endswith("]"):
        seen += f", {outcome.how}"
    return f"| {mutation.name} | {mutation.file} | {seen} | {outcome.seconds:.0f} |"


def chosen(names: list[str] | None) -> list[Mutation]:
    """The mutations of those names, all where none are given."""
    unknown = set(names or ()) - {mutation.name for mutation in MUTATIONS}
    if unknown:
        raise ValueError(f"--only: no such mutation: {', '.join(sorted(unknown))}; --list shows them")
    return [mutation for mutation in MUTATIONS if names is None or mutation.name in names]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--list", action="store_true", help="print the mutations and their tests, and end")
    parser.add_argument("--only", action="append", metavar="NAME", help="try this one alone; may be repeated")
    parser.add_argument("--processes", type=int, default=2, metavar="N", help="tests at the same time (default 2)")
    parser.add_argument("--unchecked", action="store_true", help="do not run the tests on the kernels as they are")
    parser.add_argument("--write", action="store_true", help=f"write the table to {TABLE.relative_to(ROOT)}")
    options = parser.parse_args(arguments)
    if options.write and options.only:
        parser.error("--write: the table has all mutations; leave out --only")
    try:
        mutations = chosen(options.only)
        for mutation in mutations:
            mutated(mutation)
    except ValueError as error:
        parser.exit(2, f"{parser.prog}: {error}\n")
    if options.list:
        for mutation in mutations:
            print(f"{mutation.file}: {mutation.name}: {', '.join(mutation.tests)}")
        return 0
    start = time.perf_counter()
    if not options.unchecked and (failures := failing_unmutated(mutations, options.processes)):
        parser.exit(2, f"{failures}{parser.prog}: these tests fail on the kernels as they are\n")
    lines = ["| bug | file | caught by | seconds |", "| --- | --- | --- | ---: |"]
    print("\n".join(lines), flush=True)
    outcomes = []
    try:
        with ThreadPoolExecutor(options.processes) as pool:
            for mutation, outcome in zip(mutations, pool.map(try_mutation, mutations), strict=True):
                outcomes.append(outcome)
                lines.append(row(mutation, outcome))
                print(lines[-1], flush=True)
    except RuntimeError as error:
        parser.exit(2, f"{parser.prog}: {error}\n")
    caught = sum(outcome.caught_by is not None for outcome in outcomes)
    lines += ["", f"{len(mutations)} planted, {caught} caught."]
    print("\n".join(lines[-2:]), f"{time.perf_counter() - start:.0f} s")
    if options.write:
        TABLE.write_text(INTRODUCTION + "\n".join(lines) + "\n", encoding="utf-8")
    return int(caught < len(mutations))


if __name__ == "__main__":
    sys.exit(main())
