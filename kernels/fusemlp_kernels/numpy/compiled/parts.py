"""Compile a function only as far as the functions that call it need: most of the first ``fit`` on a machine goes there.

Numba optimises every function that it meets and makes machine code of it, with copies of all that the function calls.
For a function that no Python code calls this is done for nothing: LLVM optimises the whole once more.
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
        made = state["cr"]
        # by this numba finds the code; it has no address
        name = _dynfunc.make_function(made.fndesc.lookup_module(), made.fndesc.qualname, "", 0, made.env, (library,))
        context.insert_user_function(name, made.fndesc, [library])
        state["cr"] = made._replace(cfunc=name)
        return True


class PartCompiler(CompilerBase):
    """Compiles functions that are called by compiled functions only."""

    def define_pipelines(self) -> list[Any]:
        passes = PassManager("part")
        for step, told in DefaultPassBuilder.define_nopython_pipeline(self.state).passes:
            passes.add_pass(_PartLowering if step is NativeLowering else step, told)
        passes.finalize()
        return [passes]
