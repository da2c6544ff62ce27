"""The CuPy backend: the contract on an NVIDIA card without Triton, with cuBLAS and CUDA C."""
