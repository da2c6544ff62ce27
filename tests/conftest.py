"""The oracle comparison and its tolerances live with the kernels' tests, and all tests use them."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent / "kernels"))
