"""Plant the bugs of ci/mutations.txt in the kernels, one at a time, and report the test that catches each.

A bug goes into a copy of the kernels in a temporary folder. Its tests run on that copy until one fails. A bug is caught
if a test fails by an assertion or a broken rule of CUDA, if the process crashes, or if it never ends. A bug that only
raises another error is reported as a bad mutation. First the tests run on an unchanged copy, and all must pass. The
exit status is 1 if a bug survives, 2 if the tests fail without one or an entry does not fit the kernels.
"""

import argparse
import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from hypothesis import Phase, settings

ROOT = Path(__file__).resolve().parents[1]
TABLE = ROOT / "ci/mutations.txt"
BUG = re.compile(r"^\* (.*): (test_.*)\n((?:-.*\n)+)((?:\+.*\n)*)", re.MULTILINE)
# For each package a part of its tests' names.
PLACES = {"triton": "interpreted", "cupy": "host", "numpy": "numpy"}
# The errors that count as a caught bug: the stand-in for CuPy and its fibers have their own assertions.
ASSERTIONS = ("AssertionError", "KernelFault", "Misuse")
TIMEOUT = 900
# Environment variables of the tests: the folder that the kernels must come from, and the file for the first failure.
KERNELS, FAILURE = "MUTATED_KERNELS", "MUTATION_FAILURE"


def pytest_configure(config):
    """As a plugin of pytest: check that the copy is tested; one failure is enough, so Hypothesis need not shrink it."""
    settings.register_profile("first failure", phases=(Phase.explicit, Phase.generate), report_multiple_bugs=False)
    settings.load_profile("first failure")
    origin = importlib.util.find_spec("fusemlp_kernels").origin
    assert Path(origin).resolve().is_relative_to(Path(os.environ[KERNELS]).resolve()), f"not the copy: {origin}"


def pytest_exception_interact(node, call):
    message = str(call.excinfo.value).strip().partition("\n")[0]
    failure = {"test": node.nodeid, "error": call.excinfo.typename, "message": message}
    Path(os.environ[FAILURE]).write_text(json.dumps(failure), encoding="utf-8")


@dataclass(frozen=True)
class Mutation:
    """One bug: ``old``, which occurs once in ``file`` of ``package``, becomes ``new``; its tests must see it."""

    package: str
    file: str
    name: str
    tests: tuple[str, ...]
    old: str
    new: str

    def text(self):
        """Return the text of the file with the bug in it. Raises ValueError unless it fits."""
        text = (ROOT / "kernels/fusemlp_kernels" / self.package / self.file).read_text(encoding="utf-8")
        if (count := text.count(self.old)) != 1 or self.old == self.new:
            raise ValueError(
                f"{self.name!r}: expected another text for one that occurs once in {self.package}/{self.file}, found "
                f"it {count} times; mend the entry in {TABLE.name}: {self.old!r}"
            )
        return text.replace(self.old, self.new)


def mutations(names=None, package=None):
    """Return the bugs of the table, or those of a package and with these names."""
    known = []
    for part in TABLE.read_text(encoding="utf-8").split("\n= ")[1:]:
        place, _, bugs = part.partition("\n")
        for name, tests, *texts in BUG.findall(bugs + "\n"):
            old, new = ("\n".join(line[1:] for line in text.splitlines()) for text in texts)
            known.append(Mutation(*place.split("/", 1), name, tuple(tests.split()), old, new))
    known = [bug for bug in known if package in (None, bug.package)]
    if unknown := set(names or ()) - {bug.name for bug in known}:
        raise ValueError(f"--only: no such mutation: {', '.join(sorted(unknown))}; --list shows them")
    return [bug for bug in known if names is None or bug.name in names]


def tested(package, tests, mutation=None):
    """Run tests on a copy of the kernels, with a bug; return the exit status, the output and the first failure."""
    with tempfile.TemporaryDirectory(prefix="fusemlp-mutation-") as name:
        folder, failure = Path(name), Path(name, "failure.json")
        ignored = shutil.ignore_patterns("__pycache__")
        copy = shutil.copytree(ROOT / "kernels/fusemlp_kernels", folder / "fusemlp_kernels", ignore=ignored)
        if mutation is not None:
            (copy / package / mutation.file).write_text(mutation.text(), encoding="utf-8")
        environment = {
            **{name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")},
            "PYTHONPATH": os.pathsep.join(map(str, (folder, ROOT / "engine", ROOT / "ci"))),
            **{f"{library}_NUM_THREADS": "1" for library in ("OMP", "OPENBLAS", "MKL")},
            **{"PYTHONDONTWRITEBYTECODE": "1", "TRITON_INTERPRET": "1", KERNELS: name, FAILURE: str(failure)},
        }
        command = [sys.executable, "-m", "pytest", "-p", "mutate_kernels", "-p", "no:cacheprovider", "-p", "no:xdist"]
        command += ["-x", "-q", "-k", PLACES[package], *(f"tests/kernels/{test}" for test in dict.fromkeys(tests))]
        try:
            done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=TIMEOUT)
        except subprocess.TimeoutExpired:
            return -signal.SIGALRM, "", None
        said = done.stdout + done.stderr
        return done.returncode, said, json.loads(failure.read_text("utf-8")) if failure.exists() else None


def outcome(mutation):
    """Plant a bug; return the test that catches it, or None, and how."""
    status, printed, failure = tested(mutation.package, mutation.tests, mutation)
    if status < 0:
        how = "never ends" if status == -signal.SIGALRM else f"crashes ({signal.Signals(-status).name})"
        return mutation.tests[0], how
    if status == 0:
        return None, "SURVIVED"
    if status != 1 or failure is None:
        raise RuntimeError(f"{mutation.name!r}: pytest ended with status {status}:\n{printed}")
    if failure["error"] not in ASSERTIONS:
        return None, f"BAD MUTATION: {failure['error']}: {failure['message']}"
    return failure["test"].removeprefix("tests/kernels/"), failure["message"]


def failing_unmutated(chosen, pool):
    """Return the output of the tests that fail on the unchanged kernels, empty if all pass."""
    files = {}
    for mutation in chosen:
        for test in mutation.tests:
            files.setdefault((mutation.package, test.partition("::")[0]), []).append(test)
    results = pool.map(lambda item: tested(item[0][0], item[1]), files.items())
    return "".join(printed for status, printed, _ in results if status)


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--list", action="store_true", help="print the bugs and their tests, and end")
    parser.add_argument("--package", choices=PLACES, help="only the bugs of one package")
    parser.add_argument("--only", action="append", metavar="NAME", help="only this bug; may be repeated")
    parser.add_argument("--processes", type=int, default=2, metavar="N", help="tests at the same time (default 2)")
    parser.add_argument("--unchecked", action="store_true", help="skip the tests on the unchanged kernels")
    options = parser.parse_args(arguments)
    try:
        chosen = mutations(options.only, options.package)
        for mutation in chosen:
            mutation.text()
    except ValueError as error:
        parser.exit(2, f"{parser.prog}: {error}\n")
    if options.list:
        for mutation in chosen:
            print(f"{mutation.package}/{mutation.file}: {mutation.name}: {', '.join(mutation.tests)}")
        return 0
    start, caught = time.perf_counter(), 0
    with ThreadPoolExecutor(options.processes) as pool:
        if not options.unchecked and (failures := failing_unmutated(chosen, pool)):
            parser.exit(2, f"{failures}{parser.prog}: these tests fail on the unchanged kernels\n")
        for mutation, (test, how) in zip(chosen, pool.map(outcome, chosen), strict=True):
            caught += test is not None
            print(f"{mutation.package}/{mutation.file}: {mutation.name}: {test or how}", flush=True)
    print(f"{len(chosen)} planted, {caught} caught. {time.perf_counter() - start:.0f} s")
    return int(caught < len(chosen))


if __name__ == "__main__":
    sys.exit(main())
