// Sums and largest values over the threads that a row belongs to.

#include "common.cuh"

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

// The threads that a row belongs to: a warp, or the block. Their sums and largest values, in every thread of them.
template <int THREADS_A_ROW>
struct Team;

template <>
struct Team<WARP> {
    template <typename T>
    static __device__ __forceinline__ T sum(T value) {
        return warp_sum(value);
    }

    static __device__ __forceinline__ Best best(Best mine) {
        for (int mask = WARP / 2; mask > 0; mask /= 2) {
            float value = __shfl_xor_sync(ALL_LANES, mine.value, mask);
            long long column = __shfl_xor_sync(ALL_LANES, mine.column, mask);
            mine.take(value, column);
        }
        return mine;
    }
};

template <>
struct Team<THREADS> {
    template <typename T>
    static __device__ __forceinline__ T sum(T value) {
        return block_sum(value);
    }

    static __device__ __forceinline__ Best best(Best mine) {
        __shared__ float values[THREADS / WARP];
        __shared__ long long columns[THREADS / WARP];
        mine = Team<WARP>::best(mine);
        __syncthreads();
        if (threadIdx.x % WARP == 0) {
            values[threadIdx.x / WARP] = mine.value;
            columns[threadIdx.x / WARP] = mine.column;
        }
        __syncthreads();
        for (int i = 0; i < THREADS / WARP; i++) mine.take(values[i], columns[i]);
        return mine;
    }
};
