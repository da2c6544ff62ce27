// A thread of the element-wise kernels works on eight columns of a row.

#include "common.cuh"

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
