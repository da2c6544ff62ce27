"""Networks whose members share weights: training against the oracle, predictions, files and refusals."""

from itertools import pairwise
from types import SimpleNamespace

import numpy as np
import pytest
from devices import GPU, INTERPRETER, marks_of, usable
from scipy.special import expit, log_softmax, softmax
from tolerance import UNIT

import fusemlp
from fusemlp import MLP, SGD, AdamW, ArgumentError, Callback, Engine
from fusemlp.fleet.results import members
from fusemlp.report.uncertainty import held_out_logits, scale_logits, temperature_of
from fusemlp.runtime.forward import combined
from fusemlp.runtime.plans import planned
from fusemlp_kernels import reference
from fusemlp_kernels.contract import LossSpec
from fusemlp_kernels.errors import BackendUnavailableError
from fusemlp_kernels.reference import Batch, MemberLayer
from make import assert_same

ROWS, WIDTH, CLASSES, MEMBERS = 70, 5, 3, 3
NET = MLP([WIDTH, 6, 7, CLASSES], activation="tanh", members=MEMBERS)


def data(seed=1, rows=ROWS):
    generator = np.random.default_rng(seed)
    X = generator.normal(size=(rows, WIDTH)).astype(np.float32)
    return X, (X @ np.random.default_rng(0).normal(size=(WIDTH, CLASSES))).argmax(axis=1)


def parts(net, state):
    """The layers and heads of a state, as the oracle has them."""
    layers = [
        MemberLayer(*(state[f"{2 * i}.{name}"] for name in ("r", "weight", "s", "bias")), net.activations[i].name)
        for i in range(net.layers - 1)
    ]
    last, outputs = 2 * (net.layers - 1), net.sizes[-1]
    weight, bias = state[f"{last}.weight"], state[f"{last}.bias"]
    return layers, (weight.reshape(net.members, outputs, -1), bias.reshape(net.members, outputs))


def outputs_of(net, state, X):
    """The outputs (n, members, N), member by member, as the definition has them."""
    layers, heads = parts(net, state)
    found = []
    for member in range(net.members):
        h = X.astype(np.float64)
        for layer in layers:
            z = ((h * layer.r[member]) @ layer.w.T) * layer.s[member] + layer.b[member]
            h = reference.activation(layer.activation, z)
        found.append(h @ heads[0][member].T + heads[1][member])
    return np.stack(found, axis=1)


def trained_by_the_oracle(net, state, data, kind, lr, epochs, batch_size=16):
    X, y, weight = data
    for _ in range(epochs):
        for start in range(0, len(X), batch_size):
            rows = np.repeat(np.arange(start, min(start + batch_size, len(X))), net.members)
            own = None if weight is None else weight[rows]
            layers, heads = parts(net, state)
            batch = Batch(X[rows].astype(np.float64), y[rows], own)
            _, grads = reference.member_gradients(layers, heads, LossSpec(kind), batch)
            flat = {}
            for i, (r, w, s, b) in enumerate(grads[:-1]):
                flat |= {f"{2 * i}.r": r, f"{2 * i}.weight": w, f"{2 * i}.s": s, f"{2 * i}.bias": b}
            last = 2 * (net.layers - 1)
            flat |= {f"{last}.weight": grads[-1][0].reshape(-1, net.sizes[-2]), f"{last}.bias": grads[-1][1].ravel()}
            state = {name: value - lr * flat[name] for name, value in state.items()}
    return state


# a batch of many tasks
LARGE = MLP([WIDTH, 64, 48, CLASSES], activation="tanh", members=8)


@pytest.mark.parametrize("plan", ["eager", "resident"])
@pytest.mark.parametrize(
    ("net", "batch_size", "kind", "clip"),
    [
        (NET, 16, "cross_entropy", None),
        (NET, 16, "mse", None),
        (NET, 16, "cross_entropy", 1e9),
        (LARGE, 64, "cross_entropy", None),
    ],
)
def test_training_is_that_of_the_oracle(net, batch_size, kind, clip, plan):
    X, y = data()
    target = y if kind == "cross_entropy" else np.eye(CLASSES)[y] * 2.0 - 0.3
    weight = np.random.default_rng(3).uniform(0.5, 2.0, ROWS) if clip is None else None
    # a norm that clips nothing has the update in a phase of its own
    engine = Engine(net, kind, SGD(0.1, clip_norm=clip), batch_size, precision="fp64", plan=plan, backend="numpy")
    before = engine.state_dict()
    engine.fit(X, target, epochs=3, shuffle=False, sample_weight=weight)
    wanted = trained_by_the_oracle(net, before, (X, target, weight), kind, 0.1, 3, batch_size)
    for name, value in engine.state_dict().items():
        np.testing.assert_allclose(value, wanted[name], rtol=1e-9, atol=1e-11, err_msg=name)
        assert not np.allclose(value, before[name], rtol=1e-6), name


CARDS = pytest.mark.parametrize(
    "device", [pytest.param(one, id=one.name, marks=marks_of(one)) for one in (INTERPRETER, GPU)]
)


@CARDS
def test_other_backends_train_as_numpy_does(device):
    X, y = data(rows=24)
    net = MLP([WIDTH, 9, 7, CLASSES], activation=["silu", "relu"], dropout=0.2, members=MEMBERS)
    frozen = {"2.s": fusemlp.ParameterOptions(trainable=False)}
    told = {"optimizer": SGD(0.1, momentum=0.5, weight_decay=0.01, per_parameter=frozen), "batch_size": 16}
    wanted = Engine(net, backend="numpy", **told)
    wanted.fit(X, y, epochs=1, sample_weight=np.linspace(0.5, 2.0, 24))
    # two updates by up to 0.15 times a gradient of about 1, whose error is that of sums of up to 48 products: 18 u
    # each, with a factor of ten for the layers that it goes through
    limit = 64 * UNIT["float32"]
    with usable(device):
        for plan in ("eager",) if device is INTERPRETER else ("eager", "graph"):
            engine = Engine(net, backend=device.backend, plan=plan, **told)
            engine.fit(X, y, epochs=1, sample_weight=np.linspace(0.5, 2.0, 24))
            for name, value in wanted.state_dict().items():
                np.testing.assert_allclose(engine.state_dict()[name], value, rtol=0, atol=limit, err_msg=name)
            np.testing.assert_allclose(engine.predict_proba(X[:9]), wanted.predict_proba(X[:9]), rtol=0, atol=limit)
            assert engine.evaluate(X[:9], y[:9]) == pytest.approx(wanted.evaluate(X[:9], y[:9]), abs=limit)
        with pytest.raises(BackendUnavailableError, match=r"plan: the \w+ backend"):
            Engine(net, backend=device.backend, plan="resident", **told)


def test_steps_epochs_at_once_and_batches_train_alike():
    X, y = data(rows=64)
    told = {"optimizer": AdamW(0.01), "batch_size": 16, "backend": "numpy"}
    net = MLP([WIDTH, 8, CLASSES], dropout=0.2, activation="silu", members=4)
    engines = [Engine(net, **told) for _ in range(4)]
    engines[0].fit(X, y, epochs=3, shuffle=False)
    seen = []
    each = SimpleNamespace(on_epoch_end=lambda engine, epoch, logs: seen.append(epoch))
    engines[1].fit(X, y, epochs=3, shuffle=False, callbacks=[each])
    batches = [(X[at : at + 16], y[at : at + 16]) for at in range(0, 64, 16)]
    engines[2].fit(batches, epochs=3)
    for _ in range(3):
        for x, own in batches:
            engines[3].step(x, own)
    assert seen == [0, 1, 2]
    for one, other in pairwise(engines):
        assert_same(one, other)


@pytest.mark.parametrize("staged", [False, True])
def test_a_step_after_a_fit_that_was_cut_off_reads_its_own_rows(staged):
    """Also where the step was bound before the fit: the rows of a fit lie behind those of the step's batch."""
    X, y = data(rows=64)
    one, other = (Engine(NET, optimizer=SGD(0.1), batch_size=16, backend="numpy") for _ in range(2))

    class Cut(Callback):
        def on_batch_end(self, engine, batch):
            raise KeyboardInterrupt

    for engine in (one, other) if staged else ():
        engine.step(X[:16], y[:16])
    with pytest.raises(KeyboardInterrupt):
        one.fit(X, y, epochs=1, shuffle=False, callbacks=[Cut()])
    other.step(X[:16], y[:16])
    for engine in (one, other):
        engine.step(X[20:30], y[20:30])
    assert_same(one, other)


def test_members_start_with_signs_and_heads_of_their_own():
    state = NET.initial_parameters(0)
    assert set(np.unique(state["0.r"])) == {-1.0, 1.0} and not (state["0.r"] == state["0.r"][0]).all()
    assert (state["2.r"] == 1).all() and (state["0.s"] == 1).all() and (state["2.s"] == 1).all()
    assert len(np.unique(state["4.weight"])) == state["4.weight"].size == MEMBERS * CLASSES * 7
    torch_like = MLP([WIDTH, 6, CLASSES], init="torch", members=MEMBERS).initial_parameters(0)
    assert (torch_like["0.bias"] == torch_like["0.bias"][0]).all() and torch_like["0.bias"].any()
    assert NET.parameter_count == sum(value.size for value in state.values())


def test_a_prediction_is_the_mean_of_the_members():
    X, y = data()
    engine = Engine(NET, optimizer=AdamW(0.02), batch_size=16, precision="fp64", backend="numpy")
    engine.fit(X, y, epochs=3)
    each = outputs_of(NET, engine.state_dict(), X)
    np.testing.assert_allclose(engine.member_outputs(X), each, rtol=1e-10)
    mean = softmax(each, axis=2).mean(axis=1)
    np.testing.assert_allclose(engine.predict_proba(X), mean, rtol=1e-10)
    np.testing.assert_array_equal(engine.predict(X), mean.argmax(axis=1))
    weight = np.random.default_rng(2).uniform(size=ROWS)
    loss = -(weight * np.log(mean[np.arange(ROWS), y])).sum() / weight.sum()
    found = engine.evaluate(X, y, weight, metrics=["log_loss"])
    assert found["loss"] == pytest.approx(loss, rel=1e-10) and found["log_loss"] == pytest.approx(loss, rel=1e-7)
    assert found["accuracy"] == pytest.approx((mean.argmax(axis=1) == y).mean())
    # by Jensen's inequality the mean of the losses is larger
    losses = -log_softmax(each, axis=2)[np.arange(ROWS), :, y].mean(axis=1)
    assert loss < (weight * losses).sum() / weight.sum()


@pytest.mark.parametrize("kind", ["binary_cross_entropy", "poisson", "mse"])
def test_other_losses_combine_what_they_predict(kind):
    X, y = data()
    net = MLP([WIDTH, 6, 1], members=MEMBERS)
    engine = Engine(net, kind, batch_size=16, precision="fp64", backend="numpy")
    engine.fit(X, (y > 0).astype(float), epochs=2)
    each = engine.member_outputs(X)[:, :, 0]
    if kind == "binary_cross_entropy":
        np.testing.assert_allclose(engine.predict_proba(X)[:, 1], expit(each).mean(axis=1), rtol=1e-12)
    else:
        np.testing.assert_allclose(engine.predict(X), (np.exp(each) if kind == "poisson" else each).mean(axis=1))


def test_far_outputs_keep_their_probabilities():
    far = np.array([[2000.0, 0.0], [0.0, 0.0], [-1e4, 1e4], [-1e4, 1e4]])
    np.testing.assert_allclose(combined("cross_entropy", far, 2), [np.log([0.75, 0.25]), [-2e4, 0.0]])
    assert combined("binary_cross_entropy", np.array([[2000.0], [0.0]]), 2) == pytest.approx(np.log(3.0))
    assert combined("binary_cross_entropy", np.array([[-2000.0], [-2000.0]]), 2) == pytest.approx(-2000.0)


@pytest.mark.parametrize("ema", [0.0, 0.9])
def test_validation_and_early_stopping_follow_the_mean_prediction(ema):
    X, y = data()
    Xv, yv = data(2, 40)
    engine = Engine(NET, optimizer=AdamW(0.05, ema=ema), batch_size=16, backend="numpy")
    history = engine.fit(X, y, epochs=40, validation_data=(Xv, yv), early_stopping=3, metrics=["auc"])
    assert min(history.history["val_loss"]) == pytest.approx(engine.evaluate(Xv, yv)["loss"], rel=1e-6)
    assert "val_auc" in history.history


def test_a_configuration_without_members_is_that_of_earlier_releases():
    assert "members" not in MLP([2, 3]).to_config() and MLP.from_config(NET.to_config()) == NET


def test_the_factors_are_no_weights_for_the_decay_and_may_be_frozen():
    decayed = AdamW(0.01, weight_decay=0.1, decay_biases=False)
    decays = {name: decayed.options_for(name)[1].weight_decay for name in ("0.r", "0.s", "0.bias", "0.weight")}
    assert decays == {"0.r": 0, "0.s": 0, "0.bias": 0, "0.weight": 0.1}
    for frozen in ("0.*", "[024].r", "4.*", "[02].*"):
        rules = {frozen: fusemlp.ParameterOptions(trainable=False)}
        engine = Engine(NET, optimizer=SGD(0.1, per_parameter=rules), backend="numpy")
        before = engine.state_dict()
        engine.fit(*data(), epochs=2)
        for name, value in engine.state_dict().items():
            trained = engine.optimizer.options_for(name)[0]
            assert np.array_equal(value, before[name]) is not trained, (frozen, name)


def test_the_temperature_is_that_of_the_mean_probability():
    X, y = data(3, 400)
    net = MLP([WIDTH, 8, CLASSES], members=MEMBERS)
    engine = Engine(net, optimizer=AdamW(0.02), batch_size=16, precision="fp64", backend="numpy")
    engine.fit(X[:60], (y[:60] + (np.arange(60) % 4 == 0)) % CLASSES, epochs=60)
    rows = held_out_logits(engine, X[60:], y[60:], None)
    found = temperature_of([rows])
    each = rows[0]

    def log_loss(value):
        mean = softmax(each / value, axis=2).mean(axis=1)
        return float(-np.log(mean[np.arange(340), y[60:]]).mean())

    assert (found.before, found.after) == pytest.approx((log_loss(1.0), log_loss(found.value)))
    scale_logits(engine, found.value)
    assert engine.evaluate(X[60:], y[60:])["loss"] == pytest.approx(found.after)


@pytest.mark.parametrize("kind", ["cross_entropy", "mse"])
def test_the_members_apart_predict_what_they_do_together(kind):
    X, y = data()
    X = X * 3.0 + 2.0
    target = y if kind == "cross_entropy" else np.eye(CLASSES)[y]
    engine = Engine(NET, kind, AdamW(0.01, ema=0.9), batch_size=16, precision="fp64", normalise=True, backend="numpy")
    engine.fit(X, target, epochs=3)
    apart = members(engine)
    assert [one.network for one in apart] == [MLP(NET.sizes, activation="tanh")] * MEMBERS
    for place, one in enumerate(apart):
        np.testing.assert_allclose(one.outputs(X), engine.member_outputs(X)[:, place], rtol=1e-12, atol=1e-13)
    each = [one.predict_proba(X) if kind == "cross_entropy" else one.predict(X) for one in apart]
    whole = engine.predict_proba(X) if kind == "cross_entropy" else engine.predict(X)
    np.testing.assert_allclose(np.mean(each, axis=0), whole, rtol=1e-11, atol=1e-12)
    assert np.std(each, axis=0).min() > 1e-6


def test_a_summary_and_a_plan_name_the_members(capsys):
    NET.summary()
    assert f"MLP {WIDTH}-6-7-{CLASSES}, {MEMBERS} members" in capsys.readouterr().out
    assert repr(NET).endswith("members=3)") and eval(repr(NET), {"MLP": MLP}) == NET
    for backend in ("numpy", "triton"):
        text = str(planned(NET, batch_size=8, backend=backend)[0])
        assert "affine_members" in text and "24x6x5" in text


def refused(engine):
    X, y = data()
    return {
        "Engine.attack": lambda: engine.attack(X, y, fusemlp.PGD(0.1)),
        "bounds": lambda: engine.bounds(X, 0.1),
        "certified": lambda: engine.certified(X, y, 0.1),
        "input_gradient": lambda: engine.input_gradient(X, y),
        "from_pretrained": lambda: Engine.from_pretrained(engine, head=2),
        "a network with members": lambda: Engine.from_pretrained(MLP([2, 3]).initial_parameters(0), NET),
    }


@pytest.mark.parametrize("name", list(refused(None)))
def test_what_does_not_take_members_says_so(name):
    said = r"takes? a network without members, and this one has 3; make it with members=1"
    with pytest.raises(ArgumentError, match=said):
        refused(Engine(NET, backend="numpy"))[name]()


@pytest.mark.parametrize(
    ("sizes", "options", "said"),
    [
        ([4, 2], {}, "members: members share hidden layers, so add one"),
        ([4, 8, 2], {"output_activation": "tanh"}, "output_activation: with members it must be 'identity', got 'tanh'"),
        ([4, 8, 2], {"members": 0}, "members: expected"),
    ],
)
def test_impossible_members_are_refused(sizes, options, said):
    with pytest.raises(ArgumentError, match=said):
        MLP(sizes, **{"members": 4, **options})
