"""Facts from "PTX ISA" about single instructions."""

import numpy as np
import pytest
from emulator.opcodes import TYPES, arithmetic
from emulator.warpgroup import addresses_of

INF, NAN = np.inf, np.nan


@pytest.mark.parametrize(
    ("name", "sources", "result"),
    [
        ("div.s32", ([-7, 7, -7], [2, -2, -2]), [-3, -3, 3]),
        ("rem.s64", ([-7, 7, -7], [2, -2, -2]), [-1, 1, -1]),
        ("shl.b32", ([1, 1, 1], [31, 32, 99]), [1 << 31, 0, 0]),
        ("shr.u32", ([1 << 31] * 2, [31, 32]), [1, 0]),
        ("shr.s32", ([-8, -8, 8], [1, 40, 40]), [-4, -1, 0]),
        ("bfe.u32", ([0xABCD1234] * 3, [8, 28, 4], [8, 8, 0]), [0x12, 0xA, 0]),
        ("bfe.s32", ([0xF0, 0x70], [4, 4], [4, 4]), [-1, 7]),
        ("prmt.b32", ([0x33221100] * 3, [0x776655F4] * 3, [0x3210, 0x7531, 0xC0]), [0x33221100, 0x77553311, 0xFF00]),
        ("mul.hi.u32", ([1 << 31], [6]), [3]),
        ("mul.wide.s32", ([-(1 << 31)], [2]), [-(1 << 32)]),
        ("mad.wide.u32", ([1 << 31], [2], [5]), [(1 << 32) + 5]),
        ("max.f32", ([NAN, 1.0, -0.0], [2.0, NAN, -1.0]), [2.0, 1.0, -0.0]),
        ("max.NaN.f32", ([NAN, 1.0, -0.0], [2.0, NAN, -1.0]), [NAN, NAN, -0.0]),
        ("setp.ne.f32", ([NAN, 1.0, 1.0], [1.0, 1.0, 2.0]), [False, False, True]),
        ("setp.neu.f32", ([NAN, 1.0, 1.0], [1.0, 1.0, 2.0]), [True, False, True]),
        ("setp.leu.f64", ([NAN, 2.0], [1.0, 1.0]), [True, False]),
        ("cvt.rzi.s32.f64", ([-1.9, 3e9, NAN, -INF],), [-1, 2**31 - 1, 0, -(2**31)]),
        ("cvt.rmi.f32.f32", ([-1.5, 2.75, -INF],), [-2.0, 2.0, -INF]),
        ("cvt.rmi.ftz.f32.f32", ([-1.5, -(2.0**-140)],), [-2.0, 0.0]),
        ("cvt.s64.s32", ([-1],), [-1]),
        ("cvt.u64.u32", ([0xFFFFFFFF],), [0xFFFFFFFF]),
        # halves of the last bit: to even, and for TF32 away from zero
        ("cvt.rn.bf16.f32", ([1.0 + 2**-8, 1.0 + 3 * 2**-8, NAN],), [0x3F80, 0x3F82, 0x7FFF]),
        ("cvt.rna.tf32.f32", ([1.0 + 2**-11, -1.0 - 2**-11],), [0x3F802000, 0xBF802000]),
        ("cvt.rn.bf16x2.f32", ([1.0], [2.0]), [0x3F804000]),
        ("fma.rn.f32", ([1.0 + 2**-23], [1.0 - 2**-23], [-1.0]), [-(2.0**-46)]),
        ("fma.rn.ftz.f32", ([2.0**-100], [2.0**-40], [0.0]), [0.0]),
        ("popc.b32", ([0xFF00FF],), [16]),
        # of sm_100: a bfloat16 and a float32; pairs of float32
        ("add.rn.f32.bf16", ([0x3F80], [0.5]), [1.5]),
        # 1 * 2 + 1, and the tie of 1 + 2**-8 in the high half
        ("fma.rn.bf16", ([0x3F80], [0x4000], [0x3F80]), [0x4040]),
        ("fma.rn.bf16x2", ([0x3F803F80], [0x3F804000], [0x3B803F80]), [0x3F804040]),
        ("cvt.f64.bf16", ([0x3F80, 0xC040],), [1.0, -3.0]),
        # halves do not carry into one another
        ("add.s16x2", ([0xFFFFFFFF, 0x0001FFFF], [0x00010001, 0x00010001]), [0, 0x00020000]),
        ("mul.f32x2", ([0x40000000_3F800000], [0x40000000_40400000]), [0x40800000_40400000]),
    ],
)
def test_an_instruction_computes(name, sources, result):
    kinds, function = arithmetic(name)
    given = []
    for place, values in enumerate(sources):
        kind = np.dtype(TYPES[kinds[min(place, len(kinds) - 1)]])
        whole = kind.kind in "iu"
        given.append(np.array([v & (1 << 8 * kind.itemsize) - 1 for v in values], f"u{kind.itemsize}").view(kind)
                     if whole else np.array(values, kind))  # fmt: skip
    with np.errstate(all="ignore"):
        found = function(*given)
    np.testing.assert_array_equal(found, np.array(result).astype(found.dtype))


@pytest.mark.parametrize(("mode", "span"), [(1, 128), (2, 64), (3, 32)])
def test_the_swizzle_moves_units_of_16_bytes_within_a_row(mode, span):
    descriptor = np.array([mode << 62 | (8 * span) // 16 << 32], np.uint64)
    rows, columns = np.arange(16)[:, None], np.arange(span // 2)
    found = addresses_of(descriptor, rows, columns, False, 2)
    plain = rows * span + columns * 2
    assert sorted(found.ravel()) == sorted(plain.ravel())
    np.testing.assert_array_equal(found // span, plain // span)
    # a row's units change places by the number of its 128 bytes
    np.testing.assert_array_equal((found ^ plain) >> 4, np.broadcast_to(plain >> 7 & span // 16 - 1, found.shape))
