"""The program of the resident plan: one call that runs whole steps, as many as it is told to."""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from typing import Any

from fusemlp.describe.network import MLP
from fusemlp.program.layout import RATE_ROWS, REMEMBERED, Layout, short_names
from fusemlp.program.lowering import Inputs, OptionsFor
from fusemlp.program.program import Call, Program, Ref, Value
from fusemlp_kernels.contract import (
    COUNTERS,
    HYPER,
    RATE_COLUMNS,
    STATS,
    Dropout,
    LossSpec,
    ResidentLayer,
    Ridge,
    Segment,
    TensorRule,
    UpdateRule,
)


def lower_resident(
    net: MLP,
    spec: LossSpec,
    rule: UpdateRule,
    options_for: OptionsFor,
    batch_size: int,
    batches: int,
    layout: Layout,
    inputs: Inputs,
    *,
    seed: int,
    real_bytes: int,
    compute_bytes: int | None = None,
    epochs: int = 1,
    ridge: Ridge | None = None,
) -> Program:
    """The program of training on batches of ``batch_size`` rows, of ``epochs`` epochs of at most ``batches`` batches
    one behind the other.

    With ``compute_bytes`` the products read the parameters rounded, in the arena "shadow". ``ridge``: a penalty that is
    no part of the loss.
    """
    options = {short: options_for(name) for short, name in short_names(net).items()}
    rules = {short: options[short][1] for short in layout.places if options[short][0]}
    program = _structure(
        net,
        spec,
        rule.kind,
        rule.state_count,
        tuple(rules),
        batch_size,
        batches,
        layout,
        inputs,
        real_bytes,
        compute_bytes,
        epochs,
        ridge is not None,
    )
    return program.renumbered(**_numbers(net, spec, rule, rules, layout, seed, ridge))


def _numbers(
    net: MLP,
    spec: LossSpec,
    rule: UpdateRule,
    rules: Mapping[str, TensorRule],
    layout: Layout,
    seed: int,
    ridge: Ridge | None,
) -> dict[str, Any]:
    """The operands with the numbers in which models of one structure differ; ``rules`` has the trained tensors."""
    places = layout.places
    numbers = {
        "layers": tuple(_layer(net, layout, index, seed) for index in range(net.layers)),
        "segments": tuple(Segment(places[short].offset, places[short].size, own) for short, own in rules.items()),
        "rule": rule,
        "loss": spec,
    }
    return numbers if ridge is None else {**numbers, "ridge": ridge}


@lru_cache(maxsize=REMEMBERED)
def _structure(
    net: MLP,
    spec: LossSpec,
    rule_kind: str,
    state_count: int,
    trained: tuple[str, ...],
    batch_size: int,
    batches: int,
    layout: Layout,
    inputs: Inputs,
    real_bytes: int,
    compute_bytes: int | None,
    epochs: int,
    penalised: bool,
) -> Program:
    """What ``lower_resident`` says, with numbers of no model's.

    Those of the loss and the network are compared as numbers are, and two zeros of different signs are one: here
    nothing may depend on them.
    """
    rule, own = UpdateRule(rule_kind), TensorRule()
    mixed = compute_bytes is not None
    states = tuple(f"state{index}" for index in range(state_count))
    outputs = net.sizes[-1]
    integer = spec.kind == "cross_entropy" and not spec.soft
    values = [Value(name, place.shape, "real", "parameter") for name, place in layout.places.items()]
    for short in trained:
        shape = layout.places[short].shape
        values.append(Value(f"d{short}", shape, "real", "gradient"))
        values += [Value(f"{short}.{state}", shape, "real", "state") for state in states]
    values += [
        Value("x", (inputs.rows, net.sizes[0]), "compute" if mixed else "real", "data"),
        Value("target", (inputs.rows,) if integer else (inputs.rows, outputs), "int64" if integer else "real", "data"),
        Value("rows", (epochs * batches * batch_size,), "int64", "control"),
        Value("counters", (COUNTERS,), "int64", "control"),
        Value("hyper", (HYPER,), "float64", "control"),
        Value("rates", (1 + RATE_ROWS, RATE_COLUMNS), "float64", "control"),
        Value("stats", (STATS,), "float64", "control"),
    ]
    operands: dict[str, Any] = {
        name: Ref(name) for name in ("x", "target", "rows", "counters", "hyper", "rates", "stats")
    }
    if epochs > 1:
        values.append(Value("history", (epochs, STATS), "float64", "control"))
        operands["history"] = Ref("history")
    if inputs.weighted:
        values.append(Value("weight", (inputs.rows,), "real", "data"))
        operands["weight"] = Ref("weight")
    if inputs.class_weighted:
        values.append(Value("class_weight", (outputs,), "real", "control"))
        operands["class_weight"] = Ref("class_weight")
    arenas = {"params": tuple(layout.places), "grads": tuple(f"d{short}" for short in trained)}
    arenas |= {state: tuple(f"{short}.{state}" for short in trained) for state in states}
    if mixed:
        weights = [short for short in layout.places if short[0] == "w"]
        values += [Value(f"{short}.shadow", layout.places[short].shape, "compute", "shadow") for short in weights]
        arenas["shadow"] = tuple(f"{short}.shadow" for short in weights)
        operands["shadow"] = Ref("shadow")
    operands |= {
        "batch": batch_size,
        "params": Ref("params"),
        "gradients": Ref("grads"),
        "states": tuple(Ref(state) for state in states),
        **_numbers(net, spec, rule, dict.fromkeys(trained, own), layout, 0, Ridge() if penalised else None),
    }
    call = Call("train_resident", operands, f"{spec.kind} {rule_kind}", _products(net, batch_size, trained))
    return Program(
        {value.name: value for value in values}, (call,), arenas, frozenset(trained), real_bytes, compute_bytes
    )


def _layer(net: MLP, layout: Layout, index: int, seed: int) -> ResidentLayer:
    activation = net.activations[index]
    rate = net.dropouts[index] if index < net.layers - 1 else 0.0
    places = layout.places
    return ResidentLayer(
        inputs=net.sizes[index],
        outputs=net.sizes[index + 1],
        w=places[f"w{index}"].offset,
        b=places[f"b{index}"].offset,
        activation=activation.name,
        slope=activation.slope if activation.name == "leaky_relu" else 0.0,
        slope_at=places[f"s{index}"].offset if activation.name == "prelu" else None,
        dropout=Dropout(rate, index, seed) if rate else None,
    )


def _products(net: MLP, batch: int, trained: tuple[str, ...]) -> tuple[tuple[int, int, int], ...]:
    """M, N, K of a step's matrix products: forward, back to the inputs, and by the weights."""
    first = min((int(short[1:]) for short in trained), default=net.layers)
    products = []
    for index in range(net.layers):
        inputs, outputs = net.sizes[index], net.sizes[index + 1]
        products.append((batch, outputs, inputs))
        if index > first:
            products.append((batch, inputs, outputs))
        if f"w{index}" in trained:
            products.append((outputs, inputs, batch))
    return tuple(products)
