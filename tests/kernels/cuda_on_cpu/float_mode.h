// Flush subnormal operands and results to zero: NVRTC's -ftz=true. Here for double too.

#pragma once

#ifdef __SSE__
#include <xmmintrin.h>
#endif

namespace cuda_on_cpu {

#ifdef __SSE__
inline unsigned long long float_mode() { return _mm_getcsr(); }
inline void set_float_mode(unsigned long long mode) { _mm_setcsr(static_cast<unsigned>(mode)); }
constexpr unsigned long long FLUSHES = 0x8040;
#elif defined(__aarch64__)
inline unsigned long long float_mode() {
    unsigned long long mode;
    asm volatile("mrs %0, fpcr" : "=r"(mode));
    return mode;
}
inline void set_float_mode(unsigned long long mode) { asm volatile("msr fpcr, %0" : : "r"(mode)); }
constexpr unsigned long long FLUSHES = 1ull << 24;
#else
#error "how this processor flushes subnormal numbers to zero is not known here"
#endif

}  // namespace cuda_on_cpu
