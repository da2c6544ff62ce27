"""Attacks, and training on attacked batches: against the oracle, against torch, within eps and bounds, and refused."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import fusemlp
from fusemlp import DPSGD, FGSM, MLP, PGD, SGD, Adam, Engine
from fusemlp.runtime.attacking import row_losses
from fusemlp_kernels import philox, reference
from fusemlp_kernels.errors import ArgumentError, ArgumentTypeError, DataError

ROWS, INPUTS, OUTPUTS = 23, 5, 3
LOSSES = ("cross_entropy", "binary_cross_entropy", "mse", "mae", "huber", "poisson", "quantile")


def layers_of(engine):
    state = engine.state_dict()
    return [
        reference.Layer(
            state[f"{2 * i}.weight"],
            state[f"{2 * i}.bias"],
            chosen.name,
            state[f"{2 * i + 1}.weight"] if chosen.name == "prelu" else chosen.slope,
            engine.network.dropouts[i],
        )
        for i, chosen in enumerate(engine.network.activations)
    ]


def problem(kind, rows=ROWS, seed=0):
    generator = np.random.default_rng(seed)
    X = generator.uniform(size=(rows, INPUTS))
    if kind == "cross_entropy":
        return X, generator.integers(0, OUTPUTS, rows)
    y = generator.normal(size=(rows, OUTPUTS))
    return X, {"binary_cross_entropy": (y > 0) * 1.0, "poisson": np.abs(np.round(y))}.get(kind, y)


def moved(layers, spec, batch, how, batch_index):
    """The oracle's batch after the steps of an attack."""
    change, x = how.perturbation(), batch.x
    start = 0.0 if change.seed is None else change.eps * philox.uniform(change.seed, batch_index, *x.shape)
    adv = reference.perturb(x, start + np.zeros_like(x), change)
    for _ in range(how.plain.steps):
        dx = reference.input_gradient(layers, spec, replace(batch, x=adv))
        adv = reference.perturb(x, adv - x, change, dx)
    return adv


def adversarial_steps(engine, X, y, weight, how):
    """The oracle's parameters after an epoch, and the batches' losses."""
    layers, rule = layers_of(engine), engine.optimizer.rule()
    state, spec = reference.initial_state(rule, layers), engine.loss.spec(accuracy=False, soft=False)
    losses = []
    order = philox.row_order(len(X), engine.seed, 0)
    for t, first in enumerate(range(0, len(X), engine.batch_size)):
        rows = order[first : first + engine.batch_size]
        batch = reference.Batch(X[rows], y[rows], None if weight is None else weight[rows])
        keeps = [
            philox.dropout_keep(layer.rate, i, engine.seed, t, len(rows), len(layer.w)) if layer.rate else None
            for i, layer in enumerate(layers)
        ]
        batch = replace(batch, x=moved(layers, spec, batch, how, t), keeps=keeps)
        loss, layers, state = reference.train_step(layers, state, spec, rule, t, engine.optimizer.lr, batch)
        losses.append(loss)
    return layers, losses


ATTACKS = st.builds(
    PGD,
    st.sampled_from((0.05, 0.3)),
    steps=st.integers(1, 3),
    norm=st.sampled_from(("inf", "2")),
    random_start=st.booleans(),
    seed=st.integers(0, 2**40),
    bounds=st.sampled_from((None, (0.0, 1.0))),
) | st.builds(FGSM, st.sampled_from((0.1, 0.4)))


@settings(max_examples=40, deadline=None, derandomize=True, database=None)
@given(
    loss=st.sampled_from(LOSSES),
    hidden=st.lists(st.integers(1, 9), max_size=2),
    activation=st.sampled_from(("tanh", "gelu", "sigmoid", "prelu")),
    dropout=st.sampled_from((0.0, 0.4)),
    optimizer=st.sampled_from((SGD(lr=0.1), SGD(lr=0.05, clip_norm=0.5), Adam(lr=0.02))),
    batch_size=st.integers(1, ROWS),
    how=ATTACKS,
    plan=st.sampled_from(("eager", "resident")),
    weighted=st.booleans(),
)
def test_steps_are_those_of_the_oracle(loss, hidden, activation, dropout, optimizer, batch_size, how, plan, weighted):
    # smooth activations: at a kink rounding would decide the sign of a gradient
    engine = Engine(
        MLP([INPUTS, *hidden, OUTPUTS], activation=activation, dropout=dropout if hidden else 0.0),
        loss, optimizer, batch_size, seed=4, precision="fp64", plan=plan, backend="numpy",
    )  # fmt: skip
    X, y = problem(loss)
    weight = np.random.default_rng(1).uniform(0.2, 2.0, ROWS) if weighted else None
    wanted, _ = adversarial_steps(engine, X, y, weight, how)
    engine.fit(X, y, epochs=1, sample_weight=weight, adversarial=how)
    for layer, expected in zip(layers_of(engine), wanted, strict=True):
        np.testing.assert_allclose(layer.w, expected.w, rtol=1e-6, atol=1e-9)
        np.testing.assert_allclose(layer.b, expected.b, rtol=1e-6, atol=1e-9)
