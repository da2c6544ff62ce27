"""The options of compiled functions, and a compiler for those that only compiled functions call.

Numba optimises every function that it meets and makes machine code of it, with copies of all that the function calls.
For a function that no Python code calls this is done for nothing: LLVM optimises the whole once more. It takes most of
the first ``fit`` on a machine.
"""

from __future__ import annotations

from typing import Any

from numba import _dynfunc  # type: ignore[attr-defined]
from numba.core.codegen import JITCodeLibrary
from numba.core.compiler import CompilerBase, DefaultPassBuilder
from numba.core.compiler_machinery import PassManager, register_pass
from numba.core.typed_passes import NativeLowering


class _Part(JITCodeLibrary):
    """Code to be linked into others."""

    def finalize(self) -> None:
        for library in dict.fromkeys(self._linking_libraries):
            self._final_module.link_in(library._get_module_for_linking(), preserve=True)
        self._finalized = True


@register_pass(mutates_CFG=True, analysis_only=False)
class _PartLowering(NativeLowering):
    _name = "lowering_of_a_part"

    def run_pass(self, state: Any) -> bool:
        context = state.targetctx
        state.library = library = _Part(context.codegen(), state.func_id.func_qualname)
        library.enable_object_caching()
        state.flags = state.flags.copy()
        state.flags.no_compile = True
        super().run_pass(state)
        result = state["cr"]
        # by this numba finds the code; it has no address
        name = _dynfunc.make_function(
            result.fndesc.lookup_module(), result.fndesc.qualname, "", 0, result.env, (library,)
        )
        context.insert_user_function(name, result.fndesc, [library])
        state["cr"] = result._replace(cfunc=name)
        return True


class PartCompiler(CompilerBase):
    """Compiles functions that are called by compiled functions only."""

    def define_pipelines(self) -> list[Any]:
        passes = PassManager("part")
        for step, reason in DefaultPassBuilder.define_nopython_pipeline(self.state).passes:
            passes.add_pass(_PartLowering if step is NativeLowering else step, reason)
        passes.finalize()
        return [passes]


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
