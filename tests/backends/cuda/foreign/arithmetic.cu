// Instructions of many kinds: approximations, bits, halves, calls, switches, named barriers. Not refq4's.

extern "C" __global__ void functions(const float *x, float *y, int n) {
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= n) return;
    float v = x[i];
    y[i] = __sinf(v), y[n + i] = __cosf(v), y[2 * n + i] = tanhf(v), y[3 * n + i] = erff(v);
    y[4 * n + i] = __logf(fabsf(v) + 1), y[5 * n + i] = __fdividef(v, 3.f), y[6 * n + i] = sqrtf(fabsf(v));
    y[7 * n + i] = 0.5f * v * (1 + erff(v * 0.70710678f)), y[8 * n + i] = exp2f(v), y[9 * n + i] = powf(fabsf(v), 1.5f);
    y[10 * n + i] = rintf(v), y[11 * n + i] = floorf(v), y[12 * n + i] = __frcp_rn(v + 9), y[13 * n + i] = __saturatef(v);
    y[14 * n + i] = __fmaf_rz(v, v, 1e-9f), y[15 * n + i] = __fadd_ru(v, 1e-9f), y[16 * n + i] = (float)__float2int_rd(v);
    y[17 * n + i] = log1pf(fabsf(v)), y[18 * n + i] = copysignf(2.f, v), y[19 * n + i] = cbrtf(v);
}

extern "C" __global__ void bits(const unsigned *x, unsigned *y, int n) {
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= n) return;
    unsigned v = x[i], r;
    y[i] = __brev(v), y[n + i] = __popc(v), y[2 * n + i] = __clz(v), y[3 * n + i] = __ffs(v);
    y[4 * n + i] = __funnelshift_l(v, ~v, 7), y[5 * n + i] = __umulhi(v, 0x9e3779b9u), y[6 * n + i] = __byte_perm(v, ~v, 0x1346);
    asm("bfe.u32 %0, %1, 5, 11;" : "=r"(r) : "r"(v)); y[7 * n + i] = r;
    asm("bfe.s32 %0, %1, 5, 11;" : "=r"(r) : "r"(v)); y[8 * n + i] = r;
    asm("lop3.b32 %0, %1, %2, %3, 0x96;" : "=r"(r) : "r"(v), "r"(v >> 3), "r"(v << 5)); y[9 * n + i] = r;
    asm("bfind.u32 %0, %1;" : "=r"(r) : "r"(v)); y[10 * n + i] = r;
    y[11 * n + i] = __usad(v, 77u, 5u), y[12 * n + i] = v / 7 + v % 13, y[13 * n + i] = (unsigned)((int)v / 7);
    y[14 * n + i] = (unsigned)(((unsigned long long)v * v) >> 20), y[15 * n + i] = max((int)v, -5);
}

// y = a * b + c in pairs of halves (fp16 below n, bf16 above), and their maxima
extern "C" __global__ void halves(const unsigned *a, const unsigned *b, const unsigned *c, unsigned *y, int n) {
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= n) return;
    unsigned r;
    asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(r) : "r"(a[i]), "r"(b[i]), "r"(c[i])); y[i] = r;
    asm("max.f16x2 %0, %1, %2;" : "=r"(r) : "r"(a[i]), "r"(b[i])); y[n + i] = r;
    asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(r) : "r"(a[n + i]), "r"(b[n + i]), "r"(c[n + i])); y[2 * n + i] = r;
    asm("{ .reg .b16 l, h; mov.b32 {l, h}, %1; add.f16 l, l, h; mul.f16 h, l, l; mov.b32 %0, {l, h}; }" : "=r"(r) : "r"(a[i]));
    y[3 * n + i] = r;
}

__noinline__ __device__ float polynomial(float x, const float *coefficients, int degree) {
    float y = 0;
    for (int i = degree; i >= 0; i--) y = y * x + coefficients[i];
    return y;
}

// a device function that is called (twice, one inside a branch), and a switch with many cases
extern "C" __global__ void calls(const float *x, const float *coefficients, float *y, int n) {
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= n) return;
    float v = polynomial(x[i], coefficients, 3);
    if (v > 1) v = polynomial(1 / v, coefficients + 1, 2);
    switch (i % 9) {
        case 0: v += 1; break;
        case 1: v *= 2; break;
        case 2: v = -v; break;
        case 3: v = v * v; break;
        case 4: v = 1 / (1 + v * v); break;
        case 5: v -= 3; break;
        case 6: v = fabsf(v); break;
        case 7: v = 7; break;
        default: v = fmaxf(v, 0.5f);
    }
    y[i] = v;
}

// warp 0 fills, warp 1 uses: two named barriers of 64 threads, one side arrives, the other waits
extern "C" __global__ void producer(const int *x, int *y, int rounds) {
    __shared__ int room[32];
    int lane = threadIdx.x % 32;
    for (int i = 0; i < rounds; i++) {
        if (threadIdx.x < 32) {
            if (i) asm volatile("bar.sync 2, 64;" ::: "memory");
            room[lane] = x[i * 32 + lane] * 3;
            asm volatile("bar.arrive 1, 64;" ::: "memory");
        } else {
            asm volatile("bar.sync 1, 64;" ::: "memory");
            y[i * 32 + lane] = room[31 - lane] + 1;
            if (i + 1 < rounds) asm volatile("bar.arrive 2, 64;" ::: "memory");
        }
    }
}
