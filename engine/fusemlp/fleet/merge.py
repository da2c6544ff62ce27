"""An ensemble as one network: what takes a network takes the ensemble too."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from fusemlp.describe.network import MLP
from fusemlp.engine import Engine
from fusemlp.inputs.arrays import Array
from fusemlp_kernels.errors import ArgumentError


def merged(engines: Sequence[Engine]) -> Engine:
    """Return an engine whose last layer computes the mean of what the engines' last layers do, before its activation.

    The hidden layers lie side by side: the first stacks the rows of the weights, those between have the members'
    weights as blocks on the diagonal, the last has them in one row, divided by the number of members. For a regression
    the prediction is the mean; for classes the probabilities are the geometric mean, made to add up to 1. Dropout is
    left out. Raises ArgumentError for prelu, whose slope belongs to a whole layer.
    """
    first = engines[0]
    if len(engines) == 1:
        return first
    count, layers = len(engines), first.network.layers
    states = [engine.state_dict() for engine in engines]
    if any(activation.name == "prelu" for activation in first.network.activations):
        raise ArgumentError("activation: networks with prelu cannot be merged; use leaky_relu")
    inputs, *hidden, outputs = first.network.sizes
    parameters: dict[str, Array] = {}
    for layer in range(layers):
        weights = [state[f"{2 * layer}.weight"] for state in states]
        biases = [state[f"{2 * layer}.bias"] for state in states]
        if layers == 1:
            weight, bias = np.mean(weights, axis=0), np.mean(biases, axis=0)
        elif layer == 0:
            weight, bias = np.concatenate(weights), np.concatenate(biases)
        elif layer < layers - 1:
            weight, bias = _diagonal(weights), np.concatenate(biases)
        else:
            weight, bias = np.concatenate(weights, axis=1) / count, np.mean(biases, axis=0)
        parameters |= {f"{2 * layer}.weight": weight, f"{2 * layer}.bias": bias}
    engine = Engine(
        MLP(
            (inputs, *(count * width for width in hidden), outputs),
            activation=first.network.activations[:-1],
            output_activation=first.network.activations[-1],
            init=first.network.init,
        ),
        loss=first.loss,
        optimizer=first.optimizer,
        batch_size=first.batch_size,
        seed=first.seed,
        backend=first.backend,
        device=first.device,
        precision=first.precision,
    )
    engine.load_state_dict(parameters)
    return engine


def _diagonal(blocks: Sequence[Array]) -> Array:
    """Return a matrix with the blocks, all of one shape, on its diagonal."""
    rows, columns = blocks[0].shape
    matrix = np.zeros((rows * len(blocks), columns * len(blocks)), blocks[0].dtype)
    for place, block in enumerate(blocks):
        matrix[place * rows : (place + 1) * rows, place * columns : (place + 1) * columns] = block
    return matrix
