// The clock: it advances the counters, and copies the next learning rate from the host's table.
//
// One thread of a step's last block advances it, after all blocks have read it.

#include "common.cuh"
#include "counters.cuh"
#include "pointwise.cuh"

// Moves to the rows of the next batch; after the last of an epoch, to the first.
__device__ inline void next_rows(long long* counters) {
    long long step = counters[ROW_STEP];
    long long total = counters[ROW_TOTAL];
    long long offset = counters[ROW_OFFSET] + step;
    if (offset >= total) offset = 0;
    counters[ROW_OFFSET] = offset;
    counters[ROW_COUNT] = step < total - offset ? step : total - offset;
}

// Ends a batch. `applied`: with an update; `skipped`: its gradients have overflowed. One thread calls it.
__device__ inline void advance_clock(
    long long* counters, double* hyper, const double* rates, const Rule* rule, bool applied, bool skipped) {
    counters[BATCH_INDEX] += 1;
    if (counters[ROW_STEP] != 0) next_rows(counters);
    if (skipped) {
        counters[SKIPPED] += 1;
        counters[SKIPPED_IN_A_ROW] += 1;
        hyper[LOSS_SCALE] *= 0.5;
        hyper[GOOD_UPDATES] = 0.0;
    }
    if (!applied) return;
    if (rule->scaled) {
        counters[SKIPPED_IN_A_ROW] = 0;
        double good = hyper[GOOD_UPDATES] + 1.0;
        bool grows = good >= rule->growth_interval;
        if (grows) hyper[LOSS_SCALE] *= 2.0;
        hyper[GOOD_UPDATES] = grows ? 0.0 : good;
    }
    long long count = counters[UPDATE_COUNT] + 1;
    counters[UPDATE_COUNT] = count;
    long long place = count - static_cast<long long>(rates[FIRST_UPDATE]);
    long long last = static_cast<long long>(rates[ROWS_FILLED]) - 1;
    if (place > last) place = last;
    if (place < 0) place = 0;
    const double* row = rates + (1 + place) * RATE_COLUMNS;
    hyper[LEARNING_RATE] = row[LEARNING_RATE] * hyper[RATE_SCALE];
    hyper[BIAS_CORRECTION_1] = row[BIAS_CORRECTION_1];
    hyper[BIAS_CORRECTION_2] = row[BIAS_CORRECTION_2];
    hyper[SHARE] = row[RATE_SHARE];
}
