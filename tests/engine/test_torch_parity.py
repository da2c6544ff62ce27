"""Whole trainings in double precision against PyTorch, and single steps in single precision against the oracle."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from step_bounds import traced
from tolerance import assert_within, update_bound
from torch_oracle import torch_loss

import fusemlp
from fusemlp import MLP, SGD, Adam, AdamW, CrossEntropy, ParameterOptions, PReLU
from fusemlp.program.layout import short_names
from fusemlp_kernels import reference
from fusemlp_kernels.contract import BATCH_INDEX, UPDATE_COUNT
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
    """Records the loss of each batch: the callback of ``fit``."""

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


def sgd(**options):
    return lambda parameters: torch.optim.SGD(parameters.values(), **options)


def adam(**options):
    return lambda parameters: torch.optim.Adam(parameters.values(), **options)


def adamw(**options):
    return lambda parameters: torch.optim.AdamW(parameters.values(), **options)


def only(*names, kind=torch.optim.SGD, **options):
    return lambda parameters: kind([parameters[name] for name in names], **options)


def grouped(kind, groups, **options):
    """``groups``: pairs of a test of the name and the options of the parameters that pass it."""

    def make(parameters):
        return kind(
            [{"params": [parameters[n] for n in parameters if test(n)], **own} for test, own in groups], **options
        )

    return make


def warmed_up(updates, after):
    """(t + 1) / updates of the first rate, then ``after``, a factor of t from there."""

    def factor(t):
        return (t + 1) / updates if t < updates else after(t - updates)

    return lambda optimizer: torch.optim.lr_scheduler.LambdaLR(optimizer, factor)


RATES = torch.optim.lr_scheduler
OPTIMIZERS = {
    "sgd": Case(SGD(0.1), sgd(lr=0.1)),
    "sgd, weight decay": Case(SGD(0.1, weight_decay=0.02), sgd(lr=0.1, weight_decay=0.02)),
    "momentum": Case(SGD(0.03, momentum=0.9), sgd(lr=0.03, momentum=0.9)),
    "momentum, weight decay": Case(
        SGD(0.03, momentum=0.9, weight_decay=0.02), sgd(lr=0.03, momentum=0.9, weight_decay=0.02)
    ),
    "nesterov": Case(SGD(0.03, momentum=0.9, nesterov=True), sgd(lr=0.03, momentum=0.9, nesterov=True)),
    "nesterov, weight decay": Case(
        SGD(0.03, momentum=0.8, nesterov=True, weight_decay=0.02),
        sgd(lr=0.03, momentum=0.8, nesterov=True, weight_decay=0.02),
    ),
    "adam": Case(Adam(0.01), adam(lr=0.01)),
    "adam, betas and eps": Case(Adam(0.01, betas=(0.8, 0.95), eps=1e-3), adam(lr=0.01, betas=(0.8, 0.95), eps=1e-3)),
    "adam, coupled decay": Case(Adam(0.01, weight_decay=0.02), adam(lr=0.01, weight_decay=0.02)),
    "adamw": Case(AdamW(0.01), adamw(lr=0.01)),
    "adamw, strong decay": Case(AdamW(0.01, weight_decay=0.5), adamw(lr=0.01, weight_decay=0.5)),
}
CLIP, ACCUMULATE = 0.3, 4
OPTIONS = {
    "decay without biases": Case(
        SGD(0.1, weight_decay=0.05, decay_biases=False),
        grouped(
            torch.optim.SGD,
            [(lambda n: n.endswith("weight"), {"weight_decay": 0.05}), (lambda n: n.endswith("bias"), {})],
            lr=0.1,
        ),
    ),
    "learning rates by layer": Case(
        AdamW(0.01, per_parameter={"0.*": ParameterOptions(lr_factor=0.1), "2.*": ParameterOptions(weight_decay=0.3)}),
        grouped(
            torch.optim.AdamW,
            [
                (lambda n: n.startswith("0."), {"lr": 0.001}),
                (lambda n: n.startswith("2."), {"weight_decay": 0.3}),
                (lambda n: n.startswith("4."), {}),
            ],
            lr=0.01,
        ),
    ),
    "lower layers frozen": Case(
        SGD(0.1, momentum=0.9, per_parameter={"[02].*": ParameterOptions(trainable=False)}),
        only("4.weight", "4.bias", lr=0.1, momentum=0.9),
    ),
    "a middle weight frozen": Case(
        Adam(0.01, per_parameter={"2.weight": ParameterOptions(trainable=False)}),
        only("0.weight", "0.bias", "2.bias", "4.weight", "4.bias", kind=torch.optim.Adam, lr=0.01),
    ),
    "all biases frozen, clipped": Case(
        SGD(0.1, clip_norm=CLIP, per_parameter={"*.bias": ParameterOptions(trainable=False)}),
        only("0.weight", "2.weight", "4.weight", lr=0.1),
    ),
    "clipping, sgd": Case(SGD(0.1, clip_norm=CLIP), sgd(lr=0.1)),
    "clipping, nesterov": Case(
        SGD(0.03, momentum=0.9, nesterov=True, weight_decay=0.02, clip_norm=CLIP),
        sgd(lr=0.03, momentum=0.9, nesterov=True, weight_decay=0.02),
    ),
    "clipping, adam": Case(Adam(0.01, weight_decay=0.02, clip_norm=CLIP), adam(lr=0.01, weight_decay=0.02)),
    "clipping, adamw": Case(AdamW(0.01, clip_norm=CLIP), adamw(lr=0.01)),
    "accumulation, sgd": Case(SGD(0.1, accumulate=ACCUMULATE), sgd(lr=0.1)),
    "accumulation, momentum": Case(
        SGD(0.03, momentum=0.9, weight_decay=0.02, accumulate=ACCUMULATE),
        sgd(lr=0.03, momentum=0.9, weight_decay=0.02),
    ),
    "accumulation, adam": Case(Adam(0.01, weight_decay=0.02, accumulate=ACCUMULATE), adam(lr=0.01, weight_decay=0.02)),
    "accumulation, clipping and dropout": Case(
        AdamW(0.01, accumulate=ACCUMULATE, clip_norm=CLIP),
        adamw(lr=0.01),
        net=MLP(HIDDEN, activation="relu", dropout=0.2),
    ),
    "step": Case(
        SGD(fusemlp.StepDecay(0.1, every=15, gamma=0.5)),
        sgd(lr=0.1),
        lambda o: RATES.StepLR(o, step_size=15, gamma=0.5),
    ),
    "exponential": Case(
        SGD(fusemlp.Exponential(0.1, gamma=0.99), momentum=0.9),
        sgd(lr=0.1, momentum=0.9),
        lambda o: RATES.ExponentialLR(o, gamma=0.99),
    ),
    "cosine": Case(
        Adam(fusemlp.Cosine(0.01, final=1e-4)),
        adam(lr=0.01),
        lambda o: RATES.CosineAnnealingLR(o, T_max=UPDATES, eta_min=1e-4),
    ),
    "one cycle": Case(
        AdamW(fusemlp.OneCycle(0.02)),
        adamw(lr=0.02),
        lambda o: RATES.OneCycleLR(o, max_lr=0.02, total_steps=UPDATES, cycle_momentum=False),
    ),
    "cosine, accumulated": Case(
        SGD(fusemlp.Cosine(0.1), accumulate=ACCUMULATE),
        sgd(lr=0.1),
        lambda o: RATES.CosineAnnealingLR(o, T_max=UPDATES // ACCUMULATE),
    ),
    "warm-up before step": Case(
        SGD(fusemlp.StepDecay(0.1, every=15, gamma=0.5, warmup=20)),
        sgd(lr=0.1),
        warmed_up(20, lambda t: 0.5 ** (t // 15)),
    ),
    "warm-up before cosine": Case(
        Adam(fusemlp.Cosine(0.02, warmup=0.1)),
        adam(lr=0.02),
        warmed_up(6, lambda t: (1.0 + np.cos(np.pi * t / (UPDATES - 6))) / 2.0),
    ),
}
MOMENTUM = SGD(0.03, momentum=0.9)
NETWORKS = {
    "relu": Case(MOMENTUM, sgd(lr=0.03, momentum=0.9), net=MLP(HIDDEN, activation="relu")),
    "leaky_relu": Case(MOMENTUM, sgd(lr=0.03, momentum=0.9), net=MLP(HIDDEN, activation=fusemlp.LeakyReLU(0.2))),
    "prelu": Case(MOMENTUM, sgd(lr=0.03, momentum=0.9), net=MLP(HIDDEN, activation=PReLU(0.25))),
    "prelu, adam": Case(Adam(0.01), adam(lr=0.01), net=MLP(HIDDEN, activation=PReLU(-0.1))),
    "prelu, clipped": Case(SGD(0.1, clip_norm=CLIP), sgd(lr=0.1), net=MLP(HIDDEN, activation="prelu", dropout=0.3)),
    "sigmoid": Case(MOMENTUM, sgd(lr=0.03, momentum=0.9), net=MLP(HIDDEN, activation="sigmoid")),
    "gelu": Case(MOMENTUM, sgd(lr=0.03, momentum=0.9), net=MLP(HIDDEN, activation="gelu")),
    "silu": Case(MOMENTUM, sgd(lr=0.03, momentum=0.9), net=MLP(HIDDEN, activation="silu")),
    "elu": Case(MOMENTUM, sgd(lr=0.03, momentum=0.9), net=MLP(HIDDEN, activation=fusemlp.ELU(0.7), dropout=0.25)),
    "selu": Case(MOMENTUM, sgd(lr=0.03, momentum=0.9), net=MLP(HIDDEN, activation="selu", dropout=0.25)),
    "softplus": Case(MOMENTUM, sgd(lr=0.03, momentum=0.9), net=MLP(HIDDEN, activation="softplus", dropout=0.25)),
    "mish": Case(MOMENTUM, sgd(lr=0.03, momentum=0.9), net=MLP(HIDDEN, activation="mish")),
    "identity": Case(SGD(0.03), sgd(lr=0.03), net=MLP(HIDDEN, activation="identity")),
    "mixed": Case(Adam(0.01), adam(lr=0.01), net=MLP(HIDDEN, activation=["gelu", PReLU(0.1)], dropout=[0.0, 0.4])),
    "no hidden layer": Case(Adam(0.01), adam(lr=0.01), net=MLP([INPUTS, OUTPUTS])),
    "dropout, relu": Case(MOMENTUM, sgd(lr=0.03, momentum=0.9), net=MLP(HIDDEN, activation="relu", dropout=[0.1, 0.5])),
    "dropout, gelu": Case(Adam(0.01), adam(lr=0.01), net=MLP(HIDDEN, activation="gelu", dropout=0.25)),
    "dropout, prelu": Case(Adam(0.01), adam(lr=0.01), net=MLP(HIDDEN, activation="prelu", dropout=0.25)),
    "dropout, tanh": Case(MOMENTUM, sgd(lr=0.03, momentum=0.9), net=MLP(HIDDEN, activation="tanh", dropout=0.25)),
}


def with_loss(loss, data="labels", *, weighted=False, output="identity"):
    net = MLP(HIDDEN, activation="tanh", output_activation=output)
    return Case(Adam(0.01), adam(lr=0.01), net=net, loss=loss, data=data, weighted=weighted)


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


@pytest.mark.parametrize(
    "case",
    [pytest.param(case, id=name) for group in (OPTIMIZERS, OPTIONS, NETWORKS, LOSSES) for name, case in group.items()],
)
def test_sixty_steps_equal_torch(case):
    X, y, weight = random_data(case.data)
    engine = fusemlp.Engine(
        case.net, case.loss, case.optimizer, batch_size=BATCH, seed=SEED, backend="numpy", precision="fp64"
    )
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


def test_steps_equal_torch_too():
    X, y, weight = random_data("labels")
    net = MLP(HIDDEN, activation="gelu", dropout=0.2)
    engine = fusemlp.Engine(net, optimizer=Adam(0.01), batch_size=BATCH, seed=SEED, backend="numpy", precision="fp64")
    twin = TorchTwin(engine)
    losses = []
    for epoch in range(EPOCHS):
        order = row_order(ROWS, SEED, epoch)
        for start in range(0, ROWS, BATCH):
            rows = order[start : start + BATCH]
            losses.append(float(engine.step(X[rows], y[rows], weight[rows])))
    expected = twin.train(adam(lr=0.01)(twin.parameters), None, X, y, weight, EPOCHS)
    assert_same_training(engine, twin, losses, expected)


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
    spec, rule = engine.loss.spec(accuracy=False), optimizer.rule()
    for _ in range(12):
        X = rng.standard_normal((50, 20)).astype(np.float32)
        y = rng.integers(0, OUTPUTS, 50)
        before = {name: array.astype(np.float64) for name, array in engine.state_dict().items()}
        states = [
            {name: array.astype(np.float64) for name, array in engine.memory.tensors(f"state{index}").items()}
            for index in range(rule.state_count)
        ]
        batch_index = int(engine.memory.counters[BATCH_INDEX])
        t = int(engine.memory.counters[UPDATE_COUNT])
        layers, keeps = [], []
        for layer in range(net.layers):
            chosen, rate = net.activations[layer], net.dropouts[layer]
            slope = before.get(f"{2 * layer + 1}.weight", chosen.slope)
            parameters = before[f"{2 * layer}.weight"], before[f"{2 * layer}.bias"]
            layers.append(reference.Layer(*parameters, chosen.name, slope, rate))
            width = net.sizes[layer + 1]
            keeps.append(dropout_keep(rate, layer, SEED, batch_index, 50, width) if rate else None)
        trace = traced(layers, spec, reference.Batch(X.astype(np.float64), y, keeps=keeps))
        _, oracle = reference.gradients(layers, spec, reference.Batch(X.astype(np.float64), y, keeps=keeps))
        engine.step(X, y)
        after = engine.state_dict()
        flat = [
            (g, e, o)
            for gs, es, os in zip(trace.grads, trace.bounds, oracle, strict=True)
            for g, e, o in zip(gs, es, os, strict=True)
        ]
        lr = optimizer.schedule.at(t)
        for (g, g_error, from_oracle), name in zip(flat, short_names(net).values(), strict=True):
            np.testing.assert_allclose(g, from_oracle, rtol=1e-12, atol=1e-15)
            _, tensor = optimizer.options_for(name)
            state = tuple(arrays[name] for arrays in states)
            expected, new_state = reference.update(rule, tensor, before[name], g, state, t, lr)
            error, state_errors = update_bound(rule, tensor, before[name], g, state, t, lr, g_error)
            assert_within(after[name], expected, error)
            for index, (own, allowed) in enumerate(zip(new_state, state_errors, strict=True)):
                assert_within(engine.memory.tensors(f"state{index}")[name], own, allowed)
