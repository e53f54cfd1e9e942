/* GEMV, rung 2: one token on the canonical layout, fp32, AVX-512. Lanes run along K, so nothing must be rearranged.
 *
 * 64 bytes of a row are 128 codes in one register, a dword for eight neighbours:
 *
 *     lane i    bytes 4i .. 4i+3    k0 k1 | k2 k3 | k4 k5 | k6 k7   (hi lo), counted from k = 8i
 *     >> 4*s    brings down         k = 8i + {1 0 3 2 5 4 7 6}[s]
 *
 * so for each s one look-up gives 16 weights, eight apart, and x is put into that order once per call:
 *
 *     x_order   [K/128 chunks][8 shifts][16 lanes]
 *
 * The eight products of a lane share a block (blocksize >= 32 is a multiple of 8), hence one scale per lane and chunk.
 * Four rows go together and share the loads of x. The end of a row is read through a mask; x is padded with zeros.
 *
 * cc -O3 -mfma -mf16c -mavx512bw -mavx512dq -mavx512vl -DREFQ4_AVX512 -fsyntax-only gemv_4bit_2_avx512.c
 */
#ifndef GEMV_4BIT_2_AVX512_C
#define GEMV_4BIT_2_AVX512_C
#include "simd.h"
#include "threads.c"

enum { CHUNK = 128, ROWS = 4, SETS = 8 }; /* an item is 8 sets of 4 rows */
_Static_assert(CHUNK / 2 == sizeof(__m512i), "a chunk's codes are one register");

typedef struct {
    const Product *p;
    const void *x; /* in kernel order */
    const void *table;
    float undo_scale;
    float *scales; /* with double quantisation: room for ROWS rows' scales per thread */
} GemvPlan;

/* The scales of one chunk, one per lane: lane i lies in block (first element + 8i) / blocksize of its row.
 *
 *     blocksize >= 128   one scale       64   lanes 0-7, 8-15       32   lanes 0-3, 4-7, 8-11, 12-15
 *
 * `here` is how many blocks of the row the chunk has: those past the end are not read. */
static inline __attribute__((always_inline)) __m512 lane_scales(const float *scale, int64_t here, const int per_chunk) {
    __m512 lanes = _mm512_set1_ps(scale[0]);
    UNROLL for (int i = 1; i < per_chunk; i++)
        if (i < here)
            lanes = _mm512_mask_mov_ps(lanes, (__mmask16)(0xFFFFu << (i * 16 / per_chunk)), _mm512_set1_ps(scale[i]));
    return lanes;
}

/* A row's scales as fp32: where they lie, or undone from double quantisation into `space`. */
static inline const float *row_scales(const Weight *w, int64_t row, int64_t blocks, float *space) {
    if (w->absmax) return w->absmax + row * blocks;
    for (int64_t b = 0; b < blocks; b++) space[b] = block_scale(w, row * blocks + b);
    return space;
}

/* What four rows of a product need before their first chunk. */
typedef struct {
    const float *absmax[ROWS];
    const uint8_t *bytes[ROWS];
    int64_t rows; /* fewer at the end: a missing row repeats the last one and is not written */
} RowSet;

static RowSet row_set(const GemvPlan *plan, int64_t item, int thread) {
    const Product *p = plan->p;
    int64_t blocks = p->K / p->weight.blocksize;
    RowSet set = {.rows = min64(ROWS, p->N - item * ROWS)};
    for (int r = 0; r < ROWS; r++) {
        int64_t row = item * ROWS + min64(r, set.rows - 1);
        set.bytes[r] = p->weight.packed + row * (p->K / 2);
        set.absmax[r] = row_scales(&p->weight, row, blocks, plan->scales + (thread * ROWS + r) * blocks);
    }
    return set;
}

static void write_rows(const GemvPlan *plan, int64_t item, int64_t rows, const __m512 *total) {
    const Product *p = plan->p;
    for (int r = 0; r < rows; r++) {
        int64_t n = item * ROWS + r;
        float sum = _mm512_reduce_add_ps(total[r]) * plan->undo_scale;
        store_from_fp32(p->y, p->dtype, n, p->bias ? sum + load_as_fp32(p->bias, p->dtype, n) : sum);
    }
}

static inline __attribute__((always_inline)) __m512 fp32_chunk(__m512i codes, const void *x_order, const void *table) {
    const float *x = x_order;
    __m512 code = _mm512_loadu_ps(table), sum = _mm512_setzero_ps();
    UNROLL for (int s = 0; s < 8; s++)
        sum = _mm512_fmadd_ps(_mm512_permutexvar_ps(_mm512_srli_epi32(codes, 4 * s), code), _mm512_load_ps(x + 16 * s), sum);
    return sum;
}

/* Multiplies 128 codes of a row with x: a sum in each lane, not yet scaled. */
typedef __m512 ChunkSum(__m512i codes, const void *x_order, const void *table);

/* Four rows: whole chunks without a mask, then the row's end with one. The hardware's prefetcher begins anew with every
 * row, so the next four are asked for while these are multiplied: a quarter faster on weights that come from memory. */
static inline __attribute__((always_inline)) void gemv_set(const GemvPlan *plan, int64_t item, int thread,
                                                           ChunkSum *const chunk_sum, const int x_bytes,
                                                           const int per_chunk) {
    int64_t K = plan->p->K, bs = plan->p->weight.blocksize, c = 0, left = K % CHUNK;
    const uint8_t *x = plan->x;
    RowSet set = row_set(plan, item, thread);
    __m512 total[ROWS];
    for (int r = 0; r < ROWS; r++) total[r] = _mm512_setzero_ps();
    for (; c < K / CHUNK; c++, x += x_bytes)
        UNROLL for (int r = 0; r < ROWS; r++) {
            const uint8_t *bytes = set.bytes[r] + c * 64;
            _mm_prefetch((const char *)bytes + ROWS * (K / 2), _MM_HINT_T0);
            __m512 scales = lane_scales(set.absmax[r] + c * CHUNK / bs, per_chunk, per_chunk);
            total[r] = _mm512_fmadd_ps(chunk_sum(_mm512_loadu_si512(bytes), x, plan->table), scales, total[r]);
        }
    for (int r = 0; left && r < ROWS; r++) {
        __m512i codes = _mm512_maskz_loadu_epi8(((__mmask64)1 << left / 2) - 1, set.bytes[r] + c * 64);
        __m512 scales = lane_scales(set.absmax[r] + c * CHUNK / bs, left / bs, per_chunk);
        total[r] = _mm512_fmadd_ps(chunk_sum(codes, x, plan->table), scales, total[r]);
    }
    write_rows(plan, item, set.rows, total);
}

/* A work item of both GEMV rungs: `x_bytes` of x for a chunk, a chunk of a row has `per_chunk` blocks. All three are
 * constants where this is called: the compiler makes a loop for each. */
static inline __attribute__((always_inline)) void gemv_rows(const GemvPlan *plan, int64_t item, int thread,
                                                            ChunkSum *const chunk_sum, const int x_bytes,
                                                            const int per_chunk) {
    int64_t last = min64((item + 1) * SETS, ceil_div(plan->p->N, ROWS));
    for (int64_t set = item * SETS; set < last; set++) gemv_set(plan, set, thread, chunk_sum, x_bytes, per_chunk);
}

/* K is a multiple of the blocksize, so a row has an end of part of a chunk only if blocks are shorter than one. */
static void fp32_rows_1(void *plan, int64_t item, int thread) { gemv_rows(plan, item, thread, fp32_chunk, 512, 1); }
static void fp32_rows_2(void *plan, int64_t item, int thread) { gemv_rows(plan, item, thread, fp32_chunk, 512, 2); }
static void fp32_rows_4(void *plan, int64_t item, int thread) { gemv_rows(plan, item, thread, fp32_chunk, 512, 4); }

/* Frees x. */
static int run_gemv(WorkFn per_1, WorkFn per_2, WorkFn per_4, GemvPlan *plan, void *x) {
    const Product *p = plan->p;
    WorkFn rows = p->weight.blocksize >= CHUNK ? per_1 : p->weight.blocksize == 64 ? per_2 : per_4;
    int64_t blocks = p->K / p->weight.blocksize;
    plan->scales = scratch(p->weight.absmax ? 0 : (size_t)(p->threads * ROWS * blocks) * 4);
    if (plan->scales) run_parallel(rows, plan, ceil_div(p->N, ROWS * SETS), p->N * p->K > 1 << 17 ? p->threads : 1);
    int ok = plan->scales != NULL;
    free(plan->scales);
    free(x);
    return ok;
}

static int gemv_4bit_2_avx512(const Product *p) {
    int64_t chunks = ceil_div(p->K, CHUNK);
    float *x = scratch((size_t)(chunks * CHUNK) * 4);
    if (!x) return 0;
    for (int64_t c = 0; c < chunks; c++)
        for (int s = 0; s < 8; s++)
            for (int lane = 0; lane < 16; lane++) {
                int64_t k = c * CHUNK + 8 * lane + (s ^ 1);
                x[c * CHUNK + 16 * s + lane] = k < p->K ? load_as_fp32(p->x, p->dtype, k) : 0;
            }
    GemvPlan plan = {p, x, p->weight.code, 1, NULL};
    return run_gemv(fp32_rows_1, fp32_rows_2, fp32_rows_4, &plan, x);
}
#endif
