/* GEMV, rung 1: the definition. One warp per output, one weight after the other, everything in fp32.
 *
 *     lane        0     1     2    ...   31    0     1    ...
 *     element   [ k0 ][ k1 ][ k2 ] ... [ k31 ][ k32 ][ k33 ] ...        sum += x[m][k] * (code[c] * scale)
 *
 * It asks nothing of the shape: K may be odd, blocks may straddle rows, addresses need no alignment. So it is also what
 * serves every call that the rungs above can't, up to a few tokens (launch.py); M goes along gridDim.y.
 *
 * What limits it: each lane reads single bytes, works out its block for every weight, and shares nothing between tokens.
 */
#include "grouped.cuh"

#define WARPS 8

KERNEL(gemv_naive, WARPS * 32)(Arguments arguments) {
    const ProductArguments &p = product_of(arguments);
    i64 row = (i64)blockIdx.x * WARPS + threadIdx.x / 32;
    if (row >= p.N) return;
    int lane = threadIdx.x % 32;
    const Scales &scales = p.weight.scales;
    for (i64 m = blockIdx.y; m < p.M; m += gridDim.y) {
        const T *x = (const T *)p.x + m * p.K;
        float sum = 0.0f;
        for (i64 k = lane; k < p.K; k += 32) {
            i64 element = row * p.K + k;
            float scale = scale_of_block(scales, divide(element, scales.blocksize, scales.shift));
            float w = __fmul_rn(__ldg(p.weight.code + nibble(p.weight.packed, element)), scale);
            sum = fmaf(to_fp32(x[k]), w, sum);
        }
#pragma unroll
        for (int o = 16; o > 0; o /= 2) sum += __shfl_xor_sync(0xFFFFFFFFu, sum, o);
        if (lane == 0) store_product(p, m, row, sum);
    }
}
