"""The ops of training with intervals against their definitions."""

from __future__ import annotations

import numpy as np
import pytest
from devices import INTERPRETER, STAND_IN, VARIANT_PARAMETERS, marks_of, usable
from memory import place
from tolerance import assert_within, bound

from fusemlp_kernels import reference
from fusemlp_kernels.contract import (
    COUNTERS,
    HYPER,
    ROW_COUNT,
    ROW_OFFSET,
    UPDATE_COUNT,
    LossSpec,
    Ramp,
    UpdateRule,
)
from fusemlp_kernels.errors import ArgumentError
from fusemlp_kernels.registry import backend

# of 100 updates from the 7th on
RAMP = Ramp(0.2, 0.25, 0.1, 0.5, 7, 100)
RNG = np.random.default_rng(1)
# more columns than a program's or a block's, and the layout of matrices on a device
SHAPES = (((9, 33), "owned"), ((2, 1100), "plain"), ((3, 20), "stepped"), ((5, 3), "transposed"))


def counters_of(rows, updates=0):
    counters = np.zeros(COUNTERS, np.int64)
    counters[[ROW_COUNT, UPDATE_COUNT]] = rows, updates
    return counters


def laid(variant, values, layout):
    """Return values as matrix products read them, in a layout if the device takes one."""
    return place(variant.rounded(values), "plain" if variant.device.on_host else layout)


def unit_of(variant):
    """The unit roundoff of numbers that are stored between two steps."""
    return max(variant.unit, variant.output_unit)


@pytest.mark.parametrize("bounded", [False, True])
@pytest.mark.parametrize(("updates", "reached"), [(7, 0.0), (17, 0.0), (42, 0.5), (67, 1.0), (107, 1.0)])
@pytest.mark.parametrize(("columns", "layout"), [(40, "owned"), (1100, "plain"), (20, "stepped")])
@pytest.mark.parametrize("variant", VARIANT_PARAMETERS)
def test_a_ball_grows_with_the_updates(variant, columns, layout, updates, reached, bounded):
    x = laid(variant, RNG.uniform(-1.0, 1.0, (7, columns)), layout)
    reach = RNG.uniform(0.5, 2.0, columns).astype(variant.real)
    ends = {"least": np.full(columns, -0.9), "most": np.full(columns, 0.8)} if bounded else {}
    ends = {name: end.astype(variant.real) for name, end in ends.items()}
    # those of another batch come first
    rows, counters = np.array([0, 0, 0, 6, 2, -1]), counters_of(3, updates)
    counters[ROW_OFFSET] = 3
    centre, radius = (laid(variant, np.full((3, columns), 0.5), layout) for _ in range(2))
    variant.bind(
        "ball", x=x, reach=reach, centre=centre, radius=radius, rows=rows, ramp=RAMP, counters=counters, **ends
    )()
    own = x.astype(np.float64)[[6, 2]]
    low, high = own - RAMP.eps * reached * reach, own + RAMP.eps * reached * reach
    if bounded:
        low, high = low.clip(-0.9, 0.8), high.clip(-0.9, 0.8)
    limit = 6.0 * variant.unit * (np.abs(own) + RAMP.eps * reach)
    for found, wanted in ((centre, (low + high) / 2), (radius, (high - low) / 2)):
        assert_within(found[:2], wanted, variant.result_bound(limit, wanted))
        assert not found[2].any()


@pytest.mark.parametrize("variant", VARIANT_PARAMETERS)
def test_a_ball_at_once_has_its_whole_radius(variant):
    x, reach = variant.rounded(np.ones((2, 3))), np.ones(3, variant.real)
    sudden = Ramp(0.5, 0.25, 0.1, 0.0, 7, 100)
    for updates, eps in ((16, 0.0), (17, 0.5)):
        centre, radius = (variant.rounded(np.zeros((2, 3))) for _ in range(2))
        counters = counters_of(2, updates)
        variant.bind("ball", x=x, reach=reach, centre=centre, radius=radius, ramp=sudden, counters=counters)()
        assert (centre == 1.0).all() and (radius == eps).all()


@pytest.mark.parametrize("activation", ["identity", "relu", "leaky_relu", "tanh", "elu", "softplus", "gelu"])
@pytest.mark.parametrize(("shape", "layout"), SHAPES)
@pytest.mark.parametrize("variant", VARIANT_PARAMETERS)
def test_boxes_and_their_gradients_are_those_of_the_definition(variant, shape, layout, activation):
    slope = 0.3
    numbers = RNG.normal(size=(4, *shape))
    numbers[1] = np.abs(numbers[1])
    zc, zr, dc, dr = (laid(variant, one, layout) for one in numbers)
    exact = [one.astype(np.float64) for one in (zc, zr)]
    values = {name: laid(variant, np.full(shape, 0.5), layout) for name in ("low", "high", "centre", "radius")}
    given = {"zc": zc, "zr": zr, "activation": activation, "slope": slope}
    variant.bind("box", **given, **values)()
    # sums of two numbers, and activations of a few units; no slope is above 1.13
    size = 24.0 * variant.unit * (np.abs(exact[0]) + exact[1] + 1.0)
    wanted = dict(zip(("centre", "radius"), reference.box(activation, *exact, slope), strict=True))
    wanted |= {"low": wanted["centre"] - wanted["radius"], "high": wanted["centre"] + wanted["radius"]}
    for name, one in wanted.items():
        assert_within(values[name], one, variant.result_bound(2.0 * size, one))
    if activation != "gelu":
        # the others rise
        assert (values["low"] <= values["high"]).all()
    by = [one.astype(np.float64) for one in (dc, dr)]
    wanted = reference.box_grad(activation, *exact, *by, slope)
    # the slope of a rounded number has its error; near a kink it jumps, and no number lies there
    size = 64.0 * unit_of(variant) * (np.abs(by[0]) + np.abs(by[1])) * (np.abs(exact[0]) + exact[1] + 1.0)
    ends = {name: values[name] for name in ("low", "high")}
    variant.bind("box_grad", dc=dc, dr=dr, **given, **ends)()
    for found, one in zip((dc, dr), wanted, strict=True):
        assert_within(found, one, size)


def test_gradients_of_boxes_are_those_of_finite_differences():
    zc, dc, dr = RNG.normal(size=(3, 4, 5))
    zr, step = np.abs(RNG.normal(size=(4, 5))), 1e-6

    def value(zc, zr):
        centre, radius = reference.box("tanh", zc, zr)
        return dc * centre + dr * radius

    by_zc, by_zr = reference.box_grad("tanh", zc, zr, dc, dr)
    np.testing.assert_allclose(by_zc, (value(zc + step, zr) - value(zc - step, zr)) / (2 * step), rtol=0, atol=1e-8)
    np.testing.assert_allclose(by_zr, (value(zc, zr + step) - value(zc, zr - step)) / (2 * step), rtol=0, atol=1e-8)


@pytest.mark.parametrize(("updates", "own"), [(10, 1.0), (42, 0.625), (90, 0.25)])
@pytest.mark.parametrize(("columns", "layout"), [(4, "owned"), (1100, "plain"), (20, "stepped")])
@pytest.mark.parametrize("variant", VARIANT_PARAMETERS)
def test_the_worst_loss_is_that_of_the_definition(variant, columns, layout, updates, own):
    shape = 6, columns
    numbers = RNG.normal(size=(3, *shape))
    numbers[1] = np.abs(numbers[1])
    # infinite bounds without a share stay out
    numbers[1, 0, 0] = np.inf if own == 1.0 else numbers[1, 0, 0]
    zc, zr, dz = (laid(variant, one, layout) for one in numbers)
    before, weight = dz.astype(np.float64), RNG.uniform(0.5, 2.0, 8).astype(variant.real)
    target, rows, spec = RNG.integers(0, columns, 8), RNG.permutation(8)[:6], LossSpec("cross_entropy", "mean", 0.1)
    # the last row is padding
    rows[5] = -1
    dzc, dzr = (laid(variant, np.full(shape, 0.5), layout) for _ in range(2))
    # those of another batch come first
    counters = counters_of(5, updates)
    counters[ROW_OFFSET] = 6
    variant.bind(
        "worst_loss_grad", zc=zc, zr=zr, dzc=dzc, dzr=dzr, dz=dz, ramp=RAMP, loss=spec, target=target, weight=weight,
        rows=np.concatenate([np.zeros(6, np.int64), rows]), counters=counters,
    )()  # fmt: skip
    picked = target[rows[:5]]
    wanted, limit = np.zeros(shape), np.zeros(shape)
    if own < 1.0:
        logits = reference.worst_logits(*(one[:5].astype(np.float64) for one in (zc, zr)), picked)
        _, dy = reference.loss_of_output(spec, logits, picked, weight.astype(np.float64)[rows[:5]])
        wanted[:5] = (1.0 - own) * dy
        # the error of a logit, of at most 10, is one of its probability
        p = np.exp(logits - np.logaddexp.reduce(logits, axis=1, keepdims=True))
        shares = weight.astype(np.float64)[rows[:5], None] / weight.astype(np.float64)[rows[:5]].sum()
        limit[:5] = 32.0 * unit_of(variant) * (np.abs(wanted[:5]) + (1.0 - own) * shares * p)
    limit = variant.result_bound(limit, wanted)
    assert_within(dzc, wanted, limit)
    wanted[np.arange(5), picked] *= -1.0
    assert_within(dzr, wanted, limit)
    wanted = own * before[:5]
    assert_within(dz[:5], wanted, variant.result_bound(2.0 * variant.unit * np.abs(before[:5]), wanted))


@pytest.mark.parametrize("accumulates", [False, True])
@pytest.mark.parametrize(("rows", "layout"), [(3, "plain"), (300, "owned")])
@pytest.mark.parametrize("variant", VARIANT_PARAMETERS)
def test_gradients_through_magnitudes_have_the_signs_of_the_weights(variant, rows, layout, accumulates):
    accumulates &= not variant.device.on_host
    dz, dz2, dspread = (laid(variant, one, layout) for one in RNG.normal(size=(3, rows, 7)))
    x, x2, radius = (laid(variant, one, layout) for one in RNG.normal(size=(3, rows, 40)))
    layout = "plain" if variant.device.on_host else layout
    w, dw, out = (place(one, layout, variant.real) for one in (RNG.normal(size=(7, 40)), *np.full((2, 7, 40), 0.5)))
    db = np.full(7, 0.5, variant.real)
    w[2, 3] = 0.0
    variant.bind("magnitudes", w=w, out=out)()
    assert np.array_equal(out, np.abs(w)) and not np.signbit(out).any()
    layer = {"dz": dz, "x": x, "dz2": dz2, "x2": x2, "dspread": dspread, "radius": radius, "signs": w}
    counters = counters_of(rows)
    # of two batches that accumulate the second
    counters[0], before = int(accumulates), 0.5 * accumulates
    norm = np.zeros(1) if variant.traits.norms_gradients else None
    given = {} if norm is None else {"norm": norm}
    rule = UpdateRule("sgd", accumulate=1 + accumulates)
    variant.bind("grad_weight", layers=({**layer, "dw": dw, "db": db},), rule=rule, counters=counters, **given)()
    pairs = [tuple(one.astype(np.float64) for one in pair) for pair in ((dz, x), (dz2, x2), (dspread, radius))]
    signs = [1.0, 1.0, np.where(w > 0, 1.0, -1.0)]
    wanted = before + sum(sign * (d.T @ own) for sign, (d, own) in zip(signs, pairs, strict=True))
    magnitude = before + sum(np.abs(d).T @ np.abs(own) for d, own in pairs)
    assert_within(dw, wanted, bound(3 * rows, magnitude, variant.unit, products=variant.products))
    sums = [d.sum(axis=0) for d, _ in pairs[:2]]
    magnitude = before + sum(np.abs(d).sum(axis=0) for d, _ in pairs[:2])
    assert_within(db, before + sum(sums), bound(2 * rows, magnitude, variant.unit))
    if norm is not None:
        stored = np.concatenate([one.ravel().astype(np.float64) for one in (dw, db)])
        assert norm[0] == pytest.approx(np.sqrt((stored**2).sum()), rel=2.0 * np.sqrt(stored.size) * variant.unit)


@pytest.mark.parametrize(
    "device", [pytest.param(device, id=device.name, marks=marks_of(device)) for device in (INTERPRETER, STAND_IN)]
)
def test_other_backends_say_what_they_take(device):
    with usable(device):
        other = backend(device.backend, None, "fp32")
        names = ("dz", "x", "dspread", "radius", "signs", "dw")
        layer = {name: other.view(other.allocate(4, "real"), 0, (2, 2), 2) for name in names}
        common = {"rule": UpdateRule("sgd"), "counters": other.allocate(COUNTERS, "int64")}
        with pytest.raises(ArgumentError, match="dspread: expected dspread, radius and signs together"):
            other.bind("grad_weight", layers=({**layer, "radius": None, "db": None},), **common)
        rates = other.view(other.allocate(4, "float64"), 0, (1, 4), 4)
        clock = {"hyper": other.allocate(HYPER, "float64"), "rates": rates}
        updated = {**layer, "w": layer["dw"], "b": None}
        del updated["dw"]
        with pytest.raises(ArgumentError, match="dspread: this backend takes a second batch in grad_weight; use it"):
            other.bind("grad_weight_update", layers=(updated,), **common, **clock)
        z = {name: layer["dz"] for name in ("zc", "zr", "dzc", "dzr", "dz")}
        soft = {"loss": LossSpec("cross_entropy", soft=True), "target": layer["x"], "ramp": RAMP}
        with pytest.raises(ArgumentError, match="loss: the worst logits are those of a label; use cross_entropy of"):
            other.bind("worst_loss_grad", **z, **soft, counters=common["counters"])
