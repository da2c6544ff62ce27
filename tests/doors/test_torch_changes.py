"""A fused step follows every change since the previous one, or refuses it."""

import copy

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.modules import module as modules
from torch.optim import optimizer as optimizers
from torch_pair import CLOSE, Pair, adam, batch, each_optimizer, eager_step, make, rmsprop, sgd

import fusemlp.torch as door
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
    module, twin = make(), make()
    optimizer, eager = (torch.optim.Adam(one[2].parameters(), lr=0.01) for one in (module, twin))
    step = door.fuse(module, nn.CrossEntropyLoss(), optimizer)
    for seed in range(6):
        x, y = batch(seed=seed)
        torch.testing.assert_close(step(x, y), eager_step(twin, eager, x, y), **CLOSE)
        if seed == 2:
            for one, own in ((module, optimizer), (twin, eager)):
                own.add_param_group({"params": list(one[0].parameters()), "lr": 0.001})
    torch.testing.assert_close(module.state_dict(), twin.state_dict(), **CLOSE)


def test_options_of_the_groups_are_read_at_every_step():
    rate = torch.tensor(0.03, dtype=torch.float64)
    changes = {
        sgd: [("lr", 0.03), ("momentum", 0.5), ("weight_decay", 0.2), ("nesterov", True), ("lr", 1)],
        adam: [("lr", rate), ("betas", (0.5, 0.9)), ("eps", 1e-3), ("weight_decay", 0.2)],
    }
    for make_optimizer, options in changes.items():
        pair = Pair(make_optimizer=make_optimizer, weight_decay=0.01)
        for name, value in options:
            pair.both(lambda _, optimizer, name=name, value=value: optimizer.param_groups[0].update({name: value}))
            pair.steps(2)


def test_a_rate_held_in_a_tensor_is_followed():
    pair = Pair(lr=0.1)
    pair.both(lambda _, optimizer: optimizer.param_groups[0].update(lr=torch.tensor(0.1, dtype=torch.float64)))
    pair.steps(1)
    pair.both(lambda _, optimizer: optimizer.param_groups[0]["lr"].fill_(0.01))
    pair.steps(1)


def test_momentum_that_comes_later_is_refused():
    pair = Pair(momentum=0.0)
    pair.steps(1)
    pair.optimizer.param_groups[0]["momentum"] = 0.9
    with pytest.raises(ArgumentError, match=r"param_groups\[0\]\['momentum'\].*fuse again"):
        pair.step(*batch())
    pair.same()


def test_dropout_follows_the_mode():
    module = make(dropout=0.5)
    twin = copy.deepcopy(module).eval()
    optimizer, eager = sgd(module), sgd(twin)
    step = door.fuse(module, nn.CrossEntropyLoss(), optimizer, seed=4)
    x, y = batch()
    start = copy.deepcopy(module.state_dict())
    with_masks = [step(x, y).item()]
    module.load_state_dict(start)
    with_masks.append(step(x, y).item())
    assert with_masks[0] != with_masks[1]
    module.load_state_dict(start)
    optimizer.load_state_dict(sgd(make(dropout=0.5)).state_dict())
    module.eval()
    for seed in range(3):
        x, y = batch(seed=seed)
        torch.testing.assert_close(step(x, y), eager_step(twin, eager, x, y), **CLOSE)
    module.train()
    assert step(x, y).item() != eager_step(twin, eager, x, y).item()


def test_masks_come_from_the_seed_or_from_torchs_generator():
    def losses(seed):
        module = make(dropout=0.5)
        torch.manual_seed(8)
        step = door.fuse(module, nn.CrossEntropyLoss(), sgd(module), seed=seed)
        return [step(*batch(seed=i)).item() for i in range(3)]

    assert losses(1) == losses(1) and losses(None) == losses(None)
    assert len({tuple(losses(1)), tuple(losses(2)), tuple(losses(None))}) == 3


def test_dropout_keeps_the_mean_gradient():
    """Inverted dropout on one hidden layer of equal units keeps the mean loss over the masks."""
    module = nn.Sequential(nn.Linear(1, 4000), nn.Identity(), nn.Dropout(0.25), nn.Linear(4000, 1)).double()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.fill_(0.0)
        module[0].bias.fill_(1.0)
        module[3].weight.fill_(1.0 / 4000)
    step = door.fuse(module, nn.L1Loss(), torch.optim.SGD(module.parameters(), lr=0.0), seed=0)
    loss = step(torch.ones(50, 1, dtype=torch.float64), torch.zeros(50, 1, dtype=torch.float64)).item()
    # 200 000 draws of variance p / (1 - p): five standard deviations
    assert abs(loss - 1.0) < 5.0 * np.sqrt(0.25 / 0.75 / 200_000)


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
    "another activation of the same shape is followed": (lambda m: m.__setitem__(1, nn.Tanh()), None),
    "a BatchNorm": (lambda m: m.insert(1, nn.BatchNorm1d(8).double()), r"1: BatchNorm1d cannot be fused"),
    "nothing to train": (lambda m: m.requires_grad_(False), "nothing to train"),
}


@pytest.mark.parametrize("change, words", CHANGES.values(), ids=CHANGES.keys())
def test_changes_of_the_module_are_noticed(change, words):
    module = make()
    optimizer = sgd(module)
    step = door.fuse(module, nn.CrossEntropyLoss(), optimizer)
    step(*batch())
    change(module)
    if words is None:
        twin, (x, y) = copy.deepcopy(module), batch()
        torch.testing.assert_close(step(x, y), nn.CrossEntropyLoss()(twin(x), y).detach(), **CLOSE)
        return
    with pytest.raises(ArgumentError, match=words):
        step(*batch())


def test_fusing_again_retires_the_first_step():
    module = make()
    optimizer = sgd(module)
    first = door.fuse(module, nn.CrossEntropyLoss(), optimizer)
    first(*batch())
    second = door.fuse(module, nn.MSELoss(), optimizer)
    second(batch()[0], torch.zeros(10, 3, dtype=torch.float64))
    with pytest.raises(ArgumentError, match="another fuse"):
        first(*batch())
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    second(batch()[0], torch.zeros(10, 3, dtype=torch.float64))


def test_cleared_optimizer_state_starts_anew():
    pair = Pair(make_optimizer=adam)
    pair.steps()
    pair.both(lambda _, optimizer: optimizer.state.clear())
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
        return self.last(torch.tanh(x) if self.smooth else torch.relu(x))


def test_attributes_of_a_traced_module_are_noticed():
    torch.manual_seed(0)
    pair = Pair(Switched().double())
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
    pair = Pair()
    x, y = batch()
    y.fill_(-100)
    loss = pair.step(x, y)
    assert torch.isnan(loss) and torch.isnan(eager_step(pair.twin, pair.eager, x, y))
    pair.same()
    pair.steps()
