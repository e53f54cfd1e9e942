/* GEMM, rung 2 for NEON: fp32 multiply-adds, weights looked up by bytes.
 *
 * A group (tiles.h) is four registers of four rows. A register's high nibbles are sixteen codes, its low ones the others:
 *
 *     bytes        | row 0: b0 b1 b2 b3 | row 1: b0 .. b3 | row 2: b0 .. b3 | row 3: b0 .. b3 |
 *     >> 4         codes of k = 0 2 4 6 of each row            & 15         those of k = 1 3 5 7
 *     lookup_fp32  w[r] = four weights of row r                (neon_lookup.h; two look-ups for bf16 x, four otherwise)
 *     vfmaq        sum[r] += w[r] * | x0 x2 x4 x6 |            one load of x for all rows: lanes run along K
 *
 * So a row has four sums, which are added up at the end of a part of a block, four rows at once (vpaddq), and scaled
 * there. Up to four tokens share a look-up; with fewer, more rows go together, for more sums that don't wait for each
 * other. An output's order of summing is the same in all of them.
 *
 * cc -O3 -DREFQ4_NEON -fsyntax-only gemm_4bit_2_neon.c
 */
#ifndef GEMM_4BIT_2_NEON_C
#define GEMM_4BIT_2_NEON_C
#include "simd.h"
#include "driver.h"
#include "neon_lookup.h"

_Static_assert(4 * sizeof(uint8x16_t) == GROUP_BYTES, "a group is four registers of four rows");

/* at[0 .. 3] += sum * scale[0 .. 3] */
static inline void add_scaled4(float *at, float32x4_t sum, const float *scale) {
    vst1q_f32(at, vfmaq_f32(vld1q_f32(at), sum, vld1q_f32(scale)));
}

/* total[0 .. 15] += subtotal[0 .. 15], which becomes zero */
static inline void add_subtotal_neon(float *total, float *subtotal) {
    UNROLL for (int i = 0; i < PANEL; i += 4) {
        vst1q_f32(total + i, vaddq_f32(vld1q_f32(total + i), vld1q_f32(subtotal + i)));
        vst1q_f32(subtotal + i, vdupq_n_f32(0));
    }
}

/* One group's share of QUADS quads of rows: sum[m][q][row] += weights * x. x: [even, odd k][MT][4]. */
typedef void AddGroup(float32x4_t sum[4][4][4], const uint8_t *codes, const void *x, const uint8x16x4_t *t, const int MT,
                      const int QUADS);

static inline __attribute__((always_inline)) void add_group_fp32(float32x4_t sum[4][4][4], const uint8_t *codes,
                                                                 const float *x, const uint8x16x4_t *t, const int PLANES,
                                                                 const int MT, const int QUADS) {
    UNROLL for (int low = 0; low < 2; low++) {
        float32x4_t value[4];
        UNROLL for (int m = 0; m < MT; m++) value[m] = vld1q_f32(x + 4 * (low * MT + m));
        UNROLL for (int q = 0; q < QUADS; q++) {
            float32x4_t w[4];
            lookup_fp32(nibbles(vld1q_u8(codes + 16 * q), low), t, PLANES, w);
            UNROLL for (int m = 0; m < MT; m++)
                UNROLL for (int r = 0; r < 4; r++) sum[m][q][r] = vfmaq_f32(sum[m][q][r], w[r], value[m]);
        }
    }
}

static inline __attribute__((always_inline)) void add_group_exact(float32x4_t sum[4][4][4], const uint8_t *codes,
                                                                  const void *x, const uint8x16x4_t *t, const int MT,
                                                                  const int QUADS) {
    add_group_fp32(sum, codes, x, t, 4, MT, QUADS);
}

static inline __attribute__((always_inline)) void add_group_rounded(float32x4_t sum[4][4][4], const uint8_t *codes,
                                                                    const void *x, const uint8x16x4_t *t, const int MT,
                                                                    const int QUADS) {
    add_group_fp32(sum, codes, x, t, 2, MT, QUADS);
}

/* A panel times MT tokens, x_size bytes an element. SUBTOTALS: in fp32, as refq4.h says. */
static inline __attribute__((always_inline)) void neon_tile(const uint8_t *x, const uint8_t *tiles, int64_t blocks,
                                                            int64_t groups, const void *table, float *sums,
                                                            AddGroup *const add_group, const int x_size,
                                                            const int SUBTOTALS, const int MT, const int QUADS) {
    const uint8x16x4_t t = table_planes(table);
    float *subtotals = SUBTOTALS ? sums + PANEL : sums; /* where a second panel's totals would lie */
    memset(sums, 0, (size_t)MT * MAX_PANELS * PANEL * sizeof(float));
    int64_t part = min64(groups, SUBTOTALS ? PART_GROUPS_FP32 : PART_GROUPS_BF16), parts = blocks * (groups / part);
    for (int64_t i = 0, first = 0; i < parts; i++, x += 8 * MT * part * x_size) {
        UNROLL for (int quad = 0; quad < 4; quad += QUADS) {
            float32x4_t sum[4][4][4]; /* token, quad, row */
            UNROLL for (int m = 0; m < MT; m++)
                UNROLL for (int q = 0; q < QUADS; q++)
                    UNROLL for (int r = 0; r < 4; r++) sum[m][q][r] = vdupq_n_f32(0);
            for (int64_t g = 0; g < part; g++) {
                const uint8_t *codes = tiles + SCALES_BYTES + GROUP_BYTES * (first + g) + 16 * quad;
                if (quad == 0) __builtin_prefetch(codes + 1152); /* a block ahead, across page ends */
                add_group(sum, codes, x + 8 * MT * g * x_size, &t, MT, QUADS);
            }
            UNROLL for (int m = 0; m < MT; m++)
                UNROLL for (int q = 0; q < QUADS; q++) {
                    const float32x4_t *s = sum[m][q];
                    int at = 4 * (quad + q);
                    add_scaled4(subtotals + m * MAX_PANELS * PANEL + at, sums_of_lanes(s[0], s[1], s[2], s[3]),
                                (const float *)tiles + at);
                }
        }
        first += part;
        if (first == groups) { /* the next record */
            first = 0;
            tiles += SCALES_BYTES + GROUP_BYTES * groups;
        }
        if (SUBTOTALS && (i % SUBTOTAL_PARTS == SUBTOTAL_PARTS - 1 || i == parts - 1))
            for (int m = 0; m < MT; m++)
                add_subtotal_neon(sums + m * MAX_PANELS * PANEL, subtotals + m * MAX_PANELS * PANEL);
    }
}

#define KERNEL(TABLE, SUBTOTALS, MT, QUADS) static void TABLE##_tile_##MT(TILE_KERNEL_PARAMETERS) {                    \
        (void)stride, (void)ahead, neon_tile(x, tiles, blocks, groups, table, sums, add_group_##TABLE, 4, SUBTOTALS, MT, QUADS); }
KERNEL(exact, 1, 1, 4) KERNEL(exact, 1, 2, 2) KERNEL(exact, 1, 3, 1) KERNEL(exact, 1, 4, 1)
KERNEL(rounded, 0, 1, 4) KERNEL(rounded, 0, 2, 2) KERNEL(rounded, 0, 3, 1) KERNEL(rounded, 0, 4, 1)
#undef KERNEL

static const Engine neon_engines[2] = {
    {.x_order = FP32_QUADS, .make_table = exact_table,
     .kernel = {{0}, {exact_tile_1}, {exact_tile_2}, {exact_tile_3}, {exact_tile_4}}},
    {.x_order = FP32_QUADS, .make_table = rounded_table,
     .kernel = {{0}, {rounded_tile_1}, {rounded_tile_2}, {rounded_tile_3}, {rounded_tile_4}}},
};

/* What the rounded table loses is less than what rounding each weight to bf16 does, as the reference does. */
static int gemm_4bit_2_neon(const Product *p) { return tile_product(&neon_engines[p->dtype == BF16], p); }
#endif
