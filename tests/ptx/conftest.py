"""The emulator runs kernels that Triton compiles: where Triton interprets them, its tests run in another process."""

import gc
import importlib.util
import os
import sys
import zlib
from pathlib import Path

HERE = Path(__file__).parent
# the cache of ci/compile_kernels.py
os.environ.setdefault("TRITON_CACHE_DIR", str(HERE.parents[1] / "build/triton"))
# the emulator and the emulated cards
sys.path.insert(0, str(HERE))

APART = "test_apart.py"
SAMPLE, SAMPLED = "FUSEMLP_PTX_SAMPLE", ("test_kernels.py", "test_engine.py")
HERE_TOO = importlib.util.find_spec("triton") is not None and os.environ.get("TRITON_INTERPRET") != "1"
collect_ignore = [path.name for path in HERE.glob("test_*.py") if (path.name == APART) == HERE_TOO]


def pytest_collection_modifyitems(items):
    """Keep half of the cases of each kernel and fit where ``SAMPLE`` is set: compiling them takes minutes."""
    if os.environ.get(SAMPLE):
        cases = {}
        for item in items:
            cases.setdefault((item.path.name, item.originalname), []).append(item)
        mixed = [sorted(group, key=lambda item: zlib.crc32(item.name.encode())) for group in cases.values()]
        items[:] = [item for group in mixed for item in group[:: 1 + (group[0].path.name in SAMPLED)]]


def pytest_collection_finish():
    """Keep the collector from searching what is there for the whole run, such as torch's modules."""
    gc.freeze()


def pytest_sessionfinish():
    gc.unfreeze()
