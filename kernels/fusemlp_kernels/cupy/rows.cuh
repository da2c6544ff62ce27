// A loss over the rows of a batch: the rows that count, and their weights.

#include "common.cuh"
#include "counters.cuh"
#include "pointwise.cuh"

struct Loss {
    Matrix<const void> z;
    Vector<const float> bias;  // null: in z already
    Matrix<Compute> dz;  // null: not wanted; may be z
    const long long* indices;  // of several batches; null: targets and weights are in order
    Vector<const long long> labels;
    Matrix<const float> target;
    Vector<const float> weight;  // null: one
    Vector<const float> class_weight;  // null: one
    const float* slope_param;  // null: slope
    float* dslope;  // null: not wanted
    double* stats;
    const double* hyper;  // null: no loss scale
    const long long* counters;
    double* partials;
    unsigned* ticket;
    double* normaliser;  // null: each block computes it
    long long rows;
    long long columns;
    long long kind;
    long long mean;
    long long by_row;  // dz of each row is that of its own loss
    long long soft;
    long long accuracy;
    long long ignores;
    long long ignored;
    long long activation;
    double divisor;  // of the loss for each unit of the shares
    double smoothing;
    double option;  // of the element-wise loss, as delta
    double slope;
};

struct Row {
    long long source;  // of its target
    long long label;
    float weight;  // zero if it does not count
    float share;  // in the normaliser
    bool counts;
};

__device__ __forceinline__ bool has_labels(const Loss& call) {
    return call.kind == CROSS_ENTROPY && !call.soft;
}

__device__ __forceinline__ long long valid_rows(const Loss& call) {
    long long count = call.counters[ROW_COUNT];
    return count < call.rows ? count : call.rows;
}

__device__ __forceinline__ Row row_of(const Loss& call, long long at) {
    Row row = {at, 0, 1.0f, 1.0f, true};
    if (call.indices) row.source = call.indices[call.counters[ROW_OFFSET] + at];
    if (call.weight.data) row.weight = call.weight[row.source];
    row.share = row.weight;
    if (!has_labels(call)) return row;
    row.label = call.labels[row.source];
    row.counts = row.label >= 0 && row.label < call.columns && !(call.ignores && row.label == call.ignored);
    if (!row.counts) row.weight = 0.0f;
    row.share = row.weight;
    if (row.counts && call.class_weight.data) row.share *= call.class_weight[row.label];
    return row;
}

// The divisor of "mean": the sum of the shares, times the divisor. All threads come here.
__device__ inline double normaliser_of(const Loss& call, long long valid) {
    double total = static_cast<double>(valid);
    if (call.weight.data || has_labels(call)) {
        total = 0.0;
        for (long long at = threadIdx.x; at < valid; at += THREADS) total += row_of(call, at).share;
        total = block_sum(total);
    }
    return total * call.divisor;
}

// The factor of every dz: 1 / normaliser under "mean", 1 / divisor under "rows", and the loss scale.
__device__ __forceinline__ float gradient_scale(const Loss& call, double normaliser) {
    double scale = 1.0;
    if (call.mean) scale = normaliser == 0.0 ? 0.0 : 1.0 / (call.by_row ? call.divisor : normaliser);
    if (call.hyper) scale *= call.hyper[LOSS_SCALE];
    return static_cast<float>(scale);
}
