"""A fleet with too many engines for memory trains in parts, with the same results."""

from __future__ import annotations

import gc
import logging
import pickle
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fusemlp import MLP, SGD, ArgumentError, Engine, Fleet
from fusemlp.fleet import memory as module
from fusemlp.fleet.candidates import Candidate
from fusemlp.fleet.results import Member
from make import assert_same_state

random = np.random.default_rng(1)
X = random.standard_normal((60, 6))
y = (X @ random.standard_normal((6, 3))).argmax(axis=1)
DATA = {"validation_data": (X[40:], y[40:]), "early_stopping": 2}


def fleet(vary: Any, **options: Any) -> Fleet:
    return Fleet(MLP([6, 8, 3]), batch_size=16, backend="numpy", vary=vary, **options)


def memory_for(models: int, kept: int) -> int:
    """Return an argument ``memory`` with room for ``models`` engines while ``kept`` models are kept."""
    one = fleet([{}])
    return models * module.engine_bytes(one.engines[0]) + module.kept_bytes(one.candidates * kept, "fp32")


@pytest.mark.parametrize("room", [1, 4, 10])
def test_parts_change_nothing_but_what_is_kept(room: int, caplog: pytest.LogCaptureFixture) -> None:
    vary = [{"seed": seed} for seed in range(6)] + [{"lr": 1e30}, {"dropout": 0.5}, {"hidden": [5, 4]}, {}]
    whole = fleet(vary, optimizer=SGD(0.1, momentum=0.9))
    expected = whole.fit(X, y, epochs=5, **DATA)
    assert not caplog.records
    most = memory_for(room, len(vary))
    parts = fleet(vary, optimizer=SGD(0.1, momentum=0.9), memory=most + (1 << 14) if room == 10 else most)
    handed: list[Member] = []
    found = parts.fit(X, y, epochs=5, callback=handed.append, **DATA)
    said = [record for record in caplog.records if record.name == "fusemlp"]
    assert len(said) == (room < 10)
    if said:
        assert said[0].levelno == logging.WARNING
        assert said[0].getMessage().startswith(f"fleet: there is room for the engines of {room} of 10 models")
    assert sorted(member.index for member in handed) == list(range(10))
    for one, other in zip(found.members, expected.members, strict=True):
        assert (one.status, one.reason, one.scores, one.history.history) == (
            (other.status, other.reason, other.scores, other.history.history)
        )
        tensors, others = one.engine.state_dict(), other.engine.state_dict()
        assert all(np.array_equal(tensors[name], others[name]) for name in others)
    assert found.table() == expected.table()
    said_together, both = parts.predict(X), whole.predict(X)
    assert np.array_equal(said_together.mean, both.mean) and np.array_equal(said_together.votes, both.votes)


def test_an_engine_that_is_made_again_can_do_what_the_first_could(tmp_path: Path) -> None:
    results = fleet({"seed": range(5)}, memory=memory_for(2, 5)).fit(X, y, epochs=3)
    engine = results.engine(4)
    assert engine is not results.engine(4)
    assert engine.history is results.members[4].history and engine.epochs_trained == 3
    alone = Engine(MLP([6, 8, 3]), batch_size=16, seed=4, backend="numpy")
    alone.fit(X, y, epochs=3)
    assert np.array_equal(engine.predict_proba(X), alone.predict_proba(X))
    engine.save_checkpoint(tmp_path / "model.safetensors")
    engine.fit(X, y, epochs=1)
    assert engine.epochs_trained == 4
    again = pickle.loads(pickle.dumps(results))
    assert np.array_equal(again.engine(4).predict_proba(X), alone.predict_proba(X))


def test_engines_of_a_part_are_gone_when_the_next_is_built(monkeypatch: pytest.MonkeyPatch) -> None:
    alive: list[weakref.ref[Engine]] = []
    most = 0

    def built(self: Candidate, machine: Any) -> Engine:
        nonlocal most
        engine = made(self, machine)
        alive.append(weakref.ref(engine))
        most = max(most, sum(reference() is not None for reference in alive))
        return engine

    made = Candidate.engine
    monkeypatch.setattr(Candidate, "engine", built)
    gc.disable()
    try:
        fleet({"seed": range(20)}, memory=memory_for(4, 20)).fit(X, y, epochs=1)
    finally:
        gc.enable()
    # four, the one that found no room, and the first of all, which checks the data
    assert most <= 6


def test_a_fleet_in_parts_keeps_no_engines_and_is_not_trained_on() -> None:
    made = fleet({"seed": range(5)}, memory=memory_for(2, 5))
    made.fit(X, y, epochs=1)
    with pytest.raises(ArgumentError, match=r"^engines: the models were trained in parts; results.engine\(i\)"):
        _ = made.engines
    with pytest.raises(ArgumentError, match=r"^fit: the models were trained in parts"):
        made.fit(X, y, epochs=1)


def test_what_never_finds_room_is_said_before_anything_is_trained() -> None:
    made = fleet({"seed": range(50)}, memory=50_000)
    with pytest.raises(
        ArgumentError, match=r"^memory: 50 models leave .* MiB of parameters, and there are 0.04768 MiB allowed"
    ):
        made.fit(X, y, epochs=1)
    assert all(engine.update_count == 0 for engine in made.engines)
    with pytest.raises(ArgumentError, match=r"^memory: expected a whole number of at least 1, got 0"):
        fleet([{}], memory=0)


def test_all_is_checked_before_the_first_part() -> None:
    made = fleet({"batch_size": [8, 8, 8, 8, 64]}, memory=memory_for(2, 5))
    with pytest.raises(ArgumentError, match=r"^drop_last: 60 rows do not fill one batch of 64, and model 4"):
        made.fit(X, y, epochs=1, drop_last=True)
    assert made.fit(X, y, epochs=1).members[4].status == "trained"


def test_a_second_fit_of_a_fleet_that_finds_room_goes_on() -> None:
    made, alone = fleet({"seed": [0, 1]}), Engine(MLP([6, 8, 3]), batch_size=16, seed=1, backend="numpy")
    for _ in range(2):
        made.fit(X, y, epochs=2, **DATA)
        alone.fit(X, y, epochs=2, **DATA)
    assert_same_state(made.engines[1], alone)


def test_the_estimate_of_an_engine_is_about_what_it_takes() -> None:
    import tracemalloc

    net = MLP([64, 32, 10])
    rows, labels = np.zeros((300, 64)) + np.arange(64) / 64, np.arange(300) % 10
    made = Fleet(net, vary={"seed": range(40)}, backend="numpy")
    made.fit(rows, labels, epochs=1)
    made = Fleet(net, vary={"seed": range(40)}, backend="numpy")
    gc.collect()
    tracemalloc.start()
    try:
        made.fit(rows, labels, epochs=10, validation_data=(rows, labels), early_stopping=30)
        gc.collect()
        taken = tracemalloc.get_traced_memory()[0] / 40
    finally:
        tracemalloc.stop()
    estimated = module.engine_bytes(made.engines[0])
    assert 0.7 * estimated < taken <= estimated


def system(root: Path, **files: str) -> Path:
    """Make a root folder with the kernel's memory files."""
    places = {
        "meminfo": "proc/meminfo",
        **{name: f"sys/fs/cgroup/memory.{name}" for name in ("max", "current", "stat")},
    }
    for name, text in files.items():
        path = root / places[name]
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


MEMINFO = "MemTotal:  2000 kB\nMemFree:  10 kB\nMemAvailable:  1000 kB\n"
USED = {"current": "500000\n", "stat": "anon 100000\nactive_file 30000\ninactive_file 20000\n"}


def test_what_is_free_is_what_system_and_control_group_leave(tmp_path: Path) -> None:
    assert module.available_memory(system(tmp_path / "a", meminfo=MEMINFO)) == 1000 << 10
    assert module.available_memory(system(tmp_path / "b", meminfo=MEMINFO, max="max\n", **USED)) == 1000 << 10
    # Cached files can be freed.
    assert module.available_memory(system(tmp_path / "c", meminfo=MEMINFO, max="700000\n", **USED)) == 250_000
    assert module.available_memory(system(tmp_path / "d", meminfo=MEMINFO, max="9000000\n", **USED)) == 1000 << 10
    assert module.available_memory(system(tmp_path / "e", meminfo=MEMINFO, max="1\n", **USED)) == 0
    garbled = {**USED, "current": "?\n"}
    assert module.available_memory(system(tmp_path / "f", meminfo=MEMINFO, max="700000\n", **garbled)) == 1000 << 10
    unknown = module.available_memory(tmp_path)
    assert unknown is None or unknown > 1 << 20


def test_half_of_what_is_free_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    candidates = fleet({"seed": range(10)}).candidates
    kept = module.kept_bytes(candidates, "fp32")
    monkeypatch.setattr(module, "available_memory", lambda: 4 * kept)
    assert module.room(None, candidates, "fp32", device="cpu") == kept
    assert module.room(3 * kept, candidates, "fp32", device="cpu") == 2 * kept
    # A guess too small for more than one engine is no reason to refuse.
    monkeypatch.setattr(module, "available_memory", lambda: kept + 1)
    assert module.room(None, candidates, "fp32", device="cpu") == 0
    monkeypatch.setattr(module, "available_memory", lambda: kept)
    with pytest.raises(ArgumentError, match=r"^memory: 10 models leave .* MiB free; train fewer models at once"):
        module.room(None, candidates, "fp32", device="cpu")
    monkeypatch.setattr(module, "available_memory", lambda: None)
    assert module.room(None, candidates, "fp32", device="cpu") is None
    assert module.room(None, candidates, "fp32", device="cuda:0") is None
    assert module.room(5, candidates, "fp32", device="cuda:0") == 5


def test_engines_give_back_what_they_worked_in() -> None:
    engine = Engine(MLP([6, 8, 3]), batch_size=16, backend="numpy", plan="eager")
    before, loss = engine.predict_proba(X), float(engine.step(X[:16], y[:16]))
    engine.release()
    again = Engine(MLP([6, 8, 3]), batch_size=16, backend="numpy", plan="eager")
    assert np.array_equal(again.predict_proba(X), before)
    assert float(again.step(X[:16], y[:16])) == loss
    again.step(X[:16], y[:16])
    engine.step(X[:16], y[:16])
    assert_same_state(engine, again)
