"""The work of a launch's last program: fixed-order sums, and the clock of the training step.

Programs of a launch finish in any order. Each takes a ticket when its results are stored. The program with the last
ticket sees the results of all others. It adds them up in a fixed order, without float atomics, and changes the counters
and the learning rate, which no other program reads any more.
"""

from __future__ import annotations

import math

import triton
import triton.language as tl
from triton.language.target_info import is_hip

from fusemlp_kernels import contract
from fusemlp_kernels.contract import UpdateRule
from fusemlp_kernels.pointwise import HYPERPARAMETERS

# counters, hyper and rates, by their places in the contract
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
SHARE: tl.constexpr = tl.constexpr(contract.SHARE)
FIRST_UPDATE: tl.constexpr = tl.constexpr(contract.FIRST_UPDATE)
ROWS_FILLED: tl.constexpr = tl.constexpr(contract.ROWS_FILLED)
RATE_SHARE: tl.constexpr = tl.constexpr(contract.RATE_SHARE)
RATE_COLUMNS: tl.constexpr = tl.constexpr(contract.RATE_COLUMNS)
GROWTH_INTERVAL: tl.constexpr = tl.constexpr(contract.GROWTH_INTERVAL)

# An optimizer's rule on the device: float64, read at these places.
RULE_FIELDS = ("code", *HYPERPARAMETERS, "decoupled", "inside", "clip_norm", "accumulate", "scaled")
CODE, DECOUPLED, INSIDE, CLIP_NORM, ACCUMULATE, SCALED = (
    tl.constexpr(place) for place, name in enumerate(RULE_FIELDS) if name not in HYPERPARAMETERS
)


def rule_values(rule: UpdateRule, *, scaled: bool = False) -> list[float]:
    """``RULE_FIELDS`` of a rule; ``scaled``: the gradients carry the loss scale."""
    return [
        float(rule.code), *(getattr(rule, name) for name in HYPERPARAMETERS),
        float(rule.decoupled), float(rule.convention == "scikit-learn"),
        math.inf if rule.clip_norm is None else rule.clip_norm, float(rule.accumulate), float(scaled),
    ]  # fmt: skip


@triton.constexpr_function
def on_amd():
    """Return whether the kernel is compiled for an AMD card."""
    return not triton.knobs.runtime.interpret and is_hip()


@triton.jit
def drain_stores():
    """Wait until the L2 cache has what this thread's wave stored.

    AMD's barrier does not wait for stores, and the release of an atomic waits for those of its own wave alone.
    """
    tl.inline_asm_elementwise(
        "s_waitcnt vmcnt(0)\nv_mov_b32 $0, 0", "=v,~{memory}", [], dtype=tl.int32, is_pure=False, pack=1
    )


@triton.jit
def is_last(ticket, programs):
    """Return whether this program is the last of the launch to come here; it then sees all that the others stored.

    The barrier orders the stores of this program's threads before the ticket. The last program resets the ticket for
    the next launch.
    """
    if on_amd():
        drain_stores()
    tl.debug_barrier()
    taken = tl.atomic_add(ticket, 1, sem="acq_rel", scope="gpu")
    last = taken == programs - 1
    if last:
        tl.store(ticket, 0)
    return last


@triton.jit
def sum_of(partials, count, stride, BLOCK: tl.constexpr):
    """Return the sum of ``count`` float64 partial results, in an order that depends on nothing else."""
    at = tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float64)
    for start in range(0, count, BLOCK):
        # other programs wrote these during this launch: read them from the L2 cache
        total += tl.load(partials + (start + at) * stride, mask=start + at < count, other=0.0, cache_modifier=".cg")
    return tl.sum(total, axis=0)


@triton.jit
def advance_clock(counters, hyper, rates, rule, applied, skipped):
    """Advance the clock after a batch, in one program. ``applied``: it had an update; ``skipped``: its gradients had
    overflowed."""
    # all that is read comes before the first store, which it would wait for
    updates, last = tl.load(counters + UPDATE_COUNT), tl.load(rates + ROWS_FILLED).to(tl.int64) - 1
    place = updates + 1 - tl.load(rates + FIRST_UPDATE).to(tl.int64)
    batch, offset = tl.load(counters + BATCH_INDEX), tl.load(counters + ROW_OFFSET)
    step, total = tl.load(counters + ROW_STEP), tl.load(counters + ROW_TOTAL)
    factor, scaled = tl.load(hyper + RATE_SCALE), tl.load(rule + SCALED) != 0.0
    scale, good = tl.load(hyper + LOSS_SCALE), tl.load(hyper + GOOD_UPDATES) + 1.0
    row = rates + (1 + tl.maximum(tl.minimum(place, last), 0)) * RATE_COLUMNS
    rate, share = tl.load(row + LEARNING_RATE) * factor, tl.load(row + RATE_SHARE)
    correction1, correction2 = tl.load(row + BIAS_CORRECTION_1), tl.load(row + BIAS_CORRECTION_2)
    tl.store(counters + BATCH_INDEX, batch + 1)
    if step != 0:
        offset = tl.where(offset + step >= total, 0, offset + step)
        tl.store(counters + ROW_OFFSET, offset)
        tl.store(counters + ROW_COUNT, tl.minimum(step, total - offset))
    if skipped:
        tl.store(counters + SKIPPED, tl.load(counters + SKIPPED) + 1)
        tl.store(counters + SKIPPED_IN_A_ROW, tl.load(counters + SKIPPED_IN_A_ROW) + 1)
        tl.store(hyper + LOSS_SCALE, scale * 0.5)
        tl.store(hyper + GOOD_UPDATES, 0.0)
    if applied:
        if scaled:
            grows = good >= GROWTH_INTERVAL
            tl.store(counters + SKIPPED_IN_A_ROW, 0)
            tl.store(hyper + LOSS_SCALE, tl.where(grows, scale * 2.0, scale))
            tl.store(hyper + GOOD_UPDATES, tl.where(grows, 0.0, good))
        tl.store(counters + UPDATE_COUNT, updates + 1)
        tl.store(hyper + LEARNING_RATE, rate)
        tl.store(hyper + BIAS_CORRECTION_1, correction1)
        tl.store(hyper + BIAS_CORRECTION_2, correction2)
        tl.store(hyper + SHARE, share)


@triton.jit
def leave_out_padding(counters, rows, BLOCK: tl.constexpr):
    """Take the rows of -1 out of the count of the next batch, in the program that has advanced the clock."""
    if on_amd():
        drain_stores()
    tl.debug_barrier()
    rows += tl.load(counters + ROW_OFFSET)
    count = tl.load(counters + ROW_COUNT).to(tl.int32)
    valid = tl.zeros((BLOCK,), tl.int32)
    for start in range(0, count, BLOCK):
        at = start + tl.arange(0, BLOCK)
        valid += (tl.load(rows + at, mask=at < count, other=-1) >= 0).to(tl.int32)
    tl.store(counters + ROW_COUNT, tl.sum(valid, axis=0).to(tl.int64))


@triton.jit
def advance_kernel(counters, hyper, rates, rule):
    """The clock alone, one program."""
    batch = tl.load(counters + BATCH_INDEX) + 1
    every = tl.load(rule + ACCUMULATE).to(tl.int64)
    advance_clock(counters, hyper, rates, rule, batch % every == 0, False)
