// The formulas. Printed from pointwise.py by `python ci/print_formulas.py`; do not edit.

#include "common.cuh"

enum Activation { IDENTITY, RELU, LEAKY_RELU, PRELU, SIGMOID, TANH, GELU, SILU, ELU, SELU, SOFTPLUS, MISH };

enum Kind { CROSS_ENTROPY, BINARY_CROSS_ENTROPY, MSE, MAE, HUBER, POISSON, QUANTILE };

enum RuleCode { RULE_SGD, RULE_MOMENTUM, RULE_ADAM, RULE_NESTEROV };

// An optimizer's rule.
struct Rule {
    long long code;  // which of RuleCode
    double momentum;
    double beta1;
    double beta2;
    double eps;
    double ema;
    long long decoupled;
    long long inside;  // scikit-learn's convention
    double clip_norm;  // infinite: no clipping
    long long accumulate;
    long long scaled;  // the gradients carry the loss scale
    double growth_interval;
};

// f(z).
__device__ __forceinline__ float activate(float z, int code, float slope) {
    switch (code) {
    case IDENTITY:
        return z;
    case RELU:
        return maximum(z, 0.0f);
    case LEAKY_RELU:
    case PRELU:
        return maximum(z, 0.0f) + slope * minimum(z, 0.0f);
    case SIGMOID:
        return sigmoid(z);
    case TANH:
        return tanhf(z);
    case GELU:
        return z * normal_cdf(z);
    case SILU:
        return z * sigmoid(z);
    case ELU: {
        float t = tanhf(0.5f * minimum(z, 0.0f));
        float m = 2.0f * t / (1.0f - t);
        return maximum(z, 0.0f) + slope * m;
    }
    case SELU: {
        float t = tanhf(0.5f * minimum(z, 0.0f));
        float m = 2.0f * t / (1.0f - t);
        return 1.0507009873554805f * maximum(z, 0.0f) + 1.7580993408473766f * m;
    }
    case SOFTPLUS:
        return maximum(z, 0.0f) + log1pf(expf(-fabsf(z)));
    case MISH: {
        float m = minimum(z, 30.0f);
        float h = expf(m);
        float w = h * (h + 2.0f);
        return z * (w / (w + 2.0f));
    }
    default:
        return not_a_number();
    }
}

// True where f' is computed from z; the others read it off y = f(z).
__device__ __forceinline__ bool needs_z(int code) {
    return code == PRELU || code == GELU || code == SILU || code == MISH;
}

// f'(z) from `v`: z where needs_z, else y = f(z).
__device__ __forceinline__ float derivative(float v, int code, float slope) {
    switch (code) {
    case IDENTITY:
        return 1.0f;
    case RELU:
        return step(v, 0.0f);
    case LEAKY_RELU:
    case PRELU:
        return step(v, slope);
    case SIGMOID:
        return v * (1.0f - v);
    case TANH:
        return 1.0f - v * v;
    case GELU:
        return normal_cdf(v) + v * normal_pdf(v);
    case SILU: {
        float s = sigmoid(v);
        return s * (1.0f + v * (1.0f - s));
    }
    case ELU:
        return step(v, slope) + minimum(v, 0.0f);
    case SELU: {
        float s = step(v, 0.0f);
        return 1.0507009873554805f * s + 1.7580993408473766f * (1.0f - s) + minimum(v, 0.0f);
    }
    case SOFTPLUS: {
        float t = tanhf(0.5f * v);
        return 2.0f * t / (1.0f + t);
    }
    case MISH: {
        float m = minimum(v, 30.0f);
        float h = expf(m);
        float w = h * (h + 2.0f);
        return (w + m * (4.0f * h * (h + 1.0f) / (w + 2.0f))) / (w + 2.0f);
    }
    default:
        return not_a_number();
    }
}

// The derivative of prelu by its slope.
__device__ __forceinline__ float by_slope_prelu(float z) {
    return minimum(z, 0.0f);
}

// The loss of one output, and its derivative by y.
__device__ __forceinline__ float element_loss(float y, float t, long long code, float option, float* gradient) {
    switch (code) {
    case BINARY_CROSS_ENTROPY: {
        float e = expf(-fabsf(y));
        float loss = maximum(y, 0.0f) + log1pf(e) - t * y;
        *gradient = sigmoid(y) - t;
        return loss;
    }
    case MSE: {
        float r = y - t;
        float loss = r * r;
        *gradient = 2.0f * r;
        return loss;
    }
    case MAE: {
        float r = y - t;
        float loss = fabsf(r);
        *gradient = sign(r);
        return loss;
    }
    case HUBER: {
        float r = y - t;
        float c = minimum(maximum(r, -option), option);
        float loss = c * (r - 0.5f * c);
        *gradient = c;
        return loss;
    }
    case POISSON: {
        float e = expf(y);
        float loss = e - t * y;
        *gradient = e - t;
        return loss;
    }
    case QUANTILE: {
        float r = y - t;
        float s = sign(r);
        float slope = maximum((1.0f - option) * s, -option * s);
        float loss = slope * fabsf(r);
        *gradient = slope * s;
        return loss;
    }
    default:
        return *gradient = not_a_number();
    }
}

// Numbers of the optimizers, in the type of the parameters.
struct Scalars {
    float kept;
    float coupled;
    float share;
    float rate;
    float momentum;
    float inner;
    float outer;
    float beta1;
    float rest1;
    float beta2;
    float rest2;
    float size;
    float least;
};

// The scalars of a rule, once a thread.
__device__ __forceinline__ Scalars scalars_of(
    const Rule& rule, long long code, double rate, double decay, const double* hyper) {
    Scalars scalars = {};
    auto decoupled = rule.decoupled != 0;
    auto kept = (decoupled ? 1.0 - rate * decay : 1.0);
    auto coupled = (decoupled ? 0.0 : decay);
    scalars.kept = static_cast<float>(kept);
    scalars.coupled = static_cast<float>(coupled);
    auto share = hyper[SHARE];
    scalars.share = static_cast<float>(share);
    switch (code) {
    case RULE_SGD: {
        scalars.rate = static_cast<float>(rate);
        return scalars;
    }
    case RULE_MOMENTUM: {
        auto rate_inside = rule.inside != 0;
        auto momentum = rule.momentum;
        auto inner = (rate_inside ? -rate : 1.0);
        auto outer = (rate_inside ? 1.0 : -rate);
        scalars.momentum = static_cast<float>(momentum);
        scalars.inner = static_cast<float>(inner);
        scalars.outer = static_cast<float>(outer);
        return scalars;
    }
    case RULE_ADAM: {
        auto bias_correction_2 = hyper[BIAS_CORRECTION_2];
        auto bias_correction_1 = hyper[BIAS_CORRECTION_1];
        auto rate_inside = rule.inside != 0;
        auto eps = rule.eps;
        auto beta1 = rule.beta1;
        auto beta2 = rule.beta2;
        auto root = sqrt(bias_correction_2);
        auto size = rate * root / bias_correction_1;
        auto least = maximum((rate_inside ? eps : eps * root), 1.1754943508222875e-38);
        auto rest1 = 1.0 - beta1;
        auto rest2 = 1.0 - beta2;
        scalars.beta1 = static_cast<float>(beta1);
        scalars.rest1 = static_cast<float>(rest1);
        scalars.beta2 = static_cast<float>(beta2);
        scalars.rest2 = static_cast<float>(rest2);
        scalars.size = static_cast<float>(size);
        scalars.least = static_cast<float>(least);
        return scalars;
    }
    case RULE_NESTEROV: {
        auto rate_inside = rule.inside != 0;
        auto momentum = rule.momentum;
        auto inner = (rate_inside ? -rate : 1.0);
        auto outer = (rate_inside ? 1.0 : -rate);
        scalars.inner = static_cast<float>(inner);
        scalars.momentum = static_cast<float>(momentum);
        scalars.outer = static_cast<float>(outer);
        return scalars;
    }
    default:
        return scalars;
    }
}

// One parameter: its new value, with its states in place.
__device__ __forceinline__ float updated(
    float p, float g, float* s0, float* s1, long long code, const Scalars& scalars) {
    p = scalars.kept * p;
    if (scalars.coupled != 0.0f) g = g + scalars.coupled * p;
    switch (code) {
    case RULE_SGD: {
        p = p - scalars.rate * g;
        return p;
    }
    case RULE_MOMENTUM: {
        float velocity = *s0;
        velocity = scalars.momentum * velocity + scalars.inner * g;
        p = p + scalars.outer * velocity;
        *s0 = velocity;
        return p;
    }
    case RULE_ADAM: {
        float first_moment = *s0;
        float second_moment = *s1;
        first_moment = scalars.beta1 * first_moment + scalars.rest1 * g;
        second_moment = scalars.beta2 * second_moment + scalars.rest2 * (g * g);
        p = p - scalars.size * (first_moment / (sqrtf(second_moment) + scalars.least));
        *s0 = first_moment;
        *s1 = second_moment;
        return p;
    }
    case RULE_NESTEROV: {
        float velocity = *s0;
        float change = scalars.inner * g;
        velocity = scalars.momentum * velocity + change;
        p = p + scalars.outer * (change + scalars.momentum * velocity);
        *s0 = velocity;
        return p;
    }
    default:
        return not_a_number();
    }
}

// The average of a parameter, in place.
__device__ __forceinline__ void update_average(float p, float* place, const Scalars& scalars) {
    float average = *place;
    average = average + scalars.share * (p - average);
    *place = average;
}
