"""Whole trainings in double precision against PyTorch, and single steps in single precision against the oracle."""

from dataclasses import dataclass, fields
from fnmatch import fnmatchcase
from typing import Any

import numpy as np
import pytest
import torch
from step_bounds import Step
from tolerance import assert_within
from torch_oracle import torch_loss

import fusemlp
from fusemlp import MLP, SGD, Adam, AdamW, CrossEntropy, ParameterOptions, PReLU
from fusemlp_kernels.philox import dropout_keep, row_order

ROWS, INPUTS, OUTPUTS = 70, 6, 4
BATCH = 16  # 70 rows are four whole batches and one of 6 rows
EPOCHS = 12
UPDATES = 60
SEED = 11
HIDDEN = [INPUTS, 9, 7, OUTPUTS]
TANH = MLP(HIDDEN, activation="tanh")

# Sixty steps of two ways of computing the same doubles.
WHOLE_RUN = 3e-10


def random_data(kind):
    rng = np.random.default_rng(5)
    X = rng.standard_normal((ROWS, INPUTS))
    mixed = np.tanh(X @ rng.standard_normal((INPUTS, OUTPUTS)))
    labels = mixed.argmax(axis=1)
    labels[::7] = rng.integers(0, OUTPUTS, len(labels[::7]))
    y = {
        "labels": labels,
        "ignored labels": np.where(np.arange(ROWS) % 5 == 0, -100, labels),
        "soft": rng.dirichlet(np.ones(OUTPUTS), ROWS),
        "binary": (mixed > 0.1).astype(np.float64),
        "values": mixed + 0.1 * rng.standard_normal(mixed.shape),
        "counts": rng.poisson(np.exp(mixed)).astype(np.float64),
    }[kind]
    return X, y, rng.uniform(0.2, 2.0, ROWS)


class TorchTwin:
    """The network of an engine in PyTorch's double precision, trained batch by batch."""

    def __init__(self, engine):
        self.engine = engine
        self.net = engine.network
        self.parameters = {
            name: torch.tensor(array, dtype=torch.float64, requires_grad=True)
            for name, array in engine.state_dict().items()
        }

    def forward(self, x, batch_index):
        f = torch.nn.functional
        for layer in range(self.net.layers):
            x = f.linear(x, self.parameters[f"{2 * layer}.weight"], self.parameters[f"{2 * layer}.bias"])
            chosen = self.net.activations[layer]
            if chosen.name == "prelu":
                x = f.prelu(x, self.parameters[f"{2 * layer + 1}.weight"])
            elif chosen.name in ("leaky_relu", "elu"):
                x = getattr(f, chosen.name)(x, chosen.slope)
            elif chosen.name != "identity":
                x = getattr(f, chosen.name)(x)
            rate = self.net.dropouts[layer]
            if rate:
                keep = dropout_keep(rate, layer, self.engine.seed, batch_index, *x.shape)
                x = x * torch.tensor(keep) / (1.0 - rate)
        return x

    def loss(self, X, y, weight, batch_index):
        loss = self.engine.loss
        soft = loss.kind == "cross_entropy" and y.ndim == 2
        z = self.forward(torch.tensor(X), batch_index)
        return torch_loss(loss.spec(accuracy=False, soft=soft), z, y, weight, loss.class_weight)

    def train(self, optimizer, scheduler, X, y, weight, epochs, *, accumulate=1, clip_norm=None):
        """Returns the loss of each batch."""
        losses = []
        trained = [p for group in optimizer.param_groups for p in group["params"]]
        optimizer.zero_grad()
        for epoch in range(epochs):
            order = row_order(len(X), self.engine.seed, epoch)
            for start in range(0, len(X), self.engine.batch_size):
                rows = order[start : start + self.engine.batch_size]
                loss = self.loss(X[rows], y[rows], None if weight is None else weight[rows], len(losses))
                losses.append(float(loss.detach()))
                (loss / accumulate).backward()
                if len(losses) % accumulate:
                    continue
                if clip_norm is not None:
                    torch.nn.utils.clip_grad_norm_(trained, clip_norm)
                optimizer.step()
                optimizer.zero_grad()
                if scheduler is not None:
                    scheduler.step()
        return losses


class Losses:
    """Records the loss of each batch."""

    def __init__(self):
        self.seen = []

    def on_batch_end(self, engine, batch):
        self.seen.append(float(engine.memory.stats[0]))


def assert_same_training(engine, twin, losses, torch_losses):
    assert len(losses) == len(torch_losses)
    np.testing.assert_allclose(losses, torch_losses, rtol=0, atol=WHOLE_RUN * max(np.abs(torch_losses)))
    for name, array in engine.state_dict().items():
        expected = twin.parameters[name].detach().numpy()
        error = np.abs(array - expected).max()
        assert error <= WHOLE_RUN * np.abs(expected).max(), f"{name}: {error}"


@dataclass(frozen=True)
class Case:
    """An engine's options and how PyTorch is told the same: ``torch`` makes the optimizer from the parameters."""

    optimizer: Any
    torch: Any
    schedule: Any = None
    net: MLP = TANH
    loss: Any = "cross_entropy"
    data: str = "labels"
    weighted: bool = False


def grouped(kind, groups, **options):
    """``groups``: a pattern of names, and the options of the parameters that match it."""

    def make(parameters):
        matching = {pattern: [p for name, p in parameters.items() if fnmatchcase(name, pattern)] for pattern in groups}
        return kind([{"params": matching[pattern], **own} for pattern, own in groups.items()], **options)

    return make


RATES = torch.optim.lr_scheduler
KINDS = {"sgd": (SGD, torch.optim.SGD), "adam": (Adam, torch.optim.Adam), "adamw": (AdamW, torch.optim.AdamW)}


def twin(kind, lr, own=(), torch=None, **options):
    """Return a case of options that both have, with a rate ``lr`` or a schedule, and ``own`` options beside them.

    Options that are fields of ``Case`` are the case's.
    """
    case = {field.name: options.pop(field.name) for field in fields(Case) if field.name in options}
    ours, theirs = KINDS[kind]
    first = getattr(lr, "lr", getattr(lr, "peak", lr))
    torch = torch or (lambda parameters: theirs(parameters.values(), lr=first, **options))
    return Case(ours(lr, **options, **dict(own)), torch, **case)


OPTIMIZERS = {
    "sgd": twin("sgd", 0.1),
    "sgd, weight decay": twin("sgd", 0.1, weight_decay=0.02),
    "momentum": twin("sgd", 0.03, momentum=0.9),
    "momentum, weight decay": twin("sgd", 0.03, momentum=0.9, weight_decay=0.02),
    "nesterov": twin("sgd", 0.03, momentum=0.9, nesterov=True),
    "nesterov, weight decay": twin("sgd", 0.03, momentum=0.8, nesterov=True, weight_decay=0.02),
    "adam": twin("adam", 0.01),
    "adam, betas and eps": twin("adam", 0.01, betas=(0.8, 0.95), eps=1e-3),
    "adam, coupled decay": twin("adam", 0.01, weight_decay=0.02),
    "adamw": twin("adamw", 0.01),
    "adamw, strong decay": twin("adamw", 0.01, weight_decay=0.5),
}
CLIP, ACCUMULATE = 0.3, 4
FROZEN = ParameterOptions(trainable=False)
CLIPPED, ACCUMULATED = {"clip_norm": CLIP}, {"accumulate": ACCUMULATE}
BY_LAYER = {"0.*": ParameterOptions(lr_factor=0.1), "2.*": ParameterOptions(weight_decay=0.3)}
OPTIONS = {
    "decay without biases": twin(
        "sgd",
        0.1,
        {"weight_decay": 0.05, "decay_biases": False},
        grouped(torch.optim.SGD, {"*weight": {"weight_decay": 0.05}, "*bias": {}}, lr=0.1),
    ),
    "learning rates by layer": twin(
        "adamw",
        0.01,
        {"per_parameter": BY_LAYER},
        grouped(torch.optim.AdamW, {"0.*": {"lr": 0.001}, "2.*": {"weight_decay": 0.3}, "4.*": {}}, lr=0.01),
    ),
    "lower layers frozen": twin(
        "sgd",
        0.1,
        {"per_parameter": {"[02].*": FROZEN}},
        grouped(torch.optim.SGD, {"4.*": {}}, lr=0.1, momentum=0.9),
        momentum=0.9,
    ),
    "a middle weight frozen": twin(
        "adam",
        0.01,
        {"per_parameter": {"2.weight": FROZEN}},
        grouped(torch.optim.Adam, {"[04].*": {}, "2.bias": {}}, lr=0.01),
    ),
    "all biases frozen, clipped": twin(
        "sgd", 0.1, {"per_parameter": {"*.bias": FROZEN}, **CLIPPED}, grouped(torch.optim.SGD, {"*.weight": {}}, lr=0.1)
    ),
    "clipping, sgd": twin("sgd", 0.1, CLIPPED),
    "clipping, nesterov": twin("sgd", 0.03, CLIPPED, momentum=0.9, nesterov=True, weight_decay=0.02),
    "clipping, adam": twin("adam", 0.01, CLIPPED, weight_decay=0.02),
    "clipping, adamw": twin("adamw", 0.01, CLIPPED),
    "accumulation, sgd": twin("sgd", 0.1, ACCUMULATED),
    "accumulation, momentum": twin("sgd", 0.03, ACCUMULATED, momentum=0.9, weight_decay=0.02),
    "accumulation, adam": twin("adam", 0.01, ACCUMULATED, weight_decay=0.02),
    "accumulation, clipping and dropout": twin(
        "adamw", 0.01, CLIPPED | ACCUMULATED, net=MLP(HIDDEN, activation="relu", dropout=0.2)
    ),
    "cosine": twin(
        "adam",
        fusemlp.Cosine(0.01, final=1e-4),
        schedule=lambda o: RATES.CosineAnnealingLR(o, T_max=UPDATES, eta_min=1e-4),
    ),
    "cosine, accumulated": twin(
        "sgd",
        fusemlp.Cosine(0.1),
        ACCUMULATED,
        schedule=lambda o: RATES.CosineAnnealingLR(o, T_max=UPDATES // ACCUMULATE),
    ),
}


def network(activation, dropout=0.0, *, adaptive=False):
    net = MLP(HIDDEN, activation=activation, dropout=dropout)
    return twin("adam", 0.01, net=net) if adaptive else twin("sgd", 0.03, momentum=0.9, net=net)


NETWORKS = {
    **{name: network(name) for name in ("relu", "sigmoid", "gelu", "silu", "mish")},
    "leaky_relu": network(fusemlp.LeakyReLU(0.2)),
    "prelu": network(PReLU(0.25)),
    "prelu, adam": network(PReLU(-0.1), adaptive=True),
    "prelu, clipped": twin("sgd", 0.1, {"clip_norm": CLIP}, net=MLP(HIDDEN, activation="prelu", dropout=0.3)),
    "elu": network(fusemlp.ELU(0.7), 0.25),
    "selu": network("selu", 0.25),
    "softplus": network("softplus", 0.25),
    "identity": twin("sgd", 0.03, net=MLP(HIDDEN, activation="identity")),
    "mixed": network(["gelu", PReLU(0.1)], [0.0, 0.4], adaptive=True),
    "no hidden layer": twin("adam", 0.01, net=MLP([INPUTS, OUTPUTS])),
    "dropout, relu": network("relu", [0.1, 0.5]),
    "dropout, gelu": network("gelu", 0.25, adaptive=True),
    "dropout, prelu": network("prelu", 0.25, adaptive=True),
    "dropout, tanh": network("tanh", 0.25),
}


def with_loss(loss, data="labels", *, weighted=False, output="identity"):
    net = MLP(HIDDEN, activation="tanh", output_activation=output)
    return twin("adam", 0.01, net=net, loss=loss, data=data, weighted=weighted)


SHARES = [0.5, 2.0, 1.0, 0.0]
LOSSES = {
    "label smoothing": with_loss(CrossEntropy(label_smoothing=0.1)),
    "class weights": with_loss(CrossEntropy(class_weight=SHARES)),
    "label smoothing and class weights": with_loss(CrossEntropy(label_smoothing=0.2, class_weight=SHARES)),
    "ignored labels": with_loss(CrossEntropy(ignore_index=-100), "ignored labels"),
    "cross_entropy, weighted": with_loss(CrossEntropy(class_weight=SHARES), weighted=True),
    "cross_entropy, sum": with_loss(CrossEntropy(reduction="sum")),
    "soft targets": with_loss(CrossEntropy(label_smoothing=0.1, class_weight=SHARES), "soft"),
    "soft targets, weighted": with_loss("cross_entropy", "soft", weighted=True),
    "binary_cross_entropy": with_loss("binary_cross_entropy", "binary"),
    "mse": with_loss("mse", "values"),
    "mse, weighted": with_loss("mse", "values", weighted=True),
    "mse, sum": with_loss(fusemlp.MSE(reduction="sum"), "values"),
    "mse behind sigmoid": with_loss("mse", "binary", output="sigmoid"),
    "mse behind prelu": with_loss("mse", "values", output=PReLU(0.3)),
    "mse behind gelu": with_loss("mse", "values", output="gelu"),
    "mae": with_loss(fusemlp.MAE(), "values"),
    "huber": with_loss(fusemlp.Huber(delta=0.2), "values", weighted=True),
    "quantile": with_loss(fusemlp.Quantile(q=0.8), "values"),
    "poisson": with_loss("poisson", "counts"),
}


CASES = {**OPTIMIZERS, **OPTIONS, **NETWORKS, **LOSSES}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_sixty_steps_equal_torch(case):
    X, y, weight = random_data(case.data)
    engine = fusemlp.Engine(case.net, case.loss, case.optimizer, BATCH, SEED, backend="numpy", precision="fp64")
    twin = TorchTwin(engine)
    optimizer = case.torch(twin.parameters)
    scheduler = None if case.schedule is None else case.schedule(optimizer)
    recorder = Losses()
    weight = weight if case.weighted else None
    engine.fit(X, y, epochs=EPOCHS, sample_weight=weight, callbacks=[recorder])
    clip, accumulate = case.optimizer.clip_norm, case.optimizer.accumulate
    expected = twin.train(optimizer, scheduler, X, y, weight, EPOCHS, accumulate=accumulate, clip_norm=clip)
    assert len(expected) == UPDATES
    assert_same_training(engine, twin, recorder.seen, expected)
    # the parameters have moved, and not by rounding
    moved = [np.abs(a - case.net.initial_parameters(SEED)[n]).max() for n, a in engine.state_dict().items()]
    assert max(moved) > 1e-2


FP32_OPTIMIZERS = {
    "sgd": SGD(0.1),
    "momentum": SGD(0.05, momentum=0.9, weight_decay=0.01),
    "nesterov": SGD(0.05, momentum=0.9, nesterov=True),
    "adam": Adam(0.01),
    "adam, coupled": Adam(0.01, weight_decay=0.01),
    "adamw": AdamW(0.01),
}
FP32_NETWORKS = {
    "relu": MLP([20, 33, 17, OUTPUTS], activation="relu"),
    "gelu and prelu": MLP([20, 33, 17, OUTPUTS], activation=["gelu", "prelu"], dropout=[0.3, 0.0]),
    "tanh and silu": MLP([20, 33, 17, OUTPUTS], activation=["tanh", "silu"], dropout=[0.0, 0.3]),
}


@pytest.mark.parametrize("optimizer", FP32_OPTIMIZERS.values(), ids=FP32_OPTIMIZERS.keys())
@pytest.mark.parametrize("net", FP32_NETWORKS.values(), ids=FP32_NETWORKS.keys())
def test_a_step_in_single_precision_is_within_the_bound(net, optimizer):
    rng = np.random.default_rng(2)
    engine = fusemlp.Engine(net, optimizer=optimizer, batch_size=64, seed=SEED, backend="numpy")
    for _ in range(12):
        X, y = rng.standard_normal((50, 20)).astype(np.float32), rng.integers(0, OUTPUTS, 50)
        step = Step(engine)
        trace = step.trace(X, y, None)
        assert_within(float(engine.step(X, y)), trace.loss, trace.loss_bound)
        step.check()
