/* Dequantising 4 bits, rung 2: a block can hold sixteen different numbers only, so multiply and round those sixteen
 * once and look the finished results up.
 *
 *     table      the 16 finished values: fp32 in one register, or bf16/fp16 twice (vpermw reads five index bits)
 *
 *     16-bit     16 bytes -> dwords:     [ . . . b ]   low word: b >> 4 (the first element), high word: b
 *     fp32        8 bytes -> qwords:     [ . . . . . . . b ]   low dword: b >> 4, high dword: b
 *
 * so each look-up comes out in memory order. Upper index bits that are not zero are not read. A large result goes
 * past the caches (streaming stores): writing it through them would first read what it overwrites.
 *
 * cc -O3 -mfma -mf16c -mavx512bw -mavx512dq -mavx512vl -DREFQ4_AVX512 -fsyntax-only dequantize_2_avx512.c
 */
#include "simd.h"
#include "dequantize_1_scalar.c"

static inline void store64(void *at, __m512i v, int stream) {
    if (stream) _mm512_stream_si512((__m512i *)at, v);
    else _mm512_storeu_si512(at, v);
}

static inline __m512i finished_table(const Dequantize *d, float scale) {
    __m512 values = _mm512_mul_ps(_mm512_loadu_ps(d->weight.code), _mm512_set1_ps(scale));
    if (d->dtype == FP32) return _mm512_castps_si512(values);
    if (d->dtype == FP16) {
        __m256i half = _mm512_cvtps_ph(values, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
        return _mm512_inserti64x4(_mm512_castsi256_si512(half), half, 1);
    }
    /* fp32_to_bf16 of refq4.h, sixteen at a time (vcvtneps2bf16 would lose subnormals) */
    __m512i u = _mm512_castps_si512(values), odd = _mm512_and_si512(_mm512_srli_epi32(u, 16), _mm512_set1_epi32(1));
    __m512i rounded = _mm512_srli_epi32(_mm512_add_epi32(_mm512_add_epi32(u, _mm512_set1_epi32(0x7FFF)), odd), 16);
    rounded = _mm512_mask_mov_epi32(rounded, _mm512_cmp_ps_mask(values, values, _CMP_UNORD_Q), _mm512_set1_epi32(0x7FC0));
    __m256i half = _mm512_cvtepi32_epi16(rounded);
    return _mm512_inserti64x4(_mm512_castsi256_si512(half), half, 1);
}

static void avx512_dequantize_block(const Dequantize *d, int64_t block, int stream) {
    int64_t bs = d->weight.blocksize;
    const uint8_t *in = d->weight.packed + block * (bs / 2);
    __m512i table = finished_table(d, block_scale(&d->weight, block));
    if (d->dtype == FP32) {
        float *out = (float *)d->out + block * bs;
        for (int64_t i = 0; i < bs / 2; i += 8, out += 16) {
            __m512i b = _mm512_cvtepu8_epi64(_mm_loadl_epi64((const __m128i *)(in + i)));
            __m512i index = _mm512_or_si512(_mm512_srli_epi64(b, 4), _mm512_slli_epi64(b, 32));
            store64(out, _mm512_permutexvar_epi32(index, table), stream);
        }
    } else {
        uint16_t *out = (uint16_t *)d->out + block * bs;
        for (int64_t i = 0; i < bs / 2; i += 16, out += 32) {
            __m512i b = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)(in + i)));
            __m512i index = _mm512_or_si512(_mm512_srli_epi32(b, 4), _mm512_slli_epi32(b, 16));
            store64(out, _mm512_permutexvar_epi16(index, table), stream);
        }
    }
}

static DequantizeBlock avx512_whole_block(const Dequantize *d) {
    return d->bits != 4 || d->weight.blocksize % 32 ? scalar_whole_block : avx512_dequantize_block;
}

static void avx512_dequantize_item(void *context, int64_t item, int thread) {
    (void)thread;
    const Dequantize *d = context;
    int stream = streams(d, 64);
    dequantize_item(d, item, avx512_whole_block(d), stream);
    if (stream) _mm_sfence(); /* the result must be there before another thread is told so */
}

static void dequantize_2_avx512(const Dequantize *d) { dequantize_in_items(d, avx512_dequantize_item); }
