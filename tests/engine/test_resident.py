"""The resident plan on the CPU: the same training as the eager plan, in one compiled loop.

In float64 the two plans differ by the order of sums alone. A step changes parameters by the learning rate times sums of
at most a few hundred terms of order one, each rounded to 2**-53: after the 60 steps here the runs may be 1e-12 apart,
and whole runs are promised to agree to 1e-9.
"""

from types import SimpleNamespace

import numpy as np
import pytest
from step_bounds import Step
from tolerance import assert_within

from fusemlp import (
    MAE,
    MLP,
    MSE,
    SGD,
    Adam,
    AdamW,
    BinaryCrossEntropy,
    Callback,
    Cosine,
    CrossEntropy,
    Engine,
    Exponential,
    Huber,
    LeakyReLU,
    OneCycle,
    ParameterOptions,
    Poisson,
    PReLU,
    Quantile,
    StepDecay,
    load_checkpoint,
)
from fusemlp.program import lowering
from fusemlp_kernels.contract import ACTIVATIONS, BATCH_INDEX, LAST_LOSS
from fusemlp_kernels.numpy import launches
from fusemlp_kernels.numpy.backend import NumpyBackend
from fusemlp_kernels.philox import row_order
from make import assert_same_state

ROWS, WIDTH, OUTPUTS, BATCH, EPOCHS = 45, 12, 5, 8, 10
SIZES = [WIDTH, 9, 7, OUTPUTS]
TOLERANCE = 1e-9

random = np.random.default_rng(0)
X = random.standard_normal((ROWS, WIDTH))
CLASSES = random.integers(0, OUTPUTS, ROWS)
VALUES = random.standard_normal((ROWS, OUTPUTS))
WEIGHTS = random.random(ROWS) * (random.random(ROWS) > 0.2)
SOFT = VALUES**2 / (VALUES**2).sum(axis=1, keepdims=True)


def trained(plan, net=None, targets=CLASSES, fit=None, data=X, **options):
    """An engine after the training of this file's tests, in float64 unless ``options`` say otherwise."""
    settings = {"optimizer": Adam(0.01), "batch_size": BATCH, "seed": 3, "backend": "numpy", "precision": "fp64"}
    engine = Engine(net or MLP(SIZES), plan=plan, **{**settings, **options})
    engine.fit(data, targets, **{"epochs": EPOCHS, **(fit or {})})
    return engine


def assert_plans_agree(*arguments, **options):
    """Parameters, optimizer state, history and clock of both plans; and the training did something."""
    resident, eager = (trained(plan, *arguments, **options) for plan in ("resident", "eager"))
    assert resident.plan == "resident"
    start = resident.network.initial_parameters(resident.seed)
    for name, expected in eager.state_dict().items():
        np.testing.assert_allclose(resident.state_dict()[name], expected, rtol=0, atol=TOLERANCE, err_msg=name)
        if resident.optimizer.options_for(name)[0]:
            assert not np.array_equal(expected, start[name]), name
        else:
            assert np.array_equal(resident.state_dict()[name], start[name]), name
    for found, expected in zip(resident.memory.states, eager.memory.states, strict=True):
        np.testing.assert_allclose(found, expected, rtol=0, atol=TOLERANCE)
    assert resident.history.history.keys() == eager.history.history.keys()
    for name, series in eager.history.history.items():
        np.testing.assert_allclose(resident.history.history[name], series, rtol=0, atol=TOLERANCE, err_msg=name)
    assert np.array_equal(resident.memory.counters[:2], eager.memory.counters[:2])
    assert np.array_equal(resident.memory.hyper, eager.memory.hyper)


@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations_and_dropout(activation, dropout):
    assert_plans_agree(MLP(SIZES, activation=activation, dropout=dropout))


SHARES = [1.0, 2.0, 0.5, 0.0, 3.0]
SKLEARN = {"convention": "scikit-learn", "weight_decay": 0.1}
BINARY, COUNTS = (VALUES > 0).astype(float), np.abs(VALUES).round()


@pytest.mark.parametrize(
    ("loss", "targets", "optimizer", "net"),
    [
        (CrossEntropy(label_smoothing=0.2, class_weight=SHARES), CLASSES, Adam(Cosine(0.02, warmup=5)), MLP(SIZES)),
        (CrossEntropy(label_smoothing=0.2, class_weight=SHARES), SOFT, AdamW(0.01, decay_biases=False), MLP(SIZES)),
        (CrossEntropy(class_weight=SHARES, ignore_index=2), CLASSES, SGD(0.05, momentum=0.9, **SKLEARN), MLP(SIZES)),
        (CrossEntropy(reduction="sum"), CLASSES, SGD(0.005, clip_norm=0.1), MLP(SIZES, activation="prelu")),
        (BinaryCrossEntropy(), BINARY, SGD(StepDecay(0.05, every=7, gamma=0.5)), MLP([WIDTH, OUTPUTS])),
        (BinaryCrossEntropy(reduction="sum"), BINARY, SGD(0.005, accumulate=4), MLP(SIZES)),
        (MSE(), VALUES, SGD(0.05, momentum=0.9, nesterov=True, weight_decay=0.1), MLP(SIZES, output_activation="gelu")),
        (MSE(), np.eye(OUTPUTS)[CLASSES], Adam(OneCycle(0.02)), MLP(SIZES, output_activation="sigmoid")),
        (MAE(), VALUES, SGD(Exponential(0.05, gamma=0.97), momentum=0.5), MLP(SIZES, output_activation=PReLU(0.3))),
        (Huber(delta=0.3), VALUES, Adam(0.01, eps=1e-4, **SKLEARN), MLP(SIZES, activation=LeakyReLU(1.5))),
        (Quantile(0.8), VALUES, Adam(0.01, clip_norm=0.1, accumulate=4), MLP(SIZES, activation=LeakyReLU(0.0))),
        (Poisson(), COUNTS, SGD(0.05, momentum=0.9, nesterov=True, **SKLEARN), MLP(SIZES, activation="tanh")),
    ],
    ids=lambda value: None if isinstance(value, np.ndarray) else type(value).__name__,
)
@pytest.mark.parametrize("weighted", [False, True])
def test_losses_and_optimizers(loss, targets, optimizer, net, weighted):
    fit = {"sample_weight": WEIGHTS if weighted else None}
    assert_plans_agree(net, targets, loss=loss, optimizer=optimizer, fit=fit)


@pytest.mark.parametrize("kind", [SGD, Adam])
def test_frozen_tensors_and_rules_of_their_own(kind):
    frozen = ParameterOptions(trainable=False)
    own = ParameterOptions(lr_factor=0.5, weight_decay=0.3)
    for rules in ({"0.weight": frozen, "2.bias": frozen, "2.weight": own}, {"[02].*": frozen}):
        assert_plans_agree(optimizer=kind(0.02, per_parameter=rules))


def test_what_fit_offers():
    backwards = np.arange(ROWS)[::-1]
    for fit in (
        {"drop_last": True},
        {"shuffle": False},
        {"row_order": lambda epoch: np.roll(backwards, epoch)},
        {"validation_data": (X[:20], CLASSES[:20]), "early_stopping": 2, "epochs": 40},
        {"validation_data": (X[:20], CLASSES[:20]), "early_stopping": "auto", "epochs": 40},
    ):
        assert_plans_agree(fit=fit)


class Bounded(Callback):
    """Compares every update with the oracle's, from the state before it, and every loss."""

    def __init__(self, targets, weight):
        self.targets, self.weight = targets, weight
        self.checked = 0

    def on_train_begin(self, engine):
        self.step = Step(engine)
        self.traces = [self.trace(engine)]

    def trace(self, engine):
        batches = -(-ROWS // BATCH)
        epoch, batch = divmod(int(engine.memory.counters[BATCH_INDEX]), batches)
        rows = row_order(ROWS, engine.seed, epoch)[batch * BATCH :][:BATCH]
        targets = self.targets[rows]
        if targets.dtype.kind == "f":
            targets = targets.astype(np.float32).astype(np.float64)
        weight = None if self.weight is None else self.weight[rows].astype(np.float32).astype(np.float64)
        return self.step.trace(X[rows].astype(np.float32), targets, weight)

    def on_batch_end(self, engine, batch):
        trace = self.traces[-1]
        assert_within(engine.memory.stats[LAST_LOSS], trace.loss, trace.loss_bound)
        self.checked += 1
        if self.checked % engine.optimizer.accumulate == 0:
            self.step.check()
            self.step = Step(engine)
        self.traces.append(self.trace(engine))


STEEP = MLP(SIZES, activation=["gelu", PReLU(0.2)], dropout=[0.0, 0.3])


@pytest.mark.parametrize(
    ("loss", "targets", "optimizer", "net"),
    [
        (CrossEntropy(), CLASSES, SGD(0.1, weight_decay=0.02), MLP(SIZES, dropout=[0.2, 0.5])),
        (CrossEntropy(label_smoothing=0.1, class_weight=[0.5, 2, 1, 0, 1]), CLASSES, Adam(0.02), STEEP),
        (CrossEntropy(), SOFT, AdamW(0.02, accumulate=3), MLP(SIZES, activation="silu", dropout=0.3)),
        (BinaryCrossEntropy(), BINARY, SGD(0.05, momentum=0.9), MLP(SIZES, activation="tanh")),
        (MSE(), VALUES, SGD(0.1, clip_norm=0.3), MLP(SIZES, activation="sigmoid", output_activation=PReLU(0.3))),
        (Huber(delta=0.2), VALUES, SGD(0.05, momentum=0.9, nesterov=True), MLP(SIZES, activation="leaky_relu")),
        (Poisson(), COUNTS, Adam(0.02, convention="scikit-learn"), MLP(SIZES, activation="identity")),
        (Quantile(0.8), VALUES, SGD(Cosine(0.1, steps=15, warmup=3), momentum=0.9), MLP([WIDTH, OUTPUTS])),
    ],
    ids=lambda value: type(value).__name__,
)
@pytest.mark.parametrize("weighted", [False, True])
def test_every_step_in_single_precision_is_within_its_bound(loss, targets, optimizer, net, weighted):
    weight = WEIGHTS if weighted else None
    watcher = Bounded(targets, weight)
    engine = Engine(net, loss, optimizer, BATCH, seed=5, backend="numpy", plan="resident")
    engine.fit(X, targets, epochs=4, sample_weight=weight, callbacks=watcher)
    assert watcher.checked == 4 * -(-ROWS // BATCH)


def test_a_run_repeats_bit_for_bit_and_however_it_is_cut():
    net, batches = MLP(SIZES, dropout=0.3, activation="gelu"), []
    watching = SimpleNamespace(on_batch_end=lambda engine, batch: batches.append(batch))
    first, again, watched = (
        trained("resident", net, precision="fp32", fit=fit) for fit in ({}, {}, {"callbacks": watching})
    )
    assert_same_state(again, first)
    assert_same_state(watched, first)
    assert batches == [*range(-(-ROWS // BATCH))] * EPOCHS


def test_a_checkpoint_keeps_the_plan(tmp_path):
    trained("eager").save_checkpoint(tmp_path / "there")
    assert load_checkpoint(tmp_path / "there").plan == "eager"


def test_data_that_cannot_be_written_to_or_has_gaps():
    wide, frozen = np.zeros((ROWS, 2 * WIDTH)), X.copy()
    wide[:, ::2] = X
    frozen.flags.writeable = False
    expected = trained("resident")
    for data in (wide[:, ::2], frozen):
        assert_same_state(trained("resident", data=data), expected)


def test_a_program_that_is_bound_again_reads_the_arrays_of_its_own_model():
    """Also after a model whose targets were its inputs, and one whose data could not be read in place."""
    net = MLP([WIDTH, 9, WIDTH])
    targets, wide = np.roll(X, 1, axis=1), np.zeros((ROWS, 2 * WIDTH))
    wide[:, ::2] = targets
    wanted = trained("resident", net, targets, loss="mse")
    for before in (X, targets, wide[:, ::2]):
        lowering.lowered.cache_clear()
        trained("resident", net, before, loss="mse")
        assert_same_state(trained("resident", net, targets, loss="mse"), wanted)


def test_the_printed_program_is_what_the_loop_runs(monkeypatch):
    """``fit`` binds the calls of ``engine.program``, in their order, and nothing else."""
    bound = []
    bind = NumpyBackend.bind

    def watched(backend, op, **operands):
        bound.append((op, operands))
        return bind(backend, op, **operands)

    monkeypatch.setattr(NumpyBackend, "bind", watched)
    engine = trained("resident", MLP(SIZES, activation="prelu", dropout=0.3), optimizer=SGD(0.1, clip_norm=1.0))
    [(op, given)] = bound
    assert op == "train_resident"
    program = engine.program
    assert program.resident and program.launches == 1
    assert [op for op, _ in given["calls"]] == [call.op for call in program.calls]
    for (_, operands), call in zip(given["calls"], program.calls, strict=True):
        assert operands.keys() == call.operands.keys()
    assert str(program).endswith("\n7 calls, run as one loop over the steps: 1 launch")


PRUNED = [
    (MLP(SIZES), SGD(0.05), "cross_entropy", CLASSES),
    (MLP(SIZES, activation=["gelu", PReLU(0.2)], dropout=0.3), Adam(0.01, clip_norm=0.1), "cross_entropy", SOFT),
    (MLP(SIZES, activation="tanh"), SGD(0.05, momentum=0.9, nesterov=True), "huber", VALUES),
    (MLP(SIZES, activation="identity", members=2), SGD(0.05), "cross_entropy", CLASSES),
]


@pytest.mark.parametrize(("net", "optimizer", "loss", "targets"), PRUNED, ids=lambda value: type(value).__name__)
def test_a_loop_of_what_a_program_uses_computes_the_same_bits(net, optimizer, loss, targets, monkeypatch):
    """The tests run the loop for all programs, which is compiled once; users that of their program."""
    options = {"net": net, "optimizer": optimizer, "loss": loss, "targets": targets, "precision": "fp32"}
    whole = trained("resident", **options)
    monkeypatch.delenv(launches.WHOLE_LOOP)
    made = []
    work = launches.work_for

    def watched(names, real, *, alone):
        made.append(names)
        return work(names, real, alone=alone)

    monkeypatch.setattr(launches, "work_for", watched)
    # a program remembers its loop, and the one for all programs would serve
    lowering.lowered.cache_clear()
    monkeypatch.setattr(launches, "_loops", {})
    engine = trained("resident", **options)
    assert_same_state(engine, whole)
    # it has code for all that comes after the training
    engine.evaluate(X, targets)
    engine.step(X[:BATCH], targets[:BATCH])
    assert len(launches._loops) == 1
    assert "AFFINE" in made[0] and not {"MAE", "POISSON", "SIGMOID"} & made[0]
    assert launches.OPTIMIZER_NAMES[optimizer.rule().code] in made[0]


@pytest.mark.parametrize("n", [1, 2, 3, 63, 64, 65, 1437, 10000])
def test_the_order_of_the_rows_is_that_of_every_plan(n):
    for seed, epoch in ((0, 0), (5, 7), (2**40 + 3, 2**32 - 1)):
        assert np.array_equal(launches.compiled_row_order(n, seed, epoch), row_order(n, seed, epoch))


@pytest.mark.parametrize("targets", ["classes", "soft"])
def test_many_classes(targets):
    generator = np.random.default_rng(4)
    classes = generator.integers(0, 131, ROWS)
    soft = generator.dirichlet(np.ones(131), ROWS)
    assert_plans_agree(MLP([WIDTH, 7, 131]), classes if targets == "classes" else soft, optimizer=SGD(0.5))
