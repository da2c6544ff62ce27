"""A fleet with too many engines for memory trains in parts, with the same results."""

import gc
import logging
import pickle
import tracemalloc
import weakref

import numpy as np
import pytest

from fusemlp import MLP, SGD, ArgumentError, Fleet
from fusemlp.fleet import candidates as module
from fusemlp.fleet.candidates import Candidate
from make import assert_same, assert_same_state, data, engine

X, y = data(60, 6, seed=1)
DATA = {"validation_data": (X[40:], y[40:]), "early_stopping": 2}


def fleet(vary, **options):
    return Fleet(MLP([6, 8, 3]), batch_size=16, backend="numpy", vary=vary, **options)


def memory_for(models, kept):
    """Return an argument ``memory`` with room for ``models`` engines while ``kept`` models are kept."""
    one = fleet([{}])
    return models * module.engine_bytes(one.engines[0]) + module.kept_bytes(one.candidates * kept, "fp32")


@pytest.mark.parametrize("room", [1, 4, 10])
def test_parts_change_nothing_but_what_is_kept(room, caplog):
    vary = [{"seed": seed} for seed in range(6)] + [{"lr": 1e30}, {"dropout": 0.5}, {"hidden": [5, 4]}, {}]
    whole, handed = fleet(vary, optimizer=SGD(0.1, momentum=0.9)), []
    expected = whole.fit(X, y, epochs=5, **DATA)
    assert not caplog.records
    most = memory_for(room, len(vary)) + (1 << 14) * (room == 10)
    parts = fleet(vary, optimizer=SGD(0.1, momentum=0.9), memory=most)
    found = parts.fit(X, y, epochs=5, callback=handed.append, **DATA)
    warnings = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert len(warnings) == len([record for record in caplog.records if record.name == "fusemlp"]) == (room < 10)
    assert all(words.startswith(f"fleet: there is room for the engines of {room} of 10 models") for words in warnings)
    assert sorted(member.index for member in handed) == list(range(10))
    for one, other in zip(found.members, expected.members, strict=True):
        for name in ("status", "reason", "scores"):
            assert getattr(one, name) == getattr(other, name)
        assert one.history.history == other.history.history
        assert_same(one.engine.state_dict(), other.engine.state_dict())
    assert found.table() == expected.table()
    assert_same(parts.predict(X), whole.predict(X))


def test_an_engine_that_is_made_again_can_do_what_the_first_could(tmp_path):
    results = fleet({"seed": range(5)}, memory=memory_for(2, 5)).fit(X, y, epochs=3)
    again, alone = results.engine(4), engine((6, 8, 3), seed=4)
    assert again is not results.engine(4)
    assert again.history is results.members[4].history and again.epochs_trained == 3
    alone.fit(X, y, epochs=3)
    assert np.array_equal(again.predict_proba(X), alone.predict_proba(X))
    again.save_checkpoint(tmp_path / "model.safetensors")
    again.fit(X, y, epochs=1)
    assert again.epochs_trained == 4
    again = pickle.loads(pickle.dumps(results))
    assert np.array_equal(again.engine(4).predict_proba(X), alone.predict_proba(X))


def test_engines_of_a_part_are_gone_when_the_next_is_built(monkeypatch):
    built, counts, alive = Candidate.engine, [], weakref.WeakSet()

    def counted(self, machine):
        new = built(self, machine)
        alive.add(new)
        counts.append(len(alive))
        return new

    monkeypatch.setattr(Candidate, "engine", counted)
    gc.disable()
    try:
        fleet({"seed": range(20)}, memory=memory_for(4, 20)).fit(X, y, epochs=1)
    finally:
        gc.enable()
    # four, the one that found no room, and the first of all, which checks the data
    assert max(counts) <= 6


def test_a_fleet_in_parts_keeps_no_engines_and_is_not_trained_on():
    made = fleet({"seed": range(5)}, memory=memory_for(2, 5))
    made.fit(X, y, epochs=1)
    with pytest.raises(ArgumentError, match=r"^engines: the models were trained in parts; results.engine\(i\)"):
        _ = made.engines
    with pytest.raises(ArgumentError, match=r"^fit: the models were trained in parts"):
        made.fit(X, y, epochs=1)


def test_what_never_finds_room_is_said_before_anything_is_trained():
    made = fleet({"seed": range(50)}, memory=50_000)
    words = r"^memory: 50 models leave .* MiB of parameters, and there are 0.04768 MiB allowed"
    with pytest.raises(ArgumentError, match=words):
        made.fit(X, y, epochs=1)
    assert all(engine.update_count == 0 for engine in made.engines)
    with pytest.raises(ArgumentError, match=r"^memory: expected a whole number of at least 1, got 0"):
        fleet([{}], memory=0)


def test_all_is_checked_before_the_first_part():
    made = fleet({"batch_size": [8, 8, 8, 8, 64]}, memory=memory_for(2, 5))
    with pytest.raises(ArgumentError, match=r"^drop_last: 60 rows do not fill one batch of 64, and model 4"):
        made.fit(X, y, epochs=1, drop_last=True)
    assert made.fit(X, y, epochs=1).members[4].status == "trained"


def test_a_second_fit_of_a_fleet_that_finds_room_goes_on():
    made, alone = fleet({"seed": [0, 1]}), engine((6, 8, 3))
    for _ in range(2):
        made.fit(X, y, epochs=2, **DATA)
        alone.fit(X, y, epochs=2, **DATA)
    assert_same_state(made.engines[1], alone)


def test_the_estimate_of_an_engine_is_about_what_it_takes():
    rows, labels = np.zeros((300, 64)) + np.arange(64) / 64, np.arange(300) % 10
    warm, made = (Fleet(MLP([64, 32, 10]), vary={"seed": range(40)}, backend="numpy") for _ in range(2))
    warm.fit(rows, labels, epochs=1)
    del warm
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


USED = {"memory.current": "500000\n", "memory.stat": "anon 100000\nactive_file 30000\ninactive_file 20000\n"}


@pytest.mark.parametrize(
    ("files", "free"),
    [
        ({}, 1000 << 10),
        ({**USED, "memory.max": "max\n"}, 1000 << 10),
        # Cached files can be freed.
        ({**USED, "memory.max": "700000\n"}, 250_000),
        ({**USED, "memory.max": "9000000\n"}, 1000 << 10),
        ({**USED, "memory.max": "1\n"}, 0),
        ({**USED, "memory.max": "700000\n", "memory.current": "?\n"}, 1000 << 10),
    ],
)
def test_memory_that_system_and_control_group_leave_is_free(files, free, tmp_path):
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc/meminfo").write_text("MemTotal:  2000 kB\nMemFree:  10 kB\nMemAvailable:  1000 kB\n")
    (tmp_path / "sys/fs/cgroup").mkdir(parents=True)
    for name, text in files.items():
        (tmp_path / "sys/fs/cgroup" / name).write_text(text)
    assert module.available_memory(tmp_path) == free


def test_without_the_files_of_the_system_memory_is_unknown_or_asked_for(tmp_path):
    unknown = module.available_memory(tmp_path)
    assert unknown is None or unknown > 1 << 20


def test_half_of_what_is_free_is_taken(monkeypatch):
    candidates = fleet({"seed": range(10)}).candidates
    kept = module.kept_bytes(candidates, "fp32")
    for free, memory, device, room in (
        (4 * kept, None, "cpu", kept),
        (4 * kept, 3 * kept, "cpu", 2 * kept),
        # A guess too small for more than one engine is no reason to refuse.
        (kept + 1, None, "cpu", 0),
        (None, None, "cpu", None),
        (None, None, "cuda:0", None),
        (None, 5, "cuda:0", 5),
    ):
        monkeypatch.setattr(module, "available_memory", lambda free=free: free)
        assert module.room(memory, candidates, "fp32", device=device) == room
    monkeypatch.setattr(module, "available_memory", lambda: kept)
    with pytest.raises(ArgumentError, match=r"^memory: 10 models leave .* MiB free; train fewer models at once"):
        module.room(None, candidates, "fp32", device="cpu")


def test_engines_give_back_what_they_worked_in():
    released, again = (engine((6, 8, 3), plan="eager") for _ in range(2))
    before, loss = released.predict_proba(X), float(released.step(X[:16], y[:16]))
    released.release()
    assert np.array_equal(again.predict_proba(X), before)
    assert float(again.step(X[:16], y[:16])) == loss
    again.step(X[:16], y[:16])
    released.step(X[:16], y[:16])
    assert_same_state(released, again)
    released.fit(X, y, epochs=1)
    marked = [weakref.ref(array) for array in released.memory.marked.values()]
    released.release()
    assert marked and not any(reference() is not None for reference in marked)
