"""The columns of the tables that describe calls, their loss and their optimizer to the compiled loop."""

from __future__ import annotations

from fusemlp_kernels.contract import ACTIVATIONS
from fusemlp_kernels.pointwise import HYPERPARAMETERS, OPTIMIZERS

# The integers are one int64 array: a head, a row of CALL_COLUMNS for each row of calls, a row of TENSOR_COLUMNS for
# each trained tensor. The factors are one float64 array of the same order. An array is entered by its address.

# The head: the optimizer; how many rows of calls there are, and rows in the batch (COUNTED: ask the counters); the
# control arrays, how many epochs the statistics are of, and memory for the random numbers of a row.
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
    AT_LANES,
    HEAD_COLUMNS,
) = range(15)
# The factors before those of the calls: the hyperparameters in their order, then the largest norm.
CLIP_NORM, HEAD_FACTORS = len(HYPERPARAMETERS), len(HYPERPARAMETERS) + 1
COUNTED = -1

# The kinds of a row of calls; a call of the program is one row or several. GATHER: x[rows]; AFFINE and ACTIVATE: a
# layer; ENTROPY and ELEMENTWISE: cross-entropy or another loss; PADDING: zero dz after the last row; WEIGHT, BIAS,
# SLOPES: a gradient.
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
    PENALTY,
    UPDATE,
    CLOCK,
) = range(13)

# A row. Arrays, 0 where there is none: row numbers, and 1 if the batch starts at ROW_OFFSET among them; input, weights,
# bias, output, pre-activation, gradient by it, what else is written; prelu's slope, the gradient by it, dropout's mask.
# Dropout: key, layer and threshold of its random numbers. The rows of the table of tensors from FIRST to before END
# that an update is of; a product with DESCENDS lands in the parameter, by the rate of tensor FIRST. The loss: targets,
# row weights, class weights (arrays), and its options; SMOOTHED: every class of a row has a target; WIDE: a row of
# classes fills the vector registers.
(
    KIND_OF_ROW,
    N,
    K,
    ROWS,
    WALKS,
    X,
    W,
    B,
    Y,
    Z,
    DZ,
    OUT,
    SLOPE,
    DSLOPE,
    KEEP,
    ACTIVATION,
    KEY_LOW,
    KEY_HIGH,
    MASK_LAYER,
    THRESHOLD,
    FIRST,
    END,
    DESCENDS,
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
    CALL_COLUMNS,
) = range(35)
# The slope of leaky_relu, the dropout rate, the strength of a penalty; the loss's numbers, DIVISOR: what a mean divides
# by beside the row weights.
FIXED_SLOPE, RATE, STRENGTH, SMOOTHING, OPTION, DIVISOR, CALL_FACTORS = range(7)

# A row a trained tensor
OFFSET, SIZE, TENSOR_COLUMNS = range(3)
LR_FACTOR, DECAY, TENSOR_FACTORS = range(3)

# BLAS takes the address of every argument. Its numbers are written into the first two elements of an array of the
# parameters' type, its integers into the first six of an int32 array; after them stand the letters that say whether a
# factor is transposed.
REALS, INTEGERS, LETTERS = 2, 6, [ord("N"), ord("T")]

SGD = list(OPTIMIZERS).index("sgd")
IDENTITY = ACTIVATIONS.index("identity")
