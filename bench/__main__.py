"""``python -m bench``, from the repository's root."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from bench.cases import CASES
from bench.measure import DisagreementError, measure, started
from bench.peers import PEERS, REFERENCE, missing_packages
from bench.report import circumstances, default_path, markdown, newest, read, records, write
from bench.tune import main as tune
from bench.worker import Worker, WorkerError, openblas_settings


def parser() -> argparse.ArgumentParser:
    """The options."""
    made = argparse.ArgumentParser(
        prog="python -m bench",
        description="Time a training step of fusemlp and of other libraries, side by side. The table goes to stdout, "
        "progress to stderr, the figures with machine and versions to a file of JSON lines. About twelve minutes "
        "for everything, on a machine that does nothing else. Needs pip install 'fusemlp[bench]'.",
        epilog="python -m bench tune: measure the tiles of the Triton kernels on a card; see python -m bench tune -h.",
    )
    made.add_argument(
        "--cases",
        type=lambda text: _chosen(text, CASES, "case"),
        default=list(CASES),
        metavar="A,B",
        help=f"which networks, widths@batch: {', '.join(CASES)} (default: all)",
    )
    made.add_argument(
        "--peers",
        type=lambda text: _chosen(text, PEERS, "peer"),
        default=list(PEERS),
        metavar="A,B",
        help=f"which libraries: {', '.join(PEERS)} (default: all); factors need {REFERENCE}, which is fusemlp",
    )
    made.add_argument("--repeats", type=_count, default=25, metavar="N", help="rounds of a case (default: %(default)s)")
    made.add_argument("--out", type=Path, metavar="FILE", help="add the JSON lines to FILE (default: a new file)")
    other = made.add_mutually_exclusive_group()
    other.add_argument(
        "--markdown",
        nargs="?",
        type=Path,
        const=Path(),
        metavar="FILE",
        help="measure nothing: print the table of FILE (default: the newest in bench/results)",
    )
    other.add_argument(
        "--breakdown", action="store_true", help="time every call of fusemlp's step by itself; no peers, no file"
    )
    return made


def _chosen(text: str, known: Mapping[str, object], what: str) -> list[str]:
    names = [name.strip() for name in text.split(",") if name.strip()]
    unknown = [name for name in names if name not in known]
    if unknown or not names:
        raise argparse.ArgumentTypeError(f"unknown {what} {', '.join(unknown) or text!r}; there are {', '.join(known)}")
    return list(dict.fromkeys(names))


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 1, got {text!r}")
    return int(text)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    given = sys.argv[1:] if arguments is None else list(arguments)
    if given[:1] == ["tune"]:
        return tune(given[1:])
    options = parser().parse_args(given)
    try:
        if options.markdown is not None:
            return print_table(options.markdown)
        if options.breakdown:
            return print_breakdown(options.cases)
        return compare(options.cases, options.peers, options.repeats, options.out or default_path())
    except (DisagreementError, WorkerError) as error:
        say(f"error: {error}")
        return 1
    except KeyboardInterrupt:
        say("interrupted; the cases that were finished are in the file")
        return 130


def say(text: str) -> None:
    """A line on stderr."""
    print(f"bench: {text}", file=sys.stderr, flush=True)


def compare(cases: Sequence[str], peers: Sequence[str], repeats: int, path: Path) -> int:
    """Measure, write the lines to ``path`` case by case, print the table."""
    missing = missing_packages(peers)
    if missing:
        say(
            f"error: not installed: {', '.join(missing)}; get what is missing with pip install 'fusemlp[bench]', "
            "or choose with --peers what to compare"
        )
        return 2
    unset = openblas_settings()
    if unset:
        say(f"{', '.join(sorted(unset))}: unset for this run, to measure the BLAS that people have")
    lines = []
    with started(peers) as workers:
        for name in cases:
            results = measure(CASES[name], workers, repeats=repeats, progress=say)
            environments = {peer: worker.ask("environment") for peer, worker in workers.items()}
            found = records(results, circumstances(environments, unset))
            write(found, path)
            lines += found
    print(markdown(lines))
    say(f"figures in {path}")
    return 0


def print_table(path: Path) -> int:
    """The table of a file, or of the newest."""
    chosen = newest() if path == Path() else path
    if chosen is None or not chosen.is_file():
        say(f"error: no measurement {'in bench/results' if chosen is None else chosen}; run python -m bench first")
        return 2
    print(markdown(read(chosen)))
    return 0


def print_breakdown(cases: Sequence[str]) -> int:
    """Where fusemlp's step spends its time."""
    from bench.breakdown import breakdown_text

    with Worker(REFERENCE) as worker:
        for name in cases:
            case = CASES[name]
            steps = max(30, min(2000, int(2e10 / case.flops)))
            print(breakdown_text(worker.ask("breakdown", case, steps)), end="\n\n", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
