"""Parametrised tests of the contract count as one case each in the summary of a run."""

from __future__ import annotations

import pytest


@pytest.fixture(autouse=True)
def count_contract_case(request, record_property):
    """Tests of random cases, whose parameter is a device, count their cases themselves."""
    variant = request.node.callspec.params.get("variant") if hasattr(request.node, "callspec") else None
    if variant is not None:
        record_property(f"line: contract cases, {variant.device.name}", 1)
