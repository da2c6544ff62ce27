"""Calls of PyTorch that do nothing beside a fused step: an error or a warning says so, with the mend."""

from __future__ import annotations

import functools
import warnings
import weakref
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from fusemlp_kernels.errors import ArgumentError

# The step of each parameter that one updates.
_FUSED: Any = WeakIdKeyDictionary()
_CLIPPERS = {"clip_grad_norm_": "clip_grad_norm", "clip_grad_value_": None}


def watch_clipping(step: object, parameters: Iterable[Tensor]) -> None:
    """From now on torch's functions that clip gradients report these parameters where they have none."""
    reference = weakref.ref(step)
    for parameter in parameters:
        _FUSED[parameter] = reference
    _watch_torch()


@functools.cache
def _watch_torch() -> None:
    """Put a check into torch's clipping functions: also where user code has imported them by name."""
    for name, option in _CLIPPERS.items():
        function: Any = getattr(torch.nn.utils, name)
        free = function.__code__.co_freevars
        if "func" in free:
            # torch's wrapper without gradients, around the function ``func``
            cell = function.__closure__[free.index("func")]
            cell.cell_contents = _checked(cell.cell_contents, name, option)
        else:
            setattr(torch.nn.utils, name, _checked(function, name, option))


def _checked(function: Callable[..., Any], name: str, option: str | None) -> Callable[..., Any]:
    @functools.wraps(function)
    def run(parameters: Any, *args: Any, **options: Any) -> Any:
        if not torch.compiler.is_compiling():
            parameters = [parameters] if isinstance(parameters, Tensor) else list(parameters)
            _check_gradients(parameters, name, option)
        return function(parameters, *args, **options)

    return run


def _check_gradients(parameters: list[Any], name: str, option: str | None) -> None:
    """Raise ArgumentError if no parameter has a gradient and a fused step has used them; warn if some have one."""
    missing = [one for one in parameters if one.grad is None and one.requires_grad and _is_fused(one)]
    if not missing:
        return
    mend = f"pass {option}=max_norm to fuse" if option else "use fuse's clip_grad_norm, or FusedMLP in an eager loop"
    words = f"{name}: {len(missing)} parameters have no gradient, since a fused step updates them and stores none"
    if all(one.grad is None for one in parameters):
        raise ArgumentError(f"{words}; {mend}")
    warnings.warn(f"{words}, and only the others are clipped; {mend}", stacklevel=5)


def _is_fused(parameter: Tensor) -> bool:
    return (reference := _FUSED.get(parameter)) is not None and reference() is not None


def warn_of_autocast(dtype: torch.dtype) -> None:
    """Warn that autocast does not reach a fused step."""
    other = "; fuse(precision='tf32') uses a GPU's tensor cores" if dtype == torch.float32 else ""
    warnings.warn(
        f"autocast has no effect on a fused step, which computes in {dtype}, the module's type; call the step outside "
        f"autocast{other}",
        stacklevel=3,
    )
