"""The ops of the kernel contract on one layer, each with its comparison calls, for ``bench.kernels``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from bench.vendor import Run, Vendor, in_order
from fusemlp_kernels.checks import refusal
from fusemlp_kernels.clock import rate_table
from fusemlp_kernels.contract import (
    COUNTERS,
    HYPER,
    LEARNING_RATE,
    ROW_COUNT,
    STATS,
    LossSpec,
    Segment,
    TensorRule,
    UpdateRule,
)

CLASSES = 10
RATE = 1e-3


@dataclass(frozen=True)
class Trial:
    """A kernel and its comparison calls; ``product`` is None for an op without a matrix product.

    ``flops``: of the product. ``bytes``: the minimum read and written, each value once in each direction.
    """

    op: str
    kernel: Run
    product: Run | None
    unfused: Run
    flops: int
    bytes: int


def trials(vendor: Vendor, m: int, k: int, n: int) -> list[Trial]:
    """Return every op of the contract on a layer of k inputs and n outputs and a batch of m rows."""
    bind = vendor.backend.bind
    x, w, b = vendor.matrix(m, k), vendor.matrix(n, k, scale=(2 / k) ** 0.5), vendor.vector(n)
    y, dz, dx = vendor.matrix(m, n), vendor.matrix(m, n, seed=1, scale=1 / m), vendor.matrix(m, k)
    # The output of the layer below: half zeros, as after relu.
    below = vendor.matrix(m, k, seed=2)
    vendor.xp.clip(below, 0, None, out=below)
    real, item = 4 if b.itemsize == 4 else 8, x.itemsize
    counters = vendor.integers(np.zeros(COUNTERS))
    counters[ROW_COUNT] = m
    made = [
        Trial(
            "linear",
            bind("linear", x=x, w=w, b=b, y=y, activation="relu"),
            vendor.product(x, w.T, y),
            vendor.linear(x, w, b, y),
            2 * m * n * k,
            item * (m * k + n * k + m * n) + real * n,
        ),
        Trial(
            "grad_input",
            bind("grad_input", dz=dz, w=w, y=below, dz_prev=dx, activation="relu"),
            vendor.product(dz, w, dx),
            vendor.grad_input(dz, w, below, dx),
            2 * m * n * k,
            item * (m * n + n * k + 2 * m * k),
        ),
        *_losses(vendor, m, k, counters),
        *_updates(vendor, x, dz, k, n, counters),
    ]
    return made


def _losses(vendor: Vendor, m: int, k: int, counters: Any) -> list[Trial]:
    """Return the ops of an output layer: k inputs, ``CLASSES`` outputs, cross-entropy."""
    n, bind = CLASSES, vendor.backend.bind
    h, w, b = vendor.matrix(m, k), vendor.matrix(n, k, scale=(1 / k) ** 0.5), vendor.vector(n)
    z, dz, stats = vendor.matrix(m, n), vendor.matrix(m, n), vendor.backend.allocate(STATS, "float64")
    logits = vendor.matrix(m, n)
    labels = vendor.integers(np.random.default_rng(0).integers(0, n, m))
    item, real = h.itemsize, b.itemsize
    common = {"target": labels, "counters": counters, "stats": stats, "loss": LossSpec("cross_entropy", accuracy=True)}
    forward = vendor.product(h, w.T, z)

    def add_bias() -> None:
        vendor.xp.add(z, b, out=z)

    return [
        Trial(
            "linear_loss_grad",
            bind("linear_loss_grad", x=h, w=w, b=b, dz=dz, activation="identity", **common),
            forward,
            in_order(forward, add_bias, vendor.loss_grad(z, dz, labels)),
            2 * m * n * k,
            item * (m * k + n * k + m * n) + real * n + 8 * m,
        ),
        Trial(
            "loss_grad",
            bind("loss_grad", z=logits, dz=dz, activation="identity", **common),
            None,
            vendor.loss_grad(logits, dz, labels),
            0,
            2 * item * m * n + 8 * m,
        ),
    ]


def _updates(vendor: Vendor, x: Any, dz: Any, k: int, n: int, counters: Any) -> list[Trial]:
    """Return the weight gradients, alone and with the update; and the update alone, over a flat arena."""
    bind, m = vendor.backend.bind, len(x)
    size = n * k
    w, b, dw, db = (vendor.matrix(n, k, "real"), vendor.vector(n), vendor.matrix(n, k, "real"), vendor.vector(n))
    moments = tuple(vendor.matrix(n, k, "real", scale=0.0) for _ in range(2))
    small = tuple(vendor.vector(n, fill=0.0) for _ in range(2))
    hyper = vendor.backend.allocate(HYPER, "float64")
    hyper[:] = 1.0
    hyper[LEARNING_RATE] = RATE
    rates = vendor.backend.from_host(rate_table(UpdateRule("sgd"), [RATE]), "float64")
    item, real = x.itemsize, w.itemsize
    flops, reads = 2 * m * n * k, item * (m * n + m * k)
    # The library's products have the type of their operands.
    their_dw, their_db = vendor.matrix(n, k), vendor.vector(n, "compute")
    product, gradients = vendor.product(dz.T, x, their_dw), vendor.grad_weight(dz, x, their_dw, their_db)
    sgd = UpdateRule("sgd")
    adam = UpdateRule("adam")
    layer = {"dz": dz, "x": x, "w": w, "b": b, "w_rule": TensorRule(), "b_rule": TensorRule()}
    clock = {"hyper": hyper, "rates": rates, "counters": counters}
    found = [
        Trial(
            "grad_weight",
            bind(
                "grad_weight", layers=[{"dz": dz, "x": x, "dw": dw, "db": db}], slopes=(), rule=sgd, counters=counters
            ),
            product,
            gradients,
            flops,
            reads + real * (size + n),
        ),
    ]
    if refusal(vendor.backend.traits.name, "grad_weight_update") is None:
        found += [
            Trial(
                "grad_weight_update, SGD",
                bind(
                    "grad_weight_update", layers=[layer | {"w_state": (), "b_state": ()}], slopes=(), rule=sgd, **clock
                ),
                product,
                in_order(gradients, vendor.sgd(w, their_dw, RATE), vendor.sgd(b, their_db, RATE)),
                flops,
                reads + 2 * real * (size + n),
            ),
            Trial(
                "grad_weight_update, Adam",
                bind(
                    "grad_weight_update",
                    layers=[layer | {"w_state": moments, "b_state": small}],
                    slopes=(),
                    rule=adam,
                    **clock,
                ),
                product,
                in_order(gradients, vendor.adam(w, their_dw, *moments, RATE), vendor.adam(b, their_db, *small, RATE)),
                flops,
                reads + 6 * real * (size + n),
            ),
        ]
    params, grads = vendor.vector(size), vendor.vector(size, seed=1)
    states = tuple(vendor.vector(size, fill=0.0) for _ in range(2))
    segments = (Segment(0, size, TensorRule()),)
    found.append(
        Trial(
            "update, Adam",
            bind("update", params=params, grads=grads, states=states, segments=segments, rule=adam, **clock),
            None,
            vendor.adam(params, grads, *states, RATE),
            0,
            real * size * 7,
        )
    )
    return found
