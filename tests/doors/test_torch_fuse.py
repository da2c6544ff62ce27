"""What goes on working around a fused step, and what is noticed between two steps."""

from __future__ import annotations

import copy
import io
import itertools
import pickle
import subprocess
import sys
import warnings
import weakref

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import fusemlp
import fusemlp.torch as door
from fusemlp_kernels.errors import ArgumentError

CLOSE = {"rtol": 1e-11, "atol": 1e-13}


def make(activation=nn.ReLU, *, dtype=torch.float64, dropout=None):
    torch.manual_seed(2)
    parts = [nn.Linear(6, 8), activation(), *([] if dropout is None else [nn.Dropout(dropout)]), nn.Linear(8, 3)]
    return nn.Sequential(*parts).to(dtype)


def batch(rows=10, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, 6, generator=generator, dtype=dtype)
    return x, torch.randint(0, 3, (rows,), generator=generator)


def eager_step(module, optimizer, x, y, loss_fn=None):
    optimizer.zero_grad()
    loss = (loss_fn or nn.CrossEntropyLoss())(module(x), y)
    loss.backward()
    optimizer.step()
    return loss.detach()


def sgd(module, **options):
    return torch.optim.SGD(module.parameters(), **{"lr": 0.1, "momentum": 0.9, **options})


def adam(module, **options):
    return torch.optim.Adam(module.parameters(), **{"lr": 0.01, **options})


OPTIMIZERS = pytest.mark.parametrize("make_optimizer", [sgd, adam])


class Pair:
    """A fused module and an eager twin."""

    def __init__(self, module=None, make_optimizer=sgd, **options):
        self.module = make() if module is None else module
        self.twin = copy.deepcopy(self.module)
        self.optimizer, self.eager = make_optimizer(self.module, **options), make_optimizer(self.twin, **options)
        self.step = door.fuse(self.module, nn.CrossEntropyLoss(), self.optimizer)
        self.seeds = itertools.count()

    def steps(self, count=3, rows=10):
        for _ in range(count):
            x, y = batch(rows, next(self.seeds))
            torch.testing.assert_close(self.step(x, y), eager_step(self.twin, self.eager, x, y), **CLOSE)
        self.same()

    def same(self):
        torch.testing.assert_close(self.module.state_dict(), self.twin.state_dict(), **CLOSE)

    def both(self, change):
        for module, optimizer in ((self.module, self.optimizer), (self.twin, self.eager)):
            change(module, optimizer)


def test_parameters_are_views_of_the_arena_and_stay_the_same_objects():
    module = make()
    parameters = list(module.parameters())
    step = door.fuse(module, nn.CrossEntropyLoss(), sgd(module))
    arena = step._memory.params
    start, stop = arena.ctypes.data, arena.ctypes.data + arena.nbytes
    for before, now in zip(parameters, module.parameters(), strict=True):
        assert now is before
        assert start <= now.data_ptr() < stop
    x, y = batch()
    outputs = module(x)
    step(x, y)
    assert not torch.equal(module(x), outputs)


def test_the_loss_is_a_tensor_of_its_own():
    module = make(dtype=torch.float32)
    step = door.fuse(module, nn.CrossEntropyLoss(), sgd(module))
    x, y = batch(dtype=torch.float32)
    first = step(x, y)
    value = first.item()
    step(x, y)
    assert first.shape == () and first.dtype == torch.float32 and not first.requires_grad
    assert first.item() == value


def test_fusing_changes_no_value():
    module, twin = make(), make()
    door.fuse(module, nn.CrossEntropyLoss(), adam(module), batch_size=10)
    torch.testing.assert_close(module.state_dict(), twin.state_dict(), rtol=0, atol=0)


@OPTIMIZERS
def test_any_batch_size(make_optimizer):
    pair = Pair(make_optimizer=make_optimizer)
    for rows in [10, 3, 1, 10, *range(11, 25), 100, 3, 13]:
        pair.steps(1, rows)


def test_non_contiguous_batches():
    pair = Pair()
    x, y = batch()
    for view in (x.t().contiguous().t(), x.flip(1).flip(1), torch.cat([x, x], 1)[:, :6]):
        torch.testing.assert_close(pair.step(view, y), eager_step(pair.twin, pair.eager, view, y), **CLOSE)
    pair.same()


@OPTIMIZERS
def test_module_state_can_be_loaded_between_steps(make_optimizer):
    pair = Pair(make_optimizer=make_optimizer)
    start = copy.deepcopy(pair.module.state_dict())
    pair.steps()
    pair.both(lambda module, _: module.load_state_dict(start))
    pair.steps()


@OPTIMIZERS
def test_optimizer_state_is_saved_and_loaded(make_optimizer):
    pair = Pair(make_optimizer=make_optimizer)
    pair.steps()
    saved = [copy.deepcopy(one.state_dict()) for one in (pair.optimizer, pair.eager)]
    pair.steps()
    pair.optimizer.load_state_dict(saved[0])
    pair.eager.load_state_dict(saved[1])
    pair.steps()
    # into a fresh pair, after fusing; and the eager state into the fused optimizer
    other = Pair(make_optimizer=make_optimizer)
    other.steps(1)
    other.optimizer.load_state_dict(saved[1])
    other.eager.load_state_dict(saved[1])
    other.both(lambda module, _: module.load_state_dict(pair.twin.state_dict()))
    other.steps()


def test_an_empty_optimizer_state_starts_anew():
    pair = Pair(make_optimizer=adam)
    empty = copy.deepcopy(adam(make()).state_dict())
    pair.steps()
    pair.both(lambda _, optimizer: optimizer.load_state_dict(empty))
    pair.steps()


@OPTIMIZERS
def test_an_optimizer_that_has_taken_steps_is_taken_over(make_optimizer):
    module, twin = make(), make()
    optimizer, eager = make_optimizer(module), make_optimizer(twin)
    for seed in range(3):
        eager_step(module, optimizer, *batch(seed=seed))
        eager_step(twin, eager, *batch(seed=seed))
    step = door.fuse(module, nn.CrossEntropyLoss(), optimizer)
    for seed in range(3, 6):
        x, y = batch(seed=seed)
        torch.testing.assert_close(step(x, y), eager_step(twin, eager, x, y), **CLOSE)


@OPTIMIZERS
def test_moments_are_live_views(make_optimizer):
    pair = Pair(make_optimizer=make_optimizer)
    pair.steps(1)
    name = {sgd: "momentum_buffer", adam: "exp_avg"}[make_optimizer]
    weight = pair.module[0].weight
    moment = pair.optimizer.state[weight][name]
    before = moment.clone()
    pair.steps(1)
    assert pair.optimizer.state[weight][name] is moment
    assert not torch.equal(moment, before)
    torch.testing.assert_close(pair.optimizer.state_dict()["state"], pair.eager.state_dict()["state"], **CLOSE)


@OPTIMIZERS
def test_the_eager_step_goes_on_working(make_optimizer):
    pair = Pair(make_optimizer=make_optimizer)
    pair.steps()
    x, y = batch(seed=99)
    pair.both(lambda module, optimizer: eager_step(module, optimizer, x, y))
    assert pair.module[0].weight.grad is not None
    pair.steps()
    assert pair.module[0].weight.grad is None


def test_a_graph_over_old_parameters_is_refused_by_torch():
    module = make()
    step = door.fuse(module, nn.CrossEntropyLoss(), sgd(module))
    x, y = batch()
    old = module(x).sum()
    step(x, y)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        old.backward()


@OPTIMIZERS
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
    pair = Pair(weight_decay=0.01)
    for name, value in [("lr", 0.03), ("momentum", 0.5), ("weight_decay", 0.2), ("nesterov", True), ("lr", 1)]:
        pair.both(lambda _, optimizer, name=name, value=value: optimizer.param_groups[0].update({name: value}))
        pair.steps(2)
    pair = Pair(make_optimizer=adam)
    for name, value in [
        ("lr", torch.tensor(0.03, dtype=torch.float64)),
        ("betas", (0.5, 0.9)),
        ("eps", 1e-3),
        ("weight_decay", 0.2),
    ]:
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
    """Inverted dropout with one hidden layer of equal units: the mean loss over masks is that of scaled outputs."""
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
    twin = copy.deepcopy(module)
    loss_fn = nn.CrossEntropyLoss(weight=torch.ones(3, dtype=torch.float64))
    optimizer, eager = sgd(module), sgd(twin)
    step = door.fuse(module, loss_fn, optimizer)

    def change(number):
        if number == 1:
            module[1].negative_slope = twin[1].negative_slope = 0.5
        if number == 2:
            loss_fn.label_smoothing = 0.2
        if number == 3:
            loss_fn.weight[0] = 4.0
        if number == 4:
            loss_fn.reduction = "sum"

    for number in range(5):
        change(number)
        x, y = batch(seed=number)
        torch.testing.assert_close(step(x, y), eager_step(twin, eager, x, y, loss_fn), **CLOSE)


CHANGES = {
    "module.float()": (lambda m: m.float(), r"memory of 0\.weight was replaced"),
    "param.data": (lambda m: setattr(m[2].bias, "data", torch.zeros(3).double()), r"memory of 2\.bias was replaced"),
    "a new parameter": (
        lambda m: setattr(m[0], "weight", nn.Parameter(torch.zeros(8, 6).double())),
        r"0\.weight is not the parameter that was fused",
    ),
    "load_state_dict(assign=True)": (
        lambda m: m.load_state_dict({k: v.clone() for k, v in m.state_dict().items()}, assign=True),
        r"0\.weight is not the parameter",
    ),
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


@OPTIMIZERS
def test_replaced_moments_are_taken_over(make_optimizer):
    pair = Pair(make_optimizer=make_optimizer)
    pair.steps()
    name = {sgd: "momentum_buffer", adam: "exp_avg"}[make_optimizer]

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


def test_hooks_that_come_later_are_refused():
    pair = Pair()
    pair.steps()
    handle = pair.module[1].register_forward_hook(lambda *_: None)
    with pytest.raises(ArgumentError, match="1: ReLU has hooks"):
        pair.step(*batch())
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


def test_no_warning_of_schedulers():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        module = make()
        optimizer = sgd(module)
        early = torch.optim.lr_scheduler.StepLR(optimizer, 1)
        step = door.fuse(module, nn.CrossEntropyLoss(), optimizer)
        late = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
        step(*batch())
        early.step()
        late.step()
        step(*batch())
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.1 * 0.1 * 0.9)


def test_reduce_on_plateau():
    pair = Pair()
    plateaus = [torch.optim.lr_scheduler.ReduceLROnPlateau(one, patience=0) for one in (pair.optimizer, pair.eager)]
    for value in (1.0, 2.0, 3.0, 2.0):
        pair.steps(1)
        for plateau in plateaus:
            plateau.step(value)
    assert pair.optimizer.param_groups[0]["lr"] < 0.1


def test_saving_copying_and_evaluating():
    module = make()
    optimizer = adam(module)
    step = door.fuse(module, nn.CrossEntropyLoss(), optimizer)
    step(*batch())
    stream = io.BytesIO()
    torch.save({"module": module.state_dict(), "optimizer": optimizer.state_dict()}, stream)
    # each tensor is saved by itself, not with the whole arena
    assert stream.tell() < 20_000
    stream.seek(0)
    loaded = torch.load(stream)
    other = make()
    other.load_state_dict(loaded["module"])
    x, _ = batch()
    assert torch.equal(other(x), module(x))
    for copied in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert torch.equal(copied(x), module(x))
        assert copied[0].weight.data_ptr() != module[0].weight.data_ptr()


def test_a_failed_step_changes_nothing():
    pair = Pair()
    pair.steps(1)
    x, y = batch()
    y[3] = 3
    with pytest.raises(fusemlp.DataError, match="target 3 in row 3 is out of bounds"):
        pair.step(x, y)
    pair.same()
    pair.steps()


class Nested(nn.Module):
    """Traced: children, functions, a view and a squeeze."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(6, 8), nn.Sequential(nn.Tanh(), nn.Linear(8, 5, bias=False)))
        self.drop = nn.Dropout(0.0)
        self.head = nn.Linear(5, 1)

    def forward(self, x):
        x = x.view(x.size(0), -1)
        x = self.drop(torch.relu(self.body(x)))
        return self.head(x).squeeze(-1)


def test_a_traced_module():
    torch.manual_seed(0)
    module = Nested().double()
    twin = copy.deepcopy(module)
    optimizer, eager = adam(module), adam(twin)
    loss_fn = nn.BCEWithLogitsLoss()
    step = door.fuse(module, loss_fn, optimizer)
    for seed in range(5):
        x, y = batch(seed=seed)
        x, y = x.reshape(10, 2, 3), (y > 0).double()
        torch.testing.assert_close(step(x, y), eager_step(twin, eager, x, y, loss_fn), **CLOSE)
    torch.testing.assert_close(module.state_dict(), twin.state_dict(), **CLOSE)
    assert list(module.state_dict()) == list(twin.state_dict())


def test_flatten_in_front_and_nesting():
    torch.manual_seed(0)
    module = nn.Sequential(nn.Flatten(), nn.Sequential(nn.Linear(6, 4), nn.Sequential(nn.PReLU())), nn.Linear(4, 3))
    pair = Pair(module.double())
    for seed in range(3):
        x, y = batch(seed=seed)
        x = x.reshape(10, 3, 2)
        torch.testing.assert_close(pair.step(x, y), eager_step(pair.twin, pair.eager, x, y), **CLOSE)
    pair.same()


def test_layers_without_bias():
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(6, 4, bias=False), nn.GELU(), nn.Linear(4, 3, bias=False)).double()
    Pair(module, adam).steps()


def test_a_loop_over_a_data_loader_on_digits():
    """Two lines of the loop change; the last batch is short."""
    digits = load_digits()
    X = torch.from_numpy(digits.data / 16.0).float()
    y = torch.from_numpy(digits.target)
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Dropout(0.1), nn.Linear(32, 10))
    optimizer = torch.optim.Adam(module.parameters(), lr=1e-2)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=10)
    loader = DataLoader(TensorDataset(X[:1500], y[:1500]), batch_size=64, shuffle=True)
    step = door.fuse(module, nn.CrossEntropyLoss(), optimizer)
    for _ in range(10):
        for inputs, labels in loader:
            loss = step(inputs, labels)
        scheduler.step()
    assert loss < 1.0
    module.eval()
    assert (module(X).argmax(dim=1) == y).double().mean() > 0.93


def test_steps_that_are_dropped_leave_the_optimizer_alone():
    module = make()
    optimizer = adam(module)
    reference = weakref.ref(door.fuse(module, nn.CrossEntropyLoss(), optimizer))
    assert reference() is None
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    eager_step(module, optimizer, *batch())


def test_a_step_prints_its_program():
    pair = Pair(momentum=0.0)
    pair.steps(1)
    assert "grad_weight_update sgd" in str(pair.step.program)
    assert "10x8x6" in str(pair.step.program)
    assert "SGD" in repr(pair.step) and "numpy" in repr(pair.step)


def test_importing_the_package_leaves_torch_alone():
    """``import fusemlp`` does not import torch; touching ``fusemlp.torch`` does."""
    code = (
        "import sys, fusemlp; assert 'torch' not in sys.modules; "
        "assert fusemlp.torch.fuse is not None; assert 'torch' in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
