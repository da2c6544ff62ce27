"""A first layer of codes, forward and backward, against the oracle on the dense rows that they stand for."""

import numpy as np
import pytest
from calls import RULES, Clock, check_grad_weight, counters_of, padded_rows, state_arrays, walked
from devices import NUMPY, VARIANT_PARAMETERS
from memory import Values, exact, place, poisoned
from tolerance import assert_updated, assert_within, bound, linear_bound

from fusemlp_kernels import contract as c
from fusemlp_kernels import reference
from fusemlp_kernels.coding import BAG, NUMBERS, PIECES, WORD, Coding, Column
from fusemlp_kernels.errors import BackendUnavailableError
from fusemlp_kernels.registry import TRAITS

ON_HOST = pytest.mark.parametrize("variant", [v for v in VARIANT_PARAMETERS if v.values[0].device is NUMPY])
OTHERS = pytest.mark.parametrize("variant", [v for v in VARIANT_PARAMETERS if not v.values[0].traits.reads_codes])
CODINGS = {
    "word": (Column(WORD, 1),),
    "piece": (Column(PIECES, 1),),
    "pieces": (Column(PIECES, 48), Column(PIECES, 3)),
    "numbers": (Column(NUMBERS, 5),),
    "bag": (Column(BAG, 30, 4),),
    # more work than a task has
    "wide": (*[Column(PIECES, 300)] * 3, Column(WORD, 900), Column(BAG, 400, 7)),
    "all": (
        Column(WORD, 5),
        Column(PIECES, 7),
        Column(NUMBERS, 2),
        Column(BAG, 20, 3),
        Column(PIECES, 4),
        Column(WORD, 9),
    ),
}
# rows and units: one of each, odd ones, a vector and more, blocks
SHAPES = ((1, 1), (1, 64), (2, 3), (37, 17), (64, 64), (300, 130))


def codes_of(values, coding, rows):
    """Random codes, words and bags with gaps, fractions beyond 0 and 1; the first row has no word and empty bags."""
    codes = values.factors(rows, coding.slots)
    for slot, low, high in coding.indices:
        codes[:, slot] = values.rng.integers(low, high + 1, rows)
        if rows:
            codes[0, slot] = low
    return codes


def magnitudes(coding, codes):
    """Return the sums of the magnitudes of an input's factors, (n, inputs); before a number's piece there are two."""
    sizes, indices = np.abs(codes), coding.indices[:, 0]
    sizes[:, indices] = codes[:, indices]
    dense = coding.dense(sizes)
    for column, at in zip(coding.columns, coding.places, strict=True):
        if column.kind == PIECES:
            k, f = codes[:, at.slot, None], codes[:, at.slot + 1, None]
            before = np.arange(column.inputs) < k
            dense[:, at.first : at.first + column.inputs] *= np.where(before, np.abs(1 - f) + np.abs(f), 1)
    return dense


def weights(values, coding, units):
    """Weights (N, K) whose columns lie side by side, as a layer of codes reads them."""
    return place(values.factors(coding.inputs, units), "owned").T


@ON_HOST
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", CODINGS)
def test_linear(name, shape, variant):
    (rows, units), values, coding = shape, Values(3, variant), Coding(CODINGS[name])
    codes, b = codes_of(values, coding, rows), values.normal(units)
    for w in (weights(values, coding, units), values.factors(units, coding.inputs)):
        y, z = (poisoned((rows, units), variant.compute, "plain") for _ in range(2))
        operands = {"x": codes, "w": w, "b": b, "y": y, "z": z, "activation": "gelu", "coding": coding}
        variant.bind("linear", **operands, counters=counters_of(rows))()
        given = exact(codes), exact(w)
        expected = reference.linear(coding.dense(given[0]), given[1], exact(b))
        magnitude = magnitudes(coding, given[0]) @ np.abs(given[1]).T + np.abs(exact(b))
        limit = bound(coding.inputs + coding.slots + 1, magnitude, variant.unit, output=expected)
        assert_within(z, expected, limit)
        _, y_bound = linear_bound(exact(z), np.eye(units), np.zeros(units), "gelu", u=variant.unit)
        assert_within(y, reference.activation("gelu", exact(z)), y_bound)


@ON_HOST
def test_linear_picks_rows(variant):
    values, coding = Values(4, variant), Coding(CODINGS["all"])
    codes, w, b = codes_of(values, coding, 50), weights(values, coding, 9), values.normal(9)
    counters = counters_of(11)
    rows = padded_rows(values.rng, 11, 16, 50)
    operand, _ = walked(values, rows, counters)
    y, gathered = poisoned((16, 9), variant.compute, "plain"), poisoned((16, coding.slots), variant.compute, "plain")
    common = {"w": w, "b": b, "activation": "identity", "coding": coding}
    variant.bind("linear", x=codes, rows=operand, gathered=gathered, y=y, counters=counters, **common)()
    picked, alone = codes[rows[:11]], poisoned((11, 9), variant.compute, "plain")
    variant.bind("linear", x=picked, y=alone, counters=counters_of(11), **common)()
    assert np.array_equal(gathered[:11], picked)
    assert np.array_equal(y[:11], alone)


@ON_HOST
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", CODINGS)
def test_grad_weight(name, shape, variant):
    """Twice: the second of two batches of an update adds to the first."""
    (rows, units), values, coding = shape, Values(5, variant), Coding(CODINGS[name])
    dz, x = values.factors(rows, units), codes_of(values, coding, rows)
    dw, db = poisoned((coding.inputs, units), variant.real, "plain").T, poisoned((units,), variant.real, "plain")
    layer, counters = {"dz": dz, "x": x, "dw": dw, "db": db, "coding": coding}, counters_of(rows)
    run = variant.bind("grad_weight", layers=[layer], rule=c.UpdateRule("sgd", accumulate=2), counters=counters)
    dense = coding.dense(exact(x)).astype(np.float64)
    for batches in (1, 2):
        run()
        check_grad_weight(variant, dz, dense, dw, db, batches)
        counters[c.BATCH_INDEX] += 1


@ON_HOST
@pytest.mark.parametrize("rule", [rule for rule in RULES.values() if rule.clip_norm is None], ids=str)
@pytest.mark.parametrize("shape", SHAPES[2:])
@pytest.mark.parametrize("name", ["all", "wide"])
def test_grad_weight_update(name, shape, rule, variant):
    (rows, units), values, coding, u = shape, Values(6, variant), Coding(CODINGS[name]), variant.unit
    clock = Clock(rule, 4, 1)
    clock.counters[c.ROW_COUNT] = rows
    dz, x = values.factors(rows, units), codes_of(values, coding, rows)
    w = weights(values, coding, units)
    states = tuple(np.ascontiguousarray(state.T).T for state in state_arrays(rule, values, units, coding.inputs))
    tensor_rule = c.TensorRule(0.5, 0.01)
    layer = {"dz": dz, "x": x, "w": w, "w_state": states, "w_rule": tensor_rule, "coding": coding}
    run = variant.bind(
        "grad_weight_update", layers=[layer | {"b": None, "b_state": (), "b_rule": tensor_rule}], **clock.operands
    )
    dense = coding.dense(exact(x))
    gradient, _ = reference.grad_weight(exact(dz), dense)
    magnitude, _ = reference.grad_weight(np.abs(exact(dz)), np.abs(dense))
    for _ in range(2):
        before, t, rate = (exact(w), gradient, tuple(map(exact, states))), clock.update_count, clock.rate
        run()
        assert clock.check_after_a_batch()
        assert_updated(w, states, rule, tensor_rule, before, t, rate, bound(rows, magnitude, u, output=gradient), u)


@ON_HOST
def test_inputs_without_a_row_keep_a_gradient_of_zero(variant):
    """Of the first pieces the gradient is the sum of all rows beyond them, and of the last none has one."""
    values, coding = Values(7, variant), Coding((Column(PIECES, 9), Column(BAG, 6, 2)))
    x = np.zeros((40, 6), variant.compute)
    x[:, 0], x[:, 1], x[:, 2::2], x[:, 3::2] = values.rng.integers(0, 5, 40), 0.25, -1, 1.0
    dz, dw = values.factors(40, 8), poisoned((15, 8), variant.real, "plain").T
    layers = [{"dz": dz, "x": x, "dw": dw, "db": None, "coding": coding}]
    variant.bind("grad_weight", layers=layers, rule=c.UpdateRule("sgd"), counters=counters_of(40))()
    assert not dw[:, 5:].any()
    assert dw[:, :5].all()


@ON_HOST
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", CODINGS)
def test_factors_of_members(name, shape, variant):
    """The layer and its gradients; these twice: the second of two batches of an update adds to the first."""
    members, (rows, units), values, coding = 3, shape, Values(8, variant), Coding(CODINGS[name])
    rows *= members
    x, b = codes_of(values, coding, rows // members).repeat(members, axis=0), values.normal(units)
    w, r = weights(values, coding, units), values.factors(members, coding.inputs)
    y = poisoned((rows, units), variant.compute, "plain")
    common = {"x": x, "w": w, "r": r, "coding": coding}
    variant.bind("linear", **common, b=b, y=y, activation="identity", counters=counters_of(rows))()
    factors = reference.of_members(exact(r), rows)
    dense, sizes = coding.dense(exact(x)) * factors, magnitudes(coding, exact(x)) * np.abs(factors)
    expected = reference.linear(dense, exact(w), exact(b))
    magnitude = sizes @ np.abs(exact(w)).T + np.abs(exact(b))
    # a sum's factor is one rounding more
    assert_within(y, expected, bound(coding.inputs + coding.slots + 2, magnitude, variant.unit, output=expected))

    dz, counters = values.factors(rows, units), counters_of(rows)
    dw, dr = poisoned((coding.inputs, units), variant.real, "plain").T, poisoned(r.shape, variant.real, "plain")
    layer = {**common, "dz": dz, "dw": dw, "db": None, "dr": dr}
    run = variant.bind("grad_weight", layers=[layer], rule=c.UpdateRule("sgd", accumulate=2), counters=counters)
    of_x = [array(coding.dense(exact(x))) for array in (np.asarray, np.abs)]
    of_w, of_dz = ([exact(array), np.abs(exact(array))] for array in (w, dz))
    by_w = [reference.grad_weight(of_dz[i], of_x[i] * (factors, np.abs(factors))[i])[0] for i in range(2)]
    by_r = [reference.member_sums(of_x[i] * (of_dz[i] @ of_w[i]), members) for i in range(2)]
    for batches in (1, 2):
        run()
        for gradient, (expected, magnitude), length in ((dw, by_w, rows + 1), (dr, by_r, rows + units)):
            limit = bound(length + batches, batches * magnitude, variant.unit, output=batches * expected)
            assert_within(gradient, batches * expected, limit)
        counters[c.BATCH_INDEX] += 1


@OTHERS
def test_other_backends_refuse_codes(variant):
    coding = Coding(CODINGS["word"])
    w = np.zeros((4, 1), np.float32)
    operands = {"x": np.zeros((2, 1), np.float32), "w": w, "b": w[:, 0], "y": np.zeros((2, 4), np.float32)}
    with pytest.raises(
        BackendUnavailableError, match=r"linear: coding: only the numpy backend reads codes; give rows of"
    ):
        variant.bind("linear", **operands, activation="identity", coding=coding, counters=counters_of(2))


def test_every_backend_but_numpy_lacks_codes():
    assert {name for name, traits in TRAITS.items() if traits.reads_codes} == {"numpy"}
