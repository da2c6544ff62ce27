"""Short ways to call a backend, for the tests that look at one fact."""

import numpy as np

from fusemlp_kernels.clock import hyper_at, rate_table
from fusemlp_kernels.contract import (
    BATCH_INDEX,
    BIAS_CORRECTION_1,
    BIAS_CORRECTION_2,
    COUNTERS,
    LAST_LOSS,
    LEARNING_RATE,
    RATE_COLUMNS,
    RATE_SCALE,
    ROW_COUNT,
    ROW_OFFSET,
    ROW_STEP,
    ROW_TOTAL,
    SHARE,
    STATS,
    UPDATE_COUNT,
    Segment,
    TensorRule,
    UpdateRule,
)
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


def kept(variant, keep):
    """The operand of backends that store dropout masks."""
    return {"keep": keep} if variant.traits.stores_masks else {}


def run_loss(variant, spec, z, target, **operands):
    """The loss and dz of one batch without padding, and the stats; z, target and weights in any type."""
    z = variant.rounded(z)
    arrays = {"target": target} | operands
    arrays = {name: a.astype(variant.real) if _is_real(a) else a for name, a in arrays.items() if a is not None}
    dz, counters, stats = np.full_like(z, np.nan), np.zeros(COUNTERS, np.int64), np.zeros(STATS)
    counters[ROW_COUNT] = len(z)
    variant.bind("loss_grad", z=z, dz=dz, loss=spec, counters=counters, stats=stats, **arrays)()
    return stats[LAST_LOSS], dz, stats


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
        self.rates = np.full((len(rates) + 3, RATE_COLUMNS), np.nan)
        self.rates[: len(rates) + 1] = rate_table(rule, rates, self.first)
        self.counters = np.zeros(COUNTERS, np.int64)
        self.counters[[BATCH_INDEX, UPDATE_COUNT]] = batch_index, update_count
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
        wanted = np.zeros(COUNTERS, np.int64)
        wanted[[BATCH_INDEX, UPDATE_COUNT]] = self.batch_index, self.update_count
        if self.walk is None:
            wanted[[ROW_OFFSET, ROW_COUNT]] = self.counters[[ROW_OFFSET, ROW_COUNT]]
        else:
            offset, total, step = self.walk
            offset = offset + step if offset + step < total else 0
            self.walk = offset, total, step
            wanted[[ROW_OFFSET, ROW_TOTAL, ROW_STEP]] = self.walk
            wanted[ROW_COUNT] = min(total - offset, step)
        np.testing.assert_array_equal(self.counters, wanted)
        # a device copies and multiplies: to the bit
        assert self.hyper[LEARNING_RATE] == self.rate
        assert self.hyper[RATE_SCALE] == self.rate_scale
        if self.rule.kind == "adam":
            t = self.first + self._row() + 1
            assert self.hyper[BIAS_CORRECTION_1] == 1.0 - self.rule.beta1**t
            assert self.hyper[BIAS_CORRECTION_2] == 1.0 - self.rule.beta2**t
        if self.rule.ema:
            ema = self.rule.ema
            assert self.hyper[SHARE] == (1.0 - ema) / (1.0 - ema ** (self.first + self._row() + 1))
        return updated


def state_arrays(rule, values, *shape):
    """A state in the middle of training: a velocity, or a first and a second moment; perhaps an average."""
    arrays = [values.normal(*shape) for _ in range(rule.state_count)]
    if rule.kind == "adam":
        arrays[1] = np.abs(arrays[1])
    return tuple(arrays)


RULES = {
    "sgd": UpdateRule("sgd"),
    "momentum": UpdateRule("sgd", momentum=0.9),
    "nesterov": UpdateRule("sgd", momentum=0.9, nesterov=True),
    "scikit-learn's": UpdateRule("sgd", momentum=0.9, convention="scikit-learn"),
    "adam": UpdateRule("adam"),
    "sgd, average": UpdateRule("sgd", ema=0.9),
    "adam, average": UpdateRule("adam", ema=0.9),
}


def update_arena(variant, rule, params, grads, rate=RATE):
    """One update of a single tensor whose state is zero."""
    states = tuple(np.zeros_like(params) for _ in range(rule.state_count))
    clock = Clock(rule, rates=[rate])
    segments = (Segment(0, params.size, TensorRule()),)
    operands = {"params": params, "grads": grads, "states": states, "segments": segments}
    variant.bind("update", **operands, **clock.operands)()
