"""Every door of an engine on normalised layers, residual blocks and encoded inputs."""

import numpy as np
import pytest
import torch
from devices import GPU, INTERPRETER, places, usable
from test_layer_kinds import CLASSES, ENCODED, LABELS, X
from torch import nn

from fusemlp import (
    FGSM,
    MLP,
    SGD,
    Adam,
    ArgumentError,
    ArgumentTypeError,
    Columns,
    Engine,
    Fleet,
    Frequency,
    ParameterOptions,
    Residual,
    RMSNorm,
    ShapeError,
)
from fusemlp.fleet.results import default_models, members, merged
from fusemlp.runtime.plans import planned
from fusemlp.torch import from_torch, fuse, to_torch

# Blocks of the layers 1 and 2 and of the layers 4 to 6, counted from 0.
SIZES = [5, 8, Residual(12), 6, Residual(7, 3), 3]
MACHINE = {"batch_size": 16, "precision": "fp64", "backend": "numpy"}
# Two computations of the same doubles.
CLOSE = {"rtol": 1e-9, "atol": 1e-11}
POINTS = np.random.default_rng(1).uniform(-1.0, 1.0, (len(X), 2))
WAVES = ENCODED["waves"]


@pytest.fixture(params=["layer", "rms", None])
def net(request):
    return MLP(SIZES, norm=request.param, activation="silu")


@pytest.fixture
def engine(net):
    trained = Engine(net, "cross_entropy", Adam(0.01, ema=0.9), normalise=True, **MACHINE)
    trained.fit(X, LABELS, epochs=3)
    return trained


def assert_close(found, expected):
    found, expected = (one.detach() if isinstance(one, torch.Tensor) else one for one in (found, expected))
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


def test_dead_units():
    engine = Engine(MLP(SIZES, norm="layer"), **MACHINE)
    state = engine.state_dict()
    state["2_norm.bias"][:4] = -1e3
    engine.load_state_dict(state)
    dead = engine.dead_units(X)
    assert list(dead) == ["layer 1", "layer 2", "layer 4", "layer 5", "layer 6"]
    assert dead["layer 2"] == 4 / 12


def test_nets_of_a_fleet_of_other_widths():
    fleet = Fleet(MLP([5, 8, 3], norm="rms"), vary={"hidden": [(4,), (6, 6)]}, **MACHINE)
    assert [model.network.norms for model in fleet.engines] == [
        MLP([5, *hidden, 3], norm="rms").norms for hidden in ((4,), (6, 6))
    ]
    fleet = Fleet(WAVES, vary={"hidden": [(7,)]}, **MACHINE)
    assert fleet.engines[0].network.encoding == WAVES.encoding
    with pytest.raises(ArgumentError, match=r"hidden: \(4,\) cannot replace the widths of residual blocks; vary"):
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


@pytest.mark.parametrize("place", places(INTERPRETER, GPU))
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_triton_trains_as_numpy(place, precision):
    """The launches of a graph, one by one; in 16 bits, coordinates keep what tells two of them apart."""
    with usable(place):
        net = MLP([2, 12, CLASSES], encoding=Frequency(8))
        rows = POINTS.astype(np.float32)
        engines = [
            Engine(net, optimizer=SGD(0.1), batch_size=16, backend=name, plan="eager", precision=kind)
            for name, kind in (("triton", precision), ("numpy", "fp32"))
        ]
        for engine in engines:
            engine.fit(rows[:40], LABELS[:40], epochs=2, validation_data=(rows[40:], LABELS[40:]))
            engine.step(rows[:16], LABELS[:16])
        found, wanted = (engine.state_dict() for engine in engines)
        # of float16 the 11 digits of each factor; such coordinates would be off by a tenth of the fastest wave
        tolerance = 3e-6 if precision == "fp32" else 0.02
        for name, value in wanted.items():
            np.testing.assert_allclose(found[name], value, rtol=0.0, atol=tolerance, err_msg=name)
        gradients = [engine.input_gradient(rows, LABELS) for engine in engines]
        np.testing.assert_allclose(*gradients, rtol=0.0, atol=1e-3 * tolerance / 3e-6 * np.abs(gradients[1]).max())


def test_members_share_the_waves():
    net = MLP([2, 12, CLASSES], encoding=Frequency(4), members=3)
    engine = Engine(net, normalise=True, **MACHINE)
    engine.fit(POINTS, LABELS, epochs=3)
    parts = members(engine)
    assert all(part.network.encoding == net.encoding for part in parts)
    probabilities = np.mean([part.predict_proba(POINTS) for part in parts], axis=0)
    np.testing.assert_allclose(engine.predict_proba(POINTS), probabilities, rtol=0.0, atol=1e-12)


def test_merged_models_take_the_points():
    fleet = Fleet(WAVES, vary={"seed": [0, 1]}, **MACHINE)
    fleet.fit(POINTS, LABELS, epochs=2)
    engines = fleet.engines
    whole = merged(engines)
    assert_close(whole.outputs(POINTS), np.mean([engine.outputs(POINTS) for engine in engines], axis=0))
    assert_close(members(whole)[1].outputs(POINTS), engines[1].outputs(POINTS))


def test_configurations_of_other_releases():
    net = ENCODED["waves and inputs"]
    assert net.to_config()["encoding"] == {"kind": "frequency", "octaves": 4, "inputs": True}
    plain = MLP([2, 3])
    assert "encoding" not in plain.to_config()
    assert net.but(dropout=0.5).encoding == net.encoding
    assert (net.sizes, net.widths, plain.widths) == ((2, 12, 3), (18, 12, 3), (2, 3))
    assert net.parameter_shapes()["0.weight"] == (12, 18)


@pytest.mark.parametrize("name", ENCODED)
def test_torch_there_and_back(name):
    engine = Engine(ENCODED[name], optimizer=Adam(0.01), **MACHINE)
    module = to_torch(engine)
    assert_close(engine.outputs(POINTS), module(torch.from_numpy(POINTS)))
    again = from_torch(module, nn.CrossEntropyLoss())
    assert again.network == engine.network.but(init="torch")
    assert_close(again.outputs(POINTS), engine.outputs(POINTS))
    step = fuse(module, nn.CrossEntropyLoss(), torch.optim.Adam(module.parameters(), 0.01), backend="numpy")
    for _ in range(3):
        step(torch.from_numpy(POINTS[:16]), torch.from_numpy(LABELS[:16]))
        engine.step(POINTS[:16], LABELS[:16])
    assert_close(module(torch.from_numpy(POINTS)), engine.outputs(POINTS))


def test_transfer_and_probes():
    engine = Engine(WAVES, **MACHINE)
    other = Engine.from_pretrained(engine, head=5, precision="fp64", backend="numpy")
    assert other.network.encoding == engine.network.encoding
    assert_close(other.inference.outputs_of(POINTS, 2), engine.inference.outputs_of(POINTS, 2))
    first = engine.state_dict()
    engine.probe(POINTS, LABELS, layers=1, epochs=1)
    after = engine.state_dict()
    np.testing.assert_array_equal(after["0.weight"], first["0.weight"])
    assert not np.array_equal(after["2.weight"], first["2.weight"])


def test_the_program_begins_with_the_waves():
    program, plan = planned(WAVES, backend="triton", precision="bf16")
    first, second = program.calls[:2]
    assert (first.op, first.label, first.operands["octaves"]) == ("encode", "frequency 4", 4)
    assert [program.values[name].dtype for name in ("x", "waves")] == ["real", "compute"]
    assert second.products == ((32, 12, 16),)
    assert not any("x" in call.reads for call in program.calls[1:])
    assert plan == ("graph", "the triton backend's resident kernel trains without encoded inputs")


def test_what_cannot_be_encoded():
    for value in (0, 33, 2.5):
        with pytest.raises((ArgumentError, ArgumentTypeError), match="octaves: expected a whole number"):
            Frequency(value)
    with pytest.raises(ArgumentTypeError, match=r"encoding: expected an object such as Frequency\(10\)"):
        MLP([2, 3], encoding=10)
    engine = Engine(WAVES, **MACHINE)
    columns = Columns.of(words=np.arange(8)[:, None] % 2, levels=[2])
    with pytest.raises(ArgumentError, match="encoding: waves of coded columns tell 0 from 1 and no more"):
        engine.fit(columns, LABELS[: len(columns)], epochs=1)
    module = nn.Sequential(to_torch(engine).encoding, nn.Linear(9, 3))
    with pytest.raises(ArgumentError, match="takes 9 features, expected 8 waves of each input"):
        from_torch(module)
