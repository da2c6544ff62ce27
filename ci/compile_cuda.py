"""Compile the CUDA C of the CuPy backend with NVRTC, on a machine without a GPU, and check the machine code.

NVRTC comes from the wheel nvidia-cuda-nvrtc-cu12. The call goes through ctypes, which needs no driver; CuPy's own call
needs one. Every source is compiled for every type and architecture. A kernel that spills, uses a stack or exceeds the
shared memory is an error. ``ci/cuda_resources.json`` records the resources of each kernel.
"""

from __future__ import annotations

import argparse
import collections
import ctypes
import functools
import hashlib
import importlib.metadata
import json
import os
import re
import sys
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

from fusemlp_kernels.cupy import sources

ROOT = Path(__file__).resolve().parents[1]
RECORD = ROOT / "ci/cuda_resources.json"
CACHE = ROOT / "build/nvrtc"
WHEEL = "nvidia-cuda-nvrtc-cu12"
TARGETS = ("sm_75", "sm_80", "sm_90", "sm_100")
# CuPy adds this option to every module (cupy.cuda.compiler): it flushes subnormal numbers to zero.
ADDED = ("-ftz=true",)
# Bytes of shared memory of a default launch: the CUDA programming guide's table of compute capabilities.
STATIC_SHARED_LIMIT = 48 << 10

Row = dict[str, Any]
KEY = ("nvrtc", "arch", "module", "type", "kernel")
ENTRY = re.compile(r"Compiling entry function '(\w+)'")
FRAME = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
USED = re.compile(r"Used (\d+) registers(.*)")
SHARED = re.compile(r"(\d+) bytes smem")


class Work(NamedTuple):
    """A source to compile: a module of ``sources.MODULES`` for a type of ``sources.PRECISIONS``."""

    arch: str
    module: str
    type: str


def version() -> str:
    """Return the version of NVRTC's wheel; raises SystemExit with advice if it is missing."""
    try:
        return importlib.metadata.version(WHEEL)
    except importlib.metadata.PackageNotFoundError:
        sys.exit(
            f"compile_cuda: the wheel {WHEEL} with the compiler is not installed here: pip install {WHEEL} "
            "(it is in the test extra on Linux; it needs no GPU and no driver)"
        )


@functools.cache
def library() -> ctypes.CDLL:
    """Load NVRTC."""
    version()
    found = [file for file in importlib.metadata.files(WHEEL) or () if re.fullmatch(r"libnvrtc\.so\.\d+", file.name)]
    if len(found) != 1:
        sys.exit(f"compile_cuda: expected one library libnvrtc.so in the wheel {WHEEL}, found {found}")
    return ctypes.CDLL(str(found[0].locate()))


def _text(program: ctypes.c_void_p, kind: str) -> bytes:
    size = ctypes.c_size_t()
    getattr(library(), f"nvrtcGet{kind}Size")(program, ctypes.byref(size))
    buffer = ctypes.create_string_buffer(size.value)
    getattr(library(), f"nvrtcGet{kind}")(program, buffer)
    return buffer.raw


def compile_source(code: str, options: Sequence[str], arch: str) -> tuple[bytes, str]:
    """Return the cubin and the assembler's report on each kernel. Raises ValueError with the source's errors."""
    nvrtc, program = library(), ctypes.c_void_p()
    nvrtc.nvrtcCreateProgram(ctypes.byref(program), code.encode(), b"source.cu", 0, None, None)
    given = [*options, f"--gpu-architecture={arch}", "--ptxas-options=-v"]
    status = nvrtc.nvrtcCompileProgram(program, len(given), (ctypes.c_char_p * len(given))(*map(str.encode, given)))
    log = _text(program, "ProgramLog").rstrip(b"\0").decode()
    cubin = b"" if status else _text(program, "CUBIN")
    nvrtc.nvrtcDestroyProgram(ctypes.byref(program))
    if status:
        raise ValueError(log)
    return cubin, log


def resources(log: str) -> dict[str, dict[str, int]]:
    """Return for each kernel the registers of a thread, the bytes of stack and spills (called functions included), and
    the static shared memory of a block in bytes."""
    _, *parts = ENTRY.split(log)
    found = {}
    for name, said in zip(parts[::2], parts[1::2], strict=True):
        used = USED.search(said)
        frames = [tuple(map(int, frame)) for frame in FRAME.findall(said)]
        if used is None or not frames:
            raise ValueError(f"the assembler reports no resources of {name}:\n{said}")
        shared = SHARED.search(used[2])
        found[name] = {
            "registers": int(used[1]),
            "stack": max(stack for stack, _, _ in frames),
            "spills": sum(stores + loads for _, stores, loads in frames),
            "shared_static": int(shared[1]) if shared else 0,
        }
    return found


def options_of(kind: str) -> tuple[str, ...]:
    """Return CuPy's compiler options for the sources of a type."""
    return (*sources.PRECISIONS[kind], *ADDED)


def source_hash(module: str, kind: str) -> str:
    """Return a hash of the text and the options of a module."""
    return hashlib.sha256("\0".join([sources.text(module), *options_of(kind)]).encode()).hexdigest()[:16]


def compiled(work: Work) -> list[Row] | str:
    """Return a row for each kernel, or the error; ``build/nvrtc`` caches what was compiled before."""
    source = source_hash(work.module, work.type)
    kept = CACHE / f"{version()}-{work.arch}-{work.module}-{work.type}-{source}.json"
    if kept.exists():
        rows: list[Row] = json.loads(kept.read_text())
        return rows
    try:
        cubin, log = compile_source(sources.text(work.module), options_of(work.type), work.arch)
    except ValueError as error:
        return f"{work.arch} {work.module}.cu ({work.type}): {error}"
    if not cubin.startswith(b"\x7fELF"):
        return f"{work.arch} {work.module}.cu ({work.type}): NVRTC made no machine code"
    rows = [
        {"module": work.module, "kernel": name, "type": work.type, "nvrtc": version(), "arch": work.arch, **taken,
         "source": source}
        for name, taken in sorted(resources(log).items())
    ]  # fmt: skip
    CACHE.mkdir(parents=True, exist_ok=True)
    new = kept.with_suffix(f".{os.getpid()}")
    new.write_text(json.dumps(rows))
    new.replace(kept)
    return rows


def compile_all(work: Sequence[Work], jobs: int) -> tuple[list[Row], list[str]]:
    """Return the rows, and the errors of sources that do not compile."""
    version()
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:
        results = list(pool.map(compiled, work))
    return [row for rows in results if not isinstance(rows, str) for row in rows], [
        r for r in results if isinstance(r, str)
    ]


def problems(row: Row) -> list[str]:
    """Yield the problems of a kernel's machine code."""
    found = []
    if row["spills"]:
        found.append(f"{row['spills']} bytes are spilled")
    if row["stack"]:
        found.append(f"a stack of {row['stack']} bytes")
    if row["shared_static"] > STATIC_SHARED_LIMIT:
        found.append(f"{row['shared_static']} bytes of shared memory; a launch has {STATIC_SHARED_LIMIT}")
    return [f"{row['arch']} {row['module']}.cu {row['kernel']} ({row['type']}): {problem}" for problem in found]


def table(rows: Iterable[Row]) -> str:
    """Return a table of the kernels by architecture."""
    groups = collections.defaultdict(list)
    for row in rows:
        groups[row["nvrtc"], row["arch"]].append(row)
    lines = [f"{'NVRTC':10} {'arch':7} {'kernels':>7} {'spills':>7} {'stacks':>7} {'registers':>10} {'shared':>10}"]
    for (nvrtc, arch), found in groups.items():
        lines.append(
            f"{nvrtc:10} {arch:7} {len(found):7} {sum(row['spills'] for row in found):7} "
            f"{sum(row['stack'] > 0 for row in found):7} {max(row['registers'] for row in found):10} "
            f"{max(row['shared_static'] for row in found):8} B"
        )
    return "\n".join(lines)


def read_record() -> list[Row]:
    """Return the rows of the record, none if there is no file yet."""
    return json.loads(RECORD.read_text()) if RECORD.exists() else []


def write_record(rows: Iterable[Row]) -> None:
    """Write the rows into the record, one a line, and drop rows of other code."""
    merged = {tuple(row[name] for name in KEY): row for row in [*read_record(), *rows]}
    kept = [row for _, row in sorted(merged.items()) if is_current(row)]
    RECORD.write_text("[\n" + ",\n".join(json.dumps(row) for row in kept) + "\n]\n")


def is_current(row: Row) -> bool:
    """Return whether a row belongs to the current sources."""
    known = row["module"] in sources.MODULES and row["type"] in sources.PRECISIONS and row["arch"] in TARGETS
    return known and row["source"] == source_hash(row["module"], row["type"])


def all_work(archs: Iterable[str] = TARGETS) -> list[Work]:
    """Return all work, the longest compilations first."""
    order = sorted(sources.MODULES, key=lambda module: module != "loss")
    return [Work(arch, module, kind) for module in order for arch in archs for kind in sources.PRECISIONS]


def record_problems(record: Sequence[Row]) -> list[str]:
    """Return the problems of the record: kernels that fail, missing rows, rows of other code."""
    found = [problem for row in record for problem in problems(row)]
    present = {Work(row["arch"], row["module"], row["type"]) for row in record if is_current(row)}
    missing, old = set(all_work()) - present, [row for row in record if not is_current(row)]
    for what, wrong in (
        ("missing", sorted(map(" ".join, missing))),
        ("not of the current sources", [f"{row['arch']} {row['module']} {row['kernel']}" for row in old]),
    ):
        if wrong:
            found.append(
                f"{RECORD.name}: {len(wrong)} are {what}, such as {wrong[0]}; "
                "write them with ci/compile_cuda.py --write"
            )
    return found


def differences(rows: Iterable[Row], record: Iterable[Row]) -> list[str]:
    """Return the differences between the compiled rows and the record, for the same version of NVRTC."""
    recorded = {tuple(row[name] for name in KEY): row for row in record}
    versions = {row["nvrtc"] for row in recorded.values()}
    found = []
    for row in rows:
        before = recorded.get(tuple(row[name] for name in KEY))
        if before is None and row["nvrtc"] in versions:
            found.append(f"{row['arch']} {row['module']}.cu {row['kernel']} ({row['type']}) is not in the record")
        elif before is not None and before != row:
            changed = ", ".join(f"{name} {before[name]} -> {row[name]}" for name in row if before[name] != row[name])
            found.append(f"{row['arch']} {row['module']}.cu {row['kernel']} ({row['type']}): {changed}")
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    parser = argparse.ArgumentParser(prog="ci/compile_cuda.py", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--arch", nargs="+", choices=TARGETS, default=TARGETS, help="default: all")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes (default: %(default)s)")
    parser.add_argument("--write", action="store_true", help=f"write the results into ci/{RECORD.name}")
    parser.add_argument("--check", action="store_true", help=f"compare with ci/{RECORD.name}")
    options = parser.parse_args(arguments)
    start = time.monotonic()
    rows, failures = compile_all(all_work(options.arch), options.jobs)
    print(table(rows), flush=True)
    print(f"{len(rows)} kernels with NVRTC {version()} in {time.monotonic() - start:.0f} s")
    found = [*failures, *(problem for row in rows for problem in problems(row))]
    if options.write:
        write_record(rows)
    if options.check:
        record = read_record()
        found += [*record_problems(record), *differences(rows, record)]
    for problem in found:
        print(f"error: {problem}", file=sys.stderr)
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
