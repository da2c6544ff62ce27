"""The plan "chip": the steps of small models, each in one program, are the oracle's; other steps are refused."""

from dataclasses import replace

import numpy as np
import pytest
from devices import INTERPRETER, Variant, places, variants_of
from fleet_cases import Fleet, varied
from test_train_fleet import CASES, Phases, case

import fusemlp
from fusemlp import MLP, Engine
from fusemlp_kernels.errors import ArgumentError
from make import assert_same

VARIANTS = variants_of(INTERPRETER)
FIRST = [one for one in VARIANTS if one.id.endswith("fp32")]
# Those of CASES with one hidden layer, a slope that is not learned, and gradients that a step updates at once.
FITTING = [
    number
    for number, (_, rule, activations, shape) in enumerate(CASES)
    if not {"clipped", "accumulated", "averaged", "averaged, clipped"} & {rule}
    and "prelu" not in activations
    and len(shape.get("sizes", (5, 7, 3))) == 3
]
# each of the biases alone
FROZEN = [{"frozen": frozenset({name})} for name in ("b0", "b1")]
WIDE = {"sizes": (33, 20, 10), "activations": ("gelu", "identity"), "batch": 18, "data": 40}


def chip(number, **changes):
    shape, model = case(number, **changes)
    # a label that the others do not ignore
    ignored = 1 if number == 0 else model.loss.ignore_index
    return shape, replace(model, rate=0.0, rows=shape.batch + 4, loss=replace(model.loss, ignore_index=ignored))


def test_the_cases_have_every_optimizer_that_needs_no_norm():
    assert {CASES[number][1] for number in FITTING} >= {"sgd", "momentum", "nesterov", "adam", "adamw"}


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize(
    ("number", "changes"),
    [*((number, {}) for number in FITTING), (1, WIDE), (9, WIDE), *((1, names) for names in FROZEN)],
)
def test_steps_of_each_model_are_the_oracles(variant, number, changes):
    """The second batch is short; the next is that of another epoch."""
    shape, model = chip(number, **changes)
    fleet = Fleet(variant, shape, varied(model, 2), epochs=2, plan="chip")
    for _ in range(3):
        fleet.check_a_step()
    fleet.check_gaps()


@pytest.mark.parametrize("variant", FIRST)
def test_launches_of_any_length_give_the_same_bits_and_a_stopped_model_stays(variant):
    shape, model = chip(2)
    whole, cut = (Fleet(variant, shape, varied(model, 2), epochs=2, plan="chip") for _ in range(2))
    whole.run([4, 3])
    for steps in ([1, 3], [0, 0], [3, 0]):
        cut.run(steps)
    assert_same(whole.everything(), cut.everything())


@pytest.mark.parametrize("variant", FIRST)
def test_nan_reaches_its_model_and_no_padding(variant):
    shape, model = chip(2)
    fleet = Fleet(variant, shape, varied(model, 2), plan="chip")
    other = sorted(set(range(shape.data)) - set(fleet.rows[1].tolist()))
    fleet.x[next(int(row) for row in fleet.rows[0, : shape.batch] if row in other), 1] = np.nan
    fleet.run([2, 2])
    assert np.isnan(fleet.tensor(fleet.params[0], "w0")).any() and np.isfinite(fleet.params[1]).all()
    fleet.check_gaps()


@pytest.mark.parametrize("device", places(INTERPRETER))
def test_between_two_barriers_no_thread_reads_what_another_writes(device, monkeypatch):
    shape, model = chip(2, **WIDE)
    fleet = Fleet(Variant(device, "fp32"), shape, [model], epochs=2, plan="chip")
    phases = Phases(monkeypatch)
    fleet.run([2])
    assert (phases.count, phases.wrong) == (2 * 5, [])


@pytest.mark.parametrize("variant", FIRST)
@pytest.mark.parametrize(
    ("number", "changes", "model", "said"),
    [
        (1, {"sizes": (65, 7, 3)}, {}, "65 inputs are more than 64"),
        (1, {"batch": 33}, {}, "33 rows of a batch are more than 32"),
        (1, {"sizes": (5, 3), "activations": ("identity",)}, {}, "there is no hidden layer"),
        (1, {}, {"rate": 0.5}, "it drops nothing"),
        (3, {}, {}, "'chip' is for weights and biases that the step updates at once"),
    ],
)
def test_steps_that_the_kernel_does_not_take_are_refused(variant, number, changes, model, said):
    shape, plain = chip(number, **changes)
    with pytest.raises(ArgumentError, match=said):
        Fleet(variant, shape, [replace(plain, **model)], plan="chip")


@pytest.mark.parametrize("variant", FIRST)
@pytest.mark.parametrize(("plan", "said"), [("card", "'card' is for one model, got 2"), ("chp", "unknown name 'chp'")])
def test_other_plans_of_several_models_are_refused(variant, plan, said):
    shape, model = chip(2)
    with pytest.raises(ArgumentError, match=f"train_fleet: plan: {said}"):
        Fleet(variant, shape, varied(model, 2), plan=plan)


NET = MLP([6, 9, 3])
REFUSED = {
    "wide": (MLP([6, 33, 3]), {}, "33 units in a hidden layer are more than the 32 of the triton backend's chip"),
    "flat": (MLP([6, 3]), {}, "chip kernel needs 1 hidden layer, got 0"),
    "norm": (MLP([6, 9, 3], norm="layer"), {}, "chip kernel trains without norm"),
    "fp16": (NET, {"precision": "fp16"}, "chip kernel is for fp32, tf32, bf16, not for fp16"),
}


@pytest.mark.parametrize("place", places(INTERPRETER))
@pytest.mark.parametrize(("net", "options", "said"), REFUSED.values(), ids=REFUSED)
def test_networks_that_do_not_fit_are_refused(place, net, options, said):
    with pytest.raises(fusemlp.BackendUnavailableError, match=said):
        Engine(net, backend="triton", plan="chip", **options)


@pytest.mark.parametrize("place", places(INTERPRETER))
def test_a_fleet_on_the_chip_trains_as_one_by_one_and_says_that_no_card_has_run_it(place):
    rng = np.random.default_rng(3)
    x, y = rng.standard_normal((20, 6)).astype(np.float32), rng.integers(0, 3, 20)
    options = {"optimizer": fusemlp.SGD(0.1, momentum=0.9), "batch_size": 8, "backend": "triton"}
    with pytest.raises(fusemlp.ArgumentError, match="the chip kernel drops nothing so far, got 'chip'"):
        Engine(NET.but(dropout=0.2), plan="chip", **options).fit(x, y, epochs=1)
    engine = Engine(NET, plan="chip", **options)
    # its head has no hidden layer, and another plan
    assert len(engine.probe(x, y, epochs=1).history["loss"]) == 1
    assert engine.plan_reason == "asked for; no card has run it yet"
    found = {}
    for plan in ("chip", "resident"):
        results = fusemlp.Fleet(NET, plan=plan, vary={"lr": [0.1, 0.05]}, **options).fit(x, y, epochs=2)
        found[plan] = [results.engine(index).state_dict() for index in range(2)]
    for chip_state, usual in zip(*found.values(), strict=True):
        for name in usual:
            np.testing.assert_allclose(chip_state[name], usual[name], rtol=1e-4, atol=1e-6)
