"""The ops of members that share weights, against the oracle; the oracle against differences and the package tabm."""

import itertools
from dataclasses import replace

import numpy as np
import pytest
import tolerance as tol
from calls import check_grad_input, check_grad_weight, check_linear, counters_of, kept, padded_rows, walked
from devices import INTERPRETER, variants_with
from memory import ROW_MULTIPLE, Values, exact, place, poisoned

from fusemlp_kernels import reference
from fusemlp_kernels.contract import ACTIVATIONS, BATCH_INDEX, ROW_COUNT, Dropout, LossSpec, UpdateRule
from fusemlp_kernels.errors import ArgumentError, ShapeError
from fusemlp_kernels.philox import dropout_keep
from fusemlp_kernels.reference import Batch, MemberLayer

VARIANTS = variants_with("affine_members")
SLOPES = {"leaky_relu": 0.1, "elu": 1.3}
# members, rows of each, columns: one of each, odd ones, several vectors and blocks, more than a task takes
SHAPES = ((1, 1, 1), (3, 5, 7), (5, 9, 33), (2, 37, 140))
LARGE = ((16, 32, 129), (2, 700, 16))
OUTPUTS = (1, 3, 40, 7, 1, 2)


def shapes_of(variant):
    """The interpreter gets small ones."""
    return SHAPES if variant.device is INTERPRETER else SHAPES + LARGE


def small_case(rng, activation="silu", kind="cross_entropy", rate=0.0):
    """Two layers and heads of three members, and a batch of four data rows."""
    members, widths, outputs = 3, (4, 5, 6), 2
    layers = [
        MemberLayer(
            rng.normal(size=(members, k)), rng.normal(size=(n, k)) / 2, rng.normal(1, 0.3, (members, n)),
            rng.normal(size=(members, n)), activation, SLOPES.get(activation, 0.0), rate,
        )
        for k, n in itertools.pairwise(widths)
    ]  # fmt: skip
    heads = rng.normal(size=(members, outputs, widths[-1])), rng.normal(size=(members, outputs))
    x = np.repeat(rng.normal(size=(4, widths[0])), members, axis=0)
    target = np.repeat(rng.integers(0, 2, 4) if kind == "cross_entropy" else rng.normal(size=(4, 2)), members, axis=0)
    keeps = [rng.random((len(x), n)) >= rate for n in widths[1:]] if rate else None
    return layers, heads, Batch(x, target, keeps=keeps)


# Central differences with step h have the truncation error h^2/6 |f'''| and the rounding error c u |f| / h. With f and
# f''' of order one they balance at h = u^(1/3), 4.8e-6, where both are about u^(2/3) = 2.3e-11. Third derivatives here
# come from products of up to three layers' weights, inputs and curvatures, each below 3: less than 3^6 of the unit; the
# loss itself takes some hundred operations.
STEP = tol.UNIT["float64"] ** (1 / 3)
TOLERANCE = (3**6 / 6) * STEP**2 + 100 * tol.UNIT["float64"] / STEP


@pytest.mark.parametrize(("kind", "rate"), [("cross_entropy", 0.25), ("mse", 0.0)])
def test_gradients_are_the_derivatives_of_the_loss(kind, rate):
    layers, heads, batch = small_case(np.random.default_rng(0), kind=kind, rate=rate)
    spec = LossSpec(kind)
    loss, grads = reference.member_gradients(layers, heads, spec, batch)

    def moved(value, at, sign):
        value = value.copy()
        value[at] += sign * STEP
        return value

    def difference(value, changed):
        result = np.empty(value.shape)
        for at in np.ndindex(value.shape):
            one, two = (
                reference.member_gradients(*changed(moved(value, at, sign)), spec, batch)[0] for sign in (1.0, -1.0)
            )
            result[at] = (one - two) / (2.0 * STEP)
        return result

    for index, layer in enumerate(layers):
        for field, grad in zip(("r", "w", "s", "b"), grads[index], strict=True):

            def changed(value, index=index, field=field, layer=layer):
                return [*layers[:index], replace(layer, **{field: value}), *layers[index + 1 :]], heads

            tol.assert_within(grad, difference(getattr(layer, field), changed), TOLERANCE * max(1.0, loss))
    by_w = difference(heads[0], lambda value: (layers, (value, heads[1])))
    by_b = difference(heads[1], lambda value: (layers, (heads[0], value)))
    tol.assert_within(grads[-1][0], by_w, TOLERANCE * max(1.0, loss))
    tol.assert_within(grads[-1][1], by_b, TOLERANCE * max(1.0, loss))


@pytest.mark.parametrize(("activation", "torch_name"), [("relu", "ReLU"), ("silu", "SiLU")])
def test_forward_and_gradients_are_those_of_the_package_tabm(activation, torch_name):
    torch, tabm = pytest.importorskip("torch"), pytest.importorskip("tabm")
    layers, heads, batch = small_case(np.random.default_rng(1), activation)
    model = tabm.TabM.make(
        n_num_features=4, d_out=2, k=3, n_blocks=2, d_block=5, dropout=0.0, activation=torch_name, arch_type="tabm",
        start_scaling_init="random-signs",
    ).double()  # fmt: skip
    # the package's blocks have one width
    layers = [replace(layers[0]), replace(layers[1], w=layers[1].w[:5], s=layers[1].s[:, :5], b=layers[1].b[:, :5])]
    heads = heads[0][:, :, :5], heads[1]
    there = []
    with torch.no_grad():
        for block, layer in zip(model.backbone.blocks, layers, strict=True):
            own = [(block[0].r, layer.r), (block[0].weight, layer.w), (block[0].s, layer.s), (block[0].bias, layer.b)]
            there.append([parameter for parameter, _ in own])
            for parameter, value in own:
                parameter.copy_(torch.from_numpy(value))
        model.output.weight.copy_(torch.from_numpy(heads[0].transpose(0, 2, 1).copy()))
        model.output.bias.copy_(torch.from_numpy(heads[1]))
    outputs = model(torch.from_numpy(batch.x[::3]))
    # the loss of each member, and their mean
    loss = torch.nn.functional.cross_entropy(outputs.flatten(0, 1), torch.from_numpy(batch.target))
    loss.backward()
    found, grads = reference.member_gradients(layers, heads, LossSpec("cross_entropy"), batch)
    assert abs(found - loss.item()) < 1e-12
    for own, parameters in zip(grads[:-1], there, strict=True):
        for grad, parameter in zip(own, parameters, strict=True):
            np.testing.assert_allclose(grad, parameter.grad.numpy(), rtol=1e-10, atol=1e-12)
    np.testing.assert_allclose(grads[-1][0].transpose(0, 2, 1), model.output.weight.grad.numpy(), atol=1e-12)
    np.testing.assert_allclose(grads[-1][1], model.output.bias.grad.numpy(), atol=1e-12)


@pytest.mark.parametrize("activation", [name for name in ACTIVATIONS if name != "prelu"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_affine_members_and_back(variant, activation):
    u, slope = variant.unit, SLOPES.get(activation, 0.0)
    cases = list(enumerate(shapes_of(variant)))
    if variant.device is INTERPRETER and activation not in ("identity", "silu"):
        # it is slow: one of the odd shapes, or of the large ones
        cases = [cases[1 + len(activation) % 3]]
    for case, (members, each, columns) in cases:
        values, rows = Values(case, variant), members * each
        layout = ("plain", "owned" if columns % ROW_MULTIPLE else "plain", "pitched")[case % 3]
        # a mask is that of its batch
        rate, with_r, accumulate = (0.0, 0.25)[case % 2], case != 1, 2 - case % 2
        vectors = {name: place(values.normal(members, columns), layout) for name in "sbr"}
        given = vectors if with_r else {name: vectors[name] for name in "sb"}
        x = place(values.factors(rows, columns), layout)
        counters = counters_of(rows, 6)
        operands = {"activation": activation, "counters": counters, **({"slope": slope} if slope else {})}
        keep, drops = None, {}
        if rate:
            keep = dropout_keep(rate, 2, case + 5, 6, rows, columns)
            drops = {"dropout": Dropout(rate, 2, case + 5), **kept(variant, poisoned((rows, columns), np.bool_))}
        y = poisoned((rows, columns), variant.compute)
        variant.bind("affine_members", x=x, y=y, **given, **operands, **drops)()
        if "keep" in drops:
            np.testing.assert_array_equal(drops["keep"], keep)
        wide = {name: reference.of_members(exact(array), rows) for name, array in vectors.items()}
        exact_x = exact(x)
        r = wide["r"] if with_r else np.ones_like(exact_x)
        z = exact_x * wide["s"] + wide["b"]
        z_bound = 2.0 * u * (np.abs(exact_x * wide["s"]) + np.abs(wide["b"]))
        h = reference.activation(activation, z, slope)
        h_bound = tol.activation_bound(activation, z, z_bound, slope, u)
        dropped = reference.dropout(h, keep, rate)
        dropped_bound = reference.dropout(h_bound, keep, rate) + 2.0 * u * np.abs(dropped)
        expected = dropped * r
        variant.check(y, expected, np.abs(r) * dropped_bound + 2.0 * u * np.abs(expected))

        dy = place(values.factors(rows, columns), layout)
        dx = poisoned((rows, columns), variant.compute)
        sums = {f"d{name}": poisoned((members, columns), variant.real) for name in given}
        rule = UpdateRule("sgd", accumulate=accumulate)
        run = variant.bind("grad_affine_members", dy=dy, x=x, dx=dx, rule=rule, **given, **sums, **operands, **drops)
        for _ in range(accumulate):
            run()
            counters[BATCH_INDEX] += 1
        grown = reference.dropout(exact(dy), keep, rate)
        slopes = reference.activation_grad(activation, z, slope)
        slopes_bound = tol.activation_grad_bound(activation, z, z_bound, slope, u)
        dz = grown * r * slopes
        dz_bound = np.abs(grown * r) * (slopes_bound + 6.0 * u * np.abs(slopes)) + 2.0**-126
        dx_wanted = dz * wide["s"]
        dx_bound = dz_bound * np.abs(wide["s"]) + 2.0 * u * np.abs(dx_wanted)
        variant.check(dx, dx_wanted, dx_bound)
        terms = {
            "ds": (dz * exact_x, dz_bound * np.abs(exact_x)),
            "db": (dz, dz_bound),
            "dr": (grown * h, np.abs(grown) * (h_bound + 4.0 * u * np.abs(h))),
        }
        for name, found in sums.items():
            each_term, error = terms[name]
            total = accumulate * reference.member_sums(each_term, members)
            carried = accumulate * reference.member_sums(error, members)
            magnitude = accumulate * reference.member_sums(np.abs(each_term) + error, members)
            tol.assert_within(
                found, total, carried + tol.bound(each * accumulate, magnitude, u, output=total, ulps=accumulate)
            )


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_first_factors_take_the_rows_of_a_batch(variant):
    """Members of one data row follow one another; padding comes last."""
    for case, (members, each, columns) in enumerate(shapes_of(variant)):
        values, size, u = Values(case, variant), members * each, variant.unit
        x, r = values.factors(37, columns), values.normal(members, columns)
        counters = counters_of()
        rows = np.repeat(padded_rows(values.rng, max(1, each - 2), each, 37), members)
        operand, rows = walked(values, rows, counters)
        counters[ROW_COUNT] = np.count_nonzero(rows >= 0)
        batch = np.where(rows[:, None] >= 0, exact(x)[np.maximum(rows, 0)], 0.0)
        y = poisoned((size, columns), variant.compute)
        given = {"x": x, "r": r, "counters": counters, "rows": operand}
        variant.bind("affine_members", y=y, **given)()
        wanted = batch * reference.of_members(exact(r), size)
        variant.check(y, wanted, u * np.abs(wanted))
        dy, dr = values.factors(size, columns), poisoned((members, columns), variant.real)
        variant.bind("grad_affine_members", dy=dy, dr=dr, rule=UpdateRule("sgd"), **given)()
        terms = exact(dy) * batch
        total = reference.member_sums(terms, members)
        tol.assert_within(dr, total, tol.bound(each, reference.member_sums(np.abs(terms), members), u, output=total))


@pytest.mark.parametrize("variant", VARIANTS)
def test_heads_and_their_gradients(variant):
    for case, ((members, each, columns), outputs) in enumerate(zip(shapes_of(variant), OUTPUTS, strict=False)):
        values, rows = Values(case, variant), members * each
        layout = ("plain", "owned", "pitched")[case % 3]
        w = place(values.factors(members * outputs, columns, scale=columns**-0.5), layout)
        b, x = values.normal(members * outputs), place(values.factors(rows, columns), layout)
        dz = place(values.factors(rows, outputs), layout)
        z, dx = poisoned((rows, outputs), variant.compute), poisoned((rows, columns), variant.compute)
        variant.bind("linear_members", w=w, x=x, b=b, z=z)()
        variant.bind("grad_input_members", dz=dz, w=w, dx=dx)()
        counters = counters_of(rows)
        dw, db = poisoned(w.shape, variant.real), poisoned(b.shape, variant.real)
        frozen = {"dw": dw, "db": None} if case == 1 else {"dw": dw, "db": db}
        rule = UpdateRule("sgd", accumulate=2)
        run = variant.bind("grad_weight_members", dz=dz, x=x, rule=rule, counters=counters, **frozen)
        for batch_index in range(2):
            counters[BATCH_INDEX] = batch_index
            run()
        for member in range(members):
            own = slice(member * outputs, (member + 1) * outputs)
            mine, by_z = exact(x)[member::members], exact(dz)[member::members]
            own_w, own_b = exact(w)[own], exact(b)[own]
            check_linear(variant, z[member::members], mine, own_w, own_b)
            check_grad_input(variant, dx[member::members], by_z, own_w, mine, "identity")
            own_db = None if frozen["db"] is None else db[own]
            check_grad_weight(variant, by_z, mine, dw[own], own_db, batches=2)


@pytest.mark.parametrize("variant", VARIANTS)
def test_what_is_dropped_or_padding_may_be_nan(variant):
    rows, columns = 4, 8
    keep = dropout_keep(0.5, 0, 1, 0, rows, columns)
    x = np.where(keep, 1.0, np.nan).astype(variant.compute)
    ones = {name: np.ones((2, columns), variant.real) for name in "sbr"}
    given = {"x": x, "activation": "relu", "dropout": Dropout(0.5, 0, 1), "counters": counters_of()}
    given |= kept(variant, np.zeros((rows, columns), np.bool_))
    y = np.full((rows, columns), np.nan, variant.compute)
    variant.bind("affine_members", y=y, **ones, **given)()
    np.testing.assert_array_equal(y, np.where(keep, 4.0, 0.0))


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_learned_slope_is_refused(variant):
    one = {name: np.ones((1, 1), variant.compute if name in "xy" else variant.real) for name in "xysbr"}
    with pytest.raises(ArgumentError, match="activation: it takes no learned slope"):
        variant.bind("affine_members", activation="prelu", **one)


@pytest.mark.parametrize("variant", [one for one in VARIANTS if not one.values[0].device.on_host])
def test_members_of_unequal_size_are_refused(variant):
    x, y = np.ones((5, 3), variant.compute), np.ones((5, 3), variant.compute)
    own = np.ones((2, 3), variant.real)
    with pytest.raises(ShapeError, match=r"members: .* got 5 and 2"):
        variant.bind("affine_members", x=x, y=y, r=own)
    with pytest.raises(ShapeError, match=r"members: .* got 5 and 0"):
        variant.bind("affine_members", x=x, y=y)
