"""The shared parts of the studies: options, machine and versions, files, tables and pictures.

A study is a module with a ``main``, run as ``python -m bench NAME``. It ends in a Markdown table (or, with ``--json``,
in JSON lines) on stdout, in a file of JSON lines and, where matplotlib is installed, in a picture beside that file.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bench import hardware
from bench.cases import Case, parsed
from bench.report import RESULTS, Record, write

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("numpy", "scipy", "numba", "torch", "triton", "cupy", "jax", "scikit-learn", "lightgbm")
# Okabe and Ito's palette for colour-blind readers.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#8A8A8A")
CLOCKS = "clocks.sm,clocks.mem,clocks.max.sm,clocks.max.mem,power.draw,temperature.gpu"


def parser(name: str, description: str) -> argparse.ArgumentParser:
    """Return the options that every study has."""
    made = argparse.ArgumentParser(prog=f"python -m bench {name}", description=description)
    made.add_argument(
        "--out",
        type=Path,
        metavar="FILE",
        help=f"add the JSON lines to FILE (default: bench/results/{name}-TIME.jsonl)",
    )
    made.add_argument("--json", action="store_true", help="print the JSON lines in place of the table")
    return made


def count(text: str) -> int:
    """Parse a whole number of at least 1, for ``argparse``."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 1, got {text!r}")
    return int(text)


def network(text: str) -> Case:
    """Parse a case written as widths@batch, such as 784-128-10@64; it has two steps an epoch."""
    try:
        case = parsed(text.replace(":", "@"))
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected widths@batch such as 784-128-10@64, got {text!r}") from None
    return replace(case, steps=2, epochs=1)


def say(text: str) -> None:
    """Print a line on stderr."""
    print(f"bench: {text}", file=sys.stderr, flush=True)


def clocks() -> dict[str, str] | None:
    """Return clocks, power and temperature of the first NVIDIA card now; None without nvidia-smi."""
    command = shutil.which("nvidia-smi")
    if command is None:
        return None
    asked = [command, f"--query-gpu={CLOCKS}", "--format=csv,noheader"]
    done = subprocess.run(asked, capture_output=True, text=True, timeout=30, check=False)
    if done.returncode or not done.stdout.strip():
        return None
    return dict(zip(CLOCKS.split(","), done.stdout.splitlines()[0].split(", "), strict=True))


def circumstances() -> Record:
    """Return machine, versions and settings: the part that every line of a study shares."""
    import fusemlp

    versions = {"fusemlp": fusemlp.__version__}
    for package in PACKAGES:
        if importlib.util.find_spec({"scikit-learn": "sklearn"}.get(package, package)) is not None:
            versions[package] = _version(package)
    return hardware.circumstances(versions)


def _version(package: str) -> str:
    """Return a package's version; some are installed under other names, such as cupy-cuda12x."""
    for name in (package, *importlib.metadata.packages_distributions().get(package, ())):
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return "unknown"


def finish(
    study: str,
    options: argparse.Namespace,
    lines: Sequence[Record],
    text: str,
    draw: Callable[[Sequence[Record]], Figure] | None = None,
) -> Path:
    """Write the lines, with machine and versions, and the picture; print; return the path of the lines."""
    path: Path = options.out or RESULTS / f"{study}-{datetime.now(UTC):%Y%m%dT%H%M%SZ}.jsonl"
    common = circumstances()
    full = [{"study": study, **line, **common} for line in lines]
    write(full, path)
    if options.json:
        for line in full:
            print(json.dumps(line))
    else:
        print(f"{text}\n\n{caption(common)}")
    if draw is not None and importlib.util.find_spec("matplotlib") is None:
        say('no picture: it needs matplotlib, pip install "fusemlp[bench]"')
    elif draw is not None:
        picture = path.with_suffix(".png")
        draw(lines).savefig(picture, dpi=150)
        say(f"picture in {picture}")
    say(f"figures in {path}")
    return path


def caption(common: Record) -> str:
    """Return machine, versions and settings as a sentence."""
    box = common["machine"]
    where = f"{box['cpu']}, {box['cores']} cores"
    if common["card"] is not None:
        where += f"; {common['card']['name']}, driver {common['card']['driver']}"
    else:
        where += "; no GPU: nothing here was measured on one"
    versions = ", ".join(f"{name} {version}" for name, version in common["versions"].items())
    settings = ", ".join(f"{name}={value}" for name, value in common["variables"].items()) or "none"
    return f"{where}; {versions}; thread settings: {settings}; {common['date'][:10]}, commit {common['commit']}."


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table: the first column to the left, the others to the right."""
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def figure(width: float, height: float, columns: int = 1, rows: int = 1) -> tuple[Figure, list[Axes]]:
    """Return a figure with (rows x columns) axes, without a display."""
    from matplotlib.figure import Figure

    made = Figure(figsize=(width, height), layout="constrained")
    axes = [made.add_subplot(rows, columns, place + 1) for place in range(rows * columns)]
    for one in axes:
        one.spines[["top", "right"]].set_visible(False)
        one.grid(True, which="major", color="#DDDDDD", linewidth=0.6)
        one.set_axisbelow(True)
    return made, axes


def duration(seconds: float) -> str:
    """Return seconds with three digits and a unit: 12.3 us."""
    for unit, size in (("s", 1.0), ("ms", 1e-3), ("us", 1e-6)):
        if seconds >= size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds / 1e-9:.3g} ns"


def parse(made: argparse.ArgumentParser, arguments: Sequence[str] | None) -> Any:
    """Parse the given options, or those of the command line."""
    return made.parse_args(sys.argv[1:] if arguments is None else list(arguments))
