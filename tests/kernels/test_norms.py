"""The ops of normalised layers and residual blocks against the oracle, and the oracle against torch."""

import itertools

import numpy as np
import pytest
import tolerance as tol
import torch
import torch_oracle as oracle
from calls import counters_of, kept
from devices import INTERPRETER, variants_with
from memory import Values, exact, place, poisoned

import fusemlp_kernels
from fusemlp_kernels import reference
from fusemlp_kernels.contract import ACTIVATIONS, BATCH_INDEX, Dropout, UpdateRule
from fusemlp_kernels.errors import ArgumentError
from fusemlp_kernels.numpy.calls import ENTRIES
from fusemlp_kernels.numpy.tables import CallTable
from fusemlp_kernels.philox import dropout_keep

VARIANTS = variants_with("normalise")
# as operands
NORMS = ({"eps": 1e-5, "centred": True}, {"eps": 1e-3, "centred": False}, {})
SLOPES = {"leaky_relu": 0.1, "elu": 1.3}
# rows and columns: one of each, odd ones, a row of several blocks, more rows than a task or a stretch takes
SHAPES = ((1, 1), (5, 7), (9, 33), (37, 140), (530, 9), (2, 1100))
LARGE = ((700, 16), (33, 257), (40, 2100))
LAYOUTS = ("plain", "owned", "pitched", "transposed", "stepped")


def shapes_of(variant):
    """The interpreter gets small ones."""
    return SHAPES if variant.device is INTERPRETER else SHAPES + LARGE


@pytest.mark.parametrize("norm", NORMS[:2], ids=("layer", "rms"))
def test_the_oracle_is_torch(norm):
    random = np.random.default_rng(0)
    x, dn = random.normal(1.0, 2.0, (6, 9)), random.normal(size=(6, 9))
    leaf = oracle.tensor(x, grad=True)
    functional = torch.nn.functional
    layer = functional.layer_norm if norm["centred"] else functional.rms_norm
    n = layer(leaf, (9,), eps=norm["eps"])
    n.backward(oracle.tensor(dn))
    oracle.assert_close(reference.normalise(x, **norm), oracle.numpy(n))
    oracle.assert_close(reference.normalise_grad(dn, x, **norm), leaf.grad.numpy())


def normalised(x, norm, u):
    """The rows normalised; their error; the factor of each row; and its relative error.

    A mean is a reduction of N values. Differences c from it, with the errors e, give a sum of squares that is off by
    2 |c| e at most, of which the root takes half.
    """
    if not norm:
        ones = np.ones((len(x), 1))
        return x, np.zeros_like(x), ones, 0.0 * ones

    def mean(values):
        return np.mean(values, axis=1, keepdims=True)

    n, growth = reference.normalise(x, **norm), tol.growth(x.shape[1])
    centred = x - mean(x) if norm["centred"] else x
    error = u * np.abs(centred) + (growth * u * mean(np.abs(x)) if norm["centred"] else 0.0)
    square = mean(centred**2) + norm["eps"]
    relative = mean(np.abs(centred) * error + 0.5 * error**2) / square + (0.5 * growth + 4.0) * u
    factor = 1.0 / np.sqrt(square)
    return n, error * factor + np.abs(n) * (relative + u), factor, relative


@pytest.mark.parametrize("activation", [name for name in ACTIVATIONS if name != "prelu"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_normalise_and_back(variant, activation):
    u, slope = variant.unit, SLOPES.get(activation, 0.0)
    cases = [(*shape, norm) for shape in shapes_of(variant) for norm in NORMS]
    if variant.device is INTERPRETER and activation not in ("identity", "silu"):
        # it is slow: one of the odd shapes, or of the large ones
        cases = [cases[3 + len(activation) % 15]]
    for case, (rows, columns, norm) in enumerate(cases):
        values = Values(case, variant)
        layout, rate, accumulate = LAYOUTS[case % len(LAYOUTS)], (0.0, 0.25)[case % 2], 2 - case % 2
        output = "owned" if layout == "owned" else "plain"
        x = place(variant.rounded(values.normal(rows, columns) + 0.5), layout)
        names = "" if not norm else "gb" if norm["centred"] else "g"
        vectors = {name: place(values.normal(columns), layout) for name in names}
        counters = counters_of(rows, 6)
        operands = {"activation": activation, "counters": counters, **({"slope": slope} if slope else {})}
        operands |= norm
        keep, drops = None, {}
        if rate:
            keep = dropout_keep(rate, 2, case + 5, 6, rows, columns)
            drops = {"dropout": Dropout(rate, 2, case + 5), **kept(variant, poisoned((rows, columns), np.bool_))}
        y = poisoned((rows, columns), variant.compute, output)
        variant.bind("normalise", x=x, y=y, **vectors, **operands, **drops)()
        if "keep" in drops:
            np.testing.assert_array_equal(drops["keep"], keep)
        exact_x = exact(x)
        n, n_bound, factor, relative = normalised(exact_x, norm, u)
        g = exact(vectors["g"]) if "g" in vectors else np.ones(columns)
        b = exact(vectors["b"]) if "b" in vectors else np.zeros(columns)
        z = n * g + b
        z_bound = 0.0 if not norm else n_bound * np.abs(g) + 2.0 * u * (np.abs(n * g) + np.abs(b))
        h = reference.activation(activation, z, slope)
        h_bound = tol.activation_bound(activation, z, z_bound, slope, u)
        dropped = reference.dropout(h, keep, rate)
        variant.check(y, dropped, reference.dropout(h_bound, keep, rate) + 2.0 * u * np.abs(dropped))

        dy = place(values.factors(rows, columns), layout)
        dx = poisoned((rows, columns), variant.compute, output)
        # of a factor that is not trained nothing is asked
        sums = {f"d{name}": poisoned((columns,), variant.real) for name in names if (case + (name == "b")) % 7}
        rule = UpdateRule("sgd", accumulate=accumulate)
        run = variant.bind("grad_normalise", dy=dy, x=x, dx=dx, rule=rule, **vectors, **sums, **operands, **drops)
        for _ in range(accumulate):
            run()
            counters[BATCH_INDEX] += 1
        grown = reference.dropout(exact(dy), keep, rate)
        # between the kernels of the way back n and dn lie in memory, in the type that matrix products read
        read_bound = n_bound
        if norm:
            read_bound = variant.result_bound(n_bound, n)
            z_bound = read_bound * np.abs(g) + 2.0 * u * (np.abs(n * g) + np.abs(b))
        slopes = reference.activation_grad(activation, z, slope)
        slopes_bound = tol.activation_grad_bound(activation, z, z_bound, slope, u)
        dz = grown * slopes
        dz_bound = np.abs(grown) * (slopes_bound + 6.0 * u * np.abs(slopes)) + tol.TINY
        by_n, by_n_bound = dz * g, dz_bound * np.abs(g) + u * np.abs(dz * g)
        by_n_bound = by_n_bound if not norm else variant.result_bound(by_n_bound, by_n)
        wanted = reference.normalise_grad(by_n, exact_x, **norm) if norm else by_n
        variant.check(dx, wanted, wanted_bound(by_n, by_n_bound, n, n_bound, factor, relative, norm, u))
        terms = {"dg": (dz * n, dz_bound * np.abs(n) + np.abs(dz) * read_bound), "db": (dz, dz_bound)}
        for name, found in sums.items():
            term, error = terms[name]
            total, carried = accumulate * term.sum(axis=0), accumulate * error.sum(axis=0)
            magnitude = accumulate * np.abs(term).sum(axis=0) + carried
            tol.assert_within(
                found, total, carried + tol.bound(rows * accumulate, magnitude, u, output=total, ulps=accumulate)
            )


def wanted_bound(d, d_bound, n, n_bound, factor, relative, norm, u):
    """The error of ``(d - n * mean(d * n) - mean(d)) * factor``, each part carried on to first order."""
    if not norm:
        return d_bound

    def mean(values):
        return np.mean(values, axis=1, keepdims=True)

    growth = tol.growth(d.shape[1])
    along = mean(d * n)
    along_bound = mean(d_bound * np.abs(n) + np.abs(d) * n_bound) + growth * u * mean(np.abs(d * n))
    rest = d - n * along
    bound = d_bound + n_bound * np.abs(along) + np.abs(n) * along_bound + 2.0 * u * (np.abs(d) + np.abs(n * along))
    if norm["centred"]:
        bound = bound + mean(bound) + growth * u * mean(np.abs(rest)) + u * np.abs(rest)
        rest = rest - mean(rest)
    return factor * (bound + np.abs(rest) * (relative + 3.0 * u))


@pytest.mark.parametrize("variant", VARIANTS)
def test_add(variant):
    for case, ((rows, columns), layout) in enumerate(itertools.product(shapes_of(variant), LAYOUTS)):
        values = Values(case, variant)
        a, b = (place(values.factors(rows, columns), layout) for _ in range(2))
        y = poisoned((rows, columns), variant.compute, "owned" if layout == "owned" else "plain")
        variant.bind("add", a=a, b=b, y=y)()
        total = exact(a) + exact(b)
        variant.check(y, total, variant.unit * np.abs(total))


@pytest.mark.parametrize("variant", VARIANTS)
def test_nan_spoils_its_row_alone(variant):
    x = np.ones((4, 8), variant.compute)
    x[2, 3] = np.nan
    g, y, dx = np.ones(8, variant.real), np.zeros((4, 8), variant.compute), np.zeros((4, 8), variant.compute)
    given = {"x": x, **NORMS[0], "g": g, "b": g, "activation": "relu", "counters": counters_of(4)}
    variant.bind("normalise", y=y, **given)()
    variant.bind("grad_normalise", dy=np.ones_like(x), dx=dx, rule=UpdateRule("sgd"), **given)()
    for rows in (y, dx):
        np.testing.assert_array_equal(np.isnan(rows).any(axis=1), [False, False, True, False])
        assert np.isnan(rows[2]).all()


@pytest.mark.parametrize("variant", VARIANTS)
def test_what_is_dropped_may_be_nan(variant):
    keep = dropout_keep(0.5, 0, 1, 0, 4, 8)
    g, y, dx = np.ones(8, variant.real), np.zeros((4, 8), variant.compute), np.zeros((4, 8), variant.compute)
    dy = np.where(keep, 1.0, np.nan).astype(variant.compute)
    given = {"x": np.ones((4, 8), variant.compute), **NORMS[1], "g": g, "counters": counters_of(4)}
    given |= {"dropout": Dropout(0.5, 0, 1), **kept(variant, np.zeros((4, 8), np.bool_))}
    variant.bind("normalise", y=y, **given)()
    variant.bind("grad_normalise", dy=dy, dx=dx, rule=UpdateRule("sgd"), **given)()
    assert np.isfinite(dx).all() and np.array_equal(y > 0.0, keep)


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_learned_slope_is_refused(variant):
    matrices = {name: np.ones((1, 1), variant.compute) for name in "xy"}
    with pytest.raises(ArgumentError, match="activation: it takes no learned slope"):
        variant.bind("normalise", activation="prelu", **matrices)


def test_a_shard_has_its_rows_and_masks_of_the_batch():
    """Shards of 7 rows, the last of a batch of 18 not full: the bits of the whole batch."""
    x, counters = np.random.default_rng(0).standard_normal((18, 9)).astype(np.float32), counters_of(18)
    shared = {
        **NORMS[0],
        "g": np.ones(9, np.float32),
        "activation": "gelu",
        "dropout": Dropout(0.4, 1, 3),
        "counters": counters,
    }
    y, keep = np.empty_like(x), np.empty(x.shape, np.bool_)
    fusemlp_kernels.backend("numpy", None, "fp32").bind("normalise", x=x, y=y, keep=keep, **shared)()
    table, shards = CallTable(np.float32), []
    table.shards = 3
    table.fill(shard_rows=7)
    for table.shard in (0, 7, 14):
        arrays = {
            "x": np.zeros((7, 9), np.float32),
            "y": np.empty((7, 9), np.float32),
            "keep": np.empty((7, 9), np.bool_),
        }
        rows = x[table.shard :][:7]
        arrays["x"][: len(rows)] = rows
        ENTRIES["normalise"](table, table.operands("normalise", shared | arrays))
        shards.append((arrays, len(rows)))
    # beside a loss, whose program reads the number of rows from the counters
    table.names.add("SQUARES")
    table.bind(alone=True)()
    assert np.concatenate([arrays["y"][:count] for arrays, count in shards]).tobytes() == y.tobytes()
    assert np.concatenate([arrays["keep"][:count] for arrays, count in shards]).tobytes() == keep.tobytes()
