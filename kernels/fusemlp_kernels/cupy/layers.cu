// The kernels around the matrix products of a layer: before them a gather of rows; after them bias, activation and
// dropout, or the derivative of the activation. A thread works on eight columns of a row.

#include "common.cuh"
#include "pointwise.cuh"

// Eight numbers side by side are one or two chunks of sixteen bytes, if they are aligned.
constexpr int LANES = 8;

struct Place {
    long long row;
    long long column;  // the first of LANES
    int count;  // of them inside the matrix
    bool inside;
};

// The place of this thread in a matrix, counted row by row.
__device__ __forceinline__ Place place_of(long long rows, long long columns) {
    long long per_row = (columns + LANES - 1) / LANES;
    long long at = static_cast<long long>(blockIdx.x) * THREADS + threadIdx.x;
    Place place = {0, 0, 0, at < rows * per_row};
    if (!place.inside) return place;
    // a division of 64 bits is a long program
    if (rows * per_row <= 0xffffffffll) {
        place.row = static_cast<unsigned>(at) / static_cast<unsigned>(per_row);
    } else {
        place.row = at / per_row;
    }
    place.column = (at - place.row * per_row) * LANES;
    long long left = columns - place.column;
    place.count = static_cast<int>(left < LANES ? left : LANES);
    return place;
}

template <typename T>
struct alignas(16) Chunk {
    T lane[16 / sizeof(T)];
};

template <typename T>
__device__ __forceinline__ bool are_chunks(const T* at, long long step, int count) {
    return count == LANES && step == 1 && reinterpret_cast<unsigned long long>(at) % 16 == 0;
}

// `count` of the eight elements from `at` on, `step` apart; zeros for the others.
template <typename T>
__device__ __forceinline__ void load_lanes(const T* at, long long step, int count, float* out) {
    constexpr int WIDTH = 16 / sizeof(T);
    if (are_chunks(at, step, count)) {
        for (int first = 0; first < LANES; first += WIDTH) {
            Chunk<T> part = *reinterpret_cast<const Chunk<T>*>(at + first);
            for (int i = 0; i < WIDTH; i++) out[first + i] = load(&part.lane[i]);
        }
        return;
    }
    for (int i = 0; i < LANES; i++) out[i] = i < count ? load(at + i * step) : 0.0f;
}

template <typename T>
__device__ __forceinline__ void load_lanes(const Matrix<T>& from, const Place& place, float* out) {
    load_lanes(from.at(place.row, place.column), from.col, place.count, out);
}

template <typename T>
__device__ __forceinline__ void store_lanes(const Matrix<T>& to, const Place& place, const float* values) {
    constexpr int WIDTH = 16 / sizeof(T);
    T* at = to.at(place.row, place.column);
    if (are_chunks(at, to.col, place.count)) {
        for (int first = 0; first < LANES; first += WIDTH) {
            Chunk<T> part;
            for (int i = 0; i < WIDTH; i++) store(&part.lane[i], values[first + i]);
            *reinterpret_cast<Chunk<T>*>(at + first) = part;
        }
        return;
    }
    for (int i = 0; i < LANES; i++) {
        if (i < place.count) store(at + i * to.col, values[i]);
    }
}

// Dropout masks, computed again where they are used; philox.py defines them (Salmon et al., 2011).

struct Words {
    unsigned word[4];
};

// Philox 4x32-10 of the counter (c0, c1, c2, c3) under the key (k0, k1).
__device__ __forceinline__ Words philox(
    unsigned c0, unsigned c1, unsigned c2, unsigned c3, unsigned k0, unsigned k1) {
    for (int round = 0; round < 10; round++) {
        unsigned long long product0 = 0xD2511F53ull * c0;
        unsigned long long product1 = 0xCD9E8D57ull * c2;
        c0 = static_cast<unsigned>(product1 >> 32) ^ c1 ^ k0;
        c2 = static_cast<unsigned>(product0 >> 32) ^ c3 ^ k1;
        c1 = static_cast<unsigned>(product1);
        c3 = static_cast<unsigned>(product0);
        k0 += 0x9E3779B9u;
        k1 += 0xBB67AE85u;
    }
    return {{c0, c1, c2, c3}};
}

// Bit i: element (row, 8 * block + i) is kept. Lane 2i is the low half of word i, lane 2i + 1 the high half.
__device__ __forceinline__ unsigned kept_lanes(
    long long block, long long row, long long layer, long long batch, long long key0, long long key1,
    unsigned threshold) {
    Words words = philox(
        static_cast<unsigned>(block), static_cast<unsigned>(row), static_cast<unsigned>(layer),
        static_cast<unsigned>(batch), static_cast<unsigned>(key0), static_cast<unsigned>(key1));
    unsigned kept = 0;
    for (int i = 0; i < 4; i++) {
        if ((words.word[i] & 0xffffu) >= threshold) kept |= 1u << (2 * i);
        if (words.word[i] >> 16 >= threshold) kept |= 2u << (2 * i);
    }
    return kept;
}

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
