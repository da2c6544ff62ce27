"""Short and earlier module paths: ``fusemlp.losses`` is ``fusemlp.describe.losses``.

User code imports the public modules by these paths, and pickles of earlier releases name their classes by them.
"""

import importlib
import importlib.abc
import importlib.machinery
import sys
from collections.abc import Sequence
from types import ModuleType

PATHS = {
    "callbacks.trackers": "callbacks.loggers",
    "candidates": "fleet.candidates",
    "checkpoint": "training.checkpoint",
    "data": "datasets.load",
    "ensemble": "fleet.results",
    "explanations": "report.explanations",
    "history": "training.history",
    "losses": "describe.losses",
    "lr_finder": "training.lr_finder",
    "network": "describe.network",
    "onnx": "report.onnx",
    "optimizers": "describe.optimizers",
    "preprocessing": "datasets.preprocessing",
    "saving": "training.checkpoint",
    "schedules": "describe.schedules",
    "sklearn.classifier": "sklearn.estimators",
    "sklearn.regressor": "sklearn.estimators",
    "transfer": "training.transfer",
}


class _Alias(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds the module behind a short path; both paths lead to one module."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        """The spec of a short path, None for all others."""
        package, _, name = fullname.partition(".")
        if package != "fusemlp" or name not in PATHS:
            return None
        return importlib.machinery.ModuleSpec(fullname, self)

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType:
        """The module itself, under its own name."""
        module = importlib.import_module(f"fusemlp.{PATHS[spec.name.partition('.')[2]]}")
        spec.loader_state = module.__spec__
        return module

    def exec_module(self, module: ModuleType) -> None:
        """Undo what the import system has just written: the module keeps the spec it was loaded by."""
        assert module.__spec__ is not None
        module.__spec__ = module.__spec__.loader_state


def install() -> None:
    """Make the short paths importable, once."""
    if not any(isinstance(finder, _Alias) for finder in sys.meta_path):
        sys.meta_path.append(_Alias())
