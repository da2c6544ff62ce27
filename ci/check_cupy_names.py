"""Compare the names and parameters of the tests' stand-in for CuPy with those of a real CuPy.

Run it in an environment that can import CuPy; no card is needed. ``--write`` records CuPy's names in
``ci/cupy_names.json``. Tests without CuPy compare the stand-in with that file.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import inspect
import json
import re
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RECORD = ROOT / "ci/cupy_names.json"


def names_of(module: Any) -> list[str]:
    """Yield the dotted names in a module of the stand-in, with those in its classes."""
    found = []
    for name, value in vars(module).items():
        if name.startswith("_") or inspect.ismodule(value):
            continue
        found.append(f"{module.__name__}.{name}")
        if inspect.isclass(value) and not issubclass(value, Exception):
            members = dict.fromkeys([*vars(value), *vars(value).get("__annotations__", ())])
            found += [f"{module.__name__}.{name}.{item}" for item in members if not item.startswith("_")]
    return found


def stand_in() -> dict[str, Any]:
    """Return all names of the stand-in, with their objects."""
    path = str(ROOT / "tests/kernels")
    if path not in sys.path:
        sys.path.insert(0, path)
    modules = importlib.import_module("cupy_standin.modules").BY_NAME
    found = {}
    for module_name, module in modules.items():
        for name in names_of(module):
            value = module
            for part in name.removeprefix(f"{module_name}.").split("."):
                value = inspect.getattr_static(value, part, None)
            found[name] = value
    return found


def real_signature(name: str) -> str:
    """Return the parameters of a name in CuPy, "" if it takes none; raises AttributeError for an unknown name.

    Compiled functions have their signature in the first line of the documentation. Without the CUDA libraries the
    module of cuBLAS cannot be imported; then the documentation comes from its file.
    """
    module_name, last = "cupy_backends.cuda.libs.cublas", name.rpartition(".")[2]
    if name.startswith(module_name):
        try:
            documented = getattr(importlib.import_module(module_name), last).__doc__ or ""
        except ImportError:
            spec = importlib.util.find_spec(module_name)
            if spec is None or spec.origin is None:
                raise AttributeError(name) from None
            data = Path(spec.origin).read_bytes()
            if re.search(rb"\b%s\b" % last.encode(), data) is None:
                raise AttributeError(name) from None
            line = re.search(rb"\b(%s\([^\0\n]*)" % last.encode(), data)
            documented = line[1].decode() if line else ""
        return documented.partition("\n")[0] if "(" in documented.partition("\n")[0] else ""
    value: Any = importlib.import_module("cupy")
    for part in name.split(".")[1:]:
        value = getattr(value, part)
    if isinstance(value, str) or not callable(value):
        return ""
    first = (value.__doc__ or "").partition("\n")[0]
    if re.search(rf"\b{last}\(", first):
        return first
    return f"{last}{inspect.signature(value)}"


def parameters(signature: str) -> list[str]:
    """Return the parameter names in a signature, without types and defaults; "*" stands for any others."""
    inside = signature[signature.find("(") + 1 : signature.rfind(")")] if "(" in signature else ""
    inside = re.sub(r"'[^']*'|<[^>]*>|\[[^\]]*\]|\(\)", "0", inside)
    found = []
    for part in inside.split(","):
        declared = re.split(r"[=:]", part)[0].strip()
        if declared.startswith("*") and not declared.startswith("**"):
            found += ["*"] if len(declared) > 1 else []
        elif declared and not declared.startswith("**"):
            found.append(declared.split()[-1])
    return [name for name in found if name != "self"]


def misfits(mine: dict[str, Any], real: dict[str, str]) -> list[str]:
    """Return the differences: names that CuPy lacks, and parameters with other names or in another order."""
    found = []
    for name, value in mine.items():
        if name not in real:
            found.append(f"{name}: CuPy has no such name")
            continue
        is_exception = inspect.isclass(value) and issubclass(value, Exception)
        if is_exception or not callable(value) or not real[name]:
            continue
        own = [p for p in inspect.signature(value).parameters if p != "self"]
        known = parameters(real[name])
        if "*" not in known and own != [p for p in known if p in own]:
            found.append(f"{name}: takes {own} here, in CuPy {real[name]!r}")
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--write", action="store_true", help=f"record CuPy's names in ci/{RECORD.name}")
    options = parser.parse_args()
    mine, real = stand_in(), {}
    for name in mine:
        try:
            real[name] = real_signature(name)
        except AttributeError:
            continue
    version = importlib.import_module("cupy").__version__
    found = misfits(mine, real)
    if options.write:
        RECORD.write_text(json.dumps({"cupy": version, "names": dict(sorted(real.items()))}, indent=0) + "\n")
    for problem in found:
        print(f"error: {problem}", file=sys.stderr)
    print(f"{len(mine)} names in the stand-in, {len(found)} differ from CuPy {version}")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
