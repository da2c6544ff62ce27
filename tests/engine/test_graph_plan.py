"""The order of events under the plan "graph", with fake graphs that record captures and run them again.

Only a GPU can show that a captured graph computes the same as its launches: ``tests/kernels/test_gpu.py``.
"""

import dataclasses

import numpy as np
import pytest

from fusemlp import MLP, SGD, Callback, Engine
from fusemlp.runtime.programs import STEPS_A_GRAPH
from fusemlp_kernels import availability

if availability()["triton"] is not None:
    pytest.skip(f"triton: {availability()['triton']}", allow_module_level=True)

from fusemlp_kernels.triton import launch
from fusemlp_kernels.triton.backend import TritonBackend

if not launch.is_interpreted():
    pytest.skip("triton: a GPU has graphs of its own", allow_module_level=True)

RNG = np.random.default_rng(0)
X, Y = RNG.standard_normal((43, 3)).astype(np.float32), RNG.integers(0, 2, 43)
BATCH = 4  # 10 whole batches and one of three rows


@pytest.fixture
def events(monkeypatch):
    """Return the captures and the replays, as numbers of steps."""
    happened = []

    def capture(self, run, times):
        happened.append(("captured", times))

        def replay():
            happened.append(("replayed", times))
            for _ in range(times):
                run()

        return replay

    build = TritonBackend.__init__

    def with_graphs(self, traits, device, precision):
        build(self, traits, device, precision)
        self.traits = dataclasses.replace(self.traits, plans=("eager", "graph"))

    monkeypatch.setattr(TritonBackend, "__init__", with_graphs)
    monkeypatch.setattr(TritonBackend, "capture", capture)
    return happened


def trained(plan, epochs=2, callbacks=()):
    engine = Engine(MLP([3, 4, 2]), optimizer=SGD(0.1), batch_size=BATCH, backend="triton", plan=plan)
    engine.fit(X, Y, epochs=epochs, callbacks=callbacks)
    return engine


def assert_same(first, second):
    for name, array in first.memory.snapshot().items():
        np.testing.assert_array_equal(array, second.memory.snapshot()[name], err_msg=name)


def test_the_first_step_loads_the_kernels_and_the_others_are_replayed_several_at_a_time(events):
    engine = trained("graph")
    steps = 11 * 2
    assert engine.plan == "graph" and engine.update_count == steps
    assert [times for event, times in events if event == "captured"] == [STEPS_A_GRAPH, 1]
    # Each epoch walks over the rows anew; the very first step runs without a graph.
    first, second = divmod(10, STEPS_A_GRAPH), divmod(11, STEPS_A_GRAPH)
    wanted = [STEPS_A_GRAPH] * first[0] + [1] * first[1] + [STEPS_A_GRAPH] * second[0] + [1] * second[1]
    assert [times for event, times in events if event == "replayed"] == wanted
    assert_same(engine, trained("eager"))


def test_a_callback_after_each_batch_gets_each_batch(events):
    class Counting(Callback):
        batches = 0

        def on_batch_end(self, engine, batch):
            assert engine.update_count == self.batches + 1
            self.batches += 1

    counting = Counting()
    engine = trained("graph", epochs=1, callbacks=[counting])
    assert counting.batches == 11 and {times for _, times in events} == {1}
    assert_same(engine, trained("eager", epochs=1))


def test_steps_by_hand_are_replayed_too(events):
    graph, eager = (
        Engine(MLP([3, 4, 2]), optimizer=SGD(0.1), batch_size=BATCH, backend="triton", plan=plan)
        for plan in ("graph", "eager")
    )
    for rows in (slice(0, 4), slice(4, 8), slice(8, 11)):
        assert float(graph.step(X[rows], Y[rows])) == float(eager.step(X[rows], Y[rows]))
    assert events == [("captured", 1), ("replayed", 1), ("replayed", 1)]
    assert_same(graph, eager)


def test_two_fits_do_not_share_a_graph(events):
    """The second fit has data at other addresses, so it captures its own graphs."""
    engine = trained("graph", epochs=1)
    other = trained("eager", epochs=1)
    captured = [event for event in events if event[0] == "captured"]
    for each in (engine, other):
        each.fit(X[:40], Y[:40], epochs=1)
    assert len([event for event in events if event[0] == "captured"]) == 2 * len(captured)
    assert_same(engine, other)
