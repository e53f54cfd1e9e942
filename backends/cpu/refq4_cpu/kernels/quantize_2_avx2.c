/* Quantising to 4 bits, rung 2 for AVX2: eight elements at a time.
 *
 * The rank is a binary search in four steps. What a step asks depends on the answers before it, so its thresholds are a
 * table indexed by those answers, and the four tables have 1, 2, 4 and 8 entries: the last just fits a register.
 *
 *     answers  rank = 0                 8 lanes
 *     step 1   scaled > t[7]            rank = up                     (a comparison gives 0 or -1, so 2*rank - it)
 *     step 2   scaled > t[3 | 11]       rank = 2*rank + up            vpermps(table, rank) picks the threshold
 *     step 3   scaled > t[1 5 9 13]     ...
 *     step 4   scaled > t[0 2 4 .. 14]  rank = 0 .. 15
 *
 *     4 x 8 ranks in dwords -> 32 in bytes (vpackssdw, vpackuswb, vpermd) -> 32 codes by `order` (vpshufb)
 *     -> 16 bytes: first * 16 + second (vpmaddubsw), packed
 *
 * cc -O3 -mavx2 -mfma -mf16c -DREFQ4_AVX2 -fsyntax-only quantize_2_avx2.c
 */
#include "simd.h"
#include "quantize_1_scalar.c"

static inline __m256 load8(const void *p, enum dtype dtype, int64_t i) {
    if (dtype == FP32) return _mm256_loadu_ps((const float *)p + i);
    __m128i half = _mm_loadu_si128((const __m128i *)((const uint16_t *)p + i));
    if (dtype == FP16) return _mm256_cvtph_ps(half);
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16));
}

typedef struct {
    __m256 step[4]; /* thresholds, indexed by the answers so far */
    __m256i order;
} CodeRegistersAvx2;

static CodeRegistersAvx2 code_registers_avx2(const Quantize *q) {
    CodeRegistersAvx2 r;
    for (int s = 0; s < 4; s++) {
        float table[8] = {0};
        for (int i = 0; i < 1 << s; i++) table[i] = q->thresholds[(8 >> s) - 1 + i * (16 >> s)];
        r.step[s] = _mm256_loadu_ps(table);
    }
    r.order = _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i *)q->order));
    return r;
}

static inline __m256i ranks8(const CodeRegistersAvx2 *r, __m256 x, __m256 inverse) {
    __m256 scaled = _mm256_mul_ps(x, inverse);
    /* min and max return their second operand where one is NaN: x stands second so that a NaN stays one */
    scaled = _mm256_min_ps(_mm256_set1_ps(1), _mm256_max_ps(_mm256_set1_ps(-1), scaled));
    __m256i rank = _mm256_setzero_si256();
    for (int s = 0; s < 4; s++) {
        __m256 threshold = _mm256_permutevar8x32_ps(r->step[s], rank);
        __m256i up = _mm256_castps_si256(_mm256_cmp_ps(scaled, threshold, _CMP_GT_OQ));
        rank = _mm256_sub_epi32(_mm256_add_epi32(rank, rank), up);
    }
    return rank;
}

static inline __attribute__((always_inline)) void avx2_quantize_block(const Quantize *q, const CodeRegistersAvx2 *r,
                                                                      int64_t block, const enum dtype dtype) {
    int64_t first = block * q->blocksize, measured = q->given ? 0 : q->blocksize;
    __m256i most = _mm256_setzero_si256(), magnitude = _mm256_set1_epi32(0x7FFFFFFF);
    for (int64_t i = 0; i < measured; i += 8) /* as integers, so that a NaN is the largest */
        most = _mm256_max_epu32(most, _mm256_and_si256(_mm256_castps_si256(load8(q->x, dtype, first + i)), magnitude));
    uint32_t lanes[8], largest = 0;
    _mm256_storeu_si256((__m256i *)lanes, most);
    for (int i = 0; i < 8; i++) largest = lanes[i] > largest ? lanes[i] : largest;
    float absmax = q->given ? q->given[block] : float_of(largest);
    q->absmax[block] = absmax;
    __m256 inverse = _mm256_set1_ps(finite_inverse(absmax));
    for (int64_t i = first; i < first + q->blocksize; i += 32) {
        __m256i a = ranks8(r, load8(q->x, dtype, i), inverse), b = ranks8(r, load8(q->x, dtype, i + 8), inverse);
        __m256i c = ranks8(r, load8(q->x, dtype, i + 16), inverse), d = ranks8(r, load8(q->x, dtype, i + 24), inverse);
        /* packing works within lanes: dwords of the result are a0 b0 c0 d0 | a1 b1 c1 d1, four ranks each */
        __m256i bytes = _mm256_packus_epi16(_mm256_packs_epi32(a, b), _mm256_packs_epi32(c, d));
        bytes = _mm256_permutevar8x32_epi32(bytes, _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7));
        __m256i codes = _mm256_shuffle_epi8(r->order, bytes);
        __m256i pairs = _mm256_maddubs_epi16(codes, _mm256_set1_epi16(0x0110)); /* first * 16 + second * 1 */
        __m128i out = _mm_packus_epi16(_mm256_castsi256_si128(pairs), _mm256_extracti128_si256(pairs, 1));
        _mm_storeu_si128((__m128i *)(q->out + i / 2), out);
    }
}

static void avx2_quantize_item(void *context, int64_t item, int thread) {
    (void)thread;
    const Quantize *q = context;
    CodeRegistersAvx2 r = code_registers_avx2(q);
    int64_t per = ceil_div(ITEM_ELEMENTS, q->blocksize), whole = q->numel / q->blocksize;
    for (int64_t b = item * per; b < min64((item + 1) * per, ceil_div(q->numel, q->blocksize)); b++) {
        if (b >= whole) scalar_quantize_block(q, b); /* the short last block */
        else if (q->dtype == FP32) avx2_quantize_block(q, &r, b, FP32);
        else if (q->dtype == BF16) avx2_quantize_block(q, &r, b, BF16);
        else avx2_quantize_block(q, &r, b, FP16);
    }
}

static void quantize_2_avx2(const Quantize *q) {
    if (!q->pack || q->code_length != 16 || q->blocksize % 32) {
        quantize_1_scalar(q);
        return;
    }
    int64_t per = ceil_div(ITEM_ELEMENTS, q->blocksize) * q->blocksize;
    run_parallel(avx2_quantize_item, (void *)q, ceil_div(q->numel, per), q->threads);
}
