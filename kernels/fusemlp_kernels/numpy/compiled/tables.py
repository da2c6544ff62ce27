"""The columns of the tables that describe calls, their loss and their optimizer to the compiled loop."""

from __future__ import annotations

from fusemlp_kernels.contract import ACTIVATIONS
from fusemlp_kernels.pointwise import HYPERPARAMETERS, OPTIMIZERS

# The integers are one int64 array: a head, a row of CALL_COLUMNS for each row of calls, a row of TENSOR_COLUMNS for
# each trained tensor, then the plan: phases, tasks, pieces. The factors are one float64 array: a head, then rows of the
# same order. An array is entered by its address.

# The head: the optimizer; how many rows of calls there are, and rows in the batch (COUNTED: ask the counters); the
# control arrays, and how many epochs the statistics are of. The factors, and where in the integers phases, tasks and
# pieces begin. Memory: partial results, PARTIALS numbers a block; sums of pieces; random numbers of a row, LANES_ROW
# words a block or task; zeros. The functions of products, panels and dot products. The plan: rows a block, phases, and
# how many of them come before the first step only. The state of a launch: the steps to do, the step, the phase. NOISY:
# the address of the row numbers where the gradients get noise; its key. BLOCKS: those of a phase that is cut by rows;
# TOGETHER: how many of them a task has in this launch. SHARD_ROWS: the rows of a shard, 0 where calls have the whole
# batch.
(
    OPTIMIZER,
    DECOUPLED,
    SKLEARN,
    ACCUMULATE,
    CLIPS,
    CALLS,
    BATCH,
    AT_COUNTERS,
    AT_HYPER,
    AT_RATES,
    AT_STATS,
    AT_EPOCH_STATS,
    EPOCHS,
    AT_FACTORS,
    AT_PHASES,
    AT_TASKS,
    AT_PIECES,
    AT_PARTIALS,
    PARTIALS,
    AT_SUMS,
    AT_LANES,
    LANES_ROW,
    AT_ZEROS,
    AT_PRODUCT,
    AT_PACK,
    AT_DOTS,
    BLOCK,
    PHASES,
    PROLOGUE,
    STEPS,
    STEP,
    PHASE,
    NOISY,
    NOISE_LOW,
    NOISE_HIGH,
    BLOCKS,
    TOGETHER,
    SHARD_ROWS,
    HEAD_COLUMNS,
) = range(39)
# The factors before those of the calls: the hyperparameters in their order, then the largest norm, what gradients are
# multiplied by in the update, and the deviation and the divisor of noise.
CLIP_NORM, SCALE, DEVIATION, SHARED_BY, HEAD_FACTORS = (len(HYPERPARAMETERS) + i for i in range(5))
COUNTED = -1
# Rows of a weight matrix that lie together for the forward pass, a multiple of the columns of any tile.
PANEL = 32
# Rows of the batch that a product for a gradient reads for all its tiles before the next: as many as stay in the cache.
DEPTH = 512

# The kinds of a row of calls; a call of the program is one row or several. By rows of the batch: GATHER: x[rows];
# AFFINE and ACTIVATE: a layer; ENTROPY and ELEMENTWISE: cross-entropy or another loss; PADDING: zero dz after the last
# row; BACKWARD; SQUARES and SHRINK: the norms of the rows' gradients, and clipping them;
# PERTURB: inputs that raise the loss; MEMBERS_AFFINE and MEMBERS_BACKWARD: what members that share weights have of
# their own; HEADS and HEADS_BACKWARD: an output layer of each member. By pieces of a tensor: WEIGHT, BIAS, SLOPES: a
# gradient, with its update where there is a PARAM; NORM: squares of gradients, for clipping; UPDATE; PACK: weights into
# panels. CLOCK.
(
    GATHER,
    AFFINE,
    ACTIVATE,
    ENTROPY,
    ELEMENTWISE,
    PADDING,
    BACKWARD,
    WEIGHT,
    BIAS,
    SLOPES,
    NORM,
    UPDATE,
    PACK,
    CLOCK,
    SQUARES,
    SHRINK,
    PERTURB,
    MEMBERS_AFFINE,
    MEMBERS_BACKWARD,
    HEADS,
    HEADS_BACKWARD,
) = range(21)

# A phase: how its calls are cut, its rows of calls, its tasks or blocks, and the first task in the table of tasks; that
# table holds the pieces of a task; a piece its row of calls and a part of a tensor: rows and columns of a weight
# matrix, elements of a bias, elements of one tensor of an update.
BY_ROWS, BY_PIECES, AT_ONCE = range(3)
CUT, ROW_FIRST, ROW_END, TASKS, TASK_FIRST, PHASE_COLUMNS = range(6)
PIECE_FIRST, PIECE_END, TASK_COLUMNS = range(3)
PIECE_ROW, TOP, BOTTOM, LEFT, RIGHT, PIECE_COLUMNS = range(6)
# Partial results of a block of rows: the loss, hits, scored rows, the sum of the row weights of the whole batch; then
# gradients by slopes.
LOSS_PART, HITS_PART, SCORED_PART, SHARES_PART, SLOPES_PART = range(5)

# A row. Arrays, 0 where there is none: row numbers, and 1 if the batch starts at ROW_OFFSET among them; input, weights,
# the same in panels, bias, output, pre-activation, gradient by it, what else is written; prelu's slope, the gradient by
# it, dropout's mask. SLOPE_PART: the place of a slope's gradient among the partial results. Dropout: key, layer and
# threshold of its random numbers. The rows of the table of tensors from FIRST to before END that an update is of. A
# gradient may be updated from at once: PARAM, its states and its AVERAGE, of tensor FIRST; with DESCENDS the product
# lands in the parameter. PULLS: a penalty is added to the gradient first. The loss: targets, row weights, class weights
# (arrays), and its options; MEAN: the place of its reduction in REDUCTIONS; SMOOTHED: every class of a row has a
# target; WIDE: a row of classes fills the vector registers; RECORDED: the statistics that count the loss (an array).
# AFRESH: the norms begin with this layer. ROUND: the perturbation's norm is 2; DRAWN: its start is random, by the key
# of dropout. MEMBERS: row i of the batch is one of member
# i % MEMBERS; members' factors before and after a product, BY_R and BY_S, and each task's sums of their gradients and
# of B's (arrays, a row a task); PARTS: a bias whose rows are such sums. SHARD: the row of the batch with which the
# call's shard begins.
(
    KIND_OF_ROW,
    N,
    K,
    ROWS,
    WALKS,
    X,
    W,
    PANELS,
    B,
    Y,
    Z,
    DZ,
    OUT,
    SLOPE,
    DSLOPE,
    SLOPE_PART,
    KEEP,
    ACTIVATION,
    KEY_LOW,
    KEY_HIGH,
    MASK_LAYER,
    THRESHOLD,
    FIRST,
    END,
    PARAM,
    STATE0,
    STATE1,
    AVERAGE,
    DESCENDS,
    PULLS,
    SUMS,
    TARGET,
    WEIGHTED,
    CLASS_WEIGHTED,
    KIND,
    MEAN,
    SOFT,
    SMOOTHED,
    IGNORES,
    IGNORED,
    ACCURACY,
    WIDE,
    RECORDED,
    AFRESH,
    ROUND,
    DRAWN,
    MEMBERS,
    BY_R,
    BY_S,
    SUM_R,
    SUM_S,
    SUM_B,
    PARTS,
    SHARD,
    CALL_COLUMNS,
) = range(55)
REDUCTIONS = ("sum", "mean", "rows")
BY_ITSELF = REDUCTIONS.index("rows")
# The slope of leaky_relu, the dropout rate, the strength of a penalty; the loss's numbers, DIVISOR: what a mean divides
# by beside the row weights; the largest norm of a row's gradient or perturbation; the length of its step, its bounds.
(
    FIXED_SLOPE,
    RATE,
    STRENGTH,
    SMOOTHING,
    OPTION,
    DIVISOR,
    LARGEST,
    LENGTH,
    LOW,
    HIGH,
    CALL_FACTORS,
) = range(11)

# A row a trained tensor
OFFSET, SIZE, TENSOR_COLUMNS = range(3)
LR_FACTOR, DECAY, TENSOR_FACTORS = range(3)

SGD = list(OPTIMIZERS).index("sgd")
IDENTITY = ACTIVATIONS.index("identity")
