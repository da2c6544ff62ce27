"""A pytest plugin for ``mutate_kernels``: test a copy of the kernels, record the first failure, shrink nothing."""

from __future__ import annotations

import importlib.util
import json
import os
from pathlib import Path

import pytest
from hypothesis import Phase, settings

# Environment variables: the folder that the kernels must come from, and the file for the failure.
KERNELS, FAILURE = "MUTATED_KERNELS", "MUTATION_FAILURE"


def pytest_configure(config: pytest.Config) -> None:
    # Hypothesis need not shrink a failing case: one failure is enough.
    settings.register_profile("first failure", phases=(Phase.explicit, Phase.generate), report_multiple_bugs=False)
    settings.load_profile("first failure")
    spec = importlib.util.find_spec("fusemlp_kernels")
    wanted = Path(os.environ[KERNELS]).resolve()
    if spec is None or spec.origin is None or not Path(spec.origin).resolve().is_relative_to(wanted):
        pytest.exit(f"fusemlp_kernels is not the copy in {wanted}: {spec}", returncode=3)


def pytest_exception_interact(node: pytest.Item, call: pytest.CallInfo[object]) -> None:
    if call.excinfo is not None:
        message = str(call.excinfo.value).strip().partition("\n")[0]
        found = {"test": node.nodeid, "error": call.excinfo.typename, "message": message}
        Path(os.environ[FAILURE]).write_text(json.dumps(found), encoding="utf-8")
