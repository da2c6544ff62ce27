"""Compile CUDA C as C++ for this machine and call it through ctypes: the results of kernels without a GPU.

``build`` includes ``cuda_on_cpu.h`` before a source and compiles both with the system's C++ compiler, else with
``ziglang`` from the test extra. ``build/cuda_on_cpu`` caches a library by the hash of its inputs. ``Library`` lists its
kernels and launches them. The header describes the limits of this method.
"""

import contextlib
import ctypes
import functools
import hashlib
import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections import namedtuple
from pathlib import Path

HERE = Path(__file__).parent
CACHE = Path(__file__).resolve().parents[3] / "build/cuda_on_cpu"
# No fast-math: the tests depend on NaN, infinities and the order of sums. No contraction: NVRTC fuses a * b + c freely,
# this compiler only if the machine has the instruction. Unfused, the sums round more often, and equally on every
# machine. A call of fmaf is fused everywhere.
FLAGS = (
    "-std=c++17", "-O2", "-fPIC", "-fvisibility=hidden", "-ffp-contract=off", "-fno-strict-aliasing",
    "-fno-exceptions", "-fno-rtti", "-Wall", "-Wextra", "-Wno-unused-parameter", "-Wno-unknown-pragmas", "-Werror",
)  # fmt: skip
# A GPU stops at a misaligned address, but not at indices outside an array or at excessive shifts.
CHECKS = (
    "-fsanitize=alignment,bounds,shift-exponent,integer-divide-by-zero", "-fno-sanitize-recover=all",
)  # fmt: skip
RUNTIME = ("fibers.cpp", "checks.cpp")
KERNEL = re.compile(
    r'extern\s+"C"\s+__global__\s+void\s+(?:__launch_bounds__\s*\((?P<most>[^()]*)\)\s*)?(?P<name>\w+)\s*\('
)
# Flush subnormal numbers to zero while a kernel runs.
FLUSHES = "-ftz=true"
ORDERS = {"forward": 0, "backward": 1, "shuffled": 2}


class KernelFault(AssertionError):
    """A kernel broke a rule of CUDA: a barrier that some threads never reach, a shuffle from an absent lane, a
    misaligned address, an index outside its array."""


@functools.cache
def compiler():
    """Return the command of a C++ compiler: $CXX, g++ or clang++, or that of the ziglang package."""
    named = os.environ.get("CXX")
    if named:
        return tuple(shlex.split(named))
    for name in ("g++", "clang++", "c++"):
        if path := shutil.which(name):
            return (path,)
    if importlib.util.find_spec("ziglang"):
        return (sys.executable, "-m", "ziglang", "c++")
    raise RuntimeError(
        "the kernels of the cupy backend are tested as C++, for which there is no compiler here: "
        "install g++ or clang++, or `pip install ziglang`, or name one in CXX"
    )


@functools.cache
def _version():
    return _run([*compiler(), "--version"])


def _run(command):
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode:
        raise RuntimeError(f"exit status {done.returncode}: {shlex.join(map(str, command))}\n{done.stdout}")
    return done.stdout


def as_cpp(code):
    """Return the C++ source, in an anonymous namespace that keeps its symbols inside the library, and its kernels.

    Lines keep their numbers.
    """
    kernels = KERNEL.findall(code)
    if not kernels:
        raise ValueError('no kernel: `extern "C" __global__ void NAME(` is expected')
    entries = "\n".join(
        f'    cuda_on_cpu::Entry<{name}>::described("{name}", static_cast<int>({most.split(",")[0] or 0})),'
        for most, name in kernels
    )
    return (
        '#include "cuda_on_cpu.h"\n'
        f'namespace {{\n#line 1 "source.cu"\n{code}\n#line 1 "kernels of source.cu"\n'
        f"const cuda_on_cpu::Kernel kernels[] = {{\n{entries}\n}};\n}}  // namespace\n"
        'extern "C" __attribute__((visibility("default")))\n'
        "const cuda_on_cpu::Kernel* cuda_on_cpu_kernels(int* count) {\n"
        "    *count = sizeof kernels / sizeof kernels[0];\n    return kernels;\n}\n"
    )


def build(code, options=(), cache=CACHE):
    """Return the shared library of a source; ``options``: -D, -std and -ftz=true, as for NVRTC.

    The first process compiles it; others wait. Raises RuntimeError with the compiler's message.
    """
    for option in options:
        if not option.startswith("-D") and option not in ("-std=c++17", FLUSHES):
            raise ValueError(f"options: -D, -std=c++17 and {FLUSHES} are known here, got {option!r}")
    own = [HERE / name for name in ("cuda_on_cpu.h", "float_mode.h", *RUNTIME, "library.py")]
    parts = [code, *options, *FLAGS, *CHECKS, _version(), *(path.read_text(encoding="utf-8") for path in own)]
    key = hashlib.sha256("\0".join(parts).encode()).hexdigest()[:24]
    cache.mkdir(parents=True, exist_ok=True)
    library = cache / f"{key}.so"
    with _locked(cache / f"{key}.lock"):
        if not library.exists():
            _compile(code, options, library)
    return library


@contextlib.contextmanager
def _locked(path):
    # Windows lacks this module; no kernel is compiled for the CPU there.
    import fcntl

    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _compile(code, options, library):
    made = library.with_suffix(".new")
    source = library.with_suffix(".cpp")
    source.write_text(as_cpp(code), encoding="utf-8")
    common = [*compiler(), *FLAGS, f"-I{HERE}", "-c"]
    parts = [library.with_suffix(".o")]
    _run([*common, *CHECKS, *(option for option in options if option != FLUSHES), source, "-o", parts[0]])
    for name in RUNTIME:
        parts.append(library.with_suffix(f".{name}.o"))
        _run([*common, HERE / name, "-o", parts[-1]])
    # Link as C: the C++ library is not needed, and ziglang would build it first.
    linker = [*compiler()[:-1], "cc"] if compiler()[1:3] == ("-m", "ziglang") else compiler()
    _run([*linker, "-shared", *parts, "-lm", "-o", made])
    made.replace(library)
    for part in parts:
        part.unlink()


class _Dim3(ctypes.Structure):
    _fields_ = tuple((axis, ctypes.c_uint) for axis in "xyz")


class _Parameter(ctypes.Structure):
    _fields_ = (("size", ctypes.c_int), ("kind", ctypes.c_char))


class _Kernel(ctypes.Structure):
    _fields_ = (
        ("name", ctypes.c_char_p),
        ("most_threads", ctypes.c_int),
        ("count", ctypes.c_int),
        ("parameters", ctypes.POINTER(_Parameter)),
        ("call", ctypes.c_void_p),
    )


# ``parameters``: (kind, bytes) of each, kinds as in the header; ``most_threads``: 0 if unspecified.
Kernel = namedtuple("Kernel", "name parameters most_threads call")


class Library:
    """The kernels of a source, by name."""

    def __init__(self, code, options=()):
        self.lines, self._flushes = code.splitlines(), int(FLUSHES in options)
        self._library = ctypes.CDLL(str(build(code, options)))
        listed = self._library.cuda_on_cpu_kernels
        listed.restype = ctypes.POINTER(_Kernel)
        count = ctypes.c_int()
        found = listed(ctypes.byref(count))
        self.kernels = {kernel.name: kernel for kernel in map(_described, found[: count.value])}
        self._launch = self._library.cuda_on_cpu_launch
        self._launch.restype = None
        self._message = ctypes.create_string_buffer(400)

    def launch(self, name, grid, block, arguments, *, order="shuffled", seed=0):
        """Run a kernel on arguments as bytes; ``order``: of blocks and of threads between barriers.

        Raises ValueError if a launch would fail or read missing arguments, KernelFault during the run.
        """
        kernel = self.kernels[name]
        sizes, wanted = [len(value) for value in arguments], [size for _, size in kernel.parameters]
        if sizes != wanted:
            raise ValueError(f"{name}: arguments of {wanted} bytes are expected, got {sizes}")
        threads = block[0] * (*block, 1)[1] * (*block, 1, 1)[2]
        if min(grid) < 1 or min(block) < 1 or threads > (kernel.most_threads or 1024):
            raise ValueError(
                f"{name}: at least one block of 1 to {kernel.most_threads or 1024} threads is expected, "
                f"got a grid of {tuple(grid)} and blocks of {tuple(block)}"
            )
        buffers = [ctypes.create_string_buffer(value, len(value)) for value in arguments]
        pointers = (ctypes.c_void_p * (len(buffers) + 1))(*(ctypes.addressof(buffer) for buffer in buffers))
        self._launch(
            ctypes.c_void_p(kernel.call), pointers, _dim3(grid), _dim3(block), ORDERS[order],
            ctypes.c_ulonglong(seed), self._flushes, self._message, ctypes.c_size_t(len(self._message)),
        )  # fmt: skip
        if said := self._message.value.decode():
            line, _, what = said.partition(" ")
            source = f", line {line}: {self.lines[int(line) - 1].strip()}" if int(line) else ""
            raise KernelFault(f"{name}: {what}{source}")


def _dim3(sizes):
    return ctypes.byref(_Dim3(*sizes, *[1] * (3 - len(sizes))))


def _described(kernel):
    parameters = tuple((item.kind.decode(), item.size) for item in kernel.parameters[: kernel.count])
    return Kernel(kernel.name.decode(), parameters, kernel.most_threads, kernel.call)
