"""The options of compiled functions."""

from __future__ import annotations

from typing import Any

from fusemlp_kernels.numpy.compiled.parts import PartCompiler

# Of functions that are called from outside. A division by zero gives an infinity or NaN, as in NumPy.
WHOLE: dict[str, Any] = {"nogil": True, "error_model": "numpy"}
# Of functions that compiled functions call.
EXACT: dict[str, Any] = WHOLE | {"no_cfunc_wrapper": True, "no_cpython_wrapper": True, "pipeline_class": PartCompiler}
# Products and sums may be contracted into one rounding; the order of a sum stays, so that an argument reduction keeps
# what its second part is for.
ELEMENTWISE = EXACT | {"fastmath": {"contract"}}
# A function of one element: a loop that calls it without having its code in it is not brought into vector registers.
ELEMENT = ELEMENTWISE | {"forceinline": True}
# Sums may be taken in any order, that of vector registers.
REDUCTION = EXACT | {"fastmath": {"contract", "reassoc"}}
