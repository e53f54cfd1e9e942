/* GEMM, rung 4: pairs of bf16 with vdpbf16ps. Two multiply-adds per lane and instruction.
 *
 * A group (tiles.h) is 16 rows x 8 codes in one register. Read it as 32 words of four codes each:
 *
 *     dword of row n      word 2n:  k1 k0 k3 k2          word 2n+1:  k5 k4 k7 k6        (lowest nibble first)
 *     >> 4*s              brings one code of each word into its lowest four bits
 *     vpermw(that, table) looks up 32 bf16 values at once: for each row a pair (w[n][k], w[n][k+4])
 *     vdpbf16ps           sums[n] += w[n][k]*x[k] + w[n][k+4]*x[k+4]     with the pair of x broadcast to all rows
 *
 * vpermw takes five index bits, we have four clean ones: the table holds the sixteen values twice.
 *
 * Scales stay out of the inner loop: codes are multiplied unscaled, and a block's sum times its absmax is added to the
 * total. How the sixteen values are rounded to bf16: bf16_table.h.
 *
 * vdpbf16ps treats bf16 subnormals as zero, and its sums are not scaled until a block is complete: |x| beyond about
 * 1e36 can overflow here where scaled weights would not.
 *
 * cc -O3 -mfma -mf16c -mavx512dq -mavx512vl -mavx512bf16 -DREFQ4_AVX512_BF16 -fsyntax-only gemm_4bit_4_avx512_bf16.c
 */
#ifndef GEMM_4BIT_4_AVX512_BF16_C
#define GEMM_4BIT_4_AVX512_BF16_C
#include "simd.h"
#include "bf16_table.h"
#include "driver.h"

_Static_assert(sizeof(__m512i) == GROUP_BYTES, "a group is one register");

static inline __attribute__((always_inline)) void bf16_tile(const uint32_t *x, const uint8_t *tiles, int64_t stride,
                                                            int64_t blocks, int64_t groups, __m512i table,
                                                            Ahead ahead, float *sums,
                                                            const int MT, const int NP) {
    __m512 total[MAX_TOKENS][MAX_PANELS];
    UNROLL for (int m = 0; m < MT; m++) UNROLL for (int p = 0; p < NP; p++) total[m][p] = _mm512_setzero_ps();
    int64_t record = 64 + 64 * groups, part = min64(groups, PART_GROUPS_BF16);
    for (int64_t i = 0, first = 0; i < blocks * (groups / part); i++) {
        __m512 block[MAX_TOKENS][MAX_PANELS];
        UNROLL for (int m = 0; m < MT; m++) UNROLL for (int p = 0; p < NP; p++) block[m][p] = _mm512_setzero_ps();
        for (int64_t g = first; g < first + part; g++, x += 4 * MT) {
            __m512i codes[MAX_PANELS];
            UNROLL for (int p = 0; p < NP; p++) {
                codes[p] = _mm512_loadu_si512(tiles + p * stride + 64 + 64 * g);
                _mm_prefetch((const char *)ahead.at + p * ahead.stride + 64 + 64 * g, _MM_HINT_T0);
            }
            UNROLL for (int s = 0; s < 4; s++) {
                __m512bh w[MAX_PANELS];
                UNROLL for (int p = 0; p < NP; p++)
                    w[p] = (__m512bh)_mm512_permutexvar_epi16(_mm512_srli_epi16(codes[p], 4 * s), table);
                UNROLL for (int m = 0; m < MT; m++) {
                    __m512bh pair = (__m512bh)_mm512_set1_epi32((int)x[s * MT + m]);
                    UNROLL for (int p = 0; p < NP; p++) block[m][p] = _mm512_dpbf16_ps(block[m][p], w[p], pair);
                }
            }
        }
        UNROLL for (int p = 0; p < NP; p++) {
            __m512 absmax = _mm512_loadu_ps(tiles + p * stride);
            _mm_prefetch((const char *)ahead.at + p * ahead.stride, _MM_HINT_T0);
            UNROLL for (int m = 0; m < MT; m++) total[m][p] = _mm512_fmadd_ps(block[m][p], absmax, total[m][p]);
        }
        first += part;
        if (first == groups) { /* the next record */
            first = 0;
            tiles += record;
            ahead.at = --ahead.left == 0 ? ahead.next : ahead.at + record;
        }
    }
    UNROLL for (int m = 0; m < MT; m++)
        UNROLL for (int p = 0; p < NP; p++) _mm512_storeu_ps(sums + (m * MAX_PANELS + p) * PANEL, total[m][p]);
}

#define KERNEL(MT, NP) static void bf16_tile_##MT##x##NP(TILE_KERNEL_PARAMETERS) {                                     \
        bf16_tile(x, tiles, stride, blocks, groups, _mm512_loadu_si512(table), ahead, sums, MT, NP); }
/* More panels at few tokens, fewer at many: 4 to 16 independent sums hide the latency, more would spill. */
KERNEL(1, 1) KERNEL(1, 2) KERNEL(1, 4) KERNEL(2, 1) KERNEL(2, 2) KERNEL(2, 4) KERNEL(3, 1) KERNEL(3, 2) KERNEL(3, 4)
KERNEL(4, 1) KERNEL(4, 2) KERNEL(4, 4) KERNEL(5, 1) KERNEL(5, 2) KERNEL(6, 1) KERNEL(6, 2) KERNEL(7, 1) KERNEL(7, 2)
KERNEL(8, 1) KERNEL(8, 2)
#undef KERNEL

static float bf16_table(const float *code, void *table) {
    float c = table_factor(code);
    uint16_t *t = table;
    for (int i = 0; i < 32; i++) t[i] = fp32_to_bf16(code[i & 15] * c);
    return 1 / c;
}

static const Engine bf16_engine = {
    .x_order = BF16_PAIRS,
    .make_table = bf16_table,
    .kernel = {{0},
               {bf16_tile_1x1, bf16_tile_1x2, bf16_tile_1x4}, {bf16_tile_2x1, bf16_tile_2x2, bf16_tile_2x4},
               {bf16_tile_3x1, bf16_tile_3x2, bf16_tile_3x4}, {bf16_tile_4x1, bf16_tile_4x2, bf16_tile_4x4},
               {bf16_tile_5x1, bf16_tile_5x2}, {bf16_tile_6x1, bf16_tile_6x2}, {bf16_tile_7x1, bf16_tile_7x2},
               {bf16_tile_8x1, bf16_tile_8x2}},
};

static int gemm_4bit_4_avx512_bf16(const Product *p) { return tile_product(&bf16_engine, p); }
#endif
