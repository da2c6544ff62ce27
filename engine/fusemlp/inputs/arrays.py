"""Check the user's arrays and numbers, before anything is allocated or written.

Arrays may be NumPy arrays (of any memory order, read-only too), lists, or anything with ``__array__`` or
``__dlpack__`` in host memory, such as pandas frames and torch tensors. The checks never write to an argument. They
return an array of the wanted dtype in C order without a copy.
"""

import math
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from fusemlp.describe.checks import as_number
from fusemlp_kernels.errors import ArgumentError, ArgumentTypeError, DataError, DTypeError, ShapeError

Array = npt.NDArray[Any]

# Up to this many elements, checking each takes less time than turning off the warnings of a sum.
FEW = 1 << 10


def as_features(argument: str, value: Any, *, width: int, dtype: npt.DTypeLike, check_finite: bool = True) -> Array:
    """Return the input matrix as a C-contiguous ``(n, width)`` array of ``dtype``.

    Raises ShapeError (not two-dimensional, wrong width), DTypeError (not real numbers) and DataError (no
    rows; with ``check_finite`` also NaN, infinities and values that ``dtype`` cannot hold).
    """
    array = _real(argument, to_array(argument, value))
    if array.ndim != 2:
        raise ShapeError(
            f"{argument}: expected a matrix of shape (n, {width}), got an array of shape {array.shape}; "
            + _two_dimensional(argument, array.shape, width)
        )
    if array.shape[1] != width:
        other = f", or make a network with MLP([{array.shape[1]}, ...])" if array.shape[1] else ""
        raise ShapeError(
            f"{argument}: expected {_plural(width, 'column')}, as many as the network has inputs, got shape "
            f"{array.shape}; give those {width} features{other}"
        )
    if not len(array):
        raise DataError(f"{argument}: expected 1 or more rows, got 0 (shape {array.shape})")
    return _converted(argument, array, dtype, check_finite=check_finite)


def as_class_labels(
    argument: str, value: Any, *, classes: int, rows: int | None, ignore_index: int | None = None
) -> npt.NDArray[np.int64]:
    """Return class indices 0 to ``classes`` - 1 (or ``ignore_index``) as an ``(n,)`` int64 array.

    Accepted: every integer type, bool, and floats with whole values; shape (n,) or one column (n, 1). Raises
    ShapeError (more columns, or not ``rows`` rows), DTypeError (strings, objects, complex) and DataError
    (NaN, fractions, indices out of range).
    """
    array = to_array(argument, value)
    if array.dtype.kind not in "biuf":
        raise DTypeError(
            f"{argument}: class labels must be integers from 0 to {classes - 1}, got {_kind(array)}; encode them: "
            f"names, labels = numpy.unique({argument}, return_inverse=True) (the command line does so itself)"
        )
    array = _single_column(argument, array, f"class labels; for one-hot rows give {argument}.argmax(axis=1)")
    _check_rows(argument, array, rows)
    if array.dtype.kind == "f":
        _check_finite(argument, array, array)
        fractional = array != np.floor(array)
        if fractional.any():
            index, place = _first(fractional)
            raise DataError(
                f"{argument}: class labels must be whole numbers, got {array[index]} at {place}; for "
                "real-valued targets choose a regression loss such as 'mse'"
            )
    if array.size and (array.min() < 0 or array.max() >= classes):
        outside = (array < 0) | (array >= classes)
        if ignore_index is not None:
            outside &= array != ignore_index
        if outside.any():
            index, place = _first(outside)
            raise DataError(
                f"{argument}: label {array[index]:.0f} at {place} is not one of the {classes} classes 0 to "
                f"{classes - 1}; {_label_mend(argument, array, classes)}"
            )
    return np.require(array, np.int64, ["C", "A"])


def as_values(
    argument: str,
    value: Any,
    *,
    width: int,
    rows: int | None,
    dtype: npt.DTypeLike,
    missing: bool | None = None,
    each: int = 1,
) -> Array:
    """Return real targets as a C-contiguous ``(n, width)`` array; a vector counts as one column if ``width`` is 1.

    ``missing``: whether NaN is valid; False: the option of this name would make it so. ``each``: the outputs for a
    target. Raises ShapeError, DTypeError, and DataError for NaN, infinities and values that ``dtype`` cannot hold.
    """
    array = _real(argument, to_array(argument, value))
    if array.ndim == 1 and width == 1:
        array = array.reshape(-1, 1)
    if array.ndim != 2 or array.shape[1] != width:
        raise ShapeError(
            f"{argument}: expected shape (n, {width}), a column for each output, got shape {array.shape}; "
            + _target_mend(argument, array, width, each)
        )
    _check_rows(argument, array, rows)
    return _converted(argument, array, dtype, check_finite=True, missing=missing)


def as_binary_targets(argument: str, value: Any, **options: Any) -> Array:
    """Return targets of the binary cross-entropy, 0 to 1, as an ``(n, width)`` array; else as ``as_values``."""
    array = as_values(argument, value, **options)
    mend = f"for labels -1 and 1 give ({argument} + 1) / 2; for more than two classes use loss 'cross_entropy'"
    _check_range(argument, array, 0.0, 1.0, "binary cross-entropy takes targets from 0 to 1", mend)
    return array


def as_counts(argument: str, value: Any, **options: Any) -> Array:
    """Return targets of the Poisson loss, each at least 0, whole or not; else as ``as_values``."""
    array = as_values(argument, value, **options)
    mend = "use loss 'mse' or 'huber' for targets that may be negative"
    _check_range(argument, array, 0.0, math.inf, "the Poisson loss takes counts of at least 0", mend)
    return array


def as_probability_rows(argument: str, value: Any, *, classes: int, rows: int | None, dtype: npt.DTypeLike) -> Array:
    """Return soft targets as an ``(n, classes)`` array: every row at least 0 and with sum 1.

    A row that was normalised in arithmetic of unit roundoff u = eps / 2 has a computed normaliser within
    (classes - 1) u, and each quotient and its storage round once more: its sum lies within (classes + 1) u of
    1. The bound here is (classes + 2) eps, of the coarser of the given and the wanted type, about twice that.
    """
    source = to_array(argument, value)
    array = as_values(argument, source, width=classes, rows=rows, dtype=dtype)
    mend = f"divide each row by its sum, or for logits give their softmax ({classes} classes)"
    _check_range(argument, array, 0.0, math.inf, "class probabilities are at least 0", mend)
    eps = float(np.finfo(array.dtype).eps)
    if source.dtype.kind == "f":
        eps = max(eps, float(np.finfo(source.dtype).eps))
    sums = array.sum(axis=1, dtype=np.float64)
    wrong = ~(np.abs(sums - 1.0) <= (classes + 2) * eps)
    if wrong.any():
        index, place = _first(wrong)
        raise DataError(
            f"{argument}: the probabilities of the {classes} classes must sum to 1, got the sum "
            f"{sums[index]:.6g} at {place}; {mend}"
        )
    return array


def as_rows(argument: str, value: Any, *, rows: int | None, dtype: npt.DTypeLike) -> Array:
    """Return targets of the caller's loss, one or an array a row: floats as ``dtype``, perhaps NaN, others as int64.

    Raises ShapeError, DTypeError, and DataError for infinities and values that the type cannot hold.
    """
    array = _real(argument, to_array(argument, value))
    if not array.ndim:
        raise ShapeError(f"{argument}: expected a target for each row, got {value!r}; give an array")
    _check_rows(argument, array, rows)
    if array.dtype.kind == "f":
        return _converted(argument, array, dtype, check_finite=True, missing=True)
    if array.size and array.max() > np.iinfo(np.int64).max:
        raise DataError(f"{argument}: {array.max()} is beyond the largest int64; give real numbers")
    return np.require(array, np.int64, ["C", "A"])


def as_weights(argument: str, value: Any, *, rows: int | None, dtype: npt.DTypeLike) -> Array:
    """Return row weights as an ``(n,)`` array: finite, at least 0, not all zero; accept one column (n, 1)."""
    array = _single_column(argument, _real(argument, to_array(argument, value)), "weights")
    _check_rows(argument, array, rows)
    array = _converted(argument, array, dtype, check_finite=True)
    _check_range(argument, array, 0.0, math.inf, "weights must be at least 0", "give 0 to rows that shall not count")
    if array.size and not array.any():
        raise DataError(f"{argument}: all {len(array)} weights are zero; at least one row must count")
    with np.errstate(over="ignore"):
        total = array.sum()
    if not np.isfinite(total):
        raise DataError(
            f"{argument}: the sum of the weights is beyond the largest {array.dtype}; only their proportions matter: "
            f"divide by the greatest, {array.max():.6g}"
        )
    return array


def is_sparse(value: Any) -> bool:
    """Return whether the user's argument is a sparse matrix of SciPy."""
    return type(value).__module__.startswith("scipy.sparse")


def to_array(argument: str, value: Any) -> Array:
    """Return the user's argument as a plain ndarray of any shape and dtype, without a copy if possible."""
    if type(value) is np.ndarray:
        return value
    if isinstance(value, np.ma.MaskedArray) and value.mask is not np.ma.nomask and value.mask.any():
        raise DataError(f"{argument}: got {value.mask.sum()} masked values; fill them: {argument}.filled(value)")
    if is_sparse(value):
        raise ArgumentTypeError(f"{argument}: sparse matrices are not supported; give {argument}.toarray()")
    try:
        if getattr(value, "requires_grad", None) is True:
            # A torch tensor: only its values are read, without autograd.
            value = value.detach()
        if hasattr(value, "__dlpack__") and not hasattr(value, "__array__"):
            return np.from_dlpack(value)
        return np.asarray(value)
    except ValueError as error:
        raise ShapeError(f"{argument}: the rows of this {type(value).__name__} differ in length") from error
    except (TypeError, AttributeError, RuntimeError, BufferError) as error:
        raise ArgumentTypeError(
            f"{argument}: this {type(value).__module__}.{type(value).__name__} cannot be read as a NumPy "
            f"array ({error}); for a tensor give {argument}.detach().float().cpu()"
        ) from error


def _real(argument: str, array: Array) -> Array:
    if array.dtype.kind in "biuf":
        return array
    raise DTypeError(
        f"{argument}: expected real numbers, got {_kind(array)}; encode categories, dates or complex parts as "
        f"numbers, then convert: numpy.asarray({argument}, dtype=float)"
    )


def _kind(array: Array) -> str:
    strings = array.dtype.kind in "USOT" and array.size > 0 and isinstance(array.flat[0], (str, bytes))
    return "strings" if strings else f"dtype {array.dtype}"


def _converted(
    argument: str, array: Array, dtype: npt.DTypeLike, *, check_finite: bool, missing: bool | None = None
) -> Array:
    result = array
    if array.dtype != dtype or not (array.flags.c_contiguous and array.flags.aligned):
        with np.errstate(over="ignore", invalid="ignore"):
            result = np.require(array, dtype, ["C", "A"])
    if check_finite:
        checked = np.where(np.isnan(result), 0.0, result) if missing else result
        _check_finite(argument, array, checked, "" if missing is None else ", or use the loss with missing=True")
    return result


def _check_finite(argument: str, source: Array, result: Array, mend: str = "") -> None:
    # A sum is fast. Only if it is not finite, by an element or by overflow, check every element.
    if result.size > FEW:
        with np.errstate(over="ignore", invalid="ignore"):
            if np.isfinite(result.sum()):
                return
    bad = ~np.isfinite(result)
    if 1 not in bad.tobytes():
        return
    index, place = _first(bad)
    value = source[index]
    if np.isfinite(value):
        raise DataError(
            f"{argument}: {value} at {place} is beyond the largest {result.dtype}, "
            f"{np.finfo(result.dtype).max:.4g}; scale the data, or use precision='fp64'"
        )
    mend = f"fill in or drop missing values{mend}" if np.isnan(value) else "clip or drop infinite values"
    raise DataError(f"{argument}: expected finite numbers, got {value} at {place}; {mend}")


def _check_range(argument: str, array: Array, low: float, high: float, rule: str, mend: str) -> None:
    # minimum and maximum are NaN where a target is missing
    if array.size and not (array.min() >= low and array.max() <= high) and ((array < low) | (array > high)).any():
        index, place = _first((array < low) | (array > high))
        raise DataError(f"{argument}: {rule}, got {array[index]:.6g} at {place}; {mend}")


def _first(bad: Array) -> tuple[tuple[int, ...], str]:
    """Return the index of the first True, and its place in words with the number of the others."""
    index = tuple(int(i) for i in np.unravel_index(int(np.argmax(bad)), bad.shape))
    place = ", ".join(f"{name} {i}" for name, i in zip(("row", "column"), index, strict=False))
    others = int(np.count_nonzero(bad)) - 1
    return index, f"{place} (and {others} more)" if others else place


def _check_rows(argument: str, array: Array, rows: int | None) -> None:
    if rows is not None and len(array) != rows:
        raise ShapeError(
            f"{argument}: expected {_plural(rows, 'row')}, as many as the features have, got {len(array)} "
            f"(shape {array.shape})"
        )


def _single_column(argument: str, array: Array, wanted: str) -> Array:
    if array.ndim == 1:
        return array
    if array.ndim == 2 and array.shape[1] == 1:
        return array.reshape(-1)
    raise ShapeError(f"{argument}: got shape {array.shape}, expected (n,): one column of {wanted}")


def _two_dimensional(argument: str, shape: tuple[int, ...], width: int) -> str:
    if len(shape) > 2:
        return f"flatten each example: {argument}.reshape(len({argument}), -1)"
    if not shape:
        return "give one row for every example"
    if not shape[0]:
        return "it is empty: give one row for every example"
    if width == 1 and shape[0] != 1:
        return f"for a single feature give {argument}.reshape(-1, 1)"
    return f"for a single example give {argument}.reshape(1, -1)"


def _target_mend(argument: str, array: Array, width: int, each: int) -> str:
    if array.ndim == 1 and width > 1 and array.dtype.kind in "biu":
        return f"for class labels use loss 'cross_entropy', or one-hot rows: numpy.eye({width})[{argument}]"
    if array.ndim == 1:
        return f"the network has {width} outputs, so each row needs {width} values"
    if each > 1:
        return f"the loss has {each} outputs for a target; give {_plural(width, 'column')}"
    if array.ndim == 2:
        return f"give {_plural(width, 'column')}, or make the network's last width {array.shape[1]}"
    return f"give a matrix: {argument}.reshape(len({argument}), -1)"


def _label_mend(argument: str, array: Array, classes: int) -> str:
    low, high = int(array.min()), int(array.max())
    if low == 1 and high == classes:
        return f"the labels start at 1: give {argument} - 1"
    if low == -1 and high == 1 and not (array == 0).any():
        return f"for labels -1 and 1 give ({argument} + 1) // 2"
    mend = f"number the classes from 0 without gaps: numpy.unique({argument}, return_inverse=True)[1]"
    return mend if low < 0 else f"make the network's last width {high + 1}, or {mend}"


def _plural(count: int, noun: str) -> str:
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def balanced(codes: Array, classes: int) -> list[float]:
    """Return for each class: rows / (present classes * rows of the class); 0 for a class without rows."""
    counts = np.bincount(codes, minlength=classes)
    present = int(np.count_nonzero(counts))
    return [len(codes) / (present * int(count)) if count else 0.0 for count in counts]


def as_class_weights(choice: Any, classes: int) -> Array:
    """Return one weight for each class (classes,): from a sequence, or a mapping, whose missing classes weigh 1.

    Raises ArgumentTypeError, and ArgumentError for other classes, another number of weights, or all zero.
    """
    expected = f"class_weight: expected a mapping such as {{0: 1.0, 1: 5.0}}, {classes} numbers or 'balanced', got"
    if isinstance(choice, Mapping):
        strange = [key for key in choice if isinstance(key, bool) or key not in range(classes)]
        if strange:
            raise ArgumentError(f"class_weight: {strange[0]!r} is not one of the classes 0 to {classes - 1}")
        numbers = [choice.get(code, 1.0) for code in range(classes)]
    elif isinstance(choice, str) or not isinstance(choice, Iterable):
        raise ArgumentTypeError(f"{expected} {choice!r}")
    else:
        numbers = list(choice)
        if len(numbers) != classes:
            raise ArgumentError(f"{expected} {len(numbers)} numbers")
    weights = np.array([as_number(f"class_weight[{code}]", weight, low=0.0) for code, weight in enumerate(numbers)])
    if not weights.any():
        raise ArgumentError(f"class_weight: expected at least one weight above 0, got {numbers!r}")
    return weights


def checked_state(
    shapes: Mapping[str, tuple[int, ...]], state: Mapping[str, Any], real: np.dtype[Any]
) -> dict[str, Array]:
    """Return ``state`` as arrays of the engine's type; it must have exactly these keys and ``shapes``."""
    if not isinstance(state, Mapping):
        raise ArgumentTypeError(f"state: expected a mapping of names to arrays, got {type(state).__name__}")
    missing = [name for name in shapes if name not in state]
    unknown = [str(name) for name in state if name not in shapes]
    if missing or unknown:
        raise ArgumentError(
            f"state: missing keys: {', '.join(missing) or 'none'}; unknown keys: {', '.join(unknown) or 'none'}. "
            f"This network has: {', '.join(shapes)}"
            + ("; a state with normalise.mean goes into an engine with normalise=True" * ("normalise.mean" in unknown))
        )
    arrays = {}
    for name, shape in shapes.items():
        array = to_array(f"state[{name!r}]", state[name])
        if array.shape != shape:
            raise ShapeError(f"state[{name!r}]: expected shape {shape}, got {array.shape}")
        if array.dtype.kind not in "fiub":
            raise DTypeError(f"state[{name!r}]: expected real numbers, got dtype {array.dtype}")
        with np.errstate(all="ignore"):
            arrays[name] = array.astype(real)
        if not np.isfinite(arrays[name]).all():
            raise DataError(f"state[{name!r}]: holds NaN or infinite values (in {real}); parameters must be finite")
    return arrays
