"""The measured tables of README.md, from committed results: ``python -m bench readme``.

A table stands between ``<!-- bench FILE.jsonl -->`` and ``<!-- /bench -->``, FILE being in bench/results, of
``python -m bench`` or of a door. The command writes it anew; given a file, it puts that in the place of the one of its
kind. ``--check`` changes nothing and says whether the tables agree with the results.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Sequence
from pathlib import Path

from bench import doors
from bench.cases import CASES
from bench.hardware import ROOT
from bench.report import RESULTS, case_label, markdown, read

README = ROOT / "README.md"
MARKED = re.compile(r"(<!-- bench (?P<file>[\w.-]+\.jsonl) -->\n)(?P<table>.*?)(?=<!-- /bench -->)", re.DOTALL)
UNMEASURED = "not yet measured on a GPU"
EXAMPLES = """\
examples:
  python -m bench readme                                write the tables of the results named in README.md
  python -m bench readme bench/results/NEW.jsonl        from these results instead
  python -m bench readme --check                        exit code 1 if README.md says something else
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    made = argparse.ArgumentParser(
        prog="python -m bench readme",
        description=(__doc__ or "").split("\n")[0],
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    made.add_argument("file", nargs="?", type=Path, help="results in bench/results, in place of those named there")
    made.add_argument("--check", action="store_true", help="change nothing; exit code 1 where they disagree")
    options = made.parse_args(sys.argv[1:] if arguments is None else list(arguments))
    before = README.read_text(encoding="utf-8")
    try:
        after = written(before, options.file)
    except (OSError, ValueError) as error:
        print(f"bench readme: {error}", file=sys.stderr)
        return 2
    if before == after:
        print("README.md agrees with the results")
        return 0
    if options.check:
        print("README.md does not agree with the results: run python -m bench readme", file=sys.stderr)
        return 1
    README.write_text(after, encoding="utf-8")
    print("README.md: tables written")
    return 0


def written(text: str, file: Path | None = None) -> str:
    """The text with its tables made from the results, those of ``file`` in the place of others of their kind.

    Raises ValueError if there is no marked table, or ``file`` is not in bench/results; OSError for results that cannot
    be read.
    """
    if not MARKED.search(text):
        raise ValueError("README.md has no table between <!-- bench FILE.jsonl --> and <!-- /bench -->")
    if file is not None and file.resolve().parent != RESULTS:
        raise ValueError(f"{file}: expected a file in {RESULTS}, which is committed with the README")

    def table(found: re.Match[str]) -> str:
        name = found["file"]
        if file is not None and kind(RESULTS / name) == kind(file):
            name = file.name
        return f"<!-- bench {name} -->\n{section(RESULTS / name)}\n"

    return MARKED.sub(table, text)


def kind(path: Path) -> str:
    """What was measured: "" by ``python -m bench``, else the name of the door."""
    return str(read(path)[0].get("door", "")) if path.is_file() else ""


def section(path: Path) -> str:
    """The tables of some results, and what of the cases no card has been measured on."""
    lines = read(path)
    if "door" in lines[0]:
        from bench import fleet_search

        return fleet_search.table(lines) if lines[0]["door"] == fleet_search.DOOR else doors.table(lines)
    if any(line.get("card") for line in lines):
        return markdown(lines)
    rows = ["the networks above", *(case_label(vars(case)) for case in CASES.values() if case.gpu_only)]
    unmeasured = "\n".join(f"| {row} | {UNMEASURED} |" for row in rows)
    return f"{markdown(lines)}\n\n| on a GPU | fusemlp |\n|---|---|\n{unmeasured}"


if __name__ == "__main__":
    sys.exit(main())
