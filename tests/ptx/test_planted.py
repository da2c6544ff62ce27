"""Bugs planted in the PTX of ``linear`` are found: deleted barriers and waits, wrong addresses and layouts.

Each is an edit of the compiled text, as a wrong compiler or a wrong kernel would give it.
"""

import re

import pytest
from cards import card
from emulator.faults import Fault
from test_kernels import layer_case, layers_of


def without(pattern, number=0, count=1):
    """Delete instructions: those that fit the pattern, from this number on."""

    def edit(text):
        for found in list(re.finditer(pattern, text))[number : number + count][::-1]:
            text = text[: found.start()] + text[found.end() :]
        return text

    return edit


def instead(pattern, other):
    """Replace all that fits the pattern."""

    def edit(text):
        changed = re.sub(pattern, other, text)
        assert changed != text
        return changed

    return edit


def descriptor(swizzle, stride):
    """Return the constant part of a wgmma descriptor: bits 62 and 63, and from bit 32 on 16ths of the stride."""
    return str(swizzle << 62 | stride // 16 << 32)


BARRIER, WAIT, PRODUCTS = r"bar\.sync\s+0;", r"cp\.async\.wait_group\s+\d+;", r"wgmma\.wait_group\S+\s+\d+;"
STORE = r"(st\.global\.v4\.b32 \[ %rd\d+ \+) 0 \]"
COPY = r"(cp\.async\.cg\.shared\.global \[ %r\d+ \+) 0 \]"
MULTIPLY = r"(mma\.sync\S+ {[^}]*}, {) (%r\d+), (%r\d+),"
FAULTS = [
    ("sm_80 mma.sync", "fp32", without(BARRIER), "race: reads shared memory"),
    ("sm_80 mma.sync", "fp32", without(BARRIER, 1), "race: writes shared memory"),
    ("sm_80 mma.sync", "bf16", without(WAIT), "reads shared memory while a copy"),
    ("sm_80 mma.sync", "bf16", without(r"cp\.async\.commit_group;", 1), "reads shared memory while a copy"),
    ("sm_80 mma.sync", "bf16", instead(r"wait_group\s+\d", "wait_group 5"), "reads shared memory while a copy"),
    ("sm_80 mma.sync", "fp32", instead(STORE, r"\1 4 ]"), "misaligned global address"),
    ("sm_80 mma.sync", "fp32", instead(STORE, r"\1 33554432 ]"), "is outside the allocations"),
    ("sm_80 mma.sync", "bf16", instead(COPY, r"\1 8 ]"), "misaligned shared address"),
    ("sm_80 mma.sync", "bf16", instead(COPY, r"\1 262144 ]"), "shared address"),
    ("sm_90 wgmma", "bf16", without(BARRIER), "race: reads shared memory"),
    ("sm_90 wgmma", "bf16", without(PRODUCTS), "reads shared memory while a copy"),
]
CORNER = r"(cp\.async\.bulk\.tensor\S+ \[%r\d+\], \[%rd\d+, {)(%r\d+), (%r\d+)"
# These leave the rules and change the results: elements are out of the bound.
WRONG = [
    ("sm_80 mma.sync", "bf16", instead(MULTIPLY, r"\1 \3, \2,")),
    # the last products: read before they are done
    ("sm_90 wgmma", "bf16", without(PRODUCTS, 1)),
    # eight rows are 1,024 bytes apart, and swizzled over 128
    ("sm_90 wgmma", "bf16", instead(descriptor(1, 1024), descriptor(1, 512))),
    ("sm_90 wgmma", "bf16", instead(descriptor(1, 1024), descriptor(2, 1024))),
    ("sm_90 TMA", "bf16", instead(CORNER, r"\1\3, \2")),
    # the factors are overwritten before the product
    ("sm_90 TMA", "bf16", without(PRODUCTS)),
]


def run(path, precision, **settings):
    with card(path, precision, **settings) as emulator:
        case = layer_case(emulator.variant, True, 37, 290, 41, "relu", 0.0)
        layers_of.test_linear.of_case(case, by_row=False, short=0, counted=False, keep_z=False)


@pytest.mark.parametrize(("path", "precision", "edit", "problem"), FAULTS)
def test_a_broken_rule_is_reported_with_its_line(path, precision, edit, problem):
    with pytest.raises(Fault, match=problem) as raised:
        run(path, precision, edit=edit)
    assert re.match(r"linear_kernel at (linear|tiles|standard)\.py:\d+", str(raised.value.place))


@pytest.mark.parametrize("number", [3, 7])
def test_a_barrier_missing_from_the_sum_over_parts_of_a_reduction_is_reported(number):
    """These two lie between the stores of the parts' sums and the loads of another warp's. The resident kernel has the
    same sum."""
    with pytest.raises(Fault, match="race: reads shared memory") as raised:
        run("sm_90 mma.sync", "fp32", edit=without(BARRIER, number), processors=9)
    assert str(raised.value.place).startswith("linear_kernel at standard.py:")


@pytest.mark.parametrize(("path", "precision", "edit"), WRONG)
def test_a_wrong_layout_is_out_of_bound(path, precision, edit):
    with pytest.raises(AssertionError, match="elements out of bound"):
        run(path, precision, edit=edit)
