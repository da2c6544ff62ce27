"""The program of a network whose members share weights: each product stands between what members have of their own.

The members are rows of the batch, one after another. Before the product of layer l a row is multiplied by its member's
r, and after it by s, to which b is added (Wen, Tran and Ba, "BatchEnsemble", 2020); each member has its output layer.
A first product of codes has the factors r within it, and they their gradients with the weights.
"""

from __future__ import annotations

from typing import Any

from fusemlp.program.builder import Builder
from fusemlp.program.program import Ref
from fusemlp_kernels.contract import LossSpec, UpdateRule


class MembersBuilder(Builder):
    """Builds each layer as ``affine_members`` and a product; the former picks rows, or a product of codes."""

    def gathers(self) -> bool:
        """Return whether the first product has a copy of the rows of its batch."""
        return self.step.inputs.coding is not None

    def hidden(self, layer: int) -> None:
        """A hidden layer up to its product, which has no bias."""
        width, operands = self.net.sizes[layer + 1], self.operands(layer)
        operands["b"] = self.add(f"zeros{layer}", (width,), "real", "control")
        if layer == 0 and self.gathers():
            operands |= {"r": Ref("r0"), "counters": self.counters, **self.picked(0)}
        else:
            operands["x"] = self.mix(layer)
        y = self.work(f"u{layer + 1}", width)
        self.call("linear", "", [self.product(layer)], **operands, y=y, activation="identity")

    def outputs(self, name: str, activation: dict[str, Any]) -> Ref:
        """The output layer of each member."""
        last = self.last
        h, z = self.mix(last), self.work(name, self.net.sizes[-1])
        self.call("linear_members", "", [self.product(last)], x=h, w=self.weight(last), b=Ref(f"b{last}"), z=z)
        return z

    def loss(self, spec: LossSpec) -> None:
        """The output layer of each member, the loss and its gradient."""
        z = self.outputs(f"z{self.net.layers}", {})
        self.call("loss_grad", spec.kind, z=z, **self.loss_operands(spec))

    def mixing(self, layer: int) -> dict[str, Any]:
        """The operands of what members do before the product of ``layer``: after that of the layer before it, if any,
        and without factors r for the output layers."""
        activation = self.activation(layer - 1) if layer else {}
        return {
            "x": Ref(f"u{layer}" if layer else "x"),
            "rows": None if layer else self.rows,
            "s": Ref(f"s{layer - 1}") if layer else None,
            "b": Ref(f"b{layer - 1}") if layer else None,
            "r": Ref(f"r{layer}") if layer < self.last else None,
            **{name: activation.get(name) for name in ("activation", "slope")},
            "dropout": self.dropout(layer - 1) if layer else None,
        }

    def mix(self, layer: int) -> Ref:
        """The inputs of a layer's product, for all members."""
        mixing, width = self.mixing(layer), self.net.sizes[layer]
        y, dropout, label = self.work(f"h{layer}", width), mixing["dropout"], mixing["activation"] or ""
        self.call(
            "affine_members",
            label if dropout is None else f"{label} dropout {dropout.rate:g}",
            y=y,
            **mixing,
            counters=self.counters,
            keep=self.work(f"keep{layer}", width, "bool") if dropout and self.traits.stores_masks else None,
        )
        return y

    def backward(self) -> None:
        """From dz of the output layers through the products, to the gradients by what members have of their own."""
        # a product of codes is the end
        for layer in range(self.last, self.gathers() - 1, -1):
            # is anything trained below?
            if not any(int(short[1:]) < layer or short == f"r{layer}" for short in self.rules):
                return
            outputs, inputs = self.net.sizes[layer + 1], self.net.sizes[layer]
            dy, products = self.work(f"dh{layer}", inputs), [(self.batch, inputs, outputs)]
            if layer == self.last:
                dz = Ref(f"dz{layer + 1}")
                self.call("grad_input_members", "", products, dz=dz, w=self.weight(layer), dx=dy)
            else:
                ends: dict[str, Any] = {"y": Ref(f"h{layer}"), "dz_prev": dy, "activation": "identity"}
                dz = Ref(f"du{layer + 1}")
                self.call("grad_input", "identity", products, dz=dz, w=self.weight(layer), **ends)
            mixing = self.mixing(layer)
            self.call(
                "grad_affine_members",
                mixing["activation"] or "",
                dy=dy,
                **mixing,
                dx=self.work(f"du{layer}", inputs) if layer else None,
                ds=self.gradient(f"s{layer - 1}"),
                db=self.gradient(f"b{layer - 1}"),
                dr=self.gradient(f"r{layer}"),
                keep=Ref(f"keep{layer}") if mixing["dropout"] and self.traits.stores_masks else None,
                rule=self.step.rule,
                counters=self.counters,
            )

    def weight_gradients(self, rule: UpdateRule) -> None:
        """The gradients by the output layers of the members, and by the shared weights."""
        last, common = self.last, {"rule": rule, "counters": self.counters}
        if {f"w{last}", f"b{last}"} & self.rules.keys():
            products = [self.by_weight(last)] if f"w{last}" in self.rules else []
            by_head = {"dw": self.gradient(f"w{last}"), "db": self.gradient(f"b{last}")}
            self.call(
                "grad_weight_members", "", products, dz=Ref(f"dz{last + 1}"), x=Ref(f"h{last}"), **by_head, **common
            )
        shared = [layer for layer in self.having("w") if layer < last]
        layers: list[dict[str, Any]] = [
            {"dz": Ref(f"du{layer + 1}"), "x": Ref(f"h{layer}"), "dw": self.gradient(f"w{layer}"), "db": None}
            for layer in shared
        ]
        if self.gathers() and {"w0", "r0"} & self.rules.keys():
            if 0 not in shared:
                layers.insert(0, {"dz": Ref("du1"), "dw": None, "db": None})
            factors = {"r": Ref("r0"), "w": self.weight(0), "dr": self.gradient("r0")}
            layers[0] |= {"x": self.gathered, "coding": self.step.inputs.coding, **factors}
        if layers:
            products = [self.by_weight(layer) for layer in shared]
            self.call("grad_weight", "", products, layers=tuple(layers), slopes=(), **common)
