"""Measure ``fusemlp train`` beside LightGBM's five folds, as whole commands: ``python -m bench trees``.

Each command is a process of its own on one thread (``child``): imports, reading the file, training, and scoring or
predicting a held-out fifth. fusemlp also writes its run folder. Both get the same training rows and held-out rows, and
LightGBM's folds (``boosted``) are those of fusemlp's models. The commands take turns; a ratio is of one round. In a new
checkout fusemlp compiles during its first training, so run it once before.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from bench.child import usage
from bench.report import Record
from bench.study import count, finish, parse, parser, say, table
from bench.tables import (
    CLASSES,
    FUSEMLP,
    LIGHTGBM,
    NUMBERS,
    SCORES,
    TABLES,
    Table,
    answers_scores,
    fusemlp_answers,
    rows_of,
    truth_of,
)

DEFAULT = ("carData/MplsStops", "ratdat/surveys", "ggplot2movies/movies")


def rounds(text: str) -> int:
    """Parse a number of rounds, for ``argparse``."""
    if count(text) < 2:
        raise argparse.ArgumentTypeError(f"expected at least 2 rounds, whose difference shows the noise, got {text}")
    return int(text)


def measure(one: Table, frame: Any, seed: int, turns: int, options: Sequence[str]) -> list[Record]:
    """Return a line for each command and round; ``options``: further options of ``fusemlp train``."""
    import pandas

    truth = truth_of(one, frame)
    trained, tested, folds = rows_of(one, frame, seed)
    about = {"table": one.name, "task": one.task, "seed": seed, "rows": len(frame), "columns": frame.shape[1] - 1}
    lines = []
    with tempfile.TemporaryDirectory() as kept:
        folder = Path(kept)
        file, rows = folder / "train.csv", folder / "rows.npz"
        frame.to_csv(file, index=False)
        np.savez(rows, trained=trained, tested=tested, folds=folds)
        common = [str(file), "--target", one.target, "--seed", str(seed)]
        for turn in range(turns):
            run, answers = folder / f"run-{turn}", folder / f"answers-{turn}.csv"
            train = ["fusemlp", "train", *common, "--task", one.task, "--out", str(run), "--quiet", *options]
            boosted = ["bench.boosted", *common, "--rows", str(rows), "--out", str(answers)]
            boosted += ["--classify"] if one.task == CLASSES else []
            for name, command in ((FUSEMLP, train), (LIGHTGBM, boosted)):
                used = usage(command)
                predicted = (
                    fusemlp_answers(one, frame, tested, run)
                    if name == FUSEMLP
                    else pandas.read_csv(answers, keep_default_na=False)
                )
                scored = answers_scores(one, truth.iloc[tested].to_numpy(), predicted)
                lines.append({**about, "model": name, "round": turn, **scored, **used})
                say(f"{one.name}, round {turn}: {name} {used['processor']:.2f} s of processor")
    return lines


def text(lines: Sequence[Record]) -> str:
    """Return processor seconds, memory and score of each table as Markdown: median (least to most) of the rounds."""
    rows = []
    for name in dict.fromkeys(line["table"] for line in lines):
        both = [[line for line in lines if (line["table"], line["model"]) == (name, m)] for m in (FUSEMLP, LIGHTGBM)]
        networks, trees = both
        score = SCORES[networks[0]["task"]][0]
        ratios = [ours["processor"] / theirs["processor"] for ours, theirs in zip(networks, trees, strict=True)]
        rows.append([name, f"{networks[0]['rows']:,}", *(_spread([line["processor"] for line in own]) for own in both)])
        rows[-1] += [_spread(ratios), *(f"{max(line['memory'] for line in own) / 1e9:.2f}" for own in both)]
        rows[-1] += [score, *(f"{np.mean([line[score] for line in own]):.4f}" for own in both)]
    header = ["table", "rows", "fusemlp train: processor s", "LightGBM: processor s", "ratio"]
    header += ["fusemlp train: peak GB", "LightGBM: peak GB", "score", "fusemlp train", "LightGBM"]
    turns, seed = 1 + max(line["round"] for line in lines), lines[0]["seed"]
    caption = (
        f"Whole commands on one thread, {turns} paired rounds: median (least to most). LightGBM trains five folds with "
        f"early stopping. Scores of the same held-out fifth, seed {seed}. To repeat: `python -m bench trees`."
    )
    return f"{table(header, rows)}\n\n{caption}"


def _spread(values: Sequence[float]) -> str:
    return f"{np.median(values):.2f} ({min(values):.2f} to {max(values):.2f})"


def chosen(options: Any) -> list[tuple[Table, Callable[[], Any]]]:
    """Return the tables that the options name, each with the function that reads it."""
    if options.file is None:
        return [(one, one.frame) for one in TABLES if one.name in (options.table or DEFAULT)]
    import pandas

    frame = pandas.read_csv(options.file).dropna(subset=[options.target])
    numbers = pandas.api.types.is_numeric_dtype(frame[options.target])
    task = options.task or (NUMBERS if numbers else CLASSES)
    return [(Table("file", options.file.stem, options.target, task), lambda: frame)]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the study and return its exit code."""
    made = parser("trees", (__doc__ or "").partition("\n")[0])
    made.add_argument("file", nargs="?", type=Path, metavar="FILE", help="a CSV file, such as that of bench generate")
    made.add_argument("--target", metavar="COLUMN", help="the target of FILE")
    made.add_argument("--task", choices=(CLASSES, NUMBERS), help="of FILE; default: numbers are no classes")
    names = [one.name for one in TABLES]
    made.add_argument("--table", nargs="+", choices=names, metavar="NAME", help=f"default: {', '.join(DEFAULT)}")
    made.add_argument("--rounds", type=rounds, default=2, metavar="N", help="default: %(default)s")
    made.add_argument("--seed", type=int, default=0, metavar="N", help="default: %(default)s")
    made.add_argument("--options", default="{}", metavar="JSON", help="options of fusemlp train: '{\"lr\": 0.01}'")
    options = parse(made, arguments)
    if find_spec("lightgbm") is None:
        made.error("LightGBM is not installed: pip install lightgbm")
    if options.file is not None and (options.target is None or options.table):
        made.error("a file needs --target, and goes without --table")
    given = json.loads(options.options)
    words = [word for name, value in given.items() for word in (f"--{name.replace('_', '-')}", str(value))]
    lines: list[Record] = []
    for one, read in chosen(options):
        lines += measure(one, read(), options.seed, options.rounds, words)
    finish("trees", options, lines, text(lines), None)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
