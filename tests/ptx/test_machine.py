"""The rules of the machine, on kernels of a few lines: each broken rule stops the kernel, with its place."""

import numpy as np
import pytest
from emulator.copies import TensorMap
from emulator.faults import Fault, Problem
from emulator.memory import Global
from emulator.parse import parse
from emulator.schedule import Code, Launch

# Two warps; %rd1 is the address of the argument, %r1 the thread, %r2 four times that, %rd2 the thread's word.
KERNEL = """
.file 1 "/somewhere/kernel.py"
.visible .entry kernel(.param .u64 .ptr .global .align 1 kernel_param_0)
.reqntid 64
{
	.reg .pred 	%p<9>;
	.reg .b16 	%rs<9>;
	.reg .b32 	%r<19>;
	.reg .b64 	%rd<19>;
	.loc	1 7 0
	ld.param.b64 	%rd1, [kernel_param_0];
	mov.u32 	%r1, %tid.x;
	shl.b32 	%r2, %r1, 2;
	cvt.u64.u32 	%rd3, %r2;
	add.s64 	%rd2, %rd1, %rd3;
	.loc	1 8 0
BODY
	ret;
}
"""


def run(body, words=64, shared=256, blocks=1, **settings):
    """Run a kernel with this body; return the words it has written."""
    memory = np.zeros(words, np.uint32)
    region = memory.__array_interface__["data"][0], memory.nbytes
    code = Code(parse(KERNEL.replace("BODY", body)))
    Launch(code, range(blocks), [region[0]], Global([region], blocks), shared, **settings).run()
    return memory


NEIGHBOUR = """
	xor.b32 	%r3, %r2, 128;
	st.shared.b32 	[%r2], %r1;
	BARRIER
	ld.shared.b32 	%r4, [%r3];
	st.global.b32 	[ %rd2 + 0 ], { %r4 };
"""


@pytest.mark.parametrize("seed", range(3))
def test_a_barrier_orders_shared_memory(seed):
    found = run(NEIGHBOUR.replace("BARRIER", "bar.sync 0;"), orders=2, seed=seed)
    np.testing.assert_array_equal(found, np.arange(64) ^ 32)


@pytest.mark.parametrize(
    ("body", "problem"),
    [
        (NEIGHBOUR.replace("BARRIER", ""), "race: reads shared memory that another warp has written"),
        ("ld.shared.b32 %r4, [%r2];\nbar.sync 0;", "reads uninitialised shared memory"),
        ("st.shared.b32 [%r2], %r1;\nxor.b32 %r3, %r2, 128;\nst.shared.b32 [%r3], %r1;", "race: writes shared memory"),
        ("st.shared.b32 [16], %r1;", "race: threads write different values"),
        ("st.shared.b32 [%r2+4], %r1;", "shared address 0x100, 4 bytes, is outside the 256 bytes"),
        ("st.shared.v2.b32 [%r2], {%r1, %r1};", "misaligned shared address 0x4, for 8 bytes"),
        ("st.global.b32 [ %rd2 + 4 ], { %r1 };", "is outside the allocations (at byte 256 of one of 256 bytes)"),
        ("st.global.b32 [ %rd2 + -4 ], { %r1 };", "is outside the allocations (4 bytes before one of 256 bytes)"),
        ("st.global.v2.b32 [ %rd2 + 0 ], { %r1, %r1 };", "misaligned global address"),
        ("setp.lt.u32 %p1, %r1, 40;\n@%p1 bra L1;\nbar.sync 0;\nL1:", "divergence: threads of a warp miss"),
        ("setp.lt.u32 %p1, %r1, 32;\n@%p1 bra L1;\nbar.sync 0;\nL1:", "divergence at a barrier: some threads wait"),
        (
            "setp.lt.u32 %p1, %r1, 32;\n@%p1 bra L1;\nbar.sync 0;\nbra.uni L2;\nL1:\nbar.sync 0;\nL2:",
            "divergence at a barrier: the block's threads wait at different ones",
        ),
        (
            "setp.lt.u32 %p1, %r1, 5;\n@%p1 bra L1;\nshfl.sync.bfly.b32 %r4, %r1, 1, 31, -1;\nL1:",
            "divergence: threads of a warp miss an instruction of the whole warp",
        ),
        ("L1:\nadd.s32 %r5, %r5, 1;\nbra.uni L1;", "livelock: more than 1000 instructions"),
        (
            "mul.lo.s32 %r3, %r1, 4;\ncp.async.ca.shared.global [ %r3 + 0 ], [ %rd2 + 0 ], 0x4, 4;\n"
            "cp.async.commit_group;\nld.shared.b32 %r4, [%r3];",
            "reads shared memory while a copy into it is under way",
        ),
    ],
)  # fmt: skip
def test_a_broken_rule_stops_the_kernel(body, problem):
    with pytest.raises(Fault) as raised:
        run(body, limit=1000)
    assert problem in raised.value.problem
    assert str(raised.value.place).startswith("kernel at kernel.py:8: ")


EXCHANGE = """
	xor.b32 	%r3, %r2, 128;
	cvt.u64.u32 	%rd4, %r3;
	add.s64 	%rd5, %rd1, %rd4;
	st.global.b32 	[ %rd2 + 0 ], { %r1 };
	BARRIER
	ld.global.b32 	{ %r4 }, [ %rd5 + 0 ];
	st.global.b32 	[ %rd2 + 256 ], { %r4 };
"""


def test_a_barrier_orders_global_memory_within_a_block():
    expected = (np.arange(64, dtype=np.uint32) ^ 32).tobytes()
    for seed in range(4):
        assert run(EXCHANGE.replace("BARRIER", "bar.sync 0;"), 128, orders=2, seed=seed)[64:].tobytes() == expected
        # without it the values are unknown: all ones
        assert run(EXCHANGE.replace("BARRIER", ""), 128, orders=2, seed=seed)[64:].tobytes() != expected


@pytest.mark.parametrize(
    ("body", "problem"),
    [
        ("ld.global.b32 { %r4 }, [ %rd1 + 0 ];\nst.global.b32 [ %rd1 + 0 ], { %r1 };", "another block has read"),
        ("mov.u32 %r3, %ctaid.x;\nst.global.b32 [ %rd2 + 0 ], { %r3 };", "different values"),
        ("st.global.b32 [ %rd1 + 0 ], { %r1 };", "different values"),
        (
            "mov.u32 %r3, %ctaid.x;\nsetp.eq.u32 %p1, %r3, 0;\n@%p1 bra L1;\nst.global.b32 [ %rd2 + 0 ], { %r3 };\n"
            "bra.uni L2;\nL1:\nst.global.b32 [ %rd2 + 0 ], { %r3 };\nL2:",
            "another block has written",
        ),
    ],
)  # fmt: skip
def test_a_race_through_global_memory_is_found(body, problem):
    with pytest.raises(Fault, match=f"race: .*{problem}"):
        run(body, blocks=2)


TICKET = """
	mov.u32 	%r3, %ctaid.x;
	setp.eq.u32 	%p1, %r1, 0;
	mul.lo.s32 	%r4, %r3, 4;
	cvt.u64.u32 	%rd4, %r4;
	add.s64 	%rd5, %rd1, %rd4;
	@%p1 st.global.b32 	[ %rd5 + 4 ], { %r3 };
	bar.sync 	0;
	mov.b32 	%r5, 1;
	@!%p1 bra 	L1;
	ATOMIC
	setp.ne.b32 	%p2, %r6, 2;
	@%p2 bra 	L1;
	ld.global.cg.v2.b32 	{ %r7, %r8 }, [ %rd1 + 8 ];
	add.s32 	%r7, %r7, %r8;
	st.global.b32 	[ %rd1 + 16 ], { %r7 };
L1:
"""


@pytest.mark.parametrize("seed", range(4))
def test_the_last_ticket_sees_what_the_other_blocks_have_written(seed):
    atomic = "atom.global.gpu.acq_rel.add.u32 %r6, [ %rd1 + 0 ], %r5;"
    assert run(TICKET.replace("ATOMIC", atomic), blocks=3, seed=seed)[4] == 3
    with pytest.raises(Fault, match="race: reads global memory that another block has written"):
        run(TICKET.replace("ATOMIC", "mov.b32 %r6, 2;"), blocks=3, seed=seed)


def test_a_copy_arrives_when_its_thread_waits_for_its_group():
    body = """
	st.global.b32 	[ %rd2 + 0 ], { %r1 };
	cp.async.ca.shared.global [ %r2 + 0 ], [ %rd2 + 0 ], 0x4, 4;
	cp.async.commit_group;
	mov.b32 	%r6, 0;
	add.s32 	%r7, %r2, 256;
	cp.async.ca.shared.global [ %r7 + 0 ], [ %rd2 + 0 ], 0x4, %r6;
	cp.async.commit_group;
	cp.async.wait_group 1;
	ld.shared.b32 	%r4, [%r2];
	cp.async.wait_group 0;
	ld.shared.b32 	%r5, [%r7];
	add.s32 	%r4, %r4, 1;
	st.global.b32 	[ %rd2 + 0 ], { %r4 };
	st.global.b32 	[ %rd2 + 256 ], { %r5 };
"""
    found = run(body, words=128, shared=512)
    np.testing.assert_array_equal(found, [*range(1, 65), *[0] * 64])


def test_threads_that_a_branch_parts_run_together_again():
    body = """
	setp.lt.u32 	%p1, %r1, 40;
	mov.b32 	%r5, 3;
	@%p1 bra 	L1;
	mov.b32 	%r5, 7;
L1:
	shfl.sync.bfly.b32 	%r4, %r5, 31, 31, -1;
	st.global.b32 	[ %rd2 + 0 ], { %r4 };
"""
    found = run(body)
    np.testing.assert_array_equal(found, [3] * 32 + [7] * 24 + [3] * 8)


def test_an_atomic_sum_counts_each_thread_once_in_every_block():
    body = "mov.b32 %r3, 1;\natom.global.gpu.acq_rel.add.u32 %r4, [ %rd1 + 0 ], %r3;"
    assert run(body, blocks=3)[0] == 3 * 64


def test_an_unknown_instruction_is_named():
    with pytest.raises(NotImplementedError, match=r"the emulator has no 'bfind.u32 %r3, %r1'"):
        run("bfind.u32 %r3, %r1;")


# A matrix of 3 rows and 20 columns of 16 bits, in rows of 64 bytes; tiles of 4 rows of 32 bytes. Thread 0 starts the
# barrier at 128 and copies the tile from row -1 and column CORNER on; each warp reads it, a word a thread.
TILE = """
	setp.eq.u32 	%p1, %r1, 0;
	mov.b64 	%rd4, 64;
	mov.b32 	%r5, CORNER;
	mov.b32 	%r6, -1;
	@%p1 mbarrier.init.shared::cta.b64 [128], 1;
	bar.sync 	0;
	@%p1 mbarrier.arrive.expect_tx.shared::cta.b64 _, [128], 128;
	@%p1 cp.async.bulk.tensor.2d.shared::cta.global.mbarrier::complete_tx::bytes [0], [%rd4, {%r5, %r6}], [128];
	{
	.reg .pred complete;
	waitLoop:
	mbarrier.try_wait.parity.shared::cta.b64 complete, [128], 0;
	@!complete bra.uni waitLoop;
	}
	and.b32 	%r3, %r2, 124;
	ld.shared.b32 	%r4, [%r3];
	st.global.b32 	[ %rd2 + 0 ], { %r4 };
"""


def copied(body=TILE, corner=0, own=False, **settings):
    """Run a kernel that copies tiles, with ``own`` from the words it writes; return these."""
    words = np.arange(3 * 16, dtype=np.uint32) + 1
    memory = np.zeros(64, np.uint32)
    regions = [(one.__array_interface__["data"][0], one.nbytes) for one in (memory, words)]
    maps = {64: TensorMap(regions[not own][0], (3, 20), 64, (4, 16), 2, 1)}
    code = Code(parse(KERNEL.replace("BODY", body.replace("CORNER", str(corner)))))
    Launch(code, range(1), [regions[0][0]], Global(regions), 256, maps=maps, **settings).run()
    return memory


@pytest.mark.parametrize("corner", [0, 8, 16, -8])
@pytest.mark.parametrize("seed", range(2))
def test_a_tile_arrives_with_zeros_outside_its_matrix(corner, seed):
    words = np.zeros((4, 8), np.uint32)
    columns = corner // 2 + np.arange(8)
    inside = (columns >= 0) & (columns < 10)
    words[1:, inside] = (np.arange(48).reshape(3, 16) + 1)[:, columns[inside]]
    # the two units of 16 bytes of a row change places every 128 bytes: not within these
    np.testing.assert_array_equal(copied(corner=corner, seed=seed, orders=2), [*words.ravel()] * 2)


@pytest.mark.parametrize(
    ("old", "new", "problem"),
    [
        ("bar.sync \t0;", "", "race: reads shared memory"),
        ("[128], 128;", "[128], 112;", "mbarrier: copies bring 128 bytes where 112 are expected"),
        ("[128], 128;", "[128], 144;", "livelock: all warps wait, for an mbarrier"),
        ("[128], 1;", "[128], 2;", "livelock: all warps wait"),
        ("@%p1 mbarrier.arrive", "mbarrier.arrive", "mbarrier: more than 1 arrivals in a phase"),
        ("[128], 0;", "[128], 1;", "reads shared memory while a copy into it is under way"),
        ("%rd4, 64", "%rd4, 63", "no tensor map is at 0x3f"),
        ("bytes [0]", "bytes [64]", "misaligned shared address 0x40, for 128 bytes"),
        ("bytes [0]", "bytes [1024]", "is outside the 256 bytes"),
        ("_, [128]", "_, [136]", "no mbarrier was initialised at the shared address 0x88"),
    ],
)
def test_a_broken_rule_of_mbarriers_and_tiles_stops_the_kernel(old, new, problem):
    assert TILE.count(old) == 1
    with pytest.raises(Fault) as raised:
        copied(TILE.replace(old, new))
    assert problem in raised.value.problem


@pytest.mark.parametrize(
    ("store", "fence", "problem"),
    [
        ("st.global.b32 [ %rd2 + 0 ], { %r1 };", ".global", "a copy of tensors reads global memory that was written"),
        (
            "@%p3 st.shared.b32 [%r3], %r1;",
            ".shared::cta",
            "a copy of tensors overwrites shared memory that was written",
        ),
    ],
)
def test_a_copy_of_tensors_comes_after_a_fence_of_the_proxy(store, fence, problem):
    """A warp has fenced its own stores, or after a barrier those of the others."""
    before = f"and.b32 %r3, %r2, 124;\nsetp.ge.u32 %p3, %r1, 32;\n{store}\n"
    fenced = f"fence.proxy.async{fence};\n"
    # words 0, 16 and 32 begin the rows of the matrix
    tile = [*[0] * 8, *range(8), *range(16, 24), *range(32, 40)]
    for order in (fenced + "bar.sync 0;\n", "bar.sync 0;\n" + fenced):
        assert copied(before + order + TILE, own=True).tolist() == (tile if "global" in store else [0] * 32) * 2
    with pytest.raises(Fault, match=problem):
        copied(before + "bar.sync 0;\n" + TILE, own=True)


@pytest.mark.parametrize("broken", [{"base": 8}, {"pitch": 40}, {"box": (4, 32)}, {"box": (257, 16)}, {"box": (4, 4)}])
def test_the_driver_refuses_some_tensor_maps(broken):
    given = {"base": 64, "shape": (3, 20), "pitch": 64, "box": (4, 16), "size": 2, "swizzle": 1}
    TensorMap(**given)
    with pytest.raises(Problem, match="the driver refuses"):
        TensorMap(**given | broken)
