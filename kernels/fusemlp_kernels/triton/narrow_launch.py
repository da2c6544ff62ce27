"""Binding the forward and the backward pass of a narrow network as one launch: ``train_narrow``."""

from __future__ import annotations

import itertools
from types import SimpleNamespace

from fusemlp_kernels.checks import binds
from fusemlp_kernels.contract import ACTIVATIONS, HYPER, LOSSES, STATS
from fusemlp_kernels.errors import ArgumentError, BackendUnavailableError
from fusemlp_kernels.triton import configs, narrow
from fusemlp_kernels.triton.grouped import keeping
from fusemlp_kernels.triton.launch import Run, Tensor, TritonDevice, is_aligned
from fusemlp_kernels.triton.layers import loss_settings, target_arguments


def _check(call: SimpleNamespace, widest: int) -> None:
    """Raise ArgumentError for layers or arrays that the kernel does not take."""
    layers = call.layers
    hidden = {(layer.activation, layer.slope) for layer in layers[:-1]}
    if not 2 <= len(layers) <= narrow.MOST_LAYERS.value + 1 or len(hidden) != 1:
        raise ArgumentError(
            f"train_narrow: layers: expected 1 to {narrow.MOST_LAYERS.value} hidden layers of one activation, and an "
            f"output layer; got {', '.join(layer.activation for layer in layers) or 'none'}. Run the calls one by one"
        )
    if max(call.K, *(layer.N for layer in layers)) > widest:
        raise ArgumentError(
            f"train_narrow: layers: expected at most {widest} inputs and units; run the calls one by one"
        )
    for index, (below, above) in enumerate(itertools.pairwise(layers)):
        if below.N != above.K:
            raise ArgumentError(
                f"train_narrow: layers[{index + 1}]: w: expected {below.N} columns, as layer {index} has outputs, got "
                f"{above.K}"
            )
    if (call.K, call.target.shape[1] if call.target.ndim == 2 else layers[-1].N) != (layers[0].K, layers[-1].N):
        raise ArgumentError(
            f"train_narrow: x, target: expected {layers[0].K} inputs and {layers[-1].N} outputs, got {call.K} and "
            f"{tuple(call.target.shape)}"
        )
    matrices = {"x": call.x} | ({"target": call.target} if call.target.ndim == 2 else {})
    matrices |= {f"layers[{index}]: {name}": matrix for index, layer in enumerate(layers) for name, matrix in (
        ("w", layer.w), ("dw", layer.dw)) if matrix is not None}  # fmt: skip
    for name, matrix in matrices.items():
        rows, columns = matrix.shape
        dense = name in ("x", "target") or rows <= 1 or matrix.stride(0) == -(-columns // 8) * 8
        if not (is_aligned(matrix) and dense):
            raise ArgumentError(
                f"train_narrow: {name}: expected rows of a multiple of 8 elements with zeros after their end, got "
                f"strides {matrix.stride()}; Backend.view makes such a matrix"
            )


def _table(call: SimpleNamespace, base: Tensor) -> list[list[int]]:
    """The rows of ``narrow.LAYER_FIELDS``."""

    def place(gradient: Tensor | None) -> int:
        if gradient is None:
            return -1
        element = (gradient.data_ptr() - base.data_ptr()) // gradient.element_size()
        if gradient.ndim == 2 and element % 8:
            raise ArgumentError(
                f"train_narrow: layers: dw: expected a multiple of 8 elements from the first one on, got {element}"
            )
        return element

    fields = ({"inputs": one.K, "units": one.N, "dw": place(one.dw), "db": place(one.db)} for one in call.layers)
    return [[row.get(name, 0) for name in narrow.LAYER_FIELDS] for row in fields]


@binds("train_narrow")
def bind_train_narrow(device: TritonDevice, call: SimpleNamespace) -> Run:
    """The contract's ``train_narrow``."""
    tile = configs.narrow_tile(device.arch, device.precision)
    if tile is None:
        raise BackendUnavailableError(
            f"train_narrow: there is no kernel for {device.precision} on {device.arch.family}; run the calls one by one"
        )
    _check(call, tile.columns)
    layers, loss = call.layers, call.loss
    hidden, output = layers[0], layers[-1]
    call.N = output.N
    gradients = [gradient for one in layers for gradient in (one.dw, one.db) if gradient is not None]
    spare = device.zeros(8, "real")
    base = min(gradients, key=lambda gradient: gradient.data_ptr(), default=spare)
    # of the layers that there are not, those of the first
    filled = [*layers[:-1], *[hidden] * (narrow.MOST_LAYERS.value + 1 - len(layers)), output]
    targets = target_arguments(device, call)
    arguments = {
        "x": call.x, "x_row": call.x.stride(0), "M": call.M,
        **{f"{name}{index}": getattr(one, name) for index, one in enumerate(filled) for name in "wb"},
        "grads": device.far_base(base), "part": call.part, "layers": device.numbers(_table(call, base), "int64"),
        "rows": device.zeros(1, "int64") if call.rows is None else call.rows,
        **{name: value for name, value in targets.items() if name != "target_col"},
        "stats": device.zeros(STATS, "float64") if call.stats is None else call.stats, "dslope": spare,
        "settings": device.numbers(loss_settings(loss, call), "real"), "hyper": device.zeros(HYPER, "float64"),
        "counters": call.counters, "partials": device.zeros(5 * call.parts, "float64"),
        "ticket": device.zeros(1, "int32"), "programs": call.parts,
        "slope": float(hidden.slope), "output_slope": float(output.slope),
    }  # fmt: skip
    if loss.ignore_index is None:
        # no label
        arguments |= {"ignored_low": -1, "ignored_high": -1}
    constants = {
        **configs.narrow_constants(tile, [hidden.K, *(one.N for one in layers)]),
        "ACTIVATION": ACTIVATIONS.index(hidden.activation), "OUTPUT": ACTIVATIONS.index(output.activation),
        "LOSS": LOSSES.index(loss.kind), "SOFT": loss.soft, "GATHER": int(call.rows is not None),
        "WEIGHTED": call.weight is not None, "CLASSES": call.class_weight is not None, "ACCURACY": loss.accuracy,
        "PRODUCT": device.product,
    }  # fmt: skip
    return keeping(call, device.launch(narrow.narrow_kernel, call.parts, arguments, constants, tile), call.parts)
