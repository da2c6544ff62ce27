// The kernels of a step for several models at once.
//
// They have a file of their own, since who trains one model need not wait until they are compiled.

#include "models.cuh"
#include "layers.cuh"
#include "loss.cuh"
#include "gradients.cuh"
#include "update.cuh"

extern "C" __global__ void __launch_bounds__(THREADS) gather_rows(const Fleet fleet) {
    gather_of(call_of<Gather>(fleet));
}

extern "C" __global__ void __launch_bounds__(THREADS) forward(const Fleet fleet) {
    forward_of(call_of<Forward>(fleet));
}

extern "C" __global__ void __launch_bounds__(THREADS) backward(const Fleet fleet) {
    backward_of(call_of<Backward>(fleet));
}

// Two blocks on a multiprocessor: with the registers of more the assembler spills.
extern "C" __global__ void __launch_bounds__(THREADS, 2) loss_normaliser(const Fleet fleet) {
    normaliser_alone(call_of<Loss>(fleet));
}

extern "C" __global__ void __launch_bounds__(THREADS) product_loss(const Fleet fleet) {
    loss_of<WARP, float>(call_of<Loss>(fleet));
}

extern "C" __global__ void __launch_bounds__(THREADS, 2) product_loss_of_long_rows(const Fleet fleet) {
    loss_of<THREADS, float>(call_of<Loss>(fleet));
}

extern "C" __global__ void __launch_bounds__(THREADS, 2) column_sums(const Fleet fleet) {
    sums_of(call_of<Sums>(fleet));
}

struct Fold {
    const Tensor* tensors;  // weights: p, their gradients of this batch g, and what is accumulated s0; g may be s0
    long long count;
    const Rule* rule;
    const long long* counters;
    const double* shares;  // the sum of the weights of the rows
    double* stats;
    double* partials;
    unsigned* ticket;
    double strength;
};

// What a batch adds to the gradients of the weights: those of its loss, and of the penalty, strength / 2 times the
// squares of the weights over the sum of the row weights; and the penalty itself into stats.
extern "C" __global__ void __launch_bounds__(THREADS) fold_weights(const Fleet fleet) {
    const Fold& call = call_of<Fold>(fleet);
    const Tensor& tensor = call.tensors[tensor_of_block(call.tensors, call.count)];
    bool begins = call.counters[BATCH_INDEX] % call.rule->accumulate == 0;
    double shares = *call.shares;
    double each = shares == 0.0 ? 0.0 : call.strength / shares;
    float pull = static_cast<float>(each);
    long long begin = (blockIdx.x - tensor.first_block) * ELEMENTS + threadIdx.x;
    double squares = 0.0;
    for (int i = 0; i < ELEMENTS / THREADS; i++) {
        long long at = begin + i * THREADS;
        if (at >= tensor.rows * tensor.columns) break;
        float p = tensor.p[at];
        float g = tensor.g[at];
        // without a penalty a weight that is not finite adds nothing; and what lies between rows is zero whatever pulls
        if (pull != 0.0f && p != 0.0f) g += pull * p;
        tensor.s0[at] = begins ? g : g + tensor.s0[at];
        squares += static_cast<double>(p) * p;
    }
    if (call.strength == 0.0) return;
    squares = block_sum(squares);
    if (threadIdx.x == 0) call.partials[blockIdx.x] = squares;
    if (!is_last(call.ticket)) return;
    squares = sum_of(call.partials, gridDim.x, 1);
    if (threadIdx.x == 0 && each != 0.0) {
        long long rows = call.counters[ROW_COUNT];
        call.stats[PENALTIES] += 0.5 * each * squares * static_cast<double>(rows);
    }
}

extern "C" __global__ void __launch_bounds__(THREADS) gradient_norm(const Fleet fleet) {
    norm_of(call_of<Norm>(fleet));
}

extern "C" __global__ void __launch_bounds__(THREADS) update(const Fleet fleet) {
    update_of(call_of<Update>(fleet));
}
