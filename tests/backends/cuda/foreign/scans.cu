// Scans, sorts, histograms and compaction: what threads tell one another. Not refq4's: for the emulator.

// inclusive sum of one block's numbers, two buffers in shared memory
extern "C" __global__ void scan_block(const int *x, int *y, int n) {
    __shared__ int room[2][256];
    int t = threadIdx.x, now = 0;
    room[0][t] = t < n ? x[t] : 0;
    __syncthreads();
    for (int by = 1; by < blockDim.x; by *= 2) {
        room[1 - now][t] = room[now][t] + (t >= by ? room[now][t - by] : 0);
        now = 1 - now;
        __syncthreads();
    }
    if (t < n) y[t] = room[now][t];
}

// inclusive sum of a long array in one pass: each block waits for the sum of those before it
extern "C" __global__ void scan_chained(const int *x, int *y, volatile int *sums, volatile int *ready, int n) {
    __shared__ int warps[4], before;
    int i = blockIdx.x * 128 + threadIdx.x, lane = threadIdx.x % 32, v = i < n ? x[i] : 0;
    for (int by = 1; by < 32; by *= 2) {
        int other = __shfl_up_sync(~0u, v, by);
        if (lane >= by) v += other;
    }
    if (lane == 31) warps[threadIdx.x / 32] = v;
    __syncthreads();
    for (int w = 0; w < threadIdx.x / 32; w++) v += warps[w];
    if (threadIdx.x == 127) {
        int sum = 0;
        if (blockIdx.x) {
            while (ready[blockIdx.x - 1] == 0) { }
            __threadfence();
            sum = sums[blockIdx.x - 1];
        }
        sums[blockIdx.x] = sum + v;
        __threadfence();
        ready[blockIdx.x] = 1;
        before = sum;
    }
    __syncthreads();
    if (i < n) y[i] = v + before;
}

extern "C" __global__ void histogram(const unsigned char *x, unsigned *bins, int n) {
    __shared__ unsigned room[256];
    room[threadIdx.x] = 0;
    __syncthreads();
    for (int i = blockIdx.x * 256 + threadIdx.x; i < n; i += gridDim.x * 256) atomicAdd(&room[x[i]], 1u);
    __syncthreads();
    if (room[threadIdx.x]) atomicAdd(&bins[threadIdx.x], room[threadIdx.x]);
}

// lanes with equal keys count together: one atomic per key and warp
extern "C" __global__ void histogram_match(const int *keys, int *bins, int n) {
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    unsigned there = __ballot_sync(~0u, i < n);
    if (i < n) {
        unsigned peers = __match_any_sync(there, keys[i]);
        if (threadIdx.x % 32 == __ffs(peers) - 1) atomicAdd(&bins[keys[i]], __popc(peers));
    }
}

// keeps what is above zero; out's order within a warp is that of x
extern "C" __global__ void compact(const float *x, float *out, int *count, int n) {
    int i = blockIdx.x * blockDim.x + threadIdx.x, lane = threadIdx.x % 32, base = 0;
    float v = i < n ? x[i] : 0;
    unsigned keep = __ballot_sync(~0u, v > 0);
    if (lane == 0) base = atomicAdd(count, __popc(keep));
    base = __shfl_sync(~0u, base, 0);
    if (v > 0) out[base + __popc(keep & ((1u << lane) - 1))] = v;
}

extern "C" __global__ void sort_bitonic(int *x) {
    extern __shared__ int keys[];
    int t = threadIdx.x;
    keys[t] = x[t];
    __syncthreads();
    for (int size = 2; size <= blockDim.x; size *= 2)
        for (int by = size / 2; by; by /= 2) {
            int other = t ^ by;
            if (other > t) {
                int a = keys[t], b = keys[other];
                if ((a > b) == ((t & size) == 0)) { keys[t] = b; keys[other] = a; }
            }
            __syncthreads();
        }
    x[t] = keys[t];
}

// each thread sorts 16 numbers of its own: an array in local memory
extern "C" __global__ void sort_local(const int *x, int *y) {
    int mine[16], i = blockIdx.x * blockDim.x + threadIdx.x;
    for (int k = 0; k < 16; k++) {
        int v = x[i * 16 + k], at = k;
        while (at && mine[at - 1] > v) { mine[at] = mine[at - 1]; at--; }
        mine[at] = v;
    }
    for (int k = 0; k < 16; k++) y[i * 16 + k] = mine[k];
}

// the minimum of positive floats by compare and swap; votes and a reduction in one instruction
extern "C" __global__ void minimum_cas(const float *x, float *best, int *votes, int n) {
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    float v = i < n ? x[i] : 3.4e38f;
    int *bits = (int *)best, old = atomicAdd(bits, 0);
    while (v < __int_as_float(old)) {
        int seen = atomicCAS(bits, old, __float_as_int(v));
        if (seen == old) break;
        old = seen;
    }
    int all = __all_sync(~0u, v > 0), any = __any_sync(~0u, v > 2);
    unsigned low = __reduce_min_sync(~0u, (unsigned)i), sum = __reduce_add_sync(~0u, 1u);
    if (threadIdx.x % 32 == 0) atomicOr(votes, all | any << 1 | (low % 32 == 0) << 2 | (sum == 32) << 3);
}
