"""The choice of a card and of the way between cards, and the host's work beside them, on a card that is not there."""

import gc
import os
import weakref
from contextlib import nullcontext
from types import SimpleNamespace
from weakref import WeakSet

import numpy as np
import pytest
import worlds

from fusemlp_kernels import availability

if availability()["triton"] is not None or os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("for Triton's interpreter: TRITON_INTERPRET=1", allow_module_level=True)

import torch
from counting_card import OnCard, counting, put
from torch import distributed

from fusemlp import MLP, Adam, ArgumentError, BackendUnavailableError, DistributedError, Engine, MissingLibraryError
from fusemlp.program.program import Sharding
from fusemlp.runtime import plans, programs, ranks, session
from fusemlp.runtime.plans import ASKED, open_here, planned, shared_plan
from fusemlp.runtime.programs import STEPS_A_GRAPH
from fusemlp.runtime.ranks import Ranks
from fusemlp.runtime.steps import LAYERS
from fusemlp_kernels.registry import TRAITS
from fusemlp_kernels.triton import grouped
from fusemlp_kernels.triton.backend import TritonBackend
from make import assert_same

RNG = np.random.default_rng(0)
X, Y = RNG.standard_normal((43, 3)).astype(np.float32), RNG.integers(0, 2, 43)
STEPS = 11


@pytest.fixture
def card():
    with counting(computes=False) as found:
        yield found


class Pair(Ranks):
    """The ranks of rank 0 of two, the other of which has the same of everything; counts its collectives."""

    rank, world, leads = 0, 2, True

    def __init__(self, card):
        self.card = card
        self.programs = WeakSet()
        self._failed = False
        # whether the other says yes when it is asked next
        self.once = False

    def uncaptured(self):
        return None

    def all_gather(self, into, own):
        assert isinstance(into, OnCard) and isinstance(own, OnCard)
        self.card.events.append("collective")
        for place in range(self.world):
            into[place].copy_(own)

    def add(self, *arrays):
        self.card.events.append("collective")
        for array in arrays:
            assert isinstance(array, OnCard)
            array.mul_(2.0)

    def any(self, *flags):
        once, self.once = self.once, False
        return [flag or once for flag in flags]

    def of_first(self, values):
        return dict(values)

    def check_same(self, things):
        pass

    def take_card(self, device):
        pass

    def check_equal(self, mark):
        assert len(np.concatenate(mark)) == 2


def made(card, monkeypatch, **options):
    monkeypatch.setattr(session, "joined", lambda timeout: Pair(card))
    monkeypatch.setattr(session, "check_nccl", lambda: None)
    given = {"optimizer": "adam", "batch_size": 4, "backend": "triton", "normalise": False, "distributed": True}
    net = MLP((3, 4, 2), dropout=options.pop("dropout", 0.0))
    return Engine(net, **{**given, **options})


@pytest.mark.parametrize("options", [{}, {"reduce": "fast"}])
def test_an_epoch_waits_once_and_a_step_has_its_collective_in_the_graph(card, monkeypatch, options):
    engine = made(card, monkeypatch, **options)
    assert engine.plan == "graph" and "in a graph" in engine.plan_reason
    with card.counted() as first:
        engine.fit(X, Y, epochs=1)
    # a step by itself, which makes NCCL ready, and the captures: of several steps, and of one
    assert first.events.count("captured") == 2
    assert first.events.count("collective") == 1 + STEPS_A_GRAPH + 1
    found = []
    for epochs in (2, 3):
        with card.counted() as one:
            engine.fit(X, Y, epochs=epochs)
        found.append(one)
    assert found[1].waits - found[0].waits == 1
    events = found[1].events[len(found[0].events) :]
    assert events == ["replay"] * sum(divmod(STEPS, STEPS_A_GRAPH)) + ["wait"]
    assert found[1].bytes_read - found[0].bytes_read <= 1024
    # all ranks have the rows of the epoch
    assert found[1].bytes_sent - found[0].bytes_sent == 8 * len(X) + 32


def test_the_memory_of_a_program_is_free_when_it_is_given_back(card, monkeypatch):
    engine = made(card, monkeypatch)
    engine.fit(X, Y, epochs=1)
    assert engine.programs.last_fit is not None
    program = weakref.ref(engine.programs.last_fit.bound)
    gc.disable()
    try:
        engine.release()
        assert program() is None
    finally:
        gc.enable()


def test_all_ranks_replay_their_graphs_or_none(card, monkeypatch):
    engine = made(card, monkeypatch)
    engine.fit(X, Y, epochs=1)
    with card.counted() as found:
        engine.fit(X, Y, epochs=1)
    assert "captured" not in found.events
    # the other has other arrays on its card, say
    monkeypatch.setattr(engine.ranks, "once", True)
    with card.counted() as found:
        engine.fit(X, Y, epochs=1)
    assert "captured" in found.events


def test_each_shard_has_a_mask_of_its_own_forward_and_back(card, monkeypatch):
    bind, masks = TritonBackend.bind, {"linear": [], "grad_input": []}

    def bound(self, op, **operands):
        if op in masks:
            masks[op].append(operands["dropout"].layer)
        return bind(self, op, **operands)

    monkeypatch.setattr(TritonBackend, "bind", bound)
    made(card, monkeypatch, dropout=0.3).fit(X, Y, epochs=1)
    # rank 0 of two has the first 4 of 8
    assert masks["linear"] == masks["grad_input"] == [LAYERS * shard for shard in range(4)]


@pytest.mark.usefixtures("alone")
def test_kernels_know_the_memory_of_the_gradients_of_shards(monkeypatch):
    """Else a launch with a matrix of 3 columns takes the slow path."""
    engine = Engine(MLP((3, 4, 2)), batch_size=43, backend="triton", plan="eager", normalise=False, distributed=True)
    aligned, collect = [], grouped._collect

    def collected(*given):
        aligned.append((found := collect(*given)).aligned)
        return found

    monkeypatch.setattr(grouped, "_collect", collected)
    engine.fit(X, Y, epochs=1)
    assert aligned == [True] * engine.sharding.own


def test_graphs_end_before_nccl_does(card, monkeypatch):
    engine = made(card, monkeypatch)
    engine.fit(X, Y, epochs=1)
    last = engine.programs.last_fit
    assert last is not None and last.bound._graphs
    left = []
    pretended = SimpleNamespace(
        is_initialized=lambda: True, destroy_process_group=lambda: left.append(len(last.bound._graphs))
    )
    monkeypatch.setattr(ranks, "_all", [engine.ranks])
    ranks._leave(pretended)
    assert left == [0]


def test_batches_that_come_one_by_one_wait_for_nothing(card, monkeypatch):
    engine = made(card, monkeypatch)
    batches = [(X[at : at + 4], Y[at : at + 4]) for at in range(0, 40, 4)]
    waits = []
    for epochs in (1, 3, 4):
        with card.counted() as found:
            engine.fit(batches, epochs=epochs)
        waits.append(found.waits)
    assert waits[2] - waits[1] == 1


@pytest.mark.parametrize("given", [{}, {"accumulate": 2, "clip_norm": 0.1}])
def test_replayed_steps_have_the_bits_of_eager_ones(monkeypatch, given):
    monkeypatch.setattr(programs, "STEPS_A_GRAPH", 2)
    found = []
    for plan in ("eager", "graph"):
        with counting(computes=True) as card:
            engine = made(card, monkeypatch, plan=plan, optimizer=Adam(0.05, **given))
            # one step, a graph of two, and one of one
            engine.fit(X[:14], Y[:14], epochs=1)
            assert ("captured" in card.events) == (plan == "graph")
            found.append(engine.memory.snapshot())
    assert_same(*found)


def a_backend(name, device, precision):
    """A machine with two cards."""
    if device not in (None, "cuda:0", "cuda:1"):
        raise BackendUnavailableError(f"device: expected 'cuda:0' to 'cuda:1', got {device!r}")
    default = "cpu" if name == "numpy" else "cuda:0"
    return SimpleNamespace(traits=TRAITS[name], device=device or default)


def test_a_process_takes_the_card_of_its_number(monkeypatch):
    monkeypatch.setattr(plans, "open_backend", a_backend)
    assert open_here("triton", None, "fp32").device == "cuda:0"
    worlds.as_rank(monkeypatch, 1, 4)
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert open_here("triton", None, "fp32").device == "cuda:1"
    assert open_here("triton", "cuda:0", "fp32").device == "cuda:0"
    assert open_here("numpy", None, "fp32").device == "cpu"
    # a process that sees fewer cards, its own alone perhaps
    worlds.as_rank(monkeypatch, 2, 4)
    monkeypatch.setenv("LOCAL_RANK", "2")
    assert open_here("triton", None, "fp32").device == "cuda:0"


@pytest.mark.usefixtures("alone")
def test_arrays_on_cards_go_by_nccl_and_others_by_gloo(monkeypatch):
    made, new_group = [], distributed.new_group

    def group(backend, timeout):
        made.append(backend)
        return new_group(backend="gloo", timeout=timeout)

    monkeypatch.setattr(distributed, "new_group", group)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid=f"of {device}"))
    monkeypatch.setattr(distributed, "is_nccl_available", lambda: False)
    with pytest.raises(MissingLibraryError, match=r"by NCCL, and this build of torch has none; .* backend='numpy'"):
        ranks.check_nccl()
    found = ranks.joined(11.0)
    # once for all engines
    for _ in range(2):
        assert ranks.joined(11.0) is found
        found.take_card("cuda:0")
    assert made == ["gloo", "nccl"]
    assert found._group_of(put(X)) is found._cards is not found._group
    assert found._group_of(X) is found._group_of(torch.zeros(3)) is found._group


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize("fails", [False, True])
def test_nccl_is_aborted_where_a_collective_has_failed(monkeypatch, fails):
    found, done = ranks.Ranks(13.0), []

    def collective():
        if fails:
            raise RuntimeError("the other is gone")

    with pytest.raises(DistributedError) if fails else nullcontext():
        found._collective(collective)
    found._cards = SimpleNamespace(abort=lambda: done.append("aborted"))
    monkeypatch.setattr(ranks, "_all", [found])
    ranks._leave(SimpleNamespace(is_initialized=lambda: True, destroy_process_group=lambda: done.append("destroyed")))
    assert done == ["aborted"] * fails + ["destroyed"]


@pytest.mark.usefixtures("alone")
def test_a_card_that_two_ranks_have_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid="7"))
    found = ranks.Ranks(12.0)
    monkeypatch.setattr(found, "texts", lambda text: ["another", text, text])
    with pytest.raises(ArgumentError, match=r"^device: ranks 1 and 2 have one card, card 7 of .*; leave device out"):
        found.take_card("cuda:1")


def test_ranks_compare_their_backends_before_they_take_cards(card, monkeypatch):
    """One whose backend is another takes none, and would not answer."""
    done = []
    monkeypatch.setattr(Pair, "check_same", lambda self, things: done.append(things["backend"]))
    monkeypatch.setattr(Pair, "take_card", lambda self, device: done.append(device))
    made(card, monkeypatch)
    assert done == ["triton", "cuda:0"]


def test_the_plan_of_several_processes_is_said_or_refused():
    triton, sharding = TRAITS["triton"], Sharding("ordered", 2)
    assert shared_plan(("resident", "fast"), triton, sharding)[0] == "graph"
    plan, reason = shared_plan(("resident", "fast"), triton, sharding, "no graph here")
    assert plan == "eager" and reason.endswith("one after another: no graph here")
    assert shared_plan(("eager", ASKED), triton, sharding) == ("eager", ASKED)
    with pytest.raises(BackendUnavailableError, match=r"^plan: there is no graph of a distributed step: no graph here"):
        shared_plan(("graph", ASKED), triton, sharding, "no graph here")


def test_the_plan_of_cards_is_printed_without_one():
    net, given = MLP([64, 64, 10]), {"batch_size": 64, "backend": "triton", "devices": 4}
    program, chosen = planned(net, optimizer="adam", **given)
    text = str(program)
    assert [line.split()[1] for line in text.splitlines()[1:-1]][-3:] == ["grad_weight", "all_reduce", "update"]
    # 4 calls of each of a rank's 2 shards, and the update
    assert text.endswith("9 launches")
    assert chosen is not None and chosen[0] == "graph" and "ordered, 4 ranks" in chosen[1]
    with pytest.raises(BackendUnavailableError, match=r"^devices: the cupy backend trains in one process so far; use"):
        planned(net, **{**given, "backend": "cupy"})
