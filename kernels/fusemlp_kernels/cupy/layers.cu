// The kernels around the matrix products of a layer: before them a gather of rows; after them bias, activation and
// dropout, or the derivative of the activation; and after the last one back a step of an attack on the inputs.

#include "common.cuh"
#include "counters.cuh"
#include "lanes.cuh"
#include "philox.cuh"
#include "pointwise.cuh"

struct Gather {
    Matrix<const Compute> x;
    Matrix<Compute> out;
    const long long* indices;  // of several batches; null: all rows of x in order
    const long long* counters;
    long long rows;
    long long columns;
};

// out (rows, columns) = x[indices], zeros where an index is -1; without indices a copy.
extern "C" __global__ void __launch_bounds__(THREADS) gather_rows(const Gather call) {
    Place place = place_of(call.rows, call.columns);
    if (!place.inside) return;
    Place from = place;
    if (call.indices) from.row = call.indices[call.counters[ROW_OFFSET] + place.row];
    float values[LANES] = {};
    if (from.row >= 0) load_lanes(call.x, from, values);
    store_lanes(call.out, place, values);
}

struct Layer {
    Matrix<const float> product;  // null: zeros
    Vector<const float> bias;
    Matrix<Compute> z;  // null: not kept
    Matrix<const Compute> source;  // of the derivative
    Matrix<Compute> out;  // may be the product's memory, as may z
    const float* slope_param;  // null: slope
    float* dslope;
    double* partials;
    unsigned* ticket;
    const long long* counters;
    long long rows;
    long long columns;
    long long activation;
    long long layer;
    long long key0;
    long long key1;
    long long threshold;  // 0: no dropout
    double slope;
    double keep_scale;
    double kept_share;
};

// Bit i: lane i is kept.
__device__ __forceinline__ unsigned kept_at(const Layer& call, const Place& place) {
    if (call.threshold == 0) return 0xffu;
    return kept_lanes(
        place.column / LANES, place.row, call.layer, call.counters[BATCH_INDEX], call.key0, call.key1,
        static_cast<unsigned>(call.threshold));
}

// out (rows, columns) = dropout(activation(product + bias)).
extern "C" __global__ void __launch_bounds__(THREADS) forward(const Layer call) {
    Place place = place_of(call.rows, call.columns);
    if (!place.inside) return;
    int code = static_cast<int>(call.activation);
    float slope = slope_of(call);
    float values[LANES] = {};
    float bias[LANES];
    if (call.product.data) load_lanes(call.product, place, values);
    load_lanes(&call.bias[place.column], call.bias.step, place.count, bias);
    for (int i = 0; i < LANES; i++) values[i] += bias[i];
    if (call.z.data) store_lanes(call.z, place, values);
    unsigned kept = kept_at(call, place);
    float scale = static_cast<float>(call.keep_scale);
    for (int i = 0; i < LANES; i++) {
        float y = activate(values[i], code, slope);
        values[i] = kept >> i & 1u ? y * scale : 0.0f;
    }
    store_lanes(call.out, place, values);
}

// out (rows, columns) = product * keep / (1 - p) * activation'; dslope (1,) for prelu.
//
// The derivative is read from `source`: the pre-activation where needs_z, else the layer's output after dropout, which
// kept_share = 1 - p undoes.
extern "C" __global__ void __launch_bounds__(THREADS) backward(const Layer call) {
    Place place = place_of(call.rows, call.columns);
    int code = static_cast<int>(call.activation);
    float below = 0.0f;
    if (place.inside) {
        float slope = slope_of(call);
        float values[LANES] = {};
        float from[LANES];
        if (call.product.data) load_lanes(call.product, place, values);
        load_lanes(call.source, place, from);
        unsigned kept = kept_at(call, place);
        float scale = static_cast<float>(call.keep_scale);
        float share = needs_z(code) ? 1.0f : static_cast<float>(call.kept_share);
        for (int i = 0; i < LANES; i++) {
            float v = from[i] * share;
            values[i] = kept >> i & 1u ? values[i] * scale : 0.0f;
            if (code == PRELU && i < place.count) below += values[i] * by_slope_prelu(v);
            values[i] *= derivative(v, code, slope);
        }
        store_lanes(call.out, place, values);
    }
    if (code != PRELU) return;
    double sum = block_sum(static_cast<double>(below));
    if (threadIdx.x == 0) call.partials[blockIdx.x] = sum;
    if (!is_last(call.ticket)) return;
    double total = sum_of(call.partials, gridDim.x, 1);
    if (threadIdx.x == 0) *call.dslope = static_cast<float>(total);
}

struct Attack {
    Matrix<const Compute> x;
    Matrix<const Compute> dx;  // null: the start, from 0 or a random one
    Matrix<Compute> adv;
    const long long* indices;  // of several batches; null: all rows of x in order
    const long long* counters;
    long long columns;
    long long euclid;  // the norm is 2, else the largest element
    long long drawn;  // the start is random
    long long key0;
    long long key1;
    double length;
    double eps;
    double low;
    double high;
};

// The change of x at a column of a row, before it is brought back.
__device__ __forceinline__ float displacement(
    const Attack& call, long long row, long long column, float x, double factor) {
    if (call.dx.data) {
        float g = load(call.dx.at(row, column));
        // the factor of a tiny gradient is no float
        float step = call.euclid ? static_cast<float>(factor * g) : static_cast<float>(factor) * sign(g);
        return load(call.adv.at(row, column)) - x + step;
    }
    if (!call.drawn) return 0.0f;
    Words words = philox(
        static_cast<unsigned>(column / 4), static_cast<unsigned>(row), 0x80000000u,
        static_cast<unsigned>(call.counters[BATCH_INDEX]), static_cast<unsigned>(call.key0),
        static_cast<unsigned>(call.key1));
    // exact in float32
    float highest = static_cast<float>(words.word[column % 4] >> 9);
    return static_cast<float>(call.eps) * (highest * 2.384185791015625e-07f + (1.1920928955078125e-07f - 1.0f));
}

// Each row of adv (rows, columns), by a block: x moved within the norm eps and the bounds, zeros where an index is -1.
// Norms are taken in double, where no square of a float underflows.
extern "C" __global__ void __launch_bounds__(THREADS) perturb(const Attack call) {
    long long row = blockIdx.x;
    long long source = call.indices ? call.indices[call.counters[ROW_OFFSET] + row] : row;
    if (source < 0) {
        for (long long j = threadIdx.x; j < call.columns; j += THREADS) store(call.adv.at(row, j), 0.0f);
        return;
    }
    double factor = call.length;
    float share = 1.0f;
    if (call.euclid) {
        if (call.dx.data) {
            double squares = 0.0;
            for (long long j = threadIdx.x; j < call.columns; j += THREADS) {
                double g = load(call.dx.at(row, j));
                squares += g * g;
            }
            double norm = sqrt(block_sum(squares));
            factor = norm == 0.0 ? 0.0 : call.length / norm;
        }
        double squares = 0.0;
        for (long long j = threadIdx.x; j < call.columns; j += THREADS) {
            double d = displacement(call, row, j, load(call.x.at(source, j)), factor);
            squares += d * d;
        }
        double norm = sqrt(block_sum(squares));
        // a NaN stays
        share = norm <= call.eps ? 1.0f : static_cast<float>(call.eps / norm);
    }
    float eps = static_cast<float>(call.eps);
    for (long long j = threadIdx.x; j < call.columns; j += THREADS) {
        float x = load(call.x.at(source, j));
        float d = displacement(call, row, j, x, factor);
        if (!call.euclid) d = minimum(maximum(d, -eps), eps);
        float moved = maximum(x + share * d, static_cast<float>(call.low));
        store(call.adv.at(row, j), minimum(moved, static_cast<float>(call.high)));
    }
}
