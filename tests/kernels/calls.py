"""Short ways to call a backend, for the tests that look at one fact."""

import numpy as np
from memory import exact, place
from tolerance import assert_within, bound, grad_input_bound, grad_slope_bound, linear_bound

from fusemlp_kernels import contract as c
from fusemlp_kernels import reference
from fusemlp_kernels.clock import hyper_at, rate_table
from fusemlp_kernels.pointwise import ACTIVATIONS

# The learning rate where a test does not care.
RATE = 0.1
# Activations whose slope is given.
SLOPED = {name for name, row in ACTIVATIONS.items() if row.slope is not None and not row.learned}


def slope_operands(activation, slope, dtype):
    if activation == "prelu":
        return {"slope_param": np.full(1, slope, dtype)}
    return {"slope": slope} if activation in SLOPED else {}


def gathering(variant, rows, **workspace):
    """The operand ``rows`` and, for backends that do not gather in the load, where they gather to."""
    return {"rows": rows} | ({} if variant.traits.gathers_in_load else workspace)


def walked(values, rows, counters):
    """Return the operand for ``rows`` (M,), and ``rows`` as a view of it; other batches may surround it."""
    operand = np.zeros(3 * len(rows), np.int64)
    counters[c.ROW_OFFSET] = offset = int(values.rng.integers(0, 2 * len(rows) + 1))
    operand[offset : offset + len(rows)] = rows
    return operand, operand[offset : offset + len(rows)]


def picked_input(values, rows, count, k, layout, counters):
    """Return x (count, k), from which ``rows`` (M,) pick, as operands; and the batch, zeros where a row is -1.

    The batch is what ``linear`` leaves on backends that do not gather in the load.
    """
    x = place(values.factors(count, k), layout)
    batch = np.where(rows[:, None] >= 0, x[np.maximum(rows, 0)], 0).astype(x.dtype)
    operand, _ = walked(values, rows, counters)
    return {"x": x} | gathering(values.variant, operand, gathered=batch), batch


def padded_rows(rng, count, size, n):
    """Return row indices into ``n`` rows: ``count`` of them, then -1 up to ``size``."""
    rows = np.full(size, -1, np.int64)
    rows[:count] = rng.integers(0, n, count)
    return rows


def check_linear(variant, y, x, w, b, activation="identity", slope=0.0, keep=None, rate=0.0, z=None):
    """Compare the outputs of ``linear`` with the oracle's."""
    given = exact(x), exact(w), exact(b)
    z_bound, y_bound = linear_bound(*given, activation, slope, keep, rate, variant.unit, variant.products)
    variant.check(y, reference.dropout(reference.linear(*given, activation, slope), keep, rate), y_bound)
    if z is not None:
        variant.check(z, reference.linear(*given), z_bound)


def check_grad_input(variant, dz_prev, dz, w, z, activation, slope=0.0, keep=None, rate=0.0, dslope=None):
    """Compare the outputs of ``grad_input`` with the oracle's."""
    options, u, products = (activation, slope, keep, rate), variant.unit, variant.products
    dz, w, z = exact(dz), exact(w), exact(z)
    limit = grad_input_bound(dz, w, z, *options, u, products)
    variant.check(dz_prev, reference.grad_input(dz, w, z, *options), limit)
    if dslope is not None:
        dy = reference.output_grad(dz, w, keep, rate)
        magnitude = reference.output_grad(np.abs(dz), np.abs(w), keep, rate)
        dy_bound = bound(dz.shape[1], magnitude, u, products=products)
        assert_within(dslope, reference.grad_slope(dy, z), grad_slope_bound(dy, z, dy_bound, u=u))


def check_grad_weight(variant, dz, x, dw, db=None, batches=1):
    """Compare the sums over ``batches`` equal batches with the oracle's."""
    rows = len(dz) * batches
    expected, magnitudes = (reference.grad_weight(of(exact(dz)), of(exact(x))) for of in (np.array, np.abs))
    for result, each, magnitude in zip((dw, db), expected, magnitudes, strict=True):
        if result is not None:
            limit = bound(
                rows, batches * magnitude, variant.unit, output=batches * each,
                ulps=batches if batches > 1 else 0,
                products=variant.products,
            )  # fmt: skip
            assert_within(result, batches * each, limit)


def counters_of(rows=0, batch_index=0):
    """Return the counters before a batch of this many rows."""
    counters = np.zeros(c.COUNTERS, np.int64)
    counters[[c.ROW_COUNT, c.BATCH_INDEX]] = rows, batch_index
    return counters


def kept(variant, keep):
    """The operand of backends that store dropout masks."""
    return {"keep": keep} if variant.traits.stores_masks else {}


def run_loss(variant, spec, z, target, **operands):
    """The loss and dz of one batch without padding, and the stats; z, target and weights in any type."""
    z = variant.rounded(z)
    arrays = {"target": target} | operands
    arrays = {name: a.astype(variant.real) if _is_real(a) else a for name, a in arrays.items() if a is not None}
    dz, counters, stats = np.full_like(z, np.nan), np.zeros(c.COUNTERS, np.int64), np.zeros(c.STATS)
    counters[c.ROW_COUNT] = len(z)
    variant.bind("loss_grad", z=z, dz=dz, loss=spec, counters=counters, stats=stats, **arrays)()
    return stats[c.LAST_LOSS], dz, stats


def _is_real(operand):
    return isinstance(operand, np.ndarray) and operand.dtype.kind == "f"


class Clock:
    """hyper, rates and counters, and what they have to be after some batches.

    ``rates`` are the learning rates of the updates from ``first`` on, by default from the next one on.
    """

    def __init__(self, rule, batch_index=0, update_count=0, rate_scale=1.0, rates=(RATE,) * 8, first=None):
        self.rule, self.batch_index, self.update_count, self.rate_scale = rule, batch_index, update_count, rate_scale
        self.first, self.filled = update_count if first is None else first, rates
        # behind the rows that are filled there may be anything
        self.rates = np.full((len(rates) + 3, c.RATE_COLUMNS), np.nan)
        self.rates[: len(rates) + 1] = rate_table(rule, rates, self.first)
        self.counters = np.zeros(c.COUNTERS, np.int64)
        self.counters[[c.BATCH_INDEX, c.UPDATE_COUNT]] = batch_index, update_count
        # (rows in front of the batch, rows of an epoch, rows of a batch): where the clock walks over an epoch's rows
        self.walk = None
        self.hyper = hyper_at(rule, rates[self._row()], self.first + self._row(), rate_scale)

    @property
    def operands(self):
        return {"rule": self.rule, "hyper": self.hyper, "rates": self.rates, "counters": self.counters}

    def _row(self):
        return min(self.update_count - self.first, len(self.filled) - 1)

    @property
    def rate(self):
        return self.filled[self._row()] * self.rate_scale

    def check_after_a_batch(self):
        """The clock went on by one batch; returns whether by an update too."""
        self.batch_index += 1
        updated = self.batch_index % self.rule.accumulate == 0
        self.update_count += updated
        wanted = np.zeros(c.COUNTERS, np.int64)
        wanted[[c.BATCH_INDEX, c.UPDATE_COUNT]] = self.batch_index, self.update_count
        if self.walk is None:
            wanted[[c.ROW_OFFSET, c.ROW_COUNT]] = self.counters[[c.ROW_OFFSET, c.ROW_COUNT]]
        else:
            offset, total, step = self.walk
            offset = offset + step if offset + step < total else 0
            self.walk = offset, total, step
            wanted[[c.ROW_OFFSET, c.ROW_TOTAL, c.ROW_STEP]] = self.walk
            wanted[c.ROW_COUNT] = min(total - offset, step)
        np.testing.assert_array_equal(self.counters, wanted)
        # a device copies and multiplies: to the bit
        assert self.hyper[c.LEARNING_RATE] == self.rate
        assert self.hyper[c.RATE_SCALE] == self.rate_scale
        if self.rule.kind == "adam":
            t = self.first + self._row() + 1
            assert self.hyper[c.BIAS_CORRECTION_1] == 1.0 - self.rule.beta1**t
            assert self.hyper[c.BIAS_CORRECTION_2] == 1.0 - self.rule.beta2**t
        if self.rule.ema:
            ema = self.rule.ema
            assert self.hyper[c.SHARE] == (1.0 - ema) / (1.0 - ema ** (self.first + self._row() + 1))
        return updated


def state_arrays(rule, values, *shape):
    """A state in the middle of training: a velocity, or a first and a second moment; perhaps an average."""
    arrays = [values.normal(*shape) for _ in range(rule.state_count)]
    if rule.kind == "adam":
        arrays[1] = np.abs(arrays[1])
    return tuple(arrays)


RULES = {
    "sgd": c.UpdateRule("sgd"),
    "momentum": c.UpdateRule("sgd", momentum=0.9),
    "nesterov": c.UpdateRule("sgd", momentum=0.9, nesterov=True),
    "scikit-learn's": c.UpdateRule("sgd", momentum=0.9, convention="scikit-learn"),
    "adam": c.UpdateRule("adam"),
    "sgd, average": c.UpdateRule("sgd", ema=0.9),
    "adam, average": c.UpdateRule("adam", ema=0.9),
}


def update_arena(variant, rule, params, grads, rate=RATE):
    """One update of a single tensor whose state is zero."""
    states = tuple(np.zeros_like(params) for _ in range(rule.state_count))
    clock = Clock(rule, rates=[rate])
    segments = (c.Segment(0, params.size, c.TensorRule()),)
    operands = {"params": params, "grads": grads, "states": states, "segments": segments}
    variant.bind("update", **operands, **clock.operands)()
