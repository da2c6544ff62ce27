"""Every door of an engine beside torch, or beside the engine alone, on normalised layers and residual blocks."""

import numpy as np
import pytest
import torch

from fusemlp import (
    FGSM,
    MLP,
    PGD,
    SGD,
    Adam,
    ArgumentError,
    Engine,
    Fleet,
    ParameterOptions,
    Residual,
    RMSNorm,
    ShapeError,
)
from fusemlp.fleet.merge import default_models, merged
from fusemlp.runtime.inference import path_gradient
from fusemlp.torch import to_torch

ROWS = 50
X = np.random.default_rng(0).normal(size=(ROWS, 5))
LABELS = np.arange(ROWS) % 3
# Blocks of the layers 1 and 2 and of the layers 4 to 6, counted from 0.
SIZES = [5, 8, Residual(12), 6, Residual(7, 3), 3]
MACHINE = {"batch_size": 16, "precision": "fp64", "backend": "numpy"}
# Two computations of the same doubles.
CLOSE = {"rtol": 1e-9, "atol": 1e-11}


@pytest.fixture(params=["layer", "rms", None])
def net(request):
    return MLP(SIZES, norm=request.param, activation="silu")


@pytest.fixture
def engine(net):
    trained = Engine(net, "cross_entropy", Adam(0.01, ema=0.9), normalise=True, **MACHINE)
    trained.fit(X, LABELS, epochs=3)
    return trained


def assert_close(found, expected):
    expected = expected.detach().numpy() if isinstance(expected, torch.Tensor) else expected
    np.testing.assert_allclose(found, expected, **CLOSE)


def input_of(module, layer):
    """Return the input of a layer's Linear for X."""
    seen = []
    handle = module._modules[str(2 * layer)].register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    module(torch.from_numpy(X))
    handle.remove()
    return seen[0]


def test_outputs_of_hidden_layers(engine):
    module = to_torch(engine)
    for layers in range(1, engine.network.layers):
        assert_close(engine.inference.outputs_of(X, layers), input_of(module, layers))


def test_gradients_by_the_inputs(engine):
    module, x = to_torch(engine), torch.tensor(X, requires_grad=True)
    torch.nn.functional.cross_entropy(module(x), torch.from_numpy(LABELS), reduction="sum").backward()
    assert_close(engine.input_gradient(X, LABELS), x.grad)
    seed, baseline = np.random.default_rng(1).normal(size=(ROWS, 3)), np.ones_like(X)
    points, weights = np.array([0.1, 0.4, 0.9]), np.array([0.2, 0.5, 0.3])
    total = torch.zeros_like(x)
    for point, weight in zip(points, weights, strict=True):
        x = torch.tensor(baseline + point * (X - baseline), requires_grad=True)
        (weight * module(x) * torch.from_numpy(seed)).sum().backward()
        total += x.grad
    assert_close(path_gradient(engine.inference.forward, X, baseline, seed, points, weights), total)
    assert np.abs(engine.attack(X, LABELS, PGD(0.1)) - X).max() <= 0.1 + 1e-12


def test_dead_units():
    engine = Engine(MLP(SIZES, norm="layer"), **MACHINE)
    state = engine.state_dict()
    state["2_norm.bias"][:4] = -1e3
    engine.load_state_dict(state)
    dead = engine.dead_units(X)
    assert list(dead) == ["layer 1", "layer 2", "layer 4", "layer 5", "layer 6"]
    assert dead["layer 2"] == 4 / 12


def test_a_fleet_trains_as_its_models_alone(net):
    fit = {"epochs": 2, "validation_data": (X[:20], LABELS[:20])}
    fleet = Fleet(net, optimizer=Adam(0.01), vary={"seed": [0, 1], "dropout": [0.0, 0.3]}, **MACHINE)
    fleet.fit(X, LABELS, **fit)
    for model in fleet.engines:
        assert model.network == net.but(dropout=model.network.dropouts[0])
        alone = Engine(model.network, optimizer=model.optimizer, seed=model.seed, **MACHINE)
        alone.fit(X, LABELS, **fit)
        assert_close(model.outputs(X), alone.outputs(X))
        assert_close(model.history.history["val_loss"], alone.history.history["val_loss"])


def test_nets_of_a_fleet_of_other_widths():
    fleet = Fleet(MLP([5, 8, 3], norm="rms"), vary={"hidden": [(4,), (6, 6)]}, **MACHINE)
    assert [model.network.norms for model in fleet.engines] == [
        MLP([5, *hidden, 3], norm="rms").norms for hidden in ((4,), (6, 6))
    ]
    with pytest.raises(ArgumentError, match="hidden: expected a network without residual blocks"):
        Fleet(MLP(SIZES), vary={"hidden": [(4,), (6, 6)]}, **MACHINE)


def test_models_that_cannot_be_merged(net):
    assert default_models(1000, net) == 1 < default_models(1000, MLP([5, 8, 3]))
    what = "normalised layers" if net.norms else "residual blocks"
    with pytest.raises(ArgumentError, match=f"models: 2 networks with {what} cannot be merged; train a single model"):
        merged([Engine(net, **MACHINE) for _ in range(2)])


@pytest.mark.parametrize("options", [{}, {"head": 4}, {"head": [9, 4]}, {"head": 4, "layers": 3}, {"layers": 4}])
def test_transfer_keeps_the_first_layers(options, engine):
    other = Engine.from_pretrained(engine, precision="fp64", backend="numpy", **options)
    kept = options.get("layers", engine.network.layers - 1)
    assert other.network.norms[:kept] == engine.network.norms[:kept]
    assert_close(other.inference.outputs_of(X, kept), engine.inference.outputs_of(X, kept))
    if options == {"head": [9, 4]}:
        # as the last layer with an activation
        assert other.network.activations[-2] == engine.network.activations[0]
        assert other.network.norm(7) == engine.network.norm(0)


def test_a_residual_block_stays_whole(engine):
    for layers, head in ((2, 4), (5, 4), (6, 4)):
        with pytest.raises(ArgumentError, match=rf"layers: {layers} cuts the residual block of layers"):
            Engine.from_pretrained(engine, head=head, layers=layers)
    for layers in (1, 2, 4, 5, 6):
        with pytest.raises(ArgumentError, match=rf"layers: {layers} cuts the residual block of layers"):
            engine.probe(X, LABELS, layers=layers, epochs=1)


def test_a_probe_trains_the_last_layers(net):
    engine = Engine(net, optimizer=SGD(0.1), **MACHINE)
    before = engine.state_dict()
    engine.probe(X, LABELS, layers=3, epochs=1)
    after, by_hand = engine.state_dict(), Engine(net, optimizer=frozen(net, 3), **MACHINE)
    by_hand.load_state_dict(before)
    by_hand.fit(X, LABELS, epochs=1)
    for name, array in by_hand.state_dict().items():
        assert_close(after[name], array)


def frozen(net, layers):
    names = [name for name in net.parameter_shapes() if int(name.split(".")[0].split("_")[0]) < 2 * layers]
    return SGD(0.1, per_parameter={name: ParameterOptions(trainable=False) for name in names})


@pytest.mark.parametrize("norm", [torch.nn.LayerNorm, torch.nn.RMSNorm])
def test_parameters_of_a_torch_module(norm):
    module = torch.nn.Sequential(torch.nn.Linear(5, 8), norm(8), torch.nn.ReLU(), torch.nn.Linear(8, 3)).double()
    with torch.no_grad():
        module[1].weight.normal_()
    net = MLP([5, 8, 3], norm="layer" if norm is torch.nn.LayerNorm else RMSNorm(2.0**-52))
    engine = Engine.from_pretrained(module.state_dict(), net=net, precision="fp64", backend="numpy")
    assert_close(engine.outputs(X), module(torch.from_numpy(X)))
    with pytest.raises((ArgumentError, ShapeError), match=r"lacks 0_norm\..*; give .* and its norm, 'layer' or 'rms'"):
        Engine.from_pretrained(module.state_dict(), net=MLP([5, 8, 3]))


def test_options_of_parameters(net):
    patterns = {"*_norm.*": ParameterOptions(trainable=False)} if net.norms else {}
    optimizer = SGD(0.1, weight_decay=0.5, decay_biases=False, per_parameter=patterns)
    engine = Engine(net, optimizer=optimizer, **MACHINE)
    before = engine.state_dict()
    engine.fit(X, LABELS, epochs=1, adversarial=FGSM(0.1))
    changed = {name for name, array in engine.state_dict().items() if not np.array_equal(array, before[name])}
    assert changed == {name for name in before if "_norm" not in name}


def test_weight_decay_spares_norms_with_the_biases():
    state = {}
    for decays in (0.0, 0.5):
        optimizer = SGD(0.1, weight_decay=decays, decay_biases=False)
        engine = Engine(MLP([5, 8, 3], norm="layer"), optimizer=optimizer, **MACHINE)
        engine.step(X[:16], LABELS[:16])
        state[decays] = engine.state_dict()
    same = {name for name, array in state[0.0].items() if np.array_equal(array, state[0.5][name])}
    assert same == {"0.bias", "0_norm.weight", "0_norm.bias", "2.bias"}
