"""``fuse`` refuses unsupported parts by name, with the module's path, before anything has changed."""

import copy
import inspect
import pickle
import re

import numpy as np
import pytest
import torch
from torch import nn, optim
from torch_pair import Block

from fusemlp import (
    ArgumentError,
    ArgumentTypeError,
    BackendUnavailableError,
    DataError,
    DTypeError,
    Residual,
    ShapeError,
)
from fusemlp.torch import FusedMLP, fuse


def plain():
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))


class Stacked(nn.Module):
    def __init__(self, *blocks):
        super().__init__()
        self.blocks = nn.Sequential(*blocks)

    def forward(self, x):
        return self.blocks(x)


class Forward(nn.Module):
    """A module with two Linears and a given forward."""

    def __init__(self, function, **parts):
        super().__init__()
        self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 3)
        self.function = function
        for name, part in parts.items():
            self.add_module(name, part)

    def forward(self, x):
        return self.function(self, x)


class Inputs(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.Linear(6, 3)

    def forward(self, x, y):
        return self.a(x) + y


def tied():
    module = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6))
    module[2].weight = module[0].weight
    return module


def normed():
    module = plain()
    nn.utils.parametrizations.weight_norm(module[0])
    return module


def with_parts(*parts):
    return lambda: nn.Sequential(nn.Linear(6, 8), *parts, nn.Linear(8, 3))


def with_block(*parts):
    """A block of 8 inputs and outputs, before an output layer."""
    return lambda: nn.Sequential(nn.Linear(6, 8), nn.ReLU(), Block(*parts), nn.Linear(8, 3))


TWO = nn.Linear(8, 5), nn.Linear(5, 8)


def functional_dropout(m, x):
    return m.b(nn.functional.dropout(m.a(x), 0.1, m.training))


def branching(m, x):
    if x.sum() > 0:
        x = m.a(x)
    return m.b(x)


def residual(m, x):
    h = m.a(x)
    return m.b(x + h)


def subtracting(m, x):
    h = m.a(x)
    return m.b(x - h)


def dense(m, x):
    x = m.a(x)
    y = x + m.block(x)
    return m.b(x + m.block2(y))


def grouping(m, x):
    return m.b(m.norm(m.a(x)))


def softsign(m, x):
    return m.b(nn.functional.softsign(m.a(x)))


def line_of(function, code, words):
    """Return a pattern of the error about a line of a function."""
    lines, first = inspect.getsourcelines(function)
    number = first + [line.strip() for line in lines].index(code)
    return rf"test_torch_refusals\.py:{number} \({re.escape(code)}\): {re.escape(words)}"


MODULES = {
    "BatchNorm": (with_parts(nn.BatchNorm1d(8)), r"1: BatchNorm1d cannot be fused; fold it"),
    "GroupNorm, deep": (lambda: Stacked(nn.Linear(6, 8), nn.Sequential(nn.GroupNorm(2, 8))), r"blocks\.1\.0: GroupN"),
    "LayerNorm of inputs": (lambda: nn.Sequential(nn.LayerNorm(6), *plain()), r"0: LayerNorm: only Flatten"),
    "LayerNorm of outputs": (
        lambda: nn.Sequential(*plain(), nn.LayerNorm(3)),
        r"3: LayerNorm: the outputs of the last",
    ),
    "LayerNorm, behind": (
        with_parts(nn.ReLU(), nn.LayerNorm(8)),
        "2: LayerNorm after 1: ReLU: put it between the Linear and",
    ),
    "LayerNorm, dropped": (with_parts(nn.Dropout(), nn.LayerNorm(8)), "2: LayerNorm after 1: Dropout: put it betw"),
    "two norms": (with_parts(nn.RMSNorm(8), nn.LayerNorm(8)), "2: LayerNorm: a second norm on one layer, after 1: RMS"),
    "LayerNorm of images": (with_parts(nn.LayerNorm((2, 4))), r"1: LayerNorm\(\(2, 4\).*: expected one width"),
    "LayerNorm of others": (with_parts(nn.LayerNorm(4)), r"1: LayerNorm: LayerNorm\(\(4,\).* is given 8 features"),
    "LayerNorm without weight": (
        with_parts(nn.LayerNorm(8, elementwise_affine=False)),
        "elementwise_affine=True, whose",
    ),
    "RMSNorm without eps": (with_parts(nn.RMSNorm(8, eps=0.0)), "and eps > 0"),
    "LayerNorm and PReLU": (with_parts(nn.LayerNorm(8), nn.PReLU()), "prelu's slope is not learned beside normalised"),
    "Conv": (lambda: nn.Sequential(nn.Conv2d(1, 2, 3), nn.Flatten(), nn.Linear(8, 3)), r"0: Conv2d .* FusedMLP"),
    "named": (lambda: nn.Sequential(nn.Linear(6, 8), Stacked(nn.Conv2d(1, 2, 3))), r"1\.blocks\.0: Conv2d"),
    "softmax": (lambda: nn.Sequential(*plain(), nn.Softmax(1)), r"3: Softmax .* CrossEntropyLoss takes logits"),
    "log_softmax of rows": (lambda: nn.Sequential(*plain(), nn.LogSoftmax(0)), r"3: LogSoftmax\(dim=0\): only"),
    "after log_softmax": (lambda: nn.Sequential(*plain(), nn.LogSoftmax(1), nn.ReLU()), "4: ReLU: nothing can follow"),
    "log_softmax for cross-entropy": (lambda: nn.Sequential(*plain(), nn.LogSoftmax(1)), "use NLLLoss, or leave"),
    "CELU": (with_parts(nn.CELU()), r"1: CELU cannot be fused; use ELU"),
    "negative alpha": (with_parts(nn.ELU(-0.1)), r"1: ELU\(alpha=-0\.1\): expected alpha >= 0"),
    "scaled softplus": (with_parts(nn.Softplus(2)), r"1: Softplus\(beta=2.*\): expected beta 1 and a threshold >= 20"),
    "tanh GELU": (with_parts(nn.GELU(approximate="tanh")), r"1: GELU\(approximate='tanh'\)"),
    "PReLU of many": (with_parts(nn.PReLU(8)), r"1: PReLU\(num_parameters=8\): one slope"),
    "negative slope": (
        with_parts(nn.LeakyReLU(-0.1)),
        r"1: LeakyReLU\(negative_slope=-0\.1\): expected negative_slope",
    ),
    "two activations": (with_parts(nn.ReLU(), nn.Tanh()), r"2: Tanh: a second activation .* 1: ReLU"),
    "two dropouts": (with_parts(nn.ReLU(), nn.Dropout(), nn.Dropout()), r"3: Dropout: a second dropout"),
    "dropout before tanh": (with_parts(nn.Dropout(), nn.Tanh()), r"2: Tanh after 1: Dropout: put the Dropout behind"),
    "all dropped": (with_parts(nn.Dropout(1.0)), r"1: Dropout\(p=1\.0, inplace=False\): drops everything"),
    "dropout of outputs": (lambda: nn.Sequential(*plain(), nn.Dropout()), r"3: Dropout: .* would drop outputs"),
    "dropout of inputs": (lambda: nn.Sequential(nn.Dropout(), *plain()), r"0: Dropout: only Flatten"),
    "flattening rows": (lambda: nn.Sequential(nn.Flatten(0), *plain()), r"0: Flatten: only Flatten\(1\)"),
    "widths": (lambda: nn.Sequential(nn.Linear(6, 8), nn.Linear(7, 3)), r"1: Linear takes 7 features, it is given 8"),
    "no Linear": (lambda: nn.Sequential(nn.Flatten()), "has no Linear"),
    "tied": (tied, r"2\.weight and 0\.weight are one tensor; tied"),
    "parametrised": (normed, r"0: ParametrizedLinear cannot be fused"),
    "used twice": (lambda: Forward(lambda m, x: m.b(m.a(m.a(x)))), r"a\.weight and a\.weight are one tensor"),
    "residual": (
        lambda: Forward(residual),
        line_of(residual, "return m.b(x + h)", "Forward: residual connection: the"),
    ),
    "residual, deep": (
        lambda: Stacked(Forward(residual)),
        "Stacked: residual connection: the block adds the inputs of",
    ),
    "a difference": (lambda: Forward(subtracting), line_of(subtracting, "return m.b(x - h)", "a branch or a second")),
    "blocks across": (
        lambda: Forward(dense, block=nn.Sequential(nn.Linear(6, 4), nn.Linear(4, 6)), block2=nn.Linear(6, 6)),
        line_of(dense, "y = x + m.block(x)", "Forward: residual connection: the block stands within another"),
    ),
    "blocks within": (with_block(*TWO, Block(*TWO)), "2: Block: residual connection: the block stands within another"),
    "a short block": (with_block(nn.Linear(8, 8)), "the block has fewer than two Linears. What can be fused is x"),
    "an empty block": (with_block(nn.Identity()), "the block has fewer than two Linears"),
    "activation in front": (with_block(nn.ReLU(), *TWO), r"the block has 2\.0: ReLU at its beginning or after its sum"),
    "norm in front": (with_block(nn.LayerNorm(8), *TWO), r"the block has 2\.0: LayerNorm at its beginning or after"),
    "activation in the sum": (with_block(*TWO, nn.ReLU()), r"the block has 2\.2: ReLU after its last Linear; remove"),
    "activation of the sum": (
        lambda: nn.Sequential(*with_block(*TWO)()[:3], nn.ReLU()),
        "has 3: ReLU at its beginning",
    ),
    "block at the end": (lambda: with_block(*TWO)()[:3], "the block has no Linear after it; add the output layer"),
    "a broadcast sum": (with_block(nn.Linear(8, 5), nn.Linear(5, 1)), r"the block has the widths \[8, 5, 1\]"),
    "uneven block": (with_block(nn.Linear(8, 5), nn.Linear(5, 4), nn.Linear(4, 8)), r"widths \[8, 5, 4, 8\]"),
    "GroupNorm in a forward": (
        lambda: Forward(grouping, norm=nn.GroupNorm(2, 6)),
        line_of(grouping, "return m.b(m.norm(m.a(x)))", "norm: GroupNorm cannot be fused"),
    ),
    "functional dropout": (
        lambda: Forward(functional_dropout),
        line_of(
            functional_dropout, "return m.b(nn.functional.dropout(m.a(x), 0.1, m.training))", "dropout cannot be fused"
        ),
    ),
    "branch": (
        lambda: Forward(branching),
        line_of(branching, "if x.sum() > 0:", "torch.fx cannot trace its forward: it"),
    ),
    "softsign": (
        lambda: Forward(softsign),
        line_of(softsign, "return m.b(nn.functional.softsign(m.a(x)))", "softsign cannot be fused"),
    ),
    "options of a function": (
        lambda: Forward(lambda m, x: m.b(nn.functional.log_softmax(m.a(x), 1, dtype=torch.float64))),
        "log_softmax cannot be fused with these options",
    ),
    "tanh gelu": (
        lambda: Forward(lambda m, x: m.b(nn.functional.gelu(m.a(x), approximate="tanh"))),
        r"test_torch_refusals.py:\d+ .* Forward: gelu: GELU\(approximate='tanh'\): only the exact",
    ),
    "scaled": (lambda: Forward(lambda m, x: m.b(m.a(x) * 2.0)), "mul cannot be fused"),
    "a half result": (
        lambda: Forward(lambda m, x: (m.b(m.a(x)), x)),
        r"test_torch_refusals.py:\d+: forward must return the one result",
    ),
    "squeeze": (lambda: Forward(lambda m, x: m.b(m.a(x)).squeeze(-1)), "squeezes 3 outputs"),
    "two inputs": (Inputs, r"test_torch_refusals.py:\d+: forward takes a second input, 'y'"),
    "half": (lambda: plain().half(), r"0\.weight is torch\.float16, expected"),
    "mixed types": (lambda: nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 3).double()), r"1\.weight is torch\.float64"),
    "compiled": (lambda: torch.compile(plain(), backend="eager"), r"OptimizedModule cannot be fused; .*_orig_mod"),
}


@pytest.mark.parametrize("make, words", MODULES.values(), ids=MODULES.keys())
def test_modules(make, words):
    module = make()
    optimizer = optim.SGD(module.parameters() if list(module.parameters()) else [torch.zeros(1)], lr=0.1)
    places = {name: parameter.data_ptr() for name, parameter in module.named_parameters()}
    modes = [one.training for one in module.modules()]
    with pytest.raises((ArgumentError, DTypeError), match=words):
        fuse(module, nn.CrossEntropyLoss(), optimizer)
    assert {name: parameter.data_ptr() for name, parameter in module.named_parameters()} == places
    assert [one.training for one in module.modules()] == modes
    assert not optimizer.state


def test_fused_mlp_has_no_blocks():
    with pytest.raises(ArgumentError, match=r"sizes: FusedMLP is a chain of layers; add within your module"):
        FusedMLP([6, 8, Residual(8), 3])


def test_homogeneous_activations_allow_dropout_in_front():
    module = nn.Sequential(nn.Linear(6, 8), nn.Dropout(0.5), nn.ReLU(), nn.Linear(8, 3))
    step = fuse(module, nn.CrossEntropyLoss(), optim.SGD(module.parameters(), lr=0.1))
    assert "linear relu dropout 0.5" in str(step.program)


LOSSES = {
    "none": (nn.MSELoss(reduction="none"), r"MSELoss\(reduction='none'\)"),
    "nll": (nn.NLLLoss(), "the module does not end with LogSoftmax; add nn.LogSoftmax"),
    "positive weights": (nn.BCEWithLogitsLoss(pos_weight=torch.ones(4)), r"pos_weight has shape \(4,\), .* or \(3,\)"),
    "a column of weights": (nn.BCEWithLogitsLoss(pos_weight=torch.ones(3, 1)), r"pos_weight has shape \(3, 1\)"),
    "weights of the wrong length": (nn.CrossEntropyLoss(weight=torch.ones(4)), "expected 3 weights"),
    "a name": ("mse", r"'mse' is no loss; use nn\.MSELoss\(\), or a function"),
    "a class": (nn.MSELoss, r"MSELoss'> is no loss; use MSELoss\(\)"),
}


@pytest.mark.parametrize("loss_fn, words", LOSSES.values(), ids=LOSSES.keys())
def test_losses(loss_fn, words):
    module = plain()
    with pytest.raises((ArgumentError, ArgumentTypeError, ShapeError), match=words):
        fuse(module, loss_fn, optim.SGD(module.parameters(), lr=0.1))


class Own(optim.SGD):
    pass


OPTIMIZERS = {
    "Adagrad": (lambda p: optim.Adagrad(p), "Adagrad cannot be fused; expected .* RMSprop"),
    "RMSprop, momentum": (lambda p: optim.RMSprop(p, momentum=0.9), r"momentum=0\.9 cannot be fused \(its veloc.*set"),
    "RMSprop, centered": (lambda p: optim.RMSprop(p, centered=True), "centered=True cannot be fused .* set it to F"),
    "a subclass": (lambda p: Own(p, lr=0.1), "Own cannot be fused"),
    "a name": (lambda p: "sgd", "got 'sgd'"),
    "amsgrad": (lambda p: optim.Adam(p, amsgrad=True), r"param_groups\[0\]: amsgrad=True .*third mom.* to False"),
    "maximize": (lambda p: optim.SGD(p, lr=0.1, maximize=True), r"maximize=True"),
    "differentiable": (lambda p: optim.SGD(p, lr=0.1, differentiable=True), r"differentiable=True"),
    "dampening": (lambda p: optim.SGD(p, lr=0.1, momentum=0.9, dampening=0.5), r"dampening=0\.5"),
    "a stranger": (
        lambda p: optim.SGD([*p, nn.Parameter(torch.zeros(3))], lr=0.1),
        r"param_groups\[0\]\['params'\]\[4\], of shape \(3,\), is no parameter of the module",
    ),
    "only strangers": (lambda p: optim.SGD([nn.Parameter(torch.zeros(3))], lr=0.1), "is no parameter"),
}


@pytest.mark.parametrize("make, words", OPTIMIZERS.values(), ids=OPTIMIZERS.keys())
def test_optimizers(make, words):
    module = plain()
    with pytest.raises((ArgumentError, ArgumentTypeError), match=words):
        fuse(module, nn.CrossEntropyLoss(), make(list(module.parameters())))


def test_options_that_come_later():
    module = plain()
    optimizer = optim.Adam(module.parameters())
    step = fuse(module, nn.CrossEntropyLoss(), optimizer)
    x, y = torch.randn(4, 6), torch.zeros(4, dtype=torch.int64)
    optimizer.param_groups[0]["amsgrad"] = True
    before = copy.deepcopy(module.state_dict())
    with pytest.raises(ArgumentError, match="amsgrad"):
        step(x, y)
    optimizer.param_groups[0].update(amsgrad=False, lr=float("nan"))
    with pytest.raises(ArgumentError, match=r"\['lr'\]: expected a finite number"):
        step(x, y)
    torch.testing.assert_close(module.state_dict(), before, rtol=0, atol=0)


def test_arguments():
    module = plain()
    optimizer = optim.SGD(module.parameters(), lr=0.1)
    for options, error, words in [
        ({"batch_size": 0}, ArgumentError, "batch_size"),
        ({"clip_grad_norm": 0.0}, ArgumentError, "clip_grad_norm: expected a finite number above 0"),
        ({"backend": "nmpy"}, ArgumentError, "numpy"),
        ({"backend": "cupy"}, BackendUnavailableError, "cupy"),
        ({"max_norm": 1.0}, ArgumentTypeError, "max_norm: it is called clip_grad_norm here"),
        ({"seed": -1}, ArgumentError, "seed"),
        ({"precision": "fp64"}, ArgumentError, "torch.float32 can have fp32 or tf32, got 'fp64'"),
        ({"precision": "tf32"}, BackendUnavailableError, "numpy backend offers"),
    ]:
        with pytest.raises(error, match=words):
            fuse(module, nn.CrossEntropyLoss(), optimizer, **options)
    with pytest.raises(ArgumentTypeError, match=r"expected a torch\.nn\.Module"):
        fuse(lambda x: x, nn.CrossEntropyLoss(), optimizer)
    with pytest.raises(ArgumentError, match="nothing to train"):
        fuse(module.requires_grad_(False), nn.CrossEntropyLoss(), optimizer)


X, Y = torch.zeros(4, 6), torch.zeros(4, dtype=torch.int64)
BATCHES = {
    "array": (np.zeros((4, 6)), Y, ArgumentTypeError, "x: expected a torch.Tensor, got ndarray"),
    "list": (X, [0, 1, 2, 0], ArgumentTypeError, "y: expected a torch.Tensor, got list"),
    "width": (torch.zeros(4, 5), Y, ShapeError, r"x: expected shape \(rows, 6\), got \(4, 5\)"),
    "one row": (torch.zeros(6), Y[:1], ShapeError, r"got \(6,\)"),
    "three dimensions": (torch.zeros(4, 2, 3), Y, ShapeError, r"got \(4, 2, 3\)"),
    "no rows": (torch.zeros(0, 6), Y[:0], ShapeError, "at least one row"),
    "double": (X.double(), Y, DTypeError, r"x: expected torch\.float32, .* got torch\.float64"),
    "integers": (X.long(), Y, DTypeError, "x: expected"),
    "requires grad": (torch.zeros(4, 6, requires_grad=True), Y, ArgumentError, r"x: requires grad"),
    "sparse": (X.to_sparse(), Y, ArgumentTypeError, "x: expected a dense tensor"),
    "meta": (X.to("meta"), Y, ArgumentError, "x: is on meta"),
    "rows of y": (X, Y[:3], ShapeError, r"y: expected shape \(4,\) .* got \(3,\)"),
    "shape of y": (X, Y.reshape(4, 1), ShapeError, r"got \(4, 1\)"),
    "int32 labels": (X, Y.int(), DTypeError, r"torch\.int64, got torch\.int32; use y\.long"),
    "real labels": (X, Y.float(), DTypeError, "class indices"),
    "label too large": (X, Y + 3, DataError, "y: label 3 at row 0 .* 3 classes 0 to 2"),
    "negative label": (X, Y - 1, DataError, "y: label -1 at row 0"),
    "double probabilities": (X, torch.zeros(4, 3).double(), DTypeError, "y: expected torch.float32"),
}


@pytest.mark.parametrize("x, y, error, words", BATCHES.values(), ids=BATCHES.keys())
@pytest.mark.parametrize("seen", [False, True], ids=["first step", "later step"])
def test_batches(x, y, error, words, seen):
    module = plain()
    step = fuse(module, nn.CrossEntropyLoss(), optim.Adam(module.parameters()))
    if seen:
        step(X, Y)
    before = copy.deepcopy([module.state_dict(), step.optimizer.state_dict()])
    with pytest.raises(error, match=words):
        step(x, y)
    torch.testing.assert_close([module.state_dict(), step.optimizer.state_dict()], before, rtol=0, atol=0)


def test_targets_that_torch_would_broadcast():
    module = nn.Sequential(nn.Linear(6, 1))
    step = fuse(module, nn.MSELoss(), optim.SGD(module.parameters(), lr=0.1))
    with pytest.raises(ShapeError, match=r"y: expected shape \(4, 1\).*got \(4,\); torch would broadcast"):
        step(X, torch.zeros(4))


def test_probabilities_for_nll():
    module = nn.Sequential(*plain(), nn.LogSoftmax(1))
    step = fuse(module, nn.NLLLoss(), optim.SGD(module.parameters(), lr=0.1))
    with pytest.raises(ShapeError, match=r"y: expected shape \(4,\) for class indices, got \(4, 3\)"):
        step(X, torch.full((4, 3), 1.0 / 3.0))


def test_probabilities_and_an_ignored_class():
    module = plain()
    step = fuse(module, nn.CrossEntropyLoss(ignore_index=1), optim.SGD(module.parameters(), lr=0.1))
    with pytest.raises(ArgumentError, match="ignore_index=1 is a class index"):
        step(X, torch.full((4, 3), 1.0 / 3.0))


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, pickle.dumps])
def test_a_step_is_not_copied(copied):
    module = plain()
    step = fuse(module, nn.CrossEntropyLoss(), optim.SGD(module.parameters(), lr=0.1))
    with pytest.raises(ArgumentTypeError, match=r"step: .*copy or save those two"):
        copied(step)
