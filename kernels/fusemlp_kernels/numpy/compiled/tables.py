"""The records that describe calls, their loss and their optimizer to the compiled loop.

A table is one block of memory: HEAD, a CALL for each row of calls, a TENSOR for each trained tensor, then the plan: a
PHASE, TASK and PIECE for each of those. Every field has eight bytes; arrays and records are entered by their address,
0 where there is none.
"""

from __future__ import annotations

from enum import IntEnum

import numpy as np

from fusemlp_kernels import contract
from fusemlp_kernels.coding import KINDS
from fusemlp_kernels.pointwise import HYPERPARAMETERS, OPTIMIZERS

# The fields that are marked with a "?": a table may do without them, so that no code is compiled for them.
OPTIONAL: set[str] = set()


def _record(integers: str, floats: str = "") -> np.dtype[np.void]:
    """The type of a record of int64 fields, then float64 fields."""
    names = [(name, kind) for text, kind in ((integers, np.int64), (floats, np.float64)) for name in text.split()]
    OPTIONAL.update(name[:-1] for name, _ in names if name.endswith("?"))
    return np.dtype([(name.rstrip("?"), kind) for name, kind in names])


# The optimizer: its code and options, micro-batches to an update, whether it clips. Rows in the batch (COUNTED: ask
# the counters). The control arrays, and how many epochs epoch_stats is of. The records after the head. Memory:
# partial results, partial_count numbers a block; sums of pieces; random numbers of a row, lanes_row words a block or
# task; zeros. The functions of products, panels and dot products. The plan: rows a block, phases, and how many of
# them come before the first step only. The state of a launch: the steps to do, the step, the phase. noisy: the row
# numbers where the gradients get noise; its key. blocks: those of a phase that is cut by rows; row_tasks: the tasks
# that share them in this launch; few: 1 where few threads do. shard_rows: the rows of a shard, 0 where calls have the
# whole batch. order, totals: scratch of a task for the rows of each code, and for sums of them. Then the
# hyperparameters; the largest norm; what gradients are multiplied by in the update; the deviation and the divisor of
# noise.
HEAD = _record(
    "optimizer decoupled sklearn accumulate clips batch counters hyper rates stats epoch_stats epochs "
    "calls tensors phases tasks pieces partials partial_count sums lanes lanes_row zeros product pack dots "
    "block phase_count prologue steps step phase noisy? noise_low noise_high blocks row_tasks few shard_rows "
    "order order_row totals totals_row",
    f"{' '.join(HYPERPARAMETERS)} clip_norm scale deviation shared_by",
)
COUNTED = -1
# Rows of a weight matrix that lie together for the forward pass, a multiple of the columns of any tile.
PANEL = 32
# The bytes of a line of the cache.
LINE = 64
# Rows of the batch that a product for a gradient reads for all its tiles before the next: as many as stay in the cache.
DEPTH = 512

# The kinds of a row of calls; a call of the program is one row or several. By rows of the batch: GATHER: x[rows];
# AFFINE and ACTIVATE: a layer; ENTROPY and ELEMENTWISE: cross-entropy or another loss; PADDING: zero dz after the
# last row; BACKWARD; SQUARES and SHRINK: the norms of the rows' gradients, and clipping them; COLUMNS: a first layer
# of codes; PERTURB: inputs that raise the loss; SCALE and SCALE_BACKWARD: rows that are normalised, or multiplied by
# what members that share weights have of their own; HEADS and HEADS_BACKWARD: an output layer of each member; ADD:
# out = x + y; ENCODE: inputs as waves. By pieces of a tensor: WEIGHT, BIAS, SLOPES, CODES (weights of a first layer of
# codes), FACTORS (those that members multiply its inputs by, from what CODES has left): a gradient, with its update
# where there is a param; NORM: squares of gradients, for clipping; UPDATE; PACK: weights into panels; SUMS: the rows
# that a layer of codes adds up. CLOCK. PAUSE: a launch ends there, and the next goes on from there.
Kind = IntEnum(
    "Kind",
    "GATHER AFFINE ACTIVATE ENTROPY ELEMENTWISE PADDING BACKWARD WEIGHT BIAS SLOPES NORM UPDATE PACK CLOCK SQUARES "
    "SHRINK PERTURB SCALE SCALE_BACKWARD HEADS HEADS_BACKWARD COLUMNS CODES SUMS PAUSE ADD FACTORS ENCODE",
    start=0,
)

# A row of calls: its kind and sizes. Row numbers, and 1 if the batch starts at ROW_OFFSET among them; input, weights,
# the same in panels, bias, output, pre-activation, gradient by it, what else is written; prelu's slope, the gradient
# by it and its place among the partial results; dropout's mask, and key, layer and threshold of its random numbers.
# The tensors from first to before end that an update is of. A gradient may be updated from at once: param, its states
# and its average, of tensor first; with descends the product lands in the parameter. pulls: a penalty is added to the
# gradient first. sums: scratch. The loss: targets, row weights, class weights (arrays), its code in LOSSES and its
# options; mean: the place of its reduction in REDUCTIONS; smoothed: every class of a row has a target; wide: a row of
# classes fills the vector registers; recorded: the statistics that count the loss (an array). afresh: the norms begin
# with this layer. round: the perturbation's norm is 2; drawn: its start is random, by the key of dropout. members:
# row i of the batch is one of member i % members; members' factors before and after a product, by_r and by_s, and
# each task's sums of their gradients and of b's (arrays, a row a task); parts: a bias whose rows are such sums.
# shard: the row of the batch with which the call's shard begins. coding: a COLUMN for each of the columns of the
# codes, of which x has slots a row; w is (K, N) then, and panels are the sums, with by_r those of one member after
# another. norm: eps of rows that are normalised, and centred first, with factors by_s and b; 0: they are not. octaves:
# of the waves of k inputs.
# packed: out holds the known targets of a loss, k a row, one after another; missing: those that are NaN are left out,
# and present is the sum of the row weights of the others. Of
# quantiles b has the levels, k is the place of the middle one, and out is scratch.
# Then the slope of leaky_relu, the dropout rate, the strength of a penalty; the loss's numbers, divisor: what a mean
# divides by beside the row weights; the largest norm of a row's gradient or perturbation; the length of its step, its
# bounds.
CALL = _record(
    "kind n k rows walks x w panels? b y z dz out slope? dslope? slope_part "
    "keep? activation key_low key_high mask_layer threshold first end param? state0 state1 average? descends? pulls? "
    "sums target weighted? class_weighted? loss mean soft? smoothed? ignores? ignored accuracy wide? recorded "
    "afresh round drawn? members? by_r? by_s? sum_r sum_s sum_b parts? shard coding columns slots centred octaves "
    "packed? missing?",
    "fixed_slope rate strength smoothing option norm? divisor largest length low high present",
)
# A column of codes: see ``coding.Place``.
COLUMN = _record("kind inputs slots first slot sums")
REDUCTIONS = ("sum", "mean", "rows")
BY_ITSELF = REDUCTIONS.index("rows")

# The place of a trained tensor in the arenas, its factor of the learning rate and its weight decay.
TENSOR = _record("offset size", "lr_factor decay")

# The cut of a phase, its rows of calls, its tasks or blocks, and the first of its tasks; how many of the large
# tasks, which come first, few threads take at once. The pieces of a task; the row of calls of a piece and a part of a
# tensor: rows and columns of a weight matrix, elements of a bias, elements of one tensor of an update.
BY_ROWS, BY_PIECES, AT_ONCE = range(3)
PHASE = _record("cut first end tasks first_task together large")
TASK = _record("first end")
PIECE = _record("row top bottom left right")
# Partial results of a block of rows: the loss, hits, scored rows, the sum of the row weights of the whole batch; then
# gradients by slopes.
LOSS_PART, HITS_PART, SCORED_PART, SHARES_PART, SLOPES_PART = range(5)

SGD = list(OPTIMIZERS).index("sgd")
IDENTITY = contract.ACTIVATIONS.index("identity")
# Activations whose derivative is had from z, and not from act(z).
NEEDS_Z = tuple(place for place, name in enumerate(contract.ACTIVATIONS) if name in contract.NEEDS_Z)
NUMBERS, WORD, PIECES, BAG = range(len(KINDS))
