"""The items of ``ci/gpu``: commands in processes of their own, with a limit, a log and a written result."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
# Under this many seconds left, no further item begins.
LEAST_SECONDS = 15.0
FIGURES = "figures: "
# A benchmark that ends at its own limit says so, and continues its file in the next run.
OVER = "the time is over"
PASSED, FAILED, UNFINISHED = "passed", "failed", "unfinished"


@dataclass(frozen=True)
class Item:
    """A command of a stage, and its limit."""

    stage: str
    name: str
    command: tuple[str, ...]
    seconds: float = 540.0


@dataclass
class Run:
    """A run of the stages: its folder, its options, and the end of the stage under way."""

    out: Path
    rehearse: bool
    minutes: float
    jobs: int
    commit: str
    began: str
    deadline: float = math.inf
    environment: dict[str, str] = field(default_factory=dict)

    @property
    def results(self) -> Path:
        return self.out / "results.jsonl"

    def left(self) -> float:
        """Return the seconds that the stage has left."""
        return self.deadline - time.monotonic()

    def note(self, item: Item, status: str, **more: Any) -> None:
        """Write a result, and print it."""
        line = {"stage": item.stage, "item": item.name, "status": status, "commit": self.commit, **more}
        append(self.results, line | {"rehearsed": self.rehearse, "time": now()})
        print(f"ci/gpu: {item.stage}: {item.name}: {status}, {more.get('seconds', 0):.0f} s", flush=True)


def now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def append(path: Path, line: dict[str, Any]) -> None:
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")


def lines_of(path: Path) -> list[dict[str, Any]]:
    if not path.is_file():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]


def python(*arguments: str) -> tuple[str, ...]:
    return (sys.executable, *arguments)


def execute(run: Run, item: Item, **environment: str) -> tuple[int | None, Path, float]:
    """Run an item's command to its end or its limit; return its exit status (None: out of time), log and seconds."""
    log = run.out / "logs" / item.stage / f"{item.name.replace(' ', '-').replace('/', '-')}.txt"
    log.parent.mkdir(parents=True, exist_ok=True)
    began = time.monotonic()
    with log.open("w", encoding="utf-8") as file:
        process = subprocess.Popen(
            item.command, cwd=ROOT, env=run.environment | environment, stdout=file, stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL, start_new_session=True,
        )  # fmt: skip
        try:
            end = began + item.seconds
            while (status := process.poll()) is None and time.monotonic() < min(end, run.deadline):
                time.sleep(0.05)
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
    return status, log, time.monotonic() - began


def settle(run: Run, item: Item) -> None:
    """Run an item and write its result."""
    if run.left() < LEAST_SECONDS:
        run.note(item, UNFINISHED)
        return
    status, log, seconds = execute(run, item)
    said = log.read_text(encoding="utf-8", errors="replace")
    figures = next((line for line in reversed(said.splitlines()) if line.startswith(FIGURES)), None)
    more = {"figures": json.loads(figures.removeprefix(FIGURES))} if figures else {}
    # An item that the stage's end cut off is not to blame.
    cut = status is None and seconds < item.seconds
    outcome = UNFINISHED if cut or (status == 0 and OVER in said) else PASSED if status == 0 else FAILED
    if outcome == FAILED:
        more["message"] = (f"more than {item.seconds:.0f} s\n" if status is None else "") + said[-1500:]
    run.note(item, outcome, seconds=round(seconds, 1), log=str(log), **more)


def unsettled(run: Run, items: Iterable[Item]) -> list[Item]:
    """Return the items that have not passed."""
    latest = {(line["stage"], line["item"]): line["status"] for line in lines_of(run.results)}
    return [item for item in items if latest.get((item.stage, item.name)) != PASSED]


def all_of(run: Run, items: Sequence[Item], jobs: int = 1) -> None:
    """Settle the items, ``jobs`` at a time."""
    side_by_side(run, jobs, lambda item: settle(run, item), unsettled(run, items))


def side_by_side(run: Run, jobs: int, work: Callable[[Any], None], over: Iterable[Any]) -> None:
    """Do this work ``jobs`` at a time; Ctrl-C ends the stage, and with it the processes under way."""
    with ThreadPoolExecutor(jobs) as pool:
        try:
            list(pool.map(work, over))
        except BaseException:
            run.deadline = -math.inf
            raise
