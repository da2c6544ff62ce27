"""Check parameters from the user, by torch's names."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from fusemlp.inputs.arrays import Array, to_array
from fusemlp_kernels.errors import ArgumentError, ArgumentTypeError, DataError, DTypeError, ShapeError


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
