/* A product for each expert in one launch: what the kernels of products are when compiled with -DGROUPED.
 *
 * The rows of x are sorted by expert. The launch brings a list of tiles: up to TOKENS rows each, all of one expert. The
 * tiles go along gridDim.z; a CTA reads its entry and from there on sees an ordinary product, of those rows with the
 * weight and the bias of that expert. Nothing else in a kernel knows of experts.
 *
 *     offsets      0         3    3                  8            expert 1 has no rows: no CTA reads its weight
 *     x [8, K]     | e0 e0 e0 |    | e2 e2 e2 e2 e2  |
 *     tiles        (0, 0, 3)       (2, 3, 4) (2, 7, 1)            TOKENS = 4: (expert, first row, rows)
 *     blockIdx.z   0               1         2
 *
 *     weight [3, N, K], flat:      | e0: N * K codes | e1 | e2 |  an expert begins with a byte, a block, and a block of
 *                                                                 nested scales: else the core multiplies decoded
 */
#pragma once
#include "device.cuh"

#ifdef GROUPED
typedef GroupedArguments Arguments;

DEVICE ProductArguments product_of(const GroupedArguments &a) {
    ProductArguments p = a.product;
    int4 tile = __ldg(a.tiles + blockIdx.z);
    i64 expert = tile.x, first = tile.y, codes = expert * p.N * p.K;
    Scales &scales = p.weight.scales;
    i64 block = divide(codes, scales.blocksize, scales.shift);
    p.x = (const T *)p.x + first * p.K;
    p.y = (T *)p.y + first * p.N;
    p.M = tile.z;
    __builtin_assume(__isGlobal(p.x) && __isGlobal(p.y)); /* else the compiler forgets it: LD and ST, not LDG and STG */
    if (p.bias) p.bias = (const T *)p.bias + expert * p.N;
    p.weight.packed += codes / 2;
    if (scales.q) scales.q += block;
    scales.absmax += scales.q ? divide(block, scales.nested_blocksize, scales.nested_shift) : block;
    return p;
}
#else
typedef ProductArguments Arguments;

DEVICE const ProductArguments &product_of(const ProductArguments &p) { return p; }
#endif

/* The number of this CTA's tile of y: CTAs that share it, along K, count themselves there. */
DEVICE i64 tile_of_cta() {
#ifdef GROUPED
    return (i64)blockIdx.z * gridDim.x + blockIdx.x;
#else
    return blockIdx.x;
#endif
}
