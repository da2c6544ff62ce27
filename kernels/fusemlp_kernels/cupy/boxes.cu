// Training with intervals: boxes of a layer's values by centre and radius, the worst case of the loss, and their
// gradients. reference.box and reference.worst_logits define them. Loops over lanes are unrolled: the lanes stay in
// registers.

#include "common.cuh"
#include "counters.cuh"
#include "lanes.cuh"
#include "pointwise.cuh"

struct Turn {
    Matrix<const float> source;
    Matrix<const float> signs;
    Matrix<float> turned;  // may be the source
    long long rows;
    long long columns;
};

// turned (rows, columns) = source, with another sign where that of signs is not above 0.
extern "C" __global__ void __launch_bounds__(THREADS) turn(const Turn call) {
    Place place = place_of(call.rows, call.columns);
    if (!place.inside) return;
    float values[LANES];
    float signs[LANES];
    load_lanes(call.source, place, values);
    load_lanes(call.signs, place, signs);
    // the magnitude of 0 is no -0
#pragma unroll
    for (int i = 0; i < LANES; i++) values[i] = signs[i] > 0.0f ? values[i] : 0.0f - values[i];
    store_lanes(call.turned, place, values);
}

// The share of the radius, and of the weight of the worst case, that is reached; see contract.Ramp.
template <typename Call>
__device__ __forceinline__ double reached(const Call& call) {
    double risen = (call.counters[UPDATE_COUNT] - call.first) / call.updates - call.warmup;
    if (call.ramp == 0.0) return risen >= 0.0 ? 1.0 : 0.0;
    double share = risen / call.ramp;
    return share < 0.0 ? 0.0 : share > 1.0 ? 1.0 : share;
}

// The row of the data that a row of the batch is; -1 is padding.
template <typename Call>
__device__ __forceinline__ long long source_of(const Call& call, long long row) {
    return call.indices ? call.indices[call.counters[ROW_OFFSET] + row] : row;
}

// Centres and radii between two numbers, in place of these.
__device__ __forceinline__ void centred(float* low, float* high) {
#pragma unroll
    for (int i = 0; i < LANES; i++) {
        float least = low[i];
        low[i] = 0.5f * least + 0.5f * high[i];
        high[i] = 0.5f * high[i] - 0.5f * least;
    }
}

struct Ball {
    Matrix<const Compute> x;
    Matrix<Compute> centre;
    Matrix<Compute> radius;
    Vector<const float> reach;
    Vector<const float> least;  // null: no bound
    Vector<const float> most;
    const long long* indices;  // of several batches; null: all rows of x in order
    const long long* counters;
    long long rows;
    long long columns;
    double eps;
    double kappa;
    double warmup;
    double ramp;
    double first;
    double updates;
};

// centre and radius (rows, columns) of the box of the inputs near a row.
extern "C" __global__ void __launch_bounds__(THREADS) ball(const Ball call) {
    Place place = place_of(call.rows, call.columns);
    if (!place.inside) return;
    float low[LANES] = {};
    float high[LANES] = {};
    Place from = place;
    from.row = source_of(call, place.row);
    if (from.row >= 0) {
        float size = static_cast<float>(call.eps * reached(call));
        load_lanes(call.x, from, low);
#pragma unroll
        for (int i = 0; i < LANES; i++) {
            if (i >= place.count) continue;
            long long column = place.column + i;
            float x = low[i];
            float spread = size * call.reach[column];
            low[i] = x - spread;
            high[i] = x + spread;
            if (call.least.data) {
                low[i] = maximum(low[i], call.least[column]);
                high[i] = maximum(high[i], call.least[column]);
            }
            if (call.most.data) {
                low[i] = minimum(low[i], call.most[column]);
                high[i] = minimum(high[i], call.most[column]);
            }
        }
    }
    centred(low, high);
    store_lanes(call.centre, place, low);
    store_lanes(call.radius, place, high);
}

struct Box {
    Matrix<Compute> zc;
    Matrix<Compute> zr;
    Matrix<Compute> low;
    Matrix<Compute> high;
    Matrix<Compute> centre;
    Matrix<Compute> radius;
    const float* slope_param;  // null: slope
    long long rows;
    long long columns;
    long long activation;
    double slope;
};

// The box of outputs from that of pre-activations.
extern "C" __global__ void __launch_bounds__(THREADS) box(const Box call) {
    Place place = place_of(call.rows, call.columns);
    if (!place.inside) return;
    int code = static_cast<int>(call.activation);
    float slope = slope_of(call);
    float low[LANES];
    float high[LANES];
    load_lanes(call.zc, place, low);
    load_lanes(call.zr, place, high);
#pragma unroll
    for (int i = 0; i < LANES; i++) {
        float z = low[i];
        low[i] = z - high[i];
        high[i] = z + high[i];
    }
    store_lanes(call.zc, place, low);
    store_lanes(call.zr, place, high);
#pragma unroll
    for (int i = 0; i < LANES; i++) {
        low[i] = activate(low[i], code, slope);
        high[i] = activate(high[i], code, slope);
    }
    store_lanes(call.low, place, low);
    store_lanes(call.high, place, high);
    centred(low, high);
    store_lanes(call.centre, place, low);
    store_lanes(call.radius, place, high);
}

// The gradients by zc and zr in place of those by centre and radius; low and high are what derivatives are read from.
extern "C" __global__ void __launch_bounds__(THREADS) box_grad(const Box call) {
    Place place = place_of(call.rows, call.columns);
    if (!place.inside) return;
    int code = static_cast<int>(call.activation);
    float slope = slope_of(call);
    float low[LANES];
    float high[LANES];
    float centre[LANES];
    float radius[LANES];
    load_lanes(call.low, place, low);
    load_lanes(call.high, place, high);
    load_lanes(call.centre, place, centre);
    load_lanes(call.radius, place, radius);
#pragma unroll
    for (int i = 0; i < LANES; i++) {
        float by_low = (0.5f * centre[i] - 0.5f * radius[i]) * derivative(low[i], code, slope);
        float by_high = (0.5f * centre[i] + 0.5f * radius[i]) * derivative(high[i], code, slope);
        centre[i] = by_high + by_low;
        radius[i] = by_high - by_low;
    }
    store_lanes(call.centre, place, centre);
    store_lanes(call.radius, place, radius);
}

struct Worst {
    Matrix<const Compute> zc;
    Matrix<const Compute> zr;
    Matrix<Compute> dzc;
    Matrix<Compute> dzr;
    Matrix<Compute> dz;
    Vector<const long long> labels;
    const long long* indices;  // of several batches; null: labels are in order
    const long long* counters;
    long long rows;
    long long columns;
    double eps;
    double kappa;
    double warmup;
    double ramp;
    double first;
    double updates;
};

// The label of a row, as a lane of this place; -1 is none.
__device__ __forceinline__ long long label_lane(const Worst& call, const Place& place) {
    long long source = source_of(call, place.row);
    return source < 0 ? -1 : call.labels[source] - place.column;
}

// dzc (rows, columns) = the logits that are worst for the label of each row.
extern "C" __global__ void __launch_bounds__(THREADS) worst(const Worst call) {
    Place place = place_of(call.rows, call.columns);
    if (!place.inside) return;
    float centre[LANES];
    float radius[LANES];
    load_lanes(call.zc, place, centre);
    load_lanes(call.zr, place, radius);
    long long label = label_lane(call, place);
#pragma unroll
    for (int i = 0; i < LANES; i++) centre[i] = i == label ? centre[i] - radius[i] : centre[i] + radius[i];
    store_lanes(call.dzc, place, centre);
}

// The gradients by zc and zr from that by the worst logits, in dzc; dz is shrunk to the share of the plain loss.
extern "C" __global__ void __launch_bounds__(THREADS) worst_grad(const Worst call) {
    Place place = place_of(call.rows, call.columns);
    if (!place.inside) return;
    double own = 1.0 - (1.0 - call.kappa) * reached(call);
    float hard = static_cast<float>(1.0 - own);
    float by[LANES];
    float plain[LANES];
    load_lanes(call.dzc, place, by);
    load_lanes(call.dz, place, plain);
    long long label = label_lane(call, place);
#pragma unroll
    for (int i = 0; i < LANES; i++) {
        // an infinity without a share is no NaN
        by[i] = own < 1.0 ? hard * by[i] : 0.0f;
        plain[i] *= static_cast<float>(own);
    }
    store_lanes(call.dz, place, plain);
    store_lanes(call.dzc, place, by);
#pragma unroll
    for (int i = 0; i < LANES; i++) by[i] = i == label ? -by[i] : by[i];
    store_lanes(call.dzr, place, by);
}
