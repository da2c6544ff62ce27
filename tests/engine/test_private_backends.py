"""Private training on every backend: each step within the oracle's bound, the plan, and files from one to another."""

import itertools
import math
from dataclasses import dataclass, replace

import numpy as np
import pytest
from devices import GPU, INTERPRETER, NUMPY, places, usable
from step_bounds import traced
from tolerance import TINY, U32, assert_within, growth, update_bound

import fusemlp
from fusemlp import DPSGD, MLP, SGD, Adam, Engine, ParameterOptions
from fusemlp.program.layout import short_names
from fusemlp.runtime.ledger import PoissonRows
from fusemlp.runtime.plans import choose_plan
from fusemlp_kernels import philox, reference
from fusemlp_kernels.errors import BackendUnavailableError
from fusemlp_kernels.registry import TRAITS
from make import assert_same, layers_of

pytest.importorskip("dp_accounting")

SEED, ROWS, BATCH, CLIP = 11, 23, 6, 0.7
DEVICES = pytest.mark.parametrize("device", places(NUMPY, INTERPRETER, GPU))


@dataclass(frozen=True)
class Case:
    net: MLP
    loss: str = "cross_entropy"
    optimizer: object = SGD(0.3)
    weighted: bool = False

    def engine(self, **options):
        privacy = DPSGD(0.8, CLIP, seed=SEED)
        return Engine(self.net, self.loss, self.optimizer, BATCH, 5, privacy=privacy, **options)

    def data(self):
        generator, (inputs, *_, outputs) = np.random.default_rng(2), self.net.sizes
        X = generator.normal(size=(ROWS, inputs)).astype(np.float32)
        labels, values = generator.integers(0, outputs, ROWS), generator.normal(size=(ROWS, outputs)).astype(np.float32)
        weight = generator.uniform(0.2, 2.0, ROWS).astype(np.float32) if self.weighted else None
        return X, labels if self.loss == "cross_entropy" else values, weight


FROZEN = {"0.weight": ParameterOptions(trainable=False), "*.bias": ParameterOptions(lr_factor=0.5)}
CASES = {
    "sgd, tanh": Case(MLP([5, 9, 3], activation="tanh"), optimizer=SGD(0.3, momentum=0.9, weight_decay=0.02)),
    "adam, dropout, frozen": Case(MLP([5, 10, 9, 3], dropout=0.3), optimizer=Adam(0.02, per_parameter=FROZEN)),
    "mse, weighted": Case(MLP([7, 5], activation="gelu"), "mse", weighted=True),
}


def expected(engine, before, states, X, y, weight, update):
    """(name, new value, its bound) of each trained parameter after a step from ``before`` on a batch, in order."""
    net, layers = engine.network, layers_of(engine.network, before)
    spec = replace(engine.loss.spec(accuracy=False, soft=False), reduction="rows")
    names = list(short_names(net).values())
    options = {name: engine.optimizer.options_for(name) for name in names}
    trained = [name for name in names if options[name][0]]
    sums, sizes, errors = ({name: np.zeros_like(before[name]) for name in trained} for _ in range(3))
    keeps = [
        philox.dropout_keep(layer.rate, i, engine.seed, update, max(len(X), 1), len(layer.w)) if layer.rate else None
        for i, layer in enumerate(layers)
    ]
    for row in range(len(X)):
        one = slice(row, row + 1)
        batch = reference.Batch(
            X[one], y[one], None if weight is None else weight[one],
            keeps=[None if keep is None else keep[one] for keep in keeps]
        )  # fmt: skip
        trace = traced(layers, spec, batch)
        flat = (itertools.chain.from_iterable(nested) for nested in (trace.grads, trace.bounds))
        found = {name: pair for name, *pair in zip(names, *flat, strict=True) if name in trained}
        norm = math.sqrt(sum(np.square(g).sum() for g, _ in found.values()))
        off = math.sqrt(sum(np.square(error).sum() for _, error in found.values()))
        factor = min(1.0, CLIP / norm)
        # the factor and its product with dz are rounded
        relative = 3.0 * U32 + (off / max(norm - off, TINY) if norm + off > CLIP else 0.0)
        for name, (g, error) in found.items():
            sums[name] += factor * g
            sizes[name] += factor * np.abs(g)
            errors[name] += factor * (error + relative * (np.abs(g) + error))
    for number, name in enumerate(trained):
        z = philox.normal(SEED, number, update, sums[name].size).reshape(sums[name].shape)
        g = (sums[name] + engine.privacy.noise * CLIP * z) / BATCH
        error = (errors[name] + growth(len(X)) * U32 * sizes[name]) / BATCH + 2.0 * U32 * np.abs(g)
        rate = engine.optimizer.schedule.at(update)
        args = engine.optimizer.rule(), options[name][1], before[name], g, tuple(state[name] for state in states)
        yield name, reference.update(*args, update, rate)[0], update_bound(*args, update, rate, error)[0]


class EachStep(fusemlp.Callback):
    """Compares each step of a fit with the oracle's, from the parameters that the engine had before it."""

    def __init__(self, engine, data):
        self.data, self.steps, self.changed = data, 0, 0.0
        sampled = PoissonRows(ROWS, BATCH, SEED, {0: 0})
        self.batches = sampled.order(0).reshape(sampled.steps, sampled.size)
        self.remember(engine)

    def remember(self, engine):
        def exact(arena):
            return {name: array.astype(np.float64) for name, array in engine.memory.tensors(arena).items()}

        self.before = exact("params")
        self.states = [exact(f"state{index}") for index in range(engine.optimizer.rule().state_count)]

    def on_batch_end(self, engine, batch):
        rows = self.batches[self.steps]
        X, y, weight = (None if one is None else one[rows[rows >= 0]] for one in self.data)
        after = engine.state_dict()
        wanted = list(expected(engine, self.before, self.states, X.astype(np.float64), y, weight, self.steps))
        for name, new, limit in wanted:
            assert_within(after[name], new, limit)
            self.changed = max(self.changed, np.abs(after[name] - self.before[name]).max())
        for name in self.before.keys() - {name for name, *_ in wanted}:
            np.testing.assert_array_equal(after[name], self.before[name])
        self.steps += 1
        self.remember(engine)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
@DEVICES
def test_every_step_is_the_oracles(case, device):
    with usable(device):
        engine = case.engine(backend=device.backend, plan="eager")
        X, y, weight = case.data()
        check = EachStep(engine, (X, y, weight))
        engine.fit(X, y, sample_weight=weight, epochs=1, callbacks=[check])
        assert check.steps == 4 and check.changed > 1e-3
        assert engine.privacy_spent()["steps"] == 4


def test_the_resident_kernel_of_triton_has_no_privacy():
    step, reason = (MLP([64, 32, 10]), 32, "fp32"), "the triton backend's resident kernel trains without privacy"
    assert choose_plan("auto", TRAITS["triton"], *step)[0] == "resident"
    assert choose_plan("auto", TRAITS["triton"], *step, features={"privacy": True}) == ("graph", reason)
    assert choose_plan("auto", TRAITS["triton"], *step, models=100, features={"privacy": True})[0] == "graph"
    with pytest.raises(BackendUnavailableError, match=f"plan: {reason}"):
        choose_plan("resident", TRAITS["triton"], *step, features={"privacy": True})
    assert choose_plan("auto", TRAITS["numpy"], *step, features={"privacy": True})[0] == "resident"


@pytest.mark.parametrize("device", places(INTERPRETER))
def test_the_calls_of_a_step(device):
    """Triton's plain step has its update in ``grad_weight``; an engine that clips its gradients has one call less."""

    def ops(**options):
        engine = Engine(MLP([4, 8, 3]), batch_size=8, backend=device.backend, plan="eager", **options)
        return [call.op for call in engine.program.calls]

    with usable(device):
        private = ops(optimizer="adam", privacy=DPSGD(1.0))
        assert private[-3:] == ["clip_examples", "grad_weight", "update"]
        assert len(private) == len(ops(optimizer="adam")) + 2
        assert len(private) == len(ops(optimizer=Adam(clip_norm=1.0))) + 1


@pytest.mark.parametrize("device", places(GPU))
def test_a_graph_is_the_eager_steps(device):
    """Batches of other lengths too: the clock counts their rows."""
    case = CASES["adam, dropout, frozen"]
    X, y, _ = case.data()
    with usable(device):
        eager, graph = (case.engine(backend=device.backend, plan=plan) for plan in ("eager", "graph"))
        histories = [engine.fit(X, y, epochs=3).history for engine in (eager, graph)]
        assert_same(eager.memory.snapshot(), graph.memory.snapshot())
    assert histories[0] == histories[1]


@pytest.mark.parametrize("precision", ["bf16", "tf32"])
def test_rounded_rows_are_clipped_to_less(precision):
    """So that no row's gradient is larger than the clip, after it has been rounded."""
    engine = Engine(MLP([4, 3]), privacy=DPSGD(2.0, 0.5), backend="numpy")
    assert engine.passes[0].clip == 0.5
    engine.precision = precision
    unit = {"bf16": 2.0**-8, "tf32": 2.0**-11}[precision]
    clip = engine.passes[0].clip
    assert clip > 0.498 and clip * (1.0 + unit) ** (2 if precision == "tf32" else 1) <= 0.5
    assert engine.passes[0].noise.deviation == 1.0


@DEVICES
def test_a_checkpoint_goes_on_elsewhere(device, tmp_path):
    case = CASES["sgd, tanh"]
    X, y, _ = case.data()
    engine = case.engine(backend="numpy")
    engine.fit(X, y, epochs=2)
    engine.save_checkpoint(tmp_path / "last.safetensors")
    with usable(device):
        again = fusemlp.load_checkpoint(tmp_path / "last.safetensors", backend=device.backend)
        assert again.plan == "resident" if device is NUMPY else again.plan != "resident"
        again.fit(X, y, epochs=1)
        assert again.ledger.steps(again.update_count) == [(BATCH / ROWS, 12)]
        assert again.privacy_spent()["epsilon"] > engine.privacy_spent()["epsilon"]
