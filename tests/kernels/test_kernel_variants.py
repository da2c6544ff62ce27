"""Kernels compiled ahead are the launched ones; bad machine code is reported; the record is up to date."""

import dataclasses
import importlib.util
import itertools
import os
from pathlib import Path

import pytest

pytest.importorskip("triton")

import kernel_machine_code
import kernel_variants
from processes import INTERPRETED, ROOT, python
from recorded import PRECISIONS, launches

from fusemlp_kernels.contract import resident_refusal
from fusemlp_kernels.errors import ArgumentError, BackendUnavailableError
from fusemlp_kernels.registry import TRAITS
from fusemlp_kernels.triton import configs

FAMILIES = sorted({configs.family_of(target) for target in kernel_variants.TARGETS})
GOOD = {
    "kernel": "linear", "variant": "fp32 64x64x32", "triton": "3.9.0", "arch": "sm_90", "registers": 128, "stack": 0,
    "spills": 0, "shared_static": 1024, "shared_dynamic": 227 << 10, "tensor_core": "HGMMA", "source": "0",
}  # fmt: skip


@pytest.fixture(scope="module")
def command():
    """``ci/compile_kernels.py`` as a module."""
    interpret = os.environ.get("TRITON_INTERPRET")
    spec = importlib.util.spec_from_file_location("compile_kernels", ROOT / "ci/compile_kernels.py")
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_CACHE_DIR", os.environ.get("TRITON_CACHE_DIR", ""))
        spec.loader.exec_module(module)
    if interpret is not None:
        os.environ["TRITON_INTERPRET"] = interpret
    return module


def kernels_of(target, *precisions):
    """Return the names of the kernels of ``target``: of all but the narrow one, where its tile does not fit, and the
    card's and the chip's, where they have no tiles."""
    arch = configs.Architecture(configs.family_of(target), 132)
    narrow = any(configs.narrow_tile(arch, precision) for precision in precisions)
    there = dict.fromkeys(("narrow", "predict_narrow"), narrow)
    there |= {"card": "card" in configs.TABLES[arch.family], "chip": arch.family in configs.CHIP}
    return {kernel for kernel in kernel_variants.KERNELS if there.get(kernel, True)}


def compiled_as(launch, precision):
    """Return the variant that a launch needs; the lengths of the task table are listed with one tile only."""
    constants = {**launch.constants, **({"TASKS": 16} if "TASKS" in launch.constants else {})}
    return launch.name, dataclasses.replace(launch, constants=constants).variant(precision).name


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("target", ["sm_90", "gfx942"])
def test_every_launch_of_a_training_step_is_a_variant(target, precision):
    known = {(variant.kernel, variant.name): variant for variant in kernel_variants.variants(target)}
    found = launches(target, precision)
    for launch in found:
        variant = known[compiled_as(launch, precision)]
        constants = {**launch.constants, **({"TASKS": 16} if "TASKS" in launch.constants else {})}
        assert (variant.tile, dict(variant.constants)) == (launch.tile, constants)
        assert launch.constants.get("TASKS", 16) in configs.TABLE_LENGTHS
    # The clock alone is for steps with nothing to train, the norm alone for external gradients and for members under a
    # loss scale. Under that there is no resident plan, and no privacy.
    alone = {"advance"} if precision == "fp16" else {"advance", "norm"}
    alone |= (
        set() if precision in kernel_variants.RESIDENT_PRECISIONS else {"resident", "card", "chip", "clip_examples"}
    )
    assert {launch.name for launch in found} == kernels_of(target, precision) - alone


def test_triton_finds_the_types_that_are_compiled_ahead():
    done = python("-W", "error", Path(__file__).with_name("recorded.py"), "sm_90", "gfx942", without=INTERPRETED)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@pytest.mark.parametrize("target", kernel_variants.TARGETS)
def test_variants_are_told_apart_by_their_names(target):
    names = [(variant.kernel, variant.name) for variant in kernel_variants.variants(target)]
    assert len(set(names)) == len(names)
    assert {kernel for kernel, _ in names} == kernels_of(target, *PRECISIONS)


def test_a_target_without_kernels():
    with pytest.raises(ArgumentError, match="sm_75"):
        kernel_variants.variants("sm_75")
    with pytest.raises(BackendUnavailableError, match="sm_75"):
        configs.family_of("sm_75")


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("product", ["forward", "weight"])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_tiles_fall_in_size_to_16_by_32(family, product, precision):
    found = configs.tiles(family, product, precision)
    sizes = [tile.rows * tile.columns for tile in found]
    assert sizes == sorted(sizes, reverse=True)
    assert (found[-1].rows, found[-1].columns) == (16, 32)


@pytest.mark.parametrize("family", FAMILIES)
def test_output_tiles_hold_rows_of_any_width(family):
    arch = configs.Architecture(family, 1)
    for width in (1, 16, 17, 128, 129, configs.WIDEST_OUTPUT):
        assert configs.output_tile(arch, width).columns >= width


def test_larger_results_get_larger_tiles_down_to_one_program_a_processor():
    arch = configs.Architecture("sm_90", 132)
    tiles = configs.tiles("sm_90", "forward", "bf16")
    assert configs.product_tile(arch, "forward", "bf16", [(8192, 8192)]) == tiles[0]
    assert configs.product_tile(arch, "forward", "bf16", [(128, 128)]) == tiles[-1]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_tile_wastes_less_than_half_of_its_sides(family, precision):
    arch = configs.Architecture(family, 132)
    least = configs.tiles(family, "forward", precision)[-1]
    for rows, columns in itertools.product((1 << 7, 1 << 12, 1 << 18), (1, 8, 16, 31, 32, 33, 64, 65, 100, 128, 1000)):
        tile = configs.product_tile(arch, "forward", precision, [(rows, columns)])
        assert tile.columns < 2 * max(columns, least.columns) and tile.rows < 2 * max(rows, least.rows)
        for parts in (1, 4, 32):
            tile = configs.product_tile(arch, "weight", precision, [(columns, 16), (32, columns)], parts=parts)
            assert tile.rows < 2 * max(columns, 32) and tile.columns < 2 * max(columns, least.columns)


@pytest.mark.parametrize("width", [16, 32, 64])
def test_a_tall_narrow_result_is_covered_without_empty_columns(width):
    arch = configs.Architecture("sm_90", 132)
    tile = configs.product_tile(arch, "forward", "bf16", [(1 << 18, width)])
    covered = tile.count(1 << 18, width) * tile.rows * tile.columns
    assert covered <= (1 << 18) * max(width, 32)
    # the largest tile of that width
    same = [one for one in configs.tiles("sm_90", "forward", "bf16") if one.columns == tile.columns]
    assert tile == same[0]


def test_the_parts_of_a_batch_count_as_programs():
    arch, shapes = configs.Architecture("sm_90", 132), [(64, 64)] * 3
    sizes = []
    for parts in (1, 8, 32, 96):
        tile = configs.product_tile(arch, "weight", "fp32", shapes, parts=parts)
        sizes.append((tile.rows, tile.columns))
        programs = parts * sum(tile.count(*shape) for shape in shapes)
        assert programs >= 132 or tile == configs.tiles("sm_90", "weight", "fp32")[-1]
    # larger tiles read each matrix less often
    assert sizes == [(16, 32), (16, 32), (32, 64), (64, 64)]
    # 16 x 32 would take turns: 288 programs of 32 x 64 run at once
    assert configs.product_tile(arch, "weight", "fp32", [(512, 784), (256, 512), (10, 256)]).columns == 64
    # nothing to sum but biases
    assert configs.product_tile(arch, "weight", "fp32", []) == configs.tiles("sm_90", "weight", "fp32")[-1]


def test_small_results_get_a_tile_whose_reduction_is_cut():
    arch = configs.Architecture("sm_90", 4)
    (deep,) = [configs.Tile(*row) for row in configs.TABLES["sm_90"]["deep"]["fp32"]]
    assert (deep.rows, deep.columns, deep.split * deep.depth) == (16, 16, 256)
    cases = (64, 32, None), (64, 33, deep), (80, 127, None), (128, 128, deep), (144, 999, None)
    for columns, reduction, found in cases:
        assert configs.deep_tile(arch, "fp32", 16, columns, reduction) == found
    assert configs.deep_tile(configs.Architecture("gfx942", 4), "fp32", 16, 16, 256) is None
    logits = configs.deep_tile(arch, "bf16", 16, 16, 256, "deep_output")
    assert logits is not None and logits.rows * logits.columns >= 2 * 32 * logits.warps


AMD = {"kernel": "resident", "arch": "gfx942", "shared_static": 0, "shared_dynamic": 1024, "stack": 8}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({}, ""),
        # a missing fence counts from the version that has it; kernels without a product need no tensor cores
        ({"unfenced": 1, "triton": "3.6.0"}, ""),
        ({"kernel": "update", "tensor_core": ""}, ""),
        # functions of AMD may keep a stack, and spill nothing
        (AMD, ""),
        ({**AMD, "spills": 1}, "1 spills"),
        ({**AMD, "kernel": "linear"}, "a stack of 8 bytes"),
        ({"spills": 4}, "4 spills"),
        ({"stack": 16}, "a stack of 16 bytes"),
        ({"tensor_core": ""}, "no tensor-core instruction"),
        ({"shared_dynamic": (227 << 10) + 1}, "bytes of shared memory; sm_90 has 232448"),
        ({"shared_static": 1025}, "bytes of shared memory"),
        ({"arch": "sm_86", "shared_static": 0, "shared_dynamic": 100 << 10}, "sm_86 has 101376"),
        ({"kernel": "resident", "stack": 8}, "a stack of 8 bytes"),
        ({"unfenced": 1, "triton": "3.7.1"}, "1 products"),
        ({"unfenced": 2}, "2 products read copied shared memory without fence.proxy.async"),
        ({"shared_callers": 1}, "1 functions hold shared memory while they call another"),
        ({"undrained": 1}, "1 tickets are taken while stores of other waves are on their way"),
        ({"arch": "gfx942", "shared_static": 0, "shared_dynamic": 65 << 10}, "gfx942 has 65536"),
    ],
)
def test_bad_machine_code_is_noticed(command, change, said):
    problems = command.problems({**GOOD, **change})
    assert len(problems) == bool(said)
    for problem in problems:
        assert said in problem and f"{change.get('kernel', 'linear')} (fp32 64x64x32)" in problem


def test_a_product_without_a_fence_after_its_copies_is_found():
    copies, fence, product = "cp.async.wait_group 2;\n", "fence.proxy.async.shared::cta;\n", "wgmma.mma_async.sync;\n"
    assert kernel_machine_code.unfenced(copies + "bar.sync 0;\n" + fence + product + product) == 0
    assert kernel_machine_code.unfenced(copies + "bar.sync 0;\n" + product + product) == 1
    assert kernel_machine_code.unfenced(fence + copies + "tcgen05.mma.cta_group::1.kind::f16;\n") == 1
    assert kernel_machine_code.unfenced(copies + "mma.sync.aligned.m16n8k16;\n") == 0


STORE, DRAIN, BARRIER = "\tbuffer_store_dword v1, v2, s[4:7], 0 offen\n", "\ts_waitcnt vmcnt(0)\n", "\ts_barrier\n"
TICKET = (
    "\ts_cbranch_execz .LBB0_9\n\tbuffer_wbl2 sc1\n\ts_waitcnt vmcnt(0)\n\tglobal_atomic_add v3, v3, v4, s[8:9] sc0\n"
)


@pytest.mark.parametrize(
    ("before", "faults"),
    [
        (STORE + DRAIN + BARRIER, 0),
        (STORE + BARRIER, 1),
        # the wait of one wave after the barrier, and a wait for all but one
        (STORE + BARRIER + DRAIN, 1),
        (STORE + BARRIER + DRAIN + BARRIER, 0),
        (STORE + BARRIER + BARRIER, 1),
        (STORE + DRAIN + STORE + "\ts_waitcnt vmcnt(1)\n" + BARRIER, 1),
        (STORE + "\ts_waitcnt vmcnt(0) lgkmcnt(0)\n" + BARRIER, 0),
        (STORE + DRAIN, 1),
        # a store on one of two paths, and a wait on one of them
        ("\ts_cbranch_scc1 .LBB0_1\n" + STORE + ".LBB0_1:\n" + BARRIER, 1),
        (STORE + "\ts_cbranch_execz .LBB0_1\n" + DRAIN + ".LBB0_1:    ; %x\n" + BARRIER, 1),
        # a store at the end of a loop that waits at its beginning
        (".LBB0_1:\n" + DRAIN + STORE + "\ts_cbranch_scc1 .LBB0_1\n" + BARRIER, 1),
        ("\ts_branch .LBB0_1\n" + STORE + ".LBB0_1:\n" + BARRIER, 0),
        ("\tds_write_b32 v1, v2\n\tbuffer_load_dword v1, v2, s[4:7], 0 offen\n" + BARRIER, 0),
    ],
)
def test_a_ticket_before_the_stores_of_all_waves_is_found_in_amd_code(before, faults):
    code = f"kernel:   ; @kernel\n{before}{TICKET}.LBB0_9:\n\ts_endpgm\n"
    assert kernel_machine_code.undrained(code) == faults


def test_amd_code_whose_ticket_is_not_found_is_an_error():
    asm = {"ttgir": "%1 = tt.atomic_rmw add, acq_rel", "amdgcn": "kernel:\n\ts_endpgm\n"}
    with pytest.raises(ValueError, match="ticket"):
        kernel_machine_code.of(asm, 0, "gfx942", 4)


def test_shared_memory_held_across_a_call_is_found():
    holds, calls = "%x = ttg.local_alloc : () -> !ttg.memdesc", "tt.call @f(%x) : () -> ()"
    function = "  tt.func private @g() {{\n{}\n  }}\n"
    assert kernel_machine_code.shared_callers(function.format(holds) + function.format(calls)) == 0
    assert kernel_machine_code.shared_callers(function.format(f"{holds}\n{calls}")) == 1


@pytest.mark.parametrize("version", ["3.6.0", "3.7.0+cu130"])
def test_blackwell_needs_a_version_of_triton_with_the_fence(version):
    said = rf"device: Triton {version.split('+')[0]}.* expected Triton 3.7.1"
    with pytest.raises(BackendUnavailableError, match=said):
        configs.check_compiler("sm_100", version)
    configs.check_compiler("sm_90", version)
    for newer in ("3.7.1", "3.9.0", "3.10.0+cu140"):
        configs.check_compiler("sm_100", newer)


# Networks for the resident kernel: widths, and the most outputs of their tile.
RESIDENT = [
    *(((64, 32, 10), 16), ((64, 32, 20), 32), ((784, 10, 10), 16), ((784, 10, 20), 128), ((784, 128, 10), 128)),
    *(((17, 64, 64, 6), 16), ((54, 256, 256, 256, 7), 128), ((4096, 256, 128), 128), ((30, 1), 16)),
]


@pytest.mark.parametrize("target", kernel_variants.TARGETS)
@pytest.mark.parametrize(("sizes", "outputs"), RESIDENT)
def test_networks_within_the_limits_have_a_compiled_kernel(target, sizes, outputs):
    known = {variant.name for variant in kernel_variants.variants(target) if variant.kernel == "resident"}
    arch = configs.Architecture(configs.family_of(target), 1)
    for precision in kernel_variants.RESIDENT_PRECISIONS:
        assert resident_refusal(TRAITS["triton"].resident, "triton", sizes, 64, precision, ()) is None
        tile = configs.resident_tile(arch, precision, sizes)
        assert tile.outputs == outputs >= sizes[-1]
        constants = configs.resident_constants(tile, arch.product(precision), True)
        assert kernel_variants.Variant("resident", precision, tile, constants).name in known


def test_the_limits_are_those_of_the_tiles():
    limits = TRAITS["triton"].resident
    assert limits.precisions == kernel_variants.RESIDENT_PRECISIONS
    for family in FAMILIES:
        for precision in kernel_variants.RESIDENT_PRECISIONS:
            assert configs.resident_tiles(family, precision)[-1].outputs == limits.outputs
            if "card" in configs.TABLES[family]:
                tile = configs.resident_tiles(family, precision, "card")[-1]
                card = TRAITS["triton"].card
                assert (tile.outputs, tile.inputs, tile.units) == (card.outputs, card.inputs, card.width)


def test_another_result_than_recorded_is_noticed(command):
    assert command.differences([GOOD], [GOOD]) == []
    (found,) = command.differences([{**GOOD, "registers": 130}], [GOOD])
    assert "registers 128 -> 130" in found


def test_a_slower_loop_than_recorded_is_noticed(command):
    recorded = {**GOOD, "loops": {"once": [90, 200], "affine_tile": [100, 1000], "sum_of": [40, 100, 2]}}

    def compiled(**loops):
        return command.slower([{**recorded, "loops": {**recorded["loops"], **loops}}], [recorded])

    assert compiled() == compiled(affine_tile=[150, 1030]) == compiled(sum_of=[80, 206, 4]) == []
    (found,) = compiled(affine_tile=[100, 1031])
    assert "linear (fp32 64x64x32): affine_tile takes 1031 stall cycles a pass, recorded are 1000" in found
    assert len(compiled(sum_of=[40, 100])) == 1
    assert len(compiled(once=[90, 300], affine_tile=[200, 2000])) == 2
    # a row without loops, as of AMD, or of before they were recorded
    assert command.slower([recorded], [GOOD]) == []
    assert command.differences([recorded], [GOOD]) == []


def test_slower_loops_are_not_recorded_unless_accepted(command, monkeypatch, tmp_path):
    recorded = {**GOOD, "loops": {"affine_tile": [100, 1000]}}
    slow = {**recorded, "loops": {"affine_tile": [100, 2000]}}
    written = []
    monkeypatch.setattr(command, "read_record", lambda: [recorded])
    monkeypatch.setattr(command, "compile_all", lambda *_: ([slow], []))
    monkeypatch.setattr(command, "write_record", lambda rows: written.append(rows))
    assert command.main(["--arch", "sm_90", "--kernel", "norm", "--write"]) == 1
    assert written == []
    assert command.main(["--arch", "sm_90", "--kernel", "norm", "--write", "--accept-slower"]) == 0
    assert written == [[slow]]


def test_the_systematic_part_is_large_enough(command):
    parts = [command.systematic_part(kernel_variants.variants(target)) for target in kernel_variants.TARGETS]
    assert sum(map(len, parts)) >= 200
    for target, part in zip(kernel_variants.TARGETS, parts, strict=True):
        assert {variant.kernel for variant in part} == kernels_of(target, *PRECISIONS)


def test_the_sample_of_the_check_has_every_kernel(command):
    found = command.sample(command.chosen(command.SAMPLE, tuple(kernel_variants.KERNELS), everything=False))
    for arch in command.SAMPLE:
        own = [variant for variant, target in found if target == arch]
        assert sorted(one.kernel for one in own if one.precision == "fp32") == sorted(kernels_of(arch, "fp32"))
        products = (set(kernel_variants.PRODUCTS) & kernels_of(arch, "bf16")) - {"resident"}
        assert {one.kernel for one in own if one.precision == "bf16"} >= products
    assert len(found) < 2 * len(command.SAMPLE) * len(kernel_variants.KERNELS)


def test_a_record_of_other_code_is_noticed(command):
    (arch, kernel, name, source) = min(command.launched(everything=False))
    row = {**GOOD, "arch": arch, "kernel": kernel, "variant": name, "source": source[::-1]}
    found = command.record_problems([row])
    assert any("rows are not of the current kernels" in problem for problem in found)
    assert any("rows are missing" in problem for problem in found)


def test_the_record_is_of_the_kernels_as_they_are(command):
    record = command.read_record()
    assert command.record_problems(record) == []
    versions = {row["triton"] for row in record}
    assert {"3.6.0", "3.9.0"} <= versions
    for row in record:
        assert row.keys() - {*kernel_machine_code.FAULTS, "loops", "waits"} == GOOD.keys()
        assert "loops" not in row or row["arch"].startswith("sm_")
        assert all(type(row[name]) is type(GOOD[name]) for name in GOOD)


def test_the_hash_of_a_kernel_is_that_of_all_it_calls():
    hashes = {name: kernel_variants.source_hash(name, "gfx942") for name in kernel_variants.KERNELS}
    assert len(set(hashes.values())) == len(hashes)
    # AMD alone has the wait before a ticket
    nvidia = {name for name in hashes if kernel_variants.source_hash(name, "sm_90") == hashes[name]}
    assert {"linear", "resident"} <= nvidia and not {"norm", "grad_affine_members", "update"} & nvidia


SCRIPT = """
from bench.host import Driver, pretend

pretend()
launches, searches = [], []
Driver.launcher_cls = lambda self, source, metadata: lambda *given: launches.append((source.fn.__name__, given))

from triton.runtime.jit import JITFunction

import fusemlp
from fusemlp import MLP, SGD, Engine

run = JITFunction.run
JITFunction.run = lambda self, *given, **named: (searches.append(self), run(self, *given, **named))[1]
engine = Engine(MLP([3, 4, 2]), optimizer=SGD(0.1), batch_size=4, backend="triton", plan="eager", normalise=False)
x, y = [[0.0, 1.0, 2.0]] * 4, [0, 1, 0, 1]
for _ in range(3):
    engine.step(x, y)
first, *later = launches[:4], launches[4:8], launches[8:]
assert len(searches) == 4 and [len(one) for one in later] == [4, 4], (len(searches), len(launches))
for again in later:
    for (name, given), (other, repeated) in zip(first, again, strict=True):
        assert name == other and len(given) == len(repeated)
        # the seventh is for hooks, made for each launch
        given, repeated = (one[:6] + one[7:] for one in (given, repeated))
        differ = [(at, a, b) for at, (a, b) in enumerate(zip(given, repeated, strict=True)) if a is not b and a != b]
        assert not differ, (name, differ)
"""


def test_later_launches_repeat_the_first_without_tritons_search():
    """The first goes through Triton's own launcher; what it hands to the driver is what the others hand to it."""
    done = python("-c", SCRIPT, without=INTERPRETED)
    assert done.returncode == 0, done.stderr
