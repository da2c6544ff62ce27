"""Many models of one kind, trained on one data set."""

from __future__ import annotations

from fusemlp.fleet.fleet import Fleet

__all__ = ["Fleet"]
