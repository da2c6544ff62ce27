// Losses with their gradients from the output layer's pre-activation; reference.loss_grad defines them.
//
// A row belongs to a warp, or to a block if rows are long. One kernel reads every row and writes its dz. The last block
// takes the sums over the batch, in a fixed order. Every dz needs the normaliser before any block has ended: each block
// computes it, or, for a large batch, a launch before.

#include "common.cuh"
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

// A value and the first column that holds it.
struct Best {
    float value;
    long long column;

    __device__ __forceinline__ void take(float other, long long other_column) {
        if (other > value || (other == value && other_column < column)) {
            value = other;
            column = other_column;
        }
    }
};

// Sums and largest values over the threads of a row: a warp, or the block. Each of these threads gets the result.
template <int SIZE, typename T>
__device__ __forceinline__ T team_sum(T value) {
    if constexpr (SIZE == WARP) return warp_sum(value);
    else return block_sum(value);
}

template <int SIZE>
__device__ __forceinline__ Best team_best(Best mine) {
    for (int mask = WARP / 2; mask > 0; mask /= 2) {
        float value = __shfl_xor_sync(ALL_LANES, mine.value, mask);
        long long column = __shfl_xor_sync(ALL_LANES, mine.column, mask);
        mine.take(value, column);
    }
    if constexpr (SIZE > WARP) {
        __shared__ float values[SIZE / WARP];
        __shared__ long long columns[SIZE / WARP];
        __syncthreads();
        if (threadIdx.x % WARP == 0) {
            values[threadIdx.x / WARP] = mine.value;
            columns[threadIdx.x / WARP] = mine.column;
        }
        __syncthreads();
        for (int i = 0; i < SIZE / WARP; i++) mine.take(values[i], columns[i]);
    }
    return mine;
}

extern "C" __global__ void __launch_bounds__(THREADS) loss_normaliser(const Loss call) {
    double total = normaliser_of(call, valid_rows(call));
    if (threadIdx.x == 0) *call.normaliser = total;
}

// A row's part of the sums, in every thread of its team: the loss, right answers, answers asked for, prelu's gradient.
struct RowSums {
    float loss;
    long long right;
    long long scored;
    float below;
};

constexpr int PARTIALS = 4;

// The pre-activation of an element of a row.
template <typename Z>
__device__ __forceinline__ float logit(const Loss& call, const Z* z, long long column) {
    float value = load(z + column * call.z.col);
    return call.bias.data ? value + call.bias[column] : value;
}

// The target weight q of an element: row weight x class weight x smoothed target.
__device__ __forceinline__ float wanted(const Loss& call, const Row& row, const float* target, long long column) {
    float t = call.soft ? target[column * call.target.col] : column == row.label ? 1.0f : 0.0f;
    float eps = static_cast<float>(call.smoothing);
    float q = t * (1.0f - eps) + eps / static_cast<float>(call.columns);
    if (call.class_weight.data) q *= call.class_weight[column];
    return q * row.weight;
}

template <int SIZE, typename Z>
__device__ inline RowSums entropy_row(
    const Loss& call, const Row& row, const Z* z, const float* target, Compute* dz, float scale) {
    int lane = threadIdx.x % SIZE;
    Best largest = {-infinity(), call.columns};
    Best meant = {-infinity(), call.columns};
    for (long long column = lane; column < call.columns; column += SIZE) {
        largest.take(logit(call, z, column), column);
        if (call.soft && call.accuracy) meant.take(target[column * call.target.col], column);
    }
    largest = team_best<SIZE>(largest);
    float total = 0.0f;
    float mass = 0.0f;
    float product = 0.0f;
    for (long long column = lane; column < call.columns; column += SIZE) {
        float shifted = logit(call, z, column) - largest.value;
        float q = wanted(call, row, target, column);
        total += expf(shifted);
        mass += q;
        product += q * shifted;
    }
    total = team_sum<SIZE>(total);
    mass = team_sum<SIZE>(mass);
    product = team_sum<SIZE>(product);
    if (dz) {
        float share = mass / total;
        for (long long column = lane; column < call.columns; column += SIZE) {
            float shifted = logit(call, z, column) - largest.value;
            float value = expf(shifted) * share - wanted(call, row, target, column);
            store(dz + column * call.dz.col, value * scale);
        }
    }
    RowSums sums = {mass * logf(total) - product, 0, row.counts ? 1 : 0, 0.0f};
    if (call.accuracy) {
        long long label = row.label;
        if (call.soft) label = team_best<SIZE>(meant).column;
        sums.right = row.counts && largest.column == label ? 1 : 0;
    }
    return sums;
}

template <int SIZE, typename Z>
__device__ inline RowSums element_row(
    const Loss& call, const Row& row, const Z* z, const float* target, Compute* dz, float scale) {
    int lane = threadIdx.x % SIZE;
    int code = static_cast<int>(call.activation);
    float slope = slope_of(call);
    float option = static_cast<float>(call.option);
    Best largest = {-infinity(), call.columns};
    Best meant = {-infinity(), call.columns};
    float loss = 0.0f;
    float below = 0.0f;
    long long hits = 0;
    for (long long column = lane; column < call.columns; column += SIZE) {
        float v = logit(call, z, column);
        float t = target[column * call.target.col];
        float y = activate(v, code, slope);
        float by_y;
        loss += element_loss(y, t, call.kind, option, &by_y) * row.weight;
        by_y *= row.weight * scale;
        if (code == PRELU) below += by_y * by_slope_prelu(v);
        if (dz) store(dz + column * call.dz.col, by_y * derivative(needs_z(code) ? v : y, code, slope));
        largest.take(y, column);
        meant.take(t, column);
        if ((y > 0.0f) == (t > 0.5f)) hits++;
    }
    RowSums sums = {team_sum<SIZE>(loss), 0, 1, 0.0f};
    if (code == PRELU) sums.below = team_sum<SIZE>(below);
    if (call.accuracy && call.kind == BINARY_CROSS_ENTROPY) {
        sums.right = team_sum<SIZE>(hits);
        sums.scored = call.columns;
    } else if (call.accuracy) {
        sums.right = team_best<SIZE>(largest).column == team_best<SIZE>(meant).column ? 1 : 0;
    }
    return sums;
}

__device__ inline void finish(const Loss& call, double normaliser) {
    double loss = sum_of(call.partials, gridDim.x, PARTIALS);
    double right = sum_of(call.partials + 1, gridDim.x, PARTIALS);
    double scored = sum_of(call.partials + 2, gridDim.x, PARTIALS);
    double below = sum_of(call.partials + 3, gridDim.x, PARTIALS);
    if (threadIdx.x != 0) return;
    double divisor = 1.0;
    if (call.mean) {
        call.stats[NORM_SUM] += normaliser;
        if (normaliser == 0.0) loss = 0.0;
        else divisor = normaliser;
    }
    call.stats[LAST_LOSS] = loss / divisor;
    call.stats[LOSS_SUM] += loss;
    if (call.accuracy) {
        call.stats[CORRECT] += right;
        call.stats[SCORED] += scored;
    }
    if (call.dslope) *call.dslope = static_cast<float>(below);
}

// The loss of every row, and its dz: SIZE threads a row.
template <int SIZE, typename Z>
__device__ __forceinline__ void loss_of(const Loss& call) {
    constexpr int TEAMS = THREADS / SIZE;
    __shared__ double parts[TEAMS][PARTIALS];
    long long valid = valid_rows(call);
    double normaliser = call.normaliser ? *call.normaliser : normaliser_of(call, valid);
    float scale = gradient_scale(call, normaliser);
    int team = threadIdx.x / SIZE;
    long long at = static_cast<long long>(blockIdx.x) * TEAMS + team;
    RowSums sums = {0.0f, 0, 0, 0.0f};
    Compute* dz = call.dz.data ? call.dz.at(at, 0) : nullptr;
    if (at < valid) {
        Row row = row_of(call, at);
        const Z* z = static_cast<const Z*>(call.z.data) + at * call.z.row;
        const float* target = call.target.data ? call.target.at(row.source, 0) : nullptr;
        if (call.kind == CROSS_ENTROPY) sums = entropy_row<SIZE>(call, row, z, target, dz, scale);
        else sums = element_row<SIZE>(call, row, z, target, dz, scale);
    } else if (at < call.rows && dz) {
        for (long long i = threadIdx.x % SIZE; i < call.columns; i += SIZE) store(dz + i * call.dz.col, 0.0f);
    }
    if (threadIdx.x % SIZE == 0) {
        parts[team][0] = sums.loss;
        parts[team][1] = static_cast<double>(sums.right);
        parts[team][2] = static_cast<double>(sums.scored);
        parts[team][3] = sums.below;
    }
    __syncthreads();
    if (threadIdx.x < PARTIALS) {
        double total = 0.0;
        for (int i = 0; i < TEAMS; i++) total += parts[i][threadIdx.x];
        call.partials[blockIdx.x * PARTIALS + threadIdx.x] = total;
    }
    if (is_last(call.ticket)) finish(call, normaliser);
}

// From a product in float32, to which the bias is added; and from a stored pre-activation. Long rows need more registers
// than three blocks on a multiprocessor have: two, or the assembler spills.
extern "C" __global__ void __launch_bounds__(THREADS) product_loss(const Loss call) {
    loss_of<WARP, float>(call);
}

extern "C" __global__ void __launch_bounds__(THREADS, 2) product_loss_of_long_rows(const Loss call) {
    loss_of<THREADS, float>(call);
}

extern "C" __global__ void __launch_bounds__(THREADS) stored_loss(const Loss call) {
    loss_of<WARP, Compute>(call);
}

extern "C" __global__ void __launch_bounds__(THREADS, 2) stored_loss_of_long_rows(const Loss call) {
    loss_of<THREADS, Compute>(call);
}
