"""Attacks, and training on attacked batches: against the oracle, against torch, within eps and bounds, and refused."""

from dataclasses import replace

import numpy as np
import pytest
from devices import INTERPRETER, places, usable
from hypothesis import given, settings
from hypothesis import strategies as st

import fusemlp
from fusemlp import FGSM, MLP, PGD, SGD, Adam, CrossEntropy, Engine, Fleet
from fusemlp.runtime.attacks import row_losses
from fusemlp_kernels import philox, reference
from fusemlp_kernels.errors import ArgumentError, ArgumentTypeError, DataError
from make import assert_same, layers_of

ROWS, INPUTS, OUTPUTS = 23, 5, 3
LOSSES = ("cross_entropy", "binary_cross_entropy", "mse", "mae", "huber", "poisson", "quantile")


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
        _, _, dx = reference.gradients(layers, spec, replace(batch, x=adv))
        adv = reference.perturb(x, adv - x, change, dx)
    return adv


def adversarial_steps(engine, X, y, weight, how):
    """The oracle's parameters after an epoch."""
    layers, rule = layers_of(engine.network, engine.state_dict()), engine.optimizer.rule()
    state, spec = reference.initial_state(rule, layers), engine.loss.spec(accuracy=False, soft=False)
    order = philox.row_order(len(X), engine.seed, 0)
    for t, first in enumerate(range(0, len(X), engine.batch_size)):
        rows = order[first : first + engine.batch_size]
        batch = reference.Batch(X[rows], y[rows], None if weight is None else weight[rows])
        keeps = [
            philox.dropout_keep(layer.rate, i, engine.seed, t, len(rows), len(layer.w)) if layer.rate else None
            for i, layer in enumerate(layers)
        ]
        batch = replace(batch, x=moved(layers, spec, batch, how, t), keeps=keeps)
        _, layers, state = reference.train_step(layers, state, spec, rule, t, engine.optimizer.lr, batch)
    return layers


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
    wanted = adversarial_steps(engine, X, y, weight, how)
    engine.fit(X, y, epochs=1, sample_weight=weight, adversarial=how)
    for layer, expected in zip(layers_of(engine.network, engine.state_dict()), wanted, strict=True):
        np.testing.assert_allclose(layer.w, expected.w, rtol=1e-6, atol=1e-9)
        np.testing.assert_allclose(layer.b, expected.b, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("precision", ["fp32", "fp64"])
def test_the_plans_agree_bit_for_bit(precision):
    def trained(plan):
        engine = Engine(MLP([INPUTS, 300, OUTPUTS], dropout=0.2), batch_size=100, precision=precision, plan=plan)
        history = engine.fit(*problem("cross_entropy", 900), epochs=2, adversarial=PGD(0.1, steps=3, seed=5))
        return engine.state_dict(), history.history

    (eager, first), (resident, second) = trained("eager"), trained("resident")
    # losses are added task by task, and a plan cuts its own tasks
    assert first == {name: pytest.approx(values, rel=1e-12) for name, values in second.items()}
    assert_same(eager, resident)


# of one layer, and with more outputs than fit a tile, the last is in two calls
@pytest.mark.parametrize(("norm", "widths"), [("inf", [9, OUTPUTS]), (2, [300])])
@pytest.mark.parametrize("device", places(INTERPRETER))
def test_other_backends_train_alike(device, norm, widths):
    X, y = problem("cross_entropy", 12)
    X = X.astype(np.float32)

    def trained(backend, plan):
        net = MLP([INPUTS, *widths], activation="tanh", dropout=0.3 if widths[1:] else 0.0)
        engine = Engine(net, optimizer=SGD(lr=0.1), batch_size=8, backend=backend, plan=plan)
        history = engine.fit(X, y, epochs=1, adversarial=PGD(0.2, steps=2, norm=norm, bounds=(0, 1), seed=3))
        return engine.state_dict(), history.history["loss"][0], engine.attack(X, y, FGSM(0.2))

    numpy = trained("numpy", "auto")
    with usable(device):
        other = trained(device.backend, "eager")
    # two steps of at most 0.1 times a gradient below 1, each of some ten sums of at most nine terms; the sum of 300
    # exponentials has an error of its own, relative to a probability of 1 / 300
    for name, array in numpy[0].items():
        np.testing.assert_allclose(other[0][name], array, rtol=0, atol=2 * 0.1 * 10 * 10 * 2.0**-24)
    assert other[1] == pytest.approx(numpy[1], rel=1e-5)
    np.testing.assert_allclose(other[2], numpy[2], rtol=0, atol=1e-5)


def torch_attack(torch, loss_of, x, start, how):
    """Projected gradient steps as torch's users write them."""
    change, adv = how.perturbation(), start.clone()
    for _ in range(how.plain.steps):
        adv.requires_grad_(True)
        (gradient,) = torch.autograd.grad(loss_of(adv), adv)
        with torch.no_grad():
            if change.norm == "inf":
                delta = (adv + change.step * gradient.sign() - x).clamp(-change.eps, change.eps)
            else:
                delta = adv + change.step * torch.nn.functional.normalize(gradient, dim=1, eps=1e-300) - x
                delta = delta * (change.eps / delta.norm(dim=1, keepdim=True).clamp(min=change.eps))
            adv = x + delta
            if how.bounds is not None:
                adv = adv.clamp(*how.bounds)
    return adv.detach()


TORCH_LOSSES = {
    "cross_entropy": "cross_entropy",
    "binary_cross_entropy": "binary_cross_entropy_with_logits",
    "mse": "mse_loss",
}


@pytest.mark.parametrize(
    "how", [PGD(0.1, steps=7, bounds=(0, 1), seed=2), PGD(0.3, norm=2, steps=5), FGSM(0.2)], ids=str
)
@pytest.mark.parametrize("kind", TORCH_LOSSES)
def test_attack_and_training_are_those_of_a_torch_loop(kind, how):
    torch = pytest.importorskip("torch")
    X, y = problem(kind, 40)
    net = MLP([INPUTS, 16, OUTPUTS], activation="tanh")
    engine = Engine(net, kind, SGD(lr=0.1, momentum=0.9), 8, precision="fp64", backend="numpy")
    module = torch.nn.Sequential(torch.nn.Linear(INPUTS, 16), torch.nn.Tanh(), torch.nn.Linear(16, OUTPUTS)).double()
    module.load_state_dict({name: torch.tensor(array) for name, array in engine.state_dict().items()})
    function, xs, ts = getattr(torch.nn.functional, TORCH_LOSSES[kind]), torch.tensor(X), torch.tensor(y)
    change = how.perturbation()

    def started(x, batch_index):
        start = change.eps * philox.uniform(change.seed, batch_index, *x.shape) if change.seed is not None else 0.0 * x
        return torch.tensor(reference.perturb(np.asarray(x), np.asarray(start), change))

    found = engine.attack(X, y, how)
    wanted = torch_attack(torch, lambda adv: function(module(adv), ts), xs, started(X, 0), how)
    np.testing.assert_allclose(found, wanted.numpy(), rtol=0, atol=1e-12)

    optimizer = torch.optim.SGD(module.parameters(), lr=0.1, momentum=0.9)
    history = engine.fit(X, y, epochs=3, adversarial=how, validation_data=(X, y)).history
    # training is on what the attack made, validation on the rows as they are
    assert history["val_loss"][-1] == pytest.approx(engine.evaluate(X, y)["loss"], rel=1e-12)
    for t, rows in enumerate(np.concatenate([philox.row_order(40, 0, e) for e in range(3)]).reshape(-1, 8)):
        x, target = xs[rows], ts[rows]
        adv = torch_attack(torch, lambda adv, target=target: function(module(adv), target), x, started(x, t), how)
        optimizer.zero_grad()
        function(module(adv), target).backward()
        optimizer.step()
    for name, array in module.state_dict().items():
        np.testing.assert_allclose(engine.state_dict()[name], array.numpy(), rtol=1e-9, atol=1e-12)


@settings(max_examples=30, deadline=None, derandomize=True, database=None)
@given(
    how=ATTACKS,
    restarts=st.sampled_from((1, 2)),
    loss=st.sampled_from(LOSSES),
    precision=st.sampled_from(("fp32", "fp64")),
)
def test_attacks_stay_within_eps_and_bounds_and_raise_the_loss(how, restarts, loss, precision):
    how = replace(how, restarts=restarts) if getattr(how, "random_start", False) else how
    X, y = problem(loss)
    engine = Engine(MLP([INPUTS, 8, OUTPUTS], activation="tanh"), loss, precision=precision)
    before, adv = engine.state_dict(), engine.attack(X, y, how)
    # the sum x + d, and its difference from x, are rounded
    slack = 4 * np.finfo(adv.dtype).eps
    moved = adv.astype(np.float64) - X.astype(adv.dtype)
    assert np.abs(moved).max() <= how.eps + slack
    if how.plain.norm == "2":
        assert np.linalg.norm(moved, axis=1).max() <= how.eps + slack * INPUTS**0.5
    if how.bounds is not None:
        assert how.bounds[0] <= adv.min() and adv.max() <= how.bounds[1]
    assert engine.evaluate(adv, y)["loss"] > engine.evaluate(X, y)["loss"] or not how.plain.random_start
    assert_same(engine.state_dict(), before)
    assert np.array_equal(engine.attack(X, y, how), adv)


WEIGHED = CrossEntropy(class_weight=[0.01, 1.0, 100.0], label_smoothing=0.3)


@pytest.mark.parametrize("loss", [*LOSSES, WEIGHED], ids=str)
def test_restarts_keep_the_largest_loss_of_each_row(loss):
    X, y = problem("cross_entropy" if loss is WEIGHED else loss)
    if loss is WEIGHED:
        y = np.random.default_rng(1).dirichlet(np.ones(OUTPUTS), ROWS)
    engine = Engine(MLP([INPUTS, 8, OUTPUTS], activation="relu"), loss, precision="fp64")
    data = engine.inputs.examples(X, y, None)
    spec, weights = engine.inputs.spec_for(data.targets), WEIGHED.class_weight if loss is WEIGHED else None

    def losses(adv):
        found = row_losses(spec, engine.outputs(adv), data.targets.values, weights and np.array(weights))
        own = np.array([engine.evaluate(adv[i : i + 1], y[i : i + 1])["loss"] for i in range(ROWS)])
        np.testing.assert_allclose(found, own * (1 if spec.kind == "cross_entropy" else OUTPUTS), rtol=1e-12)
        return found

    first, best = (losses(engine.attack(X, y, PGD(0.5, steps=1, restarts=count))) for count in (1, 4))
    assert (best >= first).all() and (best > first).any()


@pytest.mark.parametrize("wrong", [None, PGD(0.2, steps=2, seed=7)], ids=str)
def test_a_fit_is_resumed_against_the_same_attack(wrong):
    engine, data = Engine(MLP([INPUTS, 8, OUTPUTS]), batch_size=10), problem("cross_entropy")
    engine.fit(*data, epochs=1, adversarial=PGD(0.1, steps=2, seed=7))
    with pytest.raises(ArgumentError, match=r"adversarial: the fit that is resumed trains against \{'kind': 'pgd'"):
        engine.fit(*data, epochs=3, adversarial=wrong, resume=True)


def test_a_step_prints_the_attack():
    engine = Engine(MLP([4, 8, 3]), plan="eager", backend="numpy")
    program = engine.program_against(PGD(0.1, steps=3))
    ops = [call.op for call in program.calls]
    inner = ["linear", "linear_loss_grad", "grad_input", "grad_input", "perturb"]
    assert ops == ["perturb", *(inner * 3), *(call.op for call in engine.program.calls)]
    # no gradient by the weights in between, and one loss is counted
    assert [sum(name in call.writes for call in program.calls) for name in ("stats", "counters", "dw0")] == [1, 1, 1]


def test_normalised_inputs_are_attacked_in_their_own_units():
    X, y = problem("cross_entropy")
    X = 100.0 * X + 7.0
    engine = Engine(MLP([INPUTS, 8, OUTPUTS]), batch_size=8, normalise=True)
    engine.fit(X, y, epochs=2)
    moved = np.abs(engine.attack(X, y, PGD(3.0)) - X).max()
    assert 2.9 < moved <= 3.0 + 1e-4


def attack(**changes):
    arguments = {"X": np.zeros((2, INPUTS)), "y": [0, 1], "how": PGD(0.1, bounds=(0, 1)), **changes}
    Engine(MLP([INPUTS, OUTPUTS])).attack(**arguments)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: PGD(0.0), ArgumentError, "eps: expected a finite number above 0"),
        (lambda: PGD(0.1, steps=0), ArgumentError, "steps: expected a whole number of at least 1"),
        (lambda: PGD(0.1, norm=1), ArgumentTypeError, "norm: expected one of inf, 2, got 1"),
        (lambda: PGD(0.1, norm=np.array([2, 2])), ArgumentTypeError, "norm: expected one of inf, 2, got array"),
        (lambda: PGD(0.1, bounds=(1, 0)), ArgumentError, "bounds: expected .low, high. with low < high"),
        (lambda: PGD(0.1, bounds=1.0), ArgumentTypeError, r"bounds: expected \(low, high\) such as \(0\.0, 1\.0\)"),
        (lambda: PGD(0.1, restarts=3, random_start=False), ArgumentError, "restarts: without a random start all 3"),
        (lambda: PGD(0.1, alpha=0.1), ArgumentTypeError, "alpha: there is no such argument; there are bounds, eps"),
        (lambda: FGSM(epsilon=0.1), ArgumentTypeError, "epsilon: there is no such argument; did you mean 'eps'"),
        (lambda: attack(X=np.full((2, INPUTS), 2.0)), DataError, r"X: values from 2 to 2 .* the bounds \(0\.0, 1\.0\)"),
        (lambda: attack(y=[0, 7]), DataError, "y: .*7"),
        (lambda: attack(y=[0]), fusemlp.ShapeError, "y: "),
        (lambda: attack(how="pgd"), ArgumentTypeError, r"how: expected an attack such as PGD\(0\.1\)"),
    ],
)
def test_wrong_attacks_are_refused(call, error, message):
    with pytest.raises(error, match=message):
        call()


# pairs of features stand in the table of conflicts
@pytest.mark.parametrize(
    ("adversarial", "error", "message"),
    [
        (0.1, ArgumentTypeError, "adversarial: expected an attack"),
        (PGD(0.1, restarts=2), ArgumentError, "adversarial: restarts are for Engine.attack"),
        (PGD(0.1, bounds=(0, 0.5)), DataError, "X: values from .* are not within the bounds"),
    ],
)
def test_attacks_that_fit_does_not_take_are_refused(adversarial, error, message):
    engine, twin = (Engine(MLP([INPUTS, OUTPUTS])) for _ in range(2))
    with pytest.raises(error, match=message):
        engine.fit(*problem("cross_entropy"), epochs=1, adversarial=adversarial)
    assert engine.update_count == 0
    assert_same(engine, twin)
    fleet = Fleet(MLP([INPUTS, OUTPUTS]), vary={"seed": [0, 1]})
    with pytest.raises(ArgumentTypeError, match="adversarial: fleets do not train against attacks; use"):
        fleet.fit(*problem("cross_entropy"), epochs=1, adversarial=adversarial)
