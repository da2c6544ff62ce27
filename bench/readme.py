"""Write the measured tables of README.md and bench/README.md from committed results: ``python -m bench readme``.

A table stands between ``<!-- bench FILE.jsonl -->`` and ``<!-- /bench -->``. FILE is in bench/results; ``python -m
bench`` or one of its other commands wrote it. A mark may choose some rows and columns of a comparison:
``<!-- bench FILE.jsonl cases=64-32-10@32,784-10-10@32 peers=engine,torch_eager -->``.

The command writes every table anew. With a file as argument, that file replaces the marked files of the same kind:
of the same door or study, or of the same number of processes that spun beside the contenders.
``--check`` changes nothing and reports whether the tables agree with the results.
"""

from __future__ import annotations

import argparse
import importlib
import re
import sys
from collections.abc import Sequence
from pathlib import Path

from bench import doors, study
from bench.cases import CASES
from bench.hardware import ROOT
from bench.report import RESULTS, Record, busy_of, case_label, markdown, read

PAGES = (ROOT / "README.md", ROOT / "bench" / "README.md")
MARKED = re.compile(
    r"<!-- bench (?P<file>[\w.-]+\.jsonl)(?P<choice>(?: \w+=\S+)*) -->\n(?P<table>.*?)(?=<!-- /bench -->)", re.DOTALL
)
FILTERS = {"cases": "case", "peers": "peer"}
UNMEASURED = "not yet measured on a GPU"
EXAMPLES = """\
examples:
  python -m bench readme                                write the tables of the results named in the marks
  python -m bench readme bench/results/NEW.jsonl        use these results instead
  python -m bench readme --check                        exit code 1 if a table differs from its results
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    made = argparse.ArgumentParser(
        prog="python -m bench readme",
        description=(__doc__ or "").split("\n")[0],
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    made.add_argument("file", nargs="?", type=Path, help="results in bench/results that replace those of their kind")
    made.add_argument("--check", action="store_true", help="change nothing; exit code 1 if a table differs")
    options = made.parse_args(sys.argv[1:] if arguments is None else list(arguments))
    try:
        if options.file is not None and options.file.resolve().parent != RESULTS:
            raise ValueError(f"{options.file}: expected a file in {RESULTS}, where the pages' results are committed")
        before = {page: page.read_text(encoding="utf-8") for page in PAGES}
        after = {page: written(text, options.file, page.name) for page, text in before.items()}
    except (OSError, ValueError) as error:
        print(f"bench readme: {error}", file=sys.stderr)
        return 2
    for page in PAGES:
        shown = page.relative_to(ROOT) if page.is_relative_to(ROOT) else page
        if before[page] == after[page]:
            print(f"{shown} agrees with the results")
        elif options.check:
            print(f"{shown} does not agree with the results: run python -m bench readme", file=sys.stderr)
        else:
            page.write_text(after[page], encoding="utf-8")
            print(f"{shown}: tables written")
    return int(options.check and before != after)


def written(text: str, file: Path | None = None, name: str = "README.md") -> str:
    """Return the text with every marked table made from its results; ``file`` replaces the results of its kind.

    Raises ValueError if the text has no marked table or a mark has an unknown filter, OSError for unreadable results.
    """
    if not MARKED.search(text):
        raise ValueError(f"{name} has no table between <!-- bench FILE.jsonl --> and <!-- /bench -->")

    def table(found: re.Match[str]) -> str:
        path = RESULTS / found["file"]
        if file is not None and kind(path) == kind(file):
            path = file
        return f"<!-- bench {path.name}{found['choice']} -->\n{section(path, found['choice'])}\n"

    return MARKED.sub(table, text)


def kind(path: Path) -> str:
    """Return the name of the door or study that wrote the file; "" for ``python -m bench``, "busy N" with --busy."""
    first = read(path)[0] if path.is_file() else {}
    busy = f"busy {first['busy']}" if first.get("busy") else ""
    return str(first.get("door", first.get("study", busy)))


def section(path: Path, choice: str = "") -> str:
    """Return the tables and captions of some results; a full comparison also lists what no GPU has measured."""
    lines = read(path)
    if choice:
        return markdown(chosen(lines, choice))
    if "study" in lines[0]:
        module = importlib.import_module(f"bench.{lines[0]['study']}")
        return f"{module.text(lines)}\n\n{study.caption(lines[0])}"
    if "door" in lines[0]:
        from bench import fleet_search

        return fleet_search.table(lines) if lines[0]["door"] == fleet_search.DOOR else doors.table(lines)
    if busy_of(lines) or any(line.get("card") for line in lines):
        return markdown(lines)
    rows = ["the networks above", *(case_label(vars(case)) for case in CASES.values() if case.gpu_only)]
    unmeasured = "\n".join(f"| {row} | {UNMEASURED} |" for row in rows)
    return f"{markdown(lines)}\n\n| on a GPU | fusemlp |\n|---|---|\n{unmeasured}"


def chosen(lines: Sequence[Record], choice: str) -> list[Record]:
    """Return the lines that a mark's filters keep, such as ``cases=64-32-10@32 peers=engine,torch_eager``.

    Raises ValueError for a filter other than cases and peers, and for a name without a line.
    """
    kept = list(lines)
    for words in choice.split():
        name, _, listed = words.partition("=")
        if name not in FILTERS:
            raise ValueError(f"{words}: expected cases=NAME,... or peers=NAME,... in a mark")
        names = listed.split(",")
        if missing := set(names) - {line.get(FILTERS[name]) for line in lines}:
            raise ValueError(f"{words}: the results have no {', '.join(sorted(missing))}")
        kept = [line for line in kept if line[FILTERS[name]] in names]
    return kept


if __name__ == "__main__":
    sys.exit(main())
