"""The resident plan of the Triton backend, under its interpreter: which networks have it, one model, and fleets."""

import signal

import numpy as np
import pytest

pytest.importorskip("triton")

from step_bounds import Step
from tolerance import assert_within

import fusemlp
from fusemlp import MLP, SGD, Engine, Fleet
from fusemlp.runtime.memory import Memory
from fusemlp.runtime.plans import choose_plan, resident_chunk
from fusemlp_kernels.contract import BATCH_INDEX, LAST_LOSS
from fusemlp_kernels.philox import row_order
from fusemlp_kernels.registry import TRAITS, interprets_triton
from make import assert_same

pytestmark = pytest.mark.skipif(not interprets_triton(), reason="for Triton's interpreter: TRITON_INTERPRET=1")

ROWS, WIDTH, CLASSES, BATCH = 13, 5, 3, 8
rng = np.random.default_rng(2)
X = rng.standard_normal((ROWS, WIDTH))
y = (X @ rng.standard_normal((WIDTH, CLASSES))).argmax(axis=1)
WEIGHT = rng.uniform(0.5, 2.0, ROWS)
NET = fusemlp.MLP([WIDTH, 7, CLASSES])


def same(engine, other):
    assert_same(engine.memory.snapshot(), other.memory.snapshot())
    assert engine.history.history == other.history.history
    assert engine.history.stopped == other.history.stopped


@pytest.mark.parametrize(
    ("sizes", "batch", "precision", "models", "expected", "said"),
    [
        ((784, 10, 10), 32, "fp32", 1, "resident", "fit runs many steps in one launch"),
        ((64, 32, 10), 32, "bf16", 1, "resident", "fit runs many steps in one launch"),
        ((784, 128, 10), 64, "fp32", 1, "graph", "us in launches"),
        ((784, 128, 10), 64, "tf32", 50, "resident", "a step of 50 models is estimated to take"),
        ((64, 512, 10), 1, "fp32", 99, "graph", "512 units in a hidden layer are more than the 256"),
        ((5000, 10), 1, "fp32", 1, "graph", "5000 inputs are more than the 4096"),
        ((64, 200), 1, "fp32", 1, "graph", "200 outputs are more than the 128"),
        ((4,) * 10, 1, "fp32", 1, "graph", "9 layers are more than the 8"),
        ((4, 2), 2000, "fp32", 1, "graph", "2000 rows in a batch are more than the 1024"),
        ((4, 2), 8, "fp16", 1, "graph", "not for fp16"),
    ],
)
def test_small_networks_are_resident_and_why_others_are_not(sizes, batch, precision, models, expected, said):
    plan, reason = choose_plan("auto", TRAITS["triton"], MLP(sizes), batch, precision, models)
    assert plan == expected and said in reason
    refused = plan == "graph" and "estimated" not in reason
    if refused:
        with pytest.raises(fusemlp.BackendUnavailableError, match="resident kernel"):
            choose_plan("resident", TRAITS["triton"], MLP(sizes), batch, precision)
    else:
        assert choose_plan("resident", TRAITS["triton"], MLP(sizes), batch, precision) == ("resident", "asked for")


def test_a_launch_is_long_enough_to_pay_and_short_enough_for_ctrl_c():
    assert resident_chunk(TRAITS["triton"], 1_000_000) == int(0.05 / (8e-6 + 1_000_000 / 4.7e11))
    assert resident_chunk(TRAITS["triton"], 10**12) == 1


def test_the_interpreter_is_eager_unless_asked():
    assert Engine(NET, backend="triton").plan == "eager"
    with pytest.raises(fusemlp.BackendUnavailableError, match="not for fp16"):
        Engine(NET, backend="triton", precision="fp16", plan="resident")


REFUSED = {
    "prelu": (MLP([4, 8, 2], activation="prelu"), {}, "learns no slope"),
    "clip_norm": (NET, {"optimizer": SGD(clip_norm=1.0)}, "takes no norm of the gradients"),
    "accumulate": (NET, {"optimizer": SGD(accumulate=2)}, "one batch an update"),
    "ema": (NET, {"optimizer": SGD(ema=0.9)}, "keeps no average"),
    "norm": (MLP([4, 8, 2], norm="layer"), {}, "card kernel trains without norm"),
    "members": (MLP([4, 8, 2], members=2), {}, "card kernel trains without members"),
    "wide": (MLP([4, 1025, 2]), {}, "1025 units in a hidden layer are more than the 1024 of the triton backend's card"),
    "outputs": (MLP([4, 17]), {}, "17 outputs are more than the 16"),
    "fp16": (NET, {"precision": "fp16"}, "card kernel is for fp32, tf32, bf16, not for fp16"),
}


@pytest.mark.parametrize(("net", "options", "said"), REFUSED.values(), ids=REFUSED)
def test_what_the_card_kernel_has_no_phase_for_is_refused(net, options, said):
    with pytest.raises((fusemlp.ArgumentError, fusemlp.BackendUnavailableError), match=said):
        Engine(net, backend="triton", plan="card", **options)


def test_the_card_plan_is_asked_for():
    assert Engine(NET, backend="triton", plan="card").plan_reason == "asked for; no card has run it yet"
    assert choose_plan("auto", TRAITS["triton"], MLP([784, 128, 10]), 128, "fp32")[0] == "graph"
    with pytest.raises(fusemlp.ArgumentError, match="the card kernel trains on batches as they are"):
        Engine(NET, backend="triton", plan="card").fit(X, y, epochs=1, adversarial=fusemlp.FGSM(0.1))
    assert resident_chunk(TRAITS["triton"], 65_000_000, "card") == int(0.05 / (8e-6 + 65_000_000 / 2e13))


class Bounded(fusemlp.Callback):
    """Compare every update, from the state before it, and every loss with the oracle's."""

    checked = 0

    def on_batch_begin(self, engine, batch):
        self.step = Step(engine)
        batches = -(-ROWS // BATCH)
        epoch, at = divmod(int(engine.memory.counters[BATCH_INDEX]), batches)
        rows = row_order(ROWS, engine.seed, epoch)[at * BATCH :][:BATCH]
        weight = WEIGHT[rows].astype(np.float32).astype(np.float64)
        self.trace = self.step.trace(X[rows].astype(np.float32), y[rows], weight)

    def on_batch_end(self, engine, batch):
        assert_within(float(engine.memory.stats[LAST_LOSS]), self.trace.loss, self.trace.loss_bound)
        self.step.check()
        self.checked += 1


@pytest.mark.parametrize(("plan", "second"), [("resident", fusemlp.PReLU(0.2)), ("card", "tanh")])
def test_every_step_of_a_fit_is_the_oracles_and_one_launch_an_epoch_has_the_same_bits(plan, second):
    net = fusemlp.MLP([WIDTH, 9, 6, CLASSES], activation=["gelu", second], dropout=[0.0, 0.3])
    fitted = []
    for callbacks in ([Bounded()], []):
        loss = fusemlp.CrossEntropy(label_smoothing=0.1, class_weight=[0.5, 2, 1])
        engine = Engine(net, loss, fusemlp.Adam(0.02, weight_decay=0.01), BATCH, 5, backend="triton", plan=plan)
        engine.fit(X, y, epochs=2, sample_weight=WEIGHT, callbacks=callbacks)
        fitted.append(engine)
        assert not callbacks or callbacks[0].checked == 4
    same(*fitted)


def test_a_fleet_is_so_many_engines_trained_alone():
    vary = [
        {"lr": 0.05},
        {"hidden": [4], "lr": 3.0, "seed": 2},
        {"seed": 3, "dropout": 0.4, "label_smoothing": 0.1, "betas": (0.5, 0.9), "weight_decay": 0.1},
    ]
    data = {"epochs": 3, "validation_data": (X[:7], y[:7]), "early_stopping": 1}
    fleet = Fleet(NET, batch_size=BATCH, backend="triton", plan="resident", vary=vary)
    groups = fleet._grouped(dict(enumerate(fleet.engines)))
    assert [len(places) for _, places in groups] == [2, 1]
    results = fleet.fit(X, y, sample_weight=WEIGHT, **data)
    for index, one in enumerate(fleet.candidates):
        engine = Engine(one.net, one.loss, one.optimizer, BATCH, one.seed, backend="triton", plan="resident")
        engine.fit(X, y, sample_weight=WEIGHT, **data)
        same(results.engine(index), engine)
        assert np.array_equal(results.engine(index).predict(X), engine.predict(X))
    epochs = {len(member.history.epochs) for member in results.members}
    # Some stopped early, and the others went on.
    assert len(epochs) > 1
    # The result is an ordinary engine.
    alone = results.engine(1)
    before = [engine.memory.snapshot()["params"].tobytes() for engine in fleet.engines]
    alone.fit(X, y, epochs=1)
    alone.step(X[:3], y[:3])
    after = [engine.memory.snapshot()["params"].tobytes() for engine in fleet.engines]
    assert [a == b for a, b in zip(before, after, strict=True)] == [True, False, True]


def test_early_stopping_without_validation_ends_each_model_after_its_epoch():
    fleet = Fleet(NET, batch_size=BATCH, backend="triton", plan="resident", vary={"seed": range(2)})
    # a rate that stays the same is best in the first epoch
    results = fleet.fit(X, y, epochs=4, monitor="learning_rate", early_stopping=1)
    assert [member.history.epochs for member in results.members] == [[0, 1]] * 2


def test_members_trained_alone_in_other_batches_leave_the_others_as_they_are():
    made = {"optimizer": SGD(0.1), "backend": "triton", "plan": "resident"}
    fleet = Fleet(NET, batch_size=BATCH, vary={"seed": range(2)}, **made)
    fleet.engines[0].fit(X, y, epochs=1, batch_size=BATCH // 2)
    # rows of a batch that have their gradients summed in several parts
    fleet.engines[0].fit([(np.tile(X, (160, 1)), np.tile(y, 160))], epochs=1)
    results = fleet.fit(X, y, epochs=2)
    engine = Engine(NET, batch_size=BATCH, seed=1, **made)
    engine.fit(X, y, epochs=2)
    same(results.engine(1), engine)


def test_folds_of_different_lengths_and_a_model_that_diverges():
    folds = [np.arange(11), np.arange(3, 13), np.arange(2, 8)]
    held_out = [np.arange(11, 13), np.arange(3), np.arange(8, 13)]
    vary = [{"lr": 0.1}, {"lr": 1e30}, {"lr": 0.1}]
    fleet = Fleet(NET, optimizer=SGD(), batch_size=BATCH, backend="triton", plan="resident", vary=vary)
    results = fleet.fit(X, y, epochs=2, rows=folds, validation_rows=held_out)
    assert [member.status for member in results.members] == ["trained", "diverged", "trained"]
    for index in (0, 2):
        rows, others = folds[index], held_out[index]
        batch = min(BATCH, len(rows))
        engine = Engine(NET, optimizer=SGD(0.1), batch_size=batch, backend="triton", plan="resident")
        engine.fit(X[rows], y[rows], epochs=2, validation_data=(X[others], y[others]))
        same(results.engine(index), engine)
    # The diverged model is back at its initial parameters.
    first = NET.initial_parameters(0)
    for name, array in results.engine(1).state_dict().items():
        np.testing.assert_array_equal(array, first[name].astype(np.float32))


def test_ctrl_c_ends_all_models_after_a_launch(monkeypatch):
    fleet = Fleet(NET, batch_size=BATCH, backend="triton", plan="resident", vary={"seed": range(2)})
    original = Memory.mark
    asked = []

    def mark(memory, *arguments):
        asked.append(memory)
        if len(asked) == 3:
            signal.raise_signal(signal.SIGINT)
        return original(memory, *arguments)

    monkeypatch.setattr(Memory, "mark", mark)
    with pytest.raises(KeyboardInterrupt):
        # with rows to validate on, each epoch is a launch
        fleet.fit(X, y, epochs=50, validation_data=(X[:4], y[:4]))
    stopped = [engine.history.stopped for engine in fleet.engines]
    assert len(stopped) == 2 and all("interrupted" in reason for reason in stopped)
    assert all(engine.epochs_trained <= 2 for engine in fleet.engines)


def test_models_in_one_launch_scale_their_inputs_as_one_alone():
    rows = 40 * X + 9
    fleet = Fleet(NET, batch_size=BATCH, backend="triton", plan="resident", vary={"seed": range(2)}, normalise=True)
    # a second fit keeps the scale of the first, in the memory that the models share
    for data in (rows, rows[::-1]):
        results = fleet.fit(data, y, epochs=1, validation_data=(rows[:4], y[:4]))
    for index in range(2):
        engine = Engine(NET, batch_size=BATCH, seed=index, backend="triton", plan="resident", normalise=True)
        for data in (rows, rows[::-1]):
            engine.fit(data, y, epochs=1, validation_data=(rows[:4], y[:4]))
        same(results.engine(index), engine)
        np.testing.assert_array_equal(results.engine(index).predict_proba(rows), engine.predict_proba(rows))
