"""Trainings against attacks that are more than training on attacked rows: against the oracle, torch, and refused."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest
from devices import INTERPRETER, STAND_IN, marks_of, usable
from hypothesis import given, settings
from hypothesis import strategies as st
from test_adversarial import INPUTS, OUTPUTS, ROWS, digits, layers_of, problem

import fusemlp
from fusemlp import MLP, PGD, SGD, TRADES, Adam, CrossEntropy, Engine, Free
from fusemlp_kernels import philox, reference
from fusemlp_kernels.errors import ArgumentError, ArgumentTypeError, DataError, ShapeError

UNBOUNDED = {"low": -np.inf, "high": np.inf}


def batches_of(engine, rows, epochs):
    """The rows of each batch of a fit."""
    size = min(engine.batch_size, rows)
    for epoch in range(epochs):
        order = philox.row_order(rows, engine.seed, epoch)
        yield from (order[first : first + size] for first in range(0, rows, size))


def free_steps(engine, X, y, weight, how, epochs):
    """The oracle's layers after a fit against ``Free``."""
    layers, rule = layers_of(engine), engine.optimizer.rule()
    state, spec = reference.initial_state(rule, layers), engine.loss.spec(accuracy=False, soft=False)
    change = how.plain.perturbation()
    delta, t = np.zeros((min(engine.batch_size, len(X)), INPUTS)), 0
    for rows in batches_of(engine, len(X), epochs):
        for _ in range(how.repeats):
            own, count = delta[: len(rows)], len(rows)
            adv = reference.perturb(X[rows], own, change)
            batch = reference.Batch(adv, y[rows], None if weight is None else weight[rows])
            # without dropout the gradient by the inputs is that of the attack
            dx = reference.input_gradient(layers, spec, batch)
            delta[:count] = reference.perturb(0.0 * own, own, replace(change, **UNBOUNDED), dx)
            _, layers, state = reference.train_step(layers, state, spec, rule, t, engine.optimizer.lr, batch)
            t += 1
    return layers


FREE = st.builds(
    Free,
    st.sampled_from((0.05, 0.3)),
    repeats=st.integers(1, 4),
    step_size=st.sampled_from((None, 0.04)),
    norm=st.sampled_from(("inf", "2")),
    bounds=st.sampled_from((None, (0.0, 1.0))),
)


@settings(max_examples=25, deadline=None, derandomize=True, database=None)
@given(
    loss=st.sampled_from(("cross_entropy", "huber")),
    hidden=st.lists(st.integers(1, 9), max_size=2),
    activation=st.sampled_from(("gelu", "prelu")),
    optimizer=st.sampled_from((SGD(lr=0.05, clip_norm=0.5), Adam(lr=0.02))),
    batch_size=st.integers(1, ROWS),
    how=FREE,
    plan=st.sampled_from(("eager", "resident")),
    weighted=st.booleans(),
)
def test_free_steps_are_those_of_the_oracle(loss, hidden, activation, optimizer, batch_size, how, plan, weighted):
    engine = Engine(
        MLP([INPUTS, *hidden, OUTPUTS], activation=activation), loss, optimizer, batch_size, seed=4, precision="fp64",
        plan=plan, backend="numpy",
    )  # fmt: skip
    X, y = problem(loss)
    weight = np.random.default_rng(1).uniform(0.2, 2.0, ROWS) if weighted else None
    wanted = free_steps(engine, X, y, weight, how, 2)
    engine.fit(X, y, epochs=2, sample_weight=weight, adversarial=how)
    assert engine.update_count == 2 * how.repeats * -(-ROWS // batch_size)
    for layer, expected in zip(layers_of(engine), wanted, strict=True):
        np.testing.assert_allclose(layer.w, expected.w, rtol=1e-6, atol=1e-9)
        np.testing.assert_allclose(layer.b, expected.b, rtol=1e-6, atol=1e-9)


def test_free_training_is_that_of_a_torch_loop():
    torch = pytest.importorskip("torch")
    X, y = problem("cross_entropy", 40)
    how = Free(0.1, repeats=3, bounds=(0, 1))
    engine = Engine(
        MLP([INPUTS, 16, OUTPUTS], activation="tanh"), optimizer=SGD(lr=0.1, momentum=0.9), batch_size=8,
        precision="fp64", backend="numpy",
    )  # fmt: skip
    module = torch.nn.Sequential(torch.nn.Linear(INPUTS, 16), torch.nn.Tanh(), torch.nn.Linear(16, OUTPUTS)).double()
    module.load_state_dict({name: torch.tensor(array) for name, array in engine.state_dict().items()})
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1, momentum=0.9)
    xs, ts = torch.tensor(X), torch.tensor(y)
    # the loop of the paper's authors
    noise, losses = torch.zeros(8, INPUTS, dtype=torch.float64), []
    for rows in batches_of(engine, 40, 2):
        for _ in range(how.repeats):
            added = noise.clone().requires_grad_(True)
            loss = torch.nn.functional.cross_entropy(module((xs[rows] + added).clamp(0.0, 1.0)), ts[rows])
            optimizer.zero_grad()
            loss.backward()
            # the gradient by what is clamped is not 0 here, but that by the inputs as the network has them
            with torch.no_grad():
                adv = (xs[rows] + noise).clamp(0.0, 1.0)
            adv.requires_grad_(True)
            (gradient,) = torch.autograd.grad(torch.nn.functional.cross_entropy(module(adv), ts[rows]), adv)
            noise = (noise + how.eps * gradient.sign()).clamp(-how.eps, how.eps)
            optimizer.step()
            losses.append(loss.item())
    history = engine.fit(X, y, epochs=2, adversarial=how).history
    for name, array in module.state_dict().items():
        np.testing.assert_allclose(engine.state_dict()[name], array.numpy(), rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(history["loss"], np.reshape(losses, (2, -1)).mean(axis=1), rtol=1e-12)


def trades_loss(torch, module, x, y, adv, beta, weight):
    """The loss of the paper's authors, weighed by rows."""
    functional = torch.nn.functional
    logits = module(x)
    natural = functional.cross_entropy(logits, y, reduction="none")
    robust = functional.kl_div(
        functional.log_softmax(module(adv), dim=1), functional.softmax(logits, dim=1), reduction="none"
    ).sum(dim=1)
    return (weight * (natural + beta * robust)).sum() / weight.sum()


TRADES_CASES = st.builds(
    TRADES,
    st.sampled_from((0.05, 0.3)),
    steps=st.integers(1, 3),
    beta=st.sampled_from((0.5, 6.0)),
    norm=st.sampled_from(("inf", "2")),
    seed=st.integers(0, 2**40),
    bounds=st.sampled_from((None, (0.0, 1.0))),
)
ACTIVATIONS = {"tanh": "Tanh", "prelu": "PReLU"}


@settings(max_examples=25, deadline=None, derandomize=True, database=None)
@given(
    hidden=st.lists(st.integers(1, 9), max_size=2),
    activation=st.sampled_from(tuple(ACTIVATIONS)),
    momentum=st.sampled_from((0.0, 0.9)),
    batch_size=st.integers(1, ROWS),
    how=TRADES_CASES,
    plan=st.sampled_from(("eager", "resident")),
    weighted=st.booleans(),
)
def test_trades_steps_are_those_of_a_torch_loop(hidden, activation, momentum, batch_size, how, plan, weighted):
    torch = pytest.importorskip("torch")
    widths = [INPUTS, *hidden, OUTPUTS]
    engine = Engine(
        MLP(widths, activation=activation), "cross_entropy", SGD(lr=0.1, momentum=momentum), batch_size, seed=4,
        precision="fp64", plan=plan, backend="numpy",
    )  # fmt: skip
    parts = []
    for inputs, outputs in itertools.pairwise(widths):
        parts += [torch.nn.Linear(inputs, outputs), getattr(torch.nn, ACTIVATIONS[activation])()]
    module = torch.nn.Sequential(*parts[:-1]).double()
    module.load_state_dict({name: torch.tensor(array) for name, array in engine.state_dict().items()})
    X, y = problem("cross_entropy")
    weight = np.random.default_rng(1).uniform(0.2, 2.0, ROWS) if weighted else np.ones(ROWS)
    xs, ts, ws = (torch.tensor(array) for array in (X, y, weight))
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1, momentum=momentum)
    change, functional, total = how.attack.perturbation(), torch.nn.functional, 0.0
    for t, rows in enumerate(batches_of(engine, ROWS, 2)):
        x = X[rows]
        adv = reference.perturb(x, change.eps * philox.uniform(change.seed, t, *x.shape), change)
        p = functional.softmax(module(xs[rows]), dim=1).detach()
        for _ in range(how.steps):
            moved = torch.tensor(adv, requires_grad=True)
            kl = functional.kl_div(functional.log_softmax(module(moved), dim=1), p, reduction="sum")
            (dx,) = torch.autograd.grad(kl, moved)
            adv = reference.perturb(x, adv - x, change, dx.numpy())
        optimizer.zero_grad()
        loss = trades_loss(torch, module, xs[rows], ts[rows], torch.tensor(adv), how.beta, ws[rows])
        loss.backward()
        optimizer.step()
        total += loss.item() * weight[rows].sum()
    history = engine.fit(X, y, epochs=2, sample_weight=weight if weighted else None, adversarial=how).history
    for name, array in module.state_dict().items():
        np.testing.assert_allclose(engine.state_dict()[name], array.numpy(), rtol=1e-6, atol=1e-9)
    assert sum(history["loss"]) * weight.sum() == pytest.approx(total, rel=1e-9)


def test_trades_gradients_are_those_of_finite_differences():
    X, y = problem("cross_entropy", 12)
    spec = CrossEntropy(label_smoothing=0.1)
    how = TRADES(0.2, steps=2, beta=3.0, seed=7)

    def fresh():
        # large weights, so that the divergence is not small beside the loss
        engine = Engine(MLP([INPUTS, 6, OUTPUTS], activation="tanh"), spec, SGD(lr=1.0), 12, precision="fp64")
        engine.load_state_dict({name: 3.0 * array for name, array in engine.state_dict().items()})
        return engine

    engine = fresh()
    before = engine.state_dict()
    change, order = how.attack.perturbation(), philox.row_order(12, 0, 0)
    x = X[order]
    adv = reference.perturb(x, change.eps * philox.uniform(change.seed, 0, *x.shape), change)
    layers = layers_of(engine)

    def outputs(values, inputs):
        hidden = np.tanh(inputs @ values["0.weight"].T + values["0.bias"])
        return hidden @ values["2.weight"].T + values["2.bias"]

    for _ in range(how.steps):
        _, _, dy = reference.divergence(outputs(before, x), outputs(before, adv))
        hidden = np.tanh(adv @ layers[0].w.T + layers[0].b)
        dx = ((dy @ layers[1].w) * (1.0 - hidden**2)) @ layers[0].w
        adv = reference.perturb(x, adv - x, change, dx)

    def loss(values):
        clean = outputs(values, x)
        own, _ = reference.loss_of_output(spec.spec(accuracy=False, soft=False), clean, y[order])
        return own + how.beta * reference.divergence(clean, outputs(values, adv))[0]

    history = engine.fit(X, y, epochs=1, adversarial=how).history
    assert history["loss"][0] == pytest.approx(loss(before), rel=1e-12)
    after, step = engine.state_dict(), 1e-5
    for name, array in before.items():
        for at in np.ndindex(array.shape):
            ends = []
            for sign in (1.0, -1.0):
                moved = {other: one.copy() for other, one in before.items()}
                moved[name][at] += sign * step
                ends.append(loss(moved))
            slope = (ends[0] - ends[1]) / (2.0 * step)
            assert before[name][at] - after[name][at] == pytest.approx(slope, rel=1e-5, abs=1e-8)


@pytest.mark.parametrize("how", [Free(0.1, repeats=2), TRADES(0.1, steps=2)], ids=["free", "trades"])
@pytest.mark.parametrize("precision", ["fp32", "fp64"])
def test_the_plans_agree_bit_for_bit(precision, how):
    def trained(plan):
        dropout = 0.2 if how.kind == "free" else 0.0
        engine = Engine(MLP([INPUTS, 300, OUTPUTS], dropout=dropout), batch_size=100, precision=precision, plan=plan)
        history = engine.fit(*problem("cross_entropy", 950), epochs=2, adversarial=how)
        return engine.state_dict(), history.history

    (eager, first), (resident, second) = trained("eager"), trained("resident")
    assert first == {name: pytest.approx(values, rel=1e-12) for name, values in second.items()}
    assert all(np.array_equal(eager[name], resident[name]) for name in eager)


@pytest.mark.parametrize(
    ("kind", "norm", "widths"), [(Free, "inf", [9, OUTPUTS]), (Free, 2, [300]), (TRADES, "inf", [9, OUTPUTS])]
)
@pytest.mark.parametrize(
    "device", [pytest.param(device, id=device.name, marks=marks_of(device)) for device in (INTERPRETER, STAND_IN)]
)
def test_other_backends_train_alike(device, kind, norm, widths):
    X, y = problem("cross_entropy", 12)
    X, weight = X.astype(np.float32), np.linspace(0.5, 2.0, 12)
    activation = "tanh" if kind is Free else "prelu"

    def trained(backend, plan):
        engine = Engine(
            MLP([INPUTS, *widths], activation=activation),
            optimizer=SGD(lr=0.1),
            batch_size=8,
            backend=backend,
            plan=plan,
        )
        passes = {"repeats": 2} if kind is Free else {"steps": 2, "beta": 1.0}
        how = kind(0.2, norm=norm, bounds=(0, 1), **passes)
        history = engine.fit(X, y, epochs=1, sample_weight=weight, adversarial=how).history
        return engine.state_dict(), history["loss"][0]

    numpy, loss = trained("numpy", "auto")
    with usable(device):
        other, own = trained(device.backend, "eager")
    # four steps of at most 0.1 times a gradient below 1, each of some ten sums of at most nine terms; TRADES has two
    # steps, of the gradients of a loss and of a divergence
    for name, array in numpy.items():
        np.testing.assert_allclose(other[name], array, rtol=0, atol=4 * 0.1 * 10 * 10 * 2.0**-24)
    assert own == pytest.approx(loss, abs=10 * 10 * 2.0**-24)


def test_a_free_step_takes_one_more_gradient_and_no_pass_more():
    engine = Engine(MLP([4, 8, 3]), plan="eager", backend="numpy")
    plain, ops = [[call.op for call in made.calls] for made in (engine.program, engine.program_against(Free(0.1)))]
    assert ops == ["perturb", *plain[:3], "grad_input", "perturb", *plain[3:]]


@pytest.mark.parametrize("plan", ["eager", "resident"])
@pytest.mark.parametrize("stop", [2, 17, 20])
def test_a_resumed_fit_continues_bit_for_bit(tmp_path, plan, stop):
    # between the replays of a batch, of the short batch, and after an epoch
    X, y = problem("cross_entropy", 32)
    how, place = Free(0.1, repeats=5, bounds=(0, 1)), tmp_path / "middle.safetensors"

    class Keep(fusemlp.Callback):
        def on_batch_end(self, engine, batch):
            if engine.update_count == stop:
                engine.save_checkpoint(place)

    whole = Engine(MLP([INPUTS, 8, OUTPUTS]), batch_size=10, plan=plan)
    whole.fit(X, y, epochs=3, adversarial=how, callbacks=[Keep()])
    again = fusemlp.load_checkpoint(place)
    if stop == 2:
        with pytest.raises(ShapeError, match="X: the fit that is resumed has batches of 10 rows"):
            fusemlp.load_checkpoint(place).fit(X[:9], y[:9], epochs=3, adversarial=how, resume=True)
    again.fit(X, y, epochs=3, adversarial=how, resume=True)
    assert all(np.array_equal(array, whole.state_dict()[name]) for name, array in again.state_dict().items())
    # a plain fit carries nothing on
    again.fit(X, y, epochs=1)
    again.save_checkpoint(place)
    assert "carried" not in again.memory.arrays and "carried" in whole.memory.arrays


def test_a_second_fit_begins_anew_and_a_divergence_leaves_what_was_carried():
    X, y = problem("cross_entropy", 32)
    one, two = (Engine(MLP([INPUTS, 8, OUTPUTS]), batch_size=10) for _ in range(2))
    one.fit(X, y, epochs=1, adversarial=Free(0.3))
    two.load_state_dict(one.state_dict())
    for engine in (one, two):
        engine.memory.counters[:], engine.epochs_trained = 0, 0
        for state in engine.memory.states:
            state[:] = 0.0
        engine.fit(X, y, epochs=1, adversarial=Free(0.3))
    assert all(np.array_equal(array, two.state_dict()[name]) for name, array in one.state_dict().items())
    wild = Engine(MLP([INPUTS, 8, OUTPUTS], activation="identity"), "mse", SGD(lr=1e30), batch_size=10)
    with pytest.raises(fusemlp.DivergenceError):
        wild.fit(*problem("mse", 32), epochs=2, adversarial=Free(0.3))
    assert np.array_equal(wild.memory.arrays["carried"], np.zeros(10 * INPUTS))


def test_both_make_the_digits_robust():
    rows, test = digits()
    robust = {}
    ways = {"plain": (None, 20), "free": (Free(0.1, bounds=(0, 1)), 5), "trades": (TRADES(0.1, bounds=(0, 1)), 20)}
    for name, (adversarial, epochs) in ways.items():
        engine = Engine(MLP([64, 64, 10]), batch_size=50)
        engine.fit(*rows, epochs=epochs, adversarial=adversarial)
        robust[name] = engine.evaluate(engine.attack(*test, PGD(0.1, steps=20, bounds=(0, 1))), test[1])["accuracy"]
        assert engine.evaluate(*test)["accuracy"] > 0.85
    assert robust["plain"] < 0.55 < 0.62 < min(robust["free"], robust["trades"])


@pytest.mark.parametrize(
    ("made", "kind", "message"),
    [
        (lambda: Free(0.0), ArgumentError, "eps: expected a finite number above 0"),
        (lambda: Free(0.1, repeats=0), ArgumentError, "repeats: expected a whole number of at least 1"),
        (lambda: TRADES(0.1, beta=0.0), ArgumentError, "beta: expected a finite number above 0"),
        (lambda: TRADES(0.1, perturb_steps=5), ArgumentTypeError, "perturb_steps: it is called steps here"),
        (lambda: Free(0.1, m=3), ArgumentTypeError, "m: it is called repeats here"),
        (lambda: Free(epsilon=0.1), ArgumentTypeError, r"epsilon: it is called eps here: Free\(0\.1\)"),
    ],
)
def test_impossible_trainings_are_refused(made, kind, message):
    with pytest.raises(kind, match=message):
        made()


@pytest.mark.parametrize(
    ("engine", "how", "kind", "message"),
    [
        ({}, Free(0.1, bounds=(0, 0.5)), DataError, "X: values from .* are not within the bounds"),
        ({"optimizer": Adam(accumulate=2)}, Free(0.1), ArgumentError, "accumulate: Free updates at each of its 4"),
        ({"loss": "mse"}, TRADES(0.1), ArgumentError, "adversarial: TRADES needs the loss cross_entropy, this"),
        ({"loss": CrossEntropy(ignore_index=1)}, TRADES(0.1), ArgumentError, "loss: TRADES weighs the divergence"),
        (
            {"net": MLP([INPUTS, 4, OUTPUTS], dropout=0.1)},
            TRADES(0.1),
            ArgumentError,
            "adversarial: TRADES takes no dro",
        ),
        ({"normalise": True}, Free(0.1), ArgumentError, "adversarial: eps would be in the units of the scaled"),
    ],
)
def test_what_they_cannot_be_combined_with_is_refused(engine, how, kind, message):
    made = Engine(**{"net": MLP([INPUTS, OUTPUTS]), **engine})
    before = made.state_dict()
    with pytest.raises(kind, match=message):
        made.fit(*problem(made.loss.kind), epochs=1, adversarial=how)
    assert made.update_count == 0 and all(np.array_equal(a, before[n]) for n, a in made.state_dict().items())


@pytest.mark.parametrize("device", [pytest.param(INTERPRETER, marks=marks_of(INTERPRETER))], ids=["triton"])
def test_fp16_is_refused_for_what_is_carried(device):
    with usable(device):
        engine = Engine(MLP([INPUTS, OUTPUTS]), backend="triton", plan="eager", precision="fp16")
        with pytest.raises(ArgumentError, match="precision: gradients in fp16 overflow now and then"):
            engine.fit(*problem("cross_entropy"), epochs=1, adversarial=Free(0.1))


@pytest.mark.parametrize("how", [Free(0.1), TRADES(0.1)], ids=["free", "trades"])
def test_they_are_no_attacks(how):
    with pytest.raises(ArgumentTypeError, match="how: expected an attack such as PGD"):
        Engine(MLP([INPUTS, OUTPUTS])).attack(*problem("cross_entropy"), how)
