"""Follow a warp of sm_90 through its machine code, without a GPU: the cycles of a way with the waits for memory.

ptxas writes into an instruction whose time it does not know which of six scoreboards it sets, and into every
instruction which of them it waits for. So the order of a way gives the cycles of a warp that has its multiprocessor
alone: those that ptxas writes, those until loads from global memory arrive, and those until tensor cores have done what
the warp waits for. Left out are the waits on the chip, for shuffles, shared memory and the other warps of a program.
The time of a meeting of all programs is left out too, and added elsewhere: work between an arrival and the end of the
wait costs as much as it takes longer than that. It is a model, not measured.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from kernel_loops import LAST, ONCE, Instruction, Pass, comes_from

# By loop: the cycles of a pass, its bytes of shared memory in all warps, and the cycles of the way around the loop.
Waits = dict[str, list[int]]
TARGET, PROCESSORS = "sm_90", 132
# The clock at which the tensor cores of an H100 SXM5 have NVIDIA's 989 TFLOP/s, and what cuBLAS reaches of these.
CLOCK, SUSTAINED = 1.83e9, 800e12
# Cycles of a load from the L2 cache or beyond it: 260 and more (Luo et al., "Benchmarking and dissecting the Nvidia
# Hopper GPU architecture via microbenchmarking", 2024).
LOAD = 300
# Cycles of a meeting of all programs of a launch, 0.7 us; the barrier that begins an arrival, and the one after a wait.
MEETING = 0.7e-6 * CLOCK
ARRIVES, MET = (("resident_layers.py", function, "debug_barrier") for function in ("arrive", "wait"))
MEMORY = ("LDG", "LD", "ATOM", "ATOMG", "RED", "MEMBAR")
HGMMA = re.compile(r"HGMMA\.64x(?P<columns>\d+)x(?P<depth>\d+)\.\S+ R\d+, (?P<first>\w+)")
# The depth of a product in bytes.
DEPTH = 32
DEPENDENCE = re.compile(r"DEPBAR\.LE (?P<board>SB0|gsb0), 0x(?P<left>[0-9a-f]+)")
SET, WAITED = 5, 11
NO_BOARD, BOARDS = 7, 6
ADDRESS = re.compile(r"LDG\.\S+ R\d+, (?:desc\[UR\d+\])?\[(?P<base>R\d+)(?:\.64)?(?:\+(?P<offset>-?0x[0-9a-f]+))?\]")
WRITTEN = re.compile(r"(?:@!?U?P\d+ )?(?P<name>\S+) (?:U?P\w+, )*(?P<register>U?R\d+)\b(?:, (?P<source>.*))?")
# Writes of an argument of the kernel, or of another register.
COPIES = ("LDC", "ULDC", "MOV", "UMOV", "IMAD.MOV")
# Bytes of a line of the L1 cache, of a matrix that LDSM loads, and of a thread's access to shared memory by default.
LINE, MATRIX, WORD = 128, 128, 4
SIZE = re.compile(r"\.(8|16|64|128)\b")
# Passes after which each takes as long as the one before.
SETTLED = 8


class _Warp:
    """The time of a warp and of what it waits for; ``warps`` do the same beside each other."""

    def __init__(self, warps: int) -> None:
        self.warps, self.time = warps, 0.0
        self.boards = [0.0] * BOARDS
        # when the groups of copies and of products are done that the warp did not wait for
        self.groups: dict[str, list[float]] = {"SB0": [], "gsb0": []}
        self.copied, self.multiplied = 0.0, 0.0
        self.arrived = 0.0
        # what registers hold, by name, and when the lines of memory arrive that were loaded
        self.held: dict[str, str] = {}
        self.lines: dict[tuple[str, int], float] = {}

    def step(self, one: Instruction) -> None:
        waited = one.control >> WAITED
        self.time = max([self.time, *(at for board, at in enumerate(self.boards) if waited >> board & 1)])
        board = one.control >> SET & NO_BOARD
        if one.name == "LDGSTS":
            self.copied = self.time + LOAD
        elif one.name == "LDGDEPBAR":
            self.groups["SB0"].append(self.copied)
        elif one.name == "HGMMA":
            self.multiplied = max(self.time, self.multiplied) + _product_cycles(one) * self.warps / 4
            if "gsb0" in one.text:
                self.groups["gsb0"].append(self.multiplied)
        elif match := DEPENDENCE.search(one.text):
            group = self.groups[match["board"]]
            ended = len(group) - int(match["left"], 16)
            self.time = max([self.time, *group[: max(ended, 0)]])
            del group[: max(ended, 0)]
        elif board != NO_BOARD:
            self.boards[board] = max(self.boards[board], self.arrival(one))
        self.write(one)
        self.time += one.stalls
        if one.name == "BAR" and comes_from(one, *ARRIVES):
            self.arrived = self.time
        elif one.name == "BAR" and comes_from(one, *MET):
            self.meet()

    def meet(self) -> None:
        """Leave out the time of a meeting, which goes on for all that is under way, and forget the L1 cache."""
        self.time = max(self.arrived, self.time - MEETING)
        self.boards = [at - MEETING for at in self.boards]
        self.groups = {name: [at - MEETING for at in group] for name, group in self.groups.items()}
        self.copied, self.multiplied = self.copied - MEETING, self.multiplied - MEETING
        self.lines.clear()

    def arrival(self, one: Instruction) -> float:
        """Return when the result arrives: at once if it is on the chip, as a line that was loaded before."""
        if one.name not in MEMORY:
            return self.time
        match = ADDRESS.search(one.text)
        if match is None or "STRONG" in one.text:
            return self.time + LOAD
        base = self.held.get(match["base"], match["base"])
        return self.lines.setdefault((base, int(match["offset"] or "0", 16) // LINE), self.time + LOAD)

    def write(self, one: Instruction) -> None:
        """Note what a register holds now."""
        if one.name == "CCTL":
            self.lines.clear()
        if match := WRITTEN.match(one.text):
            register, source = match["register"], (match["source"] or "").removeprefix("RZ, RZ, ")
            copied = match["name"].startswith(COPIES)
            self.held[register] = self.held.get(source, source) if copied else f"{register} at {self.time}"


def _product_cycles(one: Instruction) -> float:
    """Return the cycles of the tensor cores for a product of four warps; of 32-bit numbers an operation takes two."""
    match = HGMMA.search(one.text)
    if match is None:
        raise ValueError(f"expected a product of 64 rows, got {one.text!r}")
    return 2 * 64 * int(match["columns"]) * DEPTH / 2 / (SUSTAINED / PROCESSORS / CLOCK)


def shared_bytes(one: Instruction) -> float:
    """Return the bytes that an instruction of a warp reads or writes in shared memory."""
    if match := HGMMA.search(one.text):
        rows = 64 if match["first"] == "gdesc" else 0
        return (rows + int(match["columns"])) * DEPTH / 4
    if match := re.search(r"LDSM\.16\.\w+\.(\d)", one.text):
        return MATRIX * int(match[1])
    if one.name in ("LDS", "STS", "LDSM", "LDGSTS", "ATOMS"):
        size = SIZE.search(one.text)
        return 32 * (int(size[1]) / 8 if size else WORD)
    return 0.0


def cycles(way: Sequence[Instruction], warps: int, passes: int = 1) -> int:
    """Return the cycles of a way, of the last of several passes."""
    warp, before = _Warp(warps), 0.0
    for _ in range(passes):
        # an arrival outside the way is just before it
        warp.arrived = before = warp.time
        for one in way:
            warp.step(one)
    return round(warp.time - before)


def read(found: Mapping[str, Pass], warps: int) -> Waits:
    """Return the waits of ``kernel_loops.passes`` in programs of this many warps."""
    return {
        name: [
            cycles(one.way, warps, 1 if name in (ONCE, LAST) else SETTLED),
            round(warps * sum(map(shared_bytes, one.way))),
            cycles(one.around, warps),
        ]
        for name, one in found.items()
    }
