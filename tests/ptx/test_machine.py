"""The rules of the machine, on kernels of a few lines: each broken rule stops the kernel, with its place."""

from __future__ import annotations

import numpy as np
import pytest
from emulator.faults import Fault
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
    Launch(code, range(blocks), [region[0]], Global([region]), shared, **settings).run()
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
	ld.global.v2.b32 	{ %r7, %r8 }, [ %rd1 + 8 ];
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
