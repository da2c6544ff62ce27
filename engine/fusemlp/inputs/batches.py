"""Batches from the user, (x, y) or (x, y, sample_weight): a generator, a list, a torch DataLoader, any iterable."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

from fusemlp.describe.checks import as_count
from fusemlp.inputs.arrays import Array
from fusemlp.inputs.blocks import Blocks, Peers
from fusemlp.inputs.targets import Examples, Targets
from fusemlp_kernels.errors import ArgumentError, ArgumentTypeError, DataError

if TYPE_CHECKING:
    from fusemlp.inputs.device import DeviceInputs

MADE = "a generator, a list or a DataLoader of batches (x, y) or (x, y, sample_weight)"


def are_batches(given: Any) -> bool:
    """Return whether ``given`` can only be batches: no array, no tuple or list of arrays."""
    if isinstance(given, tuple | list):
        return isinstance(given, list) and bool(given) and all(isinstance(one, tuple) for one in given)
    if isinstance(given, str | bytes | dict) or hasattr(given, "__array__") or hasattr(given, "__dlpack__"):
        return False
    return hasattr(given, "__iter__") or (hasattr(given, "__getitem__") and hasattr(given, "__len__"))


def holds_batches(refused: Any) -> bool:
    """Return whether what was refused as an array is batches, rather than rows or a matrix that is no array."""
    if isinstance(refused, list):
        return bool(refused) and all(isinstance(one, tuple) and one and np.ndim(one[0]) > 0 for one in refused)
    return are_batches(refused) and not hasattr(refused, "shape")


class Batches:
    """Batches of an iterable, ``steps`` an epoch: by default its length.

    An iterable that can begin again does so after its last batch; Keras's ``on_epoch_end`` of a data set is called
    then. The first batch is read at once, so that a mistake shows before the training. Messages call the iterable
    ``argument`` and its number of steps ``steps_argument``. ``Blocks`` begin with those of epoch ``first_epoch``; of
    several processes each reads its part of them, with ``share``, the arguments of ``Blocks.shared``.

    Raises ArgumentTypeError, ArgumentError if the length is not known, DataError if there is no batch.
    """

    def __init__(
        self,
        argument: str,
        given: Any,
        steps: int | None,
        steps_argument: str,
        first_epoch: int = 0,
        share: tuple[Peers, Callable[[Array], Array]] | None = None,
    ) -> None:
        if isinstance(given, tuple) and given and not isinstance(given[0], tuple | list):
            raise ArgumentTypeError(f"{argument}: got a tuple of {len(given)} arrays; give them one by one: (X, y)")
        if not (are_batches(given) or isinstance(given, tuple | list)):
            raise ArgumentTypeError(
                f"y: it is missing; give {argument} and y, or without y {MADE}, got {type(given).__name__}"
            )
        self.argument, self._given = argument, given
        self._kind = type(given).__name__
        self.steps = self._length(steps_argument) if steps is None else as_count(steps_argument, steps)
        self._iterator: Iterator[Any] | None = None
        # batches read, of this pass and of all
        self._of_pass = self._read = 0
        self._before, self._share = first_epoch * self.steps, share
        self._ahead: tuple[Any, Any, Any] | None = self._pull()
        shape = getattr(self._ahead[0], "shape", None)
        if shape is not None and len(shape) == 1 and hasattr(given, "__getitem__") and not isinstance(given, list):
            raise ArgumentTypeError(
                f"{argument}: {self._kind} yields single rows, of shape {tuple(shape)}; give batches of them: "
                "torch.utils.data.DataLoader(dataset, batch_size=32)"
            )

    def _length(self, steps_argument: str) -> int:
        try:
            steps = len(self._given)
        except TypeError as error:
            raise ArgumentError(
                f"{steps_argument}: a {self._kind} has no length; give the number of batches of an epoch, "
                f"{steps_argument}=100"
            ) from error
        if not steps:
            raise DataError(f"{self.argument}: this {self._kind} holds no batch; give at least one")
        return steps

    def _pull(self) -> tuple[Any, Any, Any]:
        while True:
            if self._iterator is None:
                given = self._given
                if isinstance(given, Blocks):
                    given.seek(self._before + self._read)
                if isinstance(given, Blocks) and self._share is not None:
                    self._iterator = given.shared(*self._share)
                elif hasattr(given, "__iter__"):
                    self._iterator = iter(given)
                else:
                    self._iterator = (given[index] for index in range(len(given)))
                self._of_pass = 0
            try:
                batch = next(self._iterator)
            except StopIteration:
                self._end_pass()
                continue
            self._of_pass += 1
            self._read += 1
            if not isinstance(batch, tuple | list) or len(batch) not in (2, 3):
                several = isinstance(batch, tuple | list)
                described = f"{len(batch)} in a {type(batch).__name__}" if several else type(batch).__name__
                raise ArgumentTypeError(
                    f"{self.argument}: expected batches (x, y) or (x, y, sample_weight), batch {self._read} is "
                    f"{described}"
                )
            return batch[0], batch[1], batch[2] if len(batch) == 3 else None

    def _end_pass(self) -> None:
        """Get ready to begin again, or raise DataError."""
        if self._iterator is self._given or not self._of_pass:
            raise DataError(
                f"{self.argument}: this {self._kind} ended after {self._read} batches, and {self.steps} an epoch are "
                "needed; let it go on (while True), or give an object that can be iterated over again, such as a list"
            )
        self._iterator = None
        ended = getattr(self._given, "on_epoch_end", None)
        if callable(ended):
            ended()

    def skip(self, count: int) -> None:
        """Leave out the next ``count`` batches."""
        for _ in range(count):
            if self._ahead is None:
                self._pull()
            self._ahead = None

    def next(self, inputs: DeviceInputs, *, keep: bool = False) -> Examples:
        """Return the next batch, checked for a network and its loss; with ``keep`` it is the next one again."""
        x, y, weight = self._ahead if self._ahead is not None else self._pull()
        self._ahead = (x, y, weight) if keep else None
        of = f"of batch {self._read}"
        return inputs.examples(x, y, weight, (f"x {of}", f"y {of}", f"sample_weight {of}"))

    def check_alike(self, first: Examples, other: Examples) -> None:
        """Raise DataError unless both have weights or none, and the same kind of targets."""
        if first.targets.soft != other.targets.soft or (first.weight is None) != (other.weight is None):
            raise DataError(
                f"{self.argument}: batch {self._read} has other parts than batch 1; give all batches classes or all "
                "of them rows of probabilities, and weights to all or to none"
            )

    def collected(self, inputs: DeviceInputs) -> Examples:
        """Return copies of the rows of an epoch, in one batch on the host."""
        found: list[Examples] = []
        for _ in range(self.steps):
            # a generator may write into the arrays that it has given away
            found.append(self.next(inputs).map(lambda array: np.array(inputs.on_host(array))))
            self.check_alike(found[0], found[-1])
        weight = None if found[0].weight is None else np.concatenate([one.weight for one in found])
        targets = Targets(np.concatenate([one.targets.values for one in found]), found[0].targets.soft)
        return Examples(np.concatenate([one.X for one in found]), targets, weight)
