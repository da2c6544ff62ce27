"""FusedLinear and FusedMLP: values and gradients against torch's own layers."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters
from torch.autograd import gradcheck

from fusemlp import ELU, LeakyReLU, PReLU
from fusemlp.torch import FusedLinear, FusedMLP
from fusemlp.torch.autograd import chain_op
from fusemlp_kernels.contract import ACTIVATIONS as ACTIVATION_NAMES
from fusemlp_kernels.errors import ArgumentError, DTypeError, ShapeError

ACTIVATIONS = {
    "identity": ("identity", nn.Identity),
    "relu": ("relu", nn.ReLU),
    "leaky_relu": (LeakyReLU(0.2), lambda: nn.LeakyReLU(0.2)),
    "prelu": (PReLU(0.3), lambda: nn.PReLU(init=0.3)),
    "sigmoid": ("sigmoid", nn.Sigmoid),
    "tanh": ("tanh", nn.Tanh),
    "gelu": ("gelu", nn.GELU),
    "silu": ("silu", nn.SiLU),
    "elu": (ELU(0.7), lambda: nn.ELU(0.7)),
    "selu": ("selu", nn.SELU),
    "softplus": ("softplus", nn.Softplus),
    "mish": ("mish", nn.Mish),
}
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


@each_activation
def test_gradcheck_of_a_network(name, twin):
    net = FusedMLP([4, 5, 3, 2], activation=name, output_activation=name, dtype=torch.float64)
    assert gradcheck(lambda x, *_: net(x), (random(6, 4), *net.parameters()))


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
    x, other = random(2, 3, 4), None
    other = x.detach().clone().requires_grad_()
    y, expected = net(x), eager(other)
    torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-14)
    weights = torch.randn_like(y)
    (y * weights).sum().backward()
    (expected * weights).sum().backward()
    torch.testing.assert_close(x.grad, other.grad, rtol=1e-12, atol=1e-14)
    for own, theirs in zip(net.parameters(), eager.parameters(), strict=True):
        torch.testing.assert_close(own.grad, theirs.grad, rtol=1e-12, atol=1e-14)


def test_single_precision_inside_an_eager_network():
    net = nn.Sequential(nn.Conv1d(1, 2, 3), nn.Flatten(), FusedLinear(12, 5, activation="relu"), nn.Linear(5, 1))
    x = torch.randn(7, 1, 8)
    before = net(x).pow(2).mean()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05)
    for _ in range(20):
        optimizer.zero_grad()
        loss = net(x).pow(2).mean()
        loss.backward()
        optimizer.step()
    assert loss < before


def test_state_dict_of_a_layer_is_that_of_linear():
    layer, linear = FusedLinear(4, 3), nn.Linear(4, 3)
    layer.load_state_dict(linear.state_dict())
    x = torch.randn(2, 4)
    torch.testing.assert_close(layer(x), linear(x))


def test_frozen_parameters_get_no_gradient():
    net = FusedMLP([4, 5, 3, 2], dtype=torch.float64)
    for name, parameter in net.named_parameters():
        parameter.requires_grad_(name.startswith("4."))
    net(random(3, 4, grad=False)).sum().backward()
    assert [name for name, parameter in net.named_parameters() if parameter.grad is not None] == ["4.weight", "4.bias"]


def test_the_input_alone_can_ask_for_a_gradient():
    net = FusedMLP([4, 5, 2], dtype=torch.float64).requires_grad_(False)
    assert gradcheck(net, (random(3, 4),))


def test_two_calls_wait_for_their_backward_pass():
    net = FusedMLP([4, 5, 2], activation="tanh", dtype=torch.float64)
    a, b = random(3, 4), random(3, 4)
    first, second = net(a), net(b)
    (first.sum() + second.sum()).backward()
    alone = [x.detach().clone().requires_grad_() for x in (a, b)]
    for x in alone:
        net(x).sum().backward()
    torch.testing.assert_close([a.grad, b.grad], [x.grad for x in alone], rtol=0, atol=0)


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
    net = nn.Sequential(
        nn.Conv1d(1, 2, 3), nn.Flatten(), FusedLinear(12, 5, bias=False, activation="silu"), nn.Linear(5, 1)
    )
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
    parameters = [one for one in net.parameters()]
    masks = torch.tensor([3, 1])
    codes = [ACTIVATION_NAMES.index("prelu"), ACTIVATION_NAMES.index("identity")]
    given = (random(3, 4).float(), parameters, codes, [0.25, 0.0], [0.5, 0.0], [True, True], masks)
    torch.library.opcheck(chain_op, given, test_utils=("test_schema", "test_autograd_registration", "test_faketensor"))


def test_modules_can_be_pickled_and_printed():
    net = FusedMLP([3, 4, 2], activation="silu")
    again = pickle.loads(pickle.dumps(net))
    x = torch.randn(2, 3)
    assert torch.equal(net(x), again(x))
    assert "activation='relu'" in repr(FusedLinear(2, 3, activation="relu"))


@pytest.mark.parametrize(
    "make, error, words",
    [
        (lambda: FusedLinear(4, 3)(torch.randn(2, 5)), ShapeError, r"\(\.\.\., 4\), got \(2, 5\)"),
        (lambda: FusedLinear(4, 3)(torch.randn(2, 4).double()), DTypeError, "float64"),
        (lambda: FusedLinear(4, 3)([1.0]), ShapeError, "list"),
        (lambda: FusedLinear(4, 3).half()(torch.randn(2, 4).half()), DTypeError, "float16"),
        (lambda: FusedLinear(0, 3), ArgumentError, "in_features"),
        (lambda: FusedLinear(2, 3, activation="rellu"), ArgumentError, "relu"),
        (lambda: FusedMLP([4]), ArgumentError, "sizes"),
    ],
    ids=["width", "type", "no tensor", "half", "no features", "activation", "sizes"],
)
def test_bad_input(make, error, words):
    with pytest.raises(error, match=words):
        make()
