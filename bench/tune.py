"""Measure candidate tiles on this machine's card and rewrite the table of tiles: ``python -m bench tune``.

The table lists tiles by size, and a product takes the largest that still gives every multiprocessor a program
(``fusemlp_kernels.triton.configs``). So tiles of one size compete on products that would take that size: two tiles for
each multiprocessor, with a short and a long reduction. Tiles that spill are left out.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import dataclasses
import importlib
import itertools
import math
import statistics
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fusemlp_kernels.triton.backend import TritonBackend
    from fusemlp_kernels.triton.configs import Tile

REDUCTIONS = (256, 2048)
PRECISIONS = {"fp32": "fp32", "tf32": "tf32", "half": "bf16"}
PRODUCTS = ("forward", "weight")
STAGES = (2, 3, 4)
WARPS = (2, 4, 8)
PARTS = (1, 2, 4)
# A candidate replaces the table's tile only if it is faster by this share.
GAIN = 0.02


def parser() -> argparse.ArgumentParser:
    """Return the options."""
    made = argparse.ArgumentParser(
        prog="python -m bench tune",
        description="Measure candidate tiles of the Triton kernels on this machine's card, in turns, and rewrite the "
        "table of its architecture, fusemlp_kernels/triton/tiles.json. Takes about an hour, most of it compiling.",
    )
    made.add_argument("--product", nargs="+", choices=PRODUCTS, default=PRODUCTS, help="default: all")
    made.add_argument(
        "--precision", nargs="+", choices=tuple(PRECISIONS), default=tuple(PRECISIONS), help="default: all"
    )
    made.add_argument("--rounds", type=int, default=30, help="rounds of each candidate (default: %(default)s)")
    made.add_argument("--dry-run", action="store_true", help="print the fastest tiles, and write nothing")
    return made


def why_not() -> str | None:
    """Return the reason if nothing can be measured here, else None."""
    from fusemlp_kernels.registry import availability, interprets_triton

    if interprets_triton():
        return "TRITON_INTERPRET is set, and the interpreter's times say nothing about a card; unset it"
    return availability()["triton"]


def candidates(tile: Tile) -> list[Tile]:
    """Return tiles of the same size as ``tile``, which comes first."""
    from fusemlp_kernels.triton.configs import Tile

    area = tile.rows * tile.columns
    sides = [(rows, area // rows) for rows in (16, 32, 64, 128, 256) if area % rows == 0]
    others = [
        Tile(rows, columns, depth, warps, stages, parts)
        for (rows, columns), depth, warps, stages, parts in itertools.product(
            sides, (tile.depth // 2, tile.depth), WARPS, STAGES, PARTS
        )
        # A thread has 4 to 128 sums, and a part of them 4 to 32.
        if 16 <= columns <= 256 and depth >= 16 and 4 <= area / warps / 32 / parts <= 32 and columns // parts >= 16
    ]
    return [tile, *(other for other in others if other != tile)]


def variants_module() -> ModuleType:
    """Import ``ci/kernel_variants.py``, which compiles without a card."""
    folder = str(Path(__file__).resolve().parents[1] / "ci")
    if folder not in sys.path:
        sys.path.append(folder)
    return importlib.import_module("kernel_variants")


def kernels_of(product: str, precision: str, tile: Tile, target: str) -> Iterator[Any]:
    """Yield the kernel variants that use a tile of the table."""
    from fusemlp_kernels.triton import configs

    kernel_variants = variants_module()
    family = configs.family_of(target)
    with only(tile, family, product, precision):
        for variant in kernel_variants.variants(target):
            fits = variant.tile == tile and variant.precision == precision and variant.constants.get("ALIGNED")
            wanted = ("linear", "grad_input") if product == "forward" else ("grad_weight",)
            if fits and variant.kernel in wanted and variant.constants.get("TASKS", 16) == 16:
                yield variant


@contextlib.contextmanager
def only(tile: Tile, family: str, product: str, precision: str) -> Iterator[None]:
    """Restrict the table of a product to one tile inside the context."""
    from fusemlp_kernels.triton import configs

    kind = "half" if precision in ("bf16", "fp16") else precision
    place = configs.TABLES[family][product]
    before, place[kind] = place[kind], [list(dataclasses.astuple(tile))]
    try:
        yield
    finally:
        place[kind] = before


def sound(product: str, precision: str, tile: Tile, target: str) -> bool:
    """Return whether all variants of a tile compile without spills and stack."""
    kernel_variants = variants_module()
    for variant in kernels_of(product, precision, tile, target):
        try:
            row = kernel_variants.compile_variant(variant, target)
        except Exception as error:  # Any failure of the compiler rules the tile out.
            say(f"{tile}: {type(error).__name__}")
            return False
        if row["spills"] or row["stack"]:
            return False
    return True


def calls(
    backend: TritonBackend,
    product: str,
    precision: str,
    tile: Tile,
    shapes: Sequence[tuple[int, int, int]],
    family: str,
) -> list[Callable[[], object]]:
    """Return bound calls with this tile, one for each result of (rows, columns) over a reduction."""
    from fusemlp_kernels.contract import COUNTERS, HYPER, RATE_COLUMNS, TensorRule, UpdateRule

    def matrix(rows: int, columns: int, dtype: str) -> Any:
        pitch = -(-columns // 8) * 8
        return backend.view(backend.allocate(rows * pitch, dtype), 0, (rows, columns), pitch)

    made: list[Callable[[], object]] = []
    with only(tile, family, product, precision):
        for rows, columns, depth in shapes:
            if product == "forward":
                x, w, y = (matrix(*sides, "compute") for sides in ((rows, depth), (columns, depth), (rows, columns)))
                b = backend.allocate(columns, "real")
                made.append(backend.bind("linear", x=x, w=w, b=b, y=y, activation="relu"))
                continue
            layer = {
                "dz": matrix(depth, rows, "compute"), "x": matrix(depth, columns, "compute"),
                "w": matrix(rows, columns, "real"), "b": None, "w_rule": TensorRule(),
                "w_state": tuple(matrix(rows, columns, "real") for _ in range(2)),
            }  # fmt: skip
            clock = {
                "hyper": backend.allocate(HYPER, "float64"), "counters": backend.allocate(COUNTERS, "int64"),
                "rates": backend.allocate(2 * RATE_COLUMNS, "float64").reshape(2, RATE_COLUMNS),
            }  # fmt: skip
            rule = UpdateRule("adam")
            made.append(backend.bind("grad_weight_update", layers=[layer], rule=rule, **clock))
    return made


def result_shapes(tile: Tile, processors: int) -> list[tuple[int, int, int]]:
    """Return (rows, columns, reduction) of products that take tiles of this size."""
    side = math.sqrt(2 * processors * tile.rows * tile.columns)
    length = max(256, round(side / 256) * 256)
    return [(length, length, depth) for depth in REDUCTIONS]


def milliseconds(contestants: Mapping[Any, Sequence[Callable[[], object]]], rounds: int) -> dict[Any, list[float]]:
    """Return the median time of each call of each contestant, in turn."""
    import torch

    times: dict[Any, list[list[float]]] = {name: [[] for _ in runs] for name, runs in contestants.items()}
    for round_ in range(rounds + 1):
        for name, runs in contestants.items():
            for place, run in enumerate(runs):
                start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
                run()
                start.record()
                for _ in range(5):
                    run()
                end.record()
                end.synchronize()
                # The first round warms up.
                if round_:
                    times[name][place].append(start.elapsed_time(end) / 5)
    return {name: [statistics.median(found) for found in places] for name, places in times.items()}


def fastest(times: Mapping[Any, Sequence[float]], present: Any) -> tuple[Any, float]:
    """Return the contestant with the smallest geometric mean of its times, and that mean as a share of ``present``'s.

    ``present`` stays unless another one is faster by ``GAIN``.
    """
    means = {name: statistics.geometric_mean(found) for name, found in times.items()}
    best = min(means, key=lambda name: means[name])
    if means[best] > means[present] * (1 - GAIN):
        best = present
    return best, means[best] / means[present]


def rewritten(tables: Mapping[str, Any], chosen: Mapping[tuple[str, str, str, int], Tile]) -> dict[str, Any]:
    """Return the tables with other tiles at places (family, product, element type, index)."""
    made: dict[str, Any] = copy.deepcopy(dict(tables))
    for (family, product, kind, index), tile in chosen.items():
        before = made[family][product][kind][index]
        if tile.rows * tile.columns != before[0] * before[1]:
            raise ValueError(f"{tile} is not of the size of {before}, so the list would lose its order")
        made[family][product][kind][index] = list(dataclasses.astuple(tile))
    return made


def say(text: str) -> None:
    """Print a line on stderr."""
    print(f"bench tune: {text}", file=sys.stderr, flush=True)


def measure(options: argparse.Namespace) -> dict[tuple[str, str, str, int], Tile]:
    """Return the fastest tiles by their places in the table."""
    import torch

    from fusemlp_kernels.registry import TRAITS
    from fusemlp_kernels.triton import configs
    from fusemlp_kernels.triton.backend import TritonBackend, open_device

    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    target = properties.gcnArchName if torch.version.hip else f"sm_{properties.major}{properties.minor}"
    family = configs.family_of(target)
    found: dict[tuple[str, str, str, int], Tile] = {}
    for product, kind in itertools.product(options.product, options.precision):
        precision = PRECISIONS[kind]
        backend = TritonBackend(TRAITS["triton"], None, precision)
        processors = open_device(None, precision).arch.processors
        for index, row in enumerate(configs.TABLES[family][product][kind]):
            present = configs.Tile(*row)
            shapes = result_shapes(present, processors)
            tiles = [tile for tile in candidates(present) if tile == present or sound(product, precision, tile, family)]
            runs = {tile: calls(backend, product, precision, tile, shapes, family) for tile in tiles}
            best, share = fastest(milliseconds(runs, options.rounds), present)
            found[family, product, kind, index] = best
            print(f"{properties.name} {product} {kind} {present}: {best}, {share:.2f} of the time", flush=True)
    return found


def main(arguments: Sequence[str]) -> int:
    """Run the command and return its exit code."""
    options = parser().parse_args(arguments)
    reason = why_not()
    if reason is not None:
        say(f"there is no card to measure on: {reason}")
        return 2
    from fusemlp_kernels.triton import configs

    tables = rewritten(configs.TABLES, measure(options))
    if not options.dry_run:
        configs.TABLE_FILE.write_text(configs.table_text(tables))
        say(f"wrote {configs.TABLE_FILE}; now run ci/compile_kernels.py --all --write, and commit both")
    return 0
