"""The emulator runs kernels that Triton compiles: where Triton interprets them, its tests run in another process."""

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
SAMPLE, SAMPLED = "FUSEMLP_PTX_SAMPLE", ("test_kernels.py", "test_engine.py")
# One case is enough: compiling the resident kernel with a tile takes half a minute, and a fit has the other card.
ONCE = "test_every_resident_tile_is_the_oracles"
HERE_TOO = importlib.util.find_spec("triton") is not None and os.environ.get("TRITON_INTERPRET") != "1"
collect_ignore = [path.name for path in HERE.glob("test_*.py") if (path.name == APART) == HERE_TOO]


def pytest_collection_modifyitems(items):
    """Keep a sample of the cases of each kernel and fit where ``SAMPLE`` is set."""
    if os.environ.get(SAMPLE):
        from sample import covering

        tests = {}
        for item in items:
            name = item.originalname if item.path.name in SAMPLED else item.name
            tests.setdefault((item.path, name), []).append(item)
        for key, cases in tests.items():
            tests[key] = [cases[place] for place in covering([_parameters(case) for case in cases])]
        items[:] = [case for cases in tests.values() for case in cases]


def _parameters(case):
    """Return the parameters that the sample varies, and the test, as there may be none."""
    varied = hasattr(case, "callspec") and case.originalname != ONCE
    return {"test": case.originalname, **(case.callspec.params if varied else {})}
