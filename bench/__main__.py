"""``python -m bench``, from the repository's root; ``fusemlp bench`` runs it too."""

from __future__ import annotations

import importlib
import json
import math
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from bench.cases import CASES, QUICK, Case, parsed
from bench.hardware import card
from bench.measure import ABSENT, FAILED, REFUSED, TURN_SECONDS, measure, started
from bench.options import COMMANDS, ENDED, LAST, parser
from bench.peers import PEERS, absent, is_own, unsuited
from bench.processor import limited
from bench.report import (
    absences,
    beside,
    circumstances,
    default_path,
    markdown,
    newest,
    read,
    records,
    where,
    write,
)
from bench.worker import Worker, WorkerError, openblas_settings
from fusemlp_kernels.errors import unknown_name

QUICK_TURN_SECONDS = 0.1


@dataclass(frozen=True)
class Plan:
    """The cases and contenders to measure.

    ``missing`` maps those that cannot run on this machine to the reason. ``busy``: processes that spin during a turn.
    ``isa``: the instruction set that all are limited to, or None.
    """

    cases: list[Case]
    peers: list[str]
    missing: dict[str, str]
    repeats: int
    turn_seconds: float
    busy: int
    isa: str | None


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    given = sys.argv[1:] if arguments is None else list(arguments)
    if given and given[0] in COMMANDS:
        return int(importlib.import_module(f"bench.{given[0]}").main(given[1:]))
    made = parser()
    if given and given[0] in ENDED:
        made.error(f"{given[0]}: this study has ended; bench/README.md has its figures, commit {LAST} its script")
    if given and not given[0].startswith("-"):
        made.error(str(unknown_name("command", given[0], COMMANDS)))
    options = made.parse_args(given)
    try:
        if options.markdown is not None:
            return print_table(options.markdown)
        if options.resume and options.out is None:
            raise ValueError("--resume: it continues a file; name it with --out")
        plan = planned(options)
        if options.list:
            return print_list(plan)
        path = options.out or default_path(plan.busy)
        if path.is_file() and (found := read(path)) and beside(found[0]) != beside(vars(plan)):
            raise ValueError(
                f"--out {path}: it holds figures measured {beside(found[0])}, and these are measured "
                f"{beside(vars(plan))}; name another file"
            )
        deadline = math.inf if options.minutes is None else time.monotonic() + 60 * options.minutes
        if options.resume and path.is_file():
            plan = left_of(plan, read(path))
        status = compare(plan, path, deadline, as_json=options.json, plots=options.plots)
        # A contender that an earlier run of this file refused is still wrong.
        return status or int(options.resume and path.is_file() and any(map(is_wrong, read(path))))
    except ValueError as error:
        say(f"error: {error}")
        return 2
    except WorkerError as error:
        say(f"error: {error}")
        return 1
    except KeyboardInterrupt:
        say("interrupted; the cases that were finished are in the file")
        return 130


def say(text: str) -> None:
    """Print a line on stderr."""
    print(f"bench: {text}", file=sys.stderr, flush=True)


def planned(options: Any) -> Plan:
    """Return the plan that the options select. Raises ValueError if none of it can be measured on this machine."""
    device = options.device
    if device == "auto":
        device = "cpu" if card() is None else "gpu"
    elif device == "gpu" and card() is None:
        raise ValueError("--device gpu: no card was found (nvidia-smi, /dev/kfd)")
    names = options.cases or (QUICK if options.quick else list(CASES))
    # suffixes may be in another order than in CASES
    names = dict.fromkeys(name if name in CASES else parsed(name).name for name in names)
    cases = [replace(CASES.get(name) or parsed(name), device=device) for name in names]
    if device == "cpu":
        for case in cases:
            if case.gpu_only and options.cases:
                raise ValueError(f"--case {case.name}: it is for a GPU only, and this run is on the CPU")
        cases = [case for case in cases if not case.gpu_only]
    missing: dict[str, str] = {}
    peers = list(dict.fromkeys(options.peers or PEERS))
    for name in peers:
        why = absent(name, device)
        if why is None and options.quick and not options.peers and PEERS[name].compiles_long:
            why = "compiles for long: left out by --quick"
        if why is not None:
            missing[name] = why
    present = [name for name in peers if name not in missing]
    if not any(unsuited(name, case) is None for name in present for case in cases):
        reasons = [f"{name}: {reason}" for name, reason in missing.items()]
        reasons += [f"{name}: {unsuited(name, case)}" for name in present for case in cases[:1]]
        raise ValueError(f"no contender is left. {'; '.join(reasons)}")
    return Plan(
        cases,
        present,
        missing,
        options.repeats or (3 if options.quick else 11),
        QUICK_TURN_SECONDS if options.quick else TURN_SECONDS,
        options.busy,
        options.isa,
    )


def left_of(plan: Plan, lines: Sequence[dict[str, Any]]) -> Plan:
    """Return the plan without the cases, and without the absent contenders, that a file has already."""
    done, told = {line["case"] for line in lines}, {line["peer"] for line in lines if line["status"] == ABSENT}
    missing = {peer: reason for peer, reason in plan.missing.items() if peer not in told}
    return replace(plan, cases=[case for case in plan.cases if case.name not in done], missing=missing)


def is_wrong(line: dict[str, Any]) -> bool:
    """Return whether a contender was refused or failed."""
    return line["status"] in (REFUSED, FAILED)


def compare(plan: Plan, path: Path, deadline: float, *, as_json: bool, plots: bool) -> int:
    """Measure case by case, write to ``path``, print the tables; return 1 if a contender was refused or failed.

    No case begins after ``deadline``, by ``time.monotonic``.
    """
    unset = openblas_settings()
    if unset:
        say(f"{', '.join(sorted(unset))}: unset for this run, to measure the default BLAS")
    lines: list[dict[str, Any]] = []
    common: dict[str, Any] = {}
    with limited(plan.isa) as settings, started(plan.peers, plan.cases, settings) as workers:
        for number, case in enumerate(plan.cases):
            if time.monotonic() >= deadline:
                say(f"the time is over: {number} of {len(plan.cases)} cases are measured; --resume continues")
                break
            results = measure(
                case, workers, repeats=plan.repeats, progress=say, turn_seconds=plan.turn_seconds, busy=plan.busy
            )
            environments = {peer: worker.ask("environment") for peer, worker in workers.items() if worker.alive}
            common = {**circumstances(environments, unset, plan.busy), "isa": plan.isa, "peak": peak_of(workers, plan)}
            found = records(results, common)
            write(found, path)
            lines += found
    if lines:
        last = absences(plan.missing, common)
        write(last, path)
        lines += last
    print(json.dumps({"file": str(path), "lines": lines}) if as_json else markdown(lines))
    say(f"figures in {path}")
    if plots:
        draw(lines, path)
    return int(any(map(is_wrong, lines)))


def peak_of(workers: Mapping[str, Worker], plan: Plan) -> float | None:
    """Return the most operations a second of the processor, in units of 1e9; None without fusemlp, or on a card."""
    own = next((worker for peer, worker in workers.items() if is_own(peer) and worker.alive), None)
    return None if own is None or plan.cases[0].device != "cpu" else own.ask("peak")


def draw(lines: list[dict[str, Any]], path: Path) -> None:
    """Draw the picture if matplotlib is installed."""
    if importlib.util.find_spec("matplotlib") is None:
        say("no picture: matplotlib is not installed (pip install matplotlib)")
        return
    from bench import plots

    if picture := plots.draw(lines, path.with_name(f"{path.stem}-models.png")):
        say(f"picture in {picture}")


def print_list(plan: Plan) -> int:
    """Print the machine, the cases and the contenders."""
    line = circumstances({}, {})
    print(f"{where(line)}\n\ncases:")
    listed = {case.name for case in plan.cases}
    for case in CASES.values():
        note = "" if case.name in listed else "  (a GPU only)" if case.gpu_only else "  (not asked for)"
        print(f"  {case.name:38s} {case.flops * (case.models or 1) / 1e6:12,.1f} MFLOP a step{note}")
    print("\ncontenders:")
    for name in [*plan.peers, *plan.missing]:
        print(f"  {name:24s} {PEERS[name].label:32s} {plan.missing.get(name, '')}".rstrip())
    return 0


def print_table(path: Path) -> int:
    """Print the tables of a file, by default the newest."""
    chosen = newest() if path == Path() else path
    if chosen is None or not chosen.is_file():
        say(f"error: no measurement {'in bench/results' if chosen is None else chosen}; run python -m bench first")
        return 2
    print(markdown(read(chosen)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
