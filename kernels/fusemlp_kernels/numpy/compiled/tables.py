"""The columns of the tables that describe a step's calls, its loss and its optimizer to the compiled loop."""

from __future__ import annotations

from fusemlp_kernels.contract import ACTIVATIONS, LOSSES
from fusemlp_kernels.pointwise import HYPERPARAMETERS, OPTIMIZERS

# What a row of the table of calls does; a call of the program is one row or several. GATHER: x[rows]; ENTROPY and
# ELEMENTWISE: the last layer and its loss, cross-entropy or one of the others; WEIGHT, BIAS, SLOPES: a gradient.
GATHER, FORWARD, ENTROPY, ELEMENTWISE, BACKWARD, WEIGHT, BIAS, SLOPES, PENALTY, UPDATE, CLOCK = range(11)

# A row, int64. Arrays are addresses, 0 where there is none: input, weights, bias, output, pre-activation, gradient by
# it, what else is written; prelu's slope, the gradient by it, dropout's mask. Dropout: key, layer and threshold of its
# random numbers. The rows of the table of tensors from FIRST to before END that an update is of; a product with
# DESCENDS lands in the parameter, by the rate of tensor FIRST.
(
    KIND_OF_ROW,
    N,
    K,
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
    CALL_COLUMNS,
) = range(22)
# ... and float64: the slope of leaky_relu, the dropout rate, the strength of a penalty
FIXED_SLOPE, RATE, STRENGTH, CALL_FACTORS = range(4)

# A row a trained tensor, int64 and float64
OFFSET, SIZE, TENSOR_COLUMNS = range(3)
LR_FACTOR, DECAY, TENSOR_FACTORS = range(3)

# The loss, int64 and float64. SMOOTHED: every class of a row has a target; WIDE: a row of classes fills the vector
# registers; DIVISOR: what a mean divides by beside the row weights
KIND, MEAN, SOFT, SMOOTHED, IGNORES, IGNORED, ACCURACY, WEIGHTED, CLASS_WEIGHTED, WIDE, LOSS_COLUMNS = range(11)
SMOOTHING, OPTION, DIVISOR, LOSS_FACTORS = range(4)

# The optimizer, int64 and float64: after the hyperparameters, in their order
OPTIMIZER, DECOUPLED, SKLEARN, ACCUMULATE, CLIPS, RULE_COLUMNS = range(6)
CLIP_NORM, RULE_FACTORS = len(HYPERPARAMETERS), len(HYPERPARAMETERS) + 1
SGD = list(OPTIMIZERS).index("sgd")

IDENTITY = ACTIVATIONS.index("identity")
CROSS_ENTROPY = LOSSES.index("cross_entropy")
