"""The emulated cards as devices of the contract's tests, and the choice of a tile."""

import contextlib
from dataclasses import replace
from unittest import mock

import triton
from devices import GPU, Variant
from emulator.driver import emulated

from fusemlp_kernels.triton import configs

# Rows of the tiles that compile to each instruction of tensor cores. The larger tiles of sm_100 need tcgen05.
WARP, WARPGROUP, DESCRIBED = 16, 64, 128
PATHS = {
    "sm_80 mma.sync": ("sm_80", WARP),
    "sm_90 mma.sync": ("sm_90", WARP),
    "sm_90 wgmma": ("sm_90", WARPGROUP),
    "sm_90 TMA": ("sm_90", DESCRIBED),
    "sm_100 mma.sync": ("sm_100", WARP),
}


# Kernels that a version of Triton compiles without ``fence.proxy.async`` between copies and wgmma, by precision. The
# list may only shrink: a kernel of it that has its fences stops.
UNFENCED = {
    "3.6.0": {"bf16": {"linear_kernel", "grad_input_kernel", "grad_weight_kernel"}, "tf32": {"linear_kernel"}},
}


@contextlib.contextmanager
def card(path, precision, **settings):
    """Emulate a card with the tiles of a path, or the smallest of a target; ``variant`` is the backend on it.

    See ``emulated`` for the settings.
    """
    target, rows = PATHS.get(path, (path, WARP))
    settings = {"unfenced": UNFENCED.get(triton.__version__, {}).get(precision, ()), **settings}
    kind, table = configs._kind(precision), configs.TABLES[target]
    chosen = {
        product: {**table[product], kind: [tile for tile in table[product][kind] if tile[0] == rows]}
        for product in ("forward", "weight")
    }
    with mock.patch.dict(table, chosen), emulated(target, precision, **settings) as emulator:
        # the bounds of tensor cores
        emulator.variant = Variant(replace(GPU, name=f"triton, emulated {target}"), precision)
        yield emulator
