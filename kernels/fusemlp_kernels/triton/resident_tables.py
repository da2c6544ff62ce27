"""The tables that a resident launch reads: its phases, layers and models; and the place of a model's batch."""

from __future__ import annotations

import triton
import triton.language as tl

from fusemlp_kernels import contract
from fusemlp_kernels.triton.clock import ROW_COUNT, ROW_OFFSET, RULE_FIELDS
from fusemlp_kernels.triton.gradients import whole
from fusemlp_kernels.triton.loss import SETTING_FIELDS

# A row of the table of layers, int64: widths; the first element and the row pitch of the input (the first layer's
# counts from ``compute``, the others' from the model's workspace); the first element of each parameter in the arenas
# (no slope: -1), and its row in the table of tensors (-1: frozen); the first element in the workspace of the output, of
# the values that give its derivative, and of dz, and their row pitch.
LAYER_FIELDS = (
    "N", "K", "x", "x_row", "w", "w_row", "b", "slope", "w_task", "b_task", "slope_task", "activation",
    "y", "z", "dz", "pitch",
)  # fmt: skip
(
    LAYER_N, LAYER_K, X, X_ROW, W, W_ROW, B, SLOPE, W_TASK, B_TASK, SLOPE_TASK, ACTIVATION, Y, Z, DZ, PITCH,
) = (tl.constexpr(place) for place in range(len(LAYER_FIELDS)))  # fmt: skip
LAYER_COLUMNS: tl.constexpr = tl.constexpr(len(LAYER_FIELDS))
# The phases of a step, a byte each, in words of 64 bits, which are arguments: no phase waits for its row of a table.
# A byte has the kind, and from this bit on the layer.
PHASES = ("measure", "forward", "entropy", "elementwise", "backward", "gradients", "update", "tick")
MEASURE, FORWARD, ENTROPY, ELEMENTWISE, BACKWARD, GRADIENTS, UPDATE, TICK = (
    tl.constexpr(place) for place in range(len(PHASES))
)
PHASE_LAYER: tl.constexpr = tl.constexpr(4)
PHASE_WORDS, PHASE_LAYERS = 4, 16
# By model and layer: the numbers of the dropout, int64 (threshold 0: none), and factors, float32.
DRAW_FIELDS = ("layer", "key0", "key1", "threshold")
DRAW_LAYER, KEY0, KEY1, THRESHOLD = (tl.constexpr(place) for place in range(len(DRAW_FIELDS)))
DRAW_COLUMNS: tl.constexpr = tl.constexpr(len(DRAW_FIELDS))
SHARE_FIELDS = ("keep_scale", "kept_share", "slope")
KEEP_SCALE, KEPT_SHARE, FIXED_SLOPE = (tl.constexpr(place) for place in range(len(SHARE_FIELDS)))
SHARE_COLUMNS: tl.constexpr = tl.constexpr(len(SHARE_FIELDS))
# By model, float64: the divisor of its ridge over the usual one, and the ridge's strength times the usual one; then of
# the batch the divisor of its loss, the factor of the trained weights in their gradients, and the penalty.
MEASURE_FIELDS = ("ratio", "strength", "normaliser", "pull", "penalty")
RATIO, STRENGTH, NORMALISER, PULL, PENALTY = (tl.constexpr(place) for place in range(len(MEASURE_FIELDS)))
MEASURES: tl.constexpr = tl.constexpr(len(MEASURE_FIELDS))
# A trained tensor's stretch of the arenas, int64: offset and size.
SEGMENT_COLUMNS: tl.constexpr = tl.constexpr(2)
# An entry of the list of models that train in this launch, int64: the model, its steps, and its epochs with sums.
LIVE_FIELDS = ("model", "steps", "epochs")
_, STEPS, EPOCHS = (tl.constexpr(place) for place in range(len(LIVE_FIELDS)))
LIVE_COLUMNS: tl.constexpr = tl.constexpr(len(LIVE_FIELDS))
RULE_COLUMNS: tl.constexpr = tl.constexpr(len(RULE_FIELDS))
SETTING_COLUMNS: tl.constexpr = tl.constexpr(len(SETTING_FIELDS))
# Elements of the arenas in one step of a sweep.
SWEEP: tl.constexpr = tl.constexpr(1024)
# Numbers of a model in the arrays of the contract.
COUNTERS: tl.constexpr = tl.constexpr(contract.COUNTERS)
HYPER: tl.constexpr = tl.constexpr(contract.HYPER)
STATS: tl.constexpr = tl.constexpr(contract.STATS)
STATS_BLOCK: tl.constexpr = tl.constexpr(triton.next_power_of_2(contract.STATS))
BATCH_LOSSES: tl.constexpr = tl.constexpr(contract.BATCH_LOSSES)
PENALTIES: tl.constexpr = tl.constexpr(contract.PENALTIES)


@triton.jit
def number(row, FIELD: tl.constexpr):
    """Return a field of a table's row, int32."""
    return tl.load(row + FIELD).to(tl.int32)


@triton.jit
def phase_of(place, order0, order1, order2, order3):
    """Return the kind of a step's phase, and its layer, int32."""
    word = tl.where(place < 16, tl.where(place < 8, order0, order1), tl.where(place < 24, order2, order3))
    phase = (word >> (place % 8 * 8)).to(tl.int32)
    return phase & 15, (phase >> PHASE_LAYER) & 15


@triton.jit
def model_of(live):
    """Return the model that this program trains. Each phase asks again, so that no register holds the answer through
    the other phases."""
    return tl.load(live + tl.program_id(0) * LIVE_COLUMNS)


@triton.jit
def batch_of(rows, counters, model, rows_size):
    """Return the first row number of the model's batch."""
    return rows + model * rows_size + tl.load(counters + model * COUNTERS + ROW_OFFSET)


@triton.jit
def rows_of(counters, model, M):
    """Return the number of rows of the model's batch, int32."""
    return tl.minimum(tl.load(counters + model * COUNTERS + ROW_COUNT), M).to(tl.int32)


@triton.jit
def input_of(compute, row, index, work):
    """Return a layer's input: the data, or the output of the layer before."""
    return compute + whole(tl.load(row + X) + tl.where(index == 0, 0, work), True)
