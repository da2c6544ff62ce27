"""Parametrised tests of the contract count as one case each in the summary; the interpreter gets small tiles."""

from __future__ import annotations

import pytest

from fusemlp_kernels.triton import configs


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    """Under the interpreter a training has tiles of a size that is quick; tests want several tiles in few elements."""
    for product in ("forward", "weight"):
        small = {kind: [[32, 32, 32, 1, 1, 2]] for kind in configs.TABLES["interpreter"][product]}
        monkeypatch.setitem(configs.TABLES["interpreter"], product, small)


@pytest.fixture(autouse=True)
def count_contract_case(request, record_property):
    """Tests of random cases, whose parameter is a device, count their cases themselves."""
    variant = request.node.callspec.params.get("variant") if hasattr(request.node, "callspec") else None
    if variant is not None:
        record_property(f"line: contract cases, {variant.device.name}", 1)
