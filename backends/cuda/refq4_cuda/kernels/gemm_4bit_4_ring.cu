/* GEMM, rung 4: every warp streams its own weights through a ring in shared memory, and no warp waits for another.
 *
 * Budget, per weight in the loop along K, whole, on sm_90 (python -m refq4_cuda.sass counts, a test compares):
 *
 *     TOKENS=8      instructions 2.3      alu 0.9
 *     TOKENS=16     instructions 2.6      alu 0.9
 *     TOKENS=32     instructions 3.1      alu 0.9
 *     TOKENS=64     instructions 5.0      alu 1.3
 *
 * What comes before and after the loop, for each instruction of the loop, where K = 4096 is split for 132 multiprocessors
 * (counted in the emulator; a test compares): 0.27, 0.40, 0.27 at M = 16, 32, 64.
 *
 * What an mma does with a byte of the weight stands in gemm_4bit_3_tensor_core.cu. New here:
 *
 * 1. The ring. A stage is 2 KB, brought by cp.async: 64 k x 16 rows, four times, as rows or as k. STAGES of them belong
 *    to a warp, so most of a stage's way from memory is hidden behind the others, and nothing but __syncwarp is needed.
 *
 * 2. The table and the ring interleaved. An entry of the pair table is 128 bytes, one copy per bank; entries lie 256 bytes
 *    apart, and a row of the ring fills the gap. So the address of an entry is (byte, lane * 4): one prmt makes it.
 *
 *        address        0                        128                      256
 *                       +------------------------+------------------------+
 *        entry/row  0   | pair 0: lane 0 ... 31  | 128 bytes of weights   |      bits 15..8   byte of the weight
 *                   1   | pair 1: lane 0 ... 31  | 128 bytes of weights   |      bits  7..0   4 * lane
 *                   ...
 *
 * 3. A lane's bytes. 64 k of a row are 32 bytes (a piece); lane 4g + t takes eight of them, for four mma's, as one load:
 *
 *        k        0 ........ 15   16 ....... 31   32 ....... 47   48 ....... 63       one block, one scale: it is
 *        lane     t = 0           t = 1           t = 2           t = 3               applied to the sum of four mma's
 *        mma      0   1   2   3   0   1   2   3   0   1   2   3   0   1   2   3
 *
 *    Four pieces fill a row of the ring. Eight rows g are read at once, so pieces are moved about (an xor with the row)
 *    until any four lie in different banks:
 *
 *        ring row 0   [p0][p1][p2][p3]        ROW_TILES 1: a row of the weight to a row of the ring
 *                 1   [p1][p0][p3][p2]        ROW_TILES 2: two rows of the weight, two pieces each
 *                 2   [p2][p3][p0][p1]        ROW_TILES 4: four rows of the weight, one piece each
 *
 * 4. ROW_TILES tiles of 16 rows per warp use the same fragments of x, so x costs less the more tokens there are.
 *
 * 5. Who does what. The eight warps of a CTA stand side by side along N (row_warps of them, sharing x in the L1 cache)
 *    and one behind the other along K; gridDim.y CTAs split K further when N is small. Sums meet in shared memory, then,
 *    across CTAs, in `partial`: the last one to arrive adds them up, always in the same order.
 *
 * 6. Scales are fetched a step ahead of their use and handed round through shared memory, 64 for a stage.
 *
 * Wants: blocks of 64 or more (a power of two that divides K), 16-byte addresses, K < 2**26, cp.async (sm_80).
 */
#include "grouped.cuh"

#define WARPS 8
#define PIECE 64                /* k in a piece */
#define PIECES (4 / ROW_TILES)  /* pieces of each row in a stage */
#define STEP (PIECE * PIECES)
#define ROWS (16 * ROW_TILES)
#define TILES (TOKENS / 8)
#define SUMS (ROW_TILES * TILES * 4)
#define STRIDE 256              /* from one entry, or row of the ring, to the next */
#define STAGE_BYTES (16 * STRIDE)
#define RING_ROWS (WARPS * STAGES * 16 > 256 ? WARPS * STAGES * 16 : 256)
#define RESIDENT (TOKENS <= 16 ? 2 : 1)

#include "sums.cuh"

/* What a warp streams: where it stands in the weight, and where a lane's share goes. */
struct Stream {
    const u8 *from;  /* of this lane's first 16 bytes, at k = 0 */
    u32 to;          /* in stage 0, from the start of shared memory */
    i64 rows_apart;  /* bytes from one of its four shares to the next */
    u32 k_offset;
    int rows_left;
};

DEVICE void fetch(const Stream &s, u8 *shared, u32 k, u32 K, int slot) {
    if (k + s.k_offset < K) {
        const u8 *from = s.from + k / 2;
#pragma unroll
        for (int i = 0; i < 4; i++)
            copy_async16(shared + s.to + slot * STAGE_BYTES + i * 4 * STRIDE, from + i * s.rows_apart,
                         i * 4 * ROW_TILES < s.rows_left ? 16 : 0);
    }
    copy_async_commit();
}

/* Two scales on their way: what was read of the tables, before a nested one is put together. */
struct RawScales {
    float absmax[2];
    u32 q[2];
};

/* `first`: the blocks at k = 0. */
DEVICE RawScales load_scales(const Scales &scales, const u32 (&first)[2], u32 k, u32 K) {
    RawScales raw;
    u32 at = min(k, K - PIECE) >> scales.shift;
#pragma unroll
    for (int i = 0; i < 2; i++) {
        u32 block = first[i] + at;
        raw.q[i] = scales.q ? __ldg(scales.q + block) : 0;
        raw.absmax[i] = __ldg(scales.absmax + (block >> scales.nested_shift)); /* 0 where nothing is nested */
    }
    return raw;
}

DEVICE void store_scales(const Scales &scales, const RawScales &raw, float *to) {
#pragma unroll
    for (int i = 0; i < 2; i++) to[32 * i] = scales.q ? nested_scale(scales, raw.q[i], raw.absmax[i]) : raw.absmax[i];
}

DEVICE u32 look_up(const u8 *table, u32 word, int byte, u32 lane4) {
    return *(const u32 *)(table + __byte_perm(word, lane4, 0x5504u | byte << 4));
}

/* A thread writes the 128 bytes of one entry, 16 at a time, and begins where its neighbours do not: no bank waits. */
DEVICE void make_table(u8 *table, const ProductArguments &p, u32 thread) {
    u32 pair = pair_of_byte(p.weight.code, thread, p.factor), at = thread * STRIDE + thread % 8 * 16;
#pragma unroll
    for (u32 i = 0; i < 8; i++) *(uint4 *)(table + (at ^ i * 16)) = make_uint4(pair, pair, pair, pair);
}

KERNEL_RESIDENT(gemm_ring, WARPS * 32, RESIDENT)(Arguments arguments) {
    const ProductArguments &p = product_of(arguments);
    DYNAMIC_SHARED(shared);
    u32 thread = thread_number(), lane = thread % 32, warp = thread / 32, g = lane / 4, t = lane % 4, K = (u32)p.K;
    int row_warp = warp % p.row_warps, k_warp = warp / p.row_warps, k_warps = WARPS / p.row_warps;
    u32 groups = (u32)((p.M + TOKENS - 1) / TOKENS), stride = k_warps * p.splits * STEP;
    i64 first_token = (i64)(blockIdx.x % groups) * TOKENS;
    i64 cta_row = (i64)(blockIdx.x / groups) * p.row_warps * ROWS, first_row = cta_row + row_warp * ROWS;
    const Scales &scales = p.weight.scales;
    u32 ring = 128 + warp * STAGES * STAGE_BYTES;
    float *stage_scales = (float *)(shared + RING_ROWS * STRIDE) + warp * STAGES * 64;

    Stream stream;
    u32 lane_row = lane / (2 * PIECES), lane_part = lane % (2 * PIECES); /* 16 bytes each of a row */
    stream.from = p.weight.packed + ((first_row + lane_row) * K + lane_part * 32) / 2;
    stream.to = ring + lane / 8 * STRIDE + ((lane / 2 % 4) ^ (lane / 8 % PIECES)) * 32 + lane % 2 * 16;
    stream.rows_apart = (i64)4 * ROW_TILES * K / 2;
    stream.k_offset = lane_part * 32;
    stream.rows_left = (int)min(p.N - first_row - lane_row, (i64)ROWS);
    u32 first_block[2], scale_k = lane % PIECES * PIECE;
#pragma unroll
    for (int i = 0; i < 2; i++)
        first_block[i] = (u32)(min(first_row + (lane + 32 * i) / PIECES, p.N - 1) * (K >> scales.shift));

    u32 k = (blockIdx.y * k_warps + k_warp) * STEP;
#pragma unroll
    for (int i = 0; i < STAGES; i++) fetch(stream, shared, k + i * stride, K, i);
#pragma unroll
    for (int i = 0; i < STAGES - 1; i++)
        store_scales(scales, load_scales(scales, first_block, k + scale_k + i * stride, K), stage_scales + 64 * i + lane);
    RawScales raw = load_scales(scales, first_block, k + scale_k + (STAGES - 1) * stride, K);
    make_table(shared, p, thread);
    __syncthreads();

    const T *x = (const T *)p.x + first_token * K + t * 16;
    u32 last_token = (u32)(p.M - 1 - first_token), token_at[TILES];
#pragma unroll
    for (int n = 0; n < TILES; n++) token_at[n] = min(8 * n + g, last_token) * K;
    u32 piece0 = g * PIECES; /* its first piece's number in the stage */
    u32 mine = ring + piece0 / 4 * STRIDE + ((piece0 % 4) ^ (piece0 / 4 % PIECES)) * 32 + t * 8, lane4 = lane * 4;
    float sum[SUMS] = {};

    for (int slot = 0; k < K; k += stride) {
        copy_async_wait<STAGES - 1>();
        __syncwarp();
        u32 stage = mine + slot * STAGE_BYTES;
        const float *scale = stage_scales + slot * 64 + piece0;
#pragma unroll (TILES < 8 ? PIECES : 1)
        for (u32 c = 0; c < PIECES; c++) {
            if (c > 0 && k + c * PIECE >= K) break;
            u32 a[ROW_TILES][4][4];
#pragma unroll
            for (int r = 0; r < ROW_TILES; r++) {
                const u8 *at = shared + (stage ^ c * 32) + r * 4 * PIECES * STRIDE;
                uint2 low = *(const uint2 *)at, high = *(const uint2 *)(at + 2 * PIECES * STRIDE);
#pragma unroll
                for (int j = 0; j < 4; j++) {
                    u32 low_word = j < 2 ? low.x : low.y, high_word = j < 2 ? high.x : high.y;
                    a[r][j][0] = look_up(shared, low_word, j % 2 * 2, lane4);
                    a[r][j][1] = look_up(shared, high_word, j % 2 * 2, lane4);
                    a[r][j][2] = look_up(shared, low_word, j % 2 * 2 + 1, lane4);
                    a[r][j][3] = look_up(shared, high_word, j % 2 * 2 + 1, lane4);
                }
            }
#pragma unroll
            for (int n = 0; n < TILES; n++) {
                const uint4 *from = (const uint4 *)(x + token_at[n] + k + c * PIECE);
                uint4 b = __ldg(from), b2 = __ldg(from + 1);
#pragma unroll
                for (int r = 0; r < ROW_TILES; r++) {
                    float d[4] = {};
                    multiply_16x8x16(d, a[r][0], b.x, b.y);
                    multiply_16x8x16(d, a[r][1], b.z, b.w);
                    multiply_16x8x16(d, a[r][2], b2.x, b2.y);
                    multiply_16x8x16(d, a[r][3], b2.z, b2.w);
#pragma unroll
                    for (int i = 0; i < 4; i++) {
                        float &total = sum[(r * TILES + n) * 4 + i];
                        total = fmaf(d[i], scale[(r * 16 + i / 2 * 8) * PIECES + c], total);
                    }
                }
            }
        }
        __syncwarp();
        fetch(stream, shared, k + STAGES * stride, K, slot);
        store_scales(scales, raw, stage_scales + (slot == 0 ? STAGES - 1 : slot - 1) * 64 + lane);
        raw = load_scales(scales, first_block, k + scale_k + STAGES * stride, K);
        slot = slot == STAGES - 1 ? 0 : slot + 1;
    }

    reduce_warps(sum, (float *)shared, k_warp, k_warps, row_warp, p.row_warps);
    finish(p, (float *)shared, tile_of_cta(), cta_row, first_token);
}
