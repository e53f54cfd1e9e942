/* Dequantising 4 bits, rung 2 for AVX2: a block can hold sixteen different numbers only, so multiply and round those
 * sixteen once and look the finished results up.
 *
 *     16-bit     the sixteen results as two tables of bytes, vpshufb the look-up (gemm_4bit_3_avx2_bytes.c), for 32 codes
 *                bytes:  a vpermd puts dwords 0 2 4 6 | 1 3 5 7 into the two lanes, so that words come out in order:
 *
 *                lane 0, bytes 0-3 | 8-11 | ...   vpunpcklbw  words of the high nibbles, of the low nibbles
 *                lane 1, bytes 4-7 | 12-15 | ...  vpunpcklwd  h0 l0 h1 l1 ... : elements of bytes 0-3, then of 4-7
 *
 *     fp32       4 bytes -> eight dwords shifted by 4 0 12 8 20 16 28 24; two vpermps and a blend (gemm_4bit_2_avx2.c)
 *
 * A large result goes past the caches (streaming stores): writing it through them would first read what it overwrites.
 *
 * cc -O3 -mavx2 -mfma -mf16c -DREFQ4_AVX2 -fsyntax-only dequantize_2_avx2.c
 */
#include "simd.h"
#include "dequantize_1_scalar.c"

static inline void store32(void *at, __m256i v, int stream) {
    if (stream) _mm256_stream_si256((__m256i *)at, v);
    else _mm256_storeu_si256((__m256i *)at, v);
}

static void avx2_block_fp32(const Dequantize *d, int64_t block, int stream) {
    int64_t bs = d->weight.blocksize;
    const uint8_t *in = d->weight.packed + block * (bs / 2);
    float *out = (float *)d->out + block * bs;
    __m256 scale = _mm256_set1_ps(block_scale(&d->weight, block));
    __m256 low = _mm256_mul_ps(_mm256_loadu_ps(d->weight.code), scale);
    __m256 high = _mm256_mul_ps(_mm256_loadu_ps(d->weight.code + 8), scale);
    __m256i shifts = _mm256_setr_epi32(4, 0, 12, 8, 20, 16, 28, 24);
    for (int64_t i = 0; i < bs / 2; i += 4, out += 8) {
        int32_t four;
        memcpy(&four, in + i, 4);
        __m256i index = _mm256_srlv_epi32(_mm256_set1_epi32(four), shifts);
        __m256 top = _mm256_castsi256_ps(_mm256_slli_epi32(index, 28)); /* blendv reads the sign bit */
        __m256 v = _mm256_blendv_ps(_mm256_permutevar8x32_ps(low, index), _mm256_permutevar8x32_ps(high, index), top);
        store32(out, _mm256_castps_si256(v), stream);
    }
}

static void avx2_block_16_bits(const Dequantize *d, int64_t block, int stream) {
    int64_t bs = d->weight.blocksize;
    const uint8_t *in = d->weight.packed + block * (bs / 2);
    uint16_t *out = (uint16_t *)d->out + block * bs, values[16];
    float scale = block_scale(&d->weight, block);
    for (int i = 0; i < 16; i++) store_from_fp32(values, d->dtype, i, d->weight.code[i] * scale);
    /* sixteen words -> their lower bytes and their upper bytes, each in both lanes */
    __m128i first = _mm_loadu_si128((const __m128i *)values), last = _mm_loadu_si128((const __m128i *)values + 1);
    __m128i byte = _mm_set1_epi16(0xFF);
    __m256i lower = _mm256_broadcastsi128_si256(_mm_packus_epi16(_mm_and_si128(first, byte), _mm_and_si128(last, byte)));
    __m256i upper = _mm256_broadcastsi128_si256(_mm_packus_epi16(_mm_srli_epi16(first, 8), _mm_srli_epi16(last, 8)));
    __m256i order = _mm256_setr_epi32(0, 2, 4, 6, 1, 3, 5, 7), nibble = _mm256_set1_epi8(15);
    for (int64_t i = 0; i < bs / 2; i += 32, out += 64) {
        __m256i bytes = _mm256_permutevar8x32_epi32(_mm256_loadu_si256((const __m256i *)(in + i)), order);
        __m256i h = _mm256_and_si256(_mm256_srli_epi32(bytes, 4), nibble), l = _mm256_and_si256(bytes, nibble);
        __m256i hl = _mm256_shuffle_epi8(lower, h), hu = _mm256_shuffle_epi8(upper, h);
        __m256i ll = _mm256_shuffle_epi8(lower, l), lu = _mm256_shuffle_epi8(upper, l);
        for (int half = 0; half < 2; half++) { /* bytes 0-15, bytes 16-31 */
            __m256i high_words = half ? _mm256_unpackhi_epi8(hl, hu) : _mm256_unpacklo_epi8(hl, hu);
            __m256i low_words = half ? _mm256_unpackhi_epi8(ll, lu) : _mm256_unpacklo_epi8(ll, lu);
            store32(out + 32 * half, _mm256_unpacklo_epi16(high_words, low_words), stream);
            store32(out + 32 * half + 16, _mm256_unpackhi_epi16(high_words, low_words), stream);
        }
    }
}

static DequantizeBlock avx2_whole_block(const Dequantize *d) {
    if (d->bits != 4 || d->weight.blocksize % (d->dtype == FP32 ? 16 : 64)) return scalar_whole_block;
    return d->dtype == FP32 ? avx2_block_fp32 : avx2_block_16_bits;
}

static void avx2_dequantize_item(void *context, int64_t item, int thread) {
    (void)thread;
    const Dequantize *d = context;
    int stream = streams(d, 32);
    dequantize_item(d, item, avx2_whole_block(d), stream);
    if (stream) _mm_sfence(); /* the result must be there before another thread is told so */
}

static void dequantize_2_avx2(const Dequantize *d) { dequantize_in_items(d, avx2_dequantize_item); }
