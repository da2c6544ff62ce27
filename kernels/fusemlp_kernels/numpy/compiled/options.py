"""How the compiled functions are compiled."""

from __future__ import annotations

from typing import Any

# A division by zero gives an infinity or NaN, as in NumPy.
EXACT: dict[str, Any] = {"nogil": True, "error_model": "numpy"}
# Products and sums may be contracted into one rounding; the order of a sum stays, so that an argument reduction keeps
# what its second part is for.
ELEMENTWISE = EXACT | {"fastmath": {"contract"}}
# Sums may be taken in any order, that of vector registers.
REDUCTION = EXACT | {"fastmath": {"contract", "reassoc"}}
