"""Read from compiled code, without a GPU, how many registers and how much memory a kernel takes, its loops, and three
faults: a tensor-core product that reads shared memory too early, a function that holds shared memory while it calls
another, and on AMD a ticket that is taken before the program's stores have arrived.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import kernel_loops
import kernel_waits
import triton

# Instructions of tensor cores: mma.sync, wgmma, tcgen05, and AMD's matrix cores. Of several kinds the newest is named.
NVIDIA_PRODUCTS = ("UTCHMMA", "UTCQMMA", "HGMMA", "HMMA")
MFMA = re.compile(r"^\s*v_mfma_", re.MULTILINE)
OPERATION = re.compile(r"^[ \t]*+(?:/\*[0-9a-f]+\*/)?[ \t]*+(?:@!?U?P\w+\s+)?([A-Z][A-Za-z0-9_.]*)", re.MULTILINE)
USAGE = re.compile(r"REG:(\d+) STACK:(\d+) SHARED:(\d+)")
# wgmma and tcgen05 read shared memory through the asynchronous proxy; cp.async writes it through the generic one (PTX
# ISA, "Proxies"). Between the wait for the copies and the product a fence must make the writes visible.
PROXIES = re.compile(
    r"(?P<wait>cp\.async\.wait_(?:group|all))|(?P<fence>fence\.proxy\.async)|(?P<product>"
    r"(?:wgmma\.mma_async|tcgen05\.mma)\b)"
)
FUNCTION = re.compile(r"^\s*tt\.func ", re.MULTILINE)
# Lines of AMD's assembly: a label, or an instruction with its operands.
AMD_LINE = re.compile(r"^(?:(?P<label>[.\w]+):|[ \t]*+(?P<name>[a-z]\w+)[ \t]*(?P<operands>[^;\n]*))", re.MULTILINE)
AMD_STORE = re.compile(r"(?:buffer|global|flat)_store_")
AMD_ATOMIC = re.compile(r"(?:buffer|global|flat)_atomic_")


@dataclass(frozen=True)
class Resources:
    """A kernel's ``registers`` and bytes of ``stack`` for each thread, and bytes of shared memory for each program.

    ``spills`` counts the instructions that store to or load from local memory; on AMD the vector registers kept there.
    (AMD keeps scalar registers in lanes of vector registers, which takes no memory.) ``tensor_core`` is the tensor-core
    instruction, or "".

    Faults: ``unfenced`` counts the waits for copies that a product follows without a fence. ``shared_callers`` counts
    the functions that hold shared memory and call others; Triton places that of all functions at one address.
    ``undrained`` counts AMD's atomics that a wave can reach while stores of other waves are on their way.

    ``loops``: see ``kernel_loops``; none on AMD. ``waits``: see ``kernel_waits``; on sm_90 alone.
    """

    registers: int
    stack: int
    spills: int
    shared_static: int
    shared_dynamic: int
    tensor_core: str
    unfenced: int = 0
    shared_callers: int = 0
    undrained: int = 0
    loops: kernel_loops.Loops = field(default_factory=dict)
    waits: kernel_waits.Waits = field(default_factory=dict)


FAULTS = ("unfenced", "shared_callers", "undrained")


def of(asm: Mapping[str, Any], shared: int, target: str, warps: int) -> Resources:
    """Return the resources of a kernel of ``warps`` compiled for ``target``; ``shared`` is Triton's own count of the
    dynamic shared memory."""
    code = asm.get("amdgcn", "")
    if code and "tt.atomic_rmw" in asm["ttgir"] and not AMD_ATOMIC.search(code):
        raise ValueError("the kernel takes a ticket, and no atomic is found in its assembly")
    found = _nvidia(asm["cubin"], shared, target, warps) if "cubin" in asm else _amd(code, shared)
    return replace(
        found,
        unfenced=unfenced(asm.get("ptx", "")),
        shared_callers=shared_callers(asm["ttgir"]),
        undrained=undrained(code),
    )


def unfenced(ptx: str) -> int:
    """Return the number of waits for asynchronous copies with a product after them and no fence in between."""
    found, waited = 0, False
    for match in PROXIES.finditer(ptx):
        if match.lastgroup == "product":
            found += waited
        waited = match.lastgroup == "wait"
    return found


def shared_callers(ttgir: str) -> int:
    """Return the number of functions in Triton's GPU code that allocate shared memory and call a function."""
    return sum("ttg.local_alloc" in body and "tt.call @" in body for body in FUNCTION.split(ttgir))


def undrained(code: str) -> int:
    """Return the number of atomics in AMD's assembly that a store may not precede, on some path through the code.

    Memory has the stores of a wave after its ``s_waitcnt vmcnt(0)``, and those of all waves after the next barrier. A
    wait after the barrier is that of the wave with the atomic, and does not help the others.
    """
    lines = list(AMD_LINE.finditer(code))
    labels = {match["label"]: place for place, match in enumerate(lines) if match["label"]}
    # For each line, the states of the paths there: some store is on its way, and no drained barrier was after it.
    states: list[set[tuple[bool, bool]]] = [set() for _ in lines]
    work = [(place, (False, False)) for label, place in labels.items() if not label.startswith(".L")]
    while work:
        place, state = work.pop()
        if place == len(lines) or state in states[place]:
            continue
        states[place].add(state)
        name, operands = lines[place]["name"] or "", (lines[place]["operands"] or "").strip()
        on_its_way, unordered = state
        if AMD_STORE.match(name):
            on_its_way = unordered = True
        elif name == "s_waitcnt" and "vmcnt(0)" in operands:
            on_its_way = False
        elif name == "s_barrier":
            unordered = on_its_way
        if operands in labels:
            work.append((labels[operands], (on_its_way, unordered)))
        if name not in ("s_branch", "s_endpgm"):
            work.append((place + 1, (on_its_way, unordered)))
    atomics = (place for place, match in enumerate(lines) if AMD_ATOMIC.match(match["name"] or ""))
    return sum(any(unordered for _, unordered in states[place]) for place in atomics)


def disassembly(cubin: bytes) -> tuple[str, str]:
    """Return the resource report and the instructions (SASS) of a cubin, by the tools that come with Triton."""
    folder = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = _output(folder / "cuobjdump", "-res-usage", file.name)
        # without the analysis of data flow, which takes time and is not used
        return usage, _output(folder / "nvdisasm", "-c", "-ndf", "-g", "-hex", file.name)


def _output(*command: str | Path) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def operations(code: str) -> list[str]:
    """Return the names of the instructions in SASS, with their modifiers."""
    return OPERATION.findall(code)


def _nvidia(cubin: bytes, shared: int, target: str, warps: int) -> Resources:
    usage, code = disassembly(cubin)
    found = USAGE.search(usage)
    if found is None:
        raise ValueError(f"cuobjdump -res-usage says nothing of registers: {usage!r}")
    registers, stack, static = (int(number) for number in found.groups())
    names = operations(code)
    plain = {name.split(".")[0] for name in names}
    local = sum(name.split(".")[0] in ("STL", "LDL") for name in names)
    product = next((name for name in NVIDIA_PRODUCTS if name in plain), "")
    passes = kernel_loops.passes(code)
    waits = kernel_waits.read(passes, warps) if target == kernel_waits.TARGET else {}
    return Resources(
        registers, stack, local, static, shared, product, loops=kernel_loops.read(passes), waits=waits
    )  # fmt: skip


def _amd(code: str, shared: int) -> Resources:
    def number(name: str) -> int:
        found = re.search(rf"^\s*\.{name}:\s*(\d+)", code, re.MULTILINE)
        if found is None:
            raise ValueError(f"the metadata of the kernel has no .{name}")
        return int(found.group(1))

    return Resources(
        number("vgpr_count"),
        number("private_segment_fixed_size"),
        number("vgpr_spill_count"),
        0,
        shared,
        "MFMA" if MFMA.search(code) else "",
    )
