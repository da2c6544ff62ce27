"""Count the tests of the contract in the summary: the cases of each backend, the tests that NumPy, Triton and CuPy have
in common, and the others of each. The interpreter gets small tiles.
"""

import pytest
from devices import WITHOUT_A_CARD, Variant

from fusemlp_kernels.triton import configs

SHARED = "line: contract tests that all three have in fp32"
COMMON = pytest.StashKey[bool]()


def variant_of(item):
    """Return the backend and precision of a test; None stands for one, or all, of a device's."""
    given = item.callspec.params.get("variant") if hasattr(item, "callspec") else None
    return given if isinstance(given, Variant) else None


def pytest_collection_modifyitems(items):
    """Mark the fp32 tests that every backend without a card has."""
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
    """Use small tiles under the interpreter, so that few elements fill several tiles."""
    for product in ("forward", "weight"):
        small = {kind: [[32, 32, 32, 1, 1, 2]] for kind in configs.TABLES["interpreter"][product]}
        monkeypatch.setitem(configs.TABLES["interpreter"], product, small)
    monkeypatch.setattr(configs, "MOST_SPLITS", 2)


@pytest.fixture(autouse=True)
def count_contract_case(request, record_property):
    """Count a case of the contract; tests of random cases, with a device as parameter, count their own."""
    variant = variant_of(request.node)
    if variant is None:
        return
    record_property(f"line: contract cases, {variant.device.name}", 1)
    if request.node.stash.get(COMMON, False):
        record_property(f"{SHARED}, {variant.device.name}", 1)
    else:
        record_property(f"line: contract tests besides, {variant.device.name}, {variant.precision}", 1)
