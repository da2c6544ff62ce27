"""The table of learning rates: any schedule on any plan, filled again wherever a launch or a graph comes to its end."""

import dataclasses
from dataclasses import dataclass
from types import SimpleNamespace

import numpy as np
import pytest

from fusemlp import MLP, SGD, Adam, Cosine, Engine, Fleet, OneCycle, load_checkpoint
from fusemlp.describe.optimizers import SCHEDULES, Constant, Schedule
from fusemlp.program import builder, layout, lowering
from fusemlp.runtime.memory import RateTable
from fusemlp.runtime.plans import open_backend
from fusemlp_kernels import reference
from fusemlp_kernels.clock import corrections
from fusemlp_kernels.contract import HYPER, LEARNING_RATE, LOSS_SCALE, RATE_COLUMNS, LossSpec, UpdateRule
from fusemlp_kernels.registry import availability, interprets_triton
from make import assert_same, layers_of

ROWS, WIDTH, CLASSES, BATCH, EPOCHS = 22, 5, 3, 4, 3
RNG = np.random.default_rng(0)
X = RNG.standard_normal((ROWS, WIDTH)).astype(np.float32)
Y = RNG.integers(0, CLASSES, ROWS)
NET = MLP([WIDTH, 7, CLASSES], activation="tanh")

without_interpreter = availability()["triton"] is not None or not interprets_triton()
PLANS = [
    ("numpy", "eager"),
    ("numpy", "resident"),
    *(
        pytest.param("triton", plan, marks=pytest.mark.skipif(without_interpreter, reason="TRITON_INTERPRET=1"))
        for plan in ("eager", "graph", "resident")
    ),
]


@dataclass(frozen=True)
class Zigzag(Schedule):
    """A schedule of a user's own: no two neighbours are the same, and one in three is zero."""

    kind = "zigzag"
    lr: float

    def after_warmup(self, t):
        return self.lr * (t % 3) / (1.0 + 0.1 * t)


@pytest.fixture
def graphs(monkeypatch):
    """Under the interpreter a graph is its launches again."""
    if without_interpreter:
        return
    from fusemlp_kernels.triton.backend import TritonBackend

    build = TritonBackend.__init__

    def with_graphs(self, traits, device, precision):
        build(self, traits, device, precision)
        self.traits = dataclasses.replace(self.traits, plans=("eager", "graph", "resident"))

    def capture(self, run, times):
        return lambda: [run() for _ in range(times)]

    monkeypatch.setattr(TritonBackend, "__init__", with_graphs)
    monkeypatch.setattr(TritonBackend, "capture", capture)


@pytest.fixture
def small(monkeypatch):
    """Set the rows of the tables of new engines."""

    def rows(count):
        for module in (layout, builder):
            monkeypatch.setattr(module, "RATE_ROWS", count)
        # programs that are remembered have tables of another size
        lowering.lowered.cache_clear()

    yield rows
    lowering.lowered.cache_clear()


def made(optimizer, backend="numpy", plan="eager", precision="fp32"):
    return Engine(NET, optimizer=optimizer, batch_size=BATCH, backend=backend, plan=plan, precision=precision)


def same(engine, other):
    assert_same(engine.memory.snapshot(), other.memory.snapshot())
    assert engine.history.history == other.history.history


@pytest.mark.usefixtures("graphs")
@pytest.mark.parametrize(("backend", "plan"), PLANS)
def test_a_schedule_of_ones_own_trains_on_every_plan(backend, plan, small):
    """Against the oracle, with the rates written here once more."""
    small(4)
    engine = made(Adam(Zigzag(0.02, warmup=4)), backend, plan)
    first = {name: array.astype(np.float64) for name, array in engine.state_dict().items()}
    history = engine.fit(X, Y, epochs=EPOCHS, shuffle=False)
    layers = layers_of(NET, first)
    rule, spec = engine.optimizer.rule(), LossSpec("cross_entropy")
    state, batches = reference.initial_state(rule, layers), -(-ROWS // BATCH)

    def rate(t):
        s = max(t - 4, 0)
        return min((t + 1) / 4, 1.0) * 0.02 * (s % 3) / (1.0 + 0.1 * s)

    for t in range(EPOCHS * batches):
        rows = slice(t % batches * BATCH, t % batches * BATCH + BATCH)
        batch = reference.Batch(X[rows].astype(np.float64), Y[rows])
        _, layers, state = reference.train_step(layers, state, spec, rule, t, rate(t), batch)
    for index, layer in enumerate(layers):
        # what some dozen steps in float32 leave; one rate that is another's is a hundred times as far away
        np.testing.assert_allclose(engine.state_dict()[f"{2 * index}.weight"], layer.w, atol=2e-5)
        np.testing.assert_allclose(engine.state_dict()[f"{2 * index}.bias"], layer.b, atol=2e-5)
    assert history.history["learning_rate"] == [rate((epoch + 1) * batches) for epoch in range(EPOCHS)]


OPTIMIZERS = {
    "one cycle": Adam(OneCycle(0.05, warmup=3)),
    "past its end": SGD(Cosine(0.1, final=0.01, steps=7), momentum=0.9),
    "accumulated": Adam(Cosine(0.05), accumulate=3, clip_norm=0.5),
    "constant after a warm-up": SGD(Constant(0.1, warmup=5)),
    "constant, of adam": Adam(0.01),
}


@pytest.mark.parametrize(("backend", "plan"), PLANS[:2])
@pytest.mark.parametrize("optimizer", OPTIMIZERS.values(), ids=OPTIMIZERS)
@pytest.mark.parametrize("rows", [2, 5])
def test_a_table_that_is_filled_again_changes_no_bit(optimizer, rows, backend, plan, small, epochs=EPOCHS):
    whole = made(optimizer, backend, plan)
    small(rows)
    cut = made(optimizer, backend, plan)
    for engine in (whole, cut):
        engine.fit(X, Y, epochs=epochs)
    assert cut.memory.rates.shape[0] == rows + 1
    same(cut, whole)


@pytest.mark.usefixtures("graphs")
@pytest.mark.parametrize(("backend", "plan"), PLANS[2:])
def test_a_table_filled_between_launches_and_graphs_changes_no_bit(backend, plan, small):
    test_a_table_that_is_filled_again_changes_no_bit(OPTIMIZERS["one cycle"], 2, backend, plan, small, epochs=1)


@pytest.mark.parametrize("rows", [2, 1024])
def test_the_models_of_a_fleet_have_tables_of_their_own(rows, small):
    small(rows)
    vary = {"lr": [Zigzag(0.1), OneCycle(0.05), 0.1]}
    fleet = Fleet(NET, optimizer=SGD(momentum=0.9), batch_size=BATCH, vary=vary, backend="numpy")
    results = fleet.fit(X, Y, epochs=EPOCHS)
    for index, rate in enumerate(vary["lr"]):
        alone = Engine(NET, optimizer=SGD(rate, momentum=0.9), batch_size=BATCH, backend="numpy")
        alone.fit(X, Y, epochs=EPOCHS)
        same(results.engine(index), alone)


@pytest.mark.skipif(without_interpreter, reason="TRITON_INTERPRET=1")
def test_a_skipped_batch_keeps_its_rate(small):
    """Twice the loss scale is so large that gradients overflow in fp16 until it has come down."""
    small(3)
    engine = made(Adam(Zigzag(0.01)), "triton", "eager", "fp16")
    schedule, skipped = engine.optimizer.schedule, []
    for step in range(16):
        if step in (0, 9):
            engine.memory.hyper[LOSS_SCALE] = 2.0**20
        skipped.append(engine.skipped_batches)
        assert engine.learning_rate == schedule.at(engine.update_count)
        engine.step(X[:BATCH], Y[:BATCH])
    assert 0 < skipped[8] == skipped[9] < skipped[15] < 12
    assert engine.update_count == 16 - engine.skipped_batches


@pytest.fixture
def filled(monkeypatch):
    """Record the first update of each filled table."""
    firsts = []
    fill = RateTable._fill

    def counted(self, first, most):
        firsts.append(first)
        fill(self, first, most)

    monkeypatch.setattr(RateTable, "_fill", counted)
    return firsts


@pytest.mark.parametrize(
    ("optimizer", "fills"), [(SGD(0.1), 1), (SGD(Constant(0.1, warmup=4)), 3), (Adam(0.01), 7), (SGD(Zigzag(0.1)), 7)]
)
def test_a_table_is_filled_where_it_ends(optimizer, fills, small, filled):
    """A constant rate needs no other row; else four rows are enough for three updates, and the next one's rate."""
    small(4)
    engine = made(optimizer)
    for _ in range(20):
        engine.step(X[:BATCH], Y[:BATCH])
    assert filled == list(range(0, 3 * fills, 3))


def test_a_table_that_fits_is_not_filled_for_the_next_call(filled):
    engine = made(Adam(0.01))
    for _ in range(4):
        engine.fit(X, Y, epochs=1)
    assert filled == [0]


def test_steps_of_a_callback_do_not_take_the_schedule_away():
    stepping = SimpleNamespace(on_batch_end=lambda engine, batch: batch == 1 and engine.step(X[:BATCH], Y[:BATCH]))
    engine = made(SGD(Cosine(0.1, steps=40)))
    history = engine.fit(X, Y, epochs=2, callbacks=[stepping])
    assert history.history["learning_rate"] == [engine.optimizer.schedule.at(7), engine.optimizer.schedule.at(14)]


def test_a_checkpoint_goes_on_with_a_schedule_of_ones_own(tmp_path, monkeypatch):
    monkeypatch.setitem(SCHEDULES, "zigzag", Zigzag)
    whole, begun = made(Adam(Zigzag(0.02))), made(Adam(Zigzag(0.02)))
    begun.fit(X, Y, epochs=1)
    begun.save_checkpoint(tmp_path / "begun")
    loaded = load_checkpoint(tmp_path / "begun", backend="numpy")
    for engine in (whole, loaded):
        engine.fit(X, Y, epochs=1)
    whole.fit(X, Y, epochs=1)
    assert_same(whole.memory.snapshot(), loaded.memory.snapshot())
    assert len(loaded.memory.snapshot()["hyper"]) == HYPER
    assert loaded.memory.snapshot()["hyper"][LEARNING_RATE] == Zigzag(0.02).at(12)


@pytest.mark.parametrize("beta", [0.0, 0.5, 0.9, 0.999])
def test_bias_corrections_are_those_of_the_paper(beta):
    for first, count in ((0, 50), (40, 60), (340, 40), (36_000, 1000), (10**7, 3)):
        wanted = [1.0 - beta**t for t in range(first + 1, first + count + 1)]
        assert corrections(beta, first, count).tolist() == wanted


class Counters:
    """Counters on a device: each look at them is a wait."""

    def __init__(self):
        self.updates, self.waits = 0, 0

    def __getitem__(self, _):
        self.waits += 1
        return self.updates


@pytest.mark.parametrize("accumulate", [1, 3])
@pytest.mark.parametrize("skips", [False, True])
def test_a_table_on_a_device_holds_every_update_of_the_steps_that_it_covers(accumulate, skips):
    rows, rule = 8, UpdateRule("adam", beta1=0.9, beta2=0.999, eps=1e-8, accumulate=accumulate)
    random = np.random.default_rng(3)
    counters, hyper, rates = Counters(), np.zeros(HYPER), np.zeros((1 + rows, RATE_COLUMNS))
    backend = open_backend("numpy", None, "fp32")
    table, schedule = RateTable(backend, rule, hyper, rates, counters, skips=skips), Zigzag(0.1)
    table.follow(schedule, 1.0)
    batches, waits = 0, counters.waits
    for _ in range(200):
        covered = table.cover(schedule, int(random.integers(1, 9)))
        assert covered > 0
        for _ in range(covered):
            batches += 1
            counters.updates += batches % accumulate == 0 and not (skips and random.random() < 0.4)
            # the clock reads the row of the next update
            first, filled = rates[0, :2].astype(int)
            assert first <= counters.updates < first + filled
        if random.random() < 0.2:
            table.note(counters.updates)
    # without skipped updates the host counts by itself
    assert skips or counters.waits == waits
