/* GEMM, rung 5: few tokens on the stored bytes, fp32. Lanes run along K as in gemv_4bit_2_avx512.c, but no scale is put
 * together in the loop, rows and tokens share what is loaded, and memory is asked long before it is needed.
 *
 * 512 codes of a row, a step, are four registers a b c d of sixteen dwords. Transposing 4 x 4 dwords in each 128-bit lane
 * takes eight unpack instructions, which cost nearly nothing: they run on every port.
 *
 *     a   | a0  a1  a2  a3  | a4 ...        T[0]  | a0  b0  c0  d0  | a4  b4  c4  d4  | a8 ...  | a12 ... |
 *     b   | b0  b1  b2  b3  | b4 ...   ->   T[1]  | a1  b1  c1  d1  | a5  b5  c5  d5  | ...
 *     c   | c0 ...                          T[2]  | a2  b2  c2  d2  | ...
 *     d   | d0 ...                          T[3]  | a3  b3  c3  d3  | ...
 *
 * Now lane i of all four holds dwords of one block: elements 128 * (i % 4) + 32 * (i / 4) and the 31 after it. A lane
 * adds up 32 products without a scale, and a step needs one scale per lane: 512 / blocksize floats, side by side, spread
 * over the lanes by one vpermps. Which float goes where is an index made once per call, for any blocksize.
 *
 *     x_order   [tile of up to 4 tokens][K/512 steps][4 T][8 shifts][token][16 lanes]      end padded with zeros
 *
 * A strip of 32 rows is walked as four streams, so four rows go side by side and share the loads of x. x is passed in
 * pieces that stay in the L1 cache, and the totals wait in memory from one piece to the next:
 *
 *     strip  row  0 .. 7    stream 0         for each piece of x
 *            row  8 .. 15   stream 1             for each set of four rows, one of each stream
 *            row 16 .. 23   stream 2                 totals[row][token][16 lanes] += codes * x
 *            row 24 .. 31   stream 3         then the lanes are added up
 *
 * What limits one or two tokens is memory. A processor looks a few hundred instructions ahead, less than a step of four
 * rows, so every line of the next strip, codes and scales, is prefetched while this one is multiplied; and a work item
 * is several strips, so that the next one is this thread's. A line waits in the L2 cache for that long, and is asked for
 * again one row before it is needed. (Without the scales, one line in nine, the whole of it was
 * worth nothing: a wait for one line is as long as a wait for nine. One strip an item: the other thread took it.)
 *
 * cc -O3 -mfma -mf16c -mavx512bw -mavx512dq -mavx512vl -DREFQ4_AVX512 -fsyntax-only gemm_4bit_5_avx512_rows.c
 */
#ifndef GEMM_4BIT_5_AVX512_ROWS_C
#define GEMM_4BIT_5_AVX512_ROWS_C
#include "simd.h"
#include "driver.h"
#include "pack_2_avx512.h" /* bf16_pairs, fp32_exchanged, transpose16 */

enum { STEP = 512, STEP_BYTES = STEP / 2, STREAMS = 4, STREAM_ROWS = 8, STRIP = STREAMS * STREAM_ROWS };
enum { ROWS_TOKENS = 4, X_PIECE_BYTES = 32 << 10, MOST_STRIPS = 8 };
_Static_assert(STEP_BYTES == 4 * sizeof(__m512i), "four registers a step");

typedef struct RowsPlan RowsPlan;

/* Where the codes and scales of the rows side by side begin, and how far behind lies what is to be prefetched. */
typedef struct {
    const uint8_t *bytes[STREAMS];
    const float *scales[STREAMS];
    int64_t ahead, scales_ahead; /* bytes */
} RowSet4;

/* totals[STREAMS][tokens][16] += steps `step` .. `end` - 1 */
#define ROWS_PARAMETERS                                                                                                \
    const RowsPlan *plan, const RowSet4 *set, const uint8_t *x, int64_t step, int64_t end, float *totals
typedef void (*RowsKernel)(ROWS_PARAMETERS);

struct RowsPlan {
    const Product *p;
    const RowsKernel *kernel; /* by tokens */
    int64_t vectors;          /* of x, for a token's step */
    float undo_scale;
    __m512i table, scale_index;
    uint8_t *x;    /* in kernel order */
    float *scales; /* with double quantisation: room for a strip's scales per thread */
    int64_t steps, token_tiles, strips;
    int shift; /* log2 of the blocksize */
};

/* The first `count` bits, all 64 if there are more. */
static inline __mmask64 first_bits(int64_t count) {
    return count >= 64 ? ~(__mmask64)0 : count > 0 ? ((__mmask64)1 << count) - 1 : 0;
}

/* T[2 * half] and T[2 * half + 1] of a step, of which `here` bytes exist: those past the end are not read. */
static inline __attribute__((always_inline)) void transposed_codes(const uint8_t *bytes, const int half,
                                                                   const int whole, int64_t here, __m512i T[2]) {
    __m512i r[4];
    UNROLL for (int i = 0; i < 4; i++)
        r[i] = whole ? _mm512_loadu_si512(bytes + 64 * i)
                     : _mm512_maskz_loadu_epi8(first_bits(here - 64 * i), bytes + 64 * i);
    __m512i ab = half ? _mm512_unpackhi_epi32(r[0], r[1]) : _mm512_unpacklo_epi32(r[0], r[1]);
    __m512i cd = half ? _mm512_unpackhi_epi32(r[2], r[3]) : _mm512_unpacklo_epi32(r[2], r[3]);
    T[0] = _mm512_unpacklo_epi64(ab, cd);
    T[1] = _mm512_unpackhi_epi64(ab, cd);
}

/* The s-th code of each dword (SHIFTS = 8: one fp32 a lane) or of each word (4: a pair of bf16), looked up. */
static inline __attribute__((always_inline)) __m512i decoded(__m512i codes, int s, __m512i table, const int SHIFTS) {
    if (SHIFTS == 4) return _mm512_permutexvar_epi16(_mm512_srli_epi16(codes, 4 * s), table);
    return _mm512_castps_si512(_mm512_permutexvar_ps(_mm512_srli_epi32(codes, 4 * s), _mm512_castsi512_ps(table)));
}

static inline __attribute__((always_inline)) __m512 add_products(__m512 sum, __m512i w, __m512i x, const int SHIFTS) {
#ifdef REFQ4_AVX512_BF16
    if (SHIFTS == 4) return _mm512_dpbf16_ps(sum, (__m512bh)w, (__m512bh)x);
#endif
    (void)SHIFTS;
    return _mm512_fmadd_ps(_mm512_castsi512_ps(w), _mm512_castsi512_ps(x), sum);
}

static inline __attribute__((always_inline)) void rows_step(const RowsPlan *plan, const RowSet4 *set, int64_t step,
                                                            const uint8_t *x, __m512 total[STREAMS][ROWS_TOKENS],
                                                            const int whole, const int MT, const int SHIFTS) {
    int64_t at = step * STEP_BYTES, block = step * STEP >> plan->shift, here = min64(plan->p->K - step * STEP, STEP);
    __mmask16 exist = here >> plan->shift ? (__mmask16)first_bits(here >> plan->shift) : 1; /* blocks may be longer */
    __m512 sum[STREAMS][ROWS_TOKENS];
    UNROLL for (int r = 0; r < STREAMS; r++) UNROLL for (int m = 0; m < MT; m++) sum[r][m] = _mm512_setzero_ps();
    UNROLL for (int half = 0; half < 2; half++) {
        __m512i T[STREAMS][2];
        UNROLL for (int r = 0; r < STREAMS; r++) {
            const char *now = (const char *)set->bytes[r] + at + 128 * half, *row = now + plan->p->K / 2;
            transposed_codes(set->bytes[r] + at, half, whole, here / 2, T[r]);
            UNROLL for (int line = 0; line < 128; line += 64) {
                _mm_prefetch(now + line + set->ahead, _MM_HINT_T0);
                _mm_prefetch(row + line, _MM_HINT_T0); /* asked for a strip ago, and in the L2 cache since */
            }
        }
        UNROLL for (int t = 0; t < 2; t++)
            UNROLL for (int s = 0; s < SHIFTS; s++) {
                __m512i w[STREAMS];
                UNROLL for (int r = 0; r < STREAMS; r++) w[r] = decoded(T[r][t], s, plan->table, SHIFTS);
                UNROLL for (int m = 0; m < MT; m++, x += 64) {
                    __m512i value = _mm512_load_si512(x);
                    UNROLL for (int r = 0; r < STREAMS; r++) sum[r][m] = add_products(sum[r][m], w[r], value, SHIFTS);
                }
            }
    }
    UNROLL for (int r = 0; r < STREAMS; r++) {
        const float *scales = set->scales[r] + block;
        __m512 lanes = _mm512_permutexvar_ps(plan->scale_index, _mm512_maskz_loadu_ps(exist, scales));
        _mm_prefetch((const char *)scales + set->scales_ahead, _MM_HINT_T0);
        UNROLL for (int m = 0; m < MT; m++) total[r][m] = _mm512_fmadd_ps(sum[r][m], lanes, total[r][m]);
    }
}

/* A row's end may be part of a step, which is read through masks. */
static inline __attribute__((always_inline)) void rows_piece(const RowsPlan *plan, const RowSet4 *set, const uint8_t *x,
                                                             int64_t step, int64_t end, float *totals, const int MT,
                                                             const int SHIFTS) {
    __m512 total[STREAMS][ROWS_TOKENS];
    UNROLL for (int r = 0; r < STREAMS; r++)
        UNROLL for (int m = 0; m < MT; m++) total[r][m] = _mm512_load_ps(totals + (r * MT + m) * 16);
    for (; step < min64(end, plan->p->K / STEP); step++, x += 4 * SHIFTS * MT * 64)
        rows_step(plan, set, step, x, total, 1, MT, SHIFTS);
    if (step < end) rows_step(plan, set, step, x, total, 0, MT, SHIFTS);
    UNROLL for (int r = 0; r < STREAMS; r++)
        UNROLL for (int m = 0; m < MT; m++) _mm512_store_ps(totals + (r * MT + m) * 16, total[r][m]);
}

#define ROWS_KERNEL(NAME, MT, SHIFTS) static void NAME##_##MT(ROWS_PARAMETERS) {                                       \
        rows_piece(plan, set, x, step, end, totals, MT, SHIFTS); }

static inline int64_t rows_tile_start(const RowsPlan *plan, int64_t tile) {
    return plan->p->M * tile / plan->token_tiles;
}

/* The scales of some rows as fp32: where they lie, or undone from double quantisation into `space`, block_scale's way,
 * but without a division for each. */
static const float *strip_scales(const RowsPlan *plan, int64_t row, int64_t rows, float *space) {
    const Weight *w = &plan->p->weight;
    int64_t blocks = plan->p->K >> plan->shift, first = row * blocks, end = first + rows * blocks;
    if (w->absmax) return w->absmax + first;
    for (int64_t i = first; i < end;) {
        int64_t nested = i / w->nested_blocksize, stop = min64((nested + 1) * w->nested_blocksize, end);
        for (; i < stop; i++) space[i - first] = w->nested_code[w->q[i]] * w->nested_absmax[nested] + *w->nested_offset;
    }
    return space;
}

/* A strip; its tile of tokens at `m0`. `next` rows behind it is what is to be prefetched. */
static void rows_strip(const RowsPlan *plan, const float *scales, int64_t first, int64_t next, int64_t m0, int64_t mt) {
    const Product *p = plan->p;
    int64_t rows = min64(STRIP, p->N - first), blocks = p->K >> plan->shift, x_step = plan->vectors * 64 * mt;
    int64_t piece = X_PIECE_BYTES / x_step;
    const uint8_t *x = plan->x + m0 * plan->steps * plan->vectors * 64;
    RowSet4 set = {.ahead = next * (p->K / 2), .scales_ahead = p->weight.absmax ? next * blocks * 4 : 0};
    _Alignas(64) float totals[STREAM_ROWS][STREAMS * ROWS_TOKENS * 16] = {{0}};
    for (int64_t step = 0; step < plan->steps; step += piece)
        for (int64_t s = 0; s < STREAM_ROWS; s++) {
            for (int64_t r = 0; r < STREAMS; r++) { /* a missing row repeats the last one and is not written */
                int64_t row = min64(r * STREAM_ROWS + s, rows - 1);
                set.bytes[r] = p->weight.packed + (first + row) * (p->K / 2);
                set.scales[r] = scales + row * blocks;
            }
            plan->kernel[mt](plan, &set, x + step * x_step, step, min64(step + piece, plan->steps), totals[s]);
        }
    for (int64_t m = 0; m < mt; m++) {
        float sums[STRIP];
        for (int64_t r = 0; r < rows; r++)
            sums[r] = _mm512_reduce_add_ps(_mm512_load_ps(totals[r % STREAM_ROWS] + (r / STREAM_ROWS * mt + m) * 16));
        write_outputs(p, sums, plan->undo_scale, m0 + m, first, rows);
    }
}

static void rows_item(void *context, int64_t item, int thread) {
    const RowsPlan *plan = context;
    const Product *p = plan->p;
    int64_t run = plan->strips * STRIP, last = min64((item + 1) * run, p->N);
    for (int64_t row = item * run; row < last; row += STRIP) {
        int64_t rows = min64(STRIP, p->N - row);
        int64_t next = row + STRIP < last ? STRIP : STRIP + (p->threads - 1) * run; /* if all threads keep step */
        if (row + next + STRIP > p->N) next = 0;
        const float *scales = strip_scales(plan, row, rows, plan->scales + thread * STRIP * (p->K >> plan->shift));
        for (int64_t tile = 0; tile < plan->token_tiles; tile++, next = 0) {
            int64_t m0 = rows_tile_start(plan, tile);
            rows_strip(plan, scales, row, next, m0, rows_tile_start(plan, tile + 1) - m0);
        }
    }
}

/* A tile of x in kernel order: lane i of 16 or 32 vectors holds elements 128 * (i % 4) + 32 * (i / 4) .. + 31 of a step,
 * so it is a transposition, too. */
static void order_tile(const RowsPlan *plan, int64_t m0, int64_t mt) {
    const Product *p = plan->p;
    uint8_t *out = plan->x + m0 * plan->steps * plan->vectors * 64;
    for (int64_t k0 = 0; k0 < p->K; k0 += STEP, out += plan->vectors * mt * 64)
        for (int64_t i = 0; i < mt * plan->vectors / 16; i++) {
            int64_t m = i % mt, half = i / mt; /* fp32: 16 elements of each 32 at a time */
            __m512i lane[16];
            UNROLL for (int l = 0; l < 16; l++) {
                int64_t k = k0 + 128 * (l % 4) + 32 * (l / 4), at = (m0 + m) * p->K + k + 16 * half;
                lane[l] = k >= p->K            ? _mm512_setzero_si512()
                          : plan->vectors == 16 ? bf16_pairs((const uint16_t *)p->x + at)
                                                : fp32_exchanged(p->x, p->dtype, at);
            }
            transpose16(lane);
            UNROLL for (int v = 0; v < 16; v++) _mm512_store_si512(out + ((16 * half + v) * mt + m) * 64, lane[v]);
        }
}

/* Completes the plan and runs it. */
static int run_rows(RowsPlan *plan) {
    const Product *p = plan->p;
    int index[16];
    plan->shift = __builtin_ctzll((unsigned long long)p->weight.blocksize);
    for (int i = 0; i < 16; i++) index[i] = (128 * (i % 4) + 32 * (i / 4)) >> plan->shift;
    plan->scale_index = _mm512_loadu_si512(index);
    plan->steps = ceil_div(p->K, STEP);
    plan->token_tiles = ceil_div(p->M, ROWS_TOKENS);
    plan->strips = min64(MOST_STRIPS, ceil_div(ceil_div(p->N, STRIP), 8 * p->threads));
    plan->x = scratch((size_t)(p->M * plan->steps * plan->vectors) * 64);
    plan->scales = scratch(p->weight.absmax ? 0 : (size_t)(p->threads * STRIP * (p->K >> plan->shift)) * 4);
    int ok = plan->x && plan->scales;
    if (ok) {
        for (int64_t t = 0; t < plan->token_tiles; t++)
            order_tile(plan, rows_tile_start(plan, t), rows_tile_start(plan, t + 1) - rows_tile_start(plan, t));
        int64_t items = ceil_div(p->N, plan->strips * STRIP);
        run_parallel(rows_item, plan, items, p->M * p->N * p->K > 1 << 17 ? p->threads : 1);
    }
    free(plan->x);
    free(plan->scales);
    return ok;
}

ROWS_KERNEL(fp32_streams, 1, 8) ROWS_KERNEL(fp32_streams, 2, 8)
ROWS_KERNEL(fp32_streams, 3, 8) ROWS_KERNEL(fp32_streams, 4, 8)
static const RowsKernel fp32_streams[] = {NULL, fp32_streams_1, fp32_streams_2, fp32_streams_3, fp32_streams_4};

static int gemm_4bit_5_avx512_rows(const Product *p) {
    RowsPlan plan = {p, fp32_streams, 32, 1, .table = _mm512_loadu_si512(p->weight.code)};
    return run_rows(&plan);
}
#endif
