// The kernels beside the products of grad_weight: the gradients of the biases and of learned slopes, with the factors of
// the products; and a sum of matrices that cuBLAS cannot write in place.

#include "common.cuh"

// The columns of dz that a block sums, the rows that it reads at a time, and the rows that it sums. The last block of
// these columns adds up the parts of a longer batch, in order.
constexpr int COLUMNS = 32;
constexpr int STRETCHES = THREADS / COLUMNS;
constexpr int PART_ROWS = 256;

// A vector `out` = sums of dz's columns + beta * out.
struct Bias {
    long long first_block;
    Matrix<const Compute> dz;  // null: `given` is the sum
    const float* given;
    Vector<float> out;
    long long columns;
    long long parts;
    float* sums;  // (blocks, COLUMNS)
    unsigned* tickets;  // one for each COLUMNS columns
};

struct Sums {
    const Bias* vectors;
    long long count;
    float* factors;  // alpha and beta of the products of weights; null: these are constant
    const long long* counters;
    long long accumulate;  // batches of an update
    long long rows;
};

// All vectors in one launch, COLUMNS of one and PART_ROWS rows a block.
extern "C" __global__ void __launch_bounds__(THREADS) column_sums(const Sums call) {
    __shared__ float stretches[STRETCHES][COLUMNS];
    // the first batch of an update stores its gradient, the others add theirs
    float beta = call.counters[BATCH_INDEX] % call.accumulate != 0 ? 1.0f : 0.0f;
    if (call.factors && blockIdx.x == 0 && threadIdx.x == 0) {
        call.factors[0] = 1.0f;
        call.factors[1] = beta;
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
            float& out = vector->out[column];
            out = beta == 0.0f ? sum : sum + beta * out;
        }
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
