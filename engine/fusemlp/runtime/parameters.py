"""The tensors of an engine by their names: copies of them, and the way back."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from fusemlp.inputs.arrays import Array
from fusemlp.inputs.state import checked_state
from fusemlp.runtime.scaling import MEAN, SCALE

if TYPE_CHECKING:
    from fusemlp.runtime.session import Session


def _arena_of(suffix: str, prefix: str) -> str:
    """Return the name of the flat array that holds the tensors with these ends of their names."""
    return suffix.removeprefix(".") or ("grads" if prefix else "params")


def state_dict(engine: Session) -> dict[str, Array]:
    """Copies of the parameters, by the names that torch gives them in the plain ``nn.Sequential``.

    With the optimizer's ``ema`` they are the averages that ``predict`` uses.
    With normalised inputs there are ``normalise.mean`` and ``normalise.scale`` (K,) too: the first layer takes
    (x - mean) / scale.
    """
    return {**engine.evaluated_tensors(), **engine.scaling.tensors}


def evaluated_tensors(engine: Session) -> dict[str, Array]:
    """Copies of what predictions use: the parameters, or their averages."""
    return engine.tensors(engine.memory.evaluated)


def tensors(engine: Session, suffix: str, prefix: str = "") -> dict[str, Array]:
    """Copies of one array per parameter: the parameters (""), or another arena's (".state0"; prefix "d")."""
    return engine.memory.named(engine.memory.arrays[_arena_of(suffix, prefix)])


def write_tensors(engine: Session, tensors: Mapping[str, Array], suffix: str, prefix: str = "") -> None:
    """The inverse of ``tensors``; the padding around them becomes zero again, whatever a lost step left there.

    An average of the parameters begins anew with them.
    """
    if not suffix and not prefix and engine.memory.evaluated:
        engine.write_tensors(tensors, engine.memory.evaluated)
    memory = engine.memory
    flat = memory.arrays[_arena_of(suffix, prefix)]
    flat[:] = 0.0
    views = memory.layout.views(memory.backend, flat)
    for short, name in memory.names.items():
        memory.backend.copy_into(views[short], tensors[name])
    if not prefix and not suffix:
        engine.memory.refresh_shadow()


def load_state_dict(engine: Session, state: Mapping[str, Any]) -> None:
    """Set the parameters from array-likes with exactly the keys and shapes of ``state_dict``, or change nothing.

    The statistics of normalised inputs are among the keys once they are measured, and may be before.

    Raises ArgumentError for keys, ShapeError, DTypeError or DataError for values.
    """
    shapes = engine.network.parameter_shapes()
    if engine.normalise and (engine.scaling.scale is not None or (isinstance(state, Mapping) and MEAN in state)):
        shapes |= dict.fromkeys((MEAN, SCALE), (engine.network.sizes[0],))
    arrays = checked_state(shapes, state, engine.inputs.real)
    engine.scaling.take_tensors({name: arrays.pop(name) for name in (MEAN, SCALE) if name in arrays})
    engine.write_tensors(arrays, "")
