"""``Fleet.fit(callback=...)``: each model is handed over when it has ended, and an error from there ends the others."""

from __future__ import annotations

import threading
from typing import Any

import numpy as np
import pytest

from fusemlp import MLP, SGD, ArgumentError, ArgumentTypeError, Engine, Fleet
from fusemlp.fleet.results import Member
from make import assert_same_state

X = np.random.default_rng(1).standard_normal((50, 4))
y = (X[:, 0] > 0).astype(int)


def fleet(vary: Any, **options: Any) -> Fleet:
    return Fleet(MLP([4, 5, 2]), batch_size=16, backend="numpy", vary=vary, **options)


@pytest.mark.parametrize("jobs", [1, 3])
def test_each_model_is_handed_over_once_as_it_ended(jobs: int) -> None:
    handed: list[Member] = []
    threads = set()

    def callback(member: Member) -> None:
        handed.append(member)
        threads.add(threading.current_thread())

    made = fleet({"lr": [0.1, 1e30], "seed": range(3)}, optimizer=SGD(momentum=0.9))
    results = made.fit(X, y, epochs=3, jobs=jobs, callback=callback)
    assert sorted(member.index for member in handed) == list(range(6))
    assert all(results.members[member.index] is member for member in handed)
    assert [member.status for member in results.members] == ["trained"] * 3 + ["diverged"] * 3
    assert threads == {threading.main_thread()}
    if jobs == 1:
        assert [member.index for member in handed] == list(range(6))


@pytest.mark.parametrize("error", [KeyboardInterrupt, ZeroDivisionError])
def test_what_a_callback_raises_ends_the_training(error: type[BaseException]) -> None:
    def callback(member: Member) -> None:
        raise error

    made = fleet([{"lr": 1e30}, *[{}] * 5], optimizer=SGD(momentum=0.9))
    with pytest.raises(error):
        made.fit(X, y, epochs=10**7, jobs=2, callback=callback)
    assert made.results is None


def test_what_had_ended_before_ctrl_c_is_whole() -> None:
    kept: list[Member] = []

    def callback(member: Member) -> None:
        kept.append(member)
        if len(kept) == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fleet({"seed": range(20)}).fit(X, y, epochs=3, jobs=1, callback=callback)
    for member in kept:
        engine = Engine(MLP([4, 5, 2]), batch_size=16, seed=member.index, backend="numpy")
        engine.fit(X, y, epochs=3)
        assert_same_state(member.engine, engine)


def test_a_short_last_batch_is_left_out_of_all() -> None:
    results = fleet({"batch_size": [16, 20]}).fit(X, y, epochs=2, drop_last=True)
    for member, size in zip(results.members, (16, 20), strict=True):
        engine = Engine(MLP([4, 5, 2]), batch_size=size, backend="numpy")
        engine.fit(X, y, epochs=2, drop_last=True)
        assert_same_state(member.engine, engine)


def test_what_fit_refuses() -> None:
    made = fleet({"batch_size": [16, 64]})
    with pytest.raises(ArgumentTypeError, match=r"^callback: expected a function of a Member, got 3"):
        made.fit(X, y, epochs=1, callback=3)
    with pytest.raises(ArgumentTypeError, match=r"^drop_last: expected True or False, got 1"):
        made.fit(X, y, epochs=1, drop_last=1)
    with pytest.raises(ArgumentError, match=r"^drop_last: 50 rows do not fill one batch of 64, and model 1 would not"):
        made.fit(X, y, epochs=1, drop_last=True)
    assert all(engine.update_count == 0 for engine in made.engines)
