"""The calls of members that share weights: each product stands between what they have of their own."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fusemlp.program.program import Ref

if TYPE_CHECKING:
    from fusemlp.program.builder import Builder


def _mixed(build: Builder, layer: int) -> Any:
    """The operands of what members do before the product of ``layer``: after that of the layer before it, if any,
    and without factors r for the heads."""
    dropout = build.dropout(layer - 1) if layer else None
    activation = build.activation(layer - 1) if layer else {}
    return {
        "x": Ref(f"u{layer}") if layer else build.x,
        "rows": None if layer else build.rows,
        "s": Ref(f"s{layer - 1}") if layer else None,
        "b": Ref(f"b{layer - 1}") if layer else None,
        "r": Ref(f"r{layer}") if layer < build.net.layers - 1 else None,
        **{name: activation.get(name) for name in ("activation", "slope")},
        "dropout": dropout,
    }


def _mix(build: Builder, layer: int) -> Ref:
    """The inputs of a layer's product, for all members."""
    given, width = _mixed(build, layer), build.net.sizes[layer]
    y, dropout = build.work(f"h{layer}", width), given["dropout"]
    label = given["activation"] or ""
    build.call(
        "affine_members",
        label if dropout is None else f"{label} dropout {dropout.rate:g}",
        y=y,
        **given,
        counters=build.counters,
        keep=build.work(f"keep{layer}", width, "bool") if dropout and build.traits.stores_masks else None,
    )
    return y


def hidden(build: Builder, layer: int) -> None:
    """A hidden layer up to its product, which has no bias."""
    width = build.net.sizes[layer + 1]
    build.call(
        "linear",
        "",
        [build.product(layer)],
        x=_mix(build, layer),
        w=build.weight(layer),
        b=build.add(f"zeros{layer}", (width,), "real", "control"),
        y=build.work(f"u{layer + 1}", width),
        activation="identity",
    )


def heads(build: Builder, output: str) -> Ref:
    """The output layer of each member."""
    last = build.net.layers - 1
    h, z = _mix(build, last), build.work(output, build.net.sizes[-1])
    build.call("linear_members", "", [build.product(last)], x=h, w=build.weight(last), b=Ref(f"b{last}"), z=z)
    return z


def back(build: Builder) -> None:
    """From dz of the heads to the gradients by all that members have of their own, and by the products."""
    last, rule = build.net.layers - 1, build.step.rule
    common: dict[str, Any] = {"rule": rule, "counters": build.counters}
    for layer in range(last, -1, -1):
        outputs, inputs = build.net.sizes[layer + 1], build.net.sizes[layer]
        # what is trained below
        needed = any(int(short[1:]) < layer or short == f"r{layer}" for short in build.rules)
        if not needed:
            return
        dy = build.work(f"dh{layer}", inputs)
        products = [(build.batch, inputs, outputs)]
        if layer == last:
            dz = Ref(f"dz{layer + 1}")
            build.call("grad_input_members", "", products, dz=dz, w=build.weight(layer), dx=dy)
        else:
            h, dz = Ref(f"h{layer}"), Ref(f"du{layer + 1}")
            given: dict[str, Any] = {"y": h, "dz_prev": dy, "activation": "identity"}
            build.call("grad_input", "identity", products, dz=dz, w=build.weight(layer), **given)
        own = _mixed(build, layer)
        names: dict[str, str] = {"ds": f"s{layer - 1}", "db": f"b{layer - 1}", "dr": f"r{layer}"}
        by_own: dict[str, Any] = {name: build.gradient(short) for name, short in names.items()}
        build.call(
            "grad_affine_members",
            own["activation"] or "",
            dy=dy,
            **own,
            dx=build.work(f"du{layer}", inputs) if layer else None,
            **by_own,
            keep=Ref(f"keep{layer}") if own["dropout"] and build.traits.stores_masks else None,
            **common,
        )


def gradients(build: Builder, **clock: Any) -> tuple[dict[str, Any], ...]:
    """The layers of ``grad_weight`` whose weights are shared; the call for the heads is made here."""
    last = build.net.layers - 1
    if {f"w{last}", f"b{last}"} & build.rules.keys():
        head = {"dz": Ref(f"dz{last + 1}"), "x": Ref(f"h{last}")}
        by_head = {"dw": build.gradient(f"w{last}"), "db": build.gradient(f"b{last}")}
        products = [build.by_weight(last)] if f"w{last}" in build.rules else []
        build.call("grad_weight_members", "", products, **head, **by_head, **clock)
    return tuple(
        {"dz": Ref(f"du{layer + 1}"), "x": Ref(f"h{layer}"), "dw": build.gradient(f"w{layer}"), "db": None}
        for layer in build.having("w")
        if layer < last
    )
