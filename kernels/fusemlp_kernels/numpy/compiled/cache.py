"""Compiled functions on disk: one cache for all environments of a user.

It lies in the user's folder for caches, or in ``NUMBA_CACHE_DIR``; where neither can be written to, beside the source.
Numba keeps apart what is for other processors and other versions of Python in it, and replaces its files in one go:
two processes that compile one function at once write the same.
"""

from __future__ import annotations

import functools
import logging
import os
import shutil
import tempfile
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import numba
from numba import types
from numba.core.caching import CompileResultCacheImpl, FunctionCache, _CacheLocator
from numba.core.ccallback import CFunc
from numba.misc.appdirs import AppDirs

from fusemlp_kernels.compilation import announced
from fusemlp_kernels.numpy.compiled.options import WHOLE

_log = logging.getLogger("fusemlp.kernels.compile")

# A folder that no process has used for so long is deleted, in seconds: 90 days.
UNUSED = 90 * 24 * 3600.0


def contents() -> int:
    """A number for the text of all files that are compiled."""
    here = Path(__file__).parent
    files = [*sorted(here.glob("*.py")), here.parent.parent / "contract.py", here.parent.parent / "philox.py"]
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
        found = super().load_overload(sig, target_context)
        if found is None:
            _log.info("compiling %s, once for this processor", self._py_func.__name__)
            self._absent()
        return found


def _named(function: Any, variant: str) -> Any:
    """Numba finds what it has kept by the name of a function: let it hold ``variant``."""
    function.__qualname__ = f"{function.__name__}_{zlib.crc32(variant.encode()):08x}"
    return function


def kept(function: Callable[..., object], variant: str = "") -> Any:
    """``function``, compiled for the types of its arguments when it is first called, or read from the disk."""
    options: Any = {**WHOLE, "no_cfunc_wrapper": True}
    compiled: Any = numba.njit(**options)(_named(function, variant))
    if folder():
        compiled._cache = _Cache(function)
    return compiled


def kept_for_calls(function: Callable[..., object], variant: str, kinds: Sequence[Any]) -> Any:
    """``function``, which takes arguments of these types and returns a word, as ``kept``, with an ``address``."""
    compiled: Any = CFunc(_named(function, variant), (tuple(kinds), types.intp), {}, WHOLE)
    with ExitStack() as stack:
        if folder():
            compiled._cache = _Cache(function, lambda: stack.enter_context(announced()))
        else:
            stack.enter_context(announced())
        compiled.compile()
    return compiled
