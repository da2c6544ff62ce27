"""A penalty on the squared weights beside the loss, as scikit-learn counts it."""

from __future__ import annotations

from dataclasses import dataclass, replace

from fusemlp.program.program import Call, Program, Ref, Value
from fusemlp.program.step import Step
from fusemlp_kernels.contract import Ridge


@dataclass(frozen=True)
class Penalty:
    """The penalty ``ridge``, for a loop over steps: its divisor is the sum of the weights of a batch's rows."""

    ridge: Ridge

    def __call__(self, program: Program, step: Step) -> Program:
        """Return the program whose loss counts the weights of rows, with ``penalty`` before the update."""
        shares = Ref("shares")
        counted = {"ridge": self.ridge, "shares": shares}
        calls = [
            call.but(**counted) if "loss" in call.operands and "stats" in call.operands else call
            for call in program.calls
        ]
        # models of one launch have the same calls, whatever their numbers
        penalised = self.ridge.strength != 0.0 or step.traits.resident is not None
        if penalised and calls[-1].op == "update":
            weights = [short for short, _ in step.trained if short[0] == "w"]
            coded = {} if step.inputs.coding is None else {"w0": {"coding": step.inputs.coding}}
            layers = tuple({"w": Ref(short), "dw": Ref(f"d{short}"), **coded.get(short, {})} for short in weights)
            common = {"counters": Ref("counters"), "stats": Ref("stats")}
            calls.insert(-1, Call("penalty", {"layers": layers, **counted, **common}, "ridge"))
        values = {**program.values, "shares": Value("shares", (1,), "float64", "work")}
        return replace(program, values=values, calls=tuple(calls))
