"""The oracle's gradients against central differences of its loss: every activation with every loss."""

import itertools
import zlib
from dataclasses import replace

import numpy as np
import pytest
from tolerance import UNIT, assert_within

from fusemlp_kernels import reference
from fusemlp_kernels.contract import ACTIVATIONS, LOSSES, LossSpec
from fusemlp_kernels.reference import Batch, Layer

# Central differences with step h have the truncation error h^2/6 |f'''| and the rounding error c u |f| / h. With f and
# f''' of order one they balance at h = u^(1/3), 4.8e-6, where both are about u^(2/3) = 2.3e-11.
U = UNIT["float64"]
STEP = U ** (1 / 3)
KINKED = {"relu", "leaky_relu", "prelu", "elu", "selu"}
SMOOTH_LOSSES = {"cross_entropy", "binary_cross_entropy", "mse", "poisson"}
# Third derivatives here come from products of up to three layers' weights, inputs and curvatures, each below 3: less
# than 3^6 of the unit; the loss itself takes some hundred operations.
TOLERANCE = (3**6 / 6) * STEP**2 + 100 * U / STEP


def case(hidden, kind, weighted):
    """Return a random network, a loss and a batch with every kink farther away than ten steps of h."""
    rng = np.random.default_rng(zlib.crc32(f"{hidden} {kind} {weighted}".encode()))
    widths = [int(w) for w in rng.integers(2, 6, int(rng.integers(3, 5)))]
    spec = LossSpec(
        kind,
        reduction="sum" if rng.random() < 0.3 else "mean",
        label_smoothing=0.1 if rng.random() < 0.5 else 0.0,
        ignore_index=1 if rng.random() < 0.5 else None,
        soft=bool(rng.random() < 0.3),
        delta=0.7,
        quantile=0.3,
    )
    output = "identity" if kind in ("cross_entropy", "binary_cross_entropy", "poisson") else hidden
    names = [hidden] * (len(widths) - 2) + [output]
    rates = [0.25] * (len(widths) - 2) + [0.0]
    while True:
        layers = [
            Layer(rng.normal(0, 0.6, (n, k)), rng.normal(0, 0.3, n), name, slope_of(name, rng), rate)
            for k, n, name, rate in zip(widths[:-1], widths[1:], names, rates, strict=True)
        ]
        rows = int(rng.integers(2, 6))
        batch = Batch(
            x=rng.normal(0, 1, (rows, widths[0])),
            target=targets(spec, rng, rows, widths[-1]),
            weight=rng.uniform(0.2, 2, rows) if weighted else None,
            class_weight=rng.uniform(0.5, 2, widths[-1]) if weighted and kind == "cross_entropy" else None,
            keeps=[rng.random((rows, n)) >= rate if rate else None for n, rate in zip(widths[1:], rates, strict=True)],
        )
        if far_from_kinks(layers, spec, batch):
            return layers, spec, batch


def slope_of(name, rng):
    return {"leaky_relu": 0.1, "prelu": rng.uniform(0.1, 0.4, 1), "elu": 1.3}.get(name, 0.0)


def targets(spec, rng, rows, columns):
    if spec.kind == "cross_entropy" and not spec.soft:
        return rng.integers(0, columns, rows)
    values = rng.uniform(0.1, 1.0, (rows, columns))
    return values / values.sum(axis=1, keepdims=True) if spec.kind == "cross_entropy" else values


def far_from_kinks(layers, spec, batch):
    """Return whether every kink is beyond the change of z by a step of h, here at most about 10 h a layer."""
    reach = 10.0 ** len(layers) * STEP
    y = batch.x
    for layer, keep in zip(layers, batch.keeps, strict=True):
        z = reference.linear(y, layer.w, layer.b)
        if layer.activation in KINKED and np.abs(z).min() < reach:
            return False
        y = reference.dropout(reference.activation(layer.activation, z, layer.slope), keep, layer.rate)
    if spec.kind in SMOOTH_LOSSES:
        return True
    kink = spec.delta if spec.kind == "huber" else 0.0
    return np.abs(np.abs(y - batch.target) - kink).min() > reach


FIELDS = ("w", "b", "slope")


def central_difference(layers, spec, batch, index, field):
    """Return the derivative of the loss by each element of one parameter."""
    value = getattr(layers[index], field)
    result = np.empty(value.shape)
    for at in np.ndindex(value.shape):
        losses = []
        for sign in (1.0, -1.0):
            moved = value.copy()
            moved[at] += sign * STEP
            changed = [*layers[:index], replace(layers[index], **{field: moved}), *layers[index + 1 :]]
            losses.append(reference.gradients(changed, spec, batch)[0])
        result[at] = (losses[0] - losses[1]) / (2.0 * STEP)
    return result


@pytest.mark.parametrize("weighted", [False, True], ids=["unweighted", "weighted"])
@pytest.mark.parametrize(("hidden", "kind"), list(itertools.product(ACTIVATIONS, LOSSES)))
def test_gradients_are_the_derivatives_of_the_loss(hidden, kind, weighted):
    layers, spec, batch = case(hidden, kind, weighted)
    loss, grads = reference.gradients(layers, spec, batch)
    scale = max(1.0, abs(loss))
    for index, layer in enumerate(layers):
        for field, grad in zip(FIELDS[: len(layer.parameters)], grads[index], strict=True):
            assert_within(grad, central_difference(layers, spec, batch, index, field), TOLERANCE * scale)
