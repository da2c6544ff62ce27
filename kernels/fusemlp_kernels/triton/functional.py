"""The kernels as functions of torch tensors: for one call, a notebook, or a check against another implementation.

    from fusemlp_kernels.triton import functional as F
    loss, dz = F.linear_loss_grad(x, w, b, labels)

Each function checks its arguments, allocates its outputs, starts its kernel on the current stream and returns without
waiting. Notation: M batch rows, K inputs, N outputs of a layer; weights are (N, K); act is the layer's activation and
z = x @ w.T + b. "compute" is the type of x: float32, float16 or bfloat16; biases, slopes, targets, weights of rows,
parameters and states are float32, labels and row numbers int64. Tensors may have any strides. The kernels read whole
vectors from matrices with a width that is a multiple of 8 and rows that start at multiples of 16 bytes.

All raise ArgumentError or ShapeError (both ValueError) and DTypeError (TypeError) before anything is started, and
BackendUnavailableError without a GPU for it.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from fusemlp_kernels.checks import checked
from fusemlp_kernels.clock import hyper_at, rate_table
from fusemlp_kernels.contract import (
    BATCH_INDEX,
    COUNTERS,
    LAST_LOSS,
    NEEDS_Z,
    ROW_COUNT,
    UPDATE_COUNT,
    Dropout,
    LossSpec,
    Segment,
    TensorRule,
    UpdateRule,
)
from fusemlp_kernels.errors import ArgumentError, ArgumentTypeError, DTypeError
from fusemlp_kernels.ops import FIXED, OPS, UPDATED
from fusemlp_kernels.triton.backend import BINDERS, open_device
from fusemlp_kernels.triton.launch import Tensor, TritonDevice, is_interpreted

PRECISIONS = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}


def _device(op: str, name: str, tensor: Any, tf32: bool = False) -> TritonDevice:
    """The device of a tensor, with the kernels for its type."""
    if not isinstance(tensor, Tensor):
        raise ArgumentTypeError(f"{op}: {name}: expected a torch tensor, got {type(tensor).__name__}")
    if tensor.dtype not in PRECISIONS:
        raise DTypeError(
            f"{op}: {name}: expected float32, float16 or bfloat16, got {tensor.dtype}; convert it with {name}.float()"
        )
    if tensor.device.type == "cpu" and not is_interpreted():
        raise ArgumentError(
            f"{op}: {name}: is on the CPU and the kernels run on a GPU; move it with {name}.cuda(), or set "
            "TRITON_INTERPRET=1 before Python starts"
        )
    precision = PRECISIONS[tensor.dtype]
    if tf32 and precision != "fp32":
        raise ArgumentError(f"{op}: tf32: is a way to multiply float32, and {name} is {tensor.dtype}")
    return open_device(str(tensor.device), "tf32" if tf32 else precision)


def _counters(device: TritonDevice, batch_index: int = 0, row_count: int = 0, update_count: int = 0) -> Tensor:
    counters = torch.zeros(COUNTERS, dtype=torch.int64)
    counters[BATCH_INDEX], counters[ROW_COUNT], counters[UPDATE_COUNT] = batch_index, row_count, update_count
    return counters.to(device.device)


def _clock(
    device: TritonDevice, rule: UpdateRule, lr: float, update_count: int, batch_index: int = 0
) -> dict[str, Any]:
    """hyper, rates and counters of one update at the learning rate ``lr`` after ``update_count`` others."""
    host = {"hyper": hyper_at(rule, lr, update_count), "rates": rate_table(rule, [lr], update_count)}
    counters = _counters(device, batch_index=batch_index, update_count=update_count)
    return {**{name: torch.from_numpy(array).to(device.device) for name, array in host.items()}, "counters": counters}


def _call(op: str, names: Sequence[str], arguments: Mapping[str, Any]) -> tuple[Tensor, ...]:
    """Start ``op`` on the device of the first of the arguments of a function below; returns the outputs ``names``."""
    known, first = OPS[op].by_name, next(iter(arguments))
    device = _device(op, first, arguments[first], arguments.get("tf32", False))
    operands = {name: value for name, value in arguments.items() if name in known}
    if isinstance(operands["slope"], Tensor):
        operands["slope_param"] = operands.pop("slope")
    if isinstance(operands.get("loss"), str):
        operands["loss"] = LossSpec(operands["loss"])
    if "x_rows" in known:
        operands["x_rows"] = operands["rows"]
    call = checked(op, operands, device.check, (*names, "counters"))
    for name in names:
        make = torch.zeros if known[name].use == UPDATED else torch.empty
        shape = [FIXED.get(letter) or getattr(call, letter) for letter in known[name].shape or ""]
        setattr(call, name, make(shape, dtype=device.dtype(known[name].dtype), device=device.device))
    call.counters = _counters(device, batch_index=arguments.get("batch_index", 0), row_count=call.M)
    inspect.unwrap(BINDERS[op])(device, call)()
    return tuple(getattr(call, name) for name in names)


def linear(
    x: Tensor,
    w: Tensor,
    b: Tensor,
    activation: str = "identity",
    *,
    slope: float | Tensor = 0.0,
    rows: Tensor | None = None,
    dropout: Dropout | None = None,
    batch_index: int = 0,
    return_z: bool = False,
    tf32: bool = False,
) -> Any:
    """y = dropout(act(x @ w.T + b)), (M, N) compute.

    x (M, K) or, with ``rows`` (M,), x[rows] of x (n, K), zeros where a row is -1; w (N, K); b (N,). ``slope`` is leaky
    relu's number or prelu's tensor (1,). The mask of ``dropout`` is that of ``batch_index``. ``return_z`` (gelu, silu,
    prelu): (y, z). ``tf32``: one TF32 product in place of three.
    """
    if return_z and activation not in NEEDS_Z:
        raise ArgumentError(f"linear: return_z: is for {', '.join(sorted(NEEDS_Z))}; {activation} has no use for it")
    outputs = _call("linear", ("y", "z") if return_z else ("y",), locals())
    return outputs if return_z else outputs[0]


def loss_grad(
    z: Tensor,
    target: Tensor,
    loss: LossSpec | str = "cross_entropy",
    *,
    activation: str = "identity",
    slope: float | Tensor = 0.0,
    weight: Tensor | None = None,
    class_weight: Tensor | None = None,
    rows: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The loss of act(z), a 0-d float64 tensor, and dz = d loss / d z (M, N) compute; ``reference.loss_grad`` defines
    them.

    z (M, N); target (M,) labels, or (M, N) values or probabilities (``LossSpec.soft``); weight (M,); class_weight (N,);
    with ``rows`` (M,) target and weight are those of n examples, of which the rows are taken. Any N.
    """
    stats, dz = _call("loss_grad", ("stats", "dz"), locals())
    return stats[LAST_LOSS], dz


def linear_loss_grad(
    x: Tensor,
    w: Tensor,
    b: Tensor,
    target: Tensor,
    loss: LossSpec | str = "cross_entropy",
    *,
    activation: str = "identity",
    slope: float | Tensor = 0.0,
    weight: Tensor | None = None,
    class_weight: Tensor | None = None,
    rows: Tensor | None = None,
    tf32: bool = False,
) -> tuple[Tensor, Tensor]:
    """``linear`` and ``loss_grad`` in one kernel; the logits stay in registers. N is at most 256.

    x (M, K), w (N, K), b (N,), target as in ``loss_grad``; ``rows`` picks the rows of x, target and weight.
    """
    stats, dz = _call("linear_loss_grad", ("stats", "dz"), locals())
    return stats[LAST_LOSS], dz


def grad_input(
    dz: Tensor,
    w: Tensor,
    y: Tensor,
    activation: str = "identity",
    *,
    slope: float | Tensor = 0.0,
    z: Tensor | None = None,
    dropout: Dropout | None = None,
    batch_index: int = 0,
    tf32: bool = False,
) -> Any:
    """dz of the previous layer, (M, K) compute: (dz @ w) * keep / (1 - p) * act'(z_prev).

    dz (M, N); w (N, K); y (M, K) the previous layer's output after its dropout, whose activation it is; z (M, K) its
    pre-activation, for gelu, silu and prelu. For prelu, whose slope is a tensor (1,): (dz_prev, dslope (1,)).
    """
    outputs = _call("grad_input", ("dz_prev", "dslope") if activation == "prelu" else ("dz_prev",), locals())
    return outputs if activation == "prelu" else outputs[0]


def grad_weight(dz: Tensor, x: Tensor, *, rows: Tensor | None = None, tf32: bool = False) -> tuple[Tensor, Tensor]:
    """dw = dz.T @ x (N, K) and db = the sums of dz's columns (N,), float32.

    dz (M, N); x (M, K), or with ``rows`` (M,) x[rows] of x (n, K), zeros where a row is -1.
    """
    op = "grad_weight"
    device = _device(op, "dz", dz, tf32)
    given = {"layers": [{"dz": dz, "x": x, "rows": rows}], "rule": UpdateRule("sgd"), "counters": _counters(device)}
    call = checked(op, given, device.check, ("dw", "db"))
    (layer,) = call.layers
    layer.dw = torch.empty(layer.N, layer.K, device=device.device)
    layer.db = torch.empty(layer.N, device=device.device)
    inspect.unwrap(BINDERS[op])(device, call)()
    return layer.dw, layer.db


def grad_weight_update(
    dz: Tensor,
    x: Tensor,
    w: Tensor,
    b: Tensor,
    rule: UpdateRule,
    lr: float,
    *,
    w_state: Sequence[Tensor] = (),
    b_state: Sequence[Tensor] = (),
    tensor: TensorRule | None = None,
    update_count: int = 0,
    rows: Tensor | None = None,
    tf32: bool = False,
) -> None:
    """``grad_weight`` and the optimizer in one kernel: w (N, K), b (N,) and their states are updated in place.

    The gradients are never stored. ``rule`` is the optimizer (no clipping, no accumulation), ``lr`` the learning rate,
    ``update_count`` how many updates were before; w_state and b_state hold none, one (momentum) or two (Adam) tensors
    like the parameter.
    """
    op = "grad_weight_update"
    device = _device(op, "dz", dz, tf32)
    layer = {
        "dz": dz, "x": x, "w": w, "b": b, "rows": rows, "w_state": tuple(w_state), "b_state": tuple(b_state),
        "w_rule": tensor, "b_rule": tensor,
    }  # fmt: skip
    BINDERS[op](device, layers=[layer], rule=rule, **_clock(device, rule, lr, update_count))()


def update(
    params: Tensor,
    grads: Tensor,
    rule: UpdateRule,
    lr: float,
    *,
    states: Sequence[Tensor] = (),
    tensor: TensorRule | None = None,
    update_count: int = 0,
) -> None:
    """The optimizer on a flat arena: params (size,) and ``states`` are updated in place by grads (size,), all float32
    and contiguous, at the learning rate ``lr``. With ``rule.clip_norm`` a kernel of its own takes the gradient's norm
    first."""
    device = _device("update", "params", params)
    segments = (Segment(0, params.numel(), TensorRule() if tensor is None else tensor),)
    # the batch that ends an accumulation, so that the update is applied
    clock = _clock(device, rule, lr, update_count, batch_index=rule.accumulate - 1)
    operands = {"params": params, "grads": grads, "states": tuple(states), "segments": segments, "rule": rule}
    BINDERS["update"](device, **operands, **clock)()
