"""A fused step follows every change since the previous one, or refuses it."""

import copy
from functools import partial

import pytest
import torch
from torch import nn
from torch.nn.modules import module as modules
from torch.optim import optimizer as optimizers
from torch_pair import CLOSE, Pair, adam, batch, each_optimizer, make, rmsprop, sgd

import fusemlp.torch as door
from fusemlp.runtime.programs import BoundProgram
from fusemlp_kernels.errors import ArgumentError


@each_optimizer
def test_frozen_parameters_stay_and_can_be_thawed(make_optimizer):
    pair = Pair(make_optimizer=make_optimizer)
    pair.both(lambda module, _: module[0].requires_grad_(False))
    frozen = pair.module[0].weight.clone()
    pair.steps()
    assert torch.equal(pair.module[0].weight, frozen)
    assert "grad_input" not in [call.op for call in pair.step.program.calls]
    pair.both(lambda module, _: module[0].requires_grad_(True))
    pair.steps()
    assert not torch.equal(pair.module[0].weight, frozen)
    pair.both(lambda module, _: module[2].bias.requires_grad_(False))
    pair.steps()


def test_a_rate_is_that_of_thawed_parameters_too():
    """Adam's count of updates splits one group into two sets."""
    pair = Pair(make_optimizer=adam)
    pair.both(lambda module, _: module[0].requires_grad_(False))
    pair.steps()
    pair.both(lambda module, _: module[0].requires_grad_(True))
    pair.steps(1)
    pair.both(lambda _, optimizer: optimizer.param_groups[0].update(lr=0.001))
    pair.steps()


def test_a_group_can_be_added():
    pair = Pair(make_optimizer=lambda parameters: adam(parameters[2:]))
    pair.steps()
    pair.both(lambda module, optimizer: optimizer.add_param_group({"params": [*module[0].parameters()], "lr": 0.001}))
    pair.steps()


def test_options_of_the_groups_are_read_at_every_step():
    rate = torch.tensor(0.03, dtype=torch.float64)
    changes = {
        sgd: [("lr", 0.03), ("momentum", 0.5), ("weight_decay", 0.2), ("nesterov", True), ("lr", 1)],
        adam: [("lr", rate), ("betas", (0.5, 0.9)), ("eps", 1e-3), ("weight_decay", 0.2)],
    }
    for make_optimizer, options in changes.items():
        pair = Pair(make_optimizer=partial(make_optimizer, weight_decay=0.01))
        for name, value in options:
            pair.both(lambda _, optimizer, name=name, value=value: optimizer.param_groups[0].update({name: value}))
            pair.steps(2)


@pytest.mark.parametrize(
    ("make_optimizer", "cycled"),
    [(sgd, [{"momentum": 0.8}, {"momentum": 0.7}]), (adam, [{"betas": (0.8, 0.99)}, {"betas": (0.7, 0.9)}])],
)
def test_betas_that_cycle_bind_nothing_again(make_optimizer, cycled, monkeypatch):
    pair = Pair(make_optimizer=make_optimizer)
    pair.steps(1)
    monkeypatch.setattr(BoundProgram, "use", None)
    for options in cycled:
        pair.both(lambda _, optimizer, options=options: optimizer.param_groups[0].update(options))
        pair.steps(10)


def test_a_table_of_rates_grows_while_the_betas_stay():
    pair, rows = Pair(make_optimizer=adam), []
    for steps, beta in ((2, 0.9), (12, 0.8), (2, 0.7), (2, 0.6), (12, 0.5), (1, 0.4)):
        pair.both(lambda _, optimizer, beta=beta: optimizer.param_groups[0].update(betas=(beta, 0.999)))
        pair.steps(steps)
        rows.append(len(pair.step._sets[0].table._filled))
    assert rows == [1024, 32, 2, 2, 32, 2]


def test_a_rate_held_in_a_tensor_is_followed():
    pair = Pair()
    pair.both(lambda _, optimizer: optimizer.param_groups[0].update(lr=torch.tensor(0.1, dtype=torch.float64)))
    pair.steps(1)
    pair.both(lambda _, optimizer: optimizer.param_groups[0]["lr"].fill_(0.01))
    pair.steps(1)


def test_momentum_that_comes_later_is_refused():
    pair = Pair(make_optimizer=partial(sgd, momentum=0.0))
    pair.steps(1)
    pair.optimizer.param_groups[0]["momentum"] = 0.9
    with pytest.raises(ArgumentError, match=r"param_groups\[0\]\['momentum'\].*fuse again"):
        pair.step(*batch())
    pair.same()


def test_dropout_follows_the_mode():
    pair = Pair(make(dropout=0.5), seed=4)
    x, y = batch()
    start = copy.deepcopy(pair.module.state_dict())
    losses = [pair.step(x, y).item()]
    pair.module.load_state_dict(start)
    losses.append(pair.step(x, y).item())
    assert losses[0] != losses[1]
    pair.module.load_state_dict(start)
    pair.optimizer.load_state_dict(pair.eager.state_dict())
    pair.both(lambda module, _: module.eval())
    pair.steps()
    pair.module.train()
    assert pair.step(x, y).item() != nn.functional.cross_entropy(pair.twin(x), y).item()


def test_masks_come_from_the_seed_or_from_torchs_generator():
    def losses(seed):
        module = make(dropout=0.5)
        torch.manual_seed(8)
        step = door.fuse(module, nn.CrossEntropyLoss(), sgd(module.parameters()), seed=seed)
        return [step(*batch(seed=i)).item() for i in range(3)]

    assert losses(1) == losses(1) and losses(None) == losses(None)
    assert len({tuple(losses(1)), tuple(losses(2)), tuple(losses(None))}) == 3


def test_options_of_module_and_loss_are_noticed():
    torch.manual_seed(2)
    module = nn.Sequential(nn.Linear(6, 8), nn.LeakyReLU(0.1), nn.Linear(8, 3)).double()
    loss_fn = nn.CrossEntropyLoss(weight=torch.ones(3, dtype=torch.float64))
    pair = Pair(module, loss_fn=loss_fn)
    for change in (
        lambda: None,
        lambda: pair.both(lambda module, _: setattr(module[1], "negative_slope", 0.5)),
        lambda: setattr(loss_fn, "label_smoothing", 0.2),
        lambda: loss_fn.weight[0].fill_(4.0),
        lambda: setattr(loss_fn, "reduction", "sum"),
    ):
        change()
        pair.steps(1)


CHANGES = {
    "module.float()": (lambda m: m.float(), r"memory of 0\.weight was replaced"),
    "param.data": (lambda m: setattr(m[2].bias, "data", torch.zeros(3).double()), r"memory of 2\.bias was replaced"),
    "a new parameter": (
        lambda m: setattr(m[0], "weight", nn.Parameter(torch.zeros(8, 6).double())),
        r"0\.weight is not the parameter that was fused",
    ),
    "assigned": (lambda m: m.load_state_dict(make().state_dict(), assign=True), r"0\.weight is not the parameter"),
    "a new layer": (lambda m: m.append(nn.Linear(3, 3).double()), r"3\.weight is not the parameter"),
    "a replaced layer": (lambda m: m.__setitem__(2, nn.Linear(8, 3).double()), r"2\.weight is not the parameter"),
    "a BatchNorm": (lambda m: m.insert(1, nn.BatchNorm1d(8).double()), r"1: BatchNorm1d cannot be fused"),
    "nothing to train": (lambda m: m.requires_grad_(False), "nothing to train"),
}


@pytest.mark.parametrize("change, words", CHANGES.values(), ids=CHANGES.keys())
def test_changes_of_the_module_are_noticed(change, words):
    pair = Pair()
    pair.steps(1)
    change(pair.module)
    with pytest.raises(ArgumentError, match=words):
        pair.step(*batch())


def test_another_activation_of_the_same_shape_is_followed():
    pair = Pair()
    pair.steps(1)
    pair.both(lambda module, _: module.__setitem__(1, nn.Tanh()))
    pair.steps(1)


def test_fusing_again_retires_the_first_step():
    pair = Pair()
    pair.steps(1)
    second = door.fuse(pair.module, nn.MSELoss(), pair.optimizer)
    for _ in range(2):
        second(batch()[0], torch.zeros(10, 3, dtype=torch.float64))
        with pytest.raises(ArgumentError, match="another fuse"):
            pair.step(*batch())
        pair.optimizer.load_state_dict(copy.deepcopy(pair.optimizer.state_dict()))


@pytest.mark.parametrize(
    "empty", [lambda o: o.state.clear(), lambda o: o.load_state_dict({**o.state_dict(), "state": {}})]
)
def test_an_empty_optimizer_state_starts_anew(empty):
    pair = Pair(make_optimizer=adam)
    pair.steps()
    pair.both(lambda _, optimizer: empty(optimizer))
    pair.steps()


@each_optimizer
def test_replaced_moments_are_taken_over(make_optimizer):
    pair = Pair(make_optimizer=make_optimizer)
    pair.steps()
    name = {sgd: "momentum_buffer", adam: "exp_avg", rmsprop: "square_avg"}[make_optimizer]

    def halve(module, optimizer):
        state = optimizer.state[module[0].weight]
        state[name] = 0.5 * state[name]
        optimizer.state[module[2].bias] = {key: value.clone() for key, value in optimizer.state[module[2].bias].items()}

    pair.both(halve)
    pair.steps()


class Switched(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(6, 4), nn.Linear(4, 3)
        self.smooth = False

    def forward(self, x):
        x = self.first(x)
        return self.last(torch.tanh(x) if self.smooth else torch.relu(x) if self.training else nn.functional.gelu(x))


def test_attributes_of_a_traced_module_are_noticed():
    torch.manual_seed(0)
    pair = Pair(Switched().double())
    pair.steps()
    pair.both(lambda module, _: module.eval())
    pair.steps()
    pair.both(lambda module, _: setattr(module, "smooth", True))
    pair.steps()


MODULE_HOOKS = ("forward_hook", "forward_pre_hook", "full_backward_hook", "full_backward_pre_hook")
# The part that registers a hook, its method, and words of the error.
HOOKS = [
    *(("activation", f"register_{name}", "^module: 1: ReLU has hooks") for name in MODULE_HOOKS),
    *(("loss", f"register_{name}", "^loss_fn: CrossEntropyLoss has hooks") for name in MODULE_HOOKS),
    *(("modules", f"register_module_{name}", "has hooks for all modules") for name in MODULE_HOOKS),
    *(("optimizer", f"register_step_{end}_hook", "^optimizer: has step hooks") for end in ("pre", "post")),
    *(("optimizers", f"register_optimizer_step_{end}_hook", "hooks for all optimizers") for end in ("pre", "post")),
    ("bias", "register_hook", "^module: 0.bias has gradient hooks"),
    ("bias", "register_post_accumulate_grad_hook", "^module: 0.bias has gradient hooks"),
    ("graph", "register_multi_grad_hook", "^module: 0.bias has gradient hooks"),
]


@pytest.mark.parametrize(("part", "method", "words"), HOOKS)
def test_hooks_are_refused_before_fuse_and_after(part, method, words):
    pair = Pair()
    pair.steps()
    loss_fn = pair.step.loss_fn
    before = copy.deepcopy(pair.module.state_dict())
    bias, hook = pair.module[0].bias, lambda *_: None
    places = {"activation": pair.module[1], "loss": loss_fn, "optimizer": pair.optimizer, "bias": bias}
    places |= {"modules": modules, "optimizers": optimizers, "graph": torch.autograd.graph}
    handle = getattr(places[part], method)(*([[bias]] if part == "graph" else []), hook)
    try:
        with pytest.raises(ArgumentError, match=words):
            pair.step(*batch())
        with pytest.raises(ArgumentError, match=words):
            door.fuse(pair.module, loss_fn, pair.optimizer)
        torch.testing.assert_close(pair.module.state_dict(), before, rtol=0, atol=0)
    finally:
        handle.remove()
    pair.steps()


def test_all_labels_ignored():
    pair = Pair(close={**CLOSE, "equal_nan": True})
    x, y = batch()
    pair.check(x, y.fill_(-100))
    pair.steps()
