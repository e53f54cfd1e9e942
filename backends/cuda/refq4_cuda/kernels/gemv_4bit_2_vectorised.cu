/* GEMV, rung 2: 128-bit loads, one scale for 32 weights, and a table in shared memory. fp32 throughout.
 *
 * A warp has one row; each lane takes 16 bytes of it, 32 weights of one block (blocksize a power of two, 32 or more):
 *
 *     lane        0               1              ...    31              0
 *     k      [0 ...... 31]  [32 ...... 63]   ...  [992 .. 1023]  [1024 .. 1055]  ...      steps of 1024
 *     sum +=  (code * x summed over the 32) * scale
 *
 * The scale is applied to the finished partial sum, not to each weight. TOKENS rows of x share the decoded weights;
 * more of them go along gridDim.y.
 *
 * It serves what the tensor cores can't: fp32 activations exactly, and bf16 on Turing. For the other dtypes it is the
 * rung below them.
 *
 * What limits it: a look-up, its address and a multiply-add for each weight, and each token repeats the multiply-add
 * and the load of x; lanes that lie 32 elements apart use a quarter of each line of x they touch.
 */
#include "grouped.cuh"

#define WARPS 8
#define VECTOR 32 /* weights in 16 bytes */

KERNEL_RESIDENT(gemv_vectorised, WARPS * 32, 1)(Arguments arguments) {
    const ProductArguments &p = product_of(arguments);
    __shared__ float values[16 * 32]; /* one copy per bank: see dequantize.cu */
    for (int i = threadIdx.x; i < 16 * 32; i += WARPS * 32) values[i] = __ldg(p.weight.code + i / 32);
    __syncthreads();
    int lane = threadIdx.x % 32;
    i64 row = (i64)blockIdx.x * WARPS + threadIdx.x / 32, first_token = (i64)blockIdx.y * TOKENS;
    if (row >= p.N) return;
    const float *mine = values + lane;
    const u8 *packed = p.weight.packed + row * (p.K / 2);
    const T *x[TOKENS];
#pragma unroll
    for (int m = 0; m < TOKENS; m++) x[m] = (const T *)p.x + min(first_token + m, p.M - 1) * p.K;

    float sum[TOKENS] = {};
    for (i64 k = lane * VECTOR; k < p.K; k += 32 * VECTOR) {
        uint4 vector = load_once16(packed + k / 2);
        float scale = scale_of_shifted_block(p.weight.scales, row * p.K + k >> p.weight.scales.shift);
        u32 words[4] = {vector.x, vector.y, vector.z, vector.w};
        float part[TOKENS] = {};
#pragma unroll
        for (int i = 0; i < 4; i++) {
            float w[8];
#pragma unroll
            for (int j = 0; j < 8; j++) w[j] = mine[(words[i] >> (8 * (j / 2) + (j % 2 ? 0 : 4)) & 15u) * 32];
#pragma unroll
            for (int m = 0; m < TOKENS; m++) {
                float v[8];
                load8(x[m] + k + 8 * i, v);
#pragma unroll
                for (int j = 0; j < 8; j++) part[m] = fmaf(w[j], v[j], part[m]);
            }
        }
#pragma unroll
        for (int m = 0; m < TOKENS; m++) sum[m] = fmaf(part[m], scale, sum[m]);
    }
#pragma unroll
    for (int m = 0; m < TOKENS; m++) {
#pragma unroll
        for (int o = 16; o > 0; o /= 2) sum[m] += __shfl_xor_sync(0xFFFFFFFFu, sum[m], o);
        if (lane == 0) store_product(p, first_token + m, row, sum[m]);
    }
}
