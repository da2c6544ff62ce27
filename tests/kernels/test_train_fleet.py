"""Fleets: every model makes the oracle's steps with its own numbers, in launches and epochs of any number."""

import platform
from dataclasses import replace

import numpy as np
import pytest
from devices import GPU, INTERPRETER, NUMPY, Variant, places, variants_of
from fleet_cases import GAP_VALUE, Fleet, Model, Shape, varied

from fusemlp_kernels import contract as c
from fusemlp_kernels.errors import ArgumentError
from make import assert_same

# train_resident scales no loss: fp16 stands for 16-bit products where bf16 cannot run
EVERY = [one for one in variants_of(NUMPY, INTERPRETER, GPU) if one.id != f"{GPU.name}, fp16"]
FIRST = [one for one in EVERY if one.id.endswith("fp32")]
ADAM, MOMENTUM = c.UpdateRule("adam"), c.UpdateRule("sgd", momentum=0.9)
RULES = {
    "sgd": c.UpdateRule("sgd"),
    "momentum": MOMENTUM,
    "nesterov": replace(MOMENTUM, nesterov=True),
    "scikit-learn momentum": replace(MOMENTUM, convention="scikit-learn"),
    "adam": ADAM,
    "adamw": replace(ADAM, decoupled=True),
    "scikit-learn adam": replace(ADAM, convention="scikit-learn", eps=1e-3),
    "clipped": c.UpdateRule("sgd", clip_norm=0.2),
    "accumulated": replace(ADAM, accumulate=2, clip_norm=0.5),
    "averaged": replace(ADAM, ema=0.9),
    "averaged, clipped": c.UpdateRule("sgd", momentum=0.9, clip_norm=0.2, ema=0.5),
}
# the learning rates of those that have another one at every update
RATES = {
    "nesterov": (0.05, 0.045, 0.0405, 0.03645),
    "adam": (0.01, 0.02, 0.0181, 0.0131, 0.0069, 0.0),
    "adamw": (0.0008, 0.02, 0.0167, 0.0086),
    "clipped": (0.1, 0.05, 0.025, 0.0125),
}
ENTROPY = c.LossSpec("cross_entropy", accuracy=True)
# Every loss, optimizer, activation and kind of weights: loss, rule, activations, and the rest of the shape.
CASES = [
    (ENTROPY, "sgd", ("identity", "identity"), {}),
    (replace(ENTROPY, label_smoothing=0.1), "momentum", ("relu", "identity"), {"weighted": True}),
    (replace(ENTROPY, soft=True), "adam", ("leaky_relu", "identity"), {"class_weighted": True}),
    (replace(ENTROPY, ignore_index=1, reduction="sum"), "clipped", ("tanh", "identity"), {"class_weighted": True}),
    (c.LossSpec("binary_cross_entropy", accuracy=True), "nesterov", ("prelu", "identity"), {}),
    (c.LossSpec("mse", accuracy=True), "scikit-learn momentum", ("sigmoid", "tanh"), {"weighted": True}),
    (c.LossSpec("mae"), "adamw", ("gelu", "prelu"), {"frozen": frozenset({"w0"})}),
    (c.LossSpec("huber", delta=0.4), "scikit-learn adam", ("silu", "sigmoid"), {}),
    (c.LossSpec("poisson", reduction="sum"), "accumulated", ("relu", "identity"), {"frozen": frozenset({"w0", "b0"})}),
    (c.LossSpec("mse"), "adam", ("elu", "softplus"), {}),
    (c.LossSpec("mse"), "nesterov", ("softplus", "selu"), {"weighted": True}),
    (c.LossSpec("huber", delta=0.4), "adamw", ("selu", "mish"), {}),
    # a reduction in two parts, twice along them
    (c.LossSpec("mae"), "sgd", ("mish", "elu"), {"sizes": (37, 7, 3)}),
    (c.LossSpec("quantile", quantile=0.3), "adam", ("silu", "gelu"), {"sizes": (5, 3), "activations": ("gelu",)}),
    (
        ENTROPY, "adamw", (),
        {
            # more than a tile of rows, units, and outputs
            "sizes": (17, 18, 9, 20, 17), "activations": ("relu", "prelu", "gelu", "identity"),
            "batch": 18, "data": 40,
        },
    ),
    (ENTROPY, "averaged", ("tanh", "identity"), {}),
    (c.LossSpec("mse"), "averaged, clipped", ("prelu", "identity"), {"frozen": frozenset({"w0"})}),
]  # fmt: skip


def case(number, **changes):
    loss, rule, activations, shape = CASES[number]
    model = Model(RULES[rule], loss, seed=3, rate=0.3, decay=0.05, lr_factor=0.5, rates=RATES.get(rule, (0.05,)))
    return Shape(**{"activations": activations, **shape, **changes}), model


def test_the_cases_have_every_loss_optimizer_and_activation():
    shapes = [case(number)[0] for number in range(len(CASES))]
    assert {name for shape in shapes for name in shape.activations[:-1]} == set(c.ACTIVATIONS)
    assert {loss.kind for loss, *_ in CASES} == set(c.LOSSES)
    assert {rule for _, rule, *_ in CASES} == set(RULES)


@pytest.mark.parametrize("variant", EVERY)
@pytest.mark.parametrize("number", range(len(CASES)))
def test_steps_of_each_model_are_the_oracles(variant, number):
    shape, model = case(number)
    if variant.device is INTERPRETER:
        # the second batch is short; in 16 bits only the products and the shadow differ
        model = replace(model, rows=shape.batch + 4)
    fleet = Fleet(variant, shape, varied(model, 3 if variant.precision == "fp32" else 1))
    for _ in range(2 if variant.device is INTERPRETER else 4):
        fleet.check_a_step()
    fleet.check_gaps()


@pytest.mark.parametrize("frozen", ["w0 b0 w1", "w0 b0 w1 b1"])
@pytest.mark.parametrize("variant", EVERY[:2])
def test_what_is_frozen_stays_and_the_rest_makes_the_oracles_steps(variant, frozen):
    shape, model = case(1, frozen=frozenset(frozen.split()))
    fleet = Fleet(variant, shape, [model], "train_resident")
    for _ in range(4):
        fleet.check_a_step()


@pytest.mark.parametrize("variant", FIRST)
def test_a_number_changes_its_own_model_alone(variant):
    """The learning rate, momentum, weight decay, the rate of the masks: what each is worth to a model."""
    shape, model = case(1)
    rule = model.rule
    changed = [
        replace(model, rates=(0.07,)),
        replace(model, rule=replace(rule, momentum=0.5)),
        replace(model, decay=0.2),
        replace(model, rate=0.6),
        replace(model, lr_factor=2.0),
        replace(model, loss=replace(model.loss, label_smoothing=0.3)),
    ]
    alone, fleet = Fleet(variant, shape, [model]), Fleet(variant, shape, [model, *changed])
    # the same rows and first parameters
    alone.run([2])
    fleet.run([2] * 7)
    assert alone.params[0].tobytes() == fleet.params[0].tobytes()
    assert len({row.tobytes() for row in fleet.params}) == 7


@pytest.mark.parametrize("variant", FIRST)
def test_a_model_that_has_stopped_does_not_move(variant):
    shape, model = case(5)
    fleet = Fleet(variant, shape, varied(model, 3))
    fleet.run([1, 1, 1])
    before = fleet.everything()
    fleet.run([2, 0, 1])
    for name, array in fleet.everything().items():
        assert_same(array[1], before[name][1], name)
    fleet.run([0, 0, 0])
    assert fleet.counters[:, c.BATCH_INDEX].tolist() == [3, 1, 2]


@pytest.mark.parametrize("variant", FIRST)
def test_nan_reaches_its_model_and_no_padding(variant):
    shape, model = case(2)
    fleet = Fleet(variant, shape, varied(model, 2))
    other = sorted(set(range(shape.data)) - set(fleet.rows[1].tolist()))
    row = next(int(r) for r in fleet.rows[0, : shape.batch] if r in other)
    fleet.x[row, 1] = np.nan
    fleet.run([2, 2])
    assert np.isnan(fleet.stats[0, c.LAST_LOSS]) and np.isfinite(fleet.stats[1]).all()
    assert np.isnan(fleet.tensor(fleet.params[0], "w0")).any() and np.isfinite(fleet.params[1]).all()
    fleet.check_gaps()


@pytest.mark.parametrize("variant", FIRST)
def test_rows_are_walked_and_the_short_batch_is_walked_over(variant):
    shape, model = case(0)
    fleet = Fleet(variant, shape, [replace(model, rows=12), replace(model, rows=10)])
    seen = []
    for _ in range(4):
        seen.append(fleet.counters[:, [c.ROW_OFFSET, c.ROW_COUNT]].tolist())
        fleet.run([1, 1])
    assert seen == [[[0, 5], [0, 5]], [[5, 5], [5, 5]], [[10, 2], [0, 5]], [[0, 5], [5, 5]]]


def changed(given, op, model=1, **operands):
    """The operands of a fleet with some of a model's call of ``op`` replaced."""
    calls = list(given["calls"])
    calls[model] = [(name, {**own, **operands} if name == op else own) for name, own in calls[model]]
    return {**given, "calls": calls}


def layers_of(given):
    """The layers of the last call of the second model."""
    return given["calls"][-1][-1][1]["layers"]


def swapped(given):
    return {**given, "calls": [[calls[1], calls[0], *calls[2:]] for calls in given["calls"]]}


def replaced(value, old, new):
    """An operand, or a sequence or mapping of them, with one array in place of another."""
    if isinstance(value, dict):
        return {name: replaced(part, old, new) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(replaced(part, old, new) for part in value)
    return new if value is old else value


def shared(given):
    """The second model has its first output where the first has it."""
    first, second = given["calls"]
    return {**given, "calls": [first, replaced(second, second[0][1]["y"], first[0][1]["y"])]}


def frozen(given):
    """The second model trains nothing."""
    first, second = given["calls"]
    clock = {name: second[-1][1][name] for name in ("rule", "counters", "hyper", "rates")}
    return {**given, "calls": [first, [*second[:-1], ("advance", clock)]]}


WRONG = {
    "layers: models of one launch": lambda given: changed(given, "linear", activation="relu"),
    "rules: states": lambda given: changed(given, "grad_weight_update", rule=RULES["sgd"]),
    "losses: kind": lambda given: changed(given, "linear_loss_grad", loss=c.LossSpec("mse")),
    "target: models of one launch": lambda given: changed(
        given, "linear_loss_grad", target=np.array(given["calls"][0][1][1]["target"])
    ),
    r"calls\[1\]: linear_loss_grad: the kernel trains without privacy": lambda given: changed(
        given, "linear_loss_grad", loss=c.LossSpec("mse", reduction="rows")
    ),
    "calls: the values of model 1": shared,
    r"calls\[3\]: grad_weight_update: its dz and x": lambda given: changed(
        given, "grad_weight_update", layers=[{**one, "x": given["calls"][1][0][1]["x"]} for one in layers_of(given)]
    ),
    r"calls\[2\]: penalty: it does not follow": lambda given: {
        **given, "calls": [[*calls[:2], ("penalty", {}), *calls[3:]] for calls in given["calls"]]
    },
    r"calls\[2\]: add: the kernel has no phase": lambda given: {
        **given, "calls": [[*calls[:2], ("add", {}), *calls[3:]] for calls in given["calls"]]
    },
    "calls: expected a step with linear_loss_grad that ends": lambda given: {
        **given, "calls": [calls[:-1] for calls in given["calls"]]
    },
    r"calls\[1\]: linear: its x is not the output": swapped,
    "calls: models of one launch": frozen,
    "arenas: state1 is missing": lambda given: {
        **given, "arenas": {name: arena for name, arena in given["arenas"].items() if name != "state1"}
    },
    "epoch_stats: expected shape": lambda given: {**given, "epoch_stats": np.zeros((3, 1, c.STATS))},
}  # fmt: skip


# where the models of a fleet share launches
@pytest.mark.parametrize("variant", FIRST[1:])
@pytest.mark.parametrize("said", WRONG)
def test_what_does_not_go_together_says_so(variant, said):
    shape, model = case(2)
    fleet = Fleet(variant, shape, varied(model, 2))
    with pytest.raises(ArgumentError, match=said):
        variant.bind("train_fleet", **WRONG[said](fleet.operands()))
    with pytest.raises(ArgumentError, match="steps of each of 2 models"):
        fleet.run([1])


@pytest.mark.parametrize("variant", FIRST[1:])
def test_a_program_may_have_its_own_order_of_updates(variant):
    shape, model = case(2)
    usual, turned = Fleet(variant, shape, [model]), Fleet(variant, shape, [model])
    given = turned.operands()
    given = changed(given, "grad_weight_update", 0, layers=layers_of(given)[::-1])
    turned.run = variant.bind("train_fleet", [*turned.states, turned.work], **given)
    for fleet in (usual, turned):
        fleet.run([2])
    assert_same(turned.everything(), usual.everything())


class Phases:
    """Record the loads and stores of a program between two barriers, in Triton's interpreter.

    An element that is written is written once, and read at most once, before: by what updates it. Two threads that
    touched it otherwise would race.
    """

    def __init__(self, monkeypatch):
        from triton.runtime.interpreter import InterpreterBuilder

        self.count, self.read, self.written, self.wrong = 0, {}, set(), []
        load, store = InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store

        def loads(builder, ptrs, mask, *arguments):
            for address in ptrs.data[mask.data.astype(bool)].ravel().tolist():
                self.read[address] = self.read.get(address, 0) + 1
                if address in self.written:
                    self.wrong.append((self.count, "read after it was written", address))
            return load(builder, ptrs, mask, *arguments)

        def stores(builder, ptrs, value, mask, *arguments):
            for address in ptrs.data[mask.data.astype(bool)].ravel().tolist():
                if address in self.written or self.read.get(address, 0) > 1:
                    self.wrong.append((self.count, "written after others have touched it", address))
                self.written.add(address)
            return store(builder, ptrs, value, mask, *arguments)

        def barrier(builder):
            self.count += 1
            self.read.clear()
            self.written.clear()

        for name, watcher in (
            ("create_masked_load", loads), ("create_masked_store", stores), ("create_barrier", barrier)
        ):  # fmt: skip
            monkeypatch.setattr(InterpreterBuilder, name, watcher)


@pytest.mark.parametrize("device", places(INTERPRETER))
@pytest.mark.parametrize(
    ("number", "changes", "epochs"),
    [(8, {}, None), (10, {}, None), (2, {"ridge": c.Ridge(0.1), "rows": 6}, 2)],
    ids=["through memory", "in the epilogue", "with a ridge, over the end of an epoch"],
)
def test_between_two_barriers_nobody_reads_what_another_writes(device, number, changes, epochs, monkeypatch):
    shape, model = case(number, frozen=frozenset())
    fleet = Fleet(Variant(device, "fp32"), shape, [replace(model, **changes)], "train_resident", epochs)
    phases = Phases(monkeypatch)
    fleet.run(2)
    layers = len(shape.activations)
    # a phase has one after it, and the clock one more inside
    assert phases.count == 2 * (3 * layers + 2 + (number == 8) + (epochs is not None))
    assert phases.wrong == []


# The last batch of each epoch is short.
EPOCHS, BATCHES = 3, 2
# Of one model each: none, with the usual divisor, with another.
RIDGES = (None, c.Ridge(0.3), c.Ridge(0.1, 2.5))


def with_ridges(model):
    """Models with numbers of their own, the first without a ridge."""
    models = zip(varied(model, len(RIDGES)), RIDGES, strict=True)
    return [replace(one, loss=replace(one.loss, reduction="mean"), ridge=ridge) for one, ridge in models]


@pytest.mark.parametrize("variant", FIRST)
def test_steps_through_three_epochs_are_the_oracles_and_each_has_its_account(variant):
    shape, model = case(1)
    fleet = Fleet(variant, shape, varied(replace(model, rows=9), 2), epochs=EPOCHS)
    assert [model.rows for model in fleet.models] == [9, 8]
    for step in range(EPOCHS * BATCHES):
        epoch, batch = divmod(step, BATCHES)
        for index, one in enumerate(fleet.models):
            walk = epoch * one.rows + batch * shape.batch, min(shape.batch, one.rows - batch * shape.batch)
            assert tuple(fleet.counters[index, [c.ROW_OFFSET, c.ROW_COUNT]]) == walk
        fleet.check_a_step()
        # the epochs that have not ended have no account yet
        assert (fleet.epoch_stats[:, (step + 1) // BATCHES :] == GAP_VALUE).all()
    # behind the last comes the first
    assert fleet.counters[:, [c.ROW_OFFSET, c.ROW_COUNT]].tolist() == [[0, 5], [0, 5]]
    first = np.array(fleet.epoch_stats)
    fleet.run([BATCHES + 1] * 2)
    changed = (fleet.epoch_stats != first).any(axis=2)
    assert changed.tolist() == [[True, False, False]] * 2


@pytest.mark.parametrize("variant", FIRST)
@pytest.mark.parametrize(("number", "accounts"), [(2, None), (8, 1)], ids=["in the epilogue", "through memory"])
def test_launches_of_any_length_give_the_bits_of_launches_of_an_epoch(variant, number, accounts):
    shape, model = case(number)
    models = [replace(one, ridge=ridge) for one, ridge in zip(varied(model, 2), RIDGES[1:], strict=True)]
    models = [replace(one, rows=rows) for one, rows in zip(models, (9, 8), strict=True)]
    whole, cut = Fleet(variant, shape, models, epochs=EPOCHS), Fleet(variant, shape, models, epochs=EPOCHS)
    steps = EPOCHS * BATCHES
    whole.run([steps, steps])
    for part in ([3, 1], [0, 2], [3, 3]):
        cut.run(part)
    found = whole.everything()
    assert_same(cut.everything(), found)
    alone = Fleet(variant, shape, models[1:2], "train_resident", EPOCHS)
    alone.run(steps)
    for name in ("params", "stats", "hyper", "epoch_stats"):
        assert_same(found[name][1], alone.everything()[name][0], name)
    single = Fleet(variant, shape, models, epochs=accounts)
    for epoch in range(EPOCHS):
        for index, one in enumerate(models):
            single.rows[index, : one.rows] = whole.rows[index, epoch * one.rows :][: one.rows]
        single.run([BATCHES] * 2)
        account = single.stats if accounts is None else single.epoch_stats[:, 0]
        assert account.tobytes() == found["epoch_stats"][:, epoch].tobytes()
        single.stats[:, c.LOSS_SUM :] = 0.0
    for name in ("params", "stats", "hyper", "counters"):
        assert_same(single.everything()[name], found[name], name)


# weights of rows, slopes, frozen weights, gradients in memory, several tiles: the ridge knows of no loss or activation
@pytest.mark.parametrize("variant", EVERY)
@pytest.mark.parametrize("number", [1, 4, 6, 8, 14])
def test_steps_with_ridges_and_divisors_are_the_oracles(variant, number):
    shape, model = case(number)
    models = with_ridges(replace(model, rows=shape.batch + 4))
    models = models if variant.precision == "fp32" else models[2:3]
    fleet = Fleet(variant, shape, models)
    for _ in range(2):
        fleet.check_a_step()
    fleet.check_gaps()
    penalised = [one.ridge is not None and one.ridge.strength > 0.0 for one in models]
    assert ((fleet.stats[:, c.PENALTIES] > 0.0) == penalised).all()


@pytest.mark.parametrize("variant", FIRST)
@pytest.mark.parametrize("number", [1, 8])
def test_a_model_without_a_ridge_has_the_bits_that_it_has_alone(variant, number):
    shape, model = case(number)
    models = with_ridges(model)
    alone, fleet = Fleet(variant, shape, models[:1]), Fleet(variant, shape, models)
    alone.run([2])
    fleet.run([2] * 3)
    found = fleet.everything()
    for name, array in alone.everything().items():
        assert_same(array[0], found[name][0], name)
    assert len({row.tobytes() for row in fleet.params}) == 3


@pytest.mark.parametrize("variant", FIRST)
@pytest.mark.parametrize("number", [1, 5])
def test_a_batch_that_weighs_nothing_has_no_penalty(variant, number):
    shape, model = case(number)
    plain = replace(model, rule=RULES["sgd"], decay=0.0, ridge=c.Ridge(0.3, 2.0))
    fleet = Fleet(variant, shape, [plain])
    fleet.weight[...] = 0.0
    before = fleet.everything()
    fleet.check_a_step()
    assert fleet.stats.tolist()[0][c.LAST_LOSS : c.LOSS_SUM + 1] == [0.0, 0.0] and fleet.stats[0, c.PENALTIES] == 0.0
    assert fleet.params.tobytes() == before["params"].tobytes()
    # what weighs something again is pulled again
    fleet.weight[...] = 1.0
    fleet.check_a_step()
    assert fleet.stats[0, c.PENALTIES] > 0.0 and fleet.counters[0, c.BATCH_INDEX] == 2


@pytest.mark.parametrize("variant", FIRST)
@pytest.mark.parametrize("number", [1, 5])
def test_a_weight_that_is_nan_reaches_its_model_and_no_padding(variant, number):
    shape, model = case(number)
    fleet = Fleet(variant, shape, [replace(model, ridge=c.Ridge(0.3))])
    fleet.weight[fleet.rows[0, 0]] = np.nan
    fleet.run([2])
    assert np.isnan(fleet.stats[0, c.LAST_LOSS]) and np.isnan(fleet.tensor(fleet.params[0], "w0")).all()
    fleet.check_gaps()


@pytest.mark.skipif(platform.machine().lower() not in ("x86_64", "amd64"), reason="only x86 has a bit for it")
def test_denormal_numbers_are_zero_in_the_loop_and_numbers_after_it():
    model = Model(c.UpdateRule("sgd"), c.LossSpec("cross_entropy"), decay=0.1)
    fleet = Fleet(FIRST[0].values[0], Shape(activations=("relu", "identity")), [model], "train_resident")
    # a feature that is always zero: its weights only decay
    fleet.x[:, 2] = 0.0
    weights, smallest = fleet.tensor(fleet.params[0], "w0"), np.float32(np.finfo(np.float32).tiny)
    weights[:, 2] = smallest
    fleet.run(1)
    assert (weights[:, 2] == 0.0).all()
    assert np.multiply(smallest, np.float32(0.5)) > 0.0
