"""The options of ``sweep``: those of ``train``, and the varied parameters."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import typer

from fusemlp.cli.options import FitOptions

SWEEP = "Sweep"


@dataclass(frozen=True)
class SweepOptions(FitOptions):
    """The options of ``sweep``."""

    vary: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=VALUES",
            help="A varied parameter, one an option: lr, momentum, betas, weight_decay, dropout, hidden, "
            "label_smoothing, seed or batch_size. VALUES: a list 0.1,0.2 (layers and betas joined by x: "
            "hidden=32,64x32, betas=0.9x0.999); LOW:HIGH:log:COUNT or LOW:HIGH:lin:COUNT (LOW:HIGH:COUNT), ends "
            "included; whole numbers FIRST:END as Python's range, END left out: seed=0:20.",
            rich_help_panel=SWEEP,
        ),
    ] = None
    sample: Annotated[
        int | None,
        typer.Option(
            metavar="COUNT",
            help="Train this many of all combinations, drawn at random by the seed of the split.",
            rich_help_panel=SWEEP,
        ),
    ] = None
    metric: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="The score that ranks the models: val_loss (default), val_accuracy, loss or accuracy. The test rows "
            "score only the best model.",
            rich_help_panel=SWEEP,
        ),
    ] = None
    jobs: Annotated[
        int | None,
        typer.Option(help="The number of models that train at once; one a core unless given.", rich_help_panel=SWEEP),
    ] = None
