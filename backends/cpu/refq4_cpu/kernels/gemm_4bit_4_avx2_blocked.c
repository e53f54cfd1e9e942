/* GEMM, rung 4 for AVX2: many tokens. Decode a piece of the weight once, to fp32 in the L1 cache, for all of them.
 *
 * Rungs 2 and 3 decode in registers, and sixteen registers hold the sums of four tokens: 512 tokens decode every weight
 * 128 times. Here a panel's piece of DEPTH codes is decoded once and multiplied by all tokens of the work item, with the
 * micro-kernel of a plain fp32 product: 6 tokens x 2 registers of outputs, twelve sums, two loads and six broadcasts for
 * twelve multiply-adds.
 *
 *                  DEPTH of K               16 outputs
 *     tokens   [ x: 6 rows, packed ]     [ one panel, decoded ]    ->   sums[tokens][16] of each panel of the item
 *        6       6 KB, from L2     DEPTH [ 16 KB in L1        ]         in L2, read and written once a part
 *
 *     item = a run of panels x a chunk of tokens:   for each piece of K: for each panel: decode; for each 6 tokens: multiply
 *
 * The decoded piece comes in two orders, by what decodes it:
 *
 *     singles   vpermps (rung 2), for fp32 and fp16:   step k    | w[k] of rows 0 .. 7 | of rows 8 .. 15 |      x[k]
 *     pairs     vpshufb (rung 3), for bf16, twice:     step k/2  | w[k] w[k+4] of rows 0 1 4 5 | of 2 3 6 7 |   x[k] x[k+4]
 *               first all steps of rows 0 .. 7, then those of rows 8 .. 15
 *
 * Codes are multiplied unscaled. The sum of a part of a block is scaled and added to the total, in an order that depends
 * on neither M nor the threads; for bf16 it is rung 3's, so both give the same bits. In singles, the parts of a piece are
 * added up first: a subtotal (SUBTOTAL_ELEMENTS in refq4.h, but of DEPTH elements).
 *
 * cc -O3 -mavx2 -mfma -mf16c -DREFQ4_AVX2 -fsyntax-only gemm_4bit_4_avx2_blocked.c
 */
#include "simd.h"
#include "driver.h"
#include "gemm_4bit_2_avx2.c"       /* avx2_lookup */
#include "gemm_4bit_3_avx2_bytes.c" /* byte_lookup, byte_table */

enum { DEPTH = 256, ROW_TOKENS = 6, CHUNK_TOKENS = 192, RUN_PANELS = 8 };
_Static_assert(sizeof(float) * ROW_TOKENS * DEPTH == 6 << 10 && sizeof(float) * DEPTH * PANEL == 16 << 10, "as drawn");

typedef struct {
    const Product *p;
    int pairs;                                             /* bf16: decoded by bytes, x in pairs */
    float undo_scale;
    int64_t part;                                          /* codes summed before the sum is scaled */
    int64_t token_tiles, panels, run, chunks, chunk_tiles; /* chunk_tiles: the most token tiles a chunk has */
    float *x;                                              /* [K pieces][M tokens], a tile of tokens step by step */
    float *sums;                                           /* per thread: [run][chunk_tiles][ROW_TOKENS][PANEL] */
    uint8_t *canonical;                                    /* per thread: a run of tiles, if the weight is canonical */
    _Alignas(32) uint8_t table[64];
} BlockedPlan;

/* values: a piece in one of the two orders; scales: absmax of the sixteen rows for each part of it. */
typedef struct {
    _Alignas(64) float values[DEPTH * PANEL], scales[DEPTH / 32 * PANEL];
} Decoded;

static inline int64_t blocked_start(const BlockedPlan *plan, int64_t tile) { return plan->p->M * tile / plan->token_tiles; }

static inline int64_t chunk_start(const BlockedPlan *plan, int64_t chunk) { return plan->token_tiles * chunk / plan->chunks; }

/* One tile of tokens, for each piece of K: [step][token], or [step][token][2], so that a step's values lie together. */
static void blocked_pack(void *context, int64_t tile, int thread) {
    (void)thread;
    const BlockedPlan *plan = context;
    const Product *p = plan->p;
    int64_t first = blocked_start(plan, tile), mt = blocked_start(plan, tile + 1) - first;
    for (int64_t k0 = 0; k0 < p->K; k0 += DEPTH) {
        int64_t depth = min64(DEPTH, p->K - k0);
        float *out = plan->x + k0 * p->M + first * depth;
        for (int64_t m = 0; m < mt; m++)
            for (int64_t k = 0; k < depth; k++) {
                int64_t in_group = k % 8, step = k / 8 * 4 + (in_group & 1) * 2 + (in_group >> 1 & 1); /* bytes 0, 1; low */
                int64_t at = plan->pairs ? (step * mt + m) * 2 + (in_group >> 2) : k * mt + m;
                out[at] = load_as_fp32(p->x, p->dtype, (first + m) * p->K + k0 + k);
            }
    }
}

/* Eight codes of sixteen rows -> eight steps of singles. */
static inline void decode_singles(const __m256i *group, const float *code, float *out) {
    __m256 low = _mm256_loadu_ps(code), high = _mm256_loadu_ps(code + 8);
    UNROLL for (int half = 0; half < 2; half++) {
        __m256i codes = _mm256_loadu_si256(group + half);
        UNROLL for (int s = 0; s < 8; s++) /* shift s brings down k = s ^ 1 */
            _mm256_store_ps(out + (s ^ 1) * PANEL + 8 * half, avx2_lookup(codes, s, low, high));
    }
}

/* Eight codes of eight rows -> four steps of pairs. */
static inline void decode_pairs(const __m256i *codes, const ByteTable *t, float *out) {
    __m256i bytes = _mm256_loadu_si256(codes);
    UNROLL for (int low = 0; low < 2; low++) {
        __m256 w[2][2];
        byte_lookup(_mm256_and_si256(low ? bytes : _mm256_srli_epi32(bytes, 4), t->nibble), t, w);
        UNROLL for (int odd = 0; odd < 2; odd++)
            UNROLL for (int i = 0; i < 2; i++) _mm256_store_ps(out + (2 * low + odd) * PANEL + 8 * i, w[i][odd]);
    }
}

static void decode_piece(const BlockedPlan *plan, const uint8_t *tiles, int64_t k0, int64_t depth, Decoded *out) {
    const Weight *w = &plan->p->weight;
    const ByteTable t = byte_registers(plan->table);
    int shift = __builtin_ctzll((unsigned long long)w->blocksize); /* a power of two, and division is slow */
    float *scales = out->scales;
    for (int64_t k = 0; k < depth; k += 8) {
        const uint8_t *record = tiles + ((k0 + k) >> shift) * record_bytes(w->blocksize);
        const __m256i *group = (const __m256i *)(record + 64 + ((k0 + k) & (w->blocksize - 1)) * 8);
        if ((k & (plan->part - 1)) == 0) scales = (float *)memcpy(scales, record, 4 * PANEL) + PANEL;
        if (plan->pairs) {
            decode_pairs(group, &t, out->values + k / 2 * PANEL);
            decode_pairs(group + 1, &t, out->values + (depth + k) / 2 * PANEL);
        } else {
            decode_singles(group, w->code, out->values + k * PANEL);
        }
    }
}

/* sums[m][..] += x times w, part by part of `part` steps each; pairs: eight outputs, else sixteen. */
static inline __attribute__((always_inline)) void blocked_tile(const float *x, const float *w, const float *scales,
                                                               int64_t steps, int64_t part, float *sums, const int MT,
                                                               const int PAIRS) {
    for (const float *end = w + steps * PANEL; w < end; scales += PANEL) {
        __m256 sum[ROW_TOKENS][2];
        UNROLL for (int m = 0; m < MT; m++) sum[m][0] = sum[m][1] = _mm256_setzero_ps();
        for (const float *stop = w + part * PANEL; w < stop; x += MT << PAIRS, w += PANEL) {
            __m256 w0 = _mm256_load_ps(w), w1 = _mm256_load_ps(w + 8);
            UNROLL for (int m = 0; m < MT; m++) {
                __m256 value = PAIRS ? _mm256_castpd_ps(_mm256_broadcast_sd((const double *)x + m)) : _mm256_broadcast_ss(x + m);
                sum[m][0] = _mm256_fmadd_ps(w0, value, sum[m][0]);
                sum[m][1] = _mm256_fmadd_ps(w1, value, sum[m][1]);
            }
        }
        UNROLL for (int m = 0; m < MT; m++) {
            if (PAIRS) {
                add_scaled(sums + m * PANEL, _mm256_hadd_ps(sum[m][0], sum[m][1]), scales);
            } else {
                add_scaled(sums + m * PANEL, sum[m][0], scales);
                add_scaled(sums + m * PANEL + 8, sum[m][1], scales + 8);
            }
        }
    }
}

typedef void (*BlockedTile)(const float *x, const Decoded *d, int64_t depth, int64_t part, float *sums);
static inline __attribute__((always_inline)) void singles_tile(const float *x, const Decoded *d, int64_t depth,
                                                               int64_t part, float *sums, const int MT) {
    blocked_tile(x, d->values, d->scales, depth, part, sums, MT, 0);
}

static inline __attribute__((always_inline)) void pairs_tile(const float *x, const Decoded *d, int64_t depth,
                                                             int64_t part, float *sums, const int MT) {
    blocked_tile(x, d->values, d->scales, depth / 2, part / 2, sums, MT, 1);
    blocked_tile(x, d->values + depth / 2 * PANEL, d->scales + 8, depth / 2, part / 2, sums + 8, MT, 1);
}

#define KERNEL(ORDER, MT)                                                                                              \
    static void ORDER##_tile_##MT(const float *x, const Decoded *d, int64_t depth, int64_t part, float *sums) {        \
        ORDER##_tile(x, d, depth, part, sums, MT); }
KERNEL(singles, 1) KERNEL(singles, 2) KERNEL(singles, 3) KERNEL(singles, 4) KERNEL(singles, 5) KERNEL(singles, 6)
KERNEL(pairs, 1) KERNEL(pairs, 2) KERNEL(pairs, 3) KERNEL(pairs, 4) KERNEL(pairs, 5) KERNEL(pairs, 6)
#undef KERNEL
static const BlockedTile blocked_tiles[2][ROW_TOKENS + 1] = {
    {NULL, singles_tile_1, singles_tile_2, singles_tile_3, singles_tile_4, singles_tile_5, singles_tile_6},
    {NULL, pairs_tile_1, pairs_tile_2, pairs_tile_3, pairs_tile_4, pairs_tile_5, pairs_tile_6}};

/* One work item: a run of panels times a chunk of tokens. */
static void blocked_item(void *context, int64_t item, int thread) {
    const BlockedPlan *plan = context;
    const Product *p = plan->p;
    int64_t first = item / plan->chunks * plan->run, last = min64(first + plan->run, plan->panels);
    int64_t tile0 = chunk_start(plan, item % plan->chunks), tile1 = chunk_start(plan, item % plan->chunks + 1);
    int64_t stride = panel_bytes(p->K, p->weight.blocksize), panel_sums = plan->chunk_tiles * ROW_TOKENS * PANEL;
    float *sums = plan->sums + thread * plan->run * panel_sums;
    const uint8_t *tiles = p->tiles + first * stride;
    if (!p->tiles) {
        tiles = plan->canonical + thread * plan->run * stride;
        for (int64_t i = first; i < last; i++) MAKE_TILES(&p->weight, p->N, p->K, i, (uint8_t *)tiles + (i - first) * stride);
    }
    memset(sums, 0, (size_t)((last - first) * panel_sums) * 4);
    Decoded decoded;
    for (int64_t k0 = 0; k0 < p->K; k0 += DEPTH) {
        int64_t depth = min64(DEPTH, p->K - k0);
        for (int64_t i = first; i < last; i++) {
            decode_piece(plan, tiles + (i - first) * stride, k0, depth, &decoded);
            float *s = sums + (i - first) * panel_sums;
            for (int64_t t = tile0; t < tile1; t++, s += ROW_TOKENS * PANEL) {
                int64_t m = blocked_start(plan, t), mt = blocked_start(plan, t + 1) - m;
                const float *x = plan->x + k0 * p->M + m * depth;
                if (plan->pairs) {
                    blocked_tiles[1][mt](x, &decoded, depth, plan->part, s);
                    continue;
                }
                _Alignas(64) float subtotals[ROW_TOKENS * PANEL];
                memset(subtotals, 0, (size_t)(mt * PANEL) * sizeof(float));
                blocked_tiles[0][mt](x, &decoded, depth, plan->part, subtotals);
                for (int64_t j = 0; j < mt * PANEL; j++) s[j] += subtotals[j];
            }
        }
    }
    for (int64_t i = first; i < last; i++)
        for (int64_t t = tile0; t < tile1; t++) {
            const float *s = sums + (i - first) * panel_sums + (t - tile0) * ROW_TOKENS * PANEL;
            for (int64_t m = blocked_start(plan, t); m < blocked_start(plan, t + 1); m++, s += PANEL)
                write_outputs(p, s, plan->undo_scale, m, i * PANEL, min64(PANEL, p->N - i * PANEL));
        }
}

static int gemm_4bit_4_avx2_blocked(const Product *p) {
    BlockedPlan plan = {.p = p, .pairs = p->dtype == BF16, .undo_scale = 1, .token_tiles = ceil_div(p->M, ROW_TOKENS),
                        .panels = ceil_div(p->N, PANEL)};
    if (plan.pairs) plan.undo_scale = byte_table(p->weight.code, plan.table);
    plan.part = min64(p->weight.blocksize, 8 * (plan.pairs ? PART_GROUPS_BF16 : PART_GROUPS_FP32));
    plan.run = min64(RUN_PANELS, plan.panels / (4 * p->threads));
    plan.run = plan.run ? plan.run : 1;
    plan.chunks = ceil_div(plan.token_tiles * ROW_TOKENS, CHUNK_TOKENS);
    plan.chunk_tiles = ceil_div(plan.token_tiles, plan.chunks);
    plan.x = scratch((size_t)(p->M * p->K) * 4);
    plan.sums = scratch((size_t)(p->threads * plan.run * plan.chunk_tiles * ROW_TOKENS * PANEL) * 4);
    plan.canonical = scratch(p->tiles ? 0 : (size_t)(p->threads * plan.run * panel_bytes(p->K, p->weight.blocksize)));
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
