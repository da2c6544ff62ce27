"""Measure the time from arrays to a result: ``python -m bench time_to_result``.

The clock starts when a fresh process has the arrays. It ends after the first epoch with an accuracy of 93 % on the test
images (mnist5k: 4000 to train on, 1000 to test), or with ``--mnist FOLDER`` 97 % on the full MNIST. The time includes
the import of the library, compilation, training, and the accuracy after each epoch. The test images decide when to
stop, so the number of epochs is not an estimate of the model's quality.

Network (784-128-10, relu), initial parameters, batch size and plain SGD are the same for all; each library orders the
rows in its own way. Contenders take turns, seed by seed.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from bench.cases import Array
from bench.loops import BATCH_SIZE, CLASSES, CONTENDERS, HIDDEN, LEARNING_RATE, Task, Watch
from bench.measure import spread
from bench.plots import plain_ticks
from bench.report import Record
from bench.study import COLOURS, ROOT, count, duration, figure, finish, parse, parser, say, table

if TYPE_CHECKING:
    from matplotlib.figure import Figure

TARGETS = {"mnist5k": 0.93, "MNIST": 0.97}
HELD_OUT = 1000
# Mean and deviation of MNIST's pixels, scaled to 0 to 1.
MEAN, DEVIATION = 0.1307, 0.3081
REFERENCE = "fusemlp"


def images(folder: Path | None) -> tuple[str, dict[str, Array]]:
    """Return the name of the data, and X, y, Xt, yt: standardised float32 pixels; training rows fill whole batches."""
    from fusemlp import load_data

    if folder is None:
        data = load_data("mnist5k")
        # The data come sorted by class.
        order = np.random.default_rng(0).permutation(len(data.X))
        X, y = data.X[order], data.y[order]
        X, y, Xt, yt = X[:-HELD_OUT], y[:-HELD_OUT], X[-HELD_OUT:], y[-HELD_OUT:]
        name = "mnist5k"
    else:
        data = load_data(folder)
        if data.test is None:
            raise SystemExit(f"--mnist: {folder} has no test images; expected the four IDX files of MNIST")
        (X, y), (Xt, yt), name = (data.X, data.y), data.test, "MNIST"
    whole = len(X) // BATCH_SIZE * BATCH_SIZE
    arrays = {"X": (X[:whole] / 255.0 - MEAN) / DEVIATION, "Xt": (Xt / 255.0 - MEAN) / DEVIATION}
    labels = {"y": y[:whole], "yt": yt}
    return name, {
        **{key: array.astype(np.float32) for key, array in arrays.items()},
        **{key: array.astype(np.int64) for key, array in labels.items()},
    }


def initial(inputs: int, seed: int) -> list[tuple[Array, Array]]:
    """Return He et al.'s initial weights (2015), and zero biases."""
    generator = np.random.default_rng(seed)
    made = []
    for fan_in, fan_out in ((inputs, HIDDEN), (HIDDEN, CLASSES)):
        weight = generator.standard_normal((fan_out, fan_in)) * np.sqrt(2 / fan_in)
        made.append((weight.astype(np.float32), np.zeros(fan_out, np.float32)))
    return made


def child(name: str, file: Path, seed: int, target: float, most_epochs: int) -> Record:
    """Run one contender in this process and return its times."""
    with np.load(file) as stored:
        arrays = {key: stored[key] for key in ("X", "y", "Xt", "yt")}
    task = Task(**arrays, parameters=initial(arrays["X"].shape[1], seed), seed=seed)
    watch = Watch(target, most_epochs)
    CONTENDERS[name].run(task, watch)
    return {
        "import_seconds": watch.imported,
        "epoch_ends": watch.seconds,
        "accuracies": watch.accuracies,
        "reached": watch.reached,
    }


def run_child(name: str, file: Path, seed: int, target: float, most_epochs: int) -> Record:
    """Run ``child`` in a fresh process; a contender of a fresh machine gets an empty numba cache."""
    environment = dict(os.environ)
    parts = [str(ROOT), str(ROOT / "engine"), str(ROOT / "kernels"), environment.get("PYTHONPATH", "")]
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, parts))
    given = [name, str(file), str(seed), str(target), str(most_epochs)]
    with tempfile.TemporaryDirectory() as empty:
        if CONTENDERS[name].first:
            environment["NUMBA_CACHE_DIR"] = empty
        command = [sys.executable, "-m", "bench.time_to_result", "--child", *given]
        began = time.perf_counter()
        done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, check=False)
        whole = time.perf_counter() - began
    if done.returncode:
        raise RuntimeError(f"{name} failed:\n{done.stderr}")
    found: Record = json.loads(done.stdout.splitlines()[-1])
    return found | {"process_seconds": whole}


def study(
    names: Sequence[str], data: str, arrays: dict[str, Array], target: float, seeds: Sequence[int], most_epochs: int
) -> list[Record]:
    """Return a line for each contender and seed."""
    lines = []
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "arrays.npz"
        np.savez(file, **arrays)
        for turn, seed in enumerate(seeds):
            first = turn % len(names)
            for name in (*names[first:], *names[:first]):
                # Compilation from nothing is slow and does not depend on the seed: one run is enough.
                if CONTENDERS[name].first and turn:
                    continue
                found = run_child(name, file, seed, target, most_epochs)
                ends = found["epoch_ends"]
                say(
                    f"{name}, seed {seed}: {found['accuracies'][-1]:.1%} after {len(ends)} epochs, {duration(ends[-1])}"
                )
                common = {"data": data, "target": target, "contender": name, "label": CONTENDERS[name].label}
                lines.append(common | {"seed": seed, "batch_size": BATCH_SIZE, "rate": LEARNING_RATE} | found)
    return lines


def summary(lines: Sequence[Record]) -> list[Record]:
    """Return each contender's medians over the seeds that reached the target, fastest first; the others at the end."""
    rows = []
    for name in dict.fromkeys(line["contender"] for line in lines):
        own = [line for line in lines if line["contender"] == name]
        good = [line for line in own if line["reached"]]
        row: Record = {"contender": name, "label": own[0]["label"], "runs": len(own), "reached": len(good)}
        if good:
            later = [np.diff(line["epoch_ends"]) for line in good if len(line["epoch_ends"]) > 1]
            epoch = float(np.median(np.concatenate(later))) if later else None
            row |= {
                "seconds": spread([line["epoch_ends"][-1] for line in good]),
                "epochs": float(np.median([len(line["epoch_ends"]) for line in good])),
                "import": float(np.median([line["import_seconds"] for line in good])),
                "first": float(np.median([line["epoch_ends"][0] - line["import_seconds"] for line in good])),
                "epoch": epoch,
            }
        rows.append(row)
    return sorted(rows, key=lambda row: row["seconds"].p50 if row["reached"] else float("inf"))


def text(lines: Sequence[Record]) -> str:
    """Return the table."""
    rows = []
    found = summary(lines)
    reference = next((row for row in found if row["contender"] == REFERENCE and row["reached"]), None)
    for row in found:
        if not row["reached"]:
            rows.append([row["label"], f"not reached in {row['runs']} runs", "", "", "", "", ""])
            continue
        seconds = row["seconds"]
        rows.append(
            [
                row["label"],
                f"{seconds.p50:.2f} s ({seconds.p20:.2f} to {seconds.p80:.2f})",
                f"{seconds.p50 / reference['seconds'].p50:.1f}x" if reference else "",
                duration(row["import"]),
                duration(row["first"]),
                "" if row["epoch"] is None else duration(row["epoch"]),
                f"{row['epochs']:g}"
                + ("" if row["reached"] == row["runs"] else f", {row['reached']} of {row['runs']}"),
            ]
        )
    header = ("", "to the target", "ratio", "import", "first epoch, compiling", "a later epoch", "epochs")
    seeds = len({line["seed"] for line in lines})
    return (
        f"### {lines[0]['data']}: {lines[0]['target']:.0%} of the test images right\n\n{table(header, rows)}\n\n"
        f"Time from arrays in memory to the first epoch that reaches the target, in fresh processes. Included: import, "
        f"compilation, training and the accuracy after each epoch. 784-{HIDDEN}-10, relu, SGD at {LEARNING_RATE}, "
        f"batch {BATCH_SIZE}, the same initial parameters; medians of {seeds} seeds, 20th to 80th percentile. The test "
        f"images decide when to stop. To repeat: `python -m bench time_to_result --seeds {seeds}`."
    )


def draw(lines: Sequence[Record]) -> Figure:
    """Draw accuracy over time, and the parts of the time to the target."""
    made, (curves, bars) = figure(14.0, 5.2, columns=2)
    rows = [row for row in summary(lines) if row["reached"]]
    target = lines[0]["target"]
    for number, row in enumerate(rows):
        own = [line for line in lines if line["contender"] == row["contender"] and line["reached"]]
        middle = sorted(own, key=lambda line: line["epoch_ends"][-1])[len(own) // 2]
        x, y = middle["epoch_ends"], [100 * accuracy for accuracy in middle["accuracies"]]
        colour = COLOURS[number % len(COLOURS)]
        curves.plot(x, y, "-", color=colour, linewidth=1.6, label=row["label"])
        curves.plot(x[-1:], y[-1:], "o", color=colour, markersize=7)
    curves.axhline(100 * target, color="#333333", linewidth=1.0, linestyle="--")
    curves.set_xscale("log")
    plain_ticks(curves.xaxis)
    lowest = min(min(line["accuracies"]) for line in lines)
    curves.set_ylim(100 * max(lowest - 0.01, target - 0.15), 100 * target + 1.0)
    curves.set_xlabel("seconds from arrays in memory (logarithmic)")
    curves.set_ylabel("accuracy on the test images, %")
    curves.set_title("Accuracy after each epoch, the seed of the median time", fontsize=10, loc="left")
    curves.legend(fontsize=8, loc="lower right")
    longest = max(row["seconds"].p50 for row in rows)
    for place, row in enumerate(rows):
        whole = row["seconds"].p50
        later = row["epoch"] or 0.0
        compiling = max(row["first"] - later, 0.0)
        parts = (row["import"], compiling, max(whole - row["import"] - compiling, 0.0))
        start = 0.0
        for number, (part, name) in enumerate(zip(parts, PARTS, strict=True)):
            bars.barh(place, part, left=start, color=("#B0B0B0", COLOURS[1], COLOURS[0])[number], height=0.66,
                      label=name if place == 0 else None)  # fmt: skip
            start += part
        bars.text(start + 0.01 * longest, place, f"{whole:.2f} s, {row['epochs']:g} epochs", va="center", fontsize=8.5)
    bars.set_yticks(range(len(rows)), [row["label"] for row in rows])
    bars.set_ylim(len(rows) - 0.5, -0.5)
    bars.set_xlim(0, 1.3 * longest)
    bars.grid(False, axis="y")
    bars.set_xlabel("seconds from arrays to the target, median")
    bars.set_title(finding(lines, rows), fontsize=10, loc="left")
    bars.legend(fontsize=8, loc="upper center", bbox_to_anchor=(0.4, -0.12), ncols=3, frameon=False)
    return made


PARTS = ("import of the library", "compiling and starting: first epoch less a later one", "training and testing")


def finding(lines: Sequence[Record], rows: Sequence[Record]) -> str:
    """Return the finding: the fastest contender and the fastest other library."""
    first = rows[0]
    said = f"{lines[0]['target']:.0%} on {lines[0]['data']}: {first['label']} after {first['seconds'].p50:.2f} s"
    others = [row for row in rows[1:] if row["label"].startswith("fusemlp") != first["label"].startswith("fusemlp")]
    if not others:
        return said
    return f"{said},\n{others[0]['label']} after {others[0]['seconds'].p50:.2f} s"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the study and return its exit code."""
    made = parser("time_to_result", (__doc__ or "").partition("\n")[0])
    made.add_argument("--mnist", type=Path, metavar="FOLDER", help="the four IDX files of MNIST, plain or .gz")
    made.add_argument("--contenders", nargs="+", choices=CONTENDERS, help="default: all installed ones")
    made.add_argument("--target", type=float, help="accuracy (default: 0.93 on mnist5k, 0.97 on MNIST)")
    made.add_argument("--seeds", type=count, default=5, metavar="N", help="default: %(default)s")
    made.add_argument("--most-epochs", type=count, default=40, metavar="N", help="limit (default: %(default)s)")
    made.add_argument("--child", nargs=5, metavar="X", help="for its own use: one contender in this process")
    options = parse(made, arguments)
    if options.child:
        name, file, seed, target, most = options.child
        print(json.dumps(child(name, Path(file), int(seed), float(target), int(most))))
        return 0
    names = options.contenders or list(CONTENDERS)
    for name in list(names):
        missing = [package for package in CONTENDERS[name].packages if importlib.util.find_spec(package) is None]
        if missing:
            say(f"{name} is absent: {', '.join(missing)} not installed")
            names.remove(name)
    data, arrays = images(options.mnist)
    target: Any = TARGETS[data] if options.target is None else options.target
    lines = study(names, data, arrays, target, range(options.seeds), options.most_epochs)
    reached = any(line["reached"] for line in lines)
    finish("time_to_result", options, lines, text(lines), draw if reached else None)
    return 0 if reached else 1


if __name__ == "__main__":
    sys.exit(main())
