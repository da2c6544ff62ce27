"""Prove, tune and measure on a card in one command: ``ci/gpu``, from a checkout, without an installation.

The stages run in order of worth. Each ends in time, and the same command continues where it ended: results are written
after every item, and what has passed does not run again; results of another commit are set aside. A failed item does
not end a stage.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from gpu_items import (
    FAILED,
    LEAST_SECONDS,
    PASSED,
    ROOT,
    UNFINISHED,
    Item,
    Run,
    all_of,
    append,
    execute,
    lines_of,
    now,
    python,
    side_by_side,
    unsettled,
)

STAGES = {
    "smoke": "the quickstart, a training by every plan and backend beside the oracle, repeated bits (3 minutes)",
    "proofs": "pytest -m gpu, in slices and side by side",
    "tune": "the tiles of the Triton kernels, the most used ones first",
    "bench": "the table's rows, fleets, kernels and rooflines",
    "profile": "a trace of every plan, and the time in kernels and in Python",
}
TESTS_A_SLICE = 40
FOR_CARDS = ("tests/kernels/test_cards.py", "tests/kernels/test_gpu.py")
LONG = "compute_sanitizer"
# A slice whose process was lost this often is given up.
MOST_LOSSES = 5
# A test that has run for this many seconds when its process is stopped has failed.
HUNG_SECONDS = 200.0
PRECISIONS = ("fp32", "tf32", "bf16", "fp16")
STATUSES = (PASSED, FAILED, UNFINISHED)
CHECKS = "ci/gpu_checks.py"
# Files that ``tune`` and ``bench readme`` write into the checkout.
WRITTEN = ("kernels/fusemlp_kernels/triton/tiles.json", "*.md")
EXAMPLES = """\
examples:
  ci/gpu                                 all stages, into build/gpu
  ci/gpu smoke proofs --minutes 9        two stages, each within nine minutes
  ci/gpu --rehearse                      every stage on a CPU at tiny sizes: imports, arguments and files
  python -m bench readme --gpu build/gpu the figures into the pages, with the card's name
"""


def plans(run: Run) -> Iterator[tuple[str, str, str]]:
    """Yield backend, plan and precision of the trainings; the interpreter and the stand-in have no graphs."""
    if run.rehearse:
        yield from (("triton", "eager", "fp32"), ("triton", "resident", "fp32"), ("cupy", "eager", "fp32"))
        return
    for precision in PRECISIONS:
        yield "triton", "graph", precision
        if precision != "fp16":
            yield "triton", "resident", precision
    yield from (("triton", "eager", "fp32"), ("cupy", "eager", "fp32"), ("cupy", "graph", "fp32"))


def smoke(run: Run) -> None:
    backend = ("--backend", "triton", "--epochs", "1", "--batch-size", "512") if run.rehearse else ()
    folder = run.out / "quickstart"
    items = [Item("smoke", "machine", python(CHECKS, "machine"), 60)]
    items.append(
        Item("smoke", "quickstart", python("-m", "fusemlp", "train", "digits", *backend, "--out", str(folder)), 120)
    )
    items += [Item("smoke", f"fit {' '.join(each)}", python(CHECKS, "fit", *each), 150) for each in plans(run)]
    items.append(Item("smoke", "fuse", python(CHECKS, "fuse"), 120))
    if any(item.name == "quickstart" for item in unsettled(run, items)):
        # a run folder must be new
        shutil.rmtree(folder, ignore_errors=True)
    all_of(run, items, min(run.jobs, 4))


def proofs(run: Run) -> None:
    """Collect the tests of a card once, and run those without a result in slices, each in a process of its own."""
    listed, results = run.out / "collected.txt", run.out / "proofs.jsonl"
    options = ("-m", "pytest", "-m", "gpu", "-p", "no:cacheprovider", "--continue-on-collection-errors")
    where = FOR_CARDS if run.rehearse else ()
    if run.rehearse:
        # Triton 3.6's interpreter warns of NumPy's conversions.
        options += ("-W", "ignore:Conversion of an array:DeprecationWarning")
    collect = Item("proofs", "collect", python(*options, "-q", "--collect-only", *where), 240)
    if unsettled(run, [collect]) or not listed.is_file():
        ended, log, seconds = execute(run, collect)
        said = log.read_text(encoding="utf-8")
        tests = [line for line in said.splitlines() if line.startswith("tests/") and "::" in line]
        listed.write_text("\n".join(tests) + "\n", encoding="utf-8")
        # a file that cannot be imported fails, and the tests of the others run
        status = PASSED if ended == 0 and tests else UNFINISHED if ended is None else FAILED
        more = {"message": said} if status == FAILED else {}
        run.note(collect, status, seconds=seconds, log=str(log), figures={"tests": len(tests)}, **more)
    tests = listed.read_text(encoding="utf-8").splitlines()
    slices: list[list[str]] = []
    done = {test for test, line in settled_tests(results).items() if line["outcome"] != "failed"}
    for test in sorted((test for test in tests if test not in done), key=by_worth):
        fits = slices and len(slices[-1]) < TESTS_A_SLICE and slices[-1][0].split("::")[0] == test.split("::")[0]
        slices[-1].append(test) if fits and LONG not in test else slices.append([test])
    side_by_side(run, run.jobs, lambda numbered: prove(run, results, options, *numbered), enumerate(slices))
    found = [line["outcome"] for line in settled_tests(results).values()]
    counts = {outcome: found.count(outcome) for outcome in ("passed", "failed", "skipped")}
    left = len(tests) - len(found)
    status = FAILED if counts["failed"] or not (counts["passed"] or left) else UNFINISHED if left else PASSED
    more = {"message": f"{counts['failed']} failed, {counts['passed']} passed"} if status == FAILED else {}
    run.note(Item("proofs", "tests", ()), status, log=str(results), figures={**counts, "left": left}, **more)


def by_worth(test: str) -> tuple[bool, bool, str]:
    """Return a key that puts the tests written for a card first, and those that take minutes last."""
    return LONG in test, not test.startswith(FOR_CARDS), test


def settled_tests(results: Path) -> dict[str, dict[str, Any]]:
    """Return the result of each test in its last run; a failed set-up or clean-up counts."""
    found: dict[str, dict[str, Any]] = {}
    for line in lines_of(results):
        before = found.get(line["test"], {})
        if before.get("outcome") != "failed" or before["began"] != line["began"]:
            found[line["test"]] = line
    return found


def prove(run: Run, results: Path, options: Sequence[str], number: int, tests: list[str]) -> None:
    """Run a slice of tests. The tests after one that ended the process run again without it."""
    stem = Path(tests[0].split("::")[0]).stem
    listed, lines = run.out / f"slice-{number}.txt", run.out / f"slice-{number}.jsonl"
    for again in range(MOST_LOSSES):
        if not tests or run.left() < LEAST_SECONDS:
            return
        listed.write_text("\n".join(tests), encoding="utf-8")
        lines.unlink(missing_ok=True)
        item = Item(
            "proofs", f"slice {number}.{again} {stem}", python(*options, "-q", "-p", "gpu_plugin", f"@{listed}")
        )
        status, log, _ = execute(run, item, GPU_RESULTS=str(lines))
        noted = lines_of(lines)
        ended = [line for line in noted if line["outcome"] != "started"]
        done = {line["test"] for line in ended}
        for line in [line for line in noted if line["test"] not in done][-1:]:
            # The last test that began ended the process, unless the time was over.
            took, reason = time.time() - line["at"], f"the process ended with {status}"
            if status is None and took > HUNG_SECONDS and LONG not in line["test"]:
                reason = f"it was stopped after {took:.0f} s"
            elif status is None:
                continue
            ended.append({"test": line["test"], "outcome": "failed", "message": f"{reason}; {log}"})
        for line in ended:
            append(results, {**line, "commit": run.commit, "began": run.began})
        tests = [test for test in tests if test not in {line["test"] for line in ended}]
        if not ended:
            return


def tune(run: Run) -> None:
    out = str(run.out / "tune.jsonl")
    if run.rehearse:
        small = ("--rehearse", "--precision", "fp32", "--entries", "1", "--candidates", "2", "--rounds", "1")
        all_of(run, [Item("tune", product, python("-m", "bench", "tune", "--product", product, *small, "--out", out))
                     for product in ("forward", "weight")], run.jobs)  # fmt: skip
        return
    # An entry that has begun ends late by its measurements.
    minutes = f"{max(run.left() / 60 - 1.5, 0.5):.2f}"
    all_of(run, [Item("tune", "tiles", python("-m", "bench", "tune", "--minutes", minutes, "--out", out))])


def bench(run: Run) -> None:
    from bench.peers import PEERS
    from bench.roofline import NETWORKS

    def study(name: str, precision: str, *arguments: str) -> Item:
        """A file has one backend and precision, as its table does."""
        backend = "cupy-" if "cupy" in arguments else ""
        command = ("-m", "bench", name, *arguments, "--precision", precision)
        out = str(run.out / f"{name}-{backend}{precision}.jsonl")
        return Item("bench", " ".join((name, *arguments, precision)), python(*command, "--out", out))

    table = ("-m", "bench", "--no-plots", "--resume", "--out", str(run.out / "table.jsonl"))
    if run.rehearse:
        row = ("--device", "cpu", "--case", "64-32-10@32:adam", "--peer", "torch_eager", "--repeats", "1", "--quick")
        tiny = ("--backend", "triton", "--rounds", "1")
        items = [Item("bench", "table", python(*table, *row)), study("kernels", "fp32", *tiny, "--shape", "8-16-8")]
        all_of(run, [*items, study("roofline", "fp32", "12-8-4@8", *tiny)], run.jobs)
        all_of(run, expected(run))
        return
    # the contenders that compute on the card
    peers = ",".join(name for name, peer in PEERS.items() if not peer.host)
    every = ("--device", "gpu", "--peer", peers, "--repeats", "7", "--minutes", f"{max(run.left() / 60 - 2, 0.5):.2f}")
    items = [Item("bench", "table", python(*table, *every))]
    items += [study("kernels", precision) for precision in PRECISIONS[:3]]
    items.append(study("kernels", "fp32", "--backend", "cupy"))
    items += [study("roofline", precision, network) for network in NETWORKS["gpu"] for precision in ("fp32", "bf16")]
    all_of(run, items)
    all_of(run, expected(run))


def expected(run: Run) -> list[Item]:
    """Return the item that sets the times of the model beside the rooflines that were measured."""
    files = sorted(str(path) for path in run.out.glob("roofline-*.jsonl"))
    # the model reads compiled kernels
    command = ("env", "-u", "TRITON_INTERPRET", *python("ci/kernel_model.py", "--beside", *files))
    return [Item("bench", "the model beside the rooflines", command)] if files else []


def profile(run: Run) -> None:
    folder = run.out / "traces"
    folder.mkdir(exist_ok=True)
    kept = list(dict.fromkeys((backend, plan) for backend, plan, _ in plans(run)))
    items = [Item("profile", " ".join(each), python(CHECKS, "profile", *each, str(folder))) for each in kept]
    all_of(run, items, run.jobs if run.rehearse else 1)


def summary(run: Run, stages: Sequence[str]) -> tuple[str, bool]:
    """Return the summary of the latest results in Markdown, and whether nothing has failed."""
    latest = {(line["stage"], line["item"]): line for line in lines_of(run.results) if line["stage"] in stages}
    own = {status: [line for line in latest.values() if line["status"] == status] for status in STATUSES}
    failed = own[FAILED]
    parts = ["# ci/gpu" + (": a rehearsal on a CPU, no figure counts" if run.rehearse else ""), ""]
    for stage in stages:
        counts = (f"{sum(line['stage'] == stage for line in own[status])} {status}" for status in STATUSES)
        parts.append(f"- {stage}: {', '.join(counts)}")
    if own[UNFINISHED]:
        parts += ["", "The time was over: the same command continues."]
    if failed:
        parts += ["", f"Look first at {failed[0]['stage']}: {failed[0]['item']}, {failed[0]['log']}"]
    for line in failed:
        parts += ["", f"## failed: {line['stage']}: {line['item']}", "", "```", line.get("message", "")[-800:], "```"]
    tests = settled_tests(run.out / "proofs.jsonl").values() if "proofs" in stages else ()
    lost = [line for line in tests if line["outcome"] == "failed"]
    parts += [f"\nfailed test: {line['test']}: {line['message'][-300:]}" for line in lost[:20]]
    parts += ["", "## figures", ""]
    for line in latest.values():
        if "figures" in line and line["item"] != "machine":
            parts.append(f"- {line['stage']}: {line['item']}: {json.dumps(line['figures'])}")
    for line in lines_of(run.out / "tune.jsonl"):
        parts.append(f"- tuned: {line['place']}: {line['present']} -> {line['best']}, {line['share']:.2f} of the time")
    return "\n".join(parts) + "\n", not failed


def version() -> str:
    """Return the commit of the checkout, with a digest of what differs from it but for what a run itself changes."""
    from bench.hardware import commit

    name = (commit() or "unknown").removesuffix("+")
    command = ("git", "diff", "HEAD", "--", ".", *(f":!{path}" for path in WRITTEN))
    changes = subprocess.run(command, cwd=ROOT, capture_output=True, check=name != "unknown").stdout
    return name + ("+" + hashlib.sha256(changes).hexdigest()[:8] if changes else "")


def set_aside(out: Path, commit: str, *, rehearse: bool) -> None:
    """Rename a folder whose results are of another commit, or of a rehearsal if this is none."""
    for line in lines_of(out / "results.jsonl")[-1:]:
        if (line["commit"], line["rehearsed"]) != (commit, rehearse):
            kind = "-rehearsal" if line["rehearsed"] else ""
            aside = tempfile.mkdtemp(prefix=f"{out.name}-{line['commit']}{kind}-", dir=out.parent)
            out.rename(aside)
            print(f"ci/gpu: {out} had results of {line['commit']}{kind}, and this is {commit}: they are in {aside}")


def started(options: argparse.Namespace) -> Run:
    """Return the run of the options, with the environment of its processes."""
    new = tempfile.mkdtemp(prefix="gpu-rehearsal-") if options.rehearse and options.out is None else None
    out, commit = Path(new or options.out or ROOT / "build" / "gpu").resolve(), version()
    set_aside(out, commit, rehearse=options.rehearse)
    out.mkdir(parents=True, exist_ok=True)
    jobs = options.jobs or min(len(os.sched_getaffinity(0)), 8)
    run = Run(out, options.rehearse, options.minutes, jobs, commit, now())
    paths = [*os.environ.get("PYTHONPATH", "").split(os.pathsep), str(ROOT / "ci"), str(ROOT)]
    run.environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    run.environment.setdefault("TRITON_CACHE_DIR", str(ROOT / "build" / "triton"))
    if options.rehearse:
        run.environment |= {"TRITON_INTERPRET": "1", "FUSEMLP_REHEARSE": "1"}
        # The processes share the cores.
        run.environment |= dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
    return run


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the stages; return 1 if an item failed, 2 if there is no card, 130 after Ctrl-C."""
    made = argparse.ArgumentParser(
        prog="ci/gpu", description=(__doc__ or "").split("\n")[0], epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    listed = "; ".join(f"{name}: {text}" for name, text in STAGES.items())
    made.add_argument("stages", nargs="*", metavar="STAGE", help=f"default: all. {listed}")
    made.add_argument("--minutes", type=float, default=9.5, help="the limit of a stage (default: %(default)g)")
    made.add_argument(
        "--out",
        type=Path,
        metavar="DIR",
        help="the folder of all results (default: build/gpu; of a rehearsal a temporary one)",
    )
    made.add_argument("--jobs", type=int, help="processes side by side (default: the cores, at most 8)")
    made.add_argument("--rehearse", action="store_true", help="run every stage on a CPU, at tiny sizes")
    options = made.parse_args(arguments)
    for name in options.stages:
        if name not in STAGES:
            made.error(f"STAGE: expected some of {', '.join(STAGES)}, got {name!r}")
    if not 1 <= options.minutes < math.inf:
        made.error(f"argument --minutes: expected a number from 1 on, got {options.minutes:g}")
    if options.jobs is not None and options.jobs < 1:
        made.error(f"argument --jobs: expected an integer from 1 on, got {options.jobs}")
    sys.path.insert(0, str(ROOT))
    from bench.hardware import card

    if not options.rehearse and card() is None:
        print("ci/gpu: no card was found (nvidia-smi, /dev/kfd); --rehearse runs the stages on a CPU", file=sys.stderr)
        return 2
    run = started(options)
    stages = options.stages or list(STAGES)
    work: dict[str, Callable[[Run], None]] = {
        "smoke": smoke, "proofs": proofs, "tune": tune, "bench": bench, "profile": profile,
    }  # fmt: skip
    # as Ctrl-C
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    interrupted = False
    try:
        for stage in stages:
            run.deadline = time.monotonic() + 60 * run.minutes
            work[stage](run)
    except KeyboardInterrupt:
        interrupted = True
        print("ci/gpu: interrupted; the same command continues", flush=True)
    text, good = summary(run, stages)
    (run.out / "summary.md").write_text(text, encoding="utf-8")
    print(text)
    if interrupted:
        return 130
    if options.rehearse and options.out is None and good:
        shutil.rmtree(run.out)
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
