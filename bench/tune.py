"""Measure candidate tiles on this machine's card and rewrite the table of tiles: ``python -m bench tune``.

The table lists tiles by size, and a product takes the largest that still gives every multiprocessor a program
(``fusemlp_kernels.triton.configs``). So tiles of one size compete on products that would take that size: two tiles for
each multiprocessor, with a short and a long reduction. Tiles that spill are left out.

The entries that the benchmark's networks use most come first. Processes compile an entry's candidates side by side.
Each candidate is timed by events around a graph of runs, so the time of Python does not count. A first round leaves the
fastest few, and these take turns. After each entry the result is added to a file and the table is written.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import copy
import importlib
import itertools
import json
import math
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from bench.cases import CASES
from bench.report import write
from bench.study import count
from bench.timing import EventClock, HostClock, clock_of

if TYPE_CHECKING:
    from fusemlp_kernels.triton.backend import TritonBackend
    from fusemlp_kernels.triton.configs import Architecture, Tile

REDUCTIONS = (256, 2048)
PRECISIONS = {"fp32": "fp32", "tf32": "tf32", "half": "bf16"}
PRODUCTS = ("forward", "weight")
STAGES = (2, 3, 4)
WARPS = (2, 4, 8)
PARTS = (1, 2, 4)
# A candidate replaces the table's tile only if it is faster by this share.
GAIN = 0.02
# The candidates that take turns after the first round, and the runs in a graph between two events.
FINALISTS = 4
RUNS_A_GRAPH = 20
Place = tuple[str, str, str, int]


def parser() -> argparse.ArgumentParser:
    """Return the options."""
    made = argparse.ArgumentParser(
        prog="python -m bench tune",
        description="Measure candidate tiles of the Triton kernels on this machine's card, in turns, and rewrite the "
        "table of its architecture, fusemlp_kernels/triton/tiles.json, after each entry. Most of the time goes into "
        "compiling.",
    )
    made.add_argument("--product", nargs="+", choices=PRODUCTS, default=PRODUCTS, help="default: all")
    made.add_argument(
        "--precision", nargs="+", choices=tuple(PRECISIONS), default=tuple(PRECISIONS), help="default: all"
    )
    made.add_argument("--rounds", type=count, default=30, help="rounds of the finalists (default: %(default)s)")
    made.add_argument("--minutes", type=float, default=math.inf, help="end after this time (default: no limit)")
    made.add_argument("--entries", type=count, help="tune this many entries (default: all)")
    made.add_argument("--candidates", type=count, help="measure this many candidates of an entry (default: all)")
    made.add_argument(
        "--jobs", type=count, default=os.cpu_count() or 1, help="compiling processes (default: all cores)"
    )
    made.add_argument(
        "--out", type=Path, metavar="FILE", help="add a JSON line for each entry, and leave out the entries in FILE"
    )
    made.add_argument("--dry-run", action="store_true", help="print the fastest tiles, and leave the table alone")
    made.add_argument(
        "--rehearse", action="store_true", help="run on the CPU under Triton's interpreter, and leave the table alone"
    )
    return made


def why_not() -> str | None:
    """Return the reason if nothing can be measured here, else None."""
    from fusemlp_kernels.registry import availability, interprets_triton

    if interprets_triton():
        return "TRITON_INTERPRET is set, and the interpreter's times say nothing about a card; unset it"
    return availability()["triton"]


def uses(arch: Architecture) -> collections.Counter[Place]:
    """Return how often the benchmark's networks take each entry of the table on this card."""
    from fusemlp_kernels.contract import batch_parts
    from fusemlp_kernels.registry import TRAITS
    from fusemlp_kernels.triton import configs

    found: collections.Counter[Place] = collections.Counter()

    def add(product: str, precision: str, tile: Tile) -> None:
        kind = "half" if precision == "bf16" else precision
        rows = configs.TABLES[arch.family][product][kind]
        found[arch.family, product, kind, rows.index(numbers(tile))] += 1

    for case in CASES.values():
        layers = list(itertools.pairwise(case.sizes))
        if case.models is None:
            # forward to each hidden layer, and back to it
            for width in 2 * case.sizes[1:-1]:
                result = [(case.batch_size, width)]
                add("forward", case.precision, configs.product_tile(arch, "forward", case.precision, result))
            shapes = [(outputs, inputs) for inputs, outputs in layers]
            parts = batch_parts(TRAITS["triton"], case.batch_size, sum(map(math.prod, shapes)))
            add("weight", case.precision, configs.product_tile(arch, "weight", case.precision, shapes, parts=parts))
    return found


def numbers(tile: Tile) -> list[int]:
    """Return the numbers of a tile in the table of a product."""
    sides = [tile.rows, tile.columns, tile.depth, tile.warps, tile.stages, tile.parts]
    return [*sides, tile.split, tile.programs] if tile.programs > 1 else sides


def candidates(tile: Tile) -> list[Tile]:
    """Return tiles of the same size as ``tile``, which comes first."""
    from fusemlp_kernels.triton.configs import Tile

    area = tile.rows * tile.columns
    sides = [(rows, area // rows) for rows in (16, 32, 64, 128, 256) if area % rows == 0]
    others = [
        Tile(rows, columns, depth, warps, stages, parts, programs=tile.programs)
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
    before, place[kind] = place[kind], [numbers(tile)]
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


def operands(
    backend: TritonBackend, product: str, shapes: Sequence[tuple[int, int, int]]
) -> list[tuple[str, dict[str, Any]]]:
    """Return an op and its operands for each result of (rows, columns) over a reduction; the candidates share them."""
    from fusemlp_kernels.contract import COUNTERS, HYPER, RATE_COLUMNS, TensorRule, UpdateRule

    def matrix(rows: int, columns: int, dtype: str) -> Any:
        pitch = -(-columns // 8) * 8
        return backend.view(backend.allocate(rows * pitch, dtype), 0, (rows, columns), pitch)

    made: list[tuple[str, dict[str, Any]]] = []
    for rows, columns, depth in shapes:
        if product == "forward":
            x, w, y = (matrix(*sides, "compute") for sides in ((rows, depth), (columns, depth), (rows, columns)))
            b = backend.allocate(columns, "real")
            made.append(("linear", {"x": x, "w": w, "b": b, "y": y, "activation": "relu"}))
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
        made.append(("grad_weight_update", {"layers": [layer], "rule": UpdateRule("adam"), **clock}))
    return made


def calls(
    backend: TritonBackend,
    product: str,
    precision: str,
    tile: Tile,
    given: Sequence[tuple[str, dict[str, Any]]],
    family: str,
) -> list[Callable[[], object]]:
    """Return the ops bound with this tile."""
    with only(tile, family, product, precision):
        return [backend.bind(op, **each) for op, each in given]


def result_shapes(tile: Tile, processors: int) -> list[tuple[int, int, int]]:
    """Return (rows, columns, reduction) of products that take tiles of this size."""
    side = math.sqrt(2 * processors * tile.rows * tile.columns)
    length = max(256, round(side / 256) * 256)
    return [(length, length, depth) for depth in REDUCTIONS]


def seconds(
    clock: EventClock | HostClock, contestants: Mapping[Any, Sequence[Callable[[], object]]], rounds: int, times: int
) -> dict[Any, list[float]]:
    """Return the median time of each call of each contestant, in turn, as means over ``times`` runs."""
    taken: dict[Any, list[list[float]]] = {name: [[] for _ in runs] for name, runs in contestants.items()}
    for round_ in range(rounds + 1):
        for name, runs in contestants.items():
            for place, run in enumerate(runs):
                took = clock.seconds(run, times)
                # The first round compiles and captures.
                if round_:
                    taken[name][place].append(took)
    return {name: [statistics.median(one) for one in each] for name, each in taken.items()}


def fastest(times: Mapping[Any, Sequence[float]], present: Any) -> tuple[Any, float]:
    """Return the contestant with the smallest geometric mean of its times, and that mean as a share of ``present``'s.

    ``present`` stays unless another one is faster by ``GAIN``.
    """
    means = {name: statistics.geometric_mean(found) for name, found in times.items()}
    best = min(means, key=lambda name: means[name])
    if means[best] > means[present] * (1 - GAIN):
        best = present
    return best, means[best] / means[present]


def table_text(tables: Mapping[str, Any]) -> str:
    """Return the text of the file of ``configs.TABLES``, with a tile a line."""

    def written(value: Any, indent: str) -> str:
        if isinstance(value, Mapping):
            inner = ",\n".join(f'{indent}  "{key}": {written(item, indent + "  ")}' for key, item in value.items())
            return f"{{\n{inner}\n{indent}}}"
        return "[\n" + ",\n".join(f"{indent}  {json.dumps(list(row))}" for row in value) + f"\n{indent}]"

    return written(tables, "") + "\n"


def rewritten(tables: Mapping[str, Any], chosen: Mapping[tuple[str, str, str, int], Tile]) -> dict[str, Any]:
    """Return the tables with other tiles at places (family, product, element type, index)."""
    made: dict[str, Any] = copy.deepcopy(dict(tables))
    for (family, product, kind, index), tile in chosen.items():
        before = made[family][product][kind][index]
        if tile.rows * tile.columns != before[0] * before[1]:
            raise ValueError(f"{tile} is not of the size of {before}, so the list would lose its order")
        made[family][product][kind][index] = numbers(tile)
    return made


def say(text: str) -> None:
    """Print a line on stderr."""
    print(f"bench tune: {text}", file=sys.stderr, flush=True)


class Tuner:
    """Tunes the entries of one card's table, until ``deadline`` by ``time.monotonic``."""

    def __init__(self, options: argparse.Namespace, deadline: float) -> None:
        from fusemlp_kernels.triton.backend import open_device

        self.options, self.deadline = options, deadline
        device = open_device(None, "fp32")
        self.arch, self.interpreted = device.arch, device.interpreted
        self.card = "the interpreter"
        if not self.interpreted:
            import torch

            self.card = torch.cuda.get_device_name(device.device)

    def entries(self) -> list[Place]:
        """Return the entries that the options select and the file lacks, the most used ones first."""
        from fusemlp_kernels.triton import configs

        family, options = self.arch.family, self.options
        every = [
            (family, product, kind, index)
            for product, kind in itertools.product(options.product, options.precision)
            for index in range(len(configs.TABLES[family][product][kind]))
        ]
        used, done = uses(self.arch), set()
        if options.out is not None and options.out.is_file():
            lines = map(json.loads, options.out.read_text(encoding="utf-8").splitlines())
            done = {tuple(line["place"]) for line in lines if line["card"] == self.card}
        left = [place for place in every if place not in done]
        return sorted(left, key=lambda place: -used[place])[: options.entries]

    def compiled(self, place: Place, tiles: Sequence[Tile]) -> list[Tile] | None:
        """Return the tiles that compile without spills, the present one first; None after the deadline. Triton's cache
        keeps those that were compiled."""
        family, product, kind, _ = place
        if self.interpreted:
            return list(tiles)
        with ProcessPoolExecutor(self.options.jobs, mp_context=get_context("spawn")) as pool:
            work = {pool.submit(sound, product, PRECISIONS[kind], tile, family): tile for tile in tiles[1:]}
            good = set()
            left = None if math.isinf(self.deadline) else max(self.deadline - time.monotonic(), 1.0)
            try:
                for done in as_completed(work, timeout=left):
                    if done.result():
                        good.add(work[done])
            except TimeoutError:
                pool.shutdown(cancel_futures=True)
                return None
        return [tiles[0], *(tile for tile in tiles[1:] if tile in good)]

    def tuned(self, place: Place) -> dict[str, Any] | None:
        """Return the line of an entry; None if the time was over before its candidates were compiled."""
        from fusemlp_kernels.registry import TRAITS
        from fusemlp_kernels.triton import configs
        from fusemlp_kernels.triton.backend import TritonBackend

        family, product, kind, index = place
        precision = PRECISIONS[kind]
        present = configs.tiles(family, product, kind)[index]
        tiles = candidates(present)[: self.options.candidates]
        found = self.compiled(place, tiles)
        if found is None:
            return None
        backend = TritonBackend(TRAITS["triton"], None, precision)
        clock, times = clock_of(backend), 1 if self.interpreted else RUNS_A_GRAPH
        shapes = [(64, 64, 64)] if self.interpreted else result_shapes(present, self.arch.processors)
        given = operands(backend, product, shapes)
        runs = {tile: calls(backend, product, precision, tile, given, family) for tile in found}
        first = {tile: statistics.geometric_mean(each) for tile, each in seconds(clock, runs, 1, times).items()}
        finalists = {present, *sorted(first, key=first.__getitem__)[:FINALISTS]}
        taken = seconds(clock, {tile: runs[tile] for tile in found if tile in finalists}, self.options.rounds, times)
        best, share = fastest(taken, present)
        return {
            "study": "tune", "card": self.card, "place": list(place), "present": numbers(present),
            "best": numbers(best), "share": share, "candidates": len(tiles), "measured": len(found),
            "seconds": {str(tuple(numbers(tile))): each for tile, each in taken.items()},
        }  # fmt: skip


def main(arguments: Sequence[str]) -> int:
    """Run the command and return its exit code."""
    options = parser().parse_args(arguments)
    reason = None if options.rehearse else why_not()
    if reason is not None:
        say(f"there is no card to measure on: {reason}")
        return 2
    from fusemlp_kernels.triton import configs

    tuner = Tuner(options, time.monotonic() + 60 * options.minutes)
    entries, changed = tuner.entries(), False
    for number, place in enumerate(entries):
        line = tuner.tuned(place) if time.monotonic() < tuner.deadline else None
        if line is None:
            say(f"the time is over: {number} of {len(entries)} entries are tuned")
            break
        best = configs.Tile(*line["best"])
        said = f"{line['share']:.2f} of the time, {line['measured']} of {line['candidates']} candidates measured"
        print(f"{tuner.card} {' '.join(map(str, place[1:]))}: {line['present']} -> {line['best']}, {said}", flush=True)
        if options.out is not None:
            write([line], options.out)
        if line["best"] != line["present"] and not (options.dry_run or options.rehearse):
            # The next entries are measured with the table as it is now.
            configs.TABLES.update(rewritten(configs.TABLES, {place: best}))
            configs.TABLE_FILE.write_text(table_text(configs.TABLES), encoding="utf-8")
            changed = True
    if changed:
        say(f"wrote {configs.TABLE_FILE}; now run ci/compile_kernels.py --all --write, and commit both")
    return 0
