"""The journal of a sweep: its options and its ended models, so that ``--resume`` goes on where it was cut off.

The parameters of the models are not among it: the best is trained again if it had ended before, with the same result.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from fusemlp.cli.options import SweepOptions
from fusemlp.describe.checks import as_count
from fusemlp.describe.description import reading, stored
from fusemlp.fleet.fleet import Fleet
from fusemlp.fleet.memory import Kept
from fusemlp.fleet.results import Member
from fusemlp.report.runs import Run, read_json
from fusemlp.runtime.files import write_atomically
from fusemlp.training.history import History
from fusemlp_kernels.errors import CheckpointError

JOURNAL = "sweep.jsonl"


def begin(run: Run, options: Mapping[str, Any], fingerprint: str, told: Iterable[Mapping[str, Any]] = ()) -> None:
    """Write the first line, the options of ``sweep`` and the fingerprint of its data, and those of ended models."""
    lines = [{"options": dict(options), "fingerprint": fingerprint}, *told]
    text = "".join(f"{json.dumps(line, default=str)}\n" for line in lines)
    write_atomically(run.path / JOURNAL, text.encode())


def add(run: Run, member: Member) -> None:
    """Write a line for a model that has ended."""
    told = {
        "index": member.index,
        "status": member.status,
        "reason": member.reason,
        "scores": member.scores,
        "history": asdict(member.history),
    }
    with (run.path / JOURNAL).open("a", encoding="utf-8") as stream:
        stream.write(f"{json.dumps(told)}\n")


def read(folder: str) -> tuple[Run, dict[str, Any], list[dict[str, Any]]]:
    """Return a sweep's folder, its first line, and those of its models; CheckpointError if it cannot go on."""
    run = Run(Path(folder))
    if not (run.path / JOURNAL).is_file():
        config = read_json(run.config)
        reason = "is no folder of a sweep" if "sweep" not in config else "holds a sweep that has ended; start a new one"
        mend = "; a run of train goes on with fusemlp train --resume" if config and "sweep" not in config else ""
        raise CheckpointError(f"resume: {folder!r} {reason}{mend}")
    lines = (run.path / JOURNAL).read_text(encoding="utf-8").splitlines(keepends=True)
    found: list[dict[str, Any]] = []
    for line in lines:
        if not line.endswith("\n"):
            # it was being written
            break
        with reading(f"resume: line {len(found) + 1} of {str(run.path / JOURNAL)!r}", "start the sweep again"):
            found.append(stored("line", json.loads(line), dict[str, Any]))
            if len(found) == 1:
                stored("fingerprint", found[0]["fingerprint"], str)
                stored("options", found[0]["options"], SweepOptions)
    if not found:
        raise CheckpointError(f"resume: {folder!r} was cut off before its first line; start the sweep again")
    return run, found[0], found[1:]


def member(told: Mapping[str, Any], fleet: Fleet) -> Member:
    """Return a model of which a line tells, without its parameters."""
    with reading(f"resume: a model of {JOURNAL}", "start the sweep again"):
        index, history = as_count("index", told["index"], minimum=0), stored("history", told["history"], History)
        candidate, scores = fleet.candidates[index], stored("scores", told["scores"], dict[str, float])
        ending = stored("status", told["status"], str), stored("reason", told["reason"], str)
    held = Kept(candidate, {}, {}, history, len(history.epochs))
    return Member(index, candidate.parameters, held, history, *ending, scores)


def close(run: Run) -> None:
    """Remove the file: there is nothing to go on with."""
    (run.path / JOURNAL).unlink(missing_ok=True)
