"""The CuPy backend: the contract on an NVIDIA card without Triton, with cuBLAS and CUDA C.

It has not run on a GPU yet. What its kernels compute is proven on a CPU, where they are compiled as C++; how it uses
CuPy, over something that stands in for it; that they compile for cards, by NVRTC.
"""
