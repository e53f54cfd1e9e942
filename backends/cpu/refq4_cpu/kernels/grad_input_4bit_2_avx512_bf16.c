/* The product of rung 1 for bf16, with vdpbf16ps: pairs along k, which is a pair of rows of the stored weight.
 *
 *     y[m][n] += x[m][k] * w[k][n]  +  x[m][k+1] * w[k+1][n]        w: K rows of N codes, blocks along n
 *
 * pairs_avx512_bf16.h multiplies; here is how 64 columns of a few rows are decoded. The sixteen values of a block are
 * scaled and rounded first. One vpermw then looks up two rows, because their tables fill the two halves of a register and
 * the fifth bit of an index tells them apart:
 *
 *     table       | code * absmax of row k, 16 x bf16 | of row k+1, 16 x bf16 |
 *     dword j     | . k+1's byte j | . k's byte j |        16 bytes of each row: columns 2j and 2j+1
 *     index       | 1 nibble       | 0 nibble     |        >> 4: columns 2j    >> 0: columns 2j+1
 *
 * So a register holds the even or the odd ones of 32 columns, and the result is put in order when it is rounded: an even
 * column is the lower half of a dword, the odd one the upper.
 *
 * A weight is rounded to bf16 once, as by dequantize_4bit. vdpbf16ps and that rounding treat bf16 subnormals as zero.
 * Rung 1 serves the shapes whose rows are no whole blocks of 32, 64, 128, ... columns.
 *
 * cc -O3 -mfma -mf16c -mavx512bw -mavx512dq -mavx512vl -mavx512bf16 -DREFQ4_AVX512_BF16 -fsyntax-only grad_input_4bit_2_avx512_bf16.c
 */
#include "pairs_avx512_bf16.h"

/* The finished values of one block in each of two rows. */
static inline __m512i two_tables(__m512 code, float scale, float scale1) {
    __m512 first = _mm512_mul_ps(code, _mm512_set1_ps(scale)), second = _mm512_mul_ps(code, _mm512_set1_ps(scale1));
    return (__m512i)_mm512_cvtne2ps_pbh(second, first); /* the lower half comes last */
}

/* 32 columns of two rows, 16 bytes each -> the even columns, the odd ones. */
static inline void decode_two_rows(const uint8_t *row, const uint8_t *row1, __m512i table, __m512i *out) {
    __m512i low = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)row));
    __m512i high = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)row1));
    __m512i bytes = _mm512_or_si512(low, _mm512_slli_epi32(high, 16));
    __m512i nibble_of_each = _mm512_set1_epi32(0x000F000F), second_row = _mm512_set1_epi32(0x00100000);
    __m512i even = _mm512_and_si512(_mm512_srli_epi32(bytes, 4), nibble_of_each);
    __m512i odd = _mm512_and_si512(bytes, nibble_of_each);
    out[0] = _mm512_permutexvar_epi16(_mm512_or_si512(even, second_row), table);
    out[1] = _mm512_permutexvar_epi16(_mm512_or_si512(odd, second_row), table);
}

static void decode_rows(const PairPlan *plan, int64_t n0, int64_t outputs, int64_t k0, int64_t depth, Piece *piece) {
    const Product *p = plan->p;
    const Weight *w = &p->weight;
    __m512i *out = piece->w;
    __m512 code = _mm512_loadu_ps(w->code);
    int64_t row_blocks = p->N / w->blocksize, row_bytes = p->N / 2;
    int64_t block = n0 / w->blocksize, next = (n0 + outputs - 32) / w->blocksize - block; /* 1: 32 columns are a block */
    for (int64_t k = k0; k < k0 + depth; k += 2, out += PAIR_REGISTERS) {
        int64_t last = k + 1 == p->K; /* the last row has no partner: x and the weight are 0 */
        const uint8_t *row = w->packed + k * row_bytes + n0 / 2, *row1 = last ? row : row + row_bytes;
        int64_t at = k * row_blocks + block, at1 = last ? at : at + row_blocks;
        __m512i table = two_tables(code, pair_scale(plan, at), last ? 0 : pair_scale(plan, at1));
        __builtin_prefetch(row + PAIR_DEPTH * row_bytes); /* rows are far apart in memory */
        __builtin_prefetch(row1 + PAIR_DEPTH * row_bytes);
        decode_two_rows(row, row1, table, out);
        if (outputs == 32) continue;
        if (next) table = two_tables(code, pair_scale(plan, at + 1), last ? 0 : pair_scale(plan, at1 + 1));
        decode_two_rows(row + 16, row1 + 16, table, out + 2);
    }
}

static void pack_neighbours(uint16_t *out, const uint16_t *x, int64_t depth) {
    memcpy(out, x, (size_t)depth * 2);
    if (depth & 1) out[depth] = 0;
}

static void write_even_and_odd(const PairPlan *plan, const float *sums, int64_t m, int64_t n0, int64_t outputs) {
    const Product *p = plan->p;
    for (int64_t n = n0; n < n0 + outputs; n += 32, sums += 32) {
        __m512 even = _mm512_loadu_ps(sums), odd = _mm512_loadu_ps(sums + 16);
        __m512i upper = _mm512_set1_epi32((int)0xFFFF0000);
        if (p->bias) {
            __m512i both = _mm512_loadu_si512((const uint16_t *)p->bias + n);
            even = _mm512_add_ps(even, _mm512_castsi512_ps(_mm512_slli_epi32(both, 16)));
            odd = _mm512_add_ps(odd, _mm512_castsi512_ps(_mm512_and_si512(both, upper)));
        }
        __m512i low = _mm512_srli_epi32(round_upper_half(even), 16), high = _mm512_and_si512(round_upper_half(odd), upper);
        _mm512_storeu_si512((uint16_t *)p->y + m * p->N + n, _mm512_or_si512(low, high));
    }
}

static int grad_input_4bit_2_avx512_bf16(const Product *p) {
    static const Pairs how = {pack_neighbours, decode_rows, write_even_and_odd, 1};
    PairPlan plan = {.part = PAIR_DEPTH};
    return pair_product(&plan, &how, p);
}
