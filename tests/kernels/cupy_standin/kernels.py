"""``cupy.RawModule``: CUDA C from text, here compiled as C++."""

import functools
import itertools
import re

import numpy as np
from cuda_on_cpu.library import Library

from cupy_standin import streams
from cupy_standin.arrays import ndarray
from cupy_standin.memory import LIVE, Misuse

# CuPy always compiles with these options (cupy.cuda.compiler).
ADDED = ("-ftz=true",)
ARGUMENT = re.compile(
    r"__global__\s+void\s+(?:__launch_bounds__\s*\([^()]*\)\s*)?(\w+)\s*\(\s*const\s+(\w+)\s+\w+\s*\)"
)
STRUCT = re.compile(r"struct\s+(\w+)\s*\{(.*?)\n\};", re.DOTALL)
MEMBER = re.compile(r"(?:const\s+)?(\w[\w ]*?)(<[\w ]+>)?(\s*\*)?\s*\b(\w+);")
# The fields that follow a pointer in the backend's templates.
STRIDES = {"Vector": ("_step",), "Matrix": ("_row", "_col")}


def members(code):
    """Return, for each kernel with one structure, (name, kind) of its members, kinds as in the header."""
    bodies = {name: re.sub(r"//[^\n]*", "", body) for name, body in STRUCT.findall(code)}
    found = {}
    for kernel, struct in ARGUMENT.findall(code):
        found[kernel] = fields = []
        for kind, strided, star, name in MEMBER.findall(bodies[struct]):
            fields.append((name, "p" if star or strided else "f" if kind == "double" else "i"))
            fields += [(name + stride, "i") for stride in STRIDES.get(kind, ())]
    return found


_library = functools.cache(Library)
_launches = itertools.count(1)


class RawModule:
    """As CuPy's: compile a source at the first use of a kernel, once per source and options."""

    def __init__(self, code, *, options=()):
        if not isinstance(options, tuple):
            raise TypeError(f"options: CuPy takes a tuple, got {type(options).__name__}")
        self._code, self._options = code, (*options, *ADDED)

    def __getattr__(self, name):
        raise AttributeError(f"cupy.RawModule.{name}: the stand-in has no such name")

    def get_function(self, name):
        return Kernel(_library(self._code, self._options), name, members(self._code).get(name))


class Kernel:
    """A launchable kernel; its arguments are checked against the C parameters."""

    def __init__(self, library, name, fields):
        if name not in library.kernels:
            raise AttributeError(f"CUDA_ERROR_NOT_FOUND: there is no kernel {name!r}, only {sorted(library.kernels)}")
        self._library, self._name, self._fields = library, name, fields
        self._parameters = library.kernels[name].parameters

    def __call__(self, grid, block, args):
        if len(args) != len(self._parameters):
            raise Misuse(f"{self._name}: takes {len(self._parameters)} arguments, got {len(args)}")
        # Copy them now: a card also copies arguments at the launch.
        values = [self._value(*pair) for pair in zip(args, self._parameters, strict=True)]
        pointers = [p for arg in args for p in self._addresses(arg)]

        def run():
            for field, address in pointers:
                if address and not LIVE.holds(address):
                    raise Misuse(
                        f"{self._name}: {field} is at {address:#x}, which is not (any more) memory of the card"
                    )
            self._library.launch(self._name, grid, block, values, seed=next(_launches))

        streams.start(run)

    def _value(self, argument, parameter):
        """Return the bytes of an argument, in CuPy's type for it."""
        kind, size = parameter
        if isinstance(argument, ndarray):
            given, value = "p", np.int64(argument.data.ptr).tobytes()
        elif isinstance(argument, np.ndarray) and argument.size == 1 and argument.dtype.names:
            given, value = "s", argument.tobytes()
            self._check_structure(argument.dtype)
        elif isinstance(argument, (np.number, np.bool_, int, float)):
            number = np.asarray(argument)
            given, value = number.dtype.kind, number.tobytes()
        else:
            raise Misuse(f"{self._name}: the stand-in knows no argument of {type(argument).__name__}")
        if (given, len(value)) != (kind, size):
            raise Misuse(
                f"{self._name}: takes {size} bytes of kind {kind!r}, got {len(value)} of kind {given!r}: {argument!r}"
            )
        return value

    def _check_structure(self, dtype):
        given = [(name, dtype.fields[name][0].kind, dtype.fields[name][1]) for name in dtype.names]
        wanted = [(name, "f" if kind == "f" else "i", 8 * at) for at, (name, kind) in enumerate(self._fields or ())]
        if given != wanted:
            raise Misuse(f"{self._name}: its structure is {wanted}, got {given}")

    def _addresses(self, argument):
        if isinstance(argument, ndarray):
            return [("an array", argument.data.ptr)]
        if isinstance(argument, np.ndarray) and self._fields:
            return [(name, int(argument[name])) for name, kind in self._fields if kind == "p"]
        return []
