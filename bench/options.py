"""The options of ``python -m bench``."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from bench.cases import CASES, QUICK, parsed
from bench.peers import PEERS
from bench.processor import SETTINGS
from bench.study import count
from fusemlp_kernels.errors import unknown_name

# Each name is a module with a ``main``.
COMMANDS = {
    "compare": "find what became slower from one file of figures to another",
    "readme": "write the tables of the README pages from committed results, or check them",
    "sklearn_door": "time a fit of scikit-learn's estimators and of fusemlp's",
    "torch_door": "time a training step of eager PyTorch and the fused one",
    "tables": "score fusemlp train with its defaults on real tables, beside scikit-learn's models",
    "trees": "measure fusemlp train and LightGBM's five folds as whole commands, on one thread",
    "generate": "write the generated table for trees",
    "roofline": "compare each call of a step with the limits of the hardware",
    "kernels": "compare each kernel with the vendor's product and the unfused sequence",
    "overhead": "measure the cost of a step, an epoch and an import without the work; memory",
    "ppo": "train PPO on CartPole beside stable-baselines3",
    "host": "measure the host's work for a GPU, without one",
    "tune": "measure the tiles of the Triton kernels on a card",
}
# Studies that have ended: the page keeps their figures, and this commit has their scripts.
ENDED = ("trust", "fleet_search", "examples", "time_to_result", "scale", "table_memory")
LAST = "fe76c384"
EXAMPLES = f"""\
examples:
  python -m bench --quick                       five networks, three rounds: under two minutes
  python -m bench                               everything; over half an hour on two idle cores
  python -m bench --case {QUICK[1]} --peer engine --peer jax_scan
  python -m bench --busy 1 --peer engine,jax_scan,torch_eager
                                                one other process spins beside each contender
  python -m bench --list                        the networks and contenders, and the reason if one cannot run here
  python -m bench --markdown                    print the tables of the newest file, measure nothing
  python -m bench compare before.jsonl after.jsonl

other commands, each with a --help of its own:
""" + "\n".join(f"  python -m bench {name:20s} {text}" for name, text in COMMANDS.items())


def parser() -> argparse.ArgumentParser:
    """Return the options."""
    made = argparse.ArgumentParser(
        prog="python -m bench",
        description="Time a training step of fusemlp and of other libraries, in turn, after a check that they\n"
        "compute the same. The tables go to stdout, progress to stderr, the figures with\n"
        "machine and versions to a file of JSON lines, of many models a picture beside it. What is not installed is\n"
        'listed with how to get it: pip install "fusemlp[bench]" brings most.',
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    made.add_argument(
        "--case",
        "--cases",
        dest="cases",
        action="extend",
        type=names("case", CASES, parsed),
        metavar="NAME",
        help="networks by name, with commas or with --case again (default: all; see --list); also any other, such as "
        "300-200-10@64:adam",
    )
    made.add_argument(
        "--peer",
        "--peers",
        dest="peers",
        action="extend",
        type=names("peer", PEERS),
        metavar="NAME",
        help="contenders, in the same way (default: all); factors need engine, and fleet for many models",
    )
    made.add_argument("--quick", action="store_true", help="few networks, rounds and contenders, short turns")
    made.add_argument(
        "--busy",
        type=count,
        default=0,
        metavar="N",
        help="N processes spin beside each contender during its turns (default: none)",
    )
    made.add_argument(
        "--isa",
        choices=[*SETTINGS],
        help="limit all contenders to this instruction set (default: the processor's own)",
    )
    made.add_argument("--repeats", type=count, metavar="N", help="rounds of a case (default: 11, with --quick 3)")
    made.add_argument("--minutes", type=float, metavar="N", help="begin no case after this time (default: no limit)")
    made.add_argument("--resume", action="store_true", help="leave out the cases that --out FILE has already")
    made.add_argument("--device", choices=("auto", "cpu", "gpu"), default="auto", help="(default: the card, if any)")
    made.add_argument("--out", type=Path, metavar="FILE", help="add the JSON lines to FILE (default: a new file)")
    made.add_argument("--json", action="store_true", help="print one JSON object in place of the tables")
    made.add_argument("--no-plots", dest="plots", action="store_false", help="draw no picture")
    other = made.add_mutually_exclusive_group()
    other.add_argument("--list", action="store_true", help="measure nothing: list networks and contenders")
    other.add_argument(
        "--markdown",
        nargs="?",
        type=Path,
        const=Path(),
        metavar="FILE",
        help="measure nothing: print the tables of FILE (default: the newest in bench/results)",
    )
    return made


def names(what: str, known: Iterable[str], parse: Callable[[str], Any] | None = None) -> Callable[[str], list[str]]:
    """Return an ``argparse`` type for comma-separated names; the error for an unknown one suggests the nearest.

    ``parse`` raises ValueError unless a text that is not ``known`` is a name all the same.
    """
    valid = list(known)

    def chosen(text: str) -> list[str]:
        given = list(dict.fromkeys(name.strip() for name in text.split(",") if name.strip()))
        for name in given:
            if name not in valid:
                try:
                    if parse is None:
                        raise unknown_name(what, name, valid)
                    parse(name)
                except ValueError as error:
                    raise argparse.ArgumentTypeError(str(error)) from error
        if not given:
            raise argparse.ArgumentTypeError(f"{what}: expected a name, got {text!r}")
        return given

    return chosen
