"""``fusemlp lr-find``: a sweep of the learning rate, printed as a table."""

from __future__ import annotations

import sys
from typing import Any

import numpy as np

from fusemlp.cli.options import FindOptions
from fusemlp.cli.output import check_output, show, write_picture
from fusemlp.cli.session import prepared_data
from fusemlp.describe.checks import as_number
from fusemlp.describe.summary import aligned
from fusemlp.report.plots import check_plots, literal, sweep_figure
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
        check_plots()
    prepared = prepared_data(options)
    rows, engine = prepared.train, prepared.engine(prepared.recipe)
    found = engine.lr_find(rows.X, rows.y, sample_weight=rows.weight, start=start, end=end, steps=options.steps)
    if not found.complete and not options.as_json:
        print(f"the loss blew up after {len(found.rates)} of {options.steps} updates", file=sys.stderr)
    shown = np.unique(np.linspace(0, len(found.rates) - 1, TABLE_ROWS).round().astype(int))
    lines = [
        *prepared.notes,
        aligned([["rate", "loss"], *([f"{found.rates[i]:.2e}", f"{found.losses[i]:.4g}"] for i in shown)]),
        f"suggested learning rate {found.suggestion:.2g}",
    ]
    content: dict[str, Any] = {
        "suggested": found.suggestion,
        "rates": found.rates,
        "losses": found.losses,
        "plot": None,
        "notes": list(prepared.notes),
    }
    try:
        if plot is not None:
            title = f"{prepared.dataset.name}: {'-'.join(map(str, engine.network.sizes))}, {engine.optimizer.kind}"
            write_picture(plot, lambda: sweep_figure(found.rates, found.losses, found.suggestion, literal(title)))
            lines.append(f"plot {plot}")
            content["plot"] = str(plot)
    finally:
        show(content, lines, as_json=options.as_json)
