"""Tests of the contract are counted in the summary: the cases of each backend, a parametrised test being one; and how
many tests NumPy, Triton and CuPy have in common, and what each has besides. The interpreter gets small tiles.
"""

from __future__ import annotations

import pytest
from devices import WITHOUT_A_CARD, Variant

from fusemlp_kernels.triton import configs

SHARED = "line: contract tests that all three have in fp32"
COMMON = pytest.StashKey[bool]()


def variant_of(item):
    """The backend and precision that a test is about; None where it is about one, or all, of a device's."""
    given = item.callspec.params.get("variant") if hasattr(item, "callspec") else None
    return given if isinstance(given, Variant) else None


def pytest_collection_modifyitems(items):
    """Return the fp32 tests of every backend that runs without a card."""
    found = {}
    for item in items:
        variant = variant_of(item)
        if variant is not None and variant.precision == "fp32" and variant.device in WITHOUT_A_CARD:
            name = item.nodeid.replace(f"{variant.device.name}, fp32", "fp32")
            found.setdefault(name, []).append(item)
    for group in found.values():
        for item in group:
            item.stash[COMMON] = len(group) == len(WITHOUT_A_CARD)


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    """Under the interpreter a training has tiles of a size that is quick; tests want several tiles in few elements."""
    for product in ("forward", "weight"):
        small = {kind: [[32, 32, 32, 1, 1, 2]] for kind in configs.TABLES["interpreter"][product]}
        monkeypatch.setitem(configs.TABLES["interpreter"], product, small)


@pytest.fixture(autouse=True)
def count_contract_case(request, record_property):
    """Tests of random cases, whose parameter is a device, count their cases themselves."""
    variant = variant_of(request.node)
    if variant is None:
        return
    record_property(f"line: contract cases, {variant.device.name}", 1)
    if request.node.stash.get(COMMON, False):
        record_property(f"{SHARED}, {variant.device.name}", 1)
    else:
        record_property(f"line: contract tests besides, {variant.device.name}, {variant.precision}", 1)
