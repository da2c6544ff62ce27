"""Who comes last, and what the last one does: fixed-order sums, and the clock of the training step.

Programs of a launch finish in any order. Each takes a ticket when its results are stored; the one that takes the last
ticket sees the results of all others. So a sum over programs is taken in a fixed order, without float atomics, and the
counters and the learning rate change when nobody reads them any more.
"""

from __future__ import annotations

import math

import triton
import triton.language as tl

from fusemlp_kernels import contract
from fusemlp_kernels.contract import SCHEDULES, UpdateRule

# counters and hyper, by their places in the contract
BATCH_INDEX: tl.constexpr = tl.constexpr(contract.BATCH_INDEX)
UPDATE_COUNT: tl.constexpr = tl.constexpr(contract.UPDATE_COUNT)
ROW_COUNT: tl.constexpr = tl.constexpr(contract.ROW_COUNT)
ROW_OFFSET: tl.constexpr = tl.constexpr(contract.ROW_OFFSET)
ROW_TOTAL: tl.constexpr = tl.constexpr(contract.ROW_TOTAL)
ROW_STEP: tl.constexpr = tl.constexpr(contract.ROW_STEP)
SKIPPED: tl.constexpr = tl.constexpr(contract.SKIPPED)
SKIPPED_IN_A_ROW: tl.constexpr = tl.constexpr(contract.SKIPPED_IN_A_ROW)
LEARNING_RATE: tl.constexpr = tl.constexpr(contract.LEARNING_RATE)
BIAS_CORRECTION_1: tl.constexpr = tl.constexpr(contract.BIAS_CORRECTION_1)
BIAS_CORRECTION_2: tl.constexpr = tl.constexpr(contract.BIAS_CORRECTION_2)
RATE_SCALE: tl.constexpr = tl.constexpr(contract.RATE_SCALE)
LOSS_SCALE: tl.constexpr = tl.constexpr(contract.LOSS_SCALE)
GOOD_UPDATES: tl.constexpr = tl.constexpr(contract.GOOD_UPDATES)
GROWTH_INTERVAL: tl.constexpr = tl.constexpr(contract.GROWTH_INTERVAL)

# An optimizer's rule on the device: float64, read at these places.
RULE_FIELDS = (
    "schedule", "base", "steps", "gamma", "final", "peak_fraction", "warmup",
    "adam", "momentum", "nesterov", "beta1", "beta2", "eps", "decoupled", "inside", "clip_norm", "accumulate", "scaled",
)  # fmt: skip
(
    SCHEDULE, BASE, STEPS, GAMMA, FINAL, PEAK_FRACTION, WARMUP,
    ADAM, MOMENTUM, NESTEROV, BETA1, BETA2, EPS, DECOUPLED, INSIDE, CLIP_NORM, ACCUMULATE, SCALED,
) = (tl.constexpr(place) for place in range(len(RULE_FIELDS)))  # fmt: skip
STEP: tl.constexpr = tl.constexpr(SCHEDULES.index("step"))
EXPONENTIAL: tl.constexpr = tl.constexpr(SCHEDULES.index("exponential"))
COSINE: tl.constexpr = tl.constexpr(SCHEDULES.index("cosine"))
ONE_CYCLE: tl.constexpr = tl.constexpr(SCHEDULES.index("one_cycle"))
PI: tl.constexpr = tl.constexpr(math.pi)


def rule_values(rule: UpdateRule, *, scaled: bool = False) -> list[float]:
    """``RULE_FIELDS`` of a rule; ``scaled``: the gradients carry the loss scale."""
    s = rule.schedule
    return [
        float(SCHEDULES.index(s.kind)), s.base, float(s.steps), s.gamma, s.final, s.peak_fraction, float(s.warmup),
        float(rule.kind == "adam"), rule.momentum, float(rule.nesterov), rule.beta1, rule.beta2, rule.eps,
        float(rule.decoupled), float(rule.convention == "scikit-learn"),
        math.inf if rule.clip_norm is None else rule.clip_norm, float(rule.accumulate), float(scaled),
    ]  # fmt: skip


@triton.jit
def is_last(ticket, programs):
    """Whether this program is the last of the launch to come here. What the others stored before is then visible.

    The barrier orders the stores of this program's threads before the ticket; the ticket is ready for the next launch.
    """
    tl.debug_barrier()
    taken = tl.atomic_add(ticket, 1, sem="acq_rel", scope="gpu")
    last = taken == programs - 1
    if last:
        tl.store(ticket, 0)
    return last


@triton.jit
def sum_of(partials, count, stride, BLOCK: tl.constexpr):
    """The sum of ``count`` float64 partial results, in an order that depends on nothing else."""
    at = tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float64)
    for start in range(0, count, BLOCK):
        # other programs wrote these during this launch: read them from the L2 cache
        total += tl.load(partials + (start + at) * stride, mask=start + at < count, other=0.0, cache_modifier=".cg")
    return tl.sum(total, axis=0)


@triton.jit
def power(base, exponent):
    """base ** exponent in float64, base > 0, relative error a few ulps of the exponent of two."""
    return tl.exp2(exponent * tl.log2(base))


@triton.jit
def half_cosine(start, end, done):
    """``reference._anneal``: cos(pi done) is the sine of pi (1/2 - done), a Taylor polynomial that is exact to float64
    between -pi/2 and pi/2."""
    r = PI * (0.5 - done)
    s = r * r
    p = 1.0 - s / 420.0
    p = 1.0 - s / 342.0 * p
    p = 1.0 - s / 272.0 * p
    p = 1.0 - s / 210.0 * p
    p = 1.0 - s / 156.0 * p
    p = 1.0 - s / 110.0 * p
    p = 1.0 - s / 72.0 * p
    p = 1.0 - s / 42.0 * p
    p = 1.0 - s / 20.0 * p
    p = 1.0 - s / 6.0 * p
    return tl.where(done < 1.0, end + (start - end) * (1.0 + r * p) / 2.0, end)


@triton.jit
def scheduled_rate(rule, update_count):
    """``reference.learning_rate`` after ``update_count`` updates, float64."""
    kind = tl.load(rule + SCHEDULE).to(tl.int32)
    base = tl.load(rule + BASE)
    steps = tl.load(rule + STEPS)
    gamma = tl.load(rule + GAMMA)
    final = tl.load(rule + FINAL)
    warmup = tl.load(rule + WARMUP)
    count = update_count.to(tl.float64)
    warm = tl.where(count < warmup, (count + 1.0) / tl.where(warmup > 0, warmup, 1.0), 1.0)
    t = tl.where(count < warmup, 0.0, count - warmup)
    rate = base
    if kind == STEP:
        rate = base * power(gamma, (t.to(tl.int64) // steps.to(tl.int64)).to(tl.float64))
    if kind == EXPONENTIAL:
        rate = base * power(gamma, t)
    if kind == COSINE:
        rate = half_cosine(base, final, tl.minimum(t / steps, 1.0))
    if kind == ONE_CYCLE:
        last = steps - 1.0
        peak = tl.load(rule + PEAK_FRACTION) * steps - 1.0
        rising = (t <= peak) & (peak > 0)
        falling = tl.where(t < last, tl.minimum((t - peak) / tl.where(t < last, last - peak, 1.0), 1.0), 1.0)
        done = tl.where(rising, t / tl.where(peak > 0, peak, 1.0), falling)
        rate = half_cosine(tl.where(rising, base / 25.0, base), tl.where(rising, base, final), done)
    return warm * rate


@triton.jit
def advance_clock(counters, hyper, rule, applied, skipped):
    """One batch is over: ``applied``: with an update; ``skipped``: its gradients had overflowed. By one program."""
    tl.store(counters + BATCH_INDEX, tl.load(counters + BATCH_INDEX) + 1)
    step = tl.load(counters + ROW_STEP)
    if step != 0:
        total = tl.load(counters + ROW_TOTAL)
        offset = tl.load(counters + ROW_OFFSET) + step
        offset = tl.where(offset >= total, 0, offset)
        tl.store(counters + ROW_OFFSET, offset)
        tl.store(counters + ROW_COUNT, tl.minimum(step, total - offset))
    scaled = tl.load(rule + SCALED) != 0.0
    if skipped:
        tl.store(counters + SKIPPED, tl.load(counters + SKIPPED) + 1)
        tl.store(counters + SKIPPED_IN_A_ROW, tl.load(counters + SKIPPED_IN_A_ROW) + 1)
        tl.store(hyper + LOSS_SCALE, tl.load(hyper + LOSS_SCALE) * 0.5)
        tl.store(hyper + GOOD_UPDATES, 0.0)
    if applied:
        if scaled:
            tl.store(counters + SKIPPED_IN_A_ROW, 0)
            good = tl.load(hyper + GOOD_UPDATES) + 1.0
            grows = good >= GROWTH_INTERVAL
            scale = tl.load(hyper + LOSS_SCALE)
            tl.store(hyper + LOSS_SCALE, tl.where(grows, scale * 2.0, scale))
            tl.store(hyper + GOOD_UPDATES, tl.where(grows, 0.0, good))
        count = tl.load(counters + UPDATE_COUNT) + 1
        tl.store(counters + UPDATE_COUNT, count)
        tl.store(hyper + LEARNING_RATE, scheduled_rate(rule, count) * tl.load(hyper + RATE_SCALE))
        if tl.load(rule + ADAM) != 0.0:
            t = (count + 1).to(tl.float64)
            beta1 = tl.load(rule + BETA1)
            beta2 = tl.load(rule + BETA2)
            tl.store(hyper + BIAS_CORRECTION_1, 1.0 - tl.where(beta1 > 0, power(beta1, t), 0.0))
            tl.store(hyper + BIAS_CORRECTION_2, 1.0 - tl.where(beta2 > 0, power(beta2, t), 0.0))


@triton.jit
def advance_kernel(counters, hyper, rule):
    """The clock alone, one program."""
    batch = tl.load(counters + BATCH_INDEX) + 1
    every = tl.load(rule + ACCUMULATE).to(tl.int64)
    advance_clock(counters, hyper, rule, batch % every == 0, False)
