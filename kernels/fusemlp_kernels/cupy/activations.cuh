// Activations and their derivatives; the mathematics is in reference.py.
//
// Which activation it is, is a number: the branch is taken alike by all threads. The piecewise linear ones differ only
// in their slope below zero.

enum Activation { IDENTITY, RELU, LEAKY_RELU, PRELU, SIGMOID, TANH, GELU, SILU };

// 1 / (1 + exp(-z)); no exponential overflows.
__device__ __forceinline__ float sigmoid(float z) {
    float e = expf(-fabsf(z));
    return (z >= 0.0f ? 1.0f : e) / (1.0f + e);
}

__device__ __forceinline__ float normal_cdf(float z) {
    return 0.5f * (1.0f + erff(z * 0.7071067811865476f));
}

__device__ __forceinline__ float activate(float z, int code, float slope) {
    if (code < SIGMOID) {
        // relu(-inf) is 0, not -inf * 0; NaN stays
        if (z > 0.0f) return z;
        return z <= 0.0f && slope == 0.0f ? 0.0f : z * slope;
    }
    if (code == SIGMOID) return sigmoid(z);
    if (code == TANH) return tanhf(z);
    if (code == GELU) return z * normal_cdf(z);
    return z * sigmoid(z);
}

// Whether the derivative is computed from z; for the others it is read off the output.
__device__ __forceinline__ bool needs_z(int code) {
    return code == PRELU || code >= GELU;
}

// f'(z) from `v`: z where needs_z, else y = f(z). NaN stays, but for the identity.
__device__ __forceinline__ float derivative(float v, int code, float slope) {
    if (code == IDENTITY) return 1.0f;
    if (code < SIGMOID) return v > 0.0f ? 1.0f : v <= 0.0f ? slope : v;
    if (code == SIGMOID) return v * (1.0f - v);
    if (code == TANH) return 1.0f - v * v;
    if (code == GELU) return normal_cdf(v) + v * 0.3989422804014327f * expf(-0.5f * v * v);
    float s = sigmoid(v);
    return s * (1.0f + v * (1.0f - s));
}
