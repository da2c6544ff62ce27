"""NaN goes through every op of every backend as NaN, and what is large overflows nowhere."""

import numpy as np
import pytest
from calls import RULES, Clock, counters_of, kept, run_loss, slope_operands, update_arena
from devices import INTERPRETER, VARIANT_PARAMETERS, variants_of, variants_with
from memory import exact, place, poisoned
from tolerance import assert_within, loss_grad_bound

from fusemlp_kernels import contract as c
from fusemlp_kernels import reference
from fusemlp_kernels.philox import dropout_keep


def infinities(variant):
    """Check that a product with an infinite factor is infinite, whatever the digits of the other factor."""
    real, compute = variant.real, variant.compute
    x, w = np.ones((4, 40), compute), np.full((20, 40), 1.1, compute)
    x[1, 3], x[2, 7], x[3, 3], x[3, 7] = np.inf, -np.inf, np.inf, -np.inf
    # TF32 keeps all bits of 0.75
    w[4], w[5], w[6, 3], w[:, 39] = 0.75, -0.3, np.inf, 2.0**-20
    y, dz_prev = np.zeros((4, 20), compute), np.zeros((4, 20), compute)
    with np.errstate(invalid="ignore"):
        wanted = exact(x) @ exact(w).T
    variant.bind("linear", x=x, w=w, b=np.zeros(20, real), y=y, activation="identity")()
    variant.bind("grad_input", dz=x, w=np.ascontiguousarray(w.T), y=y, dz_prev=dz_prev, activation="identity")()
    for result in (y, dz_prev):
        found, expected = (np.where(np.isfinite(values), 0.0, values) for values in (result, wanted))
        np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("variant", VARIANT_PARAMETERS)
def test_infinity_stays_infinity_in_a_product(variant):
    infinities(variant)


@pytest.mark.parametrize("variant", variants_of(INTERPRETER)[:1])
def test_the_interpreter_finds_infinity_in_a_product_of_parts(variant, monkeypatch):
    configs = pytest.importorskip("fusemlp_kernels.triton.configs")
    monkeypatch.setattr(configs.Architecture, "product", lambda self, precision: "split")
    infinities(variant)


@pytest.mark.parametrize("activation", c.ACTIVATIONS)
@pytest.mark.parametrize("rate", [0.0, 0.5])
@pytest.mark.parametrize("variant", VARIANT_PARAMETERS)
def test_nan_goes_through_a_layer_and_its_derivative(variant, activation, rate):
    real, compute = variant.real, variant.compute
    slope = {"leaky_relu": 0.1, "prelu": 0.2, "elu": 1.3}.get(activation, 0.0)
    slopes_given = slope_operands(activation, slope, real)
    x, w, b = np.ones((4, 3), compute), np.ones((20, 3), compute), np.ones(20, real)
    x[1, 1], w[2, 0], b[5] = np.nan, np.nan, np.nan
    y, z = np.zeros((4, 20), compute), np.zeros((4, 20), compute)
    keep, counters = dropout_keep(rate, 0, 7, 0, 4, 20), counters_of()
    dropped = {"dropout": c.Dropout(rate, 0, 7), "counters": counters} | kept(variant, keep) if rate else {}
    variant.bind("linear", x=x, w=w, b=b, y=y, z=z, activation=activation, **slopes_given, **dropped)()
    wanted = np.zeros((4, 20), np.bool_)
    wanted[1], wanted[:, 2], wanted[:, 5] = True, True, True
    # a dropped element is zero, whatever it was
    np.testing.assert_array_equal(np.isnan(y), wanted & keep if rate else wanted)

    dz, w_next, dz_prev = np.ones((4, 2), compute), np.ones((2, 20), compute), np.zeros((4, 20), compute)
    dz[3, 0] = np.nan
    dslope = {"dslope": np.zeros(1, real)} if activation == "prelu" else {}
    operands = {"dz": dz, "w": w_next, "y": y, "z": z, "dz_prev": dz_prev, "activation": activation}
    variant.bind("grad_input", **operands, **slopes_given, **dslope, **dropped)()
    passed = keep if rate else np.ones_like(wanted)
    factor = reference.activation_grad(activation, np.where(wanted, np.nan, 1.0), slope)
    through = wanted & passed & np.isnan(factor)
    through[3] |= passed[3]
    np.testing.assert_array_equal(np.isnan(dz_prev)[passed], through[passed])
    if dslope:
        assert np.isnan(dslope["dslope"])


@pytest.mark.parametrize("variant", VARIANT_PARAMETERS)
def test_nan_stays_out_of_the_padding(variant):
    """Zero times NaN is NaN: what lies behind the last column is not cleared by factors that are zero there."""
    x, w, b = np.ones((4, 3), variant.compute), np.ones((5, 3), variant.compute), np.ones(5, variant.real)
    x[1, 1] = np.nan
    x, w = place(x, "owned"), place(w, "owned")
    y, z = poisoned((4, 5), variant.compute, "owned"), poisoned((4, 5), variant.compute, "owned")
    # that nothing in the padding changes, the call itself checks
    variant.bind("linear", x=x, w=w, b=b, y=y, activation="sigmoid")()
    assert np.isnan(y[1]).all()

    dz, dz_prev = np.ones((4, 5), variant.compute), poisoned((4, 3), variant.compute, "owned")
    dz[2, 1] = np.nan
    variant.bind("grad_input", dz=place(dz, "owned"), w=w, y=x, dz_prev=dz_prev, activation="identity")()
    assert np.isnan(dz_prev[2]).all()

    counters, stats = counters_of(4), np.zeros(c.STATS)
    labels = {
        "target": np.zeros(4, np.int64),
        "counters": counters,
        "stats": stats,
        "loss": c.LossSpec("cross_entropy"),
    }
    variant.bind("linear_loss_grad", x=x, w=w, b=b, dz=y, **labels)()
    variant.bind("loss_grad", z=y, dz=z, **labels)()
    assert np.isnan(y[1]).all() and np.isnan(z[1]).all()


@pytest.mark.parametrize("kind", c.LOSSES)
@pytest.mark.parametrize("options", ["plain", "weighted", "soft"])
@pytest.mark.parametrize("variant", VARIANT_PARAMETERS)
def test_nan_goes_through_every_loss(variant, kind, options):
    z = np.random.default_rng(3).standard_normal((4, 3))
    z[2, 1] = np.nan
    soft = options == "soft" or kind != "cross_entropy"
    target = np.full((4, 3), 0.25) if soft else np.array([0, 2, 1, 0])
    weight = np.array([1.0, 2.0, 0.5, 1.0]) if options == "weighted" else None
    spec = c.LossSpec(kind, soft=soft and kind == "cross_entropy", accuracy=True)
    loss, dz, _ = run_loss(variant, spec, z, target, weight=weight)
    assert np.isnan(loss)
    np.testing.assert_array_equal(np.isnan(dz), np.isnan(reference.loss_grad(spec, z, target, weight)[1]))
    assert np.isnan(dz[2, 1]) and not np.isnan(dz[[0, 1, 3]]).any()


@pytest.mark.parametrize("kind", c.LOSSES)
@pytest.mark.parametrize("variant", VARIANT_PARAMETERS)
def test_a_weight_that_is_nan_makes_the_loss_nan(variant, kind):
    z, weight = np.zeros((2, 3)), np.array([1.0, np.nan])
    target = np.array([0, 1]) if kind == "cross_entropy" else np.zeros((2, 3))
    loss, _, _ = run_loss(variant, c.LossSpec(kind), z, target, weight=weight)
    assert np.isnan(loss)


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
@pytest.mark.parametrize("clip_norm", [None, 1.0])
@pytest.mark.parametrize("variant", VARIANT_PARAMETERS)
def test_nan_goes_through_an_update(variant, rule, clip_norm):
    params, grads = np.ones(100, variant.real), np.ones(100, variant.real)
    grads[7] = np.nan
    update_arena(variant, c.UpdateRule(**{**vars(rule), "clip_norm": clip_norm}), params, grads)
    # the norm of a gradient with a NaN in it is NaN, and scales them all
    wanted = np.arange(100) == 7 if clip_norm is None else np.ones(100, np.bool_)
    np.testing.assert_array_equal(np.isnan(params), wanted)


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
@pytest.mark.parametrize("variant", variants_with("grad_weight_update"))
def test_nan_goes_through_a_fused_update(variant, rule):
    dz, x = np.ones((5, 3), variant.compute), np.ones((5, 4), variant.compute)
    dz[2, 1] = np.nan
    w, b = np.ones((3, 4), variant.real), np.ones(3, variant.real)
    w_state, b_state = (tuple(np.zeros_like(p) for _ in range(rule.state_count)) for p in (w, b))
    layer = {"dz": dz, "x": x, "w": w, "b": b, "w_state": w_state, "b_state": b_state}
    layer |= {"w_rule": c.TensorRule(), "b_rule": c.TensorRule()}
    variant.bind("grad_weight_update", layers=[layer], **Clock(rule).operands)()
    np.testing.assert_array_equal(np.isnan(b), [False, True, False])
    np.testing.assert_array_equal(np.isnan(w), np.isnan(b)[:, None] & np.ones((3, 4), np.bool_))


@pytest.mark.parametrize("activation", ["sigmoid", "tanh", "gelu", "silu"])
@pytest.mark.parametrize("variant", VARIANT_PARAMETERS)
def test_saturated_activations_neither_overflow_nor_lose_their_limit(variant, activation):
    # numbers that 16 bits hold exactly
    x = np.array([[-16384.0], [-1024.0], [1024.0], [16384.0]], variant.compute)
    w, b, y = np.ones((1, 1), variant.compute), np.zeros(1, variant.real), np.zeros((4, 1), variant.compute)
    variant.bind("linear", x=x, w=w, b=b, y=y, activation=activation)()
    assert_within(y, reference.activation(activation, exact(x)), 0.0)


@pytest.mark.parametrize("variant", VARIANT_PARAMETERS)
def test_logits_of_any_size_overflow_nowhere(variant):
    # numbers that 16 bits and TF32 hold exactly
    z = variant.rounded([[61440.0, -61440.0, 0.0], [-30720.0, 20480.0, 10240.0]])
    for kind in ("cross_entropy", "binary_cross_entropy"):
        target = np.array([1, 1]) if kind == "cross_entropy" else np.array([[0, 1, 0], [0, 1, 1]], variant.real)
        spec = c.LossSpec(kind)
        loss, dz, _ = run_loss(variant, spec, z, target)
        expected = reference.loss_grad(spec, exact(z), target)
        limits = loss_grad_bound(spec, exact(z), target, u=variant.unit)
        assert_within(loss, expected[0], limits[0])
        variant.check(dz, expected[1], limits[1])
        # and as the output of a layer
        counters, stats, dz = counters_of(len(z)), np.zeros(c.STATS), np.full_like(z, np.nan)
        layer = {"x": z, "w": np.eye(3, dtype=variant.compute), "b": np.zeros(3, variant.real), "dz": dz}
        variant.bind("linear_loss_grad", **layer, target=target, loss=spec, counters=counters, stats=stats)()
        assert_within(stats[c.LAST_LOSS], expected[0], limits[0])
        variant.check(dz, expected[1], limits[1])


@pytest.mark.parametrize("variant", VARIANT_PARAMETERS)
def test_the_norm_of_large_gradients_does_not_overflow(variant):
    params, grads = np.zeros(4, variant.real), np.full(4, 1e30, variant.real)
    update_arena(variant, c.UpdateRule("sgd", clip_norm=1.0), params, grads, 1.0)
    np.testing.assert_allclose(params, -0.5, rtol=4 * 2.0**-23)


@pytest.mark.parametrize(
    ("op", "variant"),
    [
        pytest.param(op, *one.values, marks=one.marks, id=f"{op}, {one.id}")
        for op in ("grad_weight", "grad_weight_update")
        for one in variants_with(op)
    ],
)
def test_nan_stays_out_of_the_padding_of_weights(variant, op):
    """Padding is never written again, so a NaN in it would stay."""
    dz, x = np.ones((5, 3), variant.compute), place(np.ones((5, 4), variant.compute), "owned")
    dz[2, 1] = np.nan
    layer = {"dz": place(dz, "owned"), "x": x}
    if op == "grad_weight":
        layer |= {"dw": poisoned((3, 4), variant.real, "owned"), "db": poisoned(3, variant.real)}
        operands = {"rule": RULES["sgd"], "counters": counters_of()}
    else:
        layer |= {"w": place(np.ones((3, 4), variant.real), "owned"), "b": np.ones(3, variant.real)}
        layer |= {"w_state": (), "b_state": (), "w_rule": c.TensorRule(), "b_rule": c.TensorRule()}
        operands = Clock(RULES["sgd"], 0, 0, 1.0).operands
    # that nothing in the padding changes, the call itself checks
    variant.bind(op, layers=[layer], **operands)()
    assert np.isnan(layer["dw" if op == "grad_weight" else "w"][1]).all()
