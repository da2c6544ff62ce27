"""The order of memory between blocks and launches, on small kernels: what passes a value on, and what does not.

No kernel of ours has a barrier of the grid or a dependent launch yet; the small ones here have.
"""

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from emulator.driver import emulated
from emulator.faults import Fault
from test_machine import run
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

# Block 0 stores a word a thread from 64 on, and a flag at word 0; block 1 waits for the flag at word AT. Each block
# between them waits for one flag and sets the next.
MESSAGE = """
	mov.u32 	%r3, %ctaid.x;
	setp.eq.u32 	%p1, %r3, 0;
	setp.eq.u32 	%p2, %r1, 0;
	mov.b32 	%r5, 1;
	shl.b32 	%r4, %r3, 2;
	cvt.u64.u32 	%rd4, %r4;
	add.s64 	%rd5, %rd1, %rd4;
	@!%p1 bra 	WAIT;
	st.global.b32 	[ %rd2 + 256 ], { %r1 };
	BARRIER
	bra.uni 	SET;
WAIT:
	@!%p2 bra 	WAITED;
AGAIN:
	ACQUIRE
	setp.ne.b32 	%p3, %r6, 1;
	@%p3 bra 	AGAIN;
WAITED:
	BARRIER
	setp.ne.u32 	%p4, %r3, LAST;
	@%p4 bra 	SET;
	LOAD 	{ %r7 }, [ %rd2 + 256 ];
	st.global.b32 	[ %rd2 + 512 ], { %r7 };
	ret;
SET:
	@!%p2 bra 	END;
	RELEASE
END:
"""
FLAG, BEFORE = "[ %rd5 + 4 ], { %r5 };", "{ %r6 }, [ %rd5 + 0 ];"
RELEASES = {
    "st": f"st.release.gpu.global.b32 {FLAG}",
    "fence": f"fence.acq_rel.gpu;\nst.relaxed.gpu.global.b32 {FLAG}",
    "membar": f"membar.gl;\nst.volatile.global.b32 {FLAG}",
    "atom": "atom.release.sys.global.exch.b32 %r8, [ %rd5 + 4 ], %r5;",
    "red": "red.release.gpu.global.add.u32 [ %rd5 + 4 ], %r5;",
}
ACQUIRES = {
    "ld": f"ld.acquire.gpu.global.b32 {BEFORE}",
    "fence": f"ld.relaxed.gpu.global.b32 {BEFORE}\nfence.acq_rel.gpu;",
    "membar": f"ld.volatile.global.b32 {BEFORE}\nmembar.sys;",
    "cas": "atom.acquire.gpu.global.cas.b32 %r6, [ %rd5 + 0 ], %r5, %r5;",
}


def message(
    release=RELEASES["st"], acquire=ACQUIRES["ld"], barrier="bar.sync 0;", load="ld.global.cg.b32", blocks=2, seed=0
):
    body = MESSAGE.replace("RELEASE", release).replace("ACQUIRE", acquire).replace("BARRIER", barrier)
    body = body.replace("LOAD", load).replace("LAST", str(blocks - 1))
    return run(body, words=192, blocks=blocks, seed=seed, orders=2)[128:]


@pytest.mark.parametrize("acquire", ACQUIRES)
@pytest.mark.parametrize("release", RELEASES)
def test_what_a_block_releases_another_acquires(release, acquire):
    found = message(RELEASES[release], ACQUIRES[acquire])
    np.testing.assert_array_equal(found, np.arange(64))


@pytest.mark.parametrize("load", ["ld.global.cg.b32", "ld.volatile.global.b32", "ld.relaxed.gpu.global.b32"])
@pytest.mark.parametrize("seed", range(3))
def test_a_third_block_passes_on_what_it_has_acquired(seed, load):
    np.testing.assert_array_equal(message(blocks=3, seed=seed, load=load), np.arange(64))


FOREIGN = "race: reads global memory that another block has written"
RACES = {
    "relaxed release": ({"release": f"st.relaxed.gpu.global.b32 {FLAG}"}, FOREIGN),
    "fence after": ({"release": f"st.relaxed.gpu.global.b32 {FLAG}\nfence.acq_rel.gpu;"}, FOREIGN),
    "fence of a block": ({"release": f"fence.acq_rel.cta;\nst.relaxed.gpu.global.b32 {FLAG}"}, FOREIGN),
    "release to a block": ({"release": f"st.release.cta.global.b32 {FLAG}"}, FOREIGN),
    "plain flag": ({"release": f"st.global.b32 {FLAG}"}, FOREIGN),
    "relaxed acquire": ({"acquire": f"ld.relaxed.gpu.global.b32 {BEFORE}"}, FOREIGN),
    "acquire of a block": ({"acquire": f"ld.acquire.cta.global.b32 {BEFORE}"}, FOREIGN),
    "fence of an acquiring block": ({"acquire": f"ld.volatile.global.b32 {BEFORE}\nmembar.cta;"}, FOREIGN),
    "no barrier": ({"barrier": ""}, "race: (reads|writes) global memory that another block has"),
    "plain load": ({"load": "ld.global.b32"}, "reads by a plain load what another block has written in this launch"),
}


@pytest.mark.parametrize(("change", "problem"), RACES.values(), ids=RACES)
def test_a_message_that_is_not_passed_on_is_a_race(change, problem):
    with pytest.raises(Fault, match=problem):
        message(**change)


def test_a_store_after_the_release_is_not_released():
    late = RELEASES["st"] + "\nst.global.b32 	[ %rd2 + 256 ], { %r1 };"
    with pytest.raises(Fault, match=r"race: (reads|writes) global memory that another block has"):
        message(late)


def test_a_flag_that_does_not_come_is_a_livelock():
    with pytest.raises(Fault, match="livelock: all warps wait"):
        message("")


def test_a_write_after_reads_of_two_blocks_is_a_race_in_any_of_them():
    """Both blocks read a word, and one of them stores it, whichever read last."""
    body = """
	mov.u32 	%r3, %ctaid.x;
	setp.eq.u32 	%p1, %r3, WRITER;
	ld.global.b32 	{ %r4 }, [ %rd2 + 0 ];
	@%p1 st.global.b32 	[ %rd2 + 0 ], { %r1 };
"""
    for writer in "01":
        with pytest.raises(Fault, match="race: writes global memory that another block has read"):
            run(body.replace("WRITER", writer), blocks=2)


@triton.jit
def meet(count, target):
    """A barrier of all programs of the launch."""
    tl.debug_barrier()
    tl.atomic_add(count, 1, sem="release", scope="gpu")
    while tl.atomic_add(count, 0, sem="acquire", scope="gpu") < target:
        pass
    tl.debug_barrier()


@triton.jit
def rotate_kernel(values, count, programs, MEETS: tl.constexpr, BEFORE: tl.constexpr, CACHE: tl.constexpr):
    """Give each program's values to the program before it, three times."""
    at = tl.arange(0, 128)
    mine, next = tl.program_id(0) * 128, (tl.program_id(0) + 1) % programs * 128
    for turn in range(3):
        v = tl.load(values + next + at, cache_modifier=CACHE)
        if BEFORE:
            meet(count, (2 * turn + 1) * programs)
        tl.store(values + mine + at, v)
        if MEETS:
            meet(count, (2 * turn + 2) * programs)


PROGRAMS = 5


def rotated(seed=0, meets=True, before=True, cache=".cg"):
    with emulated("sm_90", seed=seed, orders=2):
        values = torch.arange(PROGRAMS).repeat_interleave(128).to(torch.int32)
        count = torch.zeros(1, dtype=torch.int32)
        rotate_kernel[(PROGRAMS,)](
            values, count, PROGRAMS, meets, before, cache, launch_cooperative_grid=True, enable_fp_fusion=False
        )
    return values.reshape(PROGRAMS, 128)


@pytest.mark.parametrize("seed", range(3))
def test_programs_meet_at_a_barrier_of_the_grid(seed):
    assert (rotated(seed) == (torch.arange(PROGRAMS)[:, None] + 3) % PROGRAMS).all()


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"before": False}, "race: writes global memory that another block has read"),
        # its arrivals are missing too, so that a block in front waits for ever
        ({"meets": False}, "race: |livelock: all warps wait"),
        ({"cache": ""}, "reads by a plain load what another block has written in this launch"),
    ],
)
def test_a_barrier_of_the_grid_that_is_missing_is_a_race(change, problem):
    with pytest.raises(Fault, match=problem) as raised:
        rotated(**change)
    assert str(raised.value.place).startswith("rotate_kernel at test_order.py:")


@triton.jit
def add_kernel(x, y, LETS: tl.constexpr, WAITS: tl.constexpr, OVER: tl.constexpr):
    """y = x + 1. It lets the next launch begin, LETS: before it waits, or after; OVER: it stores into y before."""
    at = tl.program_id(0) * 128 + tl.arange(0, 128)
    if LETS == "before":
        gdc_launch_dependents()
    if OVER:
        tl.store(y + at, at)
    if WAITS:
        gdc_wait()
    if LETS == "after":
        gdc_launch_dependents()
    tl.store(y + at, tl.load(x + at) + 1)


def added(*launches, dependent=True):
    """Launch for pairs of numbers of buffers with options; return the buffers."""
    with emulated("sm_90"):
        buffers = torch.zeros((4, 256), dtype=torch.int32)
        for (x, y), *options in launches:
            add_kernel[(2,)](buffers[x], buffers[y], *options, launch_pdl=dependent, enable_fp_fusion=False)
    return buffers[:, 0].tolist()


def test_a_dependent_launch_may_read_what_earlier_ones_write_when_it_has_waited():
    chain = ((0, 1), "before", True, False), ((1, 2), "after", True, False)
    assert added(*chain, ((2, 3), "no", True, False)) == [0, 1, 2, 3]
    # the second has waited for the first, which reads buffer 0, before the third begins
    assert added(*chain, ((3, 0), "no", True, True)) == [1, 1, 2, 0]
    # other launches begin when those before have ended
    assert added(((0, 1), "before", False, True), ((1, 2), "no", False, True), dependent=False) == [0, 1, 2, 0]


@pytest.mark.parametrize(
    ("launches", "problem"),
    [
        # gdc_wait is deleted
        ([((0, 1), "before", True, False), ((1, 2), "no", False, False)], "reads global memory that an earlier launch"),
        ([((0, 1), "no", True, False), ((1, 0), "no", True, True)], "writes global memory that an earlier"),
        ([((0, 1), "no", True, False), ((2, 3), "no", False, False)], "ends without griddepcontrol.wait"),
        # the second lets the third begin before it has itself waited for the first
        (
            [((0, 1), "before", True, False), ((1, 2), "before", True, False), ((3, 0), "no", True, True)],
            "writes global memory that an earlier launch touches",
        ),
    ],
)  # fmt: skip
def test_a_dependent_launch_that_does_not_wait_is_a_race(launches, problem):
    with pytest.raises(Fault, match=problem) as raised:
        added(*launches)
    assert str(raised.value.place).startswith("add_kernel at ")
