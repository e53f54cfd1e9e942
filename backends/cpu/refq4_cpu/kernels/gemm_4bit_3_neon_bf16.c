/* GEMM, rung 3 for NEON: matrices of bf16 with bfmmla. One instruction multiplies two rows by two tokens, four k deep.
 *
 * What vzip makes of sixteen looked-up codes (neon_lookup.h, gemm_4bit_2_neon.c) is an operand of bfmmla as it is:
 *
 *     weights   | row 0: k = 0 2 4 6 | row 1: k = 0 2 4 6 |       eight bf16
 *     x         | token 0: the same  | token 1: the same  |       one load for all rows
 *     sums      | row 0 token 0 | row 0 token 1 | row 1 token 0 | row 1 token 1 |       += four products each
 *
 * Where the number of tokens is odd, the last one stands in both halves of x, and half of its sums are not used: a
 * token's result has the same bits alone and in a batch.
 *
 * bfmmla reads bf16 subnormals as zero, and its sums are scaled once per part of a block: |x| beyond about 1e36 can
 * overflow here where scaled weights would not. Both are as in gemm_4bit_4_avx512_bf16.c.
 *
 * cc -O3 -march=armv8.2-a+fp16fml+bf16 -DREFQ4_NEON -DREFQ4_NEON_BF16 -fsyntax-only gemm_4bit_3_neon_bf16.c
 */
#include "simd.h"
#include "driver.h"
#include "neon_lookup.h"

_Static_assert(4 * sizeof(uint8x16_t) == GROUP_BYTES, "a group is four registers of four rows");

/* One group's share: sum[pair of tokens][q][pair of rows]. x: [even, odd k][MT][4] bf16. */
static inline __attribute__((always_inline)) void add_group_bf16(float32x4_t sum[4][4][2], const uint8_t *codes,
                                                                 const uint16_t *x, const uint8x16x4_t *t, const int MT,
                                                                 const int QUADS) {
    UNROLL for (int low = 0; low < 2; low++) {
        bfloat16x8_t value[4];
        UNROLL for (int p = 0; p < (MT + 1) / 2; p++) {
            const uint16_t *at = x + 4 * (low * MT + 2 * p);
            uint16x4_t alone = vld1_u16(at);
            value[p] = vreinterpretq_bf16_u16(2 * p + 1 < MT ? vld1q_u16(at) : vcombine_u16(alone, alone));
        }
        UNROLL for (int q = 0; q < QUADS; q++) {
            uint16x8_t w[2];
            lookup_words(nibbles(vld1q_u8(codes + 16 * q), low), t, 2, w);
            UNROLL for (int p = 0; p < (MT + 1) / 2; p++)
                UNROLL for (int r = 0; r < 2; r++)
                    sum[p][q][r] = vbfmmlaq_f32(sum[p][q][r], vreinterpretq_bf16_u16(w[r]), value[p]);
        }
    }
}

static inline __attribute__((always_inline)) void bfmmla_tile(const uint16_t *x, const uint8_t *tiles, int64_t blocks,
                                                              int64_t groups, const void *table, float *sums,
                                                              const int MT, const int QUADS) {
    const uint8x16x4_t t = table_planes(table);
    memset(sums, 0, (size_t)MT * MAX_PANELS * PANEL * sizeof(float));
    int64_t part = min64(groups, PART_GROUPS_BF16);
    for (int64_t i = 0, first = 0; i < blocks * (groups / part); i++, x += 8 * MT * part) {
        UNROLL for (int quad = 0; quad < 4; quad += QUADS) {
            float32x4_t sum[4][4][2];
            UNROLL for (int p = 0; p < (MT + 1) / 2; p++)
                UNROLL for (int q = 0; q < QUADS; q++) sum[p][q][0] = sum[p][q][1] = vdupq_n_f32(0);
            for (int64_t g = 0; g < part; g++) {
                const uint8_t *codes = tiles + SCALES_BYTES + GROUP_BYTES * (first + g) + 16 * quad;
                if (quad == 0) __builtin_prefetch(codes + 1152); /* a block ahead, across page ends */
                add_group_bf16(sum, codes, x + 8 * MT * g, &t, MT, QUADS);
            }
            UNROLL for (int m = 0; m < MT; m++)
                UNROLL for (int q = 0; q < QUADS; q++) {
                    const float32x4_t *s = sum[m / 2][q];
                    int at = 4 * (quad + q);
                    float32x4_t rows = m % 2 ? vuzp2q_f32(s[0], s[1]) : vuzp1q_f32(s[0], s[1]);
                    float *total = sums + m * MAX_PANELS * PANEL + at;
                    vst1q_f32(total, vfmaq_f32(vld1q_f32(total), rows, vld1q_f32((const float *)tiles + at)));
                }
        }
        first += part;
        if (first == groups) { /* the next record */
            first = 0;
            tiles += SCALES_BYTES + GROUP_BYTES * groups;
        }
    }
}

#define KERNEL(MT, QUADS) static void bfmmla_tile_##MT(TILE_KERNEL_PARAMETERS) {                                       \
        (void)stride, (void)ahead, bfmmla_tile(x, tiles, blocks, groups, table, sums, MT, QUADS); }
/* 8 to 16 sums: enough to hide the latency, and few enough for 32 registers. */
KERNEL(1, 4) KERNEL(2, 4) KERNEL(3, 4) KERNEL(4, 4) KERNEL(5, 2) KERNEL(6, 2) KERNEL(7, 2) KERNEL(8, 2)
#undef KERNEL

static const Engine bfmmla_engine = {
    .x_order = HALF_QUADS,
    .make_table = rounded_table,
    .kernel = {{0}, {bfmmla_tile_1}, {bfmmla_tile_2}, {bfmmla_tile_3}, {bfmmla_tile_4},
               {bfmmla_tile_5}, {bfmmla_tile_6}, {bfmmla_tile_7}, {bfmmla_tile_8}},
};

static int gemm_4bit_3_neon_bf16(const Product *p) { return tile_product(&bfmmla_engine, p); }
