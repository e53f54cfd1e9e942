/* GEMM, rung 3 for NEON with FHM: fmlal multiplies fp16 and adds in fp32. Nothing has to be widened first.
 *
 * It is gemm_4bit_2_neon.c with another multiply-add. The words that vzip makes of looked-up bytes (neon_lookup.h) are fp16:
 *
 *     w[0]      | row 0: k = 0 2 4 6 | row 1: k = 0 2 4 6 |      w[1] rows 2 and 3
 *     x         | x0 x2 x4 x6        | the same           |      one load, which fills both halves
 *     fmlal     four sums of row 0 += lower halves               fmlal2   those of row 1 += upper ones
 *
 * That is 36 vector instructions for 64 weights and one token, against 52 in rung 2. It is for bf16 activations, as
 * fp16 (halves_neon.h). The table is rounded to fp16, an eighth of what the reference's rounding of each weight to bf16
 * costs. For fp16 activations that would not do: the same sixteen errors in every weight add up where activations
 * have one sign, and those of the reference don't. Those stay with rung 2 and its exact table.
 *
 * cc -O3 -march=armv8.2-a+fp16fml -DREFQ4_NEON -DREFQ4_NEON_FHM -fsyntax-only gemm_4bit_3_neon_fhm.c
 */
#include "simd.h"
#include "gemm_4bit_2_neon.c" /* neon_tile */
#include "halves_neon.h"

static inline __attribute__((always_inline)) void add_group_halves(float32x4_t sum[4][4][4], const uint8_t *codes,
                                                                   const void *x, const uint8x16x4_t *t, const int MT,
                                                                   const int QUADS) {
    UNROLL for (int low = 0; low < 2; low++) {
        float16x8_t value[4];
        UNROLL for (int m = 0; m < MT; m++) {
            uint16x4_t four = vld1_u16((const uint16_t *)x + 4 * (low * MT + m));
            value[m] = vreinterpretq_f16_u16(vcombine_u16(four, four));
        }
        UNROLL for (int q = 0; q < QUADS; q++) {
            uint16x8_t w[2];
            lookup_words(nibbles(vld1q_u8(codes + 16 * q), low), t, 2, w);
            UNROLL for (int m = 0; m < MT; m++)
                UNROLL for (int r = 0; r < 4; r += 2) {
                    float16x8_t rows = vreinterpretq_f16_u16(w[r / 2]);
                    sum[m][q][r] = vfmlalq_low_f16(sum[m][q][r], rows, value[m]);
                    sum[m][q][r + 1] = vfmlalq_high_f16(sum[m][q][r + 1], rows, value[m]);
                }
        }
    }
}

#define KERNEL(MT, QUADS) static void halves_tile_##MT(TILE_KERNEL_PARAMETERS) {                                       \
        (void)stride, (void)ahead, neon_tile(x, tiles, blocks, groups, table, sums, add_group_halves, 2, 0, MT, QUADS); }
KERNEL(1, 4) KERNEL(2, 2) KERNEL(3, 1) KERNEL(4, 1)
#undef KERNEL

static int halves_product(const Product *p, float undo) {
    Engine engine = {.x_order = HALF_QUADS, .make_table = half_table, .undo_x = undo,
                     .kernel = {{0}, {halves_tile_1}, {halves_tile_2}, {halves_tile_3}, {halves_tile_4}}};
    return tile_product(&engine, p);
}

static int gemm_4bit_3_neon_fhm(const Product *p) { return product_in_halves(p, halves_product, gemm_4bit_2_neon); }
