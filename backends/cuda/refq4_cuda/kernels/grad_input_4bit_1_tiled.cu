/* A product with the weight the other way round, rung 1: tiles decoded in shared memory. Any shape, any dtype, in fp32.
 *
 *     y[m][n] = sum over k of x[m][k] * w[k][n]         w: K rows of N codes, blocks along n
 *
 * That is the gradient of a layer's input (x: the gradient of its output, K its out_features, N its in_features), and the
 * product of experts that are stored as [K, N]. The terms of a sum lie in a column of w, each with another scale, so a
 * scale can't wait for the sum: a tile of w is decoded, code times scale, and all tokens of the CTA pass over it.
 *
 *                 n: 64 columns
 *            k    [ w: 32 x 64, decoded ]         a thread: one column, eight tokens
 *            |              x
 *            [ x: 32 x 32 tokens ]                sum[8] += 32 terms, added up apart: subtotals keep fp32 sums exact
 *
 * The full weight is never in memory. Blocks may straddle rows, and rows may begin in the middle of a byte.
 *
 *     nvcc -arch=sm_75 -cubin -DTOKENS=32 -DT_FP32 grad_input_4bit_1_tiled.cu
 *
 * What limits it: a look-up of the scale for each weight, and one word of shared memory for eight multiply-adds.
 */
#include "grouped.cuh"

#define THREADS 256
#define COLUMNS 64
#define DEPTH 32
#define EACH 8             /* tokens of a thread */
#define STRIDE (TOKENS + 4) /* eight rows of x lie in different banks, and four tokens at a 16-byte address */

static_assert(THREADS / COLUMNS * EACH == TOKENS, "the threads of a column share out all tokens");

DEVICE void decode_tile(const ProductArguments &p, float *tile, i64 k, i64 n) {
    const Scales &scales = p.weight.scales;
    for (int i = threadIdx.x; i < DEPTH * COLUMNS; i += THREADS) {
        i64 row = k + i / COLUMNS, column = n + i % COLUMNS, element = row * p.N + column;
        float w = 0.0f;
        if (row < p.K && column < p.N) {
            float scale = scale_of_block(scales, divide(element, scales.blocksize, scales.shift));
            w = __fmul_rn(__ldg(p.weight.code + nibble(p.weight.packed, element)), scale);
        }
        tile[i] = w;
    }
}

DEVICE void load_tokens(const ProductArguments &p, float *tokens, i64 k, i64 m) {
    for (int i = threadIdx.x; i < DEPTH * TOKENS; i += THREADS) {
        int row = i % DEPTH, token = i / DEPTH;
        bool there = k + row < p.K && m + token < p.M;
        tokens[row * STRIDE + token] = there ? to_fp32(__ldg((const T *)p.x + (m + token) * p.K + k + row)) : 0.0f;
    }
}

KERNEL_RESIDENT(transposed_tiled, THREADS, 2)(Arguments arguments) {
    const ProductArguments &p = product_of(arguments);
    __shared__ float tile[DEPTH * COLUMNS];
    __shared__ __align__(16) float tokens[DEPTH * STRIDE];
    int column = threadIdx.x % COLUMNS, mine = threadIdx.x / COLUMNS * EACH;
    i64 first_column = (i64)blockIdx.x * COLUMNS, first_token = (i64)blockIdx.y * TOKENS;

    float sum[EACH] = {};
    for (i64 k = 0; k < p.K; k += DEPTH) {
        decode_tile(p, tile, k, first_column);
        load_tokens(p, tokens, k, first_token);
        __syncthreads();
        float part[EACH] = {};
#pragma unroll 8
        for (int row = 0; row < DEPTH; row++) {
            float w = tile[row * COLUMNS + column];
            const float4 *from = (const float4 *)(tokens + row * STRIDE + mine);
            float4 low = from[0], high = from[1];
            float x[EACH] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
#pragma unroll
            for (int m = 0; m < EACH; m++) part[m] = fmaf(x[m], w, part[m]);
        }
#pragma unroll
        for (int m = 0; m < EACH; m++) sum[m] += part[m];
        __syncthreads();
    }
#pragma unroll
    for (int m = 0; m < EACH; m++) store_product(p, first_token + mine + m, first_column + column, sum[m]);
}
