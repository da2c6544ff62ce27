"""Which tiles a kernel works in: tables by architecture and precision, apart from the kernels; chosen without timing.

A choice is a function of shapes alone, so that the same network gets the same bits. Tiles are listed from the largest
down; taken is the largest that still gives every multiprocessor a program, else the smallest. The entries are those
that compile without spills on the architecture (``ci/kernel_resources.json``); which of them is the fastest, only
``python -m bench tune`` on a card can tell.
"""

from __future__ import annotations

from dataclasses import dataclass

from fusemlp_kernels.errors import BackendUnavailableError

# The smallest product of tensor cores is 16 rows high; ``linear_loss_grad`` holds a row of at most this width.
WIDEST_OUTPUT = 256
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


# Products whose reduction runs along rows of both operands: the forward pass and the gradient by the input.
_FORWARD: dict[str, dict[str, tuple[Tile, ...]]] = {
    "sm_80": {
        "fp32": (Tile(64, 64, 32, 4, 3), Tile(32, 64, 32, 4, 3), Tile(32, 32, 32, 4, 3), Tile(16, 32, 32, 2, 3)),
        "tf32": (Tile(128, 64, 32, 4, 3), Tile(64, 64, 32, 4, 3), Tile(32, 32, 32, 4, 3), Tile(16, 32, 32, 2, 3)),
        "half": (Tile(128, 128, 32, 8, 3), Tile(64, 64, 64, 4, 3), Tile(32, 32, 64, 4, 3), Tile(16, 32, 64, 2, 3)),
    },
    "interpreter": {
        "fp32": (Tile(32, 32, 32, 1, 1, 2),),
        "tf32": (Tile(32, 32, 32, 1, 1, 2),),
        "half": (Tile(32, 32, 32, 1, 1, 2),),
    },
}
for _family in ("sm_86", "sm_90", "sm_100", "gfx942"):
    _FORWARD[_family] = _FORWARD["sm_80"]

# The gradient by the weights, (outputs, inputs, batch).
_WEIGHT: dict[str, dict[str, tuple[Tile, ...]]] = {
    "sm_80": {
        "fp32": (Tile(64, 64, 32, 4, 3), Tile(32, 32, 32, 4, 3), Tile(16, 32, 32, 2, 3)),
        "tf32": (Tile(64, 64, 32, 4, 3), Tile(32, 32, 32, 4, 3), Tile(16, 32, 32, 2, 3)),
        "half": (Tile(128, 128, 32, 8, 3), Tile(64, 64, 64, 4, 3), Tile(32, 32, 64, 4, 3), Tile(16, 32, 64, 2, 3)),
    },
    "interpreter": _FORWARD["interpreter"],
}
for _family in ("sm_86", "sm_90", "sm_100", "gfx942"):
    _WEIGHT[_family] = _WEIGHT["sm_80"]

# The output layer with its loss: (rows, depth, warps) by the width that holds a row of logits.
_OUTPUT = {16: (32, 32, 2), 32: (32, 32, 2), 64: (32, 32, 4), 128: (32, 32, 4), 256: (16, 32, 8)}


def _kind(precision: str) -> str:
    return "half" if precision in ("bf16", "fp16") else precision


def _fitting(tiles: tuple[Tile, ...], shapes: tuple[tuple[int, int], ...], processors: int) -> Tile:
    return next((tile for tile in tiles if sum(tile.count(*shape) for shape in shapes) >= processors), tiles[-1])


def forward_tile(arch: Architecture, precision: str, rows: int, columns: int) -> Tile:
    """The tile for a result of rows x columns, in ``linear`` and ``grad_input``."""
    return _fitting(_FORWARD[arch.family][_kind(precision)], ((rows, columns),), arch.processors)


def weight_tile(arch: Architecture, precision: str, shapes: tuple[tuple[int, int], ...]) -> Tile:
    """The tile for the grouped gradients by weights of these shapes."""
    return _fitting(_WEIGHT[arch.family][_kind(precision)], shapes, arch.processors)


def output_tile(arch: Architecture, width: int) -> Tile:
    """The tile of ``linear_loss_grad``: its columns hold a whole row of ``width`` logits."""
    columns = next(columns for columns in _OUTPUT if columns >= width)
    rows, depth, warps = _OUTPUT[columns]
    return Tile(rows, columns, depth, warps, 1 if arch.family == "interpreter" else 2)


def forward_tiles(family: str, precision: str) -> tuple[Tile, ...]:
    """All that ``forward_tile`` can choose."""
    return _FORWARD[family][_kind(precision)]


def weight_tiles(family: str, precision: str) -> tuple[Tile, ...]:
    """All that ``weight_tile`` can choose."""
    return _WEIGHT[family][_kind(precision)]


def output_tiles(family: str) -> tuple[Tile, ...]:
    """All that ``output_tile`` can choose."""
    arch = Architecture(family, 1)
    return tuple(output_tile(arch, width) for width in _OUTPUT)


def general_tile(arch: Architecture) -> Tile:
    """The general path, for matrices that are not aligned: one tile for all."""
    return Tile(32, 32, 32, 4, 1 if arch.family == "interpreter" else 2)


def loss_tile(arch: Architecture, width: int) -> Tile:
    """The tile of ``loss_grad`` for rows of any width."""
    return Tile(2, 1024, 0, 4, 1)


# Launches without a product: of the clock, and of the sweeps over the arenas.
SMALL = Tile(1, 1, 0, 1, 1)
SWEEP = Tile(1, 1024, 0, 4, 1)


def table_length(tasks: int) -> int:
    """How many entries the grouped kernel looks at to find its task."""
    return next((length for length in TABLE_LENGTHS if length >= tasks), 1 << (tasks - 1).bit_length())
