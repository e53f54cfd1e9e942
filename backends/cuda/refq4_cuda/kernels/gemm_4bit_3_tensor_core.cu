/* GEMM, rung 3: tensor cores, plain loads. Weights are decoded once for 8 tokens or more, by one look-up for two.
 *
 * mma.sync multiplies a 16 x 16 by a 16 x 8 matrix. Let 16 rows of the weight take the side of 16 and tokens the side
 * of 8: then 1 to 8 tokens cost the same. y transposed = W * x transposed:
 *
 *                  k: 16 of them                tokens
 *              +----------------+               n 0..7
 *     rows     |                |   k 0..15   [        ]        sums: lane 4g + t has
 *     g 0..15  |   A: weights   |      x      [  B: x  ]        rows g, g+8, tokens 2t, 2t+1
 *              +----------------+             [        ]
 *
 * In A, lane 4g + t holds pairs of neighbours in k for the rows g and g + 8 (device.cuh), and a byte of the stored weight
 * is such a pair: looked up in a table of 256 pairs, it *is* a fragment register. Which k goes to which column is
 * free, as long as A and B agree, so a lane takes four bytes that lie together:
 *
 *     k           0 1 2 3 4 5 6 7   8 9 ...     15   16 ...     23   24 ...     31      32 weights: one block at most
 *     byte        [0] [1] [2] [3]   [0] [1] [2] [3]  [0] ...         [0] ...
 *     lane        t = 0             t = 1            t = 2           t = 3
 *     mma         first   second    first   second   ...
 *
 * All 32 weights of a row share one scale, so the scale is applied to the finished sum of two mma's, in fp32; what is
 * rounded to 16 bits is only the table, and operands.py picks a factor at which it rounds best (p.back undoes it).
 *
 * The pair table is there once per bank (32 KB): entry e of lane l is word 32 * e + l, free of conflicts. Eight warps share
 * 16 rows and split K; their sums meet in shared memory. TOKENS is 8 or 32; more go along gridDim.y.
 *
 * What limits it: a warp asks for 16 bytes of each of 16 rows, waits for them, multiplies, and asks again.
 */
#include "grouped.cuh"

#define WARPS 8
#define ROWS 16
#define DEPTH 32 /* k per step of a warp */
#define TILES (TOKENS / 8)

DEVICE void make_table(u32 *table, const ProductArguments &p) {
    for (int i = threadIdx.x; i < 256 * 8; i += WARPS * 32) {
        u32 pair = pair_of_byte(p.weight.code, i / 8, p.factor);
        ((uint4 *)table)[i] = make_uint4(pair, pair, pair, pair);
    }
}

/* `mine` is the lane's bank of the table. */
DEVICE u32 look_up(const u32 *mine, u32 word, int byte) { return mine[(word >> 8 * byte & 255u) * 32]; }

KERNEL(gemm_tensor_core, WARPS * 32)(Arguments arguments) {
    const ProductArguments &p = product_of(arguments);
    DYNAMIC_SHARED(shared);
    u32 *table = (u32 *)shared;
    make_table(table, p);
    __syncthreads();

    int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4;
    const u32 *mine = table + lane;
    const Scales &scales = p.weight.scales;
    i64 first_row = (i64)blockIdx.x * ROWS, first_token = (i64)blockIdx.y * TOKENS;
    i64 low = min(first_row + g, p.N - 1) * p.K, high = min(first_row + g + 8, p.N - 1) * p.K;
    const T *x[TILES];
#pragma unroll
    for (int n = 0; n < TILES; n++) x[n] = (const T *)p.x + min(first_token + 8 * n + g, p.M - 1) * p.K + 8 * t;

    float sum[TILES][4] = {};
    for (i64 k = warp * DEPTH; k < p.K; k += WARPS * DEPTH) {
        u32 low_word = __ldg((const u32 *)(p.weight.packed + (low + k) / 2) + t);
        u32 high_word = __ldg((const u32 *)(p.weight.packed + (high + k) / 2) + t);
        float low_scale = scale_of_shifted_block(scales, low + k >> scales.shift);
        float high_scale = scale_of_shifted_block(scales, high + k >> scales.shift);
        u32 a[2][4];
#pragma unroll
        for (int j = 0; j < 2; j++) {
            a[j][0] = look_up(mine, low_word, 2 * j);
            a[j][1] = look_up(mine, high_word, 2 * j);
            a[j][2] = look_up(mine, low_word, 2 * j + 1);
            a[j][3] = look_up(mine, high_word, 2 * j + 1);
        }
#pragma unroll
        for (int n = 0; n < TILES; n++) {
            uint4 b = *(const uint4 *)(x[n] + k);
            float d[4] = {};
            multiply_16x8x16(d, a[0], b.x, b.y);
            multiply_16x8x16(d, a[1], b.z, b.w);
            sum[n][0] = fmaf(d[0], low_scale, sum[n][0]);
            sum[n][1] = fmaf(d[1], low_scale, sum[n][1]);
            sum[n][2] = fmaf(d[2], high_scale, sum[n][2]);
            sum[n][3] = fmaf(d[3], high_scale, sum[n][3]);
        }
    }

    /* The warps' sums meet where the table was: [warp][tile and register][lane]. */
    __syncthreads();
    float *sums = (float *)shared;
#pragma unroll
    for (int i = 0; i < TILES * 4; i++) sums[(warp * TILES * 4 + i) * 32 + lane] = sum[i / 4][i % 4];
    __syncthreads();
    for (int i = threadIdx.x; i < TILES * 4 * 32; i += WARPS * 32) {
        float total = 0.0f;
#pragma unroll
        for (int w = 0; w < WARPS; w++) total += sums[w * TILES * 4 * 32 + i];
        int at = i % 32, part = i / 32;
        i64 token = first_token + part / 4 * 8 + at % 4 * 2 + part % 2;
        store_product(p, token, first_row + at / 4 + part % 4 / 2 * 8, total * p.back);
    }
}
