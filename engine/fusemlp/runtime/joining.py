"""An engine that trains together with the same engine in other processes."""

from __future__ import annotations

import platform
from collections.abc import Callable
from importlib.metadata import version
from typing import Any

from fusemlp.describe.checks import as_number, check_choice, check_flag
from fusemlp.describe.network import MLP
from fusemlp.describe.optimizers import Optimizer
from fusemlp.describe.privacy import DPSGD
from fusemlp.program.sharding import ORDERED, REDUCTIONS, Sharding
from fusemlp.runtime.plans import no_ranks
from fusemlp.runtime.ranks import Ranks, joined
from fusemlp_kernels.contract import Backend
from fusemlp_kernels.errors import ArgumentError

# Libraries whose versions the bits of a step depend on.
LIBRARIES = ("fusemlp", "numpy", "numba", "torch")


class Joining:
    """The part of an engine that knows the other processes, the ``ranks``, and the cut of a batch among them.

    Both are None in an engine that trains alone.
    """

    ranks: Ranks | None
    sharding: Sharding | None
    network: MLP
    optimizer: Optimizer
    privacy: DPSGD | None
    backend: str
    plan: str
    plan_reason: str
    description: Callable[[], dict[str, Any]]
    _backend: Backend

    def join(self, distributed: bool, reduce: str, timeout: float) -> None:
        """With ``distributed`` train together with the other processes that torchrun has started.

        Raises what ``Ranks`` does, and ArgumentError or BackendUnavailableError for what cannot be trained so.
        """
        check_choice("reduce", reduce, REDUCTIONS)
        limit = as_number("timeout", timeout, low=0.0, low_open=True)
        if not check_flag("distributed", distributed):
            if reduce != ORDERED:
                raise ArgumentError(
                    f"reduce: {reduce!r} adds the gradients of several processes, and this one trains alone; start it "
                    "by torchrun, a script with distributed=True, or leave reduce out"
                )
            return
        if not self._backend.traits.on_host:
            raise no_ranks("distributed", self.backend)
        if self.plan != "resident":
            raise ArgumentError(
                f"plan: a distributed step is two launches with a collective between them, got {self.plan!r}; leave "
                "plan out"
            )
        if self.privacy is not None:
            raise ArgumentError("privacy: a private engine trains in one process so far; leave distributed out")
        self.network.check_single("distributed", "training on several processes")
        if not any(self.optimizer.options_for(name)[0] for name in self.network.parameter_shapes()):
            raise ArgumentError("distributed: the optimizer trains no parameter, so there is no gradient to add")
        ranks = joined(limit)
        self.sharding = Sharding(reduce, ranks.world).check()
        self.ranks = ranks
        self.plan_reason = f"two launches a step, and a collective between them ({self.sharding})"
        versions = {f"the version of {name}": version(name) for name in LIBRARIES}
        versions["the version of Python"] = platform.python_version()
        ranks.check_same({**versions, **self.description(), "reduce": self.sharding, "backend": self.backend})
