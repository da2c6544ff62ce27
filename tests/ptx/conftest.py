"""The emulator runs kernels that Triton compiles: where Triton interprets them, its tests run in another process."""

import gc
import importlib.util
import os
import sys
from pathlib import Path

HERE = Path(__file__).parent
# the cache of ci/compile_kernels.py
os.environ.setdefault("TRITON_CACHE_DIR", str(HERE.parents[1] / "build/triton"))
# the emulator and the emulated cards
sys.path.insert(0, str(HERE))

APART = "test_apart.py"
HERE_TOO = importlib.util.find_spec("triton") is not None and os.environ.get("TRITON_INTERPRET") != "1"
collect_ignore = [path.name for path in HERE.glob("test_*.py") if (path.name == APART) == HERE_TOO]


def pytest_collection_finish():
    """Keep the collector from searching what is there for the whole run, such as torch's modules."""
    gc.freeze()


def pytest_sessionfinish():
    gc.unfreeze()
