"""Transfer learning: start from the layers of another network, freeze or slow them, train the others first."""

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, TypeVar

from fusemlp.describe.checks import as_count, as_number
from fusemlp.describe.conflicts import check_together, in_use
from fusemlp.describe.network import ALIKE, MLP, layer_of, names_in_sequence
from fusemlp.describe.optimizers import NO_OPTIONS, Optimizer, ParameterOptions
from fusemlp.inputs.arrays import Array, to_array
from fusemlp.inputs.examples import are_batches
from fusemlp.runtime.plans import has_plan, was_asked
from fusemlp.runtime.scaling import MEAN, SCALE
from fusemlp.training.trainer import Trainer
from fusemlp_kernels.errors import ArgumentError, ShapeError

Probed = TypeVar("Probed", bound=Trainer)


def shifted(tensors: Mapping[str, Any], layers: int) -> dict[str, Any]:
    """Return tensors, by the names of a network's parameters, as those of ``layers`` layers further on."""
    return {
        re.sub(r"^\d+", lambda number: str(int(number[0]) + 2 * layers), name): tensor
        for name, tensor in tensors.items()
    }


def by_layers(optimizer: Optimizer, net: MLP, *, freeze: int = 0, layer_decay: float = 1.0) -> Optimizer:
    """Return ``optimizer`` with the first ``freeze`` layers of ``net`` frozen and a learning rate for each layer.

    The last layer keeps the rate, and each layer before it has ``layer_decay``, above 0 and at most 1, times the rate
    of the next one (discriminative fine-tuning: Howard and Ruder, Universal language model fine-tuning, 2018, with
    1 / 2.6). The factors multiply those of ``per_parameter``, and what is frozen there stays frozen.

    Raises ArgumentError if no layer would be trained or the factor is out of range.
    """
    last = net.layers - 1
    if as_count("freeze", freeze, minimum=0) > last:
        expected = f"0 to {last}, since the last of the {net.layers} layers is trained"
        raise ArgumentError(f"freeze: expected {expected}, got {freeze}")
    factor = as_number("layer_decay", layer_decay, low=0.0, high=1.0, low_open=True)
    changed: dict[str, ParameterOptions] = {}
    for name in net.parameter_shapes():
        before, layer = optimizer.own_options(name), layer_of(name)
        trainable, lr_factor = before.trainable and layer >= freeze, before.lr_factor * factor ** (last - layer)
        options = replace(before, trainable=trainable, lr_factor=lr_factor)
        if options != NO_OPTIONS:
            changed[name] = options
    return replace(optimizer, per_parameter=changed)


def network_from(known: MLP | None, net: Any, layers: int | None, head: Any) -> tuple[MLP, int | None]:
    """Return the new network and the layers to keep, None for those that the parameters tell.

    ``known`` is the source's network, None for parameters alone; the others are those of ``Engine.from_pretrained``.
    """
    if (known is None) != isinstance(net, MLP) or (known is None and head is not None):
        raise ArgumentError(
            f"net: parameters alone need their network, net=MLP([784, 128, 10], activation='relu'), and no head; other "
            f"sources have one, and take head=10 for a new output layer; got net={net!r}, head={head!r}"
        )
    for network in (known, net):
        if network is not None:
            network.check_single("source" if network is known else "net", "transfer")
    count = None if layers is None else as_count("layers", layers, minimum=1)
    if known is None:
        return net, count
    if head is None:
        return known, known.layers if count is None else count
    widths = [as_count("head", width) for width in (head if isinstance(head, list | tuple) else (head,))]
    kept = known.layers - 1 if count is None else min(count, known.layers)
    if not kept or not widths:
        expected = "the width of at least an output layer, and a source with layers before it"
        raise ArgumentError(f"head: expected {expected}, got {head!r} for {known!r}")
    return known.part(0, kept, *widths), kept if count is None else count


def in_sequence(state: Mapping[str, Any]) -> dict[str, Any]:
    """Return the parameters of an ``nn.Sequential`` by the names of this package: see ``names_in_sequence``."""
    scale = {name: state[name] for name in (MEAN, SCALE) if name in state}
    arrays = {str(name): to_array(f"source[{name!r}]", array) for name, array in state.items() if name not in scale}
    names = names_in_sequence({name: array.shape for name, array in arrays.items()})
    return {**{names[name]: array for name, array in arrays.items()}, **scale}


def taken_over(net: MLP, state: Mapping[str, Any], layers: int | None) -> tuple[dict[str, Array], int]:
    """Return the parameters of the first ``layers`` layers of ``net`` in ``state``, with the scale of the inputs.

    None: of all layers if the last of ``net`` has the shape of the last in ``state``, else of all but that one. The
    number of layers is returned too. Raises ArgumentError for missing parameters, ShapeError for other shapes.
    """
    parameters = {name: array for name, array in state.items() if name not in (MEAN, SCALE)}
    shapes, count = net.parameter_shapes(), 1 + max(map(layer_of, parameters))
    if layers is None:
        last = f"{2 * count - 2}.weight"
        layers = count if count == net.layers and parameters[last].shape == shapes[last] else count - 1
    most = min(count, net.layers)
    if not 1 <= layers <= most:
        raise ArgumentError(f"layers: expected 1 to {most}, which source and network have, got {layers}")
    wanted = {name: shape for name, shape in shapes.items() if layer_of(name) < layers}
    differ = {name for name in parameters if layer_of(name) < layers} ^ set(wanted)
    if differ:
        raise ArgumentError(f"source: source or network lacks {', '.join(sorted(differ))}; {ALIKE}")
    present = {name: tuple(parameters[name].shape) for name in wanted}
    other = {name: shape for name, shape in present.items() if shape != wanted[name]}
    if other:
        differences = ", ".join(f"{name} is {shape} and in net {wanted[name]}" for name, shape in other.items())
        first = min(map(layer_of, other))
        widths = [
            parameters["0.weight"].shape[1],
            *(parameters[f"{2 * layer}.weight"].shape[0] for layer in range(layers)),
        ]
        mend = f"; or keep the layers before them alone, layers={first}" if first else ""
        raise ShapeError(f"source: {differences}; let the widths of net begin with {widths}{mend}")
    return {name: state[name] for name in (*wanted, MEAN, SCALE) if name in state}, layers


@contextmanager
def probing(
    engine: Probed, X: Any, y: Any, layers: int | None, validation_data: Any, adversarial: Any
) -> Iterator[tuple[Probed, Array, Any]]:
    """Yield an engine of the layers after the first ``layers``, its rows and its validation data; see ``Engine.probe``.

    The engine takes over what that one has learned at the end.
    """
    net = engine.network
    batches = y is None or are_batches(X) or (validation_data is not None and are_batches(validation_data))
    check_together({**engine.uses, **in_use(probe=True, adversarial=adversarial, batches=batches or None)})
    kept = net.layers - 1 if layers is None else as_count("layers", layers)
    if not 1 <= kept < net.layers:
        reason = f"so that some of the {net.layers} layers stay and some are trained"
        raise ArgumentError(f"layers: expected 1 to {net.layers - 1}, {reason}, got {kept}")

    def later(named: Mapping[str, Any]) -> dict[str, Any]:
        return shifted({name: value for name, value in named.items() if layer_of(name) >= kept}, -kept)

    head = net.part(kept, net.layers)
    traits = engine.memory.backend.traits
    keeps_plan = was_asked(engine.plan_reason) and has_plan(traits, engine.plan, head, engine.precision)
    tail = engine.like(
        type(engine),
        net=head,
        optimizer=replace(engine.optimizer, per_parameter=later(dict(by_layers(engine.optimizer, net).per_parameter))),
        plan=engine.plan if keeps_plan else "auto",
        # scaled by the layers before
        normalise=False,
    )
    start = engine.memory.tensors()
    tail.memory.write(later(start))
    rows = engine.inputs.features("X", X, codes=True)
    scale = engine.scaling.scale
    engine.scaling.warn("X", rows)
    engine.scaling.measure(rows)
    try:
        if isinstance(validation_data, tuple | list) and validation_data:
            Xv, *others = validation_data
            held = engine.inputs.features("validation_data[0]", Xv, codes=True)
            validation_data = (engine.inference.outputs_of(held, kept), *others)
        yield tail, engine.inference.outputs_of(rows, kept), validation_data
    finally:
        if tail.history is None:
            # an argument was wrong: nothing has changed
            engine.scaling.scale = scale
        else:
            engine.memory.write({**start, **shifted(tail.memory.tensors(), kept)})
            engine.merged = None
