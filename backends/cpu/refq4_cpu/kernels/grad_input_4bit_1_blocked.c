/* x times a weight that is stored the other way round: the gradient of a layer's input, and experts stored as [K, N].
 *
 *     y[m][n] = sum over k of x[m][k] * w[k][n]         w: K rows of N codes, blocks along n
 *
 * Along a row of w lie the outputs, not the terms of a sum, so a row's codes are decoded with their scale and added to
 * all outputs at once. 64 columns are decoded at a time, 64 rows deep, and every token passes over that tile:
 *
 *                 n ->                                   one work item: 64 columns, a chunk of tokens
 *            k    [ 64 x 64 tile, fp32, 16 KB ]
 *            |                 |
 *     x: six tokens  ->  6 x 16 sums in registers, 64 steps of k   ->  sums[m][64] += them     (per thread)
 *
 * The full weight is never in memory. A sum is a sum of subtotals of 64 products (refq4.h says why). Any shape will do:
 * blocks may straddle rows, and rows may begin in the middle of a byte.
 *
 * cc -O3 -DREFQ4_TIER=0 -fsyntax-only grad_input_4bit_1_blocked.c
 */
#include "threads.c"
#if REFQ4_TIER >= 1
#include "simd.h"
#else
#define UNROLL
#endif

typedef float Eight __attribute__((vector_size(32), aligned(4), may_alias));

enum { GRAD_COLUMNS = 64, GRAD_DEPTH = 64, GRAD_TOKENS = 6, GRAD_CHUNK = 240 }; /* a chunk: of tokens */
_Static_assert(GRAD_COLUMNS % 16 == 0, "a tile is whole groups of sixteen columns");

typedef struct {
    const Product *p;
    const float *x; /* [M, K] as fp32 */
    float *sums;    /* per thread: [GRAD_CHUNK][GRAD_COLUMNS] */
    int64_t chunks;
} GradPlan;

static inline void add_product(Eight *sum, const Eight *w, float x) {
#if REFQ4_TIER >= 1
    *sum = (Eight)_mm256_fmadd_ps((__m256)*w, _mm256_set1_ps(x), (__m256)*sum);
#else
    *sum += *w * x;
#endif
}

/* `count` elements of one block, from `first` on, where a byte begins. */
static inline void decode_bytes(const Weight *w, int64_t first, int64_t count, float scale, float *out) {
    const uint8_t *in = w->packed + first / 2;
    int64_t i = 0;
#if REFQ4_TIER >= 1 /* the look-up of dequantize_2_avx2.c */
    __m256 low = _mm256_mul_ps(_mm256_loadu_ps(w->code), _mm256_set1_ps(scale));
    __m256 high = _mm256_mul_ps(_mm256_loadu_ps(w->code + 8), _mm256_set1_ps(scale));
    __m256i shifts = _mm256_setr_epi32(4, 0, 12, 8, 20, 16, 28, 24);
    for (; i + 8 <= count; i += 8) {
        int32_t four;
        memcpy(&four, in + i / 2, 4);
        __m256i index = _mm256_srlv_epi32(_mm256_set1_epi32(four), shifts);
        __m256 top = _mm256_castsi256_ps(_mm256_slli_epi32(index, 28));
        _mm256_storeu_ps(out + i, _mm256_blendv_ps(_mm256_permutevar8x32_ps(low, index),
                                                   _mm256_permutevar8x32_ps(high, index), top));
    }
#endif
    for (; i < count; i++) out[i] = w->code[nibble(in, i)] * scale;
}

static void decode_run(const Weight *w, int64_t first, int64_t count, float *out) {
    for (int64_t i = 0; i < count;) {
        int64_t block = (first + i) / w->blocksize, end = min64((block + 1) * w->blocksize - first, count);
        float scale = block_scale(w, block);
        if ((first + i) & 1) out[i] = w->code[nibble(w->packed, first + i)] * scale, i++;
        if (i < end) decode_bytes(w, first + i, end - i, scale, out + i);
        i = end;
    }
}

/* sums[m][0..16) += x[m][0..depth) times sixteen columns of the tile, for MT tokens. */
static inline __attribute__((always_inline)) void multiply_columns(const float *x, int64_t stride, const float *tile,
                                                                   int64_t depth, float *sums, const int MT) {
    Eight sum[GRAD_TOKENS][2];
    UNROLL for (int m = 0; m < MT; m++) sum[m][0] = sum[m][1] = (Eight){0};
    for (int64_t k = 0; k < depth; k++, tile += GRAD_COLUMNS) {
        Eight w0 = *(const Eight *)tile, w1 = *(const Eight *)(tile + 8);
        UNROLL for (int m = 0; m < MT; m++) {
            add_product(&sum[m][0], &w0, x[m * stride + k]);
            add_product(&sum[m][1], &w1, x[m * stride + k]);
        }
    }
    UNROLL for (int m = 0; m < MT; m++) {
        *(Eight *)(sums + m * GRAD_COLUMNS) += sum[m][0];
        *(Eight *)(sums + m * GRAD_COLUMNS + 8) += sum[m][1];
    }
}

static void multiply_tile(const float *x, int64_t stride, const float *tile, int64_t depth, float *sums, int64_t tokens) {
    for (int n = 0; n < GRAD_COLUMNS; n += 16) switch (tokens) { /* a constant count keeps the sums in registers */
        case 1: multiply_columns(x, stride, tile + n, depth, sums + n, 1); break;
        case 2: multiply_columns(x, stride, tile + n, depth, sums + n, 2); break;
        case 3: multiply_columns(x, stride, tile + n, depth, sums + n, 3); break;
        case 4: multiply_columns(x, stride, tile + n, depth, sums + n, 4); break;
        case 5: multiply_columns(x, stride, tile + n, depth, sums + n, 5); break;
        default: multiply_columns(x, stride, tile + n, depth, sums + n, GRAD_TOKENS);
        }
}

static void grad_item(void *context, int64_t item, int thread) {
    const GradPlan *plan = context;
    const Product *p = plan->p;
    int64_t n0 = item / plan->chunks * GRAD_COLUMNS, columns = min64(GRAD_COLUMNS, p->N - n0), chunk = item % plan->chunks;
    int64_t m0 = p->M * chunk / plan->chunks, m1 = p->M * (chunk + 1) / plan->chunks;
    float *sums = plan->sums + thread * GRAD_CHUNK * GRAD_COLUMNS;
    _Alignas(64) float tile[GRAD_DEPTH * GRAD_COLUMNS] = {0};
    memset(sums, 0, (size_t)((m1 - m0) * GRAD_COLUMNS) * sizeof(float));
    for (int64_t k0 = 0; k0 < p->K; k0 += GRAD_DEPTH) {
        int64_t depth = min64(GRAD_DEPTH, p->K - k0);
        for (int64_t k = 0; k < depth; k++) decode_run(&p->weight, (k0 + k) * p->N + n0, columns, tile + k * GRAD_COLUMNS);
        for (int64_t m = m0; m < m1; m += GRAD_TOKENS)
            multiply_tile(plan->x + m * p->K + k0, p->K, tile, depth, sums + (m - m0) * GRAD_COLUMNS, min64(GRAD_TOKENS, m1 - m));
    }
    for (int64_t m = m0; m < m1; m++)
        for (int64_t n = 0; n < columns; n++) {
            float bias = p->bias ? load_as_fp32(p->bias, p->dtype, n0 + n) : 0;
            store_from_fp32(p->y, p->dtype, m * p->N + n0 + n, sums[(m - m0) * GRAD_COLUMNS + n] + bias);
        }
}

static int grad_input_4bit_1_blocked(const Product *p) {
    float *x = scratch((size_t)(p->M * p->K) * 4), *sums = scratch((size_t)p->threads * GRAD_CHUNK * GRAD_COLUMNS * 4);
    int ok = x && sums;
    if (ok) {
        for (int64_t i = 0; i < p->M * p->K; i++) x[i] = load_as_fp32(p->x, p->dtype, i);
        GradPlan plan = {p, x, sums, ceil_div(p->M, GRAD_CHUNK)};
        run_parallel(grad_item, &plan, ceil_div(p->N, GRAD_COLUMNS) * plan.chunks, p->M * p->N * p->K > 1 << 17 ? p->threads : 1);
    }
    free(x);
    free(sums);
    return ok;
}
