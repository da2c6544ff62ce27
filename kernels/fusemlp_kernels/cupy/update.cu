// The kernels of the optimizer.

#include "update.cuh"

extern "C" __global__ void __launch_bounds__(THREADS) update(const Update call) {
    update_of(call);
}

extern "C" __global__ void __launch_bounds__(THREADS) gradient_norm(const Norm call) {
    norm_of(call);
}

struct Advance {
    double* hyper;
    const double* rates;
    long long* counters;
    const Rule* rule;
};

// The clock alone.
extern "C" __global__ void __launch_bounds__(THREADS) advance(const Advance call) {
    if (blockIdx.x != 0 || threadIdx.x != 0) return;
    bool due = (call.counters[BATCH_INDEX] + 1) % call.rule->accumulate == 0;
    advance_clock(call.counters, call.hyper, call.rates, call.rule, due, false);
}
