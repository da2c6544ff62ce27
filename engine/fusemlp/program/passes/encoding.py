"""The encoding of the inputs: the first call of a program whose other calls read what it gives in place of x.

Back to the inputs, the gradient by the encoded ones goes through the same op.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from fusemlp.program.program import Call, Program, Ref, Value
from fusemlp.program.step import Step
from fusemlp_kernels.ops import OPS


def encode(program: Program, step: Step) -> Program:
    """Return the program of a step, lowered for encoded inputs, with the encoding of its network."""
    encoding, x, gradient = step.net.encoding, program.values.get("x"), program.values.get("dx")
    if encoding is None or x is None:
        return program
    batch, inputs = step.batch_size * step.net.members, step.net.sizes[0]
    # in 16 bits coordinates would lose what tells them apart
    values = {**program.values, "x": replace(x, shape=(x.shape[0], inputs), dtype="real")}
    values.pop("gathered", None)
    values["waves"] = Value("waves", (batch, step.net.widths[0]), x.dtype, "work")
    operands = {"x": Ref("x"), "counters": Ref("counters"), "octaves": encoding.octaves, "inputs": encoding.inputs}
    if "rows" in values:
        operands["rows"] = Ref("rows")
    label = f"{encoding.kind} {encoding.octaves}"
    calls = [
        Call("encode", {**operands, "y": Ref("waves")}, label),
        *(reading(call, "waves") for call in program.calls),
    ]
    if gradient is not None:
        values["dwaves"] = replace(gradient, name="dwaves")
        values["dx"] = replace(gradient, shape=(batch, inputs))
        calls = [call.but(dz_prev=Ref("dwaves")) if Ref("dx") in call.operands.values() else call for call in calls]
        calls.append(Call("encode", {**operands, "dy": Ref("dwaves"), "dx": Ref("dx")}, label))
    return replace(program, values=values, calls=tuple(calls))


def reading(call: Call, batch: str) -> Call:
    """Return a call that reads a batch, whole, where it read x by its rows."""

    def read(operands: Mapping[str, Any], rows: str) -> Mapping[str, Any]:
        changed = {
            name: Ref(batch) if value in (Ref("x"), Ref("gathered")) else value for name, value in operands.items()
        }
        if changed == operands:
            return operands
        return {name: value for name, value in changed.items() if name not in (rows, "gathered")}

    operands = dict(read(call.operands, OPS[call.op].by_name["x"].rows if "x" in call.operands else ""))
    if "layers" in operands:
        operands["layers"] = tuple(read(layer, "rows") for layer in operands["layers"])
    return replace(call, operands=operands)
