"""What a measurement says and under which circumstances: JSON lines to keep, a Markdown table to read."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from bench.measure import PAUSE_SECONDS, Result, check_agreement
from bench.peers import PEERS, REFERENCE

RESULTS = Path(__file__).parent / "results"
THREAD_VARIABLES = ("OMP_", "GOMP_", "KMP_", "MKL_", "XLA_", "JAX_", "OPENBLAS_")
Record = dict[str, Any]


def machine() -> dict[str, Any]:
    """The processor, the cores that this process may use, the memory and the system."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "cpu": _cpu_model(),
        "cores": cores,
        "memory_gib": _memory_gib(),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
    }


def _cpu_model() -> str:
    """The processor's name: from /proc/cpuinfo, with family and model, since virtual machines hide the name."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return platform.processor() or platform.machine()
    pairs = (line.partition(":") for line in text.splitlines())
    fields: dict[str, str] = {}
    for key, _, value in pairs:
        fields.setdefault(key.strip(), value.strip())
    if "model name" not in fields:
        return platform.processor() or platform.machine()
    return f"{fields['model name']}, family {fields.get('cpu family', '?')} model {fields.get('model', '?')}"


def _memory_gib() -> float | None:
    try:
        size = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return None
    return round(size / 2**30, 1)


def circumstances(environments: dict[str, dict[str, Any]], unset: dict[str, str]) -> dict[str, Any]:
    """All that is the same for every line of a report.

    ``environments``: what each peer's worker said of its process. ``unset``: the OPENBLAS_* variables of this
    process, which the workers were not given.
    """
    import numpy
    import scipy

    versions = {"python": platform.python_version(), "numpy": numpy.__version__, "scipy": scipy.__version__}
    versions |= {PEERS[name].package: found["version"] for name, found in environments.items()}
    kept = {
        name: value
        for name, value in sorted(os.environ.items())
        if name.startswith(THREAD_VARIABLES) and name not in unset
    }
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": machine(),
        "versions": versions,
        "thread_pools": {name: found["pools"] for name, found in environments.items()},
        "variables": kept,
        "openblas_variables_unset": unset,
        "pause_seconds": PAUSE_SECONDS,
    }


def records(results: Sequence[Result], common: dict[str, Any]) -> list[Record]:
    """A line for each peer of a case; ``ratio`` (absent without the reference) is its time over the reference's."""
    reference = next((result for result in results if result.peer == REFERENCE), None)
    difference = check_agreement(results)
    lines = []
    for result in results:
        case = result.case
        lines.append(
            {
                "case": case.name,
                "sizes": list(case.sizes),
                "batch_size": case.batch_size,
                "rows": case.rows,
                "steps_per_epoch": case.steps,
                "epochs_per_turn": case.epochs,
                "learning_rate": case.learning_rate,
                "flops": case.flops,
                "peer": result.peer,
                "label": PEERS[result.peer].label,
                "rounds": len(result.seconds),
                "microseconds": asdict(result.microseconds),
                "ratio": None if reference is None else asdict(result.ratios(reference)),
                "every_round": [round(1e6 * seconds, 3) for seconds in result.seconds],
                "loss_before": result.loss_before,
                "loss_after": result.loss_after,
                "loss_difference": difference,
                **common,
            }
        )
    return lines


def write(lines: Iterable[Record], path: Path) -> None:
    """Add lines to a file; its folder is made if need be."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        for line in lines:
            file.write(json.dumps(line) + "\n")


def read(path: Path) -> list[Record]:
    """The lines of a file that ``write`` wrote."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]


def default_path() -> Path:
    """A new file in ``bench/results``, named by the time."""
    return RESULTS / f"{datetime.now(UTC):%Y%m%dT%H%M%SZ}.jsonl"


def newest() -> Path | None:
    """The last measurement in ``bench/results``, or None."""
    return max(RESULTS.glob("*.jsonl"), default=None)


def markdown(lines: Sequence[Record]) -> str:
    """The table of a measurement and, below it, machine, versions and method."""
    peers = list(dict.fromkeys(line["peer"] for line in lines))
    by_case: dict[str, dict[str, Record]] = {}
    for line in lines:
        by_case.setdefault(line["case"], {})[line["peer"]] = line
    table = [
        "| network, batch | " + " | ".join(PEERS[peer].label for peer in peers) + " |",
        "|---|" + "---:|" * len(peers),
    ]
    for found in by_case.values():
        first = next(iter(found.values()))
        cells = [f"{'-'.join(map(str, first['sizes']))}, {first['batch_size']}"]
        cells += [_cell(found[peer]) if peer in found else "" for peer in peers]
        table.append("| " + " | ".join(cells) + " |")
    return "\n".join([*table, "", _caption(lines)])


def _cell(line: Record) -> str:
    time = _microseconds(line["microseconds"]["p50"])
    ratio = line["ratio"]
    if ratio is None or line["peer"] == REFERENCE:
        spread = line["microseconds"]
        return f"{time} ({_microseconds(spread['p20'])} to {_microseconds(spread['p80'])})"
    return f"{time}, **{ratio['p50']:.2f}x** ({ratio['p20']:.2f} to {ratio['p80']:.2f})"


def _microseconds(value: float) -> str:
    return f"{value:.1f}" if value < 100 else f"{value:,.0f}"


def _caption(lines: Sequence[Record]) -> str:
    line = lines[0]
    box, versions = line["machine"], line["versions"]
    names = {"sklearn": "scikit-learn", "torch": "PyTorch", "jax": "JAX", "numpy": "NumPy", "scipy": "SciPy"}
    shown = ", ".join(f"{names.get(name, name)} {version}" for name, version in versions.items())
    memory = "" if box["memory_gib"] is None else f", {box['memory_gib']:.0f} GiB"
    unset, kept = line["openblas_variables_unset"], line["variables"]
    openblas = f"unset for the run ({', '.join(sorted(unset))})" if unset else "none set"
    settings = "; ".join(f"{name}={value}" for name, value in kept.items()) or "none"
    rounds = sorted({one["rounds"] for one in lines})
    text = [
        "Microseconds a training step (relu, cross-entropy, plain SGD, fp32): the median and, for "
        f"{PEERS[REFERENCE].label}, the 20th to 80th percentile. For the others the factor is their time over "
        f"{PEERS[REFERENCE].label}'s in the same round: the median and, in brackets, the 20th to 80th percentile.",
        f"{' or '.join(map(str, rounds))} interleaved rounds, each peer in a process of its own with its default "
        "threads, compilation and a first epoch not timed; all start from the same parameters, and after one epoch "
        f"of the same batches their losses differ by at most {max(one['loss_difference'] for one in lines):.0e} of "
        "what the epoch gained.",
        f"{box['cpu']}, {box['cores']} cores{memory}, {box['system']}; {shown}; BLAS: {_blas(line)}; OPENBLAS_* "
        f"variables: {openblas}; other thread settings: {settings}; {line['date'][:10]}. Again with `python -m bench`.",
    ]
    return "\n\n".join(text)


def _blas(line: Record) -> str:
    """The BLAS in the reference's process (or the first peer's), with its kernels and threads."""
    pools = line["thread_pools"]
    chosen = pools.get(REFERENCE, next(iter(pools.values())))
    found = [
        f"{pool['internal_api']} {pool['version']} ({pool['architecture']}, {pool['num_threads']} threads)"
        for pool in chosen
        if pool["user_api"] == "blas"
    ]
    return " and ".join(dict.fromkeys(found)) or "none found"
