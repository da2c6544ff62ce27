// The optimizer in one launch for a whole network, and the norm of its gradients; the formulas are in pointwise.cuh.

#include "common.cuh"
#include "clock.cuh"
#include "pointwise.cuh"

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
        double rate = call.hyper[LEARNING_RATE] * tensor.factor;
        Scalars scalars = scalars_of(rule, rule.code, rate, tensor.decay, call.hyper);
        long long begin = (blockIdx.x - tensor.first_block) * ELEMENTS + threadIdx.x;
        for (int i = 0; i < ELEMENTS / THREADS; i++) {
            long long at = begin + i * THREADS;
            if (at >= tensor.rows * tensor.columns) break;
            long long row = tensor.rows == 1 ? 0 : at / tensor.columns;
            long long column = at - row * tensor.columns;
            float* p = tensor.p + row * tensor.p_row + column * tensor.p_col;
            float g = tensor.g[row * tensor.g_row + column * tensor.g_col] * static_cast<float>(factor);
            float* s0 = tensor.s0 ? tensor.s0 + row * tensor.s0_row + column * tensor.s0_col : nullptr;
            float* s1 = tensor.s1 ? tensor.s1 + row * tensor.s1_row + column * tensor.s1_col : nullptr;
            float value = updated(*p, g, s0, s1, rule.code, scalars);
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
