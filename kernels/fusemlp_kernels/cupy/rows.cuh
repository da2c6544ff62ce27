// A loss over the rows of a batch: which rows count, and for how much.

#include "common.cuh"
#include "counters.cuh"
#include "pointwise.cuh"

// What each block leaves for the sums: loss, right answers, answers asked for, prelu's gradient.
constexpr int PARTIALS = 4;

struct Loss {
    const void* z;
    long long z_row;
    long long z_col;
    const float* bias;  // null: in z already
    long long bias_step;
    Compute* dz;  // null: not wanted; may be z
    long long dz_row;
    long long dz_col;
    const long long* indices;  // of several batches; null: targets and weights lie in order
    const long long* labels;
    long long label_step;
    const float* target;
    long long target_row;
    long long target_col;
    const float* weight;  // null: one
    long long weight_step;
    const float* class_weight;  // null: one
    long long class_step;
    const float* slope_param;  // null: slope
    float* dslope;  // null: not wanted
    double* stats;
    const double* hyper;  // null: no loss scale
    const long long* counters;
    double* partials;
    unsigned* ticket;
    double* normaliser;  // null: each block takes it
    long long rows;
    long long columns;
    long long kind;
    long long mean;
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

// Of a row of the batch: where its target is, its weight (zero where it does not count), its label, whether it counts,
// and its share in the normaliser.
struct Row {
    long long source;
    long long label;
    float weight;
    float share;
    bool counts;
};

__device__ __forceinline__ bool has_labels(const Loss& call) {
    return call.kind == CROSS_ENTROPY && !call.soft;
}

__device__ __forceinline__ long long valid_rows(const Loss& call) {
    long long count = call.counters[ROW_COUNT];
    return count < call.rows ? count : call.rows;
}

__device__ __forceinline__ Row row_of(const Loss& call, long long at, long long valid) {
    Row row = {at, 0, 0.0f, 0.0f, false};
    if (at >= valid) return row;
    if (call.indices) row.source = call.indices[call.counters[ROW_OFFSET] + at];
    row.weight = call.weight ? call.weight[row.source * call.weight_step] : 1.0f;
    row.counts = true;
    row.share = row.weight;
    if (!has_labels(call)) return row;
    row.label = call.labels[row.source * call.label_step];
    row.counts = row.label >= 0 && row.label < call.columns && !(call.ignores && row.label == call.ignored);
    if (!row.counts) row.weight = 0.0f;
    row.share = row.weight;
    if (row.counts && call.class_weight) row.share *= call.class_weight[row.label * call.class_step];
    return row;
}

// What "mean" divides by: the sum of the shares, times the divisor. All threads come here.
__device__ inline double normaliser_of(const Loss& call, long long valid) {
    double total = static_cast<double>(valid);
    if (call.weight || has_labels(call)) {
        total = 0.0;
        for (long long at = threadIdx.x; at < valid; at += THREADS) total += row_of(call, at, valid).share;
        total = block_sum(total);
    }
    return total * call.divisor;
}

// What every dz is multiplied by: 1 / normaliser under "mean", and the loss scale.
__device__ __forceinline__ float gradient_scale(const Loss& call, double normaliser) {
    double scale = 1.0;
    if (call.mean) scale = normaliser == 0.0 ? 0.0 : 1.0 / normaliser;
    if (call.hyper) scale *= call.hyper[LOSS_SCALE];
    return static_cast<float>(scale);
}
