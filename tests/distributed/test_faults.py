"""A rank that is killed or stopped: the others end with its name, and the training goes on exactly."""

from __future__ import annotations

import json
import random
import re
import signal
import sys
import time
from dataclasses import dataclass, field

import pytest
import worlds
from faults import CHECKPOINT, cut_off, go_on, without_a_fault

pytest.importorskip("torch")
pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="signals of POSIX")

# Others may be named too: those that wait for one which has named the victim and ended.
GONE = r"distributed: ranks? (\d, )*{}(, \d)* of {} ended or did not answer within 6 s"
STORE = r"distributed: rank 0, which keeps the ranks' common store, ended or does not answer"
# seeds: rank 1 of 4 is stopped, and rank 0, which keeps the ranks' common store
KILLS, STOPS = range(10), (20, 29)


@dataclass
class Fault:
    """A world whose random moment depends on ``seed``, and what became of its other ranks."""

    seed: int
    ending: signal.Signals
    world: int
    victim: int
    delay: float
    exits: list[tuple[int, str]] = field(default_factory=list)
    seconds: float = 0.0

    def __str__(self):
        return f"seed{self.seed}"

    @property
    def resumes_in(self):
        """The size of the world that goes on, another than before."""
        return {2: (1, 4), 4: (1, 2)}[self.world][self.seed // 2 % 2]


def fault(seed):
    """Return the fault of a seed."""
    drawn = random.Random(seed)
    world = drawn.choice((2, 2, 4))
    ending = signal.SIGSTOP if seed in STOPS else signal.SIGKILL
    return Fault(seed, ending, world, drawn.randrange(world), drawn.uniform(0.0, 0.6))


FAULTS = [fault(seed) for seed in (*KILLS, *STOPS)]


def end(fault, ranks):
    """Wait for the ranks of a world."""
    victim = ranks[fault.victim]
    if fault.ending == signal.SIGKILL:
        victim.process.join(worlds.LIMIT)
    began = time.monotonic()
    fault.exits = [rank.ended() for rank in ranks if rank is not victim]
    fault.seconds = time.monotonic() - began
    assert fault.ending == signal.SIGSTOP or victim.process.exitcode == -signal.SIGKILL, fault
    victim.process.kill()


@pytest.fixture(scope="module")
def digests(tmp_path_factory):
    """The digests after some epochs of each resumed run, and of all epochs of one that was not cut off."""
    folder = tmp_path_factory.mktemp("faults")
    started = []
    try:
        for one in FAULTS:
            own = folder / str(one)
            started.append(worlds.start(one.world, own, cut_off, own, one.ending, one.victim, one.delay))
        for one, ranks in zip(FAULTS, started, strict=True):
            end(one, ranks)
    finally:
        for rank in [rank for ranks in started for rank in ranks]:
            rank.process.kill()
    found = {}
    for world in (1, 2, 4):
        runs = [str(one) for one in FAULTS if one.resumes_in == world]
        worlds.run(world, folder / f"world{world}", go_on, folder, runs)
        found |= json.loads((folder / f"{world}.json").read_text(encoding="utf-8"))
    epochs = 1 + max(int(epoch) for one in found.values() for epoch in one)
    worlds.run(1, folder / "whole", without_a_fault, folder / "whole.json", epochs)
    found["whole"] = json.loads((folder / "whole.json").read_text(encoding="utf-8"))
    found["saved"] = {str(one): "" for one in FAULTS if (folder / str(one) / CHECKPOINT).exists()}
    return found


@pytest.mark.parametrize("fault", FAULTS, ids=str)
def test_the_other_ranks_end_and_name_the_victim(digests, fault):
    assert len(fault.exits) == fault.world - 1
    gone = GONE.format(fault.victim, fault.world)
    for place, (code, text) in enumerate(fault.exits):
        assert code == 0, f"{fault!r}: {text}"
        # rank 0 may have ended before another turned to its store
        said = STORE if fault.victim == 0 else gone if place == 0 else f"{gone}|{STORE}"
        # torch writes warnings of its own before
        assert re.search(f"^({said})", text, re.MULTILINE), f"{fault!r}: {text}"
    # long before the time limit of a training, even on a busy machine
    assert fault.seconds < 60, fault


@pytest.mark.parametrize("fault", FAULTS, ids=str)
def test_the_training_goes_on_exactly_in_a_world_of_another_size(digests, fault):
    ((epoch, digest),) = digests[str(fault)].items()
    assert digest == digests["whole"][epoch], fault


def test_most_moments_come_after_a_checkpoint(digests):
    assert len(digests["saved"]) > len(FAULTS) // 2
