"""Read the loops of a kernel from its disassembly, without a GPU: instructions and stall cycles of one pass.

ptxas writes into every instruction for NVIDIA the cycles that its warp waits before the next one (bits 105 to 108 of
128). Their sum along the shortest way through a loop is a lower bound for one warp and one pass. It leaves out waits
for memory, for barriers and for asynchronous products. The line numbers of the disassembly name the source's loop.
"""

from __future__ import annotations

import ast
import functools
import heapq
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from fusemlp_kernels.triton import configs

# By name: instructions and stalls of a pass and, if more than one, the copies of the body that it holds.
Loops = dict[str, list[int]]
# The name of what is outside all loops, and of what the last program of a launch does after all others.
ONCE, LAST = "once", "last"
INSTRUCTION = re.compile(r"\s*/\*[0-9a-f]{4,}\*/\s+(?P<text>.*?)\s*;\s*/\* 0x[0-9a-f]{16} \*/")
CONTROL = re.compile(r"\s*/\* 0x(?P<word>[0-9a-f]{16}) \*/")
LABEL = re.compile(r"(?P<name>[.$\w]+):")
FUNCTION = re.compile(r"\s*\.type\s+(?P<name>\S+),@function")
SOURCE = re.compile(r'\s*//## File "(?P<file>[^"]+)", line (?P<line>\d+)')
PARTS = re.compile(r"(?P<guard>@\S+\s+)?(?P<name>[A-Z][A-Z0-9_]*)\S*\s*(?P<operands>[^`]*)(?:`\((?P<label>.+)\))?")
# Triton's name of a function that is not inlined.
TRITON_NAME = re.compile(r"_\$_(?P<name>\w+?)__[A-Zi]")
CONTROL_BITS, MOST_STALLS = 105 - 64, 15
# An unrolled loop has these as often for each copy of the body, and so has the code after it that does the rest.
REPEATED = ("LDG", "LDGSTS", "LDGDEPBAR", "LDS", "LDSM", "STS", "STG", "BAR", "HMMA", "HGMMA", "UTCHMMA")
# A loop of these alone waits for a barrier, and one that empties the L1 cache, but calls nothing, for other programs;
# its passes take no time of their own.
WAITING, ACQUIRE = {"SYNCS", "BRA"}, "CCTL"
# The statement that only the last program of a launch comes to: its file, function and text.
TICKET_RESET = ("clock.py", "is_last", "store(ticket")
TABLES = ("BRX", "BRXU")
LEAVES = ("EXIT", "RET")


@dataclass(frozen=True)
class Instruction:
    """``name`` without modifiers; the ``label`` it names; ``source`` is a file with a line. ``control``: the bits that
    ptxas writes for the warp's scheduler, from the stall cycles on."""

    name: str
    conditional: bool
    label: str
    control: int
    source: tuple[str, int] | None
    text: str

    @property
    def stalls(self) -> int:
        """The cycles that its warp waits before the next instruction."""
        return self.control & MOST_STALLS


@dataclass(frozen=True)
class Loop:
    """The blocks of a loop: its first, those that jump back to it, and all."""

    head: int
    ends: frozenset[int]
    body: frozenset[int]


def parsed(code: str) -> tuple[list[Instruction], dict[str, int], list[str]]:
    """Return the instructions of a disassembly (``nvdisasm -c -g -hex``), the labels' places, and the functions."""
    found: list[Instruction] = []
    labels: dict[str, int] = {}
    functions, text, source = [], "", None
    for line in code.splitlines():
        if match := INSTRUCTION.match(line):
            text = match["text"]
        elif match := CONTROL.match(line):
            parts = PARTS.match(text)
            if parts is None:
                raise ValueError(f"expected an instruction of the disassembly, got {text!r}")
            control = int(match["word"], 16) >> CONTROL_BITS
            conditional = bool(parts["guard"] or parts["operands"])
            found.append(Instruction(parts["name"], conditional, parts["label"] or "", control, source, text))
        elif match := SOURCE.match(line):
            source = match["file"], int(match["line"])
        elif match := FUNCTION.match(line):
            functions.append(match["name"])
        elif match := LABEL.match(line):
            labels[match["name"]] = len(found)
    return found, labels, functions


@functools.cache
def _statements(file: str) -> list[tuple[range, str]]:
    """Return the lines and the name of each loop in a file of the kernels, outer loops first. A function's loops after
    the first are numbered."""
    path = Path(configs.__file__).with_name(Path(file).name)
    if not file.endswith(f"{path.parent.parent.name}/{path.parent.name}/{path.name}") or not path.exists():
        return []
    found = []
    for function in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(function, ast.FunctionDef):
            loops = [node for node in ast.walk(function) if isinstance(node, ast.For)]
            loops = [node for node in loops if "static_range" not in ast.unparse(node.iter)]
            for number, node in enumerate(sorted(loops, key=lambda node: node.lineno), 1):
                name = function.name if number == 1 else f"{function.name} {number}"
                found.append((range(node.lineno, (node.end_lineno or node.lineno) + 1), name))
    return found


@functools.cache
def line_of(file: str, function: str, text: str) -> int:
    """Return the line of a function's last statement with this text, in a file of the kernels."""
    tree = ast.parse(Path(configs.__file__).with_name(file).read_text(encoding="utf-8"))
    (body,) = (node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == function)
    return [node.lineno for node in ast.walk(body) if isinstance(node, ast.Expr) and text in ast.unparse(node)][-1]


def comes_from(instruction: Instruction, file: str, function: str, text: str) -> bool:
    """Return whether an instruction is part of the last statement with this text in a function of the kernels."""
    source = instruction.source
    return source is not None and Path(source[0]).name == file and source[1] == line_of(file, function, text)


def _statement(instructions: Iterable[Instruction], taken: Iterable[str]) -> str | None:
    """Return the name of the source's loop that most of the instructions are in, except for those ``taken``."""
    names: Counter[str] = Counter()
    for one in instructions:
        if one.source is not None:
            inside = [name for lines, name in _statements(one.source[0]) if one.source[1] in lines]
            names.update(name for name in inside[-1:] if name not in taken)
    return names.most_common(1)[0][0] if names else None


class _Flow:
    """The blocks of a disassembly, the blocks that may follow each, and the cost of each function."""

    def __init__(self, code: str) -> None:
        self.instructions, self.labels, functions = parsed(code)
        jumps = [at + 1 for at, one in enumerate(self.instructions) if one.name in ("BRA", "CALL", *TABLES, *LEAVES)]
        size = len(self.instructions)
        self.starts = sorted({0, *self.labels.values(), *jumps} - {size})
        self.block_at = {start: block for block, start in enumerate(self.starts)}
        self.spans = [range(*pair) for pair in zip(self.starts, [*self.starts[1:], size], strict=True)]
        self.functions = sorted((self.labels[name], name) for name in functions)
        # The disassembly lacks the tables of jumps. A jump's targets come after it: labels that no instruction names.
        self.tables = [at for at, one in enumerate(self.instructions) if one.name in TABLES]
        known = {self.labels.get(one.label) for one in self.instructions} | {place for place, _ in self.functions}
        self.unnamed = sorted({*self.labels.values()} - known - {size})
        self.after = [self._after(block) for block in range(len(self.spans))]
        self.before: dict[int, list[int]] = defaultdict(list)
        for block, following in enumerate(self.after):
            for one in following:
                self.before[one].append(block)

    def function_of(self, place: int) -> tuple[int, str]:
        return max(one for one in self.functions if one[0] <= place)

    def _after(self, block: int) -> list[int]:
        last = self.spans[block][-1]
        one, found = self.instructions[last], []
        # ptxas also calls places inside a function
        if one.name in ("BRA", "CALL") and one.label in self.labels:
            found.append(self.labels[one.label])
        elif one.name in TABLES:
            following = next((at for at in self.tables if at > last), len(self.instructions))
            found += [at for at in self.unnamed if last < at < following]
        if one.name not in ("BRA", *TABLES, *LEAVES) or one.conditional:
            found.append(last + 1)
        own = self.function_of(last)
        return [self.block_at[at] for at in found if at in self.block_at and self.function_of(at) == own]

    def reached(self, start: int, without: int, after: Sequence[Sequence[int]] | dict[int, list[int]]) -> set[int]:
        """Return the blocks on the ways from ``start`` that avoid the block ``without``."""
        found, waiting = set(), [start] if start != without else []
        while waiting:
            block = waiting.pop()
            if block not in found:
                found.add(block)
                waiting += [one for one in after[block] if one != without]
        return found

    def loops(self) -> list[Loop]:
        """Return the natural loops, the innermost first: every way into the body leads through its first block."""
        ends: dict[int, set[int]] = defaultdict(set)
        for place, _ in self.functions:
            entry = self.block_at[place]
            for block in self.reached(entry, -1, self.after):
                for head in self.after[block]:
                    if head <= block and block not in self.reached(entry, head, self.after):
                        ends[head].add(block)
        found = []
        for head, last in ends.items():
            body = set().union({head}, *(self.reached(end, head, self.before) for end in last))
            found.append(Loop(head, frozenset(last), frozenset(body)))
        return sorted((loop for loop in found if not self.waits(loop)), key=lambda loop: len(loop.body))

    def waits(self, loop: Loop) -> bool:
        names = {self.instructions[at].name for block in loop.body for at in self.spans[block]}
        return names <= WAITING or (ACQUIRE in names and "CALL" not in names)

    def repeated(self, blocks: Iterable[int]) -> Counter[tuple[str, tuple[str, int] | None, int]]:
        """Count the instructions of ``REPEATED`` by name, line of the source, and function."""
        places = [place for block in blocks for place in self.spans[block]]
        inside = [(self.instructions[place], place) for place in places if self.instructions[place].name in REPEATED]
        return Counter((one.name, one.source, self.function_of(place)[0]) for one, place in inside)

    def copies(self, loops: Sequence[Loop]) -> list[int]:
        """Return the copies of the body that each loop holds: 1 for a loop with loops inside.

        A loop of n copies leaves up to n - 1 passes to the code after it: that has n - 1 copies, outside all loops.
        """
        looping = frozenset[int]().union(*(loop.body for loop in loops))
        rest = self.repeated(block for block in range(len(self.spans)) if block not in looping)
        heads = {loop.head for loop in loops}
        counts = [self.repeated(loop.body if len(heads & loop.body) == 1 else ()) for loop in loops]
        found = []
        for count in counts:
            # a function of the source may stand here several times
            once = {key: number - rest[key] / counts.count(count) for key, number in count.items()}
            ratios = {count[key] / number if number >= 1 else 1 for key, number in once.items()} or {1}
            ratio = min(ratios)
            found.append(int(ratio) if len(ratios) == 1 and ratio == int(ratio) else 1)
        return found

    def shortest(self, start: int, ends: Iterable[int], weights: Mapping[int, int]) -> list[int]:
        """Return the blocks of the way from the block ``start`` to the end of one of ``ends`` with the least sum of
        weights, those without a weight left out; [] if there is no way."""
        ends, came = set(ends), dict[int, int]()
        waiting = [(weights.get(start, 0), start, start)]
        while waiting:
            cost, block, before = heapq.heappop(waiting)
            if block in came:
                continue
            came[block] = before
            if block in ends:
                way = [block]
                while way[-1] != start:
                    way.append(came[way[-1]])
                return [one for one in reversed(way) if one in weights]
            for one in self.after[block]:
                heapq.heappush(waiting, (cost + weights.get(one, 0), one, block))
        return []


@dataclass(frozen=True)
class Pass:
    """A pass of a loop, or what is ``once``: the least ``instructions``, the least ``stalls`` and the instructions of
    that way, with those of called functions; the ``copies`` of the body. ``around``: the way of a program of the kernel
    that comes through the loop, without its passes."""

    instructions: int
    stalls: int
    way: Sequence[Instruction]
    copies: int = 1
    around: Sequence[Instruction] = ()


def passes(code: str) -> dict[str, Pass]:
    """Return the passes of a kernel's loops by name, the worst where several have one name, what is ``once``, and what
    the ``last`` program does.

    A loop in a function that is not inlined has that function's name before its own. A pass does not count the passes
    of loops inside; it counts the calls of functions. A pass of the kernel's loop that calls one of several functions
    has the name of that function, with ().
    """
    flow = _Flow(code)
    loops = flow.loops()
    copies = flow.copies(loops)
    innermost = {block: at for at in reversed(range(len(loops))) for block in loops[at].body}
    names = {name for _, name in flow.functions}
    costs: dict[str, Pass] = {}

    def pass_of(start: int, ends: Iterable[int], blocks: Iterable[int], copies: int = 1) -> Pass:
        spans = {block: [flow.instructions[at] for at in flow.spans[block]] for block in blocks}
        called = {
            block: [once(one.label) for one in inside if one.name == "CALL" and one.label in names]
            for block, inside in spans.items()
        }
        counts = {
            block: len(inside) + sum(one.instructions for one in called[block]) for block, inside in spans.items()
        }
        stalls = {block: sum(one.stalls for one in [*inside, *called[block]]) for block, inside in spans.items()}
        way = flow.shortest(start, ends, stalls)
        steps = [
            one for block in way for one in [*spans[block], *(step for each in called[block] for step in each.way)]
        ]
        least = sum(counts[block] for block in flow.shortest(start, ends, counts))
        return Pass(least, sum(stalls[block] for block in way), steps, copies)

    def outside(function: str) -> tuple[int, list[int], list[int]]:
        entry = flow.block_at[flow.labels[function]]
        blocks = flow.reached(entry, -1, flow.after)
        leaving = [block for block in blocks if flow.instructions[flow.spans[block][-1]].name in LEAVES]
        return entry, leaving, [block for block in blocks if block not in innermost]

    def once(function: str) -> Pass:
        if function not in costs:
            costs[function] = pass_of(*outside(function))
        return costs[function]

    kernel = next(name for _, name in flow.functions if f".text.{name}" in flow.labels)
    found = {ONCE: once(kernel)}
    statements: dict[int, str] = {}
    for at, loop in enumerate(loops):
        own = [block for block in loop.body if innermost[block] == at]
        inside = [flow.instructions[place] for block in own for place in flow.spans[block]]
        name = _statement(inside, {name for inner, name in statements.items() if loops[inner].head in loop.body})
        if name is None:
            continue
        statements[at] = name
        place = flow.starts[loop.head]
        function = flow.function_of(place)[1]
        one_pass = pass_of(loop.head, loop.ends, own, copies[at])
        if function != kernel:
            match = TRITON_NAME.search(function)
            if match is None:
                continue
            name = name if name.split(" ")[0] == match["name"] else f"{match['name']}.{name}"
        else:
            entry, leaving, blocks = outside(kernel)
            before, after = pass_of(entry, [loop.head], blocks), pass_of(loop.head, leaving, blocks)
            around = [*before.way, *after.way]
            one_pass = replace(one_pass, around=around)
            called = {block: flow.instructions[flow.spans[block][-1]] for block in own}
            callers = {block: one.label for block, one in called.items() if one.name == "CALL" and one.label in names}
            for block, label in callers.items() if len(callers) > 1 else ():
                ahead = pass_of(loop.head, [block], own)
                rest = pass_of(block, loop.ends, [one for one in own if one != block])
                through = Pass(
                    ahead.instructions + rest.instructions, ahead.stalls + rest.stalls, [*ahead.way, *rest.way]
                )
                match = TRITON_NAME.search(label)
                if match is not None:
                    call = f"{match['name']}()"
                    through = replace(through, around=around)
                    found[call] = max(found.get(call, through), through, key=lambda one: one.stalls)
        found[name] = max(found.get(name, one_pass), one_pass, key=lambda one: one.stalls)
    entry, leaving, blocks = outside(kernel)
    for block in blocks:
        if any(comes_from(flow.instructions[at], *TICKET_RESET) for at in flow.spans[block]):
            found[LAST] = pass_of(block, leaving, blocks)
            break
    return found


def read(found: Mapping[str, Pass]) -> Loops:
    """Return the loops of ``passes`` as the record has them."""
    return {
        name: [one.instructions, one.stalls, *([one.copies] if one.copies > 1 else [])]
        for name, one in found.items()
        if name != LAST
    }
