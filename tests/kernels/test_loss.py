"""The losses of every backend against the oracle, alone and after the output layer."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
from calls import gathering, run_loss
from devices import VARIANT_PARAMETERS, Variant
from hypothesis import strategies as st
from memory import place, poisoned
from strategies import Values, contract_test, exact, padded_rows, placements, seeds, sizes, variants, walked
from tolerance import (
    activation_bound,
    assert_within,
    bound,
    grad_slope_bound,
    linear_bound,
    loss_grad_bound,
)

from fusemlp_kernels import reference
from fusemlp_kernels.contract import (
    ACTIVATIONS,
    CORRECT,
    COUNTERS,
    HYPER,
    LAST_LOSS,
    LOSS_SCALE,
    LOSS_SUM,
    LOSSES,
    NORM_SUM,
    ROW_COUNT,
    SCORED,
    STATS,
    LossSpec,
)
from fusemlp_kernels.errors import ArgumentError

SLOPE = {"leaky_relu": 0.1, "prelu": 0.25, "elu": 1.3}
SOURCE_ROWS = 29


@dataclass(frozen=True)
class LossCase:
    """A loss over m rows and n columns; ``short`` rows are padding in a short batch."""

    variant: Variant
    spec: LossSpec
    m: int
    n: int
    short: int
    by_row: bool
    weights: str
    class_weights: str
    activation: str
    layouts: tuple[str, ...]
    output_layout: str
    dz: str
    dslope: bool
    loss_scale: float | None
    seed: int

    @property
    def classes(self):
        return self.spec.kind == "cross_entropy" and not self.spec.soft

    @property
    def slope(self):
        return SLOPE.get(self.activation, 0.0)


@st.composite
def loss_cases(draw, device, widest=1 << 31):
    # Half of the cases go to the loss with the most options.
    kind = draw(st.one_of(st.just("cross_entropy"), st.sampled_from(LOSSES)))
    cross_entropy = kind == "cross_entropy"
    # Half of those use the default options, which have their own code path.
    weighted = not cross_entropy or draw(st.booleans())
    spec = LossSpec(
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
        activation="identity" if cross_entropy else draw(st.sampled_from(("identity", *ACTIVATIONS))),
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
        self.counters, self.stats = np.zeros(COUNTERS, np.int64), np.arange(float(STATS))
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
            self.operands["hyper"] = np.ones(HYPER)
            self.operands["hyper"][LOSS_SCALE] = self.scale
        if case.activation == "prelu":
            self.operands["slope_param"] = np.full(1, case.slope, values.dtype)
        if case.by_row:
            shape = (case.m,) if case.classes else (case.m, case.n)
            operand, self.rows = walked(values, self.rows, self.counters) if walks else (self.rows, self.rows)
            self.operands |= gathering(
                case.variant,
                operand,
                target_rows=place(np.zeros(shape, self.target.dtype), case.output_layout),
                weight_rows=poisoned(case.m, values.dtype),
            )

    def batch(self, count):
        """Prepare a batch of ``count`` rows and return its targets and weights, (count, ...)."""
        self.counters[ROW_COUNT] = count
        index = np.arange(count)
        if self.case.by_row:
            self.rows[:] = padded_rows(self.values.rng, count, self.case.m, SOURCE_ROWS)
            index = self.rows[:count]
        else:
            self._spoil_padding(count)
        self.stats[...] = np.arange(float(STATS))
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
        limits = loss_grad_bound(spec, z, target, weight, classes, case.activation, slope, z_bound=z_bound, u=u)
        assert_within(self.stats[LAST_LOSS], loss, limits[0])
        if dz is not None:
            expected, limit = self.scale * expected, self.scale * limits[1]
            assert_within(dz[:count], expected, variant.result_bound(limit, expected))
            np.testing.assert_array_equal(dz[count:], 0.0)
        y = reference.activation(case.activation, z, slope)
        y_bound = activation_bound(case.activation, z, z_bound, slope, u) * np.ones_like(z)
        if self.dslope is not None and dz is not None:
            _, dy = reference.loss_of_output(spec, y, target, weight)
            _, dy_bound = loss_grad_bound(spec, y, target, weight, z_bound=y_bound, u=u)
            limit = self.scale * grad_slope_bound(dy, z, dy_bound, z_bound, u)
            assert_within(self.dslope, self.scale * reference.grad_slope(dy, z), limit)
        self._check_sums(count, loss, limits[0], y, y_bound, target, weight)

    def _check_sums(self, count, loss, loss_bound, y, y_bound, target, weight):
        case, spec = self.case, self.case.spec
        before = np.arange(float(STATS))
        if spec.reduction == "sum":
            assert self.stats[LOSS_SUM] - before[LOSS_SUM] == pytest.approx(self.stats[LAST_LOSS], rel=1e-12, abs=1e-12)
        else:
            shares = np.ones(count) if weight is None else weight
            if case.classes:
                ones = np.ones(case.n) if self.class_weight is None else exact(self.class_weight)
                shares = shares * np.where(target == spec.ignore_index, 0.0, ones[np.maximum(target, 0)])
            elif spec.kind != "cross_entropy":
                shares = shares * case.n
            normaliser = shares.sum()
            norm_bound = bound(count, normaliser, case.variant.unit, output=normaliser, ulps=1)
            assert_within(self.stats[NORM_SUM] - before[NORM_SUM], normaliser, norm_bound + 1e-15)
            sum_bound = loss_bound * normaliser + (abs(loss) + loss_bound) * norm_bound + 1e-15
            assert_within(self.stats[LOSS_SUM] - before[LOSS_SUM], loss * normaliser, sum_bound)
        correct, scored = self.stats[[CORRECT, SCORED]] - before[[CORRECT, SCORED]]
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
        z_bound, _ = linear_bound(batch, exact(w), exact(b), u=variant.unit, products=variant.products)
        loss.check(count, dz, z, target, weight, z_bound)


@pytest.mark.parametrize("class_weights", ["none", "some"])
@pytest.mark.parametrize("ignore_index", [None, 1])
@pytest.mark.parametrize("weights", ["none", "some"])
@pytest.mark.parametrize("variant", VARIANT_PARAMETERS)
def test_all_weights_of_a_cross_entropy_together(variant, weights, ignore_index, class_weights):
    spec = LossSpec("cross_entropy", label_smoothing=0.1, ignore_index=ignore_index, accuracy=True)
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
    spec, labels = LossSpec("cross_entropy", accuracy=True), np.array([0, 0, classes - 1])
    _, _, stats = run_loss(variant, spec, np.zeros((3, classes)), labels)
    assert stats[CORRECT] == 2.0 and stats[SCORED] == 3.0


LABELS = np.array([0, 1, 2, 1])
ENTROPY = LossSpec("cross_entropy", label_smoothing=0.1)
IGNORING = LossSpec("cross_entropy", ignore_index=1, accuracy=True)
# Label smoothing gives every class a share; the normaliser is the weight of the labels alone.
WEIGHTLESS = {
    "labels without weight": (ENTROPY, 3, np.full(4, 2), {"class_weight": np.array([1.0, 2.0, 0.0])}),
    "ignored labels": (IGNORING, 3, np.full(4, 1), {}),
    "ignored labels of many classes": (IGNORING, 600, np.full(4, 1), {}),
    **{
        kind: (LossSpec(kind), 3, LABELS if kind == "cross_entropy" else np.ones((4, 3)), {"weight": np.zeros(4)})
        for kind in LOSSES
    },
}


@pytest.mark.parametrize(("spec", "classes", "target", "weights"), WEIGHTLESS.values(), ids=WEIGHTLESS)
@pytest.mark.parametrize("variant", VARIANT_PARAMETERS)
def test_a_batch_that_weighs_nothing_gives_zero(variant, spec, classes, target, weights):
    z = np.random.default_rng(5).standard_normal((4, classes))
    loss, dz, stats = run_loss(variant, spec, z, target, **weights)
    assert loss == 0.0 and not dz.any() and stats[LOSS_SUM] == stats[NORM_SUM] == 0.0
    assert spec is not IGNORING or not stats.any()


@pytest.mark.parametrize("options", [{}, {"label_smoothing": 0.1, "accuracy": True}, {"soft": True}])
@pytest.mark.parametrize("variant", VARIANT_PARAMETERS)
def test_cross_entropy_of_ten_thousand_classes(variant, options):
    values, spec = Values(6, variant), LossSpec("cross_entropy", **options)
    z = values.factors(3, 10_000, scale=3.0)
    target = values.integers(10_000, 3)
    if spec.soft:
        target = values.uniform(0.0, 1.0, 3, 10_000)
        target /= target.sum(axis=1, keepdims=True)
    loss, dz, _ = run_loss(variant, spec, z, target)
    given = exact(z), exact(target) if spec.soft else target
    expected_loss, expected = reference.loss_grad(spec, *given)
    limits = loss_grad_bound(spec, *given, u=variant.unit)
    assert_within(loss, expected_loss, limits[0])
    assert_within(dz, expected, variant.result_bound(limits[1], expected))


@pytest.mark.parametrize("variant", VARIANT_PARAMETERS)
def test_cross_entropy_wants_logits(variant):
    with pytest.raises(ArgumentError, match=r"takes logits.*got 'relu'"):
        run_loss(variant, LossSpec("cross_entropy"), np.zeros((2, 3)), np.zeros(2, np.int64), activation="relu")
