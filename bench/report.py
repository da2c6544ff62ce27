"""The report of a measurement: JSON lines with machine and versions, and Markdown tables."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from bench import hardware
from bench.hardware import THREAD_VARIABLES, machine
from bench.measure import ABSENT, FAILED, PAUSE_SECONDS, REFUSED, TIMED, UNSUITED, Result
from bench.oracle import FEW_ROWS, MOST_FLOPS
from bench.peers import EPS, PEERS, reference_of

__all__ = ["RESULTS", "THREAD_VARIABLES", "Record", "machine", "markdown", "read", "records", "write"]

RESULTS = Path(__file__).parent / "results"
Record = dict[str, Any]
NAMES = {"sklearn": "scikit-learn", "torch": "PyTorch", "jax": "JAX", "numpy": "NumPy", "scipy": "SciPy"}


def circumstances(environments: dict[str, dict[str, Any]], unset: dict[str, str], busy: int = 0) -> dict[str, Any]:
    """Return machine, versions and settings: the part that every line of a report shares.

    ``environments``: version and thread pools of each contender's process. ``unset``: the OPENBLAS_* variables of this
    process, which the workers do not inherit. ``busy``: processes that spun beside each contender.
    """
    import numpy
    import scipy

    versions = {"numpy": numpy.__version__, "scipy": scipy.__version__}
    versions |= {PEERS[name].package: found["version"] for name, found in environments.items()}
    common = hardware.circumstances(versions)
    return {
        **common,
        "thread_pools": {name: found["pools"] for name, found in environments.items()},
        "instruction_sets": {name: found["instruction_sets"] for name, found in environments.items()},
        "variables": {name: value for name, value in common["variables"].items() if name not in unset},
        "openblas_variables_unset": unset,
        "pause_seconds": PAUSE_SECONDS,
        "busy": busy,
    }


def records(results: Sequence[Result], common: dict[str, Any]) -> list[Record]:
    """Return a line for each contender of a case; ``ratio``: its time over the reference's, None without one."""
    timed = [result for result in results if result.status == TIMED]
    reference = next((result for result in timed if result.peer == reference_of(result.case)), None)
    lines = []
    for result in results:
        case, verdict = result.case, result.verdict
        line: Record = {
            "case": case.name,
            "sizes": list(case.sizes),
            "batch_size": case.batch_size,
            "activation": case.activation,
            "loss": case.loss,
            "optimizer": case.optimizer,
            "dropout": case.dropout,
            "precision": case.precision,
            "models": case.models,
            "device": case.device,
            "rows": case.rows,
            "steps_per_epoch": case.steps,
            "learning_rate": case.learning_rate,
            "flops": case.flops,
            "peer": result.peer,
            "label": PEERS[result.peer].label,
            "status": result.status,
            "reason": result.reason,
        }
        if verdict is not None:
            line["difference_of_tolerance"] = verdict.worst
            line["first_differing_step"] = verdict.step
        if result.loaded is not None:
            line["plan"] = result.loaded.chosen
            line["first_epoch_seconds"] = round(result.loaded.seconds, 4)
        if result.status == TIMED:
            line |= {
                "rounds": len(result.seconds),
                "epochs_per_turn": result.epochs,
                "microseconds": asdict(result.microseconds),
                "ratio": None if reference is None else asdict(result.ratios(reference)),
                "every_round": [round(1e6 * seconds, 4) for seconds in result.seconds],
            }
        lines.append({**line, **common})
    return lines


def absences(reasons: dict[str, str], common: dict[str, Any]) -> list[Record]:
    """Return a line, with the reason, for each contender that cannot run here."""
    return [
        {"case": None, "peer": name, "label": PEERS[name].label, "status": ABSENT, "reason": reason, **common}
        for name, reason in reasons.items()
    ]


def write(lines: Iterable[Record], path: Path) -> None:
    """Append lines to a file; make its folder if needed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        for line in lines:
            file.write(json.dumps(line) + "\n")


def read(path: Path) -> list[Record]:
    """Return the lines of a file that ``write`` wrote."""
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    # The oldest files have only timed lines, without a status.
    return [{"status": TIMED, "models": None, **line} for line in lines]


def default_path(busy: int = 0) -> Path:
    """Return the path of a new file in ``bench/results``, named by the time."""
    return RESULTS / f"{datetime.now(UTC):%Y%m%dT%H%M%SZ}{f'-busy-{busy}' if busy else ''}.jsonl"


def busy_of(lines: Sequence[Record]) -> int:
    """Return how many processes spun beside each contender of a file."""
    return int(lines[0].get("busy", 0))


def beside(line: Record) -> str:
    """Say what ran beside each contender, and how all were limited."""
    busy = line.get("busy", 0)
    text = f"beside {busy} spinning process{'es' if busy > 1 else ''}" if busy else "with nothing beside"
    return f"{text}, limited to {line['isa']}" if line.get("isa") else text


def newest() -> Path | None:
    """Return the newest comparison in ``bench/results``, or None."""
    return max(
        (path for path in RESULTS.glob("*.jsonl") if '"peer":' in path.open(encoding="utf-8").readline()), default=None
    )


def timed(lines: Sequence[Record]) -> list[Record]:
    """Return the lines with figures."""
    return [line for line in lines if line["status"] == TIMED]


def by_case(lines: Sequence[Record]) -> dict[str, dict[str, Record]]:
    """Return for each case the lines of its contenders by name, in the order of the file."""
    found: dict[str, dict[str, Record]] = {}
    for line in lines:
        found.setdefault(line["case"], {})[line["peer"]] = line
    return found


def markdown(lines: Sequence[Record]) -> str:
    """Return the tables of a measurement and, below them, machine, versions and method."""
    of_cases = [line for line in lines if line["status"] != ABSENT]
    parts = []
    for chosen in (
        [line for line in of_cases if line["models"] is None],
        [line for line in of_cases if line["models"] is not None],
    ):
        if any(line["status"] != UNSUITED for line in chosen):
            parts.append(_table(chosen))
    if timed(lines):
        parts.append(_caption(lines))
    if notes := _notes(lines):
        parts.append("\n".join(notes))
    return "\n\n".join(parts)


def brief(lines: Sequence[Record]) -> str:
    """Return the medians of a measurement as a table for a first page, and a caption of one paragraph."""
    line = timed(lines)[0]
    made = f", commit {line['commit']}" if line.get("commit") else ""
    caption = (
        "Microseconds per training step, with relu, cross-entropy, plain SGD and fp32 unless the row says otherwise, "
        f"and how many times fusemlp's that is. {line['machine']['cpu']}, {line['machine']['cores']} cores; "
        f"{line['date'][:10]}{made}. To repeat: `python -m bench`."
    )
    return f"{_table(lines, _brief_cell)}\n\n{caption}"


def _table(lines: Sequence[Record], cell: Callable[[Record | None], str] | None = None) -> str:
    cell = cell or _cell
    shown = [line for line in lines if line["status"] != UNSUITED]
    peers = [peer for peer in PEERS if any(line["peer"] == peer for line in shown)]
    labels = {line["peer"]: line["label"] for line in shown}
    fleets = lines[0]["models"] is not None
    rows = [
        f"| {'models, network' if fleets else 'network'}, batch | " + " | ".join(labels[peer] for peer in peers) + " |",
        "|---|" + "---:|" * len(peers),
    ]
    for found in by_case(shown).values():
        rows.append(
            "| "
            + " | ".join(
                [case_label(next(iter(found.values()))), *(cell(found.get(peer)) for peer in peers)],
            )
            + " |"
        )
    return "\n".join(rows)


def case_label(line: Record) -> str:
    """Return the label of a case's row, such as 784-10-10, 32, Adam."""
    models = "" if line["models"] is None else f"{line['models']:,} x "
    parts = [f"{models}{'-'.join(map(str, line['sizes']))}", str(line["batch_size"])]
    if line.get("activation", "relu") != "relu":
        parts.append(line["activation"])
    if line.get("loss", "cross_entropy") != "cross_entropy":
        parts.append(line["loss"])
    if line.get("optimizer", "sgd") != "sgd":
        parts.append("Adam")
    if line.get("dropout"):
        parts.append(f"dropout {line['dropout']:g}")
    if line.get("precision", "fp32") != "fp32":
        parts.append(line["precision"])
    return ", ".join(parts)


def _cell(line: Record | None) -> str:
    if line is None:
        return "-"
    if line["status"] != TIMED:
        return line["status"]
    time, ratio = microseconds(line["microseconds"]["p50"]), line["ratio"]
    if ratio is None or is_reference(line):
        spread = line["microseconds"]
        share = f"; {line['flops'] / line['microseconds']['p50'] / 10 / line['peak']:.0f} %" if line.get("peak") else ""
        return f"{time} ({microseconds(spread['p20'])} to {microseconds(spread['p80'])}{share})"
    return f"{time}, **{ratio['p50']:.2f}x** ({ratio['p20']:.2f} to {ratio['p80']:.2f})"


def _brief_cell(line: Record | None) -> str:
    if line is None or line["status"] != TIMED:
        return _cell(line)
    time, ratio = microseconds(line["microseconds"]["p50"]), line["ratio"]
    return f"**{time}**" if ratio is None or is_reference(line) else f"{time} ({ratio['p50']:.3g}x)"


def is_reference(line: Record) -> bool:
    """Return whether the other lines of the case are compared with this one."""
    return bool(line["peer"] == ("engine" if line["models"] is None else "fleet"))


def microseconds(value: float) -> str:
    """Return the value with three digits, or rounded to an integer."""
    return f"{value:.2f}" if value < 10 else f"{value:.1f}" if value < 100 else f"{value:,.0f}"


def where(line: Record) -> str:
    """Return processor and card of a line."""
    box = line["machine"]
    memory = "" if box["memory_gib"] is None else f", {box['memory_gib']:.0f} GiB"
    found = line.get("card")
    shown = f"{found['name']} (driver {found['driver']})" if found else "no GPU"
    return f"{box['cpu']}, {box['cores']} cores{memory}, {box['system']}, {shown}"


def _caption(lines: Sequence[Record]) -> str:
    measured = timed(lines)
    line = measured[0]
    versions: dict[str, str] = {}
    for one in measured:
        versions |= one["versions"]
    shown = ", ".join(f"{NAMES.get(name, name)} {version}" for name, version in versions.items())
    unset, kept = line["openblas_variables_unset"], line["variables"]
    openblas = f"unset for the run ({', '.join(sorted(unset))})" if unset else "none set"
    named = "; ".join(f"{name}={value}" for name, value in kept.items()) or "none"
    rounds = sorted({one["rounds"] for one in measured})
    made = f", commit {line['commit']}" if line.get("commit") else ""
    busy = busy_of(measured)
    limits = (f" --busy {busy}" if busy else "") + (f" --isa {line['isa']}" if line.get("isa") else "")
    spun = f"Each turn ran {beside(line)}. " if busy or line.get("isa") else ""
    each = " of a model" if any(one["models"] is not None for one in measured) else ""
    text = [
        f"Microseconds per training step{each}, with relu, cross-entropy, plain SGD and fp32 unless the row says "
        "otherwise. First column: median (20th to 80th percentile). Others: median time, and in bold its ratio to the "
        "first column in the same round (20th to 80th percentile). A ratio above 1 means that fusemlp is faster.",
        *_peak(line),
        f"{' or '.join(map(str, rounds))} interleaved rounds. Each contender runs in its own process with its default "
        f"threads; compilation and a first epoch are not timed. {spun}{_agreement(measured)}",
        f"{where(line)}; {shown}; BLAS: {_blas(line)}; OPENBLAS_* variables: {openblas}; other settings: {named}; "
        f"{line['date'][:10]}{made}. To repeat: `python -m bench{limits}`.",
    ]
    return "\n\n".join(text)


def _peak(line: Record) -> list[str]:
    """Say what a share of the peak is, and for which contenders the limit of the instruction set was verified."""
    if not line.get("peak"):
        return []
    text = f"Percentages are of {line['peak']:.0f} GFLOP/s: a loop of multiply-adds in as many threads."
    if line.get("isa"):
        text += f" Limited to {line['isa']}; "
        confirmed = [f"{name} {isa}" for sets in line["instruction_sets"].values() for name, isa in sets.items()]
        if all("CPUID" in sets for sets in line["instruction_sets"].values()):
            return [f"{text}CPUID hides what is wider from every contender."]
        blas = {
            pool["architecture"] for pools in line["thread_pools"].values() for pool in pools if pool["architecture"]
        }
        named = [*dict.fromkeys(confirmed), *(f"OpenBLAS {name}" for name in sorted(blas))]
        text += f"verified by the library's own word for: {', '.join(named)}."
    return [text]


def _agreement(measured: Sequence[Record]) -> str:
    """Say how the contenders were checked to do equal work."""
    if "loss_difference" in measured[0]:
        most = max(one["loss_difference"] for one in measured)
        return (
            "All start from the same parameters. After one epoch of the same batches their losses differ by at most "
            f"{most:.0e} of the epoch's gain."
        )
    most = max(one["difference_of_tolerance"] for one in measured)
    large = any(one["flops"] > MOST_FLOPS for one in measured)
    small = f" (on {FEW_ROWS} rows if a step has more than {MOST_FLOPS:.0e} operations)" if large else ""
    return (
        "Before timing, each contender's losses over 20 steps from the same parameters and batches were compared with "
        f"a float64 oracle{small}. The largest difference is {most:.2f} of the rounding bound."
    )


def _notes(lines: Sequence[Record]) -> list[str]:
    """Return notes: the plan, missing figures with reasons, and contenders with different mathematics."""
    notes = []
    chosen = {line["label"]: line["plan"] for line in timed(lines) if line.get("plan") and is_reference(line)}
    if chosen:
        notes.append("- " + "; ".join(f"{label}: plan {plan}" for label, plan in chosen.items()) + ".")
    for line in lines:
        if line["status"] in (REFUSED, FAILED):
            notes.append(f"- {line['status']}: {line['label']} on {case_label(line)}: {line['reason']}.")
    differing: dict[str, list[str]] = {}
    for line in timed(lines):
        text = PEERS[line["peer"]].differs if line["peer"] in PEERS else ""
        if text and (text != EPS or line.get("optimizer") == "adam"):
            differing.setdefault(text, []).append(line["label"])
    notes += [f"- {' and '.join(dict.fromkeys(labels))}: {text}." for text, labels in differing.items()]
    reasons: dict[str, list[str]] = {}
    for line in lines:
        if line["status"] == ABSENT:
            reasons.setdefault(line["reason"], []).append(line["label"])
    if reasons:
        listed = "; ".join(f"{', '.join(labels)} ({reason})" for reason, labels in reasons.items())
        notes.append(f"- Absent: {listed}.")
    return notes


def _blas(line: Record) -> str:
    """Return the BLAS of the reference's process (or the first contender's), with its kernels and threads."""
    pools = line["thread_pools"]
    chosen = next((pools[name] for name in ("engine", "fleet") if name in pools), next(iter(pools.values())))
    found = [
        f"{pool['internal_api']} {pool['version']} ({pool['architecture']}, {pool['num_threads']} threads)"
        for pool in chosen
        if pool["user_api"] == "blas"
    ]
    return " and ".join(dict.fromkeys(found)) or "none found"
