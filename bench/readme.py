"""Write the measured tables of README.md and bench/README.md from committed results: ``python -m bench readme``.

A table stands between ``<!-- bench FILE.jsonl -->`` and ``<!-- /bench -->``. FILE is in bench/results; ``python -m
bench`` or one of its other commands wrote it. A mark may choose some rows and columns of a comparison:
``<!-- bench FILE.jsonl cases=64-32-10@32,784-10-10@32 peers=engine,torch_eager -->``; ``brief`` leaves medians alone.

The command writes every table anew. With a file as argument, that file replaces the marked files of the same kind:
of the same door or study, or of the same instruction set and number of processes that spun beside the contenders.
``--gpu DIR`` takes the results of ``ci/gpu``: it copies them to bench/results, and writes a section with the card's
name between ``<!-- gpu -->`` and ``<!-- /gpu -->`` of bench/README.md; that of another card stays.
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
from bench.measure import TIMED
from bench.report import RESULTS, Record, brief, busy_of, case_label, markdown, read

PAGES = (ROOT / "README.md", ROOT / "bench" / "README.md")
MARKED = re.compile(
    r"<!-- bench (?P<file>[\w.-]+\.jsonl)(?P<choice>(?: \w+(?:=\S+)?)*) -->\n(?P<table>.*?)(?=<!-- /bench -->)",
    re.DOTALL,
)
GPU = re.compile(r"<!-- gpu -->\n(?P<sections>.*?)<!-- /gpu -->", re.DOTALL)
# The files of ``ci/gpu`` that become tables, in the order of the page, each with its title.
GPU_FILES = {"table*.jsonl": "Training steps", "kernels*.jsonl": "Kernels", "roofline*.jsonl": "Calls of a step"}
FILTERS = {"cases": "case", "peers": "peer"}
UNMEASURED = "not yet measured on a GPU"
EXAMPLES = """\
examples:
  python -m bench readme                                write the tables of the results named in the marks
  python -m bench readme bench/results/NEW.jsonl        use these results instead
  python -m bench readme --gpu build/gpu                add the results of ci/gpu
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
    made.add_argument("--gpu", type=Path, metavar="DIR", help="the folder of ci/gpu, with the figures of a card")
    made.add_argument("--check", action="store_true", help="change nothing; exit code 1 if a table differs")
    options = made.parse_args(sys.argv[1:] if arguments is None else list(arguments))
    try:
        if options.file is not None and options.file.resolve().parent != RESULTS:
            raise ValueError(f"{options.file}: expected a file in {RESULTS}, where the pages' results are committed")
        if options.gpu is not None and options.check:
            raise ValueError("--gpu: it writes files, and --check changes nothing; use one of them")
        before = {page: page.read_text(encoding="utf-8") for page in PAGES}
        given = dict(before)
        if options.gpu is not None:
            given[PAGES[-1]] = with_card(before[PAGES[-1]], options.gpu)
        after = {page: written(text, options.file, page.name) for page, text in given.items()}
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
    """Return the name of the door or study that wrote the file; "" for ``python -m bench``, "avx2 busy N" with options.

    Figures of a card are of a kind with its name, and with the backend and precision of a study.
    """
    first = read(path)[0] if path.is_file() else {}
    busy = f"busy {first['busy']}" if first.get("busy") else ""
    limits = f"{first.get('isa') or ''} {busy}".strip()
    name = str(first.get("door", first.get("study", limits)))
    if first.get("card"):
        studied = f"{first.get('backend')} {first.get('precision')} " if "study" in first else ""
        name = f"{name} {studied}on {first['card']['name']}".strip()
    return name


def with_card(text: str, folder: Path) -> str:
    """Copy the results of ``ci/gpu`` to bench/results; return the page with marks for them in the card's section.

    Raises ValueError if the folder has no results of a card, or the page no place for them.
    """
    files = [(path, title) for pattern, title in GPU_FILES.items() for path in sorted(folder.glob(pattern))]
    found = [(path, title, read(path)[0]) for path, title in files]
    if not found or any(not first.get("card") for _, _, first in found):
        raise ValueError(f"--gpu {folder}: expected the results of ci/gpu on a card, such as table.jsonl")
    place = GPU.search(text)
    if place is None:
        raise ValueError("the page has no <!-- gpu --> with <!-- /gpu --> after it")
    card = found[0][2]["card"]["name"]
    parts = [f"### {card}\n"]
    for path, title, first in found:
        named = re.sub(r"[^a-z0-9]+", "-", f"{card} {path.stem}".lower()).strip("-")
        copy = RESULTS / f"{first['date'][:10]}-{named}.jsonl"
        copy.write_text(path.read_text(encoding="utf-8"), encoding="utf-8")
        studied = f", {first['backend']}, {first['precision']}" if "study" in first else ""
        parts.append(f"#### {title}{studied}\n\n<!-- bench {copy.name} -->\n<!-- /bench -->\n")
    others = [one for one in re.split(r"(?m)^(?=### )", place["sections"]) if one.startswith("### ")]
    kept = [one for one in others if one.partition("\n")[0] != f"### {card}"]
    sections = "".join([*kept, "\n".join(parts) + "\n"])
    return text[: place.start("sections")] + sections + text[place.end("sections") :]


def measured_on_cards() -> set[str]:
    """Return the cases that a card has timed, by the results."""
    lines = (line for path in RESULTS.glob("*.jsonl") for line in read(path))
    return {line["case"] for line in lines if line.get("card") and line.get("peer") and line["status"] == TIMED}


def section(path: Path, choice: str = "") -> str:
    """Return the tables and captions of some results; a full comparison also lists what no GPU has measured."""
    lines = read(path)
    if choice:
        kept = chosen(lines, choice)
        return brief(kept) if "brief" in choice.split() else markdown(kept)
    if "study" in lines[0]:
        module = importlib.import_module(f"bench.{lines[0]['study']}")
        return f"{module.text(lines)}\n\n{study.caption(lines[0])}"
    if "door" in lines[0]:
        return doors.table(lines)
    if busy_of(lines) or lines[0].get("isa") or any(line.get("card") for line in lines):
        return markdown(lines)
    timed = measured_on_cards()
    rows = [case_label(vars(case)) for case in CASES.values() if case.gpu_only and case.name not in timed]
    if not {line["case"] for line in lines if line["case"]} <= timed:
        rows.insert(0, "the networks above")
    if not rows:
        return markdown(lines)
    unmeasured = "\n".join(f"| {row} | {UNMEASURED} |" for row in rows)
    return f"{markdown(lines)}\n\n| on a GPU | fusemlp |\n|---|---|\n{unmeasured}"


def chosen(lines: Sequence[Record], choice: str) -> list[Record]:
    """Return the lines that a mark's filters keep, such as ``cases=64-32-10@32 peers=engine,torch_eager``.

    Raises ValueError for a filter other than cases and peers, and for a name without a line.
    """
    kept = list(lines)
    for words in choice.split():
        if words == "brief":
            continue
        name, _, listed = words.partition("=")
        if name not in FILTERS:
            raise ValueError(f"{words}: expected brief, cases=NAME,... or peers=NAME,... in a mark")
        names = listed.split(",")
        if missing := set(names) - {line.get(FILTERS[name]) for line in lines}:
            raise ValueError(f"{words}: the results have no {', '.join(sorted(missing))}")
        kept = [line for line in kept if line[FILTERS[name]] in names]
    return kept


if __name__ == "__main__":
    sys.exit(main())
