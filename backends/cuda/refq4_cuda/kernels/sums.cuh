/* How the sums of a product that is cut up along K come together: warps, then CTAs. Part of gemm_4bit_4_ring.cu.
 *
 *     a CTA's eight warps       row_warp 0   1   ...
 *                    k_warp 0   [ sum ]  [ sum ]    <- each keeps SUMS numbers a lane, in the layout of an mma's result
 *                           1   [ sum ]  [ sum ]
 *                           2   ...                    2, 3 hand over to 0, 1; then 1 to 0: a tree, in shared memory
 *
 *     CTAs along gridDim.y      each stores its sums in `partial` and counts itself in `arrived`; whoever comes last
 *                               adds them up in the order of gridDim.y, so that the same inputs give the same bits
 */
#pragma once

/* Sums of the warps along K: the upper half of them hands over to the lower half, until one is left. Its sums stay in
 * `room`, for all threads to see: [row_warp][sum][lane]. */
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

/* Where reduce_warps left the sum of a token and a row of the CTA. */
DEVICE float sum_at(const float *room, int token, int row) {
    int r = row % ROWS, i = (r / 16 * TILES + token / 8) * 4 + r % 16 / 8 * 2 + token % 2;
    return room[(row / ROWS * SUMS + i) * 32 + r % 8 * 4 + token % 8 / 2];
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
    int rows = p.row_warps * ROWS, count = rows * TOKENS;
    float *partial = p.partial + tile * p.splits * count, back = __ldg(p.weight.code + 16);
    if (p.splits > 1) {
        for (int e = threadIdx.x; e < count; e += WARPS * 32)
            partial[blockIdx.y * count + e] = sum_at(room, e / rows, e % rows);
        if (!arrives_last(p, tile, (u32 *)room)) return;
    }
    for (int e = threadIdx.x; e < count; e += WARPS * 32) {
        float total = 0.0f;
        if (p.splits == 1) total = sum_at(room, e / rows, e % rows);
        for (int s = 0; s < p.splits && p.splits > 1; s++) total += __ldcg(partial + s * count + e);
        store_product(p, first_token + e / rows, first_row + e % rows, total * back);
    }
}
