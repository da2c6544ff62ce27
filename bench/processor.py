"""The processor under test: all contenders limited to a narrower instruction set, and the most that it can compute."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

# For each instruction set the variables by which libraries leave out wider ones. Code that reads none of them is not
# limited: scikit-learn's own, and the products of JAX, whose YNNPACK asks the processor.
SETTINGS: dict[str, dict[str, str]] = {
    "avx2": {
        "FUSEMLP_ISA": "avx2",
        "ATEN_CPU_CAPABILITY": "avx2",
        "ONEDNN_MAX_CPU_ISA": "AVX2",
        "MKL_ENABLE_INSTRUCTIONS": "AVX2",
        "XLA_FLAGS": "--xla_cpu_max_isa=AVX2",
        "OPENBLAS_CORETYPE": "Haswell",
    },
    "sse": {
        "FUSEMLP_ISA": "sse",
        "ATEN_CPU_CAPABILITY": "default",
        "ONEDNN_MAX_CPU_ISA": "SSE41",
        "MKL_ENABLE_INSTRUCTIONS": "SSE4_2",
        "XLA_FLAGS": "--xla_cpu_max_isa=SSE4_2",
        "OPENBLAS_CORETYPE": "Nehalem",
    },
}
SECONDS = 0.3
SOURCE, LIBRARY = Path(__file__).with_name("cpuid.c"), "cpuid.so"


@contextmanager
def limited(isa: str | None) -> Iterator[dict[str, str]]:
    """Yield the variables of a process that uses no wider instructions than ``isa``, {} for None.

    Linux hides wider ones than AVX2 from every library, if the processor lets CPUID fault and there is a compiler (see
    cpuid.c). Else a library is limited by its own variables, if it reads any.
    """
    settings, information = SETTINGS.get(isa or "", {}), Path("/proc/cpuinfo")
    compiler = shutil.which("cc") if isa == "avx2" and information.is_file() else None
    if compiler is None or " cpuid_fault " not in information.read_text():
        yield settings
        return
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder, LIBRARY)
        done = subprocess.run([compiler, "-O1", "-shared", "-fPIC", "-o", library, SOURCE], check=False)
        preloaded = " ".join([str(library), *os.environ.get("LD_PRELOAD", "").split()])
        # Python's own handler of faults would take the place of the library's
        hidden = {"LD_PRELOAD": preloaded, "PYTHONFAULTHANDLER": ""}
        yield settings if done.returncode else {**settings, **hidden}


def instruction_sets() -> dict[str, str]:
    """Return the instruction set that each library of this process says it uses; XLA says nothing. Of CPUID the one
    that ``limited`` leaves."""
    libraries = [name for name in os.environ.get("LD_PRELOAD", "").split() if Path(name).name == LIBRARY]
    # the library says whether this process is one in which CPUID faults
    used = {"CPUID": "avx2"} if libraries and ctypes.CDLL(libraries[0]).hides() else {}
    if "torch" in sys.modules:
        used["PyTorch"] = str(sys.modules["torch"].backends.cpu.get_cpu_capability())
    compiler = sys.modules.get("fusemlp_kernels.numpy.compiled.compiler")
    if compiler is not None:
        used["fusemlp"] = next(name for name, width in compiler.REGISTERS.items() if width == compiler.REGISTER_BYTES)
    return used


def peak() -> float:
    """Return the fp32 operations a second that as many threads reach as fusemlp uses, in units of 1e9.

    Each thread multiplies and adds in registers alone, with as many sums as a tile of fusemlp's products has.
    """
    from fusemlp_kernels.numpy.launches import threads

    loop = _loop()
    steps, operations = 1 << 16, loop(1)
    while _timed(loop, steps, 1) < SECONDS:
        steps *= 2
    count = threads()
    return max(operations * steps * count / _timed(loop, steps, count) for _ in range(3)) / 1e9


def _timed(loop: Any, steps: int, count: int) -> float:
    """Return the seconds of the loop in ``count`` threads at once."""
    workers = [threading.Thread(target=loop, args=(steps,)) for _ in range(count)]
    began = time.perf_counter()
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    return time.perf_counter() - began


def _loop() -> Any:
    """Return ``loop(steps)``, compiled, which returns the operations of a step."""
    import numba
    from llvmlite import ir

    from fusemlp_kernels.numpy.compiled import products, vectors
    from fusemlp_kernels.numpy.compiled.compiler import REGISTER_BYTES, intrinsic

    sums = products.TILE_ROWS * products.TILE_VECTORS
    operations = 2 * sums * REGISTER_BYTES // 4

    @intrinsic
    def run(typingctx: Any, steps: Any) -> Any:
        def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            to = vectors.VectorCode(context, builder, numba.float32)
            half = to.everywhere(ir.Constant(to.element, 0.5))
            starts = [to.everywhere(ir.Constant(to.element, float(i))) for i in range(sums)]

            def step(_: Any, values: list[Any]) -> list[Any]:
                return [to.sum_of_product(value, half, half) for value in values]

            ends = vectors.looped(builder, arguments[0], 1, starts, step)
            total = ends[0]
            for value in ends[1:]:
                total = builder.fadd(total, value)
            return builder.extract_element(total, ir.IntType(32)(0))

        return numba.float32(numba.intp), code

    @numba.njit(nogil=True)
    def loop(steps: int) -> int:
        # the sum is of use, so that it is computed
        return operations if run(steps) > -1.0 else 0

    return loop
