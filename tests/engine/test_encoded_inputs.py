"""Networks of encoded inputs: training beside torch, gradients by the inputs, every door of an engine, refusals."""

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
    ArgumentError,
    ArgumentTypeError,
    Columns,
    Engine,
    Fleet,
    Frequency,
    Residual,
)
from fusemlp.fleet.merge import members, merged
from fusemlp.report.explanations import attributions
from fusemlp.runtime.inference import path_gradient
from fusemlp.runtime.plans import planned
from fusemlp.torch import from_torch, fuse, to_torch
from fusemlp_kernels.errors import BackendUnavailableError

ROWS, CLASSES, OCTAVES = 70, 3, 4
random = np.random.default_rng(0)
X, LABELS = random.uniform(-1.0, 1.0, (ROWS, 2)), random.integers(0, CLASSES, ROWS)
NETS = {
    "plain": MLP([2, 12, 9, CLASSES], encoding=Frequency(OCTAVES)),
    "inputs": MLP([2, 12, CLASSES], activation="silu", encoding=Frequency(OCTAVES, inputs=True)),
    "no hidden": MLP([2, CLASSES], encoding=Frequency(OCTAVES)),
    "blocks": MLP([2, 8, Residual(12), CLASSES], norm="layer", encoding=Frequency(OCTAVES)),
}
MACHINE = {"batch_size": 16, "precision": "fp64", "backend": "numpy"}
CLOSE = {"rtol": 1e-9, "atol": 1e-11}


class ByHand(nn.Module):
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


def in_torch(engine):
    """The network of an engine as a module whose encoding is written by hand."""
    module = to_torch(engine)
    module.encoding = ByHand(engine.network.encoding)
    return module


def engine_of(net, **options):
    return Engine(net, optimizer=options.pop("optimizer", SGD(0.02, momentum=0.9)), **{**MACHINE, **options})


def assert_close(found, expected):
    found, expected = (one.detach() if isinstance(one, torch.Tensor) else one for one in (found, expected))
    np.testing.assert_allclose(found, expected, **CLOSE)


@pytest.mark.parametrize("plan", ["eager", "resident"])
@pytest.mark.parametrize("name", NETS)
def test_two_hundred_steps_are_those_of_torch(name, plan):
    engine = engine_of(NETS[name], plan=plan)
    module, before = in_torch(engine), engine.state_dict()
    optimizer = torch.optim.SGD(module.parameters(), 0.02, momentum=0.9)
    engine.fit(X, LABELS, epochs=40, shuffle=False)
    for _ in range(40):
        for start in range(0, ROWS, 16):
            x, y = (torch.from_numpy(rows[start : start + 16]) for rows in (X, LABELS))
            optimizer.zero_grad()
            nn.functional.cross_entropy(module(x), y).backward()
            optimizer.step()
    wanted = module.state_dict()
    for parameter, value in engine.state_dict().items():
        assert_close(value, wanted[parameter])
        assert not np.allclose(value, before[parameter], atol=1e-4), parameter
    assert_close(engine.outputs(X), module(torch.from_numpy(X)))


@pytest.mark.parametrize("name", NETS)
def test_gradients_by_the_inputs(name):
    engine = engine_of(NETS[name])
    module, x = in_torch(engine), torch.tensor(X, requires_grad=True)
    nn.functional.cross_entropy(module(x), torch.from_numpy(LABELS), reduction="sum").backward()
    assert_close(engine.input_gradient(X, LABELS), x.grad)
    step = 1e-6
    for column in range(2):
        move = step * (np.arange(2) == column)
        slopes = (engine.outputs(X + move) - engine.outputs(X - move))[:, 1] / (2.0 * step)
        np.testing.assert_allclose(engine.input_gradient(X, output=1)[:, column], slopes, rtol=0.0, atol=1e-6)
    # each input of an explanation is a column of X; the path's points are encoded one by one
    seed, baseline = random.normal(size=(ROWS, CLASSES)), np.zeros_like(X)
    points, weights = np.array([0.1, 0.4, 0.9]), np.array([0.2, 0.5, 0.3])
    total = torch.zeros_like(x)
    for point, weight in zip(points, weights, strict=True):
        x = torch.tensor(point * X, requires_grad=True)
        (weight * module(x) * torch.from_numpy(seed)).sum().backward()
        total += x.grad
    assert_close(path_gradient(engine.inference.forward, X, baseline, seed, points, weights), total)
    assert attributions(engine, X[:4]).values.shape == (4, 2)
    assert np.abs(engine.attack(X, LABELS, PGD(0.1)) - X).max() <= 0.1 + 1e-12


@pytest.mark.parametrize("place", places(INTERPRETER, GPU))
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_triton_trains_as_numpy(place, precision):
    """The launches of a graph, one by one; in 16 bits, coordinates keep what tells two of them apart."""
    with usable(place):
        net = MLP([2, 12, CLASSES], encoding=Frequency(8))
        rows = X.astype(np.float32)
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
    net = MLP([2, 12, CLASSES], encoding=Frequency(OCTAVES), members=3)
    engine = engine_of(net, normalise=True)
    engine.fit(X, LABELS, epochs=3)
    parts = members(engine)
    assert all(part.network.encoding == net.encoding for part in parts)
    probabilities = np.mean([part.predict_proba(X) for part in parts], axis=0)
    np.testing.assert_allclose(engine.predict_proba(X), probabilities, rtol=0.0, atol=1e-12)


def test_models_of_a_fleet_and_their_merge():
    net = NETS["plain"]
    fleet = Fleet(net, vary={"seed": [0, 1], "hidden": [(12, 9), (7,)]}, **MACHINE)
    fleet.fit(X, LABELS, epochs=2)
    for model in fleet.engines:
        alone = Engine(model.network, seed=model.seed, **MACHINE)
        alone.fit(X, LABELS, epochs=2)
        assert model.network.encoding == net.encoding
        assert_close(model.outputs(X), alone.outputs(X))
    engines = [engine for engine in fleet.engines if engine.network == net]
    assert len(engines) == 2
    whole = merged(engines)
    assert_close(whole.outputs(X), np.mean([engine.outputs(X) for engine in engines], axis=0))
    assert_close(members(whole)[1].outputs(X), engines[1].outputs(X))


def test_configurations_of_other_releases():
    net = NETS["inputs"]
    assert MLP.from_config(net.to_config()) == net
    assert net.to_config()["encoding"] == {"kind": "frequency", "octaves": OCTAVES, "inputs": True}
    plain = MLP([2, 3])
    assert "encoding" not in plain.to_config()
    assert net.but(dropout=0.5).encoding == net.encoding
    assert (net.sizes, net.widths, plain.widths) == ((2, 12, 3), (18, 12, 3), (2, 3))
    assert net.parameter_shapes()["0.weight"] == (12, 18)


@pytest.mark.parametrize("name", NETS)
def test_torch_there_and_back(name):
    engine = engine_of(NETS[name], optimizer=Adam(0.01))
    module = to_torch(engine)
    assert_close(engine.outputs(X), module(torch.from_numpy(X)))
    again = from_torch(module, nn.CrossEntropyLoss())
    assert again.network == engine.network.but(init="torch")
    assert_close(again.outputs(X), engine.outputs(X))
    step = fuse(module, nn.CrossEntropyLoss(), torch.optim.Adam(module.parameters(), 0.01), backend="numpy")
    for _ in range(3):
        step(torch.from_numpy(X[:16]), torch.from_numpy(LABELS[:16]))
        engine.step(X[:16], LABELS[:16])
    assert_close(module(torch.from_numpy(X)), engine.outputs(X))


def test_transfer_and_probes():
    engine = engine_of(NETS["plain"])
    other = Engine.from_pretrained(engine, head=5, precision="fp64", backend="numpy")
    assert other.network.encoding == engine.network.encoding
    assert_close(other.inference.outputs_of(X, 2), engine.inference.outputs_of(X, 2))
    first = engine.state_dict()
    engine.probe(X, LABELS, layers=1, epochs=1)
    after = engine.state_dict()
    np.testing.assert_array_equal(after["0.weight"], first["0.weight"])
    assert not np.array_equal(after["2.weight"], first["2.weight"])


def test_the_program_begins_with_the_waves():
    program, plan = planned(NETS["plain"], backend="triton", precision="bf16")
    first, second = program.calls[:2]
    assert (first.op, first.label, first.operands["octaves"]) == ("encode", "frequency 4", OCTAVES)
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
    engine = engine_of(NETS["plain"])
    columns = Columns.of(words=np.arange(8)[:, None] % 2, levels=[2])
    with pytest.raises(ArgumentError, match="encoding: waves of coded columns tell 0 from 1 and no more"):
        engine.fit(columns, LABELS[: len(columns)], epochs=1)
    with pytest.raises(ArgumentError, match=r"encoding: interval bounds \(eps\) do not go through waves"):
        engine.bounds(X, 0.1)
    with pytest.raises(ArgumentError, match="encoding: training against attacks takes the inputs as they are"):
        engine.fit(X, LABELS, epochs=1, adversarial=PGD(0.1))
    with pytest.raises(BackendUnavailableError, match="encoding: the cupy backend has no kernels for inputs as waves"):
        planned(NETS["plain"], backend="cupy")
    module = nn.Sequential(to_torch(engine).encoding, nn.Linear(9, 3))
    with pytest.raises(ArgumentError, match="takes 9 features, expected 8 waves of each input"):
        from_torch(module)
    assert fusemlp.Frequency is Frequency
