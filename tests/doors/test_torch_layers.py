"""FusedLinear and FusedMLP: values and gradients against torch's own layers."""

import copy
import itertools
import pickle
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters
from torch.autograd import gradcheck
from torch.nn.utils import prune
from torch_pair import ACTIVATIONS

from fusemlp.runtime.plans import open_backend
from fusemlp.torch import FusedLinear, FusedMLP
from fusemlp.torch.layers import chain_op
from fusemlp_kernels.contract import ACTIVATIONS as ACTIVATION_NAMES
from fusemlp_kernels.errors import ArgumentError, DTypeError, ShapeError

each_activation = pytest.mark.parametrize("name, twin", ACTIVATIONS.values(), ids=ACTIVATIONS.keys())


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(4)


def random(*shape, grad=True):
    return torch.randn(*shape, dtype=torch.float64, requires_grad=grad)


@each_activation
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
def test_gradcheck_of_a_layer(name, twin, bias):
    layer = FusedLinear(4, 3, bias, activation=name, dtype=torch.float64)
    assert gradcheck(lambda x, *_: layer(x), (random(5, 4), *layer.parameters()))


def test_gradcheck_under_dropout():
    """With the masks' counter fixed, every call has the same mask."""
    net = FusedMLP([4, 6, 5, 2], activation=["gelu", "prelu"], dropout=0.4, seed=3, dtype=torch.float64)

    def forward(x, *_):
        net._calls = 0
        return net(x)

    assert gradcheck(forward, (random(6, 4), *net.parameters()))


@each_activation
def test_equals_the_modules_of_torch(name, twin):
    net = FusedMLP([4, 6, 3], activation=name, output_activation=name, dtype=torch.float64)
    eager = nn.Sequential(nn.Linear(4, 6), twin(), nn.Linear(6, 3), twin()).double()
    assert list(net.state_dict()) == list(eager.state_dict())
    eager.load_state_dict(net.state_dict())
    x = random(2, 3, 4)
    other = x.detach().clone().requires_grad_()
    y, expected = net(x), eager(other)
    torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-14)
    weights = torch.randn_like(y)
    (y * weights).sum().backward()
    (expected * weights).sum().backward()
    torch.testing.assert_close(x.grad, other.grad, rtol=1e-12, atol=1e-14)
    for own, theirs in zip(net.parameters(), eager.parameters(), strict=True):
        torch.testing.assert_close(own.grad, theirs.grad, rtol=1e-12, atol=1e-14)


def test_frozen_parameters_get_no_gradient():
    net = FusedMLP([4, 5, 3, 2], dtype=torch.float64)
    for name, parameter in net.named_parameters():
        parameter.requires_grad_(name.startswith("4."))
    net(random(3, 4, grad=False)).sum().backward()
    assert [name for name, parameter in net.named_parameters() if parameter.grad is not None] == ["4.weight", "4.bias"]


def test_the_input_alone_can_ask_for_a_gradient():
    net = FusedMLP([4, 5, 2], dtype=torch.float64).requires_grad_(False)
    assert gradcheck(net, (random(3, 4),))


CLOSE = {"rtol": 1e-12, "atol": 1e-14}


def twins(*sizes, **options):
    net = FusedMLP(sizes, activation="tanh", dtype=torch.float64, **options)
    parts = [part for pair in itertools.pairwise(sizes) for part in (nn.Linear(*pair), nn.Tanh())]
    eager = nn.Sequential(*parts[:-1]).double()
    eager.load_state_dict(net.state_dict())
    return net, eager


def same_gradients(net, eager, x, times=1):
    for module in (net, eager):
        module.zero_grad()
        loss = sum(module(x).square().sum() for _ in range(times))
        loss.backward()
    torch.testing.assert_close([p.grad for p in net.parameters()], [p.grad for p in eager.parameters()], **CLOSE)


def test_a_shape_is_bound_once(monkeypatch):
    backend = type(open_backend("numpy", "cpu", "fp64"))
    bind, count = backend.bind_calls, itertools.count()
    monkeypatch.setattr(backend, "bind_calls", lambda *given: (next(count), bind(*given))[1])
    net, eager = twins(4, 5, 2)
    for _ in range(3):
        same_gradients(net, eager, random(3, 4, grad=False))
    assert next(count) == 2
    # many shapes: the oldest give way
    for rows in range(1, 12):
        same_gradients(net, eager, random(rows, 4, grad=False))
    assert len(net._chain.bindings._idle) <= 8


def test_outputs_and_gradients_of_a_bound_shape_are_not_overwritten():
    net, eager = twins(4, 5, 2)
    batches = [random(3, 4) for _ in range(4)]
    outputs = [net(x) for x in batches]
    with torch.no_grad():
        outputs += [net(x) for x in batches]
    torch.testing.assert_close(outputs, [eager(x) for x in batches * 2], **CLOSE)
    # backward passes in another order, the first graph twice
    for index in (2, 0, 0, 3, 1):
        found = torch.autograd.grad(outputs[index].sum(), [batches[index], *net.parameters()], retain_graph=True)
        expected = torch.autograd.grad(eager(batches[index]).sum(), [batches[index], *eager.parameters()])
        torch.testing.assert_close(found, expected, **CLOSE)
    kept = [one.clone() for one in found]
    same_gradients(net, eager, batches[0], times=2)
    torch.testing.assert_close([*found], kept, rtol=0, atol=0)


CHANGES = {
    "changed in place": lambda m: m[0].weight.data.mul_(2.0),
    "data replaced": lambda m: setattr(m[0].weight, "data", m[0].weight.data + 1.0),
    "parameter replaced": lambda m: setattr(m[2], "bias", nn.Parameter(torch.ones(4, dtype=torch.float64))),
    "transposed": lambda m: setattr(m[2], "weight", nn.Parameter(m[2].weight.detach().t())),
    "tied": lambda m: setattr(m[2], "weight", m[0].weight),
    "frozen": lambda m: m[0].requires_grad_(False),
    "moved": lambda m: m[0].float().double(),
    "pruned": lambda m: prune.ln_structured(m[2], "weight", 0.5, n=2, dim=0),
    "parametrised": lambda m: nn.utils.parametrizations.weight_norm(m[0]),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES.keys())
def test_changes_after_a_shape_was_bound(change):
    net, eager = twins(4, 4, 4)
    same_gradients(net, eager, random(3, 4, grad=False))
    change({index: net.get_submodule(str(index)) for index in (0, 2)})
    change(eager)
    x = random(3, 4)
    for module in (net, eager):
        module.zero_grad()
        module(x).square().sum().backward()
    torch.testing.assert_close(net(x), eager(x), **CLOSE)
    gradients = [[p.grad for p in module.parameters() if p.requires_grad] for module in (net, eager)]
    torch.testing.assert_close(*gradients, **CLOSE)


def test_parameters_that_do_not_fit_are_refused():
    net, _ = twins(4, 5, 2)
    net(random(3, 4))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y = net(random(3, 4))
        with torch.no_grad():
            net.get_submodule("0").weight.add_(1.0)
        y.sum().backward()
    net.get_submodule("0").bias = nn.Parameter(torch.ones(3, dtype=torch.float64))
    with pytest.raises(ShapeError, match=r"layer 0: expected weight \(N, 4\) and bias \(N,\), got \(5, 4\) and \(3,\)"):
        net(random(3, 4))
    net.get_submodule("0").bias = nn.Parameter(torch.ones(5))
    with pytest.raises(DTypeError, match="float32"):
        net(random(3, 4))


def test_threads_share_a_module():
    net, eager = twins(20, 30, 5)
    batches = [random(8, 20, grad=False) for _ in range(8)]
    expected = [torch.autograd.grad(eager(x).sum(), [*eager.parameters()]) for x in batches]

    def work(index):
        return [torch.autograd.grad(net(batches[index]).sum(), [*net.parameters()]) for _ in range(20)]

    with ThreadPoolExecutor(4) as pool:
        for found, wanted in zip(pool.map(work, range(8)), expected, strict=True):
            for gradients in found:
                torch.testing.assert_close(gradients, wanted, **CLOSE)


def test_copies_bind_their_own():
    net, eager = twins(4, 5, 2)
    same_gradients(net, eager, random(3, 4, grad=False))
    for copied in (copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
        assert not copied._chain.bindings._idle
        with torch.no_grad():
            copied.get_submodule("0").weight.zero_()
        same_gradients(net, eager, random(3, 4, grad=False))
        assert torch.equal(copied(torch.zeros(1, 4).double()), copied(torch.ones(1, 4).double()))


def test_no_rows():
    net = FusedMLP([4, 5, 2])
    y = net(torch.empty(0, 4))
    assert y.shape == (0, 2)
    y.sum().backward()
    assert all(not parameter.grad.any() for parameter in net.parameters())


def test_dropout_follows_the_mode_and_changes_from_call_to_call():
    net = FusedMLP([4, 64, 2], dropout=0.5, seed=1)
    x = torch.randn(3, 4)
    assert not torch.equal(net(x), net(x))
    net.eval()
    assert torch.equal(net(x), net(x))


def test_second_derivatives_are_refused():
    net = FusedMLP([3, 2], dtype=torch.float64)
    x = random(2, 3)
    (grad,) = torch.autograd.grad(net(x).pow(2).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


NETWORKS = {
    "prelu": {"activation": "prelu", "output_activation": "tanh"},
    "dropout, seed": {"activation": "gelu", "dropout": 0.4, "seed": 5},
    "dropout": {"dropout": 0.4},
}


@pytest.mark.parametrize("options", NETWORKS.values(), ids=NETWORKS.keys())
def test_compiled_without_a_break_in_the_graph(options):
    """Bitwise the values and gradients of the eager module, with the same masks, and compiled once for all calls."""
    torch.compiler.reset()
    counters.clear()
    net = FusedMLP([4, 6, 5, 2], **options)
    compiled = torch.compile(net, fullgraph=True, backend="aot_eager", dynamic=True)
    drawn = torch.get_rng_state()
    twin = copy.deepcopy(net)
    for rows in (3, 5, 7, 9):
        x = torch.randn(rows, 4, requires_grad=True)
        other = x.detach().clone().requires_grad_()
        if rows == 3:
            torch.set_rng_state(drawn)
        y = compiled(x)
        if rows == 3:
            torch.set_rng_state(drawn)
        expected = twin(other)
        assert torch.equal(y, expected)
        y.square().sum().backward()
        expected.square().sum().backward()
        assert torch.equal(x.grad, other.grad)
        assert all(torch.equal(a.grad, b.grad) for a, b in zip(net.parameters(), twin.parameters(), strict=True))
    seen = counters["stats"]["unique_graphs"]
    # the draw of a seed is in a graph of its own
    assert seen <= (2 if options == {"dropout": 0.4} else 1), seen


def test_a_compiled_layer_inside_a_compiled_network():
    torch.compiler.reset()
    layer = FusedLinear(12, 5, bias=False, activation="silu")
    assert "activation='silu'" in repr(layer)
    net = nn.Sequential(nn.Conv1d(1, 2, 3), nn.Flatten(), layer, nn.Linear(5, 1))
    compiled = torch.compile(net, fullgraph=True, backend="aot_eager")
    x = torch.randn(7, 1, 8)
    torch.testing.assert_close(compiled(x), net(x))
    compiled(x).sum().backward()
    found = [parameter.grad.clone() for parameter in net.parameters()]
    net.zero_grad()
    net(x).sum().backward()
    torch.testing.assert_close(found, [parameter.grad for parameter in net.parameters()])


def test_operators_keep_torch_s_rules():
    net = FusedMLP([4, 5, 2], activation="prelu", dropout=0.5)
    prelu, identity = map(ACTIVATION_NAMES.index, ("prelu", "identity"))
    layers = [*map(float, (prelu, 0.25, 0.5, True)), *map(float, (identity, 0.0, 0.0, True))]
    given = random(3, 4).float(), [*net.parameters()], layers, torch.tensor([3, 1])
    torch.library.opcheck(chain_op, given, test_utils=("test_schema", "test_autograd_registration", "test_faketensor"))


BAD = {
    "width": (lambda: FusedLinear(4, 3)(torch.randn(2, 5)), ShapeError, r"\(\.\.\., 4\), got \(2, 5\)"),
    "type": (lambda: FusedLinear(4, 3)(torch.randn(2, 4).double()), DTypeError, "float64"),
    "no tensor": (lambda: FusedLinear(4, 3)([1.0]), ShapeError, "list"),
    "half": (lambda: FusedLinear(4, 3).half()(torch.randn(2, 4).half()), DTypeError, "float16"),
    "no features": (lambda: FusedLinear(0, 3), ArgumentError, "in_features"),
    "activation": (lambda: FusedLinear(2, 3, activation="rellu"), ArgumentError, "relu"),
    "sizes": (lambda: FusedMLP([4]), ArgumentError, "sizes"),
}


@pytest.mark.parametrize(("make", "error", "words"), BAD.values(), ids=BAD)
def test_bad_input(make, error, words):
    with pytest.raises(error, match=words):
        make()
