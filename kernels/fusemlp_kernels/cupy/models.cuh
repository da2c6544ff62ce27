// Launches for several models at once: the second dimension of the grid goes over those that take part, and each has a
// call of its own, the structure that a launch for it alone would have as its argument.

#include "common.cuh"

struct Fleet {
    const void* calls;  // a structure for each model
    const long long* live;  // the numbers of the models that take part
};

// The call of this block's model, in shared memory. All threads come here.
template <typename Call>
__device__ __forceinline__ const Call& call_of(const Fleet& fleet) {
    constexpr int WORDS = sizeof(Call) / sizeof(long long);
    __shared__ long long words[WORDS];
    const long long* from = static_cast<const long long*>(fleet.calls) + fleet.live[blockIdx.y] * WORDS;
    for (int i = threadIdx.x; i < WORDS; i += THREADS) words[i] = from[i];
    __syncthreads();
    return *reinterpret_cast<const Call*>(words);
}
