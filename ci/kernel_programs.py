"""The programs of recorded launches: how many, what their loops do, what they move, and how many run at a time."""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from kernel_launches import Recorded
from kernel_loops import ONCE

from fusemlp_kernels.pointwise import OPTIMIZERS
from fusemlp_kernels.triton import card, configs, gradients, loss, resident_layers
from fusemlp_kernels.triton.resident_layers import CHUNK

# Of a multiprocessor of an H100: the CUDA programming guide's table of compute capabilities.
MOST_WARPS, MOST_PROGRAMS, SHARED = 64, 32, 228 << 10
# Registers are given to a warp in units of 8 a thread; each program takes a kilobyte of shared memory of its own.
REGISTER_UNIT, PROGRAM_SHARED = 8, 1 << 10
# Partial results that the last program of a launch adds at a time.
PARTIALS = 128
# Arrays of an optimizer's state, by its code.
STATES = {"sgd": 1, "adam": 2}
Row = Mapping[str, Any]


@dataclass(frozen=True)
class Programs:
    """Programs of a launch that do the same: the trips of their loops; the operations of their products, which are in
    the first loop; the elements of the products' type and of float32 that each reads and writes."""

    count: int
    trips: Mapping[str, int]
    operations: int = 0
    elements: int = 0
    reals: int = 0


@dataclass(frozen=True)
class Work:
    """The programs of a launch in their order, the trips of the last one's loops after all others, and the elements
    that the launch reads or writes once."""

    programs: Sequence[Programs]
    ending: Mapping[str, int] = field(default_factory=dict)
    elements: int = 0
    reals: int = 0


def over(whole: int, part: int) -> int:
    """Return the number of parts that hold the whole."""
    return -(-whole // part)


def programs_of(launch: Recorded) -> list[Programs]:
    """Return the programs of a launch, see ``work_of``."""
    return list(work_of(launch).programs)


def work_of(launch: Recorded) -> Work:
    """Return the work of a launch, by the shapes of its arguments and the loops of its kernel."""
    given, tile, sides = launch.arguments, launch.tile, launch.constants
    if launch.name == "resident":
        return Work([Programs(1, _resident_trips(launch))])
    if launch.name == "grad_weight":
        return _grouped(launch)
    if launch.name == "update":
        moved = sides["BLOCK"] * (given["parts"] + 2 + 2 * STATES[tuple(OPTIMIZERS)[sides["RULE"]]])
        one_by_one = {"update_kernel": given["parts"] - 1}
        trips = one_by_one if sides["MANY"] == 1 else {"update_kernel 2": over(given["parts"], sides["MANY"])}
        each = Programs(launch.programs, trips, reals=moved)
        return Work([each], reals=launch.programs * moved)
    if launch.name == "narrow":
        return _narrow(launch)
    if launch.name == "chip":
        return _chip(launch)
    rows, ending = given["M"], {"sums_of_all": over(launch.programs, PARTIALS)}
    if launch.name == "loss_grad":
        groups = over(over(rows, sides["BM"]), launch.programs)
        trips = groups * over(given["N"], sides["BN"])
        inside = {"normaliser_of": _weighing(launch, loss.LONG_CHUNK.value), "loss_grad_kernel": groups}
        inside |= {"rows_in_tiles": trips, "rows_in_tiles 2": trips}
        read = groups * sides["BM"] * given["N"]
        # the logits are read twice, from memory and from the cache
        return Work([Programs(launch.programs, inside, elements=3 * read)], ending, 2 * rows * given["N"])
    if launch.name not in ("linear", "grad_input", "linear_loss_grad"):
        raise ValueError(f"{launch.name}: the trips of its loops are unknown; add them to work_of")
    ahead = launch.name != "grad_input"
    depth, width = (given["K"], given["N"]) if ahead else (given["N"], given["K"])
    trips = over(depth, tile.split * tile.depth)
    pointers, parts = ("affine_tile", "affine_tile_of_parts") if ahead else ("input_gradient", "input_sums_of_parts")
    loop = "described_product" if sides.get("DESCRIBED") else parts if tile.split > 1 else pointers
    product = {loop: trips}
    if launch.name == "linear_loss_grad":
        product["normaliser_of"] = _weighing(launch, loss.CHUNK.value)
    results = tile.rows * tile.columns
    moved = depth * (tile.rows + tile.columns) + results * (1 if ahead else 2)
    whole = rows * depth + width * depth + rows * width * (1 if ahead else 2)
    each = Programs(launch.programs, product, 2 * results * tile.depth * tile.split * trips, moved)
    return Work([each], ending if launch.name == "linear_loss_grad" else {}, whole)


def _narrow(launch: Recorded) -> Work:
    """Return the work of ``narrow``: programs that take the tiles of the batch in turn."""
    sides, programs = launch.constants, launch.programs
    rows, first, width, outputs = sides["BM"], sides["FIRST"], sides["WIDTH"], sides["OUTPUTS"]
    tiles = over(launch.arguments["M"], rows)
    between = (sides["LAYERS"] - 1) * width * width
    # forward, backward but for x, and the gradients
    operations = 2 * rows * (2 * first * width + 3 * (between + width * outputs))
    weights = first * width + between + width * outputs
    classes = sides["LOSS"] == 0 and not sides["SOFT"]
    # row numbers and labels are of 8 bytes
    read = rows * first, rows * (2 * sides["GATHER"] + (2 if classes else outputs))
    counts = [count for count in (tiles % programs, programs - tiles % programs) if count]
    trips = [over(tiles, programs), tiles // programs][-len(counts) :]
    each = [
        Programs(
            count, {"narrow_kernel": times}, operations * times, weights + read[0] * times, weights + read[1] * times
        )
        for count, times in zip(counts, trips, strict=True)
    ]
    ending = {"sums_of_all": over(programs, PARTIALS)}
    return Work(each, ending, read[0] * tiles, read[1] * tiles + weights * programs)


def _chip(launch: Recorded) -> Work:
    """Return the work of a step of a model in ``chip_kernel``."""
    sides = launch.constants
    first, width, outputs = sides["FIRST"], sides["WIDTH"], sides["OUTPUTS"]
    operations = 2 * sides["BM"] * (2 * first * width + 3 * width * outputs)
    trips = {"chip_kernel": 1, "normaliser_of": _weighing(launch, CHUNK.value)}
    # the rows of the data, their numbers and labels; the state comes from the L1 cache
    return Work([Programs(1, trips, operations, sides["BM"] * first, sides["BM"] * 4)])


def _grouped(launch: Recorded) -> Work:
    """Return the work of ``grad_weight``: programs for each task, in the table's order."""
    given, sides = launch.arguments, launch.constants
    side_n, side_k, side_m = sides["BN"], sides["BK"], sides["BM"]
    splits, rows = given["splits"], given["M"]
    length = over(over(rows, side_m), splits)
    # a gradient is stored; an update reads and writes the parameter and the states
    moved = 2 + 2 * STATES[tuple(OPTIMIZERS)[sides["RULE"]]] if sides["UPDATES"] else 1
    found, elements, reals = [], 0, 0
    for task in given["table"].tolist():
        kind, n, k = (task[gradients.TASK_FIELDS.index(name)] for name in ("kind", "N", "K"))
        if kind == gradients.WEIGHT.value:
            count = over(n, side_n) * over(k, side_k) * splits
            operations = 2 * side_n * side_k * side_m * length
            read = length * side_m * (side_n + side_k)
            found.append(Programs(count, {"weight_sums": length}, operations, read, side_n * side_k * moved))
            elements += rows * (n + k)
            reals += n * k * moved * splits
        elif kind == gradients.BIAS.value:
            # a pass has as many elements in fewer columns
            wide = min(side_n, gradients.VECTOR.value)
            trips, read = over(length * wide, side_n), length * side_m * wide
            found.append(Programs(over(n, wide) * splits, {"bias_sums": trips}, 0, read, wide * moved))
    ending = {"sum_of": over(launch.programs, PARTIALS)} if given["wants_norm"] else {}
    return Work(found, ending, elements, reals)


def _weighing(launch: Recorded, rows: int) -> int:
    """Return the passes of the loop of ``normaliser_of``, ``rows`` each: none if every row weighs 1."""
    settings = launch.arguments["settings"].reshape(-1, len(loss.SETTING_FIELDS))[0]
    weighs = any(settings[loss.SETTING_FIELDS.index(name)] for name in ("ignores", "weighted", "classes"))
    return over(launch.arguments["M"], rows) * weighs


def _resident_trips(launch: Recorded) -> dict[str, int]:
    """Return the trips of a step's loops in ``resident_kernel``, in all layers."""
    batch, tile = launch.arguments["M"], launch.tile
    assert isinstance(tile, configs.ResidentTile)
    places = [resident_layers.LAYER_FIELDS.index(name) for name in ("N", "K")]
    sizes = [[row[place] for place in places] for row in launch.arguments["layers"].tolist()]
    down = over(batch, tile.rows)
    passes = [over(k, tile.split * tile.depth) for _, k in sizes[:-1]]
    tiles = [down * over(n, tile.columns) for n, _ in sizes[:-1]]
    back = [(down * over(k, tile.depth), over(n, tile.columns)) for n, k in sizes[1:]]
    weights = [over(n, tile.weight_rows) * over(k, tile.weight_columns) for n, k in sizes]
    vectors = [over(n, tile.outputs) for n, _ in sizes]
    outputs = over(batch, tile.output_rows)
    return {
        ONCE: 0, "resident_kernel": 1, "measure()": 1, "forward()": len(tiles), "output_and_loss()": 1,
        "backward()": len(back), "gradients_of_layer()": len(sizes), "tick()": 1,
        "update_from_memory()": launch.arguments["stored"], "measure.normaliser_of": _weighing(launch, CHUNK.value),
        "forward": sum(tiles),
        "forward.affine_tile_of_parts": sum(map(operator.mul, tiles, passes)),
        "output_and_loss": outputs, "backward": sum(count for count, _ in back),
        "output_tile.affine_tile": outputs * over(sizes[-1][1], tile.depth),
        "backward.input_gradient": sum(count * passes for count, passes in back),
        "gradients_of_layer": sum(weights), "gradients_of_layer.weight_tile": sum(weights) * down,
        "gradients_of_layer 2": len(sizes), "gradients_of_layer 3": sum(vectors),
        "gradients_of_layer.column_sums": sum(vectors) * down,
    }  # fmt: skip


def card_phases(launch: Recorded) -> tuple[list[list[dict[str, int]]], dict[str, int]]:
    """Return the trips of the loops of ``card_kernel`` in each phase of a step, for each program with tiles, which meet
    after a phase; and those of the program without, beside the phases that follow the loss."""
    batch, tile, workers = launch.arguments["M"], launch.tile, max(launch.programs - 1, 1)
    assert isinstance(tile, configs.ResidentTile)
    places = [resident_layers.LAYER_FIELDS.index(name) for name in ("N", "K")]
    sizes = [[row[place] for place in places] for row in launch.arguments["layers"].tolist()]
    down, blocks = over(batch, tile.rows), over(batch, tile.output_rows)
    along, back = over(batch, tile.split * tile.depth), launch.arguments["lowest"] < len(sizes) - 1

    def shared(name: str, loop: str, tiles: int, passes: int, **once: int) -> list[dict[str, int]]:
        counts = [len(range(worker, tiles, workers)) for worker in range(workers)]
        return [{name: count, loop: count * passes, **once} for count in counts]

    def passes(reduction: int) -> int:
        return over(reduction, tile.split * tile.depth)

    phases = [
        shared(
            "forward", "forward.affine_tile_of_parts", down * over(n, tile.columns), passes(k), **{"card_kernel 2": 1}
        )
        for n, k in sizes[:-1]
    ]
    k = sizes[-1][1]
    tiles = blocks * (over(k, tile.columns) if back else 1)
    loss = shared(
        "loss_and_gradient", "loss_and_gradient.affine_tile_of_parts", tiles, passes(k), **{"loss_and_gradient()": 1}
    )
    weighing = _weighing(launch, CHUNK.value)
    for trips in loss:
        trips |= {"loss_and_gradient.normaliser_of": weighing}
    lower = sizes[launch.arguments["lowest"] + 1 : -1]
    phases += [loss]
    phases += [
        shared(
            "backward", "backward.input_sums_of_parts", down * over(k, tile.columns), passes(n), **{"card_kernel 3": 1}
        )
        for n, k in lower[::-1]
    ]
    counts = [(over(n, tile.weight_rows) * over(k, tile.weight_columns), over(n, card.VECTOR.value)) for n, k in sizes]
    kinds = [(kind, layer) for layer, (w, b) in enumerate(counts) for kind in "w" * w + "b" * b]
    last = []
    for worker in range(workers):
        mine = kinds[worker * len(kinds) // workers : (worker + 1) * len(kinds) // workers]
        weights, biases = (sum(kind == each for kind, _ in mine) for each in "wb")
        runs = max(len({layer for _, layer in mine}), 1)
        trips = {"card_kernel 4": runs, "gradients_of_layer 2": runs, "gradients_of_layer": weights}
        trips |= {"gradients_of_layer.weight_tile": weights * along, "gradients_of_layer 3": biases}
        last.append(trips | {"gradients_of_layer.column_sums": biases * along})
    keeping = {"keep()": 1, "keep.sums_of_all": over(blocks, PARTIALS), "keep.normaliser_of": weighing}
    return [*phases, last], keeping


def resident_programs(row: Row, warps: int) -> int:
    """Return the number of programs of a kernel that a multiprocessor holds at a time."""
    registers = over(row["registers"], REGISTER_UNIT) * REGISTER_UNIT * 32 * warps
    shared = row["shared_static"] + row["shared_dynamic"] + PROGRAM_SHARED
    return max(min(configs.FILE_REGISTERS // registers, SHARED // shared, MOST_WARPS // warps, MOST_PROGRAMS), 1)
