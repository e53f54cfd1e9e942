/* GEMM, rung 4 for AVX2: many tokens. Decode a piece of the weight once, to fp32 in the L1 cache, for all of them.
 *
 * Rungs 2 and 3 decode in registers, and sixteen registers hold the sums of four tokens: 512 tokens decode every weight
 * 128 times. Here a panel's piece of DEPTH codes is decoded once and multiplied by all tokens of the work item, with the
 * micro-kernel of a plain fp32 product: 6 tokens x 16 outputs, twelve sums in registers, two loads and six broadcasts
 * for twelve multiply-adds.
 *
 *                  DEPTH of K               16 outputs
 *     tokens   [ x: 6 rows, packed ]     [ one panel, decoded ]    ->   sums[tokens][16] of each panel of the item
 *        6       6 KB, from L2     DEPTH [ 16 KB in L1        ]         in L2, read and written once a piece
 *
 *     item = a run of panels x a chunk of tokens:   for each piece of K: for each panel: decode; for each 6 tokens: multiply
 *
 * A sum of a part of K is added to the total, in an order that depends on neither M nor the threads. For fp32, where the
 * rounding of the additions is what the error is made of, parts are short and the sum is scaled, as in the other rungs.
 * For 16-bit activations a part is the whole piece, and what is decoded are weights: code * absmax in fp32.
 */
#include <immintrin.h>
#include "driver.h"

enum { DEPTH = 256, ROW_TOKENS = 6, CHUNK_TOKENS = 192, RUN_PANELS = 8, PART_FP32 = 32 };

typedef struct {
    const Product *p;
    int64_t token_tiles, panels, run, chunks, chunk_tiles; /* chunk_tiles: the most token tiles a chunk has */
    float *x;                                              /* [K pieces][M tokens], a tile of tokens k by k */
    float *sums;                                           /* per thread: [run][chunk_tiles][ROW_TOKENS][PANEL] */
    uint8_t *canonical;                                    /* per thread: a panel's tiles, if the weight is canonical */
} BlockedPlan;

static inline int64_t blocked_start(const BlockedPlan *plan, int64_t tile) { return plan->p->M * tile / plan->token_tiles; }

static inline int64_t chunk_start(const BlockedPlan *plan, int64_t chunk) { return plan->token_tiles * chunk / plan->chunks; }

/* One tile of tokens, for each piece of K:  [k of the piece][token], so that a step's values lie side by side. */
static void blocked_pack(void *context, int64_t tile, int thread) {
    (void)thread;
    const BlockedPlan *plan = context;
    const Product *p = plan->p;
    int64_t first = blocked_start(plan, tile), mt = blocked_start(plan, tile + 1) - first;
    for (int64_t k0 = 0; k0 < p->K; k0 += DEPTH) {
        int64_t depth = min64(DEPTH, p->K - k0);
        float *out = plan->x + k0 * p->M + first * depth;
        for (int64_t m = 0; m < mt; m++)
            for (int64_t k = 0; k < depth; k++) out[k * mt + m] = load_as_fp32(p->x, p->dtype, (first + m) * p->K + k0 + k);
    }
}

/* values: depth x 16 codes or weights in the order of k; scales: what each part's sum is to be multiplied by. */
typedef struct {
    _Alignas(64) float values[DEPTH * PANEL], scales[DEPTH / PART_FP32 * PANEL];
} Decoded;

/* A panel's codes k0 .. k0 + depth. part: 32 codes of a block, or `depth` of them, scaled here. */
static void decode_piece(const uint8_t *tiles, int64_t blocksize, const float *code, int64_t k0, int64_t depth, int64_t part,
                         Decoded *out) {
    __m256 low = _mm256_loadu_ps(code), high = _mm256_loadu_ps(code + 8), one = _mm256_set1_ps(1);
    int shift = __builtin_ctzll((unsigned long long)blocksize); /* a power of two, and division is slow */
    for (int64_t k = 0; k < depth; k += 8) {
        const uint8_t *record = tiles + ((k0 + k) >> shift) * record_bytes(blocksize);
        const uint8_t *group = record + 64 + ((k0 + k) & (blocksize - 1)) * 8;
        UNROLL_AVX2 for (int half = 0; half < 2; half++) {
            __m256 absmax = _mm256_loadu_ps((const float *)record + 8 * half), scale = part == PART_FP32 ? one : absmax;
            __m256i codes = _mm256_loadu_si256((const __m256i *)(group + 32 * half));
            float *values = out->values + k * PANEL + 8 * half;
            UNROLL_AVX2 for (int s = 0; s < 8; s++) /* shift s brings down k = s ^ 1 */
                _mm256_store_ps(values + (s ^ 1) * PANEL, _mm256_mul_ps(avx2_lookup(codes, s, low, high), scale));
            _mm256_store_ps(out->scales + k / PART_FP32 * PANEL + 8 * half, part == PART_FP32 ? absmax : one);
        }
    }
}

/* sums += x times w, part by part. */
static inline __attribute__((always_inline)) void blocked_tile(const float *x, const Decoded *decoded, int64_t depth,
                                                               int64_t part, float *sums, const int MT) {
    const float *w = decoded->values, *scales = decoded->scales;
    for (const float *end = w + depth * PANEL; w < end; scales += PANEL) {
        __m256 sum[ROW_TOKENS][2];
        UNROLL_AVX2 for (int m = 0; m < MT; m++) sum[m][0] = sum[m][1] = _mm256_setzero_ps();
        for (const float *stop = w + part * PANEL; w < stop; x += MT, w += PANEL) {
            __m256 w0 = _mm256_load_ps(w), w1 = _mm256_load_ps(w + 8);
            UNROLL_AVX2 for (int m = 0; m < MT; m++) {
                __m256 value = _mm256_broadcast_ss(x + m);
                sum[m][0] = _mm256_fmadd_ps(w0, value, sum[m][0]);
                sum[m][1] = _mm256_fmadd_ps(w1, value, sum[m][1]);
            }
        }
        UNROLL_AVX2 for (int m = 0; m < MT; m++)
            UNROLL_AVX2 for (int half = 0; half < 2; half++) {
                float *at = sums + m * PANEL + 8 * half;
                __m256 scale = _mm256_load_ps(scales + 8 * half);
                _mm256_storeu_ps(at, _mm256_fmadd_ps(sum[m][half], scale, _mm256_loadu_ps(at)));
            }
    }
}

#define KERNEL(MT)                                                                                                      \
    static void blocked_tile_##MT(const float *x, const Decoded *w, int64_t depth, int64_t part, float *sums) {         \
        blocked_tile(x, w, depth, part, sums, MT);                                                                            \
    }
KERNEL(1) KERNEL(2) KERNEL(3) KERNEL(4) KERNEL(5) KERNEL(6)
#undef KERNEL
static void (*const blocked_tiles[])(const float *, const Decoded *, int64_t, int64_t, float *) = {
    NULL, blocked_tile_1, blocked_tile_2, blocked_tile_3, blocked_tile_4, blocked_tile_5, blocked_tile_6};

/* One work item: a run of panels times a chunk of tokens. */
static void blocked_item(void *context, int64_t item, int thread) {
    const BlockedPlan *plan = context;
    const Product *p = plan->p;
    const Weight *weight = &p->weight;
    int64_t first = item / plan->chunks * plan->run, last = min64(first + plan->run, plan->panels);
    int64_t tile0 = chunk_start(plan, item % plan->chunks), tile1 = chunk_start(plan, item % plan->chunks + 1);
    int64_t stride = panel_bytes(p->K, weight->blocksize), panel_sums = plan->chunk_tiles * ROW_TOKENS * PANEL;
    float *sums = plan->sums + thread * plan->run * panel_sums;
    const uint8_t *tiles = p->tiles + first * stride;
    if (!p->tiles) {
        tiles = plan->canonical + thread * plan->run * stride;
        for (int64_t i = first; i < last; i++) MAKE_TILES(weight, p->N, p->K, i, (uint8_t *)tiles + (i - first) * stride);
    }
    memset(sums, 0, (size_t)((last - first) * panel_sums) * 4);
    Decoded decoded;
    for (int64_t k0 = 0; k0 < p->K; k0 += DEPTH) {
        int64_t depth = min64(DEPTH, p->K - k0), part = p->dtype == FP32 ? PART_FP32 : depth;
        for (int64_t i = first; i < last; i++) {
            decode_piece(tiles + (i - first) * stride, weight->blocksize, weight->code, k0, depth, part, &decoded);
            float *s = sums + (i - first) * panel_sums;
            for (int64_t t = tile0; t < tile1; t++, s += ROW_TOKENS * PANEL) {
                int64_t m = blocked_start(plan, t), mt = blocked_start(plan, t + 1) - m;
                blocked_tiles[mt](plan->x + k0 * p->M + m * depth, &decoded, depth, part, s);
            }
        }
    }
    for (int64_t i = first; i < last; i++)
        for (int64_t t = tile0; t < tile1; t++) {
            const float *s = sums + (i - first) * panel_sums + (t - tile0) * ROW_TOKENS * PANEL;
            for (int64_t m = blocked_start(plan, t); m < blocked_start(plan, t + 1); m++, s += PANEL)
                write_outputs(p, s, 1, m, i * PANEL, min64(PANEL, p->N - i * PANEL));
        }
}

static int gemm_4_avx2_blocked(const Product *p) {
    BlockedPlan plan = {.p = p, .token_tiles = ceil_div(p->M, ROW_TOKENS), .panels = ceil_div(p->N, PANEL)};
    int64_t stride = panel_bytes(p->K, p->weight.blocksize);
    plan.run = min64(RUN_PANELS, plan.panels / (4 * p->threads));
    plan.run = plan.run ? plan.run : 1;
    plan.chunks = ceil_div(plan.token_tiles * ROW_TOKENS, CHUNK_TOKENS);
    plan.chunk_tiles = ceil_div(plan.token_tiles, plan.chunks);
    plan.x = scratch((size_t)(p->M * p->K) * 4);
    plan.sums = scratch((size_t)(p->threads * plan.run * plan.chunk_tiles * ROW_TOKENS * PANEL) * 4);
    plan.canonical = scratch(p->tiles ? 0 : (size_t)(p->threads * plan.run * stride));
    int ok = plan.x && plan.sums && plan.canonical;
    if (ok) {
        ask_for_large_pages(plan.x, p->M * p->K * 4);
        run_parallel(blocked_pack, &plan, plan.token_tiles, p->M * p->K > 1 << 16 ? p->threads : 1);
        run_parallel(blocked_item, &plan, ceil_div(plan.panels, plan.run) * plan.chunks,
                     p->M * p->N * p->K > 1 << 17 ? p->threads : 1);
    }
    free(plan.x);
    free(plan.sums);
    free(plan.canonical);
    return ok;
}
