"""Processes that cannot train together are told before they begin."""

import logging
import re
import threading

import numpy as np
import pytest
import worlds

from fusemlp import (
    DPSGD,
    MLP,
    SGD,
    Adam,
    ArgumentError,
    ArgumentTypeError,
    DistributedError,
    DivergenceError,
    Engine,
    MissingLibraryError,
    ParameterOptions,
    load_checkpoint,
)
from fusemlp.program.program import Sharding
from fusemlp.runtime import ranks
from fusemlp.runtime.plans import planned
from fusemlp.runtime.ranks import Ranks

distributed = pytest.importorskip("torch.distributed")


def test_ordered_sums_are_for_numbers_of_ranks_that_divide_the_shards():
    assert [Sharding("ordered", world).check().own for world in (1, 2, 4, 8)] == [8, 4, 2, 1]
    with pytest.raises(
        ArgumentError, match=r"reduce: 'ordered' adds 8 shards .* there are 3; .* or give reduce='fast'"
    ):
        Sharding("ordered", 3).check()
    assert Sharding("fast", 3).check().own == 1


def test_the_plan_shows_what_a_rank_receives():
    program, _ = planned(MLP([64, 64, 10]), optimizer=Adam(clip_norm=1.0), batch_size=64, backend="numpy", devices=4)
    text = str(program)
    assert [line.split()[1] for line in text.splitlines()[1:-1]][-2:] == ["all_reduce", "update"]
    # three times 4,810 parameters of 4 bytes, and the statistics
    assert "all_reduce ordered, 4 ranks" in text and "receives 57.9kB by all_reduce from the others" in text


def test_slices_of_the_optimizers_state_are_gone():
    for make in (Engine, Engine.from_pretrained, load_checkpoint):
        with pytest.raises(ArgumentTypeError, match=r"^shard_optimizer: it is gone: each process keeps the whole"):
            make(MLP([3, 2]), backend="numpy", shard_optimizer=True)


def test_a_process_that_torchrun_has_not_started_is_told(monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(ArgumentError, match=r"torchrun has not started this process \(no RANK"):
        Engine(MLP([3, 2]), backend="numpy", distributed=True)


def test_how_to_add_gradients_is_for_several_processes():
    with pytest.raises(ArgumentError, match=r"^reduce: 'fast' adds .* trains alone; start it by torchrun"):
        Engine(MLP([3, 2]), backend="numpy", reduce="fast")


def test_a_port_in_use_is_said_so(monkeypatch):
    with worlds.held_port() as port:
        worlds.as_rank(monkeypatch, port=port)
        with pytest.raises(
            DistributedError, match=r"the 1 ranks did not meet at .* the port is in use; give another one"
        ):
            Ranks(timeout=2.0)


def notices():
    return [one for one in threading.enumerate() if isinstance(one, threading.Timer) and not one.finished.is_set()]


def test_a_process_that_waits_for_others_says_so_and_how_to_run_alone(monkeypatch, caplog):
    port = worlds.free_port()
    worlds.as_rank(monkeypatch, port=port, world=2)
    monkeypatch.setattr(ranks, "SILENT_SECONDS", 0.1)
    alone = r"to run in one process, unset RANK WORLD_SIZE MASTER_ADDR MASTER_PORT, or write env -u WORLD_SIZE"
    with pytest.raises(
        DistributedError, match=rf"the 2 ranks did not meet at .* within 1 s; see that all of them .*; {alone}"
    ):
        Ranks(timeout=1.0)
    (said,) = [record for record in caplog.records if record.name == "fusemlp"]
    expected = rf"distributed: rank 0 waits up to 1 s for 2 ranks at 127.0.0.1:{port}, because WORLD_SIZE is 2; {alone}"
    assert re.match(expected, said.getMessage())
    assert said.levelno == logging.WARNING and not notices()


def test_processes_that_meet_say_nothing(monkeypatch, caplog):
    worlds.as_rank(monkeypatch, port=worlds.free_port())
    monkeypatch.setattr(ranks, "SILENT_SECONDS", 100.0)
    try:
        Ranks(timeout=20.0)
        assert not notices() and not [record for record in caplog.records if record.name == "fusemlp"]
    finally:
        distributed.destroy_process_group()


def test_a_collective_that_fails_on_all_ranks_is_told(monkeypatch):
    def fail():
        raise RuntimeError("invalid size")

    worlds.as_rank(monkeypatch, port=worlds.free_port())
    try:
        with pytest.raises(DistributedError, match=r"failed on all 1 ranks; see their own messages \(invalid size\)"):
            Ranks(timeout=5.0)._collective(fail)
    finally:
        distributed.destroy_process_group()


def test_gradients_whose_sum_overflows_are_a_divergence_and_no_warning(monkeypatch):
    worlds.as_rank(monkeypatch, port=worlds.free_port())
    # finite in each shard, and not in their sum
    X, y = np.full((16, 3), 100.0), np.full((16, 3), 1e37)
    try:
        engine = Engine(MLP([3, 3]), "mse", SGD(), batch_size=16, backend="numpy", normalise=False, distributed=True)
        with pytest.raises(DivergenceError):
            engine.fit(X, y, epochs=1)
    finally:
        distributed.destroy_process_group()


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
        ({"backend": "triton", "plan": "resident"}, ArgumentError, "plan: the resident kernel trains on one card"),
    ],
)
def test_what_cannot_be_distributed_is_refused_before_the_processes_meet(given, error, said, monkeypatch):
    if "backend" in given:
        pytest.importorskip("triton")
    worlds.as_rank(monkeypatch)
    with pytest.raises(error, match=said):
        Engine(MLP([3, 2]), **{"backend": "numpy", "distributed": True, **given})


def test_torch_is_needed_for_several_processes_alone(monkeypatch):
    def missing(name):
        raise ImportError(f"No module named {name!r}")

    worlds.as_rank(monkeypatch)
    monkeypatch.setattr(ranks, "import_module", missing)
    with pytest.raises(
        MissingLibraryError, match=r"distributed: it needs torch, .*; install it with pip install torch"
    ):
        Engine(MLP([3, 2]), backend="numpy", distributed=True)


@pytest.mark.parametrize(("rank", "world"), [("abc", "2"), ("0", "two"), ("2", "2"), ("-1", "2"), ("0", "0")])
def test_numbers_that_torchrun_does_not_set_are_refused_at_once(rank, world, monkeypatch):
    worlds.as_rank(monkeypatch)
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setenv("WORLD_SIZE", world)
    with pytest.raises(ArgumentError, match=f"got RANK='{rank}' and WORLD_SIZE='{world}'; start the processes by"):
        Engine(MLP([3, 2]), backend="numpy", distributed=True)
