"""``Fleet(devices=...)``: a process for each card, which sees that card alone.

There is no card here: the processes of the workers run Triton's interpreter, and the calling one a card that counts.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fusemlp import MLP, ArgumentError, ArgumentTypeError, Fleet, WorkerError
from fusemlp.cli import sweep
from fusemlp.fleet import workers
from fusemlp.fleet.results import Member
from fusemlp.fleet.workers import VARIABLE, trained_on
from fusemlp_kernels import availability
from make import run

CARDS = ["cuda:0", "cuda:1"]
GENERATOR = np.random.default_rng(0)
X = GENERATOR.normal(size=(40, 3)).astype(np.float32)
Y = (X[:, 0] > 0).astype(np.int64)


def seen(numbers: Sequence[int], *arrays: Any) -> list[Member]:
    """Stand in for a training: each model says which card its process sees, and what it was given."""
    told = f"{os.environ[VARIABLE]} {os.getpid()} {len(numbers)} {[array.tolist() for array in arrays]}"
    return [Member(number, {}, None, None, "trained", told, {}) for number in numbers]  # type: ignore[arg-type]


def fails_on_the_second(numbers: Sequence[int]) -> list[Member]:
    if os.environ[VARIABLE] == "1":
        raise MemoryError("no room")
    return seen(numbers)


def dies(numbers: Sequence[int]) -> list[Member]:
    if numbers:
        os.kill(os.getpid(), signal.SIGKILL)
    return []


@pytest.mark.parametrize(
    "given, cards, together, sizes",
    # those of one launch go to a card at once, others a few at a time
    [(None, {"0", "1"}, True, {"5", "4"}), ("3, 5,7", {"3", "5"}, False, {"1", "2"})],
)
def test_each_process_sees_its_card_alone(
    given: str | None, cards: set[str], together: bool, sizes: set[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)
    if given is not None:
        monkeypatch.setenv(VARIABLE, given)
    members = list(trained_on(CARDS, 9, seen, [np.arange(2)], together=together))
    assert sorted(one.index for one in members) == list(range(9))
    by_card: dict[str, set[str]] = {}
    for one in members:
        card, process, _, arrays = one.reason.split(maxsplit=3)
        by_card.setdefault(card, set()).add(process)
        assert arrays == "[[0, 1]]"
    assert by_card.keys() == cards and all(len(processes) == 1 for processes in by_card.values())
    assert {one.reason.split()[2] for one in members} == sizes


def test_errors_name_the_card() -> None:
    with pytest.raises(WorkerError, match=r"^devices: on 'cuda:1' there was MemoryError: no room; mend this"):
        list(trained_on(CARDS, 4, fails_on_the_second, [], together=True))
    with pytest.raises(WorkerError, match=r"^devices: on 'cuda:0' there was TerminatedWorkerError"):
        list(trained_on(CARDS[:1], 4, dies, [], together=True))


WRONG: list[tuple[Any, type[Exception], str]] = [
    ({"devices": "cuda:0"}, ArgumentTypeError, "devices: expected names of cards such as"),
    ({"devices": [0, 1]}, ArgumentTypeError, "devices: expected names of cards such as"),
    ({"devices": []}, ArgumentError, "devices: expected different cards such as"),
    ({"devices": ["cuda:0", "cuda:0"]}, ArgumentError, "devices: expected different cards such as"),
    ({"devices": ["cuda"]}, ArgumentError, "devices: expected different cards such as"),
    ({"devices": CARDS, "device": "cuda:0"}, ArgumentError, "device: devices has the cards already"),
    ({"devices": CARDS, "backend": "numpy"}, ArgumentError, "devices: the backend computes on the CPU"),
]


@pytest.mark.parametrize("options, error, message", WRONG)
def test_wrong_devices_are_refused(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"^{message}"):
        Fleet(MLP([3, 4, 2]), vary={"seed": range(2)}, **options)


def test_a_card_that_is_not_among_those_that_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, "2")
    with pytest.raises(
        ArgumentError, match=r"^devices: there is no 'cuda:1' among the 1 cards of CUDA_VISIBLE_DEVICES=2"
    ):
        list(trained_on(CARDS, 4, seen, [], together=True))


@pytest.mark.skipif(availability()["triton"] is not None, reason=f"triton: {availability()['triton']}")
def test_the_models_are_those_of_one_device() -> None:
    from counting_card import counting

    from fusemlp_kernels.triton import launch

    if not launch.is_interpreted():
        pytest.skip("triton: the counting card needs the interpreter")

    def made(**options: Any) -> Fleet:
        return Fleet(
            MLP([3, 4, 2]), batch_size=16, backend="triton", vary={"lr": [0.01, 0.1], "hidden": [4, 5]}, **options
        )

    given = {"epochs": 2, "validation_data": (X[:10], Y[:10]), "early_stopping": 2}
    expected, ended = made().fit(X, Y, **given), list[int]()
    with counting(computes=True):
        fleet = made(devices=CARDS)
        for name, value in (("workers", "loky"), ("jobs", 2), ("time_limit", 3)):
            with pytest.raises(ArgumentError, match=f"^{name}: a fleet with devices has a process for each"):
                fleet.fit(X, Y, epochs=1, **{name: value})
        found = fleet.fit(X, Y, **given, callback=lambda one: ended.append(one.index))
    assert sorted(ended) == [one.index for one in found.members] == list(range(4))
    for one, other in zip(found.members, expected.members, strict=True):
        assert (one.parameters, one.scores, one.status) == (other.parameters, other.scores, other.status)
        state = other.engine.state_dict()
        for name, value in one.engine.state_dict().items():
            np.testing.assert_array_equal(value, state[name])


@pytest.mark.skipif(availability()["triton"] is not None, reason=f"triton: {availability()['triton']}")
def test_a_sweep_names_the_cards_and_the_rest_of_one_has_them_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from counting_card import counting

    from fusemlp_kernels.triton import launch

    if not launch.is_interpreted():
        pytest.skip("triton: the counting card needs the interpreter")
    told: list[tuple[Sequence[str], int]] = []

    def here(devices: Sequence[str], models: int, task: Any, arrays: Any, *, together: bool) -> Iterator[Member]:
        told.append((devices, models))
        yield from task(list(range(models)), *arrays)

    monkeypatch.setattr(workers, "trained_on", here)
    words = ("sweep", "iris", "--vary", "seed=0:3", "--hidden", "4", "--batch-size", "64", "--epochs", "1")
    words += ("--backend", "triton", "--plan", "eager", "--devices", "cuda:0,cuda:1", "--out", tmp_path / "run")
    with counting(computes=True):
        assert run(*words) == 0
        models = {"vary": {"seed": range(3)}, "backend": "triton", "plan": "eager", "devices": CARDS}
        fleet = Fleet(MLP([3, 4, 2]), **models)
        pair = fleet.part([1, 2]).fit(X, Y, epochs=1)
        # one model needs no process of its own
        (alone,) = fleet.part([2]).fit(X, Y, epochs=1).members
        assert (alone.engine.device, alone.scores) == ("cuda:0", pair.members[1].scores)
        assert told == [(tuple(CARDS), 3), (tuple(CARDS), 2)]
        # a sweep on one card, which is cut off before its last model, goes on with several
        monkeypatch.setattr(sweep, "close_journal", lambda run: None)
        assert run(*words[: words.index("--devices")], "--device", "cuda:0", "--out", tmp_path / "one") == 0
        file = tmp_path / "one" / sweep.JOURNAL
        file.write_text("".join(file.read_text().splitlines(keepends=True)[:-1]))
        assert run("sweep", "--resume", tmp_path / "one", "--devices", "cuda:0,cuda:1") == 0
    capsys.readouterr()
    assert (
        run("sweep", "iris", "--vary", "seed=0:2", "--devices", "cuda:0", "--jobs", "2", "--out", tmp_path / "x") == 2
    )
    assert "--jobs: a fleet with devices has a process for each of them" in capsys.readouterr().err
    assert not (tmp_path / "x").exists()
