// The kernels around the matrix products of a layer.

#include "layers.cuh"

extern "C" __global__ void __launch_bounds__(THREADS) gather_rows(const Gather call) {
    gather_of(call);
}

extern "C" __global__ void __launch_bounds__(THREADS) forward(const Forward call) {
    forward_of(call);
}

extern "C" __global__ void __launch_bounds__(THREADS) backward(const Backward call) {
    backward_of(call);
}
