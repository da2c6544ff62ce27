"""``fusemlp lr-find``: a sweep of the learning rate, printed as a table."""

from __future__ import annotations

import sys

import numpy as np

from fusemlp.cli.commands import FindOptions
from fusemlp.cli.output import check_output, show
from fusemlp.cli.prepare import prepare
from fusemlp.describe.checks import as_number
from fusemlp.describe.summary import aligned
from fusemlp.report.plots import HINT, can_plot, picture, sweep_figure
from fusemlp.runtime.files import write_atomically
from fusemlp_kernels.errors import ArgumentError

TABLE_ROWS = 20


def lr_find(options: FindOptions) -> None:
    """Sweep, print a table of rate and smoothed loss, and suggest the rate with the steepest fall of the loss."""
    start = as_number("from", options.start, low=0.0, low_open=True)
    end = as_number("to", options.end, low=start, low_open=True)
    if options.lr is not None:
        raise ArgumentError("lr: lr-find goes through the rates itself; say which with --from and --to")
    if options.data is None:
        raise ArgumentError("DATA: say which data the learning rate is for, such as digits")
    plot = options.plot
    if plot is not None:
        check_output("plot", plot, (".png",), force=options.force)
        if not can_plot():
            raise ArgumentError(f"plot: {HINT}")
    prepared = prepare(options)
    rows, engine = prepared.train, prepared.engine(options)
    found = engine.lr_find(rows.X, rows.y, sample_weight=rows.weight, start=start, end=end, steps=options.steps)
    if plot is not None:
        title = f"{prepared.dataset.name}: {'-'.join(map(str, engine.network.sizes))}, {engine.optimizer.kind}"
        write_atomically(plot, picture(sweep_figure(found.rates, found.losses, found.suggestion, title)))
    if not found.complete and not options.as_json:
        print(f"the loss blew up after {len(found.rates)} of {options.steps} updates", file=sys.stderr)
    shown = np.unique(np.linspace(0, len(found.rates) - 1, TABLE_ROWS).round().astype(int))
    lines = [
        *prepared.notes,
        aligned([["rate", "loss"], *([f"{found.rates[i]:.2e}", f"{found.losses[i]:.4g}"] for i in shown)]),
        f"suggested learning rate {found.suggestion:.2g}",
        *([] if plot is None else [f"plot {plot}"]),
    ]
    content = {
        "suggested": found.suggestion,
        "rates": found.rates,
        "losses": found.losses,
        "plot": None if plot is None else str(plot),
        "notes": list(prepared.notes),
    }
    show(content, lines, as_json=options.as_json)
