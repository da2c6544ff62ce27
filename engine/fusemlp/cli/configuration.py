"""The configuration of a run: everything that is needed to repeat it, as ``config.json`` holds it."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from dataclasses import asdict, fields
from datetime import datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from fusemlp._version import __version__
from fusemlp.cli.commands import SweepOptions, TrainOptions
from fusemlp.cli.fields import given_options, name_of
from fusemlp.cli.options import FitOptions
from fusemlp.cli.output import command_line
from fusemlp.cli.prepare import Prepared
from fusemlp.datasets.load import NAMES
from fusemlp.describe.description import reading, stored
from fusemlp.engine import Engine
from fusemlp.report.runs import FORMAT

# Options of earlier releases.
GONE = ("attack_beta", "attack_repeats", "shard_optimizer")


def command(options: FitOptions) -> str:
    """Return the command line with these options."""
    words = ["fusemlp", "sweep" if isinstance(options, SweepOptions) else "train", options.data or ""]
    given = given_options(options)
    for option in fields(options):
        if option.name == "data" or option.name not in given:
            continue
        name, value = name_of(option), given[option.name]
        if isinstance(value, bool):
            words.append(f"--{name}" if value else f"--no-{name}")
        else:
            for one in value if isinstance(value, list) else [value]:
                words += [f"--{name}", str(one)]
    return command_line(words)


def configuration(options: TrainOptions, prepared: Prepared, engine: Engine, epochs: int) -> dict[str, Any]:
    """Return everything that is needed to repeat a run."""
    libraries = ("numpy", "scipy", "scikit-learn", "safetensors")
    stored = stored_options(options)
    return {
        "format": FORMAT,
        "command": command(options),
        "started": datetime.now().astimezone().isoformat(timespec="seconds"),
        # with the data as given: "data" has the absolute path
        "options": stored | {"data": options.data},
        "data": {"source": stored["data"], **prepared.summary},
        "preprocessor": prepared.preprocessor.to_config(),
        **{name: getattr(engine, name).to_config() for name in ("network", "loss", "optimizer")},
        "batch_size": engine.batch_size,
        "epochs": epochs,
        **({} if prepared.start is None else {"from": prepared.start.about}),
        "seed": options.seed,
        **{name: getattr(engine, name) for name in ("backend", "device", "precision", "plan")},
        **({} if engine.sharding is None else {"ranks": engine.sharding.world}),
        "versions": {
            "fusemlp": __version__,
            "python": platform.python_version(),
            **{library: version(library) for library in libraries},
        },
        "machine": platform.platform(),
    }


def stored_options(options: FitOptions) -> dict[str, Any]:
    """Return the options with absolute paths of the data and of another run: a run may be opened from another folder.

    A data set keeps its name.
    """
    files = {name: getattr(options, name, None) for name in ("data", "validation", "test", "from_run")}
    absolute = {name: file if file in NAMES else str(Path(file).absolute()) for name, file in files.items() if file}
    return asdict(options) | absolute


def options_of(config: Mapping[str, Any]) -> TrainOptions:
    """Return the options of a run, without those of earlier releases."""
    options = {name: value for name, value in config["options"].items() if name not in GONE}
    with reading("run: the options in its config.json", "start a new run"):
        known: TrainOptions = stored("options", {**options, "data": config["data"]["source"]}, TrainOptions)
    return known
