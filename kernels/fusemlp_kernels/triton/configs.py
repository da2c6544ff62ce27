"""Which tiles a kernel works in: tables by architecture and precision, apart from the kernels; chosen without timing.

A choice is a function of shapes alone, so that the same network gets the same bits. Tiles are listed from the largest
down; taken is the largest that still gives every multiprocessor a program, else the smallest. The entries are those
that compile without spills on the architecture (``ci/kernel_resources.json``); which of them is the fastest, only
``python -m bench tune`` on a card can tell.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fusemlp_kernels.errors import BackendUnavailableError

# The smallest product of tensor cores is 16 rows high; ``linear_loss_grad`` holds a row of at most this width.
WIDEST_OUTPUT = 256
# Networks whose layers are no wider are trained in the smaller tiles of ``train_resident``.
RESIDENT_NARROW = 64
# What a thread and a multiprocessor have on NVIDIA.
MOST_REGISTERS = 255
FILE_REGISTERS = 1 << 16
TABLE_FILE = Path(__file__).with_name("tiles.json")
# The grouped launch finds its task in a table of one of these lengths.
TABLE_LENGTHS = (16, 64, 256)


@dataclass(frozen=True)
class Tile:
    """A tile of ``rows`` x ``columns`` of the result, ``depth`` of the reduction at a time.

    ``warps`` and ``stages`` are the launch's: a program's threads in units of 32 (64 on AMD) and how many loads are
    under way at a time. What follows the product is done in ``parts``, side by side, to fit the registers.
    """

    rows: int
    columns: int
    depth: int
    warps: int
    stages: int
    parts: int = 1

    def count(self, rows: int, columns: int) -> int:
        """How many tiles cover a result of rows x columns."""
        return -(-rows // self.rows) * -(-columns // self.columns)


@dataclass(frozen=True)
class ResidentTile(Tile):
    """The tiles of ``train_resident``: ``rows`` x ``columns`` forward and ``rows`` x ``depth`` back, where each is also
    the other's reduction; ``weight_rows`` x ``weight_columns`` of the gradients by weights; ``output_rows`` whole rows
    of at most ``outputs`` logits."""

    weight_rows: int = 16
    weight_columns: int = 16
    output_rows: int = 16
    outputs: int = 16


@dataclass(frozen=True)
class Architecture:
    """``family`` names the table, ``processors`` is the number of multiprocessors, ``product`` by precision is
    what ``tl.dot`` is asked for."""

    family: str
    processors: int

    def product(self, precision: str) -> str:
        """``tl.dot``'s input precision."""
        if precision == "tf32":
            return "ieee" if self.family in ("gfx942", "interpreter") else "tf32"
        if precision == "fp32" and self.family not in ("gfx942", "interpreter"):
            # three TF32 products give the accuracy of float32 (the "3xTF32" of CUTLASS)
            return "tf32x3"
        return "ieee"


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


def family_of(target: str) -> str:
    """The table for a target such as "sm_90" or "gfx942".

    Raises BackendUnavailableError where there is none.
    """
    name = target.split(":")[0]
    if name not in FAMILIES:
        raise BackendUnavailableError(
            f"device: the triton backend has no kernels for {target}; it has {', '.join(FAMILIES)}. Use backend='cupy' "
            "or 'numpy'"
        )
    return FAMILIES[name]


def table_text(tables: Mapping[str, Any]) -> str:
    """``TABLES`` as its file has it: a tile a line."""

    def written(value: Any, indent: str) -> str:
        if isinstance(value, Mapping):
            inner = ",\n".join(f'{indent}  "{key}": {written(item, indent + "  ")}' for key, item in value.items())
            return f"{{\n{inner}\n{indent}}}"
        return "[\n" + ",\n".join(f"{indent}  {json.dumps(list(row))}" for row in value) + f"\n{indent}]"

    return written(tables, "") + "\n"


# By family: "forward" (also for the gradient by the input), "weight", "output" (the output layer with its loss, a tile
# for each width) and "general" (matrices that are not aligned); then by element type; then tiles, largest first, as the
# fields of ``Tile``. "resident": those of ``ResidentTile``, narrowest first.
TABLES = json.loads(TABLE_FILE.read_text())


def _kind(precision: str) -> str:
    return "half" if precision in ("bf16", "fp16") else precision


def _tiles(family: str, product: str, precision: str) -> tuple[Tile, ...]:
    return tuple(Tile(*row) for row in TABLES[family][product][_kind(precision)])


def forward_tiles(family: str, precision: str) -> tuple[Tile, ...]:
    """All that ``forward_tile`` can choose."""
    return _tiles(family, "forward", precision)


def weight_tiles(family: str, precision: str) -> tuple[Tile, ...]:
    """All that ``weight_tile`` can choose."""
    return _tiles(family, "weight", precision)


def output_tiles(family: str) -> tuple[Tile, ...]:
    """All that ``output_tile`` can choose, narrowest first."""
    return tuple(Tile(*row) for row in TABLES[family]["output"])


def _fitting(tiles: tuple[Tile, ...], shapes: tuple[tuple[int, int], ...], processors: int) -> Tile:
    return next((tile for tile in tiles if sum(tile.count(*shape) for shape in shapes) >= processors), tiles[-1])


def forward_tile(arch: Architecture, precision: str, rows: int, columns: int) -> Tile:
    """The tile for a result of rows x columns, in ``linear`` and ``grad_input``."""
    return _fitting(forward_tiles(arch.family, precision), ((rows, columns),), arch.processors)


def weight_tile(arch: Architecture, precision: str, shapes: tuple[tuple[int, int], ...]) -> Tile:
    """The tile for the grouped gradients by weights of these shapes."""
    return _fitting(weight_tiles(arch.family, precision), shapes, arch.processors)


def output_tile(arch: Architecture, width: int) -> Tile:
    """The tile of ``linear_loss_grad``: its columns hold a whole row of ``width`` logits."""
    return next(tile for tile in output_tiles(arch.family) if tile.columns >= width)


def resident_tiles(family: str, precision: str) -> tuple[ResidentTile, ...]:
    """All that ``resident_tile`` can choose, narrowest first."""
    return tuple(ResidentTile(*row) for row in TABLES[family]["resident"][_kind(precision)])


def resident_tile(arch: Architecture, precision: str, widths: tuple[int, ...]) -> ResidentTile:
    """The tiles for layers of these outputs, the network's last."""
    tiles = resident_tiles(arch.family, precision)
    fitting = [tile for tile in tiles if tile.outputs >= widths[-1]]
    return fitting[0] if max(widths) <= RESIDENT_NARROW else fitting[-1]


def resident_constants(tile: ResidentTile, product: str) -> dict[str, Any]:
    """The constants of ``resident_kernel``."""
    return {
        "BM": tile.rows, "BN": tile.columns, "BK": tile.depth, "WN": tile.weight_rows, "WK": tile.weight_columns,
        "BO": tile.output_rows, "OUTPUTS": tile.outputs, "PRODUCT": product, "PARTS": tile.parts,
    }  # fmt: skip


def general_tile(arch: Architecture) -> Tile:
    """The general path, for matrices that are not aligned: one tile for all."""
    return Tile(*TABLES[arch.family]["general"][0])


def loss_tile(arch: Architecture, width: int) -> Tile:
    """The tile of ``loss_grad`` for rows of any width."""
    return Tile(2, 1024, 0, 8, 1)


def launch_options(family: str, tile: Tile) -> dict[str, Any]:
    """What Triton is told of a launch beside its arguments."""
    options: dict[str, Any] = {"num_warps": tile.warps, "num_stages": tile.stages, "enable_fp_fusion": True}
    if not family.startswith("gfx"):
        # left to itself ptxas spills a few registers to fit one more program on a multiprocessor
        options["maxnreg"] = min(MOST_REGISTERS, FILE_REGISTERS // (32 * tile.warps))
    return options


# Launches without a product: of the clock, and of the sweeps over the arenas.
SMALL = Tile(1, 1, 0, 1, 1)
SWEEP = Tile(1, 1024, 0, 4, 1)


def table_length(tasks: int) -> int:
    """How many entries the grouped kernel looks at to find its task."""
    return next((length for length in TABLE_LENGTHS if length >= tasks), 1 << (tasks - 1).bit_length())
