/* GEMV, rung 2 for AVX2: one token of bf16 on the canonical layout. Lanes run along K, so nothing must be rearranged.
 *
 * 32 bytes of a row are 64 codes. The look-up is gemm_4bit_3_avx2_bytes.c's: high nibbles and low nibbles, two vpshufb
 * each, and words put together from their results. What comes out, for bytes 0 .. 31 and step = low nibble?, i, odd?:
 *
 *     lanes 0 .. 3    bytes 8i + odd + {0 2 4 6}           element 2 * byte + low
 *     lanes 4 .. 7    the same + 16
 *
 * so x is put into that order once per call:
 *
 *     x_order   [K/64 chunks][low][i][odd][8 lanes]  fp32
 *
 * Lanes 0-3 and 4-7 are the two halves of a chunk, so a blocksize of 32 needs two scales, any larger one a single one.
 * Four rows go together and share the loads of x. A last chunk of 32 codes is copied, for a load reads 32 bytes.
 *
 * cc -O3 -mavx2 -mfma -mf16c -DREFQ4_AVX2 -fsyntax-only gemv_4bit_2_avx2.c
 */
#include "simd.h"
#include "driver.h"
#include "gemm_4bit_3_avx2_bytes.c" /* byte_lookup, byte_table */

enum { CHUNK_AVX2 = 64, ROWS_AVX2 = 4, SETS_AVX2 = 8 }; /* an item is 8 sets of 4 rows */
_Static_assert(CHUNK_AVX2 / 2 == sizeof(__m256i), "a chunk's codes are one register");

typedef struct GemvPlanAvx2 {
    const Product *p;
    const float *x; /* in the order above */
    _Alignas(32) uint8_t table[64];
    float undo_scale;
    void (*four_rows)(const struct GemvPlanAvx2 *plan, int64_t row, const ByteTable *t); /* by scales per chunk */
} GemvPlanAvx2;

static inline __attribute__((always_inline)) __m256 chunk_sum_avx2(__m256i bytes, const float *x, const ByteTable *t) {
    __m256 sum[2] = {_mm256_setzero_ps(), _mm256_setzero_ps()};
    UNROLL for (int low = 0; low < 2; low++) {
        __m256 w[2][2];
        byte_lookup(_mm256_and_si256(low ? bytes : _mm256_srli_epi32(bytes, 4), t->nibble), t, w);
        UNROLL for (int i = 0; i < 2; i++)
            UNROLL for (int odd = 0; odd < 2; odd++)
                sum[i] = _mm256_fmadd_ps(w[i][odd], _mm256_load_ps(x + 8 * (4 * low + 2 * i + odd)), sum[i]);
    }
    return _mm256_add_ps(sum[0], sum[1]);
}

/* Four rows from `row` on; at the end of the weight a missing row repeats the last one and is not written. */
static inline __attribute__((always_inline)) void gemv_rows_avx2(const GemvPlanAvx2 *plan, int64_t row,
                                                                 const ByteTable *t, const int per_chunk) {
    const Product *p = plan->p;
    const Weight *w = &p->weight;
    int64_t K = p->K, blocks = K / w->blocksize, rows = min64(ROWS_AVX2, p->N - row);
    int shift = __builtin_ctzll((unsigned long long)w->blocksize);
    const uint8_t *bytes[ROWS_AVX2];
    int64_t block[ROWS_AVX2];
    __m256 total[ROWS_AVX2];
    for (int r = 0; r < ROWS_AVX2; r++) {
        int64_t n = row + min64(r, rows - 1);
        bytes[r] = w->packed + n * (K / 2);
        block[r] = n * blocks;
        total[r] = _mm256_setzero_ps();
    }
    for (int64_t k = 0; k < K; k += CHUNK_AVX2) {
        int64_t here = min64(CHUNK_AVX2, K - k), b = k >> shift;
        UNROLL for (int r = 0; r < ROWS_AVX2; r++) {
            const uint8_t *at = bytes[r] + k / 2;
            _Alignas(32) uint8_t end[32] = {0};
            if (here < CHUNK_AVX2) at = memcpy(end, at, 16);
            else _mm_prefetch((const char *)at + ROWS_AVX2 * (K / 2), _MM_HINT_T0); /* the next four rows */
            __m256 scale = _mm256_set1_ps(block_scale(w, block[r] + b));
            if (per_chunk == 2 && here == CHUNK_AVX2)
                scale = _mm256_insertf128_ps(scale, _mm_set1_ps(block_scale(w, block[r] + b + 1)), 1);
            __m256 sum = chunk_sum_avx2(_mm256_loadu_si256((const __m256i *)at), plan->x + k, t);
            total[r] = _mm256_fmadd_ps(sum, scale, total[r]);
        }
    }
    for (int64_t r = 0; r < rows; r++) {
        __m128 four = _mm_add_ps(_mm256_castps256_ps128(total[r]), _mm256_extractf128_ps(total[r], 1));
        four = _mm_hadd_ps(four, four);
        float sum = _mm_cvtss_f32(_mm_hadd_ps(four, four));
        write_outputs(p, &sum, plan->undo_scale, 0, row + r, 1);
    }
}

static void four_rows_1_scale(const GemvPlanAvx2 *plan, int64_t row, const ByteTable *t) { gemv_rows_avx2(plan, row, t, 1); }

static void four_rows_2_scales(const GemvPlanAvx2 *plan, int64_t row, const ByteTable *t) { gemv_rows_avx2(plan, row, t, 2); }

static void gemv_item_avx2(void *context, int64_t item, int thread) {
    (void)thread;
    const GemvPlanAvx2 *plan = context;
    const ByteTable t = byte_registers(plan->table);
    int64_t last = min64((item + 1) * SETS_AVX2 * ROWS_AVX2, plan->p->N);
    for (int64_t row = item * SETS_AVX2 * ROWS_AVX2; row < last; row += ROWS_AVX2) plan->four_rows(plan, row, &t);
}

static int gemv_4bit_2_avx2(const Product *p) {
    int64_t chunks = ceil_div(p->K, CHUNK_AVX2);
    float *x = scratch((size_t)(chunks * CHUNK_AVX2) * 4);
    if (!x) return 0;
    for (int64_t i = 0; i < chunks * CHUNK_AVX2; i++) {
        int64_t lane = i % 8, odd = i / 8 % 2, half = i / 16 % 2, low = i / 32 % 2;
        int64_t byte = 8 * half + odd + 2 * (lane % 4) + 16 * (lane / 4), k = i / CHUNK_AVX2 * CHUNK_AVX2 + 2 * byte + low;
        x[i] = k < p->K ? load_as_fp32(p->x, p->dtype, k) : 0;
    }
    GemvPlanAvx2 plan = {.p = p, .x = x, .four_rows = p->weight.blocksize == 32 ? four_rows_2_scales : four_rows_1_scale};
    plan.undo_scale = byte_table(p->weight.code, plan.table);
    run_parallel(gemv_item_avx2, &plan, ceil_div(p->N, ROWS_AVX2 * SETS_AVX2), p->N * p->K > 1 << 17 ? p->threads : 1);
    free(x);
    return 1;
}
