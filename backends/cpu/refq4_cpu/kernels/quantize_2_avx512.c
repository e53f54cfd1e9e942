/* Quantising to 4 bits, rung 2: sixteen elements at a time.
 *
 * The rank is a binary search in four steps, and each step's threshold comes out of a register with vpermps:
 *
 *     rank = 0;  for half in 8, 4, 2, 1:   rank += half  where  scaled > thresholds[rank + half - 1]
 *
 *     16 ranks -> vpermd by `order` -> 16 codes in dwords -> pairs in qwords -> 8 bytes (vpmovqb)
 *
 *     qword     [ second code (high dword) | first code (low dword) ]   byte = first << 4 | second
 *
 * cc -O3 -mfma -mf16c -mavx512bw -mavx512dq -mavx512vl -DREFQ4_AVX512 -fsyntax-only quantize_2_avx512.c
 */
#include "simd.h"
#include "quantize_1_scalar.c"

static inline __m512 load16(const void *p, enum dtype dtype, int64_t i) {
    if (dtype == FP32) return _mm512_loadu_ps((const float *)p + i);
    __m256i half = _mm256_loadu_si256((const __m256i *)((const uint16_t *)p + i));
    if (dtype == FP16) return _mm512_cvtph_ps(half);
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
}

typedef struct {
    __m512 step[4]; /* thresholds for half = 8, 4, 2, 1, indexed by rank */
    __m512i order;
} CodeRegisters;

static CodeRegisters code_registers(const Quantize *q) {
    CodeRegisters r;
    float padded[32] = {0};
    memcpy(padded, q->thresholds, 15 * sizeof(float));
    for (int i = 0; i < 4; i++) r.step[i] = _mm512_loadu_ps(padded + (8 >> i) - 1);
    r.order = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)q->order));
    return r;
}

static inline __m512i codes16(const CodeRegisters *r, __m512 x, __m512 inverse) {
    __m512 scaled = _mm512_mul_ps(x, inverse);
    /* min and max return their second operand where one is NaN: x stands second so that a NaN stays one */
    scaled = _mm512_min_ps(_mm512_set1_ps(1), _mm512_max_ps(_mm512_set1_ps(-1), scaled));
    __m512i rank = _mm512_setzero_si512();
    for (int i = 0; i < 4; i++) {
        __mmask16 up = _mm512_cmp_ps_mask(scaled, _mm512_permutexvar_ps(rank, r->step[i]), _CMP_GT_OQ);
        rank = _mm512_mask_add_epi32(rank, up, rank, _mm512_set1_epi32(8 >> i));
    }
    return _mm512_permutexvar_epi32(rank, r->order);
}

static void avx512_quantize_block(const Quantize *q, const CodeRegisters *r, int64_t block) {
    int64_t first = block * q->blocksize, measured = q->given ? 0 : q->blocksize;
    __m512i most = _mm512_setzero_si512(), magnitude = _mm512_set1_epi32(0x7FFFFFFF);
    for (int64_t i = 0; i < measured; i += 16)
        most = _mm512_max_epu32(most, _mm512_and_si512(_mm512_castps_si512(load16(q->x, q->dtype, first + i)), magnitude));
    float absmax = q->given ? q->given[block] : float_of(_mm512_reduce_max_epu32(most));
    q->absmax[block] = absmax;
    __m512 inverse = _mm512_set1_ps(finite_inverse(absmax));
    for (int64_t i = 0; i < q->blocksize; i += 16) {
        __m512i codes = codes16(r, load16(q->x, q->dtype, first + i), inverse);
        __m512i bytes = _mm512_or_si512(_mm512_slli_epi64(codes, 4), _mm512_srli_epi64(codes, 32));
        _mm_storel_epi64((__m128i *)(q->out + (first + i) / 2), _mm512_cvtepi64_epi8(bytes));
    }
}

static void avx512_quantize_item(void *context, int64_t item, int thread) {
    (void)thread;
    const Quantize *q = context;
    CodeRegisters r = code_registers(q);
    int64_t per = ceil_div(ITEM_ELEMENTS, q->blocksize), whole = q->numel / q->blocksize;
    for (int64_t b = item * per; b < min64((item + 1) * per, ceil_div(q->numel, q->blocksize)); b++) {
        if (b < whole) avx512_quantize_block(q, &r, b);
        else scalar_quantize_block(q, b); /* the short last block */
    }
}

static void quantize_2_avx512(const Quantize *q) {
    if (!q->pack || q->code_length != 16 || q->blocksize % 16) {
        quantize_1_scalar(q);
        return;
    }
    int64_t per = ceil_div(ITEM_ELEMENTS, q->blocksize) * q->blocksize;
    run_parallel(avx512_quantize_item, (void *)q, ceil_div(q->numel, per), q->threads);
}
