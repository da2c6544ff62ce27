// The optimizer in one launch for a whole network, and the norm of its gradients; the formulas are in reference.update.

#include "common.cuh"
#include "clock.cuh"

// Elements of a tensor that a block updates.
constexpr int ELEMENTS = 4 * THREADS;

// A matrix of parameters, or a stretch of an arena as a matrix of one row. Where a pointer of state is null there is
// none.
struct Tensor {
    long long first_block;
    long long rows;
    long long columns;
    float* p;
    long long p_row;
    long long p_col;
    const float* g;
    long long g_row;
    long long g_col;
    float* s0;
    long long s0_row;
    long long s0_col;
    float* s1;
    long long s1_row;
    long long s1_col;
    Compute* shadow;  // the parameter rounded; null: not kept
    long long shadow_row;
    long long shadow_col;
    double factor;
    double decay;
};

// The last tensor that starts at this block or before it.
__device__ __forceinline__ long long tensor_of_block(const Tensor* tensors, long long count) {
    long long low = 0;
    while (count > 1) {
        long long half = count / 2;
        if (tensors[low + half].first_block <= blockIdx.x) low += half;
        count -= half;
    }
    return low;
}

struct Update {
    const Tensor* tensors;
    long long count;
    const double* norm;  // of all gradients; null: neither clipped nor scaled
    double* hyper;
    const double* rates;
    long long* counters;
    const Rule* rule;
    unsigned* ticket;
};

// The rule in the arithmetic of the parameters, once a thread.
struct Step {
    float rate;
    float kept;  // what decoupled decay leaves of a parameter
    float decay;  // what coupled decay adds to a gradient
    float momentum;
    float beta1;
    float rest1;
    float beta2;
    float rest2;
    float scale;
    float eps;
    float gradient;  // what every gradient is multiplied by
    bool inside;
    bool nesterov;
};

__device__ inline Step step_of(const Update& call, const Tensor& tensor, double gradient) {
    const Rule& rule = *call.rule;
    double rate = call.hyper[LEARNING_RATE] * tensor.factor;
    Step step;
    step.rate = static_cast<float>(rate);
    step.kept = rule.decoupled ? static_cast<float>(1.0 - rate * tensor.decay) : 1.0f;
    step.decay = rule.decoupled ? 0.0f : static_cast<float>(tensor.decay);
    step.momentum = static_cast<float>(rule.momentum);
    step.beta1 = static_cast<float>(rule.beta1);
    step.rest1 = static_cast<float>(1.0 - rule.beta1);
    step.beta2 = static_cast<float>(rule.beta2);
    step.rest2 = static_cast<float>(1.0 - rule.beta2);
    // with root = sqrt(bc2) multiplied through, m / bc1 / (sqrt(v / bc2) + eps) = m root / bc1 / (sqrt(v) + eps root)
    double root = rule.adam ? sqrt(call.hyper[BIAS_CORRECTION_2]) : 1.0;
    step.scale = rule.adam ? static_cast<float>(rate * root / call.hyper[BIAS_CORRECTION_1]) : 0.0f;
    step.eps = static_cast<float>(rule.inside ? rule.eps : rule.eps * root);
    step.gradient = static_cast<float>(gradient);
    step.inside = rule.inside != 0;
    step.nesterov = rule.nesterov != 0;
    return step;
}

// One parameter: its new value, with its states in place.
__device__ __forceinline__ float updated(float p, float g, float* s0, float* s1, const Step& step) {
    p *= step.kept;
    if (step.decay != 0.0f) g += step.decay * p;
    if (s1) {
        float first = step.beta1 * *s0 + step.rest1 * g;
        float second = step.beta2 * *s1 + step.rest2 * (g * g);
        *s0 = first;
        *s1 = second;
        // a parameter that never had a gradient stays as it is, whatever eps is
        return first == 0.0f ? p : p - step.scale * (first / (sqrtf(second) + step.eps));
    }
    if (!s0) return p - step.rate * g;
    float change = step.inside ? -step.rate * g : g;
    float velocity = step.momentum * *s0 + change;
    *s0 = velocity;
    float move = step.nesterov ? change + step.momentum * velocity : velocity;
    return step.inside ? p + move : p - step.rate * move;
}

// Updates every tensor to the mean of the accumulated gradients, clipped by their global norm. Under loss scaling a
// norm that is not finite skips the update: nothing but the counters and the scale changes.
__device__ __forceinline__ void update_of(const Update& call) {
    const Rule& rule = *call.rule;
    bool due = (call.counters[BATCH_INDEX] + 1) % rule.accumulate == 0;
    bool sound = true;
    double factor = 1.0 / static_cast<double>(rule.accumulate);
    if (call.norm) {
        double norm = *call.norm;
        double largest = infinity();
        if (rule.scaled) {
            sound = fabs(norm) < largest;
            factor /= call.hyper[LOSS_SCALE];
        }
        if (rule.clip_norm < largest) {
            double clip = rule.clip_norm / (norm * factor + 1e-6);
            // in this order a NaN stays
            factor *= clip > 1.0 ? 1.0 : clip;
        }
    }
    bool applied = due && sound;
    if (applied && call.count > 0) {
        const Tensor tensor = call.tensors[tensor_of_block(call.tensors, call.count)];
        Step step = step_of(call, tensor, factor);
        long long begin = (blockIdx.x - tensor.first_block) * ELEMENTS + threadIdx.x;
        for (int i = 0; i < ELEMENTS / THREADS; i++) {
            long long at = begin + i * THREADS;
            if (at >= tensor.rows * tensor.columns) break;
            long long row = tensor.rows == 1 ? 0 : at / tensor.columns;
            long long column = at - row * tensor.columns;
            float* p = tensor.p + row * tensor.p_row + column * tensor.p_col;
            float g = tensor.g[row * tensor.g_row + column * tensor.g_col] * step.gradient;
            float* s0 = tensor.s0 ? tensor.s0 + row * tensor.s0_row + column * tensor.s0_col : nullptr;
            float* s1 = tensor.s1 ? tensor.s1 + row * tensor.s1_row + column * tensor.s1_col : nullptr;
            float value = updated(*p, g, s0, s1, step);
            *p = value;
            if (tensor.shadow) store(tensor.shadow + row * tensor.shadow_row + column * tensor.shadow_col, value);
        }
    }
    if (is_last(call.ticket) && threadIdx.x == 0) {
        advance_clock(call.counters, call.hyper, call.rates, call.rule, applied, due && !sound);
    }
}

struct Norm {
    const Tensor* tensors;  // of which the gradients count
    long long count;
    double* norm;
    double* partials;
    unsigned* ticket;
};

// norm (1,) = the Euclidean norm of all gradients. The square of a float, and a sum of 2**63 of them, fits a double.
__device__ __forceinline__ void norm_of(const Norm& call) {
    const Tensor tensor = call.tensors[tensor_of_block(call.tensors, call.count)];
    long long begin = (blockIdx.x - tensor.first_block) * ELEMENTS + threadIdx.x;
    double total = 0.0;
    for (int i = 0; i < ELEMENTS / THREADS; i++) {
        long long at = begin + i * THREADS;
        if (at >= tensor.rows * tensor.columns) break;
        long long row = tensor.rows == 1 ? 0 : at / tensor.columns;
        double g = tensor.g[row * tensor.g_row + (at - row * tensor.columns) * tensor.g_col];
        total += g * g;
    }
    total = block_sum(total);
    if (threadIdx.x == 0) call.partials[blockIdx.x] = total;
    if (!is_last(call.ticket)) return;
    total = sum_of(call.partials, gridDim.x, 1);
    if (threadIdx.x == 0) *call.norm = sqrt(total);
}
