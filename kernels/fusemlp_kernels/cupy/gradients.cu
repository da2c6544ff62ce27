// The kernels that go with the products of grad_weight; one is for what cuBLAS cannot write where it belongs.

#include "gradients.cuh"

extern "C" __global__ void __launch_bounds__(THREADS) column_sums(const Sums call) {
    sums_of(call);
}

struct Combine {
    const float* source;  // null: zeros
    long long source_row;
    long long source_col;
    float* out;
    long long out_row;
    long long out_col;
    const float* scalars;  // alpha, beta; null: 1 and 0
    long long rows;
    long long columns;
};

// out (rows, columns) = alpha * source + beta * out.
extern "C" __global__ void __launch_bounds__(THREADS) combine(const Combine call) {
    long long at = static_cast<long long>(blockIdx.x) * THREADS + threadIdx.x;
    if (at >= call.rows * call.columns) return;
    long long row = at / call.columns;
    long long column = at - row * call.columns;
    float alpha = call.scalars ? call.scalars[0] : 1.0f;
    float beta = call.scalars ? call.scalars[1] : 0.0f;
    float value = call.source ? alpha * call.source[row * call.source_row + column * call.source_col] : 0.0f;
    float* out = call.out + row * call.out_row + column * call.out_col;
    *out = beta == 0.0f ? value : value + beta * *out;
}
