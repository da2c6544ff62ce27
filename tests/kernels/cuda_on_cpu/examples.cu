// Small kernels with everything that the backend's are made of, for the tests of what runs and compiles them.

constexpr int THREADS = 128;
constexpr int WARPS = THREADS / 32;
constexpr unsigned ALL = 0xffffffffu;

template <typename T>
__device__ __forceinline__ T warp_sum(T value) {
    for (int mask = 16; mask > 0; mask /= 2) value += __shfl_xor_sync(ALL, value, mask);
    return value;
}

template <typename T>
__device__ __forceinline__ T block_sum(T value) {
    __shared__ T parts[WARPS];
    value = warp_sum(value);
    // the last call's parts have been read
    __syncthreads();
    if (threadIdx.x % 32 == 0) parts[threadIdx.x / 32] = value;
    // all parts are there
    __syncthreads();
    T total = 0;
    for (int i = 0; i < WARPS; i++) total += parts[i];
    return total;
}

// sums[i] = sum and sum of squares of row i of x (rows, columns); the whole sum in total, by the last block.
extern "C" __global__ void __launch_bounds__(THREADS) row_sums(
    const float* __restrict__ x, double* __restrict__ sums, double* total, unsigned* ticket, int columns) {
    __shared__ bool is_last;
    double sum = 0.0, squares = 0.0;
    x += static_cast<long long>(blockIdx.x) * columns;
    for (int i = threadIdx.x; i < columns; i += THREADS) {
        double value = x[i];
        sum += value;
        squares += value * value;
    }
    sum = block_sum(sum);
    squares = block_sum(squares);
    if (threadIdx.x == 0) {
        sums[2 * blockIdx.x] = sum;
        sums[2 * blockIdx.x + 1] = squares;
        __threadfence();
        is_last = atomicAdd(ticket, 1u) == gridDim.x - 1;
    }
    __syncthreads();
    if (!is_last) return;
    double all = 0.0;
    for (int i = threadIdx.x; i < static_cast<int>(gridDim.x); i += THREADS) all += sums[2 * i];
    all = block_sum(all);
    if (threadIdx.x == 0) *total = all;
}

// y = softmax of each row of x.
extern "C" __global__ void __launch_bounds__(THREADS, 2) softmax(const float* x, float* y, int columns) {
    __shared__ float largest[WARPS];
    x += static_cast<long long>(blockIdx.x) * columns;
    y += static_cast<long long>(blockIdx.x) * columns;
    float most = x[0];
    for (int i = threadIdx.x; i < columns; i += THREADS) most = fmaxf(most, x[i]);
    for (int mask = 16; mask > 0; mask /= 2) most = fmaxf(most, __shfl_xor_sync(ALL, most, mask));
    if (threadIdx.x % 32 == 0) largest[threadIdx.x / 32] = most;
    __syncthreads();
    for (int i = 0; i < WARPS; i++) most = fmaxf(most, largest[i]);
    float sum = 0.0f;
    for (int i = threadIdx.x; i < columns; i += THREADS) sum += y[i] = expf(x[i] - most);
    sum = block_sum(sum);
    for (int i = threadIdx.x; i < columns; i += THREADS) y[i] /= sum;
}

struct Mask {
    unsigned char* kept;
    long long count;
    unsigned key0, key1;
    unsigned threshold;
};

// kept[i]: whether word i % 4 of Philox 4x32-10 of the counter (i / 4, 0, 0, 0) is at least the threshold.
extern "C" __global__ void keep(const Mask call) {
    unsigned at = blockIdx.x * blockDim.x + threadIdx.x;
    unsigned c[4] = {at, 0, 0, 0};
    unsigned k0 = call.key0, k1 = call.key1;
    for (int round = 0; round < 10; round++, k0 += 0x9E3779B9u, k1 += 0xBB67AE85u) {
        unsigned high0 = __umulhi(0xD2511F53u, c[0]), low0 = 0xD2511F53u * c[0];
        unsigned high1 = __umulhi(0xCD9E8D57u, c[2]), low1 = 0xCD9E8D57u * c[2];
        c[0] = high1 ^ c[1] ^ k0;
        c[1] = low1;
        c[2] = high0 ^ c[3] ^ k1;
        c[3] = low0;
    }
    for (int i = 0; i < 4; i++) {
        long long element = 4ll * at + i;
        if (element < call.count) call.kept[element] = c[i] >= call.threshold;
    }
}
