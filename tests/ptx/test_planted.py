"""Bugs planted in the PTX of kernels are found: deleted barriers, waits and fences, weaker atomic operations, wrong
addresses and layouts.

Each is an edit of the compiled text, as a wrong compiler or a wrong kernel would give it, in the code of a line or
function of the source.
"""

import inspect
import re
from pathlib import Path

import pytest
import triton.language as tl
from cards import card
from emulator.faults import Fault
from emulator.parse import FILE
from test_kernels import layer_case, layers_of, loss_case, losses_of

from fusemlp_kernels.triton import clock, linear, loss, tiles

LOCATION = re.compile(r"(^\t\.loc\t\d+ \d+.*\n)", re.MULTILINE)


def planted(functions, line, pattern, other=""):
    """Replace what fits the pattern in the code of those functions' lines that contain ``line``."""
    places = set()
    for function in functions:
        source, first = inspect.getsourcelines(function.fn)
        file = Path(inspect.getsourcefile(function.fn)).name
        places |= {(file, first + number) for number, text in enumerate(source) if line in text}

    def edit(text):
        files = {number: Path(path).name for number, path in FILE.findall(text)}
        parts, here = LOCATION.split(text), None
        for at in range(1, len(parts), 2):
            _, file, number, _ = parts[at].split(None, 3)
            # see ``parse``
            here = here if number == "0" else (files[file], int(number))
            if here in places:
                parts[at + 1] = re.sub(pattern, other, parts[at + 1])
        return "".join(parts)

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


TILE, PRODUCT, TICKET = [linear.affine_tile], [tiles.product], [clock.is_last]
X, W = "x_tile = tl.load(", "w_tile = tl.load("
BARRIER, WAIT = r"bar\.sync\s+0;", r"cp\.async\.wait_group\s+\d+;"
# The first barrier of a step stands after the wait for the copies; the second is the first of its stretch of code.
AFTER_COPIES, BEFORE_COPIES = rf"({WAIT}\s*){BARRIER}", rf"\A((?:(?!wait_group).)*?){BARRIER}"
PRODUCTS, FENCE, PROXY = r"wgmma\.wait_group\S+\s+\d+;", r"wgmma\.fence\S+;", r"fence\.proxy\.async\S*;"
STORE = r"(st\.global\.v4\.b32 \[ %rd\d+ \+) 0 \]"
COPY = r"(cp\.async\.cg\.shared\.global \[ %r\d+ \+) 0 \]"
MULTIPLY = r"(mma\.sync\S+ {[^}]*}, {) (%r\d+), (%r\d+),"
CHANGED = r"(?s)(wgmma\.mma_async\S+ {[^}]*}, {(%r\d+),.*?wgmma\.commit_group\S+;)"
UNFENCED = "wgmma reads shared memory that was written without fence.proxy.async since"
FAULTS = [
    ("sm_80 mma.sync", "fp32", planted(TILE, X, AFTER_COPIES, r"\1"), "race: reads shared memory"),
    ("sm_80 mma.sync", "fp32", planted(TILE, X, f"(?s:{BEFORE_COPIES})", r"\1"), "race: writes shared memory"),
    ("sm_80 mma.sync", "bf16", planted(TILE, X, WAIT), "reads shared memory while a copy"),
    ("sm_80 mma.sync", "bf16", planted(TILE, W, r"cp\.async\.commit_group;"), "reads shared memory while a copy"),
    ("sm_80 mma.sync", "bf16", instead(r"wait_group\s+\d", "wait_group 5"), "reads shared memory while a copy"),
    ("sm_80 mma.sync", "fp32", instead(STORE, r"\1 4 ]"), "misaligned global address"),
    ("sm_80 mma.sync", "fp32", instead(STORE, r"\1 33554432 ]"), "is outside the allocations"),
    ("sm_80 mma.sync", "bf16", instead(COPY, r"\1 8 ]"), "misaligned shared address"),
    ("sm_80 mma.sync", "bf16", instead(COPY, r"\1 262144 ]"), "shared address"),
    ("sm_90 wgmma", "bf16", planted(TILE, X, AFTER_COPIES, r"\1"), "race: reads shared memory"),
    ("sm_90 wgmma", "bf16", planted(PRODUCT, "", PRODUCTS), "reads shared memory while a copy"),
    ("sm_90 wgmma", "bf16", planted(PRODUCT, "", FENCE), "wgmma adds to a register that another instruction"),
    ("sm_90 wgmma", "fp32", planted(PRODUCT, "", FENCE), "wgmma (adds to|multiplies) a register that another"),
    # after the first group of products a register of a changes
    ("sm_90 wgmma", "fp32", instead(CHANGED, r"\1\n\tmov.b32 \2, 0;"), "a register that wgmma multiplies has changed"),
    ("sm_90 wgmma", "bf16", planted(PRODUCT, "", PROXY), UNFENCED),
    ("sm_90 wgmma", "fp32", planted(PRODUCT, "", PROXY), UNFENCED),
]
# The last program of a launch adds up what the others have stored.
ATOMIC, FOREIGN = "tl.atomic_add", "race: (reads|writes) global memory that another block has"
TICKETS = [
    (planted(TICKET, ATOMIC, r"\.acq_rel\.", ".relaxed."), FOREIGN),
    (planted(TICKET, ATOMIC, r"\.acq_rel\.", ".release."), FOREIGN),
    (planted(TICKET, ATOMIC, r"\.acq_rel\.", ".acquire."), FOREIGN),
    (planted(TICKET, ATOMIC, r"\.gpu\.acq_rel\.", ".cta.acq_rel."), FOREIGN),
    (
        planted([loss.sums_of_all], "tl.load", r"ld\.global\.cg\.", "ld.global."),
        "reads by a plain load what another block",
    ),
]
CORNER = r"(cp\.async\.bulk\.tensor\S+ \[%r\d+\], \[%rd\d+, {)(%r\d+), (%r\d+)"
# These leave the rules and change the results: elements are out of the bound.
WRONG = [
    ("sm_80 mma.sync", "bf16", instead(MULTIPLY, r"\1 \3, \2,")),
    # the last products: read before they are done
    ("sm_90 wgmma", "bf16", planted(TILE, "", PRODUCTS)),
    # eight rows are 1,024 bytes apart, and swizzled over 128
    ("sm_90 wgmma", "bf16", instead(descriptor(1, 1024), descriptor(1, 512))),
    ("sm_90 wgmma", "bf16", instead(descriptor(1, 1024), descriptor(2, 1024))),
    ("sm_90 TMA", "bf16", instead(CORNER, r"\1\3, \2")),
    # the factors are overwritten before the product
    ("sm_90 TMA", "bf16", planted(PRODUCT, "", PRODUCTS)),
]


def run(path, precision, **settings):
    with card(path, precision, **settings) as emulator:
        case = layer_case(emulator.variant, True, 37, 290, 41, "relu", 0.0)
        layers_of.test_linear.of_case(case, by_row=False, short=0, counted=False, keep_z=False)


@pytest.mark.parametrize(("path", "precision", "edit", "problem"), FAULTS)
def test_a_broken_rule_is_reported_with_its_line(path, precision, edit, problem):
    with pytest.raises(Fault, match=problem) as raised:
        run(path, precision, edit=edit, **({"unfenced": ()} if problem is UNFENCED else {}))
    assert re.match(r"linear_kernel at (linear|tiles|standard)\.py:\d+", str(raised.value.place))


@pytest.mark.parametrize(("edit", "problem"), TICKETS)
@pytest.mark.parametrize("target", ["sm_80", "sm_90"])
def test_a_weaker_ticket_or_load_is_reported(target, edit, problem):
    with pytest.raises(Fault, match=problem) as raised, card(target, "fp32", edit=edit) as emulator:
        losses_of.test_loss_grad.of_case(loss_case(emulator.variant, True, "huber", 300))
    assert str(raised.value.place).startswith(("loss_grad_kernel at clock.py:", "loss_grad_kernel at loss.py:"))


def test_a_barrier_missing_from_the_sum_over_parts_of_a_reduction_is_reported():
    """It lies between the stores of the parts' sums and the loads of another warp's. The resident kernel has the same
    sum."""
    edit = planted([tl.sum], "", rf"(st\.shared\S+\s[^\n]*\n(?:\s*//[^\n]*\n)*\s*){BARRIER}", r"\1")
    with pytest.raises(Fault, match="race: reads shared memory") as raised:
        run("sm_90 mma.sync", "fp32", edit=edit, processors=9)
    assert str(raised.value.place).startswith("linear_kernel at standard.py:")


@pytest.mark.parametrize(("path", "precision", "edit"), WRONG)
def test_a_wrong_layout_is_out_of_bound(path, precision, edit):
    with pytest.raises(AssertionError, match="elements out of bound"):
        run(path, precision, edit=edit)
