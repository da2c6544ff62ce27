"""The user's inputs, targets and weights as examples for the kernels: whole arrays, or batches that come one by one.

Arrays on the engine's device are used there without a copy.
A valid array returns as the backend's own array over the same memory. An invalid one, or one that needs a check of
every row, is copied to the host once and passed to the checks of ``arrays``. They raise the same errors as for host
arrays, or return the converted host array.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np

from fusemlp.describe.adversarial import Adversary
from fusemlp.describe.checks import as_count
from fusemlp.describe.conflicts import check_together
from fusemlp.describe.losses import CrossEntropy, Loss, OwnLoss
from fusemlp.describe.network import MLP
from fusemlp.inputs import arrays
from fusemlp.inputs.arrays import Array
from fusemlp.inputs.blocks import Blocks, Peers
from fusemlp.inputs.columns import Columns, codes_of, coding_of, from_sparse
from fusemlp_kernels.contract import OWN, Backend, LossSpec
from fusemlp_kernels.errors import ArgumentError, ArgumentTypeError, DataError, FusemlpError


class Targets(NamedTuple):
    """``values``: (n,) classes or (n, N) reals, on host or device; ``soft``: True for rows of probabilities.

    Those of a loss of the caller's are (n, ...), reals or int64.
    """

    values: Any
    soft: bool


class Examples(NamedTuple):
    """Checked rows: X (n, K), perhaps Columns, their targets and perhaps weights (n,), on host or device."""

    X: Any
    targets: Targets
    weight: Any | None

    @property
    def arrays(self) -> dict[str, Any]:
        """The arrays by the names that they have in a program."""
        found = {"x": codes_of(self.X), "target": self.targets.values}
        return found if self.weight is None else {**found, "weight": self.weight}

    def map(self, change: Callable[[Any], Any]) -> Examples:
        """Return the examples with each array changed."""
        weight = None if self.weight is None else change(self.weight)
        return Examples(change(self.X), self.targets._replace(values=change(self.targets.values)), weight)


# The checks of targets from a range.
RANGES = {"binary_cross_entropy": arrays.as_binary_targets, "poisson": arrays.as_counts}


def as_targets(argument: str, y: Any, loss: Loss, *, outputs: int, rows: int | None, dtype: Any) -> Targets:
    """Check ``y`` for a loss and a network with ``outputs`` outputs; ``rows``: the number of rows it must have.

    cross_entropy takes (n,) integers, or (n, N) probabilities; binary_cross_entropy (n, N) values from 0 to 1; poisson
    counts; quantiles (n, 1) and gaussian (n, N / 2) reals; a loss of the caller's (n, ...); the others (n, N) reals.
    (n,) stands for (n, 1). Raises ShapeError, DTypeError or DataError.
    """
    if isinstance(loss, CrossEntropy):
        array = y if isinstance(y, np.ndarray) else arrays.to_array(argument, y)
        if array.ndim == 2 and array.shape[1] == outputs:
            return Targets(arrays.as_probability_rows(argument, array, classes=outputs, rows=rows, dtype=dtype), True)
        labels = arrays.as_class_labels(argument, array, classes=outputs, rows=rows, ignore_index=loss.ignore_index)
        return Targets(labels, False)
    if isinstance(loss, OwnLoss):
        loss.check_given()
        return Targets(arrays.as_rows(argument, y, rows=rows, dtype=dtype), False)
    check = RANGES.get(loss.kind, arrays.as_values)
    # None: the loss has no such option
    missing = getattr(loss, "missing", None)
    width = outputs // loss.width
    values = check(argument, y, width=width, rows=rows, dtype=dtype, missing=missing, each=loss.width)
    if missing and np.isnan(values).all():
        raise DataError(f"{argument}: all {len(values)} rows lack every target (NaN); give at least one number")
    return Targets(values, False)


def are_one_hot(values: Array) -> bool:
    """Return whether every row is one-hot: one 1 and zeros elsewhere, in at least two columns."""
    if values.ndim != 2 or values.shape[1] < 2 or not len(values):
        return False
    return bool(np.all((values == 0.0) | (values == 1.0)) and np.all(values.sum(axis=1) == 1.0))


MADE = "a generator, a list or a DataLoader of batches (x, y) or (x, y, sample_weight)"


def are_batches(given: Any) -> bool:
    """Return whether ``given`` can only be batches: no array, no tuple or list of arrays."""
    if isinstance(given, tuple | list):
        return isinstance(given, list) and bool(given) and all(isinstance(one, tuple) for one in given)
    array = hasattr(given, "__array__") or hasattr(given, "__dlpack__") or arrays.is_sparse(given)
    if array or isinstance(given, str | bytes | dict):
        return False
    return hasattr(given, "__iter__") or (hasattr(given, "__getitem__") and hasattr(given, "__len__"))


def holds_batches(refused: Any) -> bool:
    """Return whether what was refused as an array is batches, rather than rows or a matrix that is no array."""
    if isinstance(refused, list):
        return bool(refused) and all(isinstance(one, tuple) and one and np.ndim(one[0]) > 0 for one in refused)
    return are_batches(refused) and not hasattr(refused, "shape")


class UserBatches:
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
        source: Any,
        steps: int | None,
        steps_argument: str,
        first_epoch: int = 0,
        share: tuple[Peers, Callable[[Array], Array]] | None = None,
    ) -> None:
        if isinstance(source, tuple) and source and not isinstance(source[0], tuple | list):
            raise ArgumentTypeError(f"{argument}: got a tuple of {len(source)} arrays; give them one by one: (X, y)")
        if not (are_batches(source) or isinstance(source, tuple | list)):
            raise ArgumentTypeError(
                f"y: it is missing; give {argument} and y, or without y {MADE}, got {type(source).__name__}"
            )
        self.argument, self.source = argument, source
        self._kind = type(source).__name__
        self.steps = self._length(steps_argument) if steps is None else as_count(steps_argument, steps)
        self._iterator: Iterator[Any] | None = None
        # batches read, of this pass and of all
        self._of_pass = self._read = 0
        self._before, self.share = first_epoch * self.steps, share
        self._ahead: tuple[Any, Any, Any] | None = self._pull()
        shape = getattr(self._ahead[0], "shape", None)
        if shape is not None and len(shape) == 1 and hasattr(source, "__getitem__") and not isinstance(source, list):
            raise ArgumentTypeError(
                f"{argument}: {self._kind} yields single rows, of shape {tuple(shape)}; give batches of them: "
                "torch.utils.data.DataLoader(dataset, batch_size=32)"
            )

    def _length(self, steps_argument: str) -> int:
        try:
            steps = len(self.source)
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
                source = self.source
                if isinstance(source, Blocks):
                    source.seek(self._before + self._read)
                if isinstance(source, Blocks) and self.share is not None:
                    self._iterator = source.shared(*self.share)
                elif hasattr(source, "__iter__"):
                    self._iterator = iter(source)
                else:
                    self._iterator = (source[index] for index in range(len(source)))
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
        if self._iterator is self.source or not self._of_pass:
            raise DataError(
                f"{self.argument}: this {self._kind} ended after {self._read} batches, and {self.steps} an epoch are "
                "needed; let it go on (while True), or give an object that can be iterated over again, such as a list"
            )
        self._iterator = None
        ended = getattr(self.source, "on_epoch_end", None)
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
        # sparse batches have no coding in common
        codes = not arrays.is_sparse(x)
        return inputs.examples(x, y, weight, (f"x {of}", f"y {of}", f"sample_weight {of}"), codes=codes)

    def check_alike(self, first: Examples, other: Examples) -> None:
        """Raise DataError unless both have weights or none, the same kind of targets, and the same columns."""
        if _parts(first) != _parts(other):
            raise DataError(
                f"{self.argument}: batch {self._read} has other parts than batch 1; give all batches classes or all "
                "of them rows of probabilities, or targets of one shape and type, and weights to all or to none"
            )
        if coding_of(first.X) != coding_of(other.X):
            raise DataError(
                f"{self.argument}: batch {self._read} has other columns than batch 1; give all batches dense rows, or "
                "all of them Columns with one coding"
            )

    def collected(self, inputs: DeviceInputs) -> Examples:
        """Return copies of the rows of an epoch, in one batch on the host."""
        found: list[Examples] = []
        first = self.next(inputs, keep=True)
        for _ in range(self.steps):
            batch = self.next(inputs)
            self.check_alike(first, batch)
            # a generator may write into the arrays that it has given away
            found.append(batch.map(lambda array: np.array(codes_of(inputs.on_host(array)))))
        weight = None if first.weight is None else np.concatenate([one.weight for one in found])
        targets = Targets(np.concatenate([one.targets.values for one in found]), first.targets.soft)
        X, coding = np.concatenate([one.X for one in found]), coding_of(first.X)
        return Examples(X if coding is None else Columns(coding, X), targets, weight)


class DeviceInputs:
    """Checks the user's arrays, on the host or on the device, for a network and its loss.

    Arrays of numbers become those of the type ``real``, the parameters'. ``reads_codes``: the engine's first layer
    reads the codes of Columns; elsewhere these become dense.
    """

    def __init__(
        self, network: MLP, loss: Loss, backend: Backend, real: np.dtype[Any], *, reads_codes: bool = False
    ) -> None:
        self.network, self.loss, self.backend, self.real = network, loss, backend, real
        self.reads_codes = reads_codes

    def features(self, argument: str, X: Any, *, check_finite: bool = True, codes: bool = False) -> Any:
        """Return X as a checked (n, K) array of the engine's type; on the device, of the device's array type.

        With ``codes`` Columns stay as they are where the engine reads codes, and sparse rows become Columns.
        """
        width = self.network.sizes[0]
        if arrays.is_sparse(X):
            X = from_sparse(argument, X, self.real, codes=codes and self.reads_codes)
        if isinstance(X, Columns):
            check_together({**self.network.uses, "columns": True})
            if len(X) and X.shape[1] == width:
                X = X.astype(self.real)
                return X if codes and self.reads_codes else np.asarray(X)
            # refused without a dense copy of all rows
            X = np.broadcast_to(np.zeros((), self.real), X.shape)
        native = self.backend.adopt(X)
        if native is not None:
            if _shape(native)[1:] == (width,) and len(native) and (not check_finite or self._fits(native)):
                return native
            X = self.backend.to_host(native)
        return arrays.as_features(argument, X, width=width, dtype=self.real, check_finite=check_finite)

    def targets(self, argument: str, y: Any, *, rows: int) -> Targets:
        """Return y as checked targets. Rows of probabilities and labels with an ignored index go to the host, because
        their checks read every row."""
        backend, loss, outputs, native = self.backend, self.loss, self.network.sizes[-1], self.backend.adopt(y)
        if native is not None:
            if loss.kind == "cross_entropy":
                labels = _column(native)
                if labels is not None and len(labels) == rows and backend.is_integer(labels):
                    low, high = backend.extent(labels)
                    if low >= 0 and high < outputs:
                        return Targets(labels, False)
            elif loss.kind != OWN:
                values = native.reshape(-1, 1) if len(_shape(native)) == 1 and outputs == 1 else native
                bounds = {"binary_cross_entropy": (0.0, 1.0), "poisson": (0.0, np.inf)}.get(loss.kind, ())
                matches = _shape(values) == (rows, outputs) and not backend.is_integer(values)
                if matches and self._fits(values, *bounds):
                    return Targets(values, False)
            y = backend.to_host(native)
        targets = as_targets(argument, y, loss, outputs=outputs, rows=rows, dtype=self.real)
        # checked on the host and not converted: those on the device will do
        return targets if native is None or targets.values is not y else Targets(native, targets.soft)

    def weights(self, argument: str, weight: Any, *, rows: int) -> Any | None:
        """Return sample weights (n,), or None."""
        if weight is None:
            return None
        self.loss.check_weights(argument)
        backend, native = self.backend, self.backend.adopt(weight)
        if native is not None:
            column = _column(native)
            if column is not None and len(column) == rows and not backend.is_integer(column):
                low, high = backend.extent(column)
                # The bound keeps the sum of the rows finite.
                if low >= 0.0 and 0.0 < high <= np.finfo(self.real).max / rows:
                    return column
            weight = backend.to_host(native)
        return arrays.as_weights(argument, weight, rows=rows, dtype=self.real)

    def examples(
        self,
        X: Any,
        y: Any,
        weight: Any,
        names: tuple[str, str, str] = ("X", "y", "sample_weight"),
        *,
        codes: bool = False,
    ) -> Examples:
        """Return all of these checked; error messages call them by ``names``; ``codes`` as in ``features``."""
        try:
            features = self.features(names[0], X, codes=codes)
        except FusemlpError as error:
            if holds_batches(X):
                raise ArgumentError(
                    f"{names[1]}: leave it out: {names[0]} holds batches, which bring theirs"
                ) from error
            raise
        rows = len(features)
        checked = Examples(features, self.targets(names[1], y, rows=rows), self.weights(names[2], weight, rows=rows))
        self.check_known(names[1], checked)
        return checked

    def check_known(self, argument: str, rows: Examples) -> None:
        """Raise DataError where the loss leaves missing targets out, and no row with a weight has any."""
        if getattr(self.loss, "missing", False):
            known = ~np.isnan(self.on_host(rows.targets.values)).all(axis=1)
            if not (known if rows.weight is None else known & (self.on_host(rows.weight) > 0)).any():
                raise DataError(f"{argument}: no row that weighs something has a target; give at least one number")

    def on_host(self, array: Any) -> Any:
        """Return a checked array, or Columns, in host memory, without a copy if it is there."""
        return array if isinstance(array, np.ndarray | Columns) else self.backend.to_host(array)

    def largest(self, array: Any) -> float:
        """Return the greatest absolute value in a checked array."""
        return max(map(abs, self.extent(array)))

    def extent(self, array: Any) -> tuple[float, float]:
        """Return the least and the greatest value in a checked array."""
        if isinstance(array, Columns):
            # beside the zeros and ones that indices stand for
            numbers = np.delete(array.codes, array.coding.indices[:, 0], axis=1)
            return float(numbers.min(initial=0.0)), float(numbers.max(initial=1.0))
        if isinstance(array, np.ndarray):
            return float(array.min()), float(array.max())
        return self.backend.extent(array)

    def check_within(self, how: Adversary, X: Any) -> None:
        """Raise DataError for checked rows X outside the bounds of an attack, or of a training against such."""
        if how.bounds is not None:
            low, high = self.extent(X)
            if low < how.bounds[0] or high > how.bounds[1]:
                raise DataError(
                    f"X: values from {low:g} to {high:g} are not within the bounds {how.bounds}; scale them, or give "
                    f"the attack bounds=({low:g}, {high:g})"
                )

    def counts_hits(self, targets: Targets) -> bool:
        """Return whether these targets have an accuracy."""
        if self.loss.is_classification:
            return True
        if self.loss.kind not in ("mse", "mae", "huber"):
            return False
        # most other targets on a device stay there
        values = targets.values
        return (isinstance(values, np.ndarray) or self.extent(values) == (0, 1)) and are_one_hot(self.on_host(values))

    def kind_of(self, targets: Targets) -> str | None:
        """Return which of ``fusemlp.describe.metrics.KINDS`` these targets are; None for probabilities."""
        if math.prod(_shape(targets.values)[1:]) != self.network.sizes[-1] and self.loss.kind == OWN:
            return None
        if not self.loss.is_classification:
            return "one-hot rows" if self.counts_hits(targets) else "numbers"
        if self.loss.kind == "cross_entropy":
            return None if targets.soft else "classes"
        values = self.on_host(targets.values)
        several = values.shape[1] > 1
        if not ((values == 0.0) | (values == 1.0) | (several & np.isnan(values))).all():
            return None
        return "labels" if several else "classes"

    def spec_for(self, targets: Targets) -> LossSpec:
        """Return the loss of these targets. Raises ArgumentError if it does not take them."""
        spec = self.loss.spec(accuracy=self.counts_hits(targets), soft=targets.soft)
        if spec.kind != OWN:
            return spec
        values = targets.values
        return replace(spec, target=("int64" if _is_integer(values) else "real", _shape(values)[1:]))

    def _fits(self, native: Any, lowest: float = -np.inf, highest: float = np.inf) -> bool:
        """Return whether all elements are from ``lowest`` to ``highest`` and finite in the engine's type."""
        low, high = self.backend.extent(native)
        most = float(np.finfo(self.real).max)
        return max(lowest, -most) <= low and high <= min(highest, most)


def _parts(batch: Examples) -> tuple[Any, ...]:
    targets = batch.targets.values
    return batch.targets.soft, batch.weight is None, _shape(targets)[1:], _is_integer(targets)


def _is_integer(array: Any) -> bool:
    # a type of torch has no kind; an array may lie on the host or on the device
    dtype = array.dtype
    return bool(dtype.kind in "biu" if hasattr(dtype, "kind") else not dtype.is_floating_point)


def _shape(native: Any) -> tuple[int, ...]:
    return tuple(int(size) for size in native.shape)


def _column(native: Any) -> Any | None:
    shape = _shape(native)
    if len(shape) == 1:
        return native
    return native.reshape(-1) if len(shape) == 2 and shape[1] == 1 else None
