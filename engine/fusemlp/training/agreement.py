"""Agreement of ranks on the data, the state and the arguments of a fit."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

from fusemlp.inputs.arrays import Array
from fusemlp.inputs.blocks import Blocks

if TYPE_CHECKING:
    from fusemlp.inputs.targets import Examples
    from fusemlp.runtime.ranks import Ranks
    from fusemlp.training.trainer import Trainer
    from fusemlp.training.validation import Validation


def parts_of(
    engine: Trainer, X: Any, steps: int | None, first_epoch: int
) -> tuple[Ranks, Callable[[Array], Array]] | None:
    """Return how ranks share the reading of blocks; DistributedError if theirs differ, or where they begin."""
    ranks, sharding = engine.ranks, engine.sharding
    if ranks is None or sharding is None or not isinstance(X, Blocks):
        return None
    ranks.check_same({**X.described(), "steps_per_epoch": steps, "the first epoch": first_epoch})
    return ranks, partial(sharding.owner, batch_size=X.batch_rows)


def check_alike(
    engine: Trainer,
    ranks: Ranks,
    data: Examples,
    validation: Validation | None,
    told: Mapping[str, Any],
    *,
    whole: bool = True,
) -> None:
    """Raise DistributedError if not all ranks have the same data, state and arguments; ``whole``: each has all of X."""
    things = dict(told)
    for kind, rows in (("", data), ("validation ", None if validation is None else validation.data)):
        if rows is not None:
            found = {
                f"{kind}{name}": array for name, array in (("y", rows.targets.values), ("sample_weight", rows.weight))
            }
            found |= {f"{kind}X": rows.X} if whole or kind else {}
            things |= {name: None if array is None else engine.inputs.on_host(array) for name, array in found.items()}
    state = None if engine.fit_state is None else (engine.fit_state.epoch, engine.fit_state.batch)
    things |= {"the position in the fit": state, "the count of updates": engine.update_count}
    parameters = engine.inputs.on_host(engine.memory.params)
    ranks.check_same({**things, "the parameters": parameters, "the optimizer's schedule": engine.optimizer.schedule})


def same_order(ranks: Ranks, order: Callable[[int], Array], epoch: int) -> Array:
    """Return the user's order of an epoch; DistributedError if ranks have others."""
    found = order(epoch)
    ranks.check_same({f"row_order({epoch})": found})
    return found
