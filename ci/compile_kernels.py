"""Compile the Triton kernels for every architecture, on a machine without a GPU, and check the machine code.

A kernel is an error if it spills, uses a stack for no recorded reason, lost its tensor-core instructions or exceeds the
shared memory. None of these changes a kernel's results; they change its speed, or the launch fails. Three faults do
change results, see ``kernel_machine_code``: a product without the fence it needs, shared memory held across a call, and
on AMD a ticket taken before all stores have arrived.
``ci/kernel_resources.json`` records the resources and the loops, by version of Triton. A loop that takes more stall
cycles than recorded, by more than ``TOLERANCE``, is an error; ``--write --accept-slower`` records it all the same.

Without ``--all`` a systematic part is compiled: for each kernel and element type, the largest tile and the constants
with the most registers; and the kernels of ``kernel_launches.GOALS``. ``--check`` compiles a sample alone if the record
has the installed version of Triton, as its rows name the code that they were compiled from: each kernel for the
architectures of ``SAMPLE``, once in fp32 and once in bf16. Compiled kernels are kept in build/triton, so that a second
run only reads them.
"""

from __future__ import annotations

import argparse
import collections
import json
import math
import os
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RECORD = ROOT / "ci/kernel_resources.json"
# This variable selects Triton's interpreter, which compiles nothing.
os.environ.pop("TRITON_INTERPRET", None)
os.environ.setdefault("TRITON_CACHE_DIR", str(ROOT / "build/triton"))

import kernel_launches  # noqa: E402
import kernel_variants  # noqa: E402
import triton  # noqa: E402

from fusemlp_kernels.triton import configs  # noqa: E402

Row = dict[str, Any]
KEY = ("triton", "arch", "kernel", "variant")
# The most shared memory of a program, in bytes: the CUDA programming guide's table of compute capabilities, and the
# CDNA 3 instruction set's local data share. From sm_90 on the system's own kilobyte counts as static memory.
SHARED_LIMITS = {
    "sm_80": 163 << 10,
    "sm_86": 99 << 10,
    "sm_90": 227 << 10,
    "sm_100": 227 << 10,
    "sm_120": 99 << 10,
    "gfx942": 64 << 10,
}
SYSTEM_SHARED = {"sm_90": 1 << 10, "sm_100": 1 << 10, "sm_120": 1 << 10}
# One of each compiler: NVIDIA's with the asynchronous products, and AMD's.
SAMPLE = ("sm_90", "gfx942")
# The share by which a loop may be slower than recorded.
TOLERANCE = 0.03
# Kernels that may use a stack, by architecture and name, with the reason.
STACK_REASONS = {
    ("gfx942", "resident"): "its functions save registers and take arguments there, by the calling convention of AMD",
}


def problems(row: Row) -> list[str]:
    """Yield the problems of a kernel's machine code."""
    found = []
    if row["spills"]:
        found.append(f"{row['spills']} spills")
    if row["stack"] and (row["arch"], row["kernel"]) not in STACK_REASONS:
        found.append(f"a stack of {row['stack']} bytes, for which no reason is recorded")
    if row["kernel"] in kernel_variants.PRODUCTS and not row["tensor_core"]:
        found.append("no tensor-core instruction")
    arch = row["arch"]
    shared = row["shared_dynamic"] + max(row["shared_static"] - SYSTEM_SHARED.get(arch, 0), 0)
    if shared > SHARED_LIMITS[arch]:
        found.append(f"{shared} bytes of shared memory; {arch} has {SHARED_LIMITS[arch]}")
    # Older versions leave the fence out. The backend refuses them on Blackwell, where results differ between runs; on
    # Hopper nothing wrong is known.
    if row.get("unfenced") and configs.version_of(row["triton"]) >= configs.FENCED_TRITON:
        found.append(f"{row['unfenced']} products read copied shared memory without fence.proxy.async")
    if row.get("shared_callers"):
        found.append(f"{row['shared_callers']} functions hold shared memory while they call another")
    if row.get("undrained"):
        found.append(f"{row['undrained']} tickets are taken while stores of other waves are on their way")
    return [f"{arch} {row['kernel']} ({row['variant']}): {problem}" for problem in found]


def systematic_part(variants: Sequence[kernel_variants.Variant]) -> list[kernel_variants.Variant]:
    """Return, for each kernel and element type, the variant with the largest tile and the most registers.

    fp32 adds the general path, fp16 the weight gradients in memory. Kernels of whole steps compile slowly, so only
    their fp32 variants are included.
    """

    def size(variant: kernel_variants.Variant) -> tuple[int, int]:
        return variant.tile.rows * variant.tile.columns, variant.tile.columns

    def path(variant: kernel_variants.Variant) -> tuple[str | bool, ...]:
        flags = [
            variant.constants.get(name, name == "ALIGNED") for name in ("ALIGNED", "NOISY", "CROSS_ENTROPY", "MANY")
        ]
        # those of three layers have tiles of their own
        flags.append(variant.kernel.endswith("narrow") and variant.constants["LAYERS"] > 2)
        return variant.kernel, variant.precision, *flags, variant.tile.split > 1

    largest: dict[tuple[str | bool, ...], tuple[int, int]] = {}
    for variant in variants:
        largest[path(variant)] = max(largest.get(path(variant), (0, 0)), size(variant))

    heaviest = kernel_variants.RULES.index(kernel_variants.HEAVIEST)

    def belongs(variant: kernel_variants.Variant) -> bool:
        if size(variant) != largest[path(variant)] or variant.constants.get("TASKS", 16) != 16:
            return False
        if not variant.constants.get("ALIGNED", True) and variant.precision != "fp32":
            return False
        if variant.kernel == "resident" and variant.precision != "fp32":
            return False
        if variant.constants.get("UPDATES") is False:
            return variant.precision == "fp16"
        return variant.constants.get("RULE", heaviest) == heaviest

    return [variant for variant in variants if belongs(variant)]


def chosen(
    archs: Iterable[str], kernels: Iterable[str], everything: bool
) -> Iterator[tuple[kernel_variants.Variant, str]]:
    """Yield the variants to compile, with those of the goals' steps."""
    for arch in archs:
        variants = kernel_variants.variants(arch)
        part = list(variants if everything else systematic_part(variants))
        part += kernel_launches.goal_variants(arch)
        for variant in {(one.kernel, one.name): one for one in part}.values():
            if variant.kernel in kernels:
                yield variant, arch


def sample(work: Iterable[tuple[kernel_variants.Variant, str]]) -> list[tuple[kernel_variants.Variant, str]]:
    """Return the first variant of each kernel in fp32 and in bf16, for each architecture."""
    found: dict[tuple[str, str, str], tuple[kernel_variants.Variant, str]] = {}
    for variant, arch in work:
        if variant.precision in ("fp32", "bf16"):
            found.setdefault((arch, variant.kernel, variant.precision), (variant, arch))
    return list(found.values())


def compiled(work: tuple[kernel_variants.Variant, str]) -> Row | str:
    """Return the row of a variant, or its error."""
    variant, arch = work
    try:
        return kernel_variants.compile_variant(variant, arch)
    except Exception as error:  # The report lists every error of the compiler.
        return f"{arch} {variant.kernel} ({variant.name}): {type(error).__name__}: {error}"


def compile_all(work: Sequence[tuple[kernel_variants.Variant, str]], jobs: int) -> tuple[list[Row], list[str]]:
    """Return the rows, and the errors of variants that do not compile; report progress on stderr."""
    rows, failures = [], []
    told = time.monotonic()
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:
        for done, result in enumerate(pool.map(compiled, work), 1):
            if isinstance(result, str):
                failures.append(result)
            else:
                rows.append(result)
            if time.monotonic() - told > 20:
                told = time.monotonic()
                print(f"compile_kernels: {done} of {len(work)}", file=sys.stderr, flush=True)
    return rows, failures


def table(rows: Iterable[Row]) -> str:
    """Return a table of compilations and spills by architecture and version of Triton."""
    groups = collections.defaultdict(list)
    for row in rows:
        groups[row["triton"], row["arch"]].append(row)
    lines = [
        f"{'Triton':8} {'arch':8} {'compiled':>8} {'spills':>7} {'stacks':>7} {'registers':>10} {'shared':>9}  units"
    ]
    for (version, arch), found in groups.items():
        units = collections.Counter(row["tensor_core"] for row in found if row["tensor_core"])
        lines.append(
            f"{version:8} {arch:8} {len(found):8} {sum(row['spills'] for row in found):7} "
            f"{sum(row['stack'] > 0 for row in found):7} {max(row['registers'] for row in found):10} "
            f"{max(row['shared_dynamic'] for row in found) / 1024:5.0f} KiB  "
            + ", ".join(f"{name} {count}" for name, count in units.most_common())
        )
    return "\n".join(lines)


def read_record() -> list[Row]:
    """Return the rows of the record, none if there is no file yet."""
    return json.loads(RECORD.read_text()) if RECORD.exists() else []


def launched(everything: bool) -> set[tuple[str, str, str, str]]:
    """Return architecture, kernel, variant and source of every launched kernel, or of the systematic part."""
    work = chosen(kernel_variants.TARGETS, tuple(kernel_variants.KERNELS), everything)
    source = kernel_variants.source_hash
    return {(arch, variant.kernel, variant.name, source(variant.kernel, arch)) for variant, arch in work}


def write_record(rows: Iterable[Row]) -> None:
    """Write the rows into the record, one a line; drop rows of other code and of unused kernels."""
    wanted = {key[:3] for key in launched(everything=True)}
    source = kernel_variants.source_hash
    merged = {tuple(row[name] for name in KEY): row for row in [*read_record(), *rows]}
    current = (row for key, row in sorted(merged.items()) if key[1:] in wanted)
    kept = [row for row in current if row["source"] == source(row["kernel"], row["arch"])]
    RECORD.write_text("[\n" + ",\n".join(json.dumps(row) for row in kept) + "\n]\n")


def record_problems(record: Sequence[Row]) -> list[str]:
    """Return the problems of the record: kernels that fail, missing rows, rows of other code."""
    found = [problem for row in record for problem in problems(row)]
    possible = launched(everything=True)
    needed = launched(everything=False)
    for version in sorted({row["triton"] for row in record} or {triton.__version__}, key=configs.version_of):
        rows = [row for row in record if row["triton"] == version]
        present = {(row["arch"], row["kernel"], row["variant"], row["source"]) for row in rows}
        for what, wrong in (("missing", needed - present), ("not of the current kernels", present - possible)):
            if wrong:
                found.append(
                    f"{RECORD.name}, Triton {version}: {len(wrong)} rows are {what}, such as {' '.join(min(wrong))}; "
                    "write them with ci/compile_kernels.py --write"
                )
    return found


def differences(rows: Iterable[Row], record: Iterable[Row]) -> list[str]:
    """Return the differences between the compiled rows and the record, for the same version of Triton."""
    found = []
    for before, row in _pairs(rows, record):
        changed = [name for name in row if before.get(name) != row[name] and name not in ("loops", "waits")]
        if changed:
            said = ", ".join(f"{name} {before.get(name)} -> {row[name]}" for name in changed)
            found.append(f"{row['arch']} {row['kernel']} ({row['variant']}) differs from the record: {said}")
    return found


def slower(rows: Iterable[Row], record: Iterable[Row]) -> list[str]:
    """Return the loops that take more stall cycles for each copy of the body than recorded, beyond ``TOLERANCE``."""
    found = []
    for before, row in _pairs(rows, record):
        for name, (_, recorded, *copies) in before.get("loops", {}).items():
            if name not in row["loops"]:
                found.append(
                    f"{row['arch']} {row['kernel']} ({row['variant']}): {name} is recorded and no longer found; "
                    "--write --accept-slower records the loops anew"
                )
                continue
            _, stalls, *now = row["loops"][name]
            if stalls * math.prod(copies) > (1 + TOLERANCE) * recorded * math.prod(now):
                found.append(
                    f"{row['arch']} {row['kernel']} ({row['variant']}): {name} takes {stalls} stall cycles a pass, "
                    f"recorded are {recorded}; --write --accept-slower records it"
                )
    return found


def _pairs(rows: Iterable[Row], record: Iterable[Row]) -> list[tuple[Row, Row]]:
    """Return the recorded and the compiled row of every kernel that has both."""
    recorded = {tuple(row[name] for name in KEY): row for row in record}
    keyed = [(recorded.get(tuple(row[name] for name in KEY)), row) for row in rows]
    return [(before, row) for before, row in keyed if before is not None]


def parser() -> argparse.ArgumentParser:
    """Return the options."""
    made = argparse.ArgumentParser(prog="ci/compile_kernels.py", description=(__doc__ or "").split("\n\n")[0])
    made.add_argument(
        "--arch",
        nargs="+",
        choices=kernel_variants.TARGETS,
        help=f"default: all; with --check a sample for {' '.join(SAMPLE)} if the record has this version of Triton",
    )
    made.add_argument(
        "--kernel",
        nargs="+",
        choices=tuple(kernel_variants.KERNELS),
        default=tuple(kernel_variants.KERNELS),
        help="default: all",
    )
    made.add_argument("--all", action="store_true", help="compile every variant, not only the systematic part")
    made.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes (default: %(default)s)")
    made.add_argument("--write", action="store_true", help=f"write the results into ci/{RECORD.name}")
    made.add_argument("--missing", action="store_true", help="compile only what the record lacks")
    made.add_argument("--accept-slower", action="store_true", help="with --write: record slower loops too")
    made.add_argument(
        "--check",
        action="store_true",
        help=f"compare with ci/{RECORD.name}, which must belong to the current kernels",
    )
    return made


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    options = parser().parse_args(arguments)
    start = time.monotonic()
    sampled = options.check and not options.arch and any(row["triton"] == triton.__version__ for row in read_record())
    work = list(chosen(options.arch or (SAMPLE if sampled else kernel_variants.TARGETS), options.kernel, options.all))
    work = sample(work) if sampled else work
    if options.missing:
        rows = {(*(row[name] for name in KEY), row["source"]) for row in read_record()}
        source = kernel_variants.source_hash
        work = [
            (variant, arch)
            for variant, arch in work
            if (triton.__version__, arch, variant.kernel, variant.name, source(variant.kernel, arch)) not in rows
        ]
    rows, failures = compile_all(work, options.jobs)
    print(table(rows), flush=True)
    print(f"{len(rows)} compilations with Triton {triton.__version__} in {time.monotonic() - start:.0f} s")
    found = [*failures, *(problem for row in rows for problem in problems(row))]
    if not options.accept_slower:
        found += slower(rows, read_record())
    if options.write and not found:
        write_record(rows)
    if options.check:
        record = read_record()
        print(f"the record, ci/{RECORD.name}:\n{table(record)}")
        found += [*record_problems(record), *differences(rows, record)]
    for problem in found:
        print(f"error: {problem}", file=sys.stderr)
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
