// The handlers of the compiler's checks (-fsanitize) replace its library: they end the launch, not the process.

#include <cstdint>

#include "cuda_on_cpu.h"

using cuda_on_cpu::fault;

namespace {

// The common head of every check's data.
struct Check {
    const char* file;
    std::uint32_t line, column;

    int at() const { return static_cast<int>(line); }
};

}  // namespace

extern "C" {

void __ubsan_handle_type_mismatch_v1_abort(Check* check, std::uintptr_t address) {
    fault(check->at(), "an access to the misaligned address %#zx", address);
}

void __ubsan_handle_out_of_bounds_abort(Check* check, std::uintptr_t index) {
    fault(check->at(), "index %zd is outside of its array", index);
}

void __ubsan_handle_shift_out_of_bounds_abort(Check* check, std::uintptr_t, std::uintptr_t) {
    fault(check->at(), "a shift by a negative number of bits, or by all of them");
}

void __ubsan_handle_divrem_overflow_abort(Check* check, std::uintptr_t, std::uintptr_t) {
    fault(check->at(), "an integer division by zero");
}
}
