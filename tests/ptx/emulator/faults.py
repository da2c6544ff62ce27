"""The errors of the emulator."""

from collections import namedtuple


class Place(namedtuple("Place", "kernel source text")):
    """An instruction in the kernel's PTX, and the line of Python it comes from."""

    def __str__(self):
        return f"{self.kernel} at {self.source}: {self.text}"


class Problem(Exception):
    """A broken rule of the machine, before its place in the kernel is known."""


class Fault(AssertionError):
    """The kernel broke a rule of the machine: an address outside its memory, a barrier that some threads never reach, a
    read of bytes that no thread has written, a race."""

    def __init__(self, problem, place):
        super().__init__(f"{problem}; {place}")
        self.problem, self.place = problem, place
