// Losses with their gradients from the output layer's pre-activation; reference.loss_grad defines them.
//
// A row belongs to a warp, or to a block if rows are long. One kernel reads every row and writes its dz. The last block
// takes the sums over the batch, in a fixed order. Every dz needs the normaliser before any block has ended: each block
// computes it, or, for a large batch, a launch before.

#include "common.cuh"
#include "counters.cuh"
#include "pointwise.cuh"
#include "rows.cuh"
#include "teams.cuh"

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
