"""Recipes of a training by name, and the choice among them."""

from collections.abc import Mapping
from typing import Any

from fusemlp.describe.checks import check_choice
from fusemlp.describe.network import MLP
from fusemlp_kernels.errors import ArgumentError

PRESETS = ("auto", "plain", "tabm")
# The members of the recipe "tabm", and what it has in place of defaults (Gorishniy et al., "TabM", 2025).
MEMBERS = 16
LEAST_STEPS = 16
# "auto" takes it for classes of this many rows, not counting the test rows: its gains were measured there.
LEAST_ROWS, MOST_ROWS = 12_000, 100_000
TABM: Mapping[str, Any] = {
    "hidden": (128, 128),
    "activation": "silu",
    "optimizer": "adamw",
    "lr": 2e-3,
    "batch_size": 256,
}


def obstacles(options: Any, net: MLP) -> dict[str, str]:
    """Return the options that the recipe "tabm" does not go with, and why; ``net`` is the network without members."""
    found = {}
    if (options.models or 1) > 1:
        found["models"] = "it is one network whose members share weights; leave it out"
    if net.layers == 1:
        found["hidden"] = "members share hidden layers; leave it out"
    if "norm" in net.uses:
        found["norm"] = "members share no normalised layers; leave it out"
    if "prelu" in net.uses:
        found["activation"] = "prelu's slope belongs to a whole layer; use leaky_relu"
    return found


def chosen(
    asked: str | None, rows: int, against: Mapping[str, str], *, classify: bool, own: bool = False
) -> tuple[str, str]:
    """Return the name of the recipe for ``rows`` rows of a table, and a note that says why.

    None asks for "auto", but for a network of the caller's ``own`` design. ``against``: as ``obstacles`` returns them;
    ``classify``: the target holds classes. Raises ArgumentError for an unknown name, and for "tabm" with an obstacle.
    """
    name = "auto" if asked is None else check_choice("preset", asked, PRESETS)
    about = f"{MEMBERS} members share the weights of one network"
    if name == "tabm":
        for option, reason in against.items():
            raise ArgumentError(f"{option}: the preset tabm does not take it: {reason}")
        return name, f"preset tabm: {about}, as asked for"
    reason = ""
    if not LEAST_ROWS <= rows <= MOST_ROWS:
        reason = f"tabm is for {LEAST_ROWS:,} to {MOST_ROWS:,} rows, and these are {rows:,}"
    elif not classify:
        reason = "tabm is for classes, and the target holds numbers; --preset tabm takes them too"
    elif against:
        reason = f"tabm does not take what was given for {', '.join(against)}"
    if name == "plain" or (asked is None and (own or reason)):
        return "plain", ""
    if reason:
        return "plain", f"preset plain: {reason}"
    return "tabm", f"preset tabm: {about}, chosen for classes of {rows:,} rows; --preset plain takes less time"


def changes(given: Mapping[str, bool], rows: int) -> dict[str, Any]:
    """Return what the recipe "tabm" has for ``rows`` rows in place of options that are not ``given``.

    An epoch has ``LEAST_STEPS`` steps at least, unless that takes batches of less than the plain recipe's rows.
    """
    # a rate belongs to its optimizer
    kept = {**given, "lr": given["lr"] or given["optimizer"]}
    size = max(32, min(TABM["batch_size"], 1 << max(0, rows // LEAST_STEPS).bit_length() >> 1))
    return {name: value for name, value in {**TABM, "batch_size": size}.items() if not kept[name]}
