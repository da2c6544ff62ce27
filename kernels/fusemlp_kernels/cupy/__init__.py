"""The CuPy backend: the contract on an NVIDIA card without Triton, with cuBLAS and CUDA C.

It has not run on a GPU yet. Tests on a CPU compile the kernels as C++ and check their results, check the use of CuPy
with a stand-in, and compile the kernels for cards with NVRTC.
"""
