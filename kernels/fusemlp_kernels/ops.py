"""Every op of the kernel contract as data: its operands, their shapes and types, and what it reads and writes.

The engine's program and its verifier, the checks of ``Backend.bind`` and the tests read these records; nothing else
says what an op's operands are. Notation and conventions: ``contract``.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from fusemlp_kernels.contract import COUNTERS, HYPER, RATE_COLUMNS, STATS, TensorRule

# Letters of a shape that are one size everywhere; M and n are one size in a whole program, K and N in a call.
FIXED = {"1": 1, "C": COUNTERS, "H": HYPER, "S": STATS, "4": RATE_COLUMNS}
COMMON = "Mn"
READ, WRITTEN, UPDATED = "read", "written", "updated"


@dataclass(frozen=True)
class Operand:
    """One operand of an op, or one field of an operand that is a sequence of mappings (``fields``).

    ``shape``: a letter a dimension, A for a flat arena, B for all batches, D for what all members have, one after
    another; None for what is no array. ``dtype`` as in ``Backend.allocate``. A target's depend on the loss: (M,) int64
    for classes, (M, N) real for others. ``rows``: the operand whose row numbers pick this one's rows; where that is
    given, the array has n rows in place of M. ``use``: an updated operand is read and written. ``kind``: what a written
    operand holds, as in ``program.KINDS``. ``default``: what None stands for, where an operand is left out.
    ``nullable``: it must be named, and may be None. ``hidden``: the printed program leaves it out. ``several``: a tuple
    of arrays of this shape. ``coded``: with the operand ``coding`` it has E numbers a row in place of K.
    """

    name: str
    shape: str | None = None
    dtype: str = "real"
    use: str = READ
    kind: str = "work"
    rows: str = ""
    optional: bool = False
    default: Any = None
    nullable: bool = False
    hidden: bool = False
    several: bool = False
    coded: bool = False
    fields: tuple[Operand, ...] = ()
    note: str = ""


@dataclass(frozen=True)
class Op:
    """An op: what it computes, and its operands in order."""

    name: str
    computes: str
    operands: tuple[Operand, ...]

    @cached_property
    def by_name(self) -> Mapping[str, Operand]:
        """The operands by name; a field of a sequence of mappings as ``layers.w``."""
        return dict(_named(self.operands))

    @cached_property
    def required(self) -> tuple[str, ...]:
        """The operands that the op cannot do without."""
        return tuple(operand.name for operand in self.operands if not operand.optional)

    @cached_property
    def written(self) -> frozenset[str]:
        """The operands that the op writes or updates."""
        return frozenset(name for name, operand in self.by_name.items() if operand.use != READ)

    @cached_property
    def only_written(self) -> frozenset[str]:
        """The operands that the op writes without reading them."""
        return frozenset(name for name, operand in self.by_name.items() if operand.use == WRITTEN)


def _named(operands: Iterable[Operand], prefix: str = "") -> Iterator[tuple[str, Operand]]:
    for operand in operands:
        yield prefix + operand.name, operand
        yield from _named(operand.fields, f"{prefix}{operand.name}.")


def expected(operand: Operand, given: Mapping[str, Any]) -> tuple[str, str]:
    """The element type and the letters of an operand's shape beside the other operands of the call."""
    dtype, letters = operand.dtype, operand.shape or ""
    if letters == "target":
        loss = given["loss"]
        classes = loss.kind == "cross_entropy" and not loss.soft
        dtype, letters = ("int64", "M") if classes else ("real", "MN" if loss.width == 1 else "MT")
    if operand.rows and given.get(operand.rows) is not None:
        letters = letters.replace("M", "n")
    if operand.coded and given.get("coding") is not None:
        letters = letters.replace("K", "E")
    return dtype, letters


_COUNTERS = Operand("counters", "C", "int64", hidden=True)
_HYPER = Operand("hyper", "H", "float64", hidden=True)
_STATS = Operand("stats", "S", "float64", UPDATED, kind="control")
_GRADS = Operand("grads", "A", use=UPDATED, kind="gradient")
_RULE = Operand("rule", note="UpdateRule")
_ROWS = Operand("rows", "M", "int64", optional=True, hidden=True, note="row numbers; -1 is padding and comes last")
_ROWS_OF_X = replace(_ROWS, note="row numbers; where they are -1, x is zero")
_WEIGHT = Operand("weight", "M", rows="rows", optional=True, note="a weight for each row")
_DROPOUT = Operand("dropout", optional=True, note="Dropout; needs counters")
_KEEP = Operand("keep", "MN", "bool", WRITTEN, optional=True, note="dropout's mask, for backends that store it")
_SLOPES = (
    Operand("slope", optional=True, default=0.0, note="float: leaky_relu's slope, elu's alpha"),
    Operand("slope_param", "1", optional=True, note="prelu's slope"),
)
_ACTIVATION = (Operand("activation", note="a name of ACTIVATIONS"), *_SLOPES)
_CODING = Operand("coding", optional=True, note="Coding: x has rows of codes that stand for the inputs")
_FACTORS = Operand(
    "r", "DK", optional=True, note="with coding: the inputs of row i of the batch are multiplied by row i % D of r"
)
_GATHERED = Operand(
    "gathered", "MK", "compute", WRITTEN, optional=True, coded=True,
    note="x[rows], for backends that do not gather in the load; where rows is -1, zeros",
)  # fmt: skip
_DSLOPE = Operand("dslope", "1", use=WRITTEN, optional=True, note="the gradient by prelu's slope")
# The clock: the last of a step's calls to finish advances it.
_CLOCK = (
    _RULE,
    replace(_HYPER, use=UPDATED, kind="control"),
    Operand("rates", "R4", "float64", hidden=True, note="1 + R rows, see contract"),
    replace(_COUNTERS, use=UPDATED, kind="control"),
)
_PARTS = (
    Operand(
        "parts", optional=True, default=1,
        note="with parts > 1 the batch is cut into this many stretches (Traits.split_rows; without accumulation and "
        "norm): the gradient is the sum of as many arenas",
    ),
    Operand("part", optional=True, default=0, note="elements from one of these arenas to the next"),
)  # fmt: skip
_LOSS = (
    Operand("target", "target", rows="rows"),
    _COUNTERS,
    replace(_STATS, optional=True, note="LAST_LOSS, and the sums after it; left out, the loss is not counted"),
    Operand("loss", note="LossSpec"),
    _WEIGHT,
    Operand("class_weight", "N", optional=True, hidden=True),
    replace(_ACTIVATION[0], optional=True, default="identity"),
    *_SLOPES,
    _DSLOPE,
    replace(_HYPER, optional=True, note="dz and dslope are multiplied by hyper[LOSS_SCALE]"),
    Operand("ridge", optional=True, note="Ridge: its divisor; in train_resident and train_fleet"),
)
_PLAIN_LOSS = ("target", "counters", "stats", "loss", "weight", "class_weight")
# The rest of a layer after its product and what is its own: activation and dropout.
_REST = (
    replace(
        _ACTIVATION[0], optional=True, default="identity", note="a name of ACTIVATIONS but prelu; of members with s"
    ),
    _SLOPES[0],
    _DROPOUT,
)
_MEMBERS = (
    Operand("s", "DK", optional=True),
    Operand("b", "DK", optional=True, note="with s"),
    Operand("r", "DK", optional=True),
    *_REST,
)
_NORM = (
    Operand("eps", optional=True, note="float above 0: n is c / sqrt(mean(c**2) + eps) with c = x; None: n is x"),
    Operand("centred", optional=True, default=False, note="with eps: c is x less its mean"),
    Operand("g", "K", optional=True, note="with eps"),
    Operand("b", "K", optional=True, note="with g"),
    *_REST,
)
_LAYER = (
    Operand("dz", "MN", "compute"),
    replace(_ROWS, note="of the first layer, where x is picked by row"),
    replace(_GATHERED, use=READ),
    Operand("x", "MK", "compute", rows="rows", coded=True),
    _CODING,
)
_DW = Operand("dw", "NK", use=WRITTEN, kind="gradient", nullable=True, note="None where it is frozen")
_DB = replace(_DW, name="db", shape="N")
_NARROW = (Operand("w", "NK", "compute"), Operand("b", "N"), _ACTIVATION[0], _SLOPES[0])
_FACTOR_GRADIENT = Operand("dr", "DK", use=WRITTEN, kind="gradient", optional=True, note="where r is given")
_SUM = replace(_FACTOR_GRADIENT, note="where the tensor is given; accumulated as by grad_weight")
_STATE = Operand("w_state", "NK", use=UPDATED, kind="state", several=True, optional=True, default=())
_TENSOR_RULE = Operand("w_rule", optional=True, default=TensorRule(), note="TensorRule")
_DSLOPES = Operand("slopes", optional=True, default=(), fields=(Operand("dslope", "1"),))

_HISTORY = Operand(
    "epoch_stats", dtype="float64", use=WRITTEN, kind="control", optional=True, hidden=True,
    note="(E, STATS): rows has those of E epochs, each counters[ROW_TOTAL] long, one after another. ROW_OFFSET goes on "
    "through all of them and comes back to 0 after the last; after epoch e stats is copied to epoch_stats[e], and its "
    "sums begin again at 0",
)  # fmt: skip
_PLAN = Operand(
    "plan", optional=True, default="resident",
    note="of Triton alone: 'card', the whole card trains one model; 'chip', small models stay on their multiprocessors",
)  # fmt: skip
_ARENAS = Operand(
    "arenas",
    note="by name the flat arrays that the tensors of the calls lie in: params, grads, state0 and so on, shadow, and "
    "counters, hyper, rates, stats",
)

# fmt: off
OPS = {op.name: op for op in (
    Op("linear", "y = dropout(act(x @ w.T + b))", (
        _ROWS,
        Operand("w", "NK", "compute"),
        Operand("x", "MK", "compute", rows="rows", coded=True, note="row i of the batch is x[rows[i]]"),
        _CODING,
        _FACTORS,
        Operand("b", "N"),
        Operand("y", "MN", "compute", WRITTEN),
        *_ACTIVATION,
        Operand("z", "MN", "compute", WRITTEN, optional=True, note="pre-activation, for NEEDS_Z"),
        _DROPOUT,
        replace(_COUNTERS, optional=True),
        _KEEP,
        _GATHERED,
    )),
    Op("loss_grad",
        "the loss, and dz from the output layer's pre-activation; padding (rows from counters[ROW_COUNT] on) "
        "weighs nothing and its dz is zero", (
        _ROWS,
        Operand("z", "MN", "compute"),
        Operand("dz", "MN", "compute", WRITTEN, nullable=True, note="may be None, for the loss alone, or z itself"),
        *_LOSS,
    )),
    Op("linear_loss_grad",
        "linear without dropout, then loss_grad; where dz is given, the logits may pass through it", (
        _ROWS,
        Operand("w", "NK", "compute"),
        Operand(
            "x_rows", "M", "int64", optional=True, hidden=True,
            note="row numbers of x; where the output layer is the first, the array rows",
        ),
        Operand("x", "MK", "compute", rows="x_rows"),
        Operand("b", "N"),
        Operand("dz", "MN", "compute", WRITTEN, nullable=True, note="may be None, for the loss alone"),
        _GATHERED,
        *_LOSS,
    )),
    Op("own_loss",
        "function(y, target, weight), called on the host with the rows of the batch, returns the loss, dy, its "
        "gradient by y, and the weight of the batch in the mean loss of several. Padding has dy 0", (
        _ROWS,
        Operand("y", "MN", "compute"),
        Operand("dy", "MN", "compute", WRITTEN),
        Operand("target", dtype="any", rows="rows", note="(n, ...)"),
        _WEIGHT,
        _COUNTERS,
        replace(_STATS, optional=True, note="left out, the loss is not counted"),
        replace(_HYPER, optional=True, note="dy is multiplied by hyper[LOSS_SCALE]; Triton alone"),
        Operand("function", dtype="function", hidden=True, note="it returns a float, a finite array and a float"),
    )),
    Op("grad_input",
        "dz_prev = (dz @ w) * act'(y) * keep / (1 - p); y is the output, after dropout, of the layer before", (
        Operand("dz", "MN", "compute"),
        Operand("w", "NK", "compute"),
        Operand("y", "MK", "compute"),
        Operand("z", "MK", "compute", optional=True, note="pre-activation of y, for NEEDS_Z"),
        Operand("dz_prev", "MK", "compute", WRITTEN, note="aliases nothing"),
        *_ACTIVATION,
        _DSLOPE,
        _DROPOUT,
        replace(_COUNTERS, optional=True),
        Operand("keep", "MK", "bool", optional=True, note="what linear has written"),
    )),
    Op("affine_members",
        "y = dropout(act(x * s + b)) * r, row i of the batch with row i % D of s, b and r; those left out change "
        "nothing", (
        _ROWS_OF_X,
        Operand("x", "MK", "compute", rows="rows"),
        Operand("y", "MK", "compute", WRITTEN),
        *_MEMBERS,
        replace(_COUNTERS, optional=True),
        replace(_KEEP, shape="MK"),
    )),
    Op("grad_affine_members",
        "back through affine_members: dx, and the sums ds, db and dr over the rows of each member; y is not read", (
        _ROWS_OF_X,
        Operand("dy", "MK", "compute"),
        Operand("x", "MK", "compute", rows="rows"),
        Operand("dx", "MK", "compute", WRITTEN, optional=True, note="aliases nothing; with s and b"),
        *_MEMBERS,
        *(replace(_SUM, name=name) for name in ("ds", "db", "dr")),
        _RULE,
        _COUNTERS,
        Operand("keep", "MK", "bool", optional=True, note="what affine_members has written"),
    )),
    Op("normalise", "y = dropout(act(n * g + b)), n being the rows of x normalised", (
        Operand("x", "MK", "compute"),
        Operand("y", "MK", "compute", WRITTEN, note="aliases nothing"),
        *_NORM,
        replace(_COUNTERS, optional=True),
        replace(_KEEP, shape="MK"),
    )),
    Op("grad_normalise", "back through normalise: dx, and the sums dg and db over the rows; y is not read", (
        Operand("dy", "MK", "compute"),
        Operand("x", "MK", "compute"),
        Operand("dx", "MK", "compute", WRITTEN, note="aliases nothing"),
        *_NORM,
        *(replace(_SUM, name=name, shape="K") for name in ("dg", "db")),
        _RULE,
        _COUNTERS,
        Operand("keep", "MK", "bool", optional=True, note="what normalise has written"),
    )),
    Op("add", "y = a + b", (
        Operand("a", "MK", "compute"),
        Operand("b", "MK", "compute"),
        Operand("y", "MK", "compute", WRITTEN, note="aliases nothing"),
    )),
    Op("encode",
        "y = sin(2**k * pi * x), cos(2**k * pi * x) side by side for each k below ``octaves``, of one input after "
        "another, and with ``inputs`` x before them; or, with dy, dx, the gradient by x", (
        _ROWS_OF_X,
        Operand("x", "MK", rows="rows"),
        Operand("y", "MN", "compute", WRITTEN, optional=True, note="N = K (2 octaves + inputs)"),
        Operand("dy", "MN", "compute", optional=True, note="with dx, in place of y"),
        Operand("dx", "MK", "compute", WRITTEN, optional=True, note="aliases nothing"),
        Operand("octaves", note="int"),
        Operand("inputs", optional=True, default=False, note="bool"),
        _COUNTERS,
    )),
    Op("linear_members",
        "z = x @ w[m].T + b[m] for row i of the batch, m being i % (D / N): w[m] and b[m] are rows m * N to before "
        "(m + 1) * N", (
        Operand("w", "DK", "compute"),
        Operand("x", "MK", "compute"),
        Operand("b", "D"),
        Operand("z", "MN", "compute", WRITTEN),
    )),
    Op("grad_input_members", "dx = dz @ w[m], with w[m] as in linear_members", (
        Operand("dz", "MN", "compute"),
        Operand("w", "DK", "compute"),
        Operand("dx", "MK", "compute", WRITTEN, note="aliases nothing"),
    )),
    Op("grad_weight_members",
        "dw[m] = dz.T @ x, db[m] = sum of dz, over the rows of member m, as in linear_members; accumulated as by "
        "grad_weight", (
        Operand("dz", "MN", "compute"),
        Operand("x", "MK", "compute"),
        replace(_DW, shape="DK"),
        replace(_DB, shape="D"),
        _RULE,
        _COUNTERS,
    )),
    Op("clip_examples",
        "the rows of all dz times min(1, clip / norm) with the norm of the row's gradient by all trained parameters: "
        "norm**2 is the sum over layers of |dz|**2 * (|x|**2 with a trained w + 1 with a trained b)", (
        Operand("layers", fields=(
            replace(_LAYER[0], use=UPDATED),
            *_LAYER[1:-1],
            Operand("w_trained", note="bool"),
            Operand("b_trained", note="bool"),
        )),
        Operand("clip", note="float: the largest norm"),
        _COUNTERS,
    )),
    Op("perturb",
        "start = x + d within the bounds, d being 0 or random; or adv = x + d, d being adv - x and a step in the "
        "direction of dx, brought back to norm eps. The direction is sign(dx) in the norm inf, dx / |dx| in the norm 2 "
        "(0 where dx is 0), of each row. Where rows is -1, zeros", (
        _ROWS,
        Operand("x", "MK", "compute", rows="rows"),
        Operand("start", "MK", "compute", WRITTEN, optional=True, note="random as philox.uniform says"),
        Operand("dx", "MK", "compute", optional=True, note="with adv: the gradient by the moved inputs"),
        Operand("adv", "MK", "compute", UPDATED, optional=True, note="in place of start"),
        Operand("change", note="Perturbation"),
        _COUNTERS,
    )),
    Op("grad_weight",
        "dw = dz.T @ x, db = sum over rows of dz, for all layers; with rule.accumulate k > 1 added to what is "
        "there, unless counters[BATCH_INDEX] is a multiple of k", (
        Operand("layers", fields=(
            *_LAYER,
            _FACTORS,
            Operand("w", "NK", optional=True, note="with r"),
            _DW,
            _DB,
            _FACTOR_GRADIENT,
        )),
        replace(_DSLOPES, fields=(*_DSLOPES.fields, Operand("grad", "1", use=WRITTEN, kind="gradient"))),
        _RULE,
        _COUNTERS,
        Operand(
            "norm", "1", "float64", WRITTEN, optional=True, hidden=True,
            note="the Euclidean norm of all gradients, for backends with Traits.norms_gradients",
        ),
        *_PARTS,
    )),
    Op("grad_weight_update",
        "grad_weight and update in one, gradients never stored; advances the clock; without clipping and "
        "accumulation", (
        Operand("layers", fields=(
            *_LAYER,
            replace(_DW, name="w", use=UPDATED, kind="parameter"),
            replace(_DB, name="b", use=UPDATED, kind="parameter"),
            _STATE,
            replace(_STATE, name="b_state", shape="N"),
            _TENSOR_RULE,
            replace(_TENSOR_RULE, name="b_rule"),
            Operand("w_shadow", "NK", "compute", WRITTEN, kind="shadow", optional=True, note="w, rounded"),
        )),
        replace(_DSLOPES, fields=(
            *_DSLOPES.fields,
            Operand("param", "1", use=UPDATED, kind="parameter"),
            Operand("state", "1", use=UPDATED, kind="state", several=True),
            Operand("rule", note="TensorRule"),
        )),
        *_CLOCK,
    )),
    Op("update",
        "the optimizer over the flat arenas, by the mean of the accumulated gradients, where "
        "counters[BATCH_INDEX] + 1 is a multiple of rule.accumulate; clips by the global norm; advances the clock", (
        Operand("params", "A", use=UPDATED, kind="parameter"),
        _GRADS,
        Operand("states", "A", use=UPDATED, kind="state", several=True),
        Operand("segments", note="Segments by offset; between them lie zeros (alignment) and frozen tensors"),
        *_CLOCK,
        Operand("norm", "1", "float64", optional=True, hidden=True, note="what grad_weight has written"),
        Operand("shadow", "A", "compute", WRITTEN, kind="shadow", optional=True, note="params, rounded"),
        Operand(
            "scaled", optional=True, default=False,
            note="True: the gradients carry hyper[LOSS_SCALE]. Where they overflow nothing is updated, the "
            "batch is skipped and the scale halved; after GROWTH_INTERVAL updates without one it is doubled",
        ),
        Operand(
            "noise", optional=True,
            note="Noise, before the optimizer's rule; without accumulation and clip_norm. Tensor i of philox.normal is "
            "that of segment i",
        ),
        Operand(
            "rows", "B", "int64", optional=True, hidden=True,
            note="with noise: those of the calls, of all batches. The clock counts the rows of the next batch, without "
            "-1 at its end",
        ),
        *_PARTS,
    )),
    Op("advance", "the clock alone, for a network with nothing to train", _CLOCK),
    Op("all_reduce",
        "the sum over all ranks of what each has of the gradients and the statistics of a batch; with rule.accumulate "
        "k > 1 the gradients are added to what is there, unless counters[BATCH_INDEX] is a multiple of k", (
        _GRADS, _STATS, _RULE, _COUNTERS,
    )),
    Op("penalty",
        "dw += the gradient of the penalty of ridge, for all layers, before dw is clipped; the penalty is added to "
        "stats[PENALTIES], times the rows of the batch", (
        Operand("layers", fields=(Operand("w", "NK"), Operand("dw", "NK", use=UPDATED, kind="gradient"), _CODING)),
        Operand("ridge", note="Ridge"),
        _COUNTERS,
        _STATS,
    )),
    Op("predict_narrow", "linear of all layers, with nothing stored in between", (
        Operand("x", "MK", "compute"),
        Operand("layers", note="from the first to the output layer", fields=_NARROW),
        Operand("y", "MN", "compute", WRITTEN),
    )),
    Op("train_narrow",
        "a step up to its update: linear and the loss, grad_input and grad_weight, with nothing stored in between. "
        "Part p of the gradients, of parts, is the sum over the groups of rows p, p + parts and so on", (
        _ROWS,
        Operand("x", "MK", "compute", rows="rows"),
        Operand("layers", note="from the first to the output layer", fields=(*_NARROW, _DW, _DB)),
        *(operand for operand in _LOSS if operand.name in _PLAIN_LOSS),
        _RULE,
        *_PARTS,
    )),
    Op("train_resident",
        "the calls of a training step, as many times as the bound callable is told; walks rows", (
        Operand("calls", note="(op, operands) of each call of a step; the output layer has no dropout"),
        Operand("rows", dtype="int64", note="(R,): those of the calls, of all batches and epochs"),
        Operand("batch", note="M, the rows of a step"),
        _ARENAS,
        _HISTORY,
        _PLAN,
        Operand(
            "shards", optional=True, default=(),
            note="the row of the batch with which each of several shards of M rows begins: the calls are those of the "
            "shards one after another, up to grad_weight. Normalisers are of the whole batch, of counters[ROW_COUNT] "
            "rows, and so are the row numbers of random masks. A shard gives the same bits whatever others there are",
        ),
    )),
    Op("train_fleet",
        "train_resident of several models in one launch; the bound callable is told the steps of each model, and "
        "models with 0 are no part of the launch", (
        Operand(
            "calls",
            note="the calls of each model: the same ops over one data set, arrays of the same shapes. Model "
            "m's array lies m times as far from that of model 0 as model 1's, and every number may differ: "
            "seeds, rates, slopes, rules, the loss's smoothing, ridges",
        ),
        Operand("rows", dtype="int64", note="(models, R)"),
        Operand("batch", note="M"),
        replace(_ARENAS, note="as in train_resident, with an axis of models in front"),
        replace(_HISTORY, note="(models, E, STATS), as in train_resident"),
        _PLAN,
    )),
)}
# fmt: on
