/* The part of a tile product that is the same for every instruction set: packing x, splitting work, writing y.
 *
 * A kernel file supplies an Engine: micro-kernels that multiply MT tokens by NP panels of sixteen rows and leave fp32
 * sums. Everything around them is plain C, because it touches each number once while a micro-kernel touches it K times.
 *
 *                 k ->                              n ->  NP panels of 16
 *      tokens  [ x: MT rows ]          tiles      [ p0 | p1 | p2 | p3 ]
 *        MT                             k         [    |    |    |    ]   ->   sums[MT][16*NP] ->  y
 *
 * One work item is a run of panels that fits the L2 cache next to a tile of x; all tokens pass over it before it goes.
 * A canonical weight is put into tiles first, one run at a time, in scratch: decoded once, used by all tokens.
 *
 * Every output is summed in one order that depends on neither M, nor the thread count, nor who computes it: a token's
 * result has the same bits alone and in a batch.
 *
 * cc -O3 -fsyntax-only driver.h
 */
#ifndef DRIVER_H
#define DRIVER_H
#include "threads.c"
#include "tiles.h"
#ifdef REFQ4_AVX512
#include "pack_2_avx512.h"
#include "tiles_2_avx512.h"
#define MAKE_TILES tile_panel_avx512
#elif defined REFQ4_AVX2
#include "tiles_2_avx2.h"
#define MAKE_TILES tile_panel_avx2
#elif defined REFQ4_NEON
#include "tiles_2_neon.h"
#define MAKE_TILES tile_panel_neon
#else
#define MAKE_TILES tile_panel
#endif

enum { MAX_TOKENS = 8, MAX_PANELS = 4 };

/* Where a kernel reads a line, it asks the memory for another.
 *
 * With one tile of tokens the other line is what the same stream reads AHEAD bytes later: four records at blocksize 64.
 * At half this distance a line comes too late, at three times it the first level of the cache is full. A stream ends
 * with its panel and goes on in the panel that this thread multiplies next:
 *
 *     panel 0   | r0 | r1 | r2 | ... | r28 | r29 | r30 | r31 |          panel 4   | r0 | r1 | r2 | r3 | r4 | ...
 *     read        r0   r1   r2   ...   r28   r29   r30   r31                        r0
 *     asked for   r4   r5   r6   ...   r0    r1    r2    r3  of panel 4             r4
 *
 * The hardware follows the streams too, but stops at the ends of pages and panels.
 *
 * With several tiles each line is multiplied several times, and memory has to work during all of them: the call for the
 * first tile asks for all of panel 0 of the next run, the second tile's call for panel 1 of it. */
enum { AHEAD = 2304 };

/* Groups summed before the sum is scaled and added to the total: 32 elements in fp32, 64 where x is bf16 and its own
 * rounding is larger. In one chain over a block of 4096, each addition would round at the size of the whole sum. */
enum { PART_GROUPS_FP32 = 4, PART_GROUPS_BF16 = 8 };

/* For fp32, as many parts are added up before their subtotal is added to the total. bf16's own rounding is larger. */
enum { SUBTOTAL_PARTS = SUBTOTAL_ELEMENTS / (8 * PART_GROUPS_FP32) };

_Static_assert(8 * PART_GROUPS_FP32 == 32, "a part is no longer than the shortest block");
_Static_assert(SUBTOTAL_PARTS * 8 * PART_GROUPS_FP32 == SUBTOTAL_ELEMENTS, "a subtotal is whole parts");

/* What a call asks the memory for, as if it were its first panel, and how far behind lies what stands for the next.
 * After `left` records it goes on at `next`. */
typedef struct {
    const uint8_t *at, *next;
    int64_t stride, left;
} Ahead;

/* x: a tile of it, see pack_tile. tiles: the first of NP panels, `stride` bytes apart. sums: [MT][16*MAX_PANELS]. */
#define TILE_KERNEL_PARAMETERS                                                                                         \
    const void *x, const uint8_t *tiles, int64_t stride, int64_t blocks, int64_t groups, const void *table,            \
        Ahead ahead, float *sums
typedef void (*TileKernel)(TILE_KERNEL_PARAMETERS);

/* How a kernel wants x: see pack_tile. */
enum x_order { ONE_FP32 = 0, BF16_PAIRS, FP32_PAIRS, HALF_QUADS, FP32_QUADS };

typedef struct {
    enum x_order x_order;
    TileKernel kernel[MAX_TOKENS + 1][3];    /* [MT][log2 NP]; NULL where there is none */
    float (*make_table)(const float *code, void *table); /* 64 bytes; returns what sums are to be multiplied by */
    float undo_x;                            /* the same for x, if the caller multiplied it; else 0 */
} Engine;

typedef struct {
    const Product *p;
    const Engine *engine;
    uint8_t *x_tiles, *canonical; /* packed x; scratch for tiles, `run_bytes` per thread, if the weight is canonical */
    int64_t token_tiles, panels, run, run_bytes, token_chunks;
    float undo_scale;
    _Alignas(64) uint8_t table[64];
} Plan;

/* Tokens are split evenly: 9 tokens are 5 + 4, not 8 + 1. */
static inline int64_t tile_start(const Plan *plan, int64_t tile) { return plan->p->M * tile / plan->token_tiles; }

static inline int64_t x_bytes(const Plan *plan, int64_t tokens) {
    enum x_order order = plan->engine->x_order;
    return tokens * plan->p->K * (order == BF16_PAIRS || order == HALF_QUADS ? 2 : 4);
}

/* The orders ..._QUADS of pack_tile; HALF_QUADS copies 16-bit values as they are. */
static void pack_quads(const Product *p, int64_t first, int64_t mt, int halves, void *out) {
    for (int64_t m = 0; m < mt; m++)
        for (int64_t k = 0; k < p->K; k++) {
            int64_t from = (first + m) * p->K + k, to = ((k / 8 * 2 + k % 2) * mt + m) * 4 + k % 8 / 2;
            if (halves) ((uint16_t *)out)[to] = ((const uint16_t *)p->x)[from];
            else ((float *)out)[to] = load_as_fp32(p->x, p->dtype, from);
        }
}

/* One tile of x in the order the micro-kernel eats it: the MT tokens' values for one step side by side.
 *
 *     ONE_FP32     [K/8 groups][8 shifts][MT]   value of k = 8g + {1 0 3 2 5 4 7 6}[shift]: the order in which shifting
 *                                               a tile's dword by 4*shift brings the codes down (tiles.h)
 *     BF16_PAIRS   [K/8 groups][4 shifts][MT]   pairs k = 8g + {1 0 3 2}[shift] (low half) and that + 4 (high half):
 *                                               the lower and the upper word of the dword, shifted together
 *     FP32_PAIRS   [K/8 groups][4 steps][MT]    pairs k = 8g + {0 2 1 3}[step] and that + 4: bytes 0 and 2, then 1 and
 *                                               3 of the dword, first their high, then their low nibbles
 *     ..._QUADS    [K/8 groups][2][MT]          fours k = 8g + {0 2 4 6}, then {1 3 5 7}: the high nibbles of a
 *                                               dword's four bytes, then the low ones
 */
static void pack_tile(void *context, int64_t tile, int thread) {
    (void)thread;
    const Plan *plan = context;
    const Product *p = plan->p;
    int64_t first = tile_start(plan, tile), mt = tile_start(plan, tile + 1) - first;
    uint8_t *out = plan->x_tiles + x_bytes(plan, first);
#ifdef REFQ4_AVX512
    if (plan->engine->x_order <= BF16_PAIRS) {
        pack_tokens(p, first, mt, plan->engine->x_order == BF16_PAIRS, (uint32_t *)out);
        return;
    }
#endif
    if (plan->engine->x_order >= HALF_QUADS) {
        pack_quads(p, first, mt, plan->engine->x_order == HALF_QUADS, out);
        return;
    }
    for (int64_t m = 0; m < mt; m++) {
        if (plan->engine->x_order == BF16_PAIRS) {
            const uint16_t *x = (const uint16_t *)p->x + (first + m) * p->K;
            uint32_t *o = (uint32_t *)out + m;
            for (int64_t k = 0; k < p->K; k += 8)
                for (int s = 0; s < 4; s++, o += mt) *o = x[k + (s ^ 1)] | (uint32_t)x[k + (s ^ 1) + 4] << 16;
        } else if (plan->engine->x_order == FP32_PAIRS) {
            static const int step_k[4] = {0, 2, 1, 3};
            float *o = (float *)out + 2 * m;
            for (int64_t k = 0; k < p->K; k += 8)
                for (int s = 0; s < 4; s++, o += 2 * mt)
                    for (int half = 0; half < 2; half++)
                        o[half] = load_as_fp32(p->x, p->dtype, (first + m) * p->K + k + step_k[s] + 4 * half);
        } else {
            float *o = (float *)out + m;
            for (int64_t k = 0; k < p->K; k += 8)
                for (int s = 0; s < 8; s++, o += mt) *o = load_as_fp32(p->x, p->dtype, (first + m) * p->K + k + (s ^ 1));
        }
    }
}

/* count <= 64 outputs of token m from n on: sums times a factor, plus bias, rounded once. */
static void write_outputs(const Product *p, const float *sums, float factor, int64_t m, int64_t n, int64_t count) {
    float out[PANEL * MAX_PANELS];
    for (int64_t i = 0; i < count; i++) out[i] = sums[i] * factor;
    if (p->bias)
        for (int64_t i = 0; i < count; i++) out[i] += load_as_fp32(p->bias, p->dtype, n + i);
    int64_t at = m * p->N + n;
    if (p->dtype == FP32) memcpy((float *)p->y + at, out, (size_t)count * 4);
    else if (p->dtype == BF16) for (int64_t i = 0; i < count; i++) ((uint16_t *)p->y)[at + i] = fp32_to_bf16(out[i]);
    else for (int64_t i = 0; i < count; i++) ((uint16_t *)p->y)[at + i] = fp32_to_fp16(out[i]);
}

/* For a call that multiplies `count` panels, at `at`, by a tile of tokens of several; the run's panels end at `last`. */
static Ahead what_comes(const Plan *plan, const uint8_t *at, int64_t panel, int64_t count, int64_t last, int64_t tile,
                        int64_t tiles) {
    const Product *p = plan->p;
    int64_t records = p->K / p->weight.blocksize, stride = panel_bytes(p->K, p->weight.blocksize);
    int64_t other = plan->run * (p->threads - 1); /* threads in step */
    int64_t next = panel + count + (panel + count < last ? 0 : other), shared = panel + plan->run + other + tile;
    Ahead read_anyway = {at, at, 0, records}; /* no line more */
    if (!p->tiles) return read_anyway;
    const uint8_t *next_at = next < plan->panels ? p->tiles + next * stride : p->then;
    if (tiles == 1) {
        int64_t record = stride / records, left = max64(records - max64(AHEAD / record, 1), 0);
        if (!next_at) next_at = at;
        return (Ahead){left ? at + stride - left * record : next_at, next_at, stride, left};
    }
    if (tile < count && shared < plan->panels) return (Ahead){p->tiles + shared * stride, at, 0, records};
    return read_anyway;
}

/* One work item: a run of panels times a chunk of token tiles. */
static void multiply_run(void *context, int64_t item, int thread) {
    const Plan *plan = context;
    const Product *p = plan->p;
    const Weight *w = &p->weight;
    int64_t first = item / plan->token_chunks * plan->run, last = min64(first + plan->run, plan->panels);
    int64_t chunk = item % plan->token_chunks, stride = panel_bytes(p->K, w->blocksize);
    int64_t tile_end = plan->token_tiles * (chunk + 1) / plan->token_chunks;
    const uint8_t *tiles = p->tiles + first * stride;
    if (!p->tiles) {
        tiles = plan->canonical + thread * plan->run_bytes;
        for (int64_t i = first; i < last; i++) MAKE_TILES(w, p->N, p->K, i, (uint8_t *)tiles + (i - first) * stride);
    }
    _Alignas(64) float sums[MAX_TOKENS * PANEL * MAX_PANELS];
    int64_t tile_first = plan->token_tiles * chunk / plan->token_chunks;
    for (int64_t t = tile_first; t < tile_end; t++) {
        int64_t m0 = tile_start(plan, t), mt = tile_start(plan, t + 1) - m0;
        const TileKernel *kernels = plan->engine->kernel[mt];
        for (int64_t panel = first; panel < last;) {
            int np = 2; /* log2: the widest kernel that this token count has and that is not wider than what is left */
            while (np && (!kernels[np] || panel + (1 << np) > last)) np--;
            const uint8_t *at = tiles + (panel - first) * stride;
            Ahead ahead = what_comes(plan, at, panel, 1 << np, last, t - tile_first, tile_end - tile_first);
            kernels[np](plan->x_tiles + x_bytes(plan, m0), at, stride, p->K / w->blocksize, w->blocksize / 8,
                        plan->table, ahead, sums);
            int64_t count = min64(PANEL << np, p->N - panel * PANEL);
            for (int64_t m = 0; m < mt; m++)
                write_outputs(p, sums + m * PANEL * MAX_PANELS, plan->undo_scale, m0 + m, panel * PANEL, count);
            panel += 1 << np;
        }
    }
}

enum { RUN_BYTES = 256 << 10 }; /* of packed weight: leaves most of a 1 MB L2 to x; half or twice is as fast */

/* How many panels an item takes: what fits the cache, but several items per thread, so that a thread that the system
 * holds up can be helped out; and whole widest kernels where there are panels enough. */
static int64_t choose_run(const Plan *plan, int64_t stride) {
    const Product *p = plan->p;
    int64_t fit = min64(RUN_BYTES / stride, 16);
    if (p->tiles && p->M <= 2 * MAX_TOKENS) fit = p->M <= MAX_TOKENS / 2 ? MAX_PANELS : 0; /* a call's: all of x is in the cache */
    int64_t run = min64(fit, plan->panels / (4 * p->threads)) / MAX_PANELS * MAX_PANELS;
    if (run) return run;
    if (p->M <= MAX_TOKENS / 2 && plan->panels >= MAX_PANELS * p->threads) return MAX_PANELS;
    return plan->panels >= 2 * p->threads ? 2 : 1;
}

static int tile_product(const Engine *engine, const Product *p) {
    int64_t stride = panel_bytes(p->K, p->weight.blocksize), max_tokens = MAX_TOKENS;
    while (!engine->kernel[max_tokens][0]) max_tokens--;
    Plan plan = {.p = p, .engine = engine, .token_tiles = ceil_div(p->M, max_tokens), .panels = ceil_div(p->N, PANEL)};
    plan.undo_scale = engine->make_table(p->weight.code, plan.table);
    if (engine->undo_x != 0) plan.undo_scale *= engine->undo_x;
    plan.run = choose_run(&plan, stride);
    int64_t runs = ceil_div(plan.panels, plan.run);
    /* Few runs: the tokens are split as well. Not for a canonical weight: each chunk would tile its run again. */
    if (p->tiles && p->threads > 1) plan.token_chunks = min64(plan.token_tiles, ceil_div(4 * p->threads, runs));
    else plan.token_chunks = 1;
    plan.run_bytes = plan.run * stride;
    plan.x_tiles = scratch((size_t)x_bytes(&plan, p->M));
    plan.canonical = scratch(p->tiles ? 0 : (size_t)(plan.run_bytes * p->threads));
    int ok = plan.x_tiles && plan.canonical;
    if (ok) {
        run_parallel(pack_tile, &plan, plan.token_tiles, p->M * p->K > 1 << 16 ? p->threads : 1);
        run_parallel(multiply_run, &plan, runs * plan.token_chunks, p->M * p->N * p->K > 1 << 17 ? p->threads : 1);
    }
    free(plan.x_tiles);
    free(plan.canonical);
    return ok;
}
#endif
