// The optimizer in one launch for a whole network, the norm of its gradients, and the clock alone. The formulas are in
// pointwise.cuh. One thread of a step's last block advances the clock, after all blocks have read it: the counters, and
// the next learning rate from the host's table.

#include "common.cuh"
#include "pointwise.cuh"

// Moves to the rows of the next batch; after the last of an epoch, to the first.
__device__ inline void next_rows(long long* counters) {
    long long step = counters[ROW_STEP];
    long long total = counters[ROW_TOTAL];
    long long offset = counters[ROW_OFFSET] + step;
    if (offset >= total) offset = 0;
    counters[ROW_OFFSET] = offset;
    counters[ROW_COUNT] = step < total - offset ? step : total - offset;
}

// Ends a batch. `applied`: with an update; `skipped`: its gradients have overflowed. One thread calls it.
__device__ inline void advance_clock(
    long long* counters, double* hyper, const double* rates, const Rule* rule, bool applied, bool skipped) {
    counters[BATCH_INDEX] += 1;
    if (counters[ROW_STEP] != 0) next_rows(counters);
    if (skipped) {
        counters[SKIPPED] += 1;
        counters[SKIPPED_IN_A_ROW] += 1;
        hyper[LOSS_SCALE] *= 0.5;
        hyper[GOOD_UPDATES] = 0.0;
    }
    if (!applied) return;
    if (rule->scaled) {
        counters[SKIPPED_IN_A_ROW] = 0;
        double good = hyper[GOOD_UPDATES] + 1.0;
        bool grows = good >= rule->growth_interval;
        if (grows) hyper[LOSS_SCALE] *= 2.0;
        hyper[GOOD_UPDATES] = grows ? 0.0 : good;
    }
    long long count = counters[UPDATE_COUNT] + 1;
    counters[UPDATE_COUNT] = count;
    long long place = count - static_cast<long long>(rates[FIRST_UPDATE]);
    long long last = static_cast<long long>(rates[ROWS_FILLED]) - 1;
    if (place > last) place = last;
    if (place < 0) place = 0;
    const double* row = rates + (1 + place) * RATE_COLUMNS;
    hyper[LEARNING_RATE] = row[LEARNING_RATE] * hyper[RATE_SCALE];
    hyper[BIAS_CORRECTION_1] = row[BIAS_CORRECTION_1];
    hyper[BIAS_CORRECTION_2] = row[BIAS_CORRECTION_2];
    hyper[SHARE] = row[RATE_SHARE];
}

// Elements of a tensor that a block updates.
constexpr int ELEMENTS = 4 * THREADS;

// Parameters as a matrix, or as one row if they are contiguous. The data of a missing state is null.
struct Tensor {
    long long first_block;
    long long rows;
    long long columns;
    Matrix<float> p;
    Matrix<const float> g;
    Matrix<float> s0;
    Matrix<float> s1;
    Matrix<float> average;
    Matrix<Compute> shadow;  // the parameter rounded; null: not kept
    double factor;
    double decay;
};

struct Update {
    const Tensor* tensors;
    long long count;
    double* norm;  // of all gradients; null: neither clipped nor scaled
    double* partials;
    double* hyper;
    const double* rates;
    long long* counters;
    const Rule* rule;
    unsigned* ticket;
};

// Updates every tensor to the mean of the accumulated gradients, clipped by their global norm. Under loss scaling a
// norm that is not finite skips the update: only the counters and the scale change.
extern "C" __global__ void __launch_bounds__(THREADS) update(const Update call) {
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
        const Tensor tensor = entry_of_block(call.tensors, call.count);
        double rate = call.hyper[LEARNING_RATE] * tensor.factor;
        Scalars scalars = scalars_of(rule, rule.code, rate, tensor.decay, call.hyper);
        long long begin = (blockIdx.x - tensor.first_block) * ELEMENTS + threadIdx.x;
        for (int i = 0; i < ELEMENTS / THREADS; i++) {
            long long at = begin + i * THREADS;
            if (at >= tensor.rows * tensor.columns) break;
            long long row = tensor.rows == 1 ? 0 : at / tensor.columns;
            long long column = at - row * tensor.columns;
            float* p = tensor.p.at(row, column);
            float g = *tensor.g.at(row, column) * static_cast<float>(factor);
            float* s0 = tensor.s0.data ? tensor.s0.at(row, column) : nullptr;
            float* s1 = tensor.s1.data ? tensor.s1.at(row, column) : nullptr;
            float value = updated(*p, g, s0, s1, rule.code, scalars);
            *p = value;
            if (tensor.average.data) update_average(value, tensor.average.at(row, column), scalars);
            if (tensor.shadow.data) store(tensor.shadow.at(row, column), value);
        }
    }
    if (is_last(call.ticket) && threadIdx.x == 0) {
        advance_clock(call.counters, call.hyper, call.rates, call.rule, applied, due && !sound);
    }
}

// norm (1,) = the Euclidean norm of all gradients. The square of a float, and a sum of 2**63 of them, fits a double.
extern "C" __global__ void __launch_bounds__(THREADS) gradient_norm(const Update call) {
    const Tensor tensor = entry_of_block(call.tensors, call.count);
    long long begin = (blockIdx.x - tensor.first_block) * ELEMENTS + threadIdx.x;
    double total = 0.0;
    for (int i = 0; i < ELEMENTS / THREADS; i++) {
        long long at = begin + i * THREADS;
        if (at >= tensor.rows * tensor.columns) break;
        long long row = tensor.rows == 1 ? 0 : at / tensor.columns;
        double g = *tensor.g.at(row, at - row * tensor.columns);
        total += g * g;
    }
    total = block_sum(total);
    if (threadIdx.x == 0) call.partials[blockIdx.x] = total;
    if (!is_last(call.ticket)) return;
    total = sum_of(call.partials, gridDim.x, 1);
    if (threadIdx.x == 0) *call.norm = sqrt(total);
}

// The clock alone.
extern "C" __global__ void __launch_bounds__(THREADS) advance(const Update call) {
    if (blockIdx.x != 0 || threadIdx.x != 0) return;
    bool due = (call.counters[BATCH_INDEX] + 1) % call.rule->accumulate == 0;
    advance_clock(call.counters, call.hyper, call.rates, call.rule, due, false);
}
