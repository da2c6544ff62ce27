"""Private training: the gradient of each row is clipped, and noise is added to their sum."""

from __future__ import annotations

from dataclasses import dataclass, replace

from fusemlp.program.program import Call, Program, Ref
from fusemlp.program.step import Step
from fusemlp_kernels.contract import Noise


@dataclass(frozen=True)
class ClipAndNoise:
    """The largest norm of a row's gradient, and the noise of their sum (``DPSGD``)."""

    clip: float
    noise: Noise

    def __call__(self, program: Program, step: Step) -> Program:
        """Return the program with ``clip_examples`` before the gradients by the parameters, and noise in the update."""
        calls: list[Call] = []
        for call in program.calls:
            if "loss" in call.operands:
                call = call.but(loss=replace(call.operands["loss"], reduction="rows"))
            if call.op == "grad_weight":
                calls.append(self._clipping(call))
            if call.op == "update":
                call = call.but(noise=self.noise, rows=Ref("rows") if "rows" in program.values else None)
            calls.append(call)
        return replace(program, calls=tuple(calls))

    def _clipping(self, gradients: Call) -> Call:
        layers = tuple(
            {
                **{name: value for name, value in layer.items() if name not in ("dw", "db")},
                **{f"{kind}_trained": layer[f"d{kind}"] is not None for kind in "wb"},
            }
            for layer in gradients.operands["layers"]
        )
        operands = {"layers": layers, "clip": self.clip, "counters": gradients.operands["counters"]}
        return Call("clip_examples", operands, f"{self.clip:g}")
