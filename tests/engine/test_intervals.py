"""Bounds of outputs over boxes of inputs: against random points, attacks, torch, and their own roundings."""

import numpy as np
import pytest
import torch
from devices import INTERPRETER, STAND_IN, usable
from tolerance import ULPS, UNIT
from torch_oracle import TORCH_ACTIVATIONS, tensor

import fusemlp
from fusemlp import MLP, ArgumentError, ArgumentTypeError, Engine, PReLU, ShapeError
from fusemlp.runtime import attacks
from fusemlp_kernels import pointwise, reference

SELECTED = [fusemlp.LeakyReLU(0.2), PReLU(0.3), PReLU(-0.4)]
EVERY = [*(name for name in pointwise.ACTIVATIONS if name not in ("leaky_relu", "prelu")), *SELECTED]
POINTS = 10_000


def make(activation="relu", sizes=(5, 9, 8, 3), loss="mse", output="identity", **options):
    """Return an engine with weights of size one, and biases that are not zero."""
    net = MLP(sizes, activation=activation, init="torch", output_activation=output)
    engine = Engine(net, loss, **{"backend": "numpy", "seed": 3, "normalise": False, **options})
    state = engine.state_dict()
    engine.load_state_dict(state | {name: 2.5 * array for name, array in state.items() if array.size > 1})
    return engine


def points(rng, low, high):
    """Return random points of a box (K,), a third of them corners."""
    shares = rng.random((POINTS, len(low)))
    shares[: POINTS // 3] = shares[: POINTS // 3].round()
    return np.clip(low + shares * (high - low), low, high)


def exact(engine, x):
    """Return the outputs in float64, by the oracle."""
    state = {name: array.astype(np.float64) for name, array in engine.state_dict().items()}
    for layer, chosen in enumerate(engine.network.activations):
        slope = state.get(f"{2 * layer + 1}.weight", chosen.slope)
        x = reference.linear(x, state[f"{2 * layer}.weight"], state[f"{2 * layer}.bias"], chosen.name, slope)
    return x


@pytest.mark.parametrize("name", pointwise.ACTIVATIONS)
def test_an_activation_falls_up_to_its_turn_and_rises_after_it(name):
    # its error covers the budgets of all backends
    assert 2 * max(ULPS.values()) <= attacks.ACTIVATION_ERROR
    turn, slope = pointwise.ACTIVATIONS[name].turn, pointwise.ACTIVATIONS[name].slope or 0.0
    z = np.concatenate([np.linspace(-30.0, 30.0, 60_001), turn + np.array([-1e-7, 1e-7])])
    derivative = reference.activation_grad(name, z, slope)
    assert (derivative[z < turn] < 0.0).all()
    assert (derivative[z > turn] >= 0.0).all()
    if turn > -np.inf:
        # the second derivative is below one there
        assert abs(reference.activation_grad(name, np.array(turn), slope)) < 4 * UNIT["float64"]


@pytest.mark.parametrize("precision", ["fp32", "fp64"])
@pytest.mark.parametrize("activation", EVERY, ids=str)
def test_bounds_hold_in_every_point(activation, precision):
    rng = np.random.default_rng(5)
    engine = make(activation, output=activation, precision=precision)
    X = rng.normal(size=(4, 5)) * [[0.3], [1.0], [1.0], [30.0]]
    eps = np.array([[0.3, 0.0, 0.05, 2.0, 0.1], [0.0] * 5, [1e-3] * 5, [0.5] * 5])
    for x, radius in zip(X, eps, strict=True):
        low, high = engine.bounds(x[None], radius)
        inside = points(rng, x - radius, x + radius)
        for outputs in (engine.outputs(inside), exact(engine, inside)):
            assert ((low <= outputs) & (outputs <= high)).all()
        if not radius.any():
            # rounding alone: (K + 2) u a layer, and what a layer makes of the errors before it
            scale = max(1.0, float(np.abs(x).max()))
            assert (high - low).max() < 3e4 * scale * UNIT["float32" if precision == "fp32" else "float64"]


@pytest.mark.parametrize(
    ("device", "precision"), [(INTERPRETER, "fp32"), (INTERPRETER, "fp16"), (STAND_IN, "fp32"), (STAND_IN, "fp16")]
)
def test_bounds_hold_for_what_other_backends_compute(device, precision):
    rng = np.random.default_rng(12)
    with usable(device):
        for activation, last in (("gelu", "sigmoid"), ("identity", "identity")):
            engine = make(activation, output=last, precision=precision, backend=device.backend)
            x, eps = rng.normal(size=5), 0.01
            for radius in (eps, 0.0):
                low, high = engine.bounds(x[None], radius)
                outputs = engine.outputs(rng.uniform(x - radius, x + radius, (64, 5)))
                assert ((low <= outputs) & (outputs <= high)).all()
            # rounding alone
            assert (high - low).max() < (0.5 if precision == "fp16" else 2e-3)


def test_margins_have_the_rounding_of_both_outputs():
    rng = np.random.default_rng(13)
    engine = make(sizes=(300, 4), loss="cross_entropy")
    X = rng.normal(size=(30, 300))
    found = attacks.Propagation(engine)
    low, high = engine.bounds(X, 0.0)
    box = next(found._blocks(*attacks.ball(engine, X, 0.0)))
    for label in range(4):
        margins = found._margins(found.layers[-1], *box, label)
        others = np.arange(4) != label
        # rounding is all there is, and it is a part of 1e-4 of the outputs
        apart = low[:, label, None] - high
        np.testing.assert_allclose(margins[:, others], apart[:, others], rtol=0, atol=1e-5)
        assert (high - low).min() > 4e-5


def torch_bounds(engine, low, high):
    """Return interval bounds by torch, in float64, as in the paper of Gowal and others."""
    state = engine.state_dict()
    low, high = tensor(low), tensor(high)
    for layer, chosen in enumerate(engine.network.activations):
        w, b = tensor(state[f"{2 * layer}.weight"]), tensor(state[f"{2 * layer}.bias"])
        middle, spread = (low + high) / 2 @ w.T + b, (high - low) / 2 @ w.abs().T
        low, high = middle - spread, middle + spread
        slope = state.get(f"{2 * layer + 1}.weight", [chosen.slope])[0]
        ends = [TORCH_ACTIVATIONS[chosen.name](z, slope) for z in (low, high)]
        turn = 0.0 if slope < 0 else pointwise.ACTIVATIONS[chosen.name].turn
        least = torch.minimum(*ends)
        if turn > -np.inf:
            bottom = TORCH_ACTIVATIONS[chosen.name](tensor(turn), slope)
            least = torch.where((low < turn) & (turn < high), bottom, least)
        low, high = least, torch.maximum(*ends)
    return low.numpy(), high.numpy()


@pytest.mark.parametrize("activation", EVERY, ids=str)
def test_bounds_are_those_of_torch_and_their_rounding(activation):
    rng = np.random.default_rng(6)
    engine = make(activation, precision="fp64")
    X, eps = rng.normal(size=(50, 5)), 0.2
    low, high = engine.bounds(X, eps)
    least, most = torch_bounds(engine, X - eps, X + eps)
    # each layer widens by (5 K + 26) u of sums below 50, and carries the errors on by at most 10
    room = 1e5 * UNIT["float64"]
    assert ((low <= least + room / 100) & (least - room <= low)).all()
    assert ((high >= most - room / 100) & (most + room >= high)).all()


def test_without_the_rounding_errors_bounds_do_not_hold(monkeypatch):
    rng = np.random.default_rng(7)
    engine = make(sizes=(40, 60, 60, 3))
    X = rng.normal(size=(500, 40)).astype(np.float32).astype(np.float64)

    def hold():
        low, high = attacks.Propagation(engine).outputs(X, X)
        outputs = engine.outputs(X)
        return bool(((low <= outputs) & (outputs <= high)).all())

    assert hold()
    monkeypatch.setattr(attacks.Propagation, "_error", lambda self, layer, centre, radius, size: 0.0 * size)
    monkeypatch.setattr(attacks, "_widened", lambda low, high, relative, tiny: (low, high))
    assert not hold()


def test_the_average_of_the_parameters_and_the_scale_of_the_inputs_are_those_of_predictions():
    rng = np.random.default_rng(8)
    X = rng.normal(size=(200, 5)) * [1.0, 10.0, 0.1, 1.0, 1.0] + [0.0, 50.0, 0.0, -3.0, 0.0]
    engine = make("tanh", optimizer=fusemlp.Adam(lr=0.05, ema=0.9), normalise=True, precision="fp32")
    engine.fit(X, X[:, :3] / 10, epochs=2)
    eps = np.array([0.1, 1.0, 0.01, 0.1, 0.0]) / 100
    for x in X[:5]:
        low, high = engine.bounds(x[None], eps)
        outputs = engine.outputs(points(rng, x - eps, x + eps))
        assert ((low <= outputs) & (outputs <= high)).all()
        assert (high - low).max() < 0.05
    raw = engine.memory.tensors()
    assert max(np.abs(raw[name] - array).max() for name, array in engine.memory.evaluated_tensors().items()) > 0.05


def trained(seed=0, **options):
    """Return a classifier of three clouds, and its rows."""
    rng = np.random.default_rng(seed)
    y = rng.integers(0, 3, 300)
    X = rng.normal(size=(300, 4)) * 0.6 + np.eye(3, 4)[y] * 2.0
    engine = Engine(MLP([4, 16, 16, 3], **options), optimizer=fusemlp.SGD(lr=0.1), backend="numpy", seed=seed)
    engine.fit(X, y, epochs=15)
    return engine, X, y


def attacked(engine, X, y, eps):
    """Return whether each row is predicted right at all steps of projected gradient ascent."""
    low, high, x = X - eps, X + eps, X.copy()
    right = engine.predict(x) == y
    for _ in range(20):
        x = np.clip(x + eps / 4 * np.sign(engine.input_gradient(x, y)), low, high)
        right &= engine.predict(x) == y
    return right


@pytest.mark.parametrize("activation", ["relu", "gelu"])
def test_no_attack_moves_a_certified_row(activation):
    engine, X, y = trained(activation=activation)
    clean = engine.predict(X) == y
    shares = []
    for eps in (0.0, 0.05, 0.1, 0.2):
        certified, robust = engine.certified(X, y, eps), attacked(engine, X, y, eps)
        assert not (certified & ~robust).any()
        assert not (robust & ~clean).any()
        shares.append(certified.mean())
    assert shares[0] == clean.mean()
    assert shares[0] > shares[1] > shares[2] > shares[3] > 0.0


def test_margins_of_the_last_layer_certify_more_than_bounds_of_its_outputs():
    engine, X, y = trained()
    low, high = engine.bounds(X, 0.1)
    own = low[np.arange(len(y)), y]
    high[np.arange(len(y)), y] = -np.inf
    apart, merged = own > high.max(axis=1), engine.certified(X, y, 0.1)
    assert not (apart & ~merged).any()
    assert merged.sum() > apart.sum()
    # by hand, from the box before the last layer
    state = engine.state_dict()
    hidden = Engine(MLP([4, 16, 16], output_activation="relu"), "mse", backend="numpy")
    hidden.load_state_dict({name: state[name] for name in hidden.state_dict()})
    low, high = hidden.bounds(X, 0.1)
    w, b = (state[f"4.{name}"].astype(np.float64) for name in ("weight", "bias"))
    least = np.full(len(y), np.inf)
    for other in range(3):
        d = w[y] - w[other]
        margin = (np.maximum(d, 0.0) * low + np.minimum(d, 0.0) * high).sum(axis=1) + b[y] - b[other]
        least = np.where(other == y, least, np.minimum(least, margin))
    assert (np.abs(least) > 1e-4).all()
    assert np.array_equal(merged, least > 0.0)


def test_bounds_of_the_inputs_make_the_box_smaller():
    engine, X, y = trained()
    X = np.clip(X, -1.0, 2.0)
    low, high = engine.bounds(X, 0.3, bounds=(-1.0, [2.0, 2.0, 2.0, 2.0]))
    wide_low, wide_high = engine.bounds(X, 0.3)
    assert ((wide_low <= low) & (high <= wide_high)).all()
    assert (wide_low < low).any()
    assert engine.certified(X, y, 0.3, bounds=(-1, 2)).sum() > engine.certified(X, y, 0.3).sum()


def test_what_counts_as_certified_by_loss():
    rng = np.random.default_rng(9)
    X = rng.normal(size=(60, 5))
    # one logit
    engine = make(sizes=(5, 8, 1), loss="binary_cross_entropy")
    y = (engine.outputs(X)[:, 0] > 0).astype(int)
    assert engine.certified(X, y, 0.0).all()
    assert not engine.certified(X, 1 - y, 0.0).any()
    low, high = engine.bounds(X, 0.1)
    assert np.array_equal(engine.certified(X, y, 0.1), np.where(y == 1, low[:, 0] > 0, high[:, 0] <= 0))
    # labels
    engine = make(loss="binary_cross_entropy")
    y = (engine.outputs(X) > 0).astype(int)
    assert engine.certified(X, y, 0.0).shape == (60, 3)
    assert engine.certified(X, y, 0.0).all()
    # one-hot rows, with an output activation
    engine = make(output="tanh")
    labels = engine.outputs(X).argmax(axis=1)
    certified = engine.certified(X, np.eye(3)[labels], 0.05)
    assert 0 < certified.sum() < 60
    assert engine.certified(X, np.eye(3)[labels], 0.0).mean() > 0.9
    # an ignored class
    engine = make(loss=fusemlp.CrossEntropy(ignore_index=-1))
    labels = engine.predict(X)
    labels[::2] = -1
    assert np.array_equal(engine.certified(X, labels, 0.0), labels >= 0)


@pytest.mark.parametrize(("loss", "y"), [("mse", np.ones((2, 3))), ("cross_entropy", np.full((2, 3), 1 / 3))])
def test_numbers_and_probabilities_are_not_certified(loss, y):
    with pytest.raises(ArgumentError, match="y: certified predictions are those of classes, and y holds"):
        make(loss=loss).certified(np.zeros((2, 5)), y, 0.1)


def test_sums_that_may_overflow_have_no_bounds():
    engine = make("softplus")
    low, high = engine.bounds(np.full((1, 5), 1e38), 1e30)
    assert (low == -np.inf).all()
    assert (high == np.inf).all()
    state = engine.state_dict()
    state["2.weight"][0, 0] = 1e30
    engine.load_state_dict(state)
    low, high = engine.bounds(np.zeros((1, 5)), 1e10)
    assert (low == -np.inf).all()
    engine = make(loss="cross_entropy")
    assert not engine.certified(np.full((1, 5), 1e38), [0], 1e30).any()


def test_blocks_of_rows_are_bounded_alike(monkeypatch):
    engine, X, y = trained()
    whole, certified = engine.bounds(X, 0.1), engine.certified(X, y, 0.1)
    monkeypatch.setattr(attacks, "LARGEST", 16 * 17)
    assert attacks.Propagation(engine).rows == 17
    for one, other in zip(engine.bounds(X, 0.1), whole, strict=True):
        assert np.allclose(one, other, rtol=1e-12, atol=1e-12)
    assert np.array_equal(engine.certified(X, y, 0.1), certified)


@pytest.mark.parametrize("output", ["identity", "tanh"])
@pytest.mark.parametrize("sizes", [(4, 10), (4, 3, 10), (4, 10, 3), (4, 8, 2, 7)], ids=str)
def test_layers_narrower_than_the_classes_are_certified(sizes, output, monkeypatch):
    rng = np.random.default_rng(21)
    engine = make(sizes=sizes, output=output, loss="cross_entropy" if output == "identity" else "mse")
    X, eps = rng.normal(size=(40, 4)), 0.003
    outputs = engine.outputs(X)
    y = outputs.argmax(axis=1)
    box = attacks.ball(engine, X, eps)
    certified = attacks.Propagation(engine).certified(*box, y)
    assert certified.mean() > 0.5
    # no point of a certified box has another class, and no other class is certified
    moved = X + rng.uniform(-eps, eps, (200, *X.shape))
    classes = engine.outputs(moved.reshape(-1, 4)).argmax(axis=1).reshape(200, -1)
    assert (classes == y)[:, certified].all()
    assert not attacks.Propagation(engine).certified(*box, (y + 1) % sizes[-1]).any()
    # in blocks of rows
    monkeypatch.setattr(attacks, "LARGEST", 1)
    assert attacks.Propagation(engine).rows == 16
    assert np.array_equal(attacks.Propagation(engine).certified(*box, y), certified)


def test_the_possible_inputs_may_be_an_array():
    engine, X, _ = trained()
    for limits in (np.array([X.min(), X.max()]), np.stack([X.min(axis=0), X.max(axis=0)])):
        ways = (engine.bounds(X, 0.1, bounds=given) for given in (limits, tuple(limits)))
        np.testing.assert_array_equal(*ways)


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ({"eps": -0.1}, ArgumentError, "eps: expected a finite number of at least 0, got -0.1"),
        ({"eps": "0.1"}, ArgumentTypeError, "eps: expected a finite number of at least 0, got '0.1'"),
        ({"eps": [0.1, 0.2]}, ShapeError, r"eps: expected a number, or 5, one for each column, got shape \(2,\)"),
        ({"eps": [0.1, 0.2, 0.0, 0.0, np.nan]}, ArgumentError, "eps: expected finite numbers of at least 0"),
        ({"bounds": 1.0}, ArgumentTypeError, r"bounds: expected the least and the greatest input, \(0, 1\), got 1.0"),
        ({"bounds": (1, 0)}, ArgumentError, "bounds: the least input is above the greatest one"),
        ({"bounds": (0.5, 1)}, fusemlp.DataError, "X: 0 at row 0, column 0 is outside the bounds; give wider ones"),
        ({"bounds": (0, [1, 1])}, ShapeError, r"bounds\[1\]: expected a number, or 5, one for each column"),
        ({"X": np.zeros((2, 4))}, ShapeError, "X: expected"),
    ],
)
def test_bad_arguments(given, error, message):
    with pytest.raises(error, match=message):
        make().bounds(**{"X": np.zeros((2, 5)), "eps": 0.1, **given})
