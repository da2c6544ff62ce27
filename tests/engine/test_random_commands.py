"""Rounds of random commands; ``random_commands.py`` plays as many as are wanted."""

import pytest
from random_commands import play

# 300 rounds: python tests/engine/random_commands.py --rounds 300
SEED, ROUNDS, PART = 5, 20, 5


@pytest.mark.parametrize("first", range(0, ROUNDS, PART))
def test_random_commands_end_without_a_traceback(first, tmp_path):
    faults = [play(SEED, number, tmp_path / f"round{number}")[1] for number in range(first, first + PART)]
    assert not any(faults), "\n\n".join(filter(None, faults))
