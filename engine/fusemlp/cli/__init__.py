"""The command line: ``app`` parses options and calls a command, each of which has a module."""

from __future__ import annotations

from fusemlp.cli.app import main

__all__ = ["main"]
