"""The engine's own launches on emulated cards: each step of a fit is the oracle's, within its bounds."""

from dataclasses import replace
from unittest import mock

import numpy as np
import pytest
from cards import DESCRIBED, card
from step_bounds import Step, TwoBytes
from test_train_fleet import CASES, Fleet, case, varied
from tolerance import TINY, assert_within

from fusemlp import MLP, Adam, Callback, CrossEntropy, Engine, PReLU
from fusemlp_kernels.contract import BATCH_INDEX, LAST_LOSS
from fusemlp_kernels.philox import row_order
from fusemlp_kernels.triton import configs

# a full batch and a short one
ROWS, WIDTH, CLASSES, BATCH = 25, 21, 5, 20
NET = MLP([WIDTH, 24, 10, CLASSES], activation=["gelu", PReLU(0.2)], dropout=[0.0, 0.3])
rng = np.random.default_rng(2)
X = rng.standard_normal((ROWS, WIDTH)).astype(np.float32)
y = (X @ rng.standard_normal((WIDTH, CLASSES))).argmax(axis=1)


class Bounded(Callback):
    """Compare every update, from the state before it, and every loss with the oracle's."""

    def __init__(self, products, x=X):
        self.products, self.x, self.checked = products, x, 0

    def on_batch_begin(self, engine, batch):
        self.step = Step(engine, products=self.products)
        epoch, at = divmod(int(engine.memory.counters[BATCH_INDEX]), -(-ROWS // BATCH))
        rows = row_order(ROWS, engine.seed, epoch)[at * BATCH :][:BATCH]
        self.trace = self.step.trace(self.x[rows], y[rows])

    def on_batch_end(self, engine, batch):
        assert_within(float(engine.memory.stats[LAST_LOSS]), self.trace.loss, self.trace.loss_bound)
        self.step.check()
        self.checked += 1


@pytest.mark.parametrize("plan", ["eager", "resident"])
@pytest.mark.parametrize("target", ["sm_80", "sm_90"])
def test_every_step_of_a_fit_is_the_oracles(target, plan):
    fitted = set()
    with card(target, "fp32") as emulator:
        # without callbacks a resident launch has both steps
        for callbacks in ([Bounded(emulator.variant.products)], [])[: 1 + (plan == "resident")]:
            loss = CrossEntropy(label_smoothing=0.1, class_weight=[0.5, 2, 1, 1, 1])
            engine = Engine(NET, loss, Adam(0.02, weight_decay=0.01), BATCH, 5, backend="triton", plan=plan)
            engine.fit(X, y, epochs=1, callbacks=callbacks)
            fitted.add(engine.memory.snapshot()["params"].tobytes())
            assert not callbacks or callbacks[0].checked == 2
    assert len(fitted) == 1
    names = {name for name, _ in emulator.launched}
    assert names == (
        {"resident_kernel"}
        if plan == "resident"
        else {"linear_kernel", "linear_loss_grad_kernel", "grad_input_kernel", "grad_weight_kernel"}
    )


# The tiles after the first: for more outputs, for many inputs, and for wide layers too. The long reduction has two
# steps, the second of which not all parts have.
@pytest.mark.parametrize(("number", "sizes"), [(1, [140, 20, 18]), (2, [290, 20, CLASSES]), (3, [290, 70, 18])])
@pytest.mark.parametrize("target", ["sm_80", "sm_90"])
def test_every_resident_tile_is_the_oracles(target, number, sizes):
    arch = configs.Architecture(target, 1)
    assert configs.resident_tile(arch, "fp32", sizes) == configs.resident_tiles(target, "fp32")[number]
    wide = rng.standard_normal((ROWS, sizes[0])).astype(np.float32)
    with card(target, "fp32") as emulator:
        check = Bounded(emulator.variant.products, wide)
        engine = Engine(MLP(sizes), batch_size=BATCH, seed=5, backend="triton", plan="resident")
        engine.fit(wide, y, epochs=1, callbacks=[check])
    assert check.checked == len(emulator.launched) == 2


NARROW = {
    "entropy": (MLP([WIDTH, 24, 30, CLASSES], activation="tanh"), CrossEntropy(label_smoothing=0.1, ignore_index=1)),
    "relu": (MLP([WIDTH, 24, 30, CLASSES]), "cross_entropy"),
    "mse": (MLP([40, 24, CLASSES], activation="silu"), "mse"),
    "three layers": (MLP([WIDTH, 24, 30, 17, CLASSES]), "mse"),
}


@pytest.mark.parametrize(
    ("target", "case"),
    [
        ("sm_80", "entropy"),
        ("sm_90", "entropy"),
        ("sm_80", "relu"),
        ("sm_90", "relu"),
        ("sm_90", "mse"),
        ("sm_90", "three layers"),
    ],
)
def test_every_step_of_the_narrow_plan_is_the_oracles(target, case):
    """Batches of several tiles, the last of which is short, of rows that have weights, and of one row."""
    net, loss = NARROW[case]
    with card(target, "bf16") as emulator:
        variant = emulator.variant
        short = TwoBytes(variant.output_unit, TINY, rounds=variant.rounded)
        x = variant.rounded(rng.standard_normal((100, net.sizes[0])))
        wanted = rng.integers(CLASSES, size=100) if loss != "mse" else rng.standard_normal((100, CLASSES))
        engine = Engine(net, loss, Adam(0.02), 100, 5, backend="triton", precision="bf16", plan="narrow")
        for rows, weight in ((100, None), (71, np.linspace(0.5, 1.5, 71)), (1, None)):
            step = Step(engine, short, variant.products)
            trace = step.trace(x[:rows], wanted[:rows], weight)
            engine.step(x[:rows], wanted[:rows], weight)
            assert_within(float(engine.memory.stats[LAST_LOSS]), trace.loss, trace.loss_bound)
            step.check()
        step = Step(engine, short, variant.products)
        for rows in (100, 1):
            step.check_outputs(engine.outputs(x[:rows]), x[:rows])
    assert {name for name, _ in emulator.launched} == {"narrow_kernel", "update_kernel", "predict_narrow_kernel"}


# Compiling the resident kernel takes longer than its steps: bf16 on one card, whose products are mma.sync too.
@pytest.mark.parametrize(
    ("target", "precision", "number"), [("sm_80", "fp32", 14), ("sm_90", "fp32", 3), ("sm_90", "bf16", 4)]
)
def test_a_fleet_is_the_oracles(target, precision, number):
    """A block for each model: seed, rates, slopes, rows and optimizer's numbers of its own."""
    shape, model = case(number)
    with card(target, precision) as emulator:
        fleet = Fleet(emulator.variant, shape, varied(model, 3))
        for _ in range(2):
            fleet.check_a_step()
        fleet.check_gaps()
    assert emulator.launched == [("resident_kernel", 3)] * 2


@pytest.mark.parametrize(("precision", "number"), [("fp32", 2), ("bf16", 5)])
def test_a_fleet_on_the_chip_is_the_oracles(precision, number):
    """A cross-entropy with Adam, a squared error with momentum; the second batch is short."""
    shape, model = case(number)
    with card("sm_90", precision) as emulator:
        models = varied(replace(model, rate=0.0, rows=shape.batch + 4), 2)
        fleet = Fleet(emulator.variant, shape, models, epochs=2, plan="chip")
        for _ in range(3):
            fleet.check_a_step()
        fleet.check_gaps()
    assert emulator.launched == [("chip_kernel", 2)] * 3


def test_the_fleets_have_both_paths_of_the_update():
    """Case 3 clips, so its gradients go through memory; the others update in the product's epilogue."""
    assert [CASES[number][1] for number in (14, 3, 4)] == ["adamw", "clipped", "nesterov"]


@pytest.mark.parametrize(
    ("target", "plan"), [("sm_80", "narrow"), ("sm_90", "narrow"), ("sm_90", "resident"), ("sm_90", "eager")]
)
def test_the_order_of_warps_and_blocks_changes_no_bit(target, plan):
    # the narrow plan takes the tiles of a batch in turn
    net, times = (MLP([WIDTH, 24, 10, CLASSES]), 2) if plan == "narrow" else (NET, 1)
    found = set()
    for seed in range(2):
        with card(target, "bf16", seed=seed, orders=2):
            engine = Engine(net, batch_size=times * BATCH, seed=5, backend="triton", precision="bf16", plan=plan)
            engine.fit(np.tile(X, (times, 1)), np.tile(y, times), epochs=1)
            found.add(engine.memory.snapshot()["params"].tobytes())
    assert len(found) == 1


def test_tensor_descriptors_change_no_bit_of_a_fit():
    """The hidden layers' matrices come by descriptors, the gathered rows of the first by pointers."""
    found = set()
    for least, described in ((DESCRIBED, {"linear_kernel", "grad_input_kernel"}), (DESCRIBED + 1, set())):
        with mock.patch.dict(configs.DESCRIBED, sm_90=least), card("sm_90 TMA", "bf16", orders=2) as emulator:
            net = MLP([WIDTH, 24, 70, CLASSES], activation="silu", dropout=[0.0, 0.3])
            engine = Engine(net, batch_size=BATCH, seed=5, backend="triton", precision="bf16", plan="eager")
            engine.fit(X, y, epochs=1)
            found.add(engine.memory.snapshot()["params"].tobytes())
        assert emulator.described == described
    assert len(found) == 1
