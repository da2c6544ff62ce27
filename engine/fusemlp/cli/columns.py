"""Show what each column of a table became, and keep it in the run folder."""

from __future__ import annotations

import csv
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from fusemlp.describe.summary import aligned
from fusemlp.report.runs import Run, csv_bytes, guarded, write_training_rows
from fusemlp.runtime.files import write_atomically
from fusemlp.tables.preparation import Prepared

# A wider table is summed up.
MOST_PRINTED = 24


def records(prepared: Prepared) -> list[dict[str, Any]]:
    """Return for each column of a table its name, what it became, its number of inputs, missing share and a note.

    The list is empty for data without named columns.
    """
    made = prepared.preprocessor
    inputs: Counter[str] = Counter()
    for name, width in zip(made.sources, made.widths, strict=True):
        inputs[name] += width
    return [
        {
            "column": role.name,
            "became": role.kind,
            "inputs": inputs[role.name],
            "missing": role.missing,
            "note": role.note,
        }
        for role in prepared.dataset.roles
    ]


def lines(found: Sequence[Mapping[str, Any]], run: Run) -> list[str]:
    """Return ``records`` as aligned text; of a wide table the number of columns of each kind, and the file of all."""
    if not found:
        return []
    if len(found) <= MOST_PRINTED:
        rows = [["column", "became", "inputs", "missing"]]
        for one in found:
            became = f"{one['became']} ({one['note']})" if one["note"] else one["became"]
            missing = f"{one['missing']:.1%}" if one["missing"] else ""
            rows.append([one["column"], became, str(one["inputs"] or ""), missing])
        return aligned(rows, left=2).split("\n")
    counts = Counter(one["became"] for one in found)
    inputs: Counter[str] = Counter()
    for one in found:
        inputs[one["became"]] += one["inputs"]
    parts = [
        f"{count} {kind}{f' ({inputs[kind]} inputs)' if inputs[kind] else ''}" for kind, count in counts.most_common()
    ]
    return [f"{len(found)} columns: {', '.join(parts)}; each in {run.columns}"]


def stored(run: Run) -> list[dict[str, Any]]:
    """Return the ``records`` in the folder of a run, none if it has no such file."""
    if not run.columns.exists():
        return []
    with run.columns.open(encoding="utf-8", newline="") as stream:
        found: list[dict[str, Any]] = list(csv.DictReader(stream))
    for one in found:
        one |= {name: cell[1:] if guarded(cell[1:]) == cell else cell for name, cell in one.items()}
        one["inputs"] = int(one["inputs"])
        one["missing"] = float(one["missing"]) if one["missing"] else None
    return found


def write(prepared: Prepared, run: Run) -> None:
    """Write ``columns.csv``, for a table, and the hashes of the training rows."""
    found = records(prepared)
    if found:
        rows = [["" if value is None else value for value in one.values()] for one in found]
        write_atomically(run.columns, csv_bytes([list(found[0]), *rows]))
    write_training_rows(run, prepared.hashes())
