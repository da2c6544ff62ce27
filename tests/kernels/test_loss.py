"""The losses of every backend against the oracle, alone and after the output layer."""

from collections import namedtuple

import numpy as np
import pytest
import tolerance as tol
from calls import counters_of, padded_rows, run_loss, walked
from devices import VARIANT_PARAMETERS
from hypothesis import strategies as st
from memory import Values, exact, place, poisoned
from strategies import contract_test, placements, seeds, sizes, variants

from fusemlp_kernels import contract as c
from fusemlp_kernels import reference
from fusemlp_kernels.errors import ArgumentError
from fusemlp_kernels.registry import backend

SLOPE = {"leaky_relu": 0.1, "prelu": 0.25, "elu": 1.3}
SOURCE_ROWS = 29


LOSS = "variant spec m n short by_row weights class_weights activation layouts output_layout dz dslope loss_scale seed"


class LossCase(namedtuple("LossCase", LOSS)):
    """A loss over m rows and n columns; ``short`` rows are padding in a short batch."""

    @property
    def classes(self):
        return self.spec.kind == "cross_entropy" and not self.spec.soft

    @property
    def slope(self):
        return SLOPE.get(self.activation, 0.0)


@st.composite
def loss_cases(draw, device, widest=1 << 31):
    # Half of the cases go to the loss with the most options.
    kind = draw(st.one_of(st.just("cross_entropy"), st.sampled_from(c.LOSSES)))
    cross_entropy = kind == "cross_entropy"
    # Half of those use the default options, which have their own code path.
    weighted = not cross_entropy or draw(st.booleans())
    spec = c.LossSpec(
        kind,
        reduction=draw(st.sampled_from(("mean", "sum", "rows"))),
        label_smoothing=draw(st.sampled_from((0.0, 0.1, 0.7))) if cross_entropy else 0.0,
        ignore_index=draw(st.sampled_from((None, None, 0, 1, -100))) if cross_entropy and weighted else None,
        soft=cross_entropy and weighted and draw(st.booleans()),
        delta=draw(st.sampled_from((1.0, 0.25, 3.0))),
        quantile=draw(st.sampled_from((0.5, 0.1, 0.95))),
        accuracy=draw(st.booleans()),
    )
    wide = st.sampled_from([n for n in device.wide if n <= widest])
    layouts, output_layout = draw(placements(device, 3))
    return LossCase(
        variant=draw(variants(device)),
        spec=spec,
        m=draw(sizes(device)),
        n=draw(st.one_of(sizes(device, 1), wide)),
        short=draw(st.integers(0, 3)),
        by_row=draw(st.booleans()),
        weights=draw(st.sampled_from(("none", "none", "some", "sparse", "zero"))) if weighted else "none",
        class_weights=draw(st.sampled_from(("none", "some", "sparse"))) if cross_entropy and weighted else "none",
        activation="identity" if cross_entropy else draw(st.sampled_from(("identity", *c.ACTIVATIONS))),
        layouts=layouts,
        output_layout=output_layout,
        dz=draw(st.sampled_from(("apart", "apart", "in place", "none"))),
        dslope=draw(st.booleans()),
        # The scale is for 16-bit precisions, which NumPy does not have.
        loss_scale=None if device.on_host else draw(st.sampled_from((None, 0.5, 16.0))),
        seed=draw(seeds),
    )


def weights_of(kind, values, size):
    if kind == "none":
        return None
    weights = values.uniform(0.1, 2.0, size)
    if kind == "sparse":
        weights[values.rng.random(size) < 0.4] = 0.0
    return weights if kind != "zero" else np.zeros_like(weights)


def targets_of(case, values, rows):
    """Return labels, some of them ignored; probabilities; or valid values for the loss."""
    spec, n = case.spec, case.n
    if case.classes:
        labels = values.integers(n, rows)
        if spec.ignore_index is not None and spec.ignore_index < n:
            labels[values.rng.random(rows) < 0.3] = spec.ignore_index
        return labels
    if spec.kind == "cross_entropy":
        shares = values.uniform(0.0, 1.0, rows, n) + values.dtype(1e-3)
        return shares / shares.sum(axis=1, keepdims=True)
    if spec.kind == "binary_cross_entropy":
        return np.where(values.rng.random((rows, n)) < 0.7, values.integers(2, rows, n), 0.3).astype(values.dtype)
    if spec.kind == "poisson":
        return values.integers(5, rows, n).astype(values.dtype)
    return values.normal(rows, n)


class Loss:
    """The common operands of ``loss_grad`` and ``linear_loss_grad``, and the oracle's results for them."""

    def __init__(self, case, values, *, walks=True):
        self.case, self.values = case, values
        rows = SOURCE_ROWS if case.by_row else case.m
        self.target = place(targets_of(case, values, rows), case.layouts[1])
        weight = weights_of(case.weights, values, rows)
        self.weight = None if weight is None else place(weight, case.layouts[2])
        self.target_values, self.weight_values = np.array(self.target), None if weight is None else weight.copy()
        self.class_weight = weights_of(case.class_weights, values, case.n)
        self.rows = padded_rows(values.rng, case.m, case.m, rows)
        self.counters, self.stats = counters_of(), np.arange(float(c.STATS))
        self.dslope = poisoned(1, values.dtype) if case.activation == "prelu" and case.dslope else None
        self.operands = {
            "target": self.target,
            "weight": self.weight,
            "class_weight": self.class_weight,
            "counters": self.counters,
            "stats": self.stats,
            "loss": case.spec,
            "activation": case.activation,
            "slope": case.slope,
            "dslope": self.dslope,
        }
        self.scale = 1.0
        if case.loss_scale is not None:
            self.scale = case.loss_scale
            self.operands["hyper"] = np.ones(c.HYPER)
            self.operands["hyper"][c.LOSS_SCALE] = self.scale
        if case.activation == "prelu":
            self.operands["slope_param"] = np.full(1, case.slope, values.dtype)
        if case.by_row:
            operand, self.rows = walked(values, self.rows, self.counters) if walks else (self.rows, self.rows)
            self.operands["rows"] = operand

    def batch(self, count):
        """Prepare a batch of ``count`` rows and return its targets and weights, (count, ...)."""
        self.counters[c.ROW_COUNT] = count
        index = np.arange(count)
        if self.case.by_row:
            self.rows[:] = padded_rows(self.values.rng, count, self.case.m, SOURCE_ROWS)
            index = self.rows[:count]
        else:
            self._spoil_padding(count)
        self.stats[...] = np.arange(float(c.STATS))
        target = self.target[index] if self.case.classes else exact(self.target[index])
        return target, None if self.weight is None else exact(self.weight[index])

    def _spoil_padding(self, count):
        """Memory after the last row has no effect, whatever its values."""
        arrays = [] if self.case.classes else [(self.target, self.target_values)]
        arrays += [] if self.weight is None else [(self.weight, self.weight_values)]
        for array, values in arrays:
            writeable = array.flags.writeable
            array.flags.writeable = True
            array[...] = values
            array[count:] = np.nan
            array.flags.writeable = writeable

    def check(self, count, dz, z, target, weight, z_bound=0.0):
        """Compare the outputs of a run with the oracle; z (count, n) is exact or known within z_bound."""
        case, spec, variant = self.case, self.case.spec, self.case.variant
        u = variant.unit
        classes = exact(self.class_weight)
        slope = float(variant.real(case.slope)) if case.activation == "prelu" else case.slope
        loss, expected = reference.loss_grad(spec, z, target, weight, classes, case.activation, slope)
        limits = tol.loss_grad_bound(spec, z, target, weight, classes, case.activation, slope, z_bound=z_bound, u=u)
        tol.assert_within(self.stats[c.LAST_LOSS], loss, limits[0])
        if dz is not None:
            expected, limit = self.scale * expected, self.scale * limits[1]
            variant.check(dz[:count], expected, limit)
            np.testing.assert_array_equal(dz[count:], 0.0)
        y = reference.activation(case.activation, z, slope)
        y_bound = tol.activation_bound(case.activation, z, z_bound, slope, u) * np.ones_like(z)
        if self.dslope is not None and dz is not None:
            _, dy = reference.loss_of_output(spec, y, target, weight)
            _, dy_bound = tol.loss_grad_bound(spec, y, target, weight, z_bound=y_bound, u=u)
            limit = self.scale * tol.grad_slope_bound(dy, z, dy_bound, z_bound, u)
            tol.assert_within(self.dslope, self.scale * reference.grad_slope(dy, z), limit)
        self._check_sums(count, loss, limits[0], y, y_bound, target, weight)

    def _check_sums(self, count, loss, loss_bound, y, y_bound, target, weight):
        case, spec = self.case, self.case.spec
        before = np.arange(float(c.STATS))
        if spec.reduction == "sum":
            assert self.stats[c.LOSS_SUM] - before[c.LOSS_SUM] == pytest.approx(
                self.stats[c.LAST_LOSS], rel=1e-12, abs=1e-12
            )
        else:
            shares = np.ones(count) if weight is None else weight
            if case.classes:
                ones = np.ones(case.n) if self.class_weight is None else exact(self.class_weight)
                shares = shares * np.where(target == spec.ignore_index, 0.0, ones[np.maximum(target, 0)])
            elif spec.kind != "cross_entropy":
                shares = shares * case.n
            normaliser = shares.sum()
            norm_bound = tol.bound(count, normaliser, case.variant.unit, output=normaliser, ulps=1)
            tol.assert_within(self.stats[c.NORM_SUM] - before[c.NORM_SUM], normaliser, norm_bound + 1e-15)
            sum_bound = loss_bound * normaliser + (abs(loss) + loss_bound) * norm_bound + 1e-15
            tol.assert_within(self.stats[c.LOSS_SUM] - before[c.LOSS_SUM], loss * normaliser, sum_bound)
        correct, scored = self.stats[[c.CORRECT, c.SCORED]] - before[[c.CORRECT, c.SCORED]]
        if not spec.accuracy:
            assert correct == scored == 0
            return
        hits = reference.correct(spec, y, target)
        if spec.kind == "binary_cross_entropy":
            unsure = np.abs(y) <= y_bound
        else:
            runner_up = np.sort(y, axis=1)[:, -2:-1] if case.n > 1 else np.full((count, 1), -np.inf)
            unsure = y.max(axis=1, keepdims=True, initial=-np.inf) - runner_up <= 2.0 * y_bound.max(
                axis=1, keepdims=True, initial=0.0
            )
            unsure &= np.any(np.asarray(y_bound) > 1e-30, axis=1, keepdims=True)
        assert abs(correct - hits.sum()) <= unsure.sum()
        ignored = (target == spec.ignore_index).sum() if case.classes and spec.ignore_index is not None else 0
        assert scored == hits.size - ignored


@contract_test(case=loss_cases)
def test_loss_grad(case):
    variant, values = case.variant, Values(case.seed, case.variant)
    m, n = case.m, case.n
    loss = Loss(case, values)
    in_place = case.dz == "in place"
    z = place(np.zeros((m, n)), case.output_layout if in_place else case.layouts[0], variant.compute)
    dz = {"in place": z, "apart": poisoned((m, n), variant.compute, case.output_layout), "none": None}[case.dz]
    run = variant.bind("loss_grad", z=z, dz=dz, **loss.operands)
    for count in (max(m - case.short, 0), m, max(m - case.short, 0)):
        logits = values.factors(m, n, scale=2.0)
        # Values in the padding have no effect.
        logits[count:] = np.nan
        z.flags.writeable = True
        z[...] = logits
        z.flags.writeable = in_place or case.layouts[0] != "read-only"
        target, weight = loss.batch(count)
        run()
        loss.check(count, dz, exact(logits[:count]), target, weight)


@contract_test(
    case=lambda device: loss_cases(device, device.traits.widest_fused_output), k=sizes, by_x_row=st.booleans()
)
def test_linear_loss_grad(case, k, by_x_row):
    variant, values = case.variant, Values(case.seed, case.variant)
    m, n = case.m, case.n
    # without dz the number of rows is the length of x_rows
    walks = case.dz != "none"
    loss = Loss(case, values, walks=walks)
    x = place(values.factors(SOURCE_ROWS if by_x_row else m, k), case.layouts[0])
    w = place(values.factors(n, k, scale=2.0 / max(k, 1) ** 0.5), case.layouts[1])
    b = values.normal(n)
    dz = None if case.dz == "none" else poisoned((m, n), variant.compute, case.output_layout)
    operands = {"x": x, "w": w, "b": b, "dz": dz, **loss.operands}
    # If the output layer is the first, the rows of x are those of the targets.
    x_rows = loss.rows if case.by_row else padded_rows(values.rng, m, m, SOURCE_ROWS)
    if by_x_row:
        operands["x_rows"] = operands.get("rows")
        if not case.by_row:
            operands["x_rows"] = x_rows
        if not case.by_row and walks:
            operands["x_rows"], x_rows = walked(values, x_rows, loss.counters)
        if not variant.traits.gathers_in_load:
            operands["gathered"] = poisoned((m, k), variant.compute, case.output_layout)
    run = variant.bind("linear_loss_grad", **operands)
    for count in (max(m - case.short, 0), m, max(m - case.short, 0)):
        target, weight = loss.batch(count)
        if by_x_row and not case.by_row:
            x_rows[:] = padded_rows(values.rng, count, m, SOURCE_ROWS)
        run()
        batch = exact(x)[x_rows[:count]] if by_x_row else exact(x)[:count]
        z = reference.linear(batch, exact(w), exact(b))
        z_bound, _ = tol.linear_bound(batch, exact(w), exact(b), u=variant.unit, products=variant.products)
        loss.check(count, dz, z, target, weight, z_bound)


@pytest.mark.parametrize("class_weights", ["none", "some"])
@pytest.mark.parametrize("ignore_index", [None, 1])
@pytest.mark.parametrize("weights", ["none", "some"])
@pytest.mark.parametrize("variant", VARIANT_PARAMETERS)
def test_all_weights_of_a_cross_entropy_together(variant, weights, ignore_index, class_weights):
    spec = c.LossSpec("cross_entropy", label_smoothing=0.1, ignore_index=ignore_index, accuracy=True)
    case = LossCase(
        variant, spec, m=7, n=3, short=2, by_row=True, weights=weights, class_weights=class_weights,
        activation="identity", layouts=("plain",) * 3, output_layout="plain", dz="apart", dslope=False, loss_scale=None,
        seed=14,
    )  # fmt: skip
    test_loss_grad.of_case(case)
    test_linear_loss_grad.of_case(case, k=4, by_x_row=True)


@pytest.mark.parametrize("classes", [3, 2500])
@pytest.mark.parametrize("variant", VARIANT_PARAMETERS)
def test_the_first_of_equal_logits_is_the_answer(variant, classes):
    """Also for rows longer than a tile."""
    spec, labels = c.LossSpec("cross_entropy", accuracy=True), np.array([0, 0, classes - 1])
    _, _, stats = run_loss(variant, spec, np.zeros((3, classes)), labels)
    assert stats[c.CORRECT] == 2.0 and stats[c.SCORED] == 3.0


LABELS = np.array([0, 1, 2, 1])
ENTROPY = c.LossSpec("cross_entropy", label_smoothing=0.1)
IGNORING = c.LossSpec("cross_entropy", ignore_index=1, accuracy=True)
# Label smoothing gives every class a share; the normaliser is the weight of the labels alone.
WEIGHTLESS = {
    "labels without weight": (ENTROPY, 3, np.full(4, 2), {"class_weight": np.array([1.0, 2.0, 0.0])}),
    "ignored labels": (IGNORING, 3, np.full(4, 1), {}),
    "ignored labels of many classes": (IGNORING, 600, np.full(4, 1), {}),
    **{
        kind: (c.LossSpec(kind), 3, LABELS if kind == "cross_entropy" else np.ones((4, 3)), {"weight": np.zeros(4)})
        for kind in c.LOSSES
    },
}


@pytest.mark.parametrize(("spec", "classes", "target", "weights"), WEIGHTLESS.values(), ids=WEIGHTLESS)
@pytest.mark.parametrize("variant", VARIANT_PARAMETERS)
def test_a_batch_that_weighs_nothing_gives_zero(variant, spec, classes, target, weights):
    z = np.random.default_rng(5).standard_normal((4, classes))
    loss, dz, stats = run_loss(variant, spec, z, target, **weights)
    assert loss == 0.0 and not dz.any() and stats[c.LOSS_SUM] == stats[c.NORM_SUM] == 0.0
    assert spec is not IGNORING or not stats.any()


@pytest.mark.parametrize("options", [{}, {"label_smoothing": 0.1, "accuracy": True}, {"soft": True}])
@pytest.mark.parametrize("variant", VARIANT_PARAMETERS)
def test_cross_entropy_of_ten_thousand_classes(variant, options):
    values, spec = Values(6, variant), c.LossSpec("cross_entropy", **options)
    z = values.factors(3, 10_000, scale=3.0)
    target = values.integers(10_000, 3)
    if spec.soft:
        target = values.uniform(0.0, 1.0, 3, 10_000)
        target /= target.sum(axis=1, keepdims=True)
    loss, dz, _ = run_loss(variant, spec, z, target)
    given = exact(z), exact(target) if spec.soft else target
    expected_loss, expected = reference.loss_grad(spec, *given)
    limits = tol.loss_grad_bound(spec, *given, u=variant.unit)
    tol.assert_within(loss, expected_loss, limits[0])
    variant.check(dz, expected, limits[1])


@pytest.mark.parametrize("variant", VARIANT_PARAMETERS)
def test_cross_entropy_wants_logits(variant):
    with pytest.raises(ArgumentError, match=r"takes logits.*got 'relu'"):
        run_loss(variant, c.LossSpec("cross_entropy"), np.zeros((2, 3)), np.zeros(2, np.int64), activation="relu")


# NumPy's losses without a gradient are those with one, to the bit.
ROWS, VALID = 48, 41
# The widest rows change only at the class's element, and are processed in blocks for the cache.
WIDTHS = (1, 7, 80, 3000)
# differences between logits: none, usual ones, and those whose exponentials are subnormal or zero
SCALES = (0.0, 1.0, 25.0, 40.0, 250.0, 1000.0)


def statistics(spec, z, target, weight, class_weight, *, gradient):
    counters, stats = counters_of(VALID), np.zeros(c.STATS)
    z = z.copy()
    arrays = {"z": z, "dz": z if gradient else None, "target": target, "weight": weight, "class_weight": class_weight}
    numpy = backend("numpy", None, "fp64" if z.dtype == np.float64 else "fp32")
    numpy.bind("loss_grad", **arrays, counters=counters, stats=stats, loss=spec)()
    return stats.tobytes()


@pytest.mark.parametrize("real", [np.float32, np.float64])
@pytest.mark.parametrize("columns", WIDTHS)
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize(("kind", "soft"), [*((kind, False) for kind in c.LOSSES), ("cross_entropy", True)])
def test_the_gradient_is_all_that_is_left_out(kind, weighted, soft, columns, real):
    rng = np.random.default_rng(columns)
    classes = kind == "cross_entropy"
    spec = c.LossSpec(kind, accuracy=True, soft=soft)
    target = rng.uniform(0.0, 1.0, (ROWS, columns)).astype(real)
    if classes:
        target = target / target.sum(axis=1, keepdims=True) if soft else rng.integers(0, columns, ROWS)
    weight = rng.uniform(0.0, 2.0, ROWS).astype(real) if weighted else None
    class_weight = rng.uniform(0.0, 2.0, columns).astype(real) if weighted and classes else None
    for scale in SCALES:
        z = (scale * rng.standard_normal((ROWS, columns))).astype(real)
        z[5] = np.inf if scale == 1000.0 and weighted else z[5]
        arguments = spec, z, target, weight, class_weight
        assert statistics(*arguments, gradient=False) == statistics(*arguments, gradient=True)
