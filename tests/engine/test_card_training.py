"""Whole trainings on the backends of cards, step by step within the bound of the oracle and of the NumPy backend.

Without a card Triton's interpreter runs fp32 and fp16: it computes bf16 wrongly, on raw bit patterns. CuPy's kernels
run as C++ on the host, under a stand-in: this checks their results and the backend's code, but no cuBLAS, no streams.
"""

from dataclasses import dataclass, replace

import numpy as np
import pytest
from devices import CUPY_GPU, GPU, INTERPRETER, STAND_IN, Variant, places, usable, variants_of, why_not
from step_bounds import Step, TwoBytes, _host
from tolerance import assert_within

import fusemlp
from fusemlp import (
    DPSGD,
    FGSM,
    MLP,
    SGD,
    Adam,
    AdamW,
    BackendUnavailableError,
    CrossEntropy,
    Engine,
    Fleet,
    ParameterOptions,
)
from fusemlp.runtime.plans import planned
from fusemlp_kernels.contract import BATCH_INDEX, LAST_LOSS, LOSS_SCALE, SKIPPED
from fusemlp_kernels.philox import row_order
from make import assert_same, data

X, y = data(29)
CARDS = INTERPRETER, GPU, STAND_IN, CUPY_GPU
OF_CUPY = pytest.mark.parametrize("device", places(STAND_IN, CUPY_GPU))
SIZES = [6, 9, 7, 4]
# Each step is compared by itself: a few have every kind of batch, and begin, run and end a schedule.
BATCH, STEPS = 16, 6
TANH = MLP(SIZES, activation="tanh")


@dataclass(frozen=True)
class Case:
    optimizer: object = Adam(0.02)
    loss: object = CrossEntropy()
    net: MLP = TANH
    data: str = "labels"
    weighted: bool = False


FROZEN = {"2.weight": ParameterOptions(trainable=False), "*.bias": ParameterOptions(lr_factor=0.5)}
OPTIMIZERS = {
    "sgd": SGD(0.1, weight_decay=0.02),
    "momentum": SGD(0.05, momentum=0.9, weight_decay=0.02),
    "nesterov": SGD(0.05, momentum=0.9, nesterov=True),
    "adam": Adam(0.02, weight_decay=0.02),
    "adamw": AdamW(0.02, weight_decay=0.1),
    "scikit-learn's sgd": SGD(0.05, momentum=0.9, nesterov=True, convention="scikit-learn"),
    "scikit-learn's adam": Adam(0.02, convention="scikit-learn"),
    "a schedule": SGD(fusemlp.Cosine(0.1, steps=5, warmup=2), momentum=0.9),
    "another schedule": AdamW(fusemlp.OneCycle(0.05, steps=STEPS)),
    "clipped": SGD(0.1, momentum=0.9, clip_norm=0.3),
    "accumulated": AdamW(0.02, accumulate=3),
    "accumulated and clipped": SGD(0.1, accumulate=2, clip_norm=0.3),
    "frozen": Adam(0.02, weight_decay=0.1, per_parameter=FROZEN),
    "frozen, gradients stored": SGD(0.1, clip_norm=0.3, per_parameter=FROZEN),
    "lower layers frozen": SGD(0.1, momentum=0.9, per_parameter={"[02].*": ParameterOptions(trainable=False)}),
}
SHARES = [0.5, 2.0, 1.0, 0.0]
LOSSES = {
    "smoothed": Case(loss=CrossEntropy(label_smoothing=0.1, class_weight=SHARES), weighted=True),
    "ignored labels": Case(loss=CrossEntropy(ignore_index=-100), data="ignored labels"),
    "soft targets": Case(loss=CrossEntropy(), data="soft"),
    "cross_entropy, sum": Case(SGD(0.01), CrossEntropy(reduction="sum")),
    "binary_cross_entropy": Case(loss=fusemlp.BinaryCrossEntropy(), data="binary", weighted=True),
    "mse": Case(loss=fusemlp.MSE(), data="values", weighted=True),
    "mae": Case(loss=fusemlp.MAE(), data="values"),
    "huber": Case(loss=fusemlp.Huber(delta=0.2), data="values"),
    "poisson": Case(loss=fusemlp.Poisson(), data="counts"),
    "quantile": Case(loss=fusemlp.Quantile(q=0.8), data="values"),
    "mse behind prelu": Case(loss=fusemlp.MSE(), data="values", net=MLP(SIZES, output_activation=fusemlp.PReLU(0.3))),
}
NETWORKS = {
    "relu, dropout": MLP(SIZES, activation="relu", dropout=[0.2, 0.5]),
    "gelu and prelu, dropout": MLP(SIZES, activation=["gelu", fusemlp.PReLU(0.2)], dropout=[0.0, 0.3]),
    "leaky_relu and sigmoid": MLP(SIZES, activation=[fusemlp.LeakyReLU(0.1), "sigmoid"]),
    "silu, dropout": MLP(SIZES, activation="silu", dropout=0.3),
    "identity": MLP(SIZES, activation="identity"),
    "no hidden layer": MLP([6, 4]),
    "an output wider than a tile": MLP([6, 5, 300]),
    "one of each": MLP([1, 1, 2]),
}
CASES = {
    **{name: Case(optimizer) for name, optimizer in OPTIMIZERS.items()},
    **LOSSES,
    **{name: Case(net=net) for name, net in NETWORKS.items()},
}


def batch_of(case, rng, rows=BATCH):
    inputs, outputs = case.net.sizes[0], case.net.sizes[-1]
    X = rng.standard_normal((rows, inputs)).astype(np.float32)
    labels = rng.integers(0, outputs, rows)
    y = {
        "labels": labels,
        "ignored labels": np.where(rng.random(rows) < 0.2, -100, labels),
        "soft": rng.dirichlet(np.ones(outputs), rows).astype(np.float32),
        "binary": (rng.random((rows, outputs)) < 0.4).astype(np.float32),
        "values": rng.standard_normal((rows, outputs)).astype(np.float32),
        "counts": rng.poisson(1.5, (rows, outputs)).astype(np.float32),
    }[case.data]
    return X, y, rng.uniform(0.2, 2.0, rows).astype(np.float32) if case.weighted else None


def exact_batch(X, y, weight):
    return X, y.astype(np.float64) if y.dtype.kind == "f" else y, None if weight is None else weight.astype(np.float64)


def follow(follower, leader):
    """Copy another engine's state, between backends with different layouts of arenas."""
    follower.memory.write(leader.memory.tensors())
    for index in range(len(leader.memory.states)):
        follower.memory.write(leader.memory.tensors(f"state{index}"), f"state{index}")
    for name in ("counters", "hyper"):
        follower.memory.backend.copy_into(follower.memory.arrays[name], _host(leader, name))


@pytest.fixture(params=places(*CARDS))
def device(request):
    with usable(request.param):
        yield request.param


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_every_step_is_the_oracles_and_the_numpy_backends(case, device):
    rng = np.random.default_rng(1)
    engines = [Engine(case.net, case.loss, case.optimizer, BATCH, seed=5, backend=b) for b in (device.backend, "numpy")]
    own, numpy = engines
    start = own.state_dict()
    every = case.optimizer.accumulate
    for update in range(-(-STEPS // every)):
        if update:
            follow(numpy, own)
        step = Step(own, products=Variant(device, "fp32").products)
        for micro in range(every):
            # a short batch now and then
            X, y, weight = batch_of(case, rng, BATCH - 5 * ((update + micro) % 4 == 3))
            trace = step.trace(*exact_batch(X, y, weight))
            losses = [float(engine.step(X, y, weight)) for engine in engines]
            assert_within(losses[0], trace.loss, trace.loss_bound)
            assert_within(losses[0], losses[1], 2.0 * trace.loss_bound)
        limits = step.check()
        for name, limit in limits.items():
            assert_within(own.state_dict()[name], numpy.state_dict()[name], 0.0 if limit is None else 2.0 * limit)
    assert any((array != start[name]).any() for name, array in own.state_dict().items())


IN_FLOAT16 = ("adamw", "clipped", "accumulated", "relu, dropout", "gelu and prelu, dropout", "mse")


@pytest.mark.parametrize("name", IN_FLOAT16)
def test_every_step_in_float16_is_within_its_bound(name, device):
    case = CASES[name]
    rng = np.random.default_rng(2)
    engine = Engine(case.net, case.loss, case.optimizer, BATCH, seed=5, backend=device.backend, precision="fp16")
    every = case.optimizer.accumulate
    for _ in range(6):
        scale = float(_host(engine, "hyper")[LOSS_SCALE])
        step = Step(engine, replace(TwoBytes(), scale=scale), Variant(device, "fp16").products)
        for _ in range(every):
            X, y, weight = batch_of(case, rng)
            X = X.astype(np.float16).astype(np.float32)
            trace = step.trace(*exact_batch(X, y, weight))
            assert_within(float(engine.step(X, y, weight)), trace.loss, trace.loss_bound)
        assert _host(engine, "counters")[SKIPPED] == 0
        step.check()


def check_fit(device, precision):
    """Rows read by index, shuffled, with a short last batch, give bitwise the losses of the same batches."""
    rng = np.random.default_rng(3)
    X, y = rng.standard_normal((37, 6)).astype(np.float32), rng.integers(0, 4, 37)
    fitted, stepped = (
        Engine(MLP(SIZES, dropout=0.2), batch_size=BATCH, seed=9, backend=device.backend, precision=precision)
        for _ in range(2)
    )
    losses = []

    class Losses:
        def on_batch_end(self, engine, batch):
            # ``step`` returns it in single precision.
            losses.append(float(np.float32(_host(engine, "stats")[LAST_LOSS])))

    fitted.fit(X, y, epochs=2, callbacks=[Losses()])
    expected = []
    for epoch in range(2):
        order = row_order(37, 9, epoch)
        for first in range(0, 37, BATCH):
            rows = order[first : first + BATCH]
            expected.append(float(stepped.step(X[rows], y[rows])))
    assert losses == expected
    assert int(_host(fitted, "counters")[BATCH_INDEX]) == len(expected)
    assert_same(fitted, stepped)


@pytest.mark.parametrize("variant", variants_of(*CARDS))
def test_fit_gives_the_losses_of_steps(variant):
    with usable(variant.device):
        check_fit(variant.device, variant.precision)


@OF_CUPY
def test_what_has_no_kernels_is_refused_before_anything_changes(device, caplog):
    net, members = MLP([5, 4, 3]), MLP([5, 4, 3], members=2)
    said = "the cupy backend has no kernels for {}; use backend='triton' or 'numpy'$"
    with usable(device), caplog.at_level("INFO"):
        engine, attack = Engine(net, backend="cupy"), FGSM(0.1)
        before = engine.memory.snapshot()
        for argument, what, refused in (
            ("members", "members that share weights", lambda: Engine(members, backend="cupy")),
            ("members", "members that share weights", lambda: planned(members, backend="cupy")),
            ("privacy", "clipped rows and noise", lambda: Engine(net, privacy=DPSGD(1.0), backend="cupy")),
            ("adversarial", "attacks inside a training step", lambda: engine.fit(X, y, epochs=1, adversarial=attack)),
        ):
            with pytest.raises(BackendUnavailableError, match=f"^{argument}: {said.format(what)}"):
                refused()
        assert_same(engine.memory.snapshot(), before)
        # an engine trains with the next one
        assert "cupy" not in (Engine(members).backend, Engine(net, privacy=DPSGD(1.0)).backend)
        assert "passes over cupy: privacy: the cupy backend has no kernels for clipped rows and noise" in caplog.text


@OF_CUPY
def test_a_fleet_trains_one_model_after_another(device):
    net, options = MLP([5, 9, 3], dropout=0.2), {"batch_size": 8, "backend": device.backend}
    fit = {"epochs": 4, "validation_data": (X[:9], y[:9]), "early_stopping": 1}
    vary = [{"lr": 0.1}, {"lr": 1e30}, {"seed": 2}]
    with usable(device):
        results = Fleet(net, optimizer=SGD(), vary=vary, **options).fit(X, y, **fit)
        assert [member.status == "diverged" for member in results.members] == [False, True, False]
        for index in (0, 2):
            rate, seed = vary[index].get("lr", SGD().lr), vary[index].get("seed", 0)
            engine = Engine(net, optimizer=SGD(rate), seed=seed, **options)
            engine.fit(X, y, **fit)
            assert results.engine(index).history.history == engine.history.history
            assert_same(results.engine(index).memory.snapshot(), engine.memory.snapshot())


def test_an_epoch_on_graphs_waits_once(monkeypatch):
    if (reason := why_not(STAND_IN)) is not None:
        pytest.skip(f"cupy on the host: {reason}")
    with usable(STAND_IN):
        from cupy_standin import arrays

        from fusemlp_kernels.cupy import device

        reads, asnumpy = [], arrays.asnumpy

        def counted(array):
            reads.append(array.nbytes)
            return asnumpy(array)

        monkeypatch.setattr(arrays, "asnumpy", counted)
        monkeypatch.setattr(device.cupy, "asnumpy", counted)
        engine = Engine(MLP([5, 9, 3]), batch_size=8, backend="cupy", plan="graph", normalise=False)
        engine.fit(X, y, epochs=1)
        counts = [len(reads)]
        for epochs in (3, 4):
            engine.fit(X, y, epochs=epochs)
            counts.append(len(reads))
        # of an epoch: a fit of four has one more than a fit of three
        assert (counts[2] - counts[1]) - (counts[1] - counts[0]) == 1 and reads[-1] <= 1024
