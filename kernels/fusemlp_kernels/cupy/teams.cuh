// Sums and largest values over the threads of a row: a warp, or the block. Each of these threads gets the result.

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
