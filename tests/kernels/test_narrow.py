"""The narrow plan under Triton's interpreter: a step is two launches, and each is the oracle's within its bounds."""

import gc
import itertools
import weakref
from unittest import mock

import numpy as np
import pytest

pytest.importorskip("triton")

from step_bounds import Step
from tolerance import U32, assert_within, growth

import fusemlp
from fusemlp import MLP, SGD, Adam, CrossEntropy, Engine, ParameterOptions
from fusemlp.runtime.plans import choose_plan, planned
from fusemlp_kernels import contract
from fusemlp_kernels.contract import LAST_LOSS, LossSpec, Segment, TensorRule, UpdateRule
from fusemlp_kernels.registry import TRAITS, interprets_triton
from fusemlp_kernels.triton import backend, configs

interpreted = pytest.mark.skipif(not interprets_triton(), reason="for Triton's interpreter: TRITON_INTERPRET=1")

# each program has three tiles of the larger batch, and fewer of the last one
ROWS, WIDTH, CLASSES, BATCH = 75, 21, 5, 70
rng = np.random.default_rng(2)
X = rng.standard_normal((ROWS, WIDTH)).astype(np.float32)
classes = (X @ rng.standard_normal((WIDTH, CLASSES))).argmax(axis=1)
numbers = rng.standard_normal((ROWS, CLASSES)).astype(np.float32)
labels = (numbers > 0).astype(np.float32)
WEIGHT = rng.uniform(0.5, 2.0, ROWS).astype(np.float32)
NET = MLP([WIDTH, 30, 18, CLASSES], activation="tanh")


def engine_of(net=NET, loss="cross_entropy", plan="narrow", batch_size=BATCH, **options):
    options = {"optimizer": Adam(0.02, weight_decay=0.01), **options}
    return Engine(net, loss, batch_size=batch_size, seed=5, backend="triton", plan=plan, **options)


FROZEN = dict.fromkeys(("0.weight", "2.bias"), ParameterOptions(trainable=False))
CASES = {
    "entropy": (NET, CrossEntropy(label_smoothing=0.1, class_weight=[0.5, 2, 1, 1, 1]), classes),
    "soft targets": (NET.but(activation="silu"), "cross_entropy", np.abs(numbers) / np.abs(numbers).sum(1)[:, None]),
    "ignored": (NET.but(activation="elu"), CrossEntropy(ignore_index=2), classes),
    "mse": (MLP([WIDTH, 64, CLASSES], activation="gelu"), "mse", numbers),
    "huber": (MLP([WIDTH, 9, 33, CLASSES], activation="selu", output_activation="tanh"), "huber", numbers),
    "labels": (MLP([64, 17, CLASSES], activation="leaky_relu"), "binary_cross_entropy", labels),
    "frozen": (NET.but(activation="relu"), "mae", numbers),
    "three layers": (MLP([WIDTH, 40, 18, 33, CLASSES]), "cross_entropy", classes),
}


@interpreted
@pytest.mark.parametrize("case", CASES)
def test_every_interpreted_step_is_the_oracles(case):
    """Full batches, some rows of a tile, one row; with weights of rows and without."""
    net, loss, y = CASES[case]
    x = X if net.sizes[0] == WIDTH else rng.standard_normal((ROWS, net.sizes[0])).astype(np.float32)
    optimizer = SGD(0.1, per_parameter=FROZEN if case == "frozen" else {})
    engine = engine_of(net, loss, optimizer=optimizer)
    for rows, weight in ((BATCH, None), (BATCH, WEIGHT), (17, WEIGHT), (1, None)):
        weight = None if weight is None else weight[:rows]
        step = Step(engine)
        trace = step.trace(x[:rows], y[:rows], weight)
        engine.step(x[:rows], y[:rows], weight)
        assert_within(float(engine.memory.stats[LAST_LOSS]), trace.loss, trace.loss_bound)
        step.check()
        Step(engine).check_outputs(engine.outputs(x[:rows]), x[:rows])


@interpreted
def test_predictions_are_one_launch_that_stores_the_outputs_alone():
    engine = engine_of(MLP([WIDTH, 30, 18, CLASSES]))
    program = engine.inference.forward.program(BATCH).program
    assert [call.op for call in program.calls] == ["predict_narrow"] and program.launches == 1
    assert {name for name, value in program.values.items() if value.kind == "work"} == {"y"}
    # a hidden layer, and a loss, are of the calls one by one
    program = engine.inference.forward.program(BATCH, layers=1).program
    assert [call.op for call in program.calls] == ["linear"]
    evaluated = [engine_of(engine.network, plan=plan).evaluate(X, classes) for plan in ("narrow", "eager")]
    assert evaluated[0] == evaluated[1]


@interpreted
@pytest.mark.parametrize("case", ["entropy", "labels"])
def test_an_interpreted_fit_is_that_of_the_calls_one_by_one(case):
    """The rows of the batches are gathered, the last batch is short; hits are counted."""
    net, loss, y = CASES[case]
    x = X if net.sizes[0] == WIDTH else rng.standard_normal((ROWS, net.sizes[0])).astype(np.float32)
    found = []
    for plan in ("narrow", "narrow", "eager"):
        engine = engine_of(net, loss, plan, optimizer=SGD(0.1, momentum=0.9))
        history = engine.fit(x, y, epochs=2, sample_weight=WEIGHT)
        found.append((engine.memory.snapshot()["params"], history.history))
    np.testing.assert_array_equal(found[0][0], found[1][0])
    np.testing.assert_allclose(found[0][0], found[2][0], rtol=0, atol=64 * U32)
    for name, values in found[2][1].items():
        if name in ("loss", "accuracy"):
            np.testing.assert_allclose(found[0][1][name], values, rtol=1e-6)


@interpreted
@pytest.mark.parametrize("loss", contract.LOSSES)
def test_an_interpreted_nan_goes_where_the_calls_bring_it(loss):
    """The narrow kernel reads off relu's outputs that a unit is off, and leaves NaN to dz."""
    found, y = [], classes if loss == "cross_entropy" else labels
    for plan in ("narrow", "eager"):
        engine = engine_of(MLP([WIDTH, 18, CLASSES], activation="relu"), loss, plan)
        x = X[:BATCH].copy()
        x[33, 4] = np.nan
        engine.step(x, y[:BATCH])
        found.append(np.isnan(engine.memory.snapshot()["params"]))
    np.testing.assert_array_equal(*found)
    assert found[0].any()


@interpreted
def test_many_interpreted_parts_are_added_in_order():
    """More than the kernel adds at a time, and not a multiple of it."""
    device, size, parts = backend.open_device(None, "fp32"), 264, 75
    kernels = fusemlp.runtime.plans.open_here("triton", None, "fp32")
    grads = rng.standard_normal((parts, size)).astype(np.float32)
    params, rule = device.zeros(size, "real"), UpdateRule("sgd")
    hyper = device.numbers([1.0, 1.0, 1.0, 1.0, 1.0, 0.0, 0.0], "float64")
    rates = device.numbers([[0.0, 1.0, 0.0, 0.0], [1.0, 1.0, 1.0, 0.0]], "float64")
    clock = {"hyper": hyper, "rates": rates, "counters": device.zeros(contract.COUNTERS, "int64")}
    segments = (Segment(0, 200, TensorRule()), Segment(208, 50, TensorRule()))
    flat = device.numbers(grads.reshape(-1), "real")
    run = kernels.bind(
        "update",
        params=params,
        grads=flat[:size],
        states=(),
        segments=segments,
        rule=rule,
        parts=parts,
        part=size,
        **clock,
    )
    run()
    trained = np.r_[:200, 208:258]
    limit = growth(parts) * U32 * np.abs(grads.astype(np.float64)).sum(0) + U32
    assert_within(-params.numpy()[trained], grads.astype(np.float64).sum(0)[trained], limit[trained])


def narrow_call(kernels, *sizes):
    """The operands of ``train_narrow`` for 6 rows and layers of these widths, inputs first."""

    def matrix(rows, columns):
        return kernels.view(kernels.allocate(rows * 8, "real"), 0, (rows, columns), 8)

    layers = [
        {"w": matrix(n, k), "b": kernels.allocate(n, "real"), "dw": matrix(n, k), "db": kernels.allocate(n, "real")}
        | {"activation": "identity"}
        for k, n in itertools.pairwise(sizes)
    ]
    counters, stats = kernels.allocate(contract.COUNTERS, "int64"), kernels.allocate(contract.STATS, "float64")
    batch = {"x": matrix(6, sizes[0]), "target": matrix(6, sizes[-1]), "counters": counters, "stats": stats}
    return {**batch, "layers": layers, "loss": LossSpec("mse"), "rule": UpdateRule("sgd"), "parts": 1, "part": 0}


@interpreted
def test_a_bound_call_keeps_its_gradients_alive():
    """The kernel has only the distances between them."""
    kernels = fusemlp.runtime.plans.open_here("triton", None, "fp32")
    operands = narrow_call(kernels, 4, 5, 3)
    held = [weakref.ref(layer[name]) for layer in operands["layers"] for name in ("dw", "db")]
    run = kernels.bind("train_narrow", **operands)
    del operands
    gc.collect()
    assert all(reference() is not None for reference in held)
    run()


@interpreted
@pytest.mark.parametrize("sizes", [(4,), (4, 3), (4, 5, 5, 5, 5, 3)])
def test_a_call_of_too_few_or_too_many_layers_is_refused(sizes):
    kernels = fusemlp.runtime.plans.open_here("triton", None, "fp32")
    with pytest.raises(fusemlp.ArgumentError, match="train_narrow: layers: expected 1 to 3 hidden layers"):
        kernels.bind("train_narrow", **narrow_call(kernels, *sizes))


@interpreted
def test_a_call_of_more_rows_than_the_kernel_counts_is_refused():
    kernels = fusemlp.runtime.plans.open_here("triton", None, "fp32")
    operands = narrow_call(kernels, 4, 5, 3)
    for name in ("x", "target"):
        operands[name] = operands[name][:1].expand((1 << 30) + 1, -1)
    with pytest.raises(fusemlp.ArgumentError, match=r"train_narrow: x: expected at most 2\*\*30 rows"):
        kernels.bind("train_narrow", **operands)


@interpreted
def test_layers_that_do_not_fit_together_are_refused():
    kernels = fusemlp.runtime.plans.open_here("triton", None, "fp32")
    operands = narrow_call(kernels, 4, 5, 3)
    operands["layers"][1] = narrow_call(kernels, 6, 3)["layers"][0]
    with pytest.raises(fusemlp.ArgumentError, match=r"layers\[1\]: w: expected 5 columns, as the layers have, got 6"):
        kernels.bind("train_narrow", **operands)


REFUSED = {
    "dropout": (MLP([4, 8, 2], dropout=0.5), {}, "the narrow kernel drops nothing so far"),
    "prelu": (MLP([4, 8, 2], activation="prelu"), {}, "learns no slope"),
    "norm": (MLP([4, 8, 2], norm="layer"), {}, "no normalised layers"),
    "members": (MLP([4, 8, 2], members=2), {}, "without members"),
    "encoding": (MLP([4, 8, 2], encoding=fusemlp.Frequency(2)), {}, "takes the inputs as they are"),
    "residual": (MLP([4, 8, fusemlp.Residual(6), 2]), {}, "no residual blocks"),
    "clip_norm": (MLP([4, 8, 2]), {"optimizer": SGD(clip_norm=1.0)}, "whose norm no launch takes"),
    "accumulate": (MLP([4, 8, 2]), {"optimizer": SGD(accumulate=2)}, "one batch an update"),
    "deep": (MLP([4, 8, 8, 8, 8, 2]), {}, "takes 1 to 3 hidden layers, not 4"),
    "no hidden layer": (MLP([4, 2]), {}, "takes 1 to 3 hidden layers, not 0"),
    "wide": (MLP([4, 65, 2]), {}, "65 inputs or units in a layer are more than the 64"),
    "outputs": (MLP([4, 8, 17]), {}, "17 outputs are more than the 16"),
    "activations": (MLP([4, 8, 8, 2], activation=["relu", "tanh"]), {}, "one activation for all hidden layers"),
}


@interpreted
@pytest.mark.parametrize(("net", "options", "said"), REFUSED.values(), ids=REFUSED)
def test_a_network_that_does_not_fit_is_refused_with_its_reason(net, options, said):
    with pytest.raises((fusemlp.ArgumentError, fusemlp.BackendUnavailableError), match=said):
        engine_of(net, **options)


@interpreted
def test_scaled_gradients_are_refused():
    with pytest.raises(fusemlp.BackendUnavailableError, match="is for fp32, tf32, not for fp16"):
        engine_of(precision="fp16")


@interpreted
def test_a_checkpoint_goes_on_in_as_many_parts(tmp_path):
    engine = engine_of()
    engine.fit(X, classes, epochs=1)
    engine.save_checkpoint(tmp_path / "narrow.npz")
    resumed = fusemlp.load_checkpoint(tmp_path / "narrow.npz", backend="triton")
    assert [call.op for call in resumed.inference.forward.program(BATCH).program.calls] == ["predict_narrow"]
    assert resumed.program.calls[0].operands["parts"] == engine.program.calls[0].operands["parts"] > 1
    for each in (engine, resumed):
        each.fit(X, classes, epochs=1)
    assert resumed.plan == "narrow"
    np.testing.assert_array_equal(resumed.memory.snapshot()["params"], engine.memory.snapshot()["params"])
    other = fusemlp.load(tmp_path / "narrow.npz", backend="triton", precision="fp16")
    assert other.plan != "narrow"
    other.fit(X, classes, epochs=1)


@interpreted
def test_the_layers_that_a_probe_trains_need_not_fit():
    engine = engine_of()
    engine.probe(X, classes, epochs=1)
    assert engine.plan == "narrow"


@interpreted
def test_training_against_attacks_is_refused():
    with pytest.raises(fusemlp.ArgumentError, match="trains on batches as they are"):
        engine_of(MLP([WIDTH, 8, CLASSES])).fit(X, classes, epochs=1, adversarial=fusemlp.FGSM(0.1))


def test_auto_takes_a_plan_that_cards_have_run():
    traits, net = TRAITS["triton"], MLP([32, 64, 64, 16])
    assert choose_plan("auto", traits, net, 1 << 18, "bf16")[0] == "graph"
    assert choose_plan("narrow", traits, net, 1 << 18, "bf16") == ("narrow", "asked for; no card has run it yet")
    with pytest.raises(fusemlp.BackendUnavailableError, match="narrow kernel is for bf16, not for fp32"):
        choose_plan("narrow", traits, net, 1 << 18, "fp32")
    with pytest.raises(fusemlp.BackendUnavailableError, match="numpy backend has eager, resident, got 'narrow'"):
        choose_plan("narrow", TRAITS["numpy"], net, 1 << 18, "fp32")
    assert planned(net, backend="triton", precision="bf16", batch_size=1 << 18)[0].launches == 7


@interpreted
def test_a_step_is_two_launches_that_read_the_batch_once():
    """The bytes are those of x, the labels, the row numbers and the parameters."""
    tile = configs.Tile(32, 64, 0, 4, 1, programs=2)
    with mock.patch.dict(configs.NARROW["interpreter"], fp32=tile):
        backend.open_device.cache_clear()
        engine = engine_of(MLP([32, 64, 64, 16]), batch_size=1 << 18)
    backend.open_device.cache_clear()
    program = engine.program
    assert [call.op for call in program.calls] == ["train_narrow", "update"] and program.launches == 2
    traffic = sum(map(program.traffic, program.calls))
    batch = (1 << 18) * (4 * 32 + 8 + 8)
    assert batch < traffic < batch + 32 * 4 * engine.network.parameter_count
    assert program.calls[0].operands["parts"] == engine.memory.gradient_parts == 2
