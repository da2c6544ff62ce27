"""``perturb`` and its random start against their definitions."""

import numpy as np
import pytest
from calls import counters_of
from devices import VARIANT_PARAMETERS, variants_with
from memory import exact
from tolerance import assert_within

from fusemlp_kernels import philox, reference
from fusemlp_kernels.contract import BATCH_INDEX, ROW_COUNT, ROW_OFFSET, STATS, LossSpec, Perturbation

SEED = (5 << 40) + 3
VARIANTS = variants_with("perturb")
# rows of the batch, columns; the last are more than a program's or a block's
SHAPES = ((1, 1), (5, 3), (2, 1100))


def test_starts_are_uniform_and_differ_by_seed_batch_and_row():
    drawn = philox.uniform(SEED, 3, 40, 250)
    assert np.abs(drawn).max() < 1.0 and np.array_equal(drawn, drawn.astype(np.float32))
    assert abs(drawn.mean()) < 4 / np.sqrt(3 * drawn.size)
    assert abs((drawn**2).mean() - 1 / 3) < 4 * np.sqrt(4 / 45 / drawn.size)
    others = [philox.uniform(SEED + 1, 3, 40, 250), philox.uniform(SEED, 4, 40, 250), np.roll(drawn, 1, axis=0)]
    correlations = np.corrcoef([one.ravel() for one in (drawn, *others)]) - np.eye(4)
    assert np.abs(correlations).max() < 4.5 / np.sqrt(drawn.size)
    assert np.array_equal(philox.uniform(SEED, 3, 7, 9), drawn[:7, :9])


def perturbed(variant, change, x, adv, dx=None, rows=None):
    """Run the op on copies; its result, and the arrays as the kernel reads them."""
    counters = counters_of()
    counters[[BATCH_INDEX, ROW_COUNT]] = 6, len(adv)
    out = "start" if dx is None else "adv"
    given = {"x": variant.rounded(x), out: variant.rounded(adv)}
    given |= {} if dx is None else {"dx": variant.rounded(dx)}
    if rows is not None:
        # those of another batch come first
        counters[ROW_OFFSET] = len(adv)
        given["rows"] = np.concatenate([np.zeros(len(adv), np.int64), rows])
    read = {name: exact(array) for name, array in given.items()}
    variant.bind("perturb", change=change, counters=counters, **given)()
    return exact(given[out]), read


def expected(variant, change, read, dx, rows):
    """The definition's result, and the bound of its error.

    Each of at most eight operations rounds by a unit of what it makes, no more than |x|, the move so far and a step
    together. A move that is shortened passes an error of its length, at most that of all errors, on to each element.
    """
    x = read["x"] if rows is None else np.where(rows[:, None] < 0, 0.0, read["x"][rows])
    if dx is not None:
        so_far = read["adv"] - x
    else:
        so_far = change.eps * philox.uniform(change.seed, 6, *x.shape) if change.seed is not None else np.zeros_like(x)
    wanted = reference.perturb(x, so_far, change, None if dx is None else read["dx"])
    error = 8.0 * variant.unit * (np.abs(x) + np.abs(so_far) + (0.0 if dx is None else change.step))
    if change.norm == "2":
        error = error + np.sqrt(np.sum(error**2, axis=1, keepdims=True))
    if rows is not None:
        wanted[rows < 0], error[rows < 0] = 0.0, 0.0
    return wanted, variant.result_bound(error, wanted)


@pytest.mark.parametrize("bounds", [(-np.inf, np.inf), (0.1, 0.9)])
@pytest.mark.parametrize("norm", ["inf", "2"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_start_and_a_step_are_those_of_the_definition(variant, norm, bounds):
    rng = np.random.default_rng(3)
    for rows, columns in SHAPES:
        # in the norm 2 some rows are shortened, and others not
        eps = 0.2 if norm == "inf" else 0.08 * np.sqrt(columns)
        change = Perturbation(eps, 0.75 * eps, norm, *bounds, seed=SEED)
        x = rng.uniform(0.1, 0.9, (rows + 2, columns))
        picked = rng.permutation(rows + 2)[:rows]
        picked[-1:] = -1 if rows > 1 else picked[-1:]
        for given in (None, picked):
            start, read = perturbed(
                variant, change, x[:rows] if given is None else x, np.full((rows, columns), 0.5), rows=given
            )
            assert_within(start, *expected(variant, change, read, None, given))
            dx = rng.normal(size=(rows, columns))
            dx[0, 0] = 0.0
            dx[1:2] = 0.0
            adv, read = perturbed(variant, change, x[:rows] if given is None else x, start, dx, given)
            assert_within(adv, *expected(variant, change, read, dx, given))
        still = Perturbation(eps, eps, norm, *bounds)
        adv, read = perturbed(variant, still, x[:rows], np.full((rows, columns), 0.5))
        assert_within(adv, read["x"], 0.0)


@pytest.mark.parametrize("norm", ["inf", "2"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_tiny_gradients_move_as_far_and_nan_stays_in_its_row(variant, norm):
    dx, x = np.zeros((3, 5)), np.full((3, 5), 0.5)
    # in float32 the squares of the first underflow, and the step divided by it overflows
    dx[0, 2], dx[1, 3], dx[2, 1] = 1e-7 if variant.output_unit else 2e-38, 1.0, np.nan
    adv, _ = perturbed(variant, Perturbation(16.0, 8.0, norm), x, x, dx)
    assert (adv[0, 2], adv[1, 3]) == (8.5, 8.5)
    assert np.array_equal(np.isnan(adv), np.isnan(dx) if norm == "inf" else np.isnan(dx).any(axis=1)[:, None] & (x > 0))


@pytest.mark.parametrize("kind", ["cross_entropy", "mse"])
@pytest.mark.parametrize("variant", VARIANT_PARAMETERS)
def test_a_loss_that_is_not_counted_has_the_same_gradient(variant, kind):
    rng, counters = np.random.default_rng(0), counters_of(4)
    x, w, b = (variant.rounded(rng.normal(size=size)) for size in ((4, 3), (5, 3), 5))
    target = np.array([0, 4, 2, 1]) if kind == "cross_entropy" else rng.uniform(size=(4, 5)).astype(variant.real)
    found = []
    for stats in ({"stats": np.zeros(STATS)}, {}):
        dz = np.zeros((4, 5), variant.compute)
        given = {"x": x, "w": w, "b": b.astype(variant.real), "target": target, "counters": counters}
        variant.bind("linear_loss_grad", dz=dz, loss=LossSpec(kind), **given, **stats)()
        found.append(dz)
    assert np.array_equal(*found) and found[0].any()
