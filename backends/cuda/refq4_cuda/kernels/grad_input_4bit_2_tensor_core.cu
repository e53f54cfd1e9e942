/* A product with the weight the other way round, rung 2: a tile is decoded once, and multiplied on tensor cores.
 *
 *     y[m][n] = sum over k of x[m][k] * w[k][n]         w: K rows of N codes (grad_input_4bit_1_tiled.cu says whose)
 *
 * Budget, per weight in the hot loop on sm_90 (python -m refq4_cuda.sass counts, a test compares):
 *
 *     TOKENS=8      instructions 7.5      alu 2.6
 *     TOKENS=32     instructions 8.3      alu 2.6
 *     TOKENS=64     instructions 9.5      alu 2.6
 *
 * As in gemm_4bit_3_tensor_core.cu the weight takes the side of 16, here with its columns: y transposed = w transposed
 * times x transposed. But an mma wants pairs of neighbours in k, which are codes of two rows, with two scales. So eight
 * warps decode 64 rows x 128 columns, code times scale in fp32, rounded as the whole weight would be, to pairs:
 *
 *                  n ->                                        shared memory, 16 KB, twice
 *      row 2i      [ .. c ........ ]  64 bytes, one scale      pair i    [ .. (w[2i][n], w[2i + 1][n]) .. ]   128 words
 *      row 2i + 1  [ .. d ........ ]  for 16 columns
 *
 *      thread 8i + j   columns 16j ... 16j + 15 of rows 2i and 2i + 1: 8 bytes and a scale of each, asked for a step ahead
 *
 * A warp multiplies 32 columns (four warps side by side) and 32 of the 64 rows. Lane 4g + t takes eight k that lie
 * together, 16 bytes of x; which k goes to which column of the mma is free, as long as A and B agree:
 *
 *      k       0 1   2 3   4 5   6 7    8 ... 15   16 ... 23   24 ... 31        A: word (pair 4t + j, column g or g + 8)
 *      pair    j=0   j=1   j=2   j=3
 *      lane    t = 0                    t = 1      t = 2       t = 3
 *      mma     first       second       first ...
 *
 * Where a word stands: columns are moved about within 32 by the pair and within 16 by the column (xor), so that the 32
 * lanes of a load, and the eight of a 16-byte store, lie in different banks:
 *
 *      word of (i, n)  =  128 i + (n ^ 4 * (n / 32) ^ 8 * (i / 4 % 4))
 *
 * Two tiles take turns, so there is one barrier in a step. K is split over CTAs where columns are few, and the sums meet
 * as in the ring (sums.cuh); mma's add up in fp32 over all of K, as cuBLAS does.
 *
 *     nvcc -arch=sm_90 -cubin -DTOKENS=64 -DT_BF16 grad_input_4bit_2_tensor_core.cu
 *
 * What limits it: decoding is paid again for every 64 tokens; x comes from L1, not a step ahead.
 *
 * Wants: blocks of 16 or more (a power of two), N a multiple of 16, K of 8 and below 2**26, 16-byte addresses. Blocks may
 * straddle rows.
 */
#include "grouped.cuh"

#define WARPS 8
#define ROW_WARPS 4            /* side by side along n; p.row_warps is the same number */
#define COLUMNS 128
#define PAIRS 32               /* of rows, in a step */
#define DEPTH (2 * PAIRS)
#define TILE_BYTES (PAIRS * COLUMNS * 4)
#define RESIDENT (TOKENS <= 32 ? 2 : 1)
#define ROW_TILES 2
#define ROWS (16 * ROW_TILES)
#define TILES (TOKENS / 8)
#define SUMS (ROW_TILES * TILES * 4)
#define ENTRY 256              /* bytes from a value of the code to the next: 32 copies, and as much room between */

#include "sums.cuh"

static_assert(ROW_WARPS * ROWS == COLUMNS && 2 * TILE_BYTES >= ROW_WARPS * SUMS * 128, "the sums fit into two tiles");

/* What a thread decodes of a step, on its way: the codes of 16 columns of two rows, and what their scales are made of.
 * K is even, so both rows are there or none is. */
struct Share {
    uint2 codes[2];
    float absmax[2];
    u32 q[2];
};

/* `element`: the first of the share. */
DEVICE void fetch(Share &share, const Weight &weight, i64 element, i64 N) {
#pragma unroll
    for (int i = 0; i < 2; i++) {
        i64 at = element + i * N;
        u32 block = (u32)(at >> weight.scales.shift);
        share.codes[i] = __ldg((const uint2 *)(weight.packed + at / 2));
        share.q[i] = weight.scales.q ? __ldg(weight.scales.q + block) : 0;
        share.absmax[i] = __ldg(weight.scales.absmax + (block >> weight.scales.nested_shift));
    }
}

/* `to`: of column 0 of the share; four columns further on is an xor with 16. A row past the end of K becomes zeros. */
DEVICE void store_pairs(const Scales &scales, const Share &share, bool there, const u8 *table, u32 lane4, u8 *tiles,
                        u32 to) {
    float scale[2];
#pragma unroll
    for (int i = 0; i < 2; i++) {
        scale[i] = scales.q ? nested_scale(scales, share.q[i], share.absmax[i]) : share.absmax[i];
        if (!there) scale[i] = 0.0f;
    }
#pragma unroll
    for (int j = 0; j < 4; j++) { /* four columns: two bytes of each row */
        u32 pairs[4];
#pragma unroll
        for (int c = 0; c < 4; c++) {
            float w[2];
#pragma unroll
            for (int i = 0; i < 2; i++) {
                u32 word = j < 2 ? share.codes[i].x : share.codes[i].y;
                u32 codes = (c % 2 ? word : word >> 4) & 0x0F0F0F0Fu;
                w[i] = *(const float *)(table + __byte_perm(codes, lane4, 0x5504u | (j % 2 * 2 + c / 2) << 4));
            }
            pairs[c] = pack(__fmul_rn(w[0], scale[0]), __fmul_rn(w[1], scale[1]));
        }
        *(uint4 *)(tiles + (to ^ 16 * j)) = make_uint4(pairs[0], pairs[1], pairs[2], pairs[3]);
    }
}

/* What a step needs moves on with it: what is worked out from the thread's number again costs a register less, and the
 * compiler would do that in each step. */
KERNEL_RESIDENT(transposed_tensor_core, WARPS * 32, RESIDENT)(Arguments arguments) {
    const ProductArguments &p = product_of(arguments);
    __shared__ __align__(16) u8 table[16 * ENTRY];
    __shared__ __align__(16) u8 tiles[2 * TILE_BYTES];
    u32 thread = thread_number(), lane = thread % 32, g = lane / 4, t = lane % 4, lane4 = lane * 4, K = (u32)p.K;
    u32 warp = thread / 32, row_warp = warp % ROW_WARPS, k_warp = warp / ROW_WARPS;
    u32 groups = (u32)((p.M + TOKENS - 1) / TOKENS), stride = p.splits * DEPTH, k = blockIdx.y * DEPTH;
    i64 first_token = (i64)(blockIdx.x % groups) * TOKENS, first_column = (i64)(blockIdx.x / groups) * COLUMNS;
    for (u32 i = thread; i < 16 * 32; i += WARPS * 32)
        *(float *)(table + i / 32 * ENTRY + i % 32 * 4) = __ldg(p.weight.code + i / 32);

    u32 pair = thread / 8, part = thread % 8; /* the share that this thread decodes */
    u32 to = 4 * (pair * COLUMNS + (16 * part ^ part / 2 * 4 ^ pair / 4 % 4 * 8));
    int pairs_left = (int)(K - k - 2 * pair);
    i64 element = (i64)(k + 2 * pair) * p.N + min(first_column + 16 * part, p.N - 16); /* what is past N is not stored */

    u32 mine = 4 * ((k_warp * 16 + 4 * t) * COLUMNS + ((row_warp * ROWS + g) ^ row_warp * 4 ^ t * 8));
    u32 depth = k + k_warp * 32 + 8 * t;
    int x_left = (int)(K - depth);
    const T *x[TILES];
#pragma unroll
    for (int n = 0; n < TILES; n++) x[n] = (const T *)p.x + min(first_token + 8 * n + g, p.M - 1) * p.K + depth;
    float sum[SUMS] = {};

    Share share = {};
    if (pairs_left > 0) fetch(share, p.weight, element, p.N);
    __syncthreads();
    for (; k < K; k += stride) {
        store_pairs(p.weight.scales, share, pairs_left > 0, table, lane4, tiles, to);
        __syncthreads();
        element += stride * p.N;
        pairs_left -= stride;
        if (pairs_left > 0) fetch(share, p.weight, element, p.N);
        u32 a[ROW_TILES][2][4];
#pragma unroll
        for (int r = 0; r < ROW_TILES; r++)
#pragma unroll
            for (int i = 0; i < 8; i++)
                a[r][i / 4][i % 4] = *(const u32 *)(tiles + (mine ^ 4 * (r * 16 + i % 2 * 8)) + i / 2 * COLUMNS * 4);
#pragma unroll
        for (int n = 0; n < TILES; n++) {
            uint4 b = make_uint4(0, 0, 0, 0);
            if (x_left > 0) b = __ldg((const uint4 *)x[n]);
            x[n] += stride;
#pragma unroll
            for (int r = 0; r < ROW_TILES; r++) {
                float(&d)[4] = *(float(*)[4])(sum + (r * TILES + n) * 4);
                multiply_16x8x16(d, a[r][0], b.x, b.y);
                multiply_16x8x16(d, a[r][1], b.z, b.w);
            }
        }
        x_left -= stride;
        to ^= TILE_BYTES, mine ^= TILE_BYTES;
    }

    reduce_warps(sum, (float *)tiles, k_warp, WARPS / ROW_WARPS, row_warp, ROW_WARPS);
    finish(p, (float *)tiles, tile_of_cta(), first_column, first_token);
}
