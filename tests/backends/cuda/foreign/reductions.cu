// Sums, maxima and norms: shuffles, trees in shared memory, atomics in global memory. Not refq4's: for the emulator.

__inline__ __device__ float warp_sum(float v) {
    for (int by = 16; by; by >>= 1) v += __shfl_down_sync(0xffffffffu, v, by);
    return v;
}

// y[0] += sum of x; grid-stride, one atomic per block
extern "C" __global__ void sum_shuffle(const float *x, float *y, int n) {
    __shared__ float part[32];
    float v = 0;
    for (int i = blockIdx.x * blockDim.x + threadIdx.x; i < n; i += gridDim.x * blockDim.x) v += x[i];
    v = warp_sum(v);
    if (threadIdx.x % 32 == 0) part[threadIdx.x / 32] = v;
    __syncthreads();
    if (threadIdx.x < 32) {
        v = threadIdx.x < blockDim.x / 32 ? part[threadIdx.x] : 0.f;
        v = warp_sum(v);
        if (threadIdx.x == 0) atomicAdd(y, v);
    }
}

// y[block] = max of the block's part of x; a tree in shared memory
extern "C" __global__ void max_tree(const float *x, float *y, int n) {
    extern __shared__ float room[];
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    room[threadIdx.x] = i < n ? x[i] : -3.4e38f;
    __syncthreads();
    for (int half = blockDim.x / 2; half; half >>= 1) {
        if (threadIdx.x < half) room[threadIdx.x] = fmaxf(room[threadIdx.x], room[threadIdx.x + half]);
        __syncthreads();
    }
    if (threadIdx.x == 0) y[blockIdx.x] = room[0];
}

// one row per block: y = exp(x - max) / sum
extern "C" __global__ void softmax(const float *x, float *y, int columns) {
    __shared__ float room[128];
    const float *row = x + blockIdx.x * columns;
    float top = -3.4e38f, sum = 0;
    for (int i = threadIdx.x; i < columns; i += 128) top = fmaxf(top, row[i]);
    room[threadIdx.x] = top;
    __syncthreads();
    for (int half = 64; half; half >>= 1) {
        if (threadIdx.x < half) room[threadIdx.x] = fmaxf(room[threadIdx.x], room[threadIdx.x + half]);
        __syncthreads();
    }
    top = room[0];
    __syncthreads();
    for (int i = threadIdx.x; i < columns; i += 128) sum += __expf(row[i] - top);
    room[threadIdx.x] = sum;
    __syncthreads();
    for (int half = 64; half; half >>= 1) {
        if (threadIdx.x < half) room[threadIdx.x] += room[threadIdx.x + half];
        __syncthreads();
    }
    for (int i = threadIdx.x; i < columns; i += 128) y[blockIdx.x * columns + i] = expf(row[i] - top) / room[0];
}

// one row per warp, four numbers per load: y = (x - mean) * rsqrt(var + eps) * w + b
extern "C" __global__ void layer_norm(const float4 *x, const float4 *w, const float4 *b, float4 *y, int vectors, float eps) {
    int lane = threadIdx.x % 32, row = blockIdx.x * (blockDim.x / 32) + threadIdx.x / 32;
    float sum = 0, squares = 0;
    for (int i = lane; i < vectors; i += 32) {
        float4 v = x[row * vectors + i];
        sum += v.x + v.y + v.z + v.w;
        squares += v.x * v.x + v.y * v.y + v.z * v.z + v.w * v.w;
    }
    for (int by = 16; by; by >>= 1) {
        sum += __shfl_xor_sync(~0u, sum, by);
        squares += __shfl_xor_sync(~0u, squares, by);
    }
    float mean = sum / (4 * vectors), scale = rsqrtf(squares / (4 * vectors) - mean * mean + eps);
    for (int i = lane; i < vectors; i += 32) {
        float4 v = x[row * vectors + i], g = w[i], o = b[i];
        y[row * vectors + i] = make_float4((v.x - mean) * scale * g.x + o.x, (v.y - mean) * scale * g.y + o.y,
                                           (v.z - mean) * scale * g.z + o.z, (v.w - mean) * scale * g.w + o.w);
    }
}

// y[0] += a . b in fp64; y[1] = sqrt and a division of it
extern "C" __global__ void dot_double(const double *a, const double *b, double *y, int n) {
    double v = 0;
    for (int i = threadIdx.x; i < n; i += blockDim.x) v = fma(a[i], b[i], v);
    for (int by = 16; by; by >>= 1) v += __shfl_down_sync(~0u, v, by);
    if (threadIdx.x % 32 == 0) atomicAdd(y, v);
    __syncthreads();
    if (threadIdx.x == 0) y[1] = sqrt(fabs(atomicAdd(y, 0.0))) / 3.0;
}

// best[0] = (value's order-preserving bits << 32 | index) of the largest x
extern "C" __global__ void argmax(const float *x, unsigned long long *best, int n) {
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= n) return;
    unsigned bits = __float_as_uint(x[i]);
    bits = bits >> 31 ? ~bits : bits | 0x80000000u;
    atomicMax(best, (unsigned long long)bits << 32 | (unsigned)i);
}
