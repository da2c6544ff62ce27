"""The memory that an engine keeps between steps, and the scratch memory that its programs share."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fusemlp.describe.network import MLP
from fusemlp.program import layout
from fusemlp_kernels.contract import COUNTERS, HYPER, RATE_COLUMNS, STATS, Backend

# Bytes of an element of the parameters, where they are not four.
REAL_BYTES = {"fp64": 8}
# Precisions whose matrix products read another type than the parameters have.
COMPUTE_BYTES = {"bf16": 2, "fp16": 2}


def new_arenas(
    backend: Backend, size: int, state_count: int, *, mixed: bool = False, gradient_parts: int = 1, models: int = 1
) -> dict[str, Any]:
    """Flat zeroed arrays for what ``models`` models keep between steps, one model's behind the other's; ``size`` is
    that of a model's parameters in elements."""
    sizes = {"params": (size, "real"), "grads": (size * gradient_parts, "real")}
    sizes |= {f"state{index}": (size, "real") for index in range(state_count)}
    sizes |= {"counters": (COUNTERS, "int64"), "hyper": (HYPER, "float64"), "stats": (STATS, "float64")}
    sizes["rates"] = (1 + layout.RATE_ROWS) * RATE_COLUMNS, "float64"
    if mixed:
        sizes["shadow"] = size, "compute"
    try:
        return {name: backend.allocate(count * models, dtype) for name, (count, dtype) in sizes.items()}
    except MemoryError as error:
        parameters = f"{size:,} parameters" + (f" of each of {models} models" if models > 1 else "")
        raise MemoryError(
            f"net: there is no room for {parameters}, their gradients and the optimizer's state; make layers narrower "
            f"({error})"
        ) from error


class Memory:
    """The memory between steps: parameters, gradients, optimizer state, counters, all on the device.

    ``arenas``: its arrays, those of ``new_arenas`` by default.
    """

    def __init__(
        self,
        net: MLP,
        backend: Backend,
        state_count: int,
        *,
        item_bytes: int,
        mixed: bool = False,
        gradient_parts: int = 1,
        arenas: Mapping[str, Any] | None = None,
    ) -> None:
        self.backend = backend
        self.layout = layout.parameter_layout(net, row_multiple=backend.traits.row_multiple, item_bytes=item_bytes)
        # the parts of a batch have their gradients behind one another
        self.gradient_parts = gradient_parts
        given = arenas
        if given is None:
            given = new_arenas(backend, self.layout.size, state_count, mixed=mixed, gradient_parts=gradient_parts)
        self.params = given["params"]
        self.grads = given["grads"][: self.layout.size]
        self.states = tuple(given[f"state{index}"] for index in range(state_count))
        self.counters = given["counters"]
        self.hyper = given["hyper"]
        self.stats = given["stats"]
        self.rates = given["rates"].reshape(-1, RATE_COLUMNS)
        self.arrays: dict[str, Any] = {
            "params": self.params,
            "grads": self.grads,
            "counters": self.counters,
            "hyper": self.hyper,
            "stats": self.stats,
            "rates": self.rates,
            **self.layout.views(backend, self.params),
            **{f"d{name}": view for name, view in self.layout.views(backend, self.grads).items()},
        }
        for index, arena in enumerate(self.states):
            self.arrays[f"state{index}"] = arena
            for name, view in self.layout.views(backend, arena).items():
                self.arrays[f"{name}.state{index}"] = view
        self.shadow = given["shadow"] if mixed else None
        if mixed:
            self.arrays["shadow"] = self.shadow
            for name, view in self.layout.views(backend, self.shadow).items():
                self.arrays[f"{name}.shadow"] = view

    @property
    def arenas(self) -> dict[str, Any]:
        """The flat arrays by name."""
        names = (
            "params",
            "grads",
            *(f"state{index}" for index in range(len(self.states))),
            "counters",
            "hyper",
            "rates",
            "stats",
        )
        found = {name: self.arrays[name] for name in names}
        return found if self.shadow is None else {**found, "shadow": self.shadow}

    def refresh_shadow(self) -> None:
        """Round the parameters into the shadow, after they were written from outside a step."""
        if self.shadow is not None:
            self.backend.copy_into(self.shadow, self.backend.to_host(self.params))


class Workspace:
    """Scratch arenas, one a dtype, that programs which never run at once have in common. They only grow."""

    def __init__(self, backend: Backend) -> None:
        self.backend = backend
        self._arenas: dict[str, tuple[int, Any]] = {}

    def arena(self, dtype: str, size: int) -> Any:
        """A flat array of at least ``size`` elements."""
        if dtype not in self._arenas or self._arenas[dtype][0] < size:
            self._arenas[dtype] = (size, self.backend.allocate(size, dtype))
        return self._arenas[dtype][1]
