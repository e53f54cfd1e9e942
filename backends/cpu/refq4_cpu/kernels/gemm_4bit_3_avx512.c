/* GEMM, rung 3: fp32 with AVX-512. The code table in one register, vpermps as the look-up.
 *
 * A group (tiles.h) is 16 rows x 8 codes in one register, one dword per row:
 *
 *     >> 4*s              brings the s-th code of each row into the lowest four bits
 *     vpermps(that, code) looks up sixteen fp32 values: vpermps reads four index bits and ignores the rest
 *     vfmadd              sums[n] += w[n][k] * x[k]      with x[k] broadcast to all rows
 *
 * The look-up runs on other ports than the multiply-adds, so from four tokens on it is hidden behind them. Scales stay
 * out of the inner loop: the sum of a part of a block times its absmax is added to a subtotal in a register, and the
 * subtotal now and then to the total, in memory.
 *
 * cc -O3 -mfma -mf16c -mavx512bw -mavx512dq -mavx512vl -DREFQ4_AVX512 -fsyntax-only gemm_4bit_3_avx512.c
 */
#include "simd.h"
#include "driver.h"

_Static_assert(sizeof(__m512i) == GROUP_BYTES, "a group is one register");

/* total[0 .. 15] += subtotal, which becomes zero */
static inline __attribute__((always_inline)) void add_subtotal(float *total, __m512 *subtotal) {
    _mm512_storeu_ps(total, _mm512_add_ps(_mm512_loadu_ps(total), *subtotal));
    *subtotal = _mm512_setzero_ps();
}

static inline __attribute__((always_inline)) void fp32_tile(const float *x, const uint8_t *tiles, int64_t stride,
                                                            int64_t blocks, int64_t groups, __m512 table,
                                                            Ahead ahead, float *sums,
                                                            const int MT, const int NP) {
    __m512 subtotal[MAX_TOKENS][MAX_PANELS];
    UNROLL for (int m = 0; m < MT; m++) UNROLL for (int p = 0; p < NP; p++) subtotal[m][p] = _mm512_setzero_ps();
    memset(sums, 0, (size_t)MT * MAX_PANELS * PANEL * sizeof(float));
    int64_t record = 64 + 64 * groups, part = min64(groups, PART_GROUPS_FP32), parts = blocks * (groups / part);
    for (int64_t i = 0, first = 0; i < parts; i++) {
        __m512 block[MAX_TOKENS][MAX_PANELS];
        UNROLL for (int m = 0; m < MT; m++) UNROLL for (int p = 0; p < NP; p++) block[m][p] = _mm512_setzero_ps();
        for (int64_t g = first; g < first + part; g++, x += 8 * MT) {
            __m512i codes[MAX_PANELS];
            UNROLL for (int p = 0; p < NP; p++) {
                codes[p] = _mm512_loadu_si512(tiles + p * stride + 64 + 64 * g);
                _mm_prefetch((const char *)ahead.at + p * ahead.stride + 64 + 64 * g, _MM_HINT_T0);
            }
            UNROLL for (int s = 0; s < 8; s++) {
                __m512 w[MAX_PANELS];
                UNROLL for (int p = 0; p < NP; p++)
                    w[p] = _mm512_permutexvar_ps(_mm512_srli_epi32(codes[p], 4 * s), table);
                UNROLL for (int m = 0; m < MT; m++) {
                    __m512 value = _mm512_set1_ps(x[s * MT + m]);
                    UNROLL for (int p = 0; p < NP; p++) block[m][p] = _mm512_fmadd_ps(w[p], value, block[m][p]);
                }
            }
        }
        UNROLL for (int p = 0; p < NP; p++) {
            __m512 absmax = _mm512_loadu_ps(tiles + p * stride);
            _mm_prefetch((const char *)ahead.at + p * ahead.stride, _MM_HINT_T0);
            UNROLL for (int m = 0; m < MT; m++) subtotal[m][p] = _mm512_fmadd_ps(block[m][p], absmax, subtotal[m][p]);
        }
        first += part;
        if (first == groups) { /* the next record */
            first = 0;
            tiles += record;
            ahead.at = --ahead.left == 0 ? ahead.next : ahead.at + record;
        }
        if (i % SUBTOTAL_PARTS == SUBTOTAL_PARTS - 1 || i == parts - 1)
            UNROLL for (int m = 0; m < MT; m++)
                UNROLL for (int p = 0; p < NP; p++) add_subtotal(sums + (m * MAX_PANELS + p) * PANEL, &subtotal[m][p]);
    }
}

#define KERNEL(MT, NP) static void fp32_tile_##MT##x##NP(TILE_KERNEL_PARAMETERS) {                                     \
        fp32_tile(x, tiles, stride, blocks, groups, _mm512_loadu_ps(table), ahead, sums, MT, NP); }
KERNEL(1, 1) KERNEL(1, 2) KERNEL(1, 4) KERNEL(2, 1) KERNEL(2, 2) KERNEL(2, 4) KERNEL(3, 1) KERNEL(3, 2)
KERNEL(4, 1) KERNEL(4, 2) KERNEL(5, 1) KERNEL(5, 2) KERNEL(6, 1) KERNEL(6, 2) KERNEL(7, 1) KERNEL(7, 2)
KERNEL(8, 1) KERNEL(8, 2)
#undef KERNEL

static float fp32_table(const float *code, void *table) {
    memcpy(table, code, 64);
    return 1;
}

static const Engine fp32_engine = {
    .make_table = fp32_table,
    .kernel = {{0},
               {fp32_tile_1x1, fp32_tile_1x2, fp32_tile_1x4}, {fp32_tile_2x1, fp32_tile_2x2, fp32_tile_2x4},
               {fp32_tile_3x1, fp32_tile_3x2}, {fp32_tile_4x1, fp32_tile_4x2}, {fp32_tile_5x1, fp32_tile_5x2},
               {fp32_tile_6x1, fp32_tile_6x2}, {fp32_tile_7x1, fp32_tile_7x2}, {fp32_tile_8x1, fp32_tile_8x2}},
};

static int gemm_4bit_3_avx512(const Product *p) { return tile_product(&fp32_engine, p); }
