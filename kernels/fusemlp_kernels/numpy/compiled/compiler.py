"""Options of numba, its cache on disk, and the memory and calls by address that compiled functions use.

Numba optimises every function that it meets and makes machine code of it, with copies of all that the function calls.
For a function that no Python code calls this is done for nothing: LLVM optimises the whole once more. It takes most of
the first ``fit`` on a machine. ``PartCompiler`` leaves it out.

The cache lies in the user's folder for caches, or in ``NUMBA_CACHE_DIR``; where neither can be written to, beside the
source. Numba keeps apart what is for other processors and other versions of Python in it, and replaces its files in one
go: two processes that compile one function at once write the same.

An array of numba's is seven numbers with a reference count: passed from function to function it made three quarters of
the code that LLVM had to read. ``Memory`` is one pointer, of which nothing checks the indices. Numba compiles what a
function calls again with each caller, but for functions that are called by their address.
"""

from __future__ import annotations

import functools
import logging
import os
import platform
import shutil
import tempfile
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import llvmlite.binding
import numba
import numpy as np
from llvmlite import ir
from numba import _dynfunc, from_dtype, types  # type: ignore[attr-defined]
from numba.core import cgutils
from numba.core.caching import CompileResultCacheImpl, FunctionCache, _CacheLocator
from numba.core.ccallback import CFunc
from numba.core.codegen import JITCodeLibrary
from numba.core.compiler import CompilerBase, DefaultPassBuilder
from numba.core.compiler_machinery import PassManager, register_pass
from numba.core.runtime.nrt import rtsys
from numba.core.typed_passes import NativeLowering
from numba.core.typing.templates import AttributeTemplate
from numba.extending import infer_getattr, lower_getattr, models, register_jitable, register_model
from numba.misc.appdirs import AppDirs

from fusemlp_kernels.compilation import announced
from fusemlp_kernels.errors import ArgumentError
from fusemlp_kernels.numpy.compiled import tables as t

_log = logging.getLogger("fusemlp.kernels.compile")

# numba's own type of it counts the typing context among the arguments of a call
intrinsic: Any = numba.extending.intrinsic

X86 = platform.machine().lower() in ("x86_64", "amd64")

# Set, the instruction set of x86 to use in place of the processor's own, for tests and benchmarks; the width of its
# vector registers in bytes, which other processors have too; and how LLVM's names of what the narrower sets lack begin.
ISA = "FUSEMLP_ISA"
REGISTERS = {"sse": 16, "avx2": 32, "avx512": 64}
_BEYOND = {"sse": ("avx", "fma", "f16c", "vaes", "vpclmul"), "avx2": ("avx512",), "avx512": ()}


def _register_bytes() -> int:
    """Return the width of a vector register; with ISA, narrow what numba compiles for."""
    features = llvmlite.binding.get_host_cpu_features() if X86 else {}
    widest = "avx512" if features.get("avx512f") else "avx2" if features.get("avx2") else "sse"
    name = os.environ.get(ISA) or widest
    if REGISTERS.get(name, 1 << 10) > REGISTERS[widest]:
        known = ", ".join(isa for isa, width in REGISTERS.items() if width <= REGISTERS[widest])
        raise ArgumentError(f"{ISA}: expected an instruction set of this processor ({known}), got {name!r}; unset it")
    if name != widest:
        kept = ("-+"[on and not feature.startswith(_BEYOND[name])] + feature for feature, on in features.items())
        config: Any = numba.config
        config.CPU_NAME, config.CPU_FEATURES = llvmlite.binding.get_host_cpu_name(), ",".join(kept)
    return REGISTERS[name]


REGISTER_BYTES = _register_bytes()

# A folder that no process has used for so long is deleted, in seconds: 90 days.
UNUSED = 90 * 24 * 3600.0


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
ELEMENT: Any = ELEMENTWISE | {"forceinline": True}
# Sums may be taken in any order, that of vector registers.
REDUCTION: Any = EXACT | {"fastmath": {"contract", "reassoc"}}


def contents() -> int:
    """A number for the text of all files that are compiled."""
    here = Path(__file__).parent
    files = [
        *sorted(here.glob("*.py")),
        *(here.parent.parent / f"{name}.py" for name in ("coding", "contract", "philox")),
    ]
    number = 0
    for file in files:
        number = zlib.crc32(file.read_bytes(), number)
    return number


def _places() -> Iterator[Path]:
    config: Any = numba.config
    yield Path(config.CACHE_DIR or AppDirs("fusemlp", appauthor=False).user_cache_dir)
    yield Path(__file__).parent / "__pycache__"


@functools.cache
def folder() -> Path | None:
    """The folder of this version of numba and of the source; None where nothing can be written."""
    for place in _places():
        path = place / f"numba-{numba.__version__}-{contents():08x}"
        try:
            new = not path.exists()
            path.mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=path).close()
            os.utime(path)
            if new:
                _delete_unused(place)
        except OSError as error:
            _log.info("what numba compiles is not kept in %s: %s", path, error)
            continue
        return path
    return None


def _delete_unused(place: Path) -> None:
    """Delete the folders of other versions that have not been used for long."""
    for other in place.glob("numba-*-*"):
        # another process may delete it at the same time
        with suppress(OSError):
            if time.time() - other.stat().st_mtime > UNUSED:
                shutil.rmtree(other)


class _Locator(_CacheLocator):
    """Tells numba the folder, whose name says already what the functions are made of."""

    def get_cache_path(self) -> str:
        return str(folder())

    def get_source_stamp(self) -> int:
        return 0

    def get_disambiguator(self) -> str:
        return ""

    @classmethod
    def from_function(cls, py_func: Any, py_file: str) -> Any:
        return cls()


class _Files(CompileResultCacheImpl):
    _locator_classes: Any = (_Locator,)


class _Cache(FunctionCache):
    """The cache of a function; ``absent`` is called if it is not there."""

    _impl_class = _Files

    def __init__(self, function: Any, absent: Callable[[], object] = lambda: None) -> None:
        super().__init__(function)
        self._absent = absent

    def load_overload(self, sig: Any, target_context: Any) -> Any:
        # numba's own refreshes the context first: imports of 0.3 s, which machine code from the disk does without
        rtsys.initialize(target_context)
        with self._guard_against_spurious_io_errors():
            overload = self._load_overload(sig, target_context)
        if overload is None:
            target_context.refresh()
            _log.info("compiling %s, once for this processor", self._py_func.__name__)
            self._absent()
        return overload


def _name(name: str, variant: str) -> str:
    """Numba finds what it has kept by the name of a function: let it hold ``variant``."""
    return f"{name}_{zlib.crc32(variant.encode()):08x}"


def kept(function: Callable[..., object], variant: str = "") -> Any:
    """``function``, compiled for the types of its arguments when it is first called, or read from the disk."""
    options: Any = {**WHOLE, "no_cfunc_wrapper": True}
    function.__qualname__ = _name(function.__name__, variant)
    compiled: Any = numba.njit(**options)(function)
    if folder():
        compiled._cache = _Cache(function)
    return compiled


def kept_for_calls(build: Callable[[], Callable[..., object]], name: str, variant: str, kinds: Sequence[Any]) -> Any:
    """The function that ``build()`` returns, as ``kept``, with an ``address``; what the disk holds is not built.

    It takes arguments of these types and returns a word.
    """

    def stub(*words: int) -> int:
        raise AssertionError("compiled code only")

    stub.__name__, stub.__qualname__ = name, _name(name, variant)
    compiled: Any = CFunc(stub, (tuple(kinds), types.intp), {}, WHOLE)
    with ExitStack() as stack:

        def absent() -> None:
            stack.enter_context(announced())
            function = build()
            function.__qualname__ = stub.__qualname__
            compiled._compiler.py_func = function

        if folder():
            compiled._cache = _Cache(stub, absent)
        else:
            absent()
        compiled.compile()
    return compiled


def instruction(builder: Any, name: str, result: Any, *arguments: Any) -> Any:
    """Call an instruction of LLVM, or of the processor."""
    kind = ir.FunctionType(result, [argument.type for argument in arguments])
    return builder.call(cgutils.get_or_insert_function(builder.module, kind, f"llvm.{name}"), arguments)


def emits(result: Any, *kinds: Any) -> Callable[[Callable[..., Any]], Any]:
    """Decorate ``code(builder, *arguments)``, which writes the code of a function of arguments of these types."""

    def decorate(code: Callable[..., Any]) -> Any:
        def lowered(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            value = code(builder, *arguments)
            return context.get_dummy_value() if result is types.void else value

        # numba reads the names of the arguments
        @functools.wraps(code)
        def typed(typingctx: Any, *given: Any) -> Any:
            return result(*kinds), lowered

        return intrinsic(typed)

    return decorate


class Memory(types.CPointer):
    """Numbers of type ``dtype`` side by side, from an address on."""


register_model(Memory)(models.PointerModel)


@infer_getattr
class _Attributes(AttributeTemplate):
    """``dtype`` and ``itemsize``, as arrays have them."""

    key = Memory

    def resolve_dtype(self, memory: Any) -> Any:
        return types.DType(memory.dtype)

    def resolve_itemsize(self, memory: Any) -> Any:
        return types.intp


@lower_getattr(Memory, "dtype")
def _dtype(context: Any, builder: Any, kind: Any, value: Any) -> Any:
    return context.get_dummy_value()


@lower_getattr(Memory, "itemsize")
def _itemsize(context: Any, builder: Any, kind: Any, value: Any) -> Any:
    return context.get_constant(types.intp, context.get_abi_sizeof(context.get_data_type(kind.dtype)))


@intrinsic
def elements(typingctx: Any, like: Any, address: Any) -> Any:
    """The elements at an address, of the type of ``like``'s."""
    kind = Memory(like.dtype)

    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.inttoptr(arguments[1], context.get_value_type(kind))

    return kind(like, types.intp), code


@intrinsic
def part(typingctx: Any, memory: Any, start: Any) -> Any:
    """The elements from ``start`` on."""

    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.gep(arguments[0], [arguments[1]])

    return memory(memory, types.intp), code


def _records(dtype: np.dtype[np.void]) -> Any:
    """``at(address, index)``: a record of those of this type that lie side by side from an address on."""
    kind = from_dtype(dtype)

    def at(typingctx: Any, address: Any, index: Any) -> Any:
        def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            return builder.gep(builder.inttoptr(arguments[0], context.get_value_type(kind)), [arguments[1]])

        return kind(types.intp, types.intp), code

    return intrinsic(at)


@intrinsic
def call_function(typingctx: Any, address: Any, *given: Any) -> Any:
    """Call a function by its address; the word that it returns."""
    kinds = [types.unliteral(kind) for kind in given]

    def code(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        parts = cgutils.unpack_tuple(builder, values[1], len(kinds))
        of = [context.get_value_type(kind) for kind in kinds]
        function = ir.FunctionType(context.get_value_type(types.intp), of).as_pointer()
        return builder.call(builder.inttoptr(values[0], function), parts)

    return types.intp(types.intp, types.Tuple(kinds)), code


head_at, call_at, tensor_at, phase_at, task_at, piece_at, column_at = map(
    _records, (t.HEAD, t.CALL, t.TENSOR, t.PHASE, t.TASK, t.PIECE, t.COLUMN)
)


@intrinsic
def copy(typingctx: Any, like: Any, target: Any, source: Any, count: Any) -> Any:
    """Copy ``count`` elements from one address to another."""

    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        _, target, source, count = arguments
        size = context.get_abi_sizeof(context.get_value_type(like.dtype))
        byte = ir.IntType(8).as_pointer()
        to, of = (builder.inttoptr(address, byte) for address in (target, source))
        cgutils.raw_memcpy(builder, to, of, count, size)
        return context.get_dummy_value()

    return types.void(like, *[types.intp] * 3), code


@emits(types.void, types.intp)
def prefetch(builder: Any, address: Any) -> None:
    """Ask for the cache line at an address, which is read later."""
    pointer = builder.inttoptr(address, ir.IntType(8).as_pointer())
    reads, second_level, data = map(ir.IntType(32), (0, 2, 1))
    instruction(builder, "prefetch.p0", ir.VoidType(), pointer, reads, second_level, data)


@register_jitable(**EXACT)
def block(like: Any, address: int, first: int, columns: int) -> Any:
    """The rows of an array from ``first`` on."""
    return elements(like, address + like.itemsize * first * columns)


@register_jitable(**EXACT)
def clear(values: Any, count: int) -> None:
    """Zeros."""
    for j in range(np.uintp(count)):
        values[j] = 0
