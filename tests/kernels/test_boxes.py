"""The ops of training with intervals against their definitions, on the backend that has them."""

from __future__ import annotations

import numpy as np
import pytest
from devices import INTERPRETER, STAND_IN, VARIANT_PARAMETERS, marks_of, usable
from tolerance import assert_within

from fusemlp_kernels import reference
from fusemlp_kernels.contract import COUNTERS, ROW_COUNT, ROW_OFFSET, UPDATE_COUNT, LossSpec, Ramp, UpdateRule
from fusemlp_kernels.errors import ArgumentError, BackendUnavailableError
from fusemlp_kernels.registry import backend

VARIANTS = [one for one in VARIANT_PARAMETERS if one.values[0].device.backend == "numpy"]
OPS = ("magnitudes", "ball", "box", "box_grad", "worst_loss_grad")
# of 100 updates from the 7th on
RAMP = Ramp(0.2, 0.25, 0.1, 0.5, 7, 100)
RNG = np.random.default_rng(1)


def counters_of(rows, updates=0):
    counters = np.zeros(COUNTERS, np.int64)
    counters[[ROW_COUNT, UPDATE_COUNT]] = rows, updates
    return counters


@pytest.mark.parametrize("bounded", [False, True])
@pytest.mark.parametrize(("updates", "reached"), [(7, 0.0), (17, 0.0), (42, 0.5), (67, 1.0), (107, 1.0)])
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_ball_grows_with_the_updates(variant, updates, reached, bounded):
    x, reach = variant.rounded(RNG.uniform(-1.0, 1.0, (7, 40))), variant.rounded(RNG.uniform(0.5, 2.0, 40))
    ends = {"least": variant.rounded(np.full(40, -0.9)), "most": variant.rounded(np.full(40, 0.8))} if bounded else {}
    rows, counters = np.array([0, 0, 0, 6, 2, -1]), counters_of(3, updates)
    counters[ROW_OFFSET] = 3
    centre, radius = (variant.rounded(np.full((3, 40), 0.5)) for _ in range(2))
    variant.bind(
        "ball", x=x, reach=reach, centre=centre, radius=radius, rows=rows, ramp=RAMP, counters=counters, **ends
    )()
    own = x.astype(np.float64)[[6, 2]]
    low, high = own - RAMP.eps * reached * reach, own + RAMP.eps * reached * reach
    if bounded:
        low, high = low.clip(-0.9, 0.8), high.clip(-0.9, 0.8)
    bound = 6.0 * variant.unit * (np.abs(own) + RAMP.eps * reach)
    assert_within(centre[:2], (low + high) / 2, bound)
    assert_within(radius[:2], (high - low) / 2, bound)
    assert not centre[2].any() and not radius[2].any()


@pytest.mark.parametrize("activation", ["identity", "relu", "leaky_relu", "tanh", "elu", "softplus"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_boxes_and_their_gradients_are_those_of_the_definition(variant, activation):
    shape, slope = (9, 33), 0.3
    zc, zr, dc, dr = (variant.rounded(one) for one in RNG.normal(size=(4, *shape)))
    zr = np.abs(zr)
    exact = [one.astype(np.float64) for one in (zc, zr)]
    values = {name: variant.rounded(np.full(shape, 0.5)) for name in ("low", "high", "centre", "radius")}
    given = {"zc": zc, "zr": zr, "activation": activation, "slope": slope}
    variant.bind("box", **given, **values)()
    # sums of two numbers, and activations of a few units; no slope is above 1
    size = 24.0 * variant.unit * (np.abs(exact[0]) + exact[1] + 1.0)
    for name, wanted in zip(("centre", "radius"), reference.box(activation, *exact, slope), strict=True):
        assert_within(values[name], wanted, size)
    assert (values["low"] <= values["high"]).all()
    wanted = reference.box_grad(activation, *exact, *(one.astype(np.float64) for one in (dc, dr)), slope)
    ends = {name: values[name] for name in ("low", "high")}
    # the slope of a rounded number has its error; near a kink it jumps, and no number lies there
    size = 64.0 * variant.unit * (np.abs(dc) + np.abs(dr)) * (np.abs(exact[0]) + exact[1] + 1.0)
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
@pytest.mark.parametrize("variant", VARIANTS)
def test_the_worst_loss_is_that_of_the_definition(variant, updates, own):
    zc, zr, dz = (variant.rounded(one) for one in RNG.normal(size=(3, 6, 4)))
    zr, before, weight = np.abs(zr), dz.copy(), variant.rounded(RNG.uniform(0.5, 2.0, 8))
    target, rows, spec = RNG.integers(0, 4, 8), RNG.permutation(8)[:6], LossSpec("cross_entropy", label_smoothing=0.1)
    # the last row is padding; infinite bounds without a share stay out
    zr[0, 0] = np.inf if own == 1.0 else zr[0, 0]
    dzc, dzr = (variant.rounded(np.full((6, 4), 0.5)) for _ in range(2))
    variant.bind(
        "worst_loss_grad", zc=zc, zr=zr, dzc=dzc, dzr=dzr, dz=dz, ramp=RAMP, loss=spec, target=target, weight=weight,
        rows=rows, counters=counters_of(5, updates),
    )()  # fmt: skip
    picked = target[rows[:5]]
    wanted = np.zeros((6, 4))
    if own < 1.0:
        logits = reference.worst_logits(*(one[:5].astype(np.float64) for one in (zc, zr)), picked)
        _, dy = reference.loss_of_output(spec, logits, picked, weight.astype(np.float64)[rows[:5]])
        wanted[:5] = (1.0 - own) * dy
    bound = 64.0 * variant.unit * (np.abs(wanted) + (wanted != 0.0))
    assert_within(dzc, wanted, bound)
    wanted[np.arange(5), picked] *= -1.0
    assert_within(dzr, wanted, bound)
    assert_within(dz[:5], own * before[:5].astype(np.float64), 2.0 * variant.unit * np.abs(before[:5]))


@pytest.mark.parametrize("rows", [3, 600])
@pytest.mark.parametrize("variant", VARIANTS)
def test_gradients_through_magnitudes_have_the_signs_of_the_weights(variant, rows):
    dz, dz2, dspread = (variant.rounded(one) for one in RNG.normal(size=(3, rows, 7)))
    x, x2, radius = (variant.rounded(one) for one in RNG.normal(size=(3, rows, 40)))
    w, dw, out = variant.rounded(RNG.normal(size=(7, 40))), *(variant.rounded(np.full((7, 40), 0.5)) for _ in range(2))
    w[2, 3] = 0.0
    variant.bind("magnitudes", w=w, out=out)()
    assert np.array_equal(out, np.abs(w))
    layer = {"dz": dz, "x": x, "dz2": dz2, "x2": x2, "dspread": dspread, "radius": radius, "signs": w}
    counters = counters_of(rows)
    variant.bind("grad_weight", layers=({**layer, "dw": dw, "db": None},), rule=UpdateRule("sgd"), counters=counters)()
    pairs = [tuple(one.astype(np.float64) for one in pair) for pair in ((dz, x), (dz2, x2), (dspread, radius))]
    signs = [1.0, 1.0, np.where(w > 0, 1.0, -1.0)]
    size = (2.0 * np.sqrt(3 * rows) + 6.0) * variant.unit
    assert_within(
        dw,
        sum(sign * (d.T @ own) for sign, (d, own) in zip(signs, pairs, strict=True)),
        size * sum(np.abs(d).T @ np.abs(own) for d, own in pairs),
    )


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize(
    "device", [pytest.param(device, id=device.name, marks=marks_of(device)) for device in (INTERPRETER, STAND_IN)]
)
def test_other_backends_refuse_them(device, op):
    with usable(device):
        other = backend(device.backend, None, "fp32")
        with pytest.raises(BackendUnavailableError, match=f"{op}': it is bound by the numpy backend alone"):
            other.bind(op)
        layer = {name: other.view(other.allocate(4, "real"), 0, (2, 2), 2) for name in ("dz", "x", "dspread", "dw")}
        with pytest.raises(ArgumentError, match="dspread: only the numpy backend takes"):
            other.bind(
                "grad_weight", layers=({**layer, "db": None},), rule=UpdateRule("sgd"),
                counters=other.allocate(COUNTERS, "int64"),
            )  # fmt: skip
