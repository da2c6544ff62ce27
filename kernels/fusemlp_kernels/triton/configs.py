"""The choice of a kernel's tiles, from tables by architecture and precision, without timing.

A choice depends on shapes alone, so that the same network gets the same bits. Tiles are listed from the largest down.
The choice is the smallest that gives every multiprocessor a program and whose programs run all at once; else the
largest that gives every one a program; else the smallest. The parts of a batch count as programs, and a tile's sides
are no longer than powers of two that hold the results, unless the smallest's are. The entries compile without spills
on the architecture (``ci/kernel_resources.json``); ``python -m bench tune`` on a card finds the fastest.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from fusemlp_kernels.errors import BackendUnavailableError

# The smallest product of tensor cores is 16 rows high; ``linear_loss_grad`` holds a row of at most this width.
WIDEST_OUTPUT = 256
# Registers of a thread and of a multiprocessor on NVIDIA.
MOST_REGISTERS = 255
FILE_REGISTERS = 1 << 16
TABLE_FILE = Path(__file__).with_name("tiles.json")
# The grouped launch finds its task in a table of one of these lengths.
TABLE_LENGTHS = (16, 64, 256)


@dataclass(frozen=True)
class Tile:
    """A tile of ``rows`` x ``columns`` of the result, ``depth`` of the reduction at a time.

    ``warps`` and ``stages`` are the launch's: a program's threads in units of 32 (64 on AMD), and the loads under way
    at a time. The epilogue runs in ``parts``, side by side, to fit the registers. The reduction is cut into ``split``
    parts, one for each warp. A multiprocessor holds ``programs`` or more at a time, so that the loads of one run beside
    the products of another. The programs of a ``cooperative`` launch all run at a time.
    """

    rows: int
    columns: int
    depth: int
    warps: int
    stages: int
    parts: int = 1
    split: int = 1
    programs: int = field(default=1, kw_only=True)
    cooperative: bool = field(default=False, kw_only=True)

    def count(self, rows: int, columns: int) -> int:
        """Return the number of tiles that cover a result of rows x columns."""
        return -(-rows // self.rows) * -(-columns // self.columns)

    def sides(self, names: str) -> dict[str, int]:
        """Return the sizes of the tile as a kernel's constants: B and a letter for rows, columns and depth."""
        return dict(zip((f"B{name}" for name in names), (self.rows, self.columns, self.depth), strict=True))


@dataclass(frozen=True)
class ResidentTile(Tile):
    """The tiles of ``train_resident``: ``rows`` x ``columns`` forward and ``rows`` x ``depth`` back, where each is also
    the other's reduction; ``weight_rows`` x ``weight_columns`` of the gradients by weights; ``output_rows`` whole rows
    of at most ``outputs`` logits. Forward alone the reduction is cut, on the whole card everywhere: a tile back is then
    ``rows`` x ``columns``. The tiles are for networks of at most ``inputs`` and of layers of at most ``units``."""

    weight_rows: int = 16
    weight_columns: int = 16
    output_rows: int = 16
    outputs: int = 16
    inputs: int = 16
    units: int = 16


@dataclass(frozen=True)
class Architecture:
    """A card: ``family`` names the table, ``processors`` is the number of multiprocessors."""

    family: str
    processors: int

    def product(self, precision: str) -> str:
        """Return the kind of ``tiles.product``."""
        if self.family in ("gfx942", "interpreter"):
            return "ieee"
        # three TF32 products give the accuracy of float32
        return {"tf32": "tf32", "fp32": "split"}.get(precision, "ieee")


# Families whose ``linear`` and ``grad_input`` read 16-bit matrices by tensor descriptors, and the least rows of a tile.
DESCRIBED = {"sm_90": 128}


def takes_descriptors(arch: Architecture, precision: str, tile: Tile) -> bool:
    """Return whether ``linear`` and ``grad_input`` read matrices by tensor descriptors where these allow it."""
    return arch.family in DESCRIBED and _kind(precision) == "half" and tile.rows >= DESCRIBED[arch.family]


# Compute capabilities and AMD targets by table.
FAMILIES = {
    "sm_80": "sm_80",
    "sm_86": "sm_86",
    "sm_87": "sm_86",
    "sm_89": "sm_86",
    "sm_90": "sm_90",
    "sm_100": "sm_100",
    "sm_103": "sm_100",
    "sm_120": "sm_86",
    "sm_121": "sm_86",
    "gfx942": "gfx942",
}


# The first version of Triton with the fence between the copies to shared memory and the products that read it. Without
# it results on Blackwell (sm_100) differ from run to run: triton-lang/triton issue 9871, pytorch/pytorch issue 181248.
FENCED_TRITON = (3, 7, 1)
NEEDS_FENCE = ("sm_100",)


def version_of(text: str) -> tuple[int, ...]:
    """Return the numbers of a version such as "3.7.1+cu130"."""
    return tuple(int(part) for part in re.findall(r"\d+", text.split("+")[0])[:3])


def check_compiler(family: str, version: str) -> None:
    """Raise BackendUnavailableError if this version of Triton compiles wrong code for the family."""
    if family in NEEDS_FENCE and version_of(version) < FENCED_TRITON:
        raise BackendUnavailableError(
            f"device: Triton {version} lacks a fence that Blackwell cards need, so results differ from run to run; "
            f"expected Triton {'.'.join(map(str, FENCED_TRITON))} or later, which a newer torch brings. Upgrade torch, "
            "or use backend='cupy'"
        )


def family_of(target: str) -> str:
    """Return the table's name for a target such as "sm_90" or "gfx942".

    Raises BackendUnavailableError for a target without a table.
    """
    name = target.split(":")[0]
    if name not in FAMILIES:
        raise BackendUnavailableError(
            f"device: the triton backend has no kernels for {target}; it has {', '.join(FAMILIES)}. Use backend='cupy' "
            "or 'numpy'"
        )
    return FAMILIES[name]


# By family: "forward" (also for the gradient by the input), "weight", "output" (the output layer with its loss, a tile
# for each width) and "general" (matrices that are not aligned); then by element type; then tiles, largest first, as the
# fields of ``Tile``, with ``programs`` last. "resident": those of ``ResidentTile``, smallest first. "deep" and
# "deep_output" are for small results.
# In an output's tile a thread has two logits of a row at least: of one, the compiler fuses the product
# of two numbers with the sum over threads, which then differs in its last bit from thread to thread. The weights of
# sm_90 in fp32 have no tile of 32 x 32, where warps repeat each other's products, and none of 128 x 64, of which a
# multiprocessor holds one program.
TABLES = json.loads(TABLE_FILE.read_text(encoding="utf-8"))


def _kind(precision: str) -> str:
    return "half" if precision in ("bf16", "fp16") else precision


def tiles(family: str, product: str, precision: str) -> tuple[Tile, ...]:
    """Return the tiles that ``product_tile`` chooses from; ``product``: "forward" or "weight"."""
    return tuple(Tile(*row[:7], programs=(row[7:] or [1])[0]) for row in TABLES[family][product][_kind(precision)])


def output_tiles(family: str) -> tuple[Tile, ...]:
    """Return the tiles that ``output_tile`` chooses from, narrowest first."""
    return tuple(Tile(*row) for row in TABLES[family]["output"])


def product_tile(
    arch: Architecture,
    product: str,
    precision: str,
    shapes: Sequence[tuple[int, int]],
    *,
    aligned: bool = True,
    parts: int = 1,
) -> Tile:
    """Return the tile for results of these shapes: of ``linear`` and ``grad_input`` ("forward") or of the gradients by
    weights ("weight"). ``parts``: those of their sums, or the members that have a result each."""
    if not aligned:
        return general_tile(arch)
    table = tiles(arch.family, product, precision)
    tall, wide = (max(sides) for sides in zip((1, 1), *shapes, strict=True))
    rows = max(1 << (tall - 1).bit_length(), table[-1].rows)
    columns = max(1 << (wide - 1).bit_length(), table[-1].columns)
    fits = [tile for tile in table if tile.rows <= rows and tile.columns <= columns]
    counts = {tile: parts * sum(tile.count(*shape) for shape in shapes) for tile in fits}
    full = [tile for tile in fits if counts[tile] >= arch.processors]
    at_once = [tile for tile in full if counts[tile] <= tile.programs * arch.processors]
    return [*full[:1], *at_once][-1] if full else fits[-1]


def deep_tile(
    arch: Architecture, precision: str, rows: int, columns: int, reduction: int, table: str = "deep"
) -> Tile | None:
    """Return the tile for an aligned result of so few tiles that a multiprocessor has one, or two with a long
    reduction; None for others, and where one part holds the reduction. ``table``: "deep", or "deep_output" for
    ``linear_loss_grad``."""
    for row in TABLES[arch.family].get(table, {}).get(_kind(precision), ()):
        tile = Tile(*row)
        most = 2 if 2 * reduction >= tile.split * tile.depth else 1
        if reduction > tile.depth and tile.count(rows, columns) <= most * arch.processors:
            return tile
    return None


def output_tile(arch: Architecture, width: int) -> Tile:
    """Return the tile of ``linear_loss_grad``: its columns hold a whole row of ``width`` logits."""
    return next(tile for tile in output_tiles(arch.family) if tile.columns >= width)


def resident_tiles(family: str, precision: str, table: str = "resident") -> tuple[ResidentTile, ...]:
    """Return the tiles that ``resident_tile`` chooses from, those of the smallest networks first; ``table``: "resident"
    or "card", where all programs of a launch share a model's."""
    rows = TABLES[family][table][_kind(precision)]
    return tuple(ResidentTile(*row, cooperative=table == "card") for row in rows)


def resident_tile(arch: Architecture, precision: str, sizes: Sequence[int], table: str = "resident") -> ResidentTile:
    """Return the tiles for a network of these widths, inputs first."""
    tiles = resident_tiles(arch.family, precision, table)
    inputs, units, outputs = sizes[0], max(sizes[1:]), sizes[-1]
    fits = (tile for tile in tiles if tile.inputs >= inputs and tile.units >= units and tile.outputs >= outputs)
    return next(fits, tiles[-1])


def resident_constants(tile: ResidentTile, product: str, entropy: bool) -> dict[str, Any]:
    """Return the constants of ``resident_kernel``, or of ``card_kernel``, for whose loss a kernel is compiled."""
    return {
        "BM": tile.rows, "BN": tile.columns, "BK": tile.depth, "WN": tile.weight_rows, "WK": tile.weight_columns,
        "BO": tile.output_rows, "OUTPUTS": tile.outputs, "SPLIT": tile.split, "PRODUCT": product,
        **({"CROSS_ENTROPY": entropy} if tile.cooperative else {"PARTS": tile.parts}),
    }  # fmt: skip


def narrow_tile(arch: Architecture, precision: str, layers: int = 1) -> Tile | None:
    """Return the rows of the batch and the units of a hidden layer that a program of ``train_narrow`` and
    ``predict_narrow`` takes at a time, for a number of hidden layers; None where it does not fit the registers."""
    tile = NARROW.get(arch.family, {}).get(precision)
    return tile if tile is None or layers < 3 else replace(tile, rows=16)


def narrow_layers(arch: Architecture) -> int:
    """Return the most hidden layers of ``train_narrow``: the sums of the gradients of more do not fit the registers.
    Those of three leave room for tiles of 16 rows, on Hopper cards alone."""
    return 3 if arch.family in ("sm_90", "interpreter") else 2


def narrow_constants(tile: Tile, sizes: Sequence[int]) -> dict[str, int]:
    """Return the sides of the tiles of ``narrow_kernel`` for a network of these widths, inputs first."""
    inputs, outputs = (max(16, 1 << (width - 1).bit_length()) for width in (sizes[0], sizes[-1]))
    return {"BM": tile.rows, "FIRST": inputs, "WIDTH": tile.columns, "OUTPUTS": outputs, "LAYERS": len(sizes) - 2}


def general_tile(arch: Architecture) -> Tile:
    """Return the one tile of the general path, for matrices that are not aligned."""
    return Tile(*TABLES[arch.family]["general"][0])


def launch_options(family: str, tile: Tile) -> dict[str, Any]:
    """Return Triton's options of a launch."""
    options: dict[str, Any] = {"num_warps": tile.warps, "num_stages": tile.stages, "enable_fp_fusion": True}
    if tile.cooperative:
        options["launch_cooperative_grid"] = True
    if not family.startswith("gfx"):
        # left to itself ptxas spills a few registers to fit one more program on a multiprocessor
        options["maxnreg"] = min(MOST_REGISTERS, FILE_REGISTERS // (32 * tile.warps * tile.programs))
    return options


# Launches without a product: of ``loss_grad`` for rows of any width, the clock, the sweeps over the
# arenas, ``clip_examples``, and members' own factors.
LOSS = Tile(2, 1024, 0, 8, 1, programs=2)
ENTROPY = {"half": Tile(8, 256, 0, 8, 1, programs=2), "fp32": Tile(16, 128, 0, 8, 1, programs=2)}
GENERAL_ENTROPY = Tile(8, 128, 0, 8, 1, programs=2)
SMALL = Tile(1, 1, 0, 1, 1)
SWEEP = Tile(1, 1024, 0, 4, 1)
# The parts of a gradient of many parts are added this many at a time.
PARTS_SWEEP = Tile(64, 32, 0, 4, 1)
# Noise is of float64, which takes two registers a number.
NOISY_SWEEP = Tile(1, 256, 0, 4, 1)
CLIP = Tile(4, 256, 0, 4, 1)
MEMBERS = Tile(16, 128, 0, 8, 1)
# Of ``train_narrow``, by family and precision. The least height of a wgmma is 64, so narrower layers fill it up.
NARROW = {
    "sm_80": {"bf16": Tile(16, 64, 0, 4, 1, programs=2)},
    "sm_86": {"bf16": Tile(16, 64, 0, 4, 1, programs=2)},
    "sm_90": {"bf16": Tile(32, 64, 0, 4, 1, programs=2)},
    # no fp16, whose gradients carry the loss scale
    "interpreter": dict.fromkeys(("fp32", "tf32"), Tile(16, 64, 0, 4, 1, programs=2)),
}
# Of ``chip_kernel``, by family: the most rows of a batch and units of a layer, and the widths at the ends.
CHIP = {
    family: ResidentTile(32, 32, 0, 2, 1, outputs=16, inputs=64, units=32, programs=4)
    for family in ("sm_90", "interpreter")
}
# The most stretches of a member's rows, or of a batch's, that are summed by themselves.
MOST_SPLITS = 32
# Whole rows of at most this many columns at a time, narrowest first.
ROWS = (Tile(16, 64, 0, 4, 1), Tile(4, 256, 0, 4, 1), Tile(1, 1024, 0, 4, 1))


def loss_tile(precision: str, entropy: bool, aligned: bool) -> Tile:
    """Return the tile of ``loss_grad``. Of a cross-entropy of aligned matrices a warp loads whole rows, 16 bytes a
    thread, so that no sum over a row crosses warps."""
    if not entropy:
        return LOSS
    return ENTROPY["half" if _kind(precision) == "half" else "fp32"] if aligned else GENERAL_ENTROPY


def row_tile(width: int) -> Tile:
    """Return the tile of ``ROWS`` for rows of this width."""
    return next((tile for tile in ROWS if tile.columns >= width), ROWS[-1])


def table_length(tasks: int) -> int:
    """Return the number of entries that the grouped kernel reads to find its task."""
    return next((length for length in TABLE_LENGTHS if length >= tasks), 1 << (tasks - 1).bit_length())
