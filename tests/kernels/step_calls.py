"""The calls of a training step over arrays of a test, as the engine's lowering makes them of a network."""

from __future__ import annotations

from dataclasses import dataclass

from calls import SLOPED

from fusemlp_kernels.contract import NEEDS_Z, Dropout


@dataclass(frozen=True)
class Layer:
    """A layer's activation, slope of leaky_relu, and dropout."""

    activation: str
    slope: float = 0.0
    dropout: Dropout | None = None


def step_calls(
    traits,
    layers,
    tensors,
    rules,
    work,
    *,
    batch,
    rule,
    loss,
    data,
    control,
    arenas,
    segments,
    ridge=None,
    penalised=False,
):
    """(op, operands) of each call.

    ``tensors``: views by name: parameters (w0, b0, s0), gradients (dw0), states (w0.state0), shadows (w0.shadow).
    ``rules`` has the trained tensors. ``work(name, shape, dtype)`` makes a value of the step. ``data``: x, target and
    perhaps weight and class_weight; ``control``: rows, counters, hyper, rates, stats; ``arenas``: params, grads,
    state0, ..., perhaps shadow. ``penalised``: there is a penalty, though it may be 0.
    """
    calls = []
    last = len(layers) - 1
    width = [tensors["w0"].shape[1], *(tensors[f"w{index}"].shape[0] for index in range(len(layers)))]
    first = min((int(name[1:]) for name in rules), default=len(layers))
    counters, rows = control["counters"], control["rows"]
    gathered = None if traits.gathers_in_load else work("gathered", (batch, width[0]), "compute")
    outputs = {0: data["x"] if gathered is None else gathered}
    kept = {}

    def weights(index):
        return tensors.get(f"w{index}.shadow", tensors[f"w{index}"])

    def activation(index):
        found = {"activation": layers[index].activation}
        if layers[index].activation in SLOPED:
            found["slope"] = layers[index].slope
        if layers[index].activation == "prelu":
            found["slope_param"] = tensors[f"s{index}"]
        return found

    def source(index, name):
        if index:
            return {"x": outputs[index]}
        return {"x": data["x"], name: rows} | ({} if gathered is None else {"gathered": gathered})

    for index in range(last):
        shape = batch, width[index + 1]
        operands = {
            **source(index, "rows"), "w": weights(index), "b": tensors[f"b{index}"],
            "y": work(f"h{index + 1}", shape, "compute"), "counters": counters, **activation(index),
        }  # fmt: skip
        if layers[index].activation in NEEDS_Z and index >= first:
            operands["z"] = kept[f"z{index}"] = work(f"z{index + 1}", shape, "compute")
        if layers[index].dropout is not None:
            operands["dropout"] = layers[index].dropout
            if traits.stores_masks:
                operands["keep"] = kept[f"keep{index}"] = work(f"keep{index + 1}", shape, "bool")
        outputs[index + 1] = operands["y"]
        calls.append(("linear", operands))
    dz = work(f"dz{last + 1}", (batch, width[-1]), "compute") if first <= last else None
    operands = {
        **source(last, "x_rows"), "w": weights(last), "b": tensors[f"b{last}"], "dz": dz, "rows": rows,
        **{name: data[name] for name in ("target", "weight", "class_weight") if data.get(name) is not None},
        "counters": counters, "stats": control["stats"], "loss": loss, **activation(last),
    }  # fmt: skip
    if dz is not None and layers[last].activation == "prelu":
        operands["dslope"] = kept[f"dslope{last}"] = work(f"dslope{last}", (1,), "real")
    if ridge is not None:
        operands |= {"ridge": ridge, "shares": work("shares", (1,), "float64")}
    calls.append(("linear_loss_grad", operands))
    gradients = {last: dz}
    for index in range(last - 1, first - 1, -1):
        operands = {
            "dz": gradients[index + 1], "w": weights(index + 1), "y": outputs[index + 1],
            "dz_prev": work(f"dz{index + 1}", (batch, width[index + 1]), "compute"), **activation(index),
        }  # fmt: skip
        if f"z{index}" in kept:
            operands["z"] = kept[f"z{index}"]
        if layers[index].activation == "prelu":
            operands["dslope"] = kept[f"dslope{index}"] = work(f"dslope{index}", (1,), "real")
        if layers[index].dropout is not None:
            operands |= {"dropout": layers[index].dropout, "counters": counters}
            if traits.stores_masks:
                operands["keep"] = kept[f"keep{index}"]
        gradients[index] = operands["dz_prev"]
        calls.append(("grad_input", operands))
    clock = {"rule": rule, "counters": counters, "hyper": control["hyper"], "rates": control["rates"]}
    if not rules:
        return [*calls, ("advance", clock)]
    penalised = penalised or (ridge is not None and ridge.strength != 0.0)
    whole = rule.clip_norm is not None or rule.accumulate > 1 or penalised or rule.kind not in traits.fused_updates

    def tensor(name):
        kind = name[0]
        if whole:
            return {f"d{kind}": tensors[f"d{name}"] if name in rules else None}
        if name not in rules:
            return {kind: None}
        state = tuple(tensors[f"{name}.state{i}"] for i in range(rule.state_count))
        shadow = {"w_shadow": tensors[f"{name}.shadow"]} if f"{name}.shadow" in tensors else {}
        return {kind: tensors[name], f"{kind}_state": state, f"{kind}_rule": rules[name], **shadow}

    grouped, slopes = [], []
    for index in range(first, last + 1):
        if {f"w{index}", f"b{index}"} & rules.keys():
            given = {"x": outputs[index], "dz": gradients[index]}
            if not index and gathered is None:
                given |= {"x": data["x"], "rows": rows}
            grouped.append({**given, **tensor(f"w{index}"), **tensor(f"b{index}")})
        name = f"s{index}"
        if name in rules and whole:
            slopes.append({"dslope": kept[f"dslope{index}"], "grad": tensors[f"d{name}"]})
        elif name in rules:
            state = tuple(tensors[f"{name}.state{i}"] for i in range(rule.state_count))
            slopes.append(
                {"dslope": kept[f"dslope{index}"], "param": tensors[name], "state": state, "rule": rules[name]}
            )
    both = {"layers": tuple(grouped), "slopes": tuple(slopes)}
    if not whole:
        return [*calls, ("grad_weight_update", {**both, **clock})]
    calls.append(("grad_weight", {**both, "rule": rule, "counters": counters}))
    if penalised:
        pulled = tuple({"w": tensors[name], "dw": tensors[f"d{name}"]} for name in rules if name[0] == "w")
        shares = {"shares": dict(calls)["linear_loss_grad"]["shares"], "counters": counters, "stats": control["stats"]}
        calls.append(("penalty", {"layers": pulled, "ridge": ridge, **shares}))
    states = tuple(arenas[f"state{i}"] for i in range(rule.state_count))
    shadow = {} if arenas.get("shadow") is None else {"shadow": arenas["shadow"]}
    flat = {"params": arenas["params"], "grads": arenas["grads"], "states": states, "segments": tuple(segments)}
    return [*calls, ("update", {**flat, **clock, **shadow})]
