// What a thread of the element-wise kernels works on: eight columns of a row.

#include "common.cuh"

// Eight numbers side by side are one or two vectors of sixteen bytes, where they lie so.
constexpr int LANES = 8;

struct Place {
    long long row;
    long long block;  // of LANES columns
    int count;  // columns of the row that are in it
    bool inside;
};

// Where this thread is in a matrix; the rows lie one behind the other.
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
    place.block = at - place.row * per_row;
    long long left = columns - place.block * LANES;
    place.count = static_cast<int>(left < LANES ? left : LANES);
    return place;
}

template <typename T>
struct alignas(16) Vector {
    T lane[16 / sizeof(T)];
};

template <typename T>
__device__ __forceinline__ bool are_vectors(const T* at, long long step, int count) {
    return count == LANES && step == 1 && reinterpret_cast<unsigned long long>(at) % 16 == 0;
}

// `count` of the eight elements from `at` on, `step` apart; zeros for the others.
template <typename T>
__device__ __forceinline__ void load_lanes(const T* at, long long step, int count, float* out) {
    constexpr int WIDTH = 16 / sizeof(T);
    if (are_vectors(at, step, count)) {
        for (int first = 0; first < LANES; first += WIDTH) {
            Vector<T> part = *reinterpret_cast<const Vector<T>*>(at + first);
            for (int i = 0; i < WIDTH; i++) out[first + i] = load(&part.lane[i]);
        }
        return;
    }
    for (int i = 0; i < LANES; i++) out[i] = i < count ? load(at + i * step) : 0.0f;
}

template <typename T>
__device__ __forceinline__ void store_lanes(T* at, long long step, int count, const float* values) {
    constexpr int WIDTH = 16 / sizeof(T);
    if (are_vectors(at, step, count)) {
        for (int first = 0; first < LANES; first += WIDTH) {
            Vector<T> part;
            for (int i = 0; i < WIDTH; i++) store(&part.lane[i], values[first + i]);
            *reinterpret_cast<Vector<T>*>(at + first) = part;
        }
        return;
    }
    for (int i = 0; i < LANES; i++) {
        if (i < count) store(at + i * step, values[i]);
    }
}
