"""The order in which threads run: branches, calls, barriers, and the warps between two barriers.

The threads with the lowest instruction run until they come to the others, which wait there; so threads that a branch
has parted run together again. Between two barriers the warps of a block are dealt into ``orders`` parts, which run one
after another in an order that the seed decides. The blocks of a cooperative launch then run one after another too, each
until it waits for others in vain; when all wait, they change their order.
"""

from collections import namedtuple

import numpy as np

from .faults import Fault, Problem
from .instructions import step_of
from .parse import Vector
from .threads import WARP, Active, Threads, reader
from .warpgroup import OTHER, registers_of

# Places in the code of threads that do not run.
WAITS, ENDED = 1 << 60, 1 << 61
PART, LATE = 1 << 40, 1 << 50
# Rounds in which threads look in vain while nothing changes.
MOST_ROUNDS = 100
ENDS = ("bra", "brx", "ret", "exit", "call", "bar", "barrier")


# Steps without a branch, each with its index in the code. ``last`` is the branch that ends them, or a label that they
# run into (``falls``).
Block = namedtuple("Block", "steps last falls")


class Code:
    """A kernel's code as steps, built when they are first reached, for all its launches."""

    def __init__(self, module):
        self.module, self.blocks = module, {}
        self.leaders = set(module.labels.values())
        self.products = registers_of(module)
        self.proxies = bool(self.products or module.named("cp.async.bulk"))

    def block(self, place):
        """Return the block that begins at a place."""
        if place not in self.blocks:
            before = self.module.instruction(place - 1) if place else None
            steps = []
            if before is not None and before.modifiers[0] == "call":
                steps.append((place - 1, self._results(place - 1)))
            last, falls = place, False
            while not falls and not _ends(self.module.instruction(last)):
                steps.append((last, step_of(self.module.instruction(last), self.products)))
                last += 1
                falls = last in self.leaders
            self.blocks[place] = Block(steps, last, falls)
        return self.blocks[place]

    def callee(self, place):
        """Return the function of a call."""
        names = [operand for operand in self.module.instruction(place).operands if isinstance(operand, str)]
        return next(self.module.functions[name] for name in names if name in self.module.functions)

    def _results(self, place):
        """Return a step that copies the results of the call at ``place``."""
        here = self.module.function(place)
        # the function has stored them before it returned
        pairs = [
            (here.register(name.removeprefix("func_"), np.uint64), found)
            for name, found in self.callee(place).names.items()
            if name.startswith("func_retval")
        ]

        def run(active):
            for target, source in pairs:
                active.write(target, reader(source, "b64")(active.threads))

        return run


class Launch:
    """Runs ``blocks`` of a kernel. ``arguments`` are the values of its parameters, as unsigned integers; a tensor map's
    is its number in ``maps``. ``excused``: it lacks ``fence.proxy.async``."""

    def __init__(
        self, code, blocks, arguments, memory, shared_bytes,
        *, seed = 0, orders = 1, limit = 5_000_000, maps = None, excused = False, cooperative = False
    ):  # fmt: skip
        self.code, self.module, self.limit, module = code, code.module, limit, code.module
        self.threads = Threads(np.asarray(blocks), module.threads, memory, shared_bytes, code.proxies, seed)
        self.threads.shared.excused = excused
        self.threads.touched = np.full((len(code.products), self.threads.count // WARP), OTHER, np.int16)
        self.threads.maps = maps or {}
        self.blocks, self.per_block = len(blocks), module.threads // WARP
        self.random, self.orders = np.random.default_rng(seed), orders
        self.places = np.full(self.threads.count, module.entry.first, np.int64)
        self.parts = np.zeros(self.threads.count, np.int64)
        self.resume = np.zeros(self.threads.count, np.int64)
        self.returns = {name: np.zeros(self.threads.count, np.int64) for name in module.functions}
        self.done = self.at = self.rounds = self.progress = 0
        # blocks that run one after another
        self.turns, self.alternates = np.zeros(self.blocks, np.int64), cooperative and orders > 1
        self._take_turns()
        for parameter, value in zip(module.entry.parameters, arguments, strict=True):
            bits = np.array([value & (1 << 64) - 1], np.uint64)
            self.threads.registers[parameter.place] = bits.astype(parameter.kind)

    def run(self):
        """Run all threads to their end. Raises Fault."""
        try:
            with np.errstate(all="ignore"):
                while self._turn():
                    pass
        except Problem as problem:
            raise Fault(str(problem), self.module.instruction(self.at).place) from None

    def _deal(self, blocks):
        """Deal the warps of these blocks into parts anew."""
        if self.orders > 1:
            dealt = self.random.integers(0, self.orders, (len(blocks), self.per_block))
            dealt = (dealt + self.turns[blocks, None] * self.orders) * PART
            self.parts.reshape(self.blocks, self.per_block, WARP)[blocks] = dealt[:, :, None]

    def _take_turns(self):
        """Choose the order of the blocks anew."""
        if self.alternates:
            self.turns = self.random.permutation(self.blocks)
        self._deal(np.arange(self.blocks))

    def _turn(self):
        """Run the threads that are furthest behind; return whether any were left."""
        order = self.places + self.parts + LATE * self.threads.late
        first = order.min()
        if LATE <= first < WAITS:
            self._next_round()
            return True
        if first >= WAITS:
            if (self.places == WAITS).any():
                self.at = int(self.resume[self.places == WAITS][0]) - 1
                raise Problem("divergence at a barrier: some threads wait that others of the block never reach")
            return False
        self.threads.refused = False
        mask = order == first
        others = order[~mask]
        active = Active(self.threads, mask) if len(others) else self.threads.everyone
        before = int(others.min()) if len(others) else WAITS
        part, place = int(first) // PART * PART, int(first) % PART
        while place + part < before or not len(others):
            block = self._run_block(active, place)
            target = block.last if block.falls else self._leave(active, block.last)
            if isinstance(target, int) and target >= WAITS:
                return True
            if not isinstance(target, int) or self.threads.refused:
                self.places[active.index] = target
                return True
            place = target
        self.places[active.index] = place
        return True

    def _next_round(self):
        """Let the threads that wait look again, as all others have ended or come to a barrier."""
        before, self.progress = self.progress, self.threads.progress
        self.rounds = self.rounds + 1 if before == self.progress else 0
        if self.rounds > MOST_ROUNDS:
            raise Problem("livelock: all warps wait, for an mbarrier or a number in memory that does not change")
        self.threads.late[:] = False
        if self.alternates:
            self._take_turns()

    def _run_block(self, active, place):
        block = self.code.block(place)
        for self.at, step in block.steps:
            step(active)
        self.done += len(block.steps) + 1
        if self.done > self.limit:
            raise Problem(f"livelock: more than {self.limit} instructions")
        return block

    def _leave(self, active, place):
        """Return the place after a branch, call or barrier: one for all active threads, or one each."""
        instruction = self.module.instruction(place)
        kind = instruction.modifiers[0]
        self.at = place
        if kind == "bra":
            return self._branch(active, instruction, place)
        if instruction.guard is not None:
            raise NotImplementedError(f"the emulator has no {instruction.place.text!r}")
        if kind == "brx":
            table = np.array(self.module.tables[self.module.function(place).name, str(instruction.operands[1])])
            chosen = active.pick(reader(instruction.operands[0], "u32")(self.threads))
            if (chosen >= len(table)).any():
                raise Problem(f"branch to entry {int(chosen.max())} of a table of {len(table)}")
            return _same(table[chosen])
        if kind == "call":
            return self._call(active, instruction, place)
        if kind in ("ret", "exit"):
            function = self.module.function(place)
            if function.name == self.module.name:
                self.places[active.index] = ENDED
                return ENDED
            return _same(self.returns[function.name][active.index])
        return self._barrier(active, instruction, place)

    def _branch(self, active, instruction, place):
        target = self.module.labels[str(instruction.operands[0])]
        if instruction.guard is None:
            return target
        taken = active.pick(reader(instruction.guard, "pred")(self.threads)) ^ instruction.negated
        if taken.all():
            return target
        return np.where(taken, target, place + 1) if taken.any() else place + 1

    def _call(self, active, instruction, place):
        callee = self.code.callee(place)
        vectors = [operand for operand in instruction.operands if isinstance(operand, Vector)]
        given = vectors[-1].parts if callee.parameters else ()
        for parameter, argument in zip(callee.parameters, given, strict=True):
            active.write(parameter, reader(argument, "b64")(self.threads))
        self.returns[callee.name][active.index] = place + 1
        return callee.first

    def _barrier(self, active, instruction, place):
        """bar.sync 0: wait until all threads of the block are here."""
        if instruction.operands != (0,):
            raise NotImplementedError(f"the emulator has no {instruction.place.text!r}")
        active.warps  # noqa: B018 - raises for a warp in part
        self.places[active.index] = WAITS
        self.resume[active.index] = place + 1
        blocks = np.unique(self.threads.block[active.index])
        waiting = self.places.reshape(self.blocks, -1)[blocks] == WAITS
        if not (complete := waiting.all(axis=1)).any():
            return WAITS
        blocks = blocks[complete]
        resume = self.resume.reshape(self.blocks, -1)
        if (resume[blocks] != resume[blocks][:, :1]).any():
            raise Problem("divergence at a barrier: the block's threads wait at different ones")
        self.places.reshape(self.blocks, -1)[blocks] = resume[blocks]
        self.threads.pass_barrier(blocks)
        self._deal(blocks)
        return WAITS


def _ends(instruction):
    """Return whether a block of code ends with the instruction."""
    return instruction.modifiers[0] in ENDS and instruction.name != "bar.warp.sync"


def _same(places):
    """Return one number if all are equal."""
    return int(places[0]) if (places == places[0]).all() else places
