/* GEMM, rung 3 for AVX2: few tokens of bf16, with look-ups of bytes. For one to four tokens decoding is what costs, and
 * vpermps (rung 2) decodes eight weights with five instructions. vpshufb looks up 32 bytes with one.
 *
 * A bf16 value is two bytes, so the code table is two tables of sixteen bytes: the upper halves and the lower halves.
 * Half a group (tiles.h) is 8 rows x 8 codes, a dword b0 b1 b2 b3 for each row:
 *
 *     codes & 15, codes >> 4 & 15     32 indices: the low nibbles (k1 k3 k5 k7), the high ones (k0 k2 k4 k6)
 *     vpshufb, twice                  32 upper bytes, 32 lower bytes
 *     vpunpcklbw, vpunpckhbw          2 x 16 words, each a bf16 value:
 *
 *         low    | row 0: b1 b0 | row 0: b3 b2 | row 1 | row 1 |  and rows 4, 5      a dword is a pair of values
 *         high   | row 2: b1 b0 | row 2: b3 b2 | row 3 | row 3 |  and rows 6, 7
 *
 *     << 16 of a pair                 its lower value in fp32 (b0, b2): bf16 is fp32's upper half
 *     & 0xFFFF0000                    its upper value (b1, b3)
 *     vfmadd                          with x[k] x[k+4] x[k] x[k+4] ...: two lanes for each row
 *
 * That is 19 instructions for 64 weights before the multiply-adds, where rung 2 needs 40. The two lanes of a row are
 * added at the end of a part of a block (vhaddps puts the rows in order), and the sum is scaled there, as everywhere.
 *
 * The table is rounded to bf16 (bf16_table.h), so this is for bf16 activations only: for those, what it rounds away is
 * less than the reference's rounding of each weight.
 *
 * cc -O3 -mavx2 -mfma -mf16c -DREFQ4_AVX2 -fsyntax-only gemm_4bit_3_avx2_bytes.c
 */
#ifndef GEMM_4BIT_3_AVX2_BYTES_C
#define GEMM_4BIT_3_AVX2_BYTES_C
#include "simd.h"
#include "bf16_table.h"
#include "driver.h"
#include "gemm_4bit_2_avx2.c" /* clear_totals, add_scaled */

_Static_assert(sizeof(__m256i) == 8 * 8 / 2, "eight rows of eight codes are one register");

typedef struct {
    __m256i upper, lower, nibble, upper_half;
} ByteTable;

static inline ByteTable byte_registers(const uint8_t *table) {
    ByteTable t = {_mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i *)table)),
                   _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i *)table + 1)), _mm256_set1_epi8(15),
                   _mm256_set1_epi32((int)0xFFFF0000)};
    return t;
}

/* 8 rows x 4 codes, given as 32 indices -> w[i][step]: values in fp32; i: rows 0 1 4 5 or 2 3 6 7. */
static inline __attribute__((always_inline)) void byte_lookup(__m256i index, const ByteTable *t, __m256 w[2][2]) {
    __m256i upper = _mm256_shuffle_epi8(t->upper, index), lower = _mm256_shuffle_epi8(t->lower, index);
    __m256i pairs[2] = {_mm256_unpacklo_epi8(lower, upper), _mm256_unpackhi_epi8(lower, upper)};
    UNROLL for (int i = 0; i < 2; i++) {
        w[i][0] = _mm256_castsi256_ps(_mm256_slli_epi32(pairs[i], 16));
        w[i][1] = _mm256_castsi256_ps(_mm256_and_si256(pairs[i], t->upper_half));
    }
}

/* Eight rows x eight codes times the eight x of each token; pairs: two floats, broadcast as one double. */
static inline __attribute__((always_inline)) void add_group(__m256 sum[4][2][2], const int h, const __m256i *codes,
                                                            const double *pairs, const ByteTable *t, const int MT) {
    __m256i bytes = _mm256_loadu_si256(codes);
    UNROLL for (int low = 0; low < 2; low++) {
        __m256 w[2][2];
        byte_lookup(_mm256_and_si256(low ? bytes : _mm256_srli_epi32(bytes, 4), t->nibble), t, w);
        UNROLL for (int odd = 0; odd < 2; odd++)
            UNROLL for (int m = 0; m < MT; m++) {
                __m256 value = _mm256_castpd_ps(_mm256_broadcast_sd(pairs + (2 * low + odd) * MT + m));
                UNROLL for (int i = 0; i < 2; i++) sum[m][h][i] = _mm256_fmadd_ps(w[i][odd], value, sum[m][h][i]);
            }
        /* Left alone, gcc keeps constants in registers and sums in memory, where each waits for the store before it:
         * saying that all eight sums are needed in registers here takes a third off four tokens' time. */
        if (MT == 4)
            KEEP_IN_REGISTERS("+x"(sum[0][h][0]), "+x"(sum[0][h][1]), "+x"(sum[1][h][0]), "+x"(sum[1][h][1]),
                              "+x"(sum[2][h][0]), "+x"(sum[2][h][1]), "+x"(sum[3][h][0]), "+x"(sum[3][h][1]));
    }
}

/* HALVES: a panel's two halves of eight rows together (few tokens: more sums that don't wait for each other), or one
 * after the other (more tokens: sixteen registers hold no more sums). An output's order of summing is the same. */
static inline __attribute__((always_inline)) void bytes_tile(const float *x, const uint8_t *tiles, int64_t stride,
                                                             int64_t blocks, int64_t groups, const uint8_t *table,
                                                             float *sums, const int MT, const int HALVES) {
    (void)stride; /* one panel */
    const ByteTable t = byte_registers(table);
    clear_totals(sums, MT);
    int64_t part = min64(groups, PART_GROUPS_BF16);
    for (int64_t i = 0, first = 0; i < blocks * (groups / part); i++) {
        UNROLL for (int half = 0; half < 2; half += HALVES) {
            __m256 sum[4][2][2]; /* token, half, rows 0 1 4 5 or 2 3 6 7 */
            UNROLL for (int m = 0; m < MT; m++)
                UNROLL for (int h = 0; h < HALVES; h++) sum[m][h][0] = sum[m][h][1] = _mm256_setzero_ps();
            for (int64_t g = 0; g < part; g++) {
                const uint8_t *codes = tiles + 64 + 64 * (first + g);
                if (half == 0) _mm_prefetch((const char *)codes + 1152, _MM_HINT_T0); /* across page ends */
                UNROLL for (int h = 0; h < HALVES; h++)
                    add_group(sum, h, (const __m256i *)codes + half + h, (const double *)x + 4 * MT * g, &t, MT);
            }
            UNROLL for (int h = 0; h < HALVES; h++) {
                const float *scale = (const float *)tiles + 8 * (half + h);
                UNROLL for (int m = 0; m < MT; m++)
                    add_scaled(sums + m * MAX_PANELS * PANEL + 8 * (half + h), _mm256_hadd_ps(sum[m][h][0], sum[m][h][1]),
                               scale);
            }
        }
        x += 8 * MT * part;
        first += part;
        if (first == groups) { /* the next record */
            first = 0;
            tiles += 64 + 64 * groups;
        }
    }
}

#define KERNEL(MT, HALVES) static void bytes_tile_##MT(TILE_KERNEL_PARAMETERS) {                                       \
        (void)ahead, bytes_tile(x, tiles, stride, blocks, groups, table, sums, MT, HALVES); }
KERNEL(1, 2) KERNEL(2, 2) KERNEL(3, 1) KERNEL(4, 1)
#undef KERNEL

/* Sixteen upper bytes, then sixteen lower ones. */
static float byte_table(const float *code, void *table) {
    float c = table_factor(code);
    uint8_t *t = table;
    for (int i = 0; i < 16; i++) {
        uint16_t value = fp32_to_bf16(code[i] * c);
        t[i] = (uint8_t)(value >> 8);
        t[16 + i] = (uint8_t)value;
    }
    return 1 / c;
}

static const Engine bytes_engine = {
    .x_order = FP32_PAIRS,
    .make_table = byte_table,
    .kernel = {{0}, {bytes_tile_1}, {bytes_tile_2}, {bytes_tile_3}, {bytes_tile_4}},
};

static int gemm_4bit_3_avx2_bytes(const Product *p) { return tile_product(&bytes_engine, p); }
#endif
