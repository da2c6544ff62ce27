"""Compile the Triton kernels ahead of time, on a machine without a GPU.

``variants`` follows the binders (``layers``, ``grouped``): every kernel, element type, tile and constant that they can
launch. The length of the grouped kernels' task table changes only one reduction before the work begins, so the longer
ones are listed with the largest tile and the most state only.
"""

from __future__ import annotations

import ast
import dataclasses
import functools
import hashlib
import inspect
import textwrap
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any
from unittest import mock

import kernel_machine_code
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.language import target_info

from fusemlp_kernels.contract import ACTIVATIONS, LOSSES, LossSpec
from fusemlp_kernels.errors import unknown_name
from fusemlp_kernels.pointwise import OPTIMIZERS
from fusemlp_kernels.triton import (
    card,
    chip,
    clock,
    configs,
    gradients,
    linear,
    loss,
    members,
    narrow,
    resident,
    rowwise,
    update,
)
from fusemlp_kernels.triton.configs import Architecture, Tile

TARGETS = ("sm_80", "sm_86", "sm_90", "sm_100", "sm_120", "gfx942")
KERNELS = {
    "linear": linear.linear_kernel,
    "grad_input": gradients.grad_input_kernel,
    "clip_examples": update.clip_examples_kernel,
    "grad_weight": gradients.grad_weight_kernel,
    "linear_loss_grad": loss.linear_loss_grad_kernel,
    "loss_grad": loss.loss_grad_kernel,
    "update": update.update_kernel,
    "norm": update.norm_kernel,
    "advance": clock.advance_kernel,
    "perturb": rowwise.perturb_kernel,
    "affine_members": members.affine_members_kernel,
    "grad_affine_members": members.grad_affine_members_kernel,
    "linear_members": members.linear_members_kernel,
    "grad_input_members": members.grad_input_members_kernel,
    "normalise": rowwise.normalise_kernel,
    "grad_normalise": rowwise.grad_normalise_kernel,
    "add": rowwise.add_kernel,
    "encode": rowwise.encode_kernel,
    "grad_encode": rowwise.grad_encode_kernel,
    "resident": resident.resident_kernel,
    "card": card.card_kernel,
    "chip": chip.chip_kernel,
    "narrow": narrow.narrow_kernel,
    "predict_narrow": narrow.predict_narrow_kernel,
}
PRODUCTS = (
    "linear",
    "grad_input",
    "grad_weight",
    "linear_loss_grad",
    "linear_members",
    "grad_input_members",
    "resident",
    "card",
    "chip",
    "narrow",
    "predict_narrow",
)
# Those of the matrices that can be tensor descriptors.
BLOCKS = {"linear": linear.BLOCKS, "grad_input": gradients.INPUT_BLOCKS}
# train_resident scales no loss
RESIDENT_PRECISIONS = ("fp32", "tf32", "bf16")
ELEMENTS = {"fp32": "fp32", "tf32": "fp32", "bf16": "bf16", "fp16": "fp16"}
RULES = tuple(OPTIMIZERS)
# Of these the kernels keep the most states.
HEAVIEST = "adam"

# The element types of the kernels' pointers, by name; "compute" is that of the matrix products. A number that is not
# in FLOATS is an integer.
POINTERS = {
    **dict.fromkeys(("x", "w", "y", "z", "dz", "dx", "dy", "adv", "out", "compute", "shadow", "weights"), "compute"),
    **dict.fromkeys(("other", "dother", "centre", "radius", "zc", "zr", "dzc", "dzr", "lower", "upper"), "compute"),
    **dict.fromkeys(("inputs", "reach", "least", "most", "source", "signs", "turned"), "fp32"),
    **dict.fromkeys(("b", "slope_param", "dslope", "target", "weight", "class_weight", "settings"), "fp32"),
    **dict.fromkeys(("s", "r", "ds", "db", "dr", "sums", "g"), "fp32"),
    **dict.fromkeys(("real", "parameters", "grads", "first", "second", "average", "slopes", "shares"), "fp32"),
    **dict.fromkeys(("partials", "hyper", "rates", "rule", "rules", "tensors", "norm", "stats"), "fp64"),
    **dict.fromkeys(("measured", "epoch_stats", "limit", "noise", "ramp"), "fp64"),
    **dict.fromkeys(("rows", "x_rows", "labels", "counters", "table", "layers", "draws", "segments", "live"), "i64"),
    **{"arrived": "i64", "copies": "fp64"},
    "ticket": "i32",
    "biases": "fp32",
}
FLOATS = ("slope", "output_slope", "keep_scale", "kept_share", "length", "eps", "low", "high", "strength")
# Pointers whose offsets reach beyond their own memory; see ``Device.far_base``.
BASES = ("compute", "real")


@dataclass(frozen=True)
class Variant:
    """A kernel as it is compiled: element type, constants, and what the launch says of it."""

    kernel: str
    precision: str
    tile: Tile
    constants: Mapping[str, Any] = field(hash=False)

    @property
    def name(self) -> str:
        """Return a name that tells it from the kernel's other variants."""
        tile = self.tile
        size = "x".join(str(side) for side in (tile.rows, tile.columns, tile.depth) if side)
        flags = {"ALIGNED": "aligned", "CROSS_ENTROPY": "cross_entropy", "LABELS": "labels"}
        flags |= {"UPDATES": "updates", "NOISY": "noisy", "BACK": "back", "DESCRIBED": "described"}
        words = [word for flag, word in flags.items() if self.constants.get(flag)]
        numbers = {"TASKS": "tasks", "OUTPUTS": "outputs", "FIRST": "inputs", "LAYERS": "layers"}
        numbers |= {"BM": "rows", "WIDTH": "units"} if self.kernel == "chip" else {}
        words += [_formulas(self.constants)] if self.kernel == "chip" or "LAYERS" in self.constants else []
        words += [f"parts={tile.parts}"] if "PARTS" in self.constants else []
        words += (
            [RULES[self.constants["RULE"]]] if self.constants.get("UPDATES", True) and "RULE" in self.constants else []
        )
        words += [f"{word}={self.constants[name]}" for name, word in numbers.items() if name in self.constants]
        words += [f"split={tile.split}"] if tile.split > 1 and self.kernel not in ("resident", "card") else []
        return " ".join([self.precision, size, f"warps={tile.warps} stages={tile.stages}", *words])


def _formulas(constants: Mapping[str, Any]) -> str:
    """Return the formulas that a kernel is specialised on, such as "relu cross_entropy", and its flags that are set."""
    names = [ACTIVATIONS[constants["ACTIVATION"]], *([LOSSES[constants["LOSS"]]] if "LOSS" in constants else [])]
    names += [f"to {ACTIVATIONS[constants['OUTPUT']]}"] if constants["OUTPUT"] else []
    flags = ("GATHER", "WEIGHTED", "CLASSES", "ACCURACY", "SOFT")
    return " ".join([*names, *(flag.lower() for flag in flags if constants.get(flag))])


def variants(target: str) -> tuple[Variant, ...]:
    """Return the variants that the binders can launch on a target of ``TARGETS``."""
    if target not in TARGETS:
        raise unknown_name("target", target, TARGETS)
    arch = Architecture(configs.family_of(target), 1)
    found = [variant for precision in ELEMENTS for variant in _of_precision(arch, precision)]
    return tuple({(variant.kernel, variant.name): variant for variant in found}.values())


def _of_precision(arch: Architecture, precision: str) -> Iterator[Variant]:
    product = arch.product(precision)
    # small results with long reductions have them
    deep, deep_output = (configs.deep_tile(arch, precision, 1, 1, 1 << 10, table) for table in ("deep", "deep_output"))
    paths = [(tile, True) for tile in configs.tiles(arch.family, "forward", precision)]
    for tile, aligned in [*paths, (configs.general_tile(arch), False), *([(deep, True)] if deep else [])]:
        shared = {"PRODUCT": product, "ALIGNED": aligned, "PARTS": tile.parts}
        ahead, back = {**tile.sides("MNK"), **shared}, {**tile.sides("MKN"), **shared}
        for described in (False, aligned and configs.takes_descriptors(arch, precision, tile)):
            loads = {"SPLIT": tile.split, "DESCRIBED": described}
            yield Variant("linear", precision, tile, {**ahead, **loads})
            yield Variant("grad_input", precision, tile, {**back, **loads})
        if tile is not deep:
            yield Variant("linear_members", precision, tile, ahead)
            yield Variant("grad_input_members", precision, tile, back)
    paths = [(tile, True) for tile in configs.tiles(arch.family, "weight", precision)]
    for tile, aligned in [*paths, (configs.general_tile(arch), False)]:
        sides = {"BN": tile.rows, "BK": tile.columns, "BM": tile.depth, "PRODUCT": product, "ALIGNED": aligned}
        for updates, rule in [(False, RULES[0]), *((True, rule) for rule in RULES)]:
            heaviest = tile == paths[0][0] and rule == HEAVIEST
            for tasks in configs.TABLE_LENGTHS if heaviest else configs.TABLE_LENGTHS[:1]:
                constants = {
                    **sides,
                    "UPDATES": updates,
                    "RULE": RULES.index(rule),
                    "TASKS": tasks,
                    "PARTS": tile.parts,
                }
                yield Variant("grad_weight", precision, tile, constants)
    for entropy in (False, True):
        for aligned in (True, False):
            shared = {"ALIGNED": aligned, "CROSS_ENTROPY": entropy}
            for tile in [*configs.output_tiles(arch.family), *([deep_output] if deep_output and aligned else [])]:
                sides = {**tile.sides("MNK"), "PRODUCT": product, "SPLIT": tile.split}
                yield Variant("linear_loss_grad", precision, tile, {**sides, **shared})
            loss_tile = configs.loss_tile(precision, entropy, aligned)
            for labels in (False, True)[: 1 + entropy]:
                sides = {"BM": loss_tile.rows, "BN": loss_tile.columns, "LABELS": labels}
                yield Variant("loss_grad", ELEMENTS[precision], loss_tile, {**sides, **shared})
    for rule in RULES:
        for tasks in configs.TABLE_LENGTHS if rule == HEAVIEST else configs.TABLE_LENGTHS[:1]:
            for noisy, tile in ((False, configs.SWEEP), (True, configs.NOISY_SWEEP)):
                constants = {
                    "BLOCK": tile.columns,
                    "RULE": RULES.index(rule),
                    "TASKS": tasks,
                    "NOISY": noisy,
                    "MANY": 1,
                }
                yield Variant("update", ELEMENTS[precision], tile, constants)
        tile = configs.PARTS_SWEEP
        constants = {"BLOCK": tile.columns, "RULE": RULES.index(rule), "TASKS": 16, "NOISY": False, "MANY": tile.rows}
        yield Variant("update", ELEMENTS[precision], tile, constants)
    sides = {"BM": configs.CLIP.rows, "BK": configs.CLIP.columns}
    yield Variant("clip_examples", ELEMENTS[precision], configs.CLIP, sides)
    swept = {"BLOCK": configs.SWEEP.columns}
    yield Variant("perturb", ELEMENTS[precision], configs.SWEEP, swept)
    tile = configs.MEMBERS
    for aligned in (True, False):
        constants = {"BM": tile.rows, "BK": tile.columns, "ALIGNED": aligned}
        for kernel in ("affine_members", "grad_affine_members"):
            yield Variant(kernel, ELEMENTS[precision], tile, constants)
        for rows in configs.ROWS:
            for kernel in ("normalise", "grad_normalise", "add", "encode", "grad_encode"):
                yield Variant(kernel, ELEMENTS[precision], rows, {**constants, "BM": rows.rows, "BK": rows.columns})
    if precision in RESIDENT_PRECISIONS and arch.family in configs.CHIP:
        yield from _chip(configs.CHIP[arch.family], precision, product)
    if precision in RESIDENT_PRECISIONS:
        for resident_tile in configs.resident_tiles(arch.family, precision):
            constants = configs.resident_constants(resident_tile, product, entropy=True)
            yield Variant("resident", precision, resident_tile, constants)
        if "card" in configs.TABLES[arch.family]:
            for card_tile in configs.resident_tiles(arch.family, precision, "card"):
                for entropy in (False, True):
                    constants = configs.resident_constants(card_tile, product, entropy)
                    yield Variant("card", precision, card_tile, constants)
    yield from _narrow(arch, precision, product)
    yield Variant("norm", "fp32", configs.SWEEP, swept)
    yield Variant("advance", "fp32", configs.SMALL, {})


# The narrow kernels that are compiled ahead: the widths, the activation and the loss. Others compile on the card.
NARROW = (
    ((16, 64, 1), "relu", "cross_entropy"),
    ((32, 64, 16), "relu", "cross_entropy"),
    ((64, 64, 16), "relu", "mse"),
    *(((32, 64, 64, 16), activation, "cross_entropy") for activation in ("relu", "tanh")),
    *(((32, 64, 64, 16), "relu", kind) for kind in ("mse", "huber")),
    *(((32, 64, 64, 64, 16), "relu", kind) for kind in ("mse", "cross_entropy")),
)


def _narrow(arch: configs.Architecture, precision: str, product: str) -> Iterator[Variant]:
    for sizes, activation, kind in NARROW:
        tile = configs.narrow_tile(arch, precision, len(sizes) - 2)
        if tile is None or len(sizes) - 2 > configs.narrow_layers(arch):
            continue
        forward = {
            **configs.narrow_constants(tile, sizes), "ACTIVATION": ACTIVATIONS.index(activation), "OUTPUT": 0,
            "PRODUCT": product,
        }  # fmt: skip
        step = {
            **forward, "LOSS": LOSSES.index(kind), "SOFT": False, "GATHER": 1, "WEIGHTED": False, "CLASSES": False,
            "ACCURACY": "entropy" in kind,
        }  # fmt: skip
        yield Variant("narrow", precision, tile, step)
        if kind == "cross_entropy":
            yield Variant("predict_narrow", precision, tile, forward)


# The steps on the chip that are compiled ahead: the widths, the activation, the loss and the optimizer.
CHIP = (
    *(((64, 32, 10), "relu", "cross_entropy", rule) for rule in RULES),
    ((32, 16, 3), "tanh", "cross_entropy", "adam"),
    ((32, 16, 1), "gelu", "mse", "adam"),
)


def _chip(tile: Tile, precision: str, product: str) -> Iterator[Variant]:
    for sizes, activation, kind, rule in CHIP:
        output = SimpleNamespace(loss=LossSpec(kind, accuracy="entropy" in kind), weight=None, class_weight=None)
        activations = [activation] * (len(sizes) - 2) + ["identity"]
        constants = chip.chip_constants(product, sizes, tile.rows, activations, output, RULES.index(rule))
        yield Variant("chip", precision, tile, constants)


class _Left(ast.NodeTransformer):
    """Leave out the statements of ``if on_amd():``."""

    def visit_If(self, node: ast.If) -> ast.If | None:
        """Return None for one of those."""
        self.generic_visit(node)
        return None if ast.unparse(node.test) == "on_amd()" and not node.orelse else node


@functools.cache
def source_hash(kernel: str, target: str) -> str:
    """Return a hash of the kernel's code for a target and all that it calls, without comments and docstrings."""
    texts: dict[str, str] = {}
    _collect(KERNELS[kernel].fn, texts, target.startswith("gfx"))
    return hashlib.sha256("\n".join(texts[name] for name in sorted(texts)).encode()).hexdigest()[:16]


def _collect(function: Any, texts: dict[str, str], amd: bool) -> None:
    name = f"{function.__module__}.{function.__name__}"
    if name in texts:
        return
    tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    tree = tree if amd else _Left().visit(tree)
    texts[name] = "".join(ast.unparse(node) for node in ast.walk(tree) if isinstance(node, ast.arguments))
    for definition in tree.body:
        if isinstance(definition, ast.FunctionDef):
            documented = ast.get_docstring(definition) is not None
            texts[name] += "".join("\n" + ast.unparse(statement) for statement in definition.body[documented:])
    for used in sorted({node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}):
        value = function.__globals__.get(used)
        if isinstance(value, triton.language.constexpr):
            texts[f"{function.__module__}.{used}"] = f"{used} = {value.value!r}"
        inner = getattr(value, "fn", None)
        if str(getattr(inner, "__module__", "")).startswith("fusemlp_kernels."):
            _collect(inner, texts, amd)


def gpu_target(target: str) -> GPUTarget:
    """Return Triton's name of a target."""
    if target.startswith("sm_"):
        return GPUTarget("cuda", int(target.removeprefix("sm_")), 32)
    return GPUTarget("hip", target, 64)


def source(variant: Variant, target: str) -> ASTSource:
    """Return the kernel with the types that a launch gives its arguments, and with the properties Triton may assume.

    The integers are ``do_not_specialize``, so 32 bits wide unless the kernel says otherwise; memory is aligned, and on
    AMD every tensor smaller than 2 GiB.
    """
    kernel = KERNELS[variant.kernel]
    blocks = BLOCKS[variant.kernel] if variant.constants.get("DESCRIBED") else {}
    signature, attributes = {}, {}
    for parameter in kernel.params:
        name = parameter.name
        if parameter.is_constexpr:
            signature[name] = "constexpr"
        elif name in blocks:
            sides = [variant.constants[side] for side in blocks[name]]
            signature[name] = f"tensordesc<{ELEMENTS[variant.precision]}{sides}>"
        elif name in POINTERS:
            kind = POINTERS[name]
            signature[name] = "*" + (ELEMENTS[variant.precision] if kind == "compute" else kind)
            attributes[(parameter.num,)] = [["tt.divisibility", 16]]
            if not target.startswith("sm_") and name not in BASES:
                attributes[(parameter.num,)].append(["tt.pointer_range", 32])
        else:
            signature[name] = parameter.annotation_type or ("fp32" if name in FLOATS else "i32")
    places = {parameter.name: parameter.num for parameter in kernel.params}
    constants = {(places[name],): value for name, value in variant.constants.items()}
    return ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)


def _current_target(target: str) -> Callable[[], GPUTarget]:
    """Return a function in the place of Triton's own of that name."""

    def current_target() -> GPUTarget:
        return gpu_target(target)

    current_target.__triton_builtin__ = True  # type: ignore[attr-defined]
    return current_target


def compile_variant(variant: Variant, target: str) -> dict[str, Any]:
    """Compile for ``target``, without a GPU; return the row of the record, see ``kernel_machine_code.Resources``. A row
    has a fault or loops only if its code has them."""
    options = configs.launch_options(configs.family_of(target), variant.tile)
    # kernels ask for the target; without a card there is none
    with mock.patch.object(target_info, "current_target", _current_target(target)):
        compiled = triton.compile(source(variant, target), target=gpu_target(target), options=options)
    found = dataclasses.asdict(
        kernel_machine_code.of(compiled.asm, compiled.metadata.shared, target, variant.tile.warps)
    )
    optional = (*kernel_machine_code.FAULTS, "loops", "waits")
    kept = {name: value for name, value in found.items() if value or name not in optional}
    return {
        "kernel": variant.kernel, "variant": variant.name, "triton": triton.__version__, "arch": target,
        **kept, "source": source_hash(variant.kernel, target),
    }  # fmt: skip
