"""A stand-in for CuPy without a card: NumPy memory, and the kernels of the CuPy backend as C++ on the CPU.

Test code. It has the few names of CuPy that the backend uses, and refuses all others. It shows that the backend calls
them correctly, that addresses lie in live memory, and the results of the kernels. It cannot show concurrent streams,
the capture of a real graph, cuBLAS itself (NumPy's float32 product replaces it), the driver, or any speed.
"""

import importlib
import sys

from cuda_on_cpu import library


def why_not():
    """Return the reason if the backend cannot run on this stand-in, else None."""
    if sys.platform != "linux":
        return f"the kernels are compiled for the CPU on Linux only, this is {sys.platform}"
    try:
        library.compiler()
    except RuntimeError as error:
        return str(error)
    return None


def load():
    """Import ``fusemlp_kernels.cupy`` with this stand-in for CuPy.

    The stand-in is in ``sys.modules`` only during the import: other libraries would mistake it for CuPy.
    """
    if "fusemlp_kernels.cupy.device" in sys.modules:
        return
    from cupy_standin import modules

    kept = {
        name: sys.modules.pop(name) for name in list(sys.modules) if name.split(".")[0] in ("cupy", "cupy_backends")
    }
    sys.modules.update(modules.BY_NAME)
    try:
        importlib.import_module("fusemlp_kernels.cupy.backend")
    finally:
        for name in modules.BY_NAME:
            del sys.modules[name]
        sys.modules.update(kept)
