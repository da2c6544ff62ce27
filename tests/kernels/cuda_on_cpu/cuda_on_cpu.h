// CUDA C as C++17 for a CPU: included before a .cu file, it defines CUDA's keywords and functions. Test code.
//
// The blocks of a launch run one after another, the threads of a block as fibers (fibers.cpp). A thread runs until it
// waits, so barriers and shuffles are real, and the order of threads between them is random. It cannot show races that
// no order of the threads reveals, missing fences (there is one memory), blocks that wait for one another, and speed.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstring>
#include <type_traits>
#include <utility>

#define __global__
#define __device__ __attribute__((unused))
#define __forceinline__ inline __attribute__((always_inline))
#define __restrict__ __restrict
#define __launch_bounds__(...)
#define __align__(n) alignas(n)
#define __constant__ static const
// A separate section, filled with NaN when a block starts. library.py rewrites `extern` arrays.
#define __shared__ static __attribute__((section("cuda_shared")))

struct uint3 {
    unsigned x, y, z;
};

struct dim3 {
    unsigned x, y, z;
};

namespace cuda_on_cpu {

enum Operation { BLOCK_BARRIER, WARP_BARRIER, SHUFFLE, BALLOT };

constexpr unsigned LANES = 32;

// The identity of the running thread.
struct Place {
    uint3 thread, block;
    dim3 threads, blocks;
    unsigned lane;
};

extern Place place;

// Ends the launch: the source breaks a rule of CUDA on this line.
[[noreturn]] void fault(int line, const char* format, ...) __attribute__((format(printf, 2, 3)));

void* dynamic_shared();

// Waits for the whole block; returns how many of its threads gave true.
int meet_block(int line, bool predicate);

// Waits for the lanes of `mask`. SHUFFLE returns the value of lane `source`, BALLOT a bit for every lane's value.
unsigned long long meet_lanes(Operation operation, int line, unsigned mask, unsigned long long value, unsigned source);

template <typename T>
T shuffle(int line, unsigned mask, T value, unsigned source) {
    static_assert(std::is_arithmetic_v<T> && sizeof(T) >= 4, "a shuffle takes numbers of 4 or 8 bytes");
    unsigned long long bits = 0;
    std::memcpy(&bits, &value, sizeof(T));
    bits = meet_lanes(SHUFFLE, line, mask, bits, source);
    std::memcpy(&value, &bits, sizeof(T));
    return value;
}

// The signature of a kernel, for a launch. Kinds: p pointer, f floating, i signed, u unsigned, b bool, s structure.
struct Parameter {
    int size;
    char kind;
};

struct Kernel {
    const char* name;
    int most_threads;  // 0: the source says nothing
    int count;
    const Parameter* parameters;
    void (*call)(void** arguments);
};

template <typename T>
constexpr char kind_of() {
    if (std::is_pointer_v<T>) return 'p';
    if (std::is_floating_point_v<T>) return 'f';
    if (std::is_same_v<T, bool>) return 'b';
    if (!std::is_integral_v<T>) return 's';
    return std::is_signed_v<T> ? 'i' : 'u';
}

template <auto kernel>
struct Entry;

template <typename... T, void (*kernel)(T...)>
struct Entry<kernel> {
    static constexpr Parameter parameters[] = {{static_cast<int>(sizeof(T)), kind_of<T>()}..., {0, 0}};

    template <std::size_t... I>
    static void unpack([[maybe_unused]] void** arguments, std::index_sequence<I...>) {
        kernel(*static_cast<T*>(arguments[I])...);
    }

    static void call(void** arguments) { unpack(arguments, std::index_sequence_for<T...>()); }

    static constexpr Kernel described(const char* name, int most_threads) {
        return {name, most_threads, sizeof...(T), parameters, call};
    }
};

}  // namespace cuda_on_cpu

#define threadIdx (cuda_on_cpu::place.thread)
#define blockIdx (cuda_on_cpu::place.block)
#define blockDim (cuda_on_cpu::place.threads)
#define gridDim (cuda_on_cpu::place.blocks)
constexpr int warpSize = cuda_on_cpu::LANES;

inline void __syncthreads(int line = __builtin_LINE()) { cuda_on_cpu::meet_block(line, false); }

inline int __syncthreads_count(int predicate, int line = __builtin_LINE()) {
    return cuda_on_cpu::meet_block(line, predicate != 0);
}

inline int __syncthreads_or(int predicate, int line = __builtin_LINE()) {
    return cuda_on_cpu::meet_block(line, predicate != 0) != 0;
}

inline int __syncthreads_and(int predicate, int line = __builtin_LINE()) {
    return cuda_on_cpu::meet_block(line, predicate == 0) == 0;
}

inline void __syncwarp(unsigned mask = 0xffffffffu, int line = __builtin_LINE()) {
    cuda_on_cpu::meet_lanes(cuda_on_cpu::WARP_BARRIER, line, mask, 0, 0);
}

inline unsigned __ballot_sync(unsigned mask, int predicate, int line = __builtin_LINE()) {
    auto votes = cuda_on_cpu::meet_lanes(cuda_on_cpu::BALLOT, line, mask, predicate != 0, 0);
    return static_cast<unsigned>(votes);
}

inline int __any_sync(unsigned mask, int predicate, int line = __builtin_LINE()) {
    return __ballot_sync(mask, predicate, line) != 0;
}

inline int __all_sync(unsigned mask, int predicate, int line = __builtin_LINE()) {
    return __ballot_sync(mask, predicate == 0, line) == 0;
}

// The four shuffles: a lane outside of its segment of `width` lanes is the caller itself (PTX ISA, shfl.sync).
template <typename T>
T __shfl_sync(unsigned mask, T value, int source, int width = warpSize, int line = __builtin_LINE()) {
    unsigned first = cuda_on_cpu::place.lane & ~(width - 1u);
    return cuda_on_cpu::shuffle(line, mask, value, first | (source & (width - 1u)));
}

template <typename T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = warpSize, int line = __builtin_LINE()) {
    unsigned lane = cuda_on_cpu::place.lane, inside = lane & (width - 1u);
    return cuda_on_cpu::shuffle(line, mask, value, delta <= inside ? lane - delta : lane);
}

template <typename T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = warpSize, int line = __builtin_LINE()) {
    unsigned lane = cuda_on_cpu::place.lane, inside = lane & (width - 1u);
    return cuda_on_cpu::shuffle(line, mask, value, inside + delta < static_cast<unsigned>(width) ? lane + delta : lane);
}

template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int other, int width = warpSize, int line = __builtin_LINE()) {
    unsigned lane = cuda_on_cpu::place.lane, last = lane | (width - 1u), source = lane ^ other;
    return cuda_on_cpu::shuffle(line, mask, value, source <= last ? source : lane);
}

// One thread runs at a time: what it does between two barriers is atomic, and seen by all.
inline void __threadfence() {}
inline void __threadfence_block() {}

template <typename T>
T atomicAdd(T* address, std::common_type_t<T> value) {
    T before = *address;
    *address = before + value;
    return before;
}

template <typename T>
T atomicMax(T* address, std::common_type_t<T> value) {
    T before = *address;
    if (value > before) *address = value;
    return before;
}

template <typename T>
T atomicMin(T* address, std::common_type_t<T> value) {
    T before = *address;
    if (value < before) *address = value;
    return before;
}

template <typename T>
T atomicExch(T* address, std::common_type_t<T> value) {
    T before = *address;
    *address = value;
    return before;
}

template <typename T>
T atomicCAS(T* address, std::common_type_t<T> expected, std::common_type_t<T> value) {
    T before = *address;
    if (before == expected) *address = value;
    return before;
}

template <typename T>
T __ldg(const T* address) {
    return *address;
}

inline unsigned __umulhi(unsigned a, unsigned b) { return static_cast<unsigned>((1ull * a * b) >> 32); }
inline int __popc(unsigned bits) { return __builtin_popcount(bits); }
inline int __ffs(int bits) { return __builtin_ffs(bits); }
inline int __clz(int bits) { return bits ? __builtin_clz(static_cast<unsigned>(bits)) : 32; }

namespace cuda_on_cpu {

template <typename To, typename From>
To same_bits(From from) {
    static_assert(sizeof(To) == sizeof(From));
    To to;
    std::memcpy(&to, &from, sizeof to);
    return to;
}

}  // namespace cuda_on_cpu

inline int __float_as_int(float value) { return cuda_on_cpu::same_bits<int>(value); }
inline unsigned __float_as_uint(float value) { return cuda_on_cpu::same_bits<unsigned>(value); }
inline float __int_as_float(int bits) { return cuda_on_cpu::same_bits<float>(bits); }
inline float __uint_as_float(unsigned bits) { return cuda_on_cpu::same_bits<float>(bits); }

// The conversions of PTX, cvt.f32.f16 and cvt.rn.f16.f32 (to the nearest, ties to even), for the kernels of the backend.
inline float half_to_float(unsigned short bits) {
    unsigned sign = (bits & 0x8000u) << 16;
    unsigned exponent = (bits >> 10) & 31u;
    unsigned fraction = bits & 0x3ffu;
    if (exponent == 31u) return __uint_as_float(sign | 0x7f800000u | fraction << 13);
    // A float holds a subnormal number: its fraction times 2**-24.
    if (exponent == 0u) return std::copysign(fraction * 0x1p-24f, sign ? -1.0f : 1.0f);
    return __uint_as_float(sign | (exponent + 112u) << 23 | fraction << 13);
}

inline unsigned short float_to_half(float value) {
    unsigned bits = __float_as_uint(value);
    unsigned sign = (bits >> 16) & 0x8000u;
    unsigned size = bits & 0x7fffffffu;
    if (size > 0x7f800000u) {
        size = 0x7fffu;
    } else if (size >= 0x477ff000u) {
        size = 0x7c00u;
    } else if (size < 0x38800000u) {
        // Near one half, floats are 2**-24 apart: the addition rounds to that.
        size = __float_as_uint(__uint_as_float(size) + 0.5f) - 0x3f000000u;
    } else {
        size = (size + 0xfffu + ((size >> 13) & 1u) - 0x38000000u) >> 13;
    }
    return static_cast<unsigned short>(sign | size);
}

using std::isfinite;
using std::isinf;
using std::isnan;
using std::max;
using std::min;

inline float rsqrtf(float value) { return 1.0f / std::sqrt(value); }
