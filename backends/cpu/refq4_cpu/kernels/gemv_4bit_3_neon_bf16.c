/* GEMV, rung 3 for NEON: rung 2 with pairs of bf16. The words that vzip makes are multiplied as they are.
 *
 *     words     | k = 0 2 | 4 6 | 8 10 | 12 14 |      and so on: eight bf16, from the high nibbles of sixteen bytes
 *     bfdot     four sums, += two products each       with x in the order of rung 2, as bf16
 *
 * That is 14 vector instructions for 32 weights (2 take the nibbles apart, 4 look up, 4 zip, 4 multiply), against 26. The
 * loop over rows is gemv_4bit_2_neon.c's. bfdot reads bf16 subnormals as zero.
 *
 * cc -O3 -march=armv8.2-a+fp16fml+bf16 -DREFQ4_NEON -DREFQ4_NEON_BF16 -fsyntax-only gemv_4bit_3_neon_bf16.c
 */
#include "simd.h"
#include "gemv_4bit_2_neon.c" /* gemv_item_neon, run_gemv_neon */

static inline __attribute__((always_inline)) void add_chunk_bf16(float32x4_t sum[2], uint8x16_t bytes, const void *x_order,
                                                                 const uint8x16x4_t *t) {
    const uint16_t *x = x_order;
    UNROLL for (int low = 0; low < 2; low++) {
        uint16x8_t w[2];
        lookup_words(nibbles(bytes, low), t, 2, w);
        UNROLL for (int i = 0; i < 2; i++)
            sum[low] = vbfdotq_f32(sum[low], vreinterpretq_bf16_u16(w[i]),
                                   vreinterpretq_bf16_u16(vld1q_u16(x + 16 * low + 8 * i)));
    }
}

static void bf16_rows(void *plan, int64_t item, int thread) { (void)thread, gemv_item_neon(plan, item, add_chunk_bf16, 2); }

static int gemv_4bit_3_neon_bf16(const Product *p) {
    uint16_t *x = scratch((size_t)p->K * 2);
    if (!x) return 0;
    for (int64_t k = 0; k < p->K; k++) x[x_place(k)] = ((const uint16_t *)p->x)[k];
    GemvPlanNeon plan = {.p = p, .x = x, .part = min64(p->weight.blocksize, 8 * PART_GROUPS_BF16)};
    plan.undo_scale = rounded_table(p->weight.code, plan.table);
    run_gemv_neon(bf16_rows, &plan);
    free(x);
    return 1;
}
