"""Dropout masks of several models: ``philox.dropout_keep``, each with its own seed, rate and batch index."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from fusemlp_kernels.contract import Dropout
from fusemlp_kernels.numpy.activations import Array
from fusemlp_kernels.philox import KEY_STEPS, LANES, MULTIPLIERS, ROUNDS, WORD, seed_key, threshold


class Masks:
    """Masks of one layer, (rows, columns) each, again and again, without allocating."""

    def __init__(self, dropouts: Sequence[Dropout], rows: int, columns: int) -> None:
        models, blocks = len(dropouts), -(-columns // LANES)
        self._columns = columns
        shape = (models, rows, blocks)
        seeds = [seed_key(dropout.seed) for dropout in dropouts]
        self._keys = [
            [
                np.array([(key[half] + turn * step) & WORD for key in seeds], np.uint64).reshape(-1, 1, 1)
                for half, step in enumerate(KEY_STEPS)
            ]
            for turn in range(ROUNDS)
        ]
        thresholds = [threshold(dropout.rate) for dropout in dropouts]
        # a rate that rounds to one drops everything, and has no 16-bit threshold
        self._without = [place for place, least in enumerate(thresholds) if least == 1 << 16]
        self._thresholds = np.array([least % (1 << 16) for least in thresholds], np.uint16).reshape(-1, 1, 1)
        self._multipliers = [np.array(multiplier, np.uint64) for multiplier in MULTIPLIERS]
        self._low, self._half = np.array(WORD, np.uint64), np.array(32, np.uint64)
        self._block = np.arange(blocks, dtype=np.uint64)
        self._row = np.arange(rows, dtype=np.uint64)[:, None]
        self._layer = np.array(dropouts[0].layer & WORD, np.uint64)
        self._batch = np.empty((models, 1, 1), np.uint64)
        self._words = [np.empty(shape, np.uint64) for _ in range(4)]
        self._products = [np.empty(shape, np.uint64) for _ in range(2)]
        self._lanes = np.empty((*shape, 4), np.uint32)
        self._halves = self._lanes.view(np.uint16).reshape(models, rows, LANES * blocks)
        self._kept = np.empty(self._halves.shape, np.bool_)

    def fill(self, keep: Array, batch_indices: Sequence[int]) -> None:
        """Write the masks into ``keep`` (models, rows, columns) bool."""
        self._batch[:, 0, 0] = [index & WORD for index in batch_indices]
        words = self._words
        for word, start in zip(words, (self._block, self._row, self._layer, self._batch), strict=True):
            np.copyto(word, start)
        first, second = self._products
        for keys in self._keys:
            np.multiply(words[0], self._multipliers[0], out=first)
            np.multiply(words[2], self._multipliers[1], out=second)
            np.right_shift(second, self._half, out=words[0])
            np.bitwise_xor(words[0], words[1], out=words[0])
            np.bitwise_xor(words[0], keys[0], out=words[0])
            np.bitwise_and(second, self._low, out=words[1])
            np.right_shift(first, self._half, out=words[2])
            np.bitwise_xor(words[2], words[3], out=words[2])
            np.bitwise_xor(words[2], keys[1], out=words[2])
            np.bitwise_and(first, self._low, out=words[3])
        for place, word in enumerate(words):
            np.copyto(self._lanes[..., place], word, casting="same_kind")
        np.greater_equal(self._halves, self._thresholds, out=self._kept)
        np.copyto(keep, self._kept[..., : self._columns])
        for model in self._without:
            keep[model] = False
