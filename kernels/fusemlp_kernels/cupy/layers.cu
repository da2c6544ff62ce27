// The kernels around the matrix products of a layer: before them a gather of rows; after them bias, activation and
// dropout, or the derivative of the activation.

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
