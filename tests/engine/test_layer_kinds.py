"""Networks with normalised layers, residual blocks and encoded inputs: training beside torch, files, descriptions."""

import copy
import pickle

import numpy as np
import pytest
import torch
from devices import GPU, INTERPRETER, places, usable
from torch import nn

import fusemlp
from fusemlp import (
    MLP,
    PGD,
    SGD,
    Adam,
    AdamW,
    ArgumentError,
    ArgumentTypeError,
    Engine,
    Fleet,
    Frequency,
    LayerNorm,
    Residual,
    RMSNorm,
)
from fusemlp.report.explanations import attributions
from fusemlp.runtime.inference import path_gradient
from fusemlp_kernels import pointwise
from fusemlp_kernels.errors import BackendUnavailableError
from make import assert_same_state

ROWS, WIDTH, CLASSES = 70, 5, 3
random = np.random.default_rng(0)
X, LABELS = random.normal(size=(ROWS, WIDTH)), random.integers(0, CLASSES, ROWS)
NETS = {
    "layer": MLP([WIDTH, 8, 7, CLASSES], norm="layer"),
    "rms": MLP([WIDTH, 8, 7, CLASSES], activation="silu", norm=RMSNorm(1e-3)),
    "residual": MLP([WIDTH, 8, Residual(12), Residual(6, 3), CLASSES], activation="tanh"),
    "both": MLP([WIDTH, 8, Residual(12), 9, Residual(6), CLASSES], activation="gelu", norm="layer"),
    "some": MLP(
        [WIDTH, 8, 6, Residual(7), CLASSES],
        activation=["relu", "silu", "tanh", "identity"],
        norm=["rms", None, LayerNorm(0.1), None],
    ),
}
ENCODED = {
    "waves": MLP([2, 12, 9, CLASSES], encoding=Frequency(4)),
    "waves and inputs": MLP([2, 12, CLASSES], activation="silu", encoding=Frequency(4, inputs=True)),
    "no hidden layer": MLP([2, CLASSES], encoding=Frequency(4)),
    "waves and blocks": MLP([2, 8, Residual(12), CLASSES], norm="layer", encoding=Frequency(4)),
}
ALL = {**NETS, **ENCODED}


class Skip(nn.Module):
    def __init__(self, *parts):
        super().__init__()
        self.inner = nn.Sequential(*parts)

    def forward(self, x):
        return x + self.inner(x)


class Waves(nn.Module):
    """The encoding, wave by wave."""

    def __init__(self, encoding):
        super().__init__()
        self.encoding = encoding

    def forward(self, x):
        parts = [x] if self.encoding.inputs else []
        for column in x.unbind(1):
            for octave in range(self.encoding.octaves):
                angle = torch.pi * 2.0**octave * column[:, None]
                parts += [angle.sin(), angle.cos()]
        return torch.cat(parts, 1)


def rows_of(net):
    return np.ascontiguousarray(X[:, : net.sizes[0]])


def in_torch(engine):
    """The network of an engine as a module of float64 with its parameters, and these by the engine's names."""
    net, state, ends = engine.network, engine.state_dict(), {first: last for first, last in engine.network.blocks}
    parts, parameters, layer = [] if net.encoding is None else [Waves(net.encoding)], {}, 0

    def named(module, prefix):
        for name, parameter in module.named_parameters():
            parameter.data.copy_(torch.from_numpy(state[f"{prefix}.{name}"]))
            parameters[f"{prefix}.{name}"] = parameter
        return module

    def layer_of(at):
        inputs, outputs, norm, activation = *net.widths[at : at + 2], net.norm(at), net.activations[at].name
        yield named(nn.Linear(inputs, outputs, dtype=torch.float64), 2 * at)
        if norm is not None:
            yield named(getattr(nn, norm.torch)(outputs, eps=norm.eps, dtype=torch.float64), f"{2 * at}_norm")
        if activation != "identity":
            yield getattr(nn, pointwise.ACTIVATIONS[activation].torch)()

    while layer < net.layers:
        end = ends.get(layer, layer)
        inner = [part for at in range(layer, end + 1) for part in layer_of(at)]
        parts += [Skip(*inner)] if layer in ends else inner
        layer = end + 1
    assert parameters.keys() == state.keys()
    return nn.Sequential(*parts), parameters


def trained_in_torch(engine, epochs, *, lr, clip=None, accumulate=1, frozen=(), attack=0.0):
    (module, parameters), data = in_torch(engine), (rows_of(engine.network), LABELS)
    optimizer = torch.optim.SGD([p for name, p in parameters.items() if name not in frozen], lr, momentum=0.9)
    count = 0
    for _ in range(epochs):
        for start in range(0, ROWS, 16):
            x, y = (torch.from_numpy(rows[start : start + 16]) for rows in data)
            if attack:
                leaf = x.clone().requires_grad_()
                (by_x,) = torch.autograd.grad(nn.functional.cross_entropy(module(leaf), y), leaf)
                x = x + attack * by_x.sign()
            (nn.functional.cross_entropy(module(x), y) / accumulate).backward()
            count += 1
            if count % accumulate == 0:
                if clip is not None:
                    nn.utils.clip_grad_norm_([p for name, p in parameters.items() if name not in frozen], clip)
                optimizer.step()
                optimizer.zero_grad()
    return {name: parameter.detach().numpy() for name, parameter in parameters.items()}


def engine_of(net, **options):
    return Engine(net, optimizer=options.pop("optimizer", SGD(0.02, momentum=0.9)), batch_size=16, backend="numpy",
                  **{"precision": "fp64", **options})  # fmt: skip


def assert_near(state, wanted, atol=1e-9):
    for name, value in state.items():
        np.testing.assert_allclose(value, wanted[name], rtol=0.0, atol=atol, err_msg=name)


@pytest.mark.parametrize("plan", ["eager", "resident"])
@pytest.mark.parametrize("name", ALL)
def test_two_hundred_steps_are_those_of_torch(name, plan):
    engine, rows = engine_of(ALL[name], plan=plan), rows_of(ALL[name])
    before, wanted = engine.state_dict(), trained_in_torch(engine, 40, lr=0.02)
    engine.fit(rows, LABELS, epochs=40, shuffle=False)
    assert_near(engine.state_dict(), wanted)
    for parameter, value in engine.state_dict().items():
        assert not np.allclose(value, before[parameter], atol=1e-4), parameter
    module, _ = in_torch(engine)
    np.testing.assert_allclose(engine.outputs(rows), module(torch.from_numpy(rows)).detach(), rtol=0.0, atol=1e-12)


@pytest.mark.parametrize("name", NETS)
@pytest.mark.parametrize(
    ("options", "rule", "fit"),
    [
        ({"clip": 0.3}, {"clip_norm": 0.3}, {}),
        ({"accumulate": 2}, {"accumulate": 2}, {}),
        ({"attack": 0.1}, {}, {"adversarial": fusemlp.FGSM(0.1)}),
    ],
    ids=["clip", "accumulate", "attack"],
)
def test_options_of_the_training(name, options, rule, fit):
    engine = engine_of(NETS[name], optimizer=SGD(0.02, momentum=0.9, **rule))
    wanted = trained_in_torch(engine, 4, lr=0.02, **options)
    engine.fit(X, LABELS, epochs=4, shuffle=False, **fit)
    assert_near(engine.state_dict(), wanted, 1e-10 if fit else 1e-12)


@pytest.mark.parametrize("name", ["both", "some"])
@pytest.mark.parametrize("kept", [slice(1), slice(3), slice(2, 5), slice(-3)])
def test_what_is_frozen_stays(name, kept):
    """All but some of the parameters are frozen: the lowest, those of one layer, those before the last ones."""
    engine = engine_of(NETS[name])
    frozen = set(engine.state_dict()) - {*list(engine.state_dict())[kept]}
    still = fusemlp.ParameterOptions(trainable=False)
    engine = engine_of(
        NETS[name], optimizer=SGD(0.02, momentum=0.9, per_parameter=dict.fromkeys(sorted(frozen), still))
    )
    before, wanted = engine.state_dict(), trained_in_torch(engine, 3, lr=0.02, frozen=frozen)
    engine.fit(X, LABELS, epochs=3, shuffle=False)
    assert_near(engine.state_dict(), wanted, 1e-12)
    for parameter in frozen:
        np.testing.assert_array_equal(engine.state_dict()[parameter], before[parameter])


@pytest.mark.parametrize("name", ALL)
def test_gradients_by_the_inputs(name):
    engine, rows = engine_of(ALL[name]), rows_of(ALL[name])
    module, leaf = in_torch(engine)[0], torch.tensor(rows, requires_grad=True)
    nn.functional.cross_entropy(module(leaf), torch.from_numpy(LABELS), reduction="sum").backward()
    np.testing.assert_allclose(engine.input_gradient(rows, LABELS), leaf.grad, rtol=0.0, atol=1e-12)
    # integrated gradients, which go from after the first product, or from the points before they are encoded
    seed, baseline = np.random.default_rng(1).normal(size=(ROWS, CLASSES)), np.ones_like(rows)
    points, weights = np.array([0.1, 0.4, 0.9]), np.array([0.2, 0.5, 0.3])
    total = torch.zeros_like(leaf)
    for point, weight in zip(points, weights, strict=True):
        leaf = torch.tensor(baseline + point * (rows - baseline), requires_grad=True)
        (weight * module(leaf) * torch.from_numpy(seed)).sum().backward()
        total += leaf.grad
    found = path_gradient(engine.inference.forward, rows, baseline, seed, points, weights)
    np.testing.assert_allclose(found, total, rtol=0.0, atol=1e-11)
    assert attributions(engine, rows[:4], output=1, steps=16).values.shape == (4, rows.shape[1])
    assert np.abs(engine.attack(rows, LABELS, PGD(0.1)) - rows).max() <= 0.1 + 1e-12


def with_dropout(net):
    dropout = [0.0 if layer in {last for _, last in net.blocks} else 0.3 for layer in range(net.layers - 1)]
    return MLP.from_config({**net.to_config(), "dropouts": [*dropout, 0.0]})


@pytest.mark.parametrize("name", NETS)
def test_plans_threads_dropout_and_averages_agree(name):
    """A batch of several tasks; what has dropout and an average beside has no rival in torch."""
    net = with_dropout(NETS[name])
    rows, labels = np.tile(X, (12, 1)), np.tile(LABELS, 12)
    states = []
    for plan in ("eager", "resident"):
        engine = Engine(
            net, optimizer=AdamW(0.01, ema=0.9), batch_size=400, backend="numpy", precision="fp64", plan=plan
        )
        engine.fit(rows, labels, epochs=4, sample_weight=np.linspace(0.5, 2.0, len(rows)))
        states.append(engine.state_dict())
    assert_near(*states, 1e-12)


OPTIMIZERS = {
    "both": SGD(0.1, momentum=0.5, weight_decay=0.01),
    "some": SGD(0.1, clip_norm=0.3, per_parameter={"0_norm.weight": fusemlp.ParameterOptions(trainable=False)}),
    "residual": SGD(0.1, accumulate=2),
}
# Two updates by up to 0.15 times a gradient of about 1. Its error is that of sums of up to 24 products, 14 units each,
# with a factor of ten for the layers that it goes through; under fp16 that of ten roundings on the way.
LIMITS = {"fp32": 2 * 0.15 * 10 * 14 * 2.0**-24, "fp16": 2 * 0.15 * 10 * 2.0**-11}


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("precision", LIMITS)
@pytest.mark.parametrize("device", places(INTERPRETER, GPU))
def test_cards_train_as_numpy_does(device, precision, name):
    x, labels, limit = X[:24].astype(np.float32), LABELS[:24], LIMITS[precision]
    options = {"optimizer": OPTIMIZERS[name], "batch_size": 16}
    fit = {"epochs": 1, "sample_weight": np.linspace(0.5, 2.0, 24)}
    rival = Engine(with_dropout(NETS[name]), backend="numpy", **options)
    rival.fit(x, labels, **fit)
    with usable(device):
        for plan in ("eager",) if device is INTERPRETER else ("eager", "graph"):
            engine = Engine(rival.network, backend=device.backend, plan=plan, precision=precision, **options)
            engine.fit(x, labels, **fit)
            assert_near(engine.state_dict(), rival.state_dict(), limit)
            np.testing.assert_allclose(engine.predict_proba(x), rival.predict_proba(x), rtol=0, atol=limit)
            by_x = [one.input_gradient(x[:5], labels[:5]) for one in (engine, rival)]
            np.testing.assert_allclose(*by_x, rtol=0, atol=10 * limit)
            parts = [attributions(one, x[:3], output=1, steps=4).values for one in (engine, rival)]
            np.testing.assert_allclose(*parts, rtol=0, atol=10 * limit)
        with pytest.raises(BackendUnavailableError, match=r"plan: .* without norm and residual blocks"):
            Engine(rival.network, backend=device.backend, plan="resident", **options)


def test_fp32_stays_near_fp64():
    """Four steps: each adds the rounding of sums of 12 products through 5 layers to parameters of about 1."""
    states = []
    for precision in ("fp32", "fp64"):
        engine = engine_of(NETS["both"], precision=precision)
        engine.fit(X[:64], LABELS[:64], epochs=1, shuffle=False)
        states.append(engine.state_dict())
    assert_near(*states, 4 * 5 * (2 * 12**0.5 + 4) * 2.0**-24)
    assert any((states[0][name] != value).any() for name, value in states[1].items())


@pytest.mark.parametrize("name", ["both", "rms", "residual", "waves"])
def test_models_of_a_fleet_are_those_trained_alone(name):
    net, machine = ALL[name], {"optimizer": Adam(0.01), "batch_size": 16, "backend": "numpy"}
    rows, fit = rows_of(net), {"epochs": 2, "validation_data": (rows_of(net)[:20], LABELS[:20])}
    fleet = Fleet(net, vary={"seed": [0, 3], "dropout": [0.0, 0.3]}, **machine)
    fleet.fit(rows, LABELS, **fit)
    for model in fleet.engines:
        assert model.network == net.but(dropout=model.network.dropouts[0])
        alone = Engine(model.network, seed=model.seed, **machine)
        alone.fit(rows, LABELS, **fit)
        assert_same_state(model, alone)


@pytest.mark.parametrize("name", ALL)
def test_files_and_copies(name, tmp_path):
    net, rows = ALL[name], rows_of(ALL[name])
    assert eval(repr(net)) == net == MLP.from_config(net.to_config()) == pickle.loads(pickle.dumps(net))
    assert net.parameter_count == sum(array.size for array in net.initial_parameters(0).values())
    engine = engine_of(net, optimizer=Adam(0.01, ema=0.9), normalise=True)
    engine.fit(rows, LABELS, epochs=2)
    engine.save(tmp_path / "net.safetensors")
    for other in (
        fusemlp.load(tmp_path / "net.safetensors"),
        pickle.loads(pickle.dumps(engine)),
        copy.deepcopy(engine),
    ):
        assert other.network == net
        assert_near(other.state_dict(), engine.state_dict(), 0.0)
        np.testing.assert_allclose(other.outputs(rows), engine.outputs(rows), rtol=1e-9, atol=1e-11)
    engine.save_checkpoint(tmp_path / "net.checkpoint")
    other = fusemlp.load_checkpoint(tmp_path / "net.checkpoint")
    for either in (engine, other):
        either.fit(rows, LABELS, epochs=1)
    assert_same_state(other, engine)


def test_plain_networks_are_described_as_before():
    assert MLP([3, 4, 2]).to_config().keys() == {"sizes", "activations", "dropouts", "init"}
    assert MLP([3, 4, 2], norm=[None]) == MLP([3, 4, 2])


def test_the_summary_tells_norms_and_blocks(capsys):
    NETS["both"].summary()
    text = capsys.readouterr().out
    assert "layer norm, gelu" in text
    assert "identity + input of layer 2" in text
    program = str(engine_of(NETS["both"]).program)
    assert "normalise layer gelu" in program
    assert "add input of layer 2" in program


@pytest.mark.parametrize(
    ("sizes", "options", "error", "words"),
    [
        ([5, Residual(8), 2], {}, ArgumentError, r"sizes\[1\]: a residual block stands behind a hidden layer"),
        ([5, 8, Residual(8)], {}, ArgumentError, r"sizes\[2\]: a residual block stands .* before the output layer"),
        ([5, 8, 2], {"norm": "batch"}, ArgumentError, "norm: unknown name 'batch'. Expected one of: layer, rms"),
        ([5, 8, 2], {"norm": "layr"}, ArgumentError, "norm: .*did you mean 'layer'"),
        ([5, 8, 2], {"norm": 3}, ArgumentTypeError, "norm: expected"),
        ([5, 8, 2], {"norm": ["layer", "layer"]}, ArgumentError, r"norm: expected one value, or 1"),
        ([5, 8, Residual(8), 2], {"norm": ["layer"] * 3}, ArgumentError, r"norm\[2\]: the last layer of a residual"),
        ([5, 8, Residual(8), 2], {"activation": ["relu"] * 3}, ArgumentError, r"activation\[2\]: the last layer"),
        ([5, 8, Residual(8), 2], {"dropout": [0.1] * 3}, ArgumentError, r"dropout\[2\]: the last layer"),
    ],
)
def test_refusals(sizes, options, error, words):
    with pytest.raises(error, match=words):
        MLP(sizes, **options)


@pytest.mark.parametrize(("argument", "value"), [("width", 0), ("depth", 1), ("width", "8"), ("depth", 2.5)])
def test_a_block_checks_its_sizes(argument, value):
    with pytest.raises((ArgumentError, ArgumentTypeError), match=argument):
        Residual(**{"width": 8, argument: value})


def test_norms_of_another_number_of_layers_are_refused():
    config = NETS["layer"].to_config()
    with pytest.raises(ArgumentError, match="norms: expected 3, one a layer, or none, got"):
        MLP.from_config({**config, "norms": config["norms"][:1]})


def test_forged_blocks_are_refused():
    config = NETS["residual"].to_config()
    for blocks in ([[1, 3]], [[5, 9]], [[0, 1]]):
        with pytest.raises((ArgumentError, IndexError)):
            MLP.from_config({**config, "blocks": blocks})
