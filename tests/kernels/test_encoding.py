"""The op ``encode`` against the oracle, the oracle against torch, and its accuracy where octaves are high."""

import numpy as np
import pytest
import torch
import torch_oracle as oracle
from calls import counters_of
from devices import INTERPRETER, variants_with
from memory import Values, exact, place, poisoned

from fusemlp_kernels import reference
from fusemlp_kernels.errors import ArgumentError

VARIANTS = variants_with("encode")
# rows, inputs and octaves: one of each, odd ones, a row of several blocks, more rows than a task takes
SHAPES = ((1, 1, 1), (5, 3, 10), (37, 2, 4), (70, 5, 7), (3, 40, 14))
LARGE = ((700, 2, 10), (4, 300, 3))
LAYOUTS = ("plain", "owned", "pitched", "transposed", "stepped")
# Units of rounding between a wave and the true one: see ``numpy.compiled.inputs``. The oracle rounds pi and its
# product with a t below 2 as well, and then a sine.
WAVE, ORACLE = 6.0, (2.0 * np.pi * 2.0 + 1.0) * 2.0**-53


def shapes_of(variant):
    """The interpreter gets small ones."""
    return SHAPES if variant.device is INTERPRETER else SHAPES + LARGE


@pytest.mark.parametrize("inputs", [False, True])
def test_the_oracle_is_torch(inputs):
    random = np.random.default_rng(0)
    x = random.uniform(-1.0, 1.0, (6, 3))
    leaf = oracle.tensor(x, grad=True)
    parts = [leaf] if inputs else []
    for column in range(3):
        for octave in range(5):
            angle = 2.0**octave * torch.pi * leaf[:, column : column + 1]
            parts += [angle.sin(), angle.cos()]
    y = torch.cat(parts, dim=1)
    dy = random.normal(size=y.shape)
    y.backward(oracle.tensor(dy))
    oracle.assert_close(reference.encode(x, 5, inputs), oracle.numpy(y))
    oracle.assert_close(reference.encode_grad(x, dy, 5, inputs), leaf.grad.numpy())


def test_the_oracle_by_finite_differences():
    random = np.random.default_rng(1)
    x, dy, step = random.normal(size=(4, 2)), random.normal(size=(4, 14)), 1e-6
    for column in range(2):
        move = step * (np.arange(2) == column)
        ends = [(reference.encode(x + sign * move, 3, True) * dy).sum(axis=1) for sign in (1.0, -1.0)]
        slope = (ends[0] - ends[1]) / (2.0 * step)
        np.testing.assert_allclose(reference.encode_grad(x, dy, 3, True)[:, column], slope, rtol=1e-6)


def wave_error(variant):
    return WAVE * variant.unit + ORACLE


@pytest.mark.parametrize("inputs", [False, True])
@pytest.mark.parametrize("variant", VARIANTS)
def test_encode_and_back(variant, inputs):
    u = variant.unit
    for case, (rows, columns, octaves) in enumerate(shapes_of(variant)):
        values, layout = Values(case, variant), LAYOUTS[case % len(LAYOUTS)]
        output = "owned" if layout == "owned" else "plain"
        # float32 in every precision: coordinates near 1, tiny ones and large ones
        x = values.normal(rows + 3, columns) * 10.0 ** values.rng.integers(-6, 5, (rows + 3, columns))
        x = place(x.astype(variant.real), layout)
        picks = values.rng.permutation(rows + 3)[:rows].astype(np.int64)
        picks[rows - 1 :] = -1 if rows > 1 else picks[rows - 1 :]
        batch = np.where((picks >= 0)[:, None], exact(x)[picks], 0.0)
        width = columns * (2 * octaves + inputs)
        common = {"octaves": octaves, "inputs": inputs, "counters": counters_of(rows), "x": x}
        y = poisoned((rows, width), variant.compute, output)
        variant.bind("encode", **common, rows=picks, y=y)()
        wanted = reference.encode(batch, octaves, inputs)
        error = np.full(wanted.shape, wave_error(variant))
        error[:, : columns * inputs] = 0.0
        variant.check(y, wanted, error)
        whole = poisoned((rows + 3, width), variant.compute, output)
        variant.bind("encode", **common | {"counters": counters_of(rows + 3)}, y=whole)()
        live = picks >= 0
        np.testing.assert_array_equal(np.asarray(whole)[picks[live]], np.asarray(y)[live])

        dy = place(values.factors(rows, width), layout)
        dx = poisoned((rows, columns), variant.compute, output)
        variant.bind("encode", **common, rows=picks, dy=dy, dx=dx)()
        factors = np.pi * 2.0 ** np.repeat(np.tile(np.arange(octaves), columns), 2)
        sizes = (np.abs(exact(dy))[:, columns * inputs :] * factors).reshape(rows, columns, -1)
        # each term: its wave, its factor and three roundings; then the sum, one after another
        terms = wave_error(variant) * sizes + 5.0 * u * sizes
        own = np.abs(exact(dy))[:, :columns] * inputs
        error = terms.sum(axis=-1) + 2.0 * octaves * u * (sizes.sum(axis=-1) + own)
        variant.check(dx, reference.encode_grad(batch, exact(dy), octaves, inputs), error)


@pytest.mark.parametrize("variant", VARIANTS)
def test_zeros_and_ends_of_the_waves_are_exact(variant):
    """Halves and whole numbers of pi, whatever the octave: no digit of x is lost."""
    t = np.array([[0.0], [0.5], [-0.5], [1.0], [-1.0], [1.5], [-2.0], [3.0], [2.0**23 + 1], [2.0**30], [0.25]])
    x, octaves = place(t.astype(variant.real), "plain"), 6
    y = poisoned((len(t), 2 * octaves), variant.compute)
    variant.bind("encode", x=x, y=y, octaves=octaves, counters=counters_of(len(t)))()
    scaled = np.fmod(t * 2.0 ** np.arange(octaves), 2.0)
    halves = np.fmod(scaled, 0.5) == 0.0
    wanted = np.stack([np.round(np.sin(np.pi * scaled)), np.round(np.cos(np.pi * scaled))], axis=-1)
    found = exact(y).reshape(wanted.shape)
    assert halves.sum() > 60
    # one is within the roundings of the polynomial, zero is zero
    variant.check(found[halves], wanted[halves], np.abs(wanted[halves]) * WAVE * variant.unit)


@pytest.mark.parametrize("variant", VARIANTS)
def test_nan_and_infinity_give_nan_in_their_row_alone(variant):
    x = np.array([[0.5, 0.25], [np.nan, 0.25], [0.5, np.inf]], variant.real)
    y = poisoned((3, 12), variant.compute)
    variant.bind("encode", x=place(x, "plain"), y=y, octaves=3, counters=counters_of(3))()
    wanted = np.zeros((3, 12), np.bool_)
    wanted[1, :6] = wanted[2, 6:] = True
    np.testing.assert_array_equal(np.isnan(exact(y)), wanted)


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_columns_of_waves_are_checked(variant):
    x, y = np.zeros((3, 2), variant.real), np.zeros((3, 13), variant.compute)
    with pytest.raises(ArgumentError, match="encode: expected 12 columns of waves, got 13"):
        variant.bind("encode", x=place(x, "plain"), y=place(y, "plain"), octaves=3, counters=counters_of(3))
