/* GEMV, rung 3: rung 2 with pairs of bf16. Half the instructions: each look-up gives 32 weights, each vdpbf16ps uses 32.
 *
 *     lane i    bytes 4i .. 4i+3    k0 k1 | k2 k3 | k4 k5 | k6 k7   (hi lo), counted from k = 8i
 *     as words  lower: k0..k3, upper: k4..k7;  >> 4*s brings down the pair  8i + {1 0 3 2}[s]  and that + 4
 *
 *     x_order   [K/128 chunks][4 shifts][16 lanes] pairs
 *
 * The table is gemm_4bit_4_avx512_bf16.c's: it holds the sixteen values twice, multiplied by a factor by which the sums
 * are divided at the end. The loop over rows is gemv_4bit_2_avx512.c's.
 *
 * cc -O3 -mfma -mf16c -mavx512dq -mavx512vl -mavx512bf16 -DREFQ4_AVX512_BF16 -fsyntax-only gemv_4bit_3_avx512_bf16.c
 */
#include "simd.h"
#include "gemm_4bit_4_avx512_bf16.c" /* bf16_table */
#include "gemv_4bit_2_avx512.c"      /* gemv_rows, run_gemv */

static inline __attribute__((always_inline)) __m512 bf16_chunk(__m512i codes, const void *x_order, const void *table) {
    const uint32_t *x = x_order;
    __m512i values = _mm512_loadu_si512(table);
    __m512 sum = _mm512_setzero_ps();
    UNROLL for (int s = 0; s < 4; s++)
        sum = _mm512_dpbf16_ps(sum, (__m512bh)_mm512_permutexvar_epi16(_mm512_srli_epi16(codes, 4 * s), values),
                               (__m512bh)_mm512_load_si512(x + 16 * s));
    return sum;
}

static void bf16_rows_1(void *plan, int64_t item, int thread) { gemv_rows(plan, item, thread, bf16_chunk, 256, 1); }
static void bf16_rows_2(void *plan, int64_t item, int thread) { gemv_rows(plan, item, thread, bf16_chunk, 256, 2); }
static void bf16_rows_4(void *plan, int64_t item, int thread) { gemv_rows(plan, item, thread, bf16_chunk, 256, 4); }

static int gemv_4bit_3_avx512_bf16(const Product *p) {
    int64_t chunks = ceil_div(p->K, CHUNK);
    uint32_t *order = scratch((size_t)(chunks * CHUNK) * 2);
    if (!order) return 0;
    const uint16_t *x = p->x;
    for (int64_t c = 0; c < chunks; c++)
        for (int s = 0; s < 4; s++)
            for (int lane = 0; lane < 16; lane++) {
                int64_t k = c * CHUNK + 8 * lane + (s ^ 1); /* K is a multiple of 32: k and k + 4 end together */
                order[c * (CHUNK / 2) + 16 * s + lane] = k < p->K ? x[k] | (uint32_t)x[k + 4] << 16 : 0;
            }
    _Alignas(64) uint8_t table[64];
    GemvPlan plan = {p, order, table, bf16_table(p->weight.code, table), NULL};
    return run_gemv(bf16_rows_1, bf16_rows_2, bf16_rows_4, &plan, order);
}
