"""Extension of griffe, which reads the docstrings: the short module paths, such as ``fusemlp.losses``."""

from __future__ import annotations

from typing import Any

import griffe

from fusemlp import _PATHS


class ShortPaths(griffe.Extension):
    """Add each short path to the package, so that the API pages name what users import."""

    def on_package(self, *, pkg: griffe.Module, **_: Any) -> None:
        if pkg.name == "fusemlp":
            for name, path in _PATHS.items():
                pkg.set_member(name, griffe.Alias(name, f"fusemlp.{path}"))
