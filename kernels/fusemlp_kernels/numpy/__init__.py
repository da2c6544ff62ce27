"""The CPU backend: preallocated buffers, BLAS, no temporaries."""
