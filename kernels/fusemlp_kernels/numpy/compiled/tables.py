"""The columns of the tables that describe a network, its loss and its optimizer to the compiled loop."""

from __future__ import annotations

from fusemlp_kernels.contract import ACTIVATIONS, LOSSES
from fusemlp_kernels.pointwise import OPTIMIZERS

# Elements between the starts of values in the workspace.
ALIGNMENT = 64

# A row a layer, int64: the widths; where its tensors begin in the arenas (the slope: -1 where there is none) and the
# row of each in the table of trained tensors (-1: frozen); where its values begin in the workspace (output,
# pre-activation, gradient) and in that of the masks; dropout: whether there is any, key and layer of its random
# numbers, the threshold of their lanes.
(
    INPUTS,
    OUTPUTS,
    W,
    B,
    SLOPE,
    W_RULE,
    B_RULE,
    SLOPE_RULE,
    ACTIVATION,
    Y,
    Z,
    DZ,
    KEEP,
    DROPS,
    KEY_LOW,
    KEY_HIGH,
    MASK_LAYER,
    THRESHOLD,
    LAYER_COLUMNS,
) = range(19)
# ... and float64: the slope of leaky_relu, the dropout rate
FIXED_SLOPE, RATE, LAYER_FACTORS = range(3)

# A row a trained tensor, int64 and float64
OFFSET, SIZE, TENSOR_COLUMNS = range(3)
LR_FACTOR, DECAY, TENSOR_FACTORS = range(3)

# The loss, int64 and float64; what a mean divides by beside the row weights, and the strength of the ridge
KIND, MEAN, SOFT, IGNORES, IGNORED, ACCURACY, WEIGHTED, CLASS_WEIGHTED, LOSS_COLUMNS = range(9)
SMOOTHING, OPTION, DIVISOR, STRENGTH, LOSS_FACTORS = range(5)

# The optimizer, int64 and float64
OPTIMIZER, DECOUPLED, SKLEARN, ACCUMULATE, CLIPS, RULE_COLUMNS = range(6)
MOMENTUM, BETA1, BETA2, EPS, CLIP_NORM, RULE_FACTORS = range(6)
SGD = list(OPTIMIZERS).index("sgd")

IDENTITY = ACTIVATIONS.index("identity")
CROSS_ENTROPY = LOSSES.index("cross_entropy")
