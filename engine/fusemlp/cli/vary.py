"""The models of a sweep: ``--vary`` as values, their combinations, a prepared fleet, and a journal to go on from."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from fusemlp.cli import output, report, session, train
from fusemlp.cli.options import SweepOptions, TrainOptions
from fusemlp.describe.checks import as_count, counted
from fusemlp.describe.conflicts import check_together, in_use
from fusemlp.describe.description import reading, stored
from fusemlp.fleet.candidates import MOST_MODELS, check_name
from fusemlp.fleet.fleet import Fleet
from fusemlp.fleet.results import Kept, Member, Point
from fusemlp.fleet.workers import check_address, check_workers
from fusemlp.report.runs import Run, lock, read_json
from fusemlp.runtime.files import write_atomically
from fusemlp.tables.preparation import Prepared, decisions
from fusemlp.tables.recipe import FitRecipe, given_options
from fusemlp.tables.training import fit_arguments
from fusemlp.training.trainer import History
from fusemlp_kernels.errors import ArgumentError, ArgumentTypeError, CheckpointError

# Parameters with whole numbers, and their minimum.
WHOLE = {"hidden": 1, "batch_size": 1, "seed": 0}
PAIRS = ("betas",)
# Parameters with values of several numbers, joined by x.
JOINED = ("hidden", *PAIRS)
# The limit for one parameter: more than a sweep can train, and still fast to list.
MOST_VALUES = 100_000
# The digits of values inside a range; they keep the command that repeats a model readable.
DIGITS = 6
FORMS = "lr=0.001,0.01 or lr=0.001:0.1:log:16 or hidden=32,64x32 or seed=0:20"


@dataclass(frozen=True)
class Axis:
    """A parameter and its values; ``scale`` is "log" or "linear" for a range, "" for a list."""

    name: str
    values: tuple[Any, ...]
    scale: str

    def __len__(self) -> int:
        return len(self.values)


def spelled_value(value: Any) -> str:
    """Return a value in the syntax of ``--vary``."""
    return "x".join(map(repr, value)) or "none" if isinstance(value, tuple) else repr(value)


def parsed_axes(words_of: Sequence[str], *, seeds: int | None = None, first: int = 0) -> tuple[Axis, ...]:
    """Return each ``--vary`` parsed, and as the last ``seeds`` seeds from ``first`` on; ArgumentError for others."""
    if not words_of and seeds is None:
        raise ArgumentError(f"vary: say what the models differ in: --vary {FORMS}")
    by_name: dict[str, Axis] = {}
    for words in words_of:
        axis = _axis(words)
        if axis.name in by_name:
            raise ArgumentError(f"vary: {axis.name} is there twice; give all its values in one: --vary {axis.name}=...")
        by_name[axis.name] = axis
    if seeds is not None:
        count = as_count("seeds", seeds, minimum=1)
        if "seed" in by_name:
            raise ArgumentError("seeds: --vary seed=... has the seeds; give one of the options")
        if count > MOST_VALUES:
            raise ArgumentError(f"seeds: expected at most {MOST_VALUES}, got {count}")
        by_name["seed"] = Axis("seed", tuple(range(first, first + count)), "linear")
    return tuple(by_name.values())


def combinations(among: Sequence[Axis], *, sample: int | None, seed: int, whole_seeds: bool = False) -> list[Point]:
    """Return all combinations, the last parameter varying fastest, or ``sample`` of them, drawn by ``seed``, in order.

    With ``whole_seeds`` a sample is of the other parameters, with all seeds each.
    """
    if whole_seeds and sample is not None and len(among) > 1:
        some, seeds = combinations(among[:-1], sample=sample, seed=seed), among[-1].values
        if len(some) * len(seeds) > MOST_MODELS:
            raise ArgumentError(
                f"seeds: {len(some)} combinations with {len(seeds)} seeds each are {len(some) * len(seeds)} models, "
                f"and at most {MOST_MODELS} are trained; give fewer"
            )
        return [{**point, "seed": value} for point in some for value in seeds]
    shape = tuple(len(axis) for axis in among)
    total = math.prod(shape)
    wanted = total if sample is None else min(as_count("sample", sample, minimum=1), total)
    if wanted > MOST_MODELS or total >= 1 << 63:
        product = " x ".join(f"{axis.name} {len(axis)}" for axis in among)
        mend = "give fewer values" if sample is not None else "give fewer values, or --sample 500 for some of them"
        raise ArgumentError(f"vary: {product} are {total} models, and at most {MOST_MODELS} are trained; {mend}")
    chosen = range(total)
    if wanted < total:
        chosen = np.sort(np.random.default_rng(seed).choice(total, wanted, replace=False, shuffle=False)).tolist()
    places = np.unravel_index(np.asarray(chosen, np.int64), shape)
    return [
        {axis.name: axis.values[at] for axis, at in zip(among, place, strict=True)}
        for place in zip(*(column.tolist() for column in places), strict=True)
    ]


def _axis(words: str) -> Axis:
    name, equals, text = (part.strip() for part in words.partition("="))
    name = name.replace("-", "_")
    if not equals or not name:
        raise ArgumentError(f"vary: expected NAME=VALUES, such as {FORMS}, got {words!r}")
    check_name("vary", name)
    if ":" in text:
        return _range(name, text)
    parts = [part.strip() for part in text.split(",")]
    if not all(parts):
        raise ArgumentError(f"vary: {name}: a value is missing in {words!r}; give values with commas between them")
    values = tuple(_value(name, part) for part in parts)
    again = next((value for index, value in enumerate(values) if value in values[:index]), None)
    if again is not None:
        again = spelled_value(again)
        raise ArgumentError(f"vary: {name}: {again} is there twice, so models would be too; give it once")
    return Axis(name, values, "")


def _value(name: str, text: str) -> Any:
    if name == "hidden":
        widths = () if text == "none" else tuple(_whole(name, part) for part in text.split("x"))
        return widths[0] if len(widths) == 1 else widths
    if name in PAIRS:
        pair = tuple(_number(name, part) for part in text.split("x"))
        if len(pair) != 2:
            raise ArgumentError(f"vary: {name}: expected two numbers joined by x, such as 0.9x0.999, got {text!r}")
        return pair
    return _whole(name, text) if name in WHOLE else _number(name, text)


def _whole(name: str, text: str) -> int:
    try:
        number = int(text)
    except ValueError:
        hint = ", or several joined by x, or none" if name == "hidden" else ""
        raise ArgumentError(f"vary: {name}: expected a whole number{hint}, got {text!r}") from None
    return as_count(f"vary: {name}", number, minimum=WHOLE[name])


def _number(name: str, text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise ArgumentError(f"vary: {name}: expected a finite number such as 0.01, got {text!r}")
    return value


def _range(name: str, text: str) -> Axis:
    parts = [part.strip() for part in text.split(":")]
    if name in PAIRS or len(parts) > 4 or (len(parts) == 4 and parts[2] not in ("log", "lin")):
        forms = "a list" if name in PAIRS else "a list, low:high:log:count, low:high:lin:count, or first:end"
        raise ArgumentError(f"vary: {name}: expected {forms}, got {text!r}")
    read = _whole if name in WHOLE else _number
    if len(parts) == 2 and name not in WHOLE:
        mend = f"say how many values there are: {name}={text}:lin:5"
        raise ArgumentError(f"vary: {name}: {text!r} is a range of whole numbers; {mend}")
    low, high = read(name, parts[0]), read(name, parts[1])
    if len(parts) == 2:
        # As Python's range it leaves the end out.
        if not 1 <= high - low <= MOST_VALUES:
            expected = f"expected a range of 1 to {MOST_VALUES} whole numbers, the last one left out"
            raise ArgumentError(f"vary: {name}: {expected}, got {text!r}")
        return Axis(name, tuple(range(int(low), int(high))), "linear")
    try:
        count = int(parts[-1])
    except ValueError:
        expected = "expected how many values at the end, such as :16"
        raise ArgumentError(f"vary: {name}: {expected}, got {parts[-1]!r}") from None
    scale = "log" if parts[2] == "log" else "linear"
    if not 2 <= count <= MOST_VALUES:
        raise ArgumentError(f"vary: {name}: expected a range of 2 to {MOST_VALUES} values, got {count}")
    if not low < high:
        raise ArgumentError(f"vary: {name}: expected a range from the lower to the higher end, got {text!r}")
    if scale == "log" and low <= 0:
        raise ArgumentError(f"vary: {name}: a logarithmic range begins above 0, got {text!r}")
    spaced = (np.geomspace if scale == "log" else np.linspace)(low, high, count).tolist()
    inner = [round(value) if name in WHOLE else float(f"{value:.{DIGITS}g}") for value in spaced[1:-1]]
    # Values that rounding makes equal count once.
    return Axis(name, tuple(dict.fromkeys([low, *inner, high])), scale)


# The options of ``train`` for each varied parameter.
OPTIONS = {"betas": ("beta1", "beta2")}
# The options that --resume accepts; all others keep the values of the sweep.
FREE = frozenset({"resume", "as_json", "quiet", "jobs", "workers", "address", "backend", "device"})


@dataclass(frozen=True, eq=False)
class Plan:
    """A prepared sweep: ``points`` has an entry for each model, and ``prepared`` the recipe of all."""

    options: SweepOptions
    axes: tuple[Axis, ...]
    points: list[Point]
    prepared: Prepared
    fleet: Fleet
    epochs: int
    fit_options: dict[str, Any]
    metric: str

    def recipe(self, index: int) -> TrainOptions:
        """Return the options of ``train`` for a model."""
        return replace(session.trained_by(self.prepared), **_options_of(self.points[index]))

    def command(self, points: Sequence[Point]) -> str:
        """Return the command of a sweep of some models alone, which differ in their seed."""
        values = {name: dict.fromkeys(spelled_value(point[name]) for point in points) for name in points[0]}
        decided = {name: value for name, value in decisions(self.prepared).items() if name not in values}
        split = self.options.seed if self.options.split_seed is None else self.options.split_seed
        again = {"vary": [f"{name}={','.join(several)}" for name, several in values.items()], "split_seed": split}
        left_out: dict[str, Any] = dict.fromkeys(("seeds", "sample", "resume", "out"))
        left_out |= {"seed": 0, "quiet": False, "as_json": False}
        return session.command(replace(self.options, **left_out | decided | again))


def planned(options: SweepOptions) -> Plan:
    """Check all options, and raise their errors before the folder exists."""
    if options.seeds == 1:
        # One seed is no mean: train as without the option.
        options = replace(options, seeds=None)
    axes = parsed_axes(options.vary or (), seeds=options.seeds, first=options.seed)
    asked = given_options(options)
    for axis in axes:
        for option in OPTIONS.get(axis.name, (axis.name,)):
            if option in asked and not (axis.name == "seed" and options.seeds is not None):
                instead = "; --split-seed decides the rows" if option == "seed" else ""
                reason = f"it is what the models differ in (--vary {axis.name}); give one{instead}"
                raise ArgumentError(f"{option}: {reason}")
    options = session.filled_in(options)
    output.tracker_of(options, "sweep")
    if options.workers is not None:
        check_workers(options.workers, connected=False)
    check_address(options.workers, options.address)
    if options.jobs is not None:
        as_count("jobs", options.jobs, minimum=1)
    split_seed = options.seed if options.split_seed is None else options.split_seed
    points = combinations(axes, sample=options.sample, seed=split_seed, whole_seeds=options.seeds is not None)
    with _named_as_varied(axes):
        prepared = session.prepared_data(_train_options(options, points[0]))
        options = replace(options, early_stopping=prepared.recipe.early_stopping)
        check_together(in_use(sweep=True, **{"trained gaps": prepared.gaps or None}))
        # The trials depend on the options that vary: their outcome holds for all.
        recipe = replace(prepared.recipe, **decisions(prepared))
        prepared, rows = replace(prepared, recipe=recipe), len(prepared.train)
        most = max(point.get("batch_size", recipe.batch_size) for point in points)
        if options.drop_last and most > rows:
            raise ArgumentError(f"drop_last: {rows} rows do not fill one batch of {most}; nothing would be trained")
        arguments = fit_arguments(prepared)
        epochs = arguments["epochs"]
        fleet = prepared.fleet(points, rows=rows, epochs=epochs)
    metric = arguments.get("monitor") or ("loss" if prepared.validation is None else "val_loss")
    return Plan(options, axes, points, prepared, fleet, epochs, arguments, metric)


def _train_options(options: SweepOptions, point: Point) -> TrainOptions:
    """Return the options of ``train`` for the model of a point."""
    changes: dict[str, Any] = {"as_json": False}
    if session.is_a_table(options):
        changes["models"] = 1
    if "seed" in point and options.split_seed is None:
        # The models share their rows.
        changes["split_seed"] = options.seed
    return session.train_options(options, FitRecipe, **changes | _options_of(point))


def _options_of(point: Point) -> dict[str, Any]:
    """Return the parameters of a model as options of ``train``."""
    changes = dict(point)
    if "betas" in point:
        changes["beta1"], changes["beta2"] = changes.pop("betas")
    if "hidden" in point:
        widths = point["hidden"] if isinstance(point["hidden"], tuple) else (point["hidden"],)
        changes["hidden"] = [",".join(map(str, widths)) or "none"]
    if "dropout" in point:
        changes["dropout"] = repr(point["dropout"])
    return changes


@contextmanager
def _named_as_varied(axes: Sequence[Axis]) -> Iterator[None]:
    """Rename an error about a varied parameter to ``--vary``."""
    try:
        yield
    except (ArgumentError, ArgumentTypeError) as error:
        options = {option for axis in axes for option in OPTIONS.get(axis.name, (axis.name,))}
        name, _, rest = str(error).partition(": ")
        if name in options:
            raise type(error)(f"vary: {error}") from None
        if name.startswith("vary, model "):
            # The user does not know the models' numbers yet.
            raise type(error)(f"vary: {rest}") from None
        raise


def describe_sweep(plan: Plan) -> str:
    """Return two lines on the models and the data."""
    engine = plan.fleet.first
    if not engine.memory.backend.traits.on_host:
        # On a GPU the plan depends on all models of a launch. On a CPU memory may not suffice for all engines.
        engine = plan.fleet.engines[0]
    total = len(plan.points)
    product = " x ".join(f"{len(axis)} {axis.name}" for axis in plan.axes)
    sampled = "a sample of " if plan.options.sample is not None else ""
    return (
        f"{report.describe_data(plan.prepared)}\n"
        f"{counted(total, 'model')}, {sampled}{product}; {counted(plan.epochs, 'epoch')}; {engine.loss.kind}; "
        f"{engine.optimizer.kind}; {engine.backend} {engine.precision}, plan {engine.plan}"
    )


# The file of a sweep that has not ended: its options and the fingerprint of its data, then a line for each ended model.
JOURNAL = "sweep.jsonl"


def begin_journal(run: Run, *lines: Mapping[str, Any]) -> None:
    """Write the first line, and those of models that have ended."""
    text = "".join(f"{json.dumps(line, default=str)}\n" for line in lines)
    write_atomically(run.path / JOURNAL, text.encode())


def add_to_journal(run: Run, member: Member) -> None:
    """Write a line for a model that has ended."""
    line = {name: getattr(member, name) for name in ("index", "status", "reason", "scores")}
    with (run.path / JOURNAL).open("a", encoding="utf-8") as stream:
        stream.write(f"{json.dumps({**line, 'history': asdict(member.history)})}\n")


def read_journal(folder: str) -> tuple[Run, dict[str, Any], list[dict[str, Any]]]:
    """Return a sweep's folder, its first line, and those of its models; CheckpointError if it cannot go on."""
    run = Run(Path(folder))
    if not (run.path / JOURNAL).is_file():
        config = read_json(run.config)
        reason = "is no folder of a sweep" if "sweep" not in config else "holds a sweep that has ended; start a new one"
        mend = "; a run of train goes on with fusemlp train --resume" if config and "sweep" not in config else ""
        raise CheckpointError(f"resume: {folder!r} {reason}{mend}")
    entries: list[dict[str, Any]] = []
    for line in (run.path / JOURNAL).read_text(encoding="utf-8").splitlines(keepends=True):
        if not line.endswith("\n"):
            # it was being written
            break
        with reading(f"resume: line {len(entries) + 1} of {str(run.path / JOURNAL)!r}", "start the sweep again"):
            entries.append(stored("line", json.loads(line), dict[str, Any]))
            if len(entries) == 1:
                stored("fingerprint", entries[0]["fingerprint"], str)
                stored("options", session.without_gone(entries[0]["options"]), SweepOptions)
    if not entries:
        raise CheckpointError(f"resume: {folder!r} was cut off before its first line; start the sweep again")
    return run, entries[0], entries[1:]


def resumed_sweep(options: SweepOptions, folder: str) -> tuple[Run, Plan, list[Member]]:
    """Return the sweep in a folder, and its models that have ended; refuse other data, and options that change it."""
    asked = train.check_kept(options, FREE, "sweep")
    lock(Run(Path(folder)))
    run, first, lines = read_journal(folder)
    # where it trains is asked anew
    before = SweepOptions(**session.without_gone(first["options"]))
    plan = planned(replace(before, **{**dict.fromkeys(("workers", "address", "jobs")), "quiet": False, **asked}))
    train.check_data(plan.prepared, first["fingerprint"], before.data, "sweep")
    begin_journal(run, first, *lines)
    return run, plan, [_member(line, plan.fleet) for line in lines]


def _member(line: Mapping[str, Any], fleet: Fleet) -> Member:
    """Return the model of a line, without its parameters."""
    with reading(f"resume: a model of {JOURNAL}", "start the sweep again"):
        index, history = as_count("index", line["index"], minimum=0), stored("history", line["history"], History)
        candidate, scores = fleet.candidates[index], stored("scores", line["scores"], dict[str, float])
        ending = stored("status", line["status"], str), stored("reason", line["reason"], str)
    held = Kept(candidate, {}, {}, history, len(history.epochs))
    return Member(index, candidate.parameters, held, history, *ending, scores)
