/* x times a weight that is stored the other way round: the gradient of a layer's input, and experts stored as [K, N].
 *
 *     y[m][n] = sum over k of x[m][k] * w[k][n]         w: K rows of N codes, blocks along n
 *
 * Along a row of w lie the outputs, not the terms of a sum, so a row's codes are decoded with their scale and added to
 * all outputs at once. 128 columns are decoded at a time, 16 or 32 rows deep, and every token passes over it:
 *
 *                 n ->                                   one work item: 128 columns, a chunk of tokens
 *            k    [ 16 x 128 tile, fp32, 8 KB ]
 *            |                 |
 *     x: six tokens  ->  6 x 16 sums in registers, 16 steps of k   ->  sums[m][128] += them     (per thread)
 *                        (AVX-512: 6 x 64, and 32 steps; NEON: 6 x 8)
 *
 * Rows of w are far apart in memory, so the 64 bytes of each are asked for one tile ahead.
 *
 * x is packed first, [tile of up to six tokens][k][token], so that a step's values lie side by side: rows of x that are
 * a multiple of 4 KB apart would all want the same lines of the first cache.
 *
 * The full weight is never in memory. Any shape will do: blocks may straddle rows, and rows may begin in the middle of
 * a byte. A long sum is taken in three levels, since each addition rounds at the size of what was added (refq4.h):
 *
 *     16 products (AVX-512: 32)  ->  sums, up to SUBTOTAL_ELEMENTS products  ->  totals
 *
 * cc -O3 -fsyntax-only grad_input_4bit_1_blocked.c
 */
#include "threads.c"
#ifdef REFQ4_NEON
#include "neon_lookup.h"
#elif defined REFQ4_AVX2
#include "simd.h"
#else
#define UNROLL
#endif

#ifdef REFQ4_AVX512
enum { GRAD_LANES = 16, GRAD_VECTORS = 4 }; /* of sums, for each of six tokens */
#elif defined REFQ4_NEON
enum { GRAD_LANES = 4, GRAD_VECTORS = 2 }; /* twice as many would not fit 32 registers beside x */
#else
enum { GRAD_LANES = 8, GRAD_VECTORS = 2 };
#endif
typedef float Lanes __attribute__((vector_size(4 * GRAD_LANES), aligned(4), may_alias));

enum { GRAD_COLUMNS = 128, GRAD_TOKENS = 6, GRAD_CHUNK = 240 }; /* a chunk: of tokens */
#ifdef REFQ4_AVX512
enum { GRAD_DEPTH = 32 }; /* 16 would take 4 % longer */
#elif defined REFQ4_NEON || defined REFQ4_AVX2
enum { GRAD_DEPTH = 16 };
#else
enum { GRAD_DEPTH = 8 }; /* plain C rounds each product, too: shorter subtotals */
#endif
enum { GRAD_SUMS = (GRAD_CHUNK + GRAD_TOKENS) * GRAD_COLUMNS }; /* of a thread */
_Static_assert(SUBTOTAL_ELEMENTS % GRAD_DEPTH == 0, "a subtotal is whole tiles");
_Static_assert(GRAD_COLUMNS / 2 == 64, "a row of a tile is one cache line of codes, and whole groups of 16 or 64");

typedef struct {
    const Product *p;
    float *x;    /* packed, fp32 */
    float *sums; /* per thread: a chunk's tokens, [.][GRAD_COLUMNS], then their totals */
    int64_t token_tiles, chunks;
} GradPlan;

/* Tokens are split evenly over tiles, and tiles over chunks: a chunk has at most GRAD_CHUNK + GRAD_TOKENS of them. */
static inline int64_t grad_start(const GradPlan *plan, int64_t tile) { return plan->p->M * tile / plan->token_tiles; }

static void grad_pack(void *context, int64_t tile, int thread) {
    (void)thread;
    const GradPlan *plan = context;
    const Product *p = plan->p;
    int64_t first = grad_start(plan, tile), mt = grad_start(plan, tile + 1) - first;
    for (int64_t m = 0; m < mt; m++)
        for (int64_t k = 0; k < p->K; k++)
            plan->x[first * p->K + k * mt + m] = load_as_fp32(p->x, p->dtype, (first + m) * p->K + k);
}

static inline void add_product(Lanes *sum, const Lanes *w, float x) {
#ifdef REFQ4_AVX512
    *sum = (Lanes)_mm512_fmadd_ps((__m512)*w, _mm512_set1_ps(x), (__m512)*sum);
#elif defined REFQ4_AVX2
    *sum = (Lanes)_mm256_fmadd_ps((__m256)*w, _mm256_set1_ps(x), (__m256)*sum);
#elif defined REFQ4_NEON
    *sum = (Lanes)vfmaq_f32((float32x4_t)*sum, (float32x4_t)*w, vdupq_n_f32(x));
#else
    *sum += *w * x;
#endif
}

/* `count` elements of one block, from `first` on, where a byte begins. */
static inline void decode_bytes(const Weight *w, int64_t first, int64_t count, float scale, float *out) {
    const uint8_t *in = w->packed + first / 2;
    int64_t i = 0;
#ifdef REFQ4_AVX512 /* the look-up of dequantize_2_avx512.c */
    __m512 values = _mm512_mul_ps(_mm512_loadu_ps(w->code), _mm512_set1_ps(scale));
    for (; i + 16 <= count; i += 16) {
        __m512i bytes = _mm512_cvtepu8_epi64(_mm_loadl_epi64((const __m128i *)(in + i / 2)));
        __m512i index = _mm512_or_si512(_mm512_srli_epi64(bytes, 4), _mm512_slli_epi64(bytes, 32));
        _mm512_storeu_ps(out + i, _mm512_permutexvar_ps(index, values));
    }
#elif defined REFQ4_AVX2 /* the look-up of dequantize_2_avx2.c */
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
#elif defined REFQ4_NEON
    float values[16];
    for (int j = 0; j < 16; j++) values[j] = w->code[j] * scale;
    const uint8x16x4_t t = table_planes(values);
    for (; i + 16 <= count; i += 16) {
        uint8x8_t bytes = vld1_u8(in + i / 2), high = vshr_n_u8(bytes, 4), low = vand_u8(bytes, vdup_n_u8(15));
        float32x4_t decoded[4];
        lookup_fp32(vzip1q_u8(vcombine_u8(high, high), vcombine_u8(low, low)), &t, 4, decoded);
        UNROLL for (int j = 0; j < 4; j++) vst1q_f32(out + i + 4 * j, decoded[j]);
    }
#endif
    for (; i < count; i++) out[i] = w->code[nibble(in, i)] * scale;
}

static void decode_run(const Weight *w, int64_t first, int64_t count, float *out) {
    for (int64_t i = 0, block = first / w->blocksize; i < count; block++) {
        int64_t end = min64((block + 1) * w->blocksize - first, count);
        float scale = block_scale(w, block);
        if ((first + i) & 1) out[i] = w->code[nibble(w->packed, first + i)] * scale, i++;
        if (i < end) decode_bytes(w, first + i, end - i, scale, out + i);
        i = end;
    }
}

/* sums[m][..] += x[0..depth)[m] times GRAD_VECTORS registers of columns of the tile, for MT tokens. */
static inline __attribute__((always_inline)) void multiply_columns(const float *x, const float *tile, int64_t depth,
                                                                   float *sums, const int MT) {
    Lanes sum[GRAD_TOKENS][GRAD_VECTORS];
    UNROLL for (int m = 0; m < MT; m++) UNROLL for (int v = 0; v < GRAD_VECTORS; v++) sum[m][v] = (Lanes){0};
    for (int64_t k = 0; k < depth; k++, tile += GRAD_COLUMNS, x += MT) {
        Lanes w[GRAD_VECTORS];
        UNROLL for (int v = 0; v < GRAD_VECTORS; v++) w[v] = *(const Lanes *)(tile + v * GRAD_LANES);
        UNROLL for (int m = 0; m < MT; m++)
            UNROLL for (int v = 0; v < GRAD_VECTORS; v++) add_product(&sum[m][v], &w[v], x[m]);
    }
    UNROLL for (int m = 0; m < MT; m++)
        UNROLL for (int v = 0; v < GRAD_VECTORS; v++) *(Lanes *)(sums + m * GRAD_COLUMNS + v * GRAD_LANES) += sum[m][v];
}

static void multiply_tile(const float *x, const float *tile, int64_t depth, float *sums, int64_t tokens) {
    for (int n = 0; n < GRAD_COLUMNS; n += GRAD_VECTORS * GRAD_LANES) switch (tokens) { /* a constant count keeps the sums in registers */
        case 1: multiply_columns(x, tile + n, depth, sums + n, 1); break;
        case 2: multiply_columns(x, tile + n, depth, sums + n, 2); break;
        case 3: multiply_columns(x, tile + n, depth, sums + n, 3); break;
        case 4: multiply_columns(x, tile + n, depth, sums + n, 4); break;
        case 5: multiply_columns(x, tile + n, depth, sums + n, 5); break;
        default: multiply_columns(x, tile + n, depth, sums + n, GRAD_TOKENS);
        }
}

/* totals += sums, which become zero */
static void grad_add_sums(float *totals, float *sums, int64_t count) {
    for (int64_t i = 0; i < count; i++) totals[i] += sums[i];
    memset(sums, 0, (size_t)count * sizeof(float));
}

static void grad_item(void *context, int64_t item, int thread) {
    const GradPlan *plan = context;
    const Product *p = plan->p;
    int64_t n0 = item / plan->chunks * GRAD_COLUMNS, columns = min64(GRAD_COLUMNS, p->N - n0);
    int64_t chunk = item % plan->chunks;
    int64_t t0 = plan->token_tiles * chunk / plan->chunks, t1 = plan->token_tiles * (chunk + 1) / plan->chunks;
    int64_t m0 = grad_start(plan, t0), m1 = grad_start(plan, t1);
    float *sums = plan->sums + thread * 2 * GRAD_SUMS, *totals = sums + GRAD_SUMS;
    _Alignas(64) float tile[GRAD_DEPTH * GRAD_COLUMNS] = {0};
    int64_t count = (m1 - m0) * GRAD_COLUMNS;
    memset(sums, 0, (size_t)count * sizeof(float));
    memset(totals, 0, (size_t)count * sizeof(float));
    for (int64_t k0 = 0; k0 < p->K; k0 += GRAD_DEPTH) {
        int64_t depth = min64(GRAD_DEPTH, p->K - k0);
        for (int64_t k = 0; k < depth; k++) {
            int64_t first = (k0 + k) * p->N + n0;
            __builtin_prefetch(p->weight.packed + (first + GRAD_DEPTH * p->N) / 2);
            decode_run(&p->weight, first, columns, tile + k * GRAD_COLUMNS);
        }
        for (int64_t t = t0; t < t1; t++) {
            int64_t m = grad_start(plan, t), mt = grad_start(plan, t + 1) - m;
            multiply_tile(plan->x + m * p->K + k0 * mt, tile, depth, sums + (m - m0) * GRAD_COLUMNS, mt);
        }
        if ((k0 + depth) % SUBTOTAL_ELEMENTS == 0 || k0 + depth == p->K) grad_add_sums(totals, sums, count);
    }
    for (int64_t m = m0; m < m1; m++)
        for (int64_t n = 0; n < columns; n++) {
            float bias = p->bias ? load_as_fp32(p->bias, p->dtype, n0 + n) : 0;
            store_from_fp32(p->y, p->dtype, m * p->N + n0 + n, totals[(m - m0) * GRAD_COLUMNS + n] + bias);
        }
}

static int grad_input_4bit_1_blocked(const Product *p) {
    GradPlan plan = {.p = p, .token_tiles = ceil_div(p->M, GRAD_TOKENS), .chunks = ceil_div(p->M, GRAD_CHUNK)};
    plan.x = scratch((size_t)(p->M * p->K) * 4);
    plan.sums = scratch((size_t)p->threads * 2 * GRAD_SUMS * sizeof(float));
    int ok = plan.x && plan.sums;
    if (ok) {
        int64_t items = ceil_div(p->N, GRAD_COLUMNS) * plan.chunks;
        run_parallel(grad_pack, &plan, plan.token_tiles, p->M * p->K > 1 << 16 ? p->threads : 1);
        run_parallel(grad_item, &plan, items, p->M * p->N * p->K > 1 << 17 ? p->threads : 1);
    }
    free(plan.x);
    free(plan.sums);
    return ok;
}
