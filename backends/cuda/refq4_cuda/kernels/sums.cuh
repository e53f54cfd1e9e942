/* How the sums of a product that is cut up along K come together: warps, then CTAs. Part of gemm_4bit_4_ring.cu.
 *
 *     a CTA's eight warps       row_warp 0   1   ...
 *                    k_warp 0   [ sum ]  [ sum ]    <- each keeps SUMS numbers a lane, in the layout of an mma's result
 *                           1   [ sum ]  [ sum ]
 *                           2   ...                    2, 3 hand over to 0, 1; then 1 to 0: a tree, in shared memory
 *
 *     CTAs along gridDim.y      each stores its sums in `partial` and counts itself in `arrived`; whoever comes last
 *                               adds them up in the order of gridDim.y, so that the same inputs give the same bits
 *
 * Sums travel in the order in which the lanes hold them (fragment order), four at a time. An address is then the
 * thread's number, and only what writes y asks which row and tokens a sum belongs to, of sizes that the compiler knows:
 *
 *     room, and a CTA's share of partial     [row_warp][sum i][lane 4g + t]      a float4 is sum i of the lanes t = 0..3
 *
 *     sum i = 4 * (row tile * TILES + token tile) + 2 * high + odd               row    16 * row tile + 8 * high + g
 *                                                                                token  8 * token tile + 2t + odd
 *
 *     y of a warp's 32 float4's, t = 0..3:   16 rows side by side, of the tokens 2t and 2t + 1
 */
#pragma once

/* Sums of the warps along K: the upper half of them hands over to the lower half, until one is left. Its sums stay in
 * `room`, for all threads to see. */
DEVICE void reduce_warps(float (&sum)[SUMS], float *room, int k_warp, int k_warps, int row_warp, int row_warps) {
    int lane = threadIdx.x % 32;
    for (int half = k_warps / 2; half > 0; half /= 2) {
        float *mine = room + ((k_warp % half) * row_warps + row_warp) * SUMS * 32 + lane;
        __syncthreads();
        if (k_warp >= half && k_warp < 2 * half) {
#pragma unroll
            for (int i = 0; i < SUMS; i++) mine[i * 32] = sum[i];
        }
        __syncthreads();
        if (k_warp < half) {
#pragma unroll
            for (int i = 0; i < SUMS; i++) sum[i] += mine[i * 32];
        }
        if (half == 1 && k_warp == 0) {
#pragma unroll
            for (int i = 0; i < SUMS; i++) mine[i * 32] = sum[i];
        }
    }
    __syncthreads();
}

/* This CTA is one of p.splits along K. True if it is the last to arrive: all the others' sums are in `partial`. */
DEVICE bool arrives_last(const ProductArguments &p, i64 tile, u32 *word) {
    __threadfence();
    __syncthreads();
    if (threadIdx.x == 0) {
        *word = atomicAdd(p.arrived + tile, 1u);
        if (*word == p.splits - 1) p.arrived[tile] = 0; /* for the next launch */
    }
    __syncthreads();
    __threadfence();
    return *word == p.splits - 1;
}

/* From the sums in `room` to y, by way of `partial` where K is split. */
DEVICE void finish(const ProductArguments &p, float *room, i64 tile, i64 first_row, i64 first_token) {
    const u32 quads = p.row_warps * SUMS * 8;
    float4 *sums = (float4 *)room, *partial = (float4 *)p.partial + tile * p.splits * quads;
    if (p.splits > 1) {
        for (u32 e = threadIdx.x; e < quads; e += WARPS * 32) partial[blockIdx.y * quads + e] = sums[e];
        if (!arrives_last(p, tile, (u32 *)room)) return;
    }
    for (u32 e = threadIdx.x; e < quads; e += WARPS * 32) {
        float4 total = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
        if (p.splits == 1) total = sums[e];
        for (u32 s = 0; s < p.splits && p.splits > 1; s++) {
            float4 part = __ldcg(partial + s * quads + e);
            total.x += part.x, total.y += part.y, total.z += part.z, total.w += part.w;
        }
        u32 g = e % 8, i = e / 8 % SUMS, row_warp = e / 8 / SUMS;
        i64 row = first_row + row_warp * ROWS + i / 4 / TILES * 16 + i / 2 % 2 * 8 + g;
        i64 token = first_token + i / 4 % TILES * 8 + i % 2;
        store_product(p, token, row, total.x * p.back);
        store_product(p, token + 2, row, total.y * p.back);
        store_product(p, token + 4, row, total.z * p.back);
        store_product(p, token + 6, row, total.w * p.back);
    }
}
