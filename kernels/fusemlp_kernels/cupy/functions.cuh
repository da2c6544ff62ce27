// The functions of pointwise.FUNCTIONS that CUDA lacks.

#include "common.cuh"

__device__ __forceinline__ float not_a_number() {
    return __uint_as_float(0x7fc00000u);
}

// 1 / (1 + exp(-z)), without overflow.
__device__ __forceinline__ float sigmoid(float z) {
    float e = expf(-fabsf(z));
    return (z >= 0.0f ? 1.0f : e) / (1.0f + e);
}

__device__ __forceinline__ float normal_cdf(float z) {
    return 0.5f * (1.0f + erff(z * 0.7071067811865476f));
}

__device__ __forceinline__ float normal_pdf(float z) {
    return 0.3989422804014327f * expf(-0.5f * z * z);
}

// The larger one; NaN where z is.
template <typename T>
__device__ __forceinline__ T maximum(T z, T other) {
    return z < other ? other : z;
}

// The smaller one; NaN where z is.
template <typename T>
__device__ __forceinline__ T minimum(T z, T other) {
    return z > other ? other : z;
}

// 1, 0, -1 or NaN.
__device__ __forceinline__ float sign(float z) {
    return z > 0.0f ? 1.0f : z < 0.0f ? -1.0f : z;
}

// 1 above zero, `below` elsewhere, NaN for NaN.
__device__ __forceinline__ float step(float z, float below) {
    return z > 0.0f ? 1.0f : z <= 0.0f ? below : z;
}
