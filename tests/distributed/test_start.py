"""Processes that cannot train together are told before they begin."""

from __future__ import annotations

import pytest
import worlds

from fusemlp import (
    DPSGD,
    MLP,
    SGD,
    ArgumentError,
    BackendUnavailableError,
    DistributedError,
    Engine,
    MissingLibraryError,
    ParameterOptions,
)
from fusemlp.program.sharding import Sharding
from fusemlp.runtime import ranks
from fusemlp.runtime.ranks import VARIABLES, Ranks

pytest.importorskip("torch")


def as_rank(monkeypatch: pytest.MonkeyPatch, port: int, world: int = 1) -> None:
    for name, value in zip(VARIABLES, ("0", str(world), "127.0.0.1", str(port)), strict=True):
        monkeypatch.setenv(name, value)


def test_ordered_sums_are_for_numbers_of_ranks_that_divide_the_shards() -> None:
    assert [Sharding("ordered", world).check().own for world in (1, 2, 4, 8)] == [8, 4, 2, 1]
    with pytest.raises(
        ArgumentError, match=r"reduce: 'ordered' adds 8 shards .* there are 3; .* or give reduce='fast'"
    ):
        Sharding("ordered", 3).check()
    assert Sharding("fast", 3).check().own == 1


def test_a_process_that_torchrun_has_not_started_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(ArgumentError, match=r"torchrun has not started this process \(no RANK"):
        Engine(MLP([3, 2]), backend="numpy", distributed=True)


def test_how_to_add_gradients_is_for_several_processes() -> None:
    with pytest.raises(ArgumentError, match=r"^reduce: 'fast' adds .* trains alone; start it by torchrun"):
        Engine(MLP([3, 2]), backend="numpy", reduce="fast")


def test_a_port_in_use_is_said_so(monkeypatch: pytest.MonkeyPatch) -> None:
    with worlds.held_port() as port:
        as_rank(monkeypatch, port)
        with pytest.raises(
            DistributedError, match=r"the 1 ranks did not meet at .* the port is in use; give another one"
        ):
            Ranks(timeout=2.0)


def test_ranks_that_do_not_come_are_waited_for_up_to_the_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    as_rank(monkeypatch, worlds.free_port(), world=2)
    with pytest.raises(DistributedError, match=r"the 2 ranks did not meet at .* within 1 s; see that all of them"):
        Ranks(timeout=1.0)


FROZEN = SGD(per_parameter={"*": ParameterOptions(trainable=False)})


@pytest.mark.parametrize(
    ("given", "error", "said"),
    [
        ({"distributed": 2}, TypeError, "distributed: "),
        ({"reduce": "tree"}, ArgumentError, "reduce: unknown name 'tree'"),
        ({"timeout": 0}, ArgumentError, "timeout: "),
        ({"plan": "eager"}, ArgumentError, "plan: a distributed step is two launches"),
        ({"privacy": DPSGD(1.0, 1.0)}, ArgumentError, "privacy: a private engine trains in one process so far"),
        ({"optimizer": FROZEN}, ArgumentError, "distributed: the optimizer trains no parameter"),
        (
            {"backend": "triton"},
            BackendUnavailableError,
            "distributed: the triton backend trains in one process so far",
        ),
    ],
)
def test_what_cannot_be_distributed_is_refused_before_the_processes_meet(
    given: dict[str, object], error: type[Exception], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if "backend" in given:
        pytest.importorskip("triton")
    as_rank(monkeypatch, 1)
    with pytest.raises(error, match=said):
        Engine(MLP([3, 2]), **{"backend": "numpy", "distributed": True, **given})


def test_torch_is_needed_for_several_processes_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> None:
        raise ImportError(f"No module named {name!r}")

    as_rank(monkeypatch, 1)
    monkeypatch.setattr(ranks, "import_module", missing)
    with pytest.raises(
        MissingLibraryError, match=r"distributed: it needs torch, .*; install it with pip install torch"
    ):
        Engine(MLP([3, 2]), backend="numpy", distributed=True)
