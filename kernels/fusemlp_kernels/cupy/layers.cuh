// What stands around the matrix products of a layer: gathered rows before them; bias, activation and dropout, or the
// derivative of the activation, behind them.

#include "common.cuh"
#include "counters.cuh"
#include "lanes.cuh"
#include "philox.cuh"
#include "pointwise.cuh"

struct Gather {
    const Compute* x;
    long long x_row;
    long long x_col;
    Compute* out;
    long long out_row;
    long long out_col;
    const long long* indices;  // of several batches; null: all rows of x in order
    const long long* counters;
    long long rows;
    long long columns;
};

// out (rows, columns) = x[indices], zeros where an index is -1; with no indices a copy.
__device__ __forceinline__ void gather_of(const Gather& call) {
    Place place = place_of(call.rows, call.columns);
    if (!place.inside) return;
    long long row = place.row;
    long long column = place.block * LANES;
    long long source = call.indices ? call.indices[call.counters[ROW_OFFSET] + row] : row;
    float values[LANES] = {};
    if (source >= 0) load_lanes(call.x + source * call.x_row + column * call.x_col, call.x_col, place.count, values);
    store_lanes(call.out + row * call.out_row + column * call.out_col, call.out_col, place.count, values);
}

struct Forward {
    const float* product;  // null: zeros
    long long product_row;
    long long product_col;
    const float* bias;
    long long bias_step;
    Compute* z;  // null: not kept
    long long z_row;
    long long z_col;
    Compute* y;
    long long y_row;
    long long y_col;
    const float* slope_param;  // null: slope
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
};

// y (rows, columns) = dropout(activation(product + bias)); y or z may be where the product lies.
__device__ __forceinline__ void forward_of(const Forward& call) {
    Place place = place_of(call.rows, call.columns);
    if (!place.inside) return;
    long long row = place.row;
    long long column = place.block * LANES;
    int code = static_cast<int>(call.activation);
    float slope = call.slope_param ? *call.slope_param : static_cast<float>(call.slope);
    float values[LANES] = {};
    float bias[LANES];
    if (call.product) {
        const float* from = call.product + row * call.product_row + column * call.product_col;
        load_lanes(from, call.product_col, place.count, values);
    }
    load_lanes(call.bias + column * call.bias_step, call.bias_step, place.count, bias);
    for (int i = 0; i < LANES; i++) values[i] += bias[i];
    if (call.z) store_lanes(call.z + row * call.z_row + column * call.z_col, call.z_col, place.count, values);
    unsigned kept = 0xffu;
    if (call.threshold > 0) {
        kept = kept_lanes(
            place.block, row, call.layer, call.counters[BATCH_INDEX], call.key0, call.key1,
            static_cast<unsigned>(call.threshold));
    }
    float scale = static_cast<float>(call.keep_scale);
    for (int i = 0; i < LANES; i++) {
        float y = activate(values[i], code, slope);
        values[i] = kept >> i & 1u ? y * scale : 0.0f;
    }
    store_lanes(call.y + row * call.y_row + column * call.y_col, call.y_col, place.count, values);
}

struct Backward {
    const float* product;  // null: zeros
    long long product_row;
    long long product_col;
    const Compute* source;
    long long source_row;
    long long source_col;
    Compute* out;
    long long out_row;
    long long out_col;
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

// out (rows, columns) = product * keep / (1 - p) * activation'; dslope (1,) where it is prelu's.
//
// `source` is what the derivative is read from: the pre-activation where needs_z, else the layer's output, after
// dropout, which kept_share = 1 - p undoes. `out` may be where the product lies.
__device__ __forceinline__ void backward_of(const Backward& call) {
    Place place = place_of(call.rows, call.columns);
    int code = static_cast<int>(call.activation);
    float below = 0.0f;
    if (place.inside) {
        long long row = place.row;
        long long column = place.block * LANES;
        float slope = call.slope_param ? *call.slope_param : static_cast<float>(call.slope);
        float values[LANES] = {};
        float from[LANES];
        if (call.product) {
            const float* product = call.product + row * call.product_row + column * call.product_col;
            load_lanes(product, call.product_col, place.count, values);
        }
        const Compute* source = call.source + row * call.source_row + column * call.source_col;
        load_lanes(source, call.source_col, place.count, from);
        if (call.threshold > 0) {
            unsigned kept = kept_lanes(
                place.block, row, call.layer, call.counters[BATCH_INDEX], call.key0, call.key1,
                static_cast<unsigned>(call.threshold));
            float scale = static_cast<float>(call.keep_scale);
            for (int i = 0; i < LANES; i++) values[i] = kept >> i & 1u ? values[i] * scale : 0.0f;
        }
        float share = needs_z(code) ? 1.0f : static_cast<float>(call.kept_share);
        for (int i = 0; i < LANES; i++) {
            float v = from[i] * share;
            if (code == PRELU && i < place.count) below += values[i] * by_slope_prelu(v);
            values[i] *= derivative(v, code, slope);
        }
        store_lanes(call.out + row * call.out_row + column * call.out_col, call.out_col, place.count, values);
    }
    if (code != PRELU) return;
    double sum = block_sum(static_cast<double>(below));
    if (threadIdx.x == 0) call.partials[blockIdx.x] = sum;
    if (!is_last(call.ticket)) return;
    double total = sum_of(call.partials, gridDim.x, 1);
    if (threadIdx.x == 0) *call.dslope = static_cast<float>(total);
}
