"""The mathematics of training a multi-layer perceptron, in plain float64 NumPy: the oracle of every backend.

Read it from top to bottom: activations, one layer forward, the losses, one layer backward, the learning rate, the
optimizer, and at the end a whole training step made of these. Every function is pure: it returns new arrays and changes
none. Arrays are float64. Notation: ``M`` batch rows, ``K`` inputs and ``N`` outputs of a layer; x (M, K), w (N, K),
b (N,), z = x @ w.T + b (M, N), y = activation(z) (M, N); ``dz`` is the gradient of the loss by z, and so on.

NaN goes through as NaN, in derivatives too. Backpropagation is textbook material: Goodfellow, Bengio, Courville, "Deep
Learning" (2016), section 6.5.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import numpy as np

from fusemlp_kernels.contract import LossSpec, Perturbation, TensorRule, UpdateRule

Array: TypeAlias = np.ndarray[Any, np.dtype[Any]]
# The optimizer's arrays, for each layer and each of its parameters.
State: TypeAlias = list[list[tuple[Array, ...]]]

_erfc = np.vectorize(math.erfc, otypes=[np.float64])


def softplus(z: Array) -> Array:
    """log(1 + exp(z)), written so that no exponential overflows."""
    return np.asarray(np.maximum(z, 0.0) + np.log1p(np.exp(-np.abs(z))))


def sigmoid(z: Array) -> Array:
    """1 / (1 + exp(-z)). Note that 1 - sigmoid(z) = sigmoid(-z)."""
    return np.exp(-softplus(-z))


def normal_cdf(z: Array) -> Array:
    """The normal distribution function; erfc keeps the relative accuracy of the left tail."""
    return np.asarray(0.5 * _erfc(-z / math.sqrt(2.0)))


def normal_density(z: Array) -> Array:
    """The normal density."""
    return np.asarray(np.exp(-0.5 * z * z) / math.sqrt(2.0 * math.pi))


def elu(z: Array, a: Any) -> Array:
    """z above zero, a (exp(z) - 1) elsewhere (Clevert et al., 2016)."""
    return np.where(z > 0, z, a * np.expm1(np.minimum(z, 0.0)))


def elu_grad(z: Array, a: Any) -> Array:
    """The derivative of ``elu``; at z = 0 it is a."""
    return np.where(z > 0, 1.0, a * np.exp(np.minimum(z, 0.0)))


def mish_grad(z: Array) -> Array:
    """The derivative of z tanh(softplus(z)) (Misra, 2020): with g = sigmoid(-z), tanh' = 4 g**2 / (1 + g**2)**2."""
    g = sigmoid(-z)
    # the product is 0 from 400 on, at infinity too
    return np.asarray(np.tanh(softplus(z)) + np.minimum(z, 400.0) * (sigmoid(z) * 4.0 * g**2 / (1.0 + g**2) ** 2))


# scale and alpha (Klambauer et al., 2017): with them mean 0 and variance 1 of z are a fixed point
SELU = 1.0507009873554804934193349852946, 1.6732632423543772848170429916717

# f(z) and f'(z); a is the slope below zero, or elu's factor. heaviside is 0 up to 0, then 1, and NaN at NaN.
# gelu is the exact form (Hendrycks and Gimpel, 2016), its derivative contains the normal density.
_ACTIVATIONS: dict[str, tuple[Callable[[Array, Any], Array], Callable[[Array, Any], Array]]] = {
    "identity": (lambda z, a: z.copy(), lambda z, a: np.ones_like(z)),
    "relu": (lambda z, a: np.maximum(z, 0.0), lambda z, a: np.heaviside(z, 0.0)),
    "leaky_relu": (lambda z, a: np.where(z > 0, z, a * z), lambda z, a: np.where(z <= 0, a, np.heaviside(z, 0.0))),
    "sigmoid": (lambda z, a: sigmoid(z), lambda z, a: sigmoid(z) * sigmoid(-z)),
    "tanh": (lambda z, a: np.tanh(z), lambda z, a: 1.0 - np.tanh(z) ** 2),
    "gelu": (lambda z, a: z * normal_cdf(z), lambda z, a: normal_cdf(z) + z * normal_density(z)),
    "silu": (lambda z, a: z * sigmoid(z), lambda z, a: sigmoid(z) * (1.0 + z * sigmoid(-z))),
    "elu": (elu, elu_grad),
    "selu": (lambda z, a: SELU[0] * elu(z, SELU[1]), lambda z, a: SELU[0] * elu_grad(z, SELU[1])),
    "softplus": (lambda z, a: softplus(z), lambda z, a: sigmoid(z)),
    "mish": (lambda z, a: z * np.tanh(softplus(z)), lambda z, a: mish_grad(z)),
}
# The slope is given for leaky_relu and learned for prelu.
_ACTIVATIONS["prelu"] = _ACTIVATIONS["leaky_relu"]


def activation(name: str, z: Array, slope: Any = 0.0) -> Array:
    """y = f(z), shaped like z. ``slope`` is the factor below zero of leaky_relu, prelu and elu."""
    return _ACTIVATIONS[name][0](z, slope)


def activation_grad(name: str, z: Array, slope: Any = 0.0) -> Array:
    """f'(z), shaped like z. At the kink z = 0 relu' is 0, leaky_relu' and elu' are the slope, as in torch."""
    return _ACTIVATIONS[name][1](z, slope)


def dropout(y: Array, keep: Array | None, rate: float) -> Array:
    """Inverted dropout (Srivastava et al., 2014): kept elements grow by 1 / (1 - rate), the others are zero.

    ``keep`` (M, N) bool, or None for no dropout. The same function carries a gradient backward.
    """
    return y if keep is None else np.where(keep, y / (1.0 - rate), 0.0)


def linear(x: Array, w: Array, b: Array, activation: str = "identity", slope: Any = 0.0) -> Array:
    """One layer forward: y = f(x @ w.T + b), (M, N)."""
    return _ACTIVATIONS[activation][0](x @ w.T + b, slope)


def log_softmax(y: Array) -> Array:
    """The logarithms of each row's probabilities, (M, N); no exponential overflows."""
    shifted = y - y.max(axis=1, keepdims=True)
    return np.asarray(shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True)))


def loss_of_output(
    spec: LossSpec, y: Array, target: Array, weight: Array | None = None, class_weight: Array | None = None
) -> tuple[float, Array]:
    """The loss of the outputs y (M, N), and its gradient dy (M, N).

    target: (M,) integer classes for cross_entropy (``spec.soft``: (M, N) probabilities), else (M, N) values.
    weight: (M,), one a row. class_weight: (N,), cross_entropy only. Cross-entropies take logits.

    "mean" divides by the sum of the weights, times N for the element-wise losses. Cross-entropy is torch's: with
    q = target * (1 - eps) + eps / N the loss of a row is -sum_c q_c * class_weight_c * log softmax(y)_c, and with
    integer targets a row's share of the normaliser is its weight times its class's. Rows of ``ignore_index`` weigh
    nothing; other labels lie in range(N). A zero normaliser gives loss 0 and gradient 0. At a residual of zero
    mae and quantile take the subgradient 0. "rows": the loss is that of "mean", and row i of dy is the gradient of row
    i's own loss, which for the element-wise losses is the mean over N.

    gaussian has 2 outputs a target, quantiles all of one target (M, 1); their sums over a row have as many summands as
    ``spec.summands``. ``spec.missing``: a target that is NaN has no loss, and "mean" divides by the sum of the weights
    of the others.
    """
    rows, columns = y.shape
    weights = np.ones(rows) if weight is None else np.asarray(weight, np.float64)
    if spec.kind == "cross_entropy":
        classes = np.ones(columns) if class_weight is None else np.asarray(class_weight, np.float64)
        if spec.soft:
            shares, wanted = weights, target
        else:
            wanted = (target[:, None] == np.arange(columns)) & (target != spec.ignore_index)[:, None]
            weights = weights * wanted.any(axis=1)
            shares = weights * (wanted @ classes)
        eps = spec.label_smoothing
        q = weights[:, None] * classes * (wanted * (1.0 - eps) + eps / columns)
        log_p = log_softmax(y)
        total = -(q * log_p).sum()
        dy = np.exp(log_p) * q.sum(axis=1, keepdims=True) - q
        each, normaliser = 1, shares.sum()
    else:
        there = ~np.isnan(target) if spec.missing else np.ones_like(target, bool)
        loss, slope = _of_targets(spec, y, np.where(there, target, 0.0) if spec.missing else target)
        total = (weights[:, None] * np.where(there, loss, 0.0)).sum()
        # gaussian has the slopes by all means before those by all deviations
        dy = weights[:, None] * np.where(np.tile(there, columns // target.shape[1]), slope, 0.0)
        each = spec.summands(columns)
        normaliser = (weights[:, None] * there).sum() if spec.missing else weights.sum() * each
    if spec.reduction == "sum":
        return float(total), dy
    if normaliser == 0:
        return 0.0, np.zeros_like(dy)
    return float(total / normaliser), dy / (each if spec.reduction == "rows" else normaliser)


def _of_targets(spec: LossSpec, y: Array, t: Array) -> tuple[Array, Array]:
    """The losses of targets t, and their derivatives by the outputs y."""
    if spec.kind == "gaussian":
        mean, raw = np.split(y, 2, axis=1)
        std, error = softplus(raw), mean - t
        v = np.maximum(std**2, spec.eps)
        # the slope passes through the floor
        by_std = std / v - error**2 * std / v**2
        return 0.5 * (np.log(v) + error**2 / v), np.hstack([error / v, by_std * sigmoid(raw)])
    if spec.kind == "quantiles":
        levels, places = np.array(spec.quantiles), np.arange(y.shape[1])
        middle = np.argmin(np.abs(levels - 0.5))
        # output i is in quantile j by this factor: the middle in all, a step in those from its own on
        above = (places[:, None] > middle) & (places[:, None] <= places)
        below = (places[:, None] < middle) & (places[:, None] >= places)
        factors = above * 1.0 - below + (places[:, None] == middle)
        error = np.where(places == middle, y, softplus(y)) @ factors - t
        side = np.where(error > 0, 1.0 - levels, -levels) * (error != 0)
        return (side * error).sum(axis=1, keepdims=True), side @ factors.T * np.where(places == middle, 1.0, sigmoid(y))
    return _elementwise(spec, y, t)


def _elementwise(spec: LossSpec, y: Array, t: Array) -> tuple[Array, Array]:
    """The losses that look at one output at a time, and their derivatives by y."""
    r = y - t
    match spec.kind:
        case "binary_cross_entropy":
            # -t log sigmoid(y) - (1 - t) log(1 - sigmoid(y))
            return t * softplus(-y) + (1.0 - t) * softplus(y), sigmoid(y) - t
        case "mse":
            return r**2, 2.0 * r
        case "mae":
            return np.abs(r), np.sign(r)
        case "huber":
            d = spec.delta
            return np.where(np.abs(r) <= d, 0.5 * r**2, d * (np.abs(r) - 0.5 * d)), np.clip(r, -d, d)
        case "poisson":
            return np.exp(y) - t * y, np.exp(y) - t
        case "quantile":
            side = np.where(r > 0, 1.0 - spec.quantile, spec.quantile)
            return side * np.abs(r), side * np.sign(r)
    raise KeyError(spec.kind)


def loss_grad(
    spec: LossSpec,
    z: Array,
    target: Array,
    weight: Array | None = None,
    class_weight: Array | None = None,
    activation: str = "identity",
    slope: Any = 0.0,
) -> tuple[float, Array]:
    """The loss, and its gradient dz by the output layer's pre-activation z (M, N): dz = dy * f'(z)."""
    y = _ACTIVATIONS[activation][0](z, slope)
    loss, dy = loss_of_output(spec, y, target, weight, class_weight)
    return loss, dy * activation_grad(activation, z, slope)


def correct(spec: LossSpec, y: Array, target: Array) -> Array:
    """Hits, bool (M,): the largest output is the wanted one. binary_cross_entropy: (M, N), y > 0 is "yes"."""
    if spec.kind == "binary_cross_entropy":
        return np.asarray((y > 0) == (target > 0.5))
    if spec.kind == "cross_entropy" and not spec.soft:
        return np.asarray((y.argmax(axis=1) == target) & (target != spec.ignore_index))
    return np.asarray(y.argmax(axis=1) == target.argmax(axis=1))


def output_grad(dz: Array, w: Array, keep: Array | None = None, rate: float = 0.0) -> Array:
    """Back through a layer's product: the gradient by the previous layer's output before dropout, (M, K)."""
    return dropout(dz @ w, keep, rate)


def grad_input(
    dz: Array, w: Array, z: Array, activation: str, slope: Any = 0.0, keep: Array | None = None, rate: float = 0.0
) -> Array:
    """dz of the previous layer, (M, K), from this layer's dz (M, N) and w (N, K); the rest is the previous's."""
    return output_grad(dz, w, keep, rate) * activation_grad(activation, z, slope)


def grad_slope(dy: Array, z: Array) -> Array:
    """The gradient of prelu's one slope, (1,): dy of the layer's output, z its pre-activation."""
    return np.asarray([np.sum(dy * np.minimum(z, 0.0))])


def grad_weight(dz: Array, x: Array) -> tuple[Array, Array]:
    """dw (N, K) and db (N,) of a layer, from its dz (M, N) and its input x (M, K)."""
    return dz.T @ x, dz.sum(axis=0)


def normalise(x: Array, eps: float, *, centred: bool) -> Array:
    """The rows of x (M, N), each normalised over its N values: (x - mean) / sqrt(variance + eps) (Ba et al., 2016), or
    not ``centred`` x / sqrt(mean of x**2 + eps) (Zhang and Sennrich, 2019)."""
    c = x - x.mean(axis=1, keepdims=True) if centred else x
    return np.asarray(c / np.sqrt(np.mean(c**2, axis=1, keepdims=True) + eps))


def normalise_grad(dn: Array, x: Array, eps: float, *, centred: bool) -> Array:
    """The gradient by x, from that by the normalised rows: both (M, N).

    With n = c / r, c = x - mean and r = sqrt(mean(c**2) + eps): dc = (dn - n * mean(dn * n)) / r, as dr / dc is
    n / N; and dx is dc less its mean, since each x is in the mean.
    """
    c, n = x - x.mean(axis=1, keepdims=True) if centred else x, normalise(x, eps, centred=centred)
    root = np.sqrt(np.mean(c**2, axis=1, keepdims=True) + eps)
    dc = (dn - n * np.mean(dn * n, axis=1, keepdims=True)) / root
    return np.asarray(dc - dc.mean(axis=1, keepdims=True) if centred else dc)


def clip_factor(grads: Iterable[Array], max_norm: float | None) -> float:
    """Return the factor that clips the common norm of all gradients to max_norm, as torch's clip_grad_norm_."""
    if max_norm is None:
        return 1.0
    norm = np.sqrt(sum(np.sum(np.square(g)) for g in grads))
    return float(np.minimum(1.0, max_norm / (norm + 1e-6)))


def update(
    rule: UpdateRule, tensor: TensorRule, p: Array, g: Array, state: tuple[Array, ...], t: int, lr: float
) -> tuple[Array, tuple[Array, ...]]:
    """One tensor's new value and new optimizer state, from its gradient g; all shaped like p.

    t counts the updates before this one; lr is the learning rate. state: () for plain SGD, (velocity,) with momentum,
    (first moment, second moment) for Adam; all start at zero. With ``ema`` an average of the new values comes last, in
    which each weighs ``ema`` times as much as the one after it; as Adam's moments it is divided by the sum of weights.

    Weight decay is added to the gradient, or, ``decoupled`` (Loshchilov and Hutter, 2019), shrinks p by itself.
    scikit-learn's convention differs from torch's in two places: the learning rate is kept inside the velocity, and
    Adam's eps comes before the bias correction (Kingma and Ba, 2015, the remark at the end of section 2).
    """
    if rule.ema:
        p, others = update(replace(rule, ema=0.0), tensor, p, g, state[:-1], t, lr)
        share = (1.0 - rule.ema) / (1.0 - rule.ema ** (t + 1))
        return p, (*others, (1.0 - share) * state[-1] + share * p)
    lr = lr * tensor.lr_factor
    inside = rule.convention == "scikit-learn"
    if rule.decoupled:
        p = p * (1.0 - lr * tensor.weight_decay)
    else:
        g = g + tensor.weight_decay * p
    if rule.kind == "adam":
        m = rule.beta1 * state[0] + (1.0 - rule.beta1) * g
        v = rule.beta2 * state[1] + (1.0 - rule.beta2) * g**2
        bc1, bc2 = 1.0 - rule.beta1 ** (t + 1), 1.0 - rule.beta2 ** (t + 1)
        if inside:
            return p - lr * math.sqrt(bc2) / bc1 * m / (np.sqrt(v) + rule.eps), (m, v)
        return p - lr * (m / bc1) / (np.sqrt(v / bc2) + rule.eps), (m, v)
    if not rule.momentum:
        return p - lr * g, ()
    if inside:
        velocity = rule.momentum * state[0] - lr * g
        return p + (rule.momentum * velocity - lr * g if rule.nesterov else velocity), (velocity,)
    velocity = rule.momentum * state[0] + g
    return p - lr * (g + rule.momentum * velocity if rule.nesterov else velocity), (velocity,)


@dataclass(frozen=True)
class Layer:
    """w (N, K), b (N,), the activation behind them, its slope (for prelu an array (1,)), the dropout rate."""

    w: Array
    b: Array
    activation: str = "identity"
    slope: Any = 0.0
    rate: float = 0.0

    @property
    def parameters(self) -> tuple[Array, ...]:
        return (self.w, self.b, self.slope) if self.activation == "prelu" else (self.w, self.b)


@dataclass(frozen=True)
class Batch:
    """x (M, K) and what ``loss_of_output`` wants; keeps: each layer's dropout mask (M, N) bool, or None."""

    x: Array
    target: Array
    weight: Array | None = None
    class_weight: Array | None = None
    keeps: Sequence[Array | None] | None = None


def gradients(layers: Sequence[Layer], spec: LossSpec, batch: Batch) -> tuple[float, list[tuple[Array, ...]], Array]:
    """Forward and backward: the loss, for each layer the gradients of its ``parameters``, and dx (M, K)."""
    keeps = batch.keeps or [None] * len(layers)
    inputs, zs = [batch.x], []
    for layer, keep in zip(layers, keeps, strict=True):
        zs.append(linear(inputs[-1], layer.w, layer.b))
        inputs.append(dropout(activation(layer.activation, zs[-1], layer.slope), keep, layer.rate))
    loss, dy = loss_of_output(spec, inputs[-1], batch.target, batch.weight, batch.class_weight)
    grads: list[tuple[Array, ...]] = []
    for i in reversed(range(len(layers))):
        layer = layers[i]
        dz = dy * activation_grad(layer.activation, zs[i], layer.slope)
        learned = (grad_slope(dy, zs[i]),) if layer.activation == "prelu" else ()
        grads.insert(0, grad_weight(dz, inputs[i]) + learned)
        # nothing drops the inputs
        dy = output_grad(dz, layer.w, keeps[i - 1], layers[i - 1].rate) if i else output_grad(dz, layer.w)
    return loss, grads, dy


def of_members(vectors: Array, rows: int) -> Array:
    """The vectors (members, K) of the rows of a batch, (M, K): row i belongs to member i % members."""
    return vectors[np.arange(rows) % len(vectors)]


def member_sums(terms: Array, members: int) -> Array:
    """The sums of ``terms`` (M, K) over the rows of each member, (members, K)."""
    return np.asarray(terms.reshape(-1, members, terms.shape[1]).sum(axis=0))


@dataclass(frozen=True)
class MemberLayer:
    """One layer of k members (Gorishniy et al., "TabM", 2025): w (N, K) is common, r (k, K), s and b (k, N) are not."""

    r: Array
    w: Array
    s: Array
    b: Array
    activation: str = "identity"
    slope: float = 0.0
    rate: float = 0.0


def member_gradients(
    layers: Sequence[MemberLayer], heads: tuple[Array, Array], spec: LossSpec, batch: Batch
) -> tuple[float, list[tuple[Array, ...]]]:
    """Forward and backward of members that share weights: the loss, and the gradients by each layer's r, w, s and b;
    the last are those by the heads.

    The members of a data row are rows of the batch, one after another. A layer is z = ((x * r) @ w.T) * s + b. Each
    member has its own output layer: heads are w (k, N, K) and b (k, N). The loss is the mean over all rows: that of
    the members' losses.
    """
    rows, members = len(batch.x), len(heads[0])
    keeps = batch.keeps or [None] * len(layers)
    inputs, products, zs = [batch.x], [], []
    for layer, keep in zip(layers, keeps, strict=True):
        products.append((inputs[-1] * of_members(layer.r, rows)) @ layer.w.T)
        zs.append(products[-1] * of_members(layer.s, rows) + of_members(layer.b, rows))
        inputs.append(dropout(activation(layer.activation, zs[-1], layer.slope), keep, layer.rate))
    owners = np.arange(rows) % members
    y = np.einsum("ik,ink->in", inputs[-1], heads[0][owners]) + heads[1][owners]
    loss, dz = loss_of_output(spec, y, batch.target, batch.weight, batch.class_weight)
    by_heads = np.zeros_like(heads[0]), np.zeros_like(heads[1])
    for member in range(members):
        by_heads[0][member], by_heads[1][member] = grad_weight(dz[member::members], inputs[-1][member::members])
    grads: list[tuple[Array, ...]] = [by_heads]
    dy = np.einsum("in,ink->ik", dz, heads[0][owners])
    for i in reversed(range(len(layers))):
        layer = layers[i]
        dz = dropout(dy, keeps[i], layer.rate) * activation_grad(layer.activation, zs[i], layer.slope)
        du, r = dz * of_members(layer.s, rows), of_members(layer.r, rows)
        dx = du @ layer.w
        by_w, _ = grad_weight(du, inputs[i] * r)
        sums = [member_sums(terms, members) for terms in (dx * inputs[i], dz * products[i], dz)]
        grads.insert(0, (sums[0], by_w, sums[1], sums[2]))
        dy = dx * r
    return loss, grads


def clipped_gradients(
    layers: Sequence[Layer], spec: LossSpec, batch: Batch, clip: float, frozen: Iterable[tuple[int, int]] = ()
) -> list[tuple[Array, ...]]:
    """The sums over the rows of their gradients, each clipped to the norm ``clip`` (Abadi et al., 2016).

    A row's gradient is that of its own loss, by all parameters but the ``frozen`` (layer, place in ``parameters``).
    """
    totals = [[np.zeros_like(p) for p in layer.parameters] for layer in layers]
    for i in range(len(batch.x)):
        keeps = None if batch.keeps is None else [None if keep is None else keep[i : i + 1] for keep in batch.keeps]
        weight = None if batch.weight is None else batch.weight[i : i + 1]
        row = Batch(batch.x[i : i + 1], batch.target[i : i + 1], weight, batch.class_weight, keeps)
        _, grads, _ = gradients(layers, replace(spec, reduction="rows"), row)
        trained = {
            (k, j): g for k, gradients in enumerate(grads) for j, g in enumerate(gradients) if (k, j) not in set(frozen)
        }
        norm = math.sqrt(sum(float(np.sum(g**2)) for g in trained.values()))
        for (k, j), g in trained.items():
            totals[k][j] += g if norm <= clip else g * (clip / norm)
    return [tuple(gradients) for gradients in totals]


def perturb(x: Array, d: Array, change: Perturbation, dx: Array | None = None) -> Array:
    """The inputs x + d (M, K) after a step that raises the loss, dx being its gradient there; None: no step.

    Goodfellow, Shlens and Szegedy, "Explaining and harnessing adversarial examples", 2015; projected: Madry et al.,
    "Towards deep learning models resistant to adversarial attacks", 2018.
    """

    def norms(a: Array) -> Array:
        return np.asarray(np.sqrt(np.sum(a**2, axis=1, keepdims=True)))

    if dx is not None:
        lengths = norms(dx)
        direction = np.sign(dx) if change.norm == "inf" else dx / np.where(lengths == 0, 1.0, lengths)
        d = d + change.step * direction
    if change.norm == "inf":
        d = np.clip(d, -change.eps, change.eps)
    else:
        d = d * (change.eps / np.maximum(norms(d), change.eps))
    return np.asarray(np.clip(x + d, change.low, change.high))


def encode(x: Array, octaves: int, inputs: bool = False) -> Array:
    """Waves of the inputs x (M, K), and with ``inputs`` x before them (Mildenhall et al., "NeRF", 2020, equation 4)."""
    # sine and cosine have the period 2 in t
    t = np.fmod(x[:, :, None] * 2.0 ** np.arange(octaves), 2.0)
    waves = np.stack([np.sin(np.pi * t), np.cos(np.pi * t)], axis=-1).reshape(len(x), -1)
    return np.hstack([x, waves]) if inputs else waves


def encode_grad(x: Array, dy: Array, octaves: int, inputs: bool = False) -> Array:
    """The gradient by x (M, K) from that by the waves, dy (M, N)."""
    by_x, by_waves = np.split(dy, [x.shape[1] * inputs], axis=1)
    waves, d = (a.reshape(*x.shape, octaves, 2) for a in (encode(x, octaves), by_waves))
    slopes = waves[..., 1] * d[..., 0] - waves[..., 0] * d[..., 1]
    dx = np.sum(np.pi * 2.0 ** np.arange(octaves) * slopes, axis=-1)
    return np.asarray(dx + by_x if inputs else dx)


def initial_state(rule: UpdateRule, layers: Sequence[Layer]) -> State:
    """The optimizer's state before the first update: zeros, for each layer and each of its parameters."""
    return [[tuple(np.zeros_like(p) for _ in range(rule.state_count)) for p in a.parameters] for a in layers]


def train_step(
    layers: Sequence[Layer],
    state: State,
    spec: LossSpec,
    rule: UpdateRule,
    t: int,
    lr: float,
    batch: Batch,
    tensors: Sequence[Sequence[TensorRule]] | None = None,
) -> tuple[float, list[Layer], State]:
    """One step of training at the learning rate ``lr`` after ``t`` others: the loss before it, the new layers and
    optimizer state.

    tensors: for each layer the rules of its ``parameters``; by default they are all trained alike.
    """
    loss, grads, _ = gradients(layers, spec, batch)
    factor = clip_factor((g for layer in grads for g in layer), rule.clip_norm)
    new_layers, new_state = [], []
    for i, layer in enumerate(layers):
        rules = tensors[i] if tensors else [TensorRule()] * len(layer.parameters)
        parts = zip(rules, layer.parameters, grads[i], state[i], strict=True)
        done = [update(rule, tensor, p, factor * g, s, t, lr) for tensor, p, g, s in parts]
        values = [p for p, _ in done]
        slope = values[2] if len(values) == 3 else layer.slope
        new_layers.append(replace(layer, w=values[0], b=values[1], slope=slope))
        new_state.append([s for _, s in done])
    return loss, new_layers, new_state
