/* GEMM, rung 2: fp32 with AVX2. Registers of eight, so sixteen table entries take two look-ups and a choice.
 *
 *     vpermps        reads three index bits: one look-up in code[0..7], one in code[8..15]
 *     vblendvps      takes the second where the code's top bit is set; it reads the sign bit, so the code is shifted up
 *
 * Otherwise it is gemm_4bit_3_avx512.c with a panel as two halves of eight rows. Sixteen registers hold few sums: up to
 * four tokens, and the subtotals to which each part of a block is added lie in memory, where they cost one load a part.
 *
 * cc -O3 -mavx2 -mfma -mf16c -DREFQ4_AVX2 -fsyntax-only gemm_4bit_2_avx2.c
 */
#ifndef GEMM_4BIT_2_AVX2_C
#define GEMM_4BIT_2_AVX2_C
#include "simd.h"
#include "driver.h"

_Static_assert(2 * sizeof(__m256i) == GROUP_BYTES, "a group is two registers of eight rows");

static inline __attribute__((always_inline)) __m256 avx2_lookup(__m256i codes, int s, __m256 low, __m256 high) {
    __m256i index = _mm256_srli_epi32(codes, 4 * s);
    __m256 top = _mm256_castsi256_ps(_mm256_slli_epi32(codes, 28 - 4 * s));
    return _mm256_blendv_ps(_mm256_permutevar8x32_ps(low, index), _mm256_permutevar8x32_ps(high, index), top);
}

static inline void clear_totals(float *totals, int tokens) {
    for (int m = 0; m < tokens; m++) memset(totals + m * MAX_PANELS * PANEL, 0, PANEL * sizeof(float));
}

/* at[0 .. 7] += sum * scale[0 .. 7] */
static inline __attribute__((always_inline)) void add_scaled(float *at, __m256 sum, const float *scale) {
    _mm256_storeu_ps(at, _mm256_fmadd_ps(sum, _mm256_loadu_ps(scale), _mm256_loadu_ps(at)));
}

/* total[0 .. 15] += subtotal[0 .. 15], which becomes zero */
static inline __attribute__((always_inline)) void add_subtotal_avx2(float *total, float *subtotal) {
    UNROLL for (int i = 0; i < PANEL; i += 8) {
        _mm256_storeu_ps(total + i, _mm256_add_ps(_mm256_loadu_ps(total + i), _mm256_loadu_ps(subtotal + i)));
        _mm256_storeu_ps(subtotal + i, _mm256_setzero_ps());
    }
}

static inline __attribute__((always_inline)) void avx2_tile(const float *x, const uint8_t *tiles, int64_t stride,
                                                            int64_t blocks, int64_t groups, const float *table,
                                                            float *sums, const int MT) {
    (void)stride; /* one panel */
    __m256 low = _mm256_loadu_ps(table), high = _mm256_loadu_ps(table + 8);
    float *subtotals = sums + PANEL; /* where a second panel's totals would lie */
    clear_totals(sums, MT);
    clear_totals(subtotals, MT);
    int64_t part = min64(groups, PART_GROUPS_FP32), parts = blocks * (groups / part);
    const uint8_t *absmax = tiles;
    for (int64_t i = 0, first = 0; i < parts; i++) {
        if (first == 0) { /* a new record */
            absmax = tiles;
            tiles += 64;
        }
        __m256 block[4][2];
        UNROLL for (int m = 0; m < MT; m++) block[m][0] = block[m][1] = _mm256_setzero_ps();
        for (int64_t g = 0; g < part; g++, x += 8 * MT, tiles += 64) {
            UNROLL for (int half = 0; half < 2; half++) {
                __m256i codes = _mm256_loadu_si256((const __m256i *)(tiles + 32 * half));
                UNROLL for (int s = 0; s < 8; s++) {
                    __m256 w = avx2_lookup(codes, s, low, high);
                    UNROLL for (int m = 0; m < MT; m++)
                        block[m][half] = _mm256_fmadd_ps(w, _mm256_set1_ps(x[s * MT + m]), block[m][half]);
                }
            }
        }
        UNROLL for (int half = 0; half < 2; half++) {
            const float *scale = (const float *)absmax + 8 * half;
            UNROLL for (int m = 0; m < MT; m++)
                add_scaled(subtotals + m * MAX_PANELS * PANEL + 8 * half, block[m][half], scale);
        }
        first = first + part == groups ? 0 : first + part;
        if (i % SUBTOTAL_PARTS == SUBTOTAL_PARTS - 1 || i == parts - 1)
            for (int m = 0; m < MT; m++)
                add_subtotal_avx2(sums + m * MAX_PANELS * PANEL, subtotals + m * MAX_PANELS * PANEL);
    }
}

#define KERNEL(MT) static void avx2_tile_##MT(TILE_KERNEL_PARAMETERS) {                                                \
        (void)ahead, avx2_tile(x, tiles, stride, blocks, groups, table, sums, MT); }
KERNEL(1) KERNEL(2) KERNEL(3) KERNEL(4)
#undef KERNEL

static float avx2_table(const float *code, void *table) {
    memcpy(table, code, 64);
    return 1;
}

static const Engine avx2_engine = {
    .make_table = avx2_table,
    .kernel = {{0}, {avx2_tile_1}, {avx2_tile_2}, {avx2_tile_3}, {avx2_tile_4}},
};

static int gemm_4bit_2_avx2(const Product *p) { return tile_product(&avx2_engine, p); }
#endif
