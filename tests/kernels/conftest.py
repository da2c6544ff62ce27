"""The interpreter gets small tiles."""

import pytest

from fusemlp_kernels.triton import configs


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    """Use small tiles under the interpreter, so that few elements fill several tiles."""
    for product in ("forward", "weight"):
        small = {kind: [[32, 32, 32, 1, 1, 2]] for kind in configs.TABLES["interpreter"][product]}
        monkeypatch.setitem(configs.TABLES["interpreter"], product, small)
    monkeypatch.setattr(configs, "MOST_SPLITS", 2)
