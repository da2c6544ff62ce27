// The kernels beside the products of grad_weight: the gradients of the biases and of learned slopes, with the factors of
// the products; and a sum of matrices that cuBLAS cannot write in place.

#include "common.cuh"
#include "clock.cuh"

// The columns of dz that a block sums, the rows that it reads at a time, and the rows that it sums. The last block of
// these columns adds up the parts of a longer batch, in order.
constexpr int COLUMNS = 32;
constexpr int STRETCHES = THREADS / COLUMNS;
constexpr int PART_ROWS = 256;

// A vector `out` = alpha * (sums of dz's columns) + beta * out.
struct Bias {
    long long first_block;
    Matrix<const Compute> dz;  // null: `given` is the sum
    const float* given;
    Vector<float> out;
    long long columns;
    long long parts;
    float* sums;  // (blocks, COLUMNS)
    unsigned* tickets;  // one for each COLUMNS columns
    double factor;
    double decay;
};

struct Pair {
    float* factors;  // alpha, beta of a product of weights
    double factor;
    double decay;
};

struct Sums {
    const Bias* vectors;
    long long count;
    const Pair* pairs;
    long long pair_count;
    double* hyper;
    const double* rates;
    long long* counters;
    const Rule* rule;
    unsigned* ticket;
    long long rows;
    long long sgd;  // the launch is an update by plain gradient descent, and advances the clock
};

// The factors of g and p in p - rate * (g + decay * p), or those that store or accumulate a gradient.
__device__ inline void factors_of(const Sums& call, double factor, double decay, float* alpha, float* beta) {
    if (call.sgd) {
        double rate = call.hyper[LEARNING_RATE] * factor;
        *alpha = static_cast<float>(-rate);
        *beta = static_cast<float>(1.0 - rate * decay);
        return;
    }
    *alpha = 1.0f;
    *beta = call.counters[BATCH_INDEX] % call.rule->accumulate != 0 ? 1.0f : 0.0f;
}

// All vectors in one launch, COLUMNS of one and PART_ROWS rows a block. If the launch is the update, its last block
// advances the clock.
extern "C" __global__ void __launch_bounds__(THREADS) column_sums(const Sums call) {
    __shared__ float stretches[STRETCHES][COLUMNS];
    if (blockIdx.x == 0) {
        for (long long i = threadIdx.x; i < call.pair_count; i += THREADS) {
            Pair pair = call.pairs[i];
            factors_of(call, pair.factor, pair.decay, pair.factors, pair.factors + 1);
        }
    }
    if (call.count > 0) {
        const Bias* vector = &entry_of_block(call.vectors, call.count);
        int lane = threadIdx.x % COLUMNS;
        int stretch = threadIdx.x / COLUMNS;
        long long block = blockIdx.x - vector->first_block;
        long long group = block / vector->parts;
        long long part = block - group * vector->parts;
        long long column = group * COLUMNS + lane;
        long long begin = part * PART_ROWS;
        long long end = begin + PART_ROWS < call.rows ? begin + PART_ROWS : call.rows;
        float sum = 0.0f;
        if (vector->dz.data && column < vector->columns) {
            const Compute* from = vector->dz.at(0, column);
            for (long long row = begin + stretch; row < end; row += STRETCHES) sum += load(from + row * vector->dz.row);
        }
        stretches[stretch][lane] = sum;
        __syncthreads();
        for (int i = 1; i < STRETCHES && stretch == 0; i++) sum += stretches[i][lane];
        bool writes = true;
        if (vector->parts > 1) {
            if (stretch == 0) vector->sums[block * COLUMNS + lane] = sum;
            writes = is_last(vector->tickets + group, static_cast<unsigned>(vector->parts));
            if (writes && stretch == 0) {
                const volatile float* fresh = vector->sums + group * vector->parts * COLUMNS + lane;
                sum = fresh[0];
                for (long long i = 1; i < vector->parts; i++) sum += fresh[i * COLUMNS];
            }
        }
        if (writes && stretch == 0 && column < vector->columns) {
            if (!vector->dz.data) sum = vector->given[column];
            float alpha, beta;
            factors_of(call, vector->factor, vector->decay, &alpha, &beta);
            float& out = vector->out[column];
            out = beta == 0.0f ? alpha * sum : alpha * sum + beta * out;
        }
    }
    if (!call.sgd) return;
    if (is_last(call.ticket) && threadIdx.x == 0) {
        advance_clock(call.counters, call.hyper, call.rates, call.rule, true, false);
    }
}

struct Combine {
    Matrix<const float> source;  // null: zeros
    Matrix<float> out;
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
    float value = call.source.data ? alpha * *call.source.at(row, column) : 0.0f;
    float* out = call.out.at(row, column);
    *out = beta == 0.0f ? value : value + beta * *out;
}
