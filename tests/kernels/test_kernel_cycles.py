"""Loops and waits are read from a disassembly as they are; bounds and expected times of a step follow from them, from
the shapes of its launches and from the record; they agree with earlier estimates."""

import dataclasses
import json
from pathlib import Path

import pytest

pytest.importorskip("triton")

import kernel_cycles
import kernel_launches
import kernel_loops
import kernel_model
import kernel_programs
import kernel_variants
import kernel_waits

from fusemlp_kernels.contract import step_flops
from fusemlp_kernels.registry import TRAITS
from fusemlp_kernels.triton import clock, configs, linear

FILES = {"linear": linear.__file__, "clock": clock.__file__}


def line_of(file, text):
    return next(at for at, line in enumerate(Path(FILES[file]).read_text().splitlines(), 1) if text in line)


def disassembled(*lines, kernel="k"):
    """Write instructions as nvdisasm does: (text, stalls), with the scoreboard that it sets and a mask of those that it
    waits for; a label, or (file, text of a line)."""
    out = [f"\t.type {kernel},@function", f".text.{kernel}:", f"{kernel}:"]
    for line in lines:
        if isinstance(line, str):
            out.append(line)
        elif line[0] in FILES:
            out.append(f'\t//## File "{FILES[line[0]]}", line {line_of(*line)}')
        else:
            text, stalls, board, mask = (*line, 7, 0)[:4] if len(line) < 4 else line
            out.append(f"        /*0010*/     {text} ;   /* 0x0000000000a07947 */")
            control = stalls | board << 5 | 7 << 8 | mask << 11
            out.append(f"                                /* 0x{control << 41:016x} */")
    return "\n".join(out)


LOOP = ("linear", "for start in range(0, width, BK)")
LOOP_BODY = ("linear", "x_tile = tl.load(x_at")
AFTER = ("linear", "bias = tl.load")


def test_a_pass_is_the_shortest_way_through_a_loop():
    code = disassembled(
        AFTER, ("MOV R1, R2", 3), ("@!P0 BRA `(.L_x_9)", 5),
        ".L_x_1:", LOOP_BODY, ("LDG.E R4, [R2.64]", 2), ("@P1 BRA `(.L_x_2)", 4), ("IMAD R1, R1, R1, R1", 15),
        ".L_x_2:", ("FFMA R1, R1, R1, R1", 7), LOOP, ("@P2 BRA `(.L_x_1)", 1),
        ".L_x_9:", AFTER, ("EXIT", 5),
        ".L_x_7:", ("BRA `(.L_x_7)", 0),
    )  # fmt: skip
    # the branch around IMAD is shorter; the way to EXIT around the loop belongs to no pass
    assert kernel_loops.read(kernel_loops.passes(code)) == {"once": [3, 13], "affine_tile": [4, 14]}


@pytest.mark.parametrize(
    ("rest", "once", "copies"),
    [
        # two loads of one line may be those of one pass
        ((), [1, 5], []),
        # or of two passes, if the code after the loop has one for a pass that is left
        ((LOOP_BODY, ("LDG.E R1, [R2.64]", 7)), [2, 12], [2]),
    ],
)
def test_an_outer_loop_counts_neither_the_inner_passes_nor_blocks_of_another_function(rest, once, copies):
    code = disassembled(
        ".L_x_1:", ("clock", "for start in range(0, count, BLOCK)"), ("MOV R1, R2", 2), ("CALL.REL.NOINC `($f)", 3),
        ".L_x_2:", LOOP_BODY, ("LDG.E R1, [R2.64]", 4), ("LDG.E R3, [R2.64]", 4), ("@P0 BRA `(.L_x_2)", 1),
        ("clock", "for start in range(0, count, BLOCK)"), ("@P1 BRA `(.L_x_1)", 6), *rest, ("EXIT", 5),
        "\t.type $f,@function", "$f:", ("FADD R1, R1, R1", 9), ("RET.REL.NODEC R2 `(k)", 8),
    )  # fmt: skip
    found = kernel_loops.read(kernel_loops.passes(code))
    assert found == {"once": once, "affine_tile": [3, 9, *copies], "sum_of": [5, 28]}


def test_a_loop_that_calls_one_of_several_functions_has_a_pass_for_each():
    functions = [
        line
        for name, stalls in (("f", 9), ("g", 2))
        for line in (f"\t.type m_$_{name}__i32,@function", f"m_$_{name}__i32:", ("FADD R1, R1, R1", stalls), ("RET", 8))
    ]
    code = disassembled(
        ".L_x_1:", ("clock", "for start in range(0, count, BLOCK)"), ("MOV R1, R2", 2), ("@P0 BRA `(.L_x_2)", 4),
        ("CALL.REL.NOINC `(m_$_f__i32)", 3), ("BRA `(.L_x_3)", 1), ".L_x_2:", ("CALL.REL.NOINC `(m_$_g__i32)", 5),
        ".L_x_3:", ("@P1 BRA `(.L_x_1)", 6), ("EXIT", 5), *functions,
    )  # fmt: skip
    found = kernel_loops.passes(code)
    ways = {"f()": [7, 2 + 4 + 3 + (9 + 8) + 1 + 6], "g()": [6, 2 + 4 + 5 + (2 + 8) + 6]}
    assert kernel_loops.read(found) == {"once": [1, 5], **ways, "sum_of": ways["g()"]}
    assert [len(found[name].way) for name in ways] == [7, 6]


def test_a_jump_through_a_table_leads_to_the_labels_after_it():
    code = disassembled(
        ("BRX R2 -0x10", 5), ".L_x_3:", ("MOV R1, R2", 9), ("BRA `(.L_x_5)", 2),
        ".L_x_4:", ("MOV R1, R2", 4), ".L_x_5:", ("EXIT", 5),
    )  # fmt: skip
    assert kernel_loops.read(kernel_loops.passes(code)) == {"once": [3, 14]}


def launch(name, kernel, precision="fp32"):
    goal = next(goal for goal in kernel_launches.GOALS if goal.name.startswith(name))
    return goal, next(one for one in kernel_launches.launches_of(goal) if one.name == kernel)


def test_the_trips_of_a_step_are_those_of_its_shapes():
    _, first = launch("784-128-10 b128 fp32", "linear")
    (programs,) = kernel_programs.programs_of(first)
    # 784 inputs are 4 steps of 8 parts of 32
    assert (programs.count, dict(programs.trips)) == (128 // 16 * 128 // 16, {"affine_tile_of_parts": 4})
    assert programs.operations == 2 * 16 * 16 * 4 * 8 * 32
    _, loss = launch("4 x 1024", "loss_grad")
    (programs,) = kernel_programs.programs_of(loss)
    # two programs on each of 132 multiprocessors share 512 groups of eight rows; no row has a weight
    trips = {"normaliser_of": 0, "loss_grad_kernel": 2, "rows_in_tiles": 8, "rows_in_tiles 2": 8}
    assert (programs.count, dict(programs.trips)) == (264, trips)
    _, grouped = launch("4 x 1024", "grad_weight")
    tasks = kernel_programs.programs_of(grouped)
    # in the table's order
    assert [(task.count, dict(task.trips)) for task in tasks] == [
        (8 * 8, {"weight_sums": 64}), (16, {"bias_sums": 32})
    ] * 4  # fmt: skip
    _, resident = launch("784-10-10 b32", "resident")
    (program,) = kernel_programs.programs_of(resident)
    # 4 steps of 8 parts of 32 along 784 inputs; 4 tiles of 256 inputs in the first gradient and one in the second
    assert program.trips["forward.affine_tile_of_parts"] == 4
    assert program.trips["gradients_of_layer.weight_tile"] == 4 + 1
    assert program.trips["backward.input_gradient"] == 1


@pytest.mark.parametrize(
    ("loops", "cycles", "limit"),
    [
        # one wave: 10 stalls once, 25 passes of 400
        ({"once": [5, 10], "affine_tile": [10, 400]}, 10 + 25 * 400, "stalls"),
        # unrolled: 25 // 2 passes
        ({"once": [5, 10], "affine_tile": [10, 400, 2]}, 10 + 12 * 400, "stalls"),
        # 2 warps share 4 schedulers: 5 + 25 * 900 instructions
        ({"once": [5, 10], "affine_tile": [900, 400]}, (5 + 25 * 900) * 2 / 4, "issue"),
        ({"once": [0, 0], "affine_tile": [0, 0]}, 2 * 16 * 32 * 32 * 25 / (2048 / 3), "product"),
    ],
)
def test_a_bound_is_the_largest_limit(loops, cycles, limit):
    goal, first = launch("784-128-10 b128 fp32", "linear")
    first = dataclasses.replace(first, tile=configs.Tile(16, 32, 32, 2, 3), programs=32)
    first = dataclasses.replace(first, constants={**first.constants, "BM": 16, "BN": 32, "BK": 32})
    row = {"registers": 60, "shared_static": 0, "shared_dynamic": 8 << 10, "loops": loops}
    assert kernel_cycles.bound(first, row, goal) == (pytest.approx(cycles), limit)


def test_programs_that_do_not_fit_wait_for_a_later_wave():
    goal, first = launch("4 x 1024", "linear")
    row = {"registers": 250, "shared_static": 0, "shared_dynamic": 100, "loops": {"once": [0, 1000000]}}
    row["loops"]["affine_tile"] = [0, 0]
    # 256 programs of 8 warps with 256 registers a thread: one on each of 132 multiprocessors, then 124. The products of
    # a program come before its end.
    products = 2 * 128 * 128 * 1024 / 4096
    assert kernel_programs.resident_programs(row, 8) == 1
    assert kernel_cycles.bound(first, row, goal) == (2 * (1000000 + products), "stalls")


@pytest.mark.parametrize("goal", [goal for goal in kernel_launches.GOALS if goal.precision == "fp32"])
def test_the_choice_of_the_plan_knows_the_bounds_of_the_record(goal):
    limits = TRAITS["triton"].resident
    calls = kernel_cycles.bounds(goal, kernel_model.recorded())
    seconds = sum(cycles for _, cycles, _ in calls) / kernel_cycles.CLOCK
    if goal.plan == "resident":
        found = limits.resident_seconds(step_flops(goal.sizes, goal.batch_size))
    else:
        # from one launch of a graph to the next
        seconds += 1.3e-6 * len(calls)
        found = limits.graph_seconds(goal.sizes, goal.batch_size)
    assert found == pytest.approx(seconds, rel=0.25)


def test_the_table_is_that_of_the_record():
    page = kernel_cycles.PAGE.read_text(encoding="utf-8")
    rows = kernel_model.recorded()
    assert kernel_cycles.page(page, rows) == page
    with pytest.raises(ValueError, match="has no table"):
        kernel_cycles.page("a page without a mark", rows)


def waits(*lines, warps=4):
    """Return the cycles of the way through a kernel without loops."""
    return kernel_waits.cycles(kernel_loops.passes(disassembled(AFTER, *lines, ("EXIT", 0)))["once"].way, warps)


def test_a_warp_waits_for_the_loads_that_it_uses():
    load, other = ("LDG.E R4, desc[UR4][R2.64]", 2, 0, 0), ("LDG.E R5, desc[UR4][R8.64]", 2, 1, 0)
    use = ("FADD R6, R4, R5", 4, 7, 0b11)
    # the second load is under way from cycle 2 on
    assert waits(load, other, use) == 2 + kernel_waits.LOAD + 4
    # one after the other
    first = ("IADD3 R8, R4, R2, RZ", 4, 7, 0b01)
    assert waits(load, first, other, use) == 2 * kernel_waits.LOAD + 4 + 4
    # a use of the chip's own results waits for nothing more
    assert waits(("SHFL.BFLY PT, R4, R2, 0x10, 0x1f", 2, 0, 0), ("FADD R6, R4, R5", 4, 7, 1)) == 6


def test_a_line_that_was_loaded_is_near_until_its_address_changes():
    argument, load = ("LDC.64 R2, c[0x0][0x210]", 1), ("LDG.E R4, desc[UR4][R2.64]", 1, 0, 0)
    use, again = ("FADD R6, R4, R5", 1, 7, 1), ("LDG.E R5, desc[UR4][R2.64+0x40]", 1, 0, 0)
    beyond = ("LDG.E R5, desc[UR4][R2.64+0x80]", 1, 0, 0)
    once = 1 + kernel_waits.LOAD + 1
    assert waits(argument, load, use, again, use) == once + 2
    # the same argument in another register
    other = (("LDC.64 R8, c[0x0][0x210]", 1), ("LDG.E R5, desc[UR4][R8.64]", 1, 0, 0))
    assert waits(argument, load, use, *other, use) == once + 3
    assert waits(argument, load, use, beyond, use) == once + kernel_waits.LOAD + 1
    moved = ("IADD3 R2, R2, R9, RZ", 1)
    assert waits(argument, load, use, moved, again, use) == once + 1 + kernel_waits.LOAD + 1


def test_work_between_an_arrival_and_the_end_of_the_wait_costs_what_goes_beyond_the_meeting():
    def step(text, stalls, board=7, waited=0, function=""):
        control = stalls | board << kernel_waits.SET | waited << kernel_waits.WAITED
        line = kernel_loops.line_of("resident_layers.py", function, "debug_barrier") if function else 0
        return kernel_loops.Instruction(text.split(".")[0], False, "", control, ("resident_layers.py", line), text)

    arrive, met = (step("BAR.SYNC", 1, function=function) for function in ("arrive", "wait"))
    work, load = step("IADD3.X R2, R2, R9, RZ", 10), step("LDG.E R4, desc[UR4][R2.64]", 2, 0)
    use = step("FADD.FTZ R6, R4, R5", 4, waited=1)
    assert kernel_waits.cycles([arrive, *[work] * 20, met], 1) == 1
    assert kernel_waits.cycles([arrive, *[work] * 200, met], 1) == round(2002 - kernel_waits.MEETING)
    # an arrival that another way has, just before
    assert kernel_waits.cycles([*[work] * 20, met, work], 1, 2) == 10
    # a load before the end of the wait has come; one after it has not
    assert kernel_waits.cycles([arrive, load, met, use], 1) == 1 + 4
    assert kernel_waits.cycles([arrive, met, load, use], 1) == 1 + kernel_waits.LOAD + 4


def test_copies_and_products_under_way_hide_behind_each_other():
    copy, group = ("LDGSTS.E.128 [R1], desc[UR4][R2.64]", 2), ("LDGDEPBAR", 2, 0, 0)
    assert waits(copy, group, ("DEPBAR.LE SB0, 0x0", 5)) == kernel_waits.LOAD + 5
    # the one group may stay under way
    assert waits(copy, group, ("DEPBAR.LE SB0, 0x1", 5)) == 9
    product = ("HGMMA.64x128x16.F32.BF16 R24, gdesc[UR4], R24, gsb0", 4)
    took = 2 * 64 * 128 * 16 / (kernel_waits.SUSTAINED / kernel_waits.PROCESSORS / kernel_waits.CLOCK)
    assert waits(product, ("WARPGROUP.DEPBAR.LE gsb0, 0x0", 5)) == round(took + 5)
    # eight warps are two groups with a product each
    assert waits(product, ("WARPGROUP.DEPBAR.LE gsb0, 0x0", 5), warps=8) == round(2 * took + 5)
    assert waits(product, ("WARPGROUP.DEPBAR.LE gsb0, 0x1", 5)) == 9


def test_the_way_around_a_loop_leads_through_it():
    code = disassembled(
        AFTER, ("MOV R1, R2", 3), ("@P0 BRA `(.L_x_9)", 5), ("MOV R1, R2", 11),
        ".L_x_1:", LOOP_BODY, ("LDG.E R4, desc[UR4][R2.64]", 2), ("@P1 BRA `(.L_x_1)", 1),
        ".L_x_9:", AFTER, ("EXIT", 5),
    )  # fmt: skip
    found = kernel_waits.read(kernel_loops.passes(code), 4)
    assert found["once"][0] == 3 + 5 + 5
    assert found["affine_tile"] == [3, 0, 3 + 5 + 11 + 5]


def demand(alone, **needs):
    return kernel_model.Demand(alone, needs)


@pytest.mark.parametrize(
    ("groups", "places", "cycles"),
    [
        # two waves on two multiprocessors
        ([(3, demand(100))], 1, 200),
        # beside each other they do not slow each other down
        ([(4, demand(100, issue=50))], 2, 100),
        # but share what there is too little of
        ([(4, demand(100, issue=75))], 2, 150),
        # the long program begins last, when a short one ends
        ([(2, demand(10)), (1, demand(100))], 1, 110),
        # first, it is under way beside the others
        ([(1, demand(100)), (2, demand(10))], 1, 100),
        # one that ends leaves its share to the other
        ([(1, demand(100, issue=100)), (1, demand(100)), (1, demand(50, issue=50))], 2, 150),
    ],
)
def test_programs_go_to_the_first_multiprocessor_with_room(groups, places, cycles):
    assert kernel_model.schedule(groups, 2, places) == pytest.approx(cycles)


# Estimates in microseconds that were made before the model, of the plans of then: estimated_launches.json has these.
ESTIMATES = {"784-128-10": (13, 13), "784-512-256-10": (22, 22), "4 x 1024": (235, 250), "512 models": (14, 18)}
LAUNCHES = json.loads(Path(__file__).with_name("estimated_launches.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("name", ESTIMATES)
def test_the_model_agrees_with_estimates_that_were_made_before_it(name):
    (goal,) = (goal for goal in kernel_launches.GOALS if goal.name.startswith(name) and goal.name in LAUNCHES)
    seconds = 0.0
    for one in LAUNCHES[goal.name]:
        tile, constants = configs.Tile(*one["tile"]), {"PRODUCT": one["product"]}
        made = kernel_launches.Recorded(kernel_variants.KERNELS[one["kernel"]], 1, {}, constants, tile)
        programs = [kernel_programs.Programs(*each) for each in one["programs"]]
        work = kernel_programs.Work(programs, one["ending"], one["elements"], one["reals"])
        seconds += one["times"] * kernel_model.expected(made, work, one["row"], goal).seconds
    least, most = ESTIMATES[name]
    assert 0.85 * least <= 1e6 * seconds <= 1.15 * most


def test_the_work_of_a_launch_and_its_clock_count():
    goal, first = launch("784-128-10 b128 fp32", "linear")
    variant, work = first.variant("fp32"), kernel_programs.work_of(first)
    # x, w and y, once; x and w of a tile 16 x 16, and the tile
    assert work.elements == 128 * 784 + 128 * 784 + 128 * 128
    assert work.programs[0].elements == 2 * 16 * 784 + 16 * 16
    row = kernel_model.recorded()[variant.kernel, variant.name]
    fast = dataclasses.replace(kernel_model.H100, clock=2 * kernel_model.H100.clock)
    slow, doubled = (kernel_model.expected(first, work, row, goal, card).seconds for card in (kernel_model.H100, fast))
    # twice the clock leaves the time between launches
    assert slow - doubled == pytest.approx((slow - kernel_model.H100.launch) / 2)


def test_a_wait_for_other_programs_takes_no_name_from_a_loop_of_the_whole_card():
    rows = [row for (kernel, _), row in kernel_model.recorded().items() if kernel == "card"]
    assert rows and all({"card_kernel", "loss_and_gradient()", "keep()"} <= row["waits"].keys() for row in rows)


def test_a_kernel_without_a_row_of_its_code_is_compiled(monkeypatch):
    goal, first = launch("784-128-10 b128 fp32", "linear")
    rows = kernel_model.recorded()
    times = kernel_model.step(goal, rows)
    assert [one.triton for one in times] == ["3.6.0"] * 4
    variant = first.variant("fp32")
    row = rows[variant.kernel, variant.name]
    compiled = []
    monkeypatch.setattr(
        kernel_variants, "compile_variant", lambda *asked: compiled.append(asked) or {**row, "triton": "other"}
    )
    changed = {**rows, (variant.kernel, variant.name): {**row, "source": "of other code"}}
    again = kernel_model.step(goal, changed)
    assert [one.triton for one in again] == ["other", "3.6.0", "3.6.0", "3.6.0"]
    assert [asked[0].name for asked in compiled] == [variant.name]
    assert [one.seconds for one in again] == [one.seconds for one in times]
