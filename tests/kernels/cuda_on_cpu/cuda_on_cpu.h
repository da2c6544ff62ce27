// CUDA C as C++17 for a CPU: included before a .cu file, it defines CUDA's keywords and functions. Test code.
//
// The blocks of a launch run one after another, the threads of a block as fibers (fibers.cpp). A thread runs until it
// waits, so barriers and shuffles are real, and the order of threads between them is random. It cannot show races that
// no order of the threads reveals, missing fences (there is one memory), blocks that wait for one another, and speed.

#pragma once

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
// A separate section, filled with NaN when a block starts.
#define __shared__ static __attribute__((section("cuda_shared")))

struct uint3 {
    unsigned x, y, z;
};

struct dim3 {
    unsigned x, y, z;
};

namespace cuda_on_cpu {

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

// Waits for the whole block.
void meet_block(int line);

// Waits for the lanes of `mask`; returns the value of lane `source`.
unsigned long long meet_lanes(int line, unsigned mask, unsigned long long value, unsigned source);

template <typename T>
T shuffle(int line, unsigned mask, T value, unsigned source) {
    static_assert(std::is_arithmetic_v<T> && sizeof(T) >= 4, "a shuffle takes numbers of 4 or 8 bytes");
    unsigned long long bits = 0;
    std::memcpy(&bits, &value, sizeof(T));
    bits = meet_lanes(line, mask, bits, source);
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

inline void __syncthreads(int line = __builtin_LINE()) { cuda_on_cpu::meet_block(line); }

template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int other, int line = __builtin_LINE()) {
    return cuda_on_cpu::shuffle(line, mask, value, cuda_on_cpu::place.lane ^ other);
}

// One thread runs at a time: what it does between two barriers is atomic, and seen by all.
inline void __threadfence() {}

template <typename T>
T atomicAdd(T* address, std::common_type_t<T> value) {
    T before = *address;
    *address = before + value;
    return before;
}

inline unsigned __umulhi(unsigned a, unsigned b) { return static_cast<unsigned>((1ull * a * b) >> 32); }
namespace cuda_on_cpu {

template <typename To, typename From>
To same_bits(From from) {
    static_assert(sizeof(To) == sizeof(From));
    To to;
    std::memcpy(&to, &from, sizeof to);
    return to;
}

}  // namespace cuda_on_cpu

inline unsigned __float_as_uint(float value) { return cuda_on_cpu::same_bits<unsigned>(value); }
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

using std::isnan;
