// Shared by all kernels: the places of the control arrays, arrays, 16-bit numbers, sums in a fixed order, a test for the
// last block, and the functions of pointwise.FUNCTIONS that CUDA lacks.
//
// The sources are C++17 without headers, for NVRTC.

#ifndef COMPUTE_IS_HALF
#error "COMPUTE_IS_HALF: 1 where matrix products read float16, else 0"
#endif

// The places of counters, hyper, rates and stats, as in contract.py.

enum Counter { BATCH_INDEX, UPDATE_COUNT, ROW_COUNT, ROW_OFFSET, ROW_TOTAL, ROW_STEP, SKIPPED, SKIPPED_IN_A_ROW };
enum Hyper { LEARNING_RATE, BIAS_CORRECTION_1, BIAS_CORRECTION_2, RATE_SCALE, LOSS_SCALE, GOOD_UPDATES, SHARE };
enum Rates { FIRST_UPDATE, ROWS_FILLED, RATE_SHARE = 3, RATE_COLUMNS };
enum Stat { LAST_LOSS, LOSS_SUM, NORM_SUM, CORRECT, SCORED, BATCH_LOSSES, PENALTIES, STATS };

// Threads of a block, everywhere.
constexpr int THREADS = 256;
constexpr int WARP = 32;
constexpr unsigned ALL_LANES = 0xffffffffu;

// An IEEE binary16 number as its bits.
struct Half {
    unsigned short bits;
};

#if COMPUTE_IS_HALF
using Compute = Half;
#else
using Compute = float;
#endif

// Arrays of any strides, in elements; `data` is null where an operand is left out. `sources.py` describes them to NumPy.
template <typename T>
struct Vector {
    T* data;
    long long step;

    __device__ __forceinline__ T& operator[](long long i) const { return data[i * step]; }
};

template <typename T>
struct Matrix {
    T* data;
    long long row;
    long long col;

    __device__ __forceinline__ T* at(long long i, long long j) const { return data + i * row + j * col; }
};

__device__ __forceinline__ float infinity() {
    return __uint_as_float(0x7f800000u);
}

// A compiler for a host has to define these conversions.
#ifdef __CUDA_ARCH__
__device__ __forceinline__ float half_to_float(unsigned short bits) {
    float value;
    asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(bits));
    return value;
}

__device__ __forceinline__ unsigned short float_to_half(float value) {
    unsigned short bits;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(value));
    return bits;
}
#endif

// The slope of an activation: learned, or a number.
template <typename Call>
__device__ __forceinline__ float slope_of(const Call& call) {
    return call.slope_param ? *call.slope_param : static_cast<float>(call.slope);
}

__device__ __forceinline__ float load(const float* at) {
    return *at;
}

__device__ __forceinline__ float load(const Half* at) {
    return half_to_float(at->bits);
}

__device__ __forceinline__ void store(float* at, float value) {
    *at = value;
}

__device__ __forceinline__ void store(Half* at, float value) {
    at->bits = float_to_half(value);
}

// The sum over a warp, in every lane.
template <typename T>
__device__ __forceinline__ T warp_sum(T value) {
    for (int mask = WARP / 2; mask > 0; mask /= 2) value += __shfl_xor_sync(ALL_LANES, value, mask);
    return value;
}

// The sum over the block, in every thread. All threads come here.
template <typename T>
__device__ __forceinline__ T block_sum(T value) {
    __shared__ T parts[THREADS / WARP];
    value = warp_sum(value);
    __syncthreads();
    if (threadIdx.x % WARP == 0) parts[threadIdx.x / WARP] = value;
    __syncthreads();
    T total = parts[0];
    for (int i = 1; i < THREADS / WARP; i++) total += parts[i];
    return total;
}

// True in the last of `count` blocks that come here: it sees what the others wrote before. All threads come here. The
// ticket is ready for the next launch.
__device__ __forceinline__ bool is_last(unsigned* ticket, unsigned count = gridDim.x) {
    __shared__ bool last;
    __threadfence();
    __syncthreads();
    if (threadIdx.x == 0) {
        last = atomicAdd(ticket, 1u) == count - 1;
        if (last) *ticket = 0;
    }
    __syncthreads();
    __threadfence();
    return last;
}

// The sum of `count` partial results of other blocks, in a fixed order, in every thread.
__device__ __forceinline__ double sum_of(const double* partials, long long count, int stride) {
    // this multiprocessor's cache may not have the numbers that other blocks have just written
    const volatile double* fresh = partials;
    double total = 0.0;
    for (long long i = threadIdx.x; i < count; i += THREADS) total += fresh[i * stride];
    return block_sum(total);
}

// The entry of this block, in a table of `count` entries: each has the blocks from its first to the next entry's.
template <typename Entry>
__device__ __forceinline__ const Entry& entry_of_block(const Entry* entries, long long count) {
    int low = 0;
    for (int left = static_cast<int>(count); left > 1; left -= left / 2) {
        if (entries[low + left / 2].first_block <= blockIdx.x) low += left / 2;
    }
    return entries[low];
}

__device__ __forceinline__ float not_a_number() {
    return __uint_as_float(0x7fc00000u);
}

// 1 / (1 + exp(-z)), without overflow.
__device__ __forceinline__ float sigmoid(float z) {
    float e = expf(-fabsf(z));
    return (z >= 0.0f ? 1.0f : e) / (1.0f + e);
}

__device__ __forceinline__ float normal_cdf(float z) {
    return 0.5f * (1.0f + erff(z * 0.7071067811865476f));
}

__device__ __forceinline__ float normal_pdf(float z) {
    return 0.3989422804014327f * expf(-0.5f * z * z);
}

// The larger one; NaN where z is.
template <typename T>
__device__ __forceinline__ T maximum(T z, T other) {
    return z < other ? other : z;
}

// The smaller one; NaN where z is.
template <typename T>
__device__ __forceinline__ T minimum(T z, T other) {
    return z > other ? other : z;
}

// 1, 0, -1 or NaN.
__device__ __forceinline__ float sign(float z) {
    return z > 0.0f ? 1.0f : z < 0.0f ? -1.0f : z;
}

// 1 above zero, `below` elsewhere, NaN for NaN.
__device__ __forceinline__ float step(float z, float below) {
    return z > 0.0f ? 1.0f : z <= 0.0f ? below : z;
}
