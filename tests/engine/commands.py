"""Call the command line in this process, and read what it wrote."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest

from fusemlp import MLP, SGD, cli
from fusemlp.describe.losses import as_loss
from fusemlp.report.runs import FORMAT


def run(*arguments: str | Path) -> int:
    """Return the exit code of ``fusemlp`` with these arguments."""
    with pytest.raises(SystemExit) as ended:
        cli.main([str(argument) for argument in arguments])
    code = ended.value.code
    assert isinstance(code, int)
    return code


def read(path: Path) -> Any:
    return json.loads(path.read_text())


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as stream:
        return list(csv.DictReader(stream))


def configuration(loss: str = "mse") -> dict[str, Any]:
    """Return a configuration with all entries that a run folder needs."""
    described = {"network": MLP([2, 1]), "loss": as_loss(loss), "optimizer": SGD(0.1)}
    return {
        "format": FORMAT,
        **dict.fromkeys(("command", "started", "backend", "precision", "plan"), "x"),
        "options": {"metric": None},
        "data": {"name": "x", "source": "x", "fingerprint": "x", "notes": []},
        "preprocessor": {},
        **{name: description.to_config() for name, description in described.items()},
        "epochs": 1,
    }
