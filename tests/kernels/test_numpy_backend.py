"""The NumPy backend's layers, forward and backward, against the oracle."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from calls import bind, slope_operands
from hypothesis import given
from hypothesis import strategies as st
from strategies import (
    CASES,
    DTYPES,
    UNITS,
    Unchanged,
    Values,
    exact,
    layouts,
    output_layouts,
    padded_rows,
    place,
    poisoned,
    precisions,
    seeds,
    sizes,
)
from tolerance import assert_within, bound, grad_input_bound, grad_slope_bound, linear_bound

from fusemlp_kernels import reference
from fusemlp_kernels.contract import (
    ACTIVATIONS,
    BATCH_INDEX,
    COUNTERS,
    NEEDS_Z,
    ROW_COUNT,
    Dropout,
    ScheduleSpec,
    UpdateRule,
)
from fusemlp_kernels.philox import dropout_keep

RATES = (0.1, 0.5, 0.9)
# leaky_relu reads its derivative off the output, so its slope is not negative; prelu's may be anything
SLOPES = (0.0, 0.01, 0.3, 1.0, 1.7)
LEARNED_SLOPES = (*SLOPES, -0.4)
SGD = UpdateRule("sgd", ScheduleSpec("constant", 0.1))


@st.composite
def slopes(draw, activation):
    """The operands slope and slope_param, and the slope as the oracle takes it."""
    if activation == "leaky_relu":
        return draw(st.sampled_from(SLOPES))
    return draw(st.sampled_from(LEARNED_SLOPES)) if activation == "prelu" else 0.0


def rounded_slope(activation, slope, dtype):
    """A learned slope is what the array holds; a fixed one is a float."""
    return float(dtype(slope)) if activation == "prelu" else slope


@dataclass(frozen=True)
class LayerCase:
    """One layer: x (m, k), w (n, k), its activation and its dropout (rate 0: none)."""

    precision: str
    m: int
    k: int
    n: int
    activation: str
    slope: float
    rate: float
    scale: float
    batch_index: int
    layouts: tuple[str, str, str]
    output_layout: str
    seed: int

    @property
    def dtype(self) -> Any:
        return DTYPES[self.precision]

    @property
    def unit(self) -> float:
        return UNITS[self.precision]

    @property
    def dropout(self) -> Dropout | None:
        return Dropout(self.rate, layer=3, seed=self.seed) if self.rate else None


@st.composite
def layer_cases(draw):
    activation = draw(st.sampled_from(ACTIVATIONS))
    return LayerCase(
        precision=draw(precisions),
        m=draw(sizes()),
        k=draw(sizes()),
        n=draw(sizes()),
        activation=activation,
        slope=draw(slopes(activation)),
        rate=draw(st.sampled_from((0.0, 0.0, *RATES))),
        scale=draw(st.sampled_from((1e-3, 1.0, 1.0, 10.0))),
        batch_index=draw(st.sampled_from((0, 1, 2**31))),
        layouts=(draw(layouts), draw(layouts), draw(layouts)),
        output_layout=draw(output_layouts),
        seed=draw(seeds),
    )


@CASES
@given(case=layer_cases(), by_row=st.booleans(), short=st.integers(0, 5), counted=st.booleans(), keep_z=st.booleans())
def test_linear(case, by_row, short, counted, keep_z):
    values = Values(case.seed, case.precision)
    m, k, n, dtype, u = case.m, case.k, case.n, case.dtype, case.unit
    source_rows = 37 if by_row else m
    x = place(values.normal(source_rows, k), case.layouts[0])
    w = place(values.normal(n, k, scale=case.scale / max(k, 1) ** 0.5), case.layouts[1])
    b = place(values.normal(n), case.layouts[2])
    slope = rounded_slope(case.activation, case.slope, dtype)
    z = poisoned((m, n), dtype, case.output_layout) if keep_z and case.activation in NEEDS_Z else None
    y = poisoned((m, n), dtype, case.output_layout)
    operands = {"x": x, "w": w, "b": b, "y": y, "z": z, "activation": case.activation}
    operands |= slope_operands(case.activation, slope, dtype)
    counters = np.zeros(COUNTERS, np.int64)
    if case.dropout is not None:
        operands |= {"dropout": case.dropout, "keep": poisoned((m, n), np.bool_, case.output_layout)}
    if counted or case.dropout is not None:
        operands["counters"] = counters
    rows = padded_rows(values.rng, m, m, source_rows)
    if by_row:
        operands |= {"rows": rows, "gathered": poisoned((m, k), dtype, case.output_layout)}
    inputs = Unchanged(x, w, b)
    run = bind(case.precision, "linear", **operands)
    # short, full, short: nothing of a batch stays behind for the next
    for step, count in enumerate((max(m - short, 0), m, max(m - short, 0))):
        batch = exact(x)
        if by_row:
            rows[:] = padded_rows(values.rng, count, m, source_rows)
            batch = np.where(rows[:, None] >= 0, batch[np.maximum(rows, 0)], 0.0)
        counters[ROW_COUNT], counters[BATCH_INDEX] = count, case.batch_index + step
        run()
        expected_z = reference.linear(batch, exact(w), exact(b))
        keep = None
        if case.dropout is not None:
            keep = dropout_keep(case.rate, 3, case.seed, case.batch_index + step, m, n)
            np.testing.assert_array_equal(operands["keep"], keep)
        expected = reference.dropout(reference.activation(case.activation, expected_z, slope), keep, case.rate)
        z_bound, y_bound = linear_bound(batch, exact(w), exact(b), case.activation, slope, keep, case.rate, u)
        assert_within(y, expected, y_bound)
        if z is not None:
            assert_within(z, expected_z, z_bound)
        if by_row:
            np.testing.assert_array_equal(operands["gathered"], batch)
        inputs.check()


@CASES
@given(case=layer_cases())
def test_grad_input(case):
    values = Values(case.seed, case.precision)
    m, k, n, dtype, u = case.m, case.k, case.n, case.dtype, case.unit
    dz = place(values.normal(m, n), case.layouts[0])
    w = place(values.normal(n, k), case.layouts[1])
    slope = rounded_slope(case.activation, case.slope, dtype)
    z = place(values.normal(m, k, scale=case.scale), case.layouts[2])
    keep = dropout_keep(case.rate, 3, case.seed, 5, m, k) if case.rate else None
    y = reference.dropout(reference.activation(case.activation, exact(z), slope), keep, case.rate)
    y = place(y, case.layouts[2], dtype)
    dz_prev = poisoned((m, k), dtype, case.output_layout)
    operands = {"dz": dz, "w": w, "y": y, "dz_prev": dz_prev, "activation": case.activation}
    operands |= slope_operands(case.activation, slope, dtype)
    if case.activation in NEEDS_Z:
        operands["z"] = z
    dslope = poisoned(1, dtype) if case.activation == "prelu" else None
    if dslope is not None:
        operands["dslope"] = dslope
    if keep is not None:
        operands |= {"dropout": case.dropout, "counters": np.zeros(COUNTERS, np.int64), "keep": keep}
    inputs = Unchanged(dz, w, y, z, keep)
    run = bind(case.precision, "grad_input", **operands)
    exacts = exact(dz), exact(w), exact(z)
    expected = reference.grad_input(*exacts, case.activation, slope, keep, case.rate)
    limit = grad_input_bound(*exacts, case.activation, slope, keep, case.rate, u)
    for _ in range(2):
        run()
        assert_within(dz_prev, expected, limit)
        if dslope is not None:
            dy = reference.output_grad(exacts[0], exacts[1], keep, case.rate)
            dy_bound = bound(n, reference.output_grad(np.abs(exacts[0]), np.abs(exacts[1]), keep, case.rate), u)
            assert_within(dslope, reference.grad_slope(dy, exacts[2]), grad_slope_bound(dy, exacts[2], dy_bound, u=u))
        inputs.check()


@dataclass(frozen=True)
class GradWeightLayer:
    """One layer of a grouped call; ``frozen`` names the tensors that are not trained."""

    k: int
    n: int
    layouts: tuple[str, str]
    output_layout: str
    frozen: frozenset[str]


@st.composite
def grad_weight_layers(draw):
    return GradWeightLayer(
        draw(sizes()),
        draw(sizes()),
        (draw(layouts), draw(layouts)),
        draw(output_layouts),
        draw(st.sampled_from([frozenset(), frozenset(), frozenset("w"), frozenset("b"), frozenset("wb")])),
    )


def layer_operands(values, layer, m, rows):
    """dz and x of one layer, by row where ``rows`` are given, and the same numbers for the oracle."""
    dz = place(values.normal(m, layer.n), layer.layouts[0])
    if rows is None:
        x = place(values.normal(m, layer.k), layer.layouts[1])
        return {"dz": dz, "x": x}, exact(dz), exact(x)
    x = place(values.normal(23, layer.k), layer.layouts[1])
    # what ``linear`` has left: the batch, zeros in the padding
    gathered = np.where(rows[:, None] >= 0, x[np.maximum(rows, 0)], 0).astype(dz.dtype)
    return {"dz": dz, "x": x, "rows": rows, "gathered": gathered}, exact(dz), exact(gathered)


@CASES
@given(
    layers=st.lists(grad_weight_layers(), min_size=1, max_size=3),
    m=sizes(),
    by_row=st.booleans(),
    accumulate=st.sampled_from((1, 1, 2, 3)),
    slope_count=st.integers(0, 2),
    precision=precisions,
    seed=seeds,
)
def test_grad_weight(layers, m, by_row, accumulate, slope_count, precision, seed):
    values, dtype, u = Values(seed, precision), DTYPES[precision], UNITS[precision]
    rows = padded_rows(values.rng, max(m - 2, 0), m, 23) if by_row else None
    operands, outputs = [], []
    for index, layer in enumerate(layers):
        given_arrays, dz, x = layer_operands(values, layer, m, rows if index == 0 else None)
        dw, db = (
            None if name in layer.frozen else poisoned(shape, dtype, layer.output_layout)
            for name, shape in (("w", (layer.n, layer.k)), ("b", layer.n))
        )
        operands.append({**given_arrays, "dw": dw, "db": db})
        exacts = reference.grad_weight(dz, x)
        magnitudes = reference.grad_weight(np.abs(dz), np.abs(x))
        outputs += [(out, e, g) for out, e, g in zip((dw, db), exacts, magnitudes, strict=True) if out is not None]
    slopes_given = [{"dslope": values.normal(1), "grad": poisoned(1, dtype)} for _ in range(slope_count)]
    outputs += [(s["grad"], exact(s["dslope"]), np.abs(exact(s["dslope"]))) for s in slopes_given]
    inputs = Unchanged(*(layer[name] for layer in operands for name in ("dz", "x")))
    counters = np.zeros(COUNTERS, np.int64)
    rule = UpdateRule("sgd", ScheduleSpec("constant", 0.1), accumulate=accumulate)
    run = bind(precision, "grad_weight", layers=operands, slopes=slopes_given, rule=rule, counters=counters)
    for batch_index in range(2 * accumulate):
        counters[BATCH_INDEX] = batch_index
        run()
        sums = batch_index % accumulate + 1
        for out, expected, magnitude in outputs:
            assert_within(out, sums * expected, bound(m * sums, sums * magnitude, u, output=sums * expected, ulps=sums))
    inputs.check()
    assert counters[BATCH_INDEX] == 2 * accumulate - 1


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("shape", [(300, 301), (3, 70_000)])
def test_layers_of_many_blocks(activation, shape):
    """More elements than a pass over them takes at a time, in rows and in columns."""
    values, (m, k) = Values(9, "fp32"), shape
    slope = rounded_slope(activation, 0.3, np.float32) if activation in ("leaky_relu", "prelu") else 0.0
    slope_given = slope_operands(activation, slope, np.float32)
    x, w, b, y = values.normal(m, 4), values.normal(k, 4), values.normal(k), poisoned((m, k), np.float32)
    bind("fp32", "linear", x=x, w=w, b=b, y=y, activation=activation, **slope_given)()
    _, limit = linear_bound(exact(x), exact(w), exact(b), activation, slope)
    assert_within(y, reference.linear(exact(x), exact(w), exact(b), activation, slope), limit)
    dz, w, z, dz_prev = values.normal(m, 5), values.normal(5, k), values.normal(m, k), poisoned((m, k), np.float32)
    operands = {"dz": dz, "w": w, "dz_prev": dz_prev, "activation": activation, **slope_given}
    operands["y"] = reference.activation(activation, exact(z), slope).astype(np.float32)
    operands |= {"z": z} if activation in NEEDS_Z else {}
    dslope = poisoned(1, np.float32) if activation == "prelu" else None
    bind("fp32", "grad_input", **operands, dslope=dslope)()
    dz, w, z = exact(dz), exact(w), exact(z)
    expected = reference.grad_input(dz, w, z, activation, slope)
    assert_within(dz_prev, expected, grad_input_bound(dz, w, z, activation, slope))
    if dslope is not None:
        dy, dy_bound = dz @ w, bound(5, np.abs(dz) @ np.abs(w))
        assert_within(dslope, reference.grad_slope(dy, z), grad_slope_bound(dy, z, dy_bound))
