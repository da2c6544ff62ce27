"""The host's work beside a card's, counted on a card that is not there: waits, copies, launches, captures."""

import copy
import gc
import weakref
from unittest import mock

import numpy as np
import pytest

from fusemlp import DPSGD, MLP, SGD, Adam, Callback, Cosine, DataError, DivergenceError, Engine
from fusemlp.program import builder, layout, lowering
from fusemlp.runtime.programs import STEPS_A_GRAPH, BoundProgram
from fusemlp.training import fit as training_fit
from fusemlp_kernels import availability
from fusemlp_kernels.errors import BackendUnavailableError

if availability()["triton"] is not None:
    pytest.skip(f"triton: {availability()['triton']}", allow_module_level=True)

import torch
from torch import nn

from fusemlp.torch import fuse
from fusemlp_kernels.triton import launch

if not launch.is_interpreted():
    pytest.skip("triton: the counting card needs the interpreter", allow_module_level=True)

from counting_card import Card, Graph, counting, put

from make import assert_same

RNG = np.random.default_rng(0)
X, Y = RNG.standard_normal((43, 3)).astype(np.float32), RNG.integers(0, 2, 43)
OTHERS = RNG.standard_normal((43, 3)).astype(np.float32), RNG.integers(0, 2, 43)
BATCH = 4
STEPS = 11
REPLAYS = sum(divmod(STEPS, STEPS_A_GRAPH))


@pytest.fixture
def card():
    """Its kernels compute nothing."""
    with counting(computes=False) as found:
        yield found


@pytest.fixture
def computing():
    with counting(computes=True) as found:
        yield found


@pytest.fixture
def short_tables(monkeypatch):
    """Make tables of rates for four updates, fewer than an epoch has."""
    for module in (layout, builder):
        monkeypatch.setattr(module, "RATE_ROWS", 4)
    lowering.lowered.cache_clear()
    yield
    lowering.lowered.cache_clear()


def made(plan="graph", optimizer="adam", sizes=(3, 4, 2)):
    net = MLP(sizes)
    return Engine(net, optimizer=optimizer, batch_size=BATCH, backend="triton", plan=plan, normalise=False)


def of_an_epoch(card, engine, **options):
    """Return what a fit asks of the card outside its epochs, and what an epoch asks of it."""
    engine.fit(X, Y, epochs=1, **options)
    fits = []
    for epochs in (3, 4):
        with card.counted() as found:
            engine.fit(X, Y, epochs=epochs, **options)
        fits.append(found)
    names = ("waits", "bytes_read", "bytes_sent", "launches")
    epoch = Card(**{name: getattr(fits[1], name) - getattr(fits[0], name) for name in names})
    epoch.events = fits[1].events[len(fits[0].events) :]
    return Card(**{name: getattr(fits[0], name) - 3 * getattr(epoch, name) for name in names}), epoch


def test_a_callback_after_each_batch_gets_each_batch(computing):
    class Counting(Callback):
        batches = 0

        def on_batch_end(self, engine, batch):
            self.batches += 1
            assert engine.update_count == self.batches

    engines = made(), made("eager")
    for engine in engines:
        counting = Counting()
        engine.fit(X, Y, epochs=1, callbacks=[counting])
        assert counting.batches == STEPS
    assert computing.events.count("replay") == STEPS - 1
    assert_same(*(engine.memory.snapshot() for engine in engines))


@pytest.mark.parametrize("optimizer", [SGD(0.1), Adam(0.01)])
def test_an_epoch_waits_once_at_its_end_and_reads_less_than_a_kilobyte(card, optimizer):
    around, epoch = of_an_epoch(card, made(optimizer=optimizer))
    assert epoch.waits == 1 and epoch.events == ["replay"] * REPLAYS + ["wait"]
    assert epoch.bytes_read <= 1024
    # the rows of the epoch, and where to walk them
    assert epoch.bytes_sent == 8 * len(X) + 32
    # the number of updates before, twice
    assert around.waits == 2 and around.bytes_read <= 1024


def test_a_planted_wait_or_copy_from_pageable_memory_is_counted(card, monkeypatch):
    run_many = BoundProgram.run_many

    def impatient(self, count):
        run_many(self, count)
        float(self.arrays["stats"][0])

    with monkeypatch.context() as planted:
        planted.setattr(BoundProgram, "run_many", impatient)
        _, epoch = of_an_epoch(card, made())
    assert epoch.waits == 2 and epoch.events[-2:] == ["wait", "wait"]
    monkeypatch.setattr(launch.TritonDevice, "upload", lambda self, destination, source: destination.copy_(source))
    assert of_an_epoch(card, made())[1].waits == 3


def test_the_counts_do_not_depend_on_the_size_of_the_network(card):
    """The state to go back to stays on the card."""
    _, epoch = of_an_epoch(card, made(sizes=(3, 300, 2)))
    assert (epoch.waits, epoch.bytes_read) == (1, of_an_epoch(card, made())[1].bytes_read)


@pytest.mark.usefixtures("short_tables")
@pytest.mark.parametrize("optimizer", [Adam(0.01), Adam(0.01, accumulate=3)])
def test_a_table_of_rates_that_ends_in_an_epoch_is_filled_without_a_wait(card, optimizer):
    _, epoch = of_an_epoch(card, made(optimizer=optimizer))
    assert epoch.waits == 1 and epoch.bytes_sent > 8 * len(X) + 32


def test_the_best_weights_stay_on_the_card(card):
    _, epoch = of_an_epoch(card, made(), validation_data=OTHERS, early_stopping=50)
    # one more for the validation
    assert epoch.waits == 2 and epoch.bytes_read <= 1024


def three_fits(plan):
    """Train on two data sets of one shape, and on the first again, with all that keeps a state."""
    engine = made(plan, Adam(Cosine(0.05), accumulate=2, ema=0.5))
    first, second = (X[:7], Y[:7]), (OTHERS[0][:7], OTHERS[1][:7])
    engine.fit(*first, epochs=1)
    engine.fit(*second, epochs=1)
    engine.fit(*first, epochs=2, validation_data=second, early_stopping=1)
    return engine


@pytest.mark.usefixtures("short_tables")
def test_the_results_are_those_of_eager_steps():
    expected = three_fits("eager")
    with counting(computes=True) as card:
        engine = three_fits("graph")
        assert card.events.count("captured") == 1
        assert_same(engine.memory.snapshot(), expected.memory.snapshot())
        assert engine.history.history == expected.history.history
        assert_same(engine.best_parameters, expected.best_parameters)
        assert engine.best_parameters.keys() == engine.state_dict().keys()


def test_a_divergence_goes_back_to_the_state_before_the_epoch(computing):
    engine = made(optimizer=SGD(0.1))
    engine.fit(X[:8], Y[:8], epochs=1)
    before = engine.memory.snapshot()
    with pytest.raises(DivergenceError):
        engine.fit(np.full_like(X[:8], 1e30), Y[:8], epochs=2)
    assert "captured" in computing.events
    # hyper and counters are part of it
    assert_same(engine.memory.snapshot(), before)


def test_the_rows_of_the_next_epoch_are_drawn_before_the_wait(card, monkeypatch):
    drawn = training_fit.shuffled

    def draw(backend, plan, n, seed, epoch):
        card.events.append(("drawn", epoch))
        return drawn(backend, plan, n, seed, epoch)

    monkeypatch.setattr(training_fit, "shuffled", draw)
    engine = made()
    engine.fit(X, Y, epochs=1)
    with card.counted() as found:
        engine.fit(X, Y, epochs=3)
    # the first alone is drawn while the card is idle
    walk = [event for event in found.events if event == "wait" or event[0] == "drawn"][2:]
    assert walk == [("drawn", 1), ("drawn", 2), "wait", ("drawn", 3), "wait", "wait"]


@pytest.mark.parametrize("plan", ["graph", "eager"])
def test_an_engine_on_another_stream_waits_for_the_one_that_filled_it(card, plan):
    engine = made(plan)
    engine.step(X[:BATCH], Y[:BATCH])
    for stream, before in ((7, 0), (0, 7)):
        card.current = stream
        with card.counted() as found:
            engine.step(X[:BATCH], Y[:BATCH])
        assert found.events[0] == ("waits", stream, before)
        with card.counted() as later:
            engine.fit(X, Y, epochs=1)
            engine.predict(X)
        assert not [event for event in [*found.events[1:], *later.events] if event[0] == "waits"]
    card.current = 7
    # while the caller captures a graph, the stream before has no part in it
    with mock.patch.object(torch.cuda, "is_current_stream_capturing", lambda: True), card.counted() as found:
        assert engine.memory is not None and engine.inference is not None
    assert found.events == []


def test_another_fit_of_the_same_shapes_captures_nothing(card):
    engine = made()
    engine.fit(X, Y, epochs=1)
    for arrays in (OTHERS, (X, Y)):
        with card.counted() as found:
            engine.fit(*arrays, epochs=1)
        assert "captured" not in found.events and found.events.count("replay") == REPLAYS


@pytest.mark.parametrize(
    "change",
    [
        lambda engine: setattr(engine, "optimizer", Adam(0.01, weight_decay=0.1)),
        lambda engine: engine.take_batches_of(5),
        lambda engine: engine.release(),
    ],
    ids=["optimizer", "batch size", "release"],
)
def test_a_fit_after_a_change_captures_again(card, change):
    engine = made()
    engine.fit(X, Y, epochs=1)
    change(engine)
    with card.counted() as found:
        engine.fit(X, Y, epochs=1)
    assert "captured" in found.events


def test_private_fits_of_another_batch_size_are_bound_again(computing):
    """The largest batches that are drawn may have one size, where the noise is divided by another."""

    def trained(between):
        privacy = DPSGD(noise=1.0, clip=1.0, seed=2)
        net, options = MLP((3, 4, 2)), {"backend": "triton", "plan": "graph", "normalise": False}
        engine = Engine(net, optimizer=SGD(0.1), batch_size=7, privacy=privacy, **options)
        engine.fit(X[:12], Y[:12], epochs=1)
        sizes.append(engine.programs.last_fit.key[0][0].batch_size)
        between(engine)
        engine.fit(X[:12], Y[:12], epochs=1, batch_size=8)
        sizes.append(engine.programs.last_fit.key[0][0].batch_size)
        return engine

    sizes = []
    assert_same(trained(lambda engine: None).memory.snapshot(), trained(Engine.release).memory.snapshot())
    assert len(set(sizes)) == 1


def test_arrays_on_the_card_are_read_where_they_are(card):
    there, labels = RNG.standard_normal((43, 8)).astype(np.float32), put(Y)
    rows, engine, counts = put(there), made(sizes=(8, 4, 2)), []
    # the last at another place
    for given in (rows, rows, rows.clone()):
        with card.counted() as found:
            engine.fit(given, labels, epochs=1)
        counts.append(found)
    first, second, _ = counts
    assert max(first.bytes_read, second.bytes_read) < labels.nbytes
    assert second.bytes_sent < first.bytes_sent < there.nbytes + 40_000
    assert ["captured" in found.events for found in counts] == [True, False, True]


@pytest.mark.parametrize("streams", [False, True])
def test_the_engine_lets_go_of_arrays_with_their_owner(card, streams):
    engine = made(sizes=(8, 4, 2))
    data, labels = put(RNG.standard_normal((43, 8)).astype(np.float32)), put(Y)
    engine.fit(data, labels, epochs=1)
    if streams:
        engine.fit([(np.ones((4, 8), np.float32), Y[:4])], epochs=1)
    assert engine.programs.last_fit is not None
    del data
    gc.collect()
    assert engine.programs.last_fit is None


def test_probabilities_on_the_card_are_not_copied_back(card):
    soft = RNG.dirichlet((1.0, 1.0), 43).astype(np.float32)
    engine = made()
    engine.fit(X, put(soft), epochs=1)
    with card.counted() as found:
        engine.fit(X, put(soft), epochs=1)
    assert found.bytes_sent < 2 * X.nbytes
    wrong = soft.copy()
    wrong[3] *= 2.0
    with pytest.raises(DataError, match="sum"):
        engine.fit(X, put(wrong), epochs=1)


def pair(optimizer):
    """Return a fused step on the card, and the optimizer and the step of torch alone from the same parameters."""
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    other = copy.deepcopy(module)
    step = fuse(module, nn.CrossEntropyLoss(), optimizer(module.parameters()), backend="triton")
    usual, loss = optimizer(other.parameters()), nn.CrossEntropyLoss()

    def eager(x, y):
        usual.zero_grad()
        found = loss(other(x), y)
        found.backward()
        usual.step()
        return found.detach()

    return step, usual, eager


OPTIMIZERS = {
    "sgd": lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9),
    "adam": lambda parameters: torch.optim.Adam(parameters, lr=0.01),
    "groups": lambda parameters: torch.optim.Adam(
        [{"params": [one], "lr": 0.01 * (at + 1)} for at, one in enumerate(parameters)]
    ),
}


@pytest.mark.usefixtures("short_tables")
@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_a_fused_step_is_two_copies_and_a_replay(card, kind):
    step, _, _ = pair(OPTIMIZERS[kind])
    there = put(torch.randn(6, 3)), put(torch.randint(2, (6,)))
    step(*there), step(*there)
    launches = []
    for _ in range(8):
        with card.counted() as found:
            step(*there)
        assert found.waits == 0 and found.bytes_read == 0 and found.events == ["replay"]
        # now and then a table of rates is sent
        launches += [found.launches] * (not found.bytes_sent)
    # x, y, the replay, and the loss as a tensor of its own
    assert launches and set(launches) == {4}


@pytest.mark.parametrize("kind", ["sgd", "groups"])
def test_replayed_steps_are_torchs(computing, kind):
    step, _, eager = pair(OPTIMIZERS[kind])
    x, y = torch.randn(6, 3), torch.randint(2, (6,))
    for _ in range(4):
        np.testing.assert_allclose(float(step(put(x), put(y))), float(eager(x, y)), rtol=1e-5)
    assert computing.events.count("replay") == 3


def test_a_fused_step_on_another_stream_waits_for_the_one_before(card):
    step, _, _ = pair(OPTIMIZERS["adam"])
    there = put(torch.randn(6, 3)), put(torch.randint(2, (6,)))
    step(*there), step(*there)
    for events in ([("waits", 7, 0), "replay"], ["replay"]):
        card.current = 7
        with card.counted() as found:
            step(*there)
        assert found.events == events


def test_a_fused_step_that_returns_its_output_waits_for_nothing(card):
    step, _, _ = pair(OPTIMIZERS["adam"])
    there = put(torch.randn(6, 3)), put(torch.randint(2, (6,)))
    for at in range(3):
        with card.counted() as found:
            step(*there, return_output=True)
        assert at == 0 or (found.waits == 0 and "captured" not in found.events)


def test_a_changed_rate_reaches_the_graph(computing):
    step, usual, eager = pair(OPTIMIZERS["sgd"])
    x, y = torch.randn(6, 3), torch.randint(2, (6,))
    there = put(x), put(y)
    for at in range(4):
        for optimizer in (step.optimizer, usual):
            optimizer.param_groups[0]["lr"] = 0.1 / (at + 1)
        with computing.counted() as found:
            loss = step(*there)
        np.testing.assert_allclose(float(loss), float(eager(x, y)), rtol=1e-5)
        assert ("captured" in found.events) == (at == 1) and found.waits == (at == 1) + 7 * (at == 0)


@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.usefixtures("card")
def test_a_fused_program_is_in_no_ring(steps):
    """Its memory on the card is free when it is, before the garbage collector runs."""
    step, _, _ = pair(OPTIMIZERS["sgd"])
    for _ in range(steps):
        step(put(torch.randn(6, 3)), put(torch.randint(2, (6,))))
    (program,) = map(weakref.ref, step._programs._runnables.values())
    gc.disable()
    try:
        step._batches.clear(), step._programs._runnables.clear()
        assert program() is None
    finally:
        gc.enable()


def stopped(owner, name, call, *arguments):
    """Run a step that Ctrl-C ends before its launch."""
    with mock.patch.object(owner, name, side_effect=KeyboardInterrupt), pytest.raises(KeyboardInterrupt):
        call(*arguments)


@pytest.mark.usefixtures("short_tables", "computing")
def test_an_interrupted_step_is_no_update():
    """The table of rates that follows begins with the update that the card is at."""
    engine, eager = made(optimizer=Adam(0.05)), made("eager", Adam(0.05))
    for at in range(9):
        if at in (2, 3):
            stopped(next(iter(engine.programs.staged.values())), "run_many", engine.step, X[:4], Y[:4])
        assert float(engine.step(X[:4], Y[:4])) == float(eager.step(X[:4], Y[:4]))


@pytest.mark.usefixtures("short_tables", "computing")
def test_an_interrupted_fused_step_is_no_update():
    step, _, eager = pair(OPTIMIZERS["adam"])
    x, y = torch.randn(6, 3), torch.randint(2, (6,))
    for at in range(9):
        if at in (2, 3):
            (runnable,) = step._programs._runnables.values()
            stopped(runnable, "run", step, put(x), put(y))
        np.testing.assert_allclose(float(step(put(x), put(y))), float(eager(x, y)), rtol=1e-5)


def test_a_capture_is_on_a_stream_of_the_engines_device(card):
    engine = made()
    engine.fit(X, Y, epochs=1)
    backend = engine.memory.backend
    assert len(card.streams) == 2 and all(stream.device is backend._device.device for stream in card.streams)


def test_an_empty_graph_is_refused(card):
    with pytest.raises(BackendUnavailableError, match="empty"):
        made().memory.backend.capture(lambda: None, 1)


def test_a_step_inside_a_capture_of_the_callers_is_part_of_it(card):
    backend, ran = made().memory.backend, []
    card.capturing = Graph()
    replay = backend.capture(lambda: ran.append(card.start(lambda: None)), 3)
    replay()
    assert len(ran) == len(card.capturing.nodes) == 3 and not card.streams
    card.capturing = None
    replay()
    assert len(ran) == 6 and len(card.streams) == 1


def test_batches_and_steps_from_host_memory_wait_for_nothing(card):
    """The host gets the next batch while the card trains on the last."""
    batches = [(X[at : at + BATCH], Y[at : at + BATCH]) for at in range(0, 40, BATCH)]
    engine = made()
    waits = []
    for epochs in (1, 3, 4):
        with card.counted() as found:
            engine.fit(batches, epochs=epochs)
        waits.append(found.waits)
    # the one at the end of the epoch
    assert waits[2] - waits[1] == 1
    for at in range(4):
        with card.counted() as found:
            engine.step(X[:BATCH], Y[:BATCH])
        assert at < 2 or (found.waits == 0 and found.events == ["replay"])


def test_large_arrays_go_to_the_card_in_parts(card, monkeypatch):
    monkeypatch.setattr(launch, "UPLOAD_BYTES", 64)
    backend = made().memory.backend
    for shape in ((43, 3), (43,), (1, 300), (0, 3)):
        host = RNG.standard_normal(shape).astype(np.float32)
        with card.counted() as found:
            there = backend.from_host(host)
        assert there.shape == shape
        np.testing.assert_array_equal(backend.to_host(there), host)
        # the host runs ahead of the card by two parts; a part has a row at least
        parts = -(-len(host) // max(1, 64 // max(1, host[:1].nbytes)))
        assert found.waits == max(0, parts - 2)
