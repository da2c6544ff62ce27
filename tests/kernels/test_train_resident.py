"""``train_resident``: the same as the oracle's steps one after another, over arenas with gaps and rows with padding."""

from __future__ import annotations

import platform
from dataclasses import replace

import numpy as np
import pytest
from devices import NUMPY, Variant
from step_calls import Layer, step_calls
from tolerance import assert_within

from fusemlp_kernels import reference
from fusemlp_kernels.clock import hyper_at, rate_table
from fusemlp_kernels.contract import (
    BATCH_INDEX,
    BATCH_LOSSES,
    CORRECT,
    COUNTERS,
    LAST_LOSS,
    LOSS_SUM,
    NORM_SUM,
    PENALTIES,
    ROW_COUNT,
    ROW_OFFSET,
    ROW_STEP,
    ROW_TOTAL,
    SCORED,
    STATS,
    UPDATE_COUNT,
    Dropout,
    LossSpec,
    Ridge,
    Segment,
    TensorRule,
    UpdateRule,
)
from fusemlp_kernels.philox import dropout_keep

INPUTS, HIDDEN, OUTPUTS, ROWS, BATCH, SEED, RATE = 5, 11, 3, 22, 8, 7, 0.25
GAP = 3
DOUBLE, SINGLE = Variant(NUMPY, "fp64"), Variant(NUMPY, "fp32")
LOSS = LossSpec("cross_entropy", accuracy=True)
RULES = {
    "sgd": UpdateRule("sgd"),
    "momentum": UpdateRule("sgd", momentum=0.9),
    "adam": UpdateRule("adam"),
    "clipped": UpdateRule("sgd", clip_norm=0.1),
    "averaged": UpdateRule("sgd", ema=0.9),
}
# another learning rate at every update
RATES = [0.05 * 0.9**updates for updates in range(30)]


class Run:
    """A network of two layers in arenas with gaps that hold 77, and an epoch of rows."""

    def __init__(
        self, variant, rule, loss=LOSS, activation="tanh", dropout=True, frozen=(), weight=None, ridge=None, epochs=1
    ):
        generator = np.random.default_rng(3)
        real = variant.real
        shapes = {"w0": (HIDDEN, INPUTS), "b0": (HIDDEN,), "w1": (OUTPUTS, HIDDEN), "b1": (OUTPUTS,)}
        self.places, end = {}, GAP
        for name, shape in shapes.items():
            self.places[name] = slice(end, end + int(np.prod(shape)))
            end += int(np.prod(shape)) + GAP
        self.shapes, self.rule, self.loss, self.activation = shapes, rule, loss, activation
        self.params = np.full(end, 77.0, real)
        self.gradients, self.states = np.zeros(end, real), tuple(np.zeros(end, real) for _ in range(rule.state_count))
        for place in self.places.values():
            self.params[place] = generator.normal(size=place.stop - place.start) * 0.5
        self.rules = {"w0": TensorRule(1.0, 0.1), "b0": TensorRule(0.5), "w1": TensorRule(2.0), "b1": TensorRule()}
        self.trained = [name for name in shapes if name not in frozen]
        self.x = generator.normal(size=(ROWS, INPUTS)).astype(real)
        self.target = generator.integers(0, OUTPUTS, ROWS)
        self.weight = None if weight is None else weight.astype(real)
        self.ridge, self.epochs = ridge, epochs
        # by epoch three batches, the last of six rows
        self.rows = np.full(epochs * ROWS + 2, -1, np.int64)
        self.rows[: epochs * ROWS] = np.concatenate([generator.permutation(ROWS) for _ in range(epochs)])
        self.epoch_stats = np.full((epochs, STATS), 77.0)
        self.counters, self.stats = np.zeros(COUNTERS, np.int64), np.zeros(STATS)
        self.hyper, self.rates = hyper_at(rule, RATES[0]), rate_table(rule, RATES)
        self.counters[[ROW_STEP, ROW_TOTAL, ROW_COUNT]] = BATCH, ROWS, BATCH
        rate = RATE if dropout else 0.0
        self.rate = rate
        self.segments = tuple(
            Segment(self.places[name].start, self.places[name].stop - self.places[name].start, self.rules[name])
            for name in self.trained
        )
        self.run = variant.backend().bind(
            "train_resident",
            calls=self.calls(variant),
            rows=self.rows,
            batch=BATCH,
            arenas={},
            epoch_stats=self.epoch_stats if epochs > 1 else None,
        )

    def calls(self, variant):
        arenas = {"": self.params, "d": self.gradients}
        tensors = {f"{kind}{name}": self.view(name, arena) for kind, arena in arenas.items() for name in self.shapes}
        for index, state in enumerate(self.states):
            tensors |= {f"{name}.state{index}": self.view(name, state) for name in self.shapes}
        types = {"compute": variant.real, "real": variant.real}
        drops = Dropout(self.rate, 0, SEED) if self.rate else None
        return step_calls(
            variant.traits,
            [Layer(self.activation, dropout=drops), Layer("identity")],
            tensors,
            {name: self.rules[name] for name in self.trained},
            lambda name, shape, dtype: np.full(shape, 77, types.get(dtype, dtype)),
            batch=BATCH,
            rule=self.rule,
            loss=self.loss,
            data={"x": self.x, "target": self.target, "weight": self.weight},
            control={name: getattr(self, name) for name in ("rows", "counters", "hyper", "rates", "stats")},
            arenas={
                **{"params": self.params, "grads": self.gradients},
                **{f"state{index}": state for index, state in enumerate(self.states)},
            },
            segments=self.segments,
            ridge=self.ridge,
        )

    def view(self, name, arena):
        return arena[self.places[name]].reshape(self.shapes[name])

    def tensor(self, name, arena=None):
        return (self.params if arena is None else arena)[self.places[name]].reshape(self.shapes[name]).copy()

    def oracle(self, steps):
        """Return the parameters after ``steps`` steps, and the sums of stats of each started epoch; frozen tensors keep
        their values."""
        layers = [
            reference.Layer(*(self.tensor(f"{kind}{index}").astype(np.float64) for kind in "wb"), name, rate=rate)
            for index, (name, rate) in enumerate(((self.activation, self.rate), ("identity", 0.0)))
        ]
        state, accounts = reference.initial_state(self.rule, layers), []
        for step in range(steps):
            epoch, batch = divmod(step, 3)
            if not accounts or (batch == 0 and self.epochs > 1):
                accounts.append(np.zeros(STATS))
            stats = accounts[-1]
            rows = self.rows[epoch % self.epochs * ROWS :][:ROWS][batch * BATCH :][:BATCH]
            keep = dropout_keep(RATE, 0, SEED, step, len(rows), HIDDEN) if self.rate else None
            tensors = [[self.rules[f"{kind}{index}"] for kind in "wb"] for index in range(2)]
            norm = len(rows) if self.weight is None else self.weight[rows].sum(dtype=np.float64)
            weight, spec = None if self.weight is None else self.weight[rows].astype(np.float64), self.loss
            if self.ridge is not None:
                # its gradient is a decay
                strength = self.ridge.strength / norm
                for index, pair in enumerate(tensors):
                    if f"w{index}" in self.trained:
                        pair[0] = replace(pair[0], weight_decay=pair[0].weight_decay + strength)
                        stats[PENALTIES] += 0.5 * strength * len(rows) * (layers[index].w ** 2).sum()
                # a mean is a sum of rows that weigh their share
                norm *= self.ridge.divisor or 1.0
                weight = (np.ones(len(rows)) if weight is None else weight) / norm
                spec = replace(spec, reduction="sum")
            batch = reference.Batch(self.x[rows].astype(np.float64), self.target[rows], weight, keeps=[keep, None])
            hidden = reference.dropout(reference.linear(batch.x, layers[0].w, layers[0].b, self.activation), keep, RATE)
            hits = reference.correct(self.loss, reference.linear(hidden, layers[1].w, layers[1].b), batch.target)
            loss, new, state = reference.train_step(layers, state, spec, self.rule, step, RATES[step], batch, tensors)
            stats[LAST_LOSS] = loss
            stats[[LOSS_SUM, NORM_SUM, CORRECT, SCORED]] += loss * norm, norm, hits.sum(), len(rows)
            stats[BATCH_LOSSES] += loss * len(rows)
            for index, layer in enumerate(new):
                parts = [getattr(layer if f"{k}{index}" in self.trained else layers[index], k) for k in "wb"]
                layers[index] = reference.Layer(*parts, layer.activation, rate=layer.rate)
        return {f"{kind}{index}": getattr(layers[index], kind) for index in range(2) for kind in "wb"}, accounts


# In float64, after 7 steps of a few hundred roundings each of values of order one: a million units in the last place.
TOLERANCE = 1e6 * 2.0**-53


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("frozen", [(), ("w0",), ("w0", "b0", "w1"), ("w0", "b0", "w1", "b1")], ids="-".join)
@pytest.mark.parametrize("rule", [rule for name, rule in RULES.items() if name != "clipped"], ids=lambda r: r.kind)
def test_steps_are_the_oracles(rule, frozen, weighted):
    weight = np.random.default_rng(5).random(ROWS) if weighted else None
    run = Run(DOUBLE, rule, frozen=frozen, weight=weight)
    expected, [stats] = run.oracle(7)
    run.run(7)
    for name, wanted in expected.items():
        assert_within(run.tensor(name), wanted, 0.0 if name in frozen else TOLERANCE)
    np.testing.assert_allclose(run.stats, stats, rtol=TOLERANCE)
    wanted = np.zeros(COUNTERS, np.int64)
    wanted[[BATCH_INDEX, UPDATE_COUNT, ROW_STEP, ROW_TOTAL]] = 7, 7, BATCH, ROWS
    wanted[[ROW_OFFSET, ROW_COUNT]] = BATCH, BATCH
    np.testing.assert_array_equal(run.counters, wanted)
    np.testing.assert_array_equal(run.hyper, hyper_at(rule, RATES[7], 7))


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("divisor", [None, 0.5])
@pytest.mark.parametrize("rule", [rule for name, rule in RULES.items() if name != "clipped"], ids=lambda r: r.kind)
def test_a_ridge_weighs_what_the_rows_of_its_batch_do(rule, divisor, weighted):
    weight = np.random.default_rng(5).random(ROWS) if weighted else None
    run = Run(DOUBLE, rule, weight=weight, frozen=("w0",), ridge=Ridge(3.0, divisor))
    expected, [stats] = run.oracle(7)
    run.run(7)
    for name, wanted in expected.items():
        assert_within(run.tensor(name), wanted, TOLERANCE)
    np.testing.assert_allclose(run.stats, stats, rtol=TOLERANCE)


def test_a_ridge_is_clipped_with_the_gradients():
    """A penalty beside which the gradient is nothing moves the weights by the clipped norm, towards 0."""
    rule = RULES["clipped"]
    run = Run(DOUBLE, rule, ridge=Ridge(1e12))
    weights = [run.tensor(f"w{index}") for index in range(2)]
    norm = np.sqrt(sum((weight**2).sum() for weight in weights))
    run.run(1)
    for index, weight in enumerate(weights):
        own = run.rules[f"w{index}"]
        moved = weight * (1.0 - RATES[0] * own.lr_factor * (rule.clip_norm / norm + own.weight_decay))
        np.testing.assert_allclose(run.tensor(f"w{index}"), moved, rtol=1e-6)


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
@pytest.mark.parametrize("steps", [7, 9, 10], ids=lambda steps: f"{steps} steps")
def test_a_launch_goes_through_several_epochs(rule, steps):
    # the oracle's decay, in place of a ridge, is not clipped
    ridge = None if rule.clip_norm else Ridge(0.5)
    run, cut = (Run(DOUBLE, rule, epochs=3, ridge=ridge) for _ in range(2))
    expected, accounts = run.oracle(steps)
    run.run(steps)
    for name, wanted in expected.items():
        assert_within(run.tensor(name), wanted, TOLERANCE)
    ended = steps // 3
    np.testing.assert_allclose(run.epoch_stats[:ended], accounts[:ended], rtol=TOLERANCE)
    assert (run.epoch_stats[ended:] == 77.0).all()
    left = accounts[ended] if steps % 3 else np.zeros(STATS)
    np.testing.assert_allclose(run.stats[LOSS_SUM:], left[LOSS_SUM:], rtol=TOLERANCE)
    # behind the last epoch come the rows of the first again
    place = ended % 3 * ROWS + steps % 3 * BATCH
    assert run.counters[ROW_OFFSET] == place and run.counters[ROW_COUNT] == min(BATCH, ROWS - steps % 3 * BATCH)
    for part in (2, 3, steps - 5):
        cut.run(part)
    for name in ("params", "counters", "hyper", "stats", "epoch_stats"):
        assert getattr(run, name).tobytes() == getattr(cut, name).tobytes(), name


@pytest.mark.parametrize("variant", [SINGLE, DOUBLE], ids=lambda v: v.precision)
@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
def test_nothing_else_is_written_and_the_number_of_calls_changes_no_bit(variant, rule):
    whole, cut = Run(variant, rule), Run(variant, rule)
    inputs = [array.copy() for array in (whole.x, whole.target, whole.rows)]
    whole.run(7)
    for steps in (1, 0, 3, 2, 1):
        cut.run(steps)
    for name in ("params", "counters", "hyper", "stats"):
        assert getattr(whole, name).tobytes() == getattr(cut, name).tobytes(), name
    for array, before in zip((whole.x, whole.target, whole.rows), inputs, strict=True):
        np.testing.assert_array_equal(array, before)
    gaps = np.ones(len(whole.params), bool)
    for place in whole.places.values():
        gaps[place] = False
    assert (whole.params[gaps] == 77.0).all()
    assert all((state[gaps] == 0.0).all() for state in (*whole.states, whole.gradients))


@pytest.mark.parametrize("activation", ["relu", "tanh", "gelu"])
def test_nan_in_a_row_reaches_the_loss_and_the_parameters(activation):
    run = Run(SINGLE, RULES["adam"], activation=activation, dropout=False)
    run.x[run.rows[2], 1] = np.nan
    run.run(1)
    assert np.isnan(run.stats[LAST_LOSS]) and np.isnan(run.tensor("w1")).all()
    # the inputs of the other features are numbers, the gradient of their weights is not
    assert np.isnan(run.tensor("w0")).all()


def test_nan_in_rows_of_other_batches_reaches_nothing():
    run = Run(SINGLE, RULES["adam"])
    run.x[run.rows[BATCH:ROWS]] = np.nan
    run.run(1)
    assert np.isfinite(run.stats).all() and np.isfinite(run.params).all()


@pytest.mark.skipif(platform.machine().lower() not in ("x86_64", "amd64"), reason="only x86 has a bit for it")
def test_denormal_numbers_are_zero_in_the_loop_and_numbers_after_it():
    run = Run(SINGLE, RULES["sgd"], activation="relu", dropout=False)
    # a feature that is always zero: its weights only decay
    run.x[:, 2] = 0.0
    weights = run.params[run.places["w0"]].reshape(run.shapes["w0"])
    smallest = np.float32(np.finfo(np.float32).tiny)
    weights[:, 2] = smallest
    run.run(1)
    assert (weights[:, 2] == 0.0).all()
    assert np.multiply(smallest, np.float32(0.5)) > 0.0


def sharded(shards, height, *, kind="cross_entropy", real=np.float64):
    """Return the gradients and the statistics of each of these shards of ``height`` rows of a batch of 21."""
    generator = np.random.default_rng(5)
    inputs, hidden, outputs, batch = 40, 96, 3, 21
    x, weight = generator.normal(size=(30, inputs)).astype(real), generator.uniform(0.5, 2.0, 30).astype(real)
    target = generator.integers(0, outputs, 30) if kind == "cross_entropy" else generator.normal(size=(30, outputs))
    target = target if kind == "cross_entropy" else target.astype(real)
    w0, b0, w1, b1 = (
        generator.normal(size=size).astype(real) for size in ((hidden, inputs), hidden, (outputs, hidden), outputs)
    )
    counters = np.zeros(COUNTERS, np.int64)
    # the second batch of an epoch
    counters[BATCH_INDEX], counters[ROW_OFFSET], counters[ROW_COUNT] = 4, 5, batch
    rows = generator.permutation(30)
    calls, found = [], []
    dropout, rule = Dropout(RATE, 0, SEED), UpdateRule("sgd")
    h, z, keep = np.empty((height, hidden), real), np.empty((height, hidden), real), np.empty((height, hidden), bool)
    gathered, dz1, dz2 = (
        np.empty((height, inputs), real),
        np.empty((height, hidden), real),
        np.empty((height, outputs), real),
    )
    for _ in shards:
        stats, grads = np.zeros(STATS), [np.full_like(one, 77.0) for one in (w0, b0, w1, b1)]
        hidden_layer = {"activation": "gelu", "z": z, "dropout": dropout, "counters": counters, "keep": keep}
        loss = {
            "target": target,
            "counters": counters,
            "stats": stats,
            "loss": LossSpec(kind),
            "weight": weight,
            "rows": rows,
        }
        layers = [
            {"dz": dz1, "x": gathered, "dw": grads[0], "db": grads[1]},
            {"dz": dz2, "x": h, "dw": grads[2], "db": grads[3]},
        ]
        calls += [
            ("linear", {"x": x, "w": w0, "b": b0, "y": h, "rows": rows, "gathered": gathered, **hidden_layer}),
            ("linear_loss_grad", {"x": h, "w": w1, "b": b1, "dz": dz2, **loss}),
            ("grad_input", {"dz": dz2, "w": w1, "y": h, "dz_prev": dz1, **hidden_layer}),
            ("grad_weight", {"layers": layers, "rule": rule, "counters": counters}),
        ]
        found.append((grads, stats))
    variant = DOUBLE if real == np.float64 else SINGLE
    variant.backend().bind("train_resident", calls=calls, rows=rows, batch=height, arenas={}, shards=shards)(1)
    return found


@pytest.mark.parametrize("kind", ["cross_entropy", "huber"])
def test_shards_of_a_batch_add_up_to_the_batch(kind):
    ((whole, stats),) = sharded([0], 21, kind=kind)
    # the last two have one row and none
    parts = sharded([0, 5, 10, 15, 20, 25], 5, kind=kind)
    for at, gradient in enumerate(whole):
        np.testing.assert_allclose(sum(grads[at] for grads, _ in parts), gradient, rtol=1e-12, atol=1e-14)
        assert not parts[-1][0][at].any()
    np.testing.assert_allclose(sum(one for _, one in parts), stats, rtol=1e-12)


@pytest.mark.parametrize("real", [np.float32, np.float64])
def test_a_shard_has_the_same_bits_whatever_others_there_are(real):
    together = sharded([0, 7, 14], 7, real=real)
    for shard, (grads, stats) in zip([0, 7, 14], together, strict=True):
        ((own, counted),) = sharded([shard], 7, real=real)
        assert all(one.tobytes() == other.tobytes() for one, other in zip(grads, own, strict=True))
        assert stats.tobytes() == counted.tobytes()
