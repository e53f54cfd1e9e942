/* Dequantising: value = code[i] * scale of its block in fp32, rounded once to the result's dtype.
 *
 * Not here: products. This is what a product above the cross-over starts with, and what bit-exactness is judged by.
 *
 *     T_FP32, T_BF16, T_FP16    the result's dtype
 *     EIGHT_BIT                 one code a byte and 256 values (absmax statistics, optimiser states) instead of two and 16
 *
 * Aligned, a thread turns eight codes at a time into eight values: 4 bytes in (8 with EIGHT_BIT), 16 bytes out (32 for
 * fp32), all of one block, so one scale. Otherwise it goes element by element, and any size and alignment will do.
 *
 * The sixteen values stand in shared memory once per bank, so that 32 lanes looking up 32 codes never wait for each other:
 *
 *     bank        0        1              31
 *     code 0   [ v0 ]   [ v0 ]   ...   [ v0 ]      lane l reads word 32 * code + l
 *     code 1   [ v1 ]   [ v1 ]   ...   [ v1 ]
 *
 * 256 values would take 32 KB and are looked up rarely: one copy.
 */
#include "device.cuh"

#define THREADS 256
#define GROUP 8

#ifdef EIGHT_BIT
#define VALUES 256
#define COPIES 1
#else
#define VALUES 16
#define COPIES 32
#endif

DEVICE u32 code_at(const u8 *codes, i64 element) {
#ifdef EIGHT_BIT
    return __ldg(codes + element);
#else
    return nibble(codes, element);
#endif
}

/* The codes of elements 8i to 8i + 7, in order. */
DEVICE void load_codes(const u8 *codes, i64 i, u32 (&c)[GROUP]) {
#ifdef EIGHT_BIT
    uint2 two = __ldg((const uint2 *)codes + i);
#pragma unroll
    for (int k = 0; k < GROUP; k++) c[k] = (k < 4 ? two.x : two.y) >> 8 * (k % 4) & 255u;
#else
    u32 word = __ldg((const u32 *)codes + i);
#pragma unroll
    for (int k = 0; k < GROUP; k++) c[k] = word >> (8 * (k / 2) + (k % 2 ? 0 : 4)) & 15u;
#endif
}

KERNEL(dequantize, THREADS)(DequantizeArguments p) {
    __shared__ float values[VALUES * COPIES];
    for (int i = threadIdx.x; i < VALUES * COPIES; i += THREADS) values[i] = __ldg(p.weight.code + i / COPIES);
    __syncthreads();
    const float *mine = values + threadIdx.x % COPIES;
    const Scales &scales = p.weight.scales;
    T *out = (T *)p.out;
    i64 first = (i64)blockIdx.x * THREADS + threadIdx.x, step = (i64)gridDim.x * THREADS, done = 0;

    if (p.aligned) {
        i64 groups = p.numel / GROUP;
#pragma unroll 2
        for (i64 i = first; i < groups; i += step) {
            u32 c[GROUP];
            float v[GROUP];
            load_codes(p.weight.packed, i, c);
            float scale = scale_of_shifted_block(scales, i * GROUP >> scales.shift);
#pragma unroll
            for (int k = 0; k < GROUP; k++) v[k] = __fmul_rn(mine[c[k] * COPIES], scale);
            store8(out + i * GROUP, v);
        }
        done = groups * GROUP;
    }
    for (i64 i = done + first; i < p.numel; i += step) {
        float scale = scale_of_block(scales, divide(i, scales.blocksize, scales.shift));
        out[i] = from_fp32(__fmul_rn(mine[code_at(p.weight.packed, i) * COPIES], scale));
    }
}
