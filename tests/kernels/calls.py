"""Short ways to call a backend, for the tests that look at one fact."""

from __future__ import annotations

import numpy as np

from fusemlp_kernels import reference
from fusemlp_kernels.clock import hyper_at
from fusemlp_kernels.contract import (
    BATCH_INDEX,
    BIAS_CORRECTION_1,
    BIAS_CORRECTION_2,
    COUNTERS,
    LAST_LOSS,
    LEARNING_RATE,
    RATE_SCALE,
    ROW_COUNT,
    ROW_OFFSET,
    ROW_STEP,
    ROW_TOTAL,
    STATS,
    UPDATE_COUNT,
    ScheduleSpec,
    Segment,
    TensorRule,
    UpdateRule,
)

# A device computes the schedule in float64 too, but with its own exp2, log2 and cos. The relative error of 2**e is that
# of the function, a few ulps of 2**-52, and that of the exponent: |e| times as many, and |e| < 1075 where the power is
# not zero. 1 - beta**t takes the power's error over its own size, which is 1e-3 and more. Half a cosine wave ends where
# 1 + cos cancels: what remains is an ulp of the cosine, times the amplitude.
DEVICE_CLOCK = 1e-12
DEVICE_COSINE = 2.0**-52


def slope_operands(activation, slope, dtype):
    if activation == "prelu":
        return {"slope_param": np.full(1, slope, dtype)}
    return {"slope": slope} if activation == "leaky_relu" else {}


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
    """hyper and counters, and what they have to be after some batches."""

    def __init__(self, variant, rule, batch_index, update_count, rate_scale):
        self.rule, self.batch_index, self.update_count, self.rate_scale = rule, batch_index, update_count, rate_scale
        self.accuracy = 0.0 if variant.device.on_host else DEVICE_CLOCK
        self.counters = np.zeros(COUNTERS, np.int64)
        self.counters[[BATCH_INDEX, UPDATE_COUNT]] = batch_index, update_count
        # (rows in front of the batch, rows of an epoch, rows of a batch): where the clock walks over an epoch's rows
        self.walk = None
        self.hyper = hyper_at(rule, update_count, rate_scale)

    @property
    def operands(self):
        return {"rule": self.rule, "hyper": self.hyper, "counters": self.counters}

    @property
    def rate(self):
        return reference.learning_rate(self.rule.schedule, self.update_count) * self.rate_scale

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
        amplitude = self.rule.schedule.base * self.rate_scale
        self._check(LEARNING_RATE, self.rate, DEVICE_COSINE * amplitude if self.accuracy else 0.0)
        assert self.hyper[RATE_SCALE] == self.rate_scale
        if self.rule.kind == "adam":
            t = self.update_count + 1
            self._check(BIAS_CORRECTION_1, 1.0 - self.rule.beta1**t)
            self._check(BIAS_CORRECTION_2, 1.0 - self.rule.beta2**t)
        return updated

    def _check(self, index, wanted, allowed=0.0):
        error = abs(self.hyper[index] - wanted)
        assert error <= self.accuracy * abs(wanted) + allowed, (index, self.hyper[index], wanted)


def state_arrays(rule, values, *shape):
    """A state in the middle of training: a velocity, or a first and a second moment."""
    arrays = [values.normal(*shape) for _ in range(rule.state_count)]
    if rule.kind == "adam":
        arrays[1] = np.abs(arrays[1])
    return tuple(arrays)


CONSTANT = ScheduleSpec("constant", 0.1)
RULES = {
    "sgd": UpdateRule("sgd", CONSTANT),
    "momentum": UpdateRule("sgd", CONSTANT, momentum=0.9),
    "nesterov": UpdateRule("sgd", CONSTANT, momentum=0.9, nesterov=True),
    "scikit-learn's": UpdateRule("sgd", CONSTANT, momentum=0.9, convention="scikit-learn"),
    "adam": UpdateRule("adam", CONSTANT),
}


def update_arena(variant, rule, params, grads):
    """One update of a single tensor whose state is zero."""
    states = tuple(np.zeros_like(params) for _ in range(rule.state_count))
    clock = Clock(variant, rule, 0, 0, 1.0)
    segments = (Segment(0, params.size, TensorRule()),)
    operands = {"params": params, "grads": grads, "states": states, "segments": segments}
    variant.bind("update", **operands, **clock.operands)()
