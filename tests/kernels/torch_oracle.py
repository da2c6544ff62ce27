"""The contract's activations, losses and optimizers in PyTorch's double precision, and cases to try them on."""

import itertools

import numpy as np
import torch
from tolerance import UNIT, assert_within

from fusemlp_kernels.contract import LOSSES, LossSpec, UpdateRule

# Two ways of computing the same double with at most some thousand operations on numbers of order one.
CLOSE = 4096 * UNIT["float64"]
NAN = float("nan")


def assert_close(actual, expected):
    expected = np.asarray(expected, np.float64)
    assert_within(actual, expected, CLOSE * np.maximum(1.0, np.abs(expected)))


def tensor(array, grad=False):
    return torch.tensor(np.asarray(array), dtype=torch.float64, requires_grad=grad)


def numpy(value):
    return value.detach().numpy()


TORCH_ACTIVATIONS = {
    "identity": lambda z, a: z * 1.0,
    "relu": lambda z, a: torch.relu(z),
    "leaky_relu": lambda z, a: torch.nn.functional.leaky_relu(z, float(a)),
    "prelu": lambda z, a: torch.nn.functional.prelu(z, tensor([a])),
    "sigmoid": lambda z, a: torch.sigmoid(z),
    "tanh": lambda z, a: torch.tanh(z),
    "gelu": lambda z, a: torch.nn.functional.gelu(z),
    "silu": lambda z, a: torch.nn.functional.silu(z),
    "elu": lambda z, a: torch.nn.functional.elu(z, float(a)),
    "selu": lambda z, a: torch.selu(z),
    # torch is the identity above a threshold, by default 20
    "softplus": lambda z, a: torch.nn.functional.softplus(z, threshold=50.0),
    "mish": lambda z, a: torch.nn.functional.mish(z),
}


def torch_loss(spec, z, t, weight, class_weight):
    """The loss from torch's functions with reduction none, weighted and reduced as the contract says."""
    f = torch.nn.functional
    w = torch.ones(len(z), dtype=torch.float64) if weight is None else tensor(weight)
    cw = None if class_weight is None else tensor(class_weight)
    if spec.kind == "cross_entropy":
        options = {"weight": cw, "label_smoothing": spec.label_smoothing, "reduction": "none"}
        if spec.soft:
            total, normaliser = (w * f.cross_entropy(z, tensor(t), **options)).sum(), w.sum()
        else:
            ignore = -100 if spec.ignore_index is None else spec.ignore_index
            labels = torch.tensor(t)
            total = (w * f.cross_entropy(z, labels, ignore_index=ignore, **options)).sum()
            shares = torch.ones_like(w) if cw is None else cw[labels.clamp(min=0)]
            normaliser = (w * shares * (labels != ignore)).sum()
        return total / normaliser if spec.reduction == "mean" else total
    t = tensor(t)
    each = {
        "binary_cross_entropy": lambda: f.binary_cross_entropy_with_logits(z, t, reduction="none"),
        "mse": lambda: f.mse_loss(z, t, reduction="none"),
        "mae": lambda: f.l1_loss(z, t, reduction="none"),
        "huber": lambda: f.huber_loss(z, t, reduction="none", delta=spec.delta),
        "poisson": lambda: f.poisson_nll_loss(z, t, log_input=True, full=False, reduction="none"),
        "quantile": lambda: torch.maximum(spec.quantile * (t - z), (spec.quantile - 1.0) * (t - z)),
    }[spec.kind]()
    total = (w[:, None] * each).sum()
    return total / (w.sum() * z.shape[1]) if spec.reduction == "mean" else total


def loss_case(spec, seed, rows=7, columns=4):
    rng = np.random.default_rng(seed)
    z = rng.normal(0, 2, (rows, columns))
    if spec.kind == "cross_entropy":
        if spec.soft:
            t = rng.dirichlet(np.ones(columns), rows)
        else:
            t = rng.integers(0, columns, rows)
            if spec.ignore_index is not None:
                t[::3] = spec.ignore_index
    else:
        t = rng.uniform(0, 1, (rows, columns))
    return z, t, rng.uniform(0.1, 2, rows), rng.uniform(0.1, 2, columns)


CROSS_ENTROPIES = [
    LossSpec("cross_entropy", reduction, smoothing, ignore, soft)
    for reduction, smoothing, ignore, soft in itertools.product(
        ("mean", "sum"), (0.0, 0.15), (None, -100, 2), (False, True)
    )
    if not (soft and ignore is not None)
]
ELEMENTWISE = [
    LossSpec(kind, reduction, delta=0.6, quantile=0.3) for kind in LOSSES[1:] for reduction in ("mean", "sum")
]


# the learning rate of all of them
RATE = 0.05
SGDS = [UpdateRule("sgd"), UpdateRule("sgd", momentum=0.9), UpdateRule("sgd", momentum=0.8, nesterov=True)]
ADAMS = [
    UpdateRule("adam"),
    UpdateRule("adam", beta1=0.8, beta2=0.95, eps=1e-3),
    UpdateRule("adam", decoupled=True),
    UpdateRule("adam", beta1=0.0, eps=1e-4, decoupled=True),
]


def torch_optimizer(rule, parameter, decay, lr):
    if rule.kind == "sgd":
        momentum, nesterov = rule.momentum, rule.nesterov
        return torch.optim.SGD([parameter], lr=lr, momentum=momentum, nesterov=nesterov, weight_decay=decay)
    kind = torch.optim.AdamW if rule.decoupled else torch.optim.Adam
    return kind([parameter], lr=lr, betas=(rule.beta1, rule.beta2), eps=rule.eps, weight_decay=decay)
