// Tiles: transposes, products with and without tensor cores, a convolution. Not refq4's: for the emulator.

extern "C" __global__ void transpose(const float *x, float *y, int rows, int columns) {
    __shared__ float tile[32][33];
    int c = blockIdx.x * 32 + threadIdx.x, r = blockIdx.y * 32 + threadIdx.y;
    for (int k = 0; k < 32; k += 8)
        if (r + k < rows && c < columns) tile[threadIdx.y + k][threadIdx.x] = x[(r + k) * columns + c];
    __syncthreads();
    c = blockIdx.y * 32 + threadIdx.x;
    r = blockIdx.x * 32 + threadIdx.y;
    for (int k = 0; k < 32; k += 8)
        if (r + k < columns && c < rows) y[(r + k) * rows + c] = tile[threadIdx.x][threadIdx.y + k];
}

// C [m, n] = A [m, k] B [k, n] in fp32, tiles of 16
extern "C" __global__ void matmul_tiled(const float *A, const float *B, float *C, int m, int n, int k) {
    __shared__ float a[16][16], b[16][16];
    int x = threadIdx.x, y = threadIdx.y, row = blockIdx.y * 16 + y, column = blockIdx.x * 16 + x;
    float sum = 0;
    for (int at = 0; at < k; at += 16) {
        a[y][x] = row < m && at + x < k ? A[row * k + at + x] : 0;
        b[y][x] = column < n && at + y < k ? B[(at + y) * n + column] : 0;
        __syncthreads();
        for (int i = 0; i < 16; i++) sum += a[y][i] * b[i][x];
        __syncthreads();
    }
    if (row < m && column < n) C[row * n + column] = sum;
}

#define SHARED(p) ((unsigned)__cvta_generic_to_shared(p))

// C [16, 8] = A [16, k] B [k, 8] in bf16, sums in fp32: one warp, two stages of cp.async, ldmatrix with and without .trans
extern "C" __global__ void matmul_tensor(const unsigned short *A, const unsigned short *B, float *C, int k) {
    __shared__ __align__(16) unsigned short a[2][16 * 16], b[2][16 * 8];
    int lane = threadIdx.x;
    float c[4] = {0, 0, 0, 0};
    auto copy = [&](int stage, int at) {
        asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(SHARED(&a[stage][lane * 8])), "l"(A + (lane / 2) * k + at + lane % 2 * 8));
        if (lane < 16) asm volatile("cp.async.ca.shared.global [%0], [%1], 16;" ::"r"(SHARED(&b[stage][lane * 8])), "l"(B + (at + lane) * 8));
        asm volatile("cp.async.commit_group;");
    };
    copy(0, 0);
    for (int at = 0, stage = 0; at < k; at += 16, stage ^= 1) {
        if (at + 16 < k) {
            copy(stage ^ 1, at + 16);
            asm volatile("cp.async.wait_group 1;");
        } else asm volatile("cp.async.wait_group 0;");
        __syncwarp();
        unsigned f[4], g[2];
        asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];" : "=r"(f[0]), "=r"(f[1]), "=r"(f[2]), "=r"(f[3])
                     : "r"(SHARED(&a[stage][lane % 16 * 16 + lane / 16 * 8])));
        asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0, %1}, [%2];" : "=r"(g[0]), "=r"(g[1]) : "r"(SHARED(&b[stage][lane % 16 * 8])));
        asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
                     : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3]) : "r"(f[0]), "r"(f[1]), "r"(f[2]), "r"(f[3]), "r"(g[0]), "r"(g[1]));
        __syncwarp();
    }
    int row = lane / 4, column = lane % 4 * 2;
    C[row * 8 + column] = c[0], C[row * 8 + column + 1] = c[1];
    C[(row + 8) * 8 + column] = c[2], C[(row + 8) * 8 + column + 1] = c[3];
}

// C [16, 8] = A [16, 32] B [32, 8] in int8 (B stored by columns): tensor cores, and dp4a beside them
extern "C" __global__ void matmul_int8(const int *A, const int *B, int *C, int *D) {
    int lane = threadIdx.x, g = lane / 4, t = lane % 4, c[4] = {0, 0, 0, 0};
    int a0 = A[g * 8 + t], a1 = A[(g + 8) * 8 + t], a2 = A[g * 8 + t + 4], a3 = A[(g + 8) * 8 + t + 4];
    int b0 = B[g * 8 + t], b1 = B[g * 8 + t + 4];
    asm volatile("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
                 : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3]) : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
    for (int i = 0; i < 4; i++) {
        int row = g + i / 2 * 8, column = 2 * t + i % 2, sum = 0;
        for (int k = 0; k < 8; k++) sum = __dp4a(A[row * 8 + k], B[column * 8 + k], sum);
        C[row * 8 + column] = c[i], D[row * 8 + column] = sum;
    }
}

__constant__ float taps[5] = {0.0625f, 0.25f, 0.375f, 0.25f, 0.0625f};
__device__ unsigned outside = 7;

// y = x convolved with the taps; outside, beyond its initial 7, counts the positions that fell off the ends
extern "C" __global__ void convolve(const float *x, float *y, unsigned *fell, int n) {
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    float sum = 0;
    for (int k = 0; k < 5; k++) {
        int at = i + k - 2;
        if (at < 0 || at >= n) atomicAdd(&outside, 1u);
        else sum += taps[k] * x[at];
    }
    if (i < n) y[i] = sum;
    __syncthreads();
    if (threadIdx.x == 0) fell[0] = atomicAdd(&outside, 0u);
}
