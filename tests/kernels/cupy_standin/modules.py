"""The modules by the names under which the backend imports CuPy."""

import types
from importlib.machinery import ModuleSpec

from cupy_standin import arrays, cublas, kernels, memory, streams


def _module(name, **contents):
    module = types.ModuleType(name, "Stands in for CuPy in tests.")
    module.__spec__ = ModuleSpec(name, None, is_package=True)
    module.__path__ = []

    def missing(attribute):
        raise AttributeError(f"{name}.{attribute}: the stand-in has no such name")

    vars(module).update(contents, __getattr__=missing)
    return module


_runtime = _module(
    "cupy.cuda.runtime",
    CUDA_R_16F=cublas.CUDA_R_16F,
    CUDA_R_32F=cublas.CUDA_R_32F,
    getDevice=lambda: 0,
    getDeviceCount=lambda: 1,
)
_cuda = _module(
    "cupy.cuda",
    Device=streams.Device,
    Graph=streams.Graph,
    MemoryPointer=memory.MemoryPointer,
    Stream=streams.Stream,
    get_current_stream=streams.get_current_stream,
    runtime=_runtime,
)
_cupy = _module(
    "cupy",
    RawModule=kernels.RawModule,
    asarray=arrays.asarray,
    asnumpy=arrays.asnumpy,
    cuda=_cuda,
    from_dlpack=arrays.from_dlpack,
    ndarray=arrays.ndarray,
    zeros=arrays.zeros,
)
_PUBLIC = {name: value for name, value in vars(cublas).items() if name.startswith("CUBLAS_")}
_cublas = _module(
    "cupy_backends.cuda.libs.cublas",
    **_PUBLIC,
    create=cublas.create,
    destroy=cublas.destroy,
    gemmEx=cublas.gemmEx,
    setPointerMode=cublas.setPointerMode,
)
_libs = _module("cupy_backends.cuda.libs", cublas=_cublas)
_cuda_backend = _module("cupy_backends.cuda", libs=_libs)
BY_NAME = {
    module.__name__: module
    for module in (_cupy, _cuda, _runtime, _module("cupy_backends", cuda=_cuda_backend), _cuda_backend, _libs, _cublas)
}
