// Kernels of members that share weights, for all that each has of its own: row i of a batch belongs to member
// i % members.

#include "common.cuh"
#include "counters.cuh"
#include "lanes.cuh"
#include "philox.cuh"
#include "pointwise.cuh"

// The columns of a member that a block sums, the rows that it reads at a time, and the rows that it sums. The last
// block of these columns adds up the parts of a longer batch, in order.
constexpr int COLUMNS = 32;
constexpr int STRETCHES = THREADS / COLUMNS;
constexpr int PART_ROWS = 256;
// ds, db and dr.
constexpr int GRADIENTS = 3;

struct Own {
    Matrix<const Compute> x;
    Matrix<const float> product;  // in place of x; may be the memory of `out`
    Matrix<const Compute> dy;
    Matrix<Compute> out;  // y, or dx; null: not wanted
    Matrix<const float> s;  // (members, columns), as are the next; null: changes nothing
    Matrix<const float> b;
    Matrix<const float> r;
    Matrix<float> ds;  // null: not wanted
    Matrix<float> db;
    Matrix<float> dr;
    const long long* indices;  // of several batches; null: all rows of x in order
    const long long* counters;
    float* sums;  // (blocks, GRADIENTS, COLUMNS)
    unsigned* tickets;  // one for each member's COLUMNS columns
    long long rows;
    long long columns;
    long long members;
    long long parts;
    long long accumulate;
    long long activation;
    long long layer;
    long long key0;
    long long key1;
    long long threshold;  // 0: no dropout
    double slope;
    double keep_scale;
    double kept_share;
};

__device__ __forceinline__ long long source_of(const Own& call, long long row) {
    return call.indices ? call.indices[call.counters[ROW_OFFSET] + row] : row;
}

// Bit i: lane i of the columns from `column` on is kept.
__device__ __forceinline__ unsigned kept_at(const Own& call, long long row, long long column) {
    if (call.threshold == 0) return 0xffu;
    return kept_lanes(
        column / LANES, row, call.layer, call.counters[BATCH_INDEX], call.key0, call.key1,
        static_cast<unsigned>(call.threshold));
}

// Eight of a member's numbers; `absent` where it has none.
__device__ __forceinline__ void load_own(
    const Matrix<const float>& from, const Place& place, float absent, float* out) {
    for (int i = 0; i < LANES; i++) out[i] = absent;
    if (from.data) load_lanes(from, place, out);
}

// out (rows, columns) = dropout(activation(x * s + b)) * r, zeros where an index is -1.
extern "C" __global__ void __launch_bounds__(THREADS) affine(const Own call) {
    Place place = place_of(call.rows, call.columns);
    if (!place.inside) return;
    float values[LANES] = {};
    Place from = place;
    from.row = source_of(call, place.row);
    if (from.row >= 0) {
        int code = static_cast<int>(call.activation);
        float slope = static_cast<float>(call.slope);
        float scale = static_cast<float>(call.keep_scale);
        Place mine = place;
        mine.row = place.row % call.members;
        float s[LANES], b[LANES], r[LANES];
        load_own(call.s, mine, 1.0f, s);
        load_own(call.b, mine, 0.0f, b);
        load_own(call.r, mine, 1.0f, r);
        if (call.product.data) load_lanes(call.product, from, values);
        else load_lanes(call.x, from, values);
        unsigned kept = kept_at(call, place.row, place.column);
        for (int i = 0; i < LANES; i++) {
            float y = activate(values[i] * s[i] + b[i], code, slope);
            values[i] = (kept >> i & 1u ? y * scale : 0.0f) * r[i];
        }
    }
    store_lanes(call.out, place, values);
}

__device__ __forceinline__ void store_sum(
    const Own& call, const Matrix<float>& gradient, long long member, long long column, float sum) {
    if (!gradient.data) return;
    float* out = gradient.at(member, column);
    *out = call.counters[BATCH_INDEX] % call.accumulate != 0 ? sum + *out : sum;
}

// Back through `affine`: out, the gradient by x, and the sums ds, db and dr over each member's rows; a block has
// COLUMNS columns and PART_ROWS rows of a member.
extern "C" __global__ void __launch_bounds__(THREADS) grad_affine(const Own call) {
    __shared__ float stretches[GRADIENTS][STRETCHES][COLUMNS];
    int lane = threadIdx.x % COLUMNS;
    int stretch = threadIdx.x / COLUMNS;
    long long groups = (call.columns + COLUMNS - 1) / COLUMNS;
    long long block = blockIdx.x / call.parts;
    long long part = blockIdx.x - block * call.parts;
    long long member = block / groups;
    long long column = (block - member * groups) * COLUMNS + lane;
    long long each = call.rows / call.members;
    long long begin = part * PART_ROWS;
    long long end = begin + PART_ROWS < each ? begin + PART_ROWS : each;
    float sums[GRADIENTS] = {};
    if (column < call.columns) {
        int code = static_cast<int>(call.activation);
        float slope = static_cast<float>(call.slope);
        float scale = static_cast<float>(call.keep_scale);
        float s = call.s.data ? *call.s.at(member, column) : 1.0f;
        float b = call.b.data ? *call.b.at(member, column) : 0.0f;
        float r = call.r.data ? *call.r.at(member, column) : 1.0f;
        for (long long place = begin + stretch; place < end; place += STRETCHES) {
            long long row = place * call.members + member;
            long long source = source_of(call, row);
            float g = 0.0f;
            if (source >= 0) {
                float x = load(call.x.at(source, column));
                float z = x * s + b;
                float h = activate(z, code, slope);
                bool kept = kept_at(call, row, column) >> column % LANES & 1u;
                g = kept ? load(call.dy.at(row, column)) * scale : 0.0f;
                sums[2] += g * h;
                g *= r * derivative(needs_z(code) ? z : h, code, slope);
                sums[0] += g * x;
                sums[1] += g;
            }
            if (call.out.data) store(call.out.at(row, column), g * s);
        }
    }
    for (int i = 0; i < GRADIENTS; i++) stretches[i][stretch][lane] = sums[i];
    __syncthreads();
    for (int i = 0; i < GRADIENTS && stretch == 0; i++) {
        for (int k = 1; k < STRETCHES; k++) sums[i] += stretches[i][k][lane];
    }
    bool writes = true;
    if (call.parts > 1) {
        float* own = call.sums + block * call.parts * GRADIENTS * COLUMNS + lane;
        for (int i = 0; i < GRADIENTS && stretch == 0; i++) own[(part * GRADIENTS + i) * COLUMNS] = sums[i];
        writes = is_last(call.tickets + block, static_cast<unsigned>(call.parts));
        const volatile float* fresh = own;
        for (int i = 0; i < GRADIENTS && writes && stretch == 0; i++) {
            sums[i] = fresh[i * COLUMNS];
            for (long long k = 1; k < call.parts; k++) sums[i] += fresh[(k * GRADIENTS + i) * COLUMNS];
        }
    }
    if (!writes || stretch != 0 || column >= call.columns) return;
    store_sum(call, call.ds, member, column, sums[0]);
    store_sum(call, call.db, member, column, sums[1]);
    store_sum(call, call.dr, member, column, sums[2]);
}
