/* Many tokens with vdpbf16ps: a piece of the weight is decoded once, to pairs of bf16 in the first cache, for all of them.
 *
 *     y[m][n] += x[m][k] * w[k][n]  +  x[m][k'] * w[k'][n]          one vdpbf16ps: sixteen n, two k
 *
 *                 n ->  64 outputs                             one work item: 64 outputs, a chunk of tokens
 *            k    [ 128 steps x 4 registers of pairs, 32 KB ]
 *            |                 |
 *     x: six tokens  ->  6 x 4 sums in registers, part by part  ->  sums[m][64] += part * scale     (per thread)
 *
 * A step takes four loads and six broadcasts for twenty-four vdpbf16ps. What differs between the forward product and
 * the gradient is how a piece is decoded, which two k make a pair, whether scales are in the weights already, and in which
 * order the sixteen sums of a register come out: four functions, a Pairs.
 *
 * x is copied, 256 elements of each token side by side: rows a multiple of 4 KB apart would want the same lines of
 * the first cache. Each output is summed in one order that depends on neither M nor the threads.
 *
 * cc -O3 -mfma -mf16c -mavx512bw -mavx512dq -mavx512vl -mavx512bf16 -DREFQ4_AVX512_BF16 -fsyntax-only pairs_avx512_bf16.h
 */
#ifndef PAIRS_AVX512_BF16_H
#define PAIRS_AVX512_BF16_H
#include "simd.h"
#include "threads.c"

enum { PAIR_OUTPUTS = 64, PAIR_REGISTERS = 4, PAIR_DEPTH = 256, PAIR_STEPS = PAIR_DEPTH / 2, PAIR_TOKENS = 6 };
enum { PAIR_CHUNK = 512 }; /* tokens: their sums are 128 KB of the second cache */
enum { SHORTEST_PART = 32 };
/* Up to so many threads each make their own copy of x: what another core has just written can take longer to get than to
 * write again (a fifth of a product of 128 tokens where two cores share no cache). More threads have less to multiply. */
enum { MOST_COPIES = 4 };
#ifdef __SANITIZE_ADDRESS__
enum { MOST_KEPT = 0 }; /* behind what a call asked for lies what an earlier one did: an overrun would go unseen */
#else
enum { MOST_KEPT = 16 << 20 };
#endif

/* w: the piece; scales: of each part, if the weights are unscaled. */
typedef struct {
    __m512i w[PAIR_STEPS * PAIR_REGISTERS];
    __m512 scales[PAIR_DEPTH / SHORTEST_PART * PAIR_REGISTERS];
} Piece;
_Static_assert(sizeof(((Piece *)0)->w) == 32 << 10, "as drawn");

typedef struct PairPlan PairPlan;
typedef struct {
    void (*pack)(uint16_t *out, const uint16_t *x, int64_t depth);
    void (*decode)(const PairPlan *plan, int64_t n0, int64_t outputs, int64_t k0, int64_t depth, Piece *piece);
    void (*write)(const PairPlan *plan, const float *sums, int64_t m, int64_t n0, int64_t outputs);
    int scaled; /* the weights of a piece are */
} Pairs;

struct PairPlan {
    const Product *p;
    const Pairs *how;
    uint16_t *x;                       /* [copies][K pieces][M][PAIR_DEPTH] */
    int64_t x_elements, copies;        /* of one copy; one for each thread, or one for all */
    uint8_t copied[MOST_COPIES];
    float *sums;                       /* per thread: a chunk's tokens, [.][PAIR_OUTPUTS] */
    int64_t part;                      /* elements of K summed before the sum is scaled and added */
    int64_t token_tiles, chunks, most; /* most: tokens of a chunk */
    int64_t next_strip;                /* outputs from one item of a thread to its next, most likely */
    int nested_shift;                  /* log2 of the nested blocksize: division is slow; -1 if it is no power of two */
    float undo_scale;
    _Alignas(64) uint8_t table[64];
};

/* Memory for x and the sums, which stays from call to call. An allocator would give it back to the system each time, and
 * a page that comes anew takes an interrupt: a quarter of a product's time. */
static struct {
    atomic_int busy; /* one caller at a time has it, another gets memory of its own */
    size_t bytes;
    void *at;
} kept;

typedef struct {
    void *at;
    int stays;
} Borrowed;

static Borrowed borrow(size_t bytes) {
    int idle = 0;
    if (bytes > MOST_KEPT || !atomic_compare_exchange_strong(&kept.busy, &idle, 1)) return (Borrowed){scratch(bytes), 0};
    if (kept.bytes < bytes) {
        free(kept.at);
        kept.at = scratch(bytes);
        kept.bytes = kept.at ? bytes : 0;
    }
    return (Borrowed){kept.at, 1};
}

static void give_back(Borrowed memory) {
    if (memory.stays) atomic_store(&kept.busy, 0);
    else free(memory.at);
}

/* block_scale of refq4.h */
static inline float pair_scale(const PairPlan *plan, int64_t block) {
    const Weight *w = &plan->p->weight;
    if (w->absmax || plan->nested_shift < 0) return block_scale(w, block);
    float scaled = w->nested_code[w->q[block]] * w->nested_absmax[block >> plan->nested_shift];
    return scaled + *w->nested_offset;
}

/* Ask memory for the scale of a block that will be wanted. */
static inline void ask_for_scale(const PairPlan *plan, int64_t block) {
    const Weight *w = &plan->p->weight;
    const void *at = w->absmax ? (const void *)(w->absmax + block) : w->q + block;
    __builtin_prefetch(at);
}

/* fp32_to_bf16 of refq4.h in the upper half of each dword; the lower halves are to be dropped. */
static inline __m512i round_upper_half(__m512 v) {
    __m512i u = _mm512_castps_si512(v), last = _mm512_and_si512(_mm512_srli_epi32(u, 16), _mm512_set1_epi32(1));
    __m512i rounded = _mm512_add_epi32(_mm512_add_epi32(u, _mm512_set1_epi32(0x7FFF)), last);
    return _mm512_mask_mov_epi32(rounded, _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q), _mm512_set1_epi32(0x7FC00000));
}

static inline int64_t pair_start(const PairPlan *plan, int64_t tile) { return plan->p->M * tile / plan->token_tiles; }

static void pack_piece(const PairPlan *plan, int64_t piece, uint16_t *x) {
    const Product *p = plan->p;
    int64_t k0 = piece * PAIR_DEPTH, depth = min64(PAIR_DEPTH, p->K - k0);
    uint16_t *out = x + k0 * p->M;
    for (int64_t m = 0; m < p->M; m++, out += PAIR_DEPTH) plan->how->pack(out, (const uint16_t *)p->x + m * p->K + k0, depth);
}

static void pack_for_all(void *context, int64_t piece, int thread) {
    (void)thread;
    pack_piece(context, piece, ((PairPlan *)context)->x);
}

/* The copy of x that a thread multiplies, made when it first asks. */
static const uint16_t *packed_x(PairPlan *plan, int thread) {
    if (plan->copies == 1) return plan->x;
    uint16_t *x = plan->x + thread * plan->x_elements;
    for (int64_t piece = 0; !plan->copied[thread] && piece * PAIR_DEPTH < plan->p->K; piece++) pack_piece(plan, piece, x);
    plan->copied[thread] = 1;
    return x;
}

/* sums[m][0 .. 64) += (x times the weights, `steps` pairs) * scales, for MT tokens. */
static inline __attribute__((always_inline)) void multiply_part(const uint16_t *x, const __m512i *w, int64_t steps,
                                                                const __m512 *scales, float *sums, const int MT,
                                                                const int SCALED) {
    __m512 sum[PAIR_TOKENS][PAIR_REGISTERS];
    UNROLL for (int m = 0; m < MT; m++) UNROLL for (int r = 0; r < PAIR_REGISTERS; r++) sum[m][r] = _mm512_setzero_ps();
    for (int64_t s = 0; s < steps; s++, w += PAIR_REGISTERS, x += 2)
        UNROLL for (int m = 0; m < MT; m++) {
            int32_t pair;
            memcpy(&pair, x + m * PAIR_DEPTH, 4);
            UNROLL for (int r = 0; r < PAIR_REGISTERS; r++)
                sum[m][r] = _mm512_dpbf16_ps(sum[m][r], (__m512bh)w[r], (__m512bh)_mm512_set1_epi32(pair));
        }
    UNROLL for (int m = 0; m < MT; m++)
        UNROLL for (int r = 0; r < PAIR_REGISTERS; r++) {
            float *at = sums + m * PAIR_OUTPUTS + 16 * r;
            __m512 total = _mm512_loadu_ps(at);
            _mm512_storeu_ps(at, SCALED ? _mm512_add_ps(total, sum[m][r]) : _mm512_fmadd_ps(sum[m][r], scales[r], total));
        }
}

/* Called by address: inlined into a loop over parts, the compiler would keep the totals beside the sums, and spill. */
#define PART_PARAMETERS const uint16_t *x, const __m512i *w, int64_t steps, const __m512 *scales, float *sums
typedef void (*PartKernel)(PART_PARAMETERS);
#define KERNEL(MT, SCALED) static void part_##MT##_##SCALED(PART_PARAMETERS) {                                         \
        multiply_part(x, w, steps, scales, sums, MT, SCALED); }
KERNEL(1, 0) KERNEL(2, 0) KERNEL(3, 0) KERNEL(4, 0) KERNEL(5, 0) KERNEL(6, 0)
KERNEL(1, 1) KERNEL(2, 1) KERNEL(3, 1) KERNEL(4, 1) KERNEL(5, 1) KERNEL(6, 1)
#undef KERNEL
static const PartKernel part_kernels[2][PAIR_TOKENS + 1] = {
    {NULL, part_1_0, part_2_0, part_3_0, part_4_0, part_5_0, part_6_0},
    {NULL, part_1_1, part_2_1, part_3_1, part_4_1, part_5_1, part_6_1}};

/* The two lines of y that the end of an item writes, far apart from token to token. */
static inline void ask_for_outputs(const Product *p, int64_t m, int64_t n0) {
    const uint16_t *y = (const uint16_t *)p->y + m * p->N + n0;
    __builtin_prefetch(y, 1);
    __builtin_prefetch(y + 32, 1);
}

static void pair_item(void *context, int64_t item, int thread) {
    PairPlan *plan = context;
    const Product *p = plan->p;
    const uint16_t *packed = packed_x(plan, thread);
    int64_t n0 = item / plan->chunks * PAIR_OUTPUTS, outputs = min64(PAIR_OUTPUTS, p->N - n0);
    int64_t chunk = item % plan->chunks;
    int64_t t0 = plan->token_tiles * chunk / plan->chunks, t1 = plan->token_tiles * (chunk + 1) / plan->chunks;
    int64_t m0 = pair_start(plan, t0), m1 = pair_start(plan, t1);
    float *sums = plan->sums + thread * plan->most * PAIR_OUTPUTS;
    Piece piece;
    if (outputs < PAIR_OUTPUTS) memset(&piece, 0, sizeof piece);
    memset(sums, 0, (size_t)((m1 - m0) * PAIR_OUTPUTS) * sizeof(float));
    for (int64_t k0 = 0; k0 < p->K; k0 += PAIR_DEPTH) {
        int64_t depth = min64(PAIR_DEPTH, p->K - k0);
        plan->how->decode(plan, n0, outputs, k0, depth, &piece);
        for (int64_t t = t0; t < t1; t++) {
            int64_t m = pair_start(plan, t), mt = pair_start(plan, t + 1) - m;
            const uint16_t *x = packed + k0 * p->M + m * PAIR_DEPTH;
            PartKernel multiply = part_kernels[plan->how->scaled][mt];
            if (k0 + depth == p->K) for (int64_t i = m; i < m + mt; i++) ask_for_outputs(p, i, n0);
            for (int64_t k = 0, part = 0; k < depth; k += plan->part, part++)
                multiply(x + k, piece.w + k / 2 * PAIR_REGISTERS, (min64(plan->part, depth - k) + 1) / 2,
                         piece.scales + part * PAIR_REGISTERS, sums + (m - m0) * PAIR_OUTPUTS);
        }
    }
    for (int64_t m = m0; m < m1; m++) plan->how->write(plan, sums + (m - m0) * PAIR_OUTPUTS, m, n0, outputs);
}

static int pair_product(PairPlan *plan, const Pairs *how, const Product *p) {
    if (!p->M || !p->N) return 1;
    int64_t nested = p->weight.nested_blocksize, strips = ceil_div(p->N, PAIR_OUTPUTS), pieces = ceil_div(p->K, PAIR_DEPTH);
    plan->p = p;
    plan->how = how;
    plan->nested_shift = nested > 0 && (nested & (nested - 1)) == 0 ? __builtin_ctzll((unsigned long long)nested) : -1;
    plan->token_tiles = ceil_div(p->M, PAIR_TOKENS);
    /* Each chunk decodes the weight again: more than the cache asks for only where threads would have nothing to do. */
    int64_t wanted = min64(ceil_div(2 * p->threads, strips), ceil_div(p->M, 64));
    plan->chunks = ceil_div(p->M, PAIR_CHUNK);
    if (plan->chunks < wanted) plan->chunks = wanted;
    plan->next_strip = ceil_div(p->threads, plan->chunks) * PAIR_OUTPUTS;
    plan->most = ceil_div(plan->token_tiles, plan->chunks) * PAIR_TOKENS;
    plan->x_elements = pieces * PAIR_DEPTH * p->M;
    plan->copies = p->threads <= MOST_COPIES ? p->threads : 1;
    size_t x_bytes = (size_t)(plan->copies * plan->x_elements) * 2; /* of whole cache lines */
    Borrowed memory = borrow(x_bytes + (size_t)(p->threads * plan->most * PAIR_OUTPUTS) * 4);
    int ok = memory.at != NULL;
    if (ok) {
        plan->x = memory.at;
        plan->sums = (float *)((char *)memory.at + x_bytes);
        if (plan->copies == 1) run_parallel(pack_for_all, plan, pieces, p->M * p->K > 1 << 16 ? p->threads : 1);
        run_parallel(pair_item, plan, strips * plan->chunks, p->M * p->N * p->K > 1 << 17 ? p->threads : 1);
    }
    give_back(memory);
    return ok;
}
#endif
