"""Rows of codes that stand for rows of inputs, most of which are 0 or 1: the columns of a table, or bags of words.

A first layer that reads codes adds up some rows of a table in place of a product: a word's row of weights, or for a
number in pieces two neighbouring sums of rows. Pieces are the encoding of Gorishniy et al., "On embeddings for
numerical features in tabular deep learning", 2022.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np

from fusemlp_kernels.errors import ArgumentError

Array = np.ndarray[Any, np.dtype[Any]]

# The kinds of columns; a kernel knows each by its place.
NUMBERS, WORD, PIECES, BAG = KINDS = ("numbers", "word", "pieces", "bag")
# The most inputs of a column: codes are numbers of the parameters' type, and float32 counts no further.
MOST_INPUTS = 1 << 24


class Column(NamedTuple):
    """A group of ``inputs`` that one column of a table has, of a kind in ``KINDS``:

    - "numbers": a slot for each input, which holds it.
    - "word": one slot, the index of the input that is 1; -1 for none.
    - "pieces": two slots, k and f. The inputs before k are 1, input k is f, those after it are 0.
    - "bag": ``pairs`` times two slots, an index, -1 for none, and a value. An input is the sum of its values.
    """

    kind: str
    inputs: int
    pairs: int = 0

    @property
    def slots(self) -> int:
        """The numbers of a row that the column takes."""
        return {NUMBERS: self.inputs, WORD: 1, PIECES: 2, BAG: 2 * self.pairs}[self.kind]

    @property
    def sums(self) -> int:
        """The rows of the table that a first layer adds up: of pieces the sums of the weights before each edge."""
        return self.inputs + (self.kind == PIECES)


class Place(NamedTuple):
    """A column among others: its kind's place in ``KINDS``, and its first input, slot and row of sums."""

    kind: int
    inputs: int
    slots: int
    first: int
    slot: int
    sums: int


@dataclass(frozen=True)
class Coding:
    """The columns of rows of codes, (n, ``slots``) real, that stand for inputs (n, ``inputs``).

    Raises ArgumentError for a column of another kind, without inputs or with more than ``MOST_INPUTS``, for a bag
    without pairs, and without columns.
    """

    columns: tuple[Column, ...]

    def __post_init__(self) -> None:
        for column in self.columns:
            kind, inputs, pairs = column
            if kind not in KINDS or not 1 <= inputs <= MOST_INPUTS or (kind == BAG) != (pairs > 0):
                raise ArgumentError(
                    f"columns: expected a kind of {', '.join(KINDS)}, 1 to {MOST_INPUTS} inputs, and pairs for a bag "
                    f"alone, got {column}"
                )
        if not self.columns:
            raise ArgumentError("columns: expected at least one, got none")

    @cached_property
    def places(self) -> tuple[Place, ...]:
        """The place of each column."""
        places, first, slot, sums = [], 0, 0, 0
        for column in self.columns:
            places.append(Place(KINDS.index(column.kind), column.inputs, column.slots, first, slot, sums))
            first, slot, sums = first + column.inputs, slot + column.slots, sums + column.sums
        return tuple(places)

    @cached_property
    def inputs(self) -> int:
        """The inputs that a row stands for."""
        return sum(column.inputs for column in self.columns)

    @cached_property
    def slots(self) -> int:
        """The numbers of a row."""
        return sum(column.slots for column in self.columns)

    @cached_property
    def sums(self) -> int:
        """The rows of the table that a first layer adds up."""
        return sum(column.sums for column in self.columns)

    @cached_property
    def indices(self) -> Array:
        """The (slot, least, greatest) of each slot that holds an index, int64."""
        found = []
        for column, place in zip(self.columns, self.places, strict=True):
            if column.kind != NUMBERS:
                first, step = place.slot, 2 if column.kind == BAG else column.slots
                slots = range(first, first + column.slots, step)
                found += [(slot, -1 if column.kind != PIECES else 0, column.inputs - 1) for slot in slots]
        return np.array(found, np.int64).reshape(-1, 3)

    def dense(self, codes: Array) -> Array:
        """Return the inputs (n, ``inputs``) of rows of codes (n, ``slots``), of their type."""
        inputs = np.zeros((len(codes), self.inputs), codes.dtype)
        rows = np.arange(len(codes))
        for column, place in zip(self.columns, self.places, strict=True):
            part = inputs[:, place.first : place.first + column.inputs]
            cells = codes[:, place.slot : place.slot + column.slots]
            if column.kind == NUMBERS:
                part[:] = cells
            elif column.kind == PIECES:
                part[:] = np.arange(column.inputs) < cells[:, :1]
                part[rows, cells[:, 0].astype(np.int64)] = cells[:, 1]
            else:
                indices = cells[:, :1] if column.kind == WORD else cells[:, ::2]
                values = np.ones_like(indices) if column.kind == WORD else cells[:, 1::2]
                at, pair = np.nonzero(indices >= 0)
                np.add.at(part, (at, indices[at, pair].astype(np.int64)), values[at, pair])
        return inputs
