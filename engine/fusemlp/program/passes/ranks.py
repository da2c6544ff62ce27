"""Training on several processes: the gradients of their shards of a batch are added before the update."""

from __future__ import annotations

from dataclasses import dataclass, replace

from fusemlp.program.program import COLLECTIVE, Call, Program, Ref, Sharding
from fusemlp.program.step import Pass, Step


def sums_over(sharding: Sharding) -> tuple[Pass, ...]:
    """Return the passes of a training over these shards; none where one process trains alone."""
    return (SumOverRanks(sharding),) if sharding else ()


@dataclass(frozen=True)
class SumOverRanks:
    """The sum of gradients and statistics over the shards of ``sharding``."""

    sharding: Sharding

    def __call__(self, program: Program, step: Step) -> Program:
        """Return the program of one shard up to ``all_reduce``, after which comes the update of all."""
        *others, update = program.calls
        rule = update.operands["rule"]
        # batches are accumulated once their shards are added
        calls = [call.but(rule=replace(rule, accumulate=1)) if "rule" in call.operands else call for call in others]
        operands = {"grads": Ref("grads"), "stats": Ref("stats"), "rule": rule, "counters": Ref("counters")}
        collective = [Call(COLLECTIVE, operands, str(self.sharding))] if update.op == "update" else []
        return replace(program, calls=(*calls, *collective, update), sharding=self.sharding)
