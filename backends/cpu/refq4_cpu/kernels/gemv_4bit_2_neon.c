/* GEMV, rung 2 for NEON: one token on the canonical layout. Lanes run along K, so nothing must be rearranged.
 *
 * 16 bytes of a row are 32 codes, one chunk: sixteen even k in the high nibbles, sixteen odd ones in the low ones. The
 * look-up (neon_lookup.h) leaves both in order, so x is put apart once per call:
 *
 *     x_order   [K/32 chunks][even k, odd k][16]
 *
 * Blocks are whole chunks (a blocksize of 32 or more), so there is no end of a row to care for. Four rows go together
 * and share the loads of x; a part of a block is summed, then scaled and added to the row's subtotal.
 *
 * cc -O3 -DREFQ4_NEON -fsyntax-only gemv_4bit_2_neon.c
 */
#ifndef GEMV_4BIT_2_NEON_C
#define GEMV_4BIT_2_NEON_C
#include "simd.h"
#include "driver.h"
#include "neon_lookup.h"

enum { CHUNK_NEON = 32, ROWS_NEON = 4, SETS_NEON = 8 }; /* an item is 8 sets of 4 rows */
_Static_assert(CHUNK_NEON / 2 == sizeof(uint8x16_t), "a chunk's codes are one register");

typedef struct {
    const Product *p;
    const void *x; /* in the order above, fp32 or bf16 */
    _Alignas(16) uint8_t table[64];
    float undo_scale;
    int64_t part; /* elements summed before the sum is scaled */
} GemvPlanNeon;

/* sum[0], sum[1] += a chunk of a row times its x */
typedef void AddChunk(float32x4_t sum[2], uint8x16_t bytes, const void *x_order, const uint8x16x4_t *t);

/* Four rows from `row` on; at the end of the weight a missing row repeats the last one and is not written. The hardware's
 * prefetcher begins anew with every row, so the next four are asked for while these are multiplied. */
static inline __attribute__((always_inline)) void gemv_rows_neon(const GemvPlanNeon *plan, int64_t row,
                                                                 AddChunk *const add_chunk, const int x_size) {
    const Product *p = plan->p;
    const Weight *w = &p->weight;
    const uint8x16x4_t t = table_planes(plan->table);
    int64_t K = p->K, blocks = K / w->blocksize, rows = min64(ROWS_NEON, p->N - row), part = plan->part;
    const uint8_t *bytes[ROWS_NEON], *x = plan->x;
    int64_t block[ROWS_NEON];
    float32x4_t total[ROWS_NEON], subtotal[ROWS_NEON];
    UNROLL for (int r = 0; r < ROWS_NEON; r++) {
        int64_t n = row + min64(r, rows - 1);
        bytes[r] = w->packed + n * (K / 2);
        block[r] = n * blocks;
        total[r] = subtotal[r] = vdupq_n_f32(0);
    }
    for (int64_t b = 0, k = 0; b < blocks; b++) {
        float scale[ROWS_NEON];
        UNROLL for (int r = 0; r < ROWS_NEON; r++) scale[r] = block_scale(w, block[r] + b);
        for (int64_t end = k + w->blocksize; k < end;) {
            float32x4_t sum[ROWS_NEON][2];
            UNROLL for (int r = 0; r < ROWS_NEON; r++) sum[r][0] = sum[r][1] = vdupq_n_f32(0);
            for (int64_t stop = k + part; k < stop; k += CHUNK_NEON, x += CHUNK_NEON * x_size)
                UNROLL for (int r = 0; r < ROWS_NEON; r++) {
                    const uint8_t *at = bytes[r] + k / 2;
                    __builtin_prefetch(at + ROWS_NEON * (K / 2));
                    add_chunk(sum[r], vld1q_u8(at), x, &t);
                }
            UNROLL for (int r = 0; r < ROWS_NEON; r++)
                subtotal[r] = vfmaq_f32(subtotal[r], vaddq_f32(sum[r][0], sum[r][1]), vdupq_n_f32(scale[r]));
            if (k % SUBTOTAL_ELEMENTS != 0 && k != K) continue;
            UNROLL for (int r = 0; r < ROWS_NEON; r++) {
                total[r] = vaddq_f32(total[r], subtotal[r]);
                subtotal[r] = vdupq_n_f32(0);
            }
        }
    }
    float sums[ROWS_NEON];
    vst1q_f32(sums, sums_of_lanes(total[0], total[1], total[2], total[3]));
    write_outputs(p, sums, plan->undo_scale, 0, row, rows);
}

static inline __attribute__((always_inline)) void gemv_item_neon(const GemvPlanNeon *plan, int64_t item,
                                                                 AddChunk *const add_chunk, const int x_size) {
    int64_t last = min64((item + 1) * SETS_NEON * ROWS_NEON, plan->p->N);
    for (int64_t row = item * SETS_NEON * ROWS_NEON; row < last; row += ROWS_NEON)
        gemv_rows_neon(plan, row, add_chunk, x_size);
}

/* The place of element k in x_order. */
static inline int64_t x_place(int64_t k) { return k / CHUNK_NEON * CHUNK_NEON + k % 2 * (CHUNK_NEON / 2) + k % CHUNK_NEON / 2; }

static void run_gemv_neon(WorkFn item, GemvPlanNeon *plan) {
    const Product *p = plan->p;
    run_parallel(item, plan, ceil_div(p->N, ROWS_NEON * SETS_NEON), p->N * p->K > 1 << 17 ? p->threads : 1);
}

static inline __attribute__((always_inline)) void add_chunk_fp32(float32x4_t sum[2], uint8x16_t bytes,
                                                                 const float *x, const uint8x16x4_t *t, const int planes) {
    UNROLL for (int low = 0; low < 2; low++) {
        float32x4_t w[4];
        lookup_fp32(nibbles(bytes, low), t, planes, w);
        UNROLL for (int i = 0; i < 4; i++) sum[low] = vfmaq_f32(sum[low], w[i], vld1q_f32(x + 16 * low + 4 * i));
    }
}

static inline __attribute__((always_inline)) void add_chunk_exact(float32x4_t sum[2], uint8x16_t bytes, const void *x,
                                                                  const uint8x16x4_t *t) {
    add_chunk_fp32(sum, bytes, x, t, 4);
}

static inline __attribute__((always_inline)) void add_chunk_rounded(float32x4_t sum[2], uint8x16_t bytes, const void *x,
                                                                    const uint8x16x4_t *t) {
    add_chunk_fp32(sum, bytes, x, t, 2);
}

static void exact_rows(void *plan, int64_t item, int thread) { (void)thread, gemv_item_neon(plan, item, add_chunk_exact, 4); }
static void rounded_rows(void *plan, int64_t item, int thread) { (void)thread, gemv_item_neon(plan, item, add_chunk_rounded, 4); }

static int gemv_4bit_2_neon(const Product *p) {
    float *x = scratch((size_t)p->K * 4);
    if (!x) return 0;
    for (int64_t k = 0; k < p->K; k++) x[x_place(k)] = load_as_fp32(p->x, p->dtype, k);
    GemvPlanNeon plan = {.p = p, .x = x, .part = min64(p->weight.blocksize, 8 * (p->dtype == BF16 ? PART_GROUPS_BF16 : PART_GROUPS_FP32))};
    plan.undo_scale = (p->dtype == BF16 ? rounded_table : exact_table)(p->weight.code, plan.table);
    run_gemv_neon(p->dtype == BF16 ? rounded_rows : exact_rows, &plan);
    free(x);
    return 1;
}
#endif
