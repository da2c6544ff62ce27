// The kernels of the losses.

#include "loss.cuh"

extern "C" __global__ void __launch_bounds__(THREADS) loss_normaliser(const Loss call) {
    normaliser_alone(call);
}

// From a product in float32, with the bias to come; and from a pre-activation in memory. Long rows want more registers
// than three blocks on a multiprocessor have: two, or the assembler spills.
extern "C" __global__ void __launch_bounds__(THREADS) product_loss(const Loss call) {
    loss_of<WARP, float>(call);
}

extern "C" __global__ void __launch_bounds__(THREADS, 2) product_loss_of_long_rows(const Loss call) {
    loss_of<THREADS, float>(call);
}

extern "C" __global__ void __launch_bounds__(THREADS) stored_loss(const Loss call) {
    loss_of<WARP, Compute>(call);
}

extern "C" __global__ void __launch_bounds__(THREADS, 2) stored_loss_of_long_rows(const Loss call) {
    loss_of<THREADS, Compute>(call);
}
