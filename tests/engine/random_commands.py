"""Random commands on random data: ``python tests/engine/random_commands.py --rounds 300 --seed 0``.

A round makes a data set and trains or sweeps on it, or looks for a learning rate; some trainings are interrupted. Then
it uses the run with other commands. The options are those of the commands, whatever they are: most values are good,
some are at an edge, some are wrong. An option that a message blames is left out, and the command tried again.

No command may end with a traceback, and none may leave files that a later one fails on; ``Story.run`` and ``CHECKS``
have the rules. A fault is printed with the commands of its round; ``--only ROUND`` repeats it alone.
"""

import argparse
import contextlib
import csv
import io
import json
import os
import random
import re
import shlex
import shutil
import signal
import sys
import tempfile
import traceback
import types
import typing
import warnings
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path

import numpy as np
import pytest
from random_tables import Table, changed, new_data

from fusemlp import cli
from fusemlp.cli.app import COMMANDS
from fusemlp.tables.recipe import name_of

# Values of options whose type or completion does not tell them: usual ones, and odd ones.
VALUES = {
    "activation": (("relu", "elu", "prelu", "tanh,relu", "gelu", "sigmoid"), ("", "relu,", "softmax")),
    "attack_steps": (("1", "3"), ("0", "-1")),
    # Triton's interpreter and other processes take more time than a round has.
    "backend": (("auto", "numpy"), ("cupy", "torch")),
    "workers": ((), ("threads", "")),
    "track": ((), ("paper", "")),
    "batch_size": (("1", "7", "32", "1000"), ("0", "-1", str(10**20))),
    "class_weight": (("balanced", "1,2", "1,1,1"), ("", "0,0", "nan,1", "-1,1", "1e300,1")),
    "device": ((), ("cuda:0", "cpu", "")),
    "dropout": (("0.5", "0.1,0.2", "0"), ("1", "-0.1", "nan", "", "1e-30")),
    "encoding": (("utf-8", "latin-1"), ("utf-9", "")),
    "epochs": (("1", "2", "3"), ("0", "-1", "x")),
    "hidden": (("4", "3", "5,2", "none", "1"), ("0", "-1", "4,", "", "x", str(10**13))),
    "layer_decay": (("0.5", "1"), ("0", "2", "nan")),
    "models": (("1", "2", "3"), ("0", "-1")),
    "of_class": (("0", "1", "yes", "red"), ("", "x")),
    "probe": (("0", "1", "2"), ("-1",)),
    "rows": (("1", "3", "500"), ("0", "-1")),
    "sample": (("1", "3", "99"), ("0", "-1")),
    "seed": (("0", "1", "77"), ("-1", str(2**32), str(2**63), str(2**64))),
    "seeds": (("1", "2", "3"), ("0", "-1")),
    "sep": ((",", ";", "tab"), ("", "ab", "\n")),
    "decimal": ((".", ","), ("", ";")),
    "split_seed": (("0", "1", "77"), ("-1", str(2**32), str(2**63), str(2**64))),
    "sort": (("val_loss", "test_loss"), ("", "x")),
    "steps": (("2", "10", "50"), ("0", "1", "-1")),
    "time_limit": (("0.05", "0.3"), ("1e-9", "0", "-1", "nan")),
    "vary": (
        *(("lr=0.01,0.1", "lr=0.001:1:log:3", "hidden=none,2,3x2", "seed=0:2", "dropout=0:0.5:3", "batch_size=4,8"),),
        *(("lr=0", "lr=1e30,1e300", "x=1", "seed=", "hidden=0", "lr=nan", "momentum=2", "betas=0.9x1", "seed=0:0"),),
    ),
}
# Options with the name of a column.
OF_COLUMNS = ("target", "drop", "keep", "categorical", "id", "group", "time")
# Options with a file of labelled rows, and those with a file to write.
OF_ROWS = ("data", "validation", "test")
ENDINGS = {"plot": ".png", "onnx": ".onnx", "safetensors": ".safetensors"}
# The options that an option needs; they are mostly given with it.
_ATTACK = {"train": ("--adversarial=pgd", "--attack-eps=0.1"), "evaluate": ("--attack=pgd", "--attack-eps=0.1")}
NEEDS = {
    **{"momentum": ("--optimizer=sgd",), "nesterov": ("--optimizer=sgd",)},
    **{"lr_step": ("--schedule=step",), "lr_gamma": ("--schedule=exponential",)},
    **{"lr_final": ("--schedule=cosine",), "lr_patience": ("--schedule=reduce_on_plateau",)},
    **{"delta": ("--loss=huber",), "quantile": ("--loss=quantile",), "log_target": ("--task=regression",)},
    **dict.fromkeys(("adversarial", "attack"), ("--attack-eps=0.1",)),
    **dict.fromkeys(("attack_eps", "attack_steps", "attack_norm"), _ATTACK),
    **{"dp_delta": ("--dp-epsilon=3",), "dp_clip": ("--dp-epsilon=3",)},
    "of_class": ("--method=integrated",),
}
# A round gives them itself.
GIVEN = ("run", "runs", "resume", "folder")
WHOLE = (("1", "2", "3"), ("0", "-1", str(10**20), "x"))
NUMBERS = (("0.1", "0.5", "0.9", "0.01", "1", "0"), ("-1", "2", "1e-300", "1e30", "1e300", "nan", "inf", "x"))
# The share of the values that are usual.
USUAL = 0.9
TRIES = 8


class Fault(AssertionError):
    """A command that broke a rule."""


@dataclass
class Ended:
    """A command's exit code, what it printed, and its words."""

    code: int
    out: str
    err: str
    words: list[str]


@dataclass
class Story:
    """A round in the current folder."""

    draw: random.Random
    data: Table
    used: set[str] = field(default_factory=set)
    commands: list[Ended] = field(default_factory=list)
    runs: int = 0

    def run(self, words, *, interrupt=0):
        """Run a command; Fault unless it ends as commands may.

        ``interrupt``: Ctrl-C comes before this replacement of a file.
        """
        ended = Ended(-1, "", "", list(words))
        self.commands.append(ended)
        streams = [io.TextIOWrapper(io.BytesIO(), encoding="utf-8", write_through=True) for _ in range(2)]
        with contextlib.redirect_stdout(streams[0]), contextlib.redirect_stderr(streams[1]):
            try:
                with interrupted(interrupt), warnings.catch_warnings():
                    # a warning that is not for users is a fault
                    warnings.simplefilter("error")
                    warnings.filterwarnings("always", category=UserWarning)
                    cli.main(words)
                failure = "it returned"
            except SystemExit as error:
                ended.code, failure = error.code if isinstance(error.code, int) else -1, ""
            except BaseException:
                failure = traceback.format_exc(limit=-6)
        ended.out, ended.err = (stream.buffer.getvalue().decode() for stream in streams)
        if failure:
            raise Fault(failure)
        _check_ending(ended, interruptible=bool(interrupt))
        CHECKS.get(words[0], lambda *_: None)(self, ended)
        return ended

    def tried(self, command, fixed, most, *, interrupt=0):
        """Run a command with up to ``most`` drawn options; leave out one that is refused, and try again.

        ``fixed`` returns the command's other words anew for each try.
        """
        options = self.options(command, self.draw.randint(0, most))
        for _ in range(TRIES):
            drawn = [word for words in options.values() for word in words]
            others = [word for word in fixed() if word.partition("=")[0].removeprefix("--") not in options]
            ended = self.run([command, *others, *drawn], interrupt=interrupt)
            if ended.code in (0, 130) or not options:
                break
            # The message begins with the option, or names it; of an argument that is missing the option is not known.
            blamed = [name for name in options if re.search(rf"--{name}\b", ended.err)]
            del options[blamed[0] if blamed else self.draw.choice(list(options))]
        if ended.code == 0:
            self.used |= {f"{command} --{name}" for name in options}
        return ended

    def options(self, command, count):
        """Return words for ``count`` of a command's options."""
        known = [option for option in fields(COMMANDS[command.replace("-", "_")]) if option.name not in GIVEN]
        known = [option for option in known if option.metadata["names"] is not None and option.default is not MISSING]
        chosen = {
            name_of(option): self.words(command, option) for option in self.draw.sample(known, min(count, len(known)))
        }
        for option in known:
            needs = NEEDS.get(option.name, ()) if name_of(option) in chosen and self.draw.random() < USUAL else ()
            for word in needs.get(command, ()) if isinstance(needs, dict) else needs:
                chosen.setdefault(word.partition("=")[0].removeprefix("--"), [word])
        return chosen

    def words(self, command, option):
        """Return the words of an option with a value."""
        hint = typing.get_type_hints(COMMANDS[command.replace("-", "_")])[option.name]
        kinds = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
        flag = f"--{name_of(option)}"
        if bool in kinds:
            both = option.default is not False and not option.metadata["names"]
            return [self.draw.choice((flag, f"--no-{flag[2:]}")) if both else flag]
        several = any(typing.get_origin(kind) is list for kind in kinds)
        count = self.draw.choice((1, 1, 2)) if several else 1
        return [f"{flag}={self.value(option, kinds)}" for _ in range(count)]

    def value(self, option, kinds):
        """Return a value of an option: usual for the most part."""
        if option.name in OF_COLUMNS:
            return self.draw.choice([*self.data.names, *self.data.names, "absent"])
        if option.name in OF_ROWS:
            return self.file()
        if Path in kinds or option.name == "out":
            number = self.draw.randint(0, 9)
            return f"made{number}{ENDINGS.get(option.name, '.csv' if number % 2 else '')}"
        choices = option.metadata["choices"]
        named = tuple(choices("")) if callable(choices) else ()
        by_type = WHOLE if int in kinds else NUMBERS if float in kinds else (named or ("x",), ("", "x", "é", "-"))
        usual, odd = VALUES.get(option.name, by_type)
        return self.draw.choice(usual if usual and self.draw.random() < USUAL else odd)

    def file(self):
        """Return a file with rows like the data: themselves, changed ones, or none."""
        chance = self.draw.random()
        if chance < 0.05:
            return "absent.csv"
        if not self.data.columns or chance < 0.4:
            return str(self.data.path)
        path = Path(f"new{len(os.listdir())}{''.join(self.data.path.suffixes)}")
        return str(changed(self.data, path, self.draw).path)

    def training(self, command, most, *, interrupt=0, start=()):
        """Train with random options; return the run folder if there is one."""
        small = self.draw.choice(VALUES["hidden"][0])
        epochs = self.draw.choice(VALUES["epochs"][0])

        def fixed():
            self.runs += 1
            target = [f"--target={self.data.target}"] if self.data.columns else []
            given = [f"--out=run{self.runs}", f"--epochs={epochs}", *start]
            return [str(self.data.path), *target, *given, *([] if start else [f"--hidden={small}"])]

        folder = Path(_option(self.tried(command, fixed, most, interrupt=interrupt), "out"))
        return folder if (folder / "config.json").exists() else None


def _check_ending(ended, *, interruptible):
    """Raise Fault unless a command has ended as it may: with its results, or with one message."""
    if ended.code not in (0, 1, 2, *((130,) if interruptible else ())):
        raise Fault(f"exit code {ended.code}")
    for text in (ended.out, ended.err):
        if re.search(r"Traceback|NoneType|object at 0x", text):
            raise Fault("it prints what is not for users")
    if ended.code == 0:
        if "error:" in ended.err:
            raise Fault("an error, and exit code 0")
        if "--json" in ended.words:
            for line in ended.out.splitlines():
                _parsed(line)
    elif ended.code != 130:
        last = re.findall(r"^error: .+(?:\n  .+)*\n\Z", ended.err, re.MULTILINE)
        if not last and not re.search(r"Usage: fusemlp.*\n.*\n\nError: ", ended.err):
            raise Fault("no message")
        if ended.err.count("\nerror: ") > 1:
            raise Fault("several messages")


def _parsed(text):
    def refused(name):
        raise Fault(f"{name} in JSON")

    try:
        return json.loads(text, parse_constant=refused)
    except ValueError as error:
        raise Fault(f"no JSON: {error}: {text}") from None


def _rows(path):
    """Return the number of rows of a CSV file, without its header."""
    with path.open(newline="") as stream:
        return len(list(csv.reader(stream))) - 1


def _option(ended, name):
    return next((word.partition("=")[2] for word in reversed(ended.words) if word.startswith(f"--{name}=")), "")


def _check_run(story, ended):
    """Check the folder of ``train`` or ``sweep``."""
    folder = Path(_option(ended, "out") or _option(ended, "resume"))
    if ended.code == 2 and _option(ended, "out") and folder.exists() and not any(folder.iterdir()):
        raise Fault("an empty folder after an option was refused")
    reports = [folder / "config.json", folder / "report.json"]
    content = {path.name: _parsed(path.read_text()) for path in reports if path.exists()}
    if ended.code == 0:
        if len(content) < 2 or not (folder / "checkpoints/model.safetensors").exists():
            raise Fault(f"the run is not whole: {sorted(os.listdir(folder))}")
        sweep = content["config.json"].get("sweep")
        if ended.words[0] == "sweep" and _rows(folder / "results.csv") != sweep["ended"]:
            raise Fault("results.csv has not a row for each model")


def _check_predictions(story, ended):
    """Check that each row of the data has a prediction, unless the file is read in another form."""
    out, table = Path(_option(ended, "out")), story.data
    reformed = not table.header or "--no-header" in ended.words or _option(ended, "sep") or _option(ended, "encoding")
    if ended.code or not table.rows or reformed or Path(_option(ended, "data")) != table.path:
        return
    count = _rows(out) if out.suffix == ".csv" else len(np.load(out)["predictions"])
    if count != table.rows:
        raise Fault(f"{count} predictions for {table.rows} rows")


CHECKS = {"train": _check_run, "sweep": _check_run, "predict": _check_predictions}


@contextlib.contextmanager
def interrupted(count):
    """Send Ctrl-C in the body before its ``count``-th replacement of a file; never for 0."""
    replace, done = os.replace, 0

    def counting(*given, **more):
        nonlocal done
        done += 1
        if done == count:
            signal.raise_signal(signal.SIGINT)
        replace(*given, **more)

    with pytest.MonkeyPatch.context() as patch:
        if count:
            patch.setattr(os, "replace", counting)
        yield


def use(story, run):
    """Run one of the commands that use a run."""
    draw = story.draw
    which = draw.choice(("evaluate", "explain", "predict", "predict", "export", "report", "plot", "resume", "from"))
    place = str(run)
    if which == "resume":
        command = draw.choice(("train", "train", "train", "sweep"))
        epochs = draw.choice(([], ["--epochs=4"], ["--epochs=5"]))
        story.tried(command, lambda: [f"--resume={place}", *epochs], 1)
    elif which == "from":
        parts = draw.sample(("--freeze=1", "--probe=1", "--layer-decay=0.5"), draw.randint(0, 2))
        story.training("train", 4, start=[f"--from={place}", *parts])
    elif which == "predict":
        data, out = story.file(), f"predictions{len(story.commands)}.{draw.choice(('csv', 'csv', 'npz'))}"
        story.tried(which, lambda: [place, f"--data={data}", f"--out={out}", "--force"], 4)
    elif which == "export":
        files = draw.choice((["--onnx=a.onnx"], ["--safetensors=a.safetensors"]))
        story.tried(which, lambda: [place, *files, "--force"], 2)
    elif which == "plot":
        story.tried(which, lambda: [place, *draw.choice(([], [place]))], 2)
    else:
        story.tried(which, lambda: [place], 4)


def tell(story):
    """Play a round."""
    draw = story.draw
    kind = draw.random()
    if kind < 0.1:
        target = [f"--target={story.data.target}"] if story.data.columns else []
        hidden = draw.choice(VALUES["hidden"][0])
        story.tried("lr-find", lambda: [str(story.data.path), *target, f"--hidden={hidden}", "--steps=20"], 6)
        return
    interrupt = draw.randint(1, 12) if draw.random() < 0.2 else 0
    if kind < 0.3:
        vary = draw.choice(VALUES["vary"][0])
        run = story.training("sweep", 6, interrupt=interrupt, start=[f"--vary={vary}"])
        if interrupt:
            folder = _option(story.commands[-1], "out")
            story.tried("sweep", lambda: [f"--resume={folder}"], 1)
    else:
        run = story.training("train", 8, interrupt=interrupt)
    for _ in range(draw.randint(1, 3) if run else 0):
        use(story, run)
    folders = [path.parent for path in Path().glob("*/config.json")]
    listed = story.tried("runs", lambda: ["."], 1)
    if folders and listed.code:
        raise Fault("runs lists nothing")


def play(seed, number, folder):
    """Play a round in a folder; return its commands, and the fault or ""."""
    draw = random.Random(f"{seed} {number}")
    folder.mkdir()
    with contextlib.chdir(folder):
        story = Story(draw, new_data(Path(), draw))
        try:
            tell(story)
        except Fault as fault:
            last = story.commands[-1]
            lines = [f"round {number} of seed {seed}:"]
            lines += [shlex.join(["fusemlp", *one.words]) + f"  # {one.code}" for one in story.commands]
            outputs = [f"{name}: {text}" for name, text in (("stdout", last.out), ("stderr", last.err)) if text]
            return story, "\n".join([*lines, str(fault), *outputs])
    return story, ""


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=300)
    parser.add_argument("--seed", type=int, help="drawn and printed unless given")
    parser.add_argument("--only", type=int, metavar="ROUND", help="play this round alone, and keep its files")
    options = parser.parse_args()
    seed = random.randrange(10**6) if options.seed is None else options.seed
    rounds = range(options.rounds) if options.only is None else [options.only]
    folder = Path(tempfile.mkdtemp())
    print(f"seed {seed}, in {folder}", flush=True)
    used, faults = set(), 0
    for number in rounds:
        story, fault = play(seed, number, folder / f"round{number}")
        used |= story.used
        if fault:
            faults += 1
            print(f"\n{fault}", flush=True)
        elif options.only is None:
            shutil.rmtree(folder / f"round{number}")
    commands = ((name.replace("_", "-"), fields(described)) for name, described in COMMANDS.items())
    known = {f"{command} --{name_of(one)}" for command, described in commands for one in described}
    print(f"options never in a command that worked: {', '.join(sorted(known - used))}")
    print(f"{len(rounds)} rounds, seed {seed}: {faults} faults")
    return min(faults, 1)


if __name__ == "__main__":
    # A test runner would load the compiled code of all programs too.
    os.environ.setdefault("FUSEMLP_WHOLE_LOOP", "1")
    sys.exit(main())
