"""From a network, a loss and an optimizer to the program of a training step, or of the forward pass alone.

A step of L layers is L forward calls (the last with loss and dz), L - 1 ``grad_input`` and one grouped
``grad_weight_update`` at the end, when nothing reads the old weights any more: 2L calls. Clipping and accumulation
need the gradients of the whole network at once: then ``grad_weight`` and ``update`` stand at the end. Privacy puts
``clip_examples`` before them. Adversarial training begins with the calls that move the batch. The members of a network
are rows of the batch, one after another, and each product stands between what they have of their own.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache
from typing import Any

from fusemlp.describe.network import MLP
from fusemlp.program import builder
from fusemlp.program.builder import Builder
from fusemlp.program.layout import RATE_ROWS, REMEMBERED, Layout, short_names
from fusemlp.program.program import Program, Ref
from fusemlp.program.step import BatchAttack, Inputs, Step
from fusemlp_kernels.contract import HYPER, RATE_COLUMNS, LossSpec, Segment, TensorRule, Traits, UpdateRule, batch_parts

# Return, for a parameter's state_dict name, if it is trained, and its changes to the optimizer's rule.
OptionsFor = Callable[[str], tuple[bool, TensorRule]]


def lower_training(
    net: MLP,
    spec: LossSpec,
    rule: UpdateRule,
    options_for: OptionsFor,
    batch_size: int,
    traits: Traits,
    layout: Layout,
    inputs: Inputs,
    *,
    seed: int,
    **others: Any,
) -> Program:
    """Return the program of one training step; ``others`` are the other fields of ``Step``."""
    trained = []
    for short, name in short_names(net).items():
        trainable, changes = options_for(name)
        if trainable:
            trained.append((short, changes))
    # without dropout no call has the seed, and models that differ in it alone have one program
    seed = seed if any(net.dropouts) else 0
    options = {"rule": rule, "trained": tuple(trained), "seed": seed, **others}
    return lower(Step(net, batch_size, traits, layout, inputs, spec, **options))


@lru_cache(maxsize=REMEMBERED)
def lower(step: Step) -> Program:
    """Return the program of a step; the models of a fleet share it, so it is remembered."""
    build, last = Builder(step), step.net.layers - 1
    if step.rule is not None:
        build.add("hyper", (HYPER,), "float64", "control")
        build.add("rates", (1 + RATE_ROWS, RATE_COLUMNS), "float64", "control")
    if step.against is not None:
        attack(build, step.against)
    build.hidden(step.gradient or 0)
    if step.spec is not None:
        build.loss(step.spec)
    elif step.net.members > 1:
        builder.heads_of_members(build, "y")
    elif step.gradient is None or build.top > last:
        build.linear(last, "y", build.activation(last))
    if step.net.members > 1:
        if step.rule is not None:
            builder.back_through_members(build)
    else:
        for layer in range(build.top, build.first, -1):
            build.grad_input(layer)
    if step.rule is not None:
        update(build, step.rule)
    return build.program()


def attack(build: Builder, attack: BatchAttack) -> None:
    """Move the batch; what follows reads it in place of x."""
    first, spec = build.first, build.step.spec
    assert spec is not None
    rows: dict[str, Any] = {"rows": build.rows, "counters": build.counters, "change": attack.change}
    x, build.x = build.x, build.work("adv", build.net.sizes[0])
    build.call("perturb", "start", x=x, start=build.x, **rows)
    # the gradient goes back to the inputs
    build.first = -1
    build.attacking = True
    for _ in range(attack.steps):
        build.hidden()
        build.loss(replace(spec, accuracy=False))
        for layer in range(build.top, -1, -1):
            build.grad_input(layer)
        build.call("perturb", attack.change.norm, x=x, dx=Ref("dx"), adv=build.x, **rows)
    build.first, build.attacking = first, False


def update(build: Builder, rule: UpdateRule) -> None:
    """The gradients by the parameters and the update."""
    step, places = build.step, build.step.layout.places
    clock: dict[str, Any] = {"rule": rule, "counters": build.counters}
    applied: dict[str, Any] = {"hyper": Ref("hyper"), "rates": Ref("rates")}
    if not build.rules:
        build.call("advance", "", **clock, **applied)
        return
    # models of one launch have the same calls, whatever their numbers
    penalised = step.ridge is not None and (step.ridge.strength != 0.0 or build.traits.resident is not None)
    clipped = step.scaled or rule.clip_norm is not None
    private = step.privacy
    sharding = step.sharding
    changed = step.keep_gradients or penalised or sharding is not None or build.members > 1
    whole = changed or clipped or rule.accumulate > 1
    parts = 1
    if not (whole or step.resident):
        weights = sum(places[short].size for short in build.rules)
        parts = min(step.most_parts, batch_parts(build.traits, build.batch, weights))
    single = parts == 1 and private is None
    fused = rule.kind in build.traits.fused_updates and not whole and single
    for short in build.rules:
        if not fused:
            build.gradient(short)
        for index in build.states:
            build.add(f"{short}.state{index}", places[short].shape, "real", "state")
    shared = build.members > 1
    gradients: dict[str, Any] = {
        "layers": builder.gradients_of_members(build, **clock)
        if shared
        else tuple(
            {**_inputs(build, layer), **_tensor(build, "w", layer, fused), **_tensor(build, "b", layer, fused)}
            for layer in build.having("wb")
        ),
        "slopes": tuple(
            {"dslope": Ref(f"dslope{layer}"), **_tensor(build, "s", layer, fused)}
            for layer in build.having("s")
            if not shared
        ),
        **clock,
    }
    if private is not None:
        build.call(
            "clip_examples",
            f"{private.clip:g}",
            layers=tuple(
                {**_inputs(build, layer), **{f"{kind}_trained": f"{kind}{layer}" in build.rules for kind in "wb"}}
                for layer in build.having("wb")
            ),
            clip=private.clip,
            counters=build.counters,
        )
    if sharding is not None:
        gradients["rule"] = replace(rule, accumulate=1)
    heads = [build.net.layers - 1] if shared else []
    products = [build.by_weight(layer) for layer in build.having("w") if layer not in heads]
    if fused:
        build.call("grad_weight_update", rule.kind, products, **gradients, **applied)
        return
    # gradients that are changed before the update have another norm
    normed = build.traits.norms_gradients and clipped and not (changed or step.resident)
    common: dict[str, Any] = {"norm": build.add("norm", (1,), "float64", "work")} if normed else {}
    if parts > 1:
        common |= {"parts": parts, "part": step.layout.size}
    if not shared or gradients["layers"]:
        build.call("grad_weight", f"in {parts} parts" if parts > 1 else "", products, **gradients, **common)
    if penalised:
        build.call(
            "penalty",
            "ridge",
            layers=tuple({"w": Ref(f"w{layer}"), "dw": Ref(f"dw{layer}")} for layer in build.having("w")),
            ridge=step.ridge,
            shares=Ref("shares"),
            counters=build.counters,
            stats=Ref("stats"),
        )
    if sharding is not None:
        reduced: dict[str, Any] = {"grads": Ref("grads"), "stats": Ref("stats"), "rule": rule}
        build.call("all_reduce", str(sharding), **reduced, counters=build.counters)
    build.call(
        "update",
        rule.kind,
        params=Ref("params"),
        grads=Ref("grads"),
        states=tuple(Ref(f"state{index}") for index in build.states),
        segments=tuple(
            Segment(place.offset, place.size, changes, place.shape[-1], place.pitch)
            for short, changes in build.rules.items()
            for place in (places[short],)
        ),
        **applied,
        **clock,
        **common,
        shadow=Ref("shadow") if build.mixed else None,
        scaled=True if step.scaled else None,
        noise=None if private is None else private.noise,
        rows=None if private is None else build.rows,
    )


def _inputs(build: Builder, layer: int) -> dict[str, Any]:
    """The operands of which the gradients by a layer's weights and biases are made."""
    given: dict[str, Any] = {"dz": Ref(f"dz{layer + 1}"), "x": Ref(f"h{layer}")}
    if layer == 0:
        given["x"] = build.gathered or build.x
        if build.picks is not None and build.gathered is None:
            given["rows"] = build.picks
    return given


def _tensor(build: Builder, kind: str, layer: int, fused: bool) -> dict[str, Any]:
    """The operands of a tensor where its gradient is computed; ``fused``: and applied."""
    short = f"{kind}{layer}"
    names = ("grad", "param", "state", "rule") if kind == "s" else (f"d{kind}", kind, f"{kind}_state", f"{kind}_rule")
    gradient, param, state, rule = names
    if short not in build.rules:
        return {param if fused else gradient: None}
    if not fused:
        return {gradient: Ref(f"d{short}")}
    states = tuple(Ref(f"{short}.state{index}") for index in build.states)
    found = {param: Ref(short), state: states, rule: build.rules[short]}
    return {**found, "w_shadow": Ref(f"{short}.shadow")} if build.mixed and kind == "w" else found
