"""Code around a fused step keeps working: loops, states, schedulers, saving, other ways to write a module."""

import copy
import gc
import io
import pickle
import warnings
import weakref
from functools import partial

import pytest
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from torch_pair import Pair, adam, batch, each_optimizer, eager_step, make, rmsprop, sgd

import fusemlp
import fusemlp.torch as door


def test_parameters_are_views_of_the_arena_and_stay_the_same_objects():
    module = make()
    parameters = list(module.parameters())
    step = door.fuse(module, nn.CrossEntropyLoss(), sgd(module.parameters()))
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
    step = door.fuse(module, nn.CrossEntropyLoss(), sgd(module.parameters()))
    x, y = batch(dtype=torch.float32)
    first = step(x, y)
    value = first.item()
    step(x, y)
    assert first.shape == () and first.dtype == torch.float32 and not first.requires_grad
    assert first.item() == value


@each_optimizer
def test_any_batch_size(make_optimizer):
    pair = Pair(make_optimizer=make_optimizer)
    for rows in [10, 3, 1, 10, *range(11, 25), 100, 3, 13]:
        pair.steps(1, rows)


def test_non_contiguous_batches():
    pair = Pair()
    x, y = batch()
    for view in (x.t().contiguous().t(), x.flip(1).flip(1), torch.cat([x, x], 1)[:, :6]):
        pair.check(view, y)
    pair.same()


@each_optimizer
def test_module_state_can_be_loaded_between_steps(make_optimizer):
    pair = Pair(make_optimizer=make_optimizer)
    start = copy.deepcopy(pair.module.state_dict())
    pair.steps()
    pair.both(lambda module, _: module.load_state_dict(start))
    pair.steps()


@each_optimizer
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


@each_optimizer
def test_an_optimizer_that_has_taken_steps_is_taken_over(make_optimizer):
    pair = Pair(make_optimizer=make_optimizer)
    for seed in range(3):
        pair.both(lambda module, optimizer, seed=seed: eager_step(module, optimizer, *batch(seed=seed)))
    pair.step = door.fuse(pair.module, pair.loss_fn, pair.optimizer)
    pair.steps()


@each_optimizer
def test_moments_are_live_views(make_optimizer):
    pair = Pair(make_optimizer=make_optimizer)
    pair.steps(1)
    name = {sgd: "momentum_buffer", adam: "exp_avg", rmsprop: "square_avg"}[make_optimizer]
    weight = pair.module[0].weight
    moment = pair.optimizer.state[weight][name]
    before = moment.clone()
    pair.steps(1)
    assert pair.optimizer.state[weight][name] is moment
    assert not torch.equal(moment, before)
    pair.same_moments()


@each_optimizer
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
    step = door.fuse(module, nn.CrossEntropyLoss(), sgd(module.parameters()))
    x, y = batch()
    old = module(x).sum()
    step(x, y)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        old.backward()


def test_no_warning_of_schedulers():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        module = make()
        optimizer = sgd(module.parameters())
        early = torch.optim.lr_scheduler.StepLR(optimizer, 1)
        step = door.fuse(module, nn.CrossEntropyLoss(), optimizer)
        late = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
        step(*batch())
        early.step()
        late.step()
        step(*batch())
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.1 * 0.1 * 0.9)


def test_saving_copying_and_evaluating():
    module = make()
    optimizer = adam(module.parameters())
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
    with pytest.raises(fusemlp.DataError, match="label 3 at row 3 is not one of the 3 classes"):
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


class Functions(nn.Module):
    """Traced: functions with options."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(6, 5), nn.Linear(5, 4), nn.Linear(4, 3)])

    def forward(self, x):
        x = nn.functional.leaky_relu(self.layers[0](x.flatten(1)), negative_slope=0.3, inplace=True)
        return self.layers[2](nn.functional.gelu(self.layers[1](x.contiguous())))


SHARED = nn.Tanh()
CLASSES = nn.CrossEntropyLoss(), lambda labels: labels
# Modules, the shapes of their rows, their losses, and their targets from labels.
MODULES = {
    "nested, traced": (Nested, (2, 3), nn.BCEWithLogitsLoss(), lambda labels: (labels > 0).double()),
    "nested, flattened": (
        lambda: nn.Sequential(nn.Flatten(), nn.Sequential(nn.Linear(6, 4), nn.Sequential(nn.PReLU())), nn.Linear(4, 3)),
        (3, 2),
        *CLASSES,
    ),
    "a part in two places": (
        lambda: nn.Sequential(nn.Identity(), nn.Linear(6, 4), SHARED, nn.Linear(4, 5), SHARED, nn.Linear(5, 3)),
        (6,),
        *CLASSES,
    ),
    "without bias": (
        lambda: nn.Sequential(nn.Linear(6, 4, bias=False), nn.GELU(), nn.Linear(4, 3, bias=False)),
        (6,),
        *CLASSES,
    ),
    "functions with options": (Functions, (6,), *CLASSES),
    "flattened outputs": (
        lambda: nn.Sequential(nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 1), nn.Flatten(0)),
        (6,),
        nn.functional.poisson_nll_loss,
        torch.Tensor.double,
    ),
}


@pytest.mark.parametrize(("build", "shape", "loss_fn", "targets"), MODULES.values(), ids=MODULES)
def test_modules_of_other_forms(build, shape, loss_fn, targets):
    torch.manual_seed(0)
    pair = Pair(build().double(), adam, loss_fn)
    for seed in range(5):
        x, labels = batch(seed=seed)
        pair.check(x.reshape(10, *shape), targets(labels))
    pair.same()


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


@pytest.mark.parametrize("options", [{}, {"return_output": True}])
def test_numbers_that_overflow_make_no_warning(options):
    module = make(dtype=torch.float32)
    step = door.fuse(module, nn.MSELoss(), adam(module.parameters()))
    x, y = torch.full((4, 6), 1e38), torch.zeros(4, 3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(3):
            step(x, y, **options)
    assert module[0].weight.isnan().any()


def test_steps_that_are_dropped_leave_the_optimizer_alone():
    module = make()
    optimizer = adam(module.parameters())
    reference = weakref.ref(door.fuse(module, nn.CrossEntropyLoss(), optimizer))
    assert reference() is None
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    eager_step(module, optimizer, *batch())


def test_memory_is_freed_with_the_step():
    """Without the garbage collector: nothing holds the memory in a ring."""
    module = make()
    rates = [{"params": [*module[0].parameters()], "lr": 0.2}, {"params": [*module[2].parameters()]}]
    optimizer = torch.optim.SGD(rates, lr=0.1)
    gc.disable()
    try:
        loss_fn = nn.BCEWithLogitsLoss(pos_weight=torch.tensor(2.0))
        step = door.fuse(module, loss_fn, optimizer, clip_grad_norm=1.0)
        x, _ = batch()
        step(x, (x[:, :3] > 0.0).double(), return_output=True)
        programs = weakref.ref(step._programs)
        del step
        assert programs() is None
    finally:
        gc.enable()


def test_a_step_prints_its_program():
    pair = Pair(make_optimizer=partial(sgd, momentum=0.0))
    pair.steps(1)
    assert "grad_weight_update sgd" in str(pair.step.program)
    assert "10x8x6" in str(pair.step.program)
    assert "SGD" in repr(pair.step) and "numpy" in repr(pair.step)
