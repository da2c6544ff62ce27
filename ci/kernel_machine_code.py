"""Read from machine code, without a GPU, how many registers and how much memory a kernel takes."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton

# Instructions of tensor cores: mma.sync, wgmma, tcgen05, and AMD's matrix cores. Of several kinds the newest is named.
NVIDIA_PRODUCTS = ("UTCHMMA", "UTCQMMA", "HGMMA", "HMMA")
MFMA = re.compile(r"^\s*v_mfma_", re.MULTILINE)
OPERATION = re.compile(r"^\s*(?:/\*[0-9a-f]+\*/)?\s*(?:@!?U?P\w+\s+)?([A-Z][A-Za-z0-9_.]*)", re.MULTILINE)
USAGE = re.compile(r"REG:(\d+) STACK:(\d+) SHARED:(\d+)")


@dataclass(frozen=True)
class Resources:
    """A kernel's ``registers`` and bytes of ``stack`` for each thread, and bytes of shared memory for each program.

    ``spills`` counts the instructions that store to or load from local memory; on AMD the vector registers kept there.
    (AMD keeps scalar registers in lanes of vector registers, which takes no memory.) ``tensor_core`` is the tensor-core
    instruction, or "".
    """

    registers: int
    stack: int
    spills: int
    shared_static: int
    shared_dynamic: int
    tensor_core: str


def of(asm: Mapping[str, Any], shared: int) -> Resources:
    """Return the resources of a compiled kernel; ``shared`` is Triton's own count of the dynamic shared memory."""
    if "cubin" in asm:
        return _nvidia(asm["cubin"], shared)
    return _amd(asm["amdgcn"], shared)


def disassembly(cubin: bytes) -> tuple[str, str]:
    """Return the resource report and the instructions (SASS) of a cubin, by the tools that come with Triton."""
    folder = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = _output(folder / "cuobjdump", "-res-usage", file.name)
        # without the analysis of data flow, which takes time and is not used
        return usage, _output(folder / "nvdisasm", "-c", "-ndf", file.name)


def _output(*command: str | Path) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def operations(code: str) -> list[str]:
    """Return the names of the instructions in SASS, with their modifiers."""
    return OPERATION.findall(code)


def _nvidia(cubin: bytes, shared: int) -> Resources:
    usage, code = disassembly(cubin)
    found = USAGE.search(usage)
    if found is None:
        raise ValueError(f"cuobjdump -res-usage says nothing of registers: {usage!r}")
    registers, stack, static = (int(number) for number in found.groups())
    names = operations(code)
    plain = {name.split(".")[0] for name in names}
    local = sum(name.split(".")[0] in ("STL", "LDL") for name in names)
    product = next((name for name in NVIDIA_PRODUCTS if name in plain), "")
    return Resources(registers, stack, local, static, shared, product)


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
