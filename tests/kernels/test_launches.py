"""Launches of compiled kernels, taken by a driver that starts nothing, in a process that compiles for a card."""

import pytest

pytest.importorskip("triton")

from processes import INTERPRETED, python

SCRIPT = """
from bench.host import Driver, pretend

pretend()
launches, searches = [], []
Driver.launcher_cls = lambda self, source, metadata: lambda *given: launches.append((source.fn.__name__, given))

from triton.runtime.jit import JITFunction

import fusemlp
from fusemlp import MLP, SGD, Engine

run = JITFunction.run
JITFunction.run = lambda self, *given, **named: (searches.append(self), run(self, *given, **named))[1]
engine = Engine(MLP([3, 4, 2]), optimizer=SGD(0.1), batch_size=4, backend="triton", plan="eager", normalise=False)
x, y = [[0.0, 1.0, 2.0]] * 4, [0, 1, 0, 1]
for _ in range(3):
    engine.step(x, y)
first, *later = launches[:4], launches[4:8], launches[8:]
assert len(searches) == 4 and [len(one) for one in later] == [4, 4], (len(searches), len(launches))
for again in later:
    for (name, given), (other, repeated) in zip(first, again, strict=True):
        assert name == other and len(given) == len(repeated)
        # the seventh is for hooks, made for each launch
        given, repeated = (one[:6] + one[7:] for one in (given, repeated))
        differ = [(at, a, b) for at, (a, b) in enumerate(zip(given, repeated, strict=True)) if a is not b and a != b]
        assert not differ, (name, differ)
"""


def test_later_launches_repeat_the_first_without_tritons_search():
    """The first goes through Triton's own launcher; what it hands to the driver is what the others hand to it."""
    done = python("-c", SCRIPT, without=INTERPRETED)
    assert done.returncode == 0, done.stderr
