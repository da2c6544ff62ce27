"""Engines and torch modules convert into one another and continue the same training."""

import copy
import io

import numpy as np
import pytest
import torch
from torch import nn
from torch_pair import ACTIVATIONS, CLOSE, batch, eager_step

from fusemlp import MLP, Engine, PReLU, Residual, RMSNorm
from fusemlp.torch import from_torch, fuse, to_torch
from fusemlp_kernels.errors import ArgumentError, ArgumentTypeError


def module():
    torch.manual_seed(1)
    parts = nn.GELU(), nn.Dropout(0.0), nn.Linear(8, 5), nn.PReLU(), nn.Linear(5, 3)
    return nn.Sequential(nn.Linear(6, 8), *parts).double()


ONE_GROUP = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1),
    "momentum": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, weight_decay=0.01),
    "nesterov": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, nesterov=True, weight_decay=0.01),
    "adam": lambda p: torch.optim.Adam(p, lr=0.01, betas=(0.8, 0.9), eps=1e-6, weight_decay=0.01),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.1),
}
OPTIMIZERS = {
    **ONE_GROUP,
    "groups": lambda p: torch.optim.AdamW([{"params": p[:2], "lr": 0.001}, {"params": p[2:4], "weight_decay": 0.0}]),
}


@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS.keys())
def test_an_engine_goes_on_where_torch_is(make):
    net = module()
    optimizer = make(list(net.parameters()))
    for seed in range(3):
        eager_step(net, optimizer, *batch(12, seed))
    engine = from_torch(net, nn.CrossEntropyLoss(), optimizer, batch_size=12, backend="numpy")
    assert engine.precision == "fp64"
    for seed in range(3, 8):
        x, y = batch(12, seed)
        eager_step(net, optimizer, x, y)
        engine.step(x.numpy(), y.numpy())
    for own, expected in zip(engine.state_dict().values(), net.state_dict().values(), strict=True):
        torch.testing.assert_close(torch.from_numpy(own), expected, **CLOSE)


@pytest.mark.parametrize("make", ONE_GROUP.values(), ids=ONE_GROUP.keys())
@pytest.mark.parametrize("activation", [nn.ReLU, nn.GELU, nn.Tanh, nn.SiLU])
def test_a_fused_step_is_the_engines_bit_for_bit(activation, make):
    torch.manual_seed(2)
    net = nn.Sequential(nn.Linear(6, 33), activation(), nn.Linear(33, 17), activation(), nn.Linear(17, 3))
    optimizer, loss_fn = make(list(net.parameters())), nn.CrossEntropyLoss()
    # a fused step is the calls of the program one by one
    engine = from_torch(net, loss_fn, optimizer, batch_size=50, backend="numpy", plan="eager")
    step = fuse(net, loss_fn, optimizer)
    for seed in range(10):
        x, y = batch(50, seed, torch.float32)
        assert step(x, y).item() == float(engine.step(x.numpy(), y.numpy()))
    for name, array in engine.state_dict().items():
        assert np.array_equal(net.state_dict()[name].numpy(), array), name


def test_log_probabilities_become_logits():
    net = nn.Sequential(*module(), nn.LogSoftmax(1))
    engine = from_torch(net, nn.NLLLoss(), torch.optim.SGD(net.parameters(), lr=0.1), backend="numpy")
    x, y = batch(12, 0)
    log_probabilities = net(x).detach()
    found = torch.from_numpy(engine.predict_proba(x.numpy()))
    torch.testing.assert_close(found, log_probabilities.exp(), **CLOSE)
    loss = torch.tensor(float(engine.step(x.numpy(), y.numpy())), dtype=torch.float64)
    torch.testing.assert_close(loss, nn.functional.nll_loss(log_probabilities, y), **CLOSE)


def test_values_are_copied():
    net = module()
    engine = from_torch(net, nn.CrossEntropyLoss())
    before = copy.deepcopy(net.state_dict())
    engine.step(*(t.numpy() for t in batch(12, 0)))
    torch.testing.assert_close(net.state_dict(), before, rtol=0, atol=0)


def test_each_part_keeps_its_mode():
    net = module()
    net[0].eval()
    modes = [part.training for part in net.modules()]
    from_torch(net, backend="numpy")
    assert [part.training for part in net.modules()] == modes


def test_frozen_parameters_and_missing_biases():
    torch.manual_seed(1)
    net = nn.Sequential(nn.Linear(6, 8, bias=False), nn.Tanh(), nn.Linear(8, 3))
    net[2].weight.requires_grad_(False)
    engine = from_torch(net, nn.CrossEntropyLoss(), batch_size=12)
    before = engine.state_dict()
    engine.step(*(t.numpy() for t in batch(12, 0)))
    changed = [name for name, array in engine.state_dict().items() if not np.array_equal(array, before[name])]
    assert changed == ["0.weight", "2.bias"]
    assert not before["0.bias"].any()


@pytest.mark.parametrize("activation", [one for one, _ in ACTIVATIONS.values()])
def test_a_torch_module_predicts_as_the_engine(activation):
    net = MLP([6, 8, 5, 3], activation=activation, output_activation="tanh", dropout=[0.5, 0.0])
    engine = Engine(net, "mse", backend="numpy", precision="fp64")
    made = to_torch(engine)
    assert list(made.state_dict()) == list(engine.state_dict())
    assert made.training and [type(one) for one in made].count(nn.Dropout) == 1
    x, _ = batch(12, 0)
    expected = engine.predict(x.numpy())
    torch.testing.assert_close(made.eval()(x).detach(), torch.from_numpy(expected), **CLOSE)
    with torch.no_grad():
        made[0].weight.zero_()
    assert np.array_equal(engine.predict(x.numpy()), expected)


def test_there_and_back():
    engine = Engine(MLP([6, 8, 3], activation=PReLU(0.2), dropout=0.25), batch_size=12, backend="numpy")
    again = from_torch(to_torch(engine).eval(), nn.CrossEntropyLoss())
    assert again.network.sizes == engine.network.sizes and again.network.dropouts == engine.network.dropouts
    assert again.precision == "fp32"
    for name, array in engine.state_dict().items():
        assert np.array_equal(again.state_dict()[name], array)


@pytest.mark.parametrize("normalise", [False, True])
@pytest.mark.parametrize("norm", [None, "layer", RMSNorm(1e-3)])
def test_normalised_layers_and_residual_blocks_there_and_back(norm, normalise):
    net = MLP([6, 8, Residual(12), Residual(5, 3), 3], norm=norm, activation="silu", dropout=0.1, init="torch")
    engine = Engine(net, batch_size=12, backend="numpy", precision="fp64", normalise=normalise)
    x, y = (tensor.numpy() for tensor in batch(40, 0))
    engine.fit(x, y, epochs=2)
    made = to_torch(engine)
    assert [name for name in made.state_dict() if "normalise" not in name] == list(net.parameter_shapes())
    torch.save(made, file := io.BytesIO())
    file.seek(0)
    for module in (made, copy.deepcopy(made), torch.load(file, weights_only=False)):
        again = from_torch(module, nn.CrossEntropyLoss())
        assert again.network == net
        expected = torch.from_numpy(engine.outputs(x))
        torch.testing.assert_close(torch.from_numpy(again.outputs(x)), expected, **CLOSE)
        torch.testing.assert_close(module.eval()(torch.from_numpy(x)).detach(), expected, **CLOSE)


def test_the_eps_of_an_rms_norm_without_one_is_that_of_its_type():
    for dtype, eps in ((torch.float32, 2.0**-23), (torch.float64, 2.0**-52)):
        net = nn.Sequential(nn.Linear(6, 8), nn.RMSNorm(8), nn.Linear(8, 3)).to(dtype)
        assert from_torch(net).network.norm(0) == RMSNorm(eps)


def uneven(net):
    optimizer = torch.optim.Adam(net.parameters())
    net[0].requires_grad_(False)
    eager_step(net, optimizer, *batch(12, 0))
    net[0].requires_grad_(True)
    eager_step(net, optimizer, *batch(12, 0))
    return optimizer


class Moody(nn.Module):
    """Drops only in train mode, by its own hand."""

    def __init__(self):
        super().__init__()
        self.first, self.drop, self.last = nn.Linear(6, 8), nn.Dropout(0.5), nn.Linear(8, 3)

    def forward(self, x):
        x = torch.relu(self.first(x))
        return self.last(self.drop(x) if self.training else x)


TWO_MOMENTA = [{"params": (BASE := module())[0].parameters(), "momentum": 0.5}, {"params": BASE[3].parameters()}]
FROZEN = module().requires_grad_(False)
LOGS = nn.Sequential(*module(), nn.LogSoftmax(1))
# The arguments of ``from_torch``, and words of the error.
REFUSED = {
    "flatten": ([nn.Sequential(nn.Flatten(), nn.Linear(6, 3))], "Flatten in front"),
    "RMSprop": ([BASE, None, torch.optim.RMSprop(BASE.parameters())], "optimizer: an engine has no RMSprop; use SGD"),
    "positive weights": ([BASE, nn.BCEWithLogitsLoss(pos_weight=torch.tensor(2.0))], "loss_fn: an engine has no pos_w"),
    "a callable": (
        [BASE, lambda y, t: (y - t).mean()],
        "loss_fn: an engine has no <lambda>, or not with these options; train with fuse",
    ),
    "an option": ([BASE, nn.SmoothL1Loss(beta=0.5)], "loss_fn: an engine has no SmoothL1Loss, or not with these"),
    "modes, in train mode": ([Moody()], "different things in train and eval mode"),
    "modes, in eval mode": ([Moody().eval()], "different things in train and eval mode"),
    "log_softmax": ([LOGS, nn.CrossEntropyLoss()], "ends with LogSoftmax; use NLLLoss"),
    "momentum by group": ([BASE, None, torch.optim.SGD(TWO_MOMENTA, lr=0.1)], r"s\[1\]: an engine has one momentum"),
    "uneven counts": ([UNEVEN := module(), None, uneven(UNEVEN)], r"were updated \[1, 2\] times"),
    "nothing trained": ([FROZEN, None, torch.optim.SGD(FROZEN.parameters(), lr=0.1)], "no group has a parameter"),
}


@pytest.mark.parametrize(("arguments", "words"), REFUSED.values(), ids=REFUSED)
def test_refusals(arguments, words):
    with pytest.raises(ArgumentError, match=words):
        from_torch(*arguments)
    with pytest.raises(ArgumentTypeError, match=r"expected a fusemlp\.Engine"):
        to_torch(arguments[0])
