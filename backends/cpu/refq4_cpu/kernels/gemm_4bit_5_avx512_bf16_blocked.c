/* GEMM, rung 5: many tokens. Rung 4 decodes in registers, for eight tokens at a time; here a piece of the weight is
 * decoded once for all of them (pairs_avx512_bf16.h).
 *
 * A panel's group (tiles.h) becomes four steps, each with the look-up of rung 4. Where the weight is canonical, sixteen
 * rows of 128 codes are transposed in registers (tiles_2_avx512.h) and give sixteen groups, without a tile in memory.
 *
 *     group      16 rows x 8 codes    >> 4*s, vpermw  ->   step s: w[n][k], w[n][k+4] of sixteen n, k = {1 0 3 2}[s]
 *     piece      [ step 0: panels 0 1 2 3 | step 1: ... ]     x is put in the same order when it is copied
 *
 * Codes are multiplied unscaled, and a part's sum times its absmax is added to the total: the order of rung 4, so both
 * give the same bits.
 *
 * cc -O3 -mfma -mf16c -mavx512bw -mavx512dq -mavx512vl -mavx512bf16 -DREFQ4_AVX512_BF16 -fsyntax-only gemm_4bit_5_avx512_bf16_blocked.c
 */
#include "pairs_avx512_bf16.h"
#include "driver.h"
#include "gemm_4bit_4_avx512_bf16.c" /* bf16_table */
#include "tiles_2_avx512.h"          /* transpose16 */

_Static_assert(PANEL * PAIR_REGISTERS == PAIR_OUTPUTS, "four panels");
_Static_assert(8 * PART_GROUPS_FP32 == SHORTEST_PART, "a part is a block of 32, or 64 elements");

/* Eight codes of sixteen rows -> one register of each of four steps. */
static inline void decode_group(__m512i codes, __m512i table, __m512i *out) {
    UNROLL for (int s = 0; s < 4; s++)
        out[s * PAIR_REGISTERS] = _mm512_permutexvar_epi16(_mm512_srli_epi16(codes, 4 * s), table);
}

static void decode_tiled(const PairPlan *plan, int64_t panel, int64_t k0, int64_t depth, int r, Piece *piece) {
    const Product *p = plan->p;
    int64_t bs = p->weight.blocksize, record = record_bytes(bs);
    const uint8_t *tiles = p->tiles + panel * panel_bytes(p->K, bs);
    int shift = __builtin_ctzll((unsigned long long)bs);
    __m512i table = _mm512_loadu_si512(plan->table), *out = piece->w + r;
    __m512 *scales = piece->scales + r;
    for (int64_t k = k0; k < k0 + depth; k += 8, out += 4 * PAIR_REGISTERS) {
        const uint8_t *at = tiles + (k >> shift) * record;
        if (((k - k0) & (plan->part - 1)) == 0) {
            *scales = _mm512_loadu_ps(at);
            scales += PAIR_REGISTERS;
        }
        at += 64 + (k & (bs - 1)) * 8;
        decode_group(_mm512_loadu_si512(at), table, out);
        _mm_prefetch((const char *)at + PAIR_DEPTH * 9, _MM_HINT_T0); /* the next piece, at blocksize 64 */
    }
}

static void decode_canonical(const PairPlan *plan, int64_t panel, int64_t k0, int64_t depth, int r, Piece *piece) {
    const Product *p = plan->p;
    const Weight *w = &p->weight;
    int64_t row_blocks = p->K / w->blocksize, n0 = panel * PANEL;
    __m512i table = _mm512_loadu_si512(plan->table), *out = piece->w + r;
    /* What to ask memory for: the next piece, since 64 streams are too many to follow; or this thread's next strip. */
    int64_t ahead = (k0 + depth < p->K ? PAIR_DEPTH : plan->next_strip * p->K - k0) / 2;
    for (int64_t k = k0; k < k0 + depth; k += 128) {
        int64_t bytes = min64(128, k0 + depth - k) / 2;
        __mmask64 there = bytes < 64 ? ((__mmask64)1 << bytes) - 1 : ~(__mmask64)0;
        __m512i rows[PANEL];
        UNROLL for (int i = 0; i < PANEL; i++) { /* a row past the last one is that again: its sums are not written */
            const uint8_t *at = w->packed + (min64(n0 + i, p->N - 1) * p->K + k) / 2;
            rows[i] = _mm512_maskz_loadu_epi8(there, at);
            _mm_prefetch((const char *)at + ahead, _MM_HINT_T0);
        }
        transpose16(rows);
        UNROLL for (int g = 0; g < 16; g++)
            if (4 * g < bytes) decode_group(rows[g], table, out + 4 * g * PAIR_REGISTERS);
        out += 64 * PAIR_REGISTERS;
    }
    int shift = __builtin_ctzll((unsigned long long)w->blocksize);
    for (int i = 0; i < PANEL; i++) {
        int64_t first = min64(n0 + i, p->N - 1) * row_blocks;
        float *scale = (float *)(piece->scales + r) + i;
        ask_for_scale(plan, first + (k0 >> shift) + 2 * ahead / w->blocksize);
        for (int64_t k = k0; k < k0 + depth; k += plan->part, scale += PAIR_OUTPUTS)
            *scale = pair_scale(plan, first + (k >> shift));
    }
}

static void decode_panels(const PairPlan *plan, int64_t n0, int64_t outputs, int64_t k0, int64_t depth, Piece *piece) {
    for (int r = 0; r * PANEL < outputs; r++) {
        if (plan->p->tiles) decode_tiled(plan, n0 / PANEL + r, k0, depth, r, piece);
        else decode_canonical(plan, n0 / PANEL + r, k0, depth, r, piece);
    }
}

/* k = 1 5  0 4  3 7  2 6 of each eight. */
static void pack_halves(uint16_t *out, const uint16_t *x, int64_t depth) {
    const __m256i order = _mm256_setr_epi8(2, 3, 10, 11, 0, 1, 8, 9, 6, 7, 14, 15, 4, 5, 12, 13,
                                           2, 3, 10, 11, 0, 1, 8, 9, 6, 7, 14, 15, 4, 5, 12, 13);
    for (int64_t k = 0; k < depth; k += 16)
        _mm256_storeu_si256((__m256i *)(out + k), _mm256_shuffle_epi8(_mm256_loadu_si256((const __m256i *)(x + k)), order));
}

static void write_panels(const PairPlan *plan, const float *sums, int64_t m, int64_t n0, int64_t outputs) {
    const Product *p = plan->p;
    if (outputs < PAIR_OUTPUTS) {
        write_outputs(p, sums, plan->undo_scale, m, n0, outputs);
        return;
    }
    for (int i = 0; i < PAIR_OUTPUTS; i += PANEL) {
        __m512 out = _mm512_mul_ps(_mm512_loadu_ps(sums + i), _mm512_set1_ps(plan->undo_scale));
        if (p->bias) {
            __m256i bias = _mm256_loadu_si256((const __m256i *)((const uint16_t *)p->bias + n0 + i));
            out = _mm512_add_ps(out, _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bias), 16)));
        }
        _mm256_storeu_si256((__m256i *)((uint16_t *)p->y + m * p->N + n0 + i),
                            _mm512_cvtepi32_epi16(_mm512_srli_epi32(round_upper_half(out), 16)));
    }
}

static int gemm_4bit_5_avx512_bf16_blocked(const Product *p) {
    static const Pairs how = {pack_halves, decode_panels, write_panels, 0};
    PairPlan plan = {.part = min64(p->weight.blocksize, 8 * PART_GROUPS_BF16)};
    plan.undo_scale = bf16_table(p->weight.code, plan.table);
    return pair_product(&plan, &how, p);
}
