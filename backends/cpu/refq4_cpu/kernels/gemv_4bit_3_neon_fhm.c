/* GEMV, rung 3 for NEON with FHM: rung 2 with fmlal, which multiplies fp16 and adds in fp32 (gemm_4bit_3_neon_fhm.c).
 *
 *     words     | k = 0 2 4 6 | 8 10 12 14 |      eight fp16, from the high nibbles of sixteen bytes; x in the same order
 *     fmlal     four sums += lower halves         fmlal2    the same four += upper halves
 *
 * The loop over rows is gemv_4bit_2_neon.c's. It is for bf16 activations, as fp16: halves_neon.h.
 *
 * cc -O3 -march=armv8.2-a+fp16fml -DREFQ4_NEON -DREFQ4_NEON_FHM -fsyntax-only gemv_4bit_3_neon_fhm.c
 */
#include "simd.h"
#include "gemv_4bit_2_neon.c" /* gemv_item_neon, run_gemv_neon */
#include "halves_neon.h"

static inline __attribute__((always_inline)) void add_chunk_halves(float32x4_t sum[2], uint8x16_t bytes,
                                                                   const void *x_order, const uint8x16x4_t *t) {
    const uint16_t *x = x_order;
    UNROLL for (int low = 0; low < 2; low++) {
        uint16x8_t w[2];
        lookup_words(nibbles(bytes, low), t, 2, w);
        UNROLL for (int i = 0; i < 2; i++) {
            float16x8_t weights = vreinterpretq_f16_u16(w[i]);
            float16x8_t value = vreinterpretq_f16_u16(vld1q_u16(x + 16 * low + 8 * i));
            sum[low] = vfmlalq_low_f16(sum[low], weights, value);
            sum[low] = vfmlalq_high_f16(sum[low], weights, value);
        }
    }
}

static void halves_rows(void *plan, int64_t item, int thread) { (void)thread, gemv_item_neon(plan, item, add_chunk_halves, 2); }

static int halves_gemv(const Product *p, float undo) {
    uint16_t *x = scratch((size_t)p->K * 2);
    if (!x) return 0;
    for (int64_t k = 0; k < p->K; k++) x[x_place(k)] = ((const uint16_t *)p->x)[k];
    GemvPlanNeon plan = {.p = p, .x = x, .part = min64(p->weight.blocksize, 8 * PART_GROUPS_BF16)};
    plan.undo_scale = half_table(p->weight.code, plan.table) * undo;
    run_gemv_neon(halves_rows, &plan);
    free(x);
    return 1;
}

static int gemv_4bit_3_neon_fhm(const Product *p) { return product_in_halves(p, halves_gemv, gemv_4bit_2_neon); }
