"""Sixty fused steps in double precision against an eager PyTorch loop over a copy of module and optimizer."""

import pytest
import torch
from torch import nn, optim
from torch_pair import ACTIVATIONS, INPUTS, OUTPUTS, Block, Pair, adam, batches, network

import fusemlp.torch as door

STEPS = 60
# Sixty steps of two ways of computing the same doubles.
CLOSE = {"rtol": 3e-10, "atol": 3e-10}

OPTIMIZERS = {
    "momentum": lambda p: optim.SGD(p, lr=0.03, momentum=0.9, weight_decay=0.01),
    "adam": lambda p: optim.Adam(p, lr=0.01),
    "adamw": lambda p: optim.AdamW(p, lr=0.01, weight_decay=0.1),
}
# A loss and its kind of target.
LOSSES = {
    "cross_entropy": (nn.CrossEntropyLoss, "labels"),
    "bce": (nn.BCEWithLogitsLoss, "binary"),
    "mse": (nn.MSELoss, "values"),
    "l1": (nn.L1Loss, "values"),
    "huber": (lambda: nn.HuberLoss(delta=0.3), "values"),
}
SHARES = torch.tensor([0.5, 2.0, 1.0, 0.0], dtype=torch.float64)
CROSS, BINARY = nn.CrossEntropyLoss, nn.BCEWithLogitsLoss
LOSS_OPTIONS = {
    "label smoothing": (CROSS(label_smoothing=0.1), "labels"),
    "class weights": (CROSS(weight=SHARES), "labels"),
    "class weights, smoothing, sum": (CROSS(weight=SHARES, label_smoothing=0.2, reduction="sum"), "labels"),
    "ignored labels": (CROSS(), "some ignored"),
    "an ignored class": (CROSS(ignore_index=1), "labels"),
    "ignored, weights, smoothing": (CROSS(weight=SHARES, label_smoothing=0.2, ignore_index=-7), "others ignored"),
    "ignored labels, sum": (CROSS(reduction="sum"), "some ignored"),
    "probabilities": (CROSS(), "probabilities"),
    "probabilities, weights, smoothing": (CROSS(weight=SHARES, label_smoothing=0.2), "probabilities"),
    "bce, positive weights": (BINARY(pos_weight=SHARES), "binary"),
    "bce, one positive weight, sum": (BINARY(pos_weight=SHARES[1], reduction="sum"), "probabilities"),
    "bce, sum": (BINARY(reduction="sum"), "binary"),
    "mse, sum": (nn.MSELoss(reduction="sum"), "values"),
    "l1, sum": (nn.L1Loss(reduction="sum"), "values"),
    "huber, sum": (nn.HuberLoss(reduction="sum"), "values"),
    "smooth l1": (nn.SmoothL1Loss(), "values"),
    "poisson": (nn.PoissonNLLLoss(), "counts"),
    "function": (nn.functional.cross_entropy, "labels"),
}


def of_weights_only(kind, decay, **options):
    """Return an optimizer that decays matrices alone."""

    def make(p):
        biases = {"params": [b for b in p if b.dim() < 2], "weight_decay": 0.0}
        return kind([{"params": [w for w in p if w.dim() > 1]}, biases], weight_decay=decay, **options)

    return make


OPTIMIZER_OPTIONS = {
    "sgd": lambda p: optim.SGD(p, lr=0.1),
    "weight decay": lambda p: optim.SGD(p, lr=0.1, weight_decay=0.02),
    "nesterov": lambda p: optim.SGD(p, lr=0.03, momentum=0.8, nesterov=True, weight_decay=0.02),
    "adam, coupled decay": lambda p: optim.Adam(p, lr=0.01, weight_decay=0.02),
    "adam, decoupled decay": lambda p: optim.Adam(p, lr=0.01, weight_decay=0.2, decoupled_weight_decay=True),
    "adam, betas and eps": lambda p: optim.Adam(p, lr=0.01, betas=(0.8, 0.95), eps=1e-3),
    "adam, foreach": lambda p: optim.Adam(p, lr=0.01, foreach=True),
    "adam, fused": lambda p: optim.Adam(p, lr=0.01, fused=True),
    "decay of weights only": of_weights_only(optim.AdamW, 0.2, lr=0.01),
    "decay of weights only, sgd": of_weights_only(optim.SGD, 0.02, lr=0.05, momentum=0.9),
    "groups of other rates": lambda p: optim.SGD(
        [{"params": p[:2], "lr": 0.01}, {"params": p[2:]}], lr=0.1, momentum=0.9
    ),
    "groups of other rules": lambda p: optim.SGD(
        [{"params": p[:1], "momentum": 0.5}, {"params": p[1:3], "nesterov": True, "momentum": 0.9}, {"params": p[3:]}],
        lr=0.05,
        weight_decay=0.01,
    ),
    "rmsprop": lambda p: optim.RMSprop(p, lr=0.01),
    "rmsprop, alpha, eps and decay": lambda p: optim.RMSprop(p, lr=0.01, alpha=0.9, eps=1e-3, weight_decay=0.02),
    "rmsprop, groups": lambda p: optim.RMSprop([{"params": p[:2], "alpha": 0.8}, {"params": p[2:]}], lr=0.01),
    "groups of other betas": lambda p: optim.Adam(
        [{"params": p[:2], "betas": (0.5, 0.9)}, {"params": p[2:], "lr": 0.002, "eps": 1e-4}], lr=0.01
    ),
    "only the last layer": lambda p: optim.Adam(p[-2:], lr=0.01),
}
RATES = optim.lr_scheduler
SCHEDULES = {
    "one cycle, with momentum": lambda o: RATES.OneCycleLR(
        o, max_lr=[0.05] * len(o.param_groups), total_steps=STEPS + 1
    ),
    "a factor for each group": lambda o: RATES.LambdaLR(
        o, [lambda t, g=g: 1.0 / (1.0 + (g + 1) * t) for g in range(len(o.param_groups))]
    ),
}


def targets(kind, scores):
    """Return targets of a batch with these scores (m, OUTPUTS)."""
    labels = scores.argmax(dim=1)
    missing = torch.arange(len(labels)) % 3 == 0
    return {
        "labels": labels,
        "some ignored": labels.masked_fill(missing, -100) if len(labels) > 5 else labels,
        "others ignored": labels.masked_fill(missing, -7),
        "probabilities": torch.softmax(3.0 * scores, dim=1),
        "binary": (scores > 0.1).double(),
        "values": scores + 0.1 * torch.sin(99.0 * scores),
        "counts": torch.floor(3.0 * scores.abs()),
    }[kind]


def assert_same_training(module, loss_fn, make_optimizer, kind, make_schedule=None, steps=STEPS, **options):
    """Train ``module`` fused and a copy of it eagerly; return the pair."""
    pair = Pair(module, make_optimizer, loss_fn, close=CLOSE, **options)
    schedules = [] if make_schedule is None else [make_schedule(one) for one in (pair.optimizer, pair.eager)]
    for x, scores in batches(steps):
        pair.check(x, targets(kind, scores))
        for schedule in schedules:
            schedule.step()
    pair.same()
    return pair


def paired(*tables):
    """Return names of two tables and of a third, shorter one, in which each two of different tables are together."""
    first, second, third = map(list, tables)
    return [(a, b, third[(i + j) % len(third)]) for i, a in enumerate(first) for j, b in enumerate(second)]


@pytest.mark.parametrize("activation, loss, optimizer", paired(ACTIVATIONS, LOSSES, OPTIMIZERS))
def test_sixty_steps(activation, loss, optimizer):
    make_loss, kind = LOSSES[loss]
    assert_same_training(network(ACTIVATIONS[activation][1]), make_loss(), OPTIMIZERS[optimizer], kind)


@pytest.mark.parametrize("loss, kind", LOSS_OPTIONS.values(), ids=LOSS_OPTIONS.keys())
def test_options_of_losses(loss, kind):
    assert_same_training(network(), loss, OPTIMIZERS["adam"], kind)


NLL = {
    "mean": (nn.NLLLoss, "labels"),
    "sum": (lambda: nn.NLLLoss(reduction="sum"), "labels"),
    "weights, ignored labels": (lambda: nn.NLLLoss(weight=SHARES), "some ignored"),
    "function": (lambda: nn.functional.nll_loss, "labels"),
}


class LogProbabilities(nn.Module):
    """Traced: log_softmax as a function."""

    def __init__(self):
        super().__init__()
        self.body = network()

    def forward(self, x):
        return nn.functional.log_softmax(self.body(x), dim=-1)


@pytest.mark.parametrize("make", [lambda: network(nn.Tanh, nn.LogSoftmax(1)), LogProbabilities])
@pytest.mark.parametrize("loss, kind", NLL.values(), ids=NLL.keys())
def test_log_softmax_and_nll(loss, kind, make):
    # a sum's gradient is twelve times a mean's: with momentum its rounding errors grow beyond the bound
    assert_same_training(make(), loss(), OPTIMIZERS["adam"], kind, returns=True)


ENDS = {
    "logits": (network, nn.CrossEntropyLoss, "labels"),
    "soft": (network, nn.CrossEntropyLoss, "probabilities"),
    "ignored": (network, nn.CrossEntropyLoss, "some ignored"),
    "prelu": (lambda: network(nn.Tanh, nn.PReLU()), nn.MSELoss, "values"),
    "gelu": (lambda: network(nn.GELU, nn.GELU()), nn.HuberLoss, "values"),
    "positive weights": (network, lambda: nn.BCEWithLogitsLoss(pos_weight=SHARES), "binary"),
}


@pytest.mark.parametrize("make, loss, kind", ENDS.values(), ids=ENDS.keys())
def test_outputs_of_a_step(make, loss, kind):
    assert_same_training(make(), loss(), OPTIMIZERS["adam"], kind, returns=True)


def test_outputs_that_are_squeezed():
    module = nn.Sequential(nn.Linear(3, 1), nn.Flatten(0)).double()
    step = door.fuse(module, nn.MSELoss(), optim.SGD(module.parameters(), lr=0.1))
    for rows in (4, 1):
        x, y = torch.randn(rows, 3).double(), torch.zeros(rows).double()
        expected = module(x).detach()
        loss, output = step(x, y, return_output=True)
        torch.testing.assert_close(output, expected)
        torch.testing.assert_close(loss, expected.square().mean())
        # no later step writes into it
        step(x + 1.0, y, return_output=True)
        torch.testing.assert_close(output, expected)


def test_outputs_are_those_of_the_dropout_of_the_step():
    """With the same seed and masks, a step that returns the output changes the parameters as one that does not."""
    found = []
    for returns in (False, True):
        module = network()
        module.insert(2, nn.Dropout(0.5))
        step = door.fuse(module, nn.CrossEntropyLoss(), optim.SGD(module.parameters(), lr=0.1), seed=7)
        for x, scores in batches(5):
            y = scores.argmax(dim=1)
            loss = step(x, y, return_output=returns)
            if returns:
                loss, output = loss
                torch.testing.assert_close(loss, nn.functional.cross_entropy(output, y), rtol=1e-12, atol=1e-14)
        found.append(module.state_dict())
    torch.testing.assert_close(*found, rtol=1e-12, atol=1e-14)


def normalised(norm):
    block = Block(nn.Linear(6, 9, bias=False), norm(9), nn.ReLU(), nn.Dropout(0.0), nn.Linear(9, 6))
    return nn.Sequential(nn.Linear(INPUTS, 6), norm(6), nn.Tanh(), block, nn.Linear(6, OUTPUTS))


class Blocks(nn.Module):
    """Sums in every way that a forward can write them."""

    def __init__(self, norm):
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(INPUTS, 6), norm(6), nn.Linear(6, OUTPUTS)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(6, 8), nn.SiLU(), nn.Linear(8, 6)) for _ in range(3))
        self.nested = normalised(norm)[3]

    def forward(self, x):
        x = torch.relu(self.norm(self.first(x)))
        x = self.blocks[0](x) + x
        x = torch.add(x, self.blocks[1](x))
        x = x.add(self.blocks[2](x))
        return self.last(self.nested(x))


NORMS = {
    "LayerNorm": nn.LayerNorm,
    "RMSNorm": nn.RMSNorm,
    "LayerNorm without bias": lambda width: nn.LayerNorm(width, 1e-3, bias=False),
    "RMSNorm, eps": lambda width: nn.RMSNorm(width, 0.1),
}
CLIPPED = {"momentum": None, "adamw": None, "groups of other rules": 0.3}


@pytest.mark.parametrize("norm, optimizer, make", paired(NORMS, CLIPPED, (normalised, Blocks)))
def test_normalised_layers_and_residual_blocks(norm, optimizer, make):
    torch.manual_seed(3)
    make_optimizer = {**OPTIMIZERS, **OPTIMIZER_OPTIONS}[optimizer]
    module, options = make(NORMS[norm]).double(), {"clip_grad_norm": CLIPPED[optimizer], "steps": 200}
    assert_same_training(module, nn.CrossEntropyLoss(), make_optimizer, "labels", **options)


# The first norm of the gradients is about one: this clips at the beginning of a run and later does not.
@pytest.mark.parametrize("clip", [0.3, 0.01])
@pytest.mark.parametrize(
    "name", ["sgd", "momentum", "adamw", "rmsprop", "groups of other rules", "only the last layer"]
)
def test_clipping(name, clip):
    make_optimizer = {**OPTIMIZERS, **OPTIMIZER_OPTIONS}[name]
    module = network()
    if name == "only the last layer":
        module[0].requires_grad_(False)
    assert_same_training(module, nn.CrossEntropyLoss(), make_optimizer, "labels", clip_grad_norm=clip)


def test_a_tensor_that_is_frozen_is_not_in_the_norm():
    """Its last gradient stays in the kernels' memory."""
    pair = Pair(network(), OPTIMIZER_OPTIONS["groups of other rates"], clip_grad_norm=0.05)
    for number, (x, scores) in enumerate(batches(20)):
        if number == 5:
            pair.both(lambda module, _: module[0].bias.requires_grad_(False))
        pair.check(x, scores.argmax(dim=1))
    pair.same()


@pytest.mark.parametrize("parameter", [False, True], ids=["a buffer", "a parameter"])
def test_positive_weights_can_change(parameter):
    loss_fn = nn.BCEWithLogitsLoss(pos_weight=SHARES.clone())
    if parameter:
        loss_fn.pos_weight = nn.Parameter(SHARES.clone(), requires_grad=False)
    pair = Pair(network(), adam, loss_fn)
    for number, (x, scores) in enumerate(batches(8)):
        if number == 4:
            loss_fn.pos_weight.mul_(2.0)
        pair.check(x, targets("binary", scores))


@pytest.mark.parametrize("make_optimizer", OPTIMIZER_OPTIONS.values(), ids=OPTIMIZER_OPTIONS.keys())
def test_options_of_optimizers(make_optimizer):
    assert_same_training(network(), nn.CrossEntropyLoss(), make_optimizer, "labels")


@pytest.mark.parametrize("make_schedule", SCHEDULES.values(), ids=SCHEDULES.keys())
@pytest.mark.parametrize("name", ["momentum", "adam", "groups of other rates", "groups of other betas"])
def test_schedules_of_torch(name, make_schedule):
    make_optimizer = {**OPTIMIZERS, **OPTIMIZER_OPTIONS}[name]
    pair = assert_same_training(network(), nn.CrossEntropyLoss(), make_optimizer, "labels", make_schedule)
    assert [group["lr"] for group in pair.optimizer.param_groups] == [group["lr"] for group in pair.eager.param_groups]


@pytest.mark.parametrize(
    "name", ["momentum", "adam", "adamw", "rmsprop", "groups of other betas", "only the last layer"]
)
def test_moments_are_those_of_the_eager_optimizer(name):
    make_optimizer = {**OPTIMIZERS, **OPTIMIZER_OPTIONS}[name]
    assert_same_training(network(), nn.CrossEntropyLoss(), make_optimizer, "labels", steps=20).same_moments()
