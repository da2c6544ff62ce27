"""Training with interval bounds: whole runs against torch, resumed, and what is refused."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from torch_oracle import TORCH_ACTIVATIONS, tensor

import fusemlp
from fusemlp import ELU, IBP, MLP, Adam, ArgumentError, CrossEntropy, Engine
from make import assert_same

ROWS, BATCH, EPOCHS = 70, 16, 8
RNG = np.random.default_rng(11)
X = np.clip(RNG.normal(size=(ROWS, 6)), -1.5, 1.5)
LABELS = (X @ RNG.normal(size=(6, 3))).argmax(axis=1)
WEIGHT = RNG.uniform(0.2, 2.0, ROWS)


def make(activation="tanh", **options):
    defaults = {"optimizer": fusemlp.SGD(lr=0.2, momentum=0.8), "precision": "fp64", "backend": "numpy", "seed": 3}
    net = MLP([6, 9, 8, 3], activation=activation)
    return Engine(net, **{**defaults, "batch_size": BATCH, "normalise": False, **options})


def torch_fit(engine, ibp, optimizer, frozen=(), **weights):
    """Return the parameters after the same training by torch in float64, with the loss written as in the paper."""
    state = {name: tensor(array, grad=name not in frozen) for name, array in engine.state_dict().items()}
    layers = [(state[f"{2 * at}.weight"], state[f"{2 * at}.bias"]) for at in range(engine.network.layers)]
    mean, scale = (tensor(engine.input_scale.mean), tensor(engine.input_scale.scale)) if engine.input_scale else (0, 1)
    trained = [p for p in state.values() if p.requires_grad]
    step, total, done = optimizer(trained), EPOCHS * -(-ROWS // BATCH), 0
    own = {"weight": None if engine.loss.class_weight is None else tensor(engine.loss.class_weight)}
    own |= {"label_smoothing": engine.loss.label_smoothing, "reduction": "none"}
    for _ in range(EPOCHS):
        for start in range(0, ROWS, BATCH):
            rows = slice(start, start + BATCH)
            x, y = tensor(X[rows]), torch.tensor(LABELS[rows])
            reached = min(1.0, max(0.0, (done / total - ibp.warmup) / ibp.ramp))
            low, high = x - ibp.eps * reached, x + ibp.eps * reached
            if ibp.bounds is not None:
                low, high = low.clamp(*ibp.bounds), high.clamp(*ibp.bounds)
            h, low, high = ((one - mean) / scale for one in (x, low, high))
            for chosen, (w, b) in zip(engine.network.activations, layers, strict=True):
                middle, spread = (low + high) / 2 @ w.T + b, (high - low) / 2 @ w.abs().T
                h, low, high = (
                    TORCH_ACTIVATIONS[chosen.name](z, chosen.slope)
                    for z in (h @ w.T + b, middle - spread, middle + spread)
                )
            worst = torch.where(torch.nn.functional.one_hot(y, 3).bool(), low, high)
            weight = tensor(weights.get("sample_weight", np.ones(ROWS))[rows])
            share = weight if own["weight"] is None else weight * own["weight"][y]
            plain, hard = (
                (weight * torch.nn.functional.cross_entropy(z, y, **own)).sum() / share.sum() for z in (h, worst)
            )
            kappa = 1.0 - (1.0 - ibp.kappa) * reached
            step.zero_grad()
            (kappa * plain + (1.0 - kappa) * hard).backward()
            if engine.optimizer.clip_norm:
                torch.nn.utils.clip_grad_norm_(trained, engine.optimizer.clip_norm)
            step.step()
            done += 1
    return {name: p.detach().numpy() for name, p in state.items()}


def momentum(parameters):
    return torch.optim.SGD(parameters, lr=0.2, momentum=0.8)


def adam(parameters):
    return torch.optim.Adam(parameters, lr=0.02)


FROZEN = Adam(lr=0.02, per_parameter={"2.weight": fusemlp.ParameterOptions(trainable=False)})
CASES = {
    **{
        str(activation): (activation, {}, IBP(0.2), momentum, {})
        for activation in ("relu", fusemlp.LeakyReLU(0.2), "sigmoid", "tanh", ELU(0.7), "selu", "softplus", "identity")
    },
    "bounds": ("relu", {}, IBP(0.3, 0.2, warmup=0.0, ramp=0.9, bounds=(-1.5, 1.5)), momentum, {}),
    "scaled inputs": ("relu", {"normalise": X}, IBP(0.3, bounds=(-1.5, 1.5)), momentum, {}),
    "weights": ("relu", {}, IBP(0.1), momentum, {"sample_weight": WEIGHT}),
    "loss": (
        "relu",
        {"loss": CrossEntropy(class_weight=[1.0, 2.0, 0.5], label_smoothing=0.1)},
        IBP(0.1),
        momentum,
        {"sample_weight": WEIGHT},
    ),
    "clipping": ("tanh", {"optimizer": Adam(lr=0.02, clip_norm=0.5)}, IBP(0.2), adam, {}),
    "frozen": ("tanh", {"optimizer": FROZEN}, IBP(0.2), adam, {"frozen": ("2.weight",)}),
    "no plain loss": ("tanh", {}, IBP(0.2, kappa=0.0, ramp=0.1), momentum, {}),
}


@pytest.mark.parametrize("name", CASES)
def test_a_run_is_torchs(name):
    activation, options, ibp, optimizer, others = CASES[name]
    engine = make(activation, **options)
    expected = torch_fit(engine, ibp, optimizer, **others)
    before = engine.memory.tensors()
    given = {key: value for key, value in others.items() if key != "frozen"}
    engine.fit(X, LABELS, epochs=EPOCHS, shuffle=False, adversarial=ibp, **given)
    for key, value in engine.memory.tensors().items():
        np.testing.assert_allclose(value, expected[key], rtol=0, atol=1e-9)
        assert np.array_equal(value, before[key]) == (key in others.get("frozen", ()))


def test_rows_of_an_ignored_class_change_nothing():
    kept = np.arange(ROWS) % 3 > 0
    trained = []
    for labels, weight in ((np.where(kept, LABELS, -100), None), (LABELS, kept.astype(np.float64))):
        engine = make("relu", loss=CrossEntropy(ignore_index=-100))
        engine.fit(X, labels, epochs=4, shuffle=False, adversarial=IBP(0.2), sample_weight=weight)
        trained.append(engine.state_dict())
    for name, value in trained[0].items():
        np.testing.assert_allclose(trained[1][name], value, rtol=0, atol=1e-12)


@pytest.mark.parametrize("precision", ["fp32", "fp64"])
def test_the_plans_agree_bit_for_bit(precision):
    rows, labels, ibp = np.tile(X, (8, 1)), np.tile(LABELS, 8), IBP(0.2, bounds=(-1.5, 1.5))
    # several tasks and a short batch
    engines = [make(ELU(0.7), precision=precision, plan=plan, batch_size=150) for plan in ("eager", "resident")]
    first, second = (engine.fit(rows, labels, epochs=3, adversarial=ibp).history for engine in engines)
    assert first == {name: pytest.approx(values, rel=1e-12) for name, values in second.items()}
    assert_same(*engines)


def test_patience_and_the_best_weights_begin_after_the_ramp():
    assert [IBP(0.1).settled(epochs) for epochs in (1, 60)] == [0, 36]
    assert IBP(0.1, ramp=1.0).settled(5) == 4
    # 0.1 + 0.2 is a little more than 0.3
    assert IBP(0.1, warmup=0.1, ramp=0.2).settled(10) == 3
    engine = make("relu", plan="eager")
    kept = {}
    keep = SimpleNamespace(on_epoch_end=lambda engine, epoch, logs: kept.update({epoch: engine.state_dict()}))
    ibp = IBP(0.4, kappa=0.0, warmup=0.2, ramp=0.3)
    told = {"early_stopping": 3, "validation_split": 0.3, "callbacks": [keep]}
    history = engine.fit(X, LABELS, epochs=40, adversarial=ibp, **told)
    losses = history.history["val_loss"]
    best = 20 + int(np.argmin(losses[20:]))
    assert history.best_epoch == best and len(losses) == min(40, best + 4)
    # rows as they are were easier before
    assert min(losses[:20]) < losses[best]
    assert all(np.array_equal(value, kept[best][name]) for name, value in engine.state_dict().items())


def test_a_resumed_run_of_more_epochs_keeps_its_ramp():
    engine = make("relu")
    engine.fit(X, LABELS, epochs=2)
    # a rate that never falls is best where it first counts, in epoch 5 of the fit
    ibp, given = IBP(0.1, warmup=0.2, ramp=0.3), {"monitor": "learning_rate", "early_stopping": 8}
    engine.fit(X, LABELS, epochs=10, adversarial=ibp, **given)
    history = engine.fit(X, LABELS, epochs=40, adversarial=ibp, resume=True, **given)
    assert history.best_epoch == 2 + 5 and len(history.epochs) == 5 + 1 + 8


def test_training_certifies_more_rows():
    pixels, y = load_digits(return_X_y=True)
    pixels = pixels / 16.0
    shares, accuracies = [], []
    for adversarial in (None, IBP(0.05, bounds=(0, 1))):
        engine = Engine(MLP([64, 64, 10]), optimizer=Adam(lr=0.003), backend="numpy", batch_size=64)
        engine.fit(pixels[:1400], y[:1400], epochs=20, adversarial=adversarial)
        shares.append(engine.certified(pixels[1400:], y[1400:], 0.05, bounds=(0, 1)).mean())
        accuracies.append(engine.evaluate(pixels[1400:], y[1400:])["accuracy"])
    assert shares[0] < 0.2
    assert shares[1] > 0.6
    assert accuracies[1] > accuracies[0] - 0.05


def test_eps_and_kappa_go_up_and_down():
    ibp = IBP(0.4, kappa=0.5, warmup=0.2, ramp=0.5)
    assert [ibp.at(progress) for progress in (0.0, 0.2, 0.9, 1.0)] == [(0.0, 1.0), (0.0, 1.0), (0.4, 0.5), (0.4, 0.5)]
    assert ibp.at(0.45) == pytest.approx((0.2, 0.75))
    sudden = IBP(0.4, warmup=0.5, ramp=0.0)
    assert sudden.at(0.4) == (0.0, 1.0)
    assert sudden.at(0.5) == (0.4, 0.5)


@pytest.mark.parametrize(
    ("options", "given", "error", "message"),
    [
        ({"activation": "gelu"}, {}, ArgumentError, "IBP takes activations that rise everywhere, and gelu falls"),
        ({"activation": "prelu"}, {}, ArgumentError, "prelu has a slope that may turn negative; use relu"),
        ({}, {"y": np.eye(3)[LABELS]}, ArgumentError, "y: IBP takes class labels"),
        (
            {},
            {"adversarial": 0.1},
            fusemlp.ArgumentTypeError,
            r"adversarial: expected an attack such as PGD\(0.1\), or IBP\(0.1\), got 0.1",
        ),
    ],
)
def test_refusals_change_nothing(options, given, error, message):
    engine = make(**options)
    before = engine.state_dict()
    with pytest.raises(error, match=message):
        engine.fit(**{"X": X, "y": LABELS, "epochs": 1, "adversarial": IBP(0.1), **given})
    assert_same(engine.state_dict(), before)
    assert engine.epochs_trained == 0


def test_bad_numbers_are_refused():
    for given, message in [
        ({"eps": 0.0}, "eps: expected a finite number above 0, got 0.0"),
        ({"eps": 0.1, "kappa": 1.5}, "kappa: expected a finite number of at least 0 and at most 1, got 1.5"),
        ({"eps": 0.1, "bounds": (1, 0)}, r"bounds: expected \(low, high\) with low < high, got \(1, 0\)"),
    ]:
        with pytest.raises(ArgumentError, match=message):
            IBP(**given)
    with pytest.raises(TypeError, match="epsilon: there is no such argument; did you mean 'eps'"):
        IBP(epsilon=0.1)
