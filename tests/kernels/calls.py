"""Short ways to call a backend, for the tests that look at one fact."""

from __future__ import annotations

import numpy as np

import fusemlp_kernels
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
    STATS,
    UPDATE_COUNT,
    ScheduleSpec,
    Segment,
    TensorRule,
    UpdateRule,
)


def bind(precision, op, **operands):
    return fusemlp_kernels.backend("numpy", None, precision).bind(op, **operands)


def slope_operands(activation, slope, dtype):
    if activation == "prelu":
        return {"slope_param": np.full(1, slope, dtype)}
    return {"slope": slope} if activation == "leaky_relu" else {}


def run_loss(spec, z, target, precision="fp64", **operands):
    """The loss and dz of one batch without padding, and the stats."""
    dz, counters, stats = np.full_like(z, np.nan), np.zeros(COUNTERS, np.int64), np.zeros(STATS)
    counters[ROW_COUNT] = len(z)
    bind(precision, "loss_grad", z=z, dz=dz, target=target, loss=spec, counters=counters, stats=stats, **operands)()
    return stats[LAST_LOSS], dz, stats


class Clock:
    """hyper and counters, and what they have to be after some batches."""

    def __init__(self, rule, batch_index, update_count, rate_scale):
        self.rule, self.batch_index, self.update_count, self.rate_scale = rule, batch_index, update_count, rate_scale
        self.counters = np.zeros(COUNTERS, np.int64)
        self.counters[[BATCH_INDEX, UPDATE_COUNT]] = batch_index, update_count
        self.hyper = hyper_at(rule, update_count, rate_scale)

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
        np.testing.assert_array_equal(self.counters, wanted)
        assert self.hyper[LEARNING_RATE] == self.rate and self.hyper[RATE_SCALE] == self.rate_scale
        if self.rule.kind == "adam":
            t = self.update_count + 1
            assert self.hyper[BIAS_CORRECTION_1] == 1.0 - self.rule.beta1**t
            assert self.hyper[BIAS_CORRECTION_2] == 1.0 - self.rule.beta2**t
        return updated


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


def update_arena(rule, params, grads):
    """One update of a single tensor whose state is zero."""
    states = tuple(np.zeros_like(params) for _ in range(rule.state_count))
    clock = Clock(rule, 0, 0, 1.0)
    segments = (Segment(0, params.size, TensorRule()),)
    operands = {"params": params, "grads": grads, "states": states, "segments": segments}
    bind("fp32", "update", **operands, rule=rule, hyper=clock.hyper, counters=clock.counters)()
