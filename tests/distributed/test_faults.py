"""A rank that is killed or stopped: the others end with its name, and the training goes on exactly."""

from __future__ import annotations

import random
import re
import signal
import sys
import time
from pathlib import Path

import pytest
import worlds
from faults import EPOCHS, Until, fit, new_engine
from same_state import assert_same_state

from fusemlp import load_checkpoint

pytest.importorskip("torch")
pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="signals of POSIX")

# by the name of the folder: the ending, the victim, and the message of the other rank
CASES = {
    "kill1": ("kill", 1, r"distributed: rank 1 of 2 ended or did not answer within 4 s"),
    "kill0": ("kill", 0, r"distributed: rank 0, which keeps the ranks' common store, ended or does not answer"),
    "stop1": ("stop", 1, r"distributed: rank 1 of 2 ended or did not answer within 4 s"),
}


class Ended:
    """A world of two in each case, and how long the other rank took."""

    def __init__(self, folder: Path) -> None:
        delays = random.Random(17)
        self.folder = folder
        self.results: dict[str, tuple[int, str]] = {}
        self.seconds: dict[str, float] = {}
        started = {}
        for name, (ending, victim, _) in CASES.items():
            own = folder / name
            own.mkdir()
            started[name] = worlds.start(2, own, ending, victim, delays.uniform(0.3, 0.8), script="faults.py")
        try:
            for name, (ending, victim, _) in CASES.items():
                dies, stays = started[name][victim], started[name][1 - victim]
                if ending != "stop":
                    dies.wait(worlds.LIMIT)
                began = time.monotonic()
                out, errors = stays.communicate(timeout=worlds.LIMIT)
                self.seconds[name] = time.monotonic() - began
                self.results[name] = stays.returncode, out + errors
                assert ending != "kill" or dies.returncode == -signal.SIGKILL
        finally:
            for rank in [rank for ranks in started.values() for rank in ranks]:
                rank.kill()
                rank.communicate()


@pytest.fixture(scope="module")
def ended(tmp_path_factory: pytest.TempPathFactory) -> Ended:
    return Ended(tmp_path_factory.mktemp("faults"))


@pytest.mark.parametrize("name", CASES)
def test_the_other_rank_ends_and_names_the_victim(ended: Ended, name: str) -> None:
    code, text = ended.results[name]
    assert code == 0, text
    assert re.match(CASES[name][2], text), text
    if CASES[name][0] == "kill":
        # long before the time limit of a training, even on a busy machine
        assert ended.seconds[name] < 60


@pytest.mark.parametrize("name", CASES)
def test_the_training_goes_on_exactly_in_a_world_of_one(ended: Ended, alone: None, name: str) -> None:
    engine = load_checkpoint(ended.folder / name / "checkpoint.safetensors", distributed=True)
    assert engine.fit_state is not None
    last = Until(engine.fit_state.epoch + 3)
    fit(engine, (last,), epochs=EPOCHS, resume=True)
    expected = new_engine()
    fit(expected, (last,), epochs=EPOCHS, resume=False)
    assert_same_state(engine, expected)
