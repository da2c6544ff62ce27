// The clock: who advances counters and learning rate, and the formulas of the schedules (reference.learning_rate).
//
// One thread does it, of the last block of a step, when nobody reads them any more.

#include "common.cuh"
#include "counters.cuh"

enum Schedule { CONSTANT, STEP, EXPONENTIAL, COSINE, ONE_CYCLE };

// An optimizer's rule.
struct Rule {
    long long schedule;
    double base;
    long long steps;
    double gamma;
    double final;
    double peak_fraction;
    long long warmup;
    long long adam;
    double momentum;
    long long nesterov;
    double beta1;
    double beta2;
    double eps;
    long long decoupled;
    long long inside;  // scikit-learn's convention
    double clip_norm;  // infinite: no clipping
    long long accumulate;
    long long scaled;  // the gradients carry the loss scale
    double growth_interval;
};

// Half a cosine wave from `start` (done = 0) to `end` (done = 1): cos(pi done) is the sine of pi (1/2 - done), a Taylor
// polynomial that is exact to float64 between -pi/2 and pi/2. (The library's cos needs local memory for large angles.)
__device__ inline double half_cosine(double start, double end, double done) {
    if (!(done < 1.0)) return end;
    double r = 3.141592653589793 * (0.5 - done);
    double p = 1.0;
    for (int n = 21; n > 1; n -= 2) p = 1.0 - r * r / static_cast<double>(n * (n - 1)) * p;
    return end + (start - end) * (1.0 + r * p) / 2.0;
}

// The learning rate after `count` updates.
__device__ inline double scheduled_rate(const Rule* rule, long long count) {
    double base = rule->base;
    double warm = count < rule->warmup ? static_cast<double>(count + 1) / static_cast<double>(rule->warmup) : 1.0;
    long long t = count < rule->warmup ? 0 : count - rule->warmup;
    double done = static_cast<double>(t);
    double steps = static_cast<double>(rule->steps);
    double rate = base;
    switch (rule->schedule) {
    case STEP:
        rate = base * pow(rule->gamma, static_cast<double>(t / rule->steps));
        break;
    case EXPONENTIAL:
        rate = base * pow(rule->gamma, done);
        break;
    case COSINE:
        rate = half_cosine(base, rule->final, done / steps);
        break;
    case ONE_CYCLE: {
        double last = steps - 1.0;
        double peak = rule->peak_fraction * steps - 1.0;
        if (done <= peak && peak > 0.0) {
            rate = half_cosine(base / 25.0, base, done / peak);
        } else {
            rate = half_cosine(base, rule->final, done < last ? (done - peak) / (last - peak) : 1.0);
        }
        break;
    }
    default:
        break;
    }
    return warm * rate;
}

// The rows of the next batch: after the last of an epoch come the first again.
__device__ inline void next_rows(long long* counters) {
    long long step = counters[ROW_STEP];
    long long total = counters[ROW_TOTAL];
    long long offset = counters[ROW_OFFSET] + step;
    if (offset >= total) offset = 0;
    counters[ROW_OFFSET] = offset;
    counters[ROW_COUNT] = step < total - offset ? step : total - offset;
}

// One batch is over. `applied`: with an update; `skipped`: its gradients had overflowed. By one thread.
__device__ inline void advance_clock(
    long long* counters, double* hyper, const Rule* rule, bool applied, bool skipped) {
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
    hyper[LEARNING_RATE] = scheduled_rate(rule, count) * hyper[RATE_SCALE];
    if (rule->adam) {
        double t = static_cast<double>(count + 1);
        hyper[BIAS_CORRECTION_1] = 1.0 - pow(rule->beta1, t);
        hyper[BIAS_CORRECTION_2] = 1.0 - pow(rule->beta2, t);
    }
}
