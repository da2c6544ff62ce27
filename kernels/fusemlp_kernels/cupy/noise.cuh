// Gaussian noise for private training; philox.py defines it (Box and Muller, 1958).

#include "common.cuh"
#include "counters.cuh"
#include "philox.cuh"

// The numbers of a tensor's noise that have one second word.
constexpr long long NORMALS = 128;

// The number of one element of a tensor, in one update.
__device__ inline double normal(long long element, long long tensor, long long update, long long key0, long long key1) {
    Words words = philox(
        static_cast<unsigned>(element % NORMALS / 4), static_cast<unsigned>(element / NORMALS),
        0xfffffffeu - static_cast<unsigned>(tensor), static_cast<unsigned>(update), static_cast<unsigned>(key0),
        static_cast<unsigned>(key1));
    bool second = element % 4 >= 2;
    bool odd = element % 2 != 0;
    unsigned angle = second ? words.word[3] : words.word[1];
    double length = sqrt(-2.0 * log(((second ? words.word[2] : words.word[0]) + 0.5) * 0x1p-32));
    double sine, cosine;
    sincospi((angle + 0.5) * 0x1p-33, &sine, &cosine);
    double z = length * (odd ? sine : cosine);
    return (odd ? angle & 2u : angle & 1u) != 0 ? -z : z;
}

// Takes the rows of -1 out of the count of the next batch, when the clock has advanced. All threads come here.
__device__ inline void leave_out_padding(long long* counters, const long long* rows) {
    __syncthreads();
    rows += counters[ROW_OFFSET];
    long long count = counters[ROW_COUNT];
    int valid = 0;
    for (long long at = threadIdx.x; at < count; at += THREADS) valid += rows[at] >= 0;
    valid = block_sum(valid);
    if (threadIdx.x == 0) counters[ROW_COUNT] = valid;
}
