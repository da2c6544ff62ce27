"""All error bounds of results against the float64 oracle, and the one comparator.

``u`` is the unit roundoff of the arithmetic under test. A sum of K products in IEEE arithmetic is within
(2 sqrt(K) + 4) u of the sum of the products' magnitudes: rounding errors add up like a random walk (Higham and Mary,
"A new approach to probabilistic rounding error analysis", 2019, with a factor of 2 for safety). Element-wise functions
have a budget in ulps, one ulp being 2 u; the other functions here carry these errors on, to first order or better.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from fusemlp_kernels import reference

UNIT = {"float64": 2.0**-53, "float32": 2.0**-24}
U32 = UNIT["float32"]
# Below the smallest normal number the error is absolute, or the result is flushed to zero.
TINY = 2.0**-126

# Budgets in ulps of the function's scale: 1 for sigmoid and tanh (each may be computed from the other), max(1, |z|) for
# softplus, else |z|. Half an ulp a rounding, beside FUNCTION_ULPS of a function:
# 2 of a quotient on Triton:
# - elu: f 7.5 = tanh 4, quotient 2, and the slope, 1 - t, the product; f' half more by its sum
# - selu: f 7.5 times 1.76; f', from f, 2.7 more by two numbers and two sums
# - softplus: f 5.7 = exp 4 / 2, log1p 4 log(2), sum 0.85; f' 5.5 = half of these, tanh 4 / 3, quotient 1
# - mish: f 5.3 = exp 4 / 3, quotient 2, four roundings; f' 5.9 = exp 4 / 3, 3.5 of f / z, 4 of the other term, 0.264
ULPS = {
    "identity": 0, "relu": 0, "leaky_relu": 1, "prelu": 1, "sigmoid": 4, "tanh": 4, "gelu": 6, "silu": 5,
    "elu": 8, "selu": 16, "softplus": 6, "mish": 6,
}  # fmt: skip
# The largest |f'| and |f''|, rounded up. A kink has no second derivative: the exact sign decides the side.
LIPSCHITZ = {
    "identity": 1.0, "relu": 1.0, "leaky_relu": 1.0, "prelu": 1.0, "sigmoid": 0.25, "tanh": 1.0, "gelu": 1.13,
    "silu": 1.1, "elu": 1.0, "selu": 1.76, "softplus": 1.0, "mish": 1.09,
}  # fmt: skip
CURVATURE = {
    "identity": 0.0, "relu": 0.0, "leaky_relu": 0.0, "prelu": 0.0, "sigmoid": 0.1, "tanh": 0.77, "gelu": 0.8,
    "silu": 0.5, "elu": 1.0, "selu": 1.76, "softplus": 0.25, "mish": 0.65,
}  # fmt: skip
# z g(z): an error of g' counts |z| times.
GATED = {"gelu", "silu"}
FUNCTION_ULPS = 4


@dataclass(frozen=True)
class Products:
    """The difference of matrix products from IEEE arithmetic.

    ``factor``: the relative error of a factor when it is read. ``truncation``: tensor cores truncate where IEEE
    rounds, as they add up (Ootomo and Yokota, "Recovering single precision accuracy from Tensor Cores", 2022): an
    error of truncation * K * u times the largest partial sum.
    """

    factor: float = 0.0
    truncation: float = 0.0


IEEE = Products()
# Ten bits of fraction, the others cut off.
TF32 = Products(factor=2.0**-10, truncation=0.25)
# Three products of leading parts of eleven bits, cut off, and trailing parts. Lost are the product of the trailing
# parts, 2**-20, and what each trailing part has beyond eleven bits, 2**-21. The two products with a trailing part have
# their own sum, whose magnitude is 2**-10 of the other's.
TF32X3 = Products(factor=2.0**-20, truncation=TF32.truncation * (1.0 + 2.0 * 2.0**-10))
TWO_BYTES = Products(truncation=0.125)


def growth(k):
    """Return the error of a reduction of length k, in units of u."""
    return 2.0 * np.sqrt(k) + 4.0


def bound(k, magnitude, u=U32, *, output=0.0, ulps=0.0, products=IEEE, partial=None):
    """Return the error of a reduction of length k over products with magnitudes that sum to |x| @ |w| + |b|.

    ``output`` is the expected result: one rounding of it, and ``ulps`` for what follows the reduction. ``partial`` is
    the largest partial sum, where it is known to be less than ``magnitude``.
    """
    truncated = products.truncation * k * u * (magnitude if partial is None else partial)
    lost = growth(k) * u + 2.0 * products.factor
    return lost * magnitude + truncated + (1.0 + 2.0 * ulps) * u * np.abs(output) + TINY


def largest_partial_sum(a, b, products):
    """Return the largest partial magnitude of each element of a (M, K) @ b (K, N); None if nothing depends on it."""
    if not products.truncation or a.shape[1] == 0:
        return None
    return np.array([np.abs(np.cumsum(row[:, None] * b, axis=0)).max(axis=0) for row in a]).reshape(len(a), b.shape[1])


def rounded(error, value, output_unit, output_tiny=TINY):
    """Return the error of a result that is finally rounded to 16 bits: one more rounding on top of ``error``.

    float16 has 11 significant bits: half an ulp is 2**-11 of the result, or 2**-25 among the subnormal numbers.
    """
    return error + output_unit * (np.abs(value) + error) + (output_tiny if output_unit else 0.0)


def activation_bound(name, z, z_bound=0.0, slope=0.0, u=U32):
    """Return the error of f(z), from the error of z."""
    scale = 1.0 if name in ("sigmoid", "tanh") else np.maximum(np.abs(z), 1.0 if name == "softplus" else 0.0)
    steepest = np.maximum(LIPSCHITZ[name], np.abs(slope))
    return steepest * z_bound + 2.0 * ULPS[name] * u * scale * np.maximum(1.0, np.abs(slope)) + TINY


def activation_grad_bound(name, z, z_bound=0.0, slope=0.0, u=U32):
    """Return the error of f'(z), from z or from an f(z) rounded once. A kink within z_bound may go either way."""
    error = (CURVATURE[name] * z_bound + 2.0 * ULPS[name] * u) * np.maximum(1.0, np.abs(slope))
    if name in GATED:
        error = error + 2.0 * ULPS[name] * u * np.abs(z)
    if name in ("relu", "leaky_relu", "prelu", "elu", "selu"):
        jump = 0.71 if name == "selu" else np.abs(1.0 - slope)
        error = error + np.where(np.abs(z) <= z_bound, jump, 0.0) * (np.asarray(z_bound) > 0)
    return error


def linear_bound(x, w, b, activation="identity", slope=0.0, keep=None, rate=0.0, u=U32, products=IEEE):
    """Return the errors of z and of y = dropout(act(z)) of ``linear``, from exact operands."""
    z = reference.linear(x, w, b)
    magnitude, partial = np.abs(x) @ np.abs(w).T + np.abs(b), largest_partial_sum(x, w.T, products)
    z_bound = bound(x.shape[1] + 1, magnitude, u, output=z, products=products, partial=partial)
    y = np.abs(reference.dropout(reference.activation(activation, z, slope), keep, rate))
    y_bound = activation_bound(activation, z, z_bound, slope, u)
    # The factor 1 / (1 - rate) and the product with it are rounded.
    return z_bound, y_bound if keep is None else reference.dropout(y_bound, keep, rate) + 2.0 * u * y + TINY


def grad_slope_bound(dy, z, dy_bound, z_bound=0.0, u=U32):
    """Return the error of prelu's gradient, a sum of dy * min(z, 0) over all elements, from the errors of dy and z."""
    below = np.abs(np.minimum(z, 0.0))
    terms = np.abs(dy) * below
    carried = (dy_bound * (below + z_bound) + np.abs(dy) * z_bound).sum()
    return carried + bound(terms.size, (terms + u * terms).sum(), u)


def grad_input_bound(dz, w, z, activation, slope=0.0, keep=None, rate=0.0, u=U32, products=IEEE):
    """Return the error of ``grad_input``: z is of the previous layer; dz, w and z are exact."""
    k = dz.shape[1]
    dy_magnitude = reference.output_grad(np.abs(dz), np.abs(w), keep, rate)
    dy = np.abs(reference.output_grad(dz, w, keep, rate))
    factor = np.abs(reference.activation_grad(activation, z, slope))
    partial = largest_partial_sum(dz, w, products)
    partial = None if partial is None else reference.dropout(partial, keep, rate)
    error = bound(k, dy_magnitude, u, output=dy, ulps=2, products=products, partial=partial) * factor
    return error + dy_magnitude * activation_grad_bound(activation, z, 0.0, slope, u) + 2.0 * u * dy * factor + TINY


def loss_grad_bound(
    spec, z, target, weight=None, class_weight=None, activation="identity", slope=0.0, z_bound=0.0, u=U32
):
    """Return the errors of the loss and of dz (M, N), from the error of z."""
    y = reference.activation(activation, z, slope)
    y_bound = activation_bound(activation, z, z_bound, slope, u) * np.ones_like(z)
    kind = _cross_entropy_bound if spec.kind == "cross_entropy" else _elementwise_bound
    loss_error, dy_error = kind(spec, y, y_bound, target, weight, class_weight, u)
    if spec.reduction == "rows":
        # dz is that of the sum, divided by a number
        _, dy_error = kind(replace(spec, reduction="sum"), y, y_bound, target, weight, class_weight, u)
        dy_error = dy_error if spec.kind == "cross_entropy" else dy_error / y.shape[1]
    _, dy = reference.loss_of_output(spec, y, target, weight, class_weight)
    factor = np.abs(reference.activation_grad(activation, z, slope))
    factor_error = activation_grad_bound(activation, z, z_bound, slope, u)
    return loss_error + TINY, dy_error * (factor + factor_error) + np.abs(dy) * (factor_error + u * factor) + TINY


def _share(spec, rows, columns, weight, shares=None):
    """Return the factor on a row's loss."""
    weight = np.ones(rows) if weight is None else np.asarray(weight, np.float64)
    if spec.reduction == "sum":
        return weight
    normaliser = (weight.sum() * columns) if shares is None else (weight * shares).sum()
    return weight / normaliser if normaliser else np.zeros(rows)


def _cross_entropy_bound(spec, y, y_bound, target, weight, class_weight, u):
    rows, columns = y.shape
    classes = np.ones(columns) if class_weight is None else np.asarray(class_weight, np.float64)
    wanted = target if spec.soft else target[:, None] == np.arange(columns)
    counted = np.ones(rows) if spec.soft else ((target != spec.ignore_index) & wanted.any(axis=1)).astype(np.float64)
    share = _share(spec, rows, 1, weight, counted * (1.0 if spec.soft else wanted @ classes))
    q = (share * counted)[:, None] * classes * (wanted * (1.0 - spec.label_smoothing) + spec.label_smoothing / columns)
    shifted = np.abs(y - y.max(axis=1, keepdims=True))
    p = np.exp(-shifted)
    total = p.sum(axis=1, keepdims=True)
    p /= total
    # The logarithm of a probability: rounding the shift, the exponentials and their sum, and the error of y itself.
    sum_error = u * ((p * shifted).sum(axis=1, keepdims=True) + growth(columns) + 2.0 * FUNCTION_ULPS)
    log_error = u * (2.0 * shifted + 2.0 * FUNCTION_ULPS * (1.0 + np.log(total))) + sum_error
    log_error = log_error + y_bound + y_bound.max(axis=1, keepdims=True, initial=0.0)
    weights_error = u * (growth(rows) + 8.0)
    mass = q.sum(axis=1, keepdims=True)
    dy_error = p * mass * (np.expm1(log_error) + weights_error + u * growth(columns)) + q * weights_error
    magnitude = (q * (shifted + np.log(total))).sum()
    return (q * log_error).sum() + (u * growth(rows * columns) + weights_error) * magnitude, dy_error


def _elementwise_bound(spec, y, y_bound, target, weight, class_weight, u):
    rows, columns = y.shape
    share = _share(spec, rows, columns, weight)[:, None]
    _, slope = reference._elementwise(spec, y, target)
    r = np.abs(y - target)
    function = 2.0 * FUNCTION_ULPS * u
    # By kind: the error of the value, the error of the slope, and the magnitude of the value's terms.
    if spec.kind == "binary_cross_entropy":
        magnitude = np.abs(y) * (1.0 + np.abs(target)) + 1.0
        value_error = (1.0 + np.abs(target)) * y_bound + function * magnitude
        slope_error = 0.25 * y_bound + function + u * (1.0 + np.abs(target))
    elif spec.kind == "mse":
        magnitude = r**2
        value_error, slope_error = 2.0 * r * y_bound + y_bound**2 + 4.0 * u * r**2, 2.0 * y_bound + 3.0 * u * r
    elif spec.kind == "huber":
        magnitude = spec.delta * (r + spec.delta)
        value_error, slope_error = spec.delta * y_bound + 4.0 * u * magnitude, y_bound + 2.0 * u * (r + spec.delta)
    elif spec.kind == "poisson":
        magnitude = np.exp(y) + np.abs(target * y)
        value_error = (np.exp(y + y_bound) + np.abs(target)) * y_bound + function * magnitude
        slope_error = np.exp(y + y_bound) * y_bound + function * np.exp(y) + u * np.abs(slope)
    else:
        magnitude = r
        value_error = y_bound + 4.0 * u * r
        slope_error = np.where(r <= y_bound, 2.0, 0.0) * (y_bound > TINY) + 2.0 * u
    weights_error = u * (growth(rows) + 8.0)
    dy_error = share * (slope_error + np.abs(slope) * weights_error)
    reduction = u * growth(rows * columns) + weights_error
    return (share * (value_error + reduction * magnitude)).sum(), dy_error


def update_bound(rule, tensor, p, g, state, t, lr, g_bound=0.0, u=U32):
    """Return the errors of the new parameter and states, from the error of the gradient; p and states are exact."""
    if rule.ema:
        p_error, errors = update_bound(replace(rule, ema=0.0), tensor, p, g, state[:-1], t, lr, g_bound, u)
        new, (*_, average) = reference.update(rule, tensor, p, g, state, t, lr)
        share = (1.0 - rule.ema) / (1.0 - rule.ema ** (t + 1))
        # of the share, the difference, their product and the sum; and the oracle's own in fp64
        old = np.abs(state[-1])
        rounding = u * (4.0 * share * (np.abs(new) + old) + 2.0 * old + 2.0 * np.abs(average)) + TINY
        return p_error, (*errors, share * p_error + rounding)
    lr = lr * tensor.lr_factor
    g_error = g_bound + 3.0 * u * (np.abs(g) + tensor.weight_decay * np.abs(p))
    g = g if rule.decoupled else g + tensor.weight_decay * p
    new, new_state = reference.update(rule, tensor, p, g, state, t, lr / max(tensor.lr_factor, TINY))
    rounding = u * (2.0 * np.abs(p) + np.abs(new)) + TINY
    if rule.kind == "sgd":
        if not rule.momentum:
            return lr * g_error + 3.0 * u * lr * np.abs(g) + rounding, ()
        scale = lr if rule.convention == "scikit-learn" else 1.0
        v_error = scale * (g_error + 4.0 * u * np.abs(g)) + 3.0 * u * rule.momentum * np.abs(state[0]) + TINY
        size = np.abs(g) * lr + np.abs(new_state[0]) * lr / scale if scale else np.abs(new_state[0])
        step = (lr / scale if scale else 1.0) * v_error + lr * g_error + 5.0 * u * size
        return step + rounding, (v_error,)
    one, two = 1.0 - rule.beta1, 1.0 - rule.beta2
    m_error = one * g_error + 4.0 * u * (rule.beta1 * np.abs(state[0]) + one * np.abs(g)) + TINY
    squares = rule.beta2 * state[1] + two * g**2
    v_error = two * (2.0 * np.abs(g) * g_error + g_error**2) + 6.0 * u * squares + TINY
    bc1, bc2 = 1.0 - rule.beta1 ** (t + 1), 1.0 - rule.beta2 ** (t + 1)
    eps = rule.eps * (np.sqrt(1.0 / bc2) if rule.convention == "scikit-learn" else 1.0)
    low = np.sqrt(np.maximum(squares - v_error, 0.0) / bc2) + eps
    high = np.sqrt((squares + v_error) / bc2) + eps
    m = np.abs(rule.beta1 * state[0] + one * g)
    # The quotient lies between its extremes; six roundings lead from the moments to it.
    quotient = (m + m_error) / low - m / high + 6.0 * u * (m + m_error) / low
    return lr / bc1 * quotient + rounding, (m_error, v_error)


def assert_updated(param, states, rule, tensor, before, t, lr, g_bound=0.0, u=U32):
    """``assert_within`` for a parameter and its states; ``before``: the parameter, the gradient and the states."""
    new, new_states = reference.update(rule, tensor, *before, t, lr)
    limit, limits = update_bound(rule, tensor, *before, t, lr, g_bound, u)
    assert_within(param, new, limit)
    for state, wanted, most in zip(states, new_states, limits, strict=True):
        assert_within(state, wanted, most)


def assert_within(actual, expected, bound):
    """Assert that every element of ``actual`` is within ``bound`` of ``expected``, and NaN only where expected."""
    actual, expected = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
    assert actual.shape == expected.shape, f"shape {actual.shape}, expected {expected.shape}"
    with np.errstate(invalid="ignore"):
        error = np.abs(actual - expected)
    limit = np.broadcast_to(np.asarray(bound, np.float64), error.shape)
    same = (np.isnan(actual) & np.isnan(expected)) | (actual == expected)
    wrong = ~(error <= limit) & ~same
    if wrong.any():
        # Report the worst place: NaN first, then the largest multiple of the bound.
        over = np.where(np.isnan(error), np.inf, error / np.maximum(limit, np.finfo(np.float64).tiny))
        at = np.unravel_index(np.argmax(np.where(wrong, over, -1.0)), error.shape)
        raise AssertionError(
            f"{int(wrong.sum())} of {error.size} elements out of bound; worst at {tuple(map(int, at))}: "
            f"{actual[at]!r}, expected {expected[at]!r}, error {error[at]:.3g}, bound {limit[at]:.3g}"
        )
